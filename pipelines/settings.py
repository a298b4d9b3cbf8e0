"""TODO docstring."""
import torch

from files.reading import is_number, read_json
from pipelines.loading import PriorError

# What a model with a pds.json of its own need not say. One without gets the paper's settings, prior.PAPER.
COMMON = {"steps": 1000, "batch": 1, "identity": 1.0, "t_min": 0.1, "t_max": 0.98, "schedule": "uniform", "rates": "settle",
          "suffix": "", "refine": 0, "colours": 0.01, "colours_t_min": 0.0, "steady": True, "opacities": False,
          "jitter": 3.0, "latent": 0.02, "decay": 0.0, "table": 0.01, "mlps": 1e-3, "means": 3e-5, "scales": 1e-3,
          "rotations": 2e-4, "opacity": 1e-2}
# DreamCatalyst is made for its own guidance and its own course of the timesteps (released code, dc.py).
DREAMCATALYST = {"guidance": {"pds": 7.5}, "identity": 1.0, "t_min": 0.2, "t_max": 0.9, "schedule": "decreasing"}


def laid_over(own, part):
    """Settings with others laid over them; of the guidance, each loss by itself."""
    return own | part | {"guidance": own["guidance"] | part.get("guidance", {})}

# The guidance of the paper's code for PDS and DreamFusion's for SDS; DDS as in its own.
GUIDANCE = {"pds": 100.0, "dds": 7.5, "sds": 100.0}
# The settings of the paper's released code by mode (its 2D experiment is a notebook in the history); options.py says what
# each is. They are those of every model that has no file pds.json of its own beside its model_index.json.
RELEASED = {"identity": 1.0, "t_min": 0.02, "t_max": 0.98, "schedule": "uniform", "rates": "released"}
PAPER = {
    "guidance": GUIDANCE,
    "svg": RELEASED | {"steps": 1000, "t_min": 0.1, "canvas_points": 0.8, "colours": 0.01, "width": 0, "steady": False,
                       "opacities": True, "jitter": 0.0,
                       "suffix": ". minimal flat 2d vector image. lineal color. trending on artstation"},
    "image": RELEASED | {"steps": 500, "guidance": GUIDANCE | {"pds": 50.0}, "latent": 0.1, "decay": 0.01, "refine": 50},
    "nerf": RELEASED | {"steps": 30000, "table": 1e-2, "mlps": 1e-2},
    "splat": RELEASED | {"steps": 30000, "means": 1.6e-4, "scales": 5e-3, "rotations": 1e-3, "opacity": 5e-2,
                         "colours": 2.5e-3},
    "in2n": {"steps": 15000}}


def fitted(defaults, network):
    """PAPER's settings for a model of flow matching: t_min and t_max, shares of the schedule of Stable Diffusion,
    become those of its own schedule with the same noise; where it was trained for one guidance, that is every one."""
    usual = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    scales = dict.fromkeys(("pds", "dds", "sds", "sdedit", "inv2n", "drfs"), network.guidance)

    def change(key, value):
        if key == "guidance":
            return scales if network.one_scale else value
        if key in ("t_min", "t_max"):
            return (network.abar - usual[round(value * 1000)]).abs().argmin().item() / len(network.abar)
        return {k: change(k, v) for k, v in value.items()} if isinstance(value, dict) else value
    return change(None, defaults)


# What a pds.json may hold: the kind of a setting, of a number its least value besides.
SETTINGS = {"steps": (1, int), "batch": (1, int), "refine": (0, int), "inversion_steps": (1, int)} | dict.fromkeys(
    ("schedule", "rates", "suffix"), str) | dict.fromkeys(("steady", "opacities"), bool) | dict.fromkeys(
    ("identity", "t_min", "t_max", "points", "canvas_points", "width", "colours", "colours_t_min", "jitter", "latent",
     "decay", "table", "mlps", "means", "scales", "rotations", "opacity"), (0, (int, float)))


def read_defaults(path):
    """The settings that a model brings, pds.json; raises PriorError where one of them cannot be used."""
    try:
        found = read_json(path)
    except ValueError as e:
        raise PriorError(e) from e
    parts = ("svg", "image", "nerf", "splat", "in2n", "dreamcatalyst", "smooth")  # settings of their own
    owns = [("", found), *((part, found[part]) for part in parts if part in found)]
    owns += [(f"{mode} smooth", own["smooth"]) for mode, own in owns if isinstance(own, dict) and "smooth" in own]
    for mode, own in owns:
        if not isinstance(own, dict):
            raise PriorError(f"{path}: {mode} is no list of settings")
        guidance = own.get("guidance", {})
        wrong = [] if isinstance(guidance, dict) and all(is_number(scale, 0, 1e6) for scale in guidance.values()) else [
            "guidance"]
        wrong += [key for key, value in own.items() if key not in ("guidance", *parts) and not (
            isinstance(value, SETTINGS[key]) if SETTINGS.get(key) in (bool, str) else key in SETTINGS and is_number(
                value, SETTINGS[key][0], 1e6) and isinstance(value, SETTINGS[key][1]))]
        if wrong:
            raise PriorError(f"{path}: {', '.join(f'{mode} {key}'.strip() for key in wrong)} cannot be used")
    return found | {"guidance": GUIDANCE | found.get("guidance", {})}
