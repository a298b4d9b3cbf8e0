"""Fits of a small ray-traced capture by number of views: a statuette or fruit on a table in a room, COLMAP's format.

As in photographs, poses are off by about a pixel, exposures differ by a tenth, points are noisy and a few are wrong.
"""
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.measure import table
from files.pictures import to_pil, to_uint8
from nerf import NeRF
from scene.cameras import Camera, in_picture, look_at
from scene.reading import load_scene
from scene.representation import depth_picture, mean_psnr
from splat import Splats

WIDTH, HEIGHT, DISTANCE, ANGLE = 126, 84, 3.2, 44  # pixels, units from the statuette, degrees of horizontal view
SHARP = 0.33  # distance from the statuette in units; beyond it photographs are blurred and few points are found
ROOM = (torch.tensor([-5.0, -4.5, -1.2]), torch.tensor([4.5, 5.0, 2.6]))


class Things(NamedTuple):
    """What stands on the table.

    spheres: a centre, a radius and a colour each; subject: the number of those, from the first one, that an edit is
    about; stretch: factors on space around each centre, so that with a small one a sphere is an ellipsoid, long there.
    """
    spheres: list
    subject: int
    stretch: tuple


STATUETTE = Things([((0.0, 0.0, 0.62), 0.21, (0.85, 0.68, 0.52)), ((0.0, 0.0, 0.18), 0.33, (0.25, 0.42, 0.70)),
                    ((0.10, -0.17, 0.67), 0.05, (0.10, 0.10, 0.12)), ((-0.10, -0.17, 0.67), 0.05, (0.10, 0.10, 0.12)),
                    ((0.36, -0.05, 0.25), 0.12, (0.80, 0.30, 0.22)), ((-0.36, -0.05, 0.25), 0.12, (0.92, 0.78, 0.25)),
                    ((0.0, 0.05, 0.84), 0.10, (0.45, 0.20, 0.12))], 7, (1.0, 1.0, 0.75))
FRUIT = Things([((-0.18, 0.0, 0.24), 0.37, (0.86, 0.12, 0.10)), ((-0.18, 0.0, 0.60), 0.045, (0.36, 0.22, 0.10)),
                ((-0.15, 0.02, 0.66), 0.035, (0.36, 0.22, 0.10)), ((0.42, -0.05, 0.11), 0.23, (0.95, 0.80, 0.16))],
               3, (1.0, 1.0, 1.08))  # an apple with its stem beside a lemon
TABLE, TOP = 1.3, -0.1  # half side of the square table, height of its top


def pattern(x, size):
    """A smooth pattern [N] in [0,1] with details of about `size` at points x [3,N]: features for matching."""
    a = (x[0] * 7.1 + 1.3 * (x[1] * 5.3).sin()) / size
    b = (x[1] * 6.7 + 1.7 * (x[2] * 6.1).sin()) / size
    c = (x[2] * 7.9 + 1.1 * (x[0] * 4.7).sin()) / size
    return (a.sin() * b.sin() + b.sin() * c.cos() + c.sin() * a.cos()) / 6 + 0.5


def nearest(rays_o, rays_d, things=STATUETTE):
    """Rays [3,R] -> distance [R] to the first hit, its colour [3,R], and whether that is the table or on it."""
    far = torch.maximum((ROOM[0][:, None] - rays_o) / rays_d, (ROOM[1][:, None] - rays_o) / rays_d)
    t, wall = far.min(0)
    x = rays_o + t * rays_d
    paint = torch.tensor([[0.62, 0.55, 0.48], [0.50, 0.58, 0.62], [0.45, 0.40, 0.34]]).T[:, wall]
    colour = paint * (0.4 + 1.0 * pattern(x, 1.5)) * torch.where(x[2] > 2.5, 1.3, 1.0)
    thing = torch.zeros_like(t, dtype=torch.bool)

    def meet(at, paint):
        nonlocal t, colour, thing
        on = at < t
        t, colour, thing = torch.where(on, at, t), torch.where(on, paint, colour), thing | on
    top = (TOP - rays_o[2]) / rays_d[2]
    x = rays_o + top * rays_d
    inside = (top > 0) & (x[:2].abs().amax(0) < TABLE)
    shade = 1 - 0.45 * torch.exp(-6 * x[:2].square().sum(0).sub(0.09).clamp_min(0))
    grain = pattern(x * torch.tensor([[1], [3], [1]]), 0.5)
    wood = torch.tensor([0.60, 0.40, 0.24])[:, None] * (0.5 + 1.0 * grain)
    meet(torch.where(inside, top, math.inf), wood * shade)
    stretch = torch.tensor(things.stretch)[:, None]
    for centre, radius, paint in things.spheres:
        o, d = (rays_o - torch.tensor(centre)[:, None]) * stretch, rays_d * stretch
        a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - radius ** 2
        root = b * b - a * c
        at = torch.where(root > 0, (-b - root.clamp_min(0).sqrt()) / a, math.inf)
        x = rays_o + at.nan_to_num(posinf=0) * rays_d
        normal = (o + at.nan_to_num(posinf=0) * d) / radius
        light = 0.62 + 0.38 * (normal[2] * 0.8 + normal[0] * 0.4 - normal[1] * 0.4).clamp(-1, 1)
        meet(torch.where(at > 0, at, math.inf), torch.tensor(paint)[:, None] * light * (0.6 + 0.8 * pattern(x, 0.25)))
    return t, colour, thing


def photograph(camera, things=STATUETTE):
    """The picture [3,H,W] of a Camera, averaged over 3 x 3 rays per pixel."""
    fine = camera.framed(3 * min(camera.width, camera.height))
    _, colour, _ = nearest(*fine.rays(), things)
    return torch.nn.functional.avg_pool2d(colour.view(1, 3, fine.height, fine.width), 3)[0].clamp(0, 1)


def silhouette(camera, things=STATUETTE):
    """Where the subject is in the picture of a Camera, [1,1,H,W] bool: the mask that a hand would draw."""
    rays, others = camera.rays(), things._replace(spheres=things.spheres[things.subject:])
    return (nearest(*rays, things)[0] < nearest(*rays, others)[0]).view(1, 1, camera.height, camera.width)


def ring(count, sides=(WIDTH, HEIGHT), seed=0):
    """`count` Cameras of a hand-held walk around the table, with pictures of (W, H) pixels."""
    (width, height), g = sides, torch.Generator().manual_seed(seed)
    focal = width / 2 / math.tan(math.radians(ANGLE) / 2)
    cameras = []
    for i in range(count):
        wobble = torch.randn(4, generator=g) * torch.tensor([0.03, 0.05, 0.06, 0.03])
        turn, rise = 2 * math.pi * i / count + wobble[0].item(), 0.38 + wobble[1].item()
        back = torch.tensor([math.cos(rise) * math.sin(turn), -math.cos(rise) * math.cos(turn), math.sin(rise)])
        target = torch.tensor([wobble[3].item(), wobble[3].item(), 0.25])
        pose = look_at(target + (DISTANCE + wobble[2].item()) * back, back, torch.tensor([0.0, 0, 1]))
        cameras.append(Camera(pose, (focal, focal, width / 2, height / 2, *[0.0] * 6), width, height))
    return cameras


def matched(cameras, count, things=STATUETTE, seed=0):
    """Points as COLMAP finds them: positions [N,3], colours uint8 [N,3], errors [N], a list of views for each."""
    g, found = torch.Generator().manual_seed(seed), []
    for camera in cameras:
        rays = torch.stack(camera.rays(), 0)
        t, colour, thing = nearest(*rays, things)
        off = (rays[0] + t * rays[1] - torch.tensor([[0.0], [0], [0.25]])).norm(dim=0)  # from the focus
        chance = torch.where(thing, 1.0, 0.4) * (0.2 + colour.std(0)) * (torch.exp(-(off / SHARP) ** 2) + 0.002)
        at = torch.multinomial(chance, 1 + 3 * count // len(cameras), generator=g)
        found.append(torch.cat((rays[0][:, at] + t[at] * rays[1][:, at], colour[:, at])))
    found = torch.cat(found, 1)
    points, sees = found[:3], torch.zeros(len(cameras), found.shape[1], dtype=torch.bool)
    for i, camera in enumerate(cameras):
        way = points - camera.pose[:, 3:]
        distance = way.norm(dim=0)
        t, _, _ = nearest(camera.pose[:, 3:].expand_as(way), way / distance, things)
        sees[i] = in_picture(camera, points)[3] & (t > 0.98 * distance) & (torch.rand(len(distance), generator=g) < 0.6)
    keep = (sees.sum(0) >= 3).nonzero()[:, 0]
    keep = keep[torch.randperm(len(keep), generator=g)[:count]]
    points, colours, sees = points[:, keep].T, found[3:, keep].T, sees[:, keep].T
    noise = 0.004 * torch.randn(points.shape, generator=g) * points.norm(dim=1, keepdim=True).clamp_min(1)
    wrong = torch.rand(len(points), generator=g) < 0.03  # false matches
    points = points + torch.where(wrong[:, None], 60.0, 1.0) * noise
    error = 0.4 + 0.3 * torch.rand(len(points), generator=g) + 1.2 * wrong
    return points, (colours * 255).clamp(0, 255).byte(), error, [row.nonzero()[:, 0].tolist() for row in sees]


def quaternion(rotation):
    """wxyz of a rotation [3,3] by its eigenvector."""
    (a, b, c), (d, e, f), (g, h, i) = rotation.double().tolist()
    form = np.array([[a + e + i, h - f, c - g, d - b], [h - f, a - e - i, b + d, c + g],
                     [c - g, b + d, e - a - i, f + h], [d - b, c + g, f + h, i - a - e]])
    return np.linalg.eigh(form)[1][:, -1]


def write(folder, count, points=1200, things=STATUETTE, sides=(WIDTH, HEIGHT)):
    """Write the capture with `count` views of (W, H) pixels, its pictures and its COLMAP model in text, to a folder."""
    folder, cameras = Path(folder), ring(count, sides)
    model = folder / "sparse" / "0"
    for place in (model, folder / "images"):
        place.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(1)
    for i, camera in enumerate(cameras):
        gain = (0.1 * torch.randn((), generator=g)).exp() if i % 8 else 1.0  # test views have the mean exposure
        picture = (photograph(camera, things) * gain).clamp(0, 1)
        Image.fromarray(to_uint8(picture).numpy()).save(folder / "images" / f"{i:03}.png")
    positions, colours, errors, tracks = matched(cameras, points, things)
    fx, fy, cx, cy, *_ = cameras[0].lens
    (model / "cameras.txt").write_text(f"1 PINHOLE {sides[0]} {sides[1]} {fx} {fy} {cx} {cy}\n")
    lines, features = [], [[] for _ in cameras]
    for number, track in enumerate(tracks):
        for i in track:
            u, v, _, _ = in_picture(cameras[i], positions[number][:, None])
            features[i].append(f"{u.item():.2f} {v.item():.2f} {number}")
    for i, camera in enumerate(cameras):
        off = torch.randn(3, generator=g) * 0.5 / fx  # of the axis, in radians
        back = camera.pose[:, 2] + off[0] * camera.pose[:, 0] + off[1] * camera.pose[:, 1]
        camera = replace(camera, pose=look_at(camera.pose[:, 3] + 0.5 * off * DISTANCE, back, camera.pose[:, 1]))
        rotation = (camera.pose[:, :3] * torch.tensor([1.0, -1, -1])).T  # world to camera, OpenCV's axes
        words = [i + 1, *quaternion(rotation), *(-rotation @ camera.pose[:, 3]).tolist(), 1, f"{i:03}.png"]
        lines += [" ".join(map(str, words)), " ".join(features[i])]
    (model / "images.txt").write_text("\n".join([*lines, ""]))
    at = [0] * len(cameras)
    rows = []
    for number, track in enumerate(tracks):
        pairs = []
        for i in track:
            pairs += [i + 1, at[i]]
            at[i] += 1
        rows.append(" ".join(map(str, (number, *positions[number].tolist(), *colours[number].tolist(),
                                       round(errors[number].item(), 4), *pairs))))
    (model / "points3D.txt").write_text("\n".join([*rows, ""]))
    return folder


def capture(args):
    """Fit by number of views and seconds: test and training PSNR; sheets of test photographs, renderings, depth."""
    out, rows = Path(args.out), []
    for count in args.views:
        scene = load_scene(write(out / f"capture-{count}", count))
        for name, kind in (("nerf", NeRF), ("splat", Splats)):
            if name not in args.modes:
                continue
            for seconds in args.at:
                fitted = kind.fit(scene, seconds, seed=args.seed, progress=False)
                psnr, own = (mean_psnr(fitted, views) for views in (scene.test, scene.train))
                rows.append((f"{count} views, {name}, {seconds:g} s: test PSNR, training PSNR",
                             f"{psnr:.2f}, {own:.2f} dB", "", None))
            with torch.no_grad():
                strips = [torch.cat((view.picture()[None], fitted.render(view.camera),
                                     depth_picture(fitted.depth(view.camera))), 2) for view in scene.test]
            to_pil(torch.cat(strips, 3)).save(out / f"capture-{count}-{name}.png")
    return table(f"a ray-traced capture, {WIDTH} x {HEIGHT} px, every 8th view held out", rows)
