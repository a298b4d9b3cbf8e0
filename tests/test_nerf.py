"""NeRF: the hash grid, volume rendering, deferred gradients, the fit and its files."""
import copy
import itertools
import math
import time

import pytest
import torch
from conftest import NERF_SIZES, nerf_scene
from PIL import Image
from torch.testing import assert_close

import nerf
from files.checkpoint import CheckpointError
from nerf import NeRF
from scene.box import cell_points
from scene.captures import SceneError
from scene.grid import HashGrid, _Interpolate
from scene.reading import load_scene
from scene.region import Region
from scene.representation import depth_picture, evaluate
from scene.volume import volume_weights


class SmallNeRF(NeRF):
    """A NeRF whose fit has small batches."""
    BATCH = (2 ** 14, 2 ** 12, 256, 2048)


@pytest.fixture(scope="module")
def nerf_fitted(nerf_sphere):
    return SmallNeRF.fit(nerf_sphere, steps=250, progress=False, **NERF_SIZES)


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    """A fit to photographs without alpha: the sphere above a tiled ground, under a sky."""
    folder = nerf_scene(tmp_path_factory.mktemp("capture"), split=False, aabb_scale=2)
    scene = load_scene(folder)
    for view in scene.train + scene.test:
        rays_o, rays_d = view.camera.rays()
        way = (-0.8 - rays_o[2]) / rays_d[2]
        u, v = (rays_o + way * rays_d)[:2]
        tiles = torch.where(u.sin() * v.sin() > 0, torch.tensor([[0.8], [0.7], [0.5]]),
                            torch.tensor([[0.4], [0.3], [0.2]]))
        behind = torch.where((way > 0) & (way < 12), tiles, torch.tensor([[0.5], [0.7], [0.9]]))
        rgba = view.picture()
        picture = torch.lerp(behind.view(3, *rgba.shape[1:]), rgba[:3], rgba[3:])
        Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / view.name)
    return SmallNeRF.fit(load_scene(folder), steps=330, progress=False, **NERF_SIZES)


def learn(nerf, wanted, steps):
    """Take steps of Adam towards pictures [1,3,24,24], one for each training view."""
    optimiser, generator = torch.optim.Adam(nerf.param_groups(1e-2)), torch.Generator().manual_seed(0)
    for _ in range(steps):
        view = nerf.sample_view(generator)
        optimiser.zero_grad()
        (nerf.render(view, 24) - wanted[view]).square().mean().backward()
        optimiser.step()
        nerf.project_()


class Identity(torch.nn.Module):
    """A stand-in for the hash grid whose features are the coordinates."""

    def forward(self, x, known=None):
        return x


class SolidBall(NeRF):
    """A closed-form field: an opaque ball of a given colour in the centre of the box."""
    radius = 0.8

    @classmethod
    def of(cls, scene):
        ball = cls(scene, **NERF_SIZES)
        ball.grid = Identity()
        ball.occupied.fill_(True)
        ball.bounds.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]) * ball.extent)
        ball.step = 1 / 128
        return ball

    def density(self, x):
        place = (x * 2 - 1) * self.extent * self.scene.half + self.centre[:, None]
        return 1e5 * (place.norm(dim=0) < self.radius), torch.zeros(16, x.shape[1])

    def colour(self, out, sh):
        return torch.tensor([[0.2], [0.4], [0.6]]).expand(-1, out.shape[1])


# ---- the hash grid ------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [2 ** 4, 2 ** 12])  # with all but the first level hashed, and with all levels dense
def test_the_grid_matches_a_loop_over_corners(size):
    torch.manual_seed(0)
    grid = HashGrid(3, size, 1, 9).double()
    grid.table.data.normal_()
    x = torch.rand(3, 7, dtype=torch.float64)
    out = grid(x)
    for level, cells in enumerate(grid.cells):
        for n in range(7):
            place = [float(c) * cells for c in x[:, n]]
            wanted = torch.zeros(2, dtype=torch.float64)
            for corner in range(8):
                at = [int(p) + (corner >> k & 1) for k, p in enumerate(place)]
                weight = math.prod(1 - abs(p - a) for p, a in zip(place, at, strict=True))
                if (cells + 1) ** 3 <= size:
                    entry = at[0] + (cells + 1) * (at[1] + (cells + 1) * at[2])
                else:
                    entry = sum(a * s for a, s in zip(at, HashGrid.STRIDES, strict=True)) % size
                wanted += weight * grid.table[grid.start[level] + entry].detach()
            assert_close(out[[level, 3 + level], n], wanted)


def test_the_grid_has_known_features_and_gradients():
    torch.manual_seed(0)
    grid = HashGrid(2, 2 ** 5, 2, 6).double()
    x = torch.rand(3, 11, dtype=torch.float64)
    table = torch.randn_like(grid.table).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: _Interpolate.apply(t, x, grid, None), table)
    grid.table.data.copy_(table)
    grid(x).square().sum().backward()
    once = grid.table.grad.clone()
    grid.table.grad = None
    grid(x, grid(x).detach()).square().sum().backward()
    assert torch.equal(once, grid.table.grad)


def test_the_grid_handles_the_upper_face_and_no_points():
    grid = HashGrid(2, 2 ** 10, 2, 4)
    grid.table.data.fill_(1.0)
    assert_close(grid(torch.ones(3, 2)), torch.ones(4, 2))
    grid(torch.empty(3, 0)).sum().backward()
    assert grid.table.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="power of two"):
        HashGrid(2, 1000, 2, 4)


# ---- volume rendering ----------------------------------------------------------------------------------------

def test_volume_weights_match_a_loop():
    torch.manual_seed(0)
    ray = torch.tensor([0, 0, 0, 2, 2, 5])  # rays 1, 3 and 4 have no samples
    tau = torch.rand(6, dtype=torch.float64, requires_grad=True)
    weights, light = [], {}
    for t, r in zip(tau, ray.tolist(), strict=True):
        weights.append(light.get(r, 1.0) * (1 - torch.exp(-t)))
        light[r] = light.get(r, 1.0) * torch.exp(-t)
    wanted, ours = torch.stack(weights), volume_weights(tau, ray, 6)
    assert_close(ours, wanted)
    factor = torch.randn(6, dtype=torch.float64)
    assert_close(torch.autograd.grad((ours * factor).sum(), tau)[0],
                               torch.autograd.grad((wanted * factor).sum(), tau)[0])


def test_volume_weights_keep_their_precision_behind_many_opaque_rays():
    count, each = 4000, 8
    tau = torch.full((count * each,), 500.0)
    tau[-each:] = torch.linspace(0.01, 0.3, each)
    weights = volume_weights(tau, torch.arange(count).repeat_interleave(each), count)
    last = tau[-each:].double()
    wanted = torch.exp(last - last.cumsum(0)) * (1 - torch.exp(-last))
    assert_close(weights[-each:].double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bounded", [True, False])
def test_the_batch_size_does_not_change_the_samples(bounded, nerf_fitted, capture, monkeypatch):
    nerf = nerf_fitted if bounded else capture
    rays = [rays[:, :100] for rays in nerf.camera(0, 16).rays()]
    whole = nerf.find(*rays, 0.3)
    monkeypatch.setattr(NeRF, "batch", 50)
    parts = nerf.find(*rays, 0.3)
    assert whole.marched == parts.marched > 500
    for a, b in zip(whole, parts, strict=True):
        if torch.is_tensor(a):
            assert_close(a, b)


def test_a_ball_has_its_known_area_and_depth(nerf_sphere):
    ball = SolidBall.of(nerf_sphere)
    camera = ball.camera(0, 64)
    with torch.no_grad():
        picture, depth = ball.render(camera), ball.depth(camera)
    inside = (picture[0, 2] < 0.8).float()
    distance, focal = 4.0, camera.lens[0]
    disc = math.pi * focal ** 2 * ball.radius ** 2 / (distance ** 2 - ball.radius ** 2)  # of the tangent cone
    assert inside.sum().item() == pytest.approx(disc, rel=0.02)
    assert_close(picture[0, :, 32, 32], torch.tensor([0.2, 0.4, 0.6]))
    assert (picture[0, :, 0, 0] == 1).all() and depth[0, 0, 0, 0] == 0
    assert depth[0, 0, 32, 32].item() == pytest.approx(distance - ball.radius, abs=0.02)
    assert (depth_picture(depth)[0, :, 32, 32] > 0.9).all()


def test_a_ball_is_rendered_where_the_photographs_show_it(nerf_sphere):
    ball = SolidBall.of(nerf_sphere)
    for view in (0, 4):
        with torch.no_grad():
            rendered = (ball.render(view, 48) < 0.9).any(1)
        shown = (ball.photograph(view, 48) < 0.9).any(1)
        assert (rendered != shown).float().mean() < 0.05


def test_the_hull_contains_the_object_and_little_else(nerf_sphere):
    nerf = NeRF(nerf_sphere, **NERF_SIZES)
    place = (cell_points(torch.arange(64 ** 3), 64) * 2 - 1) * nerf_sphere.half + nerf_sphere.centre[:, None]
    ball = place.norm(dim=0) < 0.8
    assert nerf.occupied[ball].all() and nerf.occupied.sum() < 2.5 * ball.sum()
    assert nerf.seen.sum() > nerf.occupied.sum()


# ---- gradients of pictures ----------------------------------------------------------------------------

def test_deferred_gradients_equal_direct_gradients(nerf_fitted, monkeypatch):
    nerf = copy.deepcopy(nerf_fitted)
    weighting = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def gradient(chunk):
        monkeypatch.setattr(NeRF, "chunk", chunk)
        nerf.zero_grad()
        picture = nerf.render(1, 32)
        (picture * weighting).sum().backward()
        return picture.detach(), torch.cat([p.grad.flatten() for p in nerf.parameters()])
    (a, direct), (b, deferred) = gradient(10 ** 6), gradient(100)
    assert_close(a, b, rtol=0, atol=1e-6)
    assert (direct - deferred).norm() <= 1e-5 * direct.norm()
    assert direct.norm() > 0


def test_deferred_gradients_search_for_samples_only_once(capture, monkeypatch):
    nerf, find, calls = copy.deepcopy(capture), NeRF.find, []

    def counted(*args, **options):
        calls.append(options)
        return find(*args, **options)
    monkeypatch.setattr(NeRF, "find", counted)
    nerf.learn_from(16)

    def gradient(chunk):
        monkeypatch.setattr(NeRF, "chunk", chunk)
        nerf.zero_grad()
        picture = nerf.render(1, 24)
        drawn = len(calls)
        picture.square().sum().backward()
        assert len(calls) == drawn
        return picture.detach(), torch.cat([p.grad.flatten() for p in nerf.parameters()])
    (a, direct), (b, deferred) = gradient(10 ** 6), gradient(100)
    assert len(calls) == 1 + 6
    assert_close(a, b, rtol=0, atol=1e-6)
    assert (direct - deferred).norm() <= 1e-5 * direct.norm()


def test_deferred_gradients_use_the_occupancy_of_the_forward_pass(nerf_fitted, monkeypatch):
    monkeypatch.setattr(NeRF, "chunk", 100)
    nerf = copy.deepcopy(nerf_fitted)
    (wanted,) = torch.autograd.grad(nerf.render(1, 32).sum(), [nerf.rgb_out])
    picture = nerf.render(1, 32)
    nerf.occupied = torch.zeros_like(nerf.occupied)
    assert torch.equal(torch.autograd.grad(picture.sum(), [nerf.rgb_out])[0], wanted)
    assert not nerf.occupied.any()


def test_pictures_of_a_frozen_shape_search_for_samples_only_once(nerf_fitted, monkeypatch):
    nerf, find, calls = copy.deepcopy(nerf_fitted), NeRF.find, []
    monkeypatch.setattr(NeRF, "find", lambda self, *args, **options: calls.append(1) or find(self, *args, **options))
    monkeypatch.setattr(NeRF, "chunk", 300)
    nerf.split()
    nerf.param_groups(densities=0)
    occupied = nerf.occupied.clone()

    def drawn():
        return torch.cat([nerf.render(1, 32).flatten(), nerf.depth(1, 32).flatten()])
    with torch.no_grad():
        before = drawn()
        assert len(calls) == math.ceil(32 * 32 / 300)
        nerf.rgb_out.mul_(0.5)  # a step of the colours
        nerf.project_()
        after = drawn()
        assert len(calls) == math.ceil(32 * 32 / 300) and torch.equal(nerf.occupied, occupied)
        assert (before - after).abs().max() > 0.01
        monkeypatch.setattr(nerf, "KEPT", 0)  # there is room for one picture, which the next one replaces
        nerf.render(2, 32)
        assert len(nerf.drawn) == 1
        nerf.param_groups(densities=1)
        assert_close(drawn(), after, rtol=0, atol=1e-6)
        assert not nerf.drawn and not nerf.frozen
        nerf.shape.sigma_out[0] -= 10
        assert (drawn() - after).abs().max() > 0.1


def test_deferred_gradients_raise_if_parameters_have_changed(nerf_fitted, monkeypatch):
    monkeypatch.setattr(NeRF, "chunk", 100)
    nerf = copy.deepcopy(nerf_fitted)
    picture = nerf.render(1, 32)
    with torch.no_grad():
        nerf.rgb_out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        picture.sum().backward()


@pytest.mark.parametrize("chunk", [50, 10 ** 6])
def test_an_empty_scene_is_the_background(nerf_sphere, monkeypatch, chunk):
    monkeypatch.setattr(NeRF, "chunk", chunk)
    nerf = NeRF(nerf_sphere, **NERF_SIZES)
    nerf.occupied = torch.zeros_like(nerf.occupied)
    nerf.bounds = nerf._bounds()
    picture = nerf.render(0, 16)
    assert (picture == 1).all()
    picture.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in nerf.parameters())


def test_render_has_no_side_effects(nerf_fitted):
    before = copy.deepcopy(nerf_fitted.state_dict())
    a = nerf_fitted.render(2, 32)
    b = nerf_fitted.render(2, 32)
    assert torch.equal(a, b) and a.shape == (1, 3, 32, 32) and a.min() >= 0 and a.max() <= 1
    assert nerf_fitted.render(2).shape == (1, 3, 24, 24)
    after = nerf_fitted.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_an_edit_can_grow_geometry(nerf_fitted):
    """Learn pictures of a larger ball, whose added shell lies outside the cells that were occupied."""
    nerf, scene = copy.deepcopy(nerf_fitted), nerf_fitted.scene
    larger = SolidBall.of(scene)
    larger.radius = 0.95
    with torch.no_grad():
        wanted = [larger.render(view, 24) for view in range(len(scene.train))]
        error = [(nerf.render(v, 24) - w).square().mean() for v, w in enumerate(wanted)]
    learn(nerf, wanted, 90)
    with torch.no_grad():
        now = [(nerf.render(v, 24) - w).square().mean() for v, w in enumerate(wanted)]
    assert sum(now) < 0.1 * sum(error)


# ---- edits of captures ---------------------------------------------------------------------------------

class Cells(NeRF):
    """A closed-form field: sigma is 100 in one cell of the occupancy, a haze of 3 in another, 0 elsewhere."""
    SOLID, HAZE = (40, 30, 20), (10, 30, 20)

    @classmethod
    def of(cls, scene):
        cells = cls(scene, **NERF_SIZES)
        cells.grid = Identity()
        cells.seen.fill_(True)
        return cells

    def density(self, x):
        at = (x * self.cells).int().T
        solid, haze = ((at == torch.tensor(cell)).all(1) for cell in (self.SOLID, self.HAZE))
        return 100.0 * solid + 3.0 * haze, None


def test_an_edit_of_a_capture_samples_around_opaque_cells_alone(capture, nerf_sphere):
    def occupied(scene):
        cells = Cells.of(scene)
        cells.occupied.fill_(True)
        cells.project_()
        at = cells.occupied.nonzero()[:, 0]
        return set(zip(*((at // cells.cells ** axis % cells.cells).tolist() for axis in range(3)), strict=True))
    x, y, z = Cells.SOLID
    around = [(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
    cross = {(x + i, y + j, z + k) for i, j, k in around if abs(i) + abs(j) + abs(k) < 2}
    assert occupied(capture.scene) == cross | {Cells.HAZE}
    assert len(occupied(nerf_sphere)) == 27 + 27


def test_an_edit_of_a_capture_changes_its_geometry(capture):
    """Learn pictures of a larger ball of one colour in front of the same surroundings."""
    nerf, larger, wanted = copy.deepcopy(capture), SolidBall.of(capture.scene), []
    larger.radius = 1.3
    with torch.no_grad():
        for view in range(len(capture.scene.train)):
            rays = nerf.camera(view, 24).rays()
            rgb, opacity, _, _ = larger.shade(*rays)
            wanted.append((nerf.draw(*rays) * (1 - opacity) + rgb).view(1, 3, 24, 24))
    nerf.learn_from(24)

    def error():
        with torch.no_grad():
            return sum((nerf.render(v, 24) - w).square().mean() for v, w in enumerate(wanted))
    before = error()
    learn(nerf, wanted, 28)
    assert error() < 0.35 * before


# ---- the fit and its files ----------------------------------------------------------------------------

def test_a_fit_reproduces_the_test_views(nerf_fitted):
    psnr, views = evaluate(nerf_fitted, nerf_fitted.scene)
    assert views == 3 and psnr > 22 and nerf_fitted.fitted["steps"] == 250


def test_a_capture_without_alpha_is_fitted(capture):
    scene, nerf = capture.scene, copy.deepcopy(capture)
    assert not scene.bounded and len(scene.test) == 2 and len(scene.train) == 10
    views = [(nerf.render(i, 24).detach() - nerf.photograph(i, 24)).square().mean() for i in range(10)]
    assert sum(views) / 10 < 0.01  # so few views hardly determine depth, so only training views are compared
    nerf.render(0, 24).sum().backward()
    assert nerf.sky_out.grad.abs().sum() > 0


def test_a_killed_fit_resumes_bit_identically(nerf_sphere, tmp_path, monkeypatch):
    sizes = dict(levels=2, table=2 ** 10, width=8)
    whole = SmallNeRF.fit(nerf_sphere, steps=120, progress=False, **sizes)
    ticks = iter(range(0, 10 ** 6, 5))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))  # a checkpoint after every fourth step
    step, calls = NeRF.fit_loss, []

    def killed(self, *args, **options):
        calls.append(1)
        if len(calls) == 101:
            raise KeyboardInterrupt
        return step(self, *args, **options)
    monkeypatch.setattr(NeRF, "fit_loss", killed)
    file = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        SmallNeRF.fit(nerf_sphere, steps=120, checkpoint=file, progress=False, **sizes)
    resumed = SmallNeRF.fit(nerf_sphere, steps=120, checkpoint=file, progress=False, **sizes)
    assert len(calls) == 101 + 20 and resumed.fitted["steps"] == 120
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    cached = SmallNeRF.fit(nerf_sphere, steps=120, checkpoint=file, progress=False, **sizes)
    assert len(calls) == 121 and torch.equal(cached.grid.table, whole.grid.table)


def test_unsuitable_checkpoints_are_refused(nerf_fitted, nerf_sphere, tmp_path):
    other = load_scene(nerf_scene(tmp_path / "other", views=4, radius=0.5))
    saved, fitted = tmp_path / "nerf.safetensors", tmp_path / "fit.pt"
    nerf_fitted.save(saved)
    NeRF.fit(nerf_sphere, steps=1, checkpoint=fitted, progress=False, **NERF_SIZES)
    contents = fitted.read_bytes()
    with pytest.raises(SceneError, match="nerf.safetensors: was fitted to another scene"):
        NeRF.load(saved, other)
    with pytest.raises(ValueError, match="fit.pt: is the fit of another scene"):
        NeRF.fit(other, steps=2, checkpoint=fitted, progress=False, **NERF_SIZES)
    with pytest.raises(ValueError, match="fit.pt: was made with sizes"):
        NeRF.fit(nerf_sphere, steps=2, checkpoint=fitted, progress=False, **NERF_SIZES | dict(width=32))
    assert fitted.read_bytes() == contents
    for damaged, message in ((saved, "no readable NeRF"), (fitted, "no readable checkpoint")):
        damaged.write_bytes(damaged.read_bytes()[:1000])
        with pytest.raises((SceneError, CheckpointError), match=f"{damaged.name}: {message}"):
            NeRF.load(saved, nerf_sphere) if damaged is saved else NeRF.fit(
                nerf_sphere, steps=2, checkpoint=fitted, progress=False, **NERF_SIZES)
    for key, value in (("sizes", NERF_SIZES | {"width": torch.zeros(3)}), ("others", 7), ("others", [None])):
        fitted.write_bytes(contents)
        torch.save(torch.load(fitted, weights_only=True) | {key: value}, fitted)
        with pytest.raises(CheckpointError, match=f"fit.pt: no readable checkpoint.*'{key}' is wrong"):
            NeRF.fit(nerf_sphere, steps=2, checkpoint=fitted, progress=False, **NERF_SIZES)
    saved.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SceneError, match="nerf.safetensors: is a Git LFS pointer, not the file itself"):
        NeRF.load(saved, nerf_sphere)


def test_rays_have_samples_however_far_the_points_of_a_capture_are(tmp_path, monkeypatch):
    scene = load_scene(nerf_scene(tmp_path, views=4, size=8, alpha=False, split=False))
    monkeypatch.setattr(nerf, "in_sight", lambda *_: (torch.ones((), dtype=torch.bool), 1e9 * scene.half))
    field = NeRF.fit(scene, steps=1, progress=False, **NERF_SIZES)
    assert not scene.bounded and field.near < field.far / 2
    with torch.no_grad():
        assert torch.isfinite(field.render(0, 8)).all()


def test_saved_copied_and_restored_nerfs_render_the_same(nerf_fitted, tmp_path):
    nerf_fitted.save(tmp_path / "a.safetensors")
    loaded = NeRF.load(tmp_path / "a.safetensors", nerf_fitted.scene)
    twin = copy.deepcopy(nerf_fitted)
    assert twin.scene is nerf_fitted.scene and twin.grid.table is not nerf_fitted.grid.table
    fresh = NeRF(nerf_fitted.scene, **NERF_SIZES)
    fresh.load_state_dict(nerf_fitted.state_dict())
    for other in (loaded, twin, fresh):
        assert torch.equal(other.render(3, 40), nerf_fitted.render(3, 40))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_dataset_starts_with_the_renders_and_its_pictures_can_be_replaced(nerf_fitted):
    nerf, generator = copy.deepcopy(nerf_fitted), torch.Generator().manual_seed(0)
    dataset = nerf.dataset(16, nerf.render)
    assert nerf.data_loss(dataset, generator).item() < 1e-3  # nothing to fit yet
    camera = nerf.camera(2, 16)
    with torch.no_grad():
        dataset.replace(2, 1 - nerf.render(camera))
    assert (dataset.pixels.view(-1, 16, 16, 3)[2].float() - 255 * (1 - nerf.render(camera)[0].detach()).permute(1, 2, 0)
            ).abs().max() <= 0.5 + 1e-3
    assert nerf.data_loss(dataset, generator).item() > 1e-3


def test_levels_finer_than_the_pictures_get_no_gradient(nerf_fitted):
    nerf = copy.deepcopy(nerf_fitted)
    grads = {}
    for size in (8, 10 ** 6):
        nerf.learn_from(size)
        nerf.zero_grad()
        nerf.render(0, 16).square().mean().backward()
        grads[size] = [nerf.grid.table.grad[a:b].clone() for a, b in itertools.pairwise(nerf.grid.start)]
    coarse = [cells <= 2 * nerf.camera(None, 8).lens[0] / nerf.distance for cells in nerf.grid.cells]
    coarse[0] = True  # the coarsest level always learns
    assert not all(coarse)
    for learns, some, all_ in zip(coarse, grads[8], grads[10 ** 6], strict=True):
        assert_close(some, all_ if learns else torch.zeros_like(all_))
        assert all_.any()


def test_shifting_the_pixels_does_not_move_the_camera(nerf_fitted):
    camera = nerf_fitted.camera(0, 16)
    moved = camera.shifted(1, 2).directions().view(3, 16, 16)
    assert_close(moved[:, :-2, :-1], camera.directions().view(3, 16, 16)[:, 2:, 1:])
    with torch.no_grad():
        assert_close(nerf_fitted.render(camera.shifted(1, 2))[..., :-2, :-1], nerf_fitted.render(camera)[..., 2:, 1:],
                     rtol=0, atol=0.02)  # the samples lie at other points of the rays


def test_a_view_without_the_region_of_a_confined_edit_changes_nothing(nerf_fitted):
    nerf, camera = copy.deepcopy(nerf_fitted), nerf_fitted.camera(0, 16)
    with torch.no_grad():
        picture, depth = nerf.render(camera), nerf.depth(camera)
    nerf.confine(Region(nerf.scene, torch.zeros(8, 8, 8)))
    nerf.gate.still = nerf.gate.again  # as if the edit looked at this view
    with torch.no_grad():
        nerf.grid.table += 0.1
    drawn = nerf.render(camera)
    drawn.sum().backward()
    assert_close(drawn, picture)
    assert_close(nerf.depth(camera), depth)
    assert all(p.grad is None or not p.grad.any() for p in nerf.parameters())
