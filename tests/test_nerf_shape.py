"""Densities with weights of their own, paint, a look-up table of colours: the colours change without the shape."""
import copy
import types

import pytest
import torch
from conftest import NERF_SIZES, rand
from torch.testing import assert_close

from nerf import NeRF
from pipelines.settings import settings_for
from scene.captures import SceneError
from scene.paint import LookUpTable, Paint, palette
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


@pytest.mark.parametrize("name", ["paint", "lut"])
def test_paint_or_a_table_changes_the_colours_alone_and_is_part_of_the_file(fitted, name, tmp_path):
    nerf, x = copy.deepcopy(fitted), torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    nerf.painted(torch.tensor([[0.1, 0.1, 0.1]])) if name == "paint" else nerf.graded()
    nerf.confine(ball(nerf.scene, (0.0, 0.0, 0.0), 0.8))
    with torch.no_grad():
        assert_close(nerf.render(3, 40), fitted.render(3, 40), rtol=0, atol=1e-5)
    groups = nerf.param_groups(0.0, 0.0, 1.0, **{name: {"paint": 0.5, "lut": 0.05}[name]})
    assert [group["name"] for group in groups if group["lr"]] == [name, *["paint colours"] * (name == "paint")]
    darken(nerf, groups)
    for other, parameter in nerf.named_parameters():
        if not other.startswith((f"{name}.", "gate.")):
            assert torch.equal(parameter, fitted.get_parameter(other)) and not parameter.requires_grad
    up = torch.ones(16, 200)
    (sigma, rgb), (own, was) = nerf.look(x, up), fitted.look(x, up)
    assert torch.equal(sigma, own) and (rgb - was).mean() < -0.01
    nerf.save(tmp_path / "a.safetensors")
    loaded = NeRF.load(tmp_path / "a.safetensors", nerf.scene)
    with torch.no_grad():
        assert torch.equal(loaded.render(3, 40), nerf.render(3, 40))


def test_paint_covers_dark_and_light_alike():
    """Where its grids are 0 it changes nothing; one that is far above the others hides every colour under its own, and
    shares of one half mix with what is bare."""
    colours, x = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.9, 0.8]]), rand(3, 5).float().sigmoid()
    paint, rgb = Paint(colours), rand(3, 5, seed=1).float().sigmoid()
    assert_close(paint(x, rgb), rgb, rtol=0, atol=1e-6)
    with torch.no_grad():
        paint.cover[0][:, 1] = 20.0
        assert_close(paint(x, rgb), colours[1][:, None].expand(3, 5), rtol=0, atol=1e-5)
        paint.cover[0][:, 1] = Paint.BARE
        mixed = paint(x, rgb)
        paint.cover[0][:, 1] = -20.0  # a paint can have no less than nothing
        assert_close(paint(x, rgb), rgb, rtol=0, atol=0.05)
    assert_close(mixed, (rgb + colours[1][:, None]) / 2, rtol=0, atol=0.03)
    paint(x, rgb).sum().backward()
    assert all(grid.grad.abs().sum() > 0 for grid in paint.parameters())


@pytest.mark.parametrize("colours, reason", [
    (torch.zeros(0, 3), " 0 paints, need 1 to 16"), (torch.zeros(10 ** 6, 3), " 1000000 paints"),
    (torch.tensor(0.5), "no readable NeRF"), (torch.zeros(2, 3), "its tensors are not those of the scene")])
def test_a_file_with_other_paints_is_refused(fitted, colours, reason, tmp_path):
    """Before memory is taken for their grids; so is one whose grids are missing."""
    nerf = copy.deepcopy(fitted)
    nerf.paint = torch.nn.Module()
    nerf.paint.register_buffer("colours", colours)
    nerf.save(tmp_path / "a.safetensors")
    with pytest.raises(SceneError, match=f"a.safetensors.*{reason}"):
        NeRF.load(tmp_path / "a.safetensors", nerf.scene)


def test_paints_start_with_the_colours_of_what_is_shown():
    """The means of the clusters, a small one too; nothing of what lies around it; the background if all is empty."""
    red, blue = torch.tensor([0.9, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.6])
    solid = torch.zeros(1, 1, 8, 8)
    solid[..., 2:6, 2:6] = 1
    picture = torch.where(solid > 0, red[:, None, None], 1.0) + 0.02 * rand(1, 3, 8, 8).float()
    picture[0, :, 2, 2:5] = blue[:, None]
    shown = types.SimpleNamespace(edited=types.SimpleNamespace(train=[0] * 9), background=torch.ones(3),
                                  render=lambda *_: picture, depth=lambda *_: solid)
    found = palette(shown, None)
    assert_close(found, torch.stack([red, blue]), rtol=0, atol=0.02)
    assert torch.cdist(found, palette(shown, None, count=3)).amin(1).max() < 0.05
    solid.zero_()
    assert torch.equal(palette(shown, None, count=3), torch.ones(3, 3))


def test_a_look_up_table_changes_equal_colours_alike_and_neighbouring_ones_nearly_so():
    """Between its nodes the table is linear in each channel of the colour: a change at the node of white reaches grey
    not at all, and a colour half-way between grey and white by an eighth."""
    lut, rgb = LookUpTable(), torch.tensor([[0.9, 0.9, 0.5, 0.75], [0.1, 0.1, 0.5, 0.75], [0.2, 0.2, 0.5, 0.75]])
    assert_close(lut(rgb), rgb, rtol=0, atol=1e-6)
    with torch.no_grad():
        lut.lightness[0][..., -1, -1, -1] = -8.0
        assert_close(lut(rgb)[:, :3], rgb[:, :3], rtol=0, atol=1e-6)
        assert_close(lut(rgb).logit()[:, 3], rgb.logit()[:, 3] - 8 / 8 / 3 ** 0.5, rtol=0, atol=1e-5)
        lut.hue[0].normal_(generator=torch.Generator().manual_seed(0))
    changed = lut(rgb)
    assert torch.equal(changed[:, 0], changed[:, 1]) and (changed - rgb).abs().min() > 1e-4
