"""Save and restore with Orbax: the newest checkpoint and the best, each with checksums.

Arrays are stored under dotted names ("h_0.attn.c_attn.kernel"), parameters apart from the rest, so
that sampling reads the parameters alone, onto whatever device is there. Orbax commits a checkpoint
by giving its folder the step as a name, so that one is there as a whole or not at all.
"""

import contextlib
import inspect
import json
import logging
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

from nanogpt_jax.errors import PEER_DIED, InputError, RunError, first_line
from nanogpt_jax.hardware.processes import ALONE, Processes
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.steps import TrainState

Result = TypeVar("Result")


def _tell_others(tell: Callable, unraisable) -> None:
    is_orbax = inspect.iscoroutine(unraisable.object)
    if not is_orbax and "Event loop is closed" not in str(unraisable.exc_value):
        tell(unraisable)


# What befalls Orbax is raised, and told here in a line. Its log would tell it again in a page, and
# so would all that it reads or writes beside the array that fails, soon or late.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
sys.unraisablehook = partial(_tell_others, sys.unraisablehook)


# What keeps a file from being read that need not be damaged.
NOT_OF_THE_FILE = re.compile(
    "(?i)permission.denied|too many open files|input/output error|stale (nfs )?file|UNAVAILABLE"
)


class Damaged(InputError):
    """A checkpoint is not what was saved, or of a model of another shape."""


class Checkpoints:
    """The checkpoints of one run: of all saved, the newest and that of lowest val_loss remain.

    Args:
        read_only: nothing is written or cleaned up; a training may be saving there meanwhile.
        processes: all of them save and restore, the first one cleans up.
    """

    def __init__(self, folder: Path, read_only: bool = False, processes: Processes = ALONE):
        self.folder = Path(folder).absolute()  # Orbax fails on relative paths, and late
        self.read_only, self._processes, self._has_failed = read_only, processes, False
        self._clean_up()  # what a kill cut off
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self.best_step),
            create=not read_only,
            # Otherwise a directory that cannot be made hangs the process at its exit.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._val_losses, self._damaged = {}, {}
        for step in self.steps():
            try:
                self._val_losses[step] = self._facts(step)["val_loss"]
            except Damaged as error:
                if self._path(step).exists():
                    self._damaged[step] = error

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that lie on the disk now, the newest first."""
        return run_folder.saved_steps(self.folder)

    def best_step(self) -> int | None:
        """Return the step of lowest validation loss; None if no checkpoint has one."""
        known = [(loss, step) for step, loss in self._val_losses.items() if loss is not None]
        return min(known, default=(None, None))[1]

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Save a state in the background, under its step.

        Args:
            val_loss: None where it was not evaluated: then it counts as newest, never as best.

        Raises:
            RunError: the disk is full, or fails otherwise; perhaps told of the save before this one.
        """
        params = _named_leaves(state.params)
        training = _named_leaves(state._replace(params={}))
        step = int(state.step)
        assert val_loss is None or np.isfinite(val_loss), "a NaN would be taken for the best"
        facts = {
            "step": step,
            "val_loss": val_loss,
            # A flipped bit in a data file goes unseen by Orbax; its checksum here tells.
            "checksums": {name: int(checksum(leaf)) for name, leaf in (params | training).items()},
        }
        self._val_losses[step] = val_loss
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            facts=ocp.args.JsonSave(facts | {"crc32": _crc32(facts)}),
        )
        with self._failures_told():
            saved = self._manager.save(step, args=items)
        assert saved, f"step {step} is not newer than step {self._manager.latest_step()}"

    def restore(self, abstract: TrainState, prefer: int | None = None) -> TrainState | None:
        """Return the newest state that is whole; None where nothing was saved yet.

        A damaged checkpoint is told of, and an older one taken. Where this may write, it is set
        aside, as 60.damaged: the run comes by its step again.

        Args:
            abstract: the state's shapes, each with the sharding that it shall have.
            prefer: a step to try before all others.

        Raises:
            InputError: every checkpoint is damaged, or of a model of another shape.
        """

        def restore(step: int) -> TrainState:
            params = self._restore("params", abstract.params, step)
            training = self._restore("training", abstract._replace(params={}), step)
            return training._replace(params=params)

        return self._first_whole(restore, prefer)

    def restore_params(self, abstract_params, prefer: int | None = None) -> tuple | None:
        """Return (parameters alone, their step); otherwise as `restore`."""
        return self._first_whole(
            lambda step: (self._restore("params", abstract_params, step), step), prefer
        )

    def _first_whole(self, restore: Callable[[int], Result], prefer: int | None) -> Result | None:
        damaged = dict(self._damaged)
        # Listed anew each time: a training that goes on here deletes steps, and makes others.
        while steps := [step for step in self.steps() if step not in damaged]:
            step = prefer if prefer in steps else steps[0]
            try:
                whole = restore(step)
            except Damaged as error:
                if self._path(step).exists():  # not deleted meanwhile
                    damaged[step] = error
                continue
            for error in damaged.values():
                print(f"warning: {error}; step {step} is taken in its place", file=sys.stderr)
            self._set_aside(damaged)
            return whole
        if damaged:
            reasons = "; ".join(map(str, damaged.values()))
            raise InputError(
                f"{reasons}; no other checkpoint is left: put a copy of it in its place, or train "
                "anew with --overwrite"
            )
        return None

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _set_aside(self, steps: Collection[int]) -> None:
        """Rename checkpoints: they are in the way of those to come, or would be deleted as old."""
        if self.read_only or not steps:
            return
        if self._processes.is_first:
            for step in steps:
                aside = self.folder / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                self._path(step).rename(aside)
                print(f"warning: set aside as {aside}; delete it at will", file=sys.stderr)
        self._processes.wait("set aside")
        for step in steps:
            self._val_losses.pop(step, None)
            self._damaged.pop(step, None)
            for _ in range(120):  # until a network's file system has noticed, here too
                if self._path(step).exists():
                    time.sleep(0.5)
        self._manager.reload()

    def _facts(self, step: int) -> dict:
        """Return what was saved beside the arrays.

        Raises:
            Damaged: it is not what was saved.
        """
        read = self._read(step, facts=ocp.args.JsonRestore())["facts"]
        facts = read if isinstance(read, dict) else {}
        is_whole = facts.pop("crc32", None) == _crc32(facts)
        val_loss, checksums = facts.get("val_loss"), facts.get("checksums")
        is_ours = isinstance(val_loss, int | float | None) and isinstance(checksums, dict)
        if not (is_whole and is_ours and facts.get("step") == step):
            raise Damaged(f"{self._path(step)}: its facts are not what was saved: it is damaged")
        return facts

    def _restore(self, item: str, abstract, step: int):
        checksums = self._facts(step)["checksums"]
        targets = _named_leaves(abstract)
        restored = self._read(step, **{item: ocp.args.StandardRestore(targets)})[item]
        for name, leaf in restored.items():
            if int(checksum(leaf)) != checksums.get(name):
                raise Damaged(f"{self._path(step)}: {name} is not what was saved: it is damaged")
        order = [restored[name] for name in targets]
        return jax.tree.unflatten(jax.tree.structure(abstract), order)

    def _read(self, step: int, **items) -> dict:
        """Return items of a checkpoint as Orbax reads them; raises Damaged where it cannot."""
        failure = None
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many kinds, Exception itself among them
            is_full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            if is_full or self._lost_a_peer(error):
                raise
            while error.__cause__ is not None:  # the innermost one names the array
                error = error.__cause__
            failure = first_line(error)
            if NOT_OF_THE_FILE.search(failure):
                raise RunError(
                    f"{self._path(step)} cannot be read at this moment ({failure}): nothing was "
                    "changed, try again"
                ) from None
        if self._processes.any(failure is not None):
            reason = failure or "in another process"
            raise Damaged(f"{self._path(step)}: {', '.join(items)} cannot be restored ({reason})")
        return read

    def wait(self) -> None:
        """Wait until what was saved lies on the disk; raises RunError where it could not."""
        with self._failures_told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait` does, and give all resources back."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it tells of a failed save once more
                self._manager.close()
            for _ in range(10 * self._has_failed):  # what else was being written may come yet
                self._clean_up()
                time.sleep(0.1)

    def _clean_up(self) -> None:
        if self._processes.is_first and not self.read_only:
            for cut_off in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(cut_off, ignore_errors=True)
            for path in self.folder.glob("*"):
                if path.is_dir() and path.name.isdecimal():
                    with contextlib.suppress(OSError):
                        path.rmdir()  # an empty one, which Orbax would count as the newest

    def _lost_a_peer(self, error: Exception) -> bool:
        return self._processes.count > 1 and bool(PEER_DIED.search(str(error)))

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds: OSError, ValueError, JAX's own
            if self._lost_a_peer(error):
                raise
            failure = first_line(error)
        else:
            return
        self._has_failed = True
        raise RunError(
            f"a checkpoint could not be saved in {self.folder} ({failure}): when that is mended, "
            "the same command goes on from the one before"
        )


class _NewestAndBest:
    """Orbax's rule of what to keep, asked when the newest is about to be committed."""

    def __init__(self, best_step: Callable[[], int | None]):
        self._best_step = best_step

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        kept = checkpoints[-1].step, self._best_step()
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _crc32(facts: dict) -> int:
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _named_leaves(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@jax.jit
def checksum(array) -> jax.Array:
    """Return a checksum of an array's bits, uint32, computed where the array lies.

    The sum of all words, each times an odd number of its own, modulo 2**32: a flipped bit always
    changes it, and the order of summing does not, so it is the same on any number of devices.
    """
    words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    index = jnp.zeros((1,) * array.ndim, jnp.uint32)
    for axis in range(array.ndim):
        index = index * array.shape[axis] + lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    index = (index ^ (index >> 15)) * jnp.uint32(0x9E3779B1)  # neighbours get unlike numbers
    return (words.astype(jnp.uint32) * (index | 1)).sum(dtype=jnp.uint32)
