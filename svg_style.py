"""SVG's style: what attributes, CSS style sheets and style="" set for every element, and CSS colours.

    styles = Styles(source, root)                      # source: names and warnings, see svg_document.Source
    styles.of(element)                                 # {property: value} that the element sets itself

Read as browsers do: CSS Cascading 4, Selectors 4, the sRGB part of CSS Color 4, by tinycss2 and cssselect2. What is
invalid is dropped with a warning, so that the earlier or inherited declaration holds.
"""
import functools
import math
import re

import cssselect2
import tinycss2
from tinycss2 import color4

from svg_outline import SVGError

MAX_DEPTH = 200                       # of blocks in each other
MAX_CSS, MAX_RULES, MAX_STEPS = 2 << 20, 1000, 10_000_000       # characters, selectors, steps of matching

INHERITED = {                         # properties that elements pass on, with their initial values
    "fill": "black", "fill-opacity": "1", "fill-rule": "nonzero", "stroke": "none", "stroke-width": "1",
    "stroke-opacity": "1", "stroke-linecap": "butt", "stroke-linejoin": "miter", "stroke-miterlimit": "4",
    "stroke-dasharray": "none", "stroke-dashoffset": "0", "clip-rule": "nonzero", "color": "black",
    "visibility": "visible", "paint-order": "normal"}
OWN = {                               # and those that they do not
    "opacity": "1", "clip-path": "none", "display": "inline", "mask": "none", "filter": "none",
    "marker-start": "none", "marker-mid": "none", "marker-end": "none", "mix-blend-mode": "normal",
    "stop-color": "black", "stop-opacity": "1", "overflow": "hidden"}
REFUSED = ("mask", "filter", "marker-start", "marker-mid", "marker-end", "mix-blend-mode")
KEYWORDS = {"inherit", "initial", "unset", "revert", "revert-layer"}      # a value of every property
URL = r"url\(([^)]*)\)"
# media queries that hold for a still picture on a light screen; every other one does not
MEDIA = {"", "all", "screen", "only all", "only screen", "not print", "(prefers-color-scheme: light)"}


@functools.lru_cache(4096)
def colour(text):
    """CSS colour (Color 4: hex, names, rgb(), hsl(), hwb(), color(srgb)) -> (r, g, b, a) in [0, 1], or None."""
    try:
        found = color4.parse_color(text)
    except ValueError:                    # color() without arguments
        return None
    if not isinstance(found, color4.Color) or found.space not in ("srgb", "hsl", "hwb"):
        return None
    rgba = tuple(min(max(c, 0.0), 1.0) for c in found.to("srgb"))
    return None if any(map(math.isnan, rgba)) else rgba


def declarations(css):
    """Text or tokens such as 'fill: red; stroke: none !important' -> [(property, value, important)]."""
    found = tinycss2.parse_blocks_contents(css, skip_comments=True, skip_whitespace=True)
    return [(d.lower_name, tinycss2.serialize(d.value).strip(), d.important) for d in found if d.type == "declaration"]


def media_holds(queries):
    """Whether one of the comma-separated media queries holds."""
    return any(all(re.sub(r"\s*:\s*", ": ", " ".join(part.split())) in MEDIA for part in re.split(r"\band\b", query))
               for query in queries.lower().split(","))


def style_rules(rules, depth=0):
    """The rules that hold, those of the blocks @media and @supports among them."""
    for rule in rules:
        if rule.type == "qualified-rule":
            yield rule
        elif rule.type == "at-rule" and rule.content is not None and depth < MAX_DEPTH and (
                rule.lower_at_keyword == "supports" or
                rule.lower_at_keyword == "media" and media_holds(tinycss2.serialize(rule.prelude))):
            inner = tinycss2.parse_blocks_contents(rule.content, skip_comments=True, skip_whitespace=True)
            yield from style_rules(inner, depth + 1)


class Steps:
    """Counts the steps of matching: combinators can need as many as the depth to the power of their number."""

    def __init__(self):
        self.left = MAX_STEPS

    def take(self, count):
        self.left -= count
        if self.left < 0:
            raise SVGError("its style sheets take too long to match")


class Siblings(list):
    """Children of an element; walking over them is counted."""

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
    """An element as selectors see it. Names here have prefixes instead of namespaces, so only local names count."""

    namespace_url = ""

    def __init__(self, element, parent, *args, **options):
        super().__init__(element, parent, *args, **options)
        self.steps = parent.steps if parent else Steps()
        self.steps.take(10)               # about what making a node costs

    @functools.cached_property
    def local_name(self):
        return self.etree_element.tag.rpartition(":")[2]

    @functools.cached_property
    def etree_children(self):
        return Siblings((e for e in self.etree_element if isinstance(e.tag, str)), self.steps)

    # The library's own two recurse and keep a tuple for every element.

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
        self.cascaded, self.resolved = {}, {}
        self.rules, self.important = 0, False     # selectors in all sheets; whether a sheet says !important
        matcher = Matcher()
        for element in root.iter():
            if source.tag(element) == "style" and media_holds(element.get("media", "all")):
                self.add_sheet(matcher, element.text or "")
        self.matched = {}                 # element -> [[(property, value, important)]], weakest rule first
        if self.rules:
            for node in Node.from_xml_root(root).iter_subtree():
                bodies = [body for *_, body in matcher.match(node)]
                node.steps.take(sum(map(len, bodies)))
                self.matched[node.etree_element] = bodies

    def count(self, text):
        self.read += len(text)
        if self.read > MAX_CSS:
            raise SVGError(f"more than {MAX_CSS >> 20} MiB of style sheets and style attributes")

    def add_sheet(self, matcher, text):
        self.count(text)
        sheet = tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)
        for rule in style_rules(sheet):
            try:
                selectors = cssselect2.compile_selector_list(rule.prelude)
            # the library turns selectors into Python, which limits how deep they may be nested
            except (cssselect2.SelectorError, SyntaxError, MemoryError, RecursionError, NotImplementedError):
                self.source.not_understood("the CSS selector", tinycss2.serialize(rule.prelude[:40]).strip())
                continue
            self.rules += len(selectors)
            if self.rules > MAX_RULES:
                raise SVGError(f"more than {MAX_RULES} style sheet rules")
            body = declarations(rule.content)
            self.important |= any(important for *_, important in body)
            for selector in selectors:
                if selector.pseudo_element is None:
                    matcher.add_selector(selector, body)

    def inline(self, element):
        """The declarations in style=""."""
        text = element.get("style", "")
        if text not in self.parsed:
            self.count(text)
            self.parsed[text] = declarations(text)
        return self.parsed[text]

    def understood(self, name, value):
        """False, with a warning, for a colour that is none: the declaration then counts as not written."""
        if name not in ("fill", "stroke", "color", "stop-color"):
            return True
        rest = value.lower()
        if name in ("fill", "stroke"):
            rest = re.sub(URL, "", rest, count=1).strip() if rest.startswith("url(") else rest
            if rest in ("none", "context-fill", "context-stroke") or rest == "" != value:
                return True
        if rest in KEYWORDS or rest == "currentcolor" or colour(rest):
            return True
        self.source.not_understood(name, value)
        return False

    def cascade(self, element):
        """{property: winning value}: attributes, overruled by sheets, by style="", and by !important in this order."""
        if element not in self.cascaded:
            found = {k: v.strip() for k, v in element.attrib.items()
                     if (k in INHERITED or k in OWN) and self.understood(k, v.strip())}
            authored = [d for body in self.matched.get(element, ()) for d in body] + self.inline(element)
            authored.sort(key=lambda declaration: declaration[2])             # stable
            found.update((name, value) for name, value, _ in authored if self.understood(name, value))
            self.cascaded[element] = found
        return self.cascaded[element]

    def of(self, element):
        """{property: value} the element sets itself; what it only inherits as every element does is left out."""
        if element not in self.resolved:
            own = {}
            for name, value in self.cascade(element).items():
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
        """style {property: (value, element that set it)} as the element passes it on."""
        return {**style, **{name: (value, element) for name, value in self.of(element).items() if name in INHERITED}}
