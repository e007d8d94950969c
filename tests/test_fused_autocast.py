"""Fused modules with float32 parameters under autocast, and their 16-bit copies of a window."""

import copy
import types

import pytest
import torch
from fused_cases import (
    EPSILON,
    Written,
    assert_equal,
    conv1d,
    every_device,
    fused,
    grads,
    is_fused,
    language_model,
    linear,
    rows,
    stock_and_fused,
    tokens,
    window,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from weight_cases import assert_input_gradient

import gradacc_kernels as gk

sixteen_bit = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def autocast(device, dtype=torch.bfloat16, **options):
    return torch.autocast(device, dtype, **options)


def output(model, x, dtype=torch.bfloat16):
    with autocast(model[0].weight.device.type, dtype):
        return model(x)


def step(model, x):
    output(model, x).float().square().sum().backward()


def expected_output(model, x, dtype=torch.bfloat16):
    """What stock computes with the weights as they are."""
    with autocast(x.device.type, dtype, cache_enabled=False), torch.no_grad():
        return nn.functional.linear(x, model[0].weight, model[0].bias)


def is_current(model, x):
    """Tells whether the model computes with its weights, and not with an old copy of them."""
    return output(model, x).equal(expected_output(model, x))


class Casts(Written):
    """Counts the 16-bit copies of a weight that are made."""

    def __init__(self, weight):
        super().__init__(weight)

    @property
    def count(self):
        return self.count_16_bit()


def casts_in(model, run):
    with Casts(model[0].weight) as casts:
        run()
    return casts.count


# 7 and 13: no activation has the shape of the weight.
def odd_linear(device, **options):
    return linear(device, n_in=13, n_out=7, **options)


def odd_rows(device):
    return rows(device, torch.float32, 5, 13)


@every_device
@sixteen_bit
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no-cache"])
def test_main_gradients_against_the_oracle(device, dtype, bias, shape, cached):
    stock, model = stock_and_fused(linear(device, bias=bias))
    layer = model[0]
    truth, bias_truth = window(layer.weight), window(torch.zeros(8))
    for _ in range(3):
        x = rows(device, torch.float32, *shape)
        with autocast(device, dtype, cache_enabled=cached):
            y = model(x)
            assert is_fused(y) and y.dtype == dtype and y.equal(stock(x))
        dy = torch.randn_like(y)
        y.backward(dy)
        truth.add_product(dy, x.to(dtype))
        bias_truth.add_sum(dy)
    assert truth.contains(layer.weight.grad)
    assert not bias or bias_truth.contains(layer.bias.grad)


@every_device
@sixteen_bit
def test_conv1d_of_hugging_face(device, dtype, monkeypatch):
    layer = conv1d(monkeypatch)(8, 16).to(device)
    stock, model = stock_and_fused(nn.Sequential(layer))
    truth = window(layer.weight)
    x = rows(device)
    with autocast(device, dtype):
        y = model(x)
        assert is_fused(y) and y.equal(stock(x))
    dy = torch.randn_like(y)
    y.backward(dy)
    truth.add_product(x.to(dtype), dy)
    assert truth.contains(model[0].weight.grad)


@every_device
@sixteen_bit
def test_no_rounding_to_16_bits(device, dtype):
    gradients = {}
    for fuse in (True, False):
        model = linear(device, n_in=1, n_out=1)
        gk.attach(model, fuse=fuse)
        x = torch.tensor([[1.0], [EPSILON[dtype]]], device=device)
        y = output(model, x, dtype)
        y.backward(torch.ones_like(y))
        weight = model[0].weight.grad.item()
        model.zero_grad()
        y = output(model, x, dtype)
        y.backward(x.to(dtype))
        gradients[fuse] = weight, model[0].bias.grad.item()
    assert gradients[True] == (1 + EPSILON[dtype],) * 2
    assert gradients[False] == (1.0, 1.0)  # the control


@every_device
@pytest.mark.parametrize("kept", [True, False])
def test_the_gradient_of_the_input_is_that_of_stock(device, kept):
    results = []
    for model in stock_and_fused(linear(device)):
        x = torch.linspace(-1, 1, 80, device=device).reshape(5, 16).requires_grad_()
        if kept:
            step(model, x)
        step(model, x)
        results.append(x.grad)
    assert_input_gradient(results[1], results[0], is_autocast=True)
    assert results[0].dtype == torch.float32


@every_device
@sixteen_bit
def test_a_model_with_tied_embeddings(device, dtype):
    """Not farther from the float64 gradients than stock, and as near as 16-bit activations let."""
    stock, model = stock_and_fused(language_model(device))
    truth = copy.deepcopy(stock).double()
    for _ in range(3):
        indices = tokens(device, 4, 30)
        truth(indices).square().sum().backward()
        for each in (stock, model):
            with autocast(device, dtype):
                y = each(indices)
            y.float().square().sum().backward()
    for theirs, ours, exact in zip(grads(stock), grads(model), grads(truth), strict=True):
        error = (ours - exact).norm()
        assert error <= 16 * EPSILON[dtype] * exact.norm()
        assert error <= 1.25 * (theirs - exact).norm()


@every_device
def test_no_16_bit_weight_gradient_and_no_cast_of_one(device):
    counts = {}
    for fuse in (True, False):
        model = odd_linear(device)
        gk.attach(model, fuse=fuse)
        y = output(model, odd_rows(device)).float().sum()
        with Written(model[0].weight) as written:
            y.backward()
        counts[fuse] = written.count_16_bit(), written.dtypes.count(torch.float32)
    assert counts[True][0] == 0 and counts[False][0] > 0
    assert counts[True][1] < counts[False][1]


@every_device
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_one_cast_a_window(device, cached, set_to_none):
    model, x = fused(odd_linear(device)), odd_rows(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = []
    for _ in range(3):
        for _ in range(3):

            def run():
                with autocast(device, cache_enabled=cached):
                    y = model(x)
                y.float().sum().backward()

            counts.append(casts_in(model, run))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert counts == [1, 0, 0] * 3


@every_device
def test_stock_casts_in_every_micro_batch(device):
    """The control of the count."""
    model, x = odd_linear(device), odd_rows(device)
    assert [casts_in(model, lambda: output(model, x)) for _ in range(2)] == [1, 1]


@pytest.mark.xfail(strict=True, reason="a copy is made for every call while `.grad` is None")
@every_device
def test_one_cast_for_several_uses_in_a_forward(device):
    model = fused(linear(device, n_in=7, n_out=7))
    x = rows(device, torch.float32, 5, 7)

    def run():
        with autocast(device):
            y = model[0](model[0](model(x)))
        y.float().sum().backward()

    assert [casts_in(model, run) for _ in range(3)] == [1, 0, 0]


@every_device
def test_evaluation_reads_no_copy_and_renews_none(device):
    """Averaged weights are swapped in, and out again, by writes that nothing sees."""
    model, x = fused(odd_linear(device)), odd_rows(device)
    step(model, x)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.data.mul_(3)
        y = output(model, x)
        assert not y.requires_grad and y.equal(expected_output(model, x))
        model[0].weight.data.copy_(weight)
    assert casts_in(model, lambda: step(model, x)) == 0


@every_device
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["before a window", "within a window", "after a change"])
def test_evaluation_changes_nothing(device, mode, where):
    plain, model = (fused(linear(device)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    x = rows(device)
    for each in (plain, model):
        if where != "before a window":
            step(each, x)
        if where == "after a change":
            write_in_place(each)
        if each is model:
            with mode():
                assert output(model, x).equal(output(plain, x))
        for _ in range(2):
            step(each, x.clone().requires_grad_())
    assert_equal(grads(model), grads(plain))
    assert not model[0].weight.grad.is_inference()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.5, **options)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.05, **options)


OPTIMIZERS = {
    "SGD foreach": lambda m: sgd(m, foreach=True),
    "SGD for-loop": lambda m: sgd(m, foreach=False),
    "SGD fused": lambda m: sgd(m, fused=True),
    "AdamW foreach": lambda m: adamw(m, foreach=True),
    "AdamW for-loop": lambda m: adamw(m, foreach=False),
    "AdamW fused": lambda m: adamw(m, fused=True),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_device
@every_optimizer
def test_renewed_after_an_optimizer_step(device, make):
    model, x = fused(linear(device)), rows(device)
    optimizer = make(model)
    for _ in range(2):
        step(model, x)
        before = output(model, x)
        optimizer.step()  # and no zero_grad
        assert is_current(model, x) and not output(model, x).equal(before)


def write_data(model):
    model[0].weight.data.mul_(-2)


def replace_data(model):
    model[0].weight.data = -2 * model[0].weight.data


def write_through_numpy(model):
    if model[0].weight.device.type == "cpu":
        model[0].weight.detach().numpy()[:] *= -2
    else:
        model[0].weight.data.mul_(-2)


def write_in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(-2)


def load(model):
    model.load_state_dict({name: -2 * value for name, value in model.state_dict().items()})


def load_and_assign(model):
    state = {name: -2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def initialise(model):
    nn.init.ones_(model[0].weight)


def unflatten(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(-2 * vector, model.parameters())


def copy_by_foreach(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), -2)


SEEN = (replace_data, write_in_place, load, load_and_assign, initialise, unflatten, copy_by_foreach)
UNSEEN = (write_data, write_through_numpy)


@every_device
@pytest.mark.parametrize("change", SEEN, ids=lambda f: f.__name__)
def test_renewed_after_a_change_in_the_middle_of_a_window(device, change):
    model, x = fused(linear(device)), rows(device)
    step(model, x)
    before = output(model, x)
    change(model)
    assert is_current(model, x) and not output(model, x).equal(before)


@every_device
@pytest.mark.parametrize("change", UNSEEN, ids=lambda f: f.__name__)
def test_writes_that_nothing_sees_are_a_limit_within_a_window(device, change):
    """The control of these tests: a copy that is not renewed is told from one that is."""
    model, x = fused(linear(device)), rows(device)
    step(model, x)
    before = output(model, x)
    change(model)
    assert output(model, x).equal(before) and not is_current(model, x)
    model.zero_grad()
    assert is_current(model, x)


@every_device
@pytest.mark.parametrize("change", UNSEEN + SEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", ["change, zero_grad", "zero_grad, change"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of", [nn.Module, torch.optim.Optimizer])
def test_renewed_after_a_change_between_windows(device, change, order, set_to_none, of):
    model, x = fused(linear(device)), rows(device)
    step(model, x)
    before = output(model, x)

    def zero_grad():
        holder = model if of is nn.Module else torch.optim.SGD(model.parameters())
        holder.zero_grad(set_to_none=set_to_none)

    if order == "zero_grad, change":
        zero_grad()
    change(model)
    if order == "change, zero_grad":
        zero_grad()
    assert is_current(model, x) and not output(model, x).equal(before)


def evaluate_with_average_weights(device, set_to_none):
    """Whether training goes on with the weights that were put back after an evaluation."""
    model, x = fused(linear(device)), rows(device)
    step(model, x)
    model.zero_grad(set_to_none=set_to_none)
    trained = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.data.mul_(-2)
    with torch.no_grad():
        assert is_current(model, x)
    for param, value in zip(model.parameters(), trained, strict=True):
        param.data.copy_(value)
    return is_current(model, x)


@every_device
def test_renewed_after_an_evaluation_with_other_weights(device):
    assert evaluate_with_average_weights(device, set_to_none=True)


@every_device
def test_renewed_after_an_evaluation_with_other_weights_and_zeroed_gradients(device):
    assert evaluate_with_average_weights(device, set_to_none=False)


@every_device
def test_both_dtypes_in_turn(device):
    model, x = fused(linear(device)), rows(device)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        y = output(model, x, dtype)
        assert y.dtype == dtype and y.equal(expected_output(model, x, dtype))
        y.float().sum().backward()
    assert model(x).dtype == torch.float32


@every_device
def test_a_change_between_forward_and_backward_is_that_of_stock(device):
    """Autocast's own copy serves backward, in stock too."""
    results = []
    for model in stock_and_fused(linear(device)):
        x = torch.linspace(-1, 1, 80, device=device).reshape(5, 16).requires_grad_()
        y = output(model, x)
        with torch.no_grad():
            model[0].weight.mul_(-2)
        y.backward(torch.ones_like(y))
        results.append(x.grad)
    assert_input_gradient(results[1], results[0], is_autocast=True)


@every_device
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no-cache"])
def test_a_region_without_autocast_inside(device, cached):
    stock, model = stock_and_fused(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).to(device))
    x = rows(device)
    truth = window(model[1].weight)
    for _ in range(2):
        outputs = []
        for each in (stock, model):
            with autocast(device, cache_enabled=cached):
                hidden = each[0](x)
                with torch.autocast(device, enabled=False):
                    y = each[1](hidden.float())
            outputs.append((y, hidden))
        assert y.dtype == torch.float32 and is_fused(y) and is_fused(hidden)
        assert outputs[0][0].equal(y)
        y.backward(torch.ones_like(y))
        truth.add_product(torch.ones_like(y), hidden)
    assert truth.contains(model[1].weight.grad)


@every_device
def test_16_bit_parameters(device):
    stock, model = stock_and_fused(linear(device, torch.bfloat16))
    x = rows(device, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        y = output(model, x, dtype)
        assert y.dtype == dtype and y.equal(output(stock, x, dtype))
        y.float().sum().backward()


@every_device
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no-cache"])
def test_checkpointing(device, use_reentrant, cached):
    plain, model = (fused(language_model(device)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, fused=True) for m in (plain, model)]
    for _ in range(3):
        for _ in range(2):
            indices = tokens(device)
            for each in (plain, model):
                with autocast(device, cache_enabled=cached):
                    x = each.embedding(indices)
                    if each is model:
                        x = checkpoint(each.up, x, use_reentrant=use_reentrant)
                        y = checkpoint(each.down, x, use_reentrant=use_reentrant)
                    else:
                        y = each.down(each.up(x))
                    y = each.head(y)
                y.float().square().sum().backward()
        assert_equal(
            [p.grad for p in model.parameters() if p.grad is not None],
            [p.grad for p in plain.parameters() if p.grad is not None],
        )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@every_device
@pytest.mark.parametrize("wrt", ["input", "weights"])
def test_double_backward(device, wrt):
    results = []
    for model in stock_and_fused(linear(device)):
        x = torch.linspace(-1, 1, 80, device=device).reshape(5, 16).requires_grad_()
        inputs = [x] if wrt == "input" else list(model.parameters())
        y = output(model, x).float().square().sum()
        first = torch.autograd.grad(y, inputs, create_graph=True)
        (y + sum(grad.square().sum() for grad in first)).backward()
        results.append([*(f.detach() for f in first), x.grad, *grads(model)])
    for stock, ours in zip(*results, strict=True):
        assert stock.dtype == ours.dtype
        torch.testing.assert_close(ours, stock, rtol=2**-6, atol=2**-6 * stock.abs().max().item())


@every_device
@pytest.mark.parametrize("wrt", ["input", "weight", "bias"])
def test_autograd_grad(device, wrt):
    results = []
    for model in stock_and_fused(linear(device)):
        x = torch.linspace(-1, 1, 80, device=device).reshape(5, 16).requires_grad_()
        target = x if wrt == "input" else getattr(model[0], wrt)
        results.append(torch.autograd.grad(output(model, x).float().square().sum(), target)[0])
        assert grads(model) == [None, None]
    assert_input_gradient(results[1], results[0], is_autocast=wrt == "input")


@every_device
def test_tensor_hooks_see_what_they_see_in_stock(device):
    seen = []
    for model in stock_and_fused(linear(device)):
        for param in model.parameters():
            param.register_hook(lambda grad: seen.append(grad.clone()))
        step(model, torch.linspace(-1, 1, 80, device=device).reshape(5, 16))
    by_size = sorted(seen, key=torch.numel)
    assert_equal(by_size[::2], by_size[1::2])
    assert {grad.dtype for grad in seen} == {torch.float32}


def train(model, optimizer, batches, device, *, micro=2, before_forward=None, **zero):
    """The losses of a training run."""
    losses = []
    for x, target in batches:
        for part in range(micro):
            if before_forward is not None:
                before_forward(model)
            with autocast(device):
                y = model(x[part::micro])
            loss = (y.float() - target[part::micro]).square().mean() / micro
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(**zero)
    return losses


def regression(device, n_steps=20):
    torch.manual_seed(7)
    truth = torch.randn(16, 8)
    batches = [(x, x @ truth) for x in torch.randn(n_steps, 32, 16)]
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).to(device)
    return model, batches


def renew(model):
    """Moves the version counters, so that no copy of before is used."""
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.0)


@every_device
@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_training(device, make, set_to_none):
    start, batches = regression(device)
    options = {"set_to_none": set_to_none}
    runs = {}
    for name, fuse, hook in (("ours", True, None), ("renewed", True, renew), ("hook", False, None)):
        model = copy.deepcopy(start)
        gk.attach(model, fuse=fuse)
        optimizer = make(model)
        runs[name] = train(model, optimizer, batches, device, before_forward=hook, **options)
    assert runs["ours"] == runs["renewed"]  # bit for bit: no forward used an old copy
    ours, hook = torch.tensor(runs["ours"]), torch.tensor(runs["hook"])
    assert (ours - hook).abs().max() < 0.03 * ours[0]
    assert ours[-1] < 0.7 * ours[0]


@every_device
@pytest.mark.parametrize("zero", [True, False], ids=["zero_grad", "no zero_grad"])
def test_training_tells_old_copies(device, zero):
    """The control: where nothing tells that the weights moved, the losses differ."""
    start, batches = regression(device)
    nobody = types.SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    runs = []
    for hook in (None, renew):
        model = fused(copy.deepcopy(start))
        losses = []
        for batch in batches[:5]:
            losses += train(model, nobody, [batch], device, before_forward=hook)
            for param in model.parameters():
                param.data.sub_(param.grad, alpha=0.5)
            if zero:
                model.zero_grad()
        runs.append(losses)
    assert (runs[0] == runs[1]) == zero
