"""The method in the plane: samples of p(x0 | y=1) pushed to p(x0 | y=2) by SDS, DDS and PDS.

    python toy.py                       # or python run.py --mode toy; writes toy.png and toy.svg

Both distributions are Gaussian mixtures, so the noise prediction is exact and nothing is trained: what the picture
shows is the losses alone. SDS forgets where a sample came from, DDS is not held back, PDS stops near the boundary. Two
more rows are printed: PDS without its identity term, a weighted DDS, and PDS on the same distributions as a flow.
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

BETAS = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
STEPS, POINTS, RATE, GUIDANCE = 1000, 60, 0.05, 3.0


class Mixtures:
    """An exact prior for pds.py. means [Y,K,2]: K equal parts of each of Y conditions, all of deviation `sigma`.

    A prompt is the number of its condition, [B] or [1]. The plane's points are latents of shape [B,2,1,1].
    """

    def __init__(self, means, sigma=0.35, guidance=1.0):
        self.abar, self.means, self.sigma, self.guidance = (1 - BETAS).cumprod(0), means, sigma, guidance

    def at(self, scale):
        """This prior with another guidance scale."""
        twin = copy.copy(self)
        twin.guidance = scale
        return twin

    def log_density(self, x, means, abar=torch.ones(())):
        """log p(x_t) [B] of x [B,2] at noise levels abar [B] (1: of the data), and its gradient [B,2]."""
        scale = (abar.sqrt() if abar.ndim == 0 else abar.sqrt()[:, None, None])
        var = (abar * self.sigma ** 2 + 1 - abar).expand(len(x))[:, None]  # [B,1]
        away = scale * means - x[:, None]  # [B,K,2]
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
    """The same distributions as a model of flow matching, whose velocity is exact: the mean of eps - x0 at x_sigma."""

    def __init__(self, mixtures, sigmas):
        super().__init__(sigmas)
        self.means, self.sigma, self.guidance = mixtures.means, mixtures.sigma, mixtures.guidance
        self.log_density = mixtures.log_density

    at = Mixtures.at

    def plain(self, x, sigma, means):
        """[B,2] for x [B,2], sigma [B,1] and means [K,2] or [B,K,2]: what each part expects, weighted by its share."""
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
    """Gradient descent of POINTS samples of condition 0 towards condition 1: their ways [STEPS + 1, POINTS, 2]."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(prior.means.shape[1], (POINTS,), generator=generator)
    x0_src = prior.means[0, part] + prior.sigma * torch.randn(POINTS, 2, generator=generator, dtype=torch.float64)
    x0_src = x0_src.view(POINTS, 2, 1, 1)
    x0_tgt, way = x0_src.clone().requires_grad_(), [x0_src.view(POINTS, 2)]
    y_tgt, y_src = torch.tensor([1]), torch.tensor([0])
    for step in range(STEPS):
        value = loss(prior, x0_tgt, x0_src, y_tgt, y_src, generator=generator, **options) * POINTS
        grad, = torch.autograd.grad(value, x0_tgt)
        with torch.no_grad():
            x0_tgt -= RATE * (1 - step / STEPS) * grad
        way.append(x0_tgt.detach().view(POINTS, 2).clone())
    return torch.stack(way)


def between(t_min, t_max):
    """pds_loss with timesteps between these shares of T."""
    def loss(prior, x0_tgt, *others, generator=None, **options):
        t = pds.sample_timesteps(len(x0_tgt), len(prior.abar), t_min, t_max, generator=generator)
        return pds.pds_loss(prior, x0_tgt, *others, t=t, generator=generator, **options)
    return loss


def figures(prior, way):
    """Mean distance to the own source, mean log-likelihood under the target, mean log-odds of target and source."""
    end = way[-1]
    target, source = (prior.log_density(end, m.expand(len(end), -1, -1))[0] for m in prior.means.flip(0))
    return (end - way[0]).norm(dim=1).mean().item(), target.mean().item(), (target - source).mean().item()


SIDE, EDGE = 360, 4.4  # a panel's side in pixels, half of it in units of the plane
PANELS = {"SDS": (pds.sds_loss, {}), "DDS": (pds.dds_loss, {}), "PDS": (pds.pds_loss, {}),
          "PDS, psi = 0": (pds.pds_loss, {"coefficients": "consistent"})}  # the last is printed only


def shapes(prior, ways):
    """The picture as a list of (kind, points in pixels, colour, width or radius), for both formats."""
    drawn = []
    for panel, (name, way) in enumerate(ways.items()):
        def place(x, y):
            return (panel * SIDE + SIDE / 2 * (1 + min(max(x / EDGE, -1), 1)), SIDE / 2 * (1 - min(max(y / EDGE, -1), 1)))
        for radius, tints in ((2, ("#e8eefc", "#fdece2")), (1, ("#c9d8f8", "#fad3bd"))):  # 2 and 1 deviations
            drawn += [("dot", [place(*mean)], tint, radius * prior.sigma / EDGE * SIDE / 2)
                      for means, tint in zip(prior.means.tolist(), tints) for mean in means]
        drawn.append(("line", [(panel * SIDE + SIDE / 2, 0), (panel * SIDE + SIDE / 2, SIDE)], "#bbbbbb", 1))
        for points in way.transpose(0, 1).tolist():
            drawn.append(("line", [place(*p) for p in points[::5]], "#8a8a8a", 0.7))
        drawn += [("dot", [place(*p)], "#2f5fd0", 2.2) for p in way[0].tolist()]
        drawn += [("dot", [place(*p)], "#d9480f", 2.2) for p in way[-1].tolist()]
        drawn += [("text", [(panel * SIDE + x, y)], colour, word) for x, y, colour, word in (
            (12, 24, "black", name), (12, SIDE - 14, "#2f5fd0", "before"), (80, SIDE - 14, "#d9480f", "after"))]
    return drawn


def save(drawn, panels, stem):
    """Write stem.svg and stem.png."""
    width, scale, lines = panels * SIDE, 3, []
    page = Image.new("RGB", (width * scale, SIDE * scale), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(16 * scale)
    for kind, points, colour, size in drawn:
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
    ways = {name: trajectories(prior, loss, args.seed, **options) for name, (loss, options) in PANELS.items()}
    # a flow with the shift of Stable Diffusion 3; its t are those with the noise of t = 0.02 T .. 0.98 T above
    ways["PDS on a flow"] = trajectories(MixtureFlow(prior, sigmas_of(shift=3.0)), between(0.044, 0.816), args.seed)
    print(f"{'':14} {'distance to source':>20} {'log p(x | target)':>20} {'log-odds':>12}")
    for name, way in ways.items():
        distance, likelihood, odds = figures(prior, way)
        print(f"{name:14} {distance:20.2f} {likelihood:20.2f} {odds:12.2f}")
    args.out.mkdir(parents=True, exist_ok=True)
    shown = dict(list(ways.items())[:3])
    save(shapes(prior, shown), len(shown), args.out / "toy")
    print(f"done: {args.out / 'toy.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
