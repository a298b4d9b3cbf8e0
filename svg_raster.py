"""Differentiable SVG rasterizer in pure PyTorch: analytic coverage, hand-written backward, CPU and CUDA.

    svg = SVG.load("apple.svg", size=256)              # an nn.Module: its parameters are the drawing
    adam = torch.optim.Adam(svg.param_groups(points=0.8, colours=0.01))
    image = svg.render(svg.sample_view())              # [1, 3, 256, 256] in [0, 1] on white
    loss(image).backward(); adam.step(); svg.project_()
    svg.save("edited.svg")                             # the same document, changed only where it was edited

From the command line: python svg_raster.py a.svg b.svg --out DIR --size 256

Data flow: document (svg/document.py) -> line segments (svg/segments.py) -> coverage (here) -> paint and compositing
(svg/compositing.py). Coordinates are x right, y down.
"""
import functools
import io
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from files.messages import Parser
from files.pictures import frame_of
from loop.optimiser import SmoothField
from svg.carrier import Carrier
from svg.compositing import EMPTY, MANY_STOPS, Composite, Plan, common, gradient_paint, united
from svg.constraints import Constraints, places
from svg.details import Details
from svg.document import Document
from svg.forms import Forms, forms
from svg.outline import SVGError, affine
from svg.segments import BEVEL, BUTT, MITER, ROUND, SQUARE, TOLERANCE, dash, expand, flatten, scatter_sum, stroke, take
from svg.source import write_file
from svg.symmetry import symmetry

SLIVER = 0.04                         # the least coverage that counts where a filter makes it opaque, as in resvg
MAX_FLOATS = 1 << 28                  # numbers that the layers, gradients and groups of one render keep: 1 GiB


# ------------------------------------------------------------------ coverage: signed areas, their derivatives

def running_sum(index, values, size):
    """Running sum [size] of scatter_sum; in fixed point on CUDA, where only sums of integers are deterministic."""
    if not values.is_cuda:
        return scatter_sum(index, values, size).cumsum_(0)
    sums = torch.zeros(size, dtype=torch.long, device=values.device)
    sums.index_add_(0, index, (values.double() * 2.0 ** 40).round().long())
    return (sums.cumsum(0).double() * 2.0 ** -40).to(values)


def split(segments, layer, boxes, level_too):
    """Cut segments into pieces that each lie in one pixel of their layer's box.

    Args:
        segments [S, 4] px; layer [S]; boxes [L, 4] (x0, y0, width, height) int.
        level_too: also cut level segments, which have no area but a gradient.
    Returns:
        For each piece [P]: segment, row, column (-1 left of the box, width right of it), the part ta..tb of the
        segment, signed height dy, and its ends xa, ya, xb, yb relative to the box.
    """
    box = boxes.to(segments)[layer]
    x0, y0 = (segments[:, :2] - box[:, :2]).unbind(1)
    x1, y1 = (segments[:, 2:] - box[:, :2]).unbind(1)
    width, height = box[:, 2], box[:, 3]
    top = torch.minimum(y0, y1).floor().clamp_min(0)
    rows = (torch.minimum(torch.maximum(y0, y1).ceil(), height) - top).clamp_min(0)
    level = y0 == y1
    rows = torch.where(level, ((y0 >= 0) & (y0 <= height) & (height > 0) & level_too).to(rows), rows)
    top = torch.minimum(top, height - 1)
    seg, k = expand(rows)
    row = top[seg] + k
    x0, y0, x1, y1 = x0[seg], y0[seg], x1[seg], y1[seg]
    rise, run = y1 - y0, x1 - x0
    ya, yb = (torch.clamp(y, row, row + 1) for y in (y0, y1))
    ta, tb = (ya - y0) / rise, (yb - y0) / rise
    if level_too:
        ta, tb = ta.masked_fill(rise == 0, 0), tb.masked_fill(rise == 0, 1)
    xa, xb = x0 + ta * run, x0 + tb * run

    width = width[seg]
    first = torch.minimum(torch.minimum(xa, xb).floor().clamp_min(-1), width)
    columns = (torch.minimum(torch.maximum(xa, xb).ceil().clamp_min(0), width + 1) - first).clamp_min(1)
    p, k = expand(columns)
    seg, row, column, single = seg[p], row[p], first[p] + k, columns[p] == 1
    xa, xb, ya, yb, ta, tb = xa[p], xb[p], ya[p], yb[p], ta[p], tb[p]
    fall, run, span = yb - ya, xb - xa, tb - ta
    # the outer columns include everything beyond the box
    left = column.masked_fill(column < 0, -math.inf)
    right = (column + 1).masked_fill(column == width[p], math.inf)
    xs, xe = torch.clamp(xa, left, right), torch.clamp(xb, left, right)
    us, ue = torch.where(single, 0, (xs - xa) / run), torch.where(single, 1, (xe - xa) / run)
    return (seg, row.long(), column.long(), ta + span * us, ta + span * ue, fall * (ue - us),
            xs, ya + fall * us, xe, ya + fall * ue)


class Coverage(torch.autograd.Function):
    """The share of each pixel that each layer's shape covers.

    forward(segments [S, 4] px, layer [S], boxes [L, 4] int, base [L], even_odd [L] bool, cells):
    the layers' boxes follow each other in one flat buffer [cells]; layer l starts at base[l] and has `height` rows
    of `width + 1` cells, the last column being padding. Each piece of an edge adds its signed area to its own pixel
    and its height to the next one; a running sum turns these into winding numbers averaged over the pixel. Closed
    shapes sum to zero over a row, so one running sum serves all rows of all layers.

    backward: a moving edge sweeps area at its normal speed, so each end point receives the boundary integral of the
    incoming gradient. (Autograd of the area formula would miss level edges, which have no area, and give one-sided
    derivatives for edges on pixel lines.)
    """

    @staticmethod
    def forward(ctx, segments, layer, boxes, base, even_odd, cells):
        needed = ctx.needs_input_grad[0]
        seg, row, column, ta, tb, dy, xa, ya, xb, yb = split(segments, layer, boxes, needed)
        owner = layer[seg]
        width, height = boxes[owner, 2], boxes[owner, 3]
        start = base[owner]
        cell = start + row * (width + 1) + column.clamp_min(0)
        inside = (column >= 0) & (column < width)
        share = torch.where(inside, (xa + xb) / 2 - column, 0) * dy       # area left of the edge
        winding = running_sum(torch.cat([cell, cell + 1]), torch.cat([dy - share, share]), cells + 1)[:-1]

        if needed:
            odd = even_odd[owner]
            weight = torch.where(inside, fold_slope(winding[cell], odd), 0)
            # an edge on a pixel line touches two pixels: average the slopes on both sides
            line_x, line_y = torch.round(xa), torch.round(ya)
            upright = (xa - line_x).abs() + (xb - line_x).abs() < 1e-4
            flat = (ya - line_y).abs() + (yb - line_y).abs() < 1e-4
            on = (upright | flat).nonzero()[:, 0]
            upright, column, row = upright[on], column[on], row[on]
            line_x, line_y = line_x[on].long(), line_y[on].long()
            sides = []
            for back in (1, 0):
                i = torch.where(upright, line_x - back, column)
                j = torch.where(upright, row, line_y - back)
                valid = (i >= 0) & (i < width[on]) & (j >= 0) & (j < height[on])
                sides.append((valid, torch.where(valid, start[on] + j * (width[on] + 1) + i, 0)))
            w = [torch.where(valid, winding[c], 0) for valid, c in sides]
            weight[on] = 0
            extra = [torch.where(valid, fold_slope(mine + 1e-4 * (other - mine).sign(), odd[on]) / 2, 0)
                     for (valid, _), mine, other in zip(sides, w, w[::-1], strict=True)]
            ctx.save_for_backward(segments, seg, ta, tb, cell, weight, on, sides[0][1], sides[1][1], *extra)

        for n in even_odd.nonzero()[:, 0].tolist():
            own = winding[base[n]:base[n + 1] if n + 1 < len(base) else cells]
            own.sub_((own / 2).round_(), alpha=2)
        return winding.abs_().clamp_max_(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        segments, seg, ta, tb, cell, weight, on, cell0, cell1, weight0, weight1 = ctx.saved_tensors
        speed = grad[cell] * weight
        speed[on] = grad[cell0] * weight0 + grad[cell1] * weight1
        speed = speed * (tb - ta)
        late = speed * (ta + tb) / 2
        count = len(segments)
        late, all_ = scatter_sum(seg, late, count), scatter_sum(seg, speed, count)
        dx, dy = segments[:, 2] - segments[:, 0], segments[:, 3] - segments[:, 1]
        early = all_ - late
        return torch.stack([-dy * early, dx * early, -dy * late, dx * late], 1), None, None, None, None, None


def fold_slope(winding, even_odd):
    """Derivative of the covered share with respect to the winding number; at the kink, the mean of both sides."""
    folded = torch.where(even_odd, winding - 2 * (winding / 2).round(), winding)
    beyond = torch.where(even_odd, -1.0, 0.0).to(winding)
    size = folded.abs()
    slope = torch.where(size < 1 - 1e-5, 1, torch.where(size > 1 + 1e-5, beyond, (1 + beyond) / 2))
    return slope * folded.sign()


def sampled(coverage):
    """Whether resvg, which looks at 4 x 4 points of a pixel, sees the shape there at all; coverage [h, w]."""
    across, down = F.pad(coverage, (1, 1)), F.pad(coverage, (0, 0, 1, 1))
    # how far an edge along either axis rises from the middle of the pixel to its side
    rise = [torch.maximum(a, b).sub(coverage).clamp_min(0) / 2
            for a, b in ((across[:, 2:], across[:, :-2]), (down[2:], down[:-2]))]
    return (coverage >= SLIVER) & (coverage + torch.minimum(*rise) >= 1 / 8)


# ------------------------------------------------------------------ the drawing as a module

class SVG(torch.nn.Module):
    """A drawing whose geometry and paint are parameters. See the top of the file.

    points [N, 2]: control points, in each shape's own coordinates scaled so that 1 is a pixel at `size`.
    colours [C, 3], opacities [O], stop_colours [T, 4], stop_offsets [T]: in [0, 1].
    stroke_widths [W]: pixels at `size`.
    """

    jitter = 3.0                          # the largest shift by sample_view, in pixels
    COLOURS = ("colours", "stop_colours", "opacities")        # see colour_parameters

    @classmethod
    def load(cls, path, skip_unsupported=False, size=64, ss=1, subdivide=0.0):
        """Read a file.

        Args:
            skip_unsupported: leave out unsupported features with a warning instead of refusing the file.
            size: side of the square picture in pixels, or a Frame (files/pictures.py) to keep the drawing's shape.
            ss: 1, 2 or 4 samples per pixel and axis; more of them hide the seams between shapes that share an edge.
            subdivide: length in pixels above which a curve is split, so that it bends with a field; 0: none is. Paths
                with markers stay as they are, since those stand on their vertices, as do those beyond 100,000 points.
        Raises SVGError for a file that cannot be read or drawn.
        """
        return cls(Document.load(path, skip_unsupported, size, subdivide), ss)

    def __init__(self, document, ss=1):
        super().__init__()
        self.document, self.size, self.sides, self.ss = document, document.size, document.sides, ss
        self.layers, self.ops, self.gradients = document.layers, document.ops, document.paints.gradients
        self.add_parameters(document.shapes, document.paints.tables)
        self.add_curves()
        self.add_layers()
        self.add_gradients()
        self.opener, opened = {}, []      # step that removes a buffer -> step of its push
        for step, (op, _) in enumerate(self.ops):
            if op == "push":
                opened.append(step)
            elif op != "draw":
                self.opener[step] = opened.pop()
        self.masks = {start for step, start in self.opener.items() if self.ops[step][0] == "mask"}
        self.filters = document.filters
        self.add_filters()
        self.loaded = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.constraints = None           # see restrict
        self.carrier = None
        if any(layer.place is not None for layer in self.layers):
            with torch.no_grad():
                self.carrier = Carrier(self.layers, self.points, self.stroke_widths, *self.segments(1.0)[2:])

    def add_buffers(self, dtype=torch.float32, **buffers):
        for name, values in buffers.items():
            self.register_buffer(name, torch.as_tensor(np.array(values), dtype=dtype), persistent=False)

    def add_parameters(self, shapes, tables):
        """Initial values from the document; the rectangles of nested viewports are fixed."""
        def parameter(values, *shape):
            return torch.nn.Parameter(torch.tensor(np.array(values).reshape(-1, *shape), dtype=torch.float32))

        def table(of):
            return np.array([[p.real * s.scale, p.imag * s.scale] for s in of
                             for p in np.array(s.outline.points) - s.origin]).reshape(-1, 2)
        self.points = parameter(table(s for s in shapes if s.element is not None), 2)
        self.colours = parameter(tables["colours"], 3)
        self.opacities = parameter(tables["opacities"])
        self.stop_colours = parameter([s[1:] for s in tables["stops"]], 4)
        self.stop_offsets = parameter([s[0] for s in tables["stops"]])
        self.width_scale = [scale for _, scale in tables["widths"]]
        self.stroke_widths = parameter([width * scale for width, scale in tables["widths"]])
        self.add_buffers(fixed=table(s for s in shapes if s.element is None))

    def add_curves(self):
        """Index tables of the curves of all layers: first the fills, then the centre lines of the strokes.

        curves [K, 4] rows of points, then of fixed; straight, owner (layer), subpath [K]; closed [subpaths].
        """
        curves, straight, owner, subpath, closed = [], [], [], [], []
        for stroked in (False, True):
            for number, layer in enumerate(self.layers):
                if (layer.stroke is not None) != stroked:
                    continue
                shape = layer.shape
                first = shape.first + (0 if shape.element is not None else len(self.points))
                for start, stop, point, is_closed in shape.outline.drawn():
                    own = shape.outline.curves[start:stop]
                    if not is_closed and not stroked:
                        own = [*own, (own[-1][3], own[-1][3], point, point)]
                    curves += [[first + i for i in curve] for curve in own]
                    straight += [curve[0] == curve[1] for curve in own]
                    owner += [number] * len(own)
                    subpath += [len(closed)] * len(own)
                    closed.append(is_closed)
            if not stroked:
                self.fills = len(curves)
        self.add_buffers(torch.long, curves=np.reshape(curves, (-1, 4)), owner=owner, subpath=subpath)
        self.add_buffers(torch.bool, straight=straight, closed=closed)

    def add_filters(self):
        """Nesting: `within` {filter: (layers, filters)}; `around` [L], the innermost filter of a layer or None; `outer`
        {step of a filter: the filter around it or None}."""
        closers = {start: self.ops[step][1] for step, start in self.opener.items() if self.ops[step][0] == "filter"}
        self.within = {number: ([], []) for number in range(len(self.filters))}     # some may be left out
        self.around, self.outer, open_ = [None] * len(self.layers), {}, []
        for step, (op, argument) in enumerate(self.ops if self.filters else ()):
            if op == "push":
                open_.append(closers.get(step))
            elif op != "draw":
                open_.pop()
            inside = [number for number in open_ if number is not None]
            if op in ("draw", "filter"):
                for number in inside:
                    self.within[number][op == "filter"].append(argument)
            if op == "draw":
                self.around[argument] = inside[-1] if inside else None
            elif op == "filter":
                self.outer[step] = inside[-1] if inside else None
        self.hardened = sorted({n for number, f in enumerate(self.filters) if f.hardens
                                for n in self.within[number][0]})

    def add_layers(self):
        """Tables with a row for each layer: the matrix of its points to pixels, its paint and stroke."""
        self.add_buffers(frames=np.reshape([layer.frame[:2] for layer in self.layers], (-1, 2, 3)),
                         stretch=[np.linalg.norm(layer.frame[:2, :2], 2) for layer in self.layers])
        most = max([len(layer.opacities) for layer in self.layers], default=0)
        rows = [layer.opacities + [len(self.opacities)] * (most - len(layer.opacities)) for layer in self.layers]
        self.add_buffers(torch.long, colour_of=[layer.colour for layer in self.layers],
                         opacity_of=np.reshape(rows, (len(rows), most)))
        self.add_buffers(torch.bool, even_odd=[layer.rule == "evenodd" for layer in self.layers])
        strokes = [layer.stroke or dict(width=-1, cap="", join="", miter=4.0) for layer in self.layers]
        self.add_buffers(miter=[s["miter"] for s in strokes],
                         half_factor=[layer.shape.scale / self.width_scale[s["width"]] / 2 if layer.stroke else 0.0
                                      for layer, s in zip(self.layers, strokes, strict=True)])
        self.add_buffers(torch.long, width_of=[s["width"] for s in strokes],
                         cap=[dict(round=ROUND, square=SQUARE).get(s["cap"], BUTT) for s in strokes],
                         join=[dict(round=ROUND, bevel=BEVEL).get(s["join"], MITER) for s in strokes])
        self.dashes = {n: ([d * layer.shape.scale for d in s["dashes"]], s["offset"] * layer.shape.scale)
                       for n, (layer, s) in enumerate(zip(self.layers, strokes, strict=True)) if s.get("dashes")}

    def add_gradients(self):
        """Matrices of the layers with a gradient: pixels -> the layer's (on_box: the points') units -> gradient."""
        self.painted = [n for n, layer in enumerate(self.layers) if layer.gradient or layer.picture]
        layers = [self.layers[n] for n in self.painted]
        on_box = [layer.gradient is not None and layer.gradient.on_box for layer in layers]
        into = [layer.frame if box or layer.place is not None else layer.matrix
                for layer, box in zip(layers, on_box, strict=True)]
        into = np.linalg.pinv(np.reshape(into, (-1, 3, 3)))
        units = np.array([(layer.gradient or layer.picture).unit for layer in layers]).reshape(-1, 3, 3)
        for n, layer in enumerate(layers):
            if layer.place is not None and not on_box[n]:
                units[n] = units[n] @ np.linalg.inv(layer.matrix) @ layer.frame
            elif layer.shape.origin and not on_box[n]:                # both are far away: combine them in float64
                units[n], into[n] = units[n] @ into[n], np.eye(3)
        self.add_buffers(paint_in=into, paint_unit=units)

    # -- rendering

    def sample_view(self, generator=None):
        """A random shift (dx, dy) of up to `jitter` pixels at the drawing's size."""
        return tuple(((2 * torch.rand(2, generator=generator) - 1) * self.jitter).tolist())

    def segments(self, zoom):
        """All edges [S, 4] in their layers' coordinates, their layers [S]; the same of the lines before stroking."""
        points = torch.cat([self.points, self.fixed.to(self.points)])
        control = take(points, self.curves)                       # [K, 4, 2]
        widths = torch.cat([self.stroke_widths, self.stroke_widths.new_zeros(1)])          # row -1: fills
        half = take(widths, self.width_of) * self.half_factor
        pixels = self.stretch * zoom
        wide = half.detach() * pixels
        lines, curve, corner = flatten(control, self.straight, pixels[self.owner], wide[self.owner])
        layer = self.owner[curve]
        if self.fills == len(self.curves):
            return lines, layer, lines, layer
        fills = int((curve < self.fills).sum())
        centre = lines[fills:], layer[fills:], self.subpath[curve[fills:]], corner[fills:], self.closed
        if self.dashes:
            centre = dash(*centre, self.dashes)
        # never 0, which float32 makes of the arc of a stroke a million pixels wide
        arc = 2 * torch.acos(1 - TOLERANCE / wide.clamp_min(TOLERANCE)).clamp_min(1e-4)
        style = dict(half=half, miter=self.miter, cap=self.cap, join=self.join, arc=arc)
        edges, edge_layer = stroke(*centre, style)
        return torch.cat([lines[:fills], edges]), torch.cat([layer[:fills], edge_layer]), lines, layer

    def render(self, view=None, size=None):
        """Picture [1, 3, H, W] in [0, 1] on white, differentiable.

        Args:
            view: shift (dx, dy) in pixels at the drawing's size, or None.
            size: pixels of the shorter side, or a Frame; default: the size at loading. A drawing loaded as a square
                is drawn as one, with a viewBox of another shape in its centre.
        Raises SVGError for points that are not finite, or more than fits into memory.
        """
        width, height = self.sides if size is None else frame_of(size).sides(*self.sides)
        try:
            picture = self.draw(view, max(width, height))
        except SVGError as error:
            raise SVGError(f"{self.document.name}: {error}") from None
        left, top = (picture.shape[3] - width) // 2, (picture.shape[2] - height) // 2
        return picture[..., top:top + height, left:left + width]

    def draw(self, view, size):
        side = size * self.ss
        zoom, (dx, dy) = side / self.size, view or (0.0, 0.0)
        frame = [(v + d) * zoom for v, d in zip(self.document.frame, (dx, dy, dx, dy), strict=True)]
        # a drawing that ends within a pixel is seen there
        whole = (lambda v: math.floor(v + 1e-3), lambda v: math.ceil(v - 1e-3)) if view is None else (round, round)
        window = [min(max(to(v), 0), side) for v, to in zip(frame, np.repeat(whole, 2), strict=True)]
        if not self.ops:
            return self.points.new_ones(1, 3, size, size)

        local, layer, lines, lines_layer = self.segments(zoom)
        shift = self.points.new_tensor([[0, 0, dx], [0, 0, dy]])
        frames = self.frames
        if self.carrier is not None:
            frames = self.carrier(frames, self.points, self.stroke_widths, lines, lines_layer)
        rows = ((frames + shift) * zoom).view(-1, 6)
        a, c, e, b, d, f = rows.T[:, layer] if self.carrier is None else take(rows, layer).T
        x0, y0, x1, y1 = local.unbind(1)
        segments = torch.stack([a * x0 + c * y0 + e, b * x0 + d * y0 + f,
                                a * x1 + c * y1 + e, b * x1 + d * y1 + f], 1)

        reach = self.reach(segments.detach(), layer)
        points = self.points.detach().cpu().double().numpy() if self.filters else None
        places = [affine(zoom, 0, 0, zoom, dx * zoom, dy * zoom) @ f.matrix for f in self.filters]
        regions = self.regions(reach, places, points, window)
        boxes = [common(box, regions[around] if around is not None else window)
                 for box, around in zip(reach, self.around, strict=True)]
        sizes = [(x1 - x0 + 1) * (y1 - y0) for x0, y0, x1, y1 in boxes]
        base = np.cumsum([0, *sizes]).tolist()
        shown = {step: common(regions[self.ops[step][1]], window if around is None else regions[around])
                 for step, around in self.outer.items()}
        op_boxes = self.op_boxes(boxes, regions, shown)
        if self.floats(boxes, op_boxes, regions) > MAX_FLOATS:
            raise SVGError(f"its {len(boxes)} layers cover too many pixels at {side} px")
        device = segments.device
        corner = torch.tensor([(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes], device=device,
                              dtype=torch.long).view(-1, 4)
        starts = torch.tensor(base[:-1], device=device, dtype=torch.long)
        coverage = Coverage.apply(segments, layer, corner, starts, self.even_odd, base[-1])
        if self.hardened:
            seen = torch.ones_like(coverage)
            for n in self.hardened:
                x0, _, x1, _ = boxes[n]
                own = slice(base[n], base[n + 1])
                seen[own] = sampled(coverage[own].detach().view(-1, x1 - x0 + 1)).view(-1)
            coverage = coverage * seen

        ones = torch.cat([self.opacities, self.opacities.new_ones(1)])
        alpha = ones[self.opacity_of].prod(1, keepdim=True)
        blank = torch.cat([self.colours, self.colours.new_zeros(1, 3)])       # row -1: clips and gradients
        rgba = torch.cat([blank[self.colour_of], alpha], 1)
        paints = self.paints(lines, lines_layer, boxes, frames, zoom, dx, dy)
        paint = {layer: number for number, layer in enumerate(self.painted)}
        filters = [functools.partial(f.apply, box=box, place=place, points=points)
                   for f, box, place in zip(self.filters, regions, places, strict=True)]
        plan = Plan(side, self.ops, op_boxes, self.opener, boxes, paint, torch.is_grad_enabled(), filters, shown)
        image = Composite.apply(plan, coverage, rgba, self.opacities, *paints)[None]
        return image if self.ss == 1 else F.avg_pool2d(image, self.ss)

    def reach(self, segments, layer):
        """Pixel boxes (x0, y0, x1, y1) of the layers' current edges."""
        if not torch.isfinite(segments).all():
            raise SVGError("points or stroke widths are not finite")
        low = segments.new_full((len(self.layers), 2), math.inf)
        index = layer[:, None].expand(-1, 2)
        high = (-low).scatter_reduce_(0, index, torch.maximum(segments[:, :2], segments[:, 2:]), "amax")
        low = low.scatter_reduce_(0, index, torch.minimum(segments[:, :2], segments[:, 2:]), "amin")
        # one more pixel on every side: an edge on a pixel line may move either way
        return torch.cat([low.ceil() - 1, high.floor() + 1], 1).clamp(-(1 << 20), 1 << 20).long().tolist()

    def regions(self, reach, places, points, window):
        """Pixel boxes of the filters: within a picture's width and height around the window.

        reach: boxes of the layers; places: matrices of the filters' user space to pixels; points [N, 2]: as they are.
        """
        x0, y0, x1, y1 = window
        limit, regions = (2 * x0 - x1, 2 * y0 - y1, 2 * x1 - x0, 2 * y1 - y0), []
        for number, (f, place) in enumerate(zip(self.filters, places, strict=True)):
            layers, filters = self.within[number]
            content = [*(tuple(reach[n]) for n in layers), *(regions[n] for n in filters)]
            content = functools.reduce(united, content, EMPTY)
            regions.append(common(f.box(place, content, points), limit))
        return regions

    def floats(self, boxes, op_boxes, regions):
        """Measured estimate of the numbers that a render, and its backward pass if enabled, hold at once."""
        def area(box):
            return (box[2] - box[0] + 1) * (box[3] - box[1])
        keep = torch.is_grad_enabled()
        stops = {n: min(len(self.layers[n].gradient.stops), MANY_STOPS) if self.layers[n].gradient else MANY_STOPS
                 for n in self.painted}
        return (sum(map(area, boxes)) * (7 if keep else 3)
                + sum(area(boxes[n]) * (20 + 4 * k if keep else 4) for n, k in stops.items())
                + sum(area(box) * 8 for box, (op, _) in zip(op_boxes, self.ops, strict=True)
                      if op not in ("push", "draw") and keep)
                + sum(area(box) * 4 * len(f.primitives) for f, box in zip(self.filters, regions, strict=True)))

    def op_boxes(self, boxes, regions, shown):
        """The box of every operation: a pushed buffer spans what is drawn into it, a mask what it masks.

        boxes: of the layers; regions: of the filters, of which the buffers below show the part {step: box}.
        """
        result, opened = [EMPTY] * len(self.ops), []
        span = {}                         # push -> box so far

        def grow(box):
            if opened and opened[-1] not in self.masks:
                span[opened[-1]] = united(span[opened[-1]], box)
        for step, (op, argument) in enumerate(self.ops):
            if op == "push":
                span[step] = span[opened[-1]] if step in self.masks else EMPTY
                opened.append(step)
            elif op == "draw":
                result[step] = boxes[argument]
                grow(boxes[argument])
            else:
                opener = opened.pop()
                result[step] = result[opener] = regions[argument] if op == "filter" else span[opener]
                grow(shown.get(step, span[opener]))
        return result

    def paints(self, lines, lines_layer, boxes, frames, zoom, dx, dy):
        """Gradient paints [4, h, w] of the layers in `painted`; frames [L, 2, 3]: where they are now."""
        back = self.points.new_tensor([[1 / zoom, 0, -dx], [0, 1 / zoom, -dy], [0, 0, 1]])
        if not self.painted:
            return []
        result = []
        numbers, counts = torch.unique_consecutive(lines_layer, return_counts=True)
        parts = dict(zip(numbers.tolist(), lines.split(counts.tolist()), strict=True))
        for i, n in enumerate(self.painted):
            gradient, unit = self.layers[n].gradient, self.paint_unit[i]
            if gradient is not None and gradient.on_box:
                own = parts[n].reshape(-1, 2)
                low, high = own.amin(0), own.amax(0)
                scale = 1 / (high - low).clamp_min(1e-6)
                to_box = torch.cat([torch.diag(scale), (-low * scale)[:, None]], 1)
                unit = unit @ torch.cat([to_box, to_box.new_tensor([[0, 0, 1]])])
            into = self.paint_in[i]
            if self.layers[n].place is not None:      # it moves with others
                into = torch.linalg.inv(torch.cat([frames[n], frames.new_tensor([[0, 0, 1]])]))
            matrix = unit @ into @ back
            x0, y0, x1, y1 = boxes[n]
            if gradient is None:
                result.append(self.layers[n].picture.paint(matrix, (x0, y0, x1 - x0, y1 - y0)))
                continue
            stops = torch.tensor(gradient.stops, device=lines.device)
            result.append(gradient_paint(matrix, gradient, self.stop_offsets[stops], self.stop_colours[stops],
                                         (x0, y0, x1 - x0, y1 - y0)))
        return result

    # -- optimisation

    def param_groups(self, points=0.8, colours=0.01, colours_only=False, shared=False):
        """Adam parameter groups, each with a "name" and its own rate; empty parameters are left out.

        Args:
            points: pixels a step; stroke widths use an eighth of it.
            colours: share of the colour range a step; opacities and stop colours use the same, stop offsets half.
            colours_only: leave out all but the solid and the stop colours (pixel art).
            shared: one second moment for a whole group, see optimiser.SteadyAdam.
        """
        rates = dict(points=points, colours=colours, stop_colours=colours, opacities=colours,
                     stop_offsets=colours / 2, stroke_widths=points / 8)
        names = ("colours", "stop_colours") if colours_only else rates
        return [dict(name=name, params=[getattr(self, name)], lr=rates[name], shared=shared)
                for name in names if getattr(self, name).numel()]

    def colour_parameters(self):
        """The parameters of appearance, not of geometry: solid colours, colours of stops, opacities."""
        return [getattr(self, name) for name in self.COLOURS]

    def fields(self, sigma):
        """{name: SmoothField} of the points and the stroke widths; sigma: width in pixels at the drawing's size.

        All shapes share one field in the picture, whatever their transforms; a stroke's width lies amid its points.
        """
        rest, frames, middle = (x.to(self.points.device) for x in places(
            self.layers, self.frames.cpu(), self.loaded["points"], len(self.stroke_widths)))
        return ({"points": SmoothField(rest, sigma, frames=frames)} if len(rest) else {}) | (
            {"stroke_widths": SmoothField(middle, sigma)} if len(middle) else {})

    def forms(self, firmness=None):
        """The Forms of the circles, ellipses, rectangles and split lines in the file, for SteadyAdam; firmness: of the
        points, see Forms."""
        _, frames, _ = places(self.layers, self.frames.cpu(), self.loaded["points"], 0)
        return Forms(*forms(self.document), self.loaded["points"].to(self.points), frames.to(self.points), firmness)

    def symmetry(self):
        """What of the drawing mirrors something, {name of a parameter: see svg/symmetry.py}, for SteadyAdam. Call it
        before an edit, and after `restrict`."""
        return symmetry(self)

    def details(self, alike):
        """The Details of the drawing, for SteadyAdam; alike: see there. Call it before an edit."""
        return Details(self, alike)

    def restrict(self, opacities=False, only=None, joints=True, inside=False):
        """Set the constraints that every project_ restores from now on.

        Args:
            opacities: allow opacities that are 1 in the file to change; otherwise opaque shapes stay opaque.
            only: ids of the elements that may change, with all they contain and use; None: all.
            joints: keep joints smooth at which a curve goes on in the same direction, within 5 degrees.
            inside: keep points within the picture; those that lie outside in the file go no farther.
        Raises SVGError for an id that is not in the file.
        """
        self.constraints = Constraints(self.document, self.loaded, opacities, only, joints)
        if inside and len(self.points):
            self.constraints.keep_inside(self.layers, self.frames.cpu())

    @torch.no_grad()
    def project_(self):
        """Return the parameters to their ranges after a step; stops keep their order."""
        for p in (self.colours, self.opacities, self.stop_colours, self.stop_offsets):
            p.clamp_(0, 1)
        self.stroke_widths.clamp_min_(0)
        for gradient in self.gradients.values():
            if gradient is not None:
                first, last = gradient.stops[0], gradient.stops[-1] + 1
                self.stop_offsets[first:last] = self.stop_offsets[first:last].cummax(0)[0]
        if self.constraints is not None:
            self.constraints.apply_(self)

    # -- saving

    def save(self, path):
        """Write the document with the current parameters: see Document.save. Raises SVGError."""
        now = {name: p.detach().cpu().double().numpy() for name, p in self.named_parameters()}
        self.document.save(path, now, {name: p.numpy() for name, p in self.loaded.items()})


# ------------------------------------------------------------------ command line

def main(argv=None):
    parser = Parser(description="Render SVG files to square PNG files on white.")
    parser.add_argument("files", nargs="+", help="SVG files")
    parser.add_argument("--out", required=True, help="folder for NAME.png of every NAME.svg; made if missing")
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels (default 256)")
    parser.add_argument("--ss", type=int, choices=(1, 2, 4), default=1, help="samples per pixel and axis (default 1)")
    parser.add_argument("--skip-unsupported", action="store_true",
                        help="leave out text, meshes and the like instead of refusing the file")
    args = parser.parse_args(argv)
    if not 1 <= args.size <= 8192:
        parser.error("--size must lie between 1 and 8192")
    out, failed, written = Path(args.out), 0, set()
    out.mkdir(parents=True, exist_ok=True)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    for file in args.files:
        try:
            target = out / (Path(file).stem + ".png")
            if target in written:
                raise SVGError(f"{file}: another file of this call has already been written to {target}")
            with torch.no_grad():
                image = SVG.load(file, args.skip_unsupported, args.size, args.ss).render()
            png = io.BytesIO()
            Image.fromarray((image[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(png, "PNG")
            write_file(target, png.getvalue())
            written.add(target)
        except SVGError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
