"""Circles, ellipses, rectangles and straight lines that an edit keeps in form unless it pushes hard: see Forms."""
import numpy as np
import torch

TAGS = {"circle", "ellipse", "rect"}
TOLERANCE = 0.01                      # of half the size of a subpath, within which it is an ellipse or a parallelogram


class Forms:
    """How far the circles, ellipses and rectangles of a drawing are from affine images of themselves, and its straight
    lines from lines.

    The displacements of a form's points are split into an affine map of their places, by least squares, and a rest;
    those of a line into the one that its ends have, linear in between, and a rest. `shrink_` takes the proximal step of
    a group lasso (Yuan and Lin 2006) on the rests, as SteadyAdam does on the rows of what is sparse: after a weak push,
    such as noise, an ellipse is left, while a strong one still makes an apple of it. Large forms are firmer than small
    ones, as under the spring: a head stays round, while eyes become sunglasses.
    """
    LINES = 0.3                       # share of the step for lines; with more, gaps open to curves that lie along them

    def __init__(self, found, lines, points, frames, firmness=None):
        """
        Args:
            found, lines: for each form and each line the list of the rows of its points, from end to end of a line.
            points: [N,2] at rest, in their shapes' coordinates; frames: [N,2,2], displacements there -> in pixels.
            firmness: [N,1], the same for all points of a form: a factor on the step of each, see svg.details; None: 1.
        """
        self.points, groups = points, [*found, *lines]
        firm = [1.0 if firmness is None else firmness[rows[0], 0].item() for rows in found]
        self.strength = points.new_tensor(firm + [self.LINES] * len(lines))
        self.rows = torch.tensor([row for rows in groups for row in rows], dtype=torch.long, device=points.device)
        self.owner = torch.tensor([number for number, rows in enumerate(groups) for _ in rows], dtype=torch.long,
                                  device=points.device)
        self.size = torch.bincount(self.owner, minlength=len(groups)).to(points)
        # the part that is let be: sum_k basis_k (sum over the points of dual_k displacement)
        self.frames, self.basis, self.dual = frames[self.rows], *points.new_zeros(2, len(self.rows), 3)
        stops = np.cumsum([0, *map(len, groups)])
        for number, rows in enumerate(groups):
            own, x = slice(stops[number], stops[number + 1]), points[rows].double()
            if number < len(found):
                x = torch.cat([x - x.mean(0), torch.ones_like(x[:, :1])], 1)
                self.basis[own] = torch.linalg.qr(x / x.norm(dim=0).clamp_min(1e-12))[0].to(points)
                self.dual[own] = self.basis[own]
            else:
                along = ((x - x[0]) @ (x[-1] - x[0]) / (x[-1] - x[0]).square().sum()).to(points)
                self.basis[own, 0], self.basis[own, 1] = 1 - along, along
                self.dual[stops[number], 0] = self.dual[stops[number + 1] - 1, 1] = 1

    def rests(self, points):
        """The rests of the displacements of the forms' and lines' points, [M,2] for `rows`, in their shapes'
        coordinates, and their root mean square in pixels for each form and line [F]."""
        moved = (points - self.points)[self.rows]
        maps = self._sum(self.dual[:, :, None] * moved[:, None])
        rest = moved - (self.basis[:, :, None] * maps[self.owner]).sum(1)
        square = (self.frames @ rest[..., None]).square().sum((1, 2))
        return rest, (self._sum(square) / self.size).sqrt()

    @torch.no_grad()
    def shrink_(self, points, by):
        """Shorten the rests of points [N,2] by so many pixels times the firmness, in the root mean square of each form;
        of lines by LINES of that, whatever their size."""
        rest, away = self.rests(points)
        lost = (by * self.strength / away.clamp_min(1e-12)).clamp_max(1)
        points.index_add_(0, self.rows, -lost[self.owner, None] * rest)

    def _sum(self, values):
        """The sums [F,...] over the points of each form of values [M,...]."""
        return values.new_zeros(len(self.size), *values.shape[1:]).index_add_(0, self.owner, values)


def forms(document):
    """The rows of the points of the forms of a drawing, and of its straight lines, two lists of lists.

    Forms are circles, ellipses and rectangles, and the subpaths of paths and polygons that are ellipses or
    parallelograms; rounded rectangles are found as <rect> alone. Lines are those that were split, in other shapes.
    """
    found, lines = [], []
    for shape in document.shapes:
        if shape.element is None:
            continue
        outline, known = shape.outline, document.source.tag(shape.element) in TAGS
        points, curves = np.array(outline.points), np.array(outline.curves)
        for start, stop, _, _ in outline.drawn():
            own = curves[start:stop]
            if known or is_ellipse(points[own]) or is_parallelogram(points[own]):
                rows = np.unique(own)
                if len(rows) > 3:         # an affine map can do anything with three points
                    found.append((shape.first + rows).tolist())
                continue
            ends = [k for k in range(len(own)) if own[k, 3] not in outline.inside]
            for first, last in zip([0, *(k + 1 for k in ends)], ends, strict=False):
                part = own[first:last + 1]
                if len(part) > 1 and is_line(points[part]):
                    lines.append((shape.first + np.append(part[:, :3], part[-1, 3])).tolist())
    return found, lines


def is_line(curves):
    """Whether cubics [K,4], complex, lie on the straight line between their ends."""
    way = curves[-1, 3] - curves[0, 0]
    return bool(abs(way) > 0 and np.abs(((curves - curves[0, 0]) / way).imag).max() < 1e-6)


def is_ellipse(curves):
    """Whether cubics [K,4], complex, go around an ellipse: a conic is fitted to points on them."""
    t = np.linspace(0, 1, 5)[:-1, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3], 1)
    z = (curves @ weights.T).ravel()
    z = z - z.mean()
    size = np.abs(z).max(initial=0)
    if len(z) < 8 or not size or abs(curves[-1, 3] - curves[0, 0]) > TOLERANCE * size:
        return False
    x, y = z.real / size, z.imag / size
    terms = np.stack([x * x, x * y, y * y, x, y], 1)
    a, b, c, d, e = conic = np.linalg.lstsq(terms, np.ones_like(x), rcond=None)[0]
    value = terms @ conic - 1
    slope = np.hypot(2 * a * x + b * y + d, 2 * c * y + b * x + e)
    return bool(4 * a * c > b * b and np.all(np.abs(value) < TOLERANCE * slope))


def is_parallelogram(curves):
    """Whether cubics [K,4], complex, are the four sides of a parallelogram, each of one or more straight pieces."""
    ways = curves[:, 3] - curves[:, 0]
    curves, ways = curves[np.abs(ways) > 0], ways[np.abs(ways) > 0]
    if len(ways) < 4:
        return False
    size, unit = np.abs(curves - curves.mean()).max(), ways / np.abs(ways)
    beside = np.abs(((curves - curves[:, :1]) / unit[:, None]).imag)
    corner = np.abs((np.roll(unit, 1) / unit).imag) > TOLERANCE
    if beside.max() > TOLERANCE * size or corner.sum() != 4:
        return False
    a, b, c, d = curves[corner, 0]
    return bool(abs(a - b + c - d) < TOLERANCE * size)
