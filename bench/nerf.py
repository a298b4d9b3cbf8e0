"""NeRF: the hash grid against nn.Embedding, the PSNR of fits, deferred against direct gradients, steps of an edit."""
import contextlib
import functools
import itertools
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.measure import cpu_time, peak_memory, table
from files.pictures import Frame
from nerf import Field, NeRF, SampledField
from scene.grid import HashGrid, _Interpolate
from scene.reading import load_scene
from scene.representation import evaluate

ROOT = Path(__file__).resolve().parent.parent
CHUNK = NeRF.chunk


class EmbeddingGrid(torch.nn.Module):
    """The formulation of most PyTorch ports: one nn.Embedding per level, int64 entries, autograd's backward pass."""

    def __init__(self, grid):
        super().__init__()
        self.cells, self.dense, self.size = grid.cells, grid.dense, grid.size
        self.tables = torch.nn.ModuleList(
            torch.nn.Embedding.from_pretrained(grid.table.detach()[a:b].clone(), freeze=False)
            for a, b in itertools.pairwise(grid.start))
        self.corner = torch.tensor([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)])

    def forward(self, x):
        """x [N,3] in [0,1] -> [N,2L]."""
        levels = []
        for cells, dense, entries in zip(self.cells, self.dense, self.tables, strict=True):
            low = (x * cells).floor().long().clamp(max=cells - 1)
            share = (x * cells - low)[:, None]  # [N,1,3]
            corner = low[:, None] + self.corner  # [N,8,3]
            stride = (1, cells + 1, (cells + 1) ** 2) if dense else HashGrid.STRIDES
            entry = (corner * torch.tensor(stride)).sum(-1)
            entry = entry if dense else entry % self.size
            weight = torch.where(self.corner.bool(), share, 1 - share).prod(-1)  # [N,8]
            levels.append((entries(entry) * weight[..., None]).sum(1))
        return torch.stack(levels, 2).flatten(1)


def step(module, x, grad):
    """Run the forward and backward pass of a grid; returns the features."""
    module.zero_grad()
    out = module(x)
    out.backward(grad)
    return out.detach()


def grid(args):
    rows = []
    for size in (2 ** 15, 2 ** 19):
        torch.manual_seed(0)
        ours = HashGrid(16, size, 16, 2048)
        ours.table.data.normal_()
        plain = EmbeddingGrid(ours)
        x = torch.rand(args.points, 3)
        out_grad = torch.randn(32, args.points)
        inputs = {ours: (ours, x.T.contiguous(), out_grad), plain: (plain, x, out_grad.T)}
        a, b = step(*inputs[ours]), step(*inputs[plain])
        wanted = torch.cat([t.weight.grad for t in plain.tables])
        t_ours, t_plain = (cpu_time(functools.partial(step, *inputs[module])) for module in (ours, plain))
        error = ((ours.table.grad - wanted).norm() / wanted.norm()).item()
        name = f"T = 2^{size.bit_length() - 1}:"
        rows += [(f"{name} nn.Embedding, forward + backward", f"{t_plain * 1e3:.1f} ms", "", None),
                 (f"{name} HashGrid, forward + backward", f"{t_ours * 1e3:.1f} ms", "", None),
                 (f"{name} speed-up", f"{t_plain / t_ours:.1f}", ">= 4", t_plain >= 4 * t_ours),
                 (f"{name} features differ by (relative)", f"{((a - b.T).norm() / b.norm()).item():.1e}", "<= 1e-6",
                  (a - b.T).norm() <= 1e-6 * b.norm()),
                 (f"{name} gradients differ by (relative)", f"{error:.1e}", "<= 1e-6", error <= 1e-6)]
    return table(f"hash grid, {args.points} points, 16 levels", rows)


def fits(args, representation, figure):
    """Fits of args.scene, one for each of the times args.at.

    Args:
        representation: the class.
        figure: function of a fitted model that returns (description, value) of one more row.
    Returns:
        The last model, the rows of `table`, and their title.
    """
    scene, rows = load_scene(args.scene, args.downscale), []
    bars = dict(zip(args.at, args.bars or [], strict=False))
    for seconds in args.at:
        fitted = representation.fit(scene, seconds=seconds, seed=args.seed, device=args.device)
        psnr, views = evaluate(fitted, scene)
        done, bar = fitted.fitted, bars.get(seconds)
        print(f"test PSNR {psnr:.1f} dB, {views} views, {done['steps']} steps, {done['seconds']:.1f} s")
        what, text = figure(fitted)
        rows += [(f"{seconds:g} s: test PSNR", f"{psnr:.2f} dB", f">= {bar}" if bar else "",
                  psnr >= bar if bar else None),
                 (f"{seconds:g} s: {what}", text, "", None)]
    return fitted, rows, f"fits of {args.scene}, {len(scene.train)} training views"


def fit(args):
    def speed(nerf):
        return "training rays/s", f"{nerf.fitted['rays'] / nerf.fitted['seconds']:.0f}"
    _, rows, title = fits(args, NeRF, speed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("peak memory of the process", f"{peak:.0f} MB", "<= 1024 MB", peak <= 1024))
    return table(title, rows)


def gradients(nerf, size, deferred):
    """The gradient of a randomly weighted mean of a picture, as one vector."""
    NeRF.chunk = CHUNK if deferred else 10 ** 9
    weighting = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    nerf.zero_grad()
    (nerf.render(0, size) * weighting).mean().backward()
    return torch.cat([p.grad.flatten() for p in nerf.parameters()])


def deferred(args):
    scene = load_scene(args.scene)
    if args.only:  # in a process of its own, as an allocator keeps freed memory
        nerf = NeRF.load(args.nerf, scene)
        gradients(nerf, 32, True)  # the first backward pass allocates memory once
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
                command = [sys.executable, "-m", "bench", "nerf-deferred", str(Path(args.scene).resolve()),
                           "--only", str(size), "--how", how, "--nerf", file.name]
                out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                peaks[how, size], spent = map(float, out.stdout.split()[-2:])
                figure = f"{peaks[how, size]:.0f} MiB, {spent:.2f} s"
                rows.append((f"{how} {size} x {size}: step adds, CPU time", figure, "", None))
    # float32: the picture, its weighting, their product and the gradient, 3 channels each; and the rays, 6
    pictures = (4 * 3 + 6) * 4 * (512 ** 2 - 128 ** 2) / 2 ** 20
    limit = 1.2 * peaks["deferred", 128] + pictures
    rows.append(("deferred: 512 x 512 against 128 x 128", f"{peaks['deferred', 512]:.0f} MiB", f"<= {limit:.0f} MiB",
                 peaks["deferred", 512] <= limit))
    return table(f"deferred against direct image gradients, {args.scene}", rows)


@contextlib.contextmanager
def watched(owner, name, note):
    """Context in which note(arguments, result, CPU seconds) is called after each call of owner.name, static or not."""
    call = vars(owner)[name]
    plain = getattr(owner, name)

    def timed(*args, **keywords):
        start = time.process_time()
        out = plain(*args, **keywords)
        note(args, out, time.process_time() - start)
        return out
    setattr(owner, name, staticmethod(timed) if isinstance(call, staticmethod) else timed)
    try:
        yield
    finally:
        setattr(owner, name, call)


def edit(args):
    """Rendering in a step of an edit, as edit.py requests it: samples, forward, backward, the share of each stage."""
    scene = load_scene(args.scene, args.downscale)
    nerf = NeRF.fit(scene, seconds=args.fit_seconds, seed=args.seed, checkpoint=args.kept)
    psnr, _ = evaluate(nerf, scene)
    frame = Frame(args.size, square=not args.whole)
    nerf.learn_from(frame)
    nerf.project_()
    views = range(0, len(scene.train), math.ceil(len(scene.train) / 10))
    marched, kept, spent = [], [], {}

    def step(view):
        """CPU seconds of the forward and of the backward pass of a picture."""
        nerf.zero_grad()
        start = time.process_time()
        picture = nerf.render(view, frame)
        forward = time.process_time() - start
        weighted = (picture * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))).mean()
        start = time.process_time()
        weighted.backward()
        return forward, time.process_time() - start

    def found(_, samples, __):
        marched.append(samples.marched)
        kept.append(len(samples.t))
    step(views[0])  # warm-up: allocates memory
    with watched(NeRF, "find", found):
        times = [step(view) for view in views]
    rays = sum(camera.width * camera.height for camera in (nerf.camera(view, frame) for view in views))
    forward, backward = (sorted(column)[len(times) // 2] for column in zip(*times, strict=True))
    rows = [("samples a ray in occupied cells", f"{sum(marched) / rays:.1f}", "", None),
            ("samples a ray with a gradient", f"{sum(kept) / rays:.1f}", "", None),
            ("a step: forward, backward, CPU seconds", f"{forward:.3f}, {backward:.3f}", "", None),
            ("a step: both", f"{forward + backward:.3f} s", "<= 0.2 s", forward + backward <= 0.2)]
    stages = {"march": (SampledField, "march"), "hash grid": (HashGrid, "forward"), "density": (Field, "density"),
              "colour": (Field, "colour"), "hash grid, backward": (_Interpolate, "backward")}
    with contextlib.ExitStack() as clocks:
        for name, (owner, function) in stages.items():
            def note(_, __, seconds, name=name):
                spent[name] = spent.get(name, 0.0) + seconds
            clocks.enter_context(watched(owner, function, note))
        whole = sum(sum(step(view)) for view in views)
    rows += [(f"share of a step: {name}", f"{100 * spent[name] / whole:.0f} %", "", None) for name in stages]
    title = f"steps of an edit of {args.scene}, {args.size} px, {len(views)} views"
    return table(f"{title}, a fit of {args.fit_seconds:g} s with {psnr:.2f} dB", rows)
