"""Download tiny Shakespeare from one of its mirrors and verify its checksum."""

import hashlib
from pathlib import Path

from nanogpt_jax.errors import InputError

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
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
    import http.client  # slow to import, like the next
    import urllib.request

    reasons = []
    for url in SHAKESPEARE_URLS:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reasons.append(str(getattr(error, "reason", error)))
            continue
        if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256:
            return content
        reasons.append(f"{url} sent a different text: its sha256 differs")
    reason = "; ".join(dict.fromkeys(reasons))  # each reason once
    message = f"tiny Shakespeare could not be downloaded ({reason}): save {SHAKESPEARE_URLS[0]} as"
    raise Unavailable(f"{message} {path}", reason)
