"""Batched expert weights, on every backend's hook."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hook_cases import released
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from weight_cases import WeightSum, assert_input_gradient, exact_gradient, is_fused

import gradacc_kernels as gk
from gradacc_kernels import fused
from gradacc_kernels.experts import ExpertWeight

EXPERTS, TOKENS, IN, OUT = 3, 5, 8, 16


class Experts(nn.Module):
    """A module whose forward is any function of it and an input."""

    def __init__(self, run, is_transposed=False):
        super().__init__()
        shape = (EXPERTS, OUT, IN) if is_transposed else (EXPERTS, IN, OUT)
        self.run = run
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, *args):
        return self.run(*args, self.weight)


def each(multiply, count=EXPERTS):
    """One product for each of the first experts."""
    return lambda x, w: torch.stack([multiply(x[e], w, e) for e in range(count)])


ONE = torch.ones(OUT)
# With the weight as [experts, in, out].
WAYS = {
    "bmm": lambda x, w: torch.bmm(x, w),
    "Tensor.bmm": lambda x, w: x.bmm(mat2=w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "@": lambda x, w: x @ w,
    "baddbmm": lambda x, w: torch.baddbmm(torch.zeros(1, 1, OUT).to(x), x, w),
    "einsum": lambda x, w: torch.einsum("eti, eio -> eto", x, w),
    "@ index": each(lambda x, w, e: x @ w[e]),
    "mm index": each(lambda x, w, e: torch.mm(x, w[e]), 2),
    "addmm index": each(lambda x, w, e: torch.addmm(torch.zeros(OUT).to(x), x, w[e])),
    "tensor index": each(lambda x, w, e: x @ w[torch.tensor(e)]),
    "negative index": each(lambda x, w, e: x @ w[e - EXPERTS, ..., :]),
    "select": each(lambda x, w, e: x @ w.select(0, e)),
    "linear": each(lambda x, w, e: functional.linear(x, w[e].t())),
    "linear mT": each(lambda x, w, e: functional.linear(x, w.mT[e], torch.zeros(OUT).to(x))),
    "unbind": lambda x, w: torch.stack([a @ b for a, b in zip(x, w.unbind(), strict=True)]),
    "iterate": lambda x, w: torch.stack([a @ b for a, b in zip(x, w, strict=True)]),
}
# With the weight as [experts, out, in].
TRANSPOSED_WAYS = {
    "bmm transpose": lambda x, w: torch.bmm(x, w.transpose(1, 2)),
    "bmm transpose last": lambda x, w: torch.bmm(x, torch.transpose(w, -1, -2)),
    "bmm swapaxes": lambda x, w: torch.bmm(x, w.swapaxes(2, 1)),
    "bmm permute": lambda x, w: torch.bmm(x, w.permute(0, 2, 1)),
    "bmm mT": lambda x, w: torch.bmm(x, w.mT),
    "einsum": lambda x, w: torch.einsum("boi,bti->bto", w, x),
    "linear index": each(lambda x, w, e: functional.linear(x, w[e])),
    "linear slices": each(lambda x, w, e: functional.linear(x, w[e, :, :], None)),
    "@ T": each(lambda x, w, e: x @ w[e].T),
    "mm transpose": each(lambda x, w, e: x.mm(w.transpose(1, 2)[e])),
}
EVERY_WAY = [
    *(pytest.param(way, False, id=name) for name, way in WAYS.items()),
    *(pytest.param(way, True, id=f"{name}, [out, in]") for name, way in TRANSPOSED_WAYS.items()),
]
every_way = pytest.mark.parametrize("way, is_transposed", EVERY_WAY)


def attached(backend, run, is_transposed=False, dtype=torch.bfloat16, **options):
    """A module with fused experts, its stock twin, and its Accumulator."""
    module = Experts(run, is_transposed).to(backend.device, dtype)
    twin = copy.deepcopy(module)
    return module, twin, gk.attach(module, backend=backend.name, fuse=True, **options)


def tokens(backend, dtype=torch.bfloat16, shape=(EXPERTS, TOKENS, IN)):
    return torch.randn(shape, device=backend.device).to(dtype).requires_grad_()


def run_both(module, twin, x, dy=None):
    """Runs a module and its twin; returns both outputs, and what came back."""
    x_twin = x.detach().clone().requires_grad_()
    y, y_twin = module(x), twin(x_twin)
    dy = torch.randn_like(y) if dy is None else dy
    x.grad = None
    y.backward(dy)
    y_twin.backward(dy)
    assert y.dtype == y_twin.dtype and y.equal(y_twin)
    assert_input_gradient(x.grad, x_twin.grad, is_autocast=y.dtype != x.dtype)
    return y, dy


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_way_of_multiplying(backend, way, is_transposed, dtype):
    module, twin, _ = attached(backend, way, is_transposed, dtype)
    truth = WeightSum(module.weight)
    module.weight.main_grad.fill_(torch.nan)
    for _ in range(2):
        x = tokens(backend, dtype)
        y, dy = run_both(module, twin, x)
        assert is_fused(y, module.weight)
        truth.add(*exact_gradient(way, module.weight, x, dy), TOKENS)
    assert module.weight.grad.data_ptr() == module.weight.main_grad.data_ptr()
    assert truth.contains(module.weight.grad)
    if dtype == torch.bfloat16:  # the sum of rounded gradients is no such thing
        assert not truth.contains(twin.weight.grad)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("function", ["_grouped_mm", "grouped_mm"])
@pytest.mark.parametrize("ends", [(2, 2, 7), (0, 0, 0), (3, 5, 7), (7, 7, 7), (1, 2, 4)])
def test_grouped(backend, function, is_transposed, ends):
    grouped_mm = getattr(torch, function, None) or getattr(functional, function)

    def way(x, offsets, w):
        return grouped_mm(x, w.transpose(-2, -1) if is_transposed else w, offs=offsets)

    def exact(x, w):
        pieces = [x[begin:end] for begin, end in zip((0, *ends), ends, strict=False)]
        matrices = w.mT if is_transposed else w
        return torch.cat([a @ b for a, b in zip(pieces, matrices, strict=True)])

    module, twin, _ = attached(backend, way, is_transposed)
    offsets = torch.tensor(ends, dtype=torch.int32, device=backend.device)
    truth = WeightSum(module.weight)
    module.weight.main_grad.fill_(torch.nan)
    for _ in range(2):
        x = tokens(backend, shape=(7, IN))
        y, y_twin = module(x, offsets), twin(x.detach(), offsets)
        assert is_fused(y, module.weight)
        assert y[: ends[-1]].equal(y_twin[: ends[-1]])
        # The rows beyond the last offset are nobody's.
        dy = torch.randn_like(y)
        dy[ends[-1] :] = torch.nan
        y.backward(dy)
        truth.add(*exact_gradient(exact, module.weight, x[: ends[-1]], dy[: ends[-1]]), 7)
    assert truth.contains(module.weight.grad)


def test_experts_without_tokens(backend):
    module, twin, _ = attached(backend, each(lambda x, w, e: x @ w[e], 1))
    module.weight.main_grad.fill_(torch.nan)
    run_both(module, twin, tokens(backend))
    assert module.weight.grad[0].count_nonzero() == module.weight[0].numel()
    assert module.weight.grad[1:].count_nonzero() == 0
    before = module.weight.grad.clone()
    module.run = lambda x, w: x[1] @ w[1]
    twin.run = module.run
    run_both(module, twin, tokens(backend))
    assert module.weight.grad[0].equal(before[0])
    assert module.weight.grad[1].count_nonzero() == module.weight[1].numel()


def test_an_expert_that_gets_an_empty_batch(backend):
    module, _, _ = attached(backend, lambda x, w: functional.linear(x, w[1]), True)
    module.weight.main_grad.fill_(torch.nan)
    y = module(tokens(backend, shape=(0, IN)))
    y.sum().backward()
    assert y.shape == (0, OUT) and module.weight.grad.count_nonzero() == 0


def test_leading_dimensions_and_expanded_gradients(backend):
    def way(x, w):
        return functional.linear(x, w[1])

    module, twin, _ = attached(backend, way, True)
    x = tokens(backend, shape=(2, 3, IN))
    y, dy = run_both(module, twin, x, torch.ones((), device=backend.device).expand(2, 3, OUT))
    truth = WeightSum(module.weight)
    truth.add(*exact_gradient(way, module.weight, x, dy), 6)
    assert is_fused(y, module.weight) and truth.contains(module.weight.grad)


def test_the_input_that_baddbmm_adds(backend):
    module, twin, _ = attached(backend, lambda x, b, w: torch.baddbmm(b, x, w))
    x, bias = tokens(backend), tokens(backend, shape=(EXPERTS, 1, OUT))
    y, y_twin = module(x, bias), twin(x, bias)
    dy = torch.randn_like(y)
    gradients = [torch.autograd.grad(output, [x, bias], dy) for output in (y, y_twin)]
    assert is_fused(y, module.weight)
    assert torch.allclose(y, y_twin, rtol=2.0**-7, atol=2.0**-6)
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_the_factors_of_the_accumulator(backend):
    def way(x, w):
        return torch.cat([x @ w, (x[0] @ w[0])[None]])

    module, twin, accumulator = attached(backend, way, scale=0.5)
    accumulator.inv_scale.fill_(0.125)
    truth = WeightSum(module.weight)
    for _ in range(2):
        x = tokens(backend)
        _, dy = run_both(module, twin, x)
        truth.add(*exact_gradient(way, module.weight, x, dy), 2 * TOKENS, factor=0.0625)
    assert truth.contains(module.weight.grad)


def test_statistics_follow_the_products(backend):
    module, twin, accumulator = attached(backend, lambda x, w: x @ w)
    for _ in range(2):
        run_both(module, twin, tokens(backend))
        norm = accumulator.grad_norm(from_statistics=True)
        assert torch.allclose(norm, module.weight.grad.norm())
    module.run = twin.run = lambda x, w: x[0] @ w[0]  # no slot knows of it
    run_both(module, twin, tokens(backend))
    norm = accumulator.grad_norm(from_statistics=True)
    assert torch.allclose(norm, module.weight.grad.norm())


def test_a_bias_of_three_dimensions(backend):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXPERTS, IN, OUT))
            self.bias = nn.Parameter(torch.randn(EXPERTS, 1, OUT))

        def forward(self, x):
            return torch.baddbmm(self.bias, x, self.weight)

    module = Biased().to(backend.device, torch.bfloat16)
    twin = copy.deepcopy(module)
    gk.attach(module, backend=backend.name, fuse=True)
    truth, bias_truth = WeightSum(module.weight), WeightSum(module.bias)
    for _ in range(2):
        x = tokens(backend)
        y, y_twin = module(x), twin(x)
        assert is_fused(y, module.weight)
        torch.testing.assert_close(y, y_twin, rtol=2**-6, atol=2**-4)
        dy = torch.randn_like(y)
        y.backward(dy)
        truth.add(*exact_gradient(torch.bmm, module.weight, x, dy), TOKENS)
        sums = [t.cpu().double().sum(1, keepdim=True) for t in (dy, dy.abs())]
        bias_truth.add(*sums, TOKENS)
    assert truth.contains(module.weight.grad)
    error = (module.bias.grad.cpu().double() - bias_truth.total).abs()
    assert bool((error <= 2.0**-6 * bias_truth.magnitude).all())  # autograd sums it in 16 bits


@pytest.mark.parametrize("is_cached", [False, True])
def test_autocast_with_float32_parameters(backend, is_cached):
    def way(x, w):
        return torch.cat([x @ w, (x[0] @ w[0])[None]])

    module, twin, _ = attached(backend, way, dtype=torch.float32)
    truth = WeightSum(module.weight)
    for _ in range(2):
        x = tokens(backend, torch.float32)
        with torch.autocast(backend.device, torch.bfloat16, cache_enabled=is_cached):
            y, dy = run_both(module, twin, x)
        assert y.dtype == torch.bfloat16 and is_fused(y, module.weight)
        truth.add(*exact_gradient(way, module.weight, x.bfloat16(), dy), 2 * TOKENS)
    assert truth.contains(module.weight.grad)


def test_autocast_leaves_grouped_products_alone(backend):
    module, twin, _ = attached(
        backend, lambda x, offs, w: torch._grouped_mm(x, w, offs=offs), dtype=torch.float32
    )
    offsets = torch.tensor((2, 3, 7), dtype=torch.int32, device=backend.device)
    x = tokens(backend, torch.float32, (7, IN))
    with torch.autocast(backend.device, torch.bfloat16):
        y = module(x, offsets)
        assert torch.is_autocast_enabled(backend.device)
        assert y.dtype == torch.float32 and y.equal(twin(x, offsets))
    assert is_fused(y, module.weight)


# --- What is not fused, and has stock gradients.


NOT_FUSED = {
    "a sum": lambda x, w: w.sum() * x,
    "a function of the weight": lambda x, w: x @ w.tanh(),
    "a gather": lambda x, w: torch.bmm(x, w[torch.tensor([2, 0, 0], device=x.device)]),
    "a slice": lambda x, w: torch.bmm(x[1:], w[1:]),
    "a broadcast weight": lambda x, w: x[0] @ w,
    "a row": lambda x, w: x[..., :1] * w[0][0],
    "another dimension": lambda x, w: x[..., :EXPERTS] @ w.select(1, 0),
    "the weight on the left": lambda x, w: torch.bmm(w.mT, x.mT),
    "another permutation": lambda x, w: x[0].sum() * w.permute(2, 0, 1),
    "twice the product": lambda x, w: torch.baddbmm(torch.zeros(1).to(x), x, w, alpha=2),
    "a sum over experts": lambda x, w: torch.einsum("eti,eio->to", x, w),
    "a detached weight": lambda x, w: x @ w.detach() + w.sum(),
    "no gradient": lambda x, w: torch.no_grad()(torch.bmm)(x, w) + w.sum() + x.sum(),
    "an in-place result": lambda x, w: torch.bmm(x, w + 0),
}


@pytest.mark.parametrize("way", NOT_FUSED.values(), ids=NOT_FUSED)
def test_other_uses_are_stock(backend, way):
    module, twin, _ = attached(backend, way)
    x = tokens(backend)
    y, dy = run_both(module, twin, x)
    assert not is_fused(y, module.weight)
    assert module.weight.grad.equal(twin.weight.grad.float())


def test_fused_and_other_uses_in_one_backward(backend):
    module, twin, _ = attached(backend, lambda x, w: x @ w + w.sum(), dtype=torch.float32)
    y, dy = run_both(module, twin, tokens(backend, torch.float32))
    assert not is_fused(y, module.weight)
    assert torch.allclose(module.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)


def test_a_tensor_hook_sees_the_gradient(backend):
    way = WAYS["@ index"]
    module, twin, _ = attached(backend, way)
    seen = []
    module.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
    run_both(module, twin, tokens(backend))
    assert [grad.dtype for grad in seen] == [torch.bfloat16]
    assert seen[0].equal(twin.weight.grad)
    assert module.weight.grad.equal(twin.weight.grad.float() * 2)


def test_autograd_grad_leaves_main_gradients_alone(backend):
    module, twin, _ = attached(backend, lambda x, w: x @ w)
    x = tokens(backend)
    run_both(module, twin, x)
    before = module.weight.grad.clone()
    x_twin = x.detach().clone().requires_grad_()
    dy = torch.randn_like(module(x))
    for wanted in ((0,), (1,), (0, 1)):
        ours, stock = (module.weight, x), (twin.weight, x_twin)
        actual = torch.autograd.grad(module(x), [ours[i] for i in wanted], dy)
        expected = torch.autograd.grad(twin(x_twin), [stock[i] for i in wanted], dy)
        assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))
        assert actual[0].dtype == torch.bfloat16
    assert module.weight.grad.equal(before)


def test_backward_with_inputs(backend):
    module, twin, _ = attached(backend, lambda x, w: x @ w)
    x = tokens(backend)
    dy = torch.randn_like(module(x))
    module(x).backward(dy, inputs=[x])
    assert module.weight.grad is None and x.grad is not None
    x.grad = None
    module(x).backward(dy, inputs=[module.weight])
    assert x.grad is None
    truth = WeightSum(module.weight)
    truth.add(*exact_gradient(WAYS["@"], module.weight, x, dy), TOKENS)
    assert truth.contains(module.weight.grad)


@pytest.mark.parametrize("way", ["bmm", "@ index", "grouped"])
def test_create_graph(backend, way):
    def grouped(x, w):
        ends = torch.tensor((2, 2, TOKENS), dtype=torch.int32, device=x.device)
        return torch._grouped_mm(x[0], w, offs=ends)

    module, twin, _ = attached(backend, WAYS.get(way, grouped), dtype=torch.float32)
    x = tokens(backend, torch.float32)
    results = []
    for each_module in (module, twin):
        (dw,) = torch.autograd.grad(
            each_module(x).square().sum(), each_module.weight, create_graph=True
        )
        results.append(torch.autograd.grad(dw.square().sum(), [each_module.weight, x]))
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert module.weight.grad is None
    module(x).square().sum().backward(create_graph=True)
    assert module.weight.grad.requires_grad
    twin(x).square().sum().backward()
    assert torch.allclose(module.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)


def test_create_graph_under_autocast(backend):
    module, twin, _ = attached(backend, WAYS["@ index"], dtype=torch.float32)
    x = tokens(backend, torch.float32)
    results = []
    for each_module in (module, twin):
        with torch.autocast(backend.device, torch.bfloat16):
            y = each_module(x).float().square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), each_module.weight)[0])
    assert torch.allclose(*results, rtol=2.0**-6, atol=1e-2 * float(results[1].abs().max()))


def test_frozen_weights_are_stock(backend):
    module, twin, _ = attached(backend, WAYS["@ index"])
    module.weight.requires_grad_(False)
    twin.weight.requires_grad_(False)
    run_both(module, twin, tokens(backend))
    assert module.weight.grad is None


def test_frozen_between_forward_and_backward(backend):
    module, _, _ = attached(backend, WAYS["@"])
    loss = module(tokens(backend)).sum()
    module.weight.requires_grad_(False)
    loss.backward()
    assert module.weight.grad is None


def test_functional_call_and_transforms(backend):
    module, twin, _ = attached(backend, WAYS["@"], dtype=torch.float32)
    x = tokens(backend, torch.float32).detach()
    other = {"weight": torch.randn_like(module.weight)}

    def loss(params, module):
        return torch.func.functional_call(module, params, (x,)).square().sum()

    actual, expected = (torch.func.grad(loss)(other, m)["weight"] for m in (module, twin))
    assert actual.equal(expected) and module.weight.grad is None
    batch = torch.randn(4, *x.shape, device=x.device)
    assert torch.func.vmap(module)(batch).equal(torch.func.vmap(twin)(batch))


def test_forward_derivatives(backend):
    module, twin, _ = attached(backend, WAYS["@"], dtype=torch.float32)
    x, tangent = (tokens(backend, torch.float32).detach() for _ in range(2))
    outputs = []
    for each_module in (module, twin):
        with torch.autograd.forward_ad.dual_level():
            y = each_module(torch.autograd.forward_ad.make_dual(x, tangent))
            outputs.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    assert outputs[0] is not None and outputs[0].equal(outputs[1])


def test_no_grad_and_inference_mode(backend):
    module, twin, _ = attached(backend, WAYS["@ index"])
    x = tokens(backend).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert module(x).equal(twin(x))
    run_both(module, twin, tokens(backend))


# --- What the module's own forward sees.


def test_the_forward_sees_its_parameter(backend):
    def run(x, w):
        assert isinstance(w, nn.Parameter) and isinstance(w, ExpertWeight)
        assert not isinstance(w[0], nn.Parameter) and not isinstance(w.mT, nn.Parameter)
        assert w.shape == (EXPERTS, IN, OUT) and w.is_leaf and w.requires_grad
        assert w.data_ptr() == module.weight.data_ptr() and w.grad is module.weight.grad
        assert w.marked == "experts" and not hasattr(w, "other")
        assert w.to(x.dtype) is w and w.contiguous() is w and len(w) == EXPERTS
        assert type(w + 0) is torch.Tensor and type(torch.stack([w, w])) is torch.Tensor
        assert module.get_parameter("weight") is w and dict(module.named_parameters())
        assert list(module.state_dict()) == ["weight"]
        return x @ w

    module, _, _ = attached(backend, run)
    parameter = module.weight
    parameter.marked = "experts"
    y = module(tokens(backend))
    assert is_fused(y, parameter) and module.weight is parameter
    assert "weight" not in vars(module)


def test_the_forward_may_write_to_its_parameter(backend):
    def run(x, w):
        with torch.no_grad():
            w.mul_(2)
            w.data[0].zero_()
        return x @ w

    module, twin, _ = attached(backend, run)
    y, _ = run_both(module, twin, tokens(backend))
    assert is_fused(y, module.weight) and module.weight.equal(twin.weight)


def test_a_forward_that_raises_leaves_nothing(backend):
    def run(x, w):
        raise ValueError("in the middle")

    module, _, _ = attached(backend, run)
    with pytest.raises(ValueError, match="in the middle"):
        module(tokens(backend))
    assert "weight" not in vars(module) and type(module.weight) is nn.Parameter


def test_errors_are_stock_errors(backend):
    module, twin, _ = attached(backend, WAYS["bmm"])
    wrong = torch.randn(EXPERTS, TOKENS, IN + 1, device=backend.device).bfloat16()
    messages = []
    for each_module in (module, twin):
        with pytest.raises(RuntimeError) as error:
            each_module(wrong)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    module.run = lambda x, w: w[EXPERTS]
    with pytest.raises(IndexError, match="out of bounds"):
        module(tokens(backend))


def test_a_forward_that_calls_itself(backend):
    def run(x, depth, w):
        return module(x, depth - 1) if depth else x @ w

    module, _, _ = attached(backend, run)
    assert is_fused(module(tokens(backend), 2), module.weight)
    assert "weight" not in vars(module)


def test_two_modules_with_one_weight(backend):
    first = Experts(WAYS["@"])
    model = nn.ModuleList([first, Experts(each(lambda x, w, e: x @ w[e]))])
    model.to(backend.device, torch.bfloat16)
    model[1].weight = model[0].weight
    gk.attach(model, backend=backend.name, fuse=True)
    x = tokens(backend)
    y = model[0](x) + model[1](x)
    dy = torch.randn_like(y)
    y.backward(dy)
    truth = WeightSum(first.weight)
    for _ in range(2):
        truth.add(*exact_gradient(WAYS["@"], first.weight, x, dy), TOKENS)
    assert is_fused(y, first.weight) and truth.contains(first.weight.grad)


def test_a_replaced_parameter_is_followed(backend):
    module, twin, _ = attached(backend, WAYS["@"])
    module.weight = nn.Parameter(torch.randn_like(module.weight))
    twin.load_state_dict(module.state_dict())
    module(tokens(backend))  # the first forward notices, when it has begun
    y, _ = run_both(module, twin, tokens(backend))
    assert is_fused(y, module.weight)
    assert module.weight.grad.dtype == torch.float32


# --- Checkpoints, compilation, copies.


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_module(backend, use_reentrant):
    module, twin, _ = attached(backend, WAYS["@ index"])
    x = tokens(backend)
    truth = WeightSum(module.weight)
    for _ in range(2):
        y = checkpoint(module, x, use_reentrant=use_reentrant)
        dy = torch.randn_like(y)
        y.backward(dy)
        truth.add(*exact_gradient(WAYS["@"], module.weight, x, dy), TOKENS)
    assert truth.contains(module.weight.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_argument", [False, True])
def test_a_checkpoint_inside_the_module(backend, use_reentrant, is_argument):
    def run(x, w):
        if is_argument:
            return checkpoint(torch.bmm, x, w, use_reentrant=use_reentrant)
        return checkpoint(lambda x: x @ module.weight, x, use_reentrant=use_reentrant)

    def run_twin(x, w):
        return checkpoint(lambda x: x @ w, x, use_reentrant=use_reentrant)

    module, twin, _ = attached(backend, run)
    twin.run = run_twin
    run_both(module, twin, tokens(backend))
    assert torch.allclose(module.weight.grad, twin.weight.grad.float(), rtol=2.0**-7)


def test_torch_compile_is_left_to_the_hook(backend):
    if backend.is_interpreted:
        pytest.skip("torch.compile does not trace Triton's interpreter")
    module, twin, _ = attached(backend, WAYS["@"])
    torch._dynamo.reset()
    fused._warn_compiled_once.cache_clear()
    with pytest.warns(UserWarning, match="inside torch.compile, modules are not fused"):
        y, _ = run_both(torch.compile(module, backend="aot_eager"), twin, tokens(backend))
    assert not is_fused(y, module.weight)
    assert module.weight.grad.equal(twin.weight.grad.float())


@pytest.mark.parametrize("is_argument", [False, True])
def test_a_compiled_part_of_the_forward(backend, is_argument):
    if backend.is_interpreted:
        pytest.skip("torch.compile does not trace Triton's interpreter")
    torch._dynamo.reset()
    part = torch.compile(lambda x, w: x @ w, backend="aot_eager", fullgraph=True)
    whole = torch.compile(lambda x: x @ module.weight, backend="aot_eager", fullgraph=True)
    module, twin, _ = attached(backend, part if is_argument else lambda x, w: whole(x))
    twin.run = WAYS["@"]
    for _ in range(2):
        y, _ = run_both(module, twin, tokens(backend))
    assert not is_fused(y, module.weight)
    assert torch.allclose(module.weight.grad, twin.weight.grad.float(), rtol=2.0**-7, atol=1e-2)


def test_compiled_autograd_is_refused(backend):
    module, _, _ = attached(backend, WAYS["@"])
    loss = module(tokens(backend)).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        with pytest.raises(RuntimeError, match="compiled autograd cannot trace a fused module"):
            loss.backward()


def test_repr_and_detach(backend):
    module, twin, accumulator = attached(backend, WAYS["@"])
    assert "fused: 1 Experts" in repr(accumulator)
    accumulator.detach()
    assert "forward" not in vars(module)
    y, _ = run_both(module, twin, tokens(backend))
    assert not is_fused(y, module.weight) and module.weight.grad.equal(twin.weight.grad)


def plus(x, w):
    return x @ w


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_train_as_stock(backend, way):
    module, twin, _ = attached(backend, plus)
    run_both(module, twin, tokens(backend))
    module.run = plus
    copied = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    copied.zero_grad()
    twin.zero_grad()
    y, _ = run_both(copied, twin, tokens(backend))
    assert not is_fused(y, copied.weight) and copied.weight.grad.equal(twin.weight.grad)
    accumulator = gk.attach(copied, backend=backend.name, fuse=True)
    assert is_fused(copied(tokens(backend)), copied.weight) and "1 Experts" in repr(accumulator)


def test_what_is_no_expert_weight(backend):
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 4, 8))

        def forward(self, x):
            assert type(self.position) is nn.Parameter
            return x + self.position

    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Bilinear(2, 2, 2), Position())
    model.to(backend.device)
    accumulator = gk.attach(model, backend=backend.name, fuse=True)
    assert "fused: no module" in repr(accumulator)
    model[2](torch.ones(4, 8, device=backend.device)).sum().backward()


def test_offsets_refilled_before_backward_are_refused(backend):
    def product(x, offsets, w):
        return torch._grouped_mm(x, w, offs=offsets)

    for attach in (False, True):
        module = Experts(product).to(backend.device, torch.bfloat16)
        if attach:
            gk.attach(module, backend=backend.name, fuse=True)
        x = tokens(backend, torch.bfloat16)[0]
        ends = torch.tensor([1] * (EXPERTS - 1) + [len(x)], dtype=torch.int32, device=x.device)
        output = module(x, ends)
        ends[0] = 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_nothing_keeps_a_model_alive(backend):
    gc.collect()
    gc.disable()  # no reference cycle: counting references is enough
    try:
        module = nn.Sequential(Experts(WAYS["@ index"]), nn.Linear(OUT, OUT))
        module.to(backend.device)
        gk.attach(module, backend=backend.name, fuse=True)
        for _ in range(2):
            module(tokens(backend, torch.float32)).sum().backward()
        alive = [weakref.ref(module), weakref.ref(module[0]), weakref.ref(module[0].weight)]
        del module
        assert released(alive)
    finally:
        gc.enable()


def test_float64_stays_on_the_hook(backend):
    module = Experts(WAYS["@"]).to(backend.device, torch.float64)
    accumulator = gk.attach(module, backend=backend.name, fuse=True)
    assert "fused: no module" in repr(accumulator)
