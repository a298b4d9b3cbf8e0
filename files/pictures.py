"""Reading pictures: 8-bit sRGB, with alpha or without, from any file that Pillow opens; bounded in memory.

    picture = read_picture("cat.jpg")                       # upright, reduced if it is huge
    picture = read_picture("0001.png", 2, upright=False)    # of a scene: half as large, not turned
"""
import importlib
import io
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError

from files.messages import one_line
from files.reading import first_bytes, refuse_pointer

MAX_PIXELS = 2 ** 25  # that one picture may be decoded to, 134 MB; a JPEG is read at a fraction of its size first
LONGEST = 4096  # pixels of the longer side of a returned picture, unless the file of a scene says more
MAX_ASPECT = 4  # longer to shorter side of a picture in a Frame
STRIP = 2 ** 20  # pixels that are converted at a time
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
           6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # what undoes each orientation


class PictureError(ValueError):
    """A picture that cannot be read; one line that names the file and the reason."""


class Frame(NamedTuple):
    """The size at which a model sees whole pictures: `short` pixels a shorter side, both sides multiples of `multiple`.

    The longer side is at most MAX_ASPECT times `short`: a picture longer than that has a smaller shorter side.
    square: every picture becomes a square of `short` pixels a side.
    """
    short: int
    multiple: int = 1
    square: bool = False

    def sides(self, width, height):
        """(width, height) in pixels at which a picture of this shape is drawn; it is stretched to the next multiple."""
        if self.square:
            return self.short, self.short
        zoom = min(self.short / min(width, height), MAX_ASPECT * self.short / max(width, height))
        return tuple(max(1, round(side * zoom / self.multiple)) * self.multiple for side in (width, height))


def frame_of(size):
    """`size` as a Frame; a number is the pixels of the shorter side."""
    return size if isinstance(size, Frame) else Frame(size)


def open_picture(path, data=None):
    """The PIL picture of a file, not decoded yet; raises PictureError.

    data: the bytes of a picture within another file; then path is its name in messages.
    """
    try:
        if data is None:
            refuse_pointer(path)
    except ValueError as e:
        raise PictureError(one_line(e)) from e
    Image.init()
    if data is None and _is_heic(path):
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as e:
            raise PictureError(f"{one_line(path)}: a HEIC picture: pip install pillow-heif to read it") from e
    # a PostScript file is a program, which Pillow would run in an interpreter
    formats = [name for name in Image.OPEN if name != "EPS"]
    with _told(path):
        return Image.open(path if data is None else io.BytesIO(data), formats=formats)


def _is_heic(path):
    head = first_bytes(path, 12)
    brands = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
    return head[4:8] == b"ftyp" and head[8:12] in brands


def picture_size(path):
    """The stored (width, height) in pixels and the EXIF orientation, 1 to 8; decodes nothing."""
    with open_picture(path) as image, _told(path):
        return image.size, _orientation(image)


def read_picture(path, downscale=None, upright=True, data=None):
    """A file as a PIL picture of mode RGB, or RGBA if its format has transparency; the first frame of an animation.

    16-bit and float greys are scaled to 8 bits. Colours are converted to sRGB from the file's colour profile.

    Args:
        downscale: averages the picture to 1 / downscale of its size; None: to at most LONGEST pixels a side.
        upright: turn it according to its EXIF orientation.
        data: see open_picture.
    Raises:
        PictureError: no picture, a damaged one, more than MAX_PIXELS pixels, greys of an unknown range.
    """
    with open_picture(path, data) as image, _told(path):
        wanted = image.size
        shrink = max(1, max(wanted) / LONGEST) if downscale is None else downscale
        if shrink != 1:
            wanted = tuple(max(1, round(side / shrink)) for side in wanted)
        if math.prod(image.size) > MAX_PIXELS // 2 and shrink > 1:
            image.draft(None, wanted)  # a JPEG is read at 1/2, 1/4 or 1/8
        if math.prod(image.size) > (most := _most_pixels(image)):
            kind = f" of a {image.format} of this kind" if most < MAX_PIXELS else ""
            raise PictureError(f"it has {image.width} x {image.height} pixels, {most / 1e6:.0f} million can be read"
                               f"{kind}: reduce it first")
        if min(image.size) < 1:
            raise PictureError("it is empty")
        wide = image.width > image.height
        image.load()
        if (image.width > image.height) != wide:  # Pillow itself turns some TIFFs
            wanted = wanted[::-1]
        picture, orientation = _converted(image, wanted), _orientation(image)
        return picture.transpose(UPRIGHT[orientation]) if upright and orientation in UPRIGHT else picture


def _most_pixels(image):
    """The most pixels that are decoded, for a time of seconds; Pillow's decoders in Python are slow."""
    if any(tile[0] in Image.DECODERS for tile in image.tile):
        return MAX_PIXELS >> 4
    return MAX_PIXELS >> 2 if image.format == "JPEG2000" else MAX_PIXELS


def _orientation(image):
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata of an intact picture
        return 1
    return orientation if orientation in UPRIGHT else 1


class _told:
    """Turns any error within into a PictureError that names the file: damaged pictures raise a dozen kinds."""

    def __init__(self, path):
        self.path, self.quiet = path, warnings.catch_warnings()

    def __enter__(self):
        self.quiet.__enter__()
        warnings.simplefilter("ignore")  # about huge pictures, which are bounded here, and damaged metadata

    def __exit__(self, kind, error, trace):
        self.quiet.__exit__(kind, error, trace)
        if isinstance(error, Exception):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            reason = "of no known format" if isinstance(error, UnidentifiedImageError) else reason
            raise PictureError(f"{one_line(self.path)}: no readable picture: {one_line(reason, 200)}") from error


def _converted(image, wanted):
    """A loaded picture as RGB or RGBA, reduced to the size `wanted`.

    It works strip by strip, so that memory never holds a huge picture twice.
    """
    scale, to_srgb = _grey_scale(image), _to_srgb(image)
    alpha = scale is None and image.has_transparency_data
    mode = "RGBA" if alpha else "RGB"

    def convert(part):
        if scale is not None:
            part = Image.fromarray((np.asarray(part, np.float32) * scale + 0.5).clip(0, 255).astype(np.uint8))
        if to_srgb is None:
            return part.convert(mode)
        picture = to_srgb(part)
        if alpha:
            picture.putalpha(part.convert("RGBA").getchannel("A"))
        return picture
    if image.size == wanted:
        return convert(image)
    # averaged with premultiplied alpha, or the colour under transparent pixels would bleed into the edges
    averaged = "RGBa" if alpha else "RGB"
    if image.mode == averaged and to_srgb is None:
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


def _to_srgb(image):
    """A function of a part of a picture -> RGB in sRGB, by its colour profile; None if there is nothing to convert.

    As in browsers, a damaged profile, or one for other kinds of colours than the picture's, is ignored.
    """
    grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (image.mode == "CMYK") or mode == "L" and not grey:
            return None
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB",
                                            ImageCms.getDefaultIntent(profile))
    except (KeyError, OSError, TypeError, ImageCms.PyCMSError):
        return None
    if mode != "CMYK":  # sRGB's own profile would change pixels by rounding
        colours = Image.fromarray(np.indices((6, 6, 6), np.uint8).reshape(3, 12, 18).transpose(1, 2, 0) * 51)
        plain = colours.convert(mode).convert("RGB")
        changed = ImageCms.applyTransform(colours.convert(mode), transform)
        if np.abs(np.asarray(changed, int) - np.asarray(plain, int)).max() <= 1:
            return None
    return lambda part: ImageCms.applyTransform(part.convert(mode), transform)


def _grey_scale(image):
    """The factor that takes 16-bit, 32-bit and float greys to 0 .. 255; None for all other modes."""
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
