"""What an edit is: the losses and the editors by name, the stages of an edit, and the one loop that runs them.

    stages = stages_of(scene, source, prior, "pds", args)
    frames, interrupted = edit(scene, groups, stages, prior, args, out)

A scene is anything that can be edited: an SVG, a Picture, a NeRF, Splats. It is a torch.nn.Module, so that its state
can be kept, with sample_view(generator), render(view, size) -> [1,3,H,W] in [0,1], and project_() after a step;
`groups` are its parameter groups for Adam. The source, too, has render(view, size): the picture before. `args` are the
options of options.py, completed.
"""
import json
from collections import namedtuple

import torch
from PIL import Image

import pds
from files import sheets
from files.checkpoint import CheckpointError, read_run, restore, restore_generators, restore_optimiser, restore_stages
from files.pictures import to_pil
from files.sheets import snapshot, thumbnail
from files.writing import write
from image.editors import ddpm_inversion, drfs, instruct_pix2pix, sdedit
from image.figures import perceptual
from image.picture import Picture
from loop import parallel
from loop.interrupt import DelayedInterrupt
from loop.optimiser import SteadyAdam, released_share, settling_share
from loop.progress import progress as progress_bar

MODES = ("svg", "image", "nerf", "splat")
SCENES = ("nerf", "splat")  # modes with many views
EDITABLE = ("image", *SCENES)  # modes with pictures, which EDITORS need
LOSSES = {"sds": pds.sds_loss, "dds": pds.dds_loss, "pds": pds.pds_loss}
Editor = namedtuple("Editor", "title guidance strength")  # strength: of a single edit, see DatasetUpdate.edited
EDITORS = {"sdedit": Editor("SDEdit", 15.0, 0.4), "inv2n": Editor("Inv2N", 15.0, 0.36), "in2n": Editor("IN2N", 7.5, 1.0),
           "drfs": Editor("DRFS", 16.5, 0.0)}
TITLES = {name: name.upper() for name in LOSSES} | {name: editor.title for name, editor in EDITORS.items()}
COEFFICIENTS = {"official": "official", "consistent": "consistent", "dreamcatalyst": pds.dreamcatalyst}
HOLD = {"svg": 1, "image": 1, "nerf": 10, "splat": 10}  # steps for which a view is kept, as in the paper
LEVELS, FINEST = 12, 0.25  # in so many levels the width of the smooth fields falls to this share
RATES = {"settle": settling_share, "released": released_share}  # the courses of the rates over a stage
REFIT = {"nerf": 1, "splat": 4}  # a dataset update is a fit: its rates, as a multiple of the settling ones of an edit


def prompts(args):
    """The source and the target prompt as the model reads them."""
    return args.source + args.suffix, args.target + args.suffix


def latent(scene, prior, view, size):
    """[1,C,h,w] of what a scene shows, differentiable; of a picture that is optimised as a latent, that itself."""
    if isinstance(scene, Picture) and not scene.in_pixels:
        return scene.theta
    return prior.encode(scene.render(view, size))

# A stage adds the gradient of a step to the scene's parameters. Each of its generators stands for a view, a timestep and
# a noise of their own; the gradient is the mean over them, and over `world` processes that have as many each.

class Distillation:
    """The edit: one of the three losses, at views that are kept for HOLD steps."""
    fresh = False  # whether it begins with an optimiser that knows nothing
    HELD = 0.3  # weight of the surroundings of a scene, see `seen`
    PIXELS = 2 ** 16  # of drawings that are drawn and encoded in one go

    def __init__(self, scene, source, prior, name, args, editor=None, where=None):
        """
        Args:
            editor: an InstructPix2Pix in the place of the prior, as in DreamCatalyst's released code: it is told the
                source's picture, and the source's branch has no text.
            where: the masks of the views, a masks.Where; None: the edit acts everywhere.
        """
        self.scene, self.source, self.args, self.name, self.where = scene, source, args, name, where
        self.steps, self.guidance, self.rate, self.options = args.steps, args.guidance, 1, {}
        if name == "pds":
            self.options = dict(stride=args.stride, coefficients=COEFFICIENTS[args.coefficients], identity=args.identity)
        self.prior, self.editor = editor or prior, editor
        if editor:
            editor.image_guidance = args.image_guidance
            self.y_src, self.y_tgt = editor.unconditional(), editor.embed(instruction(args))
        else:
            self.y_src, self.y_tgt = map(prior.embed, prompts(args))
        self.state, self.x0_src = {"views": [None] * args.batch}, {}

    def backward(self, step, generators):
        prior, args, T = self.prior, self.args, len(self.prior.abar)
        progress = step / self.steps if args.schedule == "decreasing" else None
        looks, t = [], []
        for i, generator in enumerate(generators):
            if step % HOLD[args.mode] == 0:
                self.state["views"][i] = self.scene.sample_view(generator)
            view = self.state["views"][i]
            looks.append((view, self.shaken(view, generator)))
            t.append(pds.sample_timesteps(1, T, args.t_min, args.t_max, progress, generator))
        x0_src, model = self.source_latents([view for view, _ in looks]), prior
        noise = torch.cat([torch.randn(x0_src[:1].shape, generator=generator) for generator in generators])
        masks = torch.cat([self.where(view, x0_src) for view, _ in looks]) if self.where else None
        if self.editor:
            prior.guidance = self.guidance
            model = prior.of(x0=x0_src.repeat(2, 1, 1, 1))
        parts = self.parts(len(looks))
        several = len(parts) > 1  # then only latents and their gradients are kept of all, and drawn again part by part
        with torch.set_grad_enabled(not several):
            drawn, strayed = zip(*(self.seen(looks[part], t[part]) for part in parts))
        x0 = torch.cat(drawn).detach().requires_grad_() if several else drawn[0]
        loss = LOSSES[self.name](model, x0, x0_src, self.y_tgt, self.y_src, torch.cat(t), noise, mask=masks,
                                 **self.options)
        # the released loss is divided by C H W, which only the eps of Adam notices
        scale = 1 / x0[0].numel() if args.rates == "released" else 1
        (scale * (loss if several else loss + strayed[0])).backward()
        for part in parts if several else ():
            drawn, strayed = self.seen(looks[part], t[part])
            ((drawn * x0.grad[part]).sum() + scale * strayed / len(looks)).backward()
        for name in self.scene.COLOURS if args.mode == "svg" else ():  # what nothing was taught goes on as with 0
            parameter = getattr(self.scene, name)
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return scale * loss.detach()

    def seen(self, looks, t):
        """What is drawn of a scene at some (view, look), with as many timesteps t: [n,C,h,w], and how far it strayed.

        That is HELD times the squared error [] outside of the masks, of one look at a scene. The push does not act there,
        but the field or the Gaussians that it changes reach there, and the pull on the few pixels of a latent is too weak
        to undo that.
        """
        if self.args.mode == "svg":
            return self.prior.encode(torch.cat([self.drawn(look, *row) for (_, look), row in zip(looks, t)])), 0
        (view, look), = looks
        if not self.where or self.args.mode not in SCENES:
            return latent(self.scene, self.prior, look, self.args.frame), 0
        picture = self.scene.render(look, self.args.frame)
        outside = (1 - 2 * self.where(view, picture)).clamp_min(0)  # a soft mask of one half belongs to the edit
        error = picture - self.source.render(view, self.args.frame).to(picture)
        return self.prior.encode(picture), self.HELD * (outside * error.square()).sum()

    def drawn(self, look, t):
        """[1,3,H,W] of a drawing; its colours learn nothing from a timestep below args.colours_t_min.

        With little noise the prior takes a colour as it sees it, while the pull is at its largest there: a blue umbrella
        that should be red comes to rest at brown.
        """
        idle = [getattr(self.scene, name) for name in self.scene.COLOURS]
        idle = [] if t >= self.args.colours_t_min * len(self.prior.abar) else [p for p in idle if p.requires_grad]
        for parameter in idle:
            parameter.requires_grad_(False)
        picture = self.scene.render(look, self.args.frame)
        for parameter in idle:
            parameter.requires_grad_(True)
        return picture

    @torch.no_grad()
    def source_latents(self, views):
        """[N,C,h,w] of the source at N views; of a picture or photograph it is made once."""
        if isinstance(views[0], tuple):  # of a drawing that is shifted in each step
            drawn = [[self.source.render(view, self.args.frame) for view in views[part]] for part in self.parts(len(views))]
            return torch.cat([self.prior.encode(torch.cat(pictures)) for pictures in drawn])
        for view in views:
            if view not in self.x0_src:
                self.x0_src[view] = latent(self.source, self.prior, view, self.args.frame).cpu()
        return torch.cat([self.x0_src[view] for view in views]).to(self.prior.device)

    def parts(self, count):
        """`count` views as slices of those that are drawn and encoded in one go: of a drawing as many as have PIXELS; of all
        else single ones, whose graphs take more memory."""
        at_once = max(1, self.PIXELS // self.prior.size ** 2) if self.args.mode == "svg" else 1
        return [slice(at, at + at_once) for at in range(0, count, at_once)]

    def shaken(self, view, generator):
        """What is drawn at a view: of a scene pixels whose centres are shifted by up to half a pixel, as over many steps
        the whole surface is to be seen, not only what their centres meet."""
        if self.args.mode not in SCENES:
            return view
        return self.scene.camera(view, self.args.frame).shifted(*(torch.rand(2, generator=generator) - 0.5).tolist())


class DatasetUpdate:
    """Iterative dataset update (Instruct-NeRF2NeRF, arXiv 2303.12789), for scenes: every EVERY steps one of the pictures
    is replaced by its edit, while the scene keeps being fitted to all of them.

    name: the editor. "sdedit" (the paper's second stage, --refine) edits what the scene showed when the stage began;
    "inv2n", "in2n" and "drfs" edit what it shows now, guided by the photograph, and their dataset begins with these.
    With a single picture, `edited` is the whole edit.
    """
    EVERY, STEPS, PATCH = 10, 20, 32
    fresh = False

    def __init__(self, scene, source, prior, name, steps, guidance, args, editor=None):
        self.scene, self.source, self.prior, self.name, self.steps, self.args = scene, source, prior, name, steps, args
        self.guidance, self.rate = guidance, REFIT.get(args.mode, 1) if args.rates == "settle" else 1
        self.y_src, self.y_tgt = map(prior.embed, prompts(args))
        self.dataset, self.lpips = None, None
        self.state = {"pixels": None, "first": None, "edited": [], "order": [], "rounds": 0}
        if name == "in2n":
            self.editor, self.lpips = editor, perceptual(prior.device)
            editor.guidance, editor.image_guidance = self.guidance, args.image_guidance
            self.y_edit = editor.embed(instruction(args))

    @torch.no_grad()
    def edited(self, render, photograph, strength, generator):
        """The picture [1,3,H,W] that the editor makes of a render and its photograph, both [1,3,H,W].

        strength: in2n: the share of T that the render is noised to; sdedit and inv2n: the share of their steps that is
            skipped; drfs takes all of its steps.
        """
        model = self.editor if self.name == "in2n" else self.prior
        x0 = model.encode(render)
        if self.name == "sdedit":
            x0 = sdedit(model, x0, self.y_tgt, self.STEPS, strength, generator)
        elif self.name == "inv2n":
            x0 = ddpm_inversion(model, model.encode(photograph), self.y_tgt, self.y_src, skip=strength, start=x0,
                                steps=self.args.own.get("inversion_steps", 100), guidance_tgt=self.guidance,
                                generator=generator)
        elif self.name == "drfs":
            x0 = drfs(model, model.encode(photograph), self.y_tgt, self.y_src, guidance_tgt=self.guidance, start=x0,
                      generator=generator)
        else:
            x0 = instruct_pix2pix(model, photograph, self.y_edit, x0, self.STEPS, strength, generator)
        return model.decode(x0)

    def strength(self, generator):
        """What `edited` takes, as the released codes draw it: sdedit skips 16, 17 or 18 of its 20 steps."""
        if self.name == "sdedit":
            return (16 + torch.randint(3, (), generator=generator).item()) / self.STEPS
        if self.name == "in2n":
            return 0.02 + 0.96 * torch.rand((), generator=generator).item()
        return EDITORS[self.name].strength

    def open(self):
        """The pictures that the scene is fitted to, as they are when the stage begins."""
        if self.dataset is None:
            look = self.scene.render if self.name == "sdedit" else self.source.render
            self.dataset = self.scene.dataset(self.args.frame, look)
            if self.state["pixels"] is not None:  # a resumed run
                self.dataset.pixels.copy_(self.state["pixels"])
            elif self.name == "sdedit":
                self.state["first"] = self.dataset.pixels.clone()
            self.state["pixels"] = self.dataset.pixels
        return self.dataset

    @torch.no_grad()
    def update(self, dataset, generators):
        """Edit as many pictures as there are generators, in all processes together."""
        size, world = self.args.frame, parallel.world()
        while len(self.state["order"]) < len(generators) * world:  # every view once, in an order that all processes know
            own = torch.Generator().manual_seed((self.args.seed + self.state["rounds"]) % 2 ** 63)
            self.state["order"] = torch.randperm(len(dataset.cameras), generator=own).tolist() + self.state["order"]
            self.state["rounds"] += 1
        views, made = [self.state["order"].pop() for _ in range(len(generators) * world)], []
        for view, generator in zip(views[parallel.rank() * len(generators):], generators):
            strength, photograph = self.strength(generator), self.source.render(view, size)
            render = (dataset.picture(view, self.state["first"]) if self.name == "sdedit" else
                      self.scene.render(view, size))
            made.append((view, self.edited(render, photograph, strength, generator).cpu()))
        for view, picture in parallel.gathered(made):
            dataset.replace(view, picture)
            self.state["edited"] = [v for v in self.state["edited"] if v != view] + [view]

    def backward(self, step, generators):
        dataset = self.open()
        if step % self.EVERY == 0:
            self.update(dataset, generators)
        total = 0
        for generator in generators:
            loss = self.scene.data_loss(dataset, generator, l1=self.name == "in2n")
            if self.lpips:
                loss = loss + self.patch_loss(dataset, generator)
            (loss / len(generators)).backward()
            total = total + loss.detach() / len(generators)
        return total

    def patch_loss(self, dataset, generator):
        """LPIPS of a random square of PATCH pixels a side: Instruct-NeRF2NeRF's second term."""
        view = torch.randint(len(dataset.cameras), (), generator=generator).item()
        camera = dataset.cameras[view]
        side = min(self.PATCH, camera.width, camera.height)
        left, top = (torch.randint(n - side + 1, (), generator=generator).item() for n in (camera.width, camera.height))
        wanted = dataset.picture(view)[..., top:top + side, left:left + side]
        return self.lpips(self.scene.render(camera.window(left, top, side)), wanted)

    def pictures(self):
        """The views edited last, as the rows of a sheet: the photographs, their 2D edits, the scene."""
        views, size = sorted(self.state["edited"][-sheets.SIDES:]), self.args.frame
        look = lambda render: [thumbnail(to_pil(render(view)), sheets.SIDE_SIZE) for view in views]
        with torch.no_grad():
            return [("photographs", self.args.source, look(lambda view: self.source.render(view, size))),
                    (f"{TITLES[self.name]} of each", self.args.target, look(self.open().picture)),
                    ("the scene", self.args.target, look(lambda view: self.scene.render(view, size)))]


class PictureRefinement:
    """The paper's second stage for a single picture: its latent is drawn to SDEdit's edit of what it is now, by AdamW."""
    fresh = True

    def __init__(self, scene, prior, steps, guidance, args):
        self.scene, self.prior, self.steps, self.guidance, self.args = scene, prior, steps, guidance, args
        self.name, self.rate, self.state, self.y_tgt = "sdedit", 1, {}, prior.embed(prompts(args)[1])

    def backward(self, step, generators):
        x0 = latent(self.scene, self.prior, None, self.args.frame)
        edits = []
        for generator in generators:
            skip = (16 + torch.randint(3, (), generator=generator).item()) / 20
            edits.append(sdedit(self.prior, x0.detach(), self.y_tgt, 20, skip, generator))
        loss = (x0 - torch.stack(edits)).square().mean()
        loss.backward()
        return loss.detach()


def instruction(args):
    """What an InstructPix2Pix is told to do."""
    return args.instruction or f"make it a {args.target}"


def stages_of(scene, source, prior, name, args, editor=None, where=None):
    """The edit by a loss or an editor and, with --refine, the paper's second stage.

    editor: the InstructPix2Pix of prior.py that "in2n" needs and that a Distillation may have; where: see Distillation.
    """
    stages = [Distillation(scene, source, prior, name, args, editor, where) if name in LOSSES else
              DatasetUpdate(scene, source, prior, name, args.steps, args.guidance, args, editor)]
    if args.refine:
        guidance = guidance_of(args.own, "sdedit")
        stages.append(PictureRefinement(scene, prior, args.refine, guidance, args) if args.mode == "image" else
                      DatasetUpdate(scene, source, prior, "sdedit", args.refine, guidance, args))
    return stages


def guidance_of(own, name, wanted=None):
    """`wanted`, else what suits the model, else the editor's own. own: the model's settings."""
    suits = own["guidance"].get(name)
    return wanted if wanted is not None else EDITORS[name].guidance if suits is None else suits


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
    optimiser = SteadyAdam([{"start": 10 / (args.batch * parallel.world())} | group for group in groups])
    rates, share = [group["lr"] for group in groups], RATES[args.rates]
    generators = parallel.streams(args.seed, args.batch)
    start, frames, checkpoint = 0, [snapshot(scene)], out / "checkpoint.pt"
    state = read_run(checkpoint, config) if args.resume else None
    if state:
        shown = [Image.fromarray(f.numpy()) for f in state["frames"]]
        if state["step"] > sum(stage.steps for stage in stages) or {f.size for f in shown} != {frames[0].size}:
            raise CheckpointError(checkpoint, "it is that of a longer run, or of one with other pictures")
        restore(scene, state["scene"], checkpoint)
        restore_optimiser(optimiser, state["optimiser"], checkpoint)
        restore_generators(generators, state["generators"][parallel.rank()], checkpoint)
        restore_stages(stages, state["stages"][parallel.rank()], checkpoint)
        start, frames = state["step"], shown

    def keep(step):
        pixels = [torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8).reshape(f.height, f.width, 3)
                  for f in frames]
        own = [generator.get_state() for generator in generators], [stage.state for stage in stages]
        streams, states = zip(*parallel.gathered([own]))
        if parallel.rank() == 0:
            write(checkpoint, dict(scene=scene.state_dict(), optimiser=optimiser.state_dict(), generators=[*streams],
                                   step=step, stages=[*states], frames=pixels, config=json.dumps(config)))

    level = None  # of the smooth fields
    plan = [(stage, at) for stage in stages for at in range(stage.steps)]
    others = parallel.rank() > 0
    with DelayedInterrupt() as interrupt, progress_bar(total=len(plan), initial=start, unit="step", disable=others) as bar:
        for step, (stage, at) in enumerate(plan[start:], start):
            prior.guidance = stage.guidance
            if stage.fresh and at == 0:
                optimiser.state.clear()
            optimiser.zero_grad()
            loss = parallel.average(stage.backward(at, generators), optimiser.param_groups)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{stage.name}: the loss is {loss.item()} at step {step}; lower the rates")
            for group, rate in zip(optimiser.param_groups, rates):
                group["lr"] = stage.rate * rate * share(at, stage.steps, group)
            if args.smooth and at * LEVELS // stage.steps != level:  # from coarse to fine
                level = at * LEVELS // stage.steps
                optimiser.fields = scene.fields(args.smooth * FINEST ** (level / (LEVELS - 1)))
            optimiser.step()
            scene.project_()
            bar.update()
            bar.set_description(stage.name, refresh=False)
            bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
            if (step + 1) * sheets.FRAMES // len(plan) > step * sheets.FRAMES // len(plan):
                frames.append(snapshot(scene))
            stopped = parallel.largest(interrupt.seen, loss.device)
            if (step + 1) % args.every == 0 or step + 1 == len(plan) or stopped:
                keep(step + 1)
            if stopped:
                break
        else:
            stopped = False
    return frames, bool(stopped)
