"""A field that is confined to a region: outside of it density and colour are those of a frozen copy.

    gate = Gate(copy.deepcopy(field).requires_grad_(False), region)
    sigma, rgb = gate.blended(field, x, sh)        # of the field where the region is, of the copy elsewhere
"""
import torch

from scene.box import cell_points
from scene.region import inside


class Gate(torch.nn.Module):
    """Where a field may change, and what it is elsewhere.

    Attributes:
        field: the frozen copy.
        cells: of a region.Region, the share of the field that learns.
        open: [G^3] bool, the cells of the occupancy that reach into the region.
    """

    def __init__(self, field, region):
        super().__init__()
        self.field = field
        self.register_buffer("cells", region.cells.to(field.centre.device))
        places = cell_points(torch.arange(field.cells ** 3, device=field.centre.device), field.cells)
        self.register_buffer("open", inside(self.cells, places) > 0)

    def blended(self, learning, x, sh=None):
        """Density [N] at places x [3,N] in [0,1] and, with harmonics sh [16,N] of directions, rgb [3,N] or None.

        Both fields, the `learning` one and the frozen one, emit in proportion to their shares.
        """
        share, total, rgb = inside(self.cells, x), torch.zeros_like(x[0]), torch.zeros_like(x)
        for field, part in ((learning, share), (self.field, 1 - share)):
            on = part.nonzero()[:, 0]
            sigma, out = field.density(field.grid(x[:, on]))
            sigma = sigma * part[on]
            total = total.index_add(0, on, sigma)
            if sh is not None:
                rgb = rgb.index_add(1, on, sigma * field.colour(out, sh[:, on]))
        return total, None if sh is None else rgb / total.clamp_min(1e-20)
