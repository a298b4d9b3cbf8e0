"""A field that is confined to a region: outside of it density and colour are those of a frozen copy.

    gate = Gate(copy.deepcopy(field).requires_grad_(False), region)
    sigma, rgb = gate.blended(field, x, sh)        # of the field where the region is, of the copy elsewhere
"""
from typing import NamedTuple

import torch
from torch.nn.functional import max_pool2d, max_pool3d

from scene.box import cell_points
from scene.region import Region, inside


class Still(NamedTuple):
    """The numbers [M] of the pixels of a picture that can change: their rays meet the region or pass within a pixel of
    it; of the frozen field the picture [3,H*W] and the depth [H*W] in half sides of the box, 0 where there is none."""
    open: torch.Tensor
    picture: torch.Tensor
    depth: torch.Tensor


class Gate(torch.nn.Module):
    """Where a field may change, and what it is elsewhere.

    Attributes:
        field: the frozen copy.
        cells: of a region.Region, the share of the field that learns.
        open: [G^3] bool, the cells of the occupancy around the region, and in it.
    """

    PIXELS = 2 ** 21  # the most of which `again` keeps pictures: 30 MB

    def __init__(self, field, region):
        super().__init__()
        self.field = field
        self.register_buffer("cells", region.cells.to(field.centre.device))
        places = cell_points(torch.arange(field.cells ** 3, device=field.centre.device), field.cells)
        reached = (inside(self.cells, places) > 0).view(1, 1, *[field.cells] * 3)
        self.register_buffer("open", max_pool3d(reached.float(), 3, 1, 1).view(-1) > 0)
        self.pictures, self.others = {}, {}  # see `still`, `again`

    def still(self, camera):
        """What stays in a view that the edit looks at, of the view without its shift: Still; None for other cameras.

        No other pixel can change, so that a step need not draw it again.
        """
        views, size = self.field.edited.train, self.field.size
        view = next((i for i, view in enumerate(views) if view.camera.pose is camera.pose), None)
        if view is None or size is None:
            return None
        plain = self.field.camera(view, size)
        if (plain.width, plain.height, plain.lens[0]) != (camera.width, camera.height, camera.lens[0]):
            return None
        if view not in self.pictures:
            self.pictures[view] = self._frozen(plain)
        return self.pictures[view]

    def again(self, camera):
        """The same for any camera, and the frozen field's depth [H*W]: a picture of the fit, from a side from which the
        edit is shown again, costs what can change alone."""
        if camera.key not in self.others:
            while self.others and sum(len(still.depth) for still in self.others.values()) > self.PIXELS:
                del self.others[next(iter(self.others))]  # the oldest
            self.others[camera.key] = self._frozen(camera)
        return self.others[camera.key]

    def unchanged(self, learning):
        """Whether the learning field still is the frozen one, as before the first step of an edit."""
        own = dict(learning.named_parameters())
        return all(torch.equal(own[name], frozen) for name, frozen in self.field.named_parameters())

    @torch.no_grad()
    def _frozen(self, camera):
        """What stays in the picture of a Camera: Still."""
        met = Region(self.field.scene, self.cells.cpu()).crossed(camera).float()
        picture, depth = self.field.looked(*camera.rays(self.cells.device))
        return Still(max_pool2d(met, 3, 1, 1).view(-1).nonzero()[:, 0].to(picture.device), picture, depth)

    def blended(self, learning, x, sh=None):
        """Density [N] at places x [3,N] in [0,1] and, with harmonics sh [16,N] of directions, rgb [3,N] or None.

        Both fields, the `learning` one and the frozen one, emit in proportion to their shares.
        """
        share, total, rgb = inside(self.cells, x), torch.zeros_like(x[0]), torch.zeros_like(x)
        for field, part in ((learning, share), (self.field, 1 - share)):
            on = part.nonzero()[:, 0]
            sigma, colour = field.look(x[:, on], None if sh is None else sh[:, on])
            sigma = sigma * part[on]
            total = total.index_add(0, on, sigma)
            if sh is not None:
                rgb = rgb.index_add(1, on, sigma * colour)
        return total, None if sh is None else rgb / total.clamp_min(1e-20)
