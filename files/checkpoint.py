"""Reading back what a run or a fit has written: checked before it is believed, no pickle is executed.

    saved = read_checkpoint("out/checkpoint.pt", {"step": count, "scene": dict})
    restore(scene, saved["scene"], "out/checkpoint.pt")
    restore_optimiser(adam, saved["optimiser"], "out/checkpoint.pt")
"""
import hashlib
import json
from pathlib import Path

import torch

from files.messages import one_line
from files.reading import is_number


class CheckpointError(ValueError):
    """A file of an earlier run that cannot be used; one line with its name, the reason and the way out."""

    def __init__(self, path, reason, what="checkpoint"):
        super().__init__(one_line(f"{path}: no readable {what}: {one_line(reason, 200)}; delete it to start anew"))


def count(value):
    """Whether a value is a number of steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2 ** 53


def seconds(value):
    """Whether a value is a time."""
    return is_number(value, 0, 1e9)


def text(value):
    """Whether a value is a string."""
    return isinstance(value, str)


def dictionary(value):
    """Whether a value is a dict whose keys are strings."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def random_state(value):
    """Whether a value is the state of a generator of random numbers."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 1 and len(value) >= 16


def read_checkpoint(path, needs, device="cpu", what="checkpoint"):
    """The dict that torch.save has written to a file.

    Args:
        needs: {key: function of the value, true where it can be used}; other keys are not looked at.
        device: where its tensors go.
        what: it should be, for the error.
    Raises:
        CheckpointError: it cannot be read, is no dict, or what is needed is missing or wrong.
    """
    try:
        # said outright: a variable of the environment may make pickles that run code the default again
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # it raises a dozen kinds for a damaged file
        raise CheckpointError(path, e.strerror if isinstance(e, OSError) and e.strerror else e, what) from e
    if not isinstance(saved, dict):
        raise CheckpointError(path, f"it holds a {type(saved).__name__}", what)
    for key, check in needs.items():
        if key not in saved:
            raise CheckpointError(path, f"{key!r} is missing", what)
        if not check(saved[key]):
            raise CheckpointError(path, f"{key!r} is wrong", what)
    return saved


def finite(value):
    """Whether a tensor holds neither NaN nor infinity."""
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def same_kind(value, like):
    """Whether a value is a finite tensor of the shape and number format of `like`."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.shape == like.shape
            and value.dtype == like.dtype and finite(value))


def restore(module, state, path):
    """module.load_state_dict(state), a part of the file `path`; raises CheckpointError where they do not fit."""
    wanted = module.state_dict()
    if not dictionary(state) or set(state) != set(wanted):
        raise CheckpointError(path, "it holds other parts than the scene's")
    for name, like in wanted.items():
        if not same_kind(state[name], like):
            raise CheckpointError(path, f"{name} has another shape than the scene's, or is not finite")
    module.load_state_dict(state)


def restore_optimiser(optimiser, state, path):
    """Load the state of an Adam, a part of the file `path`; raises CheckpointError where they do not fit.

    Rates, moments and all other settings are those of `optimiser`; only what it has seen of the gradients is taken.
    """
    own = [dict(group) for group in optimiser.param_groups]
    try:
        optimiser.load_state_dict(state)
        for group, before in zip(optimiser.param_groups, own):
            group.update({key: value for key, value in before.items() if key not in ("params", "lr")})
            for parameter in group["params"]:
                moments = optimiser.state.get(parameter)
                if not moments:
                    continue
                steps, first, second = (moments[key] for key in ("step", "exp_avg", "exp_avg_sq"))
                right = (steps.numel() == 1 and 0 <= steps.item() < 2 ** 53 and first.shape == parameter.shape
                         and second.shape in (parameter.shape, ()) and finite(first) and finite(second)
                         and bool((second >= 0).all()) and is_number(group["lr"], 0))
                if not right:
                    raise ValueError("a moment is not finite or has another shape")
    except Exception as e:  # whatever a damaged state makes of load_state_dict
        raise CheckpointError(path, f"the optimiser's state does not fit: {one_line(e, 100)}") from e


def restore_generators(generators, states, path):
    """restore_generator for each of several; raises CheckpointError where they are not as many."""
    if len(states) != len(generators):
        raise CheckpointError(path, f"it has {len(states)} streams of random numbers, the run {len(generators)}")
    for generator, state in zip(generators, states):
        restore_generator(generator, state, path)


def restore_generator(generator, state, path):
    """generator.set_state(state), a part of the file `path`; raises CheckpointError where it is none."""
    try:
        generator.set_state(state.cpu())
    except (RuntimeError, TypeError) as e:
        raise CheckpointError(path, "the state of the random numbers is none") from e


def read_run(path, config):
    """The checkpoint of a run with the settings `config`, a dict, or None: any; None where the file is not there.

    Raises CheckpointError for a damaged file, ValueError for that of another run, naming what differs.
    """
    path = Path(path)
    if not path.exists():
        return None
    lists = lambda check: lambda x: isinstance(x, list) and len(x) > 0 and all(
        isinstance(own, list) and all(map(check, own)) for own in x)  # for each process a list
    saved = read_checkpoint(path, {"scene": dictionary, "optimiser": dictionary, "generators": lists(random_state),
                                   "step": count, "stages": lists(dictionary),
                                   "frames": lambda x: isinstance(x, list) and len(x) > 0 and all(map(picture, x)),
                                   "config": text})
    try:
        old = json.loads(saved["config"])
        assert config is None or isinstance(old, dict)
    except (ValueError, RecursionError, AssertionError) as e:
        raise CheckpointError(path, "config is wrong") from e
    if config is not None:
        new = json.loads(json.dumps(config))
        changed = [key for key in new if key != "versions" and old.get(key) != new[key]]
        if changed:
            raise ValueError(f"{path.parent}: cannot resume, it was made with another {', '.join(changed)}")
    return saved


def picture(value):
    """Whether a value is a frame of an animation, uint8 [H,W,3]."""
    return (isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 3 and value.shape[2] == 3
            and 0 < value.numel() < 2 ** 26)


def restore_stages(stages, saved, path):
    """Hand the stages of an edit the states that they had; raises CheckpointError where these are no such states.

    Each stage has `state`, a dict with the keys that its saved state must have.
    """
    if len(saved) != len(stages) or any(set(own) != set(stage.state) for stage, own in zip(stages, saved)):
        raise CheckpointError(path, "it has other stages")
    for stage, own in zip(stages, saved):
        views = len(stage.scene.scene.train) if hasattr(stage.scene, "scene") else 0
        for key, value in own.items():
            if key == "views":
                right = isinstance(value, list) and all(view is None or _view(view, views) for view in value)
            elif key == "rounds":
                right = count(value)
            elif key in ("pixels", "first"):
                right = value is None or (isinstance(value, torch.Tensor) and value.dtype == torch.uint8
                                          and value.ndim == 2 and value.shape[1] == 3)
            else:
                right = isinstance(value, list) and all(_view(view, views) for view in value)
            if not right:
                raise CheckpointError(path, f"{key} of its stages is wrong")
        stage.state = own


def _view(value, views):
    """Whether a value is the number of one of `views` views, or the shift of a drawing in pixels."""
    if isinstance(value, (tuple, list)):
        return not views and len(value) == 2 and all(is_number(x, -1e6, 1e6) for x in value)
    return count(value) and value < views


def fingerprint(module):
    """sha256 in hexadecimal of all that a module's state_dict holds."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
