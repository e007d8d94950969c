"""Modules that add weight gradients to ``param.main_grad`` themselves, as those of Megatron do.

    main += dy^T x                          by the module, in its backward
    param.grad_added_to_main_grad = True    which tells us; what it returns to autograd is dropped

So do Transformer Engine's modules with ``fuse_wgrad_accumulation=True``, and Megatron's parallel
linear layers with ``gradient_accumulation_fusion=True``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels import fsdp, hook, sharded
from gradacc_kernels.accumulator import Accumulator

FLAGS = ("fuse_wgrad_accumulation", "gradient_accumulation_fusion")
NAME = "grad_added_to_main_grad"


class _GradAdded:
    """``param.grad_added_to_main_grad``: whether a module has added to this window's main gradient.

    For parameters that :func:`attach` has given to modules, which set it. For all others it is
    the ordinary attribute that it would be without this class.
    """

    def __get__(self, param, owner):
        if param is None:
            return self
        group, index = _written_by_module(param)
        if group is not None:
            return param.grad is not None and group.owner().written_by_modules[group.names[index]]
        if NAME not in vars(param):
            raise AttributeError(f"'{owner.__name__}' object has no attribute '{NAME}'")
        return vars(param)[NAME]

    def __set__(self, param, value):
        group, index = _written_by_module(param)
        if group is None:
            vars(param)[NAME] = value
            return
        attachment, name = group.owner(), group.names[index]
        if value:
            _check_added(param, attachment, name)
            # Zeros in place of the dummy gradient: what others bring is in the same sum.
            group.hooks.added(index, not getattr(param, "zero_out_wgrad", False))
        attachment.written_by_modules[name] = bool(value)

    def __delete__(self, param):
        if vars(param).pop(NAME, None) is None:
            raise AttributeError(f"'{type(param).__name__}' object has no attribute '{NAME}'")


def _written_by_module(param: Tensor) -> tuple[Any, Any]:
    group, index = hook._find(param)
    attachment = None if group is None else group.owner()
    if attachment is None or group.names[index] not in attachment.written_by_modules:
        return None, None
    return group, index


def _check_added(param: Tensor, attachment: Any, name: str) -> None:
    if param.grad is None:
        raise RuntimeError(
            f"gradacc_kernels: a module has added to main_grad of parameter {name}, which it had "
            "read before zero_grad() ended the window, so what it added to is not zeros: call "
            "zero_grad() before the forward, or zero_grad(set_to_none=False)"
        )
    if attachment.uses_inv_scale:
        raise RuntimeError(
            f"gradacc_kernels: a module has added to main_grad of parameter {name} by itself, and "
            "so without the weight of micro_batch(weight), and without inv_scale, which "
            "gk.GradScaler sets: use losses that are weighted already, and torch's GradScaler"
        )


torch.nn.Parameter.grad_added_to_main_grad = _GradAdded()


def attach(
    model: torch.nn.Module, *, params: Iterable[Tensor] | None = None, **options: Any
) -> Accumulator:
    """As gradacc_kernels.attach, for a model of which some modules add to ``main_grad`` themselves.

    ``param.main_grad`` of their parameters is the float32 main gradient. It is set to zeros where
    a window begins (4 bytes an element): when a module first reads it while ``.grad`` is None. So a
    module may add to it, or overwrite it in the first micro-batch. Once it has, it sets
    ``param.grad_added_to_main_grad = True``, and what it returns to autograd is dropped in that
    backward; with ``param.zero_out_wgrad = True`` it is zeros, and is added, with what others bring
    to the parameter. Statistics of these parameters are stale then: norms read their gradients.

    Args:
        model: with such modules; all other parameters are covered as ever.
        params: those that modules add to; None for the parameters of modules of which
            ``fuse_wgrad_accumulation`` or ``gradient_accumulation_fusion`` is true.
        options: of gradacc_kernels.attach, but for ``scale``, which modules would not apply: divide
            the loss. Nor can ``nonfinite="skip_micro_batch"`` take back what modules have added.

    Returns:
        The :class:`Accumulator`.

    Raises:
        ValueError: no such parameters, or some that are no parameters of the model that require
            grad, or DTensors; an option that modules would not follow. Nothing was changed.
        TypeError, RuntimeError: as gradacc_kernels.attach.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"attach: expected a module, got {type(model).__name__}")
    if options.get("scale", 1.0) != 1.0:
        raise ValueError(
            f"attach: modules that add to main_grad do not multiply by scale={options['scale']}: "
            "divide the loss by the number of micro-batches"
        )
    if options.get("nonfinite") == "skip_micro_batch":
        raise ValueError(
            "attach: nonfinite='skip_micro_batch' cannot take back what modules have added to "
            "main_grad: use 'skip_window'"
        )
    if fsdp.modules_of(model):
        raise ValueError("attach: fully_shard takes main gradients away, so no module can add")
    wanted = set(map(id, _params_of_writers(model) if params is None else params))
    names = {
        name: param
        for name, param in model.named_parameters()
        if id(param) in wanted and param.requires_grad
    }
    if not names:
        raise ValueError(
            f"attach: no module that has parameters that require grad has {' or '.join(FLAGS)} "
            "set: pass params=[...], or use gradacc_kernels.attach"
        )
    if params is not None and len(names) < len(wanted):
        raise ValueError(
            f"attach: expected parameters of the model that require grad, got {len(wanted)}, of "
            f"which {len(names)} are"
        )
    for name, param in names.items():
        if sharded.is_dtensor(param):
            raise ValueError(f"attach: parameter {name} is a DTensor, which has no main_grad")
    accumulator = hook.attach(model, **options)
    accumulator._attachment.written_by_modules = dict.fromkeys(names, False)
    return accumulator


def _params_of_writers(model: torch.nn.Module) -> list[Tensor]:
    writers = (m for m in model.modules() if any(getattr(m, flag, False) for flag in FLAGS))
    return [param for module in writers for param in module.parameters(recurse=False)]
