"""COLMAP models as captures: cameras, images and points3D, binary or text.

    model = find_model("garden")                     # garden/sparse/0, garden/sparse or garden/colmap/sparse/0, or None
    capture = read_model("garden", "images_4")       # a Capture: photographs, poses, lenses, the file of the points
    points, colours = read_points(capture.cloud)     # [N,3] float64, [N,3] in [0,1]

The format follows COLMAP's documentation (Schoenberger and Frahm 2016): little endian, world-to-camera poses, OpenCV's
axes. Files of rigs and frames are not needed: the poses of the images include them.
"""
import functools
import math
import os
import struct
import warnings
from pathlib import Path

import numpy as np

from files.messages import one_line
from files.reading import is_number
from scene.captures import FARTHEST, Capture, SceneError, Shot, check_pointer, note_missing

ENDS = ("bin", "txt")
FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0", ".")  # of a model, in the folder of a scene
MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE", "FULL_OPENCV", "FOV",
          "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE", "RAD_TAN_THIN_PRISM_FISHEYE",
          "SIMPLE_DIVISION", "DIVISION", "SIMPLE_FISHEYE", "FISHEYE", "EUCM", "EQUIRECTANGULAR")  # in their order
PARAMETERS = {"SIMPLE_PINHOLE": ("f", "cx", "cy"), "PINHOLE": ("fl_x", "fl_y", "cx", "cy"),
              "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"), "RADIAL": ("f", "cx", "cy", "k1", "k2"),
              "OPENCV": ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2")}  # of the supported models
TRACK, ERROR, FEWEST = 3, 2, 100  # see read_points
UNSURE = 2  # median reprojection error in pixels, above which poses are doubtful


def find_model(folder):
    """The folder of the COLMAP model in the folder of a scene, or None."""
    for name in FOLDERS:
        model = Path(folder) / name
        parts = [any((model / f"{part}.{end}").is_file() for end in ENDS) for part in ("cameras", "images")]
        if all(parts) or any(parts) and name != ".":  # half a model is an error, unlike a folder with an images.txt
            return model
    return None


def read_model(folder, images=None):
    """Read the COLMAP model in the folder of a scene, as a Capture with photographs sorted by name.

    images: folder of its pictures, relative to the scene's; "images" if None. They may be reduced.
    Raises SceneError, naming the file: a missing, truncated or damaged part, an unsupported camera model, no pictures.
    """
    model, folder = find_model(folder), Path(folder)
    pair = ("cameras", "images")
    end = next((end for end in ENDS if all((model / f"{name}.{end}").is_file() for name in pair)), None)
    if end is None:
        there = sorted(p.name for p in model.iterdir() if p.stem in ("cameras", "images", "points3D"))
        raise SceneError(f"{model}: half a COLMAP model: {', '.join(there)}; it needs cameras and images, .bin or .txt")
    files = [model / f"cameras.{end}", model / f"images.{end}"]
    cameras, shots, missing = READ["cameras", end](files[0]), [], []
    found = sorted(READ["images", end](files[1]), key=lambda image: image[1])
    if not found:
        raise SceneError(f"{files[1]}: no images in it")
    pictures = folder / (images or "images")
    for number, name, camera, pose in found:
        who = f"image {number}, {one_line(repr(name), 100)}"
        if camera not in cameras:
            raise SceneError(f"{files[1]}: {who}, has camera {camera}, which is not in {files[0].name}")
        try:
            picture = pictures / name
            there = picture.is_file()
        except (OSError, ValueError) as e:
            raise SceneError(f"{files[1]}: {who}: not the name of a picture") from e
        if there:
            pose = _camera_to_world(files[1], who, pose)
            shots.append(Shot(f"image {number}", name, picture, None, pose, cameras[camera], True))
        else:
            missing.append(picture)
    others = [other.name for other in sorted(model.parent.glob("[1-9]*")) if find_model(other) == other]
    notes = [f"{model}: this model is used, not those beside it: {', '.join(others)}"] if others else []
    if missing:
        note_missing(model, missing, len(shots), notes, pictures, found[0][1])
    cloud = next((file for e in (end, *ENDS, "ply") if (file := model / f"points3D.{e}").is_file()), None)
    return Capture(model, files, shots, notes, cloud, {})


def _camera_to_world(path, who, pose):
    """(qw, qx, qy, qz, tx, ty, tz) world-to-camera with OpenCV's axes -> [3,4] camera-to-world with OpenGL's."""
    if not all(is_number(x, -FARTHEST, FARTHEST) for x in pose):
        raise SceneError(f"{path}: the pose of {who}, is not finite, or larger than {FARTHEST:g}")
    length = math.hypot(*pose[:4])
    if not 0.5 < length < 2:
        raise SceneError(f"{path}: the pose of {who}, is not a rotation: its quaternion has length {length:g}, not 1")
    w, x, y, z = (q / length for q in pose[:4])
    rotation = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                         [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                         [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
    return np.concatenate((rotation.T * [1, -1, -1], -rotation.T @ np.array(pose[4:])[:, None]), 1)


def read_points(path):
    """The 3D points of a points3D.bin or .txt: positions [N,3] float64 and colours [N,3] in [0,1].

    Points seen in fewer than TRACK pictures, or with a reprojection error above ERROR times the median, are dropped:
    most are false matches. The errors are in pixels of pictures of any size, hence the comparison with their median. If
    fewer than FEWEST would be left, as of two pictures, all are kept.
    """
    rows = READ["points3D", path.suffix[1:]](path)
    points, track, error = rows[:, :3], rows[:, 6], rows[:, 7]
    if not (np.isfinite(rows).all() and np.abs(points).max(initial=0) <= FARTHEST):
        raise SceneError(f"{path}: a point that is not finite, or further than {FARTHEST:g}")
    known = error[error >= 0]  # -1 means that COLMAP has not measured it
    if len(known) and np.median(known) > UNSURE:
        warnings.warn(f"{path}: half of its points are off by more than {np.median(known):.1f} pixels in the pictures: "
                      "the poses are uncertain, and a fit will be blurred", stacklevel=2)
    good = (track >= TRACK) & (error <= ERROR * np.median(known) if len(known) else True)
    rows = rows[good] if good.sum() >= FEWEST else rows
    return rows[:, :3], rows[:, 3:6].clip(0, 255) / 255


class _Bytes:
    """The bytes of a file, read from the front; SceneError if there are too few or too many."""

    def __init__(self, path):
        self.path, self.at = path, 0
        try:
            self.data = path.read_bytes()
        except OSError as e:
            raise SceneError(f"{path}: cannot be read: {e.strerror}") from e
        check_pointer(path, self.data)

    def take(self, form):
        form = struct.Struct("<" + form)
        self.skip(form.size)
        return form.unpack_from(self.data, self.at - form.size)

    def skip(self, count):
        self.at += count
        if self.at > len(self.data):
            raise SceneError(f"{self.path}: is truncated, or not a COLMAP file: {len(self.data)} bytes")

    def name(self):
        end = self.data.find(b"\0", self.at)
        if end < 0:
            self.skip(len(self.data))
        found, self.at = self.data[self.at:end], end + 1
        return os.fsdecode(found)

    def each(self):
        """Count the records that the file states, then check that no bytes are left."""
        count, = self.take("Q")
        yield from range(count)
        if self.at < len(self.data):
            left = len(self.data) - self.at
            raise SceneError(f"{self.path}: is damaged, or not a COLMAP file: {left} bytes are left over")


def _cameras_binary(path):
    data, cameras = _Bytes(path), {}
    for _ in data.each():
        number, model, width, height = data.take("IiQQ")
        name = MODELS[model] if 0 <= model < len(MODELS) else f"number {model}"
        cameras[number] = _lens(path, number, name, width, height,
                                lambda names: data.take(f"{len(names)}d"))
    return cameras


def _images_binary(path):
    data, images = _Bytes(path), []
    for _ in data.each():
        number, *pose, camera = data.take("I7dI")
        images.append((number, data.name(), camera, pose))
        data.skip(24 * data.take("Q")[0])  # its features
    return images


def _points_binary(path):
    data, rows = _Bytes(path), []
    for _ in data.each():
        _, x, y, z, r, g, b, error, track = data.take("Q3d3BdQ")
        data.skip(8 * track)
        rows.append((x, y, z, r, g, b, track, error))
    return np.array(rows, dtype=np.float64).reshape(-1, 8)


def _lens(path, number, model, width, height, parameters):
    """A camera as keys of transforms.json; parameters: a function from names to values."""
    if model not in PARAMETERS:
        raise SceneError(f"{path}: camera {number} has the model {one_line(model, 40)}, which is not supported: "
                         "undistort the pictures first, as with colmap image_undistorter")
    names = PARAMETERS[model]
    keys = dict(zip(names, parameters(names), strict=True))
    if "f" in keys:
        keys["fl_x"] = keys["fl_y"] = keys.pop("f")
    return keys | {"w": width, "h": height}


def _lines(path):
    """(number, text) of the lines except comments; blank ones count, as the features of an image may be empty."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as e:
        raise SceneError(f"{path}: cannot be read: {e.strerror}") from e
    check_pointer(path, text.encode(errors="surrogateescape"))
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if not line.lstrip().startswith("#")]


def _numbers(path, line, words, kind=float):
    try:
        return [kind(word) for word in words]
    except ValueError as e:
        raise SceneError(f"{path}, line {line}: {one_line(e, 100)}") from e


def _cameras_text(path):
    cameras = {}
    for line, text in _lines(path):
        if not (words := text.split()):
            continue
        if len(words) < 4:
            raise SceneError(f"{path}, line {line}: need CAMERA_ID MODEL WIDTH HEIGHT and parameters")
        number, width, height = _numbers(path, line, (words[0], *words[2:4]), int)

        parameters = functools.partial(_parameters, path, line, words)
        cameras[number] = _lens(path, number, words[1], width, height, parameters)
    return cameras


def _parameters(path, line, words, names):
    """The parameters of a camera with the words of a line of cameras.txt."""
    if len(words) != 4 + len(names):
        raise SceneError(f"{path}, line {line}: {words[1]} has {len(names)} parameters, not {len(words) - 4}")
    return _numbers(path, line, words[4:])


def _images_text(path):
    lines, images = iter(_lines(path)), []
    for line, text in lines:
        if not text.strip():
            continue
        words = text.strip().split(None, 9)  # a name may contain blanks
        if len(words) < 10:
            raise SceneError(f"{path}, line {line}: need IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
        (number, camera), pose = _numbers(path, line, (words[0], words[8]), int), _numbers(path, line, words[1:8])
        images.append((number, words[9], camera, pose))
        line, features = next(lines, (line + 1, ""))
        features = features.split()
        if len(features) % 3 or features and not features[-1].lstrip("-").isdigit():
            raise SceneError(f"{path}, line {line}: the second line of an image must have three numbers per feature")
    return images


def _points_text(path):
    rows = []
    for line, text in _lines(path):
        if not (words := text.split()):
            continue
        if len(words) < 8 or len(words) % 2:
            raise SceneError(f"{path}, line {line}: need POINT3D_ID X Y Z R G B ERROR and a track of pairs")
        x, y, z, r, g, b, error = _numbers(path, line, words[1:8])
        rows.append((x, y, z, r, g, b, (len(words) - 8) // 2, error))
    return np.array(rows, dtype=np.float64).reshape(-1, 8)


READ = {("cameras", "bin"): _cameras_binary, ("images", "bin"): _images_binary, ("points3D", "bin"): _points_binary,
        ("cameras", "txt"): _cameras_text, ("images", "txt"): _images_text, ("points3D", "txt"): _points_text}
