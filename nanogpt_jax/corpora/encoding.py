"""Items of text to ids, each in its split."""

import numpy as np

from nanogpt_jax.config import SPLITS
from nanogpt_jax.corpora.readers import Item, grouped
from nanogpt_jax.corpora.shards import Counts
from nanogpt_jax.corpora.sources import MAX_VAL_CHARS, Source
from nanogpt_jax.corpora.text import cut_text
from nanogpt_jax.corpora.tokenizer import Tokenizer

BATCH_BYTES = 2**21  # tokenized at once, on all cores; the tokenizer needs some 200 MB for it


def train_characters(n_chars: int) -> int:
    """Return how many characters of a text are for training: nanoGPT's nine tenths, or more."""
    return max(int(n_chars * 0.9), n_chars - MAX_VAL_CHARS)


def encode_items(
    items: list[Item], source: Source, plan: dict, tokenizer: Tokenizer, counts: Counts
) -> dict[str, np.ndarray]:
    """Return the ids of some items in each split, and add them to the counts."""
    separator = np.zeros(0, np.int64)
    if source.has_separators and tokenizer.separator:
        separator = tokenizer.encode_prompt(tokenizer.separator)  # as a token, not as text
    pieces: list[tuple[str, str | None]] = []  # each with its split; None: the separator
    for item in items:
        for i, text in enumerate(item.texts):
            is_end = item.is_end or i < len(item.texts) - 1
            if not text:
                counts.skipped += is_end
                continue
            counts.documents += is_end
            for split, part in _split(text, item.split, source, plan["info"], counts):
                pieces += ((split, piece) for piece in cut_text(part, tokenizer.can_cut))
            if is_end:
                pieces.append((pieces[-1][0], None))
    counts.done = int(items[-1].done)
    texts = (text for _, text in pieces if text is not None)
    groups = grouped(texts, lambda text: len(text.encode()), BATCH_BYTES)
    encoded = (ids for group in groups for ids in tokenizer.encode_batch(group))
    dtype = np.dtype(plan["dtype"]).newbyteorder("<")
    parts = {split: [np.zeros(0, dtype)] for split in SPLITS}
    for split, text in pieces:
        parts[split].append((separator if text is None else next(encoded)).astype(dtype))
    ids = {split: np.concatenate(parts[split]) for split in SPLITS}
    counts.train, counts.val = counts.train + len(ids["train"]), counts.val + len(ids["val"])
    return ids


def _split(
    text: str, split: str | None, source: Source, info: dict, counts: Counts
) -> list[tuple[str, str]]:
    """Return the parts of a text with their splits, and add its characters to the counts."""
    if split is None and source.is_cut:
        n_train = max(0, train_characters(info["characters"]) - counts.chars)
        parts = [("train", text[:n_train]), ("val", text[n_train:])]
    else:
        is_val = counts.documents % source.every == 0 and counts.val_chars < source.max_val_chars
        parts = [(split or ("val" if is_val else "train"), text)]
    counts.chars += len(text)
    counts.val_chars += sum(len(part) for split, part in parts if split == "val")
    return [(split, part) for split, part in parts if part]
