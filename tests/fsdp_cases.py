"""fully_shard with and without attach, side by side on several ranks: cases as in rank_cases.py."""

import copy

import pytest
import torch
import torch.distributed as dist
from rank_cases import case, main
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gradacc_kernels as gk
from gradacc_kernels import fsdp

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
POLICIES = {
    "bf16, reduced in float32": MixedPrecisionPolicy(param_dtype=BFLOAT16, reduce_dtype=FLOAT32),
    "float32": MixedPrecisionPolicy(),
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """An embedding, blocks, one parameter that is used nowhere, and a tied head."""

    def __init__(self, width=10, vocabulary=23, is_tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(ranks, policy, *, dtype=FLOAT32, is_tied=False, mesh=None, reshards=True):
    torch.manual_seed(0)
    model = Model(is_tied=is_tied).to(ranks.device, dtype)
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": reshards}
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def mesh_of(ranks, *shape):
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)


def tokens(ranks, index, rank=None):
    rank = ranks.rank if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * index + rank)
    return torch.randint(23, (2, 5), generator=generator).to(ranks.device)


def backward(model, x, scale=1.0):
    loss = nn.functional.cross_entropy(model(x).float().flatten(0, 1), x.flatten())
    (loss * scale).backward()


def window(ranks, model, count, *, syncs=False, accumulator=None, first=0):
    for index in range(count):
        model.set_requires_gradient_sync(syncs or index == count - 1)
        backward(model, tokens(ranks, first + index))


def grads(model):
    return {name: p.grad.to_local() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, stock):
    ours, theirs = grads(model), grads(stock)
    assert ours.keys() == theirs.keys() and ours
    for name, grad in ours.items():
        assert grad.dtype == FLOAT32
        assert grad.equal(theirs[name]), name


@case
def windows_are_those_of_stock_fsdp2_bit_for_bit(ranks):
    for policy in POLICIES.values():
        for syncs in (False, True):
            for backend in ranks.backends:
                stock, model = build(ranks, policy), build(ranks, policy)
                accumulator = gk.attach(model, backend=backend, fuse=False)
                optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (stock, model)]
                for step in range(2):
                    for each in (stock, model):
                        window(ranks, each, 3, syncs=syncs, first=10 * step)
                    assert_equal(model, stock)
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                assert accumulator.counters["micro_batches"] == 0


@case
def a_whole_gradient_lives_no_longer_than_fsdp2_holds_it(ranks):
    for backend in ranks.backends:
        model = build(ranks, POLICIES["bf16, reduced in float32"])
        accumulator = gk.attach(model, backend=backend, fuse=False)
        shared = fsdp.FullySharded(model)
        wholes = list(shared.whole_of.values())
        window(ranks, model, 1)
        assert all(whole.grad is None for whole in wholes)
        assert accumulator.counters["micro_batches"] == 1
        model.set_requires_gradient_sync(False)
        backward(model, tokens(ranks, 1))
        held = [whole.grad for whole in wholes if whole.grad is not None]
        assert len(held) == len(list(model.parameters())) - 1
        assert all(grad.dtype == FLOAT32 for grad in held)
        places = [grad.data_ptr() for grad in held]
        backward(model, tokens(ranks, 2))
        held = [whole.grad for whole in wholes if whole.grad is not None]
        assert places == [grad.data_ptr() for grad in held], "not in place"
        assert accumulator.counters["micro_batches"] == 3
        assert accumulator.nbytes < 4 * sum(p.numel() for p in model.parameters())


@case
def fused_modules_add_to_whole_gradients(ranks):
    policy = POLICIES["bf16, reduced in float32"]
    for backend in ranks.backends:
        for is_tied in (False, True):
            stock = build(ranks, policy, is_tied=is_tied)
            model = build(ranks, policy, is_tied=is_tied)
            accumulator = gk.attach(model, backend=backend, fuse=True)
            assert "7 Linear" in repr(accumulator), repr(accumulator)
            for each in (stock, model):
                window(ranks, each, 3)
            ours, theirs = grads(model), grads(stock)
            for name, grad in ours.items():
                scale = theirs[name].abs().max() if grad.numel() else 1.0
                assert (grad - theirs[name]).abs().le(2**-7 * scale).all(), name
            assert any(not ours[name].equal(theirs[name]) for name in ours), "nothing is fused"


@case
def sixteen_bit_shards_get_float32_gradients(ranks):
    for backend in ranks.backends:
        torch.manual_seed(0)
        stock = build(ranks, POLICIES["bf16, reduced in float32"])  # of the same bf16 values
        model = build(ranks, MixedPrecisionPolicy(), dtype=BFLOAT16)
        with torch.no_grad():
            for param in stock.parameters():
                local = param.to_local()
                local.copy_(local.to(BFLOAT16))
        accumulator = gk.attach(model, backend=backend, fuse=False)
        for syncs in (False, True):
            for each in (stock, model):
                window(ranks, each, 3, syncs=syncs)
            assert_equal(model, stock)
        accumulator.detach()
        assert all(g.dtype == BFLOAT16 for g in grads(model).values())
        window(ranks, model, 2)
        assert all(g.dtype == BFLOAT16 for g in grads(model).values())


@case
def hybrid_shards(ranks):
    if ranks.world_size < 4:
        return
    policy = POLICIES["bf16, reduced in float32"]
    mesh = mesh_of(ranks, 2, 2)
    stock, model = (build(ranks, policy, mesh=mesh) for _ in range(2))
    accumulator = gk.attach(model, fuse=False)
    for each in (stock, model):
        window(ranks, each, 3)
    assert_equal(model, stock)
    expected = torch.nn.utils.clip_grad_norm_(stock.parameters(), 1e9).full_tensor()
    torch.testing.assert_close(accumulator.grad_norm(), expected)


@case
def norms_and_clips_are_those_of_the_whole_model(ranks):
    policy = POLICIES["bf16, reduced in float32"]
    stock, model = build(ranks, policy), build(ranks, policy)
    accumulator = gk.attach(model, fuse=False)
    for each in (stock, model):
        window(ranks, each, 3)
    expected = torch.nn.utils.get_total_norm(
        [p.grad for p in stock.parameters() if p.grad is not None]
    )
    expected = expected.full_tensor()
    torch.testing.assert_close(accumulator.grad_norm(), expected)
    torch.testing.assert_close(accumulator.grad_norm(from_statistics=True), expected)
    names = accumulator.grad_norms()
    for name, param in stock.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(names[name], param.grad.full_tensor().norm())
    local = torch.stack([g.norm() for g in grads(stock).values()]).norm()
    if ranks.world_size > 1:
        assert (local - expected).abs() > 1e-3 * expected, "one shard alone has that norm"
    ours = accumulator.clip_grad_norm_(0.01)
    theirs = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.01).full_tensor()
    torch.testing.assert_close(ours, theirs)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, grads(stock)[name])
    torch.testing.assert_close(accumulator.grad_norm(), torch.tensor(0.01, device=ranks.device))


@case
def an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    for scales in (False, True):
        model = build(ranks, POLICIES["bf16, reduced in float32"])
        accumulator = gk.attach(model)
        scaler = gk.GradScaler(accumulator, init_scale=4.0) if scales else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        before = [p.to_local().clone() for p in model.parameters()]
        one = torch.ones((), device=ranks.device)
        backward(model, tokens(ranks, 0), scaler.scale(one) if scales else 1.0)
        grad = next(model.blocks[0].down.parameters()).grad.to_local()
        if ranks.rank == 0:
            grad.view(-1)[0] = torch.inf
        assert accumulator.found_inf == 1
        accumulator.step(optimizer, max_norm=1.0, scaler=scaler)
        if scales:
            scaler.update()
        for param, value in zip(model.parameters(), before, strict=True):
            assert param.to_local().equal(value)
        optimizer.zero_grad()
        backward(model, tokens(ranks, 0), scaler.scale(one) if scales else 1.0)
        accumulator.step(optimizer, max_norm=1.0, scaler=scaler)
        assert any(
            not param.to_local().equal(value)
            for param, value in zip(model.parameters(), before, strict=True)
            if value.numel()
        )
        assert accumulator.counters["skipped_windows"] == 1


@case
def weights_are_those_of_all_ranks(ranks):
    policy = POLICIES["float32"]
    for syncs in (False, True):
        model = build(ranks, policy)
        accumulator = gk.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        weights = [
            [1.0 + 3 * rank + index for index in range(3)] for rank in range(ranks.world_size)
        ]
        for index in range(3):
            model.set_requires_gradient_sync(syncs or index == 2)
            with accumulator.micro_batch(weight=weights[ranks.rank][index]):
                backward(model, tokens(ranks, index))
        torch.manual_seed(0)
        whole = Model().to(ranks.device)
        for rank in range(ranks.world_size):
            for index in range(3):
                backward(whole, tokens(ranks, index, rank), weights[rank][index])
        total = sum(map(sum, weights))
        with pytest.raises(RuntimeError, match="divided by its weight"):
            optimizer.step()
        accumulator.average_()
        for (name, param), other in zip(model.named_parameters(), whole.parameters(), strict=True):
            if param.grad is not None:
                torch.testing.assert_close(param.grad.full_tensor(), other.grad / total, msg=name)
        optimizer.step()
        optimizer.zero_grad()


@case
def scale_and_inv_scale_multiply(ranks):
    stock, model = (build(ranks, POLICIES["float32"]) for _ in range(2))
    accumulator = gk.attach(model, scale=0.5)
    accumulator.inv_scale.fill_(0.25)
    for each in (stock, model):
        window(ranks, each, 2)
    for name, grad in grads(model).items():
        assert grad.equal(grads(stock)[name] * 0.125)


@case
def what_waits_is_neither_stepped_nor_measured(ranks):
    model = build(ranks, POLICIES["float32"])
    accumulator = gk.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.set_requires_gradient_sync(False)
    backward(model, tokens(ranks, 0))
    for call in (
        optimizer.step,
        accumulator.grad_norm,
        lambda: accumulator.step(optimizer),
        lambda: accumulator.clip_grad_norm_(1.0),
        accumulator.state_dict,
    ):
        with pytest.raises(RuntimeError, match="set_requires_gradient_sync"):
            call()
    model.set_requires_gradient_sync(True)
    backward(model, tokens(ranks, 1))
    optimizer.step()


@case
def windows_are_saved_and_resumed(ranks):
    policy = POLICIES["bf16, reduced in float32"]
    stock, model, other = (build(ranks, policy) for _ in range(3))
    accumulator = gk.attach(model, fuse=False)
    window(ranks, stock, 4, syncs=True)
    window(ranks, model, 2, syncs=True)
    state = copy.deepcopy(accumulator.state_dict())
    resumed = gk.attach(other, fuse=False)
    resumed.load_state_dict(state)
    assert resumed.counters["micro_batches"] == 2
    window(ranks, other, 2, syncs=True, first=2)
    assert resumed.counters["micro_batches"] == 4
    assert_equal(other, stock)


@case
def detach_leaves_stock_fsdp2(ranks):
    for policy in POLICIES.values():
        stock, model = build(ranks, policy), build(ranks, policy)
        accumulator = gk.attach(model, fuse=True)
        window(ranks, model, 2)
        model.zero_grad()
        accumulator.detach()
        for each in (stock, model):
            window(ranks, each, 3)
        assert_equal(model, stock)
        again = gk.attach(model, fuse=False)
        model.zero_grad()
        stock.zero_grad()
        for each in (stock, model):
            window(ranks, each, 3)
        assert_equal(model, stock)
        again.detach()


@case
def detach_in_a_window_loses_nothing(ranks):
    policy = POLICIES["bf16, reduced in float32"]
    stock, model = build(ranks, policy), build(ranks, policy)
    accumulator = gk.attach(model, fuse=False)
    for each in (stock, model):
        each.set_requires_gradient_sync(False)
        backward(each, tokens(ranks, 0))
    accumulator.detach()
    for each in (stock, model):
        each.set_requires_gradient_sync(True)
        backward(each, tokens(ranks, 1))
    assert_equal(model, stock)
    for each in (stock, model):  # and attached in the middle of one
        each.zero_grad()
        each.set_requires_gradient_sync(False)
        backward(each, tokens(ranks, 0))
    accumulator = gk.attach(model, fuse=False)
    for each in (stock, model):
        each.set_requires_gradient_sync(True)
        backward(each, tokens(ranks, 1))
    assert_equal(model, stock)


@case
def gradients_that_were_there_at_attach_are_kept(ranks):
    policy = POLICIES["bf16, reduced in float32"]
    stock, model = build(ranks, policy), build(ranks, policy)
    for each in (stock, model):
        backward(each, tokens(ranks, 0))
    accumulator = gk.attach(model, fuse=False)
    for each in (stock, model):
        backward(each, tokens(ranks, 1))
    assert_equal(model, stock)
    accumulator.detach()


@case
def checkpointed_activations(ranks):
    policy = POLICIES["bf16, reduced in float32"]

    def checkpointed(model, is_reentrant):
        for block in model.blocks:
            forward = block.forward
            block.forward = lambda x, f=forward: torch.utils.checkpoint.checkpoint(
                f, x, use_reentrant=is_reentrant
            )
        return model

    for is_reentrant in (False, True):
        stock, model = build(ranks, policy), build(ranks, policy)
        gk.attach(model, fuse=False)
        for each in (stock, model):
            window(ranks, checkpointed(each, is_reentrant), 2)
        assert_equal(model, stock)


@case
def parameters_that_stay_whole(ranks):
    policy = POLICIES["bf16, reduced in float32"]
    stock, model = (build(ranks, policy, reshards=False) for _ in range(2))
    gk.attach(model, fuse=False)
    for each in (stock, model):
        each.set_reshard_after_backward(False)
        window(ranks, each, 3)
        each.unshard()
        window(ranks, each, 1, first=3)
        each.reshard()
    assert_equal(model, stock)


@case
def a_policy_that_reduces_in_16_bits_keeps_its_wire_and_sums_in_float32(ranks):
    policy = MixedPrecisionPolicy(param_dtype=BFLOAT16, reduce_dtype=torch.float16)
    model = build(ranks, policy)
    gk.attach(model, fuse=False)
    exact = build(ranks, POLICIES["bf16, reduced in float32"])
    rounded = build(ranks, policy)
    for each in (model, exact, rounded):
        window(ranks, each, 16)
    errors = {"ours": 0.0, "stock": 0.0}
    for name, grad in grads(exact).items():
        if grad.numel():
            errors["ours"] += (grads(model)[name] - grad).norm().item()
            errors["stock"] += (grads(rounded)[name] - grad).norm().item()
    assert 0 < errors["ours"] < errors["stock"], errors


@case
def optimizers_step_and_masters(ranks):
    for make in (
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: gk.MasterParams(params, torch.optim.AdamW, lr=1e-2, fused=True),
    ):
        model = build(ranks, MixedPrecisionPolicy(), dtype=BFLOAT16)
        accumulator = gk.attach(model)
        optimizer = make(model.parameters())
        losses = []
        for _ in range(3):
            x = tokens(ranks, 0)
            with torch.no_grad():
                loss = nn.functional.cross_entropy(model(x).float().flatten(0, 1), x.flatten())
                losses.append(loss)
            window(ranks, model, 2)
            accumulator.step(optimizer, max_norm=1.0)
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        for param, entry in optimizer.state.items():
            if "master" in entry:
                master = entry["master"].data.to_local()
                error = (master - param.to_local()).abs()
                assert master.dtype == FLOAT32 and error.le(2**-8 * master.abs()).all()
                assert error.count_nonzero() > 0 or not error.numel()


@case
def no_bad_argument_changes_anything(ranks):
    model = build(ranks, POLICIES["float32"])
    for options, words in (
        ({"process_group": dist.group.WORLD}, "leave process_group out"),
        ({"nonfinite": "skip_micro_batch"}, "skip_window"),
        ({"nonfinite": "raise"}, "skip_window"),
    ):
        with pytest.raises(ValueError, match=words):
            gk.attach(model, **options)
    stock = build(ranks, POLICIES["float32"])
    for each in (stock, model):
        window(ranks, each, 2)
    assert_equal(model, stock)


@case
def parameters_without_the_module_that_shards_them_are_refused(ranks):
    model = build(ranks, POLICIES["float32"])
    up = model.blocks[0].up
    for target in (list(model.parameters()), up, up.weight):
        with pytest.raises(ValueError, match="sharded by fully_shard, which was called on a FSDP"):
            gk.attach(target)


@case
def a_part_of_the_model(ranks):
    stock, model = (build(ranks, POLICIES["float32"]) for _ in range(2))
    accumulator = gk.attach(model.blocks, fuse=False)
    for each in (stock, model):
        window(ranks, each, 3)
    assert_equal(model, stock)
    assert accumulator.micro_batches == 3
    together = [nn.Linear(4, 4).to(ranks.device) for _ in range(2)]
    fully_shard(together)  # one group of two modules
    for module in together:
        gk.attach(module).detach()


@case
def what_cannot_be_summed_or_followed_is_refused(ranks):
    with pytest.raises(TypeError, match="float64, which fully_shard sums itself"):
        gk.attach(build(ranks, POLICIES["float32"], dtype=torch.float64))
    with torch.device("meta"):
        unmade = fully_shard(Model(), mesh=mesh_of(ranks, ranks.world_size))
    with pytest.raises(ValueError, match="materialise them first"):
        gk.attach(unmade)
    for change in (
        lambda model: model.to(BFLOAT16),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    ):
        model = build(ranks, POLICIES["float32"])
        accumulator = gk.attach(model)
        with pytest.raises(RuntimeError, match="Couldn't swap|detach and attach again"):
            change(model)
            backward(model, tokens(ranks, 0))
        accumulator.detach()


@case
def another_torch_is_refused(ranks):
    model = build(ranks, POLICIES["float32"])
    before, fsdp.PRIVATE["parameter"] = fsdp.PRIVATE["parameter"], ("no_such_attribute",)
    try:
        with pytest.raises(RuntimeError, match="known to work"):
            gk.attach(model)
    finally:
        fsdp.PRIVATE["parameter"] = before
    with gk.attach(model):
        window(ranks, model, 1)


if __name__ == "__main__":
    main()
