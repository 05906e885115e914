"""A training run: its folder, from the lock to the last line printed."""

import contextlib
import importlib.metadata
import platform
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanogpt_jax import __version__, hardware
from nanogpt_jax.config import TrainConfig, to_flat_dict
from nanogpt_jax.corpora import Corpus, save_tokenizer
from nanogpt_jax.errors import InputError, RunError, first_line
from nanogpt_jax.hardware import Processes
from nanogpt_jax.run import folder as folders
from nanogpt_jax.run import length, loggers, pretrained
from nanogpt_jax.run.plots import read_metrics
from nanogpt_jax.run.signals import StopSignals

if TYPE_CHECKING:  # these import JAX
    from nanogpt_jax import Source
    from nanogpt_jax.hardware import Machine
    from nanogpt_jax.run.progress import Progress
    from nanogpt_jax.run.saving import Checkpoints
    from nanogpt_jax.steps import Metrics, TrainState

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
# Of one start on one machine, not of the run, which may resume elsewhere.
PER_START = {"overwrite": False, "coordinator_address": "", "num_processes": 0, "process_id": -1}
PATHS = {"out_dir", "data_dir", "dataset"}  # these may differ from host to host


def library_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


@dataclass
class Run:
    """An open training run: what it restores, logs, saves and prints.

    Its methods are called in the order in which they stand here.
    """

    folder: Path
    config: TrainConfig
    processes: Processes
    is_resuming: bool  # the folder holds a checkpoint of this run
    _source: "Source | None"  # of the initial weights
    _corpus: Corpus
    _signals: StopSignals
    _closing: contextlib.ExitStack  # closes what the methods open
    _opened_s: float = field(default_factory=time.perf_counter)
    start_step: int = 0
    evaluated_steps: set[int] = field(default_factory=set)  # earlier processes' among them
    _saved_step: int | None = None
    _stopped_by: int = 0  # the signal that ended the loop
    _checkpoints: "Checkpoints" = field(init=False)
    _progress: "Progress" = field(init=False)
    _has_warned: bool = False  # of a sample that failed

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: TrainConfig, source: "Source | None", corpus: Corpus, processes: Processes
    ) -> Iterator["Run"]:
        """Lock the run's folder and listen for signals; close everything at the end.

        Nothing is written yet, and JAX is not imported. Raises InputError if the folder cannot be
        used, is in use, has no room, or holds another run, or if there are no initial weights.
        """
        folder = folders.choose(config, corpus)
        config = length.settled(folder, config)
        is_resuming, writes = False, processes.is_first and not config.eval_only
        is_source = source and Path(config.init_from).resolve() == folder.resolve()
        if is_source and not config.eval_only:  # --overwrite would delete it
            raise InputError(
                f"out_dir must not be the run that init_from names, but both are {folder}: add "
                "--out_dir with another folder"
            )
        if config.overwrite and not config.eval_only:
            folders.check_usable(folder)
        elif not (config.eval_only and source and not folders.named_folder(config)):
            is_resuming = folders.can_resume(folder, config, corpus.fingerprint)
        if is_resuming:
            read_metrics(folder)  # if they are damaged, say so before anything is written
        elif config.eval_only and source is None:
            raise InputError(
                f"eval_only needs a run with a checkpoint, but {folder} has none: train it first"
            )
        with contextlib.ExitStack() as stack:
            if writes:
                loggers.check(config)
                stack.enter_context(folders.locked(folder))
                sizes = hardware.estimate_memory(config)
                folders.check_room(folder, sizes["weights"] + sizes["optimizer"])
            signals = stack.enter_context(StopSignals())
            closing = stack.enter_context(contextlib.ExitStack())
            if source and not is_resuming:  # downloaded and found readable, or refused now
                processes.first_alone(partial(pretrained.check_weights, source), "downloaded")
            yield cls(folder, config, processes, is_resuming, source, corpus, signals, closing)

    def fit_to_time(self, time_step: Callable[[], tuple[float, float]]) -> TrainConfig:
        """Choose max_iters such that a new run takes --minutes; return the configuration.

        Raises InputError if not even one update fits.

        Args:
            time_step: returns the seconds to compile the step, and those of an update.
        """
        config, processes = self.config, self.processes
        if not config.minutes:
            return config
        self._check_same({"the run to resume": self.is_resuming})  # before all compute together
        if not self.is_resuming:
            print(f"measuring how many updates fit into {hardware.duration(60 * config.minutes)}")
            compile_s, step_s = time_step()
            # It is compiled again, for the length that is found.
            started_s = time.perf_counter() - self._opened_s + compile_s
            n_val_tokens = len(self._corpus.splits["val"])
            self.config = length.fitted(config, n_val_tokens, started_s, step_s, processes)
        return self.config

    def begin(self, machine: "Machine") -> None:
        """Print what will be computed; write config.json and the tokenizer, unless eval_only.

        Call it only when the request is known to be possible: --overwrite deletes the old run.
        Raises InputError if the processes differ in flags, versions or dataset.
        """
        config, corpus = self.config, self._corpus
        vocabulary = f"{corpus.known_tokens or corpus.vocab_size}"
        if corpus.known_tokens not in (None, corpus.vocab_size):
            vocabulary += f" padded to {corpus.vocab_size}"
        print(
            f"{config.config}: {hardware.size_in_words(config.model)}, "
            f"{config.tokens_per_iter:,} tokens a step, on {corpus.name} "
            f"({len(corpus.splits['train']):,} tokens, vocabulary of {vocabulary})"
        )
        print(machine.description)
        self._check_same()
        if config.eval_only:
            return
        if self.processes.is_first:
            if config.overwrite:
                folders.delete(self.folder)
            made_with = {"nanogpt_jax": __version__, "python": platform.python_version()}
            made_with |= library_versions() | {"device": machine.device, "compute": machine.reason}
            made_with |= {"dataset_fingerprint": corpus.fingerprint}
            folders.begin(self.folder, replace(config, **PER_START), made_with)
            if corpus.tokenizer:
                save_tokenizer(corpus.tokenizer, self.folder)
        self.processes.wait("begun")
        folders.wait_until_visible(self.folder)

    def _check_same(self, more: dict | None = None) -> None:
        """Raise InputError if the processes differ in flags, versions, dataset, or in `more`."""
        flags = to_flat_dict(replace(self.config, **PER_START))
        flags = {name: value for name, value in flags.items() if name not in PATHS}
        own = library_versions() | {"dataset": self._corpus.fingerprint} | (more or {})
        self.processes.check_same(flags | own)

    def restore(self, abstract: "TrainState") -> "TrainState | None":
        """Return the state of the newest checkpoint, sharded as `abstract`; None for a new run."""
        from nanogpt_jax.run.saving import Checkpoints

        self._checkpoints = Checkpoints(self.folder / folders.CHECKPOINTS, self.processes)
        self._closing.callback(self._checkpoints.close)
        state = self._checkpoints.restore(abstract)
        self.is_resuming = state is not None
        if state is not None:
            self.start_step = self._saved_step = int(state.step)
            rows = [row for row in read_metrics(self.folder) if row["step"] <= self.start_step]
            self.evaluated_steps = {row["step"] for row in rows if "val_loss" in row}
        return state

    def restore_params(self, abstract_params) -> "tuple[dict, int] | None":
        """Return (parameters, step) of the newest checkpoint, without the optimizer's state."""
        if not self.is_resuming:
            return None
        read = pretrained.read_checkpoint
        params, origin = read(self.folder, abstract_params, "latest", self.processes)
        return params, origin["step"]

    def load_pretrained(self, abstract_params) -> dict | None:
        """Return the initial weights, and note in config.json which they are; None: random ones."""
        if self._source is None:
            return None
        params, origin = pretrained.load_params(
            self._source, self.config.model, abstract_params, processes=self.processes
        )
        if origin and self.processes.is_first and not self.config.eval_only:
            folders.note_origin(self.folder, origin)
        return params

    def is_complete(self) -> bool:
        """Return whether the restored run has nothing left to do; if so, say how to continue."""
        done = self.start_step
        if not self.is_resuming or done < self.config.max_iters:
            return False
        folder = shlex.quote(str(self.folder))
        more = f"--max_iters {2 * done} --lr_decay_iters {self.config.optim.lr_decay_iters}"
        more = f"--minutes 0 {more}" if self.config.minutes else more
        print(
            f"{self.folder} is complete: {done} steps are done. `python sample.py --out_dir "
            f"{folder}` writes text; --overwrite starts over; {more} continues"
        )
        return True

    def start(
        self, state: "TrainState", machine: "Machine", learning_rate: float, evaluates_first: bool
    ) -> None:
        """Open the log and the progress bar; from here on a signal saves before it stops.

        `learning_rate` is that of the first update; `evaluates_first`: an evaluation is due before.
        """
        from nanogpt_jax.run.progress import Progress

        if self.is_resuming:
            print(f"resuming {self.folder} from step {self.start_step}")
        n_val, n_devices = len(self._corpus.splits["val"]), machine.mesh.size
        print(hardware.run_line(self.config, n_val, machine.chip, n_devices, self.start_step))
        self.processes.wait("compiled")
        _ = self._corpus.bytes_per_token  # reads the validation split: now rather than after steps
        self._progress = Progress(
            self.folder,
            self.config,
            self.start_step if self.is_resuming else None,
            skipped=int(state.skipped),
            counts_skips=np.dtype(machine.compute.dtype) == "float16",
            learning_rate=learning_rate,
            evaluates_first=evaluates_first,
            is_first=self.processes.is_first,
            peak_flops=machine.peak_flops,
            bits_per_byte=self._corpus.bits_per_byte,
        )
        self._closing.callback(self._progress.close)
        self._signals.may_save = True

    def evaluating(self, step: int) -> Callable[[float], bool]:
        """Begin an evaluation; return what to ask, with the share done, whether to stop it.

        The last evaluation is the run's result: a signal does not stop it.
        """
        self._progress.flush(is_evaluated=True)
        can_stop = self.processes.count == 1 and step < self.config.max_iters

        def should_stop(share: float) -> bool:
            self._progress.evaluating(share)
            return can_stop and bool(self._signals.number)

        return should_stop

    def evaluated(self, step: int, val_loss: float | None, state: "TrainState") -> None:
        """Report an evaluation and save the state; None: a signal stopped the evaluation."""
        self._progress.evaluated(step, val_loss)
        if val_loss is not None:
            self.evaluated_steps.add(step)
            if step > 0:
                self._save(step, state, val_loss)
            self._progress.redraw()  # after what matters

    def show(self, step: int, write: Callable[[], str]) -> None:
        """Show what the model writes after an evaluation, once; a failure is only a warning.

        Several processes write together, so each tries every time, whatever failed in one before.
        """
        is_wanted = self._corpus.tokenizer is not None and self.config.sample_chars > 0
        is_shown = step == 0 or step in self._progress.sampled_steps
        if not is_wanted or is_shown or step not in self.evaluated_steps:
            return
        with self.decoration():
            self._progress.sampled(step, write()[: self.config.sample_chars])

    @contextlib.contextmanager
    def decoration(self) -> Iterator[None]:
        """Turn what fails inside into a warning, the first time: no reason to lose a run."""
        try:
            yield
        except Exception as error:  # a full disk, say, or a model too large for one device
            if not self._has_warned:
                self._progress.print(f"warning: a sample is missing: {first_line(error)}")
            self._has_warned = True

    def stop_requested(self, step: int) -> bool:
        """Return whether a signal asks to stop before the next update.

        Several processes must agree, which costs a round trip: they do every log_interval steps.
        """
        if self.processes.count == 1:
            self._stopped_by = self._signals.number
        elif step % self.config.log_interval == 0:
            self._stopped_by = self.processes.max(self._signals.number)
        return bool(self._stopped_by)

    def log(self, step: int, metrics: "Metrics") -> None:
        """Report earlier updates, without waiting for those just dispatched, up to `step`."""
        self._progress.log(step, metrics)
        if step - metrics.loss.size == self.start_step:
            metrics.loss.block_until_ready()
            seconds = time.perf_counter() - self._opened_s
            self._progress.print(f"first step done {seconds:.1f} s after the start")

    def finish(self, step: int, state: "TrainState") -> int:
        """Save what is not saved yet, print how the run ended, and return the exit code."""
        self._progress.flush()
        if self._stopped_by:
            self._save(step, state, None)
        self._closing.close()
        self._signals.may_save = False
        if self._stopped_by and step < self.config.max_iters:
            print(
                f"stopped at step {step} and saved: the same command resumes from there, without "
                "--overwrite"
            )
            return 128 + self._stopped_by
        assert self._progress.best is not None, "the last step is evaluated"
        loss, best_step = self._progress.best
        summary = {"val_loss": f"{loss:.4f}", "best_step": best_step}
        if bits := self._corpus.bits_per_byte(loss):
            summary["bits_per_byte"] = f"{bits:.3f}"
        tokens, seconds = step * self.config.tokens_per_iter, self._progress.elapsed_s()
        summary |= {
            "steps": step,
            "tokens": tokens,
            "seconds": f"{seconds:.1f}",
            "tokens_per_s": f"{tokens / seconds:.0f}",
            "parameters": hardware.headline_params(self.config.model),
            "folder": self.folder,
        }
        print(*(f"{name}: {value}" for name, value in summary.items()), sep="\n")
        is_found = self.folder.parent == folders.OUT
        flag = "" if is_found else f" --out_dir {shlex.quote(str(self.folder))}"
        print(f"loss.png shows the loss; `python sample.py{flag}` writes more text like this:")
        return 0

    def _save(self, step: int, state: "TrainState", val_loss: float | None) -> None:
        if not (self.folder / folders.CONFIG).exists():  # Orbax would create it again
            raise RunError(
                f"{self.folder} must stay where it is while it is trained, but its "
                f"{folders.CONFIG} is gone: move the run back and run the same command, which "
                "resumes from the newest checkpoint"
            )
        if step != self._saved_step:
            self._checkpoints.save(state, val_loss)
            self._saved_step = step
