"""The command line: the options of a run, what its model fills in, what the user's files allow.

    args = parse(["--mode", "svg", "--svg", "cat.svg", "--source", "cat face", "--target", "dog face"])
    args = complete(args, prior, "pds")            # what the user left open: the model's own settings
    config = settings(args, prior, "pds")          # everything that the result depends on, for config.json
"""
import argparse
import copy
import hashlib
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import torch

import pds
from edit import COEFFICIENTS, EDITABLE, EDITORS, LOSSES, MODES, RATES, SCENES, guidance_of
from files.messages import Parser, device, number
from files.pictures import Frame
from files.reading import digest
from loop import parallel
from pipelines.settings import COMMON, DREAMCATALYST, laid_over
from scene.captures import SceneError
from scene.reading import scene_files

HERE = Path(__file__).resolve().parent
MEANT = {"--svg": "svg", "--image": "image", "--scene": "nerf", "--splats": "nerf", "--fitted": "nerf"}  # as a mode
UP = ("x", "y", "z", "-x", "-y", "-z")
OUTPUTS = {"source.png", "sheet.png", "progress.gif", "turntable.gif", "depth.png", "config.json",
           "checkpoint.pt"}  # of a run
PATHS = ("turntable", "input")  # of the camera in turntable.gif


def parse(argv=None, about=None):
    """The options of a command line, a Namespace; what depends on the model is None until `complete`."""
    p = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    positive, share = number(int, 1, 10 ** 6), number(float, 0, 1)
    rate = number(float, 0, 1e6)
    a("--mode", choices=[*MODES, "toy", "bench"], help="what is edited; toy: the method in the plane; bench: every edit "
      "of a list, one table (default: what --svg or --image says, nerf for --scene, else svg)")
    a("--svg", "--image", "--scene", dest="input", type=Path,
      help="the file, or folder with a transforms.json or a COLMAP model, to edit (default: a shipped example)")
    a("--splats", "--fitted", dest="fitted", type=Path, metavar="FILE", help="scenes: edit this trained model, without "
      "a fit: Gaussians (.ply or .splat, also of other programs) in front of the cameras of --scene or, without it, of "
      "cameras around them; or the result.safetensors of --mode nerf with its --scene")
    a("--source", help="prompt that describes the file")
    a("--target", help="prompt that describes the edit")
    a("--suffix", help="words that end both prompts (default: the model's own; the paper has some for drawings)")
    a("--loss", choices=[*LOSSES, *EDITORS], default="pds",
      help="the method; sdedit, inv2n and in2n edit pictures, of a scene one after the other (default: pds)")
    a("--compare", nargs="*", choices=[*LOSSES, *EDITORS], metavar="LOSS",
      help="run these from one seed and lay them side by side (without a list: sds dds pds)")
    a("--model", default=str(HERE / "models" / "emoji"),
      help="diffusers folder, hub id, or .safetensors file of Stable Diffusion (default: the shipped models/emoji)")
    a("--dtype", choices=["float32", "float16", "bfloat16"],
      help="number format of the networks (default: float32 on a CPU, elsewhere float16, of FLUX bfloat16)")
    a("--lora", help="LoRA that is fused into the model: .safetensors file, folder or hub id")
    a("--lora-scale", type=number(float, -100, 100), default=1.0, help="how much of it (default: 1)")
    a("--embedding", type=Path, help="textual inversion for the model, a .safetensors file; its word is printed")
    a("--steps", type=positive, help="optimiser steps (default: the model's own)")
    a("--guidance", type=rate, help="classifier-free guidance (default: the model's own for each loss)")
    a("--seed", type=number(int, 0, 2 ** 62), default=0, help="seed of views, timesteps and noise (default: 0)")
    a("--batch", type=number(int, 1, 1024), metavar="N",
      help="views, timesteps and noises of a step, one network call for all (default: the model's own, mostly 1)")
    a("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
      help="default: cuda where there is one")
    a("--out", type=Path, help="output folder (default: out/<file>-<target>-<loss>)")
    a("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    a("--every", type=positive, default=50, help="steps between checkpoints (default: 50)")
    a("--square", action="store_true", help="show the model squares: the middle of a photograph, a drawing or picture "
      "between white bars (default: whole frames, the shorter side as the model has it)")
    a("--t-min", type=share, help="lowest timestep as a share of T (default: the model's own)")
    a("--t-max", type=share, help="highest timestep as a share of T (default: the model's own)")
    a("--schedule", choices=["uniform", "decreasing"], help="of the timesteps (default: the model's own)")
    a("--rates", choices=RATES, help="course of the rates; settle: a short start, down to 0 in the second half; "
      "released: that of the paper's code (default: the model's own)")
    a("--stride", type=positive, default=2, help="t - s of the PDS posterior (default: 2)")
    a("--coefficients", choices=COEFFICIENTS, default="official", help="psi and chi of PDS; dreamcatalyst brings its own "
      "guidance and timesteps, with --instruct its InstructPix2Pix prior (default: official)")
    a("--identity", type=rate, metavar="K", help="pds: times the pull to the source (default: the model's own, else 1)")
    a("--local", action="store_true", help="edit only where the two prompts disagree about the source")
    a("--mask", type=Path,
      help="edit only where this picture is white; scenes: a folder of masks named as the photographs")
    a("--points", type=rate, help="svg: rate of the points in pixels (default: the model's own)")
    a("--smooth", type=rate, metavar="PX", help="svg: width of the field that moves all points, falls to a quarter; 0: "
      "every point for itself, as in the paper (default: the model's own, an eighth of the picture)")
    a("--steady", action=argparse.BooleanOptionalAction,
      help="svg: one second moment of Adam for all points, one for all colours (default: the model's own)")
    a("--opacities", action=argparse.BooleanOptionalAction,
      help="svg: let opaque shapes become transparent (default: the model's own)")
    a("--only", nargs="+", metavar="ID", help="svg: change these elements alone")
    a("--colours", type=rate, help="rate of colours and pixels (default: the model's own)")
    a("--colours-t-min", type=share, help="svg: the timestep, as a share of T, below which no colour learns; 0: every step "
      "is for all, as in the paper (default: the model's own)")
    a("--colours-only", action="store_true", help="svg: keep the geometry")
    a("--jitter", type=rate, help="svg: random shift at each step, pixels (default: the model's own)")
    a("--ss", type=int, choices=[1, 2, 4], default=1, help="svg: supersampling (default: 1)")
    a("--skip-unsupported", action="store_true", help="svg: drop mask, filter, text and image with a warning")
    a("--instruct", help="in2n: InstructPix2Pix directory or hub id (default: --model, if it is one too)")
    a("--instruction", help='in2n: what to do (default: "make it a TARGET")')
    a("--image-guidance", type=rate, default=1.5, help="in2n: guidance to the photograph (default: 1.5)")
    a("--list", type=Path, help="bench: the edits (default: examples/edits.txt)")
    a("--modes", nargs="+", choices=MODES, help="bench: edits of these modes alone")
    a("--front", action="store_true",
      help="bench: drawings by PDS at several --identity K and by its rivals, as a chart")
    a("--clip", help="bench: CLIP directory or hub id, for its score and its directional score")
    a("--pixels", action="store_true", help="image: optimise the pixels instead of the latent")
    a("--latent", type=rate, help="image: rate of the latent (default: the model's own)")
    a("--decay", type=share, help="image: weight decay of AdamW on the latent (default: the model's own)")
    a("--fit-seconds", type=number(float, 0.001, 1e7), default=60.0,
      help="scenes: time of the fit, process CPU time on a CPU (default: 60)")
    a("--fit-only", action="store_true", help="scenes: fit, print the PSNR of the test views, and stop")
    a("--downscale", type=number(int, 1, 1000), default=1,
      help="scenes: reduce the photographs by this factor (default: 1)")
    a("--images", metavar="FOLDER", help="scenes: the folder of the photographs in that of the scene, as images_4 "
      "(default: images for COLMAP's models, else what the transforms.json says)")
    a("--up", choices=UP, help="splat: the direction that is up in --splats without a --scene, written --up=-y "
      "(default: what the file says, else -y as in captures by COLMAP)")
    a("--table", type=rate, help="nerf: rate of the hash grid (default: the model's own)")
    a("--mlps", type=rate, help="nerf: rate of the MLPs (default: the model's own; a tenth with --local or --mask)")
    for name, what in (("means", "means, in extents of the cameras"), ("scales", "log scales"),
                       ("rotations", "quaternions"), ("opacity", "opacity logits")):
        a(f"--{name}", type=rate, help=f"splat: rate of the {what} (default: the model's own)")
    a("--refine", type=number(int, 0, 10 ** 6), metavar="N",
      help="image and scenes: steps of the refining stage, 0: none (default: the model's own)")
    a("--path", choices=PATHS, default="turntable", help="scenes: camera path of turntable.gif (default: turntable)")
    a("--export", action="store_true", help="scenes: write every view, its depth, and a transforms.json")
    args = p.parse_args(argv)
    gaussians = args.fitted.suffix.lower() != ".safetensors" if args.fitted else _is_gaussians(args.input)
    args.mode = args.mode or ("splat" if gaussians else mode_of(sys.argv[1:] if argv is None else argv))
    only_with = dict(fit_only=SCENES, refine=EDITABLE, export=SCENES, list=["bench"], modes=["bench"], front=["bench"],
                     only=["svg"], opacities=["svg"], colours_t_min=["svg"], local=MODES, mask=MODES,
                     fitted=SCENES, images=SCENES, up=["splat"])
    for flag, modes in only_with.items():
        if getattr(args, flag) and args.mode not in modes:
            p.error(f"--{flag.replace('_', '-')}: only with --mode {' and '.join(modes)}")
    if args.mode in SCENES and (args.fitted or gaussians):
        if gaussians != (args.mode == "splat"):
            p.error(f"{args.fitted or args.input}: --mode splat edits a .ply or .splat, --mode nerf a .safetensors")
        if args.input is None and not gaussians:
            p.error(f"{args.fitted}: also say --scene DIR, the photographs that it was fitted to")
        args.fitted = args.fitted or args.input
        args.input = args.input or args.fitted
    args.list = args.list or HERE / "examples" / "edits.txt"
    several = list(dict.fromkeys(args.compare or LOSSES))
    args.losses = [args.loss] if args.compare is None and args.mode != "bench" else several
    editors = [name for name in args.losses if name in EDITORS]
    if editors and args.mode not in (*EDITABLE, "bench"):
        p.error(f"{editors[0]} edits pictures: only with --mode image, nerf and splat")
    return args


def _is_gaussians(path):
    """Whether a path is that of Gaussians by its ending, in a format that can be read or not."""
    endings = (".ply", ".splat", ".ksplat", ".spz", ".sog")
    return path is not None and path.suffix.lower() in endings and not path.is_dir()


def mode_of(words):
    """The mode that a command line without --mode means, from its words: that of the last flag with a file."""
    flags = [word.split("=")[0] for word in words]
    return next((MEANT[flag] for flag in reversed(flags) if flag in MEANT), "svg")


def complete(args, prior, name=None):
    """A copy of the options in which nothing that the model decides is open any more.

    What the user gave stands. The rest is, in this order, what the coefficients, smooth points, the method `name`, and the
    mode bring of the model's settings, then its settings for all modes, then COMMON. `own` of the copy holds the model's
    settings.

    Raises:
        ValueError: timesteps that lead out of the model's schedule.
    """
    args, name = copy.copy(args), name or args.losses[0]
    own = COMMON | prior.defaults
    for key in (args.mode, name):
        own = laid_over(own, own.get(key, {}))
    if args.mode != "svg":
        args.smooth = 0
    elif args.smooth is None:
        args.smooth = own.get("width", prior.size / 8)
    if args.smooth:
        own = laid_over(own, own.get("smooth", {}))  # smooth steps may be larger, and fewer
    if args.coefficients == "dreamcatalyst" and name == "pds":
        own = laid_over(laid_over(own, DREAMCATALYST), own.get("dreamcatalyst", {}))
    if args.mode == "nerf" and (args.local or args.mask):  # what all of the field shares would carry an edit out of place
        own = own | {"mlps": own["mlps"] / 10, "table": own["table"] * 2}
    for key in (*COMMON, "points"):
        if getattr(args, key, None) is None:
            setattr(args, key, own.get(key))
    if args.points is None and "canvas_points" not in own:
        args.points = 2.4 if args.smooth else 0.8
    args.guidance = guidance_of(own, name, args.guidance)
    if args.mode not in SCENES and name in EDITORS:
        args.refine = 0  # the edit is one of these itself
    args.own, args.frame = own, Frame(prior.size, prior.multiple, args.square)
    check_timesteps(args, prior.abar)
    return args


def settings(args, prior, name):
    """Everything that a result depends on, for config.json; args: completed."""
    skip = {"out", "resume", "every", "device", "fit", "fit_only", "export", "path", "compare", "losses",
            "list", "modes", "front", "clip", "own", "frame"}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in skip}
    config |= {"loss": name, "size": prior.size, "device": str(prior.device), "threads": torch.get_num_threads(),
               "processes": parallel.world(), "sha256": digest(files_of(args)), "versions": {"torch": torch.__version__}}
    return config


def check_prompts(args):
    """Raise ValueError where --source or --target is missing; warn where they are the same."""
    for prompt in ("source", "target"):
        if not (getattr(args, prompt) or "").strip():
            raise ValueError(f"--{prompt} is missing or empty: say in a few words what the {prompt} shows")
    if args.source.split() == args.target.split():
        warnings.warn("--source and --target are the same: there is nothing to change", stacklevel=2)


def check_timesteps(args, abar):
    """Raise ValueError where --stride, --t-min or --t-max lead out of the schedule abar [T] of the model, or where
    --colours-t-min leaves no timestep to the colours of a drawing."""
    lowest, highest = (pds.sample_timesteps(1, len(abar), args.t_min, args.t_max, progress=share).item()
                       for share in (1.0, 0.0))
    if lowest < args.stride:
        raise ValueError(f"--stride {args.stride} is longer than the lowest timestep, {lowest}: raise --t-min")
    if args.mode == "svg" and args.colours_t_min > args.t_max:
        raise ValueError(f"--colours-t-min {args.colours_t_min:g} is above --t-max {args.t_max:g}: no colour would change")
    if abar[highest] < 1e-9:
        raise ValueError(f"--t-max {args.t_max:g}: the model's schedule ends in zero there, pure noise: lower it, as to "
                         "0.98")


def slug(text, longest=40):
    """A prompt as a part of a file's name: small letters, digits and hyphens.

    Where it is cut off, or has letters that cannot be spelled so, a short hash tells it apart from others.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    found = re.sub("[^a-z0-9]+", "-", plain).strip("-")
    lost = len(found) > longest or any(c.isalnum() and not c.isascii() for c in plain)
    told = hashlib.sha256(text.encode()).hexdigest()[:6] if lost else ""
    return "-".join(filter(None, (found[:longest].strip("-"), told)))


def files_of(args):
    """All files of the user's that a result depends on; of a scene that cannot be read none, loading it says why."""
    try:
        around = args.mode in SCENES and args.input != args.fitted
        files = scene_files(args.input, args.images) if around else [args.input]
    except SceneError:
        files = []
    files += [args.fitted] if args.fitted and args.fitted not in files else []
    files += [Path(name) for name in (args.lora, args.embedding) if name and Path(name).is_file()]
    masks = sorted(args.mask.iterdir()) if args.mask and args.mask.is_dir() else [args.mask] if args.mask else []
    return files + [mask for mask in masks if mask.is_file()]


def kept_apart(args, out):
    """Raise ValueError where a run in the folder `out` would write over a file of the user's."""
    for file in files_of(args):
        inside = file.resolve().relative_to(out.resolve()) if file.resolve().is_relative_to(out.resolve()) else Path()
        if str(inside) in OUTPUTS or inside.stem == "result" or args.export and inside.parts[:1] == ("export",):
            raise ValueError(f"{file}: the run would write over it: choose another --out")
