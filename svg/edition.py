"""The changed document: new values of the parameters written into a copy of its elements, all else unchanged."""
import copy
import re
import xml.etree.ElementTree as ET

import numpy as np

from svg.outline import GEOMETRY, length, matrix_text, transform
from svg.source import names_of
from svg.style import INHERITED, MASK_FRAME, OWN, Styles, declarations


def style_text(style):
    """{property: (value, important)} -> the text of a style attribute."""
    return ";".join(f"{name}:{value}" + " !important" * important for name, (value, important) in style.items())


def hexadecimal(rgb):
    return "#" + "".join(f"{round(255 * min(max(c, 0.0), 1.0)):02x}" for c in rgb.tolist())


def renamed_tag(element, name):
    """Another name with the prefix of an element."""
    prefix, colon, _ = element.tag.rpartition(":")
    return prefix + colon + name


class Edition:
    """A copy of a document's elements into which new values of the parameters are written."""

    def __init__(self, document, values, loaded):
        self.document, self.source, self.styles = document, copy.copy(document.source), document.styles
        self.values, self.loaded = values, loaded
        self.root = copy.deepcopy(self.source.root)
        self.twin = dict(zip(self.source.root.iter(), self.root.iter(), strict=True))         # element -> copy

    def styles_now(self):
        """The styles of the copy, after registering its names with the source."""
        self.source.names = {**self.source.names, **names_of(self.root)}
        return Styles(self.source, self.root)

    def changed(self, name, rows):
        return not np.array_equal(self.values[name][rows].astype(np.float32), self.loaded[name][rows])

    def write_outlines(self):
        data = {}
        for shape in self.document.shapes:
            rows = shape.rows
            if shape.element is None or not self.changed("points", rows):
                continue
            points = shape.local(self.values["points"])
            data[shape.element] = shape.outline.data(np.stack([points.real, points.imag], 1).tolist(),
                                                     12 if shape.origin else 7, shape.marked)
        renamed = {element for element in data if self.source.tag(element) != "path"}
        for element in renamed:
            self.twin[element].tag = renamed_tag(element, "path")
            for name in GEOMETRY:
                self.twin[element].attrib.pop(name, None)
        if self.styles.important or renamed and self.styles.rules:
            self.keep_styles(renamed)
        for (element, name), value in self.document.paints.settled.items():
            if element in data:
                self.write(element, name, value)
        for element, text in data.items():
            self.twin[element].set("d", text)
            if self.styles.rules or "d" in self.styles.of(element):
                now = self.styles_now().of(self.twin[element]) if self.styles.rules else {"d": ""}
                if "d" in now:
                    self.write(self.twin[element], "d", f'path("{text}")')

    def keep_styles(self, renamed):
        """Write the previous style into style="" where style sheets now give another one.

        A renamed element may lose rules (circle {}) or gain some (path {}), and so may elements around it
        (circle + rect {}, :first-of-type). !important is removed, as it would overrule what is written.
        """
        for element in self.source.elements:
            if self.source.tag(element) == "style":
                self.twin[element].text = re.sub(r"!\s*important", "", element.text or "", flags=re.I)
        self.hold({twin: self.styles.cascade(e) for e, twin in self.twin.items() if self.source.tag(e)},
                  {self.twin[element] for element in renamed})

    def hold(self, wanted, always=()):
        """Write {element: cascade} into style="" where style sheets give another one, and for `always`."""
        now = self.styles_now()
        for element, before in wanted.items():
            after = now.cascade(element)
            if element in always or before != after:
                gained = {name: value for name in after if name not in before
                          and (value := self.neutral(element, name)) is not None}
                element.set("style", style_text({name: (value, False) for name, value in {**before, **gained}.items()}))

    def neutral(self, element, name):
        """A value of a property that has the effect of not setting it; None if there is none."""
        if name in INHERITED:
            return "inherit"
        if name in OWN:
            return OWN[name]
        if name == "transform":
            own = element.get("transform")
            return matrix_text(transform(own), ",") if own else "none"
        return None if name in GEOMETRY else element.get(name, "unset")

    def write(self, element, name, value):
        """Set a property where it takes precedence: in style="", which overrules style sheets, or as an attribute."""
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
                # an rgba() colour was split into colour and opacity: write both
                paint = name.removesuffix("-opacity")
                if (row := slots.get(("colours", element, paint))) is not None:
                    self.write(element, paint, hexadecimal(values["colours"][row]))
                alpha = name if name == "opacity" else paint + "-opacity"
                if (row := slots.get(("opacities", element, alpha))) is not None:
                    self.write(element, alpha, f"{values['opacities'][row]:.5g}")

    def write_boxes(self):
        """Convert clip paths and masks in units of a box to user space where a shape in that box has changed."""
        changed = [key for key, (_, shapes) in self.document.boxes.items() if any(
            self.changed("points", s.rows) for s in shapes if s.element is not None)]
        if not changed:
            return
        users, later = [element for element, _ in self.document.boxes], []
        styles = self.styles_now()
        wanted = {e: styles.cascade(e) for e in self.root.iter() if self.source.tag(e)} if styles.rules else {}
        for element, user in changed:
            box, tag, twin = self.document.boxes[element, user][0], self.source.tag(element), self.twin[element]
            if users.count(element) > 1:  # make one for this user alone
                twin, original = copy.deepcopy(twin), twin
                wanted.update((new, wanted[old]) for old, new in
                              zip(original.iter(), twin.iter(), strict=True) if old in wanted)
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
                twin.attrib.update({name: f"{value:.9g}" for name, value in
                                    zip(MASK_FRAME, frame, strict=True)}, maskUnits="userSpaceOnUse")
            if element.get("maskContentUnits") == "objectBoundingBox":
                inner = ET.Element(renamed_tag(element, "g"), transform=matrix_text(box))
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
        """An unused id that begins with the given one."""
        taken = {element.get("id") for element in self.root.iter()}
        return next(f"{name}-{k}" for k in range(1, len(taken) + 2) if f"{name}-{k}" not in taken)

    def data(self):
        if not self.source.sized and self.changed("points", slice(None)):
            # the picture was sized by its content; keep that size
            for name in ("width", "height"):
                self.root.attrib.pop(name, None)
            self.root.set("viewBox", f"0 0 {self.source.width:.9g} {self.source.height:.9g}")
        if ":" not in self.root.tag:
            self.root.attrib.setdefault("xmlns", "http://www.w3.org/2000/svg")
        return ET.tostring(self.root, encoding="unicode").encode()
