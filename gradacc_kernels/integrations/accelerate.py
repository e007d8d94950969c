"""accelerate: its loop as it is, with windows that are summed, clipped and closed by us.

accelerator.backward(loss): main = main + grad of loss / gradient_accumulation_steps, in float32;
accelerator.clip_grad_norm_: by the norm from the statistics of the pass; optimizer.step(): unless a
gradient is not finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor

from gradacc_kernels import hook
from gradacc_kernels.integrations.common import are_all_covered, take_over

SUMS_BY_ITSELF = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class Prepared:
    """What :func:`prepare` returns; as a context manager it closes at exit.

    Attributes:
        accumulator: the :class:`Accumulator`. ``accelerator.register_for_checkpointing`` takes it,
            for checkpoints in the middle of a window.
    """

    def __init__(
        self,
        accelerator: Accelerator | None,
        model: torch.nn.Module,
        optimizers: tuple[AcceleratedOptimizer, ...],
        options: dict[str, Any],
    ):
        self._accelerator, self._model, self._optimizers = accelerator, model, optimizers
        self._scalers = [optimizer.scaler for optimizer in optimizers]
        self.accumulator = hook.attach(model, **options)
        if accelerator is not None:
            self._clip = accelerator.clip_grad_norm_
            accelerator.clip_grad_norm_ = self._clip_grad_norm_
        # Under a process group of ours, accelerator.accumulate(model) asks the model for this.
        self._has_no_sync = options.get("process_group") is not None
        if self._has_no_sync:
            model.no_sync = self.accumulator.no_sync
        torchs = None if accelerator is None else accelerator.scaler
        self._scaler = take_over(torchs, self.accumulator)
        for optimizer, before in zip(optimizers, self._scalers, strict=True):
            if before is torchs:
                optimizer.__setstate__({"scaler": self._scaler})
        if torchs is not None:
            accelerator.scaler = self._scaler

    def _clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """As accelerate's; from the statistics where these are the covered parameters."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if are_all_covered(self.accumulator, parameters):
            return self.accumulator.clip_grad_norm_(max_norm, norm_type)
        return self._clip(parameters, max_norm, norm_type=norm_type)

    def close(self) -> None:
        """Gives the accelerator and its optimizers back, and detaches; again changes nothing."""
        if self._model is None:
            return
        if self._accelerator is not None:
            del self._accelerator.clip_grad_norm_
            torchs = self._accelerator.scaler
            if torchs is self._scaler:
                torchs = next(s for s in self._scalers if s is not None)
                torchs.load_state_dict(self._scaler.state_dict())
                self._accelerator.scaler = torchs
        for optimizer, before in zip(self._optimizers, self._scalers, strict=True):
            optimizer.__setstate__({"scaler": before})
        if self._has_no_sync:
            del self._model.no_sync
        self._model = None
        self.accumulator.detach()

    def __enter__(self) -> Prepared:
        """Returns itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Closes."""
        self.close()


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    *optimizers: AcceleratedOptimizer,
    **options: Any,
) -> Prepared:
    """Attaches a model that an accelerator has prepared; the loop stays as it is.

    ``accelerator.accumulate(model)`` sums into float32 main gradients. ``accelerator.backward``
    divides the loss by ``gradient_accumulation_steps``, so ``scale`` stays 1.
    ``accelerator.clip_grad_norm_`` of the model's parameters takes the norm from the statistics of
    the pass, and is NaN where torch's is inf. ``optimizer.step()`` closes the window: one with
    inf or NaN is skipped, as ``nonfinite=`` says, and ``accelerator.optimizer_step_was_skipped``
    tells of it where the optimizer is no fused one. With fp16 a ``gk.GradScaler`` goes on with the
    accelerator's loss scale.

    Args:
        accelerator: that has prepared the rest.
        model: as ``accelerator.prepare`` returned it. With ``process_group=``, one that it has not
            wrapped in DistributedDataParallel: ``accelerator.prepare_model(model,
            evaluation_mode=True)``.
        optimizers: as ``accelerator.prepare`` returned them.
        options: of gradacc_kernels.attach.

    Returns:
        An object with ``accumulator`` and ``close()``, which is a context manager too.

    Raises:
        TypeError: an optimizer that was not prepared.
        ValueError: DeepSpeed, Megatron-LM or XLA, which sum gradients by themselves.
        TypeError, ValueError, RuntimeError: as gradacc_kernels.attach. Nothing was changed.
    """
    if accelerator.distributed_type in SUMS_BY_ITSELF:
        raise ValueError(
            f"prepare: {accelerator.distributed_type.value} sums gradients by itself: expected one "
            "process, DistributedDataParallel or FSDP2"
        )
    for optimizer in optimizers:
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise TypeError(
                "prepare: expected optimizers as accelerator.prepare returned them, got "
                f"{type(optimizer).__name__}"
            )
    return Prepared(accelerator, model, optimizers, options)
