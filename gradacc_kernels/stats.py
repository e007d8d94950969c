"""Stats: what there is to know of a window, in one small copy from each device.

    norms[i] = sqrt(sum of grad_i^2) / divisor,   norm = sqrt(sum of norms^2)

Everything that is on a device is packed into one float64 tensor there, [n], and copied once: 8
bytes a parameter and a few numbers more. What is made of it is computed by the host, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels.statistics import measure
from gradacc_kernels.window import Closed


@dataclass(frozen=True)
class Stats:
    """What :meth:`Accumulator.stats` returns: numbers of the host.

    Attributes:
        is_closed: whether the window is one that a step of an optimizer has closed.
        norm: of all gradients, of the average; NaN where an element is not finite.
        found_inf: whether an element of a gradient is inf or NaN.
        nonfinite: the names of the parameters that have such an element.
        micro_batches: how many backwards the window has had, on this rank.
        tokens: the sum of their weights, which is the effective batch size; None without weights.
            Of all ranks, once the window is reduced over a process group.
        loss_scale: 1 / inv_scale as it is now: that of ``gk.GradScaler``.
        scale: the factor of attach.
        nbytes: bytes of device memory held for main gradients and their statistics.
        windows: how many have ended since attach, by a step of any optimizer.
        skipped_windows: of those that ``step`` or a ``gk.GradScaler`` has closed.
        skipped_micro_batches: dropped since attach by ``nonfinite="skip_micro_batch"``.
    """

    is_closed: bool
    norm: float
    found_inf: bool
    nonfinite: tuple[str, ...]
    micro_batches: int
    tokens: float | None
    loss_scale: float
    scale: float
    nbytes: int
    windows: int
    skipped_windows: int
    skipped_micro_batches: int
    _names: list[str] = field(repr=False)
    _norms: list[float] = field(repr=False)

    @cached_property
    def norms(self) -> dict[str, float]:
        """The norm of each parameter that has a gradient, by its name."""
        return dict(zip(self._names, self._norms, strict=True))

    def largest(self, n: int = 5) -> dict[str, float]:
        """Returns the n largest norms of parameters, the largest first; NaN before all others."""
        norms = self._norms
        if not self.found_inf:
            indices = sorted(range(len(norms)), key=norms.__getitem__, reverse=True)
        else:
            indices = sorted(range(len(norms)), key=lambda i: (norms[i] == norms[i], -norms[i]))
        return {self._names[index]: norms[index] for index in indices[:n]}


class Snapshot:
    """A window as it is now, on its way to the host. Making one waits for nothing on a GPU.

    A collective, where parameters are DTensors and there is something to measure.

    Args:
        attachment: whose window.
        closed: the window that was closed last, or None for the one under way.
        from_statistics: as for Accumulator.grad_norm.
        extras: more 0-dim tensors of any device, by their names, which travel with it.

    Raises:
        RuntimeError: there is no average.
    """

    @torch.no_grad()
    def __init__(
        self,
        attachment: Any,
        closed: Closed | None,
        *,
        from_statistics: bool,
        extras: Mapping[str, Tensor] | None = None,
    ):
        window = attachment.window
        if closed is None:
            divisor = window.divisor()
            tokens = window.total_weight() if window.is_weighted else None
            self._micro_batches = attachment.micro_batches()
        else:
            divisor, tokens = closed.divisor, closed.tokens
            self._micro_batches = closed.micro_batches
        measured = None if closed is None else closed.measured
        if measured is None:
            measured = measure(attachment, from_slots=from_statistics)
        self._is_closed = closed is not None
        self._windows = window.ended
        self._scale = attachment.scale
        self._nbytes = attachment.nbytes()
        numbers = {
            "divisor": divisor,
            "tokens": tokens,
            "inv_scale": attachment.groups[0].inv_scale,
            "skipped_windows": window.skipped_windows,
            "skipped_micro_batches": window.skipped_micro_batches,
        }
        pieces = [("sum", names, sums) for names, sums in measured.parts]
        pieces += [("number", [k], v) for k, v in numbers.items() if v is not None]
        pieces += [("extra", [k], v) for k, v in (extras or {}).items()]
        by_device: dict[torch.device, list] = {}
        for piece in pieces:
            by_device.setdefault(piece[2].device, []).append(piece)
        self._copies = [_Copy(members) for members in by_device.values()]

    def is_here(self) -> bool:
        """Tells whether :meth:`read` would wait for nothing."""
        return all(copy.is_here() for copy in self._copies)

    def read(self) -> tuple[Stats, dict[str, float]]:
        """Returns it, and the extras; waits until they are here."""
        names: list[str] = []
        sums: list[float] = []
        found: dict[str, dict[str, float]] = {"number": {}, "extra": {}}
        for copy in self._copies:
            for kind, keys, values in copy.read():
                if kind == "sum":
                    names += keys
                    sums += values
                else:
                    found[kind][keys[0]] = values[0]
        return self._stats(names, sums, found["number"]), found["extra"]

    def _stats(self, names: list[str], sums: list[float], numbers: dict[str, float]) -> Stats:
        divisor = numbers.get("divisor", 1.0)
        total = sum(sums)
        nonfinite: tuple[str, ...] = ()
        if math.isnan(total):
            nonfinite = tuple(n for n, value in zip(names, sums, strict=True) if math.isnan(value))
        inv_scale = numbers["inv_scale"]
        return Stats(
            is_closed=self._is_closed,
            norm=math.sqrt(total) / divisor,
            found_inf=bool(nonfinite),
            nonfinite=nonfinite,
            micro_batches=self._micro_batches,
            tokens=numbers.get("tokens"),
            loss_scale=1 / inv_scale if inv_scale else math.inf,
            scale=self._scale,
            nbytes=self._nbytes,
            windows=self._windows,
            skipped_windows=int(numbers["skipped_windows"]),
            skipped_micro_batches=int(numbers["skipped_micro_batches"]),
            _names=names,
            _norms=[math.sqrt(value) / divisor for value in sums],
        )


class _Copy:
    """What one device has of a snapshot, and its copy to the host, which is under way."""

    def __init__(self, members: list[tuple[str, list[str], Tensor]]):
        self._members = [(kind, keys) for kind, keys, _ in members]
        size, device = sum(len(keys) for _, keys in self._members), members[0][2].device
        packed = torch.empty(size, dtype=torch.float64, device=device)
        torch.cat([values.reshape(-1) for _, _, values in members], out=packed)
        self._event: torch.cuda.Event | None = None
        # Without a wait, torch copies into pinned memory, which is to be read after the event.
        self._host = packed.to("cpu", non_blocking=device.type == "cuda")
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()

    def is_here(self) -> bool:
        """Tells whether the copy has ended."""
        return self._event is None or self._event.query()

    def read(self) -> Iterator[tuple[str, list[str], list[float]]]:
        """Yields kinds and names with their numbers; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        values = self._host.tolist()
        end = 0
        for kind, keys in self._members:
            begin, end = end, end + len(keys)
            yield kind, keys, values[begin:end]
