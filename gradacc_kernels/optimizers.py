"""What attach has to do with optimizers: their step ends a window, and some cannot take one.

Optimizers that cannot step 16-bit parameters with float32 gradients are refused before they step:
torch's own error comes from an operator deep inside of it, and names neither the parameter nor a
way out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradacc_kernels.window import pending, shared

HALVES = (torch.float16, torch.bfloat16)
# Their moving average is lerp_(gradient), whose operands must be of one dtype.
AVERAGING = (optim.Adam, optim.Adamax, optim.NAdam, optim.RAdam)


def why_unfit(optimizer: optim.Optimizer, group: dict) -> str | None:
    """Returns what keeps a torch optimizer from mixing dtypes in a group; None where nothing does.

    Optimizers of others are theirs to judge.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    if group.get("fused"):
        return "its fused kernels take"
    if isinstance(optimizer, AVERAGING):
        return "its moving averages take"
    if isinstance(optimizer, optim.RMSprop) and group["centered"]:
        return "its centred average takes"
    return None


def _with_closure(args: tuple, kwargs: dict, after: Callable[[], None]) -> tuple | None:
    """The arguments of a step, whose closure, if it has one, is followed by a call of ours."""
    closure = kwargs.get("closure") if len(args) < 2 else args[1]
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def followed(*arguments, **options):
        loss = closure(*arguments, **options)
        after()
        return loss

    if len(args) < 2:
        return args, {**kwargs, "closure": followed}
    return (args[0], followed, *args[2:]), kwargs


@functools.cache
def watch(
    is_covered: Callable[[Tensor], bool],
    why_pending: Callable[[Tensor], str | None],
    end_windows: Callable[[list[Tensor]], None],
) -> None:
    """Has every torch optimizer look at its parameters before and after a step; once for a process.

    Args:
        is_covered: tells whether ``.grad`` of a parameter is a main gradient of ours.
        why_pending: tells why a parameter's ``.grad`` is not yet what is to be stepped by, or None.
        end_windows: is told of the parameters that were stepped.
    """

    def refuse_sum(optimizer):
        for group in optimizer.param_groups if pending or shared else ():
            reason = next(filter(None, map(why_pending, group["params"])), None)
            if reason is not None:
                raise RuntimeError(f"{type(optimizer).__name__}.step: {reason}")

    def refuse(optimizer, args, kwargs):
        followed = _with_closure(args, kwargs, functools.partial(refuse_sum, optimizer))
        if followed is None:
            refuse_sum(optimizer)
        for group in optimizer.param_groups:
            reason = why_unfit(optimizer, group)
            if reason is None:
                continue
            for param in group["params"]:
                if param.dtype not in HALVES or param.grad is None:
                    continue
                if param.grad.dtype == torch.float32 and is_covered(param):
                    name = type(optimizer).__name__
                    raise TypeError(
                        f"{name}.step: a {param.dtype} parameter of shape {list(param.shape)} has "
                        f"the float32 gradient of gradacc_kernels.attach, and {reason} one dtype "
                        "alone. Step float32 masters of the parameters: gradacc_kernels."
                        f"MasterParams(params, torch.optim.{name}, ...). SGD, Adagrad, Adadelta, "
                        "Adafactor and RMSprop take both dtypes, without fused=True."
                    )

        return followed

    def end(optimizer, args, kwargs):
        end_windows([param for group in optimizer.param_groups for param in group["params"]])

    register_optimizer_step_pre_hook(refuse)
    register_optimizer_step_post_hook(end)
