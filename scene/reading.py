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
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import interpolate

from files.messages import one_line
from files.pictures import PictureError, picture_size, read_picture
from files.reading import is_number
from scene import colmap, ply
from scene.box import cell_points, visual_hull
from scene.cameras import Camera, directions, distorted, in_picture
from scene.captures import SceneError, find_transforms, lens_of, read_transforms, stands_upright
from scene.photographs import Scene, View, over


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
