"""The ops as Triton kernels, for GPUs without the compiled extension.

One program serves one chunk. A list of tensors travels as an int64 table in device memory: a row a
tensor, with its addresses, its size and the number of chunks before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from gradacc_kernels import checks, reference
from gradacc_kernels.checks import CHUNK_SIZE, num_chunks
from gradacc_kernels.reference import in_layout_of

MAIN_DTYPES = (torch.float32,)
TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
NUM_WARPS = 4
PROGRAMS_PER_PROCESSOR = 16
# Columns of the table: addresses of main, grad and slots; elements; store flag; chunks before.
COLUMNS = tl.constexpr(6)


@triton.jit
def _square_sum(x, mask):
    """Sum of squares, NaN when an element is not finite: x * 0 is NaN for those alone."""
    x = tl.where(mask, x, 0.0)
    return tl.sum(x * x, 0) + tl.sum(x * 0.0, 0)


@triton.jit
def _find_row(table_ptr, n_rows, chunk):
    """The tensor that owns a chunk, by binary search in the chunks before each."""
    low = 0
    high = n_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + middle * COLUMNS + 5) <= chunk:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _scaled(scale, inv_scale_ptr, HAS_INV_SCALE: tl.constexpr):
    if HAS_INV_SCALE:
        scale = scale * tl.load(inv_scale_ptr)
    return scale


@triton.jit
def _accumulate_kernel(
    main_ptr,
    grad_ptr,
    partials_ptr,
    inv_scale_ptr,
    scale,
    n_elements,
    STORE: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    HAS_INV_SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """main = fma(grad, s, main) or grad * s, with the chunk's sum of squares into its slot."""
    chunk = tl.program_id(0).to(tl.int64)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < n_elements
    s = _scaled(scale, inv_scale_ptr, HAS_INV_SCALE)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if STORE:
        main = grad * s
    else:
        main = tl.fma(grad, s, tl.load(main_ptr + offsets, mask=mask, other=0.0))
    tl.store(main_ptr + offsets, main, mask=mask)
    if HAS_PARTIALS:
        tl.store(partials_ptr + chunk, _square_sum(main, mask))


@triton.jit
def _multi_accumulate_kernel(
    table_ptr,
    n_rows,
    inv_scale_ptr,
    scale,
    GRAD_DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    HAS_INV_SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """_accumulate_kernel over a table of tensors whose gradients have one dtype."""
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + _find_row(table_ptr, n_rows, chunk) * COLUMNS
    main_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(GRAD_DTYPE))
    # Without these hints, which single launches get by specialisation, accesses are not vectors.
    main_ptr = tl.multiple_of(main_ptr, ALIGNMENT)
    grad_ptr = tl.multiple_of(grad_ptr, ALIGNMENT)
    n_elements = tl.multiple_of(tl.load(row_ptr + 3), ALIGNMENT)
    chunk -= tl.load(row_ptr + 5)

    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < n_elements
    s = _scaled(scale, inv_scale_ptr, HAS_INV_SCALE)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if tl.load(row_ptr + 4) != 0:
        main = grad * s
    else:
        main = tl.fma(grad, s, tl.load(main_ptr + offsets, mask=mask, other=0.0))
    tl.store(main_ptr + offsets, main, mask=mask)
    if HAS_PARTIALS:
        partials_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
        tl.store(partials_ptr + chunk, _square_sum(main, mask))


@triton.jit
def _squares_kernel(table_ptr, n_rows, CHUNK: tl.constexpr):
    """The sum of squares of each chunk of a table's main gradients into its slot."""
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + _find_row(table_ptr, n_rows, chunk) * COLUMNS
    main_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    partials_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    chunk -= tl.load(row_ptr + 5)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < tl.load(row_ptr + 3)
    main = tl.load(main_ptr + offsets, mask=mask, other=0.0)
    tl.store(partials_ptr + chunk, _square_sum(main, mask))


@triton.jit
def _reduce_kernel(table_ptr, sums_ptr, BLOCK: tl.constexpr):
    """sums[i] = sum of the slots of row i, in float64; one program a tensor."""
    row_ptr = table_ptr + tl.program_id(0) * COLUMNS
    partials_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    n_slots = tl.load(row_ptr + 3)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_slots, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + offsets, mask=offsets < n_slots, other=0.0).to(tl.float64)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0).to(tl.float32))


@triton.jit
def _norm_kernel(sums_ptr, norm_ptr, found_inf_ptr, n_sums, BLOCK: tl.constexpr):
    """norm = sqrt(sum of sums); found_inf = 1 when that is NaN, else 0."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_sums, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + offsets, mask=offsets < n_sums, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(norm_ptr, norm.to(tl.float32))
    tl.store(found_inf_ptr, tl.where(norm != norm, 1.0, 0.0))


@triton.jit
def _scale_kernel(table_ptr, n_rows, n_chunks, factor_ptr, CHUNK: tl.constexpr):
    """main *= factor on a persistent grid; nothing is touched when the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for i in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
            row_ptr = table_ptr + _find_row(table_ptr, n_rows, i) * COLUMNS
            main_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
            chunk = i - tl.load(row_ptr + 5)
            offsets = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = offsets < tl.load(row_ptr + 3)
            main = tl.load(main_ptr + offsets, mask=mask, other=0.0)
            tl.store(main_ptr + offsets, main * factor, mask=mask)


def _on(device):
    """Makes a device current, for Triton launches on the current one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _table(rows, device):
    """Fills in the chunks before each row; returns the table on the device and their total."""
    chunks = 0
    for row in rows:
        row.append(chunks)
        chunks += num_chunks(row[3])
    is_cuda = device.type == "cuda"
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=is_cuda)
    return table.to(device, non_blocking=True), chunks


def _is_capturing(device):
    """Tells whether a graph is being captured, whose replays would read a table's dead memory."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _launch_one(main, grad, scale, inv_scale, store, partials):
    if main.numel() == 0:
        return
    with _on(main.device):
        _accumulate_kernel[(num_chunks(main.numel()),)](
            main,
            grad,
            partials,
            inv_scale,
            float(scale),
            main.numel(),
            STORE=bool(store),
            HAS_PARTIALS=partials is not None,
            HAS_INV_SCALE=inv_scale is not None,
            CHUNK=CHUNK_SIZE,
            num_warps=NUM_WARPS,
        )


def accumulate_(main, grad, scale, inv_scale, store, partials):
    """See :func:`gradacc_kernels.ops.accumulate_`."""
    slots = None if partials is None else [partials]
    checks.check_accumulate(
        "accumulate_", [main], [grad], scale, inv_scale, None, slots, main_dtypes=MAIN_DTYPES
    )
    increment_version([main, *(slots or ())])
    _launch_one(main, in_layout_of(grad, main), scale, inv_scale, store, partials)


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
    if not mains:
        return
    grads = [in_layout_of(grad, main) for main, grad in zip(mains, grads, strict=True)]
    stores = stores or [False] * len(mains)
    slots = partials or [None] * len(mains)
    increment_version([*mains, *(partials or ())])
    device = mains[0].device
    if _is_capturing(device):
        for main, grad, store, slot in zip(mains, grads, stores, slots, strict=True):
            _launch_one(main, grad, scale, inv_scale, store, slot)
        return
    groups: dict[torch.dtype, list[list[int]]] = {}
    for main, grad, store, slot in zip(mains, grads, stores, slots, strict=True):
        if main.numel():
            slot_address = 0 if slot is None else slot.data_ptr()
            groups.setdefault(grad.dtype, []).append(
                [main.data_ptr(), grad.data_ptr(), slot_address, main.numel(), int(store)]
            )
    for dtype, rows in groups.items():
        is_aligned = all((row[0] | row[1] | row[3]) % 16 == 0 for row in rows)
        table, chunks = _table(rows, device)
        with _on(device):
            _multi_accumulate_kernel[(chunks,)](
                table,
                len(rows),
                inv_scale,
                float(scale),
                GRAD_DTYPE=TL_DTYPES[dtype],
                ALIGNMENT=16 if is_aligned else 1,
                HAS_PARTIALS=bool(partials),
                HAS_INV_SCALE=inv_scale is not None,
                CHUNK=CHUNK_SIZE,
                num_warps=NUM_WARPS,
            )


def grad_stats(tensors, are_partials):
    """See :func:`gradacc_kernels.ops.grad_stats`."""
    checks.check_stats(tensors, are_partials, main_dtypes=MAIN_DTYPES)
    device = tensors[0].device
    if _is_capturing(device):
        return reference.grad_stats(tensors, are_partials)
    with _on(device):
        if are_partials:
            slots = list(tensors)
        else:
            counts = [num_chunks(main.numel()) for main in tensors]
            slots = list(torch.empty(sum(counts), device=device).split(counts))
            rows = [
                [main.data_ptr(), 0, slot.data_ptr(), main.numel(), 0]
                for main, slot in zip(tensors, slots, strict=True)
                if main.numel()
            ]
            if rows:
                table, chunks = _table(rows, device)
                _squares_kernel[(chunks,)](table, len(rows), CHUNK=CHUNK_SIZE, num_warps=NUM_WARPS)
        sums = torch.empty(len(slots), device=device)
        norm, found_inf = torch.empty((), device=device), torch.empty((), device=device)
        table, _ = _table([[0, 0, slot.data_ptr(), slot.numel(), 0] for slot in slots], device)
        _reduce_kernel[(len(slots),)](table, sums, BLOCK=4096, num_warps=16)
        _norm_kernel[(1,)](sums, norm, found_inf, len(slots), BLOCK=4096, num_warps=16)
    return sums, norm, found_inf


def scale_(mains, factor):
    """See :func:`gradacc_kernels.ops.scale_`."""
    checks.check_scale_(mains, factor, main_dtypes=MAIN_DTYPES)
    rows = [[main.data_ptr(), 0, 0, main.numel(), 0] for main in mains if main.numel()]
    if not rows:
        return
    device = mains[0].device
    if _is_capturing(device):
        return reference.scale_(mains, factor)
    increment_version(mains)
    table, chunks = _table(rows, device)
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    with _on(device):
        _scale_kernel[(min(chunks, processors * PROGRAMS_PER_PROCESSOR),)](
            table, len(rows), chunks, factor, CHUNK=CHUNK_SIZE, num_warps=NUM_WARPS
        )
