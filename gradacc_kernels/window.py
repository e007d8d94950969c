"""An accumulation window: what its micro-batches weigh, whether it is averaged, and how it closes.

    .grad = sum over micro-batches of w_k grad_k      while weighted micro-batches arrive
    .grad = that / sum of w_k                         once averaged

with grad_k the gradient of the mean loss over the w_k tokens (or samples) of micro-batch k, so that
the average is the gradient of the one big batch, however its tokens are spread.
"""

from __future__ import annotations

import contextlib
import numbers
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels import sharded
from gradacc_kernels.distributed import check_weights
from gradacc_kernels.statistics import Statistics, are_nonfinite, measure, scale_grads_

UNWEIGHTED, AVERAGED = -1.0, -2.0
BROKEN = (
    "{}: an exception left a micro-batch of this window after some of its gradients were added and "
    "before its weight was counted: drop the window by zero_grad()"
)
NONFINITE = ("skip_window", "skip_micro_batch", "raise", "ignore")
# Windows whose gradients are sums that nobody has divided yet, so that no optimizer steps them.
pending: weakref.WeakSet[Window] = weakref.WeakSet()
# Those that are reduced over ranks before an optimizer steps them.
shared: weakref.WeakSet[Window] = weakref.WeakSet()


@dataclass
class Closed:
    """What is kept of a window that a step of an optimizer has ended.

    Attributes:
        micro_batches: how many backwards it had.
        tokens: 0-dim float64: the sum of its weights, over all ranks; None without weights.
        stepped: the ids of the parameters of the optimizers that stepped.
        measured: its sums before they were averaged and clipped; None after a stock step, which
            leaves in ``.grad`` what there is to measure.
        divisor: 0-dim float64, what these sums were to be divided by; None for nothing.
        number: 1 for the first one since attach.
    """

    micro_batches: int
    tokens: Tensor | None
    stepped: frozenset[int]
    measured: Statistics | None = None
    divisor: Tensor | None = None
    number: int = 0


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
        scaler: returns the gk.GradScaler that owns inv_scale, or None.
        has_skipped: 0-dim float32: 1 where this window has dropped a micro-batch.
        windows: how many were closed by step.
        ended: how many steps of any optimizer have ended; several that step one after the other,
            by the same gradients, end one.
        closed: the last of these, or None.
        monitors: which are told of each.
    """

    def __init__(self, attachment: Any, nonfinite: str):
        self._attachment = weakref.ref(attachment)
        self.nonfinite = nonfinite
        device = attachment.groups[0].device
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.skipped_micro_batches = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_windows = torch.zeros((), dtype=torch.int64, device=device)
        self.scaler: Callable[[], Any] = lambda: None
        self.windows = 0
        self.is_weighted = False
        self.is_averaged = False
        self.is_broken = False  # gradients were added whose weight was not counted
        self.has_skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._inv_scales: dict[torch.device, Tensor] = {}  # what they are without a weight
        self._open = threading.Lock()  # held by the micro_batch that is under way
        # The hooks' numbers of this window; None for as long as no gradient has arrived.
        self._numbers: list[int] | None = None
        self._unweighted_before = 0  # backwards before the parameters moved
        self._tallies_averaged: list[tuple[int, int, int]] = []
        self._is_late = False  # gradients have arrived after that, and before the parameters moved
        self._tallies_opened: list[tuple[int, int, int]] = []  # when micro_batch began
        self._closed: Tensor | None = None  # 1 where the weight of the last window was 0
        self.ended = 0
        self.closed: Closed | None = None
        self.monitors: list[Any] = []
        self._is_closing = False

    @property
    def attachment(self) -> Any:
        """The attachment, alive."""
        return self._attachment()

    @property
    def is_open(self) -> bool:
        """Whether a micro_batch is under way."""
        return self._open.locked()

    def check_closed(self, what: str) -> None:
        """Raises inside of a micro_batch."""
        if self.is_open:
            raise RuntimeError(f"{what}: called inside of micro_batch(); leave the block first")

    # Which window it is

    def _tallies(self) -> list[tuple[int, int, int]]:
        return [group.hooks.tally() for group in self.attachment.groups]

    def follow(self) -> None:
        """Begins anew where what was summed is gone: zero_grad() dropped it, or a step ended it.

        The window of the attachment goes on for as long as that of one of its groups does.
        """
        groups = self.attachment.groups
        begun = [group.hooks.most_micro_batches() > 0 for group in groups]
        numbers = [number for number, *_ in self._tallies()]
        if self._numbers is not None:
            pairs = zip(begun, numbers, self._numbers, strict=True)
            if not any(has_begun and now == known for has_begun, now, known in pairs):
                self.reset()
        if any(begun):
            self._numbers = numbers

    def _unweighted(self) -> int:
        """Tells how many backwards of the window were outside of a micro_batch with a weight."""
        groups = self.attachment.groups
        of_groups = (g.hooks.tally()[2] for g in groups if g.hooks.most_micro_batches())
        return self._unweighted_before + max(of_groups, default=0)

    def reset(self) -> None:
        """Begins a window: no weight, nothing averaged."""
        self.weight.zero_()
        self.has_skipped.zero_()
        self._first_bad.zero_()
        self.is_weighted = self.is_averaged = self.is_broken = self._is_late = False
        self._numbers = None
        self._unweighted_before = 0
        pending.discard(self)

    def before_move(self) -> None:
        """Called before the parameters get other storage and hooks."""
        if self.is_open and self._has_arrived():
            raise RuntimeError(
                "refresh: parameters were cast, moved or replaced inside of a micro_batch(), after "
                "gradients of it had arrived; do that between micro-batches"
            )
        self.follow()
        self._is_late = self._is_late or self._is_averaged_before()
        self._unweighted_before = self._unweighted()

    def move(self, device: torch.device) -> None:
        """Follows the parameters to another device, and to the hooks that they have now."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        if self._numbers is not None:
            self._numbers = [number for number, *_ in self._tallies()]
        self._tallies_averaged = self._tallies_opened = self._tallies()
        for group in self.attachment.groups:
            group.hooks.weigh(self.is_open and self.is_weighted)

    def end(self, attachment: Any) -> None:
        """Ends the last window, with the average in ``.grad``.

        Of this rank: the garbage collector calls it when it likes, and no other rank with it.

        Args:
            attachment: whose window this is, which may have no references left.
        """
        self._attachment = lambda: attachment
        try:
            if self.nonfinite == "skip_micro_batch":
                self.commit_held()
            self.check_closed("detach")
            self._divide()  # no reduction: a garbage collector runs at other times on each rank
        finally:
            self._attachment = lambda: None
            pending.discard(self)

    # Saving

    def state(self) -> Tensor:
        """What a file holds: weight, UNWEIGHTED or AVERAGED; has_skipped; the first bad one."""
        self.check_closed("state_dict")
        self.divisor()  # raises where there is none
        weight = self.weight
        if self.is_averaged or not self.is_weighted:
            weight = torch.full_like(weight, AVERAGED if self.is_averaged else UNWEIGHTED)
        return torch.stack([weight, self.has_skipped.double(), self._first_bad.double()])

    def load(self, state: Tensor) -> None:
        """Goes on with a window that has this state."""
        self.reset()
        weight, has_skipped, first_bad = state.unbind()
        self.has_skipped.copy_(has_skipped)
        self._first_bad.copy_(first_bad)
        if self.attachment.micro_batches():
            self._numbers = [number for number, *_ in self._tallies()]
        if weight.item() == UNWEIGHTED:
            self._unweighted_before = self.attachment.micro_batches()
            return
        self.is_weighted = True
        if weight.item() == AVERAGED:
            self._mark_averaged()
        else:
            self.weight.copy_(weight)
            pending.add(self)

    # Micro-batches

    def micro_batch(self, weight: float | Tensor | None) -> contextlib.AbstractContextManager[None]:
        """See Accumulator.micro_batch."""
        return self._micro_batch(None if weight is None else _checked(weight))

    @contextlib.contextmanager
    def _micro_batch(self, weight: float | Tensor | None) -> Iterator[None]:
        if not self._open.acquire(blocking=False):
            raise RuntimeError("micro_batch: expected none under way, got one inside of another")
        attachment = self.attachment  # alive until the end
        holds = self.nonfinite == "skip_micro_batch"
        good = None
        try:
            was_weighted = self._begin(weight)
            for group in attachment.groups:
                group.hooks.weigh(weight is not None)
            try:
                if holds:
                    yield
                    good = self.commit_held(weight)
                else:
                    with self._factor(weight):
                        yield
            except BaseException:
                if holds:
                    for group in attachment.groups:
                        group.hooks.drop_held()
                if weight is not None:
                    self._break_off(was_weighted)
                raise
            finally:
                for group in attachment.groups:
                    group.hooks.weigh(False)
            if weight is not None:
                self._count(weight if good is None else good * weight)
            attachment.end_backward_reduction()
        finally:
            self._open.release()

    def _has_arrived(self) -> bool:
        """Tells whether a gradient has arrived since micro_batch began."""
        is_held = any(group.hooks.held() for group in self.attachment.groups)
        return is_held or self._tallies() != self._tallies_opened

    def _break_off(self, was_weighted: bool) -> None:
        """Follows an exception out of a weighted micro-batch."""
        has_arrived = self._has_arrived()
        self.follow()
        if has_arrived and self.attachment.micro_batches():
            self.is_weighted = self.is_broken = True
            pending.add(self)
        elif not was_weighted or has_arrived:
            self.reset()

    def _begin(self, weight: float | Tensor | None) -> bool:
        """Raises where no such micro-batch can follow; tells whether one with a weight came before.

        Parameters that were changed by a way that is not seen are followed now, and not inside.
        """
        self._tallies_opened = self._tallies()
        self.attachment.refresh()
        self.follow()
        if self.is_averaged:
            raise RuntimeError(
                "micro_batch: the gradients of this window were averaged already; step the "
                "optimizer, or call zero_grad() (not set_to_none=False), before the next one"
            )
        if self.is_broken:
            raise RuntimeError(BROKEN.format("micro_batch"))
        if weight is not None and self.attachment.reducer is None:
            check_weights(self.attachment.params.values())
        unweighted = self._unweighted()
        if (unweighted > 0) if weight is not None else self.is_weighted:
            raise RuntimeError(
                "micro_batch: expected all micro-batches of a window to have a weight or none, got "
                f"{unweighted or 'one'} without a weight in a window with others; zero_grad() "
                "drops a window"
            )
        if weight is None or self.is_weighted:
            return self.is_weighted
        left_over = self._left_over()
        if left_over is not None:
            raise RuntimeError(
                f"micro_batch: parameter {left_over} still has the gradient of the last window, "
                "which was divided by that window's weight: call zero_grad() on it. Optimizers "
                "that step at different times need an attachment each"
            )
        self.reset()
        self.is_weighted = True
        pending.add(self)
        return False

    def _left_over(self) -> str | None:
        """Names a parameter whose gradient is still that of a window that has ended."""
        indices = ((group, group.hooks.left_over()) for group in self.attachment.groups)
        return next((group.names[index] for group, index in indices if index >= 0), None)

    def _count(self, weight: float | Tensor) -> None:
        self.follow()
        if self._has_arrived() and not self.attachment.micro_batches():
            return self.reset()  # zero_grad() inside of the block has dropped them
        self.is_weighted = True
        pending.add(self)
        if isinstance(weight, Tensor):
            weight = weight.to(self.weight.device, non_blocking=self.weight.is_cuda)
        self.weight.add_(weight)
        self.tokens.add_(weight)

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
                with torch.inference_mode(False):
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

    # What is not finite

    def commit_held(self, weight: float | Tensor | None = None) -> Tensor | None:
        """Adds what skip_micro_batch holds, times a weight, where all of it is finite.

        Returns:
            1 where it was added, 0 where it was dropped, both on the device; None where nothing is
            held.
        """
        attachment = self.attachment
        held = [(group, group.hooks.held()) for group in attachment.groups]
        held = [(group, grads) for group, grads in held if grads]
        if not held:
            return None
        self.follow()
        device = self.weight.device
        verdicts = [are_nonfinite(grads).to(device, non_blocking=True) for _, grads in held]
        bad = verdicts[0] if len(verdicts) == 1 else torch.stack(verdicts).amax()
        good = 1 - sharded.agree(attachment.params.values(), bad)
        with self._factor(weight, good):  # a factor of 0 leaves main gradients as they are
            for group, _ in held:
                group.hooks.commit_held()
        self.follow()
        skipped = 1 - good
        if weight is not None:
            skipped = skipped * (weight != 0)  # nothing was dropped that would have been added
        self.skipped_micro_batches.add_(skipped.to(torch.int64))
        self.has_skipped.copy_(torch.maximum(self.has_skipped, skipped))
        return good

    def end_of_backward(self) -> None:
        """Called where a mode has something to do after each backward."""
        attachment = self.attachment
        if attachment is None or not attachment.groups:
            return
        if self.nonfinite == "raise":
            self._note_nonfinite()
        elif self.nonfinite == "skip_micro_batch" and not self.is_open:
            if len(attachment.groups) > 1:
                for group in attachment.groups:
                    group.hooks.drop_held()
                raise RuntimeError(
                    "gradacc_kernels: with nonfinite='skip_micro_batch' and parameters of several "
                    "devices or main gradient dtypes, run each backward inside of `with "
                    "accumulator.micro_batch():`, which tells when all gradients are there"
                )
            self.commit_held()
        if not self.is_open:
            attachment.end_backward_reduction()

    def end_reduction(self, reducer: Any) -> None:
        """Follows the reduction of the gradients: what was counted becomes the mean of the ranks.

        So a division by the weight is one by the total weight of all of them.
        """
        self.follow()
        number = self.attachment.groups[0].hooks.tally()[0]
        skips = self.nonfinite == "skip_micro_batch"
        values = torch.stack([self.weight, self.has_skipped.double()])
        weight, has_skipped = reducer.exchange(
            number, self.is_weighted, values, self.is_weighted or skips
        )
        if self.is_weighted:
            self.weight.copy_(weight)
        if skips:
            self.has_skipped.copy_(has_skipped > 0)

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
        if not measured.found_inf:
            self._first_bad.zero_()  # what was bad has been overwritten
            return
        names = [name for name, value in measured.sums.items() if value.isnan()]
        before = f"{len(names) - 5} others and " if len(names) > 5 else ""
        raise FloatingPointError(
            f"step: micro-batch {self._first_bad.item() or 'unknown'} of "
            f"{self.attachment.micro_batches()} brought gradients that are inf or NaN, to "
            f"{before}{', '.join(names[-5:])}"  # the last ones are the nearest to the loss
        )

    # The end

    @property
    def is_pending(self) -> bool:
        """Whether ``.grad`` is a weighted sum that nobody has divided yet."""
        attachment = self.attachment
        if attachment is None or not attachment.groups:
            return False
        self.follow()
        return self.is_weighted and not self.is_averaged and attachment.micro_batches() > 0

    def divisor(self) -> Tensor | None:
        """What ``.grad`` is to be divided by, 0-dim float64; None for nothing."""
        if self.is_open and self.is_weighted:
            self.check_closed("gradacc_kernels")
        is_pending = self.is_pending
        if self._is_late or self._is_averaged_before():
            raise RuntimeError(
                "gradacc_kernels: gradients have arrived after this window was averaged, so there "
                "is no average: drop the window by zero_grad(), and average after its last "
                "micro-batch"
            )
        if not is_pending:
            return None
        if self.is_broken:
            raise RuntimeError(BROKEN.format("gradacc_kernels"))
        unweighted = self._unweighted()
        if unweighted:
            raise RuntimeError(
                f"gradacc_kernels: {unweighted} backwards of this window were outside of "
                "micro_batch(weight=...), so there is no average: give each of them a weight, or "
                "drop the window by zero_grad()"
            )
        return torch.where(self.weight > 0, self.weight, 1.0)

    def _is_averaged_before(self) -> bool:
        """Tells whether gradients have arrived after the average."""
        return self.is_averaged and self._tallies() != self._tallies_averaged

    def _mark_averaged(self) -> None:
        self.is_averaged = True
        self._tallies_averaged = self._tallies()
        pending.discard(self)

    def average_(self, factor: Tensor | None = None) -> None:
        """Divides ``.grad`` by the weight of the window, once; multiplies it by factor as well."""
        self.check_closed("average_")
        self.attachment.ensure_reduced()
        self._divide(factor)

    def _divide(self, factor: Tensor | None = None) -> None:
        divisor = self.divisor()
        if divisor is not None:
            factor = divisor.reciprocal() if factor is None else factor / divisor
        if factor is not None:
            scale_grads_(self.attachment, factor)
        if divisor is not None:
            self._mark_averaged()

    def total_weight(self) -> Tensor:
        """See Accumulator.weight."""
        self.follow()
        attachment = self.attachment
        if attachment.reducer is None or not attachment.groups[0].hooks.is_reduced():
            return self.weight.clone()
        return self.weight * attachment.ranks()  # it is the mean of theirs

    def norm(self, *, from_slots: bool, params: Any = None) -> Tensor:
        """Returns the norm of the average."""
        norm = measure(self.attachment, from_slots=from_slots, params=params).norm
        divisor = self.divisor()
        return norm if divisor is None else (norm / divisor).to(norm.dtype)

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises what speaks against a close, before a gradient has changed but for reduction."""
        self.check_closed("step")
        self.attachment.ensure_reduced()
        covered = set(map(id, self.attachment.params.values()))
        if not any(id(p) in covered for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "step: none of the optimizer's parameters is covered by this Accumulator: attach "
                "the model whose parameters it steps"
            )
        if self.nonfinite == "raise":
            self.raise_if_nonfinite()
        self.divisor()

    def close(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Any],
        max_norm: float | None,
        other_found_inf: Tensor | None = None,
    ) -> tuple[Any, Tensor, Tensor]:
        """Averages, clips, checks and steps, after check_step.

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
        closing = self.closing(params)
        step = self._unobserved(step)
        ours = {id(p) for p in attachment.params.values() if p.grad is not None}
        theirs = {id(p) for p in params if p.grad is not None}
        whole = measure(attachment, from_slots=True)
        divisor = self.divisor()
        closing.measured, closing.divisor = whole, divisor
        norm = whole.norm if divisor is None else (whole.norm / divisor).to(whole.norm.dtype)
        # Clipping takes the norm of all, so that all of them have to be finite for it.
        of_optimizer = whole
        if max_norm is None and not ours <= theirs:
            of_optimizer = measure(attachment, from_slots=True, params=params)
        found_inf = of_optimizer.found_inf
        if self.nonfinite == "ignore":
            found_inf = torch.zeros_like(found_inf)
        if other_found_inf is not None:
            found_inf = torch.maximum(found_inf, other_found_inf)
        # A window of weight 0 is skipped by every optimizer, and nothing has overflowed.
        skip, is_empty = found_inf, None
        if divisor is not None:
            is_empty = (self.weight == 0).float()
        elif self._closed is not None and self._left_over() is not None:
            is_empty = self._closed
        if is_empty is not None:
            skip = torch.maximum(found_inf, is_empty)
        factor = None
        if max_norm is not None:
            factor = clip_coefficient(norm, max_norm)
            if self.nonfinite != "ignore":
                factor = factor.nan_to_num_(nan=1.0)  # skipped; another optimizer's are not touched

        # Without weights a pass of its own is the better one: where nothing is to be clipped it
        # touches nothing, and the optimizer's kernel, told to divide, writes every gradient back.
        folds = getattr(optimizer, "_step_supports_amp_scaling", False)
        if folds and divisor is not None and ours == theirs:
            result = self._step_folded(optimizer, step, divisor, factor, skip)
        else:
            self.average_(factor)
            must_ask = self.nonfinite not in ("ignore", "raise") or is_empty is not None
            must_ask = must_ask or other_found_inf is not None
            if folds:
                result = self._step_folded(optimizer, step, None, None, skip)
            else:
                result = None if must_ask and skip.item() else step()
        self.windows += 1
        self.skipped_windows.add_(skip.to(torch.int64))
        self.remember(closing)
        for group in attachment.groups:
            group.hooks.end_window()
        self.reset()
        attachment.end_reduced_window()
        self._closed = is_empty
        return result, norm, found_inf

    def _unobserved(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A step that :meth:`end_by_step` is not told of: it is a part of a close."""

        def stepped():
            self._is_closing = True
            try:
                return step()
            finally:
                self._is_closing = False

        return stepped

    def end_by_step(self, params: Iterable[Tensor]) -> None:
        """Called after a step of an optimizer over these, before the hooks end their windows."""
        if not self._is_closing:
            self.remember(self.closing(params))

    def closing(self, params: Iterable[Tensor]) -> Closed:
        """What is kept of the window as it is, by which an optimizer over these steps."""
        attachment = self.attachment
        self.follow()
        tokens = None
        if self.is_weighted:
            tokens = self.weight * attachment.ranks()  # where it is reduced, the mean of theirs
        return Closed(attachment.micro_batches(), tokens, frozenset(map(id, params)))

    def remember(self, closing: Closed) -> None:
        """Keeps what a step has ended, and tells monitors; nothing without gradients of ours."""
        before = self.closed
        if not closing.micro_batches:  # no backward since the last end, but for replayed graphs
            if before is not None and not closing.stepped & before.stepped:
                before.stepped |= closing.stepped  # another optimizer steps by the same gradients
                return
            if not self.attachment.has_main_grads():
                return
        self.ended += 1
        closing.number = self.ended
        self.closed = closing
        for monitor in self.monitors:
            monitor.record(closing)

    def _step_folded(self, optimizer, step, divisor, factor, skip) -> Any:
        """Lets the optimizer's kernel divide, clip and skip."""
        grad_scale = divisor
        if factor is not None:
            grad_scale = (1.0 if divisor is None else divisor) / factor.double()
        optimizer.found_inf = skip
        optimizer.grad_scale = None if grad_scale is None else grad_scale.float()
        if divisor is not None:
            self._mark_averaged()
        try:
            return step()
        except BaseException:
            if divisor is not None:
                self.is_averaged = False
                pending.add(self)
            raise
        finally:
            for name in ("found_inf", "grad_scale"):
                if name in vars(optimizer):
                    delattr(optimizer, name)


def _checked(weight: Any) -> float | Tensor:
    """Returns a weight rounded to float32: a number, or a 0-dim copy on its device."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex() or weight.requires_grad:
            raise ValueError(
                "micro_batch: weight must be a number or a tensor of one that does not require "
                f"grad, got a {weight.dtype} tensor of shape {list(weight.shape)}"
            )
        if weight.device.type != "cpu":
            return weight.detach().reshape(()).float().to(torch.float64)
        weight = weight.item()
    if not isinstance(weight, numbers.Real):
        raise TypeError(
            f"micro_batch: weight must be a number or a tensor, got {type(weight).__name__}"
        )
    if not 0 <= weight <= torch.finfo(torch.float32).max:
        raise ValueError(f"micro_batch: weight must be finite and not negative, got {weight}")
    # As it multiplies, so that what is divided is what was added.
    return struct.unpack("f", struct.pack("f", weight))[0]


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
