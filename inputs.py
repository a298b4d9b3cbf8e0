"""What the user hands to a run: the mode that the flags mean, prompts and timesteps that can be used, its files."""
import warnings
from pathlib import Path

import pds
from edit import SCENES
from scene import SceneError, scene_files

MEANT = {"--svg": "svg", "--image": "image", "--scene": "nerf"}  # modes, where no --mode is given
OUTPUTS = {"source.png", "sheet.png", "progress.gif", "turntable.gif", "depth.png", "config.json", "checkpoint.pt"}  # of a run


def mode_of(words):
    """The mode that a command line without --mode means, from its words: that of the last flag with a file."""
    flags = [word.split("=")[0] for word in words]
    return next((MEANT[flag] for flag in reversed(flags) if flag in MEANT), "svg")


def check_prompts(args):
    """Raise ValueError where --source or --target is missing; warn where they are the same."""
    for prompt in ("source", "target"):
        if not (getattr(args, prompt) or "").strip():
            raise ValueError(f"--{prompt} is missing or empty: say in a few words what the {prompt} shows")
    if args.source.split() == args.target.split():
        warnings.warn("--source and --target are the same: there is nothing to change", stacklevel=2)


def check_timesteps(args, abar):
    """Raise ValueError where --stride, --t-min or --t-max lead out of the schedule abar [T] of the model."""
    lowest, highest = (pds.sample_timesteps(1, len(abar), args.t_min, args.t_max, progress=share).item() for share in (1.0, 0.0))
    if lowest < args.stride:
        raise ValueError(f"--stride {args.stride} is longer than the lowest timestep, {lowest}: raise --t-min")
    if abar[highest] < 1e-9:
        raise ValueError(f"--t-max {args.t_max:g}: the model's schedule ends in zero there, pure noise: lower it, as to 0.98")


def files_of(args):
    """All files of the user's that a result depends on; of a scene that cannot be read none, loading it says why."""
    try:
        files = scene_files(args.input) if args.mode in SCENES else [args.input]
    except SceneError:
        files = []
    masks = sorted(args.mask.iterdir()) if args.mask and args.mask.is_dir() else [args.mask] if args.mask else []
    return files + [mask for mask in masks if mask.is_file()]


def kept_apart(args, out):
    """Raise ValueError where a run in the folder `out` would write over a file of the user's."""
    for file in files_of(args):
        inside = file.resolve().relative_to(out.resolve()) if file.resolve().is_relative_to(out.resolve()) else Path()
        if str(inside) in OUTPUTS or inside.stem == "result" or args.export and inside.parts[:1] == ("export",):
            raise ValueError(f"{file}: the run would write over it: choose another --out")
