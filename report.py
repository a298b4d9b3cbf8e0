"""What a run reports: pictures, sheets, animations, PSNR, memory, and the exit code.

run.py, table.py and bench/ share it.
"""
import argparse
import io
import math
import re
import sys

import torch
from PIL import Image, ImageDraw, ImageFont

from files import one_line, replacing

FRAMES, VIEWS, FRAME_SIZE = 40, 24, 192  # of progress.gif and turntable.gif, pixels a side of both
SIDES, SIDE_SIZE, SHEET_SIZE = 5, 256, 512  # of sheet.png: views of a scene, pixels a side of each, of a single picture


# ---- pictures -----------------------------------------------------------------------------------------

def to_pil(picture):
    """[1,3,H,W] in [0,1] -> PIL picture."""
    return Image.fromarray((picture[0].detach().permute(1, 2, 0) * 255).round().byte().cpu().numpy())


def to_tensor(picture):
    """PIL picture -> [1,3,H,W] float64 in [0,1]."""
    picture = picture.convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).double() / 255


def snapshot(scene, size=None, view=None):
    """PIL picture of the scene as it is now, whole; `size` pixels on the shorter side, FRAME_SIZE by default."""
    with torch.no_grad():
        return to_pil(scene.render(view, size or FRAME_SIZE))


def thumbnail(picture, side):
    """A PIL picture, reduced or enlarged so that its shorter side has `side` pixels."""
    zoom = side / min(picture.size)
    return picture.resize([max(1, round(n * zoom)) for n in picture.size], Image.BICUBIC)


def beside(pictures):
    """Pictures of one height in a row."""
    page = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width
    return page


def sheet(rows):
    """Rows of (title, prompt, [pictures of several views]) as one labelled page.

    Rows of one view each stand side by side, titles below; rows of several views stand one under another.
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


# ---- files --------------------------------------------------------------------------------------------

def write(path, what):
    """Write a picture, the frames of an animation, text, bytes or a checkpoint; never leaves half a file."""
    with replacing(path) as part:
        if isinstance(what, Image.Image):
            what.save(part, format="PNG")
        elif isinstance(what, list):
            what[0].save(part, format="GIF", save_all=True, append_images=what[1:] + what[-1:] * 15, duration=80,
                         loop=0)
        elif isinstance(what, (str, bytes)):
            part.write_bytes(what.encode() if isinstance(what, str) else what)
        else:
            whole = io.BytesIO()  # torch's own writing of files hides a full disk behind a RuntimeError
            torch.save(what, whole)
            part.write_bytes(whole.getbuffer())


# ---- figures ------------------------------------------------------------------------------------------

def perceptual(device="cpu"):
    """LPIPS (Zhang et al., arXiv 1801.03924), a differentiable function of two pictures [1,3,H,W] in [0,1] -> []; None
    where the package lpips is not installed."""
    try:
        import lpips
    except ImportError:
        return None
    net = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False).to(device)
    return lambda a, b: net(a.float() * 2 - 1, b.float() * 2 - 1).mean()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two arrays or tensors of one shape, in [0,1]; 100 where they are the same."""
    return -10 * math.log10(max(((a - b) ** 2).mean(), 1e-10))


def outside(before, after, masks):
    """One line that says what changed outside the masks: the PSNR in dB there, over all views.

    before, after: lists of PIL pictures, one per view; masks: for each view [1,1,h,w] bool of any size.
    """
    was, now, pixels = [], [], 0
    for a, b, mask in zip(before, after, masks):
        a, b = (to_tensor(picture)[0].permute(1, 2, 0) for picture in (a, b))
        rest = ~(torch.nn.functional.interpolate(mask.float(), size=a.shape[:2])[0, 0] > 0).cpu()
        was, now, pixels = [*was, a[rest]], [*now, b[rest]], pixels + rest.numel()
    was, now = torch.cat(was), torch.cat(now)
    change = f"PSNR {psnr(was, now):.1f} dB against the source" if len(was) else "nothing"
    return f"outside the subject, {100 * len(was) / pixels:.0f} % of the picture: {change}"


def memory_status(key):
    """MiB of this process by a name of Linux's /proc/self/status: VmRSS is the memory now, VmHWM its peak."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) / 1024


# ---- the command line ---------------------------------------------------------------------------------

def number(kind, low, high=None):
    """Type for argparse: a finite number in [low, high]."""
    def convert(text):
        value = kind(text)
        if not (low <= value and (high is None or value <= high)) or value in (float("inf"),):
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. {'' if high is None else high}")
        return value
    convert.__name__ = kind.__name__
    return convert


def device(name):
    """Type for argparse: a device of torch that is there."""
    try:
        torch.zeros(1, device=name)
    except Exception as e:  # torch has an error of its own for every kind of device
        raise argparse.ArgumentTypeError(f"{name}: {one_line(e, 100)}") from e
    return name


def exit_code(program, call):
    """Run call() and return its exit code, 0 for None: 130 after Ctrl-C, 2 and one line on stderr for bad input, 1 and
    one line for a loss that is not finite."""
    try:
        return call() or 0
    except KeyboardInterrupt as e:
        print(f"{program}: interrupted{': ' if e.args else ''}{one_line(e) if e.args else ''}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("(out of|not enough|allocate) memory", str(e), re.I):
            raise
        print(f"{program}: error: {one_line(e, 1000)}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"{program}: {one_line(e)}", file=sys.stderr)
        return 1
