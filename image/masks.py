"""Where an edit may act: a soft mask in [0,1] for every view, from the two prompts or from the user's files.

    masks = local_masks(prior, pictures, "red apple", "green apple")       # DiffEdit's, one per picture
    masks = agree(nerf, masks, size=64)                                    # the views of a scene vote on every point
    where = Where(masks)
    loss = pds_loss(..., mask=where(view, x0_tgt))                         # multiplies the push alone
"""
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, max_pool2d

from files.pictures import read_picture, to_pil, to_tensor
from files.sheets import beside
from image.editors import draw_noise
from loop.progress import progress
from pds import predict
from scene.box import contract


@torch.no_grad()
def diffedit_map(prior, x0, y_tgt, y_src, noises=16, level=0.5, generator=None):
    """How much two prompts disagree about a latent x0 [B,C,h,w]: [B,1,h,w] >= 0, step 1 of DiffEdit (arXiv 2210.11427).

    The difference of the two noise predictions at timestep `level` T, averaged over noises and channels and scaled so
    that its 98th percentile is 1, which is robust against outliers. y_tgt, y_src: one row each.
    """
    total, together = 0, 4  # noises per network call
    for noise in torch.cat([draw_noise(x0, generator) for _ in range(noises)]).split(together * len(x0)):
        many = x0.repeat(len(noise) // len(x0), 1, 1, 1)
        t = torch.full((len(many),), int(level * len(prior.abar)), device=x0.device)
        eps_tgt, eps_src = predict(prior, t, noise, (many, y_tgt), (many, y_src))
        total = total + (eps_tgt - eps_src).abs().mean(1, keepdim=True).unflatten(0, (-1, len(x0))).sum(0)
    return total / total.flatten(1).quantile(0.98, dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)


def diffedit_mask(prior, x0, y_tgt, y_src, noises=16, level=0.5, generator=None):
    """Where the two prompts disagree about a latent: [B,1,h,w] bool, DiffEdit's map thresholded at one half."""
    return diffedit_map(prior, x0, y_tgt, y_src, noises, level, generator) > 0.5


@torch.no_grad()
def _widened(prior, pictures, source, target, noises):
    """DiffEdit's masks of pictures [1,3,S,S], dilated by one latent pixel: a list of [1,1,h,w], 0 or 1."""
    prior, generator, masks = prior.at(1.0), torch.Generator().manual_seed(0), []
    y_tgt, y_src = prior.embed(target), prior.embed(source)
    for picture in progress(pictures, desc="masks", unit="view", disable=len(pictures) < 2):
        mask = diffedit_mask(prior, prior.encode(picture), y_tgt, y_src, noises, generator=generator)
        masks.append(max_pool2d(mask.float(), 3, 1, 1))
    return masks


def local_masks(prior, pictures, source, target):
    """Soft masks [1,1,h,w] of pictures [1,3,S,S] for --local: DiffEdit's, dilated and blurred by one latent pixel."""
    return [avg_pool2d(mask, 3, 1, 1, count_include_pad=False)
            for mask in _widened(prior, pictures, source, target, noises=16)]


def subject_masks(prior, pictures, source, target):
    """The subject of an edit in pictures [1,3,S,S], for the report: DiffEdit's masks, dilated, [1,1,h,w] bool each."""
    return [mask > 0 for mask in _widened(prior, pictures, source, target, noises=8)]


@torch.no_grad()
def photograph_maps(prior, pictures, source, target, noises=8, level=0.5):
    """How much better the source's prompt explains photographs [1,3,S,S] than the target's, place by place: a list of
    [1,1,h,w], to be lifted onto a scene, see region.found.

    The log-odds of the diffusion classifier (Li et al., arXiv 2303.16203) before they are summed: at timestep `level` T
    |noise - eps(y_tgt)|^2 - |noise - eps(y_src)|^2, the mean over noises and channels. In a photograph the prompts
    disagree about everything a little, which is all that DiffEdit's map can say; but only of the subject is one right.
    """
    prior, generator, maps = prior.at(1.0), torch.Generator().manual_seed(0), []
    y_tgt, y_src, t = prior.embed(target), prior.embed(source), int(level * len(prior.abar))
    for picture in progress(pictures, desc="masks", unit="view"):
        x0 = prior.encode(picture)
        noise = torch.cat([draw_noise(x0, generator) for _ in range(noises)])
        many, t_all = x0.expand(noises, -1, -1, -1), torch.full((noises,), t, device=x0.device)
        eps_tgt, eps_src = predict(prior, t_all, noise, (many, y_tgt), (many, y_src))
        odds = (noise - eps_tgt).square() - (noise - eps_src).square()
        maps.append(odds.mean((0, 1))[None, None].cpu())
    return maps


def read_mask(path, sides):
    """A picture file as a mask [1,1,H,W] of sides (W, H): white is edited, black is kept. Raises ValueError."""
    try:
        return to_tensor(read_picture(path).convert("L").resize(sides, Image.BOX))[:, :1].float()
    except ValueError as e:
        raise ValueError(str(e).replace("no readable picture", "no readable mask")) from e


def read_masks(path, names, sides):
    """The masks of some of the photographs `names`, each of sides (W, H): {number of a photograph: [1,1,H,W]}.

    path: a mask, or a folder of them, named like the photographs except for the ending. Raises ValueError if there is
    none of any photograph, or the names are ambiguous.
    """
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = {file.stem: file for file in files if file.suffix.lower() in (".png", ".jpg")}
    stems = [Path(name).stem for name in names]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1} & found.keys()):
        raise ValueError(f"{path}: several photographs, in different folders, are named {twice[0]}: it is unclear to "
                         "which one a mask belongs")
    if not found.keys() & set(stems):
        raise ValueError(f"{path}: no mask in it is named like a photograph, e.g. {stems[0]}.png for {names[0]}")
    return {number: read_mask(found[stem], own) for number, (stem, own) in enumerate(zip(stems, sides, strict=True))
            if stem in found}


@torch.no_grad()
def agree(representation, masks, size, cells=32):
    """Make the masks of all training views consistent: [1,1,h,w] each -> [1,1,H,W], the sides of camera(view, size).

    Each pixel votes for the scene point that it shows, and a view's new mask is the mean vote of its points, so that
    one bad view does not leak. Where the scene is empty, a view keeps its own mask close to what the others agree on.
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
    """The mask of a view: by the number of a training view, or one mask that is shifted along with a drawing."""

    def __init__(self, masks, sides=None):
        """masks: a list of [1,1,h,w] in [0,1]; sides: (W, H) of a drawing in pixels."""
        self.masks, self.sides = masks, sides

    def __call__(self, view, like):
        """[1,1,h,w] for a latent `like` [B,C,h,w]; view: a number, a drawing's shift (dx, dy) in pixels, or None."""
        mask = self.masks[view if isinstance(view, int) else 0].to(like)
        if isinstance(view, tuple):
            dx, dy = view
            theta = like.new_tensor([[[1, 0, -2 * dx / self.sides[0]], [0, 1, -2 * dy / self.sides[1]]]])
            mask = grid_sample(mask, affine_grid(theta, mask.shape, align_corners=False), padding_mode="border",
                               align_corners=False)
        return interpolate(mask, size=like.shape[2:], mode="area")

    @torch.no_grad()
    def sheet(self, source, size, views):
        """A page of what at most twelve of the views show before an edit, dark where the masks keep it."""
        pictures = []
        for view in views[::max(1, len(views) // 12)][:12]:
            picture = source.render(view, size)
            mask = interpolate(self.masks[view or 0].to(picture), size=picture.shape[2:], mode="nearest")
            pictures.append(to_pil(picture * (0.25 + 0.75 * mask)))
        rows = [beside(pictures[start:start + 4]) for start in range(0, len(pictures), 4)]
        page = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
        for i, row in enumerate(rows):
            page.paste(row, (0, i * rows[0].height))
        return page
