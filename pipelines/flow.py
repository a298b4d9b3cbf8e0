"""Models of flow matching as what pds.py takes: Stable Diffusion 3.x and FLUX.1, or anything with a velocity.

    class Mine(Flow):
        def velocity(self, x, sigma, y):         # x [B,C,h,w] = (1 - sigma) x0 + sigma eps, sigma [B]
            return network(x, sigma, y)          # -> eps - x0
    prior = Mine(sigmas_of(shift=3.0))
    loss = pds_loss(prior, x0_tgt, x0_src, y_tgt, y_src)

A flow mixes picture and noise on a straight line, x_sigma = (1 - sigma) x0 + sigma eps, a diffusion model so that the
variance is kept, x_t = sqrt(abar) x0 + sqrt(1 - abar) eps. Both are the same up to a factor: with
n = sqrt((1 - sigma)^2 + sigma^2), x_t = x_sigma / n at abar = (1 - sigma)^2 / n^2. And with the velocity v = eps - x0
the prediction of the noise is x_sigma + (1 - sigma) v. So everything that asks for abar and eps works on a flow
unchanged: the losses, their coefficients, SDEdit, DDPM inversion, masks. A DDIM step is then the flow's own Euler step.
"""
import torch


class Flow:
    """A prior out of `velocity(x_sigma, sigma, y)`, which a subclass brings.

    Attributes:
        sigmas: [T] float64 on the CPU, ascending; abar: [T] float64, falling.
    """

    def __init__(self, sigmas):
        """sigmas: [T] between 0 and 1, both excluded: in pure noise a velocity says nothing about the noise."""
        self.sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        ends = [0.0, *self.sigmas.flatten().tolist(), 1.0]
        if not all(a < b for a, b in zip(ends, ends[1:])):
            raise ValueError("sigmas must rise from above 0 to below 1")
        self.abar = (1 - self.sigmas) ** 2 / ((1 - self.sigmas) ** 2 + self.sigmas ** 2)

    def eps(self, x_t, t, y, **options):
        """The noise in x_t [B,C,h,w] at the timesteps t [B], in the number format of x_t; options go to velocity."""
        sigma = self.sigmas[t.cpu()]
        n, rest = (c.to(x_t.device, x_t.dtype).reshape(-1, 1, 1, 1) for c in ((1 - sigma).hypot(sigma), 1 - sigma))
        x = n * x_t
        return x + rest * self.velocity(x, sigma.to(x.device, x.dtype), y, **options)


def sigmas_of(T=1000, shift=1.0):
    """[T - 1] float64: the noise levels 1/T .. (T-1)/T, shifted to shift sigma / (1 + (shift - 1) sigma).

    A shift divides every SNR = ((1 - sigma) / sigma)^2 by shift^2, and leaves the ratio of two of them as it is
    (Esser et al., arXiv 2403.03206, section 5.3.2).
    """
    sigma = torch.arange(1, T, dtype=torch.float64) / T
    return shift * sigma / (1 + (shift - 1) * sigma)
