"""Runs killed at random moments (SIGKILL): the result of --resume is bit-identical to that of an uninterrupted run.

Only edits are killed; scenes are fitted beforehand, because a fit ends by the clock and no two fits take the same
number of steps. A run is a forked process, in which the program and its libraries are already loaded.
"""
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import run
from bench.ball import write_scene
from files import sheets
from pipelines.loading import quiet

SCENE = ["--source", "red apple", "--target", "green apple", "--fit-seconds", "0.5", "--steps", "6"]
SMALL = {"FRAMES": 2, "FRAME_SIZE": 24, "SIDE_SIZE": 24, "VIEWS": 4}  # few and small pictures on the sheets
RUNS = {  # every kind of run with tiny settings
    "svg": ["--mode", "svg", "--steps", "30"],
    "image": ["--mode", "image", "--steps", "40"],
    "nerf": ["--mode", "nerf", *SCENE], "splat": ["--mode", "splat", *SCENE],
    "in2n": ["--mode", "splat", *SCENE, "--loss", "in2n", "--steps", "12"],
    "refine": ["--mode", "nerf", *SCENE, "--refine", "12"],
    "compare": ["--mode", "image", "--steps", "15", "--compare", "sds", "pds"]}
SKIPPED = ("checkpoint.pt", "config.json", "index.html", "fit.png")  # hold times and paths; of the fit


def kills(args):
    """Kill and resume args.count runs, print how each ended, and return how many were not bit-identical."""
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder, quiet():  # the first run imports what all need
        whole = {}
        for i in range(args.count):
            kind = list(RUNS)[i % len(RUNS)]
            place = Path(folder) / kind
            if kind not in whole:
                whole[kind] = whole_run(kind, place)
            at = rng.uniform(0.05, 1) * whole[kind]
            wrong = kill_and_resume(kind, place, at)
            failed += bool(wrong)
            print(f"{kind:8} killed after {at:4.1f} of {whole[kind]:4.1f} s: {wrong or 'bit-identical'}", flush=True)
    return failed


def start(kind, out, *flags):
    """Fork a run with its output in `out` and its messages in `out`.txt; a scene lies beside `out`. Returns its id."""
    scene = ["--scene", str(out.parent / "scene")] if SCENE[0] in RUNS[kind] else []
    if process := os.fork():
        return process
    code = 1
    try:
        for name, value in SMALL.items():
            setattr(sheets, name, value)
        log = open(out.with_suffix(".txt"), "w")
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = run.main([*RUNS[kind], *scene, "--every", "2", "--device", "cpu", "--out", str(out), *flags])
    finally:
        os._exit(code)


def finish(process, out):
    """Wait for the end of a run; raises ValueError with its messages if it failed."""
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise ValueError(f"{out}: exit code {code}: {out.with_suffix('.txt').read_text()[-300:]}")


def whole_run(kind, place):
    """Make the uninterrupted run in place/whole, for a scene after its fit; returns its seconds."""
    out = place / "whole"
    place.mkdir(parents=True)
    if SCENE[0] in RUNS[kind]:
        (place / "scene").mkdir()
        write_scene(place / "scene", size=24)
        finish(start(kind, out, "--fit-only"), out)
    started = time.perf_counter()
    finish(start(kind, out), out)
    return time.perf_counter() - started


def kill_and_resume(kind, place, seconds):
    """Kill a run after so many seconds and resume it; returns an error or the files that differ, "" if none do."""
    out = place / "killed"
    shutil.rmtree(out, ignore_errors=True)
    process = start(kind, out)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    try:
        finish(start(kind, out, "--resume"), out)
    except ValueError as e:
        return str(e)
    first, again = (files_of(folder) for folder in (place / "whole", out))
    return ", ".join(sorted(name for name in first.keys() | again.keys() if first.get(name) != again.get(name)))


def files_of(folder):
    """{name: bytes} of all results in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in SKIPPED}
