"""The course of a fit to a scene: its time limit, progress bar and checkpoints.

    course = Course(scene, sizes, seconds=60, checkpoint="fit.pt")
    for step in course.run(optimiser, generator, lambda: {"nerf": nerf.state_dict()}):
        ...                                        # an optimiser step at a rate that depends on course.share(step)
        course.report(loss, error)
"""
import hashlib
import io
import json
import math
import time
from pathlib import Path

import torch

from files.checkpoint import (
    CheckpointError,
    count,
    dictionary,
    list_of,
    random_state,
    read_checkpoint,
    restore_generator,
    restore_optimiser,
    text,
)
from files.checkpoint import seconds as seconds_of
from files.messages import one_line
from files.writing import check_writable, replacing
from loop import parallel
from loop.progress import progress as progress_bar


def kept_in(path, scene, sizes):
    """The checkpoint file for a scene and the sizes of its model: out/apple-nerf -> out/apple-nerf-1a2b3c4d-fit.pt.

    The hash in its name covers the photographs at the resolution that is fitted, and the sizes. A second scene of the
    same name, or the same one with another --downscale, therefore has a fit of its own.
    """
    key = hashlib.sha256(f"{scene.fingerprint} {json.dumps(sizes, sort_keys=True)}".encode()).hexdigest()
    return Path(path).with_name(f"{Path(path).name}-{key[:8]}-fit.pt")


class Course:
    """Everything that a fit does around its steps.

    Attributes:
        step, spent: number of steps done, and their seconds; for a resumed fit, since its beginning.
        errors, ended: mean errors of the tenths of the time that are over; whether they have stopped falling.
        saved: contents of the checkpoint to be resumed, until `run`; None for a new fit.
    """

    def __init__(self, scene, sizes, checks, seconds=None, steps=None, checkpoint=None, device="cpu"):
        """
        Args:
            sizes: a dict; only a checkpoint with the same sizes is resumed.
            checks: {key that a checkpoint must hold besides: function of its value, true if it is valid}.
            seconds, steps: limits, see `share`; 60 seconds if neither is given.
            checkpoint: a path, or None. An existing file is resumed.
            device: seconds are process CPU time on a CPU, wall time elsewhere.
        Raises:
            CheckpointError: the checkpoint is damaged.
            ValueError: a checkpoint of another scene or of other sizes; non-positive seconds; a device without float64.
            OSError: the checkpoint could not be written.
        """
        if torch.device(device).type == "mps":  # volume rendering sums in it, and splats are moved to their tiles in it
            raise ValueError("scenes need float64, which mps lacks: use --device cpu")
        self.clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"the seconds of a fit must be positive, got {seconds}")
        self.scene, self.sizes = scene, sizes
        self.seconds, self.steps = 60 if seconds is None and steps is None else seconds, steps
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.step, self.spent, self.saved = 0, 0.0, None
        self.errors, self.recent, self.tenth, self.ended = [], [], 0, False
        if self.checkpoint:
            check_writable(self.checkpoint.parent)  # fail before the fit, not after it
            if self.checkpoint.exists():
                self.saved = self._read(checks, device)
                self.step, self.spent = self.saved["step"], self.saved["spent"]
                self.ended = self.saved.get("ended") is True

    def _read(self, checks, device):
        path = self.checkpoint
        saved = read_checkpoint(path, {"fingerprint": text, "sizes": dictionary, "step": count, "spent": seconds_of,
                                       "optimiser": dictionary, "generator": random_state} | checks, device,
                                "checkpoint of a fit")
        if saved["fingerprint"] != self.scene.fingerprint:
            raise ValueError(one_line(f"{path}: is the fit of another scene than {self.scene.path}; delete it to fit "
                                      "anew"))
        if not all(isinstance(size, (bool, int, float, str, type(None))) for size in saved["sizes"].values()):
            raise CheckpointError(path, "'sizes' is wrong")
        if not list_of(random_state)(saved.get("others", [])):
            raise CheckpointError(path, "'others' is wrong")
        if saved["sizes"] != self.sizes:
            raise ValueError(one_line(f"{path}: was made with sizes {saved['sizes']}, not {self.sizes}; delete it to "
                                      "fit anew"))
        return saved

    def share(self, step):
        """Share of the fit that is done before a step, from 0: of the steps or of the time, whichever is larger; 1 if
        it has stopped gaining."""
        if self.ended:
            return 1.0
        of_steps = 0.0 if self.steps is None else step / self.steps if self.steps else 1.0
        return max(of_steps, self.spent / self.seconds if self.seconds else 0.0)

    def run(self, optimiser, generator, state, progress=True):
        """Yield the numbers of the remaining steps, which the caller takes. The clock starts now.

        A checkpoint is written every 15 seconds and at the end. For a finished fit there are no steps and no writes.

        Args:
            optimiser, generator: restored from the resumed checkpoint, and stored in the next ones.
            state: function that returns a dict of everything else that checkpoints hold.
            progress: show a progress bar.
        """
        if self.saved:
            restore_optimiser(optimiser, self.saved["optimiser"], self.checkpoint)
            if self.share(self.step) < 1:
                streams = [self.saved["generator"], *self.saved.get("others", [])]
                if len(streams) != parallel.world():
                    raise CheckpointError(self.checkpoint, f"{len(streams)} processes began it, not {parallel.world()}")
                restore_generator(generator, streams[parallel.rank()], self.checkpoint)
            self.saved = None  # frees its memory
        started = self.clock() - self.spent

        written, first = time.monotonic(), self.step
        with progress_bar(total=self.steps, initial=first, desc="fit", unit="step",
                          disable=not progress or parallel.rank() > 0) as self.bar:
            while self.share(self.step) < 1:
                yield self.step
                self.step += 1
                self.bar.update()
                self.spent = parallel.largest(self.clock() - started)  # so that all processes stop at the same step
                if self.checkpoint and parallel.largest(time.monotonic() - written) > 15:
                    self._keep(optimiser, generator, state)
                    written = time.monotonic()
        if self.checkpoint and (self.step > first or not self.checkpoint.exists()):
            self._keep(optimiser, generator, state)

    def _keep(self, optimiser, generator, state):
        """Write the checkpoint."""
        first, *others = parallel.gathered([generator.get_state().cpu()])
        if parallel.rank():
            return
        whole = io.BytesIO()  # torch.save to a path hides a full disk behind a RuntimeError
        torch.save(state() | dict(step=self.step, spent=self.spent, ended=self.ended, optimiser=optimiser.state_dict(),
                                  generator=first, others=others, sizes=self.sizes,
                                  fingerprint=self.scene.fingerprint), whole)
        with replacing(self.checkpoint) as part:
            part.write_bytes(whole.getbuffer())

    GAIN = 0.993  # a fit has stopped gaining if the error falls by less from two tenths of the time to the next two

    def report(self, loss, error, figures=dict):
        """Update the figures beside the progress bar, every 20th step: each time waits for the device.

        A fit that only the time limits ends once it has stopped gaining.

        Args:
            loss, error: tensors of one element; error is a mean square, shown as PSNR.
            figures: a function that returns a dict of further figures to show.
        Raises:
            FloatingPointError: the loss is not finite.
        """
        if self.steps is None:
            self.recent.append(error)
        if self.step % 20:
            return
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{self.scene.path}: the loss is {loss.item()} at step {self.step}")
        psnr = -10 * math.log10(error.item() + 1e-12)
        self.bar.set_postfix(psnr=f"{psnr:.1f} dB", **figures(), refresh=False)
        if self.steps is None and int(10 * self.spent / self.seconds) != self.tenth:
            self.tenth = int(10 * self.spent / self.seconds)
            self.errors.append(torch.stack(self.recent).mean().item())
            self.recent = []
            *_, a, b, c, d = 0, 0, 0, 0, *self.errors
            self.ended = bool(parallel.largest(len(self.errors) > 5 and c + d > self.GAIN * (a + b)))
