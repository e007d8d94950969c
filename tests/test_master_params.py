"""MasterParams against float32 masters that are stepped by hand."""

import copy
import io
import pickle

import pytest
import torch
from hook_cases import backward, batch, every_hook, mlp, parameter
from torch import optim

import gradacc_kernels as gk

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32

OPTIMIZERS = {
    "AdamW, for-loop": (optim.AdamW, {"lr": 1e-2, "foreach": False}),
    "AdamW, foreach": (optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "AdamW, fused": (optim.AdamW, {"lr": 1e-2, "fused": True}),
    "Adam, amsgrad": (optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "SGD, momentum": (optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "SGD, fused": (optim.SGD, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "RMSprop": (optim.RMSprop, {"lr": 1e-3, "centered": True}),
    "Adagrad": (optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
    "NAdam": (optim.NAdam, {"lr": 1e-2}),
}
SHAPES = [(33, 7), (64,), (), (0, 3), (1, 5), (8, 3, 4, 4)]

every_mode = pytest.mark.parametrize("low_bits", [False, True], ids=["whole", "low-bits"])
every_half = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
without_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, without_cuda])
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
on_cuda = pytest.mark.parametrize("device", [CUDA])


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr("gradacc_kernels.optim.BUCKET_ELEMENTS", 100)


def rounded(values, dtype):
    """float32 values to the nearest of a dtype; to bfloat16 with ties away, through float64."""
    if dtype != BFLOAT16:
        return values.to(dtype)
    # Half an ulp of bfloat16, added to the magnitude in float64, where it is exact; then cut off.
    magnitude = values.double().abs()
    _, exponent = torch.frexp(magnitude)
    ulp = torch.ldexp(torch.ones_like(magnitude), (exponent - 8).clamp(min=-133))
    cut = torch.floor(magnitude / ulp + 0.5) * ulp
    cut = torch.where(cut >= 2.0**128, torch.inf, cut)
    cut = torch.where(values.isfinite(), cut, magnitude)
    return torch.copysign(cut, values.double()).to(BFLOAT16)


def same(a, b):
    """Bitwise, NaN matching NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    a_bits, b_bits = (one.masked_fill(one.isnan(), 0).view(bits) for one in (a, b))
    return a.isnan().equal(b.isnan()) and a_bits.equal(b_bits)


def assert_same(some, others):
    for a, b in zip(some, others, strict=True):
        assert same(a.detach(), b.detach())


def assert_same_state(ours, plain):
    """The groups and the state of a plain optimizer, and masters besides."""
    ours, plain = ours.state_dict(), plain.state_dict()
    assert ours["param_groups"] == plain["param_groups"]
    for index, entry in plain["state"].items():
        entry_of_ours = {k: v for k, v in ours["state"][index].items() if k != "master"}
        assert entry_of_ours.keys() == entry.keys()
        for key, value in entry.items():
            assert entry_of_ours[key] is value is None or same(entry_of_ours[key], value), key


class ByHand:
    """The oracle: float32 copies, a plain optimizer over them, rounded back after a step."""

    def __init__(self, params, optimizer_class, groups=None, **options):
        self.params = list(params)
        self.masters = [p.detach().to(FLOAT32, copy=True) for p in self.params]
        groups = [{"params": self.masters}] if groups is None else groups(self.masters)
        self.optimizer = optimizer_class(groups, **options)

    def step(self, grads):
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = None if grad is None else grad.clone()
        self.optimizer.step()

    def values(self):
        pairs = zip(self.params, self.masters, strict=True)
        return [rounded(master, param.dtype) for param, master in pairs]


def parameters(dtype=BFLOAT16, device="cpu", float32=True):
    """Parameters of all shapes, the last but one transposed, and one of float32."""
    params = [parameter(torch.randn(shape), dtype, device) for shape in SHAPES]
    params.append(torch.nn.Parameter(torch.randn(6, 9, device=device).to(dtype).t()))
    return params + [parameter(torch.randn(5, 4), FLOAT32, device)] * float32


def give(params, call=1):
    """Float32 gradients in the layout of their parameters, as attach leaves them.

    None for one parameter at every third call.
    """
    grads = []
    for i, param in enumerate(params):
        param.grad_dtype = None
        skipped = i == 1 and call % 3 == 0
        param.grad = None if skipped else torch.randn_like(param, dtype=FLOAT32).detach()
        grads.append(param.grad)
    return grads


def assert_state(optimizer, expected):
    """The optimizer's state is this one, bit for bit."""
    state = optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    for index, entry in expected["state"].items():
        assert all(same(value, state["state"][index][key]) for key, value in entry.items())


def split_groups(params):
    return [
        {"params": params[::2], "weight_decay": 0.1},
        {"params": params[1::2], "lr": 3e-3},
    ]


@every_device
@every_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_as_masters_by_hand(name, low_bits, device, small_buckets):
    """Groups with options of their own, a schedule, a parameter without gradient at times."""
    optimizer_class, options = OPTIMIZERS[name]
    for dtype in (BFLOAT16,) if low_bits else (BFLOAT16, FLOAT16):
        params = parameters(dtype, device)
        hand = ByHand(params, optimizer_class, split_groups, **options)
        optimizer = gk.MasterParams(
            split_groups(params), optimizer_class, low_bits=low_bits, **options
        )
        assert isinstance(optimizer, optim.Optimizer)
        assert optimizer.defaults == hand.optimizer.defaults
        schedules = [
            optim.lr_scheduler.CosineAnnealingLR(each, T_max=12)
            for each in (optimizer, hand.optimizer)
        ]
        for i in range(12):
            hand.step(give(params, i))
            optimizer.step()
            for schedule in schedules:
                schedule.step()
            assert_same(params, hand.values())
        assert_same_state(optimizer, hand.optimizer)
        # Indices run through the groups.
        state = optimizer.state_dict()["state"]
        order = [p for group in split_groups(range(len(params))) for p in group["params"]]
        for index, i in enumerate(order):
            if params[i].dtype == dtype:
                assert same(state[index]["master"], hand.masters[i])
            else:
                assert "master" not in state.get(index, {})


@every_mode
def test_the_groups_are_those_of_the_plain_optimizer(low_bits):
    params = parameters()
    plain = optim.AdamW([p.detach().float() for p in params], lr=0.5)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.5, low_bits=low_bits)
    (group,), (expected,) = optimizer.param_groups, plain.param_groups
    assert list(group) == list(expected)
    assert {**group, "params": 0} == {**expected, "params": 0}
    assert all(a is b for a, b in zip(group["params"], params, strict=True))
    named = gk.MasterParams(mlp().named_parameters(), optim.SGD, lr=0.5)
    assert named.param_groups[0]["param_names"][0] == "0.weight"


@every_hook
@every_mode
def test_gradients_are_handed_on_and_not_copied(hook, low_bits):
    device, backend = hook
    model = mlp(device)
    model[2].float()
    accumulator = gk.attach(model, backend=backend)
    seen = []

    class Watching(optim.AdamW):
        def step(self, closure=None):
            for group in self.param_groups:
                seen.extend(p.grad for p in group["params"] if p.grad is not None)
            return super().step(closure)

    optimizer = gk.MasterParams(model.parameters(), Watching, lr=1e-2, low_bits=low_bits)
    with torch.autocast(device, BFLOAT16):
        backward(model, batch(device))
    optimizer.step()
    main = {p.main_grad.data_ptr(): p for p in model.parameters()}
    assert {grad.data_ptr() for grad in seen} == set(main) and len(seen) == len(main)
    assert all(grad.dtype == FLOAT32 for grad in seen)
    assert all(master.grad is None for master in optimizer._masters.values())
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    accumulator.detach()


@every_hook
@every_mode
def test_training_of_an_attached_model(hook, low_bits):
    """Windows of two micro-batches, clipping, and a plain loop with masters by hand beside it."""
    device, backend = hook
    model = mlp(device)
    params = list(model.parameters())
    gk.attach(model, backend=backend, scale=0.5)
    hand = ByHand(params, optim.AdamW, lr=1e-2)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=1e-2, low_bits=low_bits)
    for _ in range(5):
        for _ in range(2):
            backward(model, batch(device))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        hand.step([p.grad for p in params])
        optimizer.step()
        optimizer.zero_grad()
        assert_same(params, hand.values())


@every_half
def test_16_bit_gradients_are_cast(dtype):
    model = mlp(dtype=dtype)
    params = list(model.parameters())
    hand = ByHand(params, optim.AdamW, lr=1e-2)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=1e-2)
    for _ in range(3):
        backward(model, batch(dtype=dtype))
        hand.step([p.grad.float() for p in params])
        optimizer.step()
        assert all(p.grad.dtype == dtype for p in params)
        optimizer.zero_grad()
        assert_same(params, hand.values())


def bits_of(*patterns):
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(FLOAT32)


# Ties over an even and an odd parameter, and what is next to them; the same below zero; the largest
# finite values; infinities; NaNs whose sum wraps around or loses its payload; subnormals and zeros.
PLANTED = [0x3F808000, 0x3F807FFF, 0x3F808001, 0x3F818000, 0x3F817FFF, 0x3F818001, 0x3F800000]
PLANTED += [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F7F0000, 0x7F800000]
PLANTED += [0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7FFF8000, 0x7FFF7FFF]
PLANTED += [0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x00800000, 0x007F8000]
PLANTED += [pattern | 0x80000000 for pattern in PLANTED]


def masters_loaded(values, device, low_bits, optimizer_class=optim.SGD):
    """A parameter whose master has these values, through a state."""
    param = parameter(torch.zeros(values.shape), BFLOAT16, device)
    optimizer = gk.MasterParams([param], optimizer_class, lr=0.5, low_bits=low_bits)
    state = optimizer.state_dict()
    state["state"][0] = {"master": values}
    optimizer.load_state_dict(state)
    return param, optimizer


@every_device
@every_mode
def test_rounding(low_bits, device):
    """Of planted and of random bit patterns; and low bits bring the master back."""
    random = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(FLOAT32)
    values = torch.cat([bits_of(*PLANTED), random]).to(device)
    param, optimizer = masters_loaded(values, device, low_bits)
    assert same(param.detach().cpu(), rounded(values.cpu(), BFLOAT16))
    assert same(optimizer.state_dict()["state"][0]["master"], values)
    nearest = values.bfloat16()
    is_tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert same(param.detach()[~is_tie], nearest[~is_tie])
    assert not same(param.detach(), nearest)  # else there was no tie to round away


@every_device
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_low_bits_are_whole_masters(name, device, small_buckets):
    """50 steps, from masters and gradients among which are ties, infinities and NaNs."""
    optimizer_class, options = OPTIMIZERS[name]
    params = [parameters(device=device), None]
    params[1] = copy.deepcopy(params[0])
    planted = bits_of(*PLANTED).to(device)
    optimizers = []
    for low_bits, some in zip((False, True), params, strict=True):
        some.append(parameter(torch.zeros(planted.shape), BFLOAT16, device))
        optimizers.append(gk.MasterParams(some, optimizer_class, low_bits=low_bits, **options))
        state = optimizers[-1].state_dict()
        state["state"].setdefault(len(some) - 1, {})["master"] = planted
        optimizers[-1].load_state_dict(state)
    for i in range(50):
        grads = give(params[0], i)
        grads[-1].copy_(planted.roll(i)) if i % 7 == 0 else grads[-1].zero_()
        give(params[1])
        for param, grad in zip(params[1], grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert_same(*params)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for index, entry in states[0].items():
        for key, value in entry.items():
            other = states[1][index][key]
            assert value is other is None or same(value, other), (index, key)


def test_low_bits_hold_2_bytes_an_element_and_one_bucket_of_masters(monkeypatch):
    monkeypatch.setattr("gradacc_kernels.optim.BUCKET_ELEMENTS", 1 << 12)
    params = [parameter(torch.randn(32, 64)) for _ in range(8)]
    elements = sum(p.numel() for p in params)
    held = []

    class Watching(optim.AdamW):
        def step(self, closure=None):
            held.append(storage_bytes(optimizer._masters.values()))
            return super().step(closure)

    optimizer = gk.MasterParams(params, Watching, lr=0.1, low_bits=True)
    for _ in range(2):
        assert storage_bytes(optimizer._masters.values()) == 0
        assert storage_bytes(optimizer._lows.values()) == 2 * elements
        give(params)
        optimizer.step()
    assert held == [4 << 12] * 8  # four buckets a step
    for param in params:  # the state is made in the shape and dtype of a whole master
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[param][key].shape == param.shape
            assert optimizer.state[param][key].dtype == FLOAT32


def storage_bytes(tensors):
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@on_cuda
def test_low_bits_save_device_memory(device, monkeypatch):
    """2 bytes an element between steps, and at a step the two buffers of a bucket at most."""
    monkeypatch.setattr("gradacc_kernels.optim.BUCKET_ELEMENTS", 1 << 20)
    held, peak = [], []
    elements = 16 << 20
    for low_bits in (False, True):
        params = [parameter(torch.zeros(1 << 20), device=device) for _ in range(16)]
        give(params)
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        optimizer = gk.MasterParams(params, optim.SGD, lr=0.1, foreach=False, low_bits=low_bits)
        held.append(torch.cuda.memory_allocated() - start)
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        peak.append(torch.cuda.max_memory_allocated() - start)
        del optimizer, params
    # The allocator rounds sizes up; a bucket's masters, low bits and what an optimizer makes.
    assert held[0] == 4 * elements and held[1] == 2 * elements
    assert peak[1] <= held[1] + 16 * (1 << 20) < held[0]
    assert peak[0] <= held[0] + 16 * (1 << 20)


@pytest.mark.parametrize("to_low", [False, True], ids=["to-whole", "to-low-bits"])
@every_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_in_the_middle_of_training_goes_on_bit_for_bit(name, low_bits, to_low):
    optimizer_class, options = OPTIMIZERS[name]
    params = parameters()
    first = gk.MasterParams(params, optimizer_class, low_bits=low_bits, **options)
    for i in range(3):
        give(params, i)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    resumed = [p.detach().clone().requires_grad_() for p in params]
    second = gk.MasterParams(resumed, optimizer_class, low_bits=to_low, **options)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    assert_same(resumed, params)
    for i in range(3):
        grads = give(params, i)
        give(resumed)
        for param, grad in zip(resumed, grads, strict=True):
            param.grad = grad
        first.step()
        second.step()
        assert_same(resumed, params)


@every_mode
def test_masters_exist_before_the_first_step(low_bits):
    values = torch.randn(40)
    param, optimizer = masters_loaded(values, "cpu", low_bits, optim.AdamW)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"].keys() == {0} and state["state"][0].keys() == {"master"}
    other = parameter(torch.zeros(40))
    second = gk.MasterParams([other], optim.AdamW, lr=0.5, low_bits=low_bits)
    second.load_state_dict(state)
    for one in (param, other):
        one.grad_dtype = None
        one.grad = torch.ones(40)
    hand = ByHand([parameter(values, FLOAT32)], optim.AdamW, lr=0.5)
    hand.step([torch.ones(40)])
    optimizer.step()
    second.step()
    for one in (param, other):
        assert same(one.detach(), rounded(hand.masters[0], BFLOAT16))


@every_mode
def test_loading_its_own_state_changes_nothing(low_bits):
    params = parameters()
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits)
    give(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert_state(optimizer, before)


@every_mode
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=["bfloat16", "float32"])
def test_the_state_of_a_plain_optimizer_is_loaded(dtype, low_bits):
    """Its 16-bit moments are cast to float32, and the parameters become the masters."""
    params = parameters(float32=False)
    plain_params = [p.detach().to(dtype) for p in params]
    plain = optim.AdamW(plain_params, lr=0.3)
    for param in plain_params:
        param.grad = torch.randn_like(param)
    plain.step()
    hand = ByHand(params, optim.AdamW, lr=0.1)
    hand.optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits)
    give(params)
    optimizer.step()  # whose masters must not survive
    for param, master in zip(params, hand.masters, strict=True):
        master.copy_(param.detach())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.state[params[0]]["exp_avg"].dtype == FLOAT32
    hand.step(give(params))
    optimizer.step()
    assert_same(params, hand.values())


@every_mode
def test_the_plain_optimizer_loads_our_state(low_bits):
    params = parameters(float32=False)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits)
    for _ in range(2):
        give(params)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    plain_params = [entry["master"].clone() for entry in state["state"].values()]
    plain = optim.AdamW(plain_params, lr=0.5)
    plain.load_state_dict(state)
    grads = give(params)
    for param, grad in zip(plain_params, grads, strict=True):
        param.grad = grad
    plain.step()
    optimizer.step()
    assert_same(params, [rounded(p, BFLOAT16) for p in plain_params])


def test_a_state_of_16_bit_parameters_is_loaded_into_float32_ones():
    values = torch.randn(10)
    _, optimizer = masters_loaded(values, "cpu", False)
    param = parameter(torch.zeros(10), FLOAT32)
    gk.MasterParams([param], optim.SGD, lr=0.5).load_state_dict(optimizer.state_dict())
    assert same(param.detach(), values)


@every_mode
def test_states_that_do_not_fit_change_nothing(low_bits):
    params = parameters()
    optimizer = gk.MasterParams(split_groups(params), optim.AdamW, lr=0.1, low_bits=low_bits)
    give(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]

    def without_group(state):
        del state["param_groups"][1]

    def without_param(state):
        state["param_groups"][0]["params"].pop()

    def of_other_shape(state):
        state["state"][1]["master"] = torch.zeros(3, 3)

    def no_state(state):
        del state["state"]

    for spoil, message in [
        (without_group, r"expected groups of \[4, 4\] parameters, got \[4\]"),
        (without_param, r"expected groups of \[4, 4\] parameters, got \[3, 4\]"),
        (of_other_shape, r"expected a master of shape \[\] for parameter 1, got \[3, 3\]"),
        (no_state, "expected what state_dict"),
    ]:
        state = copy.deepcopy(before)
        for group in state["param_groups"]:
            group["lr"] = 7.0
        for entry in state["state"].values():
            entry["master"] = entry["exp_avg"] + 1
        spoil(state)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert_same(params, values)
        assert_state(optimizer, before)
    with pytest.raises(ValueError, match="got list"):
        optimizer.load_state_dict([])


@every_mode
def test_weights_loaded_by_the_user(low_bits):
    params = parameters()
    optimizer = gk.MasterParams(params, optim.SGD, lr=0.5, low_bits=low_bits)
    give(params)
    optimizer.step()
    loaded = [torch.randn_like(p) for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, loaded)
    optimizer.refresh_masters()
    hand = ByHand(loaded, optim.SGD, lr=0.5)
    hand.step(give(params))
    optimizer.step()
    assert_same(params, hand.values())


@every_mode
def test_a_group_that_is_added(low_bits):
    params = parameters()
    hand = ByHand(params, optim.AdamW, lambda masters: [{"params": masters[:4]}], lr=0.1)
    optimizer = gk.MasterParams(params[:4], optim.AdamW, lr=0.1, low_bits=low_bits)
    for i in range(4):
        if i == 2:
            # What others have changed since the last step stays, as by a schedule.
            for each in (optimizer, hand.optimizer):
                each.param_groups[0]["lr"] = 0.3
                each.state.clear()
            hand.optimizer.add_param_group({"params": hand.masters[4:], "lr": 0.05})
            optimizer.add_param_group({"params": (p for p in params[4:]), "lr": 0.05})
        hand.step(give(params))
        optimizer.step()
        assert_same(params, hand.values())
    assert_same_state(optimizer, hand.optimizer)


@every_mode
def test_a_group_that_is_refused_changes_nothing(low_bits):
    params = parameters()
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits)
    masters = dict(optimizer._masters)
    good = parameter(torch.ones(3))

    class Picky(optim.AdamW):
        def add_param_group(self, param_group):
            if param_group.get("lr") == "bad":
                raise ValueError("not this one")
            super().add_param_group(param_group)

    picky = gk.MasterParams([parameter(torch.ones(2))], Picky, low_bits=low_bits)
    with pytest.raises(ValueError, match="not this one"):
        picky.add_param_group({"params": [good], "lr": "bad"})
    assert len(picky.param_groups) == len(picky.inner.param_groups) == len(picky._masters) == 1
    for bad, error in [
        ([good, torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], TypeError),
        ([good, params[0]], ValueError),
    ]:
        with pytest.raises(error):
            optimizer.add_param_group({"params": bad})
        assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) == 1
        assert optimizer._masters == masters
    optimizer.add_param_group({"params": [good]})


@every_mode
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way, low_bits):
    model = mlp()
    gk.attach(model)
    optimizer = gk.MasterParams(model.parameters(), optim.AdamW, lr=1e-2, low_bits=low_bits)
    for _ in range(2):
        backward(model, batch())
        optimizer.step()
        optimizer.zero_grad()
    pair = (model, optimizer)
    if way == "deepcopy":
        other_model, other = copy.deepcopy(pair)
    elif way == "pickle":
        other_model, other = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        other_model, other = torch.load(file, weights_only=False)
    params, others = list(model.parameters()), list(other_model.parameters())
    assert all(a is b for a, b in zip(other.param_groups[0]["params"], others, strict=True))
    if low_bits:
        assert storage_bytes(other._masters.values()) == 0
    for _ in range(2):
        grads = give(params)
        give(others)
        for param, grad in zip(others, grads, strict=True):
            param.grad = grad.clone()
        before = [p.detach().clone() for p in params]
        other.step()
        assert_same(params, before)
        optimizer.step()
        assert_same(params, others)


@every_mode
def test_hooks_run_once_a_step(low_bits, small_buckets):
    params = parameters()
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits)
    calls = []
    optimizer.register_step_pre_hook(lambda one, args, kwargs: calls.append(("pre", one)))
    optimizer.register_step_post_hook(lambda one, args, kwargs: calls.append(("post", one)))
    optimizer.register_state_dict_post_hook(lambda one, state: state.update(seen=len(state)))
    optimizer.register_load_state_dict_pre_hook(lambda one, state: calls.append(("load", one)))
    optimizer.register_load_state_dict_post_hook(lambda one: calls.append(("loaded", one)))
    give(params)
    optimizer.step()
    assert calls == [("pre", optimizer), ("post", optimizer)]
    state = optimizer.state_dict()
    assert state["seen"] == 2
    optimizer.load_state_dict(state)
    assert calls[2:] == [("load", optimizer), ("loaded", optimizer)]


@every_mode
def test_a_closure(low_bits):
    """Called once, with gradients on, and its loss returned."""
    model = mlp()
    params = list(model.parameters())
    gk.attach(model)
    hand = ByHand(params, optim.AdamW, lr=1e-2)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=1e-2, low_bits=low_bits)
    x, losses = batch(), []

    def closure():
        optimizer.zero_grad()
        loss = model(x).float().square().sum()
        loss.backward()
        losses.append(loss)
        hand.step([p.grad for p in params])
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert_same(params, hand.values())


def test_lbfgs_sees_the_parameters_move():
    """It asks for the loss again after each of its inner steps."""
    target = torch.randn(20)
    param, twin = parameter(torch.zeros(20)), torch.zeros(20, requires_grad=True)

    def closures(one, optimizer):
        def closure():
            optimizer.zero_grad()
            rounded_twin = rounded(twin.detach(), BFLOAT16).float()
            value = one.detach().float() if one is param else rounded_twin
            one.grad = 2 * (value - target)
            return (value - target).square().sum()

        return closure

    param.grad_dtype = None
    ours = gk.MasterParams([param], optim.LBFGS, lr=0.5, max_iter=8)
    plain = optim.LBFGS([twin], lr=0.5, max_iter=8)
    assert ours.step(closures(param, ours)).equal(plain.step(closures(twin, plain)))
    assert same(param.detach(), rounded(twin.detach(), BFLOAT16))
    assert ours.state[param]["func_evals"] == plain.state[twin]["func_evals"] > 2


class Extrapolating(optim.SGD):
    """An optimizer of others that asks for the gradient beside where it steps from."""

    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            torch._foreach_add_(params, 1.0)
        loss = closure()
        with torch.no_grad():
            torch._foreach_sub_(params, 1.0)
        super().step()
        return loss


def test_a_closure_sees_parameters_that_were_moved_before_it():
    """Also where they had no gradients then."""
    params = parameters()
    hand = ByHand(params, Extrapolating, lr=0.1)
    optimizer = gk.MasterParams(params, Extrapolating, lr=0.1)

    def closure():
        assert_same(params, hand.values())
        for param, master, grad in zip(params, hand.masters, give(params), strict=True):
            param.grad, master.grad = grad, grad.clone()

    for _ in range(3):
        hand.optimizer.step(lambda: optimizer.step(closure))
        optimizer.zero_grad()
        assert_same(params, hand.values())


class Counting(optim.Optimizer):
    """An optimizer of others: a counter and a sum in its groups, and `p.data = ...`."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "lr_sum": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["lr_sum"] += group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "z" not in state:
                    state["z"] = p.clone()
                state["z"].sub_(p.grad, alpha=group["lr_sum"] / group["k"])
                p.data = torch.lerp(p, state["z"], 1 / group["k"])


@every_mode
def test_an_optimizer_that_keeps_state_in_its_groups(low_bits, small_buckets):
    params = parameters()
    hand = ByHand(params, Counting)
    optimizer = gk.MasterParams(params, Counting, low_bits=low_bits)
    for i in range(6):
        hand.step(give(params, i))
        optimizer.step()
        assert_same(params, hand.values())
        assert optimizer.param_groups[0]["k"] == i + 1
    assert_same_state(optimizer, hand.optimizer)


class Swapping(optim.SGD):
    """An optimizer of others that is evaluated at other parameters, and counts in its groups."""

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            group["switches"] = group.get("switches", 0) + 1
            for p in group["params"]:
                p.mul_(4 / 3)

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(3 / 4)


@every_mode
def test_train_and_eval_swap_the_parameters(low_bits, small_buckets):
    """Of all parameters, with gradients and without."""
    params = parameters()
    hand = ByHand(params, Swapping, lr=0.1, momentum=0.9)
    optimizer = gk.MasterParams(params, Swapping, lr=0.1, momentum=0.9, low_bits=low_bits)
    for i in range(4):
        hand.step(give(params, i))
        optimizer.step()
        for mode in ("eval", "train"):
            getattr(hand.optimizer, mode)()
            getattr(optimizer, mode)()
            assert_same(params, hand.values())
    assert optimizer.param_groups[0]["switches"] == 4
    assert_same_state(optimizer, hand.optimizer)
    if low_bits:
        assert storage_bytes(optimizer._masters.values()) == 0


@every_mode
def test_train_and_eval_leave_the_parameters_of_other_optimizers(low_bits):
    params = parameters()
    optimizer = gk.MasterParams(params, optim.AdamW, low_bits=low_bits)
    versions = [p._version for p in params]
    optimizer.eval()
    optimizer.train()
    assert [p._version for p in params] == versions


@every_mode
def test_a_learning_rate_that_is_a_tensor(low_bits, small_buckets):
    params = parameters()
    hand = ByHand(params, optim.AdamW, lr=torch.tensor(0.1), foreach=False)
    lr = torch.tensor(0.1)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=lr, foreach=False, low_bits=low_bits)
    schedules = [
        optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, hand.optimizer)
    ]
    for _ in range(3):
        hand.step(give(params))
        optimizer.step()
        for schedule in schedules:
            schedule.step()
        assert_same(params, hand.values())
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.param_groups[0]["lr"].equal(hand.optimizer.param_groups[0]["lr"])


@every_mode
def test_state_that_others_replace_and_clear(low_bits):
    """As Lightning replaces the entries to move them, and a restart clears them."""
    params = parameters()
    hand = ByHand(params, optim.AdamW, lr=0.1)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits)
    for i in range(4):
        hand.step(give(params))
        optimizer.step()
        assert_same(params, hand.values())
        for param, entry in optimizer.state.items():
            optimizer.state[param] = {key: value.clone() for key, value in entry.items()}
        if i == 1:
            optimizer.state.clear()
            hand.optimizer.state.clear()


@every_device
@pytest.mark.parametrize("unscaled", [False, True], ids=["step", "unscale_"])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize("mode", ["float16", "bfloat16", "bfloat16, low bits"])
def test_grad_scaler(mode, options, unscaled, device):
    """torch's, unmodified, beside plain training of float32 masters, with an overflow between."""
    dtype = FLOAT16 if mode == "float16" else BFLOAT16
    model = mlp(device, dtype)
    params = list(model.parameters())
    gk.attach(model, backend="auto")
    hand = ByHand(params, optim.AdamW, lr=1e-2, **options)
    low_bits = mode.endswith("low bits")
    optimizer = gk.MasterParams(params, optim.AdamW, lr=1e-2, low_bits=low_bits, **options)
    supports = getattr(hand.optimizer, "_step_supports_amp_scaling", False)
    assert optimizer._step_supports_amp_scaling == supports
    ours, plain = (torch.amp.GradScaler(device, init_scale=16.0, growth_interval=2) for _ in "ab")
    for i in range(6):
        loss = model(batch(device, dtype)).float().square().sum()
        plain.scale(loss.detach())
        ours.scale(loss * (float("inf") if i == 2 else 1.0)).backward()
        for master, param in zip(hand.masters, params, strict=True):
            master.grad = param.grad.clone()
        for scaler, each in ((ours, optimizer), (plain, hand.optimizer)):
            if unscaled:
                scaler.unscale_(each)
                of_each = params if each is optimizer else hand.masters
                torch.nn.utils.clip_grad_norm_(of_each, 1.0)
            scaler.step(each)
            scaler.update()
        assert not hasattr(optimizer.inner, "grad_scale")
        assert not hasattr(optimizer.inner, "found_inf")
        optimizer.zero_grad()
        assert_same(params, hand.values())
        assert ours.get_scale() == plain.get_scale()
    assert ours.get_scale() == 32.0  # grown twice, halved once
    assert_same_state(optimizer, hand.optimizer)


@every_mode
def test_a_step_that_raises_leaves_nothing_behind(low_bits):
    params = parameters()

    class Failing(optim.AdamW):
        def step(self, closure=None):
            raise ArithmeticError("in the middle")

    optimizer = gk.MasterParams(params, Failing, lr=0.1, low_bits=low_bits)
    give(params)
    optimizer.found_inf = torch.zeros(())
    before = [p.detach().clone() for p in params]
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert_same(params, before)
    assert not hasattr(optimizer.inner, "found_inf")
    for param, master in optimizer._masters.items():
        assert master.grad is None and param.grad is not None
    assert len(optimizer.inner.param_groups[0]["params"]) == len(params)
    if low_bits:
        assert storage_bytes(optimizer._masters.values()) == 0


def test_parameters_that_were_cast():
    model = mlp()
    for low_bits in (False, True):
        optimizer = gk.MasterParams(model.parameters(), optim.SGD, lr=0.1, low_bits=low_bits)
        model.float()
        with pytest.raises(RuntimeError, match=r"was cast to torch.float32 since the optimizer"):
            optimizer.step()
        model.bfloat16()
        optimizer.step()
    optimizer = gk.MasterParams(model.float().parameters(), optim.SGD, lr=0.1)
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"was cast to torch.bfloat16 since the optimizer"):
        optimizer.step()


@on_cuda
@every_mode
def test_masters_follow_a_model_that_moves(low_bits, device):
    params = parameters()
    hand = ByHand([p.detach().to(device) for p in params], optim.AdamW, lr=0.1)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits)
    for param in params:
        param.data = param.data.to(device)
    hand.step(give(params))
    optimizer.step()
    assert_same(params, hand.values())


@on_cuda
@every_mode
def test_a_captured_step(low_bits, device):
    """The gradients of a replay are read where they were at capture."""
    params = parameters(device=device)
    hand = ByHand(params, optim.AdamW, lr=0.1, capturable=True)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, capturable=True, low_bits=low_bits)
    grads = give(params)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    hand.step(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        for grad in grads:
            grad.normal_()
        hand.step(grads)
        graph.replay()
        assert_same(params, hand.values())


def test_what_is_not_stepped():
    params = parameters()
    for args, error, message in [
        (([], optim.SGD), ValueError, "got no parameters"),
        ((iter(()), optim.SGD), ValueError, "got no parameters"),
        ((mlp(), optim.SGD), TypeError, "as of model.parameters.., got Sequential"),
        ((3, optim.SGD), TypeError, "got int"),
        ((params[0], optim.SGD), TypeError, "got Parameter"),
        ((params, optim.SGD(params)), TypeError, "expected a class of optimizers, got a SGD"),
        ((params, torch.nn.Linear), TypeError, "expected a class of optimizers, got Linear"),
        ((params, None), TypeError, "expected a class of optimizers, got a NoneType"),
        (([torch.ones(2, dtype=torch.complex64)], optim.SGD), TypeError, "got torch.complex64"),
        (([torch.ones(2, dtype=torch.int32)], optim.SGD), TypeError, "got torch.int32"),
        (([torch.ones(2, device="meta")], optim.SGD), ValueError, "is on the meta device"),
    ]:
        with pytest.raises(error, match=message):
            gk.MasterParams(*args, lr=0.1)
    with pytest.raises(ValueError, match="is float16, and low_bits is for bfloat16"):
        gk.MasterParams(parameters(FLOAT16), optim.SGD, lr=0.1, low_bits=True)
    with pytest.raises(TypeError, match="optimizer_class"):
        gk.MasterParams(params)


def test_float32_parameters_are_their_own_masters():
    model, twin = mlp(dtype=FLOAT32), None
    twin = copy.deepcopy(model)
    optimizer = gk.MasterParams(model.parameters(), optim.AdamW, lr=1e-2)
    plain = optim.AdamW(twin.parameters(), lr=1e-2)
    x = batch(dtype=FLOAT32)
    for one, each in ((model, optimizer), (twin, plain)):
        backward(one, x)
        each.step()
    assert optimizer._masters == {}
    assert_same(model.parameters(), twin.parameters())
    assert all(p.grad is not None for p in model.parameters())


def distance(model, reference):
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return sum((a.detach().double() - b.detach().double()).square().sum() for a, b in pairs).sqrt()


def test_training_follows_float32_more_closely_than_16_bit_steps():
    """Whose updates, smaller than half an ulp of the parameters, are lost."""
    models = {
        "float32": mlp(dtype=FLOAT32),
    }
    for name in ("masters", "low bits", "stock"):
        models[name] = copy.deepcopy(models["float32"]).bfloat16()
    models["float32"].load_state_dict(models["stock"].state_dict())
    start = copy.deepcopy(models["float32"])
    optimizers = {
        name: gk.MasterParams(model.parameters(), optim.SGD, lr=1e-3, low_bits=name == "low bits")
        if name in ("masters", "low bits")
        else optim.SGD(model.parameters(), lr=1e-3)
        for name, model in models.items()
    }
    for name in ("masters", "low bits"):
        gk.attach(models[name])
    inputs, targets = torch.randn(16, 16), torch.randn(16, 8)
    for _ in range(300):
        for name, model in models.items():
            output = model(inputs.to(next(model.parameters()).dtype))
            (output.float() - targets).square().mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
    assert_same(models["masters"].parameters(), models["low bits"].parameters())
    moved = distance(models["float32"], start)
    masters, stock = (distance(models[name], models["float32"]) for name in ("masters", "stock"))
    assert masters < stock / 2 and masters < moved / 10
