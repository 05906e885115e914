"""What the page of --web shows when something on it is clicked, typed or chosen. No JAX, no Gradio.

What comes from a browser is not trusted: numbers and lengths are checked here, texts are escaped in
`views`.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from nanogpt_jax.config import SampleConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import plots as report
from nanogpt_jax.web import render as views

NUMBERS = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")  # as the page sends them
MAX_START = 10_000  # characters of a start text
MAX_TEXT = 20_000  # and of one that is read or goes on
PIECE_S = 0.08  # the browser is sent text no more often
MEAN = "mean"  # of the heads, where one can be chosen
N_LIKELIEST = 10


class Answers:
    """Answers to the events of the page, each a tuple of what its outputs shall show."""

    def __init__(self, player, config: SampleConfig, folder: Path | None):
        """Take a `player.Player`, the settings that the page does not ask for, and the run.

        Without a run, the model's weights are from elsewhere.
        """
        self.player, self.config, self.folder = player, config, folder
        self._look = lru_cache(maxsize=4)(player.look)  # many characters of a text are clicked

    def write(self, start: str, *numbers) -> Iterator[tuple[str, str]]:
        """Yield (text, what is wrong) as a new text grows from its start."""
        start = start or self.player.default_start
        yield from self._grow(start, start, numbers)

    def go_on(self, text: str, start: str, *numbers) -> Iterator[tuple[str, str]]:
        """Yield (text, what is wrong) as a text goes on from what stands there."""
        start = start or self.player.default_start
        yield from self._grow(text or start, start, numbers)

    def _grow(self, text: str, start: str, numbers) -> Iterator[tuple[str, str]]:
        try:
            if len(start) > MAX_START:
                have = f"{len(start):,}"
                raise InputError(f"start must have at most {MAX_START:,} characters, got {have}")
            if len(text) > MAX_TEXT:
                raise InputError(f"the text is full at {MAX_TEXT:,} characters: write a new one")
            config = read_numbers(self.config, dict(zip(NUMBERS, numbers, strict=True)))
            made = max(0, self.player.n_tokens(text) - self.player.n_tokens(start))
            yield text, ""
            for piece in in_time(self.player.write(text, config, made)):
                text += piece
                yield text, ""
        except InputError as error:
            yield text, views.error(str(error))

    def see(self, text: str, layer: str | None, head: str | None) -> tuple:
        """Return what is seen of a text, its last token chosen.

        They are: the tokens to click on, the text that was read, the position of the chosen one,
        forecast, attention, and the map of attention.
        """
        seen = text[-MAX_TEXT:]
        try:
            if not seen:
                raise InputError("Nothing is written yet.")
            sight = self._look(seen)
        except InputError as error:
            return views.error(str(error)), "", 0, "", "", None
        position = len(sight.tokens) - 1
        clickable = views.surprise(sight.tokens, sight.surprise_T, position)
        return (
            clickable,
            seen,
            *self.choose(seen, layer, head, position),
            self.map(seen, layer, head),
        )

    def choose(self, seen: str, layer: str | None, head: str | None, position: int) -> tuple:
        """Return (position, forecast, attention) of a token, the nearest that there is."""
        if not seen:
            return 0, "", ""
        sight = self._look(seen)
        position = min(max(0, int(position)), len(sight.tokens) - 1)
        forecast = views.forecast(
            sight.tokens,
            position,
            sight.likeliest(position, N_LIKELIEST),
            sight.probability_of_next(position),
        )
        return position, forecast, self.attention(seen, layer, head, position)

    def attention(self, seen: str, layer: str | None, head: str | None, position: int) -> str:
        """Return where a head looks from a position; nothing where there is no attention."""
        if not seen or layer is None:
            return ""
        sight = self._look(seen)
        weights_TT = sight.attention(*_numbers(layer, head))
        name = _name(layer, head)
        return views.attention(sight.tokens, weights_TT, position, name, self.player.unit)

    def map(self, seen: str, layer: str | None, head: str | None):
        """Return the picture of a head's weights; None where there is no attention."""
        if not seen or layer is None:
            return None
        sight = self._look(seen)
        weights_TT = sight.attention(*_numbers(layer, head))
        return views.attention_map(sight.tokens, weights_TT, _name(layer, head), self.player.unit)

    def loss(self) -> tuple:
        """Return (picture, sentence) of the run's loss as it is now."""
        if self.folder is None:
            return None, "There is no curve to draw: these weights were not trained here."
        try:
            run = report.read_run(self.folder, "step")
        except InputError as error:
            return None, f"There is no curve to draw: {error}."
        return report.loss_figure({str(self.folder): run}), report.describe(run)


def read_numbers(config: SampleConfig, numbers: dict) -> SampleConfig:
    """Return a configuration with the page's numbers, checked as flags are.

    Raises:
        InputError: one is no number, or not within its range.
    """
    checked = {}
    for name, value in numbers.items():
        is_whole = isinstance(getattr(config, name), int)
        try:
            checked[name] = int(value) if is_whole else float(value)
            if checked[name] != float(value):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            kind = "whole number" if is_whole else "number"
            raise InputError(f"{name} must be a {kind}, got {value!r}") from None
    return dataclasses.replace(config, **checked)


def in_time(pieces: Iterable[str], seconds: float = PIECE_S) -> Iterator[str]:
    """Yield pieces of text joined, as many as came within some seconds."""
    held, last_s = "", time.monotonic()
    for piece in pieces:
        held += piece
        if time.monotonic() - last_s >= seconds:
            yield held
            held, last_s = "", time.monotonic()
    if held:
        yield held


def _numbers(layer: str, head: str) -> tuple[int, int | None]:
    return int(layer) - 1, None if head == MEAN else int(head) - 1


def _name(layer: str, head: str) -> str:
    return f"layer {layer}, " + ("mean of heads" if head == MEAN else f"head {head}")
