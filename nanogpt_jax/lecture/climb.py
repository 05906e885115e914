"""Train the models of "Let's build GPT", one after another: python -m nanogpt_jax lecture

Each model is trained with the lecture's own hyperparameters, from the bigram model up. Prints a
table of losses next to those that the lecture shows and a line of text from each model, and draws
all curves. Read models.py alongside the lecture; `python train.py --config lecture-head` trains one
of the models as a run to keep. The scaled-up model needs a GPU or TPU.
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

from nanogpt_jax import corpora, decoding, steps
from nanogpt_jax.bench import jit_steps
from nanogpt_jax.config import LECTURE, TrainConfig, check_fields, parse_args
from nanogpt_jax.corpora import Corpus
from nanogpt_jax.data import EvalLoader, TrainLoader, eval_batches
from nanogpt_jax.errors import InputError
from nanogpt_jax.files import check_writable
from nanogpt_jax.hardware import choose_compute, n_params, use_compile_cache
from nanogpt_jax.run import new_figure, save_figure
from nanogpt_jax.sharding import make_mesh

# Validation losses that the lecture shows, by preset and step. Of the blocks without residual
# connections it only says that they do not do well. Source: the lecture, and its Colab.
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
EVAL_TOKENS = 16_384  # per batch: with few short windows a batch, evaluation would take longest


@dataclass(frozen=True)
class LectureConfig:
    """How the lecture's models are trained."""

    out_dir: str = "out/lecture"
    """Folder of ladder.png."""
    dataset: str | None = None
    """As in train.py; None: tiny Shakespeare, or Python's own manual if it cannot be downloaded."""
    data_dir: str = "data"
    """Folder of prepared datasets."""
    most_iters: int = 5000
    """Steps per model, at most; the lecture's are 3000 and 5000."""
    seed: int = 1337
    """Seed of weights, batches and text."""
    compile_cache: str = ""
    """Folder of compiled programs, for the next start; off: none; empty: one in your home."""

    def __post_init__(self):
        check_fields(self)


class Climbed(NamedTuple):
    """A trained model of the lecture."""

    config: TrainConfig
    steps: list[int]  # at which it was evaluated
    val_losses: list[float]
    train_loss: float  # of the trained model, on an equally large part of the train split
    published: dict[int, float]  # what the lecture shows, by step; empty for another text
    text: str
    seconds: float


def main(argv: list[str]) -> None:
    """Train the models one after another, and show what each step of the lecture brings."""
    request = parse_args(LectureConfig, argv, __doc__ or "")
    folder = Path(request.out_dir)
    check_writable(folder)
    use_compile_cache(request.compile_cache)
    configs = [shortened(preset, request) for preset in LECTURE]
    skipped = ""
    if jax.default_backend() == "cpu":
        configs = [config for config in configs if config.config != "lecture-scaled"]
        skipped = "; lecture-scaled needs a GPU or TPU"
    min_tokens = 1 + max(config.model.block_size for config in configs)
    dataset = corpora.resolve(request.dataset, Path(request.data_dir), min_tokens)
    corpus = corpora.open_corpus(dataset, min_tokens)
    if corpus.tokenizer is None:
        raise InputError(
            f"dataset must come with its tokenizer or text, but {dataset} has token ids only: "
            "name a text file"
        )

    climbed = []
    print(f"{len(configs)} models on {corpus.name}{skipped}")
    print(f"{'':13}{'parameters':>12}{'train':>8}{'val':>8}{'lecture':>9}{'time':>8}")
    total = sum(config.max_iters for config in configs)
    try:
        with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as bar:
            for config in configs:
                bar.set_description(config.config)
                climbed.append(climb(config, corpus, bar.update))
                bar.write(table_row(climbed[-1]))
    finally:  # if interrupted, show the models trained so far
        if climbed:
            show(climbed, folder)


def show(climbed: list[Climbed], folder: Path) -> None:
    """Print a text of each model, and draw the curves."""
    print("\nA text from each, from noise to a play (/ is a line break):\n")
    for model in climbed:
        print(f"{short_name(model):13}{model.text}")
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(ladder_figure(climbed), folder / PICTURE)
    print(f"\nThe curves are in {folder / PICTURE}")


def shortened(config: TrainConfig, request: LectureConfig) -> TrainConfig:
    """Return a model's configuration with the requested seed and limit of steps."""
    max_iters = min(config.max_iters, request.most_iters)
    eval_interval = min(config.eval_interval, max(1, max_iters // 10))
    return dataclasses.replace(
        config, max_iters=max_iters, eval_interval=eval_interval, seed=request.seed
    )


def climb(config: TrainConfig, corpus: Corpus, advance: Callable[[int], object]) -> Climbed:
    """Train one model on one device, as train.py would.

    Args:
        advance: called with the number of steps done since the last call.
    """
    start_s = time.perf_counter()
    model_config = dataclasses.replace(config.model, vocab_size=corpus.vocab_size)
    config = dataclasses.replace(config, model=model_config)
    mesh = make_mesh()
    compute, _ = choose_compute(config.compute, model_config, jax.devices()[0], mesh)
    jitted = jit_steps(config, compute, mesh)
    init_key, dropout_key = steps.stream_keys(config.seed)
    state = jitted.init_state(init_key)

    block_size = model_config.block_size
    shape = config.gradient_accumulation_steps, config.batch_size
    batches = TrainLoader(corpus.splits["train"], config.seed, block_size, shape, mesh)
    # The whole validation split, and as many windows spread over the train split.
    eval_rows = max(1, EVAL_TOKENS // block_size)
    n_batches = len(eval_batches(corpus.splits["val"], block_size, eval_rows)[0])
    val_loader, train_loader = (
        EvalLoader(corpus.splits[split], block_size, eval_rows, mesh, n_batches)
        for split in ("val", "train")
    )
    evaluated_at, val_losses = [], []
    for step in range(config.max_iters + 1):
        if step % config.eval_interval == 0 or step == config.max_iters:
            evaluated_at.append(step)
            val_losses.append(steps.evaluate(jitted.eval_step, state.params, val_loader))
        if step < config.max_iters:
            state, _ = jitted.train_step(state, next(batches), dropout_key)
            advance(1)
    batches.close()
    train_loss = steps.evaluate(jitted.eval_step, state.params, train_loader)
    assert train_loss is not None
    assert corpus.tokenizer is not None

    prompt = corpus.tokenizer.encode(corpus.tokenizer.default_start)
    write = jax.jit(
        partial(decoding.generate, jitted.model), static_argnames=("n_tokens", "sampling")
    )
    new_tokens_BN = write(
        state.params,
        *decoding.start_window(prompt, 1, block_size),
        decoding.row_keys(config.seed, range(1)),
        n_tokens=SAMPLE_TOKENS,
        sampling=decoding.Sampling(),
    )
    text = " / ".join(corpus.tokenizer.decode(np.asarray(new_tokens_BN)[0]).split("\n"))
    is_shakespeare = corpus.fingerprint == corpora.SHAKESPEARE_FINGERPRINT
    published = PUBLISHED.get(config.config, {}) if is_shakespeare else {}
    published = {at: loss for at, loss in published.items() if at <= config.max_iters}
    seconds = time.perf_counter() - start_s
    return Climbed(config, evaluated_at, val_losses, train_loss, published, text, seconds)


def short_name(model: Climbed) -> str:
    """Return a model's name without its prefix: "multihead"."""
    return model.config.config.removeprefix("lecture-")


def table_row(model: Climbed) -> str:
    """Return a model's line of the table."""
    published = model.published.get(model.config.max_iters, "-")
    return (
        f"{short_name(model):13}{n_params(model.config.model):12,}{model.train_loss:8.3f}"
        f"{model.val_losses[-1]:8.3f}{published:>9}{model.seconds:6.0f} s"
    )


def ladder_figure(climbed: list[Climbed]):
    """Return a matplotlib Figure: each model's validation curve, and what the lecture shows."""
    figure, axes = new_figure(10, 5.5)
    for i, model in enumerate(climbed):
        color = f"C{i}"
        label = f"{model.val_losses[-1]:.2f} {short_name(model)}"
        axes.plot(model.steps, model.val_losses, "o-", color=color, markersize=3, label=label)
        for step, loss in model.published.items():
            axes.plot(step, loss, "D", color=color, markersize=8, fillstyle="none", zorder=3)
    if any(step for model in climbed for step in model.published):  # step 0 is above the picture
        axes.plot([], [], "D", color="gray", markersize=8, fillstyle="none", label="in the lecture")
    # All start high, knowing nothing (ln 65 = 4.17 would be even odds); what differs is below.
    later = [loss for model in climbed for loss in model.val_losses[1:]]
    axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per character)",
        title='The ladder of "Let\'s build GPT": what each of its steps brings',
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
