"""Time of a PDS step of run.py: the network and everything else."""
import tempfile
import time
from pathlib import Path

import numpy as np

import run
from bench.measure import table
from edit import edit, stages_of
from prior import Prior


def step(args):
    """Median times of a PDS step of run.py: the whole step, the network's forward pass, and everything else."""
    options = run.parse(["--mode", "svg", "--steps", str(args.steps)])
    prior = Prior.from_pretrained(options.model)
    options.input, options.source, options.target = run.HERE / "examples" / run.EXAMPLE["svg"][0], "a", "b"
    options = run.complete(options, prior)
    entered, left, eps = [], [], prior.eps

    def timed(*arguments):
        entered.append(time.perf_counter())
        out = eps(*arguments)
        left.append(time.perf_counter())
        return out
    prior.eps = timed
    with tempfile.TemporaryDirectory() as folder:
        scene, groups, source = run.LOAD["svg"](options, prior)
        edit(scene, groups, stages_of(scene, source, prior, "pds", options), prior, options, Path(folder))
    whole = np.median(np.diff(entered))
    network = np.median(np.subtract(left, entered))
    rest = np.median(np.subtract(entered[1:], left[:-1]))
    return table("a PDS step of run.py", [
        ("whole step, batch 1", f"{whole * 1e3:.1f} ms", "<= 150 ms", whole <= 0.15),
        ("the network's forward", f"{network * 1e3:.1f} ms", "", None),
        ("everything else", f"{rest * 1e3:.1f} ms", "", None),
        ("everything else / network", f"{rest / network:.2f}", "<= 1", rest <= network)])
