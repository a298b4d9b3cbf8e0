"""Reading scenes: photographs, masks and points of a capture, and the box of interest.

    scene = load_scene("examples/apple")           # transforms.json, Blender's files or a COLMAP model
    scene.train[3].camera.rays()                   # origins and directions [3,H*W]
    scene_files("examples/apple")                  # the files that it depends on

Poses follow OpenGL, lenses OpenCV, and distances are in the units of the file.
"""
import hashlib
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from files.messages import one_line
from files.pictures import PictureError, picture_size, read_picture, to_uint8
from files.reading import is_number
from scene import colmap, ply
from scene.box import cell_points, visual_hull
from scene.cameras import Camera, directions, distorted, in_picture
from scene.captures import SceneError, find_transforms, is_affine, lens_of, read_transforms, stands_upright
from scene.photographs import Scene, View, over


def load_scene(path, downscale=1, background=(1.0, 1.0, 1.0), images=None):
    """Read a capture: a transforms.json (nerfstudio, instant-ngp), Blender's transforms_*.json, or a COLMAP model.

    Args:
        path: the directory, or the .json file in it. Without a transforms.json in the directory, a model in its
            sparse/0, sparse or colmap/sparse/0 is read, with pictures from images/.
        downscale: factor by which pictures are reduced.
        background: colour behind pictures with alpha.
        images: another folder of pictures, as images_4 with reduced ones; in a transforms.json it replaces the first
            folder of their names.
    Returns:
        A Scene. Frames without a picture are left out with a warning. Test views are Blender's test split (or else its
        val split), the test_filenames (or val_filenames) of a transforms.json, or every 8th photograph of a capture,
        sorted by name for COLMAP. Masked pixels (mask_path) are ignored. A cloud of points (COLMAP's points3D, or
        ply_file_path) limits the box of interest.
    Raises:
        SceneError: a missing or corrupt file, no frames, an invalid pose, unreadable or differently sized pictures.
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
        raise SceneError(f"{first.path}: none of the existing pictures is a training view")
    if not any(v.pixels.shape[-1] == 4 and v.pixels[..., 3].min() < OPAQUE for v in train + test):
        # an opaque alpha channel only stores photographs; they show more than an isolated object
        train, test = [[replace(v, pixels=v.pixels[..., :3].contiguous()) for v in views] for views in (train, test)]
    bounded = all(v.pixels.shape[-1] == 4 for v in train)
    background = torch.tensor(background, dtype=torch.float32)
    if not bounded:  # if one picture has no alpha, the others are composited over the background
        train, test = [[replace(v, pixels=to_uint8(over(v.picture(), background))) for v in views]
                       for views in (train, test)]
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
    """All files that load_scene(path, images=images) reads, in its order and without duplicates; raises SceneError."""
    return list(dict.fromkeys(file for capture in _read(path, images) for file in capture.reads()))


PROGRAMS = {"poses_bounds.npy": "LLFF", "keyframes/corrected_cameras": "Polycam", "keyframes/cameras": "Polycam",
            "mesh_info.json": "Polycam", "*.r3d": "Record3D", "metadata": "Record3D", "rgbd": "Record3D",
            "*.csv": "RealityCapture", "*.psx": "Metashape", "cameras.xml": "Metashape",
            "opensfm/reconstruction.json": "OpenDroneMap", "reconstruction.json": "OpenSfM"}  # by what a folder holds


def _read(path, images):
    """The files of a scene as a list of captures.Capture: one, or two with Blender's held-out views."""
    if find_transforms(path):
        return read_transforms(path, images)
    if colmap.find_model(path):
        return [colmap.read_model(path, images)]
    for name, program in PROGRAMS.items():
        found = next(Path(path).glob(name), None)
        if found and (found.suffix != ".csv" or b"#name" in found.read_bytes()[:64]):
            raise SceneError(f"{path}: a capture of {program} ({found.relative_to(path)}): convert it first, with "
                             "nerfstudio's ns-process-data or COLMAP")
    raise SceneError(f"{path}: no transforms.json or transforms_train.json in it, and no COLMAP model in its sparse/0: "
                     "the poses of plain photographs have to be found first, by COLMAP for example")


MOST, MOST_OF_ONE = 2 ** 26, 2 ** 21  # pixels of all pictures of a file (100 of 800 x 800), of one (1920 x 1080)
OPAQUE = 250  # least alpha that counts as opaque: lossy formats do not keep 255


def _origin(captures):
    """The new origin [3] float64: the middle of the cameras if they are far from zero, else zero.

    float32 resolves 1e-7 of a coordinate. Up to a hundred extents from zero that is 1e-5 of the scene's extent, far
    less than a pixel, so nothing is moved.
    """
    position = np.stack([shot.pose[:, 3] for capture in captures for shot in capture.shots])
    middle = position.mean(0)
    extent = np.linalg.norm(position - middle, axis=1).max()
    # a single place says nothing about the size of the scene: assume ten units
    return middle if np.linalg.norm(middle) > 100 * (extent or 10) else np.zeros(3)


def _read_views(capture, downscale, origin):
    """The photographs of one capture, in its order, as a list of (Shot, View)."""
    path, views, sideways, hidden, first = capture.path, [], 0, [], None
    try:
        sizes = [picture_size(shot.picture) for shot in capture.shots]
        counts = [math.prod(own) / downscale ** 2 for own, _ in sizes]
        reduced = math.sqrt(max(1, sum(counts) / MOST, max(counts) / MOST_OF_ONE))
        downscale *= reduced
        for shot, (own, orientation) in zip(capture.shots, sizes, strict=True):
            # Poses refer to the picture as it is stored, unless its size in the file says that it was turned.
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
        raise SceneError(f"{path}: its masks leave no pixel, e.g. {hidden[0]}: black pixels are not used")
    if hidden:
        warnings.warn(one_line(f"{path}: {len(hidden)} of its masks leave no pixel, e.g. {hidden[0]}: their pictures "
                               "are dropped"), stacklevel=3)
    if sideways:
        warnings.warn(one_line(f"{path}: {sideways} of its pictures have an EXIF rotation, which is ignored, "
                               "as no w and h in the file confirm it"), stacklevel=3)
    if reduced > 1:
        warnings.warn(one_line(f"{path}: its pictures have {sum(counts) / 1e6:.0f} million pixels, the largest one "
                               f"{max(counts) / 1e6:.0f}: reduced by {downscale:.3g}, as by --downscale"), stacklevel=3)
    return views


def _read_mask(path, own, shape):
    """[H,W] bool, True where everything under a reduced pixel exceeds half of the mask's largest value.

    own: (width, height) of the photograph's file, whose aspect the mask must have; shape [H,W,...]: of its pixels here.
    """
    grey = np.array(read_picture(path, 1, upright=False).convert("RGB")).max(2)
    if abs(grey.shape[1] / grey.shape[0] * own[1] / own[0] - 1) > 0.02:
        raise SceneError(f"{path}: a mask of {grey.shape[1]} x {grey.shape[0]} pixels for a picture of "
                         f"{own[0]} x {own[1]}")
    used = torch.from_numpy(grey > grey.max() / 2)[None].float()  # white is 255, in masks of some programs 1
    return interpolate(used[None], size=tuple(shape[:2]), mode="area")[0, 0] > 1 - 1e-6


def _undistorts(lens, shape):
    """Whether `directions` inverts the distortion of a lens in most of a picture of shape [H,W,...]."""
    fx, fy, cx, cy, *_ = lens
    v, u = torch.meshgrid(*(torch.linspace(0, n, 9, dtype=torch.float64) for n in shape[:2]), indexing="ij")
    d = directions(torch.tensor(lens, dtype=torch.float64)[:, None], u.flatten(), v.flatten())
    x, y = distorted(lens, d[0] / -d[2], -d[1] / -d[2])
    off = torch.stack((fx * x + cx - u.flatten(), fy * y + cy - v.flatten()))
    return bool(d.isfinite().all() and (off.abs() < 1).all(0).float().mean() > 0.75)


LEAST_SEEN = 0.01  # share of a cloud's points in sight of a camera, below which it must be in other coordinates


def _points(capture, origin, views):
    """The cloud of a capture relative to `origin`, [N,3] float32, and its colours [N,3] in [0,1]; None without a cloud.

    nerfstudio's clouds are in the coordinates of the poses; those of its first releases in COLMAP's, before
    applied_transform. That is applied if the cameras then see more of the points. A cloud of which they see next to
    nothing is ignored with a warning.
    """
    if capture.cloud is None:
        return None, None
    points, colours = (colmap if capture.cloud.suffix in (".bin", ".txt") else ply).read_points(capture.cloud)
    choices, given = [points], capture.keys.get("applied_transform")
    if given is not None:
        rows = np.array(given, dtype=np.float64) if is_affine(given) else None
        if rows is None:
            raise SceneError(f"{capture.path}: its applied_transform is no 3 x 4 matrix of numbers")
        choices.append(points @ rows[:3, :3].T + rows[:3, 3])
    choices = [torch.from_numpy(choice - origin).float() for choice in choices]
    shares = [_share_seen(choice, views) for choice in choices]
    best = max(range(len(choices)), key=lambda i: shares[i] - 0.1 * i)  # the rule, unless the exception is much better
    if len(points) and shares[best] < LEAST_SEEN:
        warnings.warn(one_line(f"{capture.cloud}: the cameras see {shares[best]:.0%} of its points, which must be in "
                               "other coordinates: it is ignored"), stacklevel=3)
    if not len(points) or shares[best] < LEAST_SEEN:
        return None, None
    return choices[best], None if colours is None else torch.from_numpy(colours).float()


def _share_seen(points, views):
    """Share of points [N,3], estimated on at most 4000 of them, that at least one view has in its picture."""
    points = points[::max(1, len(points) // 2000)]
    seen = torch.zeros(len(points), dtype=torch.bool)
    for view in views:
        seen |= in_picture(view.camera, points.T)[3]
    return seen.float().mean().item() if len(points) else 0.0


NGP_UNIT = 0.33  # instant-ngp's unit cube holds 1 / 0.33 of the file's units, centred


def _bounds(views, bounded, points, capture):
    """Centre [3] and half side of the box of interest.

    The centre is the point nearest to all optical axes. The box of an object is the space around it that the cameras
    see. The box of a capture reaches to the median camera, but not beyond nearly all points of its cloud or
    instant-ngp's aabb_scale.
    """
    path = capture.path
    position = torch.stack([v.camera.pose[:, 3] for v in views]).double()  # [V,3]
    axis = torch.stack([-v.camera.pose[:, 2] for v in views]).double()
    axis = axis / axis.norm(dim=1, keepdim=True)
    centre, distance, ahead = _meeting(position, axis)
    _check_places(path, position, torch.stack([v.camera.pose[:, :3] for v in views]).double())
    _check_axes(path, ahead, bounded, points)
    if bounded:
        cameras = [v.camera for v in views]
        reach = [max(c.width / c.lens[0], c.height / c.lens[1]) / 2 for c in cameras]
        half = 1.05 * (distance * torch.tensor(reach, dtype=torch.float64)).median().item()
        _, hull = visual_hull(views, centre.float(), half, 1, 48)
        if hull.any():  # shrink to the visual hull, with room for an edit to grow
            x = (cell_points(hull.nonzero()[:, 0], 48) * 2 - 1).double() * half
            low, high = x.amin(1), x.amax(1)
            centre, half = centre + (low + high) / 2, min(half, 1.25 * (high - low).max().item() / 2)
    else:
        half, scale = distance.median().item(), capture.keys.get("aabb_scale")
        if points is not None and len(points) >= colmap.FEWEST:
            half = min(half, 1.05 * (points.double() - centre).abs().amax(1).quantile(0.98).item())
        if scale is not None:
            if not is_number(scale, 1e-3, 1e6):
                raise SceneError(f"{path}: aabb_scale is not a number between 0.001 and a million")
            half = min(half, scale / 2 / NGP_UNIT)
    half = max(half, 1e-3)
    if not (math.isfinite(half) and centre.isfinite().all()):
        raise SceneError(f"{path}: its cameras do not look at a common point")
    if position.abs().max() > 1e4 * half:
        raise SceneError(f"{path}: its cameras are up to {position.abs().max():g} units from zero, but look at "
                         f"something {half:.3g} units large: move the origin of the poses there")
    return centre.float(), half


def _meeting(position, axis):
    """The point [3] nearest to the axes [V,3] of cameras at position [V,3]; the distances [V] of the cameras from it,
    and the cosines [V] between axis and direction to it."""
    across = torch.eye(3, dtype=torch.float64) - axis[:, :, None] * axis[:, None]  # [V,3,3]
    A, b = across.mean(0), (across @ position[..., None]).mean(0)[:, 0]
    spread = (position - position.mean(0)).norm(dim=1).max().clamp_min(1e-3)
    # parallel axes meet nowhere: a weak pull to a point ahead of the cameras then decides
    ahead = position.mean(0) + axis.mean(0) * 2 * spread
    centre = torch.linalg.solve(A + 1e-3 * torch.eye(3, dtype=A.dtype), b + 1e-3 * ahead)
    distance = (position - centre).norm(dim=1)
    return centre, distance, ((centre - position) * axis).sum(1) / distance.clamp_min(1e-12)


def _check_places(path, position, axes):
    """Warn of cameras at position [V,3] with axes [V,3,3] that all stand in one place.

    World-to-camera matrices of cameras around something do so nearly; their inverses stand apart and look at a common
    point, unlike those of a panorama, which is only reported where it stands in exactly one place.
    """
    def spread(x):
        return (x - x.mean(0)).norm(dim=1).max()
    inverse = -(axes.mT @ position[..., None])[..., 0]
    _, _, ahead = _meeting(inverse, -axes[:, 2])
    around = spread(position) < 0.2 * spread(inverse) and ahead.abs().median() > 0.95
    if len(position) < 3 or not (around or spread(position) < 1e-6):
        return
    warnings.warn(one_line(f"{path}: its cameras all stand in one place: are its poses world-to-camera matrices? They "
                           "should be camera-to-world"), stacklevel=4)


def _check_axes(path, ahead, bounded, points):
    """Report cameras of which nine in ten look away from the point nearest to all their axes.

    ahead: [V], cosine between a camera's axis and the direction to that point. An object in front of them is required.
    A panorama from the inside has such cameras too: it gets a warning, or none if it has a cloud of points.
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
