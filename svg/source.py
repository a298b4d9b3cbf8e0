"""The XML of SVG files: bytes to elements, with their names, references, lengths and styles, and bytes back.

    source = Source("apple.svg", skip_unsupported=False)
    source.root, source.width, source.height, source.view, source.styles

Anything that could read other files, never end or expand without bounds is refused.
"""
import math
import re
import stat
import warnings
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from xml.parsers import expat

from files.reading import POINTER, is_pointer
from files.writing import replacing
from svg.outline import SVGError, length, numbers
from svg.style import INHERITED, STILL, URL, Styles

MAX_BYTES, MAX_ELEMENTS, MAX_DEPTH = 32 << 20, 100_000, 200
MOVING = {"animate", "animateColor", "animateMotion", "animateTransform", "set", "script"}
MAX_ENTITIES, MAX_EXPANSION = 100, 1 << 20    # entities of a DTD, and the characters of all their expansions


def read_file(path):
    """The bytes of a file, unpacked if it is an .svgz; at most MAX_BYTES."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):       # reading a device or a pipe may never end
            raise SVGError("cannot be read: not a regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if data[:2] == b"\x1f\x8b":       # gzip
            data = zlib.decompressobj(31).decompress(data, MAX_BYTES + 1)
    except OSError as error:
        raise SVGError(f"cannot be read: {error.strerror}") from None
    except (zlib.error, ValueError) as error:
        raise SVGError(f"cannot be read: {error}") from None
    if is_pointer(data):
        raise SVGError(POINTER)
    if len(data) > MAX_BYTES:
        raise SVGError(f"larger than {MAX_BYTES >> 20} MiB")
    return data


def write_file(path, data):
    """Write bytes atomically; gzipped if the name ends with .svgz."""
    try:
        if Path(path).suffix.lower() == ".svgz":
            packer = zlib.compressobj(wbits=31)
            data = packer.compress(data) + packer.flush()
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise SVGError(f"{path}: cannot be written: {error.strerror}") from None


def parse_xml(data):
    """bytes -> root element; names keep their prefixes as written, so that saving changes nothing else.

    Entities of the file's own DTD, which Illustrator writes for its namespaces, are expanded if they are plain text.
    """
    builder, depth, count, root = ET.TreeBuilder(insert_comments=True), 0, 0, None
    entities = expansion = 0

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

    def entity(name, is_parameter, value, *_):
        nonlocal entities, expansion
        if value is None or is_parameter:
            raise SVGError("entity declarations (<!ENTITY>) of other files, or of DTDs, are refused")
        if re.search("[&<%]", value) or b"\0" in data:
            raise SVGError("entity declarations (<!ENTITY>) of more than plain text are refused")
        entities += 1
        expansion += len(value) * data.count(f"&{name};".encode())
        if entities > MAX_ENTITIES or expansion > MAX_EXPANSION:
            raise SVGError("entity declarations (<!ENTITY>) that expand this much are refused")

    def instruction(target, text):
        if target == "xml-stylesheet":
            raise SVGError(f"the external style sheet of <?{target} {text[:80]}?> is refused")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = lambda text: builder.data(text) if depth else None
    parser.CommentHandler = lambda text: builder.comment(text) if depth else None
    parser.EntityDeclHandler, parser.ProcessingInstructionHandler = entity, instruction
    try:
        parser.Parse(data, True)
    except SVGError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:      # the latter two: unknown encodings
        raise SVGError(f"not well-formed XML: {error}") from None
    return root


SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def names_of(root):
    """{element: local name} of the elements in the namespace of SVG, or in that of the root."""
    names, own = {}, {SVG_NAMESPACE}
    open_ = [(root, {"": ""})]
    while open_:
        element, scope = open_.pop()
        if not isinstance(element.tag, str):
            continue
        declared = {name[6:]: uri.strip() for name, uri in element.attrib.items()
                    if name == "xmlns" or name[:6] == "xmlns:"}
        scope = {**scope, **declared} if declared else scope
        prefix, _, name = element.tag.rpartition(":")
        uri = scope.get(prefix, f"undeclared {prefix}")
        if element is root:
            own.add(uri)
        if uri in own:
            names[element] = name
        open_ += [(child, scope) for child in element]
    return names


class Source:
    """The elements of an SVG file: their names, ids, references, lengths and styles."""

    def __init__(self, path, skip_unsupported):
        self.name, self.skip, self.skipped, self.told = str(path), skip_unsupported, [], set()
        self.root = parse_xml(read_file(path))
        self.names = names_of(self.root)
        if self.tag(self.root) != "svg":
            raise SVGError(f"the root element is <{self.root.tag}>, not <svg>")
        self.elements = [e for e in self.root.iter() if self.tag(e)]
        self.ids = {}
        for element in self.elements:
            self.ids.setdefault(element.get("id"), element)
            if self.tag(element) in MOVING:
                self.not_understood("the element", f"<{self.tag(element)}>", STILL)
        self.styles = Styles(self, self.root)
        root_style = self.styles.inherit({"font-size": (INHERITED["font-size"], None)}, self.root)
        self.em = float(root_style["font-size"][0])
        view = numbers(self.root.get("viewBox"))
        has_view = len(view) == 4 and min(view[2:]) > 0
        props = self.styles.of(self.root)
        # without a viewBox, percentages and missing sides have no meaning
        sizes = [length(props.get(k, self.root.get(k)), side, None, self.em)
                 for k, side in zip(("width", "height"), view[2:] if has_view else (math.nan, math.nan), strict=True)]
        self.sized = has_view or not any(size is None or math.isnan(size) for size in sizes)
        if self.sized:
            width, height = sizes
            if width is None:             # one side follows from the other by the viewBox
                width = view[2] if height is None else height * view[2] / view[3]
            self.see(view if has_view else None, width, width * view[3] / view[2] if height is None else height)
        else:
            self.see(None, 100.0, 100.0)

    def see(self, view, width, height):
        """Set the size of the picture and its viewBox; None: the picture's own pixels."""
        if not all(1e-9 < side < 1e9 for side in (width, height, *(view or [1, 1])[-2:])):
            raise SVGError(f"a picture of {width:g} x {height:g} cannot be drawn")
        self.width, self.height, self.view = width, height, view or [0, 0, width, height]

    def tag(self, element):
        """The element's local name; "" for comments and elements of other namespaces."""
        return self.names.get(element, "")

    def unsupported(self, what):
        if not self.skip:
            raise SVGError(f"{what} is not supported (--skip-unsupported leaves it out)")
        if what not in self.skipped:
            self.skipped.append(what)
            warnings.warn(f"{self.name}: {what} is not supported and left out", stacklevel=2)

    def not_understood(self, kind, text, what="is not understood and left out"):
        """Warn about invalid CSS, once for each kind; it is ignored, as CSS requires."""
        if (kind, what) not in self.told:
            self.told.add((kind, what))
            text = text if len(text) <= 60 else text[:57] + "..."
            warnings.warn(f"{self.name}: {kind} '{text}' {what}", stacklevel=2)

    @staticmethod
    def href(element):
        """The text of an element's href."""
        href = element.get("href")        # takes precedence over xlink:href
        if href is None:
            href = next((v for k, v in element.attrib.items() if k.rpartition(":")[2] == "href"), "")
        return href.strip()

    def reference(self, element):
        """The element that href refers to; None if it is not in this document."""
        href = self.href(element)
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

    def units(self, text, name, style, default=0.0):
        """A length in user units; its name decides whether 100 % is the viewport's width, height or mean side."""
        width, height = style["viewport"][0]
        of = dict(x=width, w=width, y=height, h=height).get(name.lstrip("cfr")[:1],
                                                            math.hypot(width, height) / math.sqrt(2))
        em = float(style["font-size"][0])
        if text and text.strip().lower().endswith("rem"):
            text, em = text.strip()[:-3] + "em", self.em
        found = length(text, of, None, em)
        if found is None and text and text.strip().lower() != "auto":
            self.not_understood(name, text)
        return default if found is None else found

    def measure(self, element, name, style, default=0.0):
        """A length set by an attribute or a style sheet."""
        return self.units(self.styles.of(element).get(name, element.get(name)), name, style, default)

    def holds(self, element):
        """Whether the element's conditions hold (SVG 1.1, 5.8): features, extensions, English as the language."""
        features, extensions, languages = map(element.get, ("requiredFeatures", "requiredExtensions", "systemLanguage"))
        known = re.compile(r"(http://www\.w3\.org/TR/SVG11/feature#|org\.w3c\.svg)")
        return ((features is None or bool(features.split()) and all(map(known.match, features.split())))
                and extensions is None
                and (languages is None or any(re.match(r"en(-|$)", part.strip().lower())
                                              for part in languages.split(","))))
