"""CUDA graphs that others make, memory pools that are shared, statistics, and streams of nodes."""

import copy
import time
import warnings

import pytest
import torch
from hook_cases import (
    assert_main,
    backward,
    batch,
    float32_sums,
    micro_gradients,
    mlp,
    parameter,
    warm_up,
)

import gradacc_kernels as gk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])


@BACKENDS
def test_forward_and_backward_are_graphs_that_share_the_pool_of_the_model(backend, queueing):
    """One graph of the model's forward, then one of a backward that stores, one that adds."""
    model, x = mlp("cuda"), batch("cuda")
    stock = copy.deepcopy(model)
    accumulator = gk.attach(model, backend=backend)
    warm_up(model, x)
    pool = torch.cuda.graph_pool_handle()
    forward, first, later = (torch.cuda.CUDAGraph() for _ in range(3))
    with torch.cuda.graph(forward, pool=pool):
        loss = model(x).float().square().sum()
    with torch.cuda.graph(first, pool=pool):
        loss.backward(retain_graph=True)
    with torch.cuda.graph(later, pool=pool):
        loss.backward(retain_graph=True)
    for count in (3, 1):
        inputs = [batch("cuda") for _ in range(count)]
        model.zero_grad()
        for number, values in enumerate(inputs):
            x.copy_(values)
            forward.replay()
            (later if number else first).replay()
        accumulator.expose()
        assert_main(model.parameters(), float32_sums(micro_gradients(stock, inputs)))


@BACKENDS
def test_main_gradients_are_outside_of_the_pool(backend, queueing):
    """What a graph leaves behind in its pool may be overwritten by the next; the sums are not."""
    model, x = mlp("cuda"), batch("cuda")
    stock = copy.deepcopy(model)
    accumulator = gk.attach(model, backend=backend)
    warm_up(model, x)
    train, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(train):
        backward(model, x)
    with torch.cuda.graph(other, pool=train.pool()):
        for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20):
            torch.full((size,), torch.nan, device="cuda")
    train.replay()
    other.replay()
    accumulator.expose()
    assert_main(model.parameters(), float32_sums(micro_gradients(stock, [x])))


@BACKENDS
def test_a_model_graphed_before_attach(backend, queueing):
    model, x = mlp("cuda"), batch("cuda")
    stock = copy.deepcopy(model)
    torch.cuda.make_graphed_callables(model, (x.clone(),))
    gk.attach(model, backend=backend)
    for count in (3, 1):
        inputs = [batch("cuda") for _ in range(count)]
        model.zero_grad()
        for values in inputs:
            backward(model, values)
        assert_main(model.parameters(), float32_sums(micro_gradients(stock, inputs)))


@BACKENDS
def test_a_model_graphed_between_detach_and_attach(backend, queueing):
    model, inputs = mlp("cuda"), [batch("cuda") for _ in range(3)]
    micro = micro_gradients(copy.deepcopy(model), inputs)
    accumulator = gk.attach(model, backend=backend)
    backward(model, inputs[0])
    accumulator.detach()
    torch.cuda.make_graphed_callables(model, (inputs[0].clone(),))
    gk.attach(model, backend=backend)
    for values in inputs[1:]:
        backward(model, values)
    assert_main(
        model.parameters(), float32_sums(micro)
    )  # one micro-batch is no sum that detach could round


def test_an_attached_model_is_refused_by_make_graphed_callables():
    """torch graphs no module that has hooks; attach put one on the root."""
    model, x = mlp("cuda"), batch("cuda")
    gk.attach(model)
    with pytest.raises(AssertionError, match="must not have hooks registered"):
        torch.cuda.make_graphed_callables(model, (x,))


# Statistics: no host code runs in a replay, so the host believes what it did before.


def norm_of(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()


@BACKENDS
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
@pytest.mark.parametrize("tell", ["invalidate", "expose"])
def test_the_close_after_replays_that_accumulate(backend, queueing, fuse, tell):
    model, x = mlp("cuda"), batch("cuda")
    accumulator = gk.attach(model, backend=backend, fuse=fuse)
    warm_up(model, x)
    first, later = (torch.cuda.CUDAGraph() for _ in range(2))
    with torch.cuda.graph(first):
        backward(model, x)
    with torch.cuda.graph(later, pool=first.pool()):
        backward(model, x)
    for opens in (first.replay, lambda: backward(model, x)):
        model.zero_grad()
        opens()
        accumulator.expose()
        seen = norm_of(model)
        for _ in range(3):
            x.copy_(batch("cuda"))
            later.replay()
        getattr(accumulator, tell)()
        norm = norm_of(model)
        assert norm != pytest.approx(seen, rel=0.01)
        assert accumulator.clip_grad_norm_(norm / 10).item() == pytest.approx(norm, rel=1e-5)
        assert norm_of(model) == pytest.approx(norm / 10, rel=1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    x.fill_(torch.inf)
    later.replay()
    getattr(accumulator, tell)()
    accumulator.step(torch.optim.SGD(model.parameters(), lr=0.1, foreach=False))
    assert all(p.equal(value) for p, value in zip(model.parameters(), before, strict=True))
    assert accumulator.counters["skipped_windows"].item() == 1


@BACKENDS
def test_a_replay_that_scales_gradients_needs_invalidate(backend):
    """What moved the version counter was the capture, a window ago."""
    model, x = mlp("cuda"), batch("cuda")
    accumulator = gk.attach(model, backend=backend)
    warm_up(model, x)
    backward(model, x)
    grads = [p.grad for p in model.parameters()]
    torch._foreach_mul_(grads, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch._foreach_mul_(grads, 0.125)
    for is_told in (False, True):
        model.zero_grad()
        backward(model, x)
        left = norm_of(model)
        graph.replay()
        assert norm_of(model) == pytest.approx(left / 8, rel=1e-6)
        if is_told:
            accumulator.invalidate()
        believed = left / 8 if is_told else left
        assert accumulator.clip_grad_norm_(1e9).item() == pytest.approx(believed, rel=1e-5)


@pytest.fixture
def every_warning():
    """torch warns of other streams once a process, else."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


MISMATCH = "The AccumulateGrad node's stream does not match"


@BACKENDS
def test_refresh_follows_the_stream(backend, queueing, every_warning):
    param = parameter([1.0] * 8, device="cuda")
    accumulator = gk.attach([param], backend=backend)
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side, torch.cuda.current_stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.simplefilter("error")
            accumulator.refresh()
            (param * 3).sum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        time.sleep(0.05)  # the engine's thread lets the node go after backward has returned
    assert param.grad.unique().tolist() == [9.0]
    del accumulator


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"),
    reason="this torch does not warn",
)
def test_without_refresh_torch_warns(every_warning):
    """The control: also of a stock parameter, whose node outlives a change of streams."""
    param = parameter([1.0] * 8, device="cuda")
    kept = (param * 3).sum()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), pytest.warns(UserWarning, match=MISMATCH):
        (param * 3).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    kept.backward()


@BACKENDS
def test_a_gradient_is_added_in_the_order_of_the_stream_of_its_node(backend, queueing):
    """Without refresh(): the node has the stream on which it was made, and the sum is right."""
    param = parameter(torch.zeros(1 << 21), device="cuda")
    accumulator = gk.attach([param], backend=backend)
    factor = torch.ones(1 << 21, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(4):
            stream = side if number % 2 else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                (param * factor).sum().backward()
            torch.cuda.current_stream().wait_stream(stream)
    assert param.grad.unique().tolist() == [4.0]
    del accumulator
