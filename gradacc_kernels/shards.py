"""Parameters shared out over ranks: one of them steps each, and sends it to the others.

    owner:   param = round(step(master, grad))
    others:  param = what the owner has

Whole parameters are shared out, the largest first, each to the rank that has the fewest elements so
far, so that any optimizer that steps every parameter by itself steps its part as it would step all.

Bytes over the wire, an element and rank: (R - 1) / R times the parameter's, once a step. A large
parameter travels from where it lies to where it lies; small ones travel together, in a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc_kernels import buffer, checks
from gradacc_kernels.distributed import check_alike, check_process_group

# From where on a copy costs more than what a message of its own does.
LARGE_BYTES = 1 << 20


class Shards:
    """Which rank of a process group owns each parameter.

    Args:
        process_group: whose ranks hold equal parameters.
    """

    def __init__(self, process_group: dist.ProcessGroup):
        self._process_group = process_group
        self._rank = dist.get_rank(process_group)
        self._elements = [0] * dist.get_world_size(process_group)
        self._owners: dict[Tensor, int] = {}

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self._elements)

    def share_out(self, groups: Sequence[Sequence[Tensor]], options: dict[str, Any]) -> None:
        """Gives every parameter that has no owner one: the same on every rank.

        Args:
            groups: of parameters.
            options: what else has to be equal on all ranks.

        Raises:
            ValueError: the ranks have different parameters; nothing was changed.
        """
        named = {f"{i}.{j}": p for i, group in enumerate(groups) for j, p in enumerate(group)}
        check_alike("MasterParams", named, options, self._process_group)
        params = [param for param in named.values() if param not in self._owners]
        owners = {}
        for param in sorted(params, key=Tensor.numel, reverse=True):
            owners[param] = self._elements.index(min(self._elements))
            self._elements[owners[param]] += param.numel()
        # In the order of the groups: every rank sends and receives in this one.
        self._owners.update((param, owners[param]) for param in params)

    def take_back(self, params: Iterable[Tensor]) -> None:
        """Has parameters that were shared out last be without an owner."""
        for param in params:
            owner = self._owners.pop(param, None)
            if owner is not None:
                self._elements[owner] -= param.numel()

    def owns(self, param: Tensor) -> bool:
        """Whether this rank owns a parameter."""
        return self._owners[param] == self._rank

    @torch.no_grad()
    def exchange(self) -> None:
        """Gives all parameters the values that they have on their owners, on every rank.

        The current stream waits for it; on the CPU the caller does.
        """
        if len(self._elements) == 1:
            return
        under_way, packed = [], []
        small: dict[tuple, list[Tensor]] = {}
        for param, owner in self._owners.items():
            if param.nbytes >= LARGE_BYTES and checks.is_dense(param):
                values = param.detach().as_strided((param.numel(),), (1,))
                under_way.append(self._send(values, owner))
            elif param.numel():
                small.setdefault((owner, param.dtype, param.device), []).append(param)
        for (owner, dtype, _), params in small.items():
            flat, views = buffer.lay_out(params, dtype)
            if owner == self._rank:
                torch._foreach_copy_(views, [param.detach() for param in params])
            else:
                packed.append((params, views))
            under_way.append(self._send(flat, owner))
        for work in under_way:
            work.wait()
        for params, views in packed:
            torch._foreach_copy_([param.detach() for param in params], views)
        # A collective moves no version counter.
        torch.autograd.graph.increment_version(
            [param for param, owner in self._owners.items() if owner != self._rank]
        )

    def _send(self, flat: Tensor, owner: int) -> dist.Work:
        # As bytes: not every backend takes every dtype.
        return dist.broadcast(
            flat.view(torch.uint8), group=self._process_group, group_src=owner, async_op=True
        )


def shards_of(zero: Any, process_group: Any) -> Shards | None:
    """Returns what the arguments of MasterParams ask for; None where nothing is shared out.

    Raises:
        TypeError, ValueError, RuntimeError: as MasterParams.
    """
    if not isinstance(zero, bool):
        raise TypeError(f"MasterParams: zero must be True or False, got {zero!r}")
    if not zero:
        if process_group is not None:
            raise ValueError(
                "MasterParams: process_group is whose ranks share the state: pass zero=True too"
            )
        return None
    if process_group is None and dist.is_available() and dist.is_initialized():
        process_group = dist.group.WORLD
    check_process_group("MasterParams", "zero=True", process_group)
    return Shards(process_group)
