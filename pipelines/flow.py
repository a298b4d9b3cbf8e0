"""Flow matching models as priors for pds.py: Stable Diffusion 3.x, FLUX.1, or any network that predicts a velocity.

    class Mine(Flow):
        def velocity(self, x, sigma, y):         # x [B,C,h,w] = (1 - sigma) x0 + sigma eps, sigma [B]
            return network(x, sigma, y)          # -> eps - x0
    prior = Mine(sigmas_of(shift=3.0))
    loss = pds_loss(prior, x0_tgt, x0_src, y_tgt, y_src)

A flow mixes picture and noise on a straight line, x_sigma = (1 - sigma) x0 + sigma eps; a diffusion model preserves
the variance, x_t = sqrt(abar) x0 + sqrt(1 - abar) eps. The two differ by a factor: with
n = sqrt((1 - sigma)^2 + sigma^2), x_t = x_sigma / n at abar = (1 - sigma)^2 / n^2. Given the velocity v = eps - x0, the
noise prediction is x_sigma + (1 - sigma) v. Therefore everything that needs only abar and eps works on a flow as it is:
the losses, their coefficients, SDEdit, DDPM inversion, masks. A DDIM step becomes the flow's own Euler step.
"""
import torch


class Flow:
    """A prior from `velocity(x_sigma, sigma, y)`, which a subclass defines.

    Attributes:
        sigmas: [T] float64 on the CPU, ascending; abar: [T] float64, falling.
    """

    def __init__(self, sigmas):
        """sigmas: [T] in (0, 1), ascending; at 1, pure noise, a velocity does not determine the noise."""
        self.sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        ends = [0.0, *self.sigmas.flatten().tolist(), 1.0]
        if not all(a < b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError("sigmas must rise from above 0 to below 1")
        self.abar = (1 - self.sigmas) ** 2 / ((1 - self.sigmas) ** 2 + self.sigmas ** 2)

    def eps(self, x_t, t, y, **options):
        """Noise prediction for x_t [B,C,h,w] at timesteps t [B], in the dtype of x_t; `options` go to velocity."""
        sigma = self.sigmas[t.cpu()]
        n, rest = (c.to(x_t.device, x_t.dtype).reshape(-1, 1, 1, 1) for c in ((1 - sigma).hypot(sigma), 1 - sigma))
        x = n * x_t
        return x + rest * self.velocity(x, sigma.to(x.device, x.dtype), y, **options)


def sigmas_of(T=1000, shift=1.0):
    """[T - 1] float64: the noise levels 1/T .. (T-1)/T, shifted to shift sigma / (1 + (shift - 1) sigma).

    A shift divides every SNR = ((1 - sigma) / sigma)^2 by shift^2 and preserves their ratios (Esser et al.,
    arXiv 2403.03206, section 5.3.2).
    """
    sigma = torch.arange(1, T, dtype=torch.float64) / T
    return shift * sigma / (1 + (shift - 1) * sigma)
