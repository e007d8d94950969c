"""The ways to sum the gradients of micro-batches that bench_training.py and eager.py compare.

A way is set up on a fresh model. From then on backward() adds to the window's sum, ``zero()``
begins a window as a training loop of that way would, and ``grads()`` has the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import gradacc_kernels as gk


class Stock:
    """PyTorch: ``.grad`` in the dtype of its parameter."""

    def __init__(self, model: nn.Module):
        self.params = list(model.parameters())

    def zero(self) -> None:
        """Begins a window."""
        for param in self.params:
            param.grad = None

    def grads(self) -> list[Tensor | None]:
        """Returns the sum of each parameter."""
        return [param.grad for param in self.params]


class ThrownAway(Stock):
    """No sum at all: what forward and backward cost without one."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        for param in self.params:
            param.register_post_accumulate_grad_hook(self.drop)

    @staticmethod
    def drop(param: Tensor) -> None:
        """Frees a gradient, which autograd had stored without a copy."""
        param.grad = None


class GradDtype(Stock):
    """PyTorch's own float32 sum: autograd casts each gradient, then adds."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        for param in self.params:
            param.grad_dtype = torch.float32


class PythonHook(Stock):
    """A hook that adds each gradient to a view of a flat float32 buffer, and frees it."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        device = self.params[0].device
        self.flat = torch.zeros(sum(p.numel() for p in self.params), device=device)
        parts = self.flat.split([param.numel() for param in self.params])
        self.mains = [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]
        for param, main in zip(self.params, self.mains, strict=True):
            param.register_post_accumulate_grad_hook(partial(self.add, main))

    @staticmethod
    def add(main: Tensor, param: Tensor) -> None:
        """Adds a gradient as soon as it is there; a module that added its own gives none."""
        if param.grad is not None:
            main.add_(param.grad)
            param.grad = None

    def zero(self) -> None:
        """Begins a window: all of it is added to, so all of it has to be cleared."""
        super().zero()
        self.flat.zero_()

    def grads(self) -> list[Tensor | None]:
        """Returns the buffer's views."""
        return list(self.mains)


def addmm_into(main: Tensor, dy: Tensor, x: Tensor) -> None:
    """Adds dy^T x to a float32 main gradient: cuBLAS with beta = 1 on a GPU."""
    if main.is_cuda:
        torch.addmm(main, dy.t(), x, out_dtype=torch.float32, out=main)
    else:
        main.addmm_(dy.t().float(), x.float())


class _AddmmLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, main):
        ctx.save_for_backward(x, weight)
        ctx.main = main
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        addmm_into(ctx.main, dy.flatten(0, -2), x.flatten(0, -2))
        return dy @ weight, None, None


class Addmm(PythonHook):
    """Weight gradients of nn.Linear by torch.addmm into float32; the rest by the Python hook."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        mains = dict(zip(self.params, self.mains, strict=True))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                module.forward = partial(self.linear, weight, mains[weight])

    @staticmethod
    def linear(weight: Tensor, main: Tensor, x: Tensor) -> Tensor:
        """Takes the place of nn.Linear.forward."""
        return _AddmmLinear.apply(x, weight, main)


class Attached(Stock):
    """gradacc_kernels.attach."""

    def __init__(self, model: nn.Module, fuse: bool = True):
        super().__init__(model)
        # "auto" fuses on CUDA alone.
        is_cuda = self.params[0].is_cuda
        self.accumulator = gk.attach(model, fuse=("auto" if is_cuda else True) if fuse else False)


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: for the tables.
        family: "bf16" for bfloat16 parameters, "autocast" for float32 ones under autocast.
        set_up: makes a model use it.
        role: "floor", "stock", "peer", "hook" (ours without fused modules) or "ours".
    """

    name: str
    family: str
    set_up: Callable[[nn.Module], Stock]
    role: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return torch.bfloat16 if self.family == "bf16" else torch.float32

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context of a forward pass: a new one each time, as in a training loop."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.family == "autocast")


def ours(family: str) -> list[Way]:
    """Returns PyTorch's way and ours."""
    return [
        Way(f"PyTorch {'bf16 ' if family == 'bf16' else ''}.grad", family, Stock, "stock"),
        Way("attach(fuse=False)", family, partial(Attached, fuse=False), "hook"),
        Way("attach", family, Attached, "ours"),
    ]


def all_ways() -> list[Way]:
    """Returns the ways in the order of the tables; ours next to PyTorch's, for the clocks' sake."""
    return [
        Way("gradients thrown away", "bf16", ThrownAway, "floor"),
        Way("grad_dtype=float32", "bf16", GradDtype, "peer"),
        Way("Python hook, main.add_(grad)", "bf16", PythonHook, "peer"),
        Way("torch.addmm into float32, Python hook", "bf16", Addmm, "peer"),
        *ours("bf16"),
        *ours("autocast"),
    ]
