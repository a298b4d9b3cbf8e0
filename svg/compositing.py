"""Paint and compositing: layers blended back to front by a program of operations, with a hand-written backward.

Colours are blended in sRGB without linearization, as browsers do. Boxes are (x0, y0, x1, y1) in pixels by default.
"""
from dataclasses import dataclass

import torch

from svg.filters import blended
from svg.segments import take

MANY_STOPS = 16                       # of a gradient; with more, each pixel looks up the two that surround it

def gradient_paint(matrix, gradient, offsets, rgba, box):
    """Colours [4, height, width] of a gradient over a box of pixels; alpha is not premultiplied.

    matrix [3, 3]: pixels -> gradient coordinates; offsets [K], rgba [K, 4]; box (x0, y0, width, height).
    """
    x = torch.arange(box[2], device=matrix.device, dtype=matrix.dtype) + (box[0] + 0.5)
    y = torch.arange(box[3], device=matrix.device, dtype=matrix.dtype)[:, None] + (box[1] + 0.5)
    u = matrix[0, 0] * x + (matrix[0, 1] * y + matrix[0, 2])
    if gradient.focus is None:
        t = u
    else:                                 # the circle through (u, v) of radius t around focus * (1 - t)
        v = matrix[1, 0] * x + (matrix[1, 1] * y + matrix[1, 2])
        fx, fy = gradient.focus
        u, v, a = u - fx, v - fy, 1 - fx * fx - fy * fy
        along = u * fx + v * fy
        t = (along + (along.square() + a * (u * u + v * v)).clamp_min(1e-12).sqrt()) / a
    if gradient.spread == "repeat":
        t = t - t.detach().floor()
    elif gradient.spread == "reflect":
        t = (t - 2 * (t.detach() / 2).round()).abs()
    if len(offsets) > MANY_STOPS:
        t = t.reshape(-1)
        last = torch.searchsorted(offsets.detach(), t.detach().contiguous(), right=True).clamp(1, len(offsets) - 1)
        start, colour = take(offsets, last - 1), take(rgba, last - 1)
        through = ((t - start) / (take(offsets, last) - start).clamp_min(1e-6)).clamp(0, 1)[:, None]
        return torch.lerp(colour, take(rgba, last), through).T.reshape(4, box[3], box[2])
    # piecewise linear: each interval adds its colour difference times the share of it that lies below t
    through = ((t.reshape(1, -1) - offsets[:-1, None]) / offsets.diff().clamp_min(1e-6)[:, None]).clamp(0, 1)
    return (rgba[:1].T + rgba.diff(dim=0).T @ through).view(4, box[3], box[2])


EMPTY = (0, 0, 0, 0)


def common(a, b):
    """The common part of two boxes."""
    x0, y0, x1, y1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else EMPTY


def united(a, b):
    """The box around two boxes."""
    if EMPTY in (a, b):
        return b if a == EMPTY else a
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def overlap(inner, outer):
    """Slices of the common part of two boxes, into each of them; None if they do not overlap."""
    x0, y0 = max(inner[0], outer[0]), max(inner[1], outer[1])
    x1, y1 = min(inner[2], outer[2]), min(inner[3], outer[3])
    if x0 >= x1 or y0 >= y1:
        return None
    whole = (x0, y0, x1, y1) == inner
    return [... if whole and b is inner else (..., slice(y0 - b[1], y1 - b[1]), slice(x0 - b[0], x1 - b[0]))
            for b in (inner, outer)]


@dataclass
class Plan:
    """The program of Composite; see svg.document.Document for the operations."""
    size: int
    ops: list                             # [(name, argument)]
    op_boxes: list                        # the box that each operation draws, pushes or pops
    opener: dict                          # step that removes a buffer -> step of its push
    boxes: list                           # of the layers
    paint: dict                           # layer -> number of its gradient paint
    keep: bool                            # whether to keep what the backward pass needs
    filters: list                         # functions of a picture [4, h, w] of the op's box
    shown: dict                           # step of a filter -> the part of its box that is drawn

    def parts(self, cells):
        """A flat buffer, laid out as the coverage, split by layer."""
        return cells.split([(x1 - x0 + 1) * (y1 - y0) for x0, y0, x1, y1 in self.boxes])

    def crops(self, step, frame):
        """Slices of what an operation draws into a buffer of the box `frame`: in its own buffer, and in that one."""
        if step not in self.shown:
            return overlap(self.op_boxes[step], frame)
        box = self.shown[step]
        crops = overlap(box, frame)
        if crops is None:
            return None
        return overlap(common(box, frame), self.op_boxes[step])[1], crops[1]

    def over(self, op, argument, top, inner, back, opacities):
        """`back` under the crop `inner` of a buffer that is filtered, or blended by a mode."""
        if op == "filter":
            return blended("normal", back, self.filters[argument](top)[inner])
        opacity, mode = argument
        return blended(mode, back, top[inner] if opacity is None else top[inner] * opacities[opacity])

    def views(self, parts):
        """[h, w] of every layer, without padding."""
        return [part.view(y1 - y0, x1 - x0 + 1)[:, :-1]
                for part, (x0, y0, x1, y1) in zip(parts, self.boxes, strict=True)]


class Composite(torch.autograd.Function):
    """Layers blended back to front on white, each on the crop of its box; keeps the crops' backdrops alone.

    forward(plan, coverage [cells], rgba [L, 4], opacities [O], *paints [4, h, w]) -> image [3, size, size].
    Buffers hold premultiplied colours; the canvas is opaque and stores no alpha.
    """

    @staticmethod
    def tables(plan, coverage, rgba):
        """For each layer alpha as a number and coverage times alpha [h, w]; {channels: solid colours [C, 1, 1]}."""
        alphas = rgba[:, 3].tolist()
        areas = plan.views([part * alpha for part, alpha in
                                                          zip(plan.parts(coverage), alphas, strict=True)])
        opaque = torch.cat([rgba[:, :3], torch.ones_like(rgba[:, 3:])], 1)[:, :, None, None]
        return alphas, areas, {3: opaque[:, :3].unbind(0), 4: opaque.unbind(0), 1: opaque[:, 3:].unbind(0)}

    @staticmethod
    def source(paint, area, channels):
        """Colour [channels, h, w] and alpha [h, w] of a gradient paint [4, h, w] over an area [h, w]."""
        colour = torch.cat([paint[:3], torch.ones_like(paint[3:])])
        return colour[3:] if channels == 1 else colour[:channels], area * paint[3]

    @staticmethod
    def forward(ctx, plan, coverage, rgba, opacities, *paints):
        canvas, saved = coverage.new_ones(3, plan.size, plan.size), []
        _, areas, colours = Composite.tables(plan, coverage, rgba)
        stack = [(canvas, (0, 0, plan.size, plan.size))]
        for step, ((op, argument), box) in enumerate(zip(plan.ops, plan.op_boxes, strict=True)):
            if op == "push":
                stack.append((coverage.new_zeros(argument, box[3] - box[1], box[2] - box[0]), box))
                continue
            top = stack.pop()[0] if op != "draw" else None
            target, frame = stack[-1]
            if (crops := plan.crops(step, frame)) is None:
                continue
            inner, outer = crops
            back = target[outer]
            if plan.keep:
                saved.append(back.clone())
            if op == "draw":
                colour, area = colours[len(target)][argument], areas[argument][inner]
                if argument in plan.paint:
                    colour, area = Composite.source(paints[plan.paint[argument]][inner], area, len(target))
                back.lerp_(colour, area)
            elif op == "mask":            # both buffers have the same box
                top = top if argument is None else (top * top.new_tensor(argument)[:, None, None]).sum(0, keepdim=True)
                saved.append(top)
                back.mul_(top)
            elif op in ("blend", "filter"):
                saved.append(top)
                back.copy_(plan.over(op, argument, top, inner, back, opacities))
            else:
                saved.append(top[inner])
                top = top[inner] if argument is None else top[inner] * opacities[argument]
                back.mul_(1 - top[-1:]).add_(top[:len(target)])
        saved = saved if plan.keep else []
        ctx.plan, ctx.paints = plan, len(paints)
        ctx.save_for_backward(coverage, rgba, opacities, *paints, *saved)
        return canvas

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plan, (coverage, rgba, opacities, *rest) = ctx.plan, ctx.saved_tensors
        paints, saved = rest[:ctx.paints], rest[ctx.paints:]
        alphas, areas, colours = Composite.tables(plan, coverage, rgba)
        d_cells, d_opacities = torch.zeros_like(coverage), torch.zeros_like(opacities)
        d_areas, d_paints = plan.views(plan.parts(d_cells)), [torch.zeros_like(p) for p in paints]
        d_colours = [grad.new_zeros(3)] * len(rgba)
        stack = [(grad.clone(), (0, 0, plan.size, plan.size))]
        for step in reversed(range(len(plan.ops))):
            (op, argument), box = plan.ops[step], plan.op_boxes[step]
            if op == "push":
                stack.pop()
                continue
            target, frame = stack[-1]
            crops = plan.crops(step, frame)
            if op != "draw":
                channels = plan.ops[plan.opener[step]][1]
                stack.append((grad.new_zeros(channels, box[3] - box[1], box[2] - box[0]), box))
            if crops is None:
                continue
            inner, outer = crops
            g, top = target[outer], None if op == "draw" else saved.pop()
            back = saved.pop()
            if op == "mask":
                d_top = (g * back).sum(0, keepdim=True)
                stack[-1][0].copy_(d_top if argument is None else d_top * g.new_tensor(argument)[:, None, None])
                g.mul_(top)
            elif op in ("blend", "filter"):
                with torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in (top, back, opacities)]
                    result = plan.over(op, argument, inputs[0], inner, *inputs[1:])
                d_top, d_back, d_opacity = torch.autograd.grad(result, inputs, g, allow_unused=True)
                g.copy_(d_back)
                if d_top is not None:     # what is filtered may be replaced by a flood
                    stack[-1][0].copy_(d_top)
                if d_opacity is not None:
                    d_opacities += d_opacity
            elif op == "pop":
                opacity = 1.0 if argument is None else opacities[argument]
                d_top = torch.zeros_like(top)
                d_top[:len(g)] = g
                d_top[-1] -= (g * back).sum(0)
                g.mul_(1 - top[-1:] * opacity)
                if argument is not None:
                    d_opacities[argument] += (d_top * top).sum()
                stack[-1][0][inner] = d_top * opacity
            elif argument in plan.paint:
                paint, d_paint = (p[plan.paint[argument]][inner] for p in (paints, d_paints))
                painted_backward(g, back, paint, areas[argument][inner], d_paint, d_areas[argument][inner])
            else:
                through = lerp_backward(g, back, colours[len(g)][argument], areas[argument][inner],
                                        d_areas[argument][inner])
                if len(g) > 1:
                    d_colours[argument] = through[:3].sum((1, 2))
        if not plan.boxes:                # all that is drawn is a filter's flood
            return None, d_cells, torch.zeros_like(rgba), d_opacities
        d_alpha = torch.stack([part.sum() for part in plan.parts(d_cells * coverage)])
        for part, alpha in zip(plan.parts(d_cells), alphas, strict=True):
            part.mul_(alpha)
        return None, d_cells, torch.cat([torch.stack(d_colours), d_alpha[:, None]], 1), d_opacities, *d_paints


def lerp_backward(g, back, colour, area, d_area):
    """Backward of back + area * (colour - back): turns its gradient g [channels, h, w] into that of back, in place.

    Fills d_area [h, w] and returns the gradient of colour [channels, h, w].
    """
    torch.sum((colour - back).mul_(g), 0, out=d_area)
    through = g * area
    g.sub_(through)
    return through


def painted_backward(g, back, paint, area, d_paint, d_area):
    """The same for a gradient paint [4, h, w]; fills d_paint and d_area."""
    colour, covered = Composite.source(paint, area, len(g))
    d_paint[:3] = lerp_backward(g, back, colour, covered, d_area)[:3]
    torch.mul(d_area, area, out=d_paint[3])
    d_area.mul_(paint[3])
