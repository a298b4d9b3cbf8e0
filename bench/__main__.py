"""Measurements behind the figures in the README; every command prints its figures beside their bars.

    python -m bench svg-fidelity ICONS.json...      # against resvg (icon sets, e.g. npm @iconify-json/noto)
    python -m bench svg-gradients                   # against finite differences
    python -m bench svg-speed                       # against plain autograd; memory; cost table; fits
    python -m bench svg-roundtrip ICONS.json...     # save, then resvg, against the own render
    python -m bench svg-geometry                    # edits: crossings, broken joints, against free points
    python -m bench svg-flow                        # official and consistent coefficients on a flow, over ten drawings
    python -m bench svg-batch                       # --batch N at equal numbers of views, over ten drawings
    python -m bench fuzz-drawings --count 5000      # drawings made at random: pictures or one-line errors
    python -m bench fuzz-scenes                     # damaged scenes, pictures, checkpoints: read, or one-line errors
    python -m bench kills                           # runs killed at random moments: --resume ends bit-identically
    python -m bench svg-field                       # a step of 5000 paths with the smooth field, and without
    python -m bench nerf-grid                       # the hash grid against nn.Embedding
    python -m bench nerf-fit SCENE --at 10 30 60    # PSNR over time, rays/s, memory
    python -m bench nerf-deferred SCENE             # deferred image gradients against direct ones; memory
    python -m bench nerf-edit SCENE                 # what a step of an edit renders, and what each part of it takes
    python -m bench splat-speed                     # 3D Gaussians against two plain formulations
    python -m bench splat-memory                    # what 10 000 of them add to a process
    python -m bench splat-fit SCENE --at 10 30 60   # PSNR over time, files
    python -m bench local                           # --local on the ball, alone and on a ground: what it keeps
    python -m bench step                            # a PDS step: the network, and everything else
    python -m bench memory --sd15                   # the memory of a PDS step by part, Stable Diffusion 1.5's shapes

Run it in the root of the repository, with OMP_NUM_THREADS=1 for figures of one core. The exit code is 1 where a bar was
missed. The table of all edits is `python run.py --mode bench`.
"""
import argparse
import importlib
import sys

from files.messages import Parser, exit_code, number

# The modules of the commands that are not in that of their first word.
PLACES = {"svg-geometry": "geometry", "svg-field": "geometry", "svg-batch": "drawings", "svg-flow": "drawings",
          "fuzz-scenes": "fuzz_scenes"}


def measure(args):
    """Run the command MODULE-FUNCTION, or MODULE alone, of this folder; returns the number of bars missed."""
    module, _, function = args.command.partition("-")
    module = PLACES.get(args.command, module)
    return getattr(importlib.import_module(f"bench.{module}"), function or module)(args)


def main(argv=None):
    parser = Parser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = lambda name, help_line: commands.add_parser(name, help=help_line).add_argument
    for name, help_line in (("svg-fidelity", "PSNR of renders against resvg"),
                            ("svg-roundtrip", "save, render with resvg, compare")):
        a = command(name, help_line)
        a("icons", nargs="+", help="icons.json of an iconify set")
        a("--count", type=int, default=200, help="icons of each set (default 200)")
    command("svg-gradients", "gradients against finite differences")
    command("svg-speed", "time, memory, cost table, fits")
    a = command("svg-geometry", "crossings and broken joints of edits, against every point for itself")
    a("--model", default="models/emoji")
    a("--flags", nargs=argparse.REMAINDER, default=[], help="of run.py, for both; last")
    a = command("svg-batch", "views, timesteps and noises in fewer, larger steps")
    a("--model", default="models/emoji")
    a("--share", type=number(float, 0.01, 100), default=1, help="of the default's number of views (default 1)")
    a("--seed", type=int, default=0)
    a = command("svg-flow", "PDS with a flow as prior, by its coefficients")
    a("--model", default="models/emoji")
    a("--seed", type=int, default=0)
    a = command("fuzz-drawings", "drawings made at random: pictures or one-line errors")
    a("--count", type=number(int, 1), default=5000)
    a("--seed", type=int, default=0)
    a("--first", type=int, default=0, help="number of the first drawing (default 0)")
    a("--keep", help="folder for the drawings that fail")
    a = command("fuzz-scenes", "damaged scenes, pictures, checkpoints, settings: read or refused in one line")
    a("--share", type=number(float, 0.001, 100), default=1, help="of the 1600 cases (default 1)")
    a("--seed", type=int, default=0)
    a = command("kills", "runs that are killed at random moments: what --resume makes of them")
    a("--count", type=number(int, 1), default=20)
    a("--seed", type=int, default=0)
    a = command("svg-field", "a step of many paths with the smooth field, and without")
    a("--paths", type=int, default=5000)
    a("--way", help=argparse.SUPPRESS)
    a = command("nerf-grid", "the hash grid against nn.Embedding")
    a("--points", type=int, default=20000)
    for name, help_line in (("nerf-fit", "PSNR over time, rays/s, memory of fits"),
                            ("splat-fit", "PSNR over time; the files of the last fit")):
        a = command(name, help_line)
        a("scene")
        a("--at", type=float, nargs="+", default=[10, 30, 60], help="seconds of process CPU time, a fit each")
        a("--bars", type=float, nargs="+", help="PSNR that each must reach")
        a("--downscale", type=int, default=1)
        a("--seed", type=int, default=0)
        a("--device", default="cpu")
    a = command("nerf-deferred", "deferred image gradients against direct ones; memory")
    a("scene")
    a("--seconds", type=float, default=10, help="of the fit")
    for hidden, kind in (("--only", int), ("--how", str), ("--nerf", str)):
        a(hidden, type=kind, help=argparse.SUPPRESS)
    a = command("nerf-edit", "the rendering of an edit's step: samples, seconds, shares")
    a("scene")
    a("--size", type=number(int, 1), default=64, help="of the picture in pixels (default 64)")
    a("--whole", action="store_true", help="the whole photograph, its shorter side of that size, not its central square")
    a("--fit-seconds", type=float, default=60)
    a("--kept", help="file of the fit, which goes on from there")
    a("--downscale", type=int, default=1)
    a("--seed", type=int, default=0)
    a = command("splat-speed", "against a dense formulation and a loop over tiles")
    a("--size", type=int, default=128, help="of the picture, a multiple of 64")
    a = command("splat-memory", "peak memory of a forward and a backward")
    a("--size", type=int, default=128)
    a("--only", type=int, help=argparse.SUPPRESS)
    a = command("local", "what --local keeps of a scene outside the subject")
    a("--mode", choices=["nerf", "splat"], default="nerf")
    a("--out", default="out/local", help="what stands there is not made again (default: out/local)")
    a = command("step", "a PDS step of run.py")
    a("--steps", type=number(int, 3), default=200)
    a = command("memory", "the memory of a PDS step by part")
    a("--model", default="models/emoji", help="diffusers folder or hub id (default: models/emoji)")
    a("--sd15", action="store_true", help="the shapes of Stable Diffusion 1.5 with random weights instead; 8 GB of memory")
    a("--device", default="cpu")
    a("--dtype", choices=["float32", "float16", "bfloat16"], help="number format of the networks")
    a("--size", type=number(int, 8), help="of the picture in pixels (default: the model's own)")
    args = parser.parse_args(argv)
    return exit_code("bench", lambda: 1 if measure(args) else 0)


if __name__ == "__main__":
    sys.exit(main())
