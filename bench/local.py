"""What --local and --mask preserve: edits of the shipped ball, alone and on a ground, and of a ray-traced capture."""
import contextlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import max_pool2d

import run
from bench.capture import FRUIT, Things, ring, silhouette, write
from bench.edits import pictures_of
from bench.figures import figures, log_odds
from bench.measure import table
from files.pictures import to_pil, to_tensor
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
            masks = subject_masks(prior, pictures, PROMPTS[1], PROMPTS[3])
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


SIDES = (134, 100)  # pixels of a photograph
LEMON = Things([*FRUIT.spheres[3:], *FRUIT.spheres[:3]], 1, FRUIT.stretch)  # the same, with the lemon as the subject
CAPTURED = {"one mask": (FRUIT, "red apple", "green apple", 35), "local": (FRUIT, "red apple", "green apple", 27),
            "local, the lemon": (LEMON, "lemon", "lime", 27)}  # things, prompts, dB


def captured(args):
    """Edit a ray-traced capture of an apple beside a lemon with one mask of one photograph, and with --local alone."""
    out, rows, prior = Path(args.out), [], Prior.from_pretrained(str(run.HERE / "models" / "emoji"))
    folder = out / f"fruit-{args.views}"
    if not folder.exists():
        write(folder, args.views, things=FRUIT, sides=SIDES)
    first = silhouette(ring(args.views, SIDES)[1], FRUIT)
    to_pil(first.float().expand(-1, 3, -1, -1)).save(out / "001.png")
    for name in args.only or CAPTURED:
        things, source, target, bar = CAPTURED[name]
        drawn = [silhouette(camera, things) for camera in ring(args.views, SIDES)]
        flags = ["--mask", str(out / "001.png")] if name == "one mask" else ["--local"]
        options = run.parse(["--mode", args.mode, "--scene", str(folder), "--source", source, "--target", target,
                             *flags, "--device", "cpu", "--fit-seconds", str(args.fit_seconds), "--out",
                             str(out / f"{args.mode}-{run.slug(name)}"),
                             *(["--steps", str(args.steps)] if args.steps else [])])
        options.fit = out / f"fruit-{args.views}-{args.mode}"
        before, started = run.fit(options), time.process_time()
        run.run_one(prior, "pds", options, options.out)
        spent, file = time.process_time() - started, options.out / f"result{run.SUFFIX[args.mode]}"
        after, options = run.FITTED[args.mode].load(file, before.scene), run.complete(options, prior)
        region = run.region_of(before, run.Photographs(before), prior, options)
        kept, worst, odds, ious = [], [], [], []
        with torch.no_grad():
            for view in before.scene.test:
                mask, seen = drawn[int(Path(view.name).stem)], region.seen(before, view.camera, None) > 0
                change = (after.render(view.camera) - before.render(view.camera)).square().mean(1, keepdim=True)
                kept.append(change[~_wider(mask)].mean())
                worst.append(change[~_wider(seen)].max())
                if mask.sum() > 20:  # the subject is not hidden
                    odds.append([_odds(prior, scene, view.camera, mask, target, source) for scene in (before, after)])
                    ious.append(((mask & seen).sum() / (mask | seen).sum()).item())
        kept, worst = (-10 * x.clamp_min(1e-12).log10().item() for x in (torch.stack(kept).mean(), max(worst)))
        (was, now), iou = np.mean(odds, 0), np.mean(ious)
        rows += [(f"{name}: outside the drawn masks, dB", f"{kept:.1f}", f">= {bar}", kept >= bar),
                 (f"{name}: worst pixel outside the lifted mask, dB", f"{worst:.1f}", ">= 35", worst >= 35),
                 (f"{name}: IoU of the masks", f"{iou:.2f}, {min(ious):.2f}", ">= 0.6", iou >= 0.6),
                 (f"{name}: log-odds before and after", f"{was:.1f}, {now:.1f}", "> 0", now > 0),
                 (f"{name}: seconds of the process, the fit aside", f"{spent:.0f}", "", None)]
    return table(f"an apple beside a lemon on a table, {args.views} photographs, {args.mode}", rows)


def _wider(mask):
    """A mask [1,1,H,W] bool with two pixels of rim, which is as uncertain as the poses."""
    return max_pool2d(mask.float(), 5, 1, 2) > 0


def _odds(prior, scene, camera, mask, target, source):
    """The log-odds of the target in a scene from close by, where a mask [1,1,H,W] bool shows the subject."""
    at = mask[0, 0].nonzero()
    low, high = at.amin(0).tolist(), at.amax(0).tolist()
    side = math.ceil(max(b - a for a, b in zip(low, high, strict=True)) / 0.6)
    top, left = ((a + b - side) // 2 for a, b in zip(low, high, strict=True))
    picture = scene.render(camera.window(left, top, side).framed(prior.size))
    return log_odds(prior, prior.encode(picture), prior.embed(target), prior.embed(source))
