"""The specification: every op in eager torch, for any device that has float64.

Other backends give the same main gradients, bit for bit; ``reference`` alone also accumulates into
float64 main gradients, in float64.
"""

from __future__ import annotations

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


def _accumulate(main, grad, scale, inv_scale, store, partials):
    s = torch.full((), scale, dtype=main.dtype, device=main.device)
    if inv_scale is not None:
        s = s * inv_scale.reshape(())
    grad = in_layout_of(grad, main).to(main.dtype)
    if main.dtype == torch.float64:
        main.copy_(grad * s if store else main + grad * s)
    else:
        if not store and s.device.type == "cpu" and s.item() == 1:
            main.add_(grad)  # the same bits, without the work of an exact product
        else:
            main.copy_(grad * s if store else fma(grad, s, main))
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
