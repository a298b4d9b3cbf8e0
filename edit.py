"""An edit: its losses by name, its stages, and the loop that runs them.

    stages = stages_of(scene, source, prior, "pds", args)
    frames, interrupted = edit(scene, groups, stages, prior, args, out)

A scene is anything that can be edited: an SVG, a Picture, a NeRF or Splats. It is a torch.nn.Module with
sample_view(generator), render(view, size) -> [1,3,H,W] in [0,1], and project_(), which follows every step; `groups` are
its parameter groups for Adam. The source has render(view, size), too: the picture before. `args` are the completed
options of options.py.
"""
import json

import torch
from PIL import Image

import pds
from files import checkpoint, sheets
from files.sheets import snapshot
from files.writing import write
from image.editors import EDITORS, instruction, prompts
from image.picture import Picture
from image.rivals import ids_loss, ssd_loss
from image.updates import DatasetUpdate, PictureRefinement
from loop import parallel
from loop.interrupt import DelayedInterrupt
from loop.optimiser import SteadyAdam, released_share, settling_share
from loop.progress import progress as progress_bar

MODES = ("svg", "image", "nerf", "splat")
SCENES = ("nerf", "splat")  # modes with many views
EDITABLE = ("image", *SCENES)  # modes with pictures, which EDITORS need
LOSSES = {"sds": pds.sds_loss, "dds": pds.dds_loss, "pds": pds.pds_loss, "ids": ids_loss, "ssd": ssd_loss}
COMPARED = ("sds", "dds", "pds")  # by --compare without names
COEFFICIENTS = {"official": "official", "consistent": "consistent", "dreamcatalyst": pds.dreamcatalyst}
HOLD = {"svg": 1, "image": 1, "nerf": 10, "splat": 10}  # steps for which a view is kept, in the paper's code
LEVELS, FINEST = 12, 0.25  # the width of the smooth field falls to this share in so many levels
RATES = {"settle": settling_share, "released": released_share}  # learning-rate schedules of a stage


# A stage has `name`, `steps`, `rate` (a factor on all learning rates), `resets_optimiser`, a `state` for the checkpoint
# with `checks` of its keys, and backward(step, generators), which adds a step's gradient to the scene's parameters.
# Each generator stands for one view, timestep and noise; the gradient is the mean over them, and over `world` processes
# with as many each.

class Distillation:
    """The edit itself: one of LOSSES, at views that are kept for args.hold steps, or HOLD."""
    resets_optimiser = False
    SURROUNDINGS = 0.3  # weight of what lies outside of the masks of a scene, see `surroundings`
    PIXELS = 2 ** 16  # the most that are rendered and encoded at once

    def __init__(self, scene, source, prior, name, args, editor=None, where=None):
        """
        Args:
            editor: an InstructPix2Pix instead of the prior, as in DreamCatalyst's released code: it sees the source's
                picture, and the source's branch has no text.
            where: the masks of the views, a masks.Where; None: the edit acts everywhere.
        """
        self.scene, self.source, self.args, self.name, self.where = scene, source, args, name, where
        self.steps, self.rate, self.options = args.steps, 1, {}
        if name == "pds":
            self.options = dict(stride=args.stride, coefficients=COEFFICIENTS[args.coefficients])
        # the parameters whose identity term has a weight of its own
        own = name == "pds" and args.colour_identity != 1 and args.identity
        self.colours = [p for p in scene.colour_parameters() if p.numel()] if own else []
        if editor:
            if name == "pds" and args.source_guidance is not None:
                raise ValueError("--source-guidance: an InstructPix2Pix has a guidance by picture instead")
            self.prior = editor.at(args.guidance, args.image_guidance)
            self.y_src, self.y_tgt = editor.unconditional(), editor.embed(instruction(args))
        else:
            self.prior = prior.at(args.guidance, args.source_guidance if name == "pds" else None)
            self.y_src, self.y_tgt = map(prior.embed, prompts(args))
        if args.freeu:
            self.prior = self.prior.with_freeu()
        self.sees_source = editor is not None
        self.state, self.x0_src = {"views": [None] * args.batch}, {}
        view = checkpoint.below(len(scene.scene.train)) if args.mode in SCENES else checkpoint.shift
        self.checks = {"views": checkpoint.list_of(checkpoint.optional(view))}

    def backward(self, step, generators):
        """Render, encode, loss, backward; returns the loss []."""
        looks, noises, total = self.looks(step, generators), [], 0
        at_once = max(1, self.PIXELS // self.prior.size ** 2)
        for start in range(0, len(looks), at_once):
            views, cameras, t, draws = zip(*looks[start:start + at_once], strict=True)
            x0_src = self.source_latents(views)
            for generator in draws:
                second = self.args.antithetic and len(noises) % 2
                noises.append(-noises[-1] if second else torch.randn(x0_src[:1].shape, generator=generator))
            noise = torch.cat(noises[start:])
            mask = torch.cat([self.where(view, x0_src) for view in views]) if self.where else None
            prior = self.prior.of(x0=x0_src.repeat(2, 1, 1, 1)) if self.sees_source else self.prior
            x0_tgt, pictures = self.encoded(self.scene, cameras)
            own = self.options | ({"identity": self.identity(x0_tgt, x0_src)} if self.name == "pds" else {})
            loss = LOSSES[self.name](prior, x0_tgt, x0_src, self.y_tgt, self.y_src, torch.cat(t), noise, mask=mask,
                                     **own)
            held = self.surroundings(views, pictures) if self.where and self.args.mode in SCENES else 0
            # the released loss is divided by C H W, which only the eps of Adam notices
            scale = 1 / x0_tgt[0].numel() if self.args.rates == "released" else 1
            share = len(views) / len(looks)
            if self.colours:
                more = pds.identity_loss(self.prior, x0_tgt, x0_src, torch.cat(t), self.args.stride,
                                         own["coefficients"], (self.args.colour_identity - 1) * own["identity"])
                (scale * share * more).backward(inputs=self.colours, retain_graph=True)
            (scale * share * (loss + held)).backward()
            total = total + scale * share * loss.detach()
        return total

    def identity(self, x0_tgt, x0_src):
        """The weight of the identity term, a number or, with --reach, a tensor [n] for latents [n,C,h,w]."""
        reach = self.args.reach
        return self.args.identity * (pds.redescending(x0_tgt, x0_src, reach) if reach else 1)

    def looks(self, step, generators):
        """For each generator: the view, what is rendered of it, the timestep [1], and the generator.

        Of a scene the pixel centres are shifted by up to half a pixel, so that over many steps the edit covers the
        whole surface, not only the points that the centres meet. A drawing has one view, a shift, for all generators,
        so that it is rendered and encoded once a step.
        """
        args, looks = self.args, []
        progress = step / self.steps if args.schedule == "decreasing" else None
        if step % (args.hold or HOLD[args.mode]) == 0:
            views = [self.scene.sample_view(generator) for generator in generators]
            self.state["views"] = parallel.gathered(views)[:1] * len(views) if args.mode == "svg" else views
        for view, generator in zip(self.state["views"], generators, strict=True):
            camera = view
            if args.mode in SCENES:
                shift = (torch.rand(2, generator=generator) - 0.5).tolist()
                camera = self.scene.camera(view, args.frame).shifted(*shift)
            t = pds.sample_timesteps(1, len(self.prior.abar), args.t_min, args.t_max, progress, generator)
            looks.append((view, camera, t, generator))
        return looks

    def encoded(self, scene, views):
        """Latents [n,C,h,w] of what a scene shows in n views, differentiable, and the pictures [n,3,H,W] behind them;
        of a picture that is optimised as a latent, the latent itself and None. The views of a drawing are equal."""
        if isinstance(scene, Picture):
            return scene.latent(self.prior, self.args.frame).expand(len(views), -1, -1, -1), None
        distinct = views[:1] if self.args.mode == "svg" else views
        pictures = torch.cat([scene.render(view, self.args.frame) for view in distinct])
        return self.prior.encode(pictures).expand(len(views), -1, -1, -1), pictures.expand(len(views), -1, -1, -1)

    def surroundings(self, views, pictures):
        """SURROUNDINGS times the squared error [] of a scene's pictures [n,3,H,W] outside of the masks, mean over n.

        The push does not act there, but it changes a field or Gaussians that reach there, and the pull on the few
        pixels of a latent is too weak to undo that.
        """
        wanted = torch.cat([self.source.render(view, self.args.frame).to(pictures) for view in views])
        masks = torch.cat([self.where(view, pictures) for view in views])
        outside = (1 - 2 * masks).clamp_min(0)  # a soft mask of one half belongs to the edit
        return self.SURROUNDINGS * (outside * (pictures - wanted).square()).sum() / len(views)

    @torch.no_grad()
    def source_latents(self, views):
        """Latents [n,C,h,w] of the source; a view that recurs is encoded once."""
        if isinstance(views[0], tuple):  # a drawing is shifted anew in each step
            return self.encoded(self.source, views)[0]
        for view in views:
            if view not in self.x0_src:
                self.x0_src[view] = self.encoded(self.source, [view])[0].cpu()
        return torch.cat([self.x0_src[view] for view in views]).to(self.prior.device)


def stages_of(scene, source, prior, name, args, editor=None, where=None):
    """The edit by a loss or an editor and, with --refine, the paper's second stage: a list.

    editor: the InstructPix2Pix that "in2n" needs and that a Distillation may have; where: see Distillation.
    """
    stages = [Distillation(scene, source, prior, name, args, editor, where) if name in LOSSES else
              DatasetUpdate(scene, source, prior, name, args.steps, args.guidance, args, editor)]
    if args.refine:
        guidance = guidance_of(args.own, "sdedit")
        stages.append(PictureRefinement(scene, prior, args.refine, guidance, args) if args.mode == "image" else
                      DatasetUpdate(scene, source, prior, "sdedit", args.refine, guidance, args))
    return stages


def guidance_of(own, name, wanted=None):
    """The guidance of a method: `wanted`, else the model's own setting, else the editor's default."""
    suits = own["guidance"].get(name)
    return wanted if wanted is not None else EDITORS[name].guidance if suits is None else suits


# ---- the loop -----------------------------------------------------------------------------------------

def edit(scene, groups, stages, prior, args, out, config=None, view=None):
    """Optimise the scene with Adam, one stage after the other.

    A checkpoint is written every args.every steps and at Ctrl-C; a run that is resumed from it takes exactly the steps
    that the uninterrupted run would have taken.

    Args:
        config: a dict for JSON, kept in the checkpoint: everything that the result depends on. Only a checkpoint with
            an equal one is resumed.
        view: a viewer, see scene/viewer.py; None: nobody looks.
    Returns:
        The frames of progress.gif, a list of PIL pictures, and whether Ctrl-C ended the loop.
    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: the checkpoint is damaged or another run's. OSError: it cannot be written.
    """
    run = Run(scene, groups, stages, args, out / "checkpoint.pt", config)
    plan = [(stage, at) for stage in stages for at in range(stage.steps)]
    start, frames = run.resumed(len(plan)) if args.resume else (0, run.frames)
    others, adam, stopped = parallel.rank() > 0, run.optimiser, False
    with (
        DelayedInterrupt() as interrupt,
        progress_bar(total=len(plan), initial=start, unit="step", disable=others) as bar,
    ):
        for step, (stage, at) in enumerate(plan[start:], start):
            run.prepare(stage, at)
            loss = parallel.average(stage.backward(at, run.generators), adam.param_groups)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{stage.name}: the loss is {loss.item()} at step {step}; lower the rates")
            adam.step()
            scene.project_()
            bar.update()
            bar.set_description(stage.name, refresh=False)
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            if (step + 1) * sheets.FRAMES // len(plan) > step * sheets.FRAMES // len(plan):
                frames.append(snapshot(scene))
            if view and view.between(stage.name, step + 1, len(plan), loss.item(), interrupt):
                interrupt.seen = True
            stopped = bool(parallel.largest(interrupt.seen, loss.device))
            if (step + 1) % args.every == 0 or step + 1 == len(plan) or stopped:
                run.keep(step + 1)
            if stopped:
                break
    return frames, stopped


def forms_of(svg, args, firmness):
    """The `forms` of a drawing for SteadyAdam: what it keeps unless its push is strong. Before an edit."""
    held = {"points": [(svg.forms(firmness), args.affine)]} if args.affine and len(svg.points) else {}
    if args.symmetry and not args.mask:  # a mask may lie on one side
        for name, mirrored in svg.symmetry().items():
            held[name] = [*held.get(name, ()), (mirrored, args.symmetry)]
    return held


class Run:
    """What the loop carries from step to step, and what its checkpoint holds: optimiser, random streams, frames."""

    def __init__(self, scene, groups, stages, args, path, config):
        """path: of the checkpoint; the other arguments as of `edit`."""
        self.scene, self.stages, self.args, self.path, self.config = scene, stages, args, path, config
        drawing = args.mode == "svg"
        details = scene.details(args.follow) if drawing and (args.follow or args.spring or args.affine) else None
        firmness = details.firmness() if details else None
        self.optimiser = SteadyAdam([{"start": 10 / (args.batch * parallel.world())} | group for group in groups],
                                    forms=forms_of(scene, args, firmness) if drawing else None, details=details,
                                    firmness={"points": firmness} if details else None)
        self.rates, self.level = [group["lr"] for group in groups], None
        self.generators, self.frames = parallel.streams(args.seed, args.batch), [snapshot(scene)]

    def prepare(self, stage, at):
        """Set the optimiser for step `at` of a stage: zero gradients, rates, the width of the smooth fields."""
        if stage.resets_optimiser and at == 0:
            self.optimiser.state.clear()
        self.optimiser.zero_grad()
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["share"] = RATES[self.args.rates](at, stage.steps, group)
            group["lr"] = stage.rate * rate * group["share"]
        level = at * LEVELS // stage.steps  # from coarse to fine
        if self.args.smooth and level != self.level:
            self.level = level
            self.optimiser.fields = self.scene.fields(self.args.smooth * FINEST ** (level / (LEVELS - 1)))

    def resumed(self, steps):
        """Restore the checkpoint of a run of `steps` steps, if there is one: the step to continue from, the frames."""
        saved = checkpoint.read_run(self.path, self.config)
        if saved is None:
            return 0, self.frames
        shown = [Image.fromarray(frame.numpy()) for frame in saved["frames"]]
        if saved["step"] > steps or {frame.size for frame in shown} != {self.frames[0].size}:
            raise checkpoint.CheckpointError(self.path, "it belongs to a longer run, or to one with other pictures")
        checkpoint.restore(self.scene, saved["scene"], self.path)
        checkpoint.restore_optimiser(self.optimiser, saved["optimiser"], self.path)
        checkpoint.restore_generators(self.generators, saved["generators"][parallel.rank()], self.path)
        checkpoint.restore_stages(self.stages, saved["stages"][parallel.rank()], self.path)
        self.frames = shown
        return saved["step"], shown

    def keep(self, step):
        """Write the checkpoint after so many steps; of several processes the first one writes for all."""
        own = [generator.get_state() for generator in self.generators], [stage.state for stage in self.stages]
        streams, states = zip(*parallel.gathered([own]), strict=True)
        if parallel.rank() == 0:
            pixels = [
                torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).reshape(frame.height, frame.width, 3)
                for frame in self.frames
            ]
            write(self.path, dict(scene=self.scene.state_dict(), optimiser=self.optimiser.state_dict(),
                                  generators=[*streams], step=step, stages=[*states], frames=pixels,
                                  config=json.dumps(self.config)))
