"""Corpora by name and path, opening them, and the download of tiny Shakespeare."""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from formats import chars_of, prepare, resolve

from nanogpt_jax.config import ModelConfig, TrainConfig
from nanogpt_jax.corpora import (
    BPETokenizer,
    download,
    load,
    open_corpus,
    preparation,
)
from nanogpt_jax.corpora import text as texts
from nanogpt_jax.corpora.download import Unavailable
from nanogpt_jax.corpora.sources import Files
from nanogpt_jax.corpora.tokenizer_spec import TokenizerSpec
from nanogpt_jax.errors import InputError

PLAY = "".join(f"Citizen {i}:\nBefore we proceed any further, hear me speak.\n" for i in range(200))
NOT_HTTP = 0  # in place of a status: what some proxies answer


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def serve(monkeypatch):
    """Mirrors of tiny Shakespeare on loopback: serve(text or status, ...) -> the paths asked."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    monkeypatch.setattr(download, "TIMEOUT_S", 5)
    asked = []
    with contextlib.ExitStack() as stack:

        def start(*answers: str | int) -> list[str]:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self):
                    asked.append(self.path)
                    answer = answers[int(self.path[1:])]
                    status, text = (answer, "") if isinstance(answer, int) else (200, answer)
                    if status == NOT_HTTP:
                        self.wfile.write(b"Please log in to this network.\r\n")
                        return
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(PLAY)) if text else "0")
                    self.end_headers()
                    self.wfile.write(text.encode())

                def log_message(self, *args):
                    pass

            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            place = f"http://127.0.0.1:{server.server_port}"
            urls = tuple(f"{place}/{i}" for i in range(len(answers)))
            monkeypatch.setattr(download, "SHAKESPEARE_URLS", urls)
            return asked

        yield start


@pytest.fixture
def no_network(serve, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr(download, "SHAKESPEARE_URLS", (f"http://127.0.0.1:{port}/input.txt",))


def read_ids(folder: Path, split: str, dtype: str = "<u2") -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", dtype)


def nanogpt_prepare(folder: Path, text: str) -> None:
    """Lay a folder out as nanoGPT's data/shakespeare_char/prepare.py does."""
    chars = sorted(set(text))
    ids = [chars.index(char) for char in text]
    folder.mkdir(parents=True)
    (folder / "input.txt").write_bytes(text.encode())
    np.array(ids[: int(len(ids) * 0.9)], np.uint16).tofile(folder / "train.bin")
    np.array(ids[int(len(ids) * 0.9) :], np.uint16).tofile(folder / "val.bin")
    # Read as a pickle, it would make a file called `opened`.
    command = f"touch '{folder.parent / 'opened'}'"
    (folder / "meta.pkl").write_bytes(f"cposix\nsystem\n(V{command}\ntR.".encode())


def write_bins(folder: Path, train, val, dtype="<u2") -> Path:
    folder.mkdir(parents=True)
    np.asarray(train, dtype).tofile(folder / "train.bin")
    np.asarray(val, dtype).tofile(folder / "val.bin")
    return folder


# Your own text


def test_your_own_text_becomes_token_files_that_decode_to_it(book, data_dir):
    folder = resolve(str(book), data_dir, 9)
    corpus = open_corpus(folder, 9)
    text = book.read_text(encoding="utf-8")
    ids = np.concatenate([corpus.splits["train"], corpus.splits["val"]])
    assert corpus.tokenizer.decode(ids) == text
    assert corpus.vocab_size == len(set(text))
    assert folder.parent == data_dir
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "tokenizer.json", "train.bin", "val.bin",
    ]  # fmt: skip


def test_the_token_files_equal_nanogpts(tmp_path, data_dir):
    for n in (20, 21, 29, 1000, 1001, 1009):
        text = ("abcdefghij" * n)[:n]
        path, theirs = tmp_path / f"{n}.txt", tmp_path / f"nanogpt{n}"
        path.write_text(text)
        ours = prepare(str(path), data_dir)
        nanogpt_prepare(theirs, text)
        for split in ("train.bin", "val.bin"):
            assert (ours / split).read_bytes() == (theirs / split).read_bytes()


def test_a_summary_is_printed_and_stored_in_meta_json(book, data_dir, capsys):
    folder = prepare(str(book), data_dir)
    assert "6,000 characters" in capsys.readouterr().out
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["dtype"] == "uint16"
    assert (meta["train_tokens"], meta["val_tokens"]) == (5400, 600)
    assert meta["source_sha256"] == hashlib.sha256(book.read_bytes()).hexdigest()


def test_a_prepared_text_is_not_prepared_again(book, data_dir, capsys):
    folder = prepare(str(book), data_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert prepare(str(book), data_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert capsys.readouterr().out == ""


def test_a_changed_text_is_prepared_again(book, data_dir):
    """Also where its length, and so the size of every file, is the same."""
    old = open_corpus(prepare(str(book), data_dir), 9)
    book.write_text(book.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    new = open_corpus(prepare(str(book), data_dir), 9)
    assert new.tokenizer.decode(new.splits["train"][:50]) == book.read_text(encoding="utf-8")[:50]
    assert new.fingerprint != old.fingerprint


@pytest.mark.parametrize("then", ["old", "new"])
@pytest.mark.parametrize("cut_at", ["progress", "tokenizer", "train", "val", "meta"])
def test_an_interrupted_preparation_is_repeated(book, data_dir, monkeypatch, cut_at, then):
    """Both texts have the same length, so sizes say nothing; meta.json, written last, must."""
    texts = {"old": book.read_text(encoding="utf-8")}
    texts["new"] = texts["old"][::-1]
    folder = prepare(str(book), data_dir)
    replace = Path.replace

    def replace_until(path, target):
        if target.stem == cut_at:
            raise KeyboardInterrupt
        return replace(path, target)

    book.write_text(texts["new"], encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(book), data_dir)
    book.write_text(texts[then], encoding="utf-8")
    corpus = open_corpus(prepare(str(book), data_dir), 9)
    ids = np.concatenate([corpus.splits["train"], corpus.splits["val"]])
    assert corpus.tokenizer.decode(ids) == texts[then]
    assert folder == prepare(str(book), data_dir)


def test_a_missing_or_cut_off_token_file_is_made_again(book, data_dir):
    folder = prepare(str(book), data_dir)
    for path in (folder / "train.bin", folder / "val.bin"):
        whole = path.read_bytes()
        for content in (whole[:-2], None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            prepare(str(book), data_dir)
            assert path.read_bytes() == whole


def test_a_separator_follows_each_text_of_a_folder(tmp_path, data_dir):
    (tmp_path / "books" / "more").mkdir(parents=True)
    for name, text in {"b.txt": "second", "a.txt": "first\r\n", "more/c.md": "third"}.items():
        (tmp_path / "books" / name).write_bytes(text.encode())
    corpus = open_corpus(prepare(str(tmp_path / "books"), data_dir), 1)
    ids = np.concatenate([corpus.splits["train"], corpus.splits["val"]])
    assert corpus.tokenizer.decode(ids) == "first\n\nsecond\nthird\n"


def test_files_for_training_and_validation_are_the_splits(tmp_path, data_dir, capsys):
    (tmp_path / "tales").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "tales" / f"tales-{split}.txt").write_text(f"to {split}")
    corpus = open_corpus(prepare(str(tmp_path / "tales"), data_dir), 1)
    decode = corpus.tokenizer.decode
    assert decode(corpus.splits["train"]) == "to train\n"
    assert decode(corpus.splits["val"]) == "to valid\n"
    printed = capsys.readouterr().out
    assert "not read: tales-test.txt (test split)" in printed
    assert "(validation files chosen by name)" in printed


def test_a_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path, data_dir):
    (tmp_path / "plain.txt").write_bytes(b"one line\ntwo lines\n" * 9)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + b"one line\r\ntwo lines\r\n" * 9)
    plain, windows = (
        open_corpus(prepare(str(tmp_path / name), data_dir), 1)
        for name in ("plain.txt", "windows.txt")
    )
    assert windows.tokenizer == plain.tokenizer
    assert windows.fingerprint == plain.fingerprint


def test_two_files_of_the_same_name_have_different_folders(tmp_path, data_dir):
    for folder, text in (("a", "abc" * 20), ("b", "xyz" * 20)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "input.txt").write_text(text)
    first, second = (prepare(str(tmp_path / f / "input.txt"), data_dir) for f in "ab")
    assert first != second
    assert open_corpus(first, 1).tokenizer.chars == "abc"


def test_text_beyond_ascii_is_kept(tmp_path, data_dir):
    text = "Grüße, 世界 🎭\n" * 10
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus(prepare(str(tmp_path / "text.txt"), data_dir), 1)
    ids = np.concatenate([corpus.splits["train"], corpus.splits["val"]])
    assert corpus.tokenizer.decode(ids) == text


def test_more_characters_than_two_bytes_can_count_are_stored_in_four(tmp_path, data_dir):
    text = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x13000)])).replace("\r", "")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
    folder = prepare(str(tmp_path / "text.txt"), data_dir)
    corpus = open_corpus(folder, 1)
    assert json.loads((folder / "meta.json").read_text(encoding="utf-8"))["dtype"] == "uint32"
    assert corpus.vocab_size == len(text) > 2**16
    assert corpus.splits["val"].max() == len(text) - 1


def test_an_unusable_text_is_refused_and_nothing_written(tmp_path, data_dir):
    path = tmp_path / "text.txt"
    for content, message in (
        (b"", "must contain text, but is empty"),
        (b" \n\t\r\n", "must contain text, but is empty"),
        (b"\xef\xbb\xbf", "must contain text, but is empty"),
        (b"na\xefve text in Latin-1" * 20, "byte 2 is 0xef: save it as UTF-8"),
        (b"abc" * 20, "at least block_size \\+ 1 = 9 characters, but of 60 one gets 6"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            resolve(str(path), data_dir, min_tokens=9)
        assert str(error.value).startswith(f"{path}: ")
        assert not data_dir.exists()


def test_an_archive_is_to_be_unpacked(tmp_path, data_dir):
    (tmp_path / "texts.zip").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(InputError, match=r"texts\.zip: must be UTF-8 text, .*: unpack it$"):
        resolve(str(tmp_path / "texts.zip"), data_dir, min_tokens=9)


def test_the_required_length_is_exact(tmp_path, data_dir):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 30)
    with pytest.raises(InputError, match="= 10 characters, but of 90 one gets 9"):
        resolve(str(path), data_dir, min_tokens=10)
    assert open_corpus(resolve(str(path), data_dir, min_tokens=9), min_tokens=9)


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_an_unreadable_file_is_named(tmp_path, data_dir, ending):
    (tmp_path / f"a.{ending}").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=rf"a\.{ending}: cannot be read \(No such file"):
        prepare(str(tmp_path), data_dir, tokenizer="char")


@pytest.mark.parametrize("path", ["book.txt", "book.txt/data", 256 * "x", "a\0b"])
def test_an_impossible_data_dir_is_refused_and_nothing_written(book, tmp_path, path):
    for dataset in str(book), "shakespeare_char":
        with pytest.raises(InputError, match="data_dir must be "):
            resolve(dataset, tmp_path / path, 9)
    assert list(tmp_path.iterdir()) == [book]


def test_a_folder_that_cannot_be_made_leaves_none_on_the_way_to_it(book, tmp_path):
    folder, spec = tmp_path / "new" / "newer" / (256 * "x"), TokenizerSpec.parse("char")
    with pytest.raises(InputError, match="File name too long"):
        preparation.prepare_folder(Files(book), folder, spec, 9, 1000)
    assert list(tmp_path.iterdir()) == [book]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_file_name_that_is_not_utf_8_works(book, data_dir):
    other = book.rename(book.with_name("b\udcff\udcfe.txt"))
    assert open_corpus(resolve(str(other), data_dir, 9), 9).tokenizer


def test_training_refuses_to_prepare_a_large_text(book, data_dir, monkeypatch):
    monkeypatch.setattr(preparation, "LARGE_BYTES", 1000)
    command = rf"data/prepare\.py {book} --tokenizer bpe --vocab_size 300 --data_dir {data_dir}"
    with pytest.raises(InputError, match=f"takes a while: python {command}$"):
        resolve(str(book), data_dir, 9, "bpe", 300)
    assert not data_dir.exists()
    folder = prepare(str(book), data_dir, 9, "bpe", 300)
    assert resolve(str(book), data_dir, 9, "bpe", 300) == folder
    os.utime(book, (1, 1))
    assert resolve(str(book), data_dir, 9, "bpe", 300) == folder
    book.write_text(book.read_text()[::-1])
    with pytest.raises(InputError, match="must be prepared before training"):
        resolve(str(book), data_dir, 9, "bpe", 300)


def test_a_misspelt_dataset_gets_a_suggestion(data_dir):
    for misspelt, near in (("shakespear_char", "shakespeare_char"), ("pydoc", "pydocs")):
        with pytest.raises(InputError, match=f"no '{misspelt}'. Did you mean {near}\\b"):
            resolve(misspelt, data_dir, 9)
    assert not data_dir.exists()


def test_prepared_datasets_are_suggested_too(data_dir):
    write_bins(data_dir / "openwebtext", range(20), range(20))
    assert resolve("openwebtext", data_dir, 9) == data_dir / "openwebtext"
    with pytest.raises(InputError, match=r"Did you mean openwebtext\?"):
        resolve("openwebtxt", data_dir, 9)


def test_a_data_dir_that_is_a_file_is_named(book, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for dataset in (str(book), "pydocs"):
        with pytest.raises(InputError, match=str(blocked)):
            prepare(dataset, blocked)


def test_the_python_manual_is_a_dataset(data_dir):
    corpus = open_corpus(prepare("pydocs", data_dir), 257)
    assert len(corpus.splits["train"]) > 200_000
    assert corpus.name == "pydocs"


class InOrder:
    """Processes of which this one comes second: `first_alone` has waited for the first."""

    def __init__(self):
        self.places = []

    def first_alone(self, work, place):
        self.places.append(place)
        work()
        return work()


def test_a_run_loads_its_corpus_and_gets_its_vocabulary(book, data_dir, capsys):
    model = ModelConfig(block_size=8, n_layer=1, n_head=1, n_embd=4)
    config = TrainConfig(dataset=str(book), data_dir=str(data_dir), model=model)
    processes = InOrder()
    corpus, filled = load(config, processes)
    n_chars = len(set(book.read_text(encoding="utf-8")))
    assert processes.places == ["prepared"]
    assert capsys.readouterr().out.count("prepared") == 1
    assert corpus.vocab_size == n_chars
    model = dataclasses.replace(model, vocab_size=n_chars)
    assert filled == dataclasses.replace(config, model=model)
    padded = dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=64))
    corpus, filled = load(padded, processes)
    assert (filled.model.vocab_size, filled.model.known_tokens) == (64, n_chars)
    too_long = dataclasses.replace(config, model=dataclasses.replace(model, block_size=600))
    with pytest.raises(InputError, match=r"block_size \+ 1 = 601 tokens, but of 6000 one gets 600"):
        load(too_long, processes)


def test_pretrained_weights_bring_a_tokenizer_unless_one_is_named(book, data_dir):
    model = ModelConfig(block_size=8, n_layer=1, n_head=1, n_embd=4, vocab_size=300)
    config = TrainConfig(dataset=str(book), data_dir=str(data_dir), model=model)
    corpus, _ = load(config, InOrder(), tokenizer="bpe")
    assert isinstance(corpus.tokenizer, BPETokenizer)
    assert corpus.vocab_size == 300
    config = dataclasses.replace(config, tokenizer="char")
    corpus, _ = load(config, InOrder(), tokenizer="bpe")
    assert corpus.tokenizer == chars_of(book.read_text(encoding="utf-8"))


# Token files made elsewhere


def test_nanogpts_own_folder_works_and_its_pickle_is_never_read(tmp_path, data_dir, capsys):
    nanogpt_prepare(tmp_path / "theirs", PLAY)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "theirs").iterdir()}
    folder = resolve(str(tmp_path / "theirs"), data_dir, 9)
    corpus = open_corpus(folder, 9)
    assert folder == tmp_path / "theirs"
    assert corpus.vocab_size == len(set(PLAY))
    assert corpus.tokenizer.decode(corpus.splits["train"]) == PLAY[: int(len(PLAY) * 0.9)]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not (tmp_path / "opened").exists()
    assert not data_dir.exists()
    assert capsys.readouterr().err == ""


def test_nanogpts_shakespeare_in_the_data_folder_is_used(data_dir, no_network):
    nanogpt_prepare(data_dir / "shakespeare_char", PLAY)
    corpus = open_corpus(resolve("shakespeare_char", data_dir, 9), 9)
    assert corpus.tokenizer.decode(corpus.splits["val"]) == PLAY[int(len(PLAY) * 0.9) :]
    assert not (data_dir / "opened").exists()


@pytest.mark.parametrize("name", ["shakespeare_char", "openwebtext"])
@pytest.mark.parametrize("beside", [("meta.json",), ("meta.json", "input.txt"), ("input.txt",)])
def test_token_files_made_elsewhere_are_never_replaced(data_dir, no_network, name, beside):
    """With a meta.json that says their width, as the README asks for, or a text of the user's."""
    folder = write_bins(data_dir / name, [*range(60)], [*range(20)], "<u4")
    contents = {"meta.json": '{"dtype": "uint32"}', "input.txt": "some other text\n" * 100}
    for file in beside:
        (folder / file).write_text(contents[file])
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert prepare(name, data_dir) == resolve(name, data_dir, 9) == folder
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after == before


def test_prepared_shakespeare_works_without_its_text(data_dir, no_network):
    nanogpt_prepare(data_dir / "shakespeare_char", PLAY)
    (data_dir / "shakespeare_char" / "input.txt").unlink()
    assert resolve(None, data_dir, 9) == data_dir / "shakespeare_char"


def test_without_its_text_the_vocabulary_is_counted_and_the_pickle_not_read(tmp_path, capsys):
    nanogpt_prepare(tmp_path / "theirs", PLAY)
    (tmp_path / "theirs" / "input.txt").unlink()
    corpus = open_corpus(tmp_path / "theirs", 9)
    assert corpus.vocab_size == len(set(PLAY))
    assert corpus.tokenizer is None
    assert not (tmp_path / "opened").exists()
    said = capsys.readouterr().out
    assert "meta.pkl is not read" in said
    assert "input.txt" in said


def test_shards_next_to_their_text_are_compared_with_it(tmp_path, monkeypatch, capsys):
    """Piece by piece, of both: they may be larger than the memory."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", 64)
    monkeypatch.setattr(np, "fromfile", None)
    theirs = tmp_path / "theirs"
    nanogpt_prepare(theirs, PLAY)
    content = (theirs / "train.bin").read_bytes()
    (theirs / "train.bin").unlink()
    for i, part in enumerate((content[:200], content[200:])):
        (theirs / f"train_{i:05d}.bin").write_bytes(part)
    assert open_corpus(theirs, 9).tokenizer.chars == "".join(sorted(set(PLAY)))
    (theirs / "train_00001.bin").write_bytes(content[200:-2] + b"\0\0")
    assert open_corpus(theirs, 9).tokenizer is None
    assert "not made from input.txt" in capsys.readouterr().err
    (theirs / "input.txt").unlink()
    assert open_corpus(theirs, 9).vocab_size == len(set(PLAY))  # counted


def test_a_text_that_token_files_were_not_made_from_is_no_tokenizer(tmp_path, capsys):
    """nanoGPT's data/shakespeare: the same input.txt, but ids of GPT-2's tokenizer."""
    nanogpt_prepare(tmp_path / "theirs", PLAY)
    np.arange(40, dtype="<u2").tofile(tmp_path / "theirs" / "train.bin")
    corpus = open_corpus(tmp_path / "theirs", 9, vocab_size=50)
    assert corpus.tokenizer is None
    assert "not made from input.txt" in capsys.readouterr().err


def test_token_files_alone_get_gpt2s_padded_vocabulary(tmp_path):
    folder = write_bins(tmp_path / "owt", [0, 50256] * 20, range(20))
    corpus = open_corpus(prepare(str(folder), tmp_path / "data"), 9)
    assert (corpus.vocab_size, corpus.tokenizer, corpus.name) == (50304, None, "owt")
    assert open_corpus(folder, 9, vocab_size=50257).vocab_size == 50257


def test_a_truncated_bin_is_named(tmp_path):
    for split in ("train", "val"):
        folder = write_bins(tmp_path / split, range(20), range(20))
        path = folder / f"{split}.bin"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match="whole uint16 ids, 2 bytes each, but has 39") as error:
            open_corpus(folder, 9)
        assert str(error.value).startswith(str(path))


def test_a_truncated_bin_next_to_its_text_is_one_line(tmp_path, capsys):
    """nanoGPT's folder after a copy that was cut off."""
    nanogpt_prepare(tmp_path / "theirs", PLAY)
    path = tmp_path / "theirs" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut off"):
        open_corpus(tmp_path / "theirs", 9)
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_a_missing_bin_is_named(tmp_path):
    for missing in ("train.bin", "val.bin"):
        for other in ("nothing", "meta.pkl"):
            folder = write_bins(tmp_path / missing / other, range(20), range(20))
            (folder / missing).unlink()
            (folder / other).touch()
            with pytest.raises(InputError, match=f"{missing}: must exist"):
                open_corpus(prepare(str(folder), tmp_path / "data"), 9)


def test_a_bin_too_short_for_the_block_is_named(tmp_path):
    for split in ("train", "val"):
        lengths = {"train": 9, "val": 9} | {split: 8}
        folder = write_bins(tmp_path / split, range(lengths["train"]), range(lengths["val"]))
        message = rf"{split}\.bin: .*block_size \+ 1 = 9 tokens, but has 8"
        with pytest.raises(InputError, match=message):
            open_corpus(folder, 9)
        open_corpus(folder, 8)


def test_an_id_past_the_vocabulary_is_named_with_its_position(tmp_path):
    for split in ("train", "val"):
        ids = {"train": np.arange(40) % 10, "val": np.arange(40) % 10}
        ids[split][17] = 10
        folder = write_bins(tmp_path / split, **ids)
        with pytest.raises(InputError, match="size 10, but token 17 is 10: ") as error:
            open_corpus(folder, 9, vocab_size=10)
        assert str(error.value).startswith(str(folder / f"{split}.bin"))
        assert open_corpus(folder, 9, vocab_size=11).vocab_size == 11


def test_a_vocabulary_smaller_than_the_corpus_is_refused(book, data_dir):
    folder = prepare(str(book), data_dir)
    n_chars = len(set(book.read_text(encoding="utf-8")))
    with pytest.raises(InputError, match=f"vocab_size must be at least {n_chars} .*, got 3"):
        open_corpus(folder, 9, vocab_size=3)
    assert open_corpus(folder, 9, vocab_size=64).vocab_size == 64


def test_a_bin_that_disagrees_with_its_meta_json_is_named(book, data_dir):
    folder = prepare(str(book), data_dir)
    for path in (folder / "val.bin", folder / "train.bin"):
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match=r"tokens, as meta\.json says, but has") as error:
            open_corpus(folder, 9)
        assert str(error.value).startswith(str(path))


def test_an_unusable_meta_json_is_named(tmp_path):
    folder = write_bins(tmp_path / "d", range(20), range(20))
    for content in (
        "{",
        "[]",
        '{"dtype": "words"}',
        '{"dtype": "float32"}',
        '{"vocab_size": "x"}',
        '{"vocab_size": 0}',
        '{"val_tokens": null}',
        '{"splits": []}',
        '{"splits": {"train": {}}}',
        '{"splits": {"train": {"files": [], "crc32": 0}, "val": {"files": [3], "crc32": 0}}}',
        '{"splits": {"train": {"files": [], "crc32": 0}, "val": {"files": [], "crc32": 0}}}',
        '{"splits": null}',
    ):
        (folder / "meta.json").write_text(content)
        with pytest.raises(InputError, match=r"meta\.json"):
            open_corpus(folder, 9)


def test_meta_json_says_that_ids_have_four_bytes(tmp_path):
    folder = write_bins(tmp_path / "d", [70_000] * 20, range(20), "<u4")
    (folder / "meta.json").write_text('{"dtype": "uint32", "vocab_size": 70001}')
    corpus = open_corpus(folder, 9)
    assert corpus.vocab_size == 70_001
    assert corpus.splits["train"][3] == 70_000


def test_the_fingerprint_changes_with_any_token_of_either_split(tmp_path):
    fingerprints = set()
    for i, (train, val) in enumerate([(0, 0), (1, 0), (0, 1)]):
        folder = write_bins(tmp_path / f"{i}", [3] * 20 + [train], [3] * 20 + [val])
        fingerprints.add(open_corpus(folder, 9).fingerprint)
    assert len(fingerprints) == 3


# The download


def files_below(folder: Path) -> list[str]:
    """Return the names of all files but hidden ones, the locks."""
    found = (path for path in folder.rglob("[!.]*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


PREPARED = [
    f"shakespeare_char/{name}"
    for name in ("input.txt", "meta.json", "tokenizer.json", "train.bin", "val.bin")
]


def test_shakespeare_is_downloaded_once(data_dir, serve, capsys):
    asked = serve(PLAY, PLAY)
    folder = resolve(None, data_dir, 9)
    assert (folder / "input.txt").read_text(encoding="utf-8") == PLAY
    assert "saved tiny Shakespeare" in capsys.readouterr().out
    assert resolve("shakespeare_char", data_dir, 9) == folder
    assert asked == ["/0"]
    assert files_below(data_dir) == PREPARED


def test_an_existing_text_is_not_downloaded(data_dir, serve):
    """The user's own copy is used, whichever edition it is."""
    asked = serve(PLAY)
    (data_dir / "shakespeare_char").mkdir(parents=True)
    (data_dir / "shakespeare_char" / "input.txt").write_text("another edition " * 20)
    assert "e" in open_corpus(resolve(None, data_dir, 9), 9).tokenizer.chars
    assert asked == []


@pytest.mark.parametrize(
    "bad",
    [PLAY.swapcase(), 404, 503, PLAY[:1000], NOT_HTTP],
    ids=["another text", "not found", "unavailable", "cut off", "not http"],
)
def test_a_bad_mirror_is_skipped(data_dir, serve, bad):
    asked = serve(bad, PLAY)
    folder = resolve("shakespeare_char", data_dir, 9)
    assert (folder / "input.txt").read_text(encoding="utf-8") == PLAY
    assert asked == ["/0", "/1"]
    assert files_below(data_dir) == PREPARED


def test_a_named_dataset_that_cannot_be_downloaded_is_an_error(data_dir, no_network):
    with pytest.raises(Unavailable) as error:
        resolve("shakespeare_char", data_dir, 9)
    place = data_dir / "shakespeare_char" / "input.txt"
    assert f"save {download.SHAKESPEARE_URLS[0]} as {place}" in str(error.value)
    assert "refused" in str(error.value)
    assert "\n" not in str(error.value)
    assert not data_dir.exists()


def test_a_wrong_checksum_everywhere_is_an_error_that_says_so(data_dir, serve):
    serve(PLAY.swapcase(), PLAY.swapcase())
    with pytest.raises(Unavailable, match="sha256 differs"):
        resolve("shakespeare_char", data_dir, 9)
    assert not data_dir.exists()


def test_without_a_dataset_and_a_network_the_manual_is_used_with_a_notice(
    data_dir, no_network, capsys
):
    assert resolve(None, data_dir, 9) == data_dir / "pydocs"
    said = capsys.readouterr().out
    assert "THIS WILL NOT BE SHAKESPEARE" in said
    assert download.SHAKESPEARE_URLS[0] in said
    assert str(data_dir / "shakespeare_char" / "input.txt") in said
    assert "refused" in said
    assert {name.split("/")[0] for name in files_below(data_dir)} == {"pydocs"}


def test_the_advice_in_the_notice_works(data_dir, no_network, capsys):
    resolve(None, data_dir, 9)
    (data_dir / "shakespeare_char").mkdir()
    (data_dir / "shakespeare_char" / "input.txt").write_text(PLAY)
    capsys.readouterr()
    assert resolve(None, data_dir, 9) == data_dir / "shakespeare_char"
    assert "NOT BE SHAKESPEARE" not in capsys.readouterr().out


def test_a_download_that_cannot_be_stored_names_the_folder(tmp_path, serve):
    serve(PLAY)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=str(blocked)):
        resolve("shakespeare_char", blocked, 9)


@pytest.mark.parametrize("full_at", ["input.txt", "train", "val", "meta.json"])
def test_a_full_disk_leaves_no_file_that_looks_complete(data_dir, serve, monkeypatch, full_at):
    serve(PLAY, PLAY)
    fsync = os.fsync

    def full(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(full_at):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device"):
            resolve("shakespeare_char", data_dir, 9)
    if (data_dir / "shakespeare_char").exists():
        with pytest.raises(InputError):
            open_corpus(data_dir / "shakespeare_char", 9)
    corpus = open_corpus(resolve("shakespeare_char", data_dir, 9), 9)
    assert corpus.tokenizer.decode(corpus.splits["train"]) == PLAY[: int(len(PLAY) * 0.9)]
    assert files_below(data_dir) == PREPARED
