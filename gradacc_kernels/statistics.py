"""Norms and overflow verdicts of main gradients, from the slots of the pass or from one more pass.

norm = sqrt(sum of grad^2) over parameters; found_inf = 1 where an element is not finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels.python_hook import Measured
from gradacc_kernels.sharded import sum_over_mesh


@dataclass(frozen=True)
class Statistics:
    """Of the gradients of some parameters, as they stand in ``.grad``.

    Attributes:
        parts: names of parameters, and the sums of squares of theirs, of shape [n]; NaN where an
            element is not finite.
        norm: 0-dim, on the device of the first group; NaN as the sums.
        found_inf: 0-dim float32 on that device: 1 where the norm is NaN, else 0.
    """

    parts: list[tuple[list[str], Tensor]]
    norm: Tensor
    found_inf: Tensor

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sum of squares of each parameter by its name, 0-dim, on its device."""
        return {
            name: value
            for names, sums in self.parts
            for name, value in zip(names, sums.unbind(), strict=True)
        }


def measure(
    attachment: Any, *, from_slots: bool, params: Iterable[Tensor] | None = None
) -> Statistics:
    """Measures the gradients of covered parameters. No host sync where all are on one device.

    A collective, where some are DTensors: every rank of their meshes calls it, or none.

    Args:
        attachment: of which parameters.
        from_slots: read the slots of those whose version counter has not moved since the pass.
        params: only these; None for all.
    """
    wanted = None if params is None else set(map(id, params))
    device = attachment.groups[0].device
    parts, norms, verdicts = [], [], []
    for group in attachment.groups:
        indices = None
        if wanted is not None:
            named = enumerate(map(attachment.params.get, group.names))
            indices = [index for index, param in named if id(param) in wanted]
        measured = group.hooks.measure(from_slots, indices)
        if group.is_sharded and measured:
            measured = [_over_mesh(attachment, group, measured)]
        for part in measured:
            parts.append(([group.names[index] for index in part.indices], part.sums))
            # A copy to the CPU that does not wait would be read before it is there.
            is_free = device.type != "cpu"
            norms.append(part.norm.to(device, non_blocking=is_free))
            verdicts.append(part.found_inf.to(device, non_blocking=is_free))
    if not norms:
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return Statistics(parts, zero, zero.clone())
    if len(norms) == 1:
        return Statistics(parts, norms[0], verdicts[0])
    dtype = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    norm = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]))
    return Statistics(parts, norm, torch.stack(verdicts).amax())


def _over_mesh(attachment: Any, group: Any, measured: list[Measured]) -> Measured:
    """Puts the parts of a group together, and adds what the ranks of its meshes have.

    In the order of the parameters: which of the parts one is in may differ from rank to rank.
    """
    sums = {
        index: value
        for part in measured
        for index, value in zip(part.indices, part.sums.unbind(), strict=True)
    }
    indices = sorted(sums)
    params = [attachment.params[group.names[index]] for index in indices]
    total = sum_over_mesh(params, torch.stack([sums[index] for index in indices]))
    norm = total.sum().sqrt()
    return Measured(indices, total, norm, norm.isnan().float())


def scale_grads_(attachment: Any, factor: Tensor) -> None:
    """Multiplies ``.grad`` of all covered parameters: grad = grad * factor.

    8 bytes an element; none, decided on the device, where the factor is 1.

    Args:
        attachment: of which parameters.
        factor: 0-dim float32 or float64, on the device of the first group.
    """
    for group in attachment.groups:
        group.hooks.scale(factor.to(group.device, non_blocking=group.device.type != "cpu"))


def are_nonfinite(grads: list[Tensor]) -> Tensor:
    """1 where an element of these gradients is inf or NaN, else 0: 0-dim float32 of their device.

    One pass of 2 bytes an element over 16-bit gradients.
    """
    device, grads = grads[0].device, [grad for grad in grads if grad.numel()]
    if not grads:
        return torch.zeros((), dtype=torch.float32, device=device)
    largest = torch._foreach_norm(grads, torch.inf)
    return torch.stack([value.float() for value in largest]).isfinite().all().logical_not().float()
