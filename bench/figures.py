"""Figures of an edit: SSIM, log-odds under a prior, CLIP scores, peak memory."""
import contextlib
import functools
import logging
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pds
from bench.judge import load
from bench.measure import memory_status
from files.pictures import frame_of, to_tensor
from image.editors import prompts
from image.figures import psnr

SIDE, THUMB, SCENE_THUMB = 256, 192, 160  # side in pixels of measured pictures, on a sheet, on the sheet of a scene


def pixels(picture, size=SIDE):
    """PIL picture -> [1,3,H,W] float64 in [0,1]; size: a Frame, or the pixels of the shorter side."""
    sides = frame_of(size).sides(*picture.size)
    return to_tensor(picture.convert("RGB").resize(sides, Image.LANCZOS))  # the identity for a picture of that size


def ssim(a, b):
    """Structural similarity of two pictures [1,3,H,W] in [0,1] (Wang et al. 2004); 1 if they are equal.

    A Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03; the mean over the three channels and all
    positions where the whole window fits.
    """
    line = (-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5 ** 2)).exp()
    window, conv = (line / line.sum()).expand(3, 1, 1, 11), torch.nn.functional.conv2d

    def local(x):  # along the rows, then along the columns
        return conv(conv(x, window, groups=3), window.mT, groups=3)
    mean_a, mean_b, c1, c2 = local(a), local(b), 0.01 ** 2, 0.03 ** 2
    var_a, var_b, both = local(a * a) - mean_a ** 2, local(b * b) - mean_b ** 2, local(a * b) - mean_a * mean_b
    share = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return share.mean().item()


def silhouette_iou(a, b, threshold=8 / 255):
    """Intersection over union of the silhouettes of two pictures [1,3,H,W] in [0,1] on white; 1 if both are empty.

    A silhouette is the set of pixels that have a channel more than `threshold` below white.
    """
    a, b = (picture.amin(1) < 1 - threshold for picture in (a, b))
    return ((a & b).sum() / (a | b).sum()).item() if (a | b).any() else 1.0


@torch.no_grad()
def log_odds(prior, x0, y_tgt, y_src, noises=8):
    """log p(y_tgt | x0) - log p(y_src | x0) of a latent x0 [1,C,h,w], by the diffusion classifier (Li et al., arXiv
    2303.16203) with uniform weights instead of the bound's. Above 0 the picture reads as the target.

    The mean of |noise - eps(x_t, y_src)|^2 - |noise - eps(x_t, y_tgt)|^2, summed over the latent at guidance 1, over
    pairs of noise and timestep (0.2 T to 0.9 T) that are the same for every picture, so that common errors cancel.
    """
    T, generator = len(prior.abar), torch.Generator().manual_seed(0)
    t = torch.linspace(0.2 * T, 0.9 * T, noises).round().long().to(x0.device)
    noise = torch.randn(noises, *x0.shape[1:], generator=generator).to(x0)
    many = x0.expand(noises, -1, -1, -1)
    eps_tgt, eps_src = pds.predict(prior.at(1.0), t, noise, (many, y_tgt), (many, y_src))
    return ((noise - eps_src).square() - (noise - eps_tgt).square()).sum((1, 2, 3)).mean().item()


class Clip:
    """A CLIP model loaded by transformers; name: a folder or hub id. Raises ValueError if there is none."""

    def __init__(self, name, device):
        from transformers import CLIPModel, CLIPProcessor
        quiet = logging.getLogger("huggingface_hub")
        level, _ = quiet.level, quiet.setLevel(logging.CRITICAL)
        try:
            model, info = CLIPModel.from_pretrained(name, output_loading_info=True)
            self.processor = CLIPProcessor.from_pretrained(name)
        except Exception as e:  # each library raises its own kind of error
            where = "damaged, or no CLIP" if Path(name).exists() else "no such directory, and no CLIP on the hub"
            raise ValueError(f"{name}: {where}: {(str(e).strip() or type(e).__name__).splitlines()[0][:200]}") from e
        finally:
            quiet.setLevel(level)
        if info["missing_keys"]:  # transformers would continue with random weights
            raise ValueError(f"{name}: damaged, or no CLIP: {len(info['missing_keys'])} of its weights are missing")
        self.name, self.device, self.model = name, device, model.eval().to(device)

    @torch.no_grad()
    def scores(self, before, after, source, target):
        """CLIP score and directional score of an edit, means over its pictures; before, after: lists of PIL pictures.

        The first is the cosine of the edited picture and the target prompt, the second the cosine of the two changes,
        after - before and target - source (Gal et al., StyleGAN-NADA, arXiv 2108.00946), of normalised embeddings.
        """
        inputs = self.processor(text=[source, target], images=[*before, *after], return_tensors="pt", padding=True,
                                truncation=True)
        out, cosine = self.model(**inputs.to(self.device)), torch.nn.functional.cosine_similarity
        was, now = out.image_embeds.chunk(2)
        y_src, y_tgt = out.text_embeds.chunk(2)
        return cosine(now, y_tgt).mean().item(), cosine(now - was, y_tgt - y_src).mean().item()


@functools.cache
def shipped_judge():
    """The judge in the folder of the shipped prior; it shares no weights with it. Its model card states its limits."""
    return load(Path(__file__).resolve().parent.parent / "models" / "emoji")


def figures(prior, before, after, args, lpips=None, clip=None):
    """The figures of an edit, {column: figure}, as means over PIL pictures; args: the completed options."""
    y_src, y_tgt = map(prior.embed, prompts(args))

    def odds(picture):
        with torch.no_grad():
            return log_odds(prior, prior.encode(pixels(picture, args.frame)), y_tgt, y_src)
    pairs = [(pixels(a), pixels(b)) for a, b in zip(before, after, strict=False)]
    row = {"before": np.mean([odds(p) for p in before]), "log-odds": np.mean([odds(p) for p in after]),
           "PSNR": np.mean([psnr(a, b) for a, b in pairs]), "SSIM": np.mean([ssim(a, b) for a, b in pairs]),
           "IoU": np.mean([silhouette_iou(a, b) for a, b in pairs])}
    judged = shipped_judge().scores(before, after, args.source, args.target)
    row |= {"named": judged["named"], "turn": judged["direction"]}
    if lpips:
        row["LPIPS"] = np.mean([lpips(a, b).item() for a, b in pairs])
    if clip:
        row["CLIP"], row["dir"] = clip.scores(before, after, args.source, args.target)
        row["clip"] = clip.name
    return {k: v if k == "clip" else float(v) for k, v in row.items()}


def restart_peak(device):
    """Reset the peak of memory: on a CUDA device, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    """Peak memory in MB since restart_peak: of the CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if Path("/proc/self/status").exists():
        return memory_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
