"""wgrad_accumulate_: on every backend within a derived bound of the float64 sum over tokens."""

import itertools
import math

import oracle
import pytest
import torch
from factor_cases import TINY_FACTORS, ZERO_FACTORS, delicate, poisoned
from test_checks import GRAD_DTYPES, MAIN_DTYPES, assert_refused, cases

from gradacc_kernels import dispatch, ops

pytestmark = pytest.mark.threads  # among which the kernels of the CPU divide their work
CHUNK = ops.CHUNK_SIZE
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS = (0, 1, 7, 63, 64, 65, 127, 128, 129)
OP = torch.ops.gradacc_kernels.wgrad_accumulate_.default


def bound(tokens, magnitude):
    """How far the float32 sum of so many products, scaled and added to main, may lie from exact.

    A tensor core cuts off what it cannot hold, so each of the tokens + 2 operations loses up to
    2^-23 of what has been summed, or up to 2^-149 where that is subnormal.
    """
    return (tokens + 2) * (2.0**-23 * magnitude + 2.0**-149)


def groups_of(main, grad_output, input, offsets):
    """The main gradient, rows of grad_output and rows of input of each weight, on the CPU."""
    main, grad_output, input = (x.detach().cpu().double() for x in (main, grad_output, input))
    if main.dim() == 2:
        tokens = math.prod(input.shape[:-1])
        yield main, *(x.reshape(tokens, x.shape[-1]) for x in (grad_output, input))
    elif offsets is None:
        yield from zip(main, grad_output, input, strict=True)
    else:
        begin = 0
        for weight, end in zip(main, offsets.tolist(), strict=True):
            yield weight, grad_output[begin:end], input[begin:end]
            begin = end


def lies_within(
    new, main, grad_output, input, *, scale=1.0, inv_scale=None, store=False, offsets=None
):
    """Tells element by element whether ``new`` is what the op makes of these arguments."""
    s = oracle.factor(scale, inv_scale)
    result = torch.zeros(new.shape, dtype=torch.bool)
    groups = groups_of(main, grad_output, input, offsets)
    weights, results = (x[None] if new.dim() == 2 else x for x in (new, result))
    for (old, x, y), weight, is_right in zip(groups, weights, results, strict=True):
        old = torch.zeros_like(old) if store else old
        exact = old + x.t() @ y * s
        magnitude = old.abs() + x.abs().t() @ y.abs() * abs(s)
        error = (weight.detach().cpu().double() - exact).abs()
        is_right.copy_(error <= bound(len(x), magnitude))
    return result


def wgrad(main, grad_output, input, backend, *, inv_scale=None, offsets=None, **options):
    """The new main gradient, on the CPU, with main left as it is."""
    new = main.to(backend.device, copy=True)
    result = ops.wgrad_accumulate_(
        new,
        grad_output.to(backend.device),
        input.to(backend.device),
        inv_scale=None if inv_scale is None else torch.tensor(inv_scale, device=backend.device),
        offsets=None if offsets is None else offsets.to(backend.device),
        backend=backend.name,
        **options,
    )
    assert result is new
    return new.cpu()


def arguments(tokens, out_features, in_features, dtype=torch.bfloat16):
    return (
        torch.randn(out_features, in_features),
        torch.randn(tokens, out_features).to(dtype),
        torch.randn(tokens, in_features).to(dtype),
    )


def assert_right(backend, args, **options):
    new = wgrad(*args, backend, **options)
    assert lies_within(new, *args, **options).all()


# --- the truth


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_any_number(backend, dtype, store):
    # Widths of whole vectors, and widths of none.
    factors = ({}, {"scale": 0.37}, {"scale": -0.37, "inv_scale": 3.0})
    for number, tokens in enumerate(TOKENS):
        for wide, (o, i) in enumerate(((72, 136), (33, 7))):
            args = arguments(tokens, o, i, dtype)
            for options in backend.in_turn(factors, number + wide):
                assert_right(backend, args, store=store, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_any_size(backend, dtype):
    for size in (1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 257):
        assert_right(backend, arguments(5, size, 40, dtype), scale=0.5)
        assert_right(backend, arguments(5, 40, size, dtype), scale=0.5)
        assert_right(backend, arguments(5, 1, size, dtype))
        assert_right(backend, arguments(5, size, 1, dtype))
    for o, i in ((0, 3), (3, 0), (0, 0)):
        assert_right(backend, arguments(5, o, i, dtype))


@pytest.mark.parametrize("tokens", [600, 1030, 2100])
def test_many_tokens(backend, tokens):
    """Each of these takes other tiles."""
    args = arguments(tokens, 72, 264)
    assert_right(backend, args, scale=0.25)


def test_bound_tells_wrong_results_from_right_ones(backend):
    for tokens in (1, 7, 129):
        main, x, y = args = arguments(tokens, 40, 24)
        options = {"scale": 0.37}

        def all_right(new, args=args, options=options):
            return bool(lies_within(new, *args, **options).all())

        right = wgrad(*args, backend, **options)
        assert all_right(right)
        assert not all_right(wgrad(main, x[1:], y[1:], backend, **options))  # a token is missing
        assert not all_right(wgrad(*args, backend, scale=0.3701))
        assert not all_right(wgrad(*args, backend, store=True, **options))
        assert not all_right(main + (x.t() @ y * 0.37).float())  # 16 bits on the way
        assert not all_right(wgrad(main, x.roll(1, 1), y, backend, **options))
        moved = right.clone()
        moved[-1, -1] += 2e-3
        assert lies_within(moved, *args, **options).sum() == moved.numel() - 1


def test_exact_sums_are_exact(backend):
    """Integers of few bits, whose sums no float32 operation rounds."""
    for dtype, (o, i) in itertools.product(DTYPES, ((72, 136), (5, 9))):
        main = torch.randint(-99, 99, (o, i)).float()
        x, y = (torch.randint(-15, 16, (200, n)).to(dtype) for n in (o, i))
        new = wgrad(main, x, y, backend, scale=0.5, inv_scale=4.0)
        assert torch.equal(new, (main + 2 * (x.double().t() @ y.double())).float())


def test_window_of_micro_batches(backend):
    """A store, then adds: what one call gives for all tokens, which 16-bit sums do not."""
    main, x, y = arguments(8 * 40, 24, 16)
    new = torch.full_like(main, math.nan).to(backend.device)
    naive = torch.zeros_like(main, dtype=torch.bfloat16)
    for k, (a, b) in enumerate(zip(x.split(40), y.split(40), strict=True)):
        ops.wgrad_accumulate_(
            new, a.to(new.device), b.to(new.device), store=k == 0, backend=backend.name
        )
        naive += a.t() @ b
    assert lies_within(new, main, x, y, store=True).all()
    assert not lies_within(naive.float(), main, x, y, store=True).all()


def test_same_inputs_give_the_same_bits(backend):
    main, x, y = arguments(300, 200, 136)
    runs = []
    for _ in range(3):
        slots = torch.empty(ops.num_chunks(main.numel()), device=backend.device)
        new = wgrad(main, x, y, backend, scale=0.37, partials=slots)
        runs.append(torch.cat([new.view(-1), slots.cpu()]))
    oracle.assert_same_bits(runs[1], runs[0])
    oracle.assert_same_bits(runs[2], runs[0])


def test_float64_main_gradients_are_summed_in_float64():
    for dtype, backend in itertools.product((*DTYPES, torch.float64), ("reference", "auto")):
        main = torch.randn(5, 7, dtype=torch.float64)
        x, y = (torch.randn(9, n, dtype=torch.float64).to(dtype) for n in (5, 7))
        slots = torch.empty(1, dtype=torch.float64)
        new = main.clone()
        ops.wgrad_accumulate_(new, x, y, scale=0.1, partials=slots, backend=backend)
        exact = main + x.double().t() @ y.double() * 0.1
        assert torch.allclose(new, exact, rtol=1e-13, atol=1e-13)
        assert slots.item() == pytest.approx(float(new.square().sum()), rel=1e-12)


# --- layouts


def every_third(values):
    wide = values.new_full((*values.shape[:-1], values.shape[-1] * 3), 7.0)
    wide[..., 1::3] = values
    return wide[..., 1::3]


def padded_rows(values):
    """Rows that are apart in memory, as those of a slice of columns are."""
    return torch.nn.functional.pad(values, (8, 16), value=7.0)[..., 8:-16]


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


LAYOUTS = (
    torch.clone,
    every_third,
    padded_rows,
    transposed,
    unaligned,
    backwards,
    same_rows,
    same_columns,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_layouts(backend, dtype, layout):
    main, *operands = arguments(70, 24, 40, dtype)
    others = [layout(values.to(backend.device)) for values in operands]
    for x, y in (others, (operands[0], others[1]), (others[0], operands[1])):
        assert_right(backend, (main, x, y))
    batch = [layout(values.to(backend.device).view(2, 35, -1)) for values in operands]
    assert_right(backend, (main, *batch))
    assert_right(backend, (torch.stack([main, -main]), *batch))


def test_leading_dimensions(backend):
    main, x, y = arguments(2 * 3 * 5, 24, 40)
    expected = wgrad(main, x, y, backend)
    for shape in ((2, 15), (2, 3, 5), (1, 30, 1)):
        new = wgrad(main, x.view(*shape, 24), y.view(*shape, 40), backend)
        oracle.assert_same_bits(new, expected)
    assert_right(backend, (main, x[0], y[0]))  # one token, without a dimension for it
    assert_right(backend, (main, x.view(2, 15, 24)[:, :0], y.view(2, 15, 40)[:, :0]))
    swapped = x.view(2, 15, 24).transpose(0, 1), y.view(2, 15, 40).transpose(0, 1)
    assert_right(backend, (main, *swapped))


def test_zero_tensors(backend):
    main, x, y = arguments(3, 8, 8)
    zero = torch._efficientzerotensor(y.shape, dtype=y.dtype, device=backend.device)
    new = main.to(backend.device, copy=True)
    ops.wgrad_accumulate_(new, x.to(backend.device), zero, backend=backend.name)
    assert torch.equal(new.cpu(), main)


def test_lazily_negated_operands_that_reach_the_kernels(backend):
    """The autograd nodes call the kernels past torch's dispatcher, which resolves such views."""
    main, x, y = arguments(5, 8, 16)
    new = main.to(backend.device, copy=True)
    x, y = (torch._neg_view(-values.to(backend.device)) for values in (x, y))
    dispatch.module(backend.name).wgrad_accumulate_(new, x, y, 1.0, None, False, None, None)
    assert lies_within(new, main, x.resolve_neg(), y.resolve_neg()).all()


def test_nothing_is_written_around_main(backend):
    for (o, i), shift in itertools.product(((24, 40), (5, 9), (130, 264)), (0, 1, 4)):
        main, x, y = arguments(20, o, i)
        memory = torch.randn(main.numel() + 16, device=backend.device)
        before = memory.to("cpu", copy=True)
        view = memory[shift : shift + main.numel()].view(o, i)
        main = view.to("cpu", copy=True)
        slots = torch.full((ops.num_chunks(o * i) + 2,), -7.0, device=backend.device)
        ops.wgrad_accumulate_(
            view,
            x.to(backend.device),
            y.to(backend.device),
            partials=slots[1:-1],
            backend=backend.name,
        )
        assert lies_within(view, main, x, y).all()
        after = memory.cpu()
        assert torch.equal(after[:shift], before[:shift])
        assert torch.equal(after[shift + o * i :], before[shift + o * i :])
        assert slots[0] == slots[-1] == -7
        assert slots[1:-1].min() >= 0


# --- several weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches(backend, dtype):
    for e, t, o, i in ((1, 5, 8, 8), (3, 70, 24, 40), (5, 9, 5, 7), (2, 0, 8, 8), (0, 4, 8, 8)):
        args = tuple(torch.randn(shape) for shape in ((e, o, i), (e, t, o), (e, t, i)))
        args = args[0], args[1].to(dtype), args[2].to(dtype)
        assert_right(backend, args, scale=0.37)
        assert_right(backend, args, store=True)
    # The bound tells one weight's tokens from another's.
    main, x, y = (torch.randn(shape) for shape in ((3, 8, 16), (3, 4, 8), (3, 4, 16)))
    assert not lies_within(wgrad(main, x.roll(1, 0), y, backend), main, x, y).any(-1).any(-1).any()


def ends_of(*lengths):
    return torch.tensor(lengths).cumsum(0).int()


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_groups(backend, store):
    cases = itertools.product(
        (
            ends_of(5),
            ends_of(64, 1, 63, 65),
            ends_of(0, 3, 0, 0, 129, 0),
            ends_of(0, 0, 0),
            ends_of(200, 0),
        ),
        ((72, 136), (5, 7)),
    )
    for number, (offsets, (o, i)) in enumerate(cases):
        tokens, groups = 200, len(offsets)
        for dtype in backend.in_turn(DTYPES, number + store):
            main, x, y = (torch.randn(n) for n in ((groups, o, i), (tokens, o), (tokens, i)))
            args = main, x.to(dtype), y.to(dtype)
            assert_right(backend, args, offsets=offsets, scale=0.37, store=store)


def test_group_without_tokens_keeps_or_zeroes_its_weight(backend):
    offsets = ends_of(0, 4, 0)
    main, x, y = torch.randn(3, 8, 16), torch.randn(6, 8).half(), torch.randn(6, 16).half()
    new = wgrad(main, x, y, backend, offsets=offsets)
    oracle.assert_same_bits(new[[0, 2]], main[[0, 2]])
    new = wgrad(torch.full_like(main, math.nan), x, y, backend, offsets=offsets, store=True)
    oracle.assert_same_bits(new[[0, 2]], torch.zeros_like(main[[0, 2]]))


def test_tokens_of_other_groups_do_not_matter(backend):
    """Not even where 0 times their value is no number."""
    offsets = ends_of(3, 70, 20)
    for o, i in ((72, 136), (5, 7)):
        main, x, y = torch.randn(3, o, i), torch.randn(120, o).half(), torch.randn(120, i).half()
        expected = wgrad(main, x, y, backend, offsets=offsets)
        x[:3], y[93:] = math.inf, math.nan
        new = wgrad(main, x, y, backend, offsets=offsets)
        oracle.assert_same_bits(new[1:], expected[1:])
        assert not new[0].isfinite().any()
        batch = x[:93].view(3, 31, o), y[:93].view(3, 31, i)
        new = wgrad(main, *batch, backend)
        assert new[1:].isfinite().all() and not new[0].isfinite().any()


def test_offsets_out_of_range_read_nothing_outside(backend):
    main, x, y = torch.randn(4, 8, 16), torch.randn(9, 8), torch.randn(9, 16)
    for offsets, meant in (
        ((2, 5, 100, 2**31 - 1), (2, 5, 9, 9)),
        ((-5, 3, 2, 4), (0, 3, 3, None)),
        ((20, 30, -1, 5), (9, 9, 9, None)),
    ):
        new = wgrad(main, x, y, backend, offsets=torch.tensor(offsets).int())
        begin = 0
        for weight, old, end in zip(new, main, meant, strict=True):
            if end is not None:  # else a group after a decrease: any of the rows, but finite
                assert lies_within(weight, old, x[begin:end], y[begin:end]).all()
            assert weight.isfinite().all()
            begin = end


# --- statistics


def slots_after(args, backend, **options):
    """The new main gradient and its slots, which held something else before."""
    slots = torch.full((ops.num_chunks(args[0].numel()),), math.nan, device=backend.device)
    new = wgrad(*args, backend, partials=slots, **options)
    return new, slots.cpu()


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_slots_together_hold_the_sum_of_squares(backend, store):
    sizes = ((1, 1), (7, 9), (72, 136), (1, 3000), (1500, 1), (65, 129), (257, 72))
    for (o, i), tokens in zip(sizes, itertools.cycle((70, 1, 0)), strict=False):
        args = arguments(tokens, o, i)
        new, slots = slots_after(args, backend, store=store, scale=0.37)
        oracle.assert_same_bits(new, wgrad(*args, backend, store=store, scale=0.37))
        exact = float(new.double().square().sum())
        assert oracle.is_square_sum(float(slots.double().sum()), exact, new.numel())
        sums, *_ = ops.grad_stats(partials=[slots.to(backend.device)], backend=backend.name)
        assert oracle.is_square_sum(sums.item(), exact, new.numel() + 1)
    # A row left out is more than the bound forgives.
    row = float(new[-1].double().square().sum())
    assert not oracle.is_square_sum(exact - row, exact, new.numel())


def test_slots_of_several_weights(backend):
    main, x, y = torch.randn(3, 72, 136), torch.randn(100, 72).half(), torch.randn(100, 136).half()
    batch = x[:99].view(3, 33, 72), y[:99].view(3, 33, 136)
    for args, options in (
        ((main, x, y), {"offsets": ends_of(40, 0, 9)}),
        ((main, *batch), {}),
    ):
        new, slots = slots_after(args, backend, **options)
        exact = float(new.double().square().sum())
        assert oracle.is_square_sum(float(slots.double().sum()), exact, new.numel())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_makes_a_slot_nan(backend, value):
    for (o, i), place in itertools.product(((72, 136), (3, 2000)), ((0, 0), (-1, -1), (1, 70))):
        main, x, y = arguments(20, o, i)
        main[place] = value
        new, slots = slots_after((main, x, y), backend)
        assert new.isfinite().sum() == new.numel() - 1
        assert slots.isnan().any()
        assert ops.grad_stats(partials=[slots.to(backend.device)], backend=backend.name)[2] == 1
        _, slots = slots_after((main, x, y), backend, store=True)
        assert slots.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_inputs_reach_their_row_or_column_and_a_slot(backend, value):
    for (o, i), tokens in itertools.product(((72, 136), (5, 7)), (3, 64, 70)):
        main, x, y = arguments(tokens, o, i, torch.float16)
        x = x.abs() + 0.5  # no zero, so that an infinity stays one
        y[-1, 1] = value
        new, slots = slots_after((main, x, y), backend)
        is_bad = torch.zeros(o, i, dtype=torch.bool)
        is_bad[:, 1] = True
        assert torch.equal(new.isfinite(), ~is_bad)
        assert slots.isnan().any()


def test_finite_elements_are_never_called_infinite(backend):
    for (o, i), value in itertools.product(((72, 136), (3, 2000)), (2e19, -2e19, 3.4e38)):
        main, x, y = arguments(20, o, i)
        main[0, 0] = main[-1, -1] = value
        new, slots = slots_after((main, x, y), backend)
        assert new.isfinite().all()
        assert slots.isinf().any() and not slots.isnan().any()
    main[0, 1] = math.nan  # beside an overflowing square
    assert slots_after((main, x, y), backend)[1].isnan().any()


def test_sum_that_overflows_on_the_way_in(backend):
    largest = torch.finfo(torch.float32).max
    main, x, y = torch.full((8, 16), largest), torch.ones(2, 8).half(), torch.ones(2, 16).half()
    new, slots = slots_after((main, x, y), backend, scale=largest)
    assert new.isinf().all() and slots.isnan().any()
    new, slots = slots_after((main, x, y), backend, scale=-largest / 2)
    assert new.isfinite().all() and not slots.isnan().any()


# --- a factor of 0


def assert_left_out(args, backend, *, store, **options):
    """The operands are not used: the bits of main stay, or are 0, and the slots describe them."""
    new, slots = slots_after(args, backend, store=store, **options)
    expected = torch.zeros_like(args[0]) if store else args[0]
    oracle.assert_same_bits(new, expected)
    exact = float(expected.double().square().sum())
    total = float(slots.double().sum())
    assert (
        math.isnan(total)
        if math.isinf(exact)
        else oracle.is_square_sum(total, exact, expected.numel())
    )


# In the interpreter each size has its turn with the factors, all of which become one number.


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factor_of_0_leaves_the_product_out(backend, dtype, store):
    sizes = itertools.product(((72, 136), (33, 7)), (1, 70))
    for number, ((o, i), tokens) in enumerate(sizes):
        x, y = poisoned((tokens, o), dtype), poisoned((tokens, i), dtype)
        for factor in backend.in_turn(ZERO_FACTORS, number):
            for main in (delicate((o, i)), torch.randn(o, i)):
                assert_left_out((main, x, y), backend, store=store, **factor)


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("factor", ZERO_FACTORS, ids=str)
def test_factor_of_0_leaves_the_products_of_several_weights_out(backend, factor, store):
    for number, (o, i) in enumerate(((72, 136), (5, 7))):
        for dtype in backend.in_turn(DTYPES, number + store + ZERO_FACTORS.index(factor)):
            main, x, y = delicate((3, o, i)), poisoned((90, o), dtype), poisoned((90, i), dtype)
            batch = x.view(3, 30, o), y.view(3, 30, i)
            assert_left_out((main, *batch), backend, store=store, **factor)
            options = {"store": store, "offsets": ends_of(9, 0, 70), **factor}
            assert_left_out((main, x, y), backend, **options)


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("factor", TINY_FACTORS, ids=str)
def test_any_other_factor_lets_nan_through(backend, factor, store):
    main, x, y = arguments(70, 72, 136)
    y[5, 1] = math.nan
    new, slots = slots_after((main, x, y), backend, store=store, **factor)
    is_bad = torch.zeros(main.shape, dtype=torch.bool)
    is_bad[:, 1] = True
    assert torch.equal(new.isnan(), is_bad)
    assert slots.isnan().any()


# --- what it refuses


def valid(device):
    """Arguments that no check objects to; each case spoils some of them."""
    return {
        "main_grad": torch.randn(5, 7, device=device),
        "grad_output": torch.randn(3, 5, device=device).bfloat16(),
        "input": torch.randn(3, 7, device=device).bfloat16(),
        "scale": 0.5,
        "inv_scale": torch.tensor(0.5, device=device),
        "partials": torch.randn(1, device=device),
    }


def grouped(a, offsets, **changes):
    device = a["main_grad"].device
    if isinstance(offsets, list):
        offsets = torch.tensor(offsets, dtype=torch.int32, device=device)
    return {"main_grad": torch.randn(2, 5, 7, device=device), "offsets": offsets, **changes}


def overlapping(a, name):
    """A main gradient whose first elements the other argument reads too, and float32 operands."""
    memory = torch.randn(64, device=a["main_grad"].device)
    operands = {"grad_output": a["grad_output"].float(), "input": a["input"].float()}
    own = {"inv_scale": (1,), "grad_output": (3, 5), "input": (3, 7), "partials": (1,)}[name]
    view = memory[10 : 10 + math.prod(own)].view(own)
    return {**operands, "main_grad": memory[:35].view(5, 7), name: view}


def overlapping_slots(a, name):
    memory = torch.randn(21, device=a["main_grad"].device)
    operands = {"grad_output": a["grad_output"].float(), "input": a["input"].float()}
    own = {"inv_scale": (1,), "grad_output": (3, 5), "input": (3, 7)}[name]
    view = memory[: math.prod(own)].view(own)
    return {**operands, "partials": memory[:1], name: view}


MAIN_OVERLAP = "must not overlap a main gradient in memory: pass a clone"
REFUSED = {
    "scale": (
        lambda a: {"scale": 1e39},
        ValueError,
        r"scale must be finite in float32, got 1e\+39",
    ),
    "main-float16": (
        lambda a: {"main_grad": a["main_grad"].half()},
        TypeError,
        rf"main_grad must be {MAIN_DTYPES}, got torch\.float16",
    ),
    "main-strides": (
        lambda a: {"main_grad": a["main_grad"].t().contiguous().t()},
        ValueError,
        r"main_grad must be contiguous, got sizes \[5, 7\] with other strides",
    ),
    "main-sparse": (
        lambda a: {"main_grad": a["main_grad"].to_sparse()},
        ValueError,
        r"main_grad must be contiguous, got sizes \[5, 7\] of a sparse layout",
    ),
    "main-requires-grad": (
        lambda a: {"main_grad": a["main_grad"].requires_grad_()},
        ValueError,
        r"main_grad must not require grad: pass a detached tensor or its \.data",
    ),
    "main-dimensions": (
        lambda a: {"main_grad": a["main_grad"].flatten()},
        ValueError,
        r"main_grad must have 2 or 3 dimensions, got shape \[35\]",
    ),
    "main-dimensions-grouped": (
        lambda a: grouped(a, [1, 2], main_grad=a["main_grad"]),
        ValueError,
        r"main_grad must have 3 dimensions where offsets are given, got shape \[5, 7\]",
    ),
    "inv-scale-float64": (
        lambda a: {"inv_scale": a["inv_scale"].double()},
        TypeError,
        r"inv_scale must be torch\.float32, got torch\.float64",
    ),
    "inv-scale-size": (
        lambda a: {"inv_scale": a["inv_scale"].expand(2)},
        ValueError,
        r"inv_scale must hold one element, got shape \[2\]",
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
        lambda a: {"grad_output": a["grad_output"][:, :4]},
        ValueError,
        r"grad_output must have shape \[\.\.\., 5\], got \[3, 4\]",
    ),
    "grad-output-scalar": (
        lambda a: {"grad_output": a["grad_output"][0, 0]},
        ValueError,
        r"grad_output must have shape \[\.\.\., 5\], got \[\]",
    ),
    "grad-output-batch": (
        lambda a: {"main_grad": a["main_grad"].expand(2, 5, 7).contiguous()},
        ValueError,
        r"grad_output must have shape \[2, tokens, 5\], got \[3, 5\]",
    ),
    "grad-output-batch-size": (
        lambda a: {
            "main_grad": a["main_grad"].expand(2, 5, 7).contiguous(),
            "grad_output": a["grad_output"].expand(3, 3, 5),
        },
        ValueError,
        r"grad_output must have shape \[2, tokens, 5\], got \[3, 3, 5\]",
    ),
    "grad-output-grouped": (
        lambda a: grouped(a, [1, 2], grad_output=a["grad_output"][None]),
        ValueError,
        r"grad_output must have shape \[tokens, 5\], got \[1, 3, 5\]",
    ),
    "input-int64": (
        lambda a: {"input": a["input"].long()},
        TypeError,
        rf"input must be {GRAD_DTYPES}, got torch\.int64",
    ),
    "input-dtype": (
        lambda a: {"input": a["input"].half()},
        TypeError,
        r"input must have the dtype of grad_output, torch\.bfloat16, got torch\.float16",
    ),
    "input-sparse": (
        lambda a: {"input": a["input"].to_sparse()},
        ValueError,
        "input must be a strided tensor",
    ),
    "input-width": (
        lambda a: {"input": a["input"][:, :6]},
        ValueError,
        r"input must have shape \[3, 7\], got \[3, 6\]",
    ),
    "input-tokens": (
        lambda a: {"input": a["input"][:1]},
        ValueError,
        r"input must have shape \[3, 7\], got \[1, 7\]",
    ),
    "input-dimensions": (
        lambda a: {"input": a["input"][None]},
        ValueError,
        r"input must have shape \[3, 7\], got \[1, 3, 7\]",
    ),
    "offsets-int64": (
        lambda a: grouped(a, torch.tensor([1, 2], device=a["main_grad"].device)),
        TypeError,
        r"offsets must be torch\.int32, got torch\.int64",
    ),
    "offsets-shape": (
        lambda a: grouped(a, [1, 2, 3]),
        ValueError,
        r"offsets must be contiguous of shape \[2\], got \[3\]",
    ),
    "offsets-strides": (
        lambda a: grouped(a, torch.ones(4, dtype=torch.int32, device=a["main_grad"].device)[::2]),
        ValueError,
        r"offsets must be contiguous of shape \[2\], got \[2\]",
    ),
    "partials-shape": (
        lambda a: {"partials": a["partials"].new_zeros(2)},
        ValueError,
        r"partials must be contiguous of shape \[num_chunks\(numel\)\] = \[1\], got \[2\]",
    ),
    "partials-float64": (
        lambda a: {"partials": a["partials"].double()},
        TypeError,
        r"partials must be torch\.float32, got torch\.float64",
    ),
    "partials-overlap": (
        lambda a: overlapping(a, "partials"),
        ValueError,
        "partials must not overlap in memory: an element can be updated once a call",
    ),
    **{
        f"{name}-overlaps-main": (
            lambda a, name=name: overlapping(a, name),
            ValueError,
            f"{name} {MAIN_OVERLAP}",
        )
        for name in ("inv_scale", "grad_output", "input")
    },
    **{
        f"{name}-overlaps-slots": (
            lambda a, name=name: overlapping_slots(a, name),
            ValueError,
            f"{name} must not overlap partials in memory: pass a clone",
        )
        for name in ("inv_scale", "grad_output", "input")
    },
    "offsets-overlap-main": (
        lambda a: {
            "main_grad": (main := torch.randn(2, 5, 7, device=a["main_grad"].device)),
            "offsets": main.view(-1)[3:5].view(torch.int32),
        },
        ValueError,
        f"offsets {MAIN_OVERLAP}",
    ),
}


@pytest.mark.parametrize("change, error, message", cases(REFUSED))
def test_refuses(backend, change, error, message):
    args = valid(backend.device)
    args |= change(args)
    assert_refused(
        ops.wgrad_accumulate_, args, backend.name, error, f"wgrad_accumulate_: {message}"
    )


def test_the_valid_arguments_are_valid(backend):
    args = valid(backend.device)
    before = args["main_grad"].clone()
    ops.wgrad_accumulate_(**args, backend=backend.name)
    assert not torch.equal(args["main_grad"], before)


@pytest.mark.parametrize("name", ["grad_output", "input", "inv_scale", "partials", "offsets"])
def test_refuses_a_tensor_without_memory(backend, name):
    args = valid(backend.device)
    if name == "offsets":
        args |= grouped(args, [1, 2], partials=None)
    args[name] = args[name].to("meta")
    message = rf"wgrad_accumulate_: {name} must be on {backend.device}(:0)?, got meta"
    assert_refused(ops.wgrad_accumulate_, args, backend.name, ValueError, message)


# --- torch's rules for ops


def op_calls(backend):
    """Calls with every kind of argument in use."""
    options = {
        "scale": 0.5,
        "inv_scale": torch.tensor(0.25, device=backend.device),
        "backend": backend.name,
    }

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, device=backend.device).to(dtype)

    half = torch.float16
    offsets = torch.tensor([2, 3], dtype=torch.int32, device=backend.device)
    return (
        ((random(8, 16), random(3, 8), random(3, 16)), {**options, "partials": random(1)}),
        ((random(8, 16), random(2, 3, 8), random(2, 3, 16)), {**options, "store": True}),
        (
            (random(2, 8, 16), random(2, 3, 8, dtype=half), random(2, 3, 16, dtype=half)),
            {**options, "partials": random(1)},
        ),
        (
            (random(2, 8, 16), random(4, 8, dtype=half), random(4, 16, dtype=half)),
            {**options, "partials": random(1), "offsets": offsets},
        ),
    )


def test_opcheck(backend):
    for args, kwargs in op_calls(backend):
        torch.library.opcheck(OP, args, kwargs)


def test_compiled_function_gives_the_eager_result(backend):
    def step(main, x, y, slots):
        ops.wgrad_accumulate_(main, x, y, scale=0.5, partials=slots, backend=backend.name)
        ops.wgrad_accumulate_(main, x, y, store=x.shape[0] == 1, backend=backend.name)
        return main * 2

    def inputs():
        torch.manual_seed(0)
        args = (x.to(backend.device) for x in arguments(9, 8, 16))
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


def test_operands_that_require_grad_leave_main_a_leaf(backend):
    main = torch.zeros(8, 16, device=backend.device)
    x = torch.ones(3, 8, device=backend.device, requires_grad=True)
    y = torch.ones(3, 16, device=backend.device, requires_grad=True)
    ops.wgrad_accumulate_(main, x, y, backend=backend.name)
    assert not main.requires_grad and main.grad_fn is None
    assert (main == 3).all()


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


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_factor_that_only_the_device_knows(cuda_backend, store):
    """Sizes that take each kernel, and several products where they are too large for one."""
    for tokens, shape, dtype in (
        (64, (4096, 4096), torch.bfloat16),
        (300, (1024, 2056), torch.float16),
        (40, (640, 640), torch.bfloat16),
        (40, (2500, 4100), torch.bfloat16),
        (9, (2500, 4100), torch.float32),
        (9, (20, 700, 700), torch.float16),
    ):
        *batch, o, i = shape
        main, x, y = torch.randn(shape), *(torch.randn(*batch, tokens, n) for n in (o, i))
        args = main, x.to(dtype), y.to(dtype)
        assert_right(cuda_backend, args, store=store, scale=0.37, inv_scale=3.0)
        x, y = (poisoned(values.shape, dtype) for values in args[1:])
        for factor in ZERO_FACTORS:
            assert_left_out((delicate(shape), x, y), cuda_backend, store=store, **factor)


def test_replay_follows_the_factor(cuda_backend):
    """A factor that becomes 0 leaves a captured call's operands out."""
    main = delicate((72, 136)).cuda()
    x, y = (torch.ones(70, n, dtype=torch.bfloat16, device="cuda") for n in main.shape)
    inv_scale = torch.ones((), device="cuda")
    call = {"inv_scale": inv_scale, "backend": cuda_backend.name}
    ops.wgrad_accumulate_(main, x, y, **call)  # Triton compiles at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.wgrad_accumulate_(main, x, y, **call)
    main.copy_(delicate(main.shape))
    for factor, value in ((0.0, math.nan), (0.5, 1.0), (0.0, math.inf)):
        before = main.clone()
        inv_scale.fill_(factor)
        x.fill_(value)
        graph.replay()
        oracle.assert_same_bits(main, before + 35 if factor else before)


def test_large_weights(cuda_backend):
    """Sizes and token counts that take each kernel's main path."""
    for tokens, o, i in ((256, 4096, 4096), (1024, 1024, 2048), (4096, 512, 1024)):
        main, x, y = arguments(tokens, o, i)
        new, slots = slots_after((main, x, y), cuda_backend, scale=0.37)
        assert lies_within(new, main, x, y, scale=0.37).all()
        exact = float(new.double().square().sum())
        assert oracle.is_square_sum(float(slots.double().sum()), exact, new.numel())


@pytest.mark.large
def test_more_than_2_to_the_31_elements(cuda_backend):
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    o, i = 46344, 46352
    assert o * i > 2**31
    main = torch.zeros(o, i, device="cuda")
    slots = torch.full((ops.num_chunks(o * i),), math.nan, device="cuda")
    x = torch.zeros(3, o, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(3, i, dtype=torch.bfloat16, device="cuda")
    x[0, -1], x[1, 0], y[0, -1], y[1, 0] = 2.0, 3.0, 5.0, 7.0
    for factor in (1, 2):
        ops.wgrad_accumulate_(main, x, y, partials=slots, backend=cuda_backend.name)
        assert main[-1, -1] == 10 * factor and main[0, 0] == 21 * factor
        assert main.count_nonzero() == 2
        assert slots.double().sum() == (10 * factor) ** 2 + (21 * factor) ** 2
