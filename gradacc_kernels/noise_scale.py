"""The gradient noise scale, from the micro-batches of a window.

    S        = (A - N * big) / (K - 1)    trace of the covariance of a token's gradient
    |G|^2    = big - S / N                squared norm of the true gradient
    B_simple = S / |G|^2                  tokens of a batch whose noise is as large as its signal

of K micro-batches, s_k the sum of the gradients of the n_k tokens of one of them: N = sum of n_k,
A = sum of |s_k|^2 / n_k, big = |sum of s_k / N|^2. E|s_k|^2 = n_k^2 |G|^2 + n_k S, so both are
unbiased for any n_k. McCandlish et al., An Empirical Model of Large-Batch Training (2018),
section 2.2 and appendix A.1, has them for two sizes of batches.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradacc_kernels import distributed
from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.samples import draw

MAX_ELEMENTS = 1 << 22


class NoiseScale:
    """Estimates the noise scale of the gradient, B_simple = S / |G|^2, window by window.

    ::

        noise = gk.NoiseScale(accumulator)
        for step, (x, y) in enumerate(batches):
            with accumulator.micro_batch(n_tokens):
                loss_fn(model(x), y).backward()
            noise.observe()
            if (step + 1) % K == 0:
                noise.update()
                accumulator.step(optimizer)
                optimizer.zero_grad()

    A micro-batch's own gradient never exists as such: fused weight gradients are added by the
    product that computes them, and the norm of a sum does not tell that of its last term. So it is
    the difference of the main gradient over the micro-batch, s_k = main_k - main_(k-1), which is
    right for whatever adds to it: hook, fused modules, weights, loss scale, dropped micro-batches.
    Tensor hooks would read it in 16 bits, 2 bytes an element, but take fusion away from what they
    are on. The difference is taken over a **sample** of the main gradients: lines of 128 bytes,
    spread at random and evenly over all parameters, always the same ones. All elements are equally
    likely to be in it, so S and |G|^2, scaled up, are unbiased for the whole model, with which a
    few chosen parameters have no noise scale in common. From ``max_elements`` on nothing is
    sampled, and the sums are exact.

    Cost of a sampled element: 24 bytes of memory traffic a micro-batch (main gradient to a copy, 8;
    difference in place, 12; its norm, 4), and 8 bytes held. With the default, at most 100 MB and 34
    MB, whatever the model. Nothing waits for the device in :meth:`observe` and :meth:`update`.

    With ``attach(process_group=)`` the micro-batches of all ranks count: A, N and K are summed by
    one all-reduce of 3 numbers in :meth:`update`. What a rank has summed is copied right before
    its buckets are reduced, so one micro-batch a rank is enough.

    It holds the parameters and the buffers: drop it when you detach.

    Units are those of the weights of :meth:`Accumulator.micro_batch`: tokens, or samples. Without
    weights each micro-batch counts as 1, and B_simple is in micro-batches.

    Args:
        accumulator: of :func:`attach`.
        smoothing: of the exponential means of S and |G|^2, which are taken separately and
            corrected for their start: 0 for the last window alone, below 1.
        parameters: only these covered ones; None for all.
        max_elements: how many are sampled; None for all.

    Raises:
        TypeError, ValueError: no Accumulator; a smoothing outside of [0, 1), max_elements below 1;
            parameters that are not covered, or none; DTensors, or parameters that FSDP2 has
            sharded, of which a rank has no whole gradient.
        RuntimeError: DistributedDataParallel averages the gradients inside of backward (or may do:
            without the extension, wherever torch.distributed is initialised and ``process_group``
            is not given); the accumulator is detached.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        smoothing: float = 0.99,
        *,
        parameters: Iterable[Tensor] | None = None,
        max_elements: int | None = MAX_ELEMENTS,
    ):
        if not isinstance(accumulator, Accumulator):
            raise TypeError(
                "NoiseScale: expected the Accumulator that attach returned, got "
                f"{type(accumulator).__name__}"
            )
        if not isinstance(smoothing, numbers.Real) or not 0 <= smoothing < 1:
            raise ValueError(f"NoiseScale: smoothing must be in [0, 1), got {smoothing!r}")
        if max_elements is not None and (type(max_elements) is not int or max_elements < 1):
            raise ValueError(
                f"NoiseScale: max_elements must be a positive int or None, got {max_elements!r}"
            )
        self.accumulator = accumulator
        self.smoothing = float(smoothing)
        self._max_elements = max_elements
        attachment = accumulator._attachment
        self._names = _chosen(attachment, parameters)
        self._check(attachment)
        device = attachment.groups[0].device
        self._means = torch.zeros(3, dtype=torch.float64, device=device)  # of S, |G|^2 and 1
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # A, N, K of this window
        # The window's counters, when the last micro-batch ended.
        self._tokens = attachment.window.tokens.clone()
        self._skipped = attachment.window.skipped_micro_batches.clone()
        self._begin_sampling(attachment)
        # A window that is under way has micro-batches that were not seen.
        self._is_whole = attachment.micro_batches() == 0
        self._numbers = None if self._is_whole else _numbers(attachment)
        self._windows = attachment.window.windows

    def _check(self, attachment: Any) -> None:
        """Raises where the gradient of a micro-batch of this rank cannot be seen."""
        sharded = [n for g in attachment.groups if g.is_sharded for n in g.names]
        sharded = [name for name in sharded if name in self._names]
        if attachment.fully_sharded is not None:
            raise ValueError(
                "NoiseScale: expected parameters that this rank has whole, and FSDP2 takes their "
                "gradients away: there is no noise scale over it"
            )
        if sharded:
            raise ValueError(
                "NoiseScale: expected parameters that this rank has whole, got the DTensor "
                f"{sharded[0]}: pass others as parameters="
            )
        _check_ranks(attachment)

    def _begin_sampling(self, attachment: Any) -> None:
        self._groups = attachment.groups
        self._samples = draw(attachment, self._names, self._max_elements)
        self._captured: tuple[Any, int] = (None, 0)
        if attachment.reducer is not None:
            attachment.reducer.observers.add(self)

    # A window

    @torch.no_grad()
    def observe(self, tokens: float | None = None) -> None:
        """Takes a micro-batch: A += |s|^2 / n, N += n, K += 1. Call it after each.

        After the ``micro_batch`` block, or after ``backward()``. Backwards since the last call are
        one micro-batch together. One of weight 0, or that ``nonfinite="skip_micro_batch"`` has
        dropped, does not count. Without weights the loss has to be a sum over tokens, times a
        constant, where ``tokens`` is given.

        Args:
            tokens: n of a micro-batch without a weight; None for 1. The weight is known.

        Raises:
            TypeError, ValueError: tokens is not a positive number, or there is a weight as well.
            RuntimeError: inside of a micro_batch; detached.
        """
        attachment = self.accumulator._attachment
        window = attachment.window
        window.check_closed("observe")
        window.follow()
        if tokens is not None:
            if isinstance(tokens, bool) or not isinstance(tokens, numbers.Real):
                raise TypeError(f"observe: tokens must be a number, got {type(tokens).__name__}")
            if not 0 < tokens < math.inf:
                raise ValueError(f"observe: tokens must be positive and finite, got {tokens}")
            if window.is_weighted:
                raise ValueError(
                    "observe: the micro-batches of this window have weights, which tell their "
                    f"tokens: leave tokens out, got {tokens}"
                )
        self._follow(attachment)
        count = self._tokens_since(window, tokens)
        squares = self._differ(attachment)
        term = torch.stack([squares / count, count, torch.ones_like(count)])
        self._sums.add_(torch.where(count > 0, term, 0.0))

    def _follow(self, attachment: Any) -> None:
        """Begins anew where the window was dropped; gives a window up whose buffers are gone."""
        if attachment.groups is not self._groups:
            self._is_whole, self._numbers = self._numbers is None, None
            self._move(attachment)
        numbers_now = _numbers(attachment)
        if self._numbers is not None:
            begun = [group.hooks.most_micro_batches() > 0 for group in attachment.groups]
            pairs = zip(begun, numbers_now, self._numbers, strict=True)
            if not any(has_begun and now == known for has_begun, now, known in pairs):
                self._restart()
        self._numbers = numbers_now
        self._windows = attachment.window.windows

    def _move(self, attachment: Any) -> None:
        """Follows the parameters to the buffers and the device that they have now."""
        device = attachment.groups[0].device
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self._begin_sampling(attachment)

    def _restart(self) -> None:
        self._sums.zero_()
        for sample in self._samples:
            sample.before.zero_()
        self._is_whole, self._numbers = True, None

    def _tokens_since(self, window: Any, tokens: float | None) -> Tensor:
        """The tokens of this micro-batch: 0-dim float64, on the device; 0 where it was dropped."""
        if window.is_weighted:
            count = window.tokens - self._tokens
        else:
            count = (window.skipped_micro_batches == self._skipped).double()
            count = count if tokens is None else count * tokens
        self._tokens.copy_(window.tokens)
        self._skipped.copy_(window.skipped_micro_batches)
        return count

    def _differ(self, attachment: Any) -> Tensor:
        """|s|^2 of what was added since the last call, 0-dim float64."""
        key, captured = self._captured
        is_reduced = attachment.reducer is not None and attachment.groups[0].hooks.is_reduced()
        if is_reduced:
            rows = sum(len(sample.rows) for sample in self._samples)
            self._is_whole &= key == attachment.groups[0].hooks.tally() and captured == rows
        else:
            for sample in self._samples:
                sample.read()
        squares = [sample.difference() for sample in self._samples]
        if is_reduced:
            for sample in self._samples:
                sample.read_mean()
        self._captured = (None, 0)
        return self._total(squares)

    def _total(self, values: list[Tensor]) -> Tensor:
        device = self._sums.device
        if len(values) == 1:
            return values[0].to(device, non_blocking=device.type != "cpu")
        return torch.stack([v.to(device, non_blocking=device.type != "cpu") for v in values]).sum()

    @torch.no_grad()
    def before_reduction(self, begin: int, end: int) -> None:
        """Copies what this rank has summed between these bounds of the flat buffer.

        Called by the reduction, on its stream, before other ranks are averaged into it.
        """
        attachment = self.accumulator._attachment
        if attachment.groups is not self._groups:
            return
        key = attachment.groups[0].hooks.tally()
        count = self._captured[1] if self._captured[0] == key else 0
        for sample in self._samples:
            count += sample.capture(begin, end)
        self._captured = key, count

    @torch.no_grad()
    def update(self) -> None:
        """Closes the window: moves the means of S and |G|^2 by it. The device is not waited for.

        Call it after the last :meth:`observe`; with a process group before gradients are clipped
        or stepped. Then every rank calls it: it reduces the window, where the last backward has
        not, and sums 3 numbers over the ranks. A window of fewer than two micro-batches, or with
        inf or NaN, moves nothing.

        Raises:
            RuntimeError: with a process group, the window was averaged or stepped already.
        """
        attachment = self.accumulator._attachment
        window = attachment.window
        reducer = attachment.reducer
        _check_ranks(attachment)
        sums, ranks = self._sums, 1
        if not self._is_whole or attachment.groups is not self._groups:
            sums = torch.full_like(sums, math.nan)
        if reducer is not None:
            if window.is_averaged or (self._numbers and window.windows != self._windows):
                raise RuntimeError(
                    "update: the gradients of this window were averaged, clipped or stepped "
                    "already; with a process group call NoiseScale.update() before that"
                )
            if attachment.groups is self._groups:
                self._reduce(attachment)
            ranks = reducer.world_size
            dist.all_reduce(sums, group=attachment.reduction.process_group)
        a, n, k = sums.unbind()
        whole = self._total([sample.square() for sample in self._samples]) * ranks**2
        noise = (a - whole / n).clamp(min=0) / (k - 1)  # not below 0 but by rounding
        signal = whole / n**2 - noise / n
        values = torch.stack([noise, signal]) / attachment.scale**2
        values = torch.cat([values, torch.ones_like(values[:1])])
        is_valid = values.isfinite().all() & (k > 1)
        moved = torch.lerp(values, self._means, self.smoothing)
        self._means.copy_(torch.where(is_valid, moved, self._means))
        self._restart()
        self._captured = (None, 0)

    def _reduce(self, attachment: Any) -> None:
        """Has the samples hold the mean of the ranks' sums."""
        if not (attachment.reducer.has_reduced and attachment.is_reduced()):
            attachment.window.check_closed("update")
            attachment.ensure_reduced()
            for sample in self._samples:
                sample.read_mean()

    # What comes out

    @property
    def estimate(self) -> Tensor:
        """The means of S and |G|^2: float64 of shape [2], on the device; NaN before a window."""
        return self._means[:2] / self._means[2]

    @property
    def value(self) -> float:
        """B_simple = S / |G|^2, in tokens (or what the weights are). Waits for the device.

        NaN before the first window; inf where the estimate of |G|^2 is not positive: the signal is
        lost in the noise so far.
        """
        noise, signal = self.estimate.tolist()
        if math.isnan(noise):
            return math.nan
        return noise / signal if signal > 0 else math.inf

    def suggested_micro_batches(self, tokens_per_micro_batch: float = 1.0) -> int:
        """The micro-batches a window whose batch is B_simple: max(1, round(B / (tokens * ranks))).

        Of each rank, with a process group. Waits for the device.

        Args:
            tokens_per_micro_batch: as the weights are; 1 without weights.

        Raises:
            ValueError: it is not positive and finite.
            RuntimeError: there is no finite estimate yet.
        """
        if not 0 < tokens_per_micro_batch < math.inf:
            raise ValueError(
                "suggested_micro_batches: tokens_per_micro_batch must be positive and finite, got "
                f"{tokens_per_micro_batch}"
            )
        value = self.value
        if not math.isfinite(value):
            raise RuntimeError(
                f"suggested_micro_batches: the noise scale is {value}: expected a window of two "
                "micro-batches to be closed by update() before, and a gradient that is not lost "
                "in the noise; observe more windows"
            )
        return max(1, round(value / (tokens_per_micro_batch * self.ranks)))

    @property
    def ranks(self) -> int:
        """How many ranks have micro-batches of one window."""
        reducer = self.accumulator._attachment.reducer
        return 1 if reducer is None else reducer.world_size

    def state_dict(self) -> dict[str, list[float]]:
        """Returns the means, and the window so far, as plain numbers. Waits for the device."""
        return {"means": self._means.tolist(), "window": self._sums.tolist()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Goes on from a state; of a window in the middle, after ``accumulator.load_state_dict``.

        Raises:
            ValueError: not what state_dict returned; nothing was changed.
        """
        names = ("means", "window")
        if not isinstance(state, Mapping) or any(len(state.get(name, ())) != 3 for name in names):
            raise ValueError(
                "load_state_dict: expected what NoiseScale.state_dict() returned, with 3 numbers "
                f"each of means and window, got {state!r}"
            )
        attachment = self.accumulator._attachment
        if attachment.groups is not self._groups:
            self._move(attachment)
        self._restart()
        self._means.copy_(torch.tensor(state["means"], dtype=torch.float64))
        self._sums.copy_(torch.tensor(state["window"], dtype=torch.float64))
        self._tokens.copy_(attachment.window.tokens)
        self._skipped.copy_(attachment.window.skipped_micro_batches)
        self._windows = attachment.window.windows
        if attachment.micro_batches():
            self._is_whole = state["window"][2] > 0
            self._numbers = _numbers(attachment)
            for sample in self._samples:
                sample.read()
                sample.swap()

    def __repr__(self) -> str:
        """Tells what is sampled."""
        lines = sum(len(sample.rows) for sample in self._samples)
        total = sum(sample.count for sample in self._samples)
        return f"NoiseScale({lines:,} of {total:,} lines, smoothing {self.smoothing:g})"


def _check_ranks(attachment: Any) -> None:
    """Raises where others average gradients over ranks, or may do."""
    if attachment.reduction is not None or not (dist.is_available() and dist.is_initialized()):
        return
    if distributed.is_hooked(attachment.params.values()) is not False:
        raise RuntimeError(
            "NoiseScale: DistributedDataParallel (or another hook on AccumulateGrad nodes) "
            "averages inside of backward over the ranks, so that what a micro-batch of one of them "
            f"adds cannot be seen. {distributed.INSTEAD}"
        )


def _numbers(attachment: Any) -> list[int]:
    return [group.hooks.tally()[0] for group in attachment.groups]


def _chosen(attachment: Any, parameters: Iterable[Tensor] | None) -> set[str]:
    if parameters is None:
        return set(attachment.params)
    names = {id(param): name for name, param in attachment.params.items()}
    chosen = set()
    for index, param in enumerate(parameters):
        if id(param) not in names:
            raise ValueError(
                f"NoiseScale: parameters[{index}] is not covered by the Accumulator; expected some "
                "of the parameters that were attached"
            )
        chosen.add(names[id(param)])
    if not chosen:
        raise ValueError("NoiseScale: got no parameters; leave parameters out for all")
    return chosen
