"""The one reader of pictures: 8-bit RGB or RGBA out of whatever Pillow opens, bounded in memory, errors of one line.

    picture = read_picture("cat.jpg")                       # upright, reduced where it is huge
    picture = read_picture("0001.png", 2, upright=False)    # of a scene: half as large, as it is stored
"""
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from files.messages import one_line

MOST = 2 ** 25  # pixels that are ever decoded of one picture: 134 MB; of a JPEG, once it is read at a part of its size
LONGEST = 4096  # pixels of the longer side of what is handed out, unless a scene's file says more
FARTHEST = 4  # times its shorter side, a picture's longer side in a Frame
STRIP = 2 ** 20  # pixels that are converted at a time
ORIENTATION = 0x0112  # EXIF's tag, and what brings a picture with each of its values upright
TURN = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
        6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}


class PictureError(ValueError):
    """A picture that cannot be read; one line that names the file and the reason."""


class Frame(NamedTuple):
    """How large a model sees whole pictures: the shorter side has `short` pixels, both sides are multiples of `multiple`.

    The longer side is at most FARTHEST times `short`: of what is longer still, the shorter side is less than `short`.
    square: every picture is seen as a square of `short` pixels a side.
    """
    short: int
    multiple: int = 1
    square: bool = False

    def sides(self, width, height):
        """(width, height) in pixels that a whole picture of this shape is drawn with; it is stretched to a multiple."""
        if self.square:
            return self.short, self.short
        zoom = min(self.short / min(width, height), FARTHEST * self.short / max(width, height))
        return tuple(max(1, round(side * zoom / self.multiple)) * self.multiple for side in (width, height))


def frame_of(size):
    """A Frame as it is; a number of pixels as that of the shorter side of a whole picture."""
    return size if isinstance(size, Frame) else Frame(size)


def open_picture(path):
    """The PIL picture of a file, not decoded yet; raises PictureError."""
    Image.init()
    # a PostScript file is a program, which Pillow would hand to an interpreter
    formats = [name for name in Image.OPEN if name != "EPS"]
    with _told(path):
        return Image.open(path, formats=formats)


def picture_size(path):
    """(width, height) in pixels as they are stored, and the EXIF orientation, 1 to 8; nothing is decoded."""
    with open_picture(path) as image, _told(path):
        return image.size, _orientation(image)


def read_picture(path, downscale=None, upright=True):
    """A file as PIL picture of mode RGB, or RGBA where it is transparent somewhere or may be.

    Of an animation it is the first frame. 16-bit and float greys keep their greys.

    Args:
        downscale: averaged to 1 / downscale of its size; None: to LONGEST where a side is longer.
        upright: turn it as its EXIF orientation says.
    Raises:
        PictureError: no picture, a damaged one, one of more than MOST pixels, greys of an unknown range.
    """
    with open_picture(path) as image, _told(path):
        wanted = image.size
        shrink = max(1, max(wanted) / LONGEST) if downscale is None else downscale
        if shrink != 1:
            wanted = tuple(max(1, round(side / shrink)) for side in wanted)
        if math.prod(image.size) > MOST // 2 and shrink > 1:
            image.draft(None, wanted)  # a JPEG is read at 1/2, 1/4 or 1/8
        if math.prod(image.size) > (most := _most(image)):
            kind = f" of a {image.format} of this kind" if most < MOST else ""
            raise PictureError(f"it has {image.width} x {image.height} pixels, {most / 1e6:.0f} million can be read"
                               f"{kind}: reduce it first")
        if min(image.size) < 1:
            raise PictureError("it is empty")
        wide = image.width > image.height
        image.load()
        if (image.width > image.height) != wide:  # Pillow itself turns some TIFFs
            wanted = wanted[::-1]
        picture, orientation = _converted(image, wanted), _orientation(image)
        return picture.transpose(TURN[orientation]) if upright and orientation in TURN else picture


def _most(image):
    """Pixels that are decoded at most, so that it takes seconds; decoders of Pillow that are Python are slow."""
    if any(tile[0] in Image.DECODERS for tile in image.tile):
        return MOST >> 4
    return MOST >> 2 if image.format == "JPEG2000" else MOST


def _orientation(image):
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata of a sound picture
        return 1
    return orientation if orientation in TURN else 1


class _told:
    """Any error within becomes a PictureError that names the file: damaged pictures raise a dozen kinds."""

    def __init__(self, path):
        self.path, self.quiet = path, warnings.catch_warnings()

    def __enter__(self):
        self.quiet.__enter__()
        warnings.simplefilter("ignore")  # of bombs, which are bounded here, and of damaged metadata

    def __exit__(self, kind, error, trace):
        self.quiet.__exit__(kind, error, trace)
        if isinstance(error, Exception):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            reason = "of no format that is known" if isinstance(error, UnidentifiedImageError) else reason
            raise PictureError(f"{one_line(self.path)}: no readable picture: {one_line(reason, 200)}") from error


def _converted(image, wanted):
    """A loaded picture as RGB or RGBA of the size `wanted`, no larger than it is.

    Strip by strip, so that a huge one is never there twice.
    """
    scale = _grey_scale(image)
    alpha = scale is None and image.has_transparency_data
    mode = "RGBA" if alpha else "RGB"

    def convert(part):
        if scale is not None:
            part = Image.fromarray((np.asarray(part, np.float32) * scale + 0.5).clip(0, 255).astype(np.uint8))
        return part.convert(mode)
    if image.size == wanted:
        return convert(image)
    # averaged premultiplied, or the colour under transparent pixels would bleed into the edges
    averaged = "RGBa" if alpha else "RGB"
    if image.mode == averaged:  # nothing to convert
        return image.resize(wanted, Image.BOX)
    if math.prod(image.size) <= 4 * STRIP:
        return convert(image).convert(averaged).resize(wanted, Image.BOX).convert(mode)
    page, rows = Image.new(mode, wanted), max(1, STRIP // image.width)
    ratio = image.height / wanted[1]
    rows = max(1, int(rows / ratio))  # of the page at a time
    for top in range(0, wanted[1], rows):
        bottom = min(top + rows, wanted[1])
        first, last = math.floor(top * ratio), min(math.ceil(bottom * ratio), image.height)
        part = convert(image.crop((0, first, image.width, last))).convert(averaged)
        box = (0, top * ratio - first, image.width, min(bottom * ratio - first, part.height))
        page.paste(part.resize((wanted[0], bottom - top), Image.BOX, box).convert(mode), (0, top))
    return page


def _grey_scale(image):
    """What 16-bit, 32-bit and float greys are multiplied with to lie in 0 .. 255; None for all other modes."""
    if image.mode.startswith("I;16"):
        return 1 / 257
    if image.mode not in ("I", "F"):
        return None
    low, high = image.getextrema()
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0:
        raise PictureError(f"its greys reach from {low:g} to {high:g}")
    if image.mode == "F" and high <= 255:
        return 255.0 if high <= 1 else 1.0
    if high <= 65535:
        return 1 / 257
    raise PictureError(f"its greys reach to {high:g}, neither 1, 255 nor 65535 is white")


def to_uint8(picture):
    """[...,C,H,W] in [0,1] -> [...,H,W,C] uint8 in 0 .. 255, rounded, on the same device; without a gradient."""
    return (picture.detach() * 255).round().byte().movedim(-3, -1).contiguous()


def to_pil(picture):
    """[1,3,H,W] in [0,1] -> PIL picture."""
    return Image.fromarray(to_uint8(picture[0]).cpu().numpy())


def to_tensor(picture):
    """PIL picture -> [1,3,H,W] float64 in [0,1]."""
    picture = picture.convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).double() / 255
