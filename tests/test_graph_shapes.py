"""Graphs of many shapes, with parameters that come and go and other uses of autograd beside them.

The oracle is the float32 sum of what torch.autograd.grad says of a copy that is not attached.
"""

import copy

import pytest
import torch
from hook_cases import (
    assert_main,
    attached_and_stock,
    backward,
    batch,
    every_hook,
    float32_sums,
    micro_gradients,
    mlp,
)
from torch import nn
from torch.autograd import forward_ad

import gradacc_kernels as gk


class TwoHeads(nn.Module):
    """Two losses over one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk, self.left, self.right = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return [head(hidden).float().square().sum() for head in (self.left, self.right)]


@every_hook
def test_several_losses_one_after_the_other(hook):
    device, backend = hook
    model, x = TwoHeads().to(device, torch.bfloat16), batch(device)
    params = list(model.parameters())
    losses = model(x)
    micro = [
        torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses
    ]
    gk.attach(model, backend=backend)
    left, right = model(x)
    left.backward(retain_graph=True)
    assert_main(params, micro[0])
    right.backward()
    assert_main(params, [*float32_sums([m[:2] for m in micro]), *micro[0][2:4], *micro[1][4:]])


@every_hook
def test_several_losses_in_one_backward(hook):
    device, backend = hook
    model, x = TwoHeads().to(device, torch.bfloat16), batch(device)
    params = list(model.parameters())
    expected = torch.autograd.grad(model(x), params)
    gk.attach(model, backend=backend)
    torch.autograd.backward(model(x))
    assert_main(params, expected)


@every_hook
def test_a_parameter_that_is_first_used_late_in_a_window(hook, queueing):
    device, backend = hook
    model, inputs = TwoHeads().to(device, torch.bfloat16), [batch(device) for _ in range(3)]
    head = list(model.right.parameters())
    expected = torch.autograd.grad(model(inputs[2])[1], head)
    gk.attach(model, backend=backend)
    for param in head:
        param.main_grad.fill_(float("nan"))
    for x in inputs[:2]:
        model(x)[0].backward()
        assert all(param.grad is None for param in head)
    model(inputs[2])[1].backward()
    assert_main(head, expected)


def check_stock_until_attached_again(accumulator, model, part, grads, all_grads, x, backend):
    """A part that is not covered has summed two micro-batches in 16 bits; then it is covered."""
    for param, grad in zip(part.parameters(), grads, strict=True):
        assert param.grad.dtype == torch.bfloat16 and param.grad.equal(grad + grad)
    accumulator.detach()
    model.zero_grad()
    gk.attach(model, scale=0.5, backend=backend)
    backward(model, x)
    assert_main(model.parameters(), [grad.float() * 0.5 for grad in all_grads])


@every_hook
def test_a_parameter_that_is_added_later_is_stock(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    accumulator = gk.attach(model, scale=0.5, backend=backend)
    covered = list(model.parameters())
    model.append(nn.Linear(8, 8).to(device, torch.bfloat16))
    expected = micro_gradients(copy.deepcopy(model), [x])[0]
    for _ in range(2):
        backward(model, x)
    assert_main(covered, [g.float() for g in expected[: len(covered)]])
    check_stock_until_attached_again(
        accumulator, model, model[4], expected[len(covered) :], expected, x, backend
    )


@every_hook
def test_frozen_and_thawed_in_the_middle_of_a_window(hook, queueing):
    model, stock = attached_and_stock(hook)
    inputs = [batch(hook[0]) for _ in range(3)]
    micro = micro_gradients(stock, inputs)
    for x, trains in zip(inputs, (True, False, True), strict=True):
        model[0].requires_grad_(trains)
        backward(model, x)
    assert_main(model[0].parameters(), float32_sums([micro[0][:2], micro[2][:2]]))
    assert_main(list(model.parameters())[2:], float32_sums([m[2:] for m in micro]))


@every_hook
def test_thawed_after_attach_is_stock_until_attached_again(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    expected = micro_gradients(copy.deepcopy(model), [x])[0]
    model[0].requires_grad_(False)
    accumulator = gk.attach(model, scale=0.5, backend=backend)
    backward(model, x)
    model[0].requires_grad_(True)
    for _ in range(2):
        backward(model, x)
    check_stock_until_attached_again(
        accumulator, model, model[0], expected[:2], expected, x, backend
    )


@every_hook
@pytest.mark.parametrize("wrt", ["inputs", "parameters", "both"])
def test_autograd_grad_in_the_middle_of_a_window(hook, wrt):
    model, stock = attached_and_stock(hook)
    first, other, last = (batch(hook[0]) for _ in range(3))
    micro = micro_gradients(stock, [first, last])
    backward(model, first)
    before = [(p.grad, p.grad._version) for p in model.parameters()]
    found = []
    for each in (model, stock):
        x = other.clone().requires_grad_()
        targets = [] if wrt == "parameters" else [x]
        targets += [] if wrt == "inputs" else list(each.parameters())
        found.append(torch.autograd.grad(each(x).float().square().sum(), targets))
        assert x.grad is None
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and ours.equal(theirs)
    for param, (grad, version) in zip(model.parameters(), before, strict=True):
        assert param.grad is grad and grad._version == version
    backward(model, last)
    assert_main(model.parameters(), float32_sums(micro))


@every_hook
def test_backward_with_inputs_in_the_middle_of_a_window(hook):
    model, stock = attached_and_stock(hook)
    inputs = [batch(hook[0]) for _ in range(2)]
    micro = micro_gradients(stock, inputs)
    backward(model, inputs[0])
    model(inputs[1]).float().square().sum().backward(inputs=list(model[0].parameters()))
    assert_main(model[0].parameters(), float32_sums([m[:2] for m in micro]))
    assert_main(list(model.parameters())[2:], micro[0][2:])


@every_hook
def test_a_backward_inside_of_a_backward(hook, queueing):
    model, stock = attached_and_stock(hook)
    outer, inner = (batch(hook[0]) for _ in range(2))
    expected = float32_sums(micro_gradients(stock, [outer, inner]))
    hidden = model[:2](outer)

    def run_another(grad):
        with torch.enable_grad():
            backward(model, inner)

    hidden.register_hook(run_another)
    model[2:](hidden).float().square().sum().backward()
    assert_main(model.parameters(), expected)


@every_hook
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode(hook, queueing):
    model, stock = attached_and_stock(hook)
    inputs = [batch(hook[0]) for _ in range(2)]
    expected = float32_sums(micro_gradients(stock, inputs))
    with torch.autograd.detect_anomaly():
        backward(model, inputs[0])
        with pytest.raises(RuntimeError, match="returned nan values"):
            (model(inputs[0]).float() * float("nan")).sum().backward()
        backward(model, inputs[1])
    assert_main(model.parameters(), expected)


@every_hook
@pytest.mark.parametrize("of", ["input", "parameters"])
def test_forward_derivatives_in_the_middle_of_a_window(hook, of):
    # Not in 16 bits, of which torch 2.11 makes float32 tangents on CUDA that a layer cannot take.
    model, stock = attached_and_stock(hook, torch.float32)
    first, x, last = (batch(hook[0], torch.float32) for _ in range(3))
    expected = float32_sums(micro_gradients(stock, [first, last]))
    backward(model, first)
    tangents = []
    for each in (model, stock):
        with forward_ad.dual_level():
            if of == "input":
                y = each(forward_ad.make_dual(x, x.flip(0)))
            else:
                named = {n: p.detach() for n, p in each.named_parameters()}
                dual = {n: forward_ad.make_dual(p, p.flip(0)) for n, p in named.items()}
                y = torch.func.functional_call(each, dual, (x,))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert tangents[0].equal(tangents[1])
    backward(model, last)
    assert_main(model.parameters(), expected)


@every_hook
def test_backward_of_dual_numbers_adds_the_primal(hook):
    model, stock = attached_and_stock(hook, torch.float32)
    inputs, micro = [batch(hook[0], torch.float32) for _ in range(2)], []
    for x in inputs:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.flip(0))
            (grads,) = micro_gradients(stock, [dual])
            unpacked = [forward_ad.unpack_dual(grad) for grad in grads]
            assert any(grad.tangent is not None for grad in unpacked)
            micro.append([grad.primal.clone() for grad in unpacked])
            backward(model, dual)
    assert_main(model.parameters(), float32_sums(micro))


@every_hook
def test_a_model_that_is_not_attached_after_one_that_is(hook):
    device, backend = hook
    ours, other = mlp(device), nn.Linear(8, 4).to(device, torch.bfloat16)
    both = nn.Sequential(ours, other)
    inputs = [batch(device) for _ in range(3)]
    micro = micro_gradients(copy.deepcopy(both), inputs)
    gk.attach(ours, backend=backend)
    for x in inputs:
        backward(both, x)
    n_ours = len(list(ours.parameters()))
    assert_main(ours.parameters(), float32_sums([m[:n_ours] for m in micro]))
    stock = zip(*[m[n_ours:] for m in micro], strict=True)
    for param, (first, second, third) in zip(other.parameters(), stock, strict=True):
        assert param.grad.dtype == torch.bfloat16 and not hasattr(param, "main_grad")
        assert param.grad.equal(first + second + third)


@every_hook
def test_a_parameter_of_two_models_of_which_one_is_attached(hook):
    device, backend = hook
    ours, other = (nn.Linear(1, 1, bias=False).to(device, torch.bfloat16) for _ in range(2))
    other.weight = ours.weight
    gk.attach(ours, backend=backend)
    for model, value in ((ours, 256.0), (other, 1.0), (ours, 1.0), (other, 1.0)):
        model(torch.full((1, 1), value, device=device).bfloat16()).sum().backward()
    assert_main([other.weight], [torch.full((1, 1), 259.0, device=device)])
