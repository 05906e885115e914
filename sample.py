"""Generate text with a trained model: python sample.py [--any_field value ...]

Without flags: ten samples from the best checkpoint of the newest run under out/. With --init_from
gpt2-xl: from OpenAI's weights.
"""

import dataclasses
import sys
from pathlib import Path

import nanogpt_jax
from nanogpt_jax import web
from nanogpt_jax.config import SampleConfig, parse_args
from nanogpt_jax.errors import InputError, reading, run_command, visible

SEPARATOR = "-" * 15


def main(argv: list[str]) -> int:
    """Validate the request before importing JAX; then load the model and generate."""
    config = parse_args(SampleConfig, argv, __doc__)
    folder = None if config.out_dir is None else Path(config.out_dir)
    source = nanogpt_jax.find(config.init_from or folder)
    config = dataclasses.replace(config, start=read_start(config.start))
    source.encode(config.start)  # names unknown characters
    if config.web:
        return serve(source, config)
    run = load(source, config)
    settings = nanogpt_jax.settings_of(config)

    if not config.stream:
        texts = nanogpt_jax.generate(run, config.start, num_samples=config.num_samples, **settings)
        for text in [texts] if isinstance(texts, str) else texts:
            show(text, f"\n{SEPARATOR}\n")
        return 0

    for sample in range(config.num_samples):  # with max_new_tokens=-1, the first never ends
        show(config.start or "")
        for piece in nanogpt_jax.stream(run, config.start, sample=sample, **settings):
            show(piece)
        print(f"\n{SEPARATOR}", flush=True)
    return 0


def read_start(start: str | None) -> str | None:
    """Return the prompt: the text itself, a file's content (FILE:path), or standard input (-).

    Raises:
        InputError: the file cannot be read as UTF-8 text.
    """
    if start is None or not (start == "-" or start.startswith("FILE:")):
        return start
    place = "standard input" if start == "-" else start.removeprefix("FILE:")
    with reading(f"start: {place}", "UTF-8 text"):
        if start == "-":
            content = sys.stdin.buffer.read() if sys.stdin else b""  # None: it is closed
        else:
            content = Path(place).read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")


def load(source: nanogpt_jax.Source, config: SampleConfig) -> nanogpt_jax.TrainedModel:
    """Load the model onto the device, and say on standard error which one it is."""
    from nanogpt_jax import hardware

    hardware.use_compile_cache(config.compile_cache)
    run = nanogpt_jax.load(source, checkpoint=config.checkpoint, dtype=config.dtype)
    print(run.name if run.step is None else f"{run.name}, step {run.step}", file=sys.stderr)
    return run


def serve(source: nanogpt_jax.Source, config: SampleConfig) -> int:
    """Serve the page until Ctrl-C."""
    if config.start and len(config.start) > web.MAX_START:
        raise InputError(
            f"start must have at most {web.MAX_START:,} characters with --web, but has "
            f"{len(config.start):,}"
        )
    listener = web.listen(config.host, config.port)  # fails before JAX is imported
    web.serve(load(source, config), config, listener)
    return 0


def show(text: str, end: str = "") -> None:
    """Print text; on a terminal, which would obey control characters, in a visible form."""
    print(visible(text, keep="\n\t") if sys.stdout.isatty() else text, end=end, flush=True)


if __name__ == "__main__":
    run_command(main)
