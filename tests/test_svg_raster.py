"""svg_raster.py: coverage, gradients, every feature against resvg, optimisation, the command line."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STOPS, darkness, svg_text
from PIL import Image

import svg_raster
from bench.svg import GRADIENT_CASES, gradient_pairs, resvg_render
from image.figures import psnr
from svg_raster import SVG

# ---- known areas

@pytest.mark.parametrize("body, area", [
    ('<rect x="4" y="6" width="12" height="16"/>', 192),
    ('<rect x="4.25" y="6.5" width="12.5" height="16.125"/>', 12.5 * 16.125),
    ('<rect x="-20" y="6" width="30" height="100"/>', 10 * 26),
    ('<circle cx="15.3" cy="16.1" r="9.7"/>', math.pi * 9.7 ** 2),
    ('<ellipse cx="15" cy="16" rx="12" ry="5" transform="rotate(33 15 16)"/>', math.pi * 60),
    ('<path d="M4 4H28V28H4ZM10 10V20H20V10Z"/>', 24 * 24 - 100),       # the hole runs in the opposite direction
    ('<path d="M4 4H28V28H4ZM10 10H20V20H10Z"/>', 24 * 24),
    ('<path fill-rule="evenodd" d="M4 4H28V28H4ZM10 10H20V20H10Z"/>', 24 * 24 - 100),
    ('<path d="M3 16H29" stroke="#000" stroke-width="4"/>', 26 * 4),
    ('<path d="M8 16H24" stroke="#000" stroke-width="4" stroke-linecap="square"/>', 20 * 4),
    ('<path d="M8 16H24" stroke="#000" stroke-width="4" stroke-linecap="round"/>', 16 * 4 + math.pi * 4),
    ('<rect x="8" y="8" width="16" height="16" fill="none" stroke="#000" stroke-width="4"/>', 400 - 144),
    ('<rect x="8" y="8" width="16" height="16" fill="none" stroke="#000" stroke-width="4" '
     'stroke-linejoin="bevel"/>', 20 * 20 - 12 * 12 - 4 * 2),
    ('<circle cx="16" cy="16" r="10" fill="none" stroke="#000" stroke-width="3"/>', math.pi * 60),
    ('<path d="M4 16H28" stroke="#000" stroke-width="2" stroke-dasharray="3 2"/>', 5 * 3 * 2),
])
def test_shapes_cover_their_known_areas(load_svg, body, area):
    svg = load_svg(body)
    assert darkness(svg) == pytest.approx(area, rel=5e-3)     # chords lie up to TOLERANCE px inside
    assert darkness(svg, size=256) == pytest.approx(64 * area, rel=1e-3)
    if "<circle" not in body and "<ellipse" not in body and "round" not in body:
        assert darkness(svg) == pytest.approx(area, rel=1e-5)


def test_an_even_odd_star_has_a_hole(load_svg):
    star = '<path {} d="M16 2L24.5 28L2.5 12H29.5L7.5 28Z"/>'
    rules = ("", 'fill-rule="evenodd"')
    full, hollow = (darkness(load_svg(star.format(rule)), size=256) for rule in rules)

    # the pentagon in the middle, by its five corners
    def crossing(a, b, c, d):
        t = np.linalg.solve(np.array([[b[0] - a[0], c[0] - d[0]], [b[1] - a[1], c[1] - d[1]]]),
                            np.array([c[0] - a[0], c[1] - a[1]]))[0]
        return complex(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]))
    p = [(16, 2), (24.5, 28), (2.5, 12), (29.5, 12), (7.5, 28)]
    e = [(p[k], p[(k + 1) % 5]) for k in range(5)]
    corners = [crossing(*e[i], *e[(i + 2) % 5]) for i in (0, 3, 1, 4, 2)]
    area = abs(sum((corners[k].conjugate() * corners[(k + 1) % 5]).imag for k in range(5))) / 2
    assert (full - hollow) / 64 == pytest.approx(area, rel=1e-2)


def test_pixel_values_are_exact(load_svg):
    svg = load_svg('<rect x="2.25" y="3" width="4" height="5.5" fill="#00ff00" fill-opacity=".5"/>')
    image = svg.render()[0].detach()
    red = image[0]
    assert red[3, 2] == pytest.approx(1 - 0.75 * 0.5) and red[4, 4] == pytest.approx(0.5)
    assert red[8, 4] == pytest.approx(1 - 0.5 * 0.5) and red[8, 6] == pytest.approx(1 - 0.5 * 0.25 * 0.5)
    assert (image[1] == 1).all() and red[9, 4] == 1 and red[4, 7] == 1


def test_render_is_deterministic_and_pure(load_svg):
    svg = load_svg('<g opacity=".5"><circle cx="12" cy="14" r="8" fill="#c33"/><rect x="9" y="3" width="9" '
                   'height="20" stroke="red"/></g>')
    before = {k: v.clone() for k, v in svg.state_dict().items()}
    first = svg.render(size=48)
    first.sum().backward()
    assert torch.equal(first, svg.render(size=48)) and first.shape == (1, 3, 48, 48)
    assert all(torch.equal(before[k], v) for k, v in svg.state_dict().items())


def test_gradients_are_deterministic_on_two_threads(load_svg):
    circles = (f'<circle cx="{k % 29}" cy="{k % 31}" r="9" stroke="red"/>' for k in range(60))
    svg = load_svg("".join(circles), size=128)      # enough edge pieces for torch to use both threads
    threads, grads = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(3):
        svg.zero_grad()
        svg.render().square().sum().backward()
        grads.append(svg.points.grad.clone())
    torch.set_num_threads(threads)
    assert all(torch.equal(grads[0], g) for g in grads)


def test_a_view_shifts_by_pixels(load_svg):
    svg = load_svg('<circle cx="15" cy="16" r="8.3" fill="#264"/>')
    assert torch.allclose(svg.render((2.0, -3.0))[..., 3:-3, 3:-3], svg.render()[..., 6:, 1:-5], atol=1e-5)
    views = [svg.sample_view(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert views[0] == views[1] and max(map(abs, views[0])) <= svg.jitter and type(views[0][0]) is float


def test_an_empty_drawing_is_white(load_svg):
    svg = load_svg("<defs/>")
    assert (svg.render() == 1).all() and svg.param_groups() == []


# ---- gradients

MASKED = {
    "masks": (
        '<mask id="m"><circle cx="14" cy="15" r="9.3" fill="#c93"/><rect x="8.2" y="12.1" width="30" height="7" '
        'fill="#fff" '
        'fill-opacity=".7"/></mask><mask id="a" style="mask-type:alpha"><circle cx="17" cy="14" r="9" '
        'opacity=".8"/></mask>'
        '<g mask="url(#m)" opacity=".8"><rect x="3.3" y="4.4" width="20" height="19" fill="#c33"/><path d="M8 8L30 '
        '12L11 27Z" '
        'mask="url(#a)"/></g>'),
    "a pattern": (
        '<pattern id="p" width="10" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(20)"><circle '
        'cx="5.1" cy="4.2" r="3" fill="#d33"/></pattern><circle cx="15.3" cy="14.2" r="11" fill="url(#p)" '
        'fill-opacity=".7"/>'),
    "many stops": '<linearGradient id="a" x2=".9">' + "".join(
        f'<stop offset="{k / 19:.3f}" stop-color="#{99 - k}{10 + k}{50 + k}" stop-opacity="{0.4 + k / 40}"/>'
        for k in range(20)) + '</linearGradient><circle cx="14" cy="15" r="9.3" fill="url(#a)"/>',
}


@pytest.mark.parametrize("name", [*GRADIENT_CASES, *MASKED])
def test_gradients_match_finite_differences(load_svg, name):
    pairs = gradient_pairs(load_svg((GRADIENT_CASES | MASKED)[name]))
    for exact, numeric in pairs.values():
        torch.testing.assert_close(exact, numeric, rtol=1e-3, atol=1e-3 * float(numeric.abs().max()))
    assert sum(len(exact) for exact, _ in pairs.values()) > 8


def test_float32_gradients_agree_with_float64(load_svg):
    body = "".join(GRADIENT_CASES[k] for k in ("groups and clips", "stroke, round", "square on pixel lines"))
    grads = []
    for svg in (load_svg(body), load_svg(body).double()):
        svg.render().square().sum().backward()
        grads.append(svg.points.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=2e-3)


def test_optimising_recovers_a_star(load_svg):
    star = "M16 3L20 12L30 12.5L22 19L25 29L16 23.5L7 29L10 19L2 12.5L12 12Z"
    svg = load_svg(f'<path fill="#e8a020" d="{star}"/>', size=64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = svg.render()
        svg.points += torch.randn(svg.points.shape, generator=generator)
        svg.colours += 0.1
    adam = torch.optim.Adam(svg.param_groups(points=0.5, colours=0.03))
    for _ in range(60):
        for group in adam.param_groups:
            group["lr"] *= 0.95
        adam.zero_grad()
        loss = (svg.render() - target).square().mean()
        loss.backward()
        adam.step()
        svg.project_()
    assert loss < 1e-5


# ---- every feature, against resvg

FEATURES = {                              # drawings on 100 x 100
    "path commands": (
        '<path d="M10 30a20 10 30 1130-5zM60 20A15 15 0 0 1 90 20A15 25 0 01 60 20" fill="olive"/><path '
        'd="m10 60q10-20 20 0t20 0t20 0v20h-60zM75.5.5.5-.2 12e0 3" fill="navy"/><path d="M60 40c5-10 10 '
        '10 15 0s10 10 15 0L90 55H60"/>'),
    "shapes": (
        '<polygon points="60,70 90,60 95 90-3,95"/><polyline points="2 2 8 20 20 2" fill="pink" '
        'stroke="red"/><line x1="0" y1="100" x2="100" y2="50%" stroke="hsl(120,50%,40%)" '
        'stroke-width="2%"/><rect x="40" y="5" width="30" height="20" rx="8" '
        'fill="rgb(10%,20%,90%)"/><rect x="75" y="5" width="20" height="30" rx="3" ry="12" '
        'fill="#08fc"/><circle cx="20" cy="40" r="9"/>'),
    "transforms": (
        '<g transform="translate(50 50) rotate(20) scale(.8 -.5)"><rect x="-40" y="-40" width="60" '
        'height="60" fill="teal"/><g transform="skewX(20) matrix(.5 .1 0 .5 3 4)"><circle r="50" '
        'fill="gold" stroke="black" stroke-width="9"/></g></g>'),
    "styles": (
        '<style>/* a { } */ .a{fill:#c0f;stroke:black} circle{fill:teal} #z{fill:orange} '
        '.b.a{fill:lime}</style><g style="stroke-width:3;color:#ff8800"><rect class="a" x="10" y="10" '
        'width="30" height="30" fill="red"/><circle cx="70" cy="25" r="15" fill="red"/><circle id="z" '
        'cx="25" cy="70" r="15"/><rect class="a b" x="55" y="55" width="30" height="20"/><rect x="55" '
        'y="80" width="30" height="10" fill="currentColor" style="fill-opacity:.5"/></g>'),
    "use and symbols": (
        '<defs><g id="g"><rect width="20" height="20"/><circle cx="10" cy="10" r="6" fill="red" '
        'opacity=".5"/></g><symbol id="s" viewBox="0 0 10 10"><circle cx="5" cy="5" r="7" '
        'fill="green"/></symbol></defs><use href="#g" x="5" y="5" fill="blue"/><use xlink:href="#g" '
        'transform="translate(60 10) rotate(30)" fill="orange" opacity=".6"/><use href="#s" x="10" '
        'y="50" width="30" height="40"/><svg x="55" y="55" width="40" height="30" viewBox="0 0 10 '
        '10"><path d="M-5 0L20 5L0 10z" fill="purple"/></svg>'),
    "opacity": (
        '<g opacity=".5"><circle cx="40" cy="50" r="30" fill="red"/><g opacity=".5"><circle cx="60" '
        'cy="50" r="30" fill="blue"/><rect x="30" y="30" width="20" height="50" '
        'fill="rgba(0,255,0,.5)"/></g></g><rect x="10" y="80" width="50" height="15" fill="gold" '
        'stroke="black" stroke-width="4" opacity=".4"/><rect x="70" y="80" width="20" height="15" '
        'fill="gold" stroke="black" stroke-width="6" paint-order="stroke"/>'),
    "gradients": (
        '<defs><linearGradient id="a" x1="0" y1="0" x2="1" y2="1"><stop offset="0" '
        'stop-color="red"/><stop offset="50%" stop-color="#0f0"/><stop offset=".5" '
        'stop-color="blue"/><stop offset="1" '
        'style="stop-color:gold;stop-opacity:.3"/></linearGradient><linearGradient id="b" '
        'xlink:href="#a" spreadMethod="reflect" x1=".3" x2=".5" y2="0"/><radialGradient id="c" href="#a" '
        'fx=".3" fy=".3" gradientTransform="rotate(20) scale(.8)"/><radialGradient id="d" href="#a" '
        'r="20" cx="75" cy="70" gradientUnits="userSpaceOnUse" spreadMethod="repeat"/></defs><rect x="5" '
        'y="5" width="40" height="30" fill="url(#a)"/><circle cx="75" cy="25" r="20" '
        'fill="url(#b)"/><rect x="5" y="50" width="40" height="45" rx="10" ry="20" fill="url(#c)" '
        'stroke="url(#a)" stroke-width="5"/><path d="M55 50H95V95Z" fill="url(#d)"/>'),
    "masks": (
        '<linearGradient id="g"><stop stop-color="#fff"/><stop offset="1" stop-color="red" stop-opacity=".5"/>'
        '</linearGradient><mask id="m"><circle cx="40" cy="40" r="35" fill="url(#g)"/></mask>'
        '<mask id="u" maskUnits="userSpaceOnUse" x="50" y="10" width="30" height="80">'
        '<path d="M45 5H95V95L60 60Z" fill="#9c3"/></mask><mask id="b" x=".1" y=".2" width=".6" '
        'height=".7" maskContentUnits="objectBoundingBox" mask="url(#u)"><circle cx=".5" cy=".5" r=".5" fill="#fff"/>'
        '</mask>'
        '<mask id="a" style="mask-type:alpha"><rect x="5" y="60" width="40" height="30" rx="9" opacity=".6"/></mask>'
        '<g mask="url(#m)"><rect x="10" y="10" width="40" height="50" fill="blue"/>'
        '<circle cx="50" cy="30" r="20" stroke="red" stroke-width="9"/></g>'
        '<rect x="40" y="20" width="50" height="70" fill="teal" mask="url(#b)"/>'
        '<rect y="55" width="60" height="60" fill="#a3c" mask="url(#a)"/>'),
    "clip paths in units of a group's box": (
        '<clipPath id="c" clipPathUnits="objectBoundingBox"><circle cx=".5" cy=".5" r=".5"/></clipPath>'
        '<g clip-path="url(#c)" transform="rotate(9)"><path d="M20 10C90 -20 90 90 30 60Z" fill="teal"/>'
        '<rect x="30" y="50" width="50" height="30" transform="rotate(20 30 50)" fill="red"/></g>'
        '<rect x="10" y="70" width="20" height="20" clip-path="url(#c)"/>'),
    "clip paths": (
        '<clipPath id="a"><circle cx="40" cy="40" r="25"/><rect x="50" y="50" width="30" '
        'height="40"/></clipPath><clipPath id="b" clip-path="url(#a)"><path clip-rule="evenodd" d="M5 '
        '5H95V95H5ZM30 30V70H70V30Z"/></clipPath><clipPath id="c" '
        'clipPathUnits="objectBoundingBox"><path d="M.5 0L1 1H0Z"/></clipPath><g clip-path="url(#b)" '
        'opacity=".7"><rect width="100" height="60" fill="red"/><rect y="40" width="100" height="60" '
        'fill="blue"/></g><rect x="65" y="5" width="30" height="30" clip-path="url(#c)" fill="teal"/>'),
    "patterns": (
        # resvg rounds tiles to whole pixels, so these are whole
        '<pattern id="p" width="12.5" height="6.25" patternUnits="userSpaceOnUse" '
        'patternTransform="translate(3.125 0)">'
        '<circle cx="5" cy="4" r="3" fill="#d00"/><path d="M0 0L10 8" stroke="#06c"/></pattern>'
        '<pattern id="q" href="#p" x="3.125" viewBox="0 0 20 20" patternTransform="scale(2)"/>'
        '<circle cx="40" cy="40" r="33" fill="url(#p)" fill-opacity=".7"/><path d="M55 55H95V95H60Z" fill="url(#q)"/>'
        '<path d="M5 90H50" stroke="url(#p)" stroke-width="12"/>'),
    "caps and joins": (
        '<g fill="none" stroke="#246" stroke-width="9"><path d="M10 10H80"/><path d="M10 25H80" '
        'stroke-linecap="round"/><path d="M10 40H80" stroke-linecap="square"/><path d="M92 10h0" '
        'stroke-linecap="round"/><path d="M92 40z" stroke-linecap="square"/><path d="M10 75L20 55L30 '
        '75L33 55" stroke-width="5"/><path d="M45 75L55 55L65 75" stroke-linejoin="round"/><path d="M75 '
        '75L85 55L95 75Z" stroke-linejoin="bevel" stroke-width="4"/><path d="M10 95C10 75 50 115 40 '
        '85S90 105 90 85" stroke-width="4"/></g>'),
    "dashes": (
        '<path d="M10 10H90V90H10Z" fill="none" stroke="#333" stroke-width="6" stroke-dasharray="13 7 '
        '4"/><circle cx="50" cy="55" r="25" fill="none" stroke="red" stroke-width="5" '
        'stroke-linecap="round" stroke-dasharray="10" stroke-dashoffset="4"/><path d="M20 22L80 22" '
        'stroke="blue" stroke-width="4" stroke-linecap="round" stroke-dasharray="0 8"/>'),
}


def resvg(text, size, finer=4):
    """resvg's picture, rendered larger and averaged because it takes few samples of an edge."""
    return resvg_render(text, size, finer)


def pixels(svg, size):
    with torch.no_grad():
        return svg.render(size=size)[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("name", FEATURES)
def test_features_render_as_in_resvg(load_svg, name):
    view = 'viewBox="0 0 100 100"'
    finer = 1 if name == "gradients" else 4       # a hard stop is a step in both, sampled once per pixel
    own = pixels(load_svg(FEATURES[name], view), 256)
    other = resvg(svg_text(FEATURES[name], view), 256, finer)
    assert psnr(own, other) > 44
    means = [x.reshape(32, 8, 32, 8, 3).mean((1, 3)) for x in (own, other)]
    assert np.abs(means[0] - means[1]).max() < 0.03       # only edge pixels differ, no area does


@pytest.mark.parametrize("attributes", [
    'width="100" height="100" viewBox="0 0 40 20"', 'width="100" height="100" viewBox="0 0 40 20" '
    'preserveAspectRatio="xMaxYMin slice"', 'viewBox="-5 3 20 20"', 'width="50" height="50"',
    'width="100" height="100" viewBox="0 0 20 40" preserveAspectRatio="none"'])
def test_viewbox_renders_as_in_resvg(load_svg, attributes):
    body = '<circle cx="20" cy="10" r="9" fill="brown"/><path d="M0 0L40 20" stroke="black"/>'
    own, other = pixels(load_svg(body, attributes), 128), resvg(svg_text(body, attributes), 128)
    assert psnr(own, other) > 44


def test_a_wide_picture_is_centred_and_cut_to_its_frame(load_svg):
    image = load_svg('<rect x="-9" y="-99" width="99" height="299"/>', 'viewBox="0 0 32 16"').render()[0, 0]
    assert (image[:8] == 1).all() and (image[24:] == 1).all() and (image[8:24] < 1e-6).all()


# ---- optimising

def random_steps(svg, steps=8):
    adam, generator = torch.optim.Adam(svg.param_groups()), torch.Generator().manual_seed(0)
    for _ in range(steps):
        adam.zero_grad()
        image = svg.render(svg.sample_view(generator))
        (image * torch.randn(image.shape, generator=generator)).sum().backward()
        adam.step()
        svg.project_()


@pytest.mark.parametrize("name", FEATURES)
def test_save_keeps_the_picture(load_svg, tmp_path, name):
    svg = load_svg(FEATURES[name], 'viewBox="0 0 100 100"', size=100)
    path = tmp_path / "saved.svg"
    svg.save(path)
    assert np.array_equal(pixels(SVG.load(path, size=100), 128), pixels(svg, 128))
    random_steps(svg)
    svg.save(path)
    size = 256 if name == "patterns" else 128
    edited = pixels(svg, size)
    assert psnr(edited, pixels(SVG.load(path, size=100), size)) > 55    # colours are in 8 bits
    assert psnr(edited, resvg(path.read_text(), size, 1 if name == "gradients" else 4)) > 40


def test_state_dict_is_bit_exact(load_svg):
    body = FEATURES["gradients"] + FEATURES["dashes"]
    svg, fresh = (load_svg(body, 'viewBox="0 0 100 100"', size=64) for _ in "ab")
    random_steps(svg, 2)
    fresh.load_state_dict(svg.state_dict())
    assert torch.equal(svg.render(), fresh.render())


def test_param_groups_have_their_rates_and_projection_restores_ranges(load_svg):
    svg = load_svg(f'<linearGradient id="a">{STOPS}</linearGradient>'
                   '<rect width="9" height="9" fill="url(#a)"/><rect width="5" height="5" stroke="red"/>')
    groups = {g["name"]: g["lr"] for g in svg.param_groups(points=0.4, colours=0.0)}
    assert groups == dict(points=0.4, colours=0.0, stop_colours=0.0, opacities=0.0, stop_offsets=0.0,
                          stroke_widths=0.05)
    assert [g["name"] for g in svg.param_groups(colours_only=True)] == ["colours", "stop_colours"]
    with torch.no_grad():
        for p in svg.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 3)
    svg.project_()
    for name in ("colours", "opacities", "stop_colours", "stop_offsets"):
        assert getattr(svg, name).min() >= 0 and getattr(svg, name).max() <= 1
    assert (svg.stop_offsets.diff() >= 0).all() and (svg.stroke_widths >= 0).all()


def test_points_are_pixels_under_any_transform(load_svg):
    body = '<g transform="scale(.01)"><rect x="400" y="600" width="1200" height="1600"/></g>'
    svg = load_svg(body, size=64)
    before = darkness(svg)
    with torch.no_grad():
        svg.points[:, 0] += torch.where(svg.points[:, 0] > svg.points[:, 0].mean(), 1.0, 0.0)
    assert darkness(svg) - before == pytest.approx(32, rel=1e-4)      # a pixel wider over its 32 rows


# ---- command line

def test_the_command_line_reports_failures_and_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)         # restores what the command line replaces
    good, bad, out = tmp_path / "good.svg", tmp_path / "bad.svg", tmp_path / "out"
    good.write_text(svg_text('<rect width="16" height="32"/>'))
    bad.write_text(svg_text("<text>x</text>"))
    out.mkdir()
    (out / "bad.png").write_text("before")
    files = [str(bad), str(tmp_path / "none.svg"), str(good)]
    assert svg_raster.main([*files, "--out", str(out), "--size", "40"]) == 2
    said, errors = capsys.readouterr()
    assert said == "" and [line.startswith("error: ") for line in errors.splitlines()] == [True, True]
    assert "<text> is not supported" in errors and "none.svg: cannot be read" in errors
    image = np.asarray(Image.open(out / "good.png"))
    assert image.shape == (40, 40, 3) and image[:, :20].max() == 0 and image[:, 20:].min() == 255
    assert (out / "bad.png").read_text() == "before" and not Path(out / "none.png").exists()
    assert svg_raster.main([str(good), "--out", str(out)]) == 0
