"""torch.compile with changing shapes, and in each of inductor's modes."""

import copy
import warnings

import pytest
import torch
from hook_cases import assert_main, backward, batch, every_hook, float32_sums, micro_gradients, mlp
from torch._dynamo.testing import CompileCounterWithBackend

import gradacc_kernels as gk


@every_hook
@pytest.mark.parametrize("compiled_first", [False, True])
def test_dynamic_shapes(hook, compiled_first):
    device, backend = hook
    torch._dynamo.reset()
    model = mlp(device)
    stock = torch.compile(copy.deepcopy(model), backend="aot_eager", dynamic=True)
    inputs = [batch(device, rows=rows) for rows in (4, 7, 3, 12)]
    micro = micro_gradients(stock, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    if compiled_first:
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
        micro_gradients(compiled, inputs[:1])
    gk.attach(model, backend=backend, fuse=False)
    if not compiled_first:
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        for x in inputs:
            backward(compiled, x)
        assert_main(model.parameters(), float32_sums(micro))
    assert counter.frame_count <= 1 + compiled_first  # not anew for each shape, nor each window


@every_hook
def test_shapes_that_change_without_being_declared_dynamic(hook):
    device, backend = hook
    torch._dynamo.reset()
    model = mlp(device)
    stock = torch.compile(copy.deepcopy(model), backend="aot_eager")
    inputs = [batch(device, rows=rows) for rows in (4, 4, 7, 3)]
    micro = micro_gradients(stock, inputs)
    gk.attach(model, backend=backend, fuse=False)
    compiled = torch.compile(model, backend="aot_eager")
    for x in inputs:
        backward(compiled, x)
    assert_main(model.parameters(), float32_sums(micro))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("compiled_first", [False, True])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor(mode, dynamic, compiled_first):
    """Against float64: bfloat16 rounds a micro-batch's gradient, and float32 adds it up."""
    torch._dynamo.reset()
    model = mlp("cuda")
    exact = copy.deepcopy(model).double()
    inputs = [batch("cuda", rows=rows) for rows in ((4, 7, 12) if dynamic else (4, 4, 4))]
    if compiled_first:
        compiled = torch.compile(model, mode=mode, dynamic=dynamic)
        micro_gradients(compiled, inputs[:1])
    gk.attach(model, fuse=False)
    if not compiled_first:
        compiled = torch.compile(model, mode=mode, dynamic=dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's, of small GPUs and dynamic graphs
        for _ in range(3):
            model.zero_grad()
            for x in inputs:
                torch.compiler.cudagraph_mark_step_begin()
                backward(compiled, x)
    micro = micro_gradients(exact, [x.double() for x in inputs])
    for param, grads in zip(model.parameters(), zip(*micro, strict=True), strict=True):
        expected = sum(grads)
        assert param.grad.dtype == torch.float32
        assert param.grad.data_ptr() == param.main_grad.data_ptr()
        assert (param.grad - expected).norm() <= 0.03 * expected.norm()
