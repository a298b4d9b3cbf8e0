"""Steady steps: Adam with one step size for a whole parameter, and displacements that are smooth in the plane.

    field = SmoothField(rest, sigma=6.0)                 # rest [N,2]: where the control points lie in the picture
    adam = SteadyAdam([{"params": [points], "lr": 0.08, "name": "points", "shared": True},
                       {"params": [colours], "lr": 0.01, "name": "colours", "shared": True}],
                      fields={"points": field})

Adam divides every number by the magnitude of its own gradient, so that noise moves a parameter as far as a consistent
gradient does: outlines tear, hubs of wheels change colour. Both options are from Nicolet et al., "Large Steps in
Inverse Rendering of Geometry" (2021): a smooth preconditioner, there the mesh's Laplacian, here a kernel in the
picture, and a shared second moment ("uniform Adam").
"""
import math

import torch


class SmoothField:
    """The map K from free to smooth displacements of N points, applied in the picture or in space.

    K is row-normalised, K_ij ~ sum_g B(x_i - g) B(x_j - g), where B is the cubic B-spline over the nodes g of a grid: a
    close approximation of a Gaussian of deviation sigma in 16 N operations (64 N in space), without an N x N matrix.
    All shapes share one field, so that neighbouring points move together; translations pass unchanged. Other quantities
    of the points, such as colours, pass through the same kernel.
    """
    FLOATS = 2 ** 26  # the most that a chunk of points spreads to the nodes at once

    def __init__(self, rest, sigma, frames=None):
        """
        Args:
            rest: [N,2] or [N,3], N > 0, positions in pixels of the picture or in units of the scene, as is sigma.
            frames: [N,2,2], maps of displacements from each point's coordinates to the picture; None: the identity.
        """
        # a B-spline over a grid of step h has the variance h^2 / 3, and K applies it twice
        step = sigma * math.sqrt(1.5)
        cell = (rest - rest.amin(0)) / step
        low = cell.floor()
        t = (cell - low)[..., None]
        spline = torch.cat(((1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3),
                           2) / 6
        node = low.long()[..., None] + torch.arange(4, device=rest.device)  # [N,D,4]
        index, self.weight = node[:, 0], spline[:, 0]
        for axis in range(1, rest.shape[1]):  # [N,4^D]
            across = int(node[:, axis].max()) + 1
            index = (index[:, :, None] * across + node[:, axis, None, :]).flatten(1)
            self.weight = (self.weight[:, :, None] * spline[:, axis, None, :]).flatten(1)
        used, self.index = torch.unique(index, return_inverse=True)  # in space most nodes have no point near them
        self.nodes = len(used)
        self.frames = frames
        self.inverse = None if frames is None else torch.linalg.inv(frames)
        self.total = self._blur(rest.new_ones(len(rest), 1))

    def _blur(self, x):
        """[N,D] from the points to the nodes and back: a symmetric matrix."""
        nodes, rows = x.new_zeros(self.nodes, x.shape[1]), max(1, self.FLOATS // self.index.shape[1] // x.shape[1])
        chunks = [slice(start, start + rows) for start in range(0, len(x), rows)]
        for some in chunks:
            spread = (self.weight[some, :, None] * x[some, None]).flatten(0, 1)
            nodes.index_add_(0, self.index[some].flatten(), spread)
        return torch.cat([(self.weight[some, :, None] * nodes[self.index[some]]).sum(1) for some in chunks])

    def __call__(self, free):
        """Displacements in the picture [N,2] -> smooth ones in the points' own coordinates [N,2]; without frames, any
        quantity [N] or [N,D] of the points."""
        smooth = self._blur(free.view(len(free), -1)) / self.total
        if self.inverse is not None:
            smooth = (self.inverse @ smooth[..., None])[..., 0]
        return smooth.view_as(free)

    def transpose(self, grad):
        """The gradient with respect to the points [N,2] -> with respect to the free displacements; shapes as above."""
        own = grad.view(len(grad), -1)
        if self.inverse is not None:
            own = (self.inverse.mT @ own[..., None])[..., 0]
        return self._blur(own / self.total).view_as(grad)


class FieldOfSome:
    """A SmoothField of the points that are `on`, [N] bool; the others stay where they are.

    share: of the points that are on, over which SteadyAdam's shared second moment is a mean.
    """

    def __init__(self, rest, sigma, on):
        self.field, self.on, self.share = SmoothField(rest[on], sigma), on, on.float().mean().item()

    def __call__(self, free):
        """SmoothField.__call__ of those that are on, 0 elsewhere; so is transpose."""
        return torch.zeros_like(free).masked_scatter(self._like(free), self.field(free[self.on]))

    def transpose(self, grad):
        return torch.zeros_like(grad).masked_scatter(self._like(grad), self.field.transpose(grad[self.on]))

    def _like(self, x):
        return self.on.view(-1, *[1] * (x.ndim - 1)).expand_as(x)


class SteadyAdam(torch.optim.Adam):
    """Adam whose groups may share one second moment (`shared`: True) and move through the field of their `name`.

    A group with a field moves by K times Adam's step on the free displacements u, where points = rest + K u; u is never
    stored, so K may change from step to step. All other groups take exactly the steps of torch.optim.Adam; with a
    `decay`, those of torch.optim.AdamW with that weight decay. A `spring` is a weight decay towards the initial values:
    after each step it takes back that share, times the group's `share` of its rate and the `firmness` of the row, of
    every displacement. This damps noise, while a consistent gradient still moves a shape. What is `sparse` goes back by
    that share of the rate after each step, row by row, up to its initial values: the proximal step of a group lasso on
    the displacements (Yuan and Lin 2006). Rows with a weak push, such as the colours of most shapes, stay exactly where
    they were. A row extends over all dimensions but the first, or over those in `across`. The `details` of a drawing
    follow in colour what they lie on before colours go back; at the end what has `forms` goes back to these by their
    share of the rate.
    """

    def __init__(self, groups, fields=None, forms=None, details=None, firmness=None):
        """
        Args:
            groups: as for torch.optim.Adam, each with one parameter.
            fields: {name of a group: SmoothField}.
            forms: {name of a group: a list of pairs of an object with shrink_(parameter, by), such as svg.forms.Forms
                or svg.symmetry.Outlines, and its share of the rate}.
            details: an object with colours() and carry_(colours before the step), such as svg.details.Details.
            firmness: {name of a group: factors on its spring, which broadcast to the parameter}; their product with
                the spring counts as at most 1.
        """
        usual = {"shared": False, "decay": 0.0, "spring": 0.0, "sparse": 0.0, "share": 1.0, "across": None}
        super().__init__([usual | group for group in groups])
        self.fields, self.forms, self.details, self.firmness = fields or {}, forms or {}, details, firmness or {}
        self.rest = [[p.detach().clone() for p in group["params"]] if group["spring"] or group["sparse"] else []
                     for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        before = self.details and self.details.colours()
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
        loss = super().step(closure)
        if self.details:
            self.details.carry_(before)
        for group, rests in zip(self.param_groups, self.rest, strict=True):
            for parameter, rest in zip(group["params"], rests, strict=False):
                spring = group["spring"] * group["share"] * self.firmness.get(group.get("name"), 1)
                parameter.lerp_(rest, spring.clamp_max(1) if torch.is_tensor(spring) else spring)
                if group["sparse"]:
                    moved, across = parameter - rest, group["across"] or tuple(range(1, rest.ndim))
                    kept = 1 - group["sparse"] * group["lr"] / moved.norm(dim=across, keepdim=True).clamp_min(1e-12)
                    parameter.copy_(rest + moved * kept.clamp_min(0))
            for held, share in self.forms.get(group.get("name"), ()):
                for parameter in group["params"]:
                    held.shrink_(parameter, share * group["lr"])
        return loss

    def _move(self, parameter, group, field):
        grad = parameter.grad if field is None else field.transpose(parameter.grad)
        square = grad.square()
        if group["shared"]:
            square = square.mean() / getattr(field, "share", 1)
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
    """Factor of a group's rate at a step of `steps`.

    It rises over group["start"] steps (default 10), while Adam's moments are unreliable, and falls to 0 over the second
    half, which averages the noise.
    """
    return min(1.0, (step + 1) / group.get("start", 10), 2 - 2 * step / steps)


def released_share(step, steps, group):
    """The same as in the paper's code, which uses nerfstudio's ExponentialDecayScheduler.

    group["warm"]: steps (at most a fifteenth of all) over which the rate rises along a sine. group["fall"]: (ratio,
    over): the rate then decays exponentially, to `ratio` after `over` steps. Without them the rate is constant.
    """
    warm, (ratio, over) = min(group.get("warm", 0), steps / 15), group.get("fall", (1.0, 1))
    if step < warm:
        return math.sin(math.pi / 2 * step / warm)
    return ratio ** min((step - warm) / over, 1)
