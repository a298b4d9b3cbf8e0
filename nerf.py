"""A compact NeRF in plain PyTorch: multi-resolution hash grid, occupancy grid, deferred image gradients.

    scene = load_scene("examples/apple")           # of scene.py
    nerf = NeRF.fit(scene, seconds=60)             # process CPU time on a CPU, wall time on a GPU
    psnr, views = evaluate(nerf, scene)            # on the held-out views
    picture = nerf.render(view=3, size=64)         # [1,3,64,64] in [0,1], differentiable, flat in memory

The hash grid is Instant NGP's (Mueller et al., arXiv 2201.05989), the rendering NeRF's (Mildenhall et al., arXiv
2003.08934), the distortion loss mip-NeRF 360's (Barron et al., arXiv 2111.12077). Here the box of the scene is
[-1,1]^3; cameras stay in the units of the file.
"""
import json
import math
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch.nn.functional import huber_loss, l1_loss, leaky_relu, max_pool3d

from files.checkpoint import count, dictionary, restore
from files.messages import one_line
from files.writing import replacing
from loop import parallel
from loop.fit import Fit
from scene.box import cell_points, contract, visual_hull
from scene.captures import SceneError
from scene.photographs import Pixels, over
from scene.representation import Representation, spherical_harmonics


class HashGrid(torch.nn.Module):
    """Trilinear features at several resolutions from one flat table (Mueller et al., eq. 1 to 4).

    A level with fewer corners than `size` has an entry for each, a finer one shares `size` entries by a hash.
    Level-major: what belongs to one level and one corner lies together, N contiguous, so each step is one
    long vector operation. The two features of an entry are one complex number: one gather, one scatter.
    """
    # Entry = x + P1 y + P2 z mod size. Instant NGP joins the three by XOR; with a sum the eight corners
    # differ by eight constants, neighbours in x share a cache line, and dense levels are the same formula
    # with other strides.
    STRIDES = (1, -1640531535, 805459861)

    def __init__(self, levels, size, coarsest, finest):
        """levels, entries a level (a power of two), cells a side of the coarsest and of the finest level."""
        super().__init__()
        if size & (size - 1) or levels < 1 or coarsest < 1:
            raise ValueError(f"the table size must be a power of two, got {size}")
        growth = (finest / coarsest) ** (1 / max(levels - 1, 1))
        self.cells = [round(coarsest * growth ** level) for level in range(levels)]
        self.size, self.dense = size, [(n + 1) ** 3 <= size for n in self.cells]
        start = np.cumsum([0] + [(n + 1) ** 3 if dense else size for n, dense in zip(self.cells, self.dense)])
        self.start = start.tolist()
        self.table = torch.nn.Parameter(torch.empty(self.start[-1], 2).uniform_(-1e-4, 1e-4))
        strides = [(1, n + 1, (n + 1) ** 2) if d else self.STRIDES for n, d in zip(self.cells, self.dense)]
        strides = torch.tensor(strides, dtype=torch.int32)  # [L,3]
        corner = torch.tensor([(i & 1, i >> 1 & 1, i >> 2) for i in range(8)], dtype=torch.int32)
        offsets = (strides[:, None] * corner).sum(-1, dtype=torch.int32)  # [L,8], x changes first
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)
        self.learning = levels  # of the levels, coarse to fine, that get a gradient

    def corners(self, x, level):
        """Entries int32 [8,N] of the corners around x [3,N] in [0,1], weights [3,2N] of the upper ones.

        A weight stands twice, once for each feature, to multiply the complex entries as plain pairs.
        """
        x = x * self.cells[level]
        low = x.int().clamp_(max=self.cells[level] - 1)  # [3,N]
        weight = (x - low)[:, :, None].expand(-1, -1, 2).reshape(3, -1)
        low = low * self.strides[level, :, None]
        entry = (low[0] + low[1] + low[2]) + self.offsets[level, :, None]
        return entry if self.dense[level] else entry.bitwise_and_(self.size - 1), weight

    def forward(self, x, known=None):
        """Features [2L,N] at x [3,N] in [0,1]: the L first features, then the L second ones.

        Differentiable in the table, not in x. With `known`, features from an earlier call for the same x,
        nothing is gathered again.
        """
        return _Interpolate.apply(self.table, x, self, known)


class _Interpolate(torch.autograd.Function):
    """Gather and trilinear interpolation; the backward is one scatter a level.

    Autograd's own would keep eight products a level and scatter through a dense [N,8,2] gradient.
    """

    @staticmethod
    def forward(ctx, table, x, grid, known):
        ctx.grid, ctx.shape = grid, table.shape
        ctx.save_for_backward(x)
        if known is not None:
            return known.clone()
        entries = torch.view_as_complex(table)
        out = table.new_empty(2, len(grid.cells), x.shape[1])
        for level in range(len(grid.cells)):
            entry, weight = grid.corners(x, level)
            v = entries[grid.start[level]:grid.start[level + 1]].index_select(0, entry.view(-1))
            v = torch.view_as_real(v).view(8, -1)  # [8,2N]
            for axis in (2, 1, 0):
                v = torch.lerp(v[:len(v) // 2], v[len(v) // 2:], weight[axis])
            out[:, level] = v.view(-1, 2).T
        return out.view(2 * len(grid.cells), x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (x,), grid = ctx.saved_tensors, ctx.grid
        grad = grad.reshape(2, len(grid.cells), -1)
        out = grad.new_zeros(ctx.shape)
        entries = torch.view_as_complex(out)
        v = grad.new_empty(8, 2 * x.shape[1])
        for level in range(grid.learning):
            entry, weight = grid.corners(x, level)  # cheaper again than kept
            v[0].view(-1, 2).copy_(grad[:, level].T)
            for axis in range(3):  # each axis splits what there is into an upper and a lower share
                n = 1 << axis
                torch.mul(v[:n], weight[axis], out=v[n:2 * n])
                v[:n] -= v[n:2 * n]
            entries[grid.start[level]:grid.start[level + 1]].index_add_(
                0, entry.view(-1), torch.view_as_complex(v.view(-1, 2)))
        return out, None, None, None


LEAK = 0.05  # of the ReLUs: at rates that suit the table, a layer of 32 plain ones can die as a whole


class Field(Representation):
    """Density and colour at every point of a scene, and the colour behind it.

    x [3,N] -> hash grid -> MLP -> sigma and 15 features -> with the direction -> MLP -> rgb.

    Attributes:
        grid: the HashGrid over [-extent, extent]^3.
        sigma_in, sigma_out, rgb_in, rgb_mid, rgb_out, sky_in, sky_out: weights [outputs, inputs] of the MLPs.
        distance, pixel: of the median training camera from the centre, and the side of its pixels there; in half
            sides of the box.
    """

    def __init__(self, scene, levels, table, width):
        super().__init__(scene)
        cameras = [v.camera for v in scene.train]
        focal = torch.tensor([c.lens[0] for c in cameras])
        distance = (torch.stack([c.pose[:, 3] for c in cameras]) - scene.centre).norm(dim=1) / scene.half
        self.distance, self.pixel = distance.median().item(), (distance / focal).median().item()
        self.extent = 1.0 if scene.bounded else 2.0
        self.grid = HashGrid(levels, table, 16, min(max(4 / self.pixel, 64), 2048))

        def weights(rows, columns):
            return torch.nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) * 1.7 / columns ** 0.5)
        self.sigma_in, self.sigma_out = weights(width, 2 * levels), weights(16, width)
        self.rgb_in, self.rgb_mid, self.rgb_out = weights(width, 32), weights(width, width), weights(3, width)
        if not scene.bounded:
            self.sky_in, self.sky_out = weights(width, 16), weights(3, width)

    def density(self, features):
        """Features [2L,N] -> sigma [N] per half side of the box, and all outputs [16,N] for the colour."""
        out = self.sigma_out @ leaky_relu(self.sigma_in @ features, LEAK)
        return out[0].clamp(max=11).exp(), out  # clamped before the exp; exp(11) is opaque in any step

    def colour(self, out, sh):
        """The density's outputs [16,N] and the harmonics [16,N] of the directions -> rgb [3,N]."""
        hidden = leaky_relu(self.rgb_in @ torch.cat((out, sh)), LEAK)
        return torch.sigmoid(self.rgb_out @ leaky_relu(self.rgb_mid @ hidden, LEAK))

    def behind(self, rays_d):
        """rgb [3,R] behind all samples: the background, or in a capture a colour for each direction."""
        if self.scene.bounded:
            return self.background[:, None]
        return torch.sigmoid(self.sky_out @ leaky_relu(self.sky_in @ spherical_harmonics(rays_d), LEAK))

    def param_groups(self, rate=1e-2, mlps=1e-3):
        """Two groups for Adam, the table and the MLPs.

        Gradients of the table's entries are rare, hence the small eps. Every sample shares the MLPs, hence their lower
        rate: an edit of one place must not tint all others.
        """
        table, *others = self.grid.table, *(p for p in self.parameters() if p is not self.grid.table)
        adam = {"betas": (0.9, 0.99), "eps": 1e-15}
        return [{"name": "table", "params": [table], "lr": rate} | adam,
                {"name": "mlps", "params": others, "lr": mlps} | adam]

    def learn_from(self, size):
        """From now on, pictures of size x size pixels are all that is learnt from.

        They say nothing about the grid's levels that are finer than their pixels: those keep what they have. At least
        one level goes on.
        """
        pixels = 2 * self.camera(None, size).lens[0] / self.distance  # across the box
        self.grid.learning = max(1, sum(cells <= pixels for cells in self.grid.cells))


class SampledField(Field):
    """A field that knows where it is empty, and takes its samples elsewhere.

    Attributes (lengths are in half sides of the box):
        step: of an object, the distance from sample to sample.
        near, far, growth: of a capture, the range of the samples, and their distance as a share of how far they are.
        lean: of a capture, how many times longer the steps are in pictures that are learnt from; None before
            `learn_from`, and for an object.
        occupancy: [G^3] float, running maximum of sigma in each cell of a coarse grid over [-extent, extent]^3.
        occupied: [G^3] bool, the cells in which samples are taken.
        seen: [G^3] bool, the cells in sight of a training view; in the others nothing is ever sampled.
        bounds: [2,3], the box around the occupied cells.
    """

    def __init__(self, scene, levels, table, width):
        super().__init__(scene, levels, table, width)
        # Samples about as dense as the pixels: evenly in an object's box, else growing with the distance.
        self.step = min(max(1.5 * self.pixel, 1 / 512), 1 / 32)
        focal = torch.tensor([v.camera.lens[0] for v in scene.train]).median().item()
        self.growth = min(max(1.5 / focal, 1 / 256), 1 / 32)
        self.near, self.far, self.lean = 0.1 * self.distance, 30 * self.distance, None
        self.cells = 64 if levels <= 8 else 128
        seen, hull = visual_hull(scene.train, scene.centre, scene.half, self.extent, self.cells)
        self.register_buffer("occupancy", torch.zeros(self.cells ** 3))
        self.register_buffer("seen", seen)
        self.register_buffer("occupied", hull)
        self.register_buffer("bounds", self._bounds())

    @property
    def batch(self):
        """Points that are worked on at a time; on a CPU as many as its cache holds, which makes it twice as fast."""
        return 2 ** 16 if self.centre.device.type == "cpu" else 2 ** 24

    def learn_from(self, size):
        """See Field. Of a capture, such pictures are from now on drawn with less work wherever they have gradients.

        Their steps are as long for their pixels as the fit's are for those of the photographs, but at most 1.5 times as
        long, and of each ray the gradient is that of at most a dozen samples: see `joined`.
        """
        super().learn_from(size)
        if not self.scene.bounded:
            self.lean = min(max(1.5 / self.camera(None, size).lens[0] / self.growth, 1.0), 1.5)

    @torch.no_grad()
    def update_occupancy(self, generator, share=0.25, decay=0.8, least=1.0, dilate=False):
        """Sample sigma in the occupied cells and in a random share of the others; decide what is occupied.

        Occupied is where the decaying maximum exceeds min(least, its mean). At sigma = 1 a hundredth of half the box's
        side is 1 % opaque. With `dilate`, so are the cells around these; in a capture only the six beside one that
        takes half of the light. There most cells hold a haze, whose surroundings the fit never saw: all of them would
        double the samples, and change the picture more than all that learn_from saves.
        """
        chosen = torch.rand(len(self.seen), generator=generator, device=self.seen.device) < share
        for cell in ((chosen | self.occupied) & self.seen).nonzero()[:, 0].split(2 ** 16):
            offset = torch.rand(3, len(cell), generator=generator, device=cell.device)
            sigma, _ = self.density(self.grid(cell_points(cell, self.cells, offset)))
            self.occupancy[cell] = torch.maximum(self.occupancy[cell] * decay, sigma)
        on = self.occupancy > min(least, self.occupancy[self.seen].mean().item())
        if dilate:
            solid, boxes = on, [(3, 3, 3)]
            if not self.scene.bounded:
                solid = on & (self.occupancy > math.log(2) * self.cells / (2 * self.extent))
                boxes = [(3, 1, 1), (1, 3, 1), (1, 1, 3)]
            cube = solid.view(1, 1, self.cells, self.cells, self.cells).float()
            for box in boxes:
                on = on | (max_pool3d(cube, box, 1, [side // 2 for side in box]).view(-1) > 0)
        # new tensors: a picture whose gradient is still to come keeps the occupancy that it was drawn with
        self.occupied = on & self.seen
        self.bounds = self._bounds()

    def _bounds(self):
        """[2,3]: low and high corner of the occupied cells in [-extent, extent]."""
        on = self.occupied.view(self.cells, self.cells, self.cells)
        used = [on.any(b).any(a).nonzero()[:, 0] for a, b in ((0, 1), (0, 2), (1, 2))]  # x, y, z
        ends = [(u[0].item(), u[-1].item() + 1) if len(u) else (0, 0) for u in used]
        return (torch.tensor(ends, device=on.device).T / self.cells * 2 - 1) * self.extent

    def _in_batches(self, call, *tensors):
        """A list of what `call` returns for `batch` columns at a time of tensors [...,N]."""
        parts = max(1, math.ceil(tensors[0].shape[-1] / self.batch))
        return [call(*part) for part in zip(*(x.tensor_split(parts, -1) for x in tensors))]

    def march(self, rays_o, rays_d, jitter, longer=1.0):
        """Samples in occupied cells, packed ray after ray: x [3,N] in [0,1], t [N], dt [N], ray [N].

        rays_o [3,R] in units of the box, rays_d [3,R] of length 1; jitter [R,1] in [0,1) shifts a ray's samples by that
        share of a step; the steps of a capture are `longer` times its own. No samples at all is a valid answer.
        """
        growth = self.growth * longer
        if self.scene.bounded:
            d = torch.where(rays_d.abs() < 1e-9, torch.full_like(rays_d, 1e-9), rays_d)
            enter, leave = ((bound[:, None] - rays_o) / d for bound in self.bounds)
            near = torch.minimum(enter, leave).amax(0).clamp_min(0)
            far = torch.maximum(enter, leave).amin(0)
            steps = math.ceil((far - near).amax().clamp_min(0).item() / self.step)
        else:
            near = far = rays_d[0]  # not asked for
            steps = math.ceil(math.log(self.far / self.near) / growth)
        size, found = max(2 * self.batch // max(steps, 1), 1), []
        parts = zip(*(x.split(size, -1) for x in (rays_o, rays_d, near, far)), jitter.split(size))
        for first, (o, d, near, far, jitter) in enumerate(parts):
            t = torch.arange(steps, device=o.device) + jitter  # [R,K]
            t = near[:, None] + t * self.step if self.scene.bounded else self.near * (t * growth).exp()
            x = self.place(o[:, :, None], d[:, :, None], t)  # [3,R,K]
            cell = (x * self.cells).int().clamp_(0, self.cells - 1)
            cell = cell[0] + self.cells * (cell[1] + self.cells * cell[2])
            alive = self.occupied.index_select(0, cell.view(-1))
            if self.scene.bounded:
                alive &= (t < far[:, None]).view(-1)
            alive = alive.nonzero()[:, 0]
            found.append((x.reshape(3, -1)[:, alive], t.view(-1)[alive], alive // max(steps, 1) + first * size))
        x, t, ray = (torch.cat(parts, -1) for parts in zip(*found))
        return x, t, self.length(t, longer), ray

    def length(self, t, longer=1.0):
        """The steps [N] of the samples at t [N]; see march."""
        return torch.full_like(t, self.step) if self.scene.bounded else t * (self.growth * longer)

    def place(self, rays_o, rays_d, t):
        """Points at t along rays in units of the box, all broadcast to [3,...] -> [3,...] in [0,1]."""
        x = torch.addcmul(rays_o, rays_d, t)
        x = x if self.scene.bounded else contract(x)
        return (x + self.extent).mul_(0.5 / self.extent)


class Samples(NamedTuple):
    """Samples of R rays, packed ray after ray.

    x: [3,N] in [0,1]. t, dt: [N], where they lie on the ray and how much of it they stand for. ray: [N], its number.
    features: [2L,N] of the grid, or None.
    light: [4,R], colour and opacity of the rays where they are already known, from more samples than these; or None.
    marched: how many there were in occupied cells.
    """
    x: torch.Tensor
    t: torch.Tensor
    dt: torch.Tensor
    ray: torch.Tensor
    features: torch.Tensor = None
    light: torch.Tensor = None
    marched: int = 0


def volume_weights(tau, ray, count):
    """weights [N] = T (1 - exp(-tau)) with the transmittance T = exp(-sum of tau before it on its ray).

    tau [N] = sigma dt; ray [N] ascending numbers below `count`. The sum runs in float64 over all rays at
    once; in float32 the differences of the long sum would be wrong in the second digit.
    """
    return torch.exp(-_sum_before(tau, ray, count)).to(tau.dtype) * -torch.expm1(-tau)


def distortion(weights, s, ds, ray, count):
    """Mean over rays of sum_ij w_i w_j |s_i - s_j| + sum_i w_i^2 ds / 3 (mip-NeRF 360, eq. 15), packed.

    It draws the weights of a ray together: fewer floaters, and fewer samples to evaluate. s [N] ascends along
    a ray, so that the double sum is one of differences to what came before.
    """
    before, before_s = _sum_before(weights, ray, count), _sum_before(weights * s, ray, count)
    pairs, own = 2 * (weights * (s * before - before_s)).sum(), (weights * weights).sum() * ds / 3
    return (pairs + own).to(s.dtype) / count


def _sums(values, ray, count):
    """[C,N] -> [C,count]: the sums over the samples of each ray."""
    index = ray + count * torch.arange(len(values), device=ray.device)[:, None]
    return values.new_zeros(len(values) * count).index_add(0, index.view(-1), values.reshape(-1)).view(-1, count)


def _sum_before(values, ray, count):
    """[N] -> [N] float64: the sum of the values that come earlier on the same ray."""
    length = torch.bincount(ray, minlength=count)
    first = (length.cumsum(0) - length).index_select(0, ray)
    values = values.double()
    before = values.cumsum(0) - values
    return before - before.index_select(0, first)


def joined(tau, weights, ray, count, groups=12):
    """Let one sample stand for all that follow each other on a ray and have the same 1 / `groups` of its light.

    Args: as in volume_weights, and what it returned for them; no weight is 0.
    Returns:
        at [M], the sample of each group in which half of the group's light is reached, and tau [M] of the whole group.
        With that tau it takes exactly the light that the group takes. It has its own colour for it, and the group's
        whole gradient.
    """
    before = _sum_before(weights, ray, count)
    group = ray * groups + ((before + weights / 2) * groups).long()
    _, number, length = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    after = length.cumsum(0)
    light = ray + before  # ascends through all rays, as the weights of one sum to less than 1
    middle = (light[after - length] + light[after - 1] + weights[after - 1]) / 2
    at = torch.searchsorted(light, middle, right=True) - 1
    return at, torch.zeros_like(tau[at]).index_add(0, number, tau)


class NeRF(SampledField):
    """A neural radiance field of a scene, and how to draw, edit, save and fit it."""

    def __init__(self, scene, levels=8, table=2 ** 15, width=32):
        """scene: a Scene, which is kept; levels and table: of the hash grid; width: of the MLPs."""
        super().__init__(scene, levels, table, width)
        self.config = dict(levels=levels, table=table, width=width)
        self.register_buffer("edits", torch.zeros((), dtype=torch.int64))  # calls of project_

    @property
    def chunk(self):
        """Rays that are rendered at a time, which bounds the memory of a picture of any size."""
        return 1024 if self.centre.device.type == "cpu" else 2 ** 14

    # ---- drawing

    @torch.no_grad()
    def find(self, rays_o, rays_d, jitter=0.5, least=1e-3, lean=None):
        """The Samples that rays_o, rays_d [3,R] get their light from: those whose weight is above `least`.

        lean: see SampledField; with it the steps are longer, the light is already that of all of them, and to have the
        gradients of its colour a few are `joined`. On three captures, photographs of 32, 100 and 256 pixels drawn with
        16 and 64, such a picture had 40 to 48 dB to that of all samples, and the cosine of the gradients was over 0.97.
        """
        count = rays_o.shape[1]
        jitter = torch.as_tensor(jitter, device=rays_o.device).expand(count, 1)
        x, t, dt, ray = self.march((rays_o - self.centre[:, None]) / self.scene.half, rays_d, jitter, lean or 1.0)
        marched, features = len(t), self._in_batches(self.grid, x)
        sigma, out = zip(*((sigma, out if lean else None) for sigma, out in map(self.density, features)))
        tau = torch.cat(sigma) * dt
        on = volume_weights(tau, ray, count) > least
        keep, within = on.nonzero()[:, 0], [part.nonzero()[:, 0] for part in on.tensor_split(len(features))]

        def kept(parts):
            return torch.cat([part.index_select(1, at) for part, at in zip(parts, within)], 1)
        x, t, dt, ray, features = x[:, keep], t[keep], dt[keep], ray[keep], kept(features)
        if not lean:
            return Samples(x, t, dt, ray, features, None, marched)
        tau = tau[keep]
        weights = volume_weights(tau, ray, count)
        sh = spherical_harmonics(rays_d).index_select(1, ray)
        colour = torch.cat(self._in_batches(self.colour, kept(out), sh), 1)
        light = _sums(torch.cat((colour * weights, weights[None])), ray, count)
        at, whole = joined(tau, weights, ray, count)
        return Samples(x[:, at], t[at], dt[at] * whole / tau[at], ray[at], features[:, at], light, marched)

    def shade(self, rays_o, rays_d, jitter=0.5, found=None):
        """Volume rendering (NeRF, eq. 3) of rays_o, rays_d [3,R] in the units of the scene.

        First without gradient: samples of hardly any weight are dropped. Then the colours, and gradients, of the rest
        only; as sigma = exp(.), the gradient so lost is of the order of that weight.

        Args:
            found: the Samples that `find` returned for these rays.
        Returns:
            rgb [3,R] without what is behind, opacity [R], depth [R] summed with the weights, in units of the
            box, and of the samples kept (weights [N], t [N], ray [N], how many there were in occupied cells).
        """
        count = rays_o.shape[1]
        x, t, dt, ray, features, light, marched = found or self.find(rays_o, rays_d, jitter)
        sh = spherical_harmonics(rays_d).index_select(1, ray)
        if features is None or torch.is_grad_enabled():
            features = self.grid(x, features)
        sigma, out = self.density(features)
        weights = volume_weights(sigma * dt, ray, count)
        values = self.colour(out, sh) * weights
        sums = _sums(torch.cat((values, weights[None], (weights.detach() * t)[None])), ray, count)
        if light is not None:  # the value of all samples, the gradient of these
            sums = torch.cat((sums[:4] + (light - sums[:4]).detach(), sums[4:]))
        return sums[:3], sums[3], sums[4], (weights, t, ray, marched)

    def draw(self, rays_o, rays_d, found=None):
        """Rays rays_o, rays_d [3,R] -> rgb [3,R] on the background; found: see `shade`."""
        if found and found.light is not None and not torch.is_grad_enabled():
            rgb, opacity = found.light.split((3, 1))
        else:
            rgb, opacity, _, _ = self.shade(rays_o, rays_d, found=found)
        return rgb + self.behind(rays_d) * (1 - opacity)

    def rgb(self, camera):
        """The picture [3,H,W] of a Camera.

        With gradients and more than 4 `chunk` rays, they are deferred: see _Deferred. Memory is then that of one chunk,
        the picture and the places of its samples. With gradients it is also `lean`, where learn_from has set that.
        """
        rays_o, rays_d = camera.rays(self.centre.device)
        learnt = torch.is_grad_enabled()
        if learnt and rays_o.shape[1] <= 4 * self.chunk:
            rgb = self.draw(rays_o, rays_d, self.find(rays_o, rays_d, lean=self.lean))
        else:
            rgb = _Deferred.apply(self, learnt, rays_o, rays_d, *self.parameters())
        return rgb.view(3, camera.height, camera.width)

    @torch.no_grad()
    def depth(self, view=None, size=None):
        """Expected depth [1,1,H,W] along the rays in units of the scene; 0 where nothing opaque is met."""
        camera = self.camera(view, size)
        parts = zip(*(rays.split(self.chunk, 1) for rays in camera.rays(self.centre.device)))
        depth = [torch.where(opacity > 0.5, depth / opacity.clamp_min(0.5), 0)
                 for _, opacity, depth, _ in (self.shade(*rays) for rays in parts)]
        return torch.cat(depth).view(1, 1, camera.height, camera.width) * self.scene.half

    # ---- what the edit's loop asks for

    def project_(self):
        """To be called after each step of an edit: brings the occupancy up to date, at first and every 16th time.

        It is dilated by a cell, so that what the edit adds to a surface is sampled and can grow, a cell each time.
        """
        if self.edits % 16 == 0:
            generator = torch.Generator(self.centre.device).manual_seed(int(self.edits))
            self.update_occupancy(generator, dilate=True)
        self.edits += 1

    def data_loss(self, dataset, generator=None, l1=False):
        """One step of going on to fit a `dataset`: a scalar. The generator is a CPU's, as in sample_view; l1: by absolute
        differences, as Instruct-NeRF2NeRF does, in the place of Huber's loss."""
        seed = int(torch.randint(2 ** 31, (), generator=generator))
        rays = 1024 if self.centre.device.type == "cpu" else 4096
        return self.fit_loss(dataset, rays, torch.Generator(self.centre.device).manual_seed(seed), l1)[0]

    # ---- files

    def save(self, path):
        """Write everything as safetensors; never half a file."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        meta = {"config": self.config, "fingerprint": self.scene.fingerprint}
        data = to_bytes(state, {"nerf": json.dumps(meta)})  # one entry: their order in the file is not fixed
        with replacing(path) as part:
            part.write_bytes(data)

    @classmethod
    def load(cls, path, scene, device="cpu"):
        """What `save` wrote; raises SceneError for another scene's or a damaged file."""
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["nerf"])
                state = {k: file.get_tensor(k) for k in file.keys()}
            config, made_of = meta["config"], meta.get("fingerprint")
            if not (dictionary(config) and set(config) == {"levels", "table", "width"}
                    and all(count(config[key]) and 1 <= config[key] <= most for key, most in
                            (("levels", 32), ("table", 2 ** 24), ("width", 1024)))):
                raise ValueError("its sizes are none")
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
            raise SceneError(f"{path}: no readable NeRF: {one_line(e, 200)}") from e
        if made_of != scene.fingerprint:
            raise SceneError(f"{path}: was fitted to another scene than {scene.path}")
        if sum(value.numel() for value in state.values()) < config["table"]:
            raise SceneError(f"{path}: no readable NeRF: it is smaller than it says")
        try:
            nerf = cls(scene, **config)
            restore(nerf, state, path)
        except ValueError as e:  # a table that is no power of two, other parts, NaN
            raise SceneError(e if str(path) in str(e) else f"{path}: no readable NeRF: {e}") from e
        return nerf.to(device)

    # ---- the fit

    @staticmethod
    def sizes(device):
        """Those that suit a device, a dict."""
        if torch.device(device).type == "cpu":
            return dict(levels=8, table=2 ** 15, width=32)
        return dict(levels=16, table=2 ** 19, width=64)

    @classmethod
    def fit(cls, scene, seconds=None, steps=None, seed=0, checkpoint=None, device="cpu", progress=True, **sizes):
        """Fit a new NeRF to the training views of a scene.

        Batches of random pixels, Huber and distortion loss, Adam with a rate that decays tenfold. Objects are
        fitted on random backgrounds: only true opacity explains all of them, and nothing white hides before white.

        Args:
            seconds: process CPU time on a CPU, wall time elsewhere; 60 if neither it nor steps is given.
            steps: or optimiser steps. With both, what comes first.
            seed: of weights and batches. Fits of equal steps on a CPU are bit-identical.
            checkpoint: a path. Its fit is resumed if it exists (one that had its time is returned at once),
                and it is written every 15 seconds and at the end. It then takes the steps of an unbroken one.
            sizes: levels, table, width, if not the device's default.
        Returns:
            The NeRF; its attribute `fitted` holds steps, seconds and rays of the fit.
        Raises:
            SceneError: the checkpoint is damaged, of another scene or of other sizes.
            FloatingPointError: the loss is no longer finite.
        """
        device = torch.device(device)
        cpu = device.type == "cpu"
        sizes = cls.sizes(device) | sizes
        checks = {"nerf": dictionary, "rays": lambda value: count(value) and 0 < value <= 2 ** 17, "drawn": count}
        fit = Fit(scene, sizes, checks, seconds, steps, checkpoint, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nerf = cls(scene, **sizes).to(device)
        # A batch holds as many rays as make these numbers of samples, in occupied cells and kept.
        marched, kept, rays, most = (2 ** 16, 2 ** 13, 512, 8192) if cpu else (2 ** 20, 2 ** 18, 4096, 2 ** 17)
        drawn = 0
        if fit.saved:
            with fit.reading():
                restore(nerf, fit.saved["nerf"], fit.checkpoint)
            rays, drawn = fit.saved["rays"], fit.saved["drawn"]
        optimiser = torch.optim.Adam(nerf.param_groups(2e-2, 7e-3), fused=True)
        rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
        generator, = parallel.streams(seed, 1, device)
        pixels = Pixels(scene.train, device)

        def state():
            return dict(nerf=nerf.state_dict(), rays=rays, drawn=drawn)

        for step in fit.run(optimiser, generator, state, progress):
            for group in optimiser.param_groups:
                group["lr"] = rates[group["name"]] * 0.1 ** fit.share(step) * min(1, (step + 1) / 20)
            loss, colour, samples = nerf.fit_loss(pixels, rays, generator)
            optimiser.zero_grad()
            loss.backward()
            parallel.average(loss, optimiser.param_groups)
            optimiser.step()
            if step >= 96 and step % 16 == 0:  # before, sigma says little about what is empty
                nerf.update_occupancy(parallel.shared(generator, seed + step), share=1 if step == 96 else 0.25)
            drawn += rays * parallel.world()
            samples = [parallel.largest(number) for number in samples]
            rays *= min(marched / max(samples[0], 1), kept / max(samples[1], 1), 2)
            rays = min(max(int(rays), 64), most)
            fit.report(loss, 2 * colour)  # Huber is half the square near 0
        nerf.fitted = {"steps": fit.step, "seconds": fit.spent, "rays": drawn}
        return nerf

    def fit_loss(self, pixels, rays, generator, l1=False):
        """Loss of one batch of random pixels, its colour part, and its numbers of samples (marched, kept)."""
        rays_o, rays_d, wanted = pixels(rays, generator)
        random = torch.rand(4, rays, generator=generator, device=rays_o.device)
        rgb, opacity, _, (weights, t, ray, marched) = self.shade(rays_o, rays_d, random[:1].T)
        behind = random[1:] if len(wanted) == 4 else self.behind(rays_d)
        seen, wanted = rgb + behind * (1 - opacity), over(wanted, behind)
        colour = l1_loss(seen, wanted) if l1 else huber_loss(seen, wanted, delta=0.1)
        s, ds = t, self.step
        if not self.scene.bounded:  # the steps of a capture are even in log t
            whole = math.log(self.far / self.near)
            s, ds = torch.log(t / self.near) / whole, self.growth / whole
        return colour + 3e-3 * distortion(weights, s, ds, ray, rays), colour.detach(), (marched, len(t))


class _Deferred(torch.autograd.Function):
    """Render in chunks without gradient; in the backward draw each again and push its gradient through.

    The same samples both times: they are kept, 6 bytes each or 10 of a lean picture, and not found again. A step thus
    costs a second pass over these alone, and its memory grows by no more (ARF, Zhang et al., arXiv 2206.06360).
    Each of n chunks takes every n-th ray: all have their share of the object, and none needs more than another.
    A chunk has at most 2^15 rays, so that int16 holds their numbers.
    """

    @staticmethod
    def forward(ctx, nerf, learnt, rays_o, rays_d, *parameters):
        ctx.nerf, ctx.rays, ctx.numbers = nerf, (rays_o, rays_d), []
        ctx.save_for_backward(*parameters)  # raises in the backward if a step has changed them in between
        ctx.chunks = math.ceil(rays_o.shape[1] / nerf.chunk)
        rgb, end, lean = torch.empty_like(rays_d), 0, nerf.lean if learnt else None
        kinds = (torch.float32, torch.int16) + (torch.float32,) * bool(lean)  # t, ray and, where it is not plain, dt
        ctx.kept = [rays_d.new_empty(0, dtype=kind) for kind in kinds]
        for i in range(ctx.chunks):
            rays = [x[:, i::ctx.chunks] for x in ctx.rays]
            found = nerf.find(*rays, lean=lean)
            rgb[:, i::ctx.chunks] = nerf.draw(*rays, found)
            if learnt:
                ctx.numbers.append(len(found.t))
                start, end = end, end + len(found.t)
                # Room for all chunks at once, as they have about as many: small tensors would leave gaps in the memory.
                if end > len(ctx.kept[0]):
                    room = end * ctx.chunks * 5 // (4 * (i + 1)) + 1
                    ctx.kept = [torch.cat((x[:start], x.new_empty(room - start))) for x in ctx.kept]
                for x, values in zip(ctx.kept, (found.t, found.ray, found.dt)):
                    x[start:end] = values
        return rgb

    @staticmethod
    def backward(ctx, grad):
        nerf = ctx.nerf
        wanted = [p for p in ctx.saved_tensors if p.requires_grad]
        totals = [torch.zeros_like(p) for p in wanted]
        kept = (x[:sum(ctx.numbers)].split(ctx.numbers) for x in ctx.kept)
        for i, (t, ray, *dt) in enumerate(zip(*kept)):
            rays_o, rays_d, part = (x[:, i::ctx.chunks] for x in (*ctx.rays, grad))
            ray = ray.long()
            start = (rays_o - nerf.centre[:, None]) / nerf.scene.half
            x = nerf.place(start[:, ray], rays_d[:, ray], t)
            with torch.enable_grad():
                rgb = nerf.draw(rays_o, rays_d, Samples(x, t, *dt or [nerf.length(t)], ray))
            for total, g in zip(totals, torch.autograd.grad(rgb, wanted, part, allow_unused=True)):
                if g is not None:
                    total += g
        totals = iter(totals)
        return None, None, None, None, *(next(totals) if p.requires_grad else None for p in ctx.saved_tensors)
