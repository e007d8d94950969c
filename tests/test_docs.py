"""Tests that docs/compatibility.md names exist, and docs/reference.md has every public name."""

import ast
import functools
import re
from pathlib import Path

import gradacc_kernels

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs/compatibility.md"
ROW = re.compile(r"^\|(?P<what>.+?)\|(?P<verdict>.+?)\|(?P<tests>.+)\|$")
NAME = re.compile(r"`(tests/\w+\.py)::(\w+)`")


def rows(text):
    """The rows of all tables: what, verdict, tests."""
    found = [ROW.match(line) for line in text.splitlines() if line.startswith("|")]
    assert all(found), "a row needs three columns"
    cells = [[cell.strip() for cell in row.groups()] for row in found]
    return [row for row in cells if row[0] != "what" and set(row[0]) != {"-"}]


@functools.cache
def functions_of(path):
    """The tests of a file, or its cases, without importing it; none where there is no file."""
    if not path.exists():
        return set()
    body = ast.parse(path.read_text()).body
    functions = [n for n in body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {
        f.name
        for f in functions
        if f.name.startswith("test_") or any(ast.unparse(d) == "case" for d in f.decorator_list)
    }


def missing(text):
    """The named tests that do not exist."""
    named = NAME.findall(text)
    known = {path: functions_of(ROOT / path) for path, _ in named}
    return sorted({f"{path}::{name}" for path, name in named if name not in known[path]})


def test_every_named_test_exists():
    assert missing(DOCUMENT.read_text()) == []


def test_every_row_names_a_test_and_has_a_verdict():
    found = rows(DOCUMENT.read_text())
    assert len(found) > 50
    for what, verdict, tests in found:
        assert re.match(r"works$|works, |refused: ", verdict), f"{what}: {verdict}"
        assert NAME.search(tests), f"{what}: no test"
        rest = NAME.sub("", tests).replace(",", "").strip()
        assert rest == "", f"{what}: {rest} is no test"


def test_a_name_that_does_not_exist_is_found():
    text = "`tests/test_docs.py::test_of_nothing` `tests/test_none.py::test_a` "
    text += "`tests/test_docs.py::test_every_named_test_exists` "
    text += "`tests/ddp_cases.py::forms` `tests/ddp_cases.py::bucket_views`"
    assert missing(text) == [
        "tests/ddp_cases.py::forms",
        "tests/test_docs.py::test_of_nothing",
        "tests/test_none.py::test_a",
    ]


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs/reference.md").read_text()
    assert sorted(re.findall(r"^::: gradacc_kernels\.(\w+)$", page, re.MULTILINE)) == sorted(
        gradacc_kernels.__all__
    )
