"""The rasterizer against resvg, finite differences and plain autograd, and after saving and loading."""
import io
import json
import math
import random
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import svg_raster
from bench.measure import peak_memory, table
from image.figures import psnr
from svg.compositing import overlap
from svg.outline import SVGError
from svg_raster import SVG


def drawing_text(body, viewbox="0 0 32 32"):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{viewbox}">{body}</svg>')


def load(text, **options):
    with tempfile.NamedTemporaryFile("w", suffix=".svg") as file:
        file.write(text)
        file.flush()
        return SVG.load(file.name, **options)


def icons_of(path, count):
    """[(name, document)] of `count` random icons (seed 0) of an iconify set."""
    icons = json.loads(Path(path).read_text())
    names = sorted(icons["icons"])
    random.Random(0).shuffle(names)

    def document(icon):
        left, top, width, height = (icon.get(k, icons.get(k, d)) for k, d in
                                    (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
        return drawing_text(icon["body"], f"{left} {top} {width} {height}")
    return [(name, document(icons["icons"][name])) for name in names[:count]]


def resvg_render(text, size, finer=1):
    """[size, size, 3] in [0, 1] from resvg, rendered `finer` times larger and averaged.

    A drawing without a width whose viewBox is not square is centred in a square.
    """
    import resvg_py
    side = size * finer
    root = re.match(r"<svg [^>]*>", text)
    view = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', root[0]) if root and " width=" not in root[0] else None
    width, height = map(float, view.groups()[2:]) if view else (1.0, 1.0)
    if width != height or width % 1:      # resvg rounds the sides of a picture
        width, height = (1024 * extent / max(width, height) for extent in (width, height))
        place = f'x="{(1024 - width) / 2}" y="{(1024 - height) / 2}" width="{width}" height="{height}"'
        text = drawing_text(f"<svg {place}{text[4:]}", "0 0 1024 1024")
    png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, background="#ffffff"))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float64) / 255
    return pixels.reshape(size, finer, size, finer, 3).mean((1, 3))


def pixels_of(svg):
    """Our own render as 8-bit colours [size, size, 3] in [0, 1]."""
    with torch.no_grad():
        return (svg.render()[0].permute(1, 2, 0) * 255).round().numpy().astype(np.float64) / 255


# ------------------------------------------------------------------ svg-fidelity

def fidelity(args):
    missed = 0
    for path in args.icons:
        figures, finer, refused = [], [], []
        for name, text in icons_of(path, args.count):
            try:
                svg, svg2 = load(text, size=256), load(text, size=256, ss=2)
            except SVGError as error:
                refused.append(f"{name}: {error}")
                continue
            figures.append((psnr(pixels_of(svg), resvg_render(text, 256)), name))
            finer.append(psnr(pixels_of(svg2), resvg_render(text, 256, 8)))
        db = [f for f, _ in figures]
        low, worst, median, fine = np.percentile(db, 5), min(figures), np.median(db), np.median(finer)
        share = 100 * len(db) / (len(db) + len(refused))
        missed += table(f"{path}: {len(db)} icons at 256 px, PSNR against resvg", [
            ("median", f"{median:.2f} dB", ">= 47", median >= 47),
            ("5th percentile", f"{low:.2f} dB", ">= 40", low >= 40),
            (f"worst ({worst[1][:36]})", f"{worst[0]:.2f} dB", ">= 33", worst[0] >= 33),
            ("ss=2 against resvg at 8x, median", f"{fine:.2f} dB", ">= 52", fine >= 52),
            ("rendered without an unsupported error", f"{share:.1f} %", ">= 99", share >= 99)])
        print(*refused, sep="\n")
    return missed


# ------------------------------------------------------------------ svg-gradients

STOPS = ('<stop offset=".1" stop-color="#f00"/><stop offset=".6" stop-color="#0f0" stop-opacity=".6"/>'
         '<stop offset="1" stop-color="#00f"/>')
GRADIENT_CASES = {                        # on a 32 px canvas
    "circle": '<circle cx="15.3" cy="16.1" r="9.7" fill="#c33"/>',
    "square on pixel lines": '<rect x="4" y="6" width="12" height="16" fill="#36c"/>',
    "square of the whole canvas": '<rect width="32" height="32" fill="#36c"/>',
    "vertices on pixel corners": '<path d="M16 4L28 16L16 28L4 16Z" fill="#292"/>',
    "partly off canvas": '<path d="M-10 -5L20 -8L40 20L10 45Z" fill="#36c"/>',
    "square hole on pixel lines": '<path d="M4 4H28V28H4ZM10 10V20H20V10Z" fill="#292"/>',
    "even-odd star": '<path fill-rule="evenodd" d="M16 2L24.5 28L2.5 12H29.5L7.5 28Z" fill="#292"/>',
    "nonzero star": '<path d="M16 2L24.5 28L2.5 12H29.5L7.5 28Z" fill="#292"/>',
    "group opacity": (
        '<g opacity=".6"><circle cx="12" cy="14" r="8" fill="#c33" fill-opacity=".7"/><circle cx="19" '
        'cy="17" r="7.2" fill="#3c3"/></g>'),
    "groups and clips": (
        '<clipPath id="c"><circle cx="14" cy="15" r="9"/></clipPath><g clip-path="url(#c)" '
        'opacity=".8"><rect x="3.3" y="4.4" width="14" height="13" fill="#c33"/><path d="M8 8L30 12L11 '
        '27Z" fill-opacity=".7"/></g>'),
    "linear gradient": (
        f'<linearGradient id="a">{STOPS}</linearGradient><circle cx="14" cy="15" r="9.3" fill="url(#a)"/>'),
    "radial gradient": (
        f'<radialGradient id="a" fx=".3" fy=".4">{STOPS}</radialGradient><ellipse cx="14" cy="15" '
        'rx="9.3" ry="6" fill="url(#a)" transform="rotate(20 14 15)"/>'),
    "stroke of a curve": (
        '<path d="M4 5C20 3 25 11 22 18S12 30 5 22" fill="none" stroke="#333" stroke-width="3"/>'),
    "stroke, round": (
        '<path d="M5 5L20 8L9 20C0 30 20 30 26 25" fill="none" stroke="#333" stroke-width="3" '
        'stroke-linejoin="round" stroke-linecap="round"/>'),
    "stroke, miter, square caps": (
        '<path d="M5 5L20 8L9 20L26 25" fill="none" stroke="#333" stroke-width="3" '
        'stroke-linecap="square"/>'),
    "stroke, bevel, closed, 1 px": (
        '<path d="M5 5L20 8L9 20Z" fill="none" stroke="#333" stroke-width="1" stroke-linejoin="bevel"/>'),
    "stroke, sheared": (
        '<path d="M5 5L20 8L9 20Z" fill="none" stroke="#333" stroke-width="2" transform="matrix(1 .3 -.5 '
        '1.2 6 -2)"/>'),
    "stroke, dashed": (
        '<path d="M4 5C20 3 25 11 22 18S12 30 5 22" fill="none" stroke="#333" stroke-width="3" '
        'stroke-dasharray="5 3 2" stroke-linecap="square"/>'),
}


def gradient_pairs(svg, step=1e-5):
    """{parameter: (gradient, the same by central differences)} of a random weighting of the picture, in float64."""
    svg = svg.double()
    weights = torch.randn(3, svg.size, svg.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss():
        return (svg.render()[0] * weights).sum()
    loss().backward()
    pairs = {}
    for name, p in svg.named_parameters():
        flat, numeric = p.detach().view(-1), torch.zeros(p.numel(), dtype=torch.float64)
        with torch.no_grad():
            for i, value in enumerate(flat.tolist()):
                flat[i] = value + step
                up = loss()
                flat[i] = value - step
                numeric[i] = (up - loss()) / (2 * step)
                flat[i] = value
        if p.numel():
            pairs[name] = p.grad.view(-1), numeric
    return pairs


def cosine_of(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def gradients(args):
    rows = []
    for name, body in GRADIENT_CASES.items():
        bound = 0.999 if name.startswith("stroke") else 0.9999
        for parameter, (exact, numeric) in gradient_pairs(load(drawing_text(body), size=32)).items():
            cosine, error = cosine_of(exact, numeric), float((exact - numeric).norm() / numeric.norm())
            rows.append((f"{name}: {parameter}", f"{cosine:.6f} {error:.1e}", f">= {bound}, 0.01",
                         cosine >= bound and error <= 0.01))
    return table("cosine and relative error against finite differences, float64", rows)


# ------------------------------------------------------------------ svg-speed

def random_drawing(layers, radius, seed=0, canvas=256):
    """Blobs of four cubics each, with radii from half to one and a half times the given one."""
    rng, shapes = random.Random(seed), []
    for _ in range(layers):
        x, y = rng.uniform(0, canvas), rng.uniform(0, canvas)
        rx, ry = (radius * rng.uniform(0.5, 1.5) for _ in "xy")
        colour = "#%06x" % rng.randrange(1 << 24)
        shapes.append(f'<ellipse cx="{x:.2f}" cy="{y:.2f}" rx="{rx:.2f}" ry="{ry:.2f}" fill="{colour}" '
                      f'fill-opacity=".8" transform="rotate({rng.uniform(0, 360):.1f} {x:.2f} {y:.2f})"/>')
    return drawing_text("".join(shapes), f"0 0 {canvas} {canvas}")


class PlainAutograd:
    """The same formulas of coverage and blending, differentiated by autograd; replaces both Functions."""

    class Coverage:
        @staticmethod
        def apply(segments, layer, boxes, base, even_odd, cells):
            seg, row, column, ta, tb, dy, xa, ya, xb, yb = svg_raster.split(segments, layer, boxes, False)
            width = boxes[layer[seg], 2]
            cell = base[layer[seg]] + row * (width + 1) + column.clamp_min(0)
            inside = (column >= 0) & (column < width)
            share = torch.where(inside, (xa + xb) / 2 - column, 0) * dy
            winding = segments.new_zeros(cells + 1)
            winding = winding.index_add(0, cell, dy - share).index_add(0, cell + 1, share)
            return winding[:-1].cumsum(0).abs().clamp_max(1)

    class Composite:
        @staticmethod
        def apply(plan, coverage, rgba, opacities, *paints):
            canvas = coverage.new_ones(3, plan.size, plan.size)
            for area, own, box in zip(plan.views(plan.parts(coverage)), rgba, plan.boxes, strict=True):
                if (crops := overlap(box, (0, 0, plan.size, plan.size))) is not None:
                    back = canvas[crops[1]].clone()
                    canvas[crops[1]] = back + area * own[3] * (own[:3, None, None] - back)
            return canvas


def step_time(svg, repeats=8):
    """Best seconds of forward plus backward."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        svg.render().square().sum().backward()
        best = min(best, time.perf_counter() - start)
    return best


def coverage_time(svg, kind, repeats=10):
    """Best seconds of the coverage step alone, forward plus backward."""
    calls, original, best = [], svg_raster.Coverage, math.inf

    class Recorder:
        @staticmethod
        def apply(*arguments):
            calls.append(arguments)
            return original.apply(*arguments)
    svg_raster.Coverage = Recorder
    with torch.no_grad():
        svg.render()
    svg_raster.Coverage = original
    segments, *rest = calls[0]
    for _ in range(repeats):
        segments = segments.detach().requires_grad_()
        start = time.perf_counter()
        kind.apply(segments, *rest).sum().backward()
        best = min(best, time.perf_counter() - start)
    return best


def render_memory(svg):
    load(random_drawing(3, 20), size=256).render().sum().backward()        # load libraries before measuring
    return peak_memory(lambda: svg.render().square().sum().backward())


FITS = {                                  # name: (bar of the mean squared error, drawing on 128 px)
    "star": (1e-5,
        '<path fill="#e8a020" d="M64 10L80 48L120 50L89 76L100 116L64 94L28 116L39 76L8 50L48 48Z"/>'),
    "face": (2e-5,
        '<circle cx="64" cy="64" r="54" fill="#ffcc33"/><ellipse cx="45" cy="50" rx="7" ry="10" '
        'fill="#553311"/><ellipse cx="83" cy="50" rx="7" ry="10" fill="#553311"/><path d="M34 78C48 104 '
        '80 104 94 78C80 88 48 88 34 78Z" fill="#883322"/>'),
    "cat": (8e-5,
        '<path d="M28 20L50 38C60 35 68 35 78 38L100 20L104 62C108 92 88 112 64 112S20 92 24 62Z" '
        'fill="#998877"/><circle cx="48" cy="64" r="8" fill="#eeee66"/><circle cx="80" cy="64" r="8" '
        'fill="#eeee66"/><ellipse cx="48" cy="64" rx="2.5" ry="7"/><ellipse cx="80" cy="64" rx="2.5" '
        'ry="7"/><path d="M58 80H70L64 88Z" fill="#cc7788"/><path d="M64 88C60 98 50 96 48 92M64 88C68 '
        '98 78 96 80 92" fill="none" stroke="#443322" stroke-width="3" stroke-linecap="round"/>'),
}


def fit(body, steps=100):
    """Mean squared error after `steps` Adam steps back from a perturbed drawing: points 2 px, colours 0.1."""
    svg = load(drawing_text(body, "0 0 128 128"), size=128)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = svg.render()
        svg.points += 2 * torch.randn(svg.points.shape, generator=generator)
        svg.colours += 0.1 * torch.randn(svg.colours.shape, generator=generator)
        svg.project_()
        start = float((svg.render() - target).square().mean())
    adam = torch.optim.Adam(svg.param_groups(points=0.8, colours=0.03))
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: 0.5 + 0.5 * math.cos(math.pi * k / steps))
    for _ in range(steps):
        adam.zero_grad()
        (svg.render() - target).square().mean().backward()
        adam.step()
        decay.step()
        svg.project_()
    return start, (svg.render() - target).square().mean().item()


def speed(args):
    drawing = random_drawing(300, 20)
    svg = load(drawing, size=256)
    memory = render_memory(svg)
    own = step_time(svg)
    alone = coverage_time(svg, svg_raster.Coverage)
    plain_alone = coverage_time(svg, PlainAutograd.Coverage)
    saved = svg_raster.Coverage, svg_raster.Composite
    try:
        svg_raster.Coverage, svg_raster.Composite = PlainAutograd.Coverage, PlainAutograd.Composite
        plain = step_time(svg)
    finally:
        svg_raster.Coverage, svg_raster.Composite = saved
    missed = table("300 layers of about 40 x 40 px on 256 px, forward plus backward", [
        ("coverage alone: own", f"{1e3 * alone:.1f} ms", "", None),
        ("coverage alone: autograd", f"{1e3 * plain_alone:.1f} ms", "", None),
        ("coverage alone: ratio", f"{plain_alone / alone:.2f}", "", None),
        ("whole render: own", f"{1e3 * own:.1f} ms", "", None),
        ("whole render: autograd of the same formulas", f"{1e3 * plain:.1f} ms", "", None),
        ("whole render: ratio", f"{plain / own:.2f}", ">= 2.5", plain >= 2.5 * own),
        ("extra memory", f"{memory:.1f} MiB", "<= 40", memory <= 40)])

    print("\ncost by layers, edge length, covered area and picture (forward plus backward)")
    rows = []
    for layers, radius, size in ((50, 20, 256), (100, 20, 256), (200, 20, 256), (400, 20, 256), (50, 10, 256),
                                 (50, 40, 256), (50, 80, 256), (50, 20, 512), (50, 20, 1024), (50, 40, 1024)):
        svg = load(random_drawing(layers, radius), size=size)
        with torch.no_grad():
            segments, layer, *_ = svg.segments(size / svg.size)
            edge = float((segments[:, 2:] - segments[:, :2]).norm(dim=1).sum())
            frame = svg.boxes(segments @ torch.eye(4), layer, [0, 0, size, size])
        area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in frame)
        rows.append((layers, edge / 1e3, area / 1e6, size * size / 1e6, 1e3 * step_time(svg, 5)))
    a = np.array(rows)
    cost = np.linalg.lstsq(a[:, :4] / a[:, 4:], np.ones(len(a)), rcond=None)[0]     # least relative error
    print("    layers  edges, kpx  boxes, Mpx  picture, Mpx       ms  linear model")
    for row in a:
        print("  {:8.0f} {:11.2f} {:11.3f} {:13.3f} {:8.2f} {:13.2f}".format(*row, row[:4] @ cost))
    print("  model: {:.0f} us a layer, {:.2f} ms a kpx of edges, {:.0f} ms a Mpx of boxes, "
          "{:.0f} ms a Mpx of picture".format(1e3 * cost[0], *cost[1:]))

    fits = []
    for name, (bar, body) in FITS.items():
        start, end = fit(body)
        fits.append((f"{name}, from {start:.1e}", f"{end:.1e}", f"<= {bar:.0e}", end <= bar))
    return missed + table("100 Adam steps back from a perturbed drawing at 128 px, mean squared error", fits)


# ------------------------------------------------------------------ svg-roundtrip

def roundtrip(args):
    missed = 0
    for path in args.icons:
        unedited, edited, again = [], [], []
        for _, text in icons_of(path, args.count):
            try:
                svg = load(text, size=256)
            except SVGError:
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "saved.svg"
                svg.save(file)
                unedited.append(psnr(pixels_of(svg), resvg_render(file.read_text(), 256)))
                adam = torch.optim.Adam(svg.param_groups())
                generator = torch.Generator().manual_seed(0)
                for _ in range(20):
                    adam.zero_grad()
                    image = svg.render(svg.sample_view(generator))
                    (image * torch.randn(image.shape, generator=generator)).sum().backward()
                    adam.step()
                    svg.project_()
                svg.save(file)
                pixels = pixels_of(svg)
                edited.append(psnr(pixels, resvg_render(file.read_text(), 256)))
                again.append(psnr(pixels, pixels_of(SVG.load(file, size=256))))
        rows = []
        for what, db in (("unedited", unedited), ("after 20 random steps", edited), ("loaded again", again)):
            low = f"{np.percentile(db, 5):.1f} {min(db):.1f} dB"
            rows += [(f"{what}, median", f"{np.median(db):.2f} dB", ">= 45", bool(np.median(db) >= 45)),
                     (f"{what}, 5th percentile, worst", low, "", None)]
        missed += table(f"{path}: saved, resvg against our own render, {len(edited)} icons", rows)
    return missed
