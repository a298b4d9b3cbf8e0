"""Damaged scenes, COLMAP models, files of Gaussians, pictures, checkpoints, settings: read, or refused in one line.

A case is a dict of sound files, one of which is damaged: values in it are replaced by senseless ones of the right kind,
or its bytes are corrupted. A case fails if it raises any other error, if the message has two lines or lacks the file's
name, if a result is not finite, or if it takes more than SECONDS or MEGABYTES.
"""
import copy
import io
import json
import math
import random
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.edits import read_row
from bench.measure import memory_status
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

SECONDS, MEGABYTES = 5, 1000
COUNTS = {"scenes": 500, "colmap": 300, "ply": 300, "pictures": 300, "settings": 200}
GONE = object()  # removes the value
EVIL = (None, True, False, "", "x", "12", "/", "..", "a\nb", "y" * 5000, "\0", [], {}, [1], math.nan, math.inf,
        -math.inf, -1, 0, 1, 2, 0.5, -0.5, 1e-308, 1e-9, 1e3, 1e6, 1e10, -1e10, 1e30, -1e30, 1e38, 1e308, -1e308,
        10 ** 400, 2 ** 63, 180, 179.999, 360, 3.2, math.pi, 800.0)


def scenes(args):
    """Run args.share of all cases, print how they ended, and return how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, number in COUNTS.items():
            number = math.ceil(number * args.share)
            ends, slowest, largest = {"read": 0, "refused": 0}, 0, 0
            for case in range(number):
                end, seconds, memory = run_case(kind, case, args.seed, Path(folder))
                ends[end] = ends.get(end, 0) + 1
                slowest, largest = max(slowest, seconds), max(largest, memory)
                if end not in ("read", "refused"):
                    print(f"{kind} {case} (seed {args.seed}): {end}", flush=True)
            wrong = number - ends["read"] - ends["refused"]
            failed += wrong
            print(f"{kind:9} {number:4} cases: {ends['read']} read, {ends['refused']} refused, {wrong} failed; slowest "
                  f"{slowest:.1f} s, bar {SECONDS}; most memory {largest:.0f} MB more, bar {MEGABYTES}", flush=True)
    return failed


def run_case(kind, case, seed, folder):
    """How a case ended ("read", "refused", or the fault), its seconds, and the growth of memory in MB."""
    rng, place = random.Random(f"{kind} {case} {seed}"), Path(folder) / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    files, call = CASES[kind](rng, place)
    spoil(rng, files, place)

    def stop(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(4 * SECONDS)
    try:  # Linux alone can reset the peak of memory
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    memory, started = memory_status("VmRSS"), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = ending(call, place)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    seconds, memory = time.process_time() - started, memory_status("VmHWM") - memory
    if end in ("read", "refused") and seconds > SECONDS:
        end = f"{end} in {seconds:.1f} s"
    if end in ("read", "refused") and memory > MEGABYTES:
        end = f"{end} with {memory:.0f} MB"
    return end, seconds, memory


def ending(call, place):
    """How a call ended; a tensor that it returns must be finite."""
    try:
        result = call()
        finite = not isinstance(result, torch.Tensor) or torch.isfinite(result).all()
        return "read" if finite else "a result that is not finite"
    except TimeoutError:
        return "it hangs"
    except (ValueError, OSError) as e:
        poor = "\n" in str(e) or str(place) not in str(e) or type(e) in (ValueError, OSError) and ": " not in str(e)
        return f"a poor message: {type(e).__name__}: {e}" if poor else "refused"
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]} at {traceback.extract_tb(e.__traceback__)[-1]}"


# ---- the mutator --------------------------------------------------------------------------------------

def any_value(key, old):
    """Replacements for a value of a JSON file: lists of choices; a list is drawn first, then a choice from it."""
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    return [(GONE, *EVIL)] + ([[old * factor for factor in (-1, 1e-4, 0.1, 0.9, 1.1, 30, 1e5)]] if number else [])


def as_bytes(value):
    """A value as JSON; bytes as they are."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


class File(NamedTuple):
    """A sound file: bytes, or a value of nested lists and dicts and how it is encoded.

    evil: a function like any_value; weight: relative probability that this file is the damaged one; damage: probability
    that its bytes are damaged instead of its values.
    """
    value: object
    encode: Callable = as_bytes
    evil: Callable = any_value
    weight: float = 1
    damage: float = 0.1


def spoil(rng, files, place):
    """Write files {path relative to `place`: File}, one of them damaged."""
    spoiled = rng.choices(list(files), [file.weight for file in files.values()])[0]
    for name, file in files.items():
        bytewise = isinstance(file.value, bytes) or rng.random() < file.damage
        data = file.encode(mutated(rng, file.value, file.evil) if name == spoiled and not bytewise else file.value)
        data = damaged(rng, data) if name == spoiled and bytewise else data
        if data is not None:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)


def mutated(rng, value, evil):
    """A copy with one or two values replaced or removed. The walk descends level by level, so that a key next to a long
    list is hit as often as the whole list."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        inner, at, key = [value], 0, None
        while isinstance(inner[at], (list, dict)) and inner[at] and (key is None or rng.random() < 0.9):
            inner = inner[at]
            at = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            key = at if isinstance(at, str) else key or ""
        new = rng.choice(rng.choice(evil(key, inner[at])))
        if new is not GONE:
            inner[at] = new
        elif key is not None:
            del inner[at]
    return value


def damaged(rng, data):
    """Bytes truncated, partly overwritten, doubled or replaced; None: no file."""
    kind, data = rng.random(), bytearray(data or b" ")
    if kind < 0.05:
        return rng.choice((None, b"", b"\xff" * 64, bytes(data) * 2))
    if kind < 0.4:
        return bytes(data[:rng.randrange(len(data))])
    for _ in range(rng.randrange(1, 12)):
        data[rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(data)


def rows_of(value):
    """A value as a list of lists, whatever it was replaced by."""
    return [row if isinstance(row, list) else [row] for row in value] if isinstance(value, list) else []


def as_text(rows, end="\n"):
    return "".join(" ".join(map(str, row)) + end for row in rows_of(rows)).encode(errors="surrogatepass")


def packed(form, row, order="<"):
    """Numbers packed by struct, with all bits set where one does not fit; "s": a zero-terminated name."""
    data = b""
    for kind, value in zip(form, row, strict=False):
        try:
            data += f"{value}\0".encode() if kind == "s" else struct.pack(order + kind, value)
        except (struct.error, OverflowError):
            data += b"\xff" * struct.calcsize(order + kind)
    return data


# ---- scenes -------------------------------------------------------------------------------------------

def png(picture):
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    return whole.getvalue()


def ball_scene(alpha=True, views=5, size=16, **keys):
    """A ball seen from `views` sides: {path: File} of its pictures and its transforms.json."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    files, frames = {}, []
    for i in range(views):
        pixels, a = np.zeros((size, size, 4), np.uint8), 2 * math.pi * i / views
        pixels[..., i % 3], pixels[..., 3] = 200, (x ** 2 + y ** 2 < (size / 4) ** 2) * 255 if alpha else 255
        files[f"{i}.png"] = File(png(Image.fromarray(pixels).convert("RGBA" if alpha else "RGB")), weight=1 / views)
        frames.append({"file_path": f"{i}.png", "transform_matrix": [
            [math.cos(a), 0, math.sin(a), 4 * math.sin(a)], [0, 1, 0, 0],
            [-math.sin(a), 0, math.cos(a), 4 * math.cos(a)], [0, 0, 0, 1]]})
    return files | {"transforms.json": File({"camera_angle_x": 0.9, "w": size, "h": size, "frames": frames} | keys,
                                            weight=6)}


def write_scene(folder, **options):
    """Write a sound ball_scene."""
    for name, file in ball_scene(**options).items():
        (folder / name).write_bytes(as_bytes(file.value))


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
        files["mask.png"] = File(png(Image.linear_gradient("L").resize(rng.choice(((16, 16), (8, 8), (16, 5))))))
    if rng.random() < 0.1:  # a picture that differs from the others
        size = rng.choice(((1, 1), (16, 2000), (9000, 9000), (1, 60000), (3000, 3000), (16, 15)))
        files["0.png"] = File(png(Image.new(rng.choice(("L", "RGB", "RGBA", "P", "1", "I;16")), size)))
    return files, fitting(rng, place)


def cloud_of(rng):
    return [[rng.gauss(0, 0.5) for _ in "xyz"] for _ in range(rng.choice((0, 9, 150)))]


def fitting(rng, folder):
    """A call that reads the scene in a folder, fits it for a step or two, and renders it."""
    nerf = rng.random() < 0.5

    def call():
        scene = load_scene(folder)
        return looked_at(NeRF.fit(scene, steps=2, progress=False, levels=2, table=2 ** 10, width=8) if nerf else
                         Splats.fit(scene, steps=1, progress=False, count=40, limit=60, degree=1))
    return call


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
            lambda key, old: [EVIL if text else numbers, (GONE,)], 3, 0.3)
    return files, fitting(rng, place)


# ---- files of Gaussians -------------------------------------------------------------------------------

LINES = ("element vertex 0", "element vertex -3", "element face 2", "property list uchar int x", "property float x",
         "property double opacity", "property", "element", "", "é", "format ascii 1.0", "format binary_big_endian 1.0",
         "comment " + "z" * 5000, *(f"element vertex {10 ** digits}" for digits in (1, 2, 5, 9, 15, 29)))


def ply_case(rng, place):
    write_scene(place)
    scene, name = load_scene(place), rng.choice(("a.ply", "a.ply", "a.ply", "a.splat"))
    Splats.start(scene, 20, rng.choice((0, 1, 3)), torch.Generator().manual_seed(0)).save(place / name)
    data = (place / name).read_bytes()
    if name == "a.splat":
        return {name: File(data)}, lambda: looked_at(Splats.load(place / name, scene))
    head, body = data.split(b"end_header\n")
    form, order = rng.choice((("binary_little_endian", "<"), ("binary_big_endian", ">"), ("ascii", "")))
    head, end = head.decode().replace("binary_little_endian", form).splitlines(), rng.choice(("\n", "\r\n"))
    table = np.frombuffer(body, "<f4").reshape(20, -1).tolist()

    def encode(value):
        rows = rows_of(value.get("table"))
        body = b"".join(packed("f" * len(row), row, order) for row in rows) if order else as_text(rows)
        return as_text([*rows_of(value.get("head")), ["end_header"]], end) + body

    def evil(key, old):
        floats = [x for x in EVIL if isinstance(x, float)] + [20.0, 39.0, 89.0, 4e8]
        return [(*LINES, *head, str(old)[::-1], GONE)] if key == "head" else [floats]
    return {name: File({"head": head, "table": table}, encode, evil, damage=0.3)}, lambda: looked_at(
        Splats.load(place / name, scene))


# ---- pictures -----------------------------------------------------------------------------------------

FORMATS = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("L", "P", "RGB"),
           "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"), "WEBP": ("RGB", "RGBA"),
           "BMP": ("1", "L", "P", "RGB", "RGBA"), "PPM": ("1", "L", "RGB", "I", "F"), "ICO": ("RGBA", "RGB"),
           "TGA": ("L", "RGB", "RGBA"), "PCX": ("L", "RGB", "P"), "SGI": ("L", "RGB", "RGBA"),
           "IM": ("L", "RGB", "F", "I;16"), "DDS": ("RGB", "RGBA"), "ICNS": ("RGBA",), "JPEG2000": ("L", "RGB", "RGBA"),
           "AVIF": ("RGB", "RGBA"), "SPIDER": ("F",), "MSP": ("1",), "XBM": ("1",), "QOI": ("RGB", "RGBA")}
SIDES = (0, 1, 16, 30000, 2 ** 20, 2 ** 31 - 1)


def picture_case(rng, place):
    kind, file = rng.choice(sorted(FORMATS)), place / "picture.png"
    mode, size = rng.choice(FORMATS[kind]), rng.choice(((16, 12), (64, 64), (1, 40), (16, 16)))
    values = np.random.default_rng(rng.randrange(99)).integers(0, 255, (size[1], size[0], 4)).astype(np.uint8)
    if mode in ("F", "I", "I;16"):
        grey = values[..., 0].astype({"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode])
        if mode == "F" and rng.random() < 0.5:
            grey.flat[rng.randrange(grey.size)] = rng.choice((math.nan, math.inf, -5, 1e30))
        picture = Image.fromarray(grey)
    else:
        picture = Image.fromarray(values).convert("RGBA" if mode != "CMYK" and "A" in mode else "RGB").convert(mode)
    whole = io.BytesIO()
    try:
        picture.save(whole, kind)
        data = whole.getvalue()
    except (OSError, ValueError, KeyError):  # this Pillow cannot write the format, or not in this mode
        data = b"P6 3 3 255\n" + bytes(27)

    def sized(sides):
        head = data[12:16] + struct.pack(">II", *(sides.get(side, 0) for side in "wh")) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    sides = File({"w": size[0], "h": size[1]}, sized, lambda key, old: [SIDES], damage=0)

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
    args = SimpleNamespace(seed=0, resume=resume, every=2, smooth=0, rates="settle", batch=1)
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
        whole = io.BytesIO()
        torch.save(value, whole)
        return whole.getvalue()
    if rng.random() < 0.1:
        return File(encode(rng.choice((list(state), [], 3, torch.zeros(3), None, {}))), bytes)
    return File(state, encode, tensors, damage=0.2)


def edit_case(rng, place):
    edited(place, False)
    return {"checkpoint.pt": checkpoint(rng, place / "checkpoint.pt")}, lambda: edited(place, True)


def fit_case(kind):
    sizes = dict(count=40, limit=60, degree=1) if kind is Splats else dict(levels=2, table=2 ** 10, width=8)

    def case(rng, place):
        write_scene(place)
        scene, path = load_scene(place), place / "fit.pt"

        def fit(steps):
            return kind.fit(scene, steps=steps, checkpoint=path, progress=False, **sizes)
        fit(2)
        return {path.name: checkpoint(rng, path)}, lambda: looked_at(fit(4))
    return case


def trained_case(rng, place):
    write_scene(place)
    scene, path = load_scene(place), place / "a.safetensors"
    NeRF.fit(scene, steps=2, progress=False, levels=2, table=2 ** 10, width=8).save(path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8:8 + length])
    value = {"nerf": json.loads(head["__metadata__"]["nerf"])}

    def encode(value):
        text = json.dumps(head | {"__metadata__": {"nerf": json.dumps(value.get("nerf"))}}).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length:]

    def sizes(key, old):
        return [(0, -1, 7, 99999999999, None, 1e9, True, GONE)]
    return {path.name: File(value, encode, sizes, damage=0.5)}, lambda: looked_at(NeRF.load(path, scene))


def model_case(rng, place):
    shutil.copytree(Path(__file__).parent.parent / "models" / "emoji", place / "model", ignore=shutil.ignore_patterns(
        "*.png", "instruct*", "train.py"))
    parts = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
             "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")

    def small(key, old):
        return [(GONE, *EVIL[:24])]  # sizes of a billion would test the libraries

    def call():
        prior = Prior.from_pretrained(place / "model")
        return prior.eps(torch.zeros(1, 4, 8, 8), torch.tensor([500]), prior.embed("red apple"))
    return {f"model/{part}": File(read_json(place / "model" / part), as_bytes, small, damage=0) for part in parts}, call


def settings_case(value, read):
    return lambda rng, place: ({"a.json": File(value, damage=0.3)}, lambda: read(place / "a.json") and None)


SETTINGS = (edit_case, fit_case(NeRF), fit_case(Splats), trained_case, model_case,
            settings_case({"guidance": {"pds": 3.0}, "steps": 5, "image": {"latent": 0.1, "steps": 3}}, read_defaults),
            settings_case({key: 1.0 for key in ("s", "MB", "before", "log-odds", "PSNR", "SSIM")}, read_row),
            settings_case({"a": 1}, lambda file: read_captions(file.read_text(errors="replace"))))
CASES = {"scenes": scene_case, "colmap": colmap_case, "ply": ply_case, "pictures": picture_case,
         "settings": lambda rng, place: rng.choice(SETTINGS)(rng, place)}
