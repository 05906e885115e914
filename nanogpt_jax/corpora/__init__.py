"""From text to token files, and back: tokenizers, preparation, opening. No JAX."""
