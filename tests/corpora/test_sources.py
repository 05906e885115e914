"""Folders as people have them, and corpora of the Hub."""

import json
import os

import pytest
from formats import jsonl_of, parquet_of

from nanogpt_jax.corpora import sources
from nanogpt_jax.corpora.sources import Files
from nanogpt_jax.errors import InputError


def anywhere(left, right):
    return True


def texts_of(source, info=None) -> str:
    return "".join(text or "" for item in source.items(info or {}, anywhere) for text in item.texts)


def splits_of(source, info=None) -> dict:
    found = {}
    for item in source.items(info or {}, anywhere):
        found[item.split] = found.get(item.split, "") + "".join(filter(None, item.texts))
    return found


@pytest.fixture
def folder(tmp_path):
    """Make a folder of files from their names and contents; returns it."""

    def make(files: dict):
        for name, content in files.items():
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "texts"

    return make


def test_texts_of_all_endings_are_read_in_the_order_of_names(folder):
    files = {"b.TXT": "2", "a.txt": "1", "more/c.md": "3", "more/d.rst": "4", "e.txt.gz": "5"}
    source = Files(folder(files))
    assert texts_of(source) == "12534"
    assert source.files_in_words == "5 of 5 files read"


def test_what_is_left_out_is_told_and_why(folder):
    files = {f"{i}.pdf": "no" for i in range(7)} | {"a.txt": "yes", "table.csv": "no"}
    source = Files(folder(files))
    assert texts_of(source) == "yes"
    assert source.files_in_words.startswith(
        "1 of 9 files read; not read: 0.pdf (unknown ending), 1"
    )
    assert source.files_in_words.endswith(", and 3 more")


def test_hidden_files_and_folders_are_ignored(folder):
    files = {"a.txt": "yes", "._a.txt": "no", ".git/b.txt": "no", ".ipynb_checkpoints/a.txt": "no"}
    source = Files(folder(files))
    assert (texts_of(source), source.files_in_words) == ("yes", "1 of 1 files read")


def test_links_are_followed_but_not_in_a_circle(folder, tmp_path):
    place = folder({"a.txt": "1", "inner/b.txt": "2"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("3")
    (place / "linked").symlink_to(tmp_path / "elsewhere")
    (place / "z.txt").symlink_to(place / "a.txt")
    (place / "inner" / "back").symlink_to(place)
    assert texts_of(Files(place)) == "1231"


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt"),
        ("TinyStories-train.txt", "TinyStories-validation.txt"),
        ("train/0.txt", "val/0.txt"),
        ("wiki.train.txt", "wiki.test.txt"),
    ],
)
def test_a_split_that_files_are_named_for_is_taken(folder, names):
    source = Files(folder({names[0]: "to train", names[1]: "to validate"}))
    assert splits_of(source) == {"train": "to train", "val": "to validate"}
    assert source.split_in_words == "validation files chosen by name"


def test_files_for_tests_are_left_out_if_there_are_some_for_validation(folder):
    names = {"a-train.txt": "1", "a-valid.txt": "2", "a-test.txt": "3"}
    source = Files(folder(names))
    assert splits_of(source) == {"train": "1", "val": "2"}
    assert source.files_in_words == "2 of 3 files read; not read: a-test.txt (test split)"


@pytest.mark.parametrize("names", [("train.txt", "trains of thought.txt"), ("train.txt",)])
def test_names_that_do_not_say_a_split_for_every_file_are_just_names(folder, names):
    assert splits_of(Files(folder(dict.fromkeys(names, "x")))) == {None: "x" * len(names)}


def test_a_folder_of_several_kinds_is_refused(folder):
    with pytest.raises(InputError, match="of one kind, but has 2 text and 1 JSON files: pass"):
        Files(folder({"a.txt": "", "b.md": "", "c.jsonl.gz": ""}))


def test_a_folder_without_texts_is_refused(folder):
    with pytest.raises(InputError, match=r"must have files that end in \.txt, .*train\.bin"):
        Files(folder({"a.pdf": ""}))


def test_names_that_say_another_split_make_another_corpus(folder):
    place = folder({"a/x.txt": "first", "b/x.txt": "second"})
    known = []
    for names in (("a", "b"), ("train", "val"), ("val", "train")):
        for old, new in zip(sorted(place.iterdir()), (f"{name}-" for name in names), strict=True):
            old.rename(place / new)
        for path in sorted(place.iterdir()):
            path.rename(path.with_name(path.name.rstrip("-")))
        source = Files(place)
        known.append((source.stat(), source.identify(lambda done: None)["sha256"]))
    assert len({stat for stat, _ in known}) == len({sha256 for _, sha256 in known}) == 3


def test_parquet_under_the_name_of_a_text_has_documents(folder):
    place = folder({"a.txt": parquet_of(["one", "two"])})
    assert Files(place / "a.txt").has_separators
    assert not Files(place / "a.txt").is_cut


def test_the_content_of_files_is_what_they_are_known_by(folder):
    place = folder({"a.txt": "one", "b.txt": "two"})

    def identity():
        return Files(place).identify(lambda done: None)

    before, stat = identity(), Files(place).stat()
    os.utime(place / "a.txt", (1, 1))
    assert identity() == before
    assert Files(place).stat() != stat
    (place / "a.txt").write_text("onet")
    (place / "b.txt").write_text("wo")
    assert identity() != before


# The Hub


def test_a_corpus_of_the_hub_is_read_at_one_revision_and_continues_where_it_was(hub):
    names = ["plain_text/train-00000.parquet", "plain_text/train-00001.parquet"]
    files = {names[0]: parquet_of(["a"] * 150), names[1]: parquet_of(["b"] * 80)}
    asked = hub(files | {"README.md": b""})
    source = sources.OPENWEBTEXT
    info = json.loads(json.dumps(source.identify(lambda done: None)))
    assert info == {"revision": "sha1", "files": names}
    items = list(source.items(info, anywhere))
    assert "".join("".join(item.texts) for item in items) == "a" * 150 + "b" * 80
    assert asked[1:] == [f"datasets/{source.repository}@sha1/{name}" for name in names]
    asked.clear()
    for i, item in enumerate(items):
        assert list(source.items(info, anywhere, item.key)) == items[i + 1 :]
    assert asked[-1].endswith(names[1])
    assert source.size == pytest.approx(items[-1].done)


@pytest.mark.parametrize("trouble", [OSError("no route to host"), b"not parquet"])
def test_a_corpus_of_the_hub_that_cannot_be_read_is_one_line(hub, trouble):
    hub({"plain_text/train-00000.parquet": trouble})
    source = sources.OPENWEBTEXT
    info = source.identify(lambda done: None)
    with pytest.raises(InputError, match="openwebtext could not be read from the Hub") as error:
        list(source.items(info, anywhere))
    assert "run the same command again" in str(error.value)
    hub({"other/train.parquet": b""})
    with pytest.raises(InputError, match="its files have other names now"):
        source.identify(lambda done: None)


def test_the_files_of_the_hubs_corpora_are_known_by_their_names(hub):
    names = {
        "openwebtext": ["plain_text/train-00000-of-00080.parquet"],
        "fineweb-edu": ["sample/10BT/000_00000.parquet"],
        "tinystories": [
            "data/train-00000-of-00004-2d5a1467fff1081b.parquet",
            "data/validation-00000-of-00001-869c898b519ad725.parquet",
        ],
    }
    others = [
        "README.md",
        "data/CC-MAIN-2013-20/train-00000-of-00014.parquet",
        "sample/100BT/0.parquet",
    ]
    for name, source in sources.HUB.items():
        others_here = [] if name == "tinystories" else others
        hub(dict.fromkeys(names[name] + others_here, b""))
        assert source.identify(lambda done: None)["files"] == names[name]


def test_tinystories_has_its_own_validation_files(hub):
    files = {"data/train-0.parquet": ["Once"], "data/validation-0.parquet": ["upon"]}
    hub({name: parquet_of(texts) for name, texts in files.items()})
    info = sources.TINYSTORIES.identify(lambda done: None)
    assert splits_of(sources.TINYSTORIES, info) == {"train": "Once", "val": "upon"}


def test_documents_of_a_folder_are_read_in_the_order_of_names(folder):
    source = Files(folder({"b.jsonl": jsonl_of(["3"]), "a.JSON": jsonl_of(["1", "2"])}))
    assert texts_of(source) == "123"
