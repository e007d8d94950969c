"""Which modules are fused, and that they remain what they are."""

import copy
import functools
import inspect

import pytest
import torch
from fused_cases import (
    Case,
    assert_equal,
    embedding,
    every_device,
    every_kind,
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

import gradacc_kernels as gk


@every_device
def test_what_a_module_is_does_not_change(device):
    stock, model = stock_and_fused(language_model(device))
    assert type(model.up) is nn.Linear and isinstance(model.embedding, nn.Embedding)
    assert repr(model) == repr(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]
    assert [name for name, _ in model.named_buffers()] == []


@every_device
def test_the_signature_of_forward_does_not_change(device):
    stock, model = stock_and_fused(language_model(device))
    for name in ("up", "embedding"):
        ours, theirs = (getattr(each, name).forward for each in (model, stock))
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__name__ == theirs.__name__ == "forward"


@every_device
def test_repr_tells_what_is_fused(device):
    model = language_model(device)
    accumulator = gk.attach(model, fuse=True)
    assert "fused: 1 Embedding, 3 Linear" in repr(accumulator)
    accumulator.detach()
    assert "fused" not in repr(accumulator)
    assert all("forward" not in vars(module) for module in model.modules())
    accumulator = gk.attach(model, fuse=False)
    assert "fused" not in repr(accumulator)
    assert not is_fused(model(tokens(device)))


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.Linear):
    pass


@every_device
def test_subclasses(device):
    model = nn.Sequential(Doubled(4, 4), Renamed(4, 4)).to(device)
    stock = copy.deepcopy(model)
    accumulator = gk.attach(model, fuse=True)
    assert "fused: 1 Renamed" in repr(accumulator)
    x = torch.ones(3, 4, device=device)
    assert not is_fused(model[0](x)) and is_fused(model(x))
    assert model(x).equal(stock(x))
    for each in (model, stock):
        each(x).sum().backward()
    assert_equal(grads(model[0]), grads(stock[0]))


class LowRank(nn.Module):
    """What adapter libraries put in the place of a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False).to(base.weight)
        self.up = nn.Linear(2, base.out_features, bias=False).to(base.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@every_device
@pytest.mark.parametrize("attach_first", [True, False])
def test_adapters_around_a_layer(device, attach_first):
    model = linear(device)
    accumulator = gk.attach(model, fuse=True) if attach_first else None
    model[0] = LowRank(model[0])
    if not attach_first:
        accumulator = gk.attach(model, fuse=True)
        assert "fused: 2 Linear" in repr(accumulator)
    stock = copy.deepcopy(model)
    x = rows(device)
    for each in (model, stock):
        each(x).square().sum().backward()
    assert model[0].base.weight.grad is None and model[0].up.weight.grad is not None
    for ours, theirs in zip(grads(model), grads(stock), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@every_device
def test_a_module_whose_weight_is_read_by_its_parent(device):
    """The output projection of attention is never called."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).to(device)
    stock, model = stock_and_fused(nn.Sequential(layer))
    x = rows(device, torch.float32, 2, 3, 16)
    for each in (stock, model):
        each(x).square().sum().backward()
    for ours, theirs in zip(grads(model), grads(stock), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_device
def test_weights_of_other_layouts_take_the_hook(device):
    model = linear(device, torch.bfloat16)
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    assert not model[0].weight.is_contiguous()
    stock, model = stock_and_fused(model)
    x = rows(device, torch.bfloat16)
    assert not is_fused(model(x))
    for each in (stock, model):
        each(x).float().square().sum().backward()
    assert_equal(grads(model), [grad.float() for grad in grads(stock)])


@every_device
def test_a_bias_of_another_shape(device):
    results = []
    for attach in (lambda model: model, fused):
        model = linear(device, n_in=4, n_out=4)
        model[0].bias = nn.Parameter(torch.zeros(1, 4, device=device))
        attach(model)(torch.ones(3, 4, device=device)).sum().backward()
        results.append(grads(model))
    assert_equal(*results)


def double(forward):
    """What libraries do that wrap the forward of an instance."""

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs) * 2

    return wrapped


@every_device
@every_kind
def test_a_forward_put_on_before_attach_is_left_alone(device, kind):
    case = Case(kind, device)
    layer = case.model[0]
    layer.forward = wrapped = double(layer.forward)
    accumulator = gk.attach(case.model, fuse=True)
    assert layer.forward is wrapped and "fused: no module" in repr(accumulator)
    y = case.model(case.x)
    assert not is_fused(y)
    y.sum().backward()
    assert case.value == 2.0
    accumulator.detach()
    assert layer.forward is wrapped


@every_device
@every_kind
def test_a_forward_put_on_after_attach_is_kept(device, kind):
    case = Case(kind, device)
    layer = case.model[0]
    accumulator = gk.attach(case.model, fuse=True)
    before = layer.forward
    layer.forward = wrapped = double(before)
    case.model(case.x).sum().backward()
    assert case.value == 2.0
    case.model.half()  # which is noticed, and starts again
    x = case.x.half() if case.x.is_floating_point() else case.x
    case.model(x).sum().backward()
    assert case.value == 4.0
    accumulator.detach()
    assert layer.forward is wrapped
    case.model.zero_grad()
    y = case.model(x)
    assert not is_fused(y)
    y.sum().backward()
    assert case.weight.grad.unique().tolist() == [2.0]
    layer.forward = before  # as such libraries take their wrapper off
    assert not is_fused(case.model(x))
    fused(case.model)
    assert is_fused(case.model(x))


@every_device
@every_kind
def test_hooks_of_the_module_are_called(device, kind):
    case = Case(kind, device)
    seen = []
    layer = case.model[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: output * 2)
    layer.register_full_backward_hook(lambda module, before, after: seen.append("backward"))
    fused(case.model)
    case.model(case.x).sum().backward()
    assert seen == ["pre", "backward"] and case.value == 2.0


@every_device
def test_the_refused_options_of_an_embedding(device):
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        model = language_model(device, tied=False, **option)
        before = [(p.grad, p.grad_dtype) for p in model.parameters()]
        (name,) = option
        with pytest.raises(ValueError, match=f"'embedding', which has {name} set; fuse='auto'"):
            gk.attach(model, fuse=True)
        assert [(p.grad, p.grad_dtype) for p in model.parameters()] == before
        assert not model._forward_pre_hooks
        assert all("forward" not in vars(module) for module in model.modules())


@every_device
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_auto_leaves_such_embeddings_to_the_hook(device, option):
    size = {"vocabulary": 300, "width": 256}  # large enough for CUDA
    stock = embedding(device, **size, **option)
    stock.append(nn.Linear(256, 256, device=device))
    model = copy.deepcopy(stock)
    accumulator = gk.attach(model, fuse="auto")
    assert ("fused: 1 Linear" if device == "cuda" else "fused: no module") in repr(accumulator)
    indices = torch.tensor([3, 3, 5], device=device)
    for each in (stock, model):
        each[0](indices).square().sum().backward()
    assert_equal(grads(model[0]), grads(stock[0]))
    assert_equal([model[0].weight.detach()], [stock[0].weight.detach()])


@pytest.mark.parametrize("fuse", ["yes", None, 2, "True", 0.5])
def test_other_values_of_fuse_are_refused(fuse):
    model = linear("cpu")
    with pytest.raises(ValueError, match="fuse must be 'auto', True or False, got"):
        gk.attach(model, fuse=fuse)
    assert not model._forward_pre_hooks and "forward" not in vars(model[0])
    fused(model)  # nothing was attached


def test_a_list_cannot_be_fused():
    model = linear("cpu")
    with pytest.raises(ValueError, match="fuse=True needs the module"):
        gk.attach(list(model.parameters()), fuse=True)
    accumulator = gk.attach(list(model.parameters()), fuse="auto")
    assert not is_fused(model(rows("cpu"))) and "fused" not in repr(accumulator)
