"""Weight gradients of fused modules, against the truth in float64."""

import functools

import oracle
import pytest
import torch
from fused_cases import (
    EPSILON,
    MainGradient,
    Written,
    conv1d,
    embedding,
    every_device,
    every_dtype,
    fused,
    is_fused,
    language_model,
    linear,
    rows,
    stock_and_fused,
    tokens,
    window,
)
from torch import nn

import gradacc_kernels as gk

SCALE = 0.3
INV_SCALES = (1 / 128, 3.0, 1 / 128)
sixteen_bit = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def check_window(model, inputs, give, weights, biases=()):
    """Accumulates micro-batches with a factor of each; all main gradients meet their bounds.

    Args:
        inputs: makes a micro-batch's input.
        give: makes the gradient of an output like this one.
        weights, biases: the parameters, each with what its module adds to its window.
    """
    accumulator = gk.attach(model, scale=SCALE, fuse=True)
    truths = [(param, window(param), add) for param, add in (*weights, *biases)]
    for inv_scale in INV_SCALES:
        accumulator.inv_scale.fill_(inv_scale)
        x = inputs()
        y = model(x)
        assert is_fused(y)
        dy = give(y)
        y.backward(dy)
        for _, truth, add in truths:
            add(truth, x, dy, oracle.factor(SCALE, inv_scale))
    for param, truth, _ in truths:
        assert param.grad.data_ptr() == param.main_grad.data_ptr()
        assert truth.contains(param.grad)


def product(truth, x, dy, factor):
    truth.add_product(dy, x, factor)


def transposed_product(truth, x, dy, factor):
    truth.add_product(x, dy, factor)


def row_sum(truth, x, dy, factor):
    truth.add_sum(dy, factor)


def lookup(truth, x, dy, factor, padding_idx=None):
    truth.add_rows(x, dy, factor, padding_idx)


@every_device
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (3, 7, 16), (2, 1, 3, 16), (0, 16), (2, 0, 16)])
def test_linear(device, dtype, bias, shape):
    model = linear(device, dtype, bias=bias)
    layer = model[0]
    biases = [(layer.bias, row_sum)] if bias else []
    check_window(
        model,
        lambda: rows(device, dtype, *shape),
        torch.randn_like,
        [(layer.weight, product)],
        biases,
    )


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand(t.shape),
    "constant": lambda t: t[:1, :1].expand(t.shape),
    "every other row": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "part of wider rows": lambda t: torch.cat([t, t], dim=-1)[..., 1 : 1 + t.shape[-1]],
    "lazily negated": torch._neg_view,
}
of_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@every_device
@of_layout
@pytest.mark.parametrize("operand", ["input", "gradient", "both"])
def test_linear_with_any_strides(device, layout, operand):
    def laid_out(tensor, name):
        return layout(tensor) if operand in (name, "both") else tensor

    model = linear(device, torch.bfloat16)
    check_window(
        model,
        lambda: laid_out(rows(device, torch.bfloat16, 6, 16), "input"),
        lambda y: laid_out(torch.randn_like(y), "gradient"),
        [(model[0].weight, product)],
        [(model[0].bias, row_sum)],
    )


@every_device
@every_dtype
def test_linear_with_a_permuted_batch(device, dtype):
    model = linear(device, dtype)
    check_window(
        model,
        lambda: rows(device, dtype, 3, 5, 16).transpose(0, 1),
        lambda y: torch.randn_like(y).transpose(0, 1).contiguous().transpose(0, 1),
        [(model[0].weight, product)],
        [(model[0].bias, row_sum)],
    )


@every_device
@every_dtype
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)])
def test_conv1d_of_hugging_face(device, dtype, shape, monkeypatch):
    model = nn.Sequential(conv1d(monkeypatch)(8, 16)).to(device, dtype)
    assert model[0].weight.shape == (16, 8)
    check_window(
        model,
        lambda: rows(device, dtype, *shape),
        torch.randn_like,
        [(model[0].weight, transposed_product)],
        [(model[0].bias, row_sum)],
    )


@every_device
@every_dtype
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_embedding(device, dtype, sparse, padding_idx, index_type):
    model = embedding(device, dtype, sparse=sparse, padding_idx=padding_idx)
    shapes = iter([(), (3, 40), (0, 2)])
    check_window(
        model,
        lambda: torch.randint(11, next(shapes), device=device, dtype=index_type),
        torch.randn_like,
        [(model[0].weight, functools.partial(lookup, padding_idx=padding_idx))],
    )
    assert model[0].weight.grad.layout == torch.strided
    if padding_idx is not None:
        assert model[0].weight.grad[padding_idx].abs().max() == 0


@every_device
@of_layout
def test_embedding_with_any_strides(device, layout):
    model = embedding(device, torch.bfloat16)
    check_window(
        model,
        lambda: tokens(device, 12)[::2],
        lambda y: layout(torch.randn_like(y)),
        [(model[0].weight, lookup)],
    )


@every_device
def test_embedding_with_permuted_indices(device):
    model = embedding(device, torch.bfloat16)
    check_window(
        model,
        lambda: tokens(device, 3, 5).t(),
        lambda y: torch.randn_like(y).transpose(0, 1).contiguous().transpose(0, 1),
        [(model[0].weight, lookup)],
    )


def is_tied_gradient_within_bound(device, dtype, fuse):
    model = language_model(device, dtype)
    weight = model.embedding.weight
    accumulator = gk.attach(model, scale=SCALE, fuse=fuse)
    truth = window(weight)
    caught = {}

    def catch_gradient(module, args, output):
        output.register_hook(lambda grad: caught.update(embedding=grad))

    model.embedding.register_forward_hook(catch_gradient)
    model.head.register_forward_pre_hook(lambda module, args: caught.update(head=args[0]))
    for inv_scale in INV_SCALES:
        accumulator.inv_scale.fill_(inv_scale)
        indices = tokens(device, 3, 20)
        logits = model(indices)
        dy = torch.randn_like(logits)
        logits.backward(dy)
        factor = oracle.factor(SCALE, inv_scale)
        truth.add_product(dy, caught["head"], factor)
        truth.add_rows(indices, caught["embedding"], factor)
    return truth.contains(weight.grad)


@every_device
@every_dtype
def test_tied_input_and_output_embeddings(device, dtype):
    assert is_tied_gradient_within_bound(device, dtype, fuse=True)
    if dtype != torch.float32:  # the control
        assert not is_tied_gradient_within_bound(device, dtype, fuse=False)


@every_device
@every_dtype
def test_outputs_and_other_gradients_are_those_of_stock(device, dtype):
    stock, model = stock_and_fused(language_model(device, dtype))
    indices = tokens(device)
    outputs = [each(indices) for each in (stock, model)]
    for output in outputs:
        output.float().square().sum().backward()
    assert outputs[1].equal(outputs[0]) and is_fused(outputs[1])
    for name in ("weight", "bias"):
        theirs, ours = (getattr(each.norm, name).grad for each in (stock, model))
        assert ours.equal(theirs.float())


@every_device
@every_dtype
@pytest.mark.parametrize("shape", [(16,), (5, 16), (3, 7, 16), (0, 16)])
def test_the_gradient_of_the_input_is_that_of_stock(device, dtype, shape):
    gradients = []
    for model in stock_and_fused(linear(device, dtype)):
        x = torch.linspace(-1, 1, 16, device=device).to(dtype).expand(shape).clone()
        x.requires_grad_()
        y = model(x)
        y.float().square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].equal(gradients[1]) and gradients[0].shape == shape


class Visible(nn.Module):
    """Its gradients are 1 + epsilon in every element, which 16 bits round to 1."""

    def __init__(self, kind, device, dtype, monkeypatch):
        super().__init__()
        self.kind, self.epsilon = kind, EPSILON[dtype]
        if kind == "embedding":
            self.layer = nn.Embedding(2, 4)
        elif kind == "conv1d":
            self.layer = conv1d(monkeypatch)(4, 4)
        else:
            self.layer = nn.Linear(4, 4)
        if kind == "tied":
            self.head = nn.Linear(4, 4, bias=False)
            self.head.weight = self.layer.weight
        self.to(device, dtype)

    def forward(self):
        weight = self.layer.weight
        ones = torch.ones(2, 4, dtype=weight.dtype, device=weight.device)
        steps = ones * torch.tensor([[1.0], [self.epsilon]]).to(ones)
        if self.kind == "embedding":
            indices = torch.tensor([0, 0, 1, 1], device=weight.device)
            return self.layer(indices), torch.cat([steps, steps])
        y = self.layer(steps)
        if self.kind == "tied":
            return torch.stack([y, self.head(steps)]), torch.stack([ones, ones])
        if self.kind == "bias":
            return y, steps
        return y, ones

    def gradient(self, fuse):
        self.zero_grad()
        with gk.attach(self, fuse=fuse):
            y, dy = self()
            y.backward(dy)
            name = "bias" if self.kind == "bias" else "weight"
            return getattr(self.layer, name).grad.unique().tolist()


@every_device
@sixteen_bit
@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d", "embedding"])
def test_no_rounding_to_16_bits(device, dtype, kind, monkeypatch):
    model = Visible(kind, device, dtype, monkeypatch)
    assert model.gradient(fuse=True) == [1 + EPSILON[dtype]]
    assert model.gradient(fuse=False) == [1.0]  # the control


@every_device
@sixteen_bit
def test_no_rounding_of_tied_weights_to_16_bits(device, dtype, monkeypatch):
    model = Visible("tied", device, dtype, monkeypatch)
    assert model.gradient(fuse=True) == [2 + 2 * EPSILON[dtype]]
    assert model.gradient(fuse=False) == [2.0]  # the control


@every_device
@sixteen_bit
def test_the_bound_tells_fused_from_unfused(device, dtype):
    """The control of the oracle: what went through 16 bits does not meet it."""
    met = {}
    for fuse in (True, False):
        torch.manual_seed(3)
        model = linear(device, dtype)
        truth: MainGradient = window(model[0].weight)
        gk.attach(model, fuse=fuse)
        for _ in range(4):
            x, dy = rows(device, dtype, 32, 16), rows(device, dtype, 32, 8)
            model(x).backward(dy)
            truth.add_product(dy, x)
        met[fuse] = truth.contains(model[0].weight.grad)
    assert met == {True: True, False: False}


@every_device
@sixteen_bit
@pytest.mark.parametrize("make", [linear, embedding])
def test_no_16_bit_weight_gradient_is_written(device, dtype, make):
    counts = {}
    for fuse in (True, False):
        model = make(device, dtype)
        weight = model[0].weight
        gk.attach(model, fuse=fuse)
        x = tokens(device, 3) if make is embedding else rows(device, dtype, 3, 16)
        y = model(x)
        with Written(weight) as written:
            y.backward(torch.ones_like(y))
        counts[fuse] = written.count_16_bit()
    assert counts[True] == 0 and counts[False] > 0


@every_device
@pytest.mark.parametrize("n_in, n_out", [(0, 3), (3, 0), (1, 1), (1, 3), (3, 1)])
def test_degenerate_weights(device, n_in, n_out):
    model = nn.Sequential(nn.Linear(1, 1)).to(device)
    model[0].weight = nn.Parameter(torch.ones(n_out, n_in, device=device))
    model[0].bias = nn.Parameter(torch.ones(n_out, device=device))
    fused(model)
    for _ in range(2):
        model(torch.ones(4, n_in, device=device)).sum().backward()
    assert model[0].weight.grad.tolist() == torch.full((n_out, n_in), 8.0).tolist()
    assert model[0].bias.grad.tolist() == [8.0] * n_out


@every_device
def test_no_tokens_open_a_window_with_zeros(device):
    model = fused(nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)).to(device))
    for param in model.parameters():
        param.main_grad.fill_(float("nan"))
    model[0](torch.ones(0, 4, device=device)).sum().backward()
    model[1](tokens(device, 0)).sum().backward()
    for param in model.parameters():
        assert param.grad.abs().max() == 0


@every_device
def test_a_module_called_several_times(device):
    stock, model = stock_and_fused(linear(device, n_in=8))
    for each in (stock, model):
        x = torch.linspace(-1, 1, 8, device=device)
        each(each(each(x))).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, stock[0].weight.grad, rtol=1e-5, atol=1e-6)


@every_device
def test_bits_do_not_change_from_run_to_run(device):
    model = fused(language_model(device, torch.bfloat16))
    indices = tokens(device, 4, 64)
    sums = []
    for _ in range(2):
        model.zero_grad()
        for _ in range(2):
            model(indices).float().square().sum().backward()
        sums.append([p.grad.clone() for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*sums, strict=True))


@every_device
def test_float64_takes_the_hook(device):
    model = fused(linear(device, torch.float64))
    y = model(rows(device, torch.float64))
    assert not is_fused(y)
    y.sum().backward()
    assert model[0].weight.grad.dtype == torch.float64
