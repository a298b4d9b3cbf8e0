"""Cameras: rays through pixels, projection, lens distortion, and camera paths around a scene.

    rays_o, rays_d = camera.framed(64).rays()      # [3,H*W] each
    u, v, depth, inside = in_picture(camera, x)    # of points x [3,N]
    cameras = turntable(nerf, 60, 256)             # a turn around the scene

Poses are camera-to-world with OpenGL's axes, lenses follow OpenCV's model.
"""
import math
from dataclasses import dataclass, replace

import torch

from files.pictures import frame_of


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with OpenCV's distortion.

    Attributes:
        pose: [3,4] float32 camera-to-world, OpenGL axes (x right, y up, looking along -z), units of the file.
        lens: fx, fy, cx, cy in pixels, then k1, k2, k3, k4, p1, p2.
        width, height: of the picture in pixels.
    """
    pose: torch.Tensor
    lens: tuple
    width: int
    height: int

    def framed(self, size):
        """The camera for the whole picture at another size: a Frame, or the pixels of the shorter side."""
        size = frame_of(size)
        if size.square:
            return self.square(size.short)
        width, height = size.sides(self.width, self.height)
        fx, fy, cx, cy, *distortion = self.lens
        across, down = width / self.width, height / self.height
        lens = (fx * across, fy * down, cx * across, cy * down, *distortion)
        return replace(self, lens=lens, width=width, height=height)

    def square(self, size):
        """The camera for the central square of the picture, at size x size pixels."""
        side = min(self.width, self.height)
        fx, fy, cx, cy, *distortion = self.lens
        cx, cy, zoom = cx - (self.width - side) // 2, cy - (self.height - side) // 2, size / side
        lens = (fx * zoom, fy * zoom, cx * zoom, cy * zoom, *distortion)
        return replace(self, lens=lens, width=size, height=size)

    def window(self, left, top, side):
        """The camera for a square of `side` pixels, `left` and `top` pixels from the picture's corner."""
        return replace(self.shifted(left, top), width=side, height=side)

    def shifted(self, right, down):
        """The camera with its pixel centres moved `right` and `down` by pixels."""
        fx, fy, cx, cy, *distortion = self.lens
        return replace(self, lens=(fx, fy, cx - right, cy - down, *distortion))

    @property
    def key(self):
        """A tuple that equal cameras share: under it a field keeps what it has found of a picture."""
        return *self.pose.flatten().tolist(), *self.lens, self.width, self.height

    def rays(self, device="cpu"):
        """rays_o, rays_d [3,H*W] through the pixel centres, row by row; rays_d has length 1."""
        pose = self.pose.to(device)
        rays_d = pose[:, :3] @ self.directions(device)
        return pose[:, 3:].expand_as(rays_d), rays_d / rays_d.norm(dim=0)

    def directions(self, device="cpu"):
        """Directions [3,H*W] of length 1 through the pixel centres, in the camera's axes."""
        pixel = torch.arange(self.width * self.height, device=device)
        lens = torch.tensor(self.lens, device=device)[:, None]
        return directions(lens, pixel % self.width + 0.5, pixel // self.width + 0.5)


def directions(lens, u, v):
    """Directions [3,N] of length 1, in the camera's axes, of pixels u, v [N]; lens [10,N] or [10,1]."""
    fx, fy, cx, cy, k1, k2, k3, k4, p1, p2 = lens
    x = x_d = (u - cx) / fx
    y = y_d = (v - cy) / fy
    # OpenCV's model maps undistorted to distorted points. Newton's method inverts it, also for wide lenses, for which
    # the usual fixed-point iteration diverges.
    for _ in range(8 if lens[4:].any() else 0):
        r2 = x * x + y * y
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
        slope = k1 + r2 * (2 * k2 + r2 * (3 * k3 + r2 * 4 * k4))  # d radial / d r2
        error_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) - x_d
        error_y = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y) - y_d
        xx = radial + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x
        yy = radial + 2 * y * y * slope + 2 * p2 * x + 6 * p1 * y
        xy = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
        det = xx * yy - xy * xy
        x, y = x - (yy * error_x - xy * error_y) / det, y - (xx * error_y - xy * error_x) / det
    d = torch.stack((x, -y, -torch.ones_like(x)))
    return d / d.norm(dim=0)


def distorted(lens, x, y):
    """Apply OpenCV's distortion of a lens to points x, y [N] in the plane at depth 1; returns x, y [N]."""
    _, _, _, _, k1, k2, k3, k4, p1, p2 = lens
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    return x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y


def in_picture(camera, x):
    """Project points x [3,N] by a pinhole camera: u, v in pixels, depth, whether they are in the picture, [N] each."""
    fx, fy, cx, cy, *_ = camera.lens
    p = torch.linalg.inv(camera.pose[:, :3]) @ (x - camera.pose[:, 3:])
    depth = (-p[2]).clamp_min(1e-6)
    u, v = cx + fx * p[0] / depth, cy - fy * p[1] / depth
    return u, v, depth, (p[2] < 0) & (u > 0) & (u < camera.width) & (v > 0) & (v < camera.height)


def turntable(representation, frames, size):
    """`frames` square Cameras around the scene.

    They make a full turn if the training cameras surround the scene, else swing over the arc that these cover.
    """
    at, full = _orbit(representation, size)
    turn = [i / frames for i in range(frames)]
    return [at(u if full else 0.5 + 0.5 * math.sin(2 * math.pi * u)) for u in turn]


def sides(representation, count, size):
    """`count` square Cameras spread evenly over the turn, or over the arc from one end to the other."""
    at, full = _orbit(representation, size)
    return [at(i / count if full else i / max(count - 1, 1)) for i in range(count)]


def _orbit(representation, size):
    """A path around the scene's centre at the training cameras' median distance and elevation.

    Returns (function: share of the path in 0..1 -> square Camera, whether the path is a full turn).
    """
    pose = torch.stack([v.camera.pose for v in representation.scene.train])  # [V,3,4]
    centre = representation.scene.centre
    up = pose[:, :, 1].mean(0)
    up = up / up.norm()
    offset = pose[:, :, 3] - centre
    height, distance = offset @ up, offset.norm(dim=1)
    forward = offset.mean(0) - offset.mean(0) @ up * up  # the middle of the arc; for a circle the first view
    if forward.norm() < 0.1 * distance.mean():
        forward = offset[0] - height[0] * up
    forward = forward / forward.norm()
    right = torch.linalg.cross(up, forward)
    angle = torch.atan2(offset @ right, offset @ forward)
    ordered = angle.sort().values
    gap = torch.cat((ordered.diff(), ordered[:1] + 2 * math.pi - ordered[-1:])).max()
    full = bool(gap <= math.pi / 3)
    low, high = (0.0, 2 * math.pi) if full else (angle.quantile(0.02).item(), angle.quantile(0.98).item())
    elevation = torch.asin((height / distance).clamp(-1, 1)).median()
    lens = representation.camera(None).square(size)

    def at(share):
        a = torch.tensor(low + (high - low) * share)
        back = elevation.cos() * (a.cos() * forward + a.sin() * right) + elevation.sin() * up
        return replace(lens, pose=look_at(centre + distance.median() * back, back, up))
    return at, full


def input_path(representation, frames, size):
    """`frames` square Cameras on a path through the training views, in their order."""
    pose = torch.stack([v.camera.pose for v in representation.scene.train])
    cameras = []
    for at in torch.linspace(0, len(pose) - 1, frames):
        i = min(int(at), len(pose) - 2) if len(pose) > 1 else 0
        middle = torch.lerp(pose[i], pose[min(i + 1, len(pose) - 1)], at - i)
        middle = look_at(middle[:, 3], middle[:, 2], middle[:, 1])
        cameras.append(replace(representation.camera(i).square(size), pose=middle))
    return cameras


def look_at(position, back, up):
    """Pose [3,4] at `position` with its z axis along `back` and its y axis near `up`."""
    back = back / back.norm()
    right = torch.linalg.cross(up, back)
    right = right / right.norm()
    return torch.stack((right, torch.linalg.cross(back, right), back, position), 1)


ELEVATIONS, PER_RING, ANGLE = (0, 20, 45), 8, 50  # degrees, cameras per ring, degrees of their angle of view


def around(means, opacities, up, size):
    """Square cameras of `size` pixels on three rings around Gaussians: centre [3], radius, and a list of Camera.

    The centre is the median along each axis of the means [N,3], weighted by opacities [N] (logits). The radius holds
    95 % of the Gaussians within three times the median distance; those beyond count as background.
    up: [3], the upward direction in the pictures.
    """
    weight = opacities.double().sigmoid()

    def quantile(values, share):
        order = values.argsort()
        total = weight[order].cumsum(0)
        return values[order[int((total < share * total[-1]).sum().clamp(max=len(order) - 1))]]
    centre = torch.stack([quantile(axis, 0.5) for axis in means.T])
    distance = (means - centre).norm(dim=1)
    weight = weight * (distance <= 3 * quantile(distance, 0.5))
    radius = max(quantile(distance, 0.95).item(), 1e-6)
    up = torch.tensor(up, dtype=torch.float32)
    right = torch.linalg.cross(up, up.roll(1))
    forward = torch.linalg.cross(right, up)
    focal = size / 2 / math.tan(math.radians(ANGLE) / 2)
    lens, cameras = (focal, focal, size / 2, size / 2, *[0.0] * 6), []
    reach = 1.3 * radius / math.sin(math.radians(ANGLE) / 2)  # with a margin
    for ring, elevation in enumerate(map(math.radians, ELEVATIONS)):
        for i in range(PER_RING):
            turn = 2 * math.pi * (i + ring / len(ELEVATIONS)) / PER_RING
            back = math.cos(elevation) * (math.cos(turn) * forward + math.sin(turn) * right) + math.sin(elevation) * up
            cameras.append(Camera(look_at(centre + reach * back, back, up), lens, size, size))
    return centre, radius, cameras
