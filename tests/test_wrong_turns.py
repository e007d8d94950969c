"""Unusual use that must not lose, double or round a gradient, or read memory that is gone."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hook_cases import arrive, backward, batch, every_hook, micro_gradients, mlp, parameter

import gradacc_kernels as gk


@every_hook
def test_detaching_inside_backward_adds_what_is_queued(hook, queueing):
    device, backend = hook
    early, late = (parameter([1.0], torch.float32, device) for _ in range(2))
    accumulator = gk.attach([early, late], backend=backend)
    hooked = late * 2
    hooked.register_hook(lambda grad: accumulator.detach())
    (hooked + early * 5).sum().backward()
    assert (early.grad.item(), late.grad.item()) == (5.0, 2.0)


@every_hook
def test_detaching_inside_a_nested_backward_loses_nothing_of_the_outer_one(hook, queueing):
    device, backend = hook
    early, late = (parameter([1.0], torch.bfloat16, device) for _ in range(2))
    accumulator = gk.attach([early, late], backend=backend, scale=0.5)
    inner = torch.ones(1, device=device, requires_grad=True) * 1
    inner.register_hook(lambda grad: accumulator.detach())
    hooked = late * 2
    hooked.register_hook(lambda grad: inner.backward())
    (hooked + early * 5).sum().backward()
    # The other one arrived after detach, and has no scale.
    assert (early.grad.item(), late.grad.item()) == (2.5, 2.0)
    assert early.grad.dtype == torch.bfloat16


@every_hook
def test_evaluation_in_inference_mode(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    gk.attach(model, backend=backend)
    backward(model, x)
    once = [p.grad.clone() for p in model.parameters()]
    with torch.inference_mode():
        model(x)
    backward(model, x)
    for param, grad in zip(model.parameters(), once, strict=True):
        assert param.grad.equal(grad + grad) and not param.grad.is_inference()


@every_hook
def test_functional_call_leaves_the_attachment_alone(hook):
    device, backend = hook
    model = torch.nn.Linear(2, 2, bias=False).to(device, torch.bfloat16)
    gk.attach(model, scale=0.5, backend=backend)
    x = torch.ones(1, 2, device=device, dtype=torch.bfloat16)
    output = model(x).sum()
    others = {"weight": model.weight.detach().clone().requires_grad_()}
    torch.func.functional_call(model, others, (x,)).sum().backward()
    assert others["weight"].grad.dtype == torch.bfloat16
    assert others["weight"].grad.unique().tolist() == [1.0]
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(others)
    output.backward()
    assert model.weight.grad.unique().tolist() == [0.5]


@every_hook
def test_zeroing_a_cast_view_does_not_bring_old_sums_back(hook):
    device, backend = hook
    model = torch.nn.Linear(1, 1, bias=False).to(device, torch.bfloat16)
    gk.attach(model, backend=backend)
    arrive(model.weight, 7.0)
    model.half()
    model.zero_grad(set_to_none=False)
    model(torch.ones(1, 1, device=device).half()).sum().backward()
    assert model.weight.grad.item() == 1.0


@every_hook
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_after_an_edit_rounds_nothing(hook, dtype):
    """Also a cast to the dtype that the model has, after which no parameter looks changed."""
    device, backend = hook
    model = torch.nn.Linear(2, 1, bias=False).to(device, torch.bfloat16)
    accumulator = gk.attach(model, backend=backend)
    arrive(model.weight, [[1.0, 8.0]])
    model.weight.grad.add_(2.0**-20)
    model.to(dtype)
    with torch.no_grad():
        model.weight.grad[0, 1] = 3.0  # and an edit after it counts
    accumulator.refresh()
    assert model.weight.grad.dtype == torch.float32
    assert model.weight.grad.tolist() == [[1 + 2.0**-20, 3.0]]


@every_hook
def test_main_grad_as_grad_survives_a_cast(hook):
    device, backend = hook
    param = parameter([1.0] * 1000, device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 1.0)
    param.grad = param.main_grad
    result = (param * 2).sum()
    param.grad.data = param.grad.data.half()
    result.backward()
    assert param.grad.dtype == torch.float32 and param.grad.unique().tolist() == [3.0]
    del accumulator


@every_hook
def test_writing_to_main_grad_is_seen_by_the_statistics(hook):
    device, backend = hook
    param = parameter([1.0], device=device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    param.main_grad.mul_(10)
    assert accumulator.grad_norm(from_statistics=True).item() == 30.0


@every_hook
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_another_default_dtype(hook, default):
    device, backend = hook
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        param = parameter([1.0], torch.bfloat16, device)
        accumulator = gk.attach([param], backend=backend)
        assert accumulator.grad_norm().dtype == torch.float32
        arrive(param, 3.0)
        assert param.grad.dtype == torch.float32 and accumulator.grad_norm().item() == 3.0
    finally:
        torch.set_default_dtype(before)


@every_hook
def test_create_graph_scales_too(hook):
    device, backend = hook
    param = parameter([3.0], torch.float32, device)
    accumulator = gk.attach([param], scale=0.5, backend=backend)
    accumulator.inv_scale.fill_(0.5)
    (param**2).sum().backward(create_graph=True)
    assert param.grad.item() == 1.5
    param.grad = None
    del accumulator


@every_hook
def test_an_explicit_grad_dtype_of_float32_is_kept(hook):
    device, backend = hook
    param = parameter([1.0], device=device)
    param.grad_dtype = torch.float32
    accumulator = gk.attach([param], backend=backend)
    (param * 1).backward(torch.ones(1, device=device, dtype=torch.bfloat16))
    param.grad = None
    ones = [torch.full((1,), v, device=device).bfloat16() for v in (256.0, 1.0)]
    sum(param * one for one in ones).sum().backward()
    assert param.grad.item() == 257.0
    del accumulator


@every_hook
def test_a_gradient_without_memory(hook):
    device, backend = hook
    param = parameter([1.0, 1.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    zeros = torch._efficientzerotensor((2,), dtype=torch.float32, device=device)
    arrive(param, torch.ones(2, device=device))
    param.backward(zeros)
    assert param.grad.tolist() == [1.0, 1.0]
    del accumulator


@every_hook
def test_a_model_collected_during_its_backward(hook, queueing):
    device, backend = hook
    model, x = mlp(device), batch(device)
    params = list(model.parameters())
    expected = micro_gradients(model, [x])[0]
    gk.attach(model, backend=backend)
    model.__dict__["cycle"] = model
    hidden = model[0](x)
    hidden.register_hook(lambda grad: gc.collect() and None)
    loss = model[1:](hidden).float().square().sum()
    del model
    loss.backward()
    for param, grad in zip(params, expected, strict=True):
        assert param.grad.equal(grad.to(param.grad.dtype))


@every_hook
def test_a_grad_of_another_shape_is_not_taken_for_the_view(hook):
    device, backend = hook
    param = parameter([1.0, 1.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 2.0)
    param.grad.data = param.grad.data[:1]  # the address of the view
    arrive(param, 2.0)  # one element, broadcast as copy_ does
    assert param.grad.tolist() == [4.0, 4.0]
    del accumulator


@every_hook
def test_inv_scale_follows_the_model(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    accumulator.inv_scale.fill_(0.25)
    model.double()
    accumulator.refresh()
    assert accumulator.inv_scale.item() == 0.25


DATA_PARALLEL = """
import os, sys
import torch
import gradacc_kernels.hook
from hook_cases import backward, batch, micro_gradients, mlp

def is_right(backend, below):
    gradacc_kernels.hook.QUEUE_BELOW = {"cpu": below}
    model, x = mlp(dtype=torch.float32), batch(dtype=torch.float32)
    expected = micro_gradients(model, [x])[0]
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    gradacc_kernels.hook.attach(model, backend=backend)
    for _ in range(2):
        backward(parallel, x)
    return all(p.grad.equal(g * 2) for p, g in zip(model.parameters(), expected, strict=True))

torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
cases = [(backend, below) for backend in ("auto", "reference") for below in (0, 1 << 40)]
wrong = [case for case in cases if not is_right(*case)]
print(wrong, file=sys.stderr, flush=True)
os._exit(3 if wrong else 0)  # past the teardown of gloo, which can wait for ever
"""


def test_data_parallel_hooks_see_the_sum(tmp_path):
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (tests, tests.parent)))
    command = [sys.executable, "-c", DATA_PARALLEL, f"file://{tmp_path}/store"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, timeout=100, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
