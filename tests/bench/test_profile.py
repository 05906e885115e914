"""A real trace of a small program, read back."""

import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from nanogpt_jax.bench import profile as profiling


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A folder with the trace of a program whose matrix products, in a loop, take the time."""
    folder = tmp_path_factory.mktemp("trace")

    @jax.jit
    def program(x_BD):
        products_BD = jax.lax.fori_loop(0, 4, lambda _, y_BD: x_BD @ y_BD @ x_BD, x_BD)
        return jnp.sin(products_BD[:8]) + jnp.sort(x_BD[:8])

    x_BD = jnp.ones((700, 700))
    program(x_BD).block_until_ready()
    with jax.profiler.trace(str(folder)):
        program(x_BD).block_until_ready()
    return folder


def test_the_operation_that_dominates_comes_first(trace):
    seconds = profiling.time_by_operation(trace, 1)
    half = profiling.time_by_operation(trace, 2)
    assert half == {name: s / 2 for name, s in seconds.items()}
    assert len(seconds) >= 2
    assert all(s > 0 for s in seconds.values())
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert next(iter(seconds)).startswith(("dot", "ynn_fusion"))


def test_equal_operations_come_together_and_loops_are_not_counted_twice(trace):
    names = profiling.time_by_operation(trace, 1).keys()
    assert not [name for name in names if name[-1] in ".0123456789"]
    assert not [name for name in names if name.startswith("while")]


def test_of_several_traces_the_newest_is_read(trace, tmp_path):
    (old,) = trace.rglob("*.xplane.pb")
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "empty.xplane.pb").touch()
    os.utime(tmp_path / "z" / "empty.xplane.pb", (0, 0))
    shutil.copy(old, tmp_path / "a.xplane.pb")
    assert profiling.time_by_operation(tmp_path, 1) == profiling.time_by_operation(trace, 1)


def test_a_folder_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trace"):
        profiling.time_by_operation(tmp_path, 1)


def test_the_table_shows_the_largest_and_the_rest(trace):
    operations = profiling.time_by_operation(trace, 1)
    _, first, rest = profiling.table(operations, n_rows=1)
    assert first.split()[0] == next(iter(operations))
    assert rest.startswith("all others")
    shares = [float(line.split()[-1].rstrip("%")) for line in (first, rest)]
    assert sum(shares) == pytest.approx(100, abs=0.2)
