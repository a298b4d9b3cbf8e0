"""What --local preserves: edits of the shipped ball, alone and on a ground under a sky, with and without it."""
import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import run
from bench.edits import pictures_of
from bench.figures import figures
from bench.measure import table
from files.pictures import to_tensor
from image.figures import outside
from image.masks import subject_masks
from prior import Prior
from scene.reading import load_scene

PROMPTS = ["--source", "grinning face", "--target", "smiling face with sunglasses"]


def on_a_ground(source, folder):
    """Write a copy of a scene of a ball of radius 1 in which the ball lies on a tiled plane, without alpha."""
    for split in ("train", "test"):
        name = f"transforms_{split}.json"
        file = json.loads((source / name).read_text())
        for frame, view in zip(file["frames"], load_scene(source / name).train if split == "train" else
                               load_scene(source).test, strict=False):
            rays_o, rays_d = view.camera.rays()
            way = (-1.0 - rays_o[2]) / rays_d[2]
            at = rays_o + way * rays_d
            tile = (torch.sin(3 * at[0]) * torch.sin(3 * at[1]))[:, None].sigmoid()
            ground = torch.lerp(torch.tensor([0.62, 0.52, 0.40]), torch.tensor([0.80, 0.73, 0.62]), tile)
            fog = (way.clamp(0, 30) / 30)[:, None]
            sky = torch.lerp(torch.tensor([0.86, 0.91, 0.97]), torch.tensor([0.55, 0.72, 0.92]),
                             rays_d[2].clamp(0, 1)[:, None])
            behind = torch.where((way > 0)[:, None], torch.lerp(ground, sky, fog), sky).view(*view.pixels.shape[:2], 3)
            rgba = view.pixels.float() / 255
            picture = torch.lerp(behind, rgba[..., :3], rgba[..., 3:])
            path = folder / f"{frame['file_path']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((picture * 255).round().byte().numpy()).save(path)
        (folder / name).write_text(json.dumps(file))


def local(args):
    """Edit both scenes everywhere and with --local."""
    out, rows, prior = Path(args.out), [], Prior.from_pretrained(str(run.HERE / "models" / "emoji"))
    ball = run.HERE / "examples" / "ball"
    with contextlib.suppress(FileExistsError):
        on_a_ground(ball, out / "ball-on-ground")
    for scene in (ball, out / "ball-on-ground"):
        found = {}
        for name, flags in {"everywhere": [], "local": ["--local"]}.items():
            place = out / f"{scene.name}-{name}"
            if not (place / "sheet.png").exists() and run.main(["--mode", args.mode, "--scene", str(scene), *PROMPTS,
                                                                *flags, "--out", str(place)]):
                raise ValueError(f"{place}: the edit failed")
            before, after = (pictures_of(place / f"{file}.png", args.mode) for file in ("source", "result"))
            pictures = [to_tensor(p.resize((prior.size,) * 2, Image.LANCZOS)).float() for p in before]
            masks = subject_masks(prior, pictures, PROMPTS[1], PROMPTS[3], 16)
            line = outside(before, after, masks)
            kept = float(line.rpartition("PSNR ")[2].split()[0])
            options = run.parse(["--mode", args.mode, "--scene", str(scene), *PROMPTS])
            found[name] = kept, figures(prior, before, after, run.complete(options, prior))
        (a, free), (b, own) = found["everywhere"], found["local"]
        rows += [
            (f"{scene.name}: outside the subject, dB", f"{a:.1f}, {b:.1f}", "+6 dB", b >= a + 6),
            (
                f"{scene.name}: log-odds",
                f"{free['log-odds']:.1f}, {own['log-odds']:.1f}",
                ">= 90 %",
                own["log-odds"] >= 0.9 * free["log-odds"],
            ),
            (f"{scene.name}: PSNR of all, dB", f"{np.round(free['PSNR'], 1)}, {np.round(own['PSNR'], 1)}", "", None),
        ]
    return table("edited everywhere, and with --local", rows)
