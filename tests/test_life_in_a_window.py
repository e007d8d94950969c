"""What happens to a model between two micro-batches, or between two windows, loses nothing."""

import copy
import io
import pickle

import pytest
import torch
from hook_cases import assert_main, backward, batch, every_hook, float32_sums, micro_gradients, mlp

import gradacc_kernels as gk


def cast_by_half(model):
    return model.half()


def cast_by_to(model):
    return model.to(torch.float32)


@every_hook
@pytest.mark.parametrize("cast", [cast_by_half, cast_by_to], ids=["half", "to"])
@pytest.mark.parametrize("when", ["before a window", "in the middle"])
def test_a_cast(hook, queueing, cast, when):
    device, backend = hook
    model, inputs = mlp(device), [batch(device) for _ in range(3)]
    stock = copy.deepcopy(model)
    gk.attach(model, backend=backend)
    micro = micro_gradients(stock, inputs[:2])
    for x in inputs[:2]:
        backward(model, x)
    if when == "before a window":
        model.zero_grad()
        micro.clear()
    for each in (model, stock):
        cast(each)
    x = inputs[2].to(stock[0].weight.dtype)
    micro += micro_gradients(stock, [x])
    backward(model, x)
    assert_main(model.parameters(), float32_sums(micro))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("when", ["before a window", "in the middle"])
def test_a_move(when, queueing):
    model, inputs = mlp("cpu"), [batch("cpu") for _ in range(3)]
    stock = copy.deepcopy(model)
    gk.attach(model)
    micro = micro_gradients(stock, inputs[:2])
    for x in inputs[:2]:
        backward(model, x)
    if when == "before a window":
        model.zero_grad()
        micro.clear()
    for each in (model, stock):
        each.to("cuda")
    x = inputs[2].to("cuda")
    micro = [[grad.to("cuda") for grad in grads] for grads in micro] + micro_gradients(stock, [x])
    backward(model, x)
    assert_main(model.parameters(), float32_sums(micro))


@every_hook
def test_loading_in_the_middle_of_a_window_keeps_the_sums(hook, queueing):
    device, backend = hook
    model, inputs = mlp(device), [batch(device) for _ in range(2)]
    before, after = copy.deepcopy(model), mlp(device)
    gk.attach(model, backend=backend)
    backward(model, inputs[0])
    model.load_state_dict(after.state_dict())
    backward(model, inputs[1])
    micro = [micro_gradients(net, [x])[0] for net, x in zip((before, after), inputs, strict=True)]
    assert_main(model.parameters(), float32_sums(micro))


@every_hook
def test_parameters_assigned_in_the_middle_of_a_window_start_anew(hook, queueing):
    """As in stock: the sums stay with the objects that were there before."""
    device, backend = hook
    model, inputs = mlp(device), [batch(device) for _ in range(2)]
    before, after = copy.deepcopy(model), mlp(device)
    gk.attach(model, backend=backend)
    backward(model, inputs[0])
    old = list(model.parameters())
    model.load_state_dict(after.state_dict(), assign=True)
    backward(model, inputs[1])
    assert_main(
        model.parameters(), [grad.float() for grad in micro_gradients(after, inputs[1:])[0]]
    )
    for param, grad in zip(old, micro_gradients(before, inputs[:1])[0], strict=True):
        assert param.grad.dtype == torch.bfloat16 and param.grad.equal(grad)


@every_hook
def test_detached_and_attached_in_the_middle_of_a_window(hook, queueing):
    device, backend = hook
    model, inputs = mlp(device), [batch(device) for _ in range(3)]
    micro = micro_gradients(copy.deepcopy(model), inputs)
    accumulator = gk.attach(model, backend=backend)
    for x in inputs[:2]:
        backward(model, x)
    accumulator.detach()
    gk.attach(model, backend=backend)
    backward(model, inputs[2])
    rounded = [sums.bfloat16() for sums in float32_sums(micro[:2])]
    assert_main(model.parameters(), float32_sums([rounded, micro[2]]))


@every_hook
@pytest.mark.parametrize("way", ["state_dict", "save", "pickle", "deepcopy"])
def test_an_optimizer_is_saved_without_the_buffers(hook, way):
    device, backend = hook
    model = mlp(device, torch.float32)
    stock = copy.deepcopy(model)
    gk.attach(model, backend=backend)
    size, results = sum(p.nbytes for p in model.parameters()), []
    for each in (model, stock):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        torch.manual_seed(3)
        for _ in range(2):
            backward(each, batch(device, torch.float32))
            optimizer.step()
            optimizer.zero_grad()
        backward(each, batch(device, torch.float32))
        if each is model:
            assert_main(model.parameters(), [p.grad for p in model.parameters()])
        file = io.BytesIO()
        if way == "state_dict":
            torch.save(optimizer.state_dict(), file)
            state = torch.load(io.BytesIO(file.getvalue()))
            optimizer = torch.optim.AdamW(each.parameters())
            optimizer.load_state_dict(state)
            optimizer.step()
            results.append(list(each.parameters()))
            continue
        if way == "deepcopy":
            twin = copy.deepcopy(optimizer)
        elif way == "pickle":
            file.write(pickle.dumps(optimizer))
            twin = pickle.loads(file.getvalue())
        else:
            torch.save(optimizer, file)
            twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert file.tell() < 3 * size + 20_000  # parameters and two averages
        params = twin.param_groups[0]["params"]
        for param, own in zip(params, each.parameters(), strict=True):
            param.grad = own.grad.clone()
        twin.step()
        results.append(params)
    assert file.tell() < 3 * size + 20_000
    for ours, theirs in zip(*results, strict=True):
        assert ours.equal(theirs) and ours.dtype == torch.float32
