"""Preparation: tokenizers, splits, separators, and what interrupts it."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
from conftest import ROOT
from formats import jsonl_of, parquet_of, prepare, resolve
from make_text import make_text

from nanogpt_jax import corpora
from nanogpt_jax.corpora import (
    catalog,
    encoding,
    open_corpus,
    preparation,
    shards,
    sources,
    tokenizer_spec,
    tokens,
)
from nanogpt_jax.corpora.tokenizer import BPETokenizer
from nanogpt_jax.corpora.tokenizer_spec import tokenizer_hash
from nanogpt_jax.errors import InputError

END = "<|endoftext|>"


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """The file of a small tokenizer, like GPT-2's."""
    folder = tmp_path_factory.mktemp("bpe")
    corpora.save_tokenizer(BPETokenizer.train(make_text(100_000, n_words=1000), 500), folder)
    return folder / "tokenizer.json"


def some_documents(n: int) -> list[str]:
    return [f"Document {i}.\nIt has {i * i} words, or {END} so.\n" for i in range(n)]


def write_jsonl(path: Path, texts: list) -> Path:
    path.write_bytes(jsonl_of(texts))
    return path


def seen(folder: Path) -> list[Path]:
    """Return what a folder has but for hidden files, the locks."""
    return sorted(folder.glob("[!.]*"))


def token_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def decoded(corpus, split: str) -> str:
    return corpus.tokenizer.decode(np.asarray(corpus.splits[split]))


# Tokenizers


def test_a_text_is_encoded_with_a_tokenizer_file(book, data_dir, bpe):
    corpus = open_corpus(prepare(str(book), data_dir, tokenizer=str(bpe)), 9)
    text = book.read_text(encoding="utf-8")
    assert decoded(corpus, "train") == text[:5400]
    assert decoded(corpus, "val") == text[5400:]
    assert corpus.vocab_size == corpus.known_tokens == 500
    assert corpus.bytes_per_token == 600 / len(corpus.splits["val"])


def test_bpe_is_trained_on_the_text_and_always_the_same(book, tmp_path):
    folders = [
        prepare(str(book), tmp_path / name, tokenizer="bpe", vocab_size=270) for name in "ab"
    ]
    assert folders[0].name.endswith("-bpe270")
    corpus = open_corpus(folders[0], 9, vocab_size=320)
    assert decoded(corpus, "val") == book.read_text(encoding="utf-8")[5400:]
    assert (corpus.vocab_size, corpus.known_tokens) == (320, 270)
    assert token_files(folders[0]) == token_files(folders[1])
    tokenizers = [corpora.load_tokenizer(folder).to_json() for folder in folders]
    assert tokenizers[0] == tokenizers[1]


def test_each_tokenizer_has_its_own_folder(book, data_dir, bpe):
    folders = {
        prepare(str(book), data_dir, 1, *asked)
        for asked in ((), ("char",), ("bpe", 300), ("bpe", 301), (str(bpe),))
    }
    assert len(folders) == 4
    stems = {folder.name[:13] for folder in folders}
    assert stems == {min(folder.name for folder in folders)}  # that of characters has no suffix


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("gtp2",), r"no 'gtp2'. Did you mean gpt2\?"),
        (("bpe", 100), "at least 257 for bpe"),
        (("book.txt",), r"book\.txt: must be like"),
    ],
)
def test_an_unusable_tokenizer_is_named(book, data_dir, monkeypatch, asked, message):
    monkeypatch.chdir(book.parent)
    with pytest.raises(InputError, match=message):
        prepare(str(book), data_dir, 1, *asked)
    assert not data_dir.exists()


def test_shakespeare_has_gpt2s_tokens_and_is_split_by_characters(data_dir, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_spec, "_gpt2_tokenizer", lambda: bpe)
    text = "".join(make_text(3000, n_words=1000))
    (data_dir / "shakespeare_char").mkdir(parents=True)
    (data_dir / "shakespeare_char" / "input.txt").write_text(text)
    folder = resolve("shakespeare", data_dir, 9)
    assert folder == data_dir / "shakespeare"
    assert decoded(open_corpus(folder, 9), "train") == text[:2700]
    assert resolve("shakespeare_char", data_dir, 9) == data_dir / "shakespeare_char"
    assert (
        corpora.known_val_tokens(corpora.Request("shakespeare", data_dir))
        == json.loads((folder / "meta.json").read_text())["val_tokens"]
    )


def test_without_gpt2s_tokenizer_nothing_is_written(book, data_dir, monkeypatch):
    def unavailable():
        raise InputError("GPT-2's tokenizer could not be downloaded")

    monkeypatch.setattr(tokenizer_spec, "_gpt2_tokenizer", unavailable)
    with pytest.raises(InputError, match="could not be downloaded"):
        prepare(str(book), data_dir, tokenizer="gpt2")
    assert not data_dir.exists()


def test_gpt2s_tokenizer_is_recognised_in_any_file(data_dir, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_spec, "GPT2_HASH", tokenizer_hash(corpora.read_tokenizer(bpe)))
    (data_dir / "shakespeare").mkdir(parents=True)
    (data_dir / "shakespeare" / "input.txt").write_text("".join(make_text(3000, n_words=1000)))
    folder = prepare("shakespeare", data_dir, 9, str(bpe))
    assert folder == resolve("shakespeare", data_dir, 9) == data_dir / "shakespeare"


def test_an_id_that_only_padding_has_is_refused(tmp_path, bpe):
    folder = foreign_folder(tmp_path / "owt", corpora.read_tokenizer(bpe))
    (folder / "tokenizer.json").write_bytes(bpe.read_bytes())
    assert open_corpus(folder, 9, vocab_size=512).known_tokens == 500
    np.full(20, 500, "<u2").tofile(folder / "val.bin")
    with pytest.raises(InputError, match="size 500, but token 0 is 500"):
        open_corpus(folder, 9, vocab_size=512)


def foreign_folder(folder: Path, tokenizer) -> Path:
    """Lay token files out as nanoGPT's data/openwebtext: nothing beside them."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        ids = tokenizer.encode("words and words, " * 20)
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def test_a_tokenizer_is_added_to_token_files_that_have_none(tmp_path, data_dir, bpe):
    folder = foreign_folder(tmp_path / "owt", corpora.read_tokenizer(bpe))
    assert open_corpus(folder, 9).tokenizer is None
    assert resolve(str(folder), data_dir, 9, tokenizer=str(bpe)) == folder
    assert decoded(open_corpus(folder, 9), "val") == "words and words, " * 20


def test_a_different_tokenizer_than_a_folders_is_refused(book, tmp_path, data_dir, bpe):
    folder = prepare(str(book), data_dir, tokenizer="bpe", vocab_size=270)
    for size in (None, 270, 50304):  # its own; what a preset says beyond that is padding
        assert resolve(str(folder), data_dir, 9, "bpe", size) == folder
    assert resolve(str(folder), data_dir, 9, str(folder / "tokenizer.json")) == folder
    for asked in (str(bpe), "char", "gpt2"):
        with pytest.raises(InputError, match="made with a different tokenizer than"):
            resolve(str(folder), data_dir, 9, asked)
    theirs = foreign_folder(tmp_path / "owt", corpora.read_tokenizer(bpe))
    with pytest.raises(InputError, match="the folder has none"):
        resolve(str(theirs), data_dir, 9, "bpe")
    with pytest.raises(InputError, match="has 270 tokens, but an id there is"):
        resolve(str(theirs), data_dir, 9, str(folder / "tokenizer.json"))


# Documents


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_every_tenth_document_is_for_validation_and_a_separator_follows_each(
    tmp_path, data_dir, bpe, name, capsys
):
    import gzip

    texts = some_documents(41)
    documents = [*texts[:5], None, "", *texts[5:]]
    content = parquet_of(documents) if name == "d.parquet" else jsonl_of(documents)
    (tmp_path / name).write_bytes(gzip.compress(content) if name == "d.jsonl.gz" else content)
    corpus = open_corpus(prepare(str(tmp_path / name), data_dir, tokenizer=str(bpe)), 9)
    assert decoded(corpus, "val") == "".join(text + END for text in texts[9::10])
    n_chars = sum(map(len, texts))
    assert f"41 texts (and 2 empty ones), {n_chars:,} characters" in capsys.readouterr().out
    del texts[9::10]
    assert decoded(corpus, "train") == "".join(text + END for text in texts)
    (end,) = corpus.tokenizer.encode_prompt(END)
    # The same words within a document are no separator.
    assert np.count_nonzero(corpus.splits["train"] == end) == len(texts)


def test_the_validation_split_has_a_limit(tmp_path, data_dir, bpe, monkeypatch):
    monkeypatch.setattr(sources.Files, "max_val_chars", 110)
    texts = some_documents(100)
    path = write_jsonl(tmp_path / "documents.jsonl", texts)
    corpus = open_corpus(prepare(str(path), data_dir, tokenizer=str(bpe)), 9)
    assert decoded(corpus, "val") == "".join(texts[i] + END for i in (9, 19, 29))


def test_documents_in_characters(tmp_path, data_dir):
    texts = [text.replace("\n", " ") for text in some_documents(20)]
    path = write_jsonl(tmp_path / "documents.jsonl", texts)
    corpus = open_corpus(prepare(str(path), data_dir, tokenizer="char"), 9)
    assert decoded(corpus, "val") == f"{texts[9]}\n{texts[19]}\n"


def test_the_key_of_the_text_can_be_named_and_has_a_folder_of_its_own(tmp_path, data_dir, bpe):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "question", "answer": "because"}\n' * 20)
    answers = prepare(str(path), data_dir, tokenizer=str(bpe), text_key="answer")
    assert decoded(open_corpus(answers, 9), "val") == 2 * f"because{END}"
    assert prepare(str(path), data_dir, tokenizer=str(bpe)) != answers


def test_a_bad_document_is_named_and_no_corpus_left_behind(tmp_path, data_dir, bpe):
    path = write_jsonl(tmp_path / "documents.jsonl", some_documents(12))
    path.write_text(path.read_text() + "{\n")
    (tmp_path / "d.parquet").write_bytes(parquet_of([["a list"]]))
    for name, message in (
        ("documents.jsonl", "line 13: must"),
        ("d.parquet", "must have a column"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(str(tmp_path / name), data_dir, tokenizer=str(bpe))
        assert seen(data_dir) == []


def test_a_text_that_the_tokenizer_changes_is_refused(tmp_path, data_dir, bpe):
    content = json.loads(bpe.read_text()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "nfc.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("cafe\u0301 " * 50)
    with pytest.raises(InputError, match="must decode its tokens back"):
        prepare(str(tmp_path / "text.txt"), data_dir, tokenizer=str(tmp_path / "nfc.json"))
    assert not data_dir.exists()


def test_too_few_documents_are_refused(tmp_path, data_dir, bpe):
    path = write_jsonl(tmp_path / "documents.jsonl", some_documents(9))
    with pytest.raises(InputError, match="one gets 0 \\(every 10th document, "):
        prepare(str(path), data_dir, tokenizer=str(bpe))
    assert seen(data_dir) == []


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl.zst"])
def test_a_missing_library_is_one_line(tmp_path, data_dir, bpe, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    (tmp_path / name).write_bytes(b"PAR1" if name == "t.parquet" else b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match=r"pip install -e '\.\[corpora\]'"):
        prepare(str(tmp_path / name), data_dir, tokenizer=str(bpe))


def test_a_wrong_file_in_a_folder_is_refused_before_an_old_corpus_is_touched(
    tmp_path, data_dir, bpe
):
    place = tmp_path / "tables"
    place.mkdir()
    (place / "a.parquet").write_bytes(parquet_of(some_documents(20)))
    folder = prepare(str(place), data_dir, tokenizer=str(bpe))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (place / "b.parquet").write_bytes(parquet_of([["a list"]]))
    with pytest.raises(InputError, match=r"b\.parquet: must have a column text of strings"):
        prepare(str(place), data_dir, tokenizer=str(bpe))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_user_who_does_not_exist_has_no_home(data_dir):
    with pytest.raises(InputError, match=r"there is no '~nobody-of-that-name/x\.txt'"):
        prepare("~nobody-of-that-name/x.txt", data_dir)


def test_a_tilde_that_the_shell_left_is_expanded(book, tmp_path, monkeypatch, bpe):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.json").write_bytes(bpe.read_bytes())
    folder = prepare(f"~/{book.relative_to(tmp_path)}", Path("~/d"), tokenizer="~/t.json")
    assert folder.parent == tmp_path / "d"


# The Hub


@pytest.mark.parametrize("name", ["openwebtext", "tinystories"])
def test_a_corpus_of_the_hub_is_streamed_once(data_dir, hub, bpe, monkeypatch, name):
    monkeypatch.setattr(tokenizer_spec, "_gpt2_tokenizer", lambda: bpe)
    monkeypatch.setattr(sources.Hub, "every", 20)
    texts = some_documents(100)
    file = "plain_text/train-0" if name == "openwebtext" else "data/train-0"
    files = {f"{file}.parquet": parquet_of(texts), "data/validation-0.parquet": parquet_of(["val"])}
    asked = hub(files)
    folder = prepare(name, data_dir)
    corpus, n_asked = open_corpus(folder, 2), len(asked)
    val = texts[19::20] if name == "openwebtext" else ["val"]
    assert decoded(corpus, "val") == "".join(text + END for text in val)
    assert prepare(name, data_dir) == resolve(name, data_dir, 2) == folder == data_dir / name
    assert len(asked) == n_asked
    assert json.loads((folder / "meta.json").read_text())["source_revision"] == "sha1"


def test_a_broken_stream_resumes_at_the_same_revision(data_dir, tmp_path, hub, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_spec, "_gpt2_tokenizer", lambda: bpe)
    monkeypatch.setattr(sources.Hub, "every", 20)
    monkeypatch.setattr(preparation, "PART_CHARS", 1000)
    parts = {f"plain_text/train-{i}.parquet": parquet_of(some_documents(99 + i)) for i in range(3)}
    hub(parts)
    whole = prepare("openwebtext", tmp_path / "whole", shard_tokens=500)
    broken = dict(parts)
    for name in parts:
        asked = hub(broken | {name: OSError("connection lost")})
        with pytest.raises(InputError, match="could not be read from the Hub") as error:
            prepare("openwebtext", data_dir, shard_tokens=500)
        assert "run the same command again" in str(error.value)
        with pytest.raises(InputError, match="must be prepared before training"):
            resolve("openwebtext", data_dir, 9)
    del asked[:]
    hub(parts)
    folder = prepare("openwebtext", data_dir, shard_tokens=500)
    assert token_files(folder) == token_files(whole)
    assert all("@sha" in path and not path.endswith("train-0.parquet") for path in asked)


def test_training_refuses_to_prepare_for_hours(data_dir):
    with pytest.raises(InputError, match=r"python data/prepare\.py fineweb-edu") as error:
        resolve("fineweb-edu", data_dir, 9)
    assert "20 GB of disk" in str(error.value)
    assert not data_dir.exists()


def test_a_corpus_of_the_hub_has_no_characters(data_dir, hub):
    hub({"plain_text/train-0.parquet": parquet_of(["a"])})
    with pytest.raises(InputError, match="must have a byte-pair tokenizer"):
        prepare("openwebtext", data_dir, tokenizer="char")


def test_a_disk_that_is_too_small_is_reported_first(data_dir, hub, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_spec, "_gpt2_tokenizer", lambda: bpe)
    hub({"plain_text/train-0.parquet": parquet_of(["a"])})
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(InputError, match=r"about \d+\.\d+ GB in .*, where 1\.00 GB are free: "):
        prepare("openwebtext", data_dir)
    assert not data_dir.exists()


# Shards


def test_a_split_of_several_files_is_one_array(book, data_dir, tmp_path, bpe):
    whole = open_corpus(prepare(str(book), tmp_path / "whole", tokenizer=str(bpe)), 9)
    folder = prepare(str(book), data_dir, tokenizer=str(bpe), shard_tokens=150)
    names = [*token_files(folder)]
    n_shards = -(-len(whole.splits["train"]) // 150)
    assert names[:-1] == [f"train_{i:05d}.bin" for i in range(n_shards)] or "val_00000.bin" in names
    corpus = open_corpus(folder, 9)
    for split in ("train", "val"):
        np.testing.assert_array_equal(np.asarray(corpus.splits[split]), whole.splits[split])
    assert corpus.fingerprint == whole.fingerprint


def test_a_missing_or_cut_off_shard_is_named(book, data_dir, bpe):
    folder = prepare(str(book), data_dir, tokenizer=str(bpe), shard_tokens=150)
    path = folder / "train_00001.bin"
    content = path.read_bytes()
    for found, message in ((None, "must exist"), (content[:-1], "cut off"), (b"", "must have 150")):
        path.unlink(missing_ok=True)
        if found is not None:
            path.write_bytes(found)
        with pytest.raises(InputError, match=rf"train_00001\.bin: .*{message}"):
            open_corpus(folder, 9)
    prepare(str(book), data_dir, tokenizer=str(bpe), shard_tokens=150)
    assert path.read_bytes() == content


def test_a_changed_token_is_found(book, data_dir):
    folder = prepare(str(book), data_dir)
    content = bytearray((folder / "val.bin").read_bytes())
    content[0] ^= 1
    (folder / "val.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"checksum in meta\.json, but val\.bin changed"):
        open_corpus(folder, 9)


def test_a_damaged_id_of_a_large_split_is_named(book, data_dir, monkeypatch):
    """Such a split is trusted when it is opened, so whatever reads it finds that."""
    folder = prepare(str(book), data_dir)
    content = bytearray((folder / "val.bin").read_bytes())
    content[7] = 255
    (folder / "val.bin").write_bytes(content)
    monkeypatch.setattr(tokens, "CHECKED_BYTES", 100)
    corpus = open_corpus(folder, 9)
    with pytest.raises(InputError, match=r"val\.bin: ids must be below .*, but token 3 is 65"):
        _ = corpus.bytes_per_token


# Interruptions


def start(*argv) -> subprocess.Popen:
    command = [sys.executable, "-u", str(ROOT / "data" / "prepare.py"), *map(str, argv)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe)


def n_done(data_dir: Path) -> int:
    """Return how many tokens an unfinished preparation has."""
    found = filter(None, map(shards.last_part, data_dir.glob("*")))
    return next((counts.train + counts.val for _, counts in found), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_killed_at_any_moment_it_resumes_and_writes_the_same_bytes(tmp_path, data_dir, bpe, kind):
    path = tmp_path / f"text.{kind}"
    texts = list(make_text(13_000_000, n_words=3000))
    if kind == "txt":
        path.write_text("".join(texts))
    else:
        write_jsonl(path, [text[i : i + 3000] for text in texts for i in range(0, len(text), 3000)])
    flags = path, "--tokenizer", bpe, "--shard_tokens", 100_000, "--data_dir"
    whole = prepare(str(path), tmp_path / "whole", 1, str(bpe), shard_tokens=100_000)
    randomly, resumed_from, kills = random.Random(0), [], 0
    for _ in range(40):
        before, process = n_done(data_dir), start(*flags, data_dir)
        if kills < 5:
            while process.poll() is None and n_done(data_dir) == before:
                time.sleep(0.002)
            time.sleep(randomly.uniform(0, 0.1))
            process.kill()
        out, err = process.communicate(timeout=60)
        resumed_from += [
            int(n.replace(",", "")) for n in re.findall(r"resuming .* from ([\d,]+)", out)
        ]
        (folder,) = seen(data_dir)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
        wanted = corpora.Request(str(path), data_dir, tokenizer=str(bpe))
        assert corpora.known_val_tokens(wanted) is None
        with pytest.raises(InputError, match=r"is incomplete: run the same data/prepare\.py"):
            open_corpus(folder, 9)
        with pytest.raises(InputError, match=r"is incomplete: run the same data/prepare\.py"):
            resolve(str(folder), tmp_path, 9)
    assert kills == 5
    assert len(resumed_from) == 5
    assert resumed_from == sorted({*resumed_from})
    assert {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"
    } == {path.name: path.read_bytes() for path in whole.iterdir() if path.name != "meta.json"}


def test_interrupted_at_any_rename_or_removal_it_resumes_and_writes_the_same_bytes(
    tmp_path, data_dir, bpe, monkeypatch, capsys
):
    monkeypatch.setattr(preparation, "PART_CHARS", 20_000)
    monkeypatch.setattr("nanogpt_jax.corpora.text.BLOCK_BYTES", 10_000)
    path = tmp_path / "text.txt"
    path.write_text("".join(make_text(200_000, n_words=3000)))
    whole = token_files(prepare(str(path), tmp_path / "whole", 1, str(bpe), shard_tokens=9000))
    left = [0]

    def sometimes(function):
        def call(path, *args, **kwargs):
            left[0] -= 1
            if left[0] < 0 and path.suffix != ".lock":  # or this process would keep the lock
                raise KeyboardInterrupt
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(Path, "replace", sometimes(Path.replace))
    monkeypatch.setattr(Path, "unlink", sometimes(Path.unlink))
    for n in range(1, 200):
        left[0], before = 2 + n // 2, n_done(data_dir)
        try:
            folder = prepare(str(path), data_dir, 1, str(bpe), shard_tokens=9000)
            break
        except KeyboardInterrupt:
            assert (before > 0) == ("resuming" in capsys.readouterr().out)
    assert n > 5
    assert token_files(folder) == whole
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*whole, "meta.json", "tokenizer.json"]
    )


@pytest.mark.parametrize("what", ["another text", "too short a text"])
def test_killed_while_parts_are_deleted_it_writes_the_same_bytes(
    tmp_path, data_dir, bpe, monkeypatch, what
):
    """Otherwise the parts that are left would be resumed, with holes between them."""
    monkeypatch.setattr(preparation, "PART_CHARS", 20_000)
    monkeypatch.setattr("nanogpt_jax.corpora.text.BLOCK_BYTES", 10_000)
    path, text = tmp_path / "text.txt", "".join(make_text(200_000, n_words=3000))
    path.write_text(text)
    whole = token_files(prepare(str(path), tmp_path / "whole", 1, str(bpe)))
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(str(path), data_dir, 1, str(bpe))

    def delete_some_and_die(folder, **kwargs):
        if Path(folder).exists():
            for part in sorted(Path(folder).iterdir())[:3]:
                part.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", delete_some_and_die)
        if what == "another text":
            path.write_text(text[::-1])
        with pytest.raises(KeyboardInterrupt):
            prepare(str(path), data_dir, 1 if what == "another text" else 10**6, str(bpe))
    path.write_text(text)
    folder = prepare(str(path), data_dir, 1, str(bpe))
    assert token_files(folder) == whole
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_a_missing_part_is_an_error(book, data_dir, monkeypatch):
    monkeypatch.setattr(preparation, "PART_CHARS", 1000)
    monkeypatch.setattr("nanogpt_jax.corpora.text.BLOCK_BYTES", 1000)
    join = shards.join

    def lose_one_and_join(folder, *args):
        sorted((folder / "parts").iterdir())[2].unlink(missing_ok=True)
        return join(folder, *args)

    monkeypatch.setattr(shards, "join", lose_one_and_join)
    with pytest.raises(InputError, match="the part before it is missing"):
        prepare(str(book), data_dir)


@pytest.fixture
def begun(book, data_dir, monkeypatch) -> Path:
    """A preparation of the book in 300 tokens, 1000 to a shard, that did not come to its end."""
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(str(book), data_dir, 1, "bpe", 300, 1000)
    (folder,) = seen(data_dir)
    assert n_done(data_dir)
    return folder


@pytest.mark.parametrize("what", ["time", "shards"])
def test_a_touched_source_or_another_shard_size_still_resumes(
    book, data_dir, begun, tmp_path, capsys, what
):
    """A touched or copied text, or train.py, which knows of no --shard_tokens."""
    if what == "time":
        os.utime(book, (1, 1))
    folder = prepare(str(book), data_dir, 1, "bpe", 300, 1000 if what == "time" else 10**8)
    assert "resuming" in capsys.readouterr().out
    again = prepare(str(book), tmp_path / "again", 1, "bpe", 300, 1000)
    assert token_files(folder) == token_files(again)
    assert prepare(str(book), data_dir, 1, "bpe", 300) == folder
    assert capsys.readouterr().out.count("prepared") == 1  # only the other


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("source", "book.txt changed"),
        ("tokenizer", "tokenizer.json changed"),
        ("plan", "progress.json is damaged"),
        ("list", "progress.json is damaged"),
        ("version", "or of another version"),
    ],
)
def test_a_preparation_starts_over_if_anything_changed(
    book, data_dir, bpe, begun, tmp_path, capsys, what, why
):
    if what == "source":
        book.write_text(book.read_text()[::-1])
    elif what == "tokenizer":
        (begun / "tokenizer.json").write_bytes(bpe.read_bytes())
    elif what == "version":
        plan = json.loads((begun / "progress.json").read_text())
        (begun / "progress.json").write_text(json.dumps(plan | {"items": plan["items"] - 1}))
    else:
        (begun / "progress.json").write_text("[]" if what == "list" else "{")
    assert begun == prepare(str(book), data_dir, 1, "bpe", 300, 900)
    printed = capsys.readouterr()
    assert f"{begun}: starting over because" in printed.err
    assert why in printed.err
    assert "resuming" not in printed.out
    again = prepare(str(book), tmp_path / "again", 1, "bpe", 300, 900)
    assert token_files(begun) == token_files(again)
    tokenizers = [corpora.load_tokenizer(folder).to_json() for folder in (begun, again)]
    assert tokenizers[0] == tokenizers[1]


def test_a_damaged_part_is_one_line(book, data_dir, begun):
    for path in (begun / "parts").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"parts/.*\.npz: must be a complete file"):
        prepare(str(book), data_dir, 1, "bpe", 300)


def test_an_old_corpus_survives_if_a_new_one_cannot_begin(book, data_dir, bpe, monkeypatch):
    """No tokenizer, or no disk: then nothing has been written, so nothing is to be deleted."""
    monkeypatch.setattr(tokenizer_spec, "_gpt2_tokenizer", lambda: bpe)
    folder = prepare(str(book), data_dir, tokenizer="gpt2")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    book.write_text(book.read_text()[::-1])
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_spec, "_gpt2_tokenizer", lambda: book)
        with pytest.raises(InputError, match="must be like"):
            prepare(str(book), data_dir, tokenizer="gpt2")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=-(10**5)))
    with pytest.raises(InputError, match="GB are free: free some space"):
        prepare(str(book), data_dir, tokenizer="gpt2")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_replaced_files_count_as_free_space(book, data_dir, monkeypatch):
    folder = prepare(str(book), data_dir)
    book.write_text(book.read_text()[::-1])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    assert prepare(str(book), data_dir) == folder  # 12,000 bytes take the place of 12,000


def test_a_source_that_changes_while_it_is_read_is_refused(book, data_dir, monkeypatch):
    encode = encoding.encode_items

    def encode_and_change(*args):
        book.write_text("another text " * 50)
        return encode(*args)

    monkeypatch.setattr(encoding, "encode_items", encode_and_change)
    with pytest.raises(InputError, match="must not change while it is read"):
        prepare(str(book), data_dir)
    assert seen(data_dir) == []


def test_a_source_may_be_touched_while_it_is_read(book, data_dir, monkeypatch):
    encode = encoding.encode_items

    def encode_and_touch(*args):
        os.utime(book, (1, 1))
        return encode(*args)

    monkeypatch.setattr(encoding, "encode_items", encode_and_touch)
    folder = prepare(str(book), data_dir)
    assert decoded(open_corpus(folder, 9), "val") == book.read_text()[5400:]


def test_a_touched_text_is_not_prepared_again(book, data_dir):
    folder = prepare(str(book), data_dir)
    before = (folder / "train.bin").stat().st_mtime_ns
    os.utime(book, (1, 1))
    for _ in range(2):
        assert prepare(str(book), data_dir) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == before


def test_a_corpus_of_an_older_version_is_used(book, data_dir):
    folder = prepare(str(book), data_dir)
    fingerprint = open_corpus(folder, 9).fingerprint
    meta = json.loads((folder / "meta.json").read_text())
    names = ("source", "source_sha256", "dtype", "vocab_size", "train_tokens", "val_tokens")
    (folder / "meta.json").write_text(json.dumps({name: meta[name] for name in names}))
    before = (folder / "train.bin").stat().st_mtime_ns
    assert prepare(str(book), data_dir) == folder
    assert (folder / "train.bin").stat().st_mtime_ns == before
    assert open_corpus(folder, 9).fingerprint == fingerprint


@pytest.mark.parametrize("phase", ["tokenizing", "training a tokenizer"])
def test_ctrl_c_is_heard_at_once(tmp_path, data_dir, bpe, phase):
    path = tmp_path / "text.txt"
    if phase == "tokenizing":
        path.write_text("".join(make_text(8_000_000)))
        tokenizer = bpe
    else:
        path.write_bytes(b"".join(np.random.default_rng(0).choice([b"A", b"C", b"G", b"T"], 10**7)))
        tokenizer = "bpe"
    process = start(path, "--tokenizer", tokenizer, "--data_dir", data_dir)
    if phase == "tokenizing":
        while process.poll() is None and not n_done(data_dir):
            time.sleep(0.01)
    else:
        assert "training a tokenizer" in process.stderr.readline()
        time.sleep(0.5)
    start_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - start_s < 5
    assert process.returncode == 128 + signal.SIGINT
    assert out == ""
    assert ("the same command resumes" in err) == (phase == "tokenizing")
    assert "Traceback" not in err


def test_a_second_process_waits(book, data_dir):
    data_dir.mkdir()
    folder = catalog._locate(corpora.Request(str(book), data_dir))[0]
    with filelock.FileLock(data_dir / f".{folder.name}.lock"):
        process = start(book, "--data_dir", data_dir)
        assert "waiting" in process.stderr.readline()
        time.sleep(0.2)
        assert process.poll() is None
        assert seen(data_dir) == []
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "6,000 characters" in out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what it takes")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "no blanks", "documents"])
def test_memory_does_not_grow_with_the_text(tmp_path, bpe, kind):
    """A line of 10 MB, or 24 MB of Chinese, costs no more than the work on a batch."""
    path = tmp_path / ("text.jsonl" if kind == "documents" else "text.txt")
    if kind == "words":
        text = "".join(make_text(10_000_000)).replace("\n", " ")
    else:
        text = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FA5, 8_000_000)))
    if kind == "documents":
        parts = [text[i : i + 200_000] for i in range(0, 4_000_000, 200_000)]
        write_jsonl(path, [*parts, text[4_000_000:]])
    else:
        path.write_text(text, encoding="utf-8")
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from nanogpt_jax import corpora\n"
        "corpora.prepare(corpora.Request(sys.argv[1], Path(sys.argv[2]), tokenizer=sys.argv[3]))\n"
        # Of this process alone: ru_maxrss begins with that of the one that started it.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())\n"
        "print(int(peak[1]) // 1024)\n"
    )
    argv = [sys.executable, "-c", script, str(path), str(tmp_path / "data"), str(bpe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(argv, env=environment, text=True, capture_output=True, check=True)
    assert int(result.stdout.split()[-1]) < 600


def test_a_text_without_spaces_trains_a_tokenizer_as_fast_as_one_with_line_breaks():
    text = "".join(random.Random(0).choices("ACGT", k=300_000))
    text += "".join(random.Random(0).choices(" \t\n", k=300_000))
    begin_s = time.monotonic()
    tokenizer = BPETokenizer.train([text], 2000)
    assert time.monotonic() - begin_s < 10
    assert tokenizer.vocab_size == 2000
    assert len(tokenizer.encode(text)) < 160_000


# The command


def test_the_command_accepts_all_of_nanogpts_flag_forms(book, data_dir, capsys):
    path = ROOT / "data" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare", path)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    argv = [str(book), "--tokenizer=bpe", "--vocab-size", "270", f"--data_dir={data_dir}"]
    command.main(argv)
    assert "vocabulary of 270" in capsys.readouterr().out
    for argv, message in (
        (["--vocab", "3"], r"there is no flag --vocab\. Did you mean vocab_size\?"),
        (["--shard_tokens", "0"], "shard_tokens must be at least 1"),
        (["--shard_tokens", "many"], "must be a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            command.main([str(book), *argv])
