"""The 16-bit copy of a float32 weight under autocast, made once an accumulation window.

The Python twin of csrc/autograd/window_cast.h, which says why each of the rules is there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_optimizer_steps = 0


def count_optimizer_step() -> None:
    """Has every copy made anew at its next use."""
    global _optimizer_steps
    _optimizer_steps += 1


class WindowCast:
    """A weight's copy, made anew where the weight may have another value.

    That is where ``.grad`` is None or was written to by somebody else; where the weight's version
    counter or address moved; and after a step of any torch optimizer. A copy that is made inside a
    graph capture serves no other call.
    """

    __slots__ = ("_copy", "_weight")

    def __init__(self):
        self._copy: Tensor | None = None
        self._weight: tuple | None = None

    def get(
        self, weight: Tensor, grad: Tensor | None, our_version: int, dtype: torch.dtype
    ) -> Tensor:
        """Returns the copy.

        Args:
            weight: what is copied.
            grad: its ``.grad`` as it is.
            our_version: the version counter of ``grad`` after we last wrote to it, or -1 when it is
                not the tensor that we made ``.grad``.
            dtype: the copy's.
        """
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            self._copy = None
            return self.make(weight, dtype)
        now = (weight.data_ptr(), weight._version, _optimizer_steps, dtype)
        is_window_open = grad is not None and grad._version == our_version
        if self._copy is None or not is_window_open or now != self._weight:
            self._copy = None  # its memory can serve the new one
            self._copy = self.make(weight, dtype)
        self._weight = now
        return self._copy

    @staticmethod
    def make(weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a copy that is not kept."""
        # Unseen by selective checkpoints, which expect the same calls when they recompute.
        with _disable_current_modes():
            return weight.detach().to(dtype)
