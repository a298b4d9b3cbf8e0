"""Markers: the vertices of a path, and the moving matrices that carry a marker's content to them.

    ops = marker_ops(document, element, shape, matrix, style)        # at loading; see svg.document.Document
    matrices = Standing(places)(points, widths)                      # at every render, differentiable

Position and direction follow SVG 2, section 13.7, as in browsers: a vertex between two segments, the one that closes a
subpath included, is turned to the bisector of their directions.
"""
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from svg.outline import ANGLES, DIGITS, SVGError, affine, box_outline, fit, length, numbers
from svg.paint import Layer, Shape
from svg.segments import take
from svg.style import MARKERS, OWN

MARKED = {"path", "line", "polyline", "polygon"}      # the elements that have markers
NEAR = 1e-4                           # px; a control point this close to its vertex gives no direction
MAX_MARKERS = 5000                    # of a drawing
SEGMENTS = 3                          # segments to look back and ahead, as segments of no length have no direction
KEYWORDS = {"left": "0%", "top": "0%", "center": "50%", "right": "100%", "bottom": "100%"}        # of refX and refY


@dataclass(eq=False)
class Place:
    """One marker at one vertex of a shape."""
    shape: Shape
    frame: np.ndarray                     # the shape's rows of the point table -> pixels
    vertex: list                          # its point and those that give its direction, see `vertices`
    turn: float                           # radians
    auto: bool                            # whether to turn to the direction of the path
    factor: float                         # a unit of the marker in those of the point table, per stroke width
    width: int                            # row of the stroke widths; -1: none


def vertices(outline):
    """For every vertex: its point, then 3 SEGMENTS points, the first of which that differs from it gives the incoming
    direction, then as many for the outgoing direction; the vertex itself stands for none."""
    def padded(point, back, ahead):
        return [point, *((part + [point] * 3 * SEGMENTS)[:3 * SEGMENTS] for part in (back, ahead))]
    found = []
    for first, stop, start, closed in outline.drawn():
        own = outline.curves[first:stop]
        back = [[i for p, a, b, _ in own[max(k - SEGMENTS, 0):k][::-1] for i in (b, a, p)] for k in range(len(own) + 1)]
        ahead = [[i for _, a, b, q in own[k:k + SEGMENTS] for i in (a, b, q)] for k in range(len(own) + 1)]
        corners = [start, *(curve[3] for curve in own)]
        if closed:
            back[0], ahead[-1] = back[-1], ahead[0]
        if start in outline.returned:     # a line of no length closes the subpath
            corners, back, ahead = [*corners, start], [*back, back[-1]], [*ahead[:-1], [], ahead[0]]
        found += [padded(*vertex) for vertex in zip(corners, back, ahead, strict=True)
                  if vertex[0] not in outline.inside]
    return [[point, *back, *ahead] for point, back, ahead in found]


# ------------------------------------------------------------------ reading

def marker_ops(document, element, shape, matrix, style):
    """ops of the markers of a shape; matrix: of its local units to pixels."""
    source, found, ops = document.source, vertices(shape.outline), []
    for name, part in zip(MARKERS, (found[:1], found[1:-1], found[-1:]), strict=True):
        marker, what = source.link(style[name][0]), f"{name} on <{source.tag(element)}>"
        if marker is None or source.tag(marker) != "marker" or marker in document.active:
            continue                      # a marker cannot contain itself
        if document.carried is not None or name == "marker-mid" and shape.outline.inside:
            # an edited arc is saved as curves, between which any viewer would see vertices
            source.unsupported(what + (" with arcs" if document.carried is None else " in a marker or a pattern"))
            document.paints.settled[element, name] = "none"
            continue
        shape.marked = True
        document.markers += len(part)
        if document.markers > MAX_MARKERS:
            raise SVGError(f"more than {MAX_MARKERS} markers to draw")
        if not part:
            continue
        ops += standing(document, marker, element, name, [Place(shape, None, v, 0.0, False, 1.0, -1) for v in part],
                        matrix, style)
    return ops


def standing(document, marker, element, name, places, matrix, style):
    """ops of one marker at its places, whose geometry is filled in here."""
    source, props = document.source, document.styles.of(marker)
    for key in ("opacity", "clip-path", "mask", "filter", "mix-blend-mode"):
        if props.get(key, OWN[key]).lower() != OWN[key]:
            source.unsupported(f"{key} on <marker>")
    inside, shape = document.context(marker, style), places[0].shape
    width, height = (source.units(marker.get(f"marker{side}", "3"), side.lower(), inside)
                     for side in ("Width", "Height"))
    view, fitted = numbers(marker.get("viewBox")), affine()
    if min(width, height) <= 0 or len(view) == 4 and min(view[2:]) <= 0:
        return []
    if len(view) == 4:
        fitted = fit(view, marker.get("preserveAspectRatio"), 0.0, 0.0, width, height)
    size = view[2:] if len(view) == 4 else [width, height]
    ref = [length(KEYWORDS.get(text.strip(), text), of, 0.0, float(inside["font-size"][0])) +
           (start if text.strip() in KEYWORDS else 0.0) for text, of, start in
           zip((marker.get("refX", "0"), marker.get("refY", "0")), size, view[:2] or (0.0, 0.0), strict=True)]
    start = affine(*[1, 0, 0, 1], *-(fitted @ (*ref, 1))[:2])
    row, factor = -1, shape.scale
    if marker.get("markerUnits") != "userSpaceOnUse":
        stroke = source.units(style["stroke-width"][0], "stroke-width", style, 1.0)
        if stroke <= 0:
            return []
        row = document.paints.slot("widths", document.paints.owner(element, "stroke-width", style), "stroke-width",
                                   (stroke, shape.scale))
        factor = shape.scale / document.paints.tables["widths"][row][1]
    orient = marker.get("orient", "0").strip()
    angle = re.fullmatch(DIGITS + "([a-zA-Z]*)", orient)
    turn = float(angle[1]) * ANGLES.get(angle[2].lower(), 0) if angle else 0.0
    for place in places:
        place.frame, place.factor, place.width = Layer(shape, matrix).frame, factor, row
        place.auto = orient in ("auto", "auto-start-reverse")
        place.turn = math.pi if orient == "auto-start-reverse" and name == "marker-start" else math.radians(turn)
    inside = {**inside, "viewport": (tuple(size), marker), "context": (style, element)}
    points = (np.array(shape.outline.points) - shape.origin) * shape.scale
    widths = [w * scale for w, scale in document.paints.tables["widths"]]
    steps = Standing(places, 0)(*(torch.tensor(np.array(x)) for x in (np.stack([points.real, points.imag], 1), widths)))
    document.follow(marker)
    ops = []
    for place, step in zip(places, steps.numpy(), strict=True):
        step = np.vstack([step, (0, 0, 1)]) @ start
        first, end, document.carried = len(document.layers), len(document.drawn), place
        drawn = [op for child in marker for op in document.visit(child, step @ fitted, inside, False)]
        del document.drawn[end:]
        masks = []
        if props.get("overflow", "hidden").lower() in ("hidden", "scroll", "clip"):
            frame = document.shape(None, box_outline(0, 0, width, height), step) if drawn else None
            masks = [[("push", 1), document.add(Layer(frame, step)), ("mask", None)]] if frame else []
        ops += document.isolate(drawn, None, masks, False)
        for layer in document.layers[first:]:
            layer.place = place
    document.carried = None
    document.active.pop()
    return ops


# ------------------------------------------------------------------ rendering

class Standing(torch.nn.Module):
    """The places of markers as tables; the matrices that carry their content follow points and stroke widths."""

    def __init__(self, places, first=None):
        """first: the first row of the shapes in the table of points; None: their own."""
        super().__init__()
        rows = [np.array(p.vertex) + (p.shape.first if first is None else first) for p in places]
        for name, values in dict(rows=rows, width=[p.width for p in places], auto=[p.auto for p in places],
                                 turn=[p.turn for p in places], factor=[p.factor for p in places],
                                 frame=[p.frame[:2] for p in places]).items():
            self.register_buffer(name, torch.tensor(np.array(values)), persistent=False)

    def forward(self, points, widths):
        """[K, 2, 3] from points [N, 2] and widths [W]: the markers' units, turned and moved to the vertices -> pixels.
        """
        at, *others = take(points, self.rows).split([1, 3 * SEGMENTS, 3 * SEGMENTS], 1)
        (came, has_come), (goes, will_go) = self.angle(at - others[0]), self.angle(others[1] - at)
        came, goes = torch.where(has_come, came, goes), torch.where(will_go, goes, came)
        # a path that turns back exactly has two bisectors: rounding must not choose between them
        came = torch.where((came - goes).detach().abs() > math.pi + 1e-3, came + 2 * math.pi, came)
        angle = self.turn + torch.where(self.auto, (came + goes) / 2, 0)
        size = torch.cat([widths, widths.new_ones(1)])
        size = self.factor * take(size, self.width).clamp_min(1e-6)
        cos, sin = size * torch.cos(angle), size * torch.sin(angle)
        turned = torch.stack([cos, -sin, at[:, 0, 0], sin, cos, at[:, 0, 1]], 1).view(-1, 2, 3)
        return self.frame[:, :, :2] @ turned + F.pad(self.frame[:, :, 2:], (2, 0))

    @staticmethod
    def angle(ways):
        """Directions [K] of the first of the ways [K, C, 2] that have a length, and whether there is one [K]."""
        long = ways.detach().norm(dim=2) > NEAR
        first = long.long().argmax(1)[:, None, None].expand(-1, 1, 2)
        found = long.any(1)
        way = torch.where(found[:, None], ways.gather(1, first)[:, 0], ways.new_tensor([1.0, 0.0]))
        return torch.atan2(way[:, 1], way[:, 0]), found
