"""examples/train_lm.py by one process, and by two ranks that share its windows."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "examples" / "train_lm.py")


def start(folder, *command):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    options = ["--quick", "--steps", "6", "--device", "cpu", "--out", str(folder)]
    return subprocess.Popen(
        [sys.executable, *command, *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def report(process, folder):
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("One model, trained three ways") == said.count("Wrote") == 1
    assert (folder / "train_lm.png").stat().st_size > 10_000
    return json.loads((folder / "train_lm.json").read_text())


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")
def test_two_ranks_train_as_one_process(tmp_path):
    for module in ("rich", "matplotlib"):
        pytest.importorskip(module)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    folders = tmp_path / "one", tmp_path / "two"
    processes = [start(folders[0], SCRIPT), start(folders[1], *torchrun, SCRIPT, "--distributed")]
    one, two = map(report, processes, folders)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for ours, theirs in zip(one["ways"], two["ways"], strict=True):
        # In bfloat16 the order of the sum shows.
        tolerance = 2e-3 if ours["way"] == "PyTorch" else 2e-5
        for loss in ("training loss", "held-out loss"):
            assert theirs[loss] == pytest.approx(ours[loss], abs=tolerance), ours["way"]
    stock, attached, _ = two["ways"]
    assert attached["gradient error"] < 1e-4 * stock["gradient error"]
    errors = two["gradient errors"]
    assert errors["k"] == [k for k in one["gradient errors"]["k"] if k % 2 == 0]
    assert all(map(float.__lt__, errors["attach"], errors["bound"]))


def test_a_rank_without_torchrun_is_told_of_it(monkeypatch, capsys):
    for module in ("rich", "matplotlib"):
        pytest.importorskip(module)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--device", "cpu", "--distributed"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    parse_arguments = runpy.run_path(SCRIPT)["parse_arguments"]
    with pytest.raises(SystemExit):
        parse_arguments()
    assert "start it by torchrun" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        parse_arguments()
    assert "a multiple of the 3 ranks" in capsys.readouterr().err
