"""image/editors.py: DDIM, SDEdit and DDPM inversion against diffusers and an exact prior; DiffEdit's mask."""
import copy

import pytest
import torch
from conftest import ABAR, rand
from torch.testing import assert_close

import pds
from image.editors import ddim, ddim_timesteps, ddpm_inversion, sdedit
from image.masks import diffedit_mask

SRC, TGT = torch.tensor([0]), torch.tensor([1])


class GaussianPrior:
    """The exact noise prediction for x0 ~ N(mean(y), var I); y [B] is the index of the mean."""
    abar, var, means = ABAR, 0.3, torch.tensor([-1.0, 2.0], dtype=torch.float64)

    def eps(self, x_t, t, y):
        abar = self.abar[t].to(x_t).reshape(-1, 1, 1, 1)
        mean = self.means.to(x_t)[y].reshape(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / (1 - abar + abar * self.var)


def test_ddim_matches_the_scheduler_of_diffusers():
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


def test_ddim_maps_noise_to_data():
    """With the exact prediction for N(2, 0.3 I), noise at level T becomes mean + deviation * noise."""
    x = rand(1, 1, 8, 8)
    x0 = ddim(GaussianPrior(), x, TGT, ddim_timesteps(1000, 1000))
    assert_close(x0, 2 + 0.3 ** 0.5 * x, atol=0.08, rtol=0)


def test_sdedit_keeps_more_of_the_source_the_more_it_skips():
    prior, x0 = GaussianPrior(), torch.full((1, 1, 8, 8), -1.0, dtype=torch.float64)
    def draw():
        return torch.Generator().manual_seed(0)
    means = [sdedit(prior, x0, TGT, 20, skip, draw()).mean().item() for skip in (1, 0.85, 0.4, 0)]
    assert means == sorted(means) and abs(means[0] + 1) < 0.1 and abs(means[-1] - 2) < 0.2
    with pytest.raises(ValueError, match="skip must be in 0 .. 1, got 1.5"):
        sdedit(prior, x0, TGT, skip=1.5)
    with pytest.raises(ValueError, match="steps must be in 1 .. 1000, got 0"):
        sdedit(prior, x0, TGT, steps=0)


class Guided(GaussianPrior):
    """With guidance, as in Prior: the unconditional mean is 0."""

    def at(self, scale, source=None):
        twin = copy.copy(self)
        twin.guidance = scale
        return twin

    def eps(self, x_t, t, y):
        abar = self.abar[t].to(x_t).reshape(-1, 1, 1, 1)
        return super().eps(x_t, t, y) * self.guidance + (1 - self.guidance) * (
            (1 - abar).sqrt() * x_t / (1 - abar + abar * self.var))


def test_ddpm_inversion_recovers_the_picture():
    prior, x0 = Guided(), rand(2, 1, 4, 4)
    def draw():
        return torch.Generator().manual_seed(0)
    for steps, skip in ((100, 0.36), (7, 0.0), (10, 0.95)):
        again = ddpm_inversion(prior, x0, SRC, SRC, steps, skip, 3.5, 3.5, generator=draw())
        assert_close(again, x0, atol=1e-9, rtol=0)
    assert not hasattr(prior, "guidance")
    moved = [(ddpm_inversion(prior, x0, TGT, SRC, 50, skip, 1.0, 1.0, generator=draw()) - x0).mean().item()
             for skip in (0.9, 0.6, 0.3, 0.0)]
    assert 0 < moved[0] < moved[1] < moved[2] < moved[3] and moved[3] == pytest.approx(3, abs=0.1)  # from mean -1 to 2
    with pytest.raises(ValueError, match="skip must be in 0 .. 1, got -1"):
        ddpm_inversion(prior, x0, TGT, SRC, skip=-1)


def test_ddpm_inversion_matches_the_scheduler_of_diffusers():
    """z_t solved from the source's stochastic DDIM steps (eta = 1) and used in the target's, from another latent."""
    from diffusers import DDIMScheduler
    prior, x0, start, steps, first = Guided(), rand(1, 1, 3, 3, seed=1), rand(1, 1, 3, 3, seed=2), 10, 4
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    generator, zero = torch.Generator().manual_seed(3), torch.zeros_like(x0)
    def draw():
        return torch.randn(x0.shape, generator=generator).double()
    times = [t.view(1) for t in scheduler.timesteps[first:]]
    noise = draw()
    path = [pds.add_noise(x0, noise, ABAR, times[0])] + [pds.add_noise(x0, draw(), ABAR, t) for t in times[1:]] + [x0]
    x_t = pds.add_noise(start, noise, ABAR, times[0])
    for t, x_src, x_next in zip(times, path, path[1:], strict=False):
        def step(x, y, guidance, z, t=t):
            return scheduler.step(prior.at(guidance).eps(x, t, y), t, x, eta=1.0, variance_noise=z).prev_sample
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
