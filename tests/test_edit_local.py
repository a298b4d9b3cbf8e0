"""Flags that preserve geometry or confine an edit, from --smooth to --only; without them, the paper's steps."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, nerf_scene
from PIL import Image
from torch.testing import assert_close

import pds
import run
from bench.front import PAPER
from edit import LOSSES, Distillation, edit, stages_of
from image.masks import Where
from prior import Prior


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def prior():
    """The shipped prior, which no test may change."""
    return Prior.from_pretrained(str(ROOT / "models" / "emoji"))


@pytest.fixture
def smiling(prior, tmp_path, monkeypatch):
    """A function of flags that edits the shipped drawing with the shipped prior: prior, scene, source, options."""
    monkeypatch.setattr("files.sheets.FRAME_SIZE", 24)

    def call(*flags, edited=True):
        options = run.parse(["--mode", "svg", "--svg", str(ROOT / "examples" / "smiling-face.svg"), "--source",
                             "slightly smiling face", "--target", "smiling face with sunglasses", *flags])
        options = run.complete(options, prior)
        scene, groups, source = run.LOAD["svg"](options, prior)
        if edited:
            edit(scene, groups, stages_of(scene, source, prior, "pds", options), prior, options, tmp_path)
        return prior, scene, source, options
    return call


def test_with_all_options_off_an_edit_takes_the_paper_steps(smiling):
    """Plain Adam on all parameters: bit-identical to a loop written out here, and close to recorded numbers."""
    prior, scene, source, options = smiling(*PAPER, "--identity", "1", "--steps", "12")
    own = run.SVG.load(options.input, size=prior.size)
    groups = own.param_groups(points=0.08, colours=0.01)
    adam, generator = torch.optim.Adam(groups), torch.Generator().manual_seed(0)
    rates, prior = [group["lr"] for group in groups], prior.at(15)
    y_tgt, y_src = prior.embed(options.target), prior.embed(options.source)
    for step in range(12):
        view = own.sample_view(generator)
        x0_src = prior.encode(source.render(view)).detach()
        x0_tgt = prior.encode(own.render(view))
        t = pds.sample_timesteps(1, 1000, 0.1, 0.98, generator=generator)
        loss = pds.pds_loss(prior, x0_tgt, x0_src, y_tgt, y_src, t, generator=generator)
        for group, rate in zip(adam.param_groups, rates, strict=False):
            group["lr"] = rate * min(1, (step + 1) / 10, 2 - 2 * step / 12)
        adam.zero_grad()
        loss.backward()
        adam.step()
        own.project_()
    assert all(torch.equal(a, b) for a, b in zip(scene.parameters(), own.parameters(), strict=False))
    moved = scene.points.detach() - scene.loaded["points"]
    recorded = torch.tensor([[-0.308636, -0.263550], [-0.397430, -0.367599], [-0.358074, -0.315731]])
    assert_close(moved[:3], recorded, atol=2e-3, rtol=0)
    assert_close((scene.colours.detach() - scene.loaded["colours"])[3], torch.tensor([-0.029751, -0.032666, -0.020417]),
                 atol=2e-4, rtol=0)


def test_by_default_points_move_together_and_opaque_shapes_stay_opaque(smiling):
    _, scene, _, options = smiling("--steps", "8")
    assert options.smooth == 7 and options.subdivide == 10 and options.steady and options.batch == 2
    assert options.guidance == 8 and options.source_guidance == 3
    assert options.identity == 0.45 and options.colour_identity == 0.1 and options.reach == 0.7
    assert options.antithetic and options.jitter == 0.5
    assert options.spring == options.sparse == 0.15 and options.affine == 0.35 and options.follow == 0.3
    assert options.symmetry == 1
    assert (scene.opacities[scene.loaded["opacities"] == 1] == 1).all()
    moved = scene.points.detach() - scene.loaded["points"]
    near = torch.cdist(scene.loaded["points"], scene.loaded["points"]) < 1
    assert (torch.cdist(moved, moved)[near] < 0.3 * moved.norm(dim=1).max()).all() and moved.abs().max() > 0.1


def test_outlines_are_subdivided_where_points_move(smiling):
    counts = [len(smiling("--steps", "1", *flags, edited=False)[1].points)
              for flags in ([], ["--subdivide", "0"], ["--points", "0"], ["--colours-only"], PAPER)]
    assert counts[0] > counts[1] == counts[2] == counts[3] == counts[4]


def test_colours_alone_are_sparse(smiling):
    moved = {}
    for share in ("0", "100"):
        _, scene, _, _ = smiling("--steps", "3", "--sparse", share)
        moved[share] = [not torch.equal(getattr(scene, name).detach(), scene.loaded[name])
                        for name in ("points", "colours")]
    assert moved == {"0": [True, True], "100": [True, False]}


def test_dreamcatalyst_keeps_its_own_guidance_and_identity_over_those_of_smooth_points(smiling):
    _, _, _, options = smiling("--steps", "1", "--coefficients", "dreamcatalyst", edited=False)
    assert options.guidance == 3 and options.t_max == 0.9
    assert options.identity == options.colour_identity == 1 and options.reach == 0


@pytest.mark.parametrize("pixels", [3 * 64 ** 2, 2 * 64 ** 2, 1])  # three, two, or one drawing at a time
def test_a_step_is_the_mean_over_its_batch_for_any_chunk_size(smiling, monkeypatch, pixels):
    """The gradients of a batch of three are the means over single steps with its shift, for which it is drawn once."""
    def gradients(*seeds):
        prior, scene, source, options = smiling("--steps", "1", "--batch", str(len(seeds)), "--no-antithetic",
                                                edited=False)
        monkeypatch.setattr(Distillation, "PIXELS", pixels)
        stage, = stages_of(scene, source, prior, "pds", options)
        scene.load_state_dict(scene.loaded)
        scene.zero_grad()
        render, sample, drawn = scene.render, scene.sample_view, []
        shift = sample(torch.Generator().manual_seed(0))
        monkeypatch.setattr(scene, "render", lambda *args: drawn.append(args) or render(*args))
        # a single step with another seed draws another shift, and then the same timestep and noise
        monkeypatch.setattr(scene, "sample_view", lambda generator: (sample(generator), shift)[len(seeds) == 1])
        stage.backward(0, [torch.Generator().manual_seed(seed) for seed in seeds])
        assert len(drawn) == -(-len(seeds) * 64 ** 2 // max(pixels, 64 ** 2)) and {view for view, _ in drawn} == {shift}
        return {name: p.grad for name, p in scene.named_parameters() if p.numel()}
    together, alone = gradients(0, 1, 2), [gradients(seed) for seed in range(3)]
    for name, grad in together.items():
        size = grad.abs().max().item()  # what rounds are the terms of a sum, not what is left of it
        assert_close(grad, sum(one[name] for one in alone) / 3, atol=1e-5 * size, rtol=0)
    assert together["colours"].abs().max() > 0 and together["points"].abs().max() > 0


@pytest.mark.parametrize("pixels", [9 * 64 ** 2, 3 * 64 ** 2, 1])
def test_antithetic_noises_come_in_pairs_for_any_chunk_size(smiling, monkeypatch, pixels):
    noises = {}
    for flag in ("--antithetic", "--no-antithetic"):
        prior, scene, source, options = smiling("--steps", "1", "--batch", "5", flag, edited=False)
        monkeypatch.setattr(Distillation, "PIXELS", pixels)
        stage, = stages_of(scene, source, prior, "pds", options)
        seen = []
        monkeypatch.setitem(LOSSES, "pds", lambda *args, seen=seen, **more: (seen.append(args[6]),
                                                                             pds.pds_loss(*args, **more))[1])
        stage.backward(0, [torch.Generator().manual_seed(seed) for seed in range(5)])
        noises[flag] = torch.cat(seen)
    paired, free = noises.values()
    assert torch.equal(paired[1::2], -paired[:4:2]) and torch.equal(paired[::2], free[::2])
    assert all((a + b).abs().max() > 0.1 for i, a in enumerate(free) for b in free[:i])
    assert (paired[4] + paired[2]).abs().max() > 0.1 < (paired[4] - paired[2]).abs().max()


def test_a_batch_shortens_the_warm_up(smiling):
    """With a batch of N the first rates are N times as large, as Adam has seen N times as many views."""
    moved = []
    for count in ("1", "2"):
        _, scene, _, _ = smiling(*PAPER, "--batch", count, "--steps", "1", "--points", "0.1")
        moved.append((scene.points.detach() - scene.loaded["points"]).abs().max().item())
    assert moved == pytest.approx([0.01, 0.02], rel=1e-3)


def test_a_larger_identity_weight_stays_closer_to_the_source(smiling):
    away = []
    for k in (4, 1, 0):
        _, scene, source, _ = smiling("--steps", "6", "--batch", "1", "--identity", str(k))
        away.append((scene.render() - source.render()).square().mean().item())
    assert away[0] < away[1] < away[2]


def test_colours_have_an_identity_weight_of_their_own(smiling):
    """With a share of 0.25 points get the gradient of K = 0.8 and colours that of K = 0.2; so does every chunk."""
    def gradients(identity, share, pixels=2 ** 16):
        prior, scene, source, options = smiling("--steps", "1", "--identity", identity, "--colour-identity", share,
                                                edited=False)
        stage, = stages_of(scene, source, prior, "pds", options)
        stage.PIXELS = pixels
        scene.load_state_dict(scene.loaded | {"points": scene.loaded["points"] + 1})
        with torch.no_grad():
            scene.colours.lerp_(torch.ones(()), 0.3)
        scene.zero_grad()
        stage.backward(0, [torch.Generator().manual_seed(seed) for seed in range(2)])
        return {name: p.grad for name, p in scene.named_parameters() if p.numel()}
    strong, weak, both, chunks = (gradients("0.8", "1"), gradients("0.2", "1"), gradients("0.8", "0.25"),
                                  gradients("0.8", "0.25", 1))
    for name, grad in both.items():
        wanted = weak if name in ("colours", "opacities", "stop_colours") else strong
        size = grad.abs().max().item()  # what rounds are the terms of a sum, not what is left of it
        assert_close(grad, wanted[name], atol=1e-5 * size, rtol=0)
        assert_close(chunks[name], grad, atol=1e-5 * size, rtol=0)
    assert (strong["colours"] - weak["colours"]).abs().max() > 0.01 * weak["colours"].abs().max()


def test_the_identity_term_of_what_has_moved_far_is_let_go(smiling):
    """--reach halves it at that distance, as half of K would; 0 and a reach far away leave it as it is."""
    def gradients(identity, reach):
        prior, scene, source, options = smiling("--steps", "1", "--identity", identity, "--colour-identity", "0.25",
                                                "--reach", reach, "--jitter", "0", edited=False)
        stage, = stages_of(scene, source, prior, "pds", options)
        with torch.no_grad():
            scene.colours.lerp_(torch.ones(()), 0.3)
            away = prior.encode(scene.render()) - prior.encode(source.render())
        scene.zero_grad()
        stage.backward(0, [torch.Generator().manual_seed(seed) for seed in range(2)])
        grads = torch.cat([scene.points.grad.flatten(), scene.colours.grad.flatten()])
        return grads, away.square().mean().sqrt().item()
    whole, distance = gradients("0.8", "0")
    half, beyond = (gradients(*given)[0] for given in (("0.4", "0"), ("0.8", "1e6")))
    size = whole.abs().max().item()
    assert (whole - half).abs().max() > 0.01 * size and torch.equal(whole, beyond)
    assert_close(gradients("0.8", f"{distance:.8f}")[0], half, atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("flags", [["--local"], ["--mask", "mask.png"]])
@pytest.mark.parametrize("mode", ["svg", "image"])
def test_a_mask_confines_an_edit(command, tmp_path, mode, flags):
    Image.new("L", (9, 9), 255).save(tmp_path / "mask.png")
    flags = [str(tmp_path / flag) if flag.endswith(".png") else flag for flag in flags]
    assert command(*flags, mode=mode) == 0 and command(mode=mode, out="free") == 0
    result, free = (np.asarray(Image.open(tmp_path / name / "result.png"), dtype=int) for name in ("out", "free"))
    assert "--local" in flags or np.abs(result - free).mean() < 0.05  # an all-white mask changes rounding alone
    assert config(tmp_path / "out")["local"] == ("--local" in flags)


def test_under_a_black_mask_only_the_pull_acts(command, tmp_path):
    Image.new("L", (9, 9), 0).save(tmp_path / "mask.png")
    for loss in ("pds", "dds", "sds"):
        assert command("--mask", tmp_path / "mask.png", "--loss", loss, out=loss) == 0
        assert (tmp_path / loss / "result.png").read_bytes() == (tmp_path / loss / "source.png").read_bytes()


def test_only_edits_the_named_elements_of_a_drawing(command, tmp_path, capsys):
    assert command("--only", "face") == 0
    assert command("--only", "nose", out="none") == 2
    assert "face.svg: no element has the id 'nose'; there are: face" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("flags, message", [
    (["--mask", "none.png"], "none.png: no readable mask"), (["--identity", "-1"], "--identity"),
    (["--mode", "nerf"], "--svg: only with --mode svg"), (["--smooth", "x"], "--smooth")])
def test_bad_values_of_these_flags_are_refused(command, tmp_path, capsys, flags, message):
    try:
        code = command(*flags)
    except SystemExit as e:
        code = e.code
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["nerf", "splat"])
def test_masks_confine_an_edit_of_a_scene(small_runs, pipelines, tmp_path, mode, capsys):
    nerf_scene(tmp_path / "scene", views=8, size=16)
    names = [f["file_path"] for f in json.loads((tmp_path / "scene" / "transforms_train.json").read_text())["frames"]]
    (tmp_path / "masks").mkdir()
    for name in names:
        Image.fromarray(np.uint8([[255, 0], [255, 0]])).save(tmp_path / "masks" / f"{name.split('/')[-1]}.png")
    flags = [
        "--mode",
        mode,
        "--scene",
        str(tmp_path / "scene"),
        "--fit-seconds",
        "0.4",
        "--device",
        "cpu",
        "--source",
        "a",
        "--target",
        "b",
        "--model",
        str(pipelines["sd"]),
        "--steps",
        "3",
    ]
    for name, own in (("local", ["--local"]), ("mask", ["--mask", str(tmp_path / "masks")]), ("free", [])):
        assert run.main([*flags, *own, "--out", str(tmp_path / "out" / name)]) == 0
    results = {(tmp_path / "out" / name / "result.png").read_bytes() for name in ("local", "mask", "free")}
    assert len(results) == 3
    rates = [[config(tmp_path / "out" / name)[key] for name in ("local", "mask", "free")] for key in ("mlps", "table")]
    # a mask of a scene confines the field itself, and weights that all of it shares are free
    assert rates == [[1e-3, 1e-2, 1e-2], [0.02, 0.01, 0.01]] or mode == "splat"
    for mask in (tmp_path / "masks").iterdir():
        mask.rename(mask.with_stem(f"no-photograph-{mask.stem}"))
    assert run.main([*flags, "--mask", str(tmp_path / "masks"), "--out", str(tmp_path / "out" / "none")]) == 2
    assert "no mask in it is named like a photograph" in capsys.readouterr().err
    assert not (tmp_path / "out" / "none").exists()


class Sheet(torch.nn.Module):
    """A scene that shows the same picture in every view."""

    def __init__(self, picture):
        super().__init__()
        self.picture = torch.nn.Parameter(picture)
        self.camera = lambda view, size: SimpleNamespace(shifted=lambda dx, dy: view)
        self.scene = SimpleNamespace(train=[None])

    def sample_view(self, generator):
        return 0

    def render(self, view=None, size=None):
        return self.picture


@pytest.mark.parametrize("rates", ["settle", "released"])
def test_a_scene_is_held_to_its_photographs_outside_the_masks(pipelines, rates):
    prior = Prior.from_pretrained(pipelines["sd"])
    flags = [
        "--mode",
        "nerf",
        "--scene",
        ".",
        "--source",
        "a cat",
        "--target",
        "a dog",
        "--guidance",
        "3",
        "--rates",
        rates,
    ]
    def draw(seed):
        return torch.Generator().manual_seed(seed)
    before, after = (torch.rand(1, 3, 16, 16, generator=draw(seed)) for seed in (0, 1))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1

    def gradient(*seeds):
        args = run.complete(run.parse([*flags, "--batch", str(len(seeds))]), prior)
        scene, source = Sheet(after.clone()), Sheet(before)
        stage = Distillation(scene, source, prior, "pds", args, where=Where([mask]))
        loss = stage.backward(0, [draw(seed) for seed in seeds])
        return loss, scene.picture.grad

    loss, found = gradient(5)
    generator, theta = draw(5), after.clone().requires_grad_()
    torch.rand(2, generator=generator)  # draws the shift of the pixel centres
    t = pds.sample_timesteps(1, 1000, 0.02, 0.98, generator=generator)
    x0_tgt, x0_src = prior.encode(theta), prior.encode(before).detach()
    scale = 1 / x0_src.numel() if rates == "released" else 1
    wanted = scale * pds.pds_loss(
        prior.at(3.0),
        x0_tgt,
        x0_src,
        prior.embed("a dog"),
        prior.embed("a cat"),
        t,
        generator=generator,
        mask=torch.nn.functional.interpolate(mask, size=x0_src.shape[2:], mode="area"),
    )
    wanted.backward()
    assert_close(loss, wanted.detach())
    assert_close(found, theta.grad + 0.6 * scale * (1 - mask) * (after - before), atol=1e-6, rtol=1e-5)
    assert_close(gradient(5, 6)[1], (found + gradient(6)[1]) / 2, atol=1e-6, rtol=1e-5)
