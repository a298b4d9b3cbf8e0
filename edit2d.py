"""Editors of pictures, on the latents of a prior: what a dataset of views is updated with, and where an edit belongs.

    x0_edit = sdedit(prior, x0, y_tgt, skip=0.85)          # SDEdit (Meng et al., arXiv 2108.01073)
    mask = diffedit_mask(prior, x0, y_tgt, y_src)          # DiffEdit (Couairon et al., arXiv 2210.11427)

`prior` is what pds.py takes: abar [T] and eps(x_t, t, y), guidance included.
"""
import torch

from pds import add_noise


def ddim_timesteps(T, steps):
    """`steps` timesteps from noise to picture, evenly spaced, the last one 1: Stable Diffusion's `leading` ones."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be in 1 .. {T}, got {steps}")
    return [min(i * (T // steps) + 1, T - 1) for i in reversed(range(steps))]


@torch.no_grad()
def ddim(prior, x_t, y, timesteps):
    """Deterministic DDIM (Song et al., arXiv 2010.02502, eq. 12, sigma 0): x_t [B,C,h,w] at timesteps[0] -> x0.

    timesteps: descending; after the last one the noise level is that of timestep 0.
    """
    for t, s in zip(timesteps, [*timesteps[1:], 0]):
        abar_t, abar_s = prior.abar[t].item(), prior.abar[s].item()
        eps = prior.eps(x_t, torch.full((len(x_t),), t, device=x_t.device), y)
        x0_hat = (x_t - (1 - abar_t) ** 0.5 * eps) / abar_t ** 0.5
        x_t = abar_s ** 0.5 * x0_hat + (1 - abar_s) ** 0.5 * eps
    return x_t


def sdedit(prior, x0, y, steps=20, skip=0.85, generator=None):
    """SDEdit: noise x0 [B,C,h,w] to the level that is left after `skip` of `steps` DDIM steps, denoise it towards y.

    skip 0 generates anew, skip near 1 returns x0. At least one step is taken.
    """
    if not 0 <= skip <= 1:
        raise ValueError(f"skip must be in 0 .. 1, got {skip}")
    timesteps = ddim_timesteps(len(prior.abar), steps)[min(round(steps * skip), steps - 1):]
    device = generator.device if generator else "cpu"
    noise = torch.randn(x0.shape, generator=generator, device=device).to(x0)
    x_t = add_noise(x0, noise, prior.abar, torch.full((len(x0),), timesteps[0]))
    return ddim(prior, x_t, y, timesteps)


@torch.no_grad()
def diffedit_mask(prior, x0, y_tgt, y_src, noises=16, level=0.5, generator=None):
    """Where the two prompts disagree about the picture, [B,1,h,w] bool: DiffEdit, step 1.

    The difference of the two noise predictions at `level` T, averaged over several noises and channels, is
    scaled so that its 98th percentile is 1 (a single extreme must not decide) and cut at one half.
    """
    t = torch.full((len(x0),), int(level * len(prior.abar)), device=x0.device)
    device, total = generator.device if generator else "cpu", 0
    for _ in range(noises):
        noise = torch.randn(x0.shape, generator=generator, device=device).to(x0)
        x_t = add_noise(x0, noise, prior.abar, t)
        total = total + (prior.eps(x_t, t, y_tgt) - prior.eps(x_t, t, y_src)).abs().mean(1, keepdim=True)
    top = total.flatten(1).quantile(0.98, dim=1).clamp_min(1e-12)
    return total > 0.5 * top.reshape(-1, 1, 1, 1)
