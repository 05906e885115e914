"""Save checkpoints with Orbax, in the background: the newest and the best are kept.

Orbax commits a checkpoint by renaming its folder to the step: it exists whole or not at all.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from nanogpt_jax.errors import RunError, first_line
from nanogpt_jax.hardware import ALONE, Processes
from nanogpt_jax.run.checkpoint import CheckpointReader, checksum, metadata_crc32, named_leaves
from nanogpt_jax.steps import TrainState


class Checkpoints(CheckpointReader):
    """The checkpoints of a run in training, whose processes all save: the newest and the best."""

    def __init__(self, folder: Path, processes: Processes = ALONE):
        super().__init__(folder, processes)
        self._has_failed = False
        self._clean_up()  # what a kill left behind
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            # Otherwise a directory that cannot be created hangs the process at its exit.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Save a state in the background, under its step; without val_loss it is never the best.

        Raises RunError if the disk is full or fails otherwise, maybe already in the save before.
        """
        params = named_leaves(state.params)
        training = named_leaves(state._replace(params={}))
        step = int(state.step)
        assert val_loss is None or np.isfinite(val_loss), "a NaN would count as the best"
        metadata = {
            "step": step,
            "val_loss": val_loss,
            # By hand, since Orbax does not notice a flipped bit in a data file.
            "checksums": {name: int(checksum(leaf)) for name, leaf in (params | training).items()},
        }
        self._found[step] = metadata
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            facts=ocp.args.JsonSave(metadata | {"crc32": metadata_crc32(metadata)}),
        )
        with self._one_line_errors():
            saved = self._manager.save(step, args=items)
        assert saved, f"step {step} is not newer than step {self._manager.latest_step()}"

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        """Return whether to keep each checkpoint, when Orbax asks before it commits the newest.

        Orbax's own BestN reads its own metrics, which the runs that exist do not have: it would
        delete their best checkpoint.
        """
        kept = checkpoints[-1].step, self.best_step()
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def _restore(self, items: dict[str, Any], prefer: int | None) -> tuple[Any, int]:
        """Restore; rename what is damaged, as to 60.damaged: later it would block that step."""
        restored = super()._restore(items, prefer)
        if not self._damaged:
            return restored
        if self._processes.is_first:
            for step in self._damaged:
                aside = self.folder / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                self._path(step).rename(aside)
                print(f"warning: renamed to {aside}; you can delete it", file=sys.stderr)
        self._processes.wait("set aside")
        for step in self._damaged:
            self._found.pop(step, None)
            for _ in range(120):  # until a network file system shows it here too
                if self._path(step).exists():
                    time.sleep(0.5)
        self._damaged.clear()
        self._manager.reload()
        return restored

    def wait(self) -> None:
        """Wait until everything saved is on disk; raise RunError if it cannot be."""
        with self._one_line_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it reports a failed save again
                self._manager.close()
            super().close()
            for _ in range(10 * self._has_failed):  # other writes may still be in progress
                self._clean_up()
                time.sleep(0.1)

    def _clean_up(self) -> None:
        if self._processes.is_first:
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for path in (path for path in self.folder.glob("*") if path.name.isdecimal()):
                with contextlib.suppress(OSError):
                    path.rmdir()  # an empty one, which Orbax would count as the newest

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Re-raise Orbax's errors as one-line messages."""
        try:
            yield
        except Exception as error:  # of many types: OSError, ValueError, JAX's own
            if self._lost_a_peer(error):
                raise
            self._has_failed = True
            raise RunError(
                f"a checkpoint could not be saved in {self.folder} ({first_line(error)}): fix that "
                "and run the same command, which resumes from the checkpoint before"
            ) from None
