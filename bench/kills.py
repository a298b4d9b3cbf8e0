"""Runs killed at random moments (SIGKILL): the result of --resume is bit-identical to that of an uninterrupted run.

Scenes are fitted before: a fit ends by a clock, so that no two fits take the same number of steps. Edits, which count
their steps, are killed.
"""
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.fuzz_scenes import write_scene

ROOT = Path(__file__).resolve().parent.parent
SCENE = ["--source", "red apple", "--target", "green apple", "--fit-seconds", "0.5", "--steps", "6"]
SMALL = """import sys
from files import sheets
sheets.FRAMES, sheets.FRAME_SIZE, sheets.SIDE_SIZE, sheets.VIEWS = 2, 24, 24, 4
import run
sys.exit(run.main())"""  # few and small pictures in the report
RUNS = {  # every kind of run with tiny settings
    "svg": ["--mode", "svg", "--steps", "30"],
    "image": ["--mode", "image", "--steps", "40"],
    "nerf": ["--mode", "nerf", *SCENE], "splat": ["--mode", "splat", *SCENE],
    "in2n": ["--mode", "splat", *SCENE, "--loss", "in2n", "--steps", "12"],
    "refine": ["--mode", "nerf", *SCENE, "--refine", "12"],
    "compare": ["--mode", "image", "--steps", "15", "--compare", "sds", "pds"]}
SKIPPED = ("checkpoint.pt", "config.json")  # they hold times and paths


def kills(args):
    """Kill and resume args.count runs, print how each ended, and return how many were not bit-identical."""
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
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
    """Start a run with its output in `out`, beside the folders `scene` (fitted) and `code` (a copy of the program).

    The first run makes the copy, so that edits in the repository do not change the later runs.
    """
    code = out.parent / "code"
    if not code.exists():
        code.mkdir(parents=True)
        for file in [*ROOT.glob("*.py"), *ROOT.glob("[!em]*/*.py")]:  # no examples, no models
            (code / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(file, code / file.relative_to(ROOT))
        for name in ("models", "examples"):
            (code / name).symlink_to(ROOT / name)
    scene = ["--scene", str(out.parent / "scene")] if SCENE[0] in RUNS[kind] else []
    call = [sys.executable, "-c", SMALL, *RUNS[kind], *scene, "--every", "2", "--device", "cpu", "--out", str(out),
            *flags]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=code)


def whole_run(kind, place):
    """Make the uninterrupted run in place/whole, for a scene after its fit; returns its seconds."""
    if SCENE[0] in RUNS[kind]:
        (place / "scene").mkdir(parents=True)
        write_scene(place / "scene", size=24)
        finish(start(kind, place / "whole", "--fit-only"))
    started = time.perf_counter()
    finish(start(kind, place / "whole"))
    return time.perf_counter() - started


def finish(process):
    """Wait for the end of a run; raises ValueError with its error output if it failed."""
    told = process.communicate()[1]
    if process.returncode:
        raise ValueError(f"{' '.join(process.args)}: exit code {process.returncode}: {told[-300:]}")


def kill_and_resume(kind, place, seconds):
    """Kill a run after so many seconds and resume it; returns an error or the files that differ, "" if none do."""
    out = place / "killed"
    shutil.rmtree(out, ignore_errors=True)
    process = start(kind, out)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    try:
        finish(start(kind, out, "--resume"))
    except ValueError as e:
        return str(e)
    first, again = (files_of(folder) for folder in (place / "whole", out))
    return ", ".join(sorted(name for name in first.keys() | again.keys() if first.get(name) != again.get(name)))


def files_of(folder):
    """{name: bytes} of all results in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in SKIPPED}
