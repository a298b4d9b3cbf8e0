"""What all representations of a scene share: rendering a view, photographs, evaluation, depth pictures, export.

    psnr, views = evaluate(nerf, scene)            # on the held-out views
    export(nerf, "out", turntable(nerf, 60, 256))  # renderings, depth and poses for other programs
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from files.pictures import frame_of, to_pil, to_uint8
from files.sheets import thumbnail
from files.writing import replacing
from scene.cameras import Camera
from scene.photographs import Pixels, View, over

SH_DC = 0.28209479  # the harmonic of degree 0

def spherical_harmonics(d):
    """Real spherical harmonics of degrees 0 to 3 at directions d [3,N] of length 1 -> [16,N]."""
    x, y, z = d
    xx, yy, zz = x * x, y * y, z * z
    return torch.stack((
        torch.full_like(x, SH_DC), -0.48860251 * y, 0.48860251 * z, -0.48860251 * x,
        1.09254843 * x * y, -1.09254843 * y * z, 0.94617470 * zz - 0.31539157, -1.09254843 * x * z,
        0.54627421 * (xx - yy), 0.59004359 * y * (yy - 3 * xx), 2.89061144 * x * y * z,
        0.45704580 * y * (1 - 5 * zz), 0.37317633 * z * (5 * zz - 3), 0.45704580 * x * (1 - 5 * zz),
        1.44530572 * z * (xx - yy), 0.59004359 * x * (3 * yy - xx)))


class Representation(torch.nn.Module):
    """A model of a scene that renders views from any camera and can be fitted and edited.

    A subclass defines rgb(camera) and depth(view, size), and for edits param_groups, project_, data_loss and save.

    Attributes:
        scene: the Scene.
        edited: the Scene whose training views an edit looks at and their numbers mean: the same, see `focus`.
        size: at which it looks at them, if `focus` has been called, else None.
        centre, background: the scene's, [3]; buffers, so they follow the module to its device.
    """

    def __init__(self, scene):
        super().__init__()
        self.scene = self.edited = scene
        self.size = None
        self.register_buffer("centre", scene.centre.clone())
        self.register_buffer("background", scene.background.clone())

    def rgb(self, camera):
        """The picture [3,H,W] of a Camera on the background; rounding may exceed [0,1] slightly."""
        raise NotImplementedError

    def render(self, view=None, size=None):
        """The picture [1,3,H,W] in [0,1] of a view, see `camera`; differentiable in all parameters."""
        rgb = self.rgb(self.camera(view, size))
        return (rgb + (rgb.clamp(0, 1) - rgb).detach())[None]  # the gradient passes through the clamp

    def camera(self, view=None, size=None):
        """A Camera. view: number of a training view, a Camera, or None for the most central one; size: see framed."""
        if view is None:
            position = torch.stack([v.camera.pose[:, 3] for v in self.scene.train])
            view = (position - position.mean(0)).norm(dim=1).argmin().item()
            view = self.scene.train[view].camera
        camera = view if isinstance(view, Camera) else self.edited.train[view].camera
        return camera if size is None else camera.framed(size)

    def focus(self, scene, size):
        """From now on an edit looks at the training views of another Scene of the same space, such as closer ones, at a
        size, see Camera.framed."""
        self.edited, self.size = scene, size

    def photograph(self, view, size):
        """Training picture number `view` on the background, [1,3,H,W], at the size of camera(view, size)."""
        pixels, camera = self.edited.train[view].picture(self.centre.device), self.camera(view, size)
        if frame_of(size).square:
            side = min(pixels.shape[1:])
            top, left = ((n - side) // 2 for n in pixels.shape[1:])
            pixels = pixels[:, top:top + side, left:left + side]
        return interpolate(over(pixels, self.background)[None], size=(camera.height, camera.width), mode="bicubic",
                           antialias=True).clamp(0, 1)

    def sample_view(self, generator=None):
        """The number of a random training view; generator: a CPU's."""
        return int(torch.randint(len(self.edited.train), (), generator=generator))

    def dataset(self, size, look):
        """Pixels of the pictures look(view, size) [1,3,H,W] of all training views, for an edit to replace."""
        cameras = [self.camera(i, size) for i in range(len(self.edited.train))]
        with torch.no_grad():
            pictures = [to_uint8(look(i, size)[0]).cpu() for i in range(len(cameras))]
        views = [View(c, p, str(i)) for i, (c, p) in enumerate(zip(cameras, pictures, strict=True))]
        return Pixels(views, self.centre.device)


@torch.no_grad()
def mean_psnr(representation, views):
    """Mean PSNR in dB over a list of View, on the background and without masked pixels; NaN for none."""
    psnrs = []
    for view in views:
        photograph = over(view.picture(representation.centre.device), representation.background)
        error = (representation.render(view.camera)[0] - photograph).square()
        error = error if view.mask is None else error[:, view.mask.to(error.device)]
        psnrs.append(-10 * math.log10(error.mean().item() + 1e-12))
    return sum(psnrs) / len(psnrs) if psnrs else math.nan


def evaluate(representation, scene):
    """Mean PSNR in dB over the scene's test views, see mean_psnr, and their number."""
    return mean_psnr(representation, scene.test), len(scene.test)


OVERFITTED = 6  # dB by which training views may be better than test views


def fit_report(representation, scene):
    """Lines for the user: mean PSNR of the training views, and a warning if the test views are much worse."""
    train, test = mean_psnr(representation, scene.train), mean_psnr(representation, scene.test)
    lines = [f"training PSNR {train:.1f} dB, {len(scene.train)} views"]
    if train - test > OVERFITTED:
        lines.append("the training views are reproduced, the test views are not: too few views, or wrong poses")
    return lines


@torch.no_grad()
def fit_pictures(representation, scene, most=5):
    """What a person should see of a fit: photographs of at most so many test views, or else of training views, their
    renderings, and their depth: three lists of [1,3,H,W] in [0,1]."""
    views = scene.test or scene.train
    views = views[::math.ceil(len(views) / most)]
    photographs = [over(view.picture(), scene.background)[None] for view in views]
    return (photographs, [representation.render(view.camera) for view in views],
            [depth_picture(representation.depth(view.camera)) for view in views])


def depth_picture(depth):
    """Depth [1,1,H,W] of a representation -> [1,3,H,W] in [0,1]: near is white, far is dark, empty is black."""
    hit = depth > 0
    if not hit.any():
        return torch.zeros_like(depth).expand(-1, 3, -1, -1)
    low, high = depth[hit].min(), depth[hit].max()
    if high > 5 * low:  # a capture: what is far would leave no shades for what is near
        depth, low, high = (-1 / x.clamp_min(1e-9) for x in (depth, low, high))
    return torch.where(hit, 1 - 0.8 * (depth - low) / (high - low).clamp_min(1e-6), 0).expand(-1, 3, -1, -1)


def depth_of(representation, camera, size):
    """depth_picture of what a Camera sees as a PIL picture of `size` pixels, drawn at no more than snapshot does."""
    side = min(size, getattr(representation, "shown", size))
    return thumbnail(to_pil(depth_picture(representation.depth(camera, side))), size)


def export(representation, folder, cameras):
    """Render views to images/*.png, depth/*.png and a transforms.json, for nerfstudio and load_scene.

    Poses are in the coordinates of the scene's file, in float64. Depth is 16 bit: z along the optical axis in
    thousandths of a unit, nerfstudio's convention.
    """
    folder, frames = Path(folder), []
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for i, camera in enumerate(cameras):
            with replacing(folder / "images" / f"{i:05}.png") as part:
                to_pil(representation.render(camera)).save(part, "PNG")
            axis = camera.directions()[2].abs()
            depth = representation.depth(camera).cpu()[0, 0] * axis.view(camera.height, camera.width)
            depth = (depth * 1000).round().clamp(0, 65535).numpy().astype(np.uint16)
            with replacing(folder / "depth" / f"{i:05}.png") as part:
                Image.fromarray(depth).save(part, "PNG")
            pose = torch.cat((camera.pose.double(), torch.tensor([[0.0, 0, 0, 1]])))
            pose[:3, 3] += torch.tensor(representation.scene.origin, dtype=torch.float64)
            names = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "k3", "k4", "p1", "p2")
            frames.append(dict(file_path=f"images/{i:05}.png", depth_file_path=f"depth/{i:05}.png",
                               transform_matrix=pose.tolist(), w=camera.width, h=camera.height)
                          | dict(zip(names, camera.lens, strict=True)))
    with replacing(folder / "transforms.json") as part:
        part.write_text(json.dumps({"camera_model": "OPENCV", "frames": frames}, indent=1))
