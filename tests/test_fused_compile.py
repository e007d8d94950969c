"""torch.compile around, inside and beside fused modules."""

import copy
import warnings

import pytest
import torch
from fused_cases import (
    assert_equal,
    every_device,
    fused,
    grads,
    is_fused,
    language_model,
    linear,
    rows,
    tokens,
)
from torch import nn

import gradacc_kernels as gk
from gradacc_kernels import fused as sources

every_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


@pytest.fixture(autouse=True)
def from_scratch():
    """No compiled code, and no warning given."""
    torch._dynamo.reset()
    sources._warn_compiled_once.cache_clear()


class Warnings:
    """Collects what the package warns of."""

    def __enter__(self):
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exception):
        return self._catch.__exit__(*exception)

    @property
    def texts(self):
        texts = [str(warning.message) for warning in self._caught]
        return [text for text in texts if text.startswith("gradacc_kernels")]


def loss(model, indices):
    return model(indices).float().square().sum()


def check(model, compiled, indices, **tolerance):
    """Two micro-batches through `compiled` give the gradients of two through the bare model."""
    before = [p.grad_dtype for p in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        loss(compiled, indices).backward()
    for param in model.parameters():
        assert param.grad.dtype == torch.float32
        assert param.grad.data_ptr() == param.main_grad.data_ptr()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        loss(model, indices).backward()
    for actual, expected in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)
    assert [p.grad_dtype for p in model.parameters()] == before


@every_device
@every_backend
@pytest.mark.parametrize("compiled_first", [True, False], ids=["compiled first", "attached first"])
@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
def test_a_compiled_model(device, backend, compiled_first, way):
    model = language_model(device)
    indices = tokens(device)
    options = {"backend": backend, "fullgraph": True}

    def compiled():
        if way == "torch.compile":
            return torch.compile(model, **options)
        model.compile(**options)
        return model

    with Warnings() as caught:
        if compiled_first:
            target = compiled()
            loss(target, indices)  # so that there is code
        fused(model)
        if not compiled_first:
            target = compiled()
        for _ in range(2):
            check(model, target, indices)
    (text,) = caught.texts
    assert "inside torch.compile, modules are not fused" in text and "fuse=False" in text


@every_device
def test_one_warning_for_all_models(device):
    indices = tokens(device)
    with Warnings() as caught:
        for _ in range(2):
            model = fused(language_model(device))
            loss(torch.compile(model, backend="eager"), indices).backward()
    assert len(caught.texts) == 1


@every_device
@pytest.mark.parametrize("fuse", [False, "auto"])
def test_no_warning_where_nothing_is_fused(device, fuse):
    model = language_model(device)
    gk.attach(model, fuse=fuse)
    with Warnings() as caught:
        loss(torch.compile(model, backend="eager", fullgraph=True), tokens(device)).backward()
    assert caught.texts == []


@every_device
@every_backend
@pytest.mark.parametrize("compiled_first", [True, False], ids=["compiled first", "attached first"])
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_module_inside_of_an_eager_model(device, backend, compiled_first, way):
    model = language_model(device, tied=False)
    stock = copy.deepcopy(model)
    indices = tokens(device)

    def compile_a_part():
        if way == "wrapped":
            model.up = torch.compile(model.up, backend=backend, fullgraph=True)
        else:
            model.up.compile(backend=backend, fullgraph=True)

    with Warnings() as caught:
        if compiled_first:
            compile_a_part()
        fused(model)
        if not compiled_first:
            compile_a_part()
        y = model(indices)
        assert is_fused(y)
        for _ in range(2):
            loss(model, indices).backward()
            loss(stock, indices).backward()
    assert len(caught.texts) == 1
    for ours, theirs in zip(grads(model), grads(stock), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)


@every_device
@every_backend
def test_an_eager_module_inside_of_a_compiled_model(device, backend):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)

        def forward(self, x):
            return torch._dynamo.disable(self.second)(torch.tanh(self.first(x)))

    model = Mixed().to(device)
    model.second.weight.data.zero_()
    gk.attach(model, fuse=True)
    compiled = torch.compile(model, backend=backend)
    with Warnings() as caught:
        y = compiled(rows(device))
        assert is_fused(y)
    assert len(caught.texts) == 1
    with Warnings():
        check(model, compiled, rows(device))


@every_device
@every_backend
def test_detach_gives_stock_back(device, backend):
    model = language_model(device, torch.bfloat16)
    stock = copy.deepcopy(model)
    indices = tokens(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with Warnings():
        accumulator = gk.attach(model, fuse=True)
        loss(compiled, indices).backward()
        accumulator.detach()
    model.zero_grad()
    with Warnings() as caught:
        loss(compiled, indices).backward()
    assert caught.texts == []
    loss(torch.compile(stock, backend=backend), indices).backward()
    assert_equal(grads(model), grads(stock))


@every_device
@every_backend
def test_autocast(device, backend):
    model = linear(device)

    def run(x):
        with torch.autocast(device, torch.bfloat16):
            return model(x)

    fused(model)
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    x = rows(device)
    with Warnings() as caught:
        for _ in range(2):
            compiled(x).float().sum().backward()
    assert len(caught.texts) == 1
    ours = [g.clone() for g in grads(model)]
    model.zero_grad()
    for _ in range(2):
        run(x).float().sum().backward()
    for actual, expected in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


@every_device
def test_an_optimizer_step_between_compiled_and_eager_forwards(device):
    """The eager forward's 16-bit copy follows what a compiled training step did to the weights."""
    model = fused(linear(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = rows(device)

    def run():
        with torch.autocast(device, torch.bfloat16):
            return model(x)

    compiled = torch.compile(run, backend="eager")
    run().float().sum().backward()
    with Warnings():
        compiled().float().sum().backward()
        optimizer.step()
        assert run().equal(compiled())
