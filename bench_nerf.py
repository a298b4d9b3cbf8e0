"""Measurements of nerf.py; every command prints its figures beside their bars.

    python bench_nerf.py grid                       # against nn.Embedding
    python bench_nerf.py fit examples/apple --at 10 30 60   # PSNR over time, rays/s, memory
    python bench_nerf.py deferred examples/apple    # against direct gradients; memory

Set OMP_NUM_THREADS=1 for figures of one core.
"""
import argparse
import resource
import subprocess
import sys
import time

import torch

from bench import table
from nerf import HashGrid, NeRF, evaluate, load_scene


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


def fit(args):
    scene, rows = load_scene(args.scene, args.downscale), []
    bars = dict(zip(args.at, args.bars or []))
    for seconds in args.at:
        nerf = NeRF.fit(scene, seconds=seconds, seed=args.seed, device=args.device)
        psnr, views = evaluate(nerf, scene)
        done = nerf.fitted
        bar = bars.get(seconds)
        print(f"test PSNR {psnr:.1f} dB, {views} views, {done['steps']} steps, {done['seconds']:.1f} s")
        rows.append((f"{seconds:g} s: test PSNR", f"{psnr:.2f} dB", f">= {bar}" if bar else "", psnr >= bar if bar else None))
        rows.append((f"{seconds:g} s: training rays/s", f"{done['rays'] / done['seconds']:.0f}", "", None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("peak memory of the process", f"{peak:.0f} MB", "<= 1024 MB", peak <= 1024))
    return table(f"fits of {args.scene}, {len(scene.train)} training views", rows)


def gradients(nerf, size, deferred):
    """The gradient of a fixed random weighting of a picture, as one vector; peak memory growth in MB."""
    NeRF.chunk = 4096 if deferred else 10 ** 9
    weighting = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    nerf.zero_grad()
    (nerf.render(0, size) * weighting).mean().backward()
    return torch.cat([p.grad.flatten() for p in nerf.parameters()])


def deferred(args):
    scene = load_scene(args.scene)
    if args.only:  # in a process of its own: the peak of a process never falls
        nerf = NeRF.load(args.nerf, scene)
        gradients(nerf, 32, True)  # what the first backward allocates once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        gradients(nerf, args.only, args.how == "deferred")
        spent = time.process_time() - start
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, before / 1024, spent)
        return 0
    import tempfile
    rows = []
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        nerf = NeRF.fit(scene, seconds=args.seconds, progress=False)
        nerf.save(file.name)
        for size in (64, 128, 192):
            a, b = gradients(nerf, size, True), gradients(nerf, size, False)
            error = ((a - b).norm() / b.norm()).item()
            rows.append((f"{size} x {size}: gradients differ by (relative)", f"{error:.1e}", "<= 1e-5", error <= 1e-5))
        peaks = {}
        for how in ("direct", "deferred"):
            for size in (128, 256, 512):
                out = subprocess.run([sys.executable, __file__, "deferred", args.scene, "--only", str(size), "--how", how,
                                      "--nerf", file.name], capture_output=True, text=True, check=True).stdout.split()
                grown, base, spent = map(float, out[-3:])
                # whole process, and what the step alone adds to it
                rows.append((f"{how} {size} x {size}: step adds, CPU time", f"{grown:.0f} MB, {spent:.2f} s", "", None))
                peaks[how, size] = grown + base
    pictures = 4 * 3 * 4 * (512 ** 2 - 128 ** 2) / 2 ** 20 + 6 * 4 * 512 ** 2 / 2 ** 20  # a few copies, and the rays
    for size in (128, 512):
        rows.append((f"deferred {size} x {size}: peak of the process", f"{peaks['deferred', size]:.0f} MB", "", None))
    limit = 1.2 * peaks["deferred", 128] + pictures
    rows.append(("deferred: 512 x 512 against 128 x 128", f"{peaks['deferred', 512]:.0f} MB", f"<= {limit:.0f} MB",
                 peaks["deferred", 512] <= limit))
    return table(f"deferred against direct image gradients, {args.scene}", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("grid", help="the hash grid against nn.Embedding")
    p.add_argument("--points", type=int, default=20000)
    p.set_defaults(run=grid)
    p = commands.add_parser("fit", help="PSNR over time, rays/s, memory of fits")
    p.add_argument("scene")
    p.add_argument("--at", type=float, nargs="+", default=[10, 30, 60], help="seconds of process CPU time, a fit each")
    p.add_argument("--bars", type=float, nargs="+", help="PSNR that each must reach")
    p.add_argument("--downscale", type=float, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.set_defaults(run=fit)
    p = commands.add_parser("deferred", help="deferred against direct image gradients")
    p.add_argument("scene")
    p.add_argument("--seconds", type=float, default=10, help="of the fit")
    for hidden, kind in (("--only", int), ("--how", str), ("--nerf", str)):
        p.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    p.set_defaults(run=deferred)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
