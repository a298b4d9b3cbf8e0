"""Random drawings with numbers and structures that break readers: each must give a picture or a one-line error.

A drawing passes if it is refused by SVGError or gives a picture in [0, 1] and finite gradients, renders the same after
saving and loading, and takes less than MAX_SECONDS and MAX_MIB in all. It depends on the seed and its number alone.
"""
import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from bench.measure import peak_memory, table
from bench.svg import drawing_text
from image.figures import psnr
from svg.outline import SVGError
from svg_raster import SVG

MAX_SECONDS, MAX_MIB = 5.0, 1024.0
SAME = 40.0                               # dB between the pictures before and after saving

EXTREMES = ("0", "-0", "1e-320", "1e-300", "1e-30", "1e-12", "-1e-9", "1e-6", "1e5", "-1e6", "1e9", "1e30", "1e300",
            "1e999", "nan", "inf", "", "-5", "abc", "5 5", "9" * 400, "1e", "0x10", "auto", "calc(1px + 2px)",
            "calc(", "var(--a)", "var(--none, 7)", "1.5.5")
COLOURS = ("red", "#0f0", "#00f8", "none", "currentColor", "rgb(10 200 30 / 50%)", "hsl(200deg 80% 50%)",
           "hsla(20,500%,50%,5)", "hsl(0 1e300% 50%)", "oklch(0.7 0.15 40)", "lab(50 1e30 0)",
           "color(display-p3 1 0 0)", "color(prophoto-rgb 1e999 none -5 / 50%)", "color(a98-rgb 1e300 0 0)",
           "light-dark(red, blue)", "light-dark(", "var(--c)", "var(--none, teal)", "zzz", "inherit", "initial",
           "url(#g0)", "url(#g1) red", "url(#none)", "rgb(1e999 0 0)", "008000", "color()", "rgb(calc(100 + 55) 0 0)")
UNITS = ("", "", "", "", "px", "%", "em", "mm", "rem", "q", "vw")
MODES = ("normal", "multiply", "screen", "overlay", "color-dodge", "color-burn", "soft-light", "difference", "hue",
         "luminosity", "plus-lighter", "x")
FILTERS = ("url(#f0)", "url(#f1)", "url(#f0) url(#f1)", "blur(1.5px)", "drop-shadow(2px 1px 1px red)", "invert(.7)",
           "url(#none)", "blur(1e9px)", "hue-rotate(1e300deg)", "contrast(0) brightness(9)", "blur(", "none")
PIXELS = ("data:image/{};base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFElEQVR4nGP8z8Dwn4GBgYGJAQoAHgQCAYzC"
          "ZvkAAAAASUVORK5CYII=")
SHAPES = ("path", "path", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon")


class Maker:
    """A generator of drawings; wild: the share of extreme numbers."""

    def __init__(self, seed, number):
        self.random = random.Random(f"{seed} {number}")
        self.wild = self.random.choice((0.0, 0.0, 0.02, 0.1))
        self.left = self.random.choice((4, 12, 30))           # elements left to generate

    def chance(self, share):
        return self.random.random() < share

    def pick(self, options):
        return self.random.choice(options)

    def number(self, low=-10.0, high=42.0):
        if self.chance(self.wild):
            return self.pick(EXTREMES)
        value = self.random.uniform(low, high)
        return self.pick((f"{value:.0f}", f"{value:.2f}", f"{value:.6g}"))

    def length(self, low=0.0, high=36.0):
        return self.number(low, high) + (self.pick(UNITS) if self.chance(0.3) else "")

    def numbers(self, count, low=-10.0, high=42.0):
        return self.pick((" ", ",")).join(self.number(low, high) for _ in range(count))

    def matrix(self):
        kind = self.pick(("translate", "scale", "rotate", "skewX", "skewY", "matrix", "scale", "rotate"))
        if kind == "matrix":
            return f"matrix({self.numbers(4, -2, 2)} {self.numbers(2, -5, 20)})"
        return f"{kind}({self.numbers(self.pick((1, 1, 2, 3)), *((-90, 90) if kind == 'rotate' else (-2, 3)))})"

    def css_matrix(self):
        kind = self.pick(("translate", "scale", "rotate", "translateX", "skew", "rotate3d"))
        unit = dict(translate="px", translateX="%", rotate="deg", skew="deg").get(kind, "")
        return f"{kind}({self.number(-20, 20)}{unit})"

    def data(self):
        counts = dict(M=2, L=2, H=1, V=1, C=6, S=4, Q=4, T=2, Z=0)
        parts = ["M" + self.numbers(2)]
        for _ in range(self.random.randrange(8)):
            command = self.pick("LLHVCCSQTAAZZM")
            if command == "A":
                numbers = (f"{self.numbers(2, 0, 20)} {self.number(-90, 90)} {self.pick('01')}{self.pick('01')}"
                           f"{self.numbers(2)}")
            else:
                numbers = self.numbers(counts[command])
            parts.append((command if self.chance(0.6) else command.lower()) + numbers)
        return "".join(parts)

    def style(self):
        """[(property, value)] of an element."""
        options = (
            ("fill", self.pick(COLOURS)), ("fill", self.pick(COLOURS)), ("stroke", self.pick(COLOURS)),
            ("stroke-width", self.length(0, 8)), ("opacity", self.number(0, 1)), ("fill-opacity", self.number(0, 1.2)),
            ("stroke-dasharray", self.numbers(self.pick((1, 2, 3)), 0.1, 9)), ("stroke-dashoffset", self.number()),
            ("stroke-linecap", self.pick(("round", "square", "butt", "x"))), ("display", self.pick(("inline", "none"))),
            ("stroke-linejoin", self.pick(("round", "bevel", "miter", "arcs"))), ("fill-rule", "evenodd"),
            ("stroke-miterlimit", self.number(1, 30)),
            ("clip-path", self.pick(("url(#c0)", "url(#c1)", "circle(9px)"))),
            ("mask", self.pick(("url(#m0)", "url(#m1)", "url(#none)"))), ("color", self.pick(COLOURS)),
            ("visibility", self.pick(("hidden", "visible"))), ("font-size", self.length(1, 30)),
            ("paint-order", "stroke"), ("transform-origin", f"{self.length()} {self.pick(('top', '9px', '50%'))}"),
            ("filter", self.pick(FILTERS)), ("mix-blend-mode", self.pick(MODES)), ("isolation", "isolate"),
            (self.pick(("marker-start", "marker-mid", "marker-end")), self.pick(("url(#k0)", "url(#k1)"))),
            (self.pick(("fill", "stroke")), self.pick(("url(#p0)", "url(#p1) red", "context-fill"))),
            ("--c", self.pick(COLOURS)), ("--a", self.number()), ("vector-effect", "none"), ("mask-type", "alpha"))
        return [self.pick(options) for _ in range(self.random.randrange(5))]

    def attributes(self, tag):
        names = {"path": (), "rect": ("x", "y", "width", "height", "rx", "ry"), "circle": ("cx", "cy", "r"),
                 "ellipse": ("cx", "cy", "rx", "ry"), "line": ("x1", "y1", "x2", "y2"), "use": ("x", "y"),
                 "svg": ("x", "y", "width", "height"), "linearGradient": ("x1", "y1", "x2", "y2"),
                 "radialGradient": ("cx", "cy", "r", "fx", "fy"), "mask": ("x", "y", "width", "height"),
                 "image": ("x", "y", "width", "height"), "marker": ("refX", "refY", "markerWidth", "markerHeight"),
                 "pattern": ("x", "y", "width", "height"), "filter": ("x", "y", "width", "height")}
        found = {name: self.length() for name in names.get(tag, ()) if self.chance(0.8)}
        if tag == "path":
            found["d"] = self.data()
        if tag in ("polyline", "polygon"):
            found["points"] = self.numbers(self.random.randrange(11))
        if tag in ("svg", "symbol", "marker", "pattern") and self.chance(0.6):
            found["viewBox"] = self.numbers(2, -5, 5) + " " + self.numbers(2, 5, 40)
            found["preserveAspectRatio"] = self.pick(("none", "xMinYMax slice", "xMidYMid", "x"))
        units = {"clipPath": ("clipPathUnits",), "mask": ("maskUnits", "maskContentUnits"),
                 "linearGradient": ("gradientUnits",), "radialGradient": ("gradientUnits",),
                 "pattern": ("patternUnits", "patternContentUnits"), "filter": ("filterUnits", "primitiveUnits")}
        for name in units.get(tag, ()):
            found[name] = self.pick(("userSpaceOnUse", "objectBoundingBox"))
        if tag == "marker":
            found["orient"] = self.pick(("auto", "auto-start-reverse", self.number(), "1rad", "x"))
            found["markerUnits"] = self.pick(("strokeWidth", "userSpaceOnUse"))
            found["overflow"] = self.pick(("visible", "hidden"))
        if tag == "image":
            found["href"] = self.pick((PIXELS.format("png"), PIXELS.format("jpeg"), "", "a.png", "data:image/png,a"))
            found["preserveAspectRatio"] = self.pick(("none", "xMinYMax slice", "xMidYMid", "x"))
        if tag == "pattern" and self.chance(0.3):
            found.update(patternTransform=self.matrix(), href=self.pick(("#p0", "#p1", "#none")))
        if "Gradient" in tag:
            found["spreadMethod"] = self.pick(("pad", "reflect", "repeat"))
            if self.chance(0.3):
                found["gradientTransform"] = self.matrix()
            if self.chance(0.1):
                found["href"] = self.pick(("#g0", "#g1"))
        elif tag not in ("stop", "mask", "filter", "pattern") and (tag != "marker" or self.chance(0.1)):
            css = self.style()
            if self.chance(0.3):
                found["transform"] = self.matrix()
            if self.chance(0.05):
                css.append(("transform", self.css_matrix()))
            if self.chance(0.3):
                found["style"] = ";".join(f"{name}:{value}{self.pick(('', '', '!important', '/**/'))}"
                                          for name, value in css)
            else:
                found.update((name, value) for name, value in css if name[:2] != "--")
            if self.chance(0.3):
                found["class"] = self.pick("kl")
        return "".join(f' {name}="{value}"' for name, value in found.items())

    def shape(self):
        tag = self.pick(SHAPES)
        return f"<{tag}{self.attributes(tag)}/>"

    def element(self, depth=0):
        self.left -= 1
        if depth > 4 or self.chance(0.6):
            return self.shape()
        tag = self.pick(("g", "g", "g", "use", "use", "svg", "switch", "a", "text", "nest", "image"))
        if tag == "use":
            return f'<use href="#{self.pick(("e0", "e1", "e2", "s0", "none"))}"{self.attributes("use")}/>'
        if tag == "image":
            return f"<image{self.attributes('image')}/>"
        if tag == "text":
            return self.pick(('<text x="3"/>', '<text display="none">a</text>', "<text>a</text>", "<image/>"))
        if tag == "nest":
            return self.shape() * self.pick((1, 3, 60))
        name = f' id="e{self.random.randrange(3)}"' if self.chance(0.2) else ""
        children = "".join(self.element(depth + 1) for _ in range(self.random.randrange(4)) if self.left > 0)
        return f"<{tag}{name}{self.attributes(tag)}>{children}</{tag}>"

    def resources(self):
        parts = []
        for k in range(2):
            stops = "".join(
                f'<stop offset="{self.number(0, 1)}" stop-color="{self.pick(COLOURS)}" '
                f'stop-opacity="{self.number(0, 1)}"/>' for _ in range(self.pick((0, 1, 2, 2, 3, 40))))
            tag = self.pick(("linearGradient", "radialGradient"))
            parts.append(f'<{tag} id="g{k}"{self.attributes(tag)}>{stops}</{tag}>')
            box = ' transform="scale(.03)"'
            for tag, name in (("clipPath", "c"), ("mask", "m")):
                attributes = self.attributes(tag)
                inner = "".join(self.shape() for _ in range(self.pick((0, 1, 2))))
                if "Units=\"objectBoundingBox" in attributes and tag == "mask":
                    inner = f"<g{box}>{inner}</g>"
                parts.append(f'<{tag} id="{name}{k}"{attributes}>{inner}</{tag}>')
            parts.append(f'<g id="e{k}"{self.attributes("g")}>{self.shape()}</g>')
            parts.append(f'<filter id="f{k}"{self.attributes("filter")}>{self.primitives()}</filter>')
            for tag, name in (("pattern", "p"), ("marker", "k")):
                inner = "".join(self.shape() for _ in range(self.pick((0, 1, 2))))
                parts.append(f'<{tag} id="{name}{k}"{self.attributes(tag)}>{inner}</{tag}>')
        parts.append(f'<symbol id="s0"{self.attributes("symbol")}>{self.shape()}</symbol>')
        return f"<defs>{''.join(parts)}</defs>"

    def primitives(self):
        """The operations of a filter, joined at random."""
        kinds = {"GaussianBlur": f'stdDeviation="{self.numbers(2, 0, 4)}"',
                 "Offset": f'dx="{self.number(-9, 9)}" dy="{self.number(-9, 9)}"',
                 "Flood": f'flood-color="{self.pick(COLOURS)}" flood-opacity="{self.number(0, 1)}"',
                 "Blend": f'in2="SourceGraphic" mode="{self.pick(MODES)}"',
                 "Composite": f'in2="SourceAlpha" operator="{self.pick(("in", "out", "xor", "arithmetic", "x"))}" '
                              f'k1="{self.number(-1, 2)}" k2="{self.number(-1, 2)}" k4="{self.number(-1, 2)}"',
                 "ColorMatrix": self.pick((f'type="saturate" values="{self.number(0, 3)}"',
                                           f'values="{self.numbers(20, -1, 1)}"', 'type="luminanceToAlpha"')),
                 "ComponentTransfer": "", "DropShadow": f'stdDeviation="{self.number(0, 4)}"', "Tile": "",
                 "Morphology": f'operator="dilate" radius="{self.numbers(2, 0, 3)}"', "Merge": ""}
        inside = {"ComponentTransfer": f'<feFuncR type="gamma" amplitude="{self.number(0, 2)}" exponent="'
                                       f'{self.number(0, 3)}"/><feFuncA type="table" '
                                       f'tableValues="{self.numbers(3, 0, 1)}"/>',
                  "Merge": '<feMergeNode in="r"/><feMergeNode in="SourceGraphic"/>'}
        parts, named = [], ("", 'result="r"')
        for _ in range(self.pick((0, 1, 1, 2, 3))):
            kind = self.pick(list(kinds) if self.chance(0.1) else [name for name in kinds if name != "Tile"])
            source = self.pick(("", 'in="SourceAlpha"', 'in="SourceGraphic"', 'in="r"'))
            space = self.pick(("", 'color-interpolation-filters="sRGB"', f'width="{self.length()}"'))
            parts.append(f'<fe{kind} {kinds[kind]} {source} {space} {self.pick(named)}>'
                         f'{inside.get(kind, "")}</fe{kind}>')
        return "".join(parts)

    def sheet(self):
        rules = []
        for _ in range(self.random.randrange(4)):
            selector = self.pick((".k", "path", "g > .k", "rect, circle", ":root", "*", "rect:first-child", "a:b", "}"))
            css = [*self.style(), (self.pick(("r", "cx", "rx", "width", "transform", "d")), self.length() + "px")]
            rules.append(f"{selector}{{{';'.join(f'{name}:{value}' for name, value in css)}}}")
        text = " ".join(rules)
        first = rules[0] if rules else ""
        return "<style>" + self.pick((text, f"@media screen{{{text}}}", f"@supports (fill:red){{{text}}}",
                                      f"@layer b, a.b; @layer a{{{text} @layer b{{{first}}}}} @layer b{{{first}}}",
                                      f"@layer{{{text}}} @layer .{{{first}}}")) + "</style>"

    def document(self):
        body = (self.sheet() if self.chance(0.3) else "") + (self.resources() if self.chance(0.7) else "")
        while self.left > 0:
            body += self.element()
        root = self.pick(('0 0 32 32"', '0 0 32 32"', '0 0 32 32"', f'{self.numbers(4, 1, 40)}"',
                          f'0 0 32 32" width="{self.length()}" {self.attributes("g").strip()}'))
        text = drawing_text(body)
        text = text.replace('viewBox="0 0 32 32"', "" if self.chance(0.05) else f'viewBox="{root}')
        if self.chance(0.1):
            entity = self.pick(("1", "&amp;n;", "a" * 99))
            text = f'<!DOCTYPE svg [<!ENTITY n "{entity}">]>' + text.replace('"3"', '"&n;"')
        if self.chance(0.05):             # a piece lost or repeated, as in a damaged file
            a, b = sorted(self.random.randrange(len(text)) for _ in "ab")
            text = text[:a] + self.pick(("", text[a:b] * 2)) + text[b:]
        return text


def trial(text, path, size, skip):
    """Return "drawn" or "refused"; raise AssertionError, or any other error, if the drawing does not pass."""
    path.write_text(text)
    try:
        svg = SVG.load(path, skip, size)
        image = svg.render()
    except SVGError as error:
        assert "\n" not in str(error)
        return "refused"
    assert image.isfinite().all(), "the picture is not finite"
    assert image.min() >= -1e-5 and image.max() <= 1 + 1e-5, "the picture leaves [0, 1]"
    generator = torch.Generator().manual_seed(0)
    if image.requires_grad:
        (image * torch.randn(image.shape, generator=generator)).sum().backward()
        for name, p in svg.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), f"the gradient of {name} is not finite"
    with torch.no_grad():
        svg.points += 0.2 * torch.randn(svg.points.shape, generator=generator)
        svg.forms().shrink_(svg.points, 0.1)
        assert svg.points.isfinite().all(), "a form is not finite"
        try:
            moved = svg.render()
            svg.save(path)
            again = SVG.load(path, skip, size).render()
        except SVGError:                  # the step exceeded a limit, such as that of coordinates
            return "drawn"
        same = psnr(moved, again)
        assert same >= SAME, f"the picture differs after saving and loading: {same:.1f} dB"
    return "drawn"


def passes(seed, number, folder):
    """The outcome of drawing `number` as a word, and the error or None."""
    text, rng, outcome = Maker(seed, number).document(), random.Random(number), None

    def attempt():
        nonlocal outcome
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = trial(text, folder / "drawing.svg", rng.choice((24, 32, 64)), rng.random() < 0.8), None
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            outcome = "failed", f"{type(error).__name__}: {error} ({Path(line.filename).name}, line {line.lineno})"
    start = time.process_time()
    memory = peak_memory(attempt)
    seconds = time.process_time() - start
    if outcome[1] is None and (seconds > MAX_SECONDS or memory > MAX_MIB):
        outcome = "failed", f"took {seconds:.1f} s and {memory:.0f} MiB"
    return outcome


def drawings(args):
    """fuzz-drawings: `count` drawings from `seed`; failing ones are written to the folder args.keep."""
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.first, args.first + args.count):
            outcome, wrong = passes(args.seed, number, Path(folder))
            outcomes[outcome] += 1
            if wrong:
                print(f"  {number}: {wrong}", flush=True)
                if args.keep:
                    Path(args.keep).mkdir(parents=True, exist_ok=True)
                    (Path(args.keep) / f"{number}.svg").write_text(Maker(args.seed, number).document())
    return table(f"{args.count} drawings from seed {args.seed}", [
        ("drawn", str(outcomes["drawn"]), "", None), ("refused in one line", str(outcomes["refused"]), "", None),
        ("failed", str(outcomes["failed"]), "0", outcomes["failed"] == 0)])
