"""What Accumulator.stats tells of a window, before and after it is closed."""

import copy
import math

import oracle
import pytest
import torch
from hook_cases import (
    arrive,
    backward,
    batch,
    every_hook,
    micro_gradients,
    mlp,
    needs_extension,
    parameter,
)
from test_ranks import assert_passed, names, runs

import gradacc_kernels as gk

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.xdist_group("ranks")


def sums_of(model, inputs, weights=None, scale=1.0):
    """The fp64 sum of each parameter's window, with its bound."""
    weights = [1.0] * len(inputs) if weights is None else weights
    sums = {n: oracle.WindowSum(torch.zeros(p.shape)) for n, p in model.named_parameters()}
    for grads, weight in zip(micro_gradients(model, inputs), weights, strict=True):
        for total, grad in zip(sums.values(), grads, strict=True):
            total.add(grad, weight * scale)
    return sums


def assert_norms(stats, sums, divisor=1.0):
    """| ||a|| - ||b|| | <= ||a - b||, and n roundings of a float32 sum of squares, and of the root.

    Elements are off by the rounding of their sums, and of one division.
    """
    assert stats.norms.keys() == sums.keys()
    errors, exact, numel = [], [], 0
    for name, total in sums.items():
        true = (total.total / divisor).norm().item()
        off = oracle.bound(total.k + 2, total.magnitude / divisor).norm().item()
        n = total.total.numel()
        assert abs(stats.norms[name] - true) <= off + (n + 2) * oracle.UNIT * (true + off)
        errors.append(off), exact.append(true)
        numel = max(numel, n)
    true, off = math.hypot(*exact), math.hypot(*errors)
    assert abs(stats.norm - true) <= off + (numel + 2) * oracle.UNIT * (true + off)


def run(accumulator, model, inputs, weights):
    for x, weight in zip(inputs, weights, strict=True):
        with accumulator.micro_batch(weight):
            backward(model, x)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


@every_hook
@pytest.mark.parametrize("weights", [(None, None, None), (3, 0, 5)], ids=["plain", "weighted"])
@pytest.mark.parametrize("from_statistics", [False, True])
def test_norms_before_and_after_a_close(hook, queueing, weights, from_statistics):
    device, backend = hook
    model = mlp(device)
    stock = copy.deepcopy(model)
    accumulator = gk.attach(model, backend=backend)
    optimizer = sgd(model)
    is_weighted = weights[0] is not None
    divisor, tokens = (8.0, 8.0) if is_weighted else (1.0, None)

    for number, close in enumerate(("step", "average_", "step")):
        inputs = [batch(device) for _ in weights]
        sums = sums_of(stock, inputs, weights if is_weighted else None)
        run(accumulator, model, inputs, weights)
        stats = accumulator.stats(from_statistics=from_statistics)
        assert_norms(stats, sums, divisor)
        assert not stats.is_closed and stats.micro_batches == 3 and stats.tokens == tokens
        assert stats.windows == number and not stats.found_inf and stats.nonfinite == ()
        if close == "step":
            accumulator.step(optimizer, max_norm=1e-3)  # norms are those before it clips
        else:
            accumulator.average_()
            averaged = accumulator.stats(from_statistics=from_statistics)
            assert_norms(averaged, sums, divisor)
            assert not averaged.is_closed and averaged.tokens == tokens
            optimizer.step()
        stats = accumulator.stats(from_statistics=from_statistics)
        assert_norms(stats, sums, divisor)
        assert stats.is_closed and stats.micro_batches == 3 and stats.tokens == tokens
        assert stats.windows == number + 1 and stats.skipped_windows == 0
        assert stats.nbytes == accumulator.nbytes and stats.scale == stats.loss_scale == 1
        optimizer.zero_grad()
        stats = accumulator.stats()
        assert not stats.is_closed and stats.norm == 0 and stats.norms == {}
        assert stats.micro_batches == 0 and stats.tokens is None


def test_a_gradient_that_follows_a_step_begins_the_next_window():
    model = mlp()
    accumulator = gk.attach(model)
    for optimizer in (sgd(model), gk.MasterParams(model.parameters(), torch.optim.SGD, lr=0.0)):
        for _ in range(2):
            backward(model, batch())
        optimizer.step()
        assert accumulator.stats().is_closed and accumulator.stats().micro_batches == 2
        backward(model, batch())  # without zero_grad(): added to what is there
        stats = accumulator.stats()
        assert not stats.is_closed and stats.micro_batches == 1
        assert stats.norm == pytest.approx(accumulator.grad_norm().item(), rel=1e-6)
        model.zero_grad()
    assert accumulator.stats().windows == 2


@every_hook
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("weight", [None, 2])
def test_what_is_not_finite_is_named(hook, bad, weight):
    device, backend = hook
    params = [parameter(torch.zeros(n), torch.float32, device) for n in (5, 3001, 7)]
    accumulator = gk.attach(params, backend=backend)
    optimizer = torch.optim.SGD(params, lr=1.0)
    grad = torch.ones(3001)
    grad[1024] = bad
    with accumulator.micro_batch(weight):
        for param, value in zip(params, (torch.tensor(2.0), grad.to(device), 1.0), strict=True):
            arrive(param, value)
    for _ in range(2):
        stats = accumulator.stats()
        assert stats.found_inf and stats.nonfinite == ("1",) and math.isnan(stats.norm)
        assert list(stats.largest(2)) == ["1", "0"]
        assert stats.largest(2)["0"] == pytest.approx(2 * math.sqrt(5), rel=1e-6)
        assert list(stats.largest(9)) == ["1", "0", "2"] and stats.largest(0) == {}
        if not stats.is_closed:
            accumulator.step(optimizer)
    assert stats.is_closed and stats.skipped_windows == 1 and params[0].eq(0).all()


def test_a_large_finite_gradient_is_no_overflow():
    param = parameter([2e19, 1.0])
    accumulator = gk.attach([param])
    arrive(param, torch.tensor([2e19, 1.0]))
    stats = accumulator.stats()
    assert stats.norm == INF and not stats.found_inf and stats.nonfinite == ()


@every_hook
def test_with_a_loss_scale(hook):
    device, backend = hook
    model = mlp(device, torch.float32)
    stock = copy.deepcopy(model)
    accumulator = gk.attach(model, backend=backend, scale=0.5)
    scaler = gk.GradScaler(accumulator, init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for x, is_bad in ((batch(device, torch.float32), False), (torch.full((1, 16), INF), True)):
        sums = None if is_bad else sums_of(stock, [x], scale=0.5)
        scaler.scale(model(x.to(device)).float().square().sum()).backward()
        if not is_bad:
            assert_norms(accumulator.stats(), sums)
        accumulator.step(optimizer, scaler=scaler)
        stats = accumulator.stats()
        assert stats.loss_scale == 1024 and stats.scale == 0.5 and stats.is_closed
        assert stats.found_inf == is_bad and stats.skipped_windows == is_bad
        if not is_bad:
            assert_norms(stats, sums)
        scaler.update()
        optimizer.zero_grad()
    assert accumulator.stats().loss_scale == 512 and accumulator.stats().windows == 2


@every_hook
def test_micro_batches_that_were_dropped(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend, nonfinite="skip_micro_batch")
    x = batch(device)
    run(accumulator, model, [x, x * NAN, x], [2, 3, 4])
    stats = accumulator.stats()
    assert stats.skipped_micro_batches == 1 and stats.tokens == 6 and not stats.found_inf


def test_parameters_of_two_dtypes_are_packed_together(monkeypatch):
    model = torch.nn.ModuleList([mlp(dtype=torch.float64), mlp(dtype=torch.bfloat16)])
    accumulator = gk.attach(model)
    assert len(accumulator._attachment.groups) == 2
    for part, dtype in zip(model, (torch.float64, torch.bfloat16), strict=True):
        backward(part, batch(dtype=dtype))
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__", "cpu"):
        method = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, method=method):
            reads.append((name, self.numel()))
            return method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    stats = accumulator.stats()
    monkeypatch.undo()
    assert reads == [("tolist", 12 + 3)]
    for name, param in model.named_parameters():
        true = param.grad.double().norm().item()
        bound = 1e-12 if param.dtype == torch.float64 else param.numel() * oracle.UNIT
        assert abs(stats.norms[name] - true) <= bound * true


def test_optimizers_that_step_one_after_the_other_end_one_window():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.AdamW([*model[2].parameters(), *model[3].parameters()], lr=0.1)
    for number in (1, 2, 3):
        for _ in range(2):
            backward(model, batch(dtype=torch.float32))
        before = accumulator.stats()
        if number == 2:
            first.step(), second.step()
        else:
            accumulator.step(first), accumulator.step(second)
        stats = accumulator.stats()
        assert stats.windows == number and stats.micro_batches == 2
        assert stats.norms == pytest.approx(before.norms, rel=1e-6)
        model.zero_grad()


def test_steps_without_gradients_of_ours_end_nothing():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = sgd(model)
    optimizer.step()
    for param in model.parameters():  # as torch.distributed.checkpoint does
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert accumulator.stats().windows == 0


def test_there_are_no_stats_without_an_average():
    model = mlp()
    accumulator = gk.attach(model)
    with accumulator.micro_batch(3):
        backward(model, batch())
        with pytest.raises(RuntimeError, match="inside of micro_batch"):
            accumulator.stats()
    accumulator.stats()
    accumulator.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        accumulator.stats()


@needs_extension
@pytest.mark.parametrize("name", names("stats_cases.py"))
@runs("stats_cases.py", (2, "cpu"), (2, "cuda"))
def test_ranks(ranks, name):
    assert_passed(ranks, name)
