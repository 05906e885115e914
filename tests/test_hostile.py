"""Bad input and hostile files: one line that says what was required, and nothing is done.

Inputs are made by hypothesis, few in the suite; `--hypothesis-profile fuzz` makes many of them.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import nanogpt_jax
from nanogpt_jax.command_line import parse_args
from nanogpt_jax.config import TrainConfig, field_types
from nanogpt_jax.errors import InputError

ROOT = Path(__file__).parent.parent
STEADY = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("suite", max_examples=25, **STEADY)
settings.register_profile("fuzz", max_examples=4000, **STEADY | {"derandomize": False})
settings.load_profile("suite")


def load(script: str):
    """Return a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, sample, prepare = load("train.py"), load("sample.py"), load("data/prepare.py")


def answer(work) -> str | None:
    """Return the line with which work was refused, None where it was done; all else is raised."""
    try:
        work()
    except InputError as error:
        line = str(error)
        assert line
        assert line.isprintable() or all(char.isprintable() or char > "~" for char in line)
        assert len(line.splitlines()) == 1
        return line
    return None


# Fields


def configurations() -> list[type]:
    """All dataclasses that flags or files are read into."""
    names = [f"nanogpt_jax.{module.name}" for module in pkgutil.iter_modules(nanogpt_jax.__path__)]
    modules = [*map(importlib.import_module, names), prepare]
    values = [value for module in modules for value in vars(module).values()]
    classes = {kind for kind in values if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    asked = {kind for kind in classes if kind.__name__.endswith(("Config", "Flags"))}
    return sorted(asked, key=lambda kind: kind.__name__)


FIELDS = [
    pytest.param(cls, name, hint, id=f"{cls.__name__}.{name}")
    for cls in configurations()
    for name, hint in get_type_hints(cls).items()
    if not dataclasses.is_dataclass(hint)
]
# What these numbers mean; all other fields refuse them.
MEANINGS = {
    "warmup_iters": {0},  # none
    "eval_iters": {0},  # the whole split
    "num_processes": {0},  # found by JAX
    "process_id": {-1, 0},  # found by JAX; the first
    "max_new_tokens": {-1},  # with --stream: without end
    "top_k": {0},  # all
    "seed": {0, 2**31, 2**32 - 1},
    "port": {0},  # a free one
}


def parts_of(hint) -> tuple:
    return get_args(hint) or (hint,)


def refused(cls: type, name: str, value) -> None:
    line = answer(lambda: cls(**{name: value}))
    assert line is not None, f"{cls.__name__} takes {name}={value!r}"
    assert name in line


def test_every_configuration_is_found():
    names = {kind.__name__ for kind in configurations()}
    assert names >= {"TrainConfig", "ModelConfig", "OptimConfig", "ComputeConfig", "SampleConfig"}
    assert names >= {"CostConfig", "ExportConfig", "Flags", "LectureConfig", "ReportConfig"}
    assert {param.values[1] for param in FIELDS} >= field_types(TrainConfig).keys()


@pytest.mark.parametrize(("cls", "name", "hint"), FIELDS)
def test_a_number_out_of_its_range_is_refused(cls, name, hint):
    if int in parts_of(hint):
        numbers = {-(10**400), -(2**63), -2, -1, 0, 2**31, 2**32 - 1, 2**32, 2**63, 10**400}
        for number in numbers - MEANINGS.get(name, set()):
            refused(cls, name, number)
    if float in parts_of(hint):
        for number in (float("nan"), float("inf"), -float("inf"), -1e-9, -1, 1e39, 10**400):
            refused(cls, name, number)


@pytest.mark.parametrize(("cls", "name", "hint"), FIELDS)
def test_a_value_of_another_type_is_refused(cls, name, hint):
    """As a JSON file can bring them."""
    examples = {int: 4, float: 0.25, bool: True, str: "4", type(None): None, list: [4], dict: {}}
    known = {float: {int, float}}
    kinds = {str} if get_origin(hint) is Literal else set(parts_of(hint))
    allowed = set().union(*(known.get(kind, {kind}) for kind in kinds))
    for kind in examples.keys() - allowed:
        refused(cls, name, examples[kind])
    if get_origin(hint) is Literal:
        refused(cls, name, "another")


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


@given(st.data())
@settings(max_examples=settings.default.max_examples * 20)
def test_a_field_takes_a_value_or_refuses_it_in_one_line(data):
    cls, name, _ = data.draw(st.sampled_from([param.values for param in FIELDS]))
    value = data.draw(JSON)
    answer(lambda: cls(**{name: value}))


@given(st.sampled_from([TrainConfig]), st.data())
@example(TrainConfig, None)
def test_a_flag_takes_a_text_or_refuses_it_in_one_line(cls, data):
    if data is None:
        name, text = "mesh", "data=" + 5000 * "9"
    else:
        name = data.draw(st.sampled_from(sorted(field_types(cls))))
        text = data.draw(HOSTILE_TEXTS)
    answer(lambda: parse_args(cls, {name: text}, cls(), ""))
