"""The diffusion prior: one class between the losses and the networks of diffusers.

    prior = Prior.from_pretrained("models/emoji")  # or Stable Diffusion 1.x, 2.x, XL, 3.x, FLUX: a folder or hub id
    x0 = prior.encode(picture)                     # [B,3,H,W] in [0,1] -> [B,C,h,w], differentiable
    y = prior.embed("a red apple")                 # computed once
    eps = prior.eps(x_t, t, y)                     # guidance included

    editor = InstructPix2Pix.from_pretrained("models/emoji")  # or an InstructPix2Pix folder or hub id
    eps = editor.of(picture).eps(x_t, t, editor.embed("make it a green apple"))

Guidance, number format, prediction type, latent scaling and shift are handled here; pds.py sees only `abar` and `eps`.
"""
import copy
import difflib
import re
import sys
import warnings

import torch

from files.messages import one_line
from pipelines.captions import plain, read_captions
from pipelines.flow import Flow
from pipelines.loading import DROPPED, PriorError, as_stable_diffusion, load_pipeline
from pipelines.lora import add_embedding, add_lora, find_lora, read_embedding
from pipelines.networks import FREEU, FlowUNet, Texts, UNet, network_of, spare_memory
from pipelines.settings import DREAMCATALYST, PAPER, for_flow, read_defaults

LETTERS = 200  # letters of a prompt that are compared with captions: the time is quadratic in them


class Prior:
    """A frozen text-to-image latent diffusion model.

    Attributes:
        abar: [T] float64 on the CPU, cumulative products of alpha.
        size: side in pixels of the square pictures that the model was trained on.
        multiple: both sides of a picture must be multiples of so many pixels.
        guidance: scale s in uncond + s (cond - uncond); 1 is the plain conditional prediction. A guidance-distilled
            model (FLUX.1 dev) takes s up to 10 as an input and gives the guided prediction itself, in half the time.
        defaults: settings that suit this model, PAPER or those of its pds.json.
        captions: training captions, a list of strings; empty if unknown.
    """
    LATENTS = 1  # latents that the network takes, concatenated

    def __init__(self, pipe, guidance=None, defaults=PAPER, device=None):
        """
        Args:
            pipe: a pipeline of Stable Diffusion or FLUX.
            guidance: None is the pipeline's default.
            device: where its networks go; None leaves them where they are.
        Raises:
            PriorError: a pipeline of another kind, weights that are not finite.
        """
        self.pipe, self.defaults, self.captions, self._embedded = pipe, defaults, [], {}
        modules = {part: module for part, module in pipe.components.items()
                   if isinstance(module, torch.nn.Module) and part not in DROPPED}
        try:
            unet = FlowUNet if "FlowMatch" in type(getattr(pipe, "scheduler", None)).__name__ else UNet
            self.network = network_of(pipe) or unet(pipe, self.LATENTS)
        except ValueError as e:
            raise PriorError(e) from e
        self.vae = pipe.vae
        self.texts = Texts(module for part, module in modules.items() if part.startswith("text_encoder"))
        for part, module in modules.items():
            module.eval().requires_grad_(False)
            if device is not None and not part.startswith("text_encoder"):
                module.to(device)
        self.device = self.network.module.device
        for block in self.vae.modules():
            if type(block).__name__ == "ResnetBlock2D":
                spare_memory(block)
        self.vae.to(torch.float32)  # SDXL's autoencoder overflows in fp16, and gradients run through this one
        self.abar, self.size, self.multiple = self.network.abar, self.network.size, self.network.multiple
        self.guidance, self.source_guidance = self.network.guidance if guidance is None else guidance, None
        for part, module in modules.items():
            wrong = [key for key, value in module.named_parameters() if not _finite(value)]
            if wrong:
                raise PriorError(f"{len(wrong)} weights of its {part} are not finite, e.g. {wrong[0]}")
        self.scaling = self.vae.config.scaling_factor
        self.shift = self.vae.config.get("shift_factor") or 0.0

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=None, guidance=None, lora=None, lora_scale=1.0, embedding=None):
        """Load a model.

        Args:
            name: a folder with a model_index.json, "owner/model" on the hub, or a .safetensors file, see loading.py.
            device: "cpu", "cuda", "mps", ...
            dtype: number format of the network and the text encoders, a torch.dtype or its name; by default float32 on
                a CPU, elsewhere float16, for FLUX bfloat16. The autoencoder is always float32.
            lora, lora_scale: a file, folder or hub id that is fused into the weights, and its factor.
            embedding: file of a textual inversion, whose word is printed on stderr.
        Raises:
            PriorError: a model that is missing, damaged, or of an unsupported kind; one line.
        """
        found = find_lora(lora) if lora else None  # fail before gigabytes are read
        word, vectors = read_embedding(embedding) if embedding else (None, None)
        pipe, folder = load_pipeline(name, device, dtype, cls.LATENTS)
        if lora:
            add_lora(pipe, found, lora_scale)
        if embedding:
            add_embedding(pipe, word, vectors)
            print(f"{embedding}: in a prompt its word is {word}", file=sys.stderr)
        brought = (folder / "pds.json").is_file()
        defaults = read_defaults(folder / "pds.json") if brought else PAPER
        try:
            prior = cls(cls._complete(pipe, folder), guidance, defaults, device)
            if isinstance(prior.network, Flow):
                own = {"dreamcatalyst": DREAMCATALYST} if brought else PAPER
                prior.defaults = for_flow(own, prior.network) | (defaults if brought else {})
            prior._try()
        except PriorError as e:
            raise PriorError(f"{name}: {e}") from e
        except (RuntimeError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError, AssertionError) as e:
            raise PriorError(f"{name}: damaged, or of an unknown kind: {one_line(e, 200)}") from e
        if (folder / "captions.txt").is_file():
            try:
                prior.captions = read_captions((folder / "captions.txt").read_text(encoding="utf-8"))
            except (OSError, ValueError) as e:
                raise PriorError(f"{folder / 'captions.txt'}: no readable list of captions: {one_line(e, 100)}") from e
        return prior

    @staticmethod
    def _complete(pipe, folder):
        """The pipeline in the form that this class needs; raises PriorError."""
        if "InstructPix2Pix" in type(pipe).__name__:
            raise PriorError("an InstructPix2Pix model edits pictures; it is not a text-to-image prior")
        return pipe

    def at(self, scale, source=None):
        """A copy with another guidance scale; it shares the weights and the embedded prompts.

        source: the scale of the second half of the rows of `eps`, which are the source's in pds.pds_loss; None: the
            same. Raises ValueError for it if the model was distilled to take its guidance as an input.
        """
        if source is not None and self.network.embedded:
            raise ValueError("--source-guidance: this model takes one guidance scale as an input")
        twin = copy.copy(self)
        twin.guidance, twin.source_guidance = scale, source
        return twin

    def with_freeu(self):
        """A copy whose UNet runs with FreeU; the prior itself, with a warning, where that is not possible."""
        if isinstance(self.network, Flow) or not hasattr(self.network.module, "enable_freeu"):
            warnings.warn("FreeU is left out: it is made for UNets that predict noise", stacklevel=2)
            return self
        twin, twin.network = copy.copy(self), copy.copy(self.network)
        twin.network.freeu = FREEU
        return twin

    @torch.no_grad()
    def _try(self):
        """Raise an error if the networks do not fit each other: better now than after the fit of a scene."""
        self.network.check(self.embed(""))
        side = min(self.size, 16 * self.multiple)
        tried, picture = copy.copy(self), torch.full((1, 3, side, side), 0.5)
        tried.image = x0 = self.encode(picture)
        eps = tried.eps(x0, torch.tensor([len(self.abar) // 2]), self.embed(""))
        if eps.shape != x0.shape or self.decode(x0).shape != picture.shape or not (_finite(eps) and _finite(x0)):
            raise PriorError("the outputs of its networks have another shape, or are not finite")

    def encode(self, picture):
        """[B,3,H,W] in [0,1] -> scaled latent [B,C,h,w] float32: the posterior's mean, differentiable."""
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise ValueError(f"picture must be [B,3,H,W], got {[*picture.shape]}")
        self.texts.to("cpu")
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
        """Prompt -> the y of `eps`: (embeddings [1,L,D],), for SDXL, SD 3 and FLUX also pooled ones [1,P].

        Warns, once a prompt, if the prompt is not among the model's captions or has too many tokens.
        """
        if prompt not in self._embedded:
            close = self.nearest(prompt)
            shown = one_line(prompt, 80)
            if close:
                warnings.warn(f"the model was not trained on {shown!r}; nearest: {', '.join(close)}", stacklevel=2)
            tokens, most = self.network.length(prompt) if len(prompt) > 300 else (0, 0)
            if tokens > most:
                warnings.warn(f"the model reads only {most} of the {tokens} tokens of {shown!r}", stacklevel=2)
            self.texts.to(self.device)
            self._embedded[prompt] = self.network.embed(prompt, self.device)
        return self._embedded[prompt]

    def nearest(self, prompt, count=4):
        """The captions most similar to a prompt; none if it is one of them, or if the captions are unknown."""
        words = plain(prompt[:LETTERS])
        if not prompt.strip() or words in self.captions and len(prompt) <= LETTERS:
            return []

        def likeness(caption):
            own, other = set(words.split()), set(caption.split())
            return len(own & other) / max(len(own | other), 1) + difflib.SequenceMatcher(None, words, caption).ratio()
        return sorted(self.captions, key=likeness, reverse=True)[:count]

    @torch.no_grad()
    def unconditional(self):
        """The y of the empty prompt; zeros if an SDXL model was trained with zeros for it."""
        y = self.embed("")
        return tuple(torch.zeros_like(part) for part in y) if self.network.zeros else y

    def eps(self, x_t, t, y):
        """Noise prediction with classifier-free guidance (arXiv 2207.12598): uncond + s (cond - uncond).

        Differentiable by x_t; the losses of pds.py call it under no_grad, and no weight requires a gradient.

        Args:
            x_t: [B,C,h,w] noisy latent; t: [B] timesteps; y: from `embed`, each part [1,...] or [B,...].
        Returns:
            [B,C,h,w] float32 for any number format of the network.
        """
        if self.source_guidance is not None:
            scales = x_t.new_tensor([self.guidance, self.source_guidance]).repeat_interleave(len(x_t) // 2)
            return guided(self._predict(x_t, t, [self.unconditional(), y]), scales.view(-1, 1, 1, 1))
        if self.guidance == 1:
            return self._predict(x_t, t, [y])[0]
        if 1 < self.guidance <= self.network.embedded:  # a guidance-distilled model: one call
            return self._predict(x_t, t, [y], guidance=self.guidance)[0]
        return guided(self._predict(x_t, t, [self.unconditional(), y]), self.guidance)

    def _predict(self, x_t, t, prompts, images=(), **options):
        """The unguided noise prediction for each prompt (and image), in one network call with these options."""
        self.texts.to("cpu")
        batch, n = len(x_t), len(prompts)
        y = [torch.cat([part.expand(batch, *part.shape[1:]) for part in parts]) for parts in zip(*prompts, strict=True)]
        beside = [torch.cat([image.expand(batch, *image.shape[1:]) for image in images])] if images else []
        x_t = x_t.to(self.device, torch.float32)
        return self.network.eps(x_t.repeat(n, 1, 1, 1), t.repeat(n), y, *beside, **options).chunk(n)


class InstructPix2Pix(Prior):
    """A model that edits a picture by an instruction (Brooks et al., arXiv 2211.09800); `of` sets the picture.

    Attributes, in addition to those of Prior:
        guidance, image_guidance: s_T and s_I of eq. 3; 7.5 and 1.5 as in the released code.
        image: [1,C,h,w] or [B,C,h,w] latent of the picture to edit, NOT scaled, as in training.
    """
    LATENTS = 2
    image_guidance, image = 1.5, None

    @staticmethod
    def _complete(pipe, folder):
        """The pipeline's parts; instruct.safetensors in its folder holds weights that turn a prior into an editor."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        if getattr(pipe, "unet", None) is None:
            raise PriorError(f"a {type(pipe).__name__} has no UNet: it is not an InstructPix2Pix model")
        tuned, unet = folder / "instruct.safetensors", pipe.unet
        if tuned.is_file():
            pipe.unet = type(unet).from_config(dict(unet.config) | {"in_channels": 2 * unet.config.in_channels})
            states = {"unet": unet.state_dict(), "text_encoder": pipe.text_encoder.state_dict()}
            try:
                for key, value in load_file(tuned).items():  # all other weights are the prior's
                    part, name = key.split(".", 1)
                    old = f"text_model.{name}"  # its name in transformers 4, and in files of both versions
                    states[part][old if old in states[part] else name] = value
                for part, state in states.items():
                    getattr(pipe, part).load_state_dict(state)
            except (SafetensorError, RuntimeError, KeyError) as e:  # damaged, or for another model
                raise PriorError(f"{tuned.name}: {one_line(e, 200)}") from e
        return as_stable_diffusion(pipe)

    def at(self, scale, image_scale=None):
        """A copy with other guidance scales s_T and s_I (None: unchanged); it shares weights and prompts."""
        twin = super().at(scale)
        twin.image_guidance = self.image_guidance if image_scale is None else image_scale
        return twin

    @torch.no_grad()
    def of(self, picture=None, x0=None):
        """A copy that edits a picture [B,3,H,W] in [0,1], or its latent x0; it shares weights and prompts."""
        twin = copy.copy(self)
        twin.image = (self.encode(picture) if x0 is None else x0) / self.scaling + self.shift
        return twin

    def nearest(self, prompt, count=4):
        """The captions most similar to the object of an instruction such as "make it a green apple"."""
        return super().nearest(re.sub(r"^ *(make|turn) +(it|him|her|them) +(into +)?", "", prompt.lower()), count)

    def eps(self, x_t, t, y):
        """Noise prediction [B,C,h,w] with guidance by picture and text (eq. 3); ValueError if no picture is set."""
        if self.image is None:
            raise ValueError("no picture to edit is set: call model.of(picture).eps")
        null = self.unconditional()
        predictions = self._predict(x_t, t, [null, null, y], [torch.zeros_like(self.image), self.image, self.image])
        return guided(predictions, self.image_guidance, self.guidance)


def _finite(weights):
    """Whether a tensor holds neither NaN nor infinity."""
    # a sum of float32 values cannot overflow in float64, which MPS lacks
    kind = None if weights.device.type == "mps" else torch.float64
    return weights.numel() == 0 or bool(torch.isfinite(weights.detach().sum(dtype=kind)))


def guided(predictions, *scales):
    """Classifier-free guidance: the first prediction plus `scales` times the difference of each one to the next."""
    first, *_ = predictions
    return first + sum(scale * (b - a) for scale, a, b in zip(scales, predictions, predictions[1:], strict=False))
