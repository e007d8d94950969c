"""The buckets of a flat buffer, averaged over ranks by torch.distributed while backward runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc_kernels import stalls
from gradacc_kernels.lockstep import Lockstep


class Observer(Protocol):
    """What wants to see what this rank has summed, before others are averaged into it."""

    def before_reduction(self, begin: int, end: int) -> None:
        """Called on the stream that reduces, with the bounds in flat of what is final."""


class Reducer:
    """Reduces the flat buffer of one group of parameters over the ranks of a process group.

    Args:
        flat: 1-D main gradients.
        ends: where the view of each parameter ends in it, with the gap after it.
        process_group: whose ranks hold equal parameters.
        reduce_dtype: in which gradients travel and are summed.
        bucket_bytes: of float32, at which a bucket is full; its last parameter may exceed it.

    Attributes:
        bucket_of: the bucket of each parameter. Bucket 0 holds the last parameters, whose gradients
            come first.
        has_reduced: whether a reduction has ended since this was last set to False.
        lockstep: compares which windows the ranks reduce; that of the attachment.
        observers: who is told of slices before they are reduced; held weakly.
        symmetric_bytes: of symmetric memory, which torch.cuda's statistics do not show.
    """

    symmetric_bytes = 0

    def __init__(
        self,
        flat: Tensor,
        ends: Sequence[int],
        process_group: dist.ProcessGroup,
        reduce_dtype: torch.dtype,
        bucket_bytes: int,
    ):
        self.process_group = process_group
        self.world_size = dist.get_world_size(process_group)
        self.bucket_bytes = bucket_bytes
        self.bucket_of, self._bounds = _bucket(ends, max(1, bucket_bytes // flat.itemsize))
        self._mains = [flat[begin:end] for begin, end in self._bounds]
        self._travelling = self._mains
        if reduce_dtype != flat.dtype:
            scratch = torch.empty_like(flat, dtype=reduce_dtype)
            self._travelling = [scratch[begin:end] for begin, end in self._bounds]
        # gloo has no average.
        self._averages = stalls.backend_of(process_group, flat.device) == "nccl"
        self._under_way: list[tuple[int, Any]] = []
        self._timeout = stalls.timeout_of(process_group, flat.device)
        self._watch: stalls.Watch | None = None
        if self._averages:
            self._watch = stalls.Watch(process_group, self._timeout)
        self.lockstep: Lockstep
        self.has_reduced = False
        self.windows = 0
        self._reduction = 0  # its number, once it has begun
        self.observers: weakref.WeakSet[Observer] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes beside the main gradients."""
        return 0 if self._travelling is self._mains else sum(t.nbytes for t in self._travelling)

    def launch(self, first: int, last: int) -> None:
        """Begins to reduce buckets, on the current stream."""
        if first == 0:
            self._reduction = stalls.next_reduction(self.process_group)
        for observer in self.observers:
            observer.before_reduction(self._bounds[last - 1][0], self._bounds[first][1])
        for bucket in range(first, last):
            with self._telling(bucket):
                self._under_way.append((bucket, self._begin(bucket)))

    def wait(self) -> None:
        """Has the current stream wait for what was launched, and brings it into the main gradients.

        On the CPU the caller waits.
        """
        under_way, self._under_way = self._under_way, []
        for bucket, work in under_way:
            with self._telling(bucket):
                work.wait()
            self._finish(bucket)
        self.has_reduced = True
        self.windows += 1

    def exchange(self, window: int, is_weighted: bool, values: Tensor, waits: bool) -> Tensor:
        """Returns the means of what goes with a window that was reduced: see Lockstep.

        Raises:
            RuntimeError: the ranks have reduced different windows.
        """
        with self._telling(None):
            means, work = self.lockstep.exchange(window, is_weighted, values, waits)
            self._watched(work, None)
        self.lockstep.check()
        return means

    def _begin(self, bucket: int) -> Any:
        """Begins to reduce a bucket; returns what can be waited for, as a dist.Work."""
        travelling = self._travelling[bucket]
        if travelling is not self._mains[bucket]:
            travelling.copy_(self._mains[bucket])
        operation = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        work = dist.all_reduce(travelling, operation, self.process_group, async_op=True)
        return self._watched(work, bucket)

    def _finish(self, bucket: int) -> None:
        """Brings what was reduced into the main gradients."""
        main, travelled = self._mains[bucket], self._travelling[bucket]
        if travelled is not main:
            main.copy_(travelled)
        if not self._averages:
            main.mul_(1 / self.world_size)

    def _watched(self, work: Any, bucket: int | None) -> Any:
        # One that is captured into a CUDA graph never ends, nor may it be asked.
        if self._watch is not None and not torch.cuda.is_current_stream_capturing():
            self._watch.add(self._reduction, self._name(bucket), work)
        return work

    def _name(self, bucket: int | None) -> str:
        """What of a reduction is under way; None follows the buckets."""
        if bucket is None:
            return "the number and weight of the window"
        return f"bucket {bucket} of {len(self._mains)}"

    @contextlib.contextmanager
    def _telling(self, bucket: int | None) -> Iterator[None]:
        """Says which bucket and which ranks it was where a collective fails."""
        if self._watch is not None and self._watch.failure is not None:
            raise RuntimeError(self._watch.failure)
        try:
            yield
        except RuntimeError as error:
            what, number = self._name(bucket), self._reduction
            missing = stalls.missing_after_error(self.process_group, number)
            raise RuntimeError(
                f"gradacc_kernels: rank {dist.get_rank(self.process_group)} could not reduce "
                f"{what} in reduction {number}: {missing}. What the ranks hold differs now: "
                f"restart them from a checkpoint ({error})"
            ) from error


def _bucket(ends: Sequence[int], elements: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Cuts a buffer into slices, from its end on.

    A parameter that fills a bucket has one of its own: others need not wait for its gradient.

    Returns:
        The bucket of each parameter, and the bounds of each bucket.
    """
    bucket_of = [0] * len(ends)
    bounds: list[tuple[int, int]] = []
    last = ends[-1]
    for index in reversed(range(len(ends))):
        begin, end = ends[index - 1] if index else 0, ends[index]
        if end - begin >= elements and end < last:
            bounds.append((end, last))
            last = end
        bucket_of[index] = len(bounds)
        if last - begin >= elements or index == 0:
            bounds.append((begin, last))
            last = begin
    return bucket_of, bounds
