"""A model as people have it -> a pipeline of diffusers: a folder, a hub id, one file; a LoRA and an embedding over it.

    pipe, folder = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5", "cuda")
    add_lora(pipe, *find_lora("pytorch_lora_weights.safetensors"))
    add_embedding(pipe, *read_embedding("learned_embeds.safetensors"))

What cannot be used is refused in one line that says what it is, on the hub before gigabytes are downloaded. Nothing
that is loaded here can run code.
"""
import contextlib
import gc
import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from files.messages import one_line
from files.reading import read_json

DROPPED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a pipeline that no prior needs
NEEDED = {"StableDiffusion3Pipeline": ["transformer", "vae", "scheduler"],  # parts; of other pipelines those of a UNet
          "FluxPipeline": ["transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer",
                           "tokenizer_2"]}
LONG = 5e8  # bytes of weights from which on loading is announced
# What a pipeline is that cannot be a prior, by its class: the first pattern that is found in its name says it.
OTHERS = [
    ("ControlNet|Adapter|Control", "is also told a control picture"),
    ("Inpaint|Fill", "paints into a hole, and is also told the picture and the mask of the hole"),
    ("Depth2Img", "is also told a depth map"),
    ("Upscale", "enlarges pictures"),
    ("Video|Wan|LTX|CogVideo|Mochi|Allegro|AnimateDiff|Latte|Cosmos|SkyReels|ConsisID", "makes videos"),
    ("Audio|Music|AceStep", "makes sounds"),
    ("UnCLIP|Kandinsky|Wuerstchen|StableCascade|ImageVariation", "generates from a picture's embedding, in two stages"),
    ("^IF", "works on pixels, without an autoencoder"),
    ("LatentConsistency", "predicts the end of the way at once, not the noise"),
    ("Kontext|Edit|Redux", "edits a picture that it is told"),
]
CHANNELS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model", 9: "an inpainting model"}
WEIGHTS = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?"
                     r"\.(?:safetensors|bin)")
SCRIPT = "convert_original_stable_diffusion_to_diffusers.py"
CONVERT = (f"curl -O https://raw.githubusercontent.com/huggingface/diffusers/main/scripts/{SCRIPT} && python {SCRIPT} "
           "--checkpoint_path {file} {flag}--to_safetensors --dump_path {folder}")


class PriorError(ValueError):
    """A model that cannot be loaded or used; one line that names it and the reason."""

    def __init__(self, message):
        super().__init__(one_line(message, 800))


def load_pipeline(name, device="cpu", dtype=None, latents=1):
    """Load a pipeline; its modules stay on the CPU, its VAE in float32.

    Args:
        name: a folder with a model_index.json, "owner/model" on the hub, or one .safetensors file of Stable Diffusion.
        device: where it is going to run.
        dtype: number format; None: float32 on a CPU, elsewhere float16, of FLUX bfloat16, in which it was trained.
        latents: how many latents its network has to take at once.
    Returns:
        The pipeline, without a safety checker, and the folder of its files, of a file the folder of its name beside it.
    Raises:
        PriorError: nothing there, damaged, no network, or a model of another kind.
    """
    place = Path(name)
    if not place.exists() and (str(name).count("/") != 1 or str(name)[0] in "./~"):
        raise PriorError(f"{name}: no such model directory")
    where = "damaged, or no pipeline" if place.exists() else "no such directory, and none on the hub"
    with quiet():
        try:
            if place.is_file():
                return from_file(place, number_format(device, dtype)), place.with_suffix("")
            names = None if place.exists() else listing(name)
            index = read_index(place) if place.exists() else fetch_index(name, names, latents)
            check_index(index)
            dtype = number_format(device, dtype, index)
            if place.exists():
                folder = place
                if size_of(folder) > LONG:
                    announce(name, index, device, dtype, variants(index, names_in(folder)))
            else:
                where = "cannot be fetched"
                folder, where = fetch(name, names, index, device, dtype), "damaged, or no pipeline"
            networks = load_networks(folder, index, dtype)
            dropped = {part: None for part, entry in index.items() if part in DROPPED or entry == [None, None]}
            return class_of(index).from_pretrained(folder, **networks, **dropped), folder
        except PriorError as e:
            raise PriorError(f"{name}: {e}") from e
        except Exception as e:  # every library below has its own; all of them mean that there is no such model
            raise PriorError(f"{name}: {where}: {one_line(e, 200)}") from e


def number_format(device, dtype=None, index=None):
    """The torch.dtype of networks: `dtype`, a torch.dtype or its name, else what suits the device and the pipeline."""
    if dtype is not None:
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.bfloat16 if (index or {}).get("_class_name") == "FluxPipeline" else torch.float16


def announce(name, index, device, dtype, variant):
    """Say on stderr that something is loaded that takes a while."""
    files = f", its {variant} files" if variant else ""
    kind, number = index["_class_name"], str(dtype).removeprefix("torch.")
    print(f"loading {name}: {kind} as {number} on {device}{files}", file=sys.stderr)


@contextlib.contextmanager
def quiet():
    """Within it the libraries below keep their warnings and progress bars to themselves.

    No garbage is collected, as what they import, a million objects, stays: looking through it is a quarter of the time.
    """
    hub, collected = logging.getLogger("huggingface_hub"), gc.isenabled()
    level = hub.level
    gc.disable()
    try:
        import diffusers
        import transformers
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        hub.setLevel(logging.CRITICAL)
        yield
    finally:
        hub.setLevel(level)
        if collected:
            gc.enable()


def read_index(folder):
    """model_index.json of a folder; raises PriorError where there is none, and says what is there instead."""
    if not (folder / "model_index.json").is_file():
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        files = [*folder.glob("*"), *folder.glob("*/config.json")]
        raise PriorError(instead([file.relative_to(folder).as_posix() for file in files], config, folder))
    return read_json(folder / "model_index.json")


def check_index(index):
    """Raise PriorError where model_index.json is that of a pipeline which is no prior here."""
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise ValueError("model_index.json names no pipeline of diffusers")
    for pattern, what in OTHERS:
        if re.search(pattern, kind):
            raise PriorError(f"a {kind} {what}: no model of text to image")
    parts = {part for part, entry in index.items() if isinstance(entry, list) and any(entry)}
    missing = [part for part in NEEDED.get(kind, ["unet", "vae", "scheduler", "tokenizer"]) if part not in parts]
    if missing:
        raise PriorError(f"a {kind} is not known here, it has no {', '.join(missing)}: what is known are Stable "
                         "Diffusion 1.x, 2.x, XL, 3.x and FLUX.1")


def class_of(index):
    """The class of diffusers that model_index.json names. Its own from_pretrained knows which parts may be left out."""
    import diffusers
    found = getattr(diffusers, index["_class_name"], None)
    if found is None:
        raise ValueError(f"the installed diffusers {diffusers.__version__} has no {index['_class_name']}")
    return found


def check_channels(channels, latent, latents=1):
    """Raise PriorError where a UNet of so many input channels does not take `latents` latents of `latent` channels."""
    if channels != latents * latent:
        other = CHANNELS.get(channels) if latent == 4 else None
        wanted = "InstructPix2Pix" if latents == 2 else "text-to-image"
        raise PriorError(f"the UNet takes {channels} channels, a latent has {latent}: "
                         + (f"{other}, and " if other else "") + f"no {wanted} model")


def instead(names, config, folder=None):
    """What a place holds that has no model_index.json, in words.

    names: of its files, relative to it; config: its config.json, {} where there is none; folder: where its files can be
    looked into.
    """
    kind, weights = config.get("_class_name"), [name for name in names if name.endswith(".safetensors")]
    usual = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    alone = folder and len(weights) == 1 and "/" not in weights[0]
    if usual & {*names} or alone and is_lora(folder / weights[0]):
        return "a LoRA: give it as --lora, beside the --model that it was trained on"
    if any(name.startswith("learned_embeds") for name in names):
        return "a textual inversion: give its file as --embedding, beside the --model that it was trained on"
    if isinstance(kind, str):
        known = next((what for pattern, what in OTHERS if re.search(pattern, kind)), "is one part of a pipeline")
        return f"not a diffusers pipeline (no model_index.json in it): a {kind} {known}"
    parts = sorted({name.split("/")[0] for name in names if name.endswith("/config.json")})
    if parts:
        return f"not a diffusers pipeline (no model_index.json in it), but parts of one: {', '.join(parts)}"
    single = [name for name in names if name.endswith((".safetensors", ".ckpt"))]
    if single:
        return f"not a diffusers pipeline (no model_index.json in it): give one of its files as --model, as {single[0]}"
    return "not a diffusers pipeline (no model_index.json in it)"


def is_lora(file):
    """Whether a .safetensors file holds low-rank changes of weights, by the names of its tensors."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, "pt") as tensors:
            return any("lora" in key.lower() for key in tensors.keys())
    except (SafetensorError, OSError):
        return False


def names_in(folder):
    """The names of the files in the parts of a pipeline, relative to its folder."""
    return [file.relative_to(folder).as_posix() for file in folder.glob("*/*")]


def size_of(folder):
    """Bytes of the weights in a folder, of one variant of them."""
    sizes = {}
    for file in folder.glob("*/*"):
        if WEIGHTS.fullmatch(file.name) and file.parent.name not in DROPPED:
            sizes.setdefault(file.parent.name, []).append(file.stat().st_size)
    return sum(max(own) for own in sizes.values())


def variant_of(part, names):
    """Which files hold the weights of a part: None for the plain ones, where they are missing "fp16" or another."""
    matches = [WEIGHTS.fullmatch(name.removeprefix(f"{part}/")) for name in names if name.startswith(f"{part}/")]
    found = {match[1] or match[2] for match in matches if match}
    return None if None in found or not found else "fp16" if "fp16" in found else min(found)


def variants(index, names):
    """The variant that the parts of a pipeline come in, None where all of them have plain files."""
    found = [variant_of(part, names) for part in index if part not in DROPPED]
    return next((variant for variant in found if variant), None)


def load_networks(folder, index, dtype):
    """The networks of the pipeline in a folder, {part: module}; raises ValueError where weights are missing.

    The pipeline would load them just so, but draw at random what their files lack, without a word.
    """
    import diffusers
    import transformers
    networks, names = {}, names_in(folder)
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or part in DROPPED:
            continue
        library, kind = entry if len(entry) == 2 else (None, None)
        if isinstance(library, str) and (folder / part / f"{library}.py").exists():
            raise ValueError(f"its {part} is code of its own, which is not run")
        known = {"diffusers": diffusers, "transformers": transformers}
        source = known.get(library if isinstance(library, str) else None)
        kind = getattr(source, kind, None) if isinstance(kind, str) else None
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            continue
        try:
            networks[part], info = kind.from_pretrained(
                folder, subfolder=part, variant=variant_of(part, names), output_loading_info=True,
                torch_dtype=torch.float32 if part == "vae" else dtype)
        except TypeError as e:  # of an old diffusers, about None
            several = any(name.startswith(f"{part}/") and "-of-" in name for name in names)
            if several and find_spec("accelerate") is None:
                raise ValueError(f"its {part} comes in several files: pip install accelerate to read them") from e
            raise
        if library == "diffusers":  # which leaves them as they were saved where the first weight has that format
            networks[part].to(torch.float32 if part == "vae" else dtype)
        lacking = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
        if lacking:
            raise ValueError(f"{len(lacking)} weights of its {part} are missing or of another shape, e.g. {lacking[0]}")
    return networks


def listing(name):
    """The names of the files of a model on the hub; None without a network. Raises OSError where there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import RepositoryNotFoundError
    try:
        return [file.rfilename for file in HfApi().model_info(name, timeout=10).siblings]
    except RepositoryNotFoundError:
        raise
    except Exception:  # of the network libraries, each with its own
        return None


def fetch_index(name, names, latents):
    """model_index.json of a model on the hub, fetched alone. names: from `listing`.

    Raises PriorError where the model is no prior by it, or by the config.json of its UNet.
    """
    from huggingface_hub.utils import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
    try:
        index = read_json(fetch_file(name, "model_index.json", names))
        check_index(index)
        if latents == 1 and "unet" in index:
            unet = read_json(fetch_file(name, "unet/config.json", names))
            check_channels(unet.get("in_channels", 4), unet.get("out_channels", 4))
        return index
    except GatedRepoError as e:
        raise PriorError(f"its licence has to be accepted on https://huggingface.co/{name} first; then log in with "
                         "hf auth login") from e
    except EntryNotFoundError as e:
        if isinstance(e, LocalEntryNotFoundError):
            raise
        names = names or []
        config = read_json(fetch_file(name, "config.json", names)) if "config.json" in names else {}
        raise PriorError(instead(names, config)) from e


def fetch_file(name, file, names):
    """The path of one file of a model on the hub; without a network (names None) out of the cache."""
    from huggingface_hub import hf_hub_download
    return hf_hub_download(name, file, local_files_only=names is None)


def fetch(name, names, index, device, dtype):
    """Download what is needed of a model, or find it in the cache: the folder. No safety checker; plain weights, or the
    variant that alone is there."""
    variant = variants(index, names or [])
    announce(name, index, device, dtype, variant)
    return Path(class_of(index).download(name, variant=variant, **dict.fromkeys(DROPPED)))


def from_file(file, dtype):
    """The pipeline in one .safetensors file with the weights of a whole Stable Diffusion 1.x, 2.x or XL.

    What such a file does not hold, the shapes, the tokenizer and the schedule, comes from the diffusers folder beside
    it that has its name (my.safetensors and my/), else from what diffusers keeps in its cache, or downloads.
    Raises PriorError, with the commands that convert the file, where neither is at hand.
    """
    import diffusers
    from safetensors import SafetensorError, safe_open
    config, safe = file.with_suffix(""), file.suffix == ".safetensors"
    convert = CONVERT.format(file=file, folder=config, flag="--from_safetensors " if safe else "")
    if not safe:
        raise PriorError(f"a pickle can run code, so none is loaded; convert it where you trust it: {convert}")
    try:
        with safe_open(file, "pt") as tensors:
            keys = list(tensors.keys())
    except (SafetensorError, OSError) as e:
        raise PriorError(f"damaged, or no .safetensors file: {one_line(e, 200)}") from e
    if is_lora(file):
        raise PriorError("a LoRA: give it as --lora, beside the --model that it was trained on")
    parts = {"UNet": "model.diffusion_model.input_blocks.", "VAE": "first_stage_model.", "text encoder": "cond"}
    missing = [part for part, prefix in parts.items() if not any(key.startswith(prefix) for key in keys)]
    if missing:
        raise PriorError(f"no whole Stable Diffusion 1.x, 2.x or XL: no {', '.join(missing)} in it")
    large = any(key.startswith("conditioner.") for key in keys)
    kind = diffusers.StableDiffusionXLPipeline if large else diffusers.StableDiffusionPipeline
    beside = {"config": str(config)} if (config / "model_index.json").is_file() else {}
    lacking = []
    try:
        with noting(lacking):
            pipe = kind.from_single_file(str(file), **beside, **dict.fromkeys(DROPPED))
    except Exception as e:  # as for folders: every library below has its own
        if "meta tensor" in str(e):  # accelerate's word for a weight that nothing was loaded into
            raise ValueError("some of its weights are missing") from e
        if beside:
            raise
        raise PriorError("its shapes and its tokenizer are not at hand: lay a diffusers folder of the same model "
                         f"beside it as {config}, or convert it: {convert}") from e
    modules = {part: module for part, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    lacking += [key for module in modules.values() for key, value in module.named_parameters() if value.is_meta]
    if lacking:
        raise ValueError(f"{len(lacking)} of its weights are missing, e.g. {lacking[0]}")
    for part, module in modules.items():
        module.to(torch.float32 if part == "vae" else dtype)
    return pipe


@contextlib.contextmanager
def noting(lacking):
    """Within it the list `lacking` gets the names of weights that load_state_dict(strict=False) does not find.

    from_single_file leaves them as they were drawn at random, and says nothing.
    """
    plain = torch.nn.Module.load_state_dict

    def noted(self, *args, **options):
        result = plain(self, *args, **options)
        lacking.extend(key for key in result.missing_keys if not key.endswith("position_ids"))
        return result
    torch.nn.Module.load_state_dict = noted
    try:
        yield
    finally:
        torch.nn.Module.load_state_dict = plain


def as_stable_diffusion(pipe):
    """The parts of a pipeline of its family, such as an InstructPix2Pix's, as a StableDiffusionPipeline."""
    import diffusers
    parts = {part: getattr(pipe, part) for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)


def find_lora(name):
    """Where a LoRA is: (place, what load_lora_weights takes beside it).

    name: a .safetensors file, a folder with one, or a hub id. Raises PriorError where it cannot be read.
    """
    place = Path(name)
    try:
        import peft  # noqa: F401
    except ImportError as e:
        raise PriorError(f"{name}: to read a LoRA diffusers needs peft: pip install peft") from e
    if place.is_dir():
        files, usual = sorted(place.glob("*.safetensors")), place / "pytorch_lora_weights.safetensors"
        if not usual.is_file() and len(files) != 1:
            raise PriorError(f"{name}: {len(files)} .safetensors files in it, none called {usual.name}: name the one")
        place = usual if usual.is_file() else files[0]
    elif not place.exists():
        return str(name), {}
    if not is_lora(place):
        raise PriorError(f"{place}: no LoRA in it, or no .safetensors file")
    return str(place.parent), {"weight_name": place.name}


def add_lora(pipe, place, options, scale=1.0):
    """Fuse a LoRA (Hu et al., arXiv 2106.09685) into the weights of a pipeline: W becomes W + scale B A.

    place, options: from find_lora. Raises PriorError where it is none of this model's.
    """
    try:
        with quiet():
            pipe.load_lora_weights(place, use_safetensors=True, **options)
            if not any(pipe.get_list_adapters().values()):  # diffusers leaves names out that it does not know
                raise ValueError("none of its weights belongs to this model")
            pipe.fuse_lora(lora_scale=scale)
            pipe.unload_lora_weights()
    except Exception as e:  # every library below has its own
        raise PriorError(f"{Path(place, *options.values())}: no LoRA for this model: {one_line(e, 200)}") from e


def read_embedding(file):
    """The word of a textual inversion (Gal et al., arXiv 2208.01618) and its vectors, {text encoder: [n,D]}.

    file: .safetensors with one tensor named by the word, or, as other programs write them, emb_params or clip_l and
    clip_g, whose word is the file's name. Raises PriorError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    file, known = Path(file), {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "emb_params": "text_encoder"}
    try:
        state = load_file(file) if file.suffix == ".safetensors" else {}
    except (SafetensorError, OSError) as e:
        raise PriorError(f"{file}: no textual inversion: {one_line(e, 200)}") from e
    own = state.keys() <= known.keys()
    if not state or len(state) > 1 and not own:
        raise PriorError(f"{file}: no textual inversion: "
                         + (f"{len(state)} tensors in it" if state else "nothing in it, or no .safetensors file"))
    vectors = {known.get(key, "text_encoder"): value for key, value in state.items()}
    return file.stem if own else next(iter(state)), vectors


def add_embedding(pipe, word, vectors):
    """Teach a pipeline the word of a textual inversion, from read_embedding. Raises PriorError."""
    try:
        with quiet():
            for encoder, value in vectors.items():
                pipe.load_textual_inversion({word: value}, token=word, text_encoder=getattr(pipe, encoder),
                                            tokenizer=getattr(pipe, encoder.replace("text_encoder", "tokenizer")))
    except Exception as e:  # every library below has its own
        raise PriorError(f"the textual inversion {word} is not for this model: {one_line(e, 200)}") from e
