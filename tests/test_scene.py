"""Cameras, the readers of scenes, the box of interest, ways around a scene and its export, the course of a fit."""
import json
import math
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import nerf_scene
from PIL import Image
from torch.testing import assert_close

from fit import Fit
from scene import (Camera, Representation, SceneError, View, contract, directions, evaluate, export, input_path, load_scene,
                   scene_files, sides, turntable, uncontract, visual_hull)


class Ball(Representation):
    """The ball of `nerf_scene` in closed form: its colour is its normal."""
    radius = 0.8

    def meet(self, camera):
        """Distance [R] along the rays to the ball, whether they meet it [R], and the normals [3,R] there."""
        rays_o, rays_d = camera.rays()
        along = (rays_o * rays_d).sum(0)
        root = along.square() - rays_o.square().sum(0) + self.radius ** 2
        distance = -along - root.clamp_min(0).sqrt()
        return distance, root > 0, (rays_o + distance * rays_d) / self.radius

    def rgb(self, camera):
        _, hit, normal = self.meet(camera)
        return torch.where(hit, normal / 2 + 0.5, self.background[:, None]).view(3, camera.height, camera.width)

    def depth(self, view=None, size=None):
        camera = self.camera(view, size)
        distance, hit, _ = self.meet(camera)
        return torch.where(hit, distance, 0).view(1, 1, camera.height, camera.width)


@pytest.fixture(scope="module")
def ball(nerf_sphere):
    return Ball(nerf_sphere)


# ---- cameras ------------------------------------------------------------------------------------------

def test_directions_follow_opengl_and_invert_opencv():
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


def test_square_is_the_central_crop():
    camera = Camera(torch.eye(4)[:3], (50.0, 50, 33, 25, 0, 0, 0, 0, 0, 0), 64, 48)
    square = camera.square(96)
    full = camera.directions().view(3, 48, 64)
    ours = torch.nn.functional.avg_pool2d(square.directions().view(1, 3, 96, 96), 2)[0]
    assert_close(ours / ours.norm(dim=0), full[:, :, 8:56], atol=2e-4, rtol=0)


# ---- reading scenes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("keys, focal", [
    ({"x_fov": 90, "fl_x": 99.0, "camera_angle_x": 1.0}, 12.0), ({"fl_x": 99.0, "camera_angle_x": 1.0}, 99.0),
    ({"camera_angle_x": math.pi / 2}, 12.0), ({"fl_x": 198.0, "w": 48.0, "h": 48.0}, 99.0)])
def test_focal_precedence(tmp_path, keys, focal):
    scene = load_scene(nerf_scene(tmp_path, views=4, split=False, **keys))
    assert scene.train[0].camera.lens[:2] == pytest.approx((focal, focal))


def test_intrinsics_of_frames_downscale_and_missing_frames(tmp_path):
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


def test_bounds_hold_the_object_and_honour_aabb_scale(tmp_path):
    scene = load_scene(nerf_scene(tmp_path / "a"))
    assert scene.centre.norm() < 0.15 and 0.8 < scene.half < 1.4
    capture = load_scene(nerf_scene(tmp_path / "b", alpha=False, split=False))
    assert capture.half == pytest.approx(4, rel=0.05)
    assert load_scene(nerf_scene(tmp_path / "c", alpha=False, split=False, aabb_scale=1)).half < 1.6


# ---- bad scenes ---------------------------------------------------------------------------------------

def nerf_broken(change):
    """A function that damages frame 1 of a scene's file."""
    def damage(folder):
        file = json.loads((folder / "transforms.json").read_text())
        change(file)
        (folder / "transforms.json").write_text(json.dumps(file))
    return damage


def nerf_matrix(file, value):
    file["frames"][1]["transform_matrix"] = value


def nerf_pose(x):
    return [[1, 0, 0, x], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]


@pytest.mark.parametrize("damage, message", [
    (nerf_broken(lambda f: f.update(frames=[])), "transforms.json: no frames in it"),
    (nerf_broken(lambda f: f.update(frames=[3])), "frame 0 has no file_path"),
    (nerf_broken(lambda f: nerf_matrix(f, [[math.nan] * 4] * 4)), "the transform_matrix of frame 1 is not finite"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0, 0, 0]] * 4)), "the transform_matrix of frame 1 is singular"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0], [0, 1]])), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: nerf_matrix(f, "no")), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: f.pop("camera_angle_x")), "frame 0 has no focal length"),
    (nerf_broken(lambda f: f.update(fl_x="wide")), "frame 0 has an intrinsic that is no number"),
    (nerf_broken(lambda f: f.update(fl_x=-3)), "not finite and positive"),
    (nerf_broken(lambda f: f.update(w=10, h=90)), "frame 0 is 24 x 24 pixels, the file says 10 x 90"),
    (nerf_broken(lambda f: f.update(camera_model="OPENCV_FISHEYE")), "camera model OPENCV_FISHEYE is not supported"),
    (nerf_broken(lambda f: f.update(aabb_scale="big")), "aabb_scale is no number"),
    (nerf_broken(lambda f: [x.update(file_path="gone.png") for x in f["frames"]]), "none of its 4 pictures is there"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose(1e10))), "frame 1 is not finite, or larger than 1e+07"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose(10 ** 400))), "frame 1 is not finite, or larger"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose(True))), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: nerf_matrix(f, nerf_pose("4"))), "frame 1 has no 4 x 4 transform_matrix"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 4], [0, 0, 0, 1]])), "frame 1 is no rotation"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]])), "no rotation"),
    (nerf_broken(lambda f: nerf_matrix(f, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 4, 1]])), "its last row must be"),
    (nerf_broken(lambda f: [x["transform_matrix"][0].__setitem__(3, x["transform_matrix"][0][3] + 9e6)
                            for x in f["frames"]]), "move the origin of the poses there"),
    (nerf_broken(lambda f: f.update(fl_x=True)), "frame 0 has an intrinsic that is no number, fl_x"),
    (nerf_broken(lambda f: f.update(cx="12")), "frame 0 has an intrinsic that is no number, cx"),
    (nerf_broken(lambda f: f.update(fl_x=10 ** 400)), "not finite and positive, or too large, fl_x"),
    (nerf_broken(lambda f: f.update(fl_x=1e5)), "a focal length of 4166.67 times its picture's side"),
    (nerf_broken(lambda f: f.update(cx=1e30)), "too large, cx"), (nerf_broken(lambda f: f.update(cy=500)), "optical axis"),
    (nerf_broken(lambda f: f.update(x_fov=180)), "an angle of view of 180 degrees, x_fov"),
    (nerf_broken(lambda f: f.update(x_fov=400.0)), "an angle of view of 400 degrees, x_fov"),
    (nerf_broken(lambda f: f.update(camera_angle_x=0)), "an angle of view of 0 degrees, camera_angle_x"),
    (nerf_broken(lambda f: f.update(k1=-50.0)), "distortion (k1 to k4, p1, p2) that cannot be undone"),
    (nerf_broken(lambda f: f.update(is_fisheye=True)), "a fisheye camera is not supported"),
    (nerf_broken(lambda f: f.update(aabb_scale=math.nan)), "aabb_scale is no number between"),
    (nerf_broken(lambda f: f.update(aabb_scale=-4)), "aabb_scale is no number between"),
    (nerf_broken(lambda f: f.update(aabb_scale=1e308)), "aabb_scale is no number between"),
    *((nerf_broken(lambda f, name=name: f["frames"][1].update(file_path=name)), message) for name, message in (
        ("train", "the file_path of frame 1, 'train', is no picture"), ("/", "the file_path of frame 1, '/', is no picture"),
        ("", "the file_path of frame 1, '', is no picture"), ("a" * 5000 + ".png", "File name too long"),
        ("a\0b.png", "is no picture"))),
    (lambda p: [Image.new("1", (6000, 6000)).save(p / "train" / f"{i}.png") for i in range(4)], "0.png: no readable picture: it has 6000 x 6000"),
    (lambda p: (p / "transforms.json").write_text("[]"), "transforms.json: no readable JSON: it holds a list"),
    (lambda p: (p / "transforms.json").write_text("[" * 10 ** 5), "transforms.json: no readable JSON"),
    (lambda p: (p / "transforms.json").write_text("{ nonsense"), "transforms.json: no readable JSON"),
    (lambda p: (p / "transforms.json").unlink(), "no transforms.json or transforms_train.json in it"),
    (lambda p: (p / "train" / "1.png").write_bytes(b"x"), "1.png: no readable picture"),
    (lambda p: Image.new("RGBA", (30, 20)).save(p / "train" / "1.png"), "1.png: 30 x 20 pixels, those before it have"),
])
def test_bad_scenes_are_one_line(tmp_path, damage, message):
    folder = nerf_scene(tmp_path, views=4, split=False, alpha="aabb" not in message)
    damage(folder)
    with pytest.raises(SceneError) as error:
        load_scene(folder)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_names_with_line_feeds_are_missing_in_one_line(tmp_path):
    folder = nerf_scene(tmp_path, views=4, split=False)
    nerf_broken(lambda f: f["frames"][1].update(file_path="a\nb.png"))(folder)
    with pytest.warns(UserWarning, match="1 of 4 pictures are missing, e.g. .*a b.png") as told:
        load_scene(folder)
    assert "\n" not in str(told[0].message)


def test_the_sum_of_the_pictures_is_bounded(tmp_path, monkeypatch):
    folder = nerf_scene(tmp_path, views=4, split=False)
    monkeypatch.setattr("scene.MOST", 4 * 12 * 12)
    with pytest.warns(UserWarning, match="reduced by 2, as by --downscale"):
        scene = load_scene(folder)
    assert scene.train[0].pixels.shape == (12, 12, 4)
    assert scene.fingerprint == load_scene(folder, downscale=2).fingerprint


def test_scaled_rotations_and_pictures_stored_on_their_side(tmp_path):
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
    (folder / "transforms.json").write_text(json.dumps(file))  # as it is stored, where no size says otherwise
    with pytest.warns(UserWarning, match="4 of its pictures say that they are to be turned"):
        assert load_scene(folder).train[0].pixels.shape == (24, 20, 4)


def test_the_hull_costs_the_same_for_any_lens_and_size():
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


def test_the_hull_is_that_of_max_pooling(nerf_sphere):
    views, centre, half, cells = nerf_sphere.train, nerf_sphere.centre, nerf_sphere.half, 24
    alive = torch.ones(cells ** 3, dtype=torch.bool)
    x = (torch.stack([axis.reshape(-1) for axis in torch.meshgrid(*[(torch.arange(cells) + 0.5) / cells * 2 - 1] * 3,
                                                                 indexing="ij")]).flip(0)) * half + centre[:, None]
    for view in views:  # every pixel that a cell may touch, one cell at a time
        fx, fy, cx, cy, *_ = view.camera.lens
        p = torch.linalg.inv(view.camera.pose[:, :3]) @ (x - view.camera.pose[:, 3:])
        depth = (-p[2]).clamp_min(1e-6)
        u, v = cx + fx * p[0] / depth, cy - fy * p[1] / depth
        inside = (p[2] < 0) & (u > 0) & (u < view.camera.width) & (v > 0) & (v < view.camera.height)
        radius = math.ceil(fx * half / cells * 3 ** 0.5 / depth[inside & alive].min().item())
        shown = torch.nn.functional.max_pool2d((view.pixels[None, None, ..., 3] > 0).float(), 2 * radius + 1, 1, radius)[0, 0]
        alive[inside] &= shown[v[inside].long(), u[inside].long()] > 0
    seen, hull = visual_hull(views, centre, half, 1, cells)
    assert torch.equal(hull, alive & seen) and 0 < hull.sum() < seen.sum()


def test_the_files_of_a_scene(tmp_path):
    folder = nerf_scene(tmp_path / "a")
    (folder / "neighbour.bin").write_bytes(bytes(100))
    found = scene_files(folder)
    assert found[0] == folder / "transforms_train.json" and len(found) == len(set(found)) == 2 + 12
    assert folder / "neighbour.bin" not in found and folder / "transforms_test.json" in found


def test_no_scene_at_all(tmp_path):
    with pytest.raises(SceneError, match="no such scene"):
        load_scene(tmp_path / "nowhere")
    with pytest.raises(SceneError, match="downscale must be at least 1, got 0"):
        load_scene(nerf_scene(tmp_path), downscale=0)


# ---- the box of interest ------------------------------------------------------------------------------

def test_contract_keeps_the_box_and_is_inverted():
    x = torch.randn(3, 500, dtype=torch.float64) * 20
    assert contract(x).abs().max() < 2
    assert_close(uncontract(contract(x)), x)
    near = torch.rand(3, 50) * 2 - 1
    assert torch.equal(contract(near), near)


# ---- representations ----------------------------------------------------------------------------------

def test_what_the_cameras_see_is_what_the_photographs_show(ball):
    psnr, views = evaluate(ball, ball.scene)
    assert views == 3 and psnr > 25  # only the edges differ: the photographs' pixels are averages
    photograph = ball.photograph(2, 24)
    assert (ball.render(2, 24) - photograph).abs().mean() < 0.02
    dataset = ball.dataset(24)
    assert (dataset.picture(2) - ball.render(2, 24)).abs().max() <= 0.5 / 255 + 1e-6


def test_a_view_is_a_number_a_camera_or_the_middle_one(ball):
    camera = ball.scene.train[4].camera
    assert ball.camera(4) is camera and ball.camera(camera) is camera
    assert (ball.camera(4, 10).width, ball.camera(4, 10).height) == (10, 10)
    position = torch.stack([v.camera.pose[:, 3] for v in ball.scene.train])
    nearest = (position - position.mean(0)).norm(dim=1).min()
    assert_close((ball.camera().pose[:, 3] - position.mean(0)).norm(), nearest)
    drawn = {ball.sample_view(torch.Generator().manual_seed(seed)) for seed in range(50)}
    assert drawn <= set(range(len(ball.scene.train))) and len(drawn) > 5


def test_turntable_input_path_and_export(ball, tmp_path):
    cameras = turntable(ball, 8, 20)
    for camera in cameras:  # they look at the middle, upright, from where the training cameras are
        position, back = camera.pose[:, 3], camera.pose[:, 2]
        toward = position - ball.scene.centre
        assert torch.dot(toward / toward.norm(), back) > 0.99 and camera.pose[2, 1] > 0.5
        assert_close(camera.pose[:, :3] @ camera.pose[:, :3].T, torch.eye(3), atol=1e-5, rtol=0)
    spread = torch.stack([c.pose[:, 3] for c in cameras])
    assert (spread - spread.mean(0)).norm(dim=1).min() > 2  # all the way round
    around = torch.stack([c.pose[:, 3] for c in sides(ball, 4, 20)])
    assert_close(around.diff(dim=0).norm(dim=1), (around[1] - around[0]).norm().expand(3))  # evenly spaced
    path = input_path(ball, 17, 20)
    assert_close(path[0].pose, ball.scene.train[0].camera.pose, atol=1e-5, rtol=0)
    assert_close(path[-1].pose, ball.scene.train[-1].camera.pose, atol=1e-5, rtol=0)
    export(ball, tmp_path, cameras)
    again = load_scene(tmp_path)
    assert len(again.train) == 7 and len(again.test) == 1
    view = again.train[0]  # the frame with number 1
    assert_close(view.camera.pose, cameras[1].pose)
    assert_close(torch.tensor(view.camera.lens), torch.tensor(cameras[1].lens))
    with torch.no_grad():
        wanted = ball.render(cameras[1])[0].permute(1, 2, 0)
    assert (view.pixels.float() / 255 - wanted).abs().max() <= 0.5 / 255 + 1e-6
    depth = np.array(Image.open(tmp_path / "depth" / "00001.png")).astype(float) / 1000
    assert depth[10, 10] == pytest.approx(4 - 0.8, abs=0.05)


# ---- the course of a fit ------------------------------------------------------------------------------

def course(scene, **options):
    """A Fit of one number, which each step lowers by Adam."""
    fit = Fit(scene, {}, **options)
    number = torch.nn.Parameter(torch.ones(()))
    return fit, number, fit.run(torch.optim.Adam([number]), torch.Generator(), lambda: {"number": number}, False)


def test_share_is_that_of_the_steps_or_of_the_time(nerf_sphere, monkeypatch):
    monkeypatch.setattr(time, "process_time", iter(range(10 ** 6)).__next__)  # a second a step
    for options, count in (({"steps": 7}, 7), ({"seconds": 5}, 5), ({"steps": 9, "seconds": 4}, 4), ({}, 60)):
        fit, _, steps = course(nerf_sphere, **options)
        shares = [fit.share(step) for step in steps]
        assert_close(torch.tensor(shares), torch.arange(count) / count)
        assert fit.step == count and fit.share(count) == 1


def test_a_loss_that_is_not_finite_ends_the_fit(nerf_sphere, tmp_path):
    fit, number, steps = course(nerf_sphere, steps=50, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(FloatingPointError, match="transforms_train.json: the loss is nan at step 20"):
        for step in steps:
            fit.report(number if step < 20 else number * math.nan, number)
    del steps
    assert not (tmp_path / "fit.pt").exists()


def test_a_checkpoint_of_something_else_is_refused(nerf_sphere, tmp_path):
    fit, _, steps = course(nerf_sphere, steps=2, checkpoint=tmp_path / "fit.pt")
    assert list(steps) == [0, 1] and [p.name for p in tmp_path.iterdir()] == ["fit.pt"]
    again, _, steps = course(nerf_sphere, steps=5, checkpoint=tmp_path / "fit.pt", names=("number",))
    assert list(steps) == [2, 3, 4] and again.step == 5
    with pytest.raises(SceneError, match="fit.pt: no readable checkpoint of a fit: 'nerf'"):
        course(nerf_sphere, checkpoint=tmp_path / "fit.pt", names=("nerf",))
    whole = torch.load(tmp_path / "fit.pt", weights_only=True)
    for key, value in {"step": -1, "spent": math.nan, "sizes": [], "optimiser": 3, "generator": torch.zeros(3)}.items():
        torch.save(whole | {key: value}, tmp_path / "fit.pt")
        with pytest.raises(SceneError, match=f"fit.pt: no readable checkpoint of a fit: '{key}' is wrong; delete it"):
            course(nerf_sphere, checkpoint=tmp_path / "fit.pt")
    for contents in ([], {}, 3):
        torch.save(contents, tmp_path / "fit.pt")
        with pytest.raises(SceneError, match="fit.pt: no readable checkpoint of a fit: .*; delete it to start anew"):
            course(nerf_sphere, checkpoint=tmp_path / "fit.pt")


def test_a_fit_of_no_time_is_refused_and_one_of_no_steps_ends(nerf_sphere):
    for seconds in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="the seconds of a fit must be positive"):
            course(nerf_sphere, seconds=seconds)
    assert list(course(nerf_sphere, steps=0)[2]) == []
