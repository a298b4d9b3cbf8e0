"""scene/: cameras, and reading scenes, good and bad ones."""
import json
import math
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import nerf_pose as sphere_pose
from conftest import nerf_scene
from PIL import Image
from test_scene_representation import Ball
from torch.testing import assert_close

from scene.box import visual_hull
from scene.cameras import Camera, directions
from scene.captures import SceneError
from scene.photographs import Pixels, View, undistorted
from scene.reading import load_scene, scene_files
from scene.representation import evaluate, export

# ---- cameras ------------------------------------------------------------------------------------------

def test_directions_have_opengl_axes_and_invert_opencv_distortion():
    lens = torch.tensor([50.0, 60, 32, 24, 0, 0, 0, 0, 0, 0])[:, None]
    d = directions(lens, torch.tensor([32.0, 82]), torch.tensor([24.0, 24]))
    assert_close(d, torch.tensor([[0, 2 ** -0.5], [0, 0], [-1, -2 ** -0.5]]))
    k1, k2, k3, k4, p1, p2 = 0.06, -0.08, 0.02, -0.01, -0.003, 0.002
    u, v = torch.meshgrid(torch.linspace(0, 64, 9).double(), torch.linspace(0, 48, 9).double(), indexing="xy")
    lens = torch.tensor([50.0, 60, 32, 24, k1, k2, k3, k4, p1, p2], dtype=torch.float64)[:, None]
    d = directions(lens, u.flatten(), v.flatten())
    x, y = d[0] / -d[2], -d[1] / -d[2]  # OpenCV: y down, looking along +z
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 ** 2 + k3 * r2 ** 3 + k4 * r2 ** 4
    assert_close(50 * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + 32, u.flatten())
    assert_close(60 * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + 24, v.flatten())


def test_the_square_of_a_camera_is_the_central_crop():
    camera = Camera(torch.eye(4)[:3], (50.0, 50, 33, 25, 0, 0, 0, 0, 0, 0), 64, 48)
    square = camera.square(96)
    full = camera.directions().view(3, 48, 64)
    ours = torch.nn.functional.avg_pool2d(square.directions().view(1, 3, 96, 96), 2)[0]
    assert_close(ours / ours.norm(dim=0), full[:, :, 8:56], atol=2e-4, rtol=0)


# ---- reading scenes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("keys, focal", [
    ({"x_fov": 90, "fl_x": 99.0, "camera_angle_x": 1.0}, 12.0), ({"fl_x": 99.0, "camera_angle_x": 1.0}, 99.0),
    ({"camera_angle_x": math.pi / 2}, 12.0), ({"fl_x": 198.0, "w": 48.0, "h": 48.0}, 99.0)])
def test_focal_lengths_have_an_order_of_precedence(tmp_path, keys, focal):
    scene = load_scene(nerf_scene(tmp_path, views=4, split=False, **keys))
    assert scene.train[0].camera.lens[:2] == pytest.approx((focal, focal))


def test_frames_may_have_own_intrinsics_and_missing_frames_warn(tmp_path):
    folder = nerf_scene(tmp_path, views=10, split=False, fl_x=30.0, fl_y=31.0, cx=11.0, k1=0.1, p2=0.01)
    file = json.loads((folder / "transforms.json").read_text())
    file["frames"][1] |= {"fl_x": 60.0, "cy": 9.0, "k1": 0.2}
    file["frames"][2]["file_path"] = "train/gone.png"
    (folder / "transforms.json").write_text(json.dumps(file))
    with pytest.warns(UserWarning, match="1 of 10 pictures are missing, e.g. .*gone.png"):
        scene = load_scene(folder, downscale=2)
    assert len(scene.test) == 2 and len(scene.train) == 7 and scene.train[0].pixels.shape == (12, 12, 4)
    assert scene.train[0].camera.lens == pytest.approx((30, 15.5, 5.5, 4.5, 0.2, 0, 0, 0, 0, 0.01))
    assert scene.train[1].camera.lens == pytest.approx((15, 15.5, 5.5, 6, 0.1, 0, 0, 0, 0, 0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_scene(folder / "transforms.json", 2).fingerprint == scene.fingerprint
        assert load_scene(folder).fingerprint != scene.fingerprint


def test_the_box_contains_the_object_and_honours_aabb_scale(tmp_path):
    scene = load_scene(nerf_scene(tmp_path / "a"))
    assert scene.centre.norm() < 0.15 and 0.8 < scene.half < 1.4
    capture = load_scene(nerf_scene(tmp_path / "b", alpha=False, split=False))
    assert capture.half == pytest.approx(4, rel=0.05)
    assert load_scene(nerf_scene(tmp_path / "c", alpha=False, split=False, aabb_scale=1)).half < 1.6


# ---- bad scenes ---------------------------------------------------------------------------------------

def nerf_broken(change, black=False, shape=(24, 24)):
    """A function that changes a scene's transforms.json and writes a white or black mask.png beside it."""
    def damage(folder):
        file = json.loads((folder / "transforms.json").read_text())
        change(file)
        (folder / "transforms.json").write_text(json.dumps(file))
        Image.new("L", shape, 0 if black else 255).save(folder / "mask.png")
    return damage


def nerf_matrix(file, value, frame=None):
    (frame or file["frames"][1])["transform_matrix"] = value


def nerf_pose(x):
    return [[1, 0, 0, x], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]


def opencv(rows):
    """A pose with OpenCV's axes instead of OpenGL's, or the reverse."""
    return [[x, -y, -z, t] for x, y, z, t in rows[:3]] + rows[3:]


@pytest.mark.parametrize("damage, message", [
    (nerf_broken(lambda f: f.update(frames=[])), "transforms.json: no frames in it"),
    (nerf_broken(lambda f: f.update(frames=[3])), "frame 0 has no file_path"),
    (nerf_broken(lambda f: nerf_matrix(f, [[math.nan] * 4] * 4)), "the transform_matrix of frame 1 is not finite"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0, 0, 0]] * 4)), "the transform_matrix of frame 1 is singular"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0], [0, 1]])), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: nerf_matrix(f, "no")), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: f.pop("camera_angle_x")), "frame 0 has no focal length"),
    (nerf_broken(lambda f: f.update(fl_x="wide")), "frame 0 has an intrinsic that is not a number"),
    (nerf_broken(lambda f: f.update(fl_x=-3)), "not finite and positive"),
    (nerf_broken(lambda f: f.update(w=10, h=90)), "frame 0 is 24 x 24 pixels, the file says 10 x 90"),
    (nerf_broken(lambda f: f.update(camera_model="OPENCV_FISHEYE")), "camera model OPENCV_FISHEYE is not supported"),
    (nerf_broken(lambda f: f.update(aabb_scale="big")), "aabb_scale is not a number"),
    (nerf_broken(lambda f: [x.update(file_path="gone.png") for x in f["frames"]]), "none of its 4 pictures exists"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose(1e10))), "frame 1 is not finite, or larger than 1e+07"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose(10 ** 400))), "frame 1 is not finite, or larger"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose(True))), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose("4"))), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 4], [0, 0, 0, 1]])),
     "frame 1 is not a rotation"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]])),
     "not a rotation"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 4, 1]])),
     "its last row must be"),
    (lambda p: (nerf_broken(lambda f: f.update(fl_x=2e4))(p), moved(p, (300.0, 0, 0))), "move the origin of the poses"),
    (nerf_broken(lambda f: f.update(fl_x=True)), "frame 0 has an intrinsic that is not a number, fl_x"),
    (nerf_broken(lambda f: f.update(cx="12")), "frame 0 has an intrinsic that is not a number, cx"),
    (nerf_broken(lambda f: f.update(fl_x=10 ** 400)), "not finite and positive, or too large, fl_x"),
    (nerf_broken(lambda f: f.update(fl_x=1e5)), "a focal length of 4166.67 times its picture's side"),
    (nerf_broken(lambda f: f.update(cx=1e30)), "too large, cx"),
    (nerf_broken(lambda f: f.update(cy=500)), "optical axis"),
    (nerf_broken(lambda f: f.update(x_fov=180)), "an angle of view of 180 degrees, x_fov"),
    (nerf_broken(lambda f: f.update(x_fov=400.0)), "an angle of view of 400 degrees, x_fov"),
    (nerf_broken(lambda f: f.update(camera_angle_x=0)), "an angle of view of 0 degrees, camera_angle_x"),
    (nerf_broken(lambda f: f.update(k1=-50.0)), "distortion (k1 to k4, p1, p2) that cannot be undone"),
    (nerf_broken(lambda f: f.update(is_fisheye=True)), "a fisheye camera (is_fisheye) is not supported"),
    (nerf_broken(lambda f: f["frames"][2].update(is_fisheye=True)),
     "a fisheye camera (is_fisheye) is not supported, undistort"),
    (nerf_broken(lambda f: f.update(equirectangular=True)), "an equirectangular camera (equirectangular) is not"),
    (nerf_broken(lambda f: f["frames"][2].update(latlong=1)), "an equirectangular camera (latlong) is not supported"),
    (nerf_broken(lambda f: f.update(ftheta_p0=0.1, ftheta_p1=1e-3)), "an f-theta camera (ftheta_p0) is not supported"),
    (nerf_broken(lambda f: [x.update(time=i) for i, x in enumerate(f["frames"])]), "its frames have 4 times: a moving"),
    (nerf_broken(lambda f: [x.update(is_bad=True) for x in f["frames"]]), "all of its frames are marked is_bad"),
    (nerf_broken(lambda f: f.update(test_frames={})), "test_frames is not a list of frames"),
    (nerf_broken(lambda f: f.update(test_frames=[3])), "test_filenames is not a list of names"),
    (nerf_broken(lambda f: f["frames"][2].update(camera_model="FISHEYE624")), "camera model FISHEYE624 is not"),
    (nerf_broken(lambda f: f.update(mask_path="masks/0.png")), "the mask of frame 0, "),
    (nerf_broken(lambda f: f["frames"][1].update(mask_path=3)),
     "the mask_path of frame 1 is not the name of a picture"),
    (nerf_broken(lambda f: f.update(mask_path="mask.png"), black=True), "its masks leave no pixel, e.g. "),
    (nerf_broken(lambda f: f.update(mask_path="mask.png"), shape=(24, 30)),
     "mask.png: a mask of 24 x 30 pixels for a picture of"),
    (nerf_broken(lambda f: f.update(ply_file_path=["a"])), "its ply_file_path is not the name of a file"),
    (nerf_broken(lambda f: f.update(ply_file_path="transforms.json")), "transforms.json: not a .ply: it has no header"),
    (nerf_broken(lambda f: f.update(train_filenames="train/0.png")), "train_filenames is not a list of names"),
    (nerf_broken(lambda f: f.update(test_filenames=["train/0.png", "train/9.png"])),
     "1 of its test_filenames are not frames, e.g. 'train/9.png'"),
    (nerf_broken(lambda f: f.update(test_filenames=[x["file_path"] for x in f["frames"]])), "leave no frame to fit"),
    (nerf_broken(lambda f: [nerf_matrix(f, opencv(x["transform_matrix"]), x) for x in f["frames"]]),
     "its cameras look away from the object: if they should look at it, the poses have OpenCV's axes"),
    (nerf_broken(lambda f: f.update(aabb_scale=math.nan)), "aabb_scale is not a number between"),
    (nerf_broken(lambda f: f.update(aabb_scale=-4)), "aabb_scale is not a number between"),
    (nerf_broken(lambda f: f.update(aabb_scale=1e308)), "aabb_scale is not a number between"),
    *((nerf_broken(lambda f, name=name: f["frames"][1].update(file_path=name)), message) for name, message in (
        ("train", "the file_path of frame 1, 'train', is not a picture"),
        ("/", "the file_path of frame 1, '/', is not a picture"),
        ("", "the file_path of frame 1, '', is not a picture"), ("a" * 5000 + ".png", "File name too long"),
        ("a\0b.png", "is not a picture"))),
    (lambda p: Image.new("1", (6000, 6000)).save(p / "train" / "0.png"),
     "0.png: no readable picture: it has 6000 x 6000"),
    (lambda p: (p / "transforms.json").write_text("[]"), "transforms.json: no readable JSON: it holds a list"),
    (lambda p: (p / "transforms.json").write_text("[" * 10 ** 5), "transforms.json: no readable JSON"),
    (lambda p: (p / "transforms.json").write_text("{ nonsense"), "transforms.json: no readable JSON"),
    (lambda p: (p / "transforms.json").unlink(), "no transforms.json or transforms_train.json in it"),
    (lambda p: (p / "train" / "1.png").write_bytes(b"x"), "1.png: no readable picture"),
    (lambda p: Image.new("RGBA", (30, 20)).save(p / "train" / "1.png"), "1.png: 30 x 20 pixels, those before it have"),
])
def test_bad_scenes_are_reported_in_one_line(tmp_path, damage, message):
    folder = nerf_scene(tmp_path, views=4, split=False, alpha="aabb" not in message)
    damage(folder)
    with pytest.raises(SceneError) as error:
        load_scene(folder)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_missing_name_with_a_line_feed_warns_in_one_line(tmp_path):
    folder = nerf_scene(tmp_path, views=4, split=False)
    nerf_broken(lambda f: f["frames"][1].update(file_path="a\nb.png"))(folder)
    with pytest.warns(UserWarning, match="1 of 4 pictures are missing, e.g. .*a b.png") as caught:
        load_scene(folder)
    assert "\n" not in str(caught[0].message)


def test_the_total_size_of_the_pictures_is_bounded(tmp_path, monkeypatch):
    folder = nerf_scene(tmp_path, views=4, split=False)
    monkeypatch.setattr("scene.reading.MOST", 4 * 12 * 12)
    with pytest.warns(UserWarning, match="reduced by 2, as by --downscale"):
        scene = load_scene(folder)
    assert scene.train[0].pixels.shape == (12, 12, 4)
    assert scene.fingerprint == load_scene(folder, downscale=2).fingerprint


def test_scaled_rotations_and_exif_rotations_are_normalised(tmp_path):
    folder = nerf_scene(tmp_path, views=4, split=False)
    whole = load_scene(folder)
    file = json.loads((folder / "transforms.json").read_text())
    for frame in file["frames"]:
        for row in frame["transform_matrix"][:3]:
            row[:3] = [x * 0.1 for x in row[:3]]
    (folder / "transforms.json").write_text(json.dumps(file))
    assert_close(load_scene(folder).train[0].camera.pose, whole.train[0].camera.pose)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):  # 24 x 24 becomes 24 x 20, stored as 20 x 24
        upright = Image.open(folder / "train" / f"{i}.png").crop((0, 0, 24, 20))
        upright.transpose(Image.ROTATE_90).save(folder / "train" / f"{i}.png", exif=exif)
    (folder / "transforms.json").write_text(json.dumps(file | {"w": 24, "h": 20}))
    turned = load_scene(folder)
    assert turned.train[0].pixels.shape == (20, 24, 4)
    assert torch.equal(turned.train[0].pixels, whole.train[0].pixels[:20])
    (folder / "transforms.json").write_text(json.dumps(file))  # without a size in the file, as it is stored
    with pytest.warns(UserWarning, match="4 of its pictures have an EXIF rotation, which is ignored"):
        assert load_scene(folder).train[0].pixels.shape == (24, 20, 4)


def test_the_hull_takes_bounded_time_for_any_lens_and_size():
    pixels = torch.zeros(24, 400, 4, dtype=torch.uint8)
    pixels[8:16, 190:210] = 255
    for focal, shape in ((4.0, (400, 400)), (14000.0, (24, 400)), (300.0, (2000, 2000))):
        pixels = torch.zeros(*shape, 4, dtype=torch.uint8)
        pixels[shape[0] // 3:shape[0] // 2, shape[1] // 3:shape[1] // 2] = 255
        pose = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1.1]])
        lens = (focal, focal, shape[1] / 2, shape[0] / 2, 0, 0, 0, 0, 0, 0)
        started = time.process_time()
        visual_hull([View(Camera(pose, lens, shape[1], shape[0]), pixels, "a")], torch.zeros(3), 1.0, 1, 48)
        assert time.process_time() - started < 1


def test_the_hull_matches_max_pooling(nerf_sphere):
    views, centre, half, cells = nerf_sphere.train, nerf_sphere.centre, nerf_sphere.half, 24
    alive = torch.ones(cells ** 3, dtype=torch.bool)
    x = (torch.stack([axis.reshape(-1) for axis in torch.meshgrid(*[(torch.arange(cells) + 0.5) / cells * 2 - 1] * 3,
                                                                 indexing="ij")]).flip(0)) * half + centre[:, None]
    for view in views:  # a window of all pixels that any cell may touch
        fx, fy, cx, cy, *_ = view.camera.lens
        p = torch.linalg.inv(view.camera.pose[:, :3]) @ (x - view.camera.pose[:, 3:])
        depth = (-p[2]).clamp_min(1e-6)
        u, v = cx + fx * p[0] / depth, cy - fy * p[1] / depth
        inside = (p[2] < 0) & (u > 0) & (u < view.camera.width) & (v > 0) & (v < view.camera.height)
        radius = math.ceil(fx * half / cells * 3 ** 0.5 / depth[inside & alive].min().item())
        shown = (view.pixels[None, None, ..., 3] > 0).float()
        shown = torch.nn.functional.max_pool2d(shown, 2 * radius + 1, 1, radius)[0, 0]
        alive[inside] &= shown[v[inside].long(), u[inside].long()] > 0
    seen, hull = visual_hull(views, centre, half, 1, cells)
    assert torch.equal(hull, alive & seen) and 0 < hull.sum() < seen.sum()


def test_scene_files_lists_the_files_of_a_scene(tmp_path):
    folder = nerf_scene(tmp_path / "a")
    (folder / "neighbour.bin").write_bytes(bytes(100))
    found = scene_files(folder)
    assert found[0] == folder / "transforms_train.json" and len(found) == len(set(found)) == 2 + 12
    assert folder / "neighbour.bin" not in found and folder / "transforms_test.json" in found


def test_object_masks_may_be_white_or_one(tmp_path):
    """mask_path: white pixels are used, black ones are not, and a reduced pixel is used if all of it is white."""
    folder = nerf_scene(tmp_path, views=4, split=False, alpha=False, mask_path="mask.png")
    used = np.zeros((24, 24), np.uint8)
    used[:, 11:] = 1
    whole = load_scene(nerf_scene(tmp_path / "plain", views=4, split=False, alpha=False))
    assert whole.train[0].mask is None
    prints = set()
    for brightest in (1, 255):
        Image.fromarray(used * brightest).save(folder / "mask.png")
        view = load_scene(folder).train[0]
        assert torch.equal(view.mask, torch.from_numpy(used > 0)) and torch.equal(view.pixels, whole.train[0].pixels)
        assert load_scene(folder, 2).train[0].mask[:, 6:].all() and not load_scene(folder, 2).train[0].mask[:, :6].any()
        prints.add(load_scene(folder).fingerprint)
    assert len(prints) == 1 and whole.fingerprint not in prints
    assert folder / "mask.png" in scene_files(folder) and len(scene_files(folder)) == 6
    Image.fromarray(used.repeat(2, 0).repeat(2, 1) * 255).save(folder / "mask.png")  # at another size
    assert torch.equal(load_scene(folder).train[0].mask, view.mask)


def test_masked_pixels_are_not_sampled_measured_or_carved(tmp_path):
    folder = nerf_scene(tmp_path, views=9, split=False, mask_path="mask.png")
    used = np.full((24, 24), 255, np.uint8)
    used[8:20, 4:12] = 0
    Image.fromarray(used).save(folder / "mask.png")
    clean = load_scene(folder)
    for i in range(9):  # someone walks through the masked region
        rgba = np.array(Image.open(folder / "train" / f"{i}.png"))
        rgba[8:20, 4:12] = (255, 0, 255, 0)
        Image.fromarray(rgba).save(folder / "train" / f"{i}.png")
    scene = load_scene(folder)
    assert evaluate(Ball(scene), scene) == evaluate(Ball(scene), clean)
    pixels = Pixels(scene.train, "cpu")
    _, _, sampled = pixels(4000, torch.Generator().manual_seed(0))
    assert not ((sampled[:3] * 255).round().T == torch.tensor([255.0, 0, 255])).all(1).any()
    assert len(pixels.used) == len(scene.train) * (24 * 24 - 12 * 8)
    hulls = [visual_hull(s.train, clean.centre, clean.half, 1, 24)[1] for s in (scene, clean)]
    assert torch.equal(*hulls)
    assert torch.equal(scene.centre, clean.centre) and scene.half == clean.half


def test_views_with_a_black_mask_are_dropped(tmp_path):
    folder = nerf_scene(tmp_path, views=4, split=False)
    Image.new("L", (24, 24)).save(folder / "mask.png")
    nerf_broken(lambda f: f["frames"][1].update(mask_path="mask.png"), black=True)(folder)
    with pytest.warns(UserWarning, match="1 of its masks leave no pixel, e.g. .*mask.png: their pictures are dropped"):
        scene = load_scene(folder)
    assert [v.name for v in scene.train + scene.test] == ["train/2.png", "train/3.png", "train/0.png"]


@pytest.mark.parametrize("lists, train, test", [
    ({"train": [1, 2], "val": [0], "test": [3]}, [1, 2], [3]), ({"train": [1, 2], "val": [0, 3]}, [1, 2], [0, 3]),
    ({"train": [1, 2]}, [1, 2], [0, 3, 4]), ({"test": [2, 4]}, [0, 1, 3], [2, 4]), ({"val": [2]}, [0, 1, 3, 4], [2])])
def test_frames_are_split_by_name(tmp_path, lists, train, test):
    keys = {f"{key}_filenames": [f"./train/{i}.png" for i in numbers] for key, numbers in lists.items()}
    scene = load_scene(nerf_scene(tmp_path, views=5, split=False, **keys))
    assert [v.name for v in scene.train] == [f"train/{i}.png" for i in train]
    assert [v.name for v in scene.test] == [f"train/{i}.png" for i in test]


def test_a_view_that_is_fitted_is_not_held_out(tmp_path):
    names = [f"train/{i}.png" for i in range(5)]
    folder = nerf_scene(tmp_path, views=5, split=False, train_filenames=names[:4], test_filenames=names[3:])
    with pytest.warns(UserWarning, match="1 frames in train_filenames are also held out: they are fitted"):
        scene = load_scene(folder)
    assert [v.name for v in scene.test] == names[4:]


def test_windows_paths_byte_order_marks_and_missing_suffixes_are_read(tmp_path):
    folder = nerf_scene(tmp_path, views=5, split=False)
    wanted = load_scene(folder).fingerprint
    for i, end in enumerate((".JPG", ".jpeg", ".png", ".PNG", ".webp")):
        picture = Image.open(folder / "train" / f"{i}.png")
        (folder / "train" / f"{i}.png").unlink()
        picture.save(folder / "train" / f"{i}{end}", "PNG")  # the content of a file tells its format
    file = json.loads((folder / "transforms.json").read_text())
    for frame in file["frames"]:
        frame["file_path"] = frame["file_path"].replace("/", "\\")[:-4]
    (folder / "transforms.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(file).encode())
    scene = load_scene(folder)
    assert scene.fingerprint == wanted and scene.train[0].name == "train\\1"
    assert [p.name for p in scene_files(folder)[1:]] == ["0.JPG", "1.jpeg", "2.png", "3.PNG", "4.webp"]


def test_reduced_pictures_scale_the_cameras(tmp_path):
    folder = nerf_scene(tmp_path, views=4, split=False, fl_x=30.0, w=24, h=24)
    (folder / "train").rename(folder / "train_4")
    for i in range(4):
        Image.open(folder / "train_4" / f"{i}.png").reduce(4).save(folder / "train_4" / f"{i}.png")
    with pytest.raises(SceneError, match="none of its 4 pictures exists.*they are in train_4: use --images train_4"):
        load_scene(folder)
    scene = load_scene(folder, images="train_4")
    assert scene.train[0].camera.lens[:4] == (7.5, 7.5, 3, 3) and scene.train[0].pixels.shape == (6, 6, 4)


def test_an_opaque_alpha_channel_is_ignored(tmp_path):
    plain = load_scene(nerf_scene(tmp_path / "rgb", views=6, split=False, alpha=False))
    folder = nerf_scene(tmp_path / "rgba", views=6, split=False, alpha=False)

    def add_alpha(number, least):
        for i in range(6):
            picture = Image.open(folder / "train" / f"{i}.png").convert("RGBA")
            alpha = np.full((24, 24), 255, np.uint8)
            alpha[:4] = least if i == number else 255
            picture.putalpha(Image.fromarray(alpha))
            picture.save(folder / "train" / f"{i}.png")
    for least, channels in ((255, 3), (253, 3), (0, 4)):
        add_alpha(3, least)
        scene = load_scene(folder)
        assert scene.train[0].pixels.shape[2] == channels and scene.bounded == (channels == 4)
        assert (scene.fingerprint == plain.fingerprint) == (channels == 3)
    add_alpha(0, 0)  # in a held-out view
    assert load_scene(folder).bounded


# ---- origin and axes -------------------------------------------------------------------------------

def moved(folder, shift, axes=None):
    """Shift the scene in a folder, and change the axes of its poses by a function of the rows."""
    file = json.loads((folder / "transforms.json").read_text())
    for frame in file["frames"]:
        rows = frame["transform_matrix"] = (axes or list)(frame["transform_matrix"])
        for row, by in zip(rows[:3], shift, strict=True):
            row[3] += by
    (folder / "transforms.json").write_text(json.dumps(file))
    return folder


def test_map_coordinates_are_read_and_exported_precisely(tmp_path):
    """A capture in UTM coordinates is read as a shifted copy of one at zero, and exported in its own coordinates."""
    utm = (512345.25, 5412345.5, 431.0)
    plain = load_scene(nerf_scene(tmp_path / "plain", views=9, split=False, alpha=False))
    assert plain.origin == (0, 0, 0)
    scene = load_scene(moved(nerf_scene(tmp_path / "map", views=9, split=False, alpha=False), utm))
    away = torch.tensor(scene.origin, dtype=torch.float64) - torch.tensor(utm, dtype=torch.float64)
    assert away.norm() < 4  # the origin is the cameras' centre
    for ours, other in zip(scene.train, plain.train, strict=True):
        assert_close(ours.camera.pose[:, :3], other.camera.pose[:, :3])
        assert_close(ours.camera.pose[:, 3].double() + away, other.camera.pose[:, 3].double(), atol=2e-6, rtol=0)
    assert_close(scene.centre.double() + away, plain.centre.double(), atol=1e-5, rtol=0)
    assert scene.half == pytest.approx(plain.half, rel=1e-6)
    export(Ball(scene), tmp_path / "out", [v.camera for v in scene.train])
    again = load_scene(tmp_path / "out")
    file = json.loads((tmp_path / "map" / "transforms.json").read_text())
    written = json.loads((tmp_path / "out" / "transforms.json").read_text())
    for ours, theirs in zip(written["frames"], file["frames"][1:8], strict=True):
        assert_close(torch.tensor(ours["transform_matrix"], dtype=torch.float64),
                     torch.tensor(theirs["transform_matrix"], dtype=torch.float64), atol=2e-6, rtol=0)
    shift = torch.tensor(again.origin, dtype=torch.float64) - torch.tensor(scene.origin, dtype=torch.float64)
    assert_close(again.train[0].camera.pose[:, 3] + shift.float(), scene.train[1].camera.pose[:, 3], atol=1e-5, rtol=0)


def test_scenes_near_the_origin_are_not_moved(tmp_path):
    near = load_scene(moved(nerf_scene(tmp_path / "near", views=9, split=False, alpha=False), (300.0, 0, 0)))
    assert near.origin == (0, 0, 0) and near.train[0].camera.pose[0, 3] > 290
    far = load_scene(moved(nerf_scene(tmp_path / "far", views=9, split=False, alpha=False), (500.0, 0, 0)))
    assert far.origin[0] > 490
    assert load_scene(nerf_scene(tmp_path / "one", views=1, split=False)).origin == (0, 0, 0)


def test_outward_looking_cameras_and_panoramas_warn(tmp_path):
    folder = nerf_scene(tmp_path, views=9, split=False, alpha=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scene(folder)
    with pytest.warns(UserWarning, match="look away from their common place, as in a panorama.*OpenCV's axes .y down"):
        load_scene(moved(folder, (0, 0, 0), opencv))
    cloud = np.random.default_rng(0).normal(size=(500, 3))
    cloud = 9 * cloud / np.linalg.norm(cloud, axis=1, keepdims=True)
    write_cloud(folder / "walls.ply", cloud)
    nerf_broken(lambda f: f.update(ply_file_path="walls.ply"))(folder)
    with warnings.catch_warnings():  # the cloud lies in front of the cameras
        warnings.simplefilter("error")
        assert len(load_scene(folder).points) == 500


def inverted(rows):
    """A world-to-camera matrix instead of a pose, or the reverse."""
    return torch.linalg.inv(torch.tensor(rows, dtype=torch.float64)).tolist()


def test_world_to_camera_matrices_warn(tmp_path):
    """Also for an object off the origin and with OpenCV's axes, but not for cameras that stand apart or in a row."""
    for i, (alpha, shift, axes) in enumerate((
            (True, (0, 0, 0), inverted), (False, (0, 0, 0), inverted), (False, (0.4, -0.3, 0.2), inverted),
            (False, (0, 0, 0), lambda rows: inverted(opencv(rows))))):
        folder = moved(nerf_scene(tmp_path / str(i), views=9, split=False, alpha=alpha), shift)
        with pytest.warns(UserWarning, match="its cameras all stand in one place: are its poses world-to-camera"):
            load_scene(moved(folder, (0, 0, 0), axes))
    folder = nerf_scene(tmp_path / "panorama", views=9, split=False, alpha=False)
    with pytest.warns(UserWarning, match="its cameras all stand in one place"):
        load_scene(moved(folder, (0, 0, 0), lambda rows: [[*row[:3], 0.0] for row in rows[:3]] + rows[3:]))
    ahead = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]

    def rows(i):
        return [[*r[:3], (0.1 * i, 0, 5, 1)[k]] for k, r in enumerate(ahead)]
    for name, pose in (("apart", None), ("row", rows)):
        folder = nerf_scene(tmp_path / name, views=9, split=False, alpha=False)
        if pose:
            nerf_broken(lambda f, pose=pose: [nerf_matrix(f, pose(i), x) for i, x in enumerate(f["frames"])])(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_scene(folder)


def test_bad_frames_are_dropped_and_test_frames_held_out(tmp_path):
    folder = nerf_scene(tmp_path, views=6, split=False)

    def change(file):
        frames = file["frames"]
        frames[1]["is_bad"], frames[2]["is_bad"], frames[5]["is_bad"] = True, False, 1
        file.update(frames=frames[:4], test_frames=frames[4:])  # as in ScanNet++
        [frame.update(time=0.5) for frame in frames]
    nerf_broken(change)(folder)
    with pytest.warns(UserWarning, match="2 of 6 frames are marked is_bad: they are left out"):
        scene = load_scene(folder)
    assert [v.name for v in scene.train] == [f"train/{i}.png" for i in (0, 2, 3)]
    assert [v.name for v in scene.test] == ["train/4.png"]
    nerf_broken(lambda f: f.update(test_frames=["train/3.png"]))(folder)  # names of frames instead of frames
    with pytest.warns(UserWarning, match="1 of 4 frames are marked is_bad"):
        scene = load_scene(folder)
    assert [v.name for v in scene.train + scene.test] == [f"train/{i}.png" for i in (0, 2, 3)]


def test_captures_of_other_programs_are_refused_by_name(tmp_path):
    for i, (name, program, contents) in enumerate((
            ("poses_bounds.npy", "LLFF", b""), ("keyframes/corrected_cameras/0.json", "Polycam", b"{}"),
            ("mesh_info.json", "Polycam", b"{}"), ("rgbd/0.jpg", "Record3D", b""), ("a.r3d", "Record3D", b""),
            ("cameras.csv", "RealityCapture", b"#name,x,y,alt"),
            ("opensfm/reconstruction.json", "OpenDroneMap", b"[]"))):
        file = tmp_path / str(i) / name
        file.parent.mkdir(parents=True)
        file.write_bytes(contents)
        with pytest.raises(SceneError, match=f"a capture of {program} .*: convert it first, with nerf.* or COLMAP"):
            load_scene(tmp_path / str(i))
    (tmp_path / "table.csv").write_bytes(b"a,b")
    with pytest.raises(SceneError, match="no transforms.json or transforms_train.json"):
        load_scene(tmp_path)


# ---- clouds of points and lenses ----------------------------------------------------------------------

def write_cloud(path, points, colours=None, ascii=True):
    """Write a .ply in nerfstudio's layout, or a binary one without colours."""
    names = "xyz" if colours is None else ("x", "y", "z", "red", "green", "blue")
    head = ["ply", f"format {'ascii' if ascii else 'binary_little_endian'} 1.0", "comment a cloud",
            f"element vertex {len(points)}"]
    head += [*(f"property {'double' if n in 'xyz' else 'uint8'} {n}" for n in names), "end_header"]
    rows = (points if colours is None else np.concatenate((points, colours), 1).astype(object)).tolist()
    text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    body = text.encode() if ascii else np.asarray(points, "<f8").tobytes()
    path.write_bytes("\n".join([*head, ""]).encode() + body)


def test_the_cloud_of_a_transforms_file_is_read_in_its_coordinates(tmp_path):
    """Clouds have the coordinates of the poses; in nerfstudio's first releases, those before applied_transform."""
    applied = [[0.0, 1, 0, 0.5], [1, 0, 0, 0], [0, 0, -1, 3]]
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 3))
    points *= 0.8 / np.linalg.norm(points, axis=1, keepdims=True)
    colours = np.round(255 * (points / 1.6 + 0.5))
    folder = nerf_scene(tmp_path, views=9, split=False, alpha=False, ply_file_path="pc.ply", applied_transform=applied)
    write_cloud(folder / "pc.ply", points, colours.astype(int))
    scene = load_scene(folder)
    assert_close(scene.points, torch.from_numpy(points).float())
    assert_close(scene.colours, torch.from_numpy(colours / 255).float())
    assert 0.8 <= scene.half + scene.centre.abs().max() + 0.05 and scene.half < 1.1
    assert scene_files(folder)[-1] == folder / "pc.ply"
    matrix = np.array(applied)
    write_cloud(folder / "pc.ply", (points - matrix[:, 3]) @ matrix[:, :3], ascii=False)
    old = load_scene(folder)
    assert_close(old.points, scene.points) and old.colours is None and old.fingerprint != scene.fingerprint
    nerf_broken(lambda f: f.pop("applied_transform"))(folder)
    write_cloud(folder / "pc.ply", points + [0, 0, 500])
    with pytest.warns(UserWarning, match="pc.ply: the cameras see 0% of its points, which must be in other"):
        assert load_scene(folder).points is None
    (folder / "pc.ply").rename(folder / "other.ply")
    with pytest.warns(UserWarning, match="its ply_file_path, .*pc.ply, is missing: reading the scene without points"):
        assert load_scene(folder).points is None and folder / "pc.ply" not in scene_files(folder)
    (folder / "other.ply").rename(folder / "pc.ply")
    for matrix in ("x", [[1, 2]], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, math.nan, 0]]):
        nerf_broken(lambda f, matrix=matrix: f.update(applied_transform=matrix))(folder)
        with pytest.raises(SceneError, match="its applied_transform is no 3 x 4 matrix of numbers"):
            load_scene(folder)


def test_undistorted_photographs_match_a_pinhole_camera(tmp_path):
    """Splats render pinhole pictures, so they get undistorted photographs."""
    lens = (30.0, 31.0, 25.0, 24.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    pose = sphere_pose(0.4)[:3].float()
    pinhole = Camera(pose, lens, 50, 48)
    plain = load_scene(nerf_scene(tmp_path, views=4))
    ball = Ball(plain)
    ball.radius = 3.2  # fills the picture, so that only its colours are visible
    wanted = ball.rgb(pinhole)
    assert undistorted(plain) is plain
    for k1, k2, p1, p2 in ((-0.15, 0.02, 0.01, -0.01), (0.1, 0.0, 0.0, 0.0)):
        camera = Camera(pose, (*lens[:4], k1, k2, 0.0, 0.0, p1, p2), 50, 48)
        pixels = (ball.rgb(camera).permute(1, 2, 0) * 255).round().byte()
        view, = undistorted(replace(plain, train=[View(camera, pixels, "a")], test=[])).train
        assert view.camera == pinhole
        used = torch.ones(48, 50, dtype=torch.bool) if view.mask is None else view.mask
        inner = used[4:-4, 4:-4]
        assert inner.float().mean() > 0.95 and (view.mask is None or k1 > 0 or p1)
        before, after = ((picture - wanted).abs().mean(0)[used].quantile(0.99) for picture in (
            pixels.permute(2, 0, 1) / 255, view.picture()))
        assert after < 0.004 and before > 0.006  # half a step of 8 bits is 0.002


def test_a_missing_scene_is_refused(tmp_path):
    with pytest.raises(SceneError, match="no such scene"):
        load_scene(tmp_path / "nowhere")
    with pytest.raises(SceneError, match="downscale must be at least 1, got 0"):
        load_scene(nerf_scene(tmp_path), downscale=0)
