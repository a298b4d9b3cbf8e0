"""scene/region.py: regions from one mask, a box or a ball; edits that are confined to them."""
import copy
import re
import warnings

import pytest
import torch
from conftest import NERF_SIZES, nerf_scene, rand
from torch.nn.functional import max_pool2d
from torch.testing import assert_close

from nerf import NeRF
from scene.reading import load_scene
from scene.region import CELLS, Region, ball, box, found, inside, lifted, otsu, side_of
from scene.representation import Representation
from splat import Splats


class Balls(Representation):
    """A red ball beside a green one: one is masked."""
    PLACES, RADIUS, COLOURS = torch.tensor([[-0.35, 0, 0], [0.4, 0, 0]]), 0.32, torch.tensor([[1.0, 0, 0], [0, 0.8, 0]])

    def meet(self, camera):
        """Distances [2,P] at which the rays of a camera meet the balls; infinite where they miss."""
        rays_o, rays_d = camera.rays()
        off = rays_o - self.PLACES[:, :, None]
        along = (off * rays_d).sum(1)
        root = along ** 2 - off.square().sum(1) + self.RADIUS ** 2
        return torch.where(root > 0, -along - root.clamp_min(0).sqrt(), torch.inf)

    def depth(self, camera):
        away = self.meet(camera).amin(0)
        return torch.where(away.isfinite(), away, 0).view(1, 1, camera.height, camera.width)

    def red(self, view, size):
        """Where a view shows the red ball, [1,1,H,W] bool."""
        camera, away = self.camera(view, size), self.meet(self.camera(view, size))
        return (away[0] < away[1]).view(1, 1, camera.height, camera.width)

    def photograph(self, view, size):
        camera = self.camera(view, size)
        return self.COLOURS[self.meet(camera).argmin(0)].T.reshape(1, 3, camera.height, camera.width)


def test_one_mask_is_found_in_every_view(nerf_sphere):
    balls = Balls(nerf_sphere)
    region = lifted(balls, {2: balls.red(2, 48).float()}, 48)
    red, green = (region.at(place[:, None]).item() for place in balls.PLACES)
    assert red == 1 and green == 0
    for view in range(len(nerf_sphere.train)):
        seen, wanted = region.seen(balls, view, 48) > 0, balls.red(view, 48)
        assert (seen & wanted).sum() >= 0.97 * wanted.sum()
        near = max_pool2d(wanted.float(), 3, 1, 1) > 0  # a rim of a cell, about a pixel
        assert (seen & ~near).sum() <= 4
    with pytest.raises(ValueError, match="the masks show no surface of the scene"):
        lifted(balls, {2: torch.zeros(1, 1, 8, 8)}, 48)


def test_a_subject_is_found_by_what_the_prompts_explain(nerf_sphere):
    """Of the red ball one prompt explains more, of all else neither; every map is noisy."""
    balls, g, maps = Balls(nerf_sphere), torch.Generator().manual_seed(0), {}
    for view in range(len(nerf_sphere.train)):
        maps[view] = balls.red(view, 48).float() - 0.1 + 0.3 * torch.randn(1, 1, 48, 48, generator=g)
    region = found(balls, maps, 48)
    assert region.at(balls.PLACES.T).tolist() == [1, 0]
    views = [view for view in maps if balls.red(view, 48).sum() > 80]
    assert len(views) > 3
    for view in views:
        seen, wanted = region.seen(balls, view, 48) > 0, balls.red(view, 48)
        assert (seen & wanted).sum() >= 0.7 * (seen | wanted).sum()
    with pytest.raises(ValueError, match="--local finds no subject amid the scene: give --mask"):
        found(balls, {view: odds - 2 for view, odds in maps.items()}, 48)


class Crowd(Balls):
    """A red ball beside three green ones."""
    PLACES = torch.tensor([[-0.35, 0, 0], [0.4, 0, 0], [0, 0.6, 0], [0, -0.6, 0]])
    RADIUS, COLOURS = 0.25, torch.tensor([[1.0, 0, 0], *[[0, 0.8, 0]] * 3])

    def of(self, view, size, values):
        """The value of the ball that a view shows at each pixel [1,1,H,W], noisy."""
        camera, away = self.camera(view, size), self.meet(self.camera(view, size))
        noise = torch.randn(away.shape[1], generator=torch.Generator().manual_seed(view))
        return (torch.tensor(values)[away.argmin(0)] + 0.1 * noise).view(1, 1, camera.height, camera.width)


@pytest.mark.parametrize(("places", "others", "reason"), [
    (Crowd.PLACES, -0.1, None), (Crowd.PLACES, 0.6, "holds only 3[0-9]% of what the source's prompt explains"),
    (Crowd.PLACES * torch.tensor([[3.0], [1], [1], [1]]), -0.1,
     "reaches the border of the box of interest, as a ground does")])
def test_a_subject_is_in_doubt_beside_things_that_the_prompt_explains_and_at_the_border(
        nerf_sphere, monkeypatch, places, others, reason):
    monkeypatch.setattr(Crowd, "PLACES", places)
    crowd = Crowd(nerf_sphere)
    maps = {view: crowd.of(view, 48, [1.0, others, others, others]) for view in range(len(nerf_sphere.train))}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        region = found(crowd, maps, 48)
    assert region.at(crowd.PLACES.T).tolist() == [1, 0, 0, 0]
    assert len(said) == (reason is not None)
    for warning in said:
        assert re.search(f"--local is in doubt: the thing that it found {reason}; look at masks.png, or give --mask",
                         str(warning.message))


def test_a_mask_of_a_held_out_photograph(nerf_sphere):
    balls, first = Balls(nerf_sphere), len(nerf_sphere.train)
    region = lifted(balls, {first: balls.red(nerf_sphere.test[0].camera, 48).float()}, 48)
    assert region.at(balls.PLACES.T).tolist() == [1, 0]


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    """A scene without alpha, whose space is contracted."""
    return load_scene(nerf_scene(tmp_path_factory.mktemp("capture"), split=False, alpha=False, aabb_scale=2))


@pytest.mark.parametrize("kind", ["bounded", "capture"])
def test_boxes_and_balls_are_in_units_of_the_file(kind, nerf_sphere, request):
    scene = nerf_sphere if kind == "bounded" else request.getfixturevalue("capture")
    x = torch.tensor([[0.0, 0.3, 0.9], [0.0, 0.3, 0.0], [0.0, 0.3, 0.0]])
    assert box(scene, (0.6, 0.6, 0.6), (-0.6, -0.6, -0.6)).at(x).tolist() == [1, 1, 0]  # corners in any order
    assert_close(ball(scene, (0.0, 0.0, 0.0), 0.3).at(x), torch.tensor([1.0, 0, 0]), rtol=0, atol=0.1)
    cell = 2 * scene.half * (1 if scene.bounded else 2) / side_of(scene)
    x = torch.zeros(3, 3)
    x[0] = 0.6 + cell * torch.tensor([-1.5, 0.55, 1.0])  # the corners of the box lie somewhere within a cell
    assert box(scene, (-0.6, -0.6, -0.6), (0.6, 0.6, 0.6)).at(x).tolist() == [1, 0, 0]
    for radius in (0.0, 0.2 * cell):
        with pytest.raises(ValueError, match="the box or ball of the edit is empty"):
            ball(scene, (0.0, 0.0, 0.0), radius)
    mask = ball(scene, (0.0, 0.0, 0.0), 0.4).seen(Balls(scene), 0, 32)
    assert mask.shape == (1, 1, 32, 32) and 0 < mask.mean() < 0.5


class Empty(Representation):
    """Nothing, so that a region is seen as a whole."""

    def depth(self, camera):
        return torch.zeros(1, 1, camera.height, camera.width)


@pytest.mark.parametrize("kind", ["bounded", "capture"])
def test_a_confined_nerf_changes_in_its_region_alone(kind, nerf_sphere, request, tmp_path):
    scene = nerf_sphere if kind == "bounded" else request.getfixturevalue("capture")
    nerf = NeRF.fit(scene, steps=120, progress=False, **NERF_SIZES)
    camera, before = nerf.camera(0, 24), copy.deepcopy(nerf)
    region = ball(scene, (0.0, 0.0, 0.5), 0.5)
    nerf.confine(region)
    outside = max_pool2d(region.seen(Empty(scene), 0, 24), 5, 1, 2)[0, 0] == 0  # two pixels of rim aside
    with torch.no_grad():
        was = before.render(camera)
        assert_close(nerf.render(camera), was, rtol=0, atol=1e-5)
    optimiser = torch.optim.Adam(nerf.param_groups(5e-2, 1e-2))
    assert sum(p.numel() for g in optimiser.param_groups for p in g["params"]) == sum(
        p.numel() for p in before.parameters())
    for _ in range(10):
        optimiser.zero_grad()
        nerf.render(camera).sub(torch.tensor([1.0, 0, 1]).view(3, 1, 1)).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        change = (nerf.render(camera) - was)[0].abs().amax(0)
    assert change[outside].max() < 1e-2 and change[~outside].max() > 0.05
    x, sh = torch.rand(3, 20000, generator=torch.Generator().manual_seed(1)), rand(16, 1).float().expand(-1, 20000)
    beyond = inside(region.cells, x) == 0
    for own, frozen in zip(nerf.at(x, sh), before.at(x, sh), strict=True):
        assert_close(own[..., beyond], frozen[..., beyond], rtol=1e-5, atol=1e-6)
        assert (own - frozen).abs().max() > 1e-2
    nerf.save(tmp_path / "a.safetensors")
    assert torch.equal(NeRF.load(tmp_path / "a.safetensors", scene).render(0, 16), nerf.render(0, 16))


def test_confined_gaussians_keep_the_others(nerf_sphere):
    """A Gaussian learns if it lies in the region up to a standard deviation: a large one would stain what is beside."""
    g = torch.Generator().manual_seed(0)
    means, sizes = torch.rand(200, 3, generator=g) - 0.5, torch.tensor([[0.3, 0.01, 0.01]]).expand(200, 3)
    turns = torch.randn(200, 4, generator=g)
    splats = Splats(nerf_sphere, means, sizes.log(), turns, torch.zeros(200), torch.randn(200, 3, generator=g),
                    torch.zeros(200, 3, 3))
    cells = torch.zeros(CELLS, CELLS, CELLS)
    cells[:, :, CELLS // 2:] = 1  # x > 0
    splats.confine(Region(nerf_sphere, cells))
    splats.render(0, 24).square().sum().backward()
    w, i, j, k = (turns / turns.norm(dim=1, keepdim=True)).T
    least = means[:, 0] - 0.3 * (1 - 2 * (j * j + k * k)).abs()  # x of the end of the long axis
    assert ((means[:, 0] > 0.02) & (least < -0.02)).sum() > 8  # these lie on both sides
    for parameter in splats.parameters():
        own = parameter.grad.flatten(1).abs().sum(1) if parameter.ndim > 1 else parameter.grad.abs()
        assert (own[least < -0.02] == 0).all()
    assert (splats.sh_dc.grad[least > 0.02].abs().sum(1) > 0).float().mean() > 0.8


def test_an_edit_looks_at_the_region_from_close_by(nerf_sphere):
    balls = Balls(nerf_sphere)
    region = ball(nerf_sphere, (-0.35, 0.0, 0.0), 0.3)
    balls.focus(region.closer(), 32)
    views = balls.edited.train
    assert 0 < len(views) <= len(nerf_sphere.train) and nerf_sphere.train is balls.scene.train
    whole = {view.name: view for view in nerf_sphere.train}
    for number, view in enumerate(views):
        camera, own = view.camera, whole[view.name]
        assert camera.width == camera.height == view.pixels.shape[0] == view.pixels.shape[1] < own.camera.width
        left, top = (round(own.camera.lens[i] - camera.lens[i]) for i in (2, 3))
        assert torch.equal(view.pixels, own.pixels[top:top + camera.height, left:left + camera.width])
        far, near = (region.seen(Empty(nerf_sphere), view.camera, 32).mean() for view in (own, view))
        assert near > 2 * far > 0
        assert balls.photograph(number, 32).shape == (1, 3, 32, 32)
    everything = ball(nerf_sphere, (0.0, 0.0, 0.0), 1.0).closer()
    assert [view.camera for view in everything.train] == [view.camera for view in nerf_sphere.train]


@pytest.mark.parametrize("kind", ["bounded", "capture"])
def test_a_step_draws_only_what_can_change(kind, nerf_sphere, request):
    scene = nerf_sphere if kind == "bounded" else request.getfixturevalue("capture")
    nerf = NeRF.fit(scene, steps=60, progress=False, **NERF_SIZES)
    region = ball(scene, (0.0, 0.0, 0.5), 0.3)
    nerf.focus(region.closer(), 24)
    nerf.confine(region)
    camera, drawn = nerf.camera(0, 24), []
    draw = nerf.draw
    nerf.draw = lambda rays_o, *rest, **more: drawn.append(rays_o.shape[1]) or draw(rays_o, *rest, **more)
    step = nerf.render(camera.shifted(0.0, 0.0))
    assert 0 < drawn[0] < camera.width * camera.height and step.requires_grad
    with torch.no_grad():
        assert_close(step.detach(), nerf.render(camera), rtol=0, atol=1e-5)
        nerf.rgb_out.neg_()  # as an edit may do
        drawn.clear()
        few = nerf.render(camera), nerf.depth(camera)
        assert 0 < sum(drawn) < camera.width * camera.height and (few[0] - step).abs().max() > 0.01
        nerf.gate.again = lambda camera: None  # forgets what it has drawn
        for own, wanted in zip(few, (nerf.render(camera), nerf.depth(camera)), strict=True):
            assert_close(own, wanted, rtol=0, atol=1e-4)
        assert sum(drawn) > camera.width * camera.height


@pytest.mark.parametrize("kind", ["bounded", "capture"])
def test_the_main_part_of_a_region_is_connected(kind, nerf_sphere, request):
    scene = nerf_sphere if kind == "bounded" else request.getfixturevalue("capture")
    large, small = (ball(scene, (x, 0.0, 0.0), r).cells for x, r in ((0.35, 0.3), (-0.5, 0.2)))
    main = Region(scene, torch.maximum(large, small)).main()
    assert torch.equal(main.cells, (large > 0.5).float())


def test_a_map_is_split_where_two_groups_of_values_are_farthest_apart():
    low, high = 0.2 + 0.05 * rand(300).tanh(), 0.8 + 0.05 * rand(60, seed=1).tanh()
    level = otsu(torch.cat((low, high)))
    assert low.max() <= level + 1e-6 and level < high.min()
    everywhere = [(a, b) for a in (0.1, 0.5) for b in (0.6, 2.0)]
    for a, b in everywhere:  # against the definition, on few values
        values = torch.tensor([a, a + 0.01, b, b + 0.3, b + 0.02])
        wanted = max(values.tolist(), key=lambda at, values=values: apart(values, at))
        assert_close(otsu(values), torch.tensor(wanted), rtol=0, atol=1e-6)


def apart(values, level):
    """The variance between the values up to a level and those above it."""
    one, two = values[values <= level], values[values > level]
    return len(one) * len(two) * (one.mean() - two.mean()).square().item() if len(two) else 0.0
