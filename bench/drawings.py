"""The drawings of examples/edits.txt by PDS in other ways: several views a step, and a flow as prior."""
import copy

import torch

import run
from bench.edits import read_edits
from bench.geometry import measured
from bench.measure import table
from pipelines.flow import Flow, sigmas_of
from prior import Prior

# --batch, and how much larger than its own the rates are
BATCHES = [(1, 0.5), (2, 0.5), (2, 1), (2, 1.5), (4, 1), (4, 2)]


def batch(args):
    """--batch N at equal numbers of views, timesteps and noises: N times fewer steps, each of N of them."""
    prior, rows = Prior.from_pretrained(args.model), []
    drawings = [edit[1:4] for edit in read_edits(run.HERE / "examples" / "edits.txt", ["svg"])]
    own = run.complete(run.parse(["--mode", "svg"]), prior)
    for count, factor in BATCHES:
        steps = round(own.steps * own.batch * args.share / count)
        flags = ["--batch", str(count), "--steps", str(steps), "--points", str(own.points * factor),
                 "--colours", str(own.colours * factor), "--seed", str(args.seed)]
        found = [measured(prior, *drawing, flags)[0] for drawing in drawings]
        rows.append((f"N = {count}, {steps} steps, rates times {factor:.2g}", *means_of(found), None))
        print(*rows[-1][:3], flush=True)
    return table("log-odds / PSNR to the source, means over the drawings of examples/edits.txt", rows)


class AsFlow:
    """The UNet of a prior as a model of flow matching: the same noise predictions at the noise levels of a flow."""

    def __init__(self, network, shift):
        self.network, self.known = network, network.abar.log().flip(0)  # from noise to picture
        self.abar = Flow(sigmas_of(shift=shift)).abar

    def __getattr__(self, name):
        return getattr(self.network, name)

    def eps(self, x_t, t, y):
        """At the timestep between two of the UNet's own that has the noise of t."""
        level, known = self.abar[t.cpu()].log(), self.known
        above = torch.searchsorted(known, level).clamp(1, len(known) - 1)
        share = ((level - known[above - 1]) / (known[above] - known[above - 1])).clamp(0, 1)
        return self.network.predict(x_t, (len(known) - above - share).float(), y)

    def share_of(self, t):
        """Which share of the flow's timesteps has the noise of the share t of the UNet's."""
        return (self.abar - self.network.abar[round(t * 1000)]).abs().argmin().item() / len(self.abar)


def flow(args):
    """PDS with a flow as prior, by its coefficients, over the drawings of examples/edits.txt."""
    prior, rows = Prior.from_pretrained(args.model), []
    drawings = [edit[1:4] for edit in read_edits(run.HERE / "examples" / "edits.txt", ["svg"])]
    own = run.complete(run.parse(["--mode", "svg"]), prior)
    for shift in (1.0, 3.0):
        told = copy.copy(prior)
        told.network = AsFlow(prior.network, shift)
        told.abar = told.network.abar
        known = {"t-min": own.t_min, "t-max": own.t_max}
        ends = (f"--{end}={told.network.share_of(t)}" for end, t in known.items())
        flags = [*ends, "--seed", str(args.seed)]
        for kind in ("official", "consistent"):
            found = [measured(told, *drawing, [*flags, "--coefficients", kind])[0] for drawing in drawings]
            rows.append((f"a flow of shift {shift:g}, {kind}", *means_of(found), None))
            print(*rows[-1][:3], flush=True)
    return table("log-odds / PSNR to the source, means over the drawings of examples/edits.txt", rows)


def means_of(found):
    """Figures from `measured` -> their means, and how many read as the target, as two texts."""
    odds, kept = ([row[key] for row in found] for key in ("odds", "PSNR"))
    return f"{sum(odds) / len(odds):.2f} / {sum(kept) / len(kept):.2f} dB", f"{sum(o > 0 for o in odds)} read"
