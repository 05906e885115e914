"""Show what a model makes of a text, as HTML and a picture. No JAX, no Gradio.

All text is escaped here: it may contain anything.
"""

from html import escape

import numpy as np


def visible(token: str) -> str:
    """Return a token as HTML, with visible signs for blanks and control characters."""
    known = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(
        escape(known.get(character, character))
        if character in known or character.isprintable()
        else f"U+{ord(character):04X}"
        for character in token
    )


def error(sentence: str) -> str:
    return f'<p class="view-error" role="alert">{escape(sentence)}</p>'


def surprise(tokens: list[str], probs_T: np.ndarray, position: int) -> str:
    """Return the text as radio buttons, each token coloured by how little it was expected."""
    parts = []
    for i, (token, probability) in enumerate(zip(tokens, probs_T, strict=True)):
        title = f"probability {probability:.1%}"
        title = "the first: nothing predicts it" if np.isnan(probability) else title
        # Deepest at 5 nats, a probability below 1 %.
        depth = np.nan_to_num(-np.log(np.maximum(probability, 1e-9))) / 5
        checked = " checked" if i == position else ""
        radio = f'<input type="radio" name="position" value="{i}"{checked}>'
        span = _span(token, f'title="{title}"', "235 120 0", depth)
        parts.append(f"<label>{radio}{span}</label>")
    return f'<div class="text">{"".join(parts)}</div>'


def forecast(
    tokens: list[str], position: int, likeliest: list[tuple[str, float]], probs_T: np.ndarray
) -> str:
    """Return a bar chart of the likeliest tokens after a position; the actual one is orange.

    Args:
        likeliest: tokens with their probabilities, best first.
        probs_T: the probability of each token of the text.
    """
    next_token = "".join(tokens[position + 1 : position + 2])
    rows = list(likeliest)
    if next_token and next_token not in dict(rows):
        rows.append((next_token, probs_T[position + 1]))
    highest = max(probability for _, probability in rows)
    bars = "".join(
        f"<span>{visible(token)}</span>"
        f'<span class="bar {"came" if token == next_token else ""}" '
        f'style="width:{probability / highest:.1%}"></span>'
        f'<span class="number">{probability:.1%}</span>'
        for token, probability in rows
    )
    read = "".join(map(visible, tokens[max(0, position - 11) : position + 1]))
    came_next = f"<b>{visible(next_token)}</b> (orange)"
    came_next = came_next if next_token else "nothing yet: the text ends here"
    head = f'<p class="view-note">After <code>{read}</code> came {came_next}.</p>'
    return f'{head}<div class="forecast">{bars}</div>'


def attention(
    tokens: list[str], weights_TT: np.ndarray, position: int, name: str, unit: str
) -> str:
    """Return the text, each token coloured by the attention that a position pays to it.

    Args:
        unit: what to call a token: "character" or "token".
    """
    weights_S = weights_TT[position]
    highest, most = weights_S.max(), int(weights_S.argmax())
    parts = []
    for i, (token, weight) in enumerate(zip(tokens, weights_S, strict=True)):
        kind = "here" if i == position else "faint" if i > position else ""
        attributes = f'class="{kind}" title="weight {weight:.1%}"'
        parts.append(_span(token, attributes, "40 115 255", weight / highest))
    ago = position - most
    place = "itself" if ago == 0 else f"{ago} {unit}{'s' if ago > 1 else ''} before"
    return (
        f'<p class="view-note">{escape(name)}, at <b>{visible(tokens[position])}</b>: most from '
        f"<b>{visible(tokens[most])}</b>, {place} ({highest:.0%}).</p>"
        f'<div class="text">{"".join(parts)}</div>'
    )


def attention_map(tokens: list[str], weights_TT: np.ndarray, name: str, unit: str):
    """Return a matplotlib Figure of all weights, a row for each position."""
    from matplotlib.colors import PowerNorm  # takes half a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 6.4), dpi=130, layout="tight")
    axes = figure.subplots()
    # A square root, so that weight spread over many tokens stays visible.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(weights_TT, cmap="Blues", norm=norm, interpolation="nearest")
    axes.set(title=name, xlabel=f"takes from this {unit}", ylabel=f"this {unit}")
    # A long text, or an alphabet that matplotlib's font lacks, gets numbered positions.
    text = "".join(tokens)
    is_readable = len(text) <= 64 and all(ord(character) < 0x500 for character in text)
    signs = {ord("\n"): "↵"} | dict.fromkeys(map(ord, " \t\r\N{NO-BREAK SPACE}"), "·")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        if is_readable:
            labels = [token.translate(signs) for token in tokens]
            axis.set_ticks(range(len(tokens)), labels, parse_math=False)
            axis.set_tick_params(labelsize=min(9, 400 / len(text)), length=0)
    figure.colorbar(image, label="weight (each row sums to 1)", shrink=0.6, fraction=0.04)
    return figure


def _span(token: str, attributes: str, rgb: str, depth: float) -> str:
    # Light enough that black text on white and white text on black stay legible.
    style = f"background:rgb({rgb} / {0.6 * min(depth, 1):.2f})"
    text = visible(token).replace("␣", " ")  # in running text, a blank stays blank
    return f'<span {attributes} style="{style}">{text}</span>' + "\n" * token.count("\n")
