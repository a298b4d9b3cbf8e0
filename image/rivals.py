"""Two losses from 2025 that also preserve the source, with the signature of those in pds.py: IDS and SSD.

    loss = ids_loss(prior, x0_tgt, x0_src, y_tgt, y_src)       # Kim et al., CVPR 2025, arXiv 2502.19930
    loss = ssd_loss(prior, x0_tgt, x0_src, y_tgt, y_src)       # Zhu et al., ICCV 2025, arXiv 2507.09168

Both are written from the papers' formulas, with the constants of their released code (shhh0620/IDS, Alex-Zhu1/SSD).
`prior` is a Prior of prior.py: ids_loss differentiates its `eps`, ssd_loss also calls `at` and `unconditional`.
"""
import torch

from pds import _masked, _prepare, _rows, _stack, add_noise, as_loss, predict


def ids_loss(prior, x0_tgt, x0_src, y_tgt, y_src, t=None, noise=None, rounds=3, step=1.0, mask=None, generator=None):
    """Identity-preserving Distillation Sampling: DDS with a noise from which the source is predicted as it is.

    The noised source x_t takes `rounds` steps x_t -= step grad |x0_src - x0_hat(x_t, y_src)| (their eq. 6 and 7), and
    the noise that both branches share is read off it (eq. 8). No gradient reaches prior or x0_src. Arguments and value
    as in pds.dds_loss; step: lambda in the paper.
    """
    x0_tgt, x0_src, t, noise = _prepare(prior, x0_tgt, x0_src, t, noise, 0, generator)
    abar_t, y = _rows(prior.abar[t.to(prior.abar.device)], x0_src), _stack([y_src], len(t))
    x_t = add_noise(x0_src, noise, prior.abar, t)
    for _ in range(rounds):
        with torch.enable_grad():
            x_t.requires_grad_()
            x0_hat = (x_t - (1 - abar_t).sqrt() * prior.eps(x_t, t, y)) / abar_t.sqrt()
            distance = (x0_src - x0_hat).flatten(1).norm(dim=1).sum()  # the gradient of a row is that of its own norm
            x_t = (x_t - step * torch.autograd.grad(distance, x_t)[0]).detach()
    noise = (x_t - abar_t.sqrt() * x0_src) / (1 - abar_t).sqrt()
    eps_tgt, eps_src = predict(prior, t, noise, (x0_tgt, y_tgt), (x0_src, y_src))
    return as_loss(x0_tgt, _masked(eps_tgt - eps_src, mask))


def ssd_loss(prior, x0_tgt, x0_src, y_tgt, y_src, t=None, noise=None, stable=2.0, enhance=11 / 15, pull=0.075,
             mask=None, generator=None):
    """Stable Score Distillation: four unguided predictions, with x_t and xs_t the noised target and source,

        stable / 2 (eps(x_t, y_src) - eps(xs_t, "")) + pull e^tau (x_t - xs_t)
            + guidance (1/2 (eps(x_t, y_tgt) - eps(x_t, y_src)) + enhance (eps(x_t, y_tgt) - eps(x_t, "")))

    The first term steadies, the second is DreamCatalyst's pull to the source, with its tau (see pds.dreamcatalyst), the
    third edits, the last strengthens the target prompt. guidance: that of the prior, here the weight of what edits; at
    the released 7.5 the last term weighs 5.5. Arguments and value as in pds.dds_loss; a mask leaves the pull alone.
    """
    x0_tgt, x0_src, t, noise = _prepare(prior, x0_tgt, x0_src, t, noise, 0, generator)
    null = prior.unconditional()
    to_tgt, to_src, to_null, src_null = predict(prior.at(1.0), t, noise, (x0_tgt, y_tgt), (x0_tgt, y_src),
                                                (x0_tgt, null), (x0_src, null))
    push = stable / 2 * (to_src - src_null) + prior.guidance * ((to_tgt - to_src) / 2 + enhance * (to_tgt - to_null))
    away = add_noise(x0_tgt, noise, prior.abar, t) - add_noise(x0_src, noise, prior.abar, t)
    tau = (t.double() - 1) / len(prior.abar)
    return as_loss(x0_tgt, _masked(push, mask) + (pull * _rows(tau.exp(), x0_tgt) * away).detach())
