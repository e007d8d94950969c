"""What several integrations need: which gradients are ours to clip, and loss scales taken over."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.amp import GradScaler


def are_all_covered(accumulator: Accumulator, params: Iterable[Tensor]) -> bool:
    """Tells whether the gradients of these parameters are all that the accumulator has summed."""
    attachment = accumulator._reference()
    if attachment is None:
        return False
    params = {id(param): param for param in params}
    covered = set(map(id, attachment.params.values()))
    others = (param for key, param in params.items() if key not in covered)
    return covered <= params.keys() and all(param.grad is None for param in others)


def take_over(scaler: torch.amp.GradScaler | None, accumulator: Accumulator) -> GradScaler:
    """Returns a scaler of ours that goes on with the loss scale of torch's.

    Disabled where there is none: its ``step`` closes the window, and skips what is not finite.
    """
    if scaler is None or not scaler.is_enabled():
        return GradScaler(accumulator, enabled=False)
    ours = GradScaler(accumulator)
    ours.load_state_dict(scaler.state_dict())
    return ours
