"""Ctrl-C during an optimisation: it ends between two steps."""
import signal

from loop import parallel


class DelayedInterrupt:
    """A context in which Ctrl-C only sets `seen`, so that no step is interrupted; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.seen, self.before = False, None
        # a background job ignores Ctrl-C, and a host program may handle it: neither is changed
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        """The signal handler."""
        self.seen = True
        if parallel.world() == 1:  # torchrun forwards a signal that the terminal has sent to all processes already
            signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        if self.before:
            signal.signal(signal.SIGINT, self.before)
