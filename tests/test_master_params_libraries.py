"""MasterParams with the optimizers of libraries, against float32 masters that they step by hand.

Schedule-free optimizers, whose train() and eval() swap the parameters' values, and optimizers whose
state is of 8 or 4 bits, in tensor subclasses (torchao) or beside its scales (bitsandbytes).
"""

import copy
import io

import pytest
import torch
from hook_cases import backward, batch, mlp, parameter
from test_master_params import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    ByHand,
    assert_same,
    every_device,
    every_mode,
    give,
    split_groups,
)
from torch import optim

import gradacc_kernels as gk

# Modules are imported by the tests, not here: a library that is missing skips its cases alone.
OPTIMIZERS = {
    "AdamWScheduleFree": ("schedulefree", {"warmup_steps": 3, "weight_decay": 0.1}),
    "SGDScheduleFree": ("schedulefree", {}),
    "RAdamScheduleFree": ("schedulefree", {}),
    "AdamW8bit": ("torchao.optim", {}),
    "AdamW4bit": ("torchao.optim", {}),
    "AdamWFp8": ("torchao.optim", {}),
    "bnb AdamW8bit": ("bitsandbytes.optim", {}),
    "bnb PagedAdamW8bit": ("bitsandbytes.optim", {}),
    "bnb Lion8bit": ("bitsandbytes.optim", {}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_schedule_free = pytest.mark.parametrize(
    "name", [name for name, (module, _) in OPTIMIZERS.items() if module == "schedulefree"]
)
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch):
    """Buckets of one large parameter or several small ones, one thread, and nothing compiled.

    torchao compiles its step for every shape.
    """
    monkeypatch.setattr("gradacc_kernels.optim.BUCKET_ELEMENTS", 5000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def find(name):
    """The class and its options; skips where its library is missing."""
    module, options = OPTIMIZERS[name]
    # Before 0.50 bitsandbytes was not tried.
    least = "0.50" if module.startswith("bitsandbytes") else None
    pytest.importorskip(module.partition(".")[0], minversion=least)
    library = pytest.importorskip(module)
    return getattr(library, name.removeprefix("bnb ")), {"lr": 1e-2, **options}


def parameters(dtype=BFLOAT16, device="cpu"):
    """From 4096 elements on the state is of few bits; one is transposed, and one of float32."""
    shapes = [(64, 64), (33, 7), (), (128, 33)]
    params = [parameter(torch.randn(shape), dtype, device) for shape in shapes]
    params.append(torch.nn.Parameter(torch.randn(64, 64, device=device).to(dtype).t()))
    return params + [parameter(torch.randn(64, 64), FLOAT32, device)]


def switch(mode, *optimizers):
    for each in optimizers:
        getattr(each, mode, lambda: None)()


def pieces(value):
    """The bytes of a tensor, and of those that a subclass wraps; other values as they are."""
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return [type(value), context, *(pieces(getattr(value, name)) for name in names)]
    if isinstance(value, torch.Tensor):
        return [value.dtype, value.shape, bytes_of(value)]
    return value


def bytes_of(tensor):
    return tensor.detach().flatten().view(torch.uint8).cpu().numpy().tobytes()


def assert_same_state(ours, plain):
    state = {param: {**entry} for param, entry in ours.state.items()}
    params, masters = ours.param_groups, plain.param_groups
    for group, other in zip(params, masters, strict=True):
        assert {**group, "params": 0} == {**other, "params": 0}
        for param, master in zip(group["params"], other["params"], strict=True):
            assert state[param].keys() - {"master"} == plain.state[master].keys()
            for key, value in plain.state[master].items():
                assert pieces(state[param][key]) == pieces(value), key


@every_device
@every_mode
@every_optimizer
def test_steps_as_masters_by_hand(name, low_bits, device):
    """Groups, one that is added, a schedule, a parameter without gradient; evaluation between."""
    optimizer_class, options = find(name)
    for dtype in (BFLOAT16,) if low_bits else (BFLOAT16, FLOAT16):
        params = parameters(dtype, device)
        hand = ByHand(params, optimizer_class, lambda masters: split_groups(masters[:4]), **options)
        optimizer = gk.MasterParams(
            split_groups(params[:4]), optimizer_class, low_bits=low_bits, **options
        )
        pair = optimizer, hand.optimizer
        schedules = [optim.lr_scheduler.CosineAnnealingLR(each, T_max=4) for each in pair]
        for i in range(4):
            if i == 2:
                optimizer.add_param_group({"params": params[4:], "lr": 0.05})
                hand.optimizer.add_param_group({"params": hand.masters[4:], "lr": 0.05})
                for schedule in schedules:
                    schedule.base_lrs.append(0.05)
            switch("train", *pair)
            assert_same(params, hand.values())
            hand.step(give(params, i))
            optimizer.step()
            assert_same(params, hand.values())
            switch("eval", *pair)
            assert_same(params, hand.values())
            for schedule in schedules:
                schedule.step()
        assert_same_state(optimizer, hand.optimizer)


@every_mode
@every_optimizer
def test_windows_of_an_attached_model(name, low_bits):
    """Weighted micro-batches, averaged, clipped and stepped, with an evaluation in the middle."""
    optimizer_class, options = find(name)
    model = mlp(width=512)
    params = list(model.parameters())
    accumulator = gk.attach(model)
    hand = ByHand(params, optimizer_class, **options)
    optimizer = gk.MasterParams(params, optimizer_class, low_bits=low_bits, **options)
    pair, grads = (optimizer, hand.optimizer), []
    optimizer.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in params))
    for _ in range(3):
        switch("train", *pair)
        for weight in (3.0, 5.0):
            with accumulator.micro_batch(weight):
                backward(model, batch())
            switch("eval", *pair)
            assert_same(params, hand.values())
            switch("train", *pair)
        accumulator.step(optimizer, max_norm=1.0)
        assert torch.nn.utils.get_total_norm(grads) < 1.0 + 1e-5
        hand.step(grads)
        grads.clear()
        optimizer.zero_grad()
        assert_same(params, hand.values())
    assert_same_state(optimizer, hand.optimizer)


def saved(optimizer):
    """A state with tensors of its own, through a file: torchao's refuse deepcopy."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@every_mode
@every_optimizer
def test_a_state_goes_on_bit_for_bit(name, low_bits):
    """In MasterParams of the other mode, and in the plain optimizer over the masters."""
    optimizer_class, options = find(name)
    params = parameters()
    first = gk.MasterParams(params, optimizer_class, low_bits=low_bits, **options)
    switch("train", first)
    for _ in range(2):
        give(params)
        first.step()
    switch("eval", first)
    hand = ByHand(params, optimizer_class, **options)
    for index, entry in saved(first)["state"].items():
        hand.masters[index].copy_(entry.get("master", params[index].detach()))
    hand.optimizer.load_state_dict(saved(first))
    resumed = [p.detach().clone().requires_grad_() for p in params]
    second = gk.MasterParams(resumed, optimizer_class, low_bits=not low_bits, **options)
    second.load_state_dict(saved(first))
    switch("train", first, second, hand.optimizer)
    for _ in range(2):
        grads = give(params)
        give(resumed)
        for param, grad in zip(resumed, grads, strict=True):
            param.grad = grad.clone()
        hand.step(grads)
        first.step()
        second.step()
        assert_same(params, hand.values())
        assert_same(resumed, params)


@every_mode
@every_optimizer
def test_the_state_of_a_plain_optimizer_is_loaded(name, low_bits):
    """The parameters as they are become the masters."""
    optimizer_class, options = find(name)
    params = parameters()
    plain = ByHand(params, optimizer_class, **options)
    switch("train", plain.optimizer)
    for _ in range(2):
        plain.step(give(params))
    hand = ByHand(params, optimizer_class, **options)
    hand.optimizer.load_state_dict(saved(plain.optimizer))
    optimizer = gk.MasterParams(params, optimizer_class, low_bits=low_bits, **options)
    optimizer.load_state_dict(saved(plain.optimizer))
    for _ in range(2):
        hand.step(give(params))
        optimizer.step()
        assert_same(params, hand.values())
    assert_same_state(optimizer, hand.optimizer)


@every_mode
@every_schedule_free
def test_train_and_eval(name, low_bits):
    """Back and forth; nothing is written where nothing changes; a step needs train mode."""
    optimizer_class, options = find(name)
    params = parameters()
    optimizer = gk.MasterParams(params, optimizer_class, low_bits=low_bits, **options)
    give(params)
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step()
    optimizer.train()
    for _ in range(8):  # RAdam averages nothing in its first ones
        give(params)
        optimizer.step()
    trained = [p.detach().clone() for p in params]
    optimizer.eval()
    averaged = [p.detach().clone() for p in params]
    assert not any(a.equal(b) for a, b in zip(trained, averaged, strict=True) if a.numel() > 1)
    versions = [p._version for p in params]
    optimizer.eval()
    assert [p._version for p in params] == versions
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step()
    assert_same(params, averaged)
    optimizer.train()
    # Two lerps in float32 come back to within their rounding, half an ulp of bfloat16 at most.
    torch.testing.assert_close(params, trained, rtol=2.0**-7, atol=1e-6)


@every_mode
@every_schedule_free
def test_copies_of_schedule_free_optimizers(name, low_bits):
    optimizer_class, options = find(name)
    params = parameters()
    optimizer = gk.MasterParams(params, optimizer_class, low_bits=low_bits, **options)
    optimizer.train()
    give(params)
    optimizer.step()
    others, other = copy.deepcopy((params, optimizer))
    for each in (optimizer, other):
        each.eval()
    assert_same(others, params)
    assert optimizer.param_groups[0]["train_mode"] is other.param_groups[0]["train_mode"] is False


def test_a_schedule_free_closure_sees_the_extrapolated_parameters():
    """Also where the gradients were dropped before the step."""
    optimizer_class = pytest.importorskip("schedulefree").AdamWScheduleFreeClosure
    params = parameters()
    hand = ByHand(params, optimizer_class, lr=0.1)
    optimizer = gk.MasterParams(params, optimizer_class, lr=0.1)

    def closure():
        assert_same(params, hand.values())
        for param, master, grad in zip(params, hand.masters, give(params), strict=True):
            param.grad, master.grad = grad, grad.clone()

    for _ in range(4):
        # Both closures are called inside of one step, of the masters by hand.
        hand.optimizer.step(lambda: optimizer.step(closure))
        optimizer.zero_grad()
        assert_same(params, hand.values())


def test_a_closure_that_is_needed_needs_whole_masters():
    """The gradients of one that was called before are not those that such a step asks for."""
    optimizer_class = pytest.importorskip("schedulefree").AdamWScheduleFreeClosure
    params = parameters()
    optimizer = gk.MasterParams(params, optimizer_class, lr=0.1, low_bits=True)
    before = [p.detach().clone() for p in params]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'closure'"):
        optimizer.step(lambda: give(params))
    assert_same(params, before)
