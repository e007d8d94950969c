"""The Python of the documentation runs: whole pages block after block, others block by block.

`print(x)  # expected` is held to what it says.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from gradacc_kernels import report

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


def test_getting_started_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes run.jsonl, of which the page has a report made
    torch.manual_seed(0)
    page = DOCS / "getting_started.md"
    names = {}
    lines = [run(block, str(page), names) for block in blocks(page.read_text())]
    assert len(lines) > 5
    pytest.importorskip("matplotlib")
    assert report.main(["run.jsonl"]) == 0 and Path("run.html").exists()


def loss_of(model, batch):
    x, y = batch
    return torch.nn.functional.mse_loss(model(x.to(model[0].weight.dtype)).float(), y)


@pytest.fixture
def ours():
    """What a reader of migration.md has: two windows of micro-batches, and a process group."""
    torch.manual_seed(0)
    k = 2
    batches = [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(2 * k)]
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
    windows = [batches[:k], batches[k:]]
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {
        "torch": torch,
        "K": k,
        "model": model,
        "batches": batches,
        "windows": windows,
        "loader": torch.utils.data.DataLoader(batches, batch_size=None),
        "loss_of": loss_of,
    }
    dist.destroy_process_group()


MIGRATION = DOCS / "migration.md"


def snippets(kind):
    return [b for b in blocks(MIGRATION.read_text()) if b.lstrip().startswith(f"# {kind}\n")]


def test_every_snippet_of_migration_is_before_or_after():
    assert len(blocks(MIGRATION.read_text())) == len(snippets("before")) + len(snippets("after"))
    for block in snippets("before"):
        compile(block, str(MIGRATION), "exec")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
@pytest.mark.parametrize("index", range(len(snippets("after"))))
def test_migrated_loops_train(ours, index):
    block = snippets("after")[index]
    if "accelerate" in block:
        state = pytest.importorskip("accelerate").state
    before = [param.detach().clone() for param in ours["model"].parameters()]
    run(block, str(MIGRATION), ours)
    if "accelerate" in block:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    after = ours["model"].parameters()
    steps = "optimizer.step" in block or "step(optimizer" in block
    changed = [not torch.equal(a.float(), b) for a, b in zip(after, before, strict=True)]
    assert all(changed) if steps else not any(changed)


def test_a_snippet_that_prints_something_else_is_found():
    with pytest.raises(AssertionError, match="says it prints"):
        run("print(2)  # 3\n", "page", {})
