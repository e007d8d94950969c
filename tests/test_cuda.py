"""Streams, graphs, synchronisation and memory of attached models on a GPU."""

import gc
import warnings

import pytest
import torch
from hook_cases import backward, batch, float32_sums, micro_gradients, mlp, warm_up

import gradacc_kernels as gk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])


def window(model, inputs):
    for x in inputs:
        backward(model, x)
    return [p.grad.clone() for p in model.parameters()]


def train_unattached(model, inputs):
    """The float32 sums, one micro-batch after the other, without the package."""
    return float32_sums(micro_gradients(model, inputs))


def all_equal(ours, expected):
    return all(a.equal(b) for a, b in zip(ours, expected, strict=True))


@BACKENDS
@pytest.mark.parametrize("warm_up_on_default_stream", [False, True])
def test_captured_micro_batches_replay_as_eager(backend, warm_up_on_default_stream, queueing):
    model, x = mlp("cuda"), batch("cuda")
    accumulator = gk.attach(model, backend=backend)
    if warm_up_on_default_stream:
        backward(model, x)
    warm_up(model, x)
    first, later = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        backward(model, x)
    with torch.cuda.graph(later, pool=first.pool()):
        backward(model, x)
    for inputs in ([batch("cuda") for _ in range(3)], [batch("cuda")]):
        model.zero_grad()
        for k, values in enumerate(inputs):
            x.copy_(values)
            (later if k else first).replay()
        accumulator.expose()
        torch.cuda.synchronize()
        assert all_equal((p.grad for p in model.parameters()), train_unattached(model, inputs))


@BACKENDS
@pytest.mark.parametrize("backward_on_side_stream", [False, True])
def test_side_streams(backend, backward_on_side_stream, queueing):
    model, inputs = mlp("cuda", width=2048), [batch("cuda") for _ in range(4)]
    expected = train_unattached(model, inputs)
    gk.attach(model, backend=backend)
    side = torch.cuda.Stream()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in inputs:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(1_000_000)
                loss = model(x).float().square().sum()
                if backward_on_side_stream:
                    loss.backward()
            if not backward_on_side_stream:
                torch.cuda.current_stream().wait_stream(side)
                loss.backward()
            else:
                torch.cuda.current_stream().wait_stream(side)
    assert all_equal((p.grad for p in model.parameters()), expected)


@BACKENDS
def test_streams_that_alternate(backend, queueing):
    model, inputs = mlp("cuda", width=2048), [batch("cuda") for _ in range(6)]
    expected = train_unattached(model, inputs)
    gk.attach(model, backend=backend)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for k, x in enumerate(inputs):
        stream = streams[k % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            backward(model, x)
        torch.cuda.current_stream().wait_stream(stream)
    assert all_equal((p.grad for p in model.parameters()), expected)


@pytest.mark.parametrize("backend", ["cuda"])
def test_nothing_waits_for_the_device(backend, queueing):
    model, inputs = mlp("cuda"), [batch("cuda") for _ in range(3)]
    accumulator = gk.attach(model, backend=backend)
    window(model, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.zero_grad()
        accumulator.inv_scale.fill_(0.5)
        for x in inputs:
            backward(model, x)
        norms = [accumulator.grad_norm(from_statistics=flag) for flag in (False, True)]
        verdict = accumulator.found_inf
        gk.ops.scale_([p.grad for p in model.parameters()], norms[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-6)
    assert verdict.item() == 0


@BACKENDS
def test_device_memory_is_flat(backend, queueing):
    model, inputs = mlp("cuda"), [batch("cuda") for _ in range(2)]
    gk.attach(model, backend=backend)
    for k in range(200):
        for x in inputs:
            backward(model, x)
        model.zero_grad()
        if k == 20:
            gc.collect()  # what tests before this one have left
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == before


@BACKENDS
def test_queued_gradients_flush_at_the_byte_bound(backend, queueing, monkeypatch):
    monkeypatch.setattr("gradacc_kernels.hook.QUEUE_BYTES", 100)
    model, inputs = mlp("cuda"), [batch("cuda") for _ in range(3)]
    expected = train_unattached(model, inputs)
    gk.attach(model, backend=backend)
    assert all_equal(window(model, inputs), expected)


def test_a_model_on_two_devices():
    class Split(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.front = torch.nn.Linear(16, 8).bfloat16()
            self.back = torch.nn.Linear(8, 4).to("cuda", torch.bfloat16)

        def forward(self, x):
            return self.back(self.front(x).to("cuda"))

    model, x = Split(), batch("cpu")
    expected = train_unattached(model, [x, x])
    accumulator = gk.attach(model)
    assert all_equal(window(model, [x, x]), expected)
    norm = torch.cat([g.double().cpu().flatten() for g in expected]).norm()
    assert accumulator.grad_norm().item() == pytest.approx(norm.item(), rel=1e-6)
    assert accumulator.found_inf.item() == 0
    with pytest.raises(RuntimeError, match=r"on 2 devices; use Accumulator.inv_scales"):
        accumulator.inv_scale  # noqa: B018
    assert len(accumulator.inv_scales) == 2


@BACKENDS
def test_moving_a_model_in_the_middle_of_a_window(backend):
    model, inputs = mlp("cpu"), [batch("cpu") for _ in range(2)]
    gk.attach(model)
    for x in inputs:
        backward(model, x)
    sums = [p.grad.clone() for p in model.parameters()]
    model.to("cuda")
    model(batch("cuda"))
    for param, expected in zip(model.parameters(), sums, strict=True):
        assert param.grad.device.type == "cuda" and param.grad.cpu().equal(expected)
        assert param.grad.data_ptr() == param.main_grad.data_ptr()


def test_autocast_with_a_loss_scale():
    model, inputs = mlp("cuda", torch.float32), [batch("cuda", torch.float32) for _ in range(3)]
    stock = mlp("cuda", torch.float32)
    stock.load_state_dict(model.state_dict())
    gk.attach(model)
    for net in (model, stock):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        for _ in range(2):
            for x in inputs:
                with torch.autocast("cuda", torch.float16):
                    loss = net(x).float().square().mean()
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
