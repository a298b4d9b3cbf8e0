"""Layers that move with others: markers with the vertices of a path, pattern tiles with the box of a shape."""
import numpy as np
import torch

from svg.markers import Place, Standing
from svg.segments import take


class Carrier(torch.nn.Module):
    """Replaces the frames of carried layers by their current ones."""

    def __init__(self, layers, points, widths, lines, lines_layer):
        """Arguments as of `forward`, as in the file, where the layers' own frames hold."""
        super().__init__()
        carried = [n for n, layer in enumerate(layers) if layer.place is not None]
        places = list(dict.fromkeys(layers[n].place for n in carried))
        markers = [place for place in places if isinstance(place, Place)]
        self.markers = Standing(markers) if markers else None
        self.tilings = list({id(p.tiling): p.tiling for p in places if not isinstance(p, Place)}.values())
        order = [*markers, *(pair[k] for tiling in self.tilings for k in (0, 1) for pair in tiling.places)]
        number = {place: k for k, place in enumerate(order)}
        for name, values in dict(carried=carried, place=[number[layers[n].place] for n in carried]).items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)
        start = self.places(points.double(), widths.double(), lines.double(), lines_layer).detach().numpy()
        inner = [np.linalg.inv(np.vstack([start[k], (0, 0, 1)])) @ layers[n].frame
                 for n, k in zip(carried, self.place.tolist(), strict=True)]
        self.register_buffer("inner", torch.tensor(np.reshape(inner, (-1, 3, 3))), persistent=False)
        self.float()

    def places(self, points, widths, lines, lines_layer):
        """Matrices [K, 2, 3] of all places to pixels."""
        found = [] if self.markers is None else [self.markers(points, widths)]
        for tiling in self.tilings:
            own = lines[lines_layer == tiling.layer].reshape(-1, 2) / tiling.scale
            low, high = own.amin(0), own.amax(0)
            found.append(tiling.matrices(low, torch.maximum(high, low + 1e-6)))
        return torch.cat(found)

    def forward(self, frames, points, widths, lines, lines_layer):
        """Frames [L, 2, 3] of all layers.

        points [N, 2]; widths [W]; lines [S, 4]: outlines in the units of the points, and their layers [S].
        """
        places = self.places(points, widths, lines, lines_layer)
        moved = take(places.view(-1, 6), self.place).view(-1, 2, 3) @ self.inner
        return frames.index_copy(0, self.carried, moved)
