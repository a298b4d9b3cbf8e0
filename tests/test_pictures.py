"""pictures.py: every kind of picture upright and with its greys, damaged and huge ones in one line or reduced."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

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
    if suffix != "tif":  # which Pillow turns by itself
        assert picture_size(tmp_path / f"a.{suffix}") == (stored.size, orientation)
        assert np.array_equal(read_picture(tmp_path / f"a.{suffix}", upright=False), stored)


def test_greys_of_16_bit_and_float_are_kept(tmp_path):
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


def test_palettes_animations_and_cmyk_as_they_are_seen(corners, tmp_path):
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
    wide = np.random.default_rng(0).integers(0, 255, (2100, 2500, 4), np.uint8)  # in strips as in one piece
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
def test_cut_and_damaged_pictures_are_one_line(corners, tmp_path, kind):
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


def test_formats_that_are_decoded_slowly_have_bounds_of_their_own(tmp_path):
    head = b"qoif" + struct.pack(">II", 2048, 1025) + b"\x03\x00"
    (tmp_path / "a.qoi").write_bytes(head + b"\xfe\xff\x00\x00" * 9)
    (tmp_path / "b.ppm").write_bytes(b"P3 2048 1025 255 " + b"9 " * 99)
    Image.new("L", (4096, 2049)).save(tmp_path / "c.jp2")
    for name, number in (("a.qoi", 2), ("b.ppm", 2), ("c.jp2", 8)):
        with pytest.raises(PictureError, match=f"{name}: .*, {number} million can be read of a .* of this kind"):
            read_picture(tmp_path / name)
    Image.new("L", (2048, 1025)).save(tmp_path / "d.ppm")
    assert read_picture(tmp_path / "d.ppm").size == (2048, 1025)


def test_a_picture_as_bytes_is_rounded_and_turned_around():
    picture = torch.tensor([0.0, 0.5, 1.0, 0.498, 0.502, 0.1]).view(3, 1, 2).requires_grad_()
    assert to_uint8(picture).tolist() == [[[0, 255, 128], [128, 127, 26]]]
    assert to_uint8(torch.stack([picture, picture])).shape == (2, 1, 2, 3)
