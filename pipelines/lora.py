"""LoRAs and textual inversions: small files of weights that are put into the modules of a pipeline.

    add_lora(pipe, find_lora("pytorch_lora_weights.safetensors"), 0.8)
    add_embedding(pipe, *read_embedding("learned_embeds.safetensors"))

A LoRA (Hu et al., arXiv 2106.09685) turns a weight W into W + alpha / rank B A; a DoRA (Liu et al., arXiv 2402.09353)
also rescales the rows or columns of the sum. Files of diffusers, peft and kohya name the same module differently.
"""
import json
import re
import warnings
from pathlib import Path

import torch

from files.reading import read_json, refuse_pointer
from pipelines.loading import PriorError, fetch_file, is_lora, listing, one_line, quiet

USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # names of diffusers and of peft
# a module and which of its matrices: "...to_q.lora_A.weight", "...to_q.lora.up.weight", "..._to_q.lora_down.weight"
MATRIX = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
EXTRA = re.compile(r"(.+?)(?:\.lora)?\.(alpha|dora_scale|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
ROLES = {"down": "down", "A": "down", "up": "up", "B": "up", "lora_magnitude_vector": "dora_scale"}
# how the name of a module begins -> the part of the pipeline; without any of them it may belong to all parts
PREFIXES = {"unet.": "unet", "transformer.": "transformer", "text_encoder.": "text_encoder",
            "text_encoder_2.": "text_encoder_2", "text_encoder_3.": "text_encoder_3", "lora_unet_": "unet",
            "lora_transformer_": "transformer", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
            "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"}


def find_lora(name):
    """The path of a LoRA: a .safetensors file, a folder with one, or a hub id. Raises PriorError."""
    place = Path(name)
    if place.is_dir():
        files = sorted(file.name for file in place.glob("*.safetensors"))
    elif place.exists():
        files = []
    else:
        try:
            names = listing(name)
            files = sorted(file for file in names or USUAL[:1] if file.endswith(".safetensors") and "/" not in file)
        except Exception as e:  # the network libraries have no common error
            raise PriorError(f"{name}: no such LoRA, and none on the hub: {one_line(e, 200)}") from e
    if not place.is_file():
        chosen = next((file for file in USUAL if file in files), files[0] if len(files) == 1 else None)
        if chosen is None:
            raise PriorError(f"{name}: {len(files)} .safetensors files in it, none called {USUAL[0]}: name the one")
        try:
            place = place / chosen if place.is_dir() else Path(fetch_file(str(name), chosen, names))
        except Exception as e:
            raise PriorError(f"{name}: its {chosen} cannot be fetched: {one_line(e, 200)}") from e
    try:
        if not is_lora(place):
            raise ValueError(f"{place}: no LoRA in it, or no .safetensors file")
    except ValueError as e:
        raise PriorError(e) from e
    return place


def read_lora(file):
    """{module: {"down": [r,in,...], "up": [out,r,...], "scale": number, "dora_scale": ...}} of a .safetensors file.

    Raises ValueError for anything else than LoRA and DoRA.
    """
    from safetensors import safe_open
    modules, foreign = {}, set()
    with safe_open(file, "pt") as tensors:
        metadata = json.loads((tensors.metadata() or {}).get("lora_adapter_metadata", "{}"))
        for key in tensors.keys():
            found = MATRIX.fullmatch(key) or EXTRA.fullmatch(key)
            if found:
                modules.setdefault(found[1], {})[ROLES.get(found[2], found[2])] = tensors.get_tensor(key)
            else:
                foreign.add(re.sub(r"(\.weight)?$", "", key).rsplit(".", 1)[-1])
    if foreign:
        raise ValueError(f"it holds {', '.join(sorted(foreign)[:4])}, which is neither LoRA nor DoRA")
    beside = file.with_name("adapter_config.json")
    config = read_json(beside) if beside.is_file() else {}
    for name, module in modules.items():
        if not {"down", "up"} <= module.keys() or module["down"].ndim < 2:
            raise ValueError(f"a matrix of {name} is missing")
        part, _, inner = name.partition(".")
        own = {key.removeprefix(f"{part}."): value for key, value in metadata.items() if key.startswith(f"{part}.")}
        module["scale"] = scale_of(inner if own else name, module, own or config)
    return modules


def scale_of(name, module, config):
    """alpha / rank of a module, of which only its own alpha and the config of peft know; 1 where neither says it."""
    rank = module["down"].shape[0]
    if "alpha" in module:
        return module["alpha"].item() / rank
    patterns = config.get("alpha_pattern") or {}
    own = [value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?{pattern}", name)]
    alpha = own[0] if own else config.get("lora_alpha", rank)
    return alpha / (rank ** 0.5 if config.get("use_rslora") else rank)


def modules_of(pipe):
    """{part: {name with underscores: module}} of all modules of the networks and text encoders that have a weight."""
    parts = dict.fromkeys(PREFIXES.values())
    return {part: {plain(name): module for name, module in getattr(pipe, part).named_modules()
                   if isinstance(getattr(module, "weight", None), torch.Tensor)}
            for part in parts if isinstance(getattr(pipe, part, None), torch.nn.Module)}


def plain(name):
    """The name of a module as kohya writes it; "text_model", which only some versions of transformers have, goes."""
    return re.sub(r"^text_model_|_processor(?=_)", "", name.replace("base_model.model.", "").replace(".", "_"))


def module_at(parts, name):
    """The module of a pipeline that a LoRA names; None where there is none. parts: from modules_of."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    inner = plain(name[len(prefix):])
    for part in [PREFIXES[prefix]] if prefix else parts:
        for known in (inner, f"{inner}_0"):  # "to_out" before diffusers 0.15
            if known in parts.get(part, {}):
                return parts[part][known]
    return None


def renamed(pipe, modules):
    """Modules of read_lora under the names of diffusers, which converts those of the original networks; unknown ones
    are left out, and joined matrices are split."""
    state = {}
    for name, module in modules.items():
        state[f"{name}.lora_down.weight"] = module["down"]
        state[f"{name}.lora_up.weight"] = module["up"] * module["scale"]
        state[f"{name}.alpha"] = torch.tensor(float(module["down"].shape[0]))
    options = {"unet_config": pipe.unet.config} if getattr(pipe, "unet", None) is not None else {}
    try:
        converted = type(pipe).lora_state_dict(state, **options)  # for UNets with the alphas, which are 1 by now
        converted = converted[0] if isinstance(converted, tuple) else converted
    except Exception:  # it has no error for names that it does not know
        return {}
    result, origins = {}, {id(module["down"]): module for module in modules.values()}
    for key, value in converted.items():
        if found := MATRIX.fullmatch(key):
            result.setdefault(found[1], {"scale": 1})[ROLES[found[2]]] = value
    for module in result.values():
        module |= {key: value for key, value in origins.get(id(module.get("down")), {}).items() if key == "dora_scale"}
    return {name: module for name, module in result.items() if {"down", "up"} <= module.keys()}


def fused(weight, module, strength):
    """A weight [out,in,...] with a module of read_lora fused in, float32. Raises ValueError if the shapes differ."""
    down, up = module["down"].float(), module["up"].float()
    old = weight.detach().float().cpu()
    if up.shape[0] != old.shape[0] or up.flatten(1).shape[1] != down.shape[0] or down[0].numel() != old[0].numel():
        raise ValueError(f"a matrix for a weight [{up.shape[0]},{down[0].numel()}], this model's has {[*old.shape]}")
    change = module["scale"] * (up.flatten(1) @ down.flatten(1)).view_as(old)
    if "dora_scale" not in module:
        return old + strength * change
    new, wanted = old + change, module["dora_scale"].float()
    rows = wanted.shape[0] == new.shape[0]  # otherwise there is one for each column
    norm = (new if rows else new.transpose(0, 1)).flatten(1).norm(dim=1)
    ratio = (wanted.flatten() / norm).view(-1, *[1] * (new.ndim - 1))
    return old + strength * (new * (ratio if rows else ratio.transpose(0, 1)) - old)


@torch.no_grad()
def add_lora(pipe, file, strength=1.0):
    """Fuse a LoRA from find_lora into the weights of a pipeline.

    Warns of modules that the pipeline does not have. Raises PriorError if it has none of them.
    """
    try:
        modules, parts = read_lora(file), modules_of(pipe)
        unknown = {name: module for name, module in modules.items() if module_at(parts, name) is None}
        lost = len(unknown)
        if unknown:
            with quiet():
                known = {name: module for name, module in renamed(pipe, unknown).items()
                         if module_at(parts, name) is not None}
            if any("dora_scale" in module for module in unknown.values()) and not all(
                    "dora_scale" in module for module in known.values()):
                raise ValueError("a DoRA of the original network's joined matrices cannot be applied")
            lost -= min(lost, len(known))
            modules = {name: module for name, module in modules.items() if name not in unknown} | known
        if not modules:
            raise ValueError(f"none of its {lost} modules belongs to this model, e.g. {next(iter(unknown))}")
        for name, module in modules.items():
            weight = module_at(parts, name).weight
            weight.copy_(fused(weight, module, strength))
    except Exception as e:  # the libraries have no common error
        raise PriorError(f"{file}: no LoRA for this model: {one_line(e, 200)}") from e
    if lost:
        warnings.warn(f"{file}: {lost} of its {len(modules) + lost} modules are no part of this model, e.g. "
                      f"{next(iter(unknown))}", stacklevel=2)


def read_embedding(file):
    """The word of a textual inversion (Gal et al., arXiv 2208.01618) and its vectors, {text encoder: [n,D]}.

    file: .safetensors with one tensor named after the word, or, as other programs write them, emb_params or clip_l and
    clip_g, whose word is the name of the file. Raises PriorError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    file, known = Path(file), {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "emb_params": "text_encoder"}
    try:
        refuse_pointer(file)
    except ValueError as e:
        raise PriorError(e) from e
    if file.suffix in (".pt", ".bin", ".pth", ".ckpt"):
        raise PriorError(f"{file}: a pickle can run code, so none is loaded; save its tensor as .safetensors where you "
                         "trust it")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else {}
    except (SafetensorError, OSError, ValueError) as e:
        raise PriorError(f"{file}: no textual inversion: {one_line(e, 200)}") from e
    own = state.keys() <= known.keys()
    if not state or len(state) > 1 and not own:
        raise PriorError(f"{file}: no textual inversion: "
                         + (f"{len(state)} tensors in it" if state else "nothing in it, or no .safetensors file"))
    vectors = {known.get(key, "text_encoder"): value for key, value in state.items()}
    return file.stem if own else next(iter(state)), vectors


def add_embedding(pipe, word, vectors):
    """Add the word of a textual inversion, from read_embedding, to a pipeline. Raises PriorError."""
    try:
        with quiet():
            for encoder, value in vectors.items():
                pipe.load_textual_inversion({word: value}, token=word, text_encoder=getattr(pipe, encoder),
                                            tokenizer=getattr(pipe, encoder.replace("text_encoder", "tokenizer")))
    except Exception as e:  # the libraries have no common error
        raise PriorError(f"the textual inversion {word} is not for this model: {one_line(e, 200)}") from e
