"""Write text with a trained model: python sample.py [--any_field value ...]

Without a flag: ten samples from the best checkpoint of the newest run under out/. With --init_from
gpt2-xl: from OpenAI's weights.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from nanogpt_jax import corpora
from nanogpt_jax.config import ComputeConfig, ModelConfig, SampleConfig, parse_args, split_settings
from nanogpt_jax.corpora import Tokenizer
from nanogpt_jax.errors import InputError, reading, run_command, visible
from nanogpt_jax.gpt2 import config as huggingface
from nanogpt_jax.gpt2 import convert as pretrained
from nanogpt_jax.gpt2 import hub
from nanogpt_jax.hardware import flops as counts
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.web.handlers import MAX_START

SEPARATOR = "-" * 15


def main(argv: list[str]) -> int:
    """Check all that was asked before JAX is loaded; then write."""
    settings = split_settings(argv, SampleConfig)
    config = parse_args(SampleConfig, settings, SampleConfig(), __doc__)
    if config.init_from:
        folder, model_config = None, huggingface.read_config(config.init_from)
        tokenizer = corpora.read_tokenizer(hub.find(config.init_from, hub.TOKENIZER))
    else:
        folder = Path(config.out_dir) if config.out_dir else run_folder.newest()
        model_config = run_folder.read_model_config(folder)
        tokenizer = corpora.load_tokenizer(folder)
        if tokenizer is None:
            raise InputError(
                f"{folder} has no {corpora.TOKENIZER_FILE}: its .bin files came without their "
                "text, so its tokens cannot be read"
            )
    start = read_start(config.start)
    if start == "":
        raise InputError("start must have at least one character, but is empty")
    tokenizer.encode_prompt(start or "")  # unknown characters, said before JAX is loaded
    if config.web and len(start or "") > MAX_START:
        raise InputError(
            f"start must have at most {MAX_START:,} characters with --web, but has {len(start):,}"
        )
    if config.web:
        return play(dataclasses.replace(config, start=start), folder, model_config, tokenizer)
    return write_samples(config, folder, model_config, tokenizer, start)


def read_start(start: str | None) -> str | None:
    """Return the start text: itself, a file's (FILE:path) or standard input's (-).

    Raises:
        InputError: the file cannot be read as UTF-8 text.
    """
    if start is None or not (start == "-" or start.startswith("FILE:")):
        return start
    place = "standard input" if start == "-" else start.removeprefix("FILE:")
    with reading(f"start: {place}", "UTF-8 text"):
        content = sys.stdin.buffer.read() if start == "-" else Path(place).read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")


def restore(config: SampleConfig, folder: Path | None, model_config: ModelConfig):
    """Return (model, params): of a run those of the checkpoint asked for, else of init_from."""
    import jax

    from nanogpt_jax import sharding, steps
    from nanogpt_jax.hardware import devices
    from nanogpt_jax.hardware import processes as startup
    from nanogpt_jax.lecture.models import make_model
    from nanogpt_jax.run.checkpoint import Checkpoints

    startup.use_compile_cache(config.compile_cache)
    devices.warn_of_unused_chip()
    asked = ComputeConfig(dtype=config.dtype, attention="xla")  # a cached token needs no other
    compute, _ = devices.choose(asked, model_config, jax.devices()[0])
    n_rows = 1 if config.stream or config.web or config.exact_window else config.num_samples
    needed = counts.least_sampling_bytes(model_config, n_rows)
    memory = devices.memory_bytes(jax.devices()[0])
    counts.check_memory(model_config, needed, memory, 1, "fewer --num_samples, or a smaller model")
    model = make_model(model_config, compute)
    key, _ = steps.stream_keys(0)
    abstract = jax.eval_shape(partial(steps.init_params, model), key)
    abstract = sharding.on_one_device(abstract)
    if folder is None:
        print(config.init_from, file=sys.stderr)
        return model, pretrained.load_params(config.init_from, model_config, abstract)
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS, read_only=True)
    prefer = checkpoints.best_step() if config.checkpoint == "best" else None
    restored = checkpoints.restore_params(abstract, prefer)
    if restored is None:
        raise InputError(f"{folder} has no checkpoint yet: train it first")
    params, step = restored
    print(f"{folder}, step {step}", file=sys.stderr)
    return model, params


def play(
    config: SampleConfig, folder: Path | None, model_config: ModelConfig, tokenizer: Tokenizer
) -> int:
    """Restore the parameters and serve the page until Ctrl-C; return the exit code."""
    from nanogpt_jax.web import app as web

    listener = web.listen(config.host, config.port)  # what cannot be, said before JAX is loaded
    from nanogpt_jax.web.session import Player

    player = Player(*restore(config, folder, model_config), tokenizer)
    web.serve(player, config, folder, listener)
    return 0


def write_samples(
    config: SampleConfig,
    folder: Path | None,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    start: str | None,
) -> int:
    """Restore the parameters and print the samples; return the exit code."""
    import jax

    from nanogpt_jax import generate

    model, params = restore(config, folder, model_config)
    sampling = generate.Sampling(config.temperature, config.top_k, config.top_p)
    n_rows = 1 if config.stream else config.num_samples
    window_BS, length = generate.start_window(tokenizer, start, n_rows, model_config.block_size)

    if not config.stream:
        write = jax.jit(
            partial(generate.generate, model),
            static_argnames=("n_tokens", "sampling", "exact_window"),
        )
        tokens_BN = write(
            params,
            window_BS,
            length,
            generate.row_keys(config.seed, range(n_rows)),
            n_tokens=config.max_new_tokens,
            sampling=sampling,
            exact_window=config.exact_window,
        )
        for tokens in np.asarray(tokens_BN):
            text = tokenizer.decode(tokens)
            show((start or "") + "".join(until(config.stop, [text])), f"\n{SEPARATOR}\n")
        return 0

    prefill = jax.jit(partial(generate.prefill, model), static_argnames="exact_window")
    decode = jax.jit(
        partial(generate.decode, model), static_argnames="sampling", donate_argnames="generation"
    )

    def pieces(row: int) -> Iterator[str]:
        keys_B = generate.row_keys(config.seed, range(row, row + 1))
        generation = prefill(params, window_BS, length, exact_window=config.exact_window)
        made, text_of = 0, tokenizer.stream_decoder()
        while made != config.max_new_tokens:  # -1 is never reached
            generation, tokens_B = decode(params, generation, keys_B, sampling=sampling)
            made += 1
            yield text_of(np.asarray(tokens_B), final=made == config.max_new_tokens)

    for row in range(config.num_samples):  # a text without end goes on until Ctrl-C
        show(start or "")
        for text in until(config.stop, pieces(row)):
            show(text)
        print(f"\n{SEPARATOR}", flush=True)
    return 0


def show(text: str, end: str = "") -> None:
    """Print text; on a terminal, which would obey them, control characters in a visible form."""
    print(visible(text, keep="\n\t") if sys.stdout.isatty() else text, end=end, flush=True)


def until(stop: str | None, pieces: Iterable[str]) -> Iterator[str]:
    """Yield text as it comes, up to the first occurrence of `stop`, even one split over pieces."""
    held = ""  # what may yet turn out to be the beginning of `stop`
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        free = max(0, len(held) - len(stop) + 1) if stop else len(held)
        yield held[:free]
        held = held[free:]
    yield held


if __name__ == "__main__":
    run_command(main)
