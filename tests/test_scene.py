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
from scene import (Camera, Representation, SceneError, contract, directions, evaluate, export, input_path, load_scene,
                   sides, turntable, uncontract)


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
