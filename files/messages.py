"""Errors in one line: command lines, exit codes, and what libraries report over many lines."""
import argparse
import datetime
import hashlib
import os
import re
import sys

import torch
import torch.distributed as dist


def one_line(error, longest=500):
    """The text of an error or a message on one line; the middle of a long one is left out."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest // 2]} ... {text[-longest // 2:]}"


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line, without the usage of fifty options before it."""

    def error(self, message):
        report(f"{self.prog}: error: {one_line(message)}")
        self.exit(2)


def number(kind, low, high=None):
    """Type for argparse: a finite number in [low, high]."""
    def convert(text):
        value = kind(text)
        if not (low <= value and (high is None or value <= high)) or value in (float("inf"),):
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. {'' if high is None else high}")
        return value
    convert.__name__ = kind.__name__
    return convert


def device(name):
    """Type for argparse: the name of a torch device that is available."""
    try:
        torch.zeros(1, device=name)
    except Exception as e:  # torch raises another error for each kind of device
        raise argparse.ArgumentTypeError(f"{name}: {one_line(e, 100)}") from e
    return name


def report(line):
    """Print a line on stderr, unless another process of torchrun has printed the same one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself holds what its processes share
        try:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                  timeout=datetime.timedelta(seconds=10))
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            if store.add(f"pds/{restart}/{hashlib.sha256(line.encode()).hexdigest()}", 1) > 1:
                return
        except (RuntimeError, AttributeError, KeyError):  # torchrun is gone, or torch has no torch.distributed
            pass
    print(line, file=sys.stderr, flush=True)


def exit_code(program, call):
    """Run call() and return its exit code, 0 for None; every error that a user can cause prints one line on stderr.

    130: Ctrl-C. 2: bad input, a file that cannot be read or written, memory that ran out. 1: a loss that is not finite.
    Other errors propagate: they are faults of the program.
    """
    try:
        return call() or 0
    except KeyboardInterrupt as e:
        report(f"{program}: interrupted{': ' if e.args else ''}{one_line(e) if e.args else ''}")
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("(out of|not enough|allocate) memory", str(e), re.I):
            raise
        report(f"{program}: error: {one_line(e, 1000)}")
        return 2
    except FloatingPointError as e:
        report(f"{program}: {one_line(e)}")
        return 1
