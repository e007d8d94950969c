"""Modules whose weight gradient goes straight into the float32 main gradient.

A fused module computes what it always did. Its backward adds ``dyᵀ x`` (or the rows of an
embedding) to the main gradient by one kernel, so that no 16-bit weight gradient is ever written.
Only the ``forward`` of the instance is replaced: class, parameters, state dict and hooks stay.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradacc_kernels import dispatch, experts, python_fused, reference, window_cast

MODES = ("auto", True, False)
# "auto" leaves smaller weights to the hook: their gradients share a launch.
AUTO_FROM = 1 << 16


@dataclass(frozen=True)
class Covered:
    """A covered parameter as a fused module needs it."""

    param: Tensor  # as forward reads it: whole, where FSDP2 has sharded it
    main_grad: Tensor
    hooks: Any
    index: int
    is_native: bool


Find = Callable[[Tensor], Covered | None]


class FusedForward:
    """The ``forward`` of a fused module's instance; this one does what the class does.

    So do the copies and pickles of a fused module.

    Args:
        module: whose forward it is.
        call: what a subclass calls in place of it; None once the module is given back.
    """

    __slots__ = ("__weakref__", "call", "module")
    __name__ = "forward"

    def __init__(self, module: nn.Module, call: Callable | None = None):
        self.module = weakref.ref(module)
        self.call = call

    @property
    def __wrapped__(self) -> Callable:
        """The class's own forward: its signature is ours."""
        module = self.module()
        return type(module).forward.__get__(module)

    def __call__(self, *args, **kwargs):
        """Calls the class's own."""
        module = self.module()
        return type(module).forward(module, *args, **kwargs)

    def __reduce__(self):
        """Copies and pickles as what does the class's own."""
        return (FusedForward, (self.module(),))


class ProductForward(FusedForward):
    """Computes the one product or lookup of a module.

    Only where autograd records it: evaluation, whose weights may have been swapped by writes that
    nothing sees, reads no copy of a window.
    """

    __slots__ = ()

    def __call__(self, *args, **kwargs):
        """Returns what the class's forward would."""
        module = self.module()
        if self.call is not None and torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                _warn_compiled()
            elif len(args) == 1 and not kwargs and type(args[0]) is Tensor:
                output = self.call(args[0])
                if output is not None:
                    return output
        return type(module).forward(module, *args, **kwargs)


class LookupForward(ProductForward):
    """Computes an embedding's lookup, as long as its attributes are those of attach."""

    __slots__ = ("attributes",)

    def __init__(self, module: nn.Module, call: Callable | None = None):
        super().__init__(module, call)
        self.attributes = _attributes(module)

    def __call__(self, *args, **kwargs):
        """Returns what the class's forward would."""
        module = self.module()
        if _attributes(module) == self.attributes:
            return super().__call__(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)


def _attributes(module: nn.Embedding) -> tuple:
    return module.padding_idx, module.max_norm, module.scale_grad_by_freq, module.sparse


class ExpertsForward(FusedForward):
    """Runs the module's own forward, and takes over its products with expert weights."""

    __slots__ = ()

    def __call__(self, *args, **kwargs):
        """Returns what the class's forward returns."""
        module = self.module()
        if self.call is not None and torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                _warn_compiled()
            elif not torch.jit.is_tracing():
                return self.call(module, args, kwargs)
        return type(module).forward(module, *args, **kwargs)


@torch.compiler.assume_constant_result
def _warn_compiled() -> None:
    _warn_compiled_once()


@functools.cache
def _warn_compiled_once() -> None:
    warnings.warn(
        "gradacc_kernels: inside torch.compile, modules are not fused: their weight gradients are "
        "written in 16 bits and added by the hook, with the same result up to that rounding. "
        "attach(..., fuse=False) silences this.",
        stacklevel=2,
    )


class FusedModules:
    """The fused modules of one attachment.

    Args:
        root: the attached module.
        mode: ``"auto"`` or True.
        find: gives the covered parameter behind a tensor.
    """

    def __init__(self, root: nn.Module, mode: str | bool, find: Find):
        self.names: dict[str, list[str]] = {}
        self._forwards: list[FusedForward] = []
        _count_optimizer_steps()
        for name, module in root.named_modules():
            before = vars(module).get("forward")
            is_free = before is None or (isinstance(before, FusedForward) and before.call is None)
            if not is_free:
                continue  # somebody else's forward, or that of another attachment
            forward = _forward(module, mode, find)
            if forward is not None:
                module.forward = forward
                self._forwards.append(forward)
                self.names.setdefault(type(module).__name__, []).append(name)

    def remove(self) -> None:
        """Gives the modules their own forward back."""
        for forward in self._forwards:
            forward.call = None
            module = forward.module()
            if module is not None and vars(module).get("forward") is forward:
                del module.forward
        self._forwards = []

    def __repr__(self) -> str:
        """Tells how many modules of which class are fused."""
        kinds = [f"{len(names)} {kind}" for kind, names in self.names.items()]
        return f"fused: {', '.join(kinds) or 'no module'}"


def check(root: nn.Module | None, mode: str | bool) -> None:
    """Refuses a mode that is none, and modules that True cannot fuse."""
    if not any(mode is known or (known == "auto" and mode == "auto") for known in MODES):
        raise ValueError(f"attach: fuse must be 'auto', True or False, got {mode!r}")
    if mode is not True:
        return
    if root is None:
        raise ValueError(
            "attach: fuse=True needs the module, to find the layers behind its parameters; got "
            "bare tensors"
        )
    for name, module in root.named_modules():
        if isinstance(module, nn.Embedding):
            refused = [o for o in ("max_norm", "scale_grad_by_freq") if getattr(module, o)]
            if refused:
                raise ValueError(
                    f"attach: fuse=True cannot fuse the embedding {name!r}, which has {refused[0]} "
                    "set; fuse='auto' leaves it to the hook"
                )


def _forward(module: nn.Module, mode: str | bool, find: Find) -> FusedForward | None:
    """Returns the fused forward of a module, or None where it stays on the hook."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None  # nn.MultiheadAttention reads its weight and never calls it
        return _linear(module, mode, find, is_transposed=False)
    if forward is nn.Embedding.forward:
        return _embedding(module, mode, find)
    if forward is _conv1d_forward():
        return _linear(module, mode, find, is_transposed=True)
    return _experts(module, mode, find)


def _conv1d_forward() -> Callable | None:
    """The forward of Hugging Face's Conv1D, whose weight is [in, out], where it is imported."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library.Conv1D.forward if library is not None else None


def _fusable(param: Tensor | None, mode: str | bool, find: Find) -> Covered | None:
    covered = find(param) if param is not None else None
    if covered is None or not covered.main_grad.is_contiguous():
        return None
    if covered.main_grad.dtype != torch.float32:
        return None
    if mode is True:
        return covered
    is_fast = covered.is_native or covered.hooks.backend is not reference
    is_worth_it = param.device.type == "cuda" and param.numel() >= AUTO_FROM
    return covered if is_fast and is_worth_it else None


def _form(covered: Covered) -> ModuleType:
    """The module whose classes fuse a parameter: in C++, or in Python where its hook is."""
    return dispatch.extension() if covered.is_native else python_fused


def _watch(form: ModuleType, module: nn.Module, params: dict[str, Tensor | None]):
    return form.ParameterWatch(
        [(module._parameters, name, param) for name, param in params.items()]
    )


def _linear(module, mode, find, *, is_transposed):
    weight = module._parameters.get("weight")
    covered = _fusable(weight, mode, find)
    if covered is None or "bias" not in module._parameters:
        return None
    if module.bias is not None and module.bias.shape != (weight.shape[int(is_transposed)],):
        return None
    form = _form(covered)
    product = form.FusedWeight(covered.hooks, covered.index, covered.param, is_transposed)
    bias = find(module.bias) if module.bias is not None else None
    bias = module.bias if bias is None else bias.param
    watch = _watch(form, module, {"weight": covered.param, "bias": bias})
    return ProductForward(module, form.FusedLinear(watch, product, bias))


def _embedding(module, mode, find):
    weight = module._parameters.get("weight")
    covered = _fusable(weight, mode, find)
    if covered is None or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    form = _form(covered)
    padding_idx = -1 if module.padding_idx is None else module.padding_idx
    weight = covered.param
    lookup = form.FusedEmbedding(covered.hooks, covered.index, weight, padding_idx, module.sparse)
    return LookupForward(module, form.FusedLookup(_watch(form, module, {"weight": weight}), lookup))


def _experts(module, mode, find):
    # torch's own modules with weights of three dimensions convolve, or are bilinear.
    if isinstance(module, (nn.modules.conv._ConvNd, torch.jit.ScriptModule)):
        return None
    if type(module).__module__.startswith("torch.nn."):
        return None
    weights = {}
    for name, param in module._parameters.items():
        if param is None or param.dim() != 3 or len(param) < 2:
            continue
        covered = _fusable(param, mode, find)
        if covered is not None:
            make = functools.partial(
                _form(covered).FusedWeight, covered.hooks, covered.index, covered.param
            )
            weights[name] = (covered.param, functools.cache(make))
    return ExpertsForward(module, experts.Experts(weights)) if weights else None


@functools.cache
def _count_optimizer_steps() -> None:
    """Has every torch optimizer's step renew the 16-bit copies that autocast works with."""
    register_optimizer_step_post_hook(lambda *_: window_cast.count_optimizer_step())
    extension = dispatch.extension()
    if not isinstance(extension, str):
        register_optimizer_step_post_hook(lambda *_: extension.count_optimizer_step())
