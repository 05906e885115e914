"""Text to token files and back: tokenizers, preparation, opening. No JAX."""

# ruff: noqa: F401 (what other packages import from here)
from nanogpt_jax.corpora.catalog import (
    NAMES,
    PYDOCS,
    SHAKESPEARE,
    SHAKESPEARE_FINGERPRINT,
    SHAKESPEARE_VAL_TOKENS,
    Request,
    known_val_tokens,
    load,
    prepare,
    request_of,
    resolve,
)
from nanogpt_jax.corpora.dataset import Corpus, open_corpus
from nanogpt_jax.corpora.shards import SHARD_TOKENS
from nanogpt_jax.corpora.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer
from nanogpt_jax.corpora.tokenizer_files import (
    TOKENIZER_FILE,
    find_tokenizer,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
)
from nanogpt_jax.corpora.tokens import open_tokens
