"""Damaged scenes, COLMAP's models, files of Gaussians, pictures, checkpoints, settings: read, or refused in one line.

Structure-aware and seeded: a sound input is made, and one or two of its parts are replaced by values that fit there and
mean nothing. A case fails where an error of any other kind comes out, a message of two lines or without the file's name,
a result that is not finite, more than SECONDS or more than MEGABYTES.
"""
import copy
import io
import json
import math
import random
import re
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, features

from bench.edits import read_row
from bench.measure import memory_status
from edit import edit
from files.checkpoint import read_checkpoint
from files.pictures import read_picture
from files.reading import read_json
from nerf import NeRF
from pipelines.captions import read_captions
from pipelines.settings import read_defaults
from prior import Prior
from scene.reading import load_scene
from splat import Splats

SECONDS, MEGABYTES = 5, 1000
COUNTS = {"scenes": 500, "colmap": 300, "ply": 300, "pictures": 300, "settings": 200}
EVIL = (None, True, False, "", "x", "12", "/", "..", "a\nb", "y" * 5000, "\0", [], {}, [1], math.nan, math.inf, -math.inf, -1,
        0, 1, 2, 0.5, -0.5, 1e-308, 1e-9, 1e3, 1e6, 1e10, -1e10, 1e30, -1e30, 1e38, 1e308, -1e308, 10 ** 400, 2 ** 63, 180,
        179.999, 360, 3.2, math.pi, 800.0)


def scenes(args):
    """Run all cases, print how they ended, and return how many failed."""
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
    """How a case ended ("read", "refused", or what went wrong), its seconds, and the MB that it needed more."""
    rng, place = random.Random(f"{kind} {case} {seed}"), Path(folder) / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    call = MAKE[kind](rng, place)

    def stop(*_):
        raise TimeoutError("it hangs")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(4 * SECONDS)
    restart_peak()
    memory, started, end = memory_status("VmRSS"), time.process_time(), "read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except TimeoutError:
        end = "it hangs"
    except (ValueError, OSError) as e:
        end = "refused"
        if "\n" in str(e) or str(place) not in str(e) or type(e) in (ValueError, OSError) and ": " not in str(e):
            end = f"a poor message: {type(e).__name__}: {e}"
    except FloatingPointError as e:
        end = f"a result that is not finite: {e}"
    except Exception as e:
        end = f"{type(e).__name__}: {str(e)[:200]} at {traceback.extract_tb(e.__traceback__)[-1]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    seconds, memory = time.process_time() - started, memory_status("VmHWM") - memory
    if end in ("read", "refused") and seconds > SECONDS:
        end = f"{end} in {seconds:.1f} s"
    if end in ("read", "refused") and memory > MEGABYTES:
        end = f"{end} with {memory:.0f} MB"
    return end, seconds, memory


def restart_peak():
    """Reset the peak of memory, where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


# ---- scenes -------------------------------------------------------------------------------------------

def write_scene(folder, alpha=True, views=5, size=16, **keys):
    """A ball seen from `views` sides."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    inside = x ** 2 + y ** 2 < (size / 4) ** 2
    frames = []
    for i in range(views):
        pixels = np.zeros((size, size, 4), np.uint8)
        pixels[..., i % 3], pixels[..., 3] = 200, inside * 255 if alpha else 255
        picture = Image.fromarray(pixels)
        (picture if alpha else picture.convert("RGB")).save(folder / f"{i}.png")
        a = 2 * math.pi * i / views
        pose = [[math.cos(a), 0, math.sin(a), 4 * math.sin(a)], [0, 1, 0, 0], [-math.sin(a), 0, math.cos(a), 4 * math.cos(a)],
                [0, 0, 0, 1]]
        frames.append({"file_path": f"{i}.png", "transform_matrix": pose})
    file = {"camera_angle_x": 0.9, "w": size, "h": size, "frames": frames} | keys
    (folder / "transforms.json").write_text(json.dumps(file))
    return file


def places(value, path=()):
    """Paths to all values inside of nested lists and dicts."""
    found = [path] if path else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


def put(value, path, new):
    """Put `new` at a path, and take it out where new is `put`."""
    for key in path[:-1]:
        value = value[key]
    if new is put:
        del value[path[-1]]
    else:
        value[path[-1]] = new


def broken(rng, value):
    """A copy with one or two values replaced or left out."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        there = places(value)
        kind = rng.random()  # a matrix has most of the values, and most of what is put there is no rotation
        few = [path for path in there if kind < 0.5 and len(path) < 4 or 0.5 <= kind < 0.8 and len(path) == 5 and path[4] == 3]
        there = few or there
        if there:
            path, old = rng.choice(there), value
            for key in path:
                old = old[key]
            number = isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.5
            put(value, path, old * rng.choice((-1, 1e-4, 0.1, 0.9, 1.1, 30, 1e5)) if number else rng.choice((put, *EVIL)))
    return value


def damaged(rng, data):
    """Bytes that are cut short, or have a few others in their place."""
    data = bytearray(data or b" ")
    if rng.random() < 0.4:
        return bytes(data[:rng.randrange(len(data))])
    for _ in range(rng.randrange(1, 12)):
        data[rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(data)


def make_scene(rng, place):
    folder = place / "scene"
    folder.mkdir()
    extra = dict(aabb_scale=4, fl_x=16.0, fl_y=16.0, cx=8.0, cy=8.0, k1=0.01, k2=0.0, p1=0.0, camera_angle_y=0.9, x_fov=50.0)
    file = write_scene(folder, rng.random() < 0.6, rng.choice((1, 2, 5)), **{
        key: value for key, value in extra.items() if rng.random() < 0.3})
    if rng.random() < 0.3:
        file["ply_file_path"], points = "cloud.ply", cloud_of(rng)
        head = ["ply", "format ascii 1.0", f"element vertex {len(points)}", *(f"property float {axis}" for axis in "xyz")]
        cloud = "\n".join([*head, "end_header", *(" ".join(map(str, point)) for point in points), ""]).encode()
        (folder / "cloud.ply").write_bytes(damaged(rng, cloud) if rng.random() < 0.5 else cloud)
    if rng.random() < 0.2:
        file["applied_transform"] = [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]
    if rng.random() < 0.2:
        file[rng.choice(("train_filenames", "val_filenames", "test_filenames"))] = ["0.png"]
    if rng.random() < 0.3:
        file["frames"][0]["mask_path"] = "mask.png"
        Image.linear_gradient("L").resize(rng.choice(((16, 16), (8, 8), (16, 5)))).save(folder / "mask.png")
    (folder / "transforms.json").write_text(json.dumps(file))
    kind = rng.random()
    if kind < 0.75:  # several keys of a lens at the same time, too
        file = broken(rng, file | {key: rng.choice(EVIL) for key in extra if rng.random() < 0.05})
        (folder / "transforms.json").write_text(json.dumps(file))
    elif kind < 0.85:
        (folder / "transforms.json").write_bytes(damaged(rng, (folder / "transforms.json").read_bytes()))
    else:
        name = f"{rng.randrange(len(file['frames']))}.png"
        if rng.random() < 0.5:
            size = rng.choice(((1, 1), (16, 2000), (9000, 9000), (1, 60000), (3000, 3000), (16, 15)))
            Image.new(rng.choice(("L", "RGB", "RGBA", "P", "1", "I;16")), size).save(folder / name)
        else:
            (folder / name).write_bytes(damaged(rng, (folder / name).read_bytes()))

    return fitting(rng, folder)


def cloud_of(rng):
    return [[rng.gauss(0, 0.5) for _ in "xyz"] for _ in range(rng.choice((0, 9, 150)))]


def fitting(rng, folder):
    """A call that reads the scene in a folder, fits it for a step or two and looks at it."""
    def call():
        scene = load_scene(folder)
        if rng.random() < 0.5:
            representation = NeRF.fit(scene, steps=2, progress=False, levels=2, table=2 ** 10, width=8)
        else:
            representation = Splats.fit(scene, steps=1, progress=False, count=40, limit=60, degree=1)
        with torch.no_grad():
            if not torch.isfinite(representation.render(0, 8)).all():
                raise FloatingPointError("the render")
    return call


# ---- models of COLMAP ---------------------------------------------------------------------------------

def make_colmap(rng, place):
    folder, views = place / "scene", rng.choice((1, 2, 5))
    (folder / "images").mkdir(parents=True)
    write_scene(folder, rng.random() < 0.3, views)
    (folder / "transforms.json").unlink()
    for picture in folder.glob("*.png"):
        picture.rename(folder / "images" / picture.name)
    turns = [math.pi * i / views for i in range(views)]  # half of them, of cameras around the y axis
    rows = {  # of every record: the format of its numbers, and those
        "cameras": [["IiQQ4d", 1, 1, 16, 16, 16.0, 16.0, 8.0, 8.0]],
        "images": [["I7dIs", i + 1, 0.0, -math.cos(a), 0.0, math.sin(a), 0.0, 0.0, 4.0, 1, f"{i}.png"]
                   for i, a in enumerate(turns)],
        "points3D": [["Q3d3Bd", i, *point, 200, 90, 30, 0.5] for i, point in enumerate(cloud_of(rng))]}
    text, kind = rng.random() < 0.5, rng.random()
    for _ in range(rng.choice((0, 1, 1, 2))):
        part = rng.choice([part for part in ("cameras", "images", "images", "points3D") if rows[part]])
        row = rng.choice(rows[part])
        numbers = [x for x in EVIL if isinstance(x, (int, float)) and not x > 2 ** 64]
        row[rng.randrange(1, len(row))] = rng.choice(EVIL if text else numbers)
    model = folder / rng.choice(("sparse/0", "sparse", "colmap/sparse/0"))
    model.mkdir(parents=True)
    written = {part: text_records(part, found) if text else binary_records(rng, part, found) for part, found in rows.items()}
    if kind < 0.5:
        part = rng.choice(list(written))
        written[part] = damaged(rng, written[part]) if kind < 0.4 else rng.choice((b"", b"\xff" * 64, written[part] * 2))
    for part, data in written.items():
        if rng.random() > 0.02:
            (model / f"{part}.{'txt' if text else 'bin'}").write_bytes(data)
    return fitting(rng, folder)


def text_records(part, rows):
    more = {"cameras": "", "images": "\n1.5 2.5 -1", "points3D": " 1 2 2 3 3 4"}[part]
    model = lambda row: [row[0], "PINHOLE" if row[1] == 1 else row[1], *row[2:]] if part == "cameras" else row
    return "".join(" ".join(map(str, model(row[1:]))) + more + "\n" for row in rows).encode(errors="surrogatepass")


def binary_records(rng, part, rows):
    track = struct.pack("<Q6I", 3, 1, 2, 2, 3, 3, 4)
    more = {"cameras": b"", "images": struct.pack("<Qddq", 1, 1.5, 2.5, -1), "points3D": track}
    count = len(rows) if rng.random() > 0.05 else rng.choice((0, len(rows) + 1, 2 ** 40, 2 ** 64 - 1))
    return struct.pack("<Q", count) + b"".join(record(row) + more[part] for row in rows)


def record(row):
    """Numbers as a format says; what does not fit into their bytes is cut to them, and a name ends with a zero."""
    data, forms = b"", [(form[-1], int(form[:-1] or 1)) for form in re.findall(r"\d*[a-zA-Z]", row[0])]
    for form, value in zip((form for form, count in forms for _ in range(count)), row[1:]):
        if form == "s":
            data += str(value).encode() + b"\0"
        elif form == "d":
            data += struct.pack("<d", value)
        else:
            whole = int(value) if math.isfinite(value) else 2 ** 31
            data += (whole % 256 ** struct.calcsize("<" + form)).to_bytes(struct.calcsize("<" + form), "little")
    return data


# ---- files of Gaussians -------------------------------------------------------------------------------

def make_ply(rng, place):
    ball, file = place / "ball", place / rng.choice(("a.ply", "a.ply", "a.ply", "a.splat"))
    ball.mkdir()
    write_scene(ball)
    scene = load_scene(ball)
    degree = rng.choice((0, 1, 3))
    splats = Splats.start(scene, 20, degree, torch.Generator().manual_seed(0))
    splats.save(file)
    data = file.read_bytes()
    if file.suffix == ".ply":
        head, body = data.split(b"end_header\n")
        table, lines = np.frombuffer(body, "<f4").reshape(20, -1).copy(), head.decode().splitlines()
        if rng.random() < 0.5:
            evil = np.array([x for x in EVIL if isinstance(x, float)] + [20, 39, 89, 4e8])
            for _ in range(rng.randrange(1, 4)):
                with np.errstate(over="ignore"):
                    table[rng.randrange(20), rng.randrange(table.shape[1])] = rng.choice(evil)
        else:
            at = rng.randrange(len(lines))
            words = ("element vertex 0", f"element vertex {10 ** rng.randrange(1, 30)}", "element vertex -3", "element face 2",
                     "property list uchar int x", "property float x", "property double opacity", "property", "element", "", "é",
                     "format ascii 1.0", "format binary_big_endian 1.0", "comment " + "z" * 5000, lines[rng.randrange(len(lines))])
            lines[at] = rng.choice(words) if rng.random() < 0.7 else lines[at][::-1]
        layout, end = rng.choice(("little", "big", "ascii")), rng.choice(("\n", "\r\n"))
        if layout != "little":
            name = "ascii" if layout == "ascii" else "binary_big_endian"
            lines = [line.replace("binary_little_endian", name) for line in lines]
        body = table.astype("<f4" if layout == "little" else ">f4").tobytes()
        if layout == "ascii":
            body = "\n".join(" ".join(map(str, row)) for row in table).encode()
        data = end.join([*lines, "end_header", ""]).encode() + body
    if rng.random() < 0.3:
        data = damaged(rng, data)
    file.write_bytes(data)

    def call():
        loaded = Splats.load(file, scene)
        with torch.no_grad():
            if not torch.isfinite(loaded.render(0, 8)).all():
                raise FloatingPointError("the render")
    return call


# ---- pictures -----------------------------------------------------------------------------------------

FORMATS = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("L", "P", "RGB"),
           "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"), "WEBP": ("RGB", "RGBA"),
           "BMP": ("1", "L", "P", "RGB", "RGBA"), "PPM": ("1", "L", "RGB", "I", "F"), "ICO": ("RGBA", "RGB"),
           "TGA": ("L", "RGB", "RGBA"), "PCX": ("L", "RGB", "P"), "SGI": ("L", "RGB", "RGBA"), "IM": ("L", "RGB", "F", "I;16"),
           "DDS": ("RGB", "RGBA"), "ICNS": ("RGBA",), "JPEG2000": ("L", "RGB", "RGBA"), "AVIF": ("RGB", "RGBA"),
           "SPIDER": ("F",), "MSP": ("1",), "XBM": ("1",), "QOI": ("RGB", "RGBA")}


def make_picture(rng, place):
    kind, file = rng.choice(sorted(FORMATS)), place / "picture.png"
    if kind == "AVIF" and not features.check("avif") or kind == "JPEG2000" and not features.check("jpg_2000"):
        kind = "PNG"
    mode, size = rng.choice(FORMATS[kind]), rng.choice(((16, 12), (64, 64), (1, 40), (16, 16)))
    values = np.random.default_rng(rng.randrange(99)).integers(0, 255, (size[1], size[0], 4)).astype(np.uint8)
    if mode in ("F", "I", "I;16"):
        grey = values[..., 0].astype({"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode])
        if mode == "F" and rng.random() < 0.5:
            grey.flat[rng.randrange(grey.size)] = rng.choice((math.nan, math.inf, -5, 1e30))
        picture = Image.fromarray(grey)
    else:
        picture = Image.fromarray(values).convert("RGB" if mode == "CMYK" else "RGBA" if "A" in mode else "RGB").convert(mode)
    whole = io.BytesIO()
    try:
        picture.save(whole, kind)
        data = whole.getvalue()
    except (OSError, ValueError, KeyError):  # a format that this Pillow does not write in this mode
        data = b"P6 3 3 255\n" + bytes(27)
    if kind == "PNG" and rng.random() < 0.3:  # of any size that it says it has
        sides = [rng.choice((0, 1, 16, 30000, 2 ** 20, 2 ** 31 - 1)) for _ in "wh"]
        data = data[:16] + struct.pack(">II", *sides) + data[24:]
        crc = struct.pack(">I", zlib.crc32(data[12:29]))
        data = data[:29] + crc + data[33:]
    elif rng.random() < 0.9:
        data = damaged(rng, data)
    file.write_bytes(data)

    def call():
        found = read_picture(file)
        if found.mode not in ("RGB", "RGBA") or max(found.size) > 4096:
            raise FloatingPointError(f"a picture of {found.mode} and {found.size}")
    return call


# ---- checkpoints and settings -------------------------------------------------------------------------

class Dot(torch.nn.Module):
    """The smallest thing that can be edited: a colour."""

    def __init__(self):
        super().__init__()
        self.colour = torch.nn.Parameter(torch.full((3,), 0.5))

    def render(self, view=None, size=8):
        return self.colour.clamp(0, 1)[None, :, None, None].expand(1, 3, size, size)

    def project_(self):
        pass


class Stage:
    """The smallest stage of an edit."""
    name, steps, guidance, rate, fresh = "dot", 4, 1.0, 1, False

    def __init__(self, scene):
        self.scene, self.state = scene, {"views": [None]}

    def backward(self, step, generators):
        loss = (self.scene.colour - torch.rand(3, generator=generators[0])).square().sum()
        loss.backward()
        return loss.detach()


def edit_dot(out, resume):
    """An edit of the dot, with its checkpoint in `out`; returns its colour."""
    dot = Dot()
    args = SimpleNamespace(seed=0, resume=resume, every=2, smooth=0, rates="settle", batch=1)
    edit(dot, [{"params": [dot.colour], "lr": 0.1, "name": "colour"}], [Stage(dot)], SimpleNamespace(guidance=1), args, out,
         {"seed": 0})
    return dot.colour.detach()


def broken_checkpoint(rng, file):
    """Damage a checkpoint: its bytes, or a value in it."""
    if rng.random() < 0.2:
        return file.write_bytes(damaged(rng, file.read_bytes()))
    state = read_checkpoint(file, {})
    if rng.random() < 0.1:
        state = rng.choice((list(state), [], 3, torch.zeros(3), None, {}))
    else:
        path = rng.choice(places(state))
        old = state
        for key in path:
            old = old[key]
        choices = [put, *EVIL, torch.zeros(3), torch.tensor(math.nan)]
        if isinstance(old, torch.Tensor) and old.is_floating_point():
            choices += [old * math.nan, old[None], old.double(), old.flatten()[:1], -old - 1] * 6
        elif isinstance(old, int):
            choices += [-1, -10 ** 6, 10 ** 9, 0] * 6
        put(state, path, rng.choice(choices))
    torch.save(state, file)


def make_settings(rng, place):
    kind = rng.choice(("edit", "nerf", "splat", "nerf-file", "pds", "captions", "row", "model"))
    if kind == "edit":
        edit_dot(place, False)
        broken_checkpoint(rng, place / "checkpoint.pt")

        def call():
            if not torch.isfinite(edit_dot(place, True)).all():
                raise FloatingPointError("the colour")
    elif kind in ("nerf", "splat", "nerf-file"):
        ball, file = place / "ball", place / ("a.safetensors" if kind == "nerf-file" else "fit.pt")
        ball.mkdir()
        write_scene(ball)
        scene, kept = load_scene(ball), None if kind == "nerf-file" else file

        def fit(steps):
            if kind == "splat":
                return Splats.fit(scene, steps=steps, checkpoint=kept, progress=False, count=40, limit=60, degree=1)
            return NeRF.fit(scene, steps=steps, checkpoint=kept, progress=False, levels=2, table=2 ** 10, width=8)
        fitted = fit(2)
        if kind == "nerf-file":
            fitted.save(file)
            data = file.read_bytes()
            if rng.random() < 0.5:  # the sizes that it says it has
                words = (b'\\"levels\\": 2', b'\\"table\\": 1024', b'\\"width\\": 8')
                number = rng.choice((b"0", b"-1", b"7", b"99999999999", b"null", b"1e9", b"true"))
                word = rng.choice(words)
                data = data[8:].replace(word, word.rsplit(b" ", 1)[0] + b" " + number)
                length = struct.unpack("<Q", file.read_bytes()[:8])[0] + len(data) - (file.stat().st_size - 8)
                data = struct.pack("<Q", length) + data
            else:
                data = damaged(rng, data)
            file.write_bytes(data)
        else:
            broken_checkpoint(rng, file)

        def call():
            found = NeRF.load(file, scene) if kind == "nerf-file" else fit(4)
            with torch.no_grad():
                if not torch.isfinite(found.render(0, 8)).all():
                    raise FloatingPointError("the render")
    elif kind == "model":
        model = place / "model"
        shutil.copytree(Path(__file__).parent.parent / "models" / "emoji", model, ignore=shutil.ignore_patterns(
            "*.png", "instruct*", "train.py"))
        file = model / rng.choice(("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
                                   "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"))
        settings = read_json(file)
        path = rng.choice(places(settings))
        put(settings, path, rng.choice((put, *EVIL[:24])))  # sizes of a billion are for the library below
        file.write_text(json.dumps(settings))

        def call():
            prior = Prior.from_pretrained(model)
            if not torch.isfinite(prior.eps(torch.zeros(1, 4, 8, 8), torch.tensor([500]), prior.embed("red apple"))).all():
                raise FloatingPointError("the prediction")
    else:
        file = place / f"{kind}.json"
        sound = {"pds": {"guidance": {"pds": 3.0}, "steps": 5, "image": {"points": 0.1, "steps": 3}},
                 "row": {key: 1.0 for key in ("s", "MB", "before", "log-odds", "PSNR", "SSIM")}, "captions": {"a": 1}}[kind]
        file.write_text(json.dumps(broken(rng, sound)))
        if rng.random() < 0.3:
            file.write_bytes(damaged(rng, file.read_bytes()))
        call = {"pds": lambda: read_defaults(file), "row": lambda: read_row(file),
                "captions": lambda: read_captions(file.read_text(errors="replace"))}[kind]
    return call


MAKE = {"scenes": make_scene, "colmap": make_colmap, "ply": make_ply, "pictures": make_picture, "settings": make_settings}
