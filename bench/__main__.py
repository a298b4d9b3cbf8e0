"""Measurements behind the figures in the READMEs; every command prints its figures beside their bars.

    python -m bench edits                           # every edit of a list by several methods: one table, sheets
    python -m bench svg-fidelity ICONS.json...      # against resvg (icon sets, e.g. npm @iconify-json/noto)
    python -m bench nerf-fit SCENE --at 10 30 60    # PSNR over time, rays/s, memory

Run it in the root of the repository, with OMP_NUM_THREADS=1 for figures of one core. The exit code is 1 if a bar is
missed. `edits` and `front` pass unknown options on to run.py.
"""
import argparse
import importlib
import sys
from pathlib import Path

from bench.judge import COLOURS
from edit import LOSSES, MODES
from files.messages import Parser, exit_code, number
from image.editors import EDITORS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COUNT, HIDDEN = number(int, 1), argparse.SUPPRESS
MODEL = ("--model", dict(default="models/emoji", help="diffusers folder or hub id (default: models/emoji)"))
SEED = ("--seed", dict(type=int, default=0))
SEEDS = ("--seeds", dict(type=COUNT, default=1, help="number of seeds of each edit, from --seed on (default: 1)"))
ICONS = [("icons", dict(nargs="+", help="icons.json of an iconify set")),
         ("--count", dict(type=COUNT, default=200, help="icons of each set (default: 200)"))]
FITS = [("scene", {}), ("--downscale", dict(type=int, default=1)), SEED, ("--device", dict(default="cpu")),
        ("--at", dict(type=float, nargs="+", default=[10, 30, 60], help="seconds of process CPU time, one fit each")),
        ("--bars", dict(type=float, nargs="+", help="PSNR that each must reach"))]
PROBE = [("icons", dict(help="folder of the icon sets, as for models/emoji/train.py")), MODEL,
         ("--trainer", dict(default="models/emoji/train.py", help="the training script, which recolours the drawings")),
         ("--work", dict(type=Path, default=Path("out/colours"), help="folder of the rendered drawings")),
         ("--noises", dict(type=COUNT, default=8))]
COMMANDS = {  # name: (module and function of this folder, help, arguments)
    "edits": ("edits.edits", "every edit of a list by several methods: one table, sheets", [
        ("--list", dict(type=Path, default=EXAMPLES / "edits.txt", help="the edits (default: examples/edits.txt)")),
        ("--modes", dict(nargs="+", choices=MODES, help="only edits of these modes")),
        ("--compare", dict(nargs="+", choices=[*LOSSES, *EDITORS], help="the methods (default: sds dds pds)")),
        SEEDS, ("--clip", dict(help="CLIP folder or hub id, for its score and its directional score")),
        ("--out", dict(type=Path, default=Path("out/edits"), help="folder of the results (default: out/edits)"))]),
    "front": ("front.front", "drawings by PDS at several --identity K and by its rivals: a chart", [
        ("--list", dict(type=Path, default=EXAMPLES / "edits.txt", help="the edits (default: examples/edits.txt)")),
        SEEDS,
        ("--out", dict(type=Path, default=Path("out/front"), help="folder of the results (default: out/front)"))]),
    "coefficients": ("coefficients.coefficients", "psi and chi against t, Stable Diffusion and flows: a chart", [
        ("--out", dict(type=Path, default=Path("out/coefficients.png"), help="default: out/coefficients.png"))]),
    "svg-fidelity": ("svg.fidelity", "PSNR of renders against resvg", ICONS),
    "svg-roundtrip": ("svg.roundtrip", "save, render with resvg, compare with our own render", ICONS),
    "svg-gradients": ("svg.gradients", "gradients against finite differences", []),
    "svg-speed": ("svg.speed", "time against plain autograd, memory, cost table, fits", []),
    "svg-geometry": ("geometry.geometry", "crossings and broken joints of edits, against free points", [
        MODEL, ("--flags", dict(nargs=argparse.REMAINDER, default=[], help="options of run.py; last"))]),
    "svg-field": ("geometry.field", "a step of many paths with the smooth field, and without", [
        ("--paths", dict(type=int, default=5000)), ("--way", dict(help=HIDDEN))]),
    "svg-batch": ("drawings.batch", "--batch N at equal numbers of views, over ten drawings", [
        MODEL, SEED, ("--share", dict(type=number(float, 0.01, 100), default=1,
                                      help="share of the default number of views (default: 1)"))]),
    "svg-flow": ("drawings.flow", "PDS with a flow as prior, by coefficients, over ten drawings", [MODEL, SEED]),
    "fuzz-drawings": ("fuzz.drawings", "random drawings: rendered, or refused in one line", [
        ("--count", dict(type=COUNT, default=5000)), SEED,
        ("--first", dict(type=int, default=0, help="number of the first drawing (default: 0)")),
        ("--keep", dict(help="folder for the drawings that fail"))]),
    "fuzz-scenes": ("fuzz_scenes.scenes", "damaged scenes, pictures, settings: read, or refused in one line", [
        ("--share", dict(type=number(float, 0.001, 100), default=1, help="share of 1600 cases (default: 1)")), SEED]),
    "kills": ("kills.kills", "runs killed at random moments: --resume ends bit-identically", [
        ("--count", dict(type=COUNT, default=20)), SEED]),
    "nerf-grid": ("nerf.grid", "the hash grid against nn.Embedding", [("--points", dict(type=int, default=20000))]),
    "nerf-fit": ("nerf.fit", "PSNR over time, rays/s, memory of fits", FITS),
    "nerf-deferred": ("nerf.deferred", "deferred image gradients against direct ones; memory", [
        ("scene", {}), ("--seconds", dict(type=float, default=10, help="seconds of the fit (default: 10)")),
        ("--only", dict(type=int, help=HIDDEN)),
        ("--how", dict(help=HIDDEN)), ("--nerf", dict(help=HIDDEN))]),
    "nerf-edit": ("nerf.edit", "rendering in a step of an edit: samples, seconds, shares", [
        ("scene", {}), ("--size", dict(type=COUNT, default=64, help="side of the picture in pixels (default: 64)")),
        ("--whole", dict(action="store_true", help="the whole photograph, not its central square")),
        ("--fit-seconds", dict(type=float, default=60)), ("--kept", dict(help="checkpoint of the fit, resumed")),
        ("--downscale", dict(type=int, default=1)), SEED]),
    "splat-speed": ("splat.speed", "3D Gaussians against a dense formulation and a loop over tiles", [
        ("--size", dict(type=int, default=128, help="side of the picture in pixels, a multiple of 64"))]),
    "splat-memory": ("splat.memory", "peak memory of a forward and a backward", [
        ("--size", dict(type=int, default=128)), ("--only", dict(type=int, help=HIDDEN))]),
    "splat-fit": ("splat.fit", "PSNR over time, and the files of the last fit", FITS),
    "capture": ("capture.capture", "NeRF and splats of a ray-traced capture by views and seconds; sheets", [
        ("--views", dict(type=number(int, 3), nargs="+", default=[12, 24, 48])), SEED,
        ("--at", dict(type=float, nargs="+", default=[30, 60, 120], help="seconds of process CPU time, one fit each")),
        ("--modes", dict(nargs="+", choices=["nerf", "splat"], default=["nerf", "splat"])),
        ("--out", dict(default="out/capture", help="folder of the scenes and sheets (default: out/capture)"))]),
    "local": ("local.local", "what --local preserves in edits of the ball, alone and on a ground", [
        ("--mode", dict(choices=["nerf", "splat"], default="nerf")),
        ("--out", dict(default="out/local", help="folder of the results, which are reused (default: out/local)"))]),
    "local-capture": ("local.captured", "edits of a ray-traced capture with one mask, and with --local alone", [
        ("--mode", dict(choices=["nerf", "splat"], default="nerf")),
        ("--views", dict(type=number(int, 9), default=80)), ("--fit-seconds", dict(type=float, default=60)),
        ("--steps", dict(type=COUNT, help="steps of the edit (default: the model's)")),
        ("--only", dict(nargs="+", choices=["one mask", "local", "local, the lemon"], help="default: all three")),
        ("--out", dict(default="out/local-capture", help="folder of the results (default: out/local-capture)"))]),
    "colours": ("colours.colours", "which colours a prior recognises, in recoloured and in original drawings", [
        *PROBE, ("--nouns", dict(type=COUNT, default=60)), ("--natural", dict(type=COUNT, default=20)),
        ("--among", dict(nargs="+", choices=COLOURS, default=COLOURS, metavar="COLOUR", help="default: all eleven"))]),
    "colours-pull": ("colours.pull", "how far one denoising step moves a wrong colour towards the caption's", PROBE),
    "step": ("step.step", "a PDS step of run.py: the network, and everything else", [
        ("--steps", dict(type=number(int, 3), default=200))]),
    "memory": ("memory.memory", "the memory of a PDS step by part", [
        MODEL, ("--sd15", dict(action="store_true", help="random weights of Stable Diffusion 1.5's shapes; 8 GB of "
        "memory")),
        ("--device", dict(default="cpu")),
        ("--dtype", dict(choices=["float32", "float16", "bfloat16"], help="number format of the networks")),
        ("--size", dict(type=number(int, 8), help="side of the picture in pixels (default: the model's)"))])}


def measure(args):
    """Run a command; returns the number of bars missed."""
    module, function = COMMANDS[args.command][0].split(".")
    return getattr(importlib.import_module(f"bench.{module}"), function)(args)


def main(argv=None):
    """Run a command line; returns the exit code."""
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)  # --seed is no short --seeds
        for flag, more in arguments:
            command.add_argument(flag, **more)
    args, args.run = parser.parse_known_args(argv)
    if args.run and args.command not in ("edits", "front"):
        parser.error(f"unrecognized arguments: {' '.join(args.run)}")
    return exit_code("bench", lambda: 1 if measure(args) else 0)


if __name__ == "__main__":
    sys.exit(main())
