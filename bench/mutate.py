"""The mutator behind `python -m bench fuzz-scenes`: sound files, one of which is spoiled, and how a call on them ends.

    files = {"a.json": File({"steps": 5, "rates": [0.1, 0.2]}), "b.png": File(png_bytes)}
    spoil(random.Random(0), files, folder)         # written to the folder, one of them with a value or bytes replaced
    end, seconds, megabytes = measured(lambda: read(folder), folder)
"""
import copy
import json
import math
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.measure import memory_status

SECONDS, MEGABYTES = 5, 1000  # that a call may take
GONE = object()  # removes the value
EVIL = (None, True, False, "", "x", "12", "/", "..", "a\nb", "y" * 5000, "\0", [], {}, [1], math.nan, math.inf,
        -math.inf, -1, 0, 1, 2, 0.5, -0.5, 1e-308, 1e-9, 1e3, 1e6, 1e10, -1e10, 1e30, -1e30, 1e38, 1e308, -1e308,
        10 ** 400, 2 ** 63, 180, 179.999, 360, 3.2, math.pi, 800.0)


def any_value(key, old):
    """Replacements for a value of a JSON file: lists of choices; a list is drawn first, then a choice from it."""
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    return [(GONE, *EVIL)] + ([[old * factor for factor in (-1, 1e-4, 0.1, 0.9, 1.1, 30, 1e5)]] if number else [])


def as_bytes(value):
    """A value as JSON; bytes as they are."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


class File(NamedTuple):
    """A sound file: bytes, or a value of nested lists and dicts and how it is encoded.

    evil: a function like any_value, or what it returns; weight: relative probability that this file is the damaged one;
    damage: probability that its bytes are damaged instead of its values.
    """
    value: object
    encode: Callable = as_bytes
    evil: Callable | list = any_value
    weight: float = 1
    damage: float = 0.1


def spoil(rng, files, place):
    """Write files {path relative to `place`: File}, one of them damaged."""
    spoiled = rng.choices(list(files), [file.weight for file in files.values()])[0]
    for name, file in files.items():
        bytewise = isinstance(file.value, bytes) or rng.random() < file.damage
        data = file.encode(mutated(rng, file.value, file.evil) if name == spoiled and not bytewise else file.value)
        data = damaged(rng, data) if name == spoiled and bytewise else data
        if data is not None:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)


def mutated(rng, value, evil):
    """A copy with one or two values replaced or removed. The walk descends level by level, so that a key next to a long
    list is hit as often as the whole list."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        inner, at, key = [value], 0, None
        while isinstance(inner[at], (list, dict)) and inner[at] and (key is None or rng.random() < 0.9):
            inner = inner[at]
            at = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            key = at if isinstance(at, str) else key or ""
        new = rng.choice(rng.choice(evil(key, inner[at]) if callable(evil) else evil))
        if new is not GONE:
            inner[at] = new
        elif key is not None:
            del inner[at]
    return value


def damaged(rng, data):
    """Bytes truncated, partly overwritten, doubled or replaced; None: no file."""
    kind, data = rng.random(), bytearray(data or b" ")
    if kind < 0.05:
        return rng.choice((None, b"", b"\xff" * 64, bytes(data) * 2))
    if kind < 0.4:
        return bytes(data[:rng.randrange(len(data))])
    for _ in range(rng.randrange(1, 12)):
        data[rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(data)


def rows_of(value):
    """A value as a list of lists, whatever it was replaced by."""
    return [row if isinstance(row, list) else [row] for row in value] if isinstance(value, list) else []


def as_text(rows, end="\n"):
    return "".join(" ".join(map(str, row)) + end for row in rows_of(rows)).encode(errors="surrogatepass")


def packed(form, row, order="<"):
    """Numbers packed by struct, with all bits set where one does not fit; "s": a zero-terminated name."""
    data = b""
    for kind, value in zip(form, row, strict=False):
        try:
            data += f"{value}\0".encode() if kind == "s" else struct.pack(order + kind, value)
        except (struct.error, OverflowError):
            data += b"\xff" * struct.calcsize(order + kind)
    return data


def measured(call, place):
    """How a call on the files in a folder ended ("read", "refused", or what went wrong), its seconds of CPU time, and
    the MB by which memory grew. It is stopped after four times SECONDS of CPU time, or fifty times SECONDS in all."""
    def stop(*_):
        raise TimeoutError
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, 4 * SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, 50 * SECONDS))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:  # Linux alone can reset the peak of memory
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    memory, started = memory_status("VmRSS"), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = ending(call, place)
    finally:
        for (timer, number, _), old in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, old)
    seconds, memory = time.process_time() - started, memory_status("VmHWM") - memory
    if end in ("read", "refused") and seconds > SECONDS:
        end = f"{end} in {seconds:.1f} s"
    if end in ("read", "refused") and memory > MEGABYTES:
        end = f"{end} with {memory:.0f} MB"
    return end, seconds, memory


def ending(call, place):
    """How a call ended; a tensor that it returns must be finite."""
    try:
        result = call()
        finite = not isinstance(result, torch.Tensor) or torch.isfinite(result).all()
        return "read" if finite else "a result that is not finite"
    except TimeoutError:
        return "it hangs"
    except (ValueError, OSError) as e:
        poor = "\n" in str(e) or str(place) not in str(e) or type(e) in (ValueError, OSError) and ": " not in str(e)
        return f"a poor message: {type(e).__name__}: {e}" if poor else "refused"
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]} at {traceback.extract_tb(e.__traceback__)[-1]}"
