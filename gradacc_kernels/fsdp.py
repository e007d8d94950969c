"""FSDP2: our kernels sum the gradients of whole parameters, fully_shard reduces and shards them.

    whole.grad    = sum over micro-batches of s * grad         in float32, until FSDP2 takes it
    sharded.grad += mean of that over the ranks, of one shard  by FSDP2, in float32

Outside of ``set_requires_gradient_sync(False)`` FSDP2 takes it in every backward, module by module,
so that no more than 4 bytes an element of one module are held beside the shards. Inside of it all
of them are held, 4 bytes an element of the model, and nothing is sent.

The object that stands for a whole parameter lives as long as the module; only its memory comes and
goes. FSDP2 has no public name for it, nor for the dtypes in which it reduces.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradacc_kernels import checks, sharded
from gradacc_kernels.python_hook import Measured, as_main

KNOWN_TO_WORK = "2.10 to 2.13"
WAITING = (
    "the last backward was under set_requires_gradient_sync(False), so what was summed is not in "
    ".grad yet: run the last backward of a window with set_requires_gradient_sync(True)"
)
PRIVATE = {
    "group": ("fsdp_params", "mp_policy", "mesh_info", "_orig_dtype", "_reduce_dtype"),
    "parameter": ("sharded_param", "_unsharded_param", "orig_dtype", "reduce_dtype"),
}


class FullySharded:
    """The parameters that fully_shard has sharded in a module, and what attach changes of them.

    Args:
        root: a module with FSDP2 modules in it; its parameters are sharded when this returns.

    Attributes:
        whole_of: the whole parameter of each sharded one.

    Raises:
        RuntimeError: FSDP2's private attributes are not those that this was written for.
    """

    def __init__(self, root: torch.nn.Module):
        self._modules = modules_of(root)
        for module in self._modules:
            if any(param.is_meta for param in module.parameters(recurse=False)):
                raise ValueError(
                    "attach: parameters that are sharded by fully_shard are on the meta device: "
                    "materialise them first, with to_empty() or load_state_dict(assign=True)"
                )
        for module in self._modules:
            module.unshard()  # makes the whole parameters
            module.reshard()
        groups = [group for module in self._modules for group in _groups_of(module)]
        self._groups = list(dict.fromkeys(groups))  # modules that were sharded together share one
        self._members = [member for group in self._groups for member in group.fsdp_params]
        _check("group", self._groups)
        _check("parameter", self._members)
        self._objects = [(m, m.sharded_param, m._unsharded_param) for m in self._members]
        self.whole_of = WeakTensorKeyDictionary({shard: whole for _, shard, whole in self._objects})
        self._before: list[tuple[Any, str, Any]] = []
        self._handles: list[Any] = []

    @property
    def process_groups(self) -> list[dist.ProcessGroup]:
        """Over which FSDP2 averages, one after the other."""
        info = self._groups[0].mesh_info
        names = ("shard_process_group", "replicate_process_group")
        return [group for group in (getattr(info, name, None) for name in names) if group]

    @property
    def world_size(self) -> int:
        """Over how many ranks FSDP2 averages."""
        return math.prod(map(dist.get_world_size, self.process_groups))

    def install(self) -> None:
        """Has FSDP2 keep float32 gradients, in sums and in shards."""
        for group in self._groups:
            self._remember(group, "_orig_dtype", "_reduce_dtype")
        for member in self._members:
            self._remember(member, "reduce_dtype")
            member._unsharded_param.grad_dtype = None
        # unshard() and the first forward set them anew.
        self._handles = [m.register_forward_pre_hook(_keep_float32) for m in self._modules]
        for module in self._modules:
            _keep_float32(module)

    def _remember(self, owner: Any, *names: str) -> None:
        self._before += [(owner, name, getattr(owner, name)) for name in names]

    def remove(self) -> None:
        """Gives FSDP2 back what it had, and sums that wait to be reduced in the dtype it takes."""
        for handle in self._handles:
            handle.remove()
        for owner, name, value in self._before:
            setattr(owner, name, value)
        for member in self._members:
            whole = member._unsharded_param
            grad, whole.grad = whole.grad, None
            whole.grad_dtype = whole.dtype
            if grad is None:
                continue
            if member.reduce_dtype is None:
                whole.grad = grad.to(whole.dtype)
            else:
                member.unsharded_accumulated_grad = grad.to(member.reduce_dtype)

    def check_objects(self) -> None:
        """Raises where FSDP2 has other objects by now.

        Raises:
            RuntimeError: it has.
        """
        for member, shard, whole in self._objects:
            if member.sharded_param is not shard or member._unsharded_param is not whole:
                raise RuntimeError(
                    "gradacc_kernels: a parameter that fully_shard has sharded was replaced after "
                    "attach, as by load_state_dict(assign=True): detach and attach again"
                )

    def average(self, value: Tensor) -> None:
        """Replaces a tensor by its mean over the ranks.

        Raises:
            RuntimeError: FSDP2 was told to divide by something else.
        """
        if any(getattr(group, "gradient_divide_factor", None) for group in self._groups):
            raise RuntimeError(
                "micro_batch: FSDP2 averages gradients over the ranks, which a window with weights "
                "relies on; leave set_gradient_divide_factor() out"
            )
        for process_group in self.process_groups:
            dist.all_reduce(value, group=process_group)
            value /= dist.get_world_size(process_group)


class WholeStorage:
    """In place of a FlatBuffer: main gradients that live no longer than ``.grad``.

    Attributes:
        flat: empty.
        views: of no memory, in the shapes of whole parameters.
        slots: statistics slots, which kernels write and nobody reads.
        nbytes: that are held all the time.
    """

    def __init__(self, params: Iterable[Tensor]):
        params = list(params)
        self.views = [torch.empty(p.shape, dtype=torch.float32, device="meta") for p in params]
        counts = [checks.num_chunks(param.numel()) for param in params]
        self.partials = torch.zeros(sum(counts), dtype=torch.float32, device=params[0].device)
        self.flat = self.partials.new_empty(0)
        self.slots = list(self.partials.split(counts))
        self.nbytes = self.partials.nbytes


class ShardedHooks:
    """The hooks of whole parameters, with a view on the gradients of the sharded ones.

    What is not here is a method of the former; indices are the same.

    Args:
        whole: the hooks.
        params: the sharded parameters.
        wholes: the whole ones.
        backend: the module whose ops measure and scale.
    """

    def __init__(self, whole: Any, params: list[Tensor], wholes: list[Tensor], backend: ModuleType):
        self.whole = whole
        self._params = params
        self._wholes = wholes
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        """Returns what the hooks of the whole parameters have."""
        return getattr(self.whole, name)

    def is_waiting(self, index: int) -> bool:
        """Tells whether micro-batches of a parameter wait for FSDP2 to reduce them."""
        return self._wholes[index].grad is not None

    def is_reduced(self) -> bool:
        """Tells whether no micro-batch waits for FSDP2 to reduce it."""
        return not any(map(self.is_waiting, range(len(self._wholes))))

    def check_reduced(self) -> None:
        """Raises where micro-batches wait."""
        if not self.is_reduced():
            raise RuntimeError(f"gradacc_kernels: {WAITING}")

    @torch.no_grad()
    def measure(self, from_slots: bool, indices: Iterable[int] | None) -> list[Measured]:
        """Measures this rank's shards: see GradHooks.measure. There are no slots of them."""
        self.check_reduced()
        values = {}
        for index in range(len(self._params)) if indices is None else indices:
            grad = self._params[index].grad
            if grad is not None:
                values[index] = as_main(sharded.local(grad), torch.float32)
        if not values:
            return []
        return [Measured(list(values), *self._backend.grad_stats(list(values.values()), False))]

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiplies every ``.grad``: grad = grad * factor, a 0-dim tensor of the device."""
        mains = []
        for param in self._params:
            if param.grad is None:
                continue
            grad = sharded.local(param.grad)
            if as_main(grad, torch.float32) is grad:
                mains.append(grad)
            else:
                grad.mul_(factor)
        self._backend.scale_(mains, factor.float())

    def current(self, index: int) -> Tensor | None:
        """Returns this rank's shard of what a window has summed and reduced."""
        grad = self._params[index].grad
        return None if grad is None else sharded.local(grad)

    def expose(self, index: int) -> None:
        """Nothing: ``.grad`` is what FSDP2 makes it."""

    def invalidate(self) -> None:
        """Nothing: there are no slots of shards."""

    def main_grad(self, index: int) -> Tensor | None:
        """Returns ``.grad``."""
        return self._params[index].grad

    def load(self, index: int, total: Tensor | None, micro_batches: int, backwards: int) -> None:
        """Makes a window one that has summed this shard, or None, in so many of its backwards."""
        param = self._params[index]
        self.whole.load(index, None, micro_batches, backwards)
        param.grad = None
        if total is not None:
            param.grad = sharded.wrap(total.to(sharded.local(param).device, copy=True), param)

    def left_over(self) -> int:
        """Returns -1: no counter of a DTensor tells whether zero_grad() has written to it."""
        return -1


def modules_of(root: torch.nn.Module | None) -> list[torch.nn.Module]:
    """Returns the modules that fully_shard was called on, without an import where there is none."""
    library = sys.modules.get("torch.distributed.fsdp")
    if root is None or library is None or not hasattr(library, "FSDPModule"):
        return []
    return [module for module in root.modules() if isinstance(module, library.FSDPModule)]


def _keep_float32(module: Any, *_) -> None:
    for group in _groups_of(module):
        group._orig_dtype = torch.float32  # of the shards' gradients
        # In which they travel: a policy's param_dtype alone does not ask for 16 bits.
        group._reduce_dtype = group.mp_policy.reduce_dtype
        for member in group.fsdp_params:
            member.reduce_dtype = None  # of sums over micro-batches: they stay as they are


def fully_sharded_of(
    root: torch.nn.Module | None, params: dict[str, Tensor], is_reduced: bool, nonfinite: str
) -> FullySharded | None:
    """Returns what fully_shard has sharded in a module; None where it has not.

    Raises:
        TypeError, ValueError, RuntimeError: as attach; nothing was changed.
    """
    _check_within(root, params)
    if not modules_of(root):
        return None
    if is_reduced:
        raise ValueError(
            "attach: fully_shard reduces the gradients of this module over the ranks by itself: "
            "leave process_group out"
        )
    if nonfinite not in ("skip_window", "ignore"):
        raise ValueError(
            f"attach: nonfinite={nonfinite!r} looks at the gradients of each micro-batch, which "
            "fully_shard has reduced and sharded by then: use 'skip_window' or 'ignore'"
        )
    found = FullySharded(root)
    for name, param in params.items():
        whole = found.whole_of.get(param)
        if whole is None:
            continue
        if type(whole.data) is not Tensor:
            raise TypeError(
                f"attach: fully_shard makes a {type(whole.data).__name__} of parameter {name}; "
                "expected a plain tensor, which tensor parallel and float8 extensions do not give"
            )
        if param.dtype == torch.float64:
            raise TypeError(f"attach: parameter {name} is float64, which fully_shard sums itself")
        if sharded.local(param).device != whole.device:
            raise ValueError(
                f"attach: parameter {name} is sharded on {sharded.local(param).device} and whole "
                f"on {whole.device}: CPUOffloadPolicy is not supported"
            )
    return found


def _check_within(root: torch.nn.Module | None, params: dict[str, Tensor]) -> None:
    """Raises where fully_shard has sharded parameters in a module that is not in the root.

    Their gradients come to whole parameters of that module, and never to the hooks of shards.

    Raises:
        ValueError: it has.
    """
    library = sys.modules.get("torch.distributed._composable_state")
    inside = modules_of(root)
    known = {group for module in inside for group in _groups_of(module)}
    for module in set(getattr(library, "_module_state_mapping", ())).difference(inside):
        if not hasattr(module, "_get_fsdp_state"):
            continue
        members = (m for g in _groups_of(module) if g not in known for m in g.fsdp_params)
        shards = {id(member.sharded_param) for member in members}
        name = next((name for name, param in params.items() if id(param) in shards), None)
        if name is not None:
            raise ValueError(
                f"attach: parameter {name} is sharded by fully_shard, which was called on a "
                f"{type(module).__name__} that is not in what is to be attached: pass that module, "
                "or one around it"
            )


def _groups_of(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # torch 2.12
        return list(state._fsdp_param_groups)
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]


def _check(kind: str, owners: list[Any]) -> None:
    missing = [name for name in PRIVATE[kind] if not all(hasattr(o, name) for o in owners)]
    if missing or not owners:
        raise RuntimeError(
            f"attach: a {kind} of this torch's fully_shard has no {', '.join(missing) or 'entry'}, "
            f"so it is not the FSDP2 that this was written for; torch {KNOWN_TO_WORK} are known to "
            f"work, this is {torch.__version__}"
        )
