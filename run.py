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
import contextlib
import copy
import functools
import json
import os
import signal
import sys
import warnings
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # the imports take seconds, and Ctrl-C in one of them would end in a traceback of a library
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"run.py: interrupted\n") and os._exit(130))
import torch
from PIL import Image

import report
import table
import toy
from checkpoint import fingerprint, read_run
from edit import COEFFICIENTS, EDITABLE, EDITORS, LOSSES, MODES, SCENES, TITLES, edit, guidance_of, stages_of
from edit2d import Picture, subject_masks
from files import check_writable, digest, locked, one_line
from front import make_front
from inputs import check_prompts, check_timesteps, files_of, kept_apart, mode_of
from masks import Where, agree, local_masks, read_mask, read_masks
from nerf import NeRF
from pictures import read_picture
from prior import InstructPix2Pix, Prior
from report import beside, device, exit_code, number, outside, sheet, snapshot, to_pil, to_tensor, write
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
    groups = scene.param_groups(args.points, args.colours, args.colours_only, shared=args.steady)
    if not any(p.numel() for g in groups for p in g["params"]):
        raise ValueError(f"{args.input}: nothing to edit: no filled or stroked shape in it")
    source = copy.deepcopy(scene)
    scene.restrict(args.opacities, args.only, joints=args.smooth > 0)
    return scene, groups, source


def load_image(args, prior):
    picture = read_picture(args.input).convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    pixels = to_tensor(square.convert("RGB").resize((prior.size, prior.size), Image.LANCZOS)).float()
    scene = Picture(pixels, prior, in_pixels=args.pixels)
    return scene, scene.param_groups(args.colours if args.pixels else args.latent), copy.deepcopy(scene)


class Photographs:
    """What a scene is edited from: its own pictures."""

    def __init__(self, scene):
        self.render = scene.photograph


def fit(args):
    """The scene as a NeRF or as splats. The fit is kept beside the output, so that a second edit starts at once."""
    scene = load_scene(args.input, args.downscale)
    args.fit.parent.mkdir(parents=True, exist_ok=True)
    with locked(args.fit, wait=True):
        return FITTED[args.mode].fit(scene, args.fit_seconds, checkpoint=args.fit, device=args.device)


def load_nerf(args, prior):
    nerf = fit(args)
    nerf.learn_from(prior.size)
    # an edit that must stay in its place leaves the MLPs, which all places share, nearly as they are
    mlps = 1e-4 if args.local or args.mask else 1e-3
    return nerf, nerf.param_groups(args.table, mlps), Photographs(nerf)


def load_splat(args, prior):
    splats = fit(args)
    # A fifth of the rates of a fit: hundreds of steps must not move what a fit takes tens of thousands for.
    groups = splats.param_groups(means=3e-5, log_scales=1e-3, quaternions=2e-4, opacities=1e-2, sh_dc=args.colours)
    return splats, groups, Photographs(splats)


LOAD = {"svg": load_svg, "image": load_image, "nerf": load_nerf, "splat": load_splat}
SUFFIX = {"svg": ".svg", "image": ".png", "nerf": ".safetensors", "splat": ".ply"}  # of what save() writes
FITTED = {"nerf": NeRF, "splat": Splats}  # what a scene of many views is fitted as
AROUND = {"turntable": turntable, "input": input_path}  # camera paths of turntable.gif


def where_of(scene, source, prior, args):
    """The masks of where the edit may act, a masks.Where: the user's own, or with --local those of the prompts."""
    if not (args.local or args.mask):
        return None
    around, size = args.mode in SCENES, prior.size
    if args.mask:
        found = read_masks(args.mask, [view.name for view in scene.scene.train], size) if around else [
            read_mask(args.mask, size)]
    else:
        views = range(len(scene.scene.train)) if around else [None]
        with torch.no_grad():
            pictures = [source.render(view, size) for view in views]
        found = local_masks(prior, pictures, args.source, args.target)
    return Where(agree(scene, found, size) if around else found)


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
    with contextlib.ExitStack() as held:
        return _run_one(prior, name, args, out, held)


def _run_one(prior, name, args, out, held):
    scene, groups, source = LOAD[args.mode](args, prior)
    around = args.mode in SCENES
    turn = AROUND[args.path](scene, report.VIEWS, report.FRAME_SIZE) if around else []
    views = sides(scene, report.SIDES, report.SIDE_SIZE) if around else [None]
    size = report.SIDE_SIZE if around else report.SHEET_SIZE
    look = lambda: [snapshot(scene, size, view) for view in views]
    before, turned = look(), [snapshot(scene, view=camera) for camera in turn]
    editor = load_editor(args.instruct or args.model, args.device, prior.size) if name == "in2n" else None
    where = where_of(scene, source, prior, args) if name in LOSSES else None
    stages = stages_of(scene, source, prior, name, args, editor, where)
    config = settings(args, prior, name) | ({"fit": fingerprint(scene)} if around else {})
    kept_apart(args, out)
    original = args.input.read_bytes() if args.input.is_file() else None
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(out / "run"))
    if args.resume:
        read_run(out / "checkpoint.pt", config)  # its errors come before anything is written
    else:
        (out / "checkpoint.pt").unlink(missing_ok=True)  # of an earlier run: a --resume must never mix the two
    if name in EDITORS and not around:
        prior.guidance, picture = stages[0].guidance, source.render(None, prior.size)
        scene.put(stages[0].edited(picture, picture, EDITORS[name].skip, torch.Generator().manual_seed(args.seed)))
        frames, interrupted = [to_pil(source.render(None, report.FRAME_SIZE)), snapshot(scene)], False
    else:
        frames, interrupted = edit(scene, groups, stages, prior, args, out, config)
    after = look()
    write(out / "config.json", json.dumps(config, indent=1) + "\n")  # not before: an old result would lie beside it
    if original is not None:
        write(out / f"source{args.input.suffix.lower()}", original)
    write(out / "source.png", beside(before))
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
    pictures = [to_tensor(p.resize((prior.size, prior.size), Image.LANCZOS)).float() for p in before]
    masks = subject_masks(prior, pictures, args.source, args.target)
    print(f"{name}: {outside(before, after, masks)}")
    if interrupted:
        raise KeyboardInterrupt(f"what is there is in {out}; the same command with --resume goes on")
    return before, after


def settings(args, prior, name):
    """Everything that a result depends on, for config.json."""
    skip = {"out", "resume", "every", "device", "fit", "fit_only", "export", "path", "compare", "losses",
            "list", "modes", "front", "clip"}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in skip}
    config |= {"loss": name, "guidance": guidance_of(prior, name, args.guidance), "size": prior.size,
               "device": str(prior.device), "threads": torch.get_num_threads(), "sha256": digest(files_of(args)),
               "versions": {"torch": torch.__version__}}
    return config


# ---- command line -------------------------------------------------------------------------------------

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    positive, share = number(int, 1, 10 ** 6), number(float, 0, 1)
    rate = number(float, 0, 1e6)
    a("--mode", choices=[*MODES, "toy", "bench"], help="what is edited; toy: the method in the plane; bench: every edit of "
      "a list, one table (default: what --svg or --image says, nerf for --scene, else svg)")
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
    a("--seed", type=number(int, 0, 2 ** 62), default=0, help="seed of views, timesteps and noise (default: 0)")
    a("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    a("--out", type=Path, help="output folder (default: out/<file>-<loss>)")
    a("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    a("--every", type=positive, default=50, help="steps between checkpoints (default: 50)")
    a("--t-min", type=share, default=0.1, help="lowest timestep as a share of T (default: 0.1, the paper's for SVGs)")
    a("--t-max", type=share, default=0.98, help="highest timestep as a share of T (default: 0.98)")
    a("--schedule", choices=["uniform", "decreasing"], default="uniform", help="of the timesteps (default: uniform)")
    a("--stride", type=positive, default=2, help="t - s of the PDS posterior (default: 2)")
    a("--coefficients", choices=COEFFICIENTS, default="official", help="psi and chi of PDS (default: official)")
    a("--identity", type=rate, metavar="K", help="pds: times the pull to the source (default: the model's own, else 1)")
    a("--local", action="store_true", help="edit only where the two prompts disagree about the source")
    a("--mask", type=Path, help="edit only where this picture is white; scenes: a folder of masks named as the photographs")
    a("--points", type=rate, help="svg: rate of the points in pixels (default: the model's own, else 2.4, or 0.8 where "
      "every point moves for itself)")
    a("--smooth", type=rate, metavar="PX", help="svg: width of the field that moves all points, falls to a quarter; 0: "
      "every point for itself, as in the paper (default: an eighth of the picture)")
    a("--steady", action=argparse.BooleanOptionalAction, default=True,
      help="svg: one second moment of Adam for all points, one for all colours (default: on; the paper's: off)")
    a("--opacities", action="store_true", help="svg: let opaque shapes become transparent")
    a("--only", nargs="+", metavar="ID", help="svg: change these elements alone")
    a("--colours", type=rate, help="rate of colours and pixels (default: the model's own, else 0.01)")
    a("--colours-only", action="store_true", help="svg: keep the geometry")
    a("--jitter", type=rate, default=3.0, help="svg: random shift at each step, pixels (default: 3)")
    a("--ss", type=int, choices=[1, 2, 4], default=1, help="svg: supersampling (default: 1)")
    a("--skip-unsupported", action="store_true", help="svg: drop mask, filter, text and image with a warning")
    a("--instruct", help="in2n: InstructPix2Pix directory or hub id (default: --model, if it is one too)")
    a("--instruction", help='in2n: what to do (default: "make it a TARGET")')
    a("--image-guidance", type=rate, default=1.5, help="in2n: guidance to the photograph (default: 1.5)")
    a("--list", type=Path, help="bench: the edits (default: examples/edits.txt)")
    a("--modes", nargs="+", choices=MODES, help="bench: edits of these modes alone")
    a("--front", action="store_true", help="bench: drawings by PDS at several --identity K and by its rivals, as a chart")
    a("--clip", help="bench: CLIP directory or hub id, for its score and its directional score")
    a("--pixels", action="store_true", help="image: optimise the pixels instead of the latent")
    a("--latent", type=rate, default=0.02, help="image: rate of the latent (default: 0.02)")
    a("--fit-seconds", type=number(float, 0.001, 1e7), default=60.0, help="scenes: time of the fit, process CPU time on a CPU (default: 60)")
    a("--fit-only", action="store_true", help="scenes: fit, print the PSNR of the test views, and stop")
    a("--downscale", type=number(int, 1, 1000), default=1, help="scenes: reduce the photographs by this factor (default: 1)")
    a("--table", type=rate, default=0.01, help="nerf: rate of the hash grid (default: 0.01)")
    a("--refine", type=number(int, 0, 10 ** 6), default=0, metavar="N", help="scenes: steps of the refining stage (default: 0)")
    a("--path", choices=AROUND, default="turntable", help="scenes: camera path of turntable.gif (default: turntable)")
    a("--export", action="store_true", help="scenes: write every view, its depth, and a transforms.json")
    args = p.parse_args(argv)
    args.mode = args.mode or mode_of(sys.argv[1:] if argv is None else argv)
    only_with = dict(fit_only=SCENES, refine=SCENES, export=SCENES, list=["bench"], modes=["bench"], front=["bench"], only=["svg"],
                     opacities=["svg"], local=MODES, mask=MODES)
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
    args.smooth = 0 if args.mode != "svg" else prior.size / 8 if args.smooth is None else args.smooth
    prior.defaults = own = prior.defaults | prior.defaults.get(args.mode, {})
    own = own | (own.get("smooth", {}) if args.smooth else {})  # smooth steps may be larger, and fewer
    for name, default in dict(steps=1000, identity=1.0, points=2.4 if args.smooth else 0.8, colours=0.01).items():
        if getattr(args, name) is None:
            setattr(args, name, own.get(name, default))
    check_timesteps(args, prior.abar)


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
    check_prompts(args)
    check_writable(args.out)
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
    edits = table.read_edits(args.list, ["svg"] if args.front else args.modes)
    prior = Prior.from_pretrained(args.model, args.device)
    defaults = prior.defaults

    def options(mode, file, source, target, fit, *flags):
        own = parse(["--mode", mode, f"--svg={file}", f"--source={source}", f"--target={target}",
                     f"--model={args.model}", f"--device={args.device}", f"--seed={args.seed}",
                     f"--fit-seconds={args.fit_seconds}", *flags])
        own.fit, own.steps = fit, args.steps
        prior.defaults = defaults  # `complete` lays those of a mode over it, and they are not the next one's
        complete(own, prior)
        return own
    maker = table.Maker(options, settings, fit, run_one)
    if args.front:
        return make_front(edits, prior, maker, args.out or Path("out/front"))
    table.make_table(edits, args.losses, prior, maker, args.out or Path("out/edits"), args.clip)


def main(argv=None):
    args = parse(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {one_line(message)}", file=sys.stderr)
    if args.mode == "toy":
        return exit_code("run.py", lambda: toy.main(["--out", str(args.out or "out"), "--seed", str(args.seed)]))
    return exit_code("run.py", lambda: bench(args) if args.mode == "bench" else work(args))


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
