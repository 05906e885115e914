"""Read checkpoints with Orbax: the newest one or the best whose checksums are right.

Arrays are stored under dotted names ("h_0.attn.c_attn.kernel"), parameters apart from the rest, so
that sampling reads only the parameters, onto whatever device is there.
"""

import functools
import inspect
import json
import logging
import re
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax

from nanogpt_jax.errors import PEER_DIED, InputError, RunError, first_line
from nanogpt_jax.hardware import ALONE, Processes
from nanogpt_jax.run.folder import saved_steps
from nanogpt_jax.steps import TrainState

# Why a file may be unreadable without being damaged.
TEMPORARY = re.compile(
    "(?i)permission.denied|too many open files|input/output error|stale (nfs )?file|UNAVAILABLE"
)


class Damaged(InputError):
    """A checkpoint is not what was saved, or belongs to a model of another shape."""


class CheckpointReader:
    """The checkpoints of a run, to read: a training may be saving and deleting there meanwhile.

    Each is opened by itself: Orbax's manager looks at all steps, and fails if one has just gone.
    """

    def __init__(self, folder: Path, processes: Processes = ALONE):
        _silence_orbax()
        self.folder = Path(folder).absolute()  # Orbax fails on relative paths, and late
        self._processes = processes
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._found: dict[int, dict] = {}  # the metadata of each step
        self._damaged: dict[int, Damaged] = {}
        for step in saved_steps(self.folder):
            try:
                self._metadata(step)
            except Damaged as error:
                self._note_damage(step, error)

    def best_step(self) -> int | None:
        """Return the step of lowest validation loss; None if no checkpoint has one."""
        losses = [(found["val_loss"], step) for step, found in self._found.items()]
        return min((pair for pair in losses if pair[0] is not None), default=(None, None))[1]

    def checksum(self, step: int) -> str:
        """Return eight hex digits that identify a checkpoint which was restored."""
        return f"{metadata_crc32(self._found[step]):08x}"

    def restore(self, abstract: TrainState, prefer: int | None = None) -> TrainState | None:
        """Return the newest undamaged state, sharded as `abstract`; None if nothing was saved yet.

        The step `prefer` is tried before all others. Warn about a damaged checkpoint and fall back
        to an older one. Raises InputError if all are damaged or of another shape.
        """
        items = {"params": abstract.params, "training": abstract._replace(params={})}
        restored, _ = self._restore(items, prefer)
        return restored and restored["training"]._replace(params=restored["params"])

    def restore_params(self, abstract_params, prefer: int | None = None) -> tuple[dict, int] | None:
        """Return (parameters alone, their step); otherwise as `restore`."""
        restored, step = self._restore({"params": abstract_params}, prefer)
        return restored and (restored["params"], step)

    def _restore(self, items: dict[str, Any], prefer: int | None) -> tuple[Any, int]:
        """Return ({item: its arrays}, step) of the newest undamaged checkpoint."""
        # Listed again each time: a training in progress deletes steps and adds others.
        while steps := [step for step in saved_steps(self.folder) if step not in self._damaged]:
            step = prefer if prefer in steps else steps[0]
            try:
                sums = self._metadata(step)["checksums"]
                restored = {
                    name: self._restore_item(step, name, items[name], sums) for name in items
                }
            except Damaged as error:
                self._note_damage(step, error)
                continue
            for error in self._damaged.values():
                print(f"warning: {error}; using step {step} instead", file=sys.stderr)
            return restored, step
        if self._damaged:
            reasons = "; ".join(map(str, self._damaged.values()))
            raise InputError(
                f"{reasons}; there is no other checkpoint: restore a copy, or train that run again "
                "with --overwrite"
            )
        return None, 0

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _note_damage(self, step: int, error: Damaged) -> None:
        if self._path(step).exists():  # not deleted meanwhile
            self._damaged[step] = error

    def _metadata(self, step: int) -> dict:
        """Read what was saved beside the arrays; raise Damaged if it is not what was saved."""
        read = self._read(step, facts=ocp.args.JsonRestore())["facts"]
        metadata = read if isinstance(read, dict) else {}
        is_intact = metadata.pop("crc32", None) == metadata_crc32(metadata)
        val_loss, checksums = metadata.get("val_loss"), metadata.get("checksums")
        is_ours = isinstance(val_loss, int | float | None) and isinstance(checksums, dict)
        if not (is_intact and is_ours and metadata.get("step") == step):
            raise Damaged(f"{self._path(step)}: it is damaged: its metadata is not what was saved")
        self._found[step] = metadata
        return metadata

    def _restore_item(self, step: int, item: str, abstract, checksums: dict) -> Any:
        targets = named_leaves(abstract)
        restored = self._read(step, **{item: ocp.args.StandardRestore(targets)})[item]
        for name, leaf in restored.items():
            if int(checksum(leaf)) != checksums.get(name):
                raise Damaged(f"{self._path(step)}: it is damaged: {name} is not what was saved")
        order = [restored[name] for name in targets]
        return jax.tree.unflatten(jax.tree.structure(abstract), order)

    def _read(self, step: int, **items) -> Any:
        """Return items of a checkpoint as Orbax reads them; raise Damaged if it cannot."""
        failure, read = "", None
        try:
            read = self._reader.restore(self._path(step), args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many types, Exception itself among them
            is_full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            if is_full or self._lost_a_peer(error):
                raise
            innermost: BaseException = error
            while innermost.__cause__ is not None:  # it names the array
                innermost = innermost.__cause__
            failure = first_line(innermost).partition(" Truncating/padding")[0]  # our users cannot
            if TEMPORARY.search(failure):
                raise RunError(
                    f"{self._path(step)} cannot be read right now ({failure}): nothing was "
                    "changed, try again"
                ) from None
        if self._processes.any(bool(failure)):
            reason = failure or "in another process"
            raise Damaged(f"{self._path(step)}: {', '.join(items)} cannot be restored ({reason})")
        return read

    def close(self) -> None:
        self._reader.close()

    def _lost_a_peer(self, error: Exception) -> bool:
        return self._processes.count > 1 and bool(PEER_DIED.search(str(error)))


@functools.cache
def _silence_orbax() -> None:
    """Leave it to the one-line errors above to report what Orbax raises.

    Its log would repeat each error in a page, and so would everything that it reads or writes
    beside the array that fails, sooner or later.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_others(unraisable) -> None:
        is_orbax = inspect.iscoroutine(unraisable.object)
        if not is_orbax and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = report_others


def metadata_crc32(metadata: dict) -> int:
    return zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


def named_leaves(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@jax.jit
def checksum(array) -> jax.Array:
    """Return a checksum of an array's bits, uint32, computed where the array is stored.

    The sum of all words, each times an odd number of its own, modulo 2**32: a flipped bit always
    changes it, and the order of summing does not, so it is the same on any number of devices.
    """
    words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    index = jnp.zeros((1,) * array.ndim, jnp.uint32)
    for axis in range(array.ndim):
        index = index * array.shape[axis] + lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    index = (index ^ (index >> 15)) * jnp.uint32(0x9E3779B1)  # neighbours get unlike numbers
    return (words.astype(jnp.uint32) * (index | 1)).sum(dtype=jnp.uint32)
