"""Progress of a long loop: a bar on a terminal, elsewhere a line every ten seconds."""
import sys

from tqdm import tqdm

EVERY = 10  # seconds between lines


class _Lines:
    """Standard error for tqdm with each state of the bar on a line of its own, instead of over the previous one."""

    def write(self, text):
        text = text.strip("\r\n \x1b[A")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(*args, **options):
    """tqdm with these arguments, whose bar suits where standard error goes."""
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(*args, **options)
    return tqdm(*args, mininterval=EVERY, maxinterval=EVERY, file=_Lines(), ncols=100, ascii=True, **options)
