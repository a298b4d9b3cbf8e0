"""Where an edit may act: a soft mask in [0,1] for every view, from the two prompts or from files of the user.

    masks = local_masks(prior, pictures, "red apple", "green apple")      # DiffEdit's, one for each picture
    masks = agree(nerf, masks, size=64)                                    # those of a scene's views vote on each point
    where = Where(masks)
    loss = pds_loss(..., mask=where(view, x0_tgt))                         # multiplies the push alone
"""
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, max_pool2d

from files.pictures import read_picture, to_tensor
from image.editors import _draw
from loop.progress import progress
from pds import predict
from scene.box import contract


@torch.no_grad()
def local_masks(prior, pictures, source, target, level=0.5, noises=16):
    """The soft masks of pictures [1,3,S,S], a list of [1,1,h,w]: DiffEdit's map, widened and blurred by a latent pixel.

    level: share of T that the pictures are noised to.
    """
    guidance, prior.guidance, generator, masks = prior.guidance, 1.0, torch.Generator().manual_seed(0), []
    y_tgt, y_src = prior.embed(target), prior.embed(source)
    for picture in progress(pictures, desc="masks", unit="view", disable=len(pictures) < 2):
        x0 = prior.encode(picture)
        inside = diffedit_map(prior, x0, y_tgt, y_src, noises, level, generator) > 0.5
        masks.append(avg_pool2d(max_pool2d(inside.float(), 3, 1, 1), 3, 1, 1, count_include_pad=False))
    prior.guidance = guidance
    return masks


def read_mask(path, sides):
    """A picture of the user as a mask [1,1,H,W] with sides (W, H): white is edited, black is kept. Raises ValueError."""
    try:
        return to_tensor(read_picture(path).convert("L").resize(sides, Image.BOX))[:, :1].float()
    except ValueError as e:
        raise ValueError(str(e).replace("no readable picture", "no readable mask")) from e


def read_masks(folder, names, sides):
    """The masks [1,1,H,W] in a folder for photographs of these names, with sides (W, H) each; a mask has its photograph's
    stem. Raises ValueError where one is missing.
    """
    found = {path.stem: path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in (".png", ".jpg")}
    stems = [Path(name).stem for name in names]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"{folder}: several photographs are named {twice[0]}, in folders of their own: which one a mask is "
                         "for is not clear")
    missing = [name for name in names if Path(name).stem not in found]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(names)} masks are missing, e.g. one for {missing[0]}")
    return [read_mask(found[Path(name).stem], own) for name, own in zip(names, sides)]


@torch.no_grad()
def agree(representation, masks, size, cells=32):
    """Masks [1,1,h,w] of all training views -> [1,1,H,W] that agree on every point of the scene, with the sides of
    representation.camera(view, size).

    Each pixel votes for the point that it shows; a view then sees the mean of all votes, so that one bad view does not
    leak. Where nothing is shown, a view keeps its own mask next to what the others agree on.
    """
    scene, extent = representation.scene, 1 if representation.scene.bounded else 2
    votes, seen = torch.zeros(2, cells ** 3), []
    for view, mask in enumerate(masks):
        camera = representation.camera(view, size)
        depth = representation.depth(camera).cpu().view(-1)
        rays_o, rays_d = camera.rays()
        x = contract((rays_o + depth * rays_d - scene.centre[:, None]) / scene.half) / extent  # [3,size^2]
        cell = ((x + 1) / 2 * cells).long().clamp(0, cells - 1)
        cell, hit = cell[0] + cells * (cell[1] + cells * cell[2]), depth > 0
        own = interpolate(mask.cpu(), size=(camera.height, camera.width), mode="bilinear")
        votes.index_add_(1, cell[hit], torch.stack((own.view(-1), torch.ones(own.numel())))[:, hit])
        seen.append((cell, hit.view_as(own), own))
    vote, agreed = votes[0] / votes[1].clamp_min(1), []
    for cell, hit, own in seen:
        fused, near = torch.where(hit, vote[cell].view_as(own), 0), min(own.shape[2:]) // 16
        agreed.append(torch.where(hit, fused, own.minimum(max_pool2d(fused, 2 * near + 1, 1, near))))
    return agreed


class Where:
    """The mask of a view: one of a list by the number of a training view, or one mask, moved along with a drawing."""

    def __init__(self, masks, sides=None):
        """masks: a list of [1,1,h,w] in [0,1]; sides: (W, H) in pixels of a drawing."""
        self.masks, self.sides = masks, sides

    def __call__(self, view, like):
        """[1,1,h,w] for a latent `like` [B,C,h,w]. view: a number; or the shift (dx, dy) in pixels of a drawing, or
        None."""
        mask = self.masks[view if isinstance(view, int) else 0].to(like)
        if isinstance(view, tuple):
            dx, dy = view
            theta = like.new_tensor([[[1, 0, -2 * dx / self.sides[0]], [0, 1, -2 * dy / self.sides[1]]]])
            mask = grid_sample(mask, affine_grid(theta, mask.shape, align_corners=False), padding_mode="border",
                               align_corners=False)
        return interpolate(mask, size=like.shape[2:], mode="area")


@torch.no_grad()
def diffedit_map(prior, x0, y_tgt, y_src, noises=16, level=0.5, generator=None):
    """How much the two prompts disagree about the picture, [B,1,h,w] from 0 up: DiffEdit, step 1.

    The difference of the two noise predictions at `level` T, averaged over several noises and channels, is
    scaled so that its 98th percentile is 1 (a single extreme must not decide). y_tgt, y_src: a row each.
    """
    total, together = 0, 4  # noises in a network call
    for noise in torch.cat([_draw(x0, generator) for _ in range(noises)]).split(together * len(x0)):
        of = x0.repeat(len(noise) // len(x0), 1, 1, 1)
        t = torch.full((len(of),), int(level * len(prior.abar)), device=x0.device)
        eps_tgt, eps_src = predict(prior, t, noise, (of, y_tgt), (of, y_src))
        total = total + (eps_tgt - eps_src).abs().mean(1, keepdim=True).unflatten(0, (-1, len(x0))).sum(0)
    return total / total.flatten(1).quantile(0.98, dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)


def diffedit_mask(prior, x0, y_tgt, y_src, noises=16, level=0.5, generator=None):
    """Where the two prompts disagree about the picture, [B,1,h,w] bool: DiffEdit's map, cut at one half."""
    return diffedit_map(prior, x0, y_tgt, y_src, noises, level, generator) > 0.5


@torch.no_grad()
def subject_masks(prior, pictures, source, target, noises=8):
    """The subject of an edit in pictures [1,3,S,S]: a list of [1,1,h,w] bool, the DiffEdit mask of the two prompts,
    widened by one latent pixel. It leaves the prior with a guidance of 1."""
    prior.guidance, generator, masks = 1.0, torch.Generator().manual_seed(0), []
    for picture in pictures:
        x0 = prior.encode(picture)
        mask = diffedit_mask(prior, x0, prior.embed(target), prior.embed(source), noises, generator=generator)
        masks.append(torch.nn.functional.max_pool2d(mask.float(), 3, 1, 1) > 0)
    return masks
