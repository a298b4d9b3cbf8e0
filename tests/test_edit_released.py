"""The settings and arithmetic of the released code: defaults by mode, 2D stages, refining, Instruct-NeRF2NeRF."""
import copy
import json
import math
import shutil
import sys
import types

import pytest
import torch
from conftest import ABAR, nerf_scene, rand
from PIL import Image
from torch.testing import assert_close

import options
import pds
import run
from edit import Distillation, edit, stages_of
from files.pictures import Frame
from files.sheets import snapshot
from image.editors import ddim_timesteps
from image.picture import Picture
from image.updates import DatasetUpdate
from loop.optimiser import SteadyAdam, released_share
from pipelines.networks import STABLE_DIFFUSION_ABAR
from pipelines.settings import PAPER, SETTINGS, read_defaults, settings_for
from prior import InstructPix2Pix, Prior

STYLE = ". minimal flat 2d vector image. lineal color. trending on artstation"
TABLE = {  # the released code's settings by mode
    "svg": dict(steps=1000, guidance=100, t_min=0.1, t_max=0.98, colours=0.01, smooth=0, steady=False, opacities=True,
                identity=1, jitter=0, suffix=STYLE, refine=0),
    "image": dict(steps=500, guidance=50, t_min=0.02, t_max=0.98, latent=0.1, decay=0.01, refine=50, suffix=""),
    "nerf": dict(steps=30000, guidance=100, t_min=0.02, t_max=0.98, table=0.01, mlps=0.01),
    "splat": dict(steps=30000, guidance=100, t_min=0.02, t_max=0.98, means=1.6e-4, scales=5e-3, rotations=1e-3,
                  opacity=0.05, colours=2.5e-3)}


@pytest.mark.parametrize("mode", TABLE)
def test_a_model_without_settings_gets_the_papers(mode, pipelines, tmp_path, monkeypatch, small_runs):
    file = {"svg": tmp_path / "face.svg", "image": tmp_path / "face.png"}.get(mode, tmp_path / "scene")
    (tmp_path / "face.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 16'><rect width='9' height='9'/></svg>"
    )
    Image.new("RGB", (20, 10), "tomato").save(tmp_path / "face.png")
    if file.name == "scene":
        nerf_scene(file, views=4, size=16)
    seen = {}

    def no_steps(scene, groups, stages, *_):
        seen.update(groups={g["name"]: g for g in groups}, stages=stages)
        return [snapshot(scene)], False
    monkeypatch.setattr(run, "edit", no_steps)
    what = ["--scene", str(file), "--fit-seconds", "0.05"] if file.name == "scene" else [f"--{mode}", str(file)]
    flags = [
        "--mode",
        mode,
        *what,
        "--source",
        "a",
        "--target",
        "b",
        "--model",
        str(pipelines["sd"]),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out" / "edit"),
    ]
    assert run.main(flags) == 0
    config = json.loads((tmp_path / "out" / "edit" / "config.json").read_text())
    assert {key: config[key] for key in TABLE[mode]} == TABLE[mode] and config["rates"] == "released"
    assert config["schedule"] == "uniform" and config["coefficients"] == "official" and config["stride"] == 2
    groups = seen["groups"]
    if mode == "svg":  # 0.8 units of the canvas: the drawing is 32 units wide and drawn with 32 pixels
        assert groups["points"]["lr"] == config["points"] == pytest.approx(0.8) and groups["colours"]["lr"] == 0.01
    elif mode == "image":
        assert (groups["theta"]["lr"], groups["theta"]["decay"]) == (0.1, 0.01)
        assert [type(stage).__name__ for stage in seen["stages"]] == ["Distillation", "PictureRefinement"]
    elif mode == "nerf":
        assert all(g["lr"] == 0.01 and g["betas"] == (0.9, 0.999) and g["eps"] == 1e-15 for g in groups.values())
        shares = [released_share(step, 30000, groups["table"]) for step in (0, 500, 1000, 30000)]
        assert shares == [0, pytest.approx(math.sin(math.pi / 4)), 1, pytest.approx(0.1 ** (29 / 99))]  # about a half
    else:
        assert released_share(30000, 30000, groups["means"]) == pytest.approx(0.01)
        assert released_share(30000, 30000, groups["opacities"]) == 1 and groups["sh_rest"]["lr"] == 2.5e-3 / 20


def test_every_setting_of_the_paper_has_a_flag_that_wins(pipelines):
    prior = types.SimpleNamespace(
        size=16, multiple=8, abar=ABAR, defaults=Prior.from_pretrained(pipelines["sd"]).defaults
    )
    flags = {
        "steps": 3,
        "guidance": 4,
        "t_min": 0.3,
        "t_max": 0.9,
        "schedule": "decreasing",
        "rates": "settle",
        "identity": 0.2,
        "suffix": "!",
        "points": 0.1,
        "colours": 0.2,
        "smooth": 5,
        "jitter": 1,
        "latent": 0.3,
        "decay": 0.4,
        "table": 0.5,
        "mlps": 0.6,
        "means": 0.7,
        "scales": 0.8,
        "rotations": 0.9,
        "opacity": 0.11,
    }
    read = set()
    for mode in ("svg", "image", "nerf", "splat"):
        own = {key: value for key, value in flags.items() if key == "guidance" or mode in SETTINGS[key].modes}
        words = [word for key, value in own.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        words += ["--steady", "--no-opacities"] if mode == "svg" else []
        args = options.complete(run.parse(["--mode", mode, *words]), prior, "pds")
        assert {key: getattr(args, key) for key in own} == own
        assert mode != "svg" or args.steady and not args.opacities
        read |= own.keys()
    assert read == flags.keys() and {
        *flags,
        "steady",
        "opacities",
        "refine",
        "batch",
        "canvas_points",
        "hold",
        "warm",
        "freeu",
        "spring",
        "subdivide",
        "affine",
        "symmetry",
        "antithetic",
        "sparse",
        "follow",
        "reach",
        "densities",
        "paint",
        "lut",
        "colour_identity",
        "source_guidance",
        "inversion_steps",
    } == {*SETTINGS, "guidance"}
    assert options.complete(run.parse(["--mode", "image", "--refine", "7"]), prior, "pds").refine == 7
    assert options.complete(run.parse(["--mode", "nerf", "--loss", "in2n"]), prior, "in2n").steps == 15000


def catalysed(prior, mode, *flags, method="pds"):
    return options.complete(run.parse(["--mode", mode, "--coefficients", "dreamcatalyst", *flags]), prior, method)


def test_dreamcatalyst_brings_its_released_settings(pipelines):
    prior = Prior.from_pretrained(pipelines["sd"])
    args = catalysed(prior, "nerf")
    assert (args.guidance, args.t_min, args.t_max, args.schedule, args.identity) == (7.5, 0.2, 0.9, "decreasing", 1)
    assert (args.steps, args.hold, args.warm, args.freeu, args.rates) == (3000, 1, 100, True, "released")
    args.input = options.HERE / "no scene"
    assert {"hold": 1, "warm": 100, "freeu": True}.items() <= options.settings(args, prior, "pds").items()
    assert catalysed(prior, "splat").steps == 3000 and catalysed(prior, "image").steps == 500
    flagged = catalysed(prior, "nerf", "--guidance", "3", "--t-max", "0.5", "--steps", "7")
    assert (flagged.guidance, flagged.t_max, flagged.steps) == (3, 0.5, 7)
    other = catalysed(prior, "nerf", method="dds")
    assert (other.guidance, other.steps, other.hold, other.freeu) == (7.5, 30000, None, None)  # DDS's own


def test_only_modes_with_colours_apart_weigh_them_apart():
    """Wherever a pds.json sets it: a Picture and a NeRF have no such parameters."""
    for part in ({"colour_identity": 0.3}, {"pds": {"colour_identity": 0.3}}):
        shares = {mode: settings_for(PAPER | part, mode, "pds")["colour_identity"] for mode in TABLE}
        assert shares == {"svg": 0.3, "image": 1, "nerf": 1, "splat": 0.3}


def test_points_stay_where_only_a_colour_changes():
    """With the shipped settings: a rate in the command, free points, and the paper's settings move them. In a NeRF the
    look-up table alone changes, where more than a colour does two paints as well, and in a confined edit with the
    table instead."""
    shipped, released = (types.SimpleNamespace(defaults=own, size=64, multiple=8, abar=ABAR) for own in (
        read_defaults(options.SHIPPED / "pds.json"), PAPER))

    def rate(prior, source, target, *flags):
        args = options.parse(["--mode", "svg", "--source", source, "--target", target, *flags])
        return options.complete(args, prior).points
    usual = rate(shipped, "dog face", "panda")
    assert usual > 0 == rate(shipped, "red book", "green book") == rate(shipped, "red book", "green book", "--loss=sds")
    assert rate(shipped, "red book", "green book", "--points", "0.3") == 0.3
    held = [settings_for(shipped.defaults, "svg", "pds", recolour=only) for only in (False, True)]
    held = [tuple(own[key] for key in ("sparse", "identity", "colour_identity", "reach")) for own in held]
    assert held == [(0.15, 0.45, 0.1, 0.7), (0.5, 0.5, 0.3, 0)]
    assert settings_for(shipped.defaults, "svg", "pds", width=0, recolour=True)["sparse"] == 0
    assert settings_for(shipped.defaults, "svg", "pds", width=0)["reach"] == 0  # free points follow the paper
    assert rate(shipped, "red book", "green book", "--smooth", "0") == 0.08
    assert rate(released, "red book", "green book") == rate(released, "dog face", "panda")

    def learning(method, **given):
        own = settings_for(shipped.defaults, "nerf", method, **given)
        return [name for name in ("table", "mlps", "paint", "lut") if own[name]]
    assert learning("pds", recolour=True) == ["lut"] and learning("pds") == ["paint", "lut"]
    for own in (learning("pds", confined=True), learning("pds", confined=True, recolour=True), learning("sds"),
                learning("sds", recolour=True), learning("pds", local=True)):
        assert own == ["table", "mlps"]


def test_the_shipped_model_has_shorter_settings_for_dreamcatalyst():
    defaults = read_defaults(options.SHIPPED / "pds.json")
    for mode, steps in (("svg", 75), ("image", 300), ("nerf", 500), ("splat", 600)):
        own = settings_for(defaults, mode, "pds", coefficients="dreamcatalyst")
        assert (own["steps"], own["guidance"]["pds"], own["t_min"], own["t_max"]) == (steps, 3, 0.2, 0.9)
        assert own["schedule"] == "decreasing" and own["identity"] == 1 and not {"hold", "warm", "freeu"} & own.keys()
        assert own["source_guidance"] is None


def test_hold_keeps_a_view_and_warm_raises_the_rates_for_the_given_steps(pipelines, tmp_path):
    prior = Prior.from_pretrained(pipelines["sd"])
    nerf_scene(tmp_path / "scene", views=6, size=8)
    for mode in ("nerf", "splat"):
        for flags, hold, warm in (((), 10, {"nerf": 1000, "splat": 0}[mode]),
                                  (("--coefficients", "dreamcatalyst"), 1, 100)):
            args = options.complete(run.parse(["--mode", mode, "--scene", str(tmp_path / "scene"), "--source", "a",
                                               "--target", "b", "--fit-seconds", "0.05", *flags]), prior, "pds")
            args.fit = tmp_path / mode
            scene, groups, source = run.LOAD[mode](args, prior)
            assert [group.get("warm", 0) for group in groups] == [warm] * len(groups)
            stage, generator = Distillation(scene, source, prior, "pds", args), torch.Generator().manual_seed(1)
            views = [stage.looks(step, [generator])[0][0] for step in range(40)]
            changes = {step for step in range(1, 40) if views[step] != views[step - 1]}
            assert changes and (min(changes) == 1 if hold == 1 else changes <= {10, 20, 30})
    rates = [released_share(step, 3000, {"warm": 100}) for step in (0, 50, 100)]
    assert rates == [0, pytest.approx(math.sqrt(0.5)), 1]


def test_freeu_affects_only_the_copy_that_has_it(pipelines):
    prior, editor = Prior.from_pretrained(pipelines["sd"]), InstructPix2Pix.from_pretrained(pipelines["instruct"])
    editor.image = torch.ones(1, 4, 8, 8)
    for model in (prior, editor):
        x_t, t, y = rand(2, 4, 8, 8, seed=3).float(), torch.tensor([300, 700]), model.embed("a cat")
        plain, freed = model.at(5.0), model.at(5.0).with_freeu().at(2.0).at(5.0)
        before, found = plain.eps(x_t, t, y), freed.eps(x_t, t, y)
        assert torch.equal(before, plain.eps(x_t, t, y))  # the UNet that both share is unchanged
        model.pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.1)
        wanted = plain.eps(x_t, t, y)
        model.pipe.unet.disable_freeu()
        assert torch.equal(found, wanted) and (found - before).abs().max() > 1e-4


def test_an_edit_with_dreamcatalyst_uses_freeu(pipelines):
    prior = Prior.from_pretrained(pipelines["sd"])
    scene = Picture(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)), prior)
    for flags, factors in ((["--coefficients", "dreamcatalyst"], {"b1": 1.1, "b2": 1.1, "s1": 0.9, "s2": 0.2}),
                           ([], None)):
        args = options.complete(run.parse(["--mode", "image", "--source", "a", "--target", "b", *flags]), prior, "pds")
        assert Distillation(scene, scene, prior, "pds", args).prior.network.freeu == factors


def test_a_flow_goes_without_freeu_and_keeps_its_own_guidance(flows):
    """FLUX.1 schnell needs no guidance; the timesteps have the noise levels of Stable Diffusion's."""
    for name, guidance in (("sd3", 7.5), ("schnell", 1.0), ("flux", 3.5)):
        prior = Prior.from_pretrained(flows[name])
        args = catalysed(prior, "nerf")
        assert args.guidance == guidance and args.steps == 3000
        for share, wanted in ((args.t_min, 200), (args.t_max, 900)):
            level = STABLE_DIFFUSION_ABAR[wanted].item()
            near = prior.abar[round(share * len(prior.abar))].item()
            assert abs(math.log(near / (1 - near)) - math.log(level / (1 - level))) < 0.05
        with pytest.warns(UserWarning, match="FreeU is left out: it is made for UNets that predict noise"):
            assert prior.with_freeu() is prior


def test_dreamcatalyst_is_mapped_to_a_flow_with_its_own_settings(flows, tmp_path):
    shutil.copytree(flows["schnell"], tmp_path / "model")
    (tmp_path / "model" / "pds.json").write_text(json.dumps({"steps": 3}))
    assert catalysed(Prior.from_pretrained(tmp_path / "model"), "svg").guidance == 1.0


# ---- the released stages, written out independently -----------------------------------------------------------

class Exact:
    """A prior in float64, because Adam normalises gradients and would amplify float32 rounding of small ones."""
    abar, size, multiple, guidance, device, defaults = ABAR, 16, 2, 1.0, torch.device("cpu"), PAPER

    def at(self, scale, source=None):
        twin = copy.copy(self)
        twin.guidance = scale
        return twin

    def encode(self, picture):
        return torch.nn.functional.avg_pool2d(picture.double() * 2 - 1, 2)

    def decode(self, x0):
        return torch.nn.functional.interpolate(x0 / 2 + 0.5, scale_factor=2.0).clamp(0, 1)

    def embed(self, prompt):
        return (torch.full((1, 1, 1), float(len(prompt)), dtype=torch.float64),)

    def unconditional(self):
        return self.embed("")

    def _predict(self, x_t, t, prompts):
        return [(x_t.roll(1, 3) + y.view(-1, 1, 1, 1) * x_t).sin() * t.view(-1, 1, 1, 1) / 1000 for y, in prompts]

    def eps(self, x_t, t, y):
        null, own = self._predict(x_t, t, [self.unconditional(), y])
        return null + self.guidance * (own - null)


def hand_eps(prior, x_t, t, y, scale):
    x_t = x_t if isinstance(prior, Exact) else x_t.float()
    null, own = (prior._predict(x_t, torch.tensor([t]), [part])[0] for part in (prior.unconditional(), y))
    return null + scale * (own - null)


def hand_sdedit(prior, x0, y, skip, scale, generator):
    """run_sdedit of the released code with 20 steps: deterministic DDIM from reversed_timesteps[20 - skip - 1]."""
    timesteps = [50 * i + 1 for i in range(20)][:20 - skip]
    x = ABAR[timesteps[-1]].sqrt() * x0 + (1 - ABAR[timesteps[-1]]).sqrt() * torch.randn(x0.shape, generator=generator)
    for t in reversed(timesteps):
        before = ABAR[t - 50] if t >= 50 else ABAR[0]
        eps = hand_eps(prior, x, t, y, scale)
        x0_hat = (x - (1 - ABAR[t]).sqrt() * eps) / ABAR[t].sqrt()
        x = before.sqrt() * x0_hat + (1 - before).sqrt() * eps
    return x


def picture_run(tmp_path, steps, refine):
    """Run --mode image on a picture of another shape; returns the prior, the initial and the edited latent."""
    prior = Exact()
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    scene, source = Picture(pixels, prior).double(), Picture(pixels, prior).double()
    start = scene.theta.detach().clone()
    args = options.complete(
        run.parse(
            [
                "--mode",
                "image",
                "--source",
                "a dog",
                "--target",
                "a cat",
                "--steps",
                str(steps),
                "--refine",
                str(refine),
            ]
        ),
        prior,
        "pds",
    )
    stages = stages_of(scene, source, prior, "pds", args)
    edit(scene, scene.param_groups(args.latent, args.decay), stages[-1 if steps == 1 else 0:], prior, args, tmp_path)
    return prior, start, scene.theta.detach()


def test_the_2d_stage_matches_the_released_notebook(tmp_path):
    """AdamW on the latent itself, the notebook's own loss 0.5 mse, two noises, no decoding."""
    prior, start, ours = picture_run(tmp_path, 4, 0)
    x, generator = start.clone().requires_grad_(), torch.Generator().manual_seed(0)
    adam, betas = torch.optim.AdamW([x], lr=0.1), 1 - ABAR / torch.cat((torch.ones(1), ABAR[:-1]))
    y_src, y_tgt = prior.embed("a dog"), prior.embed("a cat")
    for _ in range(4):
        t = pds.sample_timesteps(1, 1000, 0.02, 0.98, generator=generator).item()
        noise, second = torch.randn(x.shape, generator=generator).double(), rand(*x.shape, seed=9)  # the second cancels
        s, z = t - 2, []
        for x0, y in ((x.detach().double(), y_tgt), (start.double(), y_src)):
            x_t = ABAR[t].sqrt() * x0 + (1 - ABAR[t]).sqrt() * noise
            eps = hand_eps(prior, x_t, t, y, 50)
            x0_hat = (x_t - (1 - ABAR[t]).sqrt() * eps) / ABAR[t].sqrt()
            mu = (ABAR[s].sqrt() * betas[t] * x0_hat + (1 - betas[t]).sqrt() * (1 - ABAR[s]) * x_t) / (1 - ABAR[t])
            x_s = ABAR[s].sqrt() * x0 + (1 - ABAR[s]).sqrt() * second
            z.append((x_s - mu) / ((1 - ABAR[s]) / (1 - ABAR[t]) * betas[t]).sqrt())
        target = (x - (z[0] - z[1])).detach()
        adam.zero_grad()
        (0.5 * torch.nn.functional.mse_loss(x, target)).backward()
        adam.step()
    assert (ours - start).abs().mean() > 0.05
    assert_close(ours, x.detach(), atol=1e-5, rtol=1e-5)


def test_the_2d_refining_stage_matches_the_released_notebook(tmp_path):
    """A new AdamW moves the latent towards SDEdit's edit of it; guidance 15, 16 to 18 of 20 steps skipped."""
    prior, start, ours = picture_run(tmp_path, 1, 5)
    x, generator = start.clone().requires_grad_(), torch.Generator().manual_seed(0)
    adam, y = torch.optim.AdamW([x], lr=0.1), prior.embed("a cat")
    for _ in range(5):
        skip = 16 + torch.randint(3, (), generator=generator).item()
        with torch.no_grad():
            edited = hand_sdedit(prior, x, y, skip, 15, generator)
        adam.zero_grad()
        torch.nn.functional.mse_loss(x, edited).backward()
        adam.step()
    assert (ours - start).abs().mean() > 0.05
    assert_close(ours, x.detach(), atol=1e-5, rtol=1e-5)


class Views(torch.nn.Module):
    """A scene with one colour for each of three views, which the stages fit like any other."""
    mode = "nerf"

    def __init__(self):
        super().__init__()
        self.colour, self.calls = torch.nn.Parameter(torch.tensor([0.2, 0.5, 0.8])), []
        self.scene = types.SimpleNamespace(train=[None] * 3)

    def render(self, view, size=None):
        return self.colour[view].expand(1, 3, 16, 16)

    def dataset(self, size, look):
        pictures = [look(view, size).detach().clone() for view in range(3)]
        kept = types.SimpleNamespace(cameras=[0, 1, 2], pixels=torch.stack(pictures))
        kept.picture = lambda view, pixels=None: (kept.pixels if pixels is None else pixels)[view]
        kept.replace = lambda view, picture: kept.pixels[view].copy_(picture)
        return kept

    def data_loss(self, dataset, generator, l1=False):
        self.calls.append((l1, dataset.pixels.clone()))
        return (self.colour - dataset.pixels.mean((1, 2, 3, 4))).square().sum()


def scene_stage(prior, name, editor=None):
    args = options.complete(run.parse(["--mode", "nerf", "--source", "a dog", "--target", "a cat"]), prior, "pds")
    scene, source = Views(), Views()
    source.render = lambda view, size=None: torch.full((1, 3, 16, 16), 0.9)
    return scene, source, DatasetUpdate(scene, source, prior, name, 30, 15.0, args, editor)


def test_the_refining_stage_edits_the_first_renders_and_not_its_own_output(pipelines, monkeypatch):
    monkeypatch.setattr(DatasetUpdate, "EVERY", 1)
    prior = Prior.from_pretrained(pipelines["sd"])
    prior.guidance = 15
    scene, source, stage = scene_stage(prior, "sdedit")
    skips, generator = [], torch.Generator().manual_seed(4)
    for step in range(7):
        state = generator.get_state()
        stage.backward(step, [generator])
        with torch.no_grad():
            scene.colour += 0.01  # the scene drifts, the edited renders must not
        hand = torch.Generator()
        hand.set_state(state)
        skips.append(16 + torch.randint(3, (), generator=hand).item())
        view = stage.state["edited"][-1]
        first = torch.tensor([0.2, 0.5, 0.8])[view].expand(1, 3, 16, 16)
        with torch.no_grad():
            wanted = prior.decode(hand_sdedit(prior, prior.encode(first), stage.y_tgt, skips[-1], 15, hand).float())
        assert_close(stage.dataset.picture(view), wanted, atol=1e-5, rtol=1e-5)
    assert set(skips) == {16, 17, 18} and not scene.calls[0][0]
    assert sorted(stage.state["edited"]) == [0, 1, 2]  # every view occurs before any recurs


def test_in2n_denoises_all_20_steps_from_the_drawn_noise_level(pipelines):
    """diffusers' scheduler with num_train_timesteps set to T, as Instruct-NeRF2NeRF's edit_image does."""
    from diffusers import DDIMScheduler
    editor = InstructPix2Pix.from_pretrained(pipelines["instruct"])
    prior = Prior.from_pretrained(pipelines["sd"])
    scene, source, stage = scene_stage(prior, "in2n", editor)
    assert_close(stage.open().picture(1), torch.full((1, 3, 16, 16), 0.9))  # initially the photographs
    render, photograph = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for T in (20, 137, 980):
        ours = stage.edited(render, photograph, T / 1000, torch.Generator().manual_seed(5))
        scheduler = DDIMScheduler(trained_betas=(1 - ABAR / torch.cat((torch.ones(1), ABAR[:-1]))).numpy(),
                                  set_alpha_to_one=False, steps_offset=1, clip_sample=False)
        scheduler.config.num_train_timesteps = T
        scheduler.set_timesteps(20)
        assert scheduler.timesteps.tolist() == ddim_timesteps(T, 20, 1000)
        guided = stage.editor.of(photograph)
        assert (guided.guidance, guided.image_guidance) == (15, 1.5)
        with torch.no_grad():
            x0 = editor.encode(render)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
            x = scheduler.add_noise(x0, noise, scheduler.timesteps[:1])
            for t in scheduler.timesteps:
                x = scheduler.step(guided.eps(x, t.reshape(1), stage.y_edit), t, x).prev_sample
            assert_close(ours, editor.decode(x), atol=2e-5, rtol=1e-4)
    levels = [stage.strength(torch.Generator().manual_seed(i)) for i in range(200)]
    assert 0.02 <= min(levels) < 0.05 and 0.95 < max(levels) <= 0.98
    stage.state["order"], generator = [1], torch.Generator().manual_seed(0)
    stage.backward(0, [generator])
    assert scene.calls[-1][0] and not torch.equal(stage.dataset.picture(1), torch.full((1, 3, 16, 16), 0.9))


def test_in2n_adds_lpips_on_patches_where_it_is_installed(pipelines, tmp_path, monkeypatch, small_runs):
    sizes = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.requires_grad and a.min() >= -1
            sizes.append(a.shape[2:])
            return (a - b).square().mean().view(1, 1, 1, 1)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(DatasetUpdate, "PATCH", 8)
    nerf_scene(tmp_path / "scene", views=4, size=16)
    flags = ["--mode", "nerf", "--scene", str(tmp_path / "scene"), "--source", "a", "--target", "b", "--device", "cpu",
             "--model", str(pipelines["sd"]), "--instruct", str(pipelines["instruct"]), "--loss", "in2n",
             "--fit-seconds", "0.1", "--steps", "3", "--out", str(tmp_path / "out" / "edit")]
    assert run.main(flags) == 0
    assert sizes == [(8, 8)] * 3


def test_dreamcatalyst_with_an_editor_gives_the_source_no_text(pipelines):
    """As in the released dc.py, guidance is by picture and text for the target, by the picture alone for the source."""
    editor, prior = InstructPix2Pix.from_pretrained(pipelines["instruct"]), Prior.from_pretrained(pipelines["sd"])
    args = options.complete(run.parse(["--mode", "image", "--coefficients", "dreamcatalyst", "--source", "a dog",
                                       "--target", "a cat", "--instruction", "make it a cat"]), prior, "pds")
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    scene, source = Picture(pixels, editor), Picture(pixels, editor)
    with torch.no_grad():
        scene.theta += 0.3
    stage = Distillation(scene, source, prior, "pds", args, editor)
    stage.backward(10, [torch.Generator().manual_seed(7)])
    t = round(900 + (200 - 900) * 10 / args.steps)  # falls from 0.9 to 0.2
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(scene.theta.shape, generator=generator)
    image, eps = source.theta.detach() / editor.scaling + editor.shift, []
    for x0, y in ((scene.theta.detach(), editor.embed("make it a cat")), (source.theta.detach(), None)):
        x_t = (ABAR[t].sqrt() * x0 + (1 - ABAR[t]).sqrt() * noise).float()
        null = editor.unconditional()

        def call(words, shown, x_t=x_t):
            return editor.with_freeu()._predict(x_t, torch.tensor([t]), [words], [shown])[0]
        plain, pictured = call(null, torch.zeros_like(image)), call(null, image)
        eps.append(plain + 1.5 * (pictured - plain) + (7.5 * (call(y, image) - pictured) if y else 0))
    tau = (t - 1) / 1000
    wanted = (0.2 + 0.8 * tau ** (1 / math.e)) * (eps[0] - eps[1]) + 0.075 * math.exp(tau) * (
        scene.theta - source.theta
    )
    assert_close(scene.theta.grad * scene.theta.numel(), wanted.detach(), atol=1e-5, rtol=1e-5)


def test_decay_gives_the_steps_of_torch_adamw():
    ours, theirs = (torch.nn.Parameter(rand(5, seed=1)) for _ in range(2))
    adam, adamw = SteadyAdam([{"params": [ours], "lr": 0.1, "decay": 0.01}]), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(5):
        for p in (ours, theirs):
            p.grad = rand(5, seed=step)
        adam.step()
        adamw.step()
    assert torch.equal(ours, theirs)


def test_frames_keep_the_shape_of_whole_pictures():
    assert Frame(512, 8).sides(1920, 1080) == (912, 512) and Frame(512, 8).sides(1080, 1920) == (512, 912)
    assert Frame(64, 4).sides(100, 100) == (64, 64) and Frame(64, 4, True).sides(1920, 1080) == (64, 64)
    assert Frame(64, 4).sides(1000, 10) == (256, 4)  # at most 4 to 1, so that the picture is reduced
