"""Editors of pictures, on the latents of a prior: what a dataset of views is updated with, and where an edit belongs.

    x0_edit = sdedit(prior, x0, y_tgt, skip=0.85)          # SDEdit (Meng et al., arXiv 2108.01073)
    x0_edit = ddpm_inversion(prior, x0, y_tgt, y_src)      # edit-friendly inversion (arXiv 2304.06140)
    x0_edit = instruct_pix2pix(editor, picture, y)         # InstructPix2Pix (Brooks et al., arXiv 2211.09800)
    x0_edit = drfs(prior, x0, y_tgt, y_src)                # DRFS, FlowEdit (Beaudouin et al., arXiv 2509.05342)
    mask = diffedit_mask(prior, x0, y_tgt, y_src)          # DiffEdit (Couairon et al., arXiv 2210.11427)

`prior` is what pds.py takes: abar [T] and eps(x_t, t, y), guidance included, and for ddpm_inversion and drfs an
attribute `guidance` to set on a copy of it. `editor` is an InstructPix2Pix of prior.py. Picture is what --mode image
edits; it also needs the prior's encode and decode.
"""
import copy

import torch

from pds import add_noise, posterior, stochastic_latent


def ddim_timesteps(T, steps, whole=None):
    """`steps` timesteps from noise to picture, evenly spaced, the last one 1: Stable Diffusion's `leading` ones.

    T: from where, at most all timesteps of the model, which are `whole` (None: T).
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be in 1 .. {T}, got {steps}")
    return [min(i * (T // steps) + 1, (whole or T) - 1) for i in reversed(range(steps))]


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
    return _renoised(prior, x0, y, ddim_timesteps(len(prior.abar), steps)[min(round(steps * skip), steps - 1):], generator)


def _renoised(prior, x0, y, timesteps, generator):
    """x0 [B,C,h,w] noised to the first of the timesteps, and denoised through all of them."""
    x_t = add_noise(x0, _draw(x0, generator), prior.abar, torch.full((len(x0),), timesteps[0]))
    return ddim(prior, x_t, y, timesteps)


@torch.no_grad()
def ddpm_inversion(prior, x0, y_tgt, y_src, steps=100, skip=0.36, guidance_src=3.5, guidance_tgt=15.0, start=None,
                   generator=None):
    """Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., arXiv 2304.06140): the paper's Inv2N is built on it.

    Every x_t of the way is x0 with a noise of its own; the z_t that lead from one to the next under y_src hold the
    picture, and the same z_t are replayed under y_tgt. They are the stochastic latents that PDS matches.

    Args:
        x0: [B,C,h,w] latent of the picture; with y_tgt = y_src and equal guidance it comes back exactly: the last z,
            which the released code leaves out, is kept.
        skip: share of the steps that the replay leaves out: 0 edits most, near 1 returns x0.
        guidance_src, guidance_tgt: of the inversion and of the replay.
        start: [B,C,h,w] what the replay begins from, with x0's noise; None: x0. A scene's render, where x0 is its
            photograph.
    Raises:
        ValueError: skip or steps out of range.
    """
    if not 0 <= skip <= 1:
        raise ValueError(f"skip must be in 0 .. 1, got {skip}")
    timesteps = [*dict.fromkeys(ddim_timesteps(len(prior.abar), steps))]  # with all T of them the last comes twice
    timesteps = timesteps[min(round(steps * skip), len(timesteps) - 1):]
    source, target = copy.copy(prior), copy.copy(prior)
    source.guidance, target.guidance = guidance_src, guidance_tgt
    rows = lambda t: torch.full((len(x0),), t)  # on the CPU, as abar is: not every device has float64
    abar, noise = prior.abar.cpu(), _draw(x0, generator)
    x_src, x_t = (add_noise(x, noise, abar, rows(timesteps[0])) for x in (x0, x0 if start is None else start))
    for t, s in zip(timesteps, [*timesteps[1:], 0]):
        last, t, s = s == 0, rows(t), rows(s)
        x_s = x0 if last else add_noise(x0, _draw(x0, generator), abar, s)
        z = stochastic_latent(x_s, x_src, source.eps(x_src, t.to(x0.device), y_src), abar, t, s, "consistent")
        # the step of the target with that z, x_s = mu + sigma z: the z of x_s = 0 is -mu / sigma
        eps_tgt, zero = target.eps(x_t, t.to(x0.device), y_tgt), torch.zeros_like(x_t)
        z_zero = stochastic_latent(zero, x_t, eps_tgt, abar, t, s, "consistent")
        sigma = posterior(abar, t, s, "consistent")[2].to(x_t).reshape(-1, 1, 1, 1)
        x_src, x_t = x_s, sigma * (z - z_zero)
    return x_t


def instruct_pix2pix(editor, picture, y, x0=None, steps=20, level=1.0, generator=None):
    """Edit a picture [B,3,H,W] in [0,1] as the instruction y says -> x0 [B,C,h,w], by deterministic DDIM.

    x0: the latent that is noised to `level` T and denoised from there in all of the steps; None: the picture's own. With
    level 1 it hardly matters. Instruct-NeRF2NeRF (Haque et al., arXiv 2303.12789) passes a scene's render here, the
    photograph as the picture, and a level of its own. Raises ValueError for a level with fewer timesteps than steps.
    """
    editor, T = editor.of(picture), len(editor.abar)
    timesteps = ddim_timesteps(round(level * T), steps, T)
    return _renoised(editor, editor.encode(picture) if x0 is None else x0, y, timesteps, generator)


@torch.no_grad()
def drfs(prior, x0, y_tgt, y_src, steps=50, guidance_src=None, guidance_tgt=16.5, shift=None, rates=None, start=None,
         generator=None):
    """Delta Rectified Flow Sampling (Beaudouin et al., arXiv 2509.05342), with the released settings.

    From noise to picture, x moves against v(y_tgt) - v(y_src) + (1 - c) (x - x0). Both samples have one noise, and the
    target's is shifted by c sigma (x - x0). With c = 1 and the rates sigma_k - sigma_(k+1) that is FlowEdit (Kulikov et
    al., arXiv 2412.08629), with c = 0 the gradient of DDS over 1 - sigma. Any prior will do: up to a factor, the x_t of
    a diffusion model is the (1 - sigma) x0 + sigma eps of a flow.

    Args:
        x0: [B,C,h,w] latent of the picture; start: [B,C,h,w] where x begins, None: x0.
        guidance_src: None: 6 where that of the target is 16.5, as released, and as much of any other.
        shift: c of each step, [steps]; None: k / steps at step k. rates: [steps]; None: drfs_rates.
    Raises:
        ValueError: fewer than two steps, or more than the prior has timesteps.
    """
    if not 2 <= steps <= len(prior.abar):
        raise ValueError(f"steps must be in 2 .. {len(prior.abar)}, got {steps}")
    timesteps = torch.linspace(len(prior.abar) - 1, 0, steps).round().long()
    signal, noise = (part.sqrt() for part in (prior.abar.cpu()[timesteps], 1 - prior.abar.cpu()[timesteps]))
    sigmas = noise / (signal + noise)
    shift = torch.arange(steps) / steps if shift is None else shift
    rates = drfs_rates(sigmas) if rates is None else rates
    x, source, target = x0 if start is None else start, copy.copy(prior), copy.copy(prior)
    source.guidance = guidance_tgt * 6 / 16.5 if guidance_src is None else guidance_src
    target.guidance = guidance_tgt
    for t, scale, sigma, c, rate in zip(timesteps, *(part.tolist() for part in (signal + noise, sigmas, shift, rates))):
        if rate == 0:  # the first of the released ones
            continue
        x_src = (1 - sigma) * x0 + sigma * _draw(x0, generator)
        x_tgt, rows = x_src + (1 - sigma + c * sigma) * (x - x0), t.repeat(len(x0)).to(x0.device)
        v_tgt, v_src = ((of.eps(scale * mixed, rows, y) - mixed) / (1 - sigma)
                        for of, mixed, y in ((target, x_tgt, y_tgt), (source, x_src, y_src)))
        x = x - rate * (v_tgt - v_src + (1 - c) * (x - x0))
    return x


def drfs_rates(sigma):
    """The step sizes of DRFS as its authors released them, for the noise levels sigma [steps]: [steps], from 0.

    A hump k^9 (1 - k)^7 over a rising line, both in units of the last difference of two noise levels.
    """
    last, k = (sigma[-2] - sigma[-1]) / 1.6, torch.arange(len(sigma)) / (len(sigma) + 27)
    hump = k ** 9 * (1 - k) ** 7 / ((9 / 16) ** 9 * (7 / 16) ** 7)
    return 2.2 * last * ((1 / 1.6 - 1 / 4) * hump + k / 4)


def _draw(like, generator):
    """Noise in the shape of `like`, drawn on the generator's device: a seed means the same on every machine."""
    return torch.randn(like.shape, generator=generator, device=generator.device if generator else "cpu").to(like)
