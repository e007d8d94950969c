"""Norms and overflow verdicts of main gradients, from the slots of the pass or from one more pass.

norm = sqrt(sum of grad^2) over parameters; found_inf = 1 where an element is not finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels import checks, ops


@dataclass(frozen=True)
class Statistics:
    """Of the gradients of some parameters, as they stand in ``.grad``.

    Attributes:
        sums: by parameter name, the 0-dim sum of squares; NaN where an element is not finite.
        norm: 0-dim, on the device of the first group; NaN as the sums.
        found_inf: 0-dim float32 on that device: 1 where the norm is NaN, else 0.
    """

    sums: dict[str, Tensor]
    norm: Tensor
    found_inf: Tensor


def measure(
    attachment: Any, *, from_slots: bool, params: Iterable[Tensor] | None = None
) -> Statistics:
    """Measures the gradients of covered parameters. No host sync where all are on one device.

    Args:
        attachment: of which parameters.
        from_slots: read the slots of those whose version counter has not moved since the pass.
        params: only these; None for all.
    """
    wanted = None if params is None else set(map(id, params))
    device = attachment.groups[0].device
    sums, norms, verdicts = {}, [], []
    for group in attachment.groups:
        grads, slots = {}, {}
        for index, name in enumerate(group.names):
            param = attachment.params[name]
            if param.grad is None or (wanted is not None and id(param) not in wanted):
                continue
            if from_slots and group.hooks.statistics_valid(index):
                slots[name] = group.buffer.slots[index]
            else:
                grads[name] = as_main(param.grad.detach(), group.dtype)
        for tensors, kind in ((grads, "main_grads"), (slots, "partials")):
            if not tensors:
                continue
            each, norm, verdict = ops.grad_stats(
                **{kind: list(tensors.values())}, backend=group.backend
            )
            sums.update(zip(tensors, each.unbind(), strict=True))
            # A copy to the CPU that does not wait would be read before it is there.
            is_free = device.type != "cpu"
            norms.append(norm.to(device, non_blocking=is_free))
            verdicts.append(verdict.to(device, non_blocking=is_free))
    if not norms:
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return Statistics(sums, zero, zero.clone())
    if len(norms) == 1:
        return Statistics(sums, norms[0], verdicts[0])
    dtype = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    norm = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]))
    return Statistics(sums, norm, torch.stack(verdicts).amax())


def as_main(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that grad_stats takes, for whatever the user may have put into ``.grad``."""
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    grad = grad.to(dtype)
    return grad if grad.numel() == 0 or checks.is_dense(grad) else grad.contiguous()


@torch.no_grad()
def scale_grads_(attachment: Any, factor: Tensor) -> None:
    """Multiplies ``.grad`` of all covered parameters: grad = grad * factor.

    8 bytes an element; none, decided on the device, where the factor is 1.

    Args:
        attachment: of which parameters.
        factor: 0-dim float64, on the device of the first group.
    """
    for group in attachment.groups:
        mains, others = [], []
        for name in group.names:
            grad = attachment.params[name].grad
            if grad is not None:
                (mains if _is_main(grad) else others).append(grad)
        local = factor.to(group.device, non_blocking=group.device.type != "cpu")
        if mains:
            ops.scale_(mains, local.float(), backend=group.backend)
        for grad in others:
            grad.mul_(local)


def _is_main(grad: Tensor) -> bool:
    is_plain = grad.dtype == torch.float32 and grad.layout == torch.strided
    return is_plain and (grad.is_contiguous() or checks.is_dense(grad))


def are_nonfinite(grads: list[Tensor]) -> Tensor:
    """1 where an element of these gradients is inf or NaN, else 0: 0-dim float32 of their device.

    One pass of 2 bytes an element over 16-bit gradients.
    """
    grads = [grad for grad in grads if grad.numel()]
    largest = torch._foreach_norm(grads, torch.inf)
    return torch.stack([value.float() for value in largest]).isfinite().all().logical_not().float()
