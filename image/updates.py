"""Dataset updates: the stage of an edit in which edited pictures replace the photographs that a scene is fitted to.

    stage = DatasetUpdate(scene, source, prior, "in2n", steps=1000, guidance=7.5, args=args, editor=editor)
    stage.backward(step, generators)               # adds the gradient of a step; edit.py runs the loop

PictureRefinement is the same for a single picture: the paper's second stage in two dimensions.
"""
import warnings

import torch

from files import sheets
from files.checkpoint import below, count, list_of, optional, pixels
from files.pictures import to_pil
from files.sheets import thumbnail
from image.editors import EDITORS, TITLES, ddpm_inversion, drfs, instruct_pix2pix, instruction, prompts, sdedit
from image.figures import perceptual
from loop import parallel

REFIT = {"nerf": 1, "splat": 4}  # the rates of a dataset update, which is a fit, relative to those of an edit


def released_skip(generator):
    """The share of SDEdit's 20 steps that the released code skips: 16, 17 or 18 of them, drawn at random."""
    return (16 + torch.randint(3, (), generator=generator).item()) / 20


class DatasetUpdate:
    """Iterative dataset update (Instruct-NeRF2NeRF, arXiv 2303.12789): every EVERY steps one picture of the dataset is
    replaced by its edit, while the scene is still fitted to all of them.

    name: the editor. "sdedit" (the paper's second stage, --refine) edits what the scene showed when the stage began;
    "inv2n", "in2n" and "drfs" edit what it shows now, guided by the photograph, and their dataset begins with the
    photographs. For a single picture, `edited` is the whole edit.
    """
    EVERY, STEPS, PATCH = 10, 20, 32
    resets_optimiser = False

    def __init__(self, scene, source, prior, name, steps, guidance, args, editor=None):
        """editor: the InstructPix2Pix of prior.py that "in2n" needs."""
        self.scene, self.source, self.prior, self.name, self.steps, self.args = scene, source, prior, name, steps, args
        self.guidance, self.rate = guidance, REFIT.get(args.mode, 1) if args.rates == "settle" else 1
        self.y_src, self.y_tgt = map(prior.embed, prompts(args))
        self.dataset, self.lpips = None, None
        self.state = {"pixels": None, "first": None, "edited": [], "order": [], "rounds": 0}
        views = list_of(below(len(scene.scene.train) if hasattr(scene, "scene") else 0))
        self.checks = {"pixels": optional(pixels), "first": optional(pixels), "edited": views, "order": views,
                       "rounds": count}
        if name == "in2n":
            self.editor, self.lpips = editor.at(guidance, args.image_guidance), perceptual(prior.device)
            if self.lpips is None:
                warnings.warn("lpips is not installed: IN2N runs without its perceptual term (pip install lpips)",
                              stacklevel=2)
            self.y_edit = editor.embed(instruction(args))

    @torch.no_grad()
    def edited(self, render, photograph, strength, generator):
        """The picture [1,3,H,W] that the editor makes of a render and its photograph, both [1,3,H,W].

        strength: for in2n the share of T that the render is noised to; for sdedit and inv2n the share of their steps
            that is skipped; drfs takes all of its steps.
        """
        model = self.editor if self.name == "in2n" else self.prior
        x0 = model.encode(render)
        if self.name == "sdedit":
            x0 = sdedit(model.at(self.guidance), x0, self.y_tgt, self.STEPS, strength, generator)
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
        """The `strength` of one update, drawn as in the released codes."""
        if self.name == "sdedit":
            return released_skip(generator)
        if self.name == "in2n":
            return 0.02 + 0.96 * torch.rand((), generator=generator).item()
        return EDITORS[self.name].strength

    def open(self):
        """The dataset, a scene.photographs.Pixels: as the stage begins, or as the resumed checkpoint holds it."""
        if self.dataset is None:
            look = self.scene.render if self.name == "sdedit" else self.source.render
            self.dataset = self.scene.dataset(self.args.frame, look)
            if self.state["pixels"] is not None:
                self.dataset.pixels.copy_(self.state["pixels"])
            elif self.name == "sdedit":
                self.state["first"] = self.dataset.pixels.clone()
            self.state["pixels"] = self.dataset.pixels
        return self.dataset

    @torch.no_grad()
    def update(self, dataset, generators):
        """Edit as many pictures as there are generators, counted over all processes."""
        size, world = self.args.frame, parallel.world()
        while len(self.state["order"]) < len(generators) * world:  # every view once, in an order all processes share
            own = torch.Generator().manual_seed((self.args.seed + self.state["rounds"]) % 2 ** 63)
            self.state["order"] = torch.randperm(len(dataset.cameras), generator=own).tolist() + self.state["order"]
            self.state["rounds"] += 1
        views, made = [self.state["order"].pop() for _ in range(len(generators) * world)], []
        for view, generator in zip(views[parallel.rank() * len(generators):], generators, strict=False):
            strength, photograph = self.strength(generator), self.source.render(view, size)
            render = (dataset.picture(view, self.state["first"]) if self.name == "sdedit" else
                      self.scene.render(view, size))
            made.append((view, self.edited(render, photograph, strength, generator).cpu()))
        for view, picture in parallel.gathered(made):
            dataset.replace(view, picture)
            self.state["edited"] = [v for v in self.state["edited"] if v != view] + [view]

    def backward(self, step, generators):
        """Add the gradient of a step; returns the loss []."""
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
        """LPIPS of a random square of PATCH pixels a side, the second term of Instruct-NeRF2NeRF's loss."""
        view = torch.randint(len(dataset.cameras), (), generator=generator).item()
        camera = dataset.cameras[view]
        side = min(self.PATCH, camera.width, camera.height)
        left, top = (torch.randint(n - side + 1, (), generator=generator).item() for n in (camera.width, camera.height))
        wanted = dataset.picture(view)[..., top:top + side, left:left + side]
        return self.lpips(self.scene.render(camera.window(left, top, side)), wanted)

    def pictures(self):
        """The views edited last as rows of a sheet: the photographs, their edits in 2D, the scene."""
        views, size = sorted(self.state["edited"][-sheets.SIDES:]), self.args.frame
        def look(render):
            return [thumbnail(to_pil(render(view)), sheets.SIDE_SIZE) for view in views]
        with torch.no_grad():
            return [("photographs", self.args.source, look(lambda view: self.source.render(view, size))),
                    (f"{TITLES[self.name]} of each", self.args.target, look(self.open().picture)),
                    ("the scene", self.args.target, look(lambda view: self.scene.render(view, size)))]


class PictureRefinement:
    """The paper's second stage for a single picture: AdamW moves the latent towards SDEdit's edit of it."""
    resets_optimiser = True

    def __init__(self, scene, prior, steps, guidance, args):
        self.scene, self.prior, self.steps, self.guidance, self.args = scene, prior, steps, guidance, args
        self.name, self.rate, self.state, self.y_tgt = "sdedit", 1, {}, prior.embed(prompts(args)[1])
        self.checks = {}

    def backward(self, step, generators):
        """Add the gradient of a step; returns the loss []."""
        x0 = self.scene.latent(self.prior, self.args.frame)
        prior = self.prior.at(self.guidance)
        edits = [sdedit(prior, x0.detach(), self.y_tgt, 20, released_skip(generator), generator)
                 for generator in generators]
        loss = (x0 - torch.stack(edits)).square().mean()
        loss.backward()
        return loss.detach()
