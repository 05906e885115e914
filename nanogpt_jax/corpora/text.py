"""Read text in pieces, each small enough to be tokenized as a whole.

Where a piece ends depends only on where it begins.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from nanogpt_jax.errors import InputError

PIECE_BYTES = 2**16  # a tokenizer needs a hundred times the memory of its input
LONGEST_BYTES = 2**18  # of a text without a good place to cut; then it is cut anywhere


def last_cut(text: str) -> int:
    """Return the last place where cutting a text leaves its tokens unchanged; 0 if there is none.

    That is before a single space between two non-space characters or, without one, before such a
    line break: GPT-2's pattern begins a new word there, whatever comes before.
    """
    for mark in " \n":
        at = len(text) - 1  # something must follow
        while (at := text.rfind(mark, 1, max(1, at))) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at
    return 0


def cut_text(text: str) -> Iterator[str]:
    """Yield a text in pieces that have the tokens of the whole."""
    begin, length = 0, PIECE_BYTES
    while len(text) - begin > length:
        cut = last_cut(text[begin : begin + length])
        if not cut and length < LONGEST_BYTES:
            length *= 2
            continue
        cut = cut or length
        yield text[begin : begin + cut]
        begin, length = begin + cut, PIECE_BYTES
    if begin < len(text):
        yield text[begin:]


def read_pieces(file: BinaryIO, name: str, offset: int = 0) -> Iterator[tuple[str, int]]:
    """Yield (text, offset of the byte after it) of a UTF-8 file, starting at a byte offset.

    A byte order mark is skipped, and Windows line ends become line feeds.
    """
    if offset == 0:
        file.seek(0)
        offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    length, is_last = PIECE_BYTES, False
    while not is_last:
        file.seek(offset)
        content = file.read(length)
        is_last = len(content) < length
        text, n_bytes = "", 0
        try:
            text, n_bytes = codecs.utf_8_decode(content, "strict", is_last)
            bad = content.find(b"\0")  # is UTF-8, but only in binary files
        except UnicodeDecodeError as error:
            bad = error.start
        if bad >= 0:
            raise InputError(
                f"{name}: must be UTF-8 text, but byte {offset + bad} is 0x{content[bad]:02x}: "
                "save it as UTF-8"
            )
        if not is_last:
            cut = last_cut(text)
            if not cut and length < LONGEST_BYTES:
                length *= 2
                continue
            text = text[:cut] if cut else text.removesuffix("\r")  # perhaps half a line end
            n_bytes = len(text.encode())
        offset, length = offset + n_bytes, PIECE_BYTES
        if text:
            yield text.replace("\r\n", "\n"), offset
