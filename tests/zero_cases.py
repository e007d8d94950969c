"""MasterParams(zero=True) on several ranks, beside zero=False: cases as in rank_cases.py."""

import contextlib
import copy
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hook_cases import mlp, parameter
from rank_cases import case, main
from test_master_params import Counting, Swapping, assert_same, same, storage_bytes
from torch import optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

import gradacc_kernels as gk
from gradacc_kernels import shards

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Two are large where LARGE_BYTES is 1 kB, one of them transposed, and one is not dense.
SHAPES = [(33, 17), (64,), (), (0, 3), (1, 5), (8, 3, 4, 4)]
OPTIMIZERS = {
    "AdamW": (optim.AdamW, {"lr": 1e-2}),
    "AdamW, capturable": (optim.AdamW, {"lr": 1e-2, "capturable": True, "foreach": True}),
    "AdamW, fused": (optim.AdamW, {"lr": 1e-2, "fused": True}),
    "SGD, momentum": (optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "SGD": (optim.SGD, {"lr": 1e-2}),
    "Adagrad": (optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
    "one that counts": (Counting, {"lr": 1e-2}),
}


def small_messages(function):
    """Has a case send some parameters from where they lie, and others in a copy."""

    def with_small_messages(ranks):
        before, shards.LARGE_BYTES = shards.LARGE_BYTES, 1000
        try:
            function(ranks)
        finally:
            shards.LARGE_BYTES = before

    with_small_messages.__name__ = function.__name__
    return with_small_messages


def takes(name, device):
    """Whether torch has this optimizer on a device."""
    return name != "AdamW, capturable" or device.type == "cuda"


def parameters(device, dtype=BFLOAT16):
    torch.manual_seed(0)
    params = [parameter(torch.randn(shape), dtype, device) for shape in SHAPES]
    params.append(torch.nn.Parameter(torch.randn(30, 40, device=device).to(dtype).t()))
    params.append(torch.nn.Parameter(torch.randn(6, 9, device=device).to(dtype)[:, ::2]))
    return params + [parameter(torch.randn(shape), FLOAT32, device) for shape in [(5, 4), (40, 9)]]


def twins(ranks, dtype=BFLOAT16):
    """Twice the same parameters."""
    return [parameters(ranks.device, dtype) for _ in range(2)]


def give(params, step):
    """Float32 gradients, the same on all ranks; none for one parameter at every third step."""
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(params):
        param.grad_dtype = None
        grad = torch.randn(param.shape, generator=generator).to(param.device)
        param.grad = (
            None
            if i % 5 == 1 and step % 3 == 0
            else torch.empty_like(param, dtype=FLOAT32).copy_(grad)
        )
        param.grad = None if param.grad is None else param.grad.detach()


def split(params):
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "lr": 3e-3}]


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_part_of(optimizer, whole):
    """Groups, and state and masters of what this rank owns, are those of the whole optimizer."""
    part, all_of_it = optimizer.state_dict(), whole.state_dict()
    assert part["param_groups"] == all_of_it["param_groups"]
    for index, entry in all_of_it["state"].items():
        mine = part["state"].get(index, {})
        if index not in part["owned"]:
            assert mine == {}
            continue
        assert mine.keys() == entry.keys()
        for key, value in entry.items():
            assert mine[key] is value is None or same(mine[key], value), (index, key)
    return part["owned"]


@case
@small_messages
def steps_are_those_of_the_whole_optimizer(ranks):
    for name, (optimizer_class, options) in OPTIMIZERS.items():
        if not takes(name, ranks.device):
            continue
        for dtype, low_bits in ((BFLOAT16, False), (BFLOAT16, True), (FLOAT16, False)):
            params, others = twins(ranks, dtype)
            optimizer = gk.MasterParams(
                split(params), optimizer_class, low_bits=low_bits, zero=True, **options
            )
            whole = gk.MasterParams(split(others), optimizer_class, low_bits=low_bits, **options)
            schedules = [
                optim.lr_scheduler.CosineAnnealingLR(each, T_max=6) for each in (optimizer, whole)
            ]
            for step in range(6):
                give(params, step)
                give(others, step)
                versions = [p._version for p in params]
                optimizer.step()
                whole.step()
                for schedule in schedules:
                    schedule.step()
                assert_same(params, others)
                pairs = zip(params, versions, strict=True)
                assert all(p._version > v for p, v in pairs if not optimizer._is_mine(p))
            owned = assert_part_of(optimizer, whole)
            everything = [None] * ranks.world_size
            dist.all_gather_object(everything, owned)
            assert sorted(sum(everything, [])) == list(range(len(params)))


@case
def an_exchange_that_does_not_happen_is_seen(ranks):
    params, others = twins(ranks)
    optimizer = gk.MasterParams(params, optim.SGD, lr=0.1, zero=True)
    optimizer._exchange = lambda: None
    whole = gk.MasterParams(others, optim.SGD, lr=0.1)
    give(params, 1)
    give(others, 1)
    optimizer.step()
    whole.step()
    pairs = zip(params_of(optimizer), others, strict=True)
    seen = [index for index, (p, other) in enumerate(pairs) if not same(p.detach(), other.detach())]
    assert seen and not set(seen) & set(optimizer.state_dict()["owned"])


@case
def each_rank_holds_its_share_of_the_bytes(ranks):
    for low_bits, of_masters in ((False, 4), (True, 2)):
        params = [parameter(torch.randn(32, 32), BFLOAT16, ranks.device) for _ in range(8)]
        optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, low_bits=low_bits, zero=True)
        give(params, 1)
        optimizer.step()
        masters = [*optimizer._lows.values()] if low_bits else [*optimizer._masters.values()]
        moments = [
            value
            for entry in optimizer.state.values()
            for key, value in entry.items()
            if key.startswith("exp_avg")
        ]
        elements = sum(p.numel() for p in params) / ranks.world_size
        assert storage_bytes(masters) == of_masters * elements
        assert storage_bytes(moments) == 8 * elements
        assert storage_bytes(optimizer._masters.values()) == (0 if low_bits else 4 * elements)


@case
def a_large_parameter_has_a_rank_of_its_own(ranks):
    sizes = [10, 1000, 20, 30, 40]
    params = [parameter(torch.zeros(size), BFLOAT16, ranks.device) for size in sizes]
    optimizer = gk.MasterParams(params, optim.SGD, lr=0.1, zero=True)
    owned = optimizer.state_dict()["owned"]
    assert (owned == [1]) == (ranks.rank == 0)
    loads = torch.tensor([sum(sizes[i] for i in owned)], device=ranks.device)
    loads = [int(load) for load in ranks.gathered(loads)]
    assert loads == {2: [1000, 100], 4: [1000, 40, 30, 30]}[ranks.world_size]


@case
def windows_of_an_attached_model(ranks):
    """Weights, clipping, an idle rank, skipped windows; beside the whole optimizer."""
    for backend, fused, low_bits in (
        (ranks.backends[0], True, False),
        (ranks.backends[1], True, True),
        (ranks.backends[0], False, True),
        (ranks.backends[1], False, False),
    ):
        models = [ranks.model(), ranks.model()]
        for model in models:
            model[2].float()
        accumulators, optimizers = [], []
        for zero, model in zip((True, False), models, strict=True):
            accumulators.append(gk.attach(model, backend=backend, process_group=ranks.group))
            optimizers.append(
                gk.MasterParams(
                    model.parameters(),
                    optim.AdamW,
                    lr=1e-2,
                    zero=zero,
                    low_bits=low_bits,
                    fused=fused,
                )
            )
        for window in range(5):
            for model, accumulator, optimizer in zip(models, accumulators, optimizers, strict=True):
                for index, x in enumerate(ranks.batches(2)):
                    is_idle = ranks.rank == window % ranks.world_size and index
                    if window == 2 and ranks.rank == 0:
                        x = x / 0
                    weight = 0 if window == 3 else 1 + index + ranks.rank
                    with (
                        contextlib.nullcontext() if index else accumulator.no_sync(),
                        accumulator.micro_batch(0 if is_idle else weight),
                    ):
                        hidden = model[1](model[0](x)).float()
                        out = model[3](model[2](hidden).to(BFLOAT16))
                        if not is_idle:
                            out.float().square().mean().backward()
                accumulator.step(optimizer, max_norm=0.1)
                optimizer.zero_grad()
            assert_same(*(m.parameters() for m in models))
            ranks.assert_same(models[0].parameters())
        skipped = accumulators[0].counters["skipped_windows"]
        assert skipped == accumulators[1].counters["skipped_windows"] == 2
        assert_part_of(*optimizers)
        for accumulator in accumulators:
            accumulator.detach()


@case
def an_overflow_of_one_rank_is_skipped_by_all(ranks):
    """With GradScaler of ours and of torch, where the kernel skips and where the host does."""
    for options in ({"fused": True}, {"foreach": True}):
        for ours in (True, False):
            models = [ranks.model(FLOAT16), ranks.model(FLOAT16)]
            parts = []
            for zero, model in zip((True, False), models, strict=True):
                accumulator = gk.attach(model, process_group=ranks.group)
                optimizer = gk.MasterParams(
                    model.parameters(), optim.AdamW, lr=1e-2, zero=zero, **options
                )
                settings = {"device": ranks.device.type, "init_scale": 16.0, "growth_interval": 2}
                scaler = (
                    gk.GradScaler(accumulator, **settings)
                    if ours
                    else torch.amp.GradScaler(**settings)
                )
                parts.append((model, accumulator, optimizer, scaler))
            for window in range(5):
                before = [p.detach().clone() for p in models[0].parameters()]
                for model, _, optimizer, scaler in parts:
                    x = ranks.batches(1, dtype=FLOAT16)[0]
                    loss = model(x).float().square().mean()
                    if window == 2 and ranks.rank == 1:
                        loss = loss * float("inf")
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                is_kept = all(map(torch.equal, models[0].parameters(), before))
                assert is_kept == (window == 2)
                assert parts[0][3].get_scale() == parts[1][3].get_scale()
                assert_same(*(m.parameters() for m in models))
                ranks.assert_same(models[0].parameters())
            for _, accumulator, *_ in parts:
                accumulator.detach()


@case
@small_messages
def groups_that_are_added_and_switches(ranks):
    for low_bits in (False, True):
        params, others = twins(ranks)
        options = {"lr": 0.1, "momentum": 0.9, "low_bits": low_bits}
        optimizer = gk.MasterParams(params[:4], Swapping, zero=True, **options)
        whole = gk.MasterParams(others[:4], Swapping, **options)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": params[4:], "lr": 0.05})
                whole.add_param_group({"params": others[4:], "lr": 0.05})
            if step == 4:
                with torch.no_grad():
                    for param in (*params, *others):
                        param.fill_(3)
                optimizer.refresh_masters()
                whole.refresh_masters()
            give(params, step)
            give(others, step)
            for each in (optimizer, whole):
                each.step()
                each.eval()
            assert_same(params, others)
            for each in (optimizer, whole):
                each.train()
            assert_same(params, others)
        assert_part_of(optimizer, whole)
        bad = parameter(torch.ones(2), BFLOAT16, ranks.device)
        try:
            optimizer.add_param_group({"params": [bad, params[0]]})
        except ValueError:
            pass
        assert len(optimizer.param_groups) == len(optimizer.inner.param_groups) == 2
        optimizer.add_param_group({"params": [bad]})
        give(params, 7)
        give([bad], 7)
        optimizer.step()
        ranks.assert_same([*params, bad])


@case
def a_closure_is_called_once_before_the_step(ranks):
    params, others = twins(ranks)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, zero=True)
    whole = gk.MasterParams(others, optim.AdamW, lr=0.1)
    calls = []

    def closure(some):
        give(some, 1)
        calls.append(torch.is_grad_enabled())
        return 7.0

    with torch.no_grad():
        assert optimizer.step(lambda: closure(params)) == 7.0
        assert whole.step(lambda: closure(others)) == 7.0
    assert calls == [True, True]
    assert_same(params, others)


def model_of(seed, device="cpu"):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(7, 7) for _ in range(4))).to(device, BFLOAT16)
    model[1].float()
    return model


def optimizer_of(model, name, **options):
    optimizer_class, others = OPTIMIZERS[name]
    params = list(model.parameters())
    return gk.MasterParams(split(params), optimizer_class, **others, **options)


FLAT, NESTED = StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions()
SAVED = [
    ("AdamW", FLAT),
    ("AdamW", NESTED),
    ("AdamW, fused", FLAT),
    ("AdamW, capturable", NESTED),
    ("SGD, momentum", FLAT),
    ("SGD", FLAT),
    ("SGD", NESTED),
    ("Adagrad", FLAT),
]


def train(model, optimizer, steps):
    for step in steps:
        give(model.parameters(), step)
        optimizer.step()
        optimizer.zero_grad()


def save(path, model, optimizer, options, **where):
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path, **where)


def load(path, model, optimizer, options, **where):
    weights, state = get_state_dict(model, optimizer, options=options)
    parts = {"model": weights, "optimizer": state}
    dcp.load(parts, checkpoint_id=path, **where)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
        options=options,
    )


def masters_of(optimizer):
    state = optimizer.state_dict()["state"]
    return {index: entry["master"] for index, entry in state.items() if "master" in entry}


def resumed(path, name, device, options, where, **of_optimizer):
    """A model and an optimizer that go on from a checkpoint, and the uninterrupted ones."""
    whole = model_of(0, device)
    uninterrupted = optimizer_of(whole, name)
    train(whole, uninterrupted, range(1, 4))
    model = model_of(1, device)
    optimizer = optimizer_of(model, name, **of_optimizer)
    load(path, model, optimizer, options, **where)
    assert_same(model.parameters(), whole.parameters())
    expected, got = (masters_of(each) for each in (uninterrupted, optimizer))
    assert len(expected) == 6 and (got or "zero" in of_optimizer)
    assert all(same(value, expected[index]) for index, value in got.items())
    train(whole, uninterrupted, range(4, 7))
    train(model, optimizer, range(4, 7))
    assert_same(model.parameters(), whole.parameters())
    return optimizer, uninterrupted


def path_of(folder, name, options):
    return folder / "checkpoints" / str(SAVED.index((name, options)))


@case
def checkpoints_are_resumed_by_other_numbers_of_ranks(ranks):
    """Saved by all of them; resumed by all, by halves, by single ones, and without zero."""
    world = ranks.world_size
    groups = {}
    for size in dict.fromkeys((world, world // 2, 1)):
        for first in range(0, world, size):
            group = dist.new_group(range(first, first + size))
            if first <= ranks.rank < first + size:
                groups[size] = group
    for name, options in SAVED:
        if not takes(name, ranks.device):
            continue
        model = model_of(0, ranks.device)
        low_bits = name == "SGD, momentum"
        optimizer = optimizer_of(model, name, zero=True, low_bits=low_bits)
        train(model, optimizer, range(1, 4))
        path = path_of(ranks.folder, name, options)
        save(path, model, optimizer, options)
        for size, group in groups.items():
            of_optimizer = {
                "zero": True,
                "process_group": group,
                "low_bits": low_bits == (size > 1),
            }
            where = {"process_group": group}
            done = resumed(path, name, ranks.device, options, where, **of_optimizer)
            assert_part_of(*done)
        resumed(path, name, ranks.device, options, {"no_dist": True})
        dist.barrier()


def resume_in_one_process(folder):
    """What a process that has no ranks does with the checkpoints of the case before."""
    assert not dist.is_initialized()
    for name, options in SAVED:
        path = path_of(folder, name, options)
        if path.exists():
            resumed(path, name, "cpu", options, {})


@case
def checkpoints_without_zero_are_resumed_with_it(ranks):
    for options in (FLAT, NESTED):
        model = model_of(0, ranks.device)
        optimizer = optimizer_of(model, "AdamW")
        train(model, optimizer, range(1, 4))
        path = ranks.folder / f"whole-{options is FLAT}"
        save(path, model, optimizer, options)
        resumed(path, "AdamW", ranks.device, options, {}, zero=True)


@case
def checkpoints_of_an_attached_model(ranks):
    """Where torch steps an optimizer that has no state yet, by zeros, to learn what it keeps."""
    models = [ranks.model(), ranks.model()]
    optimizers = []
    for model, options in zip(models, ({"zero": True}, {}), strict=True):
        gk.attach(model, process_group=ranks.group)
        optimizers.append(gk.MasterParams(model.parameters(), optim.AdamW, lr=0.1, **options))
    before = [p.detach().clone() for p in models[0].parameters()]
    state = get_optimizer_state_dict(models[0], optimizers[0], options=FLAT)
    get_optimizer_state_dict(models[1], optimizers[1])
    get_optimizer_state_dict(models[1], optim.SGD(models[1].parameters(), momentum=0.9))
    assert any(key.endswith("exp_avg") for key in state)
    assert any(key.endswith("master") for key in state)
    assert_same(models[0].parameters(), before)
    for x in ranks.batches(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(*(m.parameters() for m in models))


@case
def parts_and_whole_states_are_told_apart(ranks):
    params, others = twins(ranks)
    optimizer = gk.MasterParams(params, optim.AdamW, lr=0.1, zero=True)
    whole = gk.MasterParams(others, optim.AdamW, lr=0.1)
    for step in range(3):
        give(params, step)
        give(others, step)
        optimizer.step()
        whole.step()
    part = copy.deepcopy(optimizer.state_dict())
    parts = [None] * ranks.world_size
    dist.all_gather_object(parts, part)

    def refused(each, state):
        before = [p.detach().clone() for p in params_of(each)]
        try:
            each.load_state_dict(state)
        except ValueError as error:
            assert "one rank's part of a sharded one" in str(error), error
        else:
            raise AssertionError("was loaded")
        assert_same(params_of(each), before)

    refused(whole, part)
    refused(optimizer, parts[ranks.rank - 1])
    for state in (part, copy.deepcopy(whole.state_dict())):  # its own part, or what all know
        resumed_params = parameters(ranks.device)
        with torch.no_grad():
            for param in resumed_params:
                param.zero_()
            for param, value in zip(resumed_params, params, strict=True):
                param.copy_(value if param.dtype == FLOAT32 else 0)
        resumed = gk.MasterParams(resumed_params, optim.AdamW, lr=0.5, zero=True)
        resumed.load_state_dict(state)
        assert_same(resumed_params, params)
        assert_part_of(resumed, whole)
    for copier in (copy.deepcopy, copy.copy):
        try:
            copier(optimizer)
        except TypeError as error:
            assert "cannot be copied or pickled" in str(error), error
        else:
            raise AssertionError("was copied")


@case
def gradients_of_one_rank_are_warned_of(ranks):
    for process_group in (None, ranks.group):
        model = mlp(ranks.device, torch.float32)
        accumulator = gk.attach(model, process_group=process_group)
        optimizer = gk.MasterParams(model.parameters(), optim.SGD, lr=0.1, zero=True)
        for window in range(2):
            model(torch.ones(2, 16, device=ranks.device)).sum().backward()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                optimizer.step()
            optimizer.zero_grad()
            warned = [w for w in said if "of that rank alone" in str(w.message)]
            assert len(warned) == (process_group is None and window == 0)
        accumulator.detach()


@case
def no_bad_argument_is_taken(ranks):
    params = parameters(ranks.device)
    single = dist.new_group([0])
    is_odd = ranks.rank == ranks.world_size - 1
    other = [*params[:-1], parameter(torch.zeros(3 if is_odd else 2), device=ranks.device)]
    transposed = [torch.nn.Parameter(torch.zeros(3, 3, device=ranks.device))]
    if is_odd:
        transposed[0].data = transposed[0].data.t()
    odd_class = optim.SGD if is_odd else optim.AdamW
    bad = [
        (params, optim.SGD, {"zero": 1}, TypeError, "zero must be True or False, got 1"),
        (params, optim.SGD, {"process_group": ranks.group}, ValueError, "pass zero=True too"),
        (params, optim.SGD, {"zero": True, "process_group": 3}, TypeError, "that this rank is in"),
        (
            other,
            optim.SGD,
            {"zero": True},
            ValueError,
            "different parameters or options: parameter",
        ),
        (transposed, optim.SGD, {"zero": True}, ValueError, r"strides (1, 3)"),
        (params, odd_class, {"zero": True}, ValueError, "option optimizer_class = "),
        (params, optim.SGD, {"zero": True, "low_bits": is_odd}, ValueError, "option low_bits = "),
    ]
    if ranks.rank:
        options = {"zero": True, "process_group": single}
        bad.append((params, optim.SGD, options, TypeError, "that this rank is in"))
    for some, optimizer_class, options, kind, match in bad:
        try:
            gk.MasterParams(some, optimizer_class, lr=0.1, **options)
        except kind as error:
            assert match in str(error), error
        else:
            raise AssertionError(f"took {options}")


if __name__ == "__main__":
    main()
