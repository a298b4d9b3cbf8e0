"""toy.py: the exact noise prediction in the plane, and the trajectories of SDS, DDS and PDS."""
import math

import torch
from conftest import rand
from PIL import Image
from torch.testing import assert_close

import toy


def test_the_plane_has_an_exact_noise_prediction():
    prior, x, t = toy.world(), rand(4, 2, 1, 1).requires_grad_(), torch.tensor([10, 300, 600, 990])
    abar, y = prior.abar[t], torch.tensor([1])

    def log_density(means):  # the long form: one normal distribution per component
        scale, deviation = abar.sqrt(), (abar * prior.sigma ** 2 + 1 - abar).sqrt()
        parts = [torch.distributions.Normal(scale[:, None] * m, deviation[:, None]).log_prob(x.flatten(1)).sum(1)
                 for m in means]
        return torch.stack(parts).logsumexp(0) - math.log(len(means))

    def eps(means):
        grad, = torch.autograd.grad(log_density(means).sum(), x)
        return -(1 - abar).sqrt().view(-1, 1, 1, 1) * grad
    cond, uncond = eps(prior.means[1]), eps(prior.means.flatten(0, 1))
    assert_close(prior.eps(x.detach(), t, y), uncond + prior.guidance * (cond - uncond))
    got = prior.log_density(x.detach().flatten(1), prior.means[1].expand(4, -1, -1), abar)[0]
    assert_close(got, log_density(prior.means[1]).detach())


def test_the_plane_shows_the_claims_of_the_paper(tmp_path, capsys, monkeypatch):
    ways, trajectories = {}, toy.trajectories

    def recorded(prior, loss, seed, **options):
        way = trajectories(prior, loss, seed, **options)
        ways.setdefault(loss.__name__, way)
        return way
    monkeypatch.setattr(toy, "trajectories", recorded)
    monkeypatch.setattr(toy, "STEPS", 700)
    assert toy.main(["--out", str(tmp_path)]) == 0
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:5]]
    sds, dds, ours, without = ([float(x) for x in row[1:]] for row in rows)
    assert ours[0] < 0.6 * min(sds[0], dds[0], without[0])  # nearest to the source
    assert 0 < ours[2] < 0.25 * min(sds[2], dds[2], without[2])  # beyond the boundary, and nearest to it
    assert Image.open(tmp_path / "toy.png").size == (3 * 360, 360)
    spread = [ways[name][-1].std(0).norm() / ways[name][0].std(0).norm() for name in ("sds_loss", "pds_loss")]
    assert spread[0] < 0.1 and spread[1] > 0.8  # SDS ends in one point, PDS keeps the samples apart
    assert (tmp_path / "toy.svg").read_text().count("<polyline") == 3 * 61
