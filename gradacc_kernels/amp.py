"""GradScaler: loss scaling whose gradients arrive unscaled.

    main = fma(grad, 1 / loss_scale, main)

so that ``.grad`` is in true units at any moment, and nothing is left to unscale.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.statistics import measure


def _disown(attachment: weakref.ref[Any]) -> None:
    """Has gradients arrive as they are, where a scaler is gone and no other has taken its place."""
    alive = attachment()
    if alive is not None and alive.groups and alive.window.scaler() is None:
        with torch.inference_mode(False):  # the garbage collector may call this anywhere
            for inv_scale in alive.inv_scales().values():
                inv_scale.fill_(1.0)


class GradScaler(torch.amp.GradScaler):
    """torch's GradScaler over an Accumulator: the same methods, state and checkpoints.

    It owns :attr:`Accumulator.inv_scale`, and sets it to 1 / scale when the scale changes, and to 1
    when it is dropped. Of several over one Accumulator the last one owns it; others are refused.
    :meth:`unscale_` only takes the verdict from the statistics of the pass (parameters that are not
    covered are unscaled as torch does), so it costs no pass over memory and may be called again.
    :meth:`step` does not wait for the device where the optimizer takes ``found_inf``, as torch's
    fused ones do; it divides by the weight of the window (:meth:`Accumulator.micro_batch`) first.

    Args:
        accumulator: of :func:`attach`.
        options: of ``torch.amp.GradScaler``; ``device`` is that of the parameters.

    Raises:
        TypeError: no Accumulator.
        RuntimeError: it is detached.
    """

    def __init__(self, accumulator: Accumulator, **options: Any):
        if not isinstance(accumulator, Accumulator):
            raise TypeError(
                "GradScaler: expected the Accumulator that attach returned, got "
                f"{type(accumulator).__name__}"
            )
        attachment = accumulator._attachment
        options.setdefault("device", attachment.groups[0].device.type)
        super().__init__(**options)
        self.accumulator = accumulator
        self._check_closed()
        if self.is_enabled():
            self._publish()
            attachment.window.scaler = weakref.ref(self)
            weakref.finalize(self, _disown, weakref.ref(attachment)).atexit = False

    def scale(self, outputs: Any) -> Any:
        """Multiplies a loss, or an iterable of them, by the scale, as torch's does.

        Raises:
            RuntimeError: another GradScaler divides the gradients: that was made later, or this one
                is disabled.
        """
        attachment = self.accumulator._reference()
        owner = self if self.is_enabled() else None
        if attachment is not None and attachment.window.scaler() is not owner:
            raise RuntimeError(
                "GradScaler.scale: another GradScaler was made over this Accumulator, and "
                "gradients arrive divided by its scale: use that one alone"
            )
        return super().scale(outputs)

    def _check_closed(self) -> None:
        if self.is_enabled() and self.accumulator._attachment.window.is_open:
            raise RuntimeError("GradScaler: the scale cannot change inside of micro_batch()")

    def _publish(self) -> None:
        """Has gradients arrive divided by the scale, as it is now."""
        for inv_scale in self.accumulator.inv_scales.values():
            if self._scale is None:
                inv_scale.fill_(1 / self._init_scale)
            else:
                inv_scale.copy_(self._scale.double().reciprocal(), non_blocking=True)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the verdict on the optimizer's gradients, which are in true units already."""
        if not self.is_enabled():
            return
        self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        attachment = self.accumulator._attachment
        covered = set(map(id, attachment.params.values()))
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if state["stage"] is OptState.READY:
            others = [p for p in params if id(p) not in covered]
            state["others"] = self._unscale_others(others)
        attachment.ensure_reduced()
        own = measure(attachment, from_slots=True, params=params).found_inf
        verdicts = [own.to(self._scale.device, non_blocking=True), *state["others"]]
        found_inf = torch.stack(verdicts).amax()
        state["found_inf_per_device"] = {self._scale.device: found_inf}
        state["stage"] = OptState.UNSCALED

    def _unscale_others(self, params: list[Tensor]) -> list[Tensor]:
        if not any(param.grad is not None for param in params):
            return []
        inv_scale = self._scale.double().reciprocal().float()
        found_inf = torch.zeros((), dtype=torch.float32, device=self._scale.device)
        groups = SimpleNamespace(param_groups=[{"params": params}])
        found = self._unscale_grads_(groups, inv_scale, found_inf, False).values()
        return [value.to(self._scale.device, non_blocking=True) for value in found]

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Steps the optimizer by the average of the window, unless a gradient is not finite.

        Returns:
            What ``optimizer.step(*args, **kwargs)`` returned; None where it was skipped.
        """
        return self._close(optimizer, lambda: optimizer.step(*args, **kwargs), None, kwargs)[0]

    def _close(self, optimizer, step, max_norm, kwargs) -> tuple[Any, Tensor | None]:
        window = self.accumulator._attachment.window
        if not self.is_enabled():
            window.check_step(optimizer)
            result, norm, _ = window.close(optimizer, step, max_norm)
            return result, norm
        if "closure" in kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        window.check_step(optimizer)
        # A micro-batch that was dropped overflowed at this scale.
        has_skipped = window.has_skipped.clone()
        self.unscale_(optimizer)
        found_inf = state["found_inf_per_device"][self._scale.device]
        result, norm, found_inf = window.close(optimizer, step, max_norm, found_inf)
        overflowed = torch.maximum(found_inf, has_skipped)
        state["found_inf_per_device"] = {
            self._scale.device: overflowed.to(self._scale.device, non_blocking=True)
        }
        state["stage"] = OptState.STEPPED
        return result, norm

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Updates the scale, and what gradients are divided by from now on."""
        self._check_closed()
        super().update(new_scale)
        if self.is_enabled():
            self._publish()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this class or of torch's."""
        self._check_closed()
        super().load_state_dict(state_dict)
        if self.is_enabled():
            self._publish()
