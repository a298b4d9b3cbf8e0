"""svg.symmetry: which outlines of a drawing mirror each other, and that an edit keeps them alike unless pushed hard."""
import numpy as np
import pytest
import torch
from conftest import rand
from torch.testing import assert_close

from loop.optimiser import SteadyAdam
from svg.constraints import places
from svg.symmetry import Twins, axis_of, subpaths, symmetry

HEAD = '<circle cx="16" cy="16" r="13" fill="#fc3"/>'
EYES = '<circle cx="11" cy="14" r="2" fill="#642"/><circle cx="21" cy="14" r="2" fill="#642"/>'
WINK = HEAD + EYES + '<path d="M9 20C13 25 19 25 23 20" fill="none" stroke="#642"/>'


def found_in(svg):
    """The axis of a drawing and its pairs of subpaths with a <= b."""
    rest, _, _ = places(svg.layers, svg.frames, svg.loaded["points"], 0)
    axis, pairs = axis_of(subpaths(svg, rest.double().numpy()), svg.size)
    assert {(b, a) for a, b in pairs} == set(pairs)
    return axis, sorted((int(a), int(b)) for a, b in pairs if a <= b)


SYMMETRIC = [(HEAD, 16.0, [(0, 0)]),
             (WINK, 16.0, [(0, 0), (1, 2), (3, 3)]),
             (HEAD + '<path d="M9 12L13 13V15Z"/><path d="M23 12L19 13V15Z"/>', 16.0, [(0, 0), (1, 2)]),
             (HEAD + '<path d="M9 12L13 13V15ZM23 12V12L19 15V13Z"/>', 16.0, [(0, 0), (1, 2)]),    # other vertices
             (HEAD + '<path id="e" d="M9 12L13 13V15Z"/><path d="M9 12L13 13V15Z" transform="matrix(-1 0 0 1 32 0)"/>',
              16.0, [(0, 0), (1, 2)]),
             ('<g transform="translate(3 30) rotate(-90) scale(2)"><path d="M2 2H12L9 6L12 10H2Z"/></g>', 15.0,
              [(0, 0)]),
             ('<path d="M4 4H24L28 20"/>', None, []),
             ('<path d="M4 28L4 4L16 12L28 4V28"/>', 16.0, [(0, 0)]),                              # closed by its fill
             ('<path d="M4 28L4 4L16 12L28 4V28" fill="none" stroke="#000"/>', 16.0, [(0, 0)]),
             ('<path d="M4 20L4 4L16 12L28 4V28" fill="none" stroke="#000"/>', None, []),
             ('<path d="M3 4H29V28H3Z"/><path d="M5 6H9V8Z"/>', 16.0, [(0, 0)]),                   # half of it or more
             ('<circle cx="9" cy="9" r="3"/><path d="M12 30L30 12V30Z"/>', None, []),              # less than a half
             ('<circle cx="5" cy="9" r="4"/><circle cx="5" cy="23" r="4"/>'
              '<circle cx="27" cy="9" r="4"/><circle cx="27" cy="23" r="4"/>', 16.0, [(0, 2), (1, 3)]),
             ('<circle cx="16" cy="16" r="9"/><circle cx="80" cy="16" r="9"/>', 16.0, [(0, 0)]),   # one is not in it
             (HEAD + '<circle cx="11" cy="14" r="1"/><circle cx="21" cy="14" r="4"/>', 16.0, [(0, 0)]),
             ('<rect width="0" height="9"/>', None, []), ("<g/>", None, [])]


@pytest.mark.parametrize("longest", [0.0, 5.0])
@pytest.mark.parametrize("body, axis, pairs", SYMMETRIC)
def test_what_mirrors_what_about_an_upright_axis(load_svg, body, axis, pairs, longest):
    found = found_in(load_svg(body, subdivide=longest))
    assert found[1] == pairs and (found[0] is axis or abs(found[0] - axis) < 0.06)


def test_an_axis_is_the_better_the_closer_images_are(load_svg):
    """A calyx that stands a little beside the middle of an apple has no say."""
    body = '<ellipse cx="16" cy="18" rx="13" ry="12"/><ellipse cx="15" cy="6" rx="2" ry="1.5" fill="#080"/>'
    assert found_in(load_svg(body))[0] == 16


def moved_by(svg, displacements):
    """Points [N,2] whose displacements in the picture are displacements [N,2]."""
    _, frames, _ = places(svg.layers, svg.frames, svg.loaded["points"], 0)
    return svg.loaded["points"] + (torch.linalg.inv(frames) @ displacements[..., None])[..., 0]


FACE = WINK + '<path d="M8 9l4 2" stroke="#642"/><path d="M8 9l4 2" stroke="#642" transform="matrix(-1 0 0 1 32 0)"/>'


def test_symmetric_displacements_stay_and_a_shift_to_the_side_is_a_rest(load_svg):
    """In the picture, whatever the transforms of the shapes: a map that commutes with the mirror leaves no rest, the
    shift to a side nothing else."""
    svg = load_svg(FACE, subdivide=4.0)
    outlines = symmetry(svg)["points"]
    rest, _, _ = places(svg.layers, svg.frames, svg.loaded["points"], 0)
    x, y = (rest - 16).T
    assert sorted(outlines.rows.tolist()) == [*range(len(rest))]
    for even in (torch.stack([0.2 * x, 0.1 * y + 1], 1), torch.stack([0.01 * x * y, 0.01 * x * x], 1)):
        assert outlines.rests(moved_by(svg, even))[0].abs().max() < 2e-3
    away, length = outlines.rests(moved_by(svg, torch.tensor([2.0, 0.0]).expand_as(rest)))
    assert_close(away, torch.tensor([2.0, 0.0]).expand_as(away), atol=1e-4, rtol=0)
    assert_close(length, torch.full((4,), 2.0), atol=1e-4, rtol=0)


def test_outlines_take_the_proximal_step_of_a_group_lasso(load_svg):
    """Of two mirrored triangles, whose vertices have images: d becomes d - (d - R d') / 2 min(1, by / rms)."""
    svg = load_svg('<path d="M4 9L12 11L9 20Z"/><path d="M28 9L23 20L20 11Z"/><path d="M14 24H18L16 28Z"/>')
    outlines = symmetry(svg)["points"]
    moved = rand(9, 2).float() * torch.tensor([1.0] * 6 + [0.05] * 3)[:, None]
    image = moved[[3, 5, 4, 0, 2, 1, 7, 6, 8]] * torch.tensor([-1.0, 1.0])
    rest = (moved - image) / 2
    lengths = [rest[rows].square().sum(1).mean().sqrt() for rows in (slice(0, 6), slice(6, 9))]
    assert lengths[0] > 0.3 > lengths[1]
    wanted = moved - rest * torch.tensor([0.3 / lengths[0]] * 6 + [1.0] * 3)[:, None]
    adam = SteadyAdam([dict(params=[svg.points], lr=0.5, name="points")], forms={"points": [(outlines, 0.6)]})
    svg.points.data.copy_(moved_by(svg, moved))
    adam.step()                                                # without a gradient, Adam itself takes no step
    assert_close(svg.points.detach() - svg.loaded["points"], wanted, atol=1e-5, rtol=0)


def test_noise_is_shared_by_both_eyes_while_a_strong_push_raises_one(load_svg):
    """Under random pushes both eyes end at the same height; a consistent push on the left one leaves them apart."""
    svg = load_svg(WINK, subdivide=4.0)
    mirrored, loaded = symmetry(svg)["points"], svg.loaded["points"].clone()
    left, right = (shape.rows for shape in svg.document.shapes[1:3])
    ends = {}
    for push in (0.0, 10.0):
        for share in (0.0, 0.3):
            rng = torch.Generator().manual_seed(1)
            svg.points.data.copy_(loaded)
            adam = SteadyAdam([dict(params=[svg.points], lr=0.1, name="points", shared=True)],
                              fields={"points": svg.fields(2.0)["points"]}, forms={"points": [(mirrored, share)]})
            for _ in range(40):
                svg.points.grad = torch.randn(loaded.shape, generator=rng)
                svg.points.grad[left, 1] += push
                adam.step()
            moved = (svg.points.detach() - loaded)[:, 1]
            ends[push, share] = (moved[right].mean() - moved[left].mean()).item(), mirrored.rests(svg.points)[1].max()
    assert ends[0.0, 0.3][1] < 1e-5 < 0.1 < ends[0.0, 0.0][1]
    assert abs(ends[0.0, 0.3][0]) < 1e-5 and ends[10.0, 0.0][0] > ends[10.0, 0.3][0] > 2


STOPS = '<linearGradient id="{}"><stop stop-color="#642"/><stop offset="1" stop-color="{}"/></linearGradient>'
TWINS = [(WINK, {"colours": [[1, 2]], "opacities": [[1, 2]]}),
         (HEAD + '<circle cx="11" cy="14" r="2" fill="#f00"/><circle cx="21" cy="14" r="2" fill="#00f"/>',
          {"opacities": [[1, 2]]}),
         (STOPS.format("a", "#fff") + STOPS.format("b", "#fef") + HEAD + '<circle cx="8" cy="9" r="2" fill="url(#a)"/>'
          '<circle cx="24" cy="9" r="2" fill="url(#b)"/>',
          {"stop_colours": [[0, 2], [1, 3]], "stop_offsets": [[0, 2], [1, 3]], "opacities": [[1, 2]]}),
         (STOPS.format("a", "#fff") + STOPS.format("b", "#000") + HEAD + '<circle cx="8" cy="9" r="2" fill="url(#a)"/>'
          '<circle cx="24" cy="9" r="2" fill="url(#b)"/>', {"stop_offsets": [[0, 2], [1, 3]], "opacities": [[1, 2]]}),
         (HEAD + '<path d="M8 9l4 2" stroke="#642" fill="none"/><path d="M24 9l-4 2" stroke="#642" fill="none" '
          'stroke-width="1.05"/>', {"colours": [[1, 2]], "stroke_widths": [[0, 1]], "opacities": [[1, 2]]}),
         (HEAD + '<path d="M8 9l4 2" stroke="#642" fill="none"/><path d="M24 9l-4 2" stroke="#642" fill="none" '
          'stroke-width="1.2"/>', {"colours": [[1, 2]], "opacities": [[1, 2]]}),
         (HEAD + '<circle id="e" cx="11" cy="14" r="2"/><use href="#e" transform="matrix(-1 0 0 1 32 0)"/>', {}),
         (HEAD + '<circle cx="11" cy="14" r="2" fill="#642"/><circle cx="21" cy="14" r="2" fill="#642" stroke="#000"/>',
          {})]


@pytest.mark.parametrize("body, pairs", TWINS)
def test_equal_paints_of_mirror_images_are_found(load_svg, body, pairs):
    held = symmetry(load_svg(body))
    assert held.pop("points") and {name: twins.pairs.T.tolist() for name, twins in held.items()} == pairs


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_equal_paints_take_the_proximal_step_of_a_group_lasso(shape):
    start, moved = rand(*shape), torch.zeros(shape, dtype=torch.float64)
    moved.view(4, -1)[:, 0] = torch.tensor([0.5, 0.3, 0.1, 0.02])
    twins = Twins(start, [(0, 2), (1, 3)])
    for by, wanted in ((0.15, [0.35, 0.16, 0.25, 0.16]), (0.0, [0.5, 0.3, 0.1, 0.02]), (9.0, [0.3, 0.16, 0.3, 0.16])):
        values, expected = start + moved, start.clone()
        expected.view(4, -1)[:, 0] += torch.tensor(wanted).double()
        twins.shrink_(values, by)
        assert_close(values, expected, atol=1e-7, rtol=0)


def test_what_must_not_move_mirrors_nothing(load_svg):
    """With --only, one of two eyes is edited as if there were no other."""
    svg = load_svg(HEAD + EYES.replace("<circle", '<circle id="left"', 1))
    assert len(symmetry(svg)["points"].size) == 2 and symmetry(svg)["colours"].pairs.T.tolist() == [[1, 2]]
    svg.restrict(only=["left"])
    assert symmetry(svg) == {}


def test_shapes_that_a_transform_flattens_are_left_alone(load_svg):
    svg = load_svg(HEAD + '<circle cx="11" cy="14" r="2" transform="scale(1 0)"/>')
    outlines = symmetry(svg)["points"]
    points = svg.loaded["points"] + 1
    outlines.shrink_(points, 0.1)
    assert np.isfinite(points.numpy()).all()
