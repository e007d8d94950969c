"""Triton kernels over what several ranks have summed: means, and chunks that are not zero.

A table of addresses is int64 in device memory: that of each rank's memory, as this rank sees it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

ELEMENTS = 2048  # of a chunk
ROWS = 8  # the chunks of a program
MEAN_ELEMENTS = 1024  # of a program that averages without marks
NUM_WARPS = 8


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
def _chunks(first, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The chunks of a program, and the offsets of their elements."""
    chunks = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return chunks, chunks.to(tl.int64)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]


@triton.jit
def _mark_kernel(bits_ptr, marks_ptr, n_elements, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """marks[c] = whether a bit of chunk c is set."""
    chunks, offsets = _chunks(0, ROWS, CHUNK)
    bits = tl.load(bits_ptr + offsets, mask=offsets < n_elements, other=0)
    has_bits = tl.max((bits != 0).to(tl.int32), axis=1)
    tl.store(marks_ptr + chunks, has_bits, mask=chunks * CHUNK < n_elements)


@triton.jit
def _address(table_ptr, rank, TYPE: tl.constexpr):
    return tl.load(table_ptr + rank).to(tl.pointer_type(TYPE))


@triton.jit
def _average_kernel(
    mains_ptr,
    marks_ptr,
    rank,
    n_ranks,
    first,
    end,
    n_elements,
    factor,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Averages those of chunks first to end that a rank has marked, and marks them then."""
    chunks, offsets = _chunks(first, ROWS, CHUNK)
    is_marked = tl.zeros((ROWS,), tl.int32)
    for each in range(n_ranks):
        is_marked |= tl.load(_address(marks_ptr, each, tl.int32) + chunks, chunks < end, other=0)
    mask = (is_marked != 0)[:, None] & (offsets < n_elements)
    main_ptr = _address(mains_ptr, rank, tl.float32)
    total = tl.load(main_ptr + offsets, mask=mask, other=0.0)
    for step in range(1, n_ranks):
        other_ptr = _address(mains_ptr, (rank + step) % n_ranks, tl.float32)
        total += tl.load(other_ptr + offsets, mask=mask, other=0.0)
    tl.store(main_ptr + offsets, total * factor, mask=mask)
    tl.store(_address(marks_ptr, rank, tl.int32) + chunks, is_marked, mask=is_marked != 0)


@triton.jit
def _gather_kernel(
    mains_ptr,
    marks_ptr,
    rank,
    owner,
    first,
    end,
    n_elements,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copies those of chunks first to end from their owner that it has marked."""
    chunks, offsets = _chunks(first, ROWS, CHUNK)
    is_marked = tl.load(_address(marks_ptr, owner, tl.int32) + chunks, chunks < end, other=0)
    mask = (is_marked != 0)[:, None] & (offsets < n_elements)
    values = tl.load(_address(mains_ptr, owner, tl.float32) + offsets, mask=mask)
    tl.store(_address(mains_ptr, rank, tl.float32) + offsets, values, mask=mask)


def num_chunks(numel):
    """Returns the number of chunks of so many elements."""
    return -(-numel // ELEMENTS)


def _programs(chunks):
    return -(-chunks // ROWS)


def _on(device):
    """Makes a device current, for Triton launches on the current one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


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


def mark_(marks, main):
    """Marks chunks of main gradients that are not zero.

    Args:
        marks: int32 [number of chunks].
        main: float32 [n].
    """
    with _on(main.device):
        _mark_kernel[(_programs(len(marks)),)](
            main.view(torch.int32), marks, main.numel(), ROWS, ELEMENTS, num_warps=NUM_WARPS
        )


def average_marked_(main, mains, marks, rank, bounds):
    """Averages chunks of this rank that any rank has marked, and marks these.

    Args:
        main: float32 [n].
        mains: table of addresses, of main on each rank.
        marks: table of addresses, of the marks.
        rank: this one.
        bounds: of its chunks.
    """
    begin, end = bounds
    if begin == end:
        return
    increment_version(main)
    with _on(main.device):
        _average_kernel[(_programs(end - begin),)](
            mains,
            marks,
            rank,
            len(mains),
            begin,
            end,
            main.numel(),
            1 / len(mains),
            ROWS,
            ELEMENTS,
            num_warps=NUM_WARPS,
        )


def gather_marked_(main, mains, marks, rank, owner, bounds):
    """Copies chunks of another rank that it has marked.

    Args:
        main: float32 [n].
        mains: table of addresses, of main on each rank.
        marks: table of addresses, of the marks.
        rank: this one.
        owner: the other.
        bounds: of the chunks of that.
    """
    begin, end = bounds
    if begin == end:
        return
    increment_version(main)
    with _on(main.device):
        _gather_kernel[(_programs(end - begin),)](
            mains,
            marks,
            rank,
            owner,
            begin,
            end,
            main.numel(),
            ROWS,
            ELEMENTS,
            num_warps=NUM_WARPS,
        )
