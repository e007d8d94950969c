"""Several ranks of torch.distributed, over gloo and NCCL: the cases of *_cases.py named below."""

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

FOLDER = Path(__file__).parent


def names(script):
    body = ast.parse((FOLDER / script).read_text()).body
    functions = (n for n in body if isinstance(n, ast.FunctionDef))
    return [f.name for f in functions if any("case" == d.id for d in f.decorator_list)]


def ranks_of(folder, script, world_size, device):
    """Runs all cases once; returns the results of each rank by the name of the case."""
    path = os.pathsep.join(map(str, (FOLDER, FOLDER.parent)))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # torch refuses to fork a process that has used a GPU
    command = [sys.executable, str(FOLDER / script), str(folder), str(world_size), device]
    done = subprocess.run(command, env=env, timeout=240, capture_output=True, text=True)
    results = []
    for rank in range(world_size):
        lines = (folder / str(rank)).read_text().splitlines() if done.returncode == 0 else []
        results.append({r["case"]: r["failure"] for r in map(json.loads, lines)})
    return results, done.stderr


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """The folder that the ranks wrote to, their results, and what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, *ranks_of(folder, *request.param)


def gpus(count):
    reason = f"fewer than {count} CUDA devices are visible"
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)]


def runs(script, *pairs):
    """Parametrises `ranks` by a file of cases, run by so many ranks on these devices."""
    backends = {"cpu": "gloo", "cuda": "nccl"}
    params = [
        pytest.param(
            (script, world_size, device),
            marks=gpus(world_size) if device == "cuda" else [],
            id=f"{world_size}-{backends[device]}",
        )
        for world_size, device in pairs
    ]
    return pytest.mark.parametrize("ranks", params, indirect=True)


def assert_passed(ranks, name):
    _, results, stderr = ranks
    for rank, result in enumerate(results):
        assert name in result, f"rank {rank} did not come to it: {stderr[-3000:]}"
        assert result[name] is None, f"rank {rank}: {result[name]}"


@needs_extension
@pytest.mark.parametrize("name", names("rank_cases.py"))
@runs("rank_cases.py", (2, "cpu"), (4, "cpu"), (2, "cuda"))
def test_case(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@pytest.mark.parametrize("name", names("ddp_cases.py"))
@runs("ddp_cases.py", (2, "cpu"), (2, "cuda"))
def test_ddp(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@pytest.mark.parametrize("name", names("zero_cases.py"))
@runs("zero_cases.py", (2, "cpu"), (4, "cpu"), (2, "cuda"))
def test_zero(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@runs("zero_cases.py", (2, "cpu"), (4, "cpu"))
def test_one_process_resumes_what_ranks_have_saved(ranks):
    """This one, in which torch.distributed is not initialised."""
    assert_passed(ranks, zero_cases.checkpoints_are_resumed_by_other_numbers_of_ranks.__name__)
    zero_cases.resume_in_one_process(ranks[0])
