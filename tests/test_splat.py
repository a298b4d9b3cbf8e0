"""splat.py: the tiles against every Gaussian at every pixel, the fit, and the edit's fields."""
import copy
import math
import time
from dataclasses import replace

import pytest
import torch
from conftest import SPLAT_SIZES, nerf_scene, splat_camera, splat_random
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from files.checkpoint import CheckpointError
from loop.optimiser import SteadyAdam
from scene.cameras import turntable
from scene.photographs import View
from scene.reading import load_scene
from scene.representation import evaluate, spherical_harmonics
from splat import ATTRIBUTES, Splats, Tiles, _Composite, project, quadratics, rotations


def dense_layers(splats, camera):
    """Every Gaussian at every pixel from front to back, independent of the tiles: order [N], depth [N], alpha [N,P]."""
    uv, depth, cov, _ = project(splats.means, splats.log_scales, splats.quaternions, camera, splats.near)
    v, u = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    d = torch.stack((u.flatten(), v.flatten())).to(uv)[:, None] - uv[:, :, None]  # [2,N,P]
    inverse = torch.linalg.inv(torch.stack((cov[0], cov[1], cov[1], cov[2]), 1).view(-1, 2, 2))
    power = -0.5 * torch.einsum("anp,nab,bnp->np", d, inverse, d)
    alpha = (splats.opacities.sigmoid()[:, None] * power.exp()).clamp(max=0.99)
    alpha = torch.where((alpha > 1 / 255) & (depth > splats.near)[:, None], alpha, 0)
    order = depth.argsort()
    return order, depth[order], alpha[order]


def splat_dense(splats, camera):
    """The picture [4,H,W] of `dense_layers`, by plain autograd."""
    order, _, alpha = dense_layers(splats, camera)
    rgb, after = splats.colours(camera)[order], torch.cumprod(1 - alpha, 0)
    before = torch.cat((torch.ones_like(after[:1]), after[:-1]))
    return torch.cat((rgb.T @ (before * alpha), after[-1:])).view(4, camera.height, camera.width)


# ---- rendering ----------------------------------------------------------------------------------------

def test_a_gaussian_has_its_known_integral(nerf_sphere):
    camera = splat_camera(64)
    sigma, opacity = 0.15, 0.8
    splats = Splats(nerf_sphere, torch.zeros(1, 3), torch.full((1, 3), math.log(sigma)),
                    torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([opacity]).logit(), torch.zeros(1, 3),
                    torch.zeros(1, 0, 3))
    picture, _ = splats.draw(camera)
    variance = (sigma * camera.lens[0] / 4) ** 2 + 0.3  # in square pixels, with the low-pass filter
    cut = 1 / 255 / opacity  # the share of the Gaussian's tail that is not drawn
    assert 1 - picture[3].min().item() == pytest.approx(opacity * math.exp(-0.25 / variance), abs=1e-5)
    assert (1 - picture[3]).sum().item() == pytest.approx(opacity * 2 * math.pi * variance * (1 - cut), rel=2e-3)
    assert_close(picture[:3], 0.5 * (1 - picture[3:]).expand(3, -1, -1))  # without harmonics the colour is grey


def test_a_rotated_needle_lies_along_its_axis(nerf_sphere):
    half = math.radians(30) / 2
    splats = Splats(nerf_sphere, torch.zeros(1, 3), torch.tensor([[0.3, 0.03, 0.03]]).log(),
                    torch.tensor([[math.cos(half), 0, 0, math.sin(half)]]) * 3, torch.tensor([3.0]), torch.zeros(1, 3),
                    torch.zeros(1, 0, 3))
    alpha = 1 - splats.draw(splat_camera(64))[0][3]
    v, u = torch.meshgrid(31.5 - torch.arange(64), torch.arange(64) - 31.5, indexing="ij")  # v up
    xx, xy, yy = ((alpha * p).sum().item() for p in (u * u, u * v, v * v))
    assert math.degrees(0.5 * math.atan2(2 * xy, xx - yy)) == pytest.approx(30, abs=0.5)
    assert_close(rotations(splats.quaternions)[:, 0, 0], torch.tensor([3 ** 0.5 / 2, 0.5, 0]))


@pytest.mark.parametrize("size, width, count", [(40, 40, 60), (33, 50, 60), (24, 24, 700)])
def test_tiles_match_every_gaussian_at_every_pixel(nerf_sphere, size, width, count):
    splats = splat_random(nerf_sphere, count).requires_grad_()
    camera = splat_camera(size, width)
    weighting = torch.randn(4, size, width, generator=torch.Generator().manual_seed(1))
    pictures, gradients = [], []
    for picture in (splats.draw(camera)[0], splat_dense(splats, camera)):
        pictures.append(picture.detach())
        gradients.append(torch.autograd.grad((picture * weighting).sum(), list(splats.parameters())))
    assert (pictures[0] - pictures[1]).abs().max() < 2e-4  # Gaussians behind the last 1e-4 of the light are skipped
    for (name, _), a, b in zip(splats.named_parameters(), *gradients, strict=True):
        assert (a - b).norm() < 2e-3 * b.norm(), name


def test_the_tiles_have_the_right_gradients(nerf_sphere):
    camera = splat_camera(12)
    splats = splat_random(nerf_sphere, 6, 0, spread=0.3, dtype=torch.float64)
    with torch.no_grad():
        splats.opacities[0] = 12.0  # clamped
        uv, depth, cov, _ = project(splats.means, splats.log_scales, splats.quaternions, camera, 0.1)
        tiles = Tiles(uv, depth, cov, splats.opacities.sigmoid(), camera, 0.1)
        quadratic = quadratics(uv, cov, logsigmoid(splats.opacities))
    colour = torch.rand(6, 3, dtype=torch.float64)
    assert len(tiles.index) > 6  # some lie in several tiles
    torch.autograd.gradcheck(lambda q, c: _Composite.apply(q, c, tiles),
                             (quadratic.requires_grad_(), colour.requires_grad_()), eps=1e-7, atol=1e-5)


def test_the_block_size_changes_nothing(nerf_sphere, monkeypatch):
    """The block size changes neither picture nor gradients, also behind opaque Gaussians."""
    splats, camera = splat_random(nerf_sphere, 300), splat_camera(32)
    with torch.no_grad():
        splats.opacities += 3
    whole = splats.draw(camera)[0]
    gradient = torch.autograd.grad(whole[:3].square().sum(), splats.means)[0]
    monkeypatch.setattr(_Composite, "DEPTH", 3)
    monkeypatch.setattr(_Composite, "ELEMENTS", 2 ** 10)
    parts = splats.draw(camera)[0]
    assert (whole - parts).abs().max() < 2e-4
    other = torch.autograd.grad(parts[:3].square().sum(), splats.means)[0]
    assert (gradient - other).norm() < 2e-3 * gradient.norm()


@pytest.mark.parametrize("where", ["none", "behind", "beside", "transparent"])
def test_an_empty_view_is_the_background(nerf_sphere, where):
    splats = splat_random(nerf_sphere, 0 if where == "none" else 5)
    with torch.no_grad():
        splats.means[:] = torch.tensor({"beside": [50.0, 0, 0], "behind": [0, 0, 4.1]}.get(where, [0.0, 0, 0]))
        if where == "transparent":
            splats.opacities.fill_(-7)
    picture = splats.render(splat_camera(20))
    assert (picture == 1).all() and picture.shape == (1, 3, 20, 20)
    picture.sum().backward()
    assert all(torch.isfinite(p.grad).all() and (p.grad == 0).all() for p in splats.parameters())


def test_gradients_behind_and_beside_the_camera_are_finite(nerf_sphere):
    splats = splat_random(nerf_sphere, 200, spread=4)
    with torch.no_grad():
        splats.means[:3] = torch.tensor([0.3, 0.2, 4.0])  # in the camera plane
    splats.render(splat_camera(40)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in splats.parameters())


def test_a_column_of_opaque_gaussians_gives_finite_gradients(nerf_sphere):
    """No light passes the column, in tiles that are lit elsewhere."""
    splats, camera = splat_random(nerf_sphere, 300, 0), splat_camera(24)
    with torch.no_grad():
        splats.means[:150] = torch.linspace(-1, 1, 150)[:, None] * torch.tensor([0, 0, 1.0])
        splats.opacities[:150] = 9
    gradients = []
    for picture in (splats.draw(camera)[0], splat_dense(splats, camera)):
        gradients.append(torch.autograd.grad(picture[:3].square().sum(), splats.sh_dc)[0])
    assert torch.isfinite(gradients[0]).all() and (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[1].norm()


def test_distant_needles_are_precise_in_large_pictures(nerf_sphere):
    """The polynomial is moved to the tile in float64, because its large terms cancel."""
    splats = splat_random(nerf_sphere, 40, 0)
    with torch.no_grad():
        splats.log_scales[:, 0] += 2
        splats.log_scales[:, 1:] -= 2
    camera = splat_camera(96, 1200, angle=0.008)
    a, b = (splats.draw(camera)[0] for splats in (splats, copy.deepcopy(splats).double()))
    assert a[3].std() > 0.1
    assert (a - b).abs().max() < 5e-3


def test_harmonics_match_those_of_the_nerf(nerf_sphere):
    splats, camera = splat_random(nerf_sphere, 50), splat_camera()
    d = splats.means - camera.pose[:, 3]
    harmonics = spherical_harmonics((d / d.norm(dim=1, keepdim=True)).T)  # [16,N]
    sh = torch.cat((splats.sh_dc[:, None], splats.sh_rest), 1)  # [N,16,3]
    wanted = (0.5 + torch.einsum("kn,nkc->nc", harmonics, sh)).clamp_min(0)
    assert_close(splats.colours(camera), wanted)
    flat = Splats(nerf_sphere, *(getattr(splats, n) for n in ATTRIBUTES[:5]), splats.sh_rest[:, :3])
    assert_close(flat.colours(camera), (0.5 + torch.einsum("kn,nkc->nc", harmonics[:4], sh[:, :4])).clamp_min(0))


def test_splats_render_is_deterministic_and_pure(splat_fitted):
    before = copy.deepcopy(splat_fitted.state_dict())
    pictures, gradients = [], []
    for _ in range(2):
        pictures.append(splat_fitted.render(2, 32))
        gradients.append(torch.autograd.grad(pictures[-1].square().sum(), splat_fitted.means)[0])
    assert torch.equal(*pictures) and torch.equal(*gradients)
    assert pictures[0].shape == (1, 3, 32, 32) and 0 <= pictures[0].min() and pictures[0].max() <= 1
    assert splat_fitted.render(2).shape == (1, 3, 24, 24)
    assert all(torch.equal(before[k], v) for k, v in splat_fitted.state_dict().items())


def test_the_depth_of_splats_is_that_of_the_ball(splat_fitted):
    camera = splat_fitted.camera(0, 24)
    depth = splat_fitted.depth(camera)[0, 0]
    distance = (camera.pose[:, 3]).norm().item()
    assert depth[12, 12].item() == pytest.approx(distance - 0.8, abs=0.25) and depth[0, 0] == 0


def test_the_depth_of_splats_is_that_at_which_half_of_the_light_is_left(nerf_sphere):
    """At every pixel one of the Gaussians', also where a rim shows two surfaces; more of them than a block holds."""
    splats, camera = splat_random(nerf_sphere, 200), splat_camera(32)
    _, depth, alpha = dense_layers(splats, camera)
    light = torch.cumprod(1 - alpha, 0)
    crossed = light <= 0.5
    along = camera.directions()[2].abs().flatten()
    wanted = torch.where(crossed.any(0), depth[crossed.int().argmax(0)] / along, 0)
    clear = (light - 0.5).abs().amin(0) > 1e-4  # no tie
    found = splats.depth(camera).flatten()
    assert clear.float().mean() > 0.9 and (found > 0).float().mean() > 0.2 and (found == 0).any()
    assert_close(found[clear], wanted[clear], rtol=1e-5, atol=1e-5)


# ---- the fit ------------------------------------------------------------------------------------------

def test_splats_reproduce_the_test_views(splat_fitted):
    psnr, views = evaluate(splat_fitted, splat_fitted.scene)
    assert views == 3 and psnr > 22 and splat_fitted.fitted["steps"] == 180
    assert SPLAT_SIZES["count"] != len(splat_fitted.means) <= SPLAT_SIZES["limit"]
    picture = splat_fitted.render(turntable(splat_fitted, 4, 20)[1])
    assert picture.shape == (1, 3, 20, 20)
    assert (picture[0, :, 10, 10] < 0.95).any() and (picture[0, :, 0, 0] > 0.95).all()


def test_splats_fit_a_capture_without_alpha(tmp_path):
    scene = load_scene(nerf_scene(tmp_path, alpha=False, split=False, aabb_scale=2))
    splats = Splats.fit(scene, steps=60, progress=False, **SPLAT_SIZES)
    views = [(splats.render(i, 24).detach() - splats.photograph(i, 24)).square().mean() for i in range(10)]
    assert sum(views) / 10 < 0.03


def test_masked_pixels_are_not_fitted(nerf_sphere, splat_fitted):
    """Masked pixels change neither the loss of a view nor its gradient."""
    view = nerf_sphere.train[1]
    mask = torch.ones(24, 24, dtype=torch.bool)
    mask[4:14, 6:15] = False
    losses, gradients = [], []
    for fill in (0, 255):
        pixels = torch.where(mask[..., None], view.pixels, fill)
        masked = replace(view, pixels=pixels, mask=mask)
        loss, error, _ = splat_fitted._fit_step(masked, torch.Generator().manual_seed(0))
        losses.append((loss.item(), error.item()))
        gradients.append(torch.autograd.grad(loss, splat_fitted.sh_dc)[0])
    assert losses[0] == losses[1] and torch.equal(*gradients)
    whole, _, _ = splat_fitted._fit_step(replace(view, pixels=pixels), torch.Generator().manual_seed(0))
    assert whole > 1.5 * losses[0][0]
    magenta = torch.tensor([255, 0, 255, 255])
    marked = [View(v.camera, torch.where(mask[..., None], v.pixels, magenta).byte(), v.name, mask)
              for v in nerf_sphere.train]
    start = Splats.start(replace(nerf_sphere, train=marked), 300, 0, torch.Generator().manual_seed(0))
    clean = Splats.start(replace(nerf_sphere, train=[replace(v, mask=mask) for v in nerf_sphere.train]), 300, 0,
                         torch.Generator().manual_seed(0))
    assert torch.equal(start.means, clean.means) and torch.equal(start.sh_dc, clean.sh_dc)


def test_a_lens_with_distortion_is_fitted_as_a_pinhole(tmp_path):
    scene = load_scene(nerf_scene(tmp_path, split=False, views=9, k1=0.2, fl_x=30.0))
    splats = Splats.fit(scene, steps=2, progress=False, **SPLAT_SIZES)
    assert splats.scene.train[0].camera.lens[4:] == (0,) * 6 and splats.scene.fingerprint == scene.fingerprint
    assert splats.photograph(0, 24).shape == (1, 3, 24, 24)
    assert evaluate(splats, splats.scene)[1] == 2


def test_a_killed_fit_of_splats_resumes_bit_identically(nerf_sphere, tmp_path, monkeypatch):
    sizes = dict(count=60, limit=160, degree=1)
    monkeypatch.setattr(Splats, "DENSIFY", 10)
    whole = Splats.fit(nerf_sphere, steps=40, progress=False, **sizes)
    ticks = iter(range(0, 10 ** 6, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))  # a checkpoint after each step
    step, calls = Splats._fit_step, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 26:
            raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(Splats, "_fit_step", killed)
    file = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        Splats.fit(nerf_sphere, steps=40, checkpoint=file, progress=False, **sizes)
    resumed = Splats.fit(nerf_sphere, steps=40, checkpoint=file, progress=False, **sizes)
    assert len(calls) == 26 + 15 and resumed.fitted["steps"] == 40 and len(resumed.means) > 60
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    cached = Splats.fit(nerf_sphere, steps=40, checkpoint=file, progress=False, **sizes)
    assert len(calls) == 41 and torch.equal(cached.means, whole.means)


def test_unsuitable_checkpoints_of_splats_are_refused(nerf_sphere, tmp_path):
    other, file = load_scene(nerf_scene(tmp_path / "other", views=4, radius=0.5)), tmp_path / "fit.pt"
    Splats.fit(nerf_sphere, steps=1, checkpoint=file, progress=False, **SPLAT_SIZES)
    contents = file.read_bytes()
    with pytest.raises(ValueError, match="fit.pt: is the fit of another scene"):
        Splats.fit(other, steps=2, checkpoint=file, progress=False, **SPLAT_SIZES)
    with pytest.raises(ValueError, match="fit.pt: was made with sizes"):
        Splats.fit(nerf_sphere, steps=2, checkpoint=file, progress=False, **SPLAT_SIZES | dict(degree=0))
    assert file.read_bytes() == contents
    file.write_bytes(contents[:1000])
    with pytest.raises(CheckpointError, match="fit.pt: no readable checkpoint"):
        Splats.fit(nerf_sphere, steps=2, checkpoint=file, progress=False, **SPLAT_SIZES)


def test_an_edit_changes_the_colours_of_splats(splat_fitted):
    """Learn red pictures by the steps of the loop; the number of Gaussians and the quaternions' length stay."""
    splats, generator = copy.deepcopy(splat_fitted), torch.Generator().manual_seed(0)
    assert splats.scene is splat_fitted.scene and splats.means is not splat_fitted.means
    optimiser = torch.optim.Adam(splats.param_groups(sh_dc=3e-2))
    red = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    with torch.no_grad():
        hit = [(splat_fitted.render(v, 24)[0] < 0.98).any(0) for v in range(len(splats.scene.train))]
    errors = []
    for _ in range(60):
        view = splats.sample_view(generator)
        error = ((splats.render(view, 24)[0] - red) * hit[view]).square().mean()
        errors.append(error.item())
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        splats.project_()
    assert sum(errors[-8:]) < 0.4 * sum(errors[:8]) and len(splats.means) == len(splat_fitted.means)
    assert_close(splats.quaternions.norm(dim=1), torch.ones(len(splats.means)))
    fresh = copy.deepcopy(splat_fitted)
    fresh.load_state_dict(splats.state_dict())
    assert torch.equal(fresh.render(1, 24), splats.render(1, 24))


def test_a_field_changes_colours_together_and_moves_nothing(splat_fitted):
    """A gradient on one Gaussian alone changes its neighbours too, less with the distance."""
    splats = copy.deepcopy(splat_fitted)
    before, means = splats.sh_dc.detach().clone(), splats.means.detach().clone()
    groups = splats.param_groups(sh_dc=0.1, shared=True)
    assert {group["name"] for group in groups if group.get("shared")} == {"sh_dc", "sh_rest"}
    optimiser = SteadyAdam(groups, splats.fields(0.3))
    splats.sh_dc.grad = torch.zeros_like(splats.sh_dc)
    splats.sh_dc.grad[0] = 1
    optimiser.step()
    change, distance = (splats.sh_dc.detach() - before).flatten(1).norm(dim=1), (means - means[0]).norm(dim=1)
    near, far = distance < 0.2 * splats.scene.half, distance > 1.5 * splats.scene.half
    assert change[near].min() > 10 * change[far].max() and torch.equal(splats.means, means)
