"""The nanoGPT of JAX: one small code base that trains, resumes, evaluates and samples a GPT."""

__version__ = "0.1.0"
