"""NeRF: the hash grid against nn.Embedding, the PSNR of fits, deferred against direct gradients, steps of an edit."""
import contextlib
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
import nerf as nerf_module
from nerf import Field, HashGrid, NeRF, SampledField, _Interpolate
from scene.reading import load_scene
from scene.representation import evaluate

ROOT = Path(__file__).resolve().parent.parent
CHUNK = NeRF.chunk


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


def grid(args):
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


def fits(args, representation, figure):
    """Fits of args.scene, one for each of the times args.at.

    Args:
        representation: the class.
        figure: called with what was fitted for (what, figure) of one more row.
    Returns:
        the last one; the rows of `table`, and their title.
    """
    scene, rows = load_scene(args.scene, args.downscale), []
    bars = dict(zip(args.at, args.bars or []))
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
    """The gradient of a fixed random weighting of a picture, as one vector."""
    NeRF.chunk = CHUNK if deferred else 10 ** 9
    weighting = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    nerf.zero_grad()
    (nerf.render(0, size) * weighting).mean().backward()
    return torch.cat([p.grad.flatten() for p in nerf.parameters()])


def deferred(args):
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
    """Within it `note(arguments, result, CPU seconds)` follows each call of owner.name, a function or static method."""
    call = vars(owner)[name]
    plain = getattr(owner, name)

    def told(*args, **keywords):
        start = time.process_time()
        out = plain(*args, **keywords)
        note(args, out, time.process_time() - start)
        return out
    setattr(owner, name, staticmethod(told) if isinstance(call, staticmethod) else told)
    try:
        yield
    finally:
        setattr(owner, name, call)


def edit(args):
    """The rendering of an edit's step, as edit.py asks for it: samples, forward, backward, the share of each stage."""
    scene = load_scene(args.scene, args.downscale)
    nerf = NeRF.fit(scene, seconds=args.fit_seconds, seed=args.seed, checkpoint=args.kept)
    psnr, _ = evaluate(nerf, scene)
    frame = Frame(args.size, square=not args.whole)
    nerf.learn_from(frame)
    nerf.project_()
    lean, views = nerf.lean, range(0, len(scene.train), math.ceil(len(scene.train) / 10))

    def step(view):
        """A picture, its gradient as a vector, and the CPU seconds that each of the two took."""
        nerf.zero_grad()
        start = time.process_time()
        picture = nerf.render(view, frame)
        forward = time.process_time() - start
        weighted = (picture * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))).mean()
        start = time.process_time()
        weighted.backward()
        return (picture.detach(), torch.cat([p.grad.flatten() for p in nerf.parameters()]), forward,
                time.process_time() - start)

    def steps(name, how, bar=None):
        """The steps of all views, drawn as `how`, and their rows."""
        counts, nerf.lean = dict.fromkeys(("in occupied cells", "of some weight", "with a gradient"), 0), how

        def found(_, out, __):
            counts["in occupied cells"] += out[-1]
            counts["with a gradient"] += out[0].shape[1]
            counts["of some weight"] += 0 if how else out[0].shape[1]

        def joined(args, *_):
            counts["of some weight"] += len(args[0])
        step(views[0])  # what the first one allocates
        with watched(NeRF, "find", found), watched(nerf_module, "joined", joined):
            drawn = [step(view) for view in views]
        rays = sum(picture[0, 0].numel() for picture, *_ in drawn)
        forward, backward = (sorted(d[i] for d in drawn)[len(drawn) // 2] for i in (2, 3))
        rows = [(f"{name}: samples a ray {key}", f"{number / rays:.1f}", "", None) for key, number in counts.items()]
        rows += [(f"{name}: forward, backward, CPU seconds", f"{forward:.3f}, {backward:.3f}", "", None),
                 (f"{name}: both", f"{forward + backward:.3f} s", f"<= {bar} s" if bar else "",
                  forward + backward <= bar if bar else None)]
        return drawn, rows
    drawn, rows = steps("a step", lean, 0.2)
    if lean:
        full, others = steps("with all samples", None)
        error = sum((a[0] - b[0]).square().mean().item() for a, b in zip(drawn, full)) / len(full)
        cosine = sum(torch.cosine_similarity(a[1], b[1], 0).item() for a, b in zip(drawn, full)) / len(full)
        rows += [*others, ("a step's picture to that with all samples", f"{-10 * math.log10(error):.1f} dB", ">= 40 dB",
                           error <= 1e-4), ("cosine of the two gradients", f"{cosine:.3f}", "", None)]
    nerf.lean, spent = lean, {}
    with contextlib.ExitStack() as clocks:
        for owner, name in ((SampledField, "march"), (HashGrid, "forward"), (Field, "density"),
                            (Field, "colour"), (nerf_module, "joined"),
                            (_Interpolate, "backward")):
            def note(_, __, seconds, name=name):
                spent[name] = spent.get(name, 0.0) + seconds
            clocks.enter_context(watched(owner, name, note))
        whole = sum(forward + backward for *_, forward, backward in map(step, views))
    for name, what in (("march", "march"), ("forward", "hash grid"), ("density", "density"), ("joined", "joining"),
                       ("colour", "colour"), ("backward", "hash grid, backward")):
        if name in spent:
            rows.append((f"share of a step: {what}", f"{100 * spent[name] / whole:.0f} %", "", None))
    title = f"steps of an edit of {args.scene}, {args.size} px, {len(views)} views"
    return table(f"{title}, a fit of {args.fit_seconds:g} s with {psnr:.2f} dB", rows)
