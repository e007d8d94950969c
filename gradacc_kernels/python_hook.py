"""The gradient hook in Python: for Triton, for the reference backend, and without the extension.

It does what csrc/autograd/hook.h says of its C++ twin, by the same rules and under the same names.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels import checks, dispatch, sharded
from gradacc_kernels.buckets import Buckets
from gradacc_kernels.reference import in_layout_of
from gradacc_kernels.window_cast import WindowCast

_HALVES = (torch.float16, torch.bfloat16)
_SUPPORTED = (*_HALVES, torch.float32)
_QUEUE_LENGTH = 640  # gradients of one launch, as in csrc/autograd/hook.cpp
# Where an AccumulateGrad node's own dictionary tells whose hook it has.
_NODE_KEY = "gradacc_kernels"


class Demand(Enum):
    """What the backward under way does with the gradient of a parameter."""

    NOTHING = "it is not asked for"
    MAIN_GRAD = "it is to be added to the main gradient, and nobody looks at it before"
    GRADIENT = "it has to reach autograd as a tensor"


@dataclass
class _Param:
    variable: Tensor
    main: Tensor  # of no memory, for as long as one with an owner is not written to
    partials: Tensor
    dtype: torch.dtype
    owner: Tensor | None = None
    exposed: Tensor | None = None  # the view of main that is made `.grad`
    exposed_version: int = -1  # of it, when a gradient was last added
    statistics_version: int | None = None
    node: Any = None
    handle: Any = None
    queue: weakref.ref | None = None  # where a gradient may be waiting
    batch: int = -1  # of that queue
    cast: WindowCast = field(default_factory=WindowCast)
    is_cast: bool = False  # whether its gradient comes in float32, of several uses in 16 bits
    micro_batches: int = 0  # of the window below
    window: int = 0
    graph_task: int = -1  # the last one that was counted
    dropped_task: int = -1  # the last one whose gradient stands for nothing
    ended_version: int = -1  # of exposed, when end_window left it in `.grad`


@dataclass
class _Queue:
    """Small gradients of one backward, owned by the engine's callback."""

    graph_task: int
    stream: torch.cuda.Stream | None = None
    entries: list[tuple[_Param, Tensor]] = field(default_factory=list)
    nbytes: int = 0
    batch: int = 0  # counts the launches


@dataclass
class Measured:
    """The statistics of the ``.grad`` of some parameters: see :func:`ops.grad_stats`."""

    indices: list[int]
    sums: Tensor
    norm: Tensor
    found_inf: Tensor


def as_main(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what kernels take for whatever the user may have put into ``.grad``."""
    is_plain = grad.dtype == dtype and grad.layout == torch.strided and not grad.requires_grad
    if is_plain and checks.is_dense(grad) and not grad.is_neg() and not grad._is_zerotensor():
        return grad
    values = grad if grad.layout == torch.strided else grad.to_dense()
    return torch.empty(grad.shape, dtype=dtype, device=grad.device).copy_(values)


def _is_watched(param: Tensor) -> bool:
    """Tells whether other hooks read a parameter's ``.grad`` as soon as ours returns."""
    if param._post_accumulate_grad_hooks:
        return True
    extension = dispatch.extension()
    if not isinstance(extension, str):
        return extension.has_post_hooks(param)
    # Python does not see the hook of DistributedDataParallel.
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_half(param: Tensor) -> bool:
    """Tells whether a parameter is of 16 bits, and no grad_dtype was asked for."""
    return param.dtype in _HALVES and param.grad_dtype is None


def check_not_reduced(param: Tensor) -> None:
    """Raises where DistributedDataParallel reduces the gradients of a 16-bit parameter."""
    extension = dispatch.extension()
    if not isinstance(extension, str):
        extension.check_not_reduced(param)


def _in_compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region


class PythonHooks:
    """Pre-hooks on the AccumulateGrad nodes of the parameters of one device.

    Args:
        params: leaf tensors of one device.
        main_grads: float32 or float64, dense, in the layout of their parameters.
        partials: the slots of each main gradient.
        scale: factor for every gradient.
        inv_scale: 0-dim float32 tensor on the device, a second factor.
        queue_below: bytes of a gradient from which on it is added when it arrives.
        queue_bytes: bytes of queued gradients at which they are launched.
        backend: the module whose ops do the work.
        owner: what must stay alive while a hook runs; with its death the hooks end.
        sharded: empty, or the sharded parameters that own the whole ones in ``params``: see
            csrc/autograd/hook.h, of GradHooks. Then main_grads is empty.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        main_grads: Sequence[Tensor],
        partials: Sequence[Tensor],
        scale: float,
        inv_scale: Tensor,
        queue_below: int,
        queue_bytes: int,
        backend: ModuleType,
        owner: object,
        sharded: Sequence[Tensor] = (),
    ):
        if sharded:
            main_grads = [torch.empty(p.shape, dtype=torch.float32, device="meta") for p in params]
        extension = dispatch.extension()
        self._extension = None if isinstance(extension, str) else extension
        self._params = [
            _Param(param, main, slots, param.dtype)
            for param, main, slots in zip(params, main_grads, partials, strict=True)
        ]
        for param, shard in zip(self._params, sharded, strict=False):
            param.owner = shard
        self._scale = scale
        self._inv_scale = inv_scale
        self._device = inv_scale.device
        self._queue_below = queue_below
        self._queue_bytes = queue_bytes
        self.backend = backend
        self._owner = weakref.ref(owner)
        self._lock = threading.Lock()
        self._queues: list[weakref.ref[_Queue]] = []
        self._stream = None
        self._removed = False
        self._window = 0  # counts ends of windows
        self._tally = (0, 0, 0)
        self._is_weighted = False
        self._known_backwards: deque[int] = deque(maxlen=8)  # the last ones
        self._at_end: Callable[[], None] | None = None
        self._is_holding = False
        self._held: list[_Queue] = []
        self._buckets: Buckets | None = None  # of a reduction over ranks
        self._launch: Callable[[int, int], None] | None = None
        self._reducing_queue: weakref.ref[_Queue] | None = None  # its end is the reduction's
        self._wants_reduction, self._reduce_every = True, 1
        self._is_reducing = self._is_reduced = False
        self._reduction_stream = None
        self._overlaps = True

    def refresh(self) -> bool:
        """Installs the hook where the node died or was made on another stream; restores cast views.

        Returns:
            False when a parameter's dtype, device, shape or strides are no longer those of
            construction.
        """
        with self._lock:
            if self._removed:
                return True
            stream = self._current_stream()
            for param in self._params:
                check_not_reduced(param.variable)
            for index, param in enumerate(self._params):
                variable = param.variable
                values = sharded.local(variable)
                if (
                    values.dtype != param.dtype
                    or values.device != self._device
                    or values.shape != param.main.shape
                    or values.numel() > 0
                    and values.stride() != param.main.stride()
                    and torch.ops.aten.is_non_overlapping_and_dense(values)
                ):
                    return False
                grad = variable.grad
                if grad is param.exposed and grad is not None and grad.dtype != param.main.dtype:
                    self._restore(param)
                if variable.requires_grad:
                    self._install(index, is_forced=stream != self._stream)
            self._stream = stream
            return True

    def _install(self, index: int, is_forced: bool) -> None:
        param = self._params[index]
        if is_forced and param.handle is not None:
            # A node that nobody else holds dies here, and comes back on the current stream.
            param.handle.remove()
            param.node = param.handle = None
        node = torch.autograd.graph.get_gradient_edge(param.variable).node
        if node is param.node:
            return
        hooks = weakref.ref(self)

        def pre_hook(grads):
            alive = hooks()
            # The owner's finaliser detaches: it must not run inside, where it would wait for us.
            owner = alive._owner() if alive is not None else None
            if owner is None:
                return None
            left = alive._consume(index, grads[0])
            if alive._buckets is not None:
                alive._arrived(index)
            return (left,)

        param.node = node
        param.handle = node.register_prehook(pre_hook)
        node.metadata[_NODE_KEY] = (hooks, index)
        if param.is_cast:
            self._extension.deliver_in(param.variable, param.main.dtype)

    def remove(self) -> None:
        """Ends the hook's work, after adding what the backward that calls it has queued.

        ``.grad`` stays as it is. What others have queued goes to stock autograd at their end.
        """
        with self._lock:
            graph_task = torch._C._current_graph_task_id()
            for queue in filter(None, (reference() for reference in self._queues)):
                if queue.graph_task == graph_task:
                    self._finish(queue)
            self._removed = True
            for param in self._params:
                if param.handle is not None:
                    param.handle.remove()
                param.node = param.handle = None

    def expose(self, index: int) -> None:
        """Makes a parameter's ``.grad`` a view of main, with the value that ``.grad`` had."""
        with self._lock:
            self._restore(self._params[index])

    def _restore(self, param: _Param) -> None:
        """Brings ``.grad`` back into main, and main back into ``.grad``."""
        self._adopt(param)
        self._show(param)
        param.statistics_version = None
        self._let_go(param)

    @torch.no_grad()
    def begin(self, index: int) -> None:
        """Begins a window of zeros where ``.grad`` is None, for modules that add to main."""
        param = self._params[index]
        with self._lock:
            if param.variable.grad is None:
                param.main.zero_()
                param.micro_batches = 0
                self._restore(param)

    def added(self, index: int, drops: bool) -> bool:
        """Tells that the backward under way has added to main, after :meth:`begin`.

        Args:
            index: of the parameter.
            drops: what autograd delivers to it in this backward stands for nothing.

        Returns:
            False when the hook's work has ended.
        """
        if not self.add(index, lambda *_: False):
            return False
        if drops:
            self._params[index].dropped_task = torch._C._current_graph_task_id()
        return True

    def invalidate(self) -> None:
        """Declares the statistics slots stale."""
        with self._lock:
            for param in self._params:
                param.statistics_version = None

    def use_inv_scale(self) -> bool:
        """Tells that inv_scale may be written to; this hook has never left it out."""
        return True

    def _are_statistics_valid(self, param: _Param) -> bool:
        """Tells whether a parameter's slots describe its ``.grad``, by its version counter.

        Those of a DTensor are not believed: clipping by torch writes to it and moves no counter.
        """
        grad = param.variable.grad
        return (
            grad is not None
            and not sharded.is_dtensor(grad)
            and grad is param.exposed
            and self._is_ours(grad, param)
            and grad._version == param.statistics_version
        )

    @torch.no_grad()
    def measure(self, from_slots: bool, indices: Iterable[int] | None) -> list[Measured]:
        """Measures the ``.grad`` of all parameters, or of some, in up to two parts.

        Args:
            from_slots: read the slots that describe it, where there are such.
            indices: of which parameters; None for all.
        """
        values: dict[int, Tensor] = {}
        slots: dict[int, Tensor] = {}
        with self._lock:
            for index in range(len(self._params)) if indices is None else indices:
                param = self._params[index]
                grad = param.variable.grad
                if grad is None:
                    continue
                if from_slots and self._are_statistics_valid(param):
                    slots[index] = param.partials
                else:
                    values[index] = as_main(sharded.shard(grad, param.variable), param.main.dtype)
            return [
                Measured(list(part), *self.backend.grad_stats(list(part.values()), part is slots))
                for part in (values, slots)
                if part
            ]

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiplies every ``.grad``: grad = grad * factor, a 0-dim tensor of the device."""
        with self._lock:
            mains = []
            left_over = list(filter(self._is_left_over, self._params))
            for param in self._params:
                if param.variable.grad is None:
                    continue
                grad = sharded.local(param.variable.grad)
                if as_main(grad, torch.float32) is grad:
                    mains.append(grad)
                else:
                    grad.mul_(factor)
            self.backend.scale_(mains, factor.float())
            for param in left_over:
                param.ended_version = param.variable.grad._version

    def current(self, index: int) -> Tensor | None:
        """Returns what a parameter's window has summed so far: main, unless .grad is another."""
        param = self._params[index]
        grad = param.variable.grad
        if grad is None:
            return None
        return self._sum_of(grad, param)

    def micro_batches(self, index: int) -> int:
        """Tells how many backwards have added to what a parameter's window has summed.

        It begins where ``.grad`` is None, and with the first gradient after :meth:`end_window`.
        """
        param = self._params[index]
        return param.micro_batches if self._has_begun(param) else 0

    def _has_begun(self, param: _Param) -> bool:
        """Tells whether the window has summed a gradient of a parameter."""
        is_now = param.window == self._window and param.micro_batches > 0
        return is_now and self._has_grad(param)

    @staticmethod
    def _has_grad(param: _Param) -> bool:
        """Tells whether there is a sum: here, or reduced."""
        if param.owner is not None and param.owner.grad is not None:
            return True
        return param.variable.grad is not None

    def most_micro_batches(self) -> int:
        """Tells the most that :meth:`micro_batches` is of any parameter."""
        return max(map(self.micro_batches, range(len(self._params))))

    def end_window(self) -> None:
        """Has the next gradients count as those of a new window."""
        with self._lock:
            self._window += 1
            for param in self._params:
                param.statistics_version = None  # a fused step may have written
                if param.window != self._window - 1:
                    continue
                grad = param.variable.grad
                is_view = grad is not None and grad is param.exposed
                param.ended_version = grad._version if is_view else -1

    def left_over(self) -> int:
        """Tells a parameter whose ``.grad`` is still what a window that has ended left, or -1."""
        return next((i for i, p in enumerate(self._params) if self._is_left_over(p)), -1)

    def _is_left_over(self, param: _Param) -> bool:
        grad = param.variable.grad
        is_view = grad is not None and grad is param.exposed
        return is_view and param.window != self._window and grad._version == param.ended_version

    def tally(self) -> tuple[int, int, int]:
        """Returns the number of the last window, its backwards, and those without a weight.

        A window begins with a gradient that arrives where no parameter has summed anything.
        """
        return self._tally

    def weigh(self, is_weighted: bool) -> None:
        """Tells whether the backwards that follow are those of a micro-batch with a weight."""
        self._is_weighted = is_weighted

    def main_grad(self, index: int) -> Tensor:
        """Returns the view of main that is ``.grad``, or will be: always the same tensor.

        So its version counter tells of every write through a reference that somebody has kept.
        """
        with self._lock:
            return self._view(self._params[index])

    def call_at_end(self, call: Callable[[], None]) -> None:
        """Has every backward that had a gradient for us call this at its end."""
        self._at_end = call

    def hold(self) -> None:
        """Has gradients wait, after the backward that brought them, to be committed or dropped.

        A backward that raises leaves none. Not with fused modules.
        """
        self._is_holding = True

    def held(self) -> list[Tensor]:
        """Returns the gradients that wait."""
        with self._lock:
            return [grad for queue in self._held for _, grad in queue.entries]

    def commit_held(self) -> None:
        """Adds the gradients that wait.

        A launch adds once to a parameter: a second gradient of one, as of two reentrant checkpoints
        that share it, starts another.
        """
        with self._lock:
            held, self._held = self._held, []
            for queue in held:
                if self._removed:
                    self._hand_back(queue.entries)
                    continue
                self._count_backward()
                batch: dict[int, tuple[_Param, Tensor]] = {}
                for entry in queue.entries:
                    if id(entry[0]) in batch:
                        self._commit(list(batch.values()), queue.graph_task)
                        batch = {}
                    batch[id(entry[0])] = entry
                self._commit(list(batch.values()), queue.graph_task)

    def drop_held(self) -> None:
        """Drops the gradients that wait."""
        with self._lock:
            self._held = []

    def load(self, index: int, total: Tensor | None, micro_batches: int, backwards: int) -> None:
        """Makes a window one that has summed this, or None, in so many of its backwards."""
        param = self._params[index]
        with self._lock:
            if total is None:
                param.variable.grad = None
            else:
                with torch.no_grad():
                    param.main.copy_(total)
                self._show(param)
            self._tally = (self._tally[0] + 1, backwards, 0)
            param.statistics_version = None
            param.micro_batches = micro_batches
            param.window = self._window
            param.graph_task = -1

    def _current_stream(self):
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device)

    @staticmethod
    def _is_ours(grad: Tensor, param: _Param) -> bool:
        if sharded.is_dtensor(grad) and grad.placements != param.variable.placements:
            return False
        grad = sharded.local(grad)
        return (
            grad.layout == torch.strided
            and grad.dtype == param.main.dtype
            and grad.device == param.main.device
            and grad.shape == param.main.shape
            and grad.stride() == param.main.stride()
            and grad.data_ptr() == param.main.data_ptr()
        )

    @staticmethod
    def _was_cast(grad: Tensor, param: _Param) -> bool:
        return (
            grad is param.exposed
            and grad.dtype != param.main.dtype
            and grad._version == param.exposed_version
        )

    def _sum_of(self, grad: Tensor, param: _Param) -> Tensor:
        """What ``.grad`` stands for: main, or its own values.

        Where our view was cast and written to, before or after, elements that the cast has only
        rounded are those of main.
        """
        main = param.main
        if self._is_ours(grad, param) or self._was_cast(grad, param):
            return main
        grad_is_view = grad is param.exposed and grad.dtype != main.dtype
        grad = sharded.shard(grad, param.variable)
        if grad.layout != torch.strided:
            return grad.detach().to_dense()
        if not grad_is_view or grad.device != main.device or grad.shape != main.shape:
            return grad.detach()
        with torch.no_grad():
            is_rounded = (main.to(grad.dtype) == grad) & (grad != 0)
            return torch.where(is_rounded, main, grad.to(main.dtype))

    @staticmethod
    def _take_up(param: _Param) -> None:
        """Gives main memory: that of ``.grad``, or new one."""
        grad = param.variable.grad
        is_kept = grad is not None and as_main(grad, param.main.dtype) is grad
        if is_kept and grad.stride() == param.main.stride():
            param.main = grad.data
        else:
            param.main = torch.empty_like(param.main, device=param.variable.device)

    @staticmethod
    def _let_go(param: _Param) -> None:
        """Leaves the memory of main to ``.grad`` alone."""
        if param.owner is not None:
            param.main = torch.empty_like(param.main, device="meta")
            param.exposed = None

    def _adopt(self, param: _Param) -> bool:
        if param.owner is not None:
            self._take_up(param)
        grad = param.variable.grad
        if grad is None:
            return False
        value = self._sum_of(grad, param)
        if value is not param.main:
            if value.untyped_storage().data_ptr() == param.main.untyped_storage().data_ptr():
                value = value.clone()
            param.main.copy_(value)
        return True

    def _view(self, param: _Param) -> Tensor:
        """A tensor of its own, which others may have cast or drawn into a graph since."""
        exposed = param.exposed
        if exposed is None or not self._is_ours(exposed, param) or exposed.requires_grad:
            param.exposed = sharded.wrap(param.main.data, param.variable)
        return param.exposed

    def _show(self, param: _Param) -> None:
        """Makes ``.grad`` the view of main, which was written to."""
        grad = param.variable.grad
        if grad is None or not self._is_ours(grad, param):
            param.variable.grad = self._view(param)
        torch.autograd.graph.increment_version(param.variable.grad)
        param.exposed_version = param.variable.grad._version

    def _describe(self, param: _Param) -> None:
        """The slots were written with main."""
        grad = param.variable.grad
        param.statistics_version = grad._version if grad is param.exposed else None

    def _commit(self, entries: Sequence[tuple[_Param, Tensor]], graph_task: int) -> None:
        stores = [not self._adopt(param) for param, _ in entries]
        for (param, _), store in zip(entries, stores, strict=True):
            self._count(param, graph_task, store)
        if len(entries) == 1:
            (param, grad), (store,) = entries[0], stores
            self.backend.accumulate_(
                param.main, grad, self._scale, self._inv_scale, store, param.partials
            )
        else:
            self.backend.multi_accumulate_(
                [param.main for param, _ in entries],
                [grad for _, grad in entries],
                self._scale,
                self._inv_scale,
                stores,
                [param.partials for param, _ in entries],
            )
        for param, _ in entries:
            self._show(param)
            self._describe(param)
            self._let_go(param)

    def _consume(self, index: int, grad: Tensor | None) -> Tensor | None:
        """Returns what is left for AccumulateGrad: None, unless the gradient is not for us."""
        if grad is None:
            return grad
        param = self._params[index]
        # A gradient of another kind than its parameter's is stock autograd's.
        is_dtensor = sharded.is_dtensor(param.variable)
        if not (sharded.is_dtensor(grad) if is_dtensor else type(grad) is Tensor):
            return grad
        if not param.variable.requires_grad:
            return grad
        if param.dropped_task >= 0 and param.dropped_task == torch._C._current_graph_task_id():
            return None
        shape = param.variable.shape if is_dtensor else param.main.shape
        if grad.shape != shape or grad.device != self._device:
            raise RuntimeError(
                f"gradacc_kernels: a parameter attached with shape {list(shape)} on "
                f"{self._device} received a gradient of shape {list(grad.shape)} on {grad.device}. "
                "Call Accumulator.refresh() after moving parameters; detach and attach again after "
                "reshaping them."
            )
        if _in_compiled_autograd():
            raise RuntimeError(
                "gradacc_kernels: compiled autograd cannot trace the gradient hook. Turn it off "
                "(torch._dynamo.config.compiled_autograd = False), or detach the Accumulator."
            )
        # With grad mode on (create_graph) only stock accumulation keeps `.grad` differentiable.
        if torch.is_grad_enabled():
            with self._lock:
                if self._removed:
                    return grad
                if self._is_holding:
                    raise RuntimeError(
                        "gradacc_kernels: with nonfinite='skip_micro_batch' gradients wait until "
                        "backward has ended, and those of create_graph=True cannot: attach with "
                        "nonfinite='skip_window'."
                    )
                if self._buckets is not None:
                    raise RuntimeError(
                        "gradacc_kernels: gradients of create_graph=True are added by autograd, "
                        "after the reduction over ranks has seen them last: attach without "
                        "process_group."
                    )
                self._is_new_backward()
                store = param.variable.grad is None
                self._count(param, torch._C._current_graph_task_id(), store)
            return grad * (self._inv_scale * self._scale)
        if grad.is_complex():
            raise RuntimeError("gradacc_kernels: cannot accumulate a complex gradient")
        arrived, grad = grad, sharded.shard(grad, param.variable)
        if param.main.dtype == torch.float32 and grad.dtype not in _SUPPORTED:
            grad = grad.float()
        entry = (param, in_layout_of(grad, param.main))
        with self._lock:
            if self._removed:
                return arrived
            check_not_reduced(param.variable)
            self._begin_backward()
            self._check_not_launched(index)
            if self._is_holding:
                if _is_watched(param.variable) or torch._C._current_graph_task_id() < 0:
                    raise RuntimeError(
                        "gradacc_kernels: with nonfinite='skip_micro_batch' gradients are added "
                        "after backward, but a hook of others reads the .grad of a parameter of "
                        f"shape {list(param.main.shape)} inside of it: remove that hook, or attach "
                        "with nonfinite='skip_window'."
                    )
                # Whoever else has it may write to it as soon as this returns.
                is_copy = entry[1] is not grad
                held = (param, entry[1] if is_copy else grad.clone())
                self._queue_under_way().entries.append(held)
                return None
            self._flush_queued(param)
            is_read = param.owner is not None or _is_watched(param.variable)
            if entry[1].nbytes < self._queue_below and not is_read:
                self._enqueue(entry)
            else:
                self._commit([entry], torch._C._current_graph_task_id())
        return None

    def _is_new_backward(self) -> bool:
        """Tells whether this is the first gradient that a backward has for us."""
        graph_task = torch._C._current_graph_task_id()
        if graph_task < 0 or graph_task in self._known_backwards:
            return False
        self._known_backwards.append(graph_task)
        is_inner = self._buckets is not None and self._outer_reduction() is not None
        if not self._is_holding and not is_inner:
            self._count_backward()
        return True

    def _count_backward(self) -> None:
        """Called when the gradients of a backward are about to be added."""
        window, backwards, unweighted = self._tally
        if not any(map(self._has_begun, self._params)):
            window, backwards, unweighted = window + 1, 0, 0
        self._tally = (window, backwards + 1, unweighted + (not self._is_weighted))
        self._begin_reduction()

    def _begin_backward(self) -> None:
        is_new = self._is_new_backward()
        if is_new:
            self._follow_uses()
        if self._at_end is None:
            return
        queue = self._queue_under_way()
        if is_new and self._buckets is not None and self._outer_reduction() is None:
            self._reducing_queue = weakref.ref(queue)

    # The reduction over ranks

    def reduce_with(
        self, bucket_of: list[int], launch: Callable[[int, int], None], overlaps: bool
    ) -> None:
        """Has backwards that reduce call ``launch(first, last)`` with buckets that are final.

        In order, on a stream that has waited for them. ``.grad`` of their parameters is the view
        of main then, of zeros where there was none.

        Args:
            bucket_of: the bucket of each parameter.
            launch: begins to reduce main gradients in place; they are its own until end_reduction.
            overlaps: whether that may begin before backward has ended.
        """
        with self._lock:
            self._buckets, self._launch, self._overlaps = Buckets(bucket_of), launch, overlaps

    def set_reducing(self, is_reducing: bool, every: int) -> None:
        """Has each every-th of the backwards of a window reduce from now on, or none."""
        with self._lock:
            self._wants_reduction, self._reduce_every = is_reducing, every

    def is_reducing(self) -> bool:
        """Tells whether the last backward reduces, and its reduction has not ended."""
        with self._lock:
            return self._is_reducing

    def is_reduced(self) -> bool:
        """Tells whether nothing was added since the window was reduced."""
        with self._lock:
            return self._is_reduced

    def _outer_reduction(self) -> _Queue | None:
        return None if self._reducing_queue is None else self._reducing_queue()

    def _begin_reduction(self) -> None:
        # A backward inside of one that reduces, as a reentrant checkpoint's, is a part of it.
        if self._buckets is None or self._outer_reduction() is not None:
            return
        if self._buckets.has_begun:
            raise RuntimeError(
                "gradacc_kernels: an earlier backward has begun to reduce its gradients over the "
                "ranks, and it did not end, or a micro_batch() has several backwards, of which all "
                "but the last one have to run inside of no_sync(). What the ranks hold differs: "
                "restart the processes from a checkpoint"
            )
        self._is_reduced = False
        self._is_reducing = self._wants_reduction and self._tally[1] % self._reduce_every == 0

    def _check_not_launched(self, index: int) -> None:
        if self._buckets is not None and self._buckets.is_handed_out(index):
            raise RuntimeError(
                f"gradacc_kernels: a parameter of shape {list(self._params[index].main.shape)} got "
                "another gradient in a backward that was already reducing it over the ranks, as "
                "where several reentrant checkpoints share it, or a micro_batch() has several "
                "backwards: use checkpoint(use_reentrant=False), or run all backwards but the last "
                "one inside of no_sync()"
            )

    def _arrived(self, index: int) -> None:
        """Called when a parameter's AccumulateGrad node has run."""
        with self._lock:
            # What somebody may write to after us is reduced at the end.
            is_late = not self._overlaps or _is_watched(self._params[index].variable)
            if self._removed or not self._is_reducing or is_late:
                return
            ready = self._buckets.arrived(index)
            self._prepare(ready)
        self._launch_on_stream(ready)

    def launch_rest(self) -> None:
        """Launches what is left of all buckets."""
        with self._lock:
            if not any(map(self._has_begun, self._params)):
                self._tally = (self._tally[0] + 1, 0, 0)
            rest = self._buckets.rest()
            self._prepare(rest)
        self._launch_on_stream(rest)

    @torch.no_grad()
    def _prepare(self, buckets: range) -> None:
        for param in (
            self._params[i] for bucket in buckets for i in self._buckets.params_of[bucket]
        ):
            self._flush_queued(param)
            if not self._adopt(param):  # the other ranks may have a gradient of it
                param.main.zero_()
                self._count(param, -1, True)
            if param.variable.requires_grad:
                self._show(param)
            param.statistics_version = None

    def _launch_on_stream(self, buckets: range) -> None:
        if not buckets:
            return
        here = self._current_stream()
        if here is None:
            self._launch(buckets.start, buckets.stop)
            return
        if self._reduction_stream is None:
            self._reduction_stream = torch.cuda.Stream(self._device)
        self._reduction_stream.wait_stream(here)
        with torch.cuda.stream(self._reduction_stream):
            self._launch(buckets.start, buckets.stop)

    def end_reduction(self) -> None:
        """Called when all buckets have been reduced."""
        with self._lock:
            self._buckets.reset()
            self._is_reducing, self._is_reduced = False, True
            for param in self._params:
                if param.variable.grad is not None:
                    self._show(param)
                param.statistics_version = None

    def _follow_uses(self) -> None:
        """Has 16-bit uses that autograd sums delivered in float32, and single ones as they come.

        Called before the first gradient that a backward has for us is added, and most others are
        delivered. Only the extension can count uses.
        """
        if self._extension is None:
            return
        halves = [param for param in self._params if _is_half(param.variable)]
        if not halves:
            return
        counts = self._extension.count_uses([param.variable for param in halves])
        for param, uses in zip(halves, counts, strict=True):
            if uses:
                param.is_cast = uses > 1
                dtype = param.main.dtype if param.is_cast else None
                self._extension.deliver_in(param.variable, dtype)

    def _count(self, param: _Param, graph_task: int, store: bool) -> None:
        """Counts one micro-batch more, unless this backward has been counted."""
        if store and not self._has_grad(param) or param.window != self._window:
            param.window = self._window
            param.micro_batches = 0
        elif graph_task >= 0 and graph_task == param.graph_task:
            return
        param.micro_batches += 1
        param.graph_task = graph_task

    def _flush_queued(self, param: _Param) -> None:
        """Adds an earlier gradient of this parameter first: it may be the one that stores."""
        queue = param.queue() if param.queue is not None else None
        if queue is not None and queue.batch == param.batch:
            self._flush(queue)

    def _queue_under_way(self) -> _Queue:
        graph_task = torch._C._current_graph_task_id()
        alive = [queue for queue in (ref() for ref in self._queues) if queue is not None]
        queue = next((queue for queue in alive if queue.graph_task == graph_task), None)
        if queue is None:
            queue = _Queue(graph_task, self._current_stream())
            alive.append(queue)

            def finish(queue=queue):
                with self._lock:
                    self._finish(queue)
                    outer = self._outer_reduction()
                    if outer is queue:
                        self._reducing_queue = None
                if self._at_end is not None and outer in (None, queue):
                    self._at_end()

            torch.autograd.Variable._execution_engine.queue_callback(finish)
        self._queues = [weakref.ref(queue) for queue in alive]
        return queue

    def _finish(self, queue: _Queue) -> None:
        if not self._is_holding:
            self._flush(queue)
        elif queue.entries:
            # The stream of the caller has waited for those on which the gradients were made.
            for _, grad in queue.entries:
                if grad.is_cuda:
                    grad.record_stream(self._current_stream())
            self._held.append(queue)

    def _enqueue(self, entry: tuple[_Param, Tensor]) -> None:
        queue, stream = self._queue_under_way(), self._current_stream()
        if queue.stream != stream:
            self._flush(queue)
        queue.stream = stream
        param, grad = entry
        param.queue, param.batch = weakref.ref(queue), queue.batch
        queue.entries.append(entry)
        queue.nbytes += grad.nbytes
        if queue.nbytes >= self._queue_bytes or len(queue.entries) == _QUEUE_LENGTH:
            self._flush(queue)

    def _flush(self, queue: _Queue) -> None:
        entries, queue.entries, queue.nbytes = queue.entries, [], 0
        if not entries:
            return
        queue.batch += 1

        def add():
            if self._removed:
                self._hand_back(entries)
            else:
                self._commit(entries, queue.graph_task)

        caller = self._current_stream()
        if queue.stream == caller:
            add()
            return
        with torch.cuda.stream(queue.stream):
            add()
        caller.wait_stream(queue.stream)

    @torch.no_grad()
    def _hand_back(self, entries: Sequence[tuple[_Param, Tensor]]) -> None:
        """Adds as stock accumulation does what was queued when others ended the hook's work."""
        for param, queued in entries:
            variable = param.variable
            value = queued.float() * (self._inv_scale * self._scale)
            like = variable if variable.grad is None else variable.grad
            value = sharded.wrap(value.to(like.device, like.dtype), variable)
            variable.grad = value if variable.grad is None else variable.grad + value

    @staticmethod
    def demand(node: Any, hooks: PythonHooks | None = None) -> Demand:
        """Tells what the backward under way does with a gradient that a fused module sends on.

        Args:
            node: to which the gradient goes, or None.
            hooks: of which the node must have the hook to be the main gradient's; None for any.
        """
        if node is None:
            return Demand.NOTHING
        try:
            if not torch._C._will_engine_execute_node(node):
                return Demand.NOTHING
        except RuntimeError:  # torch.autograd.grad with respect to this leaf
            return Demand.GRADIENT
        reference, index = node.metadata.get(_NODE_KEY, (None, None))
        owner = reference() if reference is not None else None
        if owner is None or (hooks is not None and owner is not hooks):
            return Demand.GRADIENT
        if not owner._params[index].variable.requires_grad:
            return Demand.NOTHING  # frozen since forward: AccumulateGrad skips
        return Demand.MAIN_GRAD if owner._is_sole_reader(index, node) else Demand.GRADIENT

    def _is_sole_reader(self, index: int, node: Any) -> bool:
        """Tells whether no other hook sees a gradient before ours adds it."""
        param = self._params[index]
        handle = param.handle
        return (
            param.node is node
            and handle is not None
            and len(handle.hooks_dict_ref() or ()) == 1
            and not param.variable._backward_hooks
        )

    def add(
        self,
        index: int,
        write: Callable[[Tensor, Tensor, bool, float, Tensor, bool], bool],
    ) -> bool:
        """Has a fused module write to a main gradient, between adopting and showing ``.grad``.

        Args:
            index: of the parameter.
            write: called with main, its slots, whether these describe main now (or need not,
                because it stores), scale, inv_scale, and whether to store; tells whether it has
                left the slots valid.

        Returns:
            False, without a call, when the hook's work has ended.
        """
        owner = self._owner()  # its finaliser must not run inside, where it would wait for us
        if owner is None:
            return False
        param = self._params[index]
        with self._lock:
            if self._removed:
                return False
            self._begin_backward()
            self._check_not_launched(index)
            self._flush_queued(param)
            # On the parameter's own stream all accumulation is ordered by events.
            here, home = self._current_stream(), self._stream
            if here != home:
                here.wait_stream(home)
            store = not self._adopt(param)
            self._count(param, torch._C._current_graph_task_id(), store)
            is_valid = store or self._are_statistics_valid(param)
            param.statistics_version = None
            is_valid = write(
                param.main, param.partials, is_valid, self._scale, self._inv_scale, store
            )
            self._show(param)
            if is_valid:
                self._describe(param)
            self._let_go(param)
            if here != home:
                home.wait_stream(here)
        return True

    def cast(self, index: int, dtype: torch.dtype) -> Tensor:
        """Returns a parameter as a fused module's forward reads it: itself, or its copy."""
        param = self._params[index]
        if param.variable.dtype == dtype:
            return param.variable
        if param.owner is not None:  # a copy would outlive its memory
            return WindowCast.make(param.variable, dtype)
        with self._lock:
            grad = param.variable.grad
            our_version = param.exposed_version if grad is param.exposed else -1
            return param.cast.get(param.variable, grad, our_version, dtype)
