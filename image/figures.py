"""Figures of an edited picture: PSNR, LPIPS, and the change outside the subject."""
import math

import torch

from files.pictures import to_tensor


def perceptual(device="cpu"):
    """LPIPS (Zhang et al., arXiv 1801.03924): a differentiable function of two pictures [1,3,H,W] in [0,1] -> [], or
    None if the package lpips is not installed."""
    try:
        import lpips
    except ImportError:
        return None
    net = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False).to(device)
    return lambda a, b: net(a.float() * 2 - 1, b.float() * 2 - 1).mean()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two arrays or tensors of one shape in [0,1]; 100 if they are equal."""
    return -10 * math.log10(max(((a - b) ** 2).mean(), 1e-10))


def outside(before, after, masks):
    """One line about the change outside the masks: the PSNR in dB over all views.

    before, after: lists of PIL pictures, one per view; masks: [1,1,h,w] bool of any size, one per view.
    """
    was, now, pixels = [], [], 0
    for a, b, mask in zip(before, after, masks, strict=True):
        a, b = (to_tensor(picture)[0].permute(1, 2, 0) for picture in (a, b))
        rest = ~(torch.nn.functional.interpolate(mask.float(), size=a.shape[:2])[0, 0] > 0).cpu()
        was, now, pixels = [*was, a[rest]], [*now, b[rest]], pixels + rest.numel()
    was, now = torch.cat(was), torch.cat(now)
    change = f"PSNR {psnr(was, now):.1f} dB against the source" if len(was) else "nothing"
    return f"outside the subject, {100 * len(was) / pixels:.0f} % of the picture: {change}"
