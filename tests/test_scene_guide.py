"""scene/guide.py and box.in_sight: what guides the fit of a capture to few photographs."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import nerf_pose, nerf_scene
from torch.testing import assert_close

from scene.box import in_sight, sightings
from scene.cameras import Camera
from scene.guide import Exposure, Guide
from scene.photographs import Pixels, View
from scene.reading import load_scene


@pytest.fixture(scope="module")
def views():
    """Twelve views of a ring at distance 4 around the origin, 24 pixels wide."""
    lens = (40.0, 40.0, 12.0, 12.0, *[0.0] * 6)
    return [View(Camera(nerf_pose(2 * math.pi * i / 12)[:3].float(), lens, 24, 24),
                 torch.zeros(24, 24, 3, dtype=torch.uint8), str(i)) for i in range(12)]


@pytest.fixture(scope="module")
def points():
    """A hundred points on a sphere of radius 0.5."""
    return 0.5 * torch.nn.functional.normalize(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), dim=1)


def cell_of(place, cells):
    x, y, z = ((torch.tensor(place) + 2) / 4 * cells).long().tolist()  # contraction is the identity in the box
    return x + cells * (y + cells * z)


def test_nothing_is_before_a_near_plane(views, points):
    clear, plane = in_sight(views, points, torch.zeros(3), 4.5, 32)
    assert plane == pytest.approx(0.6 * 3.5, abs=0.1)  # the nearest points are 3.5 away
    before = views[0].camera.pose[:, 3] - 1.5 * views[0].camera.pose[:, 2]
    assert not clear[cell_of((before / 4.5).tolist(), 32)] and clear[cell_of((0.0, 0, 0), 32)]
    free, none = in_sight(views, None, torch.zeros(3), 4.5, 32)
    assert none == 0 and free[cell_of((before / 4.5).tolist(), 32)] and not (clear & ~free).any()


def test_what_few_of_many_views_see_is_empty(views):
    many, _ = in_sight(views, None, torch.zeros(3), 4.5, 32)
    few, _ = in_sight(views[:3], None, torch.zeros(3), 4.5, 32)
    assert (few & ~many).any()  # where one view of three is enough, two of twelve have to see the same


def test_points_are_seen_where_no_others_hide_them(views, points):
    view, column, row, away = sightings(views, points)
    assert set(view.tolist()) == set(range(12)) and column.max() < 24 and row.min() >= 0
    distances = (points[:, None] - torch.stack([v.camera.pose[:, 3] for v in views])).norm(dim=2)[:, view]
    assert (distances - away).abs().amin(0).max() < 1e-5
    assert (away < 4.1).float().mean() > 0.9  # most of those on the far side are hidden


def test_exposures_are_found_and_have_no_mean():
    torch.manual_seed(0)
    exposure, true = Exposure(4, "cpu"), torch.tensor([0.8, 1.0, 1.25, 1.0])
    optimiser = torch.optim.Adam([exposure.param_group()])
    for _ in range(300):
        rgb, view = torch.rand(3, 64), torch.randint(4, (64,))
        loss = (exposure.exposed(rgb, view) - rgb * true[view]).square().mean() + exposure.biased()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert_close(exposure.exposed(torch.full((3, 4), 0.5), torch.arange(4))[0], 0.5 * true, rtol=0.03, atol=0)
    assert_close(exposure.exposed(torch.full((3, 2), 0.5), [2])[0], torch.full((2,), 0.625), rtol=0.03, atol=0)


@pytest.fixture
def guide(tmp_path, points):
    scene = load_scene(nerf_scene(tmp_path, split=False, alpha=False))
    return Guide(replace(scene, points=points, half=3.0), Pixels(scene.train, "cpu"))


def test_levels_join_from_coarse_to_fine(guide):
    assert guide.at(0.0).opened(8)[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0] * 2
    assert guide.at(0.25).opened(8).sum() == 2 * 5 and guide.at(0.5).opened(8) is None


def test_a_fifth_of_the_rays_meets_points(guide, points):
    rays_o, rays_d, colours, view, away = guide.draw(50, torch.Generator().manual_seed(0))
    assert (away[:10] > 0).all() and colours.shape == rays_d.shape == (3, 50) and view.max() < 10
    met = (rays_o + 3.0 * away * rays_d)[:, away > 0].T  # away is in half sides of the box
    assert torch.cdist(met, points).amin(1).max() < 0.1  # within a pixel there


def test_light_that_ends_where_a_point_is_costs_nothing(guide):
    ray, away, opacity = torch.tensor([0, 0, 1]), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.3])

    def cost(weights, t):
        return guide.at(0.5).strayed(torch.tensor(weights), torch.tensor(t), ray, opacity, away).item()
    assert cost([1.0, 0.0, 0.3], [2.0, 3.0, 5.0]) == 0  # a ray without a point may end anywhere
    assert cost([0.0, 1.0, 0.3], [2.0, 3.0, 5.0]) == pytest.approx(0.1 * 0.5 * 1 / 2)
    assert cost([0.75, 0.25, 0.3], [2.0, 9.0, 5.0]) == pytest.approx(0.1 * 0.5 * 0.25 / 2)
