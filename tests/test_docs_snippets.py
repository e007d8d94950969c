"""The Python of the documentation runs: whole pages block after block, others block by block.

`print(x)  # expected` is held to what it says.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)


def blocks(text):
    """The blocks of Python of a page, each with its lines where they are in the page."""
    return ["\n" * text.count("\n", 0, b.start(1)) + b[1] for b in BLOCK.finditer(text)]


def run(block, name, names):
    """Runs a block in a namespace; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, name, "exec"), names)
    expected, lines = PRINTED.findall(block), printed.getvalue().splitlines()
    missing = [line for line in expected if line not in lines]
    assert not missing, f"{name} says it prints {missing}, and printed {lines}"
    return lines


def test_getting_started_runs():
    torch.manual_seed(0)
    page = DOCS / "getting_started.md"
    names = {}
    lines = [run(block, str(page), names) for block in blocks(page.read_text())]
    assert len(lines) > 5
