"""Token files read like one array, and a bad id is found wherever it is."""

import itertools
import zlib

import numpy as np
import pytest

from nanogpt_jax.corpora import tokens
from nanogpt_jax.corpora.tokens import PIECE_TOKENS, TokenFiles, open_tokens
from nanogpt_jax.errors import InputError

IDS = np.arange(500) * 7 % 500


@pytest.fixture
def write_files(tmp_path, monkeypatch):
    """Write ids into files of some lengths, too large to be checked at each start; the paths."""
    monkeypatch.setattr(tokens, "CHECKED_BYTES", 100)

    def write(ids, lengths):
        bounds = np.cumsum([0, *lengths])
        paths = [tmp_path / f"train_{i:05d}.bin" for i in range(len(lengths))]
        for path, begin, end in zip(paths, bounds[:-1], bounds[1:], strict=True):
            ids[begin:end].astype("<u2").tofile(path)
        return paths

    return write


def test_a_small_file_is_mapped_read_only(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "train.bin")
    ids, _ = open_tokens([tmp_path / "train.bin"], "uint16", 500, 9)
    assert isinstance(ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_bytes_are_little_endian_on_any_machine(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes([1, 0, 0, 1]))
    assert open_tokens([tmp_path / "train.bin"], "uint16", 257, 2)[0].tolist() == [1, 256]


def test_a_large_file_is_checked_in_pieces(tmp_path):
    """Its checksum is that of its bytes, and a bad id is found in whichever piece it is."""
    path = tmp_path / "train.bin"
    ids = (np.arange(PIECE_TOKENS + 6) % 65).astype("<u2")
    ids.tofile(path)
    assert open_tokens([path], "uint16", 65, 9)[1] == zlib.crc32(path.read_bytes())
    for position in (0, PIECE_TOKENS - 1, PIECE_TOKENS, PIECE_TOKENS + 5):
        with path.open("r+b") as file:
            file.seek(2 * position)
            file.write(bytes([65, 0]))
        with pytest.raises(InputError, match=f"below .* size 65, but token {position} is 65"):
            open_tokens([path], "uint16", 65, 9)
        with path.open("r+b") as file:
            file.seek(2 * position)
            file.write(ids[position].tobytes())


@pytest.mark.parametrize("is_checked", [True, False])
def test_several_files_read_like_one_array(write_files, is_checked):
    for lengths in ([500], [100, 150, 250], [3, 1, 1, 1, 494], [250, 250]):
        paths = write_files(IDS, lengths)
        files, crc32 = open_tokens(paths, "uint16", 500, 9, crc32=None if is_checked else 7)
        assert isinstance(files, TokenFiles)
        assert (crc32 == 7) == (not is_checked)  # trusted
        assert (len(files), files.dtype, files.nbytes) == (500, "<u2", 1000)
        np.testing.assert_array_equal(files[:], IDS)
        bounds = {0, 500, *np.cumsum(lengths).tolist()}
        places = sorted({place + d for place in bounds for d in (-2, -1, 0, 1, 2)})
        for begin, end in itertools.product(places, places):
            np.testing.assert_array_equal(files[begin:end], IDS[begin:end])
        with pytest.raises(ValueError, match="steps of 1"):
            files[::2]


def test_without_a_trusted_checksum_every_file_is_checked(write_files):
    ids = IDS.copy()
    paths = write_files(ids, [100, 150, 250])
    content = b"".join(path.read_bytes() for path in paths)
    assert open_tokens(paths, "uint16", 500, 9)[1] == zlib.crc32(content)
    ids[130] = 500
    paths = write_files(ids, [100, 150, 250])
    with pytest.raises(InputError, match=r"train_00001\.bin: .* size 500, but token 30 is 500"):
        open_tokens(paths, "uint16", 500, 9)


def test_a_small_corpus_of_several_files_is_an_array_and_checked(write_files, monkeypatch):
    paths = write_files(IDS, [100, 150, 250])
    monkeypatch.setattr(tokens, "CHECKED_BYTES", 1000)
    ids, crc32 = open_tokens(paths, "uint16", 500, 9)
    assert type(ids) is np.ndarray
    np.testing.assert_array_equal(ids, IDS)
    with pytest.raises(InputError, match=r"must have the checksum in meta\.json"):
        open_tokens(paths, "uint16", 500, 9, crc32=crc32 + 1)


def test_a_bad_id_of_a_trusted_file_is_found_when_it_is_read(write_files):
    ids = IDS.copy()
    ids[130] = 500
    files, _ = open_tokens(write_files(ids, [100, 150, 250]), "uint16", 500, 9, crc32=7)
    for offset in (0, 90, 121, 131):
        assert len(files[offset : offset + 9]) == 9
    for begin, end in ((122, 131), (95, 140), (0, 500)):
        with pytest.raises(InputError, match=r"train_00001\.bin: .* size 500, but token 30 is 500"):
            files[begin:end]
