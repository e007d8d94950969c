"""Monitor: a record of every window that is closed, written when its numbers have arrived.

When an optimizer's step closes a window, what a GPU has of it is kept there. Once a second a close
copies what has been kept to pinned memory, and the first later one at which it has arrived writes
it: nothing waits for the device but ``flush`` and ``close``.
"""

from __future__ import annotations

import numbers
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.sinks import Sink
from gradacc_kernels.stats import Snapshot, Stats, Transfer

LARGEST = 5
COPIES_EVERY = 1.0  # seconds: a copy of several windows takes the host as long as one of one
KEYS = (
    *("step", "time", "seconds", "norm", "largest", "found_inf", "nonfinite", "micro_batches"),
    *("tokens", "loss_scale", "skipped_windows", "skipped_micro_batches", "nbytes"),
    *("cuda_bytes", "cuda_peak_bytes"),
)


class Monitor:
    """Writes a record of each window that a step of an optimizer closes.

    Closed by :meth:`Accumulator.step`, ``gk.GradScaler.step``, or a stock ``optimizer.step()``; as
    :meth:`Accumulator.stats` tells of it. On the CPU a record is written at once. What a GPU has is
    copied once a second, and written at the first later close at which it has arrived, by
    :meth:`flush` or by :meth:`close`. Until it is closed, or its accumulator detached, the
    accumulator keeps it alive.

    A record is a dict of

    - ``step``: number of the window: first_step for the first
    - ``time``, ``seconds``: of the close: since the epoch, and since the one before
    - ``norm``: of the average, before :meth:`Accumulator.step` clips it; NaN where an element is
      not finite
    - ``largest``: the 5 largest norms, by the names of the parameters
    - ``found_inf``: whether an element is inf or NaN
    - ``nonfinite``: the names of the parameters that have one
    - ``micro_batches``: of the window, on this rank
    - ``tokens``: the sum of their weights, over all ranks; None without weights
    - ``loss_scale``: 1 / inv_scale: that of ``gk.GradScaler``
    - ``skipped_windows``, ``skipped_micro_batches``: since attach
    - ``nbytes``: of main gradients and their statistics
    - ``cuda_bytes``: allocated on the GPUs of the parameters; only where there are some
    - ``cuda_peak_bytes``: the most of it so far

    and what :meth:`log` adds.

    Args:
        accumulator: of :func:`attach`.
        sinks: ``gk.JsonLines``, ``gk.TensorBoard``, ``gk.Live``, or any objects with
            ``write(record)`` and ``close()``, which the Monitor owns. One that raises is told of by
            a warning, and gets no further record.
        first_step: the number of the first window, for a run that goes on.
        from_statistics: of a window that a stock step closes, believe the statistics of the pass,
            as :meth:`Accumulator.grad_norm` does. False reads its gradients: 4 bytes an element.
            Other closes have their norms already.
        all_ranks: write on every rank of torch.distributed, in place of the first alone. Every
            rank makes a Monitor in either case: of DTensors, norms are collectives.

    Raises:
        TypeError: no Accumulator, or a sink that is none.
        RuntimeError: the accumulator is detached.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        sinks: Iterable[Sink],
        *,
        first_step: int = 1,
        from_statistics: bool = False,
        all_ranks: bool = False,
    ):
        if not isinstance(accumulator, Accumulator):
            raise TypeError(
                "Monitor: expected the Accumulator that attach returned, got "
                f"{type(accumulator).__name__}"
            )
        sinks = list(sinks)
        for sink in sinks:
            if not (callable(getattr(sink, "write", None)) and hasattr(sink, "close")):
                raise TypeError(
                    "Monitor: expected sinks with write(record) and close(), as gk.JsonLines(path),"
                    f" got {type(sink).__name__}"
                )
        attachment = accumulator._attachment
        self._attachment = weakref.ref(attachment)
        self._from_statistics = from_statistics
        self._step = first_step
        self._extras: dict[str, Any] = {}
        self._before = time.perf_counter()
        self._writer = _Writer(sinks if all_ranks or _is_first_rank() else [])
        # Also at exit, and where model and Monitor are dropped.
        self._finalizer = weakref.finalize(self, self._writer.close)
        attachment.window.monitors.append(self)

    def log(self, **values: Any) -> None:
        """Adds values to the record of the window that is closed next; of a name the last counts.

        Args:
            **values: numbers, strings, None, or tensors of one element on any device, which are
                read when the window is closed, and not waited for.

        Raises:
            TypeError, ValueError: another value, or a name that every record has.
        """
        for name, value in values.items():
            if name in KEYS:
                raise ValueError(f"Monitor.log: every record has a {name!r}: choose another name")
            if isinstance(value, Tensor):
                if value.numel() != 1 or value.is_complex():
                    raise ValueError(
                        f"Monitor.log: {name} must be one real number, got a {value.dtype} tensor "
                        f"of shape {list(value.shape)}"
                    )
            elif not isinstance(value, (numbers.Real, str, type(None))):
                raise TypeError(
                    f"Monitor.log: {name} must be a number, a string or a tensor of one number, "
                    f"got {type(value).__name__}"
                )
        for name, value in values.items():
            self._extras[name] = value.detach() if isinstance(value, Tensor) else value

    def record(self, closed: Any) -> None:
        """Called by the accumulator when it has closed a window."""
        attachment = self._attachment()
        is_collective = any(group.is_sharded for group in attachment.groups)
        if not self._writer.sinks and not is_collective:
            return
        devices = {group.device for group in attachment.groups if group.device.type == "cuda"}
        if devices and torch.cuda.is_current_stream_capturing():
            return  # a graph would copy again with each replay, and no host code would read it
        extras, self._extras = self._extras, {}
        snapshot = Snapshot(
            attachment,
            closed,
            from_statistics=self._from_statistics,
            extras={name: value for name, value in extras.items() if isinstance(value, Tensor)},
        )
        now, before, self._before = time.perf_counter(), self._before, time.perf_counter()
        known = {"step": self._step, "time": time.time(), "seconds": now - before}
        self._step += 1
        memory = {}
        if devices:
            # torch.cuda.memory_allocated makes a sorted table of all statistics, twice.
            stats = map(torch.cuda.memory_stats_as_nested_dict, devices)
            allocated = [each["allocated_bytes"]["all"] for each in stats]
            memory["cuda_bytes"] = sum(each["current"] for each in allocated)
            memory["cuda_peak_bytes"] = sum(each["peak"] for each in allocated)
        self._writer.add(snapshot, known, memory | extras)

    def flush(self) -> None:
        """Writes the records of all windows that were closed; waits for their numbers."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left, closes the sinks, and leaves the accumulator; once."""
        attachment = self._attachment()
        if attachment is not None and self in attachment.window.monitors:
            attachment.window.monitors.remove(self)
        self._finalizer()

    def __enter__(self) -> Monitor:
        """Returns itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Closes."""
        self.close()


class _Writer:
    """The records that wait for their numbers, and the sinks. It may outlive its Monitor."""

    def __init__(self, sinks: list[Sink]):
        self.sinks = sinks
        self._kept: list[tuple[Snapshot, dict, dict]] = []
        self._under_way: deque[tuple[Transfer, list[tuple[Snapshot, dict, dict]]]] = deque()
        self._due = time.perf_counter()

    def add(self, snapshot: Snapshot, known: dict[str, Any], more: dict[str, Any]) -> None:
        """Takes a window, and writes what has arrived of those before."""
        if self.sinks:
            self._kept.append((snapshot, known, more))
            if snapshot.is_of_cpu or time.perf_counter() >= self._due:
                self._copy()
            self._write_arrived(waits=False)

    def flush(self) -> None:
        """Writes all windows; waits for their numbers."""
        self._copy()
        self._write_arrived(waits=True)

    def _copy(self) -> None:
        """Begins to copy what is kept."""
        kept, self._kept = self._kept, []
        if kept:
            self._under_way.append((Transfer([snapshot for snapshot, _, _ in kept]), kept))
        self._due = time.perf_counter() + COPIES_EVERY

    def _write_arrived(self, *, waits: bool) -> None:
        """Writes records, the oldest first."""
        while self._under_way and (waits or self._under_way[0][0].is_here()):
            transfer, kept = self._under_way.popleft()
            for (stats, extras), (_, known, more) in zip(transfer.read(), kept, strict=True):
                self._write(_record(stats, known, more | extras))

    def _write(self, record: dict[str, Any]) -> None:
        for sink in list(self.sinks):
            try:
                sink.write(record)
            except Exception as error:
                self._drop(sink, error)

    def _drop(self, sink: Sink, error: Exception) -> None:
        """Goes on without a sink that has failed."""
        self.sinks.remove(sink)
        with suppress(Exception):
            sink.close()
        warnings.warn(
            f"Monitor: {type(sink).__name__} raised {type(error).__name__}: {error}. It gets no "
            "further records",
            stacklevel=2,
        )

    def close(self) -> None:
        """Writes what is left, and closes the sinks."""
        self.flush()
        for sink in list(self.sinks):
            try:
                sink.close()
            except Exception as error:
                self._drop(sink, error)
        self.sinks.clear()


def _record(stats: Stats, known: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return known | {
        "norm": stats.norm,
        "largest": stats.largest(LARGEST),
        "found_inf": stats.found_inf,
        "nonfinite": list(stats.nonfinite),
        "micro_batches": stats.micro_batches,
        "tokens": stats.tokens,
        "loss_scale": stats.loss_scale,
        "skipped_windows": stats.skipped_windows,
        "skipped_micro_batches": stats.skipped_micro_batches,
        "nbytes": stats.nbytes,
        **more,
    }


def _is_first_rank() -> bool:
    distributed = torch.distributed
    is_one_of_many = distributed.is_available() and distributed.is_initialized()
    return not is_one_of_many or distributed.get_rank() == 0
