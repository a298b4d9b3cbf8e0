"""What an edit is: the losses and the editors by name, the stages of an edit, and the one loop that runs them.

    stages = stages_of(scene, source, prior, "pds", args)
    frames, interrupted = edit(scene, groups, stages, prior, args, out)

A scene is anything that can be edited: an SVG, a Picture, a NeRF, Splats. It is a torch.nn.Module, so that its state
can be kept, with sample_view(generator), render(view, size) -> [1,3,size,size] in [0,1], and project_() after a step;
`groups` are its parameter groups for Adam. The source, too, has render(view, size): the picture before.
"""
import json
import signal
from collections import namedtuple

import torch
from PIL import Image

import pds
import report
from checkpoint import CheckpointError, read_run, restore, restore_generator, restore_optimiser, restore_stages
from edit2d import ddpm_inversion, instruct_pix2pix, sdedit
from optimiser import SteadyAdam
from progress import progress as progress_bar
from report import snapshot, to_pil, write

MODES = ("svg", "image", "nerf", "splat")
SCENES = ("nerf", "splat")  # modes with many views
EDITABLE = ("image", *SCENES)  # modes with pictures, which EDITORS need
LOSSES = {"sds": pds.sds_loss, "dds": pds.dds_loss, "pds": pds.pds_loss}
Editor = namedtuple("Editor", "title guidance skip skips")  # skip: share of its steps left out; skips: in an update
EDITORS = {"sdedit": Editor("SDEdit", 15.0, 0.4, (0.8, 0.9)), "inv2n": Editor("Inv2N", 15.0, 0.36, (0.36, 0.36)),
           "in2n": Editor("IN2N", 7.5, 0.0, (0.02, 0.98))}
TITLES = {name: name.upper() for name in LOSSES} | {name: editor.title for name, editor in EDITORS.items()}
COEFFICIENTS = {"official": "official", "consistent": "consistent", "dreamcatalyst": pds.dreamcatalyst}
HOLD = {"svg": 1, "image": 1, "nerf": 10, "splat": 10}  # steps for which a view is kept, as in the paper
LEVELS, FINEST = 12, 0.25  # in so many levels the width of the smooth fields falls to this share
REFIT = {"nerf": 1, "splat": 4}  # a dataset update is a fit: its rates, as a multiple of those of an edit


# ---- the two stages -----------------------------------------------------------------------------------

class Distillation:
    """The edit: one of the three losses, at a view that is kept for HOLD steps."""

    def __init__(self, scene, source, prior, name, guidance, args, where=None):
        """where: the masks of the views, a masks.Where; None: the edit acts everywhere."""
        self.scene, self.source, self.prior, self.args, self.where = scene, source, prior, args, where
        self.name, self.steps, self.guidance, self.rate, self.options = name, args.steps, guidance, 1, {}
        if name == "pds":
            self.options = dict(stride=args.stride, coefficients=COEFFICIENTS[args.coefficients], identity=args.identity)
        self.y_src, self.y_tgt = prior.embed(args.source), prior.embed(args.target)
        self.state, self.x0_src = {"view": None}, None

    def loss(self, step, generator):
        prior, args = self.prior, self.args
        if step % HOLD[args.mode] == 0:
            last, self.state["view"] = self.state["view"], self.scene.sample_view(generator)
            if self.state["view"] != last:
                self.x0_src = None
        view = self.state["view"]
        if self.x0_src is None:
            with torch.no_grad():
                self.x0_src = prior.encode(self.source.render(view, prior.size))
        shake = {"generator": generator} if args.mode in SCENES else {}  # an SVG's view has its shift in it
        x0_tgt = prior.encode(self.scene.render(view, prior.size, **shake))
        progress = step / self.steps if args.schedule == "decreasing" else None
        t = pds.sample_timesteps(1, len(prior.abar), args.t_min, args.t_max, progress, generator)
        mask = self.where(view, x0_tgt, prior.size) if self.where else None
        return LOSSES[self.name](prior, x0_tgt, self.x0_src, self.y_tgt, self.y_src, t, mask=mask, generator=generator,
                                 **self.options)


class DatasetUpdate:
    """Iterative dataset update (Instruct-NeRF2NeRF, arXiv 2303.12789), for scenes: every 10 steps one of the pictures
    is replaced by its edit, while the scene keeps being fitted to all of them.

    name: the editor. "sdedit" (the paper's second stage, --refine) sees the scene's render alone; "inv2n" and "in2n"
    start from the render and are guided by the photograph. With a single picture, `edited` is the whole edit.
    """
    EVERY, STEPS = 10, 20

    def __init__(self, scene, source, prior, name, steps, guidance, args, editor=None):
        self.scene, self.source, self.prior, self.name, self.steps, self.args = scene, source, prior, name, steps, args
        self.guidance, self.rate = guidance, REFIT.get(args.mode, 1)
        self.y_src, self.y_tgt = prior.embed(args.source), prior.embed(args.target)
        self.dataset, self.state = None, {"pixels": None, "edited": [], "order": []}
        if name == "in2n":
            self.editor = editor
            editor.guidance, editor.image_guidance = self.guidance, args.image_guidance
            self.y_edit = editor.embed(args.instruction or f"make it a {args.target}")

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
            if not self.state["order"]:  # every view once, in random order
                self.state["order"] = torch.randperm(len(dataset.cameras), generator=generator).tolist()
            view, size, (low, high) = self.state["order"].pop(), self.prior.size, EDITORS[self.name].skips
            skip = low + (high - low) * torch.rand((), generator=generator).item()
            with torch.no_grad():
                render, photograph = (x.render(view, size) for x in (self.scene, self.source))
            dataset.replace(view, self.edited(render, photograph, skip, generator))
            self.state["edited"] = [v for v in self.state["edited"] if v != view] + [view]
        return self.scene.data_loss(dataset, generator)

    def pictures(self):
        """The views edited last, as the rows of a sheet: the photographs, their 2D edits, the scene."""
        views, size = sorted(self.state["edited"][-report.SIDES:]), self.prior.size
        shown = (report.SIDE_SIZE, report.SIDE_SIZE)
        look = lambda render: [to_pil(render(view)).resize(shown, Image.BICUBIC) for view in views]
        with torch.no_grad():
            return [("photographs", self.args.source, look(lambda view: self.source.render(view, size))),
                    (f"{TITLES[self.name]} of each", self.args.target, look(self.open().picture)),
                    ("the scene", self.args.target, look(lambda view: self.scene.render(view, size)))]


def stages_of(scene, source, prior, name, args, editor=None, where=None):
    """The edit by a loss or an editor and, with --refine, the paper's second stage.

    editor: the InstructPix2Pix of prior.py that "in2n" needs; where: see Distillation.
    """
    guidance = guidance_of(prior, name, args.guidance)
    stages = [Distillation(scene, source, prior, name, guidance, args, where) if name in LOSSES else
              DatasetUpdate(scene, source, prior, name, args.steps, guidance, args, editor)]
    if args.refine:
        stages.append(DatasetUpdate(scene, source, prior, "sdedit", args.refine, guidance_of(prior, "sdedit"), args))
    return stages


def guidance_of(prior, name, wanted=None):
    """`wanted`, else what suits the model, else the editor's own."""
    own = prior.defaults["guidance"].get(name)
    return wanted if wanted is not None else EDITORS[name].guidance if own is None else own


# ---- the one loop -------------------------------------------------------------------------------------

def edit(scene, groups, stages, prior, args, out, config=None):
    """Optimise the scene with Adam, one stage after the other.

    A checkpoint is written every args.every steps and at Ctrl-C; a run resumed from it takes exactly the steps that
    the uninterrupted run would have taken.

    Args:
        config: a dict for JSON, kept in the checkpoint: everything that the result depends on. Only a checkpoint with
            the same one is resumed.
    Returns:
        The frames of progress.gif, a list of PIL pictures, and whether Ctrl-C ended the loop.
    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: the checkpoint is damaged or another run's. OSError: it cannot be written.
    """
    optimiser = SteadyAdam(groups)
    rates = [group["lr"] for group in groups]
    generator = torch.Generator().manual_seed(args.seed)
    start, frames, checkpoint = 0, [snapshot(scene)], out / "checkpoint.pt"
    state = read_run(checkpoint, config) if args.resume else None
    if state:
        shown = [Image.fromarray(f.numpy()) for f in state["frames"]]
        if state["step"] > sum(stage.steps for stage in stages) or {f.size for f in shown} != {frames[0].size}:
            raise CheckpointError(checkpoint, "it is that of a longer run, or of one with other pictures")
        restore(scene, state["scene"], checkpoint)
        restore_optimiser(optimiser, state["optimiser"], checkpoint)
        restore_generator(generator, state["generator"], checkpoint)
        restore_stages(stages, state["stages"], checkpoint)
        start, frames = state["step"], shown

    def keep(step):
        pixels = [torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8).reshape(f.height, f.width, 3)
                  for f in frames]
        write(checkpoint, dict(scene=scene.state_dict(), optimiser=optimiser.state_dict(),
                               generator=generator.get_state(), step=step, stages=[s.state for s in stages],
                               frames=pixels, config=json.dumps(config)))

    level = None  # of the smooth fields
    plan = [(stage, at) for stage in stages for at in range(stage.steps)]
    with DelayedInterrupt() as interrupt, progress_bar(total=len(plan), initial=start, unit="step") as bar:
        for step, (stage, at) in enumerate(plan[start:], start):
            prior.guidance = stage.guidance
            loss = stage.loss(at, generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{stage.name}: the loss is {loss.item()} at step {step}; lower the rates")
            for group, rate in zip(optimiser.param_groups, rates):
                # A short warm-up, as Adam's first steps know little; the decay in the second half averages the noise.
                group["lr"] = stage.rate * rate * min(1.0, (at + 1) / 10, 2 - 2 * at / stage.steps)
            if args.smooth and at * LEVELS // stage.steps != level:  # from coarse to fine
                level = at * LEVELS // stage.steps
                optimiser.fields = scene.fields(args.smooth * FINEST ** (level / (LEVELS - 1)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            scene.project_()
            bar.update()
            bar.set_description(stage.name, refresh=False)
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            if (step + 1) * report.FRAMES // len(plan) > step * report.FRAMES // len(plan):
                frames.append(snapshot(scene))
            if (step + 1) % args.every == 0 or step + 1 == len(plan) or interrupt.seen:
                keep(step + 1)
            if interrupt.seen:
                break
    return frames, interrupt.seen


class DelayedInterrupt:
    """Within it Ctrl-C only sets .seen, so that no step is left half done; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.seen, self.before = False, None
        # A job in the background ignores Ctrl-C, and a host program may handle it itself: both stay as they are.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.seen = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        if self.before:
            signal.signal(signal.SIGINT, self.before)
