"""The Python form of the fused modules, in all that it shares with the C++ form, and by itself."""

import copy
import threading

import pytest
import torch
from hook_cases import Raise
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from weight_cases import (
    WeightSum,
    assert_input_gradient,
    exact_gradient,
    is_fused,
    nodes_before,
)

import gradacc_kernels as gk
from gradacc_kernels import dispatch, python_fused, window_cast
from gradacc_kernels.python_hook import Demand, PythonHooks
from gradacc_kernels.window_cast import WindowCast

ROWS, IN, OUT, VOCABULARY = 6, 8, 16, 10


def attached(backend, module, dtype=torch.bfloat16, **options):
    """A fused module, its stock twin, and its Accumulator."""
    module = module.to(backend.device, dtype)
    twin = copy.deepcopy(module)
    return module, twin, gk.attach(module, backend=backend.name, fuse=True, **options)


def inputs(backend, dtype=torch.bfloat16, shape=(ROWS, IN)):
    return torch.randn(shape, device=backend.device).to(dtype).requires_grad_()


def tokens(backend, shape=(ROWS,), dtype=torch.int64):
    return torch.randint(VOCABULARY, shape, device=backend.device).to(dtype)


def run_both(module, twin, x, dy=None):
    """Runs a module and its twin; returns the output of the first, and what came back to it."""
    x_twin = x.detach().clone().requires_grad_(x.requires_grad)
    y, y_twin = module(x), twin(x_twin)
    dy = torch.randn_like(y) if dy is None else dy
    x.grad = None
    y.backward(dy)
    y_twin.backward(dy)
    assert y.dtype == y_twin.dtype and y.equal(y_twin)
    assert (x.grad is None) == (x_twin.grad is None)
    if x.grad is not None:
        assert_input_gradient(x.grad, x_twin.grad, is_autocast=y.dtype != x.dtype)
    return y, dy


def add_linear(truth, weight, x, dy, factor=1.0):
    count = x.numel() // x.shape[-1]
    truth.add(*exact_gradient(functional.linear, weight, x, dy), count, factor)


def add_lookup(truth, weight, x, dy, padding_idx=None):
    gradients = []
    for rows in (dy.cpu().double(), dy.cpu().double().abs()):
        gradient = torch.zeros(weight.shape, dtype=torch.float64)
        indices = x.cpu().flatten().long()
        gradient.index_add_(0, indices, rows.reshape(-1, weight.shape[1]))
        if padding_idx is not None:
            gradient[padding_idx] = 0
        gradients.append(gradient)
    truth.add(*gradients, x.numel())


# --- Linear.


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, IN), (2, 3, IN), (IN,), (0, IN), (2, 0, IN)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
def test_linear(backend, dtype, shape, has_bias):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT, bias=has_bias), dtype)
    truth, bias_truth = WeightSum(module.weight), WeightSum(torch.empty(OUT))
    module.weight.main_grad.fill_(torch.nan)
    for _ in range(3):
        x = inputs(backend, dtype, shape)
        y, dy = run_both(module, twin, x)
        assert is_fused(y, module.weight)
        add_linear(truth, module.weight, x, dy)
        rows = dy.detach().cpu().double().reshape(-1, OUT)
        bias_truth.add(rows.sum(0), rows.abs().sum(0), len(rows))
    assert module.weight.grad.dtype == torch.float32
    assert module.weight.grad.data_ptr() == module.weight.main_grad.data_ptr()
    assert truth.contains(module.weight.grad)
    if has_bias:
        assert bias_truth.contains(module.bias.grad)
    if dtype == torch.bfloat16 and shape == (ROWS, IN):
        assert not truth.contains(twin.weight.grad)
        assert not has_bias or not bias_truth.contains(twin.bias.grad)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "every other"])
def test_strides_of_any_kind(backend, kind):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT))
    x = inputs(backend, shape=(IN, 2 * ROWS)).detach()
    x = {"expanded": x[:1, 0].expand(ROWS, IN), "transposed": x[:, :ROWS].t()}.get(kind, x.t()[::2])
    dy = torch.randn(OUT, 2 * ROWS, device=backend.device).bfloat16()
    dy = {"expanded": dy[0, 0].expand(ROWS, OUT), "transposed": dy[:, :ROWS].t()}.get(
        kind, dy.t()[::2]
    )
    truth = WeightSum(module.weight)
    y, twin_y = module(x), twin(x)
    y.backward(dy)
    add_linear(truth, module.weight, x, dy)
    assert y.equal(twin_y) and truth.contains(module.weight.grad)


def test_the_transposed_weight_of_conv1d(backend):
    weight = nn.Parameter(torch.randn(IN, OUT, device=backend.device).bfloat16())
    accumulator = gk.attach([weight], backend=backend.name)
    (group,) = accumulator._attachment.groups
    form = python_fused if isinstance(group.hooks, PythonHooks) else dispatch.extension()
    holder = {"weight": weight}
    linear = form.FusedLinear(
        form.ParameterWatch([(holder, "weight", weight)]),
        form.FusedWeight(group.hooks, 0, weight, True),
        None,
    )
    x = inputs(backend)
    y = linear(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    truth = WeightSum(weight)
    truth.add(*exact_gradient(torch.matmul, weight, x, dy), ROWS)
    assert y.equal(x @ weight) and truth.contains(weight.grad)
    assert x.grad.equal(dy @ weight.t())
    assert linear(inputs(backend, shape=(ROWS, IN + 1))) is None
    assert linear(inputs(backend, torch.float32)) is None
    holder["weight"] = None
    assert linear(x) is None
    accumulator.detach()
    holder["weight"] = weight
    assert linear(x) is None or not linear(x).sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_the_factors_of_the_accumulator(backend):
    module, twin, accumulator = attached(backend, nn.Linear(IN, OUT), scale=0.5)
    accumulator.inv_scale.fill_(0.125)
    truth = WeightSum(module.weight)
    for _ in range(2):
        x = inputs(backend)
        _, dy = run_both(module, twin, x)
        add_linear(truth, module.weight, x, dy, factor=0.0625)
    assert truth.contains(module.weight.grad)


@pytest.mark.parametrize("way", ["none", "zeros", "a tensor"])
def test_what_grad_was_before(backend, way):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT))
    run_both(module, twin, inputs(backend))
    module.zero_grad(set_to_none=way != "zeros")
    truth = WeightSum(module.weight)
    if way == "a tensor":
        value = torch.randn_like(module.weight, dtype=torch.float32)
        module.weight.grad = value.clone()
        truth.add(value.detach().cpu().double(), value.detach().cpu().double().abs(), 1)
    x = inputs(backend)
    _, dy = run_both(module, twin, x)
    add_linear(truth, module.weight, x, dy)
    assert truth.contains(module.weight.grad)
    assert module.weight.grad.data_ptr() == module.weight.main_grad.data_ptr()


def test_one_weight_in_two_uses_and_beside_a_stock_use(backend):
    model = nn.Sequential(nn.Linear(IN, IN, bias=False), nn.Linear(IN, IN, bias=False))
    model[1].weight = model[0].weight
    model, _, _ = attached(backend, model)
    x = inputs(backend)
    y = model(x)
    dy = torch.randn_like(y)
    hidden = model[0](x).detach()
    back = (dy @ model[0].weight).detach()
    (y + (model[0].weight * 0).sum()).backward(dy)
    truth = WeightSum(model[0].weight)
    add_linear(truth, model[0].weight, hidden, dy)
    add_linear(truth, model[0].weight, x, back)
    assert truth.contains(model[0].weight.grad)


def test_tied_input_and_output_embeddings(backend):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, IN)
            self.head = nn.Linear(IN, VOCABULARY, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, indices):
            self.hidden = self.embedding(indices)
            return self.head(self.hidden)

    model, twin, _ = attached(backend, Tied())
    weight, truth = model.head.weight, WeightSum(model.head.weight)
    for _ in range(2):
        x = tokens(backend, (2, 3))
        y, dy = run_both(model, twin, x)
        assert is_fused(y, weight)
        add_linear(truth, weight, model.hidden, dy)
        add_lookup(truth, weight, x, (dy.reshape(-1, VOCABULARY) @ weight).detach())
    assert truth.contains(weight.grad)


# --- Embedding.


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("shape", [(40,), (2, 3, 4), (), (0,)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_embedding(backend, index_dtype, shape, padding_idx):
    module, twin, _ = attached(backend, nn.Embedding(VOCABULARY, IN, padding_idx=padding_idx))
    truth = WeightSum(module.weight)
    module.weight.main_grad.fill_(torch.nan)
    for _ in range(2):
        x = tokens(backend, shape, index_dtype)
        y, dy = run_both(module, twin, x)
        assert is_fused(y, module.weight)
        add_lookup(truth, module.weight, x, dy, padding_idx)
    assert truth.contains(module.weight.grad)


def test_a_sparse_embedding_has_sparse_gradients_where_they_are_tensors(backend):
    module, twin, _ = attached(backend, nn.Embedding(VOCABULARY, IN, sparse=True), torch.float32)
    x = tokens(backend)
    y, dy = run_both(module, twin, x)
    truth = WeightSum(module.weight)
    add_lookup(truth, module.weight, x, dy)
    assert is_fused(y, module.weight) and truth.contains(module.weight.grad)
    (gradient,) = torch.autograd.grad(module(x), module.weight, dy)
    assert gradient.is_sparse and gradient.to_dense().equal(twin.weight.grad.to_dense())


def test_embeddings_that_are_not_fused(backend):
    model = nn.ModuleList(
        [nn.Embedding(4, 4, max_norm=1.0), nn.Embedding(4, 4, scale_grad_by_freq=True)]
    ).to(backend.device)
    accumulator = gk.attach(model, backend=backend.name)
    assert "fused" not in repr(accumulator) or "no module" in repr(accumulator)
    accumulator.detach()
    with pytest.raises(ValueError, match="'0', which has max_norm set"):
        gk.attach(model, backend=backend.name, fuse=True)


# --- Statistics.


def test_statistics(backend):
    model = nn.Sequential(nn.Embedding(VOCABULARY, 300), nn.Linear(300, OUT))
    model, twin, accumulator = attached(backend, model)
    for _ in range(2):
        run_both(model, twin, tokens(backend))
        norm = accumulator.grad_norm(from_statistics=True)
        assert torch.allclose(norm, accumulator.grad_norm(), rtol=1e-6)
    with torch.no_grad():
        model[0].weight.grad.mul_(2)  # seen by its version counter
    run_both(model, twin, tokens(backend))
    norm = accumulator.grad_norm(from_statistics=True)
    assert torch.allclose(norm, accumulator.grad_norm(), rtol=1e-6)
    model[0].weight.grad[3, 3] = torch.inf
    run_both(model, twin, tokens(backend))
    assert accumulator.grad_norm(from_statistics=True).isnan() and accumulator.found_inf == 1


def test_the_version_counter_of_grad_moves(backend):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT))
    run_both(module, twin, inputs(backend))
    grad, before = module.weight.grad, module.weight.grad._version
    run_both(module, twin, inputs(backend))
    assert module.weight.grad is grad and grad._version > before


# --- What a gradient is for.


def test_hooks_on_parameters(backend):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT))
    seen = []
    for param in module.parameters():
        param.register_hook(lambda grad: seen.append(grad.dtype) or grad * 2)
        param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    run_both(module, twin, inputs(backend))
    assert sorted(map(str, seen)) == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2
    for param, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert param.grad.equal(expected.grad.float() * 2)


def test_post_accumulate_hooks_see_the_sum(backend):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT))
    sums = []
    module.weight.register_post_accumulate_grad_hook(lambda p: sums.append(p.grad.clone()))
    truth = WeightSum(module.weight)
    for _ in range(2):
        x = inputs(backend)
        y, dy = run_both(module, twin, x)
        add_linear(truth, module.weight, x, dy)
        assert truth.contains(sums[-1])
    assert is_fused(y, module.weight) and len(sums) == 2


def test_a_foreign_hook_on_the_node(backend):
    module = nn.Linear(IN, OUT).to(backend.device, torch.bfloat16)
    node = torch.autograd.graph.get_gradient_edge(module.weight).node
    seen = []
    handle = node.register_prehook(lambda grads: seen.append(grads[0]))
    module, twin, _ = attached(backend, module)
    run_both(module, twin, inputs(backend))
    assert seen[0] is not None and seen[0].equal(twin.weight.grad)
    assert module.weight.grad.equal(twin.weight.grad.float())
    handle.remove()
    module.zero_grad()
    x = inputs(backend)
    _, dy = run_both(module, twin, x)
    truth = WeightSum(module.weight)
    add_linear(truth, module.weight, x, dy)
    if backend.name not in ("cpu", "cuda"):  # C++ sees that there was a hook
        assert truth.contains(module.weight.grad)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_autograd_grad_leaves_main_gradients_alone(backend, kind):
    layer = nn.Linear(IN, OUT) if kind == "linear" else nn.Embedding(VOCABULARY, OUT)
    module, twin, _ = attached(backend, layer)
    x = inputs(backend) if kind == "linear" else tokens(backend)
    run_both(module, twin, x)
    before = [param.grad.clone() for param in module.parameters()]
    dy = torch.randn_like(module(x))
    for count in range(1, len(before) + 1):
        actual = torch.autograd.grad(module(x), list(module.parameters())[:count], dy)
        expected = torch.autograd.grad(twin(x), list(twin.parameters())[:count], dy)
        assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))
        assert actual[0].dtype == torch.bfloat16
    if kind == "linear":
        (actual,) = torch.autograd.grad(module(x), x, dy)
        assert actual.equal(torch.autograd.grad(twin(x), x, dy)[0])
    assert all(p.grad.equal(b) for p, b in zip(module.parameters(), before, strict=True))


def test_backward_with_inputs(backend):
    module, _, _ = attached(backend, nn.Linear(IN, OUT))
    x = inputs(backend)
    dy = torch.randn_like(module(x))
    module(x).backward(dy, inputs=[x])
    assert x.grad is not None and module.weight.grad is None and module.bias.grad is None
    x.grad = None
    module(x).backward(dy, inputs=[module.weight])
    truth = WeightSum(module.weight)
    add_linear(truth, module.weight, x, dy)
    assert truth.contains(module.weight.grad) and x.grad is None and module.bias.grad is None


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_create_graph(backend, kind):
    layer = nn.Linear(IN, OUT) if kind == "linear" else nn.Embedding(VOCABULARY, OUT)
    module, twin, _ = attached(backend, layer, torch.float32)
    x = inputs(backend, torch.float32) if kind == "linear" else tokens(backend)
    results = []
    for each_module in (module, twin):
        loss = each_module(x).pow(3).sum()
        (dw,) = torch.autograd.grad(loss, each_module.weight, create_graph=True)
        results.append(torch.autograd.grad(dw.square().sum(), each_module.weight)[0])
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4)
    assert module.weight.grad is None
    module(x).square().sum().backward(create_graph=True)
    twin(x).square().sum().backward()
    assert module.weight.grad.requires_grad
    assert torch.allclose(module.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)


def test_frozen_before_and_after_forward(backend):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT))
    x = inputs(backend)
    loss = module(x).sum()
    module.requires_grad_(False)
    loss.backward()
    assert module.weight.grad is None and module.bias.grad is None
    twin.requires_grad_(False)
    run_both(module, twin, x)
    assert module.weight.grad is None
    module.weight.requires_grad_(True)
    module(x).sum().backward()
    assert module.weight.grad.dtype == torch.float32 and module.bias.grad is None


def test_retained_graphs(backend):
    module, _, _ = attached(backend, nn.Linear(IN, OUT))
    x = inputs(backend)
    y = module(x)
    dy = torch.randn_like(y)
    truth = WeightSum(module.weight)
    for is_retained in (True, True, False):
        y.backward(dy, retain_graph=is_retained)
        add_linear(truth, module.weight, x, dy)
    assert truth.contains(module.weight.grad)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


def test_a_weight_modified_in_place_before_backward(backend):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT))
    messages = []
    for each_module in (module, twin):
        y = each_module(inputs(backend))
        with torch.no_grad():
            each_module.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
            y.sum().backward()
        messages.append(str(error.value)[:80])
    assert messages[0] == messages[1]
    assert module.weight.grad is None


def test_detached_between_forward_and_backward(backend):
    module, twin, accumulator = attached(backend, nn.Linear(IN, OUT))
    x = inputs(backend)
    y = module(x)
    accumulator.detach()
    dy = torch.randn_like(y)
    y.backward(dy)
    twin(x).backward(dy)
    for param, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert param.grad.dtype == torch.bfloat16
        assert torch.allclose(param.grad, expected.grad, rtol=2.0**-7)


def test_attached_again():
    model = nn.Linear(IN, OUT).bfloat16()
    node = torch.autograd.graph.get_gradient_edge(model.weight).node
    for _ in range(2):
        accumulator = gk.attach(model, backend="reference", fuse=True)
        model.zero_grad()
        x = torch.randn(ROWS, IN).bfloat16()
        y = model(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        truth = WeightSum(model.weight)
        add_linear(truth, model.weight, x, dy)
        assert truth.contains(model.weight.grad)
        accumulator.detach()
    assert node is torch.autograd.graph.get_gradient_edge(model.weight).node


def test_transforms_and_modes(backend):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT), torch.float32)
    x = inputs(backend, torch.float32).detach()

    def loss(params, module):
        return torch.func.functional_call(module, params, (x,)).square().sum()

    params = {name: torch.randn_like(param) for name, param in module.named_parameters()}
    ours, stock = (torch.func.grad(loss)(params, m) for m in (module, twin))
    assert all(ours[name].equal(stock[name]) for name in params)
    assert torch.func.vmap(module)(x).allclose(twin(x))
    with torch.no_grad():
        assert module(x).equal(twin(x)) and module(x).grad_fn is None
    with torch.inference_mode():
        assert module(x).equal(twin(x))
    with torch.autograd.forward_ad.dual_level():
        y = module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert module.weight.grad is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(backend, use_reentrant):
    module, _, _ = attached(backend, nn.Linear(IN, OUT))
    truth = WeightSum(module.weight)
    for _ in range(2):
        x = inputs(backend)
        y = checkpoint(module, x, use_reentrant=use_reentrant)
        dy = torch.randn_like(y)
        y.backward(dy)
        add_linear(truth, module.weight, x, dy)
    assert truth.contains(module.weight.grad)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_compiled_autograd_is_refused(backend, kind):
    layer = nn.Linear(IN, OUT) if kind == "linear" else nn.Embedding(VOCABULARY, OUT)
    module, _, _ = attached(backend, layer)
    loss = module(inputs(backend) if kind == "linear" else tokens(backend)).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        with pytest.raises(RuntimeError, match="compiled autograd cannot trace a fused module"):
            loss.backward()


def test_threads(backend):
    module, _, _ = attached(backend, nn.Linear(IN, OUT, bias=False))
    x = torch.ones(4, IN, device=backend.device).bfloat16()
    module.weight.grad = torch.zeros_like(module.weight, dtype=torch.float32)

    def work():
        for _ in range(5):
            module(x).sum().backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert module.weight.grad.unique().tolist() == [80.0]


def test_a_backward_that_raises(backend):
    module, _, _ = attached(backend, nn.Linear(IN, OUT))
    y = Raise.apply(module(inputs(backend)))
    with pytest.raises(ValueError, match="in the middle"):
        y.sum().backward()
    assert module.weight.grad is None


# --- Autocast.


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "mixed"], ids=str)
def test_autocast(backend, dtype, is_cached):
    layer = nn.Linear(IN, OUT)
    if dtype == "mixed":
        layer.weight = nn.Parameter(layer.weight.to(backend.device, torch.bfloat16))
    module, twin, _ = attached(backend, layer, None if dtype == "mixed" else dtype)
    truth, bias_truth = WeightSum(module.weight), WeightSum(module.bias)
    for x_dtype in (torch.float32, torch.bfloat16, torch.float32):
        x = inputs(backend, x_dtype)
        with torch.autocast(backend.device, torch.bfloat16, cache_enabled=is_cached):
            y, dy = run_both(module, twin, x)
            assert torch.is_autocast_enabled(backend.device)
        assert y.dtype == torch.bfloat16 and is_fused(y, module.weight)
        add_linear(truth, module.weight, x.bfloat16(), dy)
        bias_truth.add(dy.cpu().double().sum(0), dy.cpu().double().abs().sum(0), ROWS)
    assert truth.contains(module.weight.grad) and bias_truth.contains(module.bias.grad)


def test_other_dtypes_under_autocast(backend):
    module, twin, _ = attached(backend, nn.Linear(IN, OUT), torch.float16)
    with torch.autocast(backend.device, torch.bfloat16):
        y, _ = run_both(module, twin, inputs(backend, torch.float16))
    assert not is_fused(y, module.weight)


STEPS = {
    "an optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.5).step(),
    "an in-place write": lambda m: m.weight.detach().mul_(2),
    "a .data write and zero_grad": lambda m: (m.weight.data.mul_(2), m.zero_grad()),
    "a .data write and zeros": lambda m: (m.weight.data.mul_(2), m.zero_grad(False)),
    "a new .data": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "a state dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_copy_of_a_weight_follows_it(backend, step):
    module, _, _ = attached(backend, nn.Linear(IN, OUT), torch.float32)
    x = inputs(backend, torch.float32)

    def forward(m):
        with torch.autocast(backend.device, torch.bfloat16):
            return m(x)

    for _ in range(2):
        forward(module).sum().backward()
    before = forward(module)
    step(module)
    twin = nn.Linear(IN, OUT).to(backend.device)
    twin.load_state_dict(module.state_dict())
    assert forward(module).equal(forward(twin)) and not forward(module).equal(before)


def test_the_copy_serves_a_window(backend):
    module, _, _ = attached(backend, nn.Linear(IN, OUT), torch.float32)
    x = inputs(backend, torch.float32)

    def forward():
        with torch.autocast(backend.device, torch.bfloat16):
            return module(x)

    forward().sum().backward()
    before = forward()
    before.sum().backward()
    module.weight.data.mul_(2)  # what nobody sees, and no training loop does inside a window
    with torch.no_grad():
        assert not forward().equal(before)  # evaluation reads the weight
    assert forward().equal(before)


def test_window_cast_by_its_rules():
    weight, cast = torch.randn(4, requires_grad=True), WindowCast()
    grad = torch.zeros(4)

    def get(grad=grad, our_version=-1, dtype=torch.bfloat16):
        return cast.get(weight, grad, our_version, dtype)

    first = get(our_version=0)
    assert first.equal(weight.detach().bfloat16()) and not first.requires_grad
    assert get(our_version=0) is first
    assert get(None) is not first and get(None) is not get(None)
    first = get(our_version=0)
    grad.add_(1)
    assert get(our_version=0) is not first  # somebody wrote to it, as zero_ does
    assert get() is not get()
    grad.add_(1)
    first = get(our_version=2)
    assert get(our_version=2) is first  # we did
    other = get(torch.zeros(4))
    assert other is not first
    first = get(our_version=2)
    assert get(our_version=2, dtype=torch.float16).dtype == torch.float16
    first = get(our_version=2)
    window_cast.count_optimizer_step()
    assert get(our_version=2) is not first
    first = get(our_version=2)
    weight.detach().add_(1)
    assert get(our_version=2).equal(weight.detach().bfloat16())


# --- By itself.


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "extension", lambda: "it was not built")
    model = nn.Sequential(nn.Embedding(VOCABULARY, IN), nn.Linear(IN, OUT)).bfloat16()
    twin = copy.deepcopy(model)
    accumulator = gk.attach(model, backend="reference", fuse=True)
    assert "fused: 1 Embedding, 1 Linear" in repr(accumulator)
    y, _ = run_both(model, twin, torch.randint(VOCABULARY, (ROWS,)))
    assert nodes_before(y, model[1].weight) == {"_MultiplyBackward"}
    assert nodes_before(y, model[0].weight) == {"_LookupBackward"}
    assert model[1].weight.grad.dtype == torch.float32


def test_demand():
    model = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    accumulators = [gk.attach(m, backend="reference") for m in (model, other)]
    (hooks,), (other_hooks,) = [[g.hooks for g in a._attachment.groups] for a in accumulators]
    node = torch.autograd.graph.get_gradient_edge(model.weight).node
    demands = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x * weight.sum()

        @staticmethod
        def backward(ctx, grad):
            (to_x, _), (to_weight, _) = ctx.next_functions
            assert to_weight is node
            demands.append(
                [PythonHooks.demand(to_x)]
                + [PythonHooks.demand(to_weight, owner) for owner in (None, hooks, other_hooks)]
            )
            return grad, torch.zeros(2, 2)

    x = torch.ones(2, requires_grad=True)
    gradient, main, nothing = Demand.GRADIENT, Demand.MAIN_GRAD, Demand.NOTHING

    def loss():
        return Ask.apply(x, model.weight).sum()

    loss().backward()
    assert demands.pop() == [gradient, main, main, gradient]
    loss().backward(inputs=[model.weight])
    assert demands.pop() == [nothing, main, main, gradient]
    loss().backward(inputs=[x])
    assert demands.pop() == [gradient, nothing, nothing, nothing]
    torch.autograd.grad(loss(), x)
    assert demands.pop() == [gradient, nothing, nothing, nothing]
    torch.autograd.grad(loss(), model.weight)
    assert demands.pop() == [nothing, gradient, gradient, gradient]
    handle = model.weight.register_hook(lambda grad: None)
    loss().backward()
    assert demands.pop() == [gradient] * 4
    handle.remove()
    loss().backward()
    assert demands.pop() == [gradient, main, main, gradient]
    handle = node.register_prehook(lambda grads: None)
    loss().backward()
    assert demands.pop() == [gradient] * 4
    handle.remove()
    accumulators[0].detach()
    loss().backward()
    assert demands.pop() == [gradient] * 4
    assert PythonHooks.demand(None) is nothing


def test_add_when_writing_fails():
    param = nn.Parameter(torch.zeros(4))
    accumulator = gk.attach([param], backend="reference")
    (group,) = accumulator._attachment.groups

    def fail(*_):
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        group.hooks.add(0, fail)
    assert param.grad is None and not group.hooks._lock.locked()
    calls = []
    assert group.hooks.add(0, lambda *arguments: bool(calls.append(arguments)))
    main, partials, are_partials_valid, scale, inv_scale, store = calls[0]
    assert main is group.buffer.views[0] and partials is group.buffer.slots[0]
    assert (are_partials_valid, scale, inv_scale.item(), store) == (True, 1.0, 1.0, True)
    assert param.grad.data_ptr() == main.data_ptr()
    assert not group.hooks._are_statistics_valid(group.hooks._params[0])
    assert group.hooks.add(0, lambda *arguments: bool(calls.append(arguments)) or True)
    assert calls[1][2] is False and calls[1][5] is False
    assert group.hooks._are_statistics_valid(group.hooks._params[0])
    hooks = group.hooks
    accumulator.detach()
    assert not hooks.add(0, fail)
