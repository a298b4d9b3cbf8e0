"""Filters and blend modes: against resvg, finite differences and each other; saving; unsupported primitives."""
import numpy as np
import pytest
import torch
from conftest import darkness, svg_text

from bench.svg import cosine_of, gradient_pairs, resvg_render
from image.figures import psnr
from svg.filters import BLEND
from svg.outline import SVGError
from svg_raster import SVG

SHAPES = ('<circle cx="15.3" cy="16.1" r="8.7" fill="#c33" fill-opacity=".9"/>'
          '<rect x="5.3" y="8.4" width="9" height="11" fill="#36c" fill-opacity=".8"/>')
REGION = 'filterUnits="userSpaceOnUse" x="-5" y="-5" width="42" height="42"'
SRGB = ' color-interpolation-filters="sRGB"'
FIGMA = ('<feFlood flood-opacity="0" result="B"/><feBlend in="SourceGraphic" in2="B" result="shape"/>'
         '<feColorMatrix in="SourceAlpha" result="hard" values="0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 127 0"/>'
         '<feOffset dy="1"/><feGaussianBlur stdDeviation="1.5"/><feComposite in2="hard" operator="arithmetic" k2="-1" '
         'k3="1"/><feColorMatrix values="0 0 0 0 .2 0 0 0 0 .1 0 0 0 0 .4 0 0 0 .6 0"/><feBlend in2="shape"/>')


def filtered(primitives, attributes=REGION, user='<g filter="url(#f)" opacity=".8">'):
    return f'<filter id="f" {attributes}>{primitives}</filter>{user}{SHAPES}</g>'


TRANSFER = ('<feComponentTransfer><feFuncR type="gamma" amplitude="1.1" exponent="1.7" offset="-.02"/>'
            '<feFuncG type="table" tableValues="0 .6 1"/><feFuncA type="linear" slope=".7" intercept=".1"/>'
            '</feComponentTransfer>')
FILTERS = {
    "blur": filtered('<feGaussianBlur stdDeviation="3 2.5"/>'),
    "a small blur, sRGB": filtered('<feGaussianBlur stdDeviation=".5"/>', REGION + SRGB),
    "a blur cut off by its region": filtered('<feGaussianBlur stdDeviation="3"/>',
                                             "x='.1' y='0' width='.7' height='1'"),
    "offset in units of the box": filtered('<feOffset dx=".25" dy="-.125"/>', 'primitiveUnits="objectBoundingBox"'),
    "drop shadow": filtered('<feDropShadow dx="2" dy="1" stdDeviation="1.5" flood-color="#063" flood-opacity=".7"/>'),
    "saturate": filtered('<feColorMatrix type="saturate" values=".4"/>'),
    "hueRotate, sRGB": filtered('<feColorMatrix type="hueRotate" values="70"/>', REGION + SRGB),
    "luminanceToAlpha": filtered('<feColorMatrix type="luminanceToAlpha"/>'),
    "component transfer": filtered(TRANSFER, REGION + SRGB),
    "merge": filtered('<feGaussianBlur stdDeviation="3" result="b"/><feMerge><feMergeNode in="b"/>'
                      '<feMergeNode in="SourceGraphic"/></feMerge>'),
    "flood within its own region": filtered('<feFlood flood-color="#5b8" x="4" width="9" flood-opacity=".6"/>'
                                            '<feMerge><feMergeNode/><feMergeNode in="SourceGraphic"/></feMerge>'),
    "inner shadow of Figma": filtered(FIGMA, REGION + SRGB),
    "two filters": '<filter id="f"><feOffset dx="3"/></filter><filter id="g"><feGaussianBlur stdDeviation="3"/>'
                   f'</filter><g style="filter:url(#f) url(#g)">{SHAPES}</g>',
    "filters within a filter": '<filter id="f" x="-.5" width="2"><feGaussianBlur stdDeviation="2.1"/></filter><g '
                               f'filter="url(#f)"><g filter="url(#f)" opacity=".7">{SHAPES}</g>'
                               '<path d="M2 2H9V9Z" fill="#246"/></g>',
    "clipped after the filter": '<clipPath id="c"><circle cx="12" cy="15" r="9"/></clipPath>' + filtered(
        '<feGaussianBlur stdDeviation="2.5"/>', REGION, '<g filter="url(#f)" clip-path="url(#c)">'),
    "reaching out of the picture": '<filter id="f" filterUnits="userSpaceOnUse" x="-20" y="-20" width="70" height="70">'
                                   '<feOffset dx="14" dy="3"/></filter><g filter="url(#f)"><circle cx="-4" cy="14" '
                                   'r="9" fill="#258"/></g>',
    "CSS functions": f'<g style="filter:blur(2.5px) brightness(1.1) contrast(.8) saturate(70%) sepia(.2)">{SHAPES}</g>',
    "more CSS functions": f'<g style="filter:grayscale(.4) hue-rotate(1rad) invert(.2) opacity(80%)">'
                          f'{SHAPES}</g>',
} | {f"feComposite {operator}": filtered(
    '<feOffset dx="3" result="o"/><feComposite in="SourceGraphic" in2="o" k1=".3" k2=".4" k3=".2" k4=".05" '
    f'operator="{operator}"/>') for operator in ("over", "in", "out", "atop", "xor", "arithmetic")}
MODES = {mode: '<circle cx="19" cy="14" r="9.3" fill="#7ac"/>'
               f'<g style="mix-blend-mode:{mode}" opacity=".7">{SHAPES}</g>' for mode in BLEND} | {
    "isolated": '<g style="isolation:isolate"><circle cx="9" cy="9" r="9" fill="#7ac"/><g '
                f'style="mix-blend-mode:screen">{SHAPES}</g></g>',
    "in a group": f'<rect width="20" height="32" fill="#9c5"/><g opacity=".7"><circle cx="9" cy="9" r="9" fill="#7ac"/>'
                  f'<g style="mix-blend-mode:multiply">{SHAPES}</g></g>',
    "feBlend": filtered('<feFlood flood-color="#5b8" flood-opacity=".5" result="o"/><feBlend in2="o" mode="multiply" '
                        'in="SourceGraphic"/>')}


def pixels(svg, size):
    with torch.no_grad():
        return svg.render(size=size)[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("name", [*FILTERS, *MODES])
def test_filters_and_modes_render_as_in_resvg(load_svg, tmp_path, name):
    body = (FILTERS | MODES)[name]
    svg, other = load_svg(body), resvg_render(svg_text(body), 128)
    assert psnr(pixels(svg, 128), other) > 40 and (other < 0.99).any()
    svg.save(tmp_path / "saved.svg")
    assert np.array_equal(pixels(SVG.load(tmp_path / "saved.svg", size=32), 64), pixels(svg, 64))


@pytest.mark.parametrize("name", [
    "blur", "a small blur, sRGB", "drop shadow", "saturate", "component transfer", "merge", "two filters",
    "filters within a filter", "flood within its own region", "clipped after the filter", "reaching out of the picture",
    "CSS functions", "feComposite atop", "feComposite arithmetic", "multiply", "soft-light", "luminosity", "isolated",
    "in a group", "feBlend"])
def test_gradients_through_filters_match_finite_differences(load_svg, name):
    for exact, numeric in gradient_pairs(load_svg((FILTERS | MODES)[name], size=24)).values():
        if name != "saturate" or len(numeric) > 3:      # an opacity of 1 lies at the kink of a clamp
            assert cosine_of(exact, numeric) > 0.9999


def test_the_region_of_a_filter_follows_a_moving_shape(load_svg):
    svg = load_svg('<filter id="f" x="0" y="0" width="1" height="1"><feFlood/></filter>'
                   '<rect x="4" y="4" width="10" height="8" filter="url(#f)"/>')
    assert darkness(svg) == 80
    with torch.no_grad():
        svg.points += 9
    assert darkness(svg) == 80 and svg.render()[0, 0, 14, 14] == 0


@pytest.mark.parametrize("body, area", [
    ('<filter id="f"/><rect width="9" height="9" filter="url(#f)"/>', 0),
    ('<filter id="f" width="0"><feOffset/></filter><rect width="9" height="9" filter="url(#f)"/>', 0),
    ('<filter id="f"><feOffset/></filter><path d="M0 9H9" stroke="#000" filter="url(#f)"/>', 0),
    ('<rect width="9" height="9" filter="url(#none)"/>', 81), ('<rect width="9" height="9" filter="none"/>', 81),
    ('<filter id="f"><feOffset in="zzz" dx="1"/></filter><rect width="9" height="9" filter="url(#f)"/>', 81),
    ('<filter id="f"><feGaussianBlur stdDeviation="-1"/></filter><rect width="9" height="9" filter="url(#f)"/>', 81),
    ('<filter id="f" filterUnits="userSpaceOnUse" x="2" y="2" width="9" height="9"><feFlood/></filter>'
     '<g filter="url(#f)"/>', 81),
    ('<filter id="f"><feMorphology radius="1"/></filter><rect x="4" y="4" width="9" height="9" filter="url(#f)"/>', 49),
    ('<filter id="f" x="-1" y="-1" width="3" height="3"><feMorphology operator="dilate" radius="1 2"/></filter>'
     '<rect x="4" y="4" width="9" height="9" filter="url(#f)"/>', 11 * 13),
    ('<g transform="rotate(90 16 16)"><filter id="f" filterUnits="userSpaceOnUse" x="0" y="0" width="30" height="32">'
     '<feOffset dx="9"/></filter><rect x="9" y="9" width="14" height="14" filter="url(#f)"/></g>', 14 * 12)])
def test_filters_cover_their_known_areas(load_svg, body, area):
    assert darkness(load_svg(body)) == pytest.approx(area, abs=1e-3)


def test_the_css_drop_shadow_equals_the_primitive_without_a_region(load_svg):
    css = load_svg(f'<g style="filter:drop-shadow(2px 3px 1.5px #063)">{SHAPES}</g>')
    primitive = load_svg(filtered('<feDropShadow dx="2" dy="3" stdDeviation="1.5" flood-color="#063"/>', REGION + SRGB,
                                  '<g filter="url(#f)">'))
    assert torch.allclose(css.render(), primitive.render(), atol=1e-5)


REFUSED = {
    "<feTurbulence> in a filter on <g>": "<feTurbulence/>", "<feImage> in a": '<feImage href="#a"/>',
    "<feDiffuseLighting> in a": "<feDiffuseLighting/>", "<feDisplacementMap> in a": "<feDisplacementMap/>",
    "<feConvolveMatrix> in a": "<feConvolveMatrix/>", "<feTile> in a": "<feTile/>",
    "BackgroundImage in a filter": '<feOffset in="BackgroundImage"/>', "FillPaint in a": '<feOffset in="FillPaint"/>',
    "has more than 200 primitives": "<feOffset/>" * 201}


@pytest.mark.parametrize("message", REFUSED)
def test_other_primitives_are_refused_by_name(load_svg, message):
    with pytest.raises(SVGError, match=message):
        load_svg(filtered(REFUSED[message]))


def test_filters_that_cannot_be_drawn_are_refused(load_svg):
    for message, body in {
            "under a skewing transform": f'<filter id="f"><feGaussianBlur stdDeviation="1 0"/></filter><g '
                                         f'transform="rotate(30)" filter="url(#f)">{SHAPES}</g>',
            "href on <filter>": f'<filter id="g"/><filter id="f" href="#g"/><g filter="url(#f)">{SHAPES}</g>',
            "mix-blend-mode plus-lighter on <g>": f'<g style="mix-blend-mode:plus-lighter">{SHAPES}</g>'}.items():
        with pytest.raises(SVGError, match=message):
            load_svg(body)


@pytest.mark.parametrize("value", ["blur(-1px)", "blur(1)", "zoom(1)", "drop-shadow(red)", "hue-rotate(9)", "blur() x"])
def test_invalid_filter_functions_warn(load_svg, value):
    with pytest.warns(UserWarning, match="not understood"):
        svg = load_svg(f'<rect width="9" height="9" style="filter:{value}"/>')
    assert darkness(svg) == 81


def test_a_filter_of_an_edited_drawing_is_saved_unchanged(load_svg, tmp_path):
    for body in (FILTERS["inner shadow of Figma"], FILTERS["offset in units of the box"], MODES["overlay"]):
        svg = load_svg(body)
        with torch.no_grad():
            svg.points += torch.randn(svg.points.shape, generator=torch.Generator().manual_seed(0))
        svg.save(tmp_path / "saved.svg")
        text = (tmp_path / "saved.svg").read_text()
        assert "<filter" not in body or body[:body.index("</filter>")] in text.replace(" />", "/>")
        assert psnr(pixels(svg, 128), resvg_render(text, 128)) > 38
        assert psnr(svg.render(), SVG.load(tmp_path / "saved.svg", size=32).render()) > 60


def test_pixels_that_resvg_does_not_see_are_not_made_opaque(load_svg):
    hard = ('<filter id="f" x="-.5" y="-.5" width="2" height="2"><feColorMatrix values="1 0 0 0 0 0 1 0 0 0 0 0 1 0 0 '
            '0 0 0 127 0"/></filter><g filter="url(#f)">{}</g>')
    for edge, area in ((0.1, 8 * 8), (0.15, 8 * 9)):      # of a pixel, below and above 1/8
        body = hard.format(f'<rect x="4" y="4" width="8" height="{8 + edge}"/>')
        assert darkness(load_svg(body)) == pytest.approx(area, abs=1e-3)
        assert psnr(pixels(load_svg(body), 32), resvg_render(svg_text(body), 32)) > 60
    disc = hard.format('<circle cx="15.3" cy="16.1" r="9.3"/>')
    assert psnr(pixels(load_svg(disc), 128), resvg_render(svg_text(disc), 128)) > 28


@pytest.mark.parametrize("body", [
    '<filter id="f" filterUnits="userSpaceOnUse" width="9" height="9"><feFlood/></filter><g filter="url(#f)"/>',
    f'<g style="filter:blur(1e9px)">{SHAPES}</g>', f'<g style="filter:blur(300px)">{SHAPES}</g>',
    f'<pattern id="p" width="1" height="1"><g style="filter:blur(1px)"/></pattern><g fill="url(#p)">{SHAPES}</g>'])
def test_extreme_filters_have_finite_gradients(load_svg, body):
    svg = load_svg(body, skip_unsupported=True)
    svg.render().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in svg.parameters())


def test_filters_move_with_a_shifted_view(load_svg):
    svg = load_svg(FILTERS["drop shadow"])
    assert torch.allclose(svg.render((2.0, -3.0))[..., 4:-4, 4:-4], svg.render()[..., 7:-1, 2:-6], atol=1e-5)
