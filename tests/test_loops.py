"""Training loops as they are written for stock PyTorch, step for step beside a stock twin."""

import pytest
import torch
from hook_cases import (
    attached_and_stock,
    backward,
    batch,
    every_hook,
    float32_sums,
    micro_gradients,
)


def assert_attached(model):
    """The attachment is in effect: each `.grad` is the main gradient."""
    for param in model.parameters():
        assert param.grad.data_ptr() == param.main_grad.data_ptr()


def assert_equal(ours, stock):
    for param, expected in zip(ours.parameters(), stock.parameters(), strict=True):
        assert param.equal(expected)


@every_hook
@pytest.mark.parametrize("whose", ["model", "optimizer"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(hook, queueing, whose, set_to_none):
    device, _ = hook
    model, stock = attached_and_stock(hook, torch.float32)
    optimizers = {each: torch.optim.AdamW(each.parameters(), lr=0.1) for each in (model, stock)}
    for _ in range(3):
        inputs = [batch(device, torch.float32) for _ in range(2)]
        for each, optimizer in optimizers.items():
            for x in inputs:
                backward(each, x)
            if each is model:
                assert_attached(model)
            optimizer.step()
            (each if whose == "model" else optimizer).zero_grad(set_to_none=set_to_none)
        for param in model.parameters():
            if set_to_none:
                assert param.grad is None
            else:
                assert param.grad.data_ptr() == param.main_grad.data_ptr()
                assert not param.grad.any()
    assert_equal(model, stock)


@every_hook
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_with_float32_parameters(hook, queueing, dtype):
    device, _ = hook
    model, stock = attached_and_stock(hook, torch.float32, fuse=False)
    optimizers = {each: torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, stock)}
    for _ in range(3):
        inputs = [batch(device, torch.float32) for _ in range(3)]
        for each, optimizer in optimizers.items():
            for x in inputs:
                with torch.autocast(device, dtype):
                    loss = each(x).float().square().mean()
                loss.backward()
            if each is model:
                assert_attached(model)
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(model, stock)


OVERFLOWS = (3, 4)  # the steps in which a micro-batch overflows


def scaled_run(model, steps, device, optimizer, is_attached):
    """torch's own loop with a GradScaler; yields the scale and the parameters after each step."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=2)
    for number, inputs in enumerate(steps):
        for micro, x in enumerate(inputs):
            with torch.autocast(device, torch.float16):
                loss = model(x).float().square().mean() / len(inputs)
            if number in OVERFLOWS and micro == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        if is_attached:
            assert_attached(model)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield scaler.get_scale(), [p.detach().clone() for p in model.parameters()]


def check_schedule(runs):
    """Both runs skipped the steps that overflowed, backed off there, and grew elsewhere."""
    histories = [[scale for scale, _ in run] for run in runs]
    assert histories[0] == histories[1] == [256, 512, 512, 256, 128, 128, 256, 256]
    for run in runs:
        for number in range(1, len(run)):
            stays = all(a.equal(b) for a, b in zip(run[number - 1][1], run[number][1], strict=True))
            assert stays == (number in OVERFLOWS)


@every_hook
def test_grad_scaler_unmodified(hook, queueing):
    device, _ = hook
    steps = [[batch(device, torch.float32) for _ in range(3)] for _ in range(8)]
    runs = []
    for each in attached_and_stock(hook, torch.float32, fuse=False):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        runs.append(list(scaled_run(each, steps, device, optimizer, is_attached=not runs)))
    check_schedule(runs)
    for ours, theirs in zip(runs[0][-1][1], runs[1][-1][1], strict=True):
        assert ours.equal(theirs)


@every_hook
def test_grad_scaler_with_fused_modules(hook):
    """Fused weight gradients are not rounded to float16, so that the parameters differ a little."""
    device, _ = hook
    steps = [[batch(device, torch.float32) for _ in range(3)] for _ in range(8)]
    runs = []
    for each in attached_and_stock(hook, torch.float32, fuse=True):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        runs.append(list(scaled_run(each, steps, device, optimizer, is_attached=not runs)))
    check_schedule(runs)
    for ours, theirs in zip(runs[0][-1][1], runs[1][-1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=2**-8)


@every_hook
def test_grad_scaler_over_float16_parameters(hook, queueing):
    """Float32 masters, whose gradients unscale_ finds in float32; stock has 16-bit ones."""
    device, _ = hook
    model, stock = attached_and_stock(hook, torch.float16)
    params = list(model.parameters())
    masters, expected = ([p.detach().float() for p in params] for _ in range(2))
    optimizer, other = (torch.optim.SGD(tensors, lr=0.01) for tensors in (masters, expected))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**6, growth_interval=2)
    scales = []
    for number in range(6):
        scale = scaler.get_scale()
        scaler.scale(torch.ones((), device=device))  # so that there is a scale to read
        inputs = [batch(device, torch.float16) for _ in range(3)]
        if number == 3:
            inputs[1][0, 0] = float("inf")
        for x in inputs:
            scaler.scale(model(x).float().square().mean()).backward()
        for master, param in zip(masters, params, strict=True):
            master.grad = param.grad
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())

        stock.load_state_dict(model.state_dict())
        if number != 3:
            weights = list(stock.parameters())
            micro = [
                torch.autograd.grad(stock(x).float().square().mean() * scale, weights)
                for x in inputs
            ]
            for master, grad in zip(expected, float32_sums(micro), strict=True):
                master.grad = grad * (1 / scale)
            other.step()
        assert all(a.equal(b) for a, b in zip(masters, expected, strict=True))
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        model.zero_grad()
    assert scales == [64, 128, 128, 64, 64, 128]


@every_hook
def test_16_bit_parameters_with_float32_masters(hook, queueing):
    """The loop of the README, where the whole gradient is the float32 sum."""
    device, _ = hook
    model, stock = attached_and_stock(hook, torch.bfloat16)
    params = list(model.parameters())
    masters, expected = ([p.detach().float() for p in params] for _ in range(2))
    optimizers = [torch.optim.AdamW(tensors, lr=0.01) for tensors in (masters, expected)]
    for _ in range(3):
        inputs = [batch(device) for _ in range(3)]
        for x in inputs:
            backward(model, x)
        for master, param in zip(masters, params, strict=True):
            master.grad = param.grad
        sums = float32_sums(micro_gradients(stock, inputs))
        for master, grad in zip(expected, sums, strict=True):
            master.grad = grad
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
            torch._foreach_copy_(list(stock.parameters()), expected)
        model.zero_grad()
    assert_equal(model, stock)
    assert all(a.equal(b) for a, b in zip(masters, expected, strict=True))
