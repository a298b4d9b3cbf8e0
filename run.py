"""Edit an SVG, a picture or a NeRF towards a prompt with Posterior Distillation Sampling, or with SDS and DDS.

    python run.py --mode svg                                  # the shipped example
    python run.py --mode svg --svg cat.svg --source "a cat face" --target "a dog face" --compare
    python run.py --mode image --image cat.png --source "a cat face" --target "a dog face"
    python run.py --mode nerf --scene examples/apple --source "red apple" --target "green apple"
    python run.py --mode nerf --scene DIR --fit-only --fit-seconds 60     # fit, and measure the test views

The output folder gets source.*, result.*, progress.gif, sheet.png (before and after, labelled) and config.json; of a
NeRF also turntable.gif and views.png, before and after from several sides.
"""
import argparse
import copy
import hashlib
import json
import signal
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import pds
from nerf import NeRF, evaluate, load_scene, turntable
from prior import Prior
from svg_raster import SVG

HERE = Path(__file__).resolve().parent
LOSSES = {"sds": pds.sds_loss, "dds": pds.dds_loss, "pds": pds.pds_loss}
COEFFICIENTS = {"official": "official", "consistent": "consistent", "dreamcatalyst": pds.dreamcatalyst}
EXAMPLE = {"svg": ("smiling-face.svg", "slightly smiling face", "smiling face with sunglasses"),
           "image": ("red-apple.png", "red apple", "green apple"),
           "nerf": ("apple", "red apple", "green apple")}
FRAMES, FRAME_SIZE, SHEET_SIZE, VIEWS = 40, 192, 512, 24  # of progress.gif, of sheet.png, views of turntable.gif


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
    """What a NeRF is edited from: its scene's own pictures."""

    def __init__(self, nerf):
        self.render = nerf.photograph


def fit(args):
    """The NeRF of the scene; its fit is kept beside the output, so that a second edit starts at once."""
    scene = load_scene(args.input, args.downscale)
    args.fit.parent.mkdir(parents=True, exist_ok=True)
    return NeRF.fit(scene, args.fit_seconds, checkpoint=args.fit, device=args.device)


def load_nerf(args, prior):
    nerf = fit(args)
    return nerf, nerf.param_groups(args.table), Photographs(nerf)


LOAD = {"svg": load_svg, "image": load_image, "nerf": load_nerf}
SUFFIX = {"svg": ".svg", "image": ".png", "nerf": ".safetensors"}  # of what save() writes
HOLD = {"svg": 1, "image": 1, "nerf": 10}  # steps that a view is kept, as in the paper
AROUND = {"nerf": turntable}  # what can be seen from more than one side


# ---- the one loop -------------------------------------------------------------------------------------

def edit(scene, groups, source, prior, loss_name, args, out):
    """Optimise the scene for args.steps steps of Adam; source.render(view) is what it looked like.

    A checkpoint is written every args.every steps and at Ctrl-C; a run resumed from it takes the very steps that
    the unbroken run would have taken.

    Returns:
        The frames of its way, a list of PIL pictures, and whether Ctrl-C ended it.
    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    y_src, y_tgt = prior.embed(args.source), prior.embed(args.target)
    prior.guidance = args.guidance if args.guidance is not None else prior.defaults["guidance"][loss_name]
    options = {"stride": args.stride, "coefficients": COEFFICIENTS[args.coefficients]} if loss_name == "pds" else {}
    optimiser = torch.optim.Adam(groups)
    rates = [group["lr"] for group in groups]
    generator = torch.Generator().manual_seed(args.seed)
    start, frames, checkpoint, view, x0_src = 0, [snapshot(scene)], out / "checkpoint.pt", None, None
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint)
        scene.load_state_dict(state["scene"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        start, view, frames = state["step"], state["view"], [Image.fromarray(f.numpy()) for f in state["frames"]]

    def keep(step):
        pixels = [torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8).reshape(f.height, f.width, 3)
                  for f in frames]
        write(checkpoint, dict(scene=scene.state_dict(), optimiser=optimiser.state_dict(),
                               generator=generator.get_state(), step=step, view=view, frames=pixels))

    with DelayedInterrupt() as interrupt, tqdm(total=args.steps, initial=start, desc=loss_name, unit="step") as bar:
        for step in range(start, args.steps):
            if step % HOLD[args.mode] == 0:
                view, x0_src = scene.sample_view(generator), None
            if x0_src is None:
                with torch.no_grad():
                    x0_src = prior.encode(source.render(view, prior.size))
            x0_tgt = prior.encode(scene.render(view, prior.size))
            progress = step / args.steps if args.schedule == "decreasing" else None
            t = pds.sample_timesteps(1, len(prior.abar), args.t_min, args.t_max, progress, generator)
            loss = LOSSES[loss_name](prior, x0_tgt, x0_src, y_tgt, y_src, t, generator=generator, **options)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{loss_name}: the loss is {loss.item()} at step {step}; lower the rates")
            for group, rate in zip(optimiser.param_groups, rates):
                group["lr"] = rate * min(1.0, 2 - 2 * step / args.steps)  # the second half settles what is noise
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            scene.project_()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            if (step + 1) * FRAMES // args.steps > step * FRAMES // args.steps:
                frames.append(snapshot(scene))
            if (step + 1) % args.every == 0 or step + 1 == args.steps or interrupt.seen:
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


def sheet(pictures, captions):
    """Pictures side by side, each with a title and a prompt under it."""
    side, pad, text = pictures[0].width, 16, 56
    page = Image.new("RGB", (len(pictures) * (side + pad) + pad, side + 2 * pad + text), "white")
    draw, fonts = ImageDraw.Draw(page), [ImageFont.load_default(size) for size in (18, 14)]
    for i, (picture, (title, prompt)) in enumerate(zip(pictures, captions)):
        x = pad + i * (side + pad)
        page.paste(picture, (x, pad))
        draw.text((x + side / 2, pad + side + 14), title, fill="black", font=fonts[0], anchor="mm")
        draw.text((x + side / 2, pad + side + 38), prompt[:side // 7], fill="#555", font=fonts[1], anchor="mm")
    return page


def run_one(prior, loss_name, args, out):
    """One edit with its files in `out`; returns the pictures before and after.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when what was there has been written.
        ValueError, OSError: bad input; nothing has been written then.
    """
    scene, groups, source = LOAD[args.mode](args, prior)
    cameras = AROUND[args.mode](scene, VIEWS, FRAME_SIZE) if args.mode in AROUND else []
    before, turn = snapshot(scene, SHEET_SIZE), [snapshot(scene, view=camera) for camera in cameras]
    out.mkdir(parents=True, exist_ok=True)
    config = settings(args, prior, loss_name)
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
    write(out / "source.png", before)
    frames, interrupted = edit(scene, groups, source, prior, loss_name, args, out)
    after = snapshot(scene, SHEET_SIZE)
    write(out / "result.png", after)
    scene.save(out / f"result{SUFFIX[args.mode]}")
    write(out / "progress.gif", frames)
    write(out / "sheet.png", sheet([before, after], [("source", args.source), (loss_name.upper(), args.target)]))
    if turn:
        pairs = [beside([a, snapshot(scene, view=camera)]) for a, camera in zip(turn, cameras)]
        write(out / "turntable.gif", pairs)
        write(out / "views.png", beside(pairs[::6]))
    if interrupted:
        print(f"interrupted: what is there is in {out}; the same command with --resume goes on", file=sys.stderr)
        raise KeyboardInterrupt
    return before, after


def settings(args, prior, loss_name):
    """Everything that a result depends on, for config.json."""
    skip = {"out", "resume", "compare", "every", "device", "fit", "fit_only"}
    files = [args.input] if args.input.is_file() else sorted(p for p in args.input.rglob("*") if p.is_file())
    content = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in skip}
    guidance = args.guidance if args.guidance is not None else prior.defaults["guidance"][loss_name]
    config |= {"loss": loss_name, "guidance": guidance, "size": prior.size, "device": str(prior.device),
               "sha256": content, "versions": {"torch": torch.__version__}}
    return config


# ---- command line -------------------------------------------------------------------------------------

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    positive, share = number(int, 1), number(float, 0, 1)
    rate = number(float, 0)
    a("--mode", choices=LOAD, default="svg", help="what is edited (default: svg)")
    a("--svg", "--image", "--scene", dest="input", type=Path,
      help="the file, or folder with a transforms.json, to edit (default: a shipped example)")
    a("--source", help="prompt that describes the file")
    a("--target", help="prompt that describes the edit")
    a("--loss", choices=LOSSES, default="pds", help="the method (default: pds)")
    a("--compare", action="store_true", help="run SDS, DDS and PDS from one seed and lay them side by side")
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
    a("--pixels", action="store_true", help="image: optimise the pixels instead of the latent")
    a("--latent", type=rate, default=0.02, help="image: rate of the latent (default: 0.02)")
    a("--fit-seconds", type=rate, default=60.0, help="nerf: time of the fit, process CPU time on a CPU (default: 60)")
    a("--fit-only", action="store_true", help="nerf: fit, print the PSNR of the test views, and stop")
    a("--downscale", type=number(int, 1), default=1, help="nerf: reduce the photographs by this factor (default: 1)")
    a("--table", type=rate, default=0.01, help="nerf: rate of the hash grid (default: 0.01)")
    args = p.parse_args(argv)
    if args.fit_only and args.mode != "nerf":
        p.error("--fit-only: only with --mode nerf")
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
    args.steps = args.steps or prior.defaults.get("steps", 1000)
    args.points = args.points if args.points is not None else prior.defaults.get("points", 0.8)
    lowest = pds.sample_timesteps(1, len(prior.abar), args.t_min, args.t_max, progress=1.0).item()
    if lowest < args.stride:
        raise ValueError(f"--stride {args.stride} is longer than the lowest timestep, {lowest}: raise --t-min")


def main(argv=None):
    args = parse(argv)
    try:
        if args.input is None:
            name, source, target = EXAMPLE[args.mode]
            args.input = HERE / "examples" / name
            args.source = source if args.source is None else args.source
            args.target = target if args.target is None else args.target
        if not args.input.exists() or args.input.is_dir() and args.mode not in AROUND:
            raise ValueError(f"{args.input}: no such file")
        name = f"{args.input.stem}-{'compare' if args.compare else args.loss}"
        args.out = args.out or Path("out") / name
        args.fit = args.out.parent / f"{args.input.stem}-fit.pt"
        if args.fit_only:
            nerf = fit(args)
            psnr, views = evaluate(nerf, nerf.scene)
            done = nerf.fitted
            print(f"test PSNR {psnr:.1f} dB, {views} views, {done['steps']} steps, {done['seconds']:.1f} s")
            return 0
        for prompt in ("source", "target"):
            if not (getattr(args, prompt) or "").strip():
                raise ValueError(f"--{prompt} is missing or empty: say in a few words what the {prompt} shows")
        prior = Prior.from_pretrained(args.model, args.device)
        complete(args, prior)
        if not args.compare:
            run_one(prior, args.loss, args, args.out)
        else:
            pairs = {name: run_one(prior, name, args, args.out / name) for name in LOSSES}
            before = pairs["pds"][0]
            write(args.out / "sheet.png", sheet([before] + [after for _, after in pairs.values()],
                                                [("source", args.source)] + [(n.upper(), args.target) for n in pairs]))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as e:
        print(f"run.py: error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"run.py: {e}", file=sys.stderr)
        return 1
    print(f"done: {args.out / 'sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
