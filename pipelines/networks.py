"""TODO docstring."""
import math

import torch
from torch.utils.checkpoint import checkpoint

from files.reading import is_number
from pipelines.flow import Flow, sigmas_of
from pipelines.loading import PriorError, check_channels


def sigmas_of_scheduler(scheduler, tokens):
    """[T - 1] float64: the noise levels of a pipeline's sampler if it took a step for each of its T training timesteps.

    The first of them, pure noise, is left out. The network takes any level between; the table is what t counts.

    Args:
        scheduler: a FlowMatch... of diffusers.
        tokens: patches of a picture, by which FLUX shifts. The table is that of the square picture that the model was
            trained on, whatever is edited.
    Raises:
        ValueError: a scheduler of another kind, a shift that cannot be used.
    """
    config = scheduler.config
    if "FlowMatch" not in type(scheduler).__name__:
        raise ValueError(f"{type(scheduler).__name__} has no noise levels of flow matching")
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
    """What Stable Diffusion 3 and FLUX share. The names are those of prior.UNet.

    Attributes:
        module: the transformer; size: side in pixels of the pictures that it was trained on.
        multiple: pixels that both sides of a picture must be a multiple of; patch: the same in the latent.
        guidance: the default of the pipeline; embedded: the largest scale that one call gives by itself, 0: none.
        one_scale: whether it was trained for the default guidance, so that no other is a loss's own.
        zeros: whether the empty prompt is zeros instead of a text.
    """
    patch, embedded, one_scale, zeros = 2, 0, False, False

    def __init__(self, pipe, latents, side):
        """latents: channels that the transformer takes of a latent; side: of the latents that it was trained on."""
        self.pipe, self.module = pipe, pipe.transformer
        channels, factor = pipe.vae.config.latent_channels, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        if latents != channels:
            raise ValueError(f"its transformer takes {latents} channels, a latent has {channels}: no text-to-image "
                             "model")
        self.size, self.multiple = side * factor, self.patch * factor
        super().__init__(sigmas_of_scheduler(pipe.scheduler, (side // self.patch) ** 2))

    def check(self, y):
        """Raise ValueError where the texts y do not fit the transformer."""
        config = self.module.config
        given, taken = [part.shape[-1] for part in y], [config.joint_attention_dim, config.pooled_projection_dim]
        if given != taken:
            raise ValueError(f"its texts have {given[0]} and {given[1]} features, its transformer takes {taken[0]} and "
                             f"{taken[1]}")

    def fits(self, x):
        """Raise ValueError where a latent [B,C,h,w] cannot be cut into patches."""
        if x.shape[-2] % self.patch or x.shape[-1] % self.patch:
            raise ValueError(f"both sides of a picture must be multiples of {self.multiple} pixels, its latent is "
                             f"{x.shape[-1]} x {x.shape[-2]}")


class StableDiffusion3(Transformer):
    """Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206). Any of the three text encoders may be missing."""
    guidance, CLIP, T5 = 7.0, 77, 256  # the most tokens of a text

    def __init__(self, pipe):
        config = pipe.transformer.config
        self.patch = config.patch_size
        super().__init__(pipe, config.in_channels, config.sample_size)
        self.most = config.pos_embed_max_size  # patches a side

    def embed(self, prompt, device):
        """Prompt -> (embeddings [1,L,D], pooled [1,P]); zeros for an encoder that is missing, as in its training."""
        config, pipe, dtype = self.module.config, self.pipe, self.module.dtype
        clips = [(pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)]
        widths = [0 if encoder is None else encoder.config.projection_dim for encoder, _ in clips]
        hidden, pooled = [], []
        for encoder, tokenizer in clips:
            if encoder is None:  # the last states of both CLIPs are as wide as what is pooled of them
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
        """[B,C,h,w] in the number format of x; raises ValueError for a picture that is too large, or no multiple."""
        self.fits(x)
        if self.most and max(x.shape[-2:]) > self.most * self.patch:
            raise ValueError(f"a picture may have {self.most * self.multiple} pixels a side at most, its latent is "
                             f"{x.shape[-1]} x {x.shape[-2]}")
        device, dtype = self.module.device, self.module.dtype
        embeddings, pooled = (part.to(device, dtype) for part in y)
        return self.module(hidden_states=x.to(device, dtype), timestep=1000 * sigma.to(device),
                           encoder_hidden_states=embeddings, pooled_projections=pooled).sample.to(x)


class Flux(Transformer):
    """FLUX.1 (Black Forest Labs, 2024). The dev model is guidance-distilled (arXiv 2210.03142): it is told the scale
    and gives the guided prediction in one call. schnell is not, and was made to do without guidance."""
    SIDE, PATCHES = 128, 2  # of the latents that it was trained on; latent pixels a token, along each side
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
        """[B,C,h,w] in the number format of x; guidance: the scale that a guidance-distilled model is told."""
        self.fits(x)
        device, dtype, (batch, _, h, w) = self.module.device, self.module.dtype, x.shape
        embeddings, pooled = (part.to(device, dtype) for part in y)
        rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(device, torch.float32)
        packed = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT  # [B, h/2 w/2, 4 C]
        told = sigma.new_full((batch,), guidance).to(device) if self.distilled else None
        out = self.module(hidden_states=packed.to(device, dtype), timestep=sigma.to(device), guidance=told,
                          encoder_hidden_states=embeddings, pooled_projections=pooled, img_ids=places,
                          txt_ids=places.new_zeros(embeddings.shape[1], 3)).sample
        return torch.nn.functional.pixel_shuffle(out.to(x).mT.reshape(batch, -1, h // 2, w // 2), 2)


def tokens(tokenizer, prompt, most, device):
    """[1,most] numbers of the tokens of a prompt, filled up or cut off."""
    read = tokenizer(prompt, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
    return read.input_ids.to(device)


NETWORKS = {"SD3Transformer2DModel": StableDiffusion3, "FluxTransformer2DModel": Flux}


def network_of(pipe):
    """The network of a pipeline of diffusers; None where it has no transformer. Raises ValueError for another one."""
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        return None
    kind = type(transformer).__name__
    if kind not in NETWORKS:
        raise ValueError(f"a {kind} is not known here: {' and '.join(NETWORKS)} are")
    return NETWORKS[kind](pipe)


LARGE = 256 * 256  # pixels of a feature map from which on the autoencoder computes it again for the backward


class UNet:
    """The plain noise prediction of a pipeline of Stable Diffusion 1.x, 2.x or XL, without guidance.

    What Prior asks of a network stands here, and in flow.py with the same names: module, abar, size, multiple,
    guidance, embedded, zeros, embed, length, check, eps.
    """
    guidance, embedded = 7.5, 0

    def __init__(self, pipe, latents=1):
        """latents: how many of them the UNet takes at once. Raises PriorError."""
        missing = [k for k in ("unet", "vae", "scheduler", "tokenizer") if getattr(pipe, k, None) is None]
        if missing or not hasattr(pipe, "encode_prompt"):
            raise PriorError(f"{type(pipe).__name__} is not shaped like Stable Diffusion: no {', '.join(missing)}")
        self.pipe, self.module = pipe, pipe.unet
        config = self.module.config
        check_channels(config.in_channels, pipe.vae.config.latent_channels, latents)
        if not is_number(config.sample_size, 1, 4096):
            raise PriorError(f"the sample_size of its UNet, {config.sample_size}, is no number of pixels")
        self.size = int(config.sample_size * pipe.vae_scale_factor)
        self.multiple = pipe.vae_scale_factor  # latents of an odd side are the UNet's own care
        self.zeros = pipe.config.get("force_zeros_for_empty_prompt", False)
        self.read_schedule(pipe.scheduler)

    def read_schedule(self, scheduler):
        """Set abar, and what the network predicts. Raises PriorError where that cannot be used."""
        if not hasattr(scheduler, "betas"):
            raise PriorError(f"{type(scheduler).__name__} has no noise schedule of the DDPM kind")
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise PriorError(f"prediction type {self.prediction_type!r} is neither epsilon nor v_prediction")
        # In float64 from the betas: the one-step beta is a difference of neighbours in abar.
        self.abar = (1 - scheduler.betas.double().cpu()).cumprod(0)
        first, last = self.abar[0], self.abar[-1]
        if not (torch.isfinite(self.abar).all() and (self.abar.diff() <= 0).all() and 0 <= last < first <= 1):
            raise PriorError("its noise schedule does not fall from 1 to 0")

    def embed(self, prompt, device):
        """Prompt -> (embeddings [1,L,D],), of SDXL (embeddings [1,L,D], pooled [1,P])."""
        out = self.pipe.encode_prompt(prompt=prompt, device=device, num_images_per_prompt=1,
                                      do_classifier_free_guidance=False)
        # Stable Diffusion returns (cond, uncond); SDXL (cond, uncond, pooled cond, pooled uncond)
        return (out[0],) if len(out) == 2 else (out[0], out[2])

    def length(self, prompt):
        """How many tokens a prompt has, and how many are read."""
        return len(self.pipe.tokenizer(prompt).input_ids), self.pipe.tokenizer.model_max_length

    def check(self, y):
        """Raise PriorError where the texts y do not fit the network."""
        given, taken = y[0].shape[-1], self.module.config.cross_attention_dim
        if isinstance(taken, int) and given != taken:
            raise PriorError(f"its texts have {given} features, its UNet takes {taken}")

    def eps(self, x_t, t, y, beside=None):
        """[B,C,h,w] float32; beside: [B,C,h,w] latents that the UNet takes beside x_t."""
        x = x_t if beside is None else torch.cat([x_t, beside.to(x_t)], 1)
        out = self.predict(x, t, y)
        if self.prediction_type == "v_prediction":  # v = sqrt(abar) eps - sqrt(1 - abar) x0
            abar = self.abar[t.cpu()].to(out).reshape(-1, 1, 1, 1)
            out = abar.sqrt() * out + (1 - abar).sqrt() * x_t.to(out)
        return out

    def predict(self, x, t, y):
        """What the UNet says, float32."""
        dtype, device, added = self.module.dtype, self.module.device, None
        embeddings, *pooled = (part.to(device, dtype) for part in y)
        if pooled:  # SDXL is also told the picture's size and crop: the full picture, uncropped
            h, w = (side * self.multiple for side in x.shape[-2:])
            ids = torch.tensor([[h, w, 0, 0, h, w]], device=device, dtype=dtype).expand(len(x), -1)
            added = {"text_embeds": pooled[0], "time_ids": ids}
        return self.module(x.to(device, dtype), t.to(device), embeddings, added_cond_kwargs=added).sample.float()


class FlowUNet(UNet, Flow):
    """A UNet that predicts the velocity eps - x0: a pipeline of Stable Diffusion's shape with a FlowMatch... scheduler."""
    one_scale, eps = False, Flow.eps

    def read_schedule(self, scheduler):
        """Raises ValueError where the noise levels cannot be used."""
        if self.module.config.in_channels != self.pipe.vae.config.latent_channels:
            raise PriorError("an InstructPix2Pix with a scheduler of flow matching cannot be used")
        Flow.__init__(self, sigmas_of_scheduler(scheduler, self.module.config.sample_size ** 2))

    def velocity(self, x, sigma, y):
        return self.predict(x, 1000 * sigma, y)


class Texts:
    """The text encoders of a pipeline: on the device while prompts are embedded, on the CPU while the network runs."""

    def __init__(self, encoders):
        self.encoders, self.device = [*encoders], None

    def to(self, device):
        """Move them, unless they are there."""
        device = torch.device(device)
        if device != self.device:
            for encoder in self.encoders:
                encoder.to(device)
            self.device = device


def spare_memory(block):
    """Let a block of the autoencoder keep no more than its input for the backward where that is large.

    A gradient through the encoder of Stable Diffusion at 512 px then takes 1.4 GB, not 3.2, and a tenth more time.
    """
    plain = block.forward
    if "forward" in vars(block):  # another Prior has the same pipeline
        return

    def forward(x, *others, **named):
        if torch.is_grad_enabled() and x.requires_grad and x.shape[-2] * x.shape[-1] >= LARGE:
            return checkpoint(plain, x, *others, use_reentrant=False, **named)
        return plain(x, *others, **named)
    block.forward = forward
