"""Mirror images within a drawing, which an edit keeps alike unless it pushes hard: outlines and paints.

    mirrored = symmetry(svg)                          # {"points": Outlines, "colours": Twins, ...}
    mirrored["points"].shrink_(svg.points, 0.1)       # up to a tenth of a pixel closer to a mirror image

Faces are symmetric, but the noises of an edit are not: one eye grows more than the other, a mouth hangs to one side.
Subpaths that mirror each other, or themselves, about an upright axis are therefore found before an edit, and the
displacements of each pair and the changes of its paints and stroke widths are split into a symmetric part and a rest.
`shrink_` takes the proximal step of a group lasso (Yuan and Lin 2006) on the rests, as Forms does on those of circles:
both halves share their noise, while a strong push may still tell them apart.
"""
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from svg.constraints import places

NEAR, FAR, AWAY = 0.005, 0.06, 0.13       # how far an image may lie from its outline: at least and at most so many
                                          # sides of the picture, in between so much of the span of the subpath more
SHARE = 0.5                               # of the areas of all bounding boxes that a drawing's axis has to mirror
SAME = 0.1                                # distance of equal colours, each channel in [0, 1], offsets and opacities;
                                          # share by which equal stroke widths may differ
AXES, SAMPLES, CHORDS = 4, 48, 6          # axes that are tried, points compared, chords of a curve


def symmetry(svg):
    """{"points": Outlines, and Twins by the name of their parameter} of a svg_raster.SVG before its edit, as far as it
    has some; what its constraints hold in place mirrors nothing."""
    rest, frames, _ = places(svg.layers, svg.frames.cpu(), svg.loaded["points"].cpu(), 0)
    found = subpaths(svg, rest.double().numpy())
    _, pairs = axis_of(found, svg.size)
    fixed = np.array(svg.constraints.fixed.get("points", ()) if svg.constraints else ())
    free = [not np.isin(path.rows, fixed).any() for path in found]
    pairs = {pair: way for pair, way in pairs.items() if free[pair[0]] and free[pair[1]]}
    held = {name: Twins(svg.loaded[name].to(getattr(svg, name)), rows)
            for name, rows in twins(svg, mirrored(found, pairs)).items()}
    return held | ({"points": Outlines(svg, frames, found, pairs)} if pairs else {})


class Outlines:
    """How far the displacements of a drawing's points are from mirror images of each other."""

    def __init__(self, svg, frames, found, pairs):
        """frames [N,2,2]: displacements of the points -> in pixels; found, pairs: Subpaths, and see `axis_of`."""
        groups = {pair: number for number, pair in enumerate(dict.fromkeys(map(frozenset, pairs)))}
        parts = [images(found[a], found[b], way) for (a, b), way in pairs.items()]
        owner = np.repeat([groups[frozenset(pair)] for pair in pairs], [len(rows) for rows, *_ in parts])
        rows, of, share = (np.concatenate(x) for x in zip(*parts, strict=True))
        self.rows, self.of, self.owner = (torch.tensor(x, device=svg.points.device) for x in (rows, of, owner))
        self.share = torch.tensor(share).to(svg.points)
        self.size = torch.bincount(self.owner).to(svg.points)
        self.rest, self.frames = svg.loaded["points"].to(svg.points), frames.to(svg.points)
        self.back = torch.linalg.inv(self.frames[self.rows])

    def rests(self, points):
        """The rests of the displacements of `rows`, [M,2] in pixels, and their root mean square for each pair [G]."""
        moved = (self.frames @ (points - self.rest)[..., None])[..., 0]
        image = (self.share[..., None] * moved[self.of]).sum(1) * moved.new_tensor([-1.0, 1.0])
        rest = (moved[self.rows] - image) / 2
        square = rest.new_zeros(len(self.size)).index_add_(0, self.owner, rest.square().sum(1))
        return rest, (square / self.size).sqrt()

    @torch.no_grad()
    def shrink_(self, points, by):
        """Shorten the rests of points [N,2] by so many pixels, in the root mean square of each pair."""
        rest, away = self.rests(points)
        lost = (by / away.clamp_min(1e-12)).clamp_max(1)[self.owner, None] * rest
        points.index_add_(0, self.rows, -(self.back @ lost[..., None])[..., 0])


class Twins:
    """How far the changes of equal paints, or stroke widths, of mirror images are from each other."""

    def __init__(self, start, pairs):
        """start [C,D] or [C]: the values before an edit; pairs: of their rows, none of which recurs."""
        self.start, self.pairs = start, torch.tensor(pairs, device=start.device).T

    @torch.no_grad()
    def shrink_(self, values, by):
        """Bring the changes of values [C,D] or [C] closer to the mean of each pair, both by so much."""
        moved = (values - self.start)[self.pairs]
        rest = ((moved[0] - moved[1]) / 2).view(len(moved[0]), -1)
        lost = rest * (by / rest.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
        values.index_add_(0, self.pairs.flatten(), torch.cat([-lost, lost]).view(-1, *values.shape[1:]))


# ------------------------------------------------------------------ what mirrors what

class Subpath(NamedTuple):
    """A subpath of a drawing in pixels; positions along it go from 0 to 1.

    shape: its number; rows [P], at [P]: its points and their positions; closed: whether it is; line [C+1], along [C+1]:
    a polyline, complex, and its positions; box: least x, least y, greatest x, greatest y.
    """
    shape: int
    rows: np.ndarray
    at: np.ndarray
    closed: bool
    line: np.ndarray
    along: np.ndarray
    box: np.ndarray

    def points(self, where):
        """Complex points [N] at positions [N]."""
        where = where % 1 if self.closed else where
        return np.interp(where, self.along, self.line.real) + 1j * np.interp(where, self.along, self.line.imag)

    def nearest(self, point, away):
        """Positions of a closed subpath within so many pixels of a point: where it comes closest, and at intervals."""
        ways = np.diff(self.line)
        share = (((point - self.line[:-1]) * ways.conj()).real / np.maximum(np.abs(ways) ** 2, 1e-12)).clip(0, 1)
        distances = np.abs(self.line[:-1] + share * ways - point)
        closest = (distances <= np.minimum(np.roll(distances, 1), np.roll(distances, -1))) & (distances < away)
        spread = np.linspace(0, 1, 4 * SAMPLES, endpoint=False)
        spread = spread[np.abs(self.points(spread) - point) < away]
        return np.append((self.along[:-1] + share * np.diff(self.along))[closest], spread)


class Alignment(NamedTuple):
    """What is at position s of a subpath has its image at start + way s of another one; way is 1 or -1.

    error: the greatest distance of the two in pixels.
    """
    start: float
    way: int
    error: float


def subpaths(svg, rest):
    """The Subpaths of a drawing; rest [N,2]: where its points lie in pixels. What is filled is closed."""
    found, rest = [], rest[:, 0] + 1j * rest[:, 1]
    filled = {id(layer.shape) for layer in svg.layers if layer.stroke is None}
    t = np.linspace(0, 1, CHORDS + 1)[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3], 1)
    for number, shape in enumerate(svg.document.shapes):
        for start, stop, _, closed in shape.outline.drawn() if shape.element is not None else ():
            curves = shape.first + np.array(shape.outline.curves[start:stop])
            pieces = rest[curves] @ weights.T                         # [K, CHORDS + 1]
            line = np.append(pieces[:, :-1], pieces[-1, -1])
            closed = closed or id(shape) in filled or abs(line[0] - line[-1]) < 1e-6
            line = np.append(line, line[:1]) if closed and line[0] != line[-1] else line
            along = np.append(0, np.abs(np.diff(line)).cumsum())
            if along[-1] < 1e-6:
                continue
            along, straight = along / along[-1], curves[:, 0] == curves[:, 1]
            at = along[np.arange(len(curves))[:, None] * CHORDS + np.array([0, CHORDS // 3, 2 * CHORDS // 3, CHORDS])]
            at[straight, 1:3] = at[straight][:, [0, 3]]
            rows, first = np.unique(curves, return_index=True)
            box = np.array([line.real.min(), line.imag.min(), line.real.max(), line.imag.max()])
            found.append(Subpath(number, rows, at.ravel()[first], closed, line, along, box))
    return found


def axis_of(found, side):
    """The upright axis of Subpaths in a picture of that side, and their pairs {(a, b): alignment}, both ways round.

    The axes that are tried are the middle of all and those of the subpaths that cover the most; one is the better the
    more it mirrors and the closer the images are. Without one that mirrors SHARE of the drawing: None and {}.
    """
    if not found:
        return None, {}
    boxes = np.array([path.box for path in found])
    areas, middles = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), (boxes[:, 0] + boxes[:, 2]) / 2
    cover = Counter({((boxes[:, 0].min() + boxes[:, 2].max()) / 2).round(1): np.inf})
    for middle, area in zip(middles.round(1), areas, strict=True):
        cover[middle] += area
    away = (NEAR * side + AWAY * np.sqrt(areas)).clip(max=FAR * side)
    best = 0.0, None, {}
    inside = [axis for axis, _ in cover.most_common() if 0 <= axis <= side]
    for axis in inside[:AXES]:
        pairs = pairs_about(axis, found, boxes, away)
        score = sum(areas[a] * (2 - way.error / away[a]) for (a, _), way in pairs.items())
        if score > best[0] and sum(areas[a] for a, _ in pairs) >= SHARE * areas.sum():
            best = score, axis, pairs
    return best[1:]


def pairs_about(axis, found, boxes, away):
    """{(a, b): alignment} of Subpaths with boxes [N,4] whose images lie within away [N] pixels; both ways round."""
    order, pairs, taken = np.argsort(boxes[:, 1], kind="stable"), {}, set()
    tops, flipped = boxes[order, 1], boxes * [-1, 1, -1, 1] + [2 * axis, 0, 2 * axis, 0]
    for a, image in enumerate(flipped[:, [2, 1, 0, 3]]):
        if a in taken:
            continue
        near = order[np.searchsorted(tops, image[1] - away[a]):np.searchsorted(tops, image[1] + away[a], "right")]
        distances = np.abs(boxes[near] - image).max(1)
        for b in near[np.argsort(distances, kind="stable")][:np.count_nonzero(distances < away[a])]:
            way = None if b in taken or b < a else alignment(found[a], found[b], axis, away[a])
            if way:
                pairs[a, b] = way
                pairs[b, a] = way._replace(start=way.start * -way.way if found[a].closed else way.start)
                taken |= {a, b}
                break
    return pairs


def alignment(a, b, axis, away):
    """The Alignment of Subpath b with the image of Subpath a, or None if they are not within so many pixels."""
    if a.closed != b.closed:
        return None
    s = np.linspace(0, 1, SAMPLES, endpoint=not a.closed)
    image, tried = 2 * axis - np.conj(a.points(s)), [(1.0, -1), (0.0, 1)]
    if a.closed:
        tried = [(start, way) for way in (-1, 1) for start in b.nearest(image[0], 2 * away)]
    errors = [np.abs(b.points(start + way * s) - image).max() for start, way in tried]
    return Alignment(*tried[int(np.argmin(errors))], min(errors)) if errors and min(errors) < away else None


def images(a, b, alignment):
    """Where the points of Subpath a have their images: rows [P] of a, rows [P,2] of b, and shares [P,2] of these.

    Between the points of b, handles as well as vertices, a displacement is linear in the position.
    """
    order = np.argsort(b.at, kind="stable")
    rows, at, where = b.rows[order], b.at[order], alignment.start + alignment.way * a.at
    if b.closed:
        where = where % 1
        rows, at = np.concatenate([rows[-1:], rows, rows[:1]]), np.concatenate([at[-1:] - 1, at, at[:1] + 1])
    after = np.searchsorted(at, where).clip(1, len(at) - 1)
    span = at[after] - at[after - 1]
    share = np.where(span > 1e-9, (where - at[after - 1]) / np.maximum(span, 1e-9), 0.5).clip(0, 1)
    return a.rows, np.stack([rows[after - 1], rows[after]], 1), np.stack([1 - share, share], 1)


def mirrored(found, pairs):
    """[(shape, shape)] of different shapes all of whose Subpaths mirror those of the other."""
    count, shared = Counter(path.shape for path in found), Counter()
    for a, b in pairs:
        shared[found[a].shape, found[b].shape] += 1
    return [(a, b) for (a, b), number in shared.items() if a < b and number == count[a] == count[b]]


def twins(svg, shapes):
    """{name of a parameter: [(row, row)]} of equal paints and stroke widths of shapes that mirror each other."""
    layers, found, taken = {}, {}, set()
    for layer in svg.layers:
        layers.setdefault(id(layer.shape), []).append(layer)
    for pair in shapes:
        a, b = (layers.get(id(svg.document.shapes[number]), []) for number in pair)
        for ours, theirs in zip(map(rows_of, a), map(rows_of, b), strict=True) if len(a) == len(b) else ():
            for name, rows in ours.items():
                both = [*zip(rows, theirs[name], strict=True)] if len(rows) == len(theirs[name]) else []
                both = [pair for pair in both if pair[0] != pair[1]]
                used = {(name, row) for pair in both for row in pair}
                if both and taken.isdisjoint(used) and alike(name, *svg.loaded[name][torch.tensor(both).T]):
                    found.setdefault(name, []).extend(both)
                    taken |= used
    return found


def rows_of(layer):
    """{name of a parameter: the rows that a layer is painted with}."""
    stops = [*layer.gradient.stops] if layer.gradient else []
    return dict(colours=[layer.colour] if layer.colour >= 0 else [], stop_colours=stops, stop_offsets=stops,
                stroke_widths=[layer.stroke["width"]] if layer.stroke else [], opacities=layer.opacities)


def alike(name, a, b):
    """Whether the values a and b of a parameter are equal for `twins`, all rows of them."""
    distance = (a - b).view(len(a), -1).norm(dim=1)
    return bool((distance <= (SAME * a if name == "stroke_widths" else SAME)).all())
