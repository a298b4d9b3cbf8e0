"""pipelines/loading.py: folders, variants, single files, LoRA, embeddings, the hub; unsupported models."""
import gc
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import rand
from safetensors.torch import load_file
from torch.testing import assert_close

from pipelines import loading
from pipelines.loading import DROPPED, PriorError, check_channels, number_format, variant_of
from prior import InstructPix2Pix, Prior


def predictions(prior, prompt="a cat"):
    x_t, t = rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500])
    return prior.eps(x_t, t, prior.embed(prompt))


def copied(pipelines, tmp_path, kind="sd"):
    shutil.copytree(pipelines[kind], tmp_path / kind)
    return tmp_path / kind


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- folders ------------------------------------------------------------------------------------------

def test_a_folder_without_safety_checker_and_feature_extractor_loads(pipelines, tmp_path):
    folder = copied(pipelines, tmp_path)
    change_json(folder / "model_index.json", requires_safety_checker=True,
                image_encoder=["transformers", "CLIPVisionModel"],
                safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
                feature_extractor=["transformers", "CLIPFeatureExtractor"])
    prior = Prior.from_pretrained(folder)
    assert prior.pipe.safety_checker is None and prior.pipe.feature_extractor is None
    assert_close(predictions(prior), predictions(Prior.from_pretrained(pipelines["sd"])))


def test_a_folder_with_half_precision_files_only_loads(pipelines, tmp_path, capsys, monkeypatch):
    folder = copied(pipelines, tmp_path)
    pipe = Prior.from_pretrained(folder).pipe.to(torch.float16)
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, variant="fp16")
    assert not [*folder.glob("*/*model.safetensors")]
    prior = Prior.from_pretrained(folder)
    assert prior.network.module.dtype == torch.float32 and capsys.readouterr().err == ""
    assert_close(predictions(prior), predictions(Prior.from_pretrained(pipelines["sd"])), atol=2e-2, rtol=0)
    pipe.unet.save_pretrained(folder / "unet")  # plain files are preferred where both exist
    monkeypatch.setattr(loading, "LONG", 0)
    half = Prior.from_pretrained(folder, dtype="bfloat16")
    assert half.network.module.dtype == half.pipe.text_encoder.dtype == torch.bfloat16
    assert capsys.readouterr().err == f"loading {folder}: StableDiffusionPipeline as bfloat16 on cpu, its fp16 files\n"


@pytest.mark.parametrize("names, variant", [
    (["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"], None),
    (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"], "fp16"),
    (["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "fp16"),
    (["unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "fp16"),
    (["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/config.json"], None),
    (["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.bin"], None),
    (["vae/model.fp16.safetensors", "unet/config.json"], None)])
def test_which_files_hold_the_weights_of_a_part(names, variant):
    assert variant_of("unet", names) == variant


@pytest.mark.parametrize("device, dtype, kind, expected", [
    ("cpu", None, "FluxPipeline", torch.float32), ("cuda", None, "StableDiffusionPipeline", torch.float16),
    ("cuda", None, "FluxPipeline", torch.bfloat16), ("cuda", "float32", "FluxPipeline", torch.float32),
    ("cpu", torch.float16, "", torch.float16)])
def test_the_default_number_format_suits_device_and_model(device, dtype, kind, expected):
    assert number_format(device, dtype, {"_class_name": kind}) == expected


def test_a_folder_with_sharded_parts_loads(pipelines, tmp_path):
    folder = copied(pipelines, tmp_path)
    pipe = Prior.from_pretrained(folder).pipe
    for part in ("unet", "text_encoder"):
        shutil.rmtree(folder / part)
        getattr(pipe, part).save_pretrained(folder / part, max_shard_size="20KB")
        assert len([*(folder / part).glob("*-of-*")]) > 1
    try:
        prior = Prior.from_pretrained(folder)
    except PriorError as e:
        assert "its unet comes in several files: pip install accelerate" in str(e) or "its text_encoder comes" in str(e)
        pytest.skip("this diffusers reads several files with accelerate alone, which is not installed")
    assert_close(predictions(prior), predictions(Prior.from_pretrained(pipelines["sd"])))


def test_text_encoders_are_on_the_device_only_for_new_prompts(pipelines, monkeypatch):
    prior, moves = Prior.from_pretrained(pipelines["xl"]), []
    for encoder in (prior.pipe.text_encoder, prior.pipe.text_encoder_2):
        monkeypatch.setattr(encoder, "to", lambda device, encoder=encoder: moves.append(str(device)), raising=False)
    prior.device = torch.device("cpu:0")  # differs from "cpu", as cuda:0 would
    x_t, t = rand(1, 4, 8, 8, dtype=torch.float32), torch.tensor([500])
    y = [prior.embed("a cat"), prior.embed("a dog")]
    assert moves == ["cpu:0"] * 2  # once for all prompts
    for _ in range(3):
        prior.eps(x_t, t, y[0])
        prior.encode(torch.rand(1, 3, 16, 16))
    assert moves[2:] == ["cpu"] * 2
    prior.embed("a fox")  # they return for a new prompt
    assert prior.embed("a cat") is y[0] and moves[4:] == ["cpu:0"] * 2


# ---- one file -----------------------------------------------------------------------------------------

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def original_names(prior):
    """The weights of the tiny pipeline "sd" under the names of an original Stable Diffusion checkpoint."""
    unet = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
            "down_blocks.0.resnets.0": "input_blocks.1.0",
            "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
            "down_blocks.1.attentions.0": "input_blocks.3.1", "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
            "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
            "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
            "up_blocks.0.upsamplers.0": "output_blocks.1.2", "up_blocks.1.resnets.0": "output_blocks.2.0",
            "up_blocks.1.resnets.1": "output_blocks.3.0"}
    vae = [(r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
           (r"mid_block\.attentions\.0", "mid.attn_1"), (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
           (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
           (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}"),
           (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"), ("conv_norm_out", "norm_out"),
           ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), (r"to_([qkv])", r"\1"),
           (r"to_out\.0", "proj_out")]
    state = {}
    for key, value in prior.network.module.state_dict().items():
        place = max((name for name in unet if key.startswith(f"{name}.")), key=len)
        rest = key[len(place) + 1:]
        if ".resnets." in place:
            rest = re.sub(r"^[^.]+", lambda m: RESNET[m[0]], rest)
        state[f"model.diffusion_model.{unet[place]}.{rest}"] = value
    for key, value in prior.vae.state_dict().items():
        if ".attentions." in key and "group_norm" not in key and key.endswith("weight"):
            value = value[..., None, None]  # a convolution in the original
        for pattern, name in vae:
            key = re.sub(pattern, name, key)
        state[f"first_stage_model.{key}"] = value
    for key, value in prior.pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {key: value.clone().contiguous() for key, value in state.items()}


def test_a_single_file_with_a_whole_model_loads(pipelines, tmp_path, monkeypatch):
    from safetensors.torch import save_file
    prior = Prior.from_pretrained(pipelines["sd"])
    state, file = original_names(prior), tmp_path / "my.safetensors"
    save_file(state, file)
    monkeypatch.setattr("diffusers.loaders.single_file.fetch_diffusers_config", lambda *_: 1 / 0)  # no network
    with pytest.raises(PriorError, match=r"my.safetensors: its shapes .* or convert it: curl .*--from_safetensors --"):
        Prior.from_pretrained(file)
    shutil.copytree(pipelines["sd"], tmp_path / "my", ignore=shutil.ignore_patterns("*.safetensors"))
    got = Prior.from_pretrained(file)
    assert_close(predictions(got), predictions(prior))
    picture = torch.rand(1, 3, 16, 16)
    assert_close(got.encode(picture), prior.encode(picture))
    assert_close(got.decode(got.encode(picture)), prior.decode(prior.encode(picture)))
    half = Prior.from_pretrained(file, dtype="bfloat16")
    assert half.network.module.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert_close(half.encode(picture), prior.encode(picture))
    key = next(key for key in state if "input_blocks.3.1" in key)
    save_file({k: v for k, v in state.items() if k != key}, file)
    with pytest.raises(PriorError, match="my.safetensors: damaged.* (1|some) of its weights are missing") as e:
        Prior.from_pretrained(file)
    assert "\n" not in str(e.value)


def test_files_without_a_whole_model_are_refused(tmp_path):
    from safetensors.torch import save_file
    one = torch.zeros(2, 2)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "torn.safetensors").write_bytes(b"nothing of the kind")
    save_file({"first_stage_model.encoder.conv_in.weight": one}, tmp_path / "vae.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_up.weight": one}, tmp_path / "style.safetensors")
    for name, message in [("model.ckpt", "a pickle can run code, so none is loaded; convert it where you trust it: c"),
                          ("torn.safetensors", "damaged, or no .safetensors file"),
                          ("vae.safetensors", "not a whole Stable Diffusion 1.x, 2.x or XL: no UNet, text encoder in"),
                          ("style.safetensors", "a LoRA: give it as --lora")]:
        with pytest.raises(PriorError, match=re.escape(f"{tmp_path / name}: {message}")) as e:
            Prior.from_pretrained(tmp_path / name)
        assert "\n" not in str(e.value) and gc.isenabled()


# ---- LoRA and embeddings ------------------------------------------------------------------------------

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def write_lora(file, layer=LAYER):
    from safetensors.torch import save_file
    down, up = rand(2, 16, seed=1, dtype=torch.float32), rand(16, 2, seed=2, dtype=torch.float32)
    save_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, file)
    return up @ down


def attention(kind="down_blocks_1_attentions_0_transformer_blocks_0_attn1"):
    """Four matrices of an attention with different ranks and alphas: {name: (down, up, alpha)}."""
    return {f"{kind}_{name}": (rand(2 + i, 16, seed=i, dtype=torch.float32), rand(16, 2 + i, seed=9 + i,
                                                                                  dtype=torch.float32), alpha)
            for i, (name, alpha) in enumerate([("to_q", 1.0), ("to_k", 4.0), ("to_v", 8.0), ("to_out_0", 0.5)])}


def kohya(modules, prefix="lora_unet_", **more):
    """The tensors of modules in the layout of kohya's scripts."""
    state = {}
    for name, (down, up, alpha) in modules.items():
        state |= {f"{prefix}{name}.lora_down.weight": down, f"{prefix}{name}.lora_up.weight": up,
                  f"{prefix}{name}.alpha": torch.tensor(alpha)} | {
            f"{prefix}{name}.{key}": value for key, value in more.items()}
    return {key: value.clone().contiguous() for key, value in state.items()}


def dotted(name):
    return re.sub(r"_(?=\d|attentions|transformer|attn|to_[qkvo])|(?<=\d)_|(?<=out)_", ".", name)


def changes(pipelines, tmp_path, state, strength=1.0, metadata=None, name="mine.safetensors"):
    """What a LoRA changes: {parameter name with underscores: difference in float64}."""
    from safetensors.torch import save_file
    save_file(state, tmp_path / name, metadata=metadata)
    prior = Prior.from_pretrained(pipelines["sd"], lora=tmp_path / name, lora_scale=strength)
    plain = Prior.from_pretrained(pipelines["sd"])
    found = {}
    for part in ("unet", "text_encoder"):
        before, after = (dict(getattr(p.pipe, part).named_parameters()) for p in (plain, prior))
        assert before.keys() == after.keys()
        found |= {key: after[key].double() - value.double() for key, value in before.items()
                  if not torch.equal(after[key], value)}
    return {key.removesuffix(".weight").replace(".", "_"): value for key, value in found.items()}


def test_each_module_of_a_lora_has_its_own_alpha_in_every_layout(pipelines, tmp_path):
    modules = attention()
    wanted = {name: up.double() @ down.double() * alpha / len(down) for name, (down, up, alpha) in modules.items()}
    names = {name: dotted(name) for name in modules}
    assert names["down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"] == LAYER.replace("to_q", "to_out.0")
    peft = {f"{names[name]}.{key}": value.contiguous() for name, (down, up, _) in modules.items()
            for key, value in (("lora_A.weight", down), ("lora_B.weight", up))}
    pattern = {names[name].split("attn1.")[1]: alpha for name, (_, _, alpha) in modules.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8.0, "unet.alpha_pattern": pattern})}
    older = {f"unet.{names[name].replace('attn1.', 'attn1.processor.').removesuffix('.0')}_lora.{key}.weight": value
             for name, (down, up, alpha) in modules.items()
             for key, value in (("down", down), ("up", up * alpha / len(down)))}
    adapter = {f"base_model.model.{key}": value for key, value in peft.items()}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": pattern}))
    for state, options in [(kohya(modules), {}), (kohya(modules), {"strength": 0.5}), (older, {}),
                           ({f"unet.{key}": value for key, value in peft.items()}, {"metadata": metadata}),
                           (adapter, {"name": "adapter/adapter_model.safetensors"})]:
        got = changes(pipelines, tmp_path, state, **options)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(got[name], options.get("strength", 1.0) * value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [True, False])
def test_a_dora_rescales_the_sum(pipelines, tmp_path, rows):
    name, (down, up, alpha) = next(iter(attention().items()))
    size = 1 + rand(16, dtype=torch.float32).abs()
    size = size.view(16, 1) if rows else size.view(1, 16)
    old = dict(Prior.from_pretrained(pipelines["sd"]).network.module.named_parameters())[f"{LAYER}.weight"].double()
    new = old + up.double() @ down.double() * alpha / len(down)
    wanted = size * new / new.norm(dim=1 if rows else 0, keepdim=True)
    for strength in (1.0, 0.25):
        got = changes(pipelines, tmp_path, kohya({name: (down, up, alpha)}, dora_scale=size), strength)
        assert_close(got[name], strength * (wanted - old), atol=1e-5, rtol=0)
    if rows:  # peft's name
        state = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up,
                 f"unet.{LAYER}.lora_magnitude_vector": size.flatten(), f"unet.{LAYER}.alpha": torch.tensor(alpha)}
        assert_close(changes(pipelines, tmp_path, state)[name], wanted - old, atol=1e-5, rtol=0)


def test_a_lora_changes_convolutions_and_text_encoders(pipelines, tmp_path):
    down, up = rand(2, 8, 3, 3, dtype=torch.float32), rand(8, 2, 1, 1, dtype=torch.float32)
    got = changes(pipelines, tmp_path, kohya({"down_blocks_0_resnets_0_conv1": (down, up, 2.0)}))
    wanted = torch.einsum("or,rikl->oikl", up[..., 0, 0].double(), down.double())
    assert_close(got["down_blocks_0_resnets_0_conv1"], wanted, atol=1e-5, rtol=0)
    down, up = rand(2, 16, dtype=torch.float32), rand(16, 2, dtype=torch.float32)
    for prefix, name in [("lora_te_", "text_model_encoder_layers_0_self_attn_q_proj"),
                         ("text_encoder.", "text_model.encoder.layers.0.self_attn.q_proj")]:
        got = changes(pipelines, tmp_path, kohya({name: (down, up, 2.0)}, prefix))
        (key, value), = got.items()
        assert key.endswith("encoder_layers_0_self_attn_q_proj")
        assert_close(value, up.double() @ down.double(), atol=1e-5, rtol=0)


def test_a_lora_may_use_the_names_of_the_original_networks(pipelines, flows, tmp_path):
    from safetensors.torch import save_file
    down, up = rand(2, 16, dtype=torch.float32), rand(16, 2, dtype=torch.float32)
    name = "input_blocks_3_1_transformer_blocks_0_attn1_to_q"  # down_blocks.1.attentions.0 if a block has one layer
    save_file(kohya({name: (down, up, 1.0)}), tmp_path / "xl.safetensors")
    own = [dict(Prior.from_pretrained(pipelines["xl"], lora=lora).network.module.named_parameters())[f"{LAYER}.weight"]
           for lora in (None, tmp_path / "xl.safetensors")]
    assert_close(own[1] - own[0], up @ down / 2, atol=1e-5, rtol=0)
    down, up = rand(2, 32, dtype=torch.float32), rand(96, 2, dtype=torch.float32)
    joined = {"double_blocks_0_img_attn_qkv": (down, up, 1.0)}
    save_file(kohya(joined), tmp_path / "flux.safetensors")
    own = [dict(Prior.from_pretrained(flows["schnell"], lora=lora).network.module.named_parameters())
           for lora in (None, tmp_path / "flux.safetensors")]
    for i, part in enumerate("qkv"):
        key = f"transformer_blocks.0.attn.to_{part}.weight"
        assert_close(own[1][key] - own[0][key], up[32 * i:32 * i + 32] @ down / 2, atol=1e-5, rtol=0)
    save_file(kohya(joined, dora_scale=torch.ones(96, 1)), tmp_path / "flux.safetensors")
    with pytest.raises(PriorError, match="flux.safetensors: no LoRA for this model: a DoRA of the original network's"):
        Prior.from_pretrained(flows["schnell"], lora=tmp_path / "flux.safetensors")


def test_lora_modules_that_the_model_lacks_are_counted(pipelines, tmp_path):
    from safetensors.torch import save_file
    down, up = rand(2, 16, dtype=torch.float32), rand(16, 2, dtype=torch.float32)
    unknown = {f"mid_block_attentions_{i}_to_q": (down, up, 1.0) for i in (7, 8)}
    with pytest.warns(UserWarning, match="2 of its 6 modules are no part of this model, e.g. lora_unet_mid_block_att"):
        assert len(changes(pipelines, tmp_path, kohya(attention() | unknown))) == 4
    save_file(kohya(unknown), tmp_path / "mine.safetensors")
    wide = kohya({"down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (rand(2, 24), rand(16, 2), 1.0)})
    save_file(wide, tmp_path / "wide.safetensors")
    save_file({"lora_unet_mid.hada_w1_a": down, "lora_unet_mid.hada_w1_b": up}, tmp_path / "loha.safetensors")
    save_file({"unet.mid.lora_A.weight": down}, tmp_path / "half.safetensors")
    for name, message in [("mine", "none of its 2 modules belongs to this model, e.g. lora_unet_mid_block_atten"),
                          ("wide", r"a matrix for a weight \[16,24\], this model's has \[16, 16\]"),
                          ("loha", "it holds hada_w1_a, hada_w1_b, which is neither LoRA nor DoRA"),
                          ("half", "a matrix of unet.mid is missing")]:
        with pytest.raises(PriorError, match=f"{name}.safetensors: no LoRA for this model: {message}") as e:
            Prior.from_pretrained(pipelines["sd"], lora=tmp_path / f"{name}.safetensors")
        assert "\n" not in str(e.value)


def test_an_unreadable_lora_is_refused(pipelines, tmp_path):
    write_lora(tmp_path / "mine.safetensors")
    shutil.copy(pipelines["sd"] / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x02}q\x00.")
    for name, message in [("vae.safetensors", "no LoRA in it, or no .safetensors file"),
                          ("pickle.bin", "no LoRA in it, or"),
                          ("", "2 .safetensors files in it, none called pytorch_lora_weights.safetensors")]:
        with pytest.raises(PriorError, match=message) as e:
            Prior.from_pretrained(pipelines["sd"], lora=tmp_path / name)
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)


def test_git_lfs_pointers_are_named(pipelines, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    folder = copied(pipelines, tmp_path)
    (tmp_path / "mine.safetensors").write_text(pointer)
    message = "is a Git LFS pointer, not the file itself: run git lfs pull"
    (tmp_path / "mine.pt").write_text(pointer)
    for options in ({"lora": tmp_path / "mine.safetensors"}, {"embedding": tmp_path / "mine.safetensors"},
                    {"embedding": tmp_path / "mine.pt"}):
        with pytest.raises(PriorError, match=rf"mine\.(safetensors|pt): {message}"):
            Prior.from_pretrained(folder, **options)
    with pytest.raises(PriorError, match=f"mine.safetensors: {message}"):
        Prior.from_pretrained(tmp_path / "mine.safetensors")
    for file in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "pds.json", "model_index.json"):
        own = copied(pipelines, tmp_path / file.replace("/", "-"))
        (own / file).write_text(pointer)
        with pytest.raises(PriorError, match=f"{file}: {message}") as e:
            Prior.from_pretrained(own)
        assert "\n" not in str(e.value)


def test_web_addresses_gguf_files_and_incomplete_folders_are_refused(pipelines, tmp_path):
    folder = copied(pipelines, tmp_path)
    shutil.rmtree(folder / "tokenizer")
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    for name, message in [("https://huggingface.co/owner/model/tree/main", "a web address is not a model: give own"),
                          ("https://example.org/a.safetensors", "a web address is not a model: download it"),
                          (tmp_path / "flux.gguf", "flux.gguf: a .gguf file holds quantised weights"),
                          (folder, "sd: damaged, or no pipeline: its folder tokenizer is missing")]:
        with pytest.raises(PriorError, match=message) as e:
            Prior.from_pretrained(name)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind, state, word", [("sd", {"<mine>": 16}, "<mine>"), ("sd", {"emb_params": 16}, "mine"),
                                               ("xl", {"clip_l": 16, "clip_g": 16}, "mine")])
def test_an_embedding_teaches_a_word(pipelines, tmp_path, capsys, kind, state, word):
    from safetensors.torch import save_file
    vectors = {key: rand(2, width, seed=i, dtype=torch.float32) for i, (key, width) in enumerate(state.items())}
    save_file(vectors, tmp_path / "mine.safetensors")
    prior = Prior.from_pretrained(pipelines[kind], embedding=tmp_path / "mine.safetensors")
    assert capsys.readouterr().err == f"{tmp_path / 'mine.safetensors'}: in a prompt its word is {word}\n"
    tokenizer = prior.pipe.tokenizer
    ids = tokenizer(prior.pipe.maybe_convert_prompt(f"a {word}", tokenizer)).input_ids[-3:-1]
    encoder = prior.pipe.text_encoder_2 if kind == "xl" else prior.pipe.text_encoder
    assert_close(encoder.get_input_embeddings().weight[ids], list(vectors.values())[-1])
    plain = Prior.from_pretrained(pipelines[kind])
    assert (prior.embed(f"a {word}")[0] - plain.embed(f"a {word}")[0]).abs().max() > 1e-3
    assert_close(prior.embed("a cat")[0], plain.embed("a cat")[0])


def test_unusable_embeddings_are_refused(pipelines, tmp_path):
    from safetensors.torch import save_file
    save_file({"<mine>": torch.zeros(1, 7)}, tmp_path / "narrow.safetensors")
    save_file({"a": torch.zeros(1, 16), "b": torch.zeros(1, 16)}, tmp_path / "two.safetensors")
    for name in ("pickle.pt", "pickle.npz"):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    for name, message in [("two.safetensors", "no textual inversion: 2 tensors"),
                          ("pickle.pt", "a pickle can run code"), ("pickle.npz", "nothing in it, or no .safetens"),
                          ("none.safetensors", "no textual inversion: "),
                          ("narrow.safetensors", "<mine> is not for this model")]:
        with pytest.raises(PriorError, match=message) as e:
            Prior.from_pretrained(pipelines["sd"], embedding=tmp_path / name)
        assert "\n" not in str(e.value)


# ---- models that are refused by name --------------------------------------------------------------------------

@pytest.mark.parametrize("index, message", [
    ({"_class_name": "StableDiffusionInpaintPipeline"}, "a StableDiffusionInpaintPipeline inpaints, with"),
    ({"_class_name": "FluxFillPipeline"}, "inpaints, with"),
    ({"_class_name": "FluxKontextPipeline"}, "edits a given picture"),
    ({"_class_name": "StableDiffusionDepth2ImgPipeline"}, "takes a depth map"),
    ({"_class_name": "StableDiffusionUpscalePipeline"}, "enlarges pictures"),
    ({"_class_name": "StableDiffusionControlNetPipeline"}, "takes a control picture"),
    ({"_class_name": "WanPipeline"}, "makes videos"), ({"_class_name": "KandinskyV22Pipeline"}, "in two stages"),
    ({"_class_name": "WuerstchenDecoderPipeline"}, "in two stages"), ({"_class_name": "IFPipeline"}, "works on pixels"),
    ({"_class_name": "LatentConsistencyModelPipeline"}, "predicts the end of the trajectory at once"),
    ({"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"],
      "unet": [None, None]}, "a PixArtAlphaPipeline without unet is not supported: .*FLUX.1 are"),
    ({"_class_name": "StableDiffusionXLImg2ImgPipeline", "tokenizer": [None, None]}, "without tokenizer is not")])
def test_unsupported_pipelines_are_refused_by_name(pipelines, tmp_path, monkeypatch, index, message):
    folder = copied(pipelines, tmp_path)
    change_json(folder / "model_index.json", **index)
    # the class name is enough
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", classmethod(lambda *_, **__: 1 / 0))
    with pytest.raises(PriorError, match=f"sd: .*{message}") as e:
        Prior.from_pretrained(folder)
    assert "\n" not in str(e.value)


def test_a_folder_without_a_pipeline_is_refused_with_what_it_holds(pipelines, tmp_path):
    cases = {"lora": ["pytorch_lora_weights.safetensors"], "inversion": ["learned_embeds.safetensors"],
             "control": ["config.json", "diffusion_pytorch_model.safetensors"], "alone": ["config.json"],
             "parts": ["unet/config.json", "vae/config.json"], "single": ["v1-5.safetensors", "README.md"],
             "empty": ["README.md"]}
    for name, files in cases.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "control" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    (tmp_path / "alone" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "other").mkdir()
    write_lora(tmp_path / "other" / "style.safetensors")
    for name, message in [("lora", "a LoRA: give it as --lora"), ("other", "a LoRA: give it as --lora"),
                          ("inversion", "give its file as --embedding"),
                          ("control", "a ControlNetModel takes a control picture"),
                          ("alone", "a UNet2DConditionModel is one part of a pipeline"),
                          ("parts", "but parts of one: unet, vae"), ("empty", "no model_index.json"),
                          ("single", "give one of its files as --model, as v1-5.safetensors")]:
        with pytest.raises(PriorError, match=f"{name}: .*{message}") as e:
            Prior.from_pretrained(tmp_path / name)
        assert "\n" not in str(e.value)


def test_an_inpainting_unet_in_an_ordinary_pipeline_is_refused(pipelines, tmp_path):
    import diffusers
    folder = copied(pipelines, tmp_path)
    unet = Prior.from_pretrained(folder).network.module
    diffusers.UNet2DConditionModel.from_config(dict(unet.config) | {"in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(PriorError, match="takes 9 channels, a latent has 4: an inpainting model, and no text-to-image"):
        Prior.from_pretrained(folder)
    with pytest.raises(PriorError, match="takes 8 channels, a latent has 4: an InstructPix2Pix model, and no text-to"):
        check_channels(8, 4)
    check_channels(8, 4, 2)


# ---- the hub ------------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the folders owner/* of tmp_path as models; `fetched` lists what was requested."""
    from huggingface_hub.utils import EntryNotFoundError
    fetched = []

    def model_info(self, name, **_):
        files = [p.relative_to(tmp_path / name).as_posix() for p in (tmp_path / name).rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def download_file(name, file, **_):
        fetched.append(file)
        if not (tmp_path / name / file).is_file():
            raise EntryNotFoundError(f"404: {file}")
        return str(tmp_path / name / file)

    @classmethod
    def download(cls, name, variant=None, **dropped):
        fetched.append((name, variant, sorted(dropped)))
        return str(tmp_path / name)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_file)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    monkeypatch.chdir(tmp_path / "elsewhere" if (tmp_path / "elsewhere").mkdir() else tmp_path / "elsewhere")
    return fetched


def test_an_old_model_loads_without_a_word(pipelines, tmp_path, capfd):
    """Pickled weights in a folder of diffusers, which torch reads without running code, and an old scheduler."""
    folder = shutil.copytree(pipelines["sd"], tmp_path / "old")
    for part in ("unet", "vae"):
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("steps_offset", "clip_sample")}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(kept))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        prior = Prior.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")
    x_t, t = torch.ones(1, 4, 8, 8), torch.tensor([500])
    known = Prior.from_pretrained(pipelines["sd"])
    assert torch.equal(prior.eps(x_t, t, prior.embed("a cat")), known.eps(x_t, t, known.embed("a cat")))


def test_a_hub_model_with_half_precision_files_only_loads(pipelines, tmp_path, hub, capsys):
    pipe = Prior.from_pretrained(pipelines["sd"]).pipe
    pipe.to(torch.float16).save_pretrained(tmp_path / "owner" / "half", variant="fp16")
    prior = Prior.from_pretrained("owner/half")
    assert hub[-1] == ("owner/half", "fp16", sorted(DROPPED))
    assert prior.network.module.dtype == torch.float32
    assert capsys.readouterr().err == "loading owner/half: StableDiffusionPipeline as float32 on cpu, its fp16 files\n"
    shutil.copytree(pipelines["sd"], tmp_path / "owner" / "plain")
    Prior.from_pretrained("owner/plain")
    assert hub[-1] == ("owner/plain", None, sorted(DROPPED))
    assert "files" not in capsys.readouterr().err


def test_an_unsupported_hub_model_is_refused_before_the_download(pipelines, tmp_path, hub):
    other, hole = tmp_path / "owner" / "other", tmp_path / "owner" / "hole"
    for folder, index, in_channels in [(other, {"_class_name": "WanPipeline"}, 4), (hole, {}, 9)]:
        shutil.copytree(pipelines["sd"], folder)
        change_json(folder / "model_index.json", **index)
        change_json(folder / "unet" / "config.json", in_channels=in_channels)
    (tmp_path / "owner" / "lora").mkdir()
    write_lora(tmp_path / "owner" / "lora" / "pytorch_lora_weights.safetensors")
    (tmp_path / "owner" / "control").mkdir()
    (tmp_path / "owner" / "control" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    for name, message in [("other", "makes videos"), ("hole", "an inpainting model"),
                          ("lora", "a LoRA: give it as --lora"), ("control", "takes a control picture")]:
        hub.clear()
        with pytest.raises(PriorError, match=f"owner/{name}: .*{message}") as e:
            Prior.from_pretrained(f"owner/{name}")
        assert "\n" not in str(e.value) and set(hub) <= {"model_index.json", "unet/config.json", "config.json"}


def test_a_gated_model_asks_to_accept_its_licence(hub, monkeypatch):
    from huggingface_hub.utils import GatedRepoError

    class Gated(GatedRepoError):
        def __init__(self):
            pass

    def download_file(*_, **__):
        raise Gated
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_file)
    with pytest.raises(PriorError, match="owner/gated: its licence has to be accepted on https://huggingface.co/owner"):
        Prior.from_pretrained("owner/gated")


def test_an_editor_from_the_hub_may_have_twice_the_channels(pipelines, tmp_path, hub):
    shutil.copytree(pipelines["instruct"], tmp_path / "owner" / "editor")
    assert InstructPix2Pix.from_pretrained("owner/editor").network.module.config.in_channels == 8
    with pytest.raises(PriorError, match="an InstructPix2Pix model, and no text-to-image model"):
        Prior.from_pretrained("owner/editor")


# ---- the command line ---------------------------------------------------------------------------------

def test_a_run_reports_a_bad_lora_in_one_line(command, tmp_path, capsys):
    write_lora(tmp_path / "mine.safetensors", "down_blocks.7.attentions.0.to_q")
    assert command("--lora", tmp_path / "mine.safetensors") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"run.py: error: {tmp_path / 'mine.safetensors'}: no LoRA for this model: none of its 1 modules belongs to "
        "this model, e.g. unet.down_blocks.7.attentions.0.to_q"]
    assert not (tmp_path / "out").exists()


def test_a_run_in_half_precision_uses_a_learned_word(command, tmp_path, capsys, small_runs):
    from safetensors.torch import save_file
    save_file({"<mine>": rand(1, 16, dtype=torch.float32)}, tmp_path / "mine.safetensors")
    assert command("--dtype", "bfloat16", "--embedding", tmp_path / "mine.safetensors", "--target", "a <mine>",
                   "--steps", 2) == 0
    assert f"{tmp_path / 'mine.safetensors'}: in a prompt its word is <mine>" in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["embedding"] == str(tmp_path / "mine.safetensors")
    before = config["sha256"]
    save_file({"<mine>": rand(1, 16, seed=1, dtype=torch.float32)}, tmp_path / "mine.safetensors")
    assert command("--dtype", "bfloat16", "--embedding", tmp_path / "mine.safetensors", "--target", "a <mine>",
                   "--steps", 2) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sha256"] != before


def test_the_edits_of_a_list_use_the_lora_and_the_embedding(monkeypatch, tmp_path):
    import run
    from bench import edits
    from bench.__main__ import main
    kept = []
    monkeypatch.setattr(run.Prior, "from_pretrained",
                        lambda *args, **options: kept.append((args, options)) or SimpleNamespace(device="cpu"))
    monkeypatch.setattr(edits, "edit_row", lambda prior, name, args, *_: kept.append(args) or {})
    monkeypatch.setattr(edits, "write_table", lambda *_: None)
    (tmp_path / "a.svg").write_text("<svg/>")
    (tmp_path / "list.txt").write_text("svg | a.svg | a | b\n")
    assert main(["edits", "--list", str(tmp_path / "list.txt"), "--compare", "pds", "--out", str(tmp_path / "out"),
                 "--lora", "style", "--lora-scale", "0.5", "--embedding", "word", "--dtype", "float16"]) == 0
    (given, options), own = kept
    assert given[-1] == "float16" and options == {"lora": "style", "lora_scale": 0.5, "embedding": own.embedding}
    assert (own.lora, own.lora_scale, str(own.embedding), own.dtype) == ("style", 0.5, "word", "float16")
