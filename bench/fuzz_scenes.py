"""Damaged scenes, COLMAP models, files of Gaussians, pictures, checkpoints, settings: read, or refused in one line.

A case is a dict of sound files, one of which bench/mutate.py damages, and the call that reads them. It fails on any
error but a refusal, on a message of two lines or without the file's name, on a result that is not finite, and on more
than SECONDS or MEGABYTES.
"""
import contextlib
import json
import math
import random
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from bench.ball import ball_scene, contents, write_scene
from bench.edits import read_row
from bench.mutate import EVIL, GONE, MEGABYTES, SECONDS, File, as_bytes, as_text, measured, packed, rows_of, spoil
from edit import edit
from files.checkpoint import read_checkpoint
from files.pictures import read_picture
from files.reading import read_json
from image.picture import Picture
from nerf import NeRF
from pipelines.captions import read_captions
from pipelines.settings import read_defaults
from prior import Prior
from scene.reading import load_scene
from splat import Splats

COUNTS = {"scenes": 500, "colmap": 300, "ply": 300, "pictures": 300, "settings": 200}
SMALL = {NeRF: dict(levels=2, table=2 ** 10, width=8), Splats: dict(count=40, limit=60, degree=1)}  # sizes of a fit


def scenes(args):
    """Run args.share of all cases, print how they ended, and return how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, number in COUNTS.items():
            found = []
            for case in range(math.ceil(number * args.share)):
                found.append(run_case(kind, case, args.seed, Path(folder)))
                if found[-1][0] not in ("read", "refused"):
                    print(f"{kind} {case} (seed {args.seed}): {found[-1][0]}", flush=True)
            ends, seconds, memory = zip(*found, strict=True)
            read, refused = ends.count("read"), ends.count("refused")
            wrong = len(ends) - read - refused
            failed += wrong
            print(f"{kind:9} {len(ends):4} cases: {read} read, {refused} refused, {wrong} failed; slowest "
                  f"{max(seconds):.1f} s, bar {SECONDS}; most memory {max(memory):.0f} MB more, bar {MEGABYTES}",
                  flush=True)
    return failed


def run_case(kind, case, seed, folder):
    """How a case ended, its seconds and megabytes: see bench.mutate.measured."""
    rng, place = random.Random(f"{kind} {case} {seed}"), Path(folder) / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    files, call = CASES[kind](rng, place)
    spoil(rng, files, place)
    return measured(call, place)


# ---- scenes -------------------------------------------------------------------------------------------

def scene_case(rng, place):
    extra = dict(aabb_scale=4, fl_x=16.0, fl_y=16.0, cx=8.0, cy=8.0, k1=0.01, k2=0.0, p1=0.0, camera_angle_y=0.9,
                 x_fov=50.0, applied_transform=[[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])
    files = ball_scene(rng.random() < 0.6, rng.choice((1, 2, 5)), **{
        key: rng.choice(EVIL) if rng.random() < 0.04 else value for key, value in extra.items() if rng.random() < 0.3})
    file = files["transforms.json"].value
    if rng.random() < 0.3:
        file["ply_file_path"], points = "cloud.ply", cloud_of(rng)
        head = ["ply", "format ascii 1.0", f"element vertex {len(points)}", *(f"property float {a}" for a in "xyz")]
        files["cloud.ply"] = File(as_text([*head, "end_header", *points]), weight=3)
    if rng.random() < 0.2:
        file[rng.choice(("train_filenames", "val_filenames", "test_filenames"))] = ["0.png"]
    if rng.random() < 0.3:
        file["frames"][0]["mask_path"] = "mask.png"
        mask = Image.linear_gradient("L").resize(rng.choice(((16, 16), (8, 8), (16, 5))))
        files["mask.png"] = File(contents(mask.save, "PNG"))
    if rng.random() < 0.1:  # a picture that differs from the others
        size = rng.choice(((1, 1), (16, 2000), (9000, 9000), (1, 60000), (3000, 3000), (16, 15)))
        files["0.png"] = File(contents(Image.new(rng.choice(("L", "RGB", "RGBA", "P", "1", "I;16")), size).save, "PNG"))
    return files, fitting(rng, place)


def cloud_of(rng):
    return [[rng.gauss(0, 0.5) for _ in "xyz"] for _ in range(rng.choice((0, 9, 150)))]


def fitting(rng, folder):
    """A call that reads the scene in a folder, fits it for a step or two, and renders it."""
    kind, steps = (NeRF, 2) if rng.random() < 0.5 else (Splats, 1)
    return lambda: looked_at(kind.fit(load_scene(folder), steps=steps, progress=False, **SMALL[kind]))


@torch.no_grad()
def looked_at(representation):
    return representation.render(0, 8)


# ---- models of COLMAP ---------------------------------------------------------------------------------

# for every record: the format of its numbers, and what follows them as text and as bytes
RECORDS = {"cameras": ("IiQQdddd", "", b""),
           "images": ("IdddddddIs", "\n1.5 2.5 -1", packed("Qddq", (1, 1.5, 2.5, -1))),
           "points3D": ("QdddBBBd", "1 2 2 3 3 4", packed("QIIIIII", (3, 1, 2, 2, 3, 3, 4)))}


def colmap_case(rng, place):
    views, text = rng.choice((1, 2, 5)), rng.random() < 0.5
    files = {f"images/{name}": file for name, file in ball_scene(rng.random() < 0.3, views).items() if ".png" in name}
    turns = [math.pi * i / views for i in range(views)]  # half the turn of a camera around the y axis
    rows = {"cameras": [[1, "PINHOLE" if text else 1, 16, 16, 16.0, 16.0, 8.0, 8.0]],
            "images": [[i + 1, 0.0, -math.cos(a), 0.0, math.sin(a), 0.0, 0.0, 4.0, 1, f"{i}.png"]
                       for i, a in enumerate(turns)],
            "points3D": [[i, *point, 200, 90, 30, 0.5] for i, point in enumerate(cloud_of(rng))]}
    numbers = [x for x in (*EVIL, 2 ** 40, 2 ** 64 - 1) if isinstance(x, (int, float))]
    model = rng.choice(("sparse/0", "sparse", "colmap/sparse/0"))
    for part, (form, words, more) in RECORDS.items():
        def encode(value, form=form, words=words, more=more):
            found = rows_of(value.get("rows"))
            if text:
                return as_text([[*row, words] for row in found])
            return packed("Q", [value.get("count")]) + b"".join(packed(form, row) + more for row in found)
        files[f"{model}/{part}.{'txt' if text else 'bin'}"] = File(
            {"rows": rows[part]} | ({} if text else {"count": len(rows[part])}), encode,
            [EVIL if text else numbers, (GONE,)], 3, 0.3)
    return files, fitting(rng, place)


# ---- files of Gaussians -------------------------------------------------------------------------------

LINES = ("element vertex 0", "element vertex -3", "element face 2", "property list uchar int x", "property float x",
         "property double opacity", "property", "element", "", "é", "format ascii 1.0", "format binary_big_endian 1.0",
         "comment " + "z" * 5000, *(f"element vertex {10 ** digits}" for digits in (1, 2, 5, 9, 15, 29)))
FLOATS = [*(x for x in EVIL if isinstance(x, float)), 15.0, 20.0, 39.0, 89.0, 4e8]


def ply_case(rng, place):
    write_scene(place)
    scene, name = load_scene(place), rng.choice(("a.ply", "a.ply", "a.ply", "a.splat"))
    Splats.start(scene, 20, rng.choice((0, 1, 3)), torch.Generator().manual_seed(0)).save(place / name)
    data = (place / name).read_bytes()

    def call():
        return looked_at(Splats.load(place / name, scene))
    if name == "a.splat":
        return {name: File(data)}, call
    head, body = data.split(b"end_header\n")
    form, order = rng.choice((("binary_little_endian", "<"), ("binary_big_endian", ">"), ("ascii", "")))
    head, end = head.decode().replace("binary_little_endian", form).splitlines(), rng.choice(("\n", "\r\n"))
    table = np.frombuffer(body, "<f4").reshape(20, -1).tolist()

    def encode(value):
        rows = rows_of(value.get("table"))
        body = b"".join(packed("f" * len(row), row, order) for row in rows) if order else as_text(rows)
        return as_text([*rows_of(value.get("head")), ["end_header"]], end) + body

    def evil(key, old):
        return [(*LINES, *head, str(old)[::-1], GONE)] if key == "head" else [FLOATS]
    return {name: File({"head": head, "table": table}, encode, evil, damage=0.3)}, call


# ---- pictures -----------------------------------------------------------------------------------------

FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA", "PCX", "SGI", "IM", "DDS", "ICNS",
           "JPEG2000", "AVIF", "SPIDER", "MSP", "XBM", "QOI")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
SIDES = (0, 1, 16, 30000, 2 ** 20, 2 ** 31 - 1)


def drawn(rng, mode, size):
    """A picture of noise in a mode of Pillow."""
    values = np.random.default_rng(rng.randrange(99)).integers(0, 255, (size[1], size[0], 4)).astype(np.uint8)
    if mode not in ("F", "I", "I;16"):
        return Image.fromarray(values).convert("RGBA" if mode in ("LA", "RGBA") else "RGB").convert(mode)
    grey = values[..., 0].astype({"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode])
    if mode == "F" and rng.random() < 0.5:
        grey.flat[rng.randrange(grey.size)] = rng.choice((math.nan, math.inf, -5, 1e30))
    return Image.fromarray(grey)


def picture_case(rng, place):
    kind, size = rng.choice(FORMATS), rng.choice(((16, 12), (64, 64), (1, 40), (16, 16)))
    file, data = place / "picture.png", None
    for mode in rng.sample(MODES, len(MODES)):  # the first one that this Pillow writes in the format
        with contextlib.suppress(OSError, ValueError, KeyError):
            data = data or contents(drawn(rng, mode, size).save, kind)
    data = data or b"P6 3 3 255\n" + bytes(27)

    def sized(sides):
        head = data[12:16] + struct.pack(">II", *(sides.get(side, 0) for side in "wh")) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    sides = File({"w": size[0], "h": size[1]}, sized, [SIDES], damage=0)

    def call():
        found = read_picture(file)
        assert found.mode in ("RGB", "RGBA") and max(found.size) <= 4096, f"{found.mode} and {found.size}"
    return {file.name: sides if kind == "PNG" and rng.random() < 0.3 else File(data)}, call


# ---- checkpoints and settings -------------------------------------------------------------------------

class Stage:
    """A minimal stage of an edit: pixels with random gradients."""
    name, steps, rate, resets_optimiser, checks = "noise", 4, 1, False, {"views": lambda value: value == [None]}

    def __init__(self, scene):
        self.scene, self.state = scene, {"views": [None]}

    def backward(self, step, generators):
        loss = (self.scene.theta - torch.rand(1, 3, 8, 8, generator=generators[0])).square().sum()
        loss.backward()
        return loss.detach()


def edited(out, resume):
    """The pixels of a minimal edit, with its checkpoint in `out`."""
    scene = Picture(torch.full((1, 3, 8, 8), 0.5), SimpleNamespace(device="cpu", decode=None), in_pixels=True)
    args = SimpleNamespace(mode="image", seed=0, resume=resume, every=2, smooth=0, rates="settle", batch=1)
    edit(scene, scene.param_groups(0.1), [Stage(scene)], None, args, out, {"seed": 0})
    return scene.theta.detach()


def tensors(key, old):
    """Replacements for a value of a checkpoint."""
    choices = [(GONE, *EVIL, torch.zeros(3), torch.tensor(math.nan))]
    if isinstance(old, torch.Tensor) and old.is_floating_point():
        choices.append((old * math.nan, old[None], old.double(), old.flatten()[:1], -old - 1))
    elif isinstance(old, int):
        choices.append((-1, -10 ** 6, 10 ** 9, 0))
    return choices


def checkpoint(rng, path):
    """The File of a sound checkpoint, or of one with other contents."""
    state = read_checkpoint(path, {})

    def encode(value):
        return contents(lambda file: torch.save(value, file))
    other = rng.random() < 0.1 and encode(rng.choice((list(state), [], 3, torch.zeros(3), None, {})))
    return File(other, bytes) if other else File(state, encode, tensors, damage=0.2)


def edit_case(rng, place):
    edited(place, False)
    return {"checkpoint.pt": checkpoint(rng, place / "checkpoint.pt")}, lambda: edited(place, True)


def fit_case(rng, place, kind):
    write_scene(place)
    scene, path = load_scene(place), place / "fit.pt"

    def fit(steps):
        return kind.fit(scene, steps=steps, checkpoint=path, progress=False, **SMALL[kind])
    fit(2)
    return {path.name: checkpoint(rng, path)}, lambda: looked_at(fit(4))


def trained_case(rng, place):
    write_scene(place)
    scene, path = load_scene(place), place / "a.safetensors"
    NeRF.fit(scene, steps=2, progress=False, **SMALL[NeRF]).save(path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8:8 + length])
    value = {"nerf": json.loads(head["__metadata__"]["nerf"])}

    def encode(value):
        text = json.dumps(head | {"__metadata__": {"nerf": json.dumps(value.get("nerf"))}}).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length:]
    sizes = [(0, -1, 7, 99999999999, None, 1e9, True, GONE)]
    return {path.name: File(value, encode, sizes, damage=0.5)}, lambda: looked_at(NeRF.load(path, scene))


def model_case(rng, place):
    shutil.copytree(Path(__file__).parent.parent / "models" / "emoji", place / "model", ignore=shutil.ignore_patterns(
        "*.png", "instruct*", "train.py"))
    parts = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
             "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")
    small = [(GONE, *EVIL[:24])]  # sizes of a billion would test the libraries

    def call():
        prior = Prior.from_pretrained(place / "model")
        return prior.eps(torch.zeros(1, 4, 8, 8), torch.tensor([500]), prior.embed("red apple"))
    return {f"model/{part}": File(read_json(place / "model" / part), as_bytes, small, damage=0) for part in parts}, call


def json_case(rng, place, value, read):
    return {"a.json": File(value, damage=0.3)}, lambda: read(place / "a.json") and None


SETTINGS = (  # a function of rng and place, and its further arguments
    (edit_case,), (fit_case, NeRF), (fit_case, Splats), (trained_case,), (model_case,),
    (json_case, {"guidance": {"pds": 3.0}, "steps": 5, "image": {"latent": 0.1, "steps": 3}}, read_defaults),
    (json_case, {key: 1.0 for key in ("s", "MB", "before", "log-odds", "PSNR", "SSIM")}, read_row),
    (json_case, {"a": 1}, lambda file: read_captions(file.read_text(errors="replace"))))


def settings_case(rng, place):
    make, *more = rng.choice(SETTINGS)
    return make(rng, place, *more)


CASES = {"scenes": scene_case, "colmap": colmap_case, "ply": ply_case, "pictures": picture_case,
         "settings": settings_case}
