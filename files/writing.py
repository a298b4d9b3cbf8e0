"""Writing a file in one piece or not at all, one run at a time in a folder, and one line for every error."""
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
except ImportError:  # Windows: two runs in one folder are then the user's own care
    fcntl = None


@contextlib.contextmanager
def replacing(path):
    """A path in the same folder to write to: at the end it takes the place of `path`, after an error it vanishes.

        with replacing("out/result.svg") as part:
            part.write_bytes(data)

    Raises OSError where the folder is missing, cannot be written to, or is full; `path` is then as it was.
    """
    path = Path(path)
    # the random part keeps two runs apart that have one number, as in two containers
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        with open(part, "rb") as file:  # else a power cut could leave an empty file under the final name
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        raise OSError(f"{path}: cannot be written: {e.strerror or one_line(e)}") from e
    finally:
        with contextlib.suppress(OSError):  # a disk that turned read-only
            part.unlink(missing_ok=True)


def check_writable(folder):
    """Raise OSError where the folder cannot be made or written to. Nothing is written to find that out."""
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
    """Within it no other run holds the lock on `path`, a file in a folder that exists, which need not exist itself.

    The lock ends with the process, however it ends. What killed runs left half-written of `path` is removed; of a folder
    whose lock is folder / "run", all that they left there.

    Raises OSError where another run holds it; with `wait`, waits for the end of that run instead.
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
                raise OSError(f"{path.parent}: another run is writing there, wait for it or choose another --out") from e
            warnings.warn(f"{path}: another run is making it, this one waits for its end", stacklevel=3)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            break
        if not lock.exists() or os.fstat(handle.fileno()).st_ino != lock.stat().st_ino:
            handle.close()  # the run before removed the file while this one was waiting
            handle = None
    try:
        patterns = (".*.part", "export/.*.part", "export/*/.*.part") if path.name == "run" else (f".{path.name}.*.part",)
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
    """Write a picture, the frames of an animation, text, bytes or a checkpoint; never leaves half a file."""
    with replacing(path) as part:
        if isinstance(what, Image.Image):
            what.save(part, format="PNG")
        elif isinstance(what, list):
            what[0].save(part, format="GIF", save_all=True, append_images=what[1:] + what[-1:] * 15, duration=80,
                         loop=0)
        elif isinstance(what, (str, bytes)):
            part.write_bytes(what.encode() if isinstance(what, str) else what)
        else:
            whole = io.BytesIO()  # torch's own writing of files hides a full disk behind a RuntimeError
            torch.save(what, whole)
            part.write_bytes(whole.getbuffer())
