"""The page of `python sample.py --web`."""

from nanogpt_jax.web.app import listen, serve
from nanogpt_jax.web.handlers import MAX_START

__all__ = ["MAX_START", "listen", "serve"]
