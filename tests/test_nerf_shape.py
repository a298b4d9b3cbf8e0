"""Densities with weights of their own: a split field looks the same, and its colours change without its shape."""
import copy

import pytest
import torch
from conftest import NERF_SIZES
from torch.testing import assert_close

from nerf import NeRF
from pipelines.settings import settings_for
from scene.region import ball


@pytest.fixture(scope="module")
def fitted(nerf_sphere):
    return NeRF.fit(nerf_sphere, steps=60, progress=False, **NERF_SIZES)


def split(nerf, densities):
    """A copy that is split, and its groups for Adam."""
    nerf = copy.deepcopy(nerf)
    nerf.split()
    return nerf, nerf.param_groups(1e-2, 1e-3, densities)


def darken(nerf, groups, steps=4):
    """Take steps of Adam towards black pictures."""
    optimiser = torch.optim.Adam(groups)
    for step in range(steps):
        optimiser.zero_grad()
        nerf.render(step, 24).square().mean().backward()
        optimiser.step()
        nerf.project_()


def test_a_split_field_looks_the_same_and_so_does_its_file(fitted, tmp_path):
    nerf, _ = split(fitted, 0.0)
    with torch.no_grad():
        assert_close(nerf.render(3, 40), fitted.render(3, 40))
    darken(nerf, nerf.param_groups(1e-2, 1e-3, 0.5))
    nerf.save(tmp_path / "a.safetensors")
    loaded = NeRF.load(tmp_path / "a.safetensors", nerf.scene)
    with torch.no_grad():
        assert torch.equal(loaded.render(3, 40), nerf.render(3, 40))
    nerf.split()  # once is enough
    assert torch.equal(nerf.shape.grid.table, loaded.shape.grid.table)


@pytest.mark.parametrize("densities", [0.0, 0.5])
def test_the_shape_changes_at_its_own_rate_alone(fitted, densities):
    nerf, groups = split(fitted, densities)
    assert [group["lr"] for group in groups] == [1e-2, 1e-3] + ([5e-3, 5e-4] if densities else [])
    x, up = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)), torch.ones(16, 200)
    with torch.no_grad():
        before = nerf.at(x, up)
    darken(nerf, groups)
    with torch.no_grad():
        after = nerf.at(x, up)
    assert torch.equal(before[0], after[0]) == (densities == 0)
    assert (before[1] - after[1]).abs().max() > 0.01


def test_a_table_of_colours_alone_has_one_second_moment(fitted):
    assert not any(group.get("shared") for group in fitted.param_groups())
    _, groups = split(fitted, 0.5)
    assert [group["name"] for group in groups if group.get("shared")] == ["table"]


def test_a_split_field_can_be_confined(fitted, nerf_sphere):
    nerf, _ = split(fitted, 0.0)
    nerf.confine(ball(nerf_sphere, nerf_sphere.centre.tolist(), nerf_sphere.half / 2))
    with torch.no_grad():
        assert (nerf.render(3, 24) - fitted.render(3, 24)).abs().max() < 1e-3
    darken(nerf, nerf.param_groups(1e-2, 1e-3, 0.0), steps=1)
    assert nerf.gate.field.shape is not None and nerf.grid.table.grad.abs().max() > 0


def test_levels_finer_than_the_pictures_stay_in_both_tables(fitted):
    nerf, groups = split(fitted, 1.0)
    nerf.learn_from(16)
    assert nerf.grid.learning == nerf.shape.grid.learning < len(nerf.grid.cells)


def test_settings_of_a_method_within_a_mode_hold_there_alone():
    defaults = {"guidance": {"pds": 10, "dds": 5}, "nerf": {"steps": 5, "pds": {"steps": 2, "guidance": {"pds": 8}}}}
    assert settings_for(defaults, "nerf", "pds")["steps"] == 2
    assert settings_for(defaults, "nerf", "pds")["guidance"] == {"pds": 8, "dds": 5}
    for other in (settings_for(defaults, "nerf", "dds"), settings_for(defaults, "nerf", "pds", local=True),
                  settings_for(defaults, "nerf", "pds", coefficients="dreamcatalyst")):
        assert other["steps"] != 2
    assert settings_for(defaults, "image", "pds")["steps"] == 1000
