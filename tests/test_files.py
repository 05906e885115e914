"""Atomic writes, strict JSON, and locks that every end of a process frees."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from nanogpt_jax import files
from nanogpt_jax.errors import InputError

HOLD = """
import pathlib, sys, time
from nanogpt_jax import files
with files.locked(pathlib.Path(sys.argv[1]), lambda: None):
    print("mine", flush=True)
    time.sleep(60)
"""


class TakenError(Exception):
    pass


def refuse() -> None:
    raise TakenError


def refused(folder: Path) -> bool:
    try:
        with files.locked(folder, refuse):
            return False
    except TakenError:
        return True


def test_a_locked_folder_is_refused_even_to_the_same_process(tmp_path):
    folder = tmp_path / "run"
    with files.locked(folder, refuse):
        assert refused(folder)
        assert refused(folder)
    assert not refused(folder)


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    with files.locked(tmp_path / "new", refuse):
        assert (tmp_path / "new").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_written_keeps_no_trace_of_its_lock(tmp_path):
    with files.locked(tmp_path / "run", refuse):
        (tmp_path / "run" / "config.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_frees_its_lock(tmp_path, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "mine\n"
        assert refused(folder)
        holder.send_signal(number)
    assert folder.exists()
    assert not refused(folder)


def test_a_second_process_waits_if_it_is_not_refused(tmp_path):
    """The first one wrote nothing and removes the folder: the second has it all the same."""
    folder, order, taken = tmp_path / "corpus", [], threading.Event()

    def second() -> None:
        with files.locked(folder, taken.set):
            order.append("second")
            assert refused(folder)

    with files.locked(folder, refuse):
        thread = threading.Thread(target=second)
        thread.start()
        assert taken.wait(10)
        time.sleep(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert not folder.exists()


def test_of_many_at_once_one_at_a_time_has_the_folder(tmp_path):
    """Also while each removes the empty folder that the next one has just seen."""
    inside, most = [], []

    def enter() -> None:
        for _ in range(10):
            with files.locked(tmp_path / "corpus", lambda: None):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 40
    assert max(most) == 1


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with files.locked(tmp_path / "run", refuse):
        (tmp_path / "run" / "config.json").touch()
    assert (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), files.locked(tmp_path / "file" / "run", refuse):
        pass
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", "link/run"):
        error = pytest.raises(InputError, match=r"the path must be a folder, but .* is a")
        with error, files.locked(tmp_path / name, refuse):
            pass


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    files.write_json(path, {"a": 1})

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "contains a name twice"),
        ("NaN", "NaN is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_is_read_strictly(text, reason):
    with pytest.raises(ValueError, match=reason):
        files.loads(text)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "large").write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        files.read_text(tmp_path / "large", 2**20)


def test_a_place_that_no_folder_can_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    Path("circle").symlink_to("circle")
    before = sorted(tmp_path.rglob("*"))
    for place, reason in {
        "file": "out_dir must be a folder, but .*/file is a file",
        "file/run": "out_dir must be a folder, but .*/file is a file",
        "link": "out_dir must be a folder, but .*/link is a broken link",
        "circle": "out_dir must be the path of a folder, but circle: Too many levels",
        f"none/{300 * 'x'}/run": "out_dir must be the path of a folder, but .*: File name too long",
        25 * f"{160 * 'x'}/": "out_dir must be the path of a folder, but .*: File name too long",
        "run [1]": r"out_dir must be a path without \* \? and \[, but is ",
        os.fsdecode(b"run \xff"): "out_dir must be UTF-8, but is ",
    }.items():
        with pytest.raises(InputError, match=reason):
            files.check_writable(Path(place))
    assert sorted(tmp_path.rglob("*")) == before
    files.check_writable(Path("a b/ü 日本 🎭"))


def test_a_read_only_disk_is_refused(read_only):
    for place in read_only, read_only / "out" / "run":
        with pytest.raises(InputError, match=f"out_dir must be writable, but {read_only} is not"):
            files.check_writable(place)


def test_a_folder_that_is_removed_while_it_is_created_is_created_again(tmp_path, monkeypatch):
    """By another process that had its lock: mkdir then finds it, and finds no folder."""
    mkdir, calls = Path.mkdir, []

    def mkdir_too_late(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir_too_late)
    with files.locked(tmp_path / "run", refuse):
        assert len(calls) >= 2
        assert (tmp_path / "run").is_dir()
