"""Checkpoints of runs and fits, validated as they are read; no pickled code runs.

    saved = read_checkpoint("out/checkpoint.pt", {"step": count, "scene": dict})
    restore(scene, saved["scene"], "out/checkpoint.pt")
    restore_optimiser(adam, saved["optimiser"], "out/checkpoint.pt")
"""
import hashlib
import json
from pathlib import Path

import torch

from files.messages import one_line
from files.reading import is_number, refuse_pointer


class CheckpointError(ValueError):
    """A file of an earlier run that cannot be used: one line with its name, the reason and what to do."""

    def __init__(self, path, reason, what="checkpoint"):
        super().__init__(one_line(f"{path}: no readable {what}: {one_line(reason, 200)}; delete it to start over"))


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


def list_of(check, least=0):
    """The check whether a value is a list of at least `least` items, each of which passes a check."""
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(check, value))


def random_state(value):
    """Whether a value may be the state of a torch.Generator."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 1 and len(value) >= 16


def read_checkpoint(path, needs, device="cpu", what="checkpoint"):
    """The dict that torch.save has written to a file.

    Args:
        needs: {key: check of its value}; other keys are ignored.
        device: where its tensors go.
        what: the kind of file, for the error message.
    Raises:
        CheckpointError: the file cannot be read, holds no dict, or a needed value is missing or fails its check.
    """
    try:
        refuse_pointer(path)
        # explicit, since an environment variable can make torch run pickled code by default
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # damaged files raise a dozen kinds of errors
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
    """module.load_state_dict(state), where `state` is part of the file `path`; CheckpointError if it does not fit."""
    wanted = module.state_dict()
    if not dictionary(state) or set(state) != set(wanted):
        raise CheckpointError(path, "its tensors are not those of the scene")
    for name, like in wanted.items():
        if not same_kind(state[name], like):
            raise CheckpointError(path, f"{name} has another shape than the scene's, or is not finite")
    module.load_state_dict(state)


def restore_optimiser(optimiser, state, path):
    """Load the state of an Adam, part of the file `path`; raises CheckpointError if it does not fit.

    Only the moments, the step counts and the current learning rates are taken; all other settings of `optimiser` stay.
    """
    own = [dict(group) for group in optimiser.param_groups]
    try:
        optimiser.load_state_dict(state)
        for group, before in zip(optimiser.param_groups, own, strict=True):
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
    except Exception as e:  # load_state_dict has no single error for damaged states
        raise CheckpointError(path, f"the optimiser's state does not fit: {one_line(e, 100)}") from e


def restore_generators(generators, states, path):
    """Set the states of several generators; raises CheckpointError if their number differs."""
    if len(states) != len(generators):
        raise CheckpointError(path, f"it holds {len(states)} random number streams, the run has {len(generators)}")
    for generator, state in zip(generators, states, strict=True):
        restore_generator(generator, state, path)


def restore_generator(generator, state, path):
    """generator.set_state(state), where `state` is part of the file `path`; CheckpointError if invalid."""
    try:
        generator.set_state(state.cpu())
    except (RuntimeError, TypeError) as e:
        raise CheckpointError(path, "the state of the random numbers is invalid") from e


def read_run(path, config):
    """The checkpoint of a run, or None if the file does not exist.

    Args:
        config: the settings that it must have been made with, a dict; None accepts any.
    Raises:
        CheckpointError: a damaged file. ValueError: the file of another run; the message names what differs.
    """
    path = Path(path)
    if not path.exists():
        return None
    saved = read_checkpoint(path, {"scene": dictionary, "optimiser": dictionary, "step": count, "config": text,
                                   "frames": list_of(picture, 1),
                                   # a list for each process
                                   "generators": list_of(list_of(random_state), 1),
                                   "stages": list_of(list_of(dictionary), 1)})
    try:
        old = json.loads(saved["config"])
        assert config is None or isinstance(old, dict)
    except (ValueError, RecursionError, AssertionError) as e:
        raise CheckpointError(path, "config is wrong") from e
    if config is not None:
        new = json.loads(json.dumps(config))
        changed = [key for key in new if key != "versions" and old.get(key) != new[key]]
        if changed:
            raise ValueError(f"{path.parent}: cannot resume: the earlier run differs in {', '.join(changed)}")
    return saved


def picture(value):
    """Whether a value is a frame of an animation, uint8 [H,W,3]."""
    return (isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 3 and value.shape[2] == 3
            and 0 < value.numel() < 2 ** 26)


def restore_stages(stages, saved, path):
    """Hand the stages of an edit the states that they had; raises CheckpointError for states of other stages.

    A stage has `state`, a dict, and `checks`, a check for each of its keys.
    """
    if [own.keys() for own in saved] != [stage.state.keys() for stage in stages]:
        raise CheckpointError(path, "its stages are not those of the run")
    for stage, own in zip(stages, saved, strict=True):
        for key, value in own.items():
            if not stage.checks[key](value):
                raise CheckpointError(path, f"{key} of its stages is wrong")
        stage.state = own


def optional(check):
    """The check whether a value is None or passes a check."""
    return lambda value: value is None or check(value)


def below(most):
    """The check whether a value is a whole number from 0 to below `most`, such as the number of a view."""
    return lambda value: count(value) and value < most


def shift(value):
    """Whether a value is a displacement of a drawing in pixels."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(is_number(x, -1e6, 1e6) for x in value)


def pixels(value):
    """Whether a value is the pixels of pictures, uint8 [N,3]."""
    return (isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.ndim == 2 and value.shape[1] == 3)


def fingerprint(module):
    """sha256 in hexadecimal of a module's state_dict: names, number formats, shapes and values."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
