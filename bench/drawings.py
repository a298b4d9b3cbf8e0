"""Edits of the drawings in examples/edits.txt by variants of PDS: several views a step, and a flow as prior."""
import copy

import torch

import run
from bench.edits import read_edits
from bench.geometry import measured
from bench.measure import table
from pipelines.flow import Flow, sigmas_of
from prior import Prior

# --batch, and the factor on its learning rates
BATCHES = [(1, 0.5), (2, 0.5), (2, 1), (2, 1.5), (4, 1), (4, 2)]


def batch(args):
    """--batch N at equal numbers of views, timesteps and noises: N in each of N times fewer steps."""
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
    """A prior's UNet as a flow matching model: the same noise predictions at the noise levels of a flow."""

    def __init__(self, network, shift):
        self.network, self.known = network, network.abar.log().flip(0)  # from noise to picture
        self.abar = Flow(sigmas_of(shift=shift)).abar

    def __getattr__(self, name):
        return getattr(self.network, name)

    def eps(self, x_t, t, y):
        """The noise prediction at the UNet's (fractional) timestep with the noise level of t."""
        level, known = self.abar[t.cpu()].log(), self.known
        above = torch.searchsorted(known, level).clamp(1, len(known) - 1)
        share = ((level - known[above - 1]) / (known[above] - known[above - 1])).clamp(0, 1)
        return self.network.predict(x_t, (len(known) - above - share).float(), y)

    def share_of(self, t):
        """The share of the flow's timesteps at the noise level of the share t of the UNet's."""
        return (self.abar - self.network.abar[round(t * 1000)]).abs().argmin().item() / len(self.abar)


def flow(args):
    """PDS with a flow as prior, by kind of coefficients, over the drawings of examples/edits.txt."""
    prior, rows = Prior.from_pretrained(args.model), []
    drawings = [edit[1:4] for edit in read_edits(run.HERE / "examples" / "edits.txt", ["svg"])]
    own = run.complete(run.parse(["--mode", "svg"]), prior)
    for shift in (1.0, 3.0):
        as_flow = copy.copy(prior)
        as_flow.network = AsFlow(prior.network, shift)
        as_flow.abar = as_flow.network.abar
        known = {"t-min": own.t_min, "t-max": own.t_max}
        ends = (f"--{end}={as_flow.network.share_of(t)}" for end, t in known.items())
        flags = [*ends, "--seed", str(args.seed)]
        for kind in ("official", "consistent"):
            found = [measured(as_flow, *drawing, [*flags, "--coefficients", kind])[0] for drawing in drawings]
            rows.append((f"a flow of shift {shift:g}, {kind}", *means_of(found), None))
            print(*rows[-1][:3], flush=True)
    return table("log-odds / PSNR to the source, means over the drawings of examples/edits.txt", rows)


def means_of(found):
    """Figures from `measured` -> two texts: their means, and how many edits read as the target."""
    odds, kept = ([row[key] for row in found] for key in ("odds", "PSNR"))
    return f"{sum(odds) / len(odds):.2f} / {sum(kept) / len(kept):.2f} dB", f"{sum(o > 0 for o in odds)} read"
