"""What the README points at is there."""

import json
import re
from pathlib import Path

import pytest

from nanogpt_jax.config import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TO_LINES = re.findall(r"\[`(\w+)`\]\(([\w/.]+)#L(\d+)\)", README)
TO_FILES = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)


@pytest.mark.parametrize(("name", "path", "number"), TO_LINES)
def test_a_link_to_a_line_leads_to_what_it_names(name, path, number):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    begins = re.compile(rf"(class|def) {name}\b")
    defined_at = next(i for i, line in enumerate(lines, 1) if begins.match(line))
    assert int(number) == defined_at


def test_files_that_are_linked_exist():
    assert len(TO_LINES) > 5
    assert [path for path in TO_FILES if not (ROOT / path).exists()] == []


def test_each_promise_names_a_test_that_is_there():
    promises = re.findall(r"\[`(test_\w+)`\]\((tests/\w+\.py)\)", README)
    assert len(promises) > 20
    for name, path in promises:
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_modules_are_listed_in_their_layers():
    from test_layers import LAYER_OF

    listed = dict.fromkeys(LAYER_OF, None)
    for layer, names in re.findall(r"^\| (\d) \| ((?:`\w+\.py`(?:, )?)+) \|", README, re.M):
        listed |= {name: int(layer) for name in re.findall(r"(\w+)\.py", names)}
    assert listed == LAYER_OF


def test_presets_of_the_lecture_stand_in_its_table():
    assert {name for name in PRESETS if name.startswith("lecture-")} == set(
        re.findall(r"\| `(lecture-\w+)` \|$", README, re.M)
    )


def test_the_badge_opens_the_notebook_of_the_repository_that_the_notebook_names():
    (badge,) = re.findall(
        r"colab\.research\.google\.com/github/(\S+)/blob/main/colab\.ipynb", README
    )
    cells = json.loads((ROOT / "colab.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "".join("".join(cell["source"]) for cell in cells)
    assert re.search(r'REPOSITORY = "https://github\.com/([^"]+)"', source)[1] == badge
