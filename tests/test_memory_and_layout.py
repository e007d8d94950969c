"""Layouts that training loops have, and saved tensors that live elsewhere."""

import copy

import torch
from hook_cases import backward, batch, every_hook, float32_sums, micro_gradients, mlp
from torch import nn
from torch.autograd.graph import save_on_cpu

import gradacc_kernels as gk


@every_hook
def test_a_transposed_weight_keeps_its_strides(hook, queueing):
    device, backend = hook
    layer = nn.Linear(16, 8).to(device, torch.bfloat16)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    inputs = [batch(device) for _ in range(3)]
    micro = micro_gradients(layer, inputs)
    gk.attach(layer, backend=backend)
    for x in inputs:
        backward(layer, x)
    assert layer.weight.grad.stride() == layer.weight.stride() == (1, 8)
    for param, expected in zip(layer.parameters(), float32_sums(micro), strict=True):
        assert param.grad.equal(expected)


@every_hook
def test_a_window_in_channels_last(hook, queueing):
    device, backend = hook
    conv = nn.Conv2d(4, 8, 3).to(device, torch.bfloat16, memory_format=torch.channels_last)
    inputs = [torch.randn(2, 4, 6, 6, device=device).bfloat16() for _ in range(3)]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    micro = micro_gradients(conv, inputs)
    gk.attach(conv, backend=backend)
    for x in inputs:
        backward(conv, x)
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    for param, expected in zip(conv.parameters(), float32_sums(micro), strict=True):
        assert param.grad.equal(expected)


@every_hook
def test_saved_tensors_on_the_cpu(hook, queueing):
    device, backend = hook
    model, inputs = mlp(device), [batch(device) for _ in range(2)]
    micro = micro_gradients(copy.deepcopy(model), inputs)
    gk.attach(model, backend=backend)
    for x in inputs:
        with save_on_cpu():
            loss = model(x).float().square().sum()
        loss.backward()
    for param, expected in zip(model.parameters(), float32_sums(micro), strict=True):
        assert param.grad.equal(expected)
