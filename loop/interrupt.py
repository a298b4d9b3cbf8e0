"""TODO docstring."""
import signal

from loop import parallel


class DelayedInterrupt:
    """Within it Ctrl-C only sets .seen, so that no step is left half done; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.seen, self.before = False, None
        # A job in the background ignores Ctrl-C, and a host program may handle it itself: both stay as they are.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        self.seen = True
        if parallel.world() == 1:  # torchrun passes on what the terminal has sent to all processes already
            signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        if self.before:
            signal.signal(signal.SIGINT, self.before)
