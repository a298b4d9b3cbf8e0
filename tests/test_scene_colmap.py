"""scene/colmap.py: COLMAP's text and binary models as scenes: cameras, points, damaged and unsupported models."""
import json
import math
import struct
import warnings

import numpy as np
import pytest
import torch
from conftest import nerf_scene
from PIL import Image
from torch.testing import assert_close

import run
from bench.capture import nearest, photograph, ring
from bench.capture import write as write_capture
from scene.cameras import turntable
from scene.captures import SceneError
from scene.colmap import MODELS, read_points
from scene.reading import load_scene, scene_files
from scene.representation import export
from splat import Splats

LENS = {"PINHOLE": (30.0, 31, 12.5, 11), "SIMPLE_PINHOLE": (30.0, 12.5, 11), "SIMPLE_RADIAL": (30.0, 12.5, 11, 0.1),
        "RADIAL": (30.0, 12.5, 11, 0.1, -0.05), "OPENCV": (30.0, 31, 12.5, 11, 0.1, -0.05, 0.01, -0.02)}
AS_KEYS = {"PINHOLE": (30, 31, 12.5, 11, 0, 0, 0, 0, 0, 0), "SIMPLE_PINHOLE": (30, 30, 12.5, 11, 0, 0, 0, 0, 0, 0),
           "SIMPLE_RADIAL": (30, 30, 12.5, 11, 0.1, 0, 0, 0, 0, 0),
           "RADIAL": (30, 30, 12.5, 11, 0.1, -0.05, 0, 0, 0, 0),
           "OPENCV": (30, 31, 12.5, 11, 0.1, -0.05, 0, 0, 0.01, -0.02)}


def quaternion(rotation):
    """wxyz of a rotation [3,3]: the axis from its antisymmetric part, the half angle from its trace."""
    cosine = (np.trace(rotation) - 1) / 2
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    angle = math.atan2(np.linalg.norm(axis) / 2, cosine)
    return np.array([math.cos(angle / 2), *(math.sin(angle / 2) * axis / np.linalg.norm(axis))])


def write_model(place, end, cameras, images, points=None):
    """Write a model to a folder. cameras: (number, model, width, height, parameters); images: (number, quaternion,
    translation, camera, name); points: (position, colour, error, length of its track)."""
    place.mkdir(parents=True, exist_ok=True)
    files = {}
    if end == "txt":
        def words(*values):
            return " ".join(map(str, values))
        files["cameras"] = "# cameras\n" + "".join(words(n, m, w, h, *p) + "\n" for n, m, w, h, p in cameras)
        files["images"] = "# images\n" + "".join(f"{words(n, *q, *t, c, name)}\n{'' if n % 2 else '1.5 2.5 -1'}\n"
                                                 for n, q, t, c, name in images)
        if points is not None:
            files["points3D"] = "# points\n" + "".join(words(i, *x, *rgb, e, *(["1 2"] * track)) + "\n"
                                                       for i, (x, rgb, e, track) in enumerate(points))
        files = {name: text.encode() for name, text in files.items()}
    else:
        files["cameras"] = struct.pack("<Q", len(cameras)) + b"".join(
            struct.pack(f"<IiQQ{len(p)}d", n, MODELS.index(m), w, h, *p) for n, m, w, h, p in cameras)
        files["images"] = struct.pack("<Q", len(images)) + b"".join(
            struct.pack("<I7dI", n, *q, *t, c) + name.encode() + b"\0" + struct.pack("<Q", n) + bytes(24 * n)
            for n, q, t, c, name in images)
        if points is not None:
            files["points3D"] = struct.pack("<Q", len(points)) + b"".join(
                struct.pack("<Q3d3BdQ", i, *x, *rgb, e, track) + bytes(8 * track)
                for i, (x, rgb, e, track) in enumerate(points))
    for name, data in files.items():
        (place / f"{name}.{end}").write_bytes(data)


def ball_points(count=300, seed=0):
    """Points on the ball of nerf_scene, coloured by their normals."""
    normal = np.random.default_rng(seed).normal(size=(count, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return [(tuple(0.8 * n), tuple(int(c) for c in np.round(255 * (n / 2 + 0.5))), 0.5, 4) for n in normal]


def colmap_scene(folder, end="txt", model="PINHOLE", turn=None, points=None, place="sparse/0", pictures="images",
                 **options):
    """Write nerf_scene's ball as a COLMAP model, pictures in `pictures`, the world turned by `turn` [3,3]."""
    nerf_scene(folder, split=False, **{"alpha": False, "views": 10} | options)
    file = json.loads((folder / "transforms.json").read_text())
    (folder / "train").rename(folder / pictures)
    (folder / "transforms.json").unlink()
    images = []
    for i, frame in enumerate(file["frames"]):
        pose = np.array(frame["transform_matrix"])[:3] * [1, -1, -1, 1]  # to OpenCV's axes
        pose = pose if turn is None else turn @ pose
        name = frame["file_path"].split("/")[1]
        images.append((i + 1, quaternion(pose[:, :3].T), -pose[:, :3].T @ pose[:, 3], 7, name))
    size = options.get("size", 24)
    cameras = [(7, model, size, size, LENS[model])]
    write_model(folder / place, end, cameras, images[::-1], ball_points() if points is None else points or None)
    return folder


TURN = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0], [0.48, 0.64, 0.6]])


# ---- the same cameras ---------------------------------------------------------------------------------

@pytest.mark.parametrize("end, place, model", [
    ("txt", "sparse/0", "PINHOLE"), ("bin", "sparse/0", "PINHOLE"), ("bin", "sparse", "SIMPLE_PINHOLE"),
    ("txt", ".", "RADIAL"), ("bin", "colmap/sparse/0", "SIMPLE_RADIAL"), ("bin", "sparse/0", "OPENCV"),
    ("txt", "sparse/0", "OPENCV")])
def test_a_model_has_the_cameras_of_the_same_transforms_file(tmp_path, end, place, model):
    names = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2")
    keys = dict(zip(names, AS_KEYS[model], strict=True))
    wanted = load_scene(nerf_scene(tmp_path / "a", views=10, alpha=False, split=False, **keys))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene = load_scene(colmap_scene(tmp_path / "b", end, model, place=place))
    assert [v.name for v in scene.train] == [v.name.split("/")[1] for v in wanted.train]
    assert [v.name for v in scene.test] == ["0.png", "8.png"] and not scene.bounded
    for ours, other in zip(scene.train + scene.test, wanted.train + wanted.test, strict=True):
        assert_close(ours.camera.pose, other.camera.pose, atol=1e-5, rtol=0)
        assert_close(torch.tensor(ours.camera.lens), torch.tensor(other.camera.lens), atol=1e-5, rtol=0)
        assert torch.equal(ours.pixels, other.pixels)
    assert_close(scene.centre, wanted.centre, atol=1e-5, rtol=0)
    assert scene.points.shape == scene.colours.shape == (300, 3)
    assert_close(scene.colours, scene.points / 1.6 + 0.5, atol=3e-3, rtol=0)
    # the box just contains the points
    assert 0.8 <= scene.half + (scene.centre.abs().max() + 0.05) and scene.half < 1.1 < wanted.half


def test_names_with_folders_blanks_and_capitals_are_sorted(tmp_path):
    folder = colmap_scene(tmp_path, "txt")
    text = (folder / "sparse" / "0" / "images.txt").read_text()
    for i in range(10):
        text = text.replace(f" {i}.png\n", f" cam {i % 2}/IMG_{9 - i}.PNG\n")
        (folder / "images" / f"cam {i % 2}").mkdir(exist_ok=True)
        (folder / "images" / f"{i}.png").rename(folder / "images" / f"cam {i % 2}" / f"IMG_{9 - i}.PNG")
    (folder / "sparse" / "0" / "images.txt").write_text("\ufeff" + text.replace("\n", "\r\n"), newline="")
    scene = load_scene(folder)
    assert [v.name for v in scene.test] == ["cam 0/IMG_1.PNG", "cam 1/IMG_6.PNG"]
    assert [v.name for v in scene.train] == [*(f"cam 0/IMG_{n}.PNG" for n in (3, 5, 7, 9)),
                                             *(f"cam 1/IMG_{n}.PNG" for n in (0, 2, 4, 8))]
    found = scene_files(folder)
    assert len(found) == 2 + 10 + 1 and [p.name for p in found[:2]] == ["cameras.txt", "images.txt"]
    assert found[-1] == folder / "sparse" / "0" / "points3D.txt"


def test_separate_cameras_and_reduced_pictures_are_read(tmp_path):
    folder = colmap_scene(tmp_path, "bin", pictures="photos")
    with pytest.raises(SceneError, match="none of its 10 pictures exists, e.g. .*images/0.png; --images names"):
        load_scene(folder)
    (folder / "images_2").mkdir()
    for i in range(10):
        Image.open(folder / "photos" / f"{i}.png").reduce(2).save(folder / "images_2" / f"{i}.png")
    with pytest.raises(SceneError, match="none of its 10 pictures .* they are in images_2: use --images images_2"):
        load_scene(folder)
    half, whole = load_scene(folder, images="images_2"), load_scene(folder, images=folder / "photos")
    assert half.train[0].pixels.shape == (12, 12, 3) and half.train[0].camera.lens[:4] == (15, 15.5, 6.25, 5.5)
    assert whole.train[0].camera.lens[:4] == (30, 31, 12.5, 11) and half.fingerprint != whole.fingerprint
    assert half.train[0].camera.lens == load_scene(folder, 2, images="photos").train[0].camera.lens
    data = bytearray((folder / "sparse" / "0" / "cameras.bin").read_bytes())
    other = struct.pack("<IiQQ3d", 2, 0, 24, 24, 40, 12, 12)
    (folder / "sparse" / "0" / "cameras.bin").write_bytes(struct.pack("<Q", 2) + other + data[8:])
    images = bytearray((folder / "sparse" / "0" / "images.bin").read_bytes())
    images[8 + 4 + 56:8 + 4 + 60] = struct.pack("<I", 2)  # of the first, which is 9.png
    (folder / "sparse" / "0" / "images.bin").write_bytes(images)
    assert [v.camera.lens[0] for v in load_scene(folder, images="photos").train] == [30] * 7 + [40]
    (folder / "photos" / "3.png").unlink()
    with pytest.warns(UserWarning, match="1 of 10 pictures are missing, e.g. .*photos/3.png"):
        assert len(load_scene(folder, images="photos").train) == 7


def test_a_turned_world_gives_the_same_scene(tmp_path):
    """The axes of COLMAP's world are arbitrary: the views, the box and the turntable turn with it."""
    plain = load_scene(colmap_scene(tmp_path / "plain", points=[]))
    turned = load_scene(colmap_scene(tmp_path / "turned", turn=TURN, points=[]))
    assert plain.points is None and turned.half == pytest.approx(plain.half, rel=1e-5)
    turn = torch.from_numpy(TURN).float()
    assert_close(turned.centre, turn @ plain.centre, atol=1e-5, rtol=0)
    ways = [turntable(Splats.start(scene, 20, 0, torch.Generator().manual_seed(0)), 6, 20) for scene in (plain, turned)]
    for a, b in zip(*ways, strict=True):
        assert_close(turn @ a.pose, b.pose, atol=1e-4, rtol=0)
        assert a.pose[2, 1] > 0.5  # up is taken from the cameras


# ---- points -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", ["txt", "bin"])
def test_points_of_false_matches_are_dropped(tmp_path, end):
    points = ball_points(200) + [((5.0, 5, 5), (1, 2, 3), 1.1, 9), ((6.0, 6, 6), (1, 2, 3), 0.5, 2)]
    write_model(tmp_path, end, [], [], points)
    found, colours = read_points(tmp_path / f"points3D.{end}")
    assert_close(torch.from_numpy(found), torch.tensor([x for x, *_ in points[:200]], dtype=torch.float64))
    assert_close(torch.from_numpy(colours) * 255, torch.tensor([c for _, c, *_ in points[:200]], dtype=torch.float64))
    write_model(tmp_path, end, [], [], points[-60:])  # too few to select from
    assert len(read_points(tmp_path / f"points3D.{end}")[0]) == 60
    write_model(tmp_path, end, [], [], [(x, c, -1.0, track) for x, c, _, track in points])  # unknown errors
    assert len(read_points(tmp_path / f"points3D.{end}")[0]) == 201


def test_points_written_by_3dgs_as_a_ply_are_read(tmp_path):
    folder = colmap_scene(tmp_path, points=[])
    lines = ["ply", "format ascii 1.0", "element vertex 300", *(f"property float {a}" for a in "xyz"),
             *(f"property uchar {c}" for c in ("red", "green", "blue")), "end_header"]
    rows = [" ".join(map(str, (*x, *rgb))) for x, rgb, *_ in ball_points()]
    (folder / "sparse" / "0" / "points3D.ply").write_text("\n".join([*lines, *rows, ""]))
    scene = load_scene(folder)
    assert_close(scene.points.norm(dim=1), torch.full((300,), 0.8))
    assert_close(scene.colours, scene.points / 1.6 + 0.5, atol=3e-3, rtol=0)


def test_splats_start_on_the_points(tmp_path):
    scene = load_scene(colmap_scene(tmp_path))
    splats = Splats.start(scene, 200, 1, torch.Generator().manual_seed(0))
    assert_close(splats.means.norm(dim=1), torch.full((200,), 0.8), atol=1e-5, rtol=0)
    assert_close(0.5 + 0.28209479 * splats.sh_dc, splats.means / 1.6 + 0.5, atol=3e-3, rtol=0)
    spacing = (4 * math.pi * 0.64 / 200) ** 0.5
    assert 0.5 < splats.log_scales.exp().median() / spacing < 1.2
    more = Splats.start(scene, 400, 1, torch.Generator().manual_seed(0))  # the rest are placed as without points
    assert len(more.means) == 400 and (more.means.norm(dim=1) - 0.8).abs().lt(1e-5).sum() == 300
    assert torch.isfinite(more.log_scales).all() and torch.isfinite(more.sh_dc).all()


def test_the_ray_traced_capture_is_a_consistent_model(tmp_path):
    """Its points lie on the surfaces that its rays meet, and project to the features of the views that see them."""
    scene = load_scene(write_capture(tmp_path, 9, 150))
    assert len(scene.train) == 7 and len(scene.test) == 2 and not scene.bounded and len(scene.points) > 50
    for view, camera in zip(scene.test, ring(9)[::8], strict=True):
        assert (view.camera.pose[:, 3] - camera.pose[:, 3]).norm() < 0.05
        turn = view.camera.pose[:, :3].T @ camera.pose[:, :3]
        assert 0 < (torch.trace(turn) - 3).abs() < 1e-3  # off by about a pixel
        assert (view.picture() - photograph(camera)).abs().max() < 0.51 / 255 + 1e-6
    way = scene.points - ring(9)[0].pose[:, 3]
    met, _, _ = nearest(ring(9)[0].pose[:, 3:].expand(3, len(way)), (way / way.norm(dim=1, keepdim=True)).T)
    assert ((met - way.norm(dim=1)).abs() < 0.1).float().mean() > 0.5  # the others are occluded in this view
    lines = (tmp_path / "sparse" / "0" / "images.txt").read_text().splitlines()
    points = {line.split()[0]: line.split() for line in (tmp_path / "sparse/0/points3D.txt").read_text().splitlines()}
    for i, features in enumerate(lines[1::2]):
        words = features.split()
        for at, number in enumerate(words[2::3]):
            track = points[number][8:]
            assert [str(i + 1), str(at)] in [track[k:k + 2] for k in range(0, len(track), 2)]


# ---- unusable models ------------------------------------------------------------------------------

def text(name, change):
    def damage(folder):
        file = folder / "sparse" / "0" / f"{name}.txt"
        file.write_text(change(file.read_text()))
    return damage


def row(line, word, value):
    """A function that replaces a word in a numbered line of a text."""
    def change(whole):
        lines = whole.split("\n")
        words = lines[line].split(" ")
        lines[line] = " ".join([*words[:word], *([] if value is None else [value]), *words[word + 1:]])
        return "\n".join(lines)
    return change


@pytest.mark.parametrize("damage, message", [
    (text("cameras", row(1, 1, "OPENCV_FISHEYE")), "cameras.txt: camera 7 has the model OPENCV_FISHEYE, which is not"),
    (text("cameras", row(1, 1, "WOBBLY")), "cameras.txt: camera 7 has the model WOBBLY, which is not supported"),
    (text("cameras", row(1, 4, None)), "cameras.txt, line 2: PINHOLE has 4 parameters, not 3"),
    (text("cameras", row(1, 2, "24.5")), "cameras.txt, line 2: invalid literal"),
    (text("cameras", row(1, 2, "0")), "image 1 is 24 x 24 pixels, the file says 0 x 24"),
    (text("cameras", row(1, 3, "48")), "image 1 is 24 x 24 pixels, the file says 24 x 48"),
    (text("cameras", row(1, 4, "nan")), "image 1 has an intrinsic that is not finite and positive, or too large, fl_x"),
    (text("cameras", row(1, 4, "-3")), "image 1 has a focal length"),
    (text("cameras", lambda s: "# none\n7 PINHOLE\n"), "cameras.txt, line 2: need CAMERA_ID MODEL WIDTH HEIGHT"),
    (text("cameras", row(1, 0, "8")), "images.txt: image 1, '0.png', has camera 7, which is not in cameras.txt"),
    (text("images", lambda s: "# nothing\n"), "images.txt: no images in it"),
    (text("images", row(1, 2, "nan")), "images.txt: the pose of image 10, '9.png', is not finite, or larger than 1e+"),
    (text("images", row(1, 5, "1e300")), "images.txt: the pose of image 10, '9.png', is not finite, or larger than"),
    (text("images", row(1, 1, "x")), "images.txt, line 2: could not convert string to float: 'x'"),
    (text("images", row(1, 9, None)), "images.txt, line 2: need IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"),
    (text("images", lambda s: "".join(line for line in s.splitlines(True) if len(line.split()) > 3)),
     "images.txt, line 2: the second line of an image must have three numbers"),
    (text("images", lambda s: " ".join(["1 0 0 0 0 0 0 0 7", "0.png\n"])), "quaternion has length 0, not 1"),
    (text("points3D", row(1, 1, "nan")), "points3D.txt: a point that is not finite, or further than 1e+07"),
    (text("points3D", row(1, 8, None)), "points3D.txt, line 2: need POINT3D_ID X Y Z R G B ERROR and a track"),
    (lambda p: (p / "sparse" / "0" / "images.txt").unlink(), "0: half a COLMAP model: cameras.txt, points3D.txt"),
    (lambda p: (p / "images" / "4.png").write_bytes(b"x"), "4.png: no readable picture"),
    (lambda p: Image.new("RGB", (30, 20)).save(p / "images" / "4.png"), "image 5 is 30 x 20 pixels, the file says 24"),
])
def test_damaged_models_are_reported_in_one_line(tmp_path, damage, message):
    folder = colmap_scene(tmp_path)
    damage(folder)
    with pytest.raises(SceneError) as error:
        load_scene(folder)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_truncated_and_overlong_binary_files_are_refused(tmp_path, name):
    folder = colmap_scene(tmp_path, "bin", points=ball_points(5))
    file = folder / "sparse" / "0" / f"{name}.bin"
    data = file.read_bytes()
    for cut in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        file.write_bytes(data[:cut])
        with pytest.raises(SceneError, match=f"{name}.bin: is truncated, or not a COLMAP file: {cut} bytes"):
            load_scene(folder)
    file.write_bytes(data + b"\0")
    with pytest.raises(SceneError, match=f"{name}.bin: is damaged, or not a COLMAP file: 1 bytes are left over"):
        load_scene(folder)
    file.write_bytes(b"\xff" * 64)  # the number of records is astronomical
    with pytest.raises(SceneError, match=f"{name}.bin: "):
        load_scene(folder)


@pytest.mark.parametrize("number, model", [(5, "OPENCV_FISHEYE"), (6, "FULL_OPENCV"), (10, "THIN_PRISM_FISHEYE"),
                                           (17, "EQUIRECTANGULAR"), (99, "number 99"), (-1, "number -1")])
def test_unsupported_cameras_of_binary_models_are_refused_by_name(tmp_path, number, model):
    folder = colmap_scene(tmp_path, "bin")
    file = folder / "sparse" / "0" / "cameras.bin"
    data = file.read_bytes()
    file.write_bytes(data[:12] + struct.pack("<i", number) + data[16:])
    with pytest.raises(SceneError, match=f"cameras.bin: camera 7 has the model {model}, which is not supported: und"):
        load_scene(folder)


@pytest.mark.parametrize("name, end", [("points3D", "bin"), ("images", "txt")])
def test_git_lfs_pointers_are_refused_by_name(tmp_path, name, end):
    folder = colmap_scene(tmp_path, end)
    (folder / "sparse" / "0" / f"{name}.{end}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(SceneError, match=f"{name}.{end}: is a Git LFS pointer, not the file itself: run git lfs pull"):
        load_scene(folder)


def test_a_nan_in_a_binary_model_is_refused(tmp_path):
    folder = colmap_scene(tmp_path, "bin")
    for name, at, message in (("points3D", 16, "points3D.bin: a point that is not finite"),
                              ("images", 12, "images.bin: the pose of image 10, '9.png', is not finite")):
        file = folder / "sparse" / "0" / f"{name}.bin"
        whole = file.read_bytes()
        file.write_bytes(whole[:at] + struct.pack("<d", math.nan) + whole[at + 8:])
        with pytest.raises(SceneError, match=message):
            load_scene(folder)
        file.write_bytes(whole)


def test_further_models_warn_and_a_folder_without_one_is_refused(tmp_path):
    folder = colmap_scene(tmp_path, "bin")
    write_model(folder / "sparse" / "1", "bin", [], [])
    with pytest.warns(UserWarning, match="sparse/0: this model is used, not those beside it: 1"):
        load_scene(folder)
    (folder / "transforms.json").write_text("{}")  # a transforms.json takes precedence
    with pytest.raises(SceneError, match="transforms.json: no frames in it"):
        load_scene(folder)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "images.txt").write_text("a list")
    with pytest.raises(SceneError, match="none: no transforms.json .* in it, and no COLMAP model in its sparse/0"):
        load_scene(tmp_path / "none")


# ---- the command line -----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["nerf", "splat"])
def test_the_command_line_fits_a_model(tmp_path, monkeypatch, capsys, mode):
    folder = colmap_scene(tmp_path / "ball", "bin", pictures="photos", size=12)
    flags = ["--mode", mode, "--scene", str(folder), "--images", "photos", "--fit-only", "--device", "cpu", "--out",
             str(tmp_path / "out" / "x")]
    assert run.main([*flags, "--fit-seconds", "0.2"]) == 0
    assert "test PSNR" in capsys.readouterr().out
    assert run.main([*flags[:4], *flags[6:], "--fit-seconds", "0.2"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py: error")]
    assert len(error) == 1 and "none of its 10 pictures exists" in error[0]


def test_an_export_keeps_the_axes_of_the_model(tmp_path):
    scene = load_scene(colmap_scene(tmp_path / "a", turn=TURN))
    splats = Splats.start(scene, 50, 0, torch.Generator().manual_seed(0))
    export(splats, tmp_path / "out", [v.camera for v in scene.train])
    again = load_scene(tmp_path / "out")
    assert_close(again.train[0].camera.pose, scene.train[1].camera.pose)
