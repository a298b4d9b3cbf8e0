"""The method in the plane: SDS, DDS and PDS move samples of p(x0 | y=1) to p(x0 | y=2).

    python toy.py                       # or python run.py --mode toy; writes toy.png and toy.svg

Both distributions are Gaussian mixtures, so the noise prediction is exact and nothing is trained: the picture shows
the losses alone. SDS forgets where a sample came from, nothing holds DDS back, PDS stops near the boundary. Two more
rows are printed: PDS without its identity term, which is a weighted DDS, and PDS on the same distributions as a flow.
"""
import argparse
import copy
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import pds
from files.messages import Parser
from pipelines.flow import Flow, sigmas_of
from pipelines.networks import STABLE_DIFFUSION_ABAR

STEPS, POINTS, RATE, GUIDANCE = 1000, 60, 0.05, 3.0


class Mixtures:
    """An exact prior for pds.py: Y conditions, each a mixture of K equal Gaussians of deviation `sigma`.

    means: [Y,K,2]. A prompt is the number of its condition, [B] or [1]; a point of the plane is a latent [B,2,1,1].
    """

    def __init__(self, means, sigma=0.35, guidance=1.0):
        self.abar, self.means, self.sigma, self.guidance = STABLE_DIFFUSION_ABAR, means, sigma, guidance

    def at(self, scale):
        """This prior with another guidance scale."""
        twin = copy.copy(self)
        twin.guidance = scale
        return twin

    def log_density(self, x, means, abar=None):
        """log p(x_t) [B] of x [B,2] at noise levels abar [B] (None: 1, the data), and its gradient [B,2]."""
        abar = torch.ones(len(x), dtype=x.dtype) if abar is None else abar
        var = (abar * self.sigma ** 2 + 1 - abar)[:, None]  # [B,1]
        away = abar.sqrt()[:, None, None] * means - x[:, None]  # [B,K,2]
        parts = -away.square().sum(-1) / (2 * var) - (2 * math.pi * var).log() - math.log(means.shape[-2])
        share = parts.softmax(1)[..., None]
        return parts.logsumexp(1), (share * away).sum(1) / var

    def eps(self, x_t, t, y):
        """-sqrt(1 - abar) times the score of the noised mixture, with classifier-free guidance."""
        abar, x = self.abar[t], x_t.flatten(1).double()
        _, cond = self.log_density(x, self.means[y].expand(len(x), -1, -1), abar)
        _, uncond = self.log_density(x, self.means.flatten(0, 1).expand(len(x), -1, -1), abar)
        score = uncond + self.guidance * (cond - uncond)
        return (-(1 - abar).sqrt()[:, None] * score).to(x_t.dtype).view_as(x_t)


class MixtureFlow(Flow):
    """The same distributions as a flow matching model with the exact velocity, the mean of eps - x0 given x_sigma."""

    def __init__(self, mixtures, sigmas):
        super().__init__(sigmas)
        self.means, self.sigma, self.guidance = mixtures.means, mixtures.sigma, mixtures.guidance
        self.log_density = mixtures.log_density

    at = Mixtures.at

    def plain(self, x, sigma, means):
        """[B,2] for x [B,2], sigma [B,1] and means [K,2] or [B,K,2]: the parts' means, weighted by their shares."""
        away = x[:, None] - (1 - sigma[:, None]) * means  # [B,K,2]
        var = (1 - sigma) ** 2 * self.sigma ** 2 + sigma ** 2  # [B,1]
        share = (-away.square().sum(-1) / (2 * var)).softmax(1)[..., None]
        eps = sigma / var * (share * away).sum(1)
        x0 = (share * means).sum(1) + (1 - sigma) * self.sigma ** 2 / var * (share * away).sum(1)
        return eps - x0

    def velocity(self, x, sigma, y):
        shape, x, sigma = x.shape, x.flatten(1).double(), sigma.double()[:, None]
        cond = self.plain(x, sigma, self.means[y].expand(len(x), -1, -1))
        uncond = self.plain(x, sigma, self.means.flatten(0, 1))
        return (uncond + self.guidance * (cond - uncond)).view(shape)


def world():
    """The two conditions: three blobs on the left, three on the right, as mirror images."""
    left = torch.tensor([[-1.1, 1.2], [-1.9, 0.0], [-1.1, -1.2]], dtype=torch.float64)
    return Mixtures(torch.stack((left, left * torch.tensor([-1.0, 1.0]))), guidance=GUIDANCE)


def trajectories(prior, loss, seed=0, **options):
    """Gradient descent of POINTS samples of condition 0 towards condition 1: their paths [STEPS + 1, POINTS, 2]."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(prior.means.shape[1], (POINTS,), generator=generator)
    x0_src = prior.means[0, part] + prior.sigma * torch.randn(POINTS, 2, generator=generator, dtype=torch.float64)
    x0_src = x0_src.view(POINTS, 2, 1, 1)
    x0_tgt, path = x0_src.clone().requires_grad_(), [x0_src.view(POINTS, 2)]
    y_tgt, y_src = torch.tensor([1]), torch.tensor([0])
    for step in range(STEPS):
        value = loss(prior, x0_tgt, x0_src, y_tgt, y_src, generator=generator, **options) * POINTS
        grad, = torch.autograd.grad(value, x0_tgt)
        with torch.no_grad():
            x0_tgt -= RATE * (1 - step / STEPS) * grad
        path.append(x0_tgt.detach().view(POINTS, 2).clone())
    return torch.stack(path)


def between(t_min, t_max):
    """pds_loss with timesteps in t_min T .. t_max T."""
    def loss(prior, x0_tgt, *others, generator=None, **options):
        t = pds.sample_timesteps(len(x0_tgt), len(prior.abar), t_min, t_max, generator=generator)
        return pds.pds_loss(prior, x0_tgt, *others, t=t, generator=generator, **options)
    return loss


def figures(prior, path):
    """Means over all samples: distance to the source, log-likelihood under the target, its log-odds to the source."""
    end = path[-1]
    target, source = (prior.log_density(end, m.expand(len(end), -1, -1))[0] for m in prior.means.flip(0))
    return (end - path[0]).norm(dim=1).mean().item(), target.mean().item(), (target - source).mean().item()


SIDE, EDGE = 360, 4.4  # side of a panel in pixels, half of it in units of the plane
PANELS = {"SDS": (pds.sds_loss, {}), "DDS": (pds.dds_loss, {}), "PDS": (pds.pds_loss, {}),
          "PDS, psi = 0": (pds.pds_loss, {"coefficients": "consistent"})}  # only printed


def place(panel, x, y):
    """A point of the plane in pixels of a panel, clamped to its edges."""
    x, y = (min(max(value / EDGE, -1), 1) for value in (x, y))
    return panel * SIDE + SIDE / 2 * (1 + x), SIDE / 2 * (1 - y)


def marks(prior, paths):
    """The picture as a list of (kind, points in pixels, colour, width, radius or text)."""
    found = []
    for panel, (name, path) in enumerate(paths.items()):
        left, before, after = panel * SIDE, "#2f5fd0", "#d9480f"
        for radius, tints in ((2, ("#e8eefc", "#fdece2")), (1, ("#c9d8f8", "#fad3bd"))):  # 2 and 1 deviations
            found += [("dot", [place(panel, *mean)], tint, radius * prior.sigma / EDGE * SIDE / 2)
                      for means, tint in zip(prior.means.tolist(), tints, strict=True) for mean in means]
        found.append(("line", [(left + SIDE / 2, 0), (left + SIDE / 2, SIDE)], "#bbbbbb", 1))
        found += [("line", [place(panel, *p) for p in points[::5]], "#8a8a8a", 0.7)
                  for points in path.transpose(0, 1).tolist()]
        for points, colour in ((path[0], before), (path[-1], after)):
            found += [("dot", [place(panel, *p)], colour, 2.2) for p in points.tolist()]
        found += [("text", [(left + x, y)], colour, word) for x, y, colour, word in (
            (12, 24, "black", name), (12, SIDE - 14, before, "before"), (80, SIDE - 14, after, "after"))]
    return found


def save(found, panels, stem):
    """Write the marks as stem.svg and stem.png."""
    width, scale, lines = panels * SIDE, 3, []
    page = Image.new("RGB", (width * scale, SIDE * scale), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(16 * scale)
    for kind, points, colour, size in found:
        (x, y), large = points[0], [(scale * x, scale * y) for x, y in points]
        if kind == "dot":
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" fill="{colour}"/>')
            draw.ellipse([scale * (x - size), scale * (y - size), scale * (x + size), scale * (y + size)], fill=colour)
        elif kind == "line":
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{size}"/>')
            draw.line(large, fill=colour, width=max(1, round(scale * size)))
        else:
            lines.append(f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="16" fill="{colour}">{size}</text>')
            draw.text(large[0], size, fill=colour, font=font, anchor="ls")
    page.resize((width, SIDE), Image.LANCZOS).save(f"{stem}.png")
    Path(f"{stem}.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {SIDE}">\n'
                                   + "\n".join(lines) + "\n</svg>\n")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of toy.png and toy.svg (default: out)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    prior = world()
    paths = {name: trajectories(prior, loss, args.seed, **options) for name, (loss, options) in PANELS.items()}
    # a flow with the shift of Stable Diffusion 3, at the noise levels of t = 0.02 T .. 0.98 T above
    paths["PDS on a flow"] = trajectories(MixtureFlow(prior, sigmas_of(shift=3.0)), between(0.044, 0.816), args.seed)
    print(f"{'':14} {'distance to source':>20} {'log p(x | target)':>20} {'log-odds':>12}")
    for name, path in paths.items():
        distance, likelihood, odds = figures(prior, path)
        print(f"{name:14} {distance:20.2f} {likelihood:20.2f} {odds:12.2f}")
    args.out.mkdir(parents=True, exist_ok=True)
    shown = dict(list(paths.items())[:3])
    save(marks(prior, shown), len(shown), args.out / "toy")
    print(f"done: {args.out / 'toy.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
