"""Accumulator: the handle of an attachment, and all that a user does with it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels import window_state
from gradacc_kernels.statistics import measure
from gradacc_kernels.stats import Snapshot, Stats, Transfer
from gradacc_kernels.window import clip_coefficient


def human(nbytes: int) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


class Accumulator:
    """The handle that :func:`attach` returns.

    For a module it holds the attachment weakly: dropping it changes nothing, and keeping it keeps
    no model alive. For a list of parameters it is the attachment's owner: dropping it detaches.
    As a context manager it detaches at exit. A copy of it, or a pickle, is detached.
    """

    __slots__ = ("__weakref__", "_owned", "_reference")

    def __init__(self, attachment: Any = None):
        self._owned = attachment if attachment is not None and attachment.root is None else None
        self._reference = weakref.ref(attachment) if attachment is not None else lambda: None

    @property
    def _attachment(self) -> Any:
        attachment = self._reference()
        if attachment is None:
            raise RuntimeError(
                "this Accumulator is not attached to anything: it was detached or copied, or its "
                "model is gone; call gradacc_kernels.attach again"
            )
        return attachment

    def refresh(self) -> None:
        """Follows the parameters after a change that autograd makes no call for.

        A module's forward, ``.to()`` and ``load_state_dict`` do this by themselves. Call it when
        you use a bare list of parameters, or a submodule directly, after such a change of them or
        of the CUDA stream.

        Raises:
            RuntimeError: a parameter changed its shape; nothing was changed.
        """
        self._attachment.refresh()

    def invalidate(self) -> None:
        """Declares the statistics of the pass stale.

        Call it after writing to main gradients by a way that moves no version counter: ``.data``,
        numpy, fused optimizers, ``GradScaler.unscale_``, collectives, replayed graphs.
        """
        for group in self._attachment.groups:
            group.hooks.invalidate()

    def expose(self) -> None:
        """Sets ``.grad`` to the main gradient on every covered parameter.

        For replayed CUDA graphs, in which no host code runs that could set it. The main gradient of
        a parameter that had no ``.grad`` holds what was last summed into it.
        """
        for group in self._attachment.groups:
            for index in range(len(group.names)):
                group.hooks.expose(index)

    @property
    def micro_batches(self) -> int:
        """How many backwards have added to the window so far: the most of any parameter.

        A window begins where ``.grad`` is None, and with the first gradient after a step of an
        optimizer. What replays of a CUDA graph add is not counted; parameters shared by several
        reentrant checkpoints are counted in each. Known on the host: no sync.
        """
        return self._attachment.micro_batches()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the window as it is, so that a new process can finish it bit for bit.

        Plain tensors, which safetensors takes as they are: the sum of each parameter whose window
        has begun (a copy: 4 bytes an element), its count of micro-batches, and ``scale``.
        ``inv_scale`` is not among them: the loss scale is its owner's to save.
        """
        attachment = self._attachment
        attachment.refresh()
        return window_state.save(attachment)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with a window that :meth:`state_dict` has saved; what was summed here is dropped.

        Load the parameters first.

        Args:
            state: what state_dict returned, on any device.

        Raises:
            TypeError: no mapping of names to tensors.
            ValueError: a state of another format, scale or model, or an incomplete one; nothing
                was changed.
        """
        attachment = self._attachment
        attachment.refresh()
        window_state.load(attachment, state)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context whose backwards add to the window without reducing it over the ranks.

        For all micro-batches but the last one of a window, with ``attach(process_group=...)``;
        without a process group it changes nothing: DistributedDataParallel has a ``no_sync()`` of
        its own.
        """
        attachment = self._attachment
        if attachment.reduction is None:
            yield
            return
        was_on = attachment.reduction.is_on
        attachment.set_reducing(False)
        try:
            yield
        finally:
            attachment.set_reducing(was_on)

    def reduce(self) -> None:
        """Averages ``.grad`` over the ranks now, unless the last backward of the window has.

        Every rank must call it, or none. :meth:`step`, :meth:`average_`, clipping and
        ``gk.GradScaler`` do so by themselves. Without a process group it changes nothing.
        """
        attachment = self._attachment
        attachment.window.check_closed("reduce")
        attachment.ensure_reduced()

    def detach(self) -> None:
        """Restores stock behaviour; calling it again changes nothing.

        ``.grad`` becomes a tensor of the parameter's dtype with the sum so far (rounded to it, for
        a 16-bit parameter), or stays None, and ``grad_dtype`` what it was before attach. The
        buffers are freed. Nothing is reduced over ranks: call :meth:`reduce` before it.
        """
        attachment = self._reference()
        if attachment is not None:
            attachment.window.check_closed("detach")
            attachment.detach()
        self._owned = None
        self._reference = lambda: None

    def grad_norm(
        self, params: Iterable[Tensor] | None = None, *, from_statistics: bool = False
    ) -> Tensor:
        """Returns sqrt(sum of squares) over the ``.grad`` of covered parameters.

        Of the average, inside of a weighted window (:meth:`micro_batch`).

        Args:
            params: only these, as those of a group of an optimizer; None for all.
            from_statistics: read the slots that the accumulation pass wrote, where the version
                counter of ``.grad`` has not moved since. That costs a few KB of reads in place of 4
                bytes per element, and is right only if nothing wrote to a main gradient unseen (see
                :meth:`invalidate`).

        Returns:
            0-dim float32 tensor on the device of the first parameter (float64 where all main
            gradients are); NaN when an element is not finite, 0 when no parameter has a gradient.
            No host sync, unless that is the CPU and other parameters are on a GPU.
        """
        return self._attachment.window.norm(from_slots=from_statistics, params=params)

    def grad_norms(self, *, from_statistics: bool = False) -> dict[str, Tensor]:
        """Returns the :meth:`grad_norm` of every covered parameter that has a gradient, by name."""
        attachment = self._attachment
        sums = measure(attachment, from_slots=from_statistics).sums
        divisor = attachment.window.divisor()
        norms = {name: value.sqrt() for name, value in sums.items()}
        if divisor is None:
            return norms
        return {name: norm / divisor.to(norm.device, norm.dtype) for name, norm in norms.items()}

    @property
    def found_inf(self) -> Tensor:
        """1 when an element of a covered ``.grad`` is inf or NaN, else 0.

        0-dim float32 tensor on the device of the first parameter, from one pass over the main
        gradients (4 bytes per element). No host sync, as :meth:`grad_norm`.
        """
        return measure(self._attachment, from_slots=False).found_inf

    def stats(self, *, from_statistics: bool = False) -> Stats:
        """Returns what there is to know of the window whose gradients are in ``.grad``.

        That is the one under way, and after a step of an optimizer the one that was closed, until
        ``zero_grad()`` or the next gradient. Of a window that :meth:`step` or a ``gk.GradScaler``
        has closed, norms are those of the average before clipping, which were kept; in all other
        cases they are of ``.grad`` as it stands, divided by the weight if that is still to come.

        Waits for the device, once: one small copy of each device. Where parameters are DTensors
        every rank calls it, or none.

        Args:
            from_statistics: as for :meth:`grad_norm`; False reads the gradients of a window that is
                under way, or that a stock ``optimizer.step()`` has closed.

        Raises:
            RuntimeError: there is no average, as for :meth:`grad_norm`.
        """
        attachment = self._attachment
        closed = attachment.closed_window()
        snapshot = Snapshot(attachment, closed, from_statistics=from_statistics)
        [(stats, _)] = Transfer([snapshot]).read()
        return stats

    # Closing a window

    def micro_batch(
        self, weight: float | Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """A context whose backwards are one micro-batch: main = main + weight * s * grad.

        For micro-batches of different numbers of tokens: with the mean loss over the ``weight``
        tokens of each, ``.grad`` is the weighted sum inside of the window, and :meth:`average_`,
        :meth:`step`, clipping and ``gk.GradScaler`` divide it once by the sum of the weights. That
        is the gradient of the one big batch. Norms are those of the average at any time. A stock
        ``optimizer.step()`` over a sum that is not yet divided raises.

        A micro-batch of weight 0 adds nothing, whatever its gradient holds, NaN included: a mean
        over no tokens. Where an exception leaves the context, its weight is not counted.

        Args:
            weight: tokens, or samples: a number, or a tensor of one element on any device, which is
                not waited for. All micro-batches of a window have one, or none has.

        Raises:
            TypeError, ValueError: weight is no such number, negative or not finite.
            RuntimeError: inside of another micro_batch; in a window that is averaged already, or
                with other micro-batches without weights; with a weight, where others reduce the
                gradients over ranks, as DistributedDataParallel does.
        """
        return self._attachment.window.micro_batch(weight)

    @property
    def weight(self) -> Tensor:
        """The sum of the weights of this window: a copy, 0-dim float64, on the device.

        Once the window is reduced over the ranks of a process group, that over all of them.
        """
        return self._attachment.window.total_weight()

    def average_(self) -> None:
        """Divides ``.grad`` by the weight of the window: grad = grad / sum of weights.

        Once a window: calling it again changes nothing, as without weights. 8 bytes an element. A
        window of weight 0 keeps its zeros.
        """
        self._attachment.window.average_()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """grad = grad * min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.

        The norm comes from the statistics of the pass, where the version counter of ``.grad`` has
        not moved since (see :meth:`invalidate`), and nothing is read or written where nothing is to
        be clipped, which the device decides. Averages a weighted window in the same pass.

        Args:
            max_norm: of all covered gradients together.
            norm_type: other norms than 2 are computed by torch.
            error_if_nonfinite: raise where the norm is not finite, which waits for the device.

        Returns:
            The norm before clipping, 0-dim. Where an element is not finite it is NaN, for inf too.
        """
        window = self._attachment.window
        if norm_type != 2.0:
            window.average_()
            return torch.nn.utils.clip_grad_norm_(
                self._attachment.params.values(), max_norm, norm_type, error_if_nonfinite
            )
        window.check_closed("clip_grad_norm_")
        self._attachment.ensure_reduced()
        norm = window.norm(from_slots=True)
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                "clip_grad_norm_: the norm of the gradients is not finite, so they cannot be "
                "clipped; error_if_nonfinite=False clips all the same"
            )
        window.average_(clip_coefficient(norm, max_norm))
        return norm

    def clip_grad_value_(self, clip_value: float) -> None:
        """grad = clamp(grad, -clip_value, clip_value), of the average."""
        self._attachment.window.average_()
        torch.nn.utils.clip_grad_value_(self._attachment.params.values(), clip_value)

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        scaler: Any = None,
    ) -> Tensor:
        """Averages, clips, checks and steps; then call ``optimizer.zero_grad()``.

        Nothing waits for the device with an optimizer that takes ``found_inf`` (torch's fused ones,
        and MasterParams over them), which skips inside of its kernel and divides a weighted window
        there too; for others the host asks whether to skip. What is to be clipped is by one
        multi-tensor pass, which touches nothing where nothing is.

        Args:
            optimizer: whose parameters are covered; others among them are stepped as they are.
            max_norm: of all covered gradients, for clipping; None for none.
            scaler: the ``gk.GradScaler`` whose losses were scaled; call its ``update()`` after it.

        Returns:
            The norm before clipping, 0-dim.

        Raises:
            ValueError: no parameter of the optimizer that has a gradient is covered.
            FloatingPointError: with nonfinite="raise".
        """
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"step: max_norm must not be negative, got {max_norm}")
        if scaler is not None and not hasattr(scaler, "_close"):
            raise TypeError(
                f"step: scaler must be a gradacc_kernels.GradScaler, got {type(scaler).__name__}; "
                "with torch's, call average_(), clip, and then scaler.step(optimizer)"
            )
        if scaler is not None:
            return scaler._close(optimizer, optimizer.step, max_norm, {})[1]
        window = self._attachment.window
        window.check_step(optimizer)
        return window.close(optimizer, optimizer.step, max_norm)[1]

    @property
    def counters(self) -> dict[str, Tensor]:
        """What was counted since attach, as 0-dim tensors: copies, read when you wish.

        ``windows`` that were closed by :meth:`step` or a ``gk.GradScaler``, ``micro_batches`` of
        this window, ``skipped_windows``, ``skipped_micro_batches``, ``tokens`` (the sum of all
        weights) and ``scale`` (what gradients are multiplied by: scale * inv_scale).
        """
        attachment = self._attachment
        window = attachment.window
        return {
            "windows": torch.tensor(window.windows),
            "micro_batches": torch.tensor(attachment.micro_batches()),
            "skipped_windows": window.skipped_windows.clone(),
            "skipped_micro_batches": window.skipped_micro_batches.clone(),
            "tokens": window.tokens.clone(),
            "scale": attachment.groups[0].inv_scale * attachment.scale,
        }

    @property
    def scale(self) -> float:
        """The factor that attach was given; fixed. See :attr:`inv_scale` for one that is not."""
        return self._attachment.scale

    @property
    def inv_scale(self) -> Tensor:
        """A factor for every gradient as it arrives: 0-dim float32 device tensor, 1 at first.

        Write into it, on the device: ``accumulator.inv_scale.copy_(1 / loss_scale)``. For
        parameters on several devices there is one a device, in :attr:`inv_scales`.

        It takes part from the first time on that it is asked for. Weight gradients of many tokens
        are a little slower then: see docs/performance.md.

        Raises:
            RuntimeError: the parameters are on several devices; or a CUDA graph of fused modules
                was captured before, which would not see what is written.
        """
        tensors = self.inv_scales
        if len(tensors) > 1:
            raise RuntimeError(
                f"the parameters are on {len(tensors)} devices; use Accumulator.inv_scales[device]"
            )
        return next(iter(tensors.values()))

    @property
    def inv_scales(self) -> dict[torch.device, Tensor]:
        """The factor :attr:`inv_scale` of each device; raises as that does."""
        self._attachment.use_inv_scale()
        return self._attachment.inv_scales()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held for main gradients and their statistics."""
        return self._attachment.nbytes()

    def __enter__(self) -> Accumulator:
        """Returns itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Detaches."""
        self.detach()

    def __reduce__(self):
        """Copies and pickles as a detached Accumulator."""
        return (Accumulator, ())

    def __repr__(self) -> str:
        """Tells what is covered, and in how many bytes."""
        attachment = self._reference()
        if attachment is None:
            return "Accumulator(detached)"
        count = f"{len(attachment.params)} parameters"
        if attachment.n_frozen:
            count += f" ({attachment.n_frozen} frozen ones left out)"
        lines = [f"Accumulator({count}, scale {attachment.scale:g}, {human(self.nbytes)})"]
        lines += [repr(group) for group in attachment.groups]
        if attachment.fused is not None:
            lines.append(repr(attachment.fused))
        if attachment.reduction is not None:
            lines.append(repr(attachment.reduction))
        return "\n  ".join(lines)
