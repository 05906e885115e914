"""The compile cache, and which processes a run has."""

import dataclasses
import os
import socket
import stat
import subprocess
import sys

import jax
import pytest

from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import processes as startup

SCRIPT = """
import sys
from nanogpt_jax import startup
startup.use_compile_cache(sys.argv[1])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))))
"""


@pytest.fixture
def compile_something(tmp_path):
    """Compile a program in a process of its own, whose home is empty: (files kept, process)."""

    def run(asked="", **variables):
        unset = {"JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"}
        env = {name: value for name, value in os.environ.items() if name not in unset}
        env |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)} | variables
        env |= {"PYTHONIOENCODING": "utf-8:backslashreplace"}  # as every command sets it
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(asked)],
            env=env, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return sorted(path for path in tmp_path.rglob("jit_*cache")), result

    return run


def test_programs_are_kept_in_a_private_folder_of_the_user(compile_something, tmp_path):
    kept, _ = compile_something()
    assert kept
    assert kept[0].is_relative_to(tmp_path / "home" / "nanogpt_jax")
    assert stat.S_IMODE(kept[0].parent.stat().st_mode) == 0o700
    again, _ = compile_something()
    assert again == kept


def test_a_folder_can_be_named(compile_something, tmp_path):
    kept, _ = compile_something("somewhere/else")
    assert kept[0].parent == tmp_path / "somewhere" / "else"


def test_jaxs_own_variable_is_respected(compile_something, tmp_path):
    kept, _ = compile_something(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert kept[0].parent == tmp_path / "theirs"


def test_off_keeps_nothing(compile_something):
    assert not compile_something("off")[0]
    assert not compile_something("off", JAX_COMPILATION_CACHE_DIR="theirs")[0]


@pytest.mark.parametrize("folder", ["file/cache", 256 * "x", "no UTF-8: \udcff"])
def test_a_folder_that_cannot_be_made_is_said_and_does_no_harm(compile_something, tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    kept, result = compile_something(folder)
    assert not kept
    assert "no compile cache: " in result.stdout
    assert "cannot be made (" in result.stdout


def test_a_path_that_no_folder_can_have_is_no_compile_cache(capsys):
    """It comes from a JSON file: a command line has no NUL."""
    before = jax.config.jax_compilation_cache_dir
    startup.use_compile_cache("a\0b")
    assert jax.config.jax_compilation_cache_dir == before
    assert "cannot be made (embedded null byte)" in capsys.readouterr().out


def test_a_broken_entry_only_warns(compile_something):
    kept, first = compile_something()
    for path in kept:
        path.write_bytes(b"not a program")
    _, second = compile_something()
    assert second.stdout == first.stdout
    assert "Error reading persistent compilation cache entry" in second.stderr


def test_alone_nothing_is_joined_and_nobody_waited_for(tiny_config, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "here")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    processes = startup.join_processes(tiny_config)
    assert processes.is_first
    assert processes.count == 1
    processes.wait("anywhere")
    assert processes.first_alone(lambda: "done", "anywhere") == "done"
    assert processes.agree(7, 15) == (7, 15)


def test_a_port_that_is_taken_is_said_before_jax_crashes_on_it(tiny_config):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = dataclasses.replace(
            tiny_config, coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=0
        )
        with pytest.raises(InputError, match=f"port {port} must be free"):
            startup.join_processes(config)


def test_several_processes_keep_no_programs_unless_they_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        startup.use_compile_cache("", n_processes=2)
        assert jax.config.jax_compilation_cache_dir is None
        startup.use_compile_cache(str(tmp_path / "shared"), n_processes=2)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_nowhere_to_join_is_an_input_error(tiny_config):
    config = dataclasses.replace(tiny_config, coordinator_address="auto")
    with pytest.raises(InputError, match="the processes cannot join at auto: "):
        startup.join_processes(config)


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
