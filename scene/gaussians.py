"""Files of 3D Gaussians: .ply of 3DGS and .splat, read and written.

    read, write = FILES[suffix_of(path)]
    values, comments = read(path, path.read_bytes())     # tensors in the order of ATTRIBUTES, lines of the header
    values = usable(path, values)                        # finite, none too large
    data = write(*values, origin, comments)

Shapes are those of splat.Splats: [N,3], [N,3], [N,4] as wxyz, [N] as logits, [N,3], [N,K,3].
"""
import math
import warnings

import numpy as np
import torch

from files.messages import one_line
from files.reading import is_number, read_json
from scene.captures import FARTHEST, SceneError, check_pointer, is_affine
from scene.ply import read_vertices
from scene.representation import SH_DC, spherical_harmonics

ATTRIBUTES = ("means", "log_scales", "quaternions", "opacities", "sh_dc", "sh_rest")
LARGEST = (FARTHEST, 40, 1e8, 1e4, 1e6, 1e6)  # magnitudes of these: squares and products of larger ones overflow
WIDEST = math.log(FARTHEST)  # of the log scales; -40 is flat and can be drawn
FLAT, SURE = -30.0, 20.0  # in the place of a log scale of -inf and of an opacity of +-inf, a logit
FITTED = "opacities without compensation of the low-pass filter"  # comment in files of own fits, see splat.Splats
PARSED = "dataparser_transforms.json"  # nerfstudio's, see in_parsed


def usable(path, values):
    """The tensors of a file in the order of ATTRIBUTES, without Gaussians that are not finite, which gives a warning.

    A log scale of -inf becomes FLAT, an opacity of +-inf +-SURE. Raises SceneError where nothing is left, or where
    numbers are too large to be drawn.
    """
    means, log_scales, quaternions, opacities, *colours = values
    opacities = torch.where(opacities.isinf(), opacities.sign() * SURE, opacities)
    values = [means, torch.where(log_scales == -torch.inf, FLAT, log_scales), quaternions, opacities, *colours]
    count = len(means)
    if not count:
        raise SceneError(f"{path}: holds no Gaussian")
    largest = torch.stack([v.reshape(count, -1).abs().amax(1) if v[0].numel() else torch.zeros(count) for v in values])
    fine = torch.isfinite(largest).all(0)
    if not fine.all():
        message = f"{path}: {count - int(fine.sum())} of its {count} Gaussians are not finite"
        if not fine.any():
            raise SceneError(message)
        warnings.warn(one_line(f"{message}: they are left out"), stacklevel=3)
        values, largest = [v[fine] for v in values], largest[:, fine]
    widest = values[1].amax(1)
    for name, most, figures in (*zip(ATTRIBUTES, LARGEST, largest, strict=True), ("log_scales", WIDEST, widest)):
        if (figures > most).any():
            raise SceneError(f"{path}: {int((figures > most).sum())} of its {count} Gaussians are too large: {name} of "
                             f"up to {figures.max():.3g}, {most:.3g} can be drawn")
    return values


def in_parsed(path, values, origin):
    """Move Gaussians from nerfstudio's normalised coordinates to those of the capture, relative to `origin`.

    path: the dataparser_transforms.json, which maps x to scale * (transform @ (x, 1)). Raises SceneError.
    """
    try:
        file = read_json(path)
    except ValueError as e:
        raise SceneError(e) from e
    scale, rows = file.get("scale"), file.get("transform")
    if not (is_affine(rows) and is_number(scale, 1e-9, 1e9)):
        raise SceneError(f"{path}: needs a transform, 3 x 4 numbers, and a positive scale")
    rows = torch.tensor(rows, dtype=torch.float64)[:3]
    back = rows[:, :3].T
    if (back @ rows[:, :3] - torch.eye(3, dtype=torch.float64)).abs().max() > 1e-3 or torch.linalg.det(back) < 0:
        raise SceneError(f"{path}: its transform is not a rotation and a shift")
    means, log_scales, quaternions, opacities, sh_dc, sh_rest = values
    means = (means.double() / scale - rows[:, 3]) @ rows[:, :3] - torch.tensor(origin, dtype=torch.float64)
    w, x, y, z = quaternions.double().T
    a, b, c, d = _quaternion(back)
    turned = torch.stack((a * w - b * x - c * y - d * z, a * x + b * w + c * z - d * y,
                          a * y - b * z + c * w + d * x, a * z + b * y - c * x + d * w), 1)
    if sh_rest.shape[1]:  # the harmonics of a turned direction are a product of a matrix and those of the direction
        way = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        way = way / way.norm(dim=0)
        before, after = (spherical_harmonics(d)[1:sh_rest.shape[1] + 1] for d in (way, back.T @ way))
        sh_rest = torch.einsum("kj,nkc->njc", torch.linalg.lstsq(before.T, after.T).solution.T.float(), sh_rest)
    return [means.float(), log_scales - math.log(scale), turned.float(), opacities, sh_dc, sh_rest]


def _quaternion(rotation):
    """wxyz, four floats, of a rotation [3,3]: the eigenvector of its largest eigenvalue (Bar-Itzhack 2000)."""
    (a, b, c), (d, e, f), (g, h, i) = rotation.tolist()
    form = torch.tensor([[a + e + i, h - f, c - g, d - b], [h - f, a - e - i, b + d, c + g],
                         [c - g, b + d, e - a - i, f + h], [d - b, c + g, f + h, i - a - e]], dtype=torch.float64)
    return torch.linalg.eigh(form).eigenvectors[:, -1].tolist()


def up_of(path, comments):
    """The upward axis of a file of Gaussians, as "z": by its header, else that of most COLMAP captures."""
    said = [text.split(":")[1].lower() for text in comments if text.lower().startswith("vertical axis:")]
    words = said[0].split() if said else []
    if words in (["x"], ["y"], ["z"]):  # written by nerfstudio
        return words[0]
    try:
        axis = np.array([float(word) for word in words])  # written by Brush
    except ValueError:
        axis = np.zeros(0)
    if len(axis) == 3 and np.isfinite(axis).all() and axis.any():
        most = np.abs(axis).argmax()
        return "-" * bool(axis[most] < 0) + "xyz"[most]
    warnings.warn(one_line(f"{path}: does not say which axis is up: assuming -y, as in captures by COLMAP; --up z "
                           "changes it, and --scene DIR adds the cameras of its photographs"), stacklevel=3)
    return "-y"


def origin_of(path, comments):
    """The origin of the positions, [3] float64, as written by Splats.save, else zero; raises SceneError."""
    words = next((text.split()[1:] for text in comments if text.split()[:1] == ["origin"]), None)
    try:
        origin = torch.tensor([float(word) for word in words or "000"], dtype=torch.float64)
    except ValueError:
        origin = torch.zeros(0)
    if len(origin) != 3 or not (origin.abs() <= FARTHEST).all():
        raise SceneError(f"{path}: the origin in its header is invalid")
    return origin


def _ply_names(rest):
    """Property names of means, log_scales, quaternions, opacities, sh_dc and sh_rest; rest: number of the last."""
    return (("x", "y", "z"), ("scale_0", "scale_1", "scale_2"), ("rot_0", "rot_1", "rot_2", "rot_3"), ("opacity",),
            ("f_dc_0", "f_dc_1", "f_dc_2"), tuple(f"f_rest_{i}" for i in range(rest)))


def _ply_bytes(means, log_scales, quaternions, opacities, sh_dc, sh_rest, origin, comments):
    # in the order of the paper's code, which some viewers rely on; its sh_rest are channel-major
    rest = sh_rest.transpose(1, 2).flatten(1)
    xyz, scale, rot, opacity, dc, others = _ply_names(rest.shape[1])
    names = (*xyz, "nx", "ny", "nz", *dc, *others, *opacity, *scale, *rot)
    table = torch.cat((means, torch.zeros_like(means), sh_dc, rest, opacities[:, None], log_scales, quaternions), 1)
    comments = [*comments, *([f"origin {' '.join(map(repr, origin))}"] if any(origin) else [])]
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {text}" for text in comments),
              f"element vertex {len(means)}", *(f"property float {name}" for name in names), "end_header", ""]
    return "\n".join(header).encode("ascii", "replace") + table.numpy().astype("<f4").tobytes()


def _read_ply(path, data):
    table, comments = read_vertices(path, data)
    if "scale_1" in table and "scale_2" not in table:  # a 2D Gaussian (Huang et al., arXiv 2403.17888) is a flat one
        table["scale_2"] = np.full(len(table["scale_1"]), -np.inf)
    rest = sum(name.startswith("f_rest_") for name in table)
    names = _ply_names(rest)
    missing = [name for group in names for name in group if name not in table]
    if missing:
        raise SceneError(f"{path}: not a .ply of Gaussians: it has no {', '.join(missing)}")
    if rest not in (0, 9, 24, 45):
        raise SceneError(f"{path}: {rest} f_rest do not make harmonics of degree 0 to 3")
    count = len(table["x"])
    columns = [np.array([table[name] for name in group], np.float64).reshape(len(group), count) for group in names]
    mean, scale, rot, opacity, dc, others = (torch.from_numpy(c).T for c in columns)
    opacity = opacity[:, 0]
    if "filter_3D" in table:
        scale, opacity = _filtered(scale, opacity, torch.from_numpy(table["filter_3D"].astype(np.float64)))
    return (mean, scale, rot, opacity, dc, others.reshape(count, 3, rest // 3).transpose(1, 2)), comments


def _filtered(log_scales, opacities, width):
    """Fuse Mip-Splatting's 3D smoothing filter (Yu et al., arXiv 2311.16493, eq. 8) of deviations [N] in log scales
    [N,3] and opacities [N], logits."""
    wider = torch.logaddexp(2 * log_scales, 2 * width.abs().log()[:, None]) / 2
    alpha = opacities.sigmoid() * (log_scales - wider).sum(1).exp()
    return wider, torch.where(width == 0, opacities, alpha.clamp(max=1 - 1e-9).logit())


SPLAT = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])


def _splat_bytes(means, log_scales, quaternions, opacities, sh_dc, sh_rest, origin, comments):
    alpha = opacities.sigmoid()
    # the most important first: viewers draw a file while it loads
    order = (log_scales.sum(1).exp() * alpha).argsort(descending=True, stable=True)
    table = np.empty(len(means), SPLAT)
    table["mean"], table["scale"] = means[order], log_scales[order].exp()
    rgba = torch.cat((0.5 + SH_DC * sh_dc, alpha[:, None]), 1)
    table["rgba"] = (rgba[order] * 255).round().clamp(0, 255)
    rotation = quaternions / quaternions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    table["rotation"] = (rotation[order] * 128 + 128).round().clamp(0, 255)
    return table.tobytes()


def _read_splat(path, data):
    check_pointer(path, data)
    if len(data) % SPLAT.itemsize:
        raise SceneError(f"{path}: is truncated: {len(data)} bytes are not a multiple of {SPLAT.itemsize}")
    table = np.frombuffer(data, SPLAT)
    mean, scale, rgba, rotation = (torch.from_numpy(table[name].astype(np.float32)) for name in SPLAT.names)
    alpha = (rgba[:, 3] / 255).clamp(1e-3, 1 - 1e-3)  # 0 and 255 are rounded values
    return (mean, scale.clamp_min(1e-12).log(), (rotation - 128) / 128, alpha.logit(),
            (rgba[:, :3] / 255 - 0.5) / SH_DC, torch.zeros(len(mean), 0, 3)), []


FILES = {".ply": (_read_ply, _ply_bytes), ".splat": (_read_splat, _splat_bytes)}
FOREIGN = {".spz": "Niantic's", ".ksplat": "GaussianSplats3D's", ".sog": "PlayCanvas's", ".sogs": "PlayCanvas's",
           ".rad": "Spark's", ".gltf": "Khronos's", ".glb": "Khronos's"}  # formats of Gaussians that are not read
CONVERT = "convert it to a plain .ply, for example with splat-transform (npm install -g @playcanvas/splat-transform)"


def suffix_of(path):
    """The ending of the name of a file of Gaussians, in lower case; raises SceneError for others."""
    suffix = path.suffix.lower()
    if suffix in FOREIGN:
        raise SceneError(f"{path}: {FOREIGN[suffix]} format {suffix} is not supported: {CONVERT}")
    if suffix not in FILES:
        raise SceneError(f"{path}: the name of a file of Gaussians must end in .ply or .splat")
    return suffix
