"""Main gradients written to in ways that no version counter sees, and what a close believes then.

Each way is shown twice. Without `invalidate()` the close takes the norm, and the verdict, of what
backward had left: that also shows that the way moves no counter. With it, those of what is there.
"""

import math

import pytest
import torch
import torch.distributed
from hook_cases import batch, every_hook, mlp

import gradacc_kernels as gk

INF = float("inf")


def by_unscale(params, factor):
    """torch's own GradScaler."""
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=1 / factor)
    scaler.scale(torch.zeros((), device=params[0].device))
    scaler.unscale_(torch.optim.SGD(params))


def by_data(params, factor):
    for param in params:
        param.grad.data.mul_(factor)


def by_numpy(params, factor):
    for param in params:
        if param.device.type != "cpu":
            pytest.skip("numpy writes to memory of the CPU")
        param.grad.numpy()[...] *= factor


def by_dlpack(params, factor):
    """As kernels of others do."""
    for param in params:
        torch.from_dlpack(param.grad.detach().data).mul_(factor)


def by_fused_kernel(params, factor):
    """That of a fused optimizer, which writes the gradients back unscaled, called by hand."""
    torch._fused_sgd_(
        [param.detach().clone() for param in params],
        [param.grad for param in params],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        grad_scale=torch.full((), 1 / factor, device=params[0].device),
        found_inf=torch.zeros((), device=params[0].device),
    )


WAYS = [by_unscale, by_data, by_numpy, by_dlpack, by_fused_kernel]
every_way = pytest.mark.parametrize("write", WAYS)
every_close = pytest.mark.parametrize("close", ["clip_grad_norm_", "step", "GradScaler"])


class Case:
    """A model after one backward, and a close over it."""

    def __init__(self, hook, close):
        device, backend = hook
        torch.manual_seed(3)
        self.model = mlp(device, torch.float32)
        self.params = list(self.model.parameters())
        self.accumulator = gk.attach(self.model, backend=backend)
        self.optimizer = torch.optim.SGD(self.params, lr=1.0)
        is_scaled = close == "GradScaler"
        self.scaler = gk.GradScaler(self.accumulator, init_scale=16.0) if is_scaled else None
        self.is_clip = close == "clip_grad_norm_"
        loss = self.model(batch(device, torch.float32)).square().sum()
        (self.scaler.scale(loss) if is_scaled else loss).backward()

    def norm(self):
        return torch.cat([p.grad.double().flatten() for p in self.params]).norm().item()

    def close(self, max_norm):
        if self.is_clip:
            return self.accumulator.clip_grad_norm_(max_norm).item()
        return self.accumulator.step(self.optimizer, max_norm=max_norm, scaler=self.scaler).item()


def check_norms(hook, write, close):
    for is_told in (False, True):
        case = Case(hook, close)
        left = case.norm()
        write(case.params, 0.125)
        assert case.norm() == pytest.approx(left / 8, rel=1e-6)
        if is_told:
            case.accumulator.invalidate()
        believed, max_norm = left / 8 if is_told else left, left / 80
        before = [(p.detach().clone(), p.grad.clone()) for p in case.params]
        assert case.close(max_norm) == pytest.approx(believed, rel=1e-5)
        for param, (value, grad) in zip(case.params, before, strict=True):
            clipped = grad * (max_norm / (believed + 1e-6))
            torch.testing.assert_close(param.grad, clipped, rtol=1e-5, atol=0)
            expected = value if case.is_clip else value - clipped
            torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-7)


def check_verdicts(hook, write, close):
    for is_told in (False, True):
        case = Case(hook, close)
        before = [p.detach().clone() for p in case.params]
        write(case.params, INF)
        assert not any(p.grad.isfinite().all() for p in case.params)
        if is_told:
            case.accumulator.invalidate()
        assert math.isnan(case.close(1e9)) == is_told
        is_kept = all(p.equal(value) for p, value in zip(case.params, before, strict=True))
        assert is_kept == (is_told or case.is_clip)
        if case.scaler is not None:
            case.scaler.update()
            assert case.scaler.get_scale() == (8.0 if is_told else 16.0)


@every_hook
@every_way
@every_close
def test_the_norm_that_clips(hook, write, close):
    check_norms(hook, write, close)


@every_hook
@every_way
@every_close
def test_the_verdict_that_skips(hook, write, close):
    check_verdicts(hook, write, close)


@every_hook
@pytest.mark.parametrize("is_fused", [False, True], ids=["unscale_", "in-the-kernel"])
def test_a_step_of_torchs_scaler_is_seen(hook, is_fused):
    """Fused optimizers divide the gradients while they step, and any step makes slots stale."""
    case = Case(hook, "step")
    left = case.norm()
    scaler = torch.amp.GradScaler(hook[0], init_scale=8.0)
    scaler.scale(torch.zeros((), device=hook[0]))
    scaler.step(torch.optim.SGD(case.params, lr=0.1, fused=is_fused))
    assert case.norm() == pytest.approx(left / 8, rel=1e-6)
    norm = case.accumulator.grad_norm(from_statistics=True).item()
    assert norm == pytest.approx(left / 8, rel=1e-5)


@pytest.fixture
def nccl(tmp_path):
    if not torch.distributed.is_nccl_available():
        pytest.skip("no NCCL")
    torch.distributed.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def by_all_reduce(params, factor):
    """Of one process, whose sum NCCL multiplies first."""
    for param in params:
        op = torch.distributed._make_nccl_premul_sum(factor)
        torch.distributed.all_reduce(param.grad, op=op)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@every_close
def test_an_all_reduce_on_a_gpu(nccl, backend, close):
    check_norms(("cuda", backend), by_all_reduce, close)
    check_verdicts(("cuda", backend), by_all_reduce, close)
