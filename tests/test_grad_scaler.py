"""gk.GradScaler does what torch's does, side by side, with gradients in true units."""

import copy

import pytest
import torch
from hook_cases import arrive, backward, batch, every_hook, mlp, needs_extension, parameter
from torch import nn

import gradacc_kernels as gk

INF = float("inf")


class Side:
    """A model, an optimizer and a scaler: ours over an attached model, or torch's."""

    def __init__(self, kind, make, *, model=None, fused=False, **options):
        torch.manual_seed(5)
        self.model = mlp(dtype=torch.float32) if model is None else copy.deepcopy(model)
        self.is_ours = kind == "ours"
        if self.is_ours:
            self.accumulator = gk.attach(self.model)
            self.scaler = gk.GradScaler(self.accumulator, **options)
        else:
            self.scaler = torch.amp.GradScaler("cpu", **options)
        self.optimizer = make(self.model.parameters())

    def micro_batch(self, x):
        self.scaler.scale(self.model(x).square().sum()).backward()


def sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def fused_adamw(params):
    return torch.optim.AdamW(params, lr=0.01, fused=True)


def both(make, **options):
    model = mlp(dtype=torch.float32)
    return [Side(kind, make, model=model, **options) for kind in ("ours", "torch")]


def assert_same(ours, theirs):
    assert ours.scaler.state_dict() == theirs.scaler.state_dict()
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def is_scaler(value):
    return isinstance(value, torch.amp.GradScaler)


@pytest.mark.parametrize("make", [sgd, fused_adamw])
@pytest.mark.parametrize("unscale", [0, 1, 2], ids=["no-unscale", "unscale", "unscale-and-clip"])
def test_growth_back_off_and_skipped_steps(make, unscale):
    sides = both(make, init_scale=1024.0, growth_interval=2)
    assert all(is_scaler(side.scaler) for side in sides)
    scales = []
    for step in range(9):
        x = batch(dtype=torch.float32)
        bad = x.clone()
        bad[0, 0] = INF
        before = sides[0].model[0].weight.detach().clone()
        for side in sides:
            side.micro_batch(x)
            side.micro_batch(bad if step in (3, 4) else x * 2)
            if unscale:
                side.scaler.unscale_(side.optimizer)
            if unscale == 2:
                nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
            side.scaler.step(side.optimizer)
            side.scaler.update()
            side.optimizer.zero_grad()
        assert sides[0].model[0].weight.equal(before) == (step in (3, 4))
        assert_same(*sides)
        scales.append(sides[0].scaler.get_scale())
    assert scales == [1024, 2048, 2048, 1024, 512, 512, 1024, 1024, 2048]


@every_hook
def test_gradients_are_in_true_units_at_any_moment(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    expected = copy.deepcopy(model)
    gk.attach(expected, backend=backend)
    scaler = gk.GradScaler(accumulator, init_scale=256.0)
    for x in (batch(device), batch(device)):
        scaler.scale(model(x).float().square().sum()).backward()
        backward(expected, x)
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert ours.grad.equal(theirs.grad)  # a power of two changes no bit
        scaler.update(512.0)  # between micro-batches


def test_unscale_costs_nothing_and_may_be_repeated():
    side = Side("ours", sgd, init_scale=8.0)
    side.micro_batch(batch(dtype=torch.float32))
    before = [p.grad.clone() for p in side.model.parameters()]
    versions = [p.grad._version for p in side.model.parameters()]
    for _ in range(3):
        side.scaler.unscale_(side.optimizer)
    for param, grad, version in zip(side.model.parameters(), before, versions, strict=True):
        assert param.grad.equal(grad) and param.grad._version == version


def test_inf_in_one_optimizer_of_two():
    for kind in ("ours", "torch"):
        side = Side(kind, sgd, init_scale=4.0)
        optimizers = [sgd(side.model[0].parameters()), sgd(side.model[3].parameters())]
        side.micro_batch(batch(dtype=torch.float32))
        side.model[3].weight.grad[0, 0] = INF
        before = [side.model[i].weight.detach().clone() for i in (0, 3)]
        for optimizer in optimizers:
            side.scaler.step(optimizer)
        side.scaler.update()
        assert not side.model[0].weight.equal(before[0])
        assert side.model[3].weight.equal(before[1])
        assert side.scaler.get_scale() == 2.0


def test_several_scalers():
    sides = [both(sgd, init_scale=scale) for scale in (4.0, 64.0)]
    for pair in sides:
        for side in pair:
            side.micro_batch(torch.ones(4, 16))
            side.scaler.step(side.optimizer)
            side.scaler.update()
        assert_same(*pair)


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_wrong_calls_are_refused(kind):
    side = Side(kind, sgd)
    for call in (side.scaler.unscale_, side.scaler.step):
        with pytest.raises(AssertionError, match="did not use scaler.scale"):
            call(side.optimizer)
    side.micro_batch(batch(dtype=torch.float32))
    with pytest.raises(RuntimeError, match="Closure use"):
        side.scaler.step(side.optimizer, closure=lambda: None)
    with pytest.raises(AssertionError, match="No inf checks"):
        side.scaler.update()
    side.scaler.step(side.optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        side.scaler.step(side.optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        side.scaler.unscale_(side.optimizer)


def test_checkpoints_are_interchangeable():
    ours, theirs = both(sgd, init_scale=16.0, growth_interval=3)
    ours.micro_batch(torch.ones(4, 16))
    ours.scaler.step(ours.optimizer)
    ours.scaler.update()
    theirs.scaler.load_state_dict(ours.scaler.state_dict())
    assert theirs.scaler.state_dict() == ours.scaler.state_dict()
    theirs.scaler.load_state_dict({**theirs.scaler.state_dict(), "scale": 64.0})
    ours.scaler.load_state_dict(theirs.scaler.state_dict())
    assert ours.accumulator.inv_scale.item() == 1 / 64
    ours.optimizer.zero_grad()
    ours.micro_batch(torch.ones(4, 16))
    grads = torch.autograd.grad(
        ours.model(torch.ones(4, 16)).square().sum(), list(ours.model.parameters())
    )
    for param, grad in zip(ours.model.parameters(), grads, strict=True):
        assert param.grad.equal(grad)


def test_disabled_is_transparent():
    side = Side("ours", sgd, enabled=False)
    assert side.accumulator.inv_scale.item() == 1
    side.micro_batch(torch.ones(4, 16))
    before = side.model[0].weight.detach().clone()
    side.scaler.unscale_(side.optimizer)
    side.scaler.step(side.optimizer)
    side.scaler.update()
    assert not side.model[0].weight.equal(before) and side.scaler.state_dict() == {}


def test_parameters_that_are_not_covered_are_unscaled_as_torch_does():
    side = Side("ours", sgd, init_scale=8.0)
    other = parameter([1.0], torch.float32)
    optimizer = sgd([*side.model.parameters(), other])
    side.scaler.scale(side.model(torch.ones(4, 16)).square().sum() + 3 * other.sum()).backward()
    assert other.grad.item() == 24
    for _ in range(2):
        side.scaler.unscale_(optimizer)
        assert other.grad.item() == 3
    other.grad.fill_(INF)
    side.scaler.scale(other.sum() * 0)  # a scale, and no gradient
    side.scaler.update()
    side.scaler.step(optimizer)
    side.scaler.update()
    assert other.item() == 1 and side.scaler.get_scale() == 4.0


def test_weights_and_scale_together():
    side = Side("ours", fused_adamw, init_scale=32.0)
    expected = copy.deepcopy(side.model)
    for n in (2, 6):
        x = batch(dtype=torch.float32, rows=n)
        with side.accumulator.micro_batch(n):
            side.micro_batch(x)
        (expected(x).square().sum() * (n / 8)).backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
    optimizer = fused_adamw(expected.parameters())
    optimizer.step()
    side.accumulator.step(side.optimizer, max_norm=0.5, scaler=side.scaler)
    side.scaler.update()
    for a, b in zip(side.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    side.optimizer.zero_grad()
    with side.accumulator.micro_batch(1):
        with pytest.raises(RuntimeError, match="inside of micro_batch"):
            side.scaler.update(2.0)


def test_a_micro_batch_that_overflows_is_dropped_and_the_scale_backs_off():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model, nonfinite="skip_micro_batch")
    scaler = gk.GradScaler(accumulator, init_scale=8.0)
    optimizer = sgd(model.parameters())
    for x in (torch.ones(4, 16), torch.full((4, 16), INF)):
        scaler.scale(model(x).square().sum()).backward()
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not model[0].weight.equal(before) and scaler.get_scale() == 4.0


@needs_extension
def test_float16_parameters_with_masters():
    model = mlp(dtype=torch.float16)
    accumulator = gk.attach(model)
    scaler = gk.GradScaler(accumulator, init_scale=2.0**12)
    optimizer = gk.MasterParams(model.parameters(), torch.optim.AdamW, lr=0.01, fused=True)
    losses = []
    x = batch(dtype=torch.float16)
    for _ in range(20):
        for _ in range(2):
            loss = model(x).float().square().mean()
            scaler.scale(loss / 2).backward()
        accumulator.step(optimizer, max_norm=1.0, scaler=scaler)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and accumulator.counters["skipped_windows"].item() == 0


def test_what_is_no_accumulator():
    with pytest.raises(TypeError, match="expected the Accumulator .* got Linear"):
        gk.GradScaler(nn.Linear(1, 1))
    param = parameter([1.0])
    accumulator = gk.attach([param])
    arrive(param, 1.0)
    accumulator.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        gk.GradScaler(accumulator)


def test_of_several_scalers_the_last_one_divides():
    model, x = mlp(dtype=torch.float32), batch(dtype=torch.float32)
    accumulator = gk.attach(model)
    first = gk.GradScaler(accumulator, init_scale=8.0)
    loss = model(x).square().sum()
    assert first.scale(loss).equal(8 * loss)
    last = gk.GradScaler(accumulator, init_scale=4.0)
    with pytest.raises(RuntimeError, match="use that one alone"):
        first.scale(loss)
    with pytest.raises(RuntimeError, match="use that one alone"):
        gk.GradScaler(accumulator, enabled=False).scale(loss)
    last.scale(loss).backward()
    expected = [param.grad.clone() for param in model.parameters()]
    del first
    assert accumulator.inv_scale.item() == 0.25
    del last
    assert accumulator.inv_scale.item() == 1
    assert gk.GradScaler(accumulator, enabled=False).scale(loss) is loss
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_scaler_that_is_dropped_after_detach():
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)
    scaler = gk.GradScaler(accumulator)
    accumulator.detach()
    del scaler
