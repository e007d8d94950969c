"""Hooks of others: module backward hooks, and optimizers that step inside of backward."""

import copy

import pytest
import torch
from hook_cases import backward, batch, every_hook, float32_sums, micro_gradients, mlp

import gradacc_kernels as gk


@every_hook
def test_full_backward_hooks_see_and_change_what_they_do_in_stock(hook, queueing):
    device, backend = hook
    model, inputs = mlp(device), [batch(device) for _ in range(2)]
    stock = copy.deepcopy(model)
    gk.attach(model, backend=backend)
    seen = {model: [], stock: []}
    for each in (model, stock):
        for module in each[1:]:
            module.register_full_backward_pre_hook(
                lambda module, grad_output, each=each: seen[each].extend(grad_output)
            )
        each[3].register_full_backward_hook(lambda module, grad_input, _: (grad_input[0] * 2,))
    micro = micro_gradients(stock, inputs)
    for x in inputs:
        backward(model, x)
    assert len(seen[model]) == len(seen[stock]) == 6
    assert all(a.equal(b) for a, b in zip(seen[model], seen[stock], strict=True))
    for param, expected in zip(model.parameters(), float32_sums(micro), strict=True):
        assert param.grad.equal(expected)


def step_in_backward(model, is_attached=False):
    """The recipe of torch's tutorial: one optimizer a parameter, and no gradient afterwards."""
    optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in model.parameters()}

    def step(param):
        assert not is_attached or param.grad.data_ptr() == param.main_grad.data_ptr()
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(step)


@every_hook
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_optimizers_that_step_inside_of_backward(hook, queueing, when):
    device, backend = hook
    model = mlp(device, torch.float32)
    start, stock = copy.deepcopy(model), copy.deepcopy(model)
    if when == "before attach":
        step_in_backward(model, is_attached=True)
    gk.attach(model, backend=backend)
    if when == "after attach":
        step_in_backward(model, is_attached=True)
    step_in_backward(stock)
    for _ in range(3):
        x = batch(device, torch.float32)
        for each in (model, stock):
            backward(each, x)
            assert all(param.grad is None for param in each.parameters())
    for param, old, expected in zip(
        model.parameters(), start.parameters(), stock.parameters(), strict=True
    ):
        assert param.equal(expected) and not param.equal(old)


@every_hook
def test_16_bit_parameters_are_stepped_inside_of_backward_by_sgd(hook, queueing):
    device, backend = hook
    model, x = mlp(device), batch(device)
    before = [p.detach().clone() for p in model.parameters()]
    expected = micro_gradients(model, [x])[0]
    gk.attach(model, backend=backend)
    optimizers = {p: torch.optim.SGD([p], lr=1.0) for p in model.parameters()}

    def step(param):
        assert param.grad.dtype == torch.float32
        optimizers[param].step()
        param.grad = None

    for param in optimizers:
        param.register_post_accumulate_grad_hook(step)
    backward(model, x)
    for param, old, grad in zip(model.parameters(), before, expected, strict=True):
        assert param.grad is None and param.equal((old.float() - grad.float()).bfloat16())
