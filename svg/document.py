"""Documents: from XML and CSS to layers that can be drawn, and from changed parameters back to the file.

    document = Document.load("apple.svg", skip_unsupported=False, size=256)
    document.layers, document.ops                      # what to draw, and in which order
    document.save("edited.svg", values, loaded)        # the same file, changed only where values differ from loaded

Data flow: source (XML, references) -> style (CSS) -> paint -> document (layers and groups) -> edition (the file written
back). Coordinates are x right, y down.

SVG 1.1 with the changes of SVG 2, as browsers read it. Unsupported elements and properties are refused by name.
"""
import math
import re

import numpy as np

from svg.edition import Edition
from svg.filters import BLEND, Reader, parts_of
from svg.images import picture_op
from svg.markers import MARKED, marker_ops
from svg.outline import (
    GEOMETRY,
    SHAPES,
    THREE_D,
    TRANSFORM,
    SVGError,
    affine,
    box_outline,
    css_transform,
    fit,
    is_plane,
    length,
    numbers,
    origin,
    shape_outline,
    transform,
)
from svg.paint import FAR, MAX_COORDINATE, MAX_REFERENCES, Layer, Paints, Shape, share
from svg.patterns import NOTHING, pattern_ops
from svg.source import Source, write_file
from svg.style import INHERITED, MARKERS, MASK_FRAME, REFUSED, URL, colour, path_data

MAX_SHAPES = 30_000
MAX_SUBDIVIDED = 100_000              # points of a drawing up to which curves are split
MAX_VISITS = 150_000                  # visits of elements, those of `use` counted as often as they are used
MAX_MEASURED = 30_000                 # shapes measured for the boxes of clip paths and masks
LENGTHS = set(GEOMETRY) - {"d", "points"}
RELATIVE = re.compile("%|e[mx]|ch", re.I)  # units that depend on the context of a length


def size_of(matrix):
    """Pixels per unit under a 3x3 matrix: the square root of its change of areas."""
    return math.sqrt(abs(np.linalg.det(matrix[:2, :2])))


# weights of red, green, blue and alpha in a mask (CSS Masking 1); premultiplied colours include their alpha
LUMINANCE, ALPHA = (0.2125, 0.7154, 0.0721, 0.0), (0.0, 0.0, 0.0, 1.0)


class Document:
    """The drawing: walks the elements once and collects shapes, layers and the order of drawing.

    `ops` is a flat program of ("draw", layer), ("push", channels), ("mask", weights or None), ("pop", opacity row or
    None), ("blend", (opacity row or None, mode)) and ("filter", number). A push opens an isolated buffer of 4 channels,
    or of 1 (alpha only) inside clip paths. The others remove the top buffer: a mask multiplies the one below by its
    alpha or, if it has 4 channels, by their weighted sum; a pop draws it over the one below, by a mode or filtered.
    The methods of the walk return the ops of what they visit.

    `drawn` lists (shape, matrix) of every shape visited so far, painted or not: bounding boxes are computed from it.
    """

    @classmethod
    def load(cls, path, skip_unsupported, size, subdivide=0.0):
        """Read a file; size: pixels of the square picture's side, or a Frame (files/pictures.py); subdivide:
        pixels above which curves are split, see SVG.load. Raises SVGError."""
        try:
            source = Source(path, skip_unsupported)
            if not source.sized:          # the picture is the extent of the content, from the origin
                drawing = cls(source, 100)
                box = drawing.box(0, np.eye(3))
                source.see(None, *(np.ones(2) if box is None else np.maximum(box[:2] @ (1, 1, 1), 1e-3)).tolist())
            return cls(source, size, subdivide)
        except SVGError as error:
            raise SVGError(f"{path}: {error}") from None
        except RecursionError:
            raise SVGError(f"{path}: elements, references or styles are nested too deeply") from None

    def __init__(self, source, size, subdivide=0.0):
        self.source, self.styles, self.paints, self.subdivide = source, source.styles, Paints(source), subdivide
        self.name, self.skipped = source.name, source.skipped
        self.shapes, self.shape_of, self.layers = [], {}, []
        self.points = self.fixed = 0      # rows in the table of optimised points, and of fixed ones
        self.boxes = {}                   # (clipPath or mask in box units, its user) -> (matrix of the box, its shapes)
        self.drawn, self.measured, self.nested, self.filters = [], 0, set(), []
        self.contexts, self.relative = {}, {}     # see context and outline
        self.pictures, self.decoded = {}, 0       # {<image>: its picture}, and the pixels of all
        self.carried = None               # the marker or tile being visited, if it moves
        self.markers = self.tiles = 0     # counts of all so far
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
                source.unsupported(f"{name} '{value[:40]}' on <svg>")         # the page is white
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
            return []                     # defs, gradients, titles, foreign elements: nothing to draw
        if tag in ("text", "image", "foreignObject"):
            shown = self.shows(element, tag, style)
            if shown and tag != "image":
                source.unsupported(f"<{tag}>")
            if not shown or tag != "image":
                return []
        if clip and tag not in SHAPES and tag != "use":
            return []                     # a clip path contains shapes only
        if tag in SHAPES:
            def content(*state):
                return self.draw(element, *state, clip)
        elif tag == "use":
            def content(*state):
                return self.use(element, *state, clip)
        elif tag == "image":
            def content(*state):
                return picture_op(self, element, *state)
        elif tag == "svg":
            def content(*state):
                return self.viewport(element, element, *state, clip)
        else:
            def content(*state):
                return self.children(element, *state, clip)
        return self.group(element, matrix, style, clip, content)

    def children(self, element, matrix, style, clip):
        """ops of the children; in <switch>, of the first that can be drawn."""
        children = list(element)
        if self.source.tag(element) == "switch":
            able = SHAPES | {"g", "a", "svg", "use", "switch", "text", "image"}
            children = [c for c in element if self.source.tag(c) in able and self.source.holds(c)][:1]
        return [op for child in children for op in self.visit(child, matrix, style, clip)]

    def shows(self, element, tag, style):
        """Whether an unsupported element would be visible: not if it is empty or hidden."""
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
        """ops of content(matrix, style) under the element's own transform, style, clip path, mask and opacity."""
        props, tag = self.styles.of(element), self.source.tag(element)
        for name in REFUSED.keys() & props.keys():
            if props[name].lower() not in REFUSED[name]:
                self.source.unsupported(f"{name} on <{tag}>")
        style, first = self.styles.inherit(style, element), len(self.drawn)
        matrix = matrix @ self.transform(element, style)
        ops, masks = content(matrix, style), []
        if not clip and props.get("filter", "none").lower() != "none":
            ops = self.filtered(ops, element, matrix, style, first)
        if (clip_path := self.resource(element, "clip-path", "clipPath")) is not None:
            masks.append(self.clip(clip_path, element, matrix, style, first))
        if not clip and (mask := self.resource(element, "mask", "mask")) is not None:
            masks.append(self.mask(mask, element, matrix, style, first))
        opacity = None
        if not clip and share(props.get("opacity")) < 1:
            opacity = self.paints.slot("opacities", element, "opacity", share(props["opacity"]))
        mode = "normal" if clip else props.get("mix-blend-mode", "normal").lower()
        if mode not in ("normal", *BLEND):
            self.source.unsupported(f"mix-blend-mode {mode} on <{tag}>")
            mode = "normal"
        apart = props.get("isolation", "auto").lower() == "isolate" and any(op == "blend" for op, _ in ops)
        return self.isolate(ops, opacity, masks, clip, mode, apart)

    def filtered(self, ops, element, matrix, style, first):
        """ops of what was drawn since `first`, under the element's filters."""
        value = self.styles.of(element)["filter"]
        if parts_of(value) is None:
            self.source.not_understood("filter", value)
            return ops
        if self.carried is not None:
            self.source.unsupported(f"filter on <{self.source.tag(element)}> in a marker or a pattern")
            return ops
        if abs(np.linalg.det(matrix)) < 1e-30:
            return []
        back, drawn = np.linalg.inv(matrix), self.drawn[first:]
        self.measured += len(drawn)
        shapes = [(shape, back @ own) for shape, own in drawn]
        found = Reader(self.source).read(value, element, matrix, style, shapes)
        for one in found or ():
            self.filters.append(one)
            ops = [("push", 4), *ops, ("filter", len(self.filters) - 1)]
        return [] if found is None else ops

    def resource(self, element, name, tag):
        """The clipPath or mask that a property refers to; None if there is no such element."""
        value = self.styles.of(element).get(name, "none")
        if value == "none":
            return None
        target = self.source.link(value) if re.fullmatch(URL, value) else None
        if not re.fullmatch(URL, value) and value.lower() != "none":
            self.source.unsupported(f"{name} '{value[:40]}' on <{self.source.tag(element)}>")
        return target if target is not None and self.source.tag(target) == tag else None

    def transform(self, element, style):
        """The element's own transform, by CSS or its attribute, about its transform-origin."""
        props, (width, height), em = self.styles.of(element), style["viewport"][0], float(style["font-size"][0])
        matrix = transform(element.get("transform"))
        if "transform" in props:
            space = {name.lower() for name, text in TRANSFORM.findall(props["transform"])
                     if name.lower() in THREE_D and not is_plane(name, text)}
            if space:
                self.source.unsupported(f"transform {min(space)}() on <{self.source.tag(element)}>")
            matrix = css_transform(props["transform"], width, height, em)
        text, box = props.get("transform-origin"), props.get("transform-box", "view-box").lower()
        moves = text is not None or "%" in props.get("transform", "")
        if box != "view-box" and moves and not np.array_equal(matrix, np.eye(3)):
            self.source.unsupported(f"transform-box {box} on <{self.source.tag(element)}>")
        if text is None and element is self.source.root:
            text = "center"               # the outermost <svg> has a CSS box, like elements of HTML
        if text is None or np.array_equal(matrix, np.eye(3)):
            return matrix
        x, y = origin(text, width, height, em)
        return affine(e=x, f=y) @ matrix @ affine(e=-x, f=-y)

    def isolate(self, content, opacity, masks, clip, mode="normal", apart=False):
        """The content, in a buffer of its own if it has an opacity, masks (ops each), a blend mode or must be apart."""
        if opacity is not None and not masks and len(content) == 1:
            self.layers[content[0][1]].opacities.append(opacity)
            opacity = None
        if content and (opacity is not None or masks or mode != "normal" or apart):
            end = ("pop", opacity) if mode == "normal" else ("blend", (opacity, mode))
            content = [("push", 1 if clip else 4), *content, *(op for mask in masks for op in mask), end]
        return content

    def follow(self, element):
        """Guard against circular references and exponentially many ones."""
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
            return []                     # disables the element
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
        """The style that a clipPath or mask inherits from its place in the file, not from its user."""
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
        """Matrix from the unit square to the bounding box of what was drawn since `first`; None if nothing was.

        In the units that `matrix` takes to pixels, without strokes, as SVG defines it.
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
        """The bounding box of `user` at loading, in whose units a clipPath or mask is.

        nested: the element is not referred to by the user, but by another clipPath or mask.
        """
        box = self.box(first, matrix)
        box = affine(0, 0, 0, 0) if box is None else box
        key, shapes = (element, user), [shape for shape, _ in self.drawn[first:]]
        before = self.boxes.setdefault(key, (box, shapes))[0]
        self.nested |= {element} if nested else set()
        # these could not be written back once the box has changed
        if not np.allclose(before, box, rtol=1e-6, atol=1e-9) or (
                element in self.nested and sum(other is element for other, _ in self.boxes) > 1):
            raise SVGError(f"<{self.source.tag(element)}> '#{element.get('id')}' is in units of several boxes at once")
        return box

    def clip(self, element, user, matrix, style, first, nested=False):
        """ops that clip the buffer below by a clipPath; matrix: of the user's units."""
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
        """ops that multiply the buffer below by a mask: by its luminance or its alpha."""
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
        """Outline of a shape in local units at its first use; None at later ones."""
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

    def shape(self, element, outline, matrix, subdivide=0.0):
        """Shape of the element, created at its first use; None if there is nothing to draw.

        subdivide: length in pixels above which its curves are split; 0: none, as where markers stand on its vertices.
        """
        if element in self.shape_of and element is not None:
            return self.shape_of[element]
        scale, points, start = size_of(matrix), np.array(outline.points), 0j
        if points.size and np.all(np.isfinite(points)) and np.abs(points).max() * scale > FAR:
            start = complex(points.mean())
            points = points - start
        if points.size and not np.all(np.abs(points) < MAX_COORDINATE / scale if scale else True):
            what = "a viewport" if element is None else f"<{self.source.tag(element)}>"
            raise SVGError(f"{what} has coordinates that are not finite or lie more than {MAX_COORDINATE:g} px away")
        shape = None
        if outline.curves and scale > NOTHING:
            if subdivide:
                outline = outline.subdivided(subdivide / scale, MAX_SUBDIVIDED - self.points)
            shape = Shape(element, outline, scale, self.fixed if element is None else self.points, start)
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
        """ops of a shape: its fill and stroke or, in a clip path, its geometry."""
        if element not in self.shape_of and size_of(matrix) <= NOTHING:
            return []                     # invisible here; another use may be larger
        tag = self.source.tag(element)
        marked = tag in MARKED and any(style[name][0].lower() != "none" for name in MARKERS)
        shape = self.shape(element, self.outline(element, style), matrix, 0.0 if marked else self.subdivide)
        if shape is None:
            return []
        self.drawn.append((shape, matrix))
        if style["visibility"][0].lower() != "visible":
            return []
        if len(self.layers) > MAX_SHAPES:
            raise SVGError(f"more than {MAX_SHAPES} shapes to draw")
        if not np.abs(matrix @ affine(e=shape.origin.real, f=shape.origin.imag)).max() < MAX_COORDINATE:
            raise SVGError(f"a transform of <{self.source.tag(element)}> is not finite or too large")
        if clip:
            return [self.add(Layer(shape, matrix, style["clip-rule"][0].lower()))]
        ops = []
        order = (style["paint-order"][0].lower() + " fill stroke markers").split()
        for name in sorted(("fill", "stroke", "markers"), key=order.index):
            if name == "markers":
                if tag in MARKED:
                    ops += marker_ops(self, element, shape, matrix, style)
                else:                     # nor may it have any as a <path>
                    self.paints.settled.update({(element, name): "none" for name in MARKERS
                                                if style[name][0].lower() != "none"})
                continue
            layer = Layer(shape, matrix, style["fill-rule"][0].lower() if name == "fill" else "nonzero")
            pattern = self.source.link(style[name][0])
            if pattern is not None and self.source.tag(pattern) == "pattern":
                found = pattern_ops(self, layer, element, name, pattern, style)
                ops += found or []
                if found is not None:
                    continue
            if self.paints.paint(layer, element, name, style) and (
                    name == "fill" or self.paints.stroke(layer, element, style)):
                effect, turn = self.styles.of(element).get("vector-effect", "none").lower(), matrix[:2, :2] / self.unit
                rigid = np.allclose(turn @ turn.T, np.eye(2), atol=1e-6)      # a width in pixels is one in local units
                if name == "stroke" and effect != "none" and not (rigid and effect == "non-scaling-stroke"):
                    self.source.unsupported(f"vector-effect on <{tag}>")
                ops.append(self.add(layer))
        return ops

    def save(self, path, values, loaded):
        """Write the file with new values of the parameters, atomically.

        values: {parameter of SVG: float64 array}, loaded: the same at loading, in float32. Only what has changed is
        touched: an edited shape becomes a <path> in its place that keeps its id, class and other attributes; paint is
        written to the element it came from. Raises SVGError.
        """
        if not all(np.isfinite(value).all() for value in values.values()):
            raise SVGError(f"{path}: not saved, as some parameters are not finite")
        edition = Edition(self, values, loaded)
        edition.write_outlines()
        edition.write_paints()
        edition.write_boxes()
        write_file(path, edition.data())
