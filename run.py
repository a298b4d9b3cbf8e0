"""Edit an SVG, a picture, a NeRF or 3D Gaussians towards a prompt with Posterior Distillation Sampling.

    python run.py --mode svg                                  # the shipped example
    python run.py --svg cat.svg --source "cat face" --target "dog face" --compare                # SDS, DDS and PDS
    python run.py --image apple.png --source "red apple" --target "green apple" --loss in2n      # an editor of pictures
    python run.py --scene DIR --source "red apple" --target "green apple" --refine 200           # a NeRF, both stages
    python run.py --scene DIR --fit-only --fit-seconds 60                                        # PSNR of test views
    python run.py --mode splat --scene DIR --source "red apple" --target "green apple"           # 3D Gaussians
    python run.py --splats trained.ply --source "chair" --target "throne"                        # trained Gaussians
    python run.py --mode nerf --compare in2n inv2n sds dds pds                                   # the paper's Figure 1
    python run.py --mode toy                                  # SDS, DDS and PDS in the plane, the paper's Figure 2

The output folder gets index.html (a page to open), source.*, result.*, progress.gif, sheet.png (before and after; of a
scene from several sides) and config.json; of a scene also turntable.gif and depth.png, and with --export every view in
nerfstudio's format. --view shows a scene in the browser while it is edited. python -m bench edits runs every edit of a
list and prints one table.
"""
import contextlib
import copy
import functools
import json
import math
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # the imports take seconds, and Ctrl-C in one of them would end in a traceback of a library
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"run.py: interrupted\n") and os._exit(130))

import torch
from PIL import Image

import options
import toy
from edit import LOSSES, SCENES, edit, stages_of
from files import sheets
from files.checkpoint import fingerprint, read_run
from files.messages import exit_code, one_line
from files.page import run_page
from files.pictures import read_picture, to_pil, to_tensor
from files.sheets import beside, sheet, snapshot, thumbnail
from files.writing import check_writable, locked, write
from image.editors import EDITORS, TITLES, prompts
from image.figures import outside
from image.masks import Where, agree, local_masks, photograph_maps, read_mask, read_masks, subject_masks
from image.picture import Picture
from loop import parallel
from loop.fit import kept_in
from loop.interrupt import DelayedInterrupt
from nerf import NeRF
from options import HERE, check_prompts, complete, kept_apart, settings, slug
from prior import InstructPix2Pix, Prior
from scene.cameras import input_path, sides, turntable
from scene.paint import palette
from scene.reading import load_scene
from scene.region import MOST, ball, box, found, lifted
from scene.representation import depth_of, evaluate, export, fit_pictures, fit_report
from scene.viewer import Viewer
from splat import Splats
from svg_raster import SVG

EXAMPLE = {"svg": ("smiling-face.svg", "slightly smiling face", "smiling face with sunglasses"),
           "image": ("red-apple.png", "red apple", "green apple"),
           "nerf": ("apple", "red apple", "green apple"), "splat": ("apple", "red apple", "green apple")}


# ---- what can be edited -------------------------------------------------------------------------------
# A loader returns the scene (see edit.py; it also has save(path)), its parameter groups for Adam, and the source, whose
# render(view) is the picture before.

def load_svg(args, prior):
    """An SVG file; its points may move as one smooth field, and opaque shapes stay opaque: --smooth, --opacities."""
    scene = SVG.load(args.input, skip_unsupported=args.skip_unsupported, size=args.frame, ss=args.ss,
                     subdivide=0.0 if args.points == 0 or args.colours_only else args.subdivide).to(prior.device)
    scene.jitter = args.jitter
    if args.points is None:  # the model gives the rate in units of the canvas
        args.points = args.own["canvas_points"] * scene.document.unit
    groups = scene.param_groups(args.points, args.colours, args.colours_only, shared=args.steady)
    own = {"points": {"spring": args.spring}, "stroke_widths": {"spring": args.spring},
           "colours": {"sparse": args.sparse}, "stop_colours": {"sparse": args.sparse}}
    groups = [group | own.get(group["name"], {}) for group in groups]
    if not any(p.numel() for g in groups for p in g["params"]):
        raise ValueError(f"{args.input}: nothing to edit: no filled or stroked shape in it")
    source = copy.deepcopy(scene)
    scene.restrict(args.opacities, args.only, joints=args.smooth > 0, inside=args.spring > 0)
    return scene, groups, source


def load_image(args, prior):
    """A picture on white, whole or with --square between white bars."""
    picture = read_picture(args.input).convert("RGBA")
    wide, high = [max(picture.size)] * 2 if args.square else picture.size
    page = Image.new("RGBA", (wide, high), "white")
    page.alpha_composite(picture, ((wide - picture.width) // 2, (high - picture.height) // 2))
    pixels = to_tensor(page.convert("RGB").resize(args.frame.sides(wide, high), Image.LANCZOS)).float()
    alpha = picture.getchannel("A")
    scene = Picture(pixels, prior, args.pixels, None if args.square or alpha.getextrema()[0] == 255 else alpha)
    return scene, scene.param_groups(args.colours if args.pixels else args.latent, args.decay), copy.deepcopy(scene)


class Photographs:
    """The source of a scene's edit: its photographs."""

    def __init__(self, scene):
        self.render = scene.photograph


def fit(args, size=256):
    """The scene as a NeRF or as splats: --fitted, or a fit, which is kept beside the output for later edits.

    size: of the pictures of a model without photographs, in pixels.
    """
    kind = FITTED[args.mode]
    if args.fitted == args.input:
        return kind.load(args.fitted, None, args.device, size, args.up)
    scene = load_scene(args.input, args.downscale, images=args.images)
    if args.fitted:
        return kind.load(args.fitted, scene, args.device)
    file = kept_in(args.fit, scene, kind.sizes(args.device))
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if parallel.rank() else locked(file, wait=True):
        parallel.largest(0)  # the other processes wait until the first one has the lock
        return kind.fit(scene, args.fit_seconds, checkpoint=file, device=args.device)


def confined(args, scene):
    """Whether an edit of a Scene is confined to a part of its space, see `region_of`, and not only by masks."""
    return bool(args.mask or args.box or args.ball or args.local and not scene.bounded)


def load_nerf(args, prior, nerf=None):
    """A scene as a NeRF, fitted before."""
    nerf = nerf or fit(args)
    if args.densities != 1 and (args.table or args.mlps):
        nerf.split()
    if args.paint:
        nerf.painted(palette(nerf, args.frame))
    if args.lut:
        nerf.graded()
    nerf.learn_from(args.frame)
    groups = nerf.param_groups(args.table, args.mlps, args.densities, args.paint, args.lut, args.sparse)
    if args.rates == "released":  # nerfstudio's Adam; rates fall to a tenth in 100,000 steps
        groups = [group | {"betas": (0.9, 0.999), "warm": args.warm or 1000, "fall": (0.1, 99000)} for group in groups]
    return nerf, groups, Photographs(nerf)


def load_splat(args, prior, splats=None):
    """A scene as 3D Gaussians, fitted before."""
    splats = splats or fit(args, max(256, args.frame.short))
    groups = splats.param_groups(args.means, args.scales, args.rotations, args.opacity, args.colours,
                                 shared=args.smooth > 0)
    if args.rates == "released":
        groups = [group | {"warm": args.warm or 0} | ({"fall": (0.01, 30000)} if group["name"] == "means" else {})
                  for group in groups]
    return splats, groups, Photographs(splats)


LOAD = {"svg": load_svg, "image": load_image, "nerf": load_nerf, "splat": load_splat}
SUFFIX = {"svg": ".svg", "image": ".png", "nerf": ".safetensors", "splat": ".ply"}  # of the file that save() writes
FITTED = {"nerf": NeRF, "splat": Splats}  # representations that are fitted to a scene
AROUND = {"turntable": turntable, "input": input_path}  # camera paths of turntable.gif


def where_of(scene, source, prior, args):
    """Where the edit may act, a masks.Where: the user's masks, box or ball, which confine a scene in space as well, or
    with --local the masks of the prompts; None: everywhere."""
    around, size = args.mode in SCENES, args.frame
    views = range(len(scene.scene.train)) if around else [None]
    if around and (region := region_of(scene, source, prior, args)):
        scene.focus(region.closer(), size)
        masks = [region.seen(scene, view, size) for view in range(len(scene.edited.train))]
        scene.confine(region)
        return Where(masks)
    if args.mask:
        return Where([read_mask(args.mask, scene.sides)], scene.sides)
    if not args.local:
        return None
    with torch.no_grad():
        found = local_masks(prior, [source.render(view, size) for view in views], *prompts(args))
    return Where(agree(scene, found, size)) if around else Where(found, scene.sides)


def region_of(scene, source, prior, args):
    """The part of a scene's space that --mask, --box or --ball names or, in a capture, --local finds: a region.Region;
    None without them."""
    if args.local and not (args.mask or args.box or args.ball):
        if not confined(args, scene.scene):
            return None
        views = range(0, len(scene.edited.train), math.ceil(len(scene.edited.train) / MOST))
        pictures = [source.render(view, args.frame) for view in views]
        maps = photograph_maps(prior, pictures, *prompts(args))
        return found(scene, dict(zip(views, maps, strict=True)), args.frame)
    if args.box:
        return box(scene.scene, args.box[:3], args.box[3:])
    if args.ball:
        return ball(scene.scene, args.ball[:3], args.ball[3])
    if not args.mask:
        return None
    views = [*scene.scene.train, *scene.scene.test]
    cameras = [scene.camera(view.camera, args.frame) for view in views]
    masks = read_masks(args.mask, [view.name for view in views], [(c.width, c.height) for c in cameras])
    return lifted(scene, masks, args.frame)


def editor_of(name, args, prior):
    """The InstructPix2Pix of IN2N, and of DreamCatalyst if --instruct names one; None for other methods."""
    if name == "in2n" or name == "pds" and args.coefficients == "dreamcatalyst" and args.instruct:
        return load_editor(args.instruct or args.model, args.device, args.dtype, prior.size)
    return None


@functools.cache
def load_editor(model, device, dtype, size):
    """The InstructPix2Pix in a folder or hub id; raises ValueError if it is not made for pictures of `size` pixels."""
    editor = InstructPix2Pix.from_pretrained(model, device, dtype)
    if editor.size != size:
        raise ValueError(f"{model}: made for {editor.size} pixels, the prior for {size}")
    return editor


def load_prior(args):
    """The prior in --model, with --lora and --embedding applied."""
    return Prior.from_pretrained(args.model, args.device, args.dtype, lora=args.lora, lora_scale=args.lora_scale,
                                 embedding=args.embedding)


# ---- one run ------------------------------------------------------------------------------------------

def run_one(prior, name, args, out, view=None):
    """One edit by a loss or an editor, and its files in the folder `out`; view: the Viewer that shows it, or None.

    Returns:
        The pictures before and after, two lists of PIL pictures, one per view.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the files of the edit so far are written.
        ValueError, OSError: bad input; nothing has been written then.
    """
    given, ready = args, ()
    args, editor = complete(args, prior, name), editor_of(name, args, prior)
    if args.mode in SCENES:
        ready = fit(args, max(256, args.frame.short)),
        args = complete(given, prior, name, name in LOSSES and confined(args, ready[0].scene))
    scene, groups, source = LOAD[args.mode](args, editor if editor and name in LOSSES else prior, *ready)
    where = where_of(scene, source, prior, args) if name in LOSSES else None
    shown = Shown(scene, args)  # a confined scene remembers these pictures, and draws what has changed in them
    if view:
        view.show(scene)
    stages = stages_of(scene, source, prior, name, args, editor, where)
    config = settings(args, prior, name) | ({"fit": fingerprint(scene)} if args.mode in SCENES else {})
    kept_apart(args, out)
    original, first = args.input.read_bytes() if args.input.is_file() else None, parallel.rank() == 0
    with contextlib.ExitStack() as held:
        if first:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out / "run"))
        if args.resume:
            read_run(out / "checkpoint.pt", config)  # its errors come before anything is written
        elif first:
            # of an earlier run, which --resume must not mix with this one
            (out / "checkpoint.pt").unlink(missing_ok=True)
        if name in EDITORS and args.mode not in SCENES:
            picture, generator = source.render(None, args.frame), torch.Generator().manual_seed(args.seed)
            scene.put(stages[0].edited(picture, picture, EDITORS[name].strength, generator))
            frames, interrupted = [to_pil(source.render(None, sheets.FRAME_SIZE)), snapshot(scene)], False
        else:
            frames, interrupted = edit(scene, groups, stages, prior, args, out, config, view)
        if first:  # the results before the pictures: torchrun kills its processes soon after Ctrl-C
            with DelayedInterrupt() as late:  # torchrun forwards Ctrl-C a moment later
                write(out / "config.json", json.dumps(config, indent=1) + "\n")
                if where:
                    views = range(len(where.masks)) if args.mode in SCENES else [None]
                    write(out / "masks.png", where.sheet(source, args.frame, views))
                scene.save(out / f"result{SUFFIX[args.mode]}")
                if original is not None:
                    write(out / f"source{args.input.suffix.lower()}", original)
            interrupted = interrupted or late.seen
            after = shown.write(out, scene, stages, TITLES[name], frames)
        else:
            after = shown.look(scene)
    if first:
        change = change_outside(prior, shown.before, after, args)
        print(f"{name}: {change}")
        write(out / "index.html", shown.page(out, config, change))
        if interrupted:
            raise KeyboardInterrupt(f"the edit so far is in {out}; the same command with --resume goes on")
    return shown.before, after


class Shown:
    """The pictures of a run: from which sides a scene is shown, and how it looked before."""

    def __init__(self, scene, args):
        self.args, self.around = args, args.mode in SCENES
        self.turn = AROUND[args.path](scene, sheets.VIEWS, sheets.FRAME_SIZE) if self.around else []
        self.views = sides(scene, sheets.SIDES, sheets.SIDE_SIZE) if self.around else [None]
        self.before, self.turned = self.look(scene), [snapshot(scene, view=camera) for camera in self.turn]

    def look(self, scene):
        """The scene as it is now, a list of PIL pictures, one per view."""
        size = sheets.SIDE_SIZE if self.around else sheets.SHEET_SIZE
        return [snapshot(scene, size, view) for view in self.views]

    def write(self, out, scene, stages, title, frames):
        """Write all pictures of a run to the folder `out`; returns those of the edited scene."""
        args, after = self.args, self.look(scene)
        self.pairs, self.frames, self.title = [(self.before[0], after[0])], frames, title
        write(out / "source.png", beside(self.before))
        if args.mode != "image":  # for a picture, save() has written result.png with its alpha
            write(out / "result.png", beside(after))
        write(out / "sheet.png", sheet([("source", args.source, self.before), (title, args.target, after)]))
        write(out / "progress.gif", frames)
        if self.around:
            self.pairs = [(a, snapshot(scene, view=camera)) for a, camera in zip(self.turned, self.turn, strict=True)]
            write(out / "turntable.gif", [beside(pair) for pair in self.pairs])
            for stage in stages:
                if stage.state.get("edited"):
                    write(out / f"{stage.name}-views.png", sheet(stage.pictures()))
            write(out / "depth.png", beside([depth_of(scene, view, sheets.SIDE_SIZE) for view in self.views]))
        if args.export:
            export(scene, out / "export", [view.camera for view in scene.scene.train])
        return after

    def page(self, out, config, change):
        """index.html of a run in the folder `out`, a str; change: the line of change_outside."""
        args, shape = self.args, self.pairs[0][0].size
        if args.mode == "svg" and args.input.suffix.lower() == ".svg":  # as drawings, which stay sharp when zoomed
            self.pairs = [((out / "source.svg").read_bytes(), (out / "result.svg").read_bytes())]
        name, value = change.split(": ", 1)
        return run_page(args.source, args.target, self.title, self.pairs, shape, self.frames, {name: value},
                        {key: value for key, value in config.items() if value is not None and key != "sha256"},
                        f"python run.py {shlex.join(args.command)}")


def change_outside(prior, before, after, args):
    """One line about the change outside of the subject, which DiffEdit's mask finds in the pictures before."""
    pictures = [to_tensor(p.resize(args.frame.sides(*p.size), Image.LANCZOS)).float() for p in before]
    return outside(before, after, subject_masks(prior, pictures, *prompts(args)))


# ---- the command line ---------------------------------------------------------------------------------

def parse(argv=None):
    """The options of a command line: see options.py."""
    return options.parse(argv, __doc__)


def work(args):
    """Every mode but toy: one edit, the edits that --compare names, or a scene without an edit."""
    args.device = parallel.start(args.device)
    if args.input is None:
        name, source, target = EXAMPLE[args.mode]
        args.input = HERE / "examples" / name
        args.source = source if args.source is None else args.source
        args.target = target if args.target is None else args.target
    if not args.input.exists() or args.input.is_dir() and args.mode not in SCENES:
        raise ValueError(f"{args.input}: no such file")
    name = (args.input.stem, slug(args.target or ""), args.loss if args.compare is None else "compare")
    args.out = args.out or Path("out") / "-".join(filter(None, name))
    args.fit = args.out.parent / f"{args.input.stem}-{args.mode}"
    with viewer(args) as view:
        if args.fit_only or view and args.source is None and args.target is None:
            unedited(args, view)
        else:
            edits(args, view)


def viewer(args):
    """The Viewer that --view asks for, as a context; without it the context of None."""
    if args.view is None:
        return contextlib.nullcontext()
    if parallel.world() > 1:
        raise ValueError(f"--view shows the edit of one process, not of {parallel.world()}")
    view = Viewer(args.view, args.view_host)
    print(f"view: http://{args.view_host}:{args.view}", flush=True)
    return view


def unedited(args, view):
    """A fit or an earlier result without an edit: its figures with --fit-only, in the browser with --view."""
    scene = fit(args)
    if args.fit_only:
        psnr, views = evaluate(scene, scene.scene)
        done = "" if args.fitted else ", {steps} steps, {seconds:.1f} s".format(**scene.fitted)
        print("\n".join([f"test PSNR {psnr:.1f} dB, {views} views{done}", *fit_report(scene, scene.scene)]))
        if parallel.rank() == 0:
            titles = ("photographs", "the fit", "its depth")
            rows = [(title, "", [thumbnail(to_pil(picture), sheets.SIDE_SIZE) for picture in row])
                    for title, row in zip(titles, fit_pictures(scene, scene.scene), strict=True)]
            args.out.mkdir(parents=True, exist_ok=True)
            write(args.out / "fit.png", sheet(rows))
            print(f"done: {args.out / 'fit.png'}")
    if view:
        view.show(scene, edited=False)
        view.stay("Drag to rotate, scroll to zoom, drag with the right button to pan.", always=True)


def edits(args, view):
    """One edit, or those that --compare names with their common sheet."""
    check_prompts(args)
    check_writable(args.out)
    prior = load_prior(args)
    for name in args.losses:  # their errors come before a fit
        complete(args, prior, name)
        editor_of(name, args, prior)
    if args.compare is None:
        run_one(prior, args.loss, args, args.out, view)
    else:
        pairs = {name: run_one(prior, name, args, args.out / name, view) for name in args.losses}
        rows = [("source", args.source, pairs[args.losses[0]][0])]
        if parallel.rank():
            return
        write(args.out / "sheet.png", sheet(rows + [(TITLES[n], args.target, pairs[n][1]) for n in pairs]))
    if parallel.rank() == 0:
        print(f"done: {args.out / 'sheet.png'}", flush=True)
    if view:
        view.stay(f"The edit is done: see `{args.out}`.")


def main(argv=None):
    """Run a command line; returns the exit code."""
    args = parse(argv)
    warnings.showwarning = lambda message, *_, **__: parallel.rank() or print(
        f"warning: {one_line(message)}", file=sys.stderr)
    if args.mode == "toy":
        return exit_code("run.py", lambda: toy.main(["--out", str(args.out or "out"), "--seed", str(args.seed)]))
    try:
        return exit_code("run.py", lambda: work(args))
    finally:
        parallel.stop()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
