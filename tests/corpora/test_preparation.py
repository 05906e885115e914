"""Preparation: tokenizers, documents, and what interrupts it."""

import gzip
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

import numpy as np
import pytest
from conftest import ROOT
from make_text import make_text

from nanogpt_jax import corpora, files
from nanogpt_jax.corpora import (
    catalog,
    open_corpus,
    preparation,
    prepare,
    resolve,
    sources,
    tokenizer_spec,
    tokens,
)
from nanogpt_jax.corpora.tokenizer import BPETokenizer, tokenizer_hash
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


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return path


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
    assert corpora.load_tokenizer(folders[0]) == corpora.load_tokenizer(folders[1])


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
        corpora.known_val_tokens("shakespeare", data_dir)
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


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_every_tenth_document_is_for_validation_and_separators_are_between(
    tmp_path, data_dir, bpe, ending
):
    texts = some_documents(41)
    path = tmp_path / f"documents.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": [*range(43)], "text": [*texts[:5], None, "", *texts[5:]]})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        write_jsonl(path, [*texts[:5], "", *texts[5:]])
        if ending == "jsonl.gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    corpus = open_corpus(prepare(str(path), data_dir, tokenizer=str(bpe)), 9)
    assert decoded(corpus, "val") == END.join(texts[9::10])
    del texts[9::10]
    assert decoded(corpus, "train") == END.join(texts)
    (end,) = corpus.tokenizer.encode_prompt(END)
    # The same words within a document are no separator.
    assert np.count_nonzero(corpus.splits["train"] == end) == len(texts) - 1


def test_the_validation_split_has_a_limit(tmp_path, data_dir, bpe, monkeypatch):
    monkeypatch.setattr(sources._Documents, "max_val_chars", 110)
    texts = some_documents(100)
    path = write_jsonl(tmp_path / "documents.jsonl", texts)
    corpus = open_corpus(prepare(str(path), data_dir, tokenizer=str(bpe)), 9)
    assert decoded(corpus, "val") == END.join([texts[9], texts[19], texts[29]])


def test_documents_in_characters(tmp_path, data_dir):
    texts = [text.replace("\n", " ") for text in some_documents(20)]
    path = write_jsonl(tmp_path / "documents.jsonl", texts)
    corpus = open_corpus(prepare(str(path), data_dir, tokenizer="char"), 9)
    assert decoded(corpus, "val") == f"{texts[9]}\n{texts[19]}"


def test_a_folder_of_documents_is_read_in_the_order_of_names(tmp_path, data_dir, bpe):
    (tmp_path / "all").mkdir()
    texts = some_documents(22)
    write_jsonl(tmp_path / "all" / "b.jsonl", texts[12:])
    write_jsonl(tmp_path / "all" / "a.jsonl", texts[:12])
    corpus = open_corpus(prepare(str(tmp_path / "all"), data_dir, tokenizer=str(bpe)), 9)
    assert decoded(corpus, "val") == f"{texts[9]}{END}{texts[19]}"


def test_a_folder_of_several_kinds_is_refused(tmp_path, data_dir):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(InputError, match=r"of one kind, but has 1 \.jsonl and 1 \.txt"):
        prepare(str(tmp_path), data_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r'must be like {"text": "\.\.\."}, but is {'),
        ('{"content": "words"}', 'but is {"content"'),
        ('{"text": null}', "but is"),
        ("[3]", "but is"),
        ('{"text": "half \\ud83c"}', "lone surrogate"),
    ],
)
def test_a_bad_line_is_named_and_nothing_left_behind(tmp_path, data_dir, bpe, line, message):
    path = tmp_path / "documents.jsonl"
    write_jsonl(path, some_documents(12))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"documents\.jsonl, line 13: .*{message}"):
        prepare(str(path), data_dir, tokenizer=str(bpe))
    assert not data_dir.exists()


def test_a_table_without_text_is_named(tmp_path, data_dir, bpe):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    for columns in ({"content": ["a"]}, {"text": [3]}):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(InputError, match=r"t\.parquet: must have a column text, of strings"):
            prepare(str(path), data_dir, tokenizer=str(bpe))
    path.write_bytes(b"PAR1 and nothing")
    with pytest.raises(InputError, match=r"t\.parquet: must be a complete Parquet file"):
        prepare(str(path), data_dir, tokenizer=str(bpe))


def test_a_damaged_gzip_file_is_one_line(tmp_path, data_dir, bpe):
    path = tmp_path / "documents.jsonl.gz"
    write_jsonl(path, some_documents(500))
    whole = gzip.compress(path.read_bytes())
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(8) + whole[middle + 8 :]
    for content in (whole[:-20], damaged, b"not gzip"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"documents\.jsonl\.gz(: |, line )"):
            prepare(str(path), data_dir, tokenizer=str(bpe))
        assert not data_dir.exists()


def test_too_few_documents_are_refused(tmp_path, data_dir, bpe):
    path = write_jsonl(tmp_path / "documents.jsonl", some_documents(9))
    with pytest.raises(InputError, match="one gets 0 \\(every 10th document, "):
        prepare(str(path), data_dir, tokenizer=str(bpe))
    assert not data_dir.exists()


def test_a_missing_library_is_one_line(tmp_path, data_dir, bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    for dataset in ("openwebtext", str(tmp_path / "t.parquet")):
        with pytest.raises(InputError, match=r"pip install -e '\.\[corpora\]'"):
            prepare(dataset, data_dir, tokenizer=str(bpe))


# The hub


class FakeApi:
    """Answers each question for the newest commit with another one."""

    def __init__(self, asked):
        self._asked = asked

    def dataset_info(self, repository, revision=None, timeout=None):
        assert timeout
        self._asked.append(((repository,), {"revision": revision}))
        return SimpleNamespace(sha=f"sha{sum(a[0] == (repository,) for a in self._asked)}")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch, bpe):
    """The hub as a parquet file: fake_hub(texts) -> what it was asked for."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tokenizer_spec, "_gpt2_tokenizer", lambda: bpe)
    monkeypatch.setattr(preparation, "measure_speed", lambda tokenizer: (1e6, 4.0))
    monkeypatch.setattr(sources.Hub, "every", 20)
    load_dataset, asked = datasets.load_dataset, []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeApi(asked))

    def serve(texts):
        table = pyarrow.table({"url": ["a"] * len(texts), "text": texts})
        pyarrow.parquet.write_table(table, tmp_path / "hub.parquet", row_group_size=50)

        def load(*args, **kwargs):
            asked.append((args, kwargs))
            files = str(tmp_path / "hub.parquet")
            return load_dataset("parquet", data_files=files, split="train", streaming=True)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return serve


@pytest.mark.parametrize("name", ["openwebtext", "fineweb-edu"])
def test_a_corpus_of_the_hub_is_streamed_once(data_dir, fake_hub, name, capsys):
    texts = some_documents(100)
    asked = fake_hub(texts)
    folder = prepare(name, data_dir)
    corpus = open_corpus(folder, 9)
    assert folder == data_dir / name
    assert decoded(corpus, "val") == END.join(texts[19::20])
    assert "hours on the" in capsys.readouterr().err
    assert prepare(name, data_dir) == resolve(name, data_dir, 9) == folder
    of_branch, (args, kwargs) = asked
    corpus = sources.HUB[name]
    assert args == (corpus.repository,)
    assert of_branch == (args, {"revision": corpus.settings.get("revision")})
    assert kwargs == {**corpus.settings, "revision": "sha1", "split": "train", "streaming": True}
    assert json.loads((folder / "meta.json").read_text())["source_revision"] == "sha1"


def test_a_broken_stream_resumes(data_dir, tmp_path, fake_hub, monkeypatch):
    monkeypatch.setattr("nanogpt_jax.corpora.text.PIECE_BYTES", 256)
    texts = some_documents(600)
    asked = fake_hub(texts)
    whole = token_files(prepare("openwebtext", tmp_path / "whole", shard_tokens=500))
    encode, left = BPETokenizer.encode_batch, [4]

    def encode_some(self, texts):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(BPETokenizer, "encode_batch", encode_some)
    begun_with = []
    for _ in range(20):
        left[0] = 4
        try:
            folder = prepare("openwebtext", data_dir, shard_tokens=500)
            break
        except KeyboardInterrupt:
            begun_with.append(position(data_dir)[0])
            with pytest.raises(InputError, match="must be prepared before training"):
                resolve("openwebtext", data_dir, 9)
    assert len(begun_with) > 3
    assert begun_with == sorted({*begun_with})
    assert token_files(folder) == whole
    (first, *others) = [kwargs["revision"] for _, kwargs in asked if "streaming" in kwargs]
    assert len({*others}) == 1  # that of the first of them, not the newest of each
    assert first not in others


def test_a_revision_that_cannot_be_queried_is_one_line(data_dir, fake_hub, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError("offline mode is enabled\nand more")

    fake_hub(["words"])
    monkeypatch.setattr(FakeApi, "dataset_info", fail)
    with pytest.raises(InputError, match=r"offline mode is enabled\): .*of https://.*folder") as e:
        prepare("openwebtext", data_dir)
    assert "\n" not in str(e.value)
    assert not data_dir.exists()


def test_no_network_is_one_line_that_says_what_to_save(data_dir, fake_hub, monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'Skylion007/openwebtext'\nand more")

    fake_hub(["words"])
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"Couldn't reach.*parquet files of https://.*folder") as e:
        prepare("openwebtext", data_dir)
    assert "\n" not in str(e.value)
    assert not data_dir.exists()


def test_training_refuses_to_prepare_for_hours(data_dir):
    with pytest.raises(InputError, match=r"python data/prepare\.py fineweb-edu") as error:
        resolve("fineweb-edu", data_dir, 9)
    assert "20 GB of disk" in str(error.value)
    assert not data_dir.exists()


def test_a_corpus_of_the_hub_is_not_read_twice_for_its_characters(data_dir):
    with pytest.raises(InputError, match="must have a byte-pair tokenizer"):
        prepare("openwebtext", data_dir, tokenizer="char")


def test_a_disk_that_is_too_small_is_reported_first(data_dir, fake_hub, monkeypatch):
    fake_hub(["words"])
    usage = (10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": usage[2]}))
    with pytest.raises(InputError, match=r"about \d+\.\d GB must be free .* but only 1\.0 GB are"):
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


def position(data_dir: Path) -> list | None:
    """Return how far a preparation has come, as its progress.json says."""
    journals = map(preparation._read_journal, data_dir.glob("*"))
    return next((journal["position"] for journal in journals if journal), None)


@pytest.mark.parametrize("kind", ["txt", pytest.param("jsonl", marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_resumes_and_writes_the_same_bytes(tmp_path, data_dir, bpe, kind):
    path = tmp_path / f"text.{kind}"
    texts = list(make_text(2_000_000, n_words=3000))
    if kind == "txt":
        path.write_text("".join(texts))
    else:
        write_jsonl(path, [text[i : i + 3000] for text in texts for i in range(0, len(text), 3000)])
    flags = path, "--tokenizer", bpe, "--shard_tokens", 10_000, "--data_dir"
    whole = prepare(str(path), tmp_path / "whole", 1, str(bpe), shard_tokens=10_000)
    randomly, resumed_from, kills = random.Random(0), [], 0
    for _ in range(40):
        before, process = position(data_dir), start(*flags, data_dir)
        if kills < 5:
            while process.poll() is None and position(data_dir) in (before, None):
                time.sleep(0.002)
            time.sleep(randomly.uniform(0, 0.1))
            process.kill()
        out, err = process.communicate(timeout=60)
        resumed_from += [
            int(n.replace(",", "")) for n in re.findall(r"resuming .* from ([\d,]+)", out)
        ]
        (folder,) = data_dir.iterdir()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
        for name, content in token_files(folder).items():
            assert (whole / name).read_bytes().startswith(content)
        assert corpora.known_val_tokens(str(path), data_dir, str(bpe)) is None
        with pytest.raises(InputError, match=r"is incomplete: run the same data/prepare\.py"):
            open_corpus(folder, 9)
        with pytest.raises(InputError, match=r"is incomplete: run the same data/prepare\.py"):
            resolve(str(folder), tmp_path, 9)
    assert kills == 5
    assert len(resumed_from) == 5
    assert resumed_from == sorted({*resumed_from})
    assert token_files(folder) == token_files(whole)
    assert not list(folder.glob("*.partial"))
    assert not (folder / "progress.json").exists()


def test_interrupted_at_any_rename_it_resumes_and_writes_the_same_bytes(
    tmp_path, data_dir, bpe, monkeypatch, capsys
):
    path = tmp_path / "text.txt"
    path.write_text("".join(make_text(300_000, n_words=3000)))
    whole = token_files(prepare(str(path), tmp_path / "whole", 1, str(bpe), shard_tokens=9000))
    replace, left = Path.replace, [0]

    def replace_some(path, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_some)
    for n in range(1, 60):
        left[0], noted = n // 2, position(data_dir)
        try:
            folder = prepare(str(path), data_dir, 1, str(bpe), shard_tokens=9000)
            break
        except KeyboardInterrupt:
            assert (noted is None) == ("resuming" not in capsys.readouterr().out)
    assert n > 5
    assert token_files(folder) == whole


@pytest.fixture
def begun(book, data_dir, monkeypatch) -> Path:
    """A preparation of the book in 300 tokens, 1000 to a shard, that did not come to its end."""
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "SAVE_S", -1)
        patch.setattr(preparation, "_finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(str(book), data_dir, 1, "bpe", 300, 1000)
    (folder,) = data_dir.iterdir()
    assert position(data_dir)
    return folder


@pytest.mark.parametrize("what", ["time", "shards"])
def test_a_touched_source_or_another_shard_size_still_resumes(
    book, data_dir, begun, tmp_path, capsys, what
):
    """A touched or copied text, or train.py, which knows of no --shard_tokens."""
    if what == "time":
        os.utime(book, (1, 1))
    (begun / "progress.json.1.partial").touch()  # of one that was killed while it wrote it
    folder = prepare(str(book), data_dir, 1, "bpe", 300, 1000 if what == "time" else 10**8)
    assert not list(folder.glob("*.partial"))
    assert "resuming" in capsys.readouterr().out
    anew = prepare(str(book), tmp_path / "anew", 1, "bpe", 300, 1000)
    assert token_files(folder) == token_files(anew)
    assert prepare(str(book), data_dir, 1, "bpe", 300) == folder
    assert capsys.readouterr().out.count("prepared") == 1  # only the other


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("source", "book.txt changed"),
        ("line ends", "book.txt changed"),
        ("tokenizer", "tokenizer.json changed"),
        ("no tokenizer", "tokenizer.json changed"),
        ("files", "token files are missing or cut off"),
        ("journal", "progress.json is damaged"),
        ("list", "progress.json is damaged"),
        ("field", "progress.json is damaged"),
    ],
)
def test_a_preparation_starts_over_if_anything_changed(
    book, data_dir, bpe, begun, tmp_path, capsys, what, why
):
    folder = begun
    (folder / "progress.json.1.partial").touch()
    if what == "source":
        book.write_text(book.read_text()[::-1])
    elif what == "line ends":  # the same text, but elsewhere in the file
        book.write_text(book.read_text(), newline="\r\n")
    elif what == "no tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif what == "files":
        for path in folder.glob("train*"):
            path.write_bytes(b"")
    elif what == "list":
        (folder / "progress.json").write_text("[]")
    elif what == "field":
        path = folder / "progress.json"
        path.write_text(path.read_text().replace("position", "place"))
    elif what == "tokenizer":
        (folder / "tokenizer.json").write_bytes(bpe.read_bytes())
    elif what == "journal":
        (folder / "progress.json").write_text("{")
    assert folder == prepare(str(book), data_dir, 1, "bpe", 300, 900)
    said = capsys.readouterr()
    assert f"{folder}: starting over" in said.err
    assert why in said.err
    assert "resuming" not in said.out
    assert not (folder / "progress.json.1.partial").exists()
    anew = prepare(str(book), tmp_path / "anew", 1, "bpe", 300, 900)
    assert token_files(folder) == token_files(anew)
    assert corpora.load_tokenizer(folder) == corpora.load_tokenizer(anew)


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
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(preparation, "measure_speed", lambda tokenizer: (1.0, 0.5))
    with pytest.raises(InputError, match="GB must be free"):
        prepare(str(book), data_dir, tokenizer="gpt2")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_replaced_files_count_as_free_space(book, data_dir, monkeypatch):
    folder = prepare(str(book), data_dir)
    book.write_text(book.read_text()[::-1])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    assert prepare(str(book), data_dir) == folder  # 12,000 bytes take the place of 12,000


def test_a_source_that_changes_while_it_is_read_is_refused(book, data_dir, monkeypatch):
    tokenize = preparation._tokenize

    def tokenize_and_change(*args):
        tokenize(*args)
        book.write_text("another text " * 50)

    monkeypatch.setattr(preparation, "_tokenize", tokenize_and_change)
    with pytest.raises(InputError, match="must not change while it is read"):
        prepare(str(book), data_dir)
    assert not data_dir.exists()


def test_a_source_may_be_touched_while_it_is_read(book, data_dir, monkeypatch):
    tokenize = preparation._tokenize

    def tokenize_and_touch(*args):
        tokenize(*args)
        os.utime(book, (1, 1))

    monkeypatch.setattr(preparation, "_tokenize", tokenize_and_touch)
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


def test_ctrl_c_says_how_to_resume(tmp_path, data_dir, bpe):
    path = tmp_path / "text.txt"
    path.write_text("".join(make_text(4_000_000)))
    process = start(path, "--tokenizer", bpe, "--data_dir", data_dir, "--shard_tokens", 20_000)
    while process.poll() is None and not list(data_dir.glob("*/train_00000.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert out == ""
    assert "the same command resumes" in err
    assert "Traceback" not in err


def test_a_second_process_waits(book, data_dir):
    with files.locked(book.parent, lambda: None):
        data_dir.mkdir()
        folder = catalog._locate(str(book), data_dir, None, None)[0]
        folder.mkdir()
        with files.locked(folder, lambda: None):
            process = start(book, "--data_dir", data_dir)
            assert "waiting" in process.stderr.readline()
            time.sleep(0.2)
            assert process.poll() is None
            assert [path.name for path in folder.iterdir()] == [files.LOCK]
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
        "corpora.prepare(sys.argv[1], Path(sys.argv[2]), tokenizer=sys.argv[3])\n"
        # Of this process alone: ru_maxrss begins with that of the one that started it.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())\n"
        "print(int(peak[1]) // 1024)\n"
    )
    argv = [sys.executable, "-c", script, str(path), str(tmp_path / "data"), str(bpe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(argv, env=environment, text=True, capture_output=True, check=True)
    assert int(result.stdout.split()[-1]) < 600


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
