"""Triton kernels over what several ranks have summed: means, and chunks that are not zero.

A table of addresses is int64 in device memory: that of each rank's memory, as this rank sees it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from gradacc_kernels.triton_kernels import _on

ELEMENTS = 2048  # of a chunk
ROWS = 8  # the chunks that a program marks
BLOCK = 1024  # those that one lists
PROGRAMS_PER_PROCESSOR = 8
MEAN_ELEMENTS = 1024


@triton.jit
def _mean_kernel(main_ptr, others_ptr, stride, n_others, n_elements, factor, CHUNK: tl.constexpr):
    """main = factor * (main + the sum of others), in the order of others."""
    offsets = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < n_elements
    total = tl.load(main_ptr + offsets, mask=mask, other=0.0)
    for _ in range(n_others):
        total += tl.load(others_ptr + offsets, mask=mask, other=0.0)
        others_ptr += stride
    tl.store(main_ptr + offsets, total * factor, mask=mask)


@triton.jit
def _mark_kernel(bits_ptr, marks_ptr, n_elements, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """marks[c] = whether a bit of chunk c is set."""
    chunks = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = chunks.to(tl.int64)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    bits = tl.load(bits_ptr + offsets, mask=offsets < n_elements, other=0)
    has_bits = tl.max((bits != 0).to(tl.int32), axis=1)
    tl.store(marks_ptr + chunks, has_bits, mask=chunks * CHUNK < n_elements)


@triton.jit
def _address(table_ptr, rank, TYPE: tl.constexpr):
    return tl.load(table_ptr + rank).to(tl.pointer_type(TYPE))


@triton.jit
def _list_kernel(marks_ptr, n_ranks, chunks_ptr, count_ptr, n_chunks, BLOCK: tl.constexpr):
    """Lists the chunks that any rank has marked, in no order."""
    chunks = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_marked = tl.zeros((BLOCK,), tl.int32)
    for rank in range(n_ranks):
        marks = _address(marks_ptr, rank, tl.int32)
        is_marked |= tl.load(marks + chunks, mask=chunks < n_chunks, other=0)
    begin = tl.atomic_add(count_ptr, tl.sum(is_marked))
    places = begin + tl.cumsum(is_marked) - 1
    tl.store(chunks_ptr + places, chunks, mask=is_marked != 0)


@triton.jit
def _average_kernel(
    mains_ptr,
    rank,
    n_ranks,
    chunks_ptr,
    count_ptr,
    part,
    n_elements,
    factor,
    CHUNK: tl.constexpr,
):
    """Averages those of the listed chunks that are this rank's part."""
    main_ptr = _address(mains_ptr, rank, tl.float32)
    for place in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        chunk = tl.load(chunks_ptr + place)
        if chunk // part == rank:
            offsets = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
            mask = offsets < n_elements
            total = tl.load(main_ptr + offsets, mask=mask, other=0.0)
            for step in range(1, n_ranks):
                other_ptr = _address(mains_ptr, (rank + step) % n_ranks, tl.float32)
                total += tl.load(other_ptr + offsets, mask=mask, other=0.0)
            tl.store(main_ptr + offsets, total * factor, mask=mask)


@triton.jit
def _gather_kernel(mains_ptr, rank, chunks_ptr, count_ptr, part, n_elements, CHUNK: tl.constexpr):
    """Copies those of the listed chunks that are other ranks' parts, from those."""
    main_ptr = _address(mains_ptr, rank, tl.float32)
    for place in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        chunk = tl.load(chunks_ptr + place)
        owner = chunk // part
        if owner != rank:
            offsets = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
            mask = offsets < n_elements
            values = tl.load(_address(mains_ptr, owner, tl.float32) + offsets, mask=mask)
            tl.store(main_ptr + offsets, values, mask=mask)


def num_chunks(numel):
    """Returns the number of chunks of so many elements."""
    return -(-numel // ELEMENTS)


def mean_(main, others):
    """See :func:`gradacc_kernels.copies.mean_`."""
    increment_version(main)
    with _on(main.device):
        _mean_kernel[(-(-main.numel() // MEAN_ELEMENTS),)](
            main,
            others,
            others.stride(0),
            len(others),
            main.numel(),
            1 / (1 + len(others)),
            MEAN_ELEMENTS,
            num_warps=4,
        )


class Listed:
    """The chunks of main gradients that any rank has marked.

    Args:
        mains: table of addresses, of float32 [n] on each rank.
        marks: table of addresses, of int32 [number of chunks of n] on each rank.
        rank: this one, whose part of the chunks is the one of this number.
        main: those of this rank.
    """

    def __init__(self, mains, marks, rank, main):
        self._mains, self._marks, self._rank, self._main = mains, marks, rank, main
        count = num_chunks(main.numel())
        self._part = -(-count // len(mains))
        self._chunks = torch.empty(count, dtype=torch.int32, device=main.device)
        self._count = torch.empty(1, dtype=torch.int32, device=main.device)
        self._programs = 1
        if main.is_cuda:
            processors = torch.cuda.get_device_properties(main.device).multi_processor_count
            self._programs = PROGRAMS_PER_PROCESSOR * processors

    @property
    def nbytes(self):
        """Bytes of the list."""
        return self._chunks.nbytes

    def find(self):
        """Lists them."""
        self._count.zero_()
        with _on(self._main.device):
            _list_kernel[(-(-len(self._chunks) // BLOCK),)](
                self._marks,
                len(self._mains),
                self._chunks,
                self._count,
                len(self._chunks),
                BLOCK,
                num_warps=4,
            )

    def average(self):
        """Averages them over the ranks, where they are this rank's part."""
        increment_version(self._main)
        with _on(self._main.device):
            _average_kernel[(self._programs,)](
                self._mains,
                self._rank,
                len(self._mains),
                self._chunks,
                self._count,
                self._part,
                self._main.numel(),
                1 / len(self._mains),
                ELEMENTS,
                num_warps=4,
            )

    def gather(self):
        """Copies them from other ranks, where they are part of those."""
        increment_version(self._main)
        with _on(self._main.device):
            _gather_kernel[(self._programs,)](
                self._mains,
                self._rank,
                self._chunks,
                self._count,
                self._part,
                self._main.numel(),
                ELEMENTS,
                num_warps=4,
            )


def mark_(marks, main):
    """Marks chunks of main gradients that are not zero.

    Args:
        marks: int32 [number of chunks].
        main: float32 [n].
    """
    with _on(main.device):
        _mark_kernel[(-(-len(marks) // ROWS),)](
            main.view(torch.int32), marks, main.numel(), ROWS, ELEMENTS, num_warps=8
        )
