"""What attach refuses, with nothing changed."""

import pytest
import torch
from hook_cases import mlp, parameter

import gradacc_kernels as gk


def refused(error, message, target, **options):
    params = list(target.parameters()) if isinstance(target, torch.nn.Module) else target
    params = [p for p in params if isinstance(p, torch.Tensor) and p.is_leaf]
    before = [(p.grad, p.grad_dtype) for p in params]
    with pytest.raises(error, match=message):
        gk.attach(target, **options)
    assert [(p.grad, p.grad_dtype) for p in params] == before
    if isinstance(target, torch.nn.Module):
        assert not target._forward_pre_hooks


def test_attached_already():
    model = mlp()
    accumulator = gk.attach(model)
    with pytest.raises(ValueError, match=r"parameter 0.weight is attached already; call detach"):
        gk.attach(model)
    with pytest.raises(ValueError, match=r"parameter 0 is attached already"):
        gk.attach([model[3].bias])
    accumulator.detach()
    gk.attach(model)


def test_nothing_requires_grad():
    model = mlp().requires_grad_(False)
    refused(ValueError, "none of the 6 parameters requires grad", model)
    refused(ValueError, "got no parameters", [])


def test_integer_and_complex_parameters():
    refused(
        TypeError,
        "parameter 1 must be float16, .* got torch.int64",
        [parameter([1.0]), torch.zeros(3, dtype=torch.int64)],
    )
    refused(
        TypeError,
        "parameter 0 must be float16, .* got torch.complex64",
        [parameter([1j], torch.complex64)],
    )


def test_frozen_integer_parameters_of_a_module_are_left_out():
    model = mlp()
    model.packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert "6 parameters (1 frozen" in repr(gk.attach(model))


def test_meta_and_uninitialised_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"))
    refused(ValueError, "parameter 0.weight is on the meta device", model)
    with pytest.raises(ValueError, match="parameter weight is uninitialised; run a forward"):
        gk.attach(torch.nn.LazyLinear(4))


def test_what_is_no_parameter():
    with pytest.raises(TypeError, match="got str at 0"):
        gk.attach(["weight"])
    with pytest.raises(TypeError, match="expected a module or tensors, got SGD"):
        gk.attach(torch.optim.SGD([parameter([1.0])]))
    result = parameter([1.0]) * 2
    with pytest.raises(ValueError, match="parameter 0 must be a leaf"):
        gk.attach([result])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e39, 1e-60])
def test_scales(scale):
    refused(ValueError, "scale must be", mlp(), scale=scale)


def test_scale_that_is_no_number():
    refused(TypeError, "scale must be a number, got str", mlp(), scale="1")


def test_backends():
    refused(ValueError, "backend must be 'auto' or one of", mlp(), backend="gpu")
    refused(ValueError, "parameter 0.weight: backend 'cuda' does not serve", mlp(), backend="cuda")


def test_inference_mode():
    model = mlp()
    with torch.inference_mode():
        refused(RuntimeError, "call it outside torch.inference_mode", model)


def test_the_scale_cannot_be_assigned():
    model = mlp()
    accumulator = gk.attach(model, scale=0.5)
    assert accumulator.scale == 0.5
    with pytest.raises(AttributeError):
        accumulator.scale = 0.25


def test_a_detached_accumulator_says_so():
    accumulator = gk.attach(mlp())
    with pytest.raises(RuntimeError, match="not attached to anything"):
        accumulator.refresh()  # its model is gone
    model = mlp()
    accumulator = gk.attach(model)
    accumulator.detach()
    accumulator.detach()
    with pytest.raises(RuntimeError, match="not attached to anything"):
        accumulator.grad_norm()


def test_a_scripted_module():
    scripted = torch.jit.script(torch.nn.Linear(4, 4).bfloat16())
    with pytest.raises(TypeError, match="pass its parameters as a list"):
        gk.attach(scripted)
    accumulator = gk.attach(list(scripted.parameters()))
    scripted(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert scripted.weight.grad.dtype == torch.float32
    del accumulator
