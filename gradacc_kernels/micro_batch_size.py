"""find_micro_batch_size: the largest micro-batch that fits, found by trying."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc_kernels import distributed

# What a RuntimeError says that is no torch.OutOfMemoryError, and means the same.
NO_BATCH = 1 << 31  # samples, more than a device has memory for
OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


@dataclass(frozen=True)
class MicroBatchSize:
    """What fits.

    Attributes:
        micro_batch: samples of the largest micro-batch to run.
        micro_batches: K, how many make the effective batch on each rank; 1 where none was given.
        sizes: those of the K micro-batches, which add up to the effective batch of a rank: as even
            as possible, and as ``x.tensor_split(K)`` cuts a batch. Where they differ, give
            ``Accumulator.micro_batch`` the size as its weight.
        largest: samples of the largest micro-batch that fitted, with the margin free.
        trials: all that were tried, and whether they fitted.
    """

    micro_batch: int
    micro_batches: int
    sizes: tuple[int, ...]
    largest: int
    trials: dict[int, bool]


def find_micro_batch_size(
    fn: Callable[[int], Any],
    *,
    effective_batch: int | None = None,
    start: int = 1,
    most: int | None = None,
    margin: float = 0.05,
    zero_grad: Callable[[], Any] | None = None,
    device: torch.device | str | int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> MicroBatchSize:
    """Finds the largest n for which ``fn(n)`` runs: by doubling from ``start``, then bisection.

    About 2 log2(n) runs. Before each, and at the end, gradients are dropped by ``zero_grad`` and
    the allocator's cache is emptied. During all of them a share of the device's memory is kept
    occupied, that a run will have free: for fragmentation, longer samples, and what ``fn`` does not
    allocate. So have all that training holds be there before: attach the model, and step the
    optimizer once, or ask for a larger margin. Call it between windows: sums are dropped.

    ::

        found = gk.find_micro_batch_size(
            lambda n: loss_fn(model(x[:1].expand(n, -1)), y[:1].expand(n)).backward(),
            effective_batch=512,
            zero_grad=model.zero_grad,
        )
        for part in x.tensor_split(found.micro_batches): ...

    Args:
        fn: runs forward and backward of a micro-batch of n samples, of the longest length that will
            come. It leaves nothing behind but gradients, and does nothing over ranks: run backward
            inside of ``accumulator.no_sync()``.
        effective_batch: samples of a window, of all ranks together.
        start: the first n.
        most: the largest n to try; None for the effective batch of a rank, or for no bound.
        margin: the share of the device's memory to leave free, in [0, 1). On the CPU, whose
            allocator as a rule never fails, it is not kept: give ``most``.
        zero_grad: drops gradients, as ``model.zero_grad`` or ``optimizer.zero_grad``; a
            micro_batch() that was left by an exception needs it.
        device: whose memory it is; None for the current CUDA device, or the CPU.
        process_group: whose ranks all call this and get the least of their results.

    Returns:
        :class:`MicroBatchSize`.

    Raises:
        TypeError, ValueError: fn or zero_grad cannot be called; numbers that are no positive ints,
            a start above most, a margin outside of [0, 1), an effective batch that is no multiple
            of the ranks. Nothing was run.
        RuntimeError: not even ``start`` fits, on this rank or another; or whatever n does.
        Exception: what fn raises, unless memory was exhausted.
    """
    _check(fn, zero_grad, effective_batch, start, most, margin)
    ranks = 1
    if process_group is not None:
        distributed.check_process_group("find_micro_batch_size", "process_group", process_group)
        ranks = dist.get_world_size(process_group)
    whole = None
    if effective_batch is not None:
        whole, rest = divmod(effective_batch, ranks)
        if rest:
            raise ValueError(
                f"find_micro_batch_size: effective_batch must be a multiple of the {ranks} ranks, "
                f"got {effective_batch}"
            )
    most = min(n for n in (most, whole, NO_BATCH) if n is not None)
    if start > most:
        raise ValueError(
            f"find_micro_batch_size: start must be at most {most} (most, or the effective batch of "
            f"a rank), got {start}"
        )
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    trials: dict[int, bool] = {}
    with _Occupied(torch.device(device), margin):
        largest = _search(lambda n: _fits(fn, n, zero_grad, trials), start, most)
    if process_group is not None:
        least = torch.tensor(largest, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN, process_group)
        largest = int(least)
    if largest == 0:
        raise RuntimeError(
            f"find_micro_batch_size: a micro-batch of {start} does not fit, with {margin:.0%} of "
            "the memory left free: lower start or margin, shard the model, or checkpoint its "
            "activations"
        )
    if largest == NO_BATCH:
        raise RuntimeError(
            f"find_micro_batch_size: all sizes up to {largest} fit: expected fn to run a "
            "micro-batch of the n samples that it is given; on the CPU, give most"
        )
    k = 1 if whole is None else -(-whole // largest)
    small, larger = divmod(largest if whole is None else whole, k)
    sizes = (small + 1,) * larger + (small,) * (k - larger)
    return MicroBatchSize(sizes[0], k, sizes, largest, trials)


def _search(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest n from start to most that fits; 0 where start does not."""
    good, n = 0, start
    while fits(n):
        good = n
        if n == most:
            return good
        n = min(2 * n, most)
    bad = n
    while good and bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def _fits(
    fn: Callable[[int], Any],
    n: int,
    zero_grad: Callable[[], Any] | None,
    trials: dict[int, bool],
) -> bool:
    try:
        fn(n)
        # Work that is under way may still fail, and memory that it holds be counted as free.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        trials[n] = True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        trials[n] = False
    finally:
        # The error, whose traceback holds the activations, is gone by here but for what is raised.
        if zero_grad is not None:
            zero_grad()
        _empty_cache()
    return trials[n]


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error says that memory is exhausted, that of cuBLAS and cuDNN too."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class _Occupied:
    """Holds a share of a device's memory; nothing of the CPU's."""

    def __init__(self, device: torch.device, share: float):
        self._device, self._share = device, share
        self._held: Tensor | None = None

    def __enter__(self):
        if self._device.type == "cuda":
            _empty_cache()
            nbytes = int(self._share * torch.cuda.get_device_properties(self._device).total_memory)
            self._held = torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def __exit__(self, *exception) -> None:
        self._held = None
        _empty_cache()


def _check(
    fn: Any, zero_grad: Any, effective_batch: Any, start: Any, most: Any, margin: Any
) -> None:
    function = "find_micro_batch_size"
    if not callable(fn) or not (zero_grad is None or callable(zero_grad)):
        what = fn if not callable(fn) else zero_grad
        raise TypeError(f"{function}: fn and zero_grad must be callable, got {what!r}")
    counts = {"effective_batch": effective_batch, "start": start, "most": most}
    for name, count in counts.items():
        if (count is not None or name == "start") and (type(count) is not int or count < 1):
            raise ValueError(f"{function}: {name} must be a positive int, got {count!r}")
    if not 0 <= margin < 1:
        raise ValueError(f"{function}: margin must be in [0, 1), got {margin!r}")
