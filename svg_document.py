"""SVG files: from XML and CSS to layers that can be drawn, and from changed parameters back to the file.

    document = Document.load("apple.svg", skip_unsupported=False, size=256)
    document.layers, document.ops                      # what to draw, and in which order
    document.save("edited.svg", values, loaded)        # the same file, changed only where values differ from loaded

The way of the data through this file: source (XML, references) -> styles (svg_style.py) -> paint -> document (layers
and groups) -> the file written back. Coordinates are x right, y down.

Read as browsers do: SVG 1.1 and what SVG 2 changed in it. Elements and properties known to be missing here are refused
by name.
"""
import copy
import math
import os
import re
import warnings
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from files import replacing
from svg_outline import (GEOMETRY, SHAPES, Outline, SVGError, affine, box_outline, fit, length, linear_unit, matrix_text,
                         numbers, radial_unit, shape_outline, transform)
from svg_style import INHERITED, OWN, REFUSED, URL, Styles, colour, declarations

MAX_BYTES, MAX_ELEMENTS, MAX_SHAPES, MAX_DEPTH = 32 << 20, 100_000, 30_000, 200
MAX_REFERENCES = 30                   # how deep references may be nested
MAX_COORDINATE = 1e6                  # px; beyond it float32 cannot place an edge to a tenth of a pixel


# ------------------------------------------------------------------ source: elements, names, references

GRADIENTS = {"linearGradient", "radialGradient"}


def read_file(path):
    """The bytes of a file, at most MAX_BYTES."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise SVGError(f"larger than {MAX_BYTES >> 20} MiB")
        return Path(path).read_bytes()
    except OSError as error:
        raise SVGError(f"cannot be read: {error.strerror}") from None


def write_file(path, data):
    """Write bytes, all at once or not at all."""
    try:
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise SVGError(f"{path}: cannot be written: {error.strerror}") from None


def parse_xml(data):
    """bytes -> root element; names keep their prefixes as written, so that saving changes nothing else."""
    builder, depth, count, root = ET.TreeBuilder(insert_comments=True), 0, 0, None

    def start(tag, attributes):
        nonlocal depth, count, root
        depth, count = depth + 1, count + 1
        if depth > MAX_DEPTH:
            raise SVGError(f"elements nested deeper than {MAX_DEPTH}")
        if count > MAX_ELEMENTS:
            raise SVGError(f"more than {MAX_ELEMENTS} elements")
        element = builder.start(tag, attributes)
        root = element if root is None else root

    def end(tag):
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def entity(*_):
        raise SVGError("entity declarations (<!ENTITY>) are refused")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = lambda text: builder.data(text) if depth else None
    parser.CommentHandler = lambda text: builder.comment(text) if depth else None
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(data, True)
    except SVGError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:      # the last two: unknown encodings
        raise SVGError(f"not well-formed XML: {error}") from None
    return root


class Source:
    """The elements of an SVG file: their names, ids, references, lengths and styles."""

    def __init__(self, path, skip_unsupported):
        self.name, self.skip, self.skipped, self.told = str(path), skip_unsupported, [], set()
        self.root = parse_xml(read_file(path))
        self.prefix = self.root.tag.rpartition(":")[0]
        if self.tag(self.root) != "svg":
            raise SVGError(f"the root element is <{self.root.tag}>, not <svg>")
        self.elements = [e for e in self.root.iter() if self.tag(e)]
        self.ids = {}
        for element in self.elements:
            self.ids.setdefault(element.get("id"), element)
        view = numbers(self.root.get("viewBox"))
        has_view = len(view) == 4 and min(view[2:]) > 0
        sides = view[2:] if has_view else (100.0, 100.0)
        self.width, self.height = (length(self.root.get(k), side, side) for k, side in zip(("width", "height"), sides))
        if not (0 < self.width < 1e9 and 0 < self.height < 1e9):
            raise SVGError(f"a picture of {self.width:g} x {self.height:g} cannot be drawn")
        self.view = view if has_view else [0, 0, self.width, self.height]
        self.styles = Styles(self, self.root)

    def tag(self, element):
        """The name without the root's prefix; "" for comments and foreign elements."""
        prefix, _, tag = element.tag.rpartition(":") if isinstance(element.tag, str) else ("-", "", "")
        return tag if prefix == self.prefix else ""

    def unsupported(self, what):
        if not self.skip:
            raise SVGError(f"{what} is not supported (--skip-unsupported leaves it out)")
        if what not in self.skipped:
            self.skipped.append(what)
            warnings.warn(f"{self.name}: {what} is not supported and left out", stacklevel=2)

    def not_understood(self, kind, text):
        """Warn about an invalid piece of CSS, once for each kind; as CSS asks, it counts as not written."""
        if kind not in self.told:
            self.told.add(kind)
            text = text if len(text) <= 60 else text[:57] + "..."
            warnings.warn(f"{self.name}: {kind} '{text}' is not understood and left out", stacklevel=2)

    def reference(self, element):
        """The element that href points at; None if there is none in this document."""
        href = next((v for k, v in element.attrib.items() if k.rpartition(":")[2] == "href"), "").strip()
        if href and href[0] != "#":
            raise SVGError(f"the external reference '{href[:80]}' is refused")
        return self.ids.get(href[1:]) if href else None

    def link(self, value):
        """url(#id) -> element or None; other text -> None."""
        match = re.match(URL, value or "")
        target = match[1].strip(" \t\n'\"") if match else ""
        if match and target[:1] != "#":
            raise SVGError(f"the external reference '{target[:80]}' is refused")
        return self.ids.get(target[1:]) if match else None

    def units(self, text, name, default=0.0):
        """A length in user units; by its name, per cent are of the viewBox's width, height, or mean side."""
        width, height = self.view[2:]
        of = dict(x=width, w=width, y=height, h=height).get(name.lstrip("cfr")[:1], math.hypot(*self.view[2:])
                                                            / math.sqrt(2))
        return length(text, of, default)

    def measure(self, element, name, default=0.0):
        return self.units(element.get(name), name, default)


# ------------------------------------------------------------------ paint: colours, gradients, strokes

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
            layer.gradient = self.gradient(source)
            if layer.gradient is None:
                return False
        elif tag == "pattern":
            self.source.unsupported(f"pattern {name} on <{self.source.tag(element)}>")
            return False
        else:
            value = fallback[2] if fallback else value
            rgba = colour(style["color"][0] if value.lower() == "currentcolor" else value)
            if rgba is None:
                return False
            layer.colour, alpha = self.slot("colours", owner, name, rgba[:3]), rgba[3]
        key = name + "-opacity"
        alpha *= share(style[key][0])
        owner = owner if owner is element else style[key][1]
        layer.opacities.append(self.slot("opacities", owner, key, alpha))
        return True

    def stroke(self, layer, element, style):
        """Set the layer's width, dashes, caps and joins, in local units. False where the stroke has no width."""
        def get(name):
            return style[name][0]
        width, dashes = self.source.units(get("stroke-width"), "stroke-width", 1.0), []
        if get("stroke-dasharray") != "none":
            dashes = [min(abs(d), MAX_COORDINATE) for d in numbers(get("stroke-dasharray"))]
            dashes = dashes * (1 + len(dashes) % 2) if sum(dashes) > 0 else []
        if width <= 0:
            return False
        scale = layer.shape.scale
        if width * scale > MAX_COORDINATE:
            raise SVGError(f"a stroke is wider than {MAX_COORDINATE:g} px")
        row = self.slot("widths", self.owner(element, "stroke-width", style), "stroke-width", (width, scale))
        layer.stroke = dict(
            width=row, cap=get("stroke-linecap"), join=get("stroke-linejoin"), dashes=dashes,
            miter=max(1.0, length(get("stroke-miterlimit"), default=4.0)),
            offset=float(np.clip(length(get("stroke-dashoffset")), -MAX_COORDINATE, MAX_COORDINATE)))
        return True

    def gradient(self, element):
        """Gradient of the element, with what it inherits through href; None if it has no stops."""
        if element in self.gradients:
            return self.gradients[element]
        chain = self.chain(element)

        def inherited(name, default):
            return next((e.get(name) for e in chain if e.get(name) is not None), default)
        on_box = inherited("gradientUnits", "") != "userSpaceOnUse"

        def get(name, default):
            text = inherited(name, default)
            return None if text is None else length(text) if on_box else self.source.units(text, name)
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
            found = Gradient(rows, unit @ np.linalg.inv(own), focus, inherited("spreadMethod", "pad"), on_box)
        self.gradients[element] = found
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
            text = props.get("color", "black") if text.lower() == "currentcolor" else text
            rgba = colour(text)
            alpha = rgba[3] * share(props.get("stop-opacity"))
            previous = min(max(length(stop.get("offset")), previous), 1.0)
            rows.append(self.slot("stops", stop, "stop", (previous, *rgba[:3], alpha)))
        return rows


# ------------------------------------------------------------------ document: layers and groups

class Document:
    """The drawing: walks the elements once and collects shapes, layers and the order of drawing.

    `ops` is a flat program of ("draw", layer), ("push", channels), ("mask", None) and ("pop", opacity row or
    None). A push opens an isolated buffer of 4 channels, or of 1 (alpha only) inside clip paths; mask
    multiplies the buffer below by the top one's alpha and drops it; pop blends the top buffer into the one
    below. The methods of the walk return the ops of what they visit.
    """

    @classmethod
    def load(cls, path, skip_unsupported, size):
        """Read a file; size: pixels of the square picture's side. Raises SVGError."""
        try:
            return cls(Source(path, skip_unsupported), size)
        except SVGError as error:
            raise SVGError(f"{path}: {error}") from None
        except RecursionError:
            raise SVGError(f"{path}: elements, references or styles are nested too deeply") from None

    def __init__(self, source, size):
        self.source, self.styles, self.paints, self.size = source, source.styles, Paints(source), size
        self.name, self.skipped = source.name, source.skipped
        self.shapes, self.shape_of, self.layers = [], {}, []
        self.points = self.fixed = 0      # rows in the table of optimised points, and of fixed ones
        self.box_clips = {}               # clipPath in box units -> matrix of the box it was loaded with
        self.active, self.followed = [], 0        # references being followed, and the count of all so far
        root, width, height = source.root, source.width, source.height
        scale = size / max(width, height)
        frame = ((size - scale * width) / 2, (size - scale * height) / 2, scale * width, scale * height)
        self.frame = (*frame[:2], frame[0] + frame[2], frame[1] + frame[3])      # x0, y0, x1, y1 in pixels
        self.initial = {name: (value, root) for name, value in INHERITED.items()}
        start = fit(source.view, root.get("preserveAspectRatio"), *frame)
        self.ops = self.children(root, start, self.styles.inherit(self.initial, root), False)

    # -- the walk

    def children(self, element, matrix, style, clip):
        ops = []
        for child in element:
            ops += self.visit(child, matrix, style, clip)
        return ops

    def visit(self, element, matrix, style, clip):
        """ops of the element; in clip paths only geometry counts."""
        tag = self.source.tag(element)
        if tag in ("text", "image", "foreignObject"):
            self.source.unsupported(f"<{tag}>")
        if tag not in SHAPES and tag not in ("g", "a", "svg", "use", "switch"):
            return []                     # defs, gradients, titles, foreign elements: nothing to draw here
        props = self.styles.of(element)
        if props.get("display") == "none":
            return []
        for name in REFUSED:
            if props.get(name, "none") not in ("none", "normal", "auto"):
                self.source.unsupported(f"{name} on <{tag}>")
        style = self.styles.inherit(style, element)
        matrix = matrix @ transform(element.get("transform"))
        if tag in SHAPES:
            content = self.draw(element, matrix, style, clip)
        elif tag == "use":
            content = self.use(element, matrix, style, clip)
        elif tag == "svg":
            content = self.viewport(element, element, matrix, style, clip)
        elif tag == "switch":
            content = self.children([c for c in element if self.source.tag(c)][:1], matrix, style, clip)
        else:
            content = self.children(element, matrix, style, clip)
        clip_path = self.source.link(props.get("clip-path"))
        mask = None if clip_path is None else self.clip(clip_path, element, matrix)
        opacity = None
        if not clip and length(props.get("opacity"), default=1.0) < 1:
            opacity = self.paints.slot("opacities", element, "opacity", share(props["opacity"]))
        return self.isolate(content, opacity, mask, clip)

    def isolate(self, content, opacity, mask, clip):
        """The content, in a buffer of its own where opacity or a mask asks for one."""
        if opacity is not None and mask is None and len(content) == 1:
            self.layers[content[0][1]].opacities.append(opacity)
            opacity = None
        if content and (opacity is not None or mask is not None):
            masking = [("push", 1), *mask, ("mask", None)] if mask is not None else []
            content = [("push", 1 if clip else 4), *content, *masking, ("pop", opacity)]
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
        target, measure = self.source.reference(element), self.source.measure
        if target is None:
            return []
        self.follow(target)
        matrix = matrix @ affine(e=measure(element, "x"), f=measure(element, "y"))
        if self.source.tag(target) in ("symbol", "svg"):
            ops = self.viewport(target, element, matrix, style, clip)
        else:
            ops = self.visit(target, matrix, style, clip)
        self.active.pop()
        return ops

    def viewport(self, element, sized_by, matrix, style, clip):
        """A nested <svg>, or a <symbol> that is used: its own viewBox, clipped to its rectangle."""
        props, measure = self.styles.of(element), self.source.measure
        style = self.styles.inherit(style, element)
        x, y = (measure(element, k) for k in "xy") if self.source.tag(element) == "svg" else (0.0, 0.0)
        width, height = (measure(sized_by, k, measure(element, k, self.source.view[i]))
                         for i, k in ((2, "width"), (3, "height")))
        view, mask = numbers(element.get("viewBox")), None
        if props.get("overflow", "hidden") in ("hidden", "scroll") and width > 0 and height > 0:
            shape = self.shape(None, box_outline(x, y, width, height), matrix)
            if shape is None:
                return []
            mask = [self.add(Layer(shape, matrix))]
        if len(view) == 4 and min(view[2:]) > 0:
            matrix = matrix @ fit(view, element.get("preserveAspectRatio"), x, y, width, height)
        else:
            matrix = matrix @ affine(e=x, f=y)
        return self.isolate(self.children(element, matrix, style, clip), None, mask, clip)

    def clip(self, element, target, matrix):
        """ops that draw a clipPath's shapes as alpha; None where it is none."""
        if self.source.tag(element) != "clipPath":
            return None
        on_box = element.get("clipPathUnits") == "objectBoundingBox"
        if on_box and (self.source.tag(target) not in SHAPES or element in self.box_clips):
            return self.source.unsupported("clipPathUnits=objectBoundingBox for more than one shape")
        self.follow(element)
        if on_box:
            points = np.array(self.outline(target).points or [0j])
            low, high = (complex(f(points.real), f(points.imag)) for f in (np.min, np.max))
            self.box_clips[element] = affine((high - low).real, 0, 0, (high - low).imag, low.real, low.imag)
            matrix = matrix @ self.box_clips[element]
        inside = matrix @ transform(element.get("transform"))
        mask = self.children(element, inside, self.styles.inherit(self.initial, element), True)
        own = self.source.link(self.styles.of(element).get("clip-path"))
        if own is not None:
            mask += [("push", 1), *(self.clip(own, target, matrix) or []), ("mask", None)]
        self.active.pop()
        return mask

    # -- shapes

    def outline(self, element):
        return shape_outline(self.source.tag(element), element.attrib, self.source.units)

    def shape(self, element, outline, matrix):
        """Shape of the element, made at its first use; None if it has nothing to draw."""
        if element in self.shape_of and element is not None:
            return self.shape_of[element]
        scale = math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        points = np.array(outline.points)
        if points.size and not np.all(np.abs(points) < MAX_COORDINATE / scale if scale else True):
            what = "a viewport" if element is None else f"<{self.source.tag(element)}>"
            raise SVGError(f"{what} has coordinates that are not finite or lie more than {MAX_COORDINATE:g} px away")
        shape = None
        if outline.curves and scale > 1e-9:
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
        outline = None if element in self.shape_of else self.outline(element)
        shape = self.shape(element, outline, matrix)
        if shape is None or style["visibility"][0] != "visible":
            return []
        if len(self.layers) > MAX_SHAPES:
            raise SVGError(f"more than {MAX_SHAPES} shapes to draw")
        if not np.abs(matrix).max() < MAX_COORDINATE:
            raise SVGError(f"a transform of <{self.source.tag(element)}> is not finite or too large")
        if clip:
            return [self.add(Layer(shape, matrix, style["clip-rule"][0]))]
        ops, stroke_first = [], style["paint-order"][0].startswith("stroke")
        for name in ("stroke", "fill") if stroke_first else ("fill", "stroke"):
            layer = Layer(shape, matrix, style["fill-rule"][0] if name == "fill" else "nonzero")
            if self.paints.paint(layer, element, name, style) and (
                    name == "fill" or self.paints.stroke(layer, element, style)):
                ops.append(self.add(layer))
        return ops

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
        edition.write_box_clips()
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

    def keep_styles(self, renamed):
        """Write into style="" what the elements were set to, where style sheets now do otherwise.

        A renamed element may lose rules (circle {}) or gain some (path {}), and so may elements around it
        (circle + rect {}, :first-of-type). !important goes, as it would overrule what is written.
        """
        for element in self.source.elements:
            if self.source.tag(element) == "style":
                self.twin[element].text = re.sub(r"!\s*important", "", element.text or "", flags=re.I)
        now = Styles(self.source, self.root)
        for element, twin in self.twin.items():
            before, after = (styles.cascade(e) if self.source.tag(e) else {}
                             for styles, e in ((self.styles, element), (now, twin)))
            if element in renamed or before != after:
                gained = {name: value for name in after if name not in before
                          and (value := self.neutral(element, name)) is not None}
                twin.set("style", style_text({name: (value, False) for name, value in {**before, **gained}.items()}))

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
        twin, style = self.twin[element], {}
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

    def write_box_clips(self):
        """Clip paths in units of a shape's box stay in place, whatever the shape does."""
        for element, box in self.document.box_clips.items():
            self.twin[element].set("clipPathUnits", "userSpaceOnUse")
            self.twin[element].set("transform", matrix_text(box @ transform(element.get("transform"))))

    def data(self):
        if not self.source.prefix:
            self.root.attrib.setdefault("xmlns", "http://www.w3.org/2000/svg")
        return ET.tostring(self.root, encoding="unicode").encode()
