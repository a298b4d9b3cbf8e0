"""Effects of an edit on the geometry of drawings: self-intersections and broken smooth joints."""
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import run
from bench import svg
from bench.edits import read_edits
from bench.figures import figures
from bench.front import PAPER
from bench.measure import peak_memory, table
from edit import edit, stages_of
from files.sheets import snapshot
from loop.optimiser import SteadyAdam
from prior import Prior

JUDGED = ("PSNR", "IoU", "named", "turn")  # figures of an edit, see bench/edits.py


def outlines(svg, points):
    """The subpaths of all shapes: [(control points [n,4,2] float64 of cubics, closed)]; a line is (p, p, q, q)."""
    found = []
    for shape in svg.document.shapes:
        if shape.element is not None:
            own = points[shape.first:shape.first + len(shape.outline.points)].double()
            found += [(own[torch.tensor(shape.outline.curves[start:stop])], closed)
                      for start, stop, _, closed in shape.outline.drawn()]
    return found


def self_intersections(svg, points, chords=8):
    """The number of self-intersections, with each curve as `chords` chords; neighbouring chords do not count."""
    t = torch.linspace(0, 1, chords + 1, dtype=torch.float64)[:, None]
    weights = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3], 1)
    count = 0
    for curves, _ in outlines(svg, points):
        lines = torch.stack([torch.cat([(weights @ c)[:-1], (weights @ c)[1:]], 1) for c in curves]).view(-1, 2, 2)
        a, d = lines[:, 0], lines[:, 1] - lines[:, 0]
        a, d = (x[d.norm(dim=1) > 1e-9] for x in (a, d))
        def cross(u, v):
            return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
        way, turn = a - a[:, None], cross(d[:, None], d)
        s, u = cross(way, d.expand_as(way)) / turn, cross(way, d[:, None].expand_as(way)) / turn
        inside = (s > -1e-9) & (s < 1 - 1e-9) & (u > -1e-9) & (u < 1 - 1e-9)  # a chord owns its start
        count += int(inside.triu(2).sum())
    return count


def joint_angles(svg, points):
    """The angle in degrees by which the outline turns at each joint of two curves; NaN if a side has no length."""
    angles = []
    for curves, closed in outlines(svg, points):
        ways = (curves[:, None, 3] - curves[:, :3]).flip(1), curves[:, 1:] - curves[:, :1]  # nearest arm first
        first = [(w.norm(dim=2) > 1e-6).to(torch.int64).argmax(1) for w in ways]
        at_end, at_start = (w[torch.arange(len(w)), i] for w, i in zip(ways, first, strict=False))
        follows = at_start.roll(-1, 0)
        cosine = (at_end * follows).sum(1) / (at_end.norm(dim=1) * follows.norm(dim=1))
        angles.append(torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))[:len(curves) if closed else len(curves) - 1])
    return torch.cat(angles) if angles else torch.zeros(0)


def measured(prior, file, source, target, flags):
    """Edit a drawing by PDS with these flags: figures {"odds", *JUDGED, "crossings", "kinks"}, and the picture."""
    options = run.parse(["--mode", "svg", f"--svg={file}", f"--source={source}", f"--target={target}", *flags])
    options = run.complete(options, prior)
    scene, groups, original = run.LOAD["svg"](options, prior)
    rest = scene.points.detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        edit(scene, groups, stages_of(scene, original, prior, "pds", options), prior, options, Path(folder))
    now = scene.points.detach()
    before, after = snapshot(original, 512), snapshot(scene, 512)
    row = figures(prior, [before], [after], options)
    broken = (joint_angles(scene, rest) < 5) & (joint_angles(scene, now) > 30)
    return dict(odds=row["log-odds"], **{key: row[key] for key in JUDGED}, kinks=int(broken.sum()),
                crossings=self_intersections(scene, now) - self_intersections(scene, rest)), after


def geometry(args):
    """The defaults against free points, over the drawings of examples/edits.txt."""
    prior = Prior.from_pretrained(args.model)
    drawings = [edit[1:4] for edit in read_edits(run.HERE / "examples" / "edits.txt", ["svg"])]
    ways = {"smooth": args.flags, "free": [*args.flags, *PAPER]}
    found = {way: [] for way in ways}
    for file, source, target in drawings:
        for way, flags in ways.items():
            row, _ = measured(prior, file, source, target, flags)
            found[way].append(row)
            print(f"{file.stem:14} {way:7} log-odds {row['odds']:6.2f}  PSNR {row['PSNR']:5.2f} dB  "
                  f"crossings {row['crossings']:+4d}  kinks {row['kinks']:3d}  IoU {row['IoU']:.3f}  "
                  f"named {row['named']:.0f}  turn {row['turn']:+.3f}", flush=True)
    total = {way: {k: sum(row[k] for row in rows) for k in rows[0]} for way, rows in found.items()}
    smooth, free, n = total["smooth"], total["free"], len(drawings)
    lost = sum(a["odds"] < 0 <= b["odds"] for a, b in zip(found["smooth"], found["free"], strict=False))
    share, gain = smooth["odds"] / free["odds"], (smooth["PSNR"] - free["PSNR"]) / n
    def count(key):
        return f"{smooth[key]} of {free[key]}"
    return table(f"{n} drawings, the defaults against {' '.join(PAPER)}", [
        ("self-intersections gained", count("crossings"), "<= a tenth", smooth["crossings"] <= free["crossings"] / 10),
        ("smooth joints broken", count("kinks"), "<= a tenth", smooth["kinks"] <= free["kinks"] / 10),
        ("mean log-odds", f"{smooth['odds'] / n:.2f}, {free['odds'] / n:.2f}", ">= 65 %", share >= 0.65),
        ("drawings that no longer read", f"{lost}", "0", lost == 0),
        ("mean PSNR gained", f"{gain:+.2f} dB", ">= 0.8 dB", math.isfinite(gain) and gain >= 0.8),
        ("named by the judge", f"{smooth['named']:.0f}, {free['named']:.0f}", "", None),
        ("mean turn, by the judge", f"{smooth['turn'] / n:.3f}, {free['turn'] / n:.3f}", "", None),
        ("mean IoU of the silhouettes", f"{smooth['IoU'] / n:.3f}, {free['IoU'] / n:.3f}", "", None)])


def field(args):
    """A step of a drawing of many paths with the smooth field and with free points, each in its own process."""
    if args.way:
        scene = svg.load(svg.random_drawing(args.paths, 4), size=256)
        adam = SteadyAdam(scene.param_groups(shared=args.way == "smooth"))

        def step():
            adam.zero_grad()
            scene.render().square().sum().backward()
            adam.step()
            scene.project_()
            return time.perf_counter()
        svg.load(svg.random_drawing(3, 20), size=256).render().sum().backward()  # loads libraries before measuring

        def all_steps():
            if args.way == "smooth":
                scene.restrict()
                adam.fields = scene.fields(8.0)
            step()
        memory, start = peak_memory(all_steps), step()
        times = [start, *(step() for _ in range(6))]
        print(min(b - a for a, b in zip(times, times[1:], strict=False)), memory)
        return 0
    figures = {}
    for way in ("free", "smooth"):
        command = [sys.executable, "-m", "bench", "svg-field", "--paths", str(args.paths), "--way", way]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=run.HERE)
        figures[way] = [float(x) for x in out.stdout.split()]
    (free, free_memory), (smooth, smooth_memory) = figures["free"], figures["smooth"]
    return table(f"{args.paths} paths on 256 px: forward, backward and a step", [
        ("free points", f"{free * 1e3:.0f} ms, {free_memory:.0f} MiB", "", None),
        ("smooth field", f"{smooth * 1e3:.0f} ms, {smooth_memory:.0f} MiB", "", None),
        ("ratio of times", f"{smooth / free:.2f}", "<= 1.5", smooth <= 1.5 * free),
        ("ratio of memory", f"{smooth_memory / free_memory:.2f}", "<= 1.5", smooth_memory <= 1.5 * free_memory)])
