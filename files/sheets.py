"""Pictures that a run reports: snapshots, thumbnails, and labelled sheets of several pictures."""
import torch
from PIL import Image, ImageDraw, ImageFont

from files.pictures import to_pil

FRAMES, VIEWS, FRAME_SIZE = 40, 24, 192  # frames of progress.gif and turntable.gif, pixels a side of both
SIDES, SIDE_SIZE, SHEET_SIZE = 5, 256, 512  # sheet.png: views of a scene, pixels a side of each, of a single picture


def snapshot(scene, size=None, view=None):
    """PIL picture of the whole scene; `size`: pixels of the shorter side, FRAME_SIZE by default.

    A scene may say at how many pixels it has `shown` all that it knows: it is drawn at those, and enlarged.
    """
    size = size or FRAME_SIZE
    side = min(size, getattr(scene, "shown", size))
    with torch.no_grad():
        picture = to_pil(scene.render(view, side))
    return picture if side == size else thumbnail(picture, size)


def thumbnail(picture, side):
    """A PIL picture resized to a shorter side of `side` pixels."""
    zoom = side / min(picture.size)
    return picture.resize([max(1, round(n * zoom)) for n in picture.size], Image.BICUBIC)


def beside(pictures):
    """PIL pictures of equal height side by side."""
    page = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width
    return page


def sheet(rows):
    """Rows of (title, prompt, [PIL pictures of several views]) as one labelled page.

    Rows of one view each stand side by side; rows of several views stand below each other.
    """
    side, tall = (max(getattr(p, n) for *_, row in rows for p in row) for n in ("width", "height"))
    pad, text = 16, 56
    fonts = [ImageFont.load_default(size) for size in (18, 14)]
    several = len(rows[0][2]) > 1
    wide, high = (len(rows[0][2]), len(rows)) if several else (len(rows), 1)
    page = Image.new("RGB", (wide * (side + pad) + pad, high * (tall + text + pad) + pad), "white")
    draw = ImageDraw.Draw(page)
    for i, (title, prompt, pictures) in enumerate(rows):
        x, y = (pad, pad + i * (tall + text + pad)) if several else (pad + i * (side + pad), pad)
        for k, picture in enumerate(pictures):
            page.paste(picture, (x + k * (side + pad), y))
        middle, room = (page.width / 2, page.width) if several else (x + side / 2, side)
        draw.text((middle, y + tall + 14), title, fill="black", font=fonts[0], anchor="mm")
        draw.text((middle, y + tall + 38), prompt[:room // 7], fill="#555", font=fonts[1], anchor="mm")
    return page
