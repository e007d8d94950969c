"""One all-reduce after each reduction: weights, and whether all ranks have reduced the same window.

What one rank reduces more often in a window than another would be averaged with the next window of
the other. 8 (R + 2) bytes over R ranks.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_attachments: Counter[str] = Counter()  # of each process group, by its name


class _State(NamedTuple):
    """What all ranks have to agree on, as a number that float64 holds."""

    attachment: int
    window: int
    is_weighted: bool

    def pack(self) -> int:
        return self.attachment << 33 | self.window << 1 | self.is_weighted

    @classmethod
    def unpack(cls, number: float) -> _State:
        whole = int(number)
        return cls(whole >> 33, whole >> 1 & 0xFFFFFFFF, bool(whole & 1))


class Lockstep:
    """Compares which window the ranks of a process group reduce, and averages what goes with it.

    On the CPU a difference is found at once; on a GPU, where nothing waits, by a later call.

    Args:
        process_group: whose ranks reduce together, and make as many of these.

    Attributes:
        attachment: its number, the same on all ranks.
        windows: how many were reduced.
    """

    def __init__(self, process_group: dist.ProcessGroup):
        _attachments[process_group.group_name] += 1
        self.attachment = _attachments[process_group.group_name]
        self.windows = 0
        self._process_group = process_group
        self._last: int | None = None
        self._gathered: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def restart(self) -> None:
        """Tells that numbers of windows begin anew."""
        self._last = None

    def exchange(
        self, window: int, is_weighted: bool, values: Tensor, waits: bool
    ) -> tuple[Tensor, dist.Work]:
        """Begins to compare a reduction, on a stream that follows the current one.

        Args:
            window: its number, as this rank counts: one that has changed is that of a new window.
            is_weighted: whether its micro-batches have weights.
            values: float64, 1-D.
            waits: whether the current stream waits.

        Returns:
            The means of the values over the ranks, and what has been launched.
        """
        if window != self._last:
            self._last, self.windows = window, self.windows + 1
        size, rank = dist.get_world_size(self._process_group), dist.get_rank(self._process_group)
        here, there, is_captured = None, contextlib.nullcontext(), False
        if values.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(values.device)
            here, there = torch.cuda.current_stream(values.device), torch.cuda.stream(self._stream)
            is_captured = torch.cuda.is_current_stream_capturing()
            self._stream.wait_stream(here)
            values.record_stream(self._stream)
        with there:
            everyone = values.new_zeros(size + len(values))
            everyone[rank].fill_(_State(self.attachment, self.windows, is_weighted).pack())
            everyone[size:].copy_(values)
            work = dist.all_reduce(everyone, group=self._process_group, async_op=True)
            work.wait()
            means = everyone[size:] / size
            if here is None:
                self._gathered.append((everyone[:size], None))
            elif not is_captured:
                self._gathered.append((everyone[:size].to("cpu", non_blocking=True), _event()))
        if here is not None and (waits or is_captured):
            here.wait_stream(self._stream)
            means.record_stream(here)
        return means, work

    def check(self) -> None:
        """Raises where what was gathered so far differs.

        Raises:
            RuntimeError: on all ranks.
        """
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            return  # an event must not be asked then
        while self._gathered and self._is_known(self._gathered[0][1]):
            states = list(map(_State.unpack, self._gathered.popleft()[0].tolist()))
            if len(set(states)) > 1:
                raise RuntimeError(_describe(states))

    def _is_known(self, event: torch.cuda.Event | None) -> bool:
        # The newest is known by chance. Ranks that raise do so after as many collectives.
        return event is None or (len(self._gathered) > 1 and event.query())


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def _describe(states: list[_State]) -> str:
    attachments, windows, are_weighted = zip(*states, strict=True)
    restart = "What the ranks hold differs now: restart them from a checkpoint"
    if len(set(attachments)) > 1:
        return (
            "gradacc_kernels: the ranks of the process group have averaged gradients of different "
            f"attachments: {_extremes(attachments)}. Where the gradients of several arrive in one "
            "backward, and not in the same order on all ranks, each needs a process group of its "
            f"own, by torch.distributed.new_group(). {restart}"
        )
    if len(set(windows)) > 1:
        return (
            "gradacc_kernels: the ranks of the process group have averaged gradients of different "
            f"windows: {_extremes(windows)}. Every rank must run the same number of backwards that "
            "reduce in a window. Where ranks have different numbers of micro-batches, run all "
            f"backwards inside of no_sync() and call reduce(), or step(), once a window. {restart}"
        )
    some, others = are_weighted.index(True), are_weighted.index(False)
    return (
        f"gradacc_kernels: in window {windows[0]} rank {some} has micro-batches with weights, and "
        f"rank {others} none. Run all micro-batches inside of micro_batch(weight), and `with "
        "accumulator.micro_batch(0): pass` on a rank that has none"
    )


def _extremes(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    ranks = numbers.index(low), numbers.index(high)
    return f"rank {ranks[0]} those of its number {low}, rank {ranks[1]} those of its number {high}"
