"""Smooth changes of a field's colours: over the places, or over the colours themselves.

    tint, lut = Tint(), LookUpTable()
    rgb = tint(x, rgb)                             # [3,N] at places x [3,N] in [0,1]
    rgb = lut(rgb)
"""
import torch
from torch.nn.functional import grid_sample


class Tint(torch.nn.Module):
    """What is added to the logits of colours: it varies slowly in space, the hue more slowly than the lightness, and
    covers what is there: dark paint hides dark and light details alike.

    An MLP maps what looked alike to what looks alike, so that an eye remains an eye under paint, and Adam moves the
    entries of a hash table one by one. A tint does neither: it is a sum of coarse grids, at first 0.

    Attributes:
        lightness, hue: lists of grids [1,1,G,G,G] and [1,2,G,G,G] over the places.
    """
    LIGHTNESS, HUE = (8, 16, 32), (4, 8)  # corners of the grids along each side
    # Directions of the two parts in the space of logits, of length 1: grey; red against green, blue against yellow.
    GREY = ((3 ** -0.5,), (3 ** -0.5,), (3 ** -0.5,))
    OPPONENT = ((2 ** -0.5, 6 ** -0.5), (-2 ** -0.5, 6 ** -0.5), (0.0, -2 * 6 ** -0.5))
    ROOM = 0.02  # colours count as no nearer to 0 and 1 in their logits, which would be infinite there

    def __init__(self):
        super().__init__()
        self.lightness, self.hue = (torch.nn.ParameterList(torch.zeros(1, many, side, side, side) for side in sides)
                                    for many, sides in ((1, self.LIGHTNESS), (2, self.HUE)))

    def forward(self, x, rgb):
        """Colours rgb [3,N] in [0,1] at places x [3,N] in [0,1] -> [3,N], at most ROOM outside of [0,1]."""
        at = (2 * x - 1).T[None, None, None]
        grey, hue = (sum(grid_sample(grid, at, padding_mode="border", align_corners=True) for grid in grids)[0, :, 0, 0]
                     for grids in (self.lightness, self.hue))
        own = rgb.clamp(self.ROOM, 1 - self.ROOM)
        change = rgb.new_tensor(self.GREY) @ grey + rgb.new_tensor(self.OPPONENT) @ hue
        return rgb - own + (own.logit() + change).sigmoid()


class LookUpTable(Tint):
    """A 3D look-up table of colours, as colour grading uses: what is added to the logits depends on the colour alone.

    Whatever had one colour has one colour again, so that shading stays smooth and a texture stays as sharp as it was,
    while leaf and fruit may go different ways. The grids lie over blue, green and red; few nodes suffice, with
    trilinear interpolation between them.
    """
    LIGHTNESS, HUE = (3,), (3,)

    def forward(self, rgb):
        """Colours rgb [3,N] in [0,1] -> [3,N], at most ROOM outside of [0,1]."""
        return super().forward(rgb, rgb)
