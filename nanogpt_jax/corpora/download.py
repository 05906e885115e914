"""Download tiny Shakespeare from one of its mirrors and verify its checksum."""

import hashlib
from pathlib import Path
from typing import Any

from nanogpt_jax.errors import InputError, first_line

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
MAX_BYTES = 2**21  # of an answer that is read
TIMEOUT_S = 10


class Unavailable(InputError):
    """A corpus that exists but cannot be downloaded from here, for `reason`."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def tiny_shakespeare(path: Path) -> bytes:
    """Return the text from the first mirror that has it, or raise Unavailable.

    Args:
        path: where the text will be stored, for the message.
    """
    reasons = []
    for url in SHAKESPEARE_URLS:
        try:
            content = _get(url)
        except Exception as error:  # its classes differ between versions of the library
            reasons.append(first_line(error))
            continue
        if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256:
            return content
        reasons.append(f"{url} sent a different text: its sha256 differs")
    reason = "; ".join(dict.fromkeys(reasons))  # each reason once
    message = f"tiny Shakespeare could not be downloaded ({reason}): save {SHAKESPEARE_URLS[0]} as"
    raise Unavailable(f"{message} {path}", reason)


def _get(url: str) -> bytes:
    """Return the first MAX_BYTES of what a server answers.

    The Hugging Face library brings certificates, which Python itself lacks on macOS, and knows of
    proxies. Its session is of `requests` in older versions and of `httpx` in newer ones.
    """
    from huggingface_hub.utils import get_session  # slow to import

    session: Any = get_session()
    content, is_requests = b"", isinstance(session.stream, bool)  # there it is a setting
    if is_requests:
        context = session.get(url, timeout=TIMEOUT_S, stream=True)
    else:
        context = session.stream("GET", url, timeout=TIMEOUT_S, follow_redirects=True)
    with context as answer:
        answer.raise_for_status()
        for chunk in answer.iter_content(2**16) if is_requests else answer.iter_bytes():
            content += chunk
            if len(content) > MAX_BYTES:
                break
    return content
