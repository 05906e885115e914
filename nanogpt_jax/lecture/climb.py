"""Train the models of "Let's build GPT", one after another: python -m nanogpt_jax lecture

Each model is trained with the lecture's own hyperparameters, from the bigram model up. Prints a
table of losses next to those that the lecture shows and a line of text from each model, and draws
all curves. Read models.py alongside the lecture; `python train.py --config lecture-head` trains one
of the models as a run to keep. The scaled-up model needs a GPU or TPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm.auto import tqdm

import nanogpt_jax
from nanogpt_jax import corpora, hardware, steps
from nanogpt_jax.config import LECTURE, Checked, TrainConfig, parse_args
from nanogpt_jax.corpora import Corpus
from nanogpt_jax.data import EvalLoader, train_batches
from nanogpt_jax.errors import InputError
from nanogpt_jax.files import check_writable
from nanogpt_jax.optim import make_optimizer
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
SAMPLE_TOKENS = 120
EVAL_TOKENS = 16_384  # per batch: with few short windows a batch, evaluation would take longest


@dataclass(frozen=True)
class LectureConfig(Checked):
    """How the lecture's models are trained."""

    out_dir: str = "out/lecture"  # folder of ladder.png
    #: as in train.py; None: tiny Shakespeare, or Python's own manual if it cannot be downloaded
    dataset: str | None = None
    data_dir: str = "data"  # folder of prepared datasets
    most_iters: int = 5000  # steps per model, at most; the lecture's are 3000 and 5000
    seed: int = 1337  # seed of weights, batches and text
    compile_cache: str = ""  # folder for compiled functions; off: none; empty: your cache folder


class Climbed(NamedTuple):
    name: str  # "multihead"
    n_params: int
    val_losses: dict[int, float]  # by step
    train_loss: float  # of the trained model, on an equally large part of the train split
    published: dict[int, float]  # what the lecture shows, by step; empty for another text
    text: str  # in one line
    seconds: float


def main(argv: list[str]) -> None:
    """Train the models one after another, and show what each step of the lecture brings."""
    request = parse_args(LectureConfig, argv, __doc__ or "")
    check_writable(Path(request.out_dir))
    hardware.use_compile_cache(request.compile_cache)
    hardware.warn_of_unused_chip()
    configs, skipped = [*LECTURE], ""
    if jax.default_backend() == "cpu":
        configs = [config for config in configs if config.config != "lecture-scaled"]
        skipped = "; lecture-scaled needs a GPU or TPU"
    min_tokens = 1 + max(config.model.block_size for config in configs)
    dataset = corpora.resolve(corpora.Request(request.dataset, Path(request.data_dir), min_tokens))
    corpus = corpora.open_corpus(dataset, min_tokens)
    if corpus.tokenizer is None:
        raise InputError(
            f"dataset must come with its tokenizer or text, but {dataset} has token ids only: "
            "name a text file"
        )
    for i, config in enumerate(configs):
        model = replace(config.model, vocab_size=corpus.vocab_size)
        max_iters = min(config.max_iters, request.most_iters)
        interval = min(config.eval_interval, max(1, max_iters // 10))
        changes = {"max_iters": max_iters, "eval_interval": interval, "seed": request.seed}
        configs[i] = replace(config, model=model, **changes)

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
            show(climbed, Path(request.out_dir))


def climb(config: TrainConfig, corpus: Corpus, advance: Callable[[int], object]) -> Climbed:
    """Train one model on one device, as train.py would, and let it write.

    `advance` is called with the number of steps done since its last call.
    """
    start_s = time.perf_counter()
    mesh, block_size = make_mesh(), config.model.block_size
    compute, _ = hardware.choose_compute(config.compute, config.model, jax.devices()[0], mesh)
    model = steps.make_model(config.model, compute)
    tx = make_optimizer(config.optim, config.max_iters)
    init_key, dropout_key = steps.stream_keys(config.seed)
    state = jax.jit(partial(steps.new_state, model, tx))(init_key)
    train_steps = jax.jit(partial(steps.train_steps, model, tx), donate_argnums=0)
    eval_step = jax.jit(partial(steps.eval_batch, model))
    n_steps, tokens = hardware.steps_per_call(config), corpus.splits["train"]
    shape = config.gradient_accumulation_steps, config.batch_size
    batches = train_batches(tokens, config.seed, block_size, shape, mesh, 0, n_steps)
    # The whole validation split, and as many windows spread over the train split.
    eval_rows = max(1, EVAL_TOKENS // block_size)
    val_loader = EvalLoader(corpus.splits["val"], block_size, eval_rows, mesh)
    train_loader = EvalLoader(tokens, block_size, eval_rows, mesh, len(val_loader))
    val_losses = {}
    for step in range(0, config.max_iters + 1, n_steps):
        if step % config.eval_interval == 0 or step == config.max_iters:
            val_losses[step] = steps.evaluate(eval_step, state.params, val_loader)
        if step < config.max_iters:
            state, _ = train_steps(state, next(batches), dropout_key)
            advance(n_steps)
    batches.close()
    train_loss = steps.evaluate(eval_step, state.params, train_loader)
    assert train_loss is not None, "nothing stops it"

    name = config.config.removeprefix("lecture-")
    trained = nanogpt_jax.TrainedModel(
        name, None, config.model, corpus.tokenizer, model, state.params, config.max_iters
    )
    text = nanogpt_jax.generate(
        trained, max_new_tokens=SAMPLE_TOKENS, temperature=1.0, top_k=0, seed=config.seed
    )
    is_shakespeare = corpus.fingerprint == corpora.SHAKESPEARE_FINGERPRINT
    published = PUBLISHED.get(config.config, {}) if is_shakespeare else {}
    published = {step: loss for step, loss in published.items() if step <= config.max_iters}
    size, line = hardware.n_params(config.model), str(text).replace("\n", " / ")
    seconds = time.perf_counter() - start_s
    return Climbed(name, size, val_losses, train_loss, published, line, seconds)


def table_row(model: Climbed) -> str:
    """Return a model's line of the table, with what the lecture shows after as many steps."""
    last_step, val_loss = [*model.val_losses.items()][-1]
    return (
        f"{model.name:13}{model.n_params:12,}{model.train_loss:8.3f}{val_loss:8.3f}"
        f"{model.published.get(last_step, '-'):>9}{model.seconds:6.0f} s"
    )


def show(climbed: list[Climbed], folder: Path) -> None:
    """Print a text of each model, and draw the curves."""
    print("\nA text from each, from noise to a play (/ is a line break):\n")
    for model in climbed:
        print(f"{model.name:13}{model.text}")
    figure, axes = new_figure(10, 5.5)
    later = []  # losses; all start high, knowing nothing (ln 65 = 4.17 would be even odds)
    for i, model in enumerate(climbed):
        losses = [*model.val_losses.values()]
        later += losses[1:]
        label = f"{losses[-1]:.2f} {model.name}"
        axes.plot([*model.val_losses], losses, "o-", color=f"C{i}", markersize=3, label=label)
        diamonds = {"color": f"C{i}", "markersize": 8, "fillstyle": "none", "zorder": 3}
        axes.plot([*model.published], [*model.published.values()], "D", **diamonds)
    if any(step for model in climbed for step in model.published):  # step 0 is above the picture
        axes.plot([], [], "D", color="gray", markersize=8, fillstyle="none", label="in the lecture")
    axes.set_ylim(min(later) - 0.1, max(later) + 0.1)
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per character)",
        title='The ladder of "Let\'s build GPT": what each of its steps brings',
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, folder / "ladder.png")
    print(f"\nThe curves are in {folder / 'ladder.png'}")
