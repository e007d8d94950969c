"""Fused modules under torch.func, tracing, parametrisations and tensor subclasses: as stock."""

import io

import pytest
import torch
from fused_cases import (
    assert_equal,
    embedding,
    every_device,
    fused,
    grads,
    is_fused,
    language_model,
    linear,
    rows,
    stock_and_fused,
    tokens,
)
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import gradacc_kernels as gk


class Marked(torch.Tensor):
    """A subclass that must come out of what it went into."""


@every_device
def test_functional_call_computes_with_the_tensors_given(device):
    model = fused(linear(device, n_in=4, n_out=4, bias=False))
    given = {"0.weight": torch.full((4, 4), 2.0, device=device, requires_grad=True)}
    x = torch.ones(1, 4, device=device)
    y = functional_call(model, given, (x,))
    assert y.unique().tolist() == [8.0] and not is_fused(y)
    y.sum().backward()
    assert given["0.weight"].grad.unique().tolist() == [1.0] and model[0].weight.grad is None
    y = model(x)
    assert is_fused(y)
    y.sum().backward()
    assert model[0].weight.grad.unique().tolist() == [1.0]


TRANSFORMS = {
    "grad of parameters": lambda m, x: list(
        torch.func.grad(lambda p: functional_call(m, p, (x,)).square().sum())(
            {name: p.detach() for name, p in m.named_parameters()}
        ).values()
    ),
    "grad of the input": lambda m, x: [torch.func.grad(lambda t: m(t).square().sum())(x)],
    "vmap": lambda m, x: [torch.func.vmap(m)(x)],
    "vmap of grad": lambda m, x: [torch.func.vmap(torch.func.grad(lambda t: m(t).sum()))(x)],
    "jvp": lambda m, x: list(torch.func.jvp(m, (x,), (x,))),
    "jacrev": lambda m, x: [torch.func.jacrev(m)(x)],
    "jacfwd": lambda m, x: [torch.func.jacfwd(m)(x)],
    "hessian": lambda m, x: [torch.func.hessian(lambda t: m(t).square().sum())(x)],
    "functionalize": lambda m, x: [torch.func.functionalize(m)(x)],
}


@every_device
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_a_linear(device, transform):
    stock, model = stock_and_fused(linear(device))
    x = rows(device)
    results = []
    for each in (stock, model):
        tensors = transform(each, x)
        assert grads(each) == [None, None]
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        if differentiable:
            sum(tensor.square().sum() for tensor in differentiable).backward()
        results.append([*(tensor.detach() for tensor in tensors), *grads(each)])
    assert_equal(*results)
    assert is_fused(model(x))


@every_device
def test_transforms_of_an_embedding(device):
    stock, model = stock_and_fused(embedding(device))
    indices = tokens(device, 3, 2)
    assert torch.func.vmap(model)(indices).equal(torch.func.vmap(stock)(indices))
    one_hot = {"0.weight": torch.eye(11, device=device)}
    y = torch.func.vmap(lambda i: functional_call(model, one_hot, (i,)))(indices)
    assert y.argmax(-1).equal(indices)


@every_device
def test_a_transform_that_does_not_wrap_the_input(device):
    results = []
    for model in stock_and_fused(linear(device)):
        x = torch.ones(3, 16, device=device)
        factor = torch.tensor(2.0, device=device)
        derivative = torch.func.grad(lambda s, m=model, x=x: (m(x) * s).sum())(factor)
        assert derivative.requires_grad
        derivative.backward()
        results.append([derivative.detach(), *as_float(grads(model))])
    assert_equal(*results)


def as_float(gradients):
    return [grad.float() for grad in gradients]


@every_device
@pytest.mark.parametrize("of", ["input", "weight"])
def test_forward_derivatives(device, of):
    tangents = []
    for model in stock_and_fused(linear(device)):
        x = torch.linspace(-1, 1, 64, device=device).reshape(4, 16)
        with forward_ad.dual_level():
            if of == "input":
                y = model(forward_ad.make_dual(x, x.flip(0)))
            else:
                weight = model[0].weight.detach()
                dual = {"0.weight": forward_ad.make_dual(weight, weight.flip(0))}
                y = functional_call(model, dual, (x,))
            assert not is_fused(y)
            tangents.append(forward_ad.unpack_dual(y).tangent.detach())
    assert_equal(tangents[:1], tangents[1:])


@every_device
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tracing(device):
    stock, model = stock_and_fused(language_model(device))
    indices, others = tokens(device), tokens(device)
    traced = torch.jit.trace(model, indices)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for function in (traced, torch.jit.load(file)):
        assert function(others).equal(stock(others))
    traced(others).square().sum().backward()
    stock(others).square().sum().backward()
    for ours, theirs in zip(grads(model), grads(stock), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.xfail(strict=True, reason="the instance's forward has no source")
@every_device
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripting_a_layer(device):
    stock, model = stock_and_fused(linear(device))
    x = rows(device)
    assert torch.jit.script(model[0])(x).equal(stock(x))


@every_device
def test_symbolic_tracing(device):
    class IntoLeaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    stock, model = stock_and_fused(linear(device))
    x = rows(device)
    shallow = torch.fx.symbolic_trace(model)
    assert is_fused(shallow(x)) and shallow(x).equal(stock(x))
    deep = torch.fx.GraphModule(model, IntoLeaves().trace(model))
    assert "linear" in deep.code and deep(x).equal(stock(x))
    for function in (shallow, deep):
        function(x).sum().backward()
    # A matrix product need not add in the order of a sum.
    torch.testing.assert_close(model[0].weight.grad, 2 * x.sum(0).expand(8, 16))


@every_device
@pytest.mark.filterwarnings("ignore:gradacc_kernels. inside torch.compile")
def test_export(device):
    stock, model = stock_and_fused(linear(device))
    x = rows(device)
    program = torch.export.export(model, (x,))
    assert program.module()(x).equal(stock(x))


@every_device
@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("kind", ["weight", "bias", "weight_norm"])
def test_parametrisations(device, attach_first, kind):
    class Double(nn.Module):
        def forward(self, tensor):
            return 2 * tensor

    def change(model):
        if kind == "weight_norm":
            parametrizations.weight_norm(model[0])
        else:
            parametrize.register_parametrization(model[0], kind, Double())

    model, stock = linear(device), linear(device)
    stock.load_state_dict(model.state_dict())
    if attach_first:
        fused(model)
    change(model)
    change(stock)
    if not attach_first:
        fused(model)
    x = rows(device)
    for _ in range(2):
        for each in (stock, model):
            y = each(x)
            assert not is_fused(y)
            y.square().sum().backward()
        assert y.equal(stock(x))
    for ours, theirs in zip(grads(model), grads(stock), strict=True):
        torch.testing.assert_close(ours, theirs)
    if kind == "weight":
        parametrize.remove_parametrizations(model[0], "weight")
        parametrize.remove_parametrizations(stock[0], "weight")
        model.zero_grad()
        assert model(x).equal(stock(x))


@every_device
def test_pruning(device):
    model = fused(linear(device))
    x = torch.ones(3, 16, device=device)
    prune.random_unstructured(model[0], "weight", amount=0.5)
    y = model(x)
    assert not is_fused(y) and y.equal(nn.functional.linear(x, model[0].weight, model[0].bias))
    y.sum().backward()
    assert model[0].weight_orig.grad.equal(3 * model[0].weight_mask)
    prune.remove(model[0], "weight")
    assert model(x).equal(y)


@every_device
@pytest.mark.parametrize("make", [linear, embedding])
def test_a_tensor_subclass_keeps_its_class(device, make):
    model = fused(make(device))
    x = tokens(device, 3) if make is embedding else rows(device)
    expected = model(x)
    y = model(x.as_subclass(Marked))
    assert type(y) is Marked and not is_fused(y)
    assert y.as_subclass(torch.Tensor).equal(expected)
    y.sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.xfail(strict=True, reason="a fused module does not call torch.nn.functional")
@every_device
def test_a_function_mode_sees_what_it_sees_in_stock(device):
    class Record(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    x = rows(device)
    seen = []
    for model in stock_and_fused(linear(device)):
        with Record() as record:
            model(x)
        seen.append(nn.functional.linear in record.seen)
    assert seen == [True, True]


@every_device
def test_counting_floating_point_operations(device):
    counts = []
    for model in stock_and_fused(language_model(device)):
        with FlopCounterMode(display=False) as counter:
            model(tokens(device))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@every_device
@pytest.mark.parametrize("make", [linear, embedding])
def test_the_input_by_keyword(device, make):
    stock, model = stock_and_fused(make(device))
    x = tokens(device, 3) if make is embedding else rows(device)
    y = model[0](input=x)
    assert y.equal(stock(x))
    y.sum().backward()
    stock(x).sum().backward()
    assert_equal(grads(model), grads(stock))


@every_device
def test_a_parameter_as_the_input(device):
    results = []
    for model in stock_and_fused(linear(device)):
        x = nn.Parameter(torch.linspace(-1, 1, 64, device=device).reshape(4, 16))
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad])
    assert_equal(*results)


@every_device
@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x[:, :5],
        lambda x: x.long(),
        lambda x: x.double(),
        lambda x: x.tolist(),
        lambda x: x.sum(),
        lambda x: None,
    ],
    ids=["too narrow", "integers", "another dtype", "a list", "a scalar", "None"],
)
def test_errors_of_the_forward_are_those_of_stock(device, bad):
    messages = []
    for model in stock_and_fused(linear(device)):
        with pytest.raises(Exception) as error:
            model(bad(torch.ones(4, 16, device=device)))
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("index", [11, -1, 1 << 40])
def test_an_index_out_of_range(index):
    messages = []
    for model in stock_and_fused(embedding("cpu")):
        with pytest.raises(IndexError) as error:
            model(torch.tensor([1, index]))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@every_device
def test_sparse_inputs(device):
    stock, model = stock_and_fused(linear(device, bias=False))
    x = torch.eye(16, device=device)
    for each in (stock, model):
        y = each(x.to_sparse())
        assert not is_fused(y)
        y.square().sum().backward()
    assert_equal(grads(model), grads(stock))


@every_device
def test_nested_tensors(device):
    stock, model = stock_and_fused(linear(device))
    parts = [rows(device, torch.float32, n, 16) for n in (2, 3)]
    for each in (stock, model):
        y = each(torch.nested.nested_tensor(parts, layout=torch.jagged))
        y.values().sum().backward()
    for ours, theirs in zip(grads(model), grads(stock), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_device
def test_a_module_put_in_place_of_a_fused_one(device):
    model = fused(linear(device, n_in=4, n_out=4, bias=False))
    x = torch.ones(1, 4, device=device)
    model[0] = nn.Linear(4, 4, bias=False, device=device)
    model[0].weight.data.fill_(2.0)
    y = model(x)
    assert y.unique().tolist() == [8.0]
    y.sum().backward()
    assert model[0].weight.grad.unique().tolist() == [1.0]


@every_device
def test_lazy_modules_are_fused_once_they_are_made(device):
    model = nn.Sequential(nn.LazyLinear(4)).to(device)
    model(torch.ones(1, 3, device=device))
    accumulator = gk.attach(model, fuse=True)
    assert "fused: 1 Linear" in repr(accumulator) and is_fused(model(torch.ones(1, 3).to(device)))
