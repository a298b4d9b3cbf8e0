"""Numbers, lengths, transforms and outlines of SVG: text to matrices, and to lines and cubics. No XML, no CSS.

Coordinates are x right, y down; points are complex numbers x + iy, transforms 3x3 matrices for column vectors.
"""
import math
import re
from itertools import pairwise

import numpy as np


class SVGError(ValueError):
    """A file that cannot be read, drawn or written; one line that names the file and the reason."""


# ------------------------------------------------------------------ values: numbers, lengths, transforms

# every digit matches in one way only: otherwise a long malformed number takes time quadratic in its length
DIGITS = r"([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
NUMBER = re.compile(r"[\s,]*" + DIGITS)
LENGTH = re.compile(NUMBER.pattern + r"\s*(%|[a-zA-Z]*)\s*")
FLAG = re.compile(r"[\s,]*([01])")    # an arc's flags may be packed: "a1 1 0 011 1"
COMMAND = re.compile(r"[\s,]*([MmZzLlHhVvCcSsQqTtAa])")
ARGUMENTS = dict(M=2, L=2, H=1, V=1, C=6, S=4, Q=4, T=2, A=7, Z=0)
UNITS = {"": 1, "px": 1, "pt": 4 / 3, "pc": 16, "mm": 96 / 25.4, "cm": 96 / 2.54, "q": 24 / 25.4, "in": 96}
FONT_UNITS = {"em": 1.0, "ex": 0.5, "ch": 0.5}         # in font sizes
ANGLES = {"": 1, "deg": 1, "grad": 0.9, "rad": 180 / math.pi, "turn": 360}
MAX_POINTS = 500_000                  # of one path
MAX_PARTS = 64                        # of a subdivided curve


def number(text):
    """A float clamped so that its square does not overflow; MAX_COORDINATE limits what is drawn."""
    return min(max(float(text), -1e18), 1e18)


def numbers(text):
    return [number(n) for n in re.findall(DIGITS, text or "")]


def length(text, percent_of=1.0, default=0.0, em=16.0):
    """A length in user units (px); percent_of: what 100 % means; em: the font size; the default if unreadable."""
    match = LENGTH.fullmatch(text or "")
    unit = match[2].lower() if match else None
    if unit == "%":
        return number(match[1]) * percent_of / 100
    if unit in FONT_UNITS:
        return number(match[1]) * FONT_UNITS[unit] * em
    return number(match[1]) * UNITS[unit] if unit in UNITS else default


def affine(a=1.0, b=0.0, c=0.0, d=1.0, e=0.0, f=0.0):
    return np.array([[a, c, e], [b, d, f], [0.0, 0.0, 1.0]])


def transform(text):
    """An SVG transform list -> 3x3 matrix (column vectors)."""
    matrix = affine()
    for name, inner in re.findall(r"\b(\w+)\s*\(([^()]*)\)", text) if text else ():
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


THREE_D = {"translate3d", "translatez", "scale3d", "scalez", "rotate3d", "rotatex", "rotatey", "matrix3d",
           "perspective"}
TRANSFORM = re.compile(r"\s*([a-zA-Z0-9]+)\(([^()]*)\)\s*")


def css_transform(text, width=1.0, height=1.0, em=16.0):
    """A CSS transform, in which lengths and angles have units -> 3x3 matrix; None if it is invalid.

    width, height: of the reference box, for percentages. Functions in space (THREE_D) count as the identity where they
    leave the plane, see is_plane.
    """
    matrix, pos = affine(), 0
    text = "" if text.strip().lower() == "none" else text
    while pos < len(text):
        match = TRANSFORM.match(text, pos)
        step = match and css_step(match[1].lower(), [part.strip() for part in match[2].split(",")], width, height, em)
        if step is None:
            return None
        matrix, pos = matrix @ step, match.end()
    return matrix


def plane_step(name, parts):
    """(name, parts) of the plane function that a function in space amounts to; None if it leaves the plane."""
    v = [length(part, default=math.nan) for part in parts]
    if name == "translate3d" and len(v) == 3 and v[2] == 0:
        return "translate", parts[:2]
    if name == "scale3d" and len(v) == 3 and v[2] == 1:
        return "scale", parts[:2]
    if name == "rotate3d" and len(v) == 4 and v[:2] == [0, 0] and v[2] > 0:
        return "rotate", parts[3:]
    if name == "matrix3d" and len(v) == 16 and v[2:4] + v[6:12] + v[14:] == [0, 0, 0, 0, 0, 0, 1, 0, 0, 1]:
        return "matrix", [parts[k] for k in (0, 1, 4, 5, 12, 13)]
    nothing = {"translatez": 0, "scalez": 1}
    if len(v) == 1 and v[0] == nothing.get(name) or name in ("rotatex", "rotatey") and re.fullmatch(
            DIGITS + "([a-zA-Z]*)", ",".join(parts)) and number(re.match(DIGITS, parts[0])[1]) == 0:
        return "translate", ["0"]
    return None


def is_plane(name, text):
    """Whether a function in space, with its arguments as text, stays in the plane."""
    return plane_step(name.lower(), [part.strip() for part in text.split(",")]) is not None


def css_step(name, parts, width, height, em):
    """One function of a CSS transform and its arguments -> 3x3 matrix; None if it is invalid."""
    def sizes(*percent_of):
        found = [length(part, of, math.nan, em) for part, of in zip(parts, percent_of, strict=False)]
        unitless = any(re.fullmatch(DIGITS, part) and float(part) for part in parts)          # allowed for 0 alone
        return None if unitless or len(parts) > len(percent_of) or any(map(math.isnan, found)) else found

    def plain():
        found = [re.fullmatch(DIGITS + "(%?)", part) for part in parts]
        return [number(m[1]) / (100 if m[2] else 1) for m in found] if all(found) else None

    def angles():
        found = [re.fullmatch(DIGITS + "([a-zA-Z]*)", part) for part in parts]
        fine = all(m and m[2].lower() in ANGLES and (m[2] or not float(m[1])) for m in found)
        return [number(m[1]) * ANGLES[m[2].lower()] for m in found] if fine else None
    if name in THREE_D:
        flat = plane_step(name, parts)
        return affine() if flat is None else css_step(*flat, width, height, em)
    if name in ("translate", "translatex", "translatey"):
        v = sizes(width, height) if name == "translate" else sizes(height if name[-1] == "y" else width)
        return v and (affine(f=v[0]) if name[-1] == "y" else affine(e=v[0], f=v[1] if len(v) == 2 else 0))
    if name in ("scale", "scalex", "scaley") and (v := plain()) and len(v) <= (2 if name == "scale" else 1):
        return affine(a=1 if name[-1] == "y" else v[0], d=1 if name[-1] == "x" else v[-1])
    if name == "matrix" and (v := plain()) and len(v) == 6:
        return affine(*v)
    if name in ("rotate", "rotatez", "skewx", "skewy") and (v := angles()) and len(v) == 1:
        return transform(f"{dict(rotatez='rotate', skewx='skewX', skewy='skewY').get(name, name)}({v[0]!r})")
    if name == "skew" and (v := angles()) and len(v) <= 2:
        return affine(c=math.tan(math.radians(v[0])), b=math.tan(math.radians(v[1])) if len(v) == 2 else 0)
    return None


def origin(text, width, height, em=16.0):
    """A transform-origin -> (x, y) from the corner of its reference box; None if it is invalid."""
    words = text.lower().split()[:2] or [""]
    places = dict(left=(0.0, None), right=(width, None), top=(None, 0.0), bottom=(None, height))
    if words[0] in ("top", "bottom") or words[-1] in ("left", "right"):
        words = words[::-1] if len(words) == 2 else ["center", *words]
    words += ["center"] * (2 - len(words))
    found = [of / 2 if word == "center" else places[word][axis] if word in places else length(word, of, None, em)
             for axis, (word, of) in enumerate(zip(words, (width, height), strict=True))]
    return None if None in found else tuple(found)


def matrix_text(matrix, separator=" "):
    return "matrix({})".format(separator.join(f"{v:.9g}" for v in matrix[:2].T.flat))


def fit(viewbox, aspect, x, y, width, height):
    """Matrix that takes a viewBox (min x, min y, w, h) to the rectangle, by the value of preserveAspectRatio."""
    sx, sy = width / viewbox[2], height / viewbox[3]
    align = re.search(r"x(Min|Mid|Max)Y(Min|Mid|Max)|none", aspect or "") or re.match("(Mid)(Mid)", "MidMid")
    if align[0] != "none":
        sx = sy = max(sx, sy) if "slice" in (aspect or "") else min(sx, sy)
        share = dict(Min=0.0, Mid=0.5, Max=1.0)
        x += share[align[1]] * (width - sx * viewbox[2])
        y += share[align[2]] * (height - sy * viewbox[3])
    return affine(sx, 0, 0, sy, x - sx * viewbox[0], y - sy * viewbox[1])


LAST_STOP = affine(0, 0, 0, 0, 1, 0)  # t = 1 everywhere: a gradient of no extent


def linear_unit(x1, y1, x2, y2):
    """Matrix that takes the gradient vector to the unit vector along x."""
    square = (x2 - x1) ** 2 + (y2 - y1) ** 2
    if square <= 1e-18:
        return LAST_STOP
    vx, vy = (x2 - x1) / square, (y2 - y1) / square
    return affine(vx, 0, vy, 0, -x1 * vx - y1 * vy, 0)


def radial_unit(cx, cy, r, fx, fy):
    """Matrix that takes the circle to the unit circle, and the focus (x, y) in those coordinates."""
    if r <= 1e-9:
        return LAST_STOP, None
    focus = complex(0 if fx is None else (fx - cx) / r, 0 if fy is None else (fy - cy) / r)
    focus *= min(1.0, 0.999 / max(abs(focus), 1e-9))      # the focus stays inside the circle
    return affine(1 / r, 0, 0, 1 / r, -cx / r, -cy / r), (focus.real, focus.imag)


# ------------------------------------------------------------------ outlines: every shape as lines and cubics

class Outline:
    """Subpaths of straight lines and cubic Beziers over shared points (complex numbers: x + iy).

    A line is stored as the cubic (p, p, q, q), so that one index table [curves, 4] holds all curves.
    Quadratics become cubics; arcs and circles become cubics of at most 90 degrees each. `inside` holds the points
    between the pieces of an arc or of a subdivided curve, `returned` the first points of the subpaths that return there
    before they are closed.
    """

    def __init__(self):
        self.points, self.curves, self.inside, self.returned = [], [], set(), set()
        self.subpaths = []            # each [first curve, first point, closed]

    def move(self, p):
        self.points.append(p)
        self.subpaths.append([len(self.curves), len(self.points) - 1, False])

    def line(self, p):
        self.curve(p)

    def curve(self, *points):
        if self.subpaths[-1][2]:      # a segment after a close starts a new subpath at the same point
            self.move(self.points[self.subpaths[-1][1]])
        sub, last = self.subpaths[-1], len(self.points) - 1
        if sub[0] == len(self.curves):
            last = sub[1]
        self.points += points
        n = len(self.points) - 1
        self.curves.append((last, n - 2, n - 1, n) if len(points) == 3 else (last, last, n, n))

    def arc(self, rx, ry, degrees, large, sweep, end):
        sub = self.subpaths[-1]
        # after a close, the current point is the first one of the subpath
        start, rx, ry = self.points[sub[1] if sub[2] else -1], abs(rx), abs(ry)
        turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
        if start == end:
            return
        # radii far too small to reach the end would be scaled up, and their ratio lost to rounding
        if min(rx, ry) < 1e-9 * abs(end - start):
            return self.line(end)

        def to_circle(p):
            return complex((p / turn).real / rx, (p / turn).imag / ry)
        # relative to the midpoint of both ends: far from the origin, small radii would be lost to rounding
        middle, half = (start + end) / 2, to_circle((end - start) / 2)
        if abs(half) < (1e-12 if large else 1e-6):            # straight to within rounding
            return self.line(end)
        grow = max(abs(half), 1.0)    # radii too small to reach are scaled up
        rx, ry, half = rx * grow, ry * grow, half / grow
        towards = 1j * half / abs(half) * math.sqrt(max(0.0, 1 - abs(half) ** 2))
        centre = towards if large != sweep else -towards
        spoke, last = -half - centre, half - centre
        angle = np.angle(last / spoke)
        if sweep and angle < 0 or not sweep and angle > 0:
            angle += 2 * math.pi * (1 if sweep else -1)
        count = max(1, math.ceil(abs(angle) / (math.pi / 2) - 1e-6))
        reach = 4j / 3 * math.tan(angle / count / 4)          # along the tangent, to a piece's handles

        def from_circle(p):
            return middle + complex(rx * (centre + p).real, ry * (centre + p).imag) * turn
        for k in range(count):
            a, b = (spoke * complex(math.cos(t), math.sin(t)) for t in (angle * np.array([k, k + 1]) / count))
            corner = end if k == count - 1 else from_circle(b)
            self.curve(from_circle(a * (1 + reach)), from_circle(b * (1 - reach)), corner)
            if k < count - 1:
                self.inside.add(len(self.points) - 1)

    def close(self):
        sub = self.subpaths[-1]
        if sub[2]:
            return
        gap = abs(self.points[-1] - self.points[sub[1]])
        if sub[0] < len(self.curves) and self.curves[-1][:2] != (sub[1], sub[1]) \
                and gap <= 1e-6 * max(map(abs, self.points[-4:])):
            self.points.pop()         # the path returned to its start explicitly: share the point
            self.returned.add(sub[1])
            curve = self.curves.pop()
            ends = (sub[1], sub[1]) if curve[0] == curve[1] else (curve[2], sub[1])
            self.curves.append((*curve[:2], *ends))
        else:
            self.curves.append((len(self.points) - 1, len(self.points) - 1, sub[1], sub[1]))
        sub[2] = True

    def drawn(self):
        """(first curve, one past the last, first point, closed) of every subpath that has curves."""
        bounds = [first for first, _, _ in self.subpaths[1:]] + [len(self.curves)]
        return [(first, stop, start, closed)
                for (first, start, closed), stop in zip(self.subpaths, bounds, strict=False) if first < stop]

    def subdivided(self, longest, most=MAX_POINTS):
        """The same outline, its curves split into equal parts of their parameter, so that control polygons are about as
        long as `longest` or shorter; a curve has at most MAX_PARTS. A line that is split becomes cubics, which bend
        smoothly. An outline that would get more than `most` points stays as it is."""
        result = Outline()
        for first, stop, start, closed in self.drawn():
            result.move(self.points[start])
            for k in range(first, stop):
                curve, straight = [self.points[i] for i in self.curves[k]], self.curves[k][0] == self.curves[k][1]
                count = min(math.ceil(sum(abs(b - a) for a, b in pairwise(curve)) / longest), MAX_PARTS)
                if count > 1:
                    result.curve_in_parts(curve, straight, count)
                elif not straight:
                    result.curve(*curve[1:])
                elif not (closed and k == stop - 1):          # else close() draws the line
                    result.line(curve[3])
                if self.curves[k][3] in self.inside:
                    result.inside.add(len(result.points) - 1)
                if len(result.points) > most:
                    return self
            if closed:
                result.close()
                if start in self.returned:
                    result.returned.add(result.subpaths[-1][1])
        return result

    def curve_in_parts(self, curve, straight, count):
        """Go along a cubic, four complex points of which the first is the current one, in `count` equal parts."""
        if straight:
            curve = [curve[0] + (curve[3] - curve[0]) * k / 3 for k in range(4)]

        def blossom(*ts):             # the polar form, whose values are the control points of a part
            points = curve
            for t in ts:
                points = [a + (b - a) * t for a, b in pairwise(points)]
            return points[0]
        for k in range(count):
            s, t = k / count, (k + 1) / count
            self.curve(blossom(s, s, t), blossom(s, t, t), curve[3] if k == count - 1 else blossom(t, t, t))
            if k < count - 1:
                self.inside.add(len(self.points) - 1)

    def bounds(self, matrix=None, points=None):
        """Corners (low, high) of the box around the curves, moved by a 3x3 matrix; None if there are none.

        points: complex numbers to use in place of the stored ones.
        """
        if not self.curves:
            return None
        points = np.array(self.points) if points is None else points
        points = np.stack([points.real, points.imag], 1)
        if matrix is not None:
            points = points @ matrix[:2, :2].T + matrix[:2, 2]
        p = points[np.array(self.curves)]                     # [K, 4, 2]
        low, high = p[:, (0, 3)].min((0, 1)), p[:, (0, 3)].max((0, 1))
        # a cubic leaves the box of its ends where its derivative a t^2 + b t + c is 0
        a, b, c = p[:, 3] - p[:, 0] + 3 * (p[:, 1] - p[:, 2]), 2 * (p[:, 0] - 2 * p[:, 1] + p[:, 2]), p[:, 1] - p[:, 0]
        with np.errstate(all="ignore"):
            q = -(b + np.copysign(np.sqrt(b * b - 4 * a * c), b)) / 2
            for t in (q / a, c / q):
                t = np.where(np.isfinite(t), t, 0).clip(0, 1)
                s = 1 - t
                at = s ** 3 * p[:, 0] + 3 * s * s * t * p[:, 1] + 3 * s * t * t * p[:, 2] + t ** 3 * p[:, 3]
                low, high = np.minimum(low, at.min(0)), np.maximum(high, at.max(0))
        return low, high

    def data(self, points, digits=7, vertices=False):
        """Path data with these coordinates [n, 2] in place of the stored ones; vertices: keep their number."""
        def text(i):
            return f"{points[i][0]:.{digits}g} {points[i][1]:.{digits}g}"
        parts = []
        for first, stop, start, closed in self.drawn():
            parts.append("M" + text(start))
            for k in range(first, stop):
                p, a, b, q = self.curves[k]
                if p != a:
                    parts.append(f"C{text(a)} {text(b)} {text(q)}")
                elif not (closed and k == stop - 1) or vertices and start in self.returned:   # Z draws the last line
                    parts.append("L" + text(q))
            parts += "Z" * closed
        return "".join(parts)


def path_outline(data):
    """Path data -> Outline. A path with an error is drawn up to the error, as the specification requires."""
    outline, at, command, pos, handle = Outline(), 0j, None, 0, None
    while True:
        if len(outline.points) > MAX_POINTS:
            raise SVGError(f"a path has more than {MAX_POINTS} points")
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
    # no corner to round if one radius is 0, or so small that both ends of the arc are the same number
    if min(rx, ry) < 1e-9 * max(abs(x), abs(y), width, height):
        rx = ry = 0.0
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


SHAPES = {"path", "circle", "ellipse", "rect", "line", "polyline", "polygon"}
GEOMETRY = ("d", "cx", "cy", "r", "rx", "ry", "x", "y", "width", "height", "points", "x1", "y1", "x2", "y2")


def shape_outline(tag, attributes, units):
    """Outline of one of SHAPES; units(text, name, default): a length in user units."""
    def size(*names, default=0.0):
        return [units(attributes.get(name), name, default) for name in names]
    if tag == "path":
        return path_outline(attributes.get("d", ""))
    if tag in ("rect", "ellipse"):
        # a radius that is missing, `auto` or negative equals the other one
        rx, ry = (None if radius is None or radius < 0 else radius for radius in size("rx", "ry", default=None))
        rx, ry = (ry or 0.0 if rx is None else rx), (rx or 0.0 if ry is None else ry)
    if tag == "rect":
        return box_outline(*size("x", "y", "width", "height"), rx, ry)
    if tag in ("circle", "ellipse"):
        return ellipse_outline(*size("cx", "cy"), *(size("r", "r") if tag == "circle" else (rx, ry)))
    v = size("x1", "y1", "x2", "y2") if tag == "line" else numbers(attributes.get("points"))
    outline = Outline()
    for k in range(0, len(v) - 1, 2):
        (outline.line if k else outline.move)(complex(v[k], v[k + 1]))
    if tag == "polygon" and outline.points:
        outline.close()
    return outline
