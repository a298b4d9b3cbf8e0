"""The tests of the whole repository: `pytest -q`. No network, no GPU, nothing random that is not seeded."""
import copy
import csv
import importlib.util
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import bench
import nerf as nerf_module
import pds
import run
import splat as splat_module
import svg_raster
import toy
from edit2d import ddim, ddim_timesteps, ddpm_inversion, diffedit_mask, instruct_pix2pix, sdedit
from nerf import (Camera, HashGrid, NeRF, SceneError, contract, depth_picture, directions, evaluate, export, input_path,
                  load_scene, sides, spherical_harmonics, turntable, uncontract, volume_weights)
from prior import InstructPix2Pix, Prior, PriorError, plain, read_captions
from splat import Splats, Tiles, project, quadratics, rotations
from svg_raster import SVG, SVGError

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
BETAS = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
ABAR = (1 - BETAS).cumprod(0)


class GaussianPrior:
    """The exact noise prediction for x0 ~ N(mean(y), var I); y [B] names the mean. Counts its calls."""

    def __init__(self, abar=ABAR, var=0.3):
        self.abar, self.var, self.calls, self.means = abar, var, 0, torch.tensor([-1.0, 2.0], dtype=torch.float64)

    def eps(self, x_t, t, y):
        self.calls += 1
        abar = self.abar[t].to(x_t).reshape(-1, 1, 1, 1)
        mean = self.means.to(x_t)[y].reshape(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / (1 - abar + abar * self.var)


SRC, TGT = torch.tensor([0]), torch.tensor([1])


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grad_of(loss, *args, **kwargs):
    """The gradient that a loss sends to its x0_tgt, times the batch size."""
    x0 = args[1].clone().requires_grad_()
    loss(args[0], x0, *args[2:], **kwargs).backward()
    return x0.grad * len(x0)


# ---- pds.py: the coefficients -------------------------------------------------------------------------

@pytest.mark.parametrize("t, psi, chi", [(20, 1.69513, 0.23736), (100, 0.31778, 0.11591),
                                         (500, 0.03224, 0.08212), (980, 0.00418, 0.10962)])
def test_official_coefficients_have_the_reference_values(t, psi, chi):
    got = pds.pds_coefficients(ABAR, torch.tensor([t]), torch.tensor([t - 2]))
    assert_close(torch.stack(got)[:, 0], torch.tensor([psi, chi], dtype=torch.float64), atol=5e-6, rtol=0)


@pytest.mark.parametrize("stride", [1, 2, 10, 100])
def test_consistent_posterior_has_no_pull_to_the_source(stride):
    t = torch.arange(stride + 1, 1000, 37)
    c_x0, c_xt, sigma = pds.posterior(ABAR, t, t - stride, "consistent")
    # not only set to zero: the long form is zero up to rounding
    long_form = (ABAR[t - stride].sqrt() - c_x0 - c_xt * ABAR[t].sqrt()) / sigma
    assert_close(long_form, torch.zeros_like(long_form), atol=1e-10, rtol=0)
    assert (pds.pds_coefficients(ABAR, t, t - stride, "consistent")[0] == 0).all()
    if stride == 1:  # one step is one step: the two kinds are the same posterior
        for a, b in zip(pds.posterior(ABAR, t, t - 1, "official"), (c_x0, c_xt, sigma)):
            assert_close(a, b)


def test_posterior_agrees_with_bayes_rule():
    """q(x_s | x_t, x0) from the product of two Gaussians in x_s, for a stride of 50."""
    t, s = torch.tensor([400]), torch.tensor([350])
    a = ABAR[t] / ABAR[s]
    precision = a / (1 - a) + 1 / (1 - ABAR[s])  # of q(x_t | x_s) as a function of x_s, and of q(x_s | x0)
    c_x0, c_xt, sigma = pds.posterior(ABAR, t, s, "consistent")
    assert_close(sigma, precision.rsqrt())
    assert_close(c_xt, a.sqrt() / (1 - a) / precision)
    assert_close(c_x0, ABAR[s].sqrt() / (1 - ABAR[s]) / precision)


@pytest.mark.parametrize("kind", ["official", "consistent"])
@pytest.mark.parametrize("stride", [1, 2, 30])
def test_loss_is_the_difference_of_stochastic_latents(kind, stride):
    prior, (tgt, src) = GaussianPrior(), (rand(3, 2, 4, 4, seed=i) for i in (1, 2))
    noise_t, noise_s, t = rand(3, 2, 4, 4, seed=3), rand(3, 2, 4, 4, seed=4), torch.tensor([40, 300, 970])

    def latent(x0, y):
        x_t, x_s = pds.add_noise(x0, noise_t, ABAR, t), pds.add_noise(x0, noise_s, ABAR, t - stride)
        return pds.stochastic_latent(x_s, x_t, prior.eps(x_t, t, y), ABAR, t, t - stride, kind)

    got = grad_of(pds.pds_loss, prior, tgt, src, TGT, SRC, t, noise_t, stride, kind)
    assert_close(got, latent(tgt, TGT.expand(3)) - latent(src, SRC.expand(3)), atol=1e-9, rtol=1e-9)


def test_free_coefficients():
    t = torch.tensor([100, 900])
    psi, chi = pds.pds_coefficients(ABAR, t, t - 2, pds.dreamcatalyst)
    assert_close(psi, 0.075 * torch.tensor([0.1, 0.9], dtype=torch.float64).exp())
    assert_close(chi, 0.2 + 0.8 * torch.tensor([0.1, 0.9], dtype=torch.float64) ** (1 / 2.718281828459045))
    tgt, src, noise = (rand(2, 1, 2, 2, seed=i) for i in range(3))
    got = grad_of(pds.pds_loss, GaussianPrior(), tgt, src, TGT, SRC, t, noise, coefficients=(3.0, 0.0))
    assert_close(got, 3 * (tgt - src))
    with pytest.raises(ValueError, match="official.*oficial"):
        pds.pds_coefficients(ABAR, t, t - 2, "oficial")


# ---- pds.py: the losses -------------------------------------------------------------------------------

def test_baselines_have_their_closed_forms():
    prior, t = GaussianPrior(), torch.tensor([50, 700])
    tgt, src, noise = (rand(2, 3, 2, 2, seed=i) for i in range(3))
    w, a = ((c[t]).reshape(-1, 1, 1, 1) for c in (1 - ABAR, ABAR))
    var = 1 - a + a * prior.var

    def eps(x0, mean):
        return w.sqrt() * (a.sqrt() * (x0 - mean) + w.sqrt() * noise) / var

    assert_close(grad_of(pds.sds_loss, prior, tgt, src, TGT, SRC, t, noise), w * (eps(tgt, 2.0) - noise))
    assert_close(grad_of(pds.dds_loss, prior, tgt, src, TGT, SRC, t, noise), w * (eps(tgt, 2.0) - eps(src, -1.0)))
    consistent = grad_of(pds.pds_loss, prior, tgt, src, TGT, SRC, t, noise, coefficients="consistent")
    chi = pds.pds_coefficients(ABAR, t, t - 2, "consistent")[1].reshape(-1, 1, 1, 1)
    assert_close(consistent, chi * (eps(tgt, 2.0) - eps(src, -1.0)))  # PDS without psi is DDS weighted by chi


@pytest.mark.parametrize("loss", [pds.pds_loss, pds.dds_loss])
def test_no_edit_no_gradient(loss):
    x0 = rand(2, 4, 3, 3)
    assert (grad_of(loss, GaussianPrior(), x0, x0, TGT, TGT, generator=torch.Generator().manual_seed(0)) == 0).all()


@pytest.mark.parametrize("loss, calls", [(pds.sds_loss, 1), (pds.dds_loss, 1), (pds.pds_loss, 1)])
def test_rows_of_a_batch_are_independent_and_cost_one_call(loss, calls):
    prior, t = GaussianPrior(), torch.tensor([30, 400, 900])
    tgt, src, noise = (rand(3, 2, 4, 5, seed=i) for i in range(3))
    batch = grad_of(loss, prior, tgt, src, TGT, SRC, t, noise)
    assert prior.calls == calls
    for i in range(3):
        one = slice(i, i + 1)
        assert_close(batch[one], grad_of(loss, prior, tgt[one], src[one], TGT, SRC, t[one], noise[one]))


def test_gradient_reaches_the_target_only_and_stays_float32():
    class Network(torch.nn.Module):  # a network of its own dtype, with parameters that could catch a gradient
        abar = ABAR.float()

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def eps(self, x_t, t, y):
            assert x_t.dtype == torch.float32 and not x_t.requires_grad
            return x_t.bfloat16() * self.scale

    network = Network()
    tgt, src = (rand(2, 1, 2, 2, seed=i, dtype=torch.float32).requires_grad_() for i in range(2))
    loss = pds.pds_loss(network, tgt, src, TGT, SRC, torch.tensor([9, 99]), torch.zeros(2, 1, 2, 2))
    loss.backward()
    assert loss.dtype == tgt.grad.dtype == torch.float32
    assert src.grad is None and network.scale.grad is None
    half = tgt.detach().half().requires_grad_()
    assert pds.pds_loss(network, half, src, TGT, SRC).dtype == torch.float32


def test_value_and_scale_of_the_loss():
    x0, grad = rand(4, 1, 2, 2).requires_grad_(), rand(4, 1, 2, 2, seed=1)
    loss = pds.as_loss(x0, grad)
    loss.backward()
    assert_close(loss.detach(), grad.square().sum() / 8)
    assert_close(x0.grad, grad / 4)


def test_a_nan_is_not_hidden():
    prior = GaussianPrior()
    prior.eps = lambda x_t, t, y: x_t * float("nan")
    assert pds.pds_loss(prior, rand(1, 1, 2, 2), rand(1, 1, 2, 2), TGT, SRC).isnan()


@pytest.mark.parametrize("change, message", [
    ({"x0_src": rand(1, 1, 2, 3)}, "must both be"), ({"t": torch.tensor([1])}, "values in 2 .. 999"),
    ({"t": torch.tensor([1000])}, "values in 2 .. 999"), ({"t": torch.tensor([5, 5])}, r"t must be \[1\]"),
    ({"noise": rand(1, 1, 2)}, "noise must have the shape"), ({"stride": 0}, "0 <= s < t"),
    ({"stride": -2}, "stride must be"), ({"y_src": torch.zeros(3)}, "prompts must be")])
def test_bad_arguments_are_refused_in_words(change, message):
    arguments = dict(x0_tgt=rand(1, 1, 2, 2), x0_src=rand(1, 1, 2, 2), y_tgt=TGT, y_src=SRC, t=torch.tensor([9]))
    with pytest.raises(ValueError, match=message):
        pds.pds_loss(GaussianPrior(), **arguments | change)


def test_timesteps_stay_in_range_and_reach_both_ends():
    t = pds.sample_timesteps(20000, 100, 0.1, 0.2, generator=torch.Generator().manual_seed(0))
    assert t.min() == 10 and t.max() == 20 and len(t.unique()) == 11
    assert pds.sample_timesteps(1, 100, 0.0, 1.0, progress=0.0) == 99
    assert pds.sample_timesteps(1, 100, 0.0, 1.0, progress=1.0) == 0
    falling = [pds.sample_timesteps(1, 1000, progress=p / 10).item() for p in range(11)]
    assert falling[0] == 980 and falling[-1] == 20 and falling == sorted(falling, reverse=True)
    with pytest.raises(ValueError, match="t_min <= t_max"):
        pds.sample_timesteps(1, 100, 0.5, 0.4)
    short = GaussianPrior(abar=ABAR[::50])  # T = 20, and a stride that 0.02 T would not allow
    pds.pds_loss(short, rand(64, 1, 1, 1), rand(64, 1, 1, 1), TGT, SRC, stride=15)


def test_where_each_method_ends():
    """On Gaussians of one variance every method has a known end: the claim of the paper's Figure 2.

    SDS falls into the target's mode, DDS carries every sample all the way, and PDS stops where the pull back to
    the source balances the push: at 3 E[chi r] / (E[psi] + E[chi r]) of a way of 3, r = sqrt(abar (1 - abar)).
    """
    prior, src, end = GaussianPrior(var=1.0), rand(256, 1, 1, 2) - 1.0, {}
    for name, loss in [("sds", pds.sds_loss), ("dds", pds.dds_loss), ("pds", pds.pds_loss)]:
        x0, generator = src.clone().requires_grad_(), torch.Generator().manual_seed(0)
        optimiser = torch.optim.SGD([x0], lr=0.3 * len(src))
        for _ in range(400):
            optimiser.zero_grad()
            loss(prior, x0, src, TGT, SRC, generator=generator).backward()
            optimiser.step()
        end[name] = x0.detach()
    assert_close(end["sds"].mean().item(), 2.0, atol=0.05, rtol=0)
    assert end["sds"].std() < 0.2
    assert_close((end["dds"] - src).mean().item(), 3.0, atol=0.01, rtol=0)
    t = torch.arange(20, 981)
    psi, chi = pds.pds_coefficients(ABAR, t, t - 2)
    push = (chi * (ABAR[t] * (1 - ABAR[t])).sqrt()).mean()
    way = (end["pds"] - src).flatten()
    assert_close(way.mean(), 3 * push / (psi.mean() + push), atol=0.02, rtol=0)
    assert way.std() < 0.2


# ---- svg_raster.py -----------------------------------------------------------------------------------

XMLNS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
STOPS = ('<stop offset=".1" stop-color="#f00"/><stop offset=".6" stop-color="#0f0" stop-opacity=".6"/>'
         '<stop offset="1" stop-color="#00f"/>')


def svg_text(body, attributes='viewBox="0 0 32 32"'):
    return f"<svg {XMLNS} {attributes}>{body}</svg>"


@pytest.fixture
def load_svg(tmp_path):
    def load(body, attributes='viewBox="0 0 32 32"', **options):
        path = tmp_path / "drawing.svg"
        path.write_text(svg_text(body, attributes))
        return SVG.load(path, **{"size": 32, **options})
    return load


def svg_darkness(svg, **options):
    """Sum over pixels of 1 - value: the area in pixels of what is painted black."""
    with torch.no_grad():
        return float((1 - svg.render(**options)[0, 0]).double().sum())


# ------------------------------------------------------------------ known areas

@pytest.mark.parametrize("body, area", [
    ('<rect x="4" y="6" width="12" height="16"/>', 192),
    ('<rect x="4.25" y="6.5" width="12.5" height="16.125"/>', 12.5 * 16.125),
    ('<rect x="-20" y="6" width="30" height="100"/>', 10 * 26),
    ('<circle cx="15.3" cy="16.1" r="9.7"/>', math.pi * 9.7 ** 2),
    ('<ellipse cx="15" cy="16" rx="12" ry="5" transform="rotate(33 15 16)"/>', math.pi * 60),
    ('<path d="M4 4H28V28H4ZM10 10V20H20V10Z"/>', 24 * 24 - 100),       # the hole turns the other way
    ('<path d="M4 4H28V28H4ZM10 10H20V20H10Z"/>', 24 * 24),
    ('<path fill-rule="evenodd" d="M4 4H28V28H4ZM10 10H20V20H10Z"/>', 24 * 24 - 100),
    ('<path d="M3 16H29" stroke="#000" stroke-width="4"/>', 26 * 4),
    ('<path d="M8 16H24" stroke="#000" stroke-width="4" stroke-linecap="square"/>', 20 * 4),
    ('<path d="M8 16H24" stroke="#000" stroke-width="4" stroke-linecap="round"/>', 16 * 4 + math.pi * 4),
    ('<rect x="8" y="8" width="16" height="16" fill="none" stroke="#000" stroke-width="4"/>', 400 - 144),
    ('<rect x="8" y="8" width="16" height="16" fill="none" stroke="#000" stroke-width="4" '
     'stroke-linejoin="bevel"/>', 20 * 20 - 12 * 12 - 4 * 2),
    ('<circle cx="16" cy="16" r="10" fill="none" stroke="#000" stroke-width="3"/>', math.pi * 60),
    ('<path d="M4 16H28" stroke="#000" stroke-width="2" stroke-dasharray="3 2"/>', 5 * 3 * 2),
])
def test_svg_covers_the_known_area(load_svg, body, area):
    svg = load_svg(body)
    assert svg_darkness(svg) == pytest.approx(area, rel=5e-3)     # chords lie up to TOLERANCE px inside
    assert svg_darkness(svg, size=256) == pytest.approx(64 * area, rel=1e-3)
    if "<circle" not in body and "<ellipse" not in body and "round" not in body:
        assert svg_darkness(svg) == pytest.approx(area, rel=1e-5)


def test_svg_even_odd_star(load_svg):
    star = '<path {} d="M16 2L24.5 28L2.5 12H29.5L7.5 28Z"/>'
    rules = ("", 'fill-rule="evenodd"')
    full, hollow = (svg_darkness(load_svg(star.format(rule)), size=256) for rule in rules)

    # the pentagon in the middle, by its five corners
    def crossing(a, b, c, d):
        t = np.linalg.solve(np.array([[b[0] - a[0], c[0] - d[0]], [b[1] - a[1], c[1] - d[1]]]),
                            np.array([c[0] - a[0], c[1] - a[1]]))[0]
        return complex(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]))
    p = [(16, 2), (24.5, 28), (2.5, 12), (29.5, 12), (7.5, 28)]
    e = [(p[k], p[(k + 1) % 5]) for k in range(5)]
    corners = [crossing(*e[i], *e[(i + 2) % 5]) for i in (0, 3, 1, 4, 2)]
    area = abs(sum((corners[k].conjugate() * corners[(k + 1) % 5]).imag for k in range(5))) / 2
    assert (full - hollow) / 64 == pytest.approx(area, rel=1e-2)


def test_svg_pixel_values_are_exact(load_svg):
    svg = load_svg('<rect x="2.25" y="3" width="4" height="5.5" fill="#00ff00" fill-opacity=".5"/>')
    image = svg.render()[0].detach()
    red = image[0]
    assert red[3, 2] == pytest.approx(1 - 0.75 * 0.5) and red[4, 4] == pytest.approx(0.5)
    assert red[8, 4] == pytest.approx(1 - 0.5 * 0.5) and red[8, 6] == pytest.approx(1 - 0.5 * 0.25 * 0.5)
    assert (image[1] == 1).all() and red[9, 4] == 1 and red[4, 7] == 1


def test_svg_render_is_deterministic_and_pure(load_svg):
    svg = load_svg('<g opacity=".5"><circle cx="12" cy="14" r="8" fill="#c33"/><rect x="9" y="3" width="9" '
                   'height="20" stroke="red"/></g>')
    before = {k: v.clone() for k, v in svg.state_dict().items()}
    first = svg.render(size=48)
    first.sum().backward()
    assert torch.equal(first, svg.render(size=48)) and first.shape == (1, 3, 48, 48)
    assert all(torch.equal(before[k], v) for k, v in svg.state_dict().items())


def test_svg_gradients_are_deterministic_on_two_threads(load_svg):
    circles = (f'<circle cx="{k % 29}" cy="{k % 31}" r="9" stroke="red"/>' for k in range(150))
    svg = load_svg("".join(circles), size=128)
    threads, grads = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(4):
        svg.zero_grad()
        svg.render().square().sum().backward()
        grads.append(svg.points.grad.clone())
    torch.set_num_threads(threads)
    assert all(torch.equal(grads[0], g) for g in grads)


def test_svg_view_shifts_by_pixels(load_svg):
    svg = load_svg('<circle cx="15" cy="16" r="8.3" fill="#264"/>')
    assert torch.allclose(svg.render((2.0, -3.0))[..., 3:-3, 3:-3], svg.render()[..., 6:, 1:-5], atol=1e-5)
    views = [svg.sample_view(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert views[0] == views[1] and max(map(abs, views[0])) <= svg.jitter and type(views[0][0]) is float


def test_svg_without_shapes_is_white(load_svg):
    svg = load_svg("<defs/>")
    assert (svg.render() == 1).all() and svg.param_groups() == []


# ------------------------------------------------------------------ gradients

GRADIENT_CASES = {
    "circle": '<circle cx="15.3" cy="16.1" r="9.7" fill="#c33"/>',
    "square on pixel lines": '<rect x="4" y="6" width="12" height="16" fill="#36c"/>',
    "square of the whole canvas": '<rect width="32" height="32" fill="#36c"/>',
    "vertices on pixel corners": '<path d="M16 4L28 16L16 28L4 16Z" fill="#292"/>',
    "partly off canvas": '<path d="M-10 -5L20 -8L40 20L10 45Z" fill="#36c"/>',
    "even-odd star": '<path fill-rule="evenodd" d="M16 2L24.5 28L2.5 12H29.5L7.5 28Z" fill="#292"/>',
    "groups and clips": (
        '<clipPath id="c"><circle cx="14" cy="15" r="9"/></clipPath><g clip-path="url(#c)" '
        'opacity=".8"><rect x="3.3" y="4.4" width="14" height="13" fill="#c33"/><path d="M8 8L30 12L11 '
        '27Z" fill-opacity=".7"/></g>'),
    "linear gradient": (
        f'<linearGradient id="a">{STOPS}</linearGradient><circle cx="14" cy="15" r="9.3" fill="url(#a)"/>'),
    "radial gradient": (
        f'<radialGradient id="a" fx=".3" fy=".4">{STOPS}</radialGradient><ellipse cx="14" cy="15" '
        'rx="9.3" ry="6" fill="url(#a)" transform="rotate(20 14 15)"/>'),
    "stroke, round": (
        '<path d="M5 5L20 8L9 20C0 30 20 30 26 25" fill="none" stroke="#333" stroke-width="3" '
        'stroke-linejoin="round" stroke-linecap="round"/>'),
    "stroke, sheared": (
        '<path d="M5 5L20 8L9 20Z" stroke="#333" fill="none" stroke-width="2" transform="matrix(1 .3 -.5 '
        '1.2 6 -2)"/>'),
    "stroke, dashed": (
        '<path d="M4 5C20 3 25 11 22 18S12 30 5 22" fill="none" stroke="#333" stroke-width="3" '
        'stroke-dasharray="5 3 2" stroke-linecap="square"/>'),
}


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_svg_gradients_match_finite_differences(load_svg, name, step=1e-5):
    svg = load_svg(GRADIENT_CASES[name]).double()
    weights = torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss():
        return (svg.render()[0] * weights).sum()
    loss().backward()
    checked = 0
    for p in svg.parameters():
        flat, numeric = p.detach().view(-1), torch.zeros(p.numel(), dtype=torch.float64)
        with torch.no_grad():
            for i, value in enumerate(flat.tolist()):
                flat[i] = value + step
                up = loss()
                flat[i] = value - step
                numeric[i] = (up - loss()) / (2 * step)
                flat[i] = value
        if p.numel():
            atol = 1e-3 * float(numeric.abs().max())
            torch.testing.assert_close(p.grad.view(-1), numeric, rtol=1e-3, atol=atol)
            checked += p.numel()
    assert checked > 8


def test_svg_float32_gradients_agree_with_float64(load_svg):
    body = "".join(GRADIENT_CASES[k] for k in ("groups and clips", "stroke, round", "square on pixel lines"))
    grads = []
    for svg in (load_svg(body), load_svg(body).double()):
        svg.render().square().sum().backward()
        grads.append(svg.points.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=2e-3)


def test_svg_fit_recovers_a_star(load_svg):
    star = "M16 3L20 12L30 12.5L22 19L25 29L16 23.5L7 29L10 19L2 12.5L12 12Z"
    svg = load_svg(f'<path fill="#e8a020" d="{star}"/>', size=64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = svg.render()
        svg.points += torch.randn(svg.points.shape, generator=generator)
        svg.colours += 0.1
    adam = torch.optim.Adam(svg.param_groups(points=0.5, colours=0.03))
    for step in range(60):
        for group in adam.param_groups:
            group["lr"] *= 0.95
        adam.zero_grad()
        loss = (svg.render() - target).square().mean()
        loss.backward()
        adam.step()
        svg.project_()
    assert loss < 1e-5


# ------------------------------------------------------------------ every feature, against resvg

FEATURES = {                              # drawings on 100 x 100
    "path commands": (
        '<path d="M10 30a20 10 30 1130-5zM60 20A15 15 0 0 1 90 20A15 25 0 01 60 20" fill="olive"/><path '
        'd="m10 60q10-20 20 0t20 0t20 0v20h-60zM75.5.5.5-.2 12e0 3" fill="navy"/><path d="M60 40c5-10 10 '
        '10 15 0s10 10 15 0L90 55H60"/>'),
    "shapes": (
        '<polygon points="60,70 90,60 95 90-3,95"/><polyline points="2 2 8 20 20 2" fill="pink" '
        'stroke="red"/><line x1="0" y1="100" x2="100" y2="50%" stroke="hsl(120,50%,40%)" '
        'stroke-width="2%"/><rect x="40" y="5" width="30" height="20" rx="8" '
        'fill="rgb(10%,20%,90%)"/><rect x="75" y="5" width="20" height="30" rx="3" ry="12" '
        'fill="#08fc"/><circle cx="20" cy="40" r="9"/>'),
    "transforms": (
        '<g transform="translate(50 50) rotate(20) scale(.8 -.5)"><rect x="-40" y="-40" width="60" '
        'height="60" fill="teal"/><g transform="skewX(20) matrix(.5 .1 0 .5 3 4)"><circle r="50" '
        'fill="gold" stroke="black" stroke-width="9"/></g></g>'),
    "styles": (
        '<style>/* a { } */ .a{fill:#c0f;stroke:black} circle{fill:teal} #z{fill:orange} '
        '.b.a{fill:lime}</style><g style="stroke-width:3;color:#ff8800"><rect class="a" x="10" y="10" '
        'width="30" height="30" fill="red"/><circle cx="70" cy="25" r="15" fill="red"/><circle id="z" '
        'cx="25" cy="70" r="15"/><rect class="a b" x="55" y="55" width="30" height="20"/><rect x="55" '
        'y="80" width="30" height="10" fill="currentColor" style="fill-opacity:.5"/></g>'),
    "use and symbols": (
        '<defs><g id="g"><rect width="20" height="20"/><circle cx="10" cy="10" r="6" fill="red" '
        'opacity=".5"/></g><symbol id="s" viewBox="0 0 10 10"><circle cx="5" cy="5" r="7" '
        'fill="green"/></symbol></defs><use href="#g" x="5" y="5" fill="blue"/><use xlink:href="#g" '
        'transform="translate(60 10) rotate(30)" fill="orange" opacity=".6"/><use href="#s" x="10" '
        'y="50" width="30" height="40"/><svg x="55" y="55" width="40" height="30" viewBox="0 0 10 '
        '10"><path d="M-5 0L20 5L0 10z" fill="purple"/></svg>'),
    "opacity": (
        '<g opacity=".5"><circle cx="40" cy="50" r="30" fill="red"/><g opacity=".5"><circle cx="60" '
        'cy="50" r="30" fill="blue"/><rect x="30" y="30" width="20" height="50" '
        'fill="rgba(0,255,0,.5)"/></g></g><rect x="10" y="80" width="50" height="15" fill="gold" '
        'stroke="black" stroke-width="4" opacity=".4"/><rect x="70" y="80" width="20" height="15" '
        'fill="gold" stroke="black" stroke-width="6" paint-order="stroke"/>'),
    "gradients": (
        '<defs><linearGradient id="a" x1="0" y1="0" x2="1" y2="1"><stop offset="0" '
        'stop-color="red"/><stop offset="50%" stop-color="#0f0"/><stop offset=".5" '
        'stop-color="blue"/><stop offset="1" '
        'style="stop-color:gold;stop-opacity:.3"/></linearGradient><linearGradient id="b" '
        'xlink:href="#a" spreadMethod="reflect" x1=".3" x2=".5" y2="0"/><radialGradient id="c" href="#a" '
        'fx=".3" fy=".3" gradientTransform="rotate(20) scale(.8)"/><radialGradient id="d" href="#a" '
        'r="20" cx="75" cy="70" gradientUnits="userSpaceOnUse" spreadMethod="repeat"/></defs><rect x="5" '
        'y="5" width="40" height="30" fill="url(#a)"/><circle cx="75" cy="25" r="20" '
        'fill="url(#b)"/><rect x="5" y="50" width="40" height="45" rx="10" ry="20" fill="url(#c)" '
        'stroke="url(#a)" stroke-width="5"/><path d="M55 50H95V95Z" fill="url(#d)"/>'),
    "clip paths": (
        '<clipPath id="a"><circle cx="40" cy="40" r="25"/><rect x="50" y="50" width="30" '
        'height="40"/></clipPath><clipPath id="b" clip-path="url(#a)"><path clip-rule="evenodd" d="M5 '
        '5H95V95H5ZM30 30V70H70V30Z"/></clipPath><clipPath id="c" '
        'clipPathUnits="objectBoundingBox"><path d="M.5 0L1 1H0Z"/></clipPath><g clip-path="url(#b)" '
        'opacity=".7"><rect width="100" height="60" fill="red"/><rect y="40" width="100" height="60" '
        'fill="blue"/></g><rect x="65" y="5" width="30" height="30" clip-path="url(#c)" fill="teal"/>'),
    "caps and joins": (
        '<g fill="none" stroke="#246" stroke-width="9"><path d="M10 10H80"/><path d="M10 25H80" '
        'stroke-linecap="round"/><path d="M10 40H80" stroke-linecap="square"/><path d="M92 10h0" '
        'stroke-linecap="round"/><path d="M92 40z" stroke-linecap="square"/><path d="M10 75L20 55L30 '
        '75L33 55" stroke-width="5"/><path d="M45 75L55 55L65 75" stroke-linejoin="round"/><path d="M75 '
        '75L85 55L95 75Z" stroke-linejoin="bevel" stroke-width="4"/><path d="M10 95C10 75 50 115 40 '
        '85S90 105 90 85" stroke-width="4"/></g>'),
    "dashes": (
        '<path d="M10 10H90V90H10Z" fill="none" stroke="#333" stroke-width="6" stroke-dasharray="13 7 '
        '4"/><circle cx="50" cy="55" r="25" fill="none" stroke="red" stroke-width="5" '
        'stroke-linecap="round" stroke-dasharray="10" stroke-dashoffset="4"/><path d="M20 22L80 22" '
        'stroke="blue" stroke-width="4" stroke-linecap="round" stroke-dasharray="0 8"/>'),
}


def svg_resvg(text, size, finer=4):
    """resvg takes few samples of an edge, so it renders larger here and is averaged."""
    import resvg_py
    side = size * finer
    png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, background="#ffffff"))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float64) / 255
    return pixels.reshape(size, finer, size, finer, 3).mean((1, 3))


def svg_numpy(svg, size):
    with torch.no_grad():
        return svg.render(size=size)[0].permute(1, 2, 0).double().numpy()


def svg_psnr(a, b):
    return -10 * math.log10(max(np.square(a - b).mean(), 1e-10))


@pytest.mark.parametrize("name", FEATURES)
def test_svg_feature_renders_as_in_resvg(load_svg, name):
    view = 'viewBox="0 0 100 100"'
    finer = 1 if name == "gradients" else 4       # a hard stop is a step in both, sampled once a pixel
    own = svg_numpy(load_svg(FEATURES[name], view), 256)
    other = svg_resvg(svg_text(FEATURES[name], view), 256, finer)
    assert svg_psnr(own, other) > 44
    means = [x.reshape(32, 8, 32, 8, 3).mean((1, 3)) for x in (own, other)]
    assert np.abs(means[0] - means[1]).max() < 0.03       # what is left are edge pixels; no area differs


@pytest.mark.parametrize("attributes", [
    'width="100" height="100" viewBox="0 0 40 20"', 'width="100" height="100" viewBox="0 0 40 20" '
    'preserveAspectRatio="xMaxYMin slice"', 'viewBox="-5 3 20 20"', 'width="50" height="50"',
    'width="100" height="100" viewBox="0 0 20 40" preserveAspectRatio="none"'])
def test_svg_viewbox_renders_as_in_resvg(load_svg, attributes):
    body = '<circle cx="20" cy="10" r="9" fill="brown"/><path d="M0 0L40 20" stroke="black"/>'
    own, other = svg_numpy(load_svg(body, attributes), 128), svg_resvg(svg_text(body, attributes), 128)
    assert svg_psnr(own, other) > 44


def test_svg_wide_picture_is_centred_and_cut_to_its_frame(load_svg):
    image = load_svg('<rect x="-9" y="-99" width="99" height="299"/>', 'viewBox="0 0 32 16"').render()[0, 0]
    assert (image[:8] == 1).all() and (image[24:] == 1).all() and (image[8:24] < 1e-6).all()


def test_svg_prefixed_and_foreign_elements(tmp_path):
    path = tmp_path / "a.svg"
    path.write_text('<s:svg xmlns:s="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
                    '<s:rect width="4" height="8"/><path d="M0 0H8V8Z"/><x:rect width="8"/></s:svg>')
    assert svg_darkness(SVG.load(path, size=8)) == pytest.approx(32)


# ------------------------------------------------------------------ optimising and saving

def svg_random_steps(svg, steps=20):
    adam, generator = torch.optim.Adam(svg.param_groups()), torch.Generator().manual_seed(0)
    for _ in range(steps):
        adam.zero_grad()
        image = svg.render(svg.sample_view(generator))
        (image * torch.randn(image.shape, generator=generator)).sum().backward()
        adam.step()
        svg.project_()


@pytest.mark.parametrize("name", FEATURES)
def test_svg_save_keeps_the_picture(load_svg, tmp_path, name):
    svg = load_svg(FEATURES[name], 'viewBox="0 0 100 100"', size=100)
    path = tmp_path / "saved.svg"
    svg.save(path)
    assert np.array_equal(svg_numpy(SVG.load(path, size=100), 128), svg_numpy(svg, 128))
    svg_random_steps(svg)
    svg.save(path)
    edited = svg_numpy(svg, 256)
    assert svg_psnr(edited, svg_numpy(SVG.load(path, size=100), 256)) > 55     # colours are in 8 bits
    assert svg_psnr(edited, svg_resvg(path.read_text(), 256, 1 if name == "gradients" else 4)) > 40


def test_svg_save_keeps_the_structure(load_svg, tmp_path):
    svg = load_svg('<!-- note --><g id="g" class="k" fill="red"><circle id="c" class="big" cx="9" cy="9" '
                   'r="5" transform="rotate(5)" data-x="1"/><path id="p" d="M1 1L5 5L9 1"/></g>'
                   '<title>t</title>')
    path = tmp_path / "saved.svg"
    with torch.no_grad():
        svg.points[:12] += 1.5            # the circle only
        svg.colours[1] = torch.tensor([0.0, 0.0, 1.0])
    svg.save(path)
    text = path.read_text()
    assert '<path id="c" class="big" transform="rotate(5)" data-x="1" d="M' in text and "<circle" not in text
    assert '<path id="p" d="M1 1L5 5L9 1" fill="#0000ff"' in text
    for kept in ('<g id="g" class="k" fill="red">', "<!-- note -->", "<title>t</title>"):
        assert kept in text


def test_svg_shapes_that_use_shares_stay_shared(load_svg, tmp_path):
    svg = load_svg('<defs><path id="p" d="M0 0H8V8H0Z"/></defs><use href="#p"/>'
                   '<use href="#p" x="16" fill="red"/>')
    assert len(svg.points) == 4 and len(svg.colours) == 2
    with torch.no_grad():
        svg.points[2] += 4
        svg.colours[0] = torch.tensor([0.0, 1.0, 0.0])
    svg.save(tmp_path / "saved.svg")
    again = SVG.load(tmp_path / "saved.svg", size=32)
    assert torch.allclose(again.render(), svg.render(), atol=1e-5)


def test_svg_state_dict_is_bit_exact(load_svg):
    body = FEATURES["gradients"] + FEATURES["dashes"]
    svg, fresh = (load_svg(body, 'viewBox="0 0 100 100"', size=64) for _ in "ab")
    svg_random_steps(svg, 2)
    fresh.load_state_dict(svg.state_dict())
    assert torch.equal(svg.render(), fresh.render())


def test_svg_param_groups_and_projection(load_svg):
    svg = load_svg(f'<linearGradient id="a">{STOPS}</linearGradient>'
                   '<rect width="9" height="9" fill="url(#a)"/><rect width="5" height="5" stroke="red"/>')
    groups = {g["name"]: g["lr"] for g in svg.param_groups(points=0.4, colours=0.0)}
    assert groups == dict(points=0.4, colours=0.0, stop_colours=0.0, opacities=0.0, stop_offsets=0.0,
                          stroke_widths=0.05)
    assert [g["name"] for g in svg.param_groups(colours_only=True)] == ["colours", "stop_colours"]
    with torch.no_grad():
        for p in svg.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 3)
    svg.project_()
    for name in ("colours", "opacities", "stop_colours", "stop_offsets"):
        assert getattr(svg, name).min() >= 0 and getattr(svg, name).max() <= 1
    assert (svg.stop_offsets.diff() >= 0).all() and (svg.stroke_widths >= 0).all()


def test_svg_points_are_pixels_under_any_transform(load_svg):
    body = '<g transform="scale(.01)"><rect x="400" y="600" width="1200" height="1600"/></g>'
    svg = load_svg(body, size=64)
    before = svg_darkness(svg)
    with torch.no_grad():
        svg.points[:, 0] += torch.where(svg.points[:, 0] > svg.points[:, 0].mean(), 1.0, 0.0)
    assert svg_darkness(svg) - before == pytest.approx(32, rel=1e-4)      # a pixel wider over its 32 rows


# ------------------------------------------------------------------ bad input

BAD_FILES = {
    "no element found": "",
    "not well-formed XML": "<svg",
    "the root element is <html>": "<html/>",
    "entity declarations": '<!DOCTYPE s [<!ENTITY a "aaa"><!ENTITY b "&a;&a;">]>' + svg_text("&b;"),
    "entity declarations ": '<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + svg_text("&a;"),
    "more than 100000 elements": svg_text("<g/>" * 100_001),
    "nested deeper than 200": svg_text("<g>" * 300 + "</g>" * 300),
    "more than 1e+06 px away": svg_text('<path d="M0 0L1e30 5L5 5Z"/>'),
    "not finite or lie": svg_text('<path d="M0 0L1e999 5L5 5Z"/>'),
    "'#b' refers to itself": svg_text('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>'),
    "gradient '#a' refers to itself": svg_text('<linearGradient id="a" href="#a"/><rect width="9" height="9" '
                                               'fill="url(#a)"/>'),
    "more than 30000 references": svg_text('<g id="a0"/>' + "".join(
        f'<g id="a{k + 1}">' + f'<use href="#a{k}"/>' * 10 + "</g>" for k in range(9)) + '<use href="#a9"/>'),
    "external reference 'http://evil/x.svg#a'": svg_text('<use href="http://evil/x.svg#a"/>'),
    "external reference 'file:///etc/x#a'": svg_text('<circle r="9" fill="url(file:///etc/x#a)"/>'),
    "<text> is not supported": svg_text("<text>hi</text>"),
    "<image> is not supported": svg_text('<image href="a.png"/>'),
    "filter on <g> is not supported": svg_text('<g filter="url(#f)"/>'),
    "mask on <rect> is not supported": svg_text('<rect style="mask:url(#m)" width="5" height="5"/>'),
    "wider than 1e+06 px": svg_text('<path d="M0 0H9" stroke="red" stroke-width="1e999"/>'),
    "the CSS selector 'g > path'": svg_text("<style>g > path{fill:red}</style>"),
    "too many dashes": svg_text('<path d="M0 0H32" stroke="red" stroke-dasharray="1e-7"/>'),
    "a picture of 0 x 0": svg_text("<g/>", 'width="0" height="0"'),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_svg_bad_file_is_refused_in_one_line(tmp_path, message):
    path = tmp_path / "bad.svg"
    path.write_text(BAD_FILES[message])
    with pytest.raises(SVGError) as caught:
        SVG.load(path, size=32).render()
    text = str(caught.value)
    assert message.strip() in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize("body", [
    '<path d="M5 5L5 5Z" stroke="red"/><path d="M5 5C5 5 5 5 5 5" stroke="red"/><circle r="0"/><line/>'
    '<polyline points="1"/><path d=""/><path/><path d="M1"/><path d="L5 5"/><rect width="-5" height="5"/>',
    '<path d="MNaN 0L10 nan Z"/><rect width="nan" height="inf"/><rect width="9abc" height="9" fill="what"/>',
    '<rect width="9" height="9" transform="scale(0)"/><rect width="9" height="9" transform="scale(1 0)"/>',
    '<path d="M0 0L1e5 1e5L0 50Z"/><circle cx="50" cy="50" r="5e5" fill="none" stroke="red"/>',
    '<linearGradient id="a"/><circle r="9" fill="url(#a)"/><circle r="9" fill="url(#b)"/>',
    '<radialGradient id="a" cx="1e300" r="1e-300"><stop stop-color="red"/><stop offset="1"/></radialGradient>'
    '<rect width="9" height="9" fill="url(#a)"/>',
    '<g opacity=".5"><g transform="translate(500 0)"><circle r="5"/><rect width="5" height="5"/></g></g>'
    '<clipPath id="e"/><g clip-path="url(#e)"><rect width="9" height="9"/></g>',
    '<g transform="scale(0)"><svg width="9" height="9"><circle r="5"/></svg></g>',
    '<g transform="rotate(1e999) skewX(60)"><path d="M1 1A1e999 1e999 0 0 1 9 9A1e-300 1 0 0 1 5 5Z"/></g>',
    '<linearGradient id="a" x1="" gradientUnits=""><stop color="\\1" stop-color="currentColor"/>'
    '</linearGradient><circle r="9" fill="url(#a)"/>',
    '<style>}}{{a{b:c;}} .x{fill:red @import url("http://evil/a.css"); *{stroke:red}</style><rect width="5" '
    'height="5"/>'])
def test_svg_degenerate_file_renders_clean(load_svg, tmp_path, body):
    svg = load_svg(body)
    image = svg.render()
    assert torch.isfinite(image).all()
    if image.requires_grad:
        image.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in svg.parameters() if p.grad is not None)
    svg.save(tmp_path / "saved.svg")


def test_svg_skip_unsupported_warns_and_goes_on(load_svg):
    body = '<text>hi</text><g filter="url(#f)"><rect width="8" height="8"/></g>'
    with pytest.warns(UserWarning, match="filter on <g>"), pytest.warns(UserWarning, match="<text> is not supported"):
        svg = load_svg(body, skip_unsupported=True)
    assert svg_darkness(svg) == pytest.approx(64) and svg.document.skipped == ["<text>", "filter on <g>"]


def test_svg_save_fails_without_harm(load_svg, tmp_path):
    svg, path = load_svg('<rect width="5" height="5"/>'), tmp_path / "kept.svg"
    path.write_text("before")
    with torch.no_grad():
        svg.points[0, 0] = math.nan
    with pytest.raises(SVGError, match="points or stroke widths are not finite"):
        svg.render()
    with pytest.raises(SVGError, match="not finite"):
        svg.save(path)
    with pytest.raises(SVGError, match="cannot be written"):
        load_svg('<rect width="5" height="5"/>').save(tmp_path / "missing" / "a.svg")
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawing.svg", "kept.svg"]


def test_svg_command_line_reports_failures_and_goes_on(tmp_path):
    good, bad, out = tmp_path / "good.svg", tmp_path / "bad.svg", tmp_path / "out"
    good.write_text(svg_text('<rect width="16" height="32"/>'))
    bad.write_text(svg_text("<text>x</text>"))
    out.mkdir()
    (out / "bad.png").write_text("before")
    files = [str(bad), str(tmp_path / "none.svg"), str(good)]
    run = subprocess.run([sys.executable, svg_raster.__file__, *files, "--out", str(out), "--size", "40"],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert [line.startswith("error: ") for line in run.stderr.splitlines()] == [True, True]
    assert "<text> is not supported" in run.stderr and "none.svg: cannot be read" in run.stderr
    image = np.asarray(Image.open(out / "good.png"))
    assert image.shape == (40, 40, 3) and image[:, :20].max() == 0 and image[:, 20:].min() == 255
    assert (out / "bad.png").read_text() == "before" and not Path(out / "none.png").exists()
    assert svg_raster.main([str(good), "--out", str(out)]) == 0


# ---- nerf.py -----------------------------------------------------------------------------------------

NERF_SIZES = dict(levels=6, table=2 ** 14, width=16)


def nerf_pose(azimuth, elevation=0.3, distance=4.0):
    """Camera-to-world [4,4] that looks at the origin from an azimuth around z."""
    back = torch.tensor([math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation),
                         math.sin(elevation)], dtype=torch.float64)
    right = torch.linalg.cross(torch.tensor([0, 0, 1.0], dtype=torch.float64), back)
    right /= right.norm()
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.stack((right, torch.linalg.cross(back, right), back, distance * back), 1)
    return pose


def nerf_scene(folder, views=12, size=24, radius=0.8, alpha=True, split=True, **keys):
    """A sphere around the origin whose colour is its normal, written as Blender's files or as one transforms.json."""
    angle, frames = 0.6, {"train": [], "test": []}
    for i in range(views):
        pose = nerf_pose(i * 2.4, 0.1 + 0.06 * i)
        fine = 4 * size
        v, u = torch.meshgrid(torch.arange(fine), torch.arange(fine), indexing="ij")
        focal = fine / 2 / math.tan(angle / 2)
        d = torch.stack(((u + 0.5 - fine / 2) / focal, -(v + 0.5 - fine / 2) / focal, -torch.ones(fine, fine)), -1)
        d = (d / d.norm(dim=-1, keepdim=True)).double() @ pose[:3, :3].T
        along = d @ pose[:3, 3]
        root = along ** 2 - pose[:3, 3].square().sum() + radius ** 2
        hit = root > 0
        normal = (pose[:3, 3] + (-along - root.clamp_min(0).sqrt())[..., None] * d) / radius
        rgba = torch.cat((normal / 2 + 0.5, torch.ones(fine, fine, 1)), -1) * hit[..., None]
        rgba = rgba.view(size, 4, size, 4, 4).mean((1, 3))
        rgba[..., :3] /= rgba[..., 3:].clamp_min(1e-6)
        if not alpha:
            rgba = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        part = "test" if split and i % 4 == 3 else "train"
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray((rgba * 255).round().byte().numpy()).save(folder / part / f"{i}.png")
        frames[part].append({"file_path": f"{part}/{i}" + ("" if split else ".png"), "transform_matrix": pose.tolist()})
    for part in ("train", "test") if split else ("train",):
        name = f"transforms_{part}.json" if split else "transforms.json"
        (folder / name).write_text(json.dumps({"camera_angle_x": angle, "frames": frames[part]} | keys))
    return folder


@pytest.fixture(scope="module")
def nerf_sphere(tmp_path_factory):
    return load_scene(nerf_scene(tmp_path_factory.mktemp("sphere")))


@pytest.fixture(scope="module")
def nerf_fitted(nerf_sphere):
    return NeRF.fit(nerf_sphere, steps=300, progress=False, **NERF_SIZES)


class SolidBall(NeRF):
    """A field in closed form: an opaque ball of a given colour in the middle of the box."""
    radius = 0.8

    class Identity(torch.nn.Module):
        def forward(self, x, known=None):
            return x

    @classmethod
    def of(cls, scene):
        ball = cls(scene, **NERF_SIZES)
        ball.grid = cls.Identity()
        ball.occupied.fill_(True)
        ball.bounds.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]) * ball.extent)
        ball.step = 1 / 256
        return ball

    def density(self, x):
        place = (x * 2 - 1) * self.extent * self.scene.half + self.centre[:, None]
        return 1e5 * (place.norm(dim=0) < self.radius), torch.zeros(16, x.shape[1])

    def colour(self, out, sh):
        return torch.tensor([[0.2], [0.4], [0.6]]).expand(-1, out.shape[1])


# ---- nerf.py: the grid -------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [2 ** 4, 2 ** 12])  # all but the first level hashed; all levels dense
def test_grid_against_a_loop_over_corners(size):
    torch.manual_seed(0)
    grid = HashGrid(3, size, 1, 9).double()
    grid.table.data.normal_()
    x = torch.rand(3, 7, dtype=torch.float64)
    out = grid(x)
    for level, cells in enumerate(grid.cells):
        for n in range(7):
            place = [float(c) * cells for c in x[:, n]]
            wanted = torch.zeros(2, dtype=torch.float64)
            for corner in range(8):
                at = [int(p) + (corner >> k & 1) for k, p in enumerate(place)]
                weight = math.prod(1 - abs(p - a) for p, a in zip(place, at))
                if (cells + 1) ** 3 <= size:
                    entry = at[0] + (cells + 1) * (at[1] + (cells + 1) * at[2])
                else:
                    entry = sum(a * s for a, s in zip(at, HashGrid.STRIDES)) % size
                wanted += weight * grid.table[grid.start[level] + entry].detach()
            torch.testing.assert_close(out[[level, 3 + level], n], wanted)


def test_grid_gradcheck_and_known_features():
    torch.manual_seed(0)
    grid = HashGrid(2, 2 ** 5, 2, 6).double()
    x = torch.rand(3, 11, dtype=torch.float64)
    table = torch.randn_like(grid.table).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: nerf_module._Interpolate.apply(t, x, grid, None), table)
    grid.table.data.copy_(table)
    grid(x).square().sum().backward()
    once = grid.table.grad.clone()
    grid.table.grad = None
    grid(x, grid(x).detach()).square().sum().backward()
    assert torch.equal(once, grid.table.grad)


def test_grid_at_the_upper_face_and_without_points():
    grid = HashGrid(2, 2 ** 10, 2, 4)
    grid.table.data.fill_(1.0)
    torch.testing.assert_close(grid(torch.ones(3, 2)), torch.ones(4, 2))
    grid(torch.empty(3, 0)).sum().backward()
    assert grid.table.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="power of two"):
        HashGrid(2, 1000, 2, 4)


# ---- nerf.py: rendering ------------------------------------------------------------------------------

def test_volume_weights_against_a_loop():
    torch.manual_seed(0)
    ray = torch.tensor([0, 0, 0, 2, 2, 5])  # rays 1, 3 and 4 have no samples
    tau = torch.rand(6, dtype=torch.float64, requires_grad=True)
    weights, light = [], {}
    for t, r in zip(tau, ray.tolist()):
        weights.append(light.get(r, 1.0) * (1 - torch.exp(-t)))
        light[r] = light.get(r, 1.0) * torch.exp(-t)
    wanted, ours = torch.stack(weights), volume_weights(tau, ray, 6)
    torch.testing.assert_close(ours, wanted)
    factor = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad((ours * factor).sum(), tau)[0],
                               torch.autograd.grad((wanted * factor).sum(), tau)[0])


def test_volume_weights_keep_their_precision_behind_many_opaque_rays():
    count, each = 4000, 8
    tau = torch.full((count * each,), 500.0)
    tau[-each:] = torch.linspace(0.01, 0.3, each)
    weights = volume_weights(tau, torch.arange(count).repeat_interleave(each), count)
    last = tau[-each:].double()
    wanted = torch.exp(last - last.cumsum(0)) * (1 - torch.exp(-last))
    torch.testing.assert_close(weights[-each:].double(), wanted, rtol=1e-5, atol=0)


def test_a_ball_covers_its_area_and_lies_at_its_depth(nerf_sphere):
    ball = SolidBall.of(nerf_sphere)
    camera = ball.camera(0, 96)
    with torch.no_grad():
        picture, depth = ball.render(camera), ball.depth(camera)
    inside = (picture[0, 2] < 0.8).float()
    distance, focal = 4.0, camera.lens[0]
    disc = math.pi * focal ** 2 * ball.radius ** 2 / (distance ** 2 - ball.radius ** 2)  # of the tangent cone
    assert inside.sum().item() == pytest.approx(disc, rel=0.02)
    torch.testing.assert_close(picture[0, :, 48, 48], torch.tensor([0.2, 0.4, 0.6]))
    assert (picture[0, :, 0, 0] == 1).all() and depth[0, 0, 0, 0] == 0
    assert depth[0, 0, 48, 48].item() == pytest.approx(distance - ball.radius, abs=0.02)
    assert (depth_picture(depth)[0, :, 48, 48] > 0.9).all()


def test_a_ball_lies_where_the_photographs_show_it(nerf_sphere):
    ball = SolidBall.of(nerf_sphere)
    for view in (0, 4):
        with torch.no_grad():
            drawn = (ball.render(view, 48) < 0.9).any(1)
        shown = (ball.photograph(view, 48) < 0.9).any(1)
        assert (drawn != shown).float().mean() < 0.05


def test_hull_holds_the_object_and_little_else(nerf_sphere):
    nerf = NeRF(nerf_sphere, **NERF_SIZES)
    place = (nerf_module.cell_points(torch.arange(64 ** 3), 64) * 2 - 1) * nerf_sphere.half + nerf_sphere.centre[:, None]
    ball = place.norm(dim=0) < 0.8
    assert nerf.occupied[ball].all() and nerf.occupied.sum() < 2.5 * ball.sum() and nerf.seen.sum() > nerf.occupied.sum()


def test_contract_keeps_the_box_and_is_inverted():
    x = torch.randn(3, 500, dtype=torch.float64) * 20
    assert contract(x).abs().max() < 2
    torch.testing.assert_close(uncontract(contract(x)), x)
    near = torch.rand(3, 50) * 2 - 1
    assert torch.equal(contract(near), near)


# ---- nerf.py: gradients of pictures ------------------------------------------------------------------

def test_deferred_gradients_equal_direct_ones(nerf_fitted, monkeypatch):
    nerf = copy.deepcopy(nerf_fitted)
    weighting = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def gradient(chunk):
        monkeypatch.setattr(NeRF, "chunk", chunk)
        nerf.zero_grad()
        picture = nerf.render(1, 32)
        (picture * weighting).sum().backward()
        return picture.detach(), torch.cat([p.grad.flatten() for p in nerf.parameters()])
    (a, direct), (b, deferred) = gradient(10 ** 6), gradient(100)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert (direct - deferred).norm() <= 1e-5 * direct.norm()
    assert direct.norm() > 0


def test_deferred_gradients_keep_the_occupancy_they_were_drawn_with(nerf_fitted, monkeypatch):
    monkeypatch.setattr(NeRF, "chunk", 100)
    nerf = copy.deepcopy(nerf_fitted)
    (wanted,) = torch.autograd.grad(nerf.render(1, 32).sum(), [nerf.rgb_out])
    picture = nerf.render(1, 32)
    nerf.occupied = torch.zeros_like(nerf.occupied)
    assert torch.equal(torch.autograd.grad(picture.sum(), [nerf.rgb_out])[0], wanted)
    assert not nerf.occupied.any()


def test_deferred_gradients_of_changed_parameters_raise(nerf_fitted, monkeypatch):
    monkeypatch.setattr(NeRF, "chunk", 100)
    nerf = copy.deepcopy(nerf_fitted)
    picture = nerf.render(1, 32)
    with torch.no_grad():
        nerf.rgb_out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        picture.sum().backward()


@pytest.mark.parametrize("chunk", [100, 10 ** 6])
def test_nothing_to_see_is_the_background(nerf_sphere, monkeypatch, chunk):
    monkeypatch.setattr(NeRF, "chunk", chunk)
    nerf = NeRF(nerf_sphere, **NERF_SIZES)
    nerf.occupied = torch.zeros_like(nerf.occupied)
    nerf.bounds = nerf._bounds()
    picture = nerf.render(0, 16)
    assert (picture == 1).all()
    picture.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in nerf.parameters())


def test_render_has_no_side_effects(nerf_fitted):
    before = copy.deepcopy(nerf_fitted.state_dict())
    a = nerf_fitted.render(2, 32)
    b = nerf_fitted.render(2, 32)
    assert torch.equal(a, b) and a.shape == (1, 3, 32, 32) and a.min() >= 0 and a.max() <= 1
    assert nerf_fitted.render(2).shape == (1, 3, 24, 24)
    after = nerf_fitted.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_an_edit_can_grow_geometry(nerf_fitted):
    """Towards pictures of a larger ball: what is added lies outside of all that was occupied."""
    nerf, scene = copy.deepcopy(nerf_fitted), nerf_fitted.scene
    larger = SolidBall.of(scene)
    larger.radius = 0.95
    with torch.no_grad():
        wanted = [larger.render(view, 24) for view in range(len(scene.train))]
        error = [(nerf.render(v, 24) - w).square().mean() for v, w in enumerate(wanted)]
    optimiser, generator = torch.optim.Adam(nerf.param_groups(1e-2)), torch.Generator().manual_seed(0)
    for _ in range(120):
        view = nerf.sample_view(generator)
        optimiser.zero_grad()
        (nerf.render(view, 24) - wanted[view]).square().mean().backward()
        optimiser.step()
        nerf.project_()
    with torch.no_grad():
        now = [(nerf.render(v, 24) - w).square().mean() for v, w in enumerate(wanted)]
    assert sum(now) < 0.1 * sum(error)


# ---- nerf.py: the fit and its files ------------------------------------------------------------------

def test_fit_reaches_the_test_views(nerf_fitted):
    psnr, views = evaluate(nerf_fitted, nerf_fitted.scene)
    assert views == 3 and psnr > 22 and nerf_fitted.fitted["steps"] == 300


def test_fit_of_a_capture_without_alpha(tmp_path):
    scene = load_scene(nerf_scene(tmp_path, alpha=False, split=False, aabb_scale=2))
    assert not scene.bounded and len(scene.test) == 2 and len(scene.train) == 10
    nerf = NeRF.fit(scene, steps=250, progress=False, **NERF_SIZES)
    views = [(nerf.render(i, 24).detach() - nerf.photograph(i, 24)).square().mean() for i in range(10)]
    assert sum(views) / 10 < 0.02  # white walls say little about where they are: training views only
    nerf.render(0, 24).sum().backward()
    assert nerf.sky_out.grad.abs().sum() > 0


def test_a_killed_fit_resumes_bit_identically(nerf_sphere, tmp_path, monkeypatch):
    whole = NeRF.fit(nerf_sphere, steps=120, progress=False, **NERF_SIZES)
    ticks = iter(range(0, 10 ** 6, 20))
    monkeypatch.setattr(nerf_module.time, "monotonic", lambda: next(ticks))  # a checkpoint after each step
    step, calls = NeRF.fit_loss, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 101:
            raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(NeRF, "fit_loss", killed)
    file = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        NeRF.fit(nerf_sphere, steps=120, checkpoint=file, progress=False, **NERF_SIZES)
    resumed = NeRF.fit(nerf_sphere, steps=120, checkpoint=file, progress=False, **NERF_SIZES)
    assert len(calls) == 101 + 20 and resumed.fitted["steps"] == 120
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    cached = NeRF.fit(nerf_sphere, steps=120, checkpoint=file, progress=False, **NERF_SIZES)
    assert len(calls) == 121 and torch.equal(cached.grid.table, whole.grid.table)


def test_checkpoints_that_are_refused(nerf_fitted, nerf_sphere, tmp_path):
    other = load_scene(nerf_scene(tmp_path / "other", views=4, radius=0.5))
    saved, fitted = tmp_path / "nerf.safetensors", tmp_path / "fit.pt"
    nerf_fitted.save(saved)
    NeRF.fit(nerf_sphere, steps=1, checkpoint=fitted, progress=False, **NERF_SIZES)
    contents = fitted.read_bytes()
    with pytest.raises(SceneError, match="nerf.safetensors: was fitted to another scene"):
        NeRF.load(saved, other)
    with pytest.raises(SceneError, match="fit.pt: is the fit of another scene"):
        NeRF.fit(other, steps=2, checkpoint=fitted, progress=False, **NERF_SIZES)
    with pytest.raises(SceneError, match="fit.pt: has other sizes"):
        NeRF.fit(nerf_sphere, steps=2, checkpoint=fitted, progress=False, **NERF_SIZES | dict(width=32))
    assert fitted.read_bytes() == contents
    for damaged, message in ((saved, "no readable NeRF"), (fitted, "no readable checkpoint")):
        damaged.write_bytes(damaged.read_bytes()[:1000])
        with pytest.raises(SceneError, match=f"{damaged.name}: {message}"):
            NeRF.load(saved, nerf_sphere) if damaged is saved else NeRF.fit(
                nerf_sphere, steps=2, checkpoint=fitted, progress=False, **NERF_SIZES)


def test_saved_copied_and_restored_nerfs_draw_the_same(nerf_fitted, tmp_path):
    nerf_fitted.save(tmp_path / "a.safetensors")
    loaded = NeRF.load(tmp_path / "a.safetensors", nerf_fitted.scene)
    twin = copy.deepcopy(nerf_fitted)
    assert twin.scene is nerf_fitted.scene and twin.grid.table is not nerf_fitted.grid.table
    fresh = NeRF(nerf_fitted.scene, **NERF_SIZES)
    fresh.load_state_dict(nerf_fitted.state_dict())
    for other in (loaded, twin, fresh):
        assert torch.equal(other.render(3, 40), nerf_fitted.render(3, 40))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_turntable_input_path_and_export(nerf_fitted, tmp_path):
    cameras = turntable(nerf_fitted, 8, 20)
    for camera in cameras:  # they look at the middle, upright, from where the training cameras are
        position, back = camera.pose[:, 3], camera.pose[:, 2]
        toward = position - nerf_fitted.scene.centre
        assert torch.dot(toward / toward.norm(), back) > 0.99 and camera.pose[2, 1] > 0.5
        torch.testing.assert_close(camera.pose[:, :3] @ camera.pose[:, :3].T, torch.eye(3), atol=1e-5, rtol=0)
    spread = torch.stack([c.pose[:, 3] for c in cameras])
    assert (spread - spread.mean(0)).norm(dim=1).min() > 2  # all the way round
    around = torch.stack([c.pose[:, 3] for c in sides(nerf_fitted, 4, 20)])
    assert_close(around.diff(dim=0).norm(dim=1), (around[1] - around[0]).norm().expand(3))  # evenly spaced
    path = input_path(nerf_fitted, 17, 20)
    torch.testing.assert_close(path[0].pose, nerf_fitted.scene.train[0].camera.pose, atol=1e-5, rtol=0)
    torch.testing.assert_close(path[-1].pose, nerf_fitted.scene.train[-1].camera.pose, atol=1e-5, rtol=0)
    export(nerf_fitted, tmp_path, cameras)
    again = load_scene(tmp_path)
    assert len(again.train) == 7 and len(again.test) == 1
    view = again.train[0]  # the frame with number 1
    torch.testing.assert_close(view.camera.pose, cameras[1].pose)
    torch.testing.assert_close(torch.tensor(view.camera.lens), torch.tensor(cameras[1].lens))
    with torch.no_grad():
        wanted = nerf_fitted.render(cameras[1])[0].permute(1, 2, 0)
    assert (view.pixels.float() / 255 - wanted).abs().max() <= 0.5 / 255 + 1e-6
    depth = np.array(Image.open(tmp_path / "depth" / "00001.png")).astype(float) / 1000
    assert depth[10, 10] == pytest.approx(4 - 0.8, abs=0.25)


def test_a_dataset_starts_as_the_renders_and_pictures_can_be_replaced(nerf_fitted):
    nerf, generator = copy.deepcopy(nerf_fitted), torch.Generator().manual_seed(0)
    dataset = nerf.dataset(16)
    assert nerf.data_loss(dataset, generator).item() < 1e-3  # nothing to fit yet
    camera = nerf.camera(2, 16)
    with torch.no_grad():
        dataset.replace(2, 1 - nerf.render(camera))
    assert (dataset.pixels.view(-1, 16, 16, 3)[2].float() - 255 * (1 - nerf.render(camera)[0].detach()).permute(1, 2, 0)
            ).abs().max() <= 0.5 + 1e-3
    assert nerf.data_loss(dataset, generator).item() > 1e-3


def test_levels_finer_than_the_pictures_keep_what_they_have(nerf_fitted):
    nerf = copy.deepcopy(nerf_fitted)
    grads = {}
    for size in (8, 10 ** 6):
        nerf.learn_from(size)
        nerf.zero_grad()
        nerf.render(0, 16).square().mean().backward()
        grads[size] = [nerf.grid.table.grad[a:b].clone() for a, b in zip(nerf.grid.start, nerf.grid.start[1:])]
    coarse = [cells <= 2 * nerf.camera(None, 8).lens[0] / nerf.distance for cells in nerf.grid.cells]
    coarse[0] = True  # one level always goes on
    assert not all(coarse)
    for learns, some, all_ in zip(coarse, grads[8], grads[10 ** 6]):
        assert_close(some, all_ if learns else torch.zeros_like(all_))
        assert all_.any()


def test_shifted_pixels_are_seen_from_the_same_place(nerf_fitted):
    camera = nerf_fitted.camera(0, 16)
    moved = camera.shifted(1, 2).directions().view(3, 16, 16)
    assert_close(moved[:, :-2, :-1], camera.directions().view(3, 16, 16)[:, 2:, 1:])
    with torch.no_grad():
        pictures = [nerf_fitted.render(0, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert_close(pictures[0], pictures[1], atol=0, rtol=0)
    assert (pictures[0] - pictures[2]).abs().max() > 1e-3


# ---- nerf.py: cameras and scenes ---------------------------------------------------------------------

def test_directions_follow_opengl_and_invert_opencv():
    lens = torch.tensor([50.0, 60, 32, 24, 0, 0, 0, 0, 0, 0])[:, None]
    d = directions(lens, torch.tensor([32.0, 82]), torch.tensor([24.0, 24]))
    torch.testing.assert_close(d, torch.tensor([[0, 2 ** -0.5], [0, 0], [-1, -2 ** -0.5]]))
    k1, k2, k3, k4, p1, p2 = 0.06, -0.08, 0.02, -0.01, -0.003, 0.002
    u, v = torch.meshgrid(torch.linspace(0, 64, 9).double(), torch.linspace(0, 48, 9).double(), indexing="xy")
    lens = torch.tensor([50.0, 60, 32, 24, k1, k2, k3, k4, p1, p2], dtype=torch.float64)[:, None]
    d = directions(lens, u.flatten(), v.flatten())
    x, y = d[0] / -d[2], -d[1] / -d[2]  # OpenCV: y down, looking along +z
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 ** 2 + k3 * r2 ** 3 + k4 * r2 ** 4
    torch.testing.assert_close(50 * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + 32, u.flatten())
    torch.testing.assert_close(60 * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + 24, v.flatten())


def test_square_is_the_central_crop():
    camera = Camera(torch.eye(4)[:3], (50.0, 50, 33, 25, 0, 0, 0, 0, 0, 0), 64, 48)
    square = camera.square(96)
    full = camera.directions().view(3, 48, 64)
    ours = torch.nn.functional.avg_pool2d(square.directions().view(1, 3, 96, 96), 2)[0]
    torch.testing.assert_close(ours / ours.norm(dim=0), full[:, :, 8:56], atol=2e-4, rtol=0)


@pytest.mark.parametrize("keys, focal", [
    ({"x_fov": 90, "fl_x": 99.0, "camera_angle_x": 1.0}, 12.0), ({"fl_x": 99.0, "camera_angle_x": 1.0}, 99.0),
    ({"camera_angle_x": math.pi / 2}, 12.0), ({"fl_x": 198.0, "w": 48.0, "h": 48.0}, 99.0)])
def test_focal_precedence(tmp_path, keys, focal):
    scene = load_scene(nerf_scene(tmp_path, views=4, split=False, **keys))
    assert scene.train[0].camera.lens[:2] == pytest.approx((focal, focal))


def test_intrinsics_of_frames_downscale_and_missing_frames(tmp_path):
    folder = nerf_scene(tmp_path, views=10, split=False, fl_x=30.0, fl_y=31.0, cx=11.0, k1=0.1, p2=0.01)
    file = json.loads((folder / "transforms.json").read_text())
    file["frames"][1] |= {"fl_x": 60.0, "cy": 9.0, "k1": 0.2}
    file["frames"][2]["file_path"] = "train/gone.png"
    (folder / "transforms.json").write_text(json.dumps(file))
    with pytest.warns(UserWarning, match="1 of 10 pictures are missing, e.g. .*gone.png"):
        scene = load_scene(folder, downscale=2)
    assert len(scene.test) == 2 and len(scene.train) == 7 and scene.train[0].pixels.shape == (12, 12, 4)
    assert scene.train[0].camera.lens == pytest.approx((30, 15.5, 5.5, 4.5, 0.2, 0, 0, 0, 0, 0.01))
    assert scene.train[1].camera.lens == pytest.approx((15, 15.5, 5.5, 6, 0.1, 0, 0, 0, 0, 0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_scene(folder / "transforms.json", 2).fingerprint == scene.fingerprint
        assert load_scene(folder).fingerprint != scene.fingerprint


def test_bounds_hold_the_object_and_honour_aabb_scale(tmp_path):
    scene = load_scene(nerf_scene(tmp_path / "a"))
    assert scene.centre.norm() < 0.15 and 0.8 < scene.half < 1.4
    capture = load_scene(nerf_scene(tmp_path / "b", alpha=False, split=False))
    assert capture.half == pytest.approx(4, rel=0.05)
    assert load_scene(nerf_scene(tmp_path / "c", alpha=False, split=False, aabb_scale=1)).half < 1.6


def nerf_broken(change):
    """A function that damages frame 1 of a scene's file."""
    def damage(folder):
        file = json.loads((folder / "transforms.json").read_text())
        change(file)
        (folder / "transforms.json").write_text(json.dumps(file))
    return damage


def nerf_matrix(file, value):
    file["frames"][1]["transform_matrix"] = value


@pytest.mark.parametrize("damage, message", [
    (nerf_broken(lambda f: f.update(frames=[])), "transforms.json: no frames in it"),
    (nerf_broken(lambda f: f.update(frames=[3])), "frame 0 has no file_path"),
    (nerf_broken(lambda f: nerf_matrix(f, [[math.nan] * 4] * 4)), "the transform_matrix of frame 1 is not finite"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0, 0, 0]] * 4)), "the transform_matrix of frame 1 is singular"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0], [0, 1]])), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: nerf_matrix(f, "no")), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: f.pop("camera_angle_x")), "frame 0 has no focal length"),
    (nerf_broken(lambda f: f.update(fl_x="wide")), "frame 0 has an intrinsic that is no number"),
    (nerf_broken(lambda f: f.update(fl_x=-3)), "not finite and positive"),
    (nerf_broken(lambda f: f.update(w=10, h=90)), "frame 0 is 24 x 24 pixels, the file says 10 x 90"),
    (nerf_broken(lambda f: f.update(camera_model="OPENCV_FISHEYE")), "camera model OPENCV_FISHEYE is not supported"),
    (nerf_broken(lambda f: f.update(aabb_scale="big")), "aabb_scale is no number"),
    (nerf_broken(lambda f: [x.update(file_path="gone.png") for x in f["frames"]]), "none of its 4 pictures is there"),
    (lambda p: (p / "transforms.json").write_text("{ nonsense"), "transforms.json: no readable JSON"),
    (lambda p: (p / "transforms.json").unlink(), "no transforms.json or transforms_train.json in it"),
    (lambda p: (p / "train" / "1.png").write_bytes(b"x"), "1.png: no readable picture"),
    (lambda p: Image.new("RGBA", (30, 20)).save(p / "train" / "1.png"), "1.png: 30 x 20 pixels, those before it have"),
])
def test_bad_scenes_are_one_line(tmp_path, damage, message):
    folder = nerf_scene(tmp_path, views=4, split=False, alpha="aabb" not in message)
    damage(folder)
    with pytest.raises(SceneError) as error:
        load_scene(folder)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_scene_at_all(tmp_path):
    with pytest.raises(SceneError, match="no such scene"):
        load_scene(tmp_path / "nowhere")
    with pytest.raises(SceneError, match="downscale must be at least 1, got 0"):
        load_scene(nerf_scene(tmp_path), downscale=0)


# ---- splat.py -----------------------------------------------------------------------------------------

SPLAT_SIZES = dict(count=300, limit=800, degree=1)


def splat_camera(size=32, width=None, distance=4.0, angle=0.6):
    """At `distance` on the z axis, looking at the origin."""
    pose = torch.eye(4)[:3].clone()
    pose[2, 3] = distance
    width = width or size
    focal = size / 2 / math.tan(angle / 2)
    return Camera(pose, (focal, focal, width / 2, size / 2, 0, 0, 0, 0, 0, 0), width, size)


def splat_random(scene, count=60, degree=3, seed=0, spread=0.7, dtype=torch.float32):
    """Gaussians of many sizes, shapes and opacities, some of them behind the camera or beside the picture."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    splats = Splats(scene, draw(count, 3) * spread, -2.0 + 0.6 * draw(count, 3), draw(count, 4), draw(count) * 2,
                    draw(count, 3), 0.3 * draw(count, (degree + 1) ** 2 - 1, 3))
    return splats.to(dtype)


def splat_dense(splats, camera):
    """[4,H,W]: every Gaussian at every pixel, plain autograd, nothing taken from the tiles."""
    uv, depth, cov = project(splats.means, splats.log_scales, splats.quaternions, camera, splats.near)
    v, u = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    d = torch.stack((u.flatten(), v.flatten())).to(uv)[:, None] - uv[:, :, None]  # [2,N,P]
    inverse = torch.linalg.inv(torch.stack((cov[0], cov[1], cov[1], cov[2]), 1).view(-1, 2, 2))
    power = -0.5 * torch.einsum("anp,nab,bnp->np", d, inverse, d)
    alpha = (splats.opacities.sigmoid()[:, None] * power.exp()).clamp(max=0.99)
    alpha = torch.where((alpha > 1 / 255) & (depth > splats.near)[:, None], alpha, 0)
    order = depth.argsort()
    rgb, alpha = splats.colours(camera)[order], alpha[order]
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat((torch.ones_like(after[:1]), after[:-1]))
    return torch.cat((rgb.T @ (before * alpha), after[-1:])).view(4, camera.height, camera.width)


@pytest.fixture(scope="module")
def splat_sphere(tmp_path_factory):
    return load_scene(nerf_scene(tmp_path_factory.mktemp("sphere")))


@pytest.fixture(scope="module")
def splat_fitted(splat_sphere):
    return Splats.fit(splat_sphere, steps=250, progress=False, **SPLAT_SIZES)


# ---- splat.py: rendering ------------------------------------------------------------------------------

def test_a_gaussian_covers_its_integral(splat_sphere):
    camera = splat_camera(64)
    sigma, opacity = 0.15, 0.8
    splats = Splats(splat_sphere, torch.zeros(1, 3), torch.full((1, 3), math.log(sigma)),
                    torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([opacity]).logit(), torch.zeros(1, 3),
                    torch.zeros(1, 0, 3))
    picture, _ = splats.draw(camera)
    variance = (sigma * camera.lens[0] / 4) ** 2 + 0.3  # in square pixels, with the low-pass filter
    cut = 1 / 255 / opacity  # of the Gaussian's tail
    assert 1 - picture[3].min().item() == pytest.approx(opacity * math.exp(-0.25 / variance), abs=1e-5)
    assert (1 - picture[3]).sum().item() == pytest.approx(opacity * 2 * math.pi * variance * (1 - cut), rel=2e-3)
    assert_close(picture[:3], 0.5 * (1 - picture[3:]).expand(3, -1, -1))  # no harmonics: grey


def test_a_rotated_needle_lies_along_its_axis(splat_sphere):
    half = math.radians(30) / 2
    splats = Splats(splat_sphere, torch.zeros(1, 3), torch.tensor([[0.3, 0.03, 0.03]]).log(),
                    torch.tensor([[math.cos(half), 0, 0, math.sin(half)]]) * 3, torch.tensor([3.0]), torch.zeros(1, 3),
                    torch.zeros(1, 0, 3))
    alpha = 1 - splats.draw(splat_camera(64))[0][3]
    v, u = torch.meshgrid(31.5 - torch.arange(64), torch.arange(64) - 31.5, indexing="ij")  # v up
    xx, xy, yy = ((alpha * p).sum().item() for p in (u * u, u * v, v * v))
    assert math.degrees(0.5 * math.atan2(2 * xy, xx - yy)) == pytest.approx(30, abs=0.5)
    assert_close(rotations(splats.quaternions)[:, 0, 0], torch.tensor([3 ** 0.5 / 2, 0.5, 0]))


@pytest.mark.parametrize("size, width, count", [(40, 40, 60), (33, 50, 60), (24, 24, 700)])
def test_tiles_against_every_gaussian_at_every_pixel(splat_sphere, size, width, count):
    splats = splat_random(splat_sphere, count).requires_grad_()
    camera = splat_camera(size, width)
    weighting = torch.randn(4, size, width, generator=torch.Generator().manual_seed(1))
    pictures, gradients = [], []
    for picture in (splats.draw(camera)[0], splat_dense(splats, camera)):
        pictures.append(picture.detach())
        gradients.append(torch.autograd.grad((picture * weighting).sum(), list(splats.parameters())))
    assert (pictures[0] - pictures[1]).abs().max() < 2e-4  # what lies behind the last 1e-4 of the light is not drawn
    for (name, _), a, b in zip(splats.named_parameters(), *gradients):
        assert (a - b).norm() < 2e-3 * b.norm(), name


def test_gradcheck_of_the_tiles(splat_sphere):
    camera = splat_camera(12)
    splats = splat_random(splat_sphere, 9, 0, spread=0.3, dtype=torch.float64)
    with torch.no_grad():
        splats.opacities[0] = 12.0  # clamped
        uv, depth, cov = project(splats.means, splats.log_scales, splats.quaternions, camera, 0.1)
        tiles = Tiles(uv, depth, cov, splats.opacities.sigmoid(), camera, 0.1)
        quadratic = quadratics(uv, cov, splats.opacities)
    colour = torch.rand(9, 3, dtype=torch.float64)
    assert len(tiles.index) > 9  # more than one tile each
    torch.autograd.gradcheck(lambda q, c: splat_module._Composite.apply(q, c, tiles),
                             (quadratic.requires_grad_(), colour.requires_grad_()), eps=1e-7, atol=1e-5)


def test_lists_end_where_the_light_is_spent(splat_sphere, monkeypatch):
    """Blocks of any size draw the same; a wall hides what lies behind and gets its gradient."""
    splats, camera = splat_random(splat_sphere, 300), splat_camera(32)
    with torch.no_grad():
        splats.opacities += 3
    whole = splats.draw(camera)[0]
    gradient = torch.autograd.grad(whole[:3].square().sum(), splats.means)[0]
    monkeypatch.setattr(splat_module._Composite, "DEPTH", 3)
    monkeypatch.setattr(splat_module._Composite, "ELEMENTS", 2 ** 10)
    parts = splats.draw(camera)[0]
    assert (whole - parts).abs().max() < 2e-4
    other = torch.autograd.grad(parts[:3].square().sum(), splats.means)[0]
    assert (gradient - other).norm() < 2e-3 * gradient.norm()


@pytest.mark.parametrize("where", ["none", "behind", "beside", "transparent"])
def test_nothing_in_sight_is_the_background(splat_sphere, where):
    splats = splat_random(splat_sphere, 0 if where == "none" else 5)
    with torch.no_grad():
        splats.means[:] = torch.tensor({"beside": [50.0, 0, 0], "behind": [0, 0, 4.1]}.get(where, [0.0, 0, 0]))
        if where == "transparent":
            splats.opacities.fill_(-7)
    picture = splats.render(splat_camera(20))
    assert (picture == 1).all() and picture.shape == (1, 3, 20, 20)
    picture.sum().backward()
    assert all(torch.isfinite(p.grad).all() and (p.grad == 0).all() for p in splats.parameters())


def test_behind_and_beside_the_camera_gradients_stay_finite(splat_sphere):
    splats = splat_random(splat_sphere, 200, spread=4)
    with torch.no_grad():
        splats.means[:3] = torch.tensor([0.3, 0.2, 4.0])  # in the plane of the camera
    splats.render(splat_camera(40)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in splats.parameters())


def test_a_column_of_opaque_gaussians_gives_finite_gradients(splat_sphere):
    """No light at all is left behind it, in tiles that have light elsewhere."""
    splats, camera = splat_random(splat_sphere, 300, 0), splat_camera(24)
    with torch.no_grad():
        splats.means[:150] = torch.linspace(-1, 1, 150)[:, None] * torch.tensor([0, 0, 1.0])
        splats.opacities[:150] = 9
    gradients = []
    for picture in (splats.draw(camera)[0], splat_dense(splats, camera)):
        gradients.append(torch.autograd.grad(picture[:3].square().sum(), splats.sh_dc)[0])
    assert torch.isfinite(gradients[0]).all() and (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()


def test_far_needles_keep_their_place_in_large_pictures(splat_sphere):
    """The polynomial in pixels is moved to the tile in float64: its large terms cancel."""
    splats = splat_random(splat_sphere, 40, 0)
    with torch.no_grad():
        splats.log_scales[:, 0] += 2
        splats.log_scales[:, 1:] -= 2
    a, b = (splats.draw(splat_camera(1200, angle=0.1))[0] for splats in (splats, copy.deepcopy(splats).double()))
    assert (a - b).abs().max() < 5e-3


def test_harmonics_are_those_of_the_nerf(splat_sphere):
    splats, camera = splat_random(splat_sphere, 50), splat_camera()
    d = splats.means - camera.pose[:, 3]
    harmonics = spherical_harmonics((d / d.norm(dim=1, keepdim=True)).T)  # [16,N]
    sh = torch.cat((splats.sh_dc[:, None], splats.sh_rest), 1)  # [N,16,3]
    wanted = (0.5 + torch.einsum("kn,nkc->nc", harmonics, sh)).clamp_min(0)
    assert_close(splats.colours(camera), wanted)
    flat = Splats(splat_sphere, *(getattr(splats, n) for n in splat_module.ATTRIBUTES[:5]), splats.sh_rest[:, :3])
    assert_close(flat.colours(camera), (0.5 + torch.einsum("kn,nkc->nc", harmonics[:4], sh[:, :4])).clamp_min(0))


def test_splats_render_is_deterministic_and_pure(splat_fitted):
    before = copy.deepcopy(splat_fitted.state_dict())
    pictures, gradients = [], []
    for _ in range(2):
        pictures.append(splat_fitted.render(2, 32))
        gradients.append(torch.autograd.grad(pictures[-1].square().sum(), splat_fitted.means)[0])
    assert torch.equal(*pictures) and torch.equal(*gradients)
    assert pictures[0].shape == (1, 3, 32, 32) and 0 <= pictures[0].min() and pictures[0].max() <= 1
    assert splat_fitted.render(2).shape == (1, 3, 24, 24)
    assert all(torch.equal(before[k], v) for k, v in splat_fitted.state_dict().items())


# ---- splat.py: the fit --------------------------------------------------------------------------------

def test_splats_reach_the_test_views(splat_fitted):
    psnr, views = evaluate(splat_fitted, splat_fitted.scene)
    assert views == 3 and psnr > 22 and splat_fitted.fitted["steps"] == 250
    assert SPLAT_SIZES["count"] != len(splat_fitted.means) <= SPLAT_SIZES["limit"]
    picture = splat_fitted.render(turntable(splat_fitted, 4, 20)[1])
    assert picture.shape == (1, 3, 20, 20)
    assert (picture[0, :, 10, 10] < 0.95).any() and (picture[0, :, 0, 0] > 0.95).all()


def test_splats_of_a_capture_without_alpha(tmp_path):
    scene = load_scene(nerf_scene(tmp_path, alpha=False, split=False, aabb_scale=2))
    splats = Splats.fit(scene, steps=200, progress=False, **SPLAT_SIZES)
    views = [(splats.render(i, 24).detach() - splats.photograph(i, 24)).square().mean() for i in range(10)]
    assert sum(views) / 10 < 0.03


def test_a_killed_fit_of_splats_resumes_bit_identically(splat_sphere, tmp_path, monkeypatch):
    whole = Splats.fit(splat_sphere, steps=130, progress=False, **SPLAT_SIZES)
    ticks = iter(range(0, 10 ** 6, 20))
    monkeypatch.setattr(splat_module.time, "monotonic", lambda: next(ticks))  # a checkpoint after each step
    step, calls = Splats._fit_step, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 111:
            raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(Splats, "_fit_step", killed)
    file = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        Splats.fit(splat_sphere, steps=130, checkpoint=file, progress=False, **SPLAT_SIZES)
    resumed = Splats.fit(splat_sphere, steps=130, checkpoint=file, progress=False, **SPLAT_SIZES)
    assert len(calls) == 111 + 20 and resumed.fitted["steps"] == 130
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    cached = Splats.fit(splat_sphere, steps=130, checkpoint=file, progress=False, **SPLAT_SIZES)
    assert len(calls) == 131 and torch.equal(cached.means, whole.means)


def test_checkpoints_of_splats_that_are_refused(splat_sphere, tmp_path):
    other, file = load_scene(nerf_scene(tmp_path / "other", views=4, radius=0.5)), tmp_path / "fit.pt"
    Splats.fit(splat_sphere, steps=1, checkpoint=file, progress=False, **SPLAT_SIZES)
    contents = file.read_bytes()
    with pytest.raises(SceneError, match="fit.pt: is the fit of another scene"):
        Splats.fit(other, steps=2, checkpoint=file, progress=False, **SPLAT_SIZES)
    with pytest.raises(SceneError, match="fit.pt: has other sizes"):
        Splats.fit(splat_sphere, steps=2, checkpoint=file, progress=False, **SPLAT_SIZES | dict(degree=0))
    assert file.read_bytes() == contents
    file.write_bytes(contents[:1000])
    with pytest.raises(SceneError, match="fit.pt: no readable checkpoint"):
        Splats.fit(splat_sphere, steps=2, checkpoint=file, progress=False, **SPLAT_SIZES)


def test_an_edit_of_splats(splat_fitted):
    """Towards red pictures, by the loop's own steps; the number stays, the quaternions keep their length."""
    splats, generator = copy.deepcopy(splat_fitted), torch.Generator().manual_seed(0)
    assert splats.scene is splat_fitted.scene and splats.means is not splat_fitted.means
    optimiser = torch.optim.Adam(splats.param_groups(sh_dc=3e-2))
    red = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    with torch.no_grad():
        hit = [(splat_fitted.render(v, 24)[0] < 0.98).any(0) for v in range(len(splats.scene.train))]
    errors = []
    for _ in range(60):
        view = splats.sample_view(generator)
        error = ((splats.render(view, 24)[0] - red) * hit[view]).square().mean()
        errors.append(error.item())
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        splats.project_()
    assert sum(errors[-8:]) < 0.4 * sum(errors[:8]) and len(splats.means) == len(splat_fitted.means)
    assert_close(splats.quaternions.norm(dim=1), torch.ones(len(splats.means)))
    fresh = copy.deepcopy(splat_fitted)
    fresh.load_state_dict(splats.state_dict())
    assert torch.equal(fresh.render(1, 24), splats.render(1, 24))


# ---- splat.py: files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_ply_round_trip(splat_sphere, tmp_path, degree):
    splats = splat_random(splat_sphere, 30, degree)
    splats.save(tmp_path / "a.ply")
    again = Splats.load(tmp_path / "a.ply", splat_sphere)
    for (name, a), b in zip(splats.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    assert torch.equal(splats.render(0, 32), again.render(0, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def splat_ply(splats, drop=(), types={}, order=None, form="binary_little_endian", element="vertex"):
    """A .ply written attribute by attribute: another order, other types, without some."""
    columns = {f"f_rest_{c * 3 + k}": splats.sh_rest[:, k, c] for c in range(3) for k in range(3)}
    columns |= {f"f_dc_{c}": splats.sh_dc[:, c] for c in range(3)} | {"opacity": splats.opacities}
    columns |= {f"scale_{i}": splats.log_scales[:, i] for i in range(3)}
    columns |= {f"rot_{i}": splats.quaternions[:, i] for i in range(4)}
    columns |= {name: splats.means[:, i] for i, name in enumerate("xyz")} | {"extra": torch.zeros(len(splats.means))}
    names = [n for n in columns if n not in drop]
    names = [names[i] for i in np.random.RandomState(order).permutation(len(names))] if order is not None else names
    kinds = {n: types.get(n, "float") for n in names}
    codes = {"float": "<f4", "double": "<f8", "uchar": "u1"}
    table = np.empty(len(splats.means), [(n, codes[kinds[n]]) for n in names])
    for n in names:
        table[n] = columns[n].detach()
    lines = ["ply", f"format {form} 1.0", "comment made by a test", f"element {element} {len(table)}",
             *(f"property {kinds[n]} {n}" for n in names), "comment", "end_header", ""]
    return "\n".join(lines).encode() + table.tobytes()


def test_ply_attributes_are_found_by_name(splat_sphere, tmp_path):
    splats = splat_random(splat_sphere, 30, 1)
    (tmp_path / "a.ply").write_bytes(splat_ply(splats, order=3, types={"x": "double", "extra": "uchar"}))
    again = Splats.load(tmp_path / "a.ply", splat_sphere)
    assert all(torch.equal(a, b) for a, b in zip(splats.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("name, contents, message", [
    ("a.ply", lambda s: b"solid stl", "a.ply: no .ply: it has no header"),
    ("a.ply", lambda s: splat_ply(s, form="ascii"), "a.ply: only binary_little_endian .ply can be read"),
    ("a.ply", lambda s: splat_ply(s, element="chunk"), "a.ply: is a compressed .ply, export it uncompressed"),
    ("a.ply", lambda s: splat_ply(s, element="face"), "does not begin with the vertices"),
    ("a.ply", lambda s: splat_ply(s, drop=("scale_2", "opacity")), "it has no scale_2, opacity"),
    ("a.ply", lambda s: splat_ply(s, drop=("f_rest_8",)), "8 f_rest are no harmonics of degree 0 to 3"),
    ("a.ply", lambda s: splat_ply(s)[:-1], "a.ply: is cut short: 2879 bytes of 2880"),
    ("a.ply", lambda s: splat_ply(s).replace(b"property float x\n", b"property list uchar int x\n"), "cannot be read"),
    ("a.ply", lambda s: splat_ply(s)[:-12] + b"\xff" * 12, "a.ply: 1 of its 30 Gaussians are not finite"),
    ("a.splat", lambda s: b"\0" * 33, "a.splat: is cut short: 33 bytes are no multiple of 32"),
    ("a.ksplat", lambda s: b"", "a.ksplat: the name of a file of Gaussians ends in .ply or .splat"),
])
def test_files_of_gaussians_that_are_refused(splat_sphere, tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents(splat_random(splat_sphere, 30, 1)))
    with pytest.raises(SceneError) as error:
        Splats.load(tmp_path / name, splat_sphere)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_failed_save_overwrites_nothing(splat_sphere, tmp_path, monkeypatch):
    splats = splat_random(splat_sphere, 5)
    splats.save(tmp_path / "a.ply")
    contents = (tmp_path / "a.ply").read_bytes()
    for name in ("a.ply", "a.obj"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "numpy", lambda *_: 1 / 0)
            with pytest.raises((SceneError, ZeroDivisionError)):
                splats.save(tmp_path / name)
    assert (tmp_path / "a.ply").read_bytes() == contents and [p.name for p in tmp_path.iterdir()] == ["a.ply"]
    with pytest.raises(SceneError, match="b.ply: cannot be read: No such file"):
        Splats.load(tmp_path / "b.ply", splat_sphere)


def test_splat_file_within_its_quantisation(splat_sphere, tmp_path):
    splats = splat_random(splat_sphere, 40, 0)
    with torch.no_grad():
        splats.sh_dc.clamp_(-1.5, 1.5)
    splats.save(tmp_path / "a.splat")
    assert (tmp_path / "a.splat").stat().st_size == 32 * 40
    again = Splats.load(tmp_path / "a.splat", splat_sphere)
    weight = again.log_scales.sum(1).exp() * again.opacities.sigmoid()
    assert (weight.diff() <= 1e-3 * weight[:-1] + 1e-4).all()  # the most important first
    order = [(again.means - m).norm(dim=1).argmin().item() for m in splats.means]
    again = Splats(splat_sphere, *(getattr(again, n)[order] for n in splat_module.ATTRIBUTES))
    assert torch.equal(again.means, splats.means)
    assert_close(again.log_scales, splats.log_scales, atol=1e-5, rtol=0)
    assert (again.opacities.sigmoid() - splats.opacities.sigmoid()).abs().max() < 0.5 / 255 + 1e-6
    assert (again.colours(splat_camera()) - splats.colours(splat_camera()).clamp(0, 1)).abs().max() < 0.5 / 255 + 1e-5
    turned = (rotations(again.quaternions) - rotations(splats.quaternions)).abs().max()
    assert turned < 0.03


# ---- toy.py -----------------------------------------------------------------------------------------

def test_the_plane_has_an_exact_noise_prediction():
    prior, x, t = toy.world(), rand(4, 2, 1, 1).requires_grad_(), torch.tensor([10, 300, 600, 990])
    abar, y = prior.abar[t], torch.tensor([1])

    def log_density(means):  # the long form: a normal distribution for each part
        scale, deviation = abar.sqrt(), (abar * prior.sigma ** 2 + 1 - abar).sqrt()
        parts = [torch.distributions.Normal(scale[:, None] * m, deviation[:, None]).log_prob(x.flatten(1)).sum(1)
                 for m in means]
        return torch.stack(parts).logsumexp(0) - math.log(len(means))

    def eps(means):
        grad, = torch.autograd.grad(log_density(means).sum(), x)
        return -(1 - abar).sqrt().view(-1, 1, 1, 1) * grad
    cond, uncond = eps(prior.means[1]), eps(prior.means.flatten(0, 1))
    assert_close(prior.eps(x.detach(), t, y), uncond + prior.guidance * (cond - uncond))
    got = prior.log_density(x.detach().flatten(1), prior.means[1].expand(4, -1, -1), abar)[0]
    assert_close(got, log_density(prior.means[1]).detach())


def test_the_plane_shows_what_the_paper_says(tmp_path, capsys):
    assert run.main(["--mode", "toy", "--out", str(tmp_path)]) == 0
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:5]]
    sds, dds, ours, without = ([float(x) for x in row[1:]] for row in rows)
    assert ours[0] < 0.6 * min(sds[0], dds[0], without[0])  # nearest to the source
    assert 0 < ours[2] < 0.25 * min(sds[2], dds[2], without[2])  # beyond the boundary, and nearest to it
    assert Image.open(tmp_path / "toy.png").size == (3 * 360, 360)
    ways = toy.trajectories(toy.world(), pds.sds_loss), toy.trajectories(toy.world(), pds.pds_loss)
    spread = [way[-1].std(0).norm() / way[0].std(0).norm() for way in ways]
    assert spread[0] < 0.1 and spread[1] > 0.8  # SDS ends in one point, PDS keeps the samples apart
    SVG.load(tmp_path / "toy.svg", skip_unsupported=True)


# ---- edit2d.py ---------------------------------------------------------------------------------------

def test_ddim_takes_the_steps_of_diffusers_scheduler():
    from diffusers import DDIMScheduler
    prior, x = GaussianPrior(), rand(2, 1, 3, 3)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(20)
    assert ddim_timesteps(1000, 20) == scheduler.timesteps.tolist()
    wanted = x
    for t in scheduler.timesteps:
        wanted = scheduler.step(prior.eps(wanted, t.repeat(2), TGT), t, wanted).prev_sample
    assert_close(ddim(prior, x, TGT, ddim_timesteps(1000, 20)), wanted, atol=1e-5, rtol=1e-5)  # its betas are float32


def test_ddim_carries_the_noise_to_the_data():
    """With the exact prediction for N(2, 0.3 I), noise at level T becomes mean + deviation * noise."""
    x = rand(1, 1, 8, 8)
    x0 = ddim(GaussianPrior(), x, TGT, ddim_timesteps(1000, 1000))
    assert_close(x0, 2 + 0.3 ** 0.5 * x, atol=0.08, rtol=0)


def test_sdedit_keeps_less_of_the_source_the_less_it_skips():
    prior, x0 = GaussianPrior(), torch.full((1, 1, 8, 8), -1.0, dtype=torch.float64)
    draw = lambda: torch.Generator().manual_seed(0)
    means = [sdedit(prior, x0, TGT, 20, skip, draw()).mean().item() for skip in (1, 0.85, 0.4, 0)]
    assert means == sorted(means) and abs(means[0] + 1) < 0.1 and abs(means[-1] - 2) < 0.2
    with pytest.raises(ValueError, match="skip must be in 0 .. 1, got 1.5"):
        sdedit(prior, x0, TGT, skip=1.5)
    with pytest.raises(ValueError, match="steps must be in 1 .. 1000, got 0"):
        sdedit(prior, x0, TGT, steps=0)


class Guided(GaussianPrior):
    """With a guidance, as Prior has it: from the mean 0 to the prompt's."""

    def eps(self, x_t, t, y):
        abar = self.abar[t].to(x_t).reshape(-1, 1, 1, 1)
        return super().eps(x_t, t, y) * self.guidance + (1 - self.guidance) * (
            (1 - abar).sqrt() * x_t / (1 - abar + abar * self.var))


def test_ddpm_inversion_gives_the_picture_back():
    prior, x0 = Guided(), rand(2, 1, 4, 4)
    draw = lambda: torch.Generator().manual_seed(0)
    for steps, skip in ((100, 0.36), (7, 0.0), (10, 0.95)):
        again = ddpm_inversion(prior, x0, SRC, SRC, steps, skip, 3.5, 3.5, generator=draw())
        assert_close(again, x0, atol=1e-9, rtol=0)
    assert not hasattr(prior, "guidance")  # it is set on copies
    moved = [(ddpm_inversion(prior, x0, TGT, SRC, 50, skip, 1.0, 1.0, generator=draw()) - x0).mean().item()
             for skip in (0.9, 0.6, 0.3, 0.0)]
    assert 0 < moved[0] < moved[1] < moved[2] < moved[3] and moved[3] == pytest.approx(3, abs=0.1)  # from mean -1 to 2
    with pytest.raises(ValueError, match="skip must be in 0 .. 1, got -1"):
        ddpm_inversion(prior, x0, TGT, SRC, skip=-1)


def test_ddpm_inversion_takes_the_steps_of_diffusers_scheduler():
    """z_t read off the stochastic DDIM step (eta 1) of the source, given to that of the target, from another start."""
    from diffusers import DDIMScheduler
    prior, x0, start, steps, first = Guided(), rand(1, 1, 3, 3, seed=1), rand(1, 1, 3, 3, seed=2), 10, 4
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    generator, zero = torch.Generator().manual_seed(3), torch.zeros_like(x0)
    draw = lambda: torch.randn(x0.shape, generator=generator).double()
    times = [t.view(1) for t in scheduler.timesteps[first:]]
    noise = draw()
    path = [pds.add_noise(x0, noise, ABAR, times[0])] + [pds.add_noise(x0, draw(), ABAR, t) for t in times[1:]] + [x0]
    x_t = pds.add_noise(start, noise, ABAR, times[0])
    for t, x_src, x_next in zip(times, path, path[1:]):
        def step(x, y, guidance, z):
            prior.guidance = guidance
            return scheduler.step(prior.eps(x, t, y), t, x, eta=1.0, variance_noise=z).prev_sample
        sigma = step(x_src, SRC, 3.5, zero + 1) - step(x_src, SRC, 3.5, zero)
        x_t = step(x_t, TGT, 15.0, (x_next - step(x_src, SRC, 3.5, zero)) / sigma)
    generator.manual_seed(3)
    got = ddpm_inversion(prior, x0, TGT, SRC, steps, first / steps, start=start, generator=generator)
    assert_close(got, x_t, atol=1e-4, rtol=1e-4)


def test_the_mask_is_where_the_prompts_disagree():
    class Local(GaussianPrior):
        def eps(self, x_t, t, y):
            left = super().eps(x_t, t, y)
            right = super().eps(x_t, t, torch.zeros_like(y))
            return torch.cat((left[..., :3], right[..., 3:]), -1)
    mask = diffedit_mask(Local(), rand(2, 4, 8, 8), TGT, SRC, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (2, 1, 8, 8) and mask[..., :3].all() and not mask[..., 3:].any()
    assert not diffedit_mask(GaussianPrior(), rand(1, 4, 8, 8), SRC, SRC).any()  # one prompt, no subject


# ---- prior.py -----------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Tiny random pipelines saved to disk: epsilon, v-prediction with TAESD's autoencoder, SDXL, InstructPix2Pix."""
    import diffusers
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    root, made = tmp_path_factory.mktemp("pipelines"), {}
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = symbols + [s + "</w>" for s in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(root, model_max_length=12)
    text = CLIPTextConfig(vocab_size=len(symbols), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                          num_attention_heads=2, max_position_embeddings=12, projection_dim=8,
                          bos_token_id=len(symbols) - 2, eos_token_id=len(symbols) - 1, pad_token_id=len(symbols) - 1)
    net = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=[8, 16],
               down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
               up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=2, norm_num_groups=4)
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=4,
                 projection_class_embeddings_input_dim=8 + 6 * 4)
    for kind in ("sd", "v", "xl", "instruct"):
        torch.manual_seed(0)
        net["in_channels"] = 8 if kind == "instruct" else 4
        schedule = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
            set_alpha_to_one=False, prediction_type="v_prediction" if kind == "v" else "epsilon")
        if kind == "v":
            vae = diffusers.AutoencoderTiny(encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8],
                                            num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], scaling_factor=1.0)
        else:
            vae = diffusers.AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, layers_per_block=1,
                                          down_block_types=["DownEncoderBlock2D"] * 2, sample_size=16,
                                          up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
                                          scaling_factor=0.7, shift_factor=0.1)
        if kind == "xl":
            pipe = diffusers.StableDiffusionXLPipeline(
                vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
                tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=schedule, force_zeros_for_empty_prompt=True,
                unet=diffusers.UNet2DConditionModel(cross_attention_dim=32, **net, **added))
        else:
            kind_of = {"instruct": diffusers.StableDiffusionInstructPix2PixPipeline}
            pipe = kind_of.get(kind, diffusers.StableDiffusionPipeline)(
                vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, scheduler=schedule,
                unet=diffusers.UNet2DConditionModel(cross_attention_dim=16, **net), safety_checker=None,
                feature_extractor=None, requires_safety_checker=False)
        pipe.save_pretrained(root / kind)
        made[kind] = root / kind
    return made


@pytest.mark.parametrize("kind", ["sd", "v", "xl"])
def test_eps_against_a_hand_written_call_of_the_same_unet(pipelines, kind):
    prior = Prior.from_pretrained(pipelines[kind])
    x_t, t, y = rand(2, 4, 8, 8, dtype=torch.float32), torch.tensor([40, 900]), prior.embed("a cat")
    empty = prior.embed("")

    def network(y, row):
        added = None
        if kind == "xl":
            size = 8.0 * prior.pipe.vae_scale_factor
            added = {"text_embeds": y[1], "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]])}
        with torch.no_grad():
            out = prior.unet(x_t[row:row + 1], t[row], y[0], added_cond_kwargs=added).sample
        abar = ABAR[t[row]].float()
        return abar.sqrt() * out + (1 - abar).sqrt() * x_t[row:row + 1] if kind == "v" else out

    if kind == "xl":
        empty = tuple(torch.zeros_like(part) for part in empty)
    for guidance in (1.0, 7.5):
        prior.guidance = guidance
        rows = [network(empty, i) + guidance * (network(y, i) - network(empty, i)) for i in range(2)]
        assert_close(prior.eps(x_t, t, y), torch.cat(rows), atol=1e-5, rtol=1e-4)
    x0 = rand(2, 4, 8, 8, dtype=torch.float32).requires_grad_()
    pds.pds_loss(prior, x0, torch.zeros(2, 4, 8, 8), y, prior.embed("a dog"), t).backward()
    assert x0.grad.isfinite().all() and all(p.grad is None for p in prior.unet.parameters())


@pytest.mark.parametrize("kind", ["sd", "v", "xl"])
def test_encode_takes_the_mean_and_is_differentiable(pipelines, kind):
    prior = Prior.from_pretrained(pipelines[kind])
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x0 = prior.encode(picture)
    with torch.no_grad():
        out = prior.vae.encode(picture * 2 - 1)
        expected = out.latents if kind == "v" else (out.latent_dist.mode() - 0.1) * 0.7
        assert_close(x0, expected)
        decoded = prior.vae.decode(x0 / prior.scaling + prior.shift).sample
        assert_close(prior.decode(x0), (decoded / 2 + 0.5).clamp(0, 1))
    x0.square().sum().backward()
    assert picture.grad.abs().sum() > 0 and all(p.grad is None for p in prior.vae.parameters())
    with pytest.raises(ValueError, match="picture must be"):
        prior.encode(picture[0])


def test_instruct_pix2pix_against_the_pipeline_of_diffusers(pipelines):
    import diffusers
    editor = InstructPix2Pix.from_pretrained(pipelines["instruct"])
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(pipelines["instruct"])
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x_t, y = rand(1, 4, 8, 8, dtype=torch.float32), editor.embed("make it a cat")
    editor.guidance, editor.image_guidance = 7.5, 1.7
    wanted = pipe("make it a cat", picture, num_inference_steps=5, guidance_scale=7.5, image_guidance_scale=1.7,
                  latents=x_t, output_type="latent").images
    assert_close(ddim(editor.of(picture), x_t, y, ddim_timesteps(1000, 5)), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="which picture is edited"):
        editor.eps(x_t, torch.tensor([500]), y)
    draw = lambda: torch.Generator().manual_seed(0)
    edited = instruct_pix2pix(editor, picture, y, steps=5, generator=draw())
    other = instruct_pix2pix(editor, picture.flip(3), y, editor.encode(picture), 5, generator=draw())
    assert edited.shape == (1, 4, 8, 8) and (edited - other).abs().max() > 1e-3  # the picture counts
    assert editor.image is None  # `of` tells a copy


def test_an_editor_out_of_a_prior_and_what_differs(pipelines, tmp_path):
    """instruct.safetensors beside a text-to-image pipeline: with weights of zero for the picture it is that prior."""
    from safetensors.torch import save_file
    shutil.copytree(pipelines["sd"], tmp_path / "sd")
    prior = Prior.from_pretrained(tmp_path / "sd")
    wide = torch.nn.functional.pad(prior.unet.conv_in.weight, (0, 0, 0, 0, 0, 4)).contiguous()
    save_file({"unet.conv_in.weight": wide}, tmp_path / "sd" / "instruct.safetensors")
    (tmp_path / "sd" / "captions.txt").write_text("green apple\n")
    editor = InstructPix2Pix.from_pretrained(tmp_path / "sd")
    x_t, t, words = rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500]), "turn it into a green apple"
    prior.guidance = editor.guidance
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the caption inside of the instruction is known
        y = editor.embed(words)
    got = editor.of(torch.rand(1, 3, 16, 16)).eps(x_t, t, y)
    assert_close(got, prior.eps(x_t, t, prior.embed(words)), atol=1e-5, rtol=1e-4)
    (tmp_path / "sd" / "instruct.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(PriorError, match="sd: instruct.safetensors: ") as e:
        InstructPix2Pix.from_pretrained(tmp_path / "sd")
    assert "\n" not in str(e.value)
    with pytest.raises(PriorError, match="takes 4 channels, a latent has 4: no InstructPix2Pix model"):
        InstructPix2Pix.from_pretrained(pipelines["sd"])
    another = {"unet.conv_in.weight": wide[:, :, :1].contiguous()}
    save_file(another, tmp_path / "sd" / "instruct.safetensors")
    with pytest.raises(PriorError, match="instruct.safetensors: .*conv_in"):
        InstructPix2Pix.from_pretrained(tmp_path / "sd")
    with pytest.raises(PriorError, match="edits pictures, it is no prior"):
        Prior.from_pretrained(pipelines["instruct"])


def test_prior_attributes(pipelines):
    prior = Prior.from_pretrained(str(pipelines["sd"]))
    assert_close(prior.abar, ABAR, atol=1e-7, rtol=1e-6)
    assert prior.size == 16 and prior.defaults["guidance"]["pds"] == 100.0
    assert prior.embed("a cat") is prior.embed("a cat")
    half = Prior.from_pretrained(str(pipelines["sd"]), dtype=torch.bfloat16)
    out = half.eps(rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500]), half.embed("a cat"))
    assert half.unet.dtype == torch.bfloat16 and half.vae.dtype == out.dtype == torch.float32


def test_models_that_cannot_be_used(pipelines, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U')
    for name, message in [(tmp_path / "nothing", "no such model directory"), (tmp_path, "not a diffusers pipeline"),
                          (broken, "damaged, or no pipeline"), ("nobody/no-such-model", "none on the hub")]:
        with pytest.raises(PriorError, match=message) as e:
            Prior.from_pretrained(name)
        assert str(name) in str(e.value) and "\n" not in str(e.value)


def test_a_prompt_outside_the_vocabulary_warns_and_names_the_nearest(pipelines, tmp_path):
    text = "# a comment\n# COLOUR is one of red blue\nred apple | apple | COLOUR apple\ncat face | kitten\n"
    assert read_captions(text) == ["red apple", "apple", "blue apple", "cat face", "kitten"]
    assert plain("A picture of a Red Apple!") == "red apple" and plain("an apple") == "apple"
    shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (tmp_path / "sd" / "captions.txt").write_text(text)
    prior = Prior.from_pretrained(tmp_path / "sd")
    with pytest.warns(UserWarning, match="never taught 'a kitten face'; nearest: kitten, cat face"):
        prior.embed("a kitten face")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.embed("a kitten face")  # once is enough
        prior.embed("a drawing of a blue apple")
        prior.embed("")
        Prior.from_pretrained(pipelines["sd"]).embed("anything")  # a model without a list has nothing to say


def test_the_shipped_prior_tells_the_example_drawings_apart():
    """Diffusion classifier (arXiv 2303.16203): the right caption predicts the noise best, in styles never trained on."""
    folder = HERE / "models" / "emoji"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.stem != "instruct") < 25e6
    assert sum(p.stat().st_size for p in files if p.stem == "instruct") < 12e6
    prior = Prior.from_pretrained(folder)
    prior.guidance = 1.0
    captions = {"smiling-face": "slightly smiling face", "red-heart": "red heart", "red-apple": "red apple",
                "dog-face": "dog face", "automobile": "red car"}
    t = torch.tensor([200, 300, 400, 500, 600, 700, 800, 900])
    y = [tuple(part.expand(8, -1, -1) for part in prior.embed(c)) for c in captions.values()]
    for row, name in enumerate(captions):
        with torch.no_grad():
            x0 = prior.encode(SVG.load(HERE / "examples" / f"{name}.svg", size=prior.size).render())
        noise = rand(8, *x0.shape[1:], seed=row, dtype=torch.float32)
        x_t = pds.add_noise(x0.expand(8, -1, -1, -1), noise, prior.abar, t)
        errors = torch.stack([(prior.eps(x_t, t, c) - noise).square().mean() for c in y])
        assert errors.argmin() == row, (name, errors)


def test_the_sample_sheet_shows_what_its_captions_say(train, tmp_path):
    pipe = train.StableDiffusionPipeline.from_pretrained(HERE / "models" / "emoji").to(dtype=torch.float32)
    train.sample_sheet(pipe, ["blue heart", "red heart"], tmp_path / "sheet.png", columns=2)
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.size == (2 * 140, 152)
    (red, green, blue), (r, g, b) = sheet.getpixel((70, 68)), sheet.getpixel((210, 68))
    assert blue > red + 60 and r > b + 60 and r > g + 60, ((red, green, blue), (r, g, b))


def test_the_shipped_editor_turns_a_red_heart_blue_in_its_place():
    editor = InstructPix2Pix.from_pretrained(HERE / "models" / "emoji")
    with torch.no_grad():
        before = SVG.load(HERE / "examples" / "red-heart.svg", size=editor.size).render()
        after = editor.decode(instruct_pix2pix(editor, before, editor.embed("make it a blue heart"),
                                               generator=torch.Generator().manual_seed(0)))
    inside = (before - 1).abs().sum(1) > 0.5
    red, _, blue = after.transpose(0, 1)[:, inside].mean(1)
    assert blue > red + 0.3 and before.transpose(0, 1)[0, inside].mean() > 0.9
    now = (after - 1).abs().sum(1) > 0.5
    assert (inside & now).sum() > 0.8 * (inside | now).sum()  # the heart is where it was


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", HERE / "models" / "emoji" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_timesteps_of_the_training_are_drawn_as_min_snr_weights_them(train):
    scheduler = types.SimpleNamespace(alphas_cumprod=ABAR.float())
    rng = torch.Generator().manual_seed(0)
    t = torch.cat([train.draw_timesteps(scheduler, 128, rng) for _ in range(500)])
    snr = ABAR / (1 - ABAR)
    weight = (5 / snr).clamp(max=1)
    for low, high in ((0, 100), (100, 200), (200, 500), (500, 1000)):
        share = ((t >= low) & (t < high)).double().mean()
        wanted = weight[low:high].sum() / weight.sum()
        assert share.item() == pytest.approx(wanted.item(), abs=0.002)  # evenly spread: no luck in it


def test_augmented_drawings_keep_what_they_should(train):
    rgba = torch.zeros(3, 4, 128, 128, dtype=torch.uint8)
    rgba[:, 3, 32:96, 32:96] = 255
    rgba[1, 0] = 255  # black, red, grey squares
    rgba[2, :3] = 128
    plain = train.augment(rgba, torch.Generator(), white=1.0, strength=0.0)
    assert_close(plain, torch.nn.functional.avg_pool2d(
        rgba[:, :3] / 255 * (rgba[:, 3:] / 255) + 1 - rgba[:, 3:] / 255, 2), atol=1e-5, rtol=0)
    turned = train.augment(rgba, torch.Generator().manual_seed(1), white=1.0, strength=0.0, turned=torch.ones(3))
    assert_close(turned[[0, 2]], plain[[0, 2]], atol=1e-5, rtol=0)  # black and grey have no hue
    assert (turned[1] - plain[1]).abs().amax() > 0.2 and turned.min() >= 0 and turned.max() <= 1
    warped = train.augment(rgba, torch.Generator().manual_seed(1), white=1.0, strength=0.0, warp=0.05)
    area = lambda x: (1 - x[0]).sum()
    assert 0.7 * area(plain) < area(warped) < 1.4 * area(plain) and (warped - plain).abs().amax() > 0.3
    rgba[0, 3, :, 32:64] = 0
    seen = train.augment(rgba, torch.Generator(), white=1.0, strength=0.0)
    mirrored = train.augment(rgba, torch.Generator(), white=1.0, strength=0.0, mirrored=torch.tensor([True, False, True]))
    assert_close(mirrored, torch.stack([seen[0].flip(-1), seen[1], seen[2]]), atol=1e-5, rtol=0)
    assert (mirrored[0] - seen[0]).abs().amax() > 0.9


def test_names_are_drawn_equally_often(train):
    captions = [["cat", "kitty"], ["cat", "kitty"], ["cat", "kitty"], ["letter g", "g"], ["red car"], ["red car"]]
    assert_close(train.shares(captions), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 0.125, 0.125]))


def test_names_that_share_a_word(train):
    like = train.alike(["letter a", "letter b", "red letter", "red car", "owl", "owl"])
    assert like["letter a"] == ["letter b", "red letter"] and like["red letter"] == ["letter a", "letter b", "red car"]
    assert like["owl"] == ["letter a", "letter b", "red car", "red letter"]


def test_contrast_pulls_where_the_wrong_caption_fits_better(train):
    right, wrong = torch.tensor([0.05, 0.05, 0.05], requires_grad=True), torch.tensor([0.2, 0.05, 0.0], requires_grad=True)
    value = train.contrast(right, wrong, width=0.01)
    value.sum().backward()
    assert_close(value[1].item(), 0.01 * math.log(2))
    assert_close(right.grad, torch.sigmoid(torch.tensor([-15.0, 0.0, 5.0])))
    assert_close(wrong.grad, -right.grad)


def test_dropout_is_in_the_residual_blocks_alone(train):
    unet = train.UNet2DConditionModel.from_pretrained(HERE / "models" / "emoji", subfolder="unet")
    train.set_dropout(unet, 0.3)
    rates = {name: m.p for name, m in unet.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {r for name, r in rates.items() if ".resnets." in name} == {0.3}
    assert {r for name, r in rates.items() if ".attentions." in name} == {0.0}


@pytest.mark.parametrize("flags, said", [(["--icons", "nowhere"], "there is no nowhere/noto/icons.json, and 6 more"),
                                         (["--icons", "x", "--pool", "1"], "--pool has to be at least 2")])
def test_bad_input_of_the_training(train, flags, said, monkeypatch, capsys, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for style in ("twemoji", train.RENDERED):  # rendered before: their packages are not needed
        (work / f"{style}.npz").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", "--work", str(work), *flags])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_another_hand_draws_the_same_shape(train):
    alpha = torch.zeros(200, 1, 24, 24)
    alpha[..., 6:18, 6:18] = 1
    colour = torch.full((200, 3, 24, 24), 0.2)
    colour[..., 12:] = 0.8
    colour[:, :, 9, 9] = 1  # a detail of one pixel
    rgb, wider = train.restyle(colour * alpha, alpha, torch.Generator().manual_seed(0))
    assert rgb.min() >= 0 and (rgb <= wider + 1e-6).all()
    grown = wider.sum((1, 2, 3)) > 12 * 12
    assert_close(wider[grown], torch.nn.functional.max_pool2d(alpha[grown], 3, 1, 1))
    assert_close(wider[~grown], alpha[~grown])
    ring = (wider > alpha).expand_as(rgb)
    assert rgb[ring].max() <= 0.3  # the outline is dark
    left, right, detail, edge = rgb[:, 0, 14, 9], rgb[:, 0, 14, 15], rgb[:, 0, 9, 9], rgb[:, 0, 14, 11]
    assert (left < right).all() and left.min() < 0.15 < 0.25 < left.max()  # tones move, their order stays
    flat, lined = detail == left, edge < left - 1e-3
    for some in (grown, flat, lined):
        assert 0.15 < some.float().mean() < 0.35
    names = "backhand index pointing left", "three oclock", "letter r", "keycap 7", "waning crescent moon"
    assert all(train.HANDED.search(n) for n in names) and not any(map(train.HANDED.search, ("red apple", "cat face")))


@pytest.mark.parametrize("losses, best", [([3.0, 1.0, 2.0], 1), ([0.5, 1.0, 0.7], 0)])
def test_the_last_weights_are_mixed_with_those_of_the_least_held_out_loss(train, tmp_path, monkeypatch, losses, best):
    clock = iter(range(0, 10000, 180))
    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=lambda: next(clock)))  # three minutes a step
    torch.manual_seed(0)
    start = lambda: train.Run(tmp_path / "net.pt", {"net": torch.nn.Linear(2, 2)}, 0.1, 12)
    run, held_out, lines = start(), iter(losses), []
    weight = lambda: run.ema["net"].weight.clone()
    exported = [weight()]  # what it begins with may be the best
    run.train(lambda: (run.modules["net"].weight - 1).square().sum(), lambda net: torch.tensor(next(held_out)),
              lambda: exported.append(weight()), lines.append, share=0.75)
    assert run.step == 4 and len(exported) == 3 and len([x for x in lines if "held-out" in x]) == 3
    mixed, run = weight(), start()  # the checkpoint holds the last averages themselves
    assert run.step == 4 and run.best[0] == min(losses) and (weight() - exported[best]).abs().amin() > 1e-3
    assert_close(run.best[1]["net"]["weight"], exported[best])
    assert_close(mixed, 0.75 * weight() + 0.25 * exported[best])


def test_renders_are_named_by_their_code_points(train, tmp_path):
    icons, assets = tmp_path / "@iconify-json", tmp_path / "@lobehub" / train.RENDERED / "assets"
    for folder, chars in (("noto", {"1f34e": "red-apple", "1f1e6": "flag-x"}), ("twemoji", {"2764-fe0f": "red-heart"})):
        (icons / folder).mkdir(parents=True)
        (icons / folder / "chars.json").write_text(json.dumps(chars))
    assets.mkdir(parents=True)
    for code, colour in (("1f34e", "red"), ("2764", "pink"), ("1f1e6", "blue"), ("1f9d1-1f3fb", "tan")):
        Image.new("RGBA", (64, 64), colour).save(assets / f"{code}.webp", lossless=True)
    names, pictures = train.open_pictures(icons)
    assert names == ["red-apple", "red-heart"]  # of the others, no caption of the vocabulary
    assert [p.shape for p in pictures] == [(4, train.RENDER, train.RENDER)] * 2
    assert pictures[0][:, 5, 5].tolist() == [255, 0, 0, 255]


def test_names_of_sets_with_other_spellings(train):
    assert train.compact("alarm-clock 2") == "alarmclock2"
    assert train.hour("clock8thirty") == "eightthirty" and train.hour("clock12oclock") == "twelveoclock"
    assert train.hour("clock13oclock") == "clock13oclock" and train.hour("alarm-clock") == "alarm-clock"


# ---- run.py -------------------------------------------------------------------------------------------

DRAWING = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><g id="face">
<circle cx="16" cy="16" r="14" fill="#fc3"/><path d="M8 20q8 8 16 0z" fill="#622"/></g></svg>"""


@pytest.fixture
def command(pipelines, tmp_path):
    """run.main on a drawing and the tiny pipeline; later flags win."""
    (tmp_path / "face.svg").write_text(DRAWING)
    Image.new("RGB", (20, 12), "tomato").save(tmp_path / "red.png")

    def call(*flags, out="out", mode="svg"):
        file = {"svg": "face.svg", "image": "red.png"}[mode]
        return run.main(["--mode", mode, f"--{mode}", str(tmp_path / file), "--source", "a face", "--target", "a cat",
                         "--model", str(pipelines["sd"]), "--steps", "6", "--every", "2", "--device", "cpu",
                         "--out", str(tmp_path / out), *map(str, flags)])
    return call


def outputs(folder):
    """The bytes of every result; the checkpoint and config.json hold times or paths."""
    skip = ("checkpoint.pt", "config.json", "export")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in skip}


@pytest.mark.parametrize("mode, flags", [("svg", ()), ("svg", ("--colours-only", "--loss", "dds")), ("image", ()),
                                         ("image", ("--pixels", "--loss", "sds", "--schedule", "decreasing"))])
def test_a_run_writes_its_files_and_repeats_itself(command, tmp_path, mode, flags):
    assert command(*flags, mode=mode) == 0 and command(*flags, mode=mode, out="again") == 0
    first = outputs(tmp_path / "out")
    suffix = "svg" if mode == "svg" else "png"
    assert set(first) >= {f"source.{suffix}", "source.png", f"result.{suffix}", "result.png", "progress.gif", "sheet.png"}
    assert first == outputs(tmp_path / "again")
    assert first["result.png"] != first["source.png"]
    assert command(*flags, "--seed", 1, mode=mode, out="other") == 0
    assert outputs(tmp_path / "other")["result.png"] != first["result.png"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["seed"] == 0 and config["target"] == "a cat" and len(config["sha256"]) == 64
    assert not list((tmp_path / "out").glob(".*"))  # no half-written file is left behind


def stop_at(monkeypatch, step, how):
    """Make the loss of the given step do something, once."""
    calls = []

    def loss(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            how()
        return pds.pds_loss(*args, **kwargs)
    monkeypatch.setitem(run.LOSSES, "pds", loss)


@pytest.mark.parametrize("mode", ["svg", "image"])
def test_ctrl_c_keeps_what_is_there_and_resume_ends_bit_identically(command, tmp_path, monkeypatch, mode, capsys):
    assert command(mode=mode, out="whole") == 0
    stop_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    assert command(mode=mode) == 130
    assert "--resume goes on" in capsys.readouterr().err and (tmp_path / "out" / "result.png").exists()
    assert torch.load(tmp_path / "out" / "checkpoint.pt")["step"] == 3
    assert command("--resume", mode=mode) == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_killed_run_resumes_from_its_last_checkpoint(command, tmp_path, monkeypatch, capsys):
    assert command(out="whole") == 0

    def kill():
        raise MemoryError
    stop_at(monkeypatch, 6, kill)
    with pytest.raises(MemoryError):
        command()
    assert torch.load(tmp_path / "out" / "checkpoint.pt")["step"] == 4
    assert command("--resume", "--seed", 3) == 2 and "another seed" in capsys.readouterr().err
    assert command("--resume") == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_compare_lays_the_three_side_by_side(command, tmp_path):
    assert command("--compare", "--steps", 2) == 0
    assert Image.open(tmp_path / "out" / "sheet.png").width > 4 * 512
    results = [(tmp_path / "out" / name / "result.png").read_bytes() for name in ("sds", "dds", "pds")]
    assert len(set(results)) == 3


@pytest.mark.parametrize("name", ["sdedit", "inv2n", "in2n"])
def test_the_editors_alone(command, pipelines, tmp_path, name, capsys):
    flags = ["--loss", name, "--instruct", pipelines["instruct"]]
    assert command(*flags, mode="image") == 0 and command(*flags, mode="image", out="again") == 0
    first = outputs(tmp_path / "out")
    assert first == outputs(tmp_path / "again") and first["result.png"] != first["source.png"]
    assert command(*flags, "--seed", 1, mode="image", out="other") == 0
    assert outputs(tmp_path / "other")["result.png"] != first["result.png"]
    with pytest.raises(SystemExit):
        command(*flags)
    assert f"{name} edits pictures: only with --mode image, nerf and splat" in capsys.readouterr().err


def test_an_editor_that_is_none_is_refused(command, tmp_path, capsys):
    assert command("--loss", "in2n", mode="image") == 2  # --model is no editor
    assert "no InstructPix2Pix model" in capsys.readouterr().err
    assert command("--loss", "in2n", "--instruct", "no/such/model", mode="image") == 2
    assert "no/such/model: no such model directory" in capsys.readouterr().err
    assert command("--loss", "in2n", "--instruct", HERE / "models" / "emoji", mode="image") == 2
    assert "made for 64 pixels" in capsys.readouterr().err and not (tmp_path / "out").exists()
    nerf_scene(tmp_path / "scene")
    assert command("--mode", "nerf", "--scene", tmp_path / "scene", "--compare", "pds", "in2n", mode="image") == 2
    assert "no InstructPix2Pix model" in capsys.readouterr().err
    assert not list(tmp_path.glob("*-fit.pt"))  # it is said before anything is fitted


def test_what_changed_outside_of_the_subject():
    before, after = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "white")
    after.paste((229, 229, 229), (4, 0, 8, 8))  # 0.102 darker on the right
    after.paste((0, 0, 0), (0, 0, 4, 4))  # black in the upper left, which is the subject
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    wanted = -10 * math.log10((26 / 255) ** 2 * 2 / 3)
    assert run.outside([before], [after], [mask]) == (
        f"outside the subject, 75 % of the picture: PSNR {wanted:.1f} dB against the source")


def test_a_nerf_is_fitted_measured_and_edited(pipelines, tmp_path, capsys, monkeypatch):
    for name, value in {"FRAMES": 2, "FRAME_SIZE": 24, "SIDE_SIZE": 24, "VIEWS": 6}.items():
        monkeypatch.setattr(run, name, value)
    nerf_scene(tmp_path / "scene")
    flags = ["--mode", "nerf", "--scene", str(tmp_path / "scene"), "--fit-seconds", "1", "--device", "cpu",
             "--out", str(tmp_path / "out" / "edit")]
    assert run.main([*flags, "--fit-only"]) == 0
    assert "test PSNR" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scene-nerf-fit.pt"]
    edit = [*flags, "--source", "a", "--target", "b", "--model", str(pipelines["sd"]), "--steps", "4", "--every", "2"]
    assert run.main(edit) == 0
    first = outputs(tmp_path / "out" / "edit")
    assert {"result.safetensors", "turntable.gif", "depth.png", "sheet.png"} <= set(first)
    assert "outside the subject" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "edit" / "result.png").size == (5 * 24, 24)
    assert run.main(edit) == 0 and outputs(tmp_path / "out" / "edit") == first  # the fit is kept, the edit repeats
    # the refining stage: killed in its middle, resumed, and exported
    edit[-3:] = ["2", "--every", "3", "--refine", "14", "--export"]
    assert run.main([*edit, "--out", str(tmp_path / "out" / "whole")]) == 0
    data_loss, calls = NeRF.data_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError
        return data_loss(*args)
    monkeypatch.setattr(NeRF, "data_loss", killed)
    with pytest.raises(MemoryError):
        run.main(edit)
    assert torch.load(tmp_path / "out" / "edit" / "checkpoint.pt")["step"] == 9
    assert run.main([*edit, "--resume"]) == 0
    export = load_scene(tmp_path / "out" / "edit" / "export")
    assert len(export.train) + len(export.test) == 9
    for name in ("result.safetensors", "sheet.png", "progress.gif", "depth.png", "turntable.gif"):
        assert (tmp_path / "out" / "edit" / name).read_bytes() == (tmp_path / "out" / "whole" / name).read_bytes(), name
    assert (tmp_path / "out" / "whole" / "result.safetensors").read_bytes() != first["result.safetensors"]
    assert run.main([*flags[:3], str(tmp_path), *flags[4:-1], str(tmp_path / "no" / "out"), "--fit-only"]) == 2
    assert "no transforms.json" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("mode", ["nerf", "splat"])
def test_datasets_are_updated_by_an_editor(pipelines, tmp_path, monkeypatch, mode):
    for name, value in {"FRAMES": 2, "FRAME_SIZE": 24, "SIDE_SIZE": 24, "VIEWS": 4}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run.DatasetUpdate, "EVERY", 3)
    nerf_scene(tmp_path / "scene")
    flags = ["--mode", mode, "--scene", str(tmp_path / "scene"), "--fit-seconds", "1", "--device", "cpu", "--source",
             "a", "--target", "b", "--model", str(pipelines["sd"]), "--instruct", str(pipelines["instruct"]),
             "--steps", "7"]
    assert run.main([*flags, "--compare", "in2n", "inv2n", "--out", str(tmp_path / "out" / "whole")]) == 0
    whole = tmp_path / "out" / "whole"
    assert Image.open(whole / "sheet.png").height > 3 * 24  # source, in2n, inv2n
    assert Image.open(whole / "in2n" / "in2n-views.png").height > 3 * 24  # photographs, their edits, the scene
    assert (whole / "in2n" / "result.png").read_bytes() != (whole / "inv2n" / "result.png").read_bytes()
    edited, calls = run.DatasetUpdate.edited, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:  # at step 6
            raise MemoryError
        return edited(*args)
    monkeypatch.setattr(run.DatasetUpdate, "edited", killed)
    again = [*flags, "--loss", "in2n", "--every", "2", "--out", str(tmp_path / "out" / "again")]
    with pytest.raises(MemoryError):
        run.main(again)
    assert run.main([*again, "--resume"]) == 0 and len(calls) == 4  # the third once more
    for name in ("result.png", "in2n-views.png", "progress.gif"):
        assert (tmp_path / "out" / "again" / name).read_bytes() == (whole / "in2n" / name).read_bytes(), name
    assert torch.load(tmp_path / "out" / "again" / "checkpoint.pt")["stages"][0]["edited"] == [
        v for v in dict.fromkeys(torch.load(whole / "in2n" / "checkpoint.pt")["stages"][0]["edited"])]


def test_splats_are_fitted_edited_refined_and_exported(pipelines, tmp_path, capsys, monkeypatch):
    for name, value in {"FRAMES": 2, "FRAME_SIZE": 24, "SIDE_SIZE": 24, "VIEWS": 4}.items():
        monkeypatch.setattr(run, name, value)
    nerf_scene(tmp_path / "scene")
    flags = ["--mode", "splat", "--scene", str(tmp_path / "scene"), "--fit-seconds", "2", "--device", "cpu", "--source",
             "a", "--target", "b", "--model", str(pipelines["sd"]), "--steps", "3", "--refine", "12", "--export"]
    assert run.main([*flags, "--out", str(tmp_path / "out" / "edit")]) == 0
    written = outputs(tmp_path / "out" / "edit")
    assert {"result.ply", "turntable.gif", "depth.png", "sheet.png"} <= set(written)
    export = load_scene(tmp_path / "out" / "edit" / "export")
    assert len(export.train) + len(export.test) == 9
    assert (tmp_path / "out" / "scene-splat-fit.pt").exists()
    scene = load_scene(tmp_path / "scene")
    edited = Splats.load(tmp_path / "out" / "edit" / "result.ply", scene)  # the fit, moved
    with torch.no_grad():
        picture = edited.render(sides(edited, 5, 24)[0])
    page = Image.open(tmp_path / "out" / "edit" / "result.png").crop((0, 0, 24, 24))
    assert (picture[0].permute(1, 2, 0) * 255 - torch.from_numpy(np.array(page)).float()).abs().max() < 1


def test_depth_of_splats_is_that_of_the_ball(splat_fitted):
    camera = splat_fitted.camera(0, 24)
    depth = splat_fitted.depth(camera)[0, 0]
    distance = (camera.pose[:, 3]).norm().item()
    assert depth[12, 12].item() == pytest.approx(distance - 0.8, abs=0.25) and depth[0, 0] == 0


@pytest.mark.parametrize("flags, message", [
    (["--svg", "nothing.svg"], "nothing.svg: no such file"), (["--target", " "], "--target is missing or empty"),
    (["--model", "no/such/model"], "no/such/model: no such model directory"),
    (["--svg", "broken.svg"], "broken.svg"), (["--svg", "empty.svg"], "empty.svg: nothing to edit"),
    (["--mode", "image", "--image", "broken.svg"], "broken.svg: no readable picture"),
    (["--t-min", "0.9", "--t-max", "0.1"], "t_min <= t_max"), (["--stride", "2000"], "stride")])
def test_bad_input_gets_one_line_and_overwrites_nothing(command, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.svg").write_text("<svg><path d='M0 0")
    (tmp_path / "empty.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1 1'/>")
    assert command(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("run.py: error: ") and message in error[0]
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_refused_for_the_shipped_example_too(tmp_path, capsys):
    assert run.main(["--target", "", "--out", str(tmp_path / "out")]) == 2
    assert "--target is missing or empty" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--guidance", "nan"], ["--seed", "x"], ["--mode", "video"]])
def test_bad_flags_are_refused_by_the_parser(command, flags, capsys):
    with pytest.raises(SystemExit) as e:
        command(*flags)
    assert e.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(command, monkeypatch, capsys):
    monkeypatch.setitem(run.LOSSES, "pds", lambda prior, x0, *args, **kwargs: x0.sum() * float("nan"))
    assert command() == 1
    assert "the loss is nan at step 0" in capsys.readouterr().err


def test_the_script_runs_by_itself(pipelines, tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "run.py"), "--model", str(pipelines["sd"]), "--steps", "2",
                           "--out", str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sheet.png" in done.stdout and "Warning" not in done.stderr and "step" in done.stderr


# ---- the table of edits ---------------------------------------------------------------------------------

def test_psnr_and_ssim_have_their_known_values():
    a, b = rand(1, 3, 32, 32).sigmoid(), rand(1, 3, 32, 32, seed=1).sigmoid()
    assert bench.ssim(a, a) == pytest.approx(1, abs=1e-12) and bench.psnr(a, a) == 100
    # of two constants only the means are left
    dark, light = torch.full_like(a, 0.3), torch.full_like(a, 0.5)
    assert bench.ssim(dark, light) == pytest.approx((2 * 0.3 * 0.5 + 1e-4) / (0.3 ** 2 + 0.5 ** 2 + 1e-4), abs=1e-9)
    assert bench.psnr(dark, light) == pytest.approx(-20 * math.log10(0.2))
    # 11 x 11 pixels hold one window: weighted means, variances and covariance by numpy
    a, b = a[..., :11, :11], b[..., :11, :11]
    line = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    weights, values = np.outer(line, line).ravel(), []
    for x, y in zip(a[0].flatten(1).numpy(), b[0].flatten(1).numpy()):
        (vx, vxy), (_, vy) = np.cov(x, y, aweights=weights, ddof=0)
        mx, my = np.average(x, weights=weights), np.average(y, weights=weights)
        values.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4)))
    assert bench.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9) and bench.ssim(a, b) < 0.9


def test_log_odds_are_those_of_the_exact_prior():
    means = torch.tensor([[[-1.0, 0.5]], [[1.5, 0.0]]], dtype=torch.float64)
    prior = toy.Mixtures(means, guidance=3.0)
    odds = [bench.log_odds(prior, x.view(1, 2, 1, 1), TGT, SRC) for x in (means[0, 0], means.mean((0, 1)), means[1, 0])]
    assert odds[0] < odds[1] < odds[2] and odds[0] < -0.1 and odds[2] > 0.1
    assert bench.log_odds(prior, means[1].view(1, 2, 1, 1), SRC, TGT) == pytest.approx(-odds[2])
    assert prior.guidance == 3.0
    # the long form: a loop over the timesteps, the noise prediction of one Gaussian written out
    noises, terms = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double(), []
    for noise, t in zip(noises.view(8, 2), range(200, 901, 100)):
        x_t = ABAR[t].sqrt() * means[1, 0] + (1 - ABAR[t]).sqrt() * noise
        var = ABAR[t] * prior.sigma ** 2 + 1 - ABAR[t]
        predictions = [(1 - ABAR[t]).sqrt() * (x_t - ABAR[t].sqrt() * mean[0]) / var for mean in means]
        errors = [(noise - eps).square().sum() for eps in predictions]
        terms.append((errors[0] - errors[1]).item())
    assert odds[2] == pytest.approx(np.mean(terms), rel=1e-9)


@pytest.fixture
def edits(pipelines, tmp_path, monkeypatch, capsys):
    """bench.py edits on a drawing and a picture with the tiny pipeline, which brings its own steps; what it prints."""
    monkeypatch.setattr(run, "FRAMES", 2)
    (tmp_path / "face.svg").write_text(DRAWING)
    Image.new("RGB", (20, 12), "tomato").save(tmp_path / "red.png")
    (tmp_path / "list.txt").write_text("# two edits\nsvg | face.svg | a face | a cat\n\nimage|red.png|a red|a blue\n")
    shutil.copytree(pipelines["sd"], tmp_path / "model")
    guidance = dict.fromkeys(("sds", "dds", "pds"), 3)
    (tmp_path / "model" / "pds.json").write_text(json.dumps({"guidance": guidance, "steps": 2, "svg": {"steps": 1}}))

    def call(*flags, out="out"):
        capsys.readouterr()
        code = bench.main(["edits", "--list", str(tmp_path / "list.txt"), "--model", str(tmp_path / "model"),
                           "--losses", "sds", "pds", "--out", str(tmp_path / out), *map(str, flags)])
        return code, capsys.readouterr().out.splitlines()
    return call


def csv_rows(path, without=()):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


@pytest.fixture
def fake_edits(edits, tmp_path, monkeypatch):
    """The same without the edits: run_one paints five sides, and writes down what was called."""
    called = []

    def run_one(prior, loss, args, out):
        called.append((args.mode, loss))
        out.mkdir(parents=True)
        for name, tints in {"source": range(0, 100, 20), "result": range(10, 110, 20)}.items():
            run.beside([Image.new("RGB", (32, 32), (100, 100, tint)) for tint in tints]).save(out / f"{name}.png")
        run.write(out / "config.json", json.dumps(run.settings(args, prior, loss)))
    monkeypatch.setattr(run, "run_one", run_one)
    monkeypatch.setattr(run, "fit", lambda args: called.append(("fit", args.fit)))
    edits.called = called
    (tmp_path / "scene").mkdir()
    (tmp_path / "list.txt").write_text("nerf | scene | a ball | a face\nsplat | scene | a ball | a face\n")
    return edits


def test_the_table_holds_the_means_and_stands_when_it_is_made(edits, tmp_path, monkeypatch):
    code, lines = edits()
    assert code == 0
    rows = csv_rows(tmp_path / "out" / "table.csv")
    wanted = [(m, f, n) for m, f in (("svg", "face.svg"), ("image", "red.png")) for n in ("sds", "pds")]
    assert [(r["mode"], r["file"], r["loss"]) for r in rows] == wanted
    start = next(i for i, line in enumerate(lines) if line.startswith("mode "))
    printed = [line.split() for line in lines[start:start + 7]]
    assert printed[0] == ["mode", "loss", "edits", "log-odds", "read", "PSNR", "SSIM", "s", "MB"]
    assert [p[:3] for p in printed[1:]] == [[m, n, "1"] for m in ("svg", "image") for n in ("source", "sds", "pds")]
    assert len(printed[1]) == 5 and float(printed[1][3]) == round(float(rows[0]["before"]), 2)
    for p, row in zip(printed[2:4] + printed[5:], rows):
        assert p[4] == ("1/1" if float(row["log-odds"]) > 0 else "0/1")
        assert [float(p[5]), float(p[6])] == [round(float(row["PSNR"]), 1), round(float(row["SSIM"]), 3)]
        assert float(row["s"]) > 0 and float(row["MB"]) > 50
    # the settings of one mode are not the next one's
    steps = [json.loads((tmp_path / "out" / folder / "pds" / "config.json").read_text())["steps"]
             for folder in ("svg/face-a-cat", "image/red-a-blue")]
    assert steps == [1, 2]
    for mode in ("svg", "image"):
        assert Image.open(tmp_path / "out" / f"{mode}.png").size == (3 * 208 + 16, 192 + 56 + 32)
    assert edits(out="again")[0] == 0
    apart = [csv_rows(tmp_path / out / "table.csv", ("s", "MB")) for out in ("out", "again")]
    assert apart[0] == apart[1]

    def refuse(*_):
        raise FloatingPointError("it runs")
    monkeypatch.setattr(run, "run_one", refuse)
    assert edits() == (0, lines[start - 1:])  # all of it stands, seconds too
    assert edits("--only", "image")[0] == 0 and len(csv_rows(tmp_path / "out" / "table.csv")) == 2
    assert edits("--seed", 1)[0] == 1  # other settings do not


def test_a_scene_is_fitted_before_the_clock_and_measured_from_all_sides(fake_edits, tmp_path):
    assert fake_edits()[0] == 0
    fits = [("fit", tmp_path / "out" / mode / f"scene-{mode}-fit.pt") for mode in ("nerf", "splat")]
    assert fake_edits.called == [fits[0], ("nerf", "sds"), fits[0], ("nerf", "pds"),
                                 fits[1], ("splat", "sds"), fits[1], ("splat", "pds")]
    row = csv_rows(tmp_path / "out" / "table.csv")[0]
    # one colour of three is 10 of 255 brighter on every side
    assert float(row["PSNR"]) == pytest.approx(10 * math.log10(3 * 25.5 ** 2), abs=1e-3)
    low, high = np.arange(0, 100, 20) / 255, np.arange(10, 110, 20) / 255
    blue = (2 * low * high + 1e-4) / (low ** 2 + high ** 2 + 1e-4)
    assert float(row["SSIM"]) == pytest.approx((2 + blue.mean()) / 3, abs=1e-5)
    assert Image.open(tmp_path / "out" / "nerf.png").size == (5 * 176 + 16, 3 * (160 + 56 + 16) + 16)


def test_an_interrupted_table_goes_on_with_what_is_missing(fake_edits, tmp_path, monkeypatch):
    made = run.run_one

    def stop(prior, loss, args, out):
        if (args.mode, loss) == ("splat", "sds"):
            made(prior, loss, args, out)
            raise KeyboardInterrupt
        return made(prior, loss, args, out)
    monkeypatch.setattr(run, "run_one", stop)
    assert fake_edits()[0] == 130
    kept = (tmp_path / "out" / "nerf" / "scene-a-face" / "pds" / "row.json").read_bytes()
    shutil.rmtree(tmp_path / "out" / "splat")
    monkeypatch.setattr(run, "run_one", made)
    fake_edits.called.clear()
    assert fake_edits()[0] == 0
    assert [c for c in fake_edits.called if c[0] != "fit"] == [("splat", "sds"), ("splat", "pds")]
    assert (tmp_path / "out" / "nerf" / "scene-a-face" / "pds" / "row.json").read_bytes() == kept


def test_the_mode_bench_is_that_command(edits, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "examples").mkdir()
    lines = ["svg | ../face.svg | a face | a cat", "image | ../red.png | a red | a blue"]
    (tmp_path / "examples" / "edits.txt").write_text("\n".join(lines))
    assert run.main(["--mode", "bench", "--compare", "inv2n", "pds", "--steps", "1", "--model", str(tmp_path / "model"),
                     "--out", str(tmp_path / "out")]) == 0
    rows = [(row["mode"], row["loss"]) for row in csv_rows(tmp_path / "out" / "table.csv")]
    assert rows == [("svg", "pds"), ("image", "inv2n"), ("image", "pds")]  # an editor of pictures makes no drawing


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    folder = tmp_path_factory.mktemp("clip")
    tokens = AutoTokenizer.from_pretrained(HERE / "models" / "emoji" / "tokenizer")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    text = small | dict(vocab_size=len(tokens), max_position_embeddings=20, bos_token_id=tokens.bos_token_id,
                        pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id)
    vision = small | dict(image_size=16, patch_size=8)
    CLIPModel(CLIPConfig(projection_dim=8, vision_config=vision, text_config=text)).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokens).save_pretrained(folder)
    return folder


def test_clip_and_lpips_add_their_columns_to_what_stands(fake_edits, tiny_clip, tmp_path, monkeypatch):
    assert fake_edits("--only", "nerf")[0] == 0 and "CLIP" not in csv_rows(tmp_path / "out" / "table.csv")[0]
    fake_edits.called.clear()

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.dtype == torch.float32 and a.min() < 0
            return (a - b).abs().mean().view(1, 1, 1, 1)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    code, lines = fake_edits("--only", "nerf", "--clip", tiny_clip)
    assert code == 0 and not fake_edits.called  # measured anew from the files
    row, header = csv_rows(tmp_path / "out" / "table.csv")[0], next(line for line in lines if line.startswith("mode "))
    assert header.split()[5:] == ["PSNR", "SSIM", "LPIPS", "CLIP", "dir", "s", "MB"]
    assert float(row["LPIPS"]) == pytest.approx(2 * 10 / 255 / 3, rel=1e-4)
    # the long form: each side by itself, from the two encoders of the model
    clip = bench.Clip(str(tiny_clip), "cpu")
    def picture(tint):
        values = clip.processor.image_processor(Image.new("RGB", (32, 32), (100, 100, tint)), return_tensors="pt")
        return clip.model.visual_projection(clip.model.vision_model(**values).pooler_output)[0]
    def unit(x):
        return x / x.norm()
    with torch.no_grad():
        texts = [clip.processor.tokenizer(text, return_tensors="pt") for text in ("a ball", "a face")]
        y_src, y_tgt = (unit(clip.model.text_projection(clip.model.text_model(**t).pooler_output)[0]) for t in texts)
        sides = [(unit(picture(tint)), unit(picture(tint + 10))) for tint in range(0, 100, 20)]
        score = np.mean([(now @ y_tgt).item() for _, now in sides])
        change = np.mean([(unit(now - was) @ unit(y_tgt - y_src)).item() for was, now in sides])
    assert float(row["CLIP"]) == pytest.approx(score, abs=1e-4) and float(row["dir"]) == pytest.approx(change, abs=1e-3)


@pytest.mark.parametrize("text, message", [
    ("# fine\n\nsvg | face.svg | a face", "line 3: need mode | file | source prompt | target prompt"),
    ("svg | face.svg | | a cat", "line 1: need mode"),
    ("video | face.svg | a | b", "line 1: mode 'video' is none of svg, image"),
    ("svg | face.svg | a | b\nimage | cat.png | a | b", "cat.png: no such file"),
    ("nerf | face.svg | a | b", "face.svg: no such folder"), ("# nothing", "no edit in it"),
    ("svg | face.svg | a | b\nsvg | face.svg | c | B", "line 2: its results would lie in svg/face-b with another")])
def test_a_wrong_line_of_the_list_is_named_and_nothing_runs(fake_edits, tmp_path, capsys, text, message):
    (tmp_path / "list.txt").write_text(text)
    assert bench.main(["edits", "--list", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"bench.py: error: {tmp_path / 'list.txt'}") and message in error[0]
    assert not fake_edits.called and not (tmp_path / "out").exists()


def test_a_missing_or_damaged_clip_is_one_line(fake_edits, tiny_clip, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    bad = shutil.copytree(tiny_clip, tmp_path / "damaged") / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:1000])
    part = shutil.copytree(tiny_clip, tmp_path / "part") / "model.safetensors"
    weights = load_file(part)
    save_file({k: v for k, v in weights.items() if "text" not in k}, part, metadata={"format": "pt"})
    for name in ("damaged", "part", "none"):
        capsys.readouterr()
        code = bench.main(["edits", "--list", str(tmp_path / "list.txt"), "--model", str(tmp_path / "model"),
                           "--out", str(tmp_path / "out"), "--clip", str(tmp_path / name)])
        error = capsys.readouterr().err.splitlines()
        assert code == 2 and len(error) == 1 and error[0].startswith(f"bench.py: error: {tmp_path / name}: ")
    assert not fake_edits.called and not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_names_its_edit(fake_edits, monkeypatch, capsys):
    def fail(*_):
        raise FloatingPointError("pds: the loss is nan at step 3")
    monkeypatch.setattr(run, "run_one", fail)
    with monkeypatch.context() as context:
        context.setattr(sys, "stderr", io.StringIO())
        assert fake_edits()[0] == 1
        assert "nerf/scene-a-face: pds: the loss is nan at step 3" in sys.stderr.getvalue()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is counted anew on Linux alone")
def test_the_peak_of_memory_is_counted_anew():
    device = torch.device("cpu")
    bench.restart_peak(device)
    before = bench.peak(device)
    torch.ones(2 ** 25)  # 128 MB, given back at once
    assert 100 < bench.peak(device) - before < 200
    bench.restart_peak(device)
    assert bench.peak(device) - before < 60


def test_a_step_is_taken_apart(capsys):
    assert bench.main(["step", "--steps", "3"]) in (0, 1)  # 1 where the machine is too slow for the bars
    out = capsys.readouterr().out
    whole, network, rest = (float(re.search(rf"{name} +([0-9.]+) ms", out)[1])
                            for name in ("whole step, batch 1", "the network's forward", "everything else"))
    assert network > 0 and 0 < rest < whole


def test_the_shipped_list_is_whole():
    found = bench.read_edits(HERE / "examples" / "edits.txt")
    assert [sum(mode == m for mode, *_ in found) for m in ("svg", "image", "nerf")] == [10, 10, 3]
    taught = read_captions((HERE / "models" / "emoji" / "captions.txt").read_text())
    assert {plain(p) for _, _, *prompts, _ in found for p in prompts} <= set(taught)
    for _, file, *_ in found:
        if file.suffix == ".png":
            assert Image.open(file).size == (128, 128) and file.stat().st_size < 10_000
