"""Answer the page's events: what to show after a click, a choice or typing. No JAX, no Gradio.

Input from a browser is untrusted: numbers and lengths are checked here, text is escaped in render.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import nanogpt_jax
from nanogpt_jax.config import SampleConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import describe, loss_figure, read_run
from nanogpt_jax.web import render

if TYPE_CHECKING:
    from nanogpt_jax.web.session import Session

NUMBERS = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")  # in the page's order
MAX_START = 10_000  # characters of a start text
MAX_TEXT = 20_000  # characters of a text that is read or continued
PIECE_S = 0.08  # between two updates of the text in the browser
MEAN = "mean"  # of the heads, in place of one of them


class Handlers:
    """The page's event handlers, each returning the new values of its outputs."""

    def __init__(self, session: "Session", config: SampleConfig):
        self.session, self.config = session, config  # of which the page changes NUMBERS
        self._look = lru_cache(maxsize=4)(session.look)  # one text gets many clicks

    def write(self, text: str, start: str, *numbers) -> Iterator[tuple[str, str]]:
        """Yield (text, error) as a text grows from its end; an empty text, from its start."""
        start = start or self.session.tokenizer.default_start
        text = text or start
        try:
            if len(start) > MAX_START:
                n = f"{len(start):,}"
                raise InputError(f"start must have at most {MAX_START:,} characters, got {n}")
            if len(text) > MAX_TEXT:
                raise InputError(f"the text is full at {MAX_TEXT:,} characters: write a new one")
            changes = dict(zip(NUMBERS, numbers, strict=True))
            config = dataclasses.replace(self.config, **changes)  # refuses what no flag may be
            encode = self.session.tokenizer.encode_prompt
            n_generated = max(0, len(encode(text)) - len(encode(start)))
            yield text, ""
            shown_s = time.monotonic()
            run, settings = self.session.run, nanogpt_jax.settings_of(config)
            # In characters, a text that was stopped continues as if it had not been, until the
            # context is first full.
            for piece in nanogpt_jax.stream(run, text, n_generated=n_generated, **settings):
                text += piece
                if time.monotonic() - shown_s > PIECE_S:
                    yield text, ""
                    shown_s = time.monotonic()
            yield text, ""
        except InputError as error:
            yield text, render.error(str(error))

    def see(self, text: str, layer: str | None, head: str) -> tuple:
        """Return (tokens to click on, text that was read, position, forecast, attention, map)."""
        seen = text[-MAX_TEXT:]
        try:
            if not seen:
                raise InputError("Nothing is written yet.")
            insight = self._look(seen)
        except InputError as error:
            return render.error(str(error)), "", 0, "", "", None
        position = len(insight.tokens) - 1
        clickable = render.surprise(insight.tokens, insight.probs_T, position)
        chosen = self.choose(seen, layer, head, position)
        return clickable, seen, *chosen, self.map(seen, layer, head)

    def choose(self, seen: str, layer: str | None, head: str, position: int) -> tuple:
        """Return (position, forecast, attention) of the token nearest to a position."""
        if not seen:
            return 0, "", ""
        insight = self._look(seen)
        position = min(max(0, int(position)), len(insight.tokens) - 1)
        likeliest = insight.likeliest(position, n=10)
        forecast = render.forecast(insight.tokens, position, likeliest, insight.probs_T)
        return position, forecast, self.attention(seen, layer, head, position)

    def attention(self, seen: str, layer: str | None, head: str, position: int) -> str:
        """Return where a head looks from a position; nothing if the model has no attention."""
        if not seen or layer is None:
            return ""
        tokens, weights_TT, name = self._weights(seen, layer, head)
        return render.attention(tokens, weights_TT, position, name, self.session.unit)

    def map(self, seen: str, layer: str | None, head: str):
        """Return a picture of a head's weights; None if the model has no attention."""
        if not seen or layer is None:
            return None
        return render.attention_map(*self._weights(seen, layer, head), self.session.unit)

    def _weights(self, seen: str, layer: str, head: str):
        """Return (tokens, weights_TT, name) of a head as the page numbers it."""
        insight = self._look(seen)
        weights_TT = insight.attention(int(layer) - 1, None if head == MEAN else int(head) - 1)
        name = f"layer {layer}, " + ("mean of heads" if head == MEAN else f"head {head}")
        return insight.tokens, weights_TT, name

    def loss(self) -> tuple:
        """Return (picture, sentence) of the run's loss so far."""
        folder = self.session.run.folder
        if folder is None:
            return None, "There is no curve to draw: these weights were not trained here."
        try:
            rows = read_run(folder, "step")
        except InputError as error:
            return None, f"There is no curve to draw: {error}."
        return loss_figure({str(folder): rows}), describe(rows)
