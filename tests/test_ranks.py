"""Several ranks of torch.distributed, over gloo and NCCL: rank_cases.py and zero_cases.py."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zero_cases
from hook_cases import needs_extension

SCRIPT = Path(__file__).with_name("rank_cases.py")
ZERO_SCRIPT = Path(__file__).with_name("zero_cases.py")


def names(script=SCRIPT):
    functions = (n for n in ast.parse(script.read_text()).body if isinstance(n, ast.FunctionDef))
    return [f.name for f in functions if any("case" == d.id for d in f.decorator_list)]


def ranks_of(folder, world_size, device, script=SCRIPT):
    """Runs all cases once; returns the results of each rank by the name of the case."""
    path = os.pathsep.join(map(str, (SCRIPT.parent, SCRIPT.parent.parent)))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # torch refuses to fork a process that has used a GPU
    command = [sys.executable, str(script), str(folder), str(world_size), device]
    done = subprocess.run(command, env=env, timeout=240, capture_output=True, text=True)
    results = []
    for rank in range(world_size):
        lines = (folder / str(rank)).read_text().splitlines() if done.returncode == 0 else []
        results.append({r["case"]: r["failure"] for r in map(json.loads, lines)})
    return results, done.stderr


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    world_size, device = request.param
    return ranks_of(tmp_path_factory.mktemp("ranks"), world_size, device)


@pytest.fixture(scope="module")
def zero_ranks(request, tmp_path_factory):
    world_size, device = request.param
    folder = tmp_path_factory.mktemp("zero_ranks")
    return folder, *ranks_of(folder, world_size, device, ZERO_SCRIPT)


def gpus(count):
    reason = f"fewer than {count} CUDA devices are visible"
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)]


def worlds(fixture):
    return pytest.mark.parametrize(
        fixture,
        [(2, "cpu"), (4, "cpu"), pytest.param((2, "cuda"), marks=gpus(2))],
        ids=["2-gloo", "4-gloo", "2-nccl"],
        indirect=True,
    )


def check(results, stderr, name):
    for rank, result in enumerate(results):
        assert name in result, f"rank {rank} did not come to it: {stderr[-3000:]}"
        assert result[name] is None, f"rank {rank}: {result[name]}"


@needs_extension
@pytest.mark.parametrize("name", names())
@worlds("ranks")
def test_case(ranks, name):
    check(*ranks, name)


@needs_extension
@pytest.mark.parametrize("name", names(ZERO_SCRIPT))
@worlds("zero_ranks")
def test_zero(zero_ranks, name):
    check(*zero_ranks[1:], name)


@needs_extension
@worlds("zero_ranks")
def test_one_process_resumes_what_ranks_have_saved(zero_ranks):
    """This one, in which torch.distributed is not initialised."""
    folder, *results = zero_ranks
    check(*results, zero_cases.checkpoints_are_resumed_by_other_numbers_of_ranks.__name__)
    zero_cases.resume_in_one_process(folder)
