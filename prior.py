"""The diffusion prior: one class between the losses and diffusers, the only file that knows diffusers.

    prior = Prior.from_pretrained("models/emoji")  # or a Stable Diffusion 1.x, 2.x, XL directory or hub id
    x0 = prior.encode(picture)                     # [B,3,H,W] in [0,1] -> [B,C,h,w], differentiable
    y = prior.embed("a red apple")                 # computed once, kept
    eps = prior.eps(x_t, t, y)                     # guidance included

    editor = InstructPix2Pix.from_pretrained("models/emoji")  # or an InstructPix2Pix directory or hub id
    eps = editor.of(picture).eps(x_t, t, editor.embed("make it a green apple"))

Guidance, number format, prediction type, latent scaling and shift end here; pds.py sees `abar` and `eps` only.
"""
import copy
import difflib
import logging
import re
import warnings
from pathlib import Path

import torch

from files import is_number, one_line, read_json

# The paper's guidance for PDS and DreamFusion's for SDS; DDS as in its own paper. A model may bring its own in
# a file pds.json beside its model_index.json.
DEFAULTS = {"guidance": {"pds": 100.0, "dds": 7.5, "sds": 100.0}}


LETTERS = 200  # of a prompt that are compared with the captions: the time grows with their square


class PriorError(ValueError):
    """A model that cannot be loaded or used; one line that names it and the reason."""

    def __init__(self, message):
        super().__init__(one_line(message))


class Prior:
    """A frozen text-to-image latent diffusion model.

    Attributes:
        abar: [T] float64 on the CPU, cumulative products of alpha.
        size: side in pixels of the square pictures that the model was trained on.
        guidance: scale s in uncond + s (cond - uncond); 1 is the plain conditional prediction.
        defaults: settings that suit this model: {"guidance": {"pds": ..., "dds": ..., "sds": ...}, ...}.
        captions: all that a small model was taught to draw, a list of strings; empty where nothing says so.
    """
    KIND, LATENTS = "text-to-image", 1  # latents that the UNet takes at once

    def __init__(self, pipe, guidance=7.5, defaults=DEFAULTS):
        """pipe: a StableDiffusionPipeline or StableDiffusionXLPipeline; raises PriorError for any other shape."""
        missing = [k for k in ("unet", "vae", "scheduler", "tokenizer") if getattr(pipe, k, None) is None]
        if missing or not hasattr(pipe, "encode_prompt"):
            raise PriorError(f"{type(pipe).__name__} is not shaped like Stable Diffusion: no {', '.join(missing)}")
        self.pipe, self.unet, self.vae = pipe, pipe.unet.eval(), pipe.vae.eval()
        self.guidance, self.defaults, self.captions, self._embedded = guidance, defaults, [], {}
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False)
        self.vae.to(torch.float32)  # SDXL's autoencoder overflows in fp16, and gradients run through this one
        channels, latent = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels != self.LATENTS * latent:
            raise PriorError(f"the UNet takes {channels} channels, a latent has {latent}: no {self.KIND} model")
        if not hasattr(pipe.scheduler, "betas"):
            raise PriorError(f"{type(pipe.scheduler).__name__} has no noise schedule of the DDPM kind")
        self.prediction_type = pipe.scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise PriorError(f"prediction type {self.prediction_type!r} is neither epsilon nor v_prediction")
        # In float64 from the betas: the one-step beta is a difference of neighbours in abar.
        self.abar = (1 - pipe.scheduler.betas.double().cpu()).cumprod(0)
        if not (torch.isfinite(self.abar).all() and (self.abar.diff() <= 0).all() and 0 <= self.abar[-1] < self.abar[0] <= 1):
            raise PriorError("its noise schedule does not fall from 1 to 0")
        for part, module in pipe.components.items():
            if isinstance(module, torch.nn.Module) and part != "safety_checker":
                wrong = [key for key, value in module.named_parameters() if not _finite(value)]
                if wrong:
                    raise PriorError(f"{len(wrong)} weights of its {part} are not finite, e.g. {wrong[0]}")
        self.scaling = self.vae.config.scaling_factor
        self.shift = self.vae.config.get("shift_factor") or 0.0
        if not is_number(self.unet.config.sample_size, 1, 4096):
            raise PriorError(f"the sample_size of its UNet, {self.unet.config.sample_size}, is no number of pixels")
        self.size = int(self.unet.config.sample_size * pipe.vae_scale_factor)
        self.device = self.unet.device

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=None, guidance=7.5):
        """Load a diffusers directory or hub id.

        Args:
            name: a directory with a model_index.json, or "owner/model" on the hub.
            device: "cpu", "cuda", "mps", ...
            dtype: number format of UNet and text encoder; float32 on the CPU, float16 elsewhere by default.
        Raises:
            PriorError: nothing there, no pipeline, no network, or a model of another kind; one line.
        """
        import diffusers
        import transformers
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        folder = Path(name)
        if folder.exists() and not (folder / "model_index.json").is_file():
            raise PriorError(f"{name}: not a diffusers pipeline (no model_index.json in it)")
        if not folder.exists() and (str(name).count("/") != 1 or str(name)[0] in "./~"):
            raise PriorError(f"{name}: no such model directory")
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
        quiet = logging.getLogger("huggingface_hub")
        level, _ = quiet.level, quiet.setLevel(logging.CRITICAL)
        try:
            place = folder if folder.exists() else Path(diffusers.DiffusionPipeline.download(name))
            pipe = diffusers.DiffusionPipeline.from_pretrained(place, **_networks(place))
        except Exception as e:  # every library below has its own; all of them mean that there is no such model
            where = "damaged, or no pipeline" if folder.exists() else "no such directory, and none on the hub"
            raise PriorError(f"{name}: {where}: {one_line(e, 200)}") from e
        finally:
            quiet.setLevel(level)
        defaults = DEFAULTS | (read_defaults(folder / "pds.json") if (folder / "pds.json").is_file() else {})
        try:
            pipe = cls._complete(pipe, folder)
            for part, module in pipe.components.items():
                if isinstance(module, torch.nn.Module) and part != "vae":
                    module.to(dtype)
            prior = cls(pipe.to(device), guidance, defaults)
            given, taken = prior.embed("")[0].shape[-1], prior.unet.config.cross_attention_dim
            if isinstance(taken, int) and given != taken:
                raise PriorError(f"its texts have {given} features, its UNet takes {taken}")
            prior._try()
        except PriorError as e:
            raise PriorError(f"{name}: {e}") from e
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as e:
            raise PriorError(f"{name}: damaged, or of a kind that is not known: {one_line(e, 200)}") from e
        if (folder / "captions.txt").is_file():
            try:
                prior.captions = read_captions((folder / "captions.txt").read_text(encoding="utf-8"))
            except (OSError, ValueError) as e:
                raise PriorError(f"{folder / 'captions.txt'}: no readable list of captions: {one_line(e, 100)}") from e
        return prior

    @staticmethod
    def _complete(pipe, folder):
        """The pipeline as this class needs it; raises PriorError."""
        if "InstructPix2Pix" in type(pipe).__name__:
            raise PriorError("an InstructPix2Pix model edits pictures, it is no prior of text to image")
        return pipe

    @torch.no_grad()
    def _try(self):
        """Raise an error where the networks do not fit each other: better now than after the fit of a scene."""
        side = min(self.size, 16 * self.pipe.vae_scale_factor)
        tried, picture = copy.copy(self), torch.full((1, 3, side, side), 0.5)
        tried.image = x0 = self.encode(picture)
        eps = tried.eps(x0, torch.tensor([len(self.abar) // 2]), self.embed(""))
        if eps.shape != x0.shape or self.decode(x0).shape != picture.shape or not (_finite(eps) and _finite(x0)):
            raise PriorError("what its networks give has another shape, or is not finite")

    def encode(self, picture):
        """[B,3,H,W] in [0,1] -> scaled latent [B,C,h,w] float32: the posterior's MEAN, differentiable."""
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise ValueError(f"picture must be [B,3,H,W], got {[*picture.shape]}")
        out = self.vae.encode(picture.to(self.device, torch.float32) * 2 - 1)
        # AutoencoderTiny has no distribution: its output is the latent
        z = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        return (z - self.shift) * self.scaling

    def decode(self, x0):
        """Scaled latent [B,C,h,w] -> picture [B,3,H,W] in [0,1], float32, differentiable inside that range."""
        z = x0.to(self.device, torch.float32) / self.scaling + self.shift
        return (self.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def embed(self, prompt):
        """Prompt -> what `eps` takes as y: (embeddings [1,L,D],), for SDXL (embeddings [1,L,D], pooled [1,P]).

        Warns, once a prompt, where the model brings a list of its captions and the prompt is none of them.
        """
        if prompt not in self._embedded:
            close = self.nearest(prompt)
            shown = one_line(prompt, 80)
            if close:
                warnings.warn(f"the model was never taught {shown!r}; nearest: {', '.join(close)}", stacklevel=2)
            tokens, most = len(self.pipe.tokenizer(prompt).input_ids), self.pipe.tokenizer.model_max_length
            if len(prompt) > 300 and tokens > most:
                warnings.warn(f"the model reads no more than {most} of the {tokens} tokens of {shown!r}", stacklevel=2)
            out = self.pipe.encode_prompt(prompt=prompt, device=self.device, num_images_per_prompt=1,
                                          do_classifier_free_guidance=False)
            # Stable Diffusion returns (cond, uncond); SDXL (cond, uncond, pooled cond, pooled uncond)
            self._embedded[prompt] = (out[0],) if len(out) == 2 else (out[0], out[2])
        return self._embedded[prompt]

    def nearest(self, prompt, count=4):
        """The captions that are most like a prompt; none where it is one of them, or where there is no list."""
        words = plain(prompt[:LETTERS])
        if not prompt.strip() or words in self.captions and len(prompt) <= LETTERS:
            return []

        def likeness(caption):
            own, other = set(words.split()), set(caption.split())
            return len(own & other) / max(len(own | other), 1) + difflib.SequenceMatcher(None, words, caption).ratio()
        return sorted(self.captions, key=likeness, reverse=True)[:count]

    @torch.no_grad()
    def unconditional(self):
        """The y of the empty prompt; zeros where an SDXL model was trained with zeros for it."""
        y = self.embed("")
        zeros = len(y) == 2 and self.pipe.config.get("force_zeros_for_empty_prompt", False)
        return tuple(torch.zeros_like(part) for part in y) if zeros else y

    @torch.no_grad()
    def eps(self, x_t, t, y):
        """Noise prediction with classifier-free guidance (arXiv 2207.12598): uncond + s (cond - uncond).

        Args:
            x_t: [B,C,h,w] noisy latent; t: [B] timesteps; y: from `embed`, each part [1,...] or [B,...].
        Returns:
            [B,C,h,w] float32, whatever the network's number format.
        """
        if self.guidance == 1:
            return self._predict(x_t, t, [y])[0]
        return guided(self._predict(x_t, t, [self.unconditional(), y]), self.guidance)

    def _predict(self, x_t, t, prompts, images=()):
        """The plain noise prediction for each prompt (beside its image), in one network call."""
        batch, n = len(x_t), len(prompts)
        y = [torch.cat([part.expand(batch, *part.shape[1:]) for part in parts]) for parts in zip(*prompts)]
        x_t, t = x_t.repeat(n, 1, 1, 1), t.repeat(n)
        beside = [torch.cat([image.expand(batch, *image.shape[1:]).to(x_t) for image in images])] if images else []
        out = self._network(torch.cat([x_t, *beside], 1), t, *y)
        if self.prediction_type == "v_prediction":  # v = sqrt(abar) eps - sqrt(1 - abar) x0
            abar = self.abar[t.cpu()].to(out).reshape(-1, 1, 1, 1)
            out = abar.sqrt() * out + (1 - abar).sqrt() * x_t.float()
        return out.chunk(n)

    def _network(self, x_t, t, embeddings, pooled=None):
        dtype, added = self.unet.dtype, None
        if pooled is not None:  # SDXL is also told the picture's size and crop: the full picture, uncropped
            h, w = (side * self.pipe.vae_scale_factor for side in x_t.shape[-2:])
            ids = torch.tensor([[h, w, 0, 0, h, w]], device=self.device, dtype=dtype).expand(len(x_t), -1)
            added = {"text_embeds": pooled.to(dtype), "time_ids": ids}
        x_t = x_t.to(self.device, dtype)
        return self.unet(x_t, t.to(self.device), embeddings.to(dtype), added_cond_kwargs=added).sample.float()


class InstructPix2Pix(Prior):
    """A model that edits a picture as an instruction says (Brooks et al., arXiv 2211.09800): `of` names the picture.

    Attributes, beside those of Prior:
        guidance, image_guidance: s_T and s_I of eq. 3; the released code's 7.5 and 1.5.
        image: [1,C,h,w] or [B,C,h,w] latent of the picture that is edited, NOT scaled, as the models were trained.
    """
    KIND, LATENTS = "InstructPix2Pix", 2
    image_guidance, image = 1.5, None

    @staticmethod
    def _complete(pipe, folder):
        """Take the pipeline's parts; instruct.safetensors in its folder holds what makes an editor of a prior."""
        import diffusers
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        tuned, unet = folder / "instruct.safetensors", pipe.unet
        if tuned.is_file():
            pipe.unet = type(unet).from_config(dict(unet.config) | {"in_channels": 2 * unet.config.in_channels})
            states = {"unet": unet.state_dict(), "text_encoder": pipe.text_encoder.state_dict()}
            try:
                for key, value in load_file(tuned).items():  # the others are those of the prior
                    part, name = key.split(".", 1)
                    old = f"text_model.{name}"  # the name in transformers 4, and in the files of both
                    states[part][old if old in states[part] else name] = value
                for part, state in states.items():
                    getattr(pipe, part).load_state_dict(state)
            except (SafetensorError, RuntimeError, KeyError) as e:  # damaged, or of another model
                raise PriorError(f"{tuned.name}: {one_line(e, 200)}") from e
        parts = {k: getattr(pipe, k) for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                                 requires_safety_checker=False)

    @torch.no_grad()
    def of(self, picture):
        """This model, told which picture [B,3,H,W] in [0,1] it edits; weights and prompts are shared."""
        twin = copy.copy(self)
        twin.image = self.encode(picture) / self.scaling + self.shift
        return twin

    def nearest(self, prompt, count=4):
        """As of a Prior, for what an instruction such as "make it a green apple" asks for."""
        return super().nearest(re.sub(r"^ *(make|turn) +(it|him|her|them) +(into +)?", "", prompt.lower()), count)

    @torch.no_grad()
    def eps(self, x_t, t, y):
        """Noise prediction [B,C,h,w] with guidance to picture and text (eq. 3); raises ValueError without a picture."""
        if self.image is None:
            raise ValueError("which picture is edited? Take model.of(picture)")
        null = self.unconditional()
        predictions = self._predict(x_t, t, [null, null, y], [torch.zeros_like(self.image), self.image, self.image])
        return guided(predictions, self.image_guidance, self.guidance)


def _finite(weights):
    """Whether a tensor holds neither NaN nor infinity."""
    # float64, which MPS lacks, holds the sum of whatever float32 holds
    kind = None if weights.device.type == "mps" else torch.float64
    return weights.numel() == 0 or bool(torch.isfinite(weights.detach().sum(dtype=kind)))


def _networks(folder):
    """The networks of the pipeline in a folder, {part: module}; raises ValueError where weights are missing.

    The pipeline would load them just so, but draw at random what their files lack, without a word.
    """
    import diffusers
    import transformers
    index, networks = read_json(folder / "model_index.json"), {}
    if not isinstance(index.get("_class_name"), str):
        raise ValueError("model_index.json names no pipeline of diffusers")
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or part in ("safety_checker", "image_encoder"):
            continue
        library, kind = entry if len(entry) == 2 else (None, None)
        if isinstance(library, str) and (folder / part / f"{library}.py").exists():
            raise ValueError(f"its {part} is code of its own, which is not run")
        source = {"diffusers": diffusers, "transformers": transformers}.get(library if isinstance(library, str) else None)
        kind = getattr(source, kind, None) if isinstance(kind, str) else None
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            continue
        networks[part], info = kind.from_pretrained(folder, subfolder=part, output_loading_info=True)
        lacking = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
        if lacking:
            raise ValueError(f"{len(lacking)} weights of its {part} are missing or of another shape, e.g. {lacking[0]}")
    return networks


def read_defaults(path):
    """The settings that a model brings, pds.json; raises PriorError where one of them cannot be used."""
    try:
        found = read_json(path)
    except ValueError as e:
        raise PriorError(e) from e
    owns = [("", found), *((mode, found[mode]) for mode in ("svg", "image", "nerf", "splat") if mode in found)]
    owns += [(f"{mode} smooth", own["smooth"]) for mode, own in owns if isinstance(own, dict) and "smooth" in own]
    for mode, own in owns:
        if not isinstance(own, dict):
            raise PriorError(f"{path}: {mode} is no list of settings")
        guidance = own.get("guidance", {})
        right = {"guidance": isinstance(guidance, dict) and all(is_number(scale, 0, 1e6) for scale in guidance.values())}
        right |= {key: key not in own or is_number(own[key], low, 1e6) and isinstance(own[key], kind) for key, low, kind in (
            ("steps", 1, int), ("inversion_steps", 1, int), ("points", 0, (int, float)), ("colours", 0, (int, float)),
            ("identity", 0, (int, float)))}
        wrong = [key for key, fine in right.items() if not fine]
        if wrong:
            raise PriorError(f"{path}: {', '.join(f'{mode} {key}'.strip() for key in wrong)} cannot be used")
    return found


def guided(predictions, *scales):
    """Classifier-free guidance: the first prediction, and `scales` times the way from each one to the next."""
    first, *_ = predictions
    return first + sum(scale * (b - a) for scale, a, b in zip(scales, predictions, predictions[1:]))


def read_captions(text):
    """captions.txt -> list of captions: a line an object, its synonyms behind |, "COLOUR car" once for each colour."""
    colours = re.search(r"^# COLOUR is one of (.*)$", text, re.M)
    captions = []
    for line in text.splitlines():
        for caption in line.split("|") if line[:1] not in "#" else []:
            each = colours[1].split() if "COLOUR" in caption and colours else [""]
            captions += [caption.strip().replace("COLOUR", colour) for colour in each]
    return list(dict.fromkeys(captions))


def plain(prompt):
    """A prompt without capitals, articles and phrases such as "a picture of"."""
    words = re.sub(r"[\W_]+", " ", prompt.lower())  # letters of every script are kept: they make another prompt
    words = re.sub(r"^ *((an?|the) +)?((picture|drawing|emoji|photo|image|icon) +of +)?((an?|the) +)?", "", words)
    return " ".join(words.split())
