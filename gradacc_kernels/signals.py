"""Barriers between streams of several ranks that no multiprocessor waits in.

    to each other rank: flags[this rank] = n
    of each other rank: wait until flags[that rank] >= n          in barrier n, modulo 2^32

Streams write and wait by themselves, by cuStreamWriteValue32 and cuStreamWaitValue32. A kernel that
spins keeps its multiprocessor from the blocks of a matrix product that needs all of them at once.
A write comes after all that its stream was given before, and is seen after what that has written.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

WRITE_DEFAULT, WAIT_GEQ = 0, 0  # of enum CUstreamWriteValue_flags, CUstreamWaitValue_flags


class StreamBarrier:
    """A barrier of the current streams of ranks that can write to each other's memory.

    Args:
        flags: int32 zeros of this rank, one for each.
        memory: the symmetric memory that flags are in.
    """

    def __init__(self, flags: Tensor, memory: Any):
        rank, others = memory.rank, [r for r in range(len(flags)) if r != memory.rank]
        self._keeps = flags, memory
        self._theirs = [memory.get_buffer(r, (1,), flags.dtype, rank).data_ptr() for r in others]
        self._mine = [flags[r].data_ptr() for r in others]
        self._count = 0

    def __call__(self) -> None:
        """Has the current stream wait until those of all ranks have come here."""
        write, wait = _driver()
        stream = torch.cuda.current_stream().cuda_stream
        self._count = count = (self._count + 1) % 2**32
        results = [write(stream, address, count, WRITE_DEFAULT) for address in self._theirs]
        results += [wait(stream, address, count, WAIT_GEQ) for address in self._mine]
        if any(results):
            raise RuntimeError(
                f"memory operations of a stream failed: CUDA driver errors {results}"
            )


@functools.cache
def _driver() -> tuple[Any, Any]:
    driver = ctypes.CDLL("libcuda.so.1")
    found = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
    for function in found:
        function.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    return found
