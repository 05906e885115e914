"""The tools: python -m nanogpt_jax COMMAND."""

import ast
import sys
import types
from pathlib import Path

import pytest

import nanogpt_jax
from nanogpt_jax.__main__ import COMMANDS, main
from nanogpt_jax.config import TrainConfig, parse_train_config
from nanogpt_jax.errors import InputError


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_command_every_command_is_listed_with_a_line(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, about) in COMMANDS.items():
        assert any(line.split() == [name, *about.split()] for line in lines)


def test_an_unknown_command_gets_the_near_match():
    with pytest.raises(InputError, match=r"no command 'measur'. Did you mean measure\? Commands: "):
        main(["measur"])


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values()])
def test_every_command_has_a_main(module):
    """Read, not imported: most of them need JAX."""
    path = Path(nanogpt_jax.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    functions = ast.parse(path.read_text(encoding="utf-8")).body
    (found,) = (node for node in functions if getattr(node, "name", "") == "main")
    assert [argument.arg for argument in found.args.args] == ["argv"]


def test_a_command_gets_its_arguments_and_shows_its_name_in_its_help(monkeypatch, capsys):
    module = types.ModuleType("nanogpt_jax.bench.cost")
    module.main = lambda argv: parse_train_config(argv, "about", TrainConfig)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["__main__.py"])
    assert main(["cost", "--n_layer", "3"]).model.n_layer == 3
    with pytest.raises(SystemExit):
        main(["cost", "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m nanogpt_jax cost ")
