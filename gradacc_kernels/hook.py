"""attach: main gradients in place of ``.grad`` summation, for a model or a list of parameters.

The parts, from a gradient's point of view: a hook on the parameter's AccumulateGrad node
(csrc/autograd/hook.cpp, or python_hook.py) takes it, a kernel adds it (dispatch.py, ops.py), into
the flat buffer (buffer.py) of which ``.grad`` is a view.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from gradacc_kernels import (
    checks,
    dispatch,
    distributed,
    fsdp,
    fused,
    optimizers,
    python_fused,
    sharded,
    window,
)
from gradacc_kernels.accumulator import Accumulator, human
from gradacc_kernels.buffer import FlatBuffer
from gradacc_kernels.python_hook import PythonHooks, check_not_reduced

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A gradient of fewer bytes waits for a common launch; so many bytes wait at the most. On the CPU a
# launch costs nothing, so nothing waits.
QUEUE_BELOW = {"cuda": 1 << 20, "cpu": 0}
QUEUE_BYTES = 32 << 20

# Which attachment covers a parameter, and at which of its groups' indices.
_covered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _MainGrad:
    """``param.main_grad``: the main gradient of a covered ``nn.Parameter``.

    A descriptor of the class and not an attribute of the parameter, so that copying, pickling or
    saving a model does not write the flat buffer along. It has no ``__set__``: code that assigns
    ``param.main_grad`` itself gets the ordinary attribute.
    """

    def __get__(self, param, owner):
        if param is None:
            return self
        group, index = _find(param)
        if group is None:
            raise AttributeError(f"'{owner.__name__}' object has no attribute 'main_grad'")
        total = group.hooks.current(index)
        have_added, name = group.owner().written_by_modules, group.names[index]
        if total is None and name in have_added:
            group.hooks.begin(index)  # who reads it adds to it
            have_added[name] = False
        if total is not None and not param.grad.requires_grad:
            # Another tensor may be in `.grad`, as a bucket view of DistributedDataParallel.
            if total.data_ptr() != group.buffer.views[index].data_ptr():
                group.hooks.expose(index)
        return group.hooks.main_grad(index)


torch.nn.Parameter.main_grad = _MainGrad()


def _find(param: Tensor) -> tuple[_Group, int] | tuple[None, None]:
    reference, index = _covered.get(param, (None, None))
    group = reference() if reference is not None else None
    return (group, index) if group is not None else (None, None)


def _is_covered(param: Tensor) -> bool:
    return _find(param)[0] is not None


def is_of_one_rank(param: Tensor) -> bool:
    """Tells whether attach covers a parameter, and nobody is known to average its gradient."""
    group, _ = _find(param)
    attachment = group.owner() if group is not None else None
    if attachment is None or attachment.reduction or attachment.fully_sharded is not None:
        return False
    return distributed.is_hooked([param]) is False


def _why_pending(param: Tensor) -> str | None:
    group, index = _find(param)
    attachment = group.owner() if group is not None else None
    if attachment is None:
        return None
    if attachment.fully_sharded is not None:
        if isinstance(group.hooks, fsdp.ShardedHooks) and group.hooks.is_waiting(index):
            return fsdp.WAITING
    elif attachment.window in window.shared and not attachment.is_reduced():
        # Nor would torch.distributed.checkpoint get to know what an optimizer keeps, for which it
        # steps a new one by zeros that it puts into every ``.grad``.
        main = sharded.local(group.hooks.main_grad(index))
        grad = None if param.grad is None else sharded.local(param.grad)
        is_foreign = grad is not None and grad.data_ptr() != main.data_ptr()
        if is_foreign and not attachment.micro_batches():
            return None
        return (
            "the gradients of this window were not reduced over the ranks: its last backward has "
            "not ended, or was inside of no_sync(), or not the last one of attach(steps=), or "
            "there was none. Call Accumulator.step(optimizer), or Accumulator.reduce() before "
            "optimizer.step()"
        )
    if attachment.window in window.pending and attachment.window.is_pending:
        return (
            "the gradients are the weighted sum of this window's micro-batches, and were not "
            "divided by its weight yet: call Accumulator.step(optimizer), or "
            "Accumulator.average_() before optimizer.step(), or at the end of its closure"
        )
    return None


def _end_windows(params: list[Tensor]) -> None:
    owners = {group.owner() for group, _ in map(_find, params) if group is not None}
    for attachment in owners - {None}:
        attachment.window.end_by_step(params)
        for group in attachment.groups:
            group.hooks.end_window()
        attachment.end_reduced_window()


class _Group:
    """The covered parameters of one device and main-gradient dtype: their storage and hooks."""

    def __init__(
        self,
        names: list[str],
        params: list[Tensor],
        scale: float,
        inv_scale: Tensor,
        backend: str,
        owner: _Attachment,
        allocate: Callable[..., Tensor],
        wholes: list[Tensor] | None = None,
    ):
        self.names = names
        self.owner = weakref.ref(owner)
        self.nonfinite = owner.nonfinite
        self.backend = backend
        self.device = params[0].device
        self.dtype = main_dtype(params[0])
        self.is_sharded = any(map(sharded.is_dtensor, params))
        self.buffer: Any = (
            FlatBuffer([sharded.local(param) for param in params], self.dtype, allocate)
            if wholes is None
            else fsdp.WholeStorage(wholes)
        )
        self.inv_scale = inv_scale
        arguments = (
            params if wholes is None else wholes,
            self.buffer.views if wholes is None else [],
            self.buffer.slots,
            scale,
            inv_scale,
            QUEUE_BELOW[self.device.type],
            QUEUE_BYTES,
        )
        module = dispatch.module(backend)
        # The hook in C++ takes no DTensors; the whole parameters of FSDP2 are none.
        self.is_native = backend in ("cuda", "cpu") and (wholes is not None or not self.is_sharded)
        owners = [] if wholes is None else params
        # What takes gradients from autograd, and what speaks of `.grad` of the covered parameters.
        self.arrivals: Any = (
            module.GradHooks(*arguments, owners)
            if self.is_native
            else PythonHooks(*arguments, module, owner, owners)
        )
        self.hooks: Any = self.arrivals
        if wholes is not None:
            self.hooks = fsdp.ShardedHooks(self.arrivals, params, wholes, module)

    def __repr__(self) -> str:
        elements = sum(view.numel() for view in self.buffer.views)
        return (
            f"{len(self.names)} parameters on {self.device}: {elements:,} elements, "
            f"{self.dtype} main gradients in {human(self.buffer.flat.nbytes)}, statistics in "
            f"{human(self.buffer.partials.nbytes)}, backend {self.backend}, "
            f"{'C++' if self.is_native else 'Python'} hook"
        )


def main_dtype(param: Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's main gradient: float32, or float64 for float64."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _requested(backend: str, dtype: torch.dtype) -> str:
    """The requested backend, except for float64, which one backend alone serves."""
    return "auto" if dtype == torch.float64 else backend


class _Attachment:
    """What attach makes. A module's forward pre-hook owns it, or the Accumulator of a list does."""

    def __init__(
        self,
        params: dict[str, Tensor],
        scale: float,
        backend: str,
        fuse: str | bool,
        root: torch.nn.Module | None,
        n_frozen: int,
        nonfinite: str,
        reduction: distributed.Reduction | None,
        fully_sharded: fsdp.FullySharded | None,
    ):
        self.nonfinite = nonfinite
        self.fully_sharded = fully_sharded
        self.reduction = reduction
        self.reducer: distributed.Reducer | None = None
        self.scale = scale
        self.requested_backend = backend
        self.fuse = fuse
        self.fused: fused.FusedModules | None = None
        self.n_frozen = n_frozen
        self.root = None if root is None else weakref.ref(root)
        self.params = params
        self.handles: list[Any] = []
        self.groups: list[_Group] = []
        self.uses_inv_scale = False
        self.written_by_modules: dict[str, bool] = {}  # see integrations/megatron.py
        self.lock = threading.RLock()
        # Parameters whose grad_dtype had to be changed: what it was, and the dtype it was that of.
        self.grad_dtypes: dict[str, tuple[torch.dtype | None, torch.dtype]] = {}
        # The covered parameters under all their names: tied weights have several.
        self.aliases: dict[str, Tensor] = {}
        self.watch = None
        self.install(params, self.make_groups(params))
        self.window = window.Window(self, nonfinite)
        if reduction is not None or fully_sharded is not None:
            window.shared.add(self.window)

    def members(self) -> Iterator[tuple[_Group, int, str, Tensor]]:
        """Yields each covered parameter with its group, its index there and its name."""
        for group in self.groups:
            for index, name in enumerate(group.names):
                yield group, index, name, self.params[name]

    def make_groups(self, params: dict[str, Tensor]) -> list[_Group]:
        """Allocates storage for parameters as they are now, and changes nothing."""
        by_kind: dict[tuple, dict[str, Tensor]] = {}
        # DTensors need the Python hook. What is reduced over ranks, or held, is in one group.
        is_one = self.reduction is not None or self.nonfinite == "skip_micro_batch"
        for name, param in params.items():
            is_whole = self.whole_of(param) is not None
            is_sharded = not is_one and sharded.is_dtensor(param)
            kind = (param.device, main_dtype(param), is_whole, is_sharded)
            by_kind.setdefault(kind, {})[name] = param
        inv_scales = {group.device: group.inv_scale for group in self.groups}
        before = next(iter(inv_scales.values()), None)
        groups = []
        for (device, dtype, is_whole, _), named in by_kind.items():
            requested = _requested(self.requested_backend, dtype)
            backend = dispatch.choose(device, dtype, requested)
            if backend == "reference" and requested == "auto" and dtype == torch.float32:
                warnings.warn(
                    f"gradacc_kernels: gradients on {device} are summed in eager torch, which is "
                    f"slow: {dispatch.why_missing(device.type)}. python -m gradacc_kernels tells "
                    "more; backend='reference' silences this.",
                    stacklevel=4,
                )
            if device not in inv_scales:
                one = torch.ones((), dtype=torch.float32, device=device)
                inv_scales[device] = one if before is None else before.to(device)
            names, members = list(named), list(named.values())
            inv_scale = inv_scales[device]
            wholes = [self.whole_of(param) for param in members] if is_whole else None
            allocate = torch.zeros if self.reduction is None else self.reduction.allocate
            groups.append(
                _Group(names, members, self.scale, inv_scale, backend, self, allocate, wholes)
            )
            if self.uses_inv_scale:
                groups[-1].hooks.use_inv_scale()
            if self.nonfinite == "skip_micro_batch":
                groups[-1].hooks.hold()
            if self.nonfinite in ("skip_micro_batch", "raise") or self.reduction is not None:
                groups[-1].hooks.call_at_end(_end_of_backward(weakref.ref(self)))
        if self.reduction is not None:
            self.reduction.check(groups)
        return groups

    def whole_of(self, param: Tensor) -> Tensor | None:
        """The whole parameter that FSDP2 makes of one that it has sharded, or None."""
        return None if self.fully_sharded is None else self.fully_sharded.whole_of.get(param)

    def check_reduced(self) -> None:
        """Raises where FSDP2 has not reduced all micro-batches."""
        for group in self.groups:
            if isinstance(group.hooks, fsdp.ShardedHooks):
                group.hooks.check_reduced()

    # The reduction over ranks

    def set_reducing(self, is_reducing: bool) -> None:
        """Tells whether backwards from now on reduce."""
        self.reduction.is_on = is_reducing
        for group in self.groups:
            group.hooks.set_reducing(is_reducing, self.reduction.steps)

    def end_backward_reduction(self) -> None:
        """Ends the reduction of a backward that reduces, and waits for it on the current stream."""
        if self.reducer is not None and self.groups[0].hooks.is_reducing():
            self.reduce()

    def ensure_reduced(self) -> None:
        """Reduces what the last backward of a window has not: on every rank, or on none."""
        if self.fully_sharded is not None and self.window.is_weighted:
            self.fully_sharded.average(self.window.weight)
        if self.reducer is None or not self.groups:
            return
        if not (self.reducer.has_reduced and self.is_reduced()):
            self.reduce()

    def is_reduced(self) -> bool:
        """Tells whether there are gradients, and they are the averages of the ranks."""
        is_reduced = self.groups[0].hooks.is_reduced()
        return is_reduced and any(param.grad is not None for param in self.params.values())

    def reduce(self) -> None:
        """Reduces the window as it is, or what is left of it."""
        if self.reducer.windows == 0:  # what comes after attach is seen here
            distributed.check_reduced_once(self.params.values())
        hooks = self.groups[0].hooks
        hooks.launch_rest()
        self.reducer.wait()
        hooks.end_reduction()
        self.window.end_reduction(self.reducer)

    def end_reduced_window(self) -> None:
        """Has the next window be reduced, whether or not a gradient arrives here."""
        if self.reducer is not None:
            self.reducer.has_reduced = False

    def micro_batches(self) -> int:
        """The most backwards that have added to the window of a parameter."""
        return max((group.hooks.most_micro_batches() for group in self.groups), default=0)

    def nbytes(self) -> int:
        """Bytes of main gradients, of their statistics, and beside them for the reduction."""
        beside = 0 if self.reducer is None else self.reducer.nbytes
        return beside + sum(group.buffer.nbytes for group in self.groups)

    def closed_window(self) -> window.Closed | None:
        """The window that was closed last, while its gradients are those in ``.grad``."""
        has_begun = self.micro_batches() > 0 or (self.reducer and self.reducer.has_reduced)
        if has_begun or all(param.grad is None for param in self.params.values()):
            return None
        return self.window.closed

    def has_main_grads(self) -> bool:
        """Tells whether ``.grad`` of a parameter is its main gradient."""
        for group, index, _, param in self.members():
            grad = None if param.grad is None else sharded.local(param.grad)
            if grad is not None and grad.numel():
                if grad.data_ptr() == group.buffer.views[index].data_ptr():
                    return True
        return False

    def ranks(self) -> int:
        """Over how many ranks gradients are averaged here."""
        if self.fully_sharded is not None:
            return self.fully_sharded.world_size
        return 1 if self.reducer is None else self.reducer.world_size

    def backwards(self) -> int:
        """How many backwards the window has had."""
        groups = [group.hooks for group in self.groups]
        return max((g.tally()[1] for g in groups if g.most_micro_batches()), default=0)

    def inv_scales(self) -> dict[torch.device, Tensor]:
        """The factors inv_scale, whether or not they take part."""
        return {group.device: group.inv_scale for group in self.groups}

    def use_inv_scale(self) -> None:
        """Has the factors inv_scale take part, which are 1 for as long as nobody has them."""
        with self.lock:
            if not all([group.hooks.use_inv_scale() for group in self.groups]):
                raise RuntimeError(
                    "inv_scale: a CUDA graph was captured before inv_scale was first asked for, "
                    "and would not see what is written into it: detach, attach again, and read "
                    "Accumulator.inv_scale before you capture"
                )
            self.uses_inv_scale = True

    def install(self, params: dict[str, Tensor], groups: list[_Group]) -> None:
        """Hooks the parameters up to their storage."""
        self.params, self.groups = params, groups
        root = self.root() if self.root is not None else None
        self.aliases = _aliases(root, params)
        uses = Counter(map(id, self.aliases.values()))
        for group, index, name, param in self.members():
            _covered[param] = (weakref.ref(group), index)
            if param.grad_dtype not in (None, group.dtype):
                # None lets `.grad` be float32, and a gradient of any dtype reach the hook uncast.
                # The uses of a shared parameter are summed before any hook: float32 makes autograd
                # cast each of them first. Where one module makes several, backward shows it.
                self.grad_dtypes.setdefault(name, (param.grad_dtype, param.dtype))
                grad, param.grad = param.grad, None
                param.grad_dtype = group.dtype if uses[id(param)] > 1 else None
                if grad is not None:
                    param.grad = grad if param.grad_dtype is None else grad.to(group.dtype)
        if self.fully_sharded is not None:
            self.fully_sharded.install()
        if self.reduction is not None:
            self.reducer = self.reduction.reducer_of(groups[0], self.reducer)
            self.set_reducing(self.reduction.is_on)
        for group in groups:
            group.hooks.refresh()
        fixed = {name: p for name, p in self.aliases.items() if self.whole_of(p) is None}
        self.watch = _watch(root, fixed)
        if root is not None and self.fuse is not False:
            self.fused = fused.FusedModules(root, self.fuse, _covered_by(self))

    def follow(self, root: torch.nn.Module) -> None:
        """Has a module call refresh before its forward and after what changes its parameters."""
        refresh = _Refresh(self)
        self.handles = [
            root.register_forward_pre_hook(refresh),
            root.register_load_state_dict_post_hook(refresh),
        ]
        if _RefreshAfterApply.suits(root):
            root._apply = _RefreshAfterApply(root, self)
            self.handles.append(root._apply)

    def refresh(self) -> None:
        """Follows the parameters to new nodes, streams, dtypes, devices and objects."""
        if torch.is_inference_mode_enabled():
            return  # no backward can follow, and what is made here would be inference tensors
        with self.lock:
            if self.fully_sharded is not None:
                self.fully_sharded.check_objects()
            is_changed = self.watch is not None and self.watch.is_changed()
            if is_changed or not all([group.hooks.refresh() for group in self.groups]):
                self.rebuild()

    def rebuild(self) -> None:
        """Starts again from the parameters as they are now, with what they have summed."""
        if self.fully_sharded is not None:
            raise RuntimeError(
                "gradacc_kernels: a parameter of a model that fully_shard has sharded was cast, "
                "moved or replaced after attach: detach and attach again"
            )
        root = self.root() if self.root is not None else None
        params = self.params
        if root is not None:
            if any(not isinstance(p, torch.nn.Parameter) for p in root.parameters()):
                return  # torch.func.functional_call has put tensors in their place for one call
            # By name, for a parameter whose object was replaced, or by object, for one that moved.
            known = WeakTensorKeyDictionary({param: name for name, param in params.items()})
            params = {
                name: param
                for name, param in root.named_parameters()
                if name in self.aliases or param in known
            }
        for name, param in params.items():
            before = self.aliases.get(name)
            shape = sharded.local(param).shape
            if before is not None and _main_shape(before) != shape:
                raise RuntimeError(
                    f"gradacc_kernels: parameter {name} had shape {list(_main_shape(before))} when "
                    f"it was attached, and has {list(shape)} now: detach and attach again"
                )
            _check_param(name, param, self.requested_backend)
        self.window.before_move()
        backwards = self.backwards()
        groups = self.make_groups(params)

        if self.fused is not None:
            self.fused.remove()
        for group in self.groups:
            group.hooks.remove()
        kept = WeakTensorKeyDictionary({param: name for name, param in params.items()})
        sums = WeakTensorKeyDictionary({param: (_grad(param), 0) for param in params.values()})
        for group, index, name, param in list(self.members()):
            total, count = group.hooks.current(index), group.hooks.micro_batches(index)
            successor = param if param in kept else params.get(name)
            if successor is param or _is_rounded(total, successor):
                sums[successor] = total, count
            if successor is not param:
                self.release(group, index, name, param)
        for param in params.values():
            param.grad = None
        self.install(params, groups)
        for group, index, _, param in self.members():
            total, micro_batches = sums[param]
            if total is not None:
                group.hooks.load(index, total.detach().to_dense(), micro_batches, backwards)
        self.window.move(groups[0].device)

    def release(self, group: _Group, index: int, name: str, param: Tensor) -> None:
        """Gives one parameter back to stock autograd, with the gradient that it would hold."""
        value = group.hooks.current(index)
        before, of_dtype = self.grad_dtypes.pop(name, (param.grad_dtype, None))
        # The default is the parameter's own dtype, which a cast may have changed meanwhile.
        grad_dtype = param.dtype if before == of_dtype else before
        if value is not None:
            # Never the view itself: it would keep the flat buffer alive.
            value = value.to(sharded.local(param).device, grad_dtype, copy=True)
            value = sharded.wrap(value, param)
        _covered.pop(param, None)
        param.grad = None
        if of_dtype is not None:
            param.grad_dtype = grad_dtype
            extension = dispatch.extension()
            if before == of_dtype and not isinstance(extension, str):
                extension.follow_own_dtype(param)  # torch's Python API has no way to the default
        param.grad = value

    def detach(self) -> None:
        """Gives all parameters back."""
        # The garbage collector may call this at any time, inside anybody's modes.
        with self.lock, torch.inference_mode(False), _disable_current_modes():
            for handle in self.handles:
                handle.remove()
            for monitor in list(self.window.monitors):
                monitor.close()
            with contextlib.suppress(RuntimeError):
                self.window.end(self)
            if self.fused is not None:
                self.fused.remove()
            for group in self.groups:
                group.hooks.remove()
            for member in self.members():
                self.release(*member)
            if self.fully_sharded is not None:
                self.fully_sharded.remove()
            self.groups = []

    def __del__(self, is_finalizing=sys.is_finalizing):
        # Parameters may outlive a model or an Accumulator, and must then train as stock ones do.
        if is_finalizing() or not getattr(self, "groups", None):
            return
        is_unused = self.root is None and not any(g.hooks.tally()[0] for g in self.groups)
        self.detach()
        if is_unused:
            warnings.warn(
                "attach: the Accumulator of a list of parameters was dropped before it saw a "
                "gradient, which has detached them: keep what attach returns, or attach the module",
                stacklevel=2,
            )


def _grad(param: Tensor | None) -> Tensor | None:
    """What of a parameter's ``.grad`` is on this rank."""
    grad = None if param is None else param.grad
    return None if grad is None else sharded.shard(grad, param)


def _is_rounded(total: Tensor | None, param: Tensor | None) -> bool:
    """Tells whether ``.grad`` is this sum, cast: the parameter is one that ``.to()`` has made."""
    grad = _grad(param)
    if total is None or grad is None or grad.shape != total.shape or grad.is_sparse:
        return False
    return torch.equal(total.detach().to(grad), grad)


def _end_of_backward(attachment: weakref.ref[_Attachment]):
    def call():
        alive = attachment()
        if alive is not None:
            alive.window.end_of_backward()

    return call


def _covered_by(attachment: _Attachment) -> fused.Find:
    def find(param: Tensor) -> fused.Covered | None:
        group, index = _find(param)
        if group is None or group not in attachment.groups:
            return None
        whole = attachment.whole_of(param)
        if whole is None and sharded.is_dtensor(param):
            return None
        taken = param if whole is None else whole
        main = group.buffer.views[index]
        return fused.Covered(taken, main, group.arrivals, index, group.is_native)

    return find


def _main_shape(param: Tensor) -> torch.Size:
    group, index = _find(param)
    return group.buffer.views[index].shape


def _aliases(root: torch.nn.Module | None, params: dict[str, Tensor]) -> dict[str, Tensor]:
    if root is None:
        return params
    covered = set(map(id, params.values()))
    named = root.named_parameters(remove_duplicate=False)
    return {name: param for name, param in named if id(param) in covered}


def _watch(root: torch.nn.Module | None, params: dict[str, Tensor]):
    if root is None:
        return None
    entries = []
    for path, param in params.items():
        owner, _, name = path.rpartition(".")
        entries.append((root.get_submodule(owner)._parameters, name, param))
    extension = dispatch.extension()
    form = python_fused if isinstance(extension, str) else extension
    return form.ParameterWatch(entries)


class _Refresh:
    """The hook before an attached module's forward and after its loading; owns the attachment.

    Copies and pickles of the module get one that does nothing: they train as stock PyTorch does.
    """

    def __init__(self, attachment: _Attachment | None = None):
        self.attachment = attachment

    def __call__(self, module, _):
        if self.attachment is not None and not torch.compiler.is_compiling():
            self.attachment.refresh()

    def __reduce__(self):
        return (_Refresh, ())


class _RefreshAfterApply:
    """``_apply`` of an attached module's instance, by which ``.to()`` and ``.half()`` are done.

    Loops that never call the module itself, but layers of it, have no other call to follow by. What
    cannot be followed yet, as a move to the meta device, is left to the next forward. Copies and
    pickles of the module get one that does what the class does.
    """

    @staticmethod
    def suits(module: torch.nn.Module) -> bool:
        """Tells whether an instance can have one: others' are left alone."""
        before = vars(module).get("_apply")
        if isinstance(before, _RefreshAfterApply):
            before = None if before._alive() is None else before
        # What pickles its attributes before itself, as torch.fx's modules, cannot refer to itself.
        pickles_plainly = type(module).__reduce__ is object.__reduce__
        return before is None and pickles_plainly

    def __init__(self, module: torch.nn.Module, attachment: _Attachment | None = None):
        self.module = weakref.ref(module)
        self.attachment = None if attachment is None else weakref.ref(attachment)

    def _alive(self) -> _Attachment | None:
        return None if self.attachment is None else self.attachment()

    def __call__(self, *args, **kwargs):
        module = self.module()
        if module is None:
            raise RuntimeError(
                "gradacc_kernels: a shallow copy of an attached module cannot be moved or cast "
                "when the module itself is gone: detach() before copy.copy, or use copy.deepcopy"
            )
        try:
            return type(module)._apply(module, *args, **kwargs)
        finally:
            attachment = self._alive()
            if attachment is not None:
                with contextlib.suppress(TypeError, ValueError, RuntimeError):
                    attachment.refresh()

    def remove(self) -> None:
        """Gives the module the ``_apply`` of its class back."""
        module = self.module()
        if module is not None and vars(module).get("_apply") is self:
            del module._apply

    def __reduce__(self):
        return (_RefreshAfterApply, (self.module(),))


def _check_param(name: str, param: Tensor, backend: str) -> None:
    sharded.check_param("attach", name, param)
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"attach: parameter {name} must be float16, bfloat16, float32 or float64, got "
            f"{param.dtype}"
        )
    if param.device.type == "meta":
        raise ValueError(
            f"attach: parameter {name} is on the meta device; materialise the model first, with "
            "to_empty() or load_state_dict(assign=True)"
        )
    if not param.is_leaf:
        raise ValueError(f"attach: parameter {name} must be a leaf of the autograd graph")
    if param.layout != torch.strided:
        raise ValueError(f"attach: parameter {name} must be strided, got {param.layout}")
    try:
        dtype = main_dtype(param)
        dispatch.choose(param.device, dtype, _requested(backend, dtype))
    except ValueError as error:
        raise ValueError(f"attach: parameter {name}: {error}") from None


def attach(
    model_or_params: torch.nn.Module | Tensor | Iterable[Tensor],
    *,
    scale: float = 1.0,
    backend: str = "auto",
    fuse: str | bool = "auto",
    nonfinite: str = "skip_window",
    process_group: Any = None,
    steps: int | None = None,
    reduce_dtype: torch.dtype | None = None,
    bucket_bytes: int | None = None,
    reduce_by: str = "auto",
) -> Accumulator:
    """Makes backward accumulate into float32 main gradients: main = fma(grad, s, main).

    With s = float32(scale) * inv_scale. From then on, ``.grad`` of every covered parameter is its
    main gradient, a float32 view into one flat buffer, also for a float16 or bfloat16 parameter:

    | ``.grad`` when a gradient arrives | what happens                                       |
    |-----------------------------------|----------------------------------------------------|
    | None                              | stored: main = grad * s, and ``.grad`` is the view |
    | the view                          | added in place                                     |
    | zeros in the view                 | added in place                                     |
    | another tensor                    | copied into the view, then added                   |

    A ``.grad`` that exists at attach counts as another tensor. A kept reference to a ``.grad`` sees
    the next window: clone what you keep. Parameters that are frozen now, or added later, are not
    covered: they get stock gradients, without ``scale``.

    ``param.main_grad`` of an ``nn.Parameter`` is the main gradient too. A parameter without a
    gradient keeps ``.grad`` None. With ``backward(create_graph=True)`` gradients go to stock
    accumulation.

    Args:
        model_or_params: a module, whose parameters that require grad are covered, and whose
            attachment lives as long as it does; or leaf tensors, covered as long as the returned
            object lives. float16, bfloat16 and float32 parameters get float32 main gradients,
            float64 ones float64 through the reference backend. Those of a DTensor are over its
            local shard, and those that FSDP2 has sharded need the module: see docs/semantics.md.
        scale: a factor for every gradient, positive and finite: 1 / K for the mean of K
            micro-batches.
        backend: ``"auto"`` for the fastest on each device, or ``"cuda"``, ``"triton"``, ``"cpu"``
            or ``"reference"``.
        fuse: whether weight gradients of a module's linear layers, embeddings and expert weights
            go straight into the main gradient, without a 16-bit tensor between: ``"auto"`` on CUDA
            where it wins, True wherever it is possible, False nowhere. What is not fused has its
            gradient added by the hook.
        nonfinite: what becomes of gradients with inf or NaN. ``"skip_window"``:
            :meth:`Accumulator.step` skips the step. ``"skip_micro_batch"``: a micro-batch that
            brings one is dropped whole, bit for bit, and its weight is not counted; gradients wait
            in their own dtype until backward has ended (2 bytes an element of a 16-bit parameter),
            nothing is fused, and hooks of others must not read ``.grad`` inside of backward. A
            micro-batch is one backward, or what :meth:`Accumulator.micro_batch` holds; the latter
            is needed for reentrant checkpoints and for parameters of several devices. ``"raise"``:
            step raises FloatingPointError with the parameters and the micro-batch; statistics are
            read after every backward for it. ``"ignore"``: step steps. A stock ``optimizer.step()``
            steps in each of them.
        process_group: a ``torch.distributed.ProcessGroup`` over whose ranks ``.grad`` is averaged
            once a window, in place and while backward runs; by the total weight of a window with
            weights. Every backward outside of :meth:`Accumulator.no_sync` reduces. Parameters and
            buffers are set to those of its first rank. Parameters of one device, none of them
            float64. A parameter that has a gradient on no rank gets zeros. The ranks hold the same
            shards of DTensors: the data-parallel dimension of a mesh. Not with FSDP2.
        steps: every so many backwards of a window the gradients are reduced, in place of
            ``no_sync()``. The same on every rank.
        reduce_dtype: in which gradients travel and are summed: None for float32. Half the bytes,
            and each rank's sum and every addition is rounded: see docs/numerics.md.
        bucket_bytes: of float32 gradients that are reduced together; None for a 16th of all, but 32
            to 256 MiB.
        reduce_by: ``"all_reduce"`` of the process group, or ``"copies"``, by which ranks whose GPUs
            can access each other's memory, on one host, average without taking multiprocessors from
            backward. ``"auto"`` for copies where they are possible. They are in float32.

    Returns:
        The :class:`Accumulator`.

    Raises:
        TypeError: neither a module nor tensors, or a scripted module; integer or complex
            parameters, tensor subclasses but DTensor, DTensors that are Partial or over another
            subclass; a scale that is no number.
        ValueError: nothing that requires grad; parameters already attached, uninitialised, sparse,
            no leaves, on the meta device or on one that no backend serves; shards of FSDP2 without
            its module, or with options that it cannot have; a process_group with other shards; a
            scale that is not positive and finite; an unknown backend or fuse; fuse=True for a list,
            or for an embedding with max_norm or scale_grad_by_freq. Nothing was changed.
        RuntimeError: the backend is not available, inference mode is on, FSDP2 is not the one that
            this was written for, or DistributedDataParallel reduces a 16-bit parameter, or any one
            with process_group; nothing was changed.
    """
    if not isinstance(scale, (int, float)):
        raise TypeError(f"attach: scale must be a number, got {type(scale).__name__}")
    checks.check_scale("attach", scale)
    if torch.tensor(scale, dtype=torch.float32, device="cpu") <= 0:
        raise ValueError(f"attach: scale must be positive in float32, got {scale}")
    if backend != "auto" and backend not in dispatch.BACKENDS:
        raise ValueError(
            f"attach: backend must be 'auto' or one of {dispatch.BACKENDS}, got {backend!r}"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "attach: gradients need autograd; call it outside torch.inference_mode()"
        )
    if nonfinite not in window.NONFINITE:
        raise ValueError(f"attach: nonfinite must be one of {window.NONFINITE}, got {nonfinite!r}")
    if nonfinite == "skip_micro_batch":
        if fuse is True:
            raise ValueError(
                "attach: nonfinite='skip_micro_batch' holds gradients until backward has ended, "
                "and fuse=True makes none: leave fuse out"
            )
        fuse = False if fuse == "auto" else fuse
    root = model_or_params if isinstance(model_or_params, torch.nn.Module) else None
    if isinstance(root, torch.jit.ScriptModule):
        raise TypeError(
            "attach: a scripted or traced module calls no hooks that could follow it: pass its "
            "parameters as a list, attach(list(module.parameters()))"
        )
    fused.check(root, fuse)
    named = _named(model_or_params)
    params = {name: param for name, param in named.items() if param.requires_grad}
    if not named:
        raise ValueError("attach: got no parameters: an empty model or list, or a used-up iterator")
    if not params:
        raise ValueError(f"attach: none of the {len(named)} parameters requires grad")
    fully_sharded = fsdp.fully_sharded_of(root, params, process_group is not None, nonfinite)
    for name, param in params.items():
        whole = None if fully_sharded is None else fully_sharded.whole_of.get(param)
        _check_param(name, param if whole is None else whole, backend)
        check_not_reduced(param)
        if _find(param)[0] is not None:
            raise ValueError(
                f"attach: parameter {name} is attached already; call detach() on its Accumulator "
                "first"
            )
    reduction = distributed.reduction_of(
        process_group, steps, reduce_dtype, bucket_bytes, reduce_by
    )
    if reduction is not None:
        distributed.check_reduced_once(params.values())
        for name, param in params.items():
            sharded.check_replicas(param, name, process_group)
        reduction.check_alike(params, {"scale": float(scale), "nonfinite": nonfinite})
        reduction.choose(next(iter(params.values())).device)
    optimizers.watch(_is_covered, _why_pending, _end_windows)
    n_frozen = len(named) - len(params)
    attachment = _Attachment(
        params, float(scale), backend, fuse, root, n_frozen, nonfinite, reduction, fully_sharded
    )
    if reduction is not None:
        buffers = [] if root is None else root.buffers()
        reduction.broadcast([*named.values(), *buffers])
    if root is not None:
        attachment.follow(root)
    return Accumulator(attachment)


def _named(model_or_params) -> dict[str, Tensor]:
    if isinstance(model_or_params, torch.nn.Module):
        for name, param in model_or_params.named_parameters():
            if isinstance(param, torch.nn.parameter.UninitializedTensorMixin):
                raise ValueError(
                    f"attach: parameter {name} is uninitialised; run a forward pass first"
                )
        return dict(model_or_params.named_parameters())
    if isinstance(model_or_params, Tensor):
        model_or_params = [model_or_params]
    try:
        params: Sequence[Tensor] = list(model_or_params)
    except TypeError:
        raise TypeError(
            f"attach: expected a module or tensors, got {type(model_or_params).__name__}"
        ) from None
    unique: dict[int, tuple[str, Tensor]] = {}
    for index, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(
                f"attach: expected a module or tensors, as of model.parameters(), got "
                f"{type(param).__name__} at {index}"
            )
        if not (param.is_floating_point() or param.is_complex()):
            raise TypeError(
                f"attach: parameter {index} must be float16, bfloat16, float32 or float64, got "
                f"{param.dtype}"
            )
        unique.setdefault(id(param), (str(index), param))
    return dict(unique.values())
