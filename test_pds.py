"""Tests of pds.py; to reuse the loss, copy both files. They need torch and pytest alone. Other tests are in tests/."""
import pytest
import torch
from torch.testing import assert_close

import pds

torch.set_num_threads(1)
BETAS = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
ABAR = (1 - BETAS).cumprod(0)


class GaussianPrior:
    """The exact noise prediction for x0 ~ N(mean(y), var I); y [B] is the index of the mean. Counts its calls."""

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

def test_official_coefficients_are_those_of_the_released_code():
    """compute_posterior_mean of the released code, at t and two steps before, with the scheduler's one-step beta_t."""
    t = torch.arange(20, 981)
    beta, abar_t, abar_s = BETAS[t], ABAR[t], ABAR[t - 2]
    c_x0 = abar_s.sqrt() * beta / (1 - abar_t)
    c_xt = (1 - beta).sqrt() * (1 - abar_s) / (1 - abar_t)
    sigma = ((1 - abar_s) / (1 - abar_t) * beta).sqrt()
    # factors of x0 and eps in z = (x_s - c_x0 x0_hat - c_xt x_t) / sigma; the shared noises cancel in the difference
    psi = (abar_s.sqrt() - c_x0 - c_xt * abar_t.sqrt()) / sigma
    chi = c_x0 * (1 - abar_t).sqrt() / abar_t.sqrt() / sigma
    for got, wanted in zip(pds.pds_coefficients(ABAR, t, t - 2), (psi, chi), strict=True):
        assert_close(got, wanted, atol=1e-9, rtol=1e-7)
    assert (psi > 0.004).all() and psi[0] == pytest.approx(1.695, abs=1e-3) and psi.argmin() == len(t) - 1


@pytest.mark.parametrize("stride", [1, 2, 10, 100])
def test_consistent_posterior_has_no_pull_to_the_source(stride):
    t = torch.arange(stride + 1, 1000, 37)
    c_x0, c_xt, sigma = pds.posterior(ABAR, t, t - stride, "consistent")
    # the code returns exactly 0; the long form confirms it up to rounding
    long_form = (ABAR[t - stride].sqrt() - c_x0 - c_xt * ABAR[t].sqrt()) / sigma
    assert_close(long_form, torch.zeros_like(long_form), atol=1e-10, rtol=0)
    assert (pds.pds_coefficients(ABAR, t, t - stride, "consistent")[0] == 0).all()
    if stride == 1:  # for a single step the two kinds are the same posterior
        for a, b in zip(pds.posterior(ABAR, t, t - 1, "official"), (c_x0, c_xt, sigma), strict=True):
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
    assert_close(consistent, chi * (eps(tgt, 2.0) - eps(src, -1.0)))  # PDS without psi is DDS with the weight chi


@pytest.mark.parametrize("loss", [pds.pds_loss, pds.dds_loss])
def test_without_an_edit_the_gradient_is_zero(loss):
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


def test_only_the_target_gets_a_gradient_and_it_is_float32():
    class Network(torch.nn.Module):  # a network in bfloat16 whose parameters could receive a gradient
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


def test_a_redescending_identity_holds_what_is_near_and_lets_go_what_is_far():
    src = rand(5, 3, 2, 2, seed=0)
    away = rand(5, 3, 2, 2, seed=1)
    away = away / away.square().mean((1, 2, 3), keepdim=True).sqrt()  # of length 1, as a root mean square
    far = torch.tensor([0.0, 0.5, 1.0, 1.5, 4.0])
    tgt = (src + 1.2 * far.view(-1, 1, 1, 1) * away).requires_grad_()
    factors = pds.redescending(tgt, src, reach=1.2)
    assert not factors.requires_grad
    wanted = torch.tensor([1, 256 / 257, 1 / 2, 256 / 6817, 1 / 65537], dtype=factors.dtype)  # 1 / (1 + far^8)
    assert_close(factors, wanted)
    assert pds.redescending(tgt.float(), src.float(), reach=1e-60).tolist() == [1, 0, 0, 0, 0]  # 0 in float32


def test_identity_scales_the_pull_alone_and_a_mask_the_push_alone():
    prior, t = GaussianPrior(), torch.tensor([50, 700])
    tgt, src, noise = (rand(2, 3, 2, 2, seed=i) for i in range(3))
    arguments = prior, tgt, src, TGT, SRC, t, noise
    pull = grad_of(pds.pds_loss, prior, tgt, src, SRC, SRC, t, noise, coefficients=lambda *a: (
        pds.pds_coefficients(*a)[0], torch.zeros(2)))
    push = grad_of(pds.pds_loss, *arguments) - pull
    for k in (0, 0.5, 1):
        assert_close(grad_of(pds.pds_loss, *arguments, identity=k), k * pull + push)
    rows = torch.tensor([0.25, 2.0])
    assert_close(grad_of(pds.pds_loss, *arguments, identity=rows), rows.view(2, 1, 1, 1) * pull + push)
    assert_close(grad_of(pds.identity_loss, prior, tgt, src, t), pull)
    assert_close(grad_of(pds.identity_loss, prior, tgt, src, t, identity=rows), rows.view(2, 1, 1, 1) * pull)
    mask = torch.tensor([[0.0, 1.0], [0.25, 1.0]]).expand(2, 1, 2, 2)
    for one in (mask, mask[:1]):
        assert_close(grad_of(pds.pds_loss, *arguments, mask=one), pull + mask * push)
        for loss in (pds.sds_loss, pds.dds_loss):
            assert_close(grad_of(loss, *arguments, mask=one), mask * grad_of(loss, *arguments))
    for wrong in (mask[0], mask[:, :, :1], mask.expand(2, 3, 2, 2), mask[:1].expand(3, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"mask must be \[2,1,2,2\]"):
            pds.pds_loss(*arguments, mask=wrong)


def test_nans_propagate():
    prior = GaussianPrior()
    prior.eps = lambda x_t, t, y: x_t * float("nan")
    assert pds.pds_loss(prior, rand(1, 1, 2, 2), rand(1, 1, 2, 2), TGT, SRC).isnan()


@pytest.mark.parametrize("change, message", [
    ({"x0_src": rand(1, 1, 2, 3)}, "must both be"), ({"t": torch.tensor([1])}, "values in 2 .. 999"),
    ({"t": torch.tensor([1000])}, "values in 2 .. 999"), ({"t": torch.tensor([5, 5])}, r"t must be \[1\]"),
    ({"noise": rand(1, 1, 2)}, "noise must have the shape"), ({"stride": 0}, "0 <= s < t"),
    ({"stride": -2}, "stride must be"), ({"y_src": torch.zeros(3)}, "prompts must be")])
def test_bad_arguments_raise_a_clear_error(change, message):
    arguments = dict(x0_tgt=rand(1, 1, 2, 2), x0_src=rand(1, 1, 2, 2), y_tgt=TGT, y_src=SRC, t=torch.tensor([9]))
    with pytest.raises(ValueError, match=message):
        pds.pds_loss(GaussianPrior(), **arguments | change)


def test_timesteps_cover_their_range_and_nothing_else():
    t = pds.sample_timesteps(20000, 100, 0.1, 0.2, generator=torch.Generator().manual_seed(0))
    assert t.min() == 10 and t.max() == 20 and len(t.unique()) == 11
    assert pds.sample_timesteps(1, 100, 0.0, 1.0, progress=0.0) == 99
    assert pds.sample_timesteps(1, 100, 0.0, 1.0, progress=1.0) == 0
    falling = [pds.sample_timesteps(1, 1000, progress=p / 10).item() for p in range(11)]
    assert falling[0] == 980 and falling[-1] == 20 and falling == sorted(falling, reverse=True)
    with pytest.raises(ValueError, match="t_min <= t_max"):
        pds.sample_timesteps(1, 100, 0.5, 0.4)
    short = GaussianPrior(abar=ABAR[::50])  # T = 20: 0.02 T is less than the stride
    pds.pds_loss(short, rand(64, 1, 1, 1), rand(64, 1, 1, 1), TGT, SRC, stride=15)


def test_each_method_converges_where_the_paper_says():
    """Between Gaussians of equal variance the fixed point of each method is known, and it is what the paper claims.

    SDS collapses to the target's mode, DDS moves every sample the whole distance of 3, and PDS stops where the pull
    back to the source balances the push: after 3 E[chi r] / (E[psi] + E[chi r]), with r = sqrt(abar (1 - abar)).
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
