"""Windows of weighted micro-batches, what is not finite in them, and how they close."""

import copy
import math
import pickle

import pytest
import torch
from hook_cases import Raise, arrive, backward, batch, every_hook, mlp, parameter
from torch import nn
from torch.nn import functional as F

import gradacc_kernels as gk

NAN, INF = float("nan"), float("inf")
WIDTH, CLASSES = 12, 7


def classifier(device, dtype):
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, CLASSES))
    return model.to(device, dtype)


def lengths(kind, k):
    """Tokens of each micro-batch: all equal, or a few long ones among many short ones."""
    if kind == "equal":
        return [6] * k
    return [int(x) for x in (torch.rand(k).pow(4) * 60).long() + 1]


def tokens(device, dtype, counts):
    x = torch.randn(sum(counts), WIDTH, device=device).to(dtype)
    y = torch.randint(CLASSES, (sum(counts),), device=device)
    return list(zip(x.split(counts), y.split(counts), strict=True))


def mean_loss(model, x, y):
    logits = model(x)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y)


def relative_error(model, expected):
    ours = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    theirs = torch.cat([grad.double().flatten() for grad in expected])
    return ((ours - theirs).norm() / theirs.norm()).item()


def one_big_batch(model, data, autocast):
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        loss = mean_loss(model, x, y)
    return torch.autograd.grad(loss, list(model.parameters()))


CASES = {
    "float64": (torch.float64, False, 1e-13),
    "float32": (torch.float32, False, 2e-6),
    "autocast": (torch.float32, True, 6e-3),
}


@every_hook
@pytest.mark.parametrize("k", [4, 16, 64])
@pytest.mark.parametrize("kind", ["equal", "skewed"])
@pytest.mark.parametrize("case", CASES)
def test_a_weighted_window_is_the_one_big_batch(hook, k, kind, case):
    device, backend = hook
    on_device = k == 16
    dtype, autocast, bound = CASES[case]
    backend = "auto" if dtype == torch.float64 else backend
    model = classifier(device, dtype)
    counts = lengths(kind, k)
    data = tokens(device, dtype, counts)
    truth = one_big_batch(copy.deepcopy(model).double(), [(x.double(), y) for x, y in data], False)
    control = copy.deepcopy(model)
    accumulator = gk.attach(model, backend=backend)
    for (x, y), n in zip(data, counts, strict=True):
        weight = torch.tensor(n, device=device) if on_device else n
        with (
            accumulator.micro_batch(weight),
            torch.autocast(device, torch.bfloat16, enabled=autocast),
        ):
            mean_loss(model, x, y).backward()
    assert accumulator.weight.item() == sum(counts)
    norm = accumulator.grad_norm()
    accumulator.average_()
    assert relative_error(model, truth) <= bound
    torch.testing.assert_close(accumulator.grad_norm(), norm, rtol=1e-5, atol=0)
    accumulator.average_()
    assert relative_error(model, truth) <= bound

    gk.attach(control, backend=backend, scale=1 / k)  # the control: the mean of means
    for x, y in data:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            mean_loss(control, x, y).backward()
    if kind == "skewed":
        assert relative_error(control, truth) > max(bound, 1e-2)


@every_hook
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
def test_windows_of_different_lengths_and_a_partial_last_one(hook, queueing, fuse):
    device, backend = hook
    model = classifier(device, torch.float32)
    accumulator = gk.attach(model, backend=backend, fuse=fuse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for counts in ([3, 9], [5, 1, 0, 7, 2], [4]):
        data = tokens(device, torch.float32, counts)
        expected = one_big_batch(model, data, False)
        for (x, y), n in zip(data, counts, strict=True):
            with accumulator.micro_batch(n):
                mean_loss(model, x, y).backward()  # of no tokens: NaN
        assert accumulator.weight.item() == sum(counts)
        accumulator.step(optimizer)
        assert relative_error(model, expected) <= 2e-6
        optimizer.zero_grad()
    assert accumulator.counters["windows"].item() == 3
    assert accumulator.counters["tokens"].item() == 31


@every_hook
@pytest.mark.parametrize("zero", [0, torch.zeros(())], ids=["number", "tensor"])
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
def test_a_micro_batch_of_weight_zero_adds_nothing(hook, queueing, zero, fuse):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend, fuse=fuse)
    zero = zero.to(device) if isinstance(zero, torch.Tensor) else zero
    bad = batch(device) * NAN
    with accumulator.micro_batch(zero):
        backward(model, bad)
    assert all(p.grad.eq(0).all() for p in model.parameters())  # the first one stores zeros
    with accumulator.micro_batch(3):
        backward(model, batch(device))
    before = [p.grad.clone() for p in model.parameters()]
    with accumulator.micro_batch(zero):
        backward(model, bad)
    for param, grad in zip(model.parameters(), before, strict=True):
        assert param.grad.view(torch.int32).equal(grad.view(torch.int32))
    assert accumulator.weight.item() == 3 and accumulator.found_inf.item() == 0


@every_hook
def test_a_window_without_tokens_steps_nothing(hook):
    device, backend = hook
    model = mlp(device, torch.float32)
    accumulator = gk.attach(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    with accumulator.micro_batch(0):
        backward(model, batch(device, torch.float32) * NAN)
    accumulator.step(optimizer)
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    assert accumulator.counters["skipped_windows"].item() == 1


def test_a_sum_that_is_not_divided_is_not_stepped():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with accumulator.micro_batch(3):
        backward(model, batch(dtype=torch.float32))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="weighted sum .* Accumulator.step"):
        optimizer.step()
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    other = mlp(dtype=torch.float32)
    backward(other, batch(dtype=torch.float32))
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    accumulator.average_()
    optimizer.step()


def test_wrong_micro_batches():
    model = mlp()
    accumulator = gk.attach(model)
    for weight, error in ((-1, ValueError), (NAN, ValueError), ("3", TypeError)):
        with pytest.raises(error, match="micro_batch: weight must be"):
            with accumulator.micro_batch(weight):
                raise AssertionError
    with pytest.raises(ValueError, match="a tensor of one"):
        with accumulator.micro_batch(torch.ones(2)):
            raise AssertionError
    with accumulator.micro_batch(2):
        backward(model, batch())
        with pytest.raises(RuntimeError, match="inside of another"):
            with accumulator.micro_batch(2):
                raise AssertionError
    with pytest.raises(RuntimeError, match="a weight or none, got one without"):
        with accumulator.micro_batch():
            raise AssertionError
    backward(model, batch())
    with pytest.raises(RuntimeError, match="1 backwards of this window were outside"):
        accumulator.average_()
    model.zero_grad()
    with accumulator.micro_batch(2):
        backward(model, batch())
    accumulator.average_()
    with pytest.raises(RuntimeError, match="averaged already"):
        with accumulator.micro_batch(2):
            raise AssertionError
    assert accumulator.inv_scale.item() == 1


def test_an_exception_inside_counts_no_weight():
    model = mlp()
    accumulator = gk.attach(model)
    with pytest.raises(KeyError):
        with accumulator.micro_batch(5):
            raise KeyError
    assert accumulator.weight.item() == 0 and accumulator.inv_scale.item() == 1


@every_hook
def test_a_weighted_window_is_saved_and_resumed(hook):
    device, backend = hook
    model, twin = mlp(device), mlp(device)
    twin.load_state_dict(model.state_dict())
    whole, other = gk.attach(model, backend=backend), gk.attach(twin, backend=backend)
    inputs = [batch(device, rows=n) for n in (2, 5, 3)]
    for x in inputs[:2]:
        with whole.micro_batch(len(x)):
            backward(model, x)
    other.load_state_dict(whole.state_dict())
    for accumulator, net in ((whole, model), (other, twin)):
        with accumulator.micro_batch(3):
            backward(net, inputs[2])
        assert accumulator.weight.item() == 10
        accumulator.average_()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad.equal(b.grad)


# Clipping, against torch's


@every_hook
@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
def test_clipping_by_norm(hook, max_norm, norm_type):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    for _ in range(3):
        backward(model, batch(device))
    stock = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    for ours, theirs in zip(model.parameters(), stock, strict=True):
        theirs.grad = ours.grad.clone()
    norm = accumulator.clip_grad_norm_(max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(stock, max_norm, norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(model.parameters(), stock, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)
        assert ours.grad.data_ptr() == ours.main_grad.data_ptr()


@every_hook
def test_clipping_what_is_not_finite(hook):
    device, backend = hook
    param = parameter([1.0, 2.0], device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, torch.tensor([INF, 1.0], device=device))
    with pytest.raises(RuntimeError, match="not finite"):
        accumulator.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert param.grad.tolist() == [INF, 1.0]
    assert accumulator.clip_grad_norm_(1.0).isnan()


@every_hook
def test_clipping_by_value(hook):
    device, backend = hook
    param = parameter([1.0, 2.0], device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, torch.tensor([3.0, -0.5], device=device))
    accumulator.clip_grad_value_(1.0)
    assert param.grad.tolist() == [1.0, -0.5]


@every_hook
def test_norms_of_parameters_and_groups(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    with accumulator.micro_batch(4):
        backward(model, batch(device))
    params = dict(model.named_parameters())
    for from_statistics in (False, True):
        norms = accumulator.grad_norms(from_statistics=from_statistics)
        assert norms.keys() == params.keys()
        for name, norm in norms.items():
            expected = params[name].grad.double().norm().item() / 4
            assert norm.item() == pytest.approx(expected, rel=1e-6)
        group = list(model[3].parameters())
        norm = accumulator.grad_norm(group, from_statistics=from_statistics).item()
        assert norm == pytest.approx(math.hypot(*(norms[f"3.{n}"] for n in ("weight", "bias"))))


@every_hook
def test_a_fused_step_that_writes_gradients_makes_statistics_stale(hook):
    device, backend = hook
    model = mlp(device, torch.float32)
    accumulator = gk.attach(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with accumulator.micro_batch(4):
        backward(model, batch(device, torch.float32))
    norm = accumulator.step(optimizer)
    now = accumulator.grad_norm(from_statistics=True)
    torch.testing.assert_close(now, norm, rtol=1e-5, atol=0)


# The close

OPTIMIZERS = {
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
}


@every_hook
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [None, 0.05, 1e9])
@pytest.mark.parametrize("weighted", [False, True])
def test_step_is_average_clip_and_step(hook, make, max_norm, weighted):
    device, backend = hook
    model = mlp(device, torch.float32)
    stock = copy.deepcopy(model)
    accumulator = gk.attach(model, backend=backend)
    ours, theirs = (OPTIMIZERS[make](m.parameters()) for m in (model, stock))
    for _ in range(3):
        inputs = [batch(device, torch.float32, rows=n) for n in (2, 6)]
        for x in inputs:
            with accumulator.micro_batch(len(x) if weighted else None):
                backward(model, x)
            (stock(x).square().sum() * (len(x) / 8 if weighted else 1)).backward()
        norm = accumulator.step(ours, max_norm=max_norm)
        bound = INF if max_norm is None else max_norm
        expected = nn.utils.clip_grad_norm_(stock.parameters(), bound)
        theirs.step()
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        # Adam divides by the root of small squares: rounding is magnified, not made.
        for a, b in zip(model.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
    assert not hasattr(ours, "found_inf") and not hasattr(ours, "grad_scale")


@every_hook
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_window_that_is_not_finite_is_skipped(hook, make):
    device, backend = hook
    model = mlp(device, torch.float32)
    accumulator = gk.attach(model, backend=backend)
    optimizer = OPTIMIZERS[make](model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    x = batch(device, torch.float32)
    for value in (x, x * INF):
        backward(model, value)
    accumulator.step(optimizer, max_norm=1.0)
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    backward(model, x)
    accumulator.step(optimizer, max_norm=1.0)
    assert not any(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    counters = accumulator.counters
    assert counters["windows"].item() == 2 and counters["skipped_windows"].item() == 1


def test_parameters_that_are_not_covered_are_stepped_as_they_are():
    model, other = mlp(dtype=torch.float32), parameter([1.0], torch.float32)
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=1.0, fused=True)
    with accumulator.micro_batch(4):
        backward(model, batch(dtype=torch.float32))
    other.grad = torch.tensor([0.5])
    accumulator.step(optimizer)
    assert other.item() == 0.5
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        accumulator.step(torch.optim.SGD([other], lr=1.0))


def test_two_optimizers_over_one_window():
    model = mlp(dtype=torch.float32)
    expected = copy.deepcopy(model)
    accumulator = gk.attach(model)
    x = batch(dtype=torch.float32)
    with accumulator.micro_batch(4):
        backward(model, x)
    backward(expected, x)
    for net, step in ((model, accumulator.step), (expected, lambda optimizer: optimizer.step())):
        for part in (net[0], net[2], net[3]):
            step(torch.optim.SGD(part.parameters(), lr=0.1, fused=part is net[2]))
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# What is not finite


@every_hook
def test_raise_names_parameters_and_micro_batch(hook):
    device, backend = hook
    model = mlp(device, torch.float32)
    accumulator = gk.attach(model, backend=backend, nonfinite="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for number in range(4):
            backward(model, batch(device, torch.float32))
            if number == 2:
                arrive(model[3].bias, torch.tensor([NAN] * 8, device=device))
        with pytest.raises(FloatingPointError, match="micro-batch 4 of 5 .* to 3.bias$"):
            accumulator.step(optimizer)
        model.zero_grad()
    backward(model, batch(device, torch.float32))
    accumulator.step(optimizer)


@every_hook
def test_ignore_steps(hook):
    device, backend = hook
    param = parameter([1.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend, nonfinite="ignore")
    arrive(param, NAN)
    accumulator.step(torch.optim.SGD([param], lr=0.1))
    assert param.isnan()


@every_hook
@pytest.mark.parametrize("explicit", [False, True], ids=["backward", "micro_batch"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_micro_batch_is_dropped_whole(hook, explicit, bad):
    device, backend = hook
    model = mlp(device)
    expected = copy.deepcopy(model)
    accumulator = gk.attach(model, backend=backend, nonfinite="skip_micro_batch")
    gk.attach(expected, backend=backend)
    inputs = [batch(device) for _ in range(4)]

    def micro_batch(x):
        if not explicit:
            return backward(model, x)
        with accumulator.micro_batch(len(x)):
            backward(model, x)

    for number, x in enumerate(inputs):
        micro_batch(x)
        if explicit:
            backward(expected, x) if not number else None
        before = [p.grad.clone() for p in model.parameters()]
        x = x.clone()
        x[0, 0] = bad
        micro_batch(x)
        for param, grad in zip(model.parameters(), before, strict=True):
            assert param.grad.view(torch.int32).equal(grad.view(torch.int32))
    assert accumulator.counters["skipped_micro_batches"].item() == 4
    if explicit:
        assert accumulator.weight.item() == 16
    else:
        for x in inputs:
            backward(expected, x)
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert ours.grad.equal(theirs.grad)
    assert accumulator.found_inf.item() == 0


@every_hook
def test_a_bad_first_micro_batch_leaves_zeros(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend, nonfinite="skip_micro_batch")
    backward(model, batch(device) * NAN)
    assert all(p.grad.eq(0).all() for p in model.parameters())
    model.zero_grad()
    backward(model, batch(device))
    assert accumulator.grad_norm().item() > 0


@every_hook
def test_a_backward_that_raises_leaves_nothing_held(hook):
    device, backend = hook
    params = [parameter([1.0], device=device) for _ in range(2)]
    accumulator = gk.attach(params, backend=backend, nonfinite="skip_micro_batch")

    for explicit in (False, True):
        with pytest.raises(ValueError):
            if explicit:
                with accumulator.micro_batch():
                    (params[0] * 2).sum().backward()
                    raise ValueError
            (Raise.apply(params[0]) + params[1] * 2).sum().backward()
        assert all(p.grad is None for p in params)
    sum(p.sum() for p in params).backward()
    assert [p.grad.item() for p in params] == [1.0, 1.0]


@every_hook
def test_reentrant_checkpoints_are_one_micro_batch(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend, nonfinite="skip_micro_batch")

    def run(x):
        x = x.requires_grad_()
        with accumulator.micro_batch():
            for part in (model[:2], model):
                y = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=True)
                y.float().square().sum().backward()

    run(batch(device))
    before = [p.grad.clone() for p in model.parameters()]
    bad = batch(device)
    bad[0, 0] = NAN
    run(bad)
    assert all(p.grad.equal(b) for p, b in zip(model.parameters(), before, strict=True))
    assert accumulator.counters["skipped_micro_batches"].item() == 1


def test_limits_of_skipping_micro_batches():
    with pytest.raises(ValueError, match="leave fuse out"):
        gk.attach(mlp(), nonfinite="skip_micro_batch", fuse=True)
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        gk.attach(mlp(), nonfinite="skip")
    model = mlp()
    gk.attach(model, nonfinite="skip_micro_batch")
    model[0].weight.register_post_accumulate_grad_hook(lambda param: None)
    with pytest.raises(RuntimeError, match="remove that hook"):
        backward(model, batch())
    several = mlp()
    several[0].double()
    accumulator = gk.attach(several, nonfinite="skip_micro_batch")
    with pytest.raises(RuntimeError, match="with accumulator.micro_batch"):
        arrive(several[0].bias, 1.0)
    with accumulator.micro_batch():
        arrive(several[0].bias, 1.0)
        arrive(several[3].bias, NAN)
    assert several[0].bias.grad.eq(0).all() and several[3].bias.grad.eq(0).all()


@every_hook
def test_modes_survive_a_cast_and_a_copy(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend, nonfinite="skip_micro_batch")
    with accumulator.micro_batch(4):
        backward(model, batch(device))
    model.half()
    with accumulator.micro_batch(4):
        backward(model, batch(device).half())
    with accumulator.micro_batch(4):
        backward(model, batch(device).half() * NAN)
    assert accumulator.weight.item() == 8 and accumulator.found_inf.item() == 0
    pickle.loads(pickle.dumps(model))
    sums = model[0].bias.grad.clone()
    accumulator.detach()
    assert model[0].bias.grad.equal((sums * 0.125).half())


# On a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


def cuda_window(accumulator, model, optimizer, inputs, weights, scaler):
    for x, weight in zip(inputs, weights, strict=True):
        with accumulator.micro_batch(weight):
            loss = model(x).float().square().sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
    norm = accumulator.step(optimizer, max_norm=0.1, scaler=scaler)
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad()
    return norm


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("nonfinite", ["skip_window", "skip_micro_batch"])
def test_nothing_waits_from_the_first_micro_batch_to_the_step(scaled, nonfinite):
    model = mlp("cuda", torch.float32)
    accumulator = gk.attach(model, nonfinite=nonfinite)
    scaler = gk.GradScaler(accumulator) if scaled else None
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = [batch("cuda", torch.float32) for _ in range(3)]
    weights = [4, torch.tensor(4.0, device="cuda"), 0]
    cuda_window(accumulator, model, optimizer, inputs, weights, scaler)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            cuda_window(accumulator, model, optimizer, inputs, weights, scaler)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("nonfinite", ["skip_window", "skip_micro_batch"])
def test_a_whole_window_with_its_step_is_captured(nonfinite):
    models = [mlp("cuda", torch.float32)]
    models.append(copy.deepcopy(models[0]))
    accumulators = [gk.attach(model, nonfinite=nonfinite) for model in models]
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=0.01, fused=True, capturable=True) for m in models
    ]
    inputs = [batch("cuda", torch.float32) for _ in range(3)]
    weights = [torch.full((), 4.0, device="cuda") for _ in range(3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for parts in zip(accumulators, models, optimizers, strict=True):
                cuda_window(*parts, inputs, weights, None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda_window(accumulators[0], models[0], optimizers[0], inputs, weights, None)
    for counts in ((1, 2, 3), (5, 0, 7), (4, 4, 4)):
        for x, weight, count in zip(inputs, weights, counts, strict=True):
            x.copy_(batch("cuda", torch.float32) * (float("nan") if count == 0 else 1))
            weight.fill_(count)
        graph.replay()
        cuda_window(accumulators[1], models[1], optimizers[1], inputs, weights, None)
        for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
            assert ours.equal(theirs)
