"""Posed photographs and their cameras, and what all representations of a scene have in common.

    scene = load_scene("examples/apple")           # nerfstudio / instant-ngp transforms.json, or Blender's
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
from torch.nn.functional import interpolate

from files import is_number, one_line, read_json, replacing
from pictures import PictureError, picture_size, read_picture


class SceneError(ValueError):
    """A scene or a checkpoint that cannot be used; one line that names the file and the reason."""

    def __init__(self, message):
        super().__init__(one_line(message))


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


# ---- posed photographs --------------------------------------------------------------------------------

@dataclass(frozen=True)
class View:
    """One photograph: its camera, its pixels uint8 [H,W,3], or [H,W,4] with straight alpha, and its name."""
    camera: Camera
    pixels: torch.Tensor
    name: str

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
        return self  # it never changes, and an edit copies its representation


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


# ---- reading scenes -----------------------------------------------------------------------------------

def load_scene(path, downscale=1, background=(1.0, 1.0, 1.0)):
    """Read a nerfstudio or instant-ngp transforms.json, or Blender's transforms_{train,val,test}.json.

    Args:
        path: the directory, or the .json file in it.
        downscale: pictures are reduced by this factor.
        background: the colour behind pictures with alpha.
    Returns:
        A Scene. Frames whose picture is missing are left out with a warning. The test views are Blender's test
        split (its val split where there is none), or every 8th frame of a capture.
    Raises:
        SceneError: nothing there, corrupt JSON, no frames, a pose that is no pose, an unreadable picture, or
            pictures of different sizes.
    """
    if not (math.isfinite(downscale) and downscale >= 1):
        raise SceneError(f"{path}: downscale must be at least 1, got {downscale}")
    path, *held_out = _json_files(path)
    file = _read_json(path)
    train = _read_views(path, file, downscale)
    if held_out:
        test = _read_views(held_out[0], _read_json(held_out[0]), downscale)
    else:
        test = train[::8] if len(train) > 2 else []
        train = [v for i, v in enumerate(train) if i % 8] if test else train
    bounded = all(v.pixels.shape[-1] == 4 for v in train)
    background = torch.tensor(background, dtype=torch.float32)
    if not bounded:  # with any picture without alpha, the others go onto the background
        def flatten(view):
            pixels = over(view.picture(), background)
            return replace(view, pixels=(pixels * 255).round().byte().permute(1, 2, 0).contiguous())
        train, test = [[flatten(v) for v in views] for views in (train, test)]
    centre, half = _bounds(train, bounded, file, path)
    digest = hashlib.sha256(json.dumps([centre.tolist(), half, background.tolist()]).encode())
    for view in train:
        digest.update(np.asarray([*view.camera.pose.flatten().tolist(), *view.camera.lens]).tobytes())
        digest.update(view.pixels.numpy().tobytes())
    return Scene(path, train, test, centre, half, bounded, background, digest.hexdigest())


def scene_files(path):
    """All files that load_scene(path) reads, in its order, each once; raises SceneError."""
    found = []
    for file in _json_files(path):
        found.append(file)
        found += [picture for i, frame in enumerate(_read_json(file)["frames"])
                  if (picture := _picture_path(file, i, frame)).is_file()]
    return list(dict.fromkeys(found))


def _json_files(path):
    """The file with the training views and, where a Blender scene has one, that with the held-out views."""
    path = Path(path)
    try:
        if path.is_dir():
            names = [n for n in ("transforms.json", "transforms_train.json") if (path / n).is_file()]
            if not names:
                raise SceneError(f"{path}: no transforms.json or transforms_train.json in it")
            path = path / names[0]
        elif not path.is_file():
            raise SceneError(f"{path}: no such scene")
    except OSError as e:  # a name that is too long
        raise SceneError(f"{path}: no such scene: {e.strerror}") from e
    held_out = [path.with_name(f"transforms_{split}.json") for split in ("test", "val")]
    held_out = [p for p in held_out if p.is_file()] if path.name == "transforms_train.json" else []
    return [path, *held_out[:1]]


def _read_json(path):
    try:
        file = read_json(path)
    except ValueError as e:
        raise SceneError(e) from e
    if not isinstance(file.get("frames"), list) or not file["frames"]:
        raise SceneError(f"{path}: no frames in it")
    return file


def _picture_path(path, i, frame):
    """Where the picture of frame i of the file `path` lies, whether it is there or not; raises SceneError."""
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
        raise SceneError(f"{path}: frame {i} has no file_path")
    name = frame["file_path"]
    picture = path.parent / name
    try:
        if picture.is_dir() or not picture.name or "\0" in name:
            raise SceneError(f"{path}: the file_path of frame {i}, {one_line(repr(name), 100)}, is no picture")
        if not picture.is_file() and not picture.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            picture = picture.with_name(picture.name + ".png")  # Blender's paths have no extension
            picture.is_file()
    except OSError as e:
        raise SceneError(f"{path}: the file_path of frame {i}, {one_line(repr(name), 100)}: {e.strerror}") from e
    return picture


MOST, MOST_OF_ONE = 2 ** 26, 2 ** 21  # pixels of all pictures of a file, 100 of 800 x 800 or 268 MB; of one, 1920 x 1080


def _read_views(path, file, downscale):
    """The frames of one file as a list of View, in the file's order."""
    there, missing, views, sideways = [], [], [], 0
    for i, frame in enumerate(file["frames"]):
        picture = _picture_path(path, i, frame)
        if picture.is_file():
            there.append((i, frame, picture, _pose(path, i, frame)))
        else:
            missing.append(picture)
    if not there:
        raise SceneError(f"{path}: none of its {len(missing)} pictures is there, e.g. {missing[0]}")
    if missing:
        warnings.warn(one_line(f"{path}: {len(missing)} of {len(file['frames'])} pictures are missing, "
                               f"e.g. {missing[0]}"), stacklevel=3)
    try:
        sizes = [picture_size(picture) for _, _, picture, _ in there]
        counts = [math.prod(own) / downscale ** 2 for own, _ in sizes]
        reduced = math.sqrt(max(1, sum(counts) / MOST, max(counts) / MOST_OF_ONE))
        downscale *= reduced
        for (i, frame, picture, pose), (own, orientation) in zip(there, sizes):
            # As the cameras were found: with the picture as it is stored, unless the file says that it was turned.
            keys = file | frame
            turned = orientation > 4 and own[0] != own[1] and (keys.get("w"), keys.get("h")) == own[::-1]
            own, sideways = own[::-1] if turned else own, sideways + (orientation > 1 and not turned)
            if own != (first := sizes[0][0]) and not ("w" in frame and "h" in frame) and not turned:
                raise SceneError(f"{picture}: {own[0]} x {own[1]} pixels, those before it have {first[0]} x {first[1]}")
            pixels = torch.from_numpy(np.array(read_picture(picture, downscale, upright=turned)))
            lens = _lens(path, i, keys, own, pixels.shape)
            views.append(View(Camera(pose, lens, pixels.shape[1], pixels.shape[0]), pixels, frame["file_path"]))
    except PictureError as e:
        raise SceneError(e) from e
    if sideways:
        warnings.warn(one_line(f"{path}: {sideways} of its pictures say that they are to be turned (EXIF); they are taken as "
                               "they are stored, as no w and h in the file say otherwise"), stacklevel=3)
    if reduced > 1:
        warnings.warn(one_line(f"{path}: its pictures have {sum(counts) / 1e6:.0f} million pixels, the largest one "
                               f"{max(counts) / 1e6:.0f}: reduced by {downscale:.3g}, as by --downscale"), stacklevel=3)
    return views


def _pose(path, i, frame):
    rows = frame.get("transform_matrix")
    if not (isinstance(rows, list) and len(rows) in (3, 4) and all(isinstance(row, list) and len(row) == 4 for row in rows)
            and all(isinstance(x, (int, float)) and not isinstance(x, bool) for row in rows for x in row)):
        raise SceneError(f"{path}: frame {i} has no 4 x 4 transform_matrix")
    wrong = f"{path}: the transform_matrix of frame {i} is"
    if not all(is_number(x, -FARTHEST, FARTHEST) for row in rows for x in row):
        raise SceneError(f"{wrong} not finite, or larger than {FARTHEST:g}")
    pose = torch.tensor(rows, dtype=torch.float64)
    axes = pose[:3, :3]
    if axes.det().abs() < 1e-6:
        raise SceneError(f"{wrong} singular")
    if len(rows) == 4 and (pose[3] - pose.new_tensor([0, 0, 0, 1])).abs().max() > 1e-3:
        raise SceneError(f"{wrong} no pose: its last row must be 0 0 0 1")
    scale = axes.det().abs() ** (1 / 3)
    if axes.det() < 0 or (axes.T @ axes / scale ** 2 - torch.eye(3, dtype=torch.float64)).abs().max() > 0.05:
        raise SceneError(f"{wrong} no rotation: its axes must be at right angles, of one length, and right-handed")
    if abs(scale - 1) > 1e-3:
        pose[:3, :3] = axes / scale  # distances are those of the positions
    return pose[:3].float()


FARTHEST = 1e7  # of any number in a pose: float32 must hold what is in sight of the cameras
LENS_KEYS = ("w", "h", "x_fov", "y_fov", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy",
             "k1", "k2", "k3", "k4", "p1", "p2")


def _lens(path, i, keys, own, shape):
    """Camera.lens for pixels of `shape` [H,W,...]; `own` is the (width, height) of the picture's file."""
    model = keys.get("camera_model", "OPENCV")
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        raise SceneError(f"{path}: camera model {model} is not supported, undistort the pictures first")
    if keys.get("is_fisheye"):
        raise SceneError(f"{path}: a fisheye camera is not supported, undistort the pictures first")
    get = {k: v for k, v in keys.items() if k in LENS_KEYS and v is not None}
    for key, value in get.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SceneError(f"{path}: frame {i} has an intrinsic that is no number, {key}")
        if not is_number(value, -1e6, 1e6):
            raise SceneError(f"{path}: frame {i} has an intrinsic that is not finite and positive, or too large, {key}")
    w, h = get.get("w", own[0]), get.get("h", own[1])
    if not min(w, h) > 0 or abs(w / h * own[1] / own[0] - 1) > 0.02:
        raise SceneError(f"{path}: frame {i} is {own[0]} x {own[1]} pixels, the file says {w:g} x {h:g}")

    def focal(axis, side):  # a fov in degrees wins over pixels, pixels over an angle in radians
        if f"{axis}_fov" in get:
            return from_angle(side, math.radians(get[f"{axis}_fov"]), f"{axis}_fov")
        if f"fl_{axis}" in get:
            return get[f"fl_{axis}"]
        if f"camera_angle_{axis}" in get:
            return from_angle(side, get[f"camera_angle_{axis}"], f"camera_angle_{axis}")

    def from_angle(side, angle, key):
        if not 0 < angle < math.pi:
            raise SceneError(f"{path}: frame {i} has an angle of view of {math.degrees(angle):g} degrees, {key}: not "
                             "finite and positive, or 180 and more")
        return side / 2 / math.tan(angle / 2)
    fx = focal("x", w)
    fx = fx or focal("y", h)
    fy = focal("y", h) or fx
    if not fx:
        raise SceneError(f"{path}: frame {i} has no focal length (x_fov, fl_x or camera_angle_x)")
    zx, zy = shape[1] / w, shape[0] / h  # the pictures may have been reduced since the file was written
    lens = (fx * zx, fy * zy, get.get("cx", w / 2) * zx, get.get("cy", h / 2) * zy,
            *(get.get(k, 0.0) for k in ("k1", "k2", "k3", "k4", "p1", "p2")))
    if not all(map(math.isfinite, lens)) or min(lens[:2]) <= 0:
        raise SceneError(f"{path}: frame {i} has a focal length or another intrinsic that is not finite "
                         "and positive")
    for f, c, side in zip(lens, lens[2:4], (shape[1], shape[0])):
        if not 0.01 < f / side < 1000:
            raise SceneError(f"{path}: frame {i} has a focal length of {f / side:g} times its picture's side")
        if not -1 <= c / side <= 2:
            raise SceneError(f"{path}: frame {i} has its optical axis (cx, cy) far outside of the picture")
    if any(lens[4:]) and not _undistorts(lens, shape):
        raise SceneError(f"{path}: frame {i} has a distortion (k1 to k4, p1, p2) that cannot be undone")
    if i == 0 and "x_fov" in get and "fl_x" in get and not 0.8 < get["fl_x"] / fx < 1.25:
        warnings.warn(f"{path}: x_fov and fl_x contradict each other, {get['x_fov']:g} degrees are taken", stacklevel=4)
    return lens


def _undistorts(lens, shape):
    """Whether `directions` finds the way back through the distortion of a lens, for most of the picture [H,W,...]."""
    fx, fy, cx, cy, k1, k2, k3, k4, p1, p2 = lens
    v, u = torch.meshgrid(*(torch.linspace(0, n, 9, dtype=torch.float64) for n in shape[:2]), indexing="ij")
    d = directions(torch.tensor(lens, dtype=torch.float64)[:, None], u.flatten(), v.flatten())
    x, y = d[0] / -d[2], -d[1] / -d[2]
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    off = torch.stack((fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx - u.flatten(),
                       fy * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + cy - v.flatten()))
    return bool(d.isfinite().all() and (off.abs() < 1).all(0).float().mean() > 0.75)


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
        half, scale = distance.median().item(), file.get("aabb_scale")
        if scale is not None:
            if not is_number(scale, 1e-3, 1e6):
                raise SceneError(f"{path}: aabb_scale is no number between 0.001 and a million")
            half = min(half, scale / 2 / NGP_UNIT)
    half = max(half, 1e-3)
    if not (math.isfinite(half) and centre.isfinite().all()):
        raise SceneError(f"{path}: its cameras look at no common place")
    if position.abs().max() > 1e4 * half:
        raise SceneError(f"{path}: its cameras lie at up to {position.abs().max():g} units, what they look at is {half:.3g} "
                         "large: move the origin of the poses there")
    return centre.float(), half


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
        fx, fy, cx, cy, *distortion = camera.lens
        x = uncontract(cell_points(alive, cells) * (2 * extent) - extent) * half + centre[:, None]
        p = torch.linalg.inv(camera.pose[:, :3]) @ (x - camera.pose[:, 3:])
        depth = (-p[2]).clamp_min(1e-6)
        u, v = cx + fx * p[0] / depth, cy - fy * p[1] / depth
        inside = (p[2] < 0) & (u > 0) & (u < camera.width) & (v > 0) & (v < camera.height)
        seen[alive[inside]] = True
        if view.pixels.shape[-1] == 4 and inside.any() and not any(distortion):
            # any pixel that the cell may touch speaks for it; sums over rectangles cost the same for any radius
            radius = fx * half * extent / cells * 3 ** 0.5 / depth[inside].min().item()
            radius = math.ceil(min(radius, max(camera.width, camera.height)))
            sums = torch.zeros(camera.height + 1, camera.width + 1, dtype=torch.int32)
            sums[1:, 1:] = (view.pixels[..., 3] > 0).int().cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
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

    def render(self, view=None, size=None, generator=None):
        """The picture [1,3,H,W] in [0,1] of a view (see `camera`), differentiable in all parameters.

        With a generator (a CPU's) the pixel centres are shifted by up to half a pixel: over many steps the whole
        surface is seen, not only the points that the centres meet.
        """
        camera = self.camera(view, size)
        if generator is not None:
            camera = camera.shifted(*(torch.rand(2, generator=generator) - 0.5).tolist())
        rgb = self.rgb(camera)
        return (rgb + (rgb.clamp(0, 1) - rgb).detach())[None]  # the gradient goes through the clamp

    def camera(self, view=None, size=None):
        """view: a training view's number, a Camera, or None for the one in the middle; size: its square."""
        if view is None:
            position = torch.stack([v.camera.pose[:, 3] for v in self.scene.train])
            view = (position - position.mean(0)).norm(dim=1).argmin().item()
        camera = view if isinstance(view, Camera) else self.scene.train[view].camera
        return camera if size is None else camera.square(size)

    def photograph(self, view, size):
        """The central square of training picture number `view`, on the background: [1,3,size,size]."""
        pixels = self.scene.train[view].picture(self.centre.device)
        side = min(pixels.shape[1:])
        top, left = ((n - side) // 2 for n in pixels.shape[1:])
        pixels = pixels[:, top:top + side, left:left + side]
        return interpolate(over(pixels, self.background)[None], size=(size, size), mode="bicubic",
                           antialias=True).clamp(0, 1)

    def sample_view(self, generator=None):
        """The number of a training view, drawn on the CPU."""
        return int(torch.randint(len(self.scene.train), (), generator=generator))

    def dataset(self, size):
        """What the training cameras see now, their central squares, as Pixels whose pictures an edit replaces."""
        cameras = [self.camera(i, size) for i in range(len(self.scene.train))]
        with torch.no_grad():
            pictures = [(self.render(c)[0].permute(1, 2, 0) * 255).round().byte().cpu() for c in cameras]
        return Pixels([View(c, p, str(i)) for i, (c, p) in enumerate(zip(cameras, pictures))], self.centre.device)


@torch.no_grad()
def evaluate(representation, scene):
    """Mean PSNR in dB over the scene's test views, each on the background, and how many there are."""
    psnrs = []
    for view in scene.test:
        photograph = over(view.picture(representation.centre.device), representation.background)
        error = (representation.render(view.camera)[0] - photograph).square().mean().item()
        psnrs.append(-10 * math.log10(error + 1e-12))
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
    lens = representation.camera(None, size)

    def at(share):
        a = torch.tensor(low + (high - low) * share)
        back = elevation.cos() * (a.cos() * forward + a.sin() * right) + elevation.sin() * up
        return replace(lens, pose=_look(centre + distance.median() * back, back, up))
    return at, full


def input_path(representation, frames, size):
    """`frames` square Cameras on the way through the training views, in their order."""
    pose = torch.stack([v.camera.pose for v in representation.scene.train])
    cameras = []
    for at in torch.linspace(0, len(pose) - 1, frames):
        i = min(int(at), len(pose) - 2) if len(pose) > 1 else 0
        middle = torch.lerp(pose[i], pose[min(i + 1, len(pose) - 1)], at - i)
        cameras.append(replace(representation.camera(i, size), pose=_look(middle[:, 3], middle[:, 2], middle[:, 1])))
    return cameras


def _look(position, back, up):
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

    Depth is 16 bit, z along the optical axis in thousandths of a unit, as nerfstudio wants it.
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
            pose = torch.cat((camera.pose, torch.tensor([[0.0, 0, 0, 1]])))
            names = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2")
            frames.append(dict(file_path=f"images/{i:05}.png", depth_file_path=f"depth/{i:05}.png",
                               transform_matrix=pose.tolist(), w=camera.width, h=camera.height)
                          | dict(zip(names, camera.lens)))
    with replacing(folder / "transforms.json") as part:
        part.write_text(json.dumps({"camera_model": "OPENCV", "frames": frames}, indent=1))
