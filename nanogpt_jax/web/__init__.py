"""The page of `python sample.py --web`."""

# ruff: noqa: F401 (what other packages import from here)
from nanogpt_jax.web.app import listen, serve
from nanogpt_jax.web.handlers import MAX_START
