"""Stats and monitors of several ranks: cases, run as rank_cases.py describes."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from hook_cases import backward
from rank_cases import case, main, mean_sum
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_

import gradacc_kernels as gk


class Records(list):
    def write(self, record):
        self.append(record)

    def close(self):
        pass


@contextlib.contextmanager
def written(accumulator):
    records = Records()
    with gk.Monitor(accumulator, [records]):
        yield records


def norm_of(param):
    """Of the whole parameter."""
    grad = param.grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).double().norm().item()


@case
def norms_are_of_this_rank_and_then_of_the_mean(ranks):
    weights = [[1, 4], [2, 1], [3, 1], [2, 2]][: ranks.world_size]
    total = float(sum(map(sum, weights)))
    own = weights[ranks.rank]
    for backend in ranks.backends:
        model = ranks.model()
        names = [name for name, _ in model.named_parameters()]
        sums = mean_sum(ranks, model, 2, weights)
        alone = mean_sum(ranks, model, 2, weights, [ranks.rank])
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with accumulator.no_sync():
            for x, weight in zip(ranks.batches(2), own, strict=True):
                with accumulator.micro_batch(weight):
                    backward(model, x)
        stats = accumulator.stats()
        assert stats.tokens == sum(own) and stats.micro_batches == 2
        for name, each in zip(names, alone, strict=True):
            true = (each.total / sum(own)).norm().item()
            assert stats.norms[name] == pytest.approx(true, rel=1e-3)
        with written(accumulator) as records:
            accumulator.step(optimizer, max_norm=0.1)
        ranks.finish()
        for stats in (accumulator.stats(), *records):
            is_record = isinstance(stats, dict)
            tokens = stats["tokens"] if is_record else stats.tokens
            norms = stats["largest"] if is_record else stats.norms
            assert tokens == total
            for name, each in zip(names, sums, strict=True):
                true = (each.total * ranks.world_size / total).norm().item()
                if name in norms:
                    assert norms[name] == pytest.approx(true, rel=1e-5)
        assert len(records) == (ranks.rank == 0)
        accumulator.detach()


@case
def norms_of_shards_are_those_of_whole_parameters(ranks):
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for kind in ("tensor parallel", "fsdp2"):
        model = ranks.model(torch.float32)
        if kind == "fsdp2":
            fully_shard(model, mesh=mesh)
        else:
            parallelize_module(model, mesh, {"0": ColwiseParallel(use_local_output=False)})
            model[2].requires_grad_(False)
            model = model[0]
        accumulator = gk.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for close in ("step", "stock"):
            rank = None if kind == "fsdp2" else 0  # tensor parallel ranks see the same data
            weights = (2, 3) if kind == "fsdp2" else (None, None)
            for x, weight in zip(ranks.batches(2, rank, dtype=torch.float32), weights, strict=True):
                with accumulator.micro_batch(weight):
                    out = model(x)
                    out = out.full_tensor() if hasattr(out, "full_tensor") else out
                    out.square().sum().backward()
            with written(accumulator) as records:
                if close == "step":
                    accumulator.step(optimizer)
                else:
                    accumulator.average_()
                    optimizer.step()
            ranks.finish()
            stats = accumulator.stats()
            params = dict(model.named_parameters())
            assert stats.norms.keys() == params.keys()
            for name, param in params.items():
                assert stats.norms[name] == pytest.approx(norm_of(param), rel=1e-5)
            whole = clip_grad_norm_(model.parameters(), 1e9)
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            assert stats.norm == pytest.approx(whole.item(), rel=1e-5)
            assert stats.is_closed and stats.micro_batches == 2
            assert stats.tokens == (5 * ranks.world_size if kind == "fsdp2" else None)
            assert len(records) == (ranks.rank == 0)
            for record in records:
                assert record["norm"] == pytest.approx(stats.norm, rel=1e-6)
            optimizer.zero_grad()
        accumulator.detach()


@case
def every_rank_writes_where_it_is_asked_to(ranks):
    model = ranks.model(torch.float32)
    with gk.attach(model, process_group=ranks.group) as accumulator:
        records = Records()
        gk.Monitor(accumulator, [records], all_ranks=True)
        backward(model, ranks.batches(1, dtype=torch.float32)[0])
        accumulator.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(records) == 1
    counts = [None] * ranks.world_size
    dist.all_gather_object(counts, records[0]["norm"])
    assert len(set(counts)) == 1


if __name__ == "__main__":
    main()
