"""pipelines/flow.py: SD 3 and FLUX against diffusers; flows against diffusion in the plane; coefficients."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ABAR, nerf_scene, outputs, rand
from torch.testing import assert_close

import pds
import toy
from image.editors import ddim, ddpm_inversion, drfs, drfs_rates, sdedit
from pipelines.flow import Flow, sigmas_of
from pipelines.loading import PriorError
from pipelines.networks import Flux, sigmas_of_scheduler
from pipelines.settings import PAPER
from prior import InstructPix2Pix, Prior

KINDS = ["sd3", "flux", "schnell"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(Flux, "SIDE", 8)  # not in FLUX's configuration


# ---- the mathematics ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def planes():
    """The prior of the plane as a diffusion model and as a flow, at the same noise levels."""
    diffusion = toy.world()
    other = toy.MixtureFlow(diffusion, sigmas_of(shift=3.0))
    diffusion.abar = other.abar
    return diffusion, other


def test_the_velocity_of_the_plane_transports_its_marginals(planes):
    """Integrating dx = v dsigma turns samples of p(x0) into samples of the noised mixture."""
    _, prior = planes
    generator, count = torch.Generator().manual_seed(0), 4000
    part = torch.randint(3, (count,), generator=generator)
    x = prior.means[0, part] + prior.sigma * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    prior, levels = toy.MixtureFlow(toy.Mixtures(prior.means[:1], prior.sigma), prior.sigmas), torch.linspace(0, 1, 61)
    for a, b in zip(levels.double(), levels[1:].double(), strict=False):
        x = x + (b - a) * prior.velocity(x, ((a + b) / 2).expand(count), torch.tensor([0]))
    assert_close(x.mean(0), torch.zeros(2, dtype=torch.float64), atol=0.05, rtol=0)
    assert_close(x.T.cov(), torch.eye(2, dtype=torch.float64), atol=0.06, rtol=0)


@pytest.mark.parametrize("kind", ["official", "consistent"])
def test_pds_on_a_flow_equals_pds_on_a_diffusion_model_with_the_same_noise(planes, kind):
    x0_tgt, x0_src, noise = (rand(32, 2, 1, 1, seed=i) for i in range(3))
    t = torch.randint(20, 980, (32,), generator=torch.Generator().manual_seed(0))
    y = torch.tensor([1]), torch.tensor([0])
    eps = [prior.eps(x0_tgt, t, y[0]) for prior in planes]
    assert_close(eps[0], eps[1], atol=1e-9, rtol=1e-9)
    gradients = []
    for prior in planes:
        theta = x0_tgt.clone().requires_grad_()
        pds.pds_loss(prior, theta, x0_src, *y, t, noise, coefficients=kind).backward()
        gradients.append(theta.grad)
    assert_close(*gradients, atol=1e-6, rtol=1e-6)


def test_a_ddim_step_equals_an_euler_step_of_the_flow(planes):
    _, prior = planes
    x, y, at = rand(8, 2, 1, 1), torch.tensor([1]), [900, 700, 400, 100, 0]
    sigma = prior.sigmas[at]
    n = ((1 - sigma) ** 2 + sigma ** 2).sqrt()
    expected = n[0] * x
    for a, b in zip(sigma, sigma[1:], strict=False):
        expected = expected + (b - a) * prior.velocity(expected, a.expand(8), y)
    assert_close(ddim(prior, x, y, at[:-1]), expected / n[-1], atol=1e-9, rtol=1e-9)


def test_editors_of_pictures_work_on_a_flow(planes):
    """Inversion recovers the source under its own prompt and reaches the target's, as SDEdit does."""
    _, prior = planes
    y_tgt, y_src = torch.tensor([1]), torch.tensor([0])
    x0 = prior.means[0].reshape(3, 2, 1, 1)

    def draw():
        return torch.Generator().manual_seed(0)
    back = ddpm_inversion(prior, x0, y_src, y_src, 50, 0.0, guidance_src=3.0, guidance_tgt=3.0, generator=draw())
    assert_close(back, x0, atol=1e-6, rtol=1e-6)
    for edited in (ddpm_inversion(prior, x0, y_tgt, y_src, 50, 0.1, 1.0, 3.0, generator=draw()),
                   sdedit(prior, x0, y_tgt, 50, 0.1, generator=draw())):
        assert (edited[:, 0] > 0.5).all() and (edited - x0).norm() > 1


def guided(prior, scale):
    """A copy of a prior of the plane with this guidance."""
    return toy.MixtureFlow(toy.Mixtures(prior.means, prior.sigma, scale), prior.sigmas)


def released_rates(sigmas):
    """The step sizes of DRFS one by one: a line plus the density of Beta(10, 8), which is scaled to 1 at its mode."""
    steps, beta = len(sigmas), torch.distributions.Beta(torch.tensor(10.0).double(), torch.tensor(8.0).double())
    last = (sigmas[-2] - sigmas[-1]) / 1.6
    for i in range(1, steps):
        x = torch.tensor((i + 1 - 1) / (steps + 28 - 1)).double()
        hump = (beta.log_prob(x) - beta.log_prob(torch.tensor(9 / 16).double())).exp()
        yield 2.2 * ((last / 1.6 - last / 4) * hump + last / 4 * x)


def test_drfs_takes_the_released_steps(planes):
    _, prior = planes
    steps, at = 50, torch.linspace(998, 0, 50).round().long()
    sigmas, (source, target) = prior.sigmas[at], (guided(prior, scale) for scale in (6.0, 16.5))
    x0, y_tgt, y_src = rand(8, 2, 1, 1), torch.tensor([1]), torch.tensor([0])
    draw, x = torch.Generator().manual_seed(0), x0
    for i, rate in enumerate(released_rates(sigmas), 1):
        noise, sigma = torch.randn(8, 2, 1, 1, generator=draw).double(), sigmas[i]
        z_src = (1 - sigma) * x0 + sigma * noise
        z_tgt = (1 - sigma) * x + sigma * noise + i / steps * sigma * (x - x0)
        v = [of.velocity(z, sigma.expand(8), y) for of, z, y in ((target, z_tgt, y_tgt), (source, z_src, y_src))]
        x = x - rate * (v[0] - v[1] + (1 - i / steps) * (x - x0))
    assert_close(drfs(prior, x0, y_tgt, y_src, generator=torch.Generator().manual_seed(0)), x, atol=1e-6, rtol=1e-5)
    assert (x - x0).norm() > 1 and prior.guidance == toy.GUIDANCE
    assert not drfs_rates(sigmas)[0] and (drfs_rates(sigmas)[1:] > 0).all()
    same = drfs(prior, x0, y_src, y_src, guidance_src=3.0, guidance_tgt=3.0, generator=torch.Generator().manual_seed(0))
    assert_close(same, x0, atol=1e-9, rtol=0)
    for wrong in (1, 1000):
        with pytest.raises(ValueError, match="steps must be in 2 .. 999"):
            drfs(prior, x0, y_tgt, y_src, wrong)


def test_drfs_is_flowedit_with_the_full_shift_and_dds_without_any(planes):
    diffusion, prior = planes
    x0, y_tgt, y_src = rand(8, 2, 1, 1), torch.tensor([1]), torch.tensor([0])
    at = torch.linspace(998, 0, 20).round().long()
    sigmas, (source, target) = torch.cat([prior.sigmas[at], torch.zeros(1).double()]), (
        guided(prior, scale) for scale in (2.0, 4.0))
    draw, z = torch.Generator().manual_seed(0), x0  # FlowEdit, algorithm 1 with n_avg = 1
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        z_src = (1 - now) * x0 + now * torch.randn(8, 2, 1, 1, generator=draw).double()
        z_tgt = z + z_src - x0
        v_tgt, v_src = target.velocity(z_tgt, now.expand(8), y_tgt), source.velocity(z_src, now.expand(8), y_src)
        z = z + (then - now) * (v_tgt - v_src)
    for kind in planes:  # a diffusion model with the same noise levels takes the same steps
        got = drfs(kind, x0, y_tgt, y_src, 20, 2.0, 4.0, torch.ones(20), -sigmas.diff(),
                   generator=torch.Generator().manual_seed(0))
        assert_close(got, z, atol=1e-6, rtol=1e-5)

    start, rates = rand(8, 2, 1, 1, seed=1), torch.zeros(20)
    rates[7] = 1.0
    got = drfs(prior, x0, y_tgt, y_src, 20, 3.0, 3.0, torch.zeros(20), rates, start, torch.Generator().manual_seed(0))
    theta, t = start.clone().requires_grad_(), at[7].expand(8)
    noise = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    pds.dds_loss(guided(prior, 3.0), theta, x0, y_tgt, y_src, t, noise).backward()
    assert_close(start - got, 8 * theta.grad / (1 - sigmas[7]), atol=1e-6, rtol=1e-5)


def test_a_shift_keeps_the_consistent_chi_and_psi_over_chi_depends_on_the_noise():
    t = torch.arange(20, 900)
    for shift in (1.0, 3.0):
        sigmas = sigmas_of(shift=shift)
        abar, snr = Flow(sigmas).abar, ((1 - sigmas) / sigmas) ** 2
        psi, chi = pds.pds_coefficients(abar, t, t - 2, "consistent")
        assert not psi.any()
        assert_close(chi, (snr[t - 2] / snr[t] - 1).sqrt(), atol=1e-9, rtol=1e-9)
        plain = torch.arange(1, 1000, dtype=torch.float64) / 1000
        assert_close(chi, (((1 - plain) / plain)[t - 2] ** 2 / ((1 - plain) / plain)[t] ** 2 - 1).sqrt())
        psi, chi = pds.pds_coefficients(abar, t, t - 2, "official")
        # psi / chi is nearly a function of the noise level alone, for any schedule
        assert_close(psi / chi, snr[t].sqrt() * (1 + abar[t]) / 2, rtol=0.11, atol=0)
    psi, chi = pds.pds_coefficients(ABAR, t, t - 2, "official")
    assert_close(psi / chi, (ABAR[t] / (1 - ABAR[t])).sqrt() * (1 + ABAR[t]) / 2, rtol=0.11, atol=0)


def test_noise_levels_rise_strictly_between_0_and_1():
    for shift in (0.5, 1.0, 3.0):
        prior = Flow(sigmas_of(shift=shift))
        assert len(prior.abar) == 999 and prior.abar.dtype == torch.float64
        assert 0 < prior.abar[-1] and (prior.abar.diff() < 0).all() and prior.abar[0] < 1
        assert_close(prior.abar.sqrt() / (1 - prior.abar).sqrt(), (1 - prior.sigmas) / prior.sigmas)
    for wrong in ([0.0, 0.5], [0.5, 1.0], [0.5, 0.4], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="must rise from above 0 to below 1"):
            Flow(wrong)


# ---- the pipelines ------------------------------------------------------------------------------------

def test_noise_levels_match_the_scheduler_of_diffusers():
    import diffusers
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert_close(sigmas_of_scheduler(static, 1024).float(), static.sigmas.flip(0)[:-1], atol=1e-6, rtol=1e-5)
    moving = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (256, 1024, 4096):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        moving.set_timesteps(sigmas=np.arange(999, 0, -1) / 1000, mu=mu)
        assert_close(sigmas_of_scheduler(moving, tokens).float(), moving.sigmas[:-1].flip(0), atol=1e-6, rtol=1e-5)
    assert_close(sigmas_of_scheduler(moving, 4096), sigmas_of(shift=math.exp(1.15)))
    with pytest.raises(ValueError, match="DDIMScheduler has no noise levels for flow matching"):
        sigmas_of_scheduler(diffusers.DDIMScheduler(), 1024)


def pack(x):
    """FLUX's tokens [1,h/2 w/2,4 C] of a latent [1,C,h,w], and their positions [h/2 w/2,3]."""
    positions = [(i, j) for i in range(x.shape[2] // 2) for j in range(x.shape[3] // 2)]
    tokens = [x[0, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].flatten() for i, j in positions]
    return torch.stack(tokens)[None], torch.tensor([(0.0, i, j) for i, j in positions])


def unpack(tokens, like):
    x = torch.empty_like(like)
    for token, (_, i, j) in zip(tokens[0], pack(like)[1].long().tolist(), strict=True):
        x[0, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2] = token.view(-1, 2, 2)
    return x


def by_hand(prior, kind, x_t, t, y, guidance=None):
    """The noise in one row x_t [1,C,h,w] at t [1], with the transformer called as in diffusers' pipelines."""
    sigma = prior.network.sigmas[t].float()
    x = x_t * ((1 - sigma) ** 2 + sigma ** 2).sqrt()
    with torch.no_grad():
        if kind == "sd3":
            v = prior.network.module(x, timestep=1000 * sigma, encoder_hidden_states=y[0],
                                     pooled_projections=y[1]).sample
        else:
            tokens, positions = pack(x)
            guides = torch.tensor([guidance]) if kind == "flux" else None
            out = prior.network.module(tokens, timestep=sigma, encoder_hidden_states=y[0], pooled_projections=y[1],
                                       img_ids=positions, txt_ids=torch.zeros(y[0].shape[1], 3), guidance=guides).sample
            v = unpack(out, x)
    return x + (1 - sigma) * v


@pytest.mark.parametrize("kind", KINDS)
def test_eps_against_a_hand_written_call_of_the_same_transformer(flows, kind):
    prior = Prior.from_pretrained(flows[kind])
    x_t, t = rand(2, 4, 8, 12, dtype=torch.float32), torch.tensor([40, 900])
    y, empty = prior.embed("a cat"), prior.embed("")
    for guidance in (1.0, 4.0, 20.0):
        prior.guidance, rows = guidance, []
        for i in range(2):
            row = (x_t[i:i + 1], t[i:i + 1])
            if kind == "flux" and guidance <= 10:
                rows.append(by_hand(prior, kind, *row, y, guidance))
            else:
                cond, uncond = (by_hand(prior, kind, *row, text, 1.0) for text in (y, empty))
                rows.append(uncond + guidance * (cond - uncond))
        assert_close(prior.eps(x_t, t, y), torch.cat(rows), atol=1e-5 * guidance, rtol=1e-4)
    x0 = rand(2, 4, 8, 12, dtype=torch.float32).requires_grad_()
    pds.pds_loss(prior, x0, torch.zeros(2, 4, 8, 12), y, prior.embed("a dog"), t).backward()
    assert x0.grad.isfinite().all() and all(p.grad is None for p in prior.network.module.parameters())


def test_a_unet_with_a_scheduler_of_flow_matching_is_a_flow(pipelines, tmp_path):
    """The UNet's output at the noise level of a timestep is taken as the velocity; no settings file is needed."""
    import diffusers
    shutil.copytree(pipelines["sd"], tmp_path / "flow")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tmp_path / "flow" / "scheduler")
    index = json.loads((tmp_path / "flow" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (tmp_path / "flow" / "model_index.json").write_text(json.dumps(index))
    prior = Prior.from_pretrained(tmp_path / "flow")
    assert_close(prior.abar, Flow(sigmas_of(shift=2.0)).abar)
    x_t, t, y = rand(2, 4, 8, 8, dtype=torch.float32), torch.tensor([40, 900]), prior.embed("a cat")
    prior.guidance, sigma = 1.0, prior.network.sigmas[t].float().view(-1, 1, 1, 1)
    x = x_t * (sigma ** 2 + (1 - sigma) ** 2).sqrt()
    with torch.no_grad():
        v = prior.network.module(x, 1000 * sigma.flatten(), y[0].expand(2, -1, -1)).sample
    assert_close(prior.eps(x_t, t, y), x + (1 - sigma) * v, atol=1e-5, rtol=1e-5)
    assert prior.defaults["svg"]["t_max"] < 0.98  # the share with the same noise
    with pytest.raises(PriorError, match="InstructPix2Pix model with a flow matching scheduler"):
        pipe = prior.pipe
        pipe.unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=8)
        InstructPix2Pix(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_an_euler_loop_with_eps_reproduces_the_latents_of_the_pipeline(flows, kind, monkeypatch):
    prior, at = Prior.from_pretrained(flows[kind]), [899, 699, 399, 99]  # index 899 is sigma 0.9 before its shift
    pipe = prior.pipe
    pipe.set_progress_bar_config(disable=True)
    plain = pipe.scheduler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None):
        plain(sigmas=np.array([0.9, 0.7, 0.4, 0.1]), device=device, mu=mu)
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", set_timesteps)
    x = rand(1, 4, 8, 8, dtype=torch.float32)
    start = x if kind == "sd3" else pack(x)[0]
    prior.guidance = 4.0 if kind != "schnell" else 1.0
    limit = {} if kind == "sd3" else {"max_sequence_length": 512 if kind == "flux" else 256}
    wanted = pipe("a cat", num_inference_steps=4, guidance_scale=4.0, latents=start, height=16, width=16,
                  output_type="latent", **limit).images
    if kind != "sd3":
        wanted = unpack(wanted, x)
    y, sigmas = prior.embed("a cat"), prior.network.sigmas[at].tolist()
    for t, a, b in zip(at, sigmas, [*sigmas[1:], 0.0], strict=True):
        eps = prior.eps(x / math.hypot(1 - a, a), torch.tensor([t]), y)
        x = x + (b - a) * (eps - x) / (1 - a)
    assert_close(x, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_of_a_flow(flows, kind):
    prior = Prior.from_pretrained(flows[kind])
    assert (prior.size, prior.multiple, len(prior.abar)) == (16, 4, 999)
    assert prior.guidance == {"sd3": 7.0, "flux": 3.5, "schnell": 1.0}[kind]
    pictures = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(prior.encode(pictures), (prior.vae.encode(pictures * 2 - 1).latent_dist.mode() - 0.1) * 0.7)
    half = Prior.from_pretrained(flows[kind], dtype=torch.bfloat16)
    out = half.eps(rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500]), half.embed("a cat"))
    assert half.network.module.dtype == torch.bfloat16 and half.vae.dtype == out.dtype == torch.float32
    exact = prior.eps(rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500]), prior.embed("a cat"))
    assert (out - exact).abs().max() < 0.1 * exact.abs().max()
    with pytest.raises(ValueError, match="multiples of 4 pixels, its latent is 7 x 8"):
        prior.eps(rand(1, 4, 8, 7, dtype=torch.float32), torch.tensor([500]), prior.embed("a cat"))


def test_stable_diffusion_3_limits_the_size_of_a_picture(flows):
    prior = Prior.from_pretrained(flows["sd3"])
    prior.eps(rand(1, 4, 24, 8, dtype=torch.float32), torch.tensor([500]), prior.embed("a cat"))
    with pytest.raises(ValueError, match="48 pixels a side at most, its latent is 26 x 8"):
        prior.eps(rand(1, 4, 8, 26, dtype=torch.float32), torch.tensor([500]), prior.embed("a cat"))


@pytest.mark.parametrize("kind", KINDS)
def test_text_embeddings_match_the_pipeline(flows, kind):
    prior = Prior.from_pretrained(flows[kind])
    options = {"prompt_3": None, "do_classifier_free_guidance": False} if kind == "sd3" else {
        "max_sequence_length": 512 if kind == "flux" else 256}
    with torch.no_grad():
        out = prior.pipe.encode_prompt("a cat", prompt_2=None, device="cpu", **options)
    wanted = (out[0], out[2]) if kind == "sd3" else (out[0], out[1])
    for got, expected in zip(prior.embed("a cat"), wanted, strict=True):
        assert_close(got, expected)
    with pytest.warns(UserWarning, match=f"reads only {512 if kind == 'flux' else 256} of the"):
        prior.embed("a cat and a dog " * 60)


def without(folder, target, *parts):
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    for part in parts:
        shutil.rmtree(target / part)
        index[part] = [None, None]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("missing", [("text_encoder_3", "tokenizer_3"), ("text_encoder", "tokenizer"),
                                     ("text_encoder_2",),
                                     ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")])
def test_a_missing_text_encoder_gives_zeros(flows, tmp_path, missing):
    full = Prior.from_pretrained(flows["sd3"]).embed("a cat")
    prior = Prior.from_pretrained(without(flows["sd3"], tmp_path / "sd3", *missing))
    states, pooled = (part.clone() for part in full)
    if "text_encoder_3" in missing:
        states[:, 12:] = 0
    if "text_encoder" in missing:
        states[:, :12, :16], pooled[:, :16] = 0, 0
    if "text_encoder_2" in missing:
        states[:, :12, 16:32], pooled[:, 16:] = 0, 0
    got = prior.embed("a cat")
    length = 12 if {"text_encoder", "text_encoder_2"} - {*missing} else 77
    if length == 77:  # without a CLIP encoder the length of its texts is unknown
        states = torch.cat([states.new_zeros(1, 77, 40), states[:, 12:]], 1)
    assert_close(got[0], states)
    assert_close(got[1], pooled)


def test_unsupported_flows_are_refused(flows, tmp_path):
    import diffusers
    with pytest.raises(PriorError, match="text_encoder_2"):
        Prior.from_pretrained(without(flows["flux"], tmp_path / "flux", "text_encoder_2"))
    pipe = Prior.from_pretrained(flows["sd3"]).pipe
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(PriorError, match="DDIMScheduler has no noise levels for flow matching"):
        Prior(pipe)
    with pytest.raises(PriorError, match="a Linear is not supported: SD3Transformer2DModel and FluxTransformer2D"):
        Prior(SimpleNamespace(transformer=torch.nn.Linear(1, 1), components={}))
    config = tmp_path / "wide"
    shutil.copytree(flows["flux"], config)
    wide = dict(diffusers.FluxTransformer2DModel.load_config(config / "transformer")) | {"in_channels": 96}
    diffusers.FluxTransformer2DModel.from_config(wide).save_pretrained(config / "transformer")
    with pytest.raises(PriorError, match="its transformer takes 24 channels, a latent has 4: no text-to-image model"):
        Prior.from_pretrained(config)
    with pytest.raises(PriorError, match="sd3: .*not an InstructPix2Pix model"):
        InstructPix2Pix.from_pretrained(flows["sd3"])


# ---- edits with a flow ---------------------------------------------------------------------------

def test_pds_moves_equally_far_on_a_flow_with_the_same_range_of_noise(monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 300)
    diffusion = toy.world()
    flows = {shift: toy.MixtureFlow(diffusion, sigmas_of(shift=shift)) for shift in (1.0, 3.0)}
    wanted = toy.figures(diffusion, toy.trajectories(diffusion, pds.pds_loss))
    same_noise = toy.figures(flows[3.0], toy.trajectories(flows[3.0], toy.between(0.044, 0.816)))
    all_of_it = toy.figures(flows[1.0], toy.trajectories(flows[1.0], pds.pds_loss))  # t from 0.02 T to 0.98 T
    assert_close(same_noise[0], wanted[0], rtol=0.1, atol=0)
    assert all_of_it[0] < 0.6 * wanted[0]  # psi is large at low noise and holds the samples back


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_a_flow_keep_the_noise_levels_of_the_paper(flows, kind):
    prior = Prior.from_pretrained(flows[kind])
    for mode in ("svg", "nerf"):
        for key in ("t_min", "t_max"):
            usual, own = ABAR[round(PAPER[mode][key] * 1000)], prior.abar[round(prior.defaults[mode][key] * 999)]
            assert_close(own.sqrt(), usual.sqrt(), atol=2e-3, rtol=0)
    scale = {"sd3": 100.0, "flux": 3.5, "schnell": 1.0}[kind]
    assert prior.defaults["guidance"]["pds"] == prior.defaults["nerf"].get("guidance", {"pds": scale})["pds"] == scale
    assert prior.defaults["nerf"]["steps"] == PAPER["nerf"]["steps"]


@pytest.mark.parametrize("mode", ["svg", "image"])
def test_drawings_and_pictures_are_edited_with_stable_diffusion_3(command, flows, tmp_path, small_runs, mode):
    assert command("--model", flows["sd3"], "--steps", 2, mode=mode) == 0
    found = outputs(tmp_path / "out")
    assert {"source.png", "result.png", "sheet.png", f"result.{'svg' if mode == 'svg' else 'png'}"} <= found.keys()
    assert found["source.png"] != found["result.png"]


@pytest.mark.parametrize("mode", ["nerf", "splat"])
def test_scenes_are_edited_with_flux(flows, tmp_path, small_runs, mode):
    import run
    nerf_scene(tmp_path / "scene", views=4, size=16)
    assert run.main(["--mode", mode, "--scene", str(tmp_path / "scene"), "--source", "a", "--target", "b",
                     "--model", str(flows["flux"]), "--device", "cpu", "--steps", "1", "--refine", "0",
                     "--fit-seconds", "0.1", "--out", str(tmp_path / "out")]) == 0
    found = outputs(tmp_path / "out")
    assert {"sheet.png", f"result.{'safetensors' if mode == 'nerf' else 'ply'}"} <= found.keys()
    assert found["source.png"] != found["result.png"]
