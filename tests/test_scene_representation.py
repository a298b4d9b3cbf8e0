"""scene/representation.py, scene/box.py: the box of interest, camera paths, export; loop/fit.py: a fit's course."""
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from files.checkpoint import CheckpointError
from loop.fit import Course
from scene.box import contract, uncontract
from scene.cameras import input_path, sides, turntable
from scene.reading import load_scene
from scene.representation import Representation, evaluate, export, fit_report, mean_psnr


class Ball(Representation):
    """The ball of `nerf_scene` in closed form, coloured by its normals."""
    radius = 0.8

    def meet(self, camera):
        """Distance [R] along the rays to the ball, whether they hit it [R], and the normals [3,R] there."""
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


# ---- the box of interest ------------------------------------------------------------------------------

def test_contraction_keeps_the_box_and_is_invertible():
    x = torch.randn(3, 500, dtype=torch.float64) * 20
    assert contract(x).abs().max() < 2
    assert_close(uncontract(contract(x)), x)
    near = torch.rand(3, 50) * 2 - 1
    assert torch.equal(contract(near), near)


# ---- representations ----------------------------------------------------------------------------------

def test_the_cameras_reproduce_the_photographs(ball):
    psnr, views = evaluate(ball, ball.scene)
    assert views == 3 and psnr > 25  # only the edges differ: the photographs' pixels are averages
    photograph = ball.photograph(2, 24)
    assert (ball.render(2, 24) - photograph).abs().mean() < 0.02
    dataset = ball.dataset(24, ball.render)
    assert (dataset.picture(2) - ball.render(2, 24)).abs().max() <= 0.5 / 255 + 1e-6


def test_a_fit_that_fails_on_the_test_views_is_reported(ball):
    """Few views or wrong poses cause this; here the test views are photographs of another object."""
    scene = ball.scene
    line, = fit_report(ball, scene)
    assert line == f"training PSNR {mean_psnr(ball, scene.train):.1f} dB, 9 views" and float(line.split()[2]) > 25
    grey = replace(scene, test=[replace(v, pixels=torch.full_like(v.pixels, 128)) for v in scene.test])
    assert fit_report(ball, grey)[1:] == ["the training views are reproduced, the test views are not: too few views, "
                                          "or wrong poses"]
    assert len(fit_report(ball, replace(scene, test=[]))) == 1


def test_a_view_is_a_number_a_camera_or_by_default_the_middle_one(ball):
    camera = ball.scene.train[4].camera
    assert ball.camera(4) is camera and ball.camera(camera) is camera
    assert (ball.camera(4, 10).width, ball.camera(4, 10).height) == (10, 10)
    position = torch.stack([v.camera.pose[:, 3] for v in ball.scene.train])
    nearest = (position - position.mean(0)).norm(dim=1).min()
    assert_close((ball.camera().pose[:, 3] - position.mean(0)).norm(), nearest)
    drawn = {ball.sample_view(torch.Generator().manual_seed(seed)) for seed in range(50)}
    assert drawn <= set(range(len(ball.scene.train))) and len(drawn) > 5


def test_turntable_input_path_and_export_agree_with_the_cameras(ball, tmp_path):
    cameras = turntable(ball, 8, 20)
    for camera in cameras:  # they look at the centre, upright, from the height of the training cameras
        position, back = camera.pose[:, 3], camera.pose[:, 2]
        toward = position - ball.scene.centre
        assert torch.dot(toward / toward.norm(), back) > 0.99 and camera.pose[2, 1] > 0.5
        assert_close(camera.pose[:, :3] @ camera.pose[:, :3].T, torch.eye(3), atol=1e-5, rtol=0)
    spread = torch.stack([c.pose[:, 3] for c in cameras])
    assert (spread - spread.mean(0)).norm(dim=1).min() > 2  # a full circle
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

def course(scene, checks=None, **options):
    """A fit of a single number, which every step of Adam lowers: its Course, the number, the number of steps."""
    fit = Course(scene, {}, checks or {}, **options)
    number = torch.nn.Parameter(torch.ones(()))
    return fit, number, fit.run(torch.optim.Adam([number]), torch.Generator(), lambda: {"number": number}, False)


def test_the_share_follows_the_steps_or_the_time(nerf_sphere, monkeypatch):
    monkeypatch.setattr(time, "process_time", iter(range(10 ** 6)).__next__)  # a second a step
    for options, count in (({"steps": 7}, 7), ({"seconds": 5}, 5), ({"steps": 9, "seconds": 4}, 4), ({}, 60)):
        fit, _, steps = course(nerf_sphere, **options)
        shares = [fit.share(step) for step in steps]
        assert_close(torch.tensor(shares), torch.arange(count) / count)
        assert fit.step == count and fit.share(count) == 1


def test_a_non_finite_loss_ends_the_fit(nerf_sphere, tmp_path):
    fit, number, steps = course(nerf_sphere, steps=50, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(FloatingPointError, match="transforms_train.json: the loss is nan at step 20"):
        for step in steps:
            fit.report(number if step < 20 else number * math.nan, number)
    del steps
    assert not (tmp_path / "fit.pt").exists()


def test_a_file_that_is_not_a_checkpoint_of_a_fit_is_refused(nerf_sphere, tmp_path):
    fit, _, steps = course(nerf_sphere, steps=2, checkpoint=tmp_path / "fit.pt")
    assert list(steps) == [0, 1] and [p.name for p in tmp_path.iterdir()] == ["fit.pt"]
    again, _, steps = course(nerf_sphere, {"number": torch.is_tensor}, steps=5, checkpoint=tmp_path / "fit.pt")
    assert list(steps) == [2, 3, 4] and again.step == 5
    with pytest.raises(CheckpointError, match="fit.pt: no readable checkpoint of a fit: 'nerf'"):
        course(nerf_sphere, {"nerf": torch.is_tensor}, checkpoint=tmp_path / "fit.pt")
    whole = torch.load(tmp_path / "fit.pt", weights_only=True)
    for key, value in {"step": -1, "spent": math.nan, "sizes": [], "optimiser": 3, "generator": torch.zeros(3)}.items():
        torch.save(whole | {key: value}, tmp_path / "fit.pt")
        with pytest.raises(CheckpointError, match=f"fit.pt: no readable checkpoint of a fit: '{key}' is wrong; delete"):
            course(nerf_sphere, checkpoint=tmp_path / "fit.pt")
    for contents in ([], {}, 3):
        torch.save(contents, tmp_path / "fit.pt")
        with pytest.raises(CheckpointError, match="fit.pt: no readable checkpoint of a fit: .*; delete it"):
            course(nerf_sphere, checkpoint=tmp_path / "fit.pt")


def test_a_fit_needs_time_but_may_take_no_steps(nerf_sphere):
    for seconds in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="the seconds of a fit must be positive"):
            course(nerf_sphere, seconds=seconds)
    assert list(course(nerf_sphere, steps=0)[2]) == []
