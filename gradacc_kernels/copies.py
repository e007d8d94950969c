"""Averaging by copies: on one host, each rank reads what the others have summed.

    part r of a bucket = 1 / R * sum over R ranks of their part r    on rank r, by one kernel
    the other parts    = what their ranks have made of them          by copies

Copies between GPUs run on copy engines. The kernels of an all-reduce run on multiprocessors, which
backward's matrix products count on: where a few of them are taken, a product whose blocks were to
run at once takes a second round. So less of a reduction is hidden behind backward than it seems.

The last bucket holds the first parameters, whose gradients come when nothing of backward is left to
hide behind: as a rule an embedding, of which a window has touched a few rows. Kernels read it, and
leave out the chunks in which all ranks have zeros.

Memory that others can read, and barriers on the GPU, are those of torch.distributed's symmetric
memory. The main gradients lie in it. Bytes on the links are those of an all-reduce,
2 (R - 1) / R times 4, an element and rank.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc_kernels import dispatch
from gradacc_kernels.reducer import Reducer

SCRATCH_BYTES = 128 << 20  # for what was read and not added yet


class Piece(NamedTuple):
    """What this rank averages of a bucket by one kernel: main, what it reads, and into what."""

    main: Tensor
    theirs: list[Tensor]
    read: Tensor


class CopyReducer(Reducer):
    """Reduces buckets that are in symmetric memory: see Reducer.

    Args:
        flat: from :func:`allocate`. Making this is a collective.
        ends, process_group, bucket_bytes: those of Reducer.
    """

    def __init__(
        self,
        flat: Tensor,
        ends: Sequence[int],
        process_group: dist.ProcessGroup,
        bucket_bytes: int,
    ):
        super().__init__(flat, ends, process_group, torch.float32, bucket_bytes)
        self._flat = flat
        self._memory = rendezvous(flat, process_group)
        self._rank = self._memory.rank
        self._peers = [(self._rank + i) % self.world_size for i in range(1, self.world_size)]
        n_peers = max(1, len(self._peers))
        longest = max(end - begin for bounds in self._bounds for begin, end in self._parts(*bounds))
        self._piece = min(longest, SCRATCH_BYTES // flat.itemsize // n_peers)
        self._scratch = flat.new_empty(n_peers, self._piece)
        self._pieces = [self._pieces_of(*bounds) for bounds in self._bounds]
        self._others = [self._others_of(*bounds) for bounds in self._bounds]
        self._touched: Touched | None = None
        if dispatch.why_missing("triton") is None:
            self._touched = Touched(self._mains[-1], self._bounds[-1][0], self._of, process_group)

    @property
    def symmetric_bytes(self) -> int:
        """Bytes that torch.cuda's statistics do not show: the main gradients, and marks."""
        return self._flat.nbytes + (0 if self._touched is None else self._touched.marks.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes beside the main gradients."""
        return self._scratch.nbytes + (0 if self._touched is None else self._touched.nbytes)

    def _parts(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The bounds of each rank's part of a bucket, on boundaries of cache lines."""
        step = 32 * -(-(end - begin) // (32 * self.world_size))
        cuts = [min(begin + rank * step, end) for rank in range(self.world_size + 1)]
        return list(zip(cuts, cuts[1:], strict=False))

    def _pieces_of(self, begin: int, end: int) -> list[Piece]:
        begin, end = self._parts(begin, end)[self._rank]
        found = []
        for first in range(begin, end, self._piece):
            last = min(first + self._piece, end)
            theirs = [self._of(peer, first, last) for peer in self._peers]
            read = self._scratch[: len(self._peers), : last - first]
            found.append(Piece(self._flat[first:last], theirs, read))
        return found

    def _others_of(self, begin: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """The parts of other ranks: where they go, and where they come from."""
        parts = self._parts(begin, end)
        return [(self._flat[slice(*parts[r])], self._of(r, *parts[r])) for r in self._peers]

    def _of(self, rank: int, begin: int, end: int) -> Tensor:
        """Elements of the buffer of a rank."""
        return self._memory.get_buffer(rank, (end - begin,), self._flat.dtype, begin)

    def _begin(self, bucket: int) -> Any:
        if self._touched is not None and bucket == len(self._mains) - 1:
            self._touched.average(self._barrier)
        else:
            self._barrier()  # all ranks have summed the bucket
            for piece in self._pieces[bucket]:
                for values, others in zip(piece.read, piece.theirs, strict=True):
                    values.copy_(others)
                mean_(piece.main, piece.read)
            self._barrier()
            for values, means in self._others[bucket]:
                values.copy_(means)
        return self._watched(_Copied(self._flat.device), bucket)

    def _finish(self, bucket: int) -> None:
        """Nothing: what was copied is the mean."""

    def wait(self) -> None:
        """See Reducer."""
        super().wait()
        self._barrier()  # no rank reads any more what the next window writes

    def _barrier(self) -> None:
        self._memory.barrier(0, int(self._timeout * 1000))


class Touched:
    """Averages a slice of the flat buffers, but for the chunks in which all ranks have zeros.

    Args:
        main: float32 [n], of this rank.
        offset: of the slice.
        of: (rank, begin, end) -> elements of the flat buffer of a rank.
        process_group: of the ranks. Making this is a collective.

    Attributes:
        marks: int32, of the chunks that are not zero on this rank.
    """

    def __init__(
        self,
        main: Tensor,
        offset: int,
        of: Callable[[int, int, int], Tensor],
        process_group: dist.ProcessGroup,
    ):
        self._kernels = importlib.import_module("gradacc_kernels.triton_peers")
        self._main = main
        count, ranks = self._kernels.num_chunks(main.numel()), dist.get_world_size(process_group)
        self.marks = allocate(count, torch.int32, main.device)
        memory = rendezvous(self.marks, process_group)
        self._keeps = [memory.get_buffer(r, (count,), torch.int32, 0) for r in range(ranks)]
        mains = [of(rank, offset, offset + 1).data_ptr() for rank in range(ranks)]
        marks = [each.data_ptr() for each in self._keeps]
        tables = torch.tensor([mains, marks], device=main.device)
        self._listed = self._kernels.Listed(*tables, memory.rank, main)

    @property
    def nbytes(self) -> int:
        """Bytes beside the main gradients."""
        return self.marks.nbytes + self._listed.nbytes

    def average(self, barrier: Callable[[], None]) -> None:
        """Averages, on the current stream."""
        self._kernels.mark_(self.marks, self._main)
        barrier()
        self._listed.find()
        self._listed.average()
        barrier()
        self._listed.gather()


class _Copied:
    """What was given to the current stream, as a dist.Work."""

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Has the current stream wait for it."""
        if self._event is not None:
            self._event.wait()

    def is_completed(self) -> bool:
        """Tells whether it has ended."""
        return self._event is None or self._event.query()


def mean_(main: Tensor, others: Tensor) -> None:
    """Averages in place: main = 1 / (1 + P) * (main + sum over P rows of others).

    Args:
        main: float32 [n].
        others: [P, n], the rows dense.
    """
    if main.is_cuda:
        importlib.import_module("gradacc_kernels.triton_peers").mean_(main, others)
        return
    for other in others:
        main.add_(other)
    main.mul_(1 / (1 + len(others)))


def can_be_on(device: torch.device) -> bool:
    """Tells whether a device has memory that others can read."""
    return device.type == "cuda"


def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros that the ranks of one host can read once :func:`rendezvous` has met."""
    # Outside of torch's pool: ranks that reuse a block at different times would not meet.
    memory = _library().empty_strided_p2p((numel,), (1,), dtype, device)
    return memory.zero_()


def rendezvous(flat: Tensor, process_group: dist.ProcessGroup) -> Any:
    """Returns the symmetric memory that a tensor of each rank is in; a collective."""
    return _library().rendezvous(flat, process_group.group_name)


def why_not(process_group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Tells why ranks cannot read each other's memory, the same on all; None where they can.

    A collective.
    """
    reason, seen = None, _seen(device)
    everyone: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, seen, process_group)
    if len(everyone) < 2:
        reason = "there is one rank"
    elif any(isinstance(each, str) for each in everyone):
        reason = next(each for each in everyone if isinstance(each, str))
    elif len({host for host, _, _ in everyone}) > 1:
        reason = "the ranks are on several hosts"
    else:
        others = {uuid for _, uuid, _ in everyone} - {seen[1]}
        if len(others) < len(everyone) - 1:
            reason = "ranks share a GPU"
        elif not others <= set(seen[2]):
            reason = "not all GPUs of the ranks can access each other's memory"
    if reason is None:
        reason = _why_not_met(process_group, device)
    reasons: list[Any] = [None] * len(everyone)
    dist.all_gather_object(reasons, reason, process_group)
    return next((each for each in reasons if each is not None), None)


def _why_not_met(process_group: dist.ProcessGroup, device: torch.device) -> str | None:
    try:
        rendezvous(allocate(1, torch.float32, device), process_group)
    except RuntimeError as error:
        return f"symmetric memory fails here ({error})"
    return None


def _seen(device: torch.device) -> tuple[str, str, list[str]] | str:
    """This host, this GPU, and the GPUs whose memory it can access; or why there are none."""
    if device.type != "cuda":
        return f"parameters are on {device}"
    try:
        _library()
    except ImportError:
        return f"torch {torch.__version__} has no symmetric memory"
    ids = range(torch.cuda.device_count())
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in ids]
    others = [i for i in ids if i != device.index]
    reached = [uuids[i] for i in others if torch.cuda.can_device_access_peer(device.index, i)]
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = boot.read_text() if boot.exists() else ""
    return f"{socket.gethostname()} {host}", uuids[device.index], reached


def _library() -> Any:
    from torch._C._distributed_c10d import _SymmetricMemory  # CPU builds may lack it

    return _SymmetricMemory
