"""Read text some megabytes at a time, and cut it without changing its tokens."""

import codecs
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

from nanogpt_jax.errors import InputError

BLOCK_BYTES = 2**20  # read at a time
PIECE_CHARS = 2**16  # of a text, tokenized as one string: that takes a hundred times its memory
LONGEST_CHARS = 2**18  # if there is no good place to cut; then it is cut anywhere
CONTEXT_CHARS = 100  # on each side of a cut, to see whether it changes the tokens
TRIES = 100
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")

# Whether the tokens of left + right are those of left, then those of right.
CanCut = Callable[[str, str], bool]


def anywhere(left: str, right: str) -> bool:
    """Say that any text can be cut, as one in characters or one that is only counted."""
    return True


def read_blocks(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file as Python reads one: no byte order mark, "\\n" as line end."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder, is_last = io.IncrementalNewlineDecoder(utf8, translate=True), False
    while not is_last:
        content = file.read(BLOCK_BYTES)
        is_last = not content
        if file.tell() == len(content):  # the first
            check_encoding(content, name)
        bad, at = content, content.find(b"\0")  # valid UTF-8, but only found in binary files
        try:
            text = decoder.decode(content, final=is_last)
        except UnicodeDecodeError as error:
            bad, at = error.object, error.start
        if at >= 0:
            byte = f"byte {file.tell() - len(bad) + at} is 0x{bad[at]:02x}"
            remedy = "unpack it" if name.lower().endswith(ARCHIVES) else "save it as UTF-8"
            raise InputError(f"{name}: must be UTF-8 text, but {byte}: {remedy}")
        if text:
            yield text


def check_encoding(content: bytes, name: str) -> None:
    """Refuse a file whose first bytes are those of UTF-16 or UTF-32."""
    zeros = [byte == 0 for byte in content[:4]]
    is_32 = content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or sum(zeros) == 3
    is_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    is_16 = is_16 or zeros in ([False, True] * 2, [True, False] * 2)
    if is_32 or is_16:
        encoding = "UTF-32" if is_32 else "UTF-16"
        raise InputError(
            f"{name}: must be UTF-8 text, but looks like {encoding}: convert it, for example with "
            f"iconv -f {encoding} -t UTF-8"
        )


def last_cut(text: str, can_cut: CanCut) -> int:
    """Return the last place where cutting a text leaves its tokens unchanged; 0 if there is none.

    Good places are before a single space between two words and, without any, before a line break:
    GPT-2's pattern begins a new word there. Whether another tokenizer does is tried.
    """
    for mark in " \n":
        at, n_tries = len(text) - 1, TRIES  # something must follow
        while n_tries and (at := text.rfind(mark, 1, max(1, at))) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                left, right = text[max(0, at - CONTEXT_CHARS) : at], text[at : at + CONTEXT_CHARS]
                if can_cut(left, right):
                    return at
                n_tries -= 1
    return 0


def cut_text(text: str, can_cut: CanCut) -> Iterator[str]:
    """Yield a text in pieces that, one after another, have the tokens of the whole."""
    begin = 0
    while len(text) - begin > PIECE_CHARS:
        length = PIECE_CHARS
        while not (cut := last_cut(text[begin : begin + length], can_cut)):
            if length >= LONGEST_CHARS:
                break
            length *= 2
        end = begin + (cut or length)
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]
