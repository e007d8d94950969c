"""embedding_accumulate_: rows that were looked up, within a derived bound of their float64 sums."""

import itertools
import math
import subprocess
import sys

import oracle
import pytest
import torch
from factor_cases import TINY_FACTORS, ZERO_FACTORS, delicate, poisoned
from test_checks import GRAD_DTYPES, MAIN_DTYPES, assert_refused, cases

from gradacc_kernels import dispatch, ops

pytestmark = pytest.mark.threads  # among which the kernels of the CPU divide their work
CHUNK = ops.CHUNK_SIZE
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OP = torch.ops.gradacc_kernels.embedding_accumulate_.default


class Expected:
    """The new main gradient in float64, and how far each element may lie from it."""

    def __init__(
        self,
        main,
        grad_output,
        indices,
        *,
        padding_idx=None,
        scale=1.0,
        inv_scale=None,
        store=False,
    ):
        s = oracle.factor(scale, inv_scale)
        rows = indices.detach().cpu().reshape(-1).long()
        grads = grad_output.detach().cpu().double().reshape(len(rows), main.shape[1])
        if padding_idx is not None:
            is_token = rows != padding_idx % len(main)
            rows, grads = rows[is_token], grads[is_token]
        old = main.detach().cpu().double()
        old = torch.zeros_like(old) if store else old
        self.counts = rows.bincount(minlength=len(main))
        self.total = old.index_add(0, rows, grads * s)
        magnitude = old.abs().index_add(0, rows, grads.abs() * abs(s))
        # A token's gradient is rounded into at most all sums of its row, a sum of pieces, the fma.
        self.bound = oracle.bound((self.counts + 2)[:, None], magnitude)
        self.bound[self.counts == 0] = 0.0  # all other rows keep their bits

    def contains(self, new):
        """Tells element by element whether the new main gradient lies within the bound."""
        return (new.detach().cpu().double() - self.total).abs() <= self.bound


def embedding(main, grad_output, indices, backend, *, inv_scale=None, **options):
    """The new main gradient, on the CPU, with main left as it is."""
    new = main.to(backend.device, copy=True)
    result = ops.embedding_accumulate_(
        new,
        grad_output.to(backend.device),
        indices.to(backend.device),
        inv_scale=None if inv_scale is None else torch.tensor(inv_scale, device=backend.device),
        backend=backend.name,
        **options,
    )
    assert result is new
    return new.cpu()


def arguments(rows, width, indices, dtype=torch.bfloat16):
    indices = torch.as_tensor(indices, dtype=torch.int64)
    return torch.randn(rows, width), torch.randn(*indices.shape, width).to(dtype), indices


def assert_right(backend, args, **options):
    new = embedding(*args, backend, **options)
    assert Expected(*args, **options).contains(new).all()


def runs_of(*lengths):
    """Indices in which row v comes lengths[v] times, in any order."""
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return rows[torch.randperm(len(rows))]


# --- the truth


# Every size with every dtype, and in the interpreter with one: a gradient is float32 once it is
# loaded, and what happens to it then does not depend on what it was.


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_widths_and_numbers_of_tokens(backend, store):
    sizes = (
        *((t, 40) for t in (0, 1, 2, 7, 63, 64, 65, 128, 129)),
        *((9, w) for w in (0, 1, 2, 3, 7, 8, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 8)),
    )
    for number, (tokens, width) in enumerate(sizes):
        for dtype in backend.in_turn(DTYPES, number + store):
            args = arguments(13, width, torch.randint(13, (tokens,)), dtype)
            assert_right(backend, args, store=store, scale=-0.37, inv_scale=3.0)
    for dtype in DTYPES:
        assert_right(backend, arguments(0, 5, [], dtype), store=store)


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_repeated_rows(backend, store):
    """Runs of the sorted tokens that lie within blocks of any length, fill them, or cross them."""
    cases = (
        (2, 0, 3),
        (64, 64),
        (1, 64, 1),
        (63, 1, 65, 128, 2, 1),
        (32, 100, 0, 300, 31, 1),
        (1, 700, 64),
    )
    for number, lengths in enumerate(cases):
        for dtype in backend.in_turn(DTYPES, number + store):
            args = arguments(len(lengths), 12, runs_of(*lengths), dtype)
            assert_right(backend, args, store=store, scale=0.37)


def test_bound_tells_wrong_results_from_right_ones(backend):
    main, grads, indices = args = arguments(20, 8, runs_of(1, 0, 2, 7, 64, 65, 129))
    expected = Expected(*args, scale=0.37)
    right = embedding(*args, backend, scale=0.37)
    assert expected.contains(right).all()
    for row in indices.unique().tolist():  # without one of the row's tokens
        token = int((indices == row).nonzero()[-1])
        fewer = torch.arange(len(indices)) != token
        wrong = embedding(main, grads[fewer], indices[fewer], backend, scale=0.37)
        is_right = expected.contains(wrong)
        assert not is_right[row].all() and is_right[torch.arange(20) != row].all()
    assert not expected.contains(embedding(*args, backend, scale=0.3701)).all()
    assert not expected.contains(main + (right - main).bfloat16()).all()  # 16 bits on the way
    moved = right.clone()
    moved[1, 3] = torch.nextafter(moved[1, 3], torch.tensor(9.0))  # a row that nobody looked up
    assert expected.contains(moved).sum() == moved.numel() - 1


def test_one_token_a_row_gives_the_bits_of_an_fma(backend):
    scale, inv_scale = (0.37, 1 / 3) if backend.has_fma else (0.5, 0.25)
    for dtype, store in itertools.product(DTYPES, (False, True)):
        main, grads, indices = arguments(50, 33, torch.randperm(50)[:40], dtype)
        dense = torch.zeros(main.shape, dtype=dtype).index_copy(0, indices, grads)
        expected = torch.zeros_like(main) if store else main.clone()
        rows = expected[indices]
        ops.accumulate_(
            rows,
            dense[indices],
            scale=scale,
            inv_scale=torch.tensor(inv_scale),
            store=store,
            backend="reference",
        )
        expected[indices] = rows
        new = embedding(
            main, grads, indices, backend, scale=scale, inv_scale=inv_scale, store=store
        )
        oracle.assert_same_bits(new, expected)


def test_sums_that_16_bits_would_lose(backend):
    indices = torch.zeros(300, dtype=torch.int64)
    grads = torch.ones(300, 3, dtype=torch.bfloat16)
    new = embedding(torch.full((2, 3), 256.0), grads, indices, backend)
    assert new.tolist() == [[556.0] * 3, [256.0] * 3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_index_dtypes(backend, dtype):
    main, grads, indices = arguments(9, 12, torch.randint(9, (130,)))
    expected = embedding(main, grads, indices, backend)
    new = embedding(main, grads, indices.to(dtype), backend, padding_idx=None)
    oracle.assert_same_bits(new, expected)
    assert Expected(main, grads, indices).contains(new).all()


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_padding_rows_get_nothing(backend, store):
    for lengths, padding_idx in itertools.product(((3, 70, 1, 2), (0, 0, 0, 130)), (0, 1, -1)):
        args = main, grads, indices = arguments(4, 12, runs_of(*lengths))
        new = embedding(*args, backend, padding_idx=padding_idx, store=store)
        assert Expected(*args, padding_idx=padding_idx, store=store).contains(new).all()
        grads[indices == padding_idx % 4] = math.nan
        again = embedding(*args, backend, padding_idx=padding_idx, store=store)
        oracle.assert_same_bits(again, new)
        if not store:
            oracle.assert_same_bits(new[padding_idx], main[padding_idx])


def test_stale_values_are_never_read_by_a_store(backend):
    main, grads, indices = arguments(6, 12, [1, 4, 1])
    new = embedding(torch.full_like(main, math.nan), grads, indices, backend, store=True)
    assert Expected(main, grads, indices, store=True).contains(new).all()


def test_bad_gradients_reach_their_element_alone(backend):
    for value, lengths in itertools.product(
        (math.nan, math.inf), ((3, 2, 1), (64, 65, 3), (9, 300))
    ):
        main, grads, indices = arguments(3, 40, runs_of(*lengths), torch.float16)
        token = int((indices == 1).nonzero()[0])
        grads[token, 5] = value
        new = embedding(main, grads, indices, backend)
        is_bad = torch.zeros(main.shape, dtype=torch.bool)
        is_bad[1, 5] = True
        assert torch.equal(new.isfinite(), ~is_bad)


def test_same_inputs_give_the_same_bits(backend):
    main, grads, indices = arguments(30, 200, torch.cat([runs_of(5, 80, 0, 150), torch.arange(30)]))
    runs = []
    for _ in range(3):
        slots = torch.zeros(ops.num_chunks(main.numel()), device=backend.device)
        new = embedding(main, grads, indices, backend, scale=0.37, partials=slots)
        runs.append(torch.cat([new.view(-1), slots.cpu()]))
    oracle.assert_same_bits(runs[1], runs[0])
    oracle.assert_same_bits(runs[2], runs[0])


def test_float64_main_gradients_are_summed_in_float64():
    for dtype, backend in itertools.product((*DTYPES, torch.float64), ("reference", "auto")):
        main = torch.randn(5, 7, dtype=torch.float64)
        grads, indices = torch.randn(40, 7, dtype=torch.float64).to(dtype), torch.randint(5, (40,))
        slots = torch.empty(1, dtype=torch.float64)
        new = main.clone()
        ops.embedding_accumulate_(new, grads, indices, scale=0.1, partials=slots, backend=backend)
        exact = main.index_add(0, indices, grads.double() * 0.1)
        assert torch.allclose(new, exact, rtol=1e-13, atol=1e-13)
        assert slots.item() == pytest.approx(float(new.square().sum()), rel=1e-12)


# --- layouts


def every_third(values):
    wide = values.new_full((*values.shape[:-1], values.shape[-1] * 3), 7)
    wide[..., 1::3] = values
    return wide[..., 1::3]


def transposed(values):
    return values.mT.contiguous().mT


def unaligned(values):
    return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)


def backwards(values):
    """Minus signs that torch has not carried out yet."""
    return torch._neg_view(-values)


def same_rows(values):
    return values[..., :1, :].expand(values.shape)


def same_columns(values):
    return values[..., :1].expand(values.shape)


LAYOUTS = (torch.clone, every_third, transposed, unaligned, same_rows, same_columns)


@pytest.mark.parametrize("layout", (*LAYOUTS, backwards), ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_layouts_of_the_gradient(backend, dtype, layout):
    main, grads, indices = arguments(9, 24, torch.randint(9, (2, 35)), dtype)
    grads = grads.to(backend.device)
    for shape in backend.in_turn(((2, 35), (70,)), (*LAYOUTS, backwards).index(layout)):
        assert_right(backend, (main, layout(grads.view(*shape, 24)), indices.view(shape)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_the_indices(backend, layout):
    main, grads, indices = arguments(9, 24, torch.randint(9, (5, 14)))
    assert_right(backend, (main, grads, layout(indices.to(backend.device))))


def test_shapes_of_the_indices(backend):
    main, grads, indices = arguments(9, 24, torch.randint(9, (30,)))
    expected = embedding(main, grads, indices, backend)
    for shape in ((2, 15), (2, 3, 5), (1, 30, 1)):
        new = embedding(main, grads.view(*shape, 24), indices.view(shape), backend)
        oracle.assert_same_bits(new, expected)
    assert_right(backend, (main, grads[0], indices[0]))
    assert_right(backend, (main, grads.view(2, 15, 24)[:, :0], indices.view(2, 15)[:, :0]))


def test_zero_tensors(backend):
    main, grads, indices = arguments(3, 8, [0, 2, 0])
    zero = torch._efficientzerotensor(grads.shape, dtype=grads.dtype, device=backend.device)
    new = main.to(backend.device, copy=True)
    ops.embedding_accumulate_(new, zero, indices.to(backend.device), backend=backend.name)
    assert torch.equal(new.cpu(), main)


def test_a_lazily_negated_gradient_that_reaches_the_kernels(backend):
    """The autograd nodes call the kernels past torch's dispatcher, which resolves such views."""
    main, grads, indices = arguments(3, 8, [0, 2, 0])
    new = main.to(backend.device, copy=True)
    dispatch.module(backend.name).embedding_accumulate_(
        new,
        torch._neg_view(-grads.to(backend.device)),
        indices.to(backend.device),
        None,
        1.0,
        None,
        False,
        None,
    )
    assert Expected(main, grads, indices).contains(new).all()


def test_nothing_is_written_around_main(backend):
    for (rows, width), shift in itertools.product(((9, 24), (5, 7), (3, 1030)), (0, 1, 4)):
        main, grads, indices = arguments(rows, width, torch.randint(rows, (20,)))
        memory = torch.randn(main.numel() + 16, device=backend.device)
        before = memory.to("cpu", copy=True)
        view = memory[shift : shift + main.numel()].view(rows, width)
        main = view.to("cpu", copy=True)
        slots = torch.full((ops.num_chunks(main.numel()) + 2,), -7.0, device=backend.device)
        ops.embedding_accumulate_(
            view,
            grads.to(backend.device),
            indices.to(backend.device),
            store=shift == 1,
            partials=slots[1:-1],
            backend=backend.name,
        )
        assert Expected(main, grads, indices, store=shift == 1).contains(view).all()
        after = memory.cpu()
        assert torch.equal(after[:shift], before[:shift])
        assert torch.equal(after[shift + main.numel() :], before[shift + main.numel() :])
        assert slots[0] == slots[-1] == -7


# --- statistics

SHAPES = ((200, 40), (40, 100), (20, CHUNK), (20, 2 * CHUNK), (9, CHUNK + 3), (4, 3000), (5000, 1))


def is_renewed(main, rows):
    """Tells of each chunk whether it holds an element of the rows."""
    is_element = torch.zeros(main.shape, dtype=torch.bool)
    is_element[rows] = True
    return [bool(chunk.any()) for chunk in is_element.view(-1).split(CHUNK)]


def assert_slots(slots, main):
    exact = oracle.square_sums(main.reshape(-1), CHUNK)
    lengths = [len(chunk) for chunk in main.reshape(-1).split(CHUNK)]
    assert all(map(oracle.is_square_sum, slots.tolist(), exact, lengths))
    # One square left out is more than the bound forgives.
    largest = float(main.reshape(-1)[: lengths[0]].double().square().max())
    assert largest == 0 or not oracle.is_square_sum(exact[0] - largest, exact[0], lengths[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slots_of_rows_that_were_looked_up_are_renewed(backend, shape):
    rows = shape[0]
    cases = (
        (torch.randint(rows, (7,)), None),
        (torch.tensor([0, rows - 1, 0]), None),
        (torch.arange(rows)[:200], 1),
        (torch.full((130,), rows // 2), None),
        (torch.full((3,), 1), 1),
        (torch.tensor([2, 1, 3]), 2),
        (torch.tensor([], dtype=torch.int64), None),
    )
    for indices, padding_idx in backend.in_turn(cases, SHAPES.index(shape)):
        main, grads, _ = arguments(*shape, indices)
        # What an add leaves alone keeps this value, and what it renews loses it.
        slots = torch.full((ops.num_chunks(main.numel()),), math.nan)
        looked_up = indices[indices != padding_idx] if padding_idx is not None else indices
        renewed = torch.tensor(is_renewed(main, looked_up))
        expected_slots = torch.tensor(oracle.square_sums(main.view(-1), CHUNK)).float()
        slots = torch.where(renewed, slots, expected_slots + 1).to(backend.device)
        new = embedding(main, grads, indices, backend, padding_idx=padding_idx, partials=slots)
        slots = slots.cpu()
        oracle.assert_same_bits(slots[~renewed], expected_slots[~renewed] + 1)
        assert_slots(torch.where(renewed, slots, expected_slots), new)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_store_writes_all_slots(backend, shape):
    cases = ([0, 3, 3], [shape[0] - 1], [], [1] * 70)
    for indices in backend.in_turn(cases, SHAPES.index(shape)):
        main, grads, indices = arguments(*shape, indices)
        slots = torch.full((ops.num_chunks(main.numel()),), math.nan, device=backend.device)
        new = embedding(main, grads, indices, backend, store=True, partials=slots)
        assert_slots(slots.cpu(), new)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_element_marks_its_chunk_alone(backend, value):
    places = ((0, 0), (2, 17), (3, -1))
    cases = [
        (shape, place)
        for number, shape in enumerate(SHAPES[:6])
        for place in backend.in_turn(places, number + math.isnan(value))
    ]
    for shape, (row, column) in cases:
        main, grads, indices = arguments(*shape, torch.arange(4))
        grads[row, column] = value
        slots = torch.zeros(ops.num_chunks(main.numel()), device=backend.device)
        embedding(main, grads, indices, backend, partials=slots)
        chunk = (row * shape[1] + column % shape[1]) // CHUNK
        assert slots.isnan().nonzero().flatten().tolist() == [chunk]


def test_finite_elements_are_never_called_infinite(backend):
    main, grads, indices = arguments(4, 3000, [1, 1, 3])
    main[1, 5] = main[1, 2999] = 2e19
    slots = torch.zeros(ops.num_chunks(main.numel()), device=backend.device)
    new = embedding(main, grads, indices, backend, partials=slots)
    assert new.isfinite().all()
    assert slots.isinf().sum() == 2 and not slots.isnan().any()


# --- a factor of 0


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_factor_of_0_leaves_the_gradient_out(backend, store):
    """Of runs within a block of the sorted tokens, and of those that cross blocks."""
    runs = ((2, 1, 3), (63, 1, 65, 130))
    cases = [
        (lengths, factor, dtype)
        for number, factor in enumerate(ZERO_FACTORS)
        for lengths in backend.in_turn(runs, number + store)
        for dtype in backend.in_turn(DTYPES, number // 2 + store)
    ]
    for lengths, factor, dtype in cases:
        indices = runs_of(*lengths)
        grads = poisoned((len(indices), CHUNK), dtype)
        main = delicate((len(lengths) + 1, CHUNK))
        slots = torch.full((len(main),), 7.0, device=backend.device)
        new = embedding(main, grads, indices, backend, store=store, partials=slots, **factor)
        expected = torch.zeros_like(main) if store else main
        oracle.assert_same_bits(new, expected)
        exact = oracle.square_sums(expected.view(-1), CHUNK)
        assert slots[0].isnan() if math.isinf(exact[0]) else slots[0] == exact[0]
        assert all(
            oracle.is_square_sum(slot, e, CHUNK)
            for slot, e in zip(slots.tolist()[1:-1], exact[1:-1], strict=True)
        )
        assert slots[-1] == (0 if store else 7)  # of a row that nobody looked up


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("factor", TINY_FACTORS, ids=str)
def test_any_other_factor_lets_nan_through(backend, factor, store):
    for lengths in ((1, 1), (3, 130)):
        main, grads, indices = arguments(3, 40, runs_of(*lengths))
        grads[(indices == 1).nonzero()[0], 5] = math.nan
        new = embedding(main, grads, indices, backend, store=store, **factor)
        is_bad = torch.zeros(main.shape, dtype=torch.bool)
        is_bad[1, 5] = True
        assert torch.equal(new.isnan(), is_bad)


# --- what it refuses


def valid(device):
    """Arguments that no check objects to; each case spoils some of them."""
    return {
        "main_grad": torch.randn(5, 8, device=device),
        "grad_output": torch.randn(2, 3, 8, device=device).bfloat16(),
        "indices": torch.tensor([[0, 4, 1], [1, 1, 3]], device=device),
        "padding_idx": 3,
        "scale": 0.5,
        "inv_scale": torch.tensor(0.5, device=device),
        "partials": torch.randn(1, device=device),
    }


def overlapping(a, name, other="main_grad"):
    """An argument that shares its first memory with what the call writes."""
    memory = torch.zeros(64, device=a["main_grad"].device)
    shared = {
        "inv_scale": memory[:1],
        "grad_output": memory[:48].view(2, 3, 8),
        "indices": memory[:6].view(torch.int32).view(2, 3),
        "partials": memory[:1],
    }[name]
    written = {"main_grad": memory[:40].view(5, 8), "partials": memory[:1]}[other]
    return {other: written, name: shared}


REFUSED = {
    "scale": (
        lambda a: {"scale": -math.inf},
        ValueError,
        "scale must be finite in float32, got -inf",
    ),
    "main-float16": (
        lambda a: {"main_grad": a["main_grad"].half()},
        TypeError,
        rf"main_grad must be {MAIN_DTYPES}, got torch\.float16",
    ),
    "main-strides": (
        lambda a: {"main_grad": torch.randn(5, 16, device=a["main_grad"].device)[:, ::2]},
        ValueError,
        r"main_grad must be contiguous, got sizes \[5, 8\] with other strides",
    ),
    "main-sparse": (
        lambda a: {"main_grad": a["main_grad"].to_sparse()},
        ValueError,
        r"main_grad must be contiguous, got sizes \[5, 8\] of a sparse layout",
    ),
    "main-requires-grad": (
        lambda a: {"main_grad": a["main_grad"].requires_grad_()},
        ValueError,
        r"main_grad must not require grad: pass a detached tensor or its \.data",
    ),
    "main-dimensions": (
        lambda a: {"main_grad": a["main_grad"][None].contiguous()},
        ValueError,
        r"main_grad must have 2 dimensions, got shape \[1, 5, 8\]",
    ),
    "inv-scale-float64": (
        lambda a: {"inv_scale": a["inv_scale"].double()},
        TypeError,
        r"inv_scale must be torch\.float32, got torch\.float64",
    ),
    "indices-float32": (
        lambda a: {"indices": a["indices"].float()},
        TypeError,
        r"indices must be torch\.int32 or torch\.int64, got torch\.float32",
    ),
    "indices-int16": (
        lambda a: {"indices": a["indices"].short()},
        TypeError,
        r"indices must be torch\.int32 or torch\.int64, got torch\.int16",
    ),
    "indices-sparse": (
        lambda a: {"indices": a["indices"].to_sparse()},
        ValueError,
        "indices must be a strided tensor",
    ),
    "grad-output-float64": (
        lambda a: {"grad_output": a["grad_output"].double()},
        TypeError,
        rf"grad_output must be {GRAD_DTYPES}, got torch\.float64",
    ),
    "grad-output-sparse": (
        lambda a: {"grad_output": a["grad_output"].to_sparse()},
        ValueError,
        "grad_output must be a strided tensor",
    ),
    "grad-output-width": (
        lambda a: {"grad_output": a["grad_output"][..., :7]},
        ValueError,
        r"grad_output must have shape \[2, 3, 8\], got \[2, 3, 7\]",
    ),
    "grad-output-tokens": (
        lambda a: {"grad_output": a["grad_output"][:1]},
        ValueError,
        r"grad_output must have shape \[2, 3, 8\], got \[1, 3, 8\]",
    ),
    "grad-output-flat": (
        lambda a: {"grad_output": a["grad_output"].view(6, 8)},
        ValueError,
        r"grad_output must have shape \[2, 3, 8\], got \[6, 8\]",
    ),
    **{
        f"padding-{padding_idx}": (
            lambda a, padding_idx=padding_idx: {"padding_idx": padding_idx},
            ValueError,
            rf"padding_idx must lie in \[-5, 5\), got {padding_idx}",
        )
        for padding_idx in (5, -6, 2**40)
    },
    "partials-shape": (
        lambda a: {"partials": a["partials"].new_zeros(2)},
        ValueError,
        r"partials must be contiguous of shape \[num_chunks\(numel\)\] = \[1\], got \[2\]",
    ),
    "partials-overlap": (
        lambda a: overlapping(a, "partials"),
        ValueError,
        "partials must not overlap in memory: an element can be updated once a call",
    ),
    **{
        f"{name}-overlaps-{other}": (
            lambda a, name=name, other=other: overlapping(a, name, other),
            ValueError,
            f"{name} must not overlap {what} in memory: pass a clone",
        )
        for name in ("inv_scale", "indices", "grad_output")
        for other, what in (("main_grad", "a main gradient"), ("partials", "partials"))
    },
}


@pytest.mark.parametrize("change, error, message", cases(REFUSED))
def test_refuses(backend, change, error, message):
    args = valid(backend.device)
    args |= change(args)
    message = f"embedding_accumulate_: {message}"
    assert_refused(ops.embedding_accumulate_, args, backend.name, error, message)


def test_the_valid_arguments_are_valid(backend):
    args = valid(backend.device)
    before = args["main_grad"].clone()
    ops.embedding_accumulate_(**args, backend=backend.name)
    changed = (args["main_grad"] != before).any(1)
    assert changed.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("name", ["grad_output", "indices", "inv_scale", "partials"])
def test_refuses_a_tensor_without_memory(backend, name):
    args = valid(backend.device)
    args[name] = args[name].to("meta")
    message = rf"embedding_accumulate_: {name} must be on {backend.device}(:0)?, got meta"
    assert_refused(ops.embedding_accumulate_, args, backend.name, ValueError, message)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_out_of_range(backend, dtype):
    if backend.device == "cuda" and backend.name != "reference":
        pytest.skip("stops the kernel: tested in a process of its own")
    for bad, store in itertools.product((5, -1, 2**31 - 1, -(2**31)), (False, True)):
        args = valid(backend.device) | {"store": store}
        args["indices"] = args["indices"].to(dtype)
        args["indices"][1, 0] = bad
        args["indices"][1, 2] = 77  # the first one is named
        message = rf"embedding_accumulate_: indices must lie in \[0, 5\), got {bad}"
        assert_refused(ops.embedding_accumulate_, args, backend.name, ValueError, message)


def test_index_into_no_rows(backend):
    if backend.device == "cuda" and backend.name != "reference":
        pytest.skip("stops the kernel: tested in a process of its own")
    args = {
        "main_grad": torch.zeros(0, 8, device=backend.device),
        "grad_output": torch.zeros(1, 8, device=backend.device),
        "indices": torch.zeros(1, dtype=torch.int64, device=backend.device),
    }
    message = r"embedding_accumulate_: indices must lie in \[0, 0\), got 0"
    assert_refused(ops.embedding_accumulate_, args, backend.name, ValueError, message)
    args |= {"indices": args["indices"][:0], "grad_output": args["grad_output"][:0]}
    message = r"embedding_accumulate_: padding_idx must lie in \[0, 0\), got 0"
    args["padding_idx"] = 0
    assert_refused(ops.embedding_accumulate_, args, backend.name, ValueError, message)


OUT_OF_RANGE = """
import torch
from gradacc_kernels import ops
main = torch.zeros(5, 8, device="cuda")
indices = torch.tensor([1, {bad}, 2], device="cuda")
ops.embedding_accumulate_(main, torch.ones(3, 8, device="cuda"), indices, backend="{backend}")
print("launched")
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.parametrize("bad", [5, -1])
def test_index_out_of_range_stops_the_kernel(cuda_backend, bad):
    for index, is_bad in ((bad, True), (4, False)):
        code = OUT_OF_RANGE.format(bad=index, backend=cuda_backend.name)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        # An assertion of an early kernel may surface while a later one is being launched.
        assert is_bad or "launched" in result.stdout, result.stderr
        is_reported = "Assertion" in result.stderr
        assert ("finished" not in result.stdout) == is_reported == is_bad, result.stderr


# --- torch's rules for ops


def op_calls(backend):
    """Calls with every kind of argument in use."""
    args = valid(backend.device)
    options = {
        **{name: args[name] for name in ("padding_idx", "scale", "inv_scale", "partials")},
        "backend": backend.name,
    }
    again = valid(backend.device)
    return (
        ((args["main_grad"], args["grad_output"], args["indices"]), options),
        (
            (again["main_grad"], again["grad_output"].float(), again["indices"].int()),
            {"store": True, "backend": backend.name},
        ),
    )


def test_opcheck(backend):
    for args, kwargs in op_calls(backend):
        torch.library.opcheck(OP, args, kwargs)


def test_compiled_function_gives_the_eager_result(backend):
    def step(main, grads, indices, slots):
        ops.embedding_accumulate_(
            main, grads, indices, padding_idx=2, scale=0.5, partials=slots, backend=backend.name
        )
        return main * 2

    def inputs():
        torch.manual_seed(0)
        args = (x.to(backend.device) for x in arguments(9, 8, [[1, 5], [2, 5]]))
        return *args, torch.zeros(1, device=backend.device)

    torch.compiler.reset()
    eager, compiled = inputs(), inputs()
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    oracle.assert_same_bits(actual, expected)
    for got, want in zip((compiled[0], compiled[3]), (eager[0], eager[3]), strict=True):
        oracle.assert_same_bits(got, want)


def test_what_is_written_has_a_new_version(backend):
    for args, kwargs in op_calls(backend):
        tensors = [*args, *(v for v in kwargs.values() if isinstance(v, torch.Tensor))]
        written = [args[0], kwargs.get("partials")]
        before = [tensor._version for tensor in tensors]
        OP(*args, **kwargs)
        for tensor, version in zip(tensors, before, strict=True):
            assert (tensor._version > version) == any(tensor is other for other in written)


def test_gradient_that_requires_grad_leaves_main_a_leaf(backend):
    main = torch.zeros(3, 4, device=backend.device)
    grads = torch.ones(2, 4, device=backend.device, requires_grad=True)
    indices = torch.tensor([1, 1], device=backend.device)
    for store in (False, True):
        ops.embedding_accumulate_(main, grads, indices, store=store, backend=backend.name)
        assert not main.requires_grad and main.grad_fn is None
        assert main[1].tolist() == [2.0] * 4


# --- what only a GPU has


def test_nothing_waits_for_the_device(cuda_backend):
    calls = op_calls(cuda_backend)
    for args, kwargs in calls:
        OP(*args, **kwargs)  # Triton compiles at the first call
    former = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for args, kwargs in calls:
            OP(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode(former)


def test_captured_calls_replay_as_eager(cuda_backend):
    for args, kwargs in op_calls(cuda_backend):
        start, written = args[0].clone(), [args[0]]
        if kwargs.get("partials") is not None:
            written.append(kwargs["partials"])
        OP(*args, **kwargs)
        OP(*args, **kwargs)
        expected = [tensor.clone() for tensor in written]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            OP(*args, **kwargs)
        args[0].copy_(start)
        graph.replay()
        graph.replay()
        for got, want in zip(written, expected, strict=True):
            oracle.assert_same_bits(got, want)


def test_replay_follows_the_indices(cuda_backend):
    """The rows of a captured call are those of the indices at its replay."""
    main, grads, indices = arguments(50, 40, torch.randint(50, (300,)))
    static = [x.cuda() for x in (torch.zeros_like(main), grads, indices)]
    ops.embedding_accumulate_(*static, backend=cuda_backend.name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.embedding_accumulate_(*static, backend=cuda_backend.name)
    for lengths in ((100, 0, 200), (0, 0, 0, 1, 299)):
        indices = runs_of(*lengths)
        static[0].copy_(main)
        static[2].copy_(indices)
        graph.replay()
        assert Expected(main, grads, indices).contains(static[0]).all()


def test_a_vocabulary(cuda_backend):
    """Indices distributed as words are: few rows many times, many rows once."""
    rank = torch.rand(8192).pow(-1.2).long().clamp(max=31999)
    args = arguments(32000, 256, rank)
    slots = torch.full((ops.num_chunks(args[0].numel()),), math.nan, device="cuda")
    new = embedding(*args, cuda_backend, scale=0.37, store=True, partials=slots)
    assert Expected(*args, scale=0.37, store=True).contains(new).all()
    assert_slots(slots.cpu(), new)


@pytest.mark.large
def test_more_than_2_to_the_31_elements(cuda_backend):
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    rows, width = 2**20 + 9, 2048
    main = torch.zeros(rows, width, device="cuda")
    assert main.numel() > 2**31
    slots = torch.zeros(ops.num_chunks(main.numel()), device="cuda")
    indices = torch.tensor([rows - 1, 0, 2**20, 2**20], device="cuda")
    grads = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda").bfloat16()[:, None].expand(4, width)
    name = cuda_backend.name
    for factor in (1, 2):
        ops.embedding_accumulate_(main, grads, indices, partials=slots, backend=name)
        for row, value in ((rows - 1, 1.0), (0, 2.0), (2**20, 7.0)):
            assert (main[row] == value * factor).all()
        assert main.count_nonzero() == 3 * width
        squares = [slots[chunk].item() for chunk in (0, -1, 2**21)]
        assert squares == [CHUNK * (value * factor) ** 2 for value in (2.0, 1.0, 7.0)]
        assert slots.count_nonzero() == 6
