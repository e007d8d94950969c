"""Every check of an op's arguments for the backends in Python, with the messages of csrc's checks.

A check reads metadata only, and all checks of a call come before its first write.
"""

from __future__ import annotations

import bisect
import math
import struct

import torch

CHUNK_SIZE = 1024
GRAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


def num_chunks(numel: int) -> int:
    """Returns the number of chunks, and so of statistics slots, of a tensor of ``numel`` elements.

    The same on every backend: ceil(numel / CHUNK_SIZE).
    """
    return -(-numel // CHUNK_SIZE)


def is_dense(tensor: torch.Tensor) -> bool:
    """Tells whether a strided tensor covers its memory without gaps or overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_scale(op: str, scale: float) -> None:
    """Refuses a scale that is not finite in float32."""
    try:
        struct.pack("<f", scale)
        is_finite = math.isfinite(scale)
    except OverflowError:
        is_finite = False
    if not is_finite:
        raise ValueError(f"{op}: scale must be finite in float32, got {scale}")


def _check_dtype(what, tensor, dtypes):
    if tensor.dtype not in dtypes:
        names = [str(dtype) for dtype in dtypes]
        expected = " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        raise TypeError(f"{what} must be {expected}, got {tensor.dtype}")


def _check_device(what, tensor, device):
    if tensor.device != device:
        raise ValueError(f"{what} must be on {device}, got {tensor.device}")


def _check_plain(what, tensor):
    """Refuses tensors whose memory does not hold their values."""
    if tensor.layout != torch.strided or tensor._is_zerotensor():
        raise ValueError(f"{what} must be a strided tensor with memory of its own")
    if tensor.is_neg():
        raise ValueError(f"{what} must not be a lazily negated view: pass its resolve_neg()")


def _check_main(what, main, device, dtypes, *, is_contiguous=False):
    _check_dtype(what, main, dtypes)
    is_strided = main.layout == torch.strided
    fits = is_strided and (main.is_contiguous() if is_contiguous else is_dense(main))
    if not fits and (main.numel() or not is_strided):
        layout = "contiguous" if is_contiguous else "dense in memory, without gaps or overlap"
        got = "with other strides" if is_strided else "of a sparse layout"
        raise ValueError(f"{what} must be {layout}, got sizes {list(main.shape)} {got}")
    _check_plain(what, main)
    if main.requires_grad:
        raise ValueError(f"{what} must not require grad: pass a detached tensor or its .data")
    _check_device(what, main, device)


def _check_scalar(what, scalar, device, dtypes=(torch.float32,)):
    _check_dtype(what, scalar, dtypes)
    if scalar.numel() != 1:
        raise ValueError(f"{what} must hold one element, got shape {list(scalar.shape)}")
    _check_plain(what, scalar)
    _check_device(what, scalar, device)


def _grad_dtypes(main):
    is_double = main.dtype == torch.float64
    return (*GRAD_DTYPES, torch.float64) if is_double else GRAD_DTYPES


def _check_inv_scale(op, inv_scale, main, main_dtypes):
    dtypes = {torch.float32, main.dtype} & set(main_dtypes)
    _check_scalar(f"{op}: inv_scale", inv_scale, main.device, sorted(dtypes, key=str))


def _check_shape(what, tensor, expected):
    """Refuses other sizes; a name stands for any size, and "..." in front for any dimensions."""
    sizes, got = expected, list(tensor.shape)
    if expected[:1] == ["..."]:
        sizes = expected[1:]
        got = got[max(len(got) - len(sizes), 0) :]
    fits = len(got) == len(sizes) and all(
        isinstance(size, str) or size == other for size, other in zip(sizes, got, strict=True)
    )
    if not fits:
        names = ", ".join(map(str, expected))
        raise ValueError(f"{what} must have shape [{names}], got {list(tensor.shape)}")


def _check_operand(what, tensor, dtypes, shape, device):
    _check_dtype(what, tensor, dtypes)
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} must be a strided tensor")
    _check_shape(what, tensor, shape)
    _check_device(what, tensor, device)


def _check_slots(what, slots, main):
    _check_dtype(what, slots, (main.dtype,))
    chunks = num_chunks(main.numel())
    if slots.shape != (chunks,) or not slots.is_contiguous():
        raise ValueError(
            f"{what} must be contiguous of shape [num_chunks(numel)] = [{chunks}], got "
            f"{list(slots.shape)}"
        )
    _check_plain(what, slots)
    _check_device(what, slots, main.device)


def _check_length(what, got, expected):
    if got != expected:
        raise ValueError(f"{what} must have one entry per main gradient, {expected}, got {got}")


def _address_range(tensor):
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return 0, 0
    begin = tensor.data_ptr()
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return begin, begin + span * tensor.element_size()


def _check_overlap(what, mains):
    ranges = sorted(_address_range(main) for main in mains if main.numel())
    for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False):
        if end > begin:
            raise ValueError(
                f"{what} must not overlap in memory: an element can be updated once a call"
            )
    return ranges


def _check_read(what, tensor, ranges, written="a main gradient"):
    """Refuses memory in one of the ranges that a pass writes; they are sorted and disjoint."""
    begin, end = _address_range(tensor)
    after = bisect.bisect_right(ranges, begin, key=lambda other: other[1])
    if begin < end and after < len(ranges) and ranges[after][0] < end:
        raise ValueError(f"{what} must not overlap {written} in memory: pass a clone")


def check_accumulate(
    op, mains, grads, scale, inv_scale, stores, partials, *, is_list=False, main_dtypes
):
    """Checks the arguments of accumulate_ and multi_accumulate_."""
    main_name, grad_name = (f"{op}: {name}" for name in ("main_grad", "grad"))
    if is_list:
        main_name, grad_name = main_name + "s", grad_name + "s"
    check_scale(op, scale)
    _check_length(grad_name, len(grads), len(mains))
    if stores:
        _check_length(f"{op}: stores", len(stores), len(mains))
    if partials:
        _check_length(f"{op}: partials", len(partials), len(mains))
    if not mains:
        return
    device = mains[0].device
    if inv_scale is not None:
        _check_inv_scale(op, inv_scale, mains[0], main_dtypes)
    for i, (main, grad) in enumerate(zip(mains, grads, strict=True)):
        index = f"[{i}]" if is_list else ""
        _check_main(main_name + index, main, device, main_dtypes)
        what = grad_name + index
        _check_dtype(what, grad, _grad_dtypes(main))
        if grad.shape != main.shape:
            raise ValueError(
                f"{what} must have the shape of its main gradient, {list(main.shape)}, got "
                f"{list(grad.shape)}"
            )
        _check_device(what, grad, device)
        if partials:
            _check_slots(f"{op}: partials{index}", partials[i], main)
    ranges = _check_overlap(main_name, mains)
    if inv_scale is not None:
        _check_read(f"{op}: inv_scale", inv_scale, ranges)
    if partials:
        _check_overlap(f"{op}: partials", [*mains, *partials])
    for i, (main, grad) in enumerate(zip(mains, grads, strict=True)):
        if _address_range(grad) != _address_range(main) or grad.dtype != main.dtype:
            _check_read(grad_name + (f"[{i}]" if is_list else ""), grad, ranges)


def _check_overlaps(op, main, partials, read):
    """Refuses arguments that overlap what the call writes."""
    written = [("a main gradient", [main])]
    if partials is not None:
        _check_overlap(f"{op}: partials", [main, partials])
        written.append(("partials", [partials]))
    written = [(name, _check_overlap(op, tensors)) for name, tensors in written]
    for name, tensor in read.items():
        for what, ranges in written:
            if tensor is not None:
                _check_read(f"{op}: {name}", tensor, ranges, what)


def check_wgrad(op, main, grad_output, input, scale, inv_scale, partials, offsets, *, main_dtypes):
    """Checks the arguments of wgrad_accumulate_, all but the values of its offsets."""
    device = main.device
    check_scale(op, scale)
    _check_main(f"{op}: main_grad", main, device, main_dtypes, is_contiguous=True)
    dims, where = ((2, 3), "") if offsets is None else ((3,), " where offsets are given")
    if main.dim() not in dims:
        raise ValueError(
            f"{op}: main_grad must have {' or '.join(map(str, dims))} dimensions{where}, got shape "
            f"{list(main.shape)}"
        )
    if inv_scale is not None:
        _check_inv_scale(op, inv_scale, main, main_dtypes)
    *groups, out_features, in_features = main.shape
    leading = ["tokens"] if offsets is not None else [*groups, "tokens"] if groups else ["..."]
    dtypes = _grad_dtypes(main)
    shape = [*leading, out_features]
    _check_operand(f"{op}: grad_output", grad_output, dtypes, shape, device)
    shape = [*grad_output.shape[:-1], in_features]
    _check_operand(f"{op}: input", input, dtypes, shape, device)
    if input.dtype != grad_output.dtype:
        raise TypeError(
            f"{op}: input must have the dtype of grad_output, {grad_output.dtype}, got "
            f"{input.dtype}"
        )
    if offsets is not None:
        what = f"{op}: offsets"
        _check_dtype(what, offsets, (torch.int32,))
        if list(offsets.shape) != groups or not offsets.is_contiguous():
            raise ValueError(
                f"{what} must be contiguous of shape {groups}, got {list(offsets.shape)}"
            )
        _check_plain(what, offsets)
        _check_device(what, offsets, device)
    if partials is not None:
        _check_slots(f"{op}: partials", partials, main)
    read = {"inv_scale": inv_scale, "grad_output": grad_output, "input": input}
    _check_overlaps(op, main, partials, {**read, "offsets": offsets})


def check_embedding(
    op, main, grad_output, indices, padding_idx, scale, inv_scale, partials, *, main_dtypes
):
    """Checks the arguments of embedding_accumulate_, all but the values of its indices."""
    device = main.device
    check_scale(op, scale)
    _check_main(f"{op}: main_grad", main, device, main_dtypes, is_contiguous=True)
    if main.dim() != 2:
        raise ValueError(f"{op}: main_grad must have 2 dimensions, got shape {list(main.shape)}")
    if inv_scale is not None:
        _check_inv_scale(op, inv_scale, main, main_dtypes)
    rows, width = main.shape
    _check_operand(f"{op}: indices", indices, INDEX_DTYPES, ["..."], device)
    shape = [*indices.shape, width]
    _check_operand(f"{op}: grad_output", grad_output, _grad_dtypes(main), shape, device)
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx must lie in [{-rows}, {rows}), got {padding_idx}")
    if partials is not None:
        _check_slots(f"{op}: partials", partials, main)
    read = {"inv_scale": inv_scale, "grad_output": grad_output, "indices": indices}
    _check_overlaps(op, main, partials, read)


def check_indices(op, indices, rows):
    """Checks the values of embedding indices, which waits for their device."""
    is_bad = (indices < 0) | (indices >= rows)
    if is_bad.any():
        got = indices[is_bad][0].item()
        raise ValueError(f"{op}: indices must lie in [0, {rows}), got {got}")


def check_stats(tensors, are_partials, *, main_dtypes):
    """Checks the arguments of grad_stats."""
    name = "grad_stats: partials" if are_partials else "grad_stats: main_grads"
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    for i, tensor in enumerate(tensors):
        _check_main(f"{name}[{i}]", tensor, tensors[0].device, main_dtypes)


def check_scale_(mains, factor, *, main_dtypes):
    """Checks the arguments of scale_."""
    if not mains:
        return
    _check_scalar("scale_: factor", factor, mains[0].device)
    for i, main in enumerate(mains):
        _check_main(f"scale_: main_grads[{i}]", main, mains[0].device, main_dtypes)
    _check_read("scale_: factor", factor, _check_overlap("scale_: main_grads", mains))
