"""A region of a scene's space, in which an edit acts: lifted from masks of a few photographs, found, a box, or a ball.

    region = lifted(nerf, {3: mask}, size=64)        # from the mask of view 3, or of several views
    region = ball(scene, centre, radius)
    share = region.at(x)                             # [N] in [0,1] at points x [3,N]
    mask = region.seen(nerf, view=0, size=64)        # [1,1,H,W], where a view sees it
    nerf.focus(region.closer(), size=64)             # windows of the training views, around the region

Cells are those of a grid over the box, of captures over the contracted space, see box.py.
"""
import math
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import avg_pool3d, grid_sample, interpolate, max_pool2d, max_pool3d

from scene.box import cell_points, contract, uncontract
from scene.cameras import Camera, in_picture

CELLS, FINER = 64, 96  # of the grid, along each side; of a capture, whose box is the middle of a space twice as wide
MOST = 24  # views that masks are lifted with, and closer views: more show hardly anything new


class Region:
    """A soft part of space.

    Attributes:
        scene: the Scene.
        cells: [G,G,G] in [0,1], how much of each cell belongs to it, see `side_of`; x changes first, as in cell_points.
    """
    FILLED, SMALLEST = 0.6, 16  # share of the side of a closer view that the region takes; least side in pixels

    def __init__(self, scene, cells):
        self.scene, self.cells = scene, cells.float()

    def at(self, x):
        """The share [N] in [0,1] at points x [3,N] in units of the scene."""
        return inside(self.cells, _place(self.scene, x))

    @torch.no_grad()
    def seen(self, representation, view, size):
        """Where a training view sees the region, in front of the surface or on it: [1,1,H,W], 0 or 1."""
        look = Look.of(representation, view, size)
        # up to the surface, which is as uncertain as a cell is large
        return self.crossed(look.camera, torch.where(look.depth > 0, look.depth, math.inf)).float()

    def crossed(self, camera, limit=math.inf):
        """The pixels [1,1,H,W] bool of a Camera whose rays meet the region before a distance, [H*W] or one number, or a
        cell behind it."""
        on = self.cells.view(-1).nonzero()[:, 0]
        if not len(on):
            return torch.zeros(1, 1, camera.height, camera.width, dtype=torch.bool)
        x = _centres(self.scene, on)
        away, sides = (x - camera.pose[:, 3:]).norm(dim=0), _size(self.scene, x)
        low, high = (away.min() - sides.max()).clamp_min(0), away.max() + sides.max()
        steps = int(((high - low) / (0.25 * sides.min())).clamp(2, 512))
        rays_o, rays_d = camera.rays()
        found = torch.zeros(rays_o.shape[1], dtype=torch.bool)
        for t in torch.linspace(low, high, steps):
            x = rays_o + t * rays_d
            found |= (t <= limit + _size(self.scene, x)) & (self.at(x) > 0)
        return found.view(1, 1, camera.height, camera.width)

    def inner(self):
        """The cells that the region takes in the box of interest, [G,G,G] bool."""
        quarter, on = len(self.cells) // 4, self.cells > 0.5
        if not self.scene.bounded:  # the box is the middle of the contracted space
            middle = torch.zeros_like(on)
            middle[quarter:-quarter, quarter:-quarter, quarter:-quarter] = True
            on &= middle
        return on

    def main(self):
        """The largest connected part of the region in the box of interest, a Region: a subject that nobody drew."""
        on = self.inner()
        number = torch.arange(1.0, on.numel() + 1).view(1, 1, *on.shape) * on
        while not torch.equal(number, spread := max_pool3d(number, 3, 1, 1) * on):
            number = spread
        part = number.flatten().long()
        count = torch.bincount(part)
        count[0] = 0
        return Region(self.scene, (on & (part == count.argmax()).view_as(on)).float())

    def closer(self):
        """The scene with closer views for training: of photographs that show most of the region a square around it.

        A prior sees pictures of a fixed size, and of a thing that is small in a photograph hardly anything. Photographs
        that the region fills, and a scene of which none shows most of the region, stay as they are.
        """
        x, views = _centres(self.scene, (self.cells.view(-1) > 0.5).nonzero()[:, 0]), []
        for view in self.scene.train:
            camera, (u, v, _, within) = view.camera, in_picture(view.camera, x)
            if not len(x) or within.float().mean() < 0.5:
                continue
            low, high = (torch.stack((u, v))[:, within].quantile(share, 1) for share in (0.01, 0.99))
            side = max(int((high - low).max().item() / self.FILLED), self.SMALLEST)
            if side < min(camera.width, camera.height):
                left, top = (min(max(round(middle - side / 2), 0), n - side) for middle, n in zip(
                    ((low + high) / 2).tolist(), (camera.width, camera.height), strict=True))
                rows, columns = slice(top, top + side), slice(left, left + side)
                view = replace(view, camera=camera.window(left, top, side), pixels=view.pixels[rows, columns],
                               mask=None if view.mask is None else view.mask[rows, columns])
            views.append(view)
        return replace(self.scene, train=views[::math.ceil(len(views) / MOST)]) if views else self.scene


def side_of(scene):
    """G, the number of cells of the grid of a Scene along each side."""
    return CELLS if scene.bounded else FINER


def inside(cells, place):
    """The share [N] in [0,1] of the region of `cells` [G,G,G] at places [3,N] in [0,1] of the grid.

    The cells are interpolated. The share is 0 up to the border, where half of what is near belongs to the region, so
    that nothing beyond it changes; a quarter of a cell within, it is 1.
    """
    near = grid_sample(cells[None, None], (2 * place - 1).T[None, None, None], padding_mode="border",
                       align_corners=False).view(-1)
    return (4 * near - 2).clamp(0, 1)


def box(scene, low, high):
    """The Region between two corners, three numbers each in the units of the scene's file."""
    low, high = (torch.tensor(corner) for corner in zip(*map(sorted, zip(low, high, strict=True)), strict=True))
    return _where(scene, lambda x: ((x >= low[:, None]) & (x <= high[:, None])).all(0))


def ball(scene, centre, radius):
    """The Region around a centre, three numbers, up to a radius, in the units of the scene's file."""
    return _where(scene, lambda x: (x - torch.tensor(centre)[:, None]).norm(dim=0) <= radius)


def _where(scene, test):
    """The Region of the cells whose parts pass `test`, a function of points [3,N] in coordinates of the file -> [N]."""
    g, total, side = torch.Generator().manual_seed(0), 0, side_of(scene)
    for _ in range(8):
        offset = torch.rand(3, side ** 3, generator=g)
        total = total + test(_centres(scene, torch.arange(side ** 3), offset) + torch.tensor(scene.origin)[:, None])
    if not (total > 4).any():
        raise ValueError("the box or ball of the edit is empty, or smaller than a cell of "
                         f"{2 * scene.half * (1 if scene.bounded else 2) / side:.3g} units: give it in the units of "
                         f"{scene.path}, whose middle is at {(scene.centre + torch.tensor(scene.origin)).tolist()}")
    return Region(scene, (total / 8).view(side, side, side))


def _centres(scene, cell, offset=0.5):
    """Numbers [N] of cells -> points [3,N] in units of the scene; offset within the cell."""
    x = cell_points(cell, side_of(scene), offset)
    x = 2 * x - 1 if scene.bounded else uncontract(4 * x - 2)
    return x * scene.half + scene.centre[:, None]


def _place(scene, x):
    """Points [3,N] in units of the scene -> places [3,N] in [0,1], as shares of the grid."""
    x = (x - scene.centre[:, None]) / scene.half
    return (x + 1) / 2 if scene.bounded else (contract(x) + 2) / 4


def _size(scene, x):
    """Sides [N] of the cells around points x [3,N], in units of the scene."""
    side = 2 * scene.half / side_of(scene)
    if scene.bounded:
        return torch.full_like(x[0], side)
    return 2 * side * ((x - scene.centre[:, None]) / scene.half).abs().amax(0).clamp_min(1).square()


class Look(NamedTuple):
    """What a view shows: its camera, and of each of its P pixels the depth [P] along the ray, 0 where it meets nothing,
    the point [3,P] and the number [P] of its cell."""
    camera: Camera
    depth: torch.Tensor
    points: torch.Tensor
    cell: torch.Tensor

    @classmethod
    def of(cls, representation, view, size):
        camera = representation.camera(view, size)
        depth = representation.depth(camera).cpu().view(-1)
        rays_o, rays_d = camera.rays()
        points = rays_o + depth * rays_d
        side = side_of(representation.scene)
        at = (_place(representation.scene, points) * side).long().clamp(0, side - 1)
        return cls(camera, depth, points, at[0] + side * (at[1] + side * at[2]))

    def project(self, scene, x):
        """Points x [3,N] -> their pixels [N], whether these are in the picture, and how far [N] they lie behind the
        surface there, in sides of their cells, or of a thirtieth of their distance where that is less."""
        u, v, _, within = in_picture(self.camera, x)
        pixel = v.long().clamp(0, self.camera.height - 1) * self.camera.width + u.long().clamp(0, self.camera.width - 1)
        away = (x - self.camera.pose[:, 3:]).norm(dim=0)
        return pixel, within, (away - self.depth[pixel]) / torch.minimum(_size(scene, x), away / 30)


@torch.no_grad()
def lifted(representation, masks, size):
    """The Region that masks show: {number of a view that an edit looks at: [1,1,h,w] in [0,1]}, one at least; held-out
    views come after those for training.

    The surface that the views of `size` show is cut into cells. Every mask votes on those that its view sees; a cell
    that none of them sees gets the label of the cell with a label from which the way along the surface is shortest,
    where changes of colour, and colours unlike those with that label, make a way longer (geodesic segmentation, Bai and
    Sapiro 2009). The region is what all views see inside of the labelled surface.
    """
    scene, many = representation.edited, len(representation.edited.train)
    views = sorted({*range(0, many, math.ceil(many / MOST)), *(view for view in masks if view < many)})
    looks, cell, points, colours, _ = _surface(representation, views, size)
    votes = torch.zeros(2, len(cell))
    for view, mask in masks.items():
        look = looks[view] if view < many else Look.of(representation, scene.test[view - many].camera, size)
        own = interpolate(mask.cpu().float(), size=(look.camera.height, look.camera.width), mode="bilinear")
        # Beside the mask it is uncertain which surface a pixel shows: the far side must not get its label from there.
        clear = ((own > 0.5) | (max_pool2d(own, 5, 1, 2) <= 0.5)).view(-1)
        pixel, within, behind = look.project(scene, points)
        shown, own = within & (behind.abs() < 1.5) & clear[pixel], own.view(-1)
        votes[:, shown] += torch.stack((own[pixel[shown]], torch.ones(int(shown.sum()))))
    label = _spread(side_of(scene), cell, points / scene.half, colours, votes[1] > 0, votes[0] > 0.5 * votes[1])
    if not label.any():
        raise ValueError(f"{scene.path}: the masks show no surface of the scene")
    return _region(scene, looks.values(), cell, label)


@torch.no_grad()
def found(representation, maps, size):
    """The Region of the subject of an edit that nobody drew, in a capture: {number of a training view: [1,1,h,w]}, by
    how much better the source's prompt explains each place of the view than the target's, see masks.photograph_maps.

    Each cell of the surface gets the mean over all views that see it. In the box of interest Otsu's threshold parts
    what neither prompt explains from what may belong to the subject, a second one this from what surely does. The
    largest connected part of that is the core; from there to the surroundings labels spread as in `lifted`. A
    region that may not be the subject raises a UserWarning, see `_question`.
    """
    scene, side = representation.edited, side_of(representation.scene)
    looks, cell, points, colours, odds = _surface(representation, list(maps), size, maps)
    known = torch.zeros(2, side ** 3).index_copy(1, cell, torch.stack((odds, torch.ones_like(odds))))
    near = avg_pool3d(known.view(1, 2, side, side, side), 3, 1, 1).view(2, -1)[:, cell]
    odds, inner = near[0] / near[1], _cube(scene, cell, torch.ones_like(cell, dtype=torch.bool)).inner().flatten()[cell]
    if inner.sum() < 8:
        raise ValueError(f"{scene.path}: --local finds no surface in the box of interest: give --mask")
    odds = odds.clamp(max=odds[inner].quantile(0.99).item())
    low = otsu(odds[inner])
    core = _cube(scene, cell, odds > otsu(odds[inner & (odds > low)])).main().cells.flatten()[cell] > 0.5
    if not core.any() or odds[core].mean() <= 0:
        raise ValueError(f"{scene.path}: --local finds no subject amid the scene: give --mask")
    label = _spread(side, cell, points / scene.half, colours, core | (odds <= low), core)
    label = _cube(scene, cell, label).main().cells.flatten()[cell] > 0.5
    _question(scene, points, label, odds.clamp_min(0) * inner)
    return _region(scene, looks.values(), cell, label)


def _question(scene, points, label, speaks):
    """Warn where what `found` labelled, [N] bool, of a surface with points [3,N], may not be the subject: it holds less
    than 0.4 of all that speaks for the source's prompt, [N], or reaches the border of the box of interest, as a ground
    does. Of eight regions tried, the six right ones hold 0.48 or more, and none reaches farther than 0.87 of the way.
    """
    share = (speaks[label].sum() / speaks.sum()).item()
    reach = ((points[:, label] - scene.centre[:, None]) / scene.half).abs().amax(0).quantile(0.99)
    reason = (f"holds only {share:.0%} of what the source's prompt explains" if share < 0.4 else
              "reaches the border of the box of interest, as a ground does" if reach > 0.95 else None)
    if reason:
        warnings.warn(f"{scene.path}: --local is in doubt: the thing that it found {reason}; look at masks.png, or "
                      "give --mask", stacklevel=3)


def otsu(values):
    """The threshold [] that splits values of any shape into two groups with the most variance between them (Otsu 1979):
    the largest value of the lower group."""
    values = values.flatten().double().sort().values
    low = torch.arange(1, len(values), device=values.device)
    sums = values.cumsum(0)
    apart = sums[:-1] / low - (sums[-1] - sums[:-1]) / (len(values) - low)
    return values[(low * (len(values) - low) * apart.square()).argmax()].float()


def _surface(representation, views, size, maps=None):
    """The surface that training views of a size show: {view: Look}, the numbers [N] of its cells, and of each the mean
    point [3,N], colour [3,N] and value [N] of the maps, {view: [1,1,h,w]}; without maps 0."""
    looks, sums = {}, torch.zeros(8, side_of(representation.scene) ** 3)  # of points, colours, values and ones
    for view in views:
        look = looks[view] = Look.of(representation, view, size)
        colour = representation.photograph(view, size).cpu().view(3, -1)
        value = interpolate(maps[view].float(), size=(look.camera.height, look.camera.width), mode="bilinear") \
            if maps else torch.zeros_like(colour[0])
        hit = look.depth > 0
        rows = torch.cat((look.points, colour, value.view(1, -1), torch.ones_like(colour[:1])))
        sums.index_add_(1, look.cell[hit], rows[:, hit])
    cell = sums[7].nonzero()[:, 0]
    points, colours, value = (sums[:7, cell] / sums[7, cell]).split((3, 3, 1))
    return looks, cell, points, colours, value[0]


def _cube(scene, cell, on):
    """The Region of the cells, numbers [N], that are `on`, [N] bool."""
    side = side_of(scene)
    return Region(scene, torch.zeros(side ** 3).index_fill(0, cell[on], 1).view(side, side, side))


def _region(scene, looks, cell, label):
    """The Region that looks see inside of what is labelled, [N] bool, of a surface of cells, numbers [N]."""
    chosen, other = (_cube(scene, cell, on).cells.flatten() > 0 for on in (label, ~label))
    return Region(scene, _filled(scene, looks, chosen, other).view(*[side_of(scene)] * 3))


# By how much a step along the surface is longer that goes from black to white, and one that enters a cell whose colour
# is of the other label; share of the largest part that another one must have, else it is a speck.
EDGE, COLOUR, SPECK = 300, 30, 0.1


def _spread(side, cell, points, colours, decided, label):
    """Labels [N] bool for all of the cells, numbers [N], from those of the decided ones, by shortest ways.

    side: of the grid; points [3,N], colours [3,N] in [0,1] of the cells; decided, label: [N] bool. Specks of what is
    labelled are left out, as the depth is uncertain at edges.
    """
    number = torch.full((side + 2,) * 3, len(cell))
    at = torch.stack((cell // side ** 2, cell // side % side, cell % side)) + 1  # z, y, x
    number[at[0], at[1], at[2]] = torch.arange(len(cell))
    steps = [(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1) if (i, j, k) != (0, 0, 0)]
    beside = torch.stack([number[at[0] + i, at[1] + j, at[2] + k] for i, j, k in steps])  # [26,N]; N: none
    end = beside.clamp_max(len(cell) - 1)
    way = (points[:, end] - points[:, None]).norm(dim=0)
    way = way * (1 + EDGE * (colours[:, end] - colours[:, None]).square().mean(0))
    unlike = torch.stack([_unlike(colours, colours[:, decided & (label == kind)]) for kind in (False, True)])
    way = way * (1 + COLOUR * (unlike / unlike.sum(0).clamp_min(1e-6)).square())[:, None]  # [2,26,N]
    way = torch.where(beside < len(cell), way, math.inf)
    cost = torch.full((2, len(cell) + 1), math.inf)
    cost[0, :-1][decided & ~label] = 0
    cost[1, :-1][decided & label] = 0
    for _ in range(4 * side):
        shorter = torch.minimum(cost[:, :-1], (cost[:, beside] + way).amin(1))
        if torch.equal(shorter, cost[:, :-1]):
            break
        cost[:, :-1] = shorter
    label = torch.where(decided, label, cost[1, :-1] < cost[0, :-1])
    part = torch.where(label, torch.arange(len(cell)), len(cell))  # of the surface: the least number in it
    for _ in range(4 * side):
        least = torch.minimum(part, torch.cat((part, part.new_tensor([len(cell)])))[beside].amin(0))
        least = torch.where(label, least, len(cell))
        if torch.equal(least, part):
            break
        part = least
    many = torch.bincount(part, minlength=len(cell) + 1)
    return label & (many[part] >= SPECK * many[:-1].max())


def _unlike(colours, known, most=2000):
    """By how much colours [3,N] differ from the ten nearest of some known ones [3,M], on average: [N]."""
    known = known[:, ::math.ceil(max(1, known.shape[1]) / most)].T
    if not len(known):
        return torch.ones_like(colours[0])
    near = [torch.cdist(part, known).topk(min(10, len(known)), largest=False).values for part in colours.T.split(4096)]
    return torch.cat(near).mean(1)


def _filled(scene, looks, chosen, other):
    """The cells [G^3] that nearly all views see inside of the chosen surface, or behind it, and that surface.

    A view in which a cell is hidden by something else does not count; chosen, other: [G^3] bool, of the surface.
    """
    side = side_of(scene)
    cube = chosen.view(1, 1, side, side, side).float()
    near = max_pool3d(cube, 5, 1, 2).view(-1).nonzero()[:, 0]
    ends = torch.stack((near % side, near // side % side, near // side ** 2))
    low, high = ends.amin(1).tolist(), (ends.amax(1) + 1).tolist()
    span = [torch.arange(a, b) for a, b in zip(low, high, strict=True)]
    cell = (span[0] + side * (span[1][:, None] + side * span[2][:, None, None])).reshape(-1)
    x = _centres(scene, cell)
    votes = torch.zeros(2, len(cell))
    for look in looks:
        mask = (chosen[look.cell] & (look.depth > 0)).view(1, 1, look.camera.height, -1).float()
        mask = max_pool2d(mask, 3, 1, 1).view(-1) > 0
        pixel, within, behind = look.project(scene, x)
        counts = within & (mask[pixel] | (look.depth[pixel] == 0) | (behind < 1.5))
        votes += torch.stack((counts & mask[pixel], counts))
    full = chosen.clone()
    full[cell] |= (votes[1] > 0) & (votes[0] >= 0.9 * votes[1])
    return (full & ~other).float()
