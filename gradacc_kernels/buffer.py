"""Flat storage of main gradients and their statistics slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradacc_kernels import checks

ALIGNMENT = 128  # bytes; a view never shares a cache line or a vector access with its neighbour


class FlatBuffer:
    """One contiguous tensor that holds the main gradient of each parameter of a device.

    The gaps between views stay zero, so that a collective or a norm may run over ``flat`` whole.

    Args:
        params: tensors of one device.
        dtype: of the main gradients: float32, or float64.

    Attributes:
        flat: 1-D, zero at first.
        views: main gradients, in the strides of their parameters (contiguous for a parameter that
            is not dense), each a tensor of its own over flat's memory.
        partials: 1-D, the statistics slots of all parameters.
        slots: the part of partials that belongs to each parameter.
    """

    def __init__(self, params: Sequence[Tensor], dtype: torch.dtype):
        device = params[0].device
        align = ALIGNMENT // dtype.itemsize
        offsets = [0]
        for param in params:
            offsets.append(offsets[-1] + -(-param.numel() // align) * align)
        self.flat = torch.zeros(offsets.pop(), dtype=dtype, device=device)
        self.views = [
            self._view(param, offset) for param, offset in zip(params, offsets, strict=True)
        ]
        counts = [checks.num_chunks(param.numel()) for param in params]
        self.partials = torch.zeros(sum(counts), dtype=dtype, device=device)
        self.slots = list(self.partials.split(counts))

    def _view(self, param: Tensor, offset: int) -> Tensor:
        if checks.is_dense(param):
            strides = param.stride()
        else:
            strides = torch.empty(param.shape, device="meta").stride()
        # set_() and not a slice: a tensor of its own, with a version counter of its own.
        return self.flat.new_empty(0).set_(
            self.flat.untyped_storage(), offset, param.shape, strides
        )

    @property
    def nbytes(self) -> int:
        """Bytes of main gradients and of slots."""
        return self.flat.nbytes + self.partials.nbytes
