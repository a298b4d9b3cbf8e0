"""Differentiable SVG rasterizer in pure PyTorch: analytic coverage, hand-written backward, CPU and CUDA.

    svg = SVG.load("apple.svg", size=256)              # an nn.Module: its parameters are the drawing
    adam = torch.optim.Adam(svg.param_groups(points=0.8, colours=0.01))
    image = svg.render(svg.sample_view())              # [1, 3, 256, 256] in [0, 1] on white
    loss(image).backward(); adam.step(); svg.project_()
    svg.save("edited.svg")                             # the same document, changed only where it was edited

From the command line: python svg_raster.py a.svg b.svg --out DIR --size 256

The way of the data through this file:
values -> outlines -> document (layers and groups) -> line segments -> coverage -> paint -> composite.
Colours are blended in sRGB without gamma, as browsers do. Coordinates are x right, y down.
"""
import argparse
import copy
import io
import math
import os
import re
import sys
import warnings
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor

MAX_BYTES, MAX_ELEMENTS, MAX_SHAPES, MAX_DEPTH = 32 << 20, 100_000, 30_000, 200
MAX_RULES = 1000
MAX_COORDINATE = 1e6                  # px; beyond it float32 cannot place an edge to a tenth of a pixel
MAX_PIECES, MAX_CELLS = 1 << 23, 1 << 27        # of one render: edge pieces, pixels over all layers
TOLERANCE = 0.03                      # px, how far a flattened curve may lie from the true one


class SVGError(ValueError):
    """The file cannot be read, drawn or written: one line that names the file and the reason."""


# ------------------------------------------------------------------ values: numbers, colours, transforms

DIGITS = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
NUMBER = re.compile(r"[\s,]*" + DIGITS)
FLAG = re.compile(r"[\s,]*([01])")    # an arc's flags may be packed: "a1 1 0 011 1"
COMMAND = re.compile(r"[\s,]*([MmZzLlHhVvCcSsQqTtAa])")
ARGUMENTS = dict(M=2, L=2, H=1, V=1, C=6, S=4, Q=4, T=2, A=7, Z=0)
UNITS = {"": 1, "px": 1, "pt": 4 / 3, "pc": 16, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96, "em": 16, "ex": 8}


def number(text):
    """A float that can be squared without overflow; where it is drawn, the limit of coordinates applies."""
    return min(max(float(text), -1e18), 1e18)


def numbers(text):
    return [number(n) for n in re.findall(DIGITS, text or "")]


def length(text, percent_of=1.0, default=0.0):
    """A length in user units (px); `percent_of` is what 100 % means; an unreadable one is the default."""
    match = re.fullmatch(NUMBER.pattern + r"\s*(%|[a-z]*)\s*", text or "")
    if not match or match[2] not in (*UNITS, "%"):
        return default
    return number(match[1]) * (percent_of / 100 if match[2] == "%" else UNITS[match[2]])


def colour(text):
    """CSS colour -> (r, g, b, a) in [0, 1], or None where it is not one."""
    text = text.strip().lower()
    if text == "transparent":
        return 0.0, 0.0, 0.0, 0.0
    text = re.sub(r"[\s,/]+", ",", text.replace("rgba", "rgb").replace("hsla", "hsl"))
    alpha = 1.0
    if match := re.fullmatch(r"(rgb|hsl)\(,?(.*?),?\)", text):
        parts = match[2].split(",")
        if len(parts) not in (3, 4) or not all(re.fullmatch(r"[-+.\de]+(%|deg)?", p) for p in parts):
            return None
        if len(parts) == 4:
            alpha = length(parts[3])
        if match[1] == "rgb":
            rgb = [length(p, 255) / 255 for p in parts[:3]]
            return (*(min(max(c, 0.0), 1.0) for c in rgb), min(max(alpha, 0.0), 1.0))
        text = f"hsl({parts[0].removesuffix('deg')},{parts[1]},{parts[2]})"
    try:
        rgba = ImageColor.getcolor(text, "RGBA")
    except ValueError:
        return None
    return rgba[0] / 255, rgba[1] / 255, rgba[2] / 255, rgba[3] / 255 * alpha


def affine(a=1.0, b=0.0, c=0.0, d=1.0, e=0.0, f=0.0):
    return np.array([[a, c, e], [b, d, f], [0.0, 0.0, 1.0]])


def transform(text):
    """An SVG transform list -> 3x3 matrix (column vectors)."""
    matrix = affine()
    for name, inner in re.findall(r"\b(\w+)\s*\(([^()]*)\)", text or ""):
        v = numbers(inner)
        if name == "matrix" and len(v) == 6:
            step = affine(*v)
        elif name == "translate" and v:
            step = affine(e=v[0], f=v[1] if len(v) > 1 else 0)
        elif name == "scale" and v:
            step = affine(a=v[0], d=v[-1])
        elif name == "rotate" and v:
            cos, sin = math.cos(math.radians(v[0])), math.sin(math.radians(v[0]))
            x, y = v[1:3] if len(v) == 3 else (0, 0)
            step = affine(e=x, f=y) @ affine(cos, sin, -sin, cos) @ affine(e=-x, f=-y)
        elif name in ("skewX", "skewY") and v:
            tan = math.tan(math.radians(v[0]))
            step = affine(c=tan) if name == "skewX" else affine(b=tan)
        else:
            continue
        matrix = matrix @ step
    return matrix


def fit(viewbox, aspect, x, y, width, height):
    """Matrix that takes a viewBox (min x, min y, w, h) to the rectangle, as preserveAspectRatio says."""
    sx, sy = width / viewbox[2], height / viewbox[3]
    align = re.search(r"x(Min|Mid|Max)Y(Min|Mid|Max)|none", aspect or "") or re.match("(Mid)(Mid)", "MidMid")
    if align[0] != "none":
        sx = sy = max(sx, sy) if "slice" in (aspect or "") else min(sx, sy)
        share = dict(Min=0.0, Mid=0.5, Max=1.0)
        x += share[align[1]] * (width - sx * viewbox[2])
        y += share[align[2]] * (height - sy * viewbox[3])
    return affine(sx, 0, 0, sy, x - sx * viewbox[0], y - sy * viewbox[1])


# ------------------------------------------------------------------ outlines: every shape as lines and cubics

class Outline:
    """Subpaths of straight lines and cubic Beziers over shared points (complex numbers: x + iy).

    A line is stored as the cubic (p, p, q, q), so that one index table [curves, 4] holds everything.
    Quadratics become cubics, arcs and circles cubics of at most 90 degrees each.
    """

    def __init__(self):
        self.points, self.curves = [], []
        self.subpaths = []            # each [first curve, first point, closed]

    def move(self, p):
        self.points.append(p)
        self.subpaths.append([len(self.curves), len(self.points) - 1, False])

    def line(self, p):
        self.curve(p)

    def curve(self, *points):
        if self.subpaths[-1][2]:      # drawing on after a close starts anew at the same place
            self.move(self.points[self.subpaths[-1][1]])
        sub, last = self.subpaths[-1], len(self.points) - 1
        if sub[0] == len(self.curves):
            last = sub[1]
        self.points += points
        n = len(self.points) - 1
        self.curves.append((last, n - 2, n - 1, n) if len(points) == 3 else (last, last, n, n))

    def arc(self, rx, ry, degrees, large, sweep, end):
        start, rx, ry = self.points[-1], abs(rx), abs(ry)
        turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
        if start == end:
            return
        if min(rx, ry) < 1e-12:
            return self.line(end)

        def to_circle(p):
            return complex((p / turn).real / rx, (p / turn).imag / ry)
        half = (to_circle(end) - to_circle(start)) / 2
        if not large and abs(half) < 1e-6:        # straight to within rounding
            return self.line(end)
        grow = max(abs(half), 1.0)    # radii too small to reach are scaled up
        rx, ry, half = rx * grow, ry * grow, half / grow
        towards = 1j * half / abs(half) * math.sqrt(max(0.0, 1 - abs(half) ** 2))
        centre = (to_circle(start) + to_circle(end)) / 2 + (towards if large != sweep else -towards)
        spoke, last = to_circle(start) - centre, to_circle(end) - centre
        angle = np.angle(last / spoke)
        if sweep and angle < 0 or not sweep and angle > 0:
            angle += 2 * math.pi * (1 if sweep else -1)
        count = max(1, math.ceil(abs(angle) / (math.pi / 2) - 1e-6))
        reach = 4j / 3 * math.tan(angle / count / 4)          # along the tangent, to a piece's handles

        def from_circle(p):
            return complex(rx * (centre + p).real, ry * (centre + p).imag) * turn
        for k in range(count):
            a, b = (spoke * complex(math.cos(t), math.sin(t)) for t in (angle * np.array([k, k + 1]) / count))
            corner = end if k == count - 1 else from_circle(b)
            self.curve(from_circle(a * (1 + reach)), from_circle(b * (1 - reach)), corner)

    def close(self):
        sub = self.subpaths[-1]
        if sub[2]:
            return
        gap = abs(self.points[-1] - self.points[sub[1]])
        if sub[0] < len(self.curves) and self.curves[-1][:2] != (sub[1], sub[1]) \
                and gap <= 1e-6 * max(map(abs, self.points[-4:])):
            self.points.pop()         # the path returned to its start by itself: one shared point
            curve = self.curves.pop()
            ends = (sub[1], sub[1]) if curve[0] == curve[1] else (curve[2], sub[1])
            self.curves.append((*curve[:2], *ends))
        else:
            self.curves.append((len(self.points) - 1, len(self.points) - 1, sub[1], sub[1]))
        sub[2] = True

    def data(self, points):
        """Path data with these coordinates [n, 2] in place of the stored ones."""
        def text(i):
            return f"{points[i][0]:.7g} {points[i][1]:.7g}"
        parts, bounds = [], [s[0] for s in self.subpaths[1:]] + [len(self.curves)]
        for (first, start, closed), stop in zip(self.subpaths, bounds):
            if first == stop:
                continue
            parts.append("M" + text(start))
            for k in range(first, stop):
                p, a, b, q = self.curves[k]
                if p != a:
                    parts.append(f"C{text(a)} {text(b)} {text(q)}")
                elif not (closed and k == stop - 1):          # Z draws the last line itself
                    parts.append("L" + text(q))
            parts += "Z" * closed
        return "".join(parts)


def path_outline(data):
    """Path data -> Outline. As the specification asks, a path with an error is drawn up to the error."""
    outline, at, command, pos, handle = Outline(), 0j, None, 0, None
    while True:
        if match := COMMAND.match(data, pos):
            command, pos = match[1], match.end()
        elif command in (None, "Z", "z") or not NUMBER.match(data, pos):
            return outline
        kind, v = command.upper(), []
        if not outline.points and kind != "M":
            return outline
        for k in range(ARGUMENTS[kind]):
            match = (FLAG if kind == "A" and k in (3, 4) else NUMBER).match(data, pos)
            if not match:
                return outline
            v.append(number(match[1]))
            pos = match.end()
        base = at if command.islower() else 0j
        p = [base + complex(*v[k:k + 2]) for k in range(0, len(v) - 1, 2)]
        # S and T mirror the last handle only after a curve of their own family
        mirrored = 2 * at - handle[1] if handle and handle[0] == {"S": "C", "T": "Q"}.get(kind) else at
        handle = None
        if kind == "M":
            at = p[0]
            outline.move(at)
            command = "l" if command == "m" else "L"
        elif kind == "Z":
            outline.close()
            at = outline.points[outline.subpaths[-1][1]]
        elif kind in "LHV":
            x, y = (p[0].real, p[0].imag) if kind == "L" else (base.real + v[0], at.imag)
            at = complex(at.real, base.imag + v[0]) if kind == "V" else complex(x, y)
            outline.line(at)
        elif kind in "CS":
            p = [mirrored, *p] if kind == "S" else p
            outline.curve(*p)
            at, handle = p[2], ("C", p[1])
        elif kind in "QT":
            q, end = p if kind == "Q" else (mirrored, p[0])
            outline.curve(at + (q - at) * 2 / 3, end + (q - end) * 2 / 3, end)
            at, handle = end, ("Q", q)
        else:
            at = base + complex(v[5], v[6])
            outline.arc(v[0], v[1], v[2], v[3] > 0, v[4] > 0, at)


def box_outline(x, y, width, height, rx=0.0, ry=0.0):
    """Rectangle with rounded corners."""
    outline = Outline()
    if width <= 0 or height <= 0:
        return outline
    rx, ry = min(rx, width / 2), min(ry, height / 2)
    # where the straight sides end
    left, right, top, bottom = x + rx, x + width - rx, y + ry, y + height - ry
    outline.move(complex(left, y))
    for side, corner in (((right, y), (x + width, top)), ((x + width, bottom), (right, y + height)),
                         ((left, y + height), (x, bottom)), ((x, top), (left, y))):
        if abs(complex(*side) - outline.points[-1]) > 1e-9 * (width + height):
            outline.line(complex(*side))
        if rx > 0 and ry > 0:
            outline.arc(rx, ry, 0, False, True, complex(*corner))
    outline.close()
    return outline


def ellipse_outline(cx, cy, rx, ry):
    outline = Outline()
    if rx > 0 and ry > 0:
        outline.move(complex(cx + rx, cy))
        for x, y in ((cx, cy + ry), (cx - rx, cy), (cx, cy - ry), (cx + rx, cy)):
            outline.arc(rx, ry, 0, False, True, complex(x, y))
        outline.close()
    return outline


# ------------------------------------------------------------------ document: XML and CSS to layers

INHERITED = {"fill", "fill-opacity", "fill-rule", "stroke", "stroke-width", "stroke-opacity",
             "stroke-linecap", "stroke-linejoin", "stroke-miterlimit", "stroke-dasharray",
             "stroke-dashoffset", "clip-rule", "color", "visibility", "paint-order"}
OWN = {"opacity", "clip-path", "display", "mask", "filter", "marker-start", "marker-mid", "marker-end",
       "mix-blend-mode", "stop-color", "stop-opacity", "overflow"}
REFUSED = ("mask", "filter", "marker-start", "marker-mid", "marker-end", "mix-blend-mode")
SHAPES = {"path", "circle", "ellipse", "rect", "line", "polyline", "polygon"}
GEOMETRY = ("d", "cx", "cy", "r", "rx", "ry", "x", "y", "width", "height", "points", "x1", "y1", "x2", "y2")
GRADIENTS = {"linearGradient", "radialGradient"}


@dataclass
class Shape:
    """Geometry of one element: an outline in local units, and where its points lie in the parameter."""
    element: ET.Element | None            # None: the frame of a nested viewport, which is not optimised
    outline: Outline
    scale: float                          # pixels (at the drawing's size) of one local unit, at its first use
    first: int                            # its first row in the point table


@dataclass
class Layer:
    """One fill or stroke of one shape, with indices into the parameter tables."""
    shape: Shape
    matrix: np.ndarray                    # local units -> pixels at the drawing's size
    rule: str = "nonzero"
    colour: int = -1                      # -1: clip geometry, or a gradient
    gradient: "Gradient | None" = None
    opacities: list = field(default_factory=list)
    stroke: dict | None = None


@dataclass
class Gradient:
    """Everything of a gradient but its stops' values, which are parameters."""
    stops: list                           # rows of the stop tables
    unit: np.ndarray                      # gradient coordinates -> t along x, or the unit circle
    focus: tuple | None                   # None: linear
    spread: str
    on_box: bool                          # objectBoundingBox units


def parse_xml(data, name):
    """bytes -> root element; names keep their prefixes as written, so that saving changes nothing else."""
    builder, depth, count, root = ET.TreeBuilder(insert_comments=True), 0, 0, None

    def start(tag, attributes):
        nonlocal depth, count, root
        depth, count = depth + 1, count + 1
        if depth > MAX_DEPTH or count > MAX_ELEMENTS:
            raise SVGError(f"{name}: " + (f"elements nested deeper than {MAX_DEPTH}" if depth > MAX_DEPTH
                                          else f"more than {MAX_ELEMENTS} elements"))
        element = builder.start(tag, attributes)
        root = element if root is None else root

    def end(tag):
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def entity(*_):
        raise SVGError(f"{name}: entity declarations (<!ENTITY>) are refused")

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
        raise SVGError(f"{name}: not well-formed XML: {error}") from None
    return root


def declarations(text):
    """'fill: red; stroke: none' -> dict."""
    pairs = (part.split(":", 1) for part in (text or "").split(";") if ":" in part)
    return {key.strip(): value.replace("!important", "").strip() for key, value in pairs}


class Document:
    """Walks the XML tree once and collects parameters, layers and the order of drawing.

    `ops` is a flat program of ("draw", layer), ("push", channels), ("mask", None) and ("pop", opacity row or
    None). A push opens an isolated buffer of 4 channels, or of 1 (alpha only) inside clip paths; mask
    multiplies the buffer below by the top one's alpha and drops it; pop blends the top buffer into the one
    below.
    """

    def __init__(self, path, skip_unsupported, size):
        self.name, self.size, self.skip = str(path), size, skip_unsupported
        try:
            if os.path.getsize(path) > MAX_BYTES:
                raise SVGError(f"{self.name}: larger than {MAX_BYTES >> 20} MiB")
            data = Path(path).read_bytes()
        except OSError as error:
            raise SVGError(f"{self.name}: cannot be read: {error.strerror}") from None
        self.root = parse_xml(data, self.name)
        self.prefix = self.root.tag.rpartition(":")[0]
        if self.tag(self.root) != "svg":
            raise SVGError(f"{self.name}: the root element is <{self.root.tag}>, not <svg>")
        self.elements = [e for e in self.root.iter() if self.tag(e)]
        self.ids = {}
        for element in self.elements:
            self.ids.setdefault(element.get("id"), element)
        self.skipped = []
        self.rules = self.style_sheet()
        self.cascade = {}                 # element -> its own properties, after style sheets and style=""
        # elements that `use` may draw several times: they share what they inherit, others own it
        targets = (self.reference(e) for e in self.elements if self.tag(e) == "use")
        self.shared = {part for target in set(targets) - {None} for part in target.iter()}
        self.shapes, self.shape_of, self.layers, self.ops, self.gradients = [], {}, [], [], {}
        self.points = self.fixed = 0      # rows in the table of optimised points, and of fixed ones
        self.tables = {kind: [] for kind in ("colours", "opacities", "widths", "stops")}
        self.slots = {}                   # (kind, element, property) -> row
        self.box_clips = {}               # clipPath in box units -> matrix of the box it was loaded with
        self.active, self.followed = [], 0        # references being followed, and the count of all so far
        view = numbers(self.root.get("viewBox"))
        has_view = len(view) == 4 and min(view[2:]) > 0
        sides = view[2:] if has_view else (100.0, 100.0)
        width, height = (length(self.root.get(k), side, side) for k, side in zip(("width", "height"), sides))
        if not (0 < width < 1e9 and 0 < height < 1e9):
            raise SVGError(f"{self.name}: a picture of {width:g} x {height:g} cannot be drawn")
        self.view = view = view if has_view else [0, 0, width, height]
        scale = size / max(width, height)
        frame = ((size - scale * width) / 2, (size - scale * height) / 2, scale * width, scale * height)
        self.frame = (*frame[:2], frame[0] + frame[2], frame[1] + frame[3])      # x0, y0, x1, y1 in pixels
        start = fit(view, self.root.get("preserveAspectRatio"), *frame)
        initial = {"fill": "black", "fill-opacity": "1", "stroke-opacity": "1", "stroke-width": "1"}
        style = {name: (value, self.root) for name, value in initial.items()}
        self.children(self.root, start, self.inherit(style, self.root), False)

    # -- reading elements

    def tag(self, element):
        """The name without the root's prefix; "" for comments and foreign elements."""
        prefix, _, tag = element.tag.rpartition(":") if isinstance(element.tag, str) else ("-", "", "")
        return tag if prefix == self.prefix else ""

    def unsupported(self, what):
        if not self.skip:
            raise SVGError(f"{self.name}: {what} is not supported (--skip-unsupported leaves it out)")
        if what not in self.skipped:
            self.skipped.append(what)
            warnings.warn(f"{self.name}: {what} is not supported and left out", stacklevel=2)

    def style_sheet(self):
        """[(specificity, compound selectors, declarations)] of all <style> elements, weakest first."""
        text = "".join(e.text or "" for e in self.elements if self.tag(e) == "style")
        first, *commented = text.replace("<!--", "").replace("-->", "").split("/*")
        text, rules = first + "".join(part.partition("*/")[2] for part in commented), []
        for rule in text.split("}")[:-1]:
            selectors, _, body = rule.partition("{")
            selectors = selectors.rpartition(";")[2]          # what follows any @import ...;
            for selector in map(str.strip, selectors.split(",")):
                if selector.startswith("@") or ":" in selector:
                    continue              # fonts, media and states do not apply to a still picture
                match = re.fullmatch(r"([\w-]*|\*)((?:[.#][\w-]+)*)", selector)
                if not match:
                    self.unsupported(f"the CSS selector '{selector}'")
                    continue
                tag, marks = match[1].strip("*"), re.findall(r"[.#][\w-]+", match[2])
                rank = (sum(m[0] == "#" for m in marks), len(marks), bool(tag))
                rules.append((rank, tag, marks, declarations(body)))
        if len(rules) > MAX_RULES:
            raise SVGError(f"{self.name}: more than {MAX_RULES} style sheet rules")
        return sorted(rules, key=lambda rule: rule[0])

    def properties(self, element):
        """The element's own properties: attributes, overruled by style sheets, overruled by style=""."""
        if element not in self.cascade:
            found = {k: v.strip() for k, v in element.attrib.items() if k in INHERITED or k in OWN}
            marks = {"." + c for c in element.get("class", "").split()} | {"#" + element.get("id", "")}
            for _, tag, needed, body in self.rules:
                if tag in ("", self.tag(element)) and marks.issuperset(needed):
                    found.update(body)
            found.update(declarations(element.get("style")))
            self.cascade[element] = {k: v for k, v in found.items() if v != "inherit"}
        return self.cascade[element]

    def reference(self, element):
        """The element that href points at; None if there is none in this document."""
        href = next((v for k, v in element.attrib.items() if k.rpartition(":")[2] == "href"), "").strip()
        if href and href[0] != "#":
            raise SVGError(f"{self.name}: the external reference '{href[:80]}' is refused")
        return self.ids.get(href[1:]) if href else None

    def link(self, value):
        """url(#id) -> element or None; other text -> None."""
        match = re.match(r"url\(([^)]*)\)", value or "")
        target = match[1].strip(" \t\n'\"") if match else ""
        if match and target[:1] != "#":
            raise SVGError(f"{self.name}: the external reference '{target[:80]}' is refused")
        return self.ids.get(target[1:]) if match else None

    def slot(self, kind, element, name, value):
        """Row of a parameter that is written back to this property of this element."""
        key = (kind, element, name)
        if key not in self.slots:
            self.slots[key] = len(self.tables[kind])
            self.tables[kind].append(value)
        return self.slots[key]

    def units(self, text, name, default=0.0):
        """A length in user units; by its name, per cent are of the viewBox's width, height, or mean side."""
        width, height = self.view[2:]
        of = dict(x=width, w=width, y=height, h=height).get(name.lstrip("cfr")[:1], math.hypot(*self.view[2:])
                                                            / math.sqrt(2))
        return length(text, of, default)

    def measure(self, element, name, default=0.0):
        return self.units(element.get(name), name, default)

    def inherit(self, style, element):
        """style {property: (value, element that declared it)} as the element passes it on."""
        own = self.properties(element)
        return {**style, **{name: (value, element) for name, value in own.items() if name in INHERITED}}

    # -- walking the tree

    def children(self, element, matrix, style, clip):
        for child in element:
            self.visit(child, matrix, style, clip)

    def visit(self, element, matrix, style, clip):
        """Append what the element draws to ops; in clip paths only geometry counts."""
        tag, props = self.tag(element), None
        if tag in ("text", "image", "foreignObject"):
            return self.unsupported(f"<{tag}>")
        if tag not in SHAPES and tag not in ("g", "a", "svg", "use", "switch"):
            return                        # defs, gradients, titles, foreign elements: nothing to draw here
        props = self.properties(element)
        if props.get("display") == "none":
            return
        for name in REFUSED:
            if props.get(name, "none") not in ("none", "normal", "auto"):
                self.unsupported(f"{name} on <{tag}>")
        style = self.inherit(style, element)
        matrix = matrix @ transform(element.get("transform"))
        outer, self.ops = self.ops, []
        if tag in SHAPES:
            self.draw(element, matrix, style, clip)
        elif tag == "use":
            self.use(element, matrix, style, clip)
        elif tag == "svg":
            self.viewport(element, element, matrix, style, clip)
        elif tag == "switch":
            self.children([c for c in element if self.tag(c)][:1], matrix, style, clip)
        else:
            self.children(element, matrix, style, clip)
        content, self.ops = self.ops, outer
        clip_path = self.link(props.get("clip-path"))
        mask = None if clip_path is None else self.clip(clip_path, element, matrix)
        opacity = None
        if not clip and length(props.get("opacity"), default=1.0) < 1:
            value = max(0.0, length(props["opacity"], default=1.0))
            opacity = self.slot("opacities", element, "opacity", value)
        self.isolate(content, opacity, mask, clip)

    def isolate(self, content, opacity, mask, clip):
        """Append the content to ops, in a buffer of its own where opacity or a mask asks for one."""
        if opacity is not None and mask is None and len(content) == 1:
            self.layers[content[0][1]].opacities.append(opacity)
            opacity = None
        if content and (opacity is not None or mask is not None):
            masking = [("push", 1), *mask, ("mask", None)] if mask is not None else []
            content = [("push", 1 if clip else 4), *content, *masking, ("pop", opacity)]
        self.ops += content

    def follow(self, element):
        """Guard against references that lead back to themselves, and against their explosion."""
        if element in self.active:
            raise SVGError(f"{self.name}: '#{element.get('id')}' refers to itself")
        self.followed += 1
        if len(self.active) > 30 or self.followed > MAX_SHAPES:
            raise SVGError(f"{self.name}: references nested deeper than 30" if len(self.active) > 30 else
                           f"{self.name}: more than {MAX_SHAPES} references to follow")
        self.active.append(element)

    def use(self, element, matrix, style, clip):
        target = self.reference(element)
        if target is None:
            return
        self.follow(target)
        matrix = matrix @ affine(e=self.measure(element, "x"), f=self.measure(element, "y"))
        if self.tag(target) in ("symbol", "svg"):
            self.viewport(target, element, matrix, style, clip)
        else:
            self.visit(target, matrix, style, clip)
        self.active.pop()

    def viewport(self, element, sized_by, matrix, style, clip):
        """A nested <svg>, or a <symbol> that is used: its own viewBox, clipped to its rectangle."""
        props = self.properties(element)
        style = self.inherit(style, element)
        x, y = (self.measure(element, k) for k in "xy") if self.tag(element) == "svg" else (0.0, 0.0)
        width, height = (self.measure(sized_by, k, self.measure(element, k, self.view[i]))
                         for i, k in ((2, "width"), (3, "height")))
        view, mask = numbers(element.get("viewBox")), None
        outer, self.ops = self.ops, []
        if props.get("overflow", "hidden") in ("hidden", "scroll") and width > 0 and height > 0:
            shape = self.shape(None, box_outline(x, y, width, height), matrix)
            if shape is None:
                self.ops = outer
                return
            self.layers.append(Layer(shape, matrix))
            mask = [("draw", len(self.layers) - 1)]
        if len(view) == 4 and min(view[2:]) > 0:
            matrix = matrix @ fit(view, element.get("preserveAspectRatio"), x, y, width, height)
        else:
            matrix = matrix @ affine(e=x, f=y)
        self.children(element, matrix, style, clip)
        content, self.ops = self.ops, outer
        self.isolate(content, None, mask, clip)

    def clip(self, element, target, matrix):
        """ops that draw a clipPath's shapes as alpha."""
        if self.tag(element) != "clipPath":
            return None
        on_box = element.get("clipPathUnits") == "objectBoundingBox"
        if on_box and (self.tag(target) not in SHAPES or element in self.box_clips):
            return self.unsupported("clipPathUnits=objectBoundingBox for more than one shape")
        self.follow(element)
        if on_box:
            points = np.array(self.outline(target).points or [0j])
            low, high = (complex(f(points.real), f(points.imag)) for f in (np.min, np.max))
            self.box_clips[element] = affine((high - low).real, 0, 0, (high - low).imag, low.real, low.imag)
            matrix = matrix @ self.box_clips[element]
        outer, self.ops = self.ops, []
        self.children(element, matrix @ transform(element.get("transform")), self.inherit({}, element), True)
        mask, self.ops = self.ops, outer
        own = self.link(self.properties(element).get("clip-path"))
        if own is not None:
            mask += [("push", 1), *(self.clip(own, target, matrix) or []), ("mask", None)]
        self.active.pop()
        return mask

    # -- shapes and their paint

    def outline(self, element):
        tag, size = self.tag(element), lambda *names: [self.measure(element, n) for n in names]
        if tag == "path":
            return path_outline(element.get("d", ""))
        if tag == "rect":
            rx, ry = (self.measure(element, k, None) for k in ("rx", "ry"))
            rx, ry = (ry or 0 if rx is None else rx), (rx or 0 if ry is None else ry)
            return box_outline(*size("x", "y", "width", "height"), max(rx, 0), max(ry, 0))
        if tag in ("circle", "ellipse"):
            cx, cy = size("cx", "cy")
            rx, ry = size("r", "r") if tag == "circle" else size("rx", "ry")
            return ellipse_outline(cx, cy, rx, ry)
        v = size("x1", "y1", "x2", "y2") if tag == "line" else numbers(element.get("points"))
        outline = Outline()
        for k in range(0, len(v) - 1, 2):
            (outline.line if k else outline.move)(complex(v[k], v[k + 1]))
        if tag == "polygon" and outline.points:
            outline.close()
        return outline

    def shape(self, element, outline, matrix):
        """Shape of the element, made at its first use; None if it has nothing to draw."""
        if element in self.shape_of and element is not None:
            return self.shape_of[element]
        scale = math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        points = np.array(outline.points)
        if points.size and not np.all(np.abs(points) < MAX_COORDINATE / scale if scale else True):
            what = "a viewport" if element is None else f"<{self.tag(element)}>"
            raise SVGError(f"{self.name}: {what} has coordinates that are not finite or lie more than "
                           f"{MAX_COORDINATE:g} px away")
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

    def draw(self, element, matrix, style, clip):
        shape = self.shape(element, self.outline(element) if element not in self.shape_of else None, matrix)
        if shape is None or style.get("visibility", ("visible",))[0] != "visible":
            return
        if len(self.layers) > MAX_SHAPES:
            raise SVGError(f"{self.name}: more than {MAX_SHAPES} shapes to draw")
        if not np.abs(matrix).max() < MAX_COORDINATE:
            raise SVGError(f"{self.name}: a transform of <{self.tag(element)}> is not finite or too large")

        def get(name, default=""):
            return style.get(name, (default, None))[0]
        if clip:
            self.ops.append(("draw", len(self.layers)))
            self.layers.append(Layer(shape, matrix, get("clip-rule")))
            return
        names = ("stroke", "fill") if get("paint-order").startswith("stroke") else ("fill", "stroke")
        for name in names:
            layer = Layer(shape, matrix, get("fill-rule") if name == "fill" else "nonzero")
            if not self.paint(layer, element, name, style):
                continue
            if name == "stroke":
                width, dashes = self.units(get("stroke-width"), "stroke-width", 1.0), []
                if get("stroke-dasharray", "none") != "none":
                    dashes = [min(abs(d), MAX_COORDINATE) for d in numbers(get("stroke-dasharray"))]
                    dashes = dashes * (1 + len(dashes) % 2) if sum(dashes) > 0 else []
                if width <= 0:
                    continue
                if width * shape.scale > MAX_COORDINATE:
                    raise SVGError(f"{self.name}: a stroke is wider than {MAX_COORDINATE:g} px")
                layer.stroke = dict(
                    width=self.slot("widths", self.owner(element, "stroke-width", style), "stroke-width",
                                    (width, shape.scale)),
                    cap=get("stroke-linecap"), join=get("stroke-linejoin"), dashes=dashes,
                    miter=max(1.0, length(get("stroke-miterlimit"), default=4.0)),
                    offset=float(np.clip(length(get("stroke-dashoffset")), -MAX_COORDINATE, MAX_COORDINATE)))
            self.ops.append(("draw", len(self.layers)))
            self.layers.append(layer)

    def owner(self, element, name, style):
        """The element a property is written back to: the shape or, if shared, where it was declared."""
        return style[name][1] if element in self.shared and name in style else element

    def paint(self, layer, element, name, style):
        """Set the layer's colour or gradient and its opacity; False where there is no paint."""
        value = style.get(name, ("none", None))[0]
        source, match = self.link(value), re.match(r"url\([^)]*\)\s*(.*)", value)
        owner, alpha = self.owner(element, name, style), 1.0
        if source is not None and self.tag(source) in GRADIENTS:
            layer.gradient = self.gradient(source)
            if layer.gradient is None:
                return False
        elif source is not None and self.tag(source) == "pattern":
            self.unsupported(f"pattern {name} on <{self.tag(element)}>")
            return False
        else:
            value = match[1] if match else value
            value = style.get("color", ("black",))[0] if value.lower() == "currentcolor" else value
            rgba = None if value in ("none", "") else colour(value)
            if rgba is None:
                return False
            layer.colour, alpha = self.slot("colours", owner, name, rgba[:3]), rgba[3]
        key = name + "-opacity"
        alpha *= min(max(length(style.get(key, ("1",))[0], default=1.0), 0.0), 1.0)
        owner = owner if owner is element or key not in style else style[key][1]
        layer.opacities.append(self.slot("opacities", owner, key, alpha))
        return True

    def gradient(self, element):
        """Gradient of the element, with what it inherits through href; None if it has no stops."""
        if element in self.gradients:
            return self.gradients[element]
        chain = [element]
        while (parent := self.reference(chain[-1])) is not None and self.tag(parent) in GRADIENTS:
            if parent in chain:
                raise SVGError(f"{self.name}: gradient '#{parent.get('id')}' refers to itself")
            if len(chain) > 30:
                raise SVGError(f"{self.name}: gradients nested deeper than 30")
            chain.append(parent)
        stops = next((s for e in chain if (s := [c for c in e if self.tag(c) == "stop"])), [])

        def inherited(name, default):
            return next((e.get(name) for e in chain if e.get(name) is not None), default)
        on_box = inherited("gradientUnits", "") != "userSpaceOnUse"

        def get(name, default):
            text = inherited(name, default)
            return None if text is None else length(text) if on_box else self.units(text, name)
        rows, previous = [], 0.0
        for stop in stops:
            props = self.properties(stop)
            text = props.get("stop-color", "black")
            text = props.get("color", "black") if text.lower() == "currentcolor" else text
            rgba = colour(text) or (0.0, 0.0, 0.0, 1.0)
            alpha = rgba[3] * min(max(length(props.get("stop-opacity"), default=1.0), 0.0), 1.0)
            previous = min(max(length(stop.get("offset")), previous), 1.0)
            rows.append(self.slot("stops", stop, "stop", (previous, *rgba[:3], alpha)))
        focus, unit = None, affine(0, 0, 0, 0, 1, 0)          # a gradient of no extent shows its last stop
        if self.tag(element) == "linearGradient":
            x1, y1, x2, y2 = get("x1", "0"), get("y1", "0"), get("x2", "100%"), get("y2", "0")
            square = (x2 - x1) ** 2 + (y2 - y1) ** 2
            if square > 1e-18:
                vx, vy = (x2 - x1) / square, (y2 - y1) / square
                unit = affine(vx, 0, vy, 0, -x1 * vx - y1 * vy, 0)
        else:
            cx, cy, r = get("cx", "50%"), get("cy", "50%"), get("r", "50%")
            fx, fy = get("fx", None), get("fy", None)
            if r > 1e-9:
                focus = complex(0 if fx is None else (fx - cx) / r, 0 if fy is None else (fy - cy) / r)
                focus *= min(1.0, 0.999 / max(abs(focus), 1e-9))      # the focus stays inside the circle
                unit, focus = affine(1 / r, 0, 0, 1 / r, -cx / r, -cy / r), (focus.real, focus.imag)
        own = transform(inherited("gradientTransform", ""))
        if not np.abs(np.stack([unit, own])).max() < 1e12:
            raise SVGError(f"{self.name}: gradient '#{element.get('id')}' is not finite or too large")
        if abs(np.linalg.det(own)) < 1e-30:
            rows = []
        spread = inherited("spreadMethod", "pad")
        found = Gradient(rows, unit @ np.linalg.inv(own), focus, spread, on_box) if rows else None
        self.gradients[element] = found
        return found


# ------------------------------------------------------------------ line segments: flattening and stroking

BUTT, ROUND, SQUARE = 0, 1, 2           # caps
MITER, BEVEL = 0, 2                     # joins, ROUND among them


def expand(counts):
    """counts [n] -> (owner [sum], position within the owner [sum]): the index tables of a ragged array."""
    counts = counts.long()
    ends = counts.cumsum(0)
    if len(ends) and int(ends[-1]) > MAX_PIECES:
        raise SVGError("the drawing has too many edges to render at this size")
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner), device=counts.device) - (ends - counts)[owner]


def scatter_sum(index, values, size):
    """sums [size] of values [n] by index [n]; in the same order on every run, on CUDA too."""
    sums = values.new_zeros(size)
    if values.is_cuda:
        return sums.index_put_((index,), values, accumulate=True)
    return sums.index_add_(0, index, values)


class Take(torch.autograd.Function):
    """x[index] for x [n, ...]; unlike torch's own, its backward adds in the same order on every run."""

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

    control [K, 4, 2]; straight [K] bool; scale [K] pixels per unit; half_width [K] px of a stroke, else 0.
    Returns segments [S, 4] (x0, y0, x1, y1), the curve each belongs to [S], and whether it starts it [S].
    """
    with torch.no_grad():
        arms = control.diff(dim=1)                                      # [K, 3, 2]
        bend = arms.diff(dim=1).norm(dim=2).amax(1) * scale             # Wang's bound on the chord error
        a, b = arms[:, :-1], arms[:, 1:]
        turn = torch.atan2((a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).abs(), (a * b).sum(2)).sum(1)
        count = (0.75 * bend / TOLERANCE).sqrt().maximum(turn * (half_width / (8 * TOLERANCE)).sqrt())
        # four chords at least: with one, the inner control points would get no gradient
        count = torch.where(straight, 1, count.ceil().clamp(4, 1000)).long()
    owner, k = expand(count + 1)                                        # one vertex more than chords
    t = (k / count[owner])[:, None]
    s = 1 - t
    weights = torch.cat([s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t], 1)          # [V, 4]
    vertices = (weights.to(control)[:, :, None] * take(control, owner)).sum(1)  # [V, 2]
    starts = (k < count[owner]).nonzero()[:, 0]
    segments = torch.cat([vertices[starts], vertices[starts + 1]], 1)
    return segments, owner[starts], k[starts] == 0


def dash(segments, layer, subpath, corner, closed, patterns):
    """Cut the centre lines of dashed layers into their dashes, each an open subpath of its own.

    Arguments and results are the first five of `stroke`; patterns: {layer: (lengths, offset)}, an even
    number of lengths, alternately drawn and left out, in the units of the segments.
    """
    dashed = torch.isin(layer, torch.tensor(list(patterns), device=layer.device))
    parts = [[x[~dashed] for x in (segments, layer, subpath, corner)]]
    for number, (pattern, offset) in patterns.items():
        lines, path, starts = (x[layer == number] for x in (segments, subpath, corner))
        if len(lines) == 0:
            continue
        marks = lines.new_tensor(np.cumsum([0.0, *pattern]))
        period, count = float(marks[-1]), len(pattern)
        size = (lines[:, 2:] - lines[:, :2]).norm(dim=1)
        ends = size.cumsum(0)
        new = torch.ones_like(starts)
        new[1:] = path[1:] != path[:-1]
        first = torch.cummax(torch.where(new, torch.arange(len(new), device=new.device), 0), 0)[0]
        begin = ends - size - take(ends - size, first)      # arc length along the subpath, [lines]
        if ends[-1].item() * count > (MAX_PIECES >> 4) * period:
            raise SVGError("a stroke has too many dashes")

        def interval(s, right):
            s = (s.detach() + offset).clamp_min(-1e9)
            turns = (s / period).floor()
            return (turns * count).long() + torch.searchsorted(marks[1:], s - turns * period, right=right)
        low = interval(begin, True)
        low = low - (new & (marks.diff() == 0)[(low - 1) % count]).long()     # a dot at the very start
        owner, k = expand((interval(begin + size, False) - low).clamp_min(0) + 1)
        index = low[owner] + k

        def position(i):                  # where interval i starts, as a share of the segment
            at = (i // count) * period + marks[i % count] - offset
            return ((at - take(begin, owner)) / take(size, owner).clamp_min(1e-12)).clamp(0, 1)[:, None]
        a, b = take(lines, owner).split(2, dim=1)
        pieces = torch.cat([torch.lerp(a, b, position(index)), torch.lerp(a, b, position(index + 1))], 1)
        # around the start of a closed subpath the last dash runs on into the first
        path = path[owner]
        last = torch.cat([path[1:] != path[:-1], torch.ones_like(starts[:1])])
        final = torch.zeros(len(closed), dtype=torch.long, device=index.device)
        final[path[last]] = index[last]
        wraps = closed[path] & (index == low[first][owner]) & (final[path] % 2 == 0) & (final[path] != index)
        index = torch.where(wraps, final[path], index)
        order = torch.argsort(2 * path + wraps, stable=True)
        order = order[index[order] % 2 == 0]
        path, index, pieces = path[order], index[order], pieces[order]
        fresh = torch.ones_like(path, dtype=torch.bool)
        fresh[1:] = (path[1:] != path[:-1]) | (index[1:] != index[:-1])
        parts.append([pieces, torch.full_like(path, number), fresh.cumsum(0) - 1 + len(closed),
                      ((k == 0) & starts[owner])[order]])
        closed = torch.cat([closed, torch.zeros_like(closed[:1]).expand(int(fresh.sum()))])
    return *(torch.cat(x) for x in zip(*parts)), closed


def stroke(segments, layer, subpath, corner, closed, style):
    """Centre lines -> the directed boundary of their strokes, as an unordered bag of segments.

    Coverage sums signed areas, so the boundary needs no contour order: every segment gives two parallel
    sides, every joint an outer chain and an inner one through the joint, every open end a cap.

    Args:
        segments [S, 4]; layer, subpath [S], both increasing.
        corner [S] bool: starts at a path vertex, not inside a curve; closed [subpaths] bool.
        style: tensors [L]: half (width), miter, arc (radians per chord of a round join), cap, join.
    Returns segments [B, 4] and layer [B].
    """
    size = (segments[:, 2:] - segments[:, :2]).detach().norm(dim=1)
    new = torch.ones_like(corner)
    new[1:] = subpath[1:] != subpath[:-1]
    alive = torch.zeros_like(closed).index_put((subpath[size > 1e-6],), torch.ones_like(closed[:1]))
    keep = ((size > 1e-6) | new & ~alive[subpath]).nonzero()[:, 0]      # of no length at all: a dot
    closed = closed & alive
    segments, layer, subpath, corner = segments[keep], layer[keep], subpath[keep], corner[keep]
    n = len(keep)
    if n == 0:
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
    first_of = torch.cummax(torch.where(new, torch.arange(n, device=new.device), 0), 0)[0]
    after = torch.where(last, first_of, torch.arange(n, device=new.device) + 1)           # the next segment
    joint = (~last | closed[subpath]).nonzero()[:, 0]
    ends, heads = (last & ~closed[subpath]).nonzero()[:, 0], (new & ~closed[subpath]).nonzero()[:, 0]

    bag, owners = [torch.cat([a + h, b + h], 1), torch.cat([b - h, a - h], 1)], [layer, layer]

    def add(p, q, index, flip=None):
        """Segments p -> q (q -> p where flip) of the layers of the segments `index`."""
        if flip is not None:
            p, q = torch.where(flip, q, p), torch.where(flip, p, q)
        bag.append(torch.cat([p, q], 1))
        owners.append(layer[index])

    # joints: the outer side bulges by the join's kind, the inner side passes through the joint
    nxt = after[joint]
    n0, n1, v, hj = normal[joint], normal[nxt], b[joint], half[joint]
    cos, cross = (n0 * n1).sum(1, keepdim=True), n0[:, :1] * n1[:, 1:] - n0[:, 1:] * n1[:, :1]
    side = torch.where(cross > 0, -1.0, 1.0).to(a)                      # +1: the side of +normal is outside
    e0, e1, flip = side * n0, side * n1, side < 0
    sharp = (cos < torch.where(corner[nxt], 0.999, 0.7)[:, None])[:, 0]
    inner0, inner1 = v - hj * e0, v - hj * e1
    add(inner1[~sharp], inner0[~sharp], joint[~sharp], flip[~sharp])
    add(inner1[sharp], v[sharp], joint[sharp], flip[sharp])
    add(v[sharp], inner0[sharp], joint[sharp], flip[sharp])
    kind = torch.where(corner[nxt], style["join"][layer[joint]], ROUND)
    within = 2 <= (1 + cos[:, 0]) * style["miter"][layer[joint]].square()                 # 1 / sin <= limit
    miter = (kind == MITER) & within & (cos[:, 0] < 0.9999)
    tip = v + hj * (e0 + e1) / (1 + cos).clamp_min(1e-6)
    add((v + hj * e0)[miter], tip[miter], joint[miter], flip[miter])
    add(tip[miter], (v + hj * e1)[miter], joint[miter], flip[miter])
    flat = ~miter & (kind != ROUND)
    add((v + hj * e0)[flat], (v + hj * e1)[flat], joint[flat], flip[flat])

    # caps: at the end from +normal around to -normal, at the head the other way
    at = torch.cat([ends, heads])
    sign = torch.cat([torch.ones_like(ends), -torch.ones_like(heads)])[:, None].to(a)
    tips, across, ahead = torch.cat([b[ends], a[heads]]), sign * h[at], sign * half[at] * d[at]
    cap = style["cap"][layer[at]]
    square = cap == SQUARE
    push = torch.where(square[:, None], ahead, 0)
    plain = cap != ROUND
    add((tips + across + push)[plain], (tips - across + push)[plain], at[plain])
    add((tips + across)[square], (tips + across + ahead)[square], at[square])
    add((tips - across + ahead)[square], (tips - across)[square], at[square])

    # round joins and caps: arcs that start along `out` and turn towards `towards`
    r, c = kind == ROUND, ~plain
    index = torch.cat([joint[r], at[c]])
    angle = torch.cat([torch.atan2(cross.abs(), cos)[r], torch.full_like(half[at[c]], math.pi)])
    out = torch.cat([(hj * e0)[r], across[c]])
    towards = torch.cat([(hj * d[joint])[r], ahead[c]])
    centre = torch.cat([v[r], tips[c]])
    flip = torch.cat([flip[r], torch.zeros_like(plain[c])[:, None]])
    chords = (angle[:, 0].detach() / style["arc"][layer[index]]).ceil().clamp(1, 64).long()
    owner, k = expand(chords)
    part = take(angle, owner) / chords[owner, None]
    centre, out, towards = (take(x, owner) for x in (centre, out, towards))

    def on_arc(step):
        return centre + out * torch.cos(part * step[:, None]) + towards * torch.sin(part * step[:, None])
    add(on_arc(k), on_arc(k + 1), index[owner], flip[owner])
    return torch.cat(bag), torch.cat(owners)


# ------------------------------------------------------------------ coverage: signed areas, their derivatives

def running_sum(index, values, size):
    """Running sum [size] of scatter_sum; in fixed point on CUDA, where only integers always add up alike."""
    if not values.is_cuda:
        return scatter_sum(index, values, size).cumsum_(0)
    sums = torch.zeros(size, dtype=torch.long, device=values.device)
    sums.index_add_(0, index, (values.double() * 2.0 ** 40).round().long())
    return (sums.cumsum(0).double() * 2.0 ** -40).to(values)


def split(segments, layer, boxes, level_too):
    """Cut segments into pieces that each lie in one pixel of their layer's box.

    segments [S, 4] px; layer [S]; boxes [L, 4] (x0, y0, width, height) int; level_too: also cut the level
    segments, which add no area but do move it.
    Returns per piece [P]: segment, row, column (-1 left of the box, width right of it), the part ta..tb of
    the segment, signed height dy, and its ends xa, ya, xb, yb relative to the box.
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
    # the columns outside the box take everything beyond it
    left = column.masked_fill(column < 0, -math.inf)
    right = (column + 1).masked_fill(column == width[p], math.inf)
    xs, xe = torch.clamp(xa, left, right), torch.clamp(xb, left, right)
    us, ue = torch.where(single, 0, (xs - xa) / run), torch.where(single, 1, (xe - xa) / run)
    return (seg, row.long(), column.long(), ta + span * us, ta + span * ue, fall * (ue - us),
            xs, ya + fall * us, xe, ya + fall * ue)


class Coverage(torch.autograd.Function):
    """Share of every pixel that every layer's shape covers.

    forward(segments [S, 4] px, layer [S], boxes [L, 4] int, base [L], even_odd [L] bool, cells):
    the layers' boxes lie one after the other in one flat buffer [cells]; layer l starts at base[l] and has
    `height` rows of `width + 1`, the last column being padding. Each piece of an edge adds its signed area
    to its own pixel and its height to the next one; a running sum then turns that into winding numbers
    averaged over the pixel. Closed shapes sum to zero over a row, so one sum serves all rows of all layers.

    backward: a moving edge sweeps area at its normal speed, so each end point collects the boundary integral
    of the incoming gradient. (Autograd of the area formula would miss level edges, which add no area,
    and give one-sided derivatives for edges on pixel lines.)
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
            # An edge on a pixel line touches two pixels: average the slopes seen from either side
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
                     for (valid, _), mine, other in zip(sides, w, w[::-1])]
            ctx.save_for_backward(segments, seg, ta, tb, cell, weight, on, sides[0][1], sides[1][1], *extra)

        for l in even_odd.nonzero()[:, 0].tolist():
            own = winding[base[l]:base[l + 1] if l + 1 < len(base) else cells]
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
    """Derivative of the covered share by the winding number; at the kink, the mean of both sides."""
    folded = torch.where(even_odd, winding - 2 * (winding / 2).round(), winding)
    beyond = torch.where(even_odd, -1.0, 0.0).to(winding)
    size = folded.abs()
    slope = torch.where(size < 1 - 1e-5, 1, torch.where(size > 1 + 1e-5, beyond, (1 + beyond) / 2))
    return slope * folded.sign()


# ------------------------------------------------------------------ paint and compositing

def gradient_paint(matrix, gradient, offsets, rgba, box):
    """Colours of a gradient over a box of pixels.

    matrix [3, 3]: pixels -> gradient coordinates; offsets [K], rgba [K, 4]; box (x0, y0, width, height).
    Returns [4, height, width], alpha not multiplied in.
    """
    x = torch.arange(box[2], device=matrix.device, dtype=matrix.dtype) + (box[0] + 0.5)
    y = torch.arange(box[3], device=matrix.device, dtype=matrix.dtype)[:, None] + (box[1] + 0.5)
    u = matrix[0, 0] * x + (matrix[0, 1] * y + matrix[0, 2])
    if gradient.focus is None:
        t = u
    else:                                 # the circle through (u, v) of radius t around focus * (1 - t)
        v = matrix[1, 0] * x + (matrix[1, 1] * y + matrix[1, 2])
        fx, fy = gradient.focus
        u, v, a = u - fx, v - fy, 1 - fx * fx - fy * fy
        along = u * fx + v * fy
        t = (along + (along.square() + a * (u * u + v * v)).clamp_min(1e-12).sqrt()) / a
    if gradient.spread == "repeat":
        t = t - t.detach().floor()
    elif gradient.spread == "reflect":
        t = (t - 2 * (t.detach() / 2).round()).abs()
    # piecewise linear: each interval adds its colour difference times how far t has come through it
    through = ((t.reshape(1, -1) - offsets[:-1, None]) / offsets.diff().clamp_min(1e-6)[:, None]).clamp(0, 1)
    return (rgba[:1].T + rgba.diff(dim=0).T @ through).view(4, box[3], box[2])


def overlap(inner, outer):
    """Slices of the common part of two boxes (x0, y0, x1, y1), into each of them; None if there is none."""
    x0, y0 = max(inner[0], outer[0]), max(inner[1], outer[1])
    x1, y1 = min(inner[2], outer[2]), min(inner[3], outer[3])
    if x0 >= x1 or y0 >= y1:
        return None
    whole = (x0, y0, x1, y1) == inner
    return [... if whole and b is inner else (..., slice(y0 - b[1], y1 - b[1]), slice(x0 - b[0], x1 - b[0]))
            for b in (inner, outer)]


@dataclass
class Plan:
    """What Composite does: see Document for the operations; boxes are (x0, y0, x1, y1) in pixels."""
    size: int
    ops: list                             # [(name, argument)]
    op_boxes: list                        # of what each operation draws, or of the buffer it pushes or pops
    opener: dict                          # step of a mask or pop -> step of its push
    boxes: list                           # of the layers
    paint: dict                           # layer -> number of its gradient paint

    def parts(self, cells):
        """A flat buffer like the coverage's, cut into the layers'."""
        return cells.split([(x1 - x0 + 1) * (y1 - y0) for x0, y0, x1, y1 in self.boxes])

    def views(self, parts):
        """[h, w] of every layer, the padding left out."""
        return [part.view(y1 - y0, x1 - x0 + 1)[:, :-1] for part, (x0, y0, x1, y1) in zip(parts, self.boxes)]


class Composite(torch.autograd.Function):
    """Layers blended back to front on white, each on the crop of its box; keeps only the crops' backdrops.

    forward(plan, coverage [cells], rgba [L, 4], opacities [O], *paints [4, h, w]) -> image [3, size, size].
    Buffers hold premultiplied colours; on the white canvas alpha is 1 throughout and is not stored.
    """

    @staticmethod
    def tables(plan, coverage, rgba):
        """By layer: alpha as a number, coverage times alpha [h, w]; {channels: solid colours [C, 1, 1]}."""
        alphas = rgba[:, 3].tolist()
        areas = plan.views([part * alpha for part, alpha in zip(plan.parts(coverage), alphas)])
        opaque = torch.cat([rgba[:, :3], torch.ones_like(rgba[:, 3:])], 1)[:, :, None, None]
        return alphas, areas, {3: opaque[:, :3].unbind(0), 4: opaque.unbind(0), 1: opaque[:, 3:].unbind(0)}

    @staticmethod
    def source(paint, area, channels):
        """Colour [channels, h, w] and alpha [h, w] of a gradient paint [4, h, w] over an area [h, w]."""
        colour = torch.cat([paint[:3], torch.ones_like(paint[3:])])
        return colour[3:] if channels == 1 else colour[:channels], area * paint[3]

    @staticmethod
    def forward(ctx, plan, coverage, rgba, opacities, *paints):
        canvas, saved = coverage.new_ones(3, plan.size, plan.size), []
        _, areas, colours = Composite.tables(plan, coverage, rgba)
        stack = [(canvas, (0, 0, plan.size, plan.size))]
        for (op, argument), box in zip(plan.ops, plan.op_boxes):
            if op == "push":
                stack.append((coverage.new_zeros(argument, box[3] - box[1], box[2] - box[0]), box))
                continue
            top = stack.pop()[0] if op != "draw" else None
            target, frame = stack[-1]
            if (crops := overlap(box, frame)) is None:
                continue
            inner, outer = crops
            back = target[outer]
            saved.append(back.clone())
            if op == "draw":
                colour, area = colours[len(target)][argument], areas[argument][inner]
                if argument in plan.paint:
                    colour, area = Composite.source(paints[plan.paint[argument]][inner], area, len(target))
                back.lerp_(colour, area)
            elif op == "mask":            # both buffers have the same box
                saved.append(top)
                back.mul_(top)
            else:
                saved.append(top[inner])
                top = top[inner] if argument is None else top[inner] * opacities[argument]
                back.mul_(1 - top[-1:]).add_(top[:len(target)])
        ctx.plan, ctx.paints = plan, len(paints)
        ctx.save_for_backward(coverage, rgba, opacities, *paints, *saved)
        return canvas

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plan, (coverage, rgba, opacities, *rest) = ctx.plan, ctx.saved_tensors
        paints, saved = rest[:ctx.paints], rest[ctx.paints:]
        alphas, areas, colours = Composite.tables(plan, coverage, rgba)
        d_cells, d_opacities = torch.zeros_like(coverage), torch.zeros_like(opacities)
        d_areas, d_paints = plan.views(plan.parts(d_cells)), [torch.zeros_like(p) for p in paints]
        d_colours = [grad.new_zeros(3)] * len(rgba)
        stack = [(grad.clone(), (0, 0, plan.size, plan.size))]
        for step in reversed(range(len(plan.ops))):
            (op, argument), box = plan.ops[step], plan.op_boxes[step]
            if op == "push":
                stack.pop()
                continue
            target, frame = stack[-1]
            crops = overlap(box, frame)
            if op != "draw":
                channels = plan.ops[plan.opener[step]][1]
                stack.append((grad.new_zeros(channels, box[3] - box[1], box[2] - box[0]), box))
            if crops is None:
                continue
            inner, outer = crops
            g = target[outer]
            if op == "mask":
                top, back = saved.pop(), saved.pop()
                stack[-1][0].copy_((g * back).sum(0, keepdim=True))
                g.mul_(top)
            elif op == "pop":
                top, back = saved.pop(), saved.pop()
                d_top = torch.zeros_like(top)
                d_top[:len(g)] = g
                d_top[-1] -= (g * back).sum(0)
                opacity = 1.0
                if argument is not None:
                    opacity = opacities[argument]
                    d_opacities[argument] += (d_top * top).sum()
                stack[-1][0][inner] = d_top * opacity
                g.mul_(1 - top[-1:] * opacity)
            else:
                back, d_area = saved.pop(), d_areas[argument][inner]
                colour, area = colours[len(g)][argument], areas[argument][inner]
                if argument in plan.paint:
                    paint, d_paint = (p[plan.paint[argument]][inner] for p in (paints, d_paints))
                    colour, area = Composite.source(paint, area, len(g))
                torch.sum((colour - back).mul_(g), 0, out=d_area)
                through = g * area
                g.sub_(through)
                if argument in plan.paint:
                    d_paint[:3] = through[:3]
                    torch.mul(d_area, areas[argument][inner], out=d_paint[3])
                    d_area.mul_(paint[3])
                elif len(g) > 1:
                    d_colours[argument] = through[:3].sum((1, 2))
        d_alpha = torch.stack([part.sum() for part in plan.parts(d_cells * coverage)])
        for part, alpha in zip(plan.parts(d_cells), alphas):
            part.mul_(alpha)
        return None, d_cells, torch.cat([torch.stack(d_colours), d_alpha[:, None]], 1), d_opacities, *d_paints


# ------------------------------------------------------------------ the drawing as a module

class SVG(torch.nn.Module):
    """A drawing whose geometry and paint are parameters. See the top of the file.

    points [N, 2]: control points, in each shape's own frame scaled so that 1 is a pixel at `size`.
    colours [C, 3], opacities [O], stop_colours [T, 4], stop_offsets [T]: in [0, 1].
    stroke_widths [W]: pixels at `size`.
    """

    jitter = 3.0                          # pixels, how far sample_view moves the picture

    @classmethod
    def load(cls, path, skip_unsupported=False, size=64, ss=1):
        """Read a file.

        size: pixels of the square picture's side; ss: 1, 2 or 4 samples per pixel and axis, against
        backgrounds shining through where two shapes share an edge.
        Raises SVGError for what cannot be read or drawn; skip_unsupported leaves unsupported features out.
        """
        return cls(Document(path, skip_unsupported, size), ss)

    def __init__(self, document, ss=1):
        super().__init__()
        self.document, self.size, self.ss = document, document.size, ss
        self.layers, shapes, tables = document.layers, document.shapes, document.tables

        def parameter(values, *shape):
            return torch.nn.Parameter(torch.tensor(np.array(values).reshape(-1, *shape), dtype=torch.float32))

        def buffer(name, values, dtype=torch.float32):
            self.register_buffer(name, torch.as_tensor(np.array(values), dtype=dtype), persistent=False)

        def table(of):
            rows = [[p.real * s.scale, p.imag * s.scale] for s in of for p in s.outline.points]
            return np.array(rows).reshape(-1, 2)
        self.points = parameter(table(s for s in shapes if s.element is not None), 2)
        self.colours = parameter(tables["colours"], 3)
        self.opacities = parameter(tables["opacities"])
        self.stop_colours = parameter([s[1:] for s in tables["stops"]], 4)
        self.stop_offsets = parameter([s[0] for s in tables["stops"]])
        self.width_scale = [scale for _, scale in tables["widths"]]
        self.stroke_widths = parameter([width * scale for width, scale in tables["widths"]])
        buffer("fixed", table(s for s in shapes if s.element is None))

        # curves of all layers: the fills first, then the centre lines of the strokes
        curves, straight, owner, subpath, closed, fills = [], [], [], [], [], 0
        for stroked in (False, True):
            for number, layer in enumerate(self.layers):
                if (layer.stroke is not None) != stroked:
                    continue
                outline, first = layer.shape.outline, layer.shape.first
                first += 0 if layer.shape.element is not None else document.points
                bounds = [s[0] for s in outline.subpaths[1:]] + [len(outline.curves)]
                for (start, point, is_closed), stop in zip(outline.subpaths, bounds):
                    if start == stop:
                        continue
                    own = outline.curves[start:stop]
                    if not is_closed and not stroked:
                        own = [*own, (own[-1][3], own[-1][3], point, point)]
                    curves += [[first + i for i in curve] for curve in own]
                    straight += [curve[0] == curve[1] for curve in own]
                    owner += [number] * len(own)
                    subpath += [len(closed)] * len(own)
                    closed.append(is_closed)
            fills = fills if stroked else len(curves)
        self.fills = fills
        buffer("curves", np.reshape(curves, (-1, 4)), torch.long)
        buffer("straight", straight, torch.bool)
        buffer("owner", owner, torch.long)
        buffer("subpath", subpath, torch.long)
        buffer("closed", closed, torch.bool)

        # per layer: frame of the points -> pixels, paint, stroke
        frames = [l.matrix @ np.diag([1 / l.shape.scale, 1 / l.shape.scale, 1]) for l in self.layers]
        buffer("frames", np.reshape([f[:2] for f in frames], (-1, 2, 3)))
        buffer("stretch", [np.linalg.norm(f[:2, :2], 2) for f in frames])
        buffer("even_odd", [l.rule == "evenodd" for l in self.layers], torch.bool)
        buffer("colour_of", [l.colour for l in self.layers], torch.long)
        most = max([len(l.opacities) for l in self.layers], default=0)
        rows = [l.opacities + [len(self.opacities)] * (most - len(l.opacities)) for l in self.layers]
        buffer("opacity_of", np.reshape(rows, (len(rows), most)), torch.long)
        strokes = [l.stroke or dict(width=-1, cap="", join="", miter=4.0) for l in self.layers]
        buffer("width_of", [s["width"] for s in strokes], torch.long)
        buffer("half_factor", [l.shape.scale / self.width_scale[s["width"]] / 2 if l.stroke else 0.0
                               for l, s in zip(self.layers, strokes)])
        buffer("miter", [s["miter"] for s in strokes])
        buffer("cap", [dict(round=ROUND, square=SQUARE).get(s["cap"], BUTT) for s in strokes], torch.long)
        buffer("join", [dict(round=ROUND, bevel=BEVEL).get(s["join"], MITER) for s in strokes], torch.long)

        self.dashes = {n: ([d * l.shape.scale for d in s["dashes"]], s["offset"] * l.shape.scale)
                       for n, (l, s) in enumerate(zip(self.layers, strokes)) if s.get("dashes")}

        # gradients: pixels -> the layer's units (box units: its frame), and from there to t
        painted = [(n, l) for n, l in enumerate(self.layers) if l.gradient is not None]
        self.painted = [n for n, _ in painted]
        into = [np.linalg.pinv(frames[n] if l.gradient.on_box else l.matrix) for n, l in painted]
        buffer("paint_in", np.reshape(into, (-1, 3, 3)))
        buffer("paint_unit", np.reshape([l.gradient.unit for _, l in painted], (-1, 3, 3)))
        self.ops, self.opener, opened = document.ops, {}, []
        for step, (op, _) in enumerate(self.ops):
            if op == "push":
                opened.append(step)
            elif op != "draw":
                self.opener[step] = opened.pop()
        self.masks = {start for step, start in self.opener.items() if self.ops[step][0] == "mask"}
        self.loaded = {name: p.detach().clone() for name, p in self.named_parameters()}

    # -- rendering

    def sample_view(self, generator=None):
        """A random shift (dx, dy) of up to `jitter` pixels at the drawing's size."""
        return tuple(((2 * torch.rand(2, generator=generator) - 1) * self.jitter).tolist())

    def segments(self, zoom):
        """All edges [S, 4] in their layers' frames, their layers [S]; and alike the lines before stroking."""
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
        centre, of = lines[fills:], layer[fills:]
        subpath, corner, closed = self.subpath[curve[fills:]], corner[fills:], self.closed
        if self.dashes:
            centre, of, subpath, corner, closed = dash(centre, of, subpath, corner, closed, self.dashes)
        arc = 2 * torch.acos(1 - TOLERANCE / wide.clamp_min(TOLERANCE))
        style = dict(half=half, miter=self.miter, cap=self.cap, join=self.join, arc=arc)
        edges, edge_layer = stroke(centre, of, subpath, corner, closed, style)
        return torch.cat([lines[:fills], edges]), torch.cat([layer[:fills], edge_layer]), lines, layer

    def render(self, view=None, size=None):
        """Picture [1, 3, size, size] in [0, 1] on white, differentiable.

        view: (dx, dy) in pixels at the drawing's own size, or None; size: side in pixels, default that size.
        A viewBox that is not square is centred, with white on both sides. Raises SVGError where points are
        not finite or there is too much to draw.
        """
        try:
            return self.draw(view, size)
        except SVGError as error:
            raise SVGError(f"{self.document.name}: {error}") from None

    def draw(self, view, size):
        size = size or self.size
        side = size * self.ss
        zoom, (dx, dy) = side / self.size, view or (0.0, 0.0)
        frame = [(v + d) * zoom for v, d in zip(self.document.frame, (dx, dy, dx, dy))]
        window = [min(max(round(v), 0), side) for v in frame]
        if not self.layers:
            return self.points.new_ones(1, 3, size, size)

        local, layer, lines, lines_layer = self.segments(zoom)
        shift = self.points.new_tensor([[0, 0, dx], [0, 0, dy]])
        a, c, e, b, d, f = ((self.frames + shift) * zoom).view(-1, 6).T[:, layer]
        x0, y0, x1, y1 = local.unbind(1)
        segments = torch.stack([a * x0 + c * y0 + e, b * x0 + d * y0 + f,
                                a * x1 + c * y1 + e, b * x1 + d * y1 + f], 1)

        boxes = self.boxes(segments.detach(), layer, window)
        sizes = [(x1 - x0 + 1) * (y1 - y0) for x0, y0, x1, y1 in boxes]
        base = np.cumsum([0, *sizes]).tolist()
        if base[-1] > MAX_CELLS:
            raise SVGError(f"its {len(boxes)} layers cover too many pixels at {side} px")
        device = segments.device
        corner = torch.tensor([(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes], device=device)
        starts = torch.tensor(base[:-1], device=device)
        coverage = Coverage.apply(segments, layer, corner, starts, self.even_odd, base[-1])

        ones = torch.cat([self.opacities, self.opacities.new_ones(1)])
        alpha = ones[self.opacity_of].prod(1, keepdim=True)
        blank = torch.cat([self.colours, self.colours.new_zeros(1, 3)])       # row -1: clips and gradients
        rgba = torch.cat([blank[self.colour_of], alpha], 1)
        paints = self.paints(lines, lines_layer, boxes, zoom, dx, dy)
        paint = {layer: number for number, layer in enumerate(self.painted)}
        plan = Plan(side, self.ops, self.op_boxes(boxes), self.opener, boxes, paint)
        image = Composite.apply(plan, coverage, rgba, self.opacities, *paints)[None]
        return image if self.ss == 1 else F.avg_pool2d(image, self.ss)

    def boxes(self, segments, layer, window):
        """Pixel boxes (x0, y0, x1, y1) of the layers within the window, by their current edges."""
        if not torch.isfinite(segments).all():
            raise SVGError("points or stroke widths are not finite")
        low = segments.new_full((len(self.layers), 2), math.inf)
        index = layer[:, None].expand(-1, 2)
        high = (-low).scatter_reduce_(0, index, torch.maximum(segments[:, :2], segments[:, 2:]), "amax")
        low = low.scatter_reduce_(0, index, torch.minimum(segments[:, :2], segments[:, 2:]), "amin")
        # a pixel more on every side for edges on pixel lines, which may move either way
        reach = torch.cat([low.ceil() - 1, high.floor() + 1], 1).clamp(-1, 1 << 20).long().tolist()
        boxes = []
        for x0, y0, x1, y1 in reach:
            x0, y0, x1, y1 = max(x0, window[0]), max(y0, window[1]), min(x1, window[2]), min(y1, window[3])
            boxes.append((x0, y0, x1, y1) if x0 < x1 and y0 < y1 else (0, 0, 0, 0))
        return boxes

    def op_boxes(self, boxes):
        """The box of every operation: a pushed buffer spans what is drawn into it, a mask's what it masks."""
        result, opened, empty = [(0, 0, 0, 0)] * len(self.ops), [], (0, 0, 0, 0)
        span = {}                         # push -> box so far

        def grow(box):
            if opened and opened[-1] not in self.masks and box != empty:
                old = span[opened[-1]]
                span[opened[-1]] = box if old == empty else (min(old[0], box[0]), min(old[1], box[1]),
                                                             max(old[2], box[2]), max(old[3], box[3]))
        for step, (op, argument) in enumerate(self.ops):
            if op == "push":
                span[step] = span[opened[-1]] if step in self.masks else empty
                opened.append(step)
            elif op == "draw":
                result[step] = boxes[argument]
                grow(boxes[argument])
            else:
                opener = opened.pop()
                result[step] = result[opener] = span[opener]
                grow(span[opener])
        return result

    def paints(self, lines, lines_layer, boxes, zoom, dx, dy):
        """Gradient paints [4, h, w] of the layers in `painted`."""
        back = self.points.new_tensor([[1 / zoom, 0, -dx], [0, 1 / zoom, -dy], [0, 0, 1]])
        result = []
        for i, n in enumerate(self.painted):
            gradient, unit = self.layers[n].gradient, self.paint_unit[i]
            if gradient.on_box:
                own = lines[lines_layer == n].view(-1, 2)
                low, high = own.amin(0), own.amax(0)
                scale = 1 / (high - low).clamp_min(1e-6)
                to_box = torch.cat([torch.diag(scale), (-low * scale)[:, None]], 1)
                unit = unit @ torch.cat([to_box, to_box.new_tensor([[0, 0, 1]])])
            matrix = unit @ self.paint_in[i] @ back
            stops = torch.tensor(gradient.stops, device=lines.device)
            x0, y0, x1, y1 = boxes[n]
            result.append(gradient_paint(matrix, gradient, self.stop_offsets[stops], self.stop_colours[stops],
                                         (x0, y0, x1 - x0, y1 - y0)))
        return result

    # -- optimisation

    def param_groups(self, points=0.8, colours=0.01, colours_only=False):
        """Adam parameter groups, each with a "name" and its own rate; empty parameters are left out.

        points: pixels a step; stroke widths take an eighth of it. colours: share of the colour range a step;
        opacities and stop colours take the same, stop offsets half. colours_only leaves all but the solid and
        the stop colours as they are (pixel art).
        """
        rates = dict(points=points, colours=colours, stop_colours=colours, opacities=colours,
                     stop_offsets=colours / 2, stroke_widths=points / 8)
        names = ("colours", "stop_colours") if colours_only else rates
        return [dict(name=name, params=[getattr(self, name)], lr=rates[name])
                for name in names if getattr(self, name).numel()]

    @torch.no_grad()
    def project_(self):
        """Put the parameters back into their ranges after a step; stops keep their order."""
        for p in (self.colours, self.opacities, self.stop_colours, self.stop_offsets):
            p.clamp_(0, 1)
        self.stroke_widths.clamp_min_(0)
        for gradient in self.document.gradients.values():
            if gradient is not None:
                first, last = gradient.stops[0], gradient.stops[-1] + 1
                self.stop_offsets[first:last] = self.stop_offsets[first:last].cummax(0)[0]

    # -- saving

    @torch.no_grad()
    def save(self, path):
        """Write the document with the current parameters, all at once or not at all.

        Only what has changed since loading is touched: edited shapes become <path> in their place, with their
        id, class and other attributes; paint goes to the element it came from. Raises SVGError.
        """
        document, tree = self.document, copy.deepcopy(self.document.root)
        twin = dict(zip(document.root.iter(), tree.iter()))
        now = {name: p.detach().cpu().double() for name, p in self.named_parameters()}
        if not all(torch.isfinite(p).all() for p in now.values()):
            raise SVGError(f"{path}: not saved, as some parameters are not finite")

        def changed(name, rows):
            return not torch.equal(now[name][rows].float(), self.loaded[name][rows])

        def write(element, name, value):
            # style="" overrules style sheets, attributes do not
            style = declarations(twin[element].get("style"))
            if name in style or document.rules:
                style[name] = value
                twin[element].set("style", ";".join(f"{k}:{v}" for k, v in style.items()))
            else:
                twin[element].set(name, value)

        def hexadecimal(rgb):
            return "#" + "".join(f"{round(255 * min(max(c, 0.0), 1.0)):02x}" for c in rgb.tolist())

        for shape in document.shapes:
            rows = slice(shape.first, shape.first + len(shape.outline.points))
            if shape.element is None or not changed("points", rows):
                continue
            element = twin[shape.element]
            if document.tag(shape.element) != "path":
                element.tag = ":".join(filter(None, (document.prefix, "path")))
                for name in GEOMETRY:
                    element.attrib.pop(name, None)
                if document.rules:        # a style sheet may have matched the old name
                    style = document.properties(shape.element)
                    element.set("style", ";".join(f"{k}:{v}" for k, v in style.items()))
            element.set("d", shape.outline.data((now["points"][rows] / shape.scale).tolist()))
        for (kind, element, name), row in document.slots.items():
            if kind == "widths":
                if changed("stroke_widths", row):
                    write(element, name, f"{now['stroke_widths'][row] / self.width_scale[row]:.6g}")
            elif kind == "stops":
                if changed("stop_offsets", row) or changed("stop_colours", row):
                    rgba = now["stop_colours"][row]
                    twin[element].set("offset", f"{now['stop_offsets'][row]:.5g}")
                    write(element, "stop-color", hexadecimal(rgba[:3]))
                    write(element, "stop-opacity", f"{rgba[3]:.5g}")
            elif changed(kind, row):
                # an rgba() colour was split into colour and opacity, so both are written
                paint = name.removesuffix("-opacity")
                if (row := document.slots.get(("colours", element, paint))) is not None:
                    write(element, paint, hexadecimal(now["colours"][row]))
                alpha = name if name == "opacity" else paint + "-opacity"
                if (row := document.slots.get(("opacities", element, alpha))) is not None:
                    write(element, alpha, f"{now['opacities'][row]:.5g}")
        for element, box in document.box_clips.items():       # they stay in place, whatever the shape does
            own = box @ transform(element.get("transform"))
            twin[element].set("clipPathUnits", "userSpaceOnUse")
            twin[element].set("transform", "matrix({})".format(" ".join(f"{v:.9g}" for v in own[:2].T.flat)))
        for element in document.elements:
            if document.tag(element) == "style" and element.text:             # would overrule what is written
                twin[element].text = element.text.replace("!important", "")
        if not document.prefix:
            tree.attrib.setdefault("xmlns", "http://www.w3.org/2000/svg")
        write_file(path, ET.tostring(tree, encoding="unicode").encode())


def write_file(path, data):
    """Bytes to a file, in one piece or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SVGError(f"{path}: cannot be written: {error.strerror}") from None


# ------------------------------------------------------------------ command line

def main(argv=None):
    parser = argparse.ArgumentParser(description="Render SVG files to square PNG files on white.")
    parser.add_argument("files", nargs="+", help="SVG files")
    parser.add_argument("--out", required=True, help="folder for NAME.png of every NAME.svg; made if missing")
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels (default 256)")
    parser.add_argument("--ss", type=int, choices=(1, 2, 4), default=1,
                        help="samples per pixel and axis (default 1)")
    parser.add_argument("--skip-unsupported", action="store_true",
                        help="leave out text, images, masks and filters instead of refusing the file")
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
