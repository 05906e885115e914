"""What a model sees in a text, as pieces of a page: HTML and a picture. No JAX, no Gradio.

All text that is shown is escaped here: it may hold anything.
"""

from html import escape

import numpy as np

STRONGEST_SURPRISE = 5.0  # nats, where the colour is full: less than a chance in a hundred
MOST_LABELS = 64  # characters along an axis of the map that can still be read

STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.7 ui-monospace, monospace;
        max-height: 14em; overflow-y: auto; padding: 2px; }
.text span { padding: 2px 0; }
.text .faint { opacity: .45; }
.text [role=button] { cursor: pointer; }
.text [role=button]:hover { outline: 1px solid currentColor; }
.text [aria-pressed=true], .text .here { outline: 2px solid currentColor; border-radius: 2px; }
.forecast { display: grid; grid-template-columns: 2.5em 1fr 4.5em; gap: 2px 8px;
            align-items: center; font: 14px/1.4 ui-monospace, monospace; }
.forecast .bar { height: .9em; min-width: 1px; background: rgb(60 125 230); border-radius: 2px; }
.forecast .came { background: rgb(225 120 20); }
.forecast .number { text-align: right; }
/* Pictures are drawn on white; turned to dark, their hues stay. */
.dark .picture img { filter: invert(.93) hue-rotate(180deg); }
.view-note { margin: 0 0 6px; }
.view-error { color: rgb(205 60 50); margin: 0; }
"""


def visible(character: str) -> str:
    """Return a character as something that can be seen, escaped for HTML."""
    known = {" ": "␣", "\n": "↵", "\t": "⇥"}
    if character in known or character.isprintable():
        return escape(known.get(character, character))
    return f"U+{ord(character):04X}"


def note(sentence: str) -> str:
    """Return a sentence of plain text as HTML."""
    return f'<p class="view-note">{escape(sentence)}</p>'


def error(sentence: str) -> str:
    """Return what went wrong, as HTML."""
    return f'<p class="view-error" role="alert">{escape(sentence)}</p>'


def surprise(text: str, surprise_T: np.ndarray, position: int) -> str:
    """Return the text to click on, each character the deeper the less it was expected."""
    parts = []
    for i, (character, nats) in enumerate(zip(text, surprise_T, strict=True)):
        is_first = np.isnan(nats)
        depth = 0.0 if is_first else min(1.0, nats / STRONGEST_SURPRISE)
        title = "the first: nothing to go by" if is_first else f"probability {np.exp(-nats):.1%}"
        is_here = i == position
        parts.append(
            f'<span role="button" tabindex="{0 if is_here else -1}" data-position="{i}" '
            f'aria-pressed="{str(is_here).lower()}" title="{title}" '
            f'style="{_shade("235 120 0", depth)}">{_in_text(character)}</span>'
            + ("\n" if character == "\n" else "")
        )
    return f'<div class="text">{"".join(parts)}</div>'


def forecast(
    text: str, position: int, likeliest: list[tuple[str, float]], came: float | None
) -> str:
    """Return bars of the likeliest characters after a position, the one that came marked.

    Args:
        likeliest: characters with their probabilities, best first.
        came: the probability of the character that really came next; None at the end of the text.
    """
    next_character = text[position + 1 : position + 2]
    rows = list(likeliest)
    if next_character and next_character not in dict(rows):
        rows.append((next_character, came))
    highest = max(probability for _, probability in rows)
    bars = "".join(
        f"<span>{visible(character)}</span>"
        f'<span class="bar {"came" if character == next_character else ""}" '
        f'style="width:{probability / highest:.1%}"></span>'
        f'<span class="number">{probability:.1%}</span>'
        for character, probability in rows
    )
    read = "".join(map(visible, text[max(0, position - 11) : position + 1]))
    came_next = (
        f"<b>{visible(next_character)}</b> (orange)"
        if next_character
        else "nothing yet: the text ends here"
    )
    head = f'<p class="view-note">After <code>{read}</code> came {came_next}.</p>'
    return f'{head}<div class="forecast">{bars}</div>'


def attention(text: str, weights_TT: np.ndarray, position: int, name: str) -> str:
    """Return the text with each character the deeper the more is taken from it at a position."""
    weights_S = weights_TT[position]
    highest = weights_S.max()
    most = int(weights_S.argmax())
    parts = []
    for i, (character, weight) in enumerate(zip(text, weights_S, strict=True)):
        kind = "here" if i == position else "faint" if i > position else ""
        parts.append(
            f'<span class="{kind}" title="weight {weight:.1%}" '
            f'style="{_shade("40 115 255", weight / highest)}">{_in_text(character)}</span>'
            + ("\n" if character == "\n" else "")
        )
    ago = position - most
    place = "itself" if ago == 0 else f"{ago} character{'s' if ago > 1 else ''} before"
    return (
        f'<p class="view-note">{escape(name)}, at <b>{visible(text[position])}</b>: most from '
        f"<b>{visible(text[most])}</b>, {place} ({highest:.0%}).</p>"
        f'<div class="text">{"".join(parts)}</div>'
    )


def attention_map(text: str, weights_TT: np.ndarray, name: str):
    """Return a matplotlib Figure of all weights: a row for each position, what it takes whence."""
    from matplotlib.colors import PowerNorm  # half a second: only now
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.4), dpi=130, layout="tight")
    axes = figure.subplots()
    # Where many characters share the weight, each has little: the root brings them out.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(weights_TT, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set(title=name, xlabel="takes from this character", ylabel="this character")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    # Past the alphabets that matplotlib's font has, and in a long text, positions by number.
    if len(text) <= MOST_LABELS and all(ord(character) < 0x500 for character in text):
        labels = ["↵" if c == "\n" else "·" if c.isspace() else c for c in text]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(len(text)), labels, parse_math=False)
            axis.set_tick_params(labelsize=min(9, 400 / len(text)), length=0)
    figure.colorbar(image, label="weight (those of a row sum to 1)", shrink=0.6, fraction=0.04)
    return figure


def _in_text(character: str) -> str:
    """Return a character for running text, where a blank is better left blank."""
    return " " if character == " " else visible(character)


def _shade(rgb: str, depth: float) -> str:
    # At most so deep that black text on white and white text on black stay legible.
    return f"background:rgb({rgb} / {0.6 * depth:.2f})"
