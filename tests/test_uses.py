"""Several uses of a 16-bit parameter in one backward, which autograd sums before any leaf hook."""

import pytest
import torch
from hook_cases import every_hook, needs_extension, parameter
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradacc_kernels as gk

# In bfloat16 their sum is 1: the addend is half of the distance to the next number.
ADDENDS = (1.0, 1 / 512)


class Reused(nn.Module):
    """A bare parameter that forward uses several times, and a head behind it."""

    def __init__(self, device, has_head):
        super().__init__()
        self.weight = parameter([1.0, 1.0], device=device)
        self.head = parameter([1.0], device=device) if has_head else 1.0

    def forward(self, factors=ADDENDS):
        terms = [self.weight * factor for factor in factors]
        return (torch.stack([term.float() for term in terms]).sum(0) * self.head).sum()


def sums(param):
    return param.grad.double().unique().tolist()


@needs_extension
@every_hook
@pytest.mark.parametrize("has_head", [True, False], ids=["head", "alone"])
def test_two_uses_are_summed_exactly(hook, has_head):
    device, backend = hook
    model = Reused(device, has_head)
    gk.attach(model, backend=backend)
    if not has_head:
        model().backward()  # shows it; nothing else has come before that could
        model.zero_grad()
    model().backward()
    assert sums(model.weight) == [1 + 1 / 512]


def test_stock_loses_the_second_use():
    model = Reused("cpu", has_head=True)
    model().backward()
    assert sums(model.weight) == [1.0]


@needs_extension
@every_hook
def test_one_use_comes_uncast_again(hook):
    device, backend = hook
    model = Reused(device, has_head=True)
    gk.attach(model, backend=backend)
    seen = []
    model.weight.register_hook(lambda grad: seen.append(grad.dtype))
    for factors in (ADDENDS, ADDENDS[:1], ADDENDS):
        model(factors).backward()
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    assert sums(model.weight) == [3 + 2 / 512]


@needs_extension
@every_hook
def test_a_layer_that_is_applied_many_times(hook):
    device, backend = hook
    layer = nn.Linear(1, 1, bias=False, device=device, dtype=torch.bfloat16)
    model = nn.Sequential(layer, nn.Linear(1, 1, device=device, dtype=torch.bfloat16))
    gk.attach(model, backend=backend)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    for factor in (256.0, 1.0):
        x = [
            torch.full((1, 1), value, device=device, dtype=torch.bfloat16) for value in (1, 1 / 256)
        ]
        outputs = [model(value) * factor for value in x]
        torch.stack([output.float() for output in outputs]).sum().backward()
    assert sums(layer.weight) == [256 + 1 + 1 + 1 / 256]


@needs_extension
@every_hook
@pytest.mark.parametrize("reentrant", [False, True])
def test_uses_in_several_checkpoints(hook, reentrant):
    device, backend = hook
    model = Reused(device, has_head=True)
    gk.attach(model, backend=backend)
    for _ in range(2):
        x = torch.ones(2, device=device, dtype=torch.bfloat16, requires_grad=True)
        parts = [
            checkpoint(lambda x, f=f: x * model.weight * f, x, use_reentrant=reentrant)
            for f in ADDENDS
        ]
        (torch.stack([part.float() for part in parts]).sum(0) * model.head).sum().backward()
    assert sums(model.weight) == [2 + 2 / 512]


@needs_extension
@every_hook
def test_a_grad_dtype_that_was_asked_for_is_left_alone(hook):
    device, backend = hook
    model = Reused(device, has_head=True)
    model.weight.grad_dtype = torch.float32
    gk.attach(model, backend=backend)
    model(ADDENDS[:1]).backward()
    seen = []
    model.weight.register_hook(lambda grad: seen.append(grad.dtype))
    model().backward()
    assert seen == [torch.float32]
    assert sums(model.weight) == [2 + 1 / 512]


@needs_extension
def test_what_the_engine_delivers_after_detach():
    model = Reused("cpu", has_head=True)
    accumulator = gk.attach(model)
    model().backward()
    accumulator.detach()
    model.zero_grad()
    model().backward()
    assert model.weight.grad.dtype == torch.bfloat16 and sums(model.weight) == [1.0]
