"""TODO docstring."""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import grid_sample

from scene.cameras import Camera, directions, distorted


@dataclass(frozen=True)
class View:
    """One photograph: its camera, its pixels uint8 [H,W,3], or [H,W,4] with straight alpha, and its name.

    mask: [H,W] bool, the pixels that are used; None: all. The others are neither fitted nor measured.
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
        train, test: lists of View; the test views are never fitted.
        centre, half: the box of interest is the cube centre [3] +- half, in the units of the file.
        bounded: nothing lies outside the box (all pictures have alpha); otherwise what does is contracted.
        background: [3] in [0,1], behind pictures with alpha.
        fingerprint: sha256 of cameras, pictures, masks and points.
        points, colours: of the capture's cloud, [N,3] in the units of the file and [N,3] in [0,1]; or None.
        origin: three floats, where the zero of all positions here lies in the coordinates of the file: far from its own
            zero, as on a map, float32 could not tell the positions apart.
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
        return self  # it never changes, and an edit copies its representation


def undistorted(scene):
    """The scene with the photographs that pinhole cameras would have taken, resampled; itself where all are such."""
    if not any(any(view.camera.lens[4:]) for view in scene.train + scene.test):
        return scene
    return replace(scene, **{name: [_pinhole(view) for view in getattr(scene, name)] for name in ("train", "test")})


def _pinhole(view):
    """A View without distortion, of the same focal lengths and size; masked where the photograph shows none of it."""
    camera = view.camera
    if not any(camera.lens[4:]):
        return view
    lens, height, width = camera.lens, camera.height, camera.width
    fx, fy, cx, cy, *_ = lens
    v, u = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    x, y = ((u - cx) / fx).flatten(), ((v - cy) / fy).flatten()
    u, v = (f * at + c for f, at, c in zip((fx, fy), distorted(lens, x, y), (cx, cy)))
    back = directions(torch.tensor(lens, dtype=torch.float64)[:, None], u, v)  # far out the polynomial turns around
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
                   pixels=(drawn.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous())


def over(pixels, behind):
    """Pixels [3,...] or [4,...] with straight alpha -> [3,...] in front of `behind` [3] or [3,...]."""
    if len(pixels) == 3:
        return pixels
    behind = behind.reshape(3, *behind.shape[1:], *[1] * (pixels.ndim - behind.ndim))
    return torch.lerp(behind.expand_as(pixels[:3]), pixels[:3], pixels[3:])


class Pixels:
    """All pixels of some views, to draw rays from. Rays are made when they are drawn: only 8-bit pictures are kept.

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
        """Put another picture [1,3,H,W] in [0,1] in the place of a view's."""
        rows = (picture[0].permute(1, 2, 0) * 255).round().byte()
        self.pixels[self.start[view]:self.start[view + 1]] = rows.reshape(-1, 3).to(self.pixels)

    def picture(self, view, pixels=None):
        """What stands in a view's place, [1,3,H,W] in [0,1], or stood there when `pixels` was a copy; RGB only."""
        rows = (self.pixels if pixels is None else pixels)[self.start[view]:self.start[view + 1]]
        return rows.T.float().view(1, 3, self.cameras[view].height, -1) / 255

    def __call__(self, count, generator):
        """rays_o, rays_d [3,count], pixels [C,count] in [0,1], drawn at random."""
        drawn = self.pixels if self.used is None else self.used
        at = torch.randint(len(drawn), (count,), generator=generator, device=self.pixels.device)
        at = at if self.used is None else self.used[at]
        view = torch.searchsorted(self.start, at, right=True) - 1
        at_view, width = at - self.start[view], self.width[view]
        d = directions(self.lens[:, view], at_view % width + 0.5, at_view // width + 0.5)
        pose = self.pose[:, :, view]
        return pose[:, 3], (pose[:, :3] * d).sum(1), self.pixels[at].T.float() / 255
