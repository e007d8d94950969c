"""Which rank is missing where the others wait for it: an error that names it, and no hang.

gloo raises where a rank dies or lags, and whoever catches that asks ``missing_after_error``. Under
NCCL it is the GPU that waits: nothing is raised, and at the timeout of the process group its
watchdog ends the process, by a message that knows no bucket. A Watch tells shortly before.

Ranks tell each other in which reduction they wait, by a key each in the store of torch.distributed,
which is asked only when something is wrong.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

LISTENS = 5.0  # seconds, a rank whose reduction failed, for the others to say the same
MARGIN = 10.0  # seconds before the timeout of NCCL at which a Watch tells
NAP = 5.0  # seconds for which a Watch's thread may outlive it
DEFAULT_TIMEOUT = 600.0  # torch's, of NCCL

# A DistError is a RuntimeError; a group that was destroyed is a KeyError.
_NO_STORE = (RuntimeError, ValueError, AttributeError, KeyError)
_log = logging.getLogger("gradacc_kernels")
_reductions: Counter[str] = Counter()  # of each process group, by its name


def next_reduction(process_group: dist.ProcessGroup) -> int:
    """Returns the number of a reduction that begins, the same on all ranks of a process group.

    Whoever reduces over it counts on: those of several attachments differ.
    """
    _reductions[process_group.group_name] += 1
    return _reductions[process_group.group_name]


def missing_after_error(process_group: dist.ProcessGroup, reduction: int) -> str:
    """Says which ranks do not answer, after an error of a reduction: waits LISTENS for them."""
    try:
        _say(process_group, reduction)
        silent, end = dist.get_process_group_ranks(process_group), time.monotonic() + LISTENS
        while silent and time.monotonic() < end:
            silent = _silent(process_group, reduction, silent)
            time.sleep(0.05)
        # Where a rank died, those that wait for the ones that noticed are silent too.
        silent = [rank for rank in silent if _is_cut_off(process_group, rank)] or silent
    except _NO_STORE as error:
        return _no_answer(error)
    return _describe(silent, "all ranks failed")


def _no_answer(error: Exception) -> str:
    return f"the store of the process group does not answer (rank 0 may be gone: {error})"


def _describe(silent: Sequence[int], nobody: str) -> str:
    if not silent:
        return nobody
    return f"rank {', '.join(map(str, silent))} did not come as far, or is gone"


def _store() -> dist.Store:
    return dist.PrefixStore("gradacc_kernels", dist.distributed_c10d._get_default_store())


def _key(process_group: dist.ProcessGroup, rank: int) -> str:
    return f"{process_group.group_name}/{rank}"


def _say(process_group: dist.ProcessGroup, reduction: int) -> None:
    _store().set(_key(process_group, dist.get_rank()), str(reduction))


def _silent(
    process_group: dist.ProcessGroup, reduction: int, ranks: Sequence[int] | None = None
) -> list[int]:
    """The ranks that have not said that they wait in a reduction, or in a later one."""
    store = _store()
    ranks = dist.get_process_group_ranks(process_group) if ranks is None else ranks
    keys = {rank: _key(process_group, rank) for rank in ranks}
    said = {rank: int(store.get(key)) for rank, key in keys.items() if store.check([key])}
    return [rank for rank in ranks if said.get(rank, 0) < reduction]


def _is_cut_off(process_group: dist.ProcessGroup, rank: int) -> bool:
    """Whether gloo's connection to a rank is closed; elsewhere nobody knows."""
    if backend_of(process_group, torch.device("cpu")) != "gloo":
        return False
    try:
        process_group.send([torch.zeros(1)], dist.get_group_rank(process_group, rank), 0)
    except RuntimeError:
        return True
    return False


def backend_of(process_group: dist.ProcessGroup, device: torch.device) -> str:
    """Returns what serves tensors of a device in a process group, which may have several: nccl."""
    try:
        return process_group._get_backend(device).name()
    except (AttributeError, RuntimeError):
        return dist.get_backend(process_group)


def timeout_of(process_group: dist.ProcessGroup, device: torch.device) -> float:
    """Returns the seconds after which a process group gives a collective up."""
    try:
        return process_group._get_backend(device).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return DEFAULT_TIMEOUT


class _UnderWay(NamedTuple):
    reduction: int
    what: str
    work: Any
    began: float


class Watch:
    """Notices reductions that do not end, from a thread of its own, and logs one error.

    A launch costs an append, and the first of a reduction a query of an event. The thread sleeps
    until a reduction is half as old as it may become; one that has not ended then it makes known
    in the store. ``tells_after`` seconds after its launch it logs which ranks have not done so.
    It holds this object weakly, and ends with it.

    Args:
        process_group: whose ranks wait for each other.
        timeout: seconds, of the process group.

    Attributes:
        failure: the error that was logged; None before.
        tells_after: seconds.
    """

    def __init__(self, process_group: dist.ProcessGroup, timeout: float):
        self.failure: str | None = None
        self.tells_after = timeout - min(MARGIN, timeout / 2)
        self._process_group = process_group
        self._under_way: deque[_UnderWay] = deque()
        self._said: _UnderWay | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, reduction: int, what: str, work: Any) -> None:
        """Watches a collective that was just launched; they end in the order of their launches.

        Args:
            reduction: its number, the same on all ranks.
            what: is reduced, in words.
            work: with ``is_completed()``.
        """
        with self._lock:
            last = self._under_way[-1] if self._under_way else None
            if last is not None and last.reduction != reduction:
                self._forget(last)
            self._under_way.append(_UnderWay(reduction, what, work, time.monotonic()))
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), daemon=True)
            self._thread.start()

    def _forget(self, last: _UnderWay) -> None:
        """Forgets what has ended: all, or what the device has done while the host ran ahead."""
        if last.work.is_completed():
            self._under_way.clear()
        while self._under_way and self._under_way[0].work.is_completed():
            self._under_way.popleft()

    def look(self) -> float | None:
        """Looks after the oldest collective.

        Returns:
            The seconds until the next look; None for never, once a failure was told.
        """
        half = self.tells_after / 2
        while True:
            with self._lock:
                oldest = self._under_way[0] if self._under_way else None
            if oldest is None:
                return half
            age = time.monotonic() - oldest.began
            if age < half:
                return half - age
            # Queried as rarely as that, since a CUDA graph may be under capture in another thread.
            if oldest.work.is_completed():
                with self._lock:
                    if self._under_way and self._under_way[0] is oldest:
                        self._under_way.popleft()
                continue
            if age >= self.tells_after:
                self._fail(oldest)
                return None
            if self._said is not oldest:
                self._make_known(oldest)
            return self.tells_after - age

    def _make_known(self, oldest: _UnderWay) -> None:
        self._said = oldest
        try:
            _say(self._process_group, oldest.reduction)
        except _NO_STORE as error:
            _log.warning("gradacc_kernels: %s", _no_answer(error))

    def _fail(self, oldest: _UnderWay) -> None:
        try:
            silent = _silent(self._process_group, oldest.reduction)
            missing = _describe(silent, "all ranks wait, so it is the connection")
            rank = dist.get_rank(self._process_group)
        except _NO_STORE as error:
            missing, rank = _no_answer(error), "?"
        self.failure = (
            f"gradacc_kernels: rank {rank} has waited {time.monotonic() - oldest.began:.0f} s for "
            f"{oldest.what} in reduction {oldest.reduction}: {missing}. Restart the ranks from a "
            "checkpoint"
        )
        _log.error(self.failure)


def _run(alive: weakref.ref[Watch]) -> None:
    seconds: float | None = 0.0
    while seconds is not None:
        time.sleep(min(seconds, NAP))
        watch = alive()
        try:
            seconds = None if watch is None else watch.look()
        except RuntimeError as error:  # CUDA's, by which other calls fail as well
            seconds = None
            _log.warning("gradacc_kernels: reductions are watched no more: %s", error)
        del watch
