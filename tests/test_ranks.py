"""Several ranks of torch.distributed, over gloo and NCCL: the cases of *_cases.py named below."""

import ast
from pathlib import Path

import pytest
import torch
import zero_cases
from hook_cases import needs_extension

pytestmark = pytest.mark.xdist_group("ranks")

FOLDER = Path(__file__).parent


def names(script):
    body = ast.parse((FOLDER / script).read_text()).body
    functions = (n for n in body if isinstance(n, ast.FunctionDef))
    return [f.name for f in functions if "case" in map(ast.unparse, f.decorator_list)]


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
@pytest.mark.parametrize("name", names("copy_cases.py"))
@runs("copy_cases.py", (4, "cpu"), (2, "cuda"))
def test_copies(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@pytest.mark.parametrize("name", names("fsdp_cases.py"))
@runs("fsdp_cases.py", (2, "cpu"), (2, "cuda"))
def test_fsdp(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@pytest.mark.parametrize("name", names("tp_cases.py"))
@runs("tp_cases.py", (2, "cpu"), (2, "cuda"))
def test_tp(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@pytest.mark.parametrize("name", names("mesh_cases.py"))
@runs("mesh_cases.py", (4, "cpu"))
def test_meshes(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@runs("zero_cases.py", (2, "cpu"), (4, "cpu"))
def test_one_process_resumes_what_ranks_have_saved(ranks):
    """This one, in which torch.distributed is not initialised."""
    assert_passed(ranks, zero_cases.checkpoints_are_resumed_by_other_numbers_of_ranks.__name__)
    zero_cases.resume_in_one_process(ranks[0])
