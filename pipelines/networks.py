"""The networks of Stable Diffusion 1.x to 3.x, XL and FLUX.1, behind one call each: eps or, for a flow, velocity.

    network = network_of(pipe) or UNet(pipe)       # of a pipeline of diffusers
    y = network.embed("a red apple", device)       # a tuple of tensors [1,...]
    eps = network.eps(x_t, t, y)                   # [B,C,h,w], without classifier-free guidance
"""
import math

import torch
from torch.utils.checkpoint import checkpoint

from files.reading import is_number
from pipelines.flow import Flow, sigmas_of
from pipelines.loading import PriorError, check_channels

# The noise schedule of Stable Diffusion 1.x, 2.x and XL: as diffusers' schedulers take it, and abar [1000].
STABLE_DIFFUSION_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE_DIFFUSION_ABAR = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def sigmas_of_scheduler(scheduler, tokens):
    """[T - 1] float64: the noise levels of a pipeline's sampler with one step for each of its T training timesteps.

    The first level, pure noise, is left out. t is an index into this table; the network accepts all levels in between.

    Args:
        scheduler: a FlowMatch... scheduler of diffusers.
        tokens: patches of a picture, on which the shift of FLUX depends: here of the square picture that the model was
            trained on, whatever is edited.
    Raises:
        ValueError: another kind of scheduler, or an unusable shift.
    """
    config = scheduler.config
    if "FlowMatch" not in type(scheduler).__name__:
        raise ValueError(f"{type(scheduler).__name__} has no noise levels for flow matching")
    shift = config.get("shift", 1.0)
    if config.get("use_dynamic_shifting", False):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = least + (most - least) * (tokens - low) / (high - low)
        shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    if not 0 < shift < 1e6:
        raise ValueError(f"the noise levels of its schedule cannot be shifted by {shift}")
    return sigmas_of(config.num_train_timesteps, shift)


class Transformer(Flow):
    """What Stable Diffusion 3 and FLUX share; UNet has the same attributes and methods.

    Attributes:
        module: the transformer; size: side in pixels of the pictures that it was trained on.
        multiple: both sides of a picture are multiples of so many pixels; patch: the same in the latent.
        guidance: the pipeline's default; embedded: the largest guidance scale that the network takes as an input, or 0.
        one_scale: whether it was trained for its default guidance, which then applies to all losses.
        zeros: whether the empty prompt is a tensor of zeros instead of a text.
    """
    patch, embedded, one_scale, zeros = 2, 0, False, False

    def __init__(self, pipe, latents, side):
        """latents: channels of a latent as the transformer takes it; side: of the latents that it was trained on."""
        self.pipe, self.module = pipe, pipe.transformer
        channels, factor = pipe.vae.config.latent_channels, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        if latents != channels:
            raise ValueError(f"its transformer takes {latents} channels, a latent has {channels}: no text-to-image "
                             "model")
        self.size, self.multiple = side * factor, self.patch * factor
        super().__init__(sigmas_of_scheduler(pipe.scheduler, (side // self.patch) ** 2))

    def check(self, y):
        """Raise ValueError if the embedded prompt y does not fit the transformer."""
        config = self.module.config
        given, taken = [part.shape[-1] for part in y], [config.joint_attention_dim, config.pooled_projection_dim]
        if given != taken:
            raise ValueError(f"its text encoders give {given[0]} and {given[1]} features, its transformer takes "
                             f"{taken[0]} and {taken[1]}")

    def fits(self, x):
        """Raise ValueError if a latent [B,C,h,w] cannot be cut into patches."""
        if x.shape[-2] % self.patch or x.shape[-1] % self.patch:
            raise ValueError(f"both sides of a picture must be multiples of {self.multiple} pixels, its latent is "
                             f"{x.shape[-1]} x {x.shape[-2]}")


class StableDiffusion3(Transformer):
    """Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206). Any of the three text encoders may be missing."""
    guidance, CLIP, T5 = 7.0, 77, 256  # tokens of a prompt, for each kind of encoder

    def __init__(self, pipe):
        config = pipe.transformer.config
        self.patch = config.patch_size
        super().__init__(pipe, config.in_channels, config.sample_size)
        self.most = config.pos_embed_max_size  # patches a side

    def embed(self, prompt, device):
        """Prompt -> (embeddings [1,L,D], pooled [1,P]); zeros for a missing encoder, as in training."""
        config, pipe, dtype = self.module.config, self.pipe, self.module.dtype
        clips = [(pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)]
        widths = [0 if encoder is None else encoder.config.projection_dim for encoder, _ in clips]
        hidden, pooled = [], []
        for encoder, tokenizer in clips:
            if encoder is None:  # the hidden states of both CLIPs are as wide as their pooled embeddings
                width = config.pooled_projection_dim - sum(widths) if any(widths) else config.pooled_projection_dim // 2
                hidden.append(torch.zeros(1, self.CLIP, width, device=device, dtype=dtype))
                pooled.append(torch.zeros(1, width, device=device, dtype=dtype))
            else:
                out = encoder(tokens(tokenizer, prompt, min(self.CLIP, tokenizer.model_max_length), device),
                              output_hidden_states=True)
                hidden.append(out.hidden_states[-2])
                pooled.append(out[0])
        hidden = [part[:, :min(part.shape[1] for part in hidden)] for part in hidden]
        clip = torch.cat(hidden, -1)
        clip = torch.nn.functional.pad(clip, (0, config.joint_attention_dim - clip.shape[-1]))
        if pipe.text_encoder_3 is None:
            t5 = torch.zeros(1, self.T5, config.joint_attention_dim, device=device, dtype=dtype)
        else:
            t5 = pipe.text_encoder_3(tokens(pipe.tokenizer_3, prompt, self.T5, device))[0]
        return torch.cat([clip, t5.to(clip)], -2), torch.cat(pooled, -1)

    def length(self, prompt):
        """How many tokens a prompt has, and how many are read."""
        pipe = self.pipe
        tokenizer, most = (pipe.tokenizer_3, self.T5) if pipe.text_encoder_3 else (pipe.tokenizer, self.CLIP)
        return len(tokenizer(prompt).input_ids) if tokenizer else 0, most

    def velocity(self, x, sigma, y):
        """[B,C,h,w] in the dtype of x; ValueError for a picture that is too large or does not fit the patches."""
        self.fits(x)
        if self.most and max(x.shape[-2:]) > self.most * self.patch:
            raise ValueError(f"a picture may have {self.most * self.multiple} pixels a side at most, its latent is "
                             f"{x.shape[-1]} x {x.shape[-2]}")
        device, dtype = self.module.device, self.module.dtype
        embeddings, pooled = (part.to(device, dtype) for part in y)
        return self.module(hidden_states=x.to(device, dtype), timestep=1000 * sigma.to(device),
                           encoder_hidden_states=embeddings, pooled_projections=pooled).sample.to(x)


class Flux(Transformer):
    """FLUX.1 (Black Forest Labs, 2024). The dev model is guidance-distilled (arXiv 2210.03142): it takes the scale as
    an input and gives the guided prediction in one call. schnell was trained to need no guidance."""
    SIDE, PATCHES = 128, 2  # side of the latents that it was trained on; side of a token in latent pixels
    one_scale = True

    def __init__(self, pipe):
        config, self.patch = pipe.transformer.config, self.PATCHES
        super().__init__(pipe, config.in_channels // self.patch ** 2, self.SIDE)
        self.distilled = config.guidance_embeds
        self.guidance, self.embedded = (3.5, 10.0) if self.distilled else (1.0, 0)

    def embed(self, prompt, device):
        """Prompt -> (T5's embeddings [1,L,D], CLIP's pooled one [1,P])."""
        most = 512 if self.distilled else 256
        t5 = self.pipe.text_encoder_2(tokens(self.pipe.tokenizer_2, prompt, most, device))[0]
        clip = self.pipe.tokenizer
        return t5, self.pipe.text_encoder(tokens(clip, prompt, clip.model_max_length, device)).pooler_output

    def length(self, prompt):
        """How many tokens a prompt has, and how many are read."""
        return len(self.pipe.tokenizer_2(prompt).input_ids), 512 if self.distilled else 256

    def velocity(self, x, sigma, y, guidance=1.0):
        """[B,C,h,w] in the dtype of x; guidance: the scale, which only a guidance-distilled model uses."""
        self.fits(x)
        device, dtype, (batch, _, h, w) = self.module.device, self.module.dtype, x.shape
        embeddings, pooled = (part.to(device, dtype) for part in y)
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(device, torch.float32)
        packed = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT  # [B, h/2 w/2, 4 C]
        scale = sigma.new_full((batch,), guidance).to(device) if self.distilled else None
        out = self.module(hidden_states=packed.to(device, dtype), timestep=sigma.to(device), guidance=scale,
                          encoder_hidden_states=embeddings, pooled_projections=pooled, img_ids=places,
                          txt_ids=places.new_zeros(embeddings.shape[1], 3)).sample
        return torch.nn.functional.pixel_shuffle(out.to(x).mT.reshape(batch, -1, h // 2, w // 2), 2)


def tokens(tokenizer, prompt, most, device):
    """[1,most] token ids of a prompt, padded or truncated. Raises ValueError where `most` is no number of tokens."""
    if not is_number(most, 2, 1e5):
        raise ValueError(f"the model_max_length of its tokenizer, {most}, is not a number of tokens")
    read = tokenizer(prompt, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
    return read.input_ids.to(device)


NETWORKS = {"SD3Transformer2DModel": StableDiffusion3, "FluxTransformer2DModel": Flux}


def network_of(pipe):
    """The wrapped transformer of a pipeline of diffusers; None if it has none. ValueError for an unknown one."""
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        return None
    kind = type(transformer).__name__
    if kind not in NETWORKS:
        raise ValueError(f"a {kind} is not supported: {' and '.join(NETWORKS)} are")
    return NETWORKS[kind](pipe)


FREEU = {"b1": 1.1, "b2": 1.1, "s1": 0.9, "s2": 0.2}  # DreamCatalyst's factors, as diffusers' enable_freeu takes them
LARGE = 256 * 256  # pixels from which a feature map of the autoencoder is recomputed for the backward pass


class UNet:
    """The noise prediction of a pipeline of Stable Diffusion 1.x, 2.x or XL, without guidance.

    Prior uses these names of any network: module, abar, size, multiple, guidance, embedded, zeros, embed, length,
    check, eps. freeu: factors of FreeU (Si et al., arXiv 2309.11497), which scales the features of the decoder and of
    the skips; None: without.
    """
    guidance, embedded, freeu = 7.5, 0, None

    def __init__(self, pipe, latents=1):
        """latents: number of latents that the UNet takes, concatenated. Raises PriorError."""
        missing = [k for k in ("unet", "vae", "scheduler", "tokenizer") if getattr(pipe, k, None) is None]
        if missing or not hasattr(pipe, "encode_prompt"):
            raise PriorError(f"{type(pipe).__name__} is not shaped like Stable Diffusion: no {', '.join(missing)}")
        self.pipe, self.module = pipe, pipe.unet
        config = self.module.config
        check_channels(config.in_channels, pipe.vae.config.latent_channels, latents)
        if not is_number(config.sample_size, 1, 4096):
            raise PriorError(f"the sample_size of its UNet, {config.sample_size}, is not a number of pixels")
        longest = pipe.tokenizer.model_max_length
        if not is_number(longest, 2, 1e5):  # without it prompts are not padded, and two of them do not fit into a batch
            raise PriorError(f"the model_max_length of its tokenizer, {longest}, is not a number of tokens")
        self.size = int(config.sample_size * pipe.vae_scale_factor)
        self.multiple = pipe.vae_scale_factor  # the UNet handles latents of an odd side itself
        self.zeros = pipe.config.get("force_zeros_for_empty_prompt", False)
        self.read_schedule(pipe.scheduler)

    def read_schedule(self, scheduler):
        """Set abar and prediction_type from a scheduler. Raises PriorError if they are unusable."""
        if not hasattr(scheduler, "betas"):
            raise PriorError(f"{type(scheduler).__name__} has no noise schedule like that of DDPM")
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise PriorError(f"prediction type {self.prediction_type!r} is neither epsilon nor v_prediction")
        # in float64 from the betas, since the one-step beta is a difference of neighbours in abar
        self.abar = (1 - scheduler.betas.double().cpu()).cumprod(0)
        first, last = self.abar[0], self.abar[-1]
        if not (torch.isfinite(self.abar).all() and (self.abar.diff() <= 0).all() and 0 <= last < first <= 1):
            raise PriorError("abar of its noise schedule does not decrease from 1 to 0")

    def embed(self, prompt, device):
        """Prompt -> (embeddings [1,L,D],); for SDXL (embeddings [1,L,D], pooled [1,P])."""
        out = self.pipe.encode_prompt(prompt=prompt, device=device, num_images_per_prompt=1,
                                      do_classifier_free_guidance=False)
        # Stable Diffusion returns (cond, uncond); SDXL (cond, uncond, pooled cond, pooled uncond)
        return (out[0],) if len(out) == 2 else (out[0], out[2])

    def length(self, prompt):
        """How many tokens a prompt has, and how many are read."""
        return len(self.pipe.tokenizer(prompt).input_ids), self.pipe.tokenizer.model_max_length

    def check(self, y):
        """Raise PriorError if the embedded prompt y does not fit the UNet."""
        given, taken = y[0].shape[-1], self.module.config.cross_attention_dim
        if isinstance(taken, int) and given != taken:
            raise PriorError(f"its text encoder gives {given} features, its UNet takes {taken}")

    def eps(self, x_t, t, y, beside=None):
        """[B,C,h,w] float32; beside: [B,C,h,w] latents that the UNet takes as further channels."""
        x = x_t if beside is None else torch.cat([x_t, beside.to(x_t)], 1)
        out = self.predict(x, t, y)
        if self.prediction_type == "v_prediction":  # v = sqrt(abar) eps - sqrt(1 - abar) x0
            abar = self.abar[t.cpu()].to(out).reshape(-1, 1, 1, 1)
            out = abar.sqrt() * out + (1 - abar).sqrt() * x_t.to(out)
        return out

    def predict(self, x, t, y):
        """The UNet's output in float32: the noise, v, or a velocity."""
        dtype, device, added = self.module.dtype, self.module.device, None
        embeddings, *pooled = (part.to(device, dtype) for part in y)
        if pooled:  # SDXL is also conditioned on size and crop: the full picture, uncropped
            h, w = (side * self.multiple for side in x.shape[-2:])
            ids = torch.tensor([[h, w, 0, 0, h, w]], device=device, dtype=dtype).expand(len(x), -1)
            added = {"text_embeds": pooled[0], "time_ids": ids}
        if self.freeu:  # set for this call alone, since other losses of the same run share the UNet
            self.module.enable_freeu(**self.freeu)
        try:
            return self.module(x.to(device, dtype), t.to(device), embeddings, added_cond_kwargs=added).sample.float()
        finally:
            if self.freeu:
                self.module.disable_freeu()


class FlowUNet(UNet, Flow):
    """A UNet that predicts the velocity eps - x0: Stable Diffusion with a FlowMatch... scheduler."""
    one_scale, eps = False, Flow.eps

    def read_schedule(self, scheduler):
        """Set sigmas and abar from a scheduler. Raises ValueError if they are unusable."""
        if self.module.config.in_channels != self.pipe.vae.config.latent_channels:
            raise PriorError("an InstructPix2Pix model with a flow matching scheduler is not supported")
        Flow.__init__(self, sigmas_of_scheduler(scheduler, self.module.config.sample_size ** 2))

    def velocity(self, x, sigma, y):
        return self.predict(x, 1000 * sigma, y)


class Texts:
    """The text encoders of a pipeline, on the device only while prompts are embedded."""

    def __init__(self, encoders):
        self.encoders, self.device = [*encoders], None

    def to(self, device):
        """Move the encoders to a device, unless they are on it."""
        device = torch.device(device)
        if device != self.device:
            for encoder in self.encoders:
                encoder.to(device)
            self.device = device


def spare_memory(block):
    """Let a block of the autoencoder store only its input for the backward pass if the feature map is LARGE.

    A gradient through the encoder of Stable Diffusion at 512 px then takes 1.4 GB instead of 3.2, and 10 % more time.
    """
    plain = block.forward
    if "forward" in vars(block):  # another Prior shares the pipeline
        return

    def forward(x, *others, **named):
        if torch.is_grad_enabled() and x.requires_grad and x.shape[-2] * x.shape[-1] >= LARGE:
            return checkpoint(plain, x, *others, use_reentrant=False, **named)
        return plain(x, *others, **named)
    block.forward = forward
