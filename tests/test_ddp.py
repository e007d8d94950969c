"""DistributedDataParallel over one process: what it takes, and what is refused before it fails."""

import pytest
import torch
import torch.distributed
from hook_cases import batch, mlp, needs_extension
from torch.nn.parallel import DistributedDataParallel

import gradacc_kernels as gk


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@needs_extension
@BACKENDS
def test_ddp_over_16_bit_parameters_is_refused(one_process, backend):
    model = mlp()
    wrapped = DistributedDataParallel(model)
    before = [(p.grad, p.grad_dtype) for p in model.parameters()]
    for target in (model, wrapped, list(model.parameters())):
        with pytest.raises(RuntimeError, match="bfloat16 parameter .* DistributedDataParallel"):
            gk.attach(target, backend=backend)
    assert [(p.grad, p.grad_dtype) for p in model.parameters()] == before
    wrapped(batch()).float().sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


@needs_extension
@BACKENDS
@pytest.mark.parametrize("what", ["module", "list"])
def test_ddp_that_comes_after_attach_is_refused(one_process, backend, what):
    model = mlp()
    # Held by a name: that of a list lives as long as its Accumulator.
    accumulator = gk.attach(model if what == "module" else model.parameters(), backend=backend)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="process_group=torch.distributed.group.WORLD"):
        wrapped(batch()).float().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    accumulator.detach()


@needs_extension
@BACKENDS
def test_ddp_over_float32_parameters_is_that_of_stock(one_process, backend):
    grads = []
    for is_attached in (False, True):
        torch.manual_seed(0)
        model = mlp(dtype=torch.float32)
        wrapped = DistributedDataParallel(model)
        if is_attached:
            gk.attach(model, backend=backend)
        for micro_batch in range(3):
            x = batch(dtype=torch.float32)
            if micro_batch < 2:
                with wrapped.no_sync():
                    wrapped(x).square().sum().backward()
            else:
                wrapped(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for stock, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)
