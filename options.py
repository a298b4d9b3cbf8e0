"""The command line: every option in one table, what the model fills in, and what the user's files allow.

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
from collections import namedtuple
from pathlib import Path

import torch

import pds
from edit import COEFFICIENTS, COMPARED, EDITABLE, LOSSES, MODES, SCENES, guidance_of
from files.messages import Parser, device, number
from files.pictures import Frame
from files.reading import digest
from image.editors import EDITORS
from loop import parallel
from pipelines.captions import recolours
from pipelines.loading import PriorError
from pipelines.settings import SETTINGS, read_defaults, settings_for
from scene.captures import SceneError
from scene.reading import scene_files

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "models" / "emoji"
# the flags that name what is edited, and the modes they mean
INPUTS = {"svg": "svg", "image": "image", "scene": "nerf"}
METHODS = (*LOSSES, *EDITORS)
UP = ("x", "y", "z", "-x", "-y", "-z")
OUTPUTS = {"source.png", "sheet.png", "masks.png", "fit.png", "progress.gif", "turntable.gif", "depth.png",
           "config.json", "index.html", "checkpoint.pt"}  # of a run
PATHS = ("turntable", "input")  # camera paths of turntable.gif

# modes: those that read the option, all if empty; elsewhere it is refused. kept: whether the result depends on it, so
# that config.json holds it. more: further arguments of argparse's add_argument.
Option = namedtuple("Option", "flag help modes kept more")
POSITIVE, RATE, SHARE = number(int, 1, 10 ** 6), number(float, 0, 1e6), number(float, 0, 1)
COORDINATE = number(float, -1e7, 1e7)


def _option(flag, text, modes=(), kept=True, **more):
    return Option(flag, text, modes, kept, more)


def _switch(flag, text, modes=(), kept=True):
    return Option(flag, text, modes, kept, {"action": "store_true"})


def _setting(name):
    """The option of a setting that a model may bring, from pipelines/settings.py."""
    _, kind, least, _, modes, text = SETTINGS[name]
    types = {int: number(int, least, 10 ** 6), float: SHARE if name in ("t_min", "t_max", "decay") else RATE, str: str}
    metavar = {"identity": "K", "colour_identity": "SHARE", "smooth": "WIDTH"}.get(name, name.split("_")[-1].upper())
    more = ({"action": argparse.BooleanOptionalAction} if kind is bool else
            {"choices": kind} if isinstance(kind, tuple) else {"type": types[kind], "metavar": metavar})
    return Option("--" + name.replace("_", "-"), text, () if modes == MODES else modes, True, more)


GROUPS = {
    "what is edited": [
        _option("--mode", "what is edited, or toy: the method in the plane (default: as the next options imply, else "
                "svg)", choices=[*MODES, "toy"]),
        _option("--svg", "an SVG file (default: a shipped example of the mode)", ("svg",), type=Path, metavar="FILE"),
        _option("--image", "a picture", ("image",), type=Path, metavar="FILE"),
        _option("--scene", "posed photographs, fitted before the edit: a folder with a transforms.json or a COLMAP "
                "model", SCENES, type=Path, metavar="DIR"),
        _option("--splats", "edit trained Gaussians without a fit: a .ply or .splat file, with the cameras of --scene "
                "or with some around it", ("splat",), type=Path, metavar="FILE"),
        _option("--fitted", "the same for the result of an earlier run: result.safetensors with its --scene, or "
                "result.ply", SCENES, type=Path, metavar="FILE"),
        _option("--source", "prompt that describes it now", metavar="PROMPT"),
        _option("--target", "prompt that describes it after the edit", metavar="PROMPT"),
        _setting("suffix")],
    "the model": [
        _option("--model", "diffusers folder, hub id, or .safetensors file of Stable Diffusion (default: the shipped "
                "models/emoji)", default=str(SHIPPED)),
        _option("--lora", "LoRA that is fused into the model: .safetensors file, folder or hub id"),
        _option("--lora-scale", "its strength (default: %(default)g)", type=number(float, -100, 100), default=1.0),
        _option("--embedding", "textual inversion, a .safetensors file; its word is printed", type=Path,
                metavar="FILE"),
        _option("--instruct", "InstructPix2Pix folder or hub id for in2n (default: --model, if it is one too)"),
        _option("--dtype", "number format of the networks (default: float32 on a CPU, elsewhere float16, bfloat16 for "
                "FLUX)", choices=["float32", "float16", "bfloat16"]),
        _option("--device", "torch device (default: cuda if available, else cpu)", kept=False, type=device,
                default="cuda" if torch.cuda.is_available() else "cpu")],
    "the edit": [
        _option("--loss", "the method; ids and ssd are other losses from 2025; the last four edit pictures, those of a "
                "scene one after another (default: %(default)s)", choices=METHODS, default="pds"),
        _option("--compare", "run these methods from one seed, side by side on one sheet (without names: sds dds pds)",
                kept=False, nargs="*", choices=METHODS, metavar="LOSS"),
        _setting("steps"), _setting("batch"),
        _option("--guidance", "classifier-free guidance scale", type=RATE),
        _option("--image-guidance", "in2n: guidance towards the photograph (default: %(default)g)", type=RATE,
                default=1.5),
        _option("--instruction", 'in2n: the instruction (default: "make it a TARGET")'),
        _setting("source_guidance"), _setting("identity"), _setting("colour_identity"), _setting("reach"),
        _option("--coefficients", "psi and chi of PDS; dreamcatalyst brings the settings of its released code "
                "(guidance 7.5, falling timesteps, FreeU; for scenes 3,000 steps, each with a new view; the shipped "
                "model has its own settings) and, with --instruct, its InstructPix2Pix prior (default: %(default)s)",
                choices=COEFFICIENTS, default="official"),
        _option("--stride", "t - s of the PDS posterior (default: %(default)s)", type=POSITIVE, default=2),
        _setting("t_min"), _setting("t_max"), _setting("schedule"), _setting("antithetic"),
        _setting("rates"),
        _switch("--local", "edit only where the two prompts disagree about the source (DiffEdit's mask); in a capture, "
                "the thing that the source's prompt explains", MODES),
        _option("--mask", "edit only where this picture is white; for scenes a mask named like a photograph, or a "
                "folder of some: what they show is found in all views", MODES, type=Path, metavar="FILE"),
        _option("--box", "edit a scene only between two corners, in the units of its file", SCENES, type=COORDINATE,
                nargs=6, metavar=("X", "Y", "Z") * 2),
        _option("--ball", "edit a scene only within R of a point, in the units of its file", SCENES, type=COORDINATE,
                nargs=4, metavar=("X", "Y", "Z", "R")),
        _switch("--square", "show the model square crops: the centre of a photograph, a drawing or picture between "
                "white bars (default: whole frames, the shorter side at the model's size)"),
        _option("--seed", "seed of views, timesteps and noise (default: %(default)s)", type=number(int, 0, 2 ** 62),
                default=0)],
    "drawings and pictures": [
        _setting("points"), _setting("colours"), _setting("smooth"), _setting("subdivide"), _setting("spring"),
        _setting("affine"), _setting("symmetry"), _setting("sparse"), _setting("follow"), _setting("steady"),
        _setting("opacities"), _setting("jitter"),
        _option("--only", "change these elements alone", ("svg",), nargs="+", metavar="ID"),
        _switch("--colours-only", "keep the geometry", ("svg",)),
        _option("--ss", "supersampling (default: %(default)s)", ("svg",), type=int, choices=[1, 2, 4], default=1),
        _switch("--skip-unsupported", "drop what cannot be drawn, with a warning", ("svg",)),
        _switch("--pixels", "optimise the pixels instead of the latent", ("image",)),
        _setting("latent"), _setting("decay")],
    "scenes": [
        _option("--fit-seconds", "time of the fit, process CPU time on a CPU (default: %(default)g)", SCENES,
                type=number(float, 0.001, 1e7), default=60.0),
        _switch("--fit-only", "fit, print the PSNR of the test views, write fit.png, and stop", SCENES, kept=False),
        _option("--downscale", "reduce the photographs by this factor (default: %(default)s)", SCENES,
                type=number(int, 1, 1000), default=1),
        _option("--images", "folder of the photographs inside the scene's, such as images_4 (default: the one that the "
                "scene's file names)", SCENES, metavar="FOLDER"),
        _option("--up", "upward axis of --splats without a --scene, written --up=-y (default: that in the file, else "
                "-y as in COLMAP)", ("splat",), choices=UP),
        _setting("table"), _setting("mlps"), _setting("densities"), _setting("paint"), _setting("lut"),
        _setting("means"), _setting("scales"), _setting("rotations"), _setting("opacity"), _setting("refine"),
        _option("--path", "camera path of turntable.gif (default: %(default)s)", SCENES, kept=False, choices=PATHS,
                default="turntable"),
        _switch("--export", "write every edited view, its depth and a transforms.json", SCENES, kept=False),
        _option("--view", "show the scene in the browser, at this port, while it is edited or, without prompts, as it "
                "is (default: 8080; pip install viser)", SCENES, kept=False, nargs="?", const=8080,
                type=number(int, 1, 65535), metavar="PORT"),
        _option("--view-host", "address at which it listens (default: %(default)s, this machine alone)", SCENES,
                kept=False, default="127.0.0.1", metavar="HOST")],
    "output": [
        _option("--out", "output folder (default: out/FILE-TARGET-LOSS)", kept=False, type=Path, metavar="DIR"),
        _switch("--resume", "continue from the checkpoint in the output folder", kept=False),
        _option("--every", "steps between checkpoints (default: %(default)s)", kept=False, type=POSITIVE, default=50)]}
OPTIONS = {option.flag[2:].replace("-", "_"): option for group in GROUPS.values() for option in group}


def parse(argv=None, about=None, strict=True):
    """The options of a command line, a Namespace; what depends on the model is None until `complete`.

    Attributes besides those of OPTIONS: input, the file or folder that is edited, None: the shipped example; losses,
    the methods to run. Exits with one line on stderr for contradictions. strict: refuse options that the mode does not
    read; False: ignore them, for a list of edits of several modes.
    """
    parser = _parser(about)
    args = parser.parse_args(argv)
    given = {flag: getattr(args, flag) for flag in INPUTS if getattr(args, flag)}
    if len(given) > 1:
        parser.error(f"--{' and --'.join(given)} name two things to edit: choose one")
    args.fitted = args.fitted or args.splats
    args.input = next(iter(given.values()), None)
    gaussians = _is_gaussians(args.fitted) if args.fitted else _is_gaussians(args.input)
    args.mode = args.mode or ("splat" if gaussians else "nerf" if args.fitted else INPUTS[next(iter(given), "svg")])
    for name, option in OPTIONS.items():
        if option.modes and args.mode not in option.modes and getattr(args, name) != parser.get_default(name):
            if strict:
                parser.error(f"{option.flag}: only with --mode {' and '.join(option.modes)}")
            setattr(args, name, parser.get_default(name))
    if args.mode in SCENES and (args.fitted or gaussians):
        if gaussians != (args.mode == "splat"):
            parser.error(
                f"{args.fitted or args.input}: --mode splat edits a .ply or .splat, --mode nerf a .safetensors"
            )
        if args.input is None and not gaussians:
            parser.error(f"{args.fitted}: also give --scene DIR, the photographs that it was fitted to")
        args.fitted = args.fitted or args.input
        args.input = args.input or args.fitted
    args.command = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    args.losses = [args.loss] if args.compare is None else list(dict.fromkeys(args.compare or COMPARED))
    places = [f"--{name}" for name in ("mask", "box", "ball") if getattr(args, name)]
    if len(places) > 1:
        parser.error(f"{' and '.join(places)} name two places of the edit: choose one")
    editors = [name for name in args.losses if name in EDITORS]
    if editors and args.mode not in EDITABLE:
        parser.error(f"{editors[0]} edits pictures: only with --mode image, nerf and splat")
    for flag in (*INPUTS, "splats"):
        delattr(args, flag)
    return args


def _parser(about):
    """The argparse parser of OPTIONS, in groups; the help shows the shipped model's settings."""
    parser = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = _Shipped()
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            text, name = option.help, option.flag[2:].replace("-", "_")
            if option.modes and option.modes != MODES and name not in INPUTS:
                text = f"{', '.join(option.modes)}: {text}"
            if name in SETTINGS or name == "guidance":
                text += f" (default: {shown.values(name)})"
            group.add_argument(option.flag, help=text, **option.more)
    return parser


class _Shipped:
    """The settings of the shipped model, for the help."""

    def __init__(self):
        try:
            defaults = read_defaults(SHIPPED / "pds.json")
        except PriorError:  # a copy of the code without models
            defaults = {"guidance": {}}
        self.own = {mode: settings_for(defaults, mode, "pds") for mode in MODES}

    def values(self, name):
        """A setting as text: one value, or one for each mode that reads it."""
        modes = SETTINGS[name].modes if name in SETTINGS else MODES
        each = {
            mode: own["guidance"].get("pds") if name == "guidance" else own.get(name)
            for mode, own in self.own.items()
            if mode in modes
        }
        words = {mode: "none" if value in (None, "") else {True: "yes", False: "no"}[value] if isinstance(value, bool)
                 else f"{value:g}" if isinstance(value, (int, float)) else value for mode, value in each.items()}
        if len(set(words.values())) == 1:
            return next(iter(words.values()))
        return ", ".join(f"{mode} {word}" for mode, word in words.items())


def _is_gaussians(path):
    """Whether a path has the ending of a file of Gaussians, in a format that can be read or not."""
    endings = (".ply", ".splat", ".ksplat", ".spz", ".sog")
    return path is not None and path.suffix.lower() in endings and not path.is_dir()


def complete(args, prior, name=None, confined=False):
    """A copy of the options with everything that the model decides filled in; what the user gave stays.

    `own` of the copy holds the model's settings for this mode and method, `frame` the sides that the model sees.
    confined: a scene can change in one part of its space only, so that what is right for the whole is right there.

    Raises:
        ValueError: timesteps outside of the model's schedule.
    """
    args, name = copy.copy(args), name or args.losses[0]
    own = settings_for(prior.defaults, args.mode, name, prior.size, args.smooth,
                       args.coefficients, local=bool(args.local or args.mask) and not confined,
                       recolour=recolours(args.source or "", args.target or ""), confined=confined)
    for key in SETTINGS:
        if getattr(args, key, None) is None:
            setattr(args, key, own.get(key))
    if args.points is None and "canvas_points" not in own:
        args.points = 2.4 if args.smooth else 0.8
    args.guidance = guidance_of(own, name, args.guidance)
    if args.mode not in SCENES and name in EDITORS:
        args.refine = 0  # the edit is itself one of these
    args.own, args.frame = own, Frame(prior.size, prior.multiple, args.square)
    check_timesteps(args, prior.abar)
    return args


def settings(args, prior, name):
    """Everything that a result depends on, as a dict for config.json; args: completed."""
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
              if key in ("input", "fitted") or key in OPTIONS and OPTIONS[key].kept}
    config |= {key: own for key in ("hold", "warm", "freeu") if (own := getattr(args, key)) is not None}
    config |= {
        "loss": name,
        "size": prior.size,
        "device": str(prior.device),
        "threads": torch.get_num_threads(),
        "processes": parallel.world(),
        "sha256": digest(files_of(args)),
        "versions": {"torch": torch.__version__},
    }
    return config


def check_prompts(args):
    """Raise ValueError if --source or --target is missing; warn if they are the same."""
    for prompt in ("source", "target"):
        if not (getattr(args, prompt) or "").strip():
            raise ValueError(f"--{prompt} is missing or empty: describe the {prompt} in a few words")
    if args.source.split() == args.target.split():
        warnings.warn("--source and --target are the same: there is nothing to change", stacklevel=2)


def check_timesteps(args, abar):
    """Raise ValueError if --stride, --t-min or --t-max lead out of the model's schedule abar [T]."""
    lowest, highest = (pds.sample_timesteps(1, len(abar), args.t_min, args.t_max, progress=share).item()
                       for share in (1.0, 0.0))
    if lowest < args.stride:
        raise ValueError(f"--stride {args.stride} is longer than the lowest timestep, {lowest}: raise --t-min")
    if abar[highest] < 1e-9:
        raise ValueError(
            f"--t-max {args.t_max:g}: the model's schedule has no signal left there; lower it, for example to 0.98"
        )


def slug(text, longest=40):
    """A prompt as part of a file name: lower-case letters, digits and hyphens.

    If it is cut off or loses letters, a short hash keeps it apart from other prompts.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    found = re.sub("[^a-z0-9]+", "-", plain).strip("-")
    lost = len(found) > longest or any(c.isalnum() and not c.isascii() for c in plain)
    suffix = hashlib.sha256(text.encode()).hexdigest()[:6] if lost else ""
    return "-".join(filter(None, (found[:longest].strip("-"), suffix)))


def files_of(args):
    """All of the user's files that a result depends on; none of a scene that cannot be read, which loading reports."""
    try:
        around = args.mode in SCENES and args.input != args.fitted
        files = scene_files(args.input, args.images) if around else [args.input]
    except SceneError:
        files = []
    files += [args.fitted] if args.fitted and args.fitted not in files else []
    for place in (Path(name) for name in (args.lora, args.embedding) if name):  # a LoRA may be peft's folder
        files += [place] if place.is_file() else sorted(file for file in place.glob("*") if file.is_file())
    masks = sorted(args.mask.iterdir()) if args.mask and args.mask.is_dir() else [args.mask] if args.mask else []
    return files + [mask for mask in masks if mask.is_file()]


def kept_apart(args, out):
    """Raise ValueError if a run in the folder `out` would overwrite one of the user's files."""
    for file in files_of(args):
        inside = file.resolve().relative_to(out.resolve()) if file.resolve().is_relative_to(out.resolve()) else Path()
        if str(inside) in OUTPUTS or inside.stem == "result" or args.export and inside.parts[:1] == ("export",):
            raise ValueError(f"{file}: the run would overwrite it: choose another --out")
