"""Make the example scenes of --mode nerf: examples/apple (all around), examples/ball (a smiling face) and
examples/heart (both from the front).

    python examples/make_scenes.py                # writes the folders beside this file; two minutes

Each is Blender's format: pictures of 128 x 128 pixels with alpha, transforms_train.json and
transforms_test.json. Everything is a signed distance function, sphere-traced (Hart 1996), with light that is
fixed in the world: a soft one from above, so that a turn of the camera changes no colour.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, SAMPLES = 128, 4  # pixels a side, rays a side of a pixel
RED, DEEP_RED, PALE = np.array([[228, 30, 46], [158, 8, 34], [255, 128, 110]]) / 255
BROWN, GREEN, DEEP_GREEN = np.array([[122, 72, 38], [104, 186, 44], [48, 124, 30]]) / 255
YELLOW, ORANGE, CREAM = np.array([[255, 204, 50], [244, 152, 24], [255, 236, 130]]) / 255
INK, TONGUE = np.array([[84, 48, 14], [236, 78, 88]]) / 255


def apple(p):
    """Points [N,3] -> distances [N,3] to body, stem and leaf. z is up, the body about 1 in radius."""
    rho, z = np.hypot(p[:, 0], p[:, 1]), p[:, 2] + 0.16
    # half of a spindle torus: the outside of a circle that turns about an axis inside of it has a dimple at
    # each end
    taper = 1 + 0.13 * np.tanh(1.3 * z)
    body = (np.hypot(rho / taper - 0.40, z * 0.74) - 0.60) * 0.72
    bend = np.stack((0.16 * np.clip(z - 0.4, 0, 1) ** 2, 0 * z, 0 * z), 1)
    q = p + np.array([0, 0, 0.16]) - bend
    along = np.clip(q[:, 2], 0.4, 1.12)
    axis = along[:, None] * np.array([0, 0, 1.0])
    stem = (np.linalg.norm(q - axis, axis=1) - 0.05 - 0.035 * (along - 0.4)) * 0.8
    # the leaf: a lens (where two spheres overlap), flattened, rising from the stem to the right
    tilt, turn = math.radians(28), math.radians(-20)
    u = np.array([math.cos(tilt) * math.cos(turn), math.cos(tilt) * math.sin(turn), math.sin(tilt)])
    v = np.array([-math.sin(turn), math.cos(turn), 0])
    w = np.cross(u, v)
    q = p - (np.array([0.05, 0, 0.74]) + 0.33 * u)
    a, b, c = q @ u, q @ v, q @ w + 0.10 * (q @ u) ** 2
    arc = np.hypot(a, np.abs(b) + 0.19) - 0.38
    leaf = np.maximum(arc, np.abs(c) - 0.045) * 0.8
    return np.stack((body, stem, leaf), 1)


def apple_colour(p, n, part):
    up = 0.5 + 0.5 * n[:, 2:]
    rim = np.clip((np.hypot(p[:, :1], p[:, 1:2]) - 0.25) * 4, 0, 1)  # no light in the dimple
    glow = rim * np.clip(n[:, 2:], 0, 1) ** 3
    red = mix(mix(DEEP_RED, RED, smooth(up * 1.5)), PALE, 0.55 * glow)
    green = mix(DEEP_GREEN, GREEN, smooth(0.25 + 0.75 * np.abs(n[:, 2:])))
    return np.choose(part[:, None], (red, mix(BROWN * 0.7, BROWN, up), green))


def ball(p):
    return np.linalg.norm(p, axis=1)[:, None] - 1


def ball_colour(p, n, part):
    """The face is painted along -y, where the camera is: x to the right, z up."""
    x, z = p[:, :1], p[:, 2:]
    skin = mix(mix(ORANGE, YELLOW, smooth(0.72 + 0.75 * z)), CREAM, 0.8 * smooth(1.6 * z - 0.55))
    eyes = np.hypot((np.abs(x) - 0.27) / 0.10, (z - 0.21) / 0.16) - 1
    mouth = np.maximum(np.hypot(x / 0.44, (z + 0.12) / 0.42) - 1, (z + 0.12) * 3)
    tongue = np.maximum(np.hypot(x / 0.24, (z + 0.52) / 0.18) - 1, mouth + 0.06)
    front = p[:, 1:2] < 0
    face = np.where((np.minimum(eyes, mouth) < 0) & front, INK, skin)
    return np.where((tongue < 0) & front, TONGUE, face)


def heart(p):
    """Two equal cones with round ends, one a mirror image of the other, that share the tip; z is up."""
    belly = 1 + 0.14 * np.exp(-((p[:, 2] + 0.4) / 0.36) ** 2)  # a cone's flanks are straight, a heart's are not
    p = np.stack((np.abs(p[:, 0]) / belly, p[:, 1] / (0.85 * belly), p[:, 2] + 0.03), 1)
    low, high, narrow, wide = np.array([0, 0, -0.88]), np.array([0.44, 0, 0.32]), 0.10, 0.52
    length = np.linalg.norm(high - low)
    axis, slope = (high - low) / length, (wide - narrow) / length
    along = (p - low) @ axis
    across = np.linalg.norm(p - low - along[:, None] * axis, axis=1)
    # of all balls from tip to lobe the one whose surface is nearest
    centre = np.clip(along + across * slope / math.sqrt(1 - slope ** 2), 0, length)
    cone = np.hypot(along - centre, across) - narrow - slope * centre
    return (cone * 0.75)[:, None]


def heart_colour(p, n, part):
    shade = smooth(0.85 + 0.45 * n[:, 2:] + 0.25 * p[:, 2:])
    return mix(mix(DEEP_RED, RED, shade), PALE, 0.55 * np.clip(n[:, 2:], 0, 1) ** 3)


def mix(a, b, share):
    return a + (b - a) * np.clip(share, 0, 1)


def smooth(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def trace(distance, colour, rays_o, rays_d, radius=1.6):
    """rays_o [3], rays_d [N,3] of length 1 -> rgba [N,4], premultiplied."""
    out = np.zeros((len(rays_d), 4))
    middle = -rays_d @ rays_o
    t = np.maximum(middle - radius, 0)
    alive = np.flatnonzero(np.linalg.norm(rays_o + middle[:, None] * rays_d, axis=1) < radius)
    for _ in range(240):
        d = distance(rays_o + t[alive, None] * rays_d[alive])
        part, d = d.argmin(1), d.min(1)
        t[alive] += d
        hit = alive[d < 1e-3]
        if len(hit):
            p, e = rays_o + t[hit, None] * rays_d[hit], 1e-3
            n = [distance(p + e * axis).min(1) - distance(p - e * axis).min(1) for axis in np.eye(3)]
            n = np.stack(n, 1)
            n /= np.linalg.norm(n, axis=1, keepdims=True)
            out[hit, :3], out[hit, 3] = colour(p, n, part[d < 1e-3]), 1
        alive = alive[(d >= 1e-3) & (t[alive] < middle[alive] + radius)]
        if not len(alive):
            break
    return out


def picture(distance, colour, pose, focal):
    """uint8 [SIZE,SIZE,4] with straight alpha; pose [4,4] is camera-to-world, OpenGL axes."""
    n = SIZE * SAMPLES
    v, u = np.mgrid[:n, :n]
    x, y = ((i + 0.5) / SAMPLES - SIZE / 2 for i in (u.ravel(), v.ravel()))
    d = np.stack((x / focal, -y / focal, -np.ones(n * n)), 1) @ pose[:3, :3].T
    rgba = trace(distance, colour, pose[:3, 3], d / np.linalg.norm(d, axis=1, keepdims=True))
    rgba = rgba.reshape(SIZE, SAMPLES, SIZE, SAMPLES, 4).mean((1, 3))
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
    return (rgba * 255).round().astype(np.uint8)


def look_at(azimuth, elevation, distance, target):
    """Pose [4,4] of a camera; azimuth 0 is on the -y axis, angles in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = np.array([math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)])
    right = np.cross([0, 0, 1], back) / math.cos(e)
    pose = np.eye(4)
    pose[:3] = np.stack((right, np.cross(back, right), back, np.array(target) + distance * back), 1)
    return pose


def around(count, shift):
    """Angles all around and a little from above: a golden spiral between 2 and 38 degrees of elevation."""
    return [((i + shift) * 137.508 % 360, 2 + 36 * ((i + 0.5) * 0.618 % 1)) for i in range(count)]


def in_front(count, shift):
    """Angles over the front, to 26 degrees to either side: a Halton-like pattern, the middle first."""
    return [(52 * ((i * 0.618 + 0.5 + shift) % 1) - 26, 26 * ((i * 0.755 + 0.42 + shift) % 1) - 11)
            for i in range(count)]


SCENES = {"apple": (apple, apple_colour, around, (0, 0, -0.02)),
          "ball": (ball, ball_colour, in_front, (0, 0, 0)),
          "heart": (heart, heart_colour, in_front, (0, 0, 0))}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent, help="where (default: beside this file)")
    add("--views", type=int, default=40, help="training views (default: 40), and a fifth for testing")
    args = parser.parse_args()
    angle, distance = math.radians(28), 5.2
    focal = SIZE / 2 / math.tan(angle / 2)
    for name, (shape, colour, views, target) in SCENES.items():
        for split, count, shift in (("train", args.views, 0), ("test", args.views // 5, 0.27)):
            (args.out / name / split).mkdir(parents=True, exist_ok=True)
            frames = []
            for i, (azimuth, elevation) in enumerate(views(count, shift)):
                pose = look_at(azimuth, elevation, distance, target)
                Image.fromarray(picture(shape, colour, pose, focal)).save(
                    args.out / name / split / f"r_{i:02}.png", optimize=True)
                matrix = pose.round(9).tolist()
                frames.append({"file_path": f"./{split}/r_{i:02}", "transform_matrix": matrix})
            (args.out / name / f"transforms_{split}.json").write_text(
                json.dumps({"camera_angle_x": angle, "frames": frames}, indent=1) + "\n")


if __name__ == "__main__":
    main()
