"""The specification: every op in eager torch, for any device that has float64.

Other backends give the same main gradients, bit for bit, but for the two ops that sum over tokens,
which this one does in float64. ``reference`` alone also accumulates into float64 main gradients, in
float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradacc_kernels import checks

MAIN_DTYPES = (torch.float32, torch.float64)


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Computes x * y + z on float32 tensors with one rounding, as the hardware's fma does.

    The product is exact in float64. The sum is not: it is rounded to odd there, which keeps enough
    of what it loses for the rounding to float32 to come out right (Boldo and Melquiond, "Emulation
    of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    product = x.double() * y.double()
    z = z.double()
    total = product + z
    z_part = total - product
    lost = (product - (total - z_part)) + (z - z_part)
    bits = total.view(torch.int64)
    toward_lost = torch.where((lost > 0) == (total > 0), bits + 1, bits - 1)
    is_inexact = (lost != 0) & total.isfinite()
    return torch.where(is_inexact & (bits % 2 == 0), toward_lost, bits).view(torch.float64).float()


def in_layout_of(grad: Tensor, main: Tensor) -> Tensor:
    """Returns ``grad`` as a strided tensor with main's strides, copied where it has others.

    A sparse gradient becomes float32 before its duplicate indices are summed.
    """
    if grad.layout != torch.strided:
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)).to_dense()
    if grad.stride() == main.stride() and not grad._is_zerotensor():
        return grad.resolve_neg()
    return torch.empty_strided(
        main.shape, main.stride(), dtype=grad.dtype, device=grad.device
    ).copy_(grad)


def in_memory_order(main: Tensor) -> Tensor:
    """Returns the elements of a dense tensor as a 1-D view, in the order of their addresses."""
    return main.as_strided((main.numel(),), (1,))


def square_sums(main: Tensor) -> Tensor:
    """Returns the sum of squares of each chunk, NaN where an element is not finite."""
    flat = in_memory_order(main)
    chunks = checks.num_chunks(flat.numel())
    padded = torch.nn.functional.pad(flat, (0, chunks * checks.CHUNK_SIZE - flat.numel()))
    padded = padded.view(chunks, checks.CHUNK_SIZE)
    return (padded.square().sum(1)).where(padded.isfinite().all(1), torch.nan)


def _factor(main, scale, inv_scale):
    s = torch.full((), scale, dtype=main.dtype, device=main.device)
    return s if inv_scale is None else s * inv_scale.reshape(())


def _new_main(main, grad, s, store):
    """Computes fma(grad, s, main), or grad * s; where s is 0 the gradient is not used."""
    if store:
        return (grad * s).masked_fill(s == 0, 0.0)
    total = main + grad * s if main.dtype == torch.float64 else fma(grad, s, main)
    return torch.where(s == 0, main, total)


def _accumulate(main, grad, scale, inv_scale, store, partials):
    s = _factor(main, scale, inv_scale)
    grad = in_layout_of(grad, main).to(main.dtype)
    if not store and s.device.type == "cpu" and s.item() == 1:
        main.add_(grad)  # the same bits, without the work of an exact product
    else:
        main.copy_(_new_main(main, grad, s, store))
    if partials is not None:
        partials.copy_(square_sums(main))


@torch.no_grad()
def accumulate_(main, grad, scale, inv_scale, store, partials):
    """See :func:`gradacc_kernels.ops.accumulate_`."""
    checks.check_accumulate(
        "accumulate_",
        [main],
        [grad],
        scale,
        inv_scale,
        None,
        None if partials is None else [partials],
        main_dtypes=MAIN_DTYPES,
    )
    _accumulate(main, grad, scale, inv_scale, store, partials)


@torch.no_grad()
def multi_accumulate_(mains, grads, scale, inv_scale, stores, partials):
    """See :func:`gradacc_kernels.ops.multi_accumulate_`."""
    checks.check_accumulate(
        "multi_accumulate_",
        mains,
        grads,
        scale,
        inv_scale,
        stores,
        partials,
        is_list=True,
        main_dtypes=MAIN_DTYPES,
    )
    for i, (main, grad) in enumerate(zip(mains, grads, strict=True)):
        _accumulate(
            main,
            grad,
            scale,
            inv_scale,
            bool(stores) and stores[i],
            partials[i] if partials else None,
        )


def in_rows(tensor: Tensor, width: int) -> Tensor:
    """Returns a tensor as a matrix of rows of ``width``, copied where it cannot be viewed so."""
    if tensor._is_zerotensor():
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg().reshape(math.prod(tensor.shape[:-1]), width)


@torch.no_grad()
def wgrad_accumulate_(main, grad_output, input, scale, inv_scale, store, partials, offsets):
    """See :func:`gradacc_kernels.ops.wgrad_accumulate_`.

    Offsets are read to the host, which waits for the device. Only this backend does so.
    """
    checks.check_wgrad(
        "wgrad_accumulate_",
        main,
        grad_output,
        input,
        scale,
        inv_scale,
        partials,
        offsets,
        main_dtypes=MAIN_DTYPES,
    )
    s = _factor(main, scale, inv_scale)
    mains = main if main.dim() == 3 else main[None]
    grad_output = in_rows(grad_output, main.shape[-2])
    input = in_rows(input, main.shape[-1])
    tokens = len(input)
    if offsets is not None:
        ends = [min(max(end, 0), tokens) for end in offsets.tolist()]
    else:
        ends = [(e + 1) * tokens // len(mains) for e in range(len(mains))]
    for weight, begin, end in zip(mains, [0, *ends], ends, strict=False):
        grad = grad_output[begin:end].t().double() @ input[begin:end].double()
        weight.copy_(_new_main(weight, grad.to(main.dtype), s, store))
    if partials is not None:
        partials.copy_(square_sums(main))


def _chunks_of_rows(main, rows):
    """Tells which chunks hold an element of the rows: a bool per chunk."""
    chunks = torch.arange(checks.num_chunks(main.numel()), device=main.device)
    first = chunks * checks.CHUNK_SIZE // main.shape[1]
    last = ((chunks + 1) * checks.CHUNK_SIZE).clamp(max=main.numel()) - 1
    are_rows = torch.zeros(len(main) + 1, dtype=torch.int64, device=main.device)
    are_rows[rows + 1] = 1
    rows_before = are_rows.cumsum(0)
    return rows_before[last // main.shape[1] + 1] > rows_before[first]


@torch.no_grad()
def embedding_accumulate_(
    main, grad_output, indices, padding_idx, scale, inv_scale, store, partials
):
    """See :func:`gradacc_kernels.ops.embedding_accumulate_`.

    The indices are tested on the host, which waits for the device. Only this backend does so.
    """
    op = "embedding_accumulate_"
    checks.check_embedding(
        op,
        main,
        grad_output,
        indices,
        padding_idx,
        scale,
        inv_scale,
        partials,
        main_dtypes=MAIN_DTYPES,
    )
    checks.check_indices(op, indices, len(main))
    s = _factor(main, scale, inv_scale)
    indices = indices.reshape(-1).long()
    grad_output = in_rows(grad_output, main.shape[1])
    if padding_idx is not None:
        is_token = indices != padding_idx % len(main)
        indices, grad_output = indices[is_token], grad_output[is_token]
    rows, group = indices.unique(return_inverse=True)
    sums = torch.zeros(len(rows), main.shape[1], dtype=torch.float64, device=main.device)
    # Of the ways to sum by index this one has no atomics: sorted on CUDA, serial on the CPU.
    sums.index_put_((group,), grad_output.double(), accumulate=True)
    new = _new_main(main[rows], sums.to(main.dtype), s, store)
    if store:
        main.zero_()
    main[rows] = new
    if partials is not None and main.numel():
        is_new = _chunks_of_rows(main, rows) | store
        partials.copy_(torch.where(is_new, square_sums(main), partials))


@torch.no_grad()
def grad_stats(tensors, are_partials):
    """See :func:`gradacc_kernels.ops.grad_stats`."""
    checks.check_stats(tensors, are_partials, main_dtypes=MAIN_DTYPES)
    slots = tensors if are_partials else [square_sums(main) for main in tensors]
    sums = torch.stack([s.double().sum() for s in slots]).to(tensors[0].dtype)
    norm = sums.double().sum().sqrt()
    return sums, norm.to(sums.dtype), norm.isnan().float()


@torch.no_grad()
def scale_(mains, factor):
    """See :func:`gradacc_kernels.ops.scale_`."""
    checks.check_scale_(mains, factor, main_dtypes=MAIN_DTYPES)
    for main in mains:
        main.copy_(torch.where(factor.reshape(()) == 1, main, main * factor.reshape(())))
