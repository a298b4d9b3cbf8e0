"""The method: pds.py, the editors of pictures in edit2d.py, and the plane of toy.py. The other tests are in tests/."""
import math

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import pds
import toy
from image.editors import ddim, ddim_timesteps, ddpm_inversion, sdedit
from image.masks import diffedit_mask

torch.set_num_threads(1)
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


@pytest.mark.parametrize("stride", [1, 2, 50])
def test_consistent_chi_depends_on_the_signal_to_noise_ratios_alone(stride):
    """chi = sqrt(SNR_s / SNR_t - 1), SNR = abar / (1 - abar), for any schedule."""
    t = torch.arange(stride, 1000, 31)
    for abar in (ABAR, torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)):
        snr = abar / (1 - abar)
        chi = pds.pds_coefficients(abar, t, t - stride, "consistent")[1]
        assert_close(chi, (snr[t - stride] / snr[t] - 1).sqrt(), atol=1e-9, rtol=1e-7)

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
    assert_close(psi, 0.075 * torch.tensor([0.099, 0.899], dtype=torch.float64).exp())
    assert_close(chi, 0.2 + 0.8 * torch.tensor([0.099, 0.899], dtype=torch.float64) ** (1 / 2.718281828459045))
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
    assert_close(grad_of(pds.dds_loss, prior, tgt, src, TGT, SRC, t, noise), eps(tgt, 2.0) - eps(src, -1.0))
    for weight in (pds.noise_variance, (1 - ABAR)[t]):  # a function or a tensor
        got = grad_of(pds.dds_loss, prior, tgt, src, TGT, SRC, t, noise, weight=weight)
        assert_close(got, w * (eps(tgt, 2.0) - eps(src, -1.0)))
    assert_close(grad_of(pds.sds_loss, prior, tgt, src, TGT, SRC, t, noise, weight=3), 3 * (eps(tgt, 2.0) - noise))
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


def test_identity_and_mask_act_on_the_pull_and_on_the_push_alone():
    prior, t = GaussianPrior(), torch.tensor([50, 700])
    tgt, src, noise = (rand(2, 3, 2, 2, seed=i) for i in range(3))
    arguments = prior, tgt, src, TGT, SRC, t, noise
    pull = grad_of(pds.pds_loss, prior, tgt, src, SRC, SRC, t, noise, coefficients=lambda *a: (
        pds.pds_coefficients(*a)[0], torch.zeros(2)))
    push = grad_of(pds.pds_loss, *arguments) - pull
    for k in (0, 0.5, 1):
        assert_close(grad_of(pds.pds_loss, *arguments, identity=k), k * pull + push)
    mask = torch.tensor([[0.0, 1.0], [0.25, 1.0]]).expand(2, 1, 2, 2)
    for one in (mask, mask[:1]):
        assert_close(grad_of(pds.pds_loss, *arguments, mask=one), pull + mask * push)
        for loss in (pds.sds_loss, pds.dds_loss):
            assert_close(grad_of(loss, *arguments, mask=one), mask * grad_of(loss, *arguments))
    for wrong in (mask[0], mask[:, :, :1], mask.expand(2, 3, 2, 2), mask[:1].expand(3, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"mask must be \[2,1,2,2\]"):
            pds.pds_loss(*arguments, mask=wrong)


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
    """On Gaussians of one variance every method has a known end: what the paper claims of the three.

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


def test_the_plane_shows_what_the_paper_says(tmp_path, capsys, monkeypatch):
    ways, trajectories = {}, toy.trajectories

    def recorded(prior, loss, seed, **options):
        way = trajectories(prior, loss, seed, **options)
        ways.setdefault(loss.__name__, way)
        return way
    monkeypatch.setattr(toy, "trajectories", recorded)
    assert toy.main(["--out", str(tmp_path)]) == 0
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:5]]
    sds, dds, ours, without = ([float(x) for x in row[1:]] for row in rows)
    assert ours[0] < 0.6 * min(sds[0], dds[0], without[0])  # nearest to the source
    assert 0 < ours[2] < 0.25 * min(sds[2], dds[2], without[2])  # beyond the boundary, and nearest to it
    assert Image.open(tmp_path / "toy.png").size == (3 * 360, 360)
    spread = [ways[name][-1].std(0).norm() / ways[name][0].std(0).norm() for name in ("sds_loss", "pds_loss")]
    assert spread[0] < 0.1 and spread[1] > 0.8  # SDS ends in one point, PDS keeps the samples apart
    assert (tmp_path / "toy.svg").read_text().count("<polyline") == 3 * 61


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
