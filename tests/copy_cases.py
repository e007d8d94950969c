"""What ranks do that average by copies: cases as in rank_cases.py.

On the CPU, files that the ranks map stand for symmetric memory, and barriers of gloo for its own.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import rank_cases
import torch
import torch.distributed as dist
from hook_cases import backward
from rank_cases import assert_reduced, case, main, mean_sum

import gradacc_kernels as gk
from gradacc_kernels import copies


class MappedFiles:
    """Memory that all ranks of this host see."""

    def __init__(self, ranks):
        self.ranks, self.allocated, self.met = ranks, 0, 0

    def path(self, rank, number):
        return str(self.ranks.folder / f"memory.{rank}.{number}")

    def allocate(self, numel, dtype, device):
        self.allocated += 1
        path = self.path(self.ranks.rank, self.allocated)
        return torch.from_file(path, shared=True, size=numel, dtype=dtype).zero_()

    def rendezvous(self, flat, group):
        number, size = self.allocated, flat.numel()
        assert self.met < number, "met twice over the same memory"
        self.met = number
        dist.barrier(group)
        everyone = [
            torch.from_file(self.path(rank, number), shared=True, size=size, dtype=flat.dtype)
            for rank in dist.get_process_group_ranks(group)
        ]

        def get_buffer(rank, sizes, dtype, offset):
            assert dtype == flat.dtype
            return everyone[rank][offset:].narrow(0, 0, *sizes)

        return SimpleNamespace(
            rank=dist.get_rank(group),
            get_buffer=get_buffer,
            barrier=lambda channel, timeout_ms: dist.barrier(group),
        )


@contextlib.contextmanager
def by_copies(ranks, scratch_bytes=1 << 10):
    with contextlib.ExitStack() as stack:
        patch = {"SCRATCH_BYTES": scratch_bytes}
        if ranks.device.type == "cpu":
            files = MappedFiles(ranks)
            patch |= {
                "allocate": files.allocate,
                "rendezvous": files.rendezvous,
                "can_be_on": lambda device: True,
                "why_not": lambda group, device: None,
            }
        for name, value in patch.items():
            stack.enter_context(mock.patch.object(copies, name, value))
        yield


def counted(function, ranks):
    """Runs a case of others, and asserts that it averaged by copies."""
    with by_copies(ranks), mock.patch.object(copies, "mean_", wraps=copies.mean_) as mean:
        function(ranks)
    assert mean.called


@case
def windows_equal_those_of_one_process(ranks):
    counted(rank_cases.window_equals_that_of_one_process, ranks)


@case
def fused_modules_are_reduced(ranks):
    counted(rank_cases.fused_modules_are_reduced, ranks)


@case
def means_are_those_of_all_values(ranks):
    """Of buckets whose parts are unequal, empty, or longer than the scratch."""
    for sizes in ((1,), (33, 7), (5000, 3, 64), (40000,)):
        for bucket_bytes in (1, 1 << 20):
            with by_copies(ranks, scratch_bytes=4096):
                params = [torch.nn.Parameter(torch.zeros(n, device=ranks.device)) for n in sizes]
                accumulator = gk.attach(
                    params, process_group=ranks.group, bucket_bytes=bucket_bytes
                )
                for seed in range(2):
                    torch.manual_seed(10 * seed + ranks.rank)
                    values = [torch.randn(n).to(ranks.device) for n in sizes]
                    sum((p * v).sum() for p, v in zip(params, values, strict=True)).backward()
                    for param, value in zip(params, values, strict=True):
                        parts = torch.stack([part.double() for part in ranks.gathered(value)])
                        bound = parts.abs().sum(0) * 2**-23
                        assert ((param.grad.double() - parts.mean(0)).abs() <= bound).all()
                    ranks.assert_same(p.grad for p in params)
                    for param in params:
                        param.grad = None
                accumulator.detach()


@case
def untouched_rows_are_left_alone(ranks):
    """Of the first parameter: rows that one rank has touched, or all of them, or none."""
    words, width = 400, 96
    with by_copies(ranks):
        table = torch.nn.Parameter(torch.zeros(words, width, device=ranks.device))
        accumulator = gk.attach([table], process_group=ranks.group)
        touched = accumulator._attachment.reducer._touched
        assert touched is not None
        sparse = []
        for seed, rows in enumerate((0, 3, 3, words)):
            torch.manual_seed(10 * seed + ranks.rank)
            value = torch.zeros(words, width)
            value[torch.randperm(words)[:rows]] = torch.randn(rows, width)
            if seed == 2 and ranks.rank == 1:
                value[value == 0] = -0.0
                value[7, 5] = torch.nan
            value = value.to(ranks.device)
            (table * value).sum().backward()
            parts = torch.stack([part.double() for part in ranks.gathered(value)])
            bound = parts.abs().sum(0) * 2**-23
            error = (table.grad.double() - parts.mean(0)).abs()
            assert ((error <= bound) | (error.isnan() & bound.isnan())).all()
            assert table.grad.isnan().any() == (seed == 2)
            ranks.assert_same([table.grad.nan_to_num()])
            sparse.append(touched._listed._count.item())
            table.grad = None
        assert sparse[0] == 0 < sparse[1] < sparse[3] == len(touched.marks)
        accumulator.detach()


@case
def what_is_impossible_is_refused(ranks):
    model = ranks.model()
    for options, words in (
        ({"reduce_by": "copies", "reduce_dtype": torch.bfloat16}, "leave one of them out"),
        ({"reduce_by": "copies", "process_group": None}, "pass process_group too"),
        ({"reduce_by": "nccl"}, "reduce_by must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            gk.attach(model, **({"process_group": ranks.group} | options))
    if ranks.device.type == "cpu":
        with pytest.raises(RuntimeError, match="is not possible: parameters are on cpu"):
            gk.attach(model, process_group=ranks.group, reduce_by="copies")
    for seen, words in (
        ((f"host {ranks.rank}", f"gpu {ranks.rank}", []), "several hosts"),
        (("host", "gpu", []), "share a GPU"),
        (("host", f"gpu {ranks.rank}", []), "access each other's memory"),
    ):
        with mock.patch.object(copies, "_seen", lambda device, seen=seen: seen):
            with pytest.raises(RuntimeError, match=words):
                gk.attach(model, process_group=ranks.group, reduce_by="copies")
            expected = mean_sum(ranks, model, 1)
            with gk.attach(model, process_group=ranks.group):  # by all_reduce then
                backward(model, ranks.batches(1)[0])
                assert_reduced(ranks, model, expected)
            model.zero_grad()


@case
def memory_is_given_back(ranks):
    if ranks.device.type == "cpu":
        return
    is_alone = ranks.rank == ranks.world_size - 1  # other tests use the first GPU meanwhile
    params = [torch.nn.Parameter(torch.zeros(1 << 26, device=ranks.device))]
    free = []
    for _ in range(4):
        accumulator = gk.attach(params, process_group=ranks.group, reduce_by="copies")
        params[0].sum().backward()
        accumulator.detach()
        params[0].grad = None
        del accumulator
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
        dist.barrier()
    assert free[-1] >= free[0] - (1 << 26) or not is_alone, free


if __name__ == "__main__":
    main()
