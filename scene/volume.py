"""Volume rendering of samples that are packed ray after ray, however many each ray has.

    weights = volume_weights(sigma * dt, ray, count)         # [N], of the samples of `count` rays
    rgb = sums(colours * weights, ray, count)                # [3,count]
"""
from typing import NamedTuple

import torch


class Samples(NamedTuple):
    """Samples of R rays, packed ray after ray.

    x: [3,N] in [0,1]. t: [N], distance along the ray. ray: [N], its number. features: [2L,N] of the grid, or None.
    marched: number of samples that were looked up, including those that were dropped.
    """
    x: torch.Tensor
    t: torch.Tensor
    ray: torch.Tensor
    features: torch.Tensor = None
    marched: int = 0


def volume_weights(tau, ray, count):
    """Weights [N] = T (1 - exp(-tau)) with the transmittance T = exp(-sum of earlier tau on the ray).

    tau [N] = sigma dt; ray [N]: ascending numbers below `count`. One sum in float64 runs over all rays: in float32 the
    differences of the long sum would be wrong in the second digit.
    """
    return torch.exp(-_sum_before(tau, ray, count)).to(tau.dtype) * -torch.expm1(-tau)


def distortion(weights, s, ds, ray, count):
    """Mean over rays of sum_ij w_i w_j |s_i - s_j| + sum_i w_i^2 ds / 3 (mip-NeRF 360, eq. 15), packed.

    It concentrates the weights of a ray: fewer floaters, fewer samples to evaluate. s [N] ascends along a ray, so the
    double sum needs only sums over earlier samples.
    """
    before, before_s = _sum_before(weights, ray, count), _sum_before(weights * s, ray, count)
    pairs, own = 2 * (weights * (s * before - before_s)).sum(), (weights * weights).sum() * ds / 3
    return (pairs + own).to(s.dtype) / count


def sums(values, ray, count):
    """[C,N] -> [C,count], sums over the samples of each ray."""
    index = ray + count * torch.arange(len(values), device=ray.device)[:, None]
    total = values.new_zeros(len(values) * count).index_add(0, index.view(-1), values.reshape(-1))
    return total.view(len(values), count)


def _sum_before(values, ray, count):
    """[N] -> [N] float64, sums of the earlier values on the same ray."""
    length = torch.bincount(ray, minlength=count)
    first = (length.cumsum(0) - length).index_select(0, ray)
    values = values.double()
    before = values.cumsum(0) - values
    return before - before.index_select(0, first)
