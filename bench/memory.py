"""Memory of a PDS step by part: the weights, the encoder with its gradient, the network."""
import os
from pathlib import Path

import torch

from bench.measure import memory_status, table
from pds import pds_loss
from pipelines.loading import number_format, quiet
from pipelines.networks import STABLE_DIFFUSION_BETAS
from prior import Prior

BARS = {torch.float32: 8.7e9, torch.float16: 6e9, torch.bfloat16: 6e9}  # bytes, for Stable Diffusion 1.5 at 512 px


def memory(args):
    """Measure a PDS step of args.model, or of a model with the shapes of Stable Diffusion 1.5 (args.sd15)."""
    if args.sd15:
        with quiet():
            prior = Prior(stable_diffusion_15(number_format(args.device, args.dtype)), device=args.device)
    else:
        prior = Prior.from_pretrained(args.model, args.device, args.dtype)
    measure, size = meter(prior.device), args.size or prior.size
    y_tgt, y_src = prior.embed("a photo of a clown"), prior.embed("a photo of a man")
    prior.unconditional()
    picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(prior.device).requires_grad_()
    with torch.no_grad():
        x0_src = prior.encode(picture)  # moves the text encoders off the device
    weights = {part: sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
               for part, module in prior.pipe.components.items() if isinstance(module, torch.nn.Module)}
    there = sum(count for part, count in weights.items()
                if prior.device.type == "cpu" or not part.startswith("text_encoder"))
    t = torch.tensor([len(prior.abar) // 2])
    with torch.no_grad():
        x_t, y = torch.cat([x0_src, x0_src]), tuple(map(torch.cat, zip(y_tgt, y_src, strict=True)))
        _, network, _ = measure(lambda: prior.eps(x_t, t.repeat(2), y))
    encoded, encoding, graph = measure(lambda: [prior.encode(picture)])
    _, backward, _ = measure(lambda: encoded.pop().sum().backward())
    _, step, _ = measure(lambda: pds_loss(prior, prior.encode(picture), x0_src, y_tgt, y_src, t).backward())

    def gigabytes(count):
        return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    bar = BARS[prior.network.module.dtype] if args.sd15 else None
    rows = [(f"weights, {part}", gigabytes(count), "", None) for part, count in weights.items()]
    rows += [("the network, no gradient: peak", gigabytes(network), "", None),
             ("encode with gradient: peak", gigabytes(encoding), "", None),
             ("encode with gradient: kept for the backward", gigabytes(graph), "", None),
             ("backward through the encoder: peak above that", gigabytes(backward), "", None),
             ("a whole step: peak above the weights", gigabytes(step), "", None),
             (f"weights on {prior.device} and a step", gigabytes(there + step), f"<= {gigabytes(bar)}" if bar else "",
              there + step <= bar if bar else None)]
    if prior.device.type == "cpu" and Path("/proc/self/status").exists():
        rows.append(("peak of the process, with all libraries", gigabytes(memory_status("VmHWM") * 2 ** 20), "", None))
    shown = "the shapes of Stable Diffusion 1.5" if args.sd15 else args.model
    return table(f"a PDS step, {shown}, {size} px, {str(prior.network.module.dtype).removeprefix('torch.')}", rows)


def meter(device):
    """A function that makes a call and returns (result, peak bytes, bytes still allocated), both above those before.

    On CUDA the allocator counts bytes, on a CPU torch's profiler, which records all allocations and frees of tensors.
    """
    def cuda(call):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before

    def cpu(call):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own messages
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return result, peak, live
    return cuda if device.type == "cuda" else cpu


def stable_diffusion_15(dtype):
    """A pipeline with the shapes of Stable Diffusion 1.5 and random weights: 4.3 GB in float32.

    860 M parameters in the UNet, 123 M in CLIP ViT-L/14's text encoder, 84 M in the autoencoder. The tokenizer is the
    one in models/emoji.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    wide = dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2)
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**wide, scaling_factor=0.18215, sample_size=512),
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).to(dtype),
        text_encoder=CLIPTextModel(text).to(dtype),
        tokenizer=CLIPTokenizer.from_pretrained("models/emoji/tokenizer", model_max_length=77),
        scheduler=diffusers.DDIMScheduler(**STABLE_DIFFUSION_BETAS, steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
