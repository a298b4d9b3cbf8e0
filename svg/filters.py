"""Filters: the graph of a <filter> or of CSS filter functions, read from the file and applied by torch operations.

    found = Reader(source).read(value, element, matrix, style, shapes)   # [Filter, ...] of a value of `filter`
    picture = found[0].apply(picture, box, place, points)                # [4, h, w], differentiable

Pictures are premultiplied sRGB [4, h, w]. The numbers of a filter are fixed; gradients flow to what it filters.
"""
import functools
import math
import re
from dataclasses import dataclass, field

import numpy as np
import tinycss2
import torch
import torch.nn.functional as F

from svg.outline import ANGLES, DIGITS, SVGError, length, numbers
from svg.style import URL, colour

SOURCE, ALPHA = -1, -2                # inputs that are no results of primitives
REGION = {"x": "-10%", "y": "-10%", "width": "120%", "height": "120%"}
MAX_PRIMITIVES = 200                  # of a filter
REACH = 4.0                           # standard deviations that a blur reaches
SUPPORTED = {"feGaussianBlur", "feOffset", "feFlood", "feMerge", "feBlend", "feComposite", "feColorMatrix",
             "feComponentTransfer", "feDropShadow", "feMorphology"}


# ------------------------------------------------------------------ colour spaces, blending

def unpremultiplied(picture):
    """Premultiplied [4, h, w] -> colours [3, h, w], black where transparent, and alpha [1, h, w]."""
    alpha = picture[3:]
    seen = alpha > 1e-6
    return torch.where(seen, picture[:3] / torch.where(seen, alpha, 1), 0).clamp(0, 1), alpha


def converted(picture, linear):
    """Premultiplied sRGB -> linear RGB (linear) or back."""
    rgb, alpha = unpremultiplied(picture)
    if linear:
        rgb = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055).clamp_min(1e-3) ** 2.4)
    else:
        rgb = torch.where(rgb <= 0.0031308, rgb * 12.92, 1.055 * rgb.clamp_min(1e-3) ** (1 / 2.4) - 0.055)
    return torch.cat([rgb * alpha, alpha])


def luminosity(c):
    return 0.3 * c[:1] + 0.59 * c[1:2] + 0.11 * c[2:]


def with_luminosity(c, wanted):
    """SetLum of Compositing 1, section 10.2."""
    c = c + (wanted - luminosity(c))
    light, low, high = luminosity(c), c.amin(0, keepdim=True), c.amax(0, keepdim=True)
    c = torch.where(low < 0, light + (c - light) * light / (light - low).clamp_min(1e-6), c)
    return torch.where(high > 1, light + (c - light) * (1 - light) / (high - light).clamp_min(1e-6), c)


def with_saturation(c, wanted):
    """SetSat of Compositing 1: the colour stretched to the saturation."""
    low, high = c.amin(0, keepdim=True), c.amax(0, keepdim=True)
    return torch.where(high > low, (c - low) * wanted / (high - low).clamp_min(1e-6), 0)


def saturation(c):
    return c.amax(0, keepdim=True) - c.amin(0, keepdim=True)


def hard_light(b, s):
    return torch.where(s <= 0.5, 2 * b * s, b + (2 * s - 1) - b * (2 * s - 1))


def soft_light(b, s):
    d = torch.where(b <= 0.25, ((16 * b - 12) * b + 4) * b, b.clamp_min(0.25).sqrt())
    return torch.where(s <= 0.5, b - (1 - 2 * s) * b * (1 - b), b + (2 * s - 1) * (d - b))


STEP = 0.5 / 255                      # of a colour; the modes that jump at black or white do so as with 8 bits
# Backdrop and source colours [3, h, w], not premultiplied -> blended (Compositing 1, section 10)
BLEND = {
    "multiply": lambda b, s: b * s, "screen": lambda b, s: b + s - b * s, "overlay": lambda b, s: hard_light(s, b),
    "darken": torch.minimum, "lighten": torch.maximum,
    "color-dodge": lambda b, s: torch.where(
        b <= STEP, 0, torch.where(s >= 1, 1, (b / (1 - s).clamp_min(1e-6)).clamp_max(1))),
    "color-burn": lambda b, s: torch.where(
        b >= 1 - STEP, 1, torch.where(s <= 0, 0, 1 - ((1 - b) / s.clamp_min(1e-6)).clamp_max(1))),
    "hard-light": hard_light, "soft-light": soft_light, "difference": lambda b, s: (b - s).abs(),
    "exclusion": lambda b, s: b + s - 2 * b * s,
    "hue": lambda b, s: with_luminosity(with_saturation(s, saturation(b)), luminosity(b)),
    "saturation": lambda b, s: with_luminosity(with_saturation(b, saturation(s)), luminosity(b)),
    "color": lambda b, s: with_luminosity(s, luminosity(b)),
    "luminosity": lambda b, s: with_luminosity(b, luminosity(s))}


def blended(mode, back, top):
    """Premultiplied `top` [4, h, w] over `back` [4, h, w], or [3, h, w] where it is opaque, by a blend mode."""
    opaque = len(back) == 3
    if mode == "plus":                    # what does not overlap, such as tiles, without seams
        return back + top
    if mode == "normal":
        return back * (1 - top[3:]) + top[:len(back)]
    backdrop, alpha = (back, 1.0) if opaque else unpremultiplied(back)
    source, cover = unpremultiplied(top)
    rgb = (1 - cover) * back[:3] + (1 - alpha) * top[:3] + alpha * cover * BLEND[mode](backdrop, source)
    return rgb if opaque else torch.cat([rgb, back[3:] + cover - back[3:] * cover])


# ------------------------------------------------------------------ primitives

def box_sizes(sigma, count=5):
    """The odd widths of `count` averages whose variance is sigma^2 together ("Fast Image Filters", Kutskir)."""
    narrow = math.floor(math.sqrt(12 * sigma * sigma / count) + 1)
    narrow -= narrow % 2 == 0
    share = (12 * sigma * sigma - count * (narrow * (narrow + 4) + 3)) / (-4 * narrow - 4)
    return [narrow if k < round(share) else narrow + 2 for k in range(count)]


@functools.lru_cache(32)
def gaussian(size, sigma, dtype, device):
    """[size, size] matrix that blurs a column by a Gaussian; outside of it everything is transparent.

    Above a deviation of 2 it is five averages, each cut off at the ends, as in resvg.
    """
    if sigma > 2:
        kernel = torch.eye(size, dtype=torch.float64)[None]
        for width in box_sizes(min(sigma, 1e5)):
            kernel = F.avg_pool1d(kernel, width, 1, width // 2)
        return kernel[0].to(dtype).to(device)
    at = torch.arange(size, dtype=torch.float64)
    distance, steps = at[:, None] - at, torch.arange(-20, 21, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (distance / sigma).square()) / torch.exp(-0.5 * (steps / sigma).square()).sum()
    return kernel.to(dtype).to(device)


def blur(picture, sigma_x, sigma_y):
    _, height, width = picture.shape
    if sigma_y > 0.02:
        picture = gaussian(height, sigma_y, picture.dtype, picture.device) @ picture
    return picture @ gaussian(width, sigma_x, picture.dtype, picture.device).T if sigma_x > 0.02 else picture


def moved(picture, dx, dy):
    """The picture moved by whole pixels, towards 0 as resvg rounds."""
    _, height, width = picture.shape
    dx, dy = (math.trunc(d + math.copysign(1e-4, d)) for d in (dx, dy))
    if abs(dx) >= width or abs(dy) >= height:
        return torch.zeros_like(picture)
    kept = picture[:, max(-dy, 0):height - max(dy, 0), max(-dx, 0):width - max(dx, 0)]
    return F.pad(kept, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))


def morphology(picture, rx, ry, dilate):
    """The maximum or minimum over a window of 2 r + 1 pixels."""
    _, height, width = picture.shape
    rx, ry = min(round(rx), width), min(round(ry), height)
    x = picture[None] if dilate else -picture[None]
    x = F.max_pool2d(F.pad(x, (rx, rx, ry, ry)), (1, 2 * rx + 1), 1)
    x = F.max_pool2d(x, (2 * ry + 1, 1), 1)[0]
    return x if dilate else -x


def coloured(picture, matrix):
    """feColorMatrix: 20 numbers applied to colours that are not premultiplied."""
    m = picture.new_tensor(matrix).view(4, 5)
    rgba = torch.cat(unpremultiplied(picture))
    rgba = (torch.einsum("ij,jhw->ihw", m[:, :4], rgba) + m[:, 4, None, None]).clamp(0, 1)
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])


def transferred(picture, functions):
    """feComponentTransfer: (kind, numbers) or None for each of red, green, blue and alpha."""
    channels = []
    for c, function in zip(torch.cat(unpremultiplied(picture)), functions, strict=True):
        kind, v = function or ("identity", None)
        if kind == "linear":
            c = v[0] * c + v[1]
        elif kind == "gamma":
            c = v[0] * c.clamp_min(1e-6) ** v[1] + v[2]
        elif kind in ("table", "discrete") and v:
            n, table = len(v), c.new_tensor(v)
            if kind == "discrete" or n == 1:
                c = table[(c.detach() * n).long().clamp(0, n - 1)]
            else:
                k = (c.detach() * (n - 1)).long().clamp(0, n - 2)
                c = torch.lerp(table[k], table[k + 1], c * (n - 1) - k)
        channels.append(c.clamp(0, 1))
    rgba = torch.stack(channels)
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])


def composed(operator, a, b, k):
    """feComposite of a over, in, out of, ... b; k: the four numbers of arithmetic."""
    if operator == "arithmetic":
        result = k[0] * a * b + k[1] * a + k[2] * b + k[3]
        alpha = result[3:].clamp(0, 1)
        return torch.cat([torch.minimum(result[:3].clamp_min(0), alpha), alpha])
    one = {"over": (1, 1 - a[3:]), "in": (b[3:], 0), "out": (1 - b[3:], 0), "atop": (b[3:], 1 - a[3:]),
           "xor": (1 - b[3:], 1 - a[3:]), "lighter": (1, 1)}[operator]
    return (one[0] * a + one[1] * b).clamp(0, 1)


@dataclass
class Primitive:
    """An operation on pictures; lengths are in the units of the filter."""
    kind: str
    inputs: list                          # SOURCE, ALPHA or numbers of earlier primitives
    linear: bool                          # computed in linear RGB
    values: dict
    region: tuple                         # x, y, width, height; None where the filter's own holds


# ------------------------------------------------------------------ filters

@dataclass
class Filter:
    """The primitives of a filter and where they apply."""
    primitives: list
    matrix: np.ndarray                    # user space -> pixels at the drawing's size
    region: tuple | None                  # x, y, width, height; None: all that the result reaches
    region_on_box: bool = False
    on_box: bool = False                  # primitiveUnits
    shapes: list = field(default_factory=list)                # (shape, its matrix to user space) of the bounding box

    def unit(self, points):
        """(x, y, width, height) of the user's bounding box.

        points [N, 2]: the current point table; None: as in the file.
        """
        corners = [shape.outline.bounds(matrix, shape.local(points)) for shape, matrix in self.shapes]
        if not corners:
            return 0.0, 0.0, 0.0, 0.0
        low, high = np.min([c[0] for c in corners], 0), np.max([c[1] for c in corners], 0)
        return *low.tolist(), *(high - low).tolist()

    def pixels(self, rectangle, on_box, place, unit):
        """Pixel box (x0, y0, x1, y1) of (x, y, width, height) in user space or shares of the bounding box `unit`."""
        x, y, width, height = rectangle
        if on_box:
            x, y, width, height = unit[0] + x * unit[2], unit[1] + y * unit[3], width * unit[2], height * unit[3]
        corners = np.array([[x, x + width, x, x + width], [y, y, y + height, y + height], [1, 1, 1, 1]])
        px, py = place[:2] @ corners
        x0, y0 = math.floor(px.min() + 1e-3), math.floor(py.min() + 1e-3)
        return (x0, y0, x0 + max(1, math.ceil(np.ptp(px) - 1e-3)), y0 + max(1, math.ceil(np.ptp(py) - 1e-3)))

    @property
    def hardens(self):
        """Whether it makes nearly transparent pixels opaque, as the shadows of Figma do."""
        return any(p.kind == "feColorMatrix" and p.values["matrix"][18] > 16 for p in self.primitives)

    def reach(self, place):
        """Pixels (x, y) by which the result may reach beyond what is filtered; None: it fills its region."""
        x = y = 0.0
        for p in self.primitives:
            v = p.values
            if p.kind in ("feGaussianBlur", "feDropShadow"):
                sx, sy = self.deviations(v["deviation"], place, (1, 1, 1, 1))
                x, y = x + math.ceil(REACH * sx) + 1, y + math.ceil(REACH * sy) + 1
            if p.kind in ("feOffset", "feDropShadow"):
                dx, dy = np.abs(place[:2, :2] @ v["offset"])
                x, y = x + dx + 1, y + dy + 1
        return x, y

    def box(self, place, content, points):
        """Pixel box of the result, where place [3, 3] takes user space to pixels and content is the box filtered."""
        if self.region is not None:
            unit = self.unit(points) if self.region_on_box else None
            return self.pixels(self.region, self.region_on_box, place, unit)
        x, y = self.reach(place)
        return (content[0] - math.ceil(x), content[1] - math.ceil(y),
                content[2] + math.ceil(x), content[3] + math.ceil(y))

    def deviations(self, deviation, place, unit):
        """Standard deviations in pixels along x and y."""
        spread = place[:2, :2] @ np.diag([deviation[0] * unit[2], deviation[1] * unit[3]])
        return np.sqrt(np.square(spread).sum(1)).tolist()

    def apply(self, picture, box, place, points):
        """The result [4, h, w] for a picture [4, h, w] of the pixel box; gradients flow to the picture."""
        unit = self.unit(points) if self.on_box or any(any(n is not None for n in p.region) for p in self.primitives) \
            else (0.0, 0.0, 1.0, 1.0)
        scale = unit if self.on_box else (0.0, 0.0, 1.0, 1.0)
        results = []                      # (picture, whether it is in linear RGB)

        def read(index, linear):
            if index in (SOURCE, ALPHA):
                found, is_linear = picture, False
                if index == ALPHA:
                    return torch.cat([torch.zeros_like(picture[:3]), picture[3:]])
            else:
                found, is_linear = results[index]
            return found if is_linear == linear else converted(found, linear)
        for p in self.primitives:
            made, linear = self.run(p, read, picture, place, scale)
            results.append((self.cropped(made, p, box, place, unit), linear))
        made, linear = results[-1]
        return converted(made, False) if linear else made

    def run(self, p, read, picture, place, unit):
        """The result of a primitive, and whether it is in linear RGB; read(input, linear) returns its inputs."""
        v, kind, linear = p.values, p.kind, p.linear
        if kind == "feFlood":
            return picture.new_tensor(v["flood"])[:, None, None].expand_as(picture), False
        inputs = [read(index, linear) for index in p.inputs]
        if kind == "feMerge":
            made = torch.zeros_like(picture)
            for one in inputs:
                made = made * (1 - one[3:]) + one
            return made, linear
        first = inputs[0]
        if kind in ("feOffset", "feDropShadow"):
            offset = place[:2, :2] @ (v["offset"][0] * unit[2], v["offset"][1] * unit[3])
        if kind == "feGaussianBlur":
            made = blur(first, *self.deviations(v["deviation"], place, unit))
        elif kind == "feOffset":
            made = moved(first, *offset)
        elif kind == "feDropShadow":
            alpha = moved(blur(first[3:], *self.deviations(v["deviation"], place, unit)), *offset)
            flood = picture.new_tensor(v["flood"])[:, None, None]
            shadow = (converted(flood, True) if linear else flood) * alpha
            made = shadow * (1 - first[3:]) + first
        elif kind == "feMorphology":
            rx, ry = self.deviations(v["radius"], place, unit)
            made = morphology(first, rx, ry, v["dilate"])
        elif kind == "feColorMatrix":
            made = coloured(first, v["matrix"])
        elif kind == "feComponentTransfer":
            made = transferred(first, v["functions"])
        elif kind == "feBlend":
            made = blended(v["mode"], inputs[1], first)
        else:
            made = composed(v["operator"], first, inputs[1], v["k"])
        return made, linear

    def cropped(self, made, p, box, place, unit):
        """The result of a primitive within its own region."""
        if all(n is None for n in p.region):
            return made
        region = list(self.pixels(self.region, self.region_on_box, place, unit) if self.region else box)
        x, y, width, height = p.region
        x, y, width, height = (n if n is not None else 0.0 for n in (x, y, width, height))
        own = self.pixels((x, y, width, height), self.on_box, place, unit)
        if p.region[0] is not None:
            region[0] = own[0]
        if p.region[1] is not None:
            region[1] = own[1]
        if p.region[2] is not None:
            region[2] = region[0] + own[2] - own[0]
        if p.region[3] is not None:
            region[3] = region[1] + own[3] - own[1]
        rows = torch.arange(box[1], box[3], device=made.device)
        columns = torch.arange(box[0], box[2], device=made.device)
        inside = ((rows >= region[1]) & (rows < region[3]))[:, None] & (columns >= region[0]) & (columns < region[2])
        return made * inside


# ------------------------------------------------------------------ reading

def saturated(s):
    """The 20 numbers of feColorMatrix type="saturate"."""
    r, g, b = 0.213, 0.715, 0.072
    return [r + (1 - r) * s, g - g * s, b - b * s, 0, 0, r - r * s, g + (1 - g) * s, b - b * s, 0, 0,
            r - r * s, g - g * s, b + (1 - b) * s, 0, 0, 0, 0, 0, 1, 0]


def hue_rotated(degrees):
    """The 20 numbers of feColorMatrix type="hueRotate"."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = [[0.213 + c * 0.787 - s * 0.213, 0.715 - c * 0.715 - s * 0.715, 0.072 - c * 0.072 + s * 0.928],
            [0.213 - c * 0.213 + s * 0.143, 0.715 + c * 0.285 + s * 0.140, 0.072 - c * 0.072 - s * 0.283],
            [0.213 - c * 0.213 - s * 0.787, 0.715 - c * 0.715 + s * 0.715, 0.072 + c * 0.928 + s * 0.072]]
    return [*(n for row in rows for n in (*row, 0, 0)), 0, 0, 0, 1, 0]


def sepia(amount):
    k = 1 - amount
    return [0.393 + 0.607 * k, 0.769 - 0.769 * k, 0.189 - 0.189 * k, 0, 0,
            0.349 - 0.349 * k, 0.686 + 0.314 * k, 0.168 - 0.168 * k, 0, 0,
            0.272 - 0.272 * k, 0.534 - 0.534 * k, 0.131 + 0.869 * k, 0, 0, 0, 0, 0, 1, 0]


def linear_of(slope, intercept=0.0):
    return dict(functions=[("linear", (slope, intercept))] * 3 + [None])


# CSS filter functions of one number (Filter Effects 1, section 13): kind and values of the primitive
FUNCTIONS = {
    "brightness": lambda n: ("feComponentTransfer", linear_of(n)),
    "contrast": lambda n: ("feComponentTransfer", linear_of(n, 0.5 - 0.5 * n)),
    "grayscale": lambda n: ("feColorMatrix", dict(matrix=saturated(1 - min(n, 1)))),
    "invert": lambda n: ("feComponentTransfer", linear_of(1 - 2 * min(n, 1), min(n, 1))),
    "opacity": lambda n: ("feComponentTransfer", dict(functions=[None] * 3 + [("linear", (min(n, 1), 0.0))])),
    "saturate": lambda n: ("feColorMatrix", dict(matrix=saturated(n))),
    "sepia": lambda n: ("feColorMatrix", dict(matrix=sepia(min(n, 1))))}


def parts_of(value):
    """[(name, arguments)] of a value of `filter`, url(...) as ("url", text); None if it is invalid."""
    found = []
    for token in tinycss2.parse_component_value_list(value, skip_comments=True):
        if token.type == "whitespace":
            continue
        name = token.lower_name if token.type == "function" else token.type
        if name == "url":
            found.append(("url", token.serialize()))
        elif name in FUNCTIONS or name in ("blur", "hue-rotate", "drop-shadow"):
            arguments = [t for t in token.arguments if t.type not in ("whitespace", "comment")]
            if function_of(name, arguments, 16.0, (0.0, 0.0, 0.0)) is None:
                return None
            found.append((name, arguments))
        else:
            return None
    return found or None


def function_of(name, arguments, em, current):
    """(kind, values) of the primitive for a CSS filter function; None if its arguments are invalid."""
    texts = [token.serialize() for token in arguments]

    def size(text):                       # 0 alone needs no unit
        bare = re.fullmatch(DIGITS, text)
        return math.nan if "%" in text or bare and float(text) else length(text, default=math.nan, em=em)
    if name == "drop-shadow":
        sizes = [(k, found) for k, found in enumerate(map(size, texts)) if found == found]
        rest = [text for k, text in enumerate(texts) if k not in dict(sizes)]
        rgba = (*current, 1.0) if not rest or rest[0].lower() == "currentcolor" else colour(rest[0])
        if len(sizes) not in (2, 3) or len(rest) > 1 or rgba is None or len(sizes) == 3 and sizes[2][1] < 0:
            return None
        sigma = sizes[2][1] if len(sizes) == 3 else 0.0
        return "feDropShadow", dict(offset=(sizes[0][1], sizes[1][1]), deviation=(sigma, sigma), flood=flood(rgba))
    if len(texts) > 1:
        return None
    text = texts[0] if texts else ""
    if name == "blur":
        sigma = size(text or "0")
        return ("feGaussianBlur", dict(deviation=(sigma, sigma))) if sigma >= 0 else None
    if name == "hue-rotate":
        match = re.fullmatch(DIGITS + "([a-zA-Z]*)", text or "0")
        if not match or match[2].lower() not in ANGLES or not match[2] and float(match[1]):
            return None
        return "feColorMatrix", dict(matrix=hue_rotated(float(match[1]) * ANGLES[match[2].lower()]))
    match = re.fullmatch(DIGITS + "(%?)", text or "1")
    if not match or float(match[1]) < 0:
        return None
    return FUNCTIONS[name](min(float(match[1]), 1e6) / (100 if match[2] else 1))


def flood(rgba):
    """A colour as premultiplied numbers."""
    return [*(c * rgba[3] for c in rgba[:3]), rgba[3]]


def shares(text, default):
    """An opacity in [0, 1]."""
    return min(max(length(text, default=default), 0.0), 1.0)


class Reader:
    """Reads values of `filter` for an element with its matrix, style and shapes."""

    def __init__(self, source):
        self.source, self.styles = source, source.styles

    def read(self, value, element, matrix, style, shapes):
        """The Filters of a value, in the order in which they apply; None if the element is not rendered at all.

        matrix: of the element's user space; shapes: [(shape, its matrix to user space)] of its bounding box.
        """
        found, what = [], f"filter on <{self.source.tag(element)}>"
        em = float(style["font-size"][0])
        for name, arguments in parts_of(value) or ():
            if name == "url":
                target = self.source.link(arguments) if re.match(URL, arguments) else None
                if target is None or self.source.tag(target) != "filter":
                    continue              # a filter that refers to nothing has no effect
                one = self.element(target, what, matrix, style, shapes)
                if one is None:
                    return None
            else:
                current = colour(style["color"][0]) or (0.0, 0.0, 0.0, 1.0)
                kind, values = function_of(name, arguments, em, current[:3])
                one = Filter([Primitive(kind, [SOURCE], False, values, (None,) * 4)], matrix, None)
            self.check(one, what)
            found.append(one)
        return found

    def check(self, one, what):
        """Refuse a blur that is slanted in pixels, which no product of two blurs can draw."""
        for p in one.primitives:
            deviation = p.values.get("deviation", p.values.get("radius"))
            if deviation is not None and max(deviation) > 0:
                spread = one.matrix[:2, :2] @ np.diag(deviation)
                spread = spread @ spread.T
                if abs(spread[0, 1]) > 1e-3 * np.trace(spread):
                    self.source.unsupported(f"{what} under a skewing transform")

    def element(self, target, what, matrix, style, shapes):
        """The Filter of a <filter> element; None if it disables what it is applied to."""
        if any(name.rpartition(":")[2] == "href" for name in target.attrib):
            self.source.unsupported("href on <filter>")
        region_on_box = target.get("filterUnits") != "userSpaceOnUse"
        on_box = target.get("primitiveUnits") == "objectBoundingBox"
        region = tuple(self.size(target, name, default, region_on_box, style) for name, default in REGION.items())
        children = [child for child in target if self.source.tag(child).startswith("fe")]
        if not children or min(region[2:]) <= 0:
            return None
        if len(children) > MAX_PRIMITIVES:
            raise SVGError(f"filter '#{target.get('id')}' has more than {MAX_PRIMITIVES} primitives")
        found = Filter([], matrix, region, region_on_box, on_box, shapes)
        if region_on_box or on_box:
            unit = found.unit(None)
            if min(unit[2:]) <= 0:
                return None
        names = {}
        for child in children:
            tag = self.source.tag(child)
            if tag not in SUPPORTED:
                self.source.unsupported(f"<{tag}> in a {what}")
                return Filter([Primitive("feMerge", [SOURCE], False, {}, (None,) * 4)], matrix, None)
            sizes = tuple(self.size(child, name, None, on_box, style) for name in REGION)
            inputs = self.inputs(child, tag, names, len(found.primitives), what)
            linear = self.styles.computed(child, "color-interpolation-filters").lower() != "srgb"
            found.primitives.append(Primitive(tag, inputs, linear, self.values(child, tag, what), sizes))
            if child.get("result"):
                names[child.get("result")] = len(found.primitives) - 1
        return found

    def size(self, element, name, default, on_box, style):
        text = element.get(name, default)
        if text is None:
            return None
        return length(text) if on_box else self.source.units(text, name, style, length(default or "0"))

    def inputs(self, child, tag, names, count, what):
        """The inputs of a primitive; an unknown name means the result of the one before."""
        def index(element, attribute):
            name = element.get(attribute, "")
            if name in ("BackgroundImage", "BackgroundAlpha", "FillPaint", "StrokePaint"):
                self.source.unsupported(f"{name} in a {what}")
            fixed = {"SourceGraphic": SOURCE, "SourceAlpha": ALPHA}
            return names.get(name, fixed.get(name, count - 1 if count else SOURCE))
        if tag == "feMerge":
            return [index(node, "in") for node in child if self.source.tag(node) == "feMergeNode"]
        if tag == "feFlood":
            return []
        return [index(child, name) for name in (("in", "in2") if tag in ("feBlend", "feComposite") else ("in",))]

    def values(self, child, tag, what):
        """The numbers of a primitive."""
        def pair(name, default):
            v = numbers(child.get(name)) or [default]
            return (v[0], v[1] if len(v) > 1 else v[0]) if min(v[:2]) >= 0 else (0.0, 0.0)

        def one(name, default, element=child):
            return (numbers(element.get(name)) or [default])[0]
        if tag == "feGaussianBlur":
            return dict(deviation=pair("stdDeviation", 0.0))
        if tag == "feMorphology":
            return dict(radius=pair("radius", 0.0), dilate=child.get("operator") == "dilate")
        if tag == "feOffset":
            return dict(offset=(one("dx", 0.0), one("dy", 0.0)))
        if tag in ("feFlood", "feDropShadow"):
            props = self.styles.of(child)
            text = props.get("flood-color", "black")
            rgba = colour(self.styles.computed(child, "color") if text.lower() == "currentcolor" else text)
            found = dict(flood=flood((*rgba[:3], rgba[3] * shares(props.get("flood-opacity"), 1.0))))
            if tag == "feDropShadow":
                found.update(offset=(one("dx", 2.0), one("dy", 2.0)), deviation=pair("stdDeviation", 2.0))
            return found
        if tag == "feBlend":
            mode = child.get("mode", "normal")
            return dict(mode=mode if mode in BLEND else "normal")
        if tag == "feComposite":
            operator = child.get("operator", "over")
            known = operator in ("over", "in", "out", "atop", "xor", "lighter", "arithmetic")
            return dict(operator=operator if known else "over", k=[one(f"k{i}", 0.0) for i in range(1, 5)])
        if tag == "feColorMatrix":
            return dict(matrix=self.matrix(child))
        if tag == "feComponentTransfer":
            return dict(functions=[self.function(child, f"feFunc{c}", one) for c in "RGBA"])
        return {}

    def matrix(self, child):
        kind, v = child.get("type", "matrix"), numbers(child.get("values"))
        if kind == "saturate" and len(v) <= 1:
            return saturated(v[0] if v else 1.0)
        if kind == "hueRotate" and len(v) <= 1:
            return hue_rotated(v[0] if v else 0.0)
        if kind == "luminanceToAlpha":
            return [0.0] * 15 + [0.2125, 0.7154, 0.0721, 0, 0]
        return v if kind == "matrix" and len(v) == 20 else saturated(1.0)

    def function(self, child, tag, one):
        """(kind, numbers) of the last feFunc of a channel; None: the identity."""
        nodes = [node for node in child if self.source.tag(node) == tag]
        kind = nodes[-1].get("type", "identity") if nodes else "identity"
        if kind == "linear":
            return kind, (one("slope", 1.0, nodes[-1]), one("intercept", 0.0, nodes[-1]))
        if kind == "gamma":
            return kind, tuple(one(name, default, nodes[-1]) for name, default in
                               (("amplitude", 1.0), ("exponent", 1.0), ("offset", 0.0)))
        return (kind, numbers(nodes[-1].get("tableValues"))) if kind in ("table", "discrete") else None
