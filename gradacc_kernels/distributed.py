"""Data parallel: one reduction a window of the main gradients, in place, while backward runs.

    .grad = 1 / R * sum over R ranks of what the window of each has summed

Buckets are slices of the flat float32 buffer, so nothing is copied in or out. A bucket is handed to
torch.distributed as soon as the last backward of the window has added its last gradient; all ranks
hand out the same buckets in the same order, whatever reached them. Averaging is idempotent: where a
window is reduced twice, what was reduced before stays as it is.

Bytes over the wire, an element and rank: 2 (R - 1) / R times 4, or 2 with 16-bit ``reduce_dtype``,
once a window.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc_kernels import dispatch, sharded, stalls

REDUCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BUCKET_BYTES = 32 << 20
INSTEAD = (
    "Leave DistributedDataParallel out, and attach the model by "
    "gradacc_kernels.attach(model, process_group=torch.distributed.group.WORLD)"
)


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
    """

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
        self.bucket_of, bounds = _bucket(ends, max(1, bucket_bytes // flat.itemsize))
        self._mains = [flat[begin:end] for begin, end in bounds]
        self._travelling = self._mains
        if reduce_dtype != flat.dtype:
            scratch = torch.empty_like(flat, dtype=reduce_dtype)
            self._travelling = [scratch[begin:end] for begin, end in bounds]
        # gloo has no average.
        self._averages = stalls.backend_of(process_group, flat.device) == "nccl"
        self._under_way: list[tuple[int, dist.Work]] = []
        self._watch: stalls.Watch | None = None
        if self._averages:
            timeout = stalls.timeout_of(process_group, flat.device)
            self._watch = stalls.Watch(process_group, timeout)
        self.has_reduced = False
        self.windows = 0

    @property
    def nbytes(self) -> int:
        """Bytes beside the main gradients."""
        return 0 if self._travelling is self._mains else sum(t.nbytes for t in self._travelling)

    def launch(self, first: int, last: int) -> None:
        """Begins to reduce buckets, on the current stream."""
        for bucket in range(first, last):
            travelling = self._travelling[bucket]
            if travelling is not self._mains[bucket]:
                travelling.copy_(self._mains[bucket])
            with self._telling(bucket):
                self._under_way.append((bucket, self._all_reduce(travelling, bucket)))

    def wait(self) -> None:
        """Has the current stream wait for what was launched, and brings it into the main gradients.

        On the CPU the caller waits.
        """
        under_way, self._under_way = self._under_way, []
        for bucket, work in under_way:
            with self._telling(bucket):
                work.wait()
            main, travelled = self._mains[bucket], self._travelling[bucket]
            if travelled is not main:
                main.copy_(travelled)
            if not self._averages:
                main.mul_(1 / self.world_size)
        self.has_reduced = True
        self.windows += 1

    def average(self, value: Tensor) -> None:
        """Replaces a tensor by its mean over the ranks; the current stream waits for it."""
        with self._telling(None):
            self._all_reduce(value.view(-1), None).wait()
        if not self._averages:
            value.mul_(1 / self.world_size)

    def _all_reduce(self, tensor: Tensor, bucket: int | None) -> dist.Work:
        operation = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        work = dist.all_reduce(tensor, operation, self.process_group, async_op=True)
        # One that is captured into a CUDA graph never ends, nor may it be asked.
        if self._watch is not None and not torch.cuda.is_current_stream_capturing():
            self._watch.add(*self._name(bucket), work)
        return work

    def _name(self, bucket: int | None) -> tuple[int, str]:
        """The number of a reduction, and what of it is under way; weights come after buckets."""
        if bucket is None:
            return self.windows, "the weights"
        return self.windows + 1, f"bucket {bucket} of {len(self._mains)}"

    @contextlib.contextmanager
    def _telling(self, bucket: int | None) -> Iterator[None]:
        """Says which bucket and which ranks it was where a collective fails."""
        if self._watch is not None and self._watch.failure is not None:
            raise RuntimeError(self._watch.failure)
        try:
            yield
        except RuntimeError as error:
            reduction, what = self._name(bucket)
            missing = stalls.missing_after_error(self.process_group, reduction, what)
            raise RuntimeError(
                f"gradacc_kernels: rank {dist.get_rank(self.process_group)} could not reduce "
                f"{what} in reduction {reduction}: {missing}. What the ranks hold differs now: "
                f"restart them from a checkpoint ({error})"
            ) from error


def _bucket(ends: Sequence[int], elements: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Cuts a buffer into slices, from its end on.

    Returns:
        The bucket of each parameter, and the bounds of each bucket.
    """
    bucket_of = [0] * len(ends)
    bounds: list[tuple[int, int]] = []
    last = ends[-1]
    for index in reversed(range(len(ends))):
        bucket_of[index] = len(bounds)
        begin = ends[index - 1] if index else 0
        if last - begin >= elements or index == 0:
            bounds.append((begin, last))
            last = begin
    return bucket_of, bounds


class Reduction:
    """What attach was told of a reduction over ranks.

    Attributes:
        is_on: whether backwards reduce; not inside of no_sync().
        steps: every so many backwards of a window.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        steps: int,
        reduce_dtype: torch.dtype,
        bucket_bytes: int,
    ):
        self.process_group = process_group
        self.steps = steps
        self.is_on = True
        self._reduce_dtype = reduce_dtype
        self._bucket_bytes = bucket_bytes

    def check(self, groups: Sequence[Any]) -> None:
        """Raises where parameters cannot be reduced together."""
        kinds = [f"{group.dtype} main gradients on {group.device}" for group in groups]
        if len(kinds) > 1:
            raise ValueError(
                "attach: with process_group all parameters must be on one device, and none of them "
                f"float64, got {' and '.join(kinds)}"
            )

    def check_alike(self, named: dict[str, Tensor], options: Iterable[Any]) -> None:
        """Raises on every rank where their parameters, or the options of attach, differ."""
        options = (self.steps, self._reduce_dtype, self._bucket_bytes, *options)
        check_alike("attach", named, options, self.process_group)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors the values that they have on the first rank of the group."""
        _broadcast(tensors, self.process_group)

    def reducer_of(self, group: Any, before: Reducer | None) -> Reducer:
        """Returns what reduces a group of parameters from now on, by its hooks."""
        reducer = Reducer(
            group.buffer.flat,
            group.buffer.ends,
            self.process_group,
            self._reduce_dtype,
            self._bucket_bytes,
        )
        if before is not None:
            reducer.has_reduced, reducer.windows = before.has_reduced, before.windows
        overlaps = group.nonfinite in ("skip_window", "ignore")
        group.hooks.reduce_with(reducer.bucket_of, reducer.launch, overlaps)
        return reducer


def is_hooked(params: Iterable[Tensor]) -> bool | None:
    """Tells whether what others have put on AccumulateGrad nodes reduces gradients over ranks.

    Nobody can ask such a hook what it does. That of DistributedDataParallel is one, and so are
    those of most libraries for data parallel training.

    Returns:
        None without the extension, which alone sees such hooks.
    """
    extension = dispatch.extension()
    return None if isinstance(extension, str) else any(map(extension.has_post_hooks, params))


def check_weights(params: Iterable[Tensor]) -> None:
    """Raises where others reduce gradients over ranks, who know nothing of the weights of a window.

    Raises:
        RuntimeError: they do, or may do.
    """
    has_ranks = dist.is_available() and dist.is_initialized()
    if has_ranks and is_hooked(params) is not False:
        raise RuntimeError(
            "micro_batch: the gradients are averaged over the ranks by DistributedDataParallel (or "
            "another hook on their AccumulateGrad nodes), and would be divided by the weight of "
            f"this rank alone. {INSTEAD}, which divides by the weight of all ranks"
        )


def check_reduced_once(params: Iterable[Tensor]) -> None:
    """Raises where the gradients that we reduce over ranks are reduced by others as well.

    Raises:
        RuntimeError: they are.
    """
    if is_hooked(params):
        raise RuntimeError(
            "attach: with process_group the gradients are averaged over the ranks, and "
            "DistributedDataParallel (or another hook on their AccumulateGrad nodes) would do so "
            "again: leave out the one or the other"
        )


def reduction_of(
    process_group: Any, steps: Any, reduce_dtype: Any, bucket_bytes: Any
) -> Reduction | None:
    """Returns what attach's arguments ask for; None without a process group.

    Raises:
        TypeError, ValueError, RuntimeError: as attach.
    """
    if process_group is None:
        for name, value in {"steps": steps, "reduce_dtype": reduce_dtype}.items():
            if value is not None:
                raise ValueError(
                    f"attach: {name} is that of a reduction over ranks: pass process_group too"
                )
        return None
    check_process_group("attach", "process_group", process_group)
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"attach: steps must be a positive int or None, got {steps!r}")
    if reduce_dtype not in (None, *REDUCE_DTYPES):
        raise ValueError(
            f"attach: reduce_dtype must be None or one of {REDUCE_DTYPES}, got {reduce_dtype!r}"
        )
    if type(bucket_bytes) is not int or bucket_bytes < 1:
        raise ValueError(f"attach: bucket_bytes must be a positive int, got {bucket_bytes!r}")
    return Reduction(process_group, steps or 1, reduce_dtype or torch.float32, bucket_bytes)


def check_process_group(function: str, option: str, process_group: Any) -> None:
    """Raises where an option of a function needs a process group, and this is none.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: this rank is not in the group, or it is no group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{function}: {option} needs torch.distributed: call "
            "torch.distributed.init_process_group() first"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"{function}: process_group must be a torch.distributed.ProcessGroup that this rank is "
            f"in, as torch.distributed.group.WORLD, got {process_group!r}"
        )


def check_alike(
    function: str,
    named: dict[str, Tensor],
    options: Iterable[Any],
    process_group: dist.ProcessGroup,
) -> None:
    """Raises on every rank where their parameters, or the options of a function, differ.

    Raises:
        ValueError: they differ; nothing was changed.
    """
    locals_ = {name: sharded.local(param) for name, param in named.items()}
    described = [
        *(
            f"{name}: {list(p.shape)}, {p.dtype}, strides {p.stride()}"
            for name, p in locals_.items()
        ),
        f"options {list(options)}",
    ]
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(digests, digest, process_group)
    if len(set(digests)) == 1:
        return
    everything: list[Any] = [None] * len(digests)
    dist.all_gather_object(everything, described, process_group)
    first, other = next(
        (a, b) for a in range(len(digests)) for b in range(a) if digests[a] != digests[b]
    )
    ours, theirs = everything[first], everything[other]
    pairs = zip([*ours, *[None] * len(theirs)], [*theirs, *[None] * len(ours)], strict=True)
    mine, its = next((x, y) for x, y in pairs if x != y)
    raise ValueError(
        f"{function}: the ranks of the process group have different parameters: rank {first} has "
        f"{mine or 'no more'}, rank {other} has {its or 'no more'}"
    )


@torch.no_grad()
def _broadcast(tensors: Iterable[Tensor], process_group: dist.ProcessGroup) -> None:
    """Gives tensors the values that they have on the first rank of the group."""
    source = dist.get_process_group_ranks(process_group)[0]
    for tensor in tensors:
        tensor = sharded.local(tensor)
        values = tensor.detach()
        if not values.is_contiguous():
            values = values.contiguous()
        dist.broadcast(values, source, process_group)
        if values.data_ptr() != tensor.data_ptr():
            tensor.copy_(values)
