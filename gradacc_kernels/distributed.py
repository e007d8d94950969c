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

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc_kernels import copies, dispatch, sharded
from gradacc_kernels.lockstep import Lockstep
from gradacc_kernels.reducer import Reducer

REDUCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WAYS = ("auto", "all_reduce", "copies")
LEAST_BUCKET_BYTES, MOST_BUCKET_BYTES, BUCKETS = 32 << 20, 256 << 20, 16
INSTEAD = (
    "Leave DistributedDataParallel out, and attach the model by "
    "gradacc_kernels.attach(model, process_group=torch.distributed.group.WORLD)"
)


class Reduction:
    """What attach was told of a reduction over ranks.

    Attributes:
        is_on: whether backwards reduce; not inside of no_sync().
        steps: every so many backwards of a window.
        are_copies: whether ranks read each other's memory, in place of all-reduces.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        steps: int,
        reduce_dtype: torch.dtype,
        bucket_bytes: int | None,
        reduce_by: str,
    ):
        self.process_group = process_group
        self.steps = steps
        self.is_on = True
        self._reduce_dtype = reduce_dtype
        self._bucket_bytes = bucket_bytes
        self._reduce_by = reduce_by
        self.are_copies = False

    def __repr__(self) -> str:
        """Tells over what and how gradients are averaged."""
        ranks = dist.get_world_size(self.process_group)
        way = "copies" if self.are_copies else f"all-reduces in {self._reduce_dtype}"
        often = "" if self.steps == 1 else f", every {self.steps} backwards"
        return f"averaged over {ranks} ranks{often}, by {way}"

    def check(self, groups: Sequence[Any]) -> None:
        """Raises where parameters cannot be reduced together."""
        kinds = [f"{group.dtype} main gradients on {group.device}" for group in groups]
        if len(kinds) > 1:
            raise ValueError(
                "attach: with process_group all parameters must be on one device, and none of them "
                f"float64, got {' and '.join(kinds)}"
            )

    def check_alike(self, named: dict[str, Tensor], options: dict[str, Any]) -> None:
        """Raises on every rank where their parameters, or the options of attach, differ."""
        options = options | {
            "steps": self.steps,
            "reduce_dtype": self._reduce_dtype,
            "bucket_bytes": self._bucket_bytes,
            "reduce_by": self._reduce_by,
        }
        check_alike("attach", named, options, self.process_group)
        self._lockstep = Lockstep(self.process_group)

    def choose(self, device: torch.device) -> None:
        """Chooses between all-reduces and copies, the same on all ranks; a collective.

        Raises:
            RuntimeError: copies were asked for, and are not possible.
        """
        if self._reduce_by == "all_reduce" or self._reduce_dtype != torch.float32:
            return
        reason = copies.why_not(self.process_group, device)
        if reason is not None and self._reduce_by == "copies":
            raise RuntimeError(
                f"attach: reduce_by='copies' is not possible: {reason}. Leave reduce_by out"
            )
        self.are_copies = reason is None

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns zeros for main gradients."""
        if self.are_copies and copies.can_be_on(device):
            return copies.allocate(numel, dtype, device)
        return torch.zeros(numel, dtype=dtype, device=device)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors the values that they have on the first rank of the group."""
        _broadcast(tensors, self.process_group)

    def reducer_of(self, group: Any, before: Reducer | None) -> Reducer:
        """Returns what reduces a group of parameters from now on, by its hooks."""
        flat, ends = group.buffer.flat, group.buffer.ends
        bucket_bytes = self._bucket_bytes or bucket_bytes_of(flat.nbytes)
        reducer: Reducer
        if self.are_copies and copies.can_be_on(flat.device):
            reducer = copies.CopyReducer(flat, ends, self.process_group, bucket_bytes)
        else:
            reducer = Reducer(flat, ends, self.process_group, self._reduce_dtype, bucket_bytes)
        if before is not None:
            reducer.has_reduced, reducer.windows = before.has_reduced, before.windows
        reducer.lockstep = self._lockstep
        self._lockstep.restart()
        overlaps = group.nonfinite in ("skip_window", "ignore")
        group.hooks.reduce_with(reducer.bucket_of, reducer.launch, overlaps)
        return reducer


def bucket_bytes_of(flat_bytes: int) -> int:
    """Returns the bytes of a bucket: a 16th of the buffer, but 32 to 256 MiB."""
    return min(max(flat_bytes // BUCKETS, LEAST_BUCKET_BYTES), MOST_BUCKET_BYTES)


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
    process_group: Any, steps: Any, reduce_dtype: Any, bucket_bytes: Any, reduce_by: Any
) -> Reduction | None:
    """Returns what attach's arguments ask for; None without a process group.

    Raises:
        TypeError, ValueError, RuntimeError: as attach.
    """
    if reduce_by not in WAYS:
        raise ValueError(f"attach: reduce_by must be one of {WAYS}, got {reduce_by!r}")
    if process_group is None:
        asked_for = None if reduce_by == "auto" else reduce_by
        options = {
            "steps": steps,
            "reduce_dtype": reduce_dtype,
            "bucket_bytes": bucket_bytes,
            "reduce_by": asked_for,
        }
        for name, value in options.items():
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
    if bucket_bytes is not None and (type(bucket_bytes) is not int or bucket_bytes < 1):
        raise ValueError(
            f"attach: bucket_bytes must be a positive int or None, got {bucket_bytes!r}"
        )
    reduce_dtype = reduce_dtype or torch.float32
    if reduce_by == "copies" and reduce_dtype != torch.float32:
        raise ValueError(
            f"attach: reduce_by='copies' averages in float32, got reduce_dtype={reduce_dtype}: "
            "leave one of them out"
        )
    return Reduction(process_group, steps or 1, reduce_dtype, bucket_bytes, reduce_by)


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
    options: dict[str, Any],
    process_group: dist.ProcessGroup,
) -> None:
    """Raises on every rank where their parameters, or the options of a function, differ.

    Raises:
        ValueError: they differ; nothing was changed.
    """
    locals_ = {name: sharded.local(param) for name, param in named.items()}
    described = {
        f"parameter {name}": f"{list(p.shape)}, {p.dtype}, strides {p.stride()}"
        for name, p in locals_.items()
    }
    described |= {f"option {name}": f"= {value}" for name, value in options.items()}
    digest = hashlib.sha256("\n".join(map(" ".join, described.items())).encode()).hexdigest()
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
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if differing:
        what = differing[0]
        mine, its = (each.get(what, "is none") for each in (ours, theirs))
        difference = f"{what} {mine} on rank {first}, and {its} on rank {other}"
    else:
        difference = f"they come in another order on rank {first} than on rank {other}"
    raise ValueError(
        f"{function}: the ranks of the process group have different parameters or options: "
        f"{difference}. Give all ranks the same"
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
