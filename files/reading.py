"""Reading: JSON files of a bounded size, numbers in them, hashes of files."""
import hashlib
import json
import math
from pathlib import Path

from files.messages import one_line

POINTER = "is a Git LFS pointer, not the file itself: run git lfs pull"


def digest(paths):
    """sha256 in hexadecimal of the concatenated files, read in chunks. Raises OSError."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(2 ** 20):
                total.update(piece)
    return total.hexdigest()


def first_bytes(path, count):
    """The first bytes of a file; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except (OSError, ValueError):
        return b""


def is_pointer(data):
    """Whether the bytes of a file are a Git LFS pointer, which stands in for a file that was not downloaded."""
    return data.startswith(b"version https://git-lfs")


def refuse_pointer(path, shown=None):
    """Raise ValueError if a file is a Git LFS pointer; shown: its name in the message, None: the path."""
    if is_pointer(first_bytes(path, 40)):
        raise ValueError(f"{shown or path}: {POINTER}")


def read_json(path, largest=2 ** 28, hint=""):
    """The dict in a JSON file of at most `largest` bytes; anything else raises ValueError, which ends in `hint`."""
    path = Path(path)
    refuse_pointer(path)
    try:
        if path.stat().st_size > largest:
            raise ValueError(f"it is larger than {largest >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        reason = one_line(e.strerror if isinstance(e, OSError) else e, 200)
        raise ValueError(f"{path}: no readable JSON: {reason}{hint}") from e
    return value


def is_number(value, low=-math.inf, high=math.inf):
    """Whether a value read from JSON is a finite number in [low, high]; true and false are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e300 < value < 1e300 and low <= value <= high
