"""SVG files: parsing, CSS, bad files, and the structure of what is saved."""
import math
import time
import warnings

import pytest
import torch
from bench.svg import resvg_render
from conftest import darkness, svg_text
from report import psnr
from svg_document import colour
from svg_raster import SVG, SVGError


def test_prefixed_and_foreign_elements(tmp_path):
    path = tmp_path / "a.svg"
    path.write_text('<s:svg xmlns:s="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
                    '<s:rect width="4" height="8"/><path d="M0 0H8V8Z"/><x:rect width="8"/></s:svg>')
    assert darkness(SVG.load(path, size=8)) == pytest.approx(32)


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
    ('fill="008000"', "#ffa500"), ('fill="red" style="fill:rgb(1,2)"', "#ff0000"),
    ('fill="url(#none) zzz"', "#ffa500"), ('fill="url(#none) red"', "#ff0000"),
    ('color="red" fill="currentColor"', "#ff0000"), ('color="zzz" fill="currentColor"', "#008000")])
def test_the_right_declaration_wins(load_svg, attributes, colour):
    svg = load_svg("<style>.important{fill:lime!important} .plain{fill:lime}</style>"
                   f'<g fill="orange" color="green"><rect width="9" height="9" {attributes}/></g>')
    assert colours_of(svg) == [colour]


def test_keywords_of_what_is_not_inherited(load_svg):
    svg = load_svg('<g opacity=".5"><rect width="4" height="4" opacity="inherit"/>'
                   '<rect width="4" height="4" opacity=".1" style="opacity:initial"/></g>')
    assert sorted(svg.opacities.tolist()) == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("text, rgba", [
    ("rgb(255 0 0 / 50%)", (1, 0, 0, 0.5)), ("hsl(120deg 100% 25%)", (0, 0.5, 0, 1)), ("#0f08", (0, 1, 0, 8 / 15)),
    ("hsl(0.5turn 100% 50%)", (0, 1, 1, 1)), ("hwb(0 20% 20%)", (0.8, 0.2, 0.2, 1)),
    ("RebeccaPurple", (0.4, 0.2, 0.6, 1)),
    ("rgba(0,0,255,.25)", (0, 0, 1, 0.25)), ("rgb(300, -5, 0)", (1, 0, 0, 1)), ("transparent", (0, 0, 0, 0)),
    ("color(srgb .5 0 1)", (0.5, 0, 1, 1)), ("rgb(1e999 0 0)", (1, 0, 0, 1)), ("hsl(0 1e999% 50%)", None),
    ("color()", None), ("", None), ("none", None), ("ff0000", None), ("rgb(1,2)", None)])
def test_colours_are_css_color_4(text, rgba):
    assert colour(text) == (rgba and pytest.approx(rgba))


def test_what_is_not_understood_warns_once_for_each_kind(load_svg):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_svg("<style>a:nonsense{fill:red} b:nonsense{fill:red} rect{stroke:zzz}</style>"
                 + '<rect width="9" height="9" fill="yyy"/><rect width="9" height="9" fill="xxx"/>')
    said = [str(w.message).partition(".svg: ")[2] for w in caught]
    assert said == ["the CSS selector 'a:nonsense' is not understood and left out",
                    "fill 'yyy' is not understood and left out", "stroke 'zzz' is not understood and left out"]


@pytest.mark.parametrize("media, count", [("print", 0), ("screen", 1)])
def test_a_style_element_may_be_for_other_media(load_svg, media, count):
    svg = load_svg(f'<style media="{media}">rect{{fill:red}}</style><rect width="9" height="9"/>')
    assert colours_of(svg).count("#ff0000") == count


def test_many_elements_and_rules_are_matched_in_time(load_svg):
    sheet = "".join(f".c{k}{{fill:#{k % 1000:06d}}} g &gt; .c{k}{{stroke:red}}" for k in range(450))
    body = "".join(f'<g><path class="c{k % 450}" d="M0 0H1V1Z"/></g>' for k in range(10_000))
    start = time.process_time()
    svg = load_svg(f"<style>{sheet}</style>{body}")
    assert len(svg.layers) == 20_000 and time.process_time() - start < 20


# ---- saving

def test_save_keeps_the_structure(load_svg, tmp_path):
    svg = load_svg('<!-- note --><g id="g" class="k" fill="red"><circle id="c" class="big" cx="9" cy="9" '
                   'r="5" transform="rotate(5)" data-x="1"/><path id="p" d="M1 1L5 5L9 1"/></g>'
                   '<title>t</title>')
    path = tmp_path / "saved.svg"
    with torch.no_grad():
        svg.points[:12] += 1.5            # the circle only
        svg.colours[1] = torch.tensor([0.0, 0.0, 1.0])
    svg.save(path)
    text = path.read_text()
    assert '<path id="c" class="big" transform="rotate(5)" data-x="1" d="M' in text and "<circle" not in text
    assert '<path id="p" d="M1 1L5 5L9 1" fill="#0000ff"' in text
    for kept in ('<g id="g" class="k" fill="red">', "<!-- note -->", "<title>t</title>"):
        assert kept in text


def test_shapes_that_use_shares_stay_shared(load_svg, tmp_path):
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
    assert "of-type" in sheet or psnr(own, resvg_render(text, 256, 4)) > 40       # resvg does not know these


# ---- bad input

BAD_FILES = {
    "no element found": "",
    "not well-formed XML": "<svg",
    "the root element is <html>": "<html/>",
    "entity declarations": '<!DOCTYPE s [<!ENTITY a "aaa"><!ENTITY b "&a;&a;">]>' + svg_text("&b;"),
    "entity declarations ": '<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + svg_text("&a;"),
    "more than 100000 elements": svg_text("<g/>" * 100_001),
    "nested deeper than 200": svg_text("<g>" * 300 + "</g>" * 300),
    "more than 1e+06 px away": svg_text('<path d="M0 0L1e30 5L5 5Z"/>'),
    "not finite or lie": svg_text('<path d="M0 0L1e999 5L5 5Z"/>'),
    "'#b' refers to itself": svg_text('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>'),
    "gradient '#a' refers to itself": svg_text('<linearGradient id="a" href="#a"/><rect width="9" height="9" '
                                               'fill="url(#a)"/>'),
    "more than 30000 references": svg_text('<g id="a0"/>' + "".join(
        f'<g id="a{k + 1}">' + f'<use href="#a{k}"/>' * 10 + "</g>" for k in range(9)) + '<use href="#a9"/>'),
    "external reference 'http://evil/x.svg#a'": svg_text('<use href="http://evil/x.svg#a"/>'),
    "external reference 'file:///etc/x#a'": svg_text('<circle r="9" fill="url(file:///etc/x#a)"/>'),
    "<text> is not supported": svg_text("<text>hi</text>"),
    "<image> is not supported": svg_text('<image href="a.png"/>'),
    "filter on <g> is not supported": svg_text('<g filter="url(#f)"/>'),
    "mask on <rect> is not supported": svg_text('<rect style="mask:url(#m)" width="5" height="5"/>'),
    "wider than 1e+06 px": svg_text('<path d="M0 0H9" stroke="red" stroke-width="1e999"/>'),
    "more than 1000 style sheet rules": svg_text(f"<style>{'a{}' * 1001}</style>"),
    "take too long to match": svg_text("<style>.x g g g g g *{fill:red}</style>" + "<g>" * 150 + "</g>" * 150),
    "more than 2 MiB of style sheets": svg_text(f"<style>{'a' * 2_100_000}</style>"),
    "styles are nested too deeply": svg_text(f'<g style="fill:{"(" * 10_000}"/>'),
    "too many dashes": svg_text('<path d="M0 0H32" stroke="red" stroke-dasharray="1e-7"/>'),
    "a picture of 0 x 0": svg_text("<g/>", 'width="0" height="0"'),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_file_is_refused_in_one_line(tmp_path, message):
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
    '<g transform="rotate(1e999) skewX(60)"><path d="M1 1A1e999 1e999 0 0 1 9 9A1e-300 1 0 0 1 5 5Z"/></g>',
    '<linearGradient id="a" x1="" gradientUnits=""><stop color="\\1" stop-color="currentColor"/>'
    '</linearGradient><circle r="9" fill="url(#a)"/>',
    '<style>}}{{a{b:c;}} .x{fill:red @import url("http://evil/a.css"); *{stroke:red}</style><rect width="5" '
    'height="5"/>'])
def test_degenerate_file_renders_clean(load_svg, tmp_path, body):
    svg = load_svg(body)
    image = svg.render()
    assert torch.isfinite(image).all()
    if image.requires_grad:
        image.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in svg.parameters() if p.grad is not None)
    svg.save(tmp_path / "saved.svg")


def test_skip_unsupported_warns_and_goes_on(load_svg):
    body = '<text>hi</text><g filter="url(#f)"><rect width="8" height="8"/></g>'
    with pytest.warns(UserWarning, match="filter on <g>"), pytest.warns(UserWarning, match="<text> is not supported"):
        svg = load_svg(body, skip_unsupported=True)
    assert darkness(svg) == pytest.approx(64) and svg.document.skipped == ["<text>", "filter on <g>"]


def test_save_fails_without_harm(load_svg, tmp_path):
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
