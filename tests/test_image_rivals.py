"""image/rivals.py: IDS and SSD against independent forms of their arithmetic, their gradients, edits by them."""
import math

import pytest
import torch
from conftest import rand
from torch.testing import assert_close

import options
import run
import toy
from edit import Distillation
from image.picture import Picture
from image.rivals import ids_loss, ssd_loss
from pds import dds_loss
from pipelines.settings import PAPER, settings_for
from prior import Prior

MEANS = torch.tensor([[[-1.0, 0.5]], [[1.5, 0.0]]], dtype=torch.float64)  # one Gaussian for each of two prompts
SRC, TGT = torch.tensor([0]), torch.tensor([1])


def gradient(loss, prior, x0_tgt, *args, **options):
    """The gradient of a loss with respect to x0_tgt, times the batch size: the expression in the paper."""
    x0 = x0_tgt.clone().requires_grad_()
    loss(prior, x0, *args, **options).backward()
    return x0.grad * len(x0)


def test_ids_moves_the_noise_until_the_source_is_predicted():
    """For a Gaussian of deviation s the prediction of x0 has the slope k = sqrt(abar) s^2 / (abar s^2 + 1 - abar), so
    that a gradient step on the distance is k times the unit vector towards x0."""
    prior, t = toy.Mixtures(MEANS), torch.tensor([300, 620])
    x0_src, x0_tgt, noise = (rand(2, 2, 1, 1, seed=seed) for seed in (1, 2, 3))
    abar, s = prior.abar[t][:, None], prior.sigma
    var, source = abar * s ** 2 + 1 - abar, x0_src.flatten(1)

    def x0_hat(x_t, mean):
        return mean + abar.sqrt() * s ** 2 / var * (x_t - abar.sqrt() * mean)

    def eps(x_t, mean):
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / var
    for rounds in (0, 1, 3):
        x_t = abar.sqrt() * source + (1 - abar).sqrt() * noise.flatten(1)
        for _ in range(rounds):
            way = source - x0_hat(x_t, MEANS[0])
            x_t = x_t + abar.sqrt() * s ** 2 / var * way / way.norm(dim=1, keepdim=True)
        both = (x_t - abar.sqrt() * source) / (1 - abar).sqrt()
        target = abar.sqrt() * x0_tgt.flatten(1) + (1 - abar).sqrt() * both
        wanted = eps(target, MEANS[1]) - eps(x_t, MEANS[0])
        found = gradient(ids_loss, prior, x0_tgt, x0_src, TGT, SRC, t, noise, rounds=rounds)
        assert_close(found.flatten(1), wanted, atol=1e-9, rtol=1e-9)
    # without rounds IDS is DDS
    plain, dds = (gradient(loss, prior, x0_tgt, x0_src, TGT, SRC, t, noise, **more)
                  for loss, more in ((ids_loss, {"rounds": 0}), (dds_loss, {})))
    assert_close(plain, dds, atol=1e-12, rtol=1e-12)


def test_ids_differentiates_through_the_network(pipelines):
    """Against finite differences of the distance |x0_src - x0_hat| along random directions."""
    prior = Prior.from_pretrained(pipelines["sd"]).at(7.5)
    prior.network.module.double()
    x0_src, noise, t = (rand(1, 4, 8, 8, seed=1), rand(1, 4, 8, 8, seed=2), torch.tensor([500]))
    y_src, y_tgt = prior.embed("a cat"), prior.embed("a dog")
    seen, plain = [], prior.eps

    def eps(x_t, t, y):
        seen.append(x_t.detach().clone())
        return plain(x_t, t, y).double()
    prior.eps = eps
    abar = prior.abar[500]

    def distance(x_t):
        with torch.no_grad():
            x0_hat = (x_t - (1 - abar).sqrt() * eps(x_t, t, y_src)) / abar.sqrt()
            return (x0_src - x0_hat).norm().item()
    ids_loss(prior, x0_src.clone().requires_grad_(), x0_src, y_tgt, y_src, t, noise, rounds=1)
    start, moved = seen[0], seen[1][1:]  # the last call holds the target and, second, the source
    step = start - moved
    for seed in range(3):
        way = rand(1, 4, 8, 8, seed=10 + seed)
        way = way / way.norm()
        slope = (distance(start + 1e-2 * way) - distance(start - 1e-2 * way)) / 2e-2
        assert (step * way).sum().item() == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_ssd_is_the_sum_of_its_four_terms(pipelines):
    prior = Prior.from_pretrained(pipelines["sd"]).at(7.5)
    x0_tgt, x0_src, noise = (rand(2, 4, 8, 8, seed=seed).float() for seed in (1, 2, 3))
    t, y_src, y_tgt = torch.tensor([150, 800]), prior.embed("a cat"), prior.embed("a dog")
    rows = []
    for i in range(2):
        abar = prior.abar[t[i]].float()
        x_t, xs_t = (abar.sqrt() * x[i:i + 1] + (1 - abar).sqrt() * noise[i:i + 1] for x in (x0_tgt, x0_src))

        def plain(x, words, i=i):
            return prior._predict(x, t[i:i + 1], [words])[0]
        null = prior.embed("")
        push = (2.0 / 2 * (plain(x_t, y_src) - plain(xs_t, null)) + 7.5 / 2 * (plain(x_t, y_tgt) - plain(x_t, y_src))
                + 5.5 * (plain(x_t, y_tgt) - plain(x_t, null)))  # at guidance 7.5
        rows.append((push, 0.075 * math.exp((t[i].item() - 1) / 1000) * (x_t - xs_t)))
    push, pull = (torch.cat(part) for part in zip(*rows, strict=True))
    found = gradient(ssd_loss, prior, x0_tgt, x0_src, y_tgt, y_src, t, noise)
    assert_close(found, push + pull, atol=1e-5, rtol=1e-5)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    found = gradient(ssd_loss, prior, x0_tgt, x0_src, y_tgt, y_src, t, noise, mask=mask)
    assert_close(found, mask * push + pull, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", [ids_loss, ssd_loss])
def test_a_batch_is_the_mean_of_its_rows_and_only_the_target_gets_a_gradient(pipelines, loss):
    prior = Prior.from_pretrained(pipelines["sd"]).at(3.0)
    x0_tgt, x0_src, noise = (rand(2, 4, 8, 8, seed=seed).float() for seed in (1, 2, 3))
    x0_src.requires_grad_()
    t, y_src, y_tgt = torch.tensor([150, 800]), prior.embed("a cat"), prior.embed("a dog")
    both = gradient(loss, prior, x0_tgt, x0_src, y_tgt, y_src, t, noise)
    one = [gradient(loss, prior, x0_tgt[i:i + 1], x0_src[i:i + 1], y_tgt, y_src, t[i:i + 1], noise[i:i + 1])
           for i in range(2)]
    assert_close(both, torch.cat(one), atol=2e-5, rtol=1e-4)
    assert x0_src.grad is None and all(p.grad is None for p in prior.network.module.parameters())
    mask = torch.zeros(2, 1, 8, 8)
    again = gradient(loss, prior, x0_tgt, x0_tgt, y_tgt, y_src, t, noise, mask=mask)
    assert not again.any()


def test_both_are_methods_with_their_released_settings(pipelines):
    prior = Prior.from_pretrained(pipelines["sd"])
    ids, ssd = (settings_for(PAPER, "nerf", name) for name in ("ids", "ssd"))
    assert (ids["t_min"], ids["t_max"], ids["schedule"], ids["guidance"]["ids"]) == (0.05, 0.95, "uniform", 7.5)
    assert (ssd["t_min"], ssd["t_max"], ssd["schedule"], ssd["guidance"]["ssd"]) == (0.02, 0.98, "decreasing", 7.5)
    assert ssd["freeu"] and run.parse(["--compare"]).losses == ["sds", "dds", "pds"]  # as before
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for name in ("ids", "ssd"):
        args = options.complete(run.parse(["--mode", "image", "--loss", name, "--source", "a", "--target", "b"]), prior)
        scene = Picture(pixels, prior)
        stage = Distillation(scene, Picture(pixels, prior), prior, name, args)
        assert stage.prior.guidance == 7.5 and (stage.prior.network.freeu is not None) == (name == "ssd")
        assert stage.backward(0, [torch.Generator().manual_seed(1)]) > 0 and scene.theta.grad.abs().sum() > 0


def test_on_a_flow_ids_keeps_its_guidance_and_ssd_its_weight(flows):
    own = Prior.from_pretrained(flows["schnell"]).defaults["guidance"]
    assert own["ids"] == 1.0 and own["ssd"] == 7.5
