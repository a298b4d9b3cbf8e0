"""prior.py: Prior and InstructPix2Pix against diffusers, prompts, bad models, the shipped model."""
import copy
import json
import shutil
import time
import warnings

import pytest
import torch
from conftest import ABAR, ROOT, rand
from torch.testing import assert_close

import pds
from image.editors import ddim, ddim_timesteps, instruct_pix2pix
from pipelines.captions import plain, read_captions, recolours
from pipelines.loading import PriorError
from prior import InstructPix2Pix, Prior
from svg_raster import SVG


@pytest.mark.parametrize("kind", ["sd", "v", "xl"])
def test_eps_matches_a_hand_written_call_of_the_unet(pipelines, kind):
    prior = Prior.from_pretrained(pipelines[kind])
    x_t, t, y = rand(2, 4, 8, 8, dtype=torch.float32), torch.tensor([40, 900]), prior.embed("a cat")
    empty = prior.embed("")

    def network(y, row):
        added = None
        if kind == "xl":
            size = 8.0 * prior.pipe.vae_scale_factor
            added = {"text_embeds": y[1], "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]])}
        with torch.no_grad():
            out = prior.network.module(x_t[row:row + 1], t[row], y[0], added_cond_kwargs=added).sample
        abar = ABAR[t[row]].float()
        return abar.sqrt() * out + (1 - abar).sqrt() * x_t[row:row + 1] if kind == "v" else out

    if kind == "xl":
        empty = tuple(torch.zeros_like(part) for part in empty)
    for guidance in (1.0, 7.5):
        rows = [network(empty, i) + guidance * (network(y, i) - network(empty, i)) for i in range(2)]
        assert_close(prior.at(guidance).eps(x_t, t, y), torch.cat(rows), atol=1e-5, rtol=1e-4)
    twin = prior.at(3.0)
    assert twin.guidance == 3 and prior.guidance == 7.5 and twin.network is prior.network
    assert twin.embed("a bird") is prior.embed("a bird")  # both share the embedded prompts
    x0 = rand(2, 4, 8, 8, dtype=torch.float32).requires_grad_()
    pds.pds_loss(prior, x0, torch.zeros(2, 4, 8, 8), y, prior.embed("a dog"), t).backward()
    assert x0.grad.isfinite().all() and all(p.grad is None for p in prior.network.module.parameters())


def test_the_source_may_have_a_guidance_of_its_own(pipelines):
    prior = Prior.from_pretrained(pipelines["sd"])
    x_t, t = rand(4, 4, 8, 8, dtype=torch.float32), torch.tensor([40, 900, 40, 900])
    y = tuple(torch.cat(parts) for parts in zip(*map(prior.embed, ("a cat", "a cat", "a dog", "a dog")), strict=True))
    rows = prior.at(7.5, 2.0).eps(x_t, t, y)
    assert_close(rows[:2], prior.at(7.5).eps(x_t, t, y)[:2])
    assert_close(rows[2:], prior.at(2.0).eps(x_t, t, y)[2:])
    assert_close(prior.at(7.5, 1.0).eps(x_t, t, y)[2:], prior.at(1.0).eps(x_t, t, y)[2:], atol=1e-6, rtol=1e-5)
    assert prior.at(7.5, 2.0).at(3.0).source_guidance is None  # other methods know no source
    prior.network = copy.copy(prior.network)
    prior.network.embedded = 10.0
    with pytest.raises(ValueError, match="--source-guidance: this model takes one guidance scale"):
        prior.at(3.0, 2.0)


@pytest.mark.parametrize("kind", ["sd", "v", "xl"])
def test_encode_takes_the_mean_and_is_differentiable(pipelines, kind):
    prior = Prior.from_pretrained(pipelines[kind])
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x0 = prior.encode(picture)
    with torch.no_grad():
        out = prior.vae.encode(picture * 2 - 1)
        expected = out.latents if kind == "v" else (out.latent_dist.mode() - 0.1) * 0.7
        assert_close(x0, expected)
        decoded = prior.vae.decode(x0 / prior.scaling + prior.shift).sample
        assert_close(prior.decode(x0), (decoded / 2 + 0.5).clamp(0, 1))
    x0.square().sum().backward()
    assert picture.grad.abs().sum() > 0 and all(p.grad is None for p in prior.vae.parameters())
    with pytest.raises(ValueError, match="picture must be"):
        prior.encode(picture[0])


def test_instruct_pix2pix_matches_the_pipeline_of_diffusers(pipelines):
    import diffusers
    editor = InstructPix2Pix.from_pretrained(pipelines["instruct"])
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(pipelines["instruct"])
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x_t, y = rand(1, 4, 8, 8, dtype=torch.float32), editor.embed("make it a cat")
    editor = editor.at(7.5, 1.7)
    wanted = pipe("make it a cat", picture, num_inference_steps=5, guidance_scale=7.5, image_guidance_scale=1.7,
                  latents=x_t, output_type="latent").images
    assert_close(ddim(editor.of(picture), x_t, y, ddim_timesteps(1000, 5)), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no picture to edit is set"):
        editor.eps(x_t, torch.tensor([500]), y)

    def draw():
        return torch.Generator().manual_seed(0)
    edited = instruct_pix2pix(editor, picture, y, steps=5, generator=draw())
    other = instruct_pix2pix(editor, picture.flip(3), y, editor.encode(picture), 5, generator=draw())
    assert edited.shape == (1, 4, 8, 8) and (edited - other).abs().max() > 1e-3  # the result depends on the picture
    assert editor.image is None  # `of` sets it on a copy


def test_an_editor_is_a_prior_with_some_weights_replaced(pipelines, tmp_path):
    """An editor from instruct.safetensors equals the prior in its folder if its weights for the picture are zero."""
    from safetensors.torch import save_file
    shutil.copytree(pipelines["sd"], tmp_path / "sd")
    prior = Prior.from_pretrained(tmp_path / "sd")
    wide = torch.nn.functional.pad(prior.network.module.conv_in.weight, (0, 0, 0, 0, 0, 4)).contiguous()
    save_file({"unet.conv_in.weight": wide}, tmp_path / "sd" / "instruct.safetensors")
    (tmp_path / "sd" / "captions.txt").write_text("green apple\n")
    editor = InstructPix2Pix.from_pretrained(tmp_path / "sd")
    x_t, t, words = rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500]), "turn it into a green apple"
    prior = prior.at(editor.guidance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the caption in the instruction is known
        y = editor.embed(words)
    got = editor.of(torch.rand(1, 3, 16, 16)).eps(x_t, t, y)
    assert_close(got, prior.eps(x_t, t, prior.embed(words)), atol=1e-5, rtol=1e-4)
    (tmp_path / "sd" / "instruct.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(PriorError, match="sd: instruct.safetensors: ") as e:
        InstructPix2Pix.from_pretrained(tmp_path / "sd")
    assert "\n" not in str(e.value)
    with pytest.raises(PriorError, match="takes 4 channels, a latent has 4: no InstructPix2Pix model"):
        InstructPix2Pix.from_pretrained(pipelines["sd"])
    another = {"unet.conv_in.weight": wide[:, :, :1].contiguous()}
    save_file(another, tmp_path / "sd" / "instruct.safetensors")
    with pytest.raises(PriorError, match="instruct.safetensors: .*conv_in"):
        InstructPix2Pix.from_pretrained(tmp_path / "sd")
    with pytest.raises(PriorError, match="edits pictures; it is not a text-to-image prior"):
        Prior.from_pretrained(pipelines["instruct"])


def test_prior_attributes(pipelines):
    prior = Prior.from_pretrained(str(pipelines["sd"]))
    assert_close(prior.abar, ABAR, atol=1e-7, rtol=1e-6)
    assert prior.size == 16 and prior.defaults["guidance"]["pds"] == 100.0
    assert prior.embed("a cat") is prior.embed("a cat")
    half = Prior.from_pretrained(str(pipelines["sd"]), dtype=torch.bfloat16)
    out = half.eps(rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500]), half.embed("a cat"))
    assert half.network.module.dtype == torch.bfloat16 and half.vae.dtype == out.dtype == torch.float32


def test_checkpointing_the_autoencoder_saves_memory_and_changes_no_gradient(pipelines, monkeypatch):
    picture, x0 = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), rand(1, 4, 16, 16)
    found = []
    for large in (10 ** 9, 32 * 32):
        monkeypatch.setattr("pipelines.networks.LARGE", large)
        prior, kept = Prior.from_pretrained(pipelines["sd"]), []
        assert Prior(prior.pipe).vae is prior.vae  # a second Prior of the same pipeline
        inputs = picture.clone().requires_grad_(), x0.float().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = prior.encode(inputs[0]).square().sum() + prior.decode(inputs[1]).square().sum()
        loss.backward()
        found.append((sum(kept), *(x.grad for x in inputs)))
    assert found[1][0] < 0.7 * found[0][0]
    assert_close(found[1][1:], found[0][1:], atol=0, rtol=0)


def test_the_measurement_of_memory_is_exact():
    from bench.memory import meter

    def call():
        a = torch.ones(1000, 1000)  # 4 MB
        b = (a + 1) * 2  # two more, one of which is freed
        return b[:1].clone(), a
    _, peak, stays = meter(torch.device("cpu"))(call)
    assert abs(peak - 12e6) < 2e5 and abs(stays - 4e6) < 2e5


def test_unusable_models_are_refused_in_one_line(pipelines, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U')
    for name, message in [(tmp_path / "nothing", "no such model directory"), (tmp_path, "not a diffusers pipeline"),
                          (broken, "damaged, or no pipeline"), ("nobody/no-such-model", "none on the hub")]:
        with pytest.raises(PriorError, match=message) as e:
            Prior.from_pretrained(name)
        assert str(name) in str(e.value) and "\n" not in str(e.value)


def change_weights(path, change):
    """Replace the tensors of a .safetensors file by change(tensors)."""
    from safetensors.torch import load_file, save_file
    save_file(change(load_file(path)), path, metadata={"format": "pt"})  # transformers 4 requires it


def without_first(count):
    return lambda state: dict(list(state.items())[count:])


def first_is(value):
    return lambda state: state | {min(state): torch.full_like(state[min(state)], value)}


@pytest.mark.parametrize("file, damage, message", [
    ("unet/diffusion_pytorch_model.safetensors", without_first(3), "3 weights of its unet are missing"),
    ("vae/diffusion_pytorch_model.safetensors", without_first(1), "1 weights of its vae are missing"),
    ("text_encoder/model.safetensors", without_first(2), "2 weights of its text_encoder are missing"),
    ("unet/diffusion_pytorch_model.safetensors", first_is(float("nan")), "weights of its unet are not finite"),
    ("vae/diffusion_pytorch_model.safetensors", first_is(float("inf")), "weights of its vae are not finite"),
    ("text_encoder/model.safetensors", first_is(float("nan")), "weights of its text_encoder are not finite")])
def test_weights_that_are_missing_or_not_finite_are_refused(pipelines, tmp_path, file, damage, message):
    shutil.copytree(pipelines["sd"], tmp_path / "sd")
    change_weights(tmp_path / "sd" / file, damage)
    with pytest.raises(PriorError, match=message) as e:
        Prior.from_pretrained(tmp_path / "sd")
    assert "\n" not in str(e.value) and str(tmp_path / "sd") in str(e.value)


@pytest.mark.parametrize("file, contents, message", [
    ("pds.json", "[1]", "pds.json: no readable JSON: it holds a list"), ("pds.json", "{", "pds.json: no readable JSON"),
    ("pds.json", {"guidance": [1]}, "pds.json: guidance cannot be used"),
    ("pds.json", {"guidance": {"pds": "high"}}, "pds.json: guidance cannot be used"),
    ("pds.json", {"steps": 0}, "pds.json: steps cannot be used"), ("pds.json", {"steps": 1.5}, "steps cannot be used"),
    ("pds.json", {"image": {"points": float("nan"), "steps": True}}, "image points, image steps cannot be used"),
    ("pds.json", {"nerf": {"pds": {"recolour": {"table": -1}}}}, "nerf pds recolour table cannot be used"),
    ("pds.json", {"svg": 3}, "svg is no object with settings"),
    ("captions.txt", b"\xff\xfe\x00", "captions.txt: no readable list of captions"),
    ("model_index.json", "[]", "damaged, or no pipeline"), ("unet/config.json", "{}", "damaged"),
    ("model_index.json", {"_class_name": ["own", "Own"]}, "damaged, or no pipeline"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler", "trained_betas": [float("nan")] * 1000},
     "schedule"),
    ("unet/diffusion_pytorch_model.safetensors", b"nothing", "damaged, or no pipeline"),
    ("tokenizer/tokenizer_config.json", "[", "damaged, or no pipeline"),
    ("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": False},
     "the model_max_length of its tokenizer, False, is not a number of tokens"),
    ("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"}, "is not a number of tokens"),
    ("vae/config.json", "nothing", "damaged, or no pipeline")])
def test_damaged_files_of_a_model_are_refused_by_name(pipelines, tmp_path, file, contents, message):
    shutil.copytree(pipelines["sd"], tmp_path / "sd")
    contents = contents if isinstance(contents, (str, bytes)) else json.dumps(contents)
    (tmp_path / "sd" / file).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(PriorError, match=message) as e:
        Prior.from_pretrained(tmp_path / "sd")
    assert "\n" not in str(e.value) and str(tmp_path / "sd") in str(e.value)


def test_a_prompt_outside_the_vocabulary_warns_and_names_the_nearest(pipelines, tmp_path):
    text = "# a comment\n# COLOUR is one of red blue\nred apple | apple | COLOUR apple\ncat face | kitten\n"
    assert read_captions(text) == ["red apple", "apple", "blue apple", "cat face", "kitten"]
    assert plain("A picture of a Red Apple!") == "red apple" and plain("an apple") == "apple"
    shutil.copytree(pipelines["sd"], tmp_path / "sd")
    (tmp_path / "sd" / "captions.txt").write_text(text)
    prior = Prior.from_pretrained(tmp_path / "sd")
    with pytest.warns(UserWarning, match="not trained on 'a kitten face'; nearest: kitten, cat face"):
        prior.embed("a kitten face")
    for words in ("яблоко", "りんご", "🍎", "red яблоко"):
        with pytest.warns(UserWarning, match=f"not trained on '{words}'; nearest: "):
            prior.embed(words)
    started = time.process_time()
    with pytest.warns(UserWarning) as caught:
        prior.embed("red apple " * 2000)
    assert time.process_time() - started < 2 and all(len(str(w.message)) < 400 for w in caught)
    assert any("reads only 12 of the" in str(w.message) for w in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.embed("a kitten face")  # warns once per prompt
        prior.embed("a drawing of a blue apple")
        prior.embed("")
        Prior.from_pretrained(pipelines["sd"]).embed("anything")  # no captions, no warning


@pytest.mark.parametrize("source, target, only", [
    ("red heart", "blue heart", True), ("a picture of a red heart", "Blue heart!", True),
    ("umbrella", "red umbrella", True), ("dark red car", "dark green car", True), ("red heart", "a red heart", False),
    ("red apple", "green pear", False),
    ("orange", "red", False), ("bear", "polar bear", False), ("red light", "light", True), ("", "red", False)])
def test_prompts_that_differ_in_a_colour_alone_are_known(source, target, only):
    assert recolours(source, target) == recolours(target, source) == only


def test_the_shipped_prior_tells_the_example_drawings_apart():
    """Diffusion classifier (arXiv 2303.16203): the right caption predicts the noise best, in unseen styles."""
    folder = ROOT / "models" / "emoji"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.stem not in ("instruct", "judge")) < 25e6
    for stem, largest in (("instruct", 12e6), ("judge", 5e6)):  # the weights of the editor and of the judge
        assert sum(p.stat().st_size for p in files if p.stem == stem) < largest
    prior = Prior.from_pretrained(folder)
    prior.guidance = 1.0
    captions = {"smiling-face": "slightly smiling face", "red-heart": "red heart", "red-apple": "red apple",
                "dog-face": "dog face", "automobile": "red car"}
    t = torch.tensor([300, 500, 700, 900])
    y = [tuple(part.expand(4, -1, -1) for part in prior.embed(c)) for c in captions.values()]
    for row, name in enumerate(captions):
        with torch.no_grad():
            x0 = prior.encode(SVG.load(ROOT / "examples" / f"{name}.svg", size=prior.size).render())
        noise = rand(4, *x0.shape[1:], seed=row, dtype=torch.float32)
        x_t = pds.add_noise(x0.expand(4, -1, -1, -1), noise, prior.abar, t)
        errors = torch.stack([(prior.eps(x_t, t, c) - noise).square().mean() for c in y])
        assert errors.argmin() == row, (name, errors)


def test_the_shipped_editor_turns_a_red_heart_blue_in_place():
    editor = InstructPix2Pix.from_pretrained(ROOT / "models" / "emoji")
    with torch.no_grad():
        before = SVG.load(ROOT / "examples" / "red-heart.svg", size=editor.size).render()
        after = editor.decode(instruct_pix2pix(editor, before, editor.embed("make it a blue heart"), steps=8,
                                               generator=torch.Generator().manual_seed(0)))
    inside = (before - 1).abs().sum(1) > 0.5
    red, _, blue = after.transpose(0, 1)[:, inside].mean(1)
    assert blue > red + 0.3 and before.transpose(0, 1)[0, inside].mean() > 0.9
    now = (after - 1).abs().sum(1) > 0.5
    assert (inside & now).sum() > 0.8 * (inside | now).sum()  # the heart has not moved
