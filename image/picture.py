"""A picture that is edited: its latent, or its pixels, as the one parameter."""
import copy
from pathlib import Path

import torch
from PIL import Image

from files.pictures import frame_of, to_pil
from files.writing import write


class Picture(torch.nn.Module):
    """A picture to edit; theta is its latent, which the prior's decoder draws, or the pixels themselves."""

    def __init__(self, pixels, prior, in_pixels=False, alpha=None):
        """pixels: [1,3,H,W] in [0,1]; in_pixels: optimise the pixels instead of the latent; alpha: a PIL picture of
        mode L that `save` puts back."""
        super().__init__()
        self.alpha, self.sides = alpha, (pixels.shape[3], pixels.shape[2])
        with torch.no_grad():
            theta = pixels.clone() if in_pixels else prior.encode(pixels)
        self.theta = torch.nn.Parameter(theta.to(prior.device))
        self.draw = (lambda theta: theta) if in_pixels else prior.decode
        self.in_pixels = in_pixels

    def __deepcopy__(self, memo):
        twin = copy.copy(self)
        twin._parameters = {"theta": torch.nn.Parameter(self.theta.detach().clone())}
        return twin

    def param_groups(self, rate, decay=0.0):
        """The groups for SteadyAdam: rate of the latent or the pixels, and its weight decay."""
        return [{"name": "theta", "params": [self.theta], "lr": rate, "decay": decay}]

    def sample_view(self, generator=None):
        """None: a picture has a single view."""
        return None

    def render(self, view=None, size=None):
        """[1,3,H,W] in [0,1]; size: a Frame, or the pixels of the shorter side; None: the original sides."""
        picture = self.draw(self.theta)
        width, height = self.sides if size is None else frame_of(size).sides(*self.sides)
        if (height, width) != picture.shape[2:]:
            picture = torch.nn.functional.interpolate(picture, size=(height, width), mode="bicubic").clamp(0, 1)
        return picture

    def latent(self, prior, size):
        """[1,C,h,w], differentiable: theta itself, or the encoded pixels at a size as in `render`."""
        return prior.encode(self.render(None, size)) if self.in_pixels else self.theta

    @torch.no_grad()
    def project_(self):
        """Clamp pixels to [0,1] after a step."""
        if self.in_pixels:
            self.theta.clamp_(0, 1)

    def put(self, pixels):
        """Replace the picture by these pixels [1,3,H,W]."""
        self.theta, self.draw, self.in_pixels = torch.nn.Parameter(pixels), lambda theta: theta, True

    @torch.no_grad()
    def save(self, path):
        """Write a PNG, with the alpha of the original picture."""
        picture = to_pil(self.render())
        if self.alpha is not None:
            picture.putalpha(self.alpha.resize(picture.size, Image.BOX))
        write(Path(path), picture)
