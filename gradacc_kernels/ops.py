"""The kernels as torch ops: ``torch.ops.gradacc_kernels`` and these typed wrappers.

One formula on every backend, with s = float32(scale) * inv_scale, rounded once:

    add    main = fma(float(grad), s, main)
    store  main = float(grad) * s

Where s is 0 the gradient is not used, whatever it holds: adding leaves main's bits, storing writes
+0. The same inputs give the same bits on each run, and on each backend where ``grad`` is a tensor.
Two ops compute it on the way, as sums over tokens: the same bits on each run, within a bound on
each backend. Nothing here waits for the device. Each wrapper takes ``backend``: ``"auto"``,
``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"`` (see :mod:`gradacc_kernels.dispatch`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradacc_kernels import dispatch
from gradacc_kernels.checks import CHUNK_SIZE, num_chunks

__all__ = [
    "CHUNK_SIZE",
    "accumulate_",
    "embedding_accumulate_",
    "grad_stats",
    "multi_accumulate_",
    "num_chunks",
    "scale_",
    "wgrad_accumulate_",
]

_library = torch.library.Library("gradacc_kernels", "DEF")
_SCHEMAS = {
    "accumulate_": "(Tensor(a!) main_grad, Tensor grad, *, float scale=1.0, "
    "Tensor? inv_scale=None, bool store=False, Tensor(b!)? partials=None, "
    'str backend="auto") -> ()',
    "multi_accumulate_": "(Tensor(a!)[] main_grads, Tensor[] grads, *, float scale=1.0, "
    "Tensor? inv_scale=None, bool[] stores=[], Tensor(b!)[] partials, "
    'str backend="auto") -> ()',
    "grad_stats": "(Tensor[] tensors, bool are_partials, *, "
    'str backend="auto") -> (Tensor, Tensor, Tensor)',
    "scale_": '(Tensor(a!)[] main_grads, Tensor factor, *, str backend="auto") -> ()',
    "wgrad_accumulate_": "(Tensor(a!) main_grad, Tensor grad_output, Tensor input, *, "
    "float scale=1.0, Tensor? inv_scale=None, bool store=False, Tensor(b!)? partials=None, "
    'Tensor? offsets=None, str backend="auto") -> ()',
    "embedding_accumulate_": "(Tensor(a!) main_grad, Tensor grad_output, Tensor indices, *, "
    "int? padding_idx=None, float scale=1.0, Tensor? inv_scale=None, bool store=False, "
    'Tensor(b!)? partials=None, str backend="auto") -> ()',
}


def _backend(tensors, backend):
    first = tensors[0]
    # Another dtype than float64 is the backend's to refuse, by the name of the argument.
    dtype = first.dtype if first.dtype == torch.float64 else torch.float32
    return dispatch.module(dispatch.choose(first.device, dtype, backend))


def _accumulate_op(
    main_grad, grad, *, scale=1.0, inv_scale=None, store=False, partials=None, backend="auto"
):
    module = _backend([main_grad], backend)
    module.accumulate_(main_grad, grad, scale, inv_scale, store, partials)


def _multi_accumulate_op(
    main_grads, grads, *, scale=1.0, inv_scale=None, stores=(), partials=(), backend="auto"
):
    if not main_grads and not grads:
        return
    module = _backend(main_grads or grads, backend)
    module.multi_accumulate_(
        list(main_grads), list(grads), scale, inv_scale, list(stores), list(partials)
    )


def _grad_stats_op(tensors, are_partials, *, backend="auto"):
    if not tensors:
        name = "partials" if are_partials else "main_grads"
        raise ValueError(f"grad_stats: {name} must hold at least one tensor, got none")
    return _backend(tensors, backend).grad_stats(list(tensors), are_partials)


def _scale_op(main_grads, factor, *, backend="auto"):
    if main_grads:
        _backend(main_grads, backend).scale_(list(main_grads), factor)


def _wgrad_accumulate_op(
    main_grad,
    grad_output,
    input,
    *,
    scale=1.0,
    inv_scale=None,
    store=False,
    partials=None,
    offsets=None,
    backend="auto",
):
    module = _backend([main_grad], backend)
    module.wgrad_accumulate_(
        main_grad, grad_output, input, scale, inv_scale, store, partials, offsets
    )


def _embedding_accumulate_op(
    main_grad,
    grad_output,
    indices,
    *,
    padding_idx=None,
    scale=1.0,
    inv_scale=None,
    store=False,
    partials=None,
    backend="auto",
):
    module = _backend([main_grad], backend)
    module.embedding_accumulate_(
        main_grad, grad_output, indices, padding_idx, scale, inv_scale, store, partials
    )


def _check_devices(op, device, **arguments):
    """Refuses other devices: with one meta tensor among real ones, torch calls the fake alone."""
    for name, value in arguments.items():
        is_list = isinstance(value, (list, tuple))
        for i, tensor in enumerate(value if is_list else [value]):
            if tensor is not None and tensor.device != device:
                index = f"[{i}]" if is_list else ""
                raise ValueError(f"{op}: {name}{index} must be on {device}, got {tensor.device}")


def _accumulate_fake(main_grad, grad, *, inv_scale=None, partials=None, **_):
    _check_devices(
        "accumulate_", main_grad.device, grad=grad, inv_scale=inv_scale, partials=partials
    )


def _multi_accumulate_fake(main_grads, grads, *, inv_scale=None, partials=(), **_):
    if main_grads:
        _check_devices(
            "multi_accumulate_",
            main_grads[0].device,
            main_grads=main_grads,
            grads=grads,
            inv_scale=inv_scale,
            partials=partials,
        )


def _scale_fake(main_grads, factor, **_):
    if main_grads:
        _check_devices("scale_", main_grads[0].device, main_grads=main_grads, factor=factor)


def _wgrad_accumulate_fake(
    main_grad, grad_output, input, *, inv_scale=None, partials=None, offsets=None, **_
):
    _check_devices(
        "wgrad_accumulate_",
        main_grad.device,
        grad_output=grad_output,
        input=input,
        inv_scale=inv_scale,
        partials=partials,
        offsets=offsets,
    )


def _embedding_accumulate_fake(
    main_grad, grad_output, indices, *, inv_scale=None, partials=None, **_
):
    _check_devices(
        "embedding_accumulate_",
        main_grad.device,
        grad_output=grad_output,
        indices=indices,
        inv_scale=inv_scale,
        partials=partials,
    )


def _grad_stats_fake(tensors, are_partials, *, backend="auto"):
    name = "partials" if are_partials else "main_grads"
    _check_devices("grad_stats", tensors[0].device, **{name: tensors})
    first = tensors[0]
    scalar = first.new_empty(())
    return first.new_empty((len(tensors),)), scalar, first.new_empty((), dtype=torch.float32)


for _name, _function, _fake in (
    ("accumulate_", _accumulate_op, _accumulate_fake),
    ("multi_accumulate_", _multi_accumulate_op, _multi_accumulate_fake),
    ("grad_stats", _grad_stats_op, _grad_stats_fake),
    ("scale_", _scale_op, _scale_fake),
    ("wgrad_accumulate_", _wgrad_accumulate_op, _wgrad_accumulate_fake),
    ("embedding_accumulate_", _embedding_accumulate_op, _embedding_accumulate_fake),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Negative")  # the backends resolve it
    torch.library.register_fake(f"gradacc_kernels::{_name}", _fake, lib=_library)


def accumulate_(
    main_grad: Tensor,
    grad: Tensor,
    *,
    scale: float = 1.0,
    inv_scale: Tensor | None = None,
    store: bool = False,
    partials: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds a micro-batch gradient: main_grad = fma(float(grad), scale * inv_scale, main_grad).

    Where scale * inv_scale is 0 the gradient is not used, not even its NaNs.

    Moves 10 bytes per element with a 16-bit gradient (6 to store); an expanded, strided or sparse
    gradient is copied into main_grad's layout first.

    Args:
        main_grad: float32, any shape, dense in memory in any order of strides; written. The
            reference backend takes float64 too.
        grad: float16, bfloat16 or float32, of main_grad's shape and device; any layout.
        scale: a factor, finite in float32.
        inv_scale: float32 tensor of one element on the same device, a second factor; usually
            1 / loss_scale.
        store: write float(grad) * scale * inv_scale without reading main_grad.
        partials: float32 of shape [num_chunks(numel)]; written: the sum of squares of each chunk of
            the new main_grad, in memory order, NaN for a chunk with an element that is not finite.
        backend: which kernels; ``"auto"`` for the fastest that serves the device.

    Returns:
        main_grad.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes, devices, layouts or overlaps other than these, a scale that is not
            finite, an unknown backend. Nothing was written.
        RuntimeError: the backend is not available.
    """
    torch.ops.gradacc_kernels.accumulate_(
        main_grad,
        grad,
        scale=scale,
        inv_scale=inv_scale,
        store=store,
        partials=partials,
        backend=backend,
    )
    return main_grad


def multi_accumulate_(
    main_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    scale: float = 1.0,
    inv_scale: Tensor | None = None,
    stores: Sequence[bool] | None = None,
    partials: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Sequence[Tensor]:
    """Does :func:`accumulate_` for each pair of two lists, in as few launches as possible.

    Args:
        main_grads: float32 tensors of one device, of any sizes, that do not overlap; written.
        grads: one for each main gradient; dtypes and layouts may be mixed.
        scale: as in accumulate_, for all.
        inv_scale: as in accumulate_, for all.
        stores: one bool for each main gradient; None adds everywhere.
        partials: slots for each main gradient, written; None for no statistics.
        backend: as in accumulate_.

    Returns:
        main_grads.

    Raises:
        TypeError, ValueError, RuntimeError: as accumulate_, and for lists of different lengths.
    """
    torch.ops.gradacc_kernels.multi_accumulate_(
        list(main_grads),
        list(grads),
        scale=scale,
        inv_scale=inv_scale,
        stores=[] if stores is None else list(stores),
        partials=[] if partials is None else list(partials),
        backend=backend,
    )
    return main_grads


def grad_stats(
    main_grads: Sequence[Tensor] | None = None,
    *,
    partials: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes sum(main_i^2) for each tensor, the norm of them all, and whether one overflowed.

    From main gradients this reads 4 bytes per element; from the slots that accumulate_ wrote, 4
    bytes per chunk. Slots describe the main gradients only while nothing else has written to them.

    Args:
        main_grads: float32 tensors of one device (float64 on the reference backend).
        partials: in their place, the slots of each tensor, as accumulate_ wrote them.
        backend: as in accumulate_.

    Returns:
        (sums, norm, found_inf), device tensors. The sum of squares of each tensor, of shape [n];
        sqrt(sum(sums)), 0-dim; and a 0-dim float32 that is 1 when an element is not finite, else 0.
        Sums and norm are NaN then. A sum of finite squares that overflows float32 is inf, and
        leaves found_inf at 0.

    Raises:
        TypeError, ValueError: both or none of the lists, an empty list, other dtypes or devices.
    """
    if (main_grads is None) == (partials is None):
        got = "neither" if partials is None else "both"
        raise ValueError(f"grad_stats: pass either main_grads or partials, got {got}")
    tensors = main_grads if partials is None else partials
    return torch.ops.gradacc_kernels.grad_stats(
        list(tensors), partials is not None, backend=backend
    )


def scale_(
    main_grads: Sequence[Tensor], factor: Tensor, *, backend: str = "auto"
) -> Sequence[Tensor]:
    """Multiplies by a device scalar: main = main * factor, for a list of tensors.

    Moves 8 bytes per element, and none when the factor is 1, which is decided on the device.

    Args:
        main_grads: float32 tensors of one device that do not overlap; written.
        factor: float32 tensor of one element on that device.
        backend: as in accumulate_.

    Returns:
        main_grads.

    Raises:
        TypeError, ValueError, RuntimeError: as accumulate_.
    """
    torch.ops.gradacc_kernels.scale_(list(main_grads), factor, backend=backend)
    return main_grads


def wgrad_accumulate_(
    main_grad: Tensor,
    grad_output: Tensor,
    input: Tensor,
    *,
    scale: float = 1.0,
    inv_scale: Tensor | None = None,
    store: bool = False,
    partials: Tensor | None = None,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds a Linear's weight gradient: main += s * sum over t of grad_output[t, o] * input[t, i].

    One matrix product with a float32 result, s = scale * inv_scale, and no gradient in 16 bits on
    the way. Where s is 0 the product is not used, not even its NaNs. Moves 8 bytes per element of
    main_grad (4 to store) and reads the two operands.

    The products are summed in float32 in an order of each backend's own, the same on each run, so
    with T tokens an element lies within (T + 2) * 2^-23 * (sum of its terms' absolute values) of
    the exact sum.

    Args:
        main_grad: float32 of shape [O, I], or [E, O, I] for E weights, contiguous; written. The
            reference backend takes float64 too.
        grad_output: float16, bfloat16 or float32 of shape [..., O], any strides: the gradient of
            the Linear's output. [E, T, O] for E weights, or [T, O] where offsets are given.
        input: of grad_output's dtype and leading dimensions, [..., I]: what the Linear was given.
        scale: a factor, finite in float32.
        inv_scale: float32 tensor of one element on the same device, a second factor; usually
            1 / loss_scale.
        store: write the product over main_grad without reading it.
        partials: float32 of shape [num_chunks(numel)]; written: all slots together hold the sum of
            squares of the new main_grad, and one of them NaN when an element is not finite. Which
            slot holds which part is the backend's choice.
        offsets: int32 of shape [E], for tokens sorted by weight (as torch's grouped_mm has them):
            weight e takes the rows from offsets[e - 1], or 0, up to offsets[e]. Rows beyond the
            last offset belong to no weight; a weight without rows adds, or stores, zeros. Read on
            the device, with ends beyond T as T.
        backend: which kernels; ``"auto"`` for the fastest that serves the device.

    Returns:
        main_grad.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes, devices, layouts or overlaps other than these, a scale that is not
            finite, an unknown backend. Nothing was written.
        RuntimeError: the backend is not available.
    """
    torch.ops.gradacc_kernels.wgrad_accumulate_(
        main_grad,
        grad_output,
        input,
        scale=scale,
        inv_scale=inv_scale,
        store=store,
        partials=partials,
        offsets=offsets,
        backend=backend,
    )
    return main_grad


def embedding_accumulate_(
    main_grad: Tensor,
    grad_output: Tensor,
    indices: Tensor,
    *,
    padding_idx: int | None = None,
    scale: float = 1.0,
    inv_scale: Tensor | None = None,
    store: bool = False,
    partials: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Adds an embedding's gradient: main[v] += s * sum of grad_output[t] where indices[t] == v.

    Touches the rows that were looked up and no others: 8 bytes per element of such a row, and one
    read of grad_output. A store also writes zeros to all other rows. s = scale * inv_scale; where
    it is 0 the gradient is not used, not even its NaNs.

    The gradients of a row are summed in float32 in the order of their tokens, many of them in
    pieces; one fma adds the sum to the row. No atomics: the same bits on each run.

    Args:
        main_grad: float32 of shape [V, D], contiguous; written. The reference backend takes
            float64 too.
        grad_output: float16, bfloat16 or float32 of shape [*indices.shape, D], any strides: the
            gradient of the embedding's output.
        indices: int32 or int64 of any shape and strides: the rows that were looked up.
        padding_idx: a row whose tokens add nothing; negative ones count from the end.
        scale: a factor, finite in float32.
        inv_scale: float32 tensor of one element on the same device, a second factor; usually
            1 / loss_scale.
        store: write the sums over main_grad, and zeros where there are none.
        partials: float32 of shape [num_chunks(numel)], the slots of main_grad as accumulate_ has
            them. An add renews those with an element of a row that was looked up, and leaves the
            others, which must be right already; a store writes them all.
        backend: which kernels; ``"auto"`` for the fastest that serves the device.

    Returns:
        main_grad.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes, devices, layouts or overlaps other than these, a scale that is not
            finite, a padding_idx out of range, an unknown backend; on the CPU, and on the reference
            backend, an index out of range. Nothing was written. On a GPU such an index stops the
            kernel, an error that CUDA reports later and that ends the process's use of the device.
        RuntimeError: the backend is not available.
    """
    torch.ops.gradacc_kernels.embedding_accumulate_(
        main_grad,
        grad_output,
        indices,
        padding_idx=padding_idx,
        scale=scale,
        inv_scale=inv_scale,
        store=store,
        partials=partials,
        backend=backend,
    )
    return main_grad
