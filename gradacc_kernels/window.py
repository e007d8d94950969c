"""An accumulation window: what its micro-batches weigh, whether it is averaged, and how it closes.

    .grad = sum over micro-batches of w_k grad_k      while weighted micro-batches arrive
    .grad = that / sum of w_k                         once averaged

with grad_k the gradient of the mean loss over the w_k tokens (or samples) of micro-batch k, so that
the average is the gradient of the one big batch, however its tokens are spread.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels.statistics import are_nonfinite, measure, scale_grads_

NONFINITE = ("skip_window", "skip_micro_batch", "raise", "ignore")
# Windows whose gradients are sums that nobody has divided yet, so that no optimizer steps them.
pending: weakref.WeakSet[Window] = weakref.WeakSet()


class Window:
    """The window of one attachment, and the counters of all its windows. Nothing here waits.

    Args:
        attachment: whose window; held weakly.
        nonfinite: one of NONFINITE.

    Attributes:
        weight: 0-dim float64: the sum of the weights so far.
        tokens: 0-dim float64: the sum of the weights of all windows.
        skipped_micro_batches: 0-dim int64.
        skipped_windows: 0-dim int64.
        has_skipped: 0-dim float32: 1 where this window has dropped a micro-batch.
        windows: how many were closed by step.
    """

    def __init__(self, attachment: Any, nonfinite: str):
        self._attachment = weakref.ref(attachment)
        self.nonfinite = nonfinite
        device = attachment.groups[0].device
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.skipped_micro_batches = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_windows = torch.zeros((), dtype=torch.int64, device=device)
        self.windows = 0
        self.is_open = False  # whether a micro_batch is under way
        self.is_weighted = False
        self.is_averaged = False
        self._n_weighted = 0  # backwards of the window that had a weight
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self.has_skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._inv_scales: dict[torch.device, Tensor] = {}  # what they are without a weight

    @property
    def attachment(self) -> Any:
        """The attachment, alive."""
        return self._attachment()

    # Micro-batches

    @contextlib.contextmanager
    def micro_batch(self, weight: float | Tensor | None) -> Iterator[None]:
        """See Accumulator.micro_batch."""
        self._check_weight(weight)
        attachment = self.attachment
        if self.is_open:
            raise RuntimeError("micro_batch: expected none under way, got one inside of another")
        before = self._begin(weight)
        good = None
        self.is_open = True
        try:
            if self.nonfinite == "skip_micro_batch":
                yield
                good = self.commit_held(weight)
            else:
                with self._factor(weight):
                    yield
        except BaseException:
            for group in attachment.groups:
                group.hooks.drop_held()
            raise
        finally:
            self.is_open = False
        if weight is not None:
            self._n_weighted += attachment.micro_batches() - before
            counted = weight if good is None else good * weight
            if isinstance(counted, Tensor):
                counted = counted.to(self.weight.device, non_blocking=self.weight.is_cuda)
            self.weight.add_(counted)
            self.tokens.add_(counted)

    @staticmethod
    def _check_weight(weight: float | Tensor | None) -> None:
        if weight is None:
            return
        if isinstance(weight, Tensor):
            if weight.numel() != 1 or weight.is_complex() or weight.requires_grad:
                raise ValueError(
                    "micro_batch: weight must be a number or a tensor of one that does not require "
                    f"grad, got a {weight.dtype} tensor of shape {list(weight.shape)}"
                )
        elif not isinstance(weight, (int, float)):
            raise TypeError(
                f"micro_batch: weight must be a number or a tensor, got {type(weight).__name__}"
            )
        elif not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"micro_batch: weight must be finite and not negative, got {weight}")

    def _begin(self, weight: float | Tensor | None) -> int:
        count = self.attachment.micro_batches()
        if count == 0:
            self.reset()
        if self.is_averaged:
            raise RuntimeError(
                "micro_batch: the gradients of this window were averaged already; step the "
                "optimizer and call zero_grad() before the next micro-batch"
            )
        if (weight is not None and count != self._n_weighted) or (
            weight is None and self.is_weighted
        ):
            raise RuntimeError(
                "micro_batch: expected all micro-batches of a window to have a weight or none, got "
                f"{self._n_weighted} of {count} backwards with one before this"
            )
        if weight is not None:
            self.is_weighted = True
            pending.add(self)
        return count

    @contextlib.contextmanager
    def _factor(self, *factors: float | Tensor | None) -> Iterator[None]:
        """Has what is added meanwhile multiplied by these, on top of inv_scale; None for 1."""
        factors = [factor for factor in factors if factor is not None]
        if not factors:
            yield
            return
        attachment = self.attachment
        attachment.use_inv_scale()
        inv_scales = attachment.inv_scales()
        for device, inv_scale in inv_scales.items():
            if device not in self._inv_scales:
                self._inv_scales[device] = torch.empty_like(inv_scale)
            self._inv_scales[device].copy_(inv_scale)
            for factor in factors:
                is_far = isinstance(factor, Tensor) and factor.device != device
                inv_scale.mul_(factor.to(device, non_blocking=True) if is_far else factor)
        try:
            yield
        finally:
            for device, inv_scale in inv_scales.items():
                inv_scale.copy_(self._inv_scales[device])

    def move(self, device: torch.device) -> None:
        """Follows the parameters to another device."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def end(self) -> None:
        """Ends the last window, with the average in ``.grad``."""
        if self.nonfinite == "skip_micro_batch":
            self.commit_held()
        try:
            self.average_()
        finally:
            pending.discard(self)

    def reset(self) -> None:
        """Begins a window: no weight, nothing averaged."""
        self.weight.zero_()
        self._first_bad.zero_()
        self.is_weighted = self.is_averaged = False
        self._n_weighted = 0
        pending.discard(self)

    def saved_weight(self) -> Tensor:
        """The weight as a file holds it: -1 where nothing is to be divided."""
        return self.weight.clone() if self.is_pending else torch.full_like(self.weight, -1.0)

    def load_weight(self, weight: Tensor) -> None:
        """Goes on with a window that has this weight, or none, where it is -1."""
        self.reset()
        if weight.item() >= 0:
            self.weight.copy_(weight.reshape(()))
            self.is_weighted = True
            self._n_weighted = self.attachment.micro_batches()
            pending.add(self)

    # What is not finite

    def commit_held(self, weight: float | Tensor | None = None) -> Tensor | None:
        """Adds what skip_micro_batch holds, times a weight, where all of it is finite.

        Returns:
            1 where it was added, 0 where it was dropped, both on the device; None where nothing is
            held.
        """
        attachment = self.attachment
        held = [(group, group.hooks.held()) for group in attachment.groups]
        held = [(group, grads) for group, grads in held if any(g.numel() for g in grads)]
        if not held:
            return None
        device = self.weight.device
        verdicts = [are_nonfinite(grads).to(device, non_blocking=True) for _, grads in held]
        good = 1 - (verdicts[0] if len(verdicts) == 1 else torch.stack(verdicts).amax())
        with self._factor(weight, good):  # a factor of 0 leaves main gradients as they are
            for group, _ in held:
                group.hooks.commit_held()
        self.skipped_micro_batches.add_((1 - good).to(torch.int64))
        self.has_skipped.copy_(torch.maximum(self.has_skipped, 1 - good))
        return good

    def end_of_backward(self) -> None:
        """Called where a mode has something to do after each backward."""
        attachment = self.attachment
        if attachment is None or not attachment.groups:
            return
        if self.nonfinite == "raise":
            self._note_nonfinite()
        elif not self.is_open:
            if len(attachment.groups) > 1:
                for group in attachment.groups:
                    group.hooks.drop_held()
                raise RuntimeError(
                    "gradacc_kernels: with nonfinite='skip_micro_batch' and parameters of several "
                    "devices or main gradient dtypes, run each backward inside of `with "
                    "accumulator.micro_batch():`, which tells when all gradients are there"
                )
            self.commit_held()

    def _note_nonfinite(self) -> None:
        count = self.attachment.micro_batches()
        if count == 1:
            self._first_bad.zero_()
        found = measure(self.attachment, from_slots=True).found_inf
        is_first = (found > 0) & (self._first_bad == 0)
        self._first_bad.copy_(torch.where(is_first, count, self._first_bad))

    def raise_if_nonfinite(self) -> None:
        """Waits for the device; raises what nonfinite="raise" does."""
        measured = measure(self.attachment, from_slots=True)
        if not self._first_bad.item() and not measured.found_inf:
            return
        names = [name for name, value in measured.sums.items() if value.isnan()]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise FloatingPointError(
            f"step: micro-batch {self._first_bad.item() or 'unknown'} of "
            f"{self.attachment.micro_batches()} brought gradients that are inf or NaN, to "
            f"{', '.join(names[:5])}{more}"
        )

    # The end

    @property
    def is_pending(self) -> bool:
        """Whether ``.grad`` is a weighted sum that nobody has divided yet."""
        attachment = self.attachment
        is_sum = self.is_weighted and not self.is_averaged
        return is_sum and attachment is not None and attachment.micro_batches() > 0

    def divisor(self) -> Tensor | None:
        """What ``.grad`` is to be divided by, 0-dim float64; None for nothing."""
        if not self.is_pending:
            return None
        count = self.attachment.micro_batches()
        if count != self._n_weighted:
            raise RuntimeError(
                f"gradacc_kernels: {count - self._n_weighted} of the {count} backwards of this "
                "window were outside of micro_batch(weight=...), so there is no average: give each "
                "of them a weight"
            )
        return torch.where(self.weight > 0, self.weight, 1.0)

    def average_(self, factor: Tensor | None = None) -> None:
        """Divides ``.grad`` by the weight of the window, once; multiplies it by factor as well."""
        divisor = self.divisor()
        if divisor is not None:
            factor = divisor.reciprocal() if factor is None else factor / divisor
        if factor is not None:
            scale_grads_(self.attachment, factor)
        self.is_averaged = self.is_averaged or divisor is not None
        pending.discard(self)

    def norm(self, *, from_slots: bool, params: Any = None) -> Tensor:
        """Returns the norm of the average."""
        norm = measure(self.attachment, from_slots=from_slots, params=params).norm
        divisor = self.divisor()
        return norm if divisor is None else (norm / divisor).to(norm.dtype)

    def close(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Any],
        max_norm: float | None,
        other_found_inf: Tensor | None = None,
    ) -> tuple[Any, Tensor, Tensor]:
        """Averages, clips, checks and steps.

        Args:
            optimizer: over covered parameters, and others.
            step: steps it.
            max_norm: of the average over all covered parameters; None for no clipping.
            other_found_inf: 1 where gradients that are not covered are not finite.

        Returns:
            What step returned, the norm before clipping, and found_inf.
        """
        attachment = self.attachment
        params = [p for group in optimizer.param_groups for p in group["params"]]
        ours = {id(p) for p in attachment.params.values() if p.grad is not None}
        theirs = {id(p) for p in params if p.grad is not None}
        if not theirs & {id(p) for p in attachment.params.values()} and ours:
            raise ValueError(
                "step: none of the optimizer's parameters with a gradient is covered by this "
                "Accumulator: attach the model whose parameters it steps"
            )
        if self.nonfinite == "raise":
            self.raise_if_nonfinite()
        whole = measure(attachment, from_slots=True)
        divisor = self.divisor()
        norm = whole.norm if divisor is None else (whole.norm / divisor).to(whole.norm.dtype)
        of_optimizer = whole
        if not ours <= theirs:
            of_optimizer = measure(attachment, from_slots=True, params=params)
        found_inf = of_optimizer.found_inf
        if self.nonfinite == "ignore":
            found_inf = torch.zeros_like(found_inf)
        if other_found_inf is not None:
            found_inf = torch.maximum(found_inf, other_found_inf)
        if divisor is not None:
            found_inf = torch.maximum(found_inf, (self.weight == 0).float())
        factor = None if max_norm is None else clip_coefficient(norm, max_norm)

        # Without weights a pass of its own is the better one: where nothing is to be clipped it
        # touches nothing, and the optimizer's kernel, told to divide, writes every gradient back.
        folds = getattr(optimizer, "_step_supports_amp_scaling", False)
        if folds and divisor is not None and ours == theirs:
            result = self._step_folded(optimizer, step, divisor, factor, found_inf)
        else:
            self.average_(factor)
            must_ask = self.nonfinite not in ("ignore", "raise") or divisor is not None
            must_ask = must_ask or other_found_inf is not None
            if folds:
                result = self._step_folded(optimizer, step, None, None, found_inf)
            else:
                result = None if must_ask and found_inf.item() else step()
        self.windows += 1
        self.has_skipped.zero_()
        self.skipped_windows.add_(found_inf.to(torch.int64))
        for group in attachment.groups:
            group.hooks.end_window()
        return result, norm, found_inf

    def _step_folded(self, optimizer, step, divisor, factor, found_inf) -> Any:
        """Lets the optimizer's kernel divide, clip and skip."""
        grad_scale = divisor
        if factor is not None:
            grad_scale = (1.0 if divisor is None else divisor) / factor.double()
        optimizer.found_inf = found_inf
        optimizer.grad_scale = None if grad_scale is None else grad_scale.float()
        self.is_averaged = self.is_averaged or divisor is not None
        pending.discard(self)
        try:
            return step()
        finally:
            for name in ("found_inf", "grad_scale"):
                if name in vars(optimizer):
                    delattr(optimizer, name)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
