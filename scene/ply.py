"""Reading .ply files, ascii and binary: the vertices of a file, or the points of a cloud with their colours.

    table, comments = read_vertices(path, path.read_bytes())   # {property: numbers [N]}, comment lines
    points, colours = read_points("sparse_pc.ply")             # [N,3] float64; [N,3] in [0,1] or None
"""
import re

import numpy as np

from files.messages import one_line
from scene.captures import FARTHEST, SceneError, check_pointer

TYPES = {"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4", "float": "<f4",
         "double": "<f8", "int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4", "uint32": "<u4",
         "float32": "<f4", "float64": "<f8"}
COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))


def read_vertices(path, data):
    """Vertices of the .ply file `path` with the bytes `data`: ({property: array [N]}, comments of the header).

    Raises SceneError: no header, an unknown format, a compressed or truncated file, vertices that do not come first.
    """
    check_pointer(path, data)
    end = re.search(rb"(?<=[\r\n])end_header[ \t]*(\r\n|\n|\r)", data[:2 ** 20])
    if not end or not re.match(rb"ply\s", data):
        raise SceneError(f"{path}: not a .ply: it has no header")
    head, body = data[:end.start()], data[end.end():]
    texts = head.decode("ascii", "replace").splitlines()
    lines = [line.split() for line in texts]
    layout = next((words[1] for words in lines if words[:1] == ["format"] and words[2:] == ["1.0"]), None)
    if layout not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise SceneError(f"{path}: a .ply of unknown format, neither ascii nor binary 1.0")
    elements = [words[1:] for words in lines if words[:1] == ["element"]]
    if any(words[:1] == ["chunk"] for words in elements) or b" packed_" in head:
        raise SceneError(f"{path}: is a compressed .ply (SuperSplat): export it uncompressed, or convert it with "
                         "splat-transform (npm install -g @playcanvas/splat-transform)")
    try:
        first = next(i for i, words in enumerate(lines) if words[:1] == ["element"])
        last = next((i for i, words in enumerate(lines) if i > first and words[:1] == ["element"]), len(lines))
        count = int(elements[0][1])
        assert elements[0][0] == "vertex" and count >= 0
        kind = np.dtype([(w[2], TYPES[w[1]]) for w in lines[first + 1:last] if w[:1] == ["property"]])
        assert kind.names
    except (StopIteration, AssertionError, KeyError, ValueError, IndexError, OverflowError) as e:
        raise SceneError(f"{path}: an unreadable header, or one that does not begin with the vertices") from e
    if layout == "ascii":
        table = _ascii_table(path, body, kind, count)
    else:
        if len(body) < count * kind.itemsize:
            raise SceneError(f"{path}: is truncated: {len(body)} of {count * kind.itemsize} bytes")
        table = np.frombuffer(body, kind if layout == "binary_little_endian" else kind.newbyteorder(">"), count)
    comments = [text.strip()[8:].strip() for text in texts if text.split()[:1] == ["comment"]]
    return {name: table[name] for name in kind.names}, comments


def _ascii_table(path, body, kind, count):
    """The first `count` rows of numbers as {name: float64 [count]}."""
    if len(body) < 2 * count * len(kind.names) - 1:  # a digit and a blank each
        raise SceneError(f"{path}: is truncated: {len(body)} bytes for {count} lines of {len(kind.names)} numbers")
    words = body.split(None, count * len(kind.names))[:count * len(kind.names)]
    try:
        rows = np.array([float(word) for word in words], np.float64)
    except ValueError as e:
        raise SceneError(f"{path}: {one_line(e, 100)}") from e
    if len(rows) < count * len(kind.names):
        raise SceneError(f"{path}: is truncated: {len(rows)} of {count * len(kind.names)} numbers")
    return dict(zip(kind.names, rows.reshape(count, len(kind.names)).T, strict=True))


def read_points(path):
    """The points of a cloud: positions [N,3] float64, and colours [N,3] in [0,1], or None without colours.

    Raises SceneError as read_vertices, and for missing positions or numbers that are not finite.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise SceneError(f"{path}: cannot be read: {e.strerror}") from e
    table, _ = read_vertices(path, data)
    if not {"x", "y", "z"} <= table.keys():
        raise SceneError(f"{path}: not a cloud of points: it has no x, y and z")
    points = np.stack([table[axis].astype(np.float64) for axis in "xyz"], 1)
    names = next((names for names in COLOURS if set(names) <= table.keys()), None)
    colours = None
    if names:
        colours = np.stack([table[name].astype(np.float64) for name in names], 1)
        # integers have 8 bits, or 16 if some are larger; floats, also in ascii files, may be in [0,1]
        most = colours.max(initial=0)
        floats = most <= 1 and all(table[name].dtype.kind == "f" for name in names)
        colours = colours / (1 if floats else 255 if most <= 255 else 65535)
    whole = points if colours is None else np.concatenate((points, colours), 1)
    if not (np.isfinite(whole).all() and np.abs(points).max(initial=0) <= FARTHEST):
        raise SceneError(f"{path}: a point that is not finite, or further than {FARTHEST:g}")
    return points, None if colours is None else colours.clip(0, 1)
