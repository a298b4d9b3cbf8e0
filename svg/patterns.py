"""Patterns: every tile is drawn as separate layers, so that its shapes are optimised, too.

    ops = pattern_ops(document, layer, element, "fill", pattern, style)       # see svg.document.Document

Tiles in units of a bounding box follow the box of the moving shape.
"""
import re
from dataclasses import dataclass, field

import numpy as np
import torch

from svg.outline import SVGError, affine, box_outline, numbers, transform
from svg.paint import Layer, share

MAX_TILES, MAX_ALL_TILES = 1000, 10_000       # of a pattern on one shape, of a drawing
NOTHING = 1e-9                        # pixels per unit of a pattern that is too small to be visible


@dataclass
class Tiling:
    """The tiles of a pattern under one shape."""
    layer: int                            # number of the shape's layer
    scale: float                          # of its rows of the point table, per user unit
    matrix: np.ndarray                    # user space of the pattern, from the shape's origin -> pixels
    origin: tuple                         # of the shape
    tile: tuple                           # x, y, width, height of the first tile
    on_box: bool                          # whether these are shares of the shape's bounding box
    content_on_box: bool
    view: list | None                     # viewBox, which replaces the units of the content
    aspect: str                           # preserveAspectRatio
    cells: list                           # (column, row) of every tile
    places: list = field(default_factory=list)

    @property
    def moves(self):
        return self.on_box or self.content_on_box and self.view is None

    def matrices(self, low, high):
        """[2 T, 2, 3]: each tile's content, then each tile as the unit square -> pixels.

        low, high [2]: corners of the shape's bounding box, in user units from its origin.
        """
        of, box = low.new_tensor, high - low
        x, y, width, height = self.tile
        size = of([width, height]) * (box if self.on_box else 1)
        start = low + of([x, y]) * box if self.on_box else of([x, y]) - of(self.origin)
        start = start + of(self.cells).view(-1, 2) * size     # [T, 2]
        scale, shift = box if self.content_on_box else torch.ones_like(box), torch.zeros_like(box)
        if self.view is not None:
            scale = size / of(self.view[2:])
            align = re.search(r"x(Min|Mid|Max)Y(Min|Mid|Max)|none", self.aspect)
            if align is None or align[0] != "none":
                scale = (scale.amax() if "slice" in self.aspect else scale.amin()).expand(2)
                shares = of([dict(Min=0.0, Mid=0.5, Max=1.0)[k] for k in (align.groups() if align else ("Mid", "Mid"))])
                shift = shares * (size - scale * of(self.view[2:]))
            shift = shift - scale * of(self.view[:2])
        matrix = of(self.matrix[:2])
        found = []
        for stretch, moved in ((scale, start + shift), (size, start)):
            linear = matrix[:, :2] * stretch
            found.append(torch.cat([linear.expand(len(moved), 2, 2),
                                    (moved @ matrix[:, :2].T + matrix[:, 2])[:, :, None]], 2))
        return torch.cat(found)


@dataclass(eq=False)
class Tile:
    """One matrix of a tiling that carries layers."""
    tiling: Tiling


def pattern_ops(document, layer, element, name, pattern, style):
    """ops of a fill or stroke with a pattern: its tiles under the shape as a mask; None where the fallback applies."""
    if pattern in document.active:
        return []                         # it refers to itself
    source, chain, shape = document.source, [pattern], layer.shape
    while (parent := source.reference(chain[-1])) is not None and parent not in chain:
        chain.append(parent)

    def get(attribute, default=None):
        return next((e.get(attribute) for e in chain if e.get(attribute) is not None), default)
    on_box, content_on_box = (get(k, default) == "objectBoundingBox" for k, default in
                              (("patternUnits", "objectBoundingBox"), ("patternContentUnits", "userSpaceOnUse")))
    tile = tuple(source.units(get(k), k, style) if not on_box else source.units(get(k), k, {
        **style, "viewport": ((1.0, 1.0), None)}) for k in ("x", "y", "width", "height"))
    low, high = shape.outline.bounds()
    if (on_box or content_on_box) and min(high - low) <= 0:
        return None
    content = next((e for e in chain if any(source.tag(child) for child in e)), None)
    own = transform(get("patternTransform"))
    matrix, what = layer.matrix @ own, f"pattern {name} on <{source.tag(element)}>"
    if min(tile[2:]) <= 0 or content is None or np.sqrt(abs(np.linalg.det(matrix[:2, :2]))) <= NOTHING or \
            name == "stroke" and not document.paints.stroke(layer, element, style):
        return []
    view, origin = numbers(get("viewBox")), (shape.origin.real, shape.origin.imag)
    tiling = Tiling(-1, shape.scale, matrix @ affine(e=origin[0], f=origin[1]), origin, tile, on_box, content_on_box,
                    view if len(view) == 4 and min(view[2:]) > 0 else None, get("preserveAspectRatio", ""), [])
    if tiling.moves and document.carried is not None:
        source.unsupported(f"{what} in units of its box, in a marker or another pattern")
        return []
    box = low - origin, high - origin
    tiling.cells = cells_of(document, layer, tiling, own, matrix, box, what)
    document.tiles += len(tiling.cells)
    if document.tiles > MAX_ALL_TILES:
        raise SVGError(f"more than {MAX_ALL_TILES} tiles of patterns to draw")
    ops = tile_ops(document, pattern, content, style, tiling, box)
    key = name + "-opacity"
    owner = element if element not in document.paints.shared else style[key][1]
    layer.opacities.append(document.paints.slot("opacities", owner, key, share(style[key][0])))
    ops = document.isolate(ops, None, [[("push", 1), document.add(layer), ("mask", None)]], False)
    tiling.layer = len(document.layers) - 1
    return ops


def cells_of(document, layer, tiling, own, matrix, box, what):
    """(column, row) of the tiles that a layer may show, with half of its size around it to move in.

    own: the patternTransform; matrix: user space of the pattern -> pixels; box: see Tiling.matrices.
    """
    back, (x, y, width, height) = np.linalg.inv(matrix), tiling.tile
    low, high = layer.shape.outline.bounds(back @ layer.matrix)
    # tiles that follow the box need no margin, unless they are rotated relative to it
    around = (high - low) / 2 * (not tiling.on_box or not np.array_equal(own, np.eye(3)))
    if layer.stroke is not None:
        around = around + document.paints.tables["widths"][layer.stroke["width"]][0]
    low, high = low - around, high + around
    if document.carried is None and not tiling.on_box:        # otherwise it may move into the picture
        x0, y0, x1, y1 = document.frame
        seen = (back @ np.array([[x0, x1, x0, x1], [y0, y0, y1, y1], [1, 1, 1, 1]]))[:2]
        low, high = np.maximum(low, seen.min(1)), np.minimum(high, seen.max(1))
    corner, size = np.array([x, y]), np.array([width, height])
    if tiling.on_box:
        corner, size = box[0] + tiling.origin + corner * (box[1] - box[0]), size * (box[1] - box[0])
    first = np.floor((low - corner) / size + 1e-9)
    count = np.maximum(np.ceil((high - corner) / size - 1e-9) - first, 0)
    if not count.prod() <= MAX_TILES:
        document.source.unsupported(f"{what} of more than {MAX_TILES} tiles")
        return []
    return [(first[0] + i, first[1] + j) for j in range(int(count[1])) for i in range(int(count[0]))]


def tile_ops(document, pattern, content, style, tiling, box):
    """ops of all tiles, each clipped to its rectangle."""
    document.follow(pattern)
    inside, ops, carried = document.context(content, style), [], document.carried
    steps = tiling.matrices(*(torch.tensor(corner, dtype=torch.float64) for corner in box)).numpy()
    steps = np.concatenate([steps, np.tile([[[0.0, 0.0, 1.0]]], (len(steps), 1, 1))], 1)
    for step, frame in zip(*np.split(steps, 2), strict=True):
        places = (Tile(tiling), Tile(tiling))
        document.carried = places[0] if tiling.moves else carried
        first, end = len(document.layers), len(document.drawn)
        drawn = [op for child in content for op in document.visit(child, step, inside, False)]
        del document.drawn[end:]
        inner, shape = len(document.layers), document.shape(None, box_outline(0, 0, 1, 1), frame) if drawn else None
        if shape is not None:
            mask = [("push", 1), document.add(Layer(shape, frame)), ("mask", None)]
            ops += document.isolate(drawn, None, [mask], False, "plus")
        for number, layer in enumerate(document.layers[first:] if tiling.moves else (), first):
            layer.place = places[number >= inner]
        tiling.places.append(places)
    document.carried = carried
    document.active.pop()
    return ops
