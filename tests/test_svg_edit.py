"""svg_raster.SVG under an edit: smooth fields, joints, forms, details, opaque shapes, which elements may change."""
import numpy as np
import pytest
import torch
from conftest import rand
from torch.testing import assert_close

from bench.geometry import joint_angles, self_intersections
from loop.optimiser import SteadyAdam
from svg.constraints import places
from svg.forms import forms
from svg.markers import vertices
from svg.outline import SVGError, path_outline
from svg_raster import SVG

CIRCLES = ('<circle id="a" cx="8" cy="8" r="4" fill="#c33"/><g id="g" transform="rotate(30) scale(2 1)"><circle cx="9" '
           'cy="4" r="4" fill="#3c3" opacity=".5"/><path d="M8 8L12 9" stroke="#00f" stroke-width="2"/></g>')


def steps(svg, count=20, sigma=4.0, shared=True):
    """Take steps of Adam along random gradients."""
    adam, generator = SteadyAdam(svg.param_groups(0.5, 0.05, shared=shared)), torch.Generator().manual_seed(0)
    for _ in range(count):
        adam.fields = svg.fields(sigma) if sigma else {}
        for p in svg.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        adam.step()
        svg.project_()


@pytest.mark.parametrize("body", ['<path d="M0 0H9V9Z"/>', '<polygon points="1 1 9 9 3 8"/>', "<g/>"])
@pytest.mark.parametrize("view", ["0 0 32 32", "0 0 0 0"])
def test_a_drawing_without_curves_has_no_smooth_joints(load_svg, body, view):
    svg = load_svg(body, f'viewBox="{view}"')
    svg.restrict()
    if svg.param_groups():
        steps(svg, 2)
    assert len(svg.constraints.joints[0]) == 0 and torch.isfinite(svg.render()).all()


def test_colour_parameters_are_colours_stops_and_opacities(load_svg):
    svg = load_svg(CIRCLES)
    others = {name for name, p in svg.named_parameters() if not any(p is q for q in svg.colour_parameters())}
    assert others == {"points", "stroke_widths", "stop_offsets"}


def test_all_shapes_share_one_field_in_the_picture(load_svg):
    svg = load_svg(CIRCLES)
    field = svg.fields(1e4)["points"]  # so wide that all points move alike in the picture, whatever their transforms
    with torch.no_grad():
        before = svg.segments(1.0)
        svg.points += field(torch.tensor([[2.0, -1.0]]).expand(len(svg.points), 2))
        after = svg.segments(1.0)
    a = svg.frames[before[1]][:, :, :2]
    moved = torch.einsum("sij,sj->si", a, (after[0] - before[0])[:, :2])
    assert_close(moved, torch.tensor([[2.0, -1.0]]).expand_as(moved), atol=1e-3, rtol=0)
    assert svg.fields(4.0)["stroke_widths"](torch.ones(1)) == 1


def test_points_stay_within_the_picture(load_svg):
    """Whatever pushes them out; under transforms too. A point that lies outside in the file goes no farther."""
    svg = load_svg('<rect width="9" height="9" transform="translate(20 2) rotate(30) scale(1.3)"/>'
                   '<path d="M-8 3L9 4L5 20Z"/>', 'viewBox="0 0 32 24"')  # the picture is 32 wide, 24 high, from y = 4
    svg.restrict(inside=True)
    free = svg.points.detach().clone()
    rest, turns, _ = places(svg.layers, svg.frames, free, 0)
    svg.project_()
    assert_close(svg.points.detach(), free)
    for push in (60.0, -60.0):
        with torch.no_grad():
            svg.points += torch.linalg.inv(turns) @ torch.full((2,), push)
        svg.project_()
        now = rest + (turns @ (svg.points.detach() - free)[..., None])[..., 0]
        low, high = torch.minimum(rest, torch.tensor([0.0, 4.0])), torch.maximum(rest, torch.tensor([32.0, 28.0]))
        assert (now > low - 1e-3).all() and (now < high + 1e-3).all()
        assert_close(now, high if push > 0 else low, atol=1e-3, rtol=0)


def test_a_flattened_shape_keeps_the_field_finite(load_svg):
    svg = load_svg('<rect width="9" height="9" transform="scale(1 0)"/><rect x="3" width="9" height="9"/>')
    assert torch.isfinite(svg.fields(4.0)["points"](torch.ones(len(svg.points), 2))).all()


def test_smooth_joints_stay_smooth_and_corners_stay_free(load_svg):
    body = CIRCLES + '<path id="p" d="M4 20C4 16 10 16 10 20L10 28C12 30 14 30 16 28Q18 26 20 28L28 20Z" fill="#333"/>'
    free, kept = load_svg(body), load_svg(body)
    kept.restrict()
    before = joint_angles(free, free.loaded["points"])
    smooth, corners = before < 5, before > 30
    assert smooth.sum() >= 9 and corners.sum() >= 3
    for svg in (free, kept):
        steps(svg, sigma=0, shared=False)
    after = [joint_angles(svg, svg.points.detach()) for svg in (free, kept)]
    assert (after[0][smooth] > 30).any() and after[1][smooth].max() < 1
    assert (after[1][corners] - before[corners]).abs().max() > 5


def test_crossings_are_counted(load_svg):
    svg = load_svg('<path d="M2 2L20 20L20 2L3 21Z"/><path d="M4 4H9V9H4Z"/><circle cx="20" cy="20" r="5"/>')
    assert self_intersections(svg, svg.points.detach()) == 1
    assert self_intersections(load_svg(CIRCLES), load_svg(CIRCLES).points.detach()) == 0


SUBDIVIDED = ['<circle cx="16" cy="16" r="12" fill="#c33"/>', '<path d="M4 4Q28 0 28 28T4 28Z" fill="#393"/>',
              '<rect x="2" y="5" width="26" height="20" rx="6" fill="#36c" transform="rotate(10) scale(1 .8)"/>',
              '<path d="M3 20A13 9 20 1 1 29 20L3 20Z" fill="#333"/><polyline points="2 2 30 3 28 30" fill="#ec3"/>',
              '<path d="M3 3C30 -5 30 40 3 28M5 16H29" fill="none" stroke="#555" stroke-width="2" '
              'stroke-dasharray="3 2" stroke-linecap="round"/><path d="M9 9Z" stroke="red" stroke-linecap="round"/>']


@pytest.mark.parametrize("body", SUBDIVIDED)
def test_subdivided_outlines_are_the_same_in_short_pieces(load_svg, tmp_path, body):
    """They draw the same picture, before an edit and, read from the file that was saved, after one."""
    whole, svg = load_svg(body), load_svg(body, subdivide=4.0)
    assert len(svg.points) > len(whole.points)
    assert_close(svg.render(), whole.render(), atol=0.02, rtol=0)
    for shape in svg.document.shapes:
        points = [p * shape.scale for p in shape.outline.points]
        for curve in shape.outline.curves:
            assert abs(points[curve[3]] - points[curve[0]]) < 6.0  # equal parts of the parameter differ in length
        again = shape.outline.subdivided(8.0 / shape.scale)
        assert shape.outline.drawn() == again.drawn() and shape.outline.points == again.points
    svg.restrict()
    steps(svg, 5)
    svg.save(tmp_path / "saved.svg")
    assert_close(SVG.load(tmp_path / "saved.svg", size=32).render(), svg.render(), atol=0.02, rtol=0)


def test_a_subdivided_shape_follows_the_field_that_moves_its_neighbours(load_svg):
    """A square below one whose upper side has more points: where all points move by one field, nothing of it shows."""
    body = ('<path d="M4 8H28V28H4Z" fill="#f00"/><path d="M4 8'
            + "".join(f"L{x} 8" for x in range(5, 29)) + 'V28H4Z" fill="#000"/>')
    shown = []
    for longest in (0.0, 2.0):
        svg = load_svg(body, subdivide=longest)
        with torch.no_grad():
            svg.points[:, 1] -= 5 * torch.sin(svg.points[:, 0] / 4)
            red = svg.render()[0]
        shown.append((red[0] - red[2] > 0.3).sum().item())  # on a shared edge it can be a quarter
    assert shown[0] > 5 and shown[1] == 0


def test_subdivision_has_its_limits(load_svg, monkeypatch):
    """Markers stand on the vertices of their path; a curve has at most 64 parts, a drawing few enough points."""
    marked = ('<marker id="m" orient="auto"><path d="M0 0H3V3Z"/></marker>'
              '<path d="M2 2H30V30" marker-mid="url(#m)" fill="none" stroke="#000"/>')
    counts = [[len(shape.outline.points) for shape in load_svg(marked, subdivide=longest).document.shapes]
              for longest in (0.0, 2.0)]
    assert counts[0][:2] == [3, 3] and counts[1][0] == 3 < counts[1][1]
    line = '<path d="M0 0H90000V9Z" fill="#000"/>'
    assert len(load_svg(line, subdivide=0.01).document.shapes[0].outline.curves) == 3 * 64
    monkeypatch.setattr("svg.document.MAX_SUBDIVIDED", 600)
    assert [len(shape.outline.points) for shape in load_svg(line * 2, subdivide=0.01).document.shapes] == [576, 3]
    arc, turned = (path_outline("M2 9A9 9 0 1 1 20 9L20 10").subdivided(longest) for longest in (99.0, 5.0))
    assert arc.inside == path_outline("M2 9A9 9 0 1 1 20 9").inside and len(vertices(turned)) == len(vertices(arc)) == 3


FORMS = [('<circle cx="9" cy="9" r="6"/><ellipse cx="9" cy="9" rx="6" ry="1"/><rect width="8" height="9" rx="3"/>', 3),
         ('<path d="M28 16A12 5 30 1 1 6 16A12 5 30 1 1 28 16"/>', 1),                          # without a "Z"
         ('<path d="M36 18c0 9.94-8.06 18-18 18S0 27.94 0 18 8.06 0 18 0s18 8.06 18 18"/>', 1),
         ('<path d="M4 16a9 9 0 1 0 18 0a9 9 0 1 0-18 0zM8 16a5 5 0 1 0 10 0a5 5 0 1 0-10 0z"/>', 2),  # a ring
         ('<path d="M2 2H30V9H2Z"/><polygon points="2 2 9 3 12 9 5 8"/>', 2),
         ('<path d="M2 2H9H30V9H2Z" transform="rotate(30) scale(2 1)"/>', 1),
         ('<path d="M2 9Q2 2 9 2T16 9T9 16T2 9Z"/>', 0),                                        # 4 % off a circle
         ('<path d="M4 16A9 9 0 0 1 22 16Z"/><path d="M4 16A9 9 0 0 1 22 16" fill="none" stroke="#000"/>', 0),
         ('<path d="M2 2H30V9L3 9.5Z"/><polygon points="2 2 9 3 12 9"/><path d="M2 2H9V9H5V7H2Z"/>', 0),
         ('<rect width="9" height="0" stroke="#000"/><circle cx="9" cy="9" r="0"/><ellipse rx="5" ry="0"/>', 0),
         ('<path d="M2 2C9 9 16-5 30 2V9H2Z"/><path d="M5 5H5V5H5Z" stroke="#000"/>', 0)]


@pytest.mark.parametrize("longest", [0.0, 3.0])
@pytest.mark.parametrize("body, count", FORMS)
def test_circles_ellipses_and_rectangles_are_found_however_they_are_written(load_svg, body, count, longest):
    svg = load_svg(body, subdivide=longest)
    found, _ = forms(svg.document)
    assert len(found) == count and all(len(set(rows)) == len(rows) for rows in found)
    if count and len(svg.document.shapes) == 1:
        assert sorted(row for rows in found for row in rows) == [*range(len(svg.points))]


def test_forms_take_the_proximal_step_of_a_group_lasso(load_svg):
    """What an affine map explains stays; of the rest, a root mean square in pixels of the picture becomes shorter by
    the rate times the share, and nothing is left where it was shorter than that. Other shapes do not change."""
    svg = load_svg('<circle cx="9" cy="9" r="6"/><rect x="60" y="2" width="9" height="5" transform="scale(.3 .5)"/>'
                   '<path d="M20 20Q30 18 25 30Q24 26 20 20Z"/>', subdivide=3.0)
    held, rest, moved = svg.forms(), svg.loaded["points"], rand(len(svg.points), 2).float()
    moved[svg.document.shapes[1].rows] *= 0.1
    adam = SteadyAdam([dict(params=[svg.points], lr=0.5, name="points")], forms={"points": [(held, 0.6)]})
    svg.points.data += moved                                   # without a gradient, Adam itself takes no step
    adam.step()
    gone = []
    for number, shape in enumerate(svg.document.shapes[:2]):
        x, d = rest[shape.rows].double(), moved[shape.rows].double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        away = d - x @ torch.linalg.solve(x.T @ x, x.T @ d)
        length = (away @ svg.frames[number, :, :2].double().T).square().sum(1).mean().sqrt()
        wanted = rest[shape.rows] + d - away * min(0.3 / length, 1)
        assert_close(svg.points.detach()[shape.rows].double(), wanted, atol=1e-5, rtol=0)
        gone.append(bool(length < 0.3))
    last = svg.document.shapes[2].rows
    assert gone == [False, True] and torch.equal(svg.points.detach()[last], (rest + moved)[last])


def test_large_forms_are_firmer_than_small_ones(load_svg):
    """Rests become shorter by the step times the firmness of the shape; lines know none."""
    svg = load_svg('<circle cx="16" cy="16" r="14"/><circle cx="9" cy="9" r="2" fill="#f00"/>'
                   '<path d="M2 2H30L9 28Z"/>', subdivide=3.0)
    firmness = svg.details(0.3).firmness()
    firm, even = svg.forms(firmness), svg.forms()
    moved = svg.loaded["points"] + rand(len(svg.points), 2).float()
    before, after = firm.rests(moved)[1], moved.clone()
    assert torch.equal(before, even.rests(moved)[1])
    firm.shrink_(after, 0.1)
    assert_close(firm.rests(after)[1], before - 0.1 * torch.tensor([1.75, 0.5] + [firm.LINES] * 3), atol=1e-4, rtol=0)
    even.shrink_(moved, 0.1)
    assert_close(even.rests(moved)[1], before - 0.1 * torch.tensor([1.0, 1.0] + [even.LINES] * 3), atol=1e-4, rtol=0)


def test_split_lines_become_straight_between_their_ends(load_svg):
    """Of a triangle: the corners stay where they are, and the points in between come to lie on the lines between them.
    Lines that are not split, and those of rectangles, are none here, nor are straight pieces in a row in the file."""
    body = '<path d="M2 2H30L9 28Z" transform="rotate(20) scale(.9)"/>'
    row = '<path d="M2 2H5H8H11Q9 9 2 9"/>'
    for other, longest in ((body, 0.0), ('<rect width="30" height="30"/>', 3.0), (row, 9.0)):
        assert forms(load_svg(other, subdivide=longest).document)[1] == []
    svg = load_svg(body, subdivide=9.0)
    held, rest = svg.forms(), svg.loaded["points"]
    moved = rest + rand(len(rest), 2).float()
    some, whole = moved.clone(), moved.clone()
    held.shrink_(some, 0.1)
    held.shrink_(whole, 100.0)
    assert_close(held.rests(some)[1], held.rests(moved)[1] - 0.1 * held.LINES)
    lines = [held.rows[held.owner == number] for number in range(3)]
    assert len(lines) == held.owner.max() + 1 and sum(map(len, lines)) == len(rest) + 3
    for rows in lines:
        first, last = rows[0], rows[-1]
        assert torch.equal(whole[rows[[0, -1]]], moved[rows[[0, -1]]])
        share = (rest[rows] - rest[first]).norm(dim=1) / (rest[last] - rest[first]).norm()
        assert_close(whole[rows], torch.lerp(moved[first], moved[last], share[:, None]), atol=1e-4, rtol=0)


def test_a_circle_becomes_an_ellipse_but_keeps_no_noise(load_svg):
    """Under a consistent push it stretches as far with the constraint as without; random pushes leave it an ellipse."""
    svg = load_svg('<circle cx="16" cy="16" r="8"/>', subdivide=3.0)
    held, rest, rng = svg.forms(), svg.loaded["points"].clone(), torch.Generator().manual_seed(0)
    ends = {}
    for share in (0.0, 0.5):
        svg.points.data.copy_(rest)
        adam = SteadyAdam([dict(params=[svg.points], lr=0.1, name="points", shared=True)],
                          forms={"points": [(held, share)]})
        for _ in range(60):
            svg.points.grad = torch.randn(rest.shape, generator=rng)
            svg.points.grad[:, 0] -= (rest[:, 0] - 16) / 8
            adam.step()
        moved, x = (svg.points.detach() - rest)[:, 0], rest[:, 0] - 16
        ends[share] = (moved * x).sum() / x.square().sum(), held.rests(svg.points)[1]
    assert ends[0.5][0] > 0.9 * ends[0.0][0] > 0.1 and ends[0.5][1] < 0.2 * ends[0.0][1]


BODY = '<circle id="body" cx="16" cy="16" r="12" fill="#f93"/>'
STOPS = ('<linearGradient id="{}"><stop stop-color="{}"/><stop offset="1" stop-color="{}"/></linearGradient>'
         '<circle cx="16" cy="16" r="{}" fill="url(#{})"/>')
FOLLOWING = [(BODY + '<circle cx="14" cy="15" r="1" fill="#fb4"/>', [(1, 0, 1)]),
             (BODY + '<g transform="translate(10 9) rotate(20) scale(.5)"><path d="M4 4H9V9Z" fill="#fb4"/></g>',
              [(1, 0, 1)]),
             (BODY + '<path d="M9 16H20" fill="none" stroke="#fb4"/>', [(1, 0, 1)]),
             (BODY + '<circle cx="14" cy="15" r="1" fill="#03f"/>', []),                   # another colour
             (BODY + '<circle cx="27" cy="16" r="3" fill="#fb4"/>', []),                   # half beside it
             ('<circle cx="14" cy="15" r="1" fill="#fb4"/>' + BODY, []),                   # below it
             ('<path d="M2 2H30V30H2ZM6 6H26V26H6Z" fill-rule="evenodd" fill="#f93"/>'     # in its hole
              '<circle cx="16" cy="16" r="3" fill="#fb4"/>', []),
             ('<path d="M2 2H30V30H2ZM6 6H26V26H6Z" fill="#f93"/><circle cx="16" cy="16" r="3" fill="#fb4"/>',
              [(1, 0, 1)]),
             (BODY + '<circle cx="16" cy="16" r="9" opacity=".3"/><circle cx="14" cy="15" r="1" fill="#fb4"/>',
              [(2, 0, 1)]),                                                                # below a shade
             (BODY + '<circle cx="16" cy="16" r="9" fill="#03f"/><circle cx="14" cy="15" r="1" fill="#fb4"/>', []),
             (BODY + '<circle cx="16" cy="16" r="9" fill="#fa3"/><circle cx="14" cy="15" r="1" fill="#fb4"/>',
              [(1, 0, 1), (2, 0, 1), (2, 1, 1)]),                                          # a detail of a detail
             (BODY + '<g fill="#fb4"><circle cx="14" cy="15" r="1"/><circle cx="2" cy="2" r="1"/></g>', [(1, 0, 1)]),
             (BODY + '<circle id="c" cx="14" cy="15" r="1" fill="#fb4"/><use href="#c" y="4"/>', [(1, 0, 1)]),
             (BODY + '<circle id="c" cx="14" cy="15" r="1" fill="#fb4"/><use href="#c" y="-14"/>', []),  # one beside it
             ('<circle cx="16" cy="16" r="12" fill="#f93"/><circle cx="16" cy="16" r="2" fill="#f93"/>', [(1, 0, 1)]),
             ('<circle id="c" cx="16" cy="16" r="8" fill="#f93"/><use href="#c" transform="translate(8 8) scale(.5)"/>',
              []),                                                                         # it lies on itself
             (BODY + '<mask id="m"><circle cx="14" cy="15" r="4" fill="#fc4"/></mask>'
              '<rect width="32" height="32" fill="#00f" mask="url(#m)"/><circle cx="9" cy="9" r="1" fill="#fb4"/>', []),
             (STOPS.format("a", "#f93", "#fa3", 12, "a") + '<circle cx="14" cy="15" r="1" fill="#fb4"/>',
              [(0, 1, 0.5), (0, 2, 0.5)]),
             (BODY + STOPS.format("a", "#fb4", "#fa5", 5, "a"), [(1, 0, 1), (2, 0, 1)]),
             (STOPS.format("a", "#f93", "#fa3", 12, "a") + STOPS.format("b", "#fb4", "#fa5", 5, "b"),
              [(2, 0, 0.5), (2, 1, 0.5), (3, 0, 0.5), (3, 1, 0.5)]),
             ('<g/>', [])]


@pytest.mark.parametrize("body, entries", FOLLOWING)
def test_details_follow_what_they_lie_on(load_svg, body, entries):
    """Entries (row of the detail, row of its host, share), solid colours before stops."""
    details = load_svg(body, subdivide=5.0).details(0.3)
    found = zip(details.rows.tolist(), details.of.tolist(), details.share[:, 0].tolist(), strict=True)
    assert sorted(found) == entries


FIRM = [('<circle cx="16" cy="16" r="12"/>', [1.5]), ('<circle cx="16" cy="16" r="2"/>', [0.5]),
        ('<rect width="32" height="32"/><rect width="320" height="320"/>', [2.0, 2.0]),
        ('<g transform="scale(.5) rotate(90 9 9)"><rect x="2" y="2" width="36" height="16"/></g>', [0.75]),
        (BODY + '<circle cx="14" cy="15" r="1" fill="#fb4"/><circle cx="20" cy="15" r="5" fill="#00f"/>',
         [1.5, 1.5, 0.625]),                                                               # a detail, and what is none
        (BODY + '<circle cx="14" cy="15" r="1" fill="#fb4" stroke="#00f" stroke-width=".2"/>', [1.5, 1.5]),
        (BODY + '<circle cx="16" cy="16" r="9" fill="#fa3"/><circle cx="14" cy="15" r="1" fill="#fb4"/>', [1.5] * 3),
        ('<path d="M3 3H3" fill="none" stroke="#000" stroke-linecap="round"/>', [0.5])]


@pytest.mark.parametrize("body, firm", FIRM)
def test_the_spring_is_firm_for_large_shapes_and_their_details(load_svg, body, firm):
    """By the square root of the area of the bounding box, in halves of the picture's side, from a half to two."""
    svg = load_svg(body, subdivide=5.0)
    found = svg.details(0.3).firmness()
    assert found.shape == (len(svg.points), 1)
    for shape, wanted in zip(svg.document.shapes, firm, strict=True):
        assert_close(found[shape.rows], torch.full_like(found[shape.rows], wanted), atol=1e-3, rtol=0)


def test_a_detail_is_only_as_unlike_as_it_is_allowed_to_be(load_svg):
    body = BODY + '<circle cx="14" cy="15" r="1" fill="#fb4"/>'
    distance = (2 ** 2 + 1 ** 2) ** 0.5 * 17 / 255
    assert [len(load_svg(body).details(share * distance).rows) for share in (0, 0.99, 1.01)] == [0, 0, 1]


def test_a_detail_takes_the_step_of_its_host_beside_its_own(load_svg):
    """Of solid colours and of stops; colours that are sparse go back afterwards, so that the two stay together."""
    body = (BODY + '<circle cx="14" cy="15" r="1" fill="#fb4"/><circle cx="2" cy="2" r="1" fill="#fb4"/>'
            + STOPS.format("a", "#fb4", "#fa5", 5, "a"))
    for sparse in (0.0, 0.3):
        ends = []
        for alike in (0.0, 0.3):
            svg = load_svg(body)
            groups = [group | {"sparse": sparse} for group in svg.param_groups(0.0, 0.01, colours_only=True)]
            adam = SteadyAdam(groups, details=svg.details(alike) if alike else None)
            for _ in range(5):
                svg.colours.grad = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
                svg.stop_colours.grad = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
                adam.step()
            ends.append([getattr(svg, name).detach() - svg.loaded[name] for name in ("colours", "stop_colours")])
        (alone, stops), (colours, following) = ends
        assert (alone[0] < -0.02).all() and (alone[1:] == 0).all() and (stops[0] == 0).all()
        assert_close(colours, torch.stack([alone[0], alone[0], alone[2]]), atol=1e-6, rtol=0)
        assert_close(following[0], torch.cat([alone[0], torch.zeros(1)]), atol=1e-6, rtol=0)
        if not sparse:
            assert_close(following[1], stops[1] + following[0], atol=1e-6, rtol=0)
        assert (following[:, 3] == 0).all() and following[1, 0] > following[0, 0]


def test_opaque_shapes_stay_opaque_by_default(load_svg):
    body = (CIRCLES + '<linearGradient id="l"><stop stop-color="#f00"/><stop offset="1" stop-color="#00f" '
            'stop-opacity=".5"/></linearGradient><rect width="9" height="9" fill="url(#l)"/>')
    svg, free = load_svg(body), load_svg(body)
    svg.restrict()
    free.restrict(opacities=True)
    opaque = svg.loaded["opacities"] == 1
    for one in (svg, free):
        steps(one)
    assert (svg.opacities[opaque] == 1).all() and (svg.opacities[~opaque] != svg.loaded["opacities"][~opaque]).all()
    assert svg.stop_colours[0, 3] == 1 and svg.stop_colours[1, 3] != 0.5
    assert (free.opacities[opaque] < 1).any() and free.stop_colours[0, 3] < 1


def test_only_the_named_elements_change(load_svg, tmp_path):
    svg = load_svg(CIRCLES)
    svg.restrict(only=["g"])
    steps(svg)
    svg.save(tmp_path / "saved.svg")
    saved = (tmp_path / "saved.svg").read_text()
    assert '<circle id="a" cx="8" cy="8" r="4" fill="#c33"' in saved and 'fill="#3c3"' not in saved
    again = SVG.load(tmp_path / "saved.svg", size=32)
    assert np.abs((again.render() - svg.render()).detach().numpy()).max() < 0.02
    with pytest.raises(SVGError, match="no element has the id 'zzz'; there are: a, g"):
        svg.restrict(only=["zzz"])


def test_an_element_that_is_used_changes_with_its_use(load_svg):
    svg = load_svg('<defs><circle id="c" cx="8" cy="8" r="4"/></defs><use id="u" href="#c"/>'
                   '<rect width="3" height="3"/>')
    svg.restrict(only=["u"])
    steps(svg)
    changed = (svg.points != svg.loaded["points"]).any(1)
    first = svg.document.shapes[0]
    assert changed[first.first:first.first + len(first.outline.points)].all() and not changed.all()
