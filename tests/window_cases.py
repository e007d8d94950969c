"""NoiseScale and AutoWindow on several ranks: cases as in rank_cases.py."""

import contextlib
import copy
import math

import pytest
import torch
from rank_cases import case, main
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradacc_kernels as gk


def tokens_of(rank, window):
    """The tokens of each micro-batch of a rank; the last window has one a rank."""
    return [[3 + rank, 9, 1], [5, 2 + 3 * rank, 4], [6 + rank]][window]


def formula(model, ranks, window, data):
    """S and |G|^2 of the micro-batches of all ranks, fp64."""
    double = copy.deepcopy(model).double()
    a, total, n, k = 0, 0, 0, 0
    for rank in range(ranks.world_size):
        for x, count in zip(data[rank], tokens_of(rank, window), strict=True):
            loss = double(x.double()).square().sum()
            grads = torch.autograd.grad(loss, list(double.parameters()))
            s = torch.cat([grad.flatten() for grad in grads])
            a, total, n, k = a + s.square().sum() / count, total + s, n + count, k + 1
    big = (total / n).square().sum()
    noise = (a - n * big) / (k - 1)
    return torch.stack([noise, big - noise / n])


@case
def the_noise_scale_is_of_the_micro_batches_of_all_ranks(ranks):
    for backend in ranks.backends:
        for how in ("last backward reduces", "nothing reduces", "every backward reduces"):
            for bucket_bytes in (None, 512):
                _assert_formula(ranks, backend, how, bucket_bytes)


def _assert_formula(ranks, backend, how, bucket_bytes):
    model = ranks.model(torch.float32)
    reference = copy.deepcopy(model)
    accumulator = gk.attach(
        model, backend=backend, process_group=ranks.group, bucket_bytes=bucket_bytes, fuse=True
    )
    noise = gk.NoiseScale(accumulator, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for window in range(3):
        data = [ranks.batches(3, rank, dtype=torch.float32) for rank in range(ranks.world_size)]
        data = [batches[: len(tokens_of(r, window))] for r, batches in enumerate(data)]
        counts = tokens_of(ranks.rank, window)
        for i, (x, n) in enumerate(zip(data[ranks.rank], counts, strict=True)):
            is_last = i + 1 == len(counts)
            reduces = {"l": is_last, "n": False, "e": True}[how[0]]
            with _unless(reduces, accumulator), accumulator.micro_batch(n):
                (model(x).square().sum() / n).backward()
            noise.observe()
        noise.update()
        expected = formula(reference, ranks, window, data).to(noise.estimate)
        torch.testing.assert_close(noise.estimate, expected, rtol=1e-4, atol=0)
        ranks.assert_same([noise.estimate])
        accumulator.step(optimizer)
        optimizer.zero_grad()
    assert noise.suggested_micro_batches(1e-3) == max(
        1, round(noise.value / 1e-3 / ranks.world_size)
    )
    accumulator.detach()


def _unless(reduces, accumulator):
    return contextlib.nullcontext() if reduces else accumulator.no_sync()


@case
def an_update_that_comes_too_late_is_told(ranks):
    model = ranks.model(torch.float32)
    accumulator = gk.attach(model, process_group=ranks.group)
    noise = gk.NoiseScale(accumulator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with accumulator.micro_batch(2):
        model(ranks.batches(1, dtype=torch.float32)[0]).sum().backward()
    noise.observe()
    accumulator.step(optimizer)
    try:
        noise.update()
    except RuntimeError as error:
        assert "call NoiseScale.update() before that" in str(error)
    else:
        raise AssertionError("took a window that was stepped")
    accumulator.detach()


@case
def distributed_data_parallel_is_refused(ranks):
    model = ranks.model(torch.float32)
    accumulator = gk.attach(model)
    noise = gk.NoiseScale(accumulator)  # of this rank alone
    ddp = DistributedDataParallel(model)
    ddp(ranks.batches(1, dtype=torch.float32)[0]).sum().backward()
    noise.observe()
    for call in (noise.update, lambda: gk.NoiseScale(accumulator)):
        try:
            call()
        except RuntimeError as error:
            assert "cannot be seen" in str(error)
        else:
            raise AssertionError("took gradients that DistributedDataParallel has averaged")
    accumulator.detach()


@case
def shards_have_no_noise_scale(ranks):
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for kind in ("FSDP2", "tensor parallel"):
        model = ranks.model(torch.float32)
        if kind == "FSDP2":
            fully_shard(model, mesh=mesh)
        else:
            parallelize_module(model, mesh, {"0": ColwiseParallel(use_local_output=False)})
        accumulator = gk.attach(model)
        with pytest.raises(ValueError, match="expected parameters that this rank has whole"):
            gk.NoiseScale(accumulator)
        accumulator.detach()


@case
def steps_and_a_window_that_changes_exclude_each_other(ranks):
    model = ranks.model(torch.float32)
    accumulator = gk.attach(model, process_group=ranks.group, steps=2)
    with pytest.raises(ValueError, match="steps=2.: leave steps out"):
        gk.AutoWindow(accumulator, 2)
    accumulator.detach()


@case
def windows_under_distributed_data_parallel(ranks):
    """Of 1 and of 3 micro-batches: the gradients of stock DDP, and one reduction a window."""
    model = ranks.model(torch.float32)
    ddp, stock = map(DistributedDataParallel, (model, copy.deepcopy(model)))
    accumulator = gk.attach(ddp)
    window = gk.AutoWindow(accumulator, gk.Schedule([(0, 1), (1, 3)]))
    lasts = []
    for x in ranks.batches(4, dtype=torch.float32):
        with window.micro_batch():
            for net in (ddp, stock):
                with contextlib.nullcontext() if window.is_last else net.no_sync():
                    (net(x).square().sum() / window.k).backward()
        lasts.append(window.is_last)
        if window.is_last:
            grads = [param.grad for param in model.parameters()]
            ranks.assert_same(grads)
            theirs = [param.grad for param in stock.parameters()]
            torch.testing.assert_close(grads, theirs, rtol=1e-5, atol=1e-5)
            ddp.zero_grad()
            stock.zero_grad()
    assert lasts == [True, False, False, True]
    accumulator.detach()


@case
def all_ranks_choose_the_same(ranks):
    """Tokens are those of all ranks, and the windows of rank 0 are those of the others."""
    rules = {
        "target": lambda _: gk.TokenTarget(30 * ranks.world_size),
        "ramp": lambda _: gk.Schedule([(0, 1), (60 * ranks.world_size, 4)], unit="tokens"),
        "noise": lambda accumulator: gk.FollowNoise(_Noise(accumulator, ranks), every=1),
    }
    for name, rule in rules.items():
        model = ranks.model(torch.float32)
        accumulator = gk.attach(model, process_group=ranks.group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        window = gk.AutoWindow(accumulator, rule(accumulator))
        lengths, count = [], 0
        generator = torch.Generator().manual_seed(ranks.rank)
        for x in ranks.batches(24, dtype=torch.float32):
            n = int(torch.randint(1, 20, (), generator=generator))
            with window.micro_batch(n):
                (model(x).square().sum() / n).backward()
            count += 1
            assert accumulator._attachment.is_reduced() == window.is_last
            if window.is_last:
                accumulator.step(optimizer)
                optimizer.zero_grad()
                lengths.append(count)
                count = 0
        window.close()
        ended = torch.tensor([window.windows, window.tokens, *lengths], dtype=torch.float64)
        ranks.assert_same([ended.to(ranks.device)])
        assert len(set(lengths)) > 1, f"{name} has not changed K: {lengths}"
        if count:
            accumulator.step(optimizer)
            optimizer.zero_grad()
        ranks.assert_same(list(model.parameters()))
        accumulator.detach()


class _Noise(gk.NoiseScale):
    """One whose value is another on each rank, of which that of the first one counts."""

    def __init__(self, accumulator, ranks):
        super().__init__(accumulator)
        self._rank = ranks.rank

    @property
    def value(self):
        return math.nan if math.isnan(super().value) else 400.0 * (1 + self._rank)


@case
def the_least_micro_batch_of_the_ranks(ranks):
    def fn(n):
        if n > 4 + ranks.rank:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = gk.find_micro_batch_size(
        fn,
        effective_batch=10 * ranks.world_size,
        process_group=ranks.group,
        device=ranks.device,
        margin=0.01,
    )
    assert found.largest == 4 and found.sizes == (4, 3, 3)


if __name__ == "__main__":
    main()
