"""svg/patterns.py: against resvg, equivalent units and finite differences; moving boxes; saving; unsupported ones."""
import numpy as np
import pytest
import torch
from conftest import darkness, svg_text

from bench.svg import cosine_of, gradient_pairs, resvg_render
from image.figures import psnr
from svg.outline import SVGError
from svg_raster import SVG

CONTENT = '<rect width="2.3" height="2.7" fill="#c00"/><circle cx="3.1" cy="3.2" r="1.3" fill="#06c"/>'
SHARES = '<rect width=".1" height=".125" fill="#c00"/><circle cx=".15" cy=".2" r=".08" fill="#06c"/>'
SHAPE = '<path d="M4 10C8 3 20 2 24 14S14 30 4 24Z" fill="url(#p)" stroke="#000" stroke-opacity=".3"/>'
RECT = '<rect x="4" y="4" width="20" height="16" fill="url(#p)"/>'
ON_BOX = 'patternContentUnits="objectBoundingBox"'


def pattern(attributes, content=CONTENT, body=RECT):
    return f'<pattern id="p" {attributes}>{content}</pattern>{body}'


PATTERNS = {                              # with tiles of whole pixels, because resvg rounds tiles
    "user space": pattern('patternUnits="userSpaceOnUse" x="3" y="4" width="4" height="5"'),
    "a viewBox": pattern('patternUnits="userSpaceOnUse" x="3" y="4" width="5" height="4" viewBox=".5 .5 4 4"'),
    "a share of the box": pattern('x=".1" y="12.5%" width=".25" height="25%"'),
    "all in shares": pattern('x=".05" width=".25" height=".25" ' + ON_BOX, SHARES),
    "a viewBox in the box": pattern('x=".05" width=".25" height=".25" viewBox="0 0 5 4" preserveAspectRatio="none"'),
    "shares in tiles of user space": pattern(f'patternUnits="userSpaceOnUse" width="5" height="4" {ON_BOX}', SHARES),
    "inherited": '<pattern id="q" width=".25" height=".25" x=".5" y=".1">' + CONTENT + '</pattern><pattern id="o" '
                 f'href="#q" y=".25"/><pattern id="p" xlink:href="#o" x=".1"/>{RECT}',
    "turned": pattern('width=".25" height=".25" patternTransform="rotate(90) translate(3 1)"'),
    "of a stroke": pattern('width=".25" height=".25"', CONTENT, '<rect x="6" y="6" width="20" height="16" '
                           'fill="none" stroke="url(#p)" stroke-opacity=".7" stroke-width="5"/>'),
    "one tile": pattern(f'width="1" height="1" {ON_BOX}', '<path d="M0 0L.9 .4L.3 1Z" fill="#06c"/>'),
    "a gradient inside": '<linearGradient id="g"><stop stop-color="red"/><stop offset="1" stop-color="blue"/>'
                         '</linearGradient>' + pattern('width=".25" height=".25"', '<rect width="4" height="3" '
                                                       'fill="url(#g)"/>'),
    "a fallback for a box without area": pattern('width=".25" height=".25"', CONTENT, '<path d="M4 8H20" stroke-width='
                                                 '"5" stroke="url(#p) #0a0"/><path d="M4 20H20" stroke="url(#p)"/>'),
    "a gradient in a box without area": '<linearGradient id="p"><stop/><stop offset="1" stop-color="red"/>'
                                        '</linearGradient><path d="M4 8H20" stroke-width="5" stroke="url(#p) #0a0"/>',
    "refers to itself": pattern('width=".25" height=".25"', CONTENT.replace("#06c", "url(#p)")),
}


def pixels(svg, size):
    with torch.no_grad():
        return svg.render(size=size)[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_render_as_in_resvg_and_stay_in_the_saved_file(load_svg, tmp_path, name):
    svg = load_svg(PATTERNS[name])
    assert psnr(pixels(svg, 128), resvg_render(svg_text(PATTERNS[name]), 128)) > 33
    with torch.no_grad():
        svg.points += torch.randn(svg.points.shape, generator=torch.Generator().manual_seed(0)) * 0.3
        svg.colours.mul_(0.8)
    svg.save(tmp_path / "saved.svg")
    text = (tmp_path / "saved.svg").read_text()
    assert PATTERNS[name][:PATTERNS[name].index(">")] in text
    assert psnr(pixels(svg, 64), pixels(SVG.load(tmp_path / "saved.svg", size=32), 64)) > 48


UNITS = {                                 # attributes in shares of a box at (4, 6) of 20 x 15, and in user space
    "": ('x=".1" y=".05" width=".23" height=".31"', 'x="6" y="6.75" width="4.6" height="4.65"'),
    "a viewBox": ('x=".1" width=".23" height=".31" viewBox=".5 .5 4 3" preserveAspectRatio="xMinYMax slice"',
                  'x="6" y="6" width="4.6" height="4.65" viewBox=".5 .5 4 3" preserveAspectRatio="xMinYMax slice"'),
    "centred": ('width=".23" height=".31" viewBox=".5 .5 4 3"', 'x="4" y="6" width="4.6" height="4.65" '
                                                                'viewBox=".5 .5 4 3"'),
    "turned": ('width=".23" height=".31" patternTransform="rotate(30) scale(.8)"',
               'x="4" y="6" width="4.6" height="4.65" patternTransform="rotate(30) scale(.8)"')}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("moved", [False, True])
def test_box_units_are_equivalent_to_user_space(load_svg, name, moved):
    box, user = UNITS[name]
    start = '<path d="M2 3L16 4V16L1 20Z" fill="url(#p)"/>'
    end = '<path d="M4 6L24 10V16L10 21Z" fill="url(#p)"/>'
    svg = load_svg(pattern(box, CONTENT, start if moved else end))
    if moved:
        with torch.no_grad():
            svg.points[[p.first for p in svg.document.shapes if p.element is not None and p.outline.points[0] == 2 + 3j]
                       [0]:][:4] = torch.tensor([[4.0, 6], [24, 10], [24, 16], [10, 21]])
    other = load_svg(pattern(f'patternUnits="userSpaceOnUse" {user}', CONTENT, end))
    assert torch.allclose(svg.render(), other.render(), atol=0.01)        # chords are chosen at loading


@pytest.mark.parametrize("attributes, content", [
    ('x=".11" y=".05" width=".33" height=".45"', CONTENT), (f'x=".03" width=".53" height=".61" {ON_BOX}', SHARES),
    ('width=".41" height=".51" viewBox=".5 .5 4 4.5" patternTransform="rotate(20)"', CONTENT)])
def test_gradients_through_patterns_match_finite_differences(load_svg, attributes, content):
    for exact, numeric in gradient_pairs(load_svg(pattern(attributes, content, SHAPE), size=20)).values():
        assert cosine_of(exact, numeric) > 0.9999


def test_tiles_have_no_seams(load_svg):
    tiles = load_svg(pattern('width=".231" height=".317" patternTransform="rotate(20)"',
                             '<rect x="-1" y="-1" width="9" height="9"/>'))
    assert darkness(tiles) == pytest.approx(20 * 16, abs=0.05)


def test_tiles_in_box_units_enter_the_picture_with_their_shape(load_svg):
    svg = load_svg(pattern('width=".5" height=".5"', CONTENT, '<rect x="-40" y="4" width="20" height="16" '
                                                              'fill="url(#p)"/>'))
    with torch.no_grad():
        first = next(shape.first for shape in svg.document.shapes if shape.outline.points[0].real == -40)
        svg.points[first:first + 4, 0] += 44
    there = load_svg(pattern('width=".5" height=".5"'))
    assert torch.allclose(svg.render(), there.render(), atol=1e-5) and np.ptp(svg.render().detach().numpy()) > 0.5


REFUSED = {
    "pattern fill on <rect> of more than 1000 tiles": pattern('width=".001" height=".1"'),
    "pattern fill on <rect> in units of its box, in a marker": '<marker id="m">' + pattern('width="1" height="1"') +
                                                               '</marker><path d="M4 4H9" marker-end="url(#m)"/>',
    "filter on <g> in a marker or a pattern": '<filter id="f"><feOffset/></filter>' + pattern(
        'width="1" height="1"', f'<g filter="url(#f)">{CONTENT}</g>')}


@pytest.mark.parametrize("message", REFUSED)
def test_patterns_that_cannot_be_drawn_are_refused_by_name(load_svg, message):
    with pytest.raises(SVGError, match=message):
        load_svg(REFUSED[message])
