"""3D Gaussian splatting in plain PyTorch: tiled rendering, its gradients, fitting, and the files of viewers.

    scene = load_scene("examples/apple")           # from scene/reading.py
    splats = Splats.fit(scene, seconds=60)         # process CPU time on a CPU, wall time on a GPU
    psnr, views = evaluate(splats, scene)          # on the held-out views
    picture = splats.render(view=3, size=64)       # [1,3,64,64] in [0,1], differentiable
    splats.save("apple.ply")                       # for any 3DGS viewer; or .splat

The method is Kerbl et al.'s (arXiv 2308.04079), its projection EWA splatting (Zwicker et al., 2001).
"""
import hashlib
import math
import warnings
from pathlib import Path

import torch
from torch.nn.functional import avg_pool3d, logsigmoid, threshold_

from files.checkpoint import CheckpointError, dictionary, finite, restore
from files.messages import one_line
from files.pictures import to_uint8
from files.writing import replacing
from loop import parallel
from loop.fit import Course
from loop.optimiser import FieldOfSome, SmoothField
from scene.box import cell_points, contract, in_sight, uncontract, visual_hull
from scene.cameras import around
from scene.captures import SceneError
from scene.gaussians import ATTRIBUTES, FILES, FITTED, PARSED, in_parsed, origin_of, suffix_of, up_of, usable
from scene.guide import Exposure
from scene.photographs import Scene, View, over, undistorted
from scene.representation import SH_DC, Representation, spherical_harmonics

WIDENED = 0.3  # square pixels that the low-pass filter adds to the variances
FAINTEST = 2.5e-5  # least ratio of the determinants of which the opacity gets the root, as in the paper's code
SEEN = 1 / 255  # least alpha that is drawn
HIGHEST = 0.99  # largest alpha: each layer lets some gradient through
SPENT = 1e-4  # transmittance below which the rest of a tile is not drawn
START_POINTS = 20000  # most points of a cloud that Gaussians start from: the search for neighbours is quadratic


def project(means, log_scales, quaternions, camera, near):
    """Project Gaussians by a pinhole camera: the EWA approximation (Kerbl et al., eq. 5).

    Args:
        means: [N,3] in units of the scene; log_scales: [N,3]; quaternions: [N,4] as wxyz, of any length.
        camera: a Camera; its distortion is ignored.
        near: depth of the near plane.
    Returns:
        uv [2,N] in pixels; depth [N] along the optical axis; cov [3,N], the xx, xy, yy of the covariance in
        square pixels, low-pass filter included; factor [N] of the opacity that compensates for the filter: it keeps the
        integral over the picture (Mip-Splatting, Yu et al., arXiv 2311.16493, eq. 9). All are finite also in front of
        the near plane.
    """
    fx, fy, cx, cy, *_ = camera.lens
    pose = camera.pose.to(means.dtype)
    # to OpenCV's axes; inverted on the CPU, as for nine numbers a GPU takes longer and the CPU would wait for it
    world = (torch.linalg.inv(pose[:, :3]) * pose.new_tensor([[1.0], [-1.0], [-1.0]])).to(means.device)
    x, y, z = world @ (means - pose[:, 3].to(means.device)).T
    depth = z.detach()
    z = z.clamp_min(near)
    x, y = x / z, y / z
    uv = torch.stack((cx + fx * x, cy + fy * y))
    # linearise at most 0.3 of the half picture beyond the edge: the Jacobian grows without limit
    room_x, room_y = 0.15 * camera.width / fx, 0.15 * camera.height / fy
    x = x.clamp(-cx / fx - room_x, (camera.width - cx) / fx + room_x)
    y = y.clamp(-cy / fy - room_y, (camera.height - cy) / fy + room_y)
    axes = (world @ rotations(quaternions).view(3, -1)).view(3, 3, -1) * log_scales.T.exp()  # [camera's, own axis, N]
    du, dv = fx / z * (axes[0] - x * axes[2]), fy / z * (axes[1] - y * axes[2])  # [3,N]
    cov = torch.stack(((du * du).sum(0) + WIDENED, (du * dv).sum(0), (dv * dv).sum(0) + WIDENED))
    # the determinant without the filter, as a sum of squares (Cauchy and Binet), and with it: differences would cancel
    plain = (du * dv.roll(1, 0) - dv * du.roll(1, 0)).square().sum(0).clamp_max(1e37)
    return uv, depth, cov, (plain / (plain + WIDENED * (cov[0] + cov[2] - WIDENED))).clamp_min(FAINTEST).sqrt()


def rotations(quaternions):
    """Quaternions [N,4] as wxyz, of any length -> matrices [3,3,N] whose columns are a Gaussian's axes."""
    w, i, j, k = (quaternions / quaternions.norm(dim=1, keepdim=True).clamp_min(1e-12)).T
    return torch.stack((
        1 - 2 * (j * j + k * k), 2 * (i * j - w * k), 2 * (i * k + w * j),
        2 * (i * j + w * k), 1 - 2 * (i * i + k * k), 2 * (j * k - w * i),
        2 * (i * k - w * j), 2 * (j * k + w * i), 1 - 2 * (i * i + j * j))).view(3, 3, -1)


def quadratics(uv, cov, peak):
    """Coefficients q [N,6] float64 of log alpha = q . (1, x, y, x^2, xy, y^2) at the point (x, y) of the picture.

    With polynomials, the alphas of a tile are one product of matrices. They must be moved to the tile before they are
    rounded to float32, as their terms are large and cancel. peak: [N], the log of alpha at the centres.
    """
    (u, v), (xx, xy, yy) = uv.double(), cov.double()
    det = xx * yy - xy * xy
    a, b, c = yy / det, -xy / det, xx / det
    p, q = a * u + b * v, b * u + c * v
    return torch.stack((peak.double() - (p * u + q * v) / 2, p, q, -a / 2, -b, -c / 2), 1)


class Tiles:
    """The Gaussians in each tile of a picture, from front to back.

    Attributes:
        side: of a tile in pixels; across, down: number of tiles.
        index: [M], numbers of Gaussians, tile after tile; those of tile t are index[start[t]:][:count[t]].
        moved: [tiles,6,6]; q @ moved[t] are the coefficients q of `quadratics` about the centre of tile t.
    """

    def __init__(self, uv, depth, cov, opacity, camera, near, least=SEEN):
        """uv [2,N], depth [N], cov [3,N] of `project`; opacity [N] in [0,1]; least: alpha that is drawn."""
        self.least = least
        # half width and height of the ellipse on which alpha falls below SEEN
        reach = (2 * (opacity / SEEN).log()).clamp_min(0).sqrt() * cov[::2].sqrt()  # [2,N]
        low, high = uv - reach, uv + reach
        edge = uv.new_tensor([[camera.width], [camera.height]])
        seen = (depth > near) & (opacity > SEEN) & ((high > 0) & (low < edge)).all(0)
        near_first = seen.nonzero()[:, 0]
        near_first = near_first[depth[near_first].argsort(stable=True)]
        low, high = low[:, near_first], high[:, near_first]

        def covered(side):
            """First tile and number of tiles [2,V] of each Gaussian along x and y, and the number of tiles [2,1]."""
            size = edge.div(side).ceil()
            first = (low / side).floor().clamp_min(0).int()
            return first, torch.minimum((high / side).ceil(), size).int() - first, size
        # a pair of a Gaussian and a tile costs its pixels and about 12 more
        self.side = min((16, 8, 4), key=lambda side: int(covered(side)[1].prod(0).sum()) * (side * side + 12))
        (x, y), (wide, high), size = covered(self.side)
        self.across, self.down = (int(n) for n in size[:, 0])
        each = wide * high  # from here on, one row per pair of a Gaussian and a tile
        rank = torch.repeat_interleave(torch.arange(len(each), device=uv.device), each)
        within = torch.arange(len(rank), device=uv.device, dtype=torch.int32)
        within -= (each.cumsum(0) - each).int()[rank]
        wide = wide[rank]
        row = within.div(wide, rounding_mode="floor")
        tile = (y[rank] + row) * self.across + x[rank] + within - row * wide
        tile, order = tile.sort(stable=True)  # stable: each list remains ordered by depth
        self.index = near_first[rank[order]]
        self.count = torch.bincount(tile, minlength=self.across * self.down)
        self.start = self.count.cumsum(0) - self.count
        row, column = (torch.arange(n, device=uv.device, dtype=torch.float64) for n in (self.down, self.across))
        x, y = column.repeat(self.down), row.repeat_interleave(self.across)
        x, y = (x + 0.5) * self.side, (y + 0.5) * self.side  # the tiles' centres
        self.moved = torch.eye(6, dtype=torch.float64, device=x.device).repeat(len(x), 1, 1)
        self.moved[:, 1, 0] = self.moved[:, 4, 2] = x
        self.moved[:, 2, 0] = self.moved[:, 4, 1] = y
        self.moved[:, 3, 0], self.moved[:, 4, 0], self.moved[:, 5, 0] = x * x, x * y, y * y
        self.moved[:, 3, 1], self.moved[:, 5, 2] = 2 * x, 2 * y

    def basis(self, dtype):
        """1, x, y, xx, xy, yy [6,P] of a tile's pixels about its centre."""
        pixel = torch.arange(self.side, device=self.index.device, dtype=dtype) + 0.5 - self.side / 2
        x, y = pixel.repeat(self.side), pixel.repeat_interleave(self.side)
        return torch.stack((torch.ones_like(x), x, y, x * x, x * y, y * y))

    def alphas(self, quadratic, dtype, part, first, depth):
        """Numbers [A,K] and alphas [A,K,P] of the Gaussians first .. first + depth in the tiles part [A].

        quadratic: [N+1,6] from `quadratics`; the number N pads lists that end earlier.
        """
        layer = torch.arange(first, first + depth, device=part.device)
        at = (self.start[part][:, None] + layer).clamp_max_(len(self.index) - 1)
        index = torch.where(layer < self.count[part][:, None], self.index[at], len(quadratic) - 1)
        local = quadratic.index_select(0, index.view(-1)).view(*index.shape, 6) @ self.moved[part]
        # clamped, as exp is slow where it underflows
        alpha = (local.view(-1, 6).to(dtype) @ self.basis(dtype)).clamp_(min=-20).exp_()
        return index, threshold_(alpha, self.least, 0).clamp_(max=HIGHEST).view(*index.shape, -1)

    def picture(self, tiles, camera):
        """[tiles,C,side^2] -> [C,H,W]."""
        channels = tiles.shape[1]
        tiles = tiles.view(self.down, self.across, channels, self.side, self.side).permute(2, 0, 3, 1, 4)
        return tiles.reshape(channels, self.down * self.side, -1)[:, :camera.height, :camera.width]


class _Composite(torch.autograd.Function):
    """Alpha compositing from front to back (Kerbl et al., eq. 3) in every tile: rgb and transmittance.

    Blocks of K Gaussians in A tiles of P pixels are [A,K,P] arrays. The backward pass draws each block again, so that
    only the transmittances in front of the blocks are kept.
    """
    ELEMENTS, DEPTH = 2 ** 18, 64  # elements of a block that fit a CPU's cache; largest K

    @staticmethod
    def forward(ctx, quadratic, colour, tiles):
        """quadratic [N,6] float64, colour [N,3], a Tiles -> [tiles,4,P]: rgb in front of nothing, transmittance."""
        quadratic, colour = _padded(quadratic, colour)
        ctx.save_for_backward(quadratic, colour)
        ctx.tiles, ctx.blocks = tiles, []
        out = colour.new_zeros(len(tiles.count), 4, tiles.side ** 2)
        out[:, 3] = 1
        layers = (_Composite.ELEMENTS if colour.device.type == "cpu" else 2 ** 24) // tiles.side ** 2  # of a block
        # group tiles with lists of similar lengths; finished ones make room for longer blocks
        for part in tiles.count.argsort(descending=True, stable=True).split(max(1, layers // 32)):
            first, longest = 0, int(tiles.count[part[0]])
            while first < longest:
                part = part[(tiles.count[part] > first) & (out[part, 3].amax(1) > SPENT)]
                if not len(part):
                    break
                depth = min(max(1, layers // len(part)), _Composite.DEPTH, longest - first)
                index, alpha = tiles.alphas(quadratic, colour.dtype, part, first, depth)
                before = out[part, 3]
                ctx.blocks.append((part, first, depth, before))
                light = _transmittance(alpha, before)
                out[part, 3] = light[:, -1]
                weight = light[:, :-1].mul_(alpha)
                rgb = colour.index_select(0, index.view(-1)).view(*index.shape, 3)
                out[part, :3] += torch.bmm(rgb.transpose(1, 2), weight)
                first += depth
        return out

    @staticmethod
    def backward(ctx, grad):
        quadratic, colour = ctx.saved_tensors
        tiles = ctx.tiles
        behind = grad[:, 3].clone()  # d loss / d transmittance behind the current block
        grad_q, grad_c = torch.zeros_like(quadratic), torch.zeros_like(colour)
        for part, first, depth, before in reversed(ctx.blocks):
            index, alpha = tiles.alphas(quadratic, colour.dtype, part, first, depth)
            out_grad, entry = grad[part, :3], index.view(-1)
            light = _transmittance(alpha, before)
            # w_k = alpha_k times the light in front of k; v_k = colour_k . d loss / d rgb
            last = light[:, -1] * behind[part]
            weight = light[:, :-1].mul_(alpha)
            share = torch.bmm(weight, out_grad.transpose(1, 2))  # [A,K,3]
            grad_c.index_add_(0, entry, share.view(-1, 3))
            # d loss / d log alpha_k = w_k v_k - alpha_k / (1 - alpha_k) * (sum of w_j v_j behind k, plus last)
            value = torch.bmm(colour.index_select(0, entry).view(*index.shape, 3), out_grad).mul_(weight)
            sums = value.cumsum(1)
            total = sums[:, -1] + last
            behind[part] = total / before.clamp_min(1e-30)  # before is 0 behind twenty opaque Gaussians
            value.addcmul_(alpha / (1 - alpha), torch.sub(total[:, None], sums, out=sums), value=-1)
            value = torch.ops.aten.hardtanh_backward(value, alpha, 0, HIGHEST)  # zero where alpha is clamped
            local = (value.view(-1, tiles.side ** 2) @ tiles.basis(colour.dtype).T).double().view(*index.shape, 6)
            grad_q.index_add_(0, entry, (local @ tiles.moved[part].transpose(1, 2)).view(-1, 6))
        return grad_q[:-1], grad_c[:-1], None


def _padded(quadratic, value):
    """[N,6] and [N,...] -> the same with a Gaussian number N, which is invisible and pads the lists of Tiles."""
    return (torch.cat((quadratic, quadratic.new_tensor([[-20.0, 0, 0, 0, 0, 0]]))),
            torch.cat((value, value.new_zeros(1, *value.shape[1:]))))


def _transmittance(alpha, before):
    """Transmittance [A,K+1,P] in front of each of K alphas [A,K,P] and behind the last; before [A,P]: of the first."""
    light = alpha.new_empty(len(alpha), alpha.shape[1] + 1, alpha.shape[2])
    light[:, 0] = before
    torch.sub(1, alpha, out=light[:, 1:])
    return light.cumprod_(1)


@torch.no_grad()
def _median_depth(quadratic, depth, tiles):
    """Depth [tiles,P] of the Gaussian behind which half of the light is left, 0 if more is left behind all of them."""
    (quadratic, depth), first = _padded(quadratic, depth), 0
    out = depth.new_zeros(len(tiles.count), tiles.side ** 2)
    light = torch.ones_like(out)
    while len(deeper := ((tiles.count > first) & (light.amax(1) > 0.5)).nonzero()[:, 0]):
        for part in deeper.split(max(1, 2 ** 22 // (_Composite.DEPTH * tiles.side ** 2))):  # 16 MB a block
            index, alpha = tiles.alphas(quadratic, depth.dtype, part, first, _Composite.DEPTH)
            before, behind = light[part], _transmittance(alpha, light[part])[:, 1:]
            light[part] = behind[:, -1]
            found = depth[index].gather(1, (behind <= 0.5).int().argmax(1))  # argmax: of the first
            out[part] = torch.where((before > 0.5) & (light[part] <= 0.5), found, out[part])
        first += _Composite.DEPTH
    return out


class Splats(Representation):
    """N Gaussians: drawing, editing, files and the fit.

    Attributes:
        means: [N,3] in units of the scene; log_scales: [N,3]; quaternions: [N,4] as wxyz; opacities: [N] as logits.
        sh_dc, sh_rest: [N,3] and [N,K,3] with K = 0, 3, 8 or 15; the colour is 0.5 + their sum with the harmonics.
        comments: of their file. With FITTED among them, the low-pass filter only widens the Gaussians, as in their fit;
            without it, their opacities compensate, so that small pictures look like reduced large ones.
    """

    def __init__(self, scene, means, log_scales, quaternions, opacities, sh_dc, sh_rest, comments=(FITTED,)):
        """scene: a Scene, whose photographs are undistorted; the others: as above."""
        super().__init__(undistorted(scene))
        self.comments = tuple(comments)
        for name, value in zip(ATTRIBUTES, (means, log_scales, quaternions, opacities, sh_dc, sh_rest), strict=True):
            setattr(self, name, torch.nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))
        position = torch.stack([v.camera.pose[:, 3] for v in scene.train])
        # the unit of the means' learning rate, as in the paper's code
        self.extent = 1.1 * (position - position.mean(0)).norm(dim=1).max().clamp_min(0.1 * scene.half).item()
        self.near = 0.05 * scene.half
        self.learning = None  # [N] bool, the Gaussians that may change; None: all, see confine

    def colours(self, camera):
        """rgb [N,3] of the Gaussians in the directions of a Camera."""
        rgb = 0.5 + SH_DC * self.sh_dc
        if self.sh_rest.shape[1]:
            d = (self.means - camera.pose[:, 3].to(self.means)).T
            harmonics = spherical_harmonics(d / d.norm(dim=0).clamp_min(1e-12))[1:self.sh_rest.shape[1] + 1]
            rgb = rgb + (harmonics.T[:, :, None] * self.sh_rest).sum(1)
        return rgb.clamp_min(0)

    def draw(self, camera):
        """The picture [4,H,W] on black with its transmittance, and uv [2,N], the means in pixels."""
        quadratic, tiles, uv, _ = self._tiled(camera)
        return tiles.picture(_Composite.apply(quadratic, self.colours(camera), tiles), camera), uv

    def _tiled(self, camera):
        """For a Camera: coefficients of `quadratics`, the Tiles, uv [2,N] in pixels and depth [N]."""
        uv, depth, cov, factor = project(self.means, self.log_scales, self.quaternions, camera, self.near)
        peak, least = logsigmoid(self.opacities.double()), SEEN
        if FITTED not in self.comments:  # then thousands in a pixel may be faint, yet opaque together
            peak, least = peak + factor.double().log(), SEEN * FAINTEST ** 0.5
        with torch.no_grad():
            tiles = Tiles(uv, depth, cov, self.opacities.sigmoid(), camera, self.near, least)
        return quadratics(uv, cov, peak), tiles, uv, depth

    def rgb(self, camera):
        """The picture [3,H,W] of a Camera without its distortion."""
        picture = self.draw(camera)[0]
        return picture[:3] + picture[3:] * self.background[:, None, None]

    @torch.no_grad()
    def depth(self, view=None, size=None):
        """Median depth [1,1,H,W] along the rays in units of the scene, at which half of the light is left (as in 2D
        Gaussian Splatting, Huang et al.); 0 where a ray meets nothing opaque. Where a pixel shows two surfaces, at the
        rim of a thing, it is that of one of them, unlike the expected depth."""
        camera = self.camera(view, size)
        quadratic, tiles, _, depth = self._tiled(camera)
        depth = tiles.picture(_median_depth(quadratic, depth, tiles)[:, None], camera)
        return (depth / camera.directions(depth.device)[2].abs().view_as(depth))[None]  # by the cosine to the axis

    # ---- interface of the editing loop

    def confine(self, region):
        """From now on only Gaussians learn that lie in a region.Region up to a standard deviation along each axis."""
        means, axes = self.means.detach(), rotations(self.quaternions.detach()) * self.log_scales.detach().exp().T
        ends = [means.T, *(means.T + sign * axis for axis in axes.unbind(1) for sign in (-1, 1))]
        self.learning = torch.stack([region.at(x.cpu()) > 0 for x in ends]).all(0).to(means.device)
        if not self.learning.any():
            raise ValueError(f"{self.scene.path}: no Gaussian lies in the region of the edit")
        inside = self.learning.to(self.means)
        for name in ATTRIBUTES:
            parameter = getattr(self, name)
            shape = -1, *[1] * (parameter.ndim - 1)
            parameter.register_hook(lambda grad, shape=shape: grad * inside.view(shape))

    def data_loss(self, dataset, generator=None, l1=True):
        """The L1 loss, a scalar, of a random picture of a `dataset`; l1 is unused."""
        view = int(torch.randint(len(dataset.cameras), (), generator=generator))
        return (self.render(dataset.cameras[view]) - dataset.picture(view)).abs().mean()

    def param_groups(self, means=1.6e-4, log_scales=5e-3, quaternions=1e-3, opacities=5e-2, sh_dc=2.5e-3, shared=False):
        """Groups for Adam with the rates of the paper's code.

        means: in extents of the cameras; sh_rest: sh_dc / 20; shared: one second moment for each group of colours.
        """
        rates = (means * self.extent, log_scales, quaternions, opacities, sh_dc, sh_dc / 20)
        return [{"name": name, "params": [getattr(self, name)], "lr": rate, "eps": 1e-15}
                | ({"shared": True} if shared and name.startswith("sh_") else {})
                for name, rate in zip(ATTRIBUTES, rates, strict=True)]

    def colour_parameters(self):
        """The parameters of appearance: the coefficients of the spherical harmonics."""
        return [self.sh_dc, self.sh_rest]

    def fields(self, sigma):
        """{name: SmoothField} of the colours, one field over all Gaussians; sigma: width in half sides of the box.

        Beyond the box, where they lie ever farther apart, the Gaussians are as close as in `contract`.
        """
        centre = torch.as_tensor(self.scene.centre).to(self.means)
        places = contract((self.means.detach() - centre).T / self.scene.half).T.contiguous()
        field = SmoothField(places, sigma) if self.learning is None else FieldOfSome(places, sigma, self.learning)
        return {"sh_dc": field, "sh_rest": field}

    @torch.no_grad()
    def project_(self):
        """After a step, normalise the quaternions and keep the opacities where their gradient does not vanish."""
        self.quaternions /= self.quaternions.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.opacities.clamp_(-10, 10)

    # ---- files

    def save(self, path):
        """Write a 3DGS .ply or, without sh_rest, comments and rounded to 8 bits, a .splat, atomically.

        Positions are in the coordinates of the scene's file. Map coordinates, too far from zero for float32, are
        written relative to the scene's origin, which a comment of the .ply ("origin X Y Z") and a warning state.
        """
        path, origin = Path(path), self.scene.origin
        values = {name: getattr(self, name).detach().cpu().float() for name in ATTRIBUTES}
        data = FILES[suffix_of(path)][1](**values, origin=origin, comments=self.comments)
        with replacing(path) as part:
            part.write_bytes(data)
        if any(origin):
            warnings.warn(one_line(f"{path}: its positions are relative to {' '.join(map(repr, origin))} in the "
                                   "coordinates of the scene, which float32 cannot hold"), stacklevel=2)

    @classmethod
    def load(cls, path, scene=None, device="cpu", size=256, up=None):
        """Read the Gaussians of a 3DGS .ply or a .splat.

        Args:
            scene: the Scene of their photographs; a warning is given where they look unlike these. Gaussians trained by
                nerfstudio are moved to its coordinates by a dataparser_transforms.json beside them or beside the
                scene. None: cameras are placed around them, see `around`, and their renderings serve as photographs.
            size, up: see `around`.
        Raises:
            SceneError: the file is missing, or cannot be drawn.
        """
        path = Path(path)
        read = FILES[suffix_of(path)][0]
        try:
            data = path.read_bytes()
        except OSError as e:
            raise SceneError(f"{path}: cannot be read: {e.strerror}") from e
        (means, *others), comments = read(path, data)
        shift = origin_of(path, comments) - torch.tensor(scene.origin if scene else (0.0, 0, 0), dtype=torch.float64)
        values = [(means + shift if shift.any() else means).float(), *(value.float() for value in others)]
        values = usable(path, values)
        comments = [text for text in comments if text.split()[:1] != ["origin"]]
        if scene is None:
            up = up or up_of(path, comments)
            return cls._alone(path, values, comments, hashlib.sha256(data).hexdigest(), device, size, up)
        splats = cls(scene, *values, comments).to(device)
        error, spread = splats._likeness()
        given = next(filter(Path.is_file, (folder / PARSED for folder in (path.parent, scene.path.parent))), None)
        if error > spread and given:
            moved = cls(scene, *in_parsed(given, values, scene.origin), comments).to(device)
            splats, error = min((splats, error), (moved, moved._likeness()[0]), key=lambda pair: pair[1])
        if error > spread:
            psnr = -10 * math.log10(error)
            warnings.warn(one_line(f"{path}: looks unlike the photographs of {scene.path}, PSNR {psnr:.0f} dB: is it "
                                   "of this scene, and in its coordinates?"), stacklevel=2)
        return splats

    @classmethod
    def _alone(cls, path, values, comments, digest, device, size, up):
        """The Gaussians `values` of the file `path` in a Scene of rendered views around them."""
        vector = [(axis == up[-1]) * (-1.0 if up[0] == "-" else 1.0) for axis in "xyz"]
        centre, radius, cameras = around(values[0], values[3], vector, size)
        blank = torch.zeros(size, size, 3, dtype=torch.uint8)
        views = [View(camera, blank, str(i)) for i, camera in enumerate(cameras)]
        fingerprint = hashlib.sha256(f"{digest} {size} {up}".encode()).hexdigest()
        scene = Scene(path, views, [], centre, 1.05 * radius, False, torch.ones(3), fingerprint)
        splats = cls(scene, *values, comments).to(device)
        with torch.no_grad():
            for i, view in enumerate(views):
                views[i] = View(view.camera, to_uint8(splats.render(view.camera)[0]).cpu(), view.name)
        return splats

    @torch.no_grad()
    def _likeness(self):
        """Mean squared errors of renderings of about four photographs, and of their mean colours."""
        shown = range(0, len(self.scene.train), max(1, len(self.scene.train) // 4))
        photographs = [(i, self.photograph(i, 64)) for i in shown]
        error = sum((self.render(i, 64) - p).square().mean().item() for i, p in photographs)
        spread = sum((p - p.mean((2, 3), True)).square().mean().item() for _, p in photographs)
        return error / len(shown), spread / len(shown)

    # ---- the fit

    DENSIFY = 100  # steps from one densification to the next
    CHECKS = {"splats": dictionary, "moved": torch.is_tensor}  # of the values in a checkpoint

    @staticmethod
    def sizes(device):
        """Default count, limit and degree for a device, a dict."""
        if torch.device(device).type == "cpu":
            return dict(count=2000, limit=10000, degree=1)
        return dict(count=20000, limit=300000, degree=3)

    @classmethod
    def start(cls, scene, count, degree, generator):
        """`count` Gaussians on points of the scene's cloud; those in excess of its points are placed on the surface of
        the visual hull of an object, and anywhere in sight of a view in a capture."""
        scene, known = undistorted(scene), torch.full((count, 3), math.nan)
        means, scales = _places(scene, count, generator)
        if scene.points is not None:
            pick = torch.randperm(len(scene.points), generator=generator)[:count]
            points = scene.points[pick]
            means, scales = (torch.cat(pair)[:count] for pair in ((points, means), (_spacing(points), scales)))
            if scene.colours is not None:
                known[:len(pick)] = scene.colours[pick]
        log_scales, quaternions = scales.log()[:, None].expand(-1, 3), torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
        colour = torch.full((4, count), 1e-3)  # sums of rgb and of weights over the views
        for view in scene.train:
            (u, v), depth, *_ = project(means, log_scales, quaternions, view.camera, 1e-3 * scene.half)
            inside = (depth > 0) & (u > 0) & (u < view.camera.width) & (v > 0) & (v < view.camera.height)
            if view.mask is not None:
                inside[inside.clone()] = view.mask[v[inside].long(), u[inside].long()]
            pixels = view.pixels[v[inside].long(), u[inside].long()].T.float() / 255
            alpha = pixels[3] if len(pixels) == 4 else torch.ones_like(pixels[0])
            colour[:, inside] += torch.cat((pixels[:3], torch.ones_like(pixels[:1]))) * alpha
        colour = torch.where(known.isnan(), (colour[:3] / colour[3]).T, known)
        return cls(scene, means, log_scales, quaternions, torch.full((count,), 0.0 if scene.bounded else -2.0),
                   (colour - 0.5) / SH_DC, torch.zeros(count, (degree + 1) ** 2 - 1, 3))

    @classmethod
    def fit(cls, scene, seconds=None, steps=None, seed=0, checkpoint=None, device="cpu", progress=True, **sizes):
        """Fit new splats to the training views of a scene, one view per step: Adam on the absolute difference.

        Without the paper's structural similarity, which made a step on a CPU a third slower and no fit better. Objects
        are fitted on random backgrounds, which only the true opacity explains. Captures: see guide.Exposure, in_sight.

        Args:
            seconds: process CPU time on a CPU, wall time elsewhere; 60 if neither it nor steps is given.
            steps: number of optimiser steps; with both limits, the first to be reached ends the fit.
            seed: for first Gaussians, views and backgrounds. On a CPU, fits of equal steps are bit-identical.
            checkpoint: a path, written every 15 seconds and at the end. An existing one is resumed, with the same
                result as an unbroken fit; a finished fit is returned at once.
            sizes: count of Gaussians at the start, limit on it, degree of harmonics, where not the device's defaults.
        Returns:
            The Splats; the attribute `fitted` holds steps and seconds of the fit.
        Raises:
            ValueError: the checkpoint is damaged, or of another scene or other sizes.
            FloatingPointError: the loss is not finite.
        """
        device, scene = torch.device(device), undistorted(scene)
        sizes = cls.sizes(device) | sizes
        checks = cls.CHECKS if scene.bounded else cls.CHECKS | {"exposure": dictionary}
        course = Course(scene, sizes, checks, seconds, steps, checkpoint, device)
        generator, = parallel.streams(seed, 1)
        if course.saved:
            splats = cls._restored(scene, course.saved, sizes, course.checkpoint)
        else:
            splats = cls.start(scene, _first_count(scene, sizes), sizes["degree"], parallel.shared(generator, seed))
        splats.to(device)
        exposure, clear = _exposure(scene, course, device), _clear(scene, device=device)
        # for each Gaussian, the sum of the gradients of its mean on the screen, and the number of pictures with one
        moved = course.saved["moved"] if course.saved else torch.zeros(2, len(splats.means), device=device)
        # several times the paper's rates: a minute on a CPU has 2,000 steps, not 30,000
        groups = splats.param_groups(4e-3, 4e-2, 2e-2, 1e-1, 4e-2) + ([exposure.param_group()] if exposure else [])
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        rates = {group["name"]: group["lr"] for group in optimiser.param_groups}

        def state():
            return {"splats": splats.state_dict(), "moved": moved} | (exposure.kept() if exposure else {})

        for step in course.run(optimiser, generator, state, progress):
            for group in optimiser.param_groups:
                group["lr"] = rates[group["name"]] * (0.01 if group["name"] == "means" else 0.2) ** course.share(step)
            view = scene.train[number := _in_turn(len(scene.train), step, seed)]
            loss, error, uv = splats._fit_step(view, generator, exposure, number)
            optimiser.zero_grad()
            loss.backward()
            parallel.average(loss, optimiser.param_groups)
            optimiser.step()
            splats.project_()
            moved += _pull(uv, view.camera)
            if (step + 1) % cls.DENSIFY == 0:
                moved = parallel.summed(moved)
                grow = 0.15 if course.share(step + 1) < 0.6 else 0
                splats._densify(optimiser, moved[0] / moved[1].clamp_min(1), sizes["limit"], grow,
                                parallel.shared(generator, seed + step), clear)
                moved = moved.new_zeros(2, len(splats.means))
            course.report(loss, error, lambda: dict(views=len(scene.train), splats=len(splats.means)))
        splats.fitted = {"steps": course.step, "seconds": course.spent}
        return splats

    @classmethod
    def _restored(cls, scene, saved, sizes, path):
        """The splats in the checkpoint `path` of a fit."""
        state = saved["splats"]
        tensors = [state.get(name) for name in ATTRIBUTES]
        right = all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in tensors)
        number = len(tensors[0]) if right and tensors[0].ndim else 0
        rest = (sizes["degree"] + 1) ** 2 - 1
        shapes = [(number, 3), (number, 3), (number, 4), (number,), (number, 3), (number, rest, 3)]
        if not number or [tuple(value.shape) for value in tensors] != shapes or saved["moved"].shape != (2, number):
            raise CheckpointError(path, "its Gaussians have other shapes")
        splats = cls(scene, *tensors).to(tensors[0].device)
        restore(splats, state, path)
        if not finite(saved["moved"]):
            raise CheckpointError(path, "moved is not finite")
        return splats

    def _fit_step(self, view, generator, exposure=None, number=0):
        """Loss for a View, its mean squared error, and uv [2,N] in pixels, which retains its gradient; exposure: of a
        capture's views, of which this is the one with that number."""
        picture, uv = self.draw(view.camera)
        uv.retain_grad()
        behind = self.background
        if self.scene.bounded:
            behind = torch.rand(3, generator=generator).to(behind)
        wanted = over(view.picture(behind.device), behind)
        seen = picture[:3] + picture[3:] * behind[:, None, None]
        if exposure:
            seen = exposure.exposed(seen.flatten(1), [number]).view_as(seen)
        error = seen - wanted
        error = error if view.mask is None else error[:, view.mask.to(error.device)]
        loss = error.abs().mean()
        return loss + exposure.biased() if exposure else loss, error.detach().square().mean(), uv

    @torch.no_grad()
    def _densify(self, optimiser, moved, limit, grow, generator, clear=None):
        """Drop transparent or huge Gaussians, and double the share `grow` with the largest gradients moved [N].

        A small Gaussian is cloned, a large one split in two (Kerbl et al., 5.2). The paper has a threshold instead of a
        share, whose effect depends on the size of the pictures. limit: largest number of Gaussians; clear: cells of
        `_clear`, outside of which a capture's Gaussians are dropped.
        """
        scales = self.log_scales.exp().amax(1)
        keep = self.opacities.sigmoid() > 0.005
        if self.scene.bounded:
            keep &= scales < 0.5 * self.scene.half
        if clear is not None:
            x = contract((self.means.T - self.centre[:, None]) / self.scene.half)
            at = ((x + 2) / 4 * CLEAR).long().clamp(0, CLEAR - 1)
            keep &= clear[at[0] + CLEAR * (at[1] + CLEAR * at[2])]
        keep = keep.nonzero()[:, 0]
        keep = keep[moved[keep].argsort(descending=True, stable=True)]
        room = max(0, min(limit - len(keep), int(grow * len(keep))))
        source = torch.cat((keep, keep[:room]))
        for group in optimiser.param_groups[:len(ATTRIBUTES)]:
            old = group["params"][0]
            new = torch.nn.Parameter(old[source])
            if old in optimiser.state:
                state = optimiser.state[new] = optimiser.state.pop(old)
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = state[moment][source]
                    state[moment][len(keep):] = 0
            group["params"] = [new]
            setattr(self, group["name"], new)
        twins = (scales[keep[:room]] > 0.01 * self.extent).nonzero()[:, 0]
        twins = torch.cat((twins, twins + len(keep)))
        offset = torch.randn(len(twins), 3, generator=generator).to(scales.device) * self.log_scales[twins].exp()
        self.means[twins] += (rotations(self.quaternions[twins]) * offset.T).sum(1).T
        self.log_scales[twins] -= math.log(1.6)


def _pull(uv, camera):
    """Lengths of the gradients of uv [2,N] in half pictures, whatever their size, and whether there are any: [2,N]."""
    pull = (uv.grad * uv.new_tensor([[camera.width], [camera.height]]) / 2).norm(dim=0)
    return torch.stack((pull, (pull > 0).float()))


def _exposure(scene, course, device):
    """The Exposure of a capture's fit, as the resumed checkpoint holds it or new; None for an object."""
    if scene.bounded:
        return None
    exposure = Exposure(len(scene.train), device)
    if course.saved:
        restore(exposure, course.saved["exposure"], course.checkpoint)
    return exposure


def _places(scene, count, generator):
    """Positions [count,3] that the pictures allow, and standard deviations [count] that fill the space between."""
    extent, cells = (1, 64) if scene.bounded else (2, 32)
    _, hull = visual_hull(scene.train, scene.centre, scene.half, extent, cells)
    if not scene.bounded:
        hull &= _clear(scene, cells)
        if scene.points is not None:  # which show what is in the box
            hull &= (cell_points(torch.arange(cells ** 3), cells) * 2 - 1).abs().amax(0) * extent > 1
    if scene.bounded:  # the inside is never seen
        hull &= avg_pool3d(hull.view(1, 1, cells, cells, cells).float(), 3, 1, 1).view(-1) < 0.999
    at = hull.nonzero()[:, 0]
    at = at if len(at) else torch.arange(cells ** 3)
    # the cameras of a capture look at its middle: half of the Gaussians go into the box, and are smaller
    weight = torch.ones(len(at)) if scene.bounded else (cell_points(at, cells) - 0.5).norm(dim=0).add(0.1) ** -4
    pick = torch.multinomial(weight, count, True, generator=generator)
    each = (count * weight / weight.sum())[pick]  # expected number in the cell
    inner = (cell_points(at[pick], cells, torch.rand(3, count, generator=generator)) * 2 - 1) * extent
    x = uncontract(inner)
    # the size of its share of the surface, or of the volume, which the contraction has stretched
    spacing = each ** (-1 / 2 if scene.bounded else -1 / 3) * 2 * extent / cells * scene.half
    return x.T * scene.half + scene.centre, 0.5 * spacing * x.norm(dim=0) / inner.norm(dim=0).clamp_min(1e-6)


CLEAR = 64  # cells along each side of the grid in which a capture is clear


def _clear(scene, cells=CLEAR, device="cpu"):
    """The cells of a capture that can hold something, [cells^3] bool, see in_sight; None for an object."""
    if scene.bounded:
        return None
    return in_sight(scene.train, scene.points, scene.centre, scene.half, cells)[0].to(device)


def _first_count(scene, sizes):
    """Number of Gaussians at the start of a fit: at least one per point of the cloud, but leaving room to grow."""
    points = 0 if scene.points is None else min(len(scene.points), START_POINTS, sizes["limit"] // 2)
    return max(sizes["count"], points)


def _in_turn(views, step, seed):
    """The number of the view of a step, of so many: every view once, in random order, before any comes again; each
    process takes its own."""
    at = step * parallel.world() + parallel.rank()
    return int(torch.randperm(views, generator=torch.Generator().manual_seed(seed + at // views))[at % views])


def _spacing(points):
    """Root mean square distance [N] of points [N,3] to their three nearest neighbours, as in Kerbl et al., 5.1."""
    if len(points) < 2:
        return torch.ones(len(points))
    nearest = [torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist").topk(
        min(4, len(points)), largest=False).values[:, 1:] for part in points.split(1024)]
    distance = torch.cat(nearest).square().mean(1).sqrt()
    # equal points have no distance, and a lonely one must not fill the picture
    return distance.clamp(1e-3 * distance.median().item() + 1e-9, 10 * distance.median().item() + 1e-9)
