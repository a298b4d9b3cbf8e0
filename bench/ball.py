"""A tiny capture, a ball seen from a few sides, as files in memory: for the fuzzer of scenes and the killed runs."""
import io
import math

import numpy as np
from PIL import Image

from bench.mutate import File, as_bytes


def contents(save, *more):
    """The bytes that save(file, *more) writes."""
    whole = io.BytesIO()
    save(whole, *more)
    return whole.getvalue()


def ball_scene(alpha=True, views=5, size=16, **keys):
    """A ball seen from `views` sides: {path: File} of its pictures and its transforms.json."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    files, frames = {}, []
    for i in range(views):
        pixels, a = np.zeros((size, size, 4), np.uint8), 2 * math.pi * i / views
        pixels[..., i % 3], pixels[..., 3] = 200, (x ** 2 + y ** 2 < (size / 4) ** 2) * 255 if alpha else 255
        files[f"{i}.png"] = File(contents(Image.fromarray(pixels).convert("RGBA" if alpha else "RGB").save, "PNG"),
                                weight=1 / views)
        frames.append({"file_path": f"{i}.png", "transform_matrix": [
            [math.cos(a), 0, math.sin(a), 4 * math.sin(a)], [0, 1, 0, 0],
            [-math.sin(a), 0, math.cos(a), 4 * math.cos(a)], [0, 0, 0, 1]]})
    return files | {"transforms.json": File({"camera_angle_x": 0.9, "w": size, "h": size, "frames": frames} | keys,
                                            weight=6)}


def write_scene(folder, **options):
    """Write a sound ball_scene."""
    for name, file in ball_scene(**options).items():
        (folder / name).write_bytes(as_bytes(file.value))
