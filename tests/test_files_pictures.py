"""files/pictures.py: orientation, greys and colour profiles of all formats; damaged and huge pictures."""
import io
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from files.pictures import UPRIGHT, PictureError, picture_size, read_picture, to_uint8


@pytest.fixture(scope="module")
def corners():
    """A picture 30 x 20 with four corners of different colours."""
    picture = Image.new("RGB", (30, 20), "white")
    for at, colour in {(0, 0): "red", (15, 0): "lime", (0, 10): "blue"}.items():
        picture.paste(colour, (*at, at[0] + 15, at[1] + 10))
    return picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pictures_are_upright(corners, tmp_path, orientation, suffix):
    undo = {6: Image.ROTATE_90, 8: Image.ROTATE_270}.get(orientation, UPRIGHT.get(orientation))
    stored, exif = corners.transpose(undo) if undo is not None else corners, Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_picture(tmp_path / f"a.{suffix}"), corners)
    small = read_picture(tmp_path / f"a.{suffix}", downscale=2)
    assert small.size == (15, 10) and small.getpixel((0, 0)) == (255, 0, 0) and small.getpixel((14, 0)) == (0, 255, 0)
    if suffix != "tif":  # Pillow itself turns TIFF files
        assert picture_size(tmp_path / f"a.{suffix}") == (stored.size, orientation)
        assert np.array_equal(read_picture(tmp_path / f"a.{suffix}", upright=False), stored)


def test_16_bit_and_float_greys_are_kept(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, values in {"a.png": grey.astype(np.uint16) * 257, "b.tif": grey.astype(np.uint16) * 257,
                         "c.tif": grey.astype(np.float32) / 255, "d.tif": grey.astype(np.float32),
                         "e.tif": grey.astype(np.int32) * 257}.items():
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_picture(tmp_path / name), np.repeat(grey[..., None], 3, 2)), name
    for name, value in {"f.tif": np.nan, "g.tif": -1, "h.tif": 1e9}.items():
        Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / name)
        with pytest.raises(PictureError, match=f"{name}: no readable picture: its greys reach"):
            read_picture(tmp_path / name)


def test_palettes_animations_and_cmyk_read_as_they_look(corners, tmp_path):
    corners.convert("P", palette=Image.ADAPTIVE).save(tmp_path / "a.png")
    corners.save(tmp_path / "b.gif", save_all=True, append_images=[Image.new("RGB", corners.size)])
    for name in ("a.png", "b.gif"):
        assert np.array_equal(read_picture(tmp_path / name), corners)
    corners.convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert read_picture(tmp_path / "c.jpg").mode == "RGB"
    holes = corners.convert("RGBA")
    holes.putalpha(Image.linear_gradient("L").resize(corners.size))
    for name in ("d.png", "e.tif"):
        holes.save(tmp_path / name)
        assert np.array_equal(read_picture(tmp_path / name), holes)
    corners.convert("P").save(tmp_path / "f.png", transparency=0)
    assert read_picture(tmp_path / "f.png").mode == "RGBA"


def test_huge_pictures_are_reduced_or_refused(tmp_path):
    Image.new("L", (6000, 5000), 90).save(tmp_path / "a.jpg")
    small = read_picture(tmp_path / "a.jpg")
    assert small.size == (4096, 3413) and small.getpixel((9, 9)) == (90, 90, 90)
    Image.new("L", (5000, 3), 90).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png").size == (4096, 2)
    wide = np.random.default_rng(0).integers(0, 255, (2100, 2500, 4), np.uint8)  # read in strips, as if at once
    Image.fromarray(wide).save(tmp_path / "c.png", compress_level=1)
    whole = Image.fromarray(wide).convert("RGBa").resize((357, 300), Image.BOX).convert("RGBA")
    assert np.abs(np.array(read_picture(tmp_path / "c.png", 7), int) - np.array(whole, int))[..., 3].max() <= 1
    Image.new("1", (6000, 6000)).save(tmp_path / "d.png")
    for path, sides in ((tmp_path / "d.png", None), (tmp_path / "e.png", (2 ** 31 - 1, 2 ** 31 - 1))):
        if sides:
            data = (tmp_path / "d.png").read_bytes()
            head = b"IHDR" + struct.pack(">II", *sides) + data[24:29]
            path.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])
        with pytest.raises(PictureError, match=f"{path.name}: no readable picture: "):
            read_picture(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS",
                                  "ICNS", "IM"])
def test_truncated_and_damaged_pictures_are_reported_in_one_line(corners, tmp_path, kind):
    whole, rng, refused = io.BytesIO(), np.random.default_rng(0), 0
    corners.resize((32, 32)).convert("RGBA" if kind == "ICNS" else "RGB").save(whole, kind)
    for case in range(30):
        data = bytearray(whole.getvalue())
        if case < 10:
            data = data[:len(data) * case // 10]
        else:
            data[rng.integers(min(len(data), 100))] = rng.integers(256)
        (tmp_path / "a.png").write_bytes(data)
        try:
            assert read_picture(tmp_path / "a.png").mode in ("RGB", "RGBA")
        except PictureError as e:
            refused += 1
            assert str(e).startswith(f"{tmp_path / 'a.png'}: no readable picture: ") and "\n" not in str(e)
    assert refused >= 3
    (tmp_path / "folder.png").mkdir()
    for name in ("folder.png", "nothing.png", "x" * 300, "a\0b"):
        with pytest.raises(PictureError, match="no readable picture"):
            read_picture(tmp_path / name)


def test_slowly_decoded_formats_have_tighter_bounds(tmp_path):
    head = b"qoif" + struct.pack(">II", 2048, 1025) + b"\x03\x00"
    (tmp_path / "a.qoi").write_bytes(head + b"\xfe\xff\x00\x00" * 9)
    (tmp_path / "b.ppm").write_bytes(b"P3 2048 1025 255 " + b"9 " * 99)
    Image.new("L", (4096, 2049)).save(tmp_path / "c.jp2")
    for name, number in (("a.qoi", 2), ("b.ppm", 2), ("c.jp2", 8)):
        with pytest.raises(PictureError, match=f"{name}: .*, {number} million can be read of a .* of this kind"):
            read_picture(tmp_path / name)
    Image.new("L", (2048, 1025)).save(tmp_path / "d.ppm")
    assert read_picture(tmp_path / "d.ppm").size == (2048, 1025)


def test_to_uint8_rounds_and_moves_channels_last():
    picture = torch.tensor([0.0, 0.5, 1.0, 0.498, 0.502, 0.1]).view(3, 1, 2).requires_grad_()
    assert to_uint8(picture).tolist() == [[[0, 255, 128], [128, 127, 26]]]
    assert to_uint8(torch.stack([picture, picture])).shape == (2, 1, 2, 3)


# ---- colour profiles ----------------------------------------------------------------------------------

P3 = [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]  # to XYZ at D50
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]


def profile(space, tags, kind=b"mntr"):
    """An ICC profile, version 2, of a colour space such as b"RGB " with these tags, {name: bytes}."""
    body, table = b"", struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    white = struct.pack(">iii", 63190, 65536, 54061)
    head = struct.pack(">I4sI4s4s4s12x4s24xI12s", 0, b"test", 0x02400000, kind, space, b"XYZ ", b"acsp", 0, white)
    head = head.ljust(128, b"\0")
    whole = bytearray(head + table + body)
    whole[:4] = struct.pack(">I", len(whole))
    return bytes(whole)


def gamma(value):
    return struct.pack(">4s4xIH", b"curv", 1, round(value * 256))


def xyz(values):
    return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))


def rgb_profile(matrix, power):
    columns = zip(*matrix, strict=True)
    return profile(b"RGB ", {b"desc": b"desc" + bytes(90), b"wtpt": xyz((0.9642, 1, 0.8249)),
                             b"rTRC": gamma(power), b"gTRC": gamma(power), b"bTRC": gamma(power),
                             **dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, columns), strict=True))})


def as_srgb(linear):
    """Linear light in the primaries of sRGB, clipped and encoded: 0 .. 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def ramp():
    y, x = np.mgrid[:12, :16]
    return np.stack((40 + 10 * x, 60 + 9 * y, 200 - 8 * x), -1).astype(np.uint8)


def saved(path, picture, **options):
    picture.save(path, **options)
    return read_picture(path)


def test_colours_are_converted_to_srgb(tmp_path):
    own, pixels = rgb_profile(P3, 2.2), ramp()
    wanted = as_srgb((pixels / 255) ** 2.2 @ np.array(P3).T @ np.linalg.inv(SRGB).T)
    assert np.abs(wanted - pixels).mean() > 5
    picture, alpha = Image.fromarray(pixels), Image.linear_gradient("L").resize((16, 12))
    clear = picture.copy()
    clear.putalpha(alpha)
    for name, given, options in [("rgb.png", picture, {}), ("rgba.png", clear, {}), ("a.tif", picture, {}),
                                 ("p.png", picture.convert("P", palette=Image.ADAPTIVE, colors=256), {}),
                                 ("a.webp", picture, {"lossless": True})]:
        got = saved(tmp_path / name, given, icc_profile=own, **options)
        assert np.abs(np.asarray(got.convert("RGB"), float) - wanted).max() < 2.5, name
        assert got.mode == ("RGBA" if name == "rgba.png" else "RGB")
    assert np.array_equal(saved(tmp_path / "rgba.png", clear, icc_profile=own).getchannel("A"), alpha)
    grey = Image.fromarray(pixels[..., 0])  # three equal channels
    assert np.abs(np.asarray(saved(tmp_path / "grey.png", grey, icc_profile=own), float)
                  - as_srgb((pixels[..., :1] / 255) ** 2.2)).max() < 2.5
    huge = picture.resize((4200, 1500), Image.NEAREST)  # read strip by strip, and reduced
    got = saved(tmp_path / "huge.png", huge, icc_profile=own, compress_level=1)
    assert np.abs(np.asarray(got.resize((16, 12), Image.BOX), float) - wanted).mean() < 2.5


def test_grey_and_cmyk_profiles_are_applied(tmp_path):
    white = {b"wtpt": xyz((0.9642, 1, 0.8249))}
    pixels = ramp()[..., 0]
    wanted = as_srgb((pixels / 255) ** 1.4)
    own = profile(b"GRAY", white | {b"kTRC": gamma(1.4)})
    deep = Image.fromarray(pixels.astype(np.uint16) * 257)
    for name, given in [("l.png", Image.fromarray(pixels)), ("la.png", Image.fromarray(pixels).convert("LA")),
                        ("i.png", deep)]:
        got = saved(tmp_path / name, given, icc_profile=own).convert("RGB")
        assert np.abs(np.asarray(got, float) - wanted[..., None]).max() < 2.5, name
    assert np.array_equal(saved(tmp_path / "rgb.png", Image.fromarray(ramp()), icc_profile=own), ramp())  # not for RGB
    # cyan, magenta, yellow and black -> Lab: white, and mid-grey wherever there is ink
    cube = b"".join(b"\xff\x80\x80" if not corner else b"\x80\x80\x80" for corner in range(16))
    line = bytes(range(256))
    table = struct.pack(">4s4xBBBx9i", b"mft1", 4, 3, 2, *(65536 * (i % 4 == 0) for i in range(9)))
    table += 4 * line + cube + 3 * line
    press = bytearray(profile(b"CMYK", white | {b"A2B0": table}, b"prtr"))
    press[20:24], press[67] = b"Lab ", 1  # relative colorimetric: black is not mapped to black
    inks = np.zeros((4, 4, 4), np.uint8)
    inks[2:] = 255
    got = saved(tmp_path / "cmyk.tif", Image.fromarray(inks, "CMYK"), icc_profile=bytes(press))
    assert np.asarray(got)[0].min() > 250 and np.abs(np.asarray(got, int)[3] - 119).max() <= 3  # L* = 50
    assert np.asarray(saved(tmp_path / "plain.tif", Image.fromarray(inks, "CMYK")))[3].max() == 0


def test_trivial_and_damaged_profiles_change_nothing(tmp_path):
    picture = Image.fromarray(ramp())
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (own, own[:200], b"nothing", profile(b"Lab ", {})):
        assert np.array_equal(saved(tmp_path / "a.png", picture, icc_profile=icc), ramp())


def test_heic_and_git_lfs_pointers_are_named(tmp_path, monkeypatch):
    for i, brand in enumerate((b"heic", b"mif1", b"hevx")):
        (tmp_path / f"{i}.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(40))
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(PictureError, match=f"{i}.jpg: a HEIC picture: pip install pillow-heif to read it"):
            read_picture(tmp_path / f"{i}.jpg")
    called = []
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: called.append(1)))
    with pytest.raises(PictureError, match="of no known format"):
        read_picture(tmp_path / "0.jpg")
    assert called
    (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(PictureError, match="a.png: is a Git LFS pointer, not the file itself: run git lfs pull"):
        read_picture(tmp_path / "a.png")
