"""Save and restore with Orbax: the newest checkpoint and the best, each with checksums.

Arrays are stored under dotted names ("h_0.attn.c_attn.kernel"), parameters apart from the rest, so
that sampling reads the parameters alone, onto whatever device is there.
"""

import contextlib
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint.checkpoint_managers import preservation_policy

from nanogpt_jax.errors import InputError
from nanogpt_jax.steps import TrainState

# A save without val_loss (on a signal) is meant so; Orbax would warn of it in the user's face.
logging.getLogger("absl").addFilter(lambda record: "tracked_metric" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one run: of all saved, the newest and that of lowest val_loss remain.

    Args:
        read_only: nothing is written or cleaned up; a training may be saving there meanwhile.
        is_first: of several processes, all of which save and restore, one cleans up.
    """

    def __init__(self, folder: Path, read_only: bool = False, is_first: bool = True):
        self.folder = Path(folder).absolute()  # Orbax fails on relative paths, and late
        if is_first and not read_only:
            for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)  # left by a kill or a full disk
        keep_best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics["val_loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(1), keep_best]
            ),
            best_fn=lambda metrics: metrics["val_loss"],
            best_mode="min",
            create=not read_only,
            # Otherwise a directory that cannot be made hangs the process at its exit.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Return the step of lowest validation loss; None if no checkpoint has one."""
        return self._manager.best_step()

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Save a state in the background, under its step.

        Args:
            val_loss: None where it was not evaluated: then it counts as newest, never as best.
        """
        params = _named_leaves(state.params)
        training = _named_leaves(state._replace(params={}))
        # A flipped bit in a data file goes unseen by Orbax; its checksum here tells.
        checksums = {name: int(checksum(leaf)) for name, leaf in (params | training).items()}
        step = int(state.step)
        assert val_loss is None or np.isfinite(val_loss), "a NaN would delete the real best"
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                training=ocp.args.StandardSave(training),
                checksums=ocp.args.JsonSave(checksums),
            ),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )
        assert saved, f"step {step} is not newer than step {self.latest_step()}"

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Return the state of a step.

        Args:
            abstract: its shapes, each with the sharding that it shall have.

        Raises:
            InputError: the checkpoint is damaged, or of a model of another shape.
        """
        params = self.restore_params(abstract.params, step)
        return self._restore("training", abstract._replace(params={}), step)._replace(params=params)

    def restore_params(self, abstract_params, step: int):
        """Return the parameters alone of a step; raises as `restore` does."""
        return self._restore("params", abstract_params, step)

    def read_params(self, abstract_params, checkpoint: str):
        """Return (parameters, step) of a checkpoint; a training that goes on may replace it.

        Args:
            checkpoint: "latest"; or "best", which is the latest where none was evaluated.

        Raises:
            InputError: see `restore`.
        """
        failed_at = None
        while True:
            best = self.best_step() if checkpoint == "best" else None
            step = self.latest_step() if best is None else best
            try:
                return self.restore_params(abstract_params, step), step
            except InputError:
                if step == failed_at:
                    raise
                failed_at = step
                self._manager.reload()  # perhaps it was deleted, and another is there

    def _restore(self, item: str, abstract, step: int):
        path = self.folder / str(step)
        targets = _named_leaves(abstract)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{item: ocp.args.StandardRestore(targets)}, checksums=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # Orbax raises many kinds, Exception itself among them
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise InputError(f"{path}: the checkpoint cannot be restored ({reason})") from error
        for name, leaf in restored[item].items():
            if int(checksum(leaf)) != restored["checksums"].get(name):
                raise InputError(f"{path}: {name} is not what was saved: the file is damaged")
        order = [restored[item][name] for name in targets]
        return jax.tree.unflatten(jax.tree.structure(abstract), order)

    def wait(self) -> None:
        """Wait until what was saved lies on the disk; raises OSError where it could not."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and give all resources back."""
        with contextlib.closing(self._manager):
            self.wait()


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
