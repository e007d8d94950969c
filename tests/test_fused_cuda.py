"""Fused modules on a GPU: beside the rest of backward, in CUDA graphs, under torch.compile."""

import copy
import gc
import warnings

import pytest
import torch
from fused_cases import assert_equal, grads, language_model, tokens
from hook_cases import Raise
from torch import nn

import gradacc_kernels as gk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
FAMILIES = pytest.mark.parametrize("family", ["bf16", "autocast"])
TOKENS = pytest.mark.parametrize("n_tokens", [64, 512, 2048])  # half, all, none of the GPU beside
WIDTH = 512


class Deep(nn.Module):
    """Layers enough for many weight gradients to be under way at once, with weights that "auto"
    fuses."""

    def __init__(self, layers=8, vocabulary=256):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, indices):
        x = self.embedding(indices)
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (WIDTH,)))
        return self.head(x)


def deep(family, **options):
    return Deep(**options).to("cuda", torch.bfloat16 if family == "bf16" else torch.float32)


def micro_batch(model, family, indices):
    with torch.autocast("cuda", torch.bfloat16, enabled=family == "autocast"):
        loss = model(indices).float().square().mean()
    loss.backward()


def window(model, family, batches):
    for indices in batches:
        micro_batch(model, family, indices)
    return [g.clone() for g in grads(model)]


def in_turn(model, family, batches):
    """A window whose weight gradients all take their turn, for somebody may read `.grad`."""
    handles = [p.register_post_accumulate_grad_hook(lambda p: None) for p in model.parameters()]
    found = window(model, family, batches)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


def batches(n_tokens, count=3):
    return [torch.randint(256, (1, n_tokens), device="cuda") for _ in range(count)]


@FAMILIES
@TOKENS
def test_beside_backward_or_in_turn_gives_the_same_bits(family, n_tokens):
    model, data = deep(family), batches(n_tokens)
    gk.attach(model)
    expected = in_turn(model, family, data)
    for _ in range(10):
        model.zero_grad()
        assert_equal(window(model, family, data), expected)


@FAMILIES
def test_what_an_addition_beside_reads_is_not_freed(family):
    """Memory that backward frees is taken at once by others, which poison it."""
    model, data = deep(family), batches(256, 1)
    gk.attach(model)
    expected = in_turn(model, family, data)

    def poison(module, grad_input, grad_output):
        for shape in {g.shape for g in (*grad_input, *grad_output) if g is not None}:
            torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(poison)
    for _ in range(5):
        model.zero_grad()
        assert_equal(window(model, family, data), expected)


def test_memory_of_additions_beside_is_bounded():
    model, (data,) = deep("bf16", layers=24), batches(256, 1)
    micro_batch(model, "bf16", data)
    model.zero_grad()

    def peak():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        micro_batch(model, "bf16", data)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    stock = peak()
    gk.attach(model)
    micro_batch(model, "bf16", data)
    assert peak() < stock + (64 << 20)


def test_post_accumulate_hooks_see_the_whole_sum():
    model, data = deep("bf16"), batches(64)
    gk.attach(model)
    expected = window(model, "bf16", data)
    model.zero_grad()
    seen = {}
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.__setitem__(name, p.grad.clone())
        )
    window(model, "bf16", data)
    assert_equal([seen[name] for name, _ in model.named_parameters()], expected)


def test_several_uses_of_a_weight_beside_each_other():
    layer = nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)
    model = nn.Sequential(*[layer] * 4)
    gk.attach(model)
    x = torch.randn(64, WIDTH, device="cuda").bfloat16()
    expected = None
    for turn in range(6):
        hook = None
        if turn == 0:
            hook = layer.weight.register_post_accumulate_grad_hook(lambda p: None)
        model.zero_grad()
        model(x).float().square().mean().backward()
        expected = layer.weight.grad.clone() if expected is None else expected
        assert layer.weight.grad.equal(expected)
        if hook is not None:
            hook.remove()


def test_the_next_use_after_an_addition_beside_waits_for_it():
    """A weight that is used by its module and by a function, which the hook sums."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)
    model = nn.Sequential(layer)
    gk.attach(model)
    x = torch.randn(64, WIDTH, device="cuda").bfloat16()
    results = []
    for _ in range(10):
        model.zero_grad()
        (model(x).float().square().mean() + layer.weight.float().square().sum()).backward()
        results.append(layer.weight.grad.clone())
    assert_equal(results[1:], results[:1] * 9)
    stock = copy.deepcopy(layer).float()
    (stock(x.float()).square().mean() + stock.weight.square().sum()).backward()
    torch.testing.assert_close(results[0], stock.weight.grad, rtol=2**-7, atol=2**-7)


@FAMILIES
def test_a_backward_that_raises_leaves_the_next_window_right(family):
    model, data = deep(family), batches(64)
    gk.attach(model)
    expected = window(model, family, data)
    for _ in range(3):
        model.zero_grad()
        handle = model.layers[3].register_forward_hook(lambda m, args, y: Raise.apply(y))
        with pytest.raises(ValueError, match="in the middle"):
            micro_batch(model, family, data[0])
        handle.remove()
        torch.full((1 << 20,), torch.nan, device="cuda")
        model.zero_grad()
        assert_equal(window(model, family, data), expected)


def test_a_grad_of_the_user_is_read_before_it_is_freed():
    model, data = deep("bf16"), batches(64, 2)
    gk.attach(model)
    halves = [grad * 0.5 for grad in window(model, "bf16", data[:1])]
    model.zero_grad()
    later = window(model, "bf16", data[1:])
    expected = [a + b for a, b in zip(halves, later, strict=True)]
    for _ in range(5):
        model.zero_grad()
        micro_batch(model, "bf16", data[0])
        for param in model.parameters():
            param.grad = param.grad * 0.5
        micro_batch(model, "bf16", data[1])
        for ours, truth in zip(grads(model), expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-7)


def test_detaching_in_the_middle_of_backward():
    model, (data,) = deep("bf16"), batches(64, 1)
    accumulator = gk.attach(model)
    model.layers[3].register_full_backward_hook(lambda *_: accumulator.detach())
    micro_batch(model, "bf16", data)
    torch.cuda.synchronize()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    micro_batch(twin, "bf16", data)
    for ours, theirs in zip(grads(model), grads(twin), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.01)


@FAMILIES
@TOKENS
def test_captured_micro_batches_replay_as_eager(family, n_tokens):
    """One graph for the micro-batch that stores, one for those that add."""
    model, data = deep(family), batches(n_tokens, 4)
    accumulator = gk.attach(model)
    static = data[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = window(model, family, data)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    first, later = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, stream=side):
        micro_batch(model, family, static)
    with torch.cuda.graph(later, stream=side, pool=first.pool()):
        micro_batch(model, family, static)
    for _ in range(3):
        model.zero_grad()
        for index, indices in enumerate(data):
            static.copy_(indices)
            (later if index else first).replay()
        accumulator.expose()
        torch.cuda.synchronize()
        assert_equal([g.clone() for g in grads(model)], expected)
    # Eager again, outside of any graph.
    model.zero_grad()
    assert_equal(window(model, family, data), expected)


def test_a_captured_window_follows_the_weights():
    """The 16-bit copies of autocast are made inside the graph, from the weights of the replay."""
    model, (data,) = deep("autocast"), batches(64, 1)
    gk.attach(model)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model.zero_grad()
            window(model, "autocast", [data, data])
        model.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(2):
            micro_batch(model, "autocast", data)
    twin = copy.deepcopy(model)
    for model_ in (model, twin):
        with torch.no_grad():
            for param in model_.parameters():
                param.mul_(1.25)
    graph.replay()
    torch.cuda.synchronize()
    gk.attach(twin)
    window(twin, "autocast", [data, data])
    assert_equal([p.main_grad for p in model.parameters()], grads(twin))


@pytest.mark.parametrize("is_asked_first", [True, False])
def test_a_loss_scale_in_a_graph(is_asked_first):
    """Asked for before the capture, a replay sees what is in it; asked for later, it is refused."""
    model, (data,) = deep("bf16", layers=2), batches(64, 1)
    accumulator = gk.attach(model)
    inv_scale = accumulator.inv_scale if is_asked_first else None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = window(model, "bf16", [data])
        model.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        micro_batch(model, "bf16", data)
    if not is_asked_first:
        with pytest.raises(RuntimeError, match="captured before inv_scale was first asked for"):
            accumulator.inv_scale  # noqa: B018
        return
    for value in (1.0, 0.25):
        inv_scale.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        found = [p.main_grad for p in model.parameters()]
        assert_equal(found, [grad * value for grad in expected])


def test_a_loss_scale_from_some_micro_batch_on():
    model, data = deep("bf16", layers=2), batches(64, 2)
    accumulator = gk.attach(model)
    parts = []
    for indices in data:
        parts.append(window(model, "bf16", [indices]))
        model.zero_grad()
    micro_batch(model, "bf16", data[0])
    accumulator.inv_scale.fill_(0.5)
    micro_batch(model, "bf16", data[1])
    for ours, first, second in zip(grads(model), *parts, strict=True):
        torch.testing.assert_close(ours, first + 0.5 * second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 1.0, 0.5])
@pytest.mark.parametrize("store", [False, True], ids=["add", "store"])
@pytest.mark.parametrize("shape", [(2048, 1024), (1024, 2112)])
def test_many_tokens(shape, store, scale):
    """Where the rule leaves our kernels for cuBLASLt's, by a factor of the host's or not."""
    torch.manual_seed(0)
    main = torch.randn(shape, device="cuda")
    dy, x = (torch.randn(1536, n, device="cuda").bfloat16() for n in shape)
    inv_scale = None if scale is None else torch.full((), scale, device="cuda")
    factor = 0.75 * (1.0 if scale is None else scale)
    terms = dy.double().abs().t() @ x.double().abs() * factor
    exact = dy.double().t() @ x.double() * factor
    if not store:
        exact, terms = exact + main, terms + main.abs()
    slots = torch.empty(gk.ops.num_chunks(main.numel()), device="cuda")
    results = []
    for _ in range(2):
        result = main.clone() if not store else torch.full_like(main, torch.nan)
        gk.ops.wgrad_accumulate_(
            result, dy, x, scale=0.75, inv_scale=inv_scale, store=store, partials=slots
        )
        results.append(result)
    assert results[0].equal(results[1])
    assert bool(((results[0] - exact).abs() <= (1536 + 3) * 2.0**-23 * terms).all())
    assert (results[0] - exact).norm() <= 1e-5 * exact.norm()
    squares = results[0].double().square().sum()
    assert abs(slots.double().sum() / squares - 1) < 1e-5


def test_nothing_waits_for_the_device():
    model, data = deep("autocast"), batches(64)
    gk.attach(model)
    window(model, "autocast", data)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.zero_grad()
        window(model, "autocast", data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FAMILIES
def test_device_memory_is_flat(family):
    model, data = deep(family, layers=2), batches(64, 2)
    gk.attach(model)
    for turn in range(100):
        for indices in data:
            micro_batch(model, family, indices)
        model.zero_grad()
        if turn == 20:
            torch.cuda.synchronize()
            gc.collect()  # what tests before this one have left
            before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@FAMILIES
def test_gradients_are_at_least_as_exact_as_stock(family):
    model = deep(family, layers=3)
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    data = batches(256, 8)
    gk.attach(model)
    for indices in data:
        micro_batch(model, family, indices)
        micro_batch(stock, family, indices)
        exact(indices).square().mean().backward()

    def error(net):
        pairs = zip(grads(net), grads(exact), strict=True)
        squares = [((a - b).square().sum(), b.square().sum()) for a, b in pairs]
        above, below = map(sum, zip(*squares, strict=True))
        return float((above / below).sqrt())

    assert error(model) <= 1.001 * error(stock)


def test_the_gradient_of_a_float32_input_is_not_rounded():
    """Under autocast stock rounds it to 16 bits, and casts it back."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, device="cuda"))
    gk.attach(model)
    x = torch.randn(64, WIDTH, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    left, right = dy.double(), model[0].weight.detach().bfloat16().double()
    bound = (WIDTH + 2) * 2.0**-23 * (left.abs() @ right.abs())
    error = (x.grad.double() - left @ right).abs()
    assert x.grad.dtype == torch.float32 and bool((error <= bound).all())
    rounded = (left @ right).bfloat16().double()
    assert not bool(((rounded - left @ right).abs() <= bound).all())  # the control


@FAMILIES
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(family, mode):
    """Modules are not fused inside of a compiled model: the hook adds, and one warning says so."""
    torch._dynamo.reset()
    model = language_model(
        "cuda", torch.bfloat16 if family == "bf16" else torch.float32, tied=False, width=512
    )
    twin = copy.deepcopy(model)
    gk.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, mode=mode)
        for _ in range(3):
            indices = tokens("cuda", 4, 16)
            for net in (compiled, twin):
                with torch.autocast("cuda", torch.bfloat16, enabled=family == "autocast"):
                    loss = net(indices).float().square().mean()
                loss.backward()
    for ours, theirs in zip(grads(model), grads(twin), strict=True):
        assert ours.dtype == torch.float32
        distance = (ours - theirs.float()).norm() / theirs.float().norm()
        assert distance < 0.03
