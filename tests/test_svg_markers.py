"""svg/markers.py: against resvg and finite differences; moving vertices; saving; unsupported markers."""
import math

import numpy as np
import pytest
import torch
from conftest import STOPS, svg_text

from bench.svg import cosine_of, gradient_pairs, resvg_render
from image.figures import psnr
from svg.markers import SEGMENTS, vertices
from svg.outline import SVGError, path_outline
from svg_raster import SVG

ALL = 'marker-start="url(#m)" marker-mid="url(#m)" marker-end="url(#m)"'
PATH = ('<path d="M5 12.1L14 6.3C20.2 5 27.1 10.4 25.2 15S15.3 25.1 10 20Q6.3 16 3 22" fill="none" stroke="#444" '
        f'stroke-width=".7" {ALL}/>')
GRADIENTS = (f'<linearGradient id="g">{STOPS}</linearGradient><radialGradient id="u" gradientUnits="userSpaceOnUse" '
             f'cx="2" cy="3" r="2">{STOPS}</radialGradient>')
AUTO = 'orient="auto"'


def marked(attributes=AUTO, body=PATH):
    return (f'{GRADIENTS}<marker id="m" markerWidth="8" markerHeight="6" refX="4" refY="3" {attributes}>'
            f'<path d="M0 0L8 3L0 6Z" fill="url(#g)"/><circle cx="2" cy="3" r="1.5" fill="url(#u)"/></marker>{body}')


DRAWINGS = {
    "auto": marked(), "auto-start-reverse": marked('orient="auto-start-reverse"'),
    "an angle": marked('orient="30"'), "an angle with a unit": marked('orient="0.2turn"'),
    "units of user space": marked('markerUnits="userSpaceOnUse" orient="-9"'),
    "a viewBox": marked('viewBox="-2 -1 16 12"'), "shown beyond it": marked('viewBox="1 2 4 3" overflow="visible"'),
    "stretched": marked('viewBox="0 0 4 12" preserveAspectRatio="none"'),
    "a transform": marked(AUTO, f'<g transform="matrix(1 .3 -.4 .8 5 2)" opacity=".7">{PATH}</g>'),
    "below the stroke": marked(AUTO, f'<g paint-order="markers">{PATH}</g>'),
    "line and polyline": marked(AUTO, f'<line x1="4" y1="4" x2="15" y2="9" stroke="#000" {ALL}/><polyline fill="#fc0" '
                                    f'points="4,18 20,20 15,27" {ALL}/>'),
    "subpaths": marked(AUTO, f'<path d="M4 4H12V9M4 20L15 28L26 13" fill="none" stroke="#06c" {ALL}/>'),
    "of a group, by the shorthand": marked(AUTO, '<g style="marker:url(#m)"><path d="M4 4L20 20L28 9" fill="none" '
                                               'stroke="#06c"/></g>'),
    "colours of the shape": '<marker id="m" markerWidth="8" markerHeight="6" orient="auto"><path d="M0 0L8 3L0 6Z" '
                            'fill="context-stroke"/><circle cx="2" cy="3" r="1.5" stroke="context-fill" fill="none"/>'
                            f'</marker><path d="M4 4L20 20L28 9" fill="#fa0" stroke="#06c" {ALL}/>',
    "clipped and translucent inside": '<clipPath id="c"><circle cx="4" cy="3" r="2.5"/></clipPath><marker id="m" '
                                      'markerWidth="8" markerHeight="6" orient="auto" refX="4" refY="3"><g '
                                      'clip-path="url(#c)" opacity=".5"><path d="M0 0L8 3L0 6Z" fill="#c00"/><path '
                                      f'd="M0 0L8 3L8 6Z" fill="#0c0"/></g></marker>{PATH}',
    "used twice": marked(AUTO, f'<g id="q">{PATH}</g><use href="#q" transform="translate(20 3) rotate(40)"/>'),
    "a stroke of no width": marked(AUTO, f'<path d="M4 4L20 20" stroke="#06c" stroke-width="0" {ALL}/>'),
    "a stroke of no colour": marked(AUTO, f'<path d="M4 4L20 20L28 4" fill="#06c" stroke-width=".8" {ALL}/>'),
    "hidden": marked(AUTO, f'<g visibility="hidden">{PATH}</g>'),
    "inherits itself": f'<g marker-end="url(#m)">{marked(AUTO, "")}<path d="M4 4L20 20" stroke="#000"/></g>',
}


def pixels(svg, size):
    with torch.no_grad():
        return svg.render(size=size)[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("name", DRAWINGS)
def test_markers_render_as_in_resvg_and_stay_in_the_saved_file(load_svg, tmp_path, name):
    body = DRAWINGS[name]
    svg = load_svg(body)
    assert psnr(pixels(svg, 128), resvg_render(svg_text(body), 128)) > 36
    with torch.no_grad():                 # the markers follow
        for parameter, step in (("points", 0.5), ("colours", 0.1), ("stroke_widths", 0.1)):
            p = getattr(svg, parameter)
            p += step * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        svg.project_()
    svg.save(tmp_path / "saved.svg")
    text = (tmp_path / "saved.svg").read_text()
    assert psnr(pixels(svg, 128), resvg_render(text, 128)) > 34
    assert psnr(pixels(svg, 64), pixels(SVG.load(tmp_path / "saved.svg", size=32), 64)) > 50
    assert text.count("<marker ") == 1 and "url(#m)" in text


@pytest.mark.parametrize("name", ["auto-start-reverse", "units of user space", "a transform", "colours of the shape"])
def test_gradients_through_markers_match_finite_differences(load_svg, name):
    pairs = gradient_pairs(load_svg(DRAWINGS[name], size=24))
    assert {"points", "stroke_widths"} <= pairs.keys()
    for exact, numeric in pairs.values():
        assert cosine_of(exact, numeric) > 0.9999


def way(d, number):
    """The directions of a path before and after a vertex in degrees; None if there is no segment."""
    outline, found = path_outline(d), []
    vertex, *others = vertices(outline)[number]
    p = outline.points
    for sign, part in ((-1, others[:3 * SEGMENTS]), (1, others[3 * SEGMENTS:])):
        step = next((sign * (p[i] - p[vertex]) for i in part if p[i] != p[vertex]), None)
        found.append(step and math.degrees(math.atan2(step.imag, step.real)))
    return found


@pytest.mark.parametrize("d, number, before, after", [
    ("M0 0H9V9", 0, None, 0), ("M0 0H9V9", 1, 0, 90), ("M0 0H9V9", -1, 90, None),
    ("M0 0H9V9H0Z", 0, -90, 0), ("M0 0H9V9H0Z", -1, -90, 0), ("M0 0H9V9H0V0Z", -2, -90, None),
    ("M0 0C0 0 0 9 9 9", 0, None, 90), ("M0 0C0 9 9 9 9 9", -1, 0, None), ("M0 0C0 0 9 9 9 9", 1, 45, None),
    ("M0 0H9H9H9V9", 1, 0, 90), ("M0 0H9H9H9V9", 3, 0, 90), ("M0 0H9M0 0V9", 1, 0, None), ("M0 0H9M0 0V9", 2, None, 90),
    ("M0 0H9H9", -1, 0, None), ("M0 9A9 9 0 0 1 9 0A9 9 0 0 1 18 9", 1, 0, 0), ("M4 4L4 4", 0, None, None)])
def test_directions_at_vertices_follow_the_specification(d, number, before, after):
    assert way(d, number) == pytest.approx([before, after])


def test_an_arc_counts_as_one_segment():
    assert len(vertices(path_outline("M10 30A20 20 0 0 1 50 30A9 9 0 1 1 45 50"))) == 3
    assert len(vertices(path_outline("M0 0H9V9ZM20 20H29V29Z"))) == 8


def test_markers_at_the_ends_of_a_closed_path_follow_the_bisector(load_svg):
    arrow = '<marker id="m" orient="auto" overflow="visible" markerUnits="userSpaceOnUse"><path d="M0 -1H5V1H0Z"/>'
    closed = load_svg(arrow + '</marker><path d="M16 16H26V26Z" fill="none" marker-start="url(#m)"/>')
    turned = load_svg('<path d="M0 -1H5V1H0Z" transform="translate(16 16) rotate(-67.5)"/>')
    assert torch.allclose(closed.render(), turned.render(), atol=1e-4)


def test_markers_follow_moving_vertices(load_svg):
    body = ('<marker id="m" orient="auto" markerUnits="userSpaceOnUse" overflow="visible" viewBox="0 0 3 3"><rect '
            'width="5" height="2" y="-1"/></marker><path d="M4 4L{} {}" marker-end="url(#m)"/>')
    svg = load_svg(body.format(20, 4))
    with torch.no_grad():
        svg.points[1] = torch.tensor([4.0, 20.0])
    assert torch.allclose(svg.render(), load_svg(body.format(4, 20)).render(), atol=1e-5)
    shifted = svg.render((2.0, 3.0))
    assert torch.allclose(shifted[..., 3:, 2:], svg.render()[..., :-3, :-2], atol=1e-5)


def test_a_map_in_metres_may_have_markers(load_svg):
    far = marked(AUTO, f'<path d="M700005 400012L700014 400006L700025 400025" fill="none" stroke="#444" {ALL}/>')
    near = marked(AUTO, f'<path d="M5 12L14 6L25 25" fill="none" stroke="#444" {ALL}/>')
    assert psnr(load_svg(far, 'viewBox="700000 400000 32 32"').render(), load_svg(near).render()) > 45


def test_shapes_without_vertices_clips_and_empty_markers_have_no_effect(load_svg):
    alone = '<{} stroke="#000" fill="#c00"/>'
    for shape in ('rect width="9" height="9"', 'circle cx="9" cy="9" r="5"'):
        assert torch.equal(load_svg(marked(AUTO, alone.format(f"{shape} {ALL}"))).render(),
                           load_svg(alone.format(shape)).render())
    for attributes in ('markerWidth="0"', 'viewBox="0 0 0 4"'):
        body = f'<marker id="m" {attributes}><rect width="9" height="9"/></marker>'
        line = '<path d="M4 4L20 20" stroke="#000" {}/>'
        assert torch.equal(load_svg(body + line.format(ALL)).render(), load_svg(line.format("")).render())
    clip = '<clipPath id="c"><path d="M4 4H20V20Z" {}/></clipPath><rect width="32" height="32" clip-path="url(#c)"/>'
    assert torch.equal(load_svg(marked(AUTO, clip.format(ALL))).render(), load_svg(clip.format("")).render())


def test_a_shape_without_markers_gets_none_when_it_is_saved_as_a_path(load_svg, tmp_path):
    svg = load_svg(marked(AUTO, f'<g {ALL}><rect x="5" y="5" width="9" height="9"/></g>'))
    with torch.no_grad():
        svg.points += 1
    svg.save(tmp_path / "saved.svg")
    assert np.array_equal(pixels(SVG.load(tmp_path / "saved.svg", size=32), 32), pixels(svg, 32))


def test_keywords_of_the_reference_point_are_read(load_svg):
    assert torch.equal(load_svg(DRAWINGS["auto"].replace('refX="4" refY="3"', 'refX="center" refY="50%"')).render(),
                       load_svg(DRAWINGS["auto"]).render())


def test_a_path_that_returns_to_its_start_keeps_its_marker_when_saved(load_svg, tmp_path):
    svg = load_svg(marked(AUTO, '<path d="M5 5H20V20L5 5Z" stroke="#06c" fill="none" marker-mid="url(#m)"/>'))
    with torch.no_grad():
        svg.points += 1
    svg.save(tmp_path / "saved.svg")
    again = SVG.load(tmp_path / "saved.svg", size=32)
    places = {layer.place for layer in again.layers} - {None}
    assert np.abs(pixels(again, 64) - pixels(svg, 64)).max() < 1e-3 and len(places) == 3


def test_a_marker_that_is_left_out_is_not_drawn_after_saving(load_svg, tmp_path):
    with pytest.warns(UserWarning, match="marker-mid on <path> with arcs"):
        svg = load_svg(marked(AUTO, f'<path d="M4 4A9 9 0 0 1 20 20H30" {ALL}/>'), skip_unsupported=True)
    with torch.no_grad():
        svg.points += 0.5
    svg.save(tmp_path / "saved.svg")
    assert psnr(pixels(SVG.load(tmp_path / "saved.svg", size=32), 64), pixels(svg, 64)) > 50


def test_a_path_that_turns_back_keeps_its_bisector_when_saved(load_svg, tmp_path):
    svg = load_svg(marked(AUTO, f'<polygon points="5.57,6.1663 28.3,26.9797" {ALL}/>'))
    for step in torch.randn(5, 2, generator=torch.Generator().manual_seed(0)):
        with torch.no_grad():
            svg.points[:2] += 0.1 * step
        svg.save(tmp_path / "saved.svg")
        assert psnr(pixels(SVG.load(tmp_path / "saved.svg", size=32), 32), pixels(svg, 32)) > 50


REFUSED = {
    "marker-mid on <path> with arcs": marked(AUTO, f'<path d="M4 4A9 9 0 0 1 20 20" {ALL}/>'),
    "marker-end on <path> in a marker": marked(AUTO, '<marker id="n"><path d="M0 0H9" marker-end="url(#m)"/></marker>'
                                                   '<path d="M4 4L20 20" marker-end="url(#n)"/>'),
    "opacity on <marker>": marked('opacity=".5"'),
    "filter on <g> in a marker": '<filter id="f"><feOffset/></filter><marker id="m"><g filter="url(#f)"><path '
                                 f'd="M0 0H9V9Z"/></g></marker>{PATH}',
    "context-fill of a gradient": GRADIENTS + '<marker id="m"><rect width="3" height="3" fill="context-fill"/></marker>'
                                              f'<path d="M4 4L20 20H9" fill="url(#g)" {ALL}/>',
    "context-fill on <rect>": '<rect width="9" height="9" fill="context-fill"/>',
    "the external reference 'a.svg#m' is refused": '<path d="M4 4L20 20" marker-end="url(a.svg#m)"/>'}


@pytest.mark.parametrize("message", REFUSED)
def test_markers_that_cannot_be_drawn_are_refused_by_name(load_svg, message):
    with pytest.raises(SVGError, match=message):
        load_svg(REFUSED[message])
