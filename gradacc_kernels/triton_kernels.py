"""The ops as Triton kernels, for GPUs without the compiled extension.

One program serves one chunk. A list of tensors travels as an int64 table in device memory: a row a
tensor, with its addresses, its size and the number of chunks before it. A weight gradient is cut
into tiles in place of chunks, an embedding's gradient into runs of equal indices.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from gradacc_kernels import checks, reference
from gradacc_kernels.checks import CHUNK_SIZE, num_chunks
from gradacc_kernels.reference import in_layout_of, in_rows

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

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
# Tiles one below the other that run together, so that they share their columns of the input in L2.
RASTER = tl.constexpr(8)
# Sorted tokens in a block; the sum of a row that goes beyond its block is made of pieces.
BLOCK_TOKENS = 64


@triton.jit
def _square_sum(x, mask):
    """Sum of squares, NaN when an element is not finite: x * 0 is NaN for those alone."""
    x = tl.where(mask, x, 0.0)
    return tl.sum(x * x) + tl.sum(x * 0.0)


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
def _added(main, grad, s):
    """fma(grad, s, main); main where s is 0, for 0 * NaN is NaN."""
    return tl.where(s == 0.0, main, tl.fma(grad, s, main))


@triton.jit
def _stored(grad, s):
    """grad * s; 0 where s is 0."""
    return tl.where(s == 0.0, 0.0, grad * s)


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
        main = _stored(grad, s)
    else:
        main = _added(tl.load(main_ptr + offsets, mask=mask, other=0.0), grad, s)
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
        main = _stored(grad, s)
    else:
        main = _added(tl.load(main_ptr + offsets, mask=mask, other=0.0), grad, s)
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


@triton.jit
def _block(
    matrix,
    row,
    end,
    column,
    n_columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_DESCRIPTOR: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """A block of a matrix, zero beyond its last column and, if not whole, from row ``end`` on."""
    if IS_DESCRIPTOR:
        block = matrix.load([row, column])
        if not IS_WHOLE:  # what follows may be another group's rows, with NaNs that 0 would spread
            rows = row + tl.arange(0, ROWS)
            block = tl.where((rows < end)[:, None], block, 0.0)
    else:
        rows = row + tl.arange(0, ROWS).to(tl.int64)
        columns = column + tl.arange(0, WIDTH).to(tl.int64)
        offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
        mask = (columns < n_columns)[None, :]
        if not IS_WHOLE:
            mask = mask & (rows < end)[:, None]
        block = tl.load(matrix + offsets, mask=mask, other=0.0)
    return block


@triton.jit
def _plus_products(
    total,
    grad_output,
    input,
    t,
    end,
    o,
    i,
    out_features,
    in_features,
    grad_stride,
    grad_column_stride,
    input_stride,
    input_column_stride,
    DOT_DTYPE: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_T: tl.constexpr,
    IS_DESCRIPTOR: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """A tile plus the products of the tokens [t, t + TILE_T)."""
    x = _block(
        grad_output,
        t,
        end,
        o,
        out_features,
        grad_stride,
        grad_column_stride,
        TILE_T,
        TILE_O,
        IS_DESCRIPTOR,
        IS_WHOLE,
    )
    y = _block(
        input,
        t,
        end,
        i,
        in_features,
        input_stride,
        input_column_stride,
        TILE_T,
        TILE_I,
        IS_DESCRIPTOR,
        IS_WHOLE,
    )
    x, y = x.to(DOT_DTYPE), y.to(DOT_DTYPE)
    return tl.dot(tl.trans(x), y, total, input_precision="ieee")


@triton.jit
def _group_rows(group, tokens, offsets_ptr, IS_GROUPED: tl.constexpr, IS_DESCRIPTOR: tl.constexpr):
    """The rows [begin, end) of a weight's tokens, inside of the matrices whatever the offsets."""
    if IS_GROUPED:
        end = tl.load(offsets_ptr + group).to(tl.int64)
        begin = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), tokens)
        end = tl.maximum(tl.minimum(end, tokens), begin)
    else:
        begin = group.to(tl.int64) * tokens
        end = begin + tokens
    if IS_DESCRIPTOR:  # which has 32-bit coordinates
        begin, end = begin.to(tl.int32), end.to(tl.int32)
    return begin, end


@triton.jit
def _wgrad_kernel(
    main,
    grad_output,
    input,
    partials_ptr,
    offsets_ptr,
    inv_scale_ptr,
    scale,
    out_features,
    in_features,
    tokens,
    n_slots,
    grad_stride,
    grad_column_stride,
    input_stride,
    input_column_stride,
    STORE: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    HAS_INV_SCALE: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    IS_DESCRIPTOR: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_T: tl.constexpr,
):
    """One tile of main (+)= s * grad_output^T @ input, and its sum of squares into a slot.

    The matrices are pointers, or descriptors for loads and stores by the tensor memory
    accelerator. The old tile is read after the products: earlier it would hold registers, and the
    other programs of a processor hide the wait.
    """
    tiles_o = tl.cdiv(out_features, TILE_O)
    tiles_i = tl.cdiv(in_features, TILE_I)
    group = tl.program_id(0) // (tiles_o * tiles_i)
    tile = tl.program_id(0) % (tiles_o * tiles_i)
    first = tile // (RASTER * tiles_i) * RASTER
    height = tl.minimum(tiles_o - first, RASTER)
    tile = tile % (RASTER * tiles_i)
    o = (first + tile % height) * TILE_O
    i = tile // height * TILE_I

    begin, end = _group_rows(group, tokens, offsets_ptr, IS_GROUPED, IS_DESCRIPTOR)
    whole = begin + (end - begin) // TILE_T * TILE_T
    total = tl.zeros((TILE_O, TILE_I), tl.float32)
    for t in range(begin, whole, TILE_T):
        total = _plus_products(
            total,
            grad_output,
            input,
            t,
            end,
            o,
            i,
            out_features,
            in_features,
            grad_stride,
            grad_column_stride,
            input_stride,
            input_column_stride,
            DOT_DTYPE,
            TILE_O,
            TILE_I,
            TILE_T,
            IS_DESCRIPTOR,
            IS_WHOLE=True,
        )
    if whole < end:
        total = _plus_products(
            total,
            grad_output,
            input,
            whole,
            end,
            o,
            i,
            out_features,
            in_features,
            grad_stride,
            grad_column_stride,
            input_stride,
            input_column_stride,
            DOT_DTYPE,
            TILE_O,
            TILE_I,
            TILE_T,
            IS_DESCRIPTOR,
            IS_WHOLE=False,
        )

    s = _scaled(scale, inv_scale_ptr, HAS_INV_SCALE)
    rows = o + tl.arange(0, TILE_O)
    columns = i + tl.arange(0, TILE_I)
    mask = (rows < out_features)[:, None] & (columns < in_features)[None, :]
    row_offsets = (group.to(tl.int64) * out_features + rows) * in_features
    offsets = row_offsets[:, None] + columns[None, :]
    if STORE:
        new = _stored(total, s)
    elif IS_DESCRIPTOR:
        old = main.load([group, o, i]).reshape(TILE_O, TILE_I)
        new = _added(old, total, s)
    else:
        new = _added(tl.load(main + offsets, mask=mask, other=0.0), total, s)
    if IS_DESCRIPTOR:
        main.store([group, o, i], new.reshape(1, TILE_O, TILE_I))
    else:
        tl.store(main + offsets, new, mask=mask)
    if HAS_PARTIALS:
        tl.store(partials_ptr + tl.program_id(0), _square_sum(new, mask))
        for slot in range(tl.num_programs(0) + tl.program_id(0), n_slots, tl.num_programs(0)):
            tl.store(partials_ptr + slot, 0.0)


@triton.jit
def _chunk_squares_kernel(main_ptr, partials_ptr, n_elements, CHUNK: tl.constexpr):
    """The sum of squares of each chunk of one main gradient into its slot."""
    chunk = tl.program_id(0).to(tl.int64)
    offsets = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = offsets < n_elements
    main = tl.load(main_ptr + offsets, mask=mask, other=0.0)
    tl.store(partials_ptr + chunk, _square_sum(main, mask))


@triton.jit
def _store_rows(main_ptr, row, columns, mask, total, s, width, STORE: tl.constexpr):
    """main[row] = fma(total, s, main[row]), or total * s."""
    main_ptrs = main_ptr + row.to(tl.int64) * width + columns
    if STORE:
        new = _stored(total, s)
    else:
        new = _added(tl.load(main_ptrs, mask=mask, other=0.0), total, s)
    tl.store(main_ptrs, new, mask=mask)


@triton.jit
def _embedding_kernel(
    main_ptr,
    grad_ptr,
    rows_ptr,
    tokens_ptr,
    pieces_ptr,
    inv_scale_ptr,
    scale,
    padding_row,
    n_tokens,
    width,
    grad_stride,
    grad_column_stride,
    STORE: tl.constexpr,
    HAS_INV_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums one run of equal rows within a block of the sorted tokens, in their order.

    A run that lies in its block is added to main. Of one that goes on in the next block, or came
    from the one before, the sum is a piece: a block has one piece that begins with it, and one
    that does not, at the most.
    """
    position = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + position)
    comes_from_before = tl.load(rows_ptr + position - 1, mask=position > 0, other=-1) == row
    is_first = position % BLOCK == 0
    is_head = is_first | (comes_from_before == 0)
    if is_head & (row != padding_row):
        block_end = tl.minimum((position // BLOCK + 1) * BLOCK, n_tokens)
        positions = position + tl.arange(0, BLOCK)
        others = tl.load(rows_ptr + positions, mask=positions < block_end, other=-1)
        n = tl.sum((others == row).to(tl.int32))
        columns = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        mask = columns < width
        grad_ptrs = grad_ptr + columns * grad_column_stride
        total = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, n, 4):
            for j in tl.static_range(4):  # four loads under way
                is_token = start + j < n
                token = tl.load(tokens_ptr + position + start + j, mask=is_token, other=0)
                is_loaded = columns < tl.where(is_token, width, 0)
                grad = tl.load(grad_ptrs + token * grad_stride, mask=is_loaded, other=0.0)
                total += grad.to(tl.float32)
        reaches_next = (position + n == block_end) & (block_end < n_tokens)
        goes_on = tl.load(rows_ptr + block_end, mask=reaches_next, other=-1) == row
        if comes_from_before | goes_on:
            piece = position // BLOCK * 2 + tl.where(is_first, 0, 1)
            tl.store(pieces_ptr + piece * width + columns, total, mask=mask)
        else:
            s = _scaled(scale, inv_scale_ptr, HAS_INV_SCALE)
            _store_rows(main_ptr, row, columns, mask, total, s, width, STORE)


@triton.jit
def _embedding_pieces_kernel(
    main_ptr,
    rows_ptr,
    pieces_ptr,
    inv_scale_ptr,
    scale,
    padding_row,
    n_tokens,
    width,
    STORE: tl.constexpr,
    HAS_INV_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the run that begins in a block and goes on in the next one: the sum of its pieces."""
    block = tl.program_id(0).to(tl.int64)
    next_block = (block + 1) * BLOCK
    row = tl.load(rows_ptr + next_block)  # the grid leaves out the last block
    before = tl.load(rows_ptr + block * BLOCK - 1, mask=block > 0, other=-1)
    begins_here = (tl.load(rows_ptr + next_block - 1) == row) & (before != row)
    if begins_here & (row != padding_row):
        columns = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        mask = columns < width
        is_first = tl.load(rows_ptr + block * BLOCK) == row
        piece = block * 2 + tl.where(is_first, 0, 1)
        total = tl.load(pieces_ptr + piece * width + columns, mask=mask, other=0.0)
        goes_on = begins_here
        while goes_on:
            for _ in tl.static_range(8):  # eight loads under way
                is_inside = next_block < n_tokens
                other = tl.load(rows_ptr + next_block, mask=is_inside, other=-1)
                goes_on = other == row
                piece_ptrs = pieces_ptr + next_block // BLOCK * 2 * width + columns
                is_loaded = columns < tl.where(goes_on, width, 0)
                total += tl.load(piece_ptrs, mask=is_loaded, other=0.0)
                next_block += BLOCK
        s = _scaled(scale, inv_scale_ptr, HAS_INV_SCALE)
        _store_rows(main_ptr, row, columns, mask, total, s, width, STORE)


@triton.jit
def _row_squares_kernel(
    main_ptr, partials_ptr, rows_ptr, padding_row, width, n_elements, CHUNK: tl.constexpr
):
    """The sums of squares of the chunks that hold a row, by the first of its sorted tokens."""
    position = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + position).to(tl.int64)
    chunk = row * width // CHUNK + tl.program_id(1)
    before = tl.load(rows_ptr + position - 1, mask=position > 0, other=-1).to(tl.int64)
    # A chunk that the former row reaches into is written by the first of its rows alone.
    is_done = (before >= 0) & (before != padding_row)
    is_done = is_done & (((before + 1) * width - 1) // CHUNK >= chunk)
    is_new = (row != padding_row) & (before != row) & (is_done == 0)
    if is_new & (chunk * CHUNK < (row + 1) * width):
        offsets = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = offsets < n_elements
        main = tl.load(main_ptr + offsets, mask=mask, other=0.0)
        tl.store(partials_ptr + chunk, _square_sum(main, mask))


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


@functools.cache
def _has_tensor_memory_accelerator(device):
    """Tells whether descriptors serve a device; the interpreter takes them on the CPU."""
    if TensorDescriptor is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _can_describe(matrix):
    row_stride, column_stride = matrix.stride()
    return (
        min(matrix.shape) > 0
        and max(matrix.shape) < 2**31
        and column_stride == 1
        and row_stride >= matrix.shape[1]
        and row_stride * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


@functools.cache
def _has_large_shared_memory(device):
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 1024


def _tile_options(dtype, tokens, fits_large):
    """The tiles of a weight gradient, by what bounds it.

    Few tokens: the read and write of main, which small tiles, several on a processor, overlap with
    the products of others. Many: the products, which large tiles feed with fewer loads.
    """
    if dtype == torch.float32:
        tile, num_warps, num_stages = (64, 64, 32), 4, 2
    elif tokens <= 1024:
        tile, num_warps, num_stages = (64, 128, 64), 4, 3
    elif tokens <= 2048 or not fits_large:
        tile, num_warps, num_stages = (128, 128, 64), 8, 3
    else:
        tile, num_warps, num_stages = (128, 256, 64), 8, 3
    names = ("TILE_O", "TILE_I", "TILE_T")
    return {
        **dict(zip(names, tile, strict=True)),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def wgrad_accumulate_(main, grad_output, input, scale, inv_scale, store, partials, offsets):
    """See :func:`gradacc_kernels.ops.wgrad_accumulate_`."""
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
    increment_version([main] if partials is None else [main, partials])
    if main.numel() == 0:
        return
    mains = main if main.dim() == 3 else main[None]
    grad_output = in_rows(grad_output, main.shape[-2])
    input = in_rows(input, main.shape[-1])
    groups, out_features, in_features = mains.shape
    tokens = len(input) if offsets is not None else len(input) // groups
    # Descriptors of float32 inputs, whose products take no tensor core, cost registers.
    is_descriptor = (
        input.dtype != torch.float32
        and _has_tensor_memory_accelerator(main.device)
        and all(_can_describe(matrix) for matrix in (mains[0], grad_output, input))
    )
    fits_large = is_descriptor and _has_large_shared_memory(main.device)
    options = _tile_options(input.dtype, len(input) // groups, fits_large)
    tile_o, tile_i, tile_t = options["TILE_O"], options["TILE_I"], options["TILE_T"]
    programs = groups * triton.cdiv(out_features, tile_o) * triton.cdiv(in_features, tile_i)
    slots = num_chunks(main.numel())
    is_interpreted_bfloat16 = input.dtype == torch.bfloat16 and input.device.type == "cpu"
    matrices = [mains, grad_output, input]
    if is_descriptor:
        blocks = ([1, tile_o, tile_i], [tile_t, tile_o], [tile_t, tile_i])
        matrices = map(TensorDescriptor.from_tensor, matrices, blocks)
    with _on(main.device):
        _wgrad_kernel[(programs,)](
            *matrices,
            partials,
            offsets,
            inv_scale,
            float(scale),
            out_features,
            in_features,
            tokens,
            slots,
            *grad_output.stride(),
            *input.stride(),
            STORE=bool(store),
            HAS_PARTIALS=partials is not None and programs <= slots,
            HAS_INV_SCALE=inv_scale is not None,
            IS_GROUPED=offsets is not None,
            IS_DESCRIPTOR=is_descriptor,
            # The interpreter multiplies the bits of a bfloat16.
            DOT_DTYPE=tl.float32 if is_interpreted_bfloat16 else TL_DTYPES[input.dtype],
            **options,
        )
        if partials is not None and programs > slots:
            _chunk_squares_kernel[(slots,)](
                main, partials, main.numel(), CHUNK=CHUNK_SIZE, num_warps=NUM_WARPS
            )


def embedding_accumulate_(
    main, grad_output, indices, padding_idx, scale, inv_scale, store, partials
):
    """See :func:`gradacc_kernels.ops.embedding_accumulate_`."""
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
    n_rows, width = main.shape
    if indices.device.type != "cuda":
        checks.check_indices(op, indices, n_rows)
    increment_version([main] if partials is None else [main, partials])
    n_tokens = indices.numel()
    if store:
        main.zero_()
        if partials is not None:
            partials.zero_()
    if n_tokens == 0:
        return
    rows, tokens = indices.reshape(-1).sort(stable=True)
    if indices.device.type == "cuda":
        # The host must not wait for the answer: an index out of range traps on the device.
        torch._assert_async(
            (rows[0] >= 0) & (rows[-1] < n_rows), f"{op}: indices must lie in [0, {n_rows})"
        )
    if width == 0:
        return
    grad_output = in_rows(grad_output, width)
    padding_row = -1 if padding_idx is None else padding_idx % n_rows
    blocks = triton.cdiv(n_tokens, BLOCK_TOKENS)
    columns = min(triton.next_power_of_2(width), 1024)
    column_blocks = triton.cdiv(width, columns)
    pieces = torch.empty(2 * blocks * width, device=main.device)
    factors = (inv_scale, float(scale), padding_row, n_tokens, width)
    options = {
        "STORE": bool(store),
        "HAS_INV_SCALE": inv_scale is not None,
        "BLOCK": BLOCK_TOKENS,
        "WIDTH": columns,
        "num_warps": NUM_WARPS,
    }
    with _on(main.device):
        _embedding_kernel[(n_tokens, column_blocks)](
            main, grad_output, rows, tokens, pieces, *factors, *grad_output.stride(), **options
        )
        if blocks > 1:
            _embedding_pieces_kernel[(blocks - 1, column_blocks)](
                main, rows, pieces, *factors, **options
            )
        if partials is not None:
            _row_squares_kernel[(n_tokens, triton.cdiv(width - 1, CHUNK_SIZE) + 1)](
                main,
                partials,
                rows,
                padding_row,
                width,
                main.numel(),
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
        # One program reads all slots of a tensor, so it must have many loads in flight.
        longest = max(slot.numel() for slot in slots)
        block, num_warps = (16384, 32) if longest > 4096 else (1024, 4)
        _reduce_kernel[(len(slots),)](table, sums, BLOCK=block, num_warps=num_warps)
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
