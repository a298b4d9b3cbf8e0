"""Constraints on the edit of a drawing: what stays as it is in the file, and where its points lie in the picture."""
import math

import torch

from svg.outline import SVGError

# the table of start values (paint.Paints) -> the parameters made from it
PARAMETERS = dict(colours=["colours"], opacities=["opacities"], widths=["stroke_widths"],
                  stops=["stop_colours", "stop_offsets"])
SMOOTH = math.cos(math.radians(5))    # a joint is smooth where the curve turns by less


class Constraints:
    """What `project_` restores after every step: fixed rows of the parameters, opaque stops, smooth joints."""

    def __init__(self, document, loaded, opacities=False, only=None, joints=True):
        """loaded: {parameter: its values in the file}; the other arguments are those of SVG.restrict."""
        fixed = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in loaded.items()}
        self.loaded, self.opaque_stops = loaded, []
        if not opacities:
            fixed["opacities"] |= loaded["opacities"] == 1
            self.opaque_stops = (loaded["stop_colours"][:, 3] == 1).nonzero()[:, 0]
        if only is not None:
            changing = held_by(document, only)
            for shape in document.shapes:
                if shape.element is not None and shape.element not in changing:
                    fixed["points"][shape.rows] = True
            for (table, element, _), row in document.paints.slots.items():
                for name in PARAMETERS[table] if element not in changing else ():
                    fixed[name][row] = True
        self.fixed = {name: rows.nonzero()[:, 0] for name, rows in fixed.items() if rows.any()}
        self.joints = smooth_joints(document, loaded["points"]) if joints else None
        self.picture, self.bounds = document.frame, None

    def keep_inside(self, layers, frames):
        """Keep the points within the picture from now on; arguments as of `places`."""
        rest, turns, _ = places(layers, frames, self.loaded["points"], 0)
        low, high = torch.tensor(self.picture).view(2, 2)
        self.bounds = rest, turns, torch.linalg.inv(turns), torch.minimum(rest, low), torch.maximum(rest, high)

    @torch.no_grad()
    def apply_(self, svg):
        """Restore the constraints in the parameters of an SVG."""
        if self.bounds is not None:
            rest, turns, back, low, high = (x.to(svg.points.device) for x in self.bounds)
            moved = (svg.points - self.loaded["points"].to(svg.points)).unsqueeze(-1)
            beyond = rest + (turns @ moved)[..., 0]
            beyond = beyond - beyond.clamp(low, high)
            svg.points -= (back @ beyond[..., None])[..., 0]
        if self.joints is not None:
            straighten_(svg.points, *self.joints)
        svg.stop_colours[self.opaque_stops, 3] = 1
        for name, rows in self.fixed.items():
            p = getattr(svg, name)
            p[rows] = self.loaded[name][rows].to(p)


def held_by(document, ids):
    """The set of elements with these ids, their descendants and what they `use`. Raises SVGError for an unknown id."""
    source = document.source
    missing = [name for name in ids if name not in source.ids]
    if missing:
        known = [name for name in source.ids if name]
        raise SVGError(f"{document.name}: no element has the id '{missing[0]}'; "
                       f"there are: {', '.join(known) or 'none'}")
    held, open_ = set(), [source.ids[name] for name in ids]
    while open_:
        element = open_.pop()
        if element not in held:
            held.add(element)
            used = source.reference(element) if source.tag(element) == "use" else None
            open_ += [*element, *([used] if used is not None else [])]
    return held


def smooth_joints(document, points):
    """Joints at which the outline keeps its direction; points [N, 2] as in the file.

    Returns rows [J, 3] of points: before the joint, the joint, after it; straight [2, J] bool: the curve before, after
    the joint is a straight line, whose other end is a joint too and must not move.
    """
    found, straight = [], []
    for shape in document.shapes if len(points) else ():
        curves, first = shape.outline.curves, shape.first
        for start, stop, _, closed in shape.outline.drawn() if shape.element is not None else ():
            own = curves[start:stop]
            for before, after in zip(own, own[1:] + own[:1] * closed, strict=False):
                lines = before[0] == before[1], after[0] == after[1]
                if before[3] == after[0] and not all(lines):
                    found.append([first + before[0 if lines[0] else 2], first + after[0],
                                  first + after[3 if lines[1] else 1]])
                    straight.append(lines)
    rows = torch.tensor(found, dtype=torch.long).view(-1, 3)
    straight = torch.tensor(straight, dtype=torch.bool).view(-1, 2)
    a, p, b = points[rows].double().unbind(1)
    smooth = torch.cosine_similarity(p - a, b - p) > SMOOTH
    return rows[smooth], straight[smooth].T


def straighten_(points, rows, straight):
    """Turn the handles on both sides of every smooth joint onto one line; their lengths stay. See smooth_joints."""
    (before, joint, after), (line_before, line_after) = rows.to(points.device).T, straight.to(points.device)[..., None]
    back, ahead = points[joint] - points[before], points[after] - points[joint]
    way = torch.where(line_before, back, torch.where(line_after, ahead, back + ahead))
    way = way / way.norm(dim=1, keepdim=True).clamp_min(1e-6)
    points[before] -= torch.where(line_before, 0, back.norm(dim=1, keepdim=True) * way - back)
    points[after] += torch.where(line_after, 0, ahead.norm(dim=1, keepdim=True) * way - ahead)


def places(layers, frames, points, strokes):
    """Where the drawing's points lie in the picture, by the first layer that draws each.

    Args:
        layers: the layers; frames [L, 2, 3]: their shapes' coordinates -> pixels.
        points [N, 2]: control points in their shapes' coordinates.
        strokes: number of stroke widths.
    Returns:
        rest [N, 2] pixels, frames [N, 2, 2]: displacements of points -> displacements in the picture, and
        middle [strokes, 2] pixels: the centre of the points of every stroke.
    """
    rest, turns, middle = points.clone(), torch.eye(2).repeat(len(points), 1, 1), torch.zeros(strokes, 2)
    for layer, frame in zip(reversed(layers), frames.flip(0), strict=True):
        if layer.shape.element is not None:
            rows = layer.shape.rows
            turns[rows], rest[rows] = frame[:, :2], points[rows] @ frame[:, :2].T + frame[:, 2]
            if layer.stroke is not None and strokes:
                middle[layer.stroke["width"]] = rest[rows].mean(0)
    flat = torch.linalg.det(turns).abs() < 1e-9
    turns[flat] = torch.eye(2)            # the points of a shape drawn as a line cannot follow the picture
    return rest, turns, middle
