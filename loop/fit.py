"""The course of a fit to a scene: its time, its progress bar and its checkpoints.

    fit = Fit(scene, sizes, seconds=60, checkpoint="fit.pt")
    for step in fit.run(optimiser, generator, lambda: {"nerf": nerf.state_dict()}):
        ...                                        # a step of the optimiser, its rate scaled by fit.share(step)
        fit.report(loss, error)
"""
import contextlib
import hashlib
import io
import json
import math
import time
from pathlib import Path

import torch

from files.checkpoint import (CheckpointError, count, dictionary, random_state, read_checkpoint, restore_generator,
                              restore_optimiser, seconds as seconds_of, text)
from files.writing import check_writable, replacing
from loop import parallel
from loop.progress import progress as progress_bar
from scene.captures import SceneError


def kept_in(path, scene, sizes):
    """The file that keeps the fit of a scene with these sizes: out/apple-nerf -> out/apple-nerf-1a2b3c4d-fit.pt.

    Its name holds what tells fits apart: the photographs as they are fitted, reduced too, and the sizes. So a second
    scene of the same name, or the same one with another --downscale, has a fit of its own.
    """
    key = hashlib.sha256(f"{scene.fingerprint} {json.dumps(sizes, sort_keys=True)}".encode()).hexdigest()
    return Path(path).with_name(f"{Path(path).name}-{key[:8]}-fit.pt")


class Fit:
    """What every fit does around its steps.

    Attributes:
        step, spent: how many steps are done, and the seconds that they took; of a resumed fit, all of them.
        saved: what the checkpoint that is resumed holds, until `run`; None for a new fit.
    """

    def __init__(self, scene, sizes, names=(), seconds=None, steps=None, checkpoint=None, device="cpu"):
        """
        Args:
            sizes: a dict; only a checkpoint of a fit with the same sizes is resumed.
            names: of what its checkpoints must hold besides; or {name: function of the value, true where it is right}.
            seconds, steps: see `share`. 60 seconds if neither is given.
            checkpoint: a path, or None. The file there, if there is one, is resumed.
            device: on a CPU, seconds are process CPU time; elsewhere they are wall time.
        Raises:
            SceneError: the checkpoint is damaged, of another scene or of other sizes.
            OSError: it could not be written.
            ValueError: seconds are not positive; the device has no float64.
        """
        if torch.device(device).type == "mps":  # volume rendering sums in it, and splats are moved to their tiles in it
            raise ValueError("a scene is fitted and drawn in float64, which mps lacks: take --device cpu")
        self.clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"the seconds of a fit must be positive, got {seconds}")
        self.scene, self.sizes = scene, sizes
        self.seconds, self.steps = 60 if seconds is None and steps is None else seconds, steps
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.step, self.spent, self.saved = 0, 0.0, None
        if self.checkpoint:
            check_writable(self.checkpoint.parent)  # before the minutes of the fit, not after them
            if self.checkpoint.exists():
                self.saved = self._read(names, device)
                self.step, self.spent = self.saved["step"], self.saved["spent"]

    @contextlib.contextmanager
    def reading(self):
        """Within it what is wrong with the checkpoint is a SceneError."""
        try:
            yield
        except CheckpointError as e:
            raise SceneError(e) from e

    def _read(self, names, device):
        path = self.checkpoint
        checks = names if isinstance(names, dict) else dict.fromkeys(names, lambda value: True)
        with self.reading():
            saved = read_checkpoint(path, {"fingerprint": text, "sizes": dictionary, "step": count, "spent": seconds_of,
                                           "optimiser": dictionary, "generator": random_state} | checks, device,
                                    "checkpoint of a fit")
        if saved["fingerprint"] != self.scene.fingerprint:
            raise SceneError(f"{path}: is the fit of another scene than {self.scene.path}; delete it to fit anew")
        if saved["sizes"] != self.sizes:
            raise SceneError(f"{path}: has other sizes, {saved['sizes']}, than {self.sizes}; delete it to fit anew")
        return saved

    def share(self, step):
        """Share of the fit that is done before a step, from 0: of its steps or of its time, whichever is larger."""
        of_steps = 0.0 if self.steps is None else step / self.steps if self.steps else 1.0
        return max(of_steps, self.spent / self.seconds if self.seconds else 0.0)

    def run(self, optimiser, generator, state, progress=True):
        """The numbers of the steps that are left, to be taken by the caller. The clock starts now.

        A checkpoint is written every 15 seconds and at the end; a fit that had its time takes no step and leaves
        its checkpoint as it is.

        Args:
            optimiser, generator: restored from the checkpoint that is resumed, and kept in the next ones.
            state: called for a dict, which the checkpoints hold besides.
            progress: show a bar.
        """
        if self.saved:
            with self.reading():
                restore_optimiser(optimiser, self.saved["optimiser"], self.checkpoint)
                if self.share(self.step) < 1:
                    streams = [self.saved["generator"], *self.saved.get("others", [])]
                    if len(streams) != parallel.world():
                        raise CheckpointError(self.checkpoint, f"{len(streams)} processes began it, not {parallel.world()}")
                    restore_generator(generator, streams[parallel.rank()], self.checkpoint)
            self.saved = None  # its memory is free
        started = self.clock() - self.spent

        def keep():
            first, *others = parallel.gathered([generator.get_state().cpu()])
            if parallel.rank():
                return
            whole = io.BytesIO()  # torch's own writing of files hides a full disk behind a RuntimeError
            torch.save(state() | dict(step=self.step, spent=self.spent, optimiser=optimiser.state_dict(),
                                      generator=first, others=others, sizes=self.sizes,
                                      fingerprint=self.scene.fingerprint), whole)
            with replacing(self.checkpoint) as part:
                part.write_bytes(whole.getbuffer())

        written, first = time.monotonic(), self.step
        with progress_bar(total=self.steps, initial=first, desc="fit", unit="step",
                          disable=not progress or parallel.rank() > 0) as self.bar:
            while self.share(self.step) < 1:
                yield self.step
                self.step += 1
                self.bar.update()
                self.spent = parallel.largest(self.clock() - started)  # so that all processes stop at one step
                if self.checkpoint and parallel.largest(time.monotonic() - written) > 15:
                    keep()
                    written = time.monotonic()
        if self.checkpoint and (self.step > first or not self.checkpoint.exists()):
            keep()

    def report(self, loss, error, **figures):
        """Every 20th step, the first included, look at what it gave; every step would wait for the device.

        Args:
            loss, error: tensors of one element; the error is a mean square, for the PSNR beside the bar.
            figures: go beside the bar as well.
        Raises:
            FloatingPointError: the loss is not finite.
        """
        if self.step % 20:
            return
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{self.scene.path}: the loss is {loss.item()} at step {self.step}")
        psnr = -10 * math.log10(error.item() + 1e-12)
        self.bar.set_postfix(psnr=f"{psnr:.1f} dB", **figures, refresh=False)
