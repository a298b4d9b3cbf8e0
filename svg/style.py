"""SVG style: what attributes, CSS style sheets and style="" set for every element, and CSS colours.

    styles = Styles(source, root)                      # source: names and warnings, see source.Source
    styles.of(element)                                 # {property: value} that the element sets itself

Follows CSS Cascading 4, Selectors 4, Color 4 and Custom Properties 1, with tinycss2 and cssselect2. Invalid
declarations are dropped with a warning, so that the earlier or inherited one applies.
"""
import functools
import math
import re

import cssselect2
import tinycss2
from tinycss2 import color4

from svg.outline import DIGITS, UNITS, SVGError, css_transform, length, origin

MAX_DEPTH = 200                       # of blocks in each other
MAX_CSS, MAX_RULES, MAX_STEPS = 8 << 20, 10_000, 10_000_000       # characters, selectors, steps of matching
MAX_INVOLVED = 30_000                 # distinct values that need a parser, about 0.1 ms each
SIMPLE = re.compile(r"[\w\s.,#%+-]*|rgb\([0-9\s,]*\)|url\(#[\w-]*\)")
MAX_VALUE = 10_000                    # characters of a value after var() has been replaced

INHERITED = {                         # inherited properties, with their initial values
    "fill": "black", "fill-opacity": "1", "fill-rule": "nonzero", "stroke": "none", "stroke-width": "1",
    "stroke-opacity": "1", "stroke-linecap": "butt", "stroke-linejoin": "miter", "stroke-miterlimit": "4",
    "stroke-dasharray": "none", "stroke-dashoffset": "0", "clip-rule": "nonzero", "color": "black",
    "visibility": "visible", "paint-order": "normal", "font-size": "16", "marker-start": "none", "marker-mid": "none",
    "marker-end": "none", "color-interpolation": "srgb", "color-interpolation-filters": "linearrgb",
    "image-rendering": "auto"}
OWN = {                               # properties that are not inherited, with their initial values
    "opacity": "1", "clip-path": "none", "display": "inline", "mask": "none", "filter": "none",
    "mix-blend-mode": "normal", "isolation": "auto", "flood-color": "black", "flood-opacity": "1",
    "stop-color": "black", "stop-opacity": "1", "overflow": "hidden",
    "mask-type": "luminance", "transform-origin": "0 0", "transform-box": "view-box", "vector-effect": "none"}
# unsupported properties that change the picture, with the values that have no effect
REFUSED = dict.fromkeys(("backdrop-filter", "mask-image", "offset-path", "translate", "rotate", "scale",
                         "perspective"), {"none"})
REFUSED |= {"zoom": {"normal", "1", "100%"}}
# legacy names of properties (Compatibility Standard, 3.1)
ALIASES = {"-webkit-" + name: name for name in ("transform", "transform-origin", "filter", "clip-path", "mask",
                                                "mask-image", "opacity")}
KEYWORDS = {"inherit", "initial", "unset", "revert", "revert-layer"}      # values of every property
URL = r"url\(([^)]*)\)"
CHOICES = {                           # the values of properties that take one keyword
    "fill-rule": {"nonzero", "evenodd"}, "clip-rule": {"nonzero", "evenodd"},
    "stroke-linecap": {"butt", "round", "square"}, "stroke-linejoin": {"miter", "round", "bevel"},
    "visibility": {"visible", "hidden", "collapse"}, "overflow": {"visible", "hidden", "scroll", "auto", "clip"},
    "mask-type": {"luminance", "alpha"}, "vector-effect": {"none", "non-scaling-stroke", "non-scaling-size",
                                                           "non-rotation", "fixed-position"},
    "transform-box": {"view-box", "fill-box", "stroke-box", "content-box", "border-box"},
    "isolation": {"auto", "isolate"}, "color-interpolation-filters": {"auto", "srgb", "linearrgb"},
    "mix-blend-mode": {"normal", "multiply", "screen", "overlay", "darken", "lighten", "color-dodge", "color-burn",
                       "hard-light", "soft-light", "difference", "exclusion", "hue", "saturation", "color",
                       "luminosity", "plus-lighter", "plus-darker"}}
COLOURS = {"fill", "stroke", "color", "stop-color", "flood-color"}
WIDE = re.compile(r"\bcolor\((?!\s*srgb)", re.I)      # a colour that may lie outside of sRGB
SIZES = {"x", "y", "cx", "cy", "r", "rx", "ry", "width", "height"}        # geometry properties of CSS
POSITIVE = {"r", "rx", "ry", "width", "height", "stroke-width", "stroke-miterlimit", "stroke-dasharray", "font-size"}
FONT_SIZES = {"xx-small": 9, "x-small": 10, "small": 13, "medium": 16, "large": 18, "x-large": 24, "xx-large": 32,
              "xxx-large": 48}
MARKERS = ("marker-start", "marker-mid", "marker-end")
MASK_FRAME = {"x": "-10%", "y": "-10%", "width": "120%", "height": "120%"}        # the default region of a mask
STILL = "is ignored: drawings are rendered as still pictures"
NO_NUMBER = float("nan")              # the default of `length` for unreadable text
# media queries that hold for a still picture on a light sRGB screen, and some that do not
MEDIA = {"", "all", "screen", "only all", "only screen", "not print", "(prefers-color-scheme: light)",
         "(prefers-reduced-motion: no-preference)", "(color-gamut: srgb)", "(color)"}
NO_MEDIA = {"print", "only print", "not all", "not screen", "speech", "(prefers-color-scheme: dark)",
            "(prefers-reduced-motion: reduce)", "(prefers-reduced-motion)", "(prefers-contrast: more)",
            "(forced-colors: active)", "(color-gamut: p3)", "(color-gamut: rec2020)", "(monochrome)"}
# at-rules without effect on a still picture without text
HARMLESS = re.compile("(font-.*|(-.*-)?keyframes|page|charset|counter-style|namespace|view-transition)$")


# To linear sRGB from XYZ, by white point, and from the linear values of other spaces (CSS Color 4, section 10)
FROM_D65 = ((3.2409699, -1.5373832, -0.4986108), (-0.9692436, 1.8759675, 0.0415551), (0.0556301, -0.203977, 1.0569715))
FROM_D50 = ((3.1341359, -1.617386, -0.4906622), (-0.9787954, 1.9162544, 0.0334427), (0.0719554, -0.2289768, 1.4053861))
SPACES = {                            # the matrix, and the transfer function to linear values
    "srgb-linear": (((1, 0, 0), (0, 1, 0), (0, 0, 1)), lambda v: v),
    "display-p3": (((1.2249402, -0.2249402, 0), (-0.042057, 1.042057, 0), (-0.0196376, -0.078636, 1.0982736)),
                   lambda v: v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4),
    "a98-rgb": (((1.3983557, -0.3983557, 0), (0, 1, 0), (0, -0.042929, 1.042929)), lambda v: v ** (563 / 256)),
    "rec2020": (((1.660491, -0.5876411, -0.0728499), (-0.1245505, 1.1328999, -0.0083494),
                 (-0.0181508, -0.1005789, 1.1187297)),
                lambda v: v / 4.5 if v < 0.0812429 else ((v + 0.0992968) / 1.0992968) ** (1 / 0.45)),
    "prophoto-rgb": (((2.0343808, -0.7276358, -0.3067451), (-0.2288257, 1.2317425, -0.0029168),
                      (-0.0085588, -0.1532667, 1.1618255)), lambda v: v / 16 if v <= 1 / 32 else v ** 1.8)}


def to_srgb(linear, matrix):
    """Three linear values -> (r, g, b) in sRGB."""
    linear = [sum(m * c for m, c in zip(row, linear, strict=True)) for row in matrix]
    return tuple(12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear)


PLAIN_RGB = re.compile(r"\s*rgb\(\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*\)\s*", re.I)
PLAIN_HEX = re.compile("#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})", re.I)


@functools.lru_cache(4096)
def colour(text):
    """CSS colour (Color 4, and the light value of light-dark()) -> (r, g, b, a) in [0, 1], or None.

    Colours outside of sRGB are clipped, as in browsers.
    """
    if match := PLAIN_RGB.fullmatch(text):        # a shortcut: files contain thousands of these
        return (*(min(int(part) / 255, 1.0) for part in match.groups()), 1.0)
    if match := PLAIN_HEX.fullmatch(text):
        return (*(int(part, 16) / 255 for part in match.groups()), 1.0)
    try:
        found = color4.parse_color(text)
    except ValueError:                    # color() without arguments
        return None
    if found is None and re.match(r"\s*light-dark\(", text, re.I):
        inside = tinycss2.parse_one_component_value(text, skip_comments=True)
        inside = inside.arguments if inside.type == "function" else []
        return colour(tinycss2.serialize(inside[:inside.index(",")])) if inside.count(",") == 1 else None
    if not isinstance(found, color4.Color):
        return None
    try:
        if found.space in ("srgb", "hsl", "hwb"):
            rgba = found.to("srgb")
        elif found.space in ("lab", "lch", "xyz-d50"):
            rgba = (*to_srgb(found.to("xyz-d50").coordinates, FROM_D50), found.alpha)
        elif found.space in ("oklab", "oklch", "xyz-d65", "xyz"):
            rgba = (*to_srgb(found.to("xyz-d65").coordinates, FROM_D65), found.alpha)
        else:
            matrix, curve = SPACES[found.space]
            linear = [math.copysign(curve(abs(c or 0.0)), c or 0.0) for c in found.coordinates]
            rgba = (*to_srgb(linear, matrix), found.alpha)
    except OverflowError:
        return None
    rgba = tuple(min(max(c, 0.0), 1.0) for c in rgba)
    return None if any(map(math.isnan, rgba)) else rgba


# a declaration that needs no CSS parser
PLAIN = re.compile(r"\s*([a-zA-Z][\w-]*)\s*:((?:[\w\s.,#%+-]|\b(?:rgba?|hsla?|rotate|translate|scale|matrix)"
                   r"\([\w\s.,%+/-]*\))*)")


def declarations(css):
    """Text or tokens such as 'fill: red; stroke: none !important' -> [(property, value, important)]."""
    if isinstance(css, str):              # a shortcut: files contain thousands of style attributes, most of them plain
        found = [PLAIN.fullmatch(part) for part in css.split(";") if part.strip()]
        if all(found):
            return [(match[1].lower(), match[2].strip(), False) for match in found]
    found = tinycss2.parse_blocks_contents(css, skip_comments=True, skip_whitespace=True)
    return [(d.name if d.name.startswith("--") else ALIASES.get(d.lower_name, d.lower_name),
             tinycss2.serialize([token for token in d.value if token.type != "comment"]).strip(), d.important)
            for d in found if d.type == "declaration"]


def font_size(text, parent):
    """A font-size in pixels; parent: that of the parent element. NaN if it is invalid."""
    text = text.lower()
    if text in ("smaller", "larger"):
        return parent * (1.2 if text == "larger" else 1 / 1.2)
    return float(FONT_SIZES[text]) if text in FONT_SIZES else length(text, parent, NO_NUMBER, parent)


def calculated(tokens):
    """The value of calc()'s tokens as (number, unit), the unit being "", "px" or "%"; otherwise None."""
    tokens = [token for token in tokens if token.type not in ("whitespace", "comment")]

    def operand():
        token = tokens.pop(0) if tokens else None
        if token is None:
            return None
        if token.type == "number":
            return token.value, ""
        if token.type == "percentage":
            return token.value, "%"
        if token.type == "dimension" and token.lower_unit in UNITS:
            return token.value * UNITS[token.lower_unit], "px"
        return calculated(token.content) if token.type == "() block" else calculated(token.arguments) \
            if token.type == "function" and token.lower_name == "calc" else None

    def chain(operators, inner, combine):
        left = inner()
        while left is not None and tokens and tokens[0].type == "literal" and tokens[0].value in operators:
            operator, right = tokens.pop(0).value, inner()
            left = None if right is None else combine(operator, left, right)
        return left

    def times(operator, left, right):
        if operator == "*":
            return (left[0] * right[0], left[1] or right[1]) if "" in (left[1], right[1]) else None
        return (left[0] / right[0], left[1]) if right[1] == "" and right[0] else None

    def plus(operator, left, right):
        return (left[0] + (right[0] if operator == "+" else -right[0]), left[1]) if left[1] == right[1] else None
    found = chain("+-", lambda: chain("*/", operand, times), plus)
    return None if tokens else found


def supports_holds(tokens, depth=0):
    """Whether the condition of @supports holds: every readable declaration counts as supported."""
    tokens = [token for token in tokens if token.type not in ("whitespace", "comment")]
    if not tokens or depth > MAX_DEPTH:
        return False
    words = [token.lower_value if token.type == "ident" else None for token in tokens]
    if words[0] == "not":
        return not supports_holds(tokens[1:], depth + 1)
    for word, every in (("or", any), ("and", all)):
        if word in words:
            at = words.index(word)
            return every(supports_holds(part, depth + 1) for part in (tokens[:at], tokens[at + 1:]))
    if tokens[0].type == "function":
        return tokens[0].lower_name == "selector"
    if tokens[0].type != "() block":
        return False
    found = declarations(tokens[0].content)
    return any(readable(name, value, True) for name, value, _ in found) if found else supports_holds(tokens[0].content,
                                                                                                    depth + 1)


def readable(name, value, authored):
    """Whether a value is valid for the property; authored: in CSS, where lengths need a unit."""
    text = value.lower()
    if text in KEYWORDS or "var(" in text or name.startswith("--"):
        return True
    if name in COLOURS:
        if name in ("fill", "stroke"):
            url = re.match(URL, text)
            text = text[url.end():].strip() if url else text
            if text in ("none", "context-fill", "context-stroke") or url and not text:
                return True
        return text == "currentcolor" or colour(text) is not None
    if name in CHOICES:
        return text in CHOICES[name]
    if name in ("opacity", "fill-opacity", "stroke-opacity", "stop-opacity", "flood-opacity", "stroke-miterlimit"):
        match = re.fullmatch(DIGITS + "%?", text)
        return bool(match) and not (name in POSITIVE and float(match[1]) < 0)
    if name == "stroke-dasharray":
        return text == "none" or all(length(part, default=NO_NUMBER) >= 0 for part in re.split(r"[\s,]+", text))
    if name == "font-size":
        return font_size(text, 16.0) >= 0
    if name in SIZES or name in ("stroke-width", "stroke-dashoffset"):
        size = length(text, default=NO_NUMBER)
        if authored and name in SIZES and re.fullmatch(DIGITS, text) and size != 0:
            return False
        return text == "auto" and name in SIZES or size == size and not (name in POSITIVE and size < 0)
    if name == "transform":
        return css_transform(value) is not None
    if name == "transform-origin":
        return origin(text, 1.0, 1.0) is not None
    if name == "d":
        return text == "none" or path_data(value) is not None
    if name == "filter":
        return bool(re.match(r"none$|(url|blur|brightness|contrast|drop-shadow|grayscale|hue-rotate|invert|opacity|"
                             r"saturate|sepia)\(", text))
    if name in ("clip-path", "mask"):
        return bool(re.match(r"none$|[a-z-]+\(|[a-z]+-box\b", text))
    return True


def path_data(text):
    """Path data of the CSS value path("..."); None for other values."""
    match = re.fullmatch(r"""path\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""", text, re.I)
    return match and (match[1] if match[1] is not None else match[2])


def media_holds(queries):
    """Whether one of the comma-separated media queries holds; None if that is unknown."""
    found = []
    for query in queries.lower().split(","):
        parts = [re.sub(r"\s*:\s*", ": ", " ".join(part.split())) for part in re.split(r"\band\b", query)]
        found.append(not NO_MEDIA.intersection(parts) and (True if MEDIA.issuperset(parts) else None))
    return True if True in found else None if None in found else False


class Sheets:
    """The rules of all style sheets that apply, including those in @media, @supports and @layer blocks."""

    def __init__(self, source):
        self.source, self.layers = source, {}     # names of a cascade layer from the outermost -> its rank

    def holds(self, queries):
        """Whether media queries hold; unknown ones do not, with a warning."""
        if (holds := media_holds(queries)) is None:
            self.source.not_understood("the media query", queries.strip())
        return bool(holds)

    def layer(self, path):
        """A tuple that sorts cascade layers from the weakest (CSS Cascading 5, 6.4.4).

        Layers are ranked by their first mention; rules outside of inner layers are stronger than those inside.
        """
        for k in range(len(path)):
            self.layers.setdefault(path[:k + 1], len(self.layers))
        if len(self.layers) > MAX_RULES:
            raise SVGError(f"more than {MAX_RULES} cascade layers")
        return (*(self.layers[path[:k + 1]] for k in range(len(path))), math.inf)

    def rules(self, rules, inside=(), depth=0):
        """(layer, rule) of every rule; inside: the names of the enclosing layers."""
        for rule in rules:
            if rule.type == "qualified-rule":
                yield self.layer(inside), rule
            if rule.type != "at-rule" or depth > MAX_DEPTH:
                continue
            name, prelude, path = rule.lower_at_keyword, tinycss2.serialize(rule.prelude).strip(), inside
            if name == "layer":           # one without a name is a new layer
                for names in [part.strip().split(".") for part in prelude.split(",")] if prelude else [[id(rule)]]:
                    path = (*inside, *names[:MAX_DEPTH])
                    self.layer(path)
            holds = (name == "supports" and supports_holds(rule.prelude) or name == "layer"
                     or name == "media" and self.holds(prelude))
            if rule.content is not None and holds:
                inner = tinycss2.parse_blocks_contents(rule.content, skip_comments=True, skip_whitespace=True)
                yield from self.rules(inner, path, depth + 1)
            elif name not in ("supports", "media", "layer") and not HARMLESS.match(name):
                self.source.not_understood("the CSS rule", f"@{name} {prelude}")


class Steps:
    """Counts the steps of matching: combinators can need as many as depth to the power of their number."""

    def __init__(self):
        self.left = MAX_STEPS

    def take(self, count):
        self.left -= count
        if self.left < 0:
            raise SVGError("its style sheets take too long to match")


class Siblings(list):
    """The children of an element; iteration is counted."""

    def __init__(self, elements, steps):
        super().__init__(elements)
        self.steps = steps

    def __iter__(self):
        self.steps.take(len(self))
        return super().__iter__()

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if isinstance(index, slice):
            self.steps.take(len(found))
        return found


class Node(cssselect2.ElementWrapper):
    """An element as selectors see it. Names have prefixes instead of namespaces, so only local names are compared."""

    namespace_url = ""

    def __init__(self, element, parent, *args, **options):
        super().__init__(element, parent, *args, **options)
        self.steps = parent.steps if parent else Steps()
        self.steps.take(10)               # the approximate cost of a node

    @functools.cached_property
    def local_name(self):
        return self.etree_element.tag.rpartition(":")[2]

    @functools.cached_property
    def etree_children(self):
        return Siblings((e for e in self.etree_element if isinstance(e.tag, str)), self.steps)

    # The library's own versions of these two recurse and keep a tuple for every element.

    @property
    def ancestors(self):
        node = self.parent
        while node is not None:
            self.steps.take(1)
            yield node
            node = node.parent

    @property
    def previous_siblings(self):
        node = self.previous
        while node is not None:
            self.steps.take(1)
            yield node
            node = node.previous


class Matcher(cssselect2.Matcher):
    @staticmethod
    def add_relevant_selectors(element, selectors, relevant_selectors):
        element.steps.take(len(selectors))
        cssselect2.Matcher.add_relevant_selectors(element, selectors, relevant_selectors)


class Styles:
    """What attributes, style sheets and style="" set for every element: the cascade (CSS Cascading 4, section 6)."""

    def __init__(self, source, root):
        self.source, self.parsed, self.read = source, {}, 0
        self.parents = {child: parent for parent in root.iter() for child in parent}
        self.cascaded, self.resolved, self.variables = {}, {}, {}
        self.scoped, self.looked = set(), 0       # custom properties set below the root; steps to find them
        self.involved = set()             # values that are not SIMPLE
        self.rules, self.important = 0, False     # selectors in all sheets; whether a sheet says !important
        matcher, sheets = Matcher(), Sheets(source)
        for element in root.iter():
            if source.tag(element) == "style" and sheets.holds(element.get("media", "all")):
                self.add_sheet(matcher, sheets, element.text or "")
        # element -> [(layer, [(property, value, important)])], of each layer the weakest rule first
        self.matched = {}
        if self.rules:
            for node in Node.from_xml_root(root).iter_subtree():
                self.matched[node.etree_element] = found = [payload for *_, payload in matcher.match(node)]
                node.steps.take(sum(len(body) for _, body in found))

    def count(self, text):
        self.read += len(text)
        if self.read > MAX_CSS:
            raise SVGError(f"more than {MAX_CSS >> 20} MiB of style sheets and style attributes")

    def add_sheet(self, matcher, sheets, text):
        self.count(text)
        sheet = tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)
        for layer, rule in sheets.rules(sheet):
            try:
                selectors = cssselect2.compile_selector_list(rule.prelude)
            # the library compiles selectors to Python, which limits their nesting
            except (cssselect2.SelectorError, SyntaxError, MemoryError, RecursionError, NotImplementedError):
                self.source.not_understood("the CSS selector", tinycss2.serialize(rule.prelude[:40]).strip())
                continue
            self.rules += len(selectors)
            if self.rules > MAX_RULES:
                raise SVGError(f"more than {MAX_RULES} style sheet rules")
            body = declarations(rule.content)
            if any(token.type == "{} block" for token in rule.content):
                self.source.not_understood("the nested CSS rule", tinycss2.serialize(rule.content).strip())
            self.important |= any(important for *_, important in body)
            for selector in selectors:
                if selector.pseudo_element is None:
                    matcher.add_selector(selector, (layer, body))

    def involve(self, text):
        """Count CSS that takes time to parse."""
        self.involved.add(text)
        if len(self.involved) > MAX_INVOLVED:
            raise SVGError(f"more than {MAX_INVOLVED} different values of style that are not plain words or numbers")

    def inline(self, element):
        """The declarations in style=""."""
        text = element.get("style", "")
        if text not in self.parsed:
            self.count(text)
            if "/*" in text:
                self.involve(text)
            self.parsed[text] = declarations(text)
        return self.parsed[text]

    def understood(self, name, value, authored):
        """The value to use; None, with a warning, if it is invalid: the declaration is ignored."""
        text = value
        if not SIMPLE.fullmatch(value):
            self.involve(value)
        if name in ("animation", "animation-name") and value.lower() not in ("none", *KEYWORDS):
            self.source.not_understood(name, value, STILL)
        if "calc(" in value.lower() and "var(" not in value.lower():
            text = self.replaced(None, tinycss2.parse_component_value_list(value))
        if text is not None and readable(name, text, authored):
            return text
        self.source.not_understood(name, value)
        return None

    def blocks(self, element):
        """The blocks of declarations for an element, weakest first: (block, whether it is CSS, importance) each.

        Sheets overrule attributes, style="" overrules sheets, and !important overrules all, with layers in reverse.
        """
        sheets, inline = self.matched.get(element, ()), self.inline(element)
        yield [(k, v.strip(), False) for k, v in element.attrib.items() if k in INHERITED or k in OWN], False, False
        for important in (False, True) if sheets or any(urgent for *_, urgent in inline) else (False,):
            for _, body in sorted(sheets, key=lambda found: found[0], reverse=important):         # stable
                yield body, True, important
            yield inline, True, important

    def cascade(self, element):
        """{property: winning value} of an element."""
        if element not in self.cascaded:
            found = {}
            for block, authored, important in self.blocks(element):
                given = set()             # the colours of this block
                for name, value, _ in (d for d in block if d[2] == important):
                    if (text := self.understood(name, value, authored)) is None:
                        continue
                    if WIDE.search(text) and name in given and name in COLOURS:
                        self.source.not_understood(name, text, "is ignored in favour of the sRGB colour before it")
                        continue
                    found.update(dict.fromkeys(MARKERS, text) if name == "marker" else {name: text})
                    if name in COLOURS:
                        given = given | {name} if colour(text) else given - {name}
            if element in self.parents:
                self.scoped.update(name for name in found if name.startswith("--"))
            self.cascaded[element] = found
        return self.cascaded[element]

    def variable(self, element, name):
        """The value of a custom property with var() replaced; None if it is not set or depends on itself."""
        while element is not None and name not in self.cascade(element):
            element = self.parents.get(element)
            self.looked += 1
            if self.looked > MAX_STEPS:
                raise SVGError("its custom properties take too long to find")
        if element is None:
            return None
        if (element, name) not in self.variables:
            self.variables[element, name] = None      # found while it is being replaced: a cycle
            value = self.cascade(element)[name]
            if value.lower() == "initial":
                value = None
            elif value.lower() in KEYWORDS:
                value = self.variable(self.parents.get(element), name)
            elif "var(" in value.lower():
                value = self.replaced(element, tinycss2.parse_component_value_list(value))
            self.variables[element, name] = value
        return self.variables[element, name]

    def replaced(self, element, tokens):
        """A value with var() and calc() replaced, by an element's custom properties; None if it is invalid."""
        parts = []
        for token in tokens:
            kind = token.lower_name if token.type == "function" else token.type
            if kind == "var":
                inside = [t for t in token.arguments if t.type not in ("whitespace", "comment")]
                comma = token.arguments.index(",") if "," in token.arguments else None
                text = self.variable(element, inside[0].value) if inside and inside[0].type == "ident" else None
                if text is None and comma is not None:
                    text = self.replaced(element, token.arguments[comma + 1:])
            elif token.type == "function":
                text = self.replaced(element, token.arguments)
                if text is not None and kind == "calc":
                    value = calculated(tinycss2.parse_component_value_list(text))
                    text = value and "{:.9g}{}".format(*value)
                elif text is not None:
                    text = f"{token.name}({text})"
            else:
                text = token.serialize() if token.type != "comment" else " "
            if text is None:
                return None
            parts.append(text)
        text = "".join(parts)
        return text.strip() if len(text) <= MAX_VALUE else None

    def scopes_differ(self, element, other):
        """Whether two elements have custom properties of different values."""
        self.looked += len(self.scoped)
        return any(self.variable(element, name) != self.variable(other, name) for name in sorted(self.scoped))

    def computed(self, element, name):
        """The value of an inherited property, by the element's ancestors in the file, not by `use`."""
        while element is not None:
            if name in self.of(element):
                return self.of(element)[name]
            element = self.parents.get(element)
        return INHERITED[name]

    def of(self, element):
        """{property: value} that the element sets itself; inherited values are left out."""
        if element not in self.resolved:
            own = {}
            for name, value in self.cascade(element).items():
                if "var(" in value.lower() and not name.startswith("--"):
                    value = self.replaced(element, tinycss2.parse_component_value_list(value))
                    if value is None or not readable(name, value, True):
                        continue          # invalid at computed-value time: as if it were unset
                keyword = value.lower()
                if keyword in KEYWORDS or (name, keyword) == ("color", "currentcolor"):
                    if name in INHERITED:
                        value = INHERITED[name] if keyword == "initial" else None
                    else:
                        parent = self.parents.get(element) if keyword == "inherit" else None
                        value = None if parent is None else self.of(parent).get(name)
                if value is not None:
                    own[name] = value
            self.resolved[element] = own
        return self.resolved[element]

    def inherit(self, style, element):
        """The style {property: (value, element that set it)} for the element and its children; font-size in pixels."""
        passed = {name: (value, element) for name, value in self.of(element).items() if name in INHERITED}
        if not passed:
            return style
        if "font-size" in passed:
            passed["font-size"] = str(font_size(passed["font-size"][0], float(style["font-size"][0]))), element
        return {**style, **passed}
