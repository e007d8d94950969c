"""DTensor parameters: what of them is on this rank, and what is summed over their mesh.

    main = fma(local(grad), s, main)          on each rank, of its shard
    sum over the mesh = sum over ranks of sums of squares, each shard once

A main gradient is that of the local shard, and ``.grad`` a DTensor over it with the placements of
the parameter. Nothing here imports DTensor: who has one has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Tells whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns the local tensor of a DTensor, over the same memory; other tensors as they are.

    The version counter of a DTensor is its own: it counts writes to the DTensor, but for those by
    ``torch._foreach_*``, and that of the local tensor counts none of either.
    """
    if not is_dtensor(tensor):
        return tensor
    value = tensor._local_tensor
    return value if type(value) is Tensor else _arrived(value)


def _arrived(value: Tensor) -> Tensor:
    """Waits for the result of a collective, on the current stream."""
    return value.wait() if hasattr(value, "wait") else value


def wrap(value: Tensor, param: Tensor) -> Tensor:
    """Returns a tensor as one of a parameter: a DTensor of its placements, where that is one.

    Args:
        value: in the shape of ``local(param)``, of any dtype; the DTensor has its memory.
        param: whose mesh, placements and shape.
    """
    if not is_dtensor(param):
        return value
    with torch.no_grad():
        return type(param.data).from_local(
            value,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )


def shard(tensor: Tensor, param: Tensor) -> Tensor:
    """Returns the part of a gradient that belongs to the local shard of a parameter.

    One of other placements is redistributed, which is a collective. Sums are made in float32, so
    that a 16-bit Partial is rounded once and not with each addition. A plain tensor, as torch lets
    one be assigned to the ``.grad`` of a DTensor, is taken for the whole gradient.

    Args:
        tensor: a gradient of a parameter, or what is in its ``.grad``.
        param: of the shape of the gradient.
    """
    value = local(tensor)
    if not is_dtensor(param):
        return value
    mesh, placements = param.device_mesh, param.placements
    if not is_dtensor(tensor):
        whole = [sys.modules["torch.distributed.tensor"].Replicate()] * mesh.ndim
        with torch.no_grad():
            tensor = type(param.data).from_local(tensor, mesh, whole, run_check=False)
    if tensor.placements == placements and tensor.device_mesh == mesh:
        return value
    with torch.no_grad():
        if any(placement.is_partial() for placement in tensor.placements):
            value = value.to(torch.promote_types(value.dtype, torch.float32))
        source = type(tensor.data).from_local(
            value,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return local(source.redistribute(mesh, placements))


def _sharded_dims(param: Tensor) -> tuple[int, ...]:
    """The dimensions of the mesh over which the elements of a DTensor are spread."""
    mesh, placements = param.device_mesh, param.placements
    return tuple(
        dim
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def sum_over_mesh(params: Sequence[Tensor], sums: Tensor) -> Tensor:
    """Adds what each rank has of its shards: sums[i] = sum over the ranks that share params[i] out.

    Ranks that hold the same elements are counted once, and plain tensors as they are. A collective:
    every rank of the meshes calls it with the same parameters in the same order. One all_reduce for
    each kind of mesh and sharded dimensions, and each of these dimensions. No host sync.

    Args:
        params: parameters, DTensors or not.
        sums: [n], a number for each, on their device.

    Returns:
        [n], the same on all ranks of a mesh; NaN where that of any rank is.
    """
    kinds: dict[tuple, list[int]] = {}
    for index, param in enumerate(params):
        dims = _sharded_dims(param) if is_dtensor(param) else ()
        if dims:
            kinds.setdefault((param.device_mesh, dims), []).append(index)
    if not kinds:
        return sums
    sums = sums.clone()
    for (mesh, dims), indices in kinds.items():
        is_whole = len(indices) == len(params)
        # One kind's indices, on the device without a wait: they are split off by slices.
        chosen = sums if is_whole else torch.stack([sums[index] for index in indices])
        for dim in dims:
            torch.distributed.all_reduce(chosen, group=mesh.get_group(dim))
        if not is_whole:
            for index, value in zip(indices, chosen.unbind(), strict=True):
                sums[index].copy_(value)
    return sums


def agree(params: Iterable[Tensor], verdict: Tensor) -> Tensor:
    """Returns the largest verdict of the ranks over whose meshes parameters are spread.

    A collective, where there are such parameters.

    Args:
        params: parameters, DTensors or not, in the same order on all ranks.
        verdict: 0-dim, on their device.
    """
    groups = {
        (param.device_mesh, dim): None
        for param in params
        if is_dtensor(param)
        for dim in _sharded_dims(param)
    }
    if not groups:
        return verdict
    verdict = verdict.clone()
    for mesh, dim in groups:
        torch.distributed.all_reduce(
            verdict, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim)
        )
    return verdict


def check_param(function: str, name: str, param: Tensor) -> None:
    """Raises where a parameter is a tensor subclass that cannot be accumulated into.

    Raises:
        TypeError: no DTensor over a plain tensor; one that is Partial.
    """
    kind = type(param.data)
    if kind is Tensor:
        return
    if not is_dtensor(param):
        raise TypeError(
            f"{function}: parameter {name} is a {kind.__name__}; of tensor subclasses only DTensor "
            "is supported"
        )
    inner = type(param._local_tensor)
    if inner is not Tensor:
        raise TypeError(
            f"{function}: parameter {name} is a DTensor over a {inner.__name__}; only those over "
            "plain tensors are supported"
        )
    if any(placement.is_partial() for placement in param.placements):
        raise TypeError(
            f"{function}: parameter {name} has the placements {param.placements}; one that is "
            "Partial has no elements of its own: redistribute it to Shard or Replicate first"
        )


def check_replicas(param: Tensor, name: str, process_group: Any) -> None:
    """Raises where a process group for data parallel has ranks with other shards of a parameter.

    Raises:
        ValueError: it has.
    """
    if not is_dtensor(param):
        return
    replicas = set(torch.distributed.get_process_group_ranks(process_group))
    for dim in _sharded_dims(param):
        shared = torch.distributed.get_process_group_ranks(param.device_mesh.get_group(dim))
        others = sorted(replicas.intersection(shared) - {torch.distributed.get_rank()})
        if others:
            raise ValueError(
                f"attach: process_group averages over ranks that hold the same parameters, but "
                f"rank {others[0]} of it holds another shard of {name}, whose placements are "
                f"{param.placements}: pass the group of the data-parallel dimension of the mesh, "
                "mesh.get_group('dp')"
            )
