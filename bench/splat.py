"""3D Gaussians: the tiles of splat.py against two plain formulations; memory; PSNR of fits over time."""
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.measure import table
from bench.nerf import ROOT, fits
from scene.cameras import Camera
from scene.photographs import Scene, View
from splat import Splats, project


def camera_of(size):
    """A camera 4 units in front of the origin, with an angle of view of 40 degrees."""
    pose = torch.eye(4)[:3].clone()
    pose[2, 3] = 4
    focal = size / 2 / math.tan(math.radians(20))
    return Camera(pose, (focal, focal, size / 2, size / 2, 0, 0, 0, 0, 0, 0), size, size)


def cloud(count, degree=1, seed=0):
    """Random Gaussians that fill a cube of half side 0.9, each as large as its share of the volume."""
    g = torch.Generator().manual_seed(seed)
    view = View(camera_of(8), torch.zeros(8, 8, 4, dtype=torch.uint8), "none")
    scene = Scene(Path("none"), [view], [], torch.zeros(3), 1.0, True, torch.ones(3), "")
    size = math.log(0.6 / count ** (1 / 3))

    def draw(*shape):
        return torch.randn(*shape, generator=g)
    means = (torch.rand(count, 3, generator=g) * 2 - 1) * 0.9
    return Splats(scene, means, size + 0.4 * draw(count, 3), draw(count, 4), draw(count), draw(count, 3),
                  0.3 * draw(count, (degree + 1) ** 2 - 1, 3))


# ---- baselines: plain formulations with autograd's backward pass -----------------------------------------

def ordered(splats, camera):
    """Projections, conics, opacities and colours of the Gaussians in front of the camera, from near to far."""
    uv, depth, cov, _ = project(splats.means, splats.log_scales, splats.quaternions, camera, splats.near)
    order = depth.argsort()
    order = order[depth[order] > splats.near]
    xx, xy, yy = cov[:, order]
    det = xx * yy - xy * xy
    return (uv[:, order], xx, xy, yy, torch.stack((yy, -xy, xx)) / det, splats.opacities[order].sigmoid(),
            splats.colours(camera)[order])


def blend(uv, conic, opacity, rgb, u, v):
    """rgb and transmittance [4,P] of every Gaussian at every one of P pixels."""
    dx, dy = u - uv[0, :, None], v - uv[1, :, None]  # [N,P]
    power = -0.5 * (conic[0, :, None] * dx * dx + conic[2, :, None] * dy * dy) - conic[1, :, None] * dx * dy
    alpha = (opacity[:, None] * power.exp()).clamp(max=0.99)
    alpha = torch.where(alpha > 1 / 255, alpha, 0)
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat((torch.ones_like(after[:1]), after[:-1]))
    return torch.cat((rgb.T @ (before * alpha), after[-1:]))


def dense(splats, camera, grad, part=1024):
    """Every Gaussian at every pixel, in chunks of pixels with a backward pass each, so that a chunk fits the cache.

    Returns the picture [4,H,W] and adds to the gradients of the parameters, as the other formulations do.
    """
    at = torch.arange(camera.width * camera.height)
    u, v = at % camera.width + 0.5, at // camera.width + 0.5
    uv, _, _, _, conic, opacity, rgb = ordered(splats, camera)
    inputs = (uv, conic, opacity, rgb)
    leaves = [x.detach().requires_grad_() for x in inputs]
    pictures = []
    for pixels, g in zip(torch.stack((u, v)).split(part, 1), grad.view(4, -1).split(part, 1), strict=True):
        picture = blend(*leaves, *pixels)
        picture.backward(g)
        pictures.append(picture.detach())
    torch.autograd.backward(inputs, [x.grad for x in leaves])
    return torch.cat(pictures, 1).view(4, camera.height, camera.width)


def masked(splats, camera, grad, side=64):
    """A loop over tiles and the Gaussians whose 3-sigma squares touch them, as in plain PyTorch ports."""
    uv, xx, xy, yy, conic, opacity, rgb = ordered(splats, camera)
    radius = 3 * ((xx + yy) / 2 + (((xx - yy) / 2) ** 2 + xy * xy).sqrt()).sqrt()
    low, high = uv - radius, uv + radius
    picture = torch.zeros(4, camera.height, camera.width)
    for top in range(0, camera.height, side):
        for left in range(0, camera.width, side):
            touch = (high[0] > left) & (low[0] < left + side) & (high[1] > top) & (low[1] < top + side)
            at = torch.arange(side) + 0.5
            u, v = (left + at).repeat(side), (top + at).repeat_interleave(side)
            tile = blend(uv[:, touch], conic[:, touch], opacity[touch], rgb[touch], u, v)
            picture[:, top:top + side, left:left + side] = tile.view(4, side, side)
    picture.backward(grad)
    return picture.detach()


# ---- the commands -------------------------------------------------------------------------------------

def tiled(splats, camera, grad):
    picture, _ = splats.draw(camera)
    picture.backward(grad)
    return picture.detach()


def timed(call, *args, repeats):
    """Process CPU seconds of the fastest call: other load on the machine only makes calls slower."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call(*args)
        times.append(time.process_time() - start)
    return min(times)


def speed(args):
    rows, view = [], camera_of(args.size)
    grad = torch.randn(4, args.size, args.size, generator=torch.Generator().manual_seed(0))
    for count, bar in ((2000, 12), (10000, 35)):
        splats, results = cloud(count), {}
        for way in (tiled, dense, masked):
            splats.zero_grad()
            results[way] = way(splats, view, grad), {n: p.grad.clone() for n, p in splats.named_parameters()}
        times = {way: timed(way, splats, view, grad, repeats=n) for way, n in ((tiled, 10), (dense, 2), (masked, 3))}
        name = f"{count}:"
        rows += [(f"{name} dense, forward + backward", f"{times[dense] * 1e3:.0f} ms", "", None),
                 (f"{name} loop over masked tiles of 64", f"{times[masked] * 1e3:.0f} ms", "", None),
                 (f"{name} splat.py", f"{times[tiled] * 1e3:.1f} ms", "", None),
                 (f"{name} speed-up over dense", f"{times[dense] / times[tiled]:.0f}", f">= {bar}",
                  times[dense] >= bar * times[tiled]),
                 (f"{name} speed-up over masked tiles", f"{times[masked] / times[tiled]:.0f}", f">= {bar}",
                  times[masked] >= bar * times[tiled])]
        error = (results[tiled][0] - results[dense][0]).abs().max().item()
        rows.append((f"{name} pictures differ by at most", f"{error:.1e}", "<= 5e-3", error <= 5e-3))
        errors = {n: ((g - results[dense][1][n]).norm() / results[dense][1][n].norm()).item()
                  for n, g in results[tiled][1].items()}
        worst = max(errors, key=errors.get)
        rows.append((f"{name} gradients, worst: {worst}", f"{errors[worst]:.1e}", "<= 1e-2", errors[worst] <= 1e-2))
    return table(f"splats at {args.size} x {args.size}, process CPU time", rows)


def memory(args):
    if args.only:  # in a process of its own, as the peak of a process never falls
        splats, view, grad = cloud(args.only), camera_of(args.size), torch.randn(4, args.size, args.size)
        tiled(cloud(10), camera_of(16), torch.randn(4, 16, 16))  # the first backward pass allocates memory once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tiled(splats, view, grad)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return 0
    rows = []
    for count in (2000, 10000, 50000):
        command = [sys.executable, "-m", "bench", "splat-memory", "--size", str(args.size), "--only", str(count)]
        out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append((f"{count}: forward + backward add", f"{float(out):.0f} MB",
                     "<= 150 MB" if count == 10000 else "", float(out) <= 150 if count == 10000 else None))
    return table(f"memory at {args.size} x {args.size}, a process each", rows)


def fit(args):
    def counts(splats):
        return "steps, Gaussians", f"{splats.fitted['steps']}, {len(splats.means)}"
    splats, rows, title = fits(args, Splats, counts)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for suffix, bar in (".ply", 1e-6), (".splat", None):
            splats.save(Path(folder) / f"a{suffix}")
            again = Splats.load(Path(folder) / f"a{suffix}", splats.scene, args.device)
            error = max((again.render(i) - splats.render(i)).abs().max().item() for i in range(len(splats.scene.train)))
            rows.append((f"{suffix} loaded again: differs by at most", f"{error:.1e}", "<= 1e-6" if bar else "",
                         error <= bar if bar else None))
    return table(title, rows)
