"""The settings of an edit, each declared once: the flags, the check of pds.json and the help come from SETTINGS.

    defaults = read_defaults("models/emoji/pds.json")          # what a model brings; else PAPER
    own = settings_for(defaults, "svg", "pds")                 # {name: value} for one mode and method

A pds.json may hold any setting, and under the name of a mode, of a method, "smooth_points" (an SVG whose points move as
one field), "everywhere" (the edit is not confined to a part of a scene's space), "recolour" (prompts that differ in a
colour alone; an SVG needs that field) or "dreamcatalyst" what differs there. "guidance" is a dict with a scale for each
method.
"""
from typing import NamedTuple

import torch

from files.reading import is_number, read_json
from pipelines.loading import PriorError


class Setting(NamedTuple):
    """A setting that a model may bring and that a flag of the same name overrides.

    kind: int, float, bool, or str, or the choices of a string; least: the smallest number; usual: the value where a
    pds.json does not name it; modes: those that read it; help: None where there is no flag.
    """
    name: str
    kind: object
    least: float
    usual: object
    modes: tuple
    help: str


EVERY, MANY = ("svg", "image", "nerf", "splat"), ("nerf", "splat")
SETTINGS = {setting.name: setting for setting in (
    Setting("steps", int, 1, 1000, EVERY, "optimiser steps"),
    Setting("batch", int, 1, 1, EVERY, "views, timesteps and noises per step; the gradient is their mean"),
    Setting("identity", float, 0, 1.0, EVERY, "pds: scales the identity term, the pull to the source; 0 removes it"),
    Setting("colour_identity", float, 0, 1.0, ("svg", "splat"), "pds: scales that term once more for colours "
            "alone (and opacities of a drawing), so that geometry keeps to the source more than they do; 1: as in the "
            "paper"),
    Setting("reach", float, 0, 0.0, EVERY, "pds: distance of the latents, a root mean square, at which half of the "
            "identity term is left, so that what has moved far is let go; 0: all of it everywhere, as in the paper"),
    Setting("source_guidance", float, 0, None, EVERY, "pds: guidance of the source's prediction, as DDPM inversion has "
            "one of its own; none: that of the target, as in the paper"),
    Setting("t_min", float, 0, 0.1, EVERY, "lowest timestep as a share of T"),
    Setting("t_max", float, 0, 0.98, EVERY, "highest timestep as a share of T"),
    Setting("schedule", ("uniform", "decreasing"), 0, "uniform", EVERY, "how timesteps are drawn"),
    Setting("antithetic", bool, 0, False, EVERY, "every second noise of a batch is the negative of the one before it, "
            "so that their mean depends less on the seed"),
    Setting("rates", ("settle", "released"), 0, "settle", EVERY, "learning-rate schedule: a short warm-up and a linear "
            "decay over the second half, or the one of the paper's code"),
    Setting("suffix", str, 0, "", EVERY, "words appended to both prompts"),
    Setting("points", float, 0, None, ("svg",), "rate of the points in pixels of the model; the shipped "
            "model keeps them where the prompts differ in a colour alone"),
    Setting("canvas_points", float, 0, None, ("svg",), None),  # the same in units of the canvas, as in the paper's code
    Setting("smooth", float, 0, None, ("svg", "splat"), "width of the field in which all points of a drawing move "
            "together, in pixels, or all colours of Gaussians change, in half sides of the scene's box; it falls to a "
            "quarter; 0: each on its own, as in the paper"),
    Setting("subdivide", float, 0, 0.0, ("svg",), "length in pixels of the model above which a curve of an outline is "
            "split, so that it can bend where the field does; 0: none is, as in the paper"),
    Setting("spring", float, 0, 0.0, ("svg",), "share of the way back to the source that stroke widths go after each "
            "step, and points within the picture, the more the larger their shape is; 0: they are free, as in the "
            "paper"),
    Setting("affine", float, 0, 0.0, ("svg",), "share of its rate by which each circle, ellipse and rectangle of a "
            "drawing goes back to an affine image of itself after a step, the more the larger its shape is, and a "
            "split line to a straight one, so that they keep their form unless the push is strong; 0: none does, as in "
            "the paper"),
    Setting("symmetry", float, 0, 0.0, ("svg",), "share of its rate by which outlines and equal paints that mirror "
            "each other about an upright axis go back to mirror images after a step, so that a face stays symmetric "
            "unless the push is strong; 0: none does, as in the paper, and as an edit on one side needs it"),
    Setting("sparse", float, 0, 0.0, ("svg", "nerf"), "share of its rate by which each colour of a drawing, or the "
            "cover of a NeRF's paints, goes back to the source after a step, so that what has a weak push stays as it "
            "is; 0: none does, as in the paper"),
    Setting("follow", float, 0, 0.0, ("svg",), "distance in RGB, each channel in [0, 1], below which the colour of a "
            "shape changes together with that of the shape it lies on, as pores do with their peel; 0: each changes on "
            "its own, as in the paper"),
    Setting("colours", float, 0, 0.01, ("svg", "image", "splat"), "rate of colours and pixels"),
    Setting("steady", bool, 0, True, ("svg",), "one second moment of Adam for all points, and one for all colours"),
    Setting("opacities", bool, 0, False, ("svg",), "let opaque shapes become transparent"),
    Setting("jitter", float, 0, 3.0, ("svg",), "random shift of the drawing in each step, in pixels"),
    Setting("latent", float, 0, 0.02, ("image",), "rate of the latent"),
    Setting("decay", float, 0, 0.0, ("image",), "weight decay of AdamW on the latent"),
    Setting("table", float, 0, 0.01, ("nerf",), "rate of the hash table"),
    Setting("mlps", float, 0, 1e-3, ("nerf",), "rate of the MLPs"),
    Setting("densities", float, 0, 1.0, ("nerf",), "share of both rates at which densities learn, which then have a "
            "table and an MLP of their own, so that colours change without the shape; 0: the shape stays; 1: one table "
            "for both, as in the paper"),
    Setting("paint", float, 0, 0.0, ("nerf",), "rate of two paints, each of one colour, that cover what is there "
            "smoothly in space; 0: none, as in the paper"),
    Setting("lut", float, 0, 0.0, ("nerf",), "rate of a look-up table of the colours, which changes equal colours "
            "alike and leaves shading and texture as they are; 0: none, as in the paper"),
    Setting("means", float, 0, 3e-5, ("splat",), "rate of the means, in extents of the cameras"),
    Setting("scales", float, 0, 1e-3, ("splat",), "rate of the log scales"),
    Setting("rotations", float, 0, 2e-4, ("splat",), "rate of the quaternions"),
    Setting("opacity", float, 0, 1e-2, ("splat",), "rate of the opacity logits"),
    Setting("refine", int, 0, 0, ("image", *MANY), "steps of the refining stage, 0: none"),
    Setting("hold", int, 1, None, MANY, None),  # steps for which a view is kept; None: edit.HOLD
    Setting("warm", int, 0, None, MANY, None),  # steps of warm-up of the released rates; None: the paper's
    Setting("freeu", bool, 0, None, EVERY, None),  # whether the UNet runs with FreeU, see Prior.with_freeu
    Setting("inversion_steps", int, 1, None, EVERY, None))}
GUIDED = ("pds", "dds", "sds", "ids", "sdedit", "inv2n", "in2n", "drfs")  # methods with a guidance of their own
# what a pds.json may hold settings under
PARTS = (*EVERY, "pds", "in2n", "ids", "ssd", "dreamcatalyst", "smooth_points", "everywhere", "recolour")

# The guidance of the paper's code for PDS, DreamFusion's for SDS, and the others' own; in SSD it is a weight.
GUIDANCE = {"pds": 100.0, "dds": 7.5, "sds": 100.0, "ids": 7.5, "ssd": 7.5}
# The released settings of the paper's code by mode (its 2D experiment is a notebook in the history), for every model
# without a pds.json beside its model_index.json.
RELEASED = {"identity": 1.0, "t_min": 0.02, "t_max": 0.98, "schedule": "uniform", "rates": "released"}
# Those of DreamCatalyst's code, which edits scenes; they come with its coefficients.
OF_ITS_SCENES = {"steps": 3000, "hold": 1, "warm": 100}
DREAMCATALYST = {"guidance": {"pds": 7.5}, "identity": 1.0, "colour_identity": 1.0, "reach": 0.0, "t_min": 0.2,
                 "t_max": 0.9, "schedule": "decreasing", "freeu": True, "nerf": OF_ITS_SCENES, "splat": OF_ITS_SCENES}
PAPER = {
    "guidance": GUIDANCE,
    "svg": RELEASED
    | {
        "steps": 1000,
        "t_min": 0.1,
        "canvas_points": 0.8,
        "colours": 0.01,
        "smooth": 0.0,
        "steady": False,
        "opacities": True,
        "jitter": 0.0,
        "suffix": ". minimal flat 2d vector image. lineal color. trending on artstation",
    },
    "image": RELEASED
    | {"steps": 500, "guidance": GUIDANCE | {"pds": 50.0}, "latent": 0.1, "decay": 0.01, "refine": 50},
    "nerf": RELEASED | {"steps": 30000, "table": 1e-2, "mlps": 1e-2},
    "splat": RELEASED
    | {"steps": 30000, "means": 1.6e-4, "scales": 5e-3, "rotations": 1e-3, "opacity": 5e-2, "colours": 2.5e-3},
    "in2n": {"steps": 15000},
    "ids": {"t_min": 0.05, "t_max": 0.95},
    "ssd": {"t_min": 0.02, "t_max": 0.98, "schedule": "decreasing", "freeu": True},
    "dreamcatalyst": DREAMCATALYST,
}


def settings_for(defaults, mode, method, size=64, width=None, coefficients="official", local=False,
                 recolour=False, confined=False):
    """The settings {name: value} of a mode and a method under the defaults of a model, before any flag.

    Later layers win: the usual values, the model's settings, those of the mode, of the method, of smooth points, of
    edits that act everywhere, of recolouring, and of DreamCatalyst's coefficients, which are the released ones for a
    model that brings none.

    Args:
        size: side in pixels of the model's pictures; width: of the smooth field, see SETTINGS, 0: none, None: the
            model's own, else an eighth of `size` for a drawing and none for Gaussians.
        local: the edit is held to masks of pictures; weights that all of a NeRF shares would carry it out of place.
        recolour: the prompts differ in a colour alone, see pipelines.captions.recolours; free points ignore it.
        confined: a scene can change in one part of its space only, see run.confined; neither of these two layers holds
            then.
    """
    own = {name: setting.usual for name, setting in SETTINGS.items() if setting.usual is not None} | defaults
    if mode == "splat":  # a width outside of the part of a mode is one in pixels
        own.pop("smooth", None)
    own = _overlaid(own, own.get(mode, {}))
    # a mode's own settings of a method are for its official form, everywhere in a scene
    whole = not local and coefficients != "dreamcatalyst"
    own = _overlaid(own, (own if whole else defaults).get(method, {}))
    usual = own.get("smooth", size / 8 if mode == "svg" else 0.0) if width is None else width
    own["smooth"] = usual if mode in SETTINGS["smooth"].modes else 0.0
    if own["smooth"] and mode == "svg":
        own = _overlaid(own, own.get("smooth_points", {}))
    if not confined:
        own = _overlaid(own, own.get("everywhere", {}))
        if recolour and (own["smooth"] or mode != "svg"):
            own = _overlaid(own, own.get("recolour", {}))
    if coefficients == "dreamcatalyst" and method == "pds":
        part = own.get("dreamcatalyst", DREAMCATALYST)
        own = _overlaid(_overlaid(own | {"source_guidance": None}, part), part.get(mode, {}))  # it knows only one scale
    if mode not in SETTINGS["colour_identity"].modes:  # whose colours and geometry share their weights
        own["colour_identity"] = 1.0
    if mode == "nerf" and local:
        own = own | {"mlps": own["mlps"] / 10, "table": own["table"] * 2}
    return own


def _overlaid(own, part):
    """Settings with those of a part laid over them; guidance is merged method by method."""
    return own | part | {"guidance": own["guidance"] | part.get("guidance", {})}


def for_flow(defaults, network):
    """Settings of Stable Diffusion, as PAPER, for a model of flow matching, a pipelines.flow.Flow.

    t_min and t_max, shares of Stable Diffusion's schedule, become the shares of its own schedule with the same noise. A
    model that was trained for a single guidance gets that one for every method.
    """
    usual = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    scales = dict.fromkeys((method for method in GUIDED if method != "in2n"), network.guidance)

    def change(key, value):
        if key == "guidance":
            return value | scales if network.one_scale else value
        if key in ("t_min", "t_max"):
            return (network.abar - usual[round(value * 1000)]).abs().argmin().item() / len(network.abar)
        return {k: change(k, v) for k, v in value.items()} if isinstance(value, dict) else value
    return change(None, defaults)


def read_defaults(path):
    """The settings in a pds.json, with PAPER's guidance below them; raises PriorError, naming what cannot be used."""
    try:
        found = read_json(path)
    except ValueError as e:
        raise PriorError(e) from e
    for place, own in _parts("", found):
        if not isinstance(own, dict):
            raise PriorError(f"{path}: {place} is no object with settings")
        wrong = [key for key, value in own.items() if not _usable(key, value)]
        if wrong:
            raise PriorError(f"{path}: {', '.join(f'{place} {key}'.strip() for key in wrong)} cannot be used")
    return found | {"guidance": GUIDANCE | found.get("guidance", {})}


def _parts(place, own):
    """The settings in a pds.json and, below them, those of each of its parts: (the names of the part, its settings)."""
    yield place, own
    for part in PARTS if isinstance(own, dict) else ():
        if part in own:
            yield from _parts(f"{place} {part}".strip(), own[part])


def _usable(key, value):
    """Whether a value read from JSON is one that a setting, or a part of a pds.json, can have."""
    if key == "guidance":
        return isinstance(value, dict) and all(is_number(scale, 0, 1e6) for scale in value.values())
    if key in PARTS or key not in SETTINGS:
        return key in PARTS
    kind = SETTINGS[key].kind
    if kind in (bool, str) or isinstance(kind, tuple):
        return isinstance(value, kind if kind in (bool, str) else str) and (kind in (bool, str) or value in kind)
    return is_number(value, SETTINGS[key].least, 1e6) and (kind is float or isinstance(value, int))
