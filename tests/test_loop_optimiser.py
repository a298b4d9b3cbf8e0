"""loop/optimiser.py: the smooth field against a dense kernel, uniform Adam against its long form, plain groups."""
import math

import pytest
import torch
from conftest import rand
from torch.testing import assert_close

from loop.optimiser import FieldOfSome, SmoothField, SteadyAdam


def dense(field, n):
    """The matrix [2n,2n] of a field and the matrix of its transpose, column by column."""
    units = torch.eye(2 * n, dtype=torch.float64).view(2 * n, n, 2)
    return (torch.stack([f(u).flatten() for u in units], 1) for f in (field, field.transpose))


def test_the_field_approximates_a_gaussian_kernel_and_preserves_translations():
    rest = 40 * torch.rand(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    field = SmoothField(rest, sigma=5.0)
    got, _ = dense(field, 60)
    kernel = torch.exp(-torch.cdist(rest, rest).square() / (2 * 5.0 ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    assert_close(got[::2, ::2], got[1::2, 1::2])
    assert (got[::2, 1::2] == 0).all()  # x and y do not mix
    assert (got[::2, ::2] - kernel).abs().sum(1).max() < 0.3  # of a row's sum of 1
    moved = torch.tensor([[3.0, -2.0]], dtype=torch.float64).expand(60, 2)
    assert_close(field(moved), moved)


def test_field_in_space_and_in_chunks(monkeypatch):
    """Colours of points in space: the rows of a Gaussian kernel, a transpose that fits, the same chunk by chunk."""
    rest = 4 * torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    field, x, y = SmoothField(rest, sigma=0.8), rand(50, 4, 3), rand(50, 4, 3, seed=1)
    kernel = torch.exp(-torch.cdist(rest, rest).square() / (2 * 0.8 ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    got = field(torch.eye(50, dtype=torch.float64))
    assert (got - kernel).abs().sum(1).max() < 0.4 and (got.sum(1) - 1).abs().max() < 1e-12
    assert_close((field(x) * y).sum(), (x * field.transpose(y)).sum())
    whole = field(x)
    monkeypatch.setattr(SmoothField, "FLOATS", 64 * 12 * 7)
    assert_close(field(x), whole, rtol=1e-12, atol=1e-12)
    assert field.nodes < 9 ** 3  # of the box with its rim only the nodes near a point


def test_the_transpose_is_exact_and_frames_preserve_translations():
    rest, frames = 9 * rand(7, 2), rand(7, 2, 2, seed=1)
    field = SmoothField(rest, 4.0, frames=frames)
    forth, back = dense(field, 7)
    assert_close(back, forth.T)
    # a shift of the picture is reproduced exactly, whatever the local coordinates of the points
    shift = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(7, 2)
    assert_close((frames @ field(shift)[..., None])[..., 0], shift)


def test_one_point_moves_freely():
    assert_close(SmoothField(torch.zeros(1, 2), 3.0)(torch.ones(1, 2)), torch.ones(1, 2))


def test_plain_groups_match_torch_adam():
    ours, theirs = ([torch.nn.Parameter(rand(5, 2, seed=i)) for i in range(2)] for _ in "ab")

    def groups(ps):
        return [dict(params=[ps[0]], lr=0.1), dict(params=[ps[1]], lr=0.02, betas=(0.8, 0.9), eps=1e-12)]
    optimisers = SteadyAdam(groups(ours)), torch.optim.Adam(groups(theirs))
    for step in range(4):
        for optimiser, ps in zip(optimisers, (ours, theirs), strict=True):
            for i, p in enumerate(ps):
                p.grad = rand(5, 2, seed=10 * step + i)
            optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("firm", [None, torch.tensor([[0.5], [1.0], [2.0], [1.5], [9.0]]).double()])
def test_a_spring_takes_back_its_share_of_every_displacement(firm):
    """A step equals torch's Adam followed by p <- p + s (rest - p), where s scales with the rate, and with the firmness
    of each row up to 1; s = 0 is Adam."""
    rest = rand(5, 2)
    ours, theirs, free, plain = (torch.nn.Parameter(rest.clone()) for _ in range(4))
    sprung = SteadyAdam([dict(params=[ours], lr=0.1, spring=0.2, name="points"), dict(params=[free], lr=0.1)],
                        firmness=None if firm is None else {"points": firm})
    spring = 0.2 if firm is None else 0.2 * firm
    adam = torch.optim.Adam([dict(params=[theirs], lr=0.1), dict(params=[plain], lr=0.1)])
    for step, share in enumerate((0.5, 1.0, 1.0, 0.25)):
        sprung.param_groups[0]["share"] = share
        for p in (ours, theirs, free, plain):
            p.grad = rand(5, 2, seed=step)
        sprung.step()
        adam.step()
        theirs.data += torch.as_tensor(spring * share).clamp_max(1) * (rest - theirs.data)
    assert_close(ours, theirs)
    assert torch.equal(free, plain)


def test_a_spring_damps_noise_but_not_a_consistent_gradient():
    """In 200 steps a gradient of constant sign moves a point far, a gradient of random sign hardly at all."""
    rng = torch.Generator().manual_seed(0)
    ends = {}
    for spring in (0.0, 0.03):
        p = torch.nn.Parameter(torch.zeros(400))
        optimiser = SteadyAdam([dict(params=[p], lr=0.1, spring=spring, shared=True)])
        for _ in range(200):
            p.grad = torch.cat([torch.ones(200), torch.randn(200, generator=rng)])
            optimiser.step()
        ends[spring] = -p.detach()[:200].mean(), p.detach()[200:].std()
    kept = [ends[0.03][i] / ends[0.0][i] for i in (0, 1)]
    assert ends[0.03][0] > 2 and ends[0.03][0] > 3 * ends[0.03][1]
    assert kept[1] < 0.6


def test_what_is_sparse_moves_by_the_proximal_step_of_a_group_lasso():
    """Each row minimises |x - y|^2 / 2 + s lr |x - rest| for Adam's step y; a weakly pushed row stays to the bit."""
    rest = rand(5, 3)
    ours, theirs = torch.nn.Parameter(rest.clone()), torch.nn.Parameter(rest.clone())
    sparse, adam = SteadyAdam([dict(params=[ours], lr=0.1, sparse=0.3)]), torch.optim.Adam([theirs], lr=0.1)
    for step in range(6):
        for p in (ours, theirs):
            p.grad = rand(5, 3, seed=step)
        sparse.step()
        adam.step()
        for row, (y, at) in enumerate(zip(theirs.data, rest, strict=True)):
            away = (y - at).norm().item()
            theirs.data[row] = at if away <= 0.03 else at + (y - at) * (away - 0.03) / away
    assert_close(ours, theirs)

    p = torch.nn.Parameter(rest.clone())
    optimiser = SteadyAdam([dict(params=[p], lr=0.1, sparse=0.3, shared=True)])
    for _ in range(50):
        p.grad = rest.new_tensor([[1.0], [0.01], [0.01], [0.01], [0.1]]).expand(5, 3).clone()
        optimiser.step()
    assert (p[0] < rest[0] - 1).all() and torch.equal(p[1:4], rest[1:4])

    grid, turned = (torch.nn.Parameter(x) for x in (rand(1, 2, 3, 3), rand(9, 2, seed=1)))
    turned.data = grid.detach()[0].flatten(1).T.clone()
    for p, more in ((grid, {"across": (1,)}), (turned, {})):
        optimiser = SteadyAdam([dict(params=[p], lr=0.1, sparse=0.5) | more])
        for step in range(4):
            push = rand(1, 2, 3, 3, seed=step)
            p.grad = push if p is grid else push[0].flatten(1).T.clone()
            optimiser.step()
    assert_close(grid[0].flatten(1).T, turned)  # a row is one corner of the grid with its two channels


def test_a_shared_moment_and_a_field_match_the_long_form():
    rest = 10 * rand(6, 2)
    p, field = torch.nn.Parameter(rest.clone()), SmoothField(rest, 3.0)
    matrix, _ = dense(field, 6)
    adam = SteadyAdam([dict(params=[p], lr=0.1, name="points", shared=True)], {"points": field})
    free, m, v = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64), 0.0
    for step in range(1, 5):
        grad = rand(6, 2, seed=step)
        p.grad = grad.clone()
        adam.step()
        by_free = matrix.T @ grad.flatten()
        m, v = 0.9 * m + 0.1 * by_free, 0.999 * v + 0.001 * by_free.square().mean()
        free -= 0.1 * (m / (1 - 0.9 ** step)) / (math.sqrt(v / (1 - 0.999 ** step)) + 1e-8)
    assert_close(p.detach(), rest + (matrix @ free).view(6, 2))


def test_a_parameter_with_a_small_gradient_moves_little():
    """Adam moves every number by the rate; a shared second moment keeps the ratios of the gradients."""
    for shared, bound in ((False, 0.9), (True, 0.01)):
        p = torch.nn.Parameter(torch.zeros(2))
        adam = SteadyAdam([dict(params=[p], lr=1.0, shared=shared)])
        p.grad = torch.tensor([1.0, 1e-3])
        adam.step()
        assert (abs(p[1].item()) < bound) == shared and abs(p[0].item()) > 0.9


def test_a_saved_state_continues_bit_identically(tmp_path):
    def run(steps, adam, p):
        for step in steps:
            p.grad = rand(4, 2, seed=step, dtype=torch.float32)
            adam.step()

    def new():
        p = torch.nn.Parameter(rand(4, 2, dtype=torch.float32))
        return SteadyAdam([dict(params=[p], lr=0.1, name="points", shared=True)],
                          {"points": SmoothField(rand(4, 2, dtype=torch.float32), 2.0)}), p
    whole, part, again = new(), new(), new()
    run(range(6), *whole)
    run(range(3), *part)
    torch.save((part[0].state_dict(), part[1].data), tmp_path / "state.pt")
    state, again[1].data = torch.load(tmp_path / "state.pt", weights_only=True)
    again[0].load_state_dict(state)
    run(range(3, 6), *again)
    assert torch.equal(again[1], whole[1])


def test_many_points_need_no_dense_matrix(count=20000):
    rest = 64 * torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    field = SmoothField(rest, 6.0)
    assert field.index.shape == (count, 16) and field.nodes < 400
    assert torch.isfinite(field(rest)).all()


def test_a_field_of_some_points_moves_these_as_if_they_were_all():
    rest, on = rand(30, 3), torch.arange(30) % 3 == 0
    some = torch.nn.Parameter(torch.zeros(30, 2, dtype=torch.float64))
    few = torch.nn.Parameter(torch.zeros(10, 2, dtype=torch.float64))
    for p, field, at in ((some, FieldOfSome(rest, 0.4, on), on), (few, SmoothField(rest[on], 0.4), slice(None))):
        adam = SteadyAdam([{"params": [p], "lr": 0.1, "name": "sh_dc", "shared": True}], fields={"sh_dc": field})
        for seed in range(3):
            p.grad = torch.zeros_like(p)
            p.grad[at] = rand(10, 2, seed=seed) - 0.5
            adam.step()
    assert (some[~on] == 0).all()
    assert_close(some[on], few)
