"""Norms and overflow verdicts where fused modules wrote the main gradients."""

import pytest
import torch
from fused_cases import embedding, every_device, language_model, linear, rows, tokens

import gradacc_kernels as gk


def true_norm(model):
    flat = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(flat).norm().item() if flat else 0.0


def check(accumulator, model):
    expected = pytest.approx(true_norm(model), rel=1e-5)
    for from_statistics in (False, True):
        assert accumulator.grad_norm(from_statistics=from_statistics).item() == expected


@every_device
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_all_along_a_window(device, queueing, tied, dtype):
    model = language_model(device, dtype, tied=tied, vocabulary=300)  # several slots
    accumulator = gk.attach(model, fuse=True)
    check(accumulator, model)
    for set_to_none in (True, False):
        for _ in range(3):
            model(tokens(device, 2, 5, vocabulary=300)).float().square().sum().backward()
            check(accumulator, model)
        model.zero_grad(set_to_none=set_to_none)
        check(accumulator, model)


@every_device
def test_norms_of_lookups_and_products_in_turn(device):
    """A lookup renews the slots of its rows alone, so that those before it must have been right."""
    model = language_model(device, tied=True, vocabulary=300)
    accumulator = gk.attach(model, fuse=True)

    def look_up():
        model.embedding(tokens(device, 7, vocabulary=300)).square().sum().backward()

    def multiply():
        model.head(rows(device)).square().sum().backward()

    def edit():
        model.head.weight.grad.mul_(2)

    def assign():
        model.head.weight.grad = torch.randn_like(model.head.weight)

    def add_by_the_hook():
        model.head.weight.square().sum().backward()

    first = (look_up, multiply, add_by_the_hook)
    for steps in ((one, other) for one in first for other in (*first, edit, assign)):
        model.zero_grad()
        for step in (*steps, look_up, look_up):
            step()
            check(accumulator, model)


@every_device
def test_the_statistics_of_lookups_are_read(device):
    """The control: an edit that nothing sees is missed, so the slots were believed."""
    model = embedding(device, vocabulary=300)
    accumulator = gk.attach(model, fuse=True)
    for _ in range(2):
        model(tokens(device, 7)).square().sum().backward()
    before = true_norm(model)
    model[0].weight.grad.data.mul_(3)
    stale = accumulator.grad_norm(from_statistics=True).item()
    assert stale == pytest.approx(before, rel=1e-5)
    assert accumulator.grad_norm().item() == pytest.approx(3 * before, rel=1e-5)
    accumulator.invalidate()
    check(accumulator, model)
    model(tokens(device, 7)).square().sum().backward()  # with slots that are stale
    check(accumulator, model)


@every_device
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_found_inf(device, kind, bad, dtype):
    is_linear = kind == "linear"
    model = linear(device, dtype, bias=False) if is_linear else embedding(device, dtype)
    accumulator = gk.attach(model, fuse=True)
    x = rows(device, dtype) if is_linear else tokens(device, 4)
    for opens_window in (True, False):
        y = model(x)
        if opens_window:
            y.sum().backward()
            assert accumulator.found_inf.item() == 0
            continue
        dy = torch.ones_like(y)
        dy[2, 3] = bad
        y.backward(dy)
    assert accumulator.found_inf.item() == 1
    for from_statistics in (False, True):
        assert accumulator.grad_norm(from_statistics=from_statistics).isnan()
    model.zero_grad()
    model(x).sum().backward()
    assert accumulator.found_inf.item() == 0
    check(accumulator, model)


@every_device
def test_a_sum_that_overflows_16_bits_is_no_overflow(device):
    """The control: through a float16 weight gradient it is one."""
    found = {}
    for fuse in (True, False):
        model = linear(device, torch.float16, 1, 1, bias=False)
        accumulator = gk.attach(model, fuse=fuse)
        x = torch.full((2, 1), 200.0, device=device).half()
        model(x).backward(torch.full_like(x, 200.0))
        found[fuse] = accumulator.found_inf.item(), model[0].weight.grad.item()
    assert found[True] == (0.0, 80_000.0)
    assert found[False][0] == 1.0


@every_device
def test_inv_scale_keeps_large_gradients_finite(device):
    model = linear(device, torch.bfloat16, 1, 1, bias=False)
    accumulator = gk.attach(model, fuse=True)
    accumulator.inv_scale.fill_(2.0**-100)
    x = torch.full((2, 1), 2.0**60, device=device).bfloat16()
    model(x).backward(torch.full_like(x, 2.0**60))
    assert model[0].weight.grad.item() == 2.0**21
