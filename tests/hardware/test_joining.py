"""processes.py on one machine: the compile cache, and which processes a run has.

Two real processes train together in tests/test_processes.py.
"""

import dataclasses
import os
import socket
import stat
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import ALONE, Processes, join_processes, use_compile_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that requests a cache, compiles a function, and returns the files kept.

    As in a process that has compiled nothing, of a user whose home is empty.
    """
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_compilation_cache_dir", None)

    def compile_with(requested: str = ""):
        use_compile_cache(requested)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()
        assert jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))) > 63
        return sorted(tmp_path.rglob("jit_*cache"))

    yield compile_with
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_in_a_private_folder_of_the_user(cache, tmp_path):
    kept = cache()
    assert kept
    assert kept[0].is_relative_to(tmp_path / "home" / "nanogpt_jax")
    assert stat.S_IMODE(kept[0].parent.stat().st_mode) == 0o700
    assert cache() == kept, "the second start finds them"


def test_a_folder_can_be_named(cache, tmp_path):
    assert cache("somewhere/else")[0].parent == tmp_path / "somewhere" / "else"


def test_jaxs_own_variable_is_respected(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))  # as JAX does
    assert cache()[0].parent == tmp_path / "theirs"


def test_off_keeps_nothing(cache, tmp_path, monkeypatch):
    assert not cache("off")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert not cache("off")


@pytest.mark.parametrize("folder", ["file/cache", 256 * "x", "no UTF-8: \udcff", "a\0b"])
def test_a_folder_that_cannot_be_created_is_reported_and_harmless(cache, tmp_path, capsys, folder):
    """NUL can come from a JSON file, though not from a command line."""
    (tmp_path / "file").write_text("in the way")
    assert not cache(folder)
    assert "no compile cache: cannot create " in capsys.readouterr().out


def test_without_a_home_directory_there_is_no_cache(cache, tmp_path, monkeypatch, capsys):
    """As in a container with a user id of its own: no HOME, and no entry in /etc/passwd."""
    for name in "XDG_CACHE_HOME", "HOME":
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not cache()
    assert "no compile cache: cannot create one in your home (" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # above all no folder named ~
    assert cache("named")


def test_a_broken_entry_is_only_a_warning(cache):
    for path in cache():
        path.write_bytes(b"not a program")
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        cache()


def test_several_processes_keep_no_programs_unless_they_share_a_folder(cache, tmp_path):
    use_compile_cache("", n_processes=2)
    assert jax.config.jax_compilation_cache_dir is None
    use_compile_cache(str(tmp_path / "shared"), n_processes=2)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")


def test_alone_nothing_is_joined_and_nobody_waited_for(tiny_config, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "here")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    processes = join_processes(tiny_config)
    assert processes == ALONE
    assert processes.is_first
    processes.wait("anywhere")
    processes.check_same({"seed": 1})
    assert processes.first_alone(lambda: "done", "anywhere") == "done"
    assert processes.max(15) == 15
    assert [processes.any(flag) for flag in (True, False)] == [True, False]


class FakeProcesses(Processes):
    """Two processes, of which the second has the given array."""

    def __init__(self, other):
        super().__init__(0, 2)
        object.__setattr__(self, "other", np.asarray(other))

    def _gather(self, array):
        return np.stack([array, self.other.astype(array.dtype)])


def test_processes_agree_on_the_largest_number():
    assert FakeProcesses([15]).max(0) == 15
    assert FakeProcesses([0]).max(2) == 2
    assert FakeProcesses([1]).any(False)
    assert not FakeProcesses([0]).any(False)


def test_flags_that_differ_between_processes_are_named():
    values = {"seed": 1, "batch_size": 8, "jax": "0.10.2"}
    others = values | {"seed": 2, "jax": "0.7.2"}
    both = FakeProcesses([zlib.crc32(str(value).encode()) for value in others.values()])
    with pytest.raises(InputError, match=r"they differ in seed, jax: start all of them with"):
        both.check_same(values)
    both.check_same(others)


def test_a_port_in_use_is_reported_before_jax_crashes_on_it(tiny_config):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = dataclasses.replace(
            tiny_config, coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=0
        )
        with pytest.raises(InputError, match=f"port {port} must be free"):
            join_processes(config)


def test_nowhere_to_join_is_an_input_error(tiny_config):
    config = dataclasses.replace(tiny_config, coordinator_address="auto")
    with pytest.raises(InputError, match=r"cannot join, as --coordinator_address auto asks \("):
        join_processes(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator_address": "10.0.0.1:8476"}, "given together"),
        ({"num_processes": 2, "process_id": 0}, "given together"),
        ({"coordinator_address": "10.0.0.1"}, "HOST:PORT or auto"),
        ({"coordinator_address": "10.0.0.1:99999"}, "HOST:PORT or auto"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            "process_id must be below num_processes=2, got 2",
        ),
        ({"heartbeat_timeout_s": 0}, "heartbeat_timeout_s must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tiny_config, flags, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny_config, **flags)
