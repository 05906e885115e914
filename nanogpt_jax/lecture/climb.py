"""Climb the ladder of "Let's build GPT": python -m nanogpt_jax.lecture.climb

Trains each step of the lecture with the lecture's own hyperparameters, from the bigram model up,
and shows what it brings: a table of losses beside those that the lecture shows, a line of text
from each, and a picture of all curves. The models are in rungs.py, a page to read beside the
lecture; `python train.py --config lecture-head` trains one of them as a run to keep. The
scaled-up model waits for a GPU or TPU.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from nanogpt_jax import corpora, data, decoding, steps
from nanogpt_jax import mesh as meshes
from nanogpt_jax.config import LECTURE, TrainConfig, check_fields, parse_args
from nanogpt_jax.corpora import Corpus
from nanogpt_jax.errors import InputError, run_command
from nanogpt_jax.files import check_writable
from nanogpt_jax.hardware import devices
from nanogpt_jax.hardware import flops as counts
from nanogpt_jax.hardware import processes as startup
from nanogpt_jax.loader import EvalFeed, TrainFeed
from nanogpt_jax.programs import make_programs

# Validation losses that the lecture shows, by preset and step. Of the blocks without residuals it
# only says that they do not do well. Source: the lecture, and its Colab.
PUBLISHED = {
    "lecture-bigram": {3000: 2.49},
    "lecture-head": {5000: 2.41},
    "lecture-multihead": {5000: 2.28},
    "lecture-feedforward": {5000: 2.24},
    "lecture-residual": {5000: 2.08},
    "lecture-layernorm": {5000: 2.06},
    "lecture-colab": {0: 4.4022, 500: 2.3129, 2000: 1.9949, 5000: 1.8222},
    "lecture-scaled": {5000: 1.48},
}
PICTURE = "ladder.png"
SAMPLE_TOKENS = 120
STEPS_PER_DISPATCH = 100
EVAL_TOKENS = 16_384  # of a batch: many short windows at once, or it takes longer than the training


@dataclass(frozen=True)
class LectureConfig:
    """How the ladder is climbed."""

    out_dir: str = "out/lecture"
    """Where ladder.png goes."""
    dataset: str | None = None
    """As in train.py; None: tiny Shakespeare, or Python's own manual where it cannot be had."""
    data_dir: str = "data"
    """Where prepared datasets lie."""
    most_iters: int = 5000
    """Steps of a rung at the most; the lecture's are 3000 and 5000."""
    seed: int = 1337
    """Seed of weights, batches and text."""
    compile_cache: str = ""
    """Folder of compiled programs, for the next start; off: none; empty: one in your home."""

    def __post_init__(self):
        check_fields(self)


class Climbed(NamedTuple):
    """A rung that was trained."""

    config: TrainConfig
    steps: list[int]  # at which it was evaluated
    val_losses: list[float]
    train_loss: float  # at the end, over a part of the split that is as large as the other
    published: dict[int, float]  # what the lecture shows, by step; only of its own text
    text: str
    seconds: float


def main(argv: list[str]) -> None:
    """Train the rungs one after the other, and show what each brought."""
    asked = parse_args(LectureConfig, argv, __doc__)
    folder = Path(asked.out_dir)
    check_writable(folder)
    startup.use_compile_cache(asked.compile_cache)
    rungs = [shortened(preset(), asked) for preset in LECTURE]
    if jax.default_backend() == "cpu":
        rungs = [rung for rung in rungs if rung.config != "lecture-scaled"]
    min_tokens = 1 + max(rung.model.block_size for rung in rungs)
    dataset = corpora.resolve(asked.dataset, Path(asked.data_dir), min_tokens)
    corpus = corpora.open_corpus(dataset, min_tokens)
    if corpus.tokenizer is None:
        raise InputError(f"dataset must have its text, but {dataset} has token ids only")

    climbed = []
    left_out = "" if rungs[-1].config == "lecture-scaled" else "; lecture-scaled wants a GPU or TPU"
    print(f"{len(rungs)} rungs on {corpus.name}{left_out}")
    print(f"{'':13}{'parameters':>12}{'train':>8}{'val':>8}{'lecture':>9}{'time':>8}")
    total = sum(rung.max_iters for rung in rungs)
    try:
        with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as bar:
            for rung in rungs:
                bar.set_description(rung.config)
                climbed.append(climb(rung, corpus, bar.update))
                bar.write(table_row(climbed[-1]))
    finally:  # interrupted, what was climbed so far is shown
        if climbed:
            show(climbed, folder)


def show(climbed: list[Climbed], folder: Path) -> None:
    """Print what each rung writes, and draw the curves."""
    print("\nWhat each writes, from noise to play (/ is a line break):\n")
    for rung in climbed:
        print(f"{short_name(rung):13}{rung.text}")
    folder.mkdir(parents=True, exist_ok=True)
    ladder_figure(climbed).savefig(folder / PICTURE)
    print(f"\nThe curves are drawn in {folder / PICTURE}")


def shortened(config: TrainConfig, asked: LectureConfig) -> TrainConfig:
    """Return a rung's configuration with the seed and not more than the steps asked for."""
    max_iters = min(config.max_iters, asked.most_iters)
    eval_interval = min(config.eval_interval, max(1, max_iters // 10))
    return dataclasses.replace(
        config, max_iters=max_iters, eval_interval=eval_interval, seed=asked.seed
    )


def climb(config: TrainConfig, corpus: Corpus, advance: Callable[[int], None]) -> Climbed:
    """Train one rung, on one device, as train.py would.

    Args:
        advance: told how many steps were made.
    """
    begun_s = time.perf_counter()
    model_config = dataclasses.replace(config.model, vocab_size=corpus.vocab_size)
    config = dataclasses.replace(config, model=model_config)
    mesh = meshes.make_mesh((1, 1, 1))
    compute, _ = devices.choose(config.compute, model_config, jax.devices()[0], mesh)
    programs = make_programs(config, compute, mesh)
    init_key, dropout_key = steps.stream_keys(config.seed)
    state = programs.init_state(init_key)

    block_size = model_config.block_size
    batch_shape = config.gradient_accumulation_steps, config.batch_size
    feed = TrainFeed(
        corpus.splits["train"], config.seed, block_size, batch_shape, mesh, 0, STEPS_PER_DISPATCH
    )
    # The whole validation split; of the other one as many windows, spread over it.
    eval_rows = max(1, EVAL_TOKENS // block_size)
    n_batches = len(data.eval_batches(corpus.splits["val"], block_size, eval_rows)[0])

    val_feed, part_of_train = (
        EvalFeed(corpus.splits[split], block_size, eval_rows, mesh, n_batches)
        for split in ("val", "train")
    )
    evaluated_at, val_losses, step = [], [], 0
    while True:
        if step % config.eval_interval == 0 or step == config.max_iters:
            evaluated_at.append(step)
            val_losses.append(val_feed.loss(programs.eval_steps, state.params))
        to_evaluation = config.eval_interval - step % config.eval_interval
        n_steps = min(feed.most_steps, to_evaluation, config.max_iters - step)
        if n_steps == 0:
            break
        state, _ = programs.train_steps(
            state, feed.corpus, feed.places(n_steps), np.int32(n_steps), dropout_key
        )
        step += n_steps
        advance(n_steps)
    feed.close()

    write = jax.jit(
        partial(decoding.generate, programs.model), static_argnames=("n_tokens", "sampling")
    )
    prompt = corpus.tokenizer.encode(corpus.tokenizer.default_start)
    new_tokens_BN = write(
        state.params,
        *decoding.start_window(prompt, 1, block_size),
        decoding.row_keys(config.seed, range(1)),
        n_tokens=SAMPLE_TOKENS,
        sampling=decoding.Sampling(),
    )
    text = " / ".join(corpus.tokenizer.decode(np.asarray(new_tokens_BN)[0]).split("\n"))
    is_the_lectures = corpus.fingerprint == corpora.SHAKESPEARE_FINGERPRINT
    published = PUBLISHED.get(config.config, {}) if is_the_lectures else {}
    published = {at: loss for at, loss in published.items() if at <= config.max_iters}
    train_loss = part_of_train.loss(programs.eval_steps, state.params)
    seconds = time.perf_counter() - begun_s
    return Climbed(config, evaluated_at, val_losses, train_loss, published, text, seconds)


def short_name(rung: Climbed) -> str:
    """Return a rung's name without its prefix: "multihead"."""
    return rung.config.config.removeprefix("lecture-")


def table_row(rung: Climbed) -> str:
    """Return a rung's line of the table."""
    n_params = counts.n_params(rung.config.model)
    published = rung.published.get(rung.config.max_iters, "-")
    return (
        f"{short_name(rung):13}{n_params:12,}{rung.train_loss:8.3f}"
        f"{rung.val_losses[-1]:8.3f}{published:>9}{rung.seconds:6.0f} s"
    )


def ladder_figure(climbed: list[Climbed]):
    """Return a matplotlib Figure: each rung's validation curve, and what the lecture shows."""
    from matplotlib.figure import Figure  # takes half a second: only now

    figure = Figure(figsize=(10, 5.5), dpi=130, layout="tight")
    axes = figure.subplots()
    for i, rung in enumerate(climbed):
        color = f"C{i}"
        label = f"{rung.val_losses[-1]:.2f} {short_name(rung)}"
        axes.plot(rung.steps, rung.val_losses, "o-", color=color, markersize=3, label=label)
        for step, loss in rung.published.items():
            axes.plot(step, loss, "D", color=color, markersize=8, fillstyle="none", zorder=3)
    if any(step for rung in climbed for step in rung.published):  # step 0 lies above the picture
        axes.plot([], [], "D", color="gray", markersize=8, fillstyle="none", label="in the lecture")
    # All begin above, knowing nothing (ln 65 = 4.17 would be even odds); the steps lie below.
    later = [loss for rung in climbed for loss in rung.val_losses[1:]]
    axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per character)",
        title='The ladder of "Let\'s build GPT": what each step of it brings',
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    run_command(main)
