"""The hook's forms and small helpers for its tests."""

import copy
import time
from functools import reduce

import pytest
import torch

import gradacc_kernels as gk
from gradacc_kernels import dispatch

# (device, backend): the C++ hook serves cpu and cuda, the Python hook triton and reference.
_CASES = [("cpu", "cpu"), ("cpu", "reference"), ("cuda", "cuda"), ("cuda", "triton")]


def _param(device, backend):
    reason = dispatch.why_missing(backend)
    if device == "cuda" and not torch.cuda.is_available():
        reason = "no CUDA device is visible"
    marks = [pytest.mark.gpu] if device == "cuda" else []
    if reason is not None:
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param((device, backend), id=f"{device}-{backend}", marks=marks)


needs_extension = pytest.mark.skipif(
    dispatch.why_missing("cpu") is not None, reason=str(dispatch.why_missing("cpu"))
)
every_hook = pytest.mark.parametrize("hook", [_param(*case) for case in _CASES])


def parameter(values, dtype=torch.bfloat16, device="cpu"):
    return torch.nn.Parameter(torch.as_tensor(values, dtype=dtype, device=device).clone())


def arrive(param, grad):
    """Lets autograd deliver `grad`, as it is, to a parameter."""
    grad = torch.as_tensor(grad, dtype=param.dtype, device=param.device).expand(param.shape)
    _Deliver.apply(param, grad).backward()


class _Deliver(torch.autograd.Function):
    """A node whose gradient for its first input is a given tensor."""

    @staticmethod
    def forward(ctx, param, grad):
        ctx.grad = grad
        return param.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return ctx.grad, None


class Raise(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("in the middle")


def released(references, seconds=10.0):
    """Whether nothing holds what these weak references are to.

    The engine's thread of a GPU holds the last node that it ran until it has gone to sleep, which
    may be after backward returned: that is waited for.
    """
    end = time.monotonic() + seconds
    while any(reference() is not None for reference in references):
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def mlp(device="cpu", dtype=torch.bfloat16, width=64):
    return torch.nn.Sequential(
        torch.nn.Linear(16, width),
        torch.nn.GELU(),
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, 8),
    ).to(device, dtype)


def batch(device="cpu", dtype=torch.bfloat16, rows=4):
    return torch.randn(rows, 16, device=device).to(dtype)


def attached_and_stock(hook, dtype=torch.bfloat16, **options):
    """A model that is attached, and its copy that is not."""
    device, backend = hook
    model = mlp(device, dtype)
    stock = copy.deepcopy(model)
    gk.attach(model, backend=backend, **options)
    return model, stock


def assert_main(params, expected):
    """Each `.grad` is the main gradient, with these values; None where None is expected."""
    for param, values in zip(params, expected, strict=True):
        if values is None:
            assert param.grad is None
        else:
            assert param.grad.data_ptr() == param.main_grad.data_ptr()
            assert param.grad.dtype == torch.float32 and param.grad.equal(values.float())


def micro_gradients(model, inputs):
    """The gradient of each micro-batch, by torch.autograd.grad, in the dtype that it comes in."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [torch.autograd.grad(model(x).float().square().sum(), params) for x in inputs]


def float32_sums(micro):
    """The sum of each parameter's micro-gradients in float32, one after the other."""
    return [
        reduce(torch.add, [grad.float() for grad in grads]) for grads in zip(*micro, strict=True)
    ]


def backward(model, x):
    model(x).float().square().sum().backward()


def warm_up(model, x):
    """Two micro-batches on a side stream, as before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            backward(model, x)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
