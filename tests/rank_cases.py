"""What several ranks do together: cases that every rank of a process group runs, one by one.

    python tests/rank_cases.py FOLDER WORLD_SIZE [cpu|cuda|shared]        (or tests/zero_cases.py)

starts the ranks: on the CPU over gloo, as forks of this process; on a GPU each over NCCL; or over
gloo on one GPU that they share, where NCCL refuses to work. Rank r writes a line of JSON for each
case to FOLDER/r: its name, and the traceback where it failed. Other files of cases call main() too,
which runs the cases of the file that was started.
"""

import contextlib
import copy
import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import oracle
import torch
import torch.distributed as dist
from hook_cases import Raise, backward, mlp
from torch.utils.checkpoint import checkpoint

import gradacc_kernels as gk
from gradacc_kernels import stalls

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "shared": "gloo"}
CASES = {}  # those of each file, by its module


def case(function):
    CASES.setdefault(function.__module__, {})[function.__name__] = function
    return function


class Ranks:
    """What a case is given: who it is, and how to compare."""

    def __init__(self, rank, world_size, device, folder):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.folder = folder
        self.group = dist.group.WORLD
        # The forms of the hook: C++ and Python.
        self.backends = ("cpu", "reference") if device.type == "cpu" else ("cuda", "triton")

    def model(self, dtype=torch.bfloat16):
        torch.manual_seed(0)
        return mlp(self.device, dtype)

    def batches(self, count, rank=None, rows=4, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(100 + (self.rank if rank is None else rank))
        inputs = torch.randn(count, rows, 16, generator=generator)
        return list(inputs.to(self.device, dtype))

    def gathered(self, tensor):
        values = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(values, tensor.contiguous())
        return values

    def finish(self):
        """Waits for the device, which may find only then what a later call tells of."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def assert_same(self, tensors):
        """Bit by bit, on all ranks."""
        for tensor in tensors:
            for other in self.gathered(tensor.detach()):
                assert other.equal(tensor), "the ranks hold different bits"


def mean_sum(ranks, model, count, weights=None, members=None):
    """The sums that one process has of the batches of all ranks, each over the number of ranks."""
    params = list(model.parameters())
    sums = [oracle.WindowSum(torch.zeros(p.shape)) for p in params]
    members = range(ranks.world_size) if members is None else members
    for rank in members:
        for index, x in enumerate(ranks.batches(count, rank)):
            loss = model(x).float().square().sum()
            weight = 1.0 if weights is None else float(weights[rank][index])
            for total, grad in zip(sums, torch.autograd.grad(loss, params), strict=True):
                total.add(grad, weight / len(members))
    return sums


def assert_reduced(ranks, model, sums, roundings=2):
    """`.grad` is the mean of what the ranks have summed, the same bits on all."""
    for param, total in zip(model.parameters(), sums, strict=True):
        assert param.grad.data_ptr() == param.main_grad.data_ptr()
        assert param.grad.dtype == torch.float32
        total.k += roundings  # of the mean
        assert total.contains(param.grad)
    ranks.assert_same(p.grad for p in model.parameters())


def said_by(function, kind=RuntimeError):
    """What it raises, in words."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")


@case
def window_equals_that_of_one_process(ranks):
    for backend in ranks.backends:
        for count, bucket_bytes, way, reduce_by in (
            (1, 1, "no_sync", "auto"),
            (4, 1 << 20, "no_sync", "all_reduce"),
            (4, 700, "steps", "auto"),
            (3, 700, "micro_batch", "all_reduce"),
        ):
            model = ranks.model()
            expected = mean_sum(ranks, model, count)
            steps = count if way == "steps" else None
            accumulator = gk.attach(
                model,
                backend=backend,
                process_group=ranks.group,
                bucket_bytes=bucket_bytes,
                steps=steps,
                reduce_by=reduce_by,
            )
            for window in range(2):
                for index, x in enumerate(ranks.batches(count)):
                    is_last = index == count - 1
                    waits = way != "steps" and not is_last
                    with accumulator.no_sync() if waits else contextlib.nullcontext():
                        with (
                            accumulator.micro_batch()
                            if way == "micro_batch"
                            else contextlib.nullcontext()
                        ):
                            backward(model, x)
                    if not is_last:
                        local = mean_local(ranks, model, index + 1)
                        for p, total in zip(model.parameters(), local, strict=True):
                            assert total.contains(p.grad)
                if window == 0:
                    model.zero_grad()
            assert_reduced(ranks, model, expected)
            assert accumulator.micro_batches == count
            accumulator.detach()


def mean_local(ranks, model, count):
    params = list(model.parameters())
    sums = [oracle.WindowSum(torch.zeros(p.shape)) for p in params]
    for x in ranks.batches(count):
        loss = model(x).float().square().sum()
        for total, grad in zip(sums, torch.autograd.grad(loss, params), strict=True):
            total.add(grad)
    return sums


@case
def a_process_group_of_several_backends(ranks):
    is_nccl = dist.get_backend() == "nccl"
    group = dist.new_group(backend="cpu:gloo,cuda:nccl" if is_nccl else "cpu:gloo,cuda:gloo")
    model = ranks.model()
    expected = mean_sum(ranks, model, 1)
    accumulator = gk.attach(model, process_group=group)
    assert accumulator._attachment.reducer._averages == is_nccl
    backward(model, ranks.batches(1)[0])
    assert_reduced(ranks, model, expected)
    accumulator.detach()


@case
def a_wrong_mean_is_seen(ranks):
    model = ranks.model()
    expected = mean_sum(ranks, model, 1)
    accumulator = gk.attach(model, process_group=ranks.group)
    with accumulator.no_sync():
        backward(model, ranks.batches(1)[0])
    pairs = zip(model.parameters(), expected, strict=True)
    assert not all(total.contains(param.grad) for param, total in pairs)
    accumulator.reduce()
    assert_reduced(ranks, model, expected)
    accumulator.detach()


@case
def fused_modules_are_reduced(ranks):
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        stock = copy.deepcopy(model)
        accumulator = gk.attach(
            model, backend=backend, fuse=True, process_group=ranks.group, bucket_bytes=1
        )
        for x in ranks.batches(2, dtype=torch.float32):
            with accumulator.no_sync():
                backward(model, x)
        # A module that is called twice adds twice before its weight has arrived.
        x = ranks.batches(3, dtype=torch.float32)[2]
        (model(x).square().sum() + model(x * 2).square().sum()).backward()
        for x in ranks.batches(3, dtype=torch.float32)[:2]:
            backward(stock, x)
        x = ranks.batches(3, dtype=torch.float32)[2]
        (stock(x).square().sum() + stock(x * 2).square().sum()).backward()
        for param, other in zip(model.parameters(), stock.parameters(), strict=True):
            dist.all_reduce(other.grad)
            torch.testing.assert_close(
                param.grad, other.grad / ranks.world_size, rtol=1e-4, atol=1e-5
            )
        ranks.assert_same(p.grad for p in model.parameters())
        accumulator.detach()


@case
def weights_are_those_of_all_ranks(ranks):
    weights = [[3.0, 1.0 + rank] for rank in range(ranks.world_size)]
    whole = sum(map(sum, weights))
    for backend in ranks.backends:
        model = ranks.model()
        expected = mean_sum(ranks, model, 2, weights)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group, bucket_bytes=700)
        first, last = ranks.batches(2)
        with accumulator.no_sync(), accumulator.micro_batch(weights[ranks.rank][0]):
            backward(model, first)
        assert accumulator.weight.item() == 3
        with accumulator.micro_batch(weights[ranks.rank][1]):
            backward(model, last)
        assert accumulator.weight.item() == whole
        assert_reduced(ranks, model, expected)
        accumulator.average_()
        for param, total in zip(model.parameters(), expected, strict=True):
            total.total *= ranks.world_size / whole
            total.magnitude *= ranks.world_size / whole
            total.k += 2
            assert total.contains(param.grad)
        ranks.assert_same(p.grad for p in model.parameters())
        accumulator.detach()


@case
def parameters_that_some_ranks_do_not_use(ranks):
    for backend in ranks.backends:
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4)).to(ranks.device)
        accumulator = gk.attach(layers, backend=backend, process_group=ranks.group, bucket_bytes=1)
        x = torch.full((2, 4), 1.0 + ranks.rank, device=ranks.device)
        for _ in range(2):  # the second window finds what the first one has left
            for p in layers.parameters():
                p.grad = None
            used = [layers[0], layers[1 + ranks.rank % 2]]
            sum(layer(x).sum() for layer in used).backward()
            for index, layer in enumerate(layers):
                users = [r for r in range(ranks.world_size) if index == 0 or index == 1 + r % 2]
                mean = sum(2 * (1.0 + r) for r in users) / ranks.world_size
                assert layer.weight.grad.equal(torch.full_like(layer.weight, mean)), (index, mean)
            accumulator.step(torch.optim.SGD(layers.parameters(), lr=0.0))
        accumulator.detach()


@case
def a_rank_without_a_gradient_takes_part(ranks):
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for window in range(3):
            x = ranks.batches(1, dtype=torch.float32)[0]
            is_idle = ranks.rank == window % ranks.world_size
            with accumulator.micro_batch(0 if is_idle else 2):
                if not is_idle:
                    (model(x).square().sum() / 2).backward()
            norm = accumulator.step(optimizer, max_norm=1.0)
            ranks.assert_same([norm, *model.parameters()])
            assert 0 < norm.item() < 1e6
            model.zero_grad()
        accumulator.detach()


@case
def a_step_before_the_reduction_is_refused(ranks):
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = ranks.batches(1, dtype=torch.float32)[0]
        backward(model, x)
        with accumulator.no_sync():
            backward(model, x)
        before = [p.clone() for p in model.parameters()]
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "not reduced over the ranks" in str(error)
        else:
            raise AssertionError("stepped by gradients of one rank")
        assert all(map(torch.equal, model.parameters(), before))
        accumulator.reduce()
        optimizer.step()
        ranks.assert_same(model.parameters())
        accumulator.detach()


@case
def several_optimizers_step_one_window(ranks):
    model = ranks.model(torch.float32)
    accumulator = gk.attach(model, process_group=ranks.group)
    parts = [
        torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2], model[3])
    ]
    for x in ranks.batches(2, dtype=torch.float32):
        backward(model, x)
        for optimizer in parts:
            optimizer.step()
        model.zero_grad()
    ranks.assert_same(model.parameters())
    accumulator.detach()


@case
def an_overflow_of_one_rank_is_that_of_all(ranks):
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group, bucket_bytes=700)
        scaler = gk.GradScaler(accumulator, device=ranks.device.type, init_scale=16.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for window in range(3):
            before = [p.clone() for p in model.parameters()]
            x = ranks.batches(1, dtype=torch.float32)[0]
            if window == 1 and ranks.rank == 0:
                x = x / 0
            scaler.scale(model(x).square().sum()).backward()
            assert bool(accumulator.found_inf) == (window == 1)
            scaler.step(optimizer)
            scaler.update()
            is_kept = all(map(torch.equal, model.parameters(), before))
            assert is_kept == (window == 1)
            assert scaler.get_scale() == (16 if window == 0 else 8)
            ranks.assert_same(model.parameters())
            model.zero_grad()
        accumulator.detach()


@case
def a_micro_batch_that_one_rank_drops(ranks):
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        accumulator = gk.attach(
            model, backend=backend, process_group=ranks.group, nonfinite="skip_micro_batch"
        )
        scaler = gk.GradScaler(accumulator, device=ranks.device.type, init_scale=16.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = ranks.batches(2, dtype=torch.float32)
        for index, x in enumerate(inputs):
            bad = index == 0 and ranks.rank == 1
            with accumulator.no_sync() if index == 0 else contextlib.nullcontext():
                with accumulator.micro_batch(1.0):
                    scaler.scale(model(x / 0 if bad else x).square().sum()).backward()
        assert accumulator.weight.item() == 2 * ranks.world_size - 1
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 8
        ranks.assert_same(model.parameters())
        assert all(p.isfinite().all() for p in model.parameters())
        accumulator.detach()


def some_grads(kind, rank):
    """What a rank has summed: of one magnitude, of many that differ by rank too, or subnormal."""
    generator = torch.Generator().manual_seed(7 + rank)
    grad = torch.randn(1 << 14, generator=generator)
    if kind == "uneven":
        exponents = torch.randn(1 << 14, generator=torch.Generator().manual_seed(3))
        grad *= torch.exp(2 * exponents) * 1e-3 * 5.0**rank
    return grad * 1e-6 if kind == "small" else grad


def reduced(ranks, grad, **options):
    """The average of a gradient, and the accumulator that has made it."""
    param = torch.nn.Parameter(torch.zeros(grad.shape, device=ranks.device))
    accumulator = gk.attach([param], process_group=ranks.group, **options)
    (param * grad.to(ranks.device)).sum().backward()
    return param.grad, accumulator


@case
def reduction_in_16_bits_is_within_its_bound(ranks):
    count = ranks.world_size
    for dtype, unit, tiny in (
        (torch.bfloat16, 2.0**-8, 2.0**-134),
        (torch.float16, 2.0**-11, 2.0**-25),
    ):
        for backend in ranks.backends:
            for kind in ("normal", "uneven", "small"):
                terms = torch.stack([some_grads(kind, rank).double() for rank in range(count)])
                mean, accumulator = reduced(
                    ranks, some_grads(kind, ranks.rank), backend=backend, reduce_dtype=dtype
                )
                error = (mean.cpu().double() - terms.mean(0)).abs()
                magnitude = terms.abs().mean(0)
                bound = ((1 + unit) ** (count + 2) - 1) * magnitude + (count + 2) * tiny
                assert (error <= bound).all()
                assert (error > 2.0**-22 * magnitude).any()  # the reduction is in 16 bits
                ranks.assert_same([mean])
                accumulator.detach()


@case
def an_overflow_of_float16_alone_is_found_on_all(ranks):
    """In float32 nothing overflows: of one rank, and where the addition over ranks does."""
    one = torch.tensor([7e4 if ranks.rank == 0 else 0.0, 1.0])
    each = torch.tensor([6e4, 1.0])
    for backend in ranks.backends:
        for grad, is_finite in ((one, False), (each, dist.get_backend() == "nccl")):
            for dtype in (torch.float16, torch.bfloat16, None):
                mean, accumulator = reduced(ranks, grad, backend=backend, reduce_dtype=dtype)
                is_found = dtype == torch.float16 and not is_finite
                assert accumulator.found_inf.item() == is_found
                assert accumulator.grad_norm(from_statistics=True).isnan().item() == is_found
                assert mean[1].isfinite()
                ranks.assert_same([mean])
                accumulator.detach()


@case
def averaging_again_changes_nothing(ranks):
    model = ranks.model()
    accumulator = gk.attach(model, process_group=ranks.group)
    expected = mean_sum(ranks, model, 2)
    for x in ranks.batches(2):
        backward(model, x)  # each of them reduces
    assert_reduced(ranks, model, expected, roundings=4)
    before = [p.grad.clone() for p in model.parameters()]
    accumulator.reduce()
    assert all(p.grad.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    accumulator.detach()


@case
def reduction_begins_before_backward_ends(ranks):
    for nonfinite in ("skip_window", "raise"):
        for backend in ranks.backends:
            model = ranks.model(torch.float32)
            accumulator = gk.attach(
                model,
                backend=backend,
                process_group=ranks.group,
                bucket_bytes=1,
                nonfinite=nonfinite,
            )
            launched, at_input = [], []
            reducer = accumulator._attachment.reducer
            launch = reducer.launch

            def seen(first, last, launch=launch, launched=launched):
                launched.extend(range(first, last))
                launch(first, last)

            group = accumulator._attachment.groups[0]
            group.hooks.reduce_with(reducer.bucket_of, seen, nonfinite == "skip_window")
            x = ranks.batches(1, dtype=torch.float32)[0].requires_grad_()
            x.register_hook(lambda grad, n=at_input, all=launched: n.append(len(all)))
            backward(model, x)
            count = len(set(reducer.bucket_of))
            assert launched == list(range(count)) and count == len(list(model.parameters()))
            # The first layer's may come after that of the input.
            assert at_input[0] >= count - 2 if nonfinite == "skip_window" else at_input == [0]
            accumulator.detach()


@case
def hooks_of_others_see_their_own_sum(ranks):
    for backend in ranks.backends:
        model = ranks.model()
        expected = mean_sum(ranks, model, 1)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group, bucket_bytes=1)
        x = ranks.batches(1)[0]
        own = torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()))
        seen = {}
        for param, grad in zip(model.parameters(), own, strict=True):
            param.register_post_accumulate_grad_hook(
                lambda p, grad=grad, seen=seen: seen.__setitem__(id(p), p.grad.equal(grad.float()))
            )
        backward(model, x)
        assert len(seen) == len(own) and all(seen.values())
        assert_reduced(ranks, model, expected)
        accumulator.detach()


@case
def checkpoints(ranks):
    for backend in ranks.backends:
        for is_reentrant, steps in itertools.product((False, True), (None, 3)):
            model = ranks.model(torch.float32)
            stock = copy.deepcopy(model)
            accumulator = gk.attach(
                model, backend=backend, process_group=ranks.group, bucket_bytes=1, steps=steps
            )

            def loss(model, x, is_reentrant=is_reentrant):
                x = checkpoint(model[0], x, use_reentrant=is_reentrant)
                x = checkpoint(model[1:3], x, use_reentrant=is_reentrant)
                return model[3](x).square().sum()

            for x in ranks.batches(3, dtype=torch.float32):
                x.requires_grad_()
                loss(model, x).backward()
                loss(stock, x).backward()
            for param, other in zip(model.parameters(), stock.parameters(), strict=True):
                dist.all_reduce(other.grad)
                torch.testing.assert_close(
                    param.grad, other.grad / ranks.world_size, rtol=1e-5, atol=1e-5
                )
            ranks.assert_same(p.grad for p in model.parameters())
            accumulator.detach()


@case
def parameters_and_buffers_are_those_of_the_first_rank(ranks):
    torch.manual_seed(ranks.rank)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(ranks.device)
    model[0].weight = torch.nn.Parameter(torch.randn(3, 4, device=ranks.device).t())
    model[1].running_mean.fill_(float(ranks.rank))
    first = [t.clone() for t in model.state_dict().values()]
    accumulator = gk.attach(model, process_group=ranks.group)
    ranks.assert_same(model.state_dict().values())
    if ranks.rank == 0:
        assert all(map(torch.equal, model.state_dict().values(), first))
    accumulator.detach()


@case
def no_rank_reduces_when_a_model_is_dropped(ranks):
    """The garbage collector does that at another time on each rank."""
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
        backward(model, ranks.batches(1, dtype=torch.float32)[0])
        accumulator.step(torch.optim.SGD(model.parameters(), lr=0.1))
        backward(model, ranks.batches(1, dtype=torch.float32)[0])
        with accumulator.no_sync():
            backward(model, ranks.batches(1, dtype=torch.float32)[0])
        params, calls = list(model.parameters()), []
        sums = [p.grad.clone() for p in params]
        all_reduce, dist.all_reduce = dist.all_reduce, lambda *args, n=calls, **_: n.append(args)
        try:
            del model
            gc.collect()
        finally:
            dist.all_reduce = all_reduce
        assert not calls
        assert not hasattr(params[0], "main_grad")
        assert all(p.grad.equal(total) for p, total in zip(params, sums, strict=True))


@case
def different_parameters_are_refused(ranks):
    def attempt(model, **options):
        try:
            gk.attach(model, process_group=ranks.group, **options)
        except ValueError as error:
            assert all(p.grad is None and not hasattr(p, "main_grad") for p in model.parameters())
            return str(error)
        raise AssertionError("was attached")

    is_odd = ranks.rank == ranks.world_size - 1
    width = 5 if is_odd else 4
    said = attempt(torch.nn.Linear(3, width).to(ranks.device))
    assert f"rank {ranks.world_size - 1}" in said and "[5, 3]" in said and "[4, 3]" in said
    said = attempt(torch.nn.Linear(3, 4, bias=not is_odd).to(ranks.device))
    assert "bias: [4]" in said and "no more" in said or "options" in said
    said = attempt(torch.nn.Linear(3, 4).to(ranks.device), scale=0.5 if is_odd else 1.0)
    assert "options" in said


@case
def a_backward_that_raises_in_the_middle_is_told_of(ranks):
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group, bucket_bytes=1)
        x = ranks.batches(1, dtype=torch.float32)[0]
        hidden = Raise.apply(model[:3](x))
        try:
            model[3](hidden).square().sum().backward()
        except ValueError:
            pass
        try:
            backward(model, x)
        except RuntimeError as error:
            assert "did not end" in str(error)
        else:
            raise AssertionError("went on with half of a reduction")
        accumulator.detach()


@case
def one_rank_alone_detaches(ranks):
    for backend in ranks.backends:
        for count in (0, 1):
            model = ranks.model(torch.float32)
            accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
            for x in ranks.batches(count, dtype=torch.float32):
                with accumulator.no_sync():
                    backward(model, x)
            own = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            if ranks.rank == 0:
                accumulator.detach()
                for param, grad in zip(model.parameters(), own, strict=True):
                    assert grad is None if param.grad is None else param.grad.equal(grad)
            # What a rank would have sent alone meets this.
            ranks.assert_same([torch.ones(3, device=ranks.device)])
            if ranks.rank != 0:
                accumulator.detach()


@case
def a_rank_that_reduces_more_often_is_told_on_all(ranks):
    for backend in ranks.backends:
        for way in ("step", "zero_grad"):
            model = ranks.model(torch.float32)
            accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            x = ranks.batches(1, dtype=torch.float32)[0]

            def windows(count, way=way, model=model, optimizer=optimizer, x=x):
                for window in range(5):
                    for _ in range(count if window == 1 else 1):
                        backward(model, x)
                    if way == "step":
                        optimizer.step()
                    model.zero_grad()
                    ranks.finish()

            said = said_by(lambda run=windows: run(2 if ranks.rank == 1 else 1))
            assert "rank 1 those of its number 2, rank 0 those of its number 3" in said, said
            assert "no_sync() and call reduce()" in said
            accumulator.detach()


@case
def ranks_with_different_numbers_of_micro_batches(ranks):
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        params = list(model.parameters())
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
        for _ in range(2):
            sums = [oracle.WindowSum(torch.zeros(p.shape)) for p in params]
            for rank in range(ranks.world_size):
                for x in ranks.batches(rank, rank, dtype=torch.float32):
                    grads = torch.autograd.grad(model(x).square().sum(), params)
                    for total, grad in zip(sums, grads, strict=True):
                        total.add(grad, 1 / ranks.world_size)
            with accumulator.no_sync():
                for x in ranks.batches(ranks.rank, dtype=torch.float32):
                    backward(model, x)
            accumulator.reduce()
            assert_reduced(ranks, model, sums, roundings=ranks.world_size)
            model.zero_grad()
        accumulator.detach()


@case
def weights_of_some_ranks_alone_are_told_on_all(ranks):
    for backend in ranks.backends:
        for is_idle in (False, True):
            model = ranks.model(torch.float32)
            accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
            x = ranks.batches(1, dtype=torch.float32)[0]

            def window(is_idle=is_idle, accumulator=accumulator, model=model, x=x):
                if ranks.rank == 0:
                    with accumulator.micro_batch(2):
                        backward(model, x)
                elif not is_idle:
                    backward(model, x)
                accumulator.reduce()
                ranks.finish()
                backward(model, x)  # on a GPU it is found now

            said = said_by(window)
            assert "in window 1 rank 0 has micro-batches with weights, and rank 1 none" in said
            accumulator.detach()


@case
def groups_of_some_ranks_reduce_on_their_own(ranks):
    """Of 4 ranks, 3 and 1: means over an odd number, and over one."""
    parts = [range(ranks.world_size - 1), range(ranks.world_size - 1, ranks.world_size)]
    groups = [dist.new_group(list(part)) for part in parts]
    mine = int(ranks.rank in parts[1])
    assert "that this rank is in" in said_by(
        lambda: gk.attach(ranks.model(), process_group=groups[1 - mine]), TypeError
    )
    for backend in ranks.backends:
        model = ranks.model()
        expected = mean_sum(ranks, model, 1, members=parts[mine])
        accumulator = gk.attach(model, backend=backend, process_group=groups[mine])
        with accumulator.micro_batch(1.0):
            backward(model, ranks.batches(1)[0])
        assert accumulator.weight.item() == len(parts[mine])
        for param, total in zip(model.parameters(), expected, strict=True):
            total.k += 4  # of the mean: additions, and its factor
            assert total.contains(param.grad)
        accumulator.detach()


@case
def a_window_that_was_saved_goes_on(ranks):
    for backend in ranks.backends:
        model = ranks.model()
        expected = mean_sum(ranks, model, 2)
        first, last = ranks.batches(2)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
        with accumulator.no_sync():
            backward(model, first)
        saved = accumulator.state_dict()
        resumed = ranks.model()
        other = gk.attach(resumed, backend=backend, process_group=ranks.group, steps=2)
        other.load_state_dict(saved)
        other.refresh()
        backward(resumed, last)
        assert_reduced(ranks, resumed, expected)
        backward(model, last)
        pairs = zip(model.parameters(), resumed.parameters(), strict=True)
        assert all(p.grad.equal(q.grad) for p, q in pairs)
        accumulator.detach()
        other.detach()


@case
def attachments_in_another_order_are_told_on_all(ranks):
    """They have buckets of one size, so nothing else would tell. By copies they would wait."""
    models = [ranks.model(torch.float32) for _ in range(2)]
    options = {"process_group": ranks.group, "reduce_by": "all_reduce"}
    accumulators = [gk.attach(model, **options) for model in models]

    def windows():
        for _ in range(2):
            for accumulator in accumulators if ranks.rank == 0 else reversed(accumulators):
                accumulator.reduce()
                ranks.finish()
            for model in models:
                model.zero_grad()

    assert "different attachments: rank 0 those of" in said_by(windows)
    for accumulator in accumulators:
        accumulator.detach()


@case
def a_step_by_nothing_is_refused(ranks):
    """Over what it would leave, the other ranks wait."""
    for backend in ranks.backends:
        model = ranks.model(torch.float32)
        accumulator = gk.attach(model, backend=backend, process_group=ranks.group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        backward(model, ranks.batches(1, dtype=torch.float32)[0])
        optimizer.step()
        optimizer.zero_grad()
        assert "not reduced over the ranks" in said_by(optimizer.step)
        accumulator.step(optimizer)
        accumulator.detach()


@case
def no_bad_argument_changes_anything(ranks):
    model = ranks.model()
    doubles = torch.nn.ModuleList(
        [torch.nn.Linear(2, 2, dtype=torch.float64), torch.nn.Linear(2, 2)]
    ).to(ranks.device)
    for target, options, kind, match in (
        (model, {"process_group": 3}, TypeError, "must be a torch.distributed.ProcessGroup"),
        (model, {"steps": 2}, ValueError, "pass process_group too"),
        (model, {"process_group": ranks.group, "steps": 0}, ValueError, "positive int"),
        (model, {"process_group": ranks.group, "reduce_dtype": int}, ValueError, "reduce_dtype"),
        (model, {"process_group": ranks.group, "bucket_bytes": 0}, ValueError, "bucket_bytes"),
        (doubles, {"process_group": ranks.group}, ValueError, "on one device"),
    ):
        try:
            gk.attach(target, **options)
        except kind as error:
            assert match in str(error), error
        else:
            raise AssertionError(f"took {options}")
        assert not hasattr(next(target.parameters()), "main_grad")
    accumulator = gk.attach(model, process_group=ranks.group)
    x = ranks.batches(1)[0]
    try:
        model(x).float().square().sum().backward(create_graph=True)
    except RuntimeError as error:
        assert "create_graph" in str(error)
    else:
        raise AssertionError("reduced before autograd added")
    accumulator.detach()


@case
def a_rank_that_lags_is_named(ranks):
    if ranks.device.type != "cpu":
        return  # a lost_rank.py of its own, as NCCL ends the process
    group = dist.new_group(timeout=timedelta(seconds=2))
    stalls.LISTENS = 1.0
    model = ranks.model(torch.float32)
    accumulator = gk.attach(model, process_group=group, bucket_bytes=1)
    x = ranks.batches(1, dtype=torch.float32)[0]
    if ranks.rank == 1:
        time.sleep(5)
        return
    try:
        backward(model, x)
    except RuntimeError as error:
        assert "could not reduce bucket 0 of 6" in str(error), error
        assert "rank 1 did not come as far" in str(error), error
    else:
        raise AssertionError("reduced without rank 1")
    assert accumulator is not None


@case
def a_watch_names_the_rank_that_is_missing(ranks):
    assert stalls.timeout_of(ranks.group, ranks.device) == 60
    missing = ranks.world_size - 1
    dist.barrier()  # ranks that launch within half of that time know of each other
    watch = stalls.Watch(ranks.group, 2.0)
    if ranks.rank != missing:
        watch.add(1, "bucket 3 of 6", SimpleNamespace(is_completed=lambda: False))
        end = time.monotonic() + 20
        while watch.failure is None and time.monotonic() < end:
            time.sleep(0.01)
        said = f"for bucket 3 of 6 in reduction 1: rank {missing} did not come as far, or is gone"
        assert said in str(watch.failure), watch.failure
    dist.barrier()
    watch.failure = watch.failure or "told by another rank"
    model = ranks.model()
    accumulator = gk.attach(model, process_group=ranks.group)
    accumulator._attachment.reducer._watch = watch
    try:
        backward(model, ranks.batches(1)[0])
    except RuntimeError as error:
        assert str(error) == watch.failure
    else:
        raise AssertionError("went on after the failure")
    accumulator.detach()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(rank, world_size, folder, way, port):
    """Runs all cases as one rank."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cpu")
    if way != "cpu":
        device = torch.device("cuda", rank if way == "cuda" else 0)
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKENDS[way],
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    ranks = Ranks(rank, world_size, device, folder)
    with (folder / str(rank)).open("w", buffering=1) as results:
        for name, function in CASES["__main__"].items():
            failure = None
            began = time.monotonic()
            try:
                function(ranks)
            except BaseException:
                failure = traceback.format_exc()
            took = round(time.monotonic() - began, 2)
            results.write(json.dumps({"case": name, "failure": failure, "seconds": took}) + "\n")
            if failure is not None:
                break  # the others may wait for this rank


def main():
    folder, world_size, way = Path(sys.argv[1]), int(sys.argv[2]), (sys.argv + ["cpu"])[3]
    if len(sys.argv) > 4:
        run(int(sys.argv[5]), world_size, folder, way, int(sys.argv[4]))
        os._exit(0)
    port = free_port()
    if way != "cpu":
        command = [sys.executable, sys.argv[0], str(folder), str(world_size), way, str(port)]
        children = [subprocess.Popen([*command, str(rank)]) for rank in range(world_size)]
        sys.exit(max(child.wait() for child in children))
    torch.set_num_threads(1)  # the threads of OpenMP do not outlive a fork
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            run(rank, world_size, folder, way, port)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main()
