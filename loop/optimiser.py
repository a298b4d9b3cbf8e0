"""Steady steps: Adam with one step size for a whole parameter, and displacements that are smooth in the plane.

    field = SmoothField(rest, sigma=6.0)                 # rest [N,2]: where the control points lie in the picture
    adam = SteadyAdam([{"params": [points], "lr": 0.08, "name": "points", "shared": True},
                       {"params": [colours], "lr": 0.01, "name": "colours", "shared": True}],
                      fields={"points": field})

Adam divides every number by the size of its own gradient, so that what no gradient means drifts as fast as what all of
them mean: outlines tear, hubs of wheels change colour. Both options are those of Nicolet et al., "Large Steps in Inverse
Rendering of Geometry" (2021): a smooth preconditioner, there of the mesh's Laplacian, here of a kernel in the picture,
and a second moment that is shared ("uniform Adam").
"""
import math

import torch


class SmoothField:
    """The map from free to smooth displacements of N points: M = (1 - share) I + share K, applied in the picture.

    K is row-normalised, K_ij ~ sum_g B(x_i - g) B(x_j - g), with the cubic B-spline B over the nodes g of a grid: close
    to a Gaussian of deviation sigma, in 16 N operations and without an N x N matrix. All shapes share one field, so that
    what lies together moves together; translations pass unchanged.
    """

    def __init__(self, rest, sigma, share=1.0, frames=None):
        """rest [N,2], N > 0, positions in the picture in pixels; sigma in pixels; frames [N,2,2]: what takes a displacement in
        a point's own coordinates to the picture, None: the identity."""
        # a B-spline has the variance h^2 / 3 in steps h of the grid, and two of them follow each other
        step = sigma * math.sqrt(1.5)
        cell = (rest - rest.amin(0)) / step
        low = cell.floor()
        t = (cell - low)[..., None]
        spline = torch.cat(((1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3), 2) / 6
        node = low.long()[..., None] + torch.arange(4, device=rest.device)  # [N,2,4]
        across = int(node[:, 1].max()) + 1
        self.index = (node[:, 0, :, None] * across + node[:, 1, None, :]).flatten(1)  # [N,16]
        self.weight = (spline[:, 0, :, None] * spline[:, 1, None, :]).flatten(1)
        self.nodes = int(self.index.max()) + 1
        self.share, self.frames = share, frames
        self.inverse = None if frames is None else torch.linalg.inv(frames)
        self.total = self._blur(rest.new_ones(len(rest), 1))

    def _blur(self, x):
        """[N,D] at the points -> nodes -> points: a symmetric matrix."""
        spread = (self.weight[..., None] * x[:, None]).flatten(0, 1)
        nodes = x.new_zeros(self.nodes, x.shape[1]).index_add_(0, self.index.flatten(), spread)
        return (self.weight[..., None] * nodes[self.index]).sum(1)

    def __call__(self, free):
        """Displacements in the picture [N,2] -> smooth ones in the points' own coordinates [N,2]; without frames any
        quantity [N] or [N,D] of the points."""
        smooth = free.view(len(free), -1)
        smooth = (1 - self.share) * smooth + self.share * self._blur(smooth) / self.total
        if self.inverse is not None:
            smooth = (self.inverse @ smooth[..., None])[..., 0]
        return smooth.view_as(free)

    def transpose(self, grad):
        """The gradient by the points' own coordinates [N,2] -> that by the free displacements [N,2]; or as above."""
        own = grad.view(len(grad), -1)
        if self.inverse is not None:
            own = (self.inverse.mT @ own[..., None])[..., 0]
        return ((1 - self.share) * own + self.share * self._blur(own / self.total)).view_as(grad)


class SteadyAdam(torch.optim.Adam):
    """Adam whose groups may share one second moment (`shared`: True), and move through the field of their `name`.

    The displacement of a group with a field is M times Adam's step on the free displacements u, from the gradient by u:
    points = rest + M u without ever storing u, so that M may change from step to step. All other groups take the very
    steps of torch.optim.Adam; with a `decay` those of torch.optim.AdamW with that weight decay.
    """

    def __init__(self, groups, fields=None):
        """groups: as of torch.optim.Adam, each with one parameter; fields: {name of a group: SmoothField}."""
        super().__init__([{"shared": False, "decay": 0.0} | group for group in groups])
        self.fields = fields or {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"] if group["decay"] else ():
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["decay"])
            field = self.fields.get(group.get("name"))
            if group["shared"] or field is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group, field)
                        parameter.grad = None
        return super().step(closure)

    def _move(self, parameter, group, field):
        grad = parameter.grad if field is None else field.transpose(parameter.grad)
        square = grad.square().mean() if group["shared"] else grad.square()
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(square))
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(square, 1 - beta2)
        mean = state["exp_avg"] / (1 - beta1 ** state["step"].item())
        deviation = (state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())).sqrt()
        move = mean / (deviation + group["eps"])
        parameter -= group["lr"] * (move if field is None else field(move))


def settling_share(step, steps, group):
    """Share of a group's rate at a step of `steps`: a start of group["start"] of them, else 10, as Adam's first ones know
    little, and down to 0 in the second half, which averages the noise."""
    return min(1.0, (step + 1) / group.get("start", 10), 2 - 2 * step / steps)


def released_share(step, steps, group):
    """The same as in the paper's code, which has nerfstudio's ExponentialDecayScheduler.

    group["warm"]: so many steps (at most a fifteenth of all) the rate rises along a sine. group["fall"]: (ratio, over):
    then it falls exponentially, to `ratio` after `over` steps. A group without them has a constant rate.
    """
    warm, (ratio, over) = min(group.get("warm", 0), steps / 15), group.get("fall", (1.0, 1))
    if step < warm:
        return math.sin(math.pi / 2 * step / warm)
    return ratio ** min((step - warm) / over, 1)
