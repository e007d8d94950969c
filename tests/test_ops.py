"""The ops: the same bits on every backend, and those bits within a derived bound of the truth."""

import itertools
import math

import oracle
import pytest
import torch
from factor_cases import TINY_FACTORS, ZERO_FACTORS, bit_patterns, delicate, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc_kernels import dispatch, ops

pytestmark = pytest.mark.threads  # among which the kernels of the CPU divide their work
CHUNK = ops.CHUNK_SIZE
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VECTORS = (4, 8, 16, 32)
SIZES = (
    *(0, 1, 2, 7),
    *sorted({vector + d for vector in VECTORS for d in (-1, 0, 1)}),
    *(CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5),
)
OPS = torch.ops.gradacc_kernels


def scalar(value, backend):
    return torch.tensor(value, dtype=torch.float32, device=backend.device)


def scales(backend):
    """A scale and an inv_scale; powers of two where the product must be exact to be summed."""
    return (0.37, 1 / 3) if backend.has_fma else (0.5, 0.25)


def accumulated(main, grad, backend="reference", device="cpu", inv_scale=None, **options):
    """The new main gradient, on the CPU, with main and grad left as they are."""
    main = main.clone().to(device)
    if inv_scale is not None:
        inv_scale = torch.tensor(inv_scale, device=device)
    ops.accumulate_(main, grad.to(device), inv_scale=inv_scale, backend=backend, **options)
    return main.cpu()


def assert_as_reference(backend, main, grad, **options):
    if backend.is_interpreted and grad.dtype == torch.bfloat16:
        # Triton's interpreter misreads bfloat16 subnormals.
        grad = grad.masked_fill(grad.abs() < torch.finfo(grad.dtype).tiny, 0)
    actual = accumulated(main, grad, backend.name, backend.device, **options)
    oracle.assert_same_bits(actual, accumulated(main, grad, **options))


def all_patterns(dtype):
    """Each of the 65536 values of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15).short().view(dtype)


# --- one formula, bit for bit


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_give_the_bits_of_the_reference(other_backend, dtype, store):
    scale, inv_scale = scales(other_backend)
    for shape in (*((size,) for size in SIZES), (), (0, 3), (5, 1, 9)):
        main, grad = torch.randn(shape), torch.randn(shape).to(dtype)
        assert_as_reference(other_backend, main, grad, store=store)
        assert_as_reference(other_backend, main, grad, store=store, scale=scale)
        assert_as_reference(
            other_backend, main, grad, store=store, scale=-scale, inv_scale=inv_scale
        )


def test_comparison_tells_one_rounding_from_two():
    main, grad = torch.randn(CHUNK), torch.randn(CHUNK).bfloat16()
    scale = oracle.float32(0.37)
    once = accumulated(main, grad, scale=scale)
    twice = main + grad.float() * scale
    assert 0 < int((~oracle.same_bits(twice, once)).sum()) < CHUNK


def test_comparison_tells_values_apart():
    x = torch.tensor([1.0, 0.0, math.nan])
    for y in ([1 + 2**-23, 0.0, math.nan], [1.0, -0.0, math.nan], [1.0, 0.0, 0.0]):
        with pytest.raises(AssertionError, match="1 of 3 elements differ"):
            oracle.assert_same_bits(torch.tensor(y), x)
    oracle.assert_same_bits(torch.tensor([0x7FC00001]).int().view(torch.float32), x[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_views_write_nothing_around_them(other_backend, dtype):
    scale, _ = scales(other_backend)
    for n, (shift, grad_shift) in itertools.product(
        (7, 33, CHUNK + 1), ((0, 1), (1, 0), (2, 3), (3, 2), (1, 1))
    ):
        buffer, grads = torch.randn(n + 8), torch.randn(n + 8).to(dtype)
        expected = buffer.clone()
        grad = grads[grad_shift : grad_shift + n]
        expected[shift : shift + n] = accumulated(buffer[shift : shift + n], grad, scale=scale)

        buffer = buffer.to(other_backend.device)
        grad = grads.to(other_backend.device)[grad_shift : grad_shift + n]
        main = buffer[shift : shift + n]
        ops.accumulate_(main, grad, scale=scale, backend=other_backend.name)
        oracle.assert_same_bits(buffer, expected)


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_16_bit_gradient(other_backend, dtype, store):
    grad = all_patterns(dtype)
    scale, inv_scale = scales(other_backend)
    for main in (torch.zeros(grad.shape), torch.randn(grad.shape), bit_patterns(grad.numel())):
        assert_as_reference(other_backend, main, grad, store=store)
    main = torch.randn(grad.shape)
    assert_as_reference(other_backend, main, grad, store=store, scale=scale, inv_scale=inv_scale)


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_random_32_bit_gradients(other_backend, store):
    n = 8 * CHUNK + 3
    main, grad = bit_patterns(n), bit_patterns(n)
    assert_as_reference(other_backend, main, grad, store=store)
    if other_backend.has_fma:
        assert_as_reference(other_backend, main, grad, store=store, scale=1e-3, inv_scale=-3e20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_meet_special_values(other_backend, dtype):
    def specials(dtype):
        info = torch.finfo(dtype)
        last_subnormal = info.tiny - info.smallest_normal * info.eps
        smallest = info.smallest_normal * info.eps
        positive = [0.0, smallest, last_subnormal, info.tiny, 1.0, info.max, math.inf]
        return torch.tensor([s * x for x in positive for s in (1, -1)] + [math.nan], dtype=dtype)

    pairs = itertools.product(specials(torch.float32), specials(dtype))
    main, grad = (torch.stack(values) for values in zip(*pairs, strict=True))
    any_scale = (1.5, 3e38) if other_backend.has_fma else ()
    # Triton's interpreter takes a subnormal scale for a float64.
    any_scale += () if other_backend.is_interpreted else (1e-38, 1e-45)
    for scale, store in itertools.product((0.0, 1.0, -1.0, *any_scale), (False, True)):
        assert_as_reference(other_backend, main, grad, scale=scale, store=store)


# --- a factor of 0


def assert_slots(slots, main):
    for slot, exact in zip(slots.tolist(), oracle.square_sums(main, CHUNK), strict=True):
        assert math.isnan(slot) if math.isinf(exact) else oracle.is_square_sum(slot, exact, CHUNK)


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factor_of_0_leaves_the_gradient_out(backend, dtype, store):
    for n, factor in itertools.product((1, 33, CHUNK, 2 * CHUNK + 5), ZERO_FACTORS):
        main, grad = delicate((n,)), poisoned((n,), dtype)
        slots = torch.full((ops.num_chunks(n),), 7.0, device=backend.device)
        new = accumulated(
            main, grad, backend.name, backend.device, store=store, partials=slots, **factor
        )
        expected = torch.zeros_like(main) if store else main
        oracle.assert_same_bits(new, expected)
        assert_slots(slots, expected)


@pytest.mark.parametrize("factor", ZERO_FACTORS, ids=str)
def test_factor_of_0_leaves_the_gradients_of_a_list_out(backend, factor):
    sizes = (1, 7, 33, CHUNK + 1, 2 * CHUNK + 5)
    # One element further than vectors begin.
    mains = [torch.cat([torch.zeros(1), delicate((n,))])[1:] for n in sizes]
    grads = [poisoned((n + 1,), DTYPES[i % 3])[1:] for i, n in enumerate(sizes)]
    stores = [i % 2 == 1 for i in range(len(sizes))]
    expected = [
        torch.zeros_like(main) if store else main.clone()
        for main, store in zip(mains, stores, strict=True)
    ]
    actual = [main.to(backend.device) for main in mains]
    slots = [torch.full((ops.num_chunks(n),), 7.0, device=backend.device) for n in sizes]
    inv_scale = factor.get("inv_scale")
    ops.multi_accumulate_(
        actual,
        [grad.to(backend.device) for grad in grads],
        scale=factor.get("scale", 1.0),
        inv_scale=None if inv_scale is None else scalar(inv_scale, backend),
        stores=stores,
        partials=slots,
        backend=backend.name,
    )
    for got, want, sums in zip(actual, expected, slots, strict=True):
        oracle.assert_same_bits(got, want)
        assert_slots(sums, want)


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("factor", TINY_FACTORS, ids=str)
def test_any_other_factor_lets_nan_through(backend, factor, store):
    for dtype in DTYPES:
        main, grad = torch.randn(CHUNK + 5), torch.randn(CHUNK + 5).to(dtype)
        grad[3::7] = math.nan
        slots = torch.zeros(2, device=backend.device)
        new = accumulated(
            main, grad, backend.name, backend.device, store=store, partials=slots, **factor
        )
        assert torch.equal(new.isnan(), grad.isnan())
        assert slots.isnan().tolist() == [True, True]


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_factor_of_0_in_float64(store):
    main, grad = delicate((40,)).double(), poisoned((40,), torch.float32)
    for inv_scale in (None, torch.tensor(0.0)):
        new = main.clone()
        ops.accumulate_(new, grad, scale=0.0, inv_scale=inv_scale, store=store)
        expected = torch.zeros_like(main) if store else main
        assert torch.equal(new.view(torch.int64), expected.view(torch.int64))


# --- instruction sets and layouts


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    """Each instruction set of the CPU kernels that this CPU has, in turn."""
    extension = dispatch.extension()
    if isinstance(extension, str):
        pytest.skip(extension)
    former = extension.cpu_isa()
    if not extension.select_cpu_isa(request.param):
        pytest.skip(f"this CPU or this build has no {request.param}")
    yield request.param
    assert extension.cpu_isa() == request.param
    extension.select_cpu_isa(former)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_instruction_sets_agree(isa, dtype):
    for n in SIZES:
        main, grad = torch.randn(n), bit_patterns(n, dtype)
        for scale, store in itertools.product((1.0, 0.37), (False, True)):
            expected = accumulated(main, grad, scale=scale, store=store)
            actual = accumulated(main, grad, "cpu", scale=scale, store=store)
            oracle.assert_same_bits(actual, expected)
        (scaled,) = ops.scale_([main.clone()], torch.tensor(0.37), backend="cpu")
        oracle.assert_same_bits(scaled, main * torch.tensor(0.37))


def test_unknown_instruction_set_changes_nothing(isa):
    assert not dispatch.extension().select_cpu_isa("sse9")
    assert dispatch.extension().cpu_isa() == isa


@st.composite
def strided_tensors(draw):
    """A shape, a dense layout of it, and some other layout of it: sizes, two orders, steps."""
    shape = draw(st.lists(st.integers(0, 12), max_size=4))
    orders = [draw(st.permutations(range(len(shape)))) for _ in range(2)]
    steps = draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))
    return shape, *orders, steps


def laid_out(values, order, steps):
    """The same values with other strides: dimensions in another order in memory, and gaps."""
    shape = [values.shape[d] * max(step, 1) for d, step in enumerate(steps)]
    memory = values.new_zeros([shape[d] for d in order])
    view = memory.permute(sorted(range(len(order)), key=lambda d: order[d]))
    view = view[tuple(slice(None, None, max(step, 1)) for step in steps)].copy_(values)
    for d, step in enumerate(steps):
        if step == 0 and view.shape[d]:
            view = view.narrow(d, 0, 1).expand(
                [view.shape[d] if i == d else -1 for i in range(view.dim())]
            )
    return view


@pytest.mark.skipif(dispatch.why_missing("cpu") is not None, reason="the extension is missing")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    strided_tensors(),
    st.sampled_from(DTYPES),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_any_layout_gives_the_bits_of_the_reference(layout, dtype, scale, store, seed):
    shape, main_order, grad_order, steps = layout
    torch.manual_seed(seed)
    n = math.prod(shape)
    main = laid_out(bit_patterns(n).reshape(shape), main_order, [1] * len(shape))
    grad = laid_out(bit_patterns(n, dtype).reshape(shape), grad_order, steps)
    expected = accumulated(main.contiguous(), grad.contiguous(), scale=scale, store=store)
    strides = main.stride()
    for backend in ("cpu", "reference"):
        actual = accumulated(main, grad, backend, scale=scale, store=store)
        oracle.assert_same_bits(actual, expected)
        assert actual.stride() == strides or not n


# --- lists


def test_list_of_mixed_tensors_gives_the_bits_of_the_reference(other_backend):
    scale, inv_scale = scales(other_backend)
    shapes = [(size,) for size in SIZES] + [(), (3, 700), (0, 4)]
    mains = [torch.randn(shape) for shape in shapes]
    grads = [torch.randn(s).to(DTYPES[i % 3]) for i, s in enumerate(shapes)]
    stores = [i % 4 == 1 for i in range(len(shapes))]
    expected = [
        accumulated(main, grad, scale=scale, inv_scale=inv_scale, store=store)
        for main, grad, store in zip(mains, grads, stores, strict=True)
    ]
    for name, device in {("reference", "cpu"), (other_backend.name, other_backend.device)}:
        actual = [main.clone().to(device) for main in mains]
        result = ops.multi_accumulate_(
            actual,
            [grad.to(device) for grad in grads],
            scale=scale,
            inv_scale=torch.tensor([inv_scale], device=device),
            stores=stores,
            backend=name,
        )
        assert result is actual
        for got, want in zip(actual, expected, strict=True):
            oracle.assert_same_bits(got, want)


def test_one_gradient_delivered_to_two_tensors(backend):
    grad = torch.randn(40).bfloat16().to(backend.device)
    mains = [torch.zeros(40, device=backend.device) for _ in range(2)]
    ops.multi_accumulate_(mains, [grad, grad], backend=backend.name)
    for main in mains:
        oracle.assert_same_bits(main, grad.float())


def test_thousands_of_small_tensors(other_backend):
    # More than fit into the arguments of one launch; the interpreter takes its time for each.
    count = 60 if other_backend.is_interpreted else 3000
    sizes = [0 if i % 10 == 3 else 1 + i % 37 for i in range(count)]
    flat, flat_grad = torch.randn(sum(sizes)), torch.randn(sum(sizes))
    stores = [i % 4 == 1 for i in range(count)]
    grads = [g.to(DTYPES[i % 3]) for i, g in enumerate(flat_grad.split(sizes))]
    expected = torch.cat(
        [
            accumulated(main, grad, store=store)
            for main, grad, store in zip(flat.split(sizes), grads, stores, strict=True)
        ]
    )
    actual = flat.to(other_backend.device)
    mains = list(actual.split(sizes))
    slots = [torch.full((ops.num_chunks(n),), math.nan, device=actual.device) for n in sizes]
    name = other_backend.name
    ops.multi_accumulate_(
        mains,
        [grad.to(other_backend.device) for grad in grads],
        stores=stores,
        partials=slots,
        backend=name,
    )
    oracle.assert_same_bits(actual, expected)

    exact = [float(main.double().square().sum()) for main in expected.split(sizes)]
    for options in ({"main_grads": mains}, {"partials": slots}):
        sums, _, found_inf = ops.grad_stats(**options, backend=name)
        assert all(map(oracle.is_square_sum, sums.tolist(), exact, (n + 1 for n in sizes)))
        assert found_inf == 0

    ops.scale_(mains, scalar(0.3, other_backend), backend=name)
    oracle.assert_same_bits(actual, expected * torch.tensor(0.3))


def test_empty_lists(backend):
    assert ops.multi_accumulate_([], [], backend=backend.name) == []
    assert ops.scale_([], scalar(2.0, backend), backend=backend.name) == []


# --- the truth


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_window_stays_within_the_bound(backend, dtype):
    """Up to 1024 micro-batches; their sum in 16 bits leaves the bound at once."""
    scale, inv_scale = scales(backend)
    window = oracle.WindowSum(torch.zeros(67))
    main = torch.zeros(67, device=backend.device)
    naive = torch.zeros(67, dtype=dtype)
    s = scalar(inv_scale, backend)
    for k in range(1, 65 if backend.is_interpreted else 1025):
        grad = (torch.randn(67).abs() + 0.1).to(dtype)
        window.add(grad, oracle.factor(scale, inv_scale))
        naive += grad * oracle.factor(scale, inv_scale)
        ops.accumulate_(
            main, grad.to(backend.device), scale=scale, inv_scale=s, backend=backend.name
        )
        if k.bit_count() == 1:  # 1, 2, 4, ..., 1024
            assert window.contains(main)
            assert k == 1 or not window.contains(naive)


def test_window_of_cancelling_gradients(backend):
    scale, _ = scales(backend)
    start = torch.randn(67) * 100
    window, main = oracle.WindowSum(start), start.to(backend.device)
    for _ in range(100):
        grad = torch.randn(67).half()
        window.add(grad, oracle.factor(scale))
        ops.accumulate_(main, grad.to(backend.device), scale=scale, backend=backend.name)
    assert window.contains(main)
    assert not window.contains(main + 1e-2)


def test_bfloat16_sum_that_bfloat16_loses(backend):
    one = torch.ones(3, dtype=torch.bfloat16, device=backend.device)
    main = torch.full((3,), 256.0, device=backend.device)
    stock = main.bfloat16()
    for _ in range(2):
        ops.accumulate_(main, one, backend=backend.name)
        stock += one
    assert main.tolist() == [258.0] * 3
    assert stock.tolist() == [256.0] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_equals_zero_then_add(backend, dtype):
    scale, _ = scales(backend)
    grad = torch.cat([torch.randn(CHUNK + 1), torch.tensor([0.0, -0.0, 1e-7, -1e-7])]).to(dtype)
    stale = torch.full_like(grad, math.nan, dtype=torch.float32)
    stored = accumulated(stale, grad, backend.name, backend.device, scale=scale, store=True)
    zeros = torch.zeros(grad.shape)
    added = accumulated(zeros, grad, backend.name, backend.device, scale=scale)
    assert torch.equal(stored, added)
    # A store keeps the sign of a zero, which 0 + (-0) loses: all other bits are equal.
    assert stored[CHUNK + 2].signbit() and not added[CHUNK + 2].signbit()
    oracle.assert_same_bits(stored + 0.0, added + 0.0)


def test_float64_main_gradients_are_summed_in_float64():
    start, grad = torch.randn(9, dtype=torch.float64), torch.randn(9).bfloat16()
    for backend in ("reference", "auto"):
        main = start.clone()
        ops.accumulate_(main, grad, scale=0.5, backend=backend)
        ops.accumulate_(main, start, backend=backend)
        assert torch.equal(main, start + grad.double() * 0.5 + start)


def test_float64_main_gradients_take_a_float64_scale():
    main, grad = torch.zeros(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    ops.accumulate_(main, grad, scale=0.1)
    assert torch.equal(main, grad * 0.1)


def test_same_inputs_give_the_same_bits(backend):
    scale, _ = scales(backend)
    main, grad = torch.randn(5 * CHUNK + 3), torch.randn(5 * CHUNK + 3).half()
    runs = []
    for _ in range(3):
        again = main.to(backend.device, copy=True)
        slots = torch.empty(ops.num_chunks(main.numel()), device=backend.device)
        ops.accumulate_(
            again, grad.to(backend.device), scale=scale, partials=slots, backend=backend.name
        )
        stats = ops.grad_stats([again], backend=backend.name)
        runs.append(torch.cat([again, slots, *(s.reshape(-1) for s in stats)]))
    oracle.assert_same_bits(runs[1], runs[0])
    oracle.assert_same_bits(runs[2], runs[0])


# --- layouts

SHAPE = (2, 33, 8, 9)  # several chunks, the last of them not full


def channels_last(values):
    return values.contiguous(memory_format=torch.channels_last)


def transposed(values):
    return values.transpose(1, 3).contiguous().transpose(1, 3)


def expanded(values):
    return values[:, :1].expand(values.shape)


def every_third(values):
    wide = values.new_full((*values.shape[:-1], values.shape[-1] * 3), 7.0)
    wide[..., 1::3] = values
    return wide[..., 1::3]


def backwards(values):
    """Minus signs that torch has not carried out yet."""
    return torch._neg_view(values)


MAIN_LAYOUTS = (torch.clone, channels_last, transposed)
GRAD_LAYOUTS = (torch.clone, channels_last, transposed, expanded, every_third, backwards)


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("main_layout", MAIN_LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(backend, main_layout, grad_layout):
    values = torch.randn(SHAPE)
    main = main_layout(values).to(backend.device)
    grad = grad_layout(torch.randn(SHAPE).bfloat16().to(backend.device))
    before, strides = grad.contiguous().clone(), main.stride()
    expected = accumulated(values, before.cpu())

    ops.accumulate_(main, grad, backend=backend.name)
    oracle.assert_same_bits(main, expected)
    assert main.stride() == strides
    ops.multi_accumulate_([main], [grad], stores=[True], backend=backend.name)
    oracle.assert_same_bits(main, before.float())
    assert torch.equal(grad, before)


def test_a_negated_view_that_reaches_the_kernels(backend):
    """The hook calls the kernels past torch's dispatcher, which resolves such views for the ops."""
    grad = torch.randn(9, device=backend.device)
    main = torch.zeros(9, device=backend.device)
    module = dispatch.module(backend.name)
    module.accumulate_(main, torch._neg_view(grad), 1.0, None, False, None)
    oracle.assert_same_bits(main, -grad)


def sparse(indices, values, size, device):
    coo = torch.sparse_coo_tensor(indices, values, size, check_invariants=True)
    return coo.to(device)


def test_sparse_duplicates_are_summed_in_float32(backend):
    values = torch.tensor([256.0, 1.0, 3.0], dtype=torch.bfloat16)
    grad = sparse([[1, 1, 4]], values, (6,), backend.device)
    assert grad.to_dense()[1].item() != 257  # not a bfloat16
    main = torch.ones(6, device=backend.device)
    ops.accumulate_(main, grad, scale=0.5, backend=backend.name)
    assert main.tolist() == [1.0, 129.5, 1.0, 1.0, 2.5, 1.0]
    assert grad._values().tolist() == values.tolist()


def test_sparse_rows_as_of_an_embedding(backend):
    rows = torch.randn(3, 5).half()
    grad = sparse([[2, 0, 2]], rows, (4, 5), backend.device)
    dense = torch.zeros(4, 5).index_add_(0, torch.tensor([2, 0, 2]), rows.float())
    main = torch.randn(5, 4).t()
    expected = main + dense
    main = main.to(backend.device)
    slots = torch.empty(1, device=backend.device)
    ops.multi_accumulate_([main], [grad], partials=[slots], backend=backend.name)
    oracle.assert_same_bits(main, expected)


# --- statistics


def slots_of(main, backend):
    """The slots of a main gradient as each of the passes writes them."""
    n = ops.num_chunks(main.numel())
    stale = [torch.full((n,), math.nan, device=backend.device) for _ in range(3)]
    zeros, ones = torch.zeros_like(main), torch.ones_like(main)
    ops.accumulate_(main, zeros.half(), partials=stale[0], backend=backend.name)
    ops.multi_accumulate_([main], [zeros], partials=[stale[1]], backend=backend.name)
    ops.accumulate_(ones, main, store=True, partials=stale[2], backend=backend.name)
    return [slots.tolist() for slots in stale]


def chunk_lengths(n):
    return [min(CHUNK, n - begin) for begin in range(0, n, CHUNK)]


@pytest.mark.parametrize("n", [1, 7, 33, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_slots_hold_the_sum_of_squares_of_their_chunk(backend, n):
    # Magnitudes in [1, 2], so that no element is small enough to be missed.
    main = (1 + torch.rand(n)) * (torch.randint(0, 2, (n,)) * 2 - 1)
    exact = oracle.square_sums(main, CHUNK)
    lengths = chunk_lengths(n)
    for slots in slots_of(main.to(backend.device), backend):
        assert len(slots) == len(exact)
        assert all(map(oracle.is_square_sum, slots, exact, lengths))
    # One square left out is more than the bound forgives.
    smallest = float(main[:CHUNK].double().square().min())
    assert not oracle.is_square_sum(exact[0] - smallest, exact[0], lengths[0])


@pytest.mark.parametrize("layout", [channels_last, transposed], ids=lambda f: f.__name__)
def test_chunks_follow_memory_order(backend, layout):
    main = layout(torch.randn(SHAPE))
    exact = oracle.square_sums(main.as_strided((main.numel(),), (1,)), CHUNK)
    for slots in slots_of(main.to(backend.device), backend):
        assert all(map(oracle.is_square_sum, slots, exact, chunk_lengths(main.numel())))


def nan_slots(main, backend):
    """Which chunks each way of computing them calls non-finite."""
    return [[math.isnan(slot) for slot in slots] for slots in slots_of(main, backend)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_marks_its_chunk_alone(backend, value):
    n = 2 * CHUNK + 21
    # The first, the last, odd tails, and both sides of a border between chunks.
    for position in (0, 5, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 2 * CHUNK + 3, n - 2, n - 1):
        main = torch.randn(n, device=backend.device)
        main[position] = value
        expected = [chunk == position // CHUNK for chunk in range(3)]
        assert nan_slots(main, backend) == [expected] * 3
        assert ops.grad_stats([main], backend=backend.name)[2] == 1


@pytest.mark.parametrize("value", [2e19, -2e19, torch.finfo(torch.float32).max, 1e-30, 1e-45])
def test_finite_elements_are_never_called_infinite(backend, value):
    for position in (0, CHUNK, CHUNK + 20):
        main = torch.ones(CHUNK + 21, device=backend.device)
        main[position] = value
        assert nan_slots(main, backend) == [[False, False]] * 3
        sums, norm, found_inf = ops.grad_stats([main], backend=backend.name)
        assert found_inf == 0
        assert sums.isinf().all() == norm.isinf() == (abs(value) > 1)


def test_bad_element_beside_an_overflowing_square(backend):
    main = torch.full((40,), 2e19, device=backend.device)
    main[11] = math.nan
    assert nan_slots(main, backend) == [[True]] * 3
    assert ops.grad_stats([main], backend=backend.name)[2] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_that_overflows_on_the_way_in(backend, dtype):
    """The verdict is on the new main gradient: also when scale or sum are what overflows."""
    largest = torch.finfo(torch.float32).max
    for main, grad, scale, is_bad in (
        (0.0, 1.0, largest, False),
        (largest, 1.0, largest, True),
        (0.0, 2.0, largest, True),
        (math.inf, 1.0, -1.0, True),
        (-largest, 1.0, largest, False),
    ):
        main = torch.full((33,), main, device=backend.device)
        grad = torch.full((33,), grad, dtype=dtype, device=backend.device)
        slots = torch.empty(1, device=backend.device)
        ops.accumulate_(main, grad, scale=scale, partials=slots, backend=backend.name)
        assert bool(slots.isnan()) == is_bad
        assert bool(main.isfinite().all()) != is_bad


def test_statistics_of_a_list(backend):
    mains = [torch.randn(shape) for shape in ((), (0,), (7,), (CHUNK + 1,), (3, 900), (0, 2))]
    exact = [float(main.double().square().sum()) for main in mains]
    mains = [main.to(backend.device) for main in mains]
    slots = [torch.empty(ops.num_chunks(m.numel()), device=backend.device) for m in mains]
    zeros = [torch.zeros_like(main) for main in mains]
    ops.multi_accumulate_(mains, zeros, partials=slots, backend=backend.name)
    for options in ({"main_grads": mains}, {"partials": slots}):
        sums, norm, found_inf = ops.grad_stats(**options, backend=backend.name)
        # Slots are added in float64, so a sum has the roundings of its longest chunk and its own.
        lengths = [min(main.numel(), CHUNK) + 1 for main in mains]
        assert all(map(oracle.is_square_sum, sums.tolist(), exact, lengths))
        assert oracle.is_square_sum(norm.item() ** 2, sum(exact), CHUNK + 4)
        assert found_inf == 0
        assert sums.shape == (len(mains),) and norm.shape == found_inf.shape == ()
        for result in (sums, norm, found_inf):
            assert result.dtype == torch.float32 and result.device == mains[0].device


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_found_inf_in_any_tensor_of_a_list(backend, value):
    sizes = (1, 9, CHUNK + 3)
    for tensor, is_last in itertools.product(range(len(sizes)), (False, True)):
        mains = [torch.randn(size, device=backend.device) for size in sizes]
        mains[tensor][-1 if is_last else 0] = value
        slots = [torch.empty(ops.num_chunks(size), device=backend.device) for size in sizes]
        zeros = [torch.zeros_like(main) for main in mains]
        ops.multi_accumulate_(mains, zeros, partials=slots, backend=backend.name)
        for options in ({"main_grads": mains}, {"partials": slots}):
            sums, norm, found_inf = ops.grad_stats(**options, backend=backend.name)
            assert sums.isnan().tolist() == [i == tensor for i in range(len(sizes))]
            assert norm.isnan() and found_inf == 1


# Slots of the tensors of a list, on both sides of where the CUDA kernels' launches change.
SLOT_LISTS = {
    "few": [1, 256, 0, 5, 255] * 30,
    "a warp each": [257, 1, 1024, 130, 7],
    "in several rounds": [1021, 33] * 150,
    "one": [1],
    "one of a warp": [1024],
    "one of a block": [1025],
    "one of two blocks": [16 * 1024 + 1],
    "one of a cluster": [300_001],
    "long ones": [70_003, 3, 1025, 0, 33],
    "more than a table": [3, 1, 2] * 220,
    "more than a table, of warps": [300, 1, 2] * 220,
    "more than a table, long": [5000] + [1] * 700,
}


@pytest.mark.parametrize("lengths", SLOT_LISTS.values(), ids=SLOT_LISTS)
def test_slots_of_lists_of_any_length(backend, lengths):
    whole = torch.rand(sum(lengths) + 1)
    # From the second on, so that no list of slots begins where vectors do.
    slots = list(whole[1:].split(lengths))
    exact = [float(part.double().sum()) for part in slots]
    on_device = whole.to(backend.device)
    parts = list(on_device[1:].split(lengths))
    sums, norm, found_inf = ops.grad_stats(partials=parts, backend=backend.name)
    rounding = 2.0**-23
    assert sums.tolist() == pytest.approx(exact, rel=rounding)
    assert norm.item() ** 2 == pytest.approx(sum(exact), rel=4 * rounding)
    assert found_inf == 0
    on_device[-1] = math.nan  # of the last tensor that has a slot
    sums, norm, found_inf = ops.grad_stats(partials=parts, backend=backend.name)
    last = max(i for i, length in enumerate(lengths) if length)
    assert sums.isnan().nonzero().tolist() == [[last]]
    assert norm.isnan() and found_inf == 1


def test_statistics_of_float64():
    main = torch.randn(CHUNK + 9, dtype=torch.float64)
    slots = torch.empty(2, dtype=torch.float64)
    ops.accumulate_(main, torch.randn(CHUNK + 9), partials=slots)
    for options in ({"main_grads": [main]}, {"partials": [slots]}):
        sums, norm, found_inf = ops.grad_stats(**options)
        assert sums.dtype == norm.dtype == torch.float64
        assert norm.item() == pytest.approx(float(main.norm()), rel=1e-12)
        assert found_inf.dtype == torch.float32 and found_inf == 0


# --- scale_


@pytest.mark.parametrize("factor", [0.37, 0.0, -2.0, 3e38, 1e-38, math.inf, math.nan])
def test_scale_gives_the_bits_of_a_product(backend, factor):
    mains = [bit_patterns(n) for n in (0, 1, 7, 33, CHUNK + 1)] + [torch.randn(40, 70).t()]
    factor = torch.tensor(factor)
    actual = [main.to(backend.device, copy=True) for main in mains]
    ops.scale_(actual, factor.reshape(1).to(backend.device), backend=backend.name)
    for got, main in zip(actual, mains, strict=True):
        oracle.assert_same_bits(got, main * factor)


def test_scale_by_one_touches_no_bit(backend):
    nans = torch.tensor([0x7F800001, 0x7FC12345, -1, 0x7FFFFFFF]).int()
    bits = torch.cat([nans, bit_patterns(CHUNK).view(torch.int32)])
    main = bits.view(torch.float32).to(backend.device, copy=True)
    ops.scale_([main], scalar(1.0, backend), backend=backend.name)
    assert torch.equal(main.view(torch.int32).cpu(), bits)


# --- torch's rules for ops


def op_calls(backend):
    """A call of each op, with every kind of argument in use."""

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, device=backend.device).to(dtype)

    mains = [random(5), random(3, 4)]
    options = {"scale": 0.5, "inv_scale": scalar(0.25, backend), "backend": backend.name}
    return {
        "accumulate_": (
            (mains[0], random(5, dtype=torch.bfloat16)),
            {**options, "store": True, "partials": random(1)},
        ),
        "multi_accumulate_": (
            (mains, [random(5), random(4, 3, dtype=torch.float16).t()]),
            {**options, "stores": [True, False], "partials": [random(1), random(1)]},
        ),
        "grad_stats": ((mains, False), {"backend": backend.name}),
        "scale_": ((mains, scalar(0.5, backend)), {"backend": backend.name}),
    }


@pytest.mark.parametrize("name", ["accumulate_", "multi_accumulate_", "grad_stats", "scale_"])
def test_opcheck(backend, name):
    args, kwargs = op_calls(backend)[name]
    torch.library.opcheck(getattr(OPS, name).default, args, kwargs)


def test_compiled_function_gives_the_eager_result(backend):
    def step(mains, grads, slots, inv_scale):
        name = backend.name
        ops.accumulate_(mains[0], grads[0], inv_scale=inv_scale, partials=slots[0], backend=name)
        ops.multi_accumulate_(
            mains, grads, scale=0.5, stores=[False, True], partials=slots, backend=name
        )
        _, norm, found_inf = ops.grad_stats(partials=slots, backend=name)
        ops.scale_(mains, 1 / norm, backend=name)
        return mains[0] * 2, norm, found_inf

    def inputs():
        torch.manual_seed(0)
        mains = [torch.randn(n, device=backend.device) for n in (5, CHUNK + 1)]
        grads = [torch.randn_like(main).bfloat16() for main in mains]
        slots = [torch.zeros(n, device=backend.device) for n in (1, 2)]
        return mains, grads, slots, scalar(0.5, backend)

    torch.compiler.reset()
    eager, compiled = inputs(), inputs()
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for got, want in zip(actual, expected, strict=True):
        oracle.assert_same_bits(got, want)
    for got, want in zip(compiled[0] + compiled[2], eager[0] + eager[2], strict=True):
        oracle.assert_same_bits(got, want)


def test_ops_bump_the_version_of_what_they_write(backend):
    for name, (args, kwargs) in op_calls(backend).items():
        mains = args[0] if isinstance(args[0], list) else [args[0]]
        before = [main._version for main in mains]
        getattr(OPS, name)(*args, **kwargs)
        is_bumped = [main._version > version for main, version in zip(mains, before, strict=True)]
        assert is_bumped == [name != "grad_stats"] * len(mains)


def test_wrappers_return_what_they_write(backend):
    main, mains = torch.zeros(3, device=backend.device), [torch.zeros(2, device=backend.device)]
    assert ops.accumulate_(main, main.half(), backend=backend.name) is main
    assert ops.multi_accumulate_(mains, [mains[0].half()], backend=backend.name) is mains
    assert ops.scale_(mains, scalar(2.0, backend), backend=backend.name) is mains


@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
def test_gradient_that_requires_grad_leaves_main_a_leaf(backend, store):
    for scale in (1.0, 0.5):
        main = torch.zeros(3, device=backend.device)
        grad = torch.ones(3, device=backend.device, requires_grad=True)
        ops.accumulate_(main, grad, scale=scale, store=store, backend=backend.name)
        assert not main.requires_grad and main.grad_fn is None
        assert main.tolist() == [scale] * 3


# --- what only a GPU has


def test_nothing_waits_for_the_device(cuda_backend):
    calls = op_calls(cuda_backend)
    for name, (args, kwargs) in calls.items():
        getattr(OPS, name)(*args, **kwargs)  # Triton compiles at the first call
    former = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, (args, kwargs) in calls.items():
            getattr(OPS, name)(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode(former)


@pytest.mark.large
def test_more_than_2_to_the_31_elements(cuda_backend):
    n = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    name = cuda_backend.name
    ends = [0, 2**31 - 1, 2**31, n - 1]
    main = torch.zeros(n, device="cuda")
    grad = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    slots = torch.full((ops.num_chunks(n),), math.nan, device="cuda")
    grad[ends] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16, device="cuda")

    ops.accumulate_(main, grad, partials=slots, backend=name)
    ops.accumulate_(main, grad, scale=2.0, partials=slots, backend=name)
    assert main[ends].tolist() == [3.0, 6.0, 9.0, 12.0]
    assert main.count_nonzero() == 4
    assert slots[[0, -2, -1]].tolist() == [9.0, 36.0, 225.0]
    assert slots.count_nonzero() == 3

    main.fill_(7.0)
    ops.multi_accumulate_([main], [grad], stores=[True], partials=[slots], backend=name)
    assert main[ends].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert main.count_nonzero() == 4

    ops.scale_([main], scalar(2.0, cuda_backend), backend=name)
    assert main[ends].tolist() == [2.0, 4.0, 6.0, 8.0]
    sums, norm, found_inf = ops.grad_stats([main], backend=name)
    assert sums.tolist() == [120.0] and found_inf == 0
    assert norm.item() == pytest.approx(math.sqrt(120.0), rel=2**-23)
    main[-1] = math.inf
    assert ops.grad_stats([main], backend=name)[2] == 1
