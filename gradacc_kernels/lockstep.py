"""One all-reduce after each reduction: weights, and whether all ranks have reduced the same window.

What one rank reduces more often in a window than another would be averaged with the next window of
the other. 8 (R + 2) bytes over R ranks.
"""

from __future__ import annotations

import contextlib
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor


class Lockstep:
    """Compares which window the ranks of a process group reduce, and averages what goes with it.

    On the CPU a difference is found at once; on a GPU, where nothing waits, by a later call.

    Args:
        process_group: whose ranks reduce together.
        device: of the gradients.

    Attributes:
        windows: how many were reduced.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device):
        self.windows = 0
        self._process_group = process_group
        self._device = device
        self._last: int | None = None
        self._gathered: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

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
        if self._stream is None:
            here, there = None, contextlib.nullcontext()
        else:
            here, there = torch.cuda.current_stream(self._device), torch.cuda.stream(self._stream)
            self._stream.wait_stream(here)
        with there:
            everyone = values.new_zeros(size + len(values))
            everyone[rank].fill_(2 * self.windows + is_weighted)
            everyone[size:].copy_(values)
            work = dist.all_reduce(everyone, group=self._process_group, async_op=True)
            work.wait()
            means = everyone[size:] / size
            if here is None:
                self._gathered.append((everyone[:size], None))
            elif not torch.cuda.is_current_stream_capturing():
                self._gathered.append((everyone[:size].to("cpu", non_blocking=True), _event()))
        if here is not None and waits:
            here.wait_stream(self._stream)
            means.record_stream(here)
        return means, work

    def check(self) -> None:
        """Raises where what was gathered so far differs.

        Raises:
            RuntimeError: on all ranks.
        """
        while self._gathered and (self._gathered[0][1] is None or self._gathered[0][1].query()):
            states = self._gathered.popleft()[0].long().tolist()
            if len(set(states)) > 1:
                raise RuntimeError(_describe(states))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def _describe(states: list[int]) -> str:
    windows, are_weighted = zip(*(divmod(state, 2) for state in states), strict=True)
    if len(set(windows)) > 1:
        least, most = min(windows), max(windows)
        return (
            "gradacc_kernels: the ranks of the process group have averaged gradients of different "
            f"windows: rank {windows.index(least)} those of its window {least}, rank "
            f"{windows.index(most)} those of its window {most}. Every rank must run the same "
            "number of backwards that reduce in a window. Where ranks have different numbers of "
            "micro-batches, run all backwards inside of no_sync() and call reduce(), or step(), "
            "once a window. What the ranks hold differs now: restart them from a checkpoint"
        )
    return (
        f"gradacc_kernels: in window {windows[0]} rank {are_weighted.index(1)} has micro-batches "
        f"with weights, and rank {are_weighted.index(0)} none. Run all micro-batches inside of "
        "micro_batch(weight), and `with accumulator.micro_batch(0): pass` on a rank that has none"
    )
