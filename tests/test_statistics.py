"""Norms and overflow verdicts of an Accumulator."""

import pytest
import torch
from hook_cases import arrive, backward, batch, every_hook, mlp, parameter

import gradacc_kernels as gk


def true_norm(model):
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return flat.norm().item()


@every_hook
def test_norm_from_a_pass_and_from_the_statistics(hook, queueing):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    for _ in range(3):
        backward(model, batch(device))
    for from_statistics in (False, True):
        norm = accumulator.grad_norm(from_statistics=from_statistics)
        assert norm.shape == () and norm.dtype == torch.float32
        assert norm.item() == pytest.approx(true_norm(model), rel=1e-6)
    clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert accumulator.grad_norm().item() == pytest.approx(clipped.item(), rel=1e-6)


@every_hook
def test_no_gradient_has_norm_zero(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    assert accumulator.grad_norm().item() == 0 and accumulator.found_inf.item() == 0
    backward(model, batch(device))
    model.zero_grad()
    assert accumulator.grad_norm(from_statistics=True).item() == 0


@every_hook
def test_an_edit_that_autograd_sees_is_recomputed(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    backward(model, batch(device))
    model[0].weight.grad.mul_(3)
    model[3].weight.grad = torch.ones_like(model[3].weight.grad)
    norm = accumulator.grad_norm(from_statistics=True).item()
    assert norm == pytest.approx(true_norm(model), rel=1e-6)


@every_hook
def test_edits_that_nothing_sees_need_invalidate(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    backward(model, batch(device))
    before = true_norm(model)
    for param in model.parameters():
        param.grad.data.mul_(3)
    assert accumulator.grad_norm(from_statistics=True).item() == pytest.approx(before, rel=1e-6)
    assert accumulator.grad_norm().item() == pytest.approx(3 * before, rel=1e-6)
    accumulator.invalidate()
    norm = accumulator.grad_norm(from_statistics=True).item()
    assert norm == pytest.approx(3 * before, rel=1e-6)


@every_hook
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("position", [0, 1023, 1024, 3000])
def test_found_inf_wherever_it_is(hook, bad, position):
    device, backend = hook
    params = [parameter(torch.zeros(n), device=device) for n in (5, 3001, 7)]
    accumulator = gk.attach(params, backend=backend)
    grad = torch.ones(3001)
    for param in params:
        arrive(param, 1.0)
    assert accumulator.found_inf.item() == 0
    grad[position] = bad
    arrive(params[1], grad.to(device))
    assert accumulator.found_inf.item() == 1
    assert accumulator.grad_norm().isnan() and accumulator.grad_norm(from_statistics=True).isnan()


@every_hook
def test_a_large_finite_gradient_is_no_overflow(hook):
    device, backend = hook
    param = parameter([2e19, 1.0], device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, torch.tensor([2e19, 1.0], device=device))
    assert accumulator.found_inf.item() == 0
    assert accumulator.grad_norm().item() == float("inf")


@every_hook
def test_an_overflow_of_the_sum_is_found(hook):
    device, backend = hook
    param = parameter([0.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3e38)
    assert accumulator.found_inf.item() == 0
    arrive(param, 3e38)
    assert accumulator.found_inf.item() == 1


@every_hook
def test_gradients_that_are_not_ours_count_too(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    backward(model, batch(device))
    model[0].weight.grad = torch.full_like(model[0].weight, 2.0)  # bfloat16
    model[3].bias.grad = None
    norm = accumulator.grad_norm(from_statistics=True).item()
    assert norm == pytest.approx(true_norm(model), rel=1e-6)
