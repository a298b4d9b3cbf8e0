"""SVG files: from XML and CSS to layers that can be drawn, and from changed parameters back to the file.

    document = Document.load("apple.svg", skip_unsupported=False, size=256)
    document.layers, document.ops                      # what to draw, and in which order
    document.save("edited.svg", values, loaded)        # the same file, changed only where values differ from loaded

The way of the data: source (XML, references: svg_source.py) -> styles (svg_style.py) -> paint -> document (layers and
groups) -> the file written back. Coordinates are x right, y down.

Read as browsers do: SVG 1.1 and what SVG 2 changed in it. Elements and properties known to be missing here are refused
by name.
"""
import copy
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field

import numpy as np

from svg_outline import (GEOMETRY, SHAPES, THREE_D, TRANSFORM, Outline, SVGError, affine, box_outline, css_transform,
                         fit, length, linear_unit, matrix_text, numbers, origin, radial_unit, shape_outline, transform)
from svg_source import Source, write_file
from svg_style import INHERITED, MARKERS, OWN, REFUSED, URL, Styles, colour, declarations, path_data

MAX_SHAPES = 30_000
MAX_VISITS = 150_000                  # elements visited in all, those of `use` as often as they are used
MAX_REFERENCES = 30                   # how deep references may be nested
MAX_MEASURED = 30_000                 # shapes measured for the boxes of clip paths and masks
LENGTHS = set(GEOMETRY) - {"d", "points"}
RELATIVE = re.compile("%|e[mx]|ch", re.I)  # units that depend on where a length stands
NOTHING = 1e-9                        # pixels of a unit: a shape that has shrunk to nothing
MAX_COORDINATE = 1e6                  # px; beyond it float32 cannot place an edge to a tenth of a pixel


# ------------------------------------------------------------------ paint: colours, gradients, strokes

GRADIENTS = {"linearGradient", "radialGradient"}


@dataclass
class Shape:
    """Geometry of one element: an outline in local units, and where its points lie in the parameter."""
    element: ET.Element | None            # None: the frame of a nested viewport, which is not optimised
    outline: Outline
    scale: float                          # pixels (at the drawing's size) of one local unit, at its first use
    first: int                            # its first row in the point table


@dataclass
class Gradient:
    """Everything of a gradient but its stops' values, which are parameters."""
    stops: list                           # rows of the stop tables
    unit: np.ndarray                      # gradient coordinates -> t along x, or the unit circle
    focus: tuple | None                   # None: linear
    spread: str
    on_box: bool                          # objectBoundingBox units


@dataclass
class Layer:
    """One fill or stroke of one shape, with indices into the parameter tables."""
    shape: Shape
    matrix: np.ndarray                    # local units -> pixels at the drawing's size
    rule: str = "nonzero"
    colour: int = -1                      # -1: clip geometry, or a gradient
    gradient: Gradient | None = None
    opacities: list = field(default_factory=list)
    stroke: dict | None = None

    @property
    def frame(self):
        """Matrix that takes the shape's rows of the point table to pixels."""
        return self.matrix @ np.diag([1 / self.shape.scale, 1 / self.shape.scale, 1])


def share(text):
    """An opacity as a number in [0, 1]; 1 where it cannot be read."""
    return min(max(length(text, default=1.0), 0.0), 1.0)


class Paints:
    """Reads the paint of layers into tables of start values, one row for each parameter.

    tables: colours (r, g, b), opacities, widths (local units, pixels of one) and stops (offset, r, g, b, a).
    slots: (table, element, property) -> row, which says where a row is written back to.
    """

    def __init__(self, source):
        self.source, self.styles = source, source.styles
        self.tables = {kind: [] for kind in ("colours", "opacities", "widths", "stops")}
        self.slots, self.gradients = {}, {}
        # elements that `use` may draw several times: they share what they inherit, others own it
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
        """The element a property is written back to: the shape or, if shared, the one that set it."""
        return style[name][1] if element in self.shared else element

    def paint(self, layer, element, name, style):
        """Set the layer's colour or gradient and its opacity; name: fill or stroke. False where there is no paint."""
        value = style[name][0]
        source, fallback = self.source.link(value), re.match(URL + r"\s*(.*)", value)
        owner, alpha, tag = self.owner(element, name, style), 1.0, "" if source is None else self.source.tag(source)
        if tag in GRADIENTS:
            layer.gradient = self.gradient(source, style)
            if layer.gradient is None:
                return False
            points = np.array(layer.shape.outline.points)
            if layer.gradient.on_box and min(np.ptp(points.real), np.ptp(points.imag)) == 0:
                layer.gradient = None     # a box of no area has no units; the fallback holds
        elif tag == "pattern":
            self.source.unsupported(f"pattern {name} on <{self.source.tag(element)}>")
            return False
        if layer.gradient is None:
            value = (fallback[2] if fallback else value).lower()
            if value.startswith("context-"):
                self.source.unsupported(f"{value} on <{self.source.tag(element)}>")
            rgba = colour(style["color"][0] if value == "currentcolor" else value)
            if rgba is None:
                return False
            alpha = rgba[3]
            if value == "currentcolor" and element in self.shared:    # each `use` may bring another colour
                if alpha < 1:
                    self.source.unsupported("a translucent currentColor in <use>")
                layer.colour = self.slot("colours", style["color"][1], "color", rgba[:3])
            else:
                layer.colour = self.slot("colours", owner, name, rgba[:3])
        key = name + "-opacity"
        alpha *= share(style[key][0])
        owner = owner if owner is element else style[key][1]
        layer.opacities.append(self.slot("opacities", owner, key, alpha))
        return True

    def stroke(self, layer, element, style):
        """Set the layer's width, dashes, caps and joins, in local units. False where the stroke has no width."""
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
        if width * scale > MAX_COORDINATE:
            raise SVGError(f"a stroke is wider than {MAX_COORDINATE:g} px")
        row = self.slot("widths", self.owner(element, "stroke-width", style), "stroke-width", (width, scale))
        layer.stroke = dict(
            width=row, cap=get("stroke-linecap").lower(), join=get("stroke-linejoin").lower(), dashes=dashes,
            miter=max(1.0, length(get("stroke-miterlimit"), default=4.0)),
            offset=units("stroke-dashoffset", get("stroke-dashoffset"), 0.0))
        return True

    def gradient(self, element, style):
        """Gradient of the element, with what it inherits through href; None if it has no stops."""
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
            if not np.abs(unit).max() < 1e9:              # squared, it has to fit into float32
                raise SVGError(f"gradient '#{element.get('id')}' is not finite or too large")
            found = Gradient(rows, unit, focus, inherited("spreadMethod", "pad"), on_box)
        self.gradients[key] = found
        return found

    def chain(self, element):
        """The gradient and those it refers to, one after the other."""
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


# ------------------------------------------------------------------ document: layers and groups

def size_of(matrix):
    """How many pixels long a unit is under a 3x3 matrix: the root of what it does to areas."""
    return math.sqrt(abs(np.linalg.det(matrix[:2, :2])))


# of red, green, blue and alpha in a mask (CSS Masking 1); colours are premultiplied, which brings their alpha in
LUMINANCE, ALPHA = (0.2125, 0.7154, 0.0721, 0.0), (0.0, 0.0, 0.0, 1.0)
MASK_FRAME = {"x": "-10%", "y": "-10%", "width": "120%", "height": "120%"}        # what a mask lets through at most


class Document:
    """The drawing: walks the elements once and collects shapes, layers and the order of drawing.

    `ops` is a flat program of ("draw", layer), ("push", channels), ("mask", weights or None) and ("pop", opacity row
    or None). A push opens an isolated buffer of 4 channels, or of 1 (alpha only) inside clip paths; mask
    multiplies the buffer below by the top one and drops it: by its alpha or, if it has 4 channels, by their weighted
    sum; pop blends the top buffer into the one below. The methods of the walk return the ops of what they visit.

    `drawn` keeps (shape, matrix) of every shape visited so far, painted or not: what the box of an element is about.
    """

    @classmethod
    def load(cls, path, skip_unsupported, size):
        """Read a file; size: pixels of the square picture's side, or a Frame of pictures.py. Raises SVGError."""
        try:
            source = Source(path, skip_unsupported)
            if not source.sized:          # what the content reaches, from the origin, is the picture
                drawing = cls(source, 100)
                box = drawing.box(0, np.eye(3))
                source.see(None, *(np.ones(2) if box is None else np.maximum(box[:2] @ (1, 1, 1), 1e-3)).tolist())
            return cls(source, size)
        except SVGError as error:
            raise SVGError(f"{path}: {error}") from None
        except RecursionError:
            raise SVGError(f"{path}: elements, references or styles are nested too deeply") from None

    def __init__(self, source, size):
        self.source, self.styles, self.paints = source, source.styles, Paints(source)
        self.name, self.skipped = source.name, source.skipped
        self.shapes, self.shape_of, self.layers = [], {}, []
        self.points = self.fixed = 0      # rows in the table of optimised points, and of fixed ones
        self.boxes = {}                   # (clipPath or mask in box units, its user) -> (matrix of the box, its shapes)
        self.drawn, self.measured, self.nested = [], 0, set()
        self.contexts, self.relative = {}, {}     # see context and outline
        self.active, self.followed, self.visited = [], 0, 0       # references being followed; counts of all so far
        root, width, height = source.root, source.width, source.height
        self.sides = (size, size) if isinstance(size, int) else size.sides(width, height)
        self.size = size = max(self.sides)
        self.unit = scale = size / max(width, height)
        frame = ((size - scale * width) / 2, (size - scale * height) / 2, scale * width, scale * height)
        self.frame = (*frame[:2], frame[0] + frame[2], frame[1] + frame[3])      # x0, y0, x1, y1 in pixels
        self.initial = {name: (value, root) for name, value in INHERITED.items()}
        self.initial["viewport"] = tuple(source.view[2:]), root
        for name in ("background", "background-color", "background-image"):
            value, found = self.styles.of(root).get(name, "none"), colour(self.styles.of(root).get(name, "none"))
            if value.lower() != "none" and not (found and (found[3] == 0 or found[:3] == (1, 1, 1))):
                source.unsupported(f"{name} '{value[:40]}' on <svg>")         # the paper is white
        start, self.ops = fit(source.view, root.get("preserveAspectRatio"), *frame), []
        if self.styles.of(root).get("display") != "none":
            self.ops = self.group(root, start, self.initial, False, lambda *state: self.children(root, *state, False))

    # -- the walk

    def visit(self, element, matrix, style, clip):
        """ops of the element; in clip paths only geometry counts."""
        tag, source = self.source.tag(element), self.source
        self.visited += 1
        if self.visited > MAX_VISITS:
            raise SVGError(f"more than {MAX_VISITS} elements to visit, those of <use> as often as they are used")
        known = tag in SHAPES or tag in ("g", "a", "svg", "use", "switch", "text", "image", "foreignObject")
        if not known or self.styles.of(element).get("display", "").lower() == "none" or not source.holds(element):
            return []                     # defs, gradients, titles, foreign elements: nothing to draw here
        if tag in ("text", "image", "foreignObject"):
            if self.shows(element, tag, style):
                source.unsupported(f"<{tag}>")
            return []
        if clip and tag not in SHAPES and tag != "use":
            return []                     # a clip path holds shapes alone
        if tag in SHAPES:
            def content(*state):
                return self.draw(element, *state, clip)
        elif tag == "use":
            def content(*state):
                return self.use(element, *state, clip)
        elif tag == "svg":
            def content(*state):
                return self.viewport(element, element, *state, clip)
        else:
            def content(*state):
                return self.children(element, *state, clip)
        return self.group(element, matrix, style, clip, content)

    def children(self, element, matrix, style, clip):
        """ops of the children; of <switch>, of the first that can be drawn."""
        children = list(element)
        if self.source.tag(element) == "switch":
            able = SHAPES | {"g", "a", "svg", "use", "switch", "text", "image"}
            children = [c for c in element if self.source.tag(c) in able and self.source.holds(c)][:1]
        return [op for child in children for op in self.visit(child, matrix, style, clip)]

    def shows(self, element, tag, style):
        """Whether an element that is not supported here would show anything: not if it is empty or hidden."""
        style = self.styles.inherit(style, element)
        parts = [e for e in element.iter() if self.source.tag(e)]
        seen = [style["visibility"][0], *(self.styles.of(e).get("visibility") for e in parts)]
        if "visible" not in [value and value.lower() for value in seen] or (
                style["visibility"][0] != "visible" and len(parts) == 1):
            return False
        if tag == "text":
            return bool("".join(element.itertext()).strip()) or any(self.source.tag(e) == "tref" for e in parts)
        if any((size := self.source.measure(element, name, style, None)) is not None and size <= 0
               for name in ("width", "height")):
            return False
        return any(k.rpartition(":")[2] == "href" and v.strip() for k, v in element.attrib.items()) \
            if tag == "image" else len(element) > 0 or bool((element.text or "").strip())

    def group(self, element, matrix, style, clip, content):
        """ops of content(matrix, style), with the element's own transform, style, clip path, mask and opacity."""
        props, tag = self.styles.of(element), self.source.tag(element)
        for name in REFUSED.keys() & props.keys():
            value = props[name]
            # a filter that refers to nothing is none
            nothing = name == "filter" and re.fullmatch(URL, value) and self.source.link(value) is None
            if value.lower() not in REFUSED[name] and not nothing:
                self.source.unsupported(f"{name} on <{tag}>")
        style, first = self.styles.inherit(style, element), len(self.drawn)
        matrix = matrix @ self.transform(element, style)
        ops, masks = content(matrix, style), []
        if (clip_path := self.resource(element, "clip-path", "clipPath")) is not None:
            masks.append(self.clip(clip_path, element, matrix, style, first))
        if not clip and (mask := self.resource(element, "mask", "mask")) is not None:
            masks.append(self.mask(mask, element, matrix, style, first))
        opacity = None
        if not clip and share(props.get("opacity")) < 1:
            opacity = self.paints.slot("opacities", element, "opacity", share(props["opacity"]))
        return self.isolate(ops, opacity, masks, clip)

    def resource(self, element, name, tag):
        """The clipPath or mask that a property refers to; None if it refers to nothing of this kind."""
        value = self.styles.of(element).get(name, "none")
        if value == "none":
            return None
        target = self.source.link(value) if re.fullmatch(URL, value) else None
        if not re.fullmatch(URL, value) and value.lower() != "none":
            self.source.unsupported(f"{name} '{value[:40]}' on <{self.source.tag(element)}>")
        return target if target is not None and self.source.tag(target) == tag else None

    def transform(self, element, style):
        """The element's own transform: by CSS or by its attribute, about its transform-origin."""
        props, (width, height), em = self.styles.of(element), style["viewport"][0], float(style["font-size"][0])
        matrix = transform(element.get("transform"))
        if "transform" in props:
            space = THREE_D & {name.lower() for name, _ in TRANSFORM.findall(props["transform"])}
            if space:
                self.source.unsupported(f"transform {min(space)}() on <{self.source.tag(element)}>")
            matrix = css_transform(props["transform"], width, height, em)
        text, box = props.get("transform-origin"), props.get("transform-box", "view-box").lower()
        moves = text is not None or "%" in props.get("transform", "")
        if box != "view-box" and moves and not np.array_equal(matrix, np.eye(3)):
            self.source.unsupported(f"transform-box {box} on <{self.source.tag(element)}>")
        if text is None and element is self.source.root:
            text = "center"               # the outermost <svg> has a box of its own, as elements of HTML do
        if text is None or np.array_equal(matrix, np.eye(3)):
            return matrix
        x, y = origin(text, width, height, em)
        return affine(e=x, f=y) @ matrix @ affine(e=-x, f=-y)

    def isolate(self, content, opacity, masks, clip):
        """The content, in a buffer of its own where an opacity or masks ask for one; masks: the ops of each."""
        if opacity is not None and not masks and len(content) == 1:
            self.layers[content[0][1]].opacities.append(opacity)
            opacity = None
        if content and (opacity is not None or masks):
            content = [("push", 1 if clip else 4), *content, *(op for mask in masks for op in mask), ("pop", opacity)]
        return content

    def follow(self, element):
        """Guard against references that lead back to themselves, and against their explosion."""
        if element in self.active:
            raise SVGError(f"'#{element.get('id')}' refers to itself")
        if len(self.active) > MAX_REFERENCES:
            raise SVGError(f"references nested deeper than {MAX_REFERENCES}")
        self.followed += 1
        if self.followed > MAX_SHAPES:
            raise SVGError(f"more than {MAX_SHAPES} references to follow")
        self.active.append(element)

    def use(self, element, matrix, style, clip):
        target = self.source.reference(element)
        if target is None:
            return []
        self.follow(target)
        if self.styles.scoped and self.styles.scopes_differ(element, target):
            self.source.unsupported("<use> with custom properties of its own")
        x, y = (self.source.measure(element, name, style) for name in "xy")
        matrix = matrix @ affine(e=x, f=y)
        if self.source.tag(target) in ("symbol", "svg") and not clip:
            ops = []
            if self.source.tag(target) == "symbol" or self.styles.of(target).get("display", "").lower() != "none":
                ops = self.group(target, matrix, style, clip,
                                 lambda *state: self.viewport(target, element, *state, clip))
        else:
            ops = self.visit(target, matrix, style, clip)
        self.active.pop()
        return ops

    def viewport(self, element, sized_by, matrix, style, clip):
        """A nested <svg>, or a <symbol> that is used: its own viewBox, clipped to its rectangle."""
        props, measure, (across, down) = self.styles.of(element), self.source.measure, style["viewport"][0]
        x, y = (measure(element, k, style) for k in "xy") if self.source.tag(element) == "svg" else (0.0, 0.0)
        width, height = (measure(sized_by, name, style, measure(element, name, style, all_of_it))
                         for name, all_of_it in (("width", across), ("height", down)))
        view, masks = numbers(element.get("viewBox")), []
        if width <= 0 or height <= 0 or len(view) == 4 and min(view[2:]) == 0:
            return []                     # which switches the drawing of the element off
        if props.get("overflow", "hidden").lower() in ("hidden", "scroll", "clip"):
            shape = self.shape(None, box_outline(x, y, width, height), matrix)
            if shape is None:
                return []
            masks = [[("push", 1), self.add(Layer(shape, matrix)), ("mask", None)]]
        if len(view) == 4 and min(view[2:]) > 0:
            matrix = matrix @ fit(view, element.get("preserveAspectRatio"), x, y, width, height)
            width, height = view[2:]
        else:
            matrix = matrix @ affine(e=x, f=y)
        style = {**style, "viewport": ((width, height), element)}
        return self.isolate(self.children(element, matrix, style, clip), None, masks, clip)

    # -- clip paths and masks

    def context(self, element, style):
        """The style of a clipPath's or mask's content: what is set around it in the file, not where it is used."""
        if element not in self.contexts:
            around = [element]
            while (parent := self.styles.parents.get(around[-1])) is not None:
                around.append(parent)
            found = self.initial
            for part in reversed(around):
                found = self.styles.inherit(found, part)
            self.contexts[element] = found
        return {**self.contexts[element], "viewport": style["viewport"]}

    def box(self, first, matrix):
        """Matrix that takes the unit square to the box around what was drawn since `first`; None if that is nothing.

        In the units that `matrix` takes to pixels, without strokes: the bounding box of SVG.
        """
        drawn = self.drawn[first:]
        self.measured += len(drawn)
        if self.measured > MAX_MEASURED:
            raise SVGError(f"more than {MAX_MEASURED} shapes to measure for clip paths and masks")
        if not drawn or abs(np.linalg.det(matrix)) < 1e-30:
            return None
        back = np.linalg.inv(matrix)
        corners = [shape.outline.bounds(back @ own) for shape, own in drawn]
        low, high = (f([c[i] for c in corners], axis=0) for i, f in ((0, np.min), (1, np.max)))
        return affine(high[0] - low[0], 0, 0, high[1] - low[1], *low)

    def box_of(self, element, user, matrix, first, nested):
        """The box of `user`, in whose units a clipPath or mask is; as it is at loading, whatever the shapes do later.

        nested: it is not the user's own, but that of another clipPath or mask.
        """
        box = self.box(first, matrix)
        box = affine(0, 0, 0, 0) if box is None else box
        key, shapes = (element, user), [shape for shape, _ in self.drawn[first:]]
        before = self.boxes.setdefault(key, (box, shapes))[0]
        self.nested |= {element} if nested else set()
        # what could not be written back once the box has changed
        if not np.allclose(before, box, rtol=1e-6, atol=1e-9) or (
                element in self.nested and sum(other is element for other, _ in self.boxes) > 1):
            raise SVGError(f"<{self.source.tag(element)}> '#{element.get('id')}' is in units of several boxes at once")
        return box

    def clip(self, element, user, matrix, style, first, nested=False):
        """ops that clip the buffer below to a clipPath; matrix: of the units of its user."""
        self.follow(element)
        style, inside, end = self.context(element, style), matrix, len(self.drawn)
        if element.get("clipPathUnits") == "objectBoundingBox":
            inside = matrix @ self.box_of(element, user, matrix, first, nested)
        inside = inside @ self.transform(element, style)
        ops = [op for child in element for op in self.visit(child, inside, style, True)]
        del self.drawn[end:]
        if (own := self.resource(element, "clip-path", "clipPath")) is not None:
            ops += self.clip(own, user, matrix, style, first, True)
        self.active.pop()
        return [("push", 1), *ops, ("mask", None)]

    def mask(self, element, user, matrix, style, first, nested=False):
        """ops that multiply the buffer below by a mask: by the brightness of its colours, or by its alpha."""
        self.follow(element)
        style, end, props = self.context(element, style), len(self.drawn), self.styles.of(element)
        if style["color-interpolation"][0].lower() == "linearrgb":
            self.source.unsupported("color-interpolation on <mask>")
        on_box = element.get("maskUnits") != "userSpaceOnUse"
        content_on_box = element.get("maskContentUnits") == "objectBoundingBox"
        frame, inside = matrix, matrix
        if on_box or content_on_box:
            box = matrix @ self.box_of(element, user, matrix, first, nested)
            frame, inside = box if on_box else matrix, box if content_on_box else matrix
        edges = [length(text) if on_box else self.source.units(text, name, style) for name, text in
                 ((name, element.get(name, default)) for name, default in MASK_FRAME.items())]
        ops = [op for child in element for op in self.visit(child, inside, style, False)]
        del self.drawn[end:]
        shape = self.shape(None, box_outline(*edges), frame)
        ops += [("push", 1), *([] if shape is None else [self.add(Layer(shape, frame))]), ("mask", None)]
        for name, tag, method in (("clip-path", "clipPath", self.clip), ("mask", "mask", self.mask)):
            if (own := self.resource(element, name, tag)) is not None:
                ops += method(own, user, matrix, style, first, True)
        self.active.pop()
        weights = ALPHA if props.get("mask-type", "luminance").lower() == "alpha" else LUMINANCE
        return [("push", 4), *ops, ("mask", weights)]

    # -- shapes

    def outline(self, element, style):
        """Outline of a shape in its local units, made at its first use; None at later ones."""
        props, attributes = self.styles.of(element), dict(element.attrib)
        attributes.update((name, props[name]) for name in GEOMETRY if name in props)
        if "d" in props:
            attributes["d"] = path_data(props["d"]) or ""
        if element in self.relative or any(RELATIVE.search(attributes[name]) for name in LENGTHS & attributes.keys()):
            state = style["viewport"][0], style["font-size"][0]
            if self.relative.setdefault(element, state) != state:
                self.source.unsupported(f"<{self.source.tag(element)}> with lengths that depend on where it is used")
        if element in self.shape_of:
            return None
        return shape_outline(self.source.tag(element), attributes,
                             lambda text, name, default: self.source.units(text, name, style, default))

    def shape(self, element, outline, matrix):
        """Shape of the element, made at its first use; None if it has nothing to draw."""
        if element in self.shape_of and element is not None:
            return self.shape_of[element]
        scale, points = size_of(matrix), np.array(outline.points)
        if points.size and not np.all(np.abs(points) < MAX_COORDINATE / scale if scale else True):
            what = "a viewport" if element is None else f"<{self.source.tag(element)}>"
            raise SVGError(f"{what} has coordinates that are not finite or lie more than {MAX_COORDINATE:g} px away")
        shape = None
        if outline.curves and scale > NOTHING:
            shape = Shape(element, outline, scale, self.fixed if element is None else self.points)
            self.shapes.append(shape)
            if element is None:
                self.fixed += len(outline.points)
            else:
                self.points += len(outline.points)
        self.shape_of[element] = shape
        return shape

    def add(self, layer):
        """The op that draws a new layer."""
        self.layers.append(layer)
        return "draw", len(self.layers) - 1

    def draw(self, element, matrix, style, clip):
        """ops of a shape: its fill and its stroke, or its geometry in a clip path."""
        if element not in self.shape_of and size_of(matrix) <= NOTHING:
            return []                     # nothing is seen of it here; another use may be larger
        shape = self.shape(element, self.outline(element, style), matrix)
        if shape is None:
            return []
        self.drawn.append((shape, matrix))
        if style["visibility"][0].lower() != "visible":
            return []
        if len(self.layers) > MAX_SHAPES:
            raise SVGError(f"more than {MAX_SHAPES} shapes to draw")
        if not np.abs(matrix).max() < MAX_COORDINATE:
            raise SVGError(f"a transform of <{self.source.tag(element)}> is not finite or too large")
        if clip:
            return [self.add(Layer(shape, matrix, style["clip-rule"][0].lower()))]
        tag, ops, order = self.source.tag(element), [], (style["paint-order"][0].lower() + " fill stroke").split()
        for name in MARKERS if tag in ("path", "line", "polyline", "polygon") else ():
            target = self.source.link(style[name][0])
            if target is not None and self.source.tag(target) == "marker" and len(target):
                self.source.unsupported(f"{name} on <{tag}>")
        for name in sorted(("fill", "stroke"), key=order.index):
            layer = Layer(shape, matrix, style["fill-rule"][0].lower() if name == "fill" else "nonzero")
            if self.paints.paint(layer, element, name, style) and (
                    name == "fill" or self.paints.stroke(layer, element, style)):
                if name == "stroke" and self.styles.of(element).get("vector-effect", "none").lower() != "none":
                    self.source.unsupported(f"vector-effect on <{tag}>")
                ops.append(self.add(layer))
        return ops

    def held_by(self, ids):
        """The elements of these ids, with all that they hold and `use`: a set. Raises SVGError for an unknown id."""
        missing = [name for name in ids if name not in self.source.ids]
        if missing:
            known = [name for name in self.source.ids if name]
            raise SVGError(f"{self.name}: no element has the id '{missing[0]}'; "
                           f"there are: {', '.join(known) or 'none'}")
        held, open_ = set(), [self.source.ids[name] for name in ids]
        while open_:
            element = open_.pop()
            if element not in held:
                held.add(element)
                used = self.source.reference(element) if self.source.tag(element) == "use" else None
                open_ += [*element, *([used] if used is not None else [])]
        return held

    def save(self, path, values, loaded):
        """Write the file with the values, all at once or not at all.

        values: {parameter of SVG: array of float64}, loaded: the same at loading, in float32. Only what has
        changed is touched: edited shapes become <path> in their place, with their id, class and other
        attributes; paint goes to the element it came from. Raises SVGError.
        """
        if not all(np.isfinite(value).all() for value in values.values()):
            raise SVGError(f"{path}: not saved, as some parameters are not finite")
        edition = Edition(self, values, loaded)
        edition.write_outlines()
        edition.write_paints()
        edition.write_boxes()
        write_file(path, edition.data())


# ------------------------------------------------------------------ writing back

def style_text(style):
    """{property: (value, important)} -> the text of style=""."""
    return ";".join(f"{name}:{value}" + " !important" * important for name, (value, important) in style.items())


def hexadecimal(rgb):
    return "#" + "".join(f"{round(255 * min(max(c, 0.0), 1.0)):02x}" for c in rgb.tolist())


class Edition:
    """A copy of a document's elements that new values of the parameters are written into."""

    def __init__(self, document, values, loaded):
        self.document, self.source, self.styles = document, document.source, document.styles
        self.values, self.loaded = values, loaded
        self.root = copy.deepcopy(self.source.root)
        self.twin = dict(zip(self.source.root.iter(), self.root.iter()))      # element -> its copy

    def changed(self, name, rows):
        return not np.array_equal(self.values[name][rows].astype(np.float32), self.loaded[name][rows])

    def write_outlines(self):
        data = {}
        for shape in self.document.shapes:
            rows = slice(shape.first, shape.first + len(shape.outline.points))
            if shape.element is None or not self.changed("points", rows):
                continue
            data[shape.element] = shape.outline.data((self.values["points"][rows] / shape.scale).tolist())
        renamed = {element for element in data if self.source.tag(element) != "path"}
        for element in renamed:
            self.twin[element].tag = ":".join(filter(None, (self.source.prefix, "path")))
            for name in GEOMETRY:
                self.twin[element].attrib.pop(name, None)
        if self.styles.important or renamed and self.styles.rules:
            self.keep_styles(renamed)
        for element, text in data.items():
            self.twin[element].set("d", text)
            if self.styles.rules or "d" in self.styles.of(element):
                now = Styles(self.source, self.root).of(self.twin[element]) if self.styles.rules else {"d": ""}
                if "d" in now:
                    self.write(self.twin[element], "d", f'path("{text}")')

    def keep_styles(self, renamed):
        """Write into style="" what the elements were set to, where style sheets now do otherwise.

        A renamed element may lose rules (circle {}) or gain some (path {}), and so may elements around it
        (circle + rect {}, :first-of-type). !important goes, as it would overrule what is written.
        """
        for element in self.source.elements:
            if self.source.tag(element) == "style":
                self.twin[element].text = re.sub(r"!\s*important", "", element.text or "", flags=re.I)
        self.hold({twin: self.styles.cascade(e) for e, twin in self.twin.items() if self.source.tag(e)},
                  {self.twin[element] for element in renamed})

    def hold(self, wanted, always=()):
        """Write into style="" what elements are to be set to, {element: cascade}, where style sheets do otherwise."""
        now = Styles(self.source, self.root)
        for element, before in wanted.items():
            after = now.cascade(element)
            if element in always or before != after:
                gained = {name: value for name in after if name not in before
                          and (value := self.neutral(element, name)) is not None}
                element.set("style", style_text({name: (value, False) for name, value in {**before, **gained}.items()}))

    def neutral(self, element, name):
        """A value of a property that leaves the element as it is without any; None if there is none."""
        if name in INHERITED:
            return "inherit"
        if name in OWN:
            return OWN[name]
        if name == "transform":
            own = element.get("transform")
            return matrix_text(transform(own), ",") if own else "none"
        return None if name in GEOMETRY else element.get(name, "unset")

    def write(self, element, name, value):
        """Set a property where it wins: in style="", which overrules style sheets, or else as an attribute."""
        twin, style = self.twin.get(element, element), {}
        for key, old, important in declarations(twin.get("style", "")):
            if important or not style.get(key, ("", False))[1]:
                style[key] = (old, important)
        if name in style or self.styles.rules:
            style[name] = (value, False)
            twin.set("style", style_text(style))
        else:
            twin.set(name, value)

    def write_paints(self):
        slots, tables, values = self.document.paints.slots, self.document.paints.tables, self.values
        for (kind, element, name), row in slots.items():
            if kind == "widths":
                if self.changed("stroke_widths", row):
                    _, scale = tables["widths"][row]
                    self.write(element, name, f"{values['stroke_widths'][row] / scale:.6g}")
            elif kind == "stops":
                if self.changed("stop_offsets", row) or self.changed("stop_colours", row):
                    rgba = values["stop_colours"][row]
                    self.twin[element].set("offset", f"{values['stop_offsets'][row]:.5g}")
                    self.write(element, "stop-color", hexadecimal(rgba[:3]))
                    self.write(element, "stop-opacity", f"{rgba[3]:.5g}")
            elif self.changed(kind, row):
                # an rgba() colour was split into colour and opacity, so both are written
                paint = name.removesuffix("-opacity")
                if (row := slots.get(("colours", element, paint))) is not None:
                    self.write(element, paint, hexadecimal(values["colours"][row]))
                alpha = name if name == "opacity" else paint + "-opacity"
                if (row := slots.get(("opacities", element, alpha))) is not None:
                    self.write(element, alpha, f"{values['opacities'][row]:.5g}")

    def write_boxes(self):
        """Clip paths and masks in units of a box stay as they were drawn, where a shape in that box has changed."""
        changed = [key for key, (_, shapes) in self.document.boxes.items() if any(
            self.changed("points", slice(s.first, s.first + len(s.outline.points)))
            for s in shapes if s.element is not None)]
        if not changed:
            return
        users, later = [element for element, _ in self.document.boxes], []
        styles = Styles(self.source, self.root)
        wanted = {e: styles.cascade(e) for e in self.root.iter() if self.source.tag(e)} if styles.rules else {}
        for element, user in changed:
            box, tag, twin = self.document.boxes[element, user][0], self.source.tag(element), self.twin[element]
            if users.count(element) > 1:  # one for this user alone
                twin, original = copy.deepcopy(twin), twin
                wanted.update((new, wanted[old]) for old, new in zip(original.iter(), twin.iter()) if old in wanted)
                self.twin[self.styles.parents[element]].append(twin)
                twin.set("id", self.free_id(element.get("id")))
                later.append((user, "clip-path" if tag == "clipPath" else "mask", f"url(#{twin.get('id')})"))
            if tag == "clipPath":
                style = self.document.context(element, self.document.initial)
                matrix = matrix_text(box @ self.document.transform(element, style), ",")
                twin.attrib.update(clipPathUnits="userSpaceOnUse", transform=matrix)
                if {"transform", "transform-origin"} & set(self.styles.of(element)):
                    later += [(twin, "transform", matrix), (twin, "transform-origin", "0 0")]
                continue
            if element.get("maskUnits") != "userSpaceOnUse":
                x, y, *size = (length(element.get(name, default)) for name, default in MASK_FRAME.items())
                (width, _, left), (_, height, top) = box[:2].tolist()
                frame = left + x * width, top + y * height, size[0] * width, size[1] * height
                twin.attrib.update({name: f"{value:.9g}" for name, value in zip(MASK_FRAME, frame)},
                                   maskUnits="userSpaceOnUse")
            if element.get("maskContentUnits") == "objectBoundingBox":
                inner = ET.Element(":".join(filter(None, (self.source.prefix, "g"))), transform=matrix_text(box))
                for child in list(twin):
                    twin.remove(child)
                    inner.append(child)
                twin.append(inner)
                twin.set("maskContentUnits", "userSpaceOnUse")
                wanted.update({inner: {}} if wanted else {})
        if wanted:
            self.hold(wanted)
        for change in later:
            self.write(*change)

    def free_id(self, name):
        """An id like the given one that no element has yet."""
        taken = {element.get("id") for element in self.root.iter()}
        return next(f"{name}-{k}" for k in range(1, len(taken) + 2) if f"{name}-{k}" not in taken)

    def data(self):
        if not self.source.sized and self.changed("points", slice(None)):
            # the picture is what the content reaches; it stays as large as it was
            for name in ("width", "height"):
                self.root.attrib.pop(name, None)
            self.root.set("viewBox", f"0 0 {self.source.width:.9g} {self.source.height:.9g}")
        if not self.source.prefix:
            self.root.attrib.setdefault("xmlns", "http://www.w3.org/2000/svg")
        return ET.tostring(self.root, encoding="unicode").encode()
