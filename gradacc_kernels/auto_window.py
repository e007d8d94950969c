"""AutoWindow: how many micro-batches a window has, K, chosen during a run.

A rule chooses it: a schedule, the gradient noise scale, or a number of tokens. What a rule says
takes effect at the border of two windows, never inside of one, and all ranks go by the same.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from gradacc_kernels.accumulator import Accumulator
from gradacc_kernels.noise_scale import NoiseScale

UNITS = ("windows", "tokens")


@dataclass
class Progress:
    """How far a run is: what a rule chooses by, and what a file holds. Of all ranks together.

    Attributes:
        windows: that have ended.
        tokens: of all micro-batches so far; micro-batches without a weight count as 1.
        micro_batches: of the window so far, of each rank.
        window_tokens: of them.
        k: micro-batches of the window, of each rank; between two windows those of the last one. 0
            before the first, and where tokens alone end it.
        tokens_per_micro_batch: of the last window, of all ranks together; 0 before.
    """

    windows: int = 0
    tokens: float = 0.0
    micro_batches: int = 0
    window_tokens: float = 0.0
    k: int = 0
    tokens_per_micro_batch: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """K by how far the run is: a ramp-up of the batch.

    Args:
        points: pairs (at, K), ``at`` ascending from 0: K holds from there on.
        unit: what ``at`` counts: ``"windows"`` (steps of the optimizer), or ``"tokens"`` of all
            ranks.
        linear: K grows, or falls, linearly from one point to the next, rounded to nearest.

    Raises:
        ValueError: points that are empty, do not begin at 0 or do not ascend, a K that is no
            positive int, an unknown unit.
    """

    points: Sequence[tuple[float, int]]
    unit: str = "windows"
    linear: bool = False

    def __post_init__(self):
        """Checks the arguments."""
        if self.unit not in UNITS:
            raise ValueError(f"Schedule: unit must be one of {UNITS}, got {self.unit!r}")
        pairs = [tuple(point) for point in self.points]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"Schedule: expected pairs (at, K), got {self.points!r}")
        at = [pair[0] for pair in pairs]
        if at[0] != 0 or any(not a < b for a, b in zip(at, at[1:], strict=False)):
            raise ValueError(f"Schedule: points must ascend from 0, got {at}")
        for _, k in pairs:
            _check_k("Schedule", k)

    def choose(self, progress: Progress) -> int:
        """Returns K of the window that begins."""
        now = getattr(progress, self.unit)
        index = bisect_right(self.points, now, key=lambda point: point[0]) - 1
        at, k = self.points[index]
        if not self.linear or index + 1 == len(self.points):
            return k
        next_at, next_k = self.points[index + 1]
        return round(k + (next_k - k) * (now - at) / (next_at - at))


@dataclass(frozen=True)
class FollowNoise:
    """K that makes the batch the gradient noise scale: K = B_simple / tokens of a micro-batch.

    AutoWindow observes the micro-batches for it, and closes its windows. The value is read, and the
    device waited for, every so many windows. While there is no finite one, K stays.

    Args:
        noise_scale: over the same accumulator.
        bounds: the least and the most K; the least is that of the first window, if start is None.
        start: K of the first window.
        hysteresis: K stays for as long as what is wanted is within this factor of it: at least 1.
        powers_of_two: K is the power of two that is nearest to what is wanted, by their ratio; the
            bounds have to be powers of two.
        every: so many windows.

    Raises:
        TypeError, ValueError: arguments that are not so.
    """

    noise_scale: NoiseScale
    bounds: tuple[int, int] = (2, 64)
    start: int | None = None
    hysteresis: float = 1.5
    powers_of_two: bool = False
    every: int = 10

    def __post_init__(self):
        """Checks the arguments."""
        if not isinstance(self.noise_scale, NoiseScale):
            raise TypeError(
                f"FollowNoise: expected a NoiseScale, got {type(self.noise_scale).__name__}"
            )
        least, most = self.bounds
        for k in (least, most, self.every, least if self.start is None else self.start):
            _check_k("FollowNoise", k)
        if not least <= (self.start or least) <= most:
            raise ValueError(
                "FollowNoise: expected bounds (least, most) with start between them, got "
                f"bounds={self.bounds}, start={self.start}"
            )
        if least * self.noise_scale.ranks < 2:
            raise ValueError(
                "FollowNoise: a window of one micro-batch tells nothing of the noise, so K could "
                f"never grow again: bounds must begin at 2, got {self.bounds}"
            )
        if self.powers_of_two and any(k & (k - 1) for k in self.bounds):
            raise ValueError(f"FollowNoise: bounds must be powers of two, got {self.bounds}")
        if not self.hysteresis >= 1:
            raise ValueError(f"FollowNoise: hysteresis must be >= 1, got {self.hysteresis}")

    def choose(self, progress: Progress) -> int:
        """Returns K of the window that begins."""
        least, most = self.bounds
        k = progress.k or self.start or least
        k = min(max(k, least), most)
        if progress.windows == 0 or progress.windows % self.every:
            return k
        value = self.noise_scale.value
        if not math.isfinite(value) or progress.tokens_per_micro_batch == 0:
            return k
        wanted = min(max(value / progress.tokens_per_micro_batch, least), most)
        if k / self.hysteresis <= wanted <= k * self.hysteresis:
            return k
        return 1 << round(math.log2(wanted)) if self.powers_of_two else round(wanted)


@dataclass(frozen=True)
class TokenTarget:
    """A window ends with the micro-batch that brings its tokens, of all ranks, to a target.

    Args:
        tokens: the target: positive.
        most: micro-batches at which a window ends in any case; None for no bound.

    Raises:
        ValueError: arguments that are not so.
    """

    tokens: float
    most: int | None = None

    def __post_init__(self):
        """Checks the arguments."""
        if not 0 < self.tokens < math.inf:
            raise ValueError(f"TokenTarget: tokens must be positive, got {self.tokens}")
        if self.most is not None:
            _check_k("TokenTarget", self.most)

    def choose(self, progress: Progress) -> int:
        """Returns the most K of the window that begins; 0 for no bound."""
        return self.most or 0


class AutoWindow:
    """Opens and closes windows of K micro-batches, with K by a rule.

    ::

        window = gk.AutoWindow(accumulator, gk.Schedule([(0, 4), (1000, 16)]))
        for x, y in batches:
            with window.micro_batch(n_tokens):
                loss_fn(model(x), y).backward()
            if window.is_last:
                accumulator.step(optimizer)
                optimizer.zero_grad()

    With ``attach(process_group=)`` all micro-batches but the last one are inside of
    :meth:`Accumulator.no_sync`, so that every window is reduced once, while its last backward runs.
    All ranks make an AutoWindow with the same rule, run the same number of micro-batches, and go by
    the same K: tokens are summed over the ranks on the host, by gloo, once a window, and once a
    micro-batch for a TokenTarget. No device is waited for, but where FollowNoise reads.

    A mean over micro-batches that is made by ``attach(scale=1 / K)`` would be wrong as K changes:
    give weights, or divide the loss by :attr:`k`.

    Args:
        accumulator: of :func:`attach`. Making this with a process group is a collective.
        rule: a :class:`Schedule`, :class:`FollowNoise` or :class:`TokenTarget`; an int for a fixed
            K.

    Raises:
        TypeError, ValueError: they are not; a NoiseScale over another accumulator; attach(steps=).
        RuntimeError: detached.
    """

    def __init__(self, accumulator: Accumulator, rule: Schedule | FollowNoise | TokenTarget | int):
        if not isinstance(accumulator, Accumulator):
            raise TypeError(
                "AutoWindow: expected the Accumulator that attach returned, got "
                f"{type(accumulator).__name__}"
            )
        if isinstance(rule, int):
            rule = Schedule([(0, rule)])
        if not isinstance(rule, (Schedule, FollowNoise, TokenTarget)):
            raise TypeError(
                "AutoWindow: expected a Schedule, FollowNoise, TokenTarget or an int, got "
                f"{type(rule).__name__}"
            )
        self.accumulator = accumulator
        self.rule = rule
        self._noise_scale = rule.noise_scale if isinstance(rule, FollowNoise) else None
        if self._noise_scale is not None and self._noise_scale.accumulator is not accumulator:
            raise ValueError("AutoWindow: the NoiseScale must be one over the same accumulator")
        reduction = accumulator._attachment.reduction
        self._host_group = None
        if reduction is not None:
            if reduction.steps != 1:
                raise ValueError(
                    "AutoWindow: it tells which backward reduces, and so does attach(steps="
                    f"{reduction.steps}): leave steps out"
                )
            ranks = dist.get_process_group_ranks(reduction.process_group)
            self._host_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._progress = Progress()
        self._is_last = False

    # The loop

    @contextlib.contextmanager
    def micro_batch(self, tokens: float | None = None) -> Iterator[None]:
        """A context whose backwards are one micro-batch, as :meth:`Accumulator.micro_batch`.

        :attr:`is_last` tells from its beginning on whether it ends the window. Where an exception
        leaves it, it does not count.

        Args:
            tokens: its weight on this rank, a number: the tokens over which its loss is a mean;
                None for micro-batches without weights, each of which counts as one token.

        Raises:
            TypeError, ValueError: tokens is no finite number that is not negative.
            RuntimeError: as Accumulator.micro_batch.
        """
        if tokens is not None:
            if isinstance(tokens, bool) or not isinstance(tokens, numbers.Real):
                raise TypeError(
                    "AutoWindow.micro_batch: tokens must be a number on the host, got "
                    f"{type(tokens).__name__}"
                )
            if not 0 <= tokens < math.inf:
                raise ValueError(
                    f"AutoWindow.micro_batch: tokens must be finite and not negative, got {tokens}"
                )
        progress = self._progress
        if progress.micro_batches == 0:
            progress.k = self._same(self.rule.choose(progress))
        count = 1.0 if tokens is None else float(tokens)
        if isinstance(self.rule, TokenTarget):
            count = self._sum(count)
        is_full = 0 < progress.k <= progress.micro_batches + 1
        if isinstance(self.rule, TokenTarget):
            is_full = is_full or progress.window_tokens + count >= self.rule.tokens
        self._is_last = is_full
        is_done = False
        try:
            with contextlib.ExitStack() as stack:
                if not is_full:
                    stack.enter_context(self.accumulator.no_sync())
                stack.enter_context(self.accumulator.micro_batch(tokens))
                yield
            is_done = True
        finally:
            self._is_last = is_full and is_done
        progress.micro_batches += 1
        progress.window_tokens += count
        if self._noise_scale is not None:
            self._noise_scale.observe()
        if is_full:
            self._end()

    def close(self) -> None:
        """Ends a window before it is full, as at the end of the data; none where none has begun.

        Before ``accumulator.step(optimizer)``, on all ranks. :attr:`micro_batches` tells whether
        there is a window to step.
        """
        self._is_last = False
        if self._progress.micro_batches:
            self._end()

    def drop(self) -> None:
        """Forgets the micro-batches of a window whose gradients ``zero_grad()`` has dropped.

        As after an exception in the middle of it. On all ranks.
        """
        self._is_last = False
        self._progress.micro_batches, self._progress.window_tokens = 0, 0.0

    def _end(self) -> None:
        progress = self._progress
        if not isinstance(self.rule, TokenTarget):
            progress.window_tokens = self._sum(progress.window_tokens)
        if self._noise_scale is not None:
            self._noise_scale.update()
        progress.tokens += progress.window_tokens
        progress.tokens_per_micro_batch = progress.window_tokens / progress.micro_batches
        progress.windows += 1
        progress.micro_batches, progress.window_tokens = 0, 0.0

    @property
    def is_last(self) -> bool:
        """Whether the micro-batch under way, or else the last one, ends its window: step now."""
        return self._is_last

    @property
    def k(self) -> int:
        """Micro-batches of this window, of each rank; between two windows those of the last one.

        0 before the first, and where tokens alone end it.
        """
        return self._progress.k

    @property
    def micro_batches(self) -> int:
        """How many micro-batches of this rank the window has had; 0 between two."""
        return self._progress.micro_batches

    @property
    def windows(self) -> int:
        """How many windows have ended."""
        return self._progress.windows

    @property
    def tokens(self) -> float:
        """Tokens of all windows that have ended, of all ranks."""
        return self._progress.tokens

    # Ranks

    def _sum(self, value: float) -> float:
        """The sum over the ranks, on the host."""
        if self._host_group is None:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self._host_group)
        return total.item()

    def _same(self, k: int) -> int:
        """What the first rank has chosen."""
        if self._host_group is None or self._noise_scale is None:
            return k
        chosen = torch.tensor(k)
        dist.broadcast(chosen, dist.get_process_group_ranks(self._host_group)[0], self._host_group)
        return chosen.item()

    # Saving

    def state_dict(self) -> dict[str, float]:
        """Returns how far the run is, as plain numbers, also in the middle of a window.

        The window's sums are in ``accumulator.state_dict()``, the noise scale in its own.
        """
        return vars(self._progress).copy()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from a state, by the present rule from the next window on.

        Raises:
            ValueError: not what state_dict returned; nothing was changed.
        """
        names = [field.name for field in fields(Progress)]
        is_whole = isinstance(state, Mapping) and set(state) == set(names)
        if not is_whole or any(not isinstance(v, numbers.Real) or v < 0 for v in state.values()):
            raise ValueError(
                "load_state_dict: expected what AutoWindow.state_dict() returned, with the numbers "
                f"{', '.join(names)}, got {state!r}"
            )
        self._progress = Progress(**state)
        self._is_last = False

    def __repr__(self) -> str:
        """Tells the rule, and how far it is."""
        return f"AutoWindow({self.rule}, {self._progress})"


def _check_k(function: str, k: object) -> None:
    if type(k) is not int or k < 1:
        raise ValueError(f"{function}: expected positive ints of micro-batches, got {k!r}")
