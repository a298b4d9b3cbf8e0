"""Changes of a field's colours that are smooth: paint that covers places, and a table of colours for colours.

    paint, lut = Paint(palette(nerf, size)), LookUpTable()
    rgb = paint(x, rgb)                            # [3,N] at places x [3,N] in [0,1]
    rgb = lut(rgb)
"""
import math

import torch
from torch.nn.functional import grid_sample


class Paint(torch.nn.Module):
    """A few paints, each of one colour, that cover what is there: at first nothing, in the end it may be all.

    The shares of the bare surface and of the paints at a place are a softmax of smooth functions of space. An MLP maps
    what looked alike to what looks alike, so that an eye remains an eye under it, and so does whatever is added to a
    colour; a paint hides dark and light details alike, and what it leaves bare keeps colour and shading.

    Attributes:
        colours: logits [P,3] of the paints' RGB.
        cover: grids [1,P,G,G,G] over the places, whose sum gives the logits of the paints.
    """
    SIDES = (8, 16, 24)  # corners of the grids along each side
    BARE = 4.0  # the logit of the bare surface, which starts with nearly all
    MOST = 16  # paints

    def __init__(self, colours):
        """colours: RGB [P,3] in [0,1] with which the paints start; ValueError for none or more than MOST."""
        super().__init__()
        if not 1 <= len(colours) <= self.MOST:
            raise ValueError(f"{len(colours)} paints, need 1 to {self.MOST}")
        self.colours = torch.nn.Parameter(colours.clamp(0.01, 0.99).logit())
        self.cover = torch.nn.ParameterList(torch.zeros(1, len(colours), *[side] * 3) for side in self.SIDES)

    def forward(self, x, rgb):
        """Colours rgb [3,N] in [0,1] at places x [3,N] in [0,1] -> [3,N], a few hundredths outside of [0,1] at most."""
        cover = _sampled(self.cover, x)
        share = torch.cat([torch.full_like(cover[:1], self.BARE), cover]).softmax(0)
        # so that a paint has exactly nothing where its grids are 0
        start = math.exp(-self.BARE)
        bare, paints = share[:1] * (1 + len(cover) * start), share[1:] - share[:1] * start
        return bare * rgb + self.colours.sigmoid().T @ paints


class LookUpTable(torch.nn.Module):
    """A 3D look-up table of colours, as colour grading uses: what is added to their logits depends on the colour alone.

    Whatever had one colour has one colour again, so that shading stays smooth and a texture stays as sharp as it was,
    while leaf and fruit may go different ways. The grids lie over blue, green and red; few nodes suffice, with
    trilinear interpolation between them.

    Attributes:
        lightness, hue: lists of grids [1,1,G,G,G] and [1,2,G,G,G] over the colours.
    """
    SIDE = 3  # nodes of the grids along each side
    # Directions of the two parts in the space of logits, of length 1: grey; red against green, blue against yellow.
    GREY = ((3 ** -0.5,), (3 ** -0.5,), (3 ** -0.5,))
    OPPONENT = ((2 ** -0.5, 6 ** -0.5), (-2 ** -0.5, 6 ** -0.5), (0.0, -2 * 6 ** -0.5))
    ROOM = 0.02  # colours count as no nearer to 0 and 1 in their logits, which would be infinite there

    def __init__(self):
        super().__init__()
        self.lightness, self.hue = (torch.nn.ParameterList([torch.zeros(1, many, *[self.SIDE] * 3)]) for many in (1, 2))

    def forward(self, rgb):
        """Colours rgb [3,N] in [0,1] -> [3,N], at most ROOM outside of [0,1]."""
        change = rgb.new_tensor(self.GREY) @ _sampled(self.lightness, rgb)
        change = change + rgb.new_tensor(self.OPPONENT) @ _sampled(self.hue, rgb)
        own = rgb.clamp(self.ROOM, 1 - self.ROOM)
        return rgb - own + (own.logit() + change).sigmoid()


def _sampled(grids, x):
    """The sum [C,N] of grids [1,C,G,G,G] over the unit cube at places x [3,N]."""
    at = (2 * x - 1).T[None, None, None]
    return sum(grid_sample(grid, at, padding_mode="border", align_corners=True) for grid in grids)[0, :, 0, 0]


@torch.no_grad()
def palette(nerf, size, count=2, views=8):
    """`count` colours [count,3] of what a NeRF shows in some of its training views: k-means, from the pixel nearest to
    the mean and those farthest from all before. Where there is nothing opaque, no pixel counts.

    size: of the pictures, see Camera.framed; colours recur if there are fewer.
    """
    found, total = [], len(nerf.edited.train)
    for view in range(0, total, math.ceil(total / views)):
        rgb, depth = nerf.render(view, size)[0], nerf.depth(view, size)[0, 0]
        found.append(rgb[:, depth > 0].T)
    pixels = torch.cat(found)
    if not len(pixels):
        return nerf.background.expand(count, 3)
    chosen = pixels[(pixels - pixels.mean(0)).norm(dim=1).argmin()][None]
    while len(chosen) < count:
        chosen = torch.cat([chosen, pixels[torch.cdist(pixels, chosen).amin(1).argmax()][None]])
    for _ in range(20):
        nearest = torch.cdist(pixels, chosen).argmin(1)
        chosen = torch.stack([pixels[nearest == k].mean(0) if (nearest == k).any() else chosen[k]
                              for k in range(count)])
    return chosen
