"""What the tests share: drawings, a scene, tiny random pipelines, and the command line on them."""
import ast
import functools
import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

BETAS = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's
ABAR = (1 - BETAS).cumprod(0)


def pytest_terminal_summary(terminalreporter):
    """Print a line for each test file: its subject, the first line of its docstring, and how many tests passed."""
    passed = {}
    for result in terminalreporter.stats.get("passed", []):
        path = result.nodeid.split("::")[0]
        passed[path] = passed.get(path, 0) + 1
    if passed:
        terminalreporter.section("what was tested")
    for path in sorted(passed):
        subject = ast.get_docstring(ast.parse((terminalreporter.config.rootpath / path).read_text())) or path
        terminalreporter.write_line(f"{passed[path]:4} {subject.splitlines()[0]}")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Restore Python's reaction to Ctrl-C, which tests would inherit as ignored from a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- drawings -----------------------------------------------------------------------------------------

XMLNS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
STOPS = ('<stop offset=".1" stop-color="#f00"/><stop offset=".6" stop-color="#0f0" stop-opacity=".6"/>'
         '<stop offset="1" stop-color="#00f"/>')


def svg_text(body, attributes='viewBox="0 0 32 32"'):
    return f"<svg {XMLNS} {attributes}>{body}</svg>"


@pytest.fixture
def load_svg(tmp_path):
    def load(body, attributes='viewBox="0 0 32 32"', **options):
        path = tmp_path / "drawing.svg"
        path.write_text(svg_text(body, attributes))
        from svg_raster import SVG
        return SVG.load(path, **{"size": 32, **options})
    return load


def darkness(svg, **options):
    """Sum over pixels of 1 - value: the area in pixels of what is painted black."""
    with torch.no_grad():
        return float((1 - svg.render(**options)[0, 0]).double().sum())


# ---- a scene ------------------------------------------------------------------------------------------

NERF_SIZES = dict(levels=6, table=2 ** 14, width=16)


def nerf_pose(azimuth, elevation=0.3, distance=4.0):
    """Camera-to-world [4,4] that looks at the origin from an azimuth around z."""
    back = torch.tensor([math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation),
                         math.sin(elevation)], dtype=torch.float64)
    right = torch.linalg.cross(torch.tensor([0, 0, 1.0], dtype=torch.float64), back)
    right /= right.norm()
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.stack((right, torch.linalg.cross(back, right), back, distance * back), 1)
    return pose


def nerf_scene(folder, views=12, size=24, radius=0.8, alpha=True, split=True, **keys):
    """A sphere around the origin whose colour is its normal, written as Blender's files or as one transforms.json."""
    angle, frames = 0.6, {"train": [], "test": []}
    for i in range(views):
        pose = nerf_pose(i * 2.4, 0.1 + 0.06 * i)
        fine = 4 * size
        v, u = torch.meshgrid(torch.arange(fine), torch.arange(fine), indexing="ij")
        focal = fine / 2 / math.tan(angle / 2)
        d = torch.stack(((u + 0.5 - fine / 2) / focal, -(v + 0.5 - fine / 2) / focal, -torch.ones(fine, fine)), -1)
        d = (d / d.norm(dim=-1, keepdim=True)).double() @ pose[:3, :3].T
        along = d @ pose[:3, 3]
        root = along ** 2 - pose[:3, 3].square().sum() + radius ** 2
        hit = root > 0
        normal = (pose[:3, 3] + (-along - root.clamp_min(0).sqrt())[..., None] * d) / radius
        rgba = torch.cat((normal / 2 + 0.5, torch.ones(fine, fine, 1)), -1) * hit[..., None]
        rgba = rgba.view(size, 4, size, 4, 4).mean((1, 3))
        rgba[..., :3] /= rgba[..., 3:].clamp_min(1e-6)
        if not alpha:
            rgba = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
        part = "test" if split and i % 4 == 3 else "train"
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray((rgba * 255).round().byte().numpy()).save(folder / part / f"{i}.png")
        frames[part].append({"file_path": f"{part}/{i}" + ("" if split else ".png"), "transform_matrix": pose.tolist()})
    for part in ("train", "test") if split else ("train",):
        name = f"transforms_{part}.json" if split else "transforms.json"
        (folder / name).write_text(json.dumps({"camera_angle_x": angle, "frames": frames[part]} | keys))
    return folder


@pytest.fixture(scope="session")
def nerf_sphere(tmp_path_factory):
    from scene.reading import load_scene
    return load_scene(nerf_scene(tmp_path_factory.mktemp("sphere")))


# ---- Gaussians ----------------------------------------------------------------------------------------

SPLAT_SIZES = dict(count=300, limit=800, degree=1)


def splat_camera(size=32, width=None, distance=4.0, angle=0.6):
    """A camera on the z axis at `distance`, looking at the origin."""
    from scene.cameras import Camera
    pose = torch.eye(4)[:3].clone()
    pose[2, 3] = distance
    width = width or size
    focal = size / 2 / math.tan(angle / 2)
    return Camera(pose, (focal, focal, width / 2, size / 2, 0, 0, 0, 0, 0, 0), width, size)


def splat_random(scene, count=60, degree=3, seed=0, spread=0.7, dtype=torch.float32):
    """Gaussians of many sizes, shapes and opacities, some of them behind the camera or outside the picture."""
    from splat import Splats
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    splats = Splats(scene, draw(count, 3) * spread, -2.0 + 0.6 * draw(count, 3), draw(count, 4), draw(count) * 2,
                    draw(count, 3), 0.3 * draw(count, (degree + 1) ** 2 - 1, 3))
    return splats.to(dtype)


@pytest.fixture(scope="session")
def splat_fitted(nerf_sphere):
    from splat import Splats
    return Splats.fit(nerf_sphere, steps=180, progress=False, **SPLAT_SIZES)


# ---- tiny random pipelines ----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Tiny random pipelines saved to disk: epsilon, v-prediction with TAESD's autoencoder, SDXL, InstructPix2Pix."""
    import diffusers
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    root, made = tmp_path_factory.mktemp("pipelines"), {}
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = symbols + [s + "</w>" for s in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(root, model_max_length=12)
    text = CLIPTextConfig(vocab_size=len(symbols), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                          num_attention_heads=2, max_position_embeddings=12, projection_dim=8,
                          bos_token_id=len(symbols) - 2, eos_token_id=len(symbols) - 1, pad_token_id=len(symbols) - 1)
    net = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=[8, 16],
               down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
               up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=2, norm_num_groups=4)
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=4,
                 projection_class_embeddings_input_dim=8 + 6 * 4)
    for kind in ("sd", "v", "xl", "instruct"):
        torch.manual_seed(0)
        net["in_channels"] = 8 if kind == "instruct" else 4
        schedule = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
            set_alpha_to_one=False, prediction_type="v_prediction" if kind == "v" else "epsilon")
        if kind == "v":
            vae = diffusers.AutoencoderTiny(encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8],
                                            num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], scaling_factor=1.0)
        else:
            vae = diffusers.AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, layers_per_block=1,
                                          down_block_types=["DownEncoderBlock2D"] * 2, sample_size=16,
                                          up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
                                          scaling_factor=0.7, shift_factor=0.1)
        if kind == "xl":
            pipe = diffusers.StableDiffusionXLPipeline(
                vae=vae, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
                tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=schedule, force_zeros_for_empty_prompt=True,
                unet=diffusers.UNet2DConditionModel(cross_attention_dim=32, **net, **added))
        else:
            kind_of = {"instruct": diffusers.StableDiffusionInstructPix2PixPipeline}
            pipe = kind_of.get(kind, diffusers.StableDiffusionPipeline)(
                vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, scheduler=schedule,
                unet=diffusers.UNet2DConditionModel(cross_attention_dim=16, **net), safety_checker=None,
                feature_extractor=None, requires_safety_checker=False)
        pipe.save_pretrained(root / kind)
        made[kind] = root / kind
    return made


@pytest.fixture(scope="session")
def flows(pipelines, tmp_path_factory):
    """Tiny random pipelines of flow matching saved to disk: Stable Diffusion 3, FLUX dev and schnell."""
    import diffusers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
    )
    root, made = tmp_path_factory.mktemp("flows"), {}
    tokenizer = CLIPTokenizer.from_pretrained(pipelines["sd"] / "tokenizer", model_max_length=12)
    read = CLIPTextConfig.from_pretrained(pipelines["sd"] / "text_encoder")
    text = CLIPTextConfig(**{**read.to_dict(), "projection_dim": 16})
    t5 = T5Config(vocab_size=len(tokenizer), d_model=40, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    attention = dict(num_layers=2, num_attention_heads=2, joint_attention_dim=40)
    for kind in ("sd3", "flux", "schnell"):
        torch.manual_seed(0)
        parts = dict(
            vae=diffusers.AutoencoderKL(
                block_out_channels=[8, 8], norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.7,
                shift_factor=0.1, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                use_quant_conv=False, use_post_quant_conv=False),
            tokenizer=tokenizer, tokenizer_2=tokenizer)
        if kind == "sd3":
            pipe = diffusers.StableDiffusion3Pipeline(
                **parts, tokenizer_3=tokenizer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                text_encoder=CLIPTextModelWithProjection(text), text_encoder_2=CLIPTextModelWithProjection(text),
                text_encoder_3=T5EncoderModel(t5), transformer=diffusers.SD3Transformer2DModel(
                    sample_size=8, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=8,
                    caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=12, **attention))
        else:
            pipe = diffusers.FluxPipeline(
                **parts, text_encoder=CLIPTextModel(text), text_encoder_2=T5EncoderModel(t5),
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=kind == "flux"),
                transformer=diffusers.FluxTransformer2DModel(
                    patch_size=1, in_channels=16, num_single_layers=1, attention_head_dim=16, pooled_projection_dim=16,
                    guidance_embeds=kind == "flux", axes_dims_rope=(4, 6, 6), **attention))
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):  # the zeros of a new network would hide an omitted term
                for weight in module.parameters():
                    if not weight.any():
                        torch.nn.init.normal_(weight, std=0.1)
        pipe.save_pretrained(root / kind)
        made[kind] = root / kind
    return made


# ---- the command line ---------------------------------------------------------------------------------

DRAWING = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><g id="face">
<circle cx="16" cy="16" r="14" fill="#fc3"/><path d="M8 20q8 8 16 0z" fill="#622"/></g></svg>"""


@pytest.fixture
def small_runs(loaded, monkeypatch):
    """run.main loads each tiny pipeline once, NeRFs are small, Gaussians, steps of editors and noises of masks few, and
    what a run reports holds few and small pictures."""
    import run  # not above: it imports diffusers, which takes seconds and which tests of the renderers do not need
    from files import sheets
    from image import masks, updates
    from image.masks import diffedit_map
    from nerf import NeRF
    from pipelines.settings import SETTINGS
    from scene import region
    from splat import Splats
    for name in ("Prior", "InstructPix2Pix"):
        monkeypatch.setattr(run, name, loaded(getattr(run, name)))
    monkeypatch.setattr(NeRF, "sizes", lambda device: dict(levels=3, table=2 ** 12, width=8))
    monkeypatch.setattr(region, "CELLS", 32)
    monkeypatch.setattr(region, "FINER", 32)
    monkeypatch.setattr(Splats, "sizes", lambda device: SPLAT_SIZES)
    monkeypatch.setitem(SETTINGS, "inversion_steps", SETTINGS["inversion_steps"]._replace(usual=10))
    monkeypatch.setattr(updates.DatasetUpdate, "STEPS", 5)

    def two_noises(*args, **more):
        return diffedit_map(*args[:4], 2, *args[5:], **more)
    monkeypatch.setattr(masks, "diffedit_map", two_noises)
    monkeypatch.setattr(updates, "drfs", functools.partial(updates.drfs, steps=10))
    for name, value in {"FRAMES": 2, "FRAME_SIZE": 24, "SIDES": 2, "SIDE_SIZE": 24, "SHEET_SIZE": 64,
                        "VIEWS": 2}.items():
        monkeypatch.setattr(sheets, name, value)


@pytest.fixture(scope="session")
def loaded(pipelines):
    """Prior and InstructPix2Pix load each tiny pipeline once; the shared models must not be changed."""
    kept, read_only = {}, {str(path) for path in pipelines.values()}

    def of(cls):
        def load(name, *args, **options):
            if str(name) not in read_only or any(options.get(key) for key in ("lora", "embedding")):
                return cls.from_pretrained(name, *args, **options)
            key = cls, str(name), args, tuple(sorted(options.items()))
            return kept.get(key) or kept.setdefault(key, cls.from_pretrained(name, *args, **options))
        return SimpleNamespace(from_pretrained=load)
    return of


@pytest.fixture
def command(pipelines, tmp_path, small_runs):
    """run.main on a drawing and the tiny pipeline, with small pictures; later flags win."""
    import run
    (tmp_path / "face.svg").write_text(DRAWING)
    Image.new("RGB", (20, 12), "tomato").save(tmp_path / "red.png")

    def call(*flags, out="out", mode="svg"):
        file = {"svg": "face.svg", "image": "red.png"}[mode]
        return run.main(["--mode", mode, f"--{mode}", str(tmp_path / file), "--source", "a face", "--target", "a cat",
                         "--model", str(pipelines["sd"]), "--steps", "6", "--every", "2", "--device", "cpu",
                         "--out", str(tmp_path / out), *(["--refine", "0"] if mode == "image" else []),
                         *map(str, flags)])
    return call


def outputs(folder):
    """The bytes of every result; the checkpoint, config.json and the page hold times, paths or the command."""
    skip = ("checkpoint.pt", "config.json", "index.html", "export")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in skip}
