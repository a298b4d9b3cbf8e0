"""A compact NeRF in plain PyTorch: multi-resolution hash grid, occupancy grid, deferred image gradients.

    scene = load_scene("examples/apple")           # from scene/reading.py
    nerf = NeRF.fit(scene, seconds=60)             # process CPU time on a CPU, wall time on a GPU
    psnr, views = evaluate(nerf, scene)            # on the held-out views
    picture = nerf.render(view=3, size=64)         # [1,3,64,64] in [0,1], differentiable, in constant memory

The hash grid is Instant NGP's (Mueller et al., arXiv 2201.05989), the rendering NeRF's (Mildenhall et al., arXiv
2003.08934), the distortion loss mip-NeRF 360's (Barron et al., arXiv 2111.12077). Within this file the scene's box is
[-1,1]^3; cameras stay in the units of the scene's file.
"""
import copy
import functools
import json
import math

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch.nn.functional import huber_loss, l1_loss, leaky_relu, max_pool3d

from files.checkpoint import count, dictionary, restore
from files.messages import one_line
from files.writing import replacing
from loop import parallel
from loop.fit import Course
from scene.box import cell_points, contract, in_sight, visual_hull
from scene.captures import SceneError, check_pointer
from scene.gate import Gate
from scene.grid import HashGrid
from scene.guide import Guide
from scene.paint import LookUpTable, Paint
from scene.photographs import Pixels, over
from scene.region import Region, side_of
from scene.representation import Representation, spherical_harmonics
from scene.volume import Samples, distortion, sums, volume_weights

LEAK = 0.05  # slope of the ReLUs: at learning rates that suit the table, a layer of 32 plain ReLUs can die


class Field(Representation):
    """Density and colour at every point of a scene, and the colour of what lies behind.

    x [3,N] -> hash grid -> MLP -> sigma and 15 features; these and the direction -> MLP -> rgb.

    Attributes:
        grid: the HashGrid over [-extent, extent]^3.
        open: [2L,1], weights of the features while a fit goes from coarse to fine; None: 1.
        thin: of a capture, the logarithm of the first density. Its cameras may be several boxes away, and at a density
            of 1 the first steps would see nothing but fog before them.
        sigma_in, sigma_out, rgb_in, rgb_mid, rgb_out, sky_in, sky_out: weights [outputs, inputs] of the MLPs.
        distance, pixel: median distance of the training cameras from the centre, and median side of a pixel there,
            in half sides of the box.
    """

    def __init__(self, scene, levels, table, width):
        super().__init__(scene)
        cameras = [v.camera for v in scene.train]
        focal = torch.tensor([c.lens[0] for c in cameras])
        distance = (torch.stack([c.pose[:, 3] for c in cameras]) - scene.centre).norm(dim=1) / scene.half
        self.distance, self.pixel = distance.median().item(), (distance / focal).median().item()
        self.extent = 1.0 if scene.bounded else 2.0
        self.grid, self.open = HashGrid(levels, table, 16, min(max(4 / self.pixel, 64), 2048)), None
        self.shape = self.paint = self.lut = None  # see split, painted, graded

        def weights(rows, columns):
            return torch.nn.Parameter(torch.empty(rows, columns).uniform_(-1, 1) * 1.7 / columns ** 0.5)
        self.sigma_in, self.sigma_out = weights(width, 2 * levels), weights(16, width)
        self.rgb_in, self.rgb_mid, self.rgb_out = weights(width, 32), weights(width, width), weights(3, width)
        if not scene.bounded:
            self.sky_in, self.sky_out = weights(width, 16), weights(3, width)
            self.register_buffer("thin", torch.tensor(-math.log(3 * self.distance)))

    def density(self, features):
        """Features [2L,N] -> sigma [N] per half side of the box, and all 16 outputs [16,N], the input of `colour`."""
        features = features if self.open is None else features * self.open
        out = self.sigma_out @ leaky_relu(self.sigma_in @ features, LEAK)
        log_sigma = out[0] if self.scene.bounded else out[0] + self.thin
        return log_sigma.clamp(max=11).exp(), out  # clamped before the exp; exp(11) is opaque in any step

    def colour(self, out, sh):
        """Outputs [16,N] of `density` and harmonics [16,N] of the directions -> rgb [3,N]."""
        hidden = leaky_relu(self.rgb_in @ torch.cat((out, sh)), LEAK)
        return torch.sigmoid(self.rgb_out @ leaky_relu(self.rgb_mid @ hidden, LEAK))

    def look(self, x, sh=None, known=None):
        """Density [N] at places x [3,N] in [0,1] and, with harmonics sh [16,N] of directions, rgb [3,N] or None.

        known: the features of the densities at x, from an earlier call of their grid.
        """
        sigma, out = self.solid.density(self.solid.grid(x, known))
        if sh is None:
            return sigma, None
        rgb = self.colour(out if self.shape is None else self.density(self.grid(x))[1], sh)
        rgb = rgb if self.lut is None else self.lut(rgb)
        return sigma, rgb if self.paint is None else self.paint(x, rgb)

    @property
    def solid(self):
        """What gives the densities: the field itself or, after `split`, its Shape."""
        return self.shape or self

    def split(self):
        """From now on densities have a table and an MLP of their own: what changes a colour leaves the shape alone."""
        if self.shape is None:
            self.shape = Shape(self)

    def painted(self, colours):
        """From now on a Paint can cover the colours as well, which starts with `colours`, RGB [P,3]; at first it covers
        nothing."""
        if self.paint is None:
            self.paint = Paint(colours).to(self.centre.device)

    def graded(self):
        """From now on colours can change by a LookUpTable as well, equal ones alike; at first it changes nothing."""
        if self.lut is None:
            self.lut = LookUpTable().to(self.centre.device)

    def behind(self, rays_d):
        """rgb [3,R] behind all samples: the background, or in a capture a colour per direction."""
        if self.scene.bounded:
            return self.background[:, None]
        return torch.sigmoid(self.sky_out @ leaky_relu(self.sky_in @ spherical_harmonics(rays_d), LEAK))

    def param_groups(self, rate=1e-2, mlps=1e-3, densities=1.0, paint=0.0, lut=0.0, sparse=0.0):
        """Two groups for Adam: the table, and the MLPs; after `split` two more for the densities alone, after `painted`
        two for the cover of the paints and their colours, after `graded` one for the look-up table; beside paints and
        this table a group of rate 0 is frozen.

        Table entries get gradients rarely, hence the small eps. All samples share the MLPs, hence their lower rate: an
        edit of one place must not colour the others.

        densities: their share of both rates after `split`; at 0 they are frozen, which saves their backward pass.
        sparse: the share of its rate by which each corner of the cover goes back to 0 after a step, see SteadyAdam.
        """
        table, *others = self.grid.table, *(p for name, p in self.named_parameters() if p is not self.grid.table
                                            and not name.startswith(("gate.", "shape.", "paint.", "lut.")))
        own = [("table", [table], rate), ("mlps", others, mlps)]
        smooth = [("paint", [*self.paint.cover], paint), ("paint colours", [self.paint.colours], paint)] \
            if self.paint is not None else []
        smooth += [("lut", [*self.lut.parameters()], lut)] if self.lut is not None else []
        for _, parameters, lr in own:
            for parameter in parameters:
                parameter.requires_grad_(not smooth or lr > 0)
        own += smooth
        if self.shape is not None:
            shape = self.shape.requires_grad_(densities > 0)
            if densities:
                own += [("shape table", [shape.grid.table], densities * rate),
                        ("shape mlps", [shape.sigma_in, shape.sigma_out], densities * mlps)]
        # Entries of the colours' own table share one second moment, as do those of each grid of a cover or of a look-up
        # table: with one each, Adam moves an entry by its noise as far as by a lasting push, which roughens surfaces.
        return [{"name": name, "params": parameters, "lr": lr, "betas": (0.9, 0.99), "eps": 1e-15,
                 "shared": name in ("paint", "paint colours", "lut") or name == "table" and self.shape is not None}
                | ({"sparse": sparse, "across": (1,)} if name == "paint" else {}) for name, parameters, lr in own]

    def focus(self, scene, size):
        super().focus(scene, size)
        self.learn_from(size)

    def learn_from(self, size):
        """Freeze the levels of the grid that are finer than the pixels of pictures of a size, see Camera.framed.

        Pictures of that size say nothing about them. The coarsest level always keeps learning.
        """
        camera = self.camera(None if self.edited is self.scene else 0, size)
        pixels = 2 * camera.lens[0] / self.distance  # across the box
        self.grid.learning = max(1, sum(cells <= pixels for cells in self.grid.cells))
        if self.shape is not None:
            self.shape.grid.learning = self.grid.learning


class Shape(torch.nn.Module):
    """A table and an MLP that give the densities of a field alone; at first they are the field's own."""

    def __init__(self, field):
        super().__init__()
        self.grid, self.thin = copy.deepcopy(field.grid), 0.0 if field.scene.bounded else field.thin.item()
        self.sigma_in, self.sigma_out = (torch.nn.Parameter(weights.detach().clone())
                                         for weights in (field.sigma_in, field.sigma_out[:1]))

    def density(self, features):
        """Features [2L,N] -> sigma [N] as Field.density gives it, and None."""
        out = self.sigma_out @ leaky_relu(self.sigma_in @ features, LEAK)
        return (out[0] + self.thin).clamp(max=11).exp(), None


class SampledField(Field):
    """A field that knows where it is empty, and takes samples elsewhere only.

    Attributes (lengths in half sides of the box):
        step: distance between the samples of an object.
        near, far, growth: range of the samples of a capture, and their distance as a share of their depth.
        least: sigma of an occupied cell, LEAST or that of a capture's first haze.
        occupancy: [G^3] float, decaying maximum of sigma in each cell of a coarse grid over [-extent, extent]^3.
        occupied: [G^3] bool, cells in which samples are taken.
        seen: [G^3] bool, cells in sight of a training view, of captures see in_sight; the others are never sampled.
        bounds: [2,3], the box around the occupied cells.
    """
    DECAY = 0.8  # factor of the occupancy at each update
    LEAST = 1.0  # sigma of an occupied cell: half the box's side is then 1 % opaque in a hundredth

    def __init__(self, scene, levels, table, width):
        super().__init__(scene, levels, table, width)
        # Samples are about as dense as the pixels: even in an object's box, growing with the depth in a capture.
        self.step = min(max(1.5 * self.pixel, 1 / 512), 1 / 32)
        focal = torch.tensor([v.camera.lens[0] for v in scene.train]).median().item()
        self.growth = min(max(1.5 / focal, 1 / 256), 1 / 32)
        self.near, self.far = 0.1 * self.distance, 30 * self.distance
        self.cells, self.least = 64 if levels <= 8 else 128, self.LEAST
        seen, hull = visual_hull(scene.train, scene.centre, scene.half, self.extent, self.cells)
        if not scene.bounded:
            clear, plane = in_sight(scene.train, scene.points, scene.centre, scene.half, self.cells)
            seen, hull, self.near = seen & clear, hull & clear, max(self.near, min(plane / scene.half, self.far / 3))
            self.least = self.thin.exp().item()
        self.register_buffer("occupancy", torch.zeros(self.cells ** 3))
        self.register_buffer("seen", seen)
        self.register_buffer("occupied", hull)
        self.register_buffer("bounds", self._bounds())
        self.gate = None  # see confine

    @property
    def batch(self):
        """Number of points that are processed at a time; on a CPU what fits its cache, which is twice as fast."""
        return 2 ** 16 if self.centre.device.type == "cpu" else 2 ** 24

    @torch.no_grad()
    def update_occupancy(self, generator, share=0.25, dilate=False):
        """Sample sigma in the occupied cells and in a random share of the others, then decide which are occupied.

        Occupied are cells whose decaying maximum exceeds min(least, mean of all). With `dilate`, so are all their
        neighbours; in a capture only the six neighbours of cells that take half of the light. Most other cells of a
        capture hold a haze, whose surroundings the fit never saw: to sample them would double the work.
        """
        chosen = torch.rand(len(self.seen), generator=generator, device=self.seen.device) < share
        for cell in ((chosen | self.occupied) & self.seen).nonzero()[:, 0].split(2 ** 16):
            offset = torch.rand(3, len(cell), generator=generator, device=cell.device)
            sigma, _ = self.at(cell_points(cell, self.cells, offset))
            self.occupancy[cell] = torch.maximum(self.occupancy[cell] * self.DECAY, sigma)
        on = self.occupancy > min(self.least, self.occupancy[self.seen].mean().item())
        if dilate:
            solid, boxes = on, [(3, 3, 3)]
            if not self.scene.bounded:
                solid = on & (self.occupancy > math.log(2) * self.cells / (2 * self.extent))
                boxes = [(3, 1, 1), (1, 3, 1), (1, 1, 3)]
            cube = solid.view(1, 1, self.cells, self.cells, self.cells).float()
            for box in boxes:
                on = on | (max_pool3d(cube, box, 1, [side // 2 for side in box]).view(-1) > 0)
        on = on if self.gate is None else torch.where(self.gate.open, on, self.gate.field.occupied)
        # new tensors: a picture whose backward pass is still to come keeps the occupancy that it was drawn with
        self.occupied = on & self.seen
        self.bounds = self._bounds()

    def _bounds(self):
        """Low and high corner [2,3] of the occupied cells, in [-extent, extent]."""
        on = self.occupied.view(self.cells, self.cells, self.cells)
        used = [on.any(b).any(a).nonzero()[:, 0] for a, b in ((0, 1), (0, 2), (1, 2))]  # x, y, z
        ends = [(u[0].item(), u[-1].item() + 1) if len(u) else (0, 0) for u in used]
        return (torch.tensor(ends, device=on.device).T / self.cells * 2 - 1) * self.extent

    def at(self, x, sh=None):
        """Density [N] at places x [3,N] in [0,1] and, with harmonics sh [16,N] of directions, rgb [3,N] or None."""
        return self.look(x, sh) if self.gate is None else self.gate.blended(self, x, sh)

    def confine(self, region):
        """From now on change only in a region.Region: elsewhere density and colour remain those of a frozen copy."""
        self.gate = None
        self.gate = Gate(copy.deepcopy(self).requires_grad_(False), region)

    def _in_batches(self, call, *tensors):
        """Results of `call` for at most `batch` columns of tensors [...,N] at a time, a list."""
        parts = max(1, math.ceil(tensors[0].shape[-1] / self.batch))
        return [call(*part) for part in zip(*(x.tensor_split(parts, -1) for x in tensors), strict=True)]

    def slabs(self, count):
        """The first step and the one after the last of each part of a march of so many rays; None: to the end.

        What absorbs the light of a capture's ray in one part spares the next ones. A part has a batch of points.
        """
        if self.scene.bounded:
            return [(0, None)]
        steps = math.ceil(math.log(self.far / self.near) / self.growth)
        part = max(1, self.batch // max(count, 1))
        return [(first, min(first + part, steps)) for first in range(0, steps, part)]

    def march(self, rays_o, rays_d, jitter, first=0, last=None):
        """Samples in occupied cells, packed ray after ray: x [3,N] in [0,1], t [N], ray [N]; N may be 0.

        rays_o [3,R] in units of the box, rays_d [3,R] of length 1; jitter [R,1] in [0,1) shifts the samples of a ray by
        that share of a step; first, last: steps of a capture, see `slabs`.
        """
        if self.scene.bounded:
            d = torch.where(rays_d.abs() < 1e-9, torch.full_like(rays_d, 1e-9), rays_d)
            enter, leave = ((bound[:, None] - rays_o) / d for bound in self.bounds)
            near = torch.minimum(enter, leave).amax(0).clamp_min(0)
            far = torch.maximum(enter, leave).amin(0)
            steps = math.ceil((far - near).amax().clamp_min(0).item() / self.step)
        else:
            near = far = rays_d[0]  # unused
            steps = (last or math.ceil(math.log(self.far / self.near) / self.growth)) - first
        size, found = max(2 * self.batch // max(steps, 1), 1), []
        parts = zip(*(x.split(size, -1) for x in (rays_o, rays_d, near, far)), jitter.split(size), strict=True)
        for part, (o, d, near, far, jitter) in enumerate(parts):
            t = torch.arange(first, first + steps, device=o.device) + jitter  # [R,K]
            t = near[:, None] + t * self.step if self.scene.bounded else self.near * (t * self.growth).exp()
            x = self.place(o[:, :, None], d[:, :, None], t)  # [3,R,K]
            cell = (x * self.cells).int().clamp_(0, self.cells - 1)
            cell = cell[0] + self.cells * (cell[1] + self.cells * cell[2])
            alive = self.occupied.index_select(0, cell.view(-1))
            if self.scene.bounded:
                alive &= (t < far[:, None]).view(-1)
            alive = alive.nonzero()[:, 0]
            found.append((x.reshape(3, -1)[:, alive], t.view(-1)[alive], alive // max(steps, 1) + part * size))
        return tuple(torch.cat(parts, -1) for parts in zip(*found, strict=True))

    def length(self, t):
        """Lengths [N] of the steps of samples at t [N]."""
        return torch.full_like(t, self.step) if self.scene.bounded else t * self.growth

    def place(self, rays_o, rays_d, t):
        """Points at t along rays in units of the box, all broadcast to [3,...] -> positions [3,...] in [0,1]."""
        x = torch.addcmul(rays_o, rays_d, t)
        x = x if self.scene.bounded else contract(x)
        return (x + self.extent).mul_(0.5 / self.extent)


class NeRF(SampledField):
    """A neural radiance field of a scene: drawing, editing, files and the fit."""

    def __init__(self, scene, levels=8, table=2 ** 15, width=32):
        """levels, table: number of levels and entries per level of the hash grid; width: of the MLPs."""
        super().__init__(scene, levels, table, width)
        self.config = dict(levels=levels, table=table, width=width)
        self.register_buffer("edits", torch.zeros((), dtype=torch.int64))  # number of calls of project_
        self.drawn = {}  # see `again`

    @property
    def shown(self):
        """Pixels of the shorter side of a picture that shows all details of the photographs. A ray of a capture takes
        fifty samples or more, so that a finer picture costs much and shows nothing new."""
        sides = [min(view.camera.width, view.camera.height) for view in self.scene.train]
        return math.inf if self.scene.bounded else math.ceil(4 / 3 * max(sides))

    @property
    def chunk(self):
        """Number of rays rendered at a time, which bounds the memory of a picture of any size."""
        return (4096 if self.scene.bounded else 1024) if self.centre.device.type == "cpu" else 2 ** 14

    # ---- drawing

    LIGHT = 1e-3  # least weight of a sample that is shaded
    KEPT = 2 ** 22  # the most samples of which `again` keeps the places: 100 MB

    @property
    def frozen(self):
        """Whether the densities stay as they are, in an edit of the colours alone of a whole object."""
        own = *self.solid.grid.parameters(), self.solid.sigma_in, self.solid.sigma_out
        return self.gate is None and not any(p.requires_grad for p in own)

    def again(self, camera, rays):
        """The Samples of each chunk of a Camera's rays, kept while the densities are frozen: to find them takes most of
        the time of a picture, and an edit is shown from the same sides before, meanwhile and after."""
        if camera.key not in self.drawn:
            while self.drawn and sum(len(found.t) for parts in self.drawn.values() for found in parts) > self.KEPT:
                del self.drawn[next(iter(self.drawn))]  # the oldest
            self.drawn[camera.key] = [self.find(*part)._replace(features=None) for part in self.chunks(*rays)]
        return self.drawn[camera.key]

    def chunks(self, *tensors):
        """Tensors [...,R] of rays in parts of at most `chunk` rays. Part i of n takes every n-th ray, so that all cost
        about the same."""
        count = math.ceil(tensors[0].shape[-1] / self.chunk)
        return [tuple(x[..., i::count] for x in tensors) for i in range(count)]

    @torch.no_grad()
    def find(self, rays_o, rays_d, jitter=0.5):
        """The Samples along rays_o, rays_d [3,R], in units of the scene, whose weight exceeds LIGHT."""
        count = rays_o.shape[1]
        if not count:  # no ray of a picture meets the region of a confined edit
            return Samples(rays_o, rays_o[0], torch.zeros(0, dtype=torch.long, device=rays_o.device), None, 0)
        jitter = torch.as_tensor(jitter, device=rays_o.device).expand(count, 1)
        rays_o = (rays_o - self.centre[:, None]) / self.scene.half
        alive, passed = torch.arange(count, device=rays_o.device), rays_o.new_zeros(count)  # passed: the sums of tau
        found, marched = [], 0
        for first, last in self.slabs(count):
            x, t, ray = self.march(rays_o[:, alive], rays_d[:, alive], jitter[alive], first, last)
            features = None if self.gate else self._in_batches(self.solid.grid, x)
            sigma = self._in_batches(lambda part: self.at(part)[0], x) if self.gate else [
                self.solid.density(part)[0] for part in features]
            tau = torch.cat(sigma) * self.length(t)
            on = volume_weights(tau, ray, len(alive)) * (-passed[alive]).exp()[ray] > self.LIGHT
            keep, within = on.nonzero()[:, 0], [part.nonzero()[:, 0] for part in on.tensor_split(len(sigma))]
            if features:
                features = torch.cat([p.index_select(1, at) for p, at in zip(features, within, strict=True)], 1)
            found.append((x[:, keep], t[keep], alive[ray[keep]], features))
            marched += len(t)
            passed.index_add_(0, alive[ray], tau)
            alive = alive[passed[alive] < -math.log(self.LIGHT)]
        x, t, ray, features = (None if parts[0] is None else torch.cat(parts, -1) for parts in zip(*found, strict=True))
        if len(found) > 1:
            ray, order = ray.sort(stable=True)
            x, t, features = x[:, order], t[order], None if features is None else features[:, order]
        return Samples(x, t, ray, features, marched)

    def shade(self, rays_o, rays_d, jitter=0.5, found=None):
        """Volume rendering (NeRF, eq. 3) of rays_o, rays_d [3,R] in the units of the scene.

        A first pass without gradient drops samples of hardly any weight; only the others get a colour and a gradient.
        As sigma = exp(.), the gradient lost is of the order of the dropped weight.

        Args:
            found: the Samples of these rays, if `find` has been called.
        Returns:
            rgb [3,R] without what lies behind, opacity [R], depth [R] summed with the weights, in units of the box, and
            a tuple of the shaded samples' weights [N], t [N], ray [N] and the number of samples marched.
        """
        count = rays_o.shape[1]
        x, t, ray, features, marched = found or self.find(rays_o, rays_d, jitter)
        sh = spherical_harmonics(rays_d).index_select(1, ray)
        sigma, rgb = self.at(x, sh) if self.gate else self.look(x, sh, features)
        weights = volume_weights(sigma * self.length(t), ray, count)
        values = rgb * weights
        total = sums(torch.cat((values, weights[None], (weights.detach() * t)[None])), ray, count)
        return total[:3], total[3], total[4], (weights, t, ray, marched)

    def draw(self, rays_o, rays_d, found=None):
        """Rays rays_o, rays_d [3,R] -> rgb [3,R] on the background; found: see `shade`."""
        rgb, opacity, _, _ = self.shade(rays_o, rays_d, found=found)
        field = self.gate.field if self.gate else self
        return rgb + field.behind(rays_d) * (1 - opacity)

    def rgb(self, camera):
        """The picture [3,H,W] of a Camera.

        A step of a confined edit draws only the pixels that can change, as does a picture of it from a camera that has
        been drawn before. Gradients of more than 4 `chunk` rays are deferred, see _Deferred: memory is then that of one
        chunk, the picture and the positions of its samples.
        """
        rays_o, rays_d = camera.rays(self.centre.device)
        learnt = torch.is_grad_enabled()
        still = (self.gate.still if learnt else self.gate.again)(camera) if self.gate else None
        if still and not learnt and self.gate.unchanged(self):
            return still.picture.view(3, camera.height, camera.width)
        if still:
            rays_o, rays_d = rays_o[:, still.open], rays_d[:, still.open]
        if not rays_o.shape[1]:  # nothing of the region is in the picture, and no parameter changes it
            rgb = rays_o + 0 * sum(p.sum() for p in self.parameters()) if learnt else rays_o
        elif learnt and rays_o.shape[1] <= 4 * self.chunk:
            rgb = self.draw(rays_o, rays_d)
        elif not learnt and self.frozen:
            rgb, _ = self.looked(rays_o, rays_d, self.again(camera, (rays_o, rays_d)))
        else:
            rgb = _Deferred.apply(self, learnt, rays_o, rays_d, *self.parameters())
        if still:
            rgb = still.picture.index_copy(1, still.open, rgb)
        return rgb.view(3, camera.height, camera.width)

    @torch.no_grad()
    def depth(self, view=None, size=None):
        """Expected depth [1,1,H,W] along the rays in units of the scene; 0 where a ray meets nothing opaque."""
        camera = self.camera(view, size)
        rays_o, rays_d = camera.rays(self.centre.device)
        still = self.gate.again(camera) if self.gate else None
        if still and self.gate.unchanged(self):
            depth = still.depth
        elif still:
            _, depth = self.looked(rays_o[:, still.open], rays_d[:, still.open])
            depth = still.depth.index_copy(0, still.open, depth)
        else:
            _, depth = self.looked(rays_o, rays_d, self.again(camera, (rays_o, rays_d)) if self.frozen else None)
        return depth.view(1, 1, camera.height, camera.width) * self.scene.half

    @torch.no_grad()
    def looked(self, rays_o, rays_d, found=None):
        """Rays rays_o, rays_d [3,R] -> rgb [3,R] on the background, and expected depth [R] along them in half sides of
        the box, 0 where they meet nothing opaque. found: the Samples of each of the `chunks`, if they are known."""
        rgb, far, field = torch.empty_like(rays_d), torch.empty_like(rays_d[0]), self.gate.field if self.gate else self
        parts = self.chunks(rays_o, rays_d, rgb, far)
        for (o, d, to, away), samples in zip(parts, found or [None] * len(parts), strict=True):
            colour, opacity, depth, _ = self.shade(o, d, found=samples)
            to.copy_(colour + field.behind(d) * (1 - opacity))
            away.copy_(torch.where(opacity > 0.5, depth / opacity.clamp_min(0.5), 0))
        return rgb, far

    # ---- interface of the editing loop

    def param_groups(self, *rates, **more):
        self.drawn = {}  # the densities may change from now on
        return super().param_groups(*rates, **more)

    def project_(self):
        """Call after each step of an edit: update the occupancy, in the first and every 16th call, if it can change.

        Occupancy is dilated by one cell, so that additions to a surface are sampled and can grow a cell at a time.
        """
        if self.edits % 16 == 0 and not self.frozen:
            generator = torch.Generator(self.centre.device).manual_seed(int(self.edits))
            self.update_occupancy(generator, dilate=True)
        self.edits += 1

    def data_loss(self, dataset, generator=None, l1=False):
        """The loss, a scalar, of one batch of a `dataset`. generator: a CPU's, as in sample_view; l1: use absolute
        differences, like Instruct-NeRF2NeRF, instead of the Huber loss."""
        seed = int(torch.randint(2 ** 31, (), generator=generator))
        rays = 1024 if self.centre.device.type == "cpu" else 4096
        return self.fit_loss(dataset, rays, torch.Generator(self.centre.device).manual_seed(seed), l1)[0]

    # ---- files

    def save(self, path):
        """Write everything as safetensors, atomically."""
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        meta = {"config": self.config, "fingerprint": self.scene.fingerprint}
        data = to_bytes(state, {"nerf": json.dumps(meta)})  # one entry, as the order of several is not fixed
        with replacing(path) as part:
            part.write_bytes(data)

    @classmethod
    def load(cls, path, scene, device="cpu"):
        """Read a file written by `save`; raises SceneError if it is damaged or belongs to another scene."""
        check_pointer(path)
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["nerf"])
                state = {k: file.get_tensor(k) for k in file.keys()}
            config, made_of = meta["config"], meta.get("fingerprint")
            if not (dictionary(config) and set(config) == {"levels", "table", "width"}
                    and all(count(config[key]) and 1 <= config[key] <= most for key, most in
                            (("levels", 32), ("table", 2 ** 24), ("width", 1024)))):
                raise ValueError("its sizes are invalid")
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
            raise SceneError(f"{path}: no readable NeRF: {one_line(e, 200)}") from e
        if made_of != scene.fingerprint:
            raise SceneError(f"{path}: was fitted to another scene than {scene.path}")
        if sum(value.numel() for value in state.values()) < config["table"]:
            raise SceneError(f"{path}: no readable NeRF: it is smaller than it says")
        try:
            nerf = cls(scene, **config)
            if "shape.sigma_in" in state:
                nerf.split()
            if "paint.colours" in state:
                nerf.painted(torch.zeros(len(state["paint.colours"]), 3))
            if any(name.startswith("lut.") for name in state):
                nerf.graded()
            if any(name.startswith("gate.") for name in state):
                nerf.confine(Region(scene, torch.zeros([side_of(scene)] * 3)))
            restore(nerf, state, path)
        except (ValueError, TypeError) as e:  # a table that is no power of two, other parts, NaN
            raise SceneError(e if str(path) in str(e) else f"{path}: no readable NeRF: {e}") from e
        return nerf.to(device)

    # ---- the fit

    # Samples of a batch in occupied cells and shaded, to which its number of rays adapts; rays at first and at most.
    BATCH, BATCH_GPU = (2 ** 16, 2 ** 13, 512, 8192), (2 ** 20, 2 ** 18, 4096, 2 ** 17)

    CHECKS = {"nerf": dictionary, "rays": lambda value: count(value) and 0 < value <= 2 ** 17, "drawn": count}

    @staticmethod
    def sizes(device):
        """Default levels, table and width for a device, a dict."""
        if torch.device(device).type == "cpu":
            return dict(levels=8, table=2 ** 15, width=32)
        return dict(levels=16, table=2 ** 19, width=64)

    @classmethod
    def fit(cls, scene, seconds=None, steps=None, seed=0, checkpoint=None, device="cpu", progress=True, **sizes):
        """Fit a new NeRF to the training views of a scene.

        Batches of random pixels, Huber and distortion loss, Adam with a learning rate that decays tenfold. Objects are
        fitted on random backgrounds, which only the true opacity explains: nothing white hides in front of white.
        Captures: see guide.Guide, box.in_sight.

        Args:
            seconds: process CPU time on a CPU, wall time elsewhere; 60 if neither it nor steps is given.
            steps: number of optimiser steps; with both limits, the first to be reached ends the fit.
            seed: for weights and batches. On a CPU, fits of equal steps are bit-identical.
            checkpoint: a path, written every 15 seconds and at the end. An existing one is resumed, with the same
                result as an unbroken fit; a finished fit is returned at once.
            sizes: levels, table, width, where not the device's defaults.
        Returns:
            The NeRF; its attribute `fitted` holds steps, seconds and rays of the fit.
        Raises:
            ValueError: the checkpoint is damaged, or of another scene or other sizes.
            FloatingPointError: the loss is not finite.
        """
        device = torch.device(device)
        sizes = cls.sizes(device) | sizes
        checks = cls.CHECKS if scene.bounded else cls.CHECKS | {"guide": dictionary}
        course = Course(scene, sizes, checks, seconds, steps, checkpoint, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nerf = cls(scene, **sizes).to(device)
        pixels = Pixels(scene.train, device)
        guide = None if scene.bounded else Guide(scene, pixels)
        parts = {"nerf": nerf, "guide": guide} if guide else {"nerf": nerf}
        (marched, kept, rays, most), drawn = cls.BATCH if device.type == "cpu" else cls.BATCH_GPU, 0
        if course.saved:
            for name, part in parts.items():
                restore(part, course.saved[name], course.checkpoint)
            rays, drawn = course.saved["rays"], course.saved["drawn"]
        extra = [guide.param_group()] if guide else []
        optimiser = torch.optim.Adam(nerf.param_groups(2e-2, 7e-3) + extra, fused=True)
        rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
        generator, = parallel.streams(seed, 1, device)

        def state():
            return {name: part.state_dict() for name, part in parts.items()} | dict(rays=rays, drawn=drawn)

        for step in course.run(optimiser, generator, state, progress):
            for group in optimiser.param_groups:
                group["lr"] = rates[group["name"]] * 0.1 ** course.share(step) * min(1, (step + 1) / 20)
            loss, colour, samples = nerf.fit_loss(pixels, rays, generator, guide=guide and guide.at(course.share(step)))
            optimiser.zero_grad()
            loss.backward()
            parallel.average(loss, optimiser.param_groups)
            optimiser.step()
            if step >= 96 and step % 16 == 0:  # earlier, sigma does not yet tell empty cells
                nerf.update_occupancy(parallel.shared(generator, seed + step), share=1 if step == 96 else 0.25)
            drawn += rays * parallel.world()
            samples = [parallel.largest(number) for number in samples]
            rays *= min(marched / max(samples[0], 1), kept / max(samples[1], 1), 2)
            rays = min(max(int(rays), 64), most)
            course.report(loss, 2 * colour, functools.partial(nerf.told, rays))  # near 0 Huber's is half the square
        nerf.open, nerf.fitted = None, {"steps": course.step, "seconds": course.spent, "rays": drawn}
        return nerf

    def told(self, rays):
        """Figures of a fit for its progress, a dict."""
        return dict(views=len(self.scene.train), rays=rays, occupied=f"{self.occupied.float().mean().item():.0%}")

    def fit_loss(self, pixels, rays, generator, l1=False, guide=None):
        """Loss of a batch of random pixels, its colour term, and its numbers of samples (marched, shaded).

        guide: a Guide of a capture's fit: it draws the pixels, opens the levels of the grid from coarse to fine,
        exposes the colours as each view does, and says where a ray must end.
        """
        rays_o, rays_d, wanted, *known = guide.draw(rays, generator) if guide else pixels(rays, generator)
        random = torch.rand(4, rays, generator=generator, device=rays_o.device)
        self.open = guide.opened(len(self.grid.cells)) if guide else None
        rgb, opacity, _, (weights, t, ray, marched) = self.shade(rays_o, rays_d, random[:1].T)
        behind = random[1:] if len(wanted) == 4 else self.behind(rays_d)
        seen, wanted = rgb + behind * (1 - opacity), over(wanted, behind)
        seen = guide.exposed(seen, known[0]) if guide else seen
        colour = l1_loss(seen, wanted) if l1 else huber_loss(seen, wanted, delta=0.1)
        loss = colour + guide.strayed(weights, t, ray, opacity, known[1]) if guide else colour
        s, ds = t, self.step
        if not self.scene.bounded:  # steps of a capture are even in log t
            whole = math.log(self.far / self.near)
            s, ds = torch.log(t / self.near) / whole, self.growth / whole
        return loss + 3e-3 * distortion(weights, s, ds, ray, rays), colour.detach(), (marched, len(t))


class _Deferred(torch.autograd.Function):
    """Render in chunks without gradient; in the backward pass draw each chunk again and push its gradient through.

    Both passes use the same samples, whose positions are kept (6 bytes each). The second pass costs these samples alone
    and memory grows by no more (deferred back-propagation: ARF, Zhang et al., arXiv 2206.06360). A chunk has at most
    2^15 rays: int16 holds their numbers.
    """

    @staticmethod
    def forward(ctx, nerf, learnt, rays_o, rays_d, *parameters):
        ctx.nerf, ctx.rays, ctx.numbers = nerf, (rays_o, rays_d), []
        ctx.save_for_backward(*parameters)  # the backward pass raises if a step has changed them in between
        rgb, end = torch.empty_like(rays_d), 0
        ctx.kept = [rays_d.new_empty(0, dtype=kind) for kind in (torch.float32, torch.int16)]  # t, ray
        chunks = nerf.chunks(*ctx.rays, rgb)
        for i, (*rays, to) in enumerate(chunks):
            found = nerf.find(*rays)
            to.copy_(nerf.draw(*rays, found))
            if learnt:
                ctx.numbers.append(len(found.t))
                start, end = end, end + len(found.t)
                # Allocate for all chunks at once, as their counts are similar: small tensors would fragment the memory.
                if end > len(ctx.kept[0]):
                    room = end * len(chunks) * 5 // (4 * (i + 1)) + 1
                    ctx.kept = [torch.cat((x[:start], x.new_empty(room - start))) for x in ctx.kept]
                for x, values in zip(ctx.kept, (found.t, found.ray), strict=True):
                    x[start:end] = values
        return rgb

    @staticmethod
    def backward(ctx, grad):
        nerf = ctx.nerf
        wanted = [p for p in ctx.saved_tensors if p.requires_grad]
        totals = [torch.zeros_like(p) for p in wanted]
        kept = (x[:sum(ctx.numbers)].split(ctx.numbers) for x in ctx.kept)
        for (rays_o, rays_d, part), t, ray in zip(nerf.chunks(*ctx.rays, grad), *kept, strict=True):
            ray = ray.long()
            start = (rays_o - nerf.centre[:, None]) / nerf.scene.half
            x = nerf.place(start[:, ray], rays_d[:, ray], t)
            with torch.enable_grad():
                rgb = nerf.draw(rays_o, rays_d, Samples(x, t, ray))
            for total, g in zip(totals, torch.autograd.grad(rgb, wanted, part, allow_unused=True), strict=True):
                if g is not None:
                    total += g
        totals = iter(totals)
        return None, None, None, None, *(next(totals) if p.requires_grad else None for p in ctx.saved_tensors)
