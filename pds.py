"""Posterior Distillation Sampling (Koo, Park, Sung, CVPR 2024, arXiv 2311.13831), beside SDS and DDS.

This file needs torch and nothing else; copy it into any project:

    prior    anything with prior.abar [T], the cumulative products of alpha, and
             prior.eps(x_t [B,C,H,W], t [B], y) -> noise prediction [B,C,H,W], guidance included
    x0_tgt   [B,C,H,W] latent of what is being edited, requires grad
    x0_src   [B,C,H,W] latent of the original, fixed
    y_tgt, y_src  the two prompts as the prior understands them: a tensor [B,...] or [1,...], or a tuple of such

    loss = pds_loss(prior, x0_tgt, x0_src, y_tgt, y_src)
    loss.backward()

The three losses share one signature and differ in one line each, the gradient on x0_tgt:

    SDS  (DreamFusion, arXiv 2209.14988)            w(t) (eps_tgt - noise)
    DDS  (Delta Denoising Score, arXiv 2304.07090)  w(t) (eps_tgt - eps_src)
    PDS                                             psi(t) (x0_tgt - x0_src) + chi(t) (eps_tgt - eps_src)

Scale: the gradient that reaches x0_tgt is the expression above divided by the batch size B. The released PDS code
divides by B^2 C H W instead (at B = 1, all that it runs, by C H W). Adam hides the difference, SGD does not.
"""
import math

import torch


def pds_loss(prior, x0_tgt, x0_src, y_tgt, y_src, t=None, noise=None, stride=2, coefficients="official",
             identity=1.0, mask=None, generator=None):
    """Match the stochastic latents of target and source (paper, eq. 11 and 13).

    The noises that carry x0 to x_t and to x_s, s = t - stride, are shared by target and source, so they cancel
    in z_tgt - z_src (see stochastic_latent) and the noise of x_s need not be drawn at all.

    Args:
        prior, x0_tgt, x0_src, y_tgt, y_src: see the head of this file. No gradient reaches prior or x0_src.
        t: [B] timesteps (indices into prior.abar, any value per row), or None: uniform in 0.02 T .. 0.98 T.
        noise: [B,C,H,W] the noise of x_t, shared by target and source, or None: drawn from `generator`.
        stride: the distance t - s between the two timesteps of the posterior.
        coefficients: as `kind` in pds_coefficients.
        identity: multiplies psi, a number or a tensor [B]. 1 is the paper's; 0 leaves the push alone, DDS with the
            weight chi(t). See `redescending` for one that depends on the distance.
        mask: [B,1,H,W] or [1,1,H,W] in [0,1], multiplies the push alone: the edit stays inside, while the pull to the
            source acts everywhere. None: everywhere.
        generator: torch.Generator for t and noise.
    Returns:
        Scalar, the mean over the batch of |gradient|^2 / 2; its gradient by x0_tgt is the PDS gradient / B.
    Raises:
        ValueError: shapes that do not fit, t outside stride .. T - 1.
    """
    x0_tgt, x0_src, t, noise = _prepare(prior, x0_tgt, x0_src, t, noise, stride, generator)
    psi, chi = pds_coefficients(prior.abar, t, t - stride, coefficients)
    eps_tgt, eps_src = predict(prior, t, noise, (x0_tgt, y_tgt), (x0_src, y_src))
    pull = _scaled(identity, _rows(psi, x0_tgt)) * (x0_tgt - x0_src).detach()
    push = _rows(chi, x0_tgt) * (eps_tgt - eps_src)
    return as_loss(x0_tgt, pull + _masked(push, mask))


def identity_loss(prior, x0_tgt, x0_src, t, stride=2, coefficients="official", identity=1.0):
    """The identity term of PDS alone, K psi(t) (x0_tgt - x0_src) with K = identity. Arguments as in pds_loss; t is
    required.

    pds_loss contains it. Parameters that are to have another weight K receive the difference by
    identity_loss(..., identity=K - identity).backward(inputs=parameters, retain_graph=True).
    """
    t = t.to(x0_tgt.device)
    psi, _ = pds_coefficients(prior.abar, t, t - stride, coefficients)
    return as_loss(x0_tgt, _scaled(identity, _rows(psi, x0_tgt)) * (x0_tgt - x0_src).detach())


def redescending(x0_tgt, x0_src, reach):
    """[B] factors in (0, 1] for `identity`: 1 / (1 + (d / reach)^8), where d is the root mean square of x0_tgt - x0_src
    [B,C,H,W]. They are about 1 for d below half of `reach`, 1/2 at it, and fall to 0 beyond.

    The paper's pull grows with the distance: a K that holds a small edit keeps a brown bear from becoming white.
    In robust statistics such a weight makes an estimator redescend (Hampel 1974): what has moved far was meant to.
    """
    distance = (x0_tgt - x0_src).detach().square().mean((1, 2, 3)).sqrt()
    return 1 / (1 + (distance / max(reach, torch.finfo(distance.dtype).tiny)) ** 8)


def dds_loss(prior, x0_tgt, x0_src, y_tgt, y_src, t=None, noise=None, weight=1.0, mask=None, generator=None):
    """Delta Denoising Score: w(t) (eps_tgt - eps_src). Arguments as in pds_loss; weight: w(t), a number, a tensor [B]
    or a function (abar, t) -> [B]; 1 in DDS's own code.

    The source's prediction removes the bias that both share, but nothing pulls x0_tgt back to x0_src.
    """
    x0_tgt, x0_src, t, noise = _prepare(prior, x0_tgt, x0_src, t, noise, 0, generator)
    eps_tgt, eps_src = predict(prior, t, noise, (x0_tgt, y_tgt), (x0_src, y_src))
    return as_loss(x0_tgt, _masked(_weights(weight, prior.abar, t, x0_tgt) * (eps_tgt - eps_src), mask))


def noise_variance(abar, t):
    """w(t) = 1 - abar_t [B], DreamFusion's weight of SDS."""
    return 1 - abar[t.to(abar.device)]


def sds_loss(prior, x0_tgt, x0_src, y_tgt, y_src, t=None, noise=None, weight=noise_variance, mask=None, generator=None):
    """Score Distillation Sampling: w(t) (eps_tgt - noise), w(t) = 1 - abar_t as published. Arguments as in dds_loss.

    x0_src and y_src are unused; they keep the three signatures interchangeable."""
    x0_tgt, x0_src, t, noise = _prepare(prior, x0_tgt, x0_src, t, noise, 0, generator)
    eps_tgt, = predict(prior, t, noise, (x0_tgt, y_tgt))
    return as_loss(x0_tgt, _masked(_weights(weight, prior.abar, t, x0_tgt) * (eps_tgt - noise), mask))


def as_loss(x0, grad):
    """Scalar whose gradient with respect to x0 [B,C,H,W] is grad / B; its value is the mean of |grad|^2 / 2."""
    return 0.5 * (x0 - (x0 - grad).detach()).square().sum() / len(x0)


# ---- the coefficients ---------------------------------------------------------------------------------

def pds_coefficients(abar, t, s, kind="official"):
    """psi(t), chi(t), each [B]: the pull back to the source, the push along the noise difference.

    With mu = c_x0 x0_hat + c_xt x_t and x0_hat = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), all that is left
    of z_tgt - z_src when the shared noises have cancelled is psi (x0_tgt - x0_src) + chi (eps_tgt - eps_src),

        psi = (sqrt(abar_s) - c_x0 - c_xt sqrt(abar_t)) / sigma        chi = c_x0 sqrt(1 / abar_t - 1) / sigma

    Args:
        abar: [T] cumulative products of alpha.
        t, s: [B] timesteps, 0 <= s < t.
        kind: "official"   what the released code computes: the ONE-step beta_t paired with an x_s that lies two
                           steps back (500 of 1000 sampling steps). That mismatch is what makes psi > 0.
              "consistent" the posterior q(x_s | x_t, x0) of the same stride: psi is 0 at every stride, and PDS is
                           DDS with the weight chi(t) = sqrt(SNR_s / SNR_t - 1), SNR = abar / (1 - abar).
              (psi, chi)   two constants, or two tensors [B].
              callable     (abar, t, s) -> (psi, chi), for example `dreamcatalyst`.
    Returns:
        psi, chi: [B], in float32, or in float64 where abar is float64.
    Raises:
        ValueError: an unknown kind, or timesteps out of order or out of range.
    """
    t, s = torch.as_tensor(t, device=abar.device).reshape(-1), torch.as_tensor(s, device=abar.device).reshape(-1)
    if (s < 0).any() or (t <= s).any() or (t >= len(abar)).any():
        raise ValueError(f"need 0 <= s < t < {len(abar)}, got t = {t.tolist()}, s = {s.tolist()}")
    if isinstance(kind, str):
        c_x0, c_xt, sigma = posterior(abar, t, s, kind)
        abar_t, abar_s = abar.double()[t], abar.double()[s]
        psi = (abar_s.sqrt() - c_x0 - c_xt * abar_t.sqrt()) / sigma
        chi = c_x0 * (1 / abar_t - 1).sqrt() / sigma
        if kind == "consistent":
            psi = torch.zeros_like(psi)  # algebraically; what rounding leaves of it is no pull to the source
    else:
        psi, chi = kind(abar, t, s) if callable(kind) else kind
    dtype = torch.promote_types(abar.dtype, torch.float32)
    return tuple(torch.as_tensor(c, device=abar.device).to(dtype).expand(len(t)) for c in (psi, chi))


def posterior(abar, t, s, kind="official"):
    """c_x0, c_xt, sigma, each [B] in float64: q(x_s | x_t, x0) = N(c_x0 x0 + c_xt x_t, sigma^2 I).

    DDPM (arXiv 2006.11239), eq. 7. alpha is abar_t / abar_{t-1} for "official" (whatever s is), and
    abar_t / abar_s for "consistent", where it is the posterior of one step from t to s.
    """
    if kind not in ("official", "consistent"):
        raise ValueError(f'coefficients must be "official", "consistent", a pair or a callable, got {kind!r}')
    abar = abar.double()
    abar_t, abar_s = abar[t], abar[s]
    alpha = abar_t / abar[t - 1 if kind == "official" else s]
    c_x0 = abar_s.sqrt() * (1 - alpha) / (1 - abar_t)
    c_xt = alpha.sqrt() * (1 - abar_s) / (1 - abar_t)
    sigma = ((1 - abar_s) / (1 - abar_t) * (1 - alpha)).sqrt()
    return c_x0, c_xt, sigma


def dreamcatalyst(abar, t, s, delta=0.2, gamma=0.8, chi=0.075):
    """Free coefficients worked out once: the weighting of DreamCatalyst (Kim et al., arXiv 2407.11394).

    Identity weight chi e^tau, edit weight delta + gamma tau^(1/e). Both grow with the noise level, where the official
    psi falls by a factor of 400 from t = 20 to t = 980. tau is t / T in the paper; in the released code, and here, it
    is the share of the sampling steps below t, whose timesteps begin at 1: (t - 1) / T.
    """
    tau = (t.double() - 1) / len(abar)
    return chi * tau.exp(), delta + gamma * tau ** (1 / math.e)


def stochastic_latent(x_s, x_t, eps, abar, t, s, kind="official"):
    """z_t = (x_s - mu(x_t, y)) / sigma_t, the definition (paper, eq. 8; Wu and De la Torre, arXiv 2210.05559).

    Nothing above calls it: pds_loss is its closed form. With x_t and x_s of source and target made from the
    SAME two noises, stochastic_latent(target) - stochastic_latent(source) is the PDS gradient.

    Args:
        x_s, x_t: [B,C,H,W] the clean latent noised to the levels s and t, with independent noises.
        eps: [B,C,H,W] the network's noise prediction at x_t, t and the prompt.
        abar, t, s, kind: as in posterior.
    """
    c_x0, c_xt, sigma = (_rows(c, x_t) for c in posterior(abar, t, s, kind))
    abar_t = _rows(abar[t], x_t)
    x0_hat = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    mu = c_x0 * x0_hat + c_xt * x_t
    return (x_s - mu) / sigma


# ---- timesteps and noise ------------------------------------------------------------------------------

def sample_timesteps(batch, T, t_min=0.02, t_max=0.98, progress=None, generator=None):
    """[batch] int64 timesteps on the CPU between t_min T and t_max T, both included.

    Uniform by default; with progress in [0, 1] (share of the run that is done) the schedule that falls linearly
    from t_max to t_min. The paper uses 0.02..0.98, its SVG experiments 0.1..0.98.
    """
    if not 0 <= t_min <= t_max <= 1:
        raise ValueError(f"need 0 <= t_min <= t_max <= 1, got {t_min} and {t_max}")
    low, high = min(math.ceil(t_min * T), T - 1), min(math.floor(t_max * T), T - 1)
    if progress is not None:
        return torch.full((batch,), round(high + (low - high) * min(max(progress, 0.0), 1.0)))
    return torch.randint(low, max(low, high) + 1, (batch,), generator=generator)


def add_noise(x0, noise, abar, t):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, [B,C,H,W], a row of t for each row of x0."""
    abar_t = abar[t.to(abar.device)]
    return _rows(abar_t.sqrt(), x0) * x0 + _rows((1 - abar_t).sqrt(), x0) * noise


# ---- shared by the three ------------------------------------------------------------------------------

def _prepare(prior, x0_tgt, x0_src, t, noise, stride, generator):
    """Fill in t and noise, check shapes; the arithmetic is float32 (float64 stays), whatever the network uses."""
    if x0_tgt.shape != x0_src.shape or x0_tgt.ndim != 4:
        raise ValueError(f"x0_tgt and x0_src must both be [B,C,H,W], got {[*x0_tgt.shape]} and {[*x0_src.shape]}")
    batch, T = len(x0_tgt), len(prior.abar)
    if not isinstance(stride, int) or not 0 <= stride < T:
        raise ValueError(f"stride must be an integer in 1 .. {T - 1}, got {stride!r}")
    if t is None:
        t = sample_timesteps(batch, T, t_min=max(0.02, stride / T), generator=generator)
    if t.shape != (batch,) or (t < stride).any() or (t >= T).any():
        raise ValueError(f"t must be [{batch}] with values in {stride} .. {T - 1}, got {t.tolist()}")
    if noise is None:  # drawn on the generator's device, so that a seed means the same on every machine
        noise = torch.randn(x0_tgt.shape, generator=generator, device=generator.device if generator else "cpu")
    if noise.shape != x0_tgt.shape:
        raise ValueError(f"noise must have the shape {[*x0_tgt.shape]} of x0_tgt, got {[*noise.shape]}")
    device, dtype = x0_tgt.device, torch.promote_types(x0_tgt.dtype, torch.float32)
    return x0_tgt.to(dtype), x0_src.detach().to(device, dtype), t.to(device), noise.to(device, dtype)


@torch.no_grad()
def predict(prior, t, noise, *pairs):
    """The noise prediction [B,C,H,W] for each (x0, y), all in one network call, with the same t and noise."""
    x_t = torch.cat([add_noise(x0, noise, prior.abar, t) for x0, _ in pairs])
    y = _stack([y for _, y in pairs], len(t))
    return prior.eps(x_t, t.repeat(len(pairs)), y).to(x_t.dtype).chunk(len(pairs))


def _stack(prompts, batch):
    """Prompts as one batch [len(prompts) * B,...]; one row serves a whole batch. Tuples go part by part."""
    if isinstance(prompts[0], (tuple, list)):
        return tuple(_stack(parts, batch) for parts in zip(*prompts, strict=True))
    if any(y.shape[1:] != prompts[0].shape[1:] or len(y) not in (1, batch) for y in prompts):
        raise ValueError(f"prompts must be [{batch},...] or [1,...], got {[[*y.shape] for y in prompts]}")
    return torch.cat([y.expand(batch, *y.shape[1:]) for y in prompts])


def _weights(weight, abar, t, like):
    """A weight of SDS or DDS as [B,1,1,1] or [1,1,1,1]."""
    return _rows(weight(abar, t) if callable(weight) else torch.as_tensor(weight), like)


def _masked(push, mask):
    """push [B,C,H,W] times a mask [B,1,H,W] or [1,1,H,W]; None: the push."""
    if mask is None:
        return push
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != push.shape[2:] or len(mask) not in (1, len(push)):
        raise ValueError(f"mask must be [{len(push)},1,{push.shape[2]},{push.shape[3]}], got {[*mask.shape]}")
    return mask.to(push) * push


def _scaled(factor, rows):
    """rows [B,1,1,1] times a number or a tensor [B]."""
    return (_rows(factor, rows) if torch.is_tensor(factor) else factor) * rows


def _rows(c, like):
    """[B] -> [B,1,1,1] in the dtype and on the device of `like`."""
    return c.to(like.device, like.dtype).reshape(-1, 1, 1, 1)
