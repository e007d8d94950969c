"""Several ranks of torch.distributed, over gloo and NCCL: the cases of *_cases.py named below."""

import ast
from pathlib import Path

import pytest
import torch
import zero_cases
from conftest import gpus_of
from hook_cases import needs_extension

pytestmark = pytest.mark.xdist_group("ranks")

FOLDER = Path(__file__).parent


def names(script):
    body = ast.parse((FOLDER / script).read_text()).body
    functions = (n for n in body if isinstance(n, ast.FunctionDef))
    return [f.name for f in functions if "case" in map(ast.unparse, f.decorator_list)]


def gpus(count):
    if count == 0:
        return []
    reason = f"fewer than {count} CUDA devices are visible"
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)]


def params_of(script, *pairs):
    """A file of cases, run by so many ranks in these ways: parameters of `ranks`."""
    ids = {"cpu": "gloo", "cuda": "nccl", "shared": "one-gpu"}
    return [
        pytest.param(
            (script, world_size, way),
            marks=gpus(gpus_of(world_size, way)),
            id=f"{world_size}-{ids[way]}",
        )
        for world_size, way in pairs
    ]


def runs(script, *pairs):
    """Parametrises `ranks`."""
    return pytest.mark.parametrize("ranks", params_of(script, *pairs), indirect=True)


def assert_passed(ranks, name):
    _, results, stderr = ranks
    for rank, result in enumerate(results):
        assert name in result, f"rank {rank} did not come to it: {stderr[-3000:]}"
        assert result[name] is None, f"rank {rank}: {result[name]}"


# One rank has nothing to reduce, but FSDP2 and DTensors do on a GPU all that they do.
RUNS = {
    "rank_cases.py": ((2, "cpu"), (4, "cpu"), (2, "shared"), (2, "cuda")),
    "ddp_cases.py": ((2, "cpu"), (2, "shared"), (2, "cuda")),
    "zero_cases.py": ((2, "cpu"), (4, "cpu"), (2, "shared"), (2, "cuda")),
    "copy_cases.py": ((4, "cpu"), (2, "cuda")),
    "fsdp_cases.py": ((2, "cpu"), (1, "cuda"), (2, "cuda")),
    "tp_cases.py": ((2, "cpu"), (1, "cuda"), (2, "cuda")),
    "mesh_cases.py": ((4, "cpu"),),
}


@needs_extension
@pytest.mark.parametrize(
    "ranks, name",
    [
        pytest.param(run.values[0], name, marks=run.marks, id=f"{script[:-9]}-{run.id}-{name}")
        for script, pairs in RUNS.items()
        for run in params_of(script, *pairs)
        for name in names(script)
    ],
    indirect=["ranks"],
)
def test_case(ranks, name):
    assert_passed(ranks, name)


@needs_extension
@runs("zero_cases.py", (2, "cpu"), (4, "cpu"))
def test_one_process_resumes_what_ranks_have_saved(ranks):
    """This one, in which torch.distributed is not initialised."""
    assert_passed(ranks, zero_cases.checkpoints_are_resumed_by_other_numbers_of_ranks.__name__)
    zero_cases.resume_in_one_process(ranks[0])
