"""Loading a pipeline of diffusers from a folder, the hub, or one file of weights.

    pipe, folder = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5", "cuda")

Anything else is refused in one line that says what it is; models on the hub before gigabytes are downloaded. No loaded
file can run code.
"""
import contextlib
import gc
import logging
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from files.messages import one_line
from files.reading import read_json, refuse_pointer

DROPPED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a pipeline that no prior needs
NEEDED = {"StableDiffusion3Pipeline": ["transformer", "vae", "scheduler"],  # parts; of other pipelines those of a UNet
          "FluxPipeline": ["transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer",
                           "tokenizer_2"]}
LONG = 5e8  # bytes of weights from which loading is announced
# What pipelines that cannot be priors do; the first row with a word that occurs in the name of the class applies.
OTHERS = {
    "takes a control picture as a further input": ("ControlNet", "Adapter", "Control"),
    "inpaints, with the picture and a mask as further inputs": ("Inpaint", "Fill"),
    "takes a depth map as a further input": ("Depth2Img",),
    "enlarges pictures": ("Upscale",),
    "makes videos": ("Video", "Wan", "LTX", "Mochi", "Allegro", "AnimateDiff", "Latte", "Cosmos", "SkyReels",
                     "ConsisID"),
    "makes sounds": ("Audio", "Music", "AceStep"),
    "generates from the embedding of a picture, in two stages": ("UnCLIP", "Kandinsky", "Wuerstchen", "StableCascade",
                                                                 "ImageVariation"),
    "works on pixels, without an autoencoder": ("IFPipeline", "IFImg2Img", "IFSuperResolution"),
    "predicts the end of the trajectory at once instead of the noise": ("LatentConsistency",),
    "edits a given picture": ("Kontext", "Edit", "Redux"),
}
CHANNELS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model", 9: "an inpainting model"}
WEIGHTS = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?"
                     r"\.(?:safetensors|bin)")
SCRIPT = "convert_original_stable_diffusion_to_diffusers.py"
CONVERT = (f"curl -O https://raw.githubusercontent.com/huggingface/diffusers/main/scripts/{SCRIPT} && python {SCRIPT} "
           "--checkpoint_path {file} {flag}--to_safetensors --dump_path {folder}")


class PriorError(ValueError):
    """A model that cannot be loaded or used: one line with its name and the reason."""

    def __init__(self, message):
        super().__init__(one_line(message, 800))


def load_pipeline(name, device="cpu", dtype=None, latents=1):
    """Load a pipeline; its modules stay on the CPU, its VAE in float32.

    Args:
        name: a folder with a model_index.json, "owner/model" on the hub, or a .safetensors file of Stable Diffusion.
        device: where it will run.
        dtype: number format; None: float32 on a CPU, elsewhere float16, for FLUX bfloat16, in which it was trained.
        latents: number of latents that its network must take, concatenated.
    Returns:
        The pipeline, without a safety checker, and the folder of its files; for a file, the folder of the same name.
    Raises:
        PriorError: a model that is missing, damaged or of another kind; no network connection.
    """
    place = Path(name)
    if "://" in str(name):
        known = re.match(r"https?://huggingface\.co/([^/]+/[^/?#]+)", str(name))
        raise PriorError(f"{name}: a web address is not a model: "
                         + (f"give {known[1]}" if known else "download it and give the file or folder"))
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
            if place.exists():
                check_parts(place, index)
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
        except Exception as e:  # the libraries have no common error; here all of them mean that the model is unusable
            raise PriorError(f"{name}: {where}: {one_line(e, 200)}") from e


def number_format(device, dtype=None, index=None):
    """The torch.dtype of networks: `dtype`, a torch.dtype or its name; by default it depends on device and pipeline."""
    if dtype is not None:
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.bfloat16 if (index or {}).get("_class_name") == "FluxPipeline" else torch.float16


def announce(name, index, device, dtype, variant):
    """Announce on stderr a model that takes a while to load."""
    files = f", its {variant} files" if variant else ""
    kind, number = index["_class_name"], str(dtype).removeprefix("torch.")
    print(f"loading {name}: {kind} as {number} on {device}{files}", file=sys.stderr)


@contextlib.contextmanager
def quiet():
    """Context in which diffusers, transformers and the hub print no messages, warnings and progress bars.

    What is wrong with a model is said in our own words, and deprecated settings of its sampler are not used here.
    Garbage collection is off: scanning the million objects that the imports create takes a quarter of the time.
    """
    hub, collected = logging.getLogger("huggingface_hub"), gc.isenabled()
    level = hub.level
    gc.disable()
    try:
        import diffusers
        import transformers
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity(logging.CRITICAL)
            library.utils.logging.disable_progress_bar()
        hub.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hub.setLevel(level)
        if collected:
            gc.enable()


def read_index(folder):
    """model_index.json of a folder; without one raises PriorError, which says what the folder holds instead."""
    if not (folder / "model_index.json").is_file():
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        files = [*folder.glob("*"), *folder.glob("*/config.json")]
        raise PriorError(instead([file.relative_to(folder).as_posix() for file in files], config, folder))
    return read_json(folder / "model_index.json")


def check_parts(folder, index):
    """Raise an error if a folder lacks a part of its pipeline, or holds Git LFS pointers."""
    missing = sorted(part for part, entry in index.items() if part not in DROPPED and isinstance(entry, list)
                     and len(entry) == 2 and all(entry) and not (folder / part).is_dir())
    if missing:
        raise PriorError(f"damaged, or no pipeline: its folder {', '.join(missing)} is missing")
    for file in folder.glob("*/*"):
        refuse_pointer(file, file.relative_to(folder))


def check_index(index):
    """Raise PriorError if model_index.json belongs to a pipeline that cannot be a prior."""
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise ValueError("model_index.json names no pipeline of diffusers")
    if what := purpose(kind):
        raise PriorError(f"a {kind} {what}: it is not a text-to-image model")
    parts = {part for part, entry in index.items() if isinstance(entry, list) and any(entry)}
    missing = [part for part in NEEDED.get(kind, ["unet", "vae", "scheduler", "tokenizer"]) if part not in parts]
    if missing:
        raise PriorError(f"a {kind} without {', '.join(missing)} is not supported: Stable Diffusion 1.x, 2.x, XL, 3.x "
                         "and FLUX.1 are")


def purpose(kind):
    """What a pipeline or network of this class does that cannot be a prior, in words; None for all others."""
    return next((what for what, words in OTHERS.items() if any(word in kind for word in words)), None)


def class_of(index):
    """The class of diffusers that model_index.json names; its from_pretrained knows which parts are optional."""
    import diffusers
    found = getattr(diffusers, index["_class_name"], None)
    if found is None:
        raise ValueError(f"the installed diffusers {diffusers.__version__} has no {index['_class_name']}")
    return found


def check_channels(channels, latent, latents=1):
    """Raise PriorError unless a UNet with so many input channels takes `latents` latents of `latent` channels."""
    if channels != latents * latent:
        other = CHANNELS.get(channels) if latent == 4 else None
        wanted = "InstructPix2Pix" if latents == 2 else "text-to-image"
        raise PriorError(f"the UNet takes {channels} channels, a latent has {latent}: "
                         + (f"{other}, and " if other else "") + f"no {wanted} model")


def instead(names, config, folder=None):
    """What a folder or repository without model_index.json holds, in words.

    names: its files, as relative paths; config: its config.json, {} if there is none; folder: None for a repository.
    """
    kind, weights = config.get("_class_name"), [name for name in names if name.endswith(".safetensors")]
    usual = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    alone = folder and len(weights) == 1 and "/" not in weights[0]
    if usual & {*names} or alone and is_lora(folder / weights[0]):
        return "a LoRA: give it as --lora, beside the --model that it was trained on"
    if any(name.startswith("learned_embeds") for name in names):
        return "a textual inversion: give its file as --embedding, beside the --model that it was trained on"
    if isinstance(kind, str):
        what = purpose(kind) or "is one part of a pipeline"
        return f"not a diffusers pipeline (no model_index.json in it): a {kind} {what}"
    parts = sorted({name.split("/")[0] for name in names if name.endswith("/config.json")})
    if parts:
        return f"not a diffusers pipeline (no model_index.json in it), but parts of one: {', '.join(parts)}"
    single = [name for name in names if name.endswith((".safetensors", ".ckpt", ".gguf"))]
    if single:
        return f"not a diffusers pipeline (no model_index.json in it): give one of its files as --model, as {single[0]}"
    return "not a diffusers pipeline (no model_index.json in it)"


def is_lora(file):
    """Whether a .safetensors file holds a LoRA, by the names of its tensors. Raises ValueError for an LFS pointer."""
    from safetensors import SafetensorError, safe_open
    refuse_pointer(file)
    try:
        with safe_open(file, "pt") as tensors:
            return any(re.search("lora|hada|lokr", key.lower()) for key in tensors.keys())
    except (SafetensorError, OSError):
        return False


def names_in(folder):
    """The files in the parts of a pipeline as paths relative to its folder."""
    return [file.relative_to(folder).as_posix() for file in folder.glob("*/*")]


def size_of(folder):
    """Bytes of the weights in a folder, counting one variant of them."""
    sizes = {}
    for file in folder.glob("*/*"):
        if WEIGHTS.fullmatch(file.name) and file.parent.name not in DROPPED:
            sizes.setdefault(file.parent.name, []).append(file.stat().st_size)
    return sum(max(own) for own in sizes.values())


def variant_of(part, names):
    """Which files hold the weights of a part: None for the plain ones; without those, "fp16" or another variant."""
    matches = [WEIGHTS.fullmatch(name.removeprefix(f"{part}/")) for name in names if name.startswith(f"{part}/")]
    found = {match[1] or match[2] for match in matches if match}
    return None if None in found or not found else "fp16" if "fp16" in found else min(found)


def variants(index, names):
    """The variant of the parts of a pipeline; None if all of them have plain files."""
    found = [variant_of(part, names) for part in index if part not in DROPPED]
    return next((variant for variant in found if variant), None)


def load_networks(folder, index, dtype):
    """The networks of the pipeline in a folder, {part: module}; raises ValueError if weights are missing.

    The pipeline itself would silently draw missing weights at random.
    """
    import diffusers
    import transformers
    networks, names = {}, names_in(folder)
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or part in DROPPED:
            continue
        library, kind = entry if len(entry) == 2 else (None, None)
        if isinstance(library, str) and (folder / part / f"{library}.py").exists():
            raise ValueError(f"its {part} is custom code, which is not run")
        known = {"diffusers": diffusers, "transformers": transformers}
        source = known.get(library if isinstance(library, str) else None)
        kind = getattr(source, kind, None) if isinstance(kind, str) else None
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            continue
        try:
            networks[part], info = kind.from_pretrained(
                folder, subfolder=part, variant=variant_of(part, names), output_loading_info=True,
                torch_dtype=torch.float32 if part == "vae" else dtype)
        except TypeError as e:  # of an old diffusers, which stumbles over None
            several = any(name.startswith(f"{part}/") and "-of-" in name for name in names)
            if several and find_spec("accelerate") is None:
                raise ValueError(f"its {part} comes in several files: pip install accelerate to read them") from e
            raise
        if library == "diffusers":  # which keeps the saved formats if the first weight has the wanted one
            networks[part].to(torch.float32 if part == "vae" else dtype)
        lacking = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
        if lacking:
            raise ValueError(f"{len(lacking)} weights of its {part} are missing or of another shape, e.g. {lacking[0]}")
    return networks


def listing(name):
    """The files of a model on the hub; None without a network connection. Raises OSError if there is no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import RepositoryNotFoundError
    try:
        return [file.rfilename for file in HfApi().model_info(name, timeout=10).siblings]
    except RepositoryNotFoundError:
        raise
    except Exception:  # the network libraries have no common error
        return None


def fetch_index(name, names, latents):
    """model_index.json of a model on the hub, fetched before anything else. names: from `listing`.

    Raises PriorError if it, or the config.json of the UNet, shows that the model cannot be a prior.
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
    """The path of a file of a model on the hub; without a network connection (names None) from the cache."""
    from huggingface_hub import hf_hub_download
    return hf_hub_download(name, file, local_files_only=names is None)


def fetch(name, names, index, device, dtype):
    """The folder of a model, downloaded or from the cache: one variant of its weights, no safety checker."""
    variant = variants(index, names or [])
    announce(name, index, device, dtype, variant)
    return Path(class_of(index).download(name, variant=variant, **dict.fromkeys(DROPPED)))


def from_file(file, dtype):
    """The pipeline in a .safetensors file with all weights of a Stable Diffusion 1.x, 2.x or XL.

    Shapes, tokenizer and schedule, which such a file lacks, come from the diffusers folder of the same name beside it
    (my.safetensors and my/), otherwise from the cache of diffusers, or a download.
    Raises PriorError, with the commands that convert the file, if they are not found.
    """
    import diffusers
    from safetensors import SafetensorError, safe_open
    config, safe = file.with_suffix(""), file.suffix == ".safetensors"
    convert = CONVERT.format(file=file, folder=config, flag="--from_safetensors " if safe else "")
    refuse_pointer(file)
    if file.suffix == ".gguf":
        raise PriorError("a .gguf file holds quantised weights of one network: give the diffusers folder or the "
                         ".safetensors file of the model instead")
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
        raise PriorError(f"not a whole Stable Diffusion 1.x, 2.x or XL: no {', '.join(missing)} in it")
    large = any(key.startswith("conditioner.") for key in keys)
    kind = diffusers.StableDiffusionXLPipeline if large else diffusers.StableDiffusionPipeline
    beside = {"config": str(config)} if (config / "model_index.json").is_file() else {}
    lacking = []
    try:
        with noting(lacking):
            pipe = kind.from_single_file(str(file), **beside, **dict.fromkeys(DROPPED))
    except Exception as e:  # the libraries have no common error
        if "meta tensor" in str(e):  # accelerate's term for a weight that was never loaded
            raise ValueError("some of its weights are missing") from e
        if beside:
            raise
        raise PriorError("its shapes and its tokenizer are missing: put a diffusers folder of the same model "
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
    """Context in which `lacking` collects the names of weights that load_state_dict(strict=False) does not find.

    from_single_file silently leaves them as they were drawn at random.
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
    """The parts of a related pipeline, such as InstructPix2Pix, as a StableDiffusionPipeline."""
    import diffusers
    parts = {part: getattr(pipe, part) for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)
