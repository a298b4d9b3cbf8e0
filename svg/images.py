"""Embedded pictures, <image href="data:...">: layers that are drawn but not optimised.

    op = picture_op(document, element, matrix, style)       # see svg.document.Document
    paint = layer.picture.paint(matrix, box)                # [4, h, w], at every render
"""
import base64
import binascii
import math
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from files.pictures import MAX_PIXELS, PictureError, open_picture, read_picture
from svg.outline import box_outline, fit
from svg.paint import Layer, Shape
from svg.segments import take

SAMPLES = 2                           # the most per pixel and axis; a finer picture is reduced first
SHARP = {"pixelated", "crisp-edges", "optimizespeed"}         # values of image-rendering: the nearest pixel


@dataclass
class Picture:
    """A picture and its place."""
    image: Image.Image                    # RGBA
    unit: np.ndarray                      # the layer's local units -> pixels of the picture
    sharp: bool
    reduced: dict = field(default_factory=dict)               # {(width, height): premultiplied tensor [h w, 4]}

    def at(self, width, height, like):
        """Premultiplied pixels [height width, 4], reduced to this size."""
        if (width, height) not in self.reduced:
            image = self.image.convert("RGBa")
            image = image if image.size == (width, height) else image.resize((width, height), Image.BOX)
            self.reduced[width, height] = torch.from_numpy(np.array(image).reshape(-1, 4))
        return self.reduced[width, height].to(like) / 255

    def paint(self, matrix, box):
        """Colours and alpha [4, height, width] over a box (x0, y0, width, height); alpha is not premultiplied.

        matrix [3, 3]: pixels -> those of the picture. Each pixel averages up to SAMPLES^2 cubic interpolations.
        """
        spread = matrix[:2, :2].detach().norm(dim=1).clamp(1e-6, 1e6).tolist()      # picture's pixels per pixel
        size = [side if self.sharp else max(1, min(side, math.ceil(side * SAMPLES / s)))
                for side, s in zip(self.image.size, spread, strict=True)]
        zoom = matrix.new_tensor([new / old for new, old in zip(size, self.image.size, strict=True)])
        fine = 1 if self.sharp else min(SAMPLES, max(1, math.ceil(max(
            s * z for s, z in zip(spread, zoom.tolist(), strict=True)) - 1e-3)))
        x, y, width, height = box
        if width * height == 0:
            return matrix.new_zeros(4, height, width)
        across = (torch.arange(width * fine, device=matrix.device, dtype=matrix.dtype) + 0.5) / fine + x
        down = (torch.arange(height * fine, device=matrix.device, dtype=matrix.dtype)[:, None] + 0.5) / fine + y
        places = [(zoom[k] * (matrix[k, 0] * across + (matrix[k, 1] * down + matrix[k, 2]))).reshape(-1)
                  for k in (0, 1)]
        found = self.sampled(self.at(*size, matrix), size, *places).T.view(4, height * fine, width * fine)
        found = F.avg_pool2d(found, fine).clamp(0, 1) if fine > 1 else found.clamp(0, 1)
        return torch.cat([(found[:3] / found[3:].clamp_min(1e-6)).clamp_max(1), found[3:]])

    def sampled(self, pixels, size, x, y):
        """[P, 4] at P places: by the cubic filter of Mitchell and Netravali (B = C = 1/3), or the nearest pixel."""
        if self.sharp:
            x, y = (v.floor().long().clamp(0, side - 1) for v, side in zip((x, y), size, strict=True))
            return take(pixels, y * size[0] + x)
        taps = []
        for v, side in zip((x, y), size, strict=True):
            first = (v - 0.5).detach().floor()
            t = (v - 0.5 - first).clamp(0, 1)
            s = 1 - t
            weights = [s * s * (7 * s - 6), 1 + s * (9 + s * (27 - 21 * s)), 1 + t * (9 + t * (27 - 21 * t)),
                       t * t * (7 * t - 6)]
            taps.append([((first.long() + k - 1).clamp(0, side - 1), w / 18) for k, w in enumerate(weights)])
        return sum(pixels[row * size[0] + column] * (wx * wy)[:, None] for row, wy in taps[1] for column, wx in taps[0])


# ------------------------------------------------------------------ reading

def embedded(href):
    """(kind, bytes) of a data URI; None for other references and undecodable data."""
    match = re.match(r"data:([^,;]*)((?:;[^,;]*)*),", href, re.I)
    if not match:
        return None
    data = unquote_to_bytes("".join(href[match.end():].split()))
    try:
        if match[2].lower().endswith(";base64"):
            data = base64.b64decode(data + b"=" * (-len(data) % 4))
    except binascii.Error:
        return None
    return match[1].strip().lower(), data


def read(document, element):
    """The RGBA picture of an <image>, read once; None if it is left out."""
    source = document.source
    if element in document.pictures:
        return document.pictures[element]
    href, image = source.href(element), None
    kind, data = embedded(href) or (None, b"")
    if any(source.tag(active) == "pattern" for active in document.active):
        source.unsupported("a picture in a pattern")
    elif kind is None:
        source.unsupported(f"<image> of another file, '{href[:60]}'" if href[:5].lower() != "data:" else
                           "<image> without a readable picture")
    elif kind.startswith("image/svg"):
        source.unsupported("<image> of an SVG")
    else:
        try:
            with open_picture("<image>", data) as opened:
                document.decoded += math.prod(opened.size)
            if document.decoded > MAX_PIXELS:
                raise PictureError(f"the pictures in <image> have more than {MAX_PIXELS / 1e6:.0f} million pixels")
            image = read_picture("<image>", data=data).convert("RGBA")
        except PictureError as error:
            source.unsupported(str(error))
    document.pictures[element] = image
    return image


def picture_op(document, element, matrix, style):
    """ops of an <image>; its bounding box is the whole of its rectangle."""
    source, props = document.source, document.styles.of(element)
    image = read(document, element)
    if image is None:
        return []
    x, y = (source.measure(element, name, style) for name in "xy")
    width, height = (source.measure(element, name, style, None) for name in ("width", "height"))
    if width is None:
        width = image.width if height is None else height * image.width / image.height
    height = width * image.height / image.width if height is None else height
    if min(width, height) <= 0 or abs(np.linalg.det(matrix)) < 1e-18:
        return []
    placed = fit([0, 0, *image.size], element.get("preserveAspectRatio"), x, y, width, height)
    (left, top), (right, bottom) = (placed[:2] @ corner for corner in ((0, 0, 1), (*image.size, 1)))
    if props.get("overflow", "hidden").lower() in ("hidden", "scroll", "clip"):
        left, top, right, bottom = max(left, x), max(top, y), min(right, x + width), min(bottom, y + height)
    shape = document.shape(None, box_outline(left, top, right - left, bottom - top), matrix)
    document.drawn.append((Shape(None, box_outline(x, y, width, height), 1.0, 0), matrix))
    if shape is None:
        return []
    sharp = style["image-rendering"][0].lower() in SHARP
    return [document.add(Layer(shape, matrix, picture=Picture(image, np.linalg.inv(placed), sharp)))]
