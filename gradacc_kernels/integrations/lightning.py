"""Lightning: ``Trainer(accumulate_grad_batches=K)`` with float32 sums of micro-batch gradients."""

from __future__ import annotations

import sys
from typing import Any

import torch

if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    from lightning.pytorch import Callback, LightningModule, Trainer

from gradacc_kernels import hook
from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.integrations.common import are_all_covered, take_over


class GradAccCallback(Callback):
    """Attaches the module where training begins, and detaches it where it ends.

    Lightning divides losses by ``accumulate_grad_batches`` itself, so ``scale`` stays 1.
    ``gradient_clip_val`` clips by the norm from the statistics of the pass. With ``16-mixed`` a
    ``gk.GradScaler`` goes on with the loss scale of Lightning's; with other precisions a window
    that is not finite is stepped, as by Lightning. A module with manual optimization is left alone.

    ``gradacc/grad_norm``, before clipping, and ``gradacc/micro_batches`` of the window are logged
    at each step, without waiting for the device.

    A checkpoint that is written in the middle of a window holds the window (4 bytes an element),
    and training goes on from it bit for bit.

    Args:
        log: whether to log.
        options: of gradacc_kernels.attach, but for ``scale``.

    Attributes:
        accumulator: the :class:`Accumulator` of the training under way, or of the last one; None
            with manual optimization.

    Raises:
        ValueError: a scale, on top of Lightning's own division.
        TypeError, ValueError, RuntimeError: where training begins, as gradacc_kernels.attach.
    """

    def __init__(self, *, log: bool = True, **options: Any):
        if options.get("scale", 1.0) != 1.0:
            raise ValueError(
                "GradAccCallback: Lightning divides the loss by accumulate_grad_batches already: "
                f"leave out scale={options['scale']}"
            )
        self.accumulator: Accumulator | None = None
        self._options = options
        self._logs = log
        self._precision: Any = None
        self._scaler: torch.amp.GradScaler | None = None  # Lightning's, while ours takes its place
        self._window: dict[str, Any] | None = None  # of the checkpoint to go on from

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the module, as Lightning has cast, moved and wrapped it."""
        self._close()
        self.accumulator = None
        if not pl_module.automatic_optimization:
            return
        self.accumulator = hook.attach(pl_module, **self._options)
        if self._window is not None:
            self.accumulator.load_state_dict(self._window)
            self._window = None
        self._precision = trainer.precision_plugin
        self._clip = self._precision.clip_grad_by_norm
        self._precision.clip_grad_by_norm = self._clip_grad_by_norm
        self._scaler = getattr(self._precision, "scaler", None)
        if self._scaler is not None:
            self._precision.scaler = take_over(self._scaler, self.accumulator)

    def _clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        """As the precision plugin's; from the statistics where these parameters are covered."""
        params = list(self._precision.main_params(optimizer))
        if are_all_covered(self.accumulator, params):
            self.accumulator.clip_grad_norm_(clip_val)
        else:
            self._clip(optimizer, clip_val)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        """Logs."""
        if self._precision is not None and self._logs:
            norm = self.accumulator.grad_norm(from_statistics=True)
            self.log("gradacc/grad_norm", norm)
            self.log("gradacc/micro_batches", float(self.accumulator.micro_batches))

    def state_dict(self) -> dict[str, Any]:
        """Returns the window, where a checkpoint comes in the middle of one."""
        if self._precision is None or not self.accumulator.micro_batches:
            return {}
        return {"window": self.accumulator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the window for where training begins."""
        self._window = state_dict.get("window")

    def on_train_end(self, trainer, pl_module) -> None:
        """Detaches the module."""
        self._close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        """Detaches the module."""
        self._close()

    def _close(self) -> None:
        if self._precision is None:
            return
        del self._precision.clip_grad_by_norm
        if self._scaler is not None:
            if self._scaler.is_enabled():
                self._scaler.load_state_dict(self._precision.scaler.state_dict())
            self._precision.scaler = self._scaler
        self._precision = self._scaler = None
        self.accumulator.detach()
