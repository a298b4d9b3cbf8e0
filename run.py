"""Edit an SVG, a picture, a NeRF or 3D Gaussians towards a prompt with Posterior Distillation Sampling, or a rival.

    python run.py --mode svg                                  # the shipped example
    python run.py --mode svg --svg cat.svg --source "a cat face" --target "a dog face" --compare
    python run.py --mode image --image cat.png --source "a cat face" --target "a dog face"
    python run.py --mode toy                                  # SDS, DDS and PDS in the plane
    python run.py --mode nerf --scene examples/apple --source "red apple" --target "green apple"
    python run.py --mode splat                                # the same scene as 3D Gaussians
    python run.py --mode nerf --compare in2n inv2n sds dds pds            # the paper's Figure 2: every method
    python run.py --mode image --loss in2n                    # an editor of pictures alone
    python run.py --mode bench --compare sds dds pds          # one table over every edit of examples/edits.txt
    python run.py --mode bench --list FILE --only svg         # over the drawings of another list
    python run.py --mode nerf --scene DIR --fit-only --fit-seconds 60     # fit, and measure the test views

The output folder gets source.*, result.*, progress.gif, sheet.png (before and after, labelled; of a scene from several
sides) and config.json; of a scene also turntable.gif and depth.png, with --export every view as nerfstudio reads it.
"""
import argparse
import copy
import functools
import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image

import pds
import report
import table
import toy
from edit import COEFFICIENTS, EDITABLE, EDITORS, LOSSES, MODES, SCENES, TITLES, edit, guidance_of, stages_of
from edit2d import Picture, subject_masks
from nerf import NeRF
from prior import InstructPix2Pix, Prior
from report import beside, exit_code, number, outside, sheet, snapshot, to_pil, write
from scene import depth_picture, evaluate, export, input_path, load_scene, sides, turntable
from splat import Splats
from svg_raster import SVG

HERE = Path(__file__).resolve().parent
EXAMPLE = {"svg": ("smiling-face.svg", "slightly smiling face", "smiling face with sunglasses"),
           "image": ("red-apple.png", "red apple", "green apple"),
           "nerf": ("apple", "red apple", "green apple"), "splat": ("apple", "red apple", "green apple")}


# ---- what can be edited -------------------------------------------------------------------------------
# A loader returns the scene (what edit.py asks of it stands there; it also has save(path)), its parameter groups for
# Adam, and the source, whose render(view) is the picture before.

def load_svg(args, prior):
    scene = SVG.load(args.input, skip_unsupported=args.skip_unsupported, size=prior.size, ss=args.ss).to(prior.device)
    scene.jitter = args.jitter
    groups = scene.param_groups(points=args.points, colours=args.colours, colours_only=args.colours_only)
    if not any(p.numel() for g in groups for p in g["params"]):
        raise ValueError(f"{args.input}: nothing to edit: no filled or stroked shape in it")
    return scene, groups, copy.deepcopy(scene)


def load_image(args, prior):
    try:
        picture = Image.open(args.input).convert("RGBA")
    except (OSError, Image.DecompressionBombError) as e:
        raise ValueError(f"{args.input}: no readable picture: {e}") from e
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    square = square.convert("RGB").resize((prior.size, prior.size), Image.LANCZOS)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(1, prior.size, prior.size, 3)
    scene = Picture(pixels.permute(0, 3, 1, 2).float() / 255, prior, in_pixels=args.pixels)
    return scene, scene.param_groups(args.colours if args.pixels else args.latent), copy.deepcopy(scene)


class Photographs:
    """What a scene is edited from: its own pictures."""

    def __init__(self, scene):
        self.render = scene.photograph


def fit(args):
    """The scene as a NeRF or as splats. The fit is kept beside the output, so that a second edit starts at once."""
    scene = load_scene(args.input, args.downscale)
    args.fit.parent.mkdir(parents=True, exist_ok=True)
    return FITTED[args.mode].fit(scene, args.fit_seconds, checkpoint=args.fit, device=args.device)


def load_nerf(args, prior):
    nerf = fit(args)
    nerf.learn_from(prior.size)
    return nerf, nerf.param_groups(args.table), Photographs(nerf)


def load_splat(args, prior):
    splats = fit(args)
    # A fifth of the rates of a fit: hundreds of steps must not move what a fit takes tens of thousands for.
    groups = splats.param_groups(means=3e-5, log_scales=1e-3, quaternions=2e-4, opacities=1e-2, sh_dc=args.colours)
    return splats, groups, Photographs(splats)


LOAD = {"svg": load_svg, "image": load_image, "nerf": load_nerf, "splat": load_splat}
SUFFIX = {"svg": ".svg", "image": ".png", "nerf": ".safetensors", "splat": ".ply"}  # of what save() writes
FITTED = {"nerf": NeRF, "splat": Splats}  # what a scene of many views is fitted as
AROUND = {"turntable": turntable, "input": input_path}  # camera paths of turntable.gif


@functools.cache
def load_editor(model, device, size):
    """The InstructPix2Pix in a directory or hub id; ValueError where it is not made for pictures of `size` pixels."""
    editor = InstructPix2Pix.from_pretrained(model, device)
    if editor.size != size:
        raise ValueError(f"{model}: made for {editor.size} pixels, the prior for {size}")
    return editor


# ---- one run ------------------------------------------------------------------------------------------

def run_one(prior, name, args, out):
    """One edit by a loss or an editor, and its files in the folder `out`.

    Returns:
        The pictures before and after, two lists of PIL pictures, one per view.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the files of the edit so far are written.
        ValueError, OSError: bad input; nothing has been written then.
    """
    scene, groups, source = LOAD[args.mode](args, prior)
    around = args.mode in SCENES
    turn = AROUND[args.path](scene, report.VIEWS, report.FRAME_SIZE) if around else []
    views = sides(scene, report.SIDES, report.SIDE_SIZE) if around else [None]
    size = report.SIDE_SIZE if around else report.SHEET_SIZE
    look = lambda: [snapshot(scene, size, view) for view in views]
    before, turned = look(), [snapshot(scene, view=camera) for camera in turn]
    editor = load_editor(args.instruct or args.model, args.device, prior.size) if name == "in2n" else None
    stages = stages_of(scene, source, prior, name, args, editor)
    masks = subject_masks(prior, scene, views, args.source, args.target)
    out.mkdir(parents=True, exist_ok=True)
    config = settings(args, prior, name)
    if args.resume and (out / "config.json").exists():
        old = json.loads((out / "config.json").read_text())
        changed = [k for k in config if k != "versions" and old.get(k) != config[k]]
        if changed:
            raise ValueError(f"{out}: cannot resume, it was made with another {', '.join(changed)}")
    elif (out / "checkpoint.pt").exists():
        (out / "checkpoint.pt").unlink()  # of an earlier run: a --resume must never mix the two
    write(out / "config.json", json.dumps(config, indent=1) + "\n")
    if args.input.is_file():
        write(out / f"source{args.input.suffix.lower()}", args.input.read_bytes())
    write(out / "source.png", beside(before))
    if name in EDITORS and not around:
        prior.guidance, picture = stages[0].guidance, source.render(None, prior.size)
        scene.put(stages[0].edited(picture, picture, EDITORS[name].skip, torch.Generator().manual_seed(args.seed)))
        frames, interrupted = [to_pil(source.render(None, report.FRAME_SIZE)), snapshot(scene)], False
    else:
        frames, interrupted = edit(scene, groups, stages, prior, args, out)
    after = look()
    write(out / "result.png", beside(after))
    scene.save(out / f"result{SUFFIX[args.mode]}")
    write(out / "progress.gif", frames)
    write(out / "sheet.png", sheet([("source", args.source, before), (TITLES[name], args.target, after)]))
    if around:
        write(out / "turntable.gif", [beside([a, snapshot(scene, view=camera)]) for a, camera in zip(turned, turn)])
        for stage in stages:
            if stage.state.get("edited"):
                write(out / f"{stage.name}-views.png", sheet(stage.pictures()))
        write(out / "depth.png", beside([to_pil(depth_picture(scene.depth(view))) for view in views]))
    if args.export:
        export(scene, out / "export", [view.camera for view in scene.scene.train])
    print(f"{name}: {outside(before, after, masks)}")
    if interrupted:
        print(f"interrupted: what is there is in {out}; the same command with --resume goes on", file=sys.stderr)
        raise KeyboardInterrupt
    return before, after


def settings(args, prior, name):
    """Everything that a result depends on, for config.json."""
    skip = {"out", "resume", "every", "device", "fit", "fit_only", "export", "path", "compare", "losses",
            "list", "only", "clip"}
    files = [args.input] if args.input.is_file() else sorted(p for p in args.input.rglob("*") if p.is_file())
    content = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in skip}
    config |= {"loss": name, "guidance": guidance_of(prior, name, args.guidance), "size": prior.size,
               "device": str(prior.device), "sha256": content, "versions": {"torch": torch.__version__}}
    return config


# ---- command line -------------------------------------------------------------------------------------

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    positive, share = number(int, 1), number(float, 0, 1)
    rate = number(float, 0)
    a("--mode", choices=[*MODES, "toy", "bench"], default="svg",
      help="what is edited; toy: the method in the plane; bench: every edit of a list, one table (default: svg)")
    a("--svg", "--image", "--scene", dest="input", type=Path,
      help="the file, or folder with a transforms.json, to edit (default: a shipped example)")
    a("--source", help="prompt that describes the file")
    a("--target", help="prompt that describes the edit")
    a("--loss", choices=[*LOSSES, *EDITORS], default="pds",
      help="the method; sdedit, inv2n and in2n edit pictures, of a scene one after the other (default: pds)")
    a("--compare", nargs="*", choices=[*LOSSES, *EDITORS], metavar="LOSS",
      help="run these from one seed and lay them side by side (without a list: sds dds pds)")
    a("--model", default=str(HERE / "models" / "emoji"),
      help="diffusers directory or hub id (default: the shipped models/emoji)")
    a("--steps", type=positive, help="optimiser steps (default: the model's own, else 1000)")
    a("--guidance", type=rate, help="classifier-free guidance (default: the model's own for each loss)")
    a("--seed", type=number(int, 0), default=0, help="seed of views, timesteps and noise (default: 0)")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    a("--out", type=Path, help="output folder (default: out/<file>-<loss>)")
    a("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    a("--every", type=positive, default=50, help="steps between checkpoints (default: 50)")
    a("--t-min", type=share, default=0.1, help="lowest timestep as a share of T (default: 0.1, the paper's for SVGs)")
    a("--t-max", type=share, default=0.98, help="highest timestep as a share of T (default: 0.98)")
    a("--schedule", choices=["uniform", "decreasing"], default="uniform", help="of the timesteps (default: uniform)")
    a("--stride", type=positive, default=2, help="t - s of the PDS posterior (default: 2)")
    a("--coefficients", choices=COEFFICIENTS, default="official", help="psi and chi of PDS (default: official)")
    a("--points", type=rate, help="svg: rate of the points in pixels (default: the model's own, else 0.8)")
    a("--colours", type=rate, default=0.01, help="rate of colours and pixels (default: 0.01)")
    a("--colours-only", action="store_true", help="svg: keep the geometry")
    a("--jitter", type=rate, default=3.0, help="svg: random shift at each step, pixels (default: 3)")
    a("--ss", type=int, choices=[1, 2, 4], default=1, help="svg: supersampling (default: 1)")
    a("--skip-unsupported", action="store_true", help="svg: drop mask, filter, text and image with a warning")
    a("--instruct", help="in2n: InstructPix2Pix directory or hub id (default: --model, if it is one too)")
    a("--instruction", help='in2n: what to do (default: "make it a TARGET")')
    a("--image-guidance", type=rate, default=1.5, help="in2n: guidance to the photograph (default: 1.5)")
    a("--list", type=Path, help="bench: the edits (default: examples/edits.txt)")
    a("--only", nargs="+", choices=MODES, help="bench: edits of these modes alone")
    a("--clip", help="bench: CLIP directory or hub id, for its score and its directional score")
    a("--pixels", action="store_true", help="image: optimise the pixels instead of the latent")
    a("--latent", type=rate, default=0.02, help="image: rate of the latent (default: 0.02)")
    a("--fit-seconds", type=rate, default=60.0, help="scenes: time of the fit, process CPU time on a CPU (default: 60)")
    a("--fit-only", action="store_true", help="scenes: fit, print the PSNR of the test views, and stop")
    a("--downscale", type=number(int, 1), default=1, help="scenes: reduce the photographs by this factor (default: 1)")
    a("--table", type=rate, default=0.01, help="nerf: rate of the hash grid (default: 0.01)")
    a("--refine", type=number(int, 0), default=0, metavar="N", help="scenes: steps of the refining stage (default: 0)")
    a("--path", choices=AROUND, default="turntable", help="scenes: camera path of turntable.gif (default: turntable)")
    a("--export", action="store_true", help="scenes: write every view, its depth, and a transforms.json")
    args = p.parse_args(argv)
    only_with = dict(fit_only=SCENES, refine=SCENES, export=SCENES, list=["bench"], only=["bench"])
    for flag, modes in only_with.items():
        if getattr(args, flag) and args.mode not in modes:
            p.error(f"--{flag.replace('_', '-')}: only with --mode {' and '.join(modes)}")
    args.list = args.list or HERE / "examples" / "edits.txt"
    several = list(dict.fromkeys(args.compare or LOSSES))
    args.losses = [args.loss] if args.compare is None and args.mode != "bench" else several
    editors = [name for name in args.losses if name in EDITORS]
    if editors and args.mode not in (*EDITABLE, "bench"):
        p.error(f"{editors[0]} edits pictures: only with --mode image, nerf and splat")
    return args


def complete(args, prior):
    """Fill in what depends on the model, and check what belongs together."""
    prior.defaults = prior.defaults | prior.defaults.get(args.mode, {})
    args.steps = args.steps or prior.defaults.get("steps", 1000)
    args.points = args.points if args.points is not None else prior.defaults.get("points", 0.8)
    lowest = pds.sample_timesteps(1, len(prior.abar), args.t_min, args.t_max, progress=1.0).item()
    if lowest < args.stride:
        raise ValueError(f"--stride {args.stride} is longer than the lowest timestep, {lowest}: raise --t-min")


def work(args):
    """Every mode but toy and bench: one edit, the edits that --compare names, or a fit alone."""
    if args.input is None:
        name, source, target = EXAMPLE[args.mode]
        args.input = HERE / "examples" / name
        args.source = source if args.source is None else args.source
        args.target = target if args.target is None else args.target
    if not args.input.exists() or args.input.is_dir() and args.mode not in SCENES:
        raise ValueError(f"{args.input}: no such file")
    name = f"{args.input.stem}-{args.loss if args.compare is None else 'compare'}"
    args.out = args.out or Path("out") / name
    args.fit = args.out.parent / f"{args.input.stem}-{args.mode}-fit.pt"
    if args.fit_only:
        scene = fit(args)
        psnr, views = evaluate(scene, scene.scene)
        done = scene.fitted
        print(f"test PSNR {psnr:.1f} dB, {views} views, {done['steps']} steps, {done['seconds']:.1f} s")
        return
    for prompt in ("source", "target"):
        if not (getattr(args, prompt) or "").strip():
            raise ValueError(f"--{prompt} is missing or empty: say in a few words what the {prompt} shows")
    prior = Prior.from_pretrained(args.model, args.device)
    complete(args, prior)
    if "in2n" in args.losses:
        load_editor(args.instruct or args.model, args.device, prior.size)  # its errors come before a fit
    if args.compare is None:
        run_one(prior, args.loss, args, args.out)
    else:
        pairs = {name: run_one(prior, name, args, args.out / name) for name in args.losses}
        rows = [("source", args.source, pairs[args.losses[0]][0])]
        write(args.out / "sheet.png", sheet(rows + [(TITLES[n], args.target, pairs[n][1]) for n in pairs]))
    print(f"done: {args.out / 'sheet.png'}")


def bench(args):
    """--mode bench: every edit of a list with the model's own settings, one table."""
    edits = table.read_edits(args.list, args.only)
    prior = Prior.from_pretrained(args.model, args.device)
    defaults = prior.defaults

    def options(mode, file, source, target, fit):
        own = parse(["--mode", mode, f"--svg={file}", f"--source={source}", f"--target={target}",
                     f"--model={args.model}", f"--device={args.device}", f"--seed={args.seed}",
                     f"--fit-seconds={args.fit_seconds}"])
        own.fit, own.steps = fit, args.steps
        prior.defaults = defaults  # `complete` lays those of a mode over it, and they are not the next one's
        complete(own, prior)
        return own
    maker = table.Maker(options, settings, fit, run_one)
    table.make_table(edits, args.losses, prior, maker, args.out or Path("out/edits"), args.clip)


def main(argv=None):
    args = parse(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if args.mode == "toy":
        return toy.main(["--out", str(args.out or "out"), "--seed", str(args.seed)])
    return exit_code("run.py", lambda: bench(args) if args.mode == "bench" else work(args))


if __name__ == "__main__":
    sys.exit(main())
