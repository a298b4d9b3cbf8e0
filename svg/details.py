"""Details, shapes that belong to what they lie on: the pores of a peel, the inside of a collar. See Details."""
import numpy as np
import torch

from svg.constraints import places

SHARE, SAMPLES = 0.9, 64                  # of a detail's outline that lies on its host; the most points looked at
OPAQUE = 0.5                              # the least opacity of a host
LEAST, MOST = 0.5, 2.0                    # limits of firmness


class Details:
    """Which shapes of a drawing follow which others, in colour and in how firmly a spring holds them.

    A shape lies on its host: the topmost shape below it that contains nine tenths of its outline and is at least half
    opaque. Its colour follows the host's if the two are alike, and if all that shares the colour lies on that host. A
    gradient has the mean colour of its stops, which follow together.

    An optimiser pushes each colour on its own, and small shapes are pushed little: where a tangerine becomes red, its
    orange pores would stay and look like the seeds of a strawberry. `carry_` therefore adds the change of the host's
    colour in a step to that of the detail, beside what the detail's own push has done.
    """

    def __init__(self, svg, alike):
        """
        Args:
            svg: a svg_raster.SVG before its edit.
            alike: colours are alike if their distance in RGB, each channel in [0, 1], is smaller.
        """
        self.svg, solid = svg, len(svg.colours)
        slots = [(layer.colour,) if layer.colour >= 0 else
                 tuple(solid + stop for stop in layer.gradient.stops) if layer.gradient else () for layer in svg.layers]
        table, lies_on = self.colours().cpu().double().numpy(), hosts(svg)
        means = {slot: table[list(slot)].mean(0) for slot in slots if slot}
        below, weights = {}, {}           # slot -> the slots below it; slot -> {row: share of its change}
        for number, slot in enumerate(slots):
            below.setdefault(slot, set()).add(slots[lies_on[number]] if number in lies_on else ())
        for slot in means:                # in the order of drawing: a host comes first
            host = next(iter(below[slot]))
            if len(below[slot]) == 1 and host not in ((), slot) and np.linalg.norm(means[slot] - means[host]) < alike:
                weights[slot] = weights.get(host, {}) | {row: 1 / len(host) for row in host}
        entries = [(row, of, share) for slot, own in weights.items() for row in slot for of, share in own.items()]
        rows, of, share = zip(*entries, strict=True) if entries else ((), (), ())
        self.rows, self.of = (torch.tensor(x, dtype=torch.long, device=svg.colours.device) for x in (rows, of))
        self.share = svg.colours.new_tensor(share)[:, None]
        self.host = {number: lies_on[number] for number, slot in enumerate(slots) if slot in weights}

    def firmness(self):
        """[N, 1] for SteadyAdam's spring: how many halves of the picture's side the shape of each point spans.

        A shape spans the side of a square with the area of its bounding box, here at least a quarter of the picture.
        Large shapes carry the identity of a drawing, while small ones, such as eyes, are what an edit moves. A detail
        is as firm as what it lies on, so that they do not part.
        """
        svg, firm = self.svg, {}
        rest, _, _ = places(svg.layers, svg.frames.cpu(), svg.loaded["points"].cpu(), 0)
        result = rest.new_full((len(rest), 1), LEAST)
        for number, layer in enumerate(svg.layers):
            if layer.shape.element is not None and len(own := rest[layer.shape.rows]):
                spans = (own.amax(0) - own.amin(0)).prod().sqrt().item() * 2 / svg.size
                firm[number] = firm.get(self.host.get(number), min(max(spans, LEAST), MOST))
                result[layer.shape.rows] = result[layer.shape.rows].clamp_min(firm[number])  # of its fill and stroke
        return result.to(svg.points)

    @torch.no_grad()
    def colours(self):
        """A copy of the solid colours and then of the stops', [C + T, 3]."""
        return torch.cat([self.svg.colours, self.svg.stop_colours[:, :3]])

    @torch.no_grad()
    def carry_(self, before):
        """Add the changes of the hosts' colours since `before`, what `colours` gave, to those of their details."""
        moved = self.colours() - before
        follow = torch.zeros_like(moved).index_add_(0, self.rows, self.share * moved[self.of])
        self.svg.colours += follow[:len(self.svg.colours)]
        self.svg.stop_colours[:, :3] += follow[len(self.svg.colours):]


@torch.no_grad()
def hosts(svg):
    """{layer that lies on another: that one}, of what is drawn, in the picture of the file."""
    edges, layer, *_ = svg.segments(1.0)
    frames, layer = svg.frames[layer].cpu().double().numpy(), layer.cpu().numpy()
    ends = np.einsum("sij,skj->ski", frames[:, :, :2], edges.cpu().double().numpy().reshape(-1, 2, 2))
    order = np.argsort(layer, kind="stable")
    stops = np.bincount(layer, minlength=len(svg.layers)).cumsum()[:-1]
    outlines = np.split((ends + frames[:, None, :, 2])[order], stops)
    opaque = torch.cat([svg.opacities, svg.opacities.new_ones(1)])[svg.opacity_of].prod(1) >= OPAQUE
    masks = {argument for step, start in svg.opener.items() if svg.ops[step][0] == "mask"
             for op, argument in svg.ops[start:step] if op == "draw"}
    drawn = [argument for op, argument in svg.ops if op == "draw" and argument not in masks and len(outlines[argument])]
    low, high = (np.array([of(outlines[n], axis=(0, 1)) for n in drawn]).reshape(-1, 2) for of in (np.min, np.max))
    found, able = {}, opaque.cpu().numpy()[drawn]
    for k, number in enumerate(drawn):
        own = outlines[number]
        points = own[np.linspace(0, len(own) - 1, min(len(own), SAMPLES)).round().astype(int), 0]
        near = able[:k] & (high[k] > low[:k]).all(1) & (low[k] < high[:k]).all(1)
        for below in (drawn[i] for i in near.nonzero()[0][::-1]):
            if contained(points, outlines[below], svg.layers[below].rule == "evenodd").mean() > SHARE:
                found[number] = below
                break
    return found


def contained(points, edges, even_odd):
    """Whether each of points [N, 2] lies within closed outlines of edges [S, 2, 2], from end to end: [N] bool."""
    (x0, y0), (x1, y1) = edges[(edges[:, :, 1].max(1) > points[:, 1].min())
                               & (edges[:, :, 1].min(1) <= points[:, 1].max())].transpose(1, 2, 0)
    x, y = points[:, :1], points[:, 1:]
    left = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
    winding = ((y0 <= y) & (y1 > y) & (left > 0)).sum(1) - ((y0 > y) & (y1 <= y) & (left < 0)).sum(1)
    return winding % 2 == 1 if even_odd else winding != 0
