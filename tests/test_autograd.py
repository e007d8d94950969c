"""The hook beside the rest of autograd."""

import threading

import pytest
import torch
from hook_cases import (
    Raise,
    arrive,
    backward,
    batch,
    every_hook,
    float32_sums,
    micro_gradients,
    mlp,
    parameter,
)
from torch.utils.checkpoint import checkpoint

import gradacc_kernels as gk


def assert_sums(model, micro):
    """`.grad` is the float32 sum of the micro-gradients, added one after the other."""
    params = [p for p in model.parameters() if p.requires_grad]
    for param, expected in zip(params, float32_sums(micro), strict=True):
        assert param.grad.dtype == torch.float32 and param.grad.equal(expected)


@every_hook
def test_autograd_grad_leaves_main_gradients_alone(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    expected = micro_gradients(model, [x])[0]
    gk.attach(model, backend=backend)
    backward(model, x)
    before = [p.grad.clone() for p in model.parameters()]
    assert all(a.equal(b) for a, b in zip(micro_gradients(model, [x])[0], expected, strict=True))
    x.requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    assert all(p.grad.equal(b) for p, b in zip(model.parameters(), before, strict=True))


@every_hook
def test_backward_with_inputs_reaches_only_those(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    gk.attach(model, backend=backend)
    expected = micro_gradients(model, [x])[0][0]
    model(x).float().square().sum().backward(inputs=[model[0].weight])
    assert model[0].weight.grad.equal(expected.float())
    assert model[3].weight.grad is None


@every_hook
def test_tensor_hooks_come_before_and_may_change_the_gradient(hook):
    device, backend = hook
    param = parameter([0.0], device=device)
    seen = []
    param.register_hook(lambda grad: seen.append(grad.dtype) or grad * 2)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    assert seen == [torch.bfloat16] and param.grad.item() == 6.0
    del accumulator


@every_hook
def test_post_accumulate_hooks_see_the_sum(hook, queueing):
    device, backend = hook
    param = parameter([0.0], device=device)
    seen = []
    param.register_post_accumulate_grad_hook(lambda p: seen.append(("before", p.grad.item())))
    accumulator = gk.attach([param], backend=backend)
    param.register_post_accumulate_grad_hook(lambda p: seen.append(("after", p.grad.item())))
    arrive(param, 256.0)
    arrive(param, 1.0)
    assert seen == [("before", 256.0), ("after", 256.0), ("before", 257.0), ("after", 257.0)]
    del accumulator


@every_hook
def test_an_optimizer_step_inside_backward(hook, queueing):
    device, backend = hook
    model, x = mlp(device, torch.float32), batch(device, torch.float32)
    gk.attach(model, backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    expected = micro_gradients(model, [x])[0]

    def step(param):
        with torch.no_grad():
            param.sub_(param.grad)
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    backward(model, x)
    for param, old, grad in zip(model.parameters(), before, expected, strict=True):
        assert param.grad is None
        assert param.detach().equal(old - grad)


@every_hook
def test_create_graph_is_left_to_stock(hook):
    device, backend = hook
    param = parameter([3.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    (param**3).sum().backward(create_graph=True)
    assert param.grad.item() == 27.0
    first = param.grad
    param.grad = None
    (second,) = torch.autograd.grad(first, param)
    assert second.item() == 18.0
    arrive(param, 1.0)
    assert param.grad.item() == 1.0 and param.grad.data_ptr() == param.main_grad.data_ptr()
    del accumulator


@every_hook
def test_frozen_between_forward_and_backward(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    gk.attach(model, backend=backend)
    loss = model(x).float().sum()
    model[3].weight.requires_grad_(False)
    loss.backward()
    assert model[3].weight.grad is None
    model[3].weight.requires_grad_(True)
    expected = micro_gradients(model, [x])[0]
    model.zero_grad()
    backward(model, x)
    assert_sums(model, [expected])


@every_hook
def test_attached_between_forward_and_backward(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    expected = micro_gradients(model, [x])[0]
    loss = model(x).float().square().sum()
    gk.attach(model, backend=backend)
    loss.backward()
    assert_sums(model, [expected])


@every_hook
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(hook, queueing, use_reentrant):
    device, backend = hook
    model, x = mlp(device), batch(device).requires_grad_()
    expected = micro_gradients(model, [x])[0]
    gk.attach(model, backend=backend)

    def run():
        hidden = checkpoint(model[0], x, use_reentrant=use_reentrant)
        checkpoint(model[1:], hidden, use_reentrant=use_reentrant).float().square().sum().backward()

    run()
    run()
    assert_sums(model, [expected, expected])


@every_hook
def test_a_parameter_inside_and_outside_a_reentrant_checkpoint(hook, queueing):
    device, backend = hook
    param = parameter([1.0] * 4, device=device)
    accumulator = gk.attach([param], backend=backend)
    param.main_grad.fill_(float("nan"))
    x = torch.ones(4, device=device, dtype=torch.bfloat16, requires_grad=True)
    inner = checkpoint(lambda t: t * param, x, use_reentrant=True)
    # The outer use arrives while the nested backward still is to come.
    (inner.sum() + (param * 3).sum()).backward()
    assert param.grad.tolist() == [4.0] * 4
    del accumulator


@every_hook
def test_retained_graph_and_several_losses(hook, queueing):
    device, backend = hook
    model, x = mlp(device), batch(device)
    expected = micro_gradients(model, [x])[0]
    gk.attach(model, backend=backend)
    loss = model(x).float().square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_sums(model, [expected, expected])


@every_hook
def test_a_backward_that_raises_queues_nothing(hook, queueing):
    device, backend = hook
    late, early = (parameter([0.0], torch.float32, device) for _ in range(2))
    accumulator = gk.attach([late, early], backend=backend)
    early.main_grad.fill_(float("nan"))

    # The node of `early` runs first: it is nearer to the loss.
    with pytest.raises(ValueError, match="in the middle"):
        (Raise.apply(late * 2) + early * 5).sum().backward()
    arrived = early.grad is not None
    assert not arrived or early.grad.item() == 5.0
    if queueing:
        assert not arrived
    early.grad = late.grad = None
    (late * 2 + early * 5).sum().backward()
    assert (late.grad.item(), early.grad.item()) == (2.0, 5.0)
    del accumulator


@every_hook
def test_threads_that_run_backward_at_once(hook, queueing):
    device, backend = hook
    param = parameter(torch.zeros(3000), device=device)
    accumulator = gk.attach([param], backend=backend)
    ones = torch.ones(3000, device=device, dtype=torch.bfloat16)
    param.grad = torch.zeros(3000, device=device)
    threads = [
        threading.Thread(target=lambda: [arrive(param, ones) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert param.grad.unique().tolist() == [200.0]
    del accumulator


@every_hook
@pytest.mark.parametrize("compiled_first", [False, True])
def test_torch_compile(hook, compiled_first):
    device, backend = hook
    model, x = mlp(device), batch(device)
    model[2].requires_grad_(False)
    torch._dynamo.reset()
    if compiled_first:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    accumulator = gk.attach(model, backend=backend)
    if not compiled_first:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        backward(compiled, x)
    ours = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    accumulator.detach()
    expected = micro_gradients(compiled, [x])[0]
    for grad, once in zip(ours, expected, strict=True):
        assert grad.equal(once.float() * 2)


@every_hook
def test_compiled_autograd_is_refused(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    gk.attach(model, backend=backend)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        step = torch.compile(lambda: backward(model, x), backend="eager")
        with pytest.raises(Exception, match="cannot trace the gradient hook. Turn it off"):
            step()


@every_hook
def test_gradients_of_other_dtypes(hook):
    device, backend = hook

    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, param, dtype):
            ctx.dtype = dtype
            return param.new_zeros((), dtype=torch.float32)

        @staticmethod
        def backward(ctx, _):
            return torch.full((2,), 1 + 2.0**-20, device=device, dtype=ctx.dtype), None

    param = parameter([0.0, 0.0], device=device)
    accumulator = gk.attach([param], backend=backend)
    for dtype in (torch.float32, torch.float64):
        Cast.apply(param, dtype).backward()
    assert param.grad.tolist() == [2 * (1 + 2.0**-20)] * 2
    del accumulator
