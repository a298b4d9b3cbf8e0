"""SVG files: parsing, CSS, bad files, and the structure of what is saved."""
import gzip
import math
import os
import time
import warnings

import pytest
import torch
from conftest import darkness, svg_text

from bench.measure import peak_memory
from bench.svg import resvg_render
from image.figures import psnr
from svg.outline import SVGError
from svg.style import colour
from svg_raster import SVG


def test_prefixes_are_read_and_foreign_elements_ignored(tmp_path):
    path = tmp_path / "a.svg"
    path.write_text('<s:svg xmlns:s="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
                    '<s:rect width="4" height="8"/><path d="M0 0H8V8Z"/><x:rect width="8"/></s:svg>')
    assert darkness(SVG.load(path, size=8)) == pytest.approx(32)


def test_namespaces_are_resolved(tmp_path):
    path, saved = tmp_path / "a.svg", tmp_path / "saved.svg"
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg" xmlns:v="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
                    '<v:rect width="4" height="8" style="opacity:1"/><g xmlns="http://x.org/"><rect width="16" '
                    'height="16"/></g><y:g xmlns:y="http://www.w3.org/2000/svg"><y:circle cx="12" cy="8" r="3"/></y:g>'
                    '<v:defs xmlns:v="http://x.org/"/><v:style>circle{fill:#000}</v:style></svg>')
    svg = SVG.load(path, size=16)
    assert darkness(svg) == pytest.approx(32 + 9 * math.pi, rel=1e-2)
    with torch.no_grad():
        svg.points += 1
    svg.save(saved)
    text = saved.read_text()
    assert "<v:path" in text and "<y:path" in text and '<rect width="16" height="16"' in text
    assert psnr(svg.render(), SVG.load(saved, size=16).render()) > 60


def test_a_map_in_metres_is_drawn_and_saved_as_one_at_the_origin(load_svg, tmp_path):
    def body(x, y):
        return (f'<linearGradient id="g" gradientUnits="userSpaceOnUse" x1="{x}" y1="{y}" x2="{x + 32}" y2="{y}"><stop '
                'stop-color="red"/><stop offset="1" stop-color="blue"/></linearGradient><clipPath id="c"><circle '
                f'cx="{x + 14}" cy="{y + 15}" r="14"/></clipPath><g clip-path="url(#c)"><rect x="{x + 3}" y="{y + 4}" '
                f'width="25" height="20" fill="url(#g)"/><path d="M{x + 5} {y + 9}h20v3" stroke="#fff"/></g>')
    near, far = load_svg(body(0, 0)), load_svg(body(4_500_000, 5_600_000), 'viewBox="4500000 5600000 32 32"')
    assert torch.allclose(near.render(), far.render(), atol=2e-4)
    with torch.no_grad():
        far.points += torch.randn(far.points.shape, generator=torch.Generator().manual_seed(0)) / 3
    far.save(tmp_path / "saved.svg")
    assert psnr(far.render(), SVG.load(tmp_path / "saved.svg", size=32).render()) > 60
    with pytest.raises(SVGError, match="too large"):
        load_svg('<rect x="4500000" y="5600000" width="9" height="9"/>')


# ---- CSS

def colours_of(svg):
    """Colours of the layers as #rrggbb, in the order of drawing."""
    return ["#" + "".join(f"{round(255 * c):02x}" for c in svg.colours[layer.colour].tolist()) for layer in svg.layers]


BOXES = '<g id="g" class="k"><rect width="8" height="8"/><circle r="4"/><rect class="x" width="5" height="5"/></g>'


@pytest.mark.parametrize("sheet, colours", [
    ("g > rect{fill:red}", "r-r"), ("svg rect{fill:red}", "r-r"), ("svg > rect{fill:red}", "---"),
    ("rect + circle{fill:red}", "-r-"), ("rect ~ rect{fill:red}", "--r"), (".k .x, circle{fill:red}", "-rr"),
    ("rect:first-child{fill:red}", "r--"), ("rect:last-child{fill:red}", "--r"),
    ("rect:nth-of-type(2){fill:red}", "--r"),
    ("rect:not(.x){fill:red}", "r--"), ("[class='x']{fill:red}", "--r"), ("#g :nth-child(odd){fill:red}", "r-r"),
    ("rect:hover, circle:focus{fill:red}", "---"), ("rect::before{fill:red}", "---"), (":root{fill:red}", "rrr"),
    ("rect{fill:red} .x{fill:black}", "r--"), (".x{fill:red} rect{fill:black}", "--r"),
    ("rect{fill:red!important} .x{fill:black}", "r-r"), ("rect{FILL:Red}", "r-r"),
    ("rect{fill:black!important} .x{fill:red ! important}", "--r"),
    ("@media screen{rect{fill:red}}", "r-r"), ("@media print, (prefers-color-scheme:light){rect{fill:red}}", "r-r"),
    ("@media only screen and (prefers-color-scheme: light){rect{fill:red}}", "r-r"),
    ("@media (prefers-color-scheme: dark){rect{fill:red}}", "---"), ("@media print{rect{fill:red}}", "---"),
    ("@media (min-width: 9px){rect{fill:red}}", "---"), ("@supports (fill: red){rect{fill:red}}", "r-r"),
    ("@media all{@media print{rect{fill:red}} .x{fill:red}}", "--r"),
    ("@layer a{rect{fill:red} #g .x{fill:black}} @layer b{.x{fill:red}}", "r-r"),
    ("@layer b, a; @layer a{rect{fill:red}} @layer b{#g .x{fill:black}}", "r-r"),
    ("rect{fill:red} @layer a{#g rect{fill:black}}", "r-r"), ("@layer{rect{fill:black}} @layer{.x{fill:red}}", "--r"),
    ("@layer a{@layer b{#g rect{fill:black}} rect{fill:red}} @layer a.b{#g circle{fill:red}}", "rrr"),
    ("@layer a{rect{fill:red!important}} @layer b{rect{fill:black!important}} .x{fill:black!important}", "r-r"),
    ("@layer a{@media print{rect{fill:red}} @media screen{.x{fill:red}}}", "--r"),
    ("@import url(http://evil/a.css); @font-face{src:url(a.woff)} @keyframes a{to{fill:red}} .x{fill:red}", "--r")])
def test_style_sheet_applies(load_svg, sheet, colours):
    svg = load_svg(f"<style>{sheet.replace('>', '&gt;')}</style>{BOXES}")
    assert colours_of(svg) == [{"r": "#ff0000", "-": "#000000"}[c] for c in colours]


@pytest.mark.parametrize("attributes, colour", [
    ('fill="red" style="fill:blue"', "#0000ff"), ('style="fill:red!important;fill:blue"', "#ff0000"),
    ('class="important" style="fill:blue"', "#00ff00"), ('class="important" style="fill:blue!important"', "#0000ff"),
    ('class="plain" fill="red"', "#00ff00"), ('class="plain" style="fill:inherit"', "#ffa500"),
    ('style="fill:initial"', "#000000"), ('class="plain" style="fill:unset"', "#ffa500"),
    ('fill="red" style="fill:blue;fill:color(display-p3 1 0 0)"', "#0000ff"), ('fill="zzz"', "#ffa500"),
    ('fill="red" style="fill:color(display-p3 0 1 0)"', "#00ff00"), ('class="wide plain"', "#ff00ff"),
    ('style="fill:none;fill:color(display-p3 0 1 0)"', "#00ff00"),
    ('fill="008000"', "#ffa500"), ('fill="red" style="fill:rgb(1,2)"', "#ff0000"),
    ('fill="url(#none) zzz"', "#ffa500"), ('fill="url(#none) red"', "#ff0000"),
    ('color="red" fill="currentColor"', "#ff0000"), ('color="zzz" fill="currentColor"', "#008000")])
def test_the_right_declaration_wins(load_svg, attributes, colour):
    svg = load_svg("<style>.important{fill:lime!important} .plain{fill:lime} .wide{fill:color(a98-rgb 1 0 1)}</style>"
                   f'<g fill="orange" color="green"><rect width="9" height="9" {attributes}/></g>')
    assert colours_of(svg) == [colour]


def test_css_wide_keywords_apply_to_properties_that_are_not_inherited(load_svg):
    svg = load_svg('<g opacity=".5"><rect width="4" height="4" opacity="inherit"/>'
                   '<rect width="4" height="4" opacity=".1" style="opacity:initial"/></g>')
    assert sorted(svg.opacities.tolist()) == [0.5, 0.5, 1.0, 1.0]


GREEN = (0, 128 / 255, 0, 1)


@pytest.mark.parametrize("text, rgba", [
    ("rgb(255 0 0 / 50%)", (1, 0, 0, 0.5)), ("hsl(120deg 100% 25%)", (0, 0.5, 0, 1)), ("#0f08", (0, 1, 0, 8 / 15)),
    ("hsl(0.5turn 100% 50%)", (0, 1, 1, 1)), ("hwb(0 20% 20%)", (0.8, 0.2, 0.2, 1)),
    ("RebeccaPurple", (0.4, 0.2, 0.6, 1)),
    ("rgba(0,0,255,.25)", (0, 0, 1, 0.25)), ("rgb(300, -5, 0)", (1, 0, 0, 1)), ("transparent", (0, 0, 0, 0)),
    ("#Ff8000", (1, 128 / 255, 0, 1)), ("RGB( 51,300 , 0)", (0.2, 1, 0, 1)), ("#ff800", None), ("#ff80000", None),
    ("color(srgb .5 0 1)", (0.5, 0, 1, 1)), ("rgb(1e999 0 0)", (1, 0, 0, 1)), ("hsl(0 1e999% 50%)", None),
    # CSS's green in the other spaces, as the Web Platform Tests have it
    ("color(display-p3 0.21604 0.49418 0.13151)", GREEN), ("color(a98-rgb 0.281363 0.498012 0.116746)", GREEN),
    ("color(rec2020 0.235202 0.431704 0.085432)", GREEN), ("color(prophoto-rgb 0.230479 0.395789 0.129968)", GREEN),
    ("color(xyz 0.07719 0.15438 0.02573)", GREEN), ("color(srgb-linear 0 0.21586 0)", GREEN),
    ("lab(46.2775% -47.5621 48.5837)", GREEN), ("lch(46.2775% 67.9892 134.3912)", GREEN),
    ("oklab(51.975% -0.1403 0.10768)", GREEN), ("oklch(51.975% 0.17686 142.495)", GREEN),
    ("color(display-p3 1 1 1 / 40%)", (1, 1, 1, 0.4)), ("color(display-p3 0 1 0)", (0, 1, 0, 1)),
    ("color(prophoto-rgb 1e999 none -1)", (1, 0, 0, 1)), ("color(rec2020 1e300 0 0)", None),
    ("light-dark(rgb(0, 0, 255), red)", (0, 0, 1, 1)), ("light-dark(red)", None), ("light-dark(", None),
    ("color()", None), ("", None), ("none", None), ("ff0000", None), ("rgb(1,2)", None)])
def test_colours_are_css_color_4(text, rgba):
    assert colour(text) == (rgba and pytest.approx(rgba, abs=2e-4))


def said(caught):
    return [str(w.message).partition(".svg: ")[2] for w in caught]


@pytest.mark.parametrize("sheet, warned", [
    ("@import url(a.css);", "the CSS rule '@import url(a.css)' is not understood and left out"),
    ("@container (width > 1px){rect{fill:red}}",
     "the CSS rule '@container (width > 1px)' is not understood and left out"),
    ("@media (min-width: 9px){rect{fill:red}}",
     "the media query '(min-width: 9px)' is not understood and left out"),
    ("@media print, (prefers-color-scheme: dark){rect{fill:red}}", None),
    ("@font-face{} @keyframes a{} @charset 'x'; @page{} @-webkit-keyframes b{}", None),
    ("rect{animation:a 2s;animation-name:none}",
     "animation 'a 2s' is ignored: drawings are rendered as still pictures"),
    ("</style><set/><set/><style>", "the element '<set>' is ignored: drawings are rendered as still pictures"),
    ("rect{fill:lime;fill:color(display-p3 0 1 0)}",
     "fill 'color(display-p3 0 1 0)' is ignored in favour of the sRGB colour before it")])
def test_ignored_rules_of_a_sheet_warn(load_svg, sheet, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_svg(f"<style>{sheet.replace(' > ', ' &gt; ')}</style>" + '<rect width="9" height="9"/>')
    assert said(caught) == ([warned] if warned else [])


def test_values_that_are_not_understood_warn_once_per_kind(load_svg):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_svg("<style>a:nonsense{fill:red} b:nonsense{fill:red} rect{stroke:zzz}</style>"
                 + '<rect width="9" height="9" fill="yyy"/><rect width="9" height="9" fill="xxx"/>')
    assert said(caught) == [
                    "the CSS selector 'a:nonsense' is not understood and left out",
                    "fill 'yyy' is not understood and left out", "stroke 'zzz' is not understood and left out"]


@pytest.mark.parametrize("media, count", [("print", 0), ("screen", 1)])
def test_a_style_element_for_other_media_is_ignored(load_svg, media, count):
    svg = load_svg(f'<style media="{media}">rect{{fill:red}}</style><rect width="9" height="9"/>')
    assert colours_of(svg).count("#ff0000") == count


def test_many_elements_and_rules_are_matched_in_time(load_svg):
    sheet = "".join(f".c{k}{{fill:#{k % 1000:06d}}} g &gt; .c{k}{{stroke:red}}" for k in range(450))
    body = "".join(f'<g><path class="c{k % 450}" d="M0 0H1V1Z"/></g>' for k in range(1500))
    start = time.process_time()
    svg = load_svg(f"<style>{sheet}</style>{body}")
    assert len(svg.layers) == 3000 and time.process_time() - start < 4


@pytest.mark.parametrize("given, colour", [
    ('style="--a:red;fill:var(--a)"', "#ff0000"), ('fill="var(--b)"', "#0000ff"),
    ('style="fill:var(--B, teal)"', "#008080"),
    ('style="--x:var(--y);--y:var(--x);fill:lime;fill:var(--x)"', "#ffa500"),
    ('style="fill:rgb(var(--n) 0 0)"', "#ff0000"),
    ('style="fill:var(--none, var(--b))"', "#0000ff"), ('style="--b:;fill:var(--b)"', "#ffa500"),
    ('style="--b:initial;fill:var(--b, lime)"', "#00ff00"), ('style="--b:zzz;fill:var(--b)"', "#ffa500"),
    ('style="fill:/* a */red/**/"', "#ff0000"), ('style="/* fill:red */fill:lime"', "#00ff00"),
    ('style="fill:rgb(calc(2 * (100 + 27.5)) 0 0)"', "#ff0000"),
    ('style="fill:lime;fill:rgb(calc(1 / 0) 0 0)"', "#00ff00"),
    ('fill="oklch(0.628 0.2577 29.23)"', "#ff0000"), ('fill="lab(54.29 80.8 69.89)"', "#ff0000")])
def test_custom_properties_and_calc_are_evaluated(load_svg, given, colour):
    svg = load_svg("<style>:root{--b:blue;--n:255;--bomb:var(--b) var(--b)}</style>"
                   f'<g fill="orange"><rect width="9" height="9" {given}/></g>')
    assert colours_of(svg) == [colour]


def test_custom_properties_expand_within_bounds(load_svg):
    sheet = "".join(f"--a{k}:var(--a{k - 1}) var(--a{k - 1});" for k in range(1, 60))
    svg = load_svg(f'<style>:root{{--a0:red;{sheet}}}</style><rect width="9" height="9" fill="var(--a59)"/>')
    assert colours_of(svg) == ["#000000"]


@pytest.mark.parametrize("given", [
    'stroke-width="x"', 'style="stroke-width:-1"', 'style="stroke-linecap:x"', 'opacity="x"',
    'style="stroke-dasharray:1 x"',
    'style="stroke-linejoin:arcs"', 'style="r:30"', 'style="transform:rotate(45)"', 'style="d:x"', 'fill-rule="x"',
    'style="clip-path:x"', 'style="transform-origin:x"', 'style="transform:skew(1e999)"', 'visibility="x"'])
def test_other_invalid_declarations_are_dropped(load_svg, given):
    with pytest.warns(UserWarning, match="not understood"):
        svg = load_svg(f'<circle cx="9" cy="9" r="5" stroke="red" {given}/>')
    plain = load_svg('<circle cx="9" cy="9" r="5" stroke="red"/>')
    assert torch.equal(svg.render(), plain.render())


@pytest.mark.parametrize("condition, colour", [
    ("(fill: red)", "r"), ("not (fill: red)", "-"), ("(fill: zzz)", "-"), ("(fill: zzz) or (color: red)", "r"),
    ("(fill: zzz) and (color: red)", "-"), ("((fill: red))", "r"), ("selector(a > b)", "r"), ("zzz", "-")])
def test_supports_conditions_are_evaluated(load_svg, condition, colour):
    condition = condition.replace(">", "&gt;")
    svg = load_svg(f'<style>@supports {condition}{{rect{{fill:red}}}}</style><rect width="9" height="9"/>')
    assert colours_of(svg) == [{"r": "#ff0000", "-": "#000000"}[colour]]


SAME = {                                  # pairs of bodies that look the same
    "CSS cx, cy, r": ('<style>circle{r:30%;cx:16px;cy:1em}</style><circle/>',
                      f'<circle cx="16" cy="16" r="{0.3 * 32}"/>'),
    "CSS x, width, rx": ('<style>rect{x:2px;rx:4px}</style><rect y="3" width="20" style="height:9px"/>',
                         '<rect x="2" y="3" width="20" height="9" rx="4"/>'),
    "CSS d": ("""<path style="d:path('M0 0H9V9Z')"/>""", '<path d="M0 0H9V9Z"/>'),
    "CSS transform": ('<rect width="9" height="9" transform="scale(9)" style="transform:translate(8px, 25%) '
                      'rotate(.125turn)"/>',
                      '<rect width="9" height="9" transform="translate(8 8) rotate(45)"/>'),
    "a stroke that does not scale where nothing scales": (
        '<path d="M5 5L20 9" transform="rotate(20) translate(3)" stroke="red" vector-effect="non-scaling-stroke"/>',
        '<path d="M5 5L20 9" transform="rotate(20) translate(3)" stroke="red"/>'),
    "plane transforms in space": (
        '<g style="transform:translate3d(2px, 1px, 0px) translateZ(0) rotateX(0deg)"><rect width="9" height="9" '
        'style="transform:scale3d(2, 1, 1) rotate3d(0, 0, 1, 45deg)"/></g><rect width="5" height="5" '
        'style="transform:matrix3d(1, 0, 0, 0, .5, 1, 0, 0, 0, 0, 1, 0, 9, 20, 0, 1)"/>',
        '<g transform="translate(2 1)"><rect width="9" height="9" transform="scale(2 1) rotate(45)"/></g>'
        '<rect width="5" height="5" transform="matrix(1 0 .5 1 9 20)"/>'),
    "a class a colour": (
        "<style>" + "".join(f".c{k}{{fill:#{k:06x}}}" for k in range(1500)) + '</style><rect class="c1400" width="9" '
        'height="9"/>', '<rect fill="#000578" width="9" height="9"/>'),
    "transform-origin": ('<style>.a{transform:rotate(45deg);transform-origin:center 50%}</style>'
                         '<rect class="a" x="9" y="9" width="9" height="5"/>',
                         '<rect x="9" y="9" width="9" height="5" transform="rotate(45 16 16)"/>'),
    "transform-origin as an attribute": (
        '<rect x="9" y="9" width="9" height="5" transform="rotate(45)" transform-origin="9 9"/>',
        '<rect x="9" y="9" width="9" height="5" transform="rotate(45 9 9)"/>'),
    "switch": ('<switch><foreignObject requiredExtensions="http://ns.adobe.com/"/><g systemLanguage="de"><rect '
               'width="5" '
               'height="5"/></g><g systemLanguage="fr, en-GB"><rect width="9" height="9"/></g><circle r="9"/></switch>',
               '<rect width="9" height="9"/>'),
    "conditions outside of switch": ('<rect width="9" height="9" requiredExtensions="x"/><circle r="4"/>',
                                     '<circle r="4"/>'),
    "empty and hidden text": ('<text x="3"/><text display="none">a</text><g '
                              'visibility="hidden"><text>a</text></g><text>'
                              '<tspan/></text><image width="0" href="a.png"/><rect width="9" height="9"/>',
                              '<rect width="9" height="9"/>'),
    "an arc after Z": ('<path d="M6 16h6v6zA10 10 0 0 1 26 16z"/>', '<path d="M6 16h6v6zM6 16A10 10 0 0 1 26 16z"/>'),
    "rx=0": ('<rect x="3" y="3" width="20" height="20" rx="0" ry="9"/>', '<rect x="3" y="3" width="20" height="20"/>'),
    "a tiny rx": ('<rect x="3" y="3" width="20" height="20" rx="1e-300"/>',
                  '<rect x="3" y="3" width="20" height="20"/>'),
    "a negative rx": ('<rect x="3" y="3" width="20" height="20" rx="-1" ry="4"/>',
                      '<rect x="3" y="3" width="20" height="20" rx="4" ry="4"/>'),
    "an ellipse of one radius": ('<ellipse cx="9" cy="9" ry="5" rx="auto"/>', '<circle cx="9" cy="9" r="5"/>'),
    "a dashed circle that starts in a gap": (
        '<path d="M26 16A10 10 0 0 1 6 16A10 10 0 0 1 26 16Z" fill="none" stroke="red" stroke-dasharray="8 10" '
        'stroke-dashoffset="9"/>', '<path d="M26 16A10 10 0 0 1 6 16A10 10 0 0 1 26 16" fill="none" stroke="red" '
        'stroke-dasharray="8 10" stroke-dashoffset="9"/>'),
    "per cent in a nested svg": ('<svg x="4" y="4" width="20" height="16"><rect width="50%" height="50%"/></svg>',
                                 '<rect x="4" y="4" width="10" height="8"/>'),
    "em": ('<g font-size="4"><rect width="2em" height="1ex" style="font-size:150%"/></g>',
           '<rect width="12" height="3"/>'),
    "units of dashes": ('<path d="M0 9H32" stroke="red" stroke-dasharray="4px .2em"/>',
                        '<path d="M0 9H32" stroke="red" stroke-dasharray="4 3.2"/>'),
    "symbol": ('<symbol id="s" viewBox="0 0 9 9" opacity=".4" transform="translate(3)" fill="red"><rect width="9" '
               'height="9"/>'
               '</symbol><use href="#s" width="18" height="18"/>',
               '<rect x="3" width="18" height="18" fill="red" opacity=".4"/>'),
    "currentColor of a stop": (
        '<g color="red"><linearGradient id="g"><stop stop-color="currentColor"/><stop offset="1"/></linearGradient></g>'
        '<rect width="9" height="9" fill="url(#g)"/>',
        '<linearGradient id="g"><stop stop-color="red"/><stop offset="1"/></linearGradient><rect width="9" height="9" '
        'fill="url(#g)"/>'),
    "currentColor by use": ('<defs><rect id="a" width="9" height="9" fill="currentColor"/></defs><use href="#a" '
                            'color="red"/>'
                            '<use href="#a" x="9" color="lime"/>',
                            '<rect width="9" height="9" fill="red"/><rect x="9" width="9" height="9" fill="lime"/>'),
    "a gradient on a box of no area": ('<linearGradient id="g"><stop/><stop offset="1"/></linearGradient><path d="M0 '
                                       '9H9" '
                                       'stroke="url(#g)"/><path d="M0 15H9" stroke="url(#g) red"/>',
                                       '<path d="M0 15H9" stroke="red"/>'),
    "references to nothing": ('<rect width="9" height="9" fill="url(#no) red" mask="url(#no)" filter="url(#no)" '
                              'clip-path="url(#no)"/><use href="#no"/>', '<rect width="9" height="9" fill="red"/>'),
    "a g in a clip path": ('<clipPath id="c"><g><rect width="5" height="5"/></g></clipPath><rect width="9" height="9" '
                           'clip-path="url(#c)"/>', ""),
    "a group's box": ('<clipPath id="c" clipPathUnits="objectBoundingBox"><rect width=".5" height="1"/></clipPath>'
                      '<g clip-path="url(#c)"><rect width="4" height="20"/><circle cx="10" cy="9" r="10" fill="none"/>'
                      '<rect x="4" width="16" height="9"/></g>',
                      '<rect width="4" height="20"/><rect x="4" width="6" height="9"/>'),
    "many stops": ('<linearGradient id="g"><stop stop-color="red"/>' + "".join(
        f'<stop offset="{k / 40}" stop-color="rgb({255 - 6.375 * k},0,{6.375 * k})"/>' for k in range(41))
        + '</linearGradient><rect width="32" height="32" fill="url(#g)"/>',
        '<linearGradient id="g"><stop stop-color="red"/><stop offset="1" stop-color="blue"/></linearGradient><rect '
        'width="32" '
        'height="32" fill="url(#g)"/>'),
    "a mask's own style": ('<g fill="red"><mask id="m" style="mask-type:alpha"><rect width="9" height="9" '
                           'opacity=".5"/></mask>'
                           '</g><rect width="20" height="20" mask="url(#m)"/>',
                           '<rect width="9" height="9" opacity=".5"/>'),
    "older names of properties": (
        '<rect width="9" height="9" style="-webkit-transform:translate(5px, 3px);-webkit-opacity:.4"/>',
        '<rect x="5" y="3" width="9" height="9" opacity=".4"/>'),
    "href before xlink:href": ('<defs><circle id="c" r="9"/><rect id="r" width="9" height="9"/></defs><use '
                               'xlink:href="#c" href="#r"/>', '<rect width="9" height="9"/>'),
    "a white background": ("<style>:root{background:#fff;background-image:none}</style><circle r='9'/>",
                           "<circle r='9'/>"),
    "pathLength without dashes": ('<path d="M0 9H9" stroke="red" pathLength="1"/>', '<path d="M0 9H9" stroke="red"/>'),
    "a use that has shrunk to nothing, and another": (
        '<defs><circle id="c" cx="9" cy="9" r="5"/></defs><use href="#c" transform="scale(0)"/><use href="#c"/>',
        '<circle cx="9" cy="9" r="5"/>'),
    "a clip path of nothing, and of something": (
        '<clipPath id="c" clipPathUnits="objectBoundingBox"><circle cx=".5" cy=".5" r=".5"/></clipPath>'
        '<g clip-path="url(#c)"/><rect width="18" height="18" clip-path="url(#c)"/>', '<circle cx="9" cy="9" r="9"/>'),
    "units that are the same everywhere": (
        '<defs><rect id="r" width="1in" height="9px"/></defs><svg width="9" height="5"><use href="#r"/></svg>'
        '<g font-size="3"><use y="20" href="#r"/></g>',
        '<rect width="9" height="5"/><rect y="20" width="96" height="9"/>'),
    "no box, no mask": ('<mask id="m"><rect width="9" height="9" fill="#fff"/></mask><path d="M0 5H9" stroke="red" '
                        'mask="url(#m)"/>', ""),
}


@pytest.mark.parametrize("name", SAME)
def test_equivalent_bodies_look_the_same(load_svg, name):
    first, second = (load_svg(body).render() for body in SAME[name])
    assert psnr(first, second) > 50


@pytest.mark.parametrize("root, body", [
    ('opacity=".4"', '<rect width="32" height="32" opacity=".4"/>'), ('display="none"', ""),
    ('clip-path="url(#c)"', '<rect width="9" height="9"/>'), ('mask="url(#m)"', '<rect width="9" height="9"/>'),
    ('transform="translate(5 3)"', '<rect x="5" y="3" width="32" height="32"/>')])
def test_properties_of_the_root_are_applied(load_svg, root, body):
    svg = load_svg('<clipPath id="c"><rect width="9" height="9"/></clipPath><mask id="m"><rect width="9" height="9" '
                   'fill="#fff"/>'
                   '</mask><rect width="32" height="32"/>', f'viewBox="0 0 32 32" {root}')
    assert psnr(svg.render(), load_svg(body).render()) > 60


@pytest.mark.parametrize("attributes, size", [
    ("", (20, 30)), ('width="50%"', (20, 30)), ('viewBox="0 0 40 10" height="5"', (20, 5)),
    ('width="2in" height="10mm"', (192, 960 / 25.4)), ('style="width:20px;height:5px"', (20, 5))])
def test_the_size_of_the_picture_is_that_of_the_file(load_svg, tmp_path, attributes, size):
    svg = load_svg('<rect x="5" y="10" width="15" height="20"/>', attributes)
    source = svg.document.source
    assert (source.width, source.height) == pytest.approx(size)
    with torch.no_grad():
        svg.points -= 3
    svg.save(tmp_path / "saved.svg")
    assert psnr(svg.render(), SVG.load(tmp_path / "saved.svg", size=32).render()) > 60


def test_svgz_and_entities_are_read(load_svg, tmp_path):
    plain = load_svg('<rect width="9" height="5" fill="red"/>')
    path = tmp_path / "a.svgz"
    path.write_bytes(gzip.compress(b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://none/svg11.dtd" '
                                   b'[<!ENTITY ns "http:'
                                   b'//www.w3.org/2000/svg"><!ENTITY five "5">]>' + svg_text(
                                       '<rect width="9" height="&five;" fill="red"/>').replace(
                                           "http://www.w3.org/2000/svg", "&ns;").encode()))
    for _ in range(2):                    # the original and the saved file
        svg = SVG.load(path, size=32)
        assert torch.equal(svg.render(), plain.render())
        svg.save(path)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    path.write_bytes(gzip.compress(b" " * (40 << 20)))
    with pytest.raises(SVGError, match="larger than 32 MiB"):
        SVG.load(path)
    path.write_bytes(gzip.compress(b"<svg/>")[:2] + b"zzzz")
    with pytest.raises(SVGError, match="cannot be read"):
        SVG.load(path)


def test_devices_pipes_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.svg")
    for path in ("/dev/zero", tmp_path / "pipe.svg", tmp_path):
        with pytest.raises(SVGError, match="not a regular file"):
            SVG.load(path)


HARD = {                                  # bodies for which quadratic time would take too long
    "length": f'<rect width="{"1" * 3000}x" height="9"/>',
    "urls": f'<rect width="9" height="9" fill="{"url(" * 20_000}"/>',
    "spaces": f'<rect width="1{" " * 50_000}x" height="9" style="fill:{" " * 50_000}x" transform="{"a " * 50_000}"/>',
    "number": f'<path d="M0 0L{"1" * 100_000}x"/>', "empty uses": '<g id="a"/>' + '<use href="#a"/>' * 20_000,
    "styles": "".join(f'<g style="fill:#{k:06d};stroke-width:{k}"/>' for k in range(20_000)),
    "stops": '<linearGradient id="g">' + "".join(
        f'<stop offset="{k / 2500}" stop-color="#{k:06d}"/>' for k in range(2500))
        + '</linearGradient><rect width="32" height="32" fill="url(#g)"/>'}


@pytest.mark.parametrize("name", HARD)
def test_hard_files_take_bounded_time_and_memory(load_svg, name):
    def draw():
        load_svg(HARD[name], size=256).render()
    start = time.process_time()
    memory = peak_memory(draw)
    assert time.process_time() - start < 5 and memory < 512


def test_too_many_involved_values_are_refused(load_svg, monkeypatch):
    monkeypatch.setattr("svg.style.MAX_INVOLVED", 20)
    plain = "".join(f'<g fill="#{k:06}" style="stroke:rgb({k}, 2,3);stroke-width:{k}.5px" clip-path="url(#a{k})"/>'
                    for k in range(50))
    load_svg(plain + "".join(f'<g fill="hsl({k % 20} 1% 1%)"/>' for k in range(50)))
    with pytest.raises(SVGError, match="more than 20 different values of style that are not plain words or numbers"):
        load_svg("".join(f'<g fill="hsl({k} 1% 1%)"/>' for k in range(21)))


# ---- saving

def test_save_keeps_the_structure(load_svg, tmp_path):
    svg = load_svg('<!-- note --><g id="g" class="k" fill="red"><circle id="c" class="big" cx="9" cy="9" '
                   'r="5" transform="rotate(5)" data-x="1"/><path id="p" d="M1 1L5 5L9 1"/></g>'
                   '<title>t</title>')
    path = tmp_path / "saved.svg"
    with torch.no_grad():
        svg.points[:12] += 1.5            # only the circle
        svg.colours[1] = torch.tensor([0.0, 0.0, 1.0])
    svg.save(path)
    text = path.read_text()
    assert '<path id="c" class="big" transform="rotate(5)" data-x="1" d="M' in text and "<circle" not in text
    assert '<path id="p" d="M1 1L5 5L9 1" fill="#0000ff"' in text
    for kept in ('<g id="g" class="k" fill="red">', "<!-- note -->", "<title>t</title>"):
        assert kept in text


def test_shapes_shared_by_use_stay_shared(load_svg, tmp_path):
    svg = load_svg('<defs><path id="p" d="M0 0H8V8H0Z"/></defs><use href="#p"/>'
                   '<use href="#p" x="16" fill="red"/>')
    assert len(svg.points) == 4 and len(svg.colours) == 2
    with torch.no_grad():
        svg.points[2] += 4
        svg.colours[0] = torch.tensor([0.0, 1.0, 0.0])
    svg.save(tmp_path / "saved.svg")
    again = SVG.load(tmp_path / "saved.svg", size=32)
    assert torch.allclose(again.render(), svg.render(), atol=1e-5)


@pytest.mark.parametrize("sheet", [
    "path{display:none}", "path{fill:red;stroke:blue!important;opacity:.3}", "circle{fill:red!important}",
    "circle + rect{fill:red}", "rect:first-of-type{fill:blue} circle:first-of-type{stroke:lime;stroke-width:3}",
    "path{transform:rotate(30deg)}", "path{fill:lime} .x{fill:inherit}", "path{clip-path:url(#c);visibility:hidden}"])
@pytest.mark.parametrize("attributes", ["", 'class="x" transform="translate(3 2)" style="stroke:teal!important"'])
def test_a_saved_file_renders_the_same_under_its_style_sheet(load_svg, tmp_path, sheet, attributes):
    svg = load_svg(f'<style>{sheet}</style><clipPath id="c"><path d="M0 0H9V9Z"/></clipPath>'
                   f'<g fill="orange" stroke="none"><circle cx="12" cy="12" r="7" {attributes}/>'
                   '<rect x="14" y="14" width="12" height="9"/></g>')
    with torch.no_grad():
        svg.points[:12] += 1              # the circle becomes a <path>
        svg.colours[0] = torch.tensor([0.2, 0.4, 0.6])
        svg.opacities[0] = 0.8
    svg.save(tmp_path / "saved.svg")
    text = (tmp_path / "saved.svg").read_text()
    assert "<circle" not in text and f"<style>{sheet.replace('!important', '')}</style>" in text
    assert psnr(svg.render(), SVG.load(tmp_path / "saved.svg", size=32).render()) > 60
    own = svg.render(size=256)[0].permute(1, 2, 0).detach().double().numpy()
    assert "of-type" in sheet or psnr(own, resvg_render(text, 256, 4)) > 40       # resvg does not support these


@pytest.mark.parametrize("resource, user", [
    ('<clipPath id="c" clipPathUnits="objectBoundingBox"><circle cx=".5" cy=".5" r=".5"/></clipPath>', "clip-path"),
    ('<clipPath id="c" clipPathUnits="objectBoundingBox" style="transform:rotate(9deg)"><circle cx=".5" cy=".5" '
     'r=".5"/></clipPath>', "clip-path"),
    ('<mask id="c" maskContentUnits="objectBoundingBox"><circle cx=".5" cy=".5" r=".5" fill="#ccc"/></mask>', "mask"),
    ('<mask id="c" x=".2" y="0" width=".5" height="1"><circle cx="12" cy="12" r="30" fill="#fff"/></mask>', "mask")])
@pytest.mark.parametrize("sheet", ["", "<style>g, circle{fill:red;opacity:.9} #c &gt; circle{fill:#fff}</style>"])
def test_clips_and_masks_in_box_units_are_saved_as_drawn(load_svg, tmp_path, resource, user, sheet):
    svg = load_svg(f'{sheet}{resource}<g {user}="url(#c)"><rect width="20" height="12"/><rect y="8" width="9" '
                   f'height="9"/></g><rect x="20" y="20" width="9" height="9" {user}="url(#c)"/>')
    svg.save(tmp_path / "saved.svg")
    assert "userSpaceOnUse" not in (tmp_path / "saved.svg").read_text()           # saved without a change
    with torch.no_grad():
        svg.points += torch.randn(svg.points.shape, generator=torch.Generator().manual_seed(0))
    svg.save(tmp_path / "saved.svg")
    assert psnr(svg.render(), SVG.load(tmp_path / "saved.svg", size=32).render()) > 50


# ---- bad input

LOWER = {"outline.MAX_POINTS": 5000, "document.MAX_SHAPES": 3000, "document.MAX_VISITS": 15_000,
         "style.MAX_STEPS": 1_000_000, "style.MAX_RULES": 2000, "markers.MAX_MARKERS": 50,
         "patterns.MAX_ALL_TILES": 500}   # cheap to exceed
BAD_FILES = {
    "no element found": "",
    "not well-formed XML": "<svg",
    "is a Git LFS pointer, not the file itself: run git lfs pull": "version https://git-lfs.github.com/spec/v1\noid",
    "the root element is <html>": "<html/>",
    "entity declarations": '<!DOCTYPE s [<!ENTITY a "aaa"><!ENTITY b "&a;&a;">]>' + svg_text("&b;"),
    "entity declarations (<!ENTITY>) that expand": '<!DOCTYPE s [<!ENTITY a "' + "a" * 9000 + '">]>' + svg_text(
        "&a;" * 200),
    "entity declarations ": '<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + svg_text("&a;"),
    "more than 100000 elements": svg_text("<g/>" * 100_001),
    "nested deeper than 200": svg_text("<g>" * 300 + "</g>" * 300),
    "more than 1e+06 px away": svg_text('<path d="M0 0L1e30 5L5 5Z"/>'),
    "not finite or lie": svg_text('<path d="M0 0L1e999 5L5 5Z"/>'),
    "'#b' refers to itself": svg_text('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>'),
    "gradient '#a' refers to itself": svg_text('<linearGradient id="a" href="#a"/><rect width="9" height="9" '
                                               'fill="url(#a)"/>'),
    "more than 3000 references": svg_text('<g id="a0"/>' + "".join(
        f'<g id="a{k + 1}">' + f'<use href="#a{k}"/>' * 10 + "</g>" for k in range(9)) + '<use href="#a9"/>'),
    "external reference 'http://evil/x.svg#a'": svg_text('<use href="http://evil/x.svg#a"/>'),
    "external reference 'file:///etc/x#a'": svg_text('<circle r="9" fill="url(file:///etc/x#a)"/>'),
    "<text> is not supported": svg_text("<text>hi</text>"),
    "<feTile> in a filter on <g> is not supported": svg_text('<filter id="f"><feTile/></filter><g filter="url(#f)">'
                                                             '<rect width="9" height="9"/></g>'),
    "mask 'url(#a), url(#b)' on <rect>": svg_text('<rect style="mask:url(#a), url(#b)" width="5" height="5"/>'),
    "wider than 1e+06 px": svg_text('<path d="M0 0H9" stroke="red" stroke-width="1e999"/>'),
    "more than 2000 style sheet rules": svg_text(f"<style>{'a{}' * 2001}</style>"),
    "a meshgradient as fill on <rect>": svg_text('<meshgradient id="m"/><rect width="9" height="9" '
                                                 'fill="url(#m)"/>'),
    "take too long to match": svg_text("<style>.x g g g g g *{fill:red}</style>" + "<g>" * 150 + "</g>" * 150),
    "more than 8 MiB of style sheets": svg_text(f"<style>{'a' * 8_400_000}</style>"),
    "styles are nested too deeply": svg_text(f'<g style="fill:{"(" * 10_000}"/>'),
    "has too many dashes": svg_text('<path d="M0 0H32" stroke="red" stroke-dasharray="1e-7"/>'),
    "a picture of 0 x 0": svg_text("<g/>", 'width="0" height="0"'),
    "cannot be drawn": svg_text("<g/>", 'viewBox="0 0 1e-320 1e-320"'),
    "more than 15000 elements to visit": svg_text(f'<g id="a">{"<g/>" * 150}</g>' + '<use href="#a"/>' * 200),
    "drawing has too many dashes": svg_text('<path d="M0 0H32" stroke="red" stroke-dasharray=".005"/>' * 60),
    "more than 5000 points": svg_text(f'<path d="M0 0{"1 2 " * 5001}"/>'),
    "a stroke is wider than 1e+06 px": svg_text('<path d="M0 0C1e-5 1e-5 5 5 9 9" stroke="red" stroke-width="116" '
                                                'transform="scale(1e-5 1)"/>', 'viewBox="0 0 1.4e-4 1.4e-4"'),
    "'#c' refers to itself": svg_text(
        '<clipPath id="c" clipPathUnits="objectBoundingBox"><rect width="1" height="1" clip-path="url(#c)"/></clipPath>'
        '<rect width="9" height="9" clip-path="url(#c)"/>'),
    "gradient '#g' is not finite or too large": svg_text(
        '<radialGradient id="g" gradientTransform="matrix(1e-29 0 0 10 0 0)"><stop/><stop offset="1"/></radialGradient>'
        '<rect width="9" height="9" fill="url(#g)"/>'),
    "vector-effect on <path>": svg_text('<path d="M0 0H9" stroke="red" vector-effect="non-scaling-stroke" '
                                        'transform="scale(2)"/>'),
    "vector-effect on <rect>": svg_text('<rect width="9" height="9" stroke="red" vector-effect="fixed-position"/>'),
    "clip-path 'circle(9px)' on <rect>": svg_text('<rect width="9" height="9" style="clip-path:circle(9px)"/>'),
    "mix-blend-mode plus-lighter on <g>": svg_text('<g style="mix-blend-mode:plus-lighter"/>'),
    "pattern stroke on <rect> of more than 1000 tiles": svg_text(
        '<pattern id="p" patternUnits="userSpaceOnUse" width=".1" height=".1"><path d="M0 0H9"/></pattern>'
        '<rect width="9" height="9" fill="none" stroke="url(#p)"/>'),
    "more than 500 tiles of patterns to draw": svg_text(
        '<pattern id="p" width=".05" height=".05"><path d="M0 0H9"/></pattern>' + '<circle r="9" fill="url(#p)"/>' * 2),
    "more than 50 markers to draw": svg_text(f'<marker id="m"><path d="M0 0H9"/></marker><path d="M0 0{"h1v1" * 30}" '
                                             'marker-mid="url(#m)"/>'),
    "transform translate3d() on <g>": svg_text('<g style="transform:translate3d(0, 0, 9px)"/>'),
    "transform matrix3d() on <g>": svg_text('<g style="transform:matrix3d(1,0,0,0,0,1,0,0,0,0,1,0,9,2,0,2)"/>'),
    "transform rotate3d() on <g>": svg_text('<g style="transform:rotate3d(1, 1, 1, 9deg)"><rect width="9"/></g>'),
    "transform-box fill-box on <rect>": svg_text('<rect width="9" height="9" style="transform-box:fill-box;'
                                                 'transform-origin:center;transform:rotate(9deg)"/>'),
    "more than 2000 cascade layers": svg_text(f"<style>@layer {','.join(f'a{k}' for k in range(2001))};</style>"),
    "pathLength with dashes on <path>": svg_text('<path d="M0 9H9" stroke="red" pathLength="1" '
                                                 'stroke-dasharray=".1"/>'),
    "background '#123' on <svg>": svg_text("<g/>", 'viewBox="0 0 9 9" style="background:#123"'),
    "background-image 'linear-gradient(red, blue)' on": svg_text(
        "<style>svg{background-image:linear-gradient(red, blue)}</style>"),
    "external style sheet of <?xml-stylesheet href": '<?xml-stylesheet href="a.css"?>' + svg_text("<g/>"),
    "fr on <radialGradient>": svg_text('<radialGradient id="g" fr=".1"><stop/></radialGradient><rect width="9" '
                                       'height="9" fill="url(#g)"/>'),
    "color-interpolation on <mask>": svg_text('<mask id="m" color-interpolation="linearRGB"/><rect width="9" '
                                              'height="9" mask="url(#m)"/>'),
    "<foreignObject> is not supported": svg_text("<foreignObject><p/></foreignObject>"),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path, message, monkeypatch):
    for name, value in LOWER.items():
        monkeypatch.setattr(f"svg.{name}", value)
    path = tmp_path / "bad.svg"
    path.write_text(BAD_FILES[message])
    with pytest.raises(SVGError) as caught:
        SVG.load(path, size=32).render()
    text = str(caught.value)
    assert message.strip() in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize("body", [
    '<path d="M5 5L5 5Z" stroke="red"/><path d="M5 5C5 5 5 5 5 5" stroke="red"/><circle r="0"/><line/>'
    '<polyline points="1"/><path d=""/><path/><path d="M1"/><path d="L5 5"/><rect width="-5" height="5"/>',
    '<path d="MNaN 0L10 nan Z"/><rect width="nan" height="inf"/><rect width="9abc" height="9" fill="what"/>',
    '<rect width="9" height="9" transform="scale(0)"/><rect width="9" height="9" transform="scale(1 0)"/>',
    '<path d="M0 0L1e5 1e5L0 50Z"/><circle cx="50" cy="50" r="5e5" fill="none" stroke="red"/>',
    '<linearGradient id="a"/><circle r="9" fill="url(#a)"/><circle r="9" fill="url(#b)"/>',
    '<radialGradient id="a" cx="1e300" r="1e-300"><stop stop-color="red"/><stop offset="1"/></radialGradient>'
    '<rect width="9" height="9" fill="url(#a)"/>',
    '<g opacity=".5"><g transform="translate(500 0)"><circle r="5"/><rect width="5" height="5"/></g></g>'
    '<clipPath id="e"/><g clip-path="url(#e)"><rect width="9" height="9"/></g>',
    '<g transform="scale(0)"><svg width="9" height="9"><circle r="5"/></svg></g>',
    '<g style="transform:skew(1e999deg) rotate(-1e999rad)"><rect width="9" height="9"/></g>',
    '<g transform="rotate(1e999) skewX(60)"><path d="M1 1A1e999 1e999 0 0 1 9 9A1e-300 1 0 0 1 5 5Z"/></g>',
    '<linearGradient id="a" x1="" gradientUnits=""><stop color="\\1" stop-color="currentColor"/>'
    '</linearGradient><circle r="9" fill="url(#a)"/>',
    '<style>}}{{a{b:c;}} .x{fill:red @import url("http://evil/a.css"); *{stroke:red}</style><rect width="5" '
    'height="5"/>'])
def test_degenerate_files_render_and_have_finite_gradients(load_svg, tmp_path, body):
    svg = load_svg(body)
    image = svg.render()
    assert torch.isfinite(image).all()
    if image.requires_grad:
        image.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in svg.parameters() if p.grad is not None)
    svg.save(tmp_path / "saved.svg")


def test_a_stroke_a_million_pixels_wide_is_drawn(load_svg):
    svg = load_svg('<path d="M-50 0C9 9 20 9 82 30" stroke="red" stroke-width="9e5" stroke-linejoin="round"/>')
    assert svg.render(size=128)[0, 1].max() < 1e-5


def test_too_many_layers_are_refused_before_drawing(load_svg, monkeypatch):
    monkeypatch.setattr("svg_raster.MAX_FLOATS", 6 * 30 * 65 ** 2)
    svg = load_svg('<rect width="32" height="32"/>' * 30, size=64)
    with pytest.raises(SVGError, match="its 30 layers cover too many pixels at 64 px"):
        svg.render()
    with torch.no_grad():                 # needs less memory
        svg.render()


def test_skip_unsupported_drops_elements_with_a_warning(load_svg):
    body = '<filter id="f"><feTile/></filter><text>hi</text><g filter="url(#f)"><rect width="8" height="8"/></g>'
    skipped = pytest.warns(UserWarning, match="<feTile> in a filter")
    with skipped, pytest.warns(UserWarning, match="<text> is not supported"):
        svg = load_svg(body, skip_unsupported=True)
    assert darkness(svg) == pytest.approx(64) and svg.document.skipped == ["<text>", "<feTile> in a filter on <g>"]


def test_a_failed_save_keeps_the_old_file(load_svg, tmp_path):
    svg, path = load_svg('<rect width="5" height="5"/>'), tmp_path / "kept.svg"
    path.write_text("before")
    with torch.no_grad():
        svg.points[0, 0] = math.nan
    with pytest.raises(SVGError, match="points or stroke widths are not finite"):
        svg.render()
    with pytest.raises(SVGError, match="not finite"):
        svg.save(path)
    with pytest.raises(SVGError, match="cannot be written"):
        load_svg('<rect width="5" height="5"/>').save(tmp_path / "missing" / "a.svg")
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawing.svg", "kept.svg"]
