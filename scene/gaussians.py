"""Files of 3D Gaussians: .ply of 3DGS and .splat, read and written.

    read, write = FILES[suffix_of(path)]
    (means, log_scales, quaternions, opacities, sh_dc, sh_rest), comments = read(path, path.read_bytes())
    data = write(means, log_scales, quaternions, opacities, sh_dc, sh_rest, origin)

Shapes are those of splat.Splats: [N,3], [N,3], [N,4] as wxyz, [N] as logits, [N,3], [N,K,3].
"""
import warnings

import numpy as np
import torch

from files.messages import one_line
from scene.captures import FARTHEST, SceneError
from scene.ply import read_vertices
from scene.representation import SH_DC


def up_of(path, comments):
    """The upward axis of a file of Gaussians, as "z": by its header, else that of most COLMAP captures."""
    said = [text.split(":")[1].strip().lower() for text in comments if text.lower().startswith("vertical axis:")]
    if said and said[0] in ("x", "y", "z"):  # written by nerfstudio
        return said[0]
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


def _ply_bytes(means, log_scales, quaternions, opacities, sh_dc, sh_rest, origin):
    # in the order of the paper's code, which some viewers rely on; its sh_rest are channel-major
    rest = sh_rest.transpose(1, 2).flatten(1)
    xyz, scale, rot, opacity, dc, others = _ply_names(rest.shape[1])
    names = (*xyz, "nx", "ny", "nz", *dc, *others, *opacity, *scale, *rot)
    table = torch.cat((means, torch.zeros_like(means), sh_dc, rest, opacities[:, None], log_scales, quaternions), 1)
    comment = [f"comment origin {' '.join(map(repr, origin))}"] if any(origin) else []
    header = ["ply", "format binary_little_endian 1.0", *comment, f"element vertex {len(means)}",
              *(f"property float {name}" for name in names), "end_header", ""]
    return "\n".join(header).encode() + table.numpy().astype("<f4").tobytes()


def _read_ply(path, data):
    table, comments = read_vertices(path, data)
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
    return (mean, scale, rot, opacity[:, 0], dc, others.reshape(count, 3, rest // 3).transpose(1, 2)), comments


SPLAT = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])


def _splat_bytes(means, log_scales, quaternions, opacities, sh_dc, sh_rest, origin):
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
    if len(data) % SPLAT.itemsize:
        raise SceneError(f"{path}: is truncated: {len(data)} bytes are not a multiple of {SPLAT.itemsize}")
    table = np.frombuffer(data, SPLAT)
    mean, scale, rgba, rotation = (torch.from_numpy(table[name].astype(np.float32)) for name in SPLAT.names)
    alpha = (rgba[:, 3] / 255).clamp(1e-3, 1 - 1e-3)  # 0 and 255 are rounded values
    return (mean, scale.clamp_min(1e-12).log(), (rotation - 128) / 128, alpha.logit(),
            (rgba[:, :3] / 255 - 0.5) / SH_DC, torch.zeros(len(mean), 0, 3)), []


FILES = {".ply": (_read_ply, _ply_bytes), ".splat": (_read_splat, _splat_bytes)}


def suffix_of(path):
    """The ending of the name of a file of Gaussians, in lower case; raises SceneError for others."""
    if path.suffix.lower() not in FILES:
        raise SceneError(f"{path}: the name of a file of Gaussians must end in .ply or .splat")
    return path.suffix.lower()
