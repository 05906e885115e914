"""Every field of every configuration accepts a value or refuses it in one line."""

import dataclasses
import importlib
import importlib.util
import re
import typing
from pathlib import Path
from typing import Literal

import pytest
from hostile import HOSTILE_TEXTS, JSON, TRIALS, answer
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nanogpt_jax
from nanogpt_jax.config import ModelConfig, SampleConfig, TrainConfig, field_types, parse_args
from nanogpt_jax.errors import InputError

ROOT = Path(__file__).parents[2]
fuzz = settings(max_examples=TRIALS or 100)


def configurations() -> list[type]:
    """Return all dataclasses of flags and files in the repository."""
    found = set()
    for path in [*Path(nanogpt_jax.__file__).parent.rglob("*.py"), ROOT / "data" / "prepare.py"]:
        names = re.findall(r"^class (\w*(?:Config|Flags))\b", path.read_text("utf-8"), re.MULTILINE)
        if names and path.is_relative_to(ROOT / "nanogpt_jax"):
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        elif names:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        found |= {getattr(module, name) for name in names}
    return sorted((cls for cls in found if dataclasses.is_dataclass(cls)), key=lambda c: c.__name__)


FIELDS = [
    (cls, name, hint)
    for cls in configurations()
    for name, hint in typing.get_type_hints(cls).items()
    if not dataclasses.is_dataclass(hint)
]
# Numbers that these fields accept and all others refuse.
MEANINGS = {
    "warmup_iters": {0},  # none
    "eval_iters": {0},  # the whole split
    "num_processes": {0},  # found by JAX
    "process_id": {-1, 0},  # found by JAX; the first
    "max_new_tokens": {-1},  # with --stream: no limit
    "top_k": {0},  # all
    "attention_window": {0},  # all
    "loss_chunks": {0},  # as few as fit
    "sample_chars": {0},  # none
    "seed": {0, 2**31, 2**32 - 1},
    "port": {0},  # a free one
}
INTS = {-(10**400), -(2**63), -2, -1, 0, 2**31, 2**32 - 1, 2**32, 2**63, 10**400}
FLOATS = (float("nan"), float("inf"), -float("inf"), -1e-9, -1, 1e39, 10**400)


def assert_refused(cls: type, name: str, value) -> None:
    line = answer(lambda: cls(**{name: value}))
    assert line is not None, f"{cls.__name__} accepts {name}={value!r}"
    assert name in line


def test_every_configuration_is_found():
    names = {cls.__name__ for cls in configurations()}
    assert names >= {"TrainConfig", "ModelConfig", "OptimConfig", "ComputeConfig", "SampleConfig"}
    assert names >= {"CostConfig", "ExportConfig", "Flags", "LectureConfig", "ReportConfig"}
    assert {name for _, name, _ in FIELDS} >= field_types(TrainConfig).keys()


def test_a_number_out_of_its_range_is_refused():
    for cls, name, hint in FIELDS:
        kinds = typing.get_args(hint) or (hint,)
        for number in INTS - MEANINGS.get(name, set()) if int in kinds else ():
            assert_refused(cls, name, number)
        for number in FLOATS if float in kinds else ():
            assert_refused(cls, name, number)


def test_a_value_of_another_type_is_refused():
    """A JSON file or Python can contain any of them."""
    examples = {int: 4, float: 0.25, bool: True, str: "4", type(None): None, list: [4], dict: {}}
    for cls, name, hint in FIELDS:
        is_literal = typing.get_origin(hint) is Literal
        kinds = {str} if is_literal else {*(typing.get_args(hint) or (hint,))}
        for kind in examples.keys() - kinds - ({int} if float in kinds else set()):
            assert_refused(cls, name, examples[kind])
        if is_literal:
            assert_refused(cls, name, "another")


def test_a_text_that_cannot_be_a_file_name_is_refused():
    for cls, name, hint in FIELDS:
        if str in (typing.get_args(hint) or (hint,)) and name not in ("start", "stop"):
            for text in "a\0b", 256 * "x", 2001 * "x/", "\ud800":
                assert_refused(cls, name, text)


@given(st.sampled_from(FIELDS), JSON)
@fuzz
def test_any_value_is_accepted_or_refused_in_one_line(field, value):
    cls, name, _ = field
    answer(lambda: cls(**{name: value}))


@given(st.sampled_from(sorted(field_types(TrainConfig))), HOSTILE_TEXTS)
@example("mesh", "data=" + 5000 * "9")
@example("seed", 5000 * "9")
@example("learning_rate", "1e999")
@fuzz
def test_any_flag_is_accepted_or_refused_in_one_line(name, text):
    answer(lambda: parse_args(TrainConfig, [f"--{name}={text}"], ""))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1_0.5", 10.5), ("7", 7.0), ("1E1", 10.0), (" 2 ", 2.0)]
)
def test_numbers_are_written_as_in_python(text, value):
    found = parse_args(TrainConfig, [f"--learning_rate={text}"], "").optim.learning_rate
    assert (type(found), found) == (float, value)


@pytest.mark.parametrize(("text", "value"), [("1_000", 1000), ("+5", 5), ("007", 7)])
def test_whole_numbers_are_written_as_in_python(text, value):
    assert parse_args(TrainConfig, [f"--max_iters={text}"], "").max_iters == value


@pytest.mark.parametrize("text", ["1e3", "3.0", "0x10", "", "None"])
def test_anything_but_a_whole_number_is_refused(text):
    with pytest.raises(InputError, match=f"max_iters must be a whole number, got '{text}'"):
        parse_args(TrainConfig, [f"--max_iters={text}"], "")


def test_none_is_a_value_only_of_a_field_that_may_be_none():
    config = parse_args(TrainConfig, ["--lr_decay_iters=None", "--out_dir", "None"], "")
    assert (config.optim.lr_decay_iters, config.out_dir) == (None, None)
    assert parse_args(SampleConfig, ["--host=None"], "").host == "None"


def test_the_largest_shapes_are_bounded():
    """An untrusted config.json cannot keep the machine busy."""
    for shape in (
        {"n_layer": 2_000_000_000},
        {"n_head": 2**11},
        {"n_embd": 2**17, "n_head": 1},
        {"block_size": 2**31},
        {"vocab_size": 2**25},
    ):
        line = answer(lambda shape=shape: ModelConfig(**shape))
        assert "must be at most" in line
