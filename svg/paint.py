"""Shapes, layers and their paint: colours, gradients and strokes as rows of parameter tables."""
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field

import numpy as np

from svg.outline import (
    Outline,
    SVGError,
    affine,
    length,
    linear_unit,
    numbers,
    radial_unit,
    transform,
)
from svg.style import URL, colour

MAX_REFERENCES = 30                   # nested references
FAR = 1 << 14                         # px; a shape further away is stored relative to an origin of its own
MAX_COORDINATE = 1e6                  # px; further away float32 cannot place an edge to a tenth of a pixel
GRADIENTS = {"linearGradient", "radialGradient"}


@dataclass
class Shape:
    """The geometry of an element: an outline in local units, and the place of its points in the point table."""
    element: ET.Element | None            # None: the rectangle of a nested viewport, which is not optimised
    outline: Outline
    scale: float                          # pixels (at the drawing's size) of one local unit, at its first use
    first: int                            # its first row in the point table
    origin: complex = 0j                  # subtracted from far-away points, which float32 would round
    marked: bool = False                  # whether markers stand on its vertices

    @property
    def rows(self):
        """Its rows of the point table."""
        return slice(self.first, self.first + len(self.outline.points))

    def local(self, table):
        """Complex numbers in local units for the shape's rows of a point table; None: as in the file."""
        if table is None or self.element is None:
            return None
        points = table[self.rows] / self.scale
        return points[:, 0] + 1j * points[:, 1] + self.origin


@dataclass
class Gradient:
    """A gradient without the values of its stops, which are parameters."""
    stops: list                           # rows of the stop tables
    unit: np.ndarray                      # gradient coordinates -> t along x, or the unit circle
    focus: tuple | None                   # None: linear
    spread: str
    on_box: bool                          # objectBoundingBox units


@dataclass
class Layer:
    """A fill or stroke of a shape, with indices into the parameter tables."""
    shape: Shape
    matrix: np.ndarray                    # local units -> pixels at the drawing's size
    rule: str = "nonzero"
    colour: int = -1                      # -1: clip geometry, or a gradient
    gradient: Gradient | None = None
    opacities: list = field(default_factory=list)
    stroke: dict | None = None
    picture: object = None                # an embedded one, see svg.images
    place: object = None                  # a marker or a pattern's tile that it is part of and moves with

    @property
    def frame(self):
        """Matrix from the shape's rows of the point table to pixels."""
        start = affine(e=self.shape.origin.real, f=self.shape.origin.imag)
        return self.matrix @ start @ np.diag([1 / self.shape.scale, 1 / self.shape.scale, 1])


def share(text):
    """An opacity as a number in [0, 1]; 1 where it cannot be read."""
    return min(max(length(text, default=1.0), 0.0), 1.0)


class Paints:
    """Reads the paint of layers into tables of initial values, one row for each parameter.

    tables: colours (r, g, b), opacities, widths (local units, pixels per unit) and stops (offset, r, g, b, a).
    slots: (table, element, property) -> row; the place in the file that a row is written back to.
    """

    def __init__(self, source):
        self.source, self.styles = source, source.styles
        self.tables = {kind: [] for kind in ("colours", "opacities", "widths", "stops")}
        self.slots, self.gradients = {}, {}
        self.settled = {}                 # (shape, property) -> value to write where the shape's outline is written
        # elements that `use` may draw several times: inherited properties belong to the element that sets them
        targets = (source.reference(e) for e in source.elements if source.tag(e) == "use")
        self.shared = {part for target in set(targets) - {None} for part in target.iter()}

    def slot(self, kind, element, name, value):
        """Row of a parameter that is written back to this property of this element."""
        key = (kind, element, name)
        if key not in self.slots:
            self.slots[key] = len(self.tables[kind])
            self.tables[kind].append(value)
        elif kind == "widths" and abs(self.tables[kind][self.slots[key]][0] - value[0]) > 1e-6 * value[0]:
            self.source.unsupported(f"one {name} of <{self.source.tag(element)}> that means different lengths")
        return self.slots[key]

    def owner(self, element, name, style):
        """The element a property is written back to: the shape or, if it is shared, the one that set the property."""
        return style[name][1] if element in self.shared else element

    def paint(self, layer, element, name, style):
        """Set the layer's colour or gradient and its opacity; name: fill or stroke. False if there is no paint."""
        value = style[name][0]
        source, fallback = self.source.link(value), re.match(URL + r"\s*(.*)", value)
        owner, alpha, tag = self.owner(element, name, style), 1.0, "" if source is None else self.source.tag(source)
        if tag in GRADIENTS:
            layer.gradient = self.gradient(source, style)
            if layer.gradient is None:
                return False
            points = np.array(layer.shape.outline.points)
            if layer.gradient.on_box and min(np.ptp(points.real), np.ptp(points.imag)) == 0:
                layer.gradient = None     # a box without area has no units: use the fallback
        if tag == "pattern" or tag in GRADIENTS and layer.gradient is None:
            self.settled[element, name] = fallback[2] or "none"       # its box may get an area
        elif tag.lower() in ("meshgradient", "mesh", "hatch"):
            self.source.unsupported(f"a {tag} as {name} on <{self.source.tag(element)}>")
            return False
        if layer.gradient is None:
            alpha = self.solid(layer, element, name, style, (fallback[2] if fallback else value).lower())
            if alpha is None:
                return False
        key = name + "-opacity"
        alpha *= share(style[key][0])
        owner = owner if owner is element else style[key][1]
        layer.opacities.append(self.slot("opacities", owner, key, alpha))
        return True

    def solid(self, layer, element, name, style, value):
        """Set the layer's colour to a value in lower case and return its alpha; None if it is no colour."""
        if value in ("context-fill", "context-stroke") and "context" in style:
            style, user = style["context"]            # a marker takes the colour of the shape it stands on
            name, value = value[8:], style[value[8:]][0].lower()
            alpha = self.solid(layer, user, name, style, value)
            if alpha is not None and alpha < 1 or self.source.link(value) is not None:
                self.source.unsupported(f"context-{name} of a gradient, a pattern or a translucent colour")
            return alpha
        if value.startswith("context-"):
            self.source.unsupported(f"{value} on <{self.source.tag(element)}>")
        rgba = colour(style["color"][0] if value == "currentcolor" else value)
        if rgba is None:
            return None
        if value == "currentcolor" and element in self.shared:        # each `use` may set another colour
            if rgba[3] < 1:
                self.source.unsupported("a translucent currentColor in <use>")
            layer.colour = self.slot("colours", style["color"][1], "color", rgba[:3])
        else:
            layer.colour = self.slot("colours", self.owner(element, name, style), name, rgba[:3])
        return rgba[3]

    def stroke(self, layer, element, style):
        """Set the layer's width, dashes, caps and joins, in local units. False if the stroke has no width."""
        def get(name):
            return style[name][0]

        def units(name, text, default):
            return float(np.clip(self.source.units(text, name, style, default), -MAX_COORDINATE, MAX_COORDINATE))
        width, dashes = self.source.units(get("stroke-width"), "stroke-width", style, 1.0), []
        if get("stroke-dasharray").lower() != "none":
            dashes = [abs(units("stroke-dasharray", text, 0.0)) for text in
                      re.split(r"[\s,]+", get("stroke-dasharray"))]
            dashes = dashes * (1 + len(dashes) % 2) if sum(dashes) > 0 else []
        if width <= 0:
            return False
        if dashes and min(numbers(element.get("pathLength")) or [-1]) >= 0:
            self.source.unsupported(f"pathLength with dashes on <{self.source.tag(element)}>")
        scale = layer.shape.scale
        if width * max(scale, np.linalg.norm(layer.matrix[:2, :2], 2)) > MAX_COORDINATE:
            raise SVGError(f"a stroke is wider than {MAX_COORDINATE:g} px")
        row = self.slot("widths", self.owner(element, "stroke-width", style), "stroke-width", (width, scale))
        layer.stroke = dict(
            width=row, cap=get("stroke-linecap").lower(), join=get("stroke-linejoin").lower(), dashes=dashes,
            miter=max(1.0, length(get("stroke-miterlimit"), default=4.0)),
            offset=units("stroke-dashoffset", get("stroke-dashoffset"), 0.0))
        return True

    def gradient(self, element, style):
        """Gradient of the element, including what it inherits through href; None if it has no stops."""
        key = (element, style["viewport"][0], style["font-size"][0])
        if key in self.gradients:
            return self.gradients[key]
        chain = self.chain(element)
        for link in chain:
            if "transform" in self.styles.of(link):
                self.source.unsupported(f"a transform by CSS on <{self.source.tag(link)}>")
            if self.styles.computed(link, "color-interpolation").lower() == "linearrgb":
                self.source.unsupported(f"color-interpolation on <{self.source.tag(link)}>")

        def inherited(name, default):
            return next((e.get(name) for e in chain if e.get(name) is not None), default)
        on_box = inherited("gradientUnits", "") != "userSpaceOnUse"

        def get(name, default):
            text = inherited(name, default)
            return None if text is None else length(text) if on_box else self.source.units(text, name, style)
        if (get("fr", "0") or 0) > 0:
            self.source.unsupported("fr on <radialGradient>")
        rows, focus = self.stops(chain), None
        if self.source.tag(element) == "linearGradient":
            unit = linear_unit(get("x1", "0"), get("y1", "0"), get("x2", "100%"), get("y2", "0"))
        else:
            unit, focus = radial_unit(get("cx", "50%"), get("cy", "50%"), get("r", "50%"), get("fx", None),
                                      get("fy", None))
        own = transform(inherited("gradientTransform", ""))
        if not np.abs(np.stack([unit, own])).max() < 1e12:
            raise SVGError(f"gradient '#{element.get('id')}' is not finite or too large")
        found = None
        if rows and abs(np.linalg.det(own)) >= 1e-30:
            unit = unit @ np.linalg.inv(own)
            if not np.abs(unit).max() < 1e9:              # its square has to fit into float32
                raise SVGError(f"gradient '#{element.get('id')}' is not finite or too large")
            found = Gradient(rows, unit, focus, inherited("spreadMethod", "pad"), on_box)
        self.gradients[key] = found
        return found

    def chain(self, element):
        """The gradient and those it refers to, in order."""
        chain = [element]
        while (parent := self.source.reference(chain[-1])) is not None and self.source.tag(parent) in GRADIENTS:
            if parent in chain:
                raise SVGError(f"gradient '#{parent.get('id')}' refers to itself")
            if len(chain) > MAX_REFERENCES:
                raise SVGError(f"gradients nested deeper than {MAX_REFERENCES}")
            chain.append(parent)
        return chain

    def stops(self, chain):
        """Rows of the stops of the first gradient that has any."""
        stops = next((s for e in chain if (s := [c for c in e if self.source.tag(c) == "stop"])), [])
        rows, previous = [], 0.0
        for stop in stops:
            props = self.styles.of(stop)
            text = props.get("stop-color", "black")
            rgba = colour(self.styles.computed(stop, "color") if text.lower() == "currentcolor" else text)
            alpha = rgba[3] * share(props.get("stop-opacity"))
            previous = min(max(length(stop.get("offset")), previous), 1.0)
            rows.append(self.slot("stops", stop, "stop", (previous, *rgba[:3], alpha)))
        return rows
