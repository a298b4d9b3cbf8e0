"""The files of a capture, read before any picture: photographs with poses and lenses, a cloud of points.

    capture = read_transforms("examples/apple")      # nerfstudio's or instant-ngp's transforms.json, or Blender's
    capture = read_model("garden")                   # from colmap.py: the same for COLMAP models

Poses are camera-to-world with OpenGL's axes, in float64: map coordinates reach millions of metres, where float32 has
steps of half a metre.
"""
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files.messages import one_line
from files.reading import POINTER, first_bytes, is_number, is_pointer, read_json


class SceneError(ValueError):
    """An unusable scene or model file; one line that names the file and the reason."""

    def __init__(self, message):
        super().__init__(one_line(message))


def check_pointer(path, data=None):
    """Raise SceneError if the bytes of a file, which are read where they are not given, are a Git LFS pointer to it."""
    if is_pointer(first_bytes(path, 40) if data is None else data):
        raise SceneError(f"{path}: {POINTER}")


@dataclass(frozen=True)
class Shot:
    """One photograph, as the file of a capture describes it.

    Attributes:
        label: its name in errors, as "frame 3".
        name: as spelled in the file.
        picture, mask: paths; mask is None, or a picture whose black pixels are ignored.
        pose: [3,4] float64 camera-to-world, OpenGL axes.
        keys: its lens, with the keys of nerfstudio's transforms.json (w, h, fl_x, cx, k1, ...).
        own: whether the size (w, h) is given for this photograph, not for the whole file.
        split: "train", "test", "none", or None if the file does not say.
    """
    label: str
    name: str
    picture: Path
    mask: Path
    pose: np.ndarray
    keys: dict
    own: bool
    split: str = None


@dataclass(frozen=True)
class Capture:
    """The contents of one file, or of the folder of a model.

    Attributes:
        path: the file or folder, named in errors.
        files: the files that were read.
        shots: list of Shot, without those whose picture is missing.
        notes: warnings for the user, a line each.
        cloud: the file with the capture's 3D points, or None.
        keys: further keys of the file: aabb_scale, applied_transform.
    """
    path: Path
    files: list
    shots: list
    notes: list
    cloud: Path
    keys: dict

    def reads(self):
        """All files that the scene depends on, without duplicates: the capture's own, pictures, masks, points."""
        pictures = [file for shot in self.shots for file in (shot.picture, shot.mask)]
        return list(dict.fromkeys(file for file in (*self.files, *pictures, self.cloud) if file))


PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # tried for names without an ending: Blender omits .png
NAMES = ("transforms.json", "transforms_train.json")


def read_transforms(path, images=None):
    """Read a transforms.json of nerfstudio or instant-ngp, or Blender's transforms_{train,val,test}.json.

    Args:
        path: the directory, or the .json file in it.
        images: a folder, as images_4, that replaces the first one in the names of the pictures.
    Returns:
        A list of Capture: one, or two with Blender's held-out split (test, or else val).
    Raises:
        SceneError: a missing file, corrupt JSON, no frames, or an invalid pose.
    """
    path = find_transforms(path)
    held_out = [path.with_name(f"transforms_{split}.json") for split in ("test", "val")]
    held_out = [p for p in held_out if p.is_file()] if path.name == "transforms_train.json" else []
    return [_capture(file, images) for file in (path, *held_out[:1])]


def find_transforms(path):
    """The .json file at a path or in a directory; None for a directory without. Raises SceneError for no such path."""
    path = Path(path)
    try:
        if path.is_dir():
            return next((path / name for name in NAMES if (path / name).is_file()), None)
        if not path.is_file():
            raise SceneError(f"{path}: no such scene")
    except OSError as e:  # a name that is too long
        raise SceneError(f"{path}: no such scene: {e.strerror}") from e
    return path


def _capture(path, images):
    try:
        file = read_json(path)
    except ValueError as e:
        raise SceneError(e) from e
    if not isinstance(file.get("frames"), list) or not file["frames"]:
        raise SceneError(f"{path}: no frames in it")
    shots, missing, notes = [], [], []
    file["frames"] = _chosen(path, file, notes)
    split = _splits(path, file, notes)
    for i, frame in enumerate(file["frames"]):
        picture = _picture_path(path, i, frame, images)
        if not picture.is_file():
            missing.append(picture)
            continue
        name = frame["file_path"]
        shots.append(Shot(f"frame {i}", name, picture, _mask_path(path, i, file | frame), _pose(path, i, frame),
                          file | frame, "w" in frame and "h" in frame, split(name)))
    if missing:
        below = Path(_plain(file["frames"][0]["file_path"])).parts
        note_missing(path, missing, len(shots), notes, path.parent / below[0], Path(*below[1:] or below))
    cloud = file.get("ply_file_path")
    if cloud is not None:
        cloud = _path(path, cloud, "its ply_file_path", "file")
        if not cloud.is_file():
            notes.append(f"{path}: its ply_file_path, {cloud}, is missing: reading the scene without points")
            cloud = None
    keys = {key: file[key] for key in ("aabb_scale", "applied_transform") if key in file}
    return Capture(path, [path], shots, notes, cloud, keys)


def _chosen(path, file, notes):
    """The frames to be used: without those marked is_bad, with ScanNet++'s test_frames; refuses moving scenes."""
    held_out, frames = file.get("test_frames", []), file["frames"]
    if not isinstance(held_out, list):
        raise SceneError(f"{path}: test_frames is not a list of frames")
    names = [frame.get("file_path") if isinstance(frame, dict) else frame for frame in held_out]
    own = [frame for frame in held_out if isinstance(frame, dict) and "transform_matrix" in frame]
    if held_out and not any(f"{key}_filenames" in file for key in ("train", "val", "test")):
        file["test_filenames"] = names  # names of frames, or further frames
    frames = [*frames, *own]
    times = {json.dumps(frame["time"]) for frame in frames if isinstance(frame, dict) and "time" in frame}
    if len(times) > 1:
        raise SceneError(f"{path}: its frames have {len(times)} times: a moving scene is not supported")
    kept = [frame for frame in frames if not (isinstance(frame, dict) and frame.get("is_bad"))]
    if not kept:
        raise SceneError(f"{path}: all of its frames are marked is_bad")
    if len(kept) < len(frames):
        notes.append(f"{path}: {len(frames) - len(kept)} of {len(frames)} frames are marked is_bad: they are left out")
        bad = {frame.get("file_path") for frame in frames if frame not in kept}
        for key in ("train", "val", "test"):
            if isinstance(names := file.get(f"{key}_filenames"), list):
                file[f"{key}_filenames"] = [name for name in names if name not in bad]
    return kept


def note_missing(path, missing, there, notes, folder, name):
    """Append to `notes` that pictures of the file `path` are missing; raise SceneError if all are.

    missing: paths of missing pictures; there: number of the others; folder, name: expected place of the first one. The
    error suggests a folder of reduced pictures beside it, as images_4 of 3DGS and nerfstudio.
    """
    if there:
        notes.append(f"{path}: {len(missing)} of {len(missing) + there} pictures are missing, e.g. {missing[0]}")
        return
    reduced = [beside.name for n in (2, 4, 8) if folder.name
               and (beside := folder.with_name(f"{folder.name}_{n}")).joinpath(name).is_file()]
    hint = f"; they are in {reduced[0]}: use --images {reduced[0]}" if reduced else (
        "" if folder.is_dir() else "; --images names the folder of the pictures")
    raise SceneError(f"{path}: none of its {len(missing)} pictures exists, e.g. {missing[0]}{hint}")


def _path(path, name, what, kind="picture"):
    """The path for a name in the file `path`, which need not exist; what, kind: descriptions of it for errors."""
    if not isinstance(name, str):
        raise SceneError(f"{path}: {what} is not the name of a {kind}")
    found = path.parent / name
    try:
        if found.is_dir() or not found.name or "\0" in name:
            raise SceneError(f"{path}: {what}, {one_line(repr(name), 100)}, is not a {kind}")
        if "\\" in name and not found.is_file():  # written on Windows
            found = path.parent / name.replace("\\", "/")
            found.is_file()
    except OSError as e:
        raise SceneError(f"{path}: {what}, {one_line(repr(name), 100)}: {e.strerror}") from e
    return found


def _picture_path(path, i, frame, images):
    """Path of the picture of frame i in the file `path`, which need not exist; raises SceneError."""
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
        raise SceneError(f"{path}: frame {i} has no file_path")
    name = frame["file_path"]
    if images:
        below = Path(name.replace("\\", "/")).parts  # "a.png" of "./images/a.png"
        name = str(Path(images, *(below[1:] if len(below) > 1 else below)))
    picture = _path(path, name, f"the file_path of frame {i}")
    if not picture.is_file() and picture.suffix.lower() not in PICTURES:
        try:
            named = [picture.with_name(picture.name + case(end)) for end in PICTURES for case in (str, str.upper)]
            picture = next((file for file in named if file.is_file()), named[0])
        except OSError as e:
            raise SceneError(f"{path}: the file_path of frame {i}, {one_line(repr(name), 100)}: {e.strerror}") from e
    return picture


def _mask_path(path, i, keys):
    if keys.get("mask_path") is None:
        return None
    mask = _path(path, keys["mask_path"], f"the mask_path of frame {i}")
    if not mask.is_file():
        raise SceneError(f"{path}: the mask of frame {i}, {mask}, is missing")
    return mask


def _splits(path, file, notes):
    """A function from a frame's name to its split, by the file's train_, val_ and test_filenames.

    If only training views are listed, all others are held out; if only held-out views are, all others are fitted.
    val_filenames are held out if there are no test_filenames.
    """
    lists = {}
    for key in ("train", "val", "test"):
        names = file.get(f"{key}_filenames")
        if names is not None:
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise SceneError(f"{path}: {key}_filenames is not a list of names")
            lists[key] = {_plain(name) for name in names}
    if not lists:
        return lambda name: None
    there = {_plain(frame["file_path"]) for frame in file["frames"]
             if isinstance(frame, dict) and isinstance(frame.get("file_path"), str)}
    for key, names in lists.items():
        if names - there:
            raise SceneError(f"{path}: {len(names - there)} of its {key}_filenames are not frames, "
                             f"e.g. {one_line(repr(min(names - there)), 100)}")
    held_out = lists.get("test", lists.get("val"))
    train = lists.get("train", there - (held_out or set()))
    held_out = there - train if held_out is None else held_out
    if not train:
        raise SceneError(f"{path}: its train_filenames, or the others, leave no frame to fit")
    if held_out & train:
        notes.append(f"{path}: {len(held_out & train)} frames in train_filenames are also held out: they are fitted")
    return lambda name: "train" if _plain(name) in train else "test" if _plain(name) in held_out else "none"


def _plain(name):
    """The normal spelling of a path: ./images/a.png and images\\a.png become images/a.png."""
    return Path(name.replace("\\", "/")).as_posix()


FARTHEST = 1e7  # largest number in a pose: no map has larger coordinates


def is_affine(value):
    """Whether a value from JSON is a matrix of 3 or 4 rows of 4 numbers, none larger than FARTHEST."""
    return (isinstance(value, list) and len(value) in (3, 4)
            and all(isinstance(row, list) and len(row) == 4 for row in value)
            and all(is_number(x, -FARTHEST, FARTHEST) for row in value for x in row))


def _pose(path, i, frame):
    rows = frame.get("transform_matrix")
    if not (isinstance(rows, list) and len(rows) in (3, 4)
            and all(isinstance(row, list) and len(row) == 4 for row in rows)
            and all(isinstance(x, (int, float)) and not isinstance(x, bool) for row in rows for x in row)):
        raise SceneError(f"{path}: frame {i} has no 4 x 4 transform_matrix")
    wrong = f"{path}: the transform_matrix of frame {i} is"
    if not all(is_number(x, -FARTHEST, FARTHEST) for row in rows for x in row):
        raise SceneError(f"{wrong} not finite, or larger than {FARTHEST:g}")
    pose = np.array(rows, dtype=np.float64)
    axes = pose[:3, :3]
    volume = np.linalg.det(axes)
    if abs(volume) < 1e-6:
        raise SceneError(f"{wrong} singular")
    if len(rows) == 4 and np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-3:
        raise SceneError(f"{wrong} not a pose: its last row must be 0 0 0 1")
    scale = abs(volume) ** (1 / 3)
    if volume < 0 or np.abs(axes.T @ axes / scale ** 2 - np.eye(3)).max() > 0.05:
        raise SceneError(f"{wrong} not a rotation: its axes must be orthogonal, of equal length, and right-handed")
    if abs(scale - 1) > 1e-3:
        pose[:3, :3] = axes / scale  # the positions set the scale
    return pose[:3]


OTHER_LENSES = {"is_fisheye": "a fisheye", "equirectangular": "an equirectangular", "latlong": "an equirectangular"}
LENS_KEYS = ("w", "h", "x_fov", "y_fov", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy",
             "k1", "k2", "k3", "k4", "p1", "p2")


def stands_upright(shot, own, orientation):
    """Whether a picture stored on its side, of own (w, h) pixels and with an EXIF orientation, was used upright.

    It was if the file's w and h have the aspect of the turned picture, and not of the stored one.
    """
    w, h = (shot.keys.get(key) for key in ("w", "h"))
    if orientation <= 4 or not (is_number(w, 1e-9) and is_number(h, 1e-9)):
        return False
    stored, turned = (abs(w / h * b / a - 1) for a, b in (own, own[::-1]))
    return turned <= 0.02 < stored


def lens_of(path, shot, own, shape):
    """The `lens` of a Camera for pixels of shape [H,W,...]; own: (width, height) of the picture's file.

    Raises SceneError, naming the capture's file `path`, for anything but a pinhole with OpenCV's distortion.
    """
    keys, who = shot.keys, f"{path}: {shot.label}"
    model = keys.get("camera_model", "OPENCV")
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        raise SceneError(f"{path}: camera model {model} is not supported, undistort the pictures first")
    wrong = next((key for key in keys if keys[key] and (key in OTHER_LENSES or key.startswith("ftheta_"))), None)
    if wrong:
        kind = OTHER_LENSES.get(wrong, "an f-theta")
        raise SceneError(f"{path}: {kind} camera ({wrong}) is not supported, undistort the pictures first")
    get = {k: v for k, v in keys.items() if k in LENS_KEYS and v is not None}
    for key, value in get.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SceneError(f"{who} has an intrinsic that is not a number, {key}")
        if not is_number(value, -1e6, 1e6):
            raise SceneError(f"{who} has an intrinsic that is not finite and positive, or too large, {key}")
    w, h = get.get("w", own[0]), get.get("h", own[1])
    if not min(w, h) > 0 or abs(w / h * own[1] / own[0] - 1) > 0.02:
        raise SceneError(f"{who} is {own[0]} x {own[1]} pixels, the file says {w:g} x {h:g}")

    def focal(axis, side):  # a fov in degrees has priority over pixels, pixels over an angle in radians
        if f"{axis}_fov" in get:
            return from_angle(side, math.radians(get[f"{axis}_fov"]), f"{axis}_fov")
        if f"fl_{axis}" in get:
            return get[f"fl_{axis}"]
        if f"camera_angle_{axis}" in get:
            return from_angle(side, get[f"camera_angle_{axis}"], f"camera_angle_{axis}")

    def from_angle(side, angle, key):
        if not 0 < angle < math.pi:
            raise SceneError(f"{who} has an angle of view of {math.degrees(angle):g} degrees, {key}: not "
                             "finite and positive, or 180 and more")
        return side / 2 / math.tan(angle / 2)
    fx = focal("x", w)
    fx = fx or focal("y", h)
    fy = focal("y", h) or fx
    if not fx:
        raise SceneError(f"{who} has no focal length (x_fov, fl_x or camera_angle_x)")
    zx, zy = shape[1] / w, shape[0] / h  # the pictures may have been reduced since the file was written
    lens = (fx * zx, fy * zy, get.get("cx", w / 2) * zx, get.get("cy", h / 2) * zy,
            *(get.get(k, 0.0) for k in ("k1", "k2", "k3", "k4", "p1", "p2")))
    if not all(map(math.isfinite, lens)) or min(lens[:2]) <= 0:
        raise SceneError(f"{who} has a focal length or another intrinsic that is not finite and positive")
    for f, c, side in zip(lens[:2], lens[2:4], (shape[1], shape[0]), strict=True):
        if not 0.01 < f / side < 1000:
            raise SceneError(f"{who} has a focal length of {f / side:g} times its picture's side")
        if not -1 <= c / side <= 2:
            raise SceneError(f"{who} has its optical axis (cx, cy) far outside of the picture")
    if shot.label == "frame 0" and "x_fov" in get and "fl_x" in get and not 0.8 < get["fl_x"] / fx < 1.25:
        warnings.warn(f"{path}: x_fov and fl_x contradict each other, {get['x_fov']:g} degrees are used", stacklevel=4)
    return lens
