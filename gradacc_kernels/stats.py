"""Stats: what there is to know of a window, in one small copy from each device.

    norms[i] = sqrt(sum of grad_i^2) / divisor,   norm = sqrt(sum of norms^2)

Everything that is on a device is packed into one float64 tensor there, [n], and copied once: 8
bytes a parameter and a few numbers more, or those of several windows. What is made of it is
computed by the host, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    _sums: list[float] = field(repr=False)  # of squares of the elements, before the division
    _divisor: float = field(repr=False)

    @cached_property
    def norms(self) -> dict[str, float]:
        """The norm of each parameter that has a gradient, by its name."""
        return self._norms_of(range(len(self._names)))

    def largest(self, n: int = 5) -> dict[str, float]:
        """Returns the n largest norms of parameters, the largest first; NaN before all others."""
        sums = self._sums
        if not self.found_inf:
            indices = sorted(range(len(sums)), key=sums.__getitem__, reverse=True)
        else:
            indices = sorted(range(len(sums)), key=lambda i: (sums[i] == sums[i], -sums[i]))
        return self._norms_of(indices[:n])

    def _norms_of(self, indices: Iterable[int]) -> dict[str, float]:
        return {self._names[i]: math.sqrt(self._sums[i]) / self._divisor for i in indices}


class Snapshot:
    """A window as it is now: on its device, until :class:`Transfer` brings it to the host.

    A collective, where parameters are DTensors and there is something to measure.

    Args:
        attachment: whose window.
        closed: the window that was closed last, or None for the one under way.
        from_statistics: as for Accumulator.grad_norm.
        extras: more 0-dim tensors of any device, by their names, which travel with it.

    Attributes:
        parts: of (keys, values, stream): keys tell of the values, 1-d, on a device, whose stream
            was the current one; keys are names of parameters, or pairs of a kind and a name.

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
            ("number", "divisor"): divisor,
            ("number", "tokens"): tokens,
            ("number", "inv_scale"): attachment.groups[0].inv_scale,
            ("number", "skipped_windows"): window.skipped_windows,
            ("number", "skipped_micro_batches"): window.skipped_micro_batches,
        }
        numbers |= {("extra", name): value.reshape(()) for name, value in (extras or {}).items()}
        alike: dict[tuple, dict] = {}
        for key, value in numbers.items():
            if value is not None:
                alike.setdefault((value.device, value.dtype), {})[key] = value
        # The sums are this window's alone; of numbers that go on, stack makes copies.
        self.parts: list[tuple[list, Tensor, Any]] = [
            (keys, values, _stream_of(values))
            for keys, values in (
                *measured.parts,
                *((list(each), torch.stack(list(each.values()))) for each in alike.values()),
            )
        ]

    @property
    def is_of_cpu(self) -> bool:
        """Whether nothing of it is on a GPU."""
        return all(stream is None for _, _, stream in self.parts)

    def read(self, found: Iterable[tuple[list, list[float]]]) -> tuple[Stats, dict[str, float]]:
        """Returns it, and the extras, from the values of its parts."""
        names: list[str] = []
        sums: list[float] = []
        others: dict[str, dict[str, float]] = {"number": {}, "extra": {}}
        for keys, values in found:
            if isinstance(keys[0], str):
                names += keys
                sums += values
                continue
            for (kind, name), value in zip(keys, values, strict=True):
                others[kind][name] = value
        return self._stats(names, sums, others["number"]), others["extra"]

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
            _sums=sums,
            _divisor=divisor,
        )


def _stream_of(values: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(values.device) if values.is_cuda else None


class Transfer:
    """Snapshots on their way to the host: one copy of each stream. Making one waits for nothing.

    Args:
        snapshots: not empty.
    """

    @torch.no_grad()
    def __init__(self, snapshots: Sequence[Snapshot]):
        self._snapshots = snapshots
        by_stream: dict[Any, list[tuple[int, list, Tensor]]] = {}
        for index, snapshot in enumerate(snapshots):
            for keys, values, stream in snapshot.parts:
                by_stream.setdefault(stream, []).append((index, keys, values))
        self._copies = [_Copy(stream, members) for stream, members in by_stream.items()]

    def is_here(self) -> bool:
        """Tells whether :meth:`read` would wait for nothing."""
        return all(copy.is_here() for copy in self._copies)

    def read(self) -> list[tuple[Stats, dict[str, float]]]:
        """Returns each snapshot, and its extras; waits until they are here."""
        found: list[list[tuple[list, list[float]]]] = [[] for _ in self._snapshots]
        for copy in self._copies:
            for index, keys, values in copy.read():
                found[index].append((keys, values))
        return [each.read(parts) for each, parts in zip(self._snapshots, found, strict=True)]


class _Copy:
    """What was packed on one stream, as float64, and its copy to the host, which is under way."""

    def __init__(self, stream: Any, members: list[tuple[int, list, Tensor]]):
        # By dtype, of which torch.cat is one kernel: of several it is two for each tensor.
        members = sorted(members, key=lambda member: str(member[2].dtype))
        self._keys = [(index, keys) for index, keys, _ in members]
        alike = itertools.groupby((values for _, _, values in members), lambda v: v.dtype)
        with torch.cuda.stream(stream):  # of None it is nothing
            packed = torch.cat([torch.cat(list(group)).double() for _, group in alike])
            # Without a wait, torch copies into pinned memory, which is to be read after the event.
            self._host = packed.to("cpu", non_blocking=stream is not None)
        self._event = None if stream is None else stream.record_event()

    def is_here(self) -> bool:
        """Tells whether the copy has ended."""
        return self._event is None or self._event.query()

    def read(self) -> Iterator[tuple[int, list, list[float]]]:
        """Yields the number of the snapshot, keys and values; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        values = self._host.tolist()
        end = 0
        for index, keys in self._keys:
            begin, end = end, end + len(keys)
            yield index, keys, values[begin:end]
