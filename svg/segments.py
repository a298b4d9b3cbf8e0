"""Outlines to line segments, differentiably: flattened curves, dashes, and the boundary of strokes.

The result is an unordered set of directed segments, each with the number of its layer: coverage sums signed areas, so
contour order does not matter. Also here: index arithmetic of ragged arrays, and deterministic sums.
"""
import math

import numpy as np
import torch

from svg.outline import SVGError

MAX_PIECES = 6_000_000                # edge pieces of one render, about 1 GB
MAX_CHORDS = 1 << 20                  # chords of curves, of dashes and of round corners, before they are cut by pixels
TOLERANCE = 0.03                      # px, the largest distance of a flattened curve from the true one
BUTT, ROUND, SQUARE = 0, 1, 2           # caps
MITER, BEVEL = 0, 2                     # joins, ROUND among them


def expand(counts, most=MAX_PIECES):
    """counts [n] -> (owner [sum], position within the owner [sum]): the index tables of a ragged array."""
    counts = counts.long()
    ends = counts.cumsum(0)
    if len(ends) and int(ends[-1]) > most:
        raise SVGError("the drawing has too many edges to render at this size")
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner), device=counts.device) - (ends - counts)[owner]


def scatter_sum(index, values, size):
    """sums [size] of values [n] by index [n]; deterministic, on CUDA too."""
    sums = values.new_zeros(size)
    if values.is_cuda:
        return sums.index_put_((index,), values, accumulate=True)
    return sums.index_add_(0, index, values)


class Take(torch.autograd.Function):
    """x[index] for x [n, ...] with a deterministic backward."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index % max(len(x), 1))         # -1 means the last row
        ctx.shape = x.shape
        return x[index]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        index, = ctx.saved_tensors
        columns = grad.reshape(index.numel(), ctx.shape[1:].numel()).unbind(1)
        sums = [scatter_sum(index.flatten(), column, ctx.shape[0]) for column in columns]
        return torch.stack(sums, 1).view(ctx.shape), None


take = Take.apply


def flatten(control, straight, scale, half_width):
    """Cubics -> chords.

    Args:
        control [K, 4, 2]; straight [K] bool; scale [K] pixels per unit; half_width [K] px of a stroke, else 0.
    Returns:
        segments [S, 4] (x0, y0, x1, y1), the curve of each [S], and whether it is the first of its curve [S] bool.
    """
    with torch.no_grad():
        arms = control.diff(dim=1)                                      # [K, 3, 2]
        bend = arms.diff(dim=1).norm(dim=2).amax(1) * scale             # Wang's bound on the chord error
        a, b = arms[:, :-1], arms[:, 1:]
        turn = torch.atan2((a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).abs(), (a * b).sum(2)).sum(1)
        count = (0.75 * bend / TOLERANCE).sqrt().maximum(turn * (half_width / (8 * TOLERANCE)).sqrt())
        # at least four chords: with one, the inner control points would get no gradient
        count = torch.where(straight, 1, count.ceil().clamp(4, 1000)).long()
    owner, k = expand(count + 1, MAX_CHORDS)                            # one more vertex than chords
    t = (k / count[owner])[:, None]
    s = 1 - t
    weights = torch.cat([s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t], 1)          # [V, 4]
    vertices = (weights.to(control)[:, :, None] * take(control, owner)).sum(1)  # [V, 2]
    starts = (k < count[owner]).nonzero()[:, 0]
    segments = torch.cat([vertices[starts], vertices[starts + 1]], 1)
    return segments, owner[starts], k[starts] == 0


def dash(segments, layer, subpath, corner, closed, patterns):
    """Cut the centre lines of dashed layers into dashes, each an open subpath of its own.

    Arguments and results are the first five arguments of `stroke`; patterns: {layer: (lengths, offset)}, an even
    number of lengths, alternately drawn and left out, in the units of the segments.
    """
    dashed, total = torch.isin(layer, torch.tensor(list(patterns), device=layer.device)), 0.0
    parts = [[x[~dashed] for x in (segments, layer, subpath, corner)]]
    for number, (pattern, offset) in patterns.items():
        lines, path, starts = (x[layer == number] for x in (segments, subpath, corner))
        if len(lines) == 0:
            continue
        size = (lines[:, 2:] - lines[:, :2]).norm(dim=1)
        total += size.sum().item() * len(pattern) / sum(pattern)
        if not total <= MAX_CHORDS >> 2:
            raise SVGError("the drawing has too many dashes")
        pieces, fresh, starts = dashes_of(lines, size, path, starts, closed, pattern, offset)
        number = torch.full_like(fresh, number, dtype=torch.long)
        parts.append([pieces, number, fresh.cumsum(0) - 1 + len(closed), starts])
        closed = torch.cat([closed, torch.zeros_like(closed[:1]).expand(int(fresh.sum()))])
    return *(torch.cat(x) for x in zip(*parts, strict=True)), closed


def dashes_of(lines, size, path, starts, closed, pattern, offset):
    """The dashes of one layer: pieces [D, 4], whether each starts a dash [D], whether it starts at a vertex [D].

    lines [S, 4] and their lengths `size`, subpaths and corners [S]; closed [subpaths]; see `dash`.
    """
    marks = lines.new_tensor(np.cumsum([0.0, *pattern]))
    period, count = float(marks[-1]), len(pattern)
    ends = size.cumsum(0)
    new = torch.ones_like(starts)
    new[1:] = path[1:] != path[:-1]
    first = torch.cummax(torch.where(new, torch.arange(len(new), device=new.device), 0), 0)[0]
    begin = ends - size - take(ends - size, first)          # arc length along the subpath [S]

    def interval(s, right):
        s = (s.detach() + offset).clamp_min(-1e9)
        turns = (s / period).floor()
        return (turns * count).long() + torch.searchsorted(marks[1:], s - turns * period, right=right)
    low = interval(begin, True)
    low = low - (new & (marks.diff() == 0)[(low - 1) % count]).long()         # a dot at the very start
    owner, k = expand((interval(begin + size, False) - low).clamp_min(0) + 1, MAX_CHORDS)
    index = low[owner] + k

    def position(i):                      # where interval i starts, as a share of the segment
        at = (i // count) * period + marks[i % count] - offset
        return ((at - take(begin, owner)) / take(size, owner).clamp_min(1e-12)).clamp(0, 1)[:, None]
    a, b = take(lines, owner).split(2, dim=1)
    pieces = torch.cat([torch.lerp(a, b, position(index)), torch.lerp(a, b, position(index + 1))], 1)
    # at the start of a closed subpath the last dash continues into the first
    path = path[owner]
    last = torch.cat([path[1:] != path[:-1], torch.ones_like(starts[:1])])
    final = torch.zeros(len(closed), dtype=torch.long, device=index.device)
    final[path[last]] = index[last]
    wraps = (closed[path] & (index == low[first][owner]) & (index % 2 == 0) & (final[path] % 2 == 0)
             & (final[path] != index))
    index = torch.where(wraps, final[path], index)
    order = torch.argsort(2 * path + wraps, stable=True)
    order = order[index[order] % 2 == 0]
    path, index = path[order], index[order]
    fresh = torch.ones_like(path, dtype=torch.bool)
    fresh[1:] = (path[1:] != path[:-1]) | (index[1:] != index[:-1])
    return pieces[order], fresh, ((k == 0) & starts[owner])[order]


def stroke(segments, layer, subpath, corner, closed, style):
    """Centre lines -> the directed boundary of their strokes, as an unordered set of segments.

    Every segment gives two parallel sides, every joint an outer chain and an inner one through the joint, every open
    end a cap.

    Args:
        segments [S, 4]; layer, subpath [S], both increasing.
        corner [S] bool: the segment starts at a path vertex, not inside a curve; closed [subpaths] bool.
        style: tensors [L]: half (width), miter, arc (radians per chord of a round join), cap, join.
    Returns segments [B, 4] and layer [B].
    """
    size = (segments[:, 2:] - segments[:, :2]).detach().norm(dim=1)
    new = torch.ones_like(corner)
    new[1:] = subpath[1:] != subpath[:-1]
    alive = torch.zeros_like(closed).index_put((subpath[size > 1e-6],), torch.ones_like(closed[:1]))
    keep = ((size > 1e-6) | new & ~alive[subpath]).nonzero()[:, 0]      # a subpath of no length is a dot
    closed = closed & alive
    segments, layer, subpath, corner = segments[keep], layer[keep], subpath[keep], corner[keep]
    if len(keep) == 0:
        return segments, layer
    a, b = segments[:, :2], segments[:, 2:]
    dot = (size[keep] <= 1e-6)[:, None]
    d = torch.where(dot, torch.tensor([1.0, 0.0]).to(a), b - a)
    d = d / d.norm(dim=1, keepdim=True)
    normal = torch.stack([-d[:, 1], d[:, 0]], 1)
    half = take(style["half"], layer)[:, None]
    h = half * normal

    new = torch.ones_like(corner)
    new[1:] = subpath[1:] != subpath[:-1]
    last = torch.cat([new[1:], new[:1]])
    joint = (~last | closed[subpath]).nonzero()[:, 0]
    ends, heads = (last & ~closed[subpath]).nonzero()[:, 0], (new & ~closed[subpath]).nonzero()[:, 0]
    count = torch.arange(len(keep), device=new.device)
    first_of = torch.cummax(torch.where(new, count, 0), 0)[0]
    after = torch.where(last, first_of, count + 1)                      # the next segment

    bag, owners = [], []

    def add(p, q, index, flip=None):
        """Segments p -> q (q -> p where flip) of the layers of the centre lines `index`."""
        if flip is not None:
            p, q = torch.where(flip, q, p), torch.where(flip, p, q)
        bag.append(torch.cat([p, q], 1))
        owners.append(layer[index])
    style = {name: values[layer] for name, values in style.items() if name != "half"}
    add(a + h, b + h, slice(None))
    add(b - h, a - h, slice(None))
    round_joins = add_joints(add, b, d, normal, half, joint, after[joint], corner, style)
    round_caps = add_caps(add, a, b, d, half, h, ends, heads, style)
    add_arcs(add, *(torch.cat(pair) for pair in zip(round_joins, round_caps, strict=True)), style)
    return torch.cat(bag), torch.cat(owners)


def add_joints(add, b, d, normal, half, joint, following, corner, style):
    """Joints: the shape of the outer side depends on the join, the inner side passes through the joint.

    b, d, normal [S, 2]: ends, directions and normals of the segments; half [S, 1] of the width;
    joint, following [J]: the segments before and after each joint.
    Returns the arcs of round joins, the arguments of add_arcs.
    """
    n0, n1, v, h = normal[joint], normal[following], b[joint], half[joint]
    cos, cross = (n0 * n1).sum(1, keepdim=True), n0[:, :1] * n1[:, 1:] - n0[:, 1:] * n1[:, :1]
    side = torch.where(cross > 0, -1.0, 1.0).to(b)                      # +1: the side of +normal is outside
    e0, e1, flip = side * n0, side * n1, side < 0
    sharp = (cos < torch.where(corner[following], 0.999, 0.7)[:, None])[:, 0]
    inner0, inner1 = v - h * e0, v - h * e1
    add(inner1[~sharp], inner0[~sharp], joint[~sharp], flip[~sharp])
    add(inner1[sharp], v[sharp], joint[sharp], flip[sharp])
    add(v[sharp], inner0[sharp], joint[sharp], flip[sharp])
    kind = torch.where(corner[following], style["join"][joint], ROUND)
    within = 2 <= (1 + cos[:, 0]) * style["miter"][joint].square()      # 1 / sin <= limit
    within &= 1 + cos[:, 0] > 1e-5        # the tip of a line that folds onto itself is lost to rounding
    miter = (kind == MITER) & within & (cos[:, 0] < 0.9999)
    tip = v + h * (e0 + e1) / (1 + cos).clamp_min(1e-6)
    add((v + h * e0)[miter], tip[miter], joint[miter], flip[miter])
    add(tip[miter], (v + h * e1)[miter], joint[miter], flip[miter])
    flat = ~miter & (kind != ROUND)
    add((v + h * e0)[flat], (v + h * e1)[flat], joint[flat], flip[flat])
    r = kind == ROUND
    return (joint[r], torch.atan2(cross.abs(), cos)[r], v[r], (h * e0)[r], (h * d[joint])[r], flip[r])


def add_caps(add, a, b, d, half, h, ends, heads, style):
    """Caps: at the end from +normal round to -normal, at the head in reverse.

    a, b, d, h [S, 2]: starts, ends, directions and half * normal of the segments; half [S, 1] of the width;
    ends, heads: the segments with a cap at their end, at their start.
    Returns the arcs of round caps, the arguments of add_arcs.
    """
    at = torch.cat([ends, heads])
    sign = torch.cat([torch.ones_like(ends), -torch.ones_like(heads)])[:, None].to(a)
    tips, across, ahead = torch.cat([b[ends], a[heads]]), sign * h[at], sign * half[at] * d[at]
    cap = style["cap"][at]
    square = cap == SQUARE
    push = torch.where(square[:, None], ahead, 0)
    plain = cap != ROUND
    add((tips + across + push)[plain], (tips - across + push)[plain], at[plain])
    add((tips + across)[square], (tips + across + ahead)[square], at[square])
    add((tips - across + ahead)[square], (tips - across)[square], at[square])
    c = ~plain
    return (at[c], torch.full_like(half[at[c]], math.pi), tips[c], across[c], ahead[c],
            torch.zeros_like(plain[c])[:, None])


def add_arcs(add, index, angle, centre, out, towards, flip, style):
    """Round joins and caps: arcs around centre [A, 2] that start along `out` and turn by angle [A, 1] to `towards`."""
    chords = (angle[:, 0].detach() / style["arc"][index]).ceil().clamp(1, 64).long()
    owner, k = expand(chords, MAX_CHORDS)
    part = take(angle, owner) / chords[owner, None]
    centre, out, towards = (take(x, owner) for x in (centre, out, towards))

    def on_arc(step):
        return centre + out * torch.cos(part * step[:, None]) + towards * torch.sin(part * step[:, None])
    add(on_arc(k), on_arc(k + 1), index[owner], flip[owner])
