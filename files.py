"""Writing a file in one piece or not at all; the only place that does it."""
import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """A path in the same folder to write to: at the end it takes the place of `path`, after an error it vanishes.

        with replacing("out/result.svg") as part:
            part.write_bytes(data)

    Raises OSError where the folder is missing, cannot be written to, or is full; `path` is then as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
