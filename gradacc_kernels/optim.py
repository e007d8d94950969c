"""MasterParams: float32 masters of 16-bit parameters, stepped by any torch optimizer.

    master = step(master, grad),  param = round(master)

With the bits of a master as an int32, a bfloat16 parameter and what is left of its master are

    param = (bits + 0x8000) >> 16,  low = bits - (param << 16),  -0x8000 <= low <= 0x7fff

so that the two of them, 16 bits each, hold the master. That is rounding to nearest, ties away from
zero. Ties to even would not do: they give an even parameter 65537 masters, both ties among them,
and 16 bits tell 65536 apart. A float16 parameter is rounded by torch, ties to even.

Of every bfloat16 parameter a step moves, besides what its optimizer does, 38 bytes an element, 56
with low bits, in some launches for each bucket of parameters. The same inputs give the same bits.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradacc_kernels import buffer, sharded
from gradacc_kernels.hook import PARAM_DTYPES, is_of_one_rank
from gradacc_kernels.optimizers import HALVES
from gradacc_kernels.shards import shards_of

# Elements that are restored or rounded at once: 256 MiB of float32.
BUCKET_ELEMENTS = 64 << 20
MASTER, OWNED = "master", "owned"


class MasterParams(torch.optim.Optimizer):
    """Steps float32 masters of 16-bit parameters: param = round(step(master, float32(grad))).

    A torch optimizer over the model's own parameters: schedulers, GradScaler, clipping and
    ``zero_grad`` take it as they take the optimizer of ``optimizer_class``, which steps the masters
    inside. A float32 ``.grad``, as ``attach`` gives it, is handed on as it is; a 16-bit one is
    cast. A float32 or float64 parameter is its own master.

    A step reads masters and writes parameters: after you have changed parameters yourself (loaded
    weights into the model), call :meth:`refresh_masters`, or the next step undoes that.

    Args:
        params: floating-point parameters or groups of them, as for any optimizer.
        optimizer_class: a class of ``torch.optim.Optimizer``.
        low_bits: keep of the master of a bfloat16 parameter only the 16 bits that the parameter
            lacks: 2 bytes an element less, and the same values bit for bit. The optimizer is
            stepped once for each bucket of 64M elements, so it must step every parameter by itself:
            one that measures all of them together (LBFGS, Prodigy), keeps a reference to a
            parameter's memory, or moves parameters before it calls a closure, needs whole masters.
        zero: share the parameters out over the ranks of a process group: each has masters and
            optimizer state of its own ones alone, steps these, and sends them to the others. The
            same bits as without it, if gradients are the same on all ranks, as those are that
            ``attach(process_group=...)`` has reduced. The optimizer must step every parameter by
            itself. Every rank makes, steps, loads and switches it, or none.
        process_group: with zero, whose ranks; None for all.
        **options: of the optimizer: its learning rate and so on.

    Attributes:
        low_bits: as given.
        state: that of the optimizer inside. A parameter that was stepped has its ``"master"`` there
            too, which is empty with low bits; with zero, one of another rank has an empty entry.
        inner: the optimizer over the masters. Its groups and state are written from those of this
            one before a step, and read back after it. With zero, over those of this rank.

    Raises:
        TypeError: optimizer_class is no class of optimizers; params are no floating-point tensors,
            DTensors with low_bits or zero, or other tensor subclasses; process_group is none that
            this rank is in.
        ValueError: no params; params on the meta device; low_bits with float16 parameters; other
            params or optimizers on other ranks; process_group without zero.
        RuntimeError: zero without torch.distributed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: type[torch.optim.Optimizer],
        *,
        low_bits: bool = False,
        zero: bool = False,
        process_group: Any = None,
        **options: Any,
    ):
        is_class = isinstance(optimizer_class, type)
        if not is_class or not issubclass(optimizer_class, torch.optim.Optimizer):
            got = optimizer_class if is_class else type(optimizer_class)
            raise TypeError(
                f"MasterParams: expected a class of optimizers, got {'' if is_class else 'a '}"
                f"{got.__name__}; give the class and its options, as in "
                "MasterParams(params, torch.optim.AdamW, lr=1e-3)"
            )
        self.low_bits = low_bits
        self.inner: torch.optim.Optimizer | None = None
        self._masters: dict[Tensor, torch.nn.Parameter] = {}
        self._lows: dict[Tensor, Tensor] = {}
        self._shards = shards_of(zero, process_group)
        self._has_looked = False
        super().__init__(_listed(params), {})
        groups = self.param_groups
        if self._shards is not None:
            alike = {"optimizer_class": optimizer_class.__qualname__, "low_bits": low_bits}
            self._shards.share_out([group["params"] for group in groups], alike)
        self._make_masters(self._every_param())
        self.inner = optimizer_class(
            [{**group, "params": self._inner_params(group)} for group in groups], **options
        )
        self.defaults = self.inner.defaults
        self._pull()
        self._release(self._lows)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.inner, "_step_supports_amp_scaling", False)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the masters by the ``.grad`` of the parameters, which are then rounded from them.

        A parameter whose ``.grad`` is None is left alone.

        Args:
            closure: computes the loss and its gradients anew, as for the optimizer inside. With
                low bits or zero it is called once, before the step.

        Returns:
            What the optimizer inside, or where the closure was called before it the closure,
            returns.

        Raises:
            RuntimeError: a parameter was cast since its master was made.
        """
        loss = None
        if closure is not None and (self.low_bits or self._shards is not None):
            with torch.enable_grad():
                loss = closure()
            closure = None
        self._follow()
        self._warn_of_one_rank()
        self._push_state()
        try:
            with self._amp_attributes():
                result = self._step_buckets() if self.low_bits else self._step_masters(closure)
        finally:
            every = self._every_param(of_all_ranks=True)
            self._pull(param for param in every if param.grad is not None)
        self._exchange()
        return result if loss is None else loss

    def _warn_of_one_rank(self) -> None:
        if self._shards is None or self._has_looked:
            return
        self._has_looked = True
        params = list(self._every_param(of_all_ranks=True))
        if self._shards.world_size > 1 and any(map(is_of_one_rank, params)):
            warnings.warn(
                "MasterParams: with zero=True each parameter is stepped on one rank, and attach "
                "was called without process_group, so by the gradients of that rank alone, unless "
                "you average them: attach(model, process_group=torch.distributed.group.WORLD)",
                stacklevel=3,
            )

    def _step_masters(self, closure: Callable[[], Any] | None) -> Any:
        masters = self._masters

        def evaluate():
            # The optimizer may have moved its parameters, also those that have no gradient yet.
            self._write(masters)
            with torch.enable_grad():
                loss = closure()
            self._lend(masters)
            return loss

        self._push_groups()
        self._lend(masters)
        try:
            result = self.inner.step() if closure is None else self.inner.step(evaluate)
            self._write([param for param in masters if masters[param].grad is not None])
        finally:
            self._take_back(masters)
        return result

    def _step_buckets(self) -> None:
        stepped = [param for param in self._masters if param.grad is not None]
        self._call_on_buckets(self.inner.step, stepped)

    def _exchange(self) -> None:
        """With zero, gives every rank the parameters that the others have stepped."""
        if self._shards is not None:
            self._shards.exchange()

    def _call_on_buckets(self, method: Callable[[], Any], params: Iterable[Tensor]) -> None:
        """Calls a method of the optimizer inside on masters from low bits, bucket by bucket."""
        own_masters = {param for param in self._every_param() if param not in self._masters}
        buckets = _buckets(params)
        if own_masters or not buckets:
            self._push_groups(own_masters)
            method()
        for bucket in buckets:
            # Every bucket starts from the same hyper-parameters, so that an optimizer that counts
            # its steps in them counts one.
            self._push_groups(set(bucket))
            self._call_on_bucket(method, bucket)

    def _call_on_bucket(self, method: Callable[[], Any], params: list[Tensor]) -> None:
        masters = [self._masters[param] for param in params]
        lows = [self._lows[param] for param in params]
        flat, views = _join(params, lows)
        for master, view in zip(masters, views, strict=True):
            master.data = view
        self._lend(params)
        try:
            method()
            for master, view in zip(masters, views, strict=True):
                if master.data_ptr() != view.data_ptr():  # `p.data = ...` instead of a write
                    view.copy_(master.data)
            _split(flat, views, params, lows)
        finally:
            self._take_back(params)
            self._release(params)

    def train(self) -> None:
        """Has the parameters be those that a schedule-free optimizer steps, rounded.

        Nothing happens where the optimizer inside has no such method.
        """
        self._switch("train", True)

    def eval(self) -> None:
        """Has the parameters be the average that a schedule-free optimizer keeps, rounded.

        Nothing happens where the optimizer inside has no such method.
        """
        self._switch("eval", False)

    def _switch(self, name: str, train_mode: bool) -> None:
        method = getattr(self.inner, name, None)
        # Trainers call train() before every micro-batch: where the groups tell that nothing would
        # change, no master is touched.
        modes = {group.get("train_mode") for group in self.param_groups}
        if method is None or modes == {train_mode}:
            return
        self._follow()
        self._push_state()
        try:
            if self.low_bits:
                self._call_on_buckets(method, self._masters)
            else:
                self._push_groups()
                method()
                self._write(self._masters)
        finally:
            self._pull()
        self._exchange()

    def refresh_masters(self) -> None:
        """Makes every master its parameter's value as it is now: master = float32(param).

        For after weights were loaded into the model, or parameters changed by anything but a step.
        What the optimizer has in its state stays.
        """
        self._follow()
        self._refresh(self._masters)

    @torch.no_grad()
    def _refresh(self, params: Iterable[Tensor]) -> None:
        for bucket in _buckets(params):
            if self.low_bits:
                torch._foreach_zero_([self._lows[param] for param in bucket])
            else:
                masters = [sharded.local(self._masters[param]) for param in bucket]
                torch._foreach_copy_(masters, [sharded.local(param.detach()) for param in bucket])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, and makes its masters.

        Args:
            param_group: a dict with ``params``, and options of the optimizer for them.

        Raises:
            TypeError, ValueError: as the constructor and the optimizer inside; nothing was changed.
        """
        if self.inner is not None:  # else the constructor makes it with all groups
            self._push_groups()
            self._push_state()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                _check(param, self.low_bits, self._shards is not None)
            if self.inner is None:
                return
            if self._shards is not None:
                self._shards.share_out([group["params"]], {})
            self._make_masters(group["params"])
            self.inner.add_param_group({**group, "params": self._inner_params(group)})
        except Exception:
            self.param_groups.pop()
            if self._shards is not None:
                self._shards.take_back(group["params"])
            for param in group["params"]:
                self._masters.pop(param, None)
                self._lows.pop(param, None)
            raise
        self._pull()
        self._release(param for param in group["params"] if param in self._lows)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, in the layout of the optimizer inside.

        Each state entry of a 16-bit parameter holds one tensor more, ``"master"``, whole also with
        low bits. The plain optimizer loads it too; of a parameter that was not yet stepped the
        entry has only the master, which the Adam family of torch then takes for its own state:
        save after the first step where that matters.

        With zero it is the part of this rank: the entries of others are empty, and ``"owned"``
        lists the parameters whose entries are here. torch.distributed.checkpoint puts the parts
        together, as docs/semantics.md shows.
        """
        self._follow()
        state = defaultdict(dict, self.state)
        for param, master in self._masters.items():
            if self.low_bits:
                _, (value,) = _join([param], [self._lows[param]])
            else:
                value = master.detach()
            state[param] = {**state.get(param, {}), MASTER: value}
        params = list(self._every_param(of_all_ranks=True))
        for param in params:
            if not self._is_mine(param):
                state[param] = {}
        own, self.state = self.state, state
        try:
            state_dict = super().state_dict()
        finally:
            self.state = own
        if self._shards is not None:
            state_dict[OWNED] = [i for i, param in enumerate(params) if self._is_mine(param)]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, with or without low bits, or a plain optimizer's.

        The masters of the state are loaded, and the parameters become them, rounded. Where it has
        none, the parameters as they are now become the masters: load the model first. With zero
        each rank takes what it owns, of its part or of a whole state.

        Args:
            state_dict: of the same groups of parameters, on any device.

        Raises:
            ValueError: no state of an optimizer, or of other groups or shapes; nothing was changed.
        """
        _check_layout(state_dict)
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = self._masters_in(state_dict)
        self._follow()
        self.inner.load_state_dict(self._of_inner(state_dict))
        self.state.clear()
        self._pull(() if self._shards is None else self._every_param(of_all_ranks=True))
        self._refresh([param for param in self._masters if param not in loaded])
        self._load_masters(loaded)
        self._exchange()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _of_inner(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What the optimizer inside has of a state: no masters, and nothing of other ranks."""
        state, groups = {}, []
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            pairs = zip(saved["params"], group["params"], strict=True)
            kept = [index for index, param in pairs if self._is_mine(param)]
            groups.append({**saved, "params": kept})
        others = set(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        others.difference_update(chain.from_iterable(group["params"] for group in groups))
        for key, entry in state_dict["state"].items():
            entry = _without_master(entry)
            if entry != {} and key not in others:
                state[key] = entry
        return {**state_dict, "state": state, "param_groups": groups}

    @torch.no_grad()
    def _load_masters(self, loaded: Mapping[Tensor, Tensor]) -> None:
        for param, value in loaded.items():
            if param not in self._masters:
                param.copy_(value)
            elif self.low_bits:
                flat, views = buffer.lay_out([param], torch.float32)
                views[0].copy_(value)
                _split(flat, views, [param], [self._lows[param]])
            else:
                self._masters[param].copy_(value)
        if not self.low_bits:
            self._write([param for param in loaded if param in self._masters])

    def _masters_in(self, state_dict: Mapping[str, Any]) -> dict[Tensor, Tensor]:
        """The masters of a state by parameter; raises where it is of other groups or shapes."""
        saved = [list(group["params"]) for group in state_dict["param_groups"]]
        groups = [group["params"] for group in self.param_groups]
        expected, got = list(map(len, groups)), list(map(len, saved))
        if expected != got:
            raise ValueError(
                f"load_state_dict: expected groups of {expected} parameters, got {got}: make the "
                "optimizer with the groups of the one that was saved"
            )
        masters, owned = {}, state_dict.get(OWNED)
        for index, param in zip(chain(*saved), chain(*groups), strict=True):
            if not self._is_mine(param):
                continue
            if owned is not None and index not in owned:
                raise ValueError(
                    f"load_state_dict: the state is one rank's part of a sharded one, and lacks "
                    f"parameter {index}: save and load all parts by torch.distributed.checkpoint"
                )
            entry = state_dict["state"].get(index, {})
            if not isinstance(entry, Mapping) or MASTER not in entry:
                continue
            value = entry[MASTER]
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if shape != list(param.shape):
                raise ValueError(
                    f"load_state_dict: expected a master of shape {list(param.shape)} for "
                    f"parameter {index}, got {shape}: the state is of another model"
                )
            masters[param] = value
        return masters

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles hold: the plain optimizer's, and the masters.

        Raises:
            TypeError: with zero, whose process group has no copy.
        """
        if self._shards is not None:
            raise TypeError(
                "MasterParams: with zero=True it cannot be copied or pickled, for a process group "
                "cannot; make another, and load the state_dict() of this one"
            )
        return {
            **super().__getstate__(),
            "inner": self.inner,
            "low_bits": self.low_bits,
            "_masters": self._masters,
            "_lows": self._lows,
            "_shards": None,
        }

    def _is_mine(self, param: Tensor) -> bool:
        """Whether this rank steps a parameter."""
        return self._shards is None or self._shards.owns(param)

    def _every_param(self, of_all_ranks: bool = False) -> Iterator[Tensor]:
        """The parameters that this rank steps, or all, in the order of their groups."""
        every = chain.from_iterable(group["params"] for group in self.param_groups)
        return every if of_all_ranks else filter(self._is_mine, every)

    def _make_masters(self, params: Iterable[Tensor]) -> None:
        for param in params:
            if param.dtype not in HALVES or param in self._masters or not self._is_mine(param):
                continue
            self._masters[param] = torch.nn.Parameter(param.detach().float())
            if self.low_bits:
                # As long as the parameter's view in a flat tensor is with its gap.
                length = buffer.padded(param.numel(), torch.float32)
                self._lows[param] = torch.zeros(length, dtype=torch.int16, device=param.device)

    def _release(self, params: Iterable[Tensor]) -> None:
        """Frees the memory of masters; the objects stay, for they are keys of the state."""
        for param in params:
            master = self._masters[param]
            master.data = torch.empty(0, dtype=master.dtype, device=master.device)

    def _follow(self) -> None:
        """Moves masters to where their parameters are now."""
        for param in self._every_param():
            master, low = self._masters.get(param), self._lows.get(param)
            is_half = param.dtype in HALVES
            if is_half != (master is not None) or (low is not None and param.dtype != HALVES[1]):
                raise RuntimeError(
                    f"MasterParams: a parameter of shape {list(param.shape)} was cast to "
                    f"{param.dtype} since the optimizer was made; make it after the cast"
                )
            if master is not None and master.device != param.device:
                master.data = master.data.to(param.device)
                if low is not None:
                    self._lows[param] = low.to(param.device)

    def _lend(self, params: Iterable[Tensor]) -> None:
        """Gives masters the gradients of their parameters: the same tensor where it is float32."""
        for param in params:
            grad = param.grad
            if grad is not None and grad.dtype != torch.float32:
                grad = grad.detach().float()
            self._masters[param].grad = grad

    def _take_back(self, params: Iterable[Tensor]) -> None:
        for param in params:
            self._masters[param].grad = None

    @torch.no_grad()
    def _write(self, params: Iterable[Tensor]) -> None:
        """Rounds whole masters to their parameters."""
        for bucket in _buckets(params):
            masters = [sharded.local(self._masters[param]) for param in bucket]
            values = [sharded.local(param.detach()) for param in bucket]
            if bucket[0].dtype == torch.float16:
                torch._foreach_copy_(values, masters)
            else:
                flat, views = buffer.lay_out(values, torch.float32)
                torch._foreach_copy_(views, masters)
                _split(flat, views, values)
            # A write to what is local moves no version counter of a DTensor.
            torch.autograd.graph.increment_version(list(filter(sharded.is_dtensor, bucket)))

    @contextlib.contextmanager
    def _amp_attributes(self) -> Iterator[None]:
        """Hands on what GradScaler leaves on an optimizer that scales by itself."""
        names = [name for name in ("grad_scale", "found_inf") if hasattr(self, name)]
        for name in names:
            setattr(self.inner, name, getattr(self, name))
        try:
            yield
        finally:
            for name in names:
                delattr(self.inner, name)

    def _inner_params(self, group: dict[str, Any]) -> list[Tensor]:
        mine = filter(self._is_mine, group["params"])
        return [self._masters.get(param, param) for param in mine]

    def _push_groups(self, only: Collection[Tensor] | None = None) -> None:
        """Writes the groups of the optimizer inside: all of their parameters, or some."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            params = [param for param in group["params"] if only is None or param in only]
            inner.clear()
            inner.update({**group, "params": self._inner_params({"params": params})})

    def _push_state(self) -> None:
        self.inner.state.clear()
        for key, entry in self.state.items():
            if key in self._masters:
                entry.pop(MASTER, None)
            if entry != {}:  # else the optimizer inside has none, or it is another rank's
                self.inner.state[self._masters.get(key, key)] = entry

    def _pull(self, stepped: Iterable[Tensor] = ()) -> None:
        """Reads hyper-parameters and state back; the entries of the state are shared.

        A parameter that was stepped has an entry from then on, also where the optimizer inside or
        this rank keeps none: torch.distributed.checkpoint steps an optimizer that has no entries,
        and refuses the parameters that have none.
        """
        known = [*self.state, *stepped]  # read before the groups are cleared
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            params = group["params"]
            group.clear()
            group.update({**inner, "params": params})
            inner["params"] = self._inner_params(group)
        params = {master: param for param, master in self._masters.items()}
        self.state.clear()
        for key, entry in self.inner.state.items():
            self.state[params.get(key, key)] = entry
        for param in known:
            self.state.setdefault(param, {})
        for param, master in self._masters.items():
            if param in self.state:
                self.state[param][MASTER] = master


@torch.no_grad()
def _join(params: Sequence[Tensor], lows: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns the masters of bfloat16 parameters: a flat float32 tensor and its views."""
    flat, views = buffer.lay_out(params, torch.float32)
    halves = [param.detach().view(torch.int16) for param in params]
    torch._foreach_copy_([view.view(torch.int32) for view in views], halves)
    bits = flat.view(torch.int32)
    torch.add(torch.cat(list(lows)), bits, alpha=1 << 16, out=bits)
    return flat, views


@torch.no_grad()
def _split(
    flat: Tensor, views: Sequence[Tensor], params: Sequence[Tensor], lows: Sequence[Tensor] = ()
) -> None:
    """Writes masters to bfloat16 parameters and, where given, low bits; flat is used up.

    Args:
        flat: float32, the masters.
        views: the master of each parameter, in flat.
        params: of one device.
        lows: int16, of each parameter.
    """
    # Of a NaN with other bits the sum below could be an infinity or, wrapped around, a zero.
    flat.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)
    bits = flat.view(torch.int32)
    if lows:
        # The conversion keeps the last 16 bits, whose sign is that of what rounding took away.
        torch._foreach_copy_(list(lows), list(bits.split([low.numel() for low in lows])))
    bits.add_(0x8000).bitwise_right_shift_(16)
    halves = [param.detach().view(torch.int16) for param in params]
    torch._foreach_copy_(halves, [view.view(torch.int32) for view in views])


def _buckets(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters of one device and dtype each, of at most BUCKET_ELEMENTS if not of one alone."""
    buckets: list[list[Tensor]] = []
    filling: dict[tuple, tuple[list[Tensor], int]] = {}
    for param in params:
        kind = (param.device, param.dtype)
        bucket, size = filling.get(kind, ([], 0))
        if bucket and size + param.numel() > BUCKET_ELEMENTS:
            bucket, size = [], 0
        if not bucket:
            buckets.append(bucket)
        bucket.append(param)
        filling[kind] = bucket, size + param.numel()
    return buckets


def _listed(params: Iterable[Any]) -> list[Any]:
    if isinstance(params, (torch.nn.Module, Tensor, str)) or not isinstance(params, Iterable):
        raise TypeError(
            "MasterParams: expected parameters or groups of them, as of model.parameters(), got "
            f"{type(params).__name__}"
        )
    params = list(params)
    if not params:
        raise ValueError("MasterParams: got no parameters: an empty model, or a used-up iterator")
    return params


def _check(param: Tensor, low_bits: bool, zero: bool) -> None:
    what = f"MasterParams: a parameter of shape {list(param.shape)}"
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"{what} must be float16, bfloat16, float32 or float64, got {param.dtype}")
    if param.device.type == "meta":
        raise ValueError(
            f"{what} is on the meta device; materialise the model first, with to_empty() or "
            "load_state_dict(assign=True)"
        )
    option = "zero" if zero else "low_bits" if low_bits and param.dtype in HALVES else None
    if option is not None and sharded.is_dtensor(param):
        raise TypeError(f"{what} is a DTensor, which {option} does not take: leave {option} out")
    if param.dtype in HALVES:
        sharded.check_param("MasterParams", f"of shape {list(param.shape)}", param)
    if low_bits and param.dtype == torch.float16:
        raise ValueError(
            f"{what} is float16, and low_bits is for bfloat16, whose bits are the upper half of a "
            "float32; leave low_bits out"
        )


def _check_layout(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "load_state_dict: expected what state_dict() of an optimizer returned, with state and "
            f"param_groups, got {type(state_dict).__name__}"
        )


def _without_master(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    return {key: value for key, value in entry.items() if key != MASTER}
