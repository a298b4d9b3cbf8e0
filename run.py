"""Edit an SVG, a picture, a NeRF or 3D Gaussians towards a prompt with Posterior Distillation Sampling, or a rival.

    python run.py --mode svg                                  # the shipped example
    python run.py --mode svg --svg cat.svg --source "a cat face" --target "a dog face" --compare
    python run.py --mode image --image cat.png --source "a cat face" --target "a dog face"
    python run.py --mode toy                                  # SDS, DDS and PDS in the plane
    python run.py --mode nerf --scene examples/apple --source "red apple" --target "green apple"
    python run.py --mode splat                                # the same scene as 3D Gaussians
    python run.py --mode nerf --compare in2n inv2n sds dds pds            # the paper's Figure 1: every method
    python run.py --mode image --loss in2n                    # an editor of pictures alone
    python run.py --mode bench --compare sds dds pds          # one table over every edit of examples/edits.txt
    python run.py --mode nerf --scene DIR --fit-only --fit-seconds 60     # fit, and measure the test views

The output folder gets source.*, result.*, progress.gif, sheet.png (before and after, labelled; of a scene from several
sides) and config.json; of a scene also turntable.gif and depth.png, with --export every view as nerfstudio reads it.
"""
import argparse
import copy
import functools
import hashlib
import json
import math
import signal
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import pds
import toy
from edit2d import ddpm_inversion, diffedit_mask, instruct_pix2pix, sdedit
from nerf import NeRF, depth_picture, evaluate, export, input_path, load_scene, sides, turntable
from prior import InstructPix2Pix, Prior
from splat import Splats
from svg_raster import SVG

HERE = Path(__file__).resolve().parent
LOSSES = {"sds": pds.sds_loss, "dds": pds.dds_loss, "pds": pds.pds_loss}
Editor = namedtuple("Editor", "title guidance skip skips")  # share of its steps left out: alone, drawn in an update
EDITORS = {"sdedit": Editor("SDEdit", 15.0, 0.4, (0.8, 0.9)), "inv2n": Editor("Inv2N", 15.0, 0.36, (0.36, 0.36)),
           "in2n": Editor("IN2N", 7.5, 0.0, (0.02, 0.98))}
TITLES = {name: name.upper() for name in LOSSES} | {name: editor.title for name, editor in EDITORS.items()}
COEFFICIENTS = {"official": "official", "consistent": "consistent", "dreamcatalyst": pds.dreamcatalyst}
EXAMPLE = {"svg": ("smiling-face.svg", "slightly smiling face", "smiling face with sunglasses"),
           "image": ("red-apple.png", "red apple", "green apple"),
           "nerf": ("apple", "red apple", "green apple"), "splat": ("apple", "red apple", "green apple")}
FRAMES, FRAME_SIZE, SHEET_SIZE = 40, 192, 512  # of progress.gif, of sheet.png
VIEWS, SIDES, SIDE_SIZE = 24, 5, 256  # of turntable.gif, of a scene's sheet.png


# ---- what can be edited -------------------------------------------------------------------------------
# A representation has param_groups() for Adam, sample_view(), render(view) -> [1,3,H,W] in [0,1], project_()
# after a step, save(path), and is a torch.nn.Module, so that its state can be kept. SVG is in svg_raster.py.
# A loader returns it with its parameter groups and with the source, whose render(view) is the picture before.

class Picture(torch.nn.Module):
    """A square picture; theta is its latent, drawn by the prior's decoder, or with `pixels` the pixels themselves."""

    def __init__(self, pixels, prior, in_pixels=False):
        """pixels: [1,3,S,S] in [0,1]."""
        super().__init__()
        with torch.no_grad():
            theta = pixels.clone() if in_pixels else prior.encode(pixels)
        self.theta = torch.nn.Parameter(theta.to(prior.device))
        self.draw = (lambda theta: theta) if in_pixels else prior.decode
        self.in_pixels = in_pixels

    def __deepcopy__(self, memo):
        twin = copy.copy(self)
        twin._parameters = {"theta": torch.nn.Parameter(self.theta.detach().clone())}
        return twin

    def param_groups(self, rate):
        return [{"name": "theta", "params": [self.theta], "lr": rate}]

    def sample_view(self, generator=None):
        return None

    def render(self, view=None, size=None):
        picture = self.draw(self.theta)
        if size is not None and size != picture.shape[-1]:
            picture = torch.nn.functional.interpolate(picture, size=(size, size), mode="bicubic").clamp(0, 1)
        return picture

    @torch.no_grad()
    def project_(self):
        if self.in_pixels:
            self.theta.clamp_(0, 1)

    def put(self, pixels):
        """Show these pixels [1,3,S,S] from now on."""
        self.theta, self.draw, self.in_pixels = torch.nn.Parameter(pixels), lambda theta: theta, True

    @torch.no_grad()
    def save(self, path):
        write(Path(path), to_pil(self.render()))


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
    """The scene as NeRF or splats; its fit is kept beside the output, so that a second edit starts at once."""
    scene = load_scene(args.input, args.downscale)
    args.fit.parent.mkdir(parents=True, exist_ok=True)
    return FITTED[args.mode].fit(scene, args.fit_seconds, checkpoint=args.fit, device=args.device)


def load_nerf(args, prior):
    nerf = fit(args)
    nerf.learn_from(prior.size)
    return nerf, nerf.param_groups(args.table), Photographs(nerf)


def load_splat(args, prior):
    splats = fit(args)
    # an edit must not move in hundreds of steps what a fit moves in tens of thousands: a fifth of its rates
    groups = splats.param_groups(means=3e-5, log_scales=1e-3, quaternions=2e-4, opacities=1e-2, sh_dc=args.colours)
    return splats, groups, Photographs(splats)


LOAD = {"svg": load_svg, "image": load_image, "nerf": load_nerf, "splat": load_splat}
SUFFIX = {"svg": ".svg", "image": ".png", "nerf": ".safetensors", "splat": ".ply"}  # of what save() writes
HOLD = {"svg": 1, "image": 1, "nerf": 10, "splat": 10}  # steps that a view is kept, as in the paper
REFIT = {"nerf": 1, "splat": 4}  # a dataset update is a fit: times the rates of an edit
FITTED = {"nerf": NeRF, "splat": Splats}  # modes with a scene of many views
EDITABLE = ("image", *FITTED)  # modes with pictures, which EDITORS need
AROUND = {"turntable": turntable, "input": input_path}  # ways of its animation


# ---- the two stages -----------------------------------------------------------------------------------

class Distillation:
    """The edit: one of the three losses, at a view that is kept for HOLD steps."""

    def __init__(self, scene, source, prior, name, guidance, args):
        self.scene, self.source, self.prior, self.args = scene, source, prior, args
        self.name, self.steps, self.guidance, self.rate = name, args.steps, guidance, 1
        self.options = dict(stride=args.stride, coefficients=COEFFICIENTS[args.coefficients]) if name == "pds" else {}
        self.y_src, self.y_tgt = prior.embed(args.source), prior.embed(args.target)
        self.state, self.x0_src = {"view": None}, None

    def loss(self, step, generator):
        prior, args = self.prior, self.args
        if step % HOLD[args.mode] == 0:
            self.state["view"], self.x0_src = self.scene.sample_view(generator), None
        view = self.state["view"]
        if self.x0_src is None:
            with torch.no_grad():
                self.x0_src = prior.encode(self.source.render(view, prior.size))
        shake = {"generator": generator} if args.mode in FITTED else {}  # an SVG's view has its shift in it
        x0_tgt = prior.encode(self.scene.render(view, prior.size, **shake))
        progress = step / self.steps if args.schedule == "decreasing" else None
        t = pds.sample_timesteps(1, len(prior.abar), args.t_min, args.t_max, progress, generator)
        return LOSSES[self.name](prior, x0_tgt, self.x0_src, self.y_tgt, self.y_src, t, generator=generator,
                                 **self.options)


@functools.cache
def load_editor(model, device, size):
    """The InstructPix2Pix of a folder or hub id, which has to be made for pictures of `size` pixels."""
    editor = InstructPix2Pix.from_pretrained(model, device)
    if editor.size != size:
        raise ValueError(f"{model}: made for {editor.size} pixels, the prior for {size}")
    return editor


class DatasetUpdate:
    """Iterative dataset update (Instruct-NeRF2NeRF, arXiv 2303.12789), for scenes: every 10 steps one of the pictures
    is replaced by its edit, while the scene goes on fitting all of them.

    name: the editor. "sdedit" (the paper's second stage, --refine) sees the scene's render alone, "inv2n" and "in2n"
    start from the render and are held by the photograph.
    """
    EVERY, STEPS = 10, 20

    def __init__(self, scene, source, prior, name, steps, guidance, args):
        self.scene, self.source, self.prior, self.name, self.steps, self.args = scene, source, prior, name, steps, args
        self.guidance, self.rate = guidance, REFIT.get(args.mode, 1)
        self.y_src, self.y_tgt = prior.embed(args.source), prior.embed(args.target)
        self.dataset, self.state = None, {"pixels": None, "edited": [], "order": []}
        if name == "in2n":
            self.editor = load_editor(args.instruct or args.model, args.device, prior.size)
            self.editor.guidance, self.editor.image_guidance = self.guidance, args.image_guidance
            self.y_edit = self.editor.embed(args.instruction or f"make it a {args.target}")

    @torch.no_grad()
    def edited(self, render, photograph, skip, generator):
        """The picture [1,3,S,S] that the editor makes of a render and its photograph, both [1,3,S,S]."""
        model = self.editor if self.name == "in2n" else self.prior
        x0 = model.encode(render)
        if self.name == "sdedit":
            x0 = sdedit(model, x0, self.y_tgt, self.STEPS, skip, generator)
        elif self.name == "inv2n":
            x0 = ddpm_inversion(model, model.encode(photograph), self.y_tgt, self.y_src, skip=skip, start=x0,
                                steps=model.defaults.get("inversion_steps", 100), guidance_tgt=self.guidance,
                                generator=generator)
        else:
            x0 = instruct_pix2pix(model, photograph, self.y_edit, x0, self.STEPS, skip, generator)
        return model.decode(x0)

    def open(self):
        """The scene's pictures, as they are when the stage begins."""
        if self.dataset is None:
            self.dataset = self.scene.dataset(self.prior.size)
            if self.state["pixels"] is not None:  # a resumed run
                self.dataset.pixels.copy_(self.state["pixels"])
            self.state["pixels"] = self.dataset.pixels
        return self.dataset

    def loss(self, step, generator):
        dataset = self.open()
        if step % self.EVERY == 0:
            if not self.state["order"]:  # every view in turn, in an order of chance
                self.state["order"] = torch.randperm(len(dataset.cameras), generator=generator).tolist()
            view, size, (low, high) = self.state["order"].pop(), self.prior.size, EDITORS[self.name].skips
            skip = low + (high - low) * torch.rand((), generator=generator).item()
            with torch.no_grad():
                render, photograph = (x.render(view, size) for x in (self.scene, self.source))
            dataset.replace(view, self.edited(render, photograph, skip, generator))
            self.state["edited"] = [v for v in self.state["edited"] if v != view] + [view]
        return self.scene.data_loss(dataset, generator)

    def pictures(self, count=SIDES):
        """Of the views edited last, as rows of a sheet: photographs, their edits in two dimensions, the scene."""
        views, size = sorted(self.state["edited"][-count:]), self.prior.size
        look = lambda render: [to_pil(render(view)).resize((SIDE_SIZE, SIDE_SIZE), Image.BICUBIC) for view in views]
        with torch.no_grad():
            return [("photographs", self.args.source, look(lambda view: self.source.render(view, size))),
                    (f"{TITLES[self.name]} of each", self.args.target, look(self.open().picture)),
                    ("the scene", self.args.target, look(lambda view: self.scene.render(view, size)))]


def stages_of(scene, source, prior, name, args):
    """The edit by a loss or an editor and, with --refine, the paper's second stage."""
    guidance = guidance_of(prior, name, args.guidance)
    stages = [Distillation(scene, source, prior, name, guidance, args) if name in LOSSES else
              DatasetUpdate(scene, source, prior, name, args.steps, guidance, args)]
    if args.refine:
        stages.append(DatasetUpdate(scene, source, prior, "sdedit", args.refine, guidance_of(prior, "sdedit"), args))
    return stages


def guidance_of(prior, name, wanted=None):
    """`wanted`, else what suits the model, else the editor's own."""
    own = prior.defaults["guidance"].get(name)
    return wanted if wanted is not None else EDITORS[name].guidance if own is None else own


# ---- the one loop -------------------------------------------------------------------------------------

def edit(scene, groups, stages, prior, args, out):
    """Optimise the scene with Adam, one stage after the other.

    A checkpoint is written every args.every steps and at Ctrl-C; a run resumed from it takes the very steps that
    the unbroken run would have taken.

    Returns:
        The frames of its way, a list of PIL pictures, and whether Ctrl-C ended it.
    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    optimiser = torch.optim.Adam(groups)
    rates = [group["lr"] for group in groups]
    generator = torch.Generator().manual_seed(args.seed)
    start, frames, checkpoint = 0, [snapshot(scene)], out / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint)
        scene.load_state_dict(state["scene"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        for stage, own in zip(stages, state["stages"]):
            stage.state = own
        start, frames = state["step"], [Image.fromarray(f.numpy()) for f in state["frames"]]

    def keep(step):
        pixels = [torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8).reshape(f.height, f.width, 3)
                  for f in frames]
        write(checkpoint, dict(scene=scene.state_dict(), optimiser=optimiser.state_dict(),
                               generator=generator.get_state(), step=step, stages=[s.state for s in stages],
                               frames=pixels))

    plan = [(stage, at) for stage in stages for at in range(stage.steps)]
    with DelayedInterrupt() as interrupt, tqdm(total=len(plan), initial=start, unit="step") as bar:
        for step, (stage, at) in enumerate(plan[start:], start):
            prior.guidance = stage.guidance
            loss = stage.loss(at, generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{stage.name}: the loss is {loss.item()} at step {step}; lower the rates")
            for group, rate in zip(optimiser.param_groups, rates):
                # a short warm-up, as Adam's first steps know little; the second half settles what is noise
                group["lr"] = stage.rate * rate * min(1.0, (at + 1) / 10, 2 - 2 * at / stage.steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            scene.project_()
            bar.update()
            bar.set_description(stage.name, refresh=False)
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            if (step + 1) * FRAMES // len(plan) > step * FRAMES // len(plan):
                frames.append(snapshot(scene))
            if (step + 1) % args.every == 0 or step + 1 == len(plan) or interrupt.seen:
                keep(step + 1)
            if interrupt.seen:
                break
    return frames, interrupt.seen


class DelayedInterrupt:
    """Ctrl-C inside sets .seen, so that a step is never torn apart; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.seen, self.before = False, None
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.seen = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        if self.before:
            signal.signal(signal.SIGINT, self.before)


# ---- pictures and files -------------------------------------------------------------------------------

def to_pil(picture):
    """[1,3,H,W] in [0,1] -> PIL picture."""
    return Image.fromarray((picture[0].detach().permute(1, 2, 0) * 255).round().byte().cpu().numpy())


def snapshot(scene, size=None, view=None):
    with torch.no_grad():
        return to_pil(scene.render(view, size or FRAME_SIZE))


def beside(pictures):
    """Pictures of one size in a row."""
    page = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        page.paste(picture, (i * picture.width, 0))
    return page


def write(path, what):
    """Write a picture, the frames of an animation, text, bytes or a checkpoint; never leaves half a file."""
    part = path.with_name(f".{path.name}.part")
    if isinstance(what, Image.Image):
        what.save(part, format="PNG")
    elif isinstance(what, list):
        what[0].save(part, format="GIF", save_all=True, append_images=what[1:] + what[-1:] * 15, duration=80, loop=0)
    elif isinstance(what, (str, bytes)):
        part.write_bytes(what.encode() if isinstance(what, str) else what)
    else:
        torch.save(what, part)
    part.replace(path)


def sheet(rows):
    """Rows of (title, prompt, [pictures of several views]) as one labelled page.

    With one view each, they stand side by side with their titles below; with more, each row is one under another.
    """
    side, pad, text = rows[0][2][0].width, 16, 56
    fonts = [ImageFont.load_default(size) for size in (18, 14)]
    several = len(rows[0][2]) > 1
    wide, high = (len(rows[0][2]), len(rows)) if several else (len(rows), 1)
    page = Image.new("RGB", (wide * (side + pad) + pad, high * (side + text + pad) + pad), "white")
    draw = ImageDraw.Draw(page)
    for i, (title, prompt, pictures) in enumerate(rows):
        x, y = (pad, pad + i * (side + text + pad)) if several else (pad + i * (side + pad), pad)
        for k, picture in enumerate(pictures):
            page.paste(picture, (x + k * (side + pad), y))
        middle, room = (page.width / 2, page.width) if several else (x + side / 2, side)
        draw.text((middle, y + side + 14), title, fill="black", font=fonts[0], anchor="mm")
        draw.text((middle, y + side + 38), prompt[:room // 7], fill="#555", font=fonts[1], anchor="mm")
    return page


def run_one(prior, name, args, out):
    """One edit, by a loss or an editor, with its files in `out`; returns the pictures before and after, a list of each.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when what was there has been written.
        ValueError, OSError: bad input; nothing has been written then.
    """
    scene, groups, source = LOAD[args.mode](args, prior)
    around = args.mode in FITTED
    turn = AROUND[args.path](scene, VIEWS, FRAME_SIZE) if around else []
    views = sides(scene, SIDES, SIDE_SIZE) if around else [None]
    look = lambda: [snapshot(scene, SIDE_SIZE if around else SHEET_SIZE, view) for view in views]
    before, turned = look(), [snapshot(scene, view=camera) for camera in turn]
    stages, masks = stages_of(scene, source, prior, name, args), subject_masks(scene, views, prior, args)
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
        frames, interrupted = [to_pil(source.render(None, FRAME_SIZE)), snapshot(scene)], False
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


@torch.no_grad()
def subject_masks(scene, views, prior, args):
    """What the edit is about: for each view [1,1,H,W] bool, where the two prompts disagree and a latent pixel around."""
    prior.guidance, generator, masks = 1.0, torch.Generator().manual_seed(0), []
    for view in views:
        x0 = prior.encode(scene.render(view, prior.size))
        mask = diffedit_mask(prior, x0, prior.embed(args.target), prior.embed(args.source), generator=generator)
        masks.append(torch.nn.functional.max_pool2d(mask.float(), 3, 1, 1) > 0)
    return masks


def outside(before, after, masks):
    """One line: what changed outside of the masks, as PSNR in dB over all views."""
    error, count, pixels = 0.0, 0, 0
    for a, b, mask in zip(before, after, masks):
        a, b = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).reshape(p.height, p.width, 3).double() / 255
                for p in (a, b))
        rest = ~(torch.nn.functional.interpolate(mask.float(), size=a.shape[:2])[0, 0] > 0).cpu()
        error, count = error + (a - b)[rest].square().sum().item(), count + 3 * rest.sum().item()
        pixels += rest.numel()
    psnr = f"PSNR {-10 * math.log10(error / count + 1e-10):.1f} dB against the source" if count else "nothing"
    return f"outside the subject, {100 * count / 3 / pixels:.0f} % of the picture: {psnr}"


def settings(args, prior, name):
    """Everything that a result depends on, for config.json."""
    skip = {"out", "resume", "compare", "losses", "clip", "every", "device", "fit", "fit_only", "export", "path"}
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
    a("--mode", choices=[*LOAD, "toy", "bench"], default="svg",
      help="what is edited; toy: the method in the plane; bench: every edit of examples/edits.txt (default: svg)")
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
    a("--clip", help="bench: CLIP directory or hub id, for its score and its directional score")
    a("--pixels", action="store_true", help="image: optimise the pixels instead of the latent")
    a("--latent", type=rate, default=0.02, help="image: rate of the latent (default: 0.02)")
    a("--fit-seconds", type=rate, default=60.0, help="scenes: time of the fit, process CPU time on a CPU (default: 60)")
    a("--fit-only", action="store_true", help="scenes: fit, print the PSNR of the test views, and stop")
    a("--downscale", type=number(int, 1), default=1, help="scenes: reduce the photographs by this factor (default: 1)")
    a("--table", type=rate, default=0.01, help="nerf: rate of the hash grid (default: 0.01)")
    a("--refine", type=number(int, 0), default=0, metavar="N", help="scenes: N steps of the refining stage (default: 0)")
    a("--path", choices=AROUND, default="turntable", help="scenes: way of turntable.gif (default: turntable)")
    a("--export", action="store_true", help="scenes: write every view, its depth, and a transforms.json")
    args = p.parse_args(argv)
    for flag in ("fit_only", "refine", "export"):
        if getattr(args, flag) and args.mode not in FITTED:
            p.error(f"--{flag.replace('_', '-')}: only with --mode nerf and splat")
    several = list(dict.fromkeys(args.compare or LOSSES))
    args.losses = [args.loss] if args.compare is None and args.mode != "bench" else several
    editors = [name for name in args.losses if name in EDITORS]
    if editors and args.mode not in (*EDITABLE, "bench"):
        p.error(f"{editors[0]} edits pictures: only with --mode image, nerf and splat")
    return args


def number(kind, low, high=None):
    """argparse type: a number in [low, high]."""
    def convert(text):
        value = kind(text)
        if not (low <= value and (high is None or value <= high)) or value in (float("inf"),):
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. {'' if high is None else high}")
        return value
    convert.__name__ = kind.__name__
    return convert


def complete(args, prior):
    """Fill in what depends on the model, and check what belongs together."""
    prior.defaults = prior.defaults | prior.defaults.get(args.mode, {})
    args.steps = args.steps or prior.defaults.get("steps", 1000)
    args.points = args.points if args.points is not None else prior.defaults.get("points", 0.8)
    lowest = pds.sample_timesteps(1, len(prior.abar), args.t_min, args.t_max, progress=1.0).item()
    if lowest < args.stride:
        raise ValueError(f"--stride {args.stride} is longer than the lowest timestep, {lowest}: raise --t-min")


def work(args):
    """What main does, with its errors."""
    if args.input is None:
        name, source, target = EXAMPLE[args.mode]
        args.input = HERE / "examples" / name
        args.source = source if args.source is None else args.source
        args.target = target if args.target is None else args.target
    if not args.input.exists() or args.input.is_dir() and args.mode not in FITTED:
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
        load_editor(args.instruct or args.model, args.device, prior.size)  # what is wrong with it is said before a fit
    if args.compare is None:
        run_one(prior, args.loss, args, args.out)
    else:
        pairs = {name: run_one(prior, name, args, args.out / name) for name in args.losses}
        rows = [("source", args.source, pairs[args.losses[0]][0])]
        write(args.out / "sheet.png", sheet(rows + [(TITLES[n], args.target, pairs[n][1]) for n in pairs]))
    print(f"done: {args.out / 'sheet.png'}")


def exit_code(program, call):
    """Of call(): what it returns, or 130 after Ctrl-C, 2 and one line for bad input, 1 for a loss that is not finite."""
    try:
        return call() or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as e:
        print(f"{program}: error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"{program}: {e}", file=sys.stderr)
        return 1


def main(argv=None):
    args = parse(argv)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if args.mode == "toy":
        return toy.main(["--out", str(args.out or "out"), "--seed", str(args.seed)])
    if args.mode == "bench":
        import bench  # it imports this file
        return bench.main(["edits", "--losses", *args.losses, "--model", args.model, "--seed", str(args.seed),
                           "--fit-seconds", str(args.fit_seconds), "--out", str(args.out or "out/edits"),
                           *(["--clip", args.clip] if args.clip else []),
                           *(["--steps", str(args.steps)] if args.steps else [])])
    return exit_code("run.py", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
