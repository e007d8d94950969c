"""Flat storage of tensors in the shapes of parameters: main gradients, their statistics slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradacc_kernels import checks

ALIGNMENT = 128  # bytes; a view never shares a cache line or a vector access with its neighbour


def padded(numel: int, dtype: torch.dtype) -> int:
    """Returns how many elements a view of numel elements takes up, with the gap after it."""
    align = ALIGNMENT // dtype.itemsize
    return -(-numel // align) * align


def lay_out(
    params: Sequence[Tensor], dtype: torch.dtype, *, allocate: Callable[..., Tensor] = torch.empty
) -> tuple[Tensor, list[Tensor]]:
    """Allocates one tensor, and a view of it for each parameter.

    Args:
        params: tensors of one device.
        dtype: of what is allocated.
        allocate: torch.empty, or torch.zeros.

    Returns:
        The 1-D tensor, and views in the strides of the parameters (contiguous for a parameter that
        is not dense), each a tensor of its own over its memory.
    """
    offsets = [0]
    for param in params:
        offsets.append(offsets[-1] + padded(param.numel(), dtype))
    flat = allocate(offsets.pop(), dtype=dtype, device=params[0].device)
    return flat, [_view(flat, *each) for each in zip(params, offsets, strict=True)]


def _view(flat: Tensor, param: Tensor, offset: int) -> Tensor:
    if checks.is_dense(param):
        strides = param.stride()
    else:
        strides = torch.empty(param.shape, device="meta").stride()
    # set_() and not a slice: a tensor of its own, with a version counter of its own.
    return flat.new_empty(0).set_(flat.untyped_storage(), offset, param.shape, strides)


class FlatBuffer:
    """One contiguous tensor that holds the main gradient of each parameter of a device.

    The gaps between views stay zero, so that a collective or a norm may run over ``flat`` whole.

    Args:
        params: tensors of one device.
        dtype: of the main gradients: float32, or float64.
        allocate: makes zeros: torch.zeros, or one of the same arguments.

    Attributes:
        flat: 1-D, zero at first.
        views: main gradients, in the strides of their parameters (contiguous for a parameter that
            is not dense), each a tensor of its own over flat's memory.
        partials: 1-D, the statistics slots of all parameters.
        slots: the part of partials that belongs to each parameter.
        ends: where each view ends in flat, with the gap after it.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        dtype: torch.dtype,
        allocate: Callable[..., Tensor] = torch.zeros,
    ):
        device = params[0].device
        self.flat, self.views = lay_out(params, dtype, allocate=allocate)
        counts = [checks.num_chunks(param.numel()) for param in params]
        self.partials = torch.zeros(sum(counts), dtype=dtype, device=device)
        self.slots = list(self.partials.split(counts))
        self.ends = list(accumulate(padded(param.numel(), dtype) for param in params))

    @property
    def nbytes(self) -> int:
        """Bytes of main gradients and of slots."""
        return self.flat.nbytes + self.partials.nbytes
