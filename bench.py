"""Measurements behind the figures in the README; every command prints its figures beside their bars.

    python bench.py svg-fidelity ICONS.json...      # against resvg (icon sets, e.g. npm @iconify-json/noto)
    python bench.py svg-gradients                   # against finite differences
    python bench.py svg-speed                       # against plain autograd; memory; cost table; fits
    python bench.py svg-roundtrip ICONS.json...     # save, then resvg, against the own render
    python bench.py nerf-grid                       # the hash grid against nn.Embedding
    python bench.py nerf-fit SCENE --at 10 30 60    # PSNR over time, rays/s, memory
    python bench.py nerf-deferred SCENE             # deferred image gradients against direct ones; memory
    python bench.py splat-speed                     # 3D Gaussians against two plain formulations
    python bench.py splat-memory                    # what 10 000 of them add to a process
    python bench.py splat-fit SCENE --at 10 30 60   # PSNR over time, files
    python bench.py step                            # a PDS step: the network, and everything else
    python bench.py edits                           # every edit of examples/edits.txt with every loss: one table

Set OMP_NUM_THREADS=1 for figures of one core.
"""
import argparse
import contextlib
import csv
import io
import json
import logging
import math
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pds
import run
import svg_raster
from nerf import Camera, HashGrid, NeRF, Scene, View, evaluate, load_scene
from prior import Prior
from splat import Splats, project
from svg_raster import SVG, SVGError


def table(title, rows):
    """Print rows of (what, figure, bar, met: bool or None); returns the number of bars that were missed."""
    print(f"\n{title}")
    for what, figure, bar, met in rows:
        print(f"  {what:<46} {figure:>16}   {bar:<16} {'' if met is None else 'ok' if met else 'MISSED'}")
    return sum(met is False for *_, met in rows)


def svg_document(body, viewbox="0 0 32 32"):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{viewbox}">{body}</svg>')


def svg_load(text, **options):
    with tempfile.NamedTemporaryFile("w", suffix=".svg") as file:
        file.write(text)
        file.flush()
        return SVG.load(file.name, **options)


def svg_icons(path, count):
    """[(name, document)] of `count` icons of an iconify set, drawn by seed 0."""
    icons = json.loads(Path(path).read_text())
    names = sorted(icons["icons"])
    random.Random(0).shuffle(names)

    def document(icon):
        left, top, width, height = (icon.get(k, icons.get(k, d)) for k, d in
                                    (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
        return svg_document(icon["body"], f"{left} {top} {width} {height}")
    return [(name, document(icons["icons"][name])) for name in names[:count]]


def resvg_render(text, size, finer=1):
    """[size, size, 3] in [0, 1] from resvg, rendered `finer` times larger and averaged."""
    import resvg_py
    side = size * finer
    png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, background="#ffffff"))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float64) / 255
    return pixels.reshape(size, finer, size, finer, 3).mean((1, 3))


def svg_pixels(svg):
    """Own render as 8-bit colours [size, size, 3] in [0, 1]."""
    with torch.no_grad():
        return (svg.render()[0].permute(1, 2, 0) * 255).round().numpy().astype(np.float64) / 255


def psnr(a, b):
    """In dB, of two pictures in [0, 1]; 100 where they are the same."""
    return -10 * math.log10(max(((a - b) ** 2).mean(), 1e-10))


# ------------------------------------------------------------------ svg-fidelity

def svg_fidelity(args):
    missed = 0
    for path in args.icons:
        figures, finer, refused = [], [], []
        for name, text in svg_icons(path, args.count):
            try:
                svg, svg2 = svg_load(text, size=256), svg_load(text, size=256, ss=2)
            except SVGError as error:
                refused.append(f"{name}: {error}")
                continue
            figures.append((psnr(svg_pixels(svg), resvg_render(text, 256)), name))
            finer.append(psnr(svg_pixels(svg2), resvg_render(text, 256, 8)))
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
STROKED = '<path d="{}" fill="none" stroke="#333" {}/>'
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
    "clip path": (
        '<clipPath id="c"><circle cx="14" cy="15" r="9"/></clipPath><g clip-path="url(#c)" '
        'opacity=".8"><rect x="3.3" y="4.4" width="14" height="13" fill="#c33"/><path d="M8 8L30 12L11 '
        '27Z"/></g>'),
    "linear gradient": (
        f'<linearGradient id="a">{STOPS}</linearGradient><circle cx="14" cy="15" r="9.3" fill="url(#a)"/>'),
    "radial gradient": (
        f'<radialGradient id="a" fx=".3" fy=".4">{STOPS}</radialGradient><ellipse cx="14" cy="15" '
        'rx="9.3" ry="6" fill="url(#a)" transform="rotate(20 14 15)"/>'),
    "stroke of a curve": (
        '<path d="M4 5C20 3 25 11 22 18S12 30 5 22" fill="none" stroke="#333" stroke-width="3"/>'),
    "stroke, round": (
        '<path d="M5 5L20 8L9 20L26 25" fill="none" stroke="#333" stroke-width="3" '
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
        'stroke-dasharray="5 3 2"/>'),
}


def svg_gradient_errors(body, size=32, step=1e-5):
    """{parameter: (cosine, relative error)} of the gradient against central differences, in float64."""
    svg = svg_load(svg_document(body), size=size).double()
    weights = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss():
        return (svg.render()[0] * weights).sum()
    loss().backward()
    errors = {}
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
            exact = p.grad.view(-1)
            errors[name] = (cosine_of(exact, numeric), float((exact - numeric).norm() / numeric.norm()))
    return errors


def cosine_of(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def svg_gradients(_):
    rows = []
    for name, body in GRADIENT_CASES.items():
        bound = 0.999 if name.startswith("stroke") else 0.9999
        for parameter, (cosine, error) in svg_gradient_errors(body).items():
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
    return svg_document("".join(shapes), f"0 0 {canvas} {canvas}")


class PlainAutograd:
    """The same coverage and blending formulas, differentiated by autograd; stands in for both Functions."""

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
            for area, own, box in zip(plan.views(plan.parts(coverage)), rgba, plan.boxes):
                if (crops := svg_raster.overlap(box, (0, 0, plan.size, plan.size))) is not None:
                    back = canvas[crops[1]].clone()
                    canvas[crops[1]] = back + area * own[3] * (own[:3, None, None] - back)
            return canvas


def svg_step_time(svg, repeats=8):
    """Best seconds of forward plus backward."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        svg.render().square().sum().backward()
        best = min(best, time.perf_counter() - start)
    return best


def svg_coverage_time(svg, kind, repeats=10):
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


def memory_status(key):
    """MiB of the process, by a name of /proc/self/status: VmRSS now, VmHWM at most."""
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024


def peak_memory(call):
    """MiB by which a call raises the resident memory at most (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_status("VmRSS")
    call()
    return memory_status("VmHWM") - before


def svg_peak_memory(svg):
    svg_load(random_drawing(3, 20), size=256).render().sum().backward()        # what is loaded only once
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


def svg_fit(body, steps=100):
    """Mean squared error after `steps` Adam steps back from a perturbed drawing: points 2 px, colours 0.1."""
    svg = svg_load(svg_document(body, "0 0 128 128"), size=128)
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


def svg_speed(_):
    drawing = random_drawing(300, 20)
    svg = svg_load(drawing, size=256)
    memory = svg_peak_memory(svg)
    own = svg_step_time(svg)
    alone = svg_coverage_time(svg, svg_raster.Coverage)
    plain_alone = svg_coverage_time(svg, PlainAutograd.Coverage)
    saved = svg_raster.Coverage, svg_raster.Composite
    try:
        svg_raster.Coverage, svg_raster.Composite = PlainAutograd.Coverage, PlainAutograd.Composite
        plain = svg_step_time(svg)
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
        svg = svg_load(random_drawing(layers, radius), size=size)
        with torch.no_grad():
            segments, layer, *_ = svg.segments(size / svg.size)
            edge = float((segments[:, 2:] - segments[:, :2]).norm(dim=1).sum())
            frame = svg.boxes(segments @ torch.eye(4), layer, [0, 0, size, size])
        area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in frame)
        rows.append((layers, edge / 1e3, area / 1e6, size * size / 1e6, 1e3 * svg_step_time(svg, 5)))
    a = np.array(rows)
    cost = np.linalg.lstsq(a[:, :4] / a[:, 4:], np.ones(len(a)), rcond=None)[0]     # least relative error
    print("    layers  edges, kpx  boxes, Mpx  picture, Mpx       ms  linear model")
    for row in a:
        print("  {:8.0f} {:11.2f} {:11.3f} {:13.3f} {:8.2f} {:13.2f}".format(*row, row[:4] @ cost))
    print("  model: {:.0f} us a layer, {:.2f} ms a kpx of edges, {:.0f} ms a Mpx of boxes, "
          "{:.0f} ms a Mpx of picture".format(1e3 * cost[0], *cost[1:]))

    fits = []
    for name, (bar, body) in FITS.items():
        start, end = svg_fit(body)
        fits.append((f"{name}, from {start:.1e}", f"{end:.1e}", f"<= {bar:.0e}", end <= bar))
    return missed + table("100 Adam steps back from a perturbed drawing at 128 px, mean squared error", fits)


# ------------------------------------------------------------------ svg-roundtrip

def svg_roundtrip(args):
    missed = 0
    for path in args.icons:
        unedited, edited, again = [], [], []
        for name, text in svg_icons(path, args.count):
            try:
                svg = svg_load(text, size=256)
            except SVGError:
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "saved.svg"
                svg.save(file)
                unedited.append(psnr(svg_pixels(svg), resvg_render(file.read_text(), 256)))
                adam = torch.optim.Adam(svg.param_groups())
                generator = torch.Generator().manual_seed(0)
                for _ in range(20):
                    adam.zero_grad()
                    image = svg.render(svg.sample_view(generator))
                    (image * torch.randn(image.shape, generator=generator)).sum().backward()
                    adam.step()
                    svg.project_()
                svg.save(file)
                pixels = svg_pixels(svg)
                edited.append(psnr(pixels, resvg_render(file.read_text(), 256)))
                again.append(psnr(pixels, svg_pixels(SVG.load(file, size=256))))
        rows = []
        for what, db in (("unedited", unedited), ("after 20 random steps", edited), ("loaded again", again)):
            low = f"{np.percentile(db, 5):.1f} {min(db):.1f} dB"
            rows += [(f"{what}, median", f"{np.median(db):.2f} dB", ">= 45", bool(np.median(db) >= 45)),
                     (f"{what}, 5th percentile, worst", low, "", None)]
        missed += table(f"{path}: saved, resvg against the own render, {len(edited)} icons", rows)
    return missed


# ---- nerf.py --------------------------------------------------------------------------------------------

def cpu_time(call, repeats=9):
    """Median process CPU seconds of a call, after a first one."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]


class EmbeddingGrid(torch.nn.Module):
    """The formulation that most PyTorch ports use: an nn.Embedding a level, int64 entries, autograd's
    backward."""

    def __init__(self, grid):
        super().__init__()
        self.cells, self.dense, self.size = grid.cells, grid.dense, grid.size
        self.tables = torch.nn.ModuleList(
            torch.nn.Embedding.from_pretrained(grid.table.detach()[a:b].clone(), freeze=False)
            for a, b in zip(grid.start, grid.start[1:]))
        self.corner = torch.tensor([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)])

    def forward(self, x):
        """x [N,3] in [0,1] -> [N,2L]."""
        levels = []
        for cells, dense, entries in zip(self.cells, self.dense, self.tables):
            low = (x * cells).floor().long().clamp(max=cells - 1)
            share = (x * cells - low)[:, None]  # [N,1,3]
            corner = low[:, None] + self.corner  # [N,8,3]
            stride = (1, cells + 1, (cells + 1) ** 2) if dense else HashGrid.STRIDES
            entry = (corner * torch.tensor(stride)).sum(-1)
            entry = entry if dense else entry % self.size
            weight = torch.where(self.corner.bool(), share, 1 - share).prod(-1)  # [N,8]
            levels.append((entries(entry) * weight[..., None]).sum(1))
        return torch.stack(levels, 2).flatten(1)


def nerf_grid(args):
    rows = []
    for size in (2 ** 15, 2 ** 19):
        torch.manual_seed(0)
        ours = HashGrid(16, size, 16, 2048)
        ours.table.data.normal_()
        plain = EmbeddingGrid(ours)
        x = torch.rand(args.points, 3)
        x_ours, out_grad = x.T.contiguous(), torch.randn(32, args.points)

        def step(module, x, grad):
            module.zero_grad()
            out = module(x)
            out.backward(grad)
            return out.detach()
        a, b = step(ours, x_ours, out_grad), step(plain, x, out_grad.T)
        wanted = torch.cat([t.weight.grad for t in plain.tables])
        t_ours = cpu_time(lambda: step(ours, x_ours, out_grad))
        t_plain = cpu_time(lambda: step(plain, x, out_grad.T))
        error = ((ours.table.grad - wanted).norm() / wanted.norm()).item()
        name = f"T = 2^{size.bit_length() - 1}:"
        rows += [(f"{name} nn.Embedding, forward + backward", f"{t_plain * 1e3:.1f} ms", "", None),
                 (f"{name} HashGrid, forward + backward", f"{t_ours * 1e3:.1f} ms", "", None),
                 (f"{name} times faster", f"{t_plain / t_ours:.1f}", ">= 4", t_plain >= 4 * t_ours),
                 (f"{name} features differ by (relative)", f"{((a - b.T).norm() / b.norm()).item():.1e}", "<= 1e-6",
                  (a - b.T).norm() <= 1e-6 * b.norm()),
                 (f"{name} gradients differ by (relative)", f"{error:.1e}", "<= 1e-6", error <= 1e-6)]
    return table(f"hash grid, {args.points} points, 16 levels", rows)


def nerf_fit(args):
    scene, rows = load_scene(args.scene, args.downscale), []
    bars = dict(zip(args.at, args.bars or []))
    for seconds in args.at:
        nerf = NeRF.fit(scene, seconds=seconds, seed=args.seed, device=args.device)
        psnr, views = evaluate(nerf, scene)
        done = nerf.fitted
        bar = bars.get(seconds)
        print(f"test PSNR {psnr:.1f} dB, {views} views, {done['steps']} steps, {done['seconds']:.1f} s")
        rows.append((f"{seconds:g} s: test PSNR", f"{psnr:.2f} dB", f">= {bar}" if bar else "",
                     psnr >= bar if bar else None))
        rows.append((f"{seconds:g} s: training rays/s", f"{done['rays'] / done['seconds']:.0f}", "", None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("peak memory of the process", f"{peak:.0f} MB", "<= 1024 MB", peak <= 1024))
    return table(f"fits of {args.scene}, {len(scene.train)} training views", rows)


def gradients(nerf, size, deferred):
    """The gradient of a fixed random weighting of a picture, as one vector."""
    NeRF.chunk = 2048 if deferred else 10 ** 9
    weighting = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    nerf.zero_grad()
    (nerf.render(0, size) * weighting).mean().backward()
    return torch.cat([p.grad.flatten() for p in nerf.parameters()])


def nerf_deferred(args):
    scene = load_scene(args.scene)
    if args.only:  # in a process of its own, as an allocator keeps what it once had
        nerf = NeRF.load(args.nerf, scene)
        gradients(nerf, 32, True)  # what the first backward allocates once
        start = time.process_time()
        print(peak_memory(lambda: gradients(nerf, args.only, args.how == "deferred")), time.process_time() - start)
        return 0
    rows, peaks = [], {}
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        nerf = NeRF.fit(scene, seconds=args.seconds, progress=False)
        nerf.save(file.name)
        for size in (96, 128, 192):
            a, b = gradients(nerf, size, True), gradients(nerf, size, False)
            error = ((a - b).norm() / b.norm()).item()
            rows.append((f"{size} x {size}: gradients differ by (relative)", f"{error:.1e}", "<= 1e-5", error <= 1e-5))
        for how in ("direct", "deferred"):
            for size in (128, 256, 512):
                command = [sys.executable, __file__, "nerf-deferred", args.scene, "--only", str(size), "--how", how]
                out = subprocess.run([*command, "--nerf", file.name], stdout=subprocess.PIPE, text=True, check=True)
                peaks[how, size], spent = map(float, out.stdout.split()[-2:])
                figure = f"{peaks[how, size]:.0f} MiB, {spent:.2f} s"
                rows.append((f"{how} {size} x {size}: step adds, CPU time", figure, "", None))
    # float32: the picture, its weighting, their product and the gradient, 3 channels each; and the rays, 6
    pictures = (4 * 3 + 6) * 4 * (512 ** 2 - 128 ** 2) / 2 ** 20
    limit = 1.2 * peaks["deferred", 128] + pictures
    rows.append(("deferred: 512 x 512 against 128 x 128", f"{peaks['deferred', 512]:.0f} MiB", f"<= {limit:.0f} MiB",
                 peaks["deferred", 512] <= limit))
    return table(f"deferred against direct image gradients, {args.scene}", rows)


# ---- splat.py -------------------------------------------------------------------------------------------

def splat_camera(size):
    """4 in front of the origin, with a view of 40 degrees."""
    pose = torch.eye(4)[:3].clone()
    pose[2, 3] = 4
    focal = size / 2 / math.tan(math.radians(20))
    return Camera(pose, (focal, focal, size / 2, size / 2, 0, 0, 0, 0, 0, 0), size, size)


def splat_cloud(count, degree=1, seed=0):
    """Gaussians that fill a cube of half side 0.9, each as large as its share of it, give or take."""
    g = torch.Generator().manual_seed(seed)
    view = View(splat_camera(8), torch.zeros(8, 8, 4, dtype=torch.uint8), "none")
    scene = Scene(Path("none"), [view], [], torch.zeros(3), 1.0, True, torch.ones(3), "")
    size = math.log(0.6 / count ** (1 / 3))

    def draw(*shape):
        return torch.randn(*shape, generator=g)
    means = (torch.rand(count, 3, generator=g) * 2 - 1) * 0.9
    return Splats(scene, means, size + 0.4 * draw(count, 3), draw(count, 4), draw(count), draw(count, 3),
                  0.3 * draw(count, (degree + 1) ** 2 - 1, 3))


# ---- rivals: plain formulations, autograd's backward --------------------------------------------------

def ordered(splats, camera):
    """What both rivals need of the Gaussians in front of the camera, from near to far."""
    uv, depth, cov = project(splats.means, splats.log_scales, splats.quaternions, camera, splats.near)
    order = depth.argsort()
    order = order[depth[order] > splats.near]
    xx, xy, yy = cov[:, order]
    det = xx * yy - xy * xy
    return (uv[:, order], xx, xy, yy, torch.stack((yy, -xy, xx)) / det, splats.opacities[order].sigmoid(),
            splats.colours(camera)[order])


def blend(uv, conic, opacity, rgb, u, v):
    """[4,P]: every Gaussian at every one of P pixels."""
    dx, dy = u - uv[0, :, None], v - uv[1, :, None]  # [N,P]
    power = -0.5 * (conic[0, :, None] * dx * dx + conic[2, :, None] * dy * dy) - conic[1, :, None] * dx * dy
    alpha = (opacity[:, None] * power.exp()).clamp(max=0.99)
    alpha = torch.where(alpha > 1 / 255, alpha, 0)
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat((torch.ones_like(after[:1]), after[:-1]))
    return torch.cat((rgb.T @ (before * alpha), after[-1:]))


def dense(splats, camera, grad, part=1024):
    """Every Gaussian at every pixel. Pixels in parts, each with its own backward: the whole would not fit a cache.

    Returns the picture [4,H,W]; the gradients are added to the parameters, as are those of the others.
    """
    at = torch.arange(camera.width * camera.height)
    u, v = at % camera.width + 0.5, at // camera.width + 0.5
    uv, _, _, _, conic, opacity, rgb = ordered(splats, camera)
    inputs = (uv, conic, opacity, rgb)
    leaves = [x.detach().requires_grad_() for x in inputs]
    pictures = []
    for u, v, g in zip(u.split(part), v.split(part), grad.view(4, -1).split(part, 1)):
        picture = blend(*leaves, u, v)
        picture.backward(g)
        pictures.append(picture.detach())
    torch.autograd.backward(inputs, [x.grad for x in leaves])
    return torch.cat(pictures, 1).view(4, camera.height, camera.width)


def masked(splats, camera, grad, side=64):
    """A loop over tiles, each with the Gaussians whose square of 3 sigma touches it: what plain PyTorch ports do."""
    uv, xx, xy, yy, conic, opacity, rgb = ordered(splats, camera)
    radius = 3 * ((xx + yy) / 2 + (((xx - yy) / 2) ** 2 + xy * xy).sqrt()).sqrt()
    low, high = uv - radius, uv + radius
    picture = torch.zeros(4, camera.height, camera.width)
    for top in range(0, camera.height, side):
        for left in range(0, camera.width, side):
            touch = (high[0] > left) & (low[0] < left + side) & (high[1] > top) & (low[1] < top + side)
            at = torch.arange(side) + 0.5
            u, v = (left + at).repeat(side), (top + at).repeat_interleave(side)
            tile = blend(uv[:, touch], conic[:, touch], opacity[touch], rgb[touch], u, v)
            picture[:, top:top + side, left:left + side] = tile.view(4, side, side)
    picture.backward(grad)
    return picture.detach()


def tiled(splats, camera, grad):
    picture, _ = splats.draw(camera)
    picture.backward(grad)
    return picture.detach()


def timed(call, *args, repeats):
    """Process CPU seconds of the fastest call: what else runs on the machine only makes them slower."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call(*args)
        times.append(time.process_time() - start)
    return min(times)


def splat_speed(args):
    rows, view = [], splat_camera(args.size)
    grad = torch.randn(4, args.size, args.size, generator=torch.Generator().manual_seed(0))
    for count, bar in ((2000, 12), (10000, 35)):
        splats, results = splat_cloud(count), {}
        for way in (tiled, dense, masked):
            splats.zero_grad()
            results[way] = way(splats, view, grad), {n: p.grad.clone() for n, p in splats.named_parameters()}
        times = {way: timed(way, splats, view, grad, repeats=n) for way, n in ((tiled, 10), (dense, 2), (masked, 3))}
        name = f"{count}:"
        rows += [(f"{name} dense, forward + backward", f"{times[dense] * 1e3:.0f} ms", "", None),
                 (f"{name} loop over masked tiles of 64", f"{times[masked] * 1e3:.0f} ms", "", None),
                 (f"{name} splat.py", f"{times[tiled] * 1e3:.1f} ms", "", None),
                 (f"{name} times faster than dense", f"{times[dense] / times[tiled]:.0f}", f">= {bar}",
                  times[dense] >= bar * times[tiled]),
                 (f"{name} times faster than masked tiles", f"{times[masked] / times[tiled]:.0f}", f">= {bar}",
                  times[masked] >= bar * times[tiled])]
        error = (results[tiled][0] - results[dense][0]).abs().max().item()
        rows.append((f"{name} pictures differ by at most", f"{error:.1e}", "<= 5e-3", error <= 5e-3))
        errors = {n: ((g - results[dense][1][n]).norm() / results[dense][1][n].norm()).item()
                  for n, g in results[tiled][1].items()}
        worst = max(errors, key=errors.get)
        rows.append((f"{name} gradients, worst: {worst}", f"{errors[worst]:.1e}", "<= 1e-2", errors[worst] <= 1e-2))
    return table(f"splats at {args.size} x {args.size}, process CPU time", rows)


def splat_memory(args):
    if args.only:  # in a process of its own: the peak of a process never falls
        splats, view, grad = splat_cloud(args.only), splat_camera(args.size), torch.randn(4, args.size, args.size)
        tiled(splat_cloud(10), splat_camera(16), torch.randn(4, 16, 16))  # what the first backward allocates once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tiled(splats, view, grad)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return 0
    rows = []
    for count in (2000, 10000, 50000):
        out = subprocess.run([sys.executable, __file__, "splat-memory", "--size", str(args.size), "--only", str(count)],
                             capture_output=True, text=True, check=True).stdout
        rows.append((f"{count}: forward + backward add", f"{float(out):.0f} MB",
                     "<= 150 MB" if count == 10000 else "", float(out) <= 150 if count == 10000 else None))
    return table(f"memory at {args.size} x {args.size}, a process each", rows)


def splat_fit(args):
    scene, rows = load_scene(args.scene, args.downscale), []
    bars = dict(zip(args.at, args.bars or []))
    for seconds in args.at:
        splats = Splats.fit(scene, seconds=seconds, seed=args.seed, device=args.device)
        psnr, views = evaluate(splats, scene)
        done, bar = splats.fitted, bars.get(seconds)
        print(f"test PSNR {psnr:.1f} dB, {views} views, {done['steps']} steps, {done['seconds']:.1f} s")
        rows.append((f"{seconds:g} s: test PSNR", f"{psnr:.2f} dB", f">= {bar}" if bar else "",
                     psnr >= bar if bar else None))
        rows.append((f"{seconds:g} s: steps, Gaussians", f"{done['steps']}, {len(splats.means)}", "", None))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for suffix, bar in (".ply", 1e-6), (".splat", None):
            splats.save(Path(folder) / f"a{suffix}")
            again = Splats.load(Path(folder) / f"a{suffix}", scene, args.device)
            error = max((again.render(i) - splats.render(i)).abs().max().item() for i in range(len(scene.train)))
            rows.append((f"{suffix} loaded again: differs by at most", f"{error:.1e}", "<= 1e-6" if bar else "",
                         error <= bar if bar else None))
    return table(f"fits of {args.scene}, {len(scene.train)} training views", rows)


# ---- run.py ---------------------------------------------------------------------------------------------

def pds_step(args):
    """A PDS step of run.py taken apart: the network's forward, and everything else. Medians over the steps."""
    options = run.parse(["--mode", "svg", "--steps", str(args.steps)])
    prior = Prior.from_pretrained(options.model)
    options.input, options.source, options.target = run.HERE / "examples" / run.EXAMPLE["svg"][0], "a", "b"
    run.complete(options, prior)
    entered, left, eps = [], [], prior.eps

    def timed(*arguments):
        entered.append(time.perf_counter())
        out = eps(*arguments)
        left.append(time.perf_counter())
        return out
    prior.eps = timed
    with tempfile.TemporaryDirectory() as folder:
        scene, groups, source = run.LOAD["svg"](options, prior)
        run.edit(scene, groups, run.stages_of(scene, source, prior, "pds", options), prior, options, Path(folder))
    whole = np.median(np.diff(entered))
    network = np.median(np.subtract(left, entered))
    rest = np.median(np.subtract(entered[1:], left[:-1]))
    return table("a PDS step of run.py", [
        ("whole step, batch 1", f"{whole * 1e3:.1f} ms", "<= 150 ms", whole <= 0.15),
        ("the network's forward", f"{network * 1e3:.1f} ms", "", None),
        ("everything else", f"{rest * 1e3:.1f} ms", "", None),
        ("everything else / network", f"{rest / network:.2f}", "<= 1", rest <= network)])


# ---- the table of edits -----------------------------------------------------------------------------------

SIDE, THUMB, SCENE_THUMB = 256, 192, 160  # pixels a side: of what is measured, on a sheet, on the sheet of a scene
DECIMALS = {"log-odds": 2, "PSNR": 1, "SSIM": 3, "LPIPS": 3, "CLIP": 3, "dir": 3, "s": 1, "MB": 0}  # of the columns


def pixels(picture, side=SIDE):
    """PIL picture -> [1,3,side,side] float64 in [0,1]."""
    picture = picture.convert("RGB").resize((side, side), Image.LANCZOS)  # a picture of that size comes back as it is
    return torch.from_numpy(np.asarray(picture) / 255).permute(2, 0, 1)[None]


def ssim(a, b):
    """Structural similarity of two pictures [1,3,H,W] in [0,1] (Wang et al. 2004), 1 where they are the same.

    A Gaussian window of 11 pixels and sigma 1.5, K of 0.01 and 0.03; colours apart, the mean over all places where the
    window fits.
    """
    line = (-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5 ** 2)).exp()
    window, conv = (line / line.sum()).expand(3, 1, 1, 11), torch.nn.functional.conv2d

    def local(x):  # along the rows, then along the columns
        return conv(conv(x, window, groups=3), window.mT, groups=3)
    mean_a, mean_b, c1, c2 = local(a), local(b), 0.01 ** 2, 0.03 ** 2
    var_a, var_b, both = local(a * a) - mean_a ** 2, local(b * b) - mean_b ** 2, local(a * b) - mean_a * mean_b
    share = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return share.mean().item()


@torch.no_grad()
def log_odds(prior, x0, y_tgt, y_src, noises=8):
    """log p(y_tgt | x0) - log p(y_src | x0) of a latent x0 [1,C,h,w] with the usual uniform weights in place of the
    bound's: the diffusion classifier (Li et al., arXiv 2303.16203). Above 0 the picture reads as the target.

    The mean of |noise - eps(x_t, y_src)|^2 - |noise - eps(x_t, y_tgt)|^2, sums over the latent at guidance 1, over
    the same pairs of noise and timestep (0.2 T to 0.9 T) for every picture: what they share cancels.
    """
    T, generator = len(prior.abar), torch.Generator().manual_seed(0)
    t = torch.linspace(0.2 * T, 0.9 * T, noises).round().long().to(x0.device)
    noise = torch.randn(noises, *x0.shape[1:], generator=generator).to(x0)
    many = x0.expand(noises, -1, -1, -1)
    guidance, prior.guidance = prior.guidance, 1.0
    eps_tgt, eps_src = pds._predict(prior, t, noise, (many, y_tgt), (many, y_src))
    prior.guidance = guidance
    return ((noise - eps_src).square() - (noise - eps_tgt).square()).sum((1, 2, 3)).mean().item()


class Clip:
    """CLIP of transformers; name: a directory or hub id. Raises ValueError where there is none."""

    def __init__(self, name, device):
        from transformers import CLIPModel, CLIPProcessor
        quiet = logging.getLogger("huggingface_hub")
        level, _ = quiet.level, quiet.setLevel(logging.CRITICAL)
        try:
            model, info = CLIPModel.from_pretrained(name, output_loading_info=True)
            self.processor = CLIPProcessor.from_pretrained(name)
        except Exception as e:  # as in prior.py: the libraries below have an error each, all meaning the same
            where = "damaged, or no CLIP" if Path(name).exists() else "no such directory, and no CLIP on the hub"
            raise ValueError(f"{name}: {where}: {(str(e).strip() or type(e).__name__).splitlines()[0][:200]}") from e
        finally:
            quiet.setLevel(level)
        if info["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"{name}: damaged, or no CLIP: {len(info['missing_keys'])} of its weights are missing")
        self.name, self.device, self.model = name, device, model.eval().to(device)

    @torch.no_grad()
    def scores(self, before, after, source, target):
        """CLIP score and directional score of an edit, means over its pictures; before, after: lists of PIL pictures.

        The first is the cosine of the picture after and the target; the second that of the two changes, after - before
        and target - source (Gal et al., StyleGAN-NADA, arXiv 2108.00946), all embeddings of length 1.
        """
        inputs = self.processor(text=[source, target], images=[*before, *after], return_tensors="pt", padding=True,
                                truncation=True)
        out, cosine = self.model(**inputs.to(self.device)), torch.nn.functional.cosine_similarity
        was, now = out.image_embeds.chunk(2)
        y_src, y_tgt = out.text_embeds.chunk(2)
        return cosine(now, y_tgt).mean().item(), cosine(now - was, y_tgt - y_src).mean().item()


def perceptual():
    """LPIPS (Zhang et al., arXiv 1801.03924) of two pictures [1,3,H,W] in [0,1]; None where its package is missing."""
    try:
        import lpips
    except ImportError:
        return None
    net = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    return lambda a, b: net(a.float() * 2 - 1, b.float() * 2 - 1).item()


def figures(prior, before, after, source, target, lpips=None, clip=None):
    """What an edit did, {column: figure}; before, after: lists of PIL pictures, over which the mean is taken."""
    y_tgt, y_src = prior.embed(target), prior.embed(source)

    def odds(picture):
        with torch.no_grad():
            return log_odds(prior, prior.encode(pixels(picture, prior.size)), y_tgt, y_src)
    pairs = [(pixels(a), pixels(b)) for a, b in zip(before, after)]
    row = {"before": np.mean([odds(p) for p in before]), "log-odds": np.mean([odds(p) for p in after]),
           "PSNR": np.mean([psnr(a, b) for a, b in pairs]), "SSIM": np.mean([ssim(a, b) for a, b in pairs])}
    if lpips:
        row["LPIPS"] = np.mean([lpips(a, b) for a, b in pairs])
    if clip:
        row["CLIP"], row["dir"] = clip.scores(before, after, source, target)
        row["clip"] = clip.name
    return {k: v if k == "clip" else float(v) for k, v in row.items()}


def restart_peak(device):
    """Count the peak of memory anew, where that can be done: on a CUDA device and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    """Peak memory in MB since restart_peak: of the CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if Path("/proc/self/status").exists():
        return memory_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def read_edits(path):
    """A list of edits -> [(mode, file, source, target, folder)], the folder for its results.

    A line is `mode | file | source prompt | target prompt`, the file's path relative to the list; # begins a comment.
    Raises ValueError with the number of the first wrong line.
    """
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip() or line.lstrip()[0] == "#":
            continue
        mode, file, source, target = parts if len(parts := [p.strip() for p in line.split("|")]) == 4 else [""] * 4
        place = path.parent / file
        folder = f"{mode}/{place.stem}-{re.sub(r'[^a-z0-9]+', '-', target.lower())}"
        wrong = ("need mode | file | source prompt | target prompt" if not (mode and file and source and target) else
                 f"mode {mode!r} is none of {', '.join(run.LOAD)}" if mode not in run.LOAD else
                 f"{place}: no such {'folder' if mode in run.FITTED else 'file'}"
                 if not (place.is_dir() if mode in run.FITTED else place.is_file()) else
                 f"its results would lie in {folder} with another edit's" if folder in (f for *_, f in found) else None)
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}")
        found.append((mode, place, source, target, folder))
    return found


def edit_row(prior, loss, options, out, lpips, clip):
    """One edit in `out`, unless it stands there from the same settings; returns its figures, {column: figure}."""
    config = json.loads(json.dumps(run.settings(options, prior, loss)))
    done, row = out / "config.json", {}
    if (out / "row.json").exists() and done.exists():
        same = json.loads(done.read_text()) | {"versions": config["versions"]} == config
        row = json.loads((out / "row.json").read_text()) if same else {}
    if not row:
        (out / "row.json").unlink(missing_ok=True)  # an interruption must not leave the figures of another run here
        if options.mode in run.FITTED:
            run.fit(options)  # kept in options.fit, so that its seconds are not the loss's
        print(out)
        restart_peak(prior.device)
        started = time.perf_counter()
        run.run_one(prior, loss, options, out)
        row = {"s": time.perf_counter() - started, "MB": peak(prior.device)}
    lacking = "before" not in row or lpips and "LPIPS" not in row or clip and row.get("clip") != clip.name
    if lacking:
        before, after = (squares(out / name) for name in ("source.png", "result.png"))
        row |= figures(prior, before, after, options.source, options.target, lpips, clip)
        run.write(out / "row.json", json.dumps(row, indent=1) + "\n")
    return row


def squares(path):
    """The pictures that stand beside each other in a file."""
    page = Image.open(path).convert("RGB")
    return [page.crop((x, 0, x + page.height, page.height)) for x in range(0, page.width, page.height)]


def losses_of(mode, losses):
    """Those that the mode allows: the editors of pictures have no drawing to go on with."""
    return [name for name in losses if mode in run.EDITABLE or name not in run.EDITORS]


def edits(args):
    """Every edit of the list with every loss, one seed, the model's own settings: a table, and a sheet a mode."""
    plan = [edit for edit in read_edits(args.list) if edit[0] in (args.only or run.LOAD)]
    if not plan:
        raise ValueError(f"{args.list}: no edit{' of mode ' + ', '.join(args.only) if args.only else ''} in it")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    prior = Prior.from_pretrained(args.model, run.parse([]).device)
    defaults, rows = prior.defaults, []
    clip, lpips = Clip(args.clip, prior.device) if args.clip else None, perceptual()
    for mode, file, source, target, folder in plan:
        options = run.parse(["--mode", mode, f"--svg={file}", f"--source={source}", f"--target={target}",
                             f"--model={args.model}", f"--seed={args.seed}", f"--fit-seconds={args.fit_seconds}"])
        out = args.out / folder
        options.fit = out.parent / f"{file.stem}-{mode}-fit.pt"
        options.steps = args.steps
        prior.defaults = defaults  # run.complete lays those of a mode over it, and they are not the next one's
        run.complete(options, prior)
        for loss in losses_of(mode, args.losses):
            try:
                row = edit_row(prior, loss, options, out / loss, lpips, clip)
            except FloatingPointError as e:
                raise FloatingPointError(f"{folder}: {e}") from e
            rows.append({"mode": mode, "file": file.name, "source": source, "target": target, "loss": loss,
                         "folder": folder} | row)
    columns = [c for c in DECIMALS if c not in ("LPIPS", "CLIP", "dir") or (lpips if c == "LPIPS" else clip)]
    print_edits(rows, columns)
    with io.StringIO(newline="") as text:
        names = ["mode", "file", "source", "target", "loss", "before", *columns]
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        run.write(args.out / "table.csv", text.getvalue())
    for mode in dict.fromkeys(row["mode"] for row in rows):
        run.write(args.out / f"{mode}.png", edits_sheet([row for row in rows if row["mode"] == mode], args.out))
        print(f"done: {args.out / f'{mode}.png'}")
    return 0


def print_edits(rows, columns):
    """The means over the edits of a mode, a line a loss; before them the log-odds of the sources."""
    first = f"{'mode':<6} {'loss':<7} {'edits':>5} {'log-odds':>9} {'read':>6}"
    print("\n" + first + "".join(f" {c:>7}" for c in columns[1:]))
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        for loss in ["source", *dict.fromkeys(row["loss"] for row in own)]:
            group = [row for row in own if row["loss"] == (own[0]["loss"] if loss == "source" else loss)]
            odds = [row["before" if loss == "source" else "log-odds"] for row in group]
            rest = "" if loss == "source" else "".join(
                f" {np.mean([row[c] for row in group]):>7.{DECIMALS[c]}f}" for c in columns[1:])
            read = f"{sum(x > 0 for x in odds)}/{len(odds)}"
            print(f"{mode:<6} {loss:<7} {len(group):>5} {np.mean(odds):>9.2f} {read:>6}{rest}")


def edits_sheet(rows, out):
    """One page of the edits of a mode: source and losses beside each other, of a scene one under another."""
    pages, scenes = [], rows[0]["mode"] in run.FITTED
    size = (SCENE_THUMB if scenes else THUMB,) * 2
    for folder in dict.fromkeys(row["folder"] for row in rows):
        own = [row for row in rows if row["folder"] == folder]
        files = [out / folder / own[0]["loss"] / "source.png"] + [out / folder / r["loss"] / "result.png" for r in own]
        pictures = [[p.resize(size, Image.LANCZOS) for p in squares(file)] for file in files]
        names = ["source"] + [run.TITLES[row["loss"]] for row in own]
        prompts = [own[0]["source"]] + [own[0]["target"]] * len(own)
        pages.append([*zip(names, prompts, pictures)] if scenes else
                     (" ", f"{prompts[0]}: {', '.join(names[1:])} to {prompts[1]}", [p for p, in pictures]))
    if scenes:
        return run.beside([run.sheet(page) for page in pages])
    if len(pages) > 1 and len(pages) % 2:
        pages.append((" ", "", [Image.new("RGB", size, "white")] * len(pages[0][2])))
    half = -(-len(pages) // 2)
    return run.beside([run.sheet(part) for part in (pages[:half], pages[half:]) if part])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, measure, help_line):
        added = commands.add_parser(name, help=help_line)
        added.set_defaults(measure=measure)
        return added.add_argument
    for name, measure, help_line in (("svg-fidelity", svg_fidelity, "PSNR of renders against resvg"),
                                     ("svg-roundtrip", svg_roundtrip, "save, render with resvg, compare")):
        a = command(name, measure, help_line)
        a("icons", nargs="+", help="icons.json of an iconify set")
        a("--count", type=int, default=200, help="icons of each set (default 200)")
    command("svg-gradients", svg_gradients, "gradients against finite differences")
    command("svg-speed", svg_speed, "time, memory, cost table, fits")
    a = command("nerf-grid", nerf_grid, "the hash grid against nn.Embedding")
    a("--points", type=int, default=20000)
    for name, measure, help_line in (("nerf-fit", nerf_fit, "PSNR over time, rays/s, memory of fits"),
                                     ("splat-fit", splat_fit, "PSNR over time; the files of the last fit")):
        a = command(name, measure, help_line)
        a("scene")
        a("--at", type=float, nargs="+", default=[10, 30, 60], help="seconds of process CPU time, a fit each")
        a("--bars", type=float, nargs="+", help="PSNR that each must reach")
        a("--downscale", type=int, default=1)
        a("--seed", type=int, default=0)
        a("--device", default="cpu")
    a = command("splat-speed", splat_speed, "against a dense formulation and a loop over tiles")
    a("--size", type=int, default=128, help="of the picture, a multiple of 64")
    a = command("splat-memory", splat_memory, "peak memory of a forward and a backward")
    a("--size", type=int, default=128)
    a("--only", type=int, help=argparse.SUPPRESS)
    a = command("nerf-deferred", nerf_deferred, "deferred image gradients against direct ones; memory")
    a("scene")
    a("--seconds", type=float, default=10, help="of the fit")
    for hidden, kind in (("--only", int), ("--how", str), ("--nerf", str)):
        a(hidden, type=kind, help=argparse.SUPPRESS)
    a = command("step", pds_step, "a PDS step of run.py")
    a("--steps", type=run.number(int, 3), default=200)
    a = command("edits", edits, "every edit of a list with every loss: one table, a sheet a mode")
    a("--list", type=Path, default=run.HERE / "examples" / "edits.txt", help="the edits (default: examples/edits.txt)")
    a("--losses", nargs="+", choices=[*run.LOSSES, *run.EDITORS], default=["sds", "dds", "pds"],
      help="default: sds dds pds")
    a("--only", nargs="+", choices=run.LOAD, help="edits of these modes alone")
    a("--model", default=str(run.HERE / "models" / "emoji"), help="diffusers directory or hub id")
    a("--clip", help="CLIP, directory or hub id: adds its score and its directional score")
    a("--steps", type=run.number(int, 1), help="of every edit (default: the model's own)")
    a("--seed", type=run.number(int, 0), default=0)
    a("--fit-seconds", type=run.number(float, 0), default=60.0, help="of a scene's fit, made once (default: 60)")
    a("--out", type=Path, default=Path("out/edits"), help="what stands there is not made again (default: out/edits)")
    args = parser.parse_args(argv)
    return run.exit_code("bench.py", lambda: 1 if args.measure(args) else 0)


if __name__ == "__main__":
    sys.exit(main())
