"""Posed photographs: a view with its pixels, a scene of views, undistortion, random pixels for a fit.

    pixels = Pixels(scene.train, "cpu")
    rays_o, rays_d, rgba = pixels(512, generator)  # [3,512], [3,512], [3 or 4,512]
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import grid_sample

from files.pictures import to_uint8
from scene.cameras import Camera, directions, distorted


@dataclass(frozen=True)
class View:
    """One photograph.

    Attributes:
        camera: its Camera.
        pixels: uint8 [H,W,3], or [H,W,4] with straight alpha.
        name: as spelled in the file.
        mask: [H,W] bool, the pixels that are fitted and measured; None: all.
    """
    camera: Camera
    pixels: torch.Tensor
    name: str
    mask: torch.Tensor = None

    def picture(self, device="cpu"):
        """The pixels as float32 [3,H,W] or [4,H,W] in [0,1]."""
        return self.pixels.to(device).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Scene:
    """Posed photographs.

    Attributes:
        path: the file that the scene was read from.
        train, test: lists of View; test views are never fitted.
        centre, half: the box of interest is the cube centre [3] +- half, in the units of the file.
        bounded: nothing lies outside the box (all pictures have alpha); else the space outside is contracted.
        background: [3] in [0,1], behind pictures with alpha.
        fingerprint: sha256 of cameras, pictures, masks and points.
        points, colours: of the capture's cloud, [N,3] in the units of the file and [N,3] in [0,1]; or None.
        origin: three floats, added to positions of this scene to get coordinates of the file. float32 cannot tell map
            coordinates apart, which are far from zero.
    """
    path: Path
    train: list
    test: list
    centre: torch.Tensor
    half: float
    bounded: bool
    background: torch.Tensor
    fingerprint: str
    points: torch.Tensor = None
    colours: torch.Tensor = None
    origin: tuple = (0.0, 0.0, 0.0)

    def __deepcopy__(self, memo):
        return self  # immutable; an edit copies representations


def undistorted(scene):
    """The scene with its photographs resampled to pinhole cameras; the same object if no lens is distorted."""
    if not any(any(view.camera.lens[4:]) for view in scene.train + scene.test):
        return scene
    return replace(scene, **{name: [_pinhole(view) for view in getattr(scene, name)] for name in ("train", "test")})


def _pinhole(view):
    """A View without distortion, of the same lens and size, masked where the photograph has no pixels."""
    camera = view.camera
    if not any(camera.lens[4:]):
        return view
    lens, height, width = camera.lens, camera.height, camera.width
    fx, fy, cx, cy, *_ = lens
    v, u = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    x, y = ((u - cx) / fx).flatten(), ((v - cy) / fy).flatten()
    u, v = (f * at + c for f, at, c in zip((fx, fy), distorted(lens, x, y), (cx, cy), strict=True))
    back = directions(torch.tensor(lens, dtype=torch.float64)[:, None], u, v)  # far out the polynomial is not monotonic
    there = (u > 0) & (u < width) & (v > 0) & (v < height) & ((back[0] / -back[2] - x).abs() < 1e-3)
    grid = torch.stack((2 * u / width - 1, 2 * v / height - 1), 1).view(1, height, width, 2).float()
    pixels = view.picture()
    # averaged premultiplied, or the colour under transparent pixels would bleed into the edges
    premultiplied = pixels if len(pixels) == 3 else torch.cat((pixels[:3] * pixels[3:], pixels[3:]))
    used = torch.ones(1, height, width) if view.mask is None else view.mask[None].float()
    drawn = grid_sample(torch.cat((premultiplied, used))[None], grid, padding_mode="border", align_corners=False)[0]
    drawn, used = drawn[:-1], drawn[-1] > 1 - 1e-4
    if len(pixels) == 4:
        drawn = torch.cat((drawn[:3] / drawn[3:].clamp_min(1e-6), drawn[3:]))
    mask = used & there.view(height, width)
    return replace(view, camera=replace(camera, lens=(*lens[:4], *[0.0] * 6)), mask=None if mask.all() else mask,
                   pixels=to_uint8(drawn.clamp(0, 1)))


def over(pixels, behind):
    """Composite pixels [3,...], or [4,...] with straight alpha, over `behind` [3] or [3,...] -> [3,...]."""
    if len(pixels) == 3:
        return pixels
    behind = behind.reshape(3, *behind.shape[1:], *[1] * (pixels.ndim - behind.ndim))
    return torch.lerp(behind.expand_as(pixels[:3]), pixels[:3], pixels[3:])


class Pixels:
    """All pixels of some views, to sample rays from. Only 8-bit pictures are kept, rays are made when needed.

    Attributes:
        cameras: of the views, a list.
        pixels: [M,C] uint8, view after view, row after row.
        used: numbers of the pixels that masks leave; None: all.
    """

    def __init__(self, views, device):
        self.cameras, channels = [v.camera for v in views], views[0].pixels.shape[-1]
        self.pixels = torch.cat([v.pixels.reshape(-1, channels) for v in views]).to(device)
        counts = torch.tensor([0] + [c.width * c.height for c in self.cameras])
        self.start = counts.cumsum(0).to(device)  # [V+1], the first pixel of each view
        self.width = torch.tensor([c.width for c in self.cameras], device=device)
        self.lens = torch.tensor([c.lens for c in self.cameras], device=device).T.contiguous()  # [10,V]
        self.pose = torch.stack([c.pose for c in self.cameras], 2).to(device)  # [3,4,V]
        self.used = None
        if any(v.mask is not None for v in views):
            masks = [torch.ones(v.pixels.shape[:2], dtype=torch.bool) if v.mask is None else v.mask for v in views]
            self.used = torch.cat([mask.reshape(-1) for mask in masks]).nonzero()[:, 0].to(device)

    def replace(self, view, picture):
        """Replace the picture of a view by another, [1,3,H,W] in [0,1]."""
        self.pixels[self.start[view]:self.start[view + 1]] = to_uint8(picture[0]).view(-1, 3).to(self.pixels)

    def picture(self, view, pixels=None):
        """The picture of a view, [1,3,H,W] in [0,1]; pixels: an earlier copy to read from. RGB only."""
        rows = (self.pixels if pixels is None else pixels)[self.start[view]:self.start[view + 1]]
        return rows.T.float().view(1, 3, self.cameras[view].height, -1) / 255

    def __call__(self, count, generator):
        """rays_o, rays_d [3,count] and pixels [C,count] in [0,1] of random pixels."""
        return self.look(self.numbers(count, generator))[:3]

    def numbers(self, count, generator):
        """Numbers [count] of random pixels."""
        drawn = self.pixels if self.used is None else self.used
        at = torch.randint(len(drawn), (count,), generator=generator, device=self.pixels.device)
        return at if self.used is None else self.used[at]

    def look(self, at):
        """rays_o, rays_d [3,N], pixels [C,N] in [0,1] and numbers of the views [N] of pixels, numbers [N]."""
        view = torch.searchsorted(self.start, at, right=True) - 1
        at_view, width = at - self.start[view], self.width[view]
        d = directions(self.lens[:, view], at_view % width + 0.5, at_view // width + 0.5)
        pose = self.pose[:, :, view]
        return pose[:, 3], (pose[:, :3] * d).sum(1), self.pixels[at].T.float() / 255, view
