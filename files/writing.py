"""Atomic writes, locks against a second run in the same folder, and one line for every error."""
import contextlib
import io
import os
import secrets
import warnings
from pathlib import Path

import torch
from PIL import Image

from files.messages import one_line

try:
    import fcntl
except ImportError:  # Windows: no locks, so that users must keep two runs apart themselves
    fcntl = None


@contextlib.contextmanager
def replacing(path):
    """A temporary path in the same folder: it replaces `path` at the end and is removed after an error.

        with replacing("out/result.svg") as part:
            part.write_bytes(data)

    Raises OSError if the folder is missing, not writable, or full; `path` is then unchanged.
    """
    path = Path(path)
    # the random part separates runs with equal process ids, as in two containers
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        with open(part, "rb") as file:  # or a power cut could leave an empty file under the final name
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        raise OSError(f"{path}: cannot be written: {e.strerror or one_line(e)}") from e
    finally:
        with contextlib.suppress(OSError):  # a disk that turned read-only
            part.unlink(missing_ok=True)


def check_writable(folder):
    """Raise OSError if the folder cannot be made or written to; writes nothing."""
    folder = Path(folder)
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as e:  # a name that is too long
        raise OSError(f"{folder}: cannot be written: {e.strerror}") from e
    if not there.is_dir():
        raise OSError(f"{folder}: cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{folder}: cannot be written: no permission for {there}")


@contextlib.contextmanager
def locked(path, wait=False):
    """Context in which this run alone holds the lock on `path`, a file that need not exist, in a folder that does.

    The lock ends with the process, however that ends. Partial files of `path` that killed runs left are removed; for
    `folder / "run"`, all partial files in the folder.

    Raises OSError if another run holds the lock; with `wait`, waits for its end instead.
    """
    path = Path(path)
    lock, handle = path.with_name(f".{path.name}.lock"), None
    while fcntl and handle is None:
        try:
            handle = open(lock, "ab")
        except OSError as e:
            raise OSError(f"{path.parent}: cannot be written: {e.strerror}") from e
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            if not wait:
                handle.close()
                raise OSError(f"{path.parent}: another run is writing there; wait or choose another --out") from e
            warnings.warn(f"{path}: another run is writing it, this one waits", stacklevel=3)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            break
        if not lock.exists() or os.fstat(handle.fileno()).st_ino != lock.stat().st_ino:
            handle.close()  # the other run removed the file while this one waited
            handle = None
    try:
        run = (".*.part", "export/.*.part", "export/*/.*.part")
        patterns = run if path.name == "run" else (f".{path.name}.*.part",)
        for part in [part for pattern in patterns for part in path.parent.glob(pattern)]:
            with contextlib.suppress(OSError):
                part.unlink()
        yield
    finally:
        if handle:
            with contextlib.suppress(OSError):
                lock.unlink()
            handle.close()


def write(path, what):
    """Write a PIL picture (PNG), a list of frames (GIF), text, bytes or a checkpoint, atomically."""
    with replacing(path) as part:
        if isinstance(what, Image.Image):
            what.save(part, format="PNG")
        elif isinstance(what, list):
            what[0].save(part, format="GIF", save_all=True, append_images=what[1:] + what[-1:] * 15, duration=80,
                         loop=0)
        elif isinstance(what, (str, bytes)):
            part.write_bytes(what.encode() if isinstance(what, str) else what)
        else:
            whole = io.BytesIO()  # torch.save to a file hides a full disk behind a RuntimeError
            torch.save(what, whole)
            part.write_bytes(whole.getbuffer())
