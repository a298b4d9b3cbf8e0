"""A compact NeRF in plain PyTorch: multi-resolution hash grid, occupancy grid, deferred image gradients.

    scene = load_scene("examples/apple")           # nerfstudio / instant-ngp transforms.json, or Blender's
    nerf = NeRF.fit(scene, seconds=60)             # process CPU time on a CPU, wall time on a GPU
    psnr, views = evaluate(nerf, scene)            # on the held-out views
    picture = nerf.render(view=3, size=64)         # [1,3,64,64] in [0,1], differentiable, flat in memory

The grid is Instant NGP's (Mueller et al., arXiv 2201.05989), the rendering NeRF's (Mildenhall et al., arXiv
2003.08934), distortion loss and contraction of what lies beyond the box, here in a cubic form, mip-NeRF 360's
(Barron et al., arXiv 2111.12077). The box is [-1,1]^3 to the field; cameras stay in the units of the file.
"""
import hashlib
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import huber_loss, interpolate, leaky_relu, max_pool2d, max_pool3d
from tqdm import tqdm


class SceneError(ValueError):
    """A scene or a checkpoint that cannot be used; one line that names the file and the reason."""


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

    def square(self, size):
        """The camera of the central square, drawn with size x size pixels."""
        side = min(self.width, self.height)
        fx, fy, cx, cy, *distortion = self.lens
        cx, cy, zoom = cx - (self.width - side) // 2, cy - (self.height - side) // 2, size / side
        lens = (fx * zoom, fy * zoom, cx * zoom, cy * zoom, *distortion)
        return replace(self, lens=lens, width=size, height=size)

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


# ---- scenes -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class View:
    """One photograph: its camera, its pixels uint8 [H,W,3], or [H,W,4] with straight alpha, and its name."""
    camera: Camera
    pixels: torch.Tensor
    name: str


@dataclass(frozen=True)
class Scene:
    """Posed photographs.

    Attributes:
        path: the file that the scene was read from.
        train, test: lists of View; the test views are never fitted.
        centre, half: the box of interest is the cube centre [3] +- half, in the units of the file.
        bounded: nothing lies outside of the box (pictures with alpha); else what does is contracted.
        background: [3] in [0,1], behind pictures with alpha.
        fingerprint: sha256 of cameras and pictures.
    """
    path: Path
    train: list
    test: list
    centre: torch.Tensor
    half: float
    bounded: bool
    background: torch.Tensor
    fingerprint: str

    def __deepcopy__(self, memo):
        return self  # it never changes, and an edit copies its NeRF


def load_scene(path, downscale=1, background=(1.0, 1.0, 1.0)):
    """Read a nerfstudio or instant-ngp transforms.json, or Blender's transforms_{train,val,test}.json.

    Args:
        path: the directory, or the .json file in it.
        downscale: pictures are reduced by this factor.
        background: the colour behind pictures with alpha.
    Returns:
        A Scene. Frames whose picture is missing are left out with a warning. Test views are Blender's test
        split (its val split where there is none), of a capture every 8th frame.
    Raises:
        SceneError: nothing there, corrupt JSON, no frames, a pose that is no pose, an unreadable picture, or
            pictures of different sizes.
    """
    path = Path(path)
    if not (math.isfinite(downscale) and downscale >= 1):
        raise SceneError(f"{path}: downscale must be at least 1, got {downscale}")
    if path.is_dir():
        names = [n for n in ("transforms.json", "transforms_train.json") if (path / n).is_file()]
        if not names:
            raise SceneError(f"{path}: no transforms.json or transforms_train.json in it")
        path = path / names[0]
    elif not path.is_file():
        raise SceneError(f"{path}: no such scene")
    file = _read_json(path)
    train = _read_views(path, file, downscale)
    held_out = [path.with_name(f"transforms_{split}.json") for split in ("test", "val")]
    held_out = [p for p in held_out if p.is_file()] if path.name == "transforms_train.json" else []
    if held_out:
        test = _read_views(held_out[0], _read_json(held_out[0]), downscale)
    else:
        test = train[::8] if len(train) > 2 else []
        train = [v for i, v in enumerate(train) if i % 8] if test else train
    bounded = all(v.pixels.shape[-1] == 4 for v in train)
    background = torch.tensor(background, dtype=torch.float32)
    if not bounded:  # with any picture without alpha, the others go onto the background
        def flatten(view):
            pixels = over(view.pixels.permute(2, 0, 1).float() / 255, background)
            return replace(view, pixels=(pixels * 255).round().byte().permute(1, 2, 0).contiguous())
        train, test = [[flatten(v) for v in views] for views in (train, test)]
    centre, half = _bounds(train, bounded, file, path)
    digest = hashlib.sha256(json.dumps([centre.tolist(), half, background.tolist()]).encode())
    for view in train:
        digest.update(np.asarray([*view.camera.pose.flatten().tolist(), *view.camera.lens]).tobytes())
        digest.update(view.pixels.numpy().tobytes())
    return Scene(path, train, test, centre, half, bounded, background, digest.hexdigest())


def _read_json(path):
    try:
        file = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise SceneError(f"{path}: no readable JSON: {str(e).splitlines()[0]}") from e
    if not isinstance(file, dict) or not isinstance(file.get("frames"), list) or not file["frames"]:
        raise SceneError(f"{path}: no frames in it")
    return file


def _read_views(path, file, downscale):
    """The frames of one file as a list of View, in the file's order."""
    views, missing, size = [], [], None
    for i, frame in enumerate(file["frames"]):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise SceneError(f"{path}: frame {i} has no file_path")
        picture = path.parent / frame["file_path"]
        if not picture.is_file() and not picture.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            picture = picture.with_name(picture.name + ".png")  # Blender's paths have no extension
        if not picture.is_file():
            missing.append(picture)
            continue
        pose = _pose(path, i, frame)
        try:
            image = Image.open(picture)
            own = image.size
            pixels = _pixels(image, downscale)
        except (OSError, ValueError, Image.DecompressionBombError) as e:
            raise SceneError(f"{picture}: no readable picture: {str(e).splitlines()[0]}") from e
        size = size or own
        if own != size and not ("w" in frame and "h" in frame):
            raise SceneError(f"{picture}: {own[0]} x {own[1]} pixels, those before it have "
                             f"{size[0]} x {size[1]}")
        lens = _lens(path, i, file | frame, own, pixels.shape)
        views.append(View(Camera(pose, lens, pixels.shape[1], pixels.shape[0]), pixels, frame["file_path"]))
    if not views:
        raise SceneError(f"{path}: none of its {len(missing)} pictures is there, e.g. {missing[0]}")
    if missing:
        warnings.warn(f"{path}: {len(missing)} of {len(file['frames'])} pictures are missing, "
                      f"e.g. {missing[0]}", stacklevel=3)
    return views


def _pixels(image, downscale):
    """PIL picture -> uint8 [H,W,3], or [H,W,4] where it has an alpha channel."""
    alpha = "A" in image.getbands() or "transparency" in image.info
    image = image.convert("RGBA" if alpha else "RGB")
    if downscale != 1:
        size = [max(1, round(side / downscale)) for side in image.size]
        # averaged premultiplied, or the colour under transparent pixels would bleed into the edges
        image = image.convert("RGBa" if alpha else "RGB").resize(size, Image.BOX).convert(image.mode)
    return torch.from_numpy(np.array(image))


def _pose(path, i, frame):
    try:
        pose = torch.tensor(frame.get("transform_matrix"), dtype=torch.float64)
        assert pose.shape in ((3, 4), (4, 4))
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise SceneError(f"{path}: frame {i} has no 4 x 4 transform_matrix") from e
    if not torch.isfinite(pose).all() or pose[:3, :3].det().abs() < 1e-6:
        raise SceneError(f"{path}: the transform_matrix of frame {i} is "
                         f"{'singular' if torch.isfinite(pose).all() else 'not finite'}")
    return pose[:3].float()


def _lens(path, i, keys, own, shape):
    """Camera.lens for pixels of `shape` [H,W,...]; `own` is the (width, height) of the picture's file."""
    model = keys.get("camera_model", "OPENCV")
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        raise SceneError(f"{path}: camera model {model} is not supported, undistort the pictures first")
    try:
        get = {k: float(v) for k, v in keys.items() if k in LENS_KEYS and v is not None}
    except (TypeError, ValueError) as e:
        raise SceneError(f"{path}: frame {i} has an intrinsic that is no number") from e
    w, h = get.get("w", own[0]), get.get("h", own[1])
    if not min(w, h) > 0 or abs(w / h * own[1] / own[0] - 1) > 0.02:
        raise SceneError(f"{path}: frame {i} is {own[0]} x {own[1]} pixels, the file says {w:g} x {h:g}")

    def focal(axis, side):  # a fov in degrees wins over pixels, pixels over an angle in radians
        if f"{axis}_fov" in get:
            return side / 2 / math.tan(math.radians(get[f"{axis}_fov"]) / 2)
        if f"fl_{axis}" in get:
            return get[f"fl_{axis}"]
        if f"camera_angle_{axis}" in get:
            return side / 2 / math.tan(get[f"camera_angle_{axis}"] / 2)
    try:
        fx = focal("x", w)
        fx = fx or focal("y", h)
        fy = focal("y", h) or fx
    except ZeroDivisionError:
        fx = None
    if not fx:
        raise SceneError(f"{path}: frame {i} has no focal length (x_fov, fl_x or camera_angle_x)")
    zx, zy = shape[1] / w, shape[0] / h  # the pictures may have been reduced since the file was written
    lens = (fx * zx, fy * zy, get.get("cx", w / 2) * zx, get.get("cy", h / 2) * zy,
            *(get.get(k, 0.0) for k in ("k1", "k2", "k3", "k4", "p1", "p2")))
    if not all(map(math.isfinite, lens)) or min(lens[:2]) <= 0:
        raise SceneError(f"{path}: frame {i} has a focal length or another intrinsic that is not finite "
                         "and positive")
    return lens


LENS_KEYS = ("w", "h", "x_fov", "y_fov", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy",
             "k1", "k2", "k3", "k4", "p1", "p2")
NGP_UNIT = 0.33  # instant-ngp's unit cube holds 1 / 0.33 of the file's units, centred


def _bounds(views, bounded, file, path):
    """The box of interest: its centre [3] and half side.

    The centre is the point nearest to all optical axes. Objects: the box is what the cameras can see around
    it. Captures: it reaches to the median camera, but no further than instant-ngp's aabb_scale.
    """
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
        half = distance.median().item()
        try:
            limit = float(file.get("aabb_scale") or math.inf) / 2 / NGP_UNIT
        except (TypeError, ValueError) as e:
            raise SceneError(f"{path}: aabb_scale is no number") from e
        half = min(half, limit if limit > 0 else math.inf)
    return centre.float(), max(half, 1e-3)


def over(pixels, behind):
    """Pixels [3,...] or [4,...] with straight alpha -> [3,...] in front of `behind` [3] or [3,...]."""
    if len(pixels) == 3:
        return pixels
    behind = behind.reshape(3, *behind.shape[1:], *[1] * (pixels.ndim - behind.ndim))
    return torch.lerp(behind.expand_as(pixels[:3]), pixels[:3], pixels[3:])


# ---- hash grid ----------------------------------------------------------------------------------------

class HashGrid(torch.nn.Module):
    """Trilinear features at several resolutions from one flat table (Mueller et al., eq. 1 to 4).

    A level with fewer corners than `size` has an entry for each, a finer one shares `size` entries by a hash.
    Level-major: what belongs to one level and one corner lies together, N contiguous, so each step is one
    long vector operation. The two features of an entry are one complex number: one gather, one scatter.
    """
    # Entry = x + P1 y + P2 z mod size. Instant NGP joins the three by XOR; with a sum the eight corners
    # differ by eight constants, neighbours in x share a cache line, and dense levels are the same formula
    # with other strides.
    STRIDES = (1, -1640531535, 805459861)

    def __init__(self, levels, size, coarsest, finest):
        """levels, entries a level (a power of two), cells a side of the coarsest and of the finest level."""
        super().__init__()
        if size & (size - 1) or levels < 1 or coarsest < 1:
            raise ValueError(f"the table size must be a power of two, got {size}")
        growth = (finest / coarsest) ** (1 / max(levels - 1, 1))
        self.cells = [round(coarsest * growth ** level) for level in range(levels)]
        self.size, self.dense = size, [(n + 1) ** 3 <= size for n in self.cells]
        start = np.cumsum([0] + [(n + 1) ** 3 if dense else size for n, dense in zip(self.cells, self.dense)])
        self.start = start.tolist()
        self.table = torch.nn.Parameter(torch.empty(self.start[-1], 2).uniform_(-1e-4, 1e-4))
        strides = [(1, n + 1, (n + 1) ** 2) if d else self.STRIDES for n, d in zip(self.cells, self.dense)]
        strides = torch.tensor(strides, dtype=torch.int32)  # [L,3]
        corner = torch.tensor([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)], dtype=torch.int32)
        offsets = (strides[:, None] * corner).sum(-1, dtype=torch.int32)  # [L,8], x changes first
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.learning = levels  # of the levels, coarse to fine, that get a gradient

    def corners(self, x, level):
        """Entries int32 [8,N] of the corners around x [3,N] in [0,1], weights [3,2N] of the upper ones.

        A weight stands twice, once for each feature, to multiply the complex entries as plain pairs.
        """
        x = x * self.cells[level]
        low = x.int().clamp_(max=self.cells[level] - 1)  # [3,N]
        weight = (x - low)[:, :, None].expand(-1, -1, 2).reshape(3, -1)
        low = low * self.strides[level, :, None]
        entry = (low[0] + low[1] + low[2]) + self.offsets[level, :, None]
        return entry if self.dense[level] else entry.bitwise_and_(self.size - 1), weight

    def forward(self, x, known=None):
        """Features [2L,N] at x [3,N] in [0,1]: the L first features, then the L second ones.

        Differentiable in the table, not in x. With `known`, features from an earlier call for the same x,
        nothing is gathered again.
        """
        return _Interpolate.apply(self.table, x, self, known)


class _Interpolate(torch.autograd.Function):
    """Gather and trilinear interpolation; the backward is one scatter a level.

    Autograd's own would keep eight products a level and scatter through a dense [N,8,2] gradient.
    """

    @staticmethod
    def forward(ctx, table, x, grid, known):
        ctx.grid, ctx.shape = grid, table.shape
        ctx.save_for_backward(x)
        if known is not None:
            return known.clone()
        entries = torch.view_as_complex(table)
        out = table.new_empty(2, len(grid.cells), x.shape[1])
        for level in range(len(grid.cells)):
            entry, weight = grid.corners(x, level)
            v = entries[grid.start[level]:grid.start[level + 1]].index_select(0, entry.view(-1))
            v = torch.view_as_real(v).view(8, -1)  # [8,2N]
            for axis in (2, 1, 0):
                v = torch.lerp(v[:len(v) // 2], v[len(v) // 2:], weight[axis])
            out[:, level] = v.view(-1, 2).T
        return out.view(2 * len(grid.cells), x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (x,), grid = ctx.saved_tensors, ctx.grid
        grad = grad.reshape(2, len(grid.cells), -1)
        out = grad.new_zeros(ctx.shape)
        entries = torch.view_as_complex(out)
        v = grad.new_empty(8, 2 * x.shape[1])
        for level in range(grid.learning):
            entry, weight = grid.corners(x, level)  # cheaper again than kept
            v[0].view(-1, 2).copy_(grad[:, level].T)
            for axis in range(3):  # each axis splits what there is into an upper and a lower share
                n = 1 << axis
                torch.mul(v[:n], weight[axis], out=v[n:2 * n])
                v[:n] -= v[n:2 * n]
            entries[grid.start[level]:grid.start[level + 1]].index_add_(
                0, entry.view(-1), torch.view_as_complex(v.view(-1, 2)))
        return out, None, None, None


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


# ---- the field and its rendering ----------------------------------------------------------------------

LEAK = 0.05  # of the ReLUs: at rates that suit the table, a layer of 32 plain ones can die as a whole


class NeRF(torch.nn.Module):
    """Density and colour at every point of a scene, and how to draw, fit and edit them.

    x [3,N] -> hash grid -> MLP -> sigma and 15 features -> with the direction -> MLP -> rgb.

    Attributes:
        occupancy: [G^3] float, running maximum of sigma in each cell of a coarse grid.
        occupied: [G^3] bool, the cells in which samples are taken.
        seen: [G^3] bool, the cells in sight of a training view; in the others nothing is ever sampled.
        bounds: [2,3], the box around the occupied cells.
    """

    def __init__(self, scene, levels=8, table=2 ** 15, width=32):
        """scene: a Scene, which is kept; levels and table: of the hash grid; width: of the MLPs."""
        super().__init__()
        self.scene, self.config = scene, dict(levels=levels, table=table, width=width)
        cameras = [v.camera for v in scene.train]
        focal = torch.tensor([c.lens[0] for c in cameras])
        distance = (torch.stack([c.pose[:, 3] for c in cameras]) - scene.centre).norm(dim=1) / scene.half
        pixel = (distance / focal).median().item()  # side of a pixel at the centre of the box
        # Samples about as dense as the pixels: evenly in an object's box, else growing with the distance.
        self.step = min(max(1.5 * pixel, 1 / 512), 1 / 32)
        self.growth = min(max(1.5 / focal.median().item(), 1 / 256), 1 / 32)
        self.distance = distance.median().item()  # of the cameras, in half sides of the box
        self.near, self.far = 0.1 * self.distance, 30 * self.distance
        self.extent = 1.0 if scene.bounded else 2.0  # the grids span [-extent, extent]^3
        self.grid = HashGrid(levels, table, 16, min(max(4 / pixel, 64), 2048))
        self.cells = 64 if levels <= 8 else 128

        def weights(rows, columns):
            return torch.nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) * 1.7 / columns ** 0.5)
        self.sigma_in, self.sigma_out = weights(width, 2 * levels), weights(16, width)
        self.rgb_in, self.rgb_mid, self.rgb_out = weights(width, 32), weights(width, width), weights(3, width)
        if not scene.bounded:
            self.sky_in, self.sky_out = weights(width, 16), weights(3, width)
        seen, hull = visual_hull(scene.train, scene.centre, scene.half, self.extent, self.cells)
        self.register_buffer("centre", scene.centre.clone())
        self.register_buffer("background", scene.background.clone())
        self.register_buffer("occupancy", torch.zeros(self.cells ** 3))
        self.register_buffer("seen", seen)
        self.register_buffer("occupied", hull)
        self.register_buffer("bounds", self._bounds())
        self.register_buffer("edits", torch.zeros((), dtype=torch.int64))  # calls of project_

    @property
    def chunk(self):
        """Rays that are rendered at a time, which bounds the memory of a picture of any size."""
        return 2048 if self.centre.device.type == "cpu" else 2 ** 15

    # ---- the field

    def density(self, features):
        """Features [2L,N] -> sigma [N] per half side of the box, and all outputs [16,N] for the colour."""
        out = self.sigma_out @ leaky_relu(self.sigma_in @ features, LEAK)
        return out[0].clamp(max=11).exp(), out  # clamped before the exp; exp(11) is opaque in any step

    def colour(self, out, sh):
        """The density's outputs [16,N] and the harmonics [16,N] of the directions -> rgb [3,N]."""
        hidden = leaky_relu(self.rgb_in @ torch.cat((out, sh)), LEAK)
        return torch.sigmoid(self.rgb_out @ leaky_relu(self.rgb_mid @ hidden, LEAK))

    def behind(self, rays_d):
        """rgb [3,R] behind all samples: the background, or in a capture a colour for each direction."""
        if self.scene.bounded:
            return self.background[:, None]
        return torch.sigmoid(self.sky_out @ leaky_relu(self.sky_in @ spherical_harmonics(rays_d), LEAK))

    # ---- volume rendering

    def march(self, rays_o, rays_d, jitter):
        """Samples in occupied cells, packed ray after ray: x [3,N] in [0,1], t [N], dt [N], ray [N].

        rays_o [3,R] in units of the box, rays_d [3,R] of length 1; jitter [R,1] or [1,1] in [0,1) shifts a
        ray's samples by that share of a step. No samples at all is a valid answer.
        """
        if self.scene.bounded:
            d = torch.where(rays_d.abs() < 1e-9, torch.full_like(rays_d, 1e-9), rays_d)
            enter, leave = ((bound[:, None] - rays_o) / d for bound in self.bounds)
            near = torch.minimum(enter, leave).amax(0).clamp_min(0)
            far = torch.maximum(enter, leave).amin(0)
            steps = math.ceil((far - near).amax().clamp_min(0).item() / self.step)
            t = near[:, None] + (torch.arange(steps, device=near.device) + jitter) * self.step  # [R,K]
            x = torch.addcmul(rays_o[:, :, None], rays_d[:, :, None], t)  # [3,R,K]
        else:
            steps = math.ceil(math.log(self.far / self.near) / self.growth)
            t = (torch.arange(steps, device=rays_o.device) + jitter) * self.growth
            t = (self.near * t.exp()).expand(rays_o.shape[1], -1)
            x = contract(torch.addcmul(rays_o[:, :, None], rays_d[:, :, None], t))
        x = (x + self.extent).mul_(0.5 / self.extent)
        cell = (x * self.cells).int().clamp_(0, self.cells - 1)
        cell = cell[0] + self.cells * (cell[1] + self.cells * cell[2])
        alive = self.occupied.index_select(0, cell.view(-1))
        if self.scene.bounded:
            alive &= (t < far[:, None]).view(-1)
        at = alive.nonzero()[:, 0]
        t = t.reshape(-1)[at]
        dt = torch.full_like(t, self.step) if self.scene.bounded else t * self.growth
        return x.reshape(3, -1)[:, at], t, dt, at // max(steps, 1)

    def shade(self, rays_o, rays_d, jitter=0.5, least=1e-3):
        """Volume rendering (NeRF, eq. 3) of rays_o, rays_d [3,R] in the units of the scene.

        First without gradient: samples whose weight is below `least` are dropped. Then the colours, and
        gradients, of the rest only; as sigma = exp(.), the gradient so lost is of the order of that weight.

        Returns:
            rgb [3,R] without what is behind, opacity [R], depth [R] summed with the weights, in units of the
            box, and of the samples kept (weights [N], t [N], ray [N], how many there were in occupied cells).
        """
        count = rays_o.shape[1]
        with torch.no_grad():
            jitter = torch.as_tensor(jitter, device=rays_o.device).expand(count, 1)
            x, t, dt, ray = self.march((rays_o - self.centre[:, None]) / self.scene.half, rays_d, jitter)
            features = self.grid(x)
            weights = volume_weights(self.density(features)[0] * dt, ray, count)
            marched, keep = len(weights), (weights > least).nonzero()[:, 0]
            x, t, dt, ray, features = x[:, keep], t[keep], dt[keep], ray[keep], features[:, keep]
            sh = spherical_harmonics(rays_d).index_select(1, ray)
        if torch.is_grad_enabled():
            features = self.grid(x, features)
        sigma, out = self.density(features)
        weights = volume_weights(sigma * dt, ray, count)
        values = self.colour(out, sh) * weights
        values = torch.cat((values, weights[None], (weights.detach() * t)[None]))  # [5,N]
        index = ray + count * torch.arange(5, device=ray.device)[:, None]
        sums = values.new_zeros(5 * count).index_add(0, index.view(-1), values.reshape(-1)).view(5, count)
        return sums[:3], sums[3], sums[4], (weights, t, ray, marched)

    def camera(self, view=None, size=None):
        """view: a training view's number, a Camera, or None for the one in the middle; size: its square."""
        if view is None:
            position = torch.stack([v.camera.pose[:, 3] for v in self.scene.train])
            view = (position - position.mean(0)).norm(dim=1).argmin().item()
        camera = view if isinstance(view, Camera) else self.scene.train[view].camera
        return camera if size is None else camera.square(size)

    def draw(self, rays_o, rays_d):
        """Rays [3,R] -> rgb [3,R] before the background."""
        rgb, opacity, _, _ = self.shade(rays_o, rays_d)
        return rgb + self.behind(rays_d) * (1 - opacity)

    def render(self, view=None, size=None, generator=None):
        """The picture [1,3,H,W] in [0,1] of a view (see `camera`), differentiable in all parameters.

        With a generator (a CPU's) the pixel centres are shifted by up to half a pixel: over many steps the whole
        surface is seen, not only the points that the centres meet. With gradients and more than 2 `chunk` rays,
        they are deferred: see _Deferred. Memory is then that of one chunk and the picture, whatever its size.
        """
        camera = self.camera(view, size)
        if generator is not None:
            camera = camera.shifted(*(torch.rand(2, generator=generator) - 0.5).tolist())
        rays_o, rays_d = camera.rays(self.centre.device)
        if torch.is_grad_enabled() and rays_o.shape[1] <= 2 * self.chunk:
            rgb = self.draw(rays_o, rays_d)
        else:
            rgb = _Deferred.apply(self, rays_o, rays_d, *self.parameters())
        rgb = rgb + (rgb.clamp(0, 1) - rgb).detach()  # rounding only; the gradient goes through
        return rgb.view(1, 3, camera.height, camera.width)

    @torch.no_grad()
    def depth(self, view=None, size=None):
        """Expected depth [1,1,H,W] along the rays in units of the scene; 0 where nothing opaque is met."""
        camera = self.camera(view, size)
        parts = zip(*(rays.split(self.chunk, 1) for rays in camera.rays(self.centre.device)))
        depth = [torch.where(opacity > 0.5, depth / opacity.clamp_min(0.5), 0)
                 for _, opacity, depth, _ in (self.shade(*rays) for rays in parts)]
        return torch.cat(depth).view(1, 1, camera.height, camera.width) * self.scene.half

    def photograph(self, view, size):
        """The central square of training picture number `view`, on the background: [1,3,size,size]."""
        pixels = self.scene.train[view].pixels.to(self.centre.device)
        pixels = pixels.permute(2, 0, 1).float() / 255  # [C,H,W]
        side = min(pixels.shape[1:])
        top, left = ((n - side) // 2 for n in pixels.shape[1:])
        pixels = pixels[:, top:top + side, left:left + side]
        return interpolate(over(pixels, self.background)[None], size=(size, size), mode="bicubic",
                           antialias=True).clamp(0, 1)

    # ---- the occupancy grid

    @torch.no_grad()
    def update_occupancy(self, generator, share=0.25, decay=0.8, least=1.0, dilate=0):
        """Sample sigma in the occupied cells and in a random share of the others; decide what is occupied.

        Occupied is where the decaying maximum exceeds min(least, its mean), and `dilate` cells around. At
        sigma = 1 a hundredth of the half side of the box is 1 % opaque.
        """
        chosen = torch.rand(len(self.seen), generator=generator, device=self.seen.device) < share
        for cell in ((chosen | self.occupied) & self.seen).nonzero()[:, 0].split(2 ** 16):
            offset = torch.rand(3, len(cell), generator=generator, device=cell.device)
            sigma, _ = self.density(self.grid(cell_points(cell, self.cells, offset)))
            self.occupancy[cell] = torch.maximum(self.occupancy[cell] * decay, sigma)
        on = self.occupancy > min(least, self.occupancy[self.seen].mean().item())
        if dilate:
            cube = on.view(1, 1, self.cells, self.cells, self.cells).float()
            on = max_pool3d(cube, 2 * dilate + 1, 1, dilate).view(-1) > 0
        # new tensors: a picture whose gradient is still to come keeps the occupancy that it was drawn with
        self.occupied = on & self.seen
        self.bounds = self._bounds()

    def _bounds(self):
        """[2,3]: low and high corner of the occupied cells in [-extent, extent]."""
        on = self.occupied.view(self.cells, self.cells, self.cells)
        used = [on.any(b).any(a).nonzero()[:, 0] for a, b in ((0, 1), (0, 2), (1, 2))]  # x, y, z
        ends = [(u[0].item(), u[-1].item() + 1) if len(u) else (0, 0) for u in used]
        return (torch.tensor(ends, device=on.device).T / self.cells * 2 - 1) * self.extent

    # ---- what the edit's loop asks for

    def param_groups(self, rate=1e-2, mlps=1e-3):
        """Table and MLPs for Adam. The table's entries get rare gradients, hence the small eps; the MLPs,
        which every sample shares, a lower rate: an edit of one place must not tint all others."""
        table, *others = self.grid.table, *(p for p in self.parameters() if p is not self.grid.table)
        adam = {"betas": (0.9, 0.99), "eps": 1e-15}
        return [{"name": "table", "params": [table], "lr": rate} | adam,
                {"name": "mlps", "params": others, "lr": mlps} | adam]

    def learn_from(self, size):
        """From now on, pictures of size x size pixels are all that is learnt from: the grid's levels finer than their
        pixels keep what they have, as such pictures say nothing about them. At least one level goes on."""
        pixels = 2 * self.camera(None, size).lens[0] / self.distance  # across the box
        self.grid.learning = max(1, sum(cells <= pixels for cells in self.grid.cells))

    def sample_view(self, generator=None):
        """The number of a training view, drawn on the CPU."""
        return int(torch.randint(len(self.scene.train), (), generator=generator))

    def project_(self):
        """After a step of an edit: every 16th call, the first included, brings the occupancy up to date.

        It is dilated by a cell, so what the edit adds to a surface is sampled and can grow, a cell each time.
        """
        if self.edits % 16 == 0:
            generator = torch.Generator(self.centre.device).manual_seed(int(self.edits))
            self.update_occupancy(generator, dilate=1)
        self.edits += 1

    def dataset(self, size):
        """The training cameras' central squares with what they see now, as Pixels: to be replaced one by one."""
        cameras = [self.camera(i, size) for i in range(len(self.scene.train))]
        with torch.no_grad():
            pictures = [(self.render(c)[0].permute(1, 2, 0) * 255).round().byte().cpu() for c in cameras]
        return Pixels([View(c, p, str(i)) for i, (c, p) in enumerate(zip(cameras, pictures))], self.centre.device)

    def data_loss(self, dataset, generator=None):
        """One step of going on to fit a `dataset`: a scalar. The generator is a CPU's, as in sample_view."""
        seed = int(torch.randint(2 ** 31, (), generator=generator))
        rays = 1024 if self.centre.device.type == "cpu" else 4096
        return self.fit_loss(dataset, rays, torch.Generator(self.centre.device).manual_seed(seed))[0]

    # ---- files

    def save(self, path):
        """Write everything as safetensors; never half a file."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        part = Path(path).with_name(f".{Path(path).name}.part")
        meta = {"config": self.config, "fingerprint": self.scene.fingerprint}
        save_file(state, part, {"nerf": json.dumps(meta)})  # one entry: their order in the file is not fixed
        part.replace(path)

    @classmethod
    def load(cls, path, scene, device="cpu"):
        """What `save` wrote; raises SceneError for another scene's or a damaged file."""
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["nerf"])
                state = {k: file.get_tensor(k) for k in file.keys()}
            config = meta["config"]
        except (OSError, KeyError, ValueError, SafetensorError) as e:
            raise SceneError(f"{path}: no readable NeRF: {str(e).splitlines()[0]}") from e
        if meta.get("fingerprint") != scene.fingerprint:
            raise SceneError(f"{path}: was fitted to another scene than {scene.path}")
        nerf = cls(scene, **config)
        nerf.load_state_dict(state)
        return nerf.to(device)

    # ---- the fit

    @classmethod
    def fit(cls, scene, seconds=None, steps=None, seed=0, checkpoint=None, device="cpu", progress=True,
            **sizes):
        """Fit a new NeRF to the training views of a scene.

        Batches of random pixels, Huber and distortion loss, Adam with a rate that decays tenfold. Objects are
        fitted on random backgrounds: only true opacity explains all of them, and nothing
        white hides before white.

        Args:
            seconds: process CPU time on a CPU, wall time elsewhere; 60 if neither it nor steps is given.
            steps: or optimiser steps. With both, what comes first.
            seed: of weights and batches. Fits of equal steps on one machine are bit-identical.
            checkpoint: a path. Its fit is resumed if it exists (one that had its time is returned at once),
                and it is written every 15 seconds and at the end. It then takes the steps of an unbroken one.
            sizes: levels, table, width, if not the device's default.
        Returns:
            The NeRF; its attribute `fitted` holds steps, seconds and rays of the fit.
        Raises:
            SceneError: the checkpoint is damaged, of another scene or of other sizes.
            FloatingPointError: the loss is no longer finite.
        """
        device = torch.device(device)
        cpu = device.type == "cpu"
        clock = time.process_time if cpu else time.perf_counter
        started = clock()
        seconds = 60 if seconds is None and steps is None else seconds
        default = dict(levels=8, table=2 ** 15, width=32) if cpu else dict(levels=16, table=2 ** 19, width=64)
        sizes = default | sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nerf = cls(scene, **sizes).to(device)
        optimiser = torch.optim.Adam(nerf.param_groups(2e-2, 7e-3), fused=True)
        generator = torch.Generator(device).manual_seed(seed)
        rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
        pixels = Pixels(scene.train, device)
        # A batch holds as many rays as make these numbers of samples, in occupied cells and kept.
        marched, kept, rays = (2 ** 16, 2 ** 13, 512) if cpu else (2 ** 20, 2 ** 18, 4096)
        state = dict(step=0, spent=0.0, rays=rays, drawn=0)
        checkpoint = Path(checkpoint) if checkpoint else None
        if checkpoint and checkpoint.exists():
            state = _resume(checkpoint, scene, sizes, nerf, optimiser, generator)
            started -= state["spent"]

        def keep():
            part = checkpoint.with_name(f".{checkpoint.name}.part")
            torch.save(state | dict(nerf=nerf.state_dict(), optimiser=optimiser.state_dict(), sizes=sizes,
                                    generator=generator.get_state(), fingerprint=scene.fingerprint), part)
            part.replace(checkpoint)

        def share():  # of the fit that is done
            return max(state["step"] / steps if steps else 0.0, state["spent"] / seconds if seconds else 0.0)

        written, first = time.monotonic(), state["step"]
        with tqdm(total=steps, initial=first, desc="fit", unit="step", disable=not progress) as bar:
            while share() < 1:
                step = state["step"]
                for group in optimiser.param_groups:
                    group["lr"] = rates[group["name"]] * 0.1 ** share() * min(1, (step + 1) / 20)
                loss, colour, samples = nerf.fit_loss(pixels, state["rays"], generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if step >= 96 and step % 16 == 0:  # before, sigma says little about what is empty
                    nerf.update_occupancy(generator, share=1 if step == 96 else 0.25)
                fit = min(marched / max(samples[0], 1), kept / max(samples[1], 1), 2)
                state["drawn"] += state["rays"]
                state["rays"] = min(max(int(state["rays"] * fit), 64), 8192 if cpu else 2 ** 17)
                state["step"] += 1
                if step % 20 == 0:
                    if not torch.isfinite(loss):
                        raise FloatingPointError(f"{scene.path}: the loss is {loss.item()} at step {step}")
                    psnr = -10 * math.log10(2 * colour.item() + 1e-12)  # Huber is half the square near 0
                    bar.set_postfix(psnr=f"{psnr:.1f} dB", refresh=False)
                bar.update()
                state["spent"] = clock() - started
                if checkpoint and time.monotonic() - written > 15:
                    keep()
                    written = time.monotonic()
        if checkpoint and (state["step"] > first or not checkpoint.exists()):
            keep()
        nerf.fitted = {"steps": state["step"], "seconds": state["spent"], "rays": state["drawn"]}
        return nerf

    def fit_loss(self, pixels, rays, generator):
        """Loss of one batch of random pixels, its colour part, and its numbers of samples (marched, kept)."""
        rays_o, rays_d, wanted = pixels(rays, generator)
        random = torch.rand(4, rays, generator=generator, device=rays_o.device)
        rgb, opacity, _, (weights, t, ray, marched) = self.shade(rays_o, rays_d, random[:1].T)
        behind = random[1:] if len(wanted) == 4 else self.behind(rays_d)
        colour = huber_loss(rgb + behind * (1 - opacity), over(wanted, behind), delta=0.1)
        s, ds = t, self.step
        if not self.scene.bounded:  # the steps of a capture are even in log t
            whole = math.log(self.far / self.near)
            s, ds = torch.log(t / self.near) / whole, self.growth / whole
        return colour + 3e-3 * distortion(weights, s, ds, ray, rays), colour.detach(), (marched, len(t))


class Pixels:
    """All pixels of some views, to draw rays from. Rays are made when drawn: memory is the 8-bit pictures'.

    Attributes:
        cameras: of the views, a list.
        pixels: [M,C] uint8, view after view, row after row.
    """

    def __init__(self, views, device):
        self.cameras, channels = [v.camera for v in views], views[0].pixels.shape[-1]
        self.pixels = torch.cat([v.pixels.reshape(-1, channels) for v in views]).to(device)
        counts = torch.tensor([0] + [c.width * c.height for c in self.cameras])
        self.start = counts.cumsum(0).to(device)  # [V+1], the first pixel of each view
        self.width = torch.tensor([c.width for c in self.cameras], device=device)
        self.lens = torch.tensor([c.lens for c in self.cameras], device=device).T.contiguous()  # [10,V]
        self.pose = torch.stack([c.pose for c in self.cameras], 2).to(device)  # [3,4,V]

    def replace(self, view, picture):
        """Put another picture [1,3,H,W] in [0,1] in the place of a view's."""
        rows = (picture[0].permute(1, 2, 0) * 255).round().byte()
        self.pixels[self.start[view]:self.start[view + 1]] = rows.reshape(-1, 3).to(self.pixels)

    def picture(self, view):
        """What stands in a view's place, [1,3,H,W] in [0,1]; RGB only."""
        rows = self.pixels[self.start[view]:self.start[view + 1]]
        return rows.T.float().view(1, 3, self.cameras[view].height, -1) / 255

    def __call__(self, count, generator):
        """rays_o, rays_d [3,count], pixels [C,count] in [0,1], drawn at random."""
        at = torch.randint(len(self.pixels), (count,), generator=generator, device=self.pixels.device)
        view = torch.searchsorted(self.start, at, right=True) - 1
        at_view, width = at - self.start[view], self.width[view]
        d = directions(self.lens[:, view], at_view % width + 0.5, at_view // width + 0.5)
        pose = self.pose[:, :, view]
        return pose[:, 3], (pose[:, :3] * d).sum(1), self.pixels[at].T.float() / 255


class _Deferred(torch.autograd.Function):
    """Render in chunks without gradient; in the backward draw each again and push its gradient through.

    The same samples both times: the jitter is fixed, and the occupancy is kept as it was. A step thus costs a
    second forward pass, and its memory does not grow with the picture (ARF, Zhang et al., arXiv 2206.06360).
    Each of n chunks takes every n-th ray: all have their share of the object, and none needs more than another.
    """

    @staticmethod
    def forward(ctx, nerf, rays_o, rays_d, *parameters):
        ctx.nerf, ctx.rays, ctx.grids = nerf, (rays_o, rays_d), (nerf.occupied, nerf.bounds)
        ctx.save_for_backward(*parameters)  # raises in the backward if a step has changed them in between
        ctx.chunks = math.ceil(rays_o.shape[1] / nerf.chunk)
        rgb = torch.empty_like(rays_d)
        for i in range(ctx.chunks):
            rgb[:, i::ctx.chunks] = nerf.draw(*(rays[:, i::ctx.chunks] for rays in ctx.rays))
        return rgb

    @staticmethod
    def backward(ctx, grad):
        nerf, now = ctx.nerf, (ctx.nerf.occupied, ctx.nerf.bounds)
        wanted = [p for p in ctx.saved_tensors if p.requires_grad]
        totals = [torch.zeros_like(p) for p in wanted]
        nerf.occupied, nerf.bounds = ctx.grids
        try:
            for i in range(ctx.chunks):
                rays_o, rays_d, part = (x[:, i::ctx.chunks] for x in (*ctx.rays, grad))
                with torch.enable_grad():
                    rgb = nerf.draw(rays_o, rays_d)
                for total, g in zip(totals, torch.autograd.grad(rgb, wanted, part, allow_unused=True)):
                    if g is not None:
                        total += g
        finally:
            nerf.occupied, nerf.bounds = now
        totals = iter(totals)
        return None, None, None, *(next(totals) if p.requires_grad else None for p in ctx.saved_tensors)


def _resume(path, scene, sizes, nerf, optimiser, generator):
    """Load a checkpoint of NeRF.fit into its parts; returns step, spent, rays, drawn."""
    try:
        state = torch.load(path, map_location=nerf.centre.device)
        fingerprint, made = state.pop("fingerprint"), state.pop("sizes")
    except Exception as e:  # torch.load raises a dozen kinds for a damaged file
        reason = (str(e) or repr(e)).splitlines()[0][:200]
        raise SceneError(f"{path}: no readable checkpoint of a fit: {reason}") from e
    if fingerprint != scene.fingerprint:
        raise SceneError(f"{path}: is the fit of another scene than {scene.path}")
    if made != sizes:
        raise SceneError(f"{path}: has other sizes, {made}, than {sizes}")
    nerf.load_state_dict(state.pop("nerf"))
    optimiser.load_state_dict(state.pop("optimiser"))
    generator.set_state(state.pop("generator").cpu())
    return state


def cell_points(cell, cells, offset=0.5):
    """Numbers [N] of the cells of a cubic grid -> points [3,N] in [0,1]; offset in the cell, 0.5 or [3,N]."""
    return (torch.stack((cell % cells, cell // cells % cells, cell // cells ** 2)) + offset) / cells


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
        fx, fy, cx, cy, *distortion = camera.lens
        x = uncontract(cell_points(alive, cells) * (2 * extent) - extent) * half + centre[:, None]
        p = torch.linalg.inv(camera.pose[:, :3]) @ (x - camera.pose[:, 3:])
        depth = (-p[2]).clamp_min(1e-6)
        u, v = cx + fx * p[0] / depth, cy - fy * p[1] / depth
        inside = (p[2] < 0) & (u > 0) & (u < camera.width) & (v > 0) & (v < camera.height)
        seen[alive[inside]] = True
        if view.pixels.shape[-1] == 4 and inside.any() and not any(distortion):
            # any pixel that the cell may touch speaks for it
            radius = math.ceil(fx * half * extent / cells * 3 ** 0.5 / depth[inside].min().item())
            shown = (view.pixels[None, None, ..., 3] > 0).float()
            shown = max_pool2d(shown, 2 * radius + 1, 1, radius)[0, 0] > 0
            keep = ~inside
            keep[inside] = shown[v[inside].long(), u[inside].long()]
            alive = alive[keep]
    hull = torch.zeros_like(seen)
    hull[alive] = True
    return seen, hull & seen


def volume_weights(tau, ray, count):
    """weights [N] = T (1 - exp(-tau)) with the transmittance T = exp(-sum of tau before it on its ray).

    tau [N] = sigma dt; ray [N] ascending numbers below `count`. The sum runs in float64 over all rays at
    once; in float32 the differences of the long sum would be wrong in the second digit.
    """
    return torch.exp(-_sum_before(tau, ray, count)).to(tau.dtype) * -torch.expm1(-tau)


def distortion(weights, s, ds, ray, count):
    """Mean over rays of sum_ij w_i w_j |s_i - s_j| + sum_i w_i^2 ds / 3 (mip-NeRF 360, eq. 15), packed.

    It draws the weights of a ray together: fewer floaters, and fewer samples to evaluate. s [N] ascends along
    a ray, so that the double sum is one of differences to what came before.
    """
    before, before_s = _sum_before(weights, ray, count), _sum_before(weights * s, ray, count)
    pairs, own = 2 * (weights * (s * before - before_s)).sum(), (weights * weights).sum() * ds / 3
    return (pairs + own).to(s.dtype) / count


def _sum_before(values, ray, count):
    """[N] -> [N] float64: the sum of the values that come earlier on the same ray."""
    length = torch.bincount(ray, minlength=count)
    first = (length.cumsum(0) - length).index_select(0, ray)
    values = values.double()
    before = values.cumsum(0) - values
    return before - before.index_select(0, first)


def contract(x):
    """[3,...] -> inside the cube [-2,2]^3; the identity in [-1,1]^3 (mip-NeRF 360, eq. 10, with the largest
    coordinate as the norm, so that the image is a cube and fills the grid)."""
    m = x.abs().amax(0).clamp_min(1)
    return x * ((2 - 1 / m) / m)


def uncontract(x):
    """The inverse of contract, [3,...]."""
    m = x.abs().amax(0).clamp(1, 2 - 1e-6)
    return x / (m * (2 - m))


# ---- what comes out of it -----------------------------------------------------------------------------

@torch.no_grad()
def evaluate(nerf, scene):
    """Mean PSNR in dB over the scene's test views, each on the background, and how many there are."""
    psnrs = []
    for view in scene.test:
        photograph = over(view.pixels.to(nerf.centre.device).permute(2, 0, 1).float() / 255, nerf.background)
        error = (nerf.render(view.camera)[0] - photograph).square().mean().item()
        psnrs.append(-10 * math.log10(error + 1e-12))
    return (sum(psnrs) / len(psnrs) if psnrs else math.nan), len(psnrs)


def turntable(nerf, frames, size):
    """`frames` square Cameras around the scene: a full turn where the training cameras surround it, else there
    and back over the arc that they cover."""
    at, full = _orbit(nerf, size)
    turn = [i / frames for i in range(frames)]
    return [at(u if full else 0.5 + 0.5 * math.sin(2 * math.pi * u)) for u in turn]


def sides(nerf, count, size):
    """`count` square Cameras spread over the turn, or over the arc from one end to the other."""
    at, full = _orbit(nerf, size)
    return [at(i / count if full else i / max(count - 1, 1)) for i in range(count)]


def _orbit(nerf, size):
    """(share of the way in 0..1 -> square Camera, whether the way is a full turn).

    The way leads around the scene's centre at the training cameras' median distance and height.
    """
    pose = torch.stack([v.camera.pose for v in nerf.scene.train])  # [V,3,4]
    centre = nerf.scene.centre
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
    lens = nerf.camera(None, size)

    def at(share):
        a = torch.tensor(low + (high - low) * share)
        back = elevation.cos() * (a.cos() * forward + a.sin() * right) + elevation.sin() * up
        return replace(lens, pose=_look(centre + distance.median() * back, back, up))
    return at, full


def input_path(nerf, frames, size):
    """`frames` square Cameras on the way through the training views, in their order."""
    pose = torch.stack([v.camera.pose for v in nerf.scene.train])
    cameras = []
    for at in torch.linspace(0, len(pose) - 1, frames):
        i = min(int(at), len(pose) - 2) if len(pose) > 1 else 0
        middle = torch.lerp(pose[i], pose[min(i + 1, len(pose) - 1)], at - i)
        cameras.append(replace(nerf.camera(i, size), pose=_look(middle[:, 3], middle[:, 2], middle[:, 1])))
    return cameras


def _look(position, back, up):
    """Pose [3,4] at `position` whose z axis is `back`, with y near `up`."""
    back = back / back.norm()
    right = torch.linalg.cross(up, back)
    right = right / right.norm()
    return torch.stack((right, torch.linalg.cross(back, right), back, position), 1)


def depth_picture(depth):
    """[1,1,H,W] from NeRF.depth -> [1,3,H,W] in [0,1]: near is white, far is dark, nothing is black."""
    hit = depth > 0
    if not hit.any():
        return torch.zeros_like(depth).expand(-1, 3, -1, -1)
    low, high = depth[hit].min(), depth[hit].max()
    return torch.where(hit, 1 - 0.8 * (depth - low) / (high - low).clamp_min(1e-6), 0).expand(-1, 3, -1, -1)


def export(nerf, folder, cameras):
    """Write images/*.png, depth/*.png and a transforms.json of rendered views, for nerfstudio and load_scene.

    Depth is 16 bit, z along the optical axis in thousandths of a unit, as nerfstudio wants it.
    """
    folder, frames = Path(folder), []
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for i, camera in enumerate(cameras):
            picture = (nerf.render(camera)[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            Image.fromarray(picture).save(folder / "images" / f"{i:05}.png")
            axis = camera.directions()[2].abs()
            depth = nerf.depth(camera).cpu()[0, 0] * axis.view(camera.height, camera.width)
            Image.fromarray((depth * 1000).round().clamp(0, 65535).numpy().astype(np.uint16)).save(
                folder / "depth" / f"{i:05}.png")
            pose = torch.cat((camera.pose, torch.tensor([[0.0, 0, 0, 1]])))
            names = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2")
            frames.append(dict(file_path=f"images/{i:05}.png", depth_file_path=f"depth/{i:05}.png",
                               transform_matrix=pose.tolist(), w=camera.width, h=camera.height)
                          | dict(zip(names, camera.lens)))
    part = folder / ".transforms.json.part"
    part.write_text(json.dumps({"camera_model": "OPENCV", "frames": frames}, indent=1))
    part.replace(folder / "transforms.json")
