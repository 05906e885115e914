"""What a run's programs are fed: batches to train on, and the fixed windows of an evaluation.

A split that fits lies on every device, and a step is given where its windows begin. Of a larger one
the windows themselves are sent, read in the background while the devices are at work. Either way
the batch of a step is the same.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nanogpt_jax import data
from nanogpt_jax import mesh as meshes

SECONDS_PER_DISPATCH = 1.0  # what a signal waits for at the most


class ReadAhead:
    """Results of read(step) for one step after the other, read in a thread some steps ahead."""

    def __init__(self, read: Callable[[int], np.ndarray], first_step: int, ahead: int):
        self._read, self._next, self._ahead = read, first_step, ahead
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._coming = deque()
        self._fill()

    def _fill(self) -> None:
        while len(self._coming) < self._ahead:
            self._coming.append(self._pool.submit(self._read, self._next))
            self._next += 1

    def take(self, n: int) -> list[np.ndarray]:
        """Return the next n results; raises what reading raised."""
        taken = []
        for _ in range(n):
            taken.append(self._coming.popleft().result())
            self._fill()
        return taken

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(cancel_futures=True)


class TrainFeed:
    """The batches of a run from a step on, placed on its devices.

    Args:
        tokens: ids of the train split.
        batch_shape: (A, B): micro-batches of an update, sequences in each.
        first_step: where training begins.
        most_steps: N, steps of a dispatch at the most.
    """

    def __init__(
        self,
        tokens,
        seed: int,
        block_size: int,
        batch_shape: tuple[int, int],
        mesh: Mesh,
        first_step: int,
        most_steps: int,
    ):
        self._batches = data.TrainBatches(tokens, seed, block_size, batch_shape, most_steps)
        self.most_steps = self._batches.most_steps
        self.corpus = meshes.put_corpus(tokens, mesh)  # None: windows are sent
        self._sharding = meshes.by_rows(mesh, axis=2)
        self._step, self._dtype = first_step, tokens.dtype
        self._ahead = None
        if self.corpus is None:
            A, B = batch_shape
            self._shape_NABT = (self.most_steps, A, B, block_size + 1)
            self._rows = local_rows(self._sharding, self._shape_NABT[:3])

            def read(step: int) -> np.ndarray:
                where = seed, "train", step, len(tokens), block_size, batch_shape
                offsets_AB = data.batch_offsets(*where)[:, self._rows]
                return data.read_windows(tokens, offsets_AB, block_size + 1)

            # Twice a dispatch: one is being sent, the next one read.
            self._ahead = ReadAhead(read, first_step, 2 * self.most_steps)

    def places(self, n_steps: int) -> jax.Array:
        """Return places_NAB of the next n_steps <= N steps, the rest zeros: `steps.read_windows`.

        Raises:
            InputError: a file of the corpus holds ids past the vocabulary.
        """
        step, self._step = self._step, self._step + n_steps
        if self._ahead is None:
            offsets_NAB = self._batches.offsets(step, n_steps)
            return meshes.put(offsets_NAB.astype(np.int32), self._sharding)
        windows = self._ahead.take(n_steps)
        N, A, _, T = self._shape_NABT
        first_row, dtype = self._rows.start, self._dtype
        windows_NABT = np.zeros((N, A, self._rows.stop - first_row, T), dtype)
        for i, windows_ABT in enumerate(windows):
            windows_NABT[i] = windows_ABT

        def part(index):
            rows = slice(
                *(bound - first_row for bound in index[2].indices(self._shape_NABT[2])[:2])
            )
            return windows_NABT[:, :, rows]

        return jax.make_array_from_callback(self._shape_NABT, self._sharding, part)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.close()


class EvalFeed:
    """The fixed windows of every evaluation of a split, placed on the devices.

    Args:
        tokens: ids of the split.
        n_batches: 0 for the whole split, see `data.eval_batches`.
    """

    def __init__(self, tokens, block_size: int, batch_size: int, mesh: Mesh, n_batches: int = 0):
        offsets_NB, counts_NB = data.eval_batches(tokens, block_size, batch_size, n_batches)
        by_rows = meshes.by_rows(mesh, axis=1)
        self.n_targets = int(counts_NB.sum())
        self.corpus = meshes.put_corpus(tokens, mesh)
        self._places_NB = meshes.put_places(tokens, offsets_NB, block_size + 1, by_rows)
        self._counts_NB = meshes.put(counts_NB, by_rows)
        self._n_batches = len(counts_NB)
        # Of a dispatch: about a second's, but of several processes the same number in each.
        self._at_once = 1 if jax.process_count() == 1 else self._n_batches

    def lower(self, eval_steps: Callable, params) -> jax.stages.Lowered:
        """Return `eval_steps` lowered for these windows, to be compiled.

        Args:
            params: or their shapes, with shardings.
        """
        windows = self.corpus, self._places_NB, self._counts_NB
        return eval_steps.lower(params, *windows, np.int32(0), np.int32(0))

    def loss(
        self, eval_steps: Callable, params, told: Callable[[float], bool] = lambda share: False
    ) -> float | None:
        """Return the mean loss of all targets, in nats a token; None where it was stopped.

        Args:
            eval_steps: of `programs.make_programs`, compiled already or not.
            told: told which share is done, about each second; it returns whether to stop.
        """
        total, n_targets, done = 0.0, 0, 0
        while done < self._n_batches:
            n = min(self._at_once, self._n_batches - done)
            begun_s = time.perf_counter()
            sums, counts = eval_steps(
                params, self.corpus, self._places_NB, self._counts_NB, np.int32(done), np.int32(n)
            )
            total += np.asarray(sums).sum(dtype=np.float64)
            n_targets += int(np.asarray(counts).sum(dtype=np.int64))
            done += n
            if jax.process_count() == 1:
                seconds = time.perf_counter() - begun_s
                self._at_once = max(1, int(n * SECONDS_PER_DISPATCH / seconds))
                if told(done / self._n_batches) and done < self._n_batches:
                    return None
        return total / n_targets


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> slice:
    """Return the rows, along the last axis of a shape, that devices of this process have."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    bounds = [index[-1].indices(shape[-1])[:2] for index in indices]
    return slice(min(begin for begin, _ in bounds), max(end for _, end in bounds))
