"""Editors of pictures, on the latents of a prior: how a dataset of views is updated, and the prompts they read.

    x0_edit = sdedit(prior, x0, y_tgt, skip=0.85)          # SDEdit (Meng et al., arXiv 2108.01073)
    x0_edit = ddpm_inversion(prior, x0, y_tgt, y_src)      # edit-friendly inversion (arXiv 2304.06140)
    x0_edit = instruct_pix2pix(editor, picture, y)         # InstructPix2Pix (Brooks et al., arXiv 2211.09800)
    x0_edit = drfs(prior, x0, y_tgt, y_src)                # DRFS, FlowEdit (Beaudouin et al., arXiv 2509.05342)

`prior` is what pds.py takes: abar [T] and eps(x_t, t, y), guidance included; ddpm_inversion and drfs also call
prior.at(scale), a copy with that guidance. `editor` is an InstructPix2Pix of prior.py.
"""
from collections import namedtuple

import torch

from pds import add_noise, posterior, stochastic_latent

Editor = namedtuple("Editor", "title guidance strength")  # strength: of a single edit, see DatasetUpdate.edited
EDITORS = {"sdedit": Editor("SDEdit", 15.0, 0.4), "inv2n": Editor("Inv2N", 15.0, 0.36),
           "in2n": Editor("IN2N", 7.5, 1.0), "drfs": Editor("DRFS", 16.5, 0.0)}
TITLES = {name: name.upper() for name in ("sds", "dds", "pds", "ids", "ssd")} | {
    name: editor.title for name, editor in EDITORS.items()}


def prompts(args):
    """The source and the target prompt as the model reads them."""
    return args.source + args.suffix, args.target + args.suffix


def instruction(args):
    """The instruction that an InstructPix2Pix follows."""
    return args.instruction or f"make it a {args.target}"


def ddim_timesteps(T, steps, whole=None):
    """`steps` evenly spaced timesteps from noise to picture, the last one 1: Stable Diffusion's "leading" spacing.

    T: where to start, at most the number of the model's timesteps, `whole` (None: T).
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be in 1 .. {T}, got {steps}")
    return [min(i * (T // steps) + 1, (whole or T) - 1) for i in reversed(range(steps))]


@torch.no_grad()
def ddim(prior, x_t, y, timesteps):
    """Deterministic DDIM (Song et al., arXiv 2010.02502, eq. 12, sigma 0): x_t [B,C,h,w] at timesteps[0] -> x0.

    timesteps: descending; after the last one the noise level is that of timestep 0.
    """
    for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
        abar_t, abar_s = prior.abar[t].item(), prior.abar[s].item()
        eps = prior.eps(x_t, torch.full((len(x_t),), t, device=x_t.device), y)
        x0_hat = (x_t - (1 - abar_t) ** 0.5 * eps) / abar_t ** 0.5
        x_t = abar_s ** 0.5 * x0_hat + (1 - abar_s) ** 0.5 * eps
    return x_t


def sdedit(prior, x0, y, steps=20, skip=0.85, generator=None):
    """SDEdit: noise x0 [B,C,h,w] to the level after the share `skip` of `steps` DDIM steps, then denoise it towards y.

    skip 0 generates from scratch, skip near 1 returns x0. At least one step is taken.
    """
    if not 0 <= skip <= 1:
        raise ValueError(f"skip must be in 0 .. 1, got {skip}")
    return _renoised(
        prior, x0, y, ddim_timesteps(len(prior.abar), steps)[min(round(steps * skip), steps - 1) :], generator
    )


def _renoised(prior, x0, y, timesteps, generator):
    """x0 [B,C,h,w] noised to the first of the timesteps and denoised through all of them."""
    x_t = add_noise(x0, draw_noise(x0, generator), prior.abar, torch.full((len(x0),), timesteps[0]))
    return ddim(prior, x_t, y, timesteps)


@torch.no_grad()
def ddpm_inversion(prior, x0, y_tgt, y_src, steps=100, skip=0.36, guidance_src=3.5, guidance_tgt=15.0, start=None,
                   generator=None):
    """Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., arXiv 2304.06140): the paper's Inv2N is built on it.

    Each x_t is x0 with an independent noise; the z_t that lead from one to the next under y_src hold the picture, and
    the same z_t are replayed under y_tgt. They are the stochastic latents that PDS matches.

    Args:
        x0: [B,C,h,w] latent of the picture. With y_tgt = y_src and equal guidance it is recovered exactly: the last z,
            which the released code drops, is kept.
        skip: share of the steps that the replay leaves out: 0 edits most, near 1 returns x0.
        guidance_src, guidance_tgt: of the inversion and of the replay.
        start: [B,C,h,w] where the replay begins, with x0's noise; None: x0. For a scene its render, with the
            photograph as x0.
    Raises:
        ValueError: skip or steps out of range.
    """
    if not 0 <= skip <= 1:
        raise ValueError(f"skip must be in 0 .. 1, got {skip}")
    timesteps = [*dict.fromkeys(ddim_timesteps(len(prior.abar), steps))]  # for steps = T the last one comes twice
    timesteps = timesteps[min(round(steps * skip), len(timesteps) - 1):]
    source, target = prior.at(guidance_src), prior.at(guidance_tgt)

    def rows(t):
        return torch.full((len(x0),), t)  # on the CPU, as abar is: not every device has float64
    abar, noise = prior.abar.cpu(), draw_noise(x0, generator)
    x_src, x_t = (add_noise(x, noise, abar, rows(timesteps[0])) for x in (x0, x0 if start is None else start))
    for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
        last, t, s = s == 0, rows(t), rows(s)
        x_s = x0 if last else add_noise(x0, draw_noise(x0, generator), abar, s)
        z = stochastic_latent(x_s, x_src, source.eps(x_src, t.to(x0.device), y_src), abar, t, s, "consistent")
        # the target's step with that z is x_s = mu + sigma z, and the z of x_s = 0 is -mu / sigma
        eps_tgt, zero = target.eps(x_t, t.to(x0.device), y_tgt), torch.zeros_like(x_t)
        z_zero = stochastic_latent(zero, x_t, eps_tgt, abar, t, s, "consistent")
        sigma = posterior(abar, t, s, "consistent")[2].to(x_t).reshape(-1, 1, 1, 1)
        x_src, x_t = x_s, sigma * (z - z_zero)
    return x_t


def instruct_pix2pix(editor, picture, y, x0=None, steps=20, level=1.0, generator=None):
    """Edit a picture [B,3,H,W] in [0,1] as the instruction y says -> x0 [B,C,h,w], by deterministic DDIM.

    x0: the latent that is noised to timestep `level` T and denoised from there in `steps` steps; None: the picture's
    (at level 1 it hardly matters). Instruct-NeRF2NeRF (Haque et al., arXiv 2303.12789) passes the scene's render, with
    the photograph as the picture and a random level. Raises ValueError for a level below `steps` timesteps.
    """
    editor, T = editor.of(picture), len(editor.abar)
    timesteps = ddim_timesteps(round(level * T), steps, T)
    return _renoised(editor, editor.encode(picture) if x0 is None else x0, y, timesteps, generator)


@torch.no_grad()
def drfs(prior, x0, y_tgt, y_src, steps=50, guidance_src=None, guidance_tgt=16.5, shift=None, rates=None, start=None,
         generator=None):
    """Delta Rectified Flow Sampling (Beaudouin et al., arXiv 2509.05342), with the released settings.

    From noise to picture, x moves against v(y_tgt) - v(y_src) + (1 - c) (x - x0). Both samples share one noise, and the
    target's is shifted by c sigma (x - x0). With c = 1 and rates sigma_k - sigma_(k+1) this is FlowEdit (Kulikov et
    al., arXiv 2412.08629), with c = 0 it is the gradient of DDS over 1 - sigma. Any prior works: up to a factor, the
    x_t of a diffusion model is the (1 - sigma) x0 + sigma eps of a flow.

    Args:
        x0: [B,C,h,w] latent of the picture; start: [B,C,h,w] where x begins, None: x0.
        guidance_src: None: 6 / 16.5 of the target's, the released ratio.
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
    source = prior.at(guidance_tgt * 6 / 16.5 if guidance_src is None else guidance_src)
    x, target = x0 if start is None else start, prior.at(guidance_tgt)
    columns = (part.tolist() for part in (signal + noise, sigmas, shift, rates))
    for t, scale, sigma, c, rate in zip(timesteps, *columns, strict=True):
        if rate == 0:  # as the first released one is
            continue
        x_src = (1 - sigma) * x0 + sigma * draw_noise(x0, generator)
        x_tgt, rows = x_src + (1 - sigma + c * sigma) * (x - x0), t.repeat(len(x0)).to(x0.device)
        v_tgt, v_src = ((of.eps(scale * mixed, rows, y) - mixed) / (1 - sigma)
                        for of, mixed, y in ((target, x_tgt, y_tgt), (source, x_src, y_src)))
        x = x - rate * (v_tgt - v_src + (1 - c) * (x - x0))
    return x


def drfs_rates(sigma):
    """The released step sizes of DRFS for the noise levels sigma [steps]: [steps], the first one 0.

    A hump k^9 (1 - k)^7 on a rising line, both in units of the last difference of two noise levels.
    """
    last, k = (sigma[-2] - sigma[-1]) / 1.6, torch.arange(len(sigma)) / (len(sigma) + 27)
    hump = k ** 9 * (1 - k) ** 7 / ((9 / 16) ** 9 * (7 / 16) ** 7)
    return 2.2 * last * ((1 / 1.6 - 1 / 4) * hump + k / 4)


def draw_noise(like, generator):
    """Noise in the shape of `like`, drawn on the generator's device, so that a seed gives the same on every machine."""
    return torch.randn(like.shape, generator=generator, device=generator.device if generator else "cpu").to(like)
