"""What a model sees in a text, as pieces of a page: HTML and a picture. No JAX, no Gradio.

All text that is shown is escaped here: it may hold anything.
"""

from html import escape

import numpy as np

STRONGEST_SURPRISE = 5.0  # nats, where the colour is full: less than a chance in a hundred
MOST_LABELS = 64  # tokens along an axis of the map that can still be read

STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.7 ui-monospace, monospace;
        max-height: 14em; overflow-y: auto; padding: 2px; }
.text span { padding: 2px 0; }
.text .faint { opacity: .45; }
.text [role=button] { cursor: pointer; }
.text [role=button]:hover { outline: 1px solid currentColor; }
.text [aria-pressed=true], .text .here { outline: 2px solid currentColor; border-radius: 2px; }
.forecast { display: grid; grid-template-columns: minmax(2.5em, max-content) 1fr 4.5em;
            gap: 2px 8px; align-items: center; font: 14px/1.4 ui-monospace, monospace; }
.forecast .bar { height: .9em; min-width: 1px; background: rgb(60 125 230); border-radius: 2px; }
.forecast .came { background: rgb(225 120 20); }
.forecast .number { text-align: right; }
/* Pictures are drawn on white; turned to dark, their hues stay. */
.dark .picture img { filter: invert(.93) hue-rotate(180deg); }
.view-note { margin: 0 0 6px; }
.view-error { color: rgb(205 60 50); margin: 0; }
"""


def visible(token: str) -> str:
    """Return a token, a character or several, as something that can be seen, escaped for HTML."""
    known = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(
        escape(known.get(character, character))
        if character in known or character.isprintable()
        else f"U+{ord(character):04X}"
        for character in token
    )


def note(sentence: str) -> str:
    """Return a sentence of plain text as HTML."""
    return f'<p class="view-note">{escape(sentence)}</p>'


def error(sentence: str) -> str:
    """Return what went wrong, as HTML."""
    return f'<p class="view-error" role="alert">{escape(sentence)}</p>'


def surprise(tokens: list[str], surprise_T: np.ndarray, position: int) -> str:
    """Return the text to click on, each token the deeper the less it was expected."""
    parts = []
    for i, (token, nats) in enumerate(zip(tokens, surprise_T, strict=True)):
        is_first = np.isnan(nats)
        depth = 0.0 if is_first else min(1.0, nats / STRONGEST_SURPRISE)
        title = "the first: nothing to go by" if is_first else f"probability {np.exp(-nats):.1%}"
        is_here = i == position
        parts.append(
            f'<span role="button" tabindex="{0 if is_here else -1}" data-position="{i}" '
            f'aria-pressed="{str(is_here).lower()}" title="{title}" '
            f'style="{_shade("235 120 0", depth)}">{_in_text(token)}</span>'
            + "\n"
            * token.count("\n")
        )
    return f'<div class="text">{"".join(parts)}</div>'


def forecast(
    tokens: list[str], position: int, likeliest: list[tuple[str, float]], came: float | None
) -> str:
    """Return bars of the likeliest tokens after a position, the one that came marked.

    Args:
        likeliest: tokens with their probabilities, best first.
        came: the probability of the token that really came next; None at the end of the text.
    """
    next_token = "".join(tokens[position + 1 : position + 2])
    rows = list(likeliest)
    if next_token and next_token not in dict(rows):
        rows.append((next_token, came))
    highest = max(probability for _, probability in rows)
    bars = "".join(
        f"<span>{visible(token)}</span>"
        f'<span class="bar {"came" if token == next_token else ""}" '
        f'style="width:{probability / highest:.1%}"></span>'
        f'<span class="number">{probability:.1%}</span>'
        for token, probability in rows
    )
    read = "".join(map(visible, tokens[max(0, position - 11) : position + 1]))
    came_next = (
        f"<b>{visible(next_token)}</b> (orange)"
        if next_token
        else "nothing yet: the text ends here"
    )
    head = f'<p class="view-note">After <code>{read}</code> came {came_next}.</p>'
    return f'{head}<div class="forecast">{bars}</div>'


def attention(
    tokens: list[str], weights_TT: np.ndarray, position: int, name: str, unit: str
) -> str:
    """Return the text with each token the deeper the more is taken from it at a position.

    Args:
        unit: what a token is called: "character" or "token".
    """
    weights_S = weights_TT[position]
    highest = weights_S.max()
    most = int(weights_S.argmax())
    parts = []
    for i, (token, weight) in enumerate(zip(tokens, weights_S, strict=True)):
        kind = "here" if i == position else "faint" if i > position else ""
        parts.append(
            f'<span class="{kind}" title="weight {weight:.1%}" '
            f'style="{_shade("40 115 255", weight / highest)}">{_in_text(token)}</span>'
            + "\n"
            * token.count("\n")
        )
    ago = position - most
    place = "itself" if ago == 0 else f"{ago} {unit}{'s' if ago > 1 else ''} before"
    return (
        f'<p class="view-note">{escape(name)}, at <b>{visible(tokens[position])}</b>: most from '
        f"<b>{visible(tokens[most])}</b>, {place} ({highest:.0%}).</p>"
        f'<div class="text">{"".join(parts)}</div>'
    )


def attention_map(tokens: list[str], weights_TT: np.ndarray, name: str, unit: str):
    """Return a matplotlib Figure of all weights: a row for each position, what it takes whence."""
    from matplotlib.colors import PowerNorm  # half a second: only now
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.4), dpi=130, layout="tight")
    axes = figure.subplots()
    # Where many tokens share the weight, each has little: the root brings them out.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(weights_TT, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set(title=name, xlabel=f"takes from this {unit}", ylabel=f"this {unit}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    # Past the alphabets that matplotlib's font has, and in a long text, positions by number.
    text = "".join(tokens)
    if len(text) <= MOST_LABELS and all(ord(character) < 0x500 for character in text):
        labels = [
            "".join("↵" if c == "\n" else "·" if c.isspace() else c for c in token)
            for token in tokens
        ]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(len(tokens)), labels, parse_math=False)
            axis.set_tick_params(labelsize=min(9, 400 / len(text)), length=0)
    figure.colorbar(image, label="weight (those of a row sum to 1)", shrink=0.6, fraction=0.04)
    return figure


def _in_text(token: str) -> str:
    """Return a token for running text, where a blank is better left blank."""
    return visible(token).replace("␣", " ")


def _shade(rgb: str, depth: float) -> str:
    # At most so deep that black text on white and white text on black stay legible.
    return f"background:rgb({rgb} / {0.6 * depth:.2f})"
