"""Whole frames: drawings, pictures and captures that are not square keep their own shape through an edit."""
import json

import numpy as np
import pytest
from conftest import nerf_scene
from PIL import Image
from torch.testing import assert_close

import run
from files.pictures import Frame
from prior import Prior
from scene.reading import load_scene
from scene.representation import Representation

FLAGS = ["--source", "a", "--target", "b", "--device", "cpu", "--steps", "2", "--refine", "0", "--fit-seconds", "0.1"]


@pytest.fixture
def encoded(monkeypatch, pipelines):
    """The sizes (width, height) of all pictures that the model encodes."""
    shapes, encode = set(), Prior.encode

    def spy(self, picture):
        shapes.add((picture.shape[3], picture.shape[2]))
        return encode(self, picture)
    monkeypatch.setattr(Prior, "encode", spy)
    monkeypatch.setattr(Prior, "_try", lambda self: None)
    return shapes


def wide_capture(folder, shape=(36, 24)):
    """A capture of wide photographs: those of nerf_scene with grey bars on the left and on the right."""
    nerf_scene(folder, views=6, split=False, alpha=False)
    file = json.loads((folder / "transforms.json").read_text())
    for frame in file["frames"]:
        path = folder / frame["file_path"]
        page = Image.new("RGB", shape, (90, 90, 90))
        page.paste(Image.open(path), ((shape[0] - 24) // 2, 0))
        page.save(path)
    focal = 12 / np.tan(file.pop("camera_angle_x") / 2)
    file |= {"fl_x": focal, "fl_y": focal, "cx": shape[0] / 2, "cy": shape[1] / 2, "w": shape[0], "h": shape[1]}
    (folder / "transforms.json").write_text(json.dumps(file))
    return folder


def test_a_drawing_that_is_not_square_keeps_its_shape(pipelines, tmp_path, encoded, small_runs):
    text = ("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 40 20' preserveAspectRatio='none'><rect width='40' "
            "height='20' fill='#c22'/><circle cx='20' cy='10' r='6' fill='#fc0'/></svg>")
    (tmp_path / "flag.svg").write_text(text)
    flags = ["--svg", str(tmp_path / "flag.svg"), "--model", str(pipelines["sd"]), *FLAGS[:-4]]
    assert run.main([*flags, "--out", str(tmp_path / "out")]) == 0 and encoded == {(32, 16)}
    source, result = (Image.open(tmp_path / "out" / f"{name}.png") for name in ("source", "result"))
    assert source.size == result.size == (128, 64)
    assert source.getpixel((0, 32)) == source.getpixel((127, 32)) == (204, 34, 34)  # no white bars
    assert 'viewBox="0 0 40 20"' in (tmp_path / "out" / "result.svg").read_text()
    encoded.clear()
    assert run.main([*flags, "--square", "--out", str(tmp_path / "square")]) == 0 and encoded == {(16, 16)}
    assert Image.open(tmp_path / "square" / "source.png").getpixel((32, 0)) == (255, 255, 255)


@pytest.mark.parametrize("flags", [(), ("--pixels",)])
def test_a_picture_that_is_not_square_keeps_its_shape_and_its_alpha(pipelines, tmp_path, encoded, small_runs, flags):
    alpha = Image.new("L", (60, 120), 255)
    alpha.paste(0, (0, 0, 60, 60))
    picture = Image.new("RGB", (60, 120), "tomato")
    picture.putalpha(alpha)
    picture.save(tmp_path / "tall.png")
    assert (
        run.main(
            [
                "--image",
                str(tmp_path / "tall.png"),
                "--model",
                str(pipelines["sd"]),
                *FLAGS[:-2],
                *flags,
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert encoded == {(16, 32)}
    result = Image.open(tmp_path / "out" / "result.png")
    assert result.mode == "RGBA" and result.size == (16, 32)
    assert_close(np.array(result.getchannel("A")), np.array(alpha.resize((16, 32), Image.BOX)))
    if flags:  # a decoder with random weights does not reproduce white
        assert Image.open(tmp_path / "out" / "source.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode, more", [("nerf", []), ("splat", ["--ball", "0", "0", "0", "1"])])
def test_a_capture_that_is_not_square_keeps_its_shape(pipelines, tmp_path, encoded, small_runs, mode, more):
    scene = wide_capture(tmp_path / "scene")
    flags = ["--mode", mode, "--scene", str(scene), "--model", str(pipelines["sd"]), *FLAGS, *more,
             "--refine", "2"]
    assert run.main([*flags, "--out", str(tmp_path / "out" / "edit")]) == 0
    assert encoded == {(24, 16), (16, 16)}  # the views, and the square sides of the last line's masks
    page = Image.open(tmp_path / "out" / "edit" / "sdedit-views.png")
    assert page.width > 36  # whole frames here, too
    encoded.clear()
    assert run.main([*flags, "--square", "--out", str(tmp_path / "out" / "square")]) == 0 and encoded == {(16, 16)}


def test_photographs_and_cameras_of_whole_frames_agree(tmp_path):
    """A frame holds the whole photograph, and its camera has the rays of the whole photograph's camera."""
    whole = Representation(load_scene(wide_capture(tmp_path / "scene", (40, 24))))
    frame = Frame(12, 4)
    camera, first = whole.camera(0, frame), whole.camera(0)
    assert (camera.width, camera.height) == (20, 12) and (first.width, first.height) == (40, 24)
    photograph = whole.photograph(0, frame)
    assert photograph.shape == (1, 3, 12, 20) and (photograph[0, :, 6, 0] * 255 - 90).abs().max() < 1
    corners = camera.directions().view(3, 12, 20)[:, ::11, ::19], first.directions().view(3, 24, 40)[:, ::23, ::39]
    middle = camera.directions().view(3, 12, 20).mean((1, 2)), first.directions().view(3, 24, 40).mean((1, 2))
    assert_close(middle[0] / middle[0].norm(), middle[1] / middle[1].norm(), atol=1e-6, rtol=0)
    assert (corners[0] - corners[1]).abs().max() < 0.02  # half a pixel nearer to the centre
    square = whole.camera(0, Frame(12, 4, True))
    assert (square.width, square.height) == (12, 12) and whole.photograph(0, Frame(12, 4, True)).shape == (1, 3, 12, 12)
    window = first.window(5, 7, 4)
    assert_close(window.directions().view(3, 4, 4), first.directions().view(3, 24, 40)[:, 7:11, 5:9])
