"""svg/images.py: embedded pictures against resvg; gradients of what surrounds them; saving; unsupported pictures."""
import base64
import io

import numpy as np
import pytest
import torch
from conftest import svg_text
from PIL import Image, ImageCms

from bench.svg import cosine_of, gradient_pairs, resvg_render
from image.figures import psnr
from svg.outline import SVGError
from svg_raster import SVG

SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 4), dtype=np.uint8))
Y, X = np.mgrid[:96, :128]
WAVES = Image.fromarray(np.stack([2 * X, 2 * Y, 128 + 100 * np.sin(X / 9) * np.cos(Y / 7)], 2).astype(np.uint8))


def uri(picture, kind="png", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def image(picture=SMALL, attributes='x="3" y="3" width="25" height="25"', **options):
    return f'<image {attributes} href="{uri(picture, **options)}"/>'


RECTANGLE = 'x="3" y="3" width="25" height="25"'
IN_MARKER = image(SMALL, 'width="8" height="6"')
SHARED = image(WAVES, 'id="i"')
PICTURES = {
    "enlarged": image(), "reduced": image(WAVES), "a JPEG": image(WAVES, kind="jpeg"),
    "a GIF": image(WAVES.quantize(64), kind="gif"), "a WebP": image(WAVES, kind="webp", lossless=True),
    "grey with alpha": image(WAVES.convert("LA")), "16 bits": image(Image.fromarray((X * 500).astype(np.uint16))),
    "cut to its rectangle": image(SMALL, f'{RECTANGLE} preserveAspectRatio="xMinYMid slice"'),
    "stretched": image(SMALL, f'{RECTANGLE} preserveAspectRatio="none"'),
    "sharp": image(SMALL, f'{RECTANGLE} style="image-rendering:pixelated"'),
    "its own size": image(SMALL, 'x="1" y="2" transform="scale(3)"'),
    "a width alone": image(SMALL, 'x="1" y="2" width="20"'),
    "turned, translucent": image(SMALL, 'width="20" height="15" transform="rotate(30) translate(9 -4)" opacity=".6"'),
    "clipped": f'<clipPath id="c"><circle cx="15" cy="15" r="8"/></clipPath><g clip-path="url(#c)">{image(WAVES)}</g>',
    "blurred": f'<filter id="f"><feGaussianBlur stdDeviation="1"/></filter><g filter="url(#f)">{image(WAVES)}</g>',
    "used twice": f'<defs>{SHARED}</defs><use href="#i" transform="scale(.1)"/>'
                  '<use href="#i" transform="translate(28 10) rotate(80) scale(.15)"/>',
    "in a marker": f'<marker id="m" markerWidth="8" markerHeight="6" refY="3" orient="auto">{IN_MARKER}</marker>'
                   '<path d="M3 3L20 20" stroke="#06c" stroke-width="2" marker-end="url(#m)"/>',
}
SQUARE = '<rect x="8.3" y="9.2" width="9" height="11" fill="#36c" fill-opacity=".7"/>'


def pixels(svg, size):
    with torch.no_grad():
        return svg.render(size=size)[0].permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_render_as_in_resvg_and_stay_in_the_saved_file(load_svg, tmp_path, name):
    body = PICTURES[name] + SQUARE
    finer = 1 if name in ("sharp", "blurred") else 4
    svg, other = load_svg(body), resvg_render(svg_text(body), 128, finer)
    assert psnr(pixels(svg, 128), other) > 40 and np.ptp(other) > 0.5
    with torch.no_grad():
        svg.points += 0.3 * torch.randn(svg.points.shape, generator=torch.Generator().manual_seed(0))
    svg.save(tmp_path / "saved.svg")
    text = (tmp_path / "saved.svg").read_text()
    assert text.count("data:image/") == body.count("data:image/")
    assert psnr(pixels(svg, 128), resvg_render(text, 128, finer)) > 38
    assert psnr(pixels(svg, 64), pixels(SVG.load(tmp_path / "saved.svg", size=32), 64)) > 60


@pytest.mark.parametrize("name", ["clipped", "blurred", "in a marker"])
def test_gradients_of_shapes_around_pictures_match_finite_differences(load_svg, name):
    for exact, numeric in gradient_pairs(load_svg(PICTURES[name] + SQUARE, size=20)).values():
        assert cosine_of(exact, numeric) > 0.9999


def test_a_picture_has_no_parameters(load_svg):
    svg = load_svg(image())
    assert not any(p.numel() for p in svg.parameters()) and svg.render().min() < 0.5


def test_a_strongly_reduced_picture_is_averaged(load_svg):
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 256)))
    svg = load_svg(image(stripes, 'width="32" height="32" preserveAspectRatio="none"'), size=16)
    assert svg.render().sub(0.5).abs().max() < 0.02


def test_colour_profiles_are_converted_to_srgb(load_svg):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    grey = Image.new("RGB", (4, 4), (200, 90, 40))
    assert torch.equal(load_svg(image(grey, icc_profile=profile.tobytes())).render(), load_svg(image(grey)).render())
    turned = Image.new("RGB", (4, 2), (200, 90, 40))
    exif = Image.Exif()
    exif[0x0112] = 6                      # 2 wide and 4 high once upright
    svg = load_svg(image(turned, 'width="32" height="32"', kind="jpeg", exif=exif))
    assert svg.render()[0, 1, 16, 2] == 1 and svg.render()[0, 1, 2, 16] < 0.5


def test_invisible_pictures_are_not_read(load_svg):
    for attributes in ('display="none"', 'visibility="hidden"', 'width="0" height="9"', ""):
        href = "a.png" if attributes else ""
        assert torch.all(load_svg(f'<image {attributes} href="{href}"/>').render() == 1)
    clip = f'<clipPath id="c">{image()}<rect width="9" height="9"/></clipPath><rect width="32" height="32" {{}}/>'
    assert load_svg(clip.format('clip-path="url(#c)"')).render().mean() > 0.9


REFUSED = {
    "<image> of another file, 'a.png'": '<image href="a.png"/>', "<image> of an SVG": '<image href="data:image/svg+xml,'
    '%3Csvg/%3E"/>', "<image>: no readable picture": '<image href="data:image/png;base64,iVBORw0KGgo"/>',
    "<image> without a readable picture": '<image href="data:image/png;base64,A"/>',
    "a picture in a pattern": f'<pattern id="p" width="1" height="1">{image()}</pattern><rect width="9" height="9" '
                              'fill="url(#p)"/>'}


@pytest.mark.parametrize("message", REFUSED)
def test_pictures_that_cannot_be_drawn_are_refused_by_name(load_svg, message):
    with pytest.raises(SVGError, match=message):
        load_svg(REFUSED[message])
    with pytest.warns(UserWarning, match=message):
        load_svg(REFUSED[message], skip_unsupported=True)


def test_the_total_size_of_pictures_is_bounded(load_svg, monkeypatch):
    monkeypatch.setattr("svg.images.MAX_PIXELS", 2 * 6 * 8 + 1)
    load_svg(image() + f"<g id='g'>{image()}</g>" + '<use href="#g"/>' * 5)
    with pytest.raises(SVGError, match="the pictures in <image> have more than"):
        load_svg(3 * image())
