"""Gradients that wait for a common launch, in numbers around those that fill one."""

import pytest
import torch
from hook_cases import every_hook

import gradacc_kernels as gk

FULL = 640  # gradients of one launch


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("as asked for")


def parameters(count, device):
    return [
        torch.nn.Parameter(torch.zeros(3, dtype=torch.half, device=device)) for _ in range(count)
    ]


@every_hook
@pytest.mark.parametrize("count", [1, FULL - 1, FULL, FULL + 1, 2 * FULL + 1])
def test_every_gradient_that_waited_is_added_once(hook, queueing, count):
    device, backend = hook
    params = parameters(count, device)
    accumulator = gk.attach(params, backend=backend)
    for _ in range(3):
        loss = sum((i + 1) * param.float().sum() for i, param in enumerate(params))
        loss.backward()
    for i, param in enumerate(params):
        assert param.grad.tolist() == 3 * [3 * float(torch.tensor(i + 1.0).half())]
    accumulator.detach()


@every_hook
def test_a_backward_that_raises_drops_what_waits_and_keeps_what_was_added(hook, queueing):
    device, backend = hook
    params = parameters(FULL + 60, device)
    accumulator = gk.attach(params, backend=backend)
    # Autograd runs nodes in the reverse of their making: that which raises comes last.
    first = Raises.apply(torch.ones(3, device=device, requires_grad=True))
    loss = first.sum() + sum(param.float().sum() for param in params)
    with pytest.raises(ValueError, match="as asked for"):
        loss.backward()
    added = sum(param.grad is not None for param in params)
    assert added == (FULL if queueing else len(params))
    assert all(param.grad is None or param.grad.tolist() == [1, 1, 1] for param in params)
    accumulator.detach()
