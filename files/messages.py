"""Errors in one line: command lines, exit codes, and what libraries report over many lines."""
import argparse
import re
import sys

import torch


def one_line(error, longest=500):
    """The text of an error or a message on one line; the middle of a long one is left out."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest // 2]} ... {text[-longest // 2:]}"


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line, without the usage of fifty options before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


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


def exit_code(program, call):
    """Run call() and return its exit code, 0 for None; every error that a user can cause prints one line on stderr.

    130: Ctrl-C. 2: bad input, a file that cannot be read or written, memory that ran out. 1: a loss that is not finite.
    Other errors propagate: they are faults of the program.
    """
    try:
        return call() or 0
    except KeyboardInterrupt as e:
        print(f"{program}: interrupted{': ' if e.args else ''}{one_line(e) if e.args else ''}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("(out of|not enough|allocate) memory", str(e), re.I):
            raise
        print(f"{program}: error: {one_line(e, 1000)}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"{program}: {one_line(e)}", file=sys.stderr)
        return 1
