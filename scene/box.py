"""TODO docstring."""
import math

import torch

from scene.cameras import in_picture


def cell_points(cell, cells, offset=0.5):
    """Numbers [N] of the cells of a cubic grid -> points [3,N] in [0,1]; offset in the cell, 0.5 or [3,N]."""
    return (torch.stack((cell % cells, cell // cells % cells, cell // cells ** 2)) + offset) / cells


def contract(x):
    """Points [3,...] -> [3,...] inside the cube [-2,2]^3; the identity in [-1,1]^3.

    mip-NeRF 360, eq. 10, with the largest coordinate as the norm: the image is a cube, and fills the grid.
    """
    m = x.abs().amax(0).clamp_min(1)
    return x * ((2 - 1 / m) / m)


def uncontract(x):
    """The inverse of contract, [3,...]."""
    m = x.abs().amax(0).clamp(1, 2 - 1e-6)
    return x / (m * (2 - m))


def visual_hull(views, centre, half, extent, cells):
    """Which cells of the grid over [-extent, extent]^3 some view sees, and which of these may hold something.

    A cell that lies against a transparent background in any view is empty (space carving): the occupancy of
    an object starts near the truth. Pictures without alpha say nothing about emptiness.

    Returns:
        seen, hull: [cells^3] bool.
    """
    seen, alive = torch.zeros(cells ** 3, dtype=torch.bool), torch.arange(cells ** 3)
    for view in views:
        camera = view.camera
        fx, _, _, _, *distortion = camera.lens
        x = uncontract(cell_points(alive, cells) * (2 * extent) - extent) * half + centre[:, None]
        u, v, depth, inside = in_picture(camera, x)
        seen[alive[inside]] = True
        if view.pixels.shape[-1] == 4 and inside.any() and not any(distortion):
            # any pixel that the cell may touch speaks for it; sums over rectangles cost the same for any radius
            radius = fx * half * extent / cells * 3 ** 0.5 / depth[inside].min().item()
            radius = math.ceil(min(radius, max(camera.width, camera.height)))
            sums = torch.zeros(camera.height + 1, camera.width + 1, dtype=torch.int32)
            shown = view.pixels[..., 3] > 0
            shown = shown if view.mask is None else shown | ~view.mask  # what is masked says nothing
            sums[1:, 1:] = shown.int().cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
            row, column = v[inside].long(), u[inside].long()
            top, bottom = (row - radius).clamp_min(0), (row + radius + 1).clamp_max(camera.height)
            left, right = (column - radius).clamp_min(0), (column + radius + 1).clamp_max(camera.width)
            keep = ~inside
            keep[inside] = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] > 0
            alive = alive[keep]
    hull = torch.zeros_like(seen)
    hull[alive] = True
    return seen, hull & seen
