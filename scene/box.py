"""The box of interest and the space around it: grid cells, the contraction of unbounded space, the visual hull.

    seen, hull = visual_hull(scene.train, scene.centre, scene.half, 1, 64)   # [64^3] bool each

Grids cover [-1,1]^3, the box in half sides; captures are contracted into [-2,2]^3.
"""
import math

import torch

from scene.cameras import in_picture


def cell_points(cell, cells, offset=0.5):
    """Numbers [N] of cells in a cubic grid -> points [3,N] in [0,1]; offset within the cell: a number or [3,N]."""
    return (torch.stack((cell % cells, cell // cells % cells, cell // cells ** 2)) + offset) / cells


def contract(x):
    """Points [3,...] -> [3,...] inside the cube [-2,2]^3; the identity in [-1,1]^3.

    mip-NeRF 360 (Barron et al., arXiv 2111.12077), eq. 10, with the maximum norm: the image is a cube, like the grid.
    """
    m = x.abs().amax(0).clamp_min(1)
    return x * ((2 - 1 / m) / m)


def uncontract(x):
    """The inverse of contract, [3,...]."""
    m = x.abs().amax(0).clamp(1, 2 - 1e-6)
    return x / (m * (2 - m))


def visual_hull(views, centre, half, extent, cells):
    """Space carving in a grid over [-extent, extent]^3 around centre [3], in units of half.

    A cell that some view sees against a transparent background is empty, so the occupancy of an object starts near the
    truth. Pictures without alpha carve nothing.

    Returns:
        seen, hull: [cells^3] bool, the cells in sight of a view, and those of them that are not carved away.
    """
    seen, alive = torch.zeros(cells ** 3, dtype=torch.bool), torch.arange(cells ** 3)
    for view in views:
        camera = view.camera
        fx, _, _, _, *distortion = camera.lens
        x = uncontract(cell_points(alive, cells) * (2 * extent) - extent) * half + centre[:, None]
        u, v, depth, inside = in_picture(camera, x)
        seen[alive[inside]] = True
        if view.pixels.shape[-1] == 4 and inside.any() and not any(distortion):
            # a cell stays if any pixel that it may touch is opaque; summed areas cost the same for any radius
            radius = fx * half * extent / cells * 3 ** 0.5 / depth[inside].min().item()
            radius = math.ceil(min(radius, max(camera.width, camera.height)))
            sums = torch.zeros(camera.height + 1, camera.width + 1, dtype=torch.int32)
            shown = view.pixels[..., 3] > 0
            shown = shown if view.mask is None else shown | ~view.mask  # masked pixels carve nothing
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


NEAR, FEWEST = 0.6, 3  # of the depth of a view's nearest points; views that must see a cell


def in_sight(views, points, centre, half, cells):
    """The cells of a capture that can hold something, [cells^3] bool, and the nearest near plane of a view, or 0.

    A view sees nothing before its near plane, at NEAR times the depth of the nearest of the points [N,3] in its
    picture: without that, every view is explained by a fog of its own before the camera. What only one or two of many
    views see could be anywhere along their rays; what FEWEST views see must agree.

    Args:
        points: of the capture's cloud, [N,3] in the units of the scene; None: there are no near planes.
        centre, half: see visual_hull; the grid covers the contracted space.
    """
    x = uncontract(cell_points(torch.arange(cells ** 3), cells) * 4 - 2) * half + centre[:, None]
    clear, count, planes = torch.ones(cells ** 3, dtype=torch.bool), torch.zeros(cells ** 3), []
    for view in views:
        plane = 0.0
        if points is not None:
            _, _, depth, there = in_picture(view.camera, points.T)
            plane = NEAR * depth[there].quantile(0.02).item() if there.sum() > 20 else 0.0
        _, _, depth, there = in_picture(view.camera, x)
        clear &= ~there | (depth >= plane)
        count += there
        planes.append(plane)
    # views that look outwards share little with one another
    fewest = min(FEWEST, math.ceil(count.max().item() / 7))
    return clear & (count >= fewest), min(planes)


def sightings(views, points):
    """The pixels in which views show points [N,3]: their views, columns, rows, and distances from the camera, [M] each.

    A point counts as hidden where another one is nearer by a tenth within a sixteenth of the picture around it. Of a
    large cloud about four thousand points are taken, as the search for neighbours is quadratic.
    """
    points, found = points[::math.ceil(len(points) / 4000)], []
    for i, view in enumerate(views):
        camera = view.camera
        u, v, depth, there = in_picture(camera, points.T)
        at = torch.stack((u, v), 1)[there]
        near = torch.cdist(at, at) < max(camera.width, camera.height) / 16
        shown = depth[there] < 1.1 * torch.where(near, depth[there], math.inf).amin(1)
        away = (points[there] - camera.pose[:, 3]).norm(dim=1)[shown]
        found.append((torch.full_like(away, i).long(), *at[shown].long().T, away))
    return [torch.cat(column) for column in zip(*found, strict=True)]
