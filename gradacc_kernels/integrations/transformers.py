"""transformers: the Trainer with float32 sums of micro-batch gradients, by a callback."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.integrations.accelerate import SUMS_BY_ITSELF, Prepared

SKIPPED = "gradacc/skipped_windows"


class GradAccCallback(TrainerCallback):
    """Attaches the model where training begins, and detaches it where it ends.

    The Trainer divides losses itself, by ``gradient_accumulation_steps`` or by the number of items
    in the whole window, so ``.grad`` is the mean with ``scale`` 1. A step closes the window: one
    with inf or NaN is skipped, as ``nonfinite=`` says, and the learning rate's schedule waits with
    it where the optimizer is no fused one. Logs get ``gradacc/skipped_windows`` and
    ``gradacc/micro_batches``, of the last window.

    With the trainer, ``trainer.add_callback(GradAccCallback(trainer))``, clipping and the
    ``grad_norm`` of the logs come from the statistics of the pass, fp16 gets a ``gk.GradScaler``
    that goes on with the Trainer's loss scale, and reporters (TensorBoard) see our values too.
    Without it, ``Trainer(callbacks=[GradAccCallback()])``, both are the Trainer's, over the same
    float32 gradients, and fp16 skips what torch's scaler skips.

    Checkpoints are those of the Trainer, which writes none in the middle of a window; the count of
    skipped windows goes on from the last log.

    Args:
        trainer: to which the callback is added.
        options: of gradacc_kernels.attach, but for ``scale``.

    Attributes:
        accumulator: the :class:`Accumulator` of the training under way, or of the last one.

    Raises:
        TypeError: no Trainer.
        ValueError: a scale, on top of the Trainer's own division; where training begins, with
            DeepSpeed or XLA, which sum gradients by themselves.
        TypeError, ValueError, RuntimeError: where training begins, as gradacc_kernels.attach.
    """

    def __init__(self, trainer: Trainer | None = None, **options: Any):
        if trainer is not None and not isinstance(trainer, Trainer):
            raise TypeError(
                f"GradAccCallback: trainer must be a transformers.Trainer, got "
                f"{type(trainer).__name__}; options of attach are keywords"
            )
        if options.get("scale", 1.0) != 1.0:
            raise ValueError(
                "GradAccCallback: the Trainer divides the loss by the micro-batches, or items, of "
                f"a window already: leave out scale={options['scale']}"
            )
        self.accumulator: Accumulator | None = None
        self._trainer = trainer
        self._options = options
        self._prepared: Prepared | None = None
        self._skipped_before = 0
        self._micro_batches = 0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Attaches the model; what an interrupted training has left is closed first."""
        self._close()
        kind = args.distributed_state.distributed_type
        if kind in SUMS_BY_ITSELF:
            raise ValueError(
                f"GradAccCallback: {kind.value} sums gradients by itself: expected one process, "
                "DistributedDataParallel or FSDP2"
            )
        options = self._options
        if args.n_gpu > 1:
            options = {"fuse": False, **options}  # replicas share the forward of the original
        accelerator = None
        if self._trainer is not None:
            accelerator = self._trainer.accelerator
            callbacks = self._trainer.callback_handler.callbacks
            if self not in callbacks:
                raise ValueError(
                    "GradAccCallback: it was given one Trainer and added to another: make one each"
                )
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))  # before those that report
        self._prepared = Prepared(accelerator, model, (optimizer,), options)
        self.accumulator = self._prepared.accumulator
        counts = (log[SKIPPED] for log in reversed(state.log_history) if SKIPPED in log)
        self._skipped_before = next(counts, 0)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Notes what the window has had, which the step ends."""
        self._micro_batches = self.accumulator.micro_batches

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Adds our values to those of training, which waits for the device as the loss has."""
        if self._prepared is None or logs is None or "loss" not in logs:
            return
        skipped = self.accumulator.counters["skipped_windows"].item()
        ours = {
            SKIPPED: self._skipped_before + skipped,
            "gradacc/micro_batches": self._micro_batches,
        }
        logs.update(ours)
        state.log_history[-1].update(ours)

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches the model."""
        self._close()

    def _close(self) -> None:
        if self._prepared is not None:
            self._prepared.close()
            self._prepared = None
