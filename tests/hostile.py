"""What tests of bad input and hostile files share.

Hypothesis generates the input: few examples, always the same, in the suite; NANOGPT_JAX_FUZZ=1000
tries that many in each test, and different ones each time.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from nanogpt_jax.errors import InputError

TRIALS = int(os.environ.get("NANOGPT_JAX_FUZZ", "0"))
settings.register_profile(
    "hostile",
    max_examples=TRIALS or 10,
    derandomize=not TRIALS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("hostile")

HOSTILE_TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("\0\n\x1b\ud800\udcff/.-=,:' 🎭\u202e9")),
    st.integers(190, 5000).map(lambda n: n * "x"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
# JSON files that parsers choke on, or that are not JSON.
BAD_JSON = (
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"NaN", b"{}", b"null", b'"\\ud800"'),
    *(b'{"config": "tiny", "config": "small"}', b"\xef\xbb\xbf{", b"\xff\xfe{\0}\0", b"\0" * 64),
)


def answer(work) -> str | None:
    """Return the line with which work is refused, None if it is done; raise anything else."""
    try:
        work()
    except InputError as error:
        line = str(error)
        assert line
        assert line.isprintable() or all(char.isprintable() or char > "~" for char in line)
        assert len(line.splitlines()) == 1
        return line
    return None


@contextlib.contextmanager
def copied(folder: Path):
    """A copy of a folder, to be damaged."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(folder, Path(place, "copy")))


DAMAGES = ("missing", "folder", "empty", "unreadable")


def damage(path: Path, kind: str) -> None:
    """Put one of DAMAGES in the place of a file."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "unreadable":
        path.symlink_to("/proc/self/mem")  # root can read everything else


def damaged_contents(whole: bytes):
    """Contents of a file that was cut off, has a bit flipped, or is random: (bytes, is_random)."""
    ats = st.integers(0, len(whole) - 1)
    flipped = ats.map(lambda at: whole[:at] + bytes([whole[at] ^ 2 ** (at % 8)]) + whole[at + 1 :])
    cut_off, random = ats.map(lambda at: whole[:at]), st.binary(min_size=1, max_size=300)
    return st.one_of(
        st.tuples(cut_off, st.just(False)),
        st.tuples(flipped, st.just(False)),
        st.tuples(random, st.just(True)),
    )


def content_of(folder: Path) -> dict:
    """Return what changes if anything is written in a folder."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {
        path: (stat.st_mtime_ns, stat.st_size, stat.st_mode)
        for path, stat in found.items()
        if stat.st_size < 2**30 or path.is_dir()
    }


def another(value, data):
    """Return a JSON value with one part changed, removed, or as large as can be."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
        changed = value.copy()
        if data.draw(st.integers(0, 6)):
            changed[key] = another(value[key], data)
        else:
            del changed[key]
        return changed
    huge = st.sampled_from([-1, 0, 2**31, 2**32, 2**63, 10**400, 1e308, "a" * 9999, "../../x", "/"])
    return data.draw(st.one_of(JSON, huge))
