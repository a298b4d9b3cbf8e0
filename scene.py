"""Posed photographs and their cameras, and what all representations of a scene have in common.

    scene = load_scene("examples/apple")           # transforms.json, Blender's files or COLMAP's
    scene.train[3].camera.rays()                   # origins and directions [3,H*W]
    evaluate(nerf, scene)                          # mean PSNR on the held-out views, and how many there are
    export(nerf, "out", turntable(nerf, 60, 256))  # rendered views, depth and poses, for other programs

Poses follow OpenGL, lenses OpenCV, and distances are in the units of the file. Grids are laid over the box of interest,
as [-1,1]^3; what lies beyond it is contracted into [-2,2]^3 (mip-NeRF 360, Barron et al., arXiv 2111.12077, here in a
cubic form).
"""
import hashlib
import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import grid_sample, interpolate

import colmap
import ply
from captures import SceneError, find_transforms, lens_of, read_transforms, stands_upright
from files import is_number, one_line, replacing
from pictures import PictureError, frame_of, picture_size, read_picture


# ---- cameras ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Camera:
    """A pinhole camera with OpenCV's distortion.

    Attributes:
        pose: [3,4] float32 camera-to-world, OpenGL axes (x right, y up, looking along -z), units of the file.
        lens: fx, fy, cx, cy in pixels, then k1, k2, k3, k4, p1, p2.
        width, height: of the picture in pixels.
    """
    pose: torch.Tensor
    lens: tuple
    width: int
    height: int

    def framed(self, size):
        """The camera of the whole picture with the sides of a Frame, or with `size` pixels on the shorter side."""
        size = frame_of(size)
        if size.square:
            return self.square(size.short)
        width, height = size.sides(self.width, self.height)
        fx, fy, cx, cy, *distortion = self.lens
        across, down = width / self.width, height / self.height
        return replace(self, lens=(fx * across, fy * down, cx * across, cy * down, *distortion), width=width, height=height)

    def square(self, size):
        """The camera of the central square, drawn with size x size pixels."""
        side = min(self.width, self.height)
        fx, fy, cx, cy, *distortion = self.lens
        cx, cy, zoom = cx - (self.width - side) // 2, cy - (self.height - side) // 2, size / side
        lens = (fx * zoom, fy * zoom, cx * zoom, cy * zoom, *distortion)
        return replace(self, lens=lens, width=size, height=size)

    def window(self, left, top, side):
        """The camera of a square of `side` pixels in the picture, `left` and `top` pixels from its corner."""
        return replace(self.shifted(left, top), width=side, height=side)

    def shifted(self, right, down):
        """The camera whose pixel centres lie `right` and `down` pixels further."""
        fx, fy, cx, cy, *distortion = self.lens
        return replace(self, lens=(fx, fy, cx - right, cy - down, *distortion))

    def rays(self, device="cpu"):
        """rays_o, rays_d [3,H*W] of the pixel centres, row by row; rays_d of length 1."""
        pose = self.pose.to(device)
        rays_d = pose[:, :3] @ self.directions(device)
        return pose[:, 3:].expand_as(rays_d), rays_d / rays_d.norm(dim=0)

    def directions(self, device="cpu"):
        """[3,H*W] in the camera's own axes, of length 1."""
        pixel = torch.arange(self.width * self.height, device=device)
        lens = torch.tensor(self.lens, device=device)[:, None]
        return directions(lens, pixel % self.width + 0.5, pixel // self.width + 0.5)


def directions(lens, u, v):
    """Directions [3,N] of length 1, in the camera's axes, of pixels u, v [N]; lens [10,N] or [10,1]."""
    fx, fy, cx, cy, k1, k2, k3, k4, p1, p2 = lens
    x = x_d = (u - cx) / fx
    y = y_d = (v - cy) / fy
    # OpenCV's model leads from the undistorted to the distorted point: Newton's method leads back, also for
    # wide lenses, where the usual fixed-point iteration diverges.
    for _ in range(8 if lens[4:].any() else 0):
        r2 = x * x + y * y
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
        slope = k1 + r2 * (2 * k2 + r2 * (3 * k3 + r2 * 4 * k4))  # d radial / d r2
        error_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) - x_d
        error_y = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y) - y_d
        xx = radial + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x
        yy = radial + 2 * y * y * slope + 2 * p2 * x + 6 * p1 * y
        xy = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
        det = xx * yy - xy * xy
        x, y = x - (yy * error_x - xy * error_y) / det, y - (xx * error_y - xy * error_x) / det
    d = torch.stack((x, -y, -torch.ones_like(x)))
    return d / d.norm(dim=0)


def distorted(lens, x, y):
    """Where OpenCV's distortion of a lens moves points x, y [N] of the plane at distance 1: x, y [N] there."""
    _, _, _, _, k1, k2, k3, k4, p1, p2 = lens
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    return x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y


def in_picture(camera, x):
    """Where a pinhole camera sees points x [3,N]: u, v in pixels, depth, whether they are in its picture, each [N]."""
    fx, fy, cx, cy, *_ = camera.lens
    p = torch.linalg.inv(camera.pose[:, :3]) @ (x - camera.pose[:, 3:])
    depth = (-p[2]).clamp_min(1e-6)
    u, v = cx + fx * p[0] / depth, cy - fy * p[1] / depth
    return u, v, depth, (p[2] < 0) & (u > 0) & (u < camera.width) & (v > 0) & (v < camera.height)


# ---- posed photographs --------------------------------------------------------------------------------

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


# ---- reading scenes -----------------------------------------------------------------------------------

def load_scene(path, downscale=1, background=(1.0, 1.0, 1.0), images=None):
    """Read a capture: nerfstudio's or instant-ngp's transforms.json, Blender's transforms_*.json, or COLMAP's model.

    Args:
        path: the directory, or the .json file in it. A directory with a transforms.json means that one; else a model in
            its sparse/0, sparse or colmap/sparse/0 is read, with the pictures in images.
        downscale: pictures are reduced by this factor.
        background: the colour behind pictures with alpha.
        images: the folder of the pictures, if not that; in a transforms.json it takes the place of the first folder in
            their names. They may be reduced ones, as images_4.
    Returns:
        A Scene. Frames whose picture is missing are left out with a warning. The test views are Blender's test split
        (its val split where there is none), those of a transforms.json's test_filenames (or val_filenames), or every
        8th photograph of a capture, of COLMAP's in the order of their names. Masked pixels (mask_path) are not used.
        A cloud of points (COLMAP's points3D, or ply_file_path) bounds the box of interest.
    Raises:
        SceneError: nothing there, a corrupt file, no frames, a pose that is no pose, an unreadable picture, or
            pictures of different sizes.
    """
    if not (math.isfinite(downscale) and downscale >= 1):
        raise SceneError(f"{path}: downscale must be at least 1, got {downscale}")
    captures = _read(path, images)
    for note in (note for capture in captures for note in capture.notes):
        warnings.warn(one_line(note), stacklevel=2)
    first, origin = captures[0], _origin(captures)
    read = [[(shot.split, view) for shot, view in _read_views(capture, downscale, origin)] for capture in captures]
    train = [view for split, view in read[0] if split in (None, "train")]
    if len(read) > 1:
        test = [view for _, view in read[1]]
    elif any(split for split, _ in read[0]):
        test = [view for split, view in read[0] if split == "test"]
    else:
        test = train[::8] if len(train) > 2 else []
        train = [v for i, v in enumerate(train) if i % 8] if test else train
    if not train:
        raise SceneError(f"{first.path}: none of the pictures that are there is to be fitted")
    if not any(v.pixels.shape[-1] == 4 and v.pixels[..., 3].min() < OPAQUE for v in train + test):
        # an alpha channel that hides nothing is how a program stores photographs: they show no single object
        train, test = [[replace(v, pixels=v.pixels[..., :3].contiguous()) for v in views] for views in (train, test)]
    bounded = all(v.pixels.shape[-1] == 4 for v in train)
    background = torch.tensor(background, dtype=torch.float32)
    if not bounded:  # with any picture without alpha, the others go onto the background
        def flatten(view):
            pixels = over(view.picture(), background)
            return replace(view, pixels=(pixels * 255).round().byte().permute(1, 2, 0).contiguous())
        train, test = [[flatten(v) for v in views] for views in (train, test)]
    points, colours = _points(first, origin, train)
    centre, half = _bounds(train, bounded, points, first)
    digest = hashlib.sha256(json.dumps([centre.tolist(), half, background.tolist()]).encode())
    for view in train:
        digest.update(np.asarray([*view.camera.pose.flatten().tolist(), *view.camera.lens]).tobytes())
        digest.update(view.pixels.numpy().tobytes())
        digest.update(b"" if view.mask is None else view.mask.numpy().tobytes())
    for cloud in (points, colours):
        digest.update(b"" if cloud is None else cloud.numpy().tobytes())
    return Scene(first.path, train, test, centre, half, bounded, background, digest.hexdigest(), points, colours,
                 tuple(origin.tolist()))


def scene_files(path, images=None):
    """All files that load_scene(path, images=images) reads, in its order, each once; raises SceneError."""
    return list(dict.fromkeys(file for capture in _read(path, images) for file in capture.reads()))


def _read(path, images):
    """What the files of a scene say, a list of captures.Capture: one, or with Blender's held-out views two."""
    if find_transforms(path):
        return read_transforms(path, images)
    if colmap.find_model(path):
        return [colmap.read_model(path, images)]
    raise SceneError(f"{path}: no transforms.json or transforms_train.json in it, and no COLMAP model in its sparse/0: "
                     "photographs alone do not say where they were taken from, COLMAP finds it")


MOST, MOST_OF_ONE = 2 ** 26, 2 ** 21  # pixels of all pictures of a file, 100 of 800 x 800; of one, 1920 x 1080
OPAQUE = 250  # an alpha from here on hides nothing: lossy formats do not keep 255


def _origin(captures):
    """Where zero is moved to, [3] float64: the middle of the cameras where they lie far from zero, else zero itself.

    float32 tells 1e-7 of a coordinate apart. Up to a hundred extents from zero that is 1e-5 of the scene's extent, far
    less than a pixel; nothing is moved then.
    """
    position = np.stack([shot.pose[:, 3] for capture in captures for shot in capture.shots])
    middle = position.mean(0)
    extent = np.linalg.norm(position - middle, axis=1).max()
    # of a single place nobody knows how large what is seen from there is: ten units
    return middle if np.linalg.norm(middle) > 100 * (extent or 10) else np.zeros(3)


def _read_views(capture, downscale, origin):
    """The photographs of one file, in its order, as a list of (Shot, View)."""
    path, views, sideways, hidden, first = capture.path, [], 0, [], None
    try:
        sizes = [picture_size(shot.picture) for shot in capture.shots]
        counts = [math.prod(own) / downscale ** 2 for own, _ in sizes]
        reduced = math.sqrt(max(1, sum(counts) / MOST, max(counts) / MOST_OF_ONE))
        downscale *= reduced
        for shot, (own, orientation) in zip(capture.shots, sizes):
            # As the cameras were found: with the picture as it is stored, unless the file says that it was turned.
            turned = stands_upright(shot, own, orientation)
            own, sideways = own[::-1] if turned else own, sideways + (orientation > 1 and not turned)
            if own != (first := sizes[0][0]) and not shot.own and not turned:
                raise SceneError(f"{shot.picture}: {own[0]} x {own[1]} pixels, those before it have "
                                 f"{first[0]} x {first[1]}")
            pixels = torch.from_numpy(np.array(read_picture(shot.picture, downscale, upright=turned)))
            lens = lens_of(path, shot, own, pixels.shape)
            if any(lens[4:]) and not _undistorts(lens, pixels.shape):
                raise SceneError(f"{path}: {shot.label} has a distortion (k1 to k4, p1, p2) that cannot be undone")
            mask = None if shot.mask is None else _read_mask(shot.mask, own, pixels.shape)
            if mask is not None and not mask.any():
                hidden.append(shot.mask)
                continue
            pose = torch.from_numpy(np.concatenate((shot.pose[:, :3], shot.pose[:, 3:] - origin[:, None]), 1)).float()
            views.append((shot, View(Camera(pose, lens, pixels.shape[1], pixels.shape[0]), pixels, shot.name, mask)))
    except PictureError as e:
        raise SceneError(e) from e
    if not views:
        raise SceneError(f"{path}: its masks leave no pixel, e.g. {hidden[0]}: black is what is not used")
    if hidden:
        warnings.warn(one_line(f"{path}: {len(hidden)} of its masks leave no pixel, e.g. {hidden[0]}: their pictures "
                               "are left out"), stacklevel=3)
    if sideways:
        warnings.warn(one_line(f"{path}: {sideways} of its pictures say that they are to be turned (EXIF); they are "
                               "taken as they are stored, as no w and h in the file say otherwise"), stacklevel=3)
    if reduced > 1:
        warnings.warn(one_line(f"{path}: its pictures have {sum(counts) / 1e6:.0f} million pixels, the largest one "
                               f"{max(counts) / 1e6:.0f}: reduced by {downscale:.3g}, as by --downscale"), stacklevel=3)
    return views


def _read_mask(path, own, shape):
    """[H,W] bool, True where all that a pixel was averaged from is brighter than half of the mask's brightest value.

    own: (width, height) of the photograph's file, whose shape the mask must have; shape [H,W,...]: of its pixels here.
    """
    grey = np.array(read_picture(path, 1, upright=False).convert("RGB")).max(2)
    if abs(grey.shape[1] / grey.shape[0] * own[1] / own[0] - 1) > 0.02:
        raise SceneError(f"{path}: a mask of {grey.shape[1]} x {grey.shape[0]} pixels, its picture has "
                         f"{own[0]} x {own[1]}")
    used = torch.from_numpy(grey > grey.max() / 2)[None].float()  # 255 is white, in some programs' masks 1
    return interpolate(used[None], size=tuple(shape[:2]), mode="area")[0, 0] > 1 - 1e-6


def _undistorts(lens, shape):
    """Whether `directions` finds the way back through the distortion of a lens, for most of the picture [H,W,...]."""
    fx, fy, cx, cy, *_ = lens
    v, u = torch.meshgrid(*(torch.linspace(0, n, 9, dtype=torch.float64) for n in shape[:2]), indexing="ij")
    d = directions(torch.tensor(lens, dtype=torch.float64)[:, None], u.flatten(), v.flatten())
    x, y = distorted(lens, d[0] / -d[2], -d[1] / -d[2])
    off = torch.stack((fx * x + cx - u.flatten(), fy * y + cy - v.flatten()))
    return bool(d.isfinite().all() and (off.abs() < 1).all(0).float().mean() > 0.75)


LEAST_SEEN = 0.01  # share of a cloud's points that some camera sees; of other coordinates it is less


def _points(capture, origin, views):
    """The cloud of a capture from `origin`, [N,3] float32, and its colours [N,3] in [0,1]; None where there is none.

    nerfstudio's clouds lie in the coordinates of the poses. Those of its first releases lie in COLMAP's, to which
    applied_transform had not yet been applied: where the cameras see more of the points with it, it is applied. A cloud
    of which they see next to nothing is no part of this scene, and is not used.
    """
    if capture.cloud is None:
        return None, None
    points, colours = (colmap if capture.cloud.suffix in (".bin", ".txt") else ply).read_points(capture.cloud)
    choices, given = [points], capture.keys.get("applied_transform")
    if given is not None:
        rows = np.array(given, dtype=np.float64) if _is_affine(given) else None
        if rows is None:
            raise SceneError(f"{capture.path}: its applied_transform is no 3 x 4 matrix of numbers")
        choices.append(points @ rows[:3, :3].T + rows[:3, 3])
    choices = [torch.from_numpy(choice - origin).float() for choice in choices]
    shares = [_share_seen(choice, views) for choice in choices]
    best = max(range(len(choices)), key=lambda i: shares[i] - 0.1 * i)  # the rule, unless the exception is much better
    if len(points) and shares[best] < LEAST_SEEN:
        warnings.warn(one_line(f"{capture.cloud}: the cameras see {shares[best]:.0%} of its points, so these lie "
                               "elsewhere: they are not used"), stacklevel=3)
    if not len(points) or shares[best] < LEAST_SEEN:
        return None, None
    return choices[best], None if colours is None else torch.from_numpy(colours).float()


def _is_affine(value):
    """Whether a value read from JSON is a matrix of 3 or 4 rows of 4 numbers."""
    return (isinstance(value, list) and len(value) in (3, 4)
            and all(isinstance(row, list) and len(row) == 4 for row in value)
            and all(is_number(x, -1e7, 1e7) for row in value for x in row))


def _share_seen(points, views, most=2000):
    """The share of points [N,3], of no more than `most` of them, that at least one of the views has in its picture."""
    points = points[::max(1, len(points) // most)]
    seen = torch.zeros(len(points), dtype=torch.bool)
    for view in views:
        seen |= in_picture(view.camera, points.T)[3]
    return seen.float().mean().item() if len(points) else 0.0


NGP_UNIT = 0.33  # instant-ngp's unit cube holds 1 / 0.33 of the file's units, centred


def _bounds(views, bounded, points, capture):
    """The box of interest: its centre [3] and half side.

    The centre is the point nearest to all optical axes. Objects: the box is what the cameras can see around
    it. Captures: it reaches to the median camera, but no further than nearly all of the points, if they are known, nor
    than instant-ngp's aabb_scale.
    """
    path = capture.path
    position = torch.stack([v.camera.pose[:, 3] for v in views]).double()  # [V,3]
    axis = torch.stack([-v.camera.pose[:, 2] for v in views]).double()
    axis = axis / axis.norm(dim=1, keepdim=True)
    across = torch.eye(3, dtype=torch.float64) - axis[:, :, None] * axis[:, None]  # [V,3,3]
    A, b = across.mean(0), (across @ position[..., None]).mean(0)[:, 0]
    spread = (position - position.mean(0)).norm(dim=1).max().clamp_min(1e-3)
    # parallel axes meet nowhere: a weak pull to a point ahead of the cameras decides then
    ahead = position.mean(0) + axis.mean(0) * 2 * spread
    centre = torch.linalg.solve(A + 1e-3 * torch.eye(3, dtype=A.dtype), b + 1e-3 * ahead)
    distance = (position - centre).norm(dim=1)
    _check_axes(path, (((centre - position) * axis).sum(1) / distance.clamp_min(1e-12)), bounded, points)
    if bounded:
        cameras = [v.camera for v in views]
        reach = [max(c.width / c.lens[0], c.height / c.lens[1]) / 2 for c in cameras]
        half = 1.05 * (distance * torch.tensor(reach, dtype=torch.float64)).median().item()
        _, hull = visual_hull(views, centre.float(), half, 1, 48)
        if hull.any():  # closer around what is there, with room for an edit to grow into
            x = (cell_points(hull.nonzero()[:, 0], 48) * 2 - 1).double() * half
            low, high = x.amin(1), x.amax(1)
            centre, half = centre + (low + high) / 2, min(half, 1.25 * (high - low).max().item() / 2)
    else:
        half, scale = distance.median().item(), capture.keys.get("aabb_scale")
        if points is not None and len(points) >= colmap.FEWEST:
            half = min(half, 1.05 * (points.double() - centre).abs().amax(1).quantile(0.98).item())
        if scale is not None:
            if not is_number(scale, 1e-3, 1e6):
                raise SceneError(f"{path}: aabb_scale is no number between 0.001 and a million")
            half = min(half, scale / 2 / NGP_UNIT)
    half = max(half, 1e-3)
    if not (math.isfinite(half) and centre.isfinite().all()):
        raise SceneError(f"{path}: its cameras look at no common place")
    if position.abs().max() > 1e4 * half:
        raise SceneError(f"{path}: its cameras lie at up to {position.abs().max():g} units, what they look at is "
                         f"{half:.3g} large: move the origin of the poses there")
    return centre.float(), half


def _check_axes(path, ahead, bounded, points):
    """Say so where nine of ten cameras look away from the place that is nearest to all their axes.

    ahead: [V], the cosine between a camera's axis and the way to that place. A panorama from the inside has such
    cameras, too: a warning then, and none where a cloud of points stands in front of them. An object must be in front.
    """
    if len(ahead) < 3 or (ahead < -0.5).double().mean() < 0.9:
        return
    hint = ("if they should look at it, the poses have OpenCV's axes (y down, z forward): flip the signs of their "
            "second and third columns")
    if bounded:
        raise SceneError(f"{path}: its cameras look away from the object: {hint}")
    if points is None:
        warnings.warn(one_line(f"{path}: its cameras look away from their common place, as in a panorama from the "
                               f"inside; {hint}"), stacklevel=4)


# ---- the box of interest ------------------------------------------------------------------------------

def cell_points(cell, cells, offset=0.5):
    """Numbers [N] of the cells of a cubic grid -> points [3,N] in [0,1]; offset in the cell, 0.5 or [3,N]."""
    return (torch.stack((cell % cells, cell // cells % cells, cell // cells ** 2)) + offset) / cells


def contract(x):
    """Points [3,...] -> [3,...] inside the cube [-2,2]^3; the identity in [-1,1]^3.

    mip-NeRF 360, eq. 10, with the largest coordinate as the norm: the image is a cube, and fills the grid.
    """
    m = x.abs().amax(0).clamp_min(1)
    return x * ((2 - 1 / m) / m)


def uncontract(x):
    """The inverse of contract, [3,...]."""
    m = x.abs().amax(0).clamp(1, 2 - 1e-6)
    return x / (m * (2 - m))


def visual_hull(views, centre, half, extent, cells):
    """Which cells of the grid over [-extent, extent]^3 some view sees, and which of these may hold something.

    A cell that lies against a transparent background in any view is empty (space carving): the occupancy of
    an object starts near the truth. Pictures without alpha say nothing about emptiness.

    Returns:
        seen, hull: [cells^3] bool.
    """
    seen, alive = torch.zeros(cells ** 3, dtype=torch.bool), torch.arange(cells ** 3)
    for view in views:
        camera = view.camera
        fx, _, _, _, *distortion = camera.lens
        x = uncontract(cell_points(alive, cells) * (2 * extent) - extent) * half + centre[:, None]
        u, v, depth, inside = in_picture(camera, x)
        seen[alive[inside]] = True
        if view.pixels.shape[-1] == 4 and inside.any() and not any(distortion):
            # any pixel that the cell may touch speaks for it; sums over rectangles cost the same for any radius
            radius = fx * half * extent / cells * 3 ** 0.5 / depth[inside].min().item()
            radius = math.ceil(min(radius, max(camera.width, camera.height)))
            sums = torch.zeros(camera.height + 1, camera.width + 1, dtype=torch.int32)
            shown = view.pixels[..., 3] > 0
            shown = shown if view.mask is None else shown | ~view.mask  # what is masked says nothing
            sums[1:, 1:] = shown.int().cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
            row, column = v[inside].long(), u[inside].long()
            top, bottom = (row - radius).clamp_min(0), (row + radius + 1).clamp_max(camera.height)
            left, right = (column - radius).clamp_min(0), (column + radius + 1).clamp_max(camera.width)
            keep = ~inside
            keep[inside] = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] > 0
            alive = alive[keep]
    hull = torch.zeros_like(seen)
    hull[alive] = True
    return seen, hull & seen


# ---- representations ----------------------------------------------------------------------------------

def spherical_harmonics(d):
    """Real spherical harmonics up to degree 3 (16 of them) of directions d [3,N] of length 1 -> [16,N]."""
    x, y, z = d
    xx, yy, zz = x * x, y * y, z * z
    return torch.stack((
        torch.full_like(x, 0.28209479), -0.48860251 * y, 0.48860251 * z, -0.48860251 * x,
        1.09254843 * x * y, -1.09254843 * y * z, 0.94617470 * zz - 0.31539157, -1.09254843 * x * z,
        0.54627421 * (xx - yy), 0.59004359 * y * (yy - 3 * xx), 2.89061144 * x * y * z,
        0.45704580 * y * (1 - 5 * zz), 0.37317633 * z * (5 * zz - 3), 0.45704580 * x * (1 - 5 * zz),
        1.44530572 * z * (xx - yy), 0.59004359 * x * (3 * yy - xx)))


class Representation(torch.nn.Module):
    """Something that draws views of a scene from any camera, and can be fitted to it and edited.

    A subclass defines rgb(camera) and depth(view, size), and for an edit param_groups, project_, data_loss, save.

    Attributes:
        scene: the Scene.
        centre, background: the scene's, [3]; buffers, which follow the module to its device.
    """

    def __init__(self, scene):
        super().__init__()
        self.scene = scene
        self.register_buffer("centre", scene.centre.clone())
        self.register_buffer("background", scene.background.clone())

    def rgb(self, camera):
        """What a Camera sees, [3,H,W], on the background; rounding may lead a little out of [0,1]."""
        raise NotImplementedError

    def render(self, view=None, size=None):
        """The picture [1,3,H,W] in [0,1] of a view (see `camera`), differentiable in all parameters."""
        rgb = self.rgb(self.camera(view, size))
        return (rgb + (rgb.clamp(0, 1) - rgb).detach())[None]  # the gradient goes through the clamp

    def camera(self, view=None, size=None):
        """view: a training view's number, a Camera, or None for the one in the middle; size: its sides, see framed."""
        if view is None:
            position = torch.stack([v.camera.pose[:, 3] for v in self.scene.train])
            view = (position - position.mean(0)).norm(dim=1).argmin().item()
        camera = view if isinstance(view, Camera) else self.scene.train[view].camera
        return camera if size is None else camera.framed(size)

    def photograph(self, view, size):
        """Training picture number `view`, on the background, with the sides of camera(view, size): [1,3,H,W]."""
        pixels, camera = self.scene.train[view].picture(self.centre.device), self.camera(view, size)
        if frame_of(size).square:
            side = min(pixels.shape[1:])
            top, left = ((n - side) // 2 for n in pixels.shape[1:])
            pixels = pixels[:, top:top + side, left:left + side]
        return interpolate(over(pixels, self.background)[None], size=(camera.height, camera.width), mode="bicubic",
                           antialias=True).clamp(0, 1)

    def sample_view(self, generator=None):
        """The number of a training view, drawn on the CPU."""
        return int(torch.randint(len(self.scene.train), (), generator=generator))

    def dataset(self, size, look):
        """The pictures look(view, size) [1,3,H,W] of all training views as Pixels, which an edit replaces one by one."""
        cameras = [self.camera(i, size) for i in range(len(self.scene.train))]
        with torch.no_grad():
            pictures = [(look(i, size)[0].permute(1, 2, 0) * 255).round().byte().cpu() for i in range(len(cameras))]
        return Pixels([View(c, p, str(i)) for i, (c, p) in enumerate(zip(cameras, pictures))], self.centre.device)


@torch.no_grad()
def evaluate(representation, scene):
    """Mean PSNR in dB over the scene's test views, on the background, without masked pixels; and their number."""
    psnrs = []
    for view in scene.test:
        photograph = over(view.picture(representation.centre.device), representation.background)
        error = (representation.render(view.camera)[0] - photograph).square()
        error = error if view.mask is None else error[:, view.mask.to(error.device)]
        psnrs.append(-10 * math.log10(error.mean().item() + 1e-12))
    return (sum(psnrs) / len(psnrs) if psnrs else math.nan), len(psnrs)


# ---- ways around a scene ------------------------------------------------------------------------------

def turntable(representation, frames, size):
    """`frames` square Cameras around the scene.

    A full turn where the training cameras surround it, otherwise there and back over the arc that they cover.
    """
    at, full = _orbit(representation, size)
    turn = [i / frames for i in range(frames)]
    return [at(u if full else 0.5 + 0.5 * math.sin(2 * math.pi * u)) for u in turn]


def sides(representation, count, size):
    """`count` square Cameras spread over the turn, or over the arc from one end to the other."""
    at, full = _orbit(representation, size)
    return [at(i / count if full else i / max(count - 1, 1)) for i in range(count)]


def _orbit(representation, size):
    """(share of the way in 0..1 -> square Camera, whether the way is a full turn).

    The way leads around the scene's centre at the training cameras' median distance and height.
    """
    pose = torch.stack([v.camera.pose for v in representation.scene.train])  # [V,3,4]
    centre = representation.scene.centre
    up = pose[:, :, 1].mean(0)
    up = up / up.norm()
    offset = pose[:, :, 3] - centre
    height, distance = offset @ up, offset.norm(dim=1)
    forward = offset.mean(0) - offset.mean(0) @ up * up  # the middle of the arc; for a circle the first view
    if forward.norm() < 0.1 * distance.mean():
        forward = offset[0] - height[0] * up
    forward = forward / forward.norm()
    right = torch.linalg.cross(up, forward)
    angle = torch.atan2(offset @ right, offset @ forward)
    ordered = angle.sort().values
    gap = torch.cat((ordered.diff(), ordered[:1] + 2 * math.pi - ordered[-1:])).max()
    full = bool(gap <= math.pi / 3)
    low, high = (0.0, 2 * math.pi) if full else (angle.quantile(0.02).item(), angle.quantile(0.98).item())
    elevation = torch.asin((height / distance).clamp(-1, 1)).median()
    lens = representation.camera(None).square(size)

    def at(share):
        a = torch.tensor(low + (high - low) * share)
        back = elevation.cos() * (a.cos() * forward + a.sin() * right) + elevation.sin() * up
        return replace(lens, pose=look_at(centre + distance.median() * back, back, up))
    return at, full


def input_path(representation, frames, size):
    """`frames` square Cameras on the way through the training views, in their order."""
    pose = torch.stack([v.camera.pose for v in representation.scene.train])
    cameras = []
    for at in torch.linspace(0, len(pose) - 1, frames):
        i = min(int(at), len(pose) - 2) if len(pose) > 1 else 0
        middle = torch.lerp(pose[i], pose[min(i + 1, len(pose) - 1)], at - i)
        cameras.append(replace(representation.camera(i).square(size), pose=look_at(middle[:, 3], middle[:, 2], middle[:, 1])))
    return cameras


def look_at(position, back, up):
    """Pose [3,4] at `position` whose z axis is `back`, with y near `up`."""
    back = back / back.norm()
    right = torch.linalg.cross(up, back)
    right = right / right.norm()
    return torch.stack((right, torch.linalg.cross(back, right), back, position), 1)


# ---- pictures for other programs ----------------------------------------------------------------------

def depth_picture(depth):
    """Depth [1,1,H,W] of a representation -> [1,3,H,W] in [0,1]: near is white, far is dark, nothing is black."""
    hit = depth > 0
    if not hit.any():
        return torch.zeros_like(depth).expand(-1, 3, -1, -1)
    low, high = depth[hit].min(), depth[hit].max()
    return torch.where(hit, 1 - 0.8 * (depth - low) / (high - low).clamp_min(1e-6), 0).expand(-1, 3, -1, -1)


def export(representation, folder, cameras):
    """Write images/*.png, depth/*.png and a transforms.json of rendered views, for nerfstudio and load_scene.

    The poses lie in the coordinates of the scene's file, in float64. Depth is 16 bit, z along the optical axis in
    thousandths of a unit, as nerfstudio wants it.
    """
    folder, frames = Path(folder), []
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for i, camera in enumerate(cameras):
            picture = (representation.render(camera)[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            with replacing(folder / "images" / f"{i:05}.png") as part:
                Image.fromarray(picture).save(part, "PNG")
            axis = camera.directions()[2].abs()
            depth = representation.depth(camera).cpu()[0, 0] * axis.view(camera.height, camera.width)
            depth = (depth * 1000).round().clamp(0, 65535).numpy().astype(np.uint16)
            with replacing(folder / "depth" / f"{i:05}.png") as part:
                Image.fromarray(depth).save(part, "PNG")
            pose = torch.cat((camera.pose.double(), torch.tensor([[0.0, 0, 0, 1]])))
            pose[:3, 3] += torch.tensor(representation.scene.origin, dtype=torch.float64)
            names = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2")
            frames.append(dict(file_path=f"images/{i:05}.png", depth_file_path=f"depth/{i:05}.png",
                               transform_matrix=pose.tolist(), w=camera.width, h=camera.height)
                          | dict(zip(names, camera.lens)))
    with replacing(folder / "transforms.json") as part:
        part.write_text(json.dumps({"camera_model": "OPENCV", "frames": frames}, indent=1))
