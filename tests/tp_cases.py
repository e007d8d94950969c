"""What several ranks do with DTensor parameters: cases, run as rank_cases.py describes."""

import contextlib
import copy
import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from hook_cases import backward
from rank_cases import case, main
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradacc_kernels as gk
from gradacc_kernels import hook

WIDTH, HEADS, TOKENS, WORDS = 16, 4, 8, 24


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A block with sequence-sharded norms, and a head that stays a plain module."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.out = nn.Linear(WIDTH, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, words):
        x = self.embedding(words)
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.out(self.norms[2](x)))


def whole(dtype):
    torch.manual_seed(0)
    return Transformer().to(dtype)


def parallel(ranks, dtype=torch.bfloat16, mesh=None):
    mesh = mesh_of(ranks) if mesh is None else mesh
    gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norms.*": SequenceParallel(),
        "attention": gather,
        "attention.[qkv]": ColwiseParallel(),
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "mlp": gather,
        "mlp.0": ColwiseParallel(),
        "mlp.2": RowwiseParallel(output_layouts=Shard(1)),
        "out": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(whole(dtype).to(ranks.device), mesh, plan)


def mesh_of(ranks):
    return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("tp",))


def batches(ranks, count, seed=0):
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS, (count, 2, TOKENS), generator=generator).to(ranks.device)


def on_mesh(values, like):
    return DTensor.from_local(
        values,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def exactly(tensor, function=lambda values: values):
    """A function of the whole tensor, in float64; of the ranks' parts of one that is Partial."""
    if not isinstance(tensor, DTensor):
        return function(tensor.double())
    return on_mesh(function(tensor.to_local().double()), tensor).full_tensor()


def exact_sums(ranks, model, inputs, weights=None):
    """What a window sums, of whole parameters, by stock autograd and in float64."""
    params = list(model.parameters())
    sums = [oracle.WindowSum(torch.zeros(p.shape)) for p in params]
    for index, x in enumerate(inputs):
        weight = 1.0 if weights is None else weights[index]
        loss = model(x).float().square().sum()
        for total, grad in zip(sums, torch.autograd.grad(loss, params), strict=True):
            total.total = total.total + exactly(grad).cpu() * weight
            total.magnitude = total.magnitude + exactly(grad, torch.abs).cpu() * abs(weight)
            total.k += 1 + ranks.world_size  # with the additions of a Partial
    return sums


def assert_summed(params, sums):
    for param, total in zip(params, sums, strict=True):
        assert type(param.grad) is type(param.data)
        assert param.grad.dtype == torch.float32 and param.grad.shape == param.shape
        if isinstance(param, DTensor):
            assert param.grad.placements == param.placements
            assert param.grad.device_mesh == param.device_mesh
        assert total.contains(full(param.grad))


def norm_of(params):
    squares = [exactly(p.grad).square().sum() for p in params if p.grad is not None]
    return torch.stack(squares).sum().sqrt()


def assert_norm(value, params, roundings=64):
    expected = norm_of(params).item()
    assert abs(float(value) - expected) <= oracle.bound(roundings, expected), (value, expected)


@case
def windows_are_exact(ranks):
    for backend, dtype in itertools.product(ranks.backends, (torch.bfloat16, torch.float32)):
        model = parallel(ranks, dtype)
        inputs = batches(ranks, 3)
        sums = exact_sums(ranks, model, inputs)
        accumulator = gk.attach(model, backend=backend)
        kinds = [group.is_native for group in accumulator._attachment.groups]
        assert kinds == [False, backend in ("cpu", "cuda")]  # the head has the hook it always had
        for _ in range(2):
            model.zero_grad()
            for x in inputs:
                backward(model, x)
            assert_summed(model.parameters(), sums)
        assert accumulator.micro_batches == 3
        assert_norm(accumulator.grad_norm(), model.parameters())
        assert_norm(accumulator.grad_norm(from_statistics=True), model.parameters())
        for name, norm in accumulator.grad_norms().items():
            assert_norm(norm, [model.get_parameter(name)])
        assert accumulator.found_inf == 0
        accumulator.detach()


def single(ranks):
    """The model on one rank and in float64, which no DTensor is in."""
    return whole(torch.float32).double().to(ranks.device)


def window(model, inputs, accumulator=None, weights=None):
    for index, x in enumerate(inputs):
        context = contextlib.nullcontext()
        if weights is not None:
            context = accumulator.micro_batch(weights[index])
        with context:
            backward(model, x)


def close(actual, expected):
    torch.testing.assert_close(full(actual).double(), expected.double(), rtol=1e-4, atol=1e-5)


@case
def norms_and_clips_are_those_of_one_process(ranks):
    for backend in ranks.backends:
        model, expected = parallel(ranks, torch.float32), single(ranks)
        accumulator = gk.attach(model, backend=backend)
        inputs = batches(ranks, 3)
        for each in (model, expected):
            window(each, inputs)
        grads = {name: param.grad for name, param in expected.named_parameters()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        alone = torch.stack([local(p.grad).norm() for p in model.parameters()]).norm()
        if ranks.world_size > 1:
            assert (alone - norm).abs() > 1e-2 * norm, "the shards of one rank have that norm"
        for from_statistics in (False, True):
            close(accumulator.grad_norm(from_statistics=from_statistics), norm)
            for name, value in accumulator.grad_norms(from_statistics=from_statistics).items():
                close(value, grads[name].norm())
        some = [param for name, param in model.named_parameters() if "attention" in name]
        close(
            accumulator.grad_norm(some),
            torch.stack([grad.norm() for n, grad in grads.items() if "attention" in n]).norm(),
        )
        close(accumulator.clip_grad_norm_(2 * norm.item()), norm)
        for name, param in model.named_parameters():
            close(param.grad, grads[name])
        close(accumulator.clip_grad_norm_(norm.item() / 8), norm)
        for name, param in model.named_parameters():
            close(param.grad, grads[name] / 8)
        close(accumulator.grad_norm(from_statistics=True), norm / 8)
        for param in model.parameters():  # as torch's clipping, which no counter tells of
            local(param.grad).mul_(2)
        close(accumulator.clip_grad_norm_(1e9), norm / 4)
        accumulator.detach()


@case
def weighted_windows_are_those_of_one_process(ranks):
    weights = [3.0, 0.0, 1.5]
    for backend in ranks.backends:
        model, expected = parallel(ranks, torch.float32), single(ranks)
        accumulator = gk.attach(model, backend=backend)
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=1e-4, foreach=False) for m in (model, expected)
        ]
        for step in range(2):
            inputs = batches(ranks, 3, seed=step)
            window(model, inputs, accumulator, weights)
            for weight, x in zip(weights, inputs, strict=True):
                (expected(x).square().sum() * (weight / sum(weights))).backward()
            norm = torch.stack([p.grad.norm() for p in expected.parameters()]).norm()
            close(accumulator.grad_norm(), norm)
            with pytest.raises(RuntimeError, match="divided by its weight"):
                optimizers[0].step()
            close(accumulator.step(optimizers[0], max_norm=norm.item() / 2), norm)
            for param, other in zip(model.parameters(), expected.parameters(), strict=True):
                close(param.grad, other.grad / 2)
                other.grad /= 2
            optimizers[1].step()
            for param, other in zip(model.parameters(), expected.parameters(), strict=True):
                close(param, other)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=step == 0)
        accumulator.detach()


def groups_of(model):
    """DTensors and plain tensors, which foreach and fused kernels cannot take together."""
    kinds = [[], []]
    for param in model.parameters():
        kinds[isinstance(param, DTensor)].append(param)
    return [{"params": params} for params in kinds]


def optimizers_of(model, foreach):
    """One a group, as zero_grad() has one list for all groups."""
    return [torch.optim.SGD([group], lr=1e-3, foreach=foreach) for group in groups_of(model)]


@case
def gradients_that_are_zeroed_in_place(ranks):
    inputs = batches(ranks, 4)
    for backend, foreach in itertools.product(ranks.backends, (False, True)):
        model, other = parallel(ranks), parallel(ranks)
        for each in (model, other):
            accumulator = gk.attach(each, backend=backend)
            optimizers = optimizers_of(each, foreach)
            for first in (0, 2):
                window(each, inputs[first : first + 2])
                accumulator.clip_grad_norm_(1.0)
                places = [local(p.grad).data_ptr() for p in each.parameters()]
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=each is model)
        assert [local(p.grad).data_ptr() for p in other.parameters()] == places
        assert all(local(p.grad).count_nonzero() == 0 for p in other.parameters())
        assert accumulator.grad_norm() == 0 and accumulator.found_inf == 0
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            assert local(param).equal(local(twin))


@case
def weighted_windows_over_gradients_that_are_zeroed_in_place(ranks):
    inputs = batches(ranks, 2)
    for backend, foreach in itertools.product(ranks.backends, (False, True)):
        model = parallel(ranks, torch.float32)
        accumulator = gk.attach(model, backend=backend)
        optimizers = optimizers_of(model, foreach)
        window(model, inputs, accumulator, [1.0, 2.0])
        accumulator.average_()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if foreach:  # torch counts no such write to a DTensor
            with pytest.raises(RuntimeError, match="still has the gradient of the last window"):
                window(model, inputs, accumulator, [1.0, 2.0])
            model.zero_grad()
        expected = single(ranks)
        for param, other in zip(model.parameters(), expected.parameters(), strict=True):
            other.data.copy_(full(param.detach()))
        window(model, inputs, accumulator, [1.0, 2.0])
        accumulator.average_()
        for weight, x in zip((1.0, 2.0), inputs, strict=True):
            (expected(x).square().sum() * weight / 3).backward()
        for param, other in zip(model.parameters(), expected.parameters(), strict=True):
            close(param.grad, other.grad)
        accumulator.detach()


@case
def an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    x = batches(ranks, 1)[0]
    for backend, scales in itertools.product(ranks.backends, (False, True)):
        model = parallel(ranks, torch.float32)
        accumulator = gk.attach(model, backend=backend)
        scaler = gk.GradScaler(accumulator, init_scale=4.0) if scales else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        before = [local(p).clone() for p in model.parameters()]
        for step in range(2):
            loss = model(x).square().sum()
            (scaler.scale(loss) if scales else loss).backward()
            if step == 0 and ranks.rank == ranks.world_size - 1:
                local(model.attention.q.weight.grad)[0, 0] = torch.nan
            assert accumulator.found_inf == (step == 0)
            bad = [n for n, norm in accumulator.grad_norms().items() if norm.isnan()]
            assert bad == (["attention.q.weight"] if step == 0 else [])
            accumulator.step(optimizer, max_norm=1.0, scaler=scaler)
            if scales:
                scaler.update()
                assert scaler.get_scale() == 2
            optimizer.zero_grad()
            after = [local(p) for p in model.parameters()]
            is_kept = all(map(torch.equal, after, before))
            assert is_kept == (step == 0)
        assert accumulator.counters["skipped_windows"] == 1
        accumulator.detach()


def overflow_on_one_rank(ranks, param, of):
    """Has the gradients with these numbers be infinite in one element of the last rank's shard."""
    count = itertools.count()

    def poison(grad):
        if next(count) in of and ranks.rank == ranks.world_size - 1:
            values = grad.to_local().clone()
            values.view(-1)[0] = torch.inf
            return on_mesh(values, grad)
        return grad

    return param.register_hook(poison)


@case
def a_micro_batch_that_overflows_on_one_rank_is_dropped_on_all(ranks):
    inputs = batches(ranks, 3)
    for backend, weights in itertools.product(ranks.backends, (None, [3.0, 1.0, 2.0])):
        model, other = parallel(ranks), parallel(ranks)
        accumulator = gk.attach(model, backend=backend, nonfinite="skip_micro_batch")
        overflow_on_one_rank(ranks, model.mlp[0].weight, {1})
        window(model, inputs, accumulator, weights)
        stock = gk.attach(other, backend=backend)
        kept = None if weights is None else [weights[0], weights[2]]
        window(other, [inputs[0], inputs[2]], stock, kept)
        assert accumulator.counters["skipped_micro_batches"] == 1
        for each in (accumulator, stock):
            each.average_()
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            assert local(param.grad).equal(local(twin.grad))


@case
def an_overflow_on_one_rank_is_raised_on_all(ranks):
    for backend in ranks.backends:
        model = parallel(ranks)
        accumulator = gk.attach(model, backend=backend, nonfinite="raise")
        overflow_on_one_rank(ranks, model.mlp[0].weight, {1})
        window(model, batches(ranks, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        with pytest.raises(FloatingPointError, match="micro-batch 2 of 3 .* mlp.0.weight$"):
            accumulator.step(optimizer)


@case
def partial_gradients_are_summed(ranks):
    mesh = mesh_of(ranks)
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (5, 3)
    for backend, dtype, placement in itertools.product(
        ranks.backends, (torch.bfloat16, torch.float32), (Replicate(), Shard(0), Shard(1))
    ):
        values = torch.randn(2, 2, *shape, generator=generator).to(ranks.device, dtype)
        param = nn.Parameter(
            distribute_tensor(torch.zeros(shape, dtype=dtype).to(ranks.device), mesh, [placement])
        )
        # One that is there at attach, as stock autograd leaves it, and one that is assigned.
        partial = [
            [DTensor.from_local(v, mesh, [Partial()], run_check=False) for v in part]
            for part in values
        ]
        total = oracle.WindowSum(torch.zeros(shape))
        param.grad = partial[0][0]
        accumulator = gk.attach([param], backend=backend)
        for part, grads in zip(values, partial, strict=True):
            param.grad = grads[0]
            arrive_as_it_is(param, grads[1])
            total.total = sum_over(part).cpu().sum(0)
            total.magnitude = sum_over(part.abs()).cpu().sum(0)
            total.k = 2 * ranks.world_size + 1
            assert param.grad.placements == (placement,)
            assert param.grad.dtype == torch.float32
            assert total.contains(param.grad.full_tensor())
            assert_norm(accumulator.grad_norm(), [param])
            param.grad = grads[0]
            expected = sum_over(part)[0]
            close(accumulator.grad_norm(), expected.norm())
            if dtype == torch.float32:  # what is in `.grad` is scaled in its own dtype
                accumulator.clip_grad_norm_(expected.norm().item() / 2)
                close(param.grad, expected / 2)
            param.grad = None
        accumulator.detach()


@case
def a_main_gradient_that_is_wrapped_as_partial_is_summed(ranks):
    mesh = mesh_of(ranks)
    for backend in ranks.backends:
        param = nn.Parameter(
            distribute_tensor(torch.zeros(3).to(ranks.device), mesh, [Replicate()])
        )
        accumulator = gk.attach([param], backend=backend)
        one = distribute_tensor(torch.ones(3).to(ranks.device), mesh, [Replicate()])
        arrive_as_it_is(param, one)
        param.grad = DTensor.from_local(param.grad.to_local(), mesh, [Partial()], run_check=False)
        arrive_as_it_is(param, one)
        assert (param.grad.to_local() == ranks.world_size + 1).all()
        accumulator.detach()


@case
def a_gradient_that_is_partial_over_one_dimension_of_a_mesh(ranks):
    if ranks.world_size == 1:
        return
    shape = (2, ranks.world_size // 2)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("dp", "tp"))
    of_param, of_grad = (Replicate(), Shard(0)), (Partial(), Shard(0))
    values = torch.arange(8.0).view(4, 2).to(ranks.device)
    part = values.chunk(shape[1])[mesh.get_local_rank("tp")] * (1 + mesh.get_local_rank("dp"))
    for backend in ranks.backends:
        param = nn.Parameter(distribute_tensor(torch.zeros_like(values), mesh, of_param))
        accumulator = gk.attach([param], backend=backend)
        for _ in range(2):
            arrive_as_it_is(param, DTensor.from_local(part, mesh, of_grad, run_check=False))
        assert param.grad.placements == of_param
        assert param.grad.full_tensor().equal(6 * values)
        close(accumulator.grad_norm(), 6 * values.norm())
        accumulator.detach()


def sum_over(values):
    values = values.double()
    torch.distributed.all_reduce(values)
    return values


def arrive_as_it_is(param, grad):
    """Lets autograd deliver a DTensor of any placements."""

    class Deliver(torch.autograd.Function):
        @staticmethod
        def forward(ctx, param):
            return torch.zeros((), device=param.device, requires_grad=True)

        @staticmethod
        def backward(ctx, _):
            return grad

    Deliver.apply(param).backward()


@case
def a_whole_tensor_that_is_assigned_is_that_of_all_shards(ranks):
    mesh = mesh_of(ranks)
    values = torch.arange(21.0).view(7, 3).to(ranks.device)
    for backend, placement in itertools.product(ranks.backends, (Replicate(), Shard(0), Shard(1))):
        param = nn.Parameter(distribute_tensor(torch.zeros_like(values), mesh, [placement]))
        accumulator = gk.attach([param], backend=backend)
        param.grad = values.clone()
        close(accumulator.grad_norm(), values.norm())
        arrive_as_it_is(param, distribute_tensor(torch.ones_like(values), mesh, [placement]))
        assert param.grad.full_tensor().equal(values + 1)
        accumulator.detach()


@case
def parameters_that_are_partial_are_refused(ranks):
    param = DTensor.from_local(torch.zeros(3, device=ranks.device), mesh_of(ranks), [Partial()])
    with pytest.raises(TypeError, match="redistribute it to Shard or Replicate"):
        gk.attach([param.requires_grad_()])


@case
def uneven_and_empty_shards(ranks):
    mesh = mesh_of(ranks)
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 3)).to(ranks.device)
    column = ColwiseParallel(output_layouts=Replicate())
    plans = (
        {"0": column, "2": RowwiseParallel(input_layouts=Replicate())},
        {"2": column},  # three rows, of which a fourth rank has none
    )
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(ranks.device)
    double = copy.deepcopy(stock).double()
    (double(x.double()).square().sum() * 2).backward()
    norm = torch.stack([p.grad.norm() for p in double.parameters()]).norm()
    for backend, chosen in itertools.product(ranks.backends, plans):
        model = parallelize_module(copy.deepcopy(stock), mesh, chosen)
        accumulator = gk.attach(model, backend=backend)
        for _ in range(2):
            model(x).square().sum().backward()
        for param, other in zip(model.parameters(), double.parameters(), strict=True):
            close(param.grad, other.grad)
        close(accumulator.grad_norm(), norm)
        state = accumulator.state_dict()
        accumulator.load_state_dict(state)
        close(accumulator.clip_grad_norm_(norm.item() / 2), norm)
        close(accumulator.grad_norm(), norm / 2)
        accumulator.step(torch.optim.SGD(model.parameters(), lr=0.1, foreach=False))
        accumulator.detach()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.embedding(words))


@case
def tied_weights(ranks):
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    inputs = batches(ranks, 2)
    for backend in ranks.backends:
        torch.manual_seed(0)
        double = Tied().double().to(ranks.device)
        torch.manual_seed(0)
        model = parallelize_module(Tied().to(ranks.device), mesh_of(ranks), plan)
        model.head.weight = model.embedding.weight
        accumulator = gk.attach(model, backend=backend)
        for each in (model, double):
            window(each, inputs)
        close(model.head.weight.grad, double.head.weight.grad)
        close(accumulator.grad_norm(), double.head.weight.grad.norm())
        accumulator.detach()


@case
def gradients_that_wait_for_a_common_launch(ranks):
    before, hook.QUEUE_BELOW = hook.QUEUE_BELOW, {"cpu": 1 << 40, "cuda": 1 << 40}
    try:
        for backend in ranks.backends:
            model = parallel(ranks)
            inputs = batches(ranks, 2)
            sums = exact_sums(ranks, model, inputs)
            with gk.attach(model, backend=backend):
                window(model, inputs)
                assert_summed(model.parameters(), sums)
    finally:
        hook.QUEUE_BELOW = before


@case
def checkpointed_activations(ranks):
    inputs = batches(ranks, 2)
    for backend, is_reentrant in itertools.product(ranks.backends, (False, True)):
        model, other = parallel(ranks), parallel(ranks)
        for name in ("attention", "mlp"):
            forward = getattr(model, name).forward
            getattr(model, name).forward = lambda x, f=forward, r=is_reentrant: (
                torch.utils.checkpoint.checkpoint(f, x, use_reentrant=r)
            )
        for each in (model, other):
            gk.attach(each, backend=backend)
            window(each, inputs)
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            assert local(param.grad).equal(local(twin.grad))


@case
def autocast(ranks):
    for backend in ranks.backends:
        model, other = (parallel(ranks, torch.float32) for _ in range(2))
        gk.attach(model, backend=backend, fuse=False)
        for x, each in itertools.product(batches(ranks, 2), (model, other)):
            with torch.autocast(ranks.device.type, torch.bfloat16):
                loss = each(x).float().square().sum()
            loss.backward()
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            close(param.grad, full(twin.grad))


@case
def fused_modules_beside_parallel_ones(ranks):
    for backend in ranks.backends:
        model = parallel(ranks)
        inputs = batches(ranks, 2)
        sums = exact_sums(ranks, model, inputs)
        accumulator = gk.attach(model, backend=backend, fuse=True)
        assert repr(accumulator).endswith("fused: 1 Linear"), repr(accumulator)
        window(model, inputs)
        parallel_ones = [p for p in model.parameters() if isinstance(p, DTensor)]
        is_parallel = [isinstance(p, DTensor) for p in model.parameters()]
        assert_summed(parallel_ones, list(itertools.compress(sums, is_parallel)))
        for param, total in zip(model.parameters(), sums, strict=True):
            scale = total.magnitude.max()
            assert (full(param.grad).cpu() - total.total).abs().le(2**-7 * scale).all()
        accumulator.detach()


@case
def modules_that_are_made_parallel_after_attach_are_refused(ranks):
    if ranks.world_size == 1:
        return  # its shards are whole
    model = whole(torch.bfloat16).to(ranks.device)
    accumulator = gk.attach(model)
    parallelize_module(model, mesh_of(ranks), {"mlp.0": ColwiseParallel()})
    with pytest.raises(RuntimeError, match="detach and attach again"):
        model(batches(ranks, 1)[0])
    accumulator.detach()


@case
def a_saved_window_goes_on_bit_for_bit(ranks):
    inputs = batches(ranks, 4)
    for backend, weights in itertools.product(ranks.backends, (None, [1.0, 2.0, 3.0, 4.0])):
        model, other = parallel(ranks), parallel(ranks)
        accumulator, resumed = (gk.attach(m, backend=backend) for m in (model, other))
        halves = (slice(0, 2), slice(2, 4))
        first, last = (weights if weights is None else weights[half] for half in halves)
        window(model, inputs[:2], accumulator, first)
        path = ranks.folder / f"tp_state_{ranks.rank}"
        torch.save(accumulator.state_dict(), path)
        state = torch.load(path)
        assert state["main_grad.mlp.0.weight"].shape == (32 // ranks.world_size, WIDTH)
        resumed.load_state_dict(state)
        assert resumed.micro_batches == 2
        for each, handle in ((model, accumulator), (other, resumed)):
            window(each, inputs[2:], handle, last)
            handle.average_()
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            assert type(twin.grad) is type(param.grad)
            assert local(param.grad).equal(local(twin.grad))
        before = [local(p.grad).clone() for p in other.parameters()]
        state["main_grad.mlp.0.weight"] = torch.zeros(64, WIDTH)
        with pytest.raises(ValueError, match="mlp.0.weight must be"):
            resumed.load_state_dict(state)
        assert all(local(p.grad).equal(b) for p, b in zip(other.parameters(), before, strict=True))


@case
def data_parallel_beside_tensor_parallel(ranks):
    """Half of the ranks have the one batch, half of them the other one."""
    if ranks.world_size == 1:
        return
    shape = (2, ranks.world_size // 2)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("dp", "tp"))
    replica = mesh.get_local_rank("dp")
    weights = [[3.0, 1.0], [2.0, 5.0]]
    whole_weight = sum(map(sum, weights))
    for backend, bucket_bytes in itertools.product(ranks.backends, (1, 1 << 20)):
        model, expected = parallel(ranks, torch.float32, mesh["tp"]), single(ranks)
        if shape[1] > 1:
            with pytest.raises(ValueError, match="holds another shard of embedding.weight"):
                gk.attach(model, process_group=ranks.group)
        accumulator = gk.attach(
            model,
            backend=backend,
            process_group=mesh.get_group("dp"),
            bucket_bytes=bucket_bytes,
            steps=2,
        )
        for index in range(2):
            for part in range(2):
                x = batches(ranks, 2, seed=part)[index]
                (expected(x).square().sum() * weights[part][index] / whole_weight).backward()
        window(model, batches(ranks, 2, seed=replica), accumulator, weights[replica])
        assert accumulator.weight == whole_weight
        norm = torch.stack([p.grad.norm() for p in expected.parameters()]).norm()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, foreach=False)
        close(accumulator.step(optimizer, max_norm=norm.item() / 2), norm)
        for param, other in zip(model.parameters(), expected.parameters(), strict=True):
            close(param.grad, other.grad / 2)
            close(param, other - 1e-4 * other.grad / 2)
        model.zero_grad()
        before = [local(p).clone() for p in model.parameters()]
        window(model, batches(ranks, 1, seed=replica))
        accumulator.reduce()
        if ranks.rank == ranks.world_size - 1:
            local(model.out.weight.grad)[0, 0] = torch.inf
        # Of all ranks that this one's shards belong together with.
        assert accumulator.found_inf == (replica == 1)
        accumulator.detach()
        assert all(map(torch.equal, map(local, model.parameters()), before))


def rounded(master, dtype):
    """To bfloat16 with ties away from zero, to float16 with ties to even."""
    if dtype == torch.float16:
        return master.half()
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(dtype)


@case
def masters_of_parallel_parameters(ranks):
    for dtype, fused in itertools.product((torch.bfloat16, torch.float16), (False, True)):
        model, other = parallel(ranks, dtype), parallel(ranks, torch.float32)
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            local(twin.data).copy_(local(param.data))  # the masters, by hand
        accumulator = gk.attach(model)
        options = {"lr": 1e-2, "fused": fused}
        optimizer = gk.MasterParams(groups_of(model), torch.optim.AdamW, **options)
        by_hand = torch.optim.AdamW(groups_of(other), **options)
        for step, x in enumerate(batches(ranks, 3)):
            backward(model, x)
            accumulator.clip_grad_norm_(1.0)
            for param, twin in zip(model.parameters(), other.parameters(), strict=True):
                twin.grad = param.grad
            versions = [param._version for param in model.parameters()]
            for each in (optimizer, by_hand):
                each.step()
                each.zero_grad()
            for param, twin in zip(model.parameters(), other.parameters(), strict=True):
                assert local(param.data).equal(rounded(local(twin.data), dtype))
                assert local(optimizer.state[param]["master"].data).equal(local(twin.data))
            assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
            if step == 1:
                state = optimizer.state_dict()
                optimizer = gk.MasterParams(groups_of(model), torch.optim.AdamW, **options)
                optimizer.load_state_dict(copy.deepcopy(state))
        param = model.mlp[0].weight
        local(param.data).zero_()
        optimizer.refresh_masters()
        assert full(optimizer.state[param]["master"].data).count_nonzero() == 0
        accumulator.detach()


@case
def masters_of_dtensors_in_low_bits_or_shared_out_are_refused(ranks):
    for options in ({"low_bits": True}, {"zero": True}):
        with pytest.raises(TypeError, match="is a DTensor, which .* does not take"):
            gk.MasterParams(parallel(ranks).parameters(), torch.optim.AdamW, **options)


@case
def optimizers_that_cannot_step_16_bits_are_refused(ranks):
    model = parallel(ranks)
    gk.attach(model)
    window(model, batches(ranks, 1))
    with pytest.raises(TypeError, match="MasterParams"):
        torch.optim.AdamW(model.parameters()).step()


@case
def detach_leaves_what_stock_autograd_adds_to(ranks):
    inputs = batches(ranks, 2)
    for backend in ranks.backends:
        model, other = parallel(ranks), parallel(ranks)
        with gk.attach(model, backend=backend):
            window(model, inputs[:1])
        window(other, inputs[:1])
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            assert type(param.grad) is type(param.data)
            assert param.grad.dtype == torch.bfloat16
            torch.testing.assert_close(full(param.grad), full(twin.grad), rtol=2**-6, atol=2**-6)
        for each in (model, other):
            each.zero_grad()
            window(each, inputs)
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            assert full(param.grad).equal(full(twin.grad))


@case
def a_graph_of_the_gradient_is_kept(ranks):
    x = batches(ranks, 1)[0]
    for backend in ranks.backends:
        model, other = (parallel(ranks, torch.float32) for _ in range(2))
        accumulator = gk.attach(model, backend=backend, scale=0.5)
        accumulator.inv_scale.fill_(0.25)
        for each in (model, other):
            each(x).square().sum().backward(create_graph=True)
        for param, twin in zip(model.parameters(), other.parameters(), strict=True):
            assert param.grad.requires_grad
            close(param.grad.detach(), full(twin.grad.detach()) / 8)
        model.zero_grad()
        accumulator.detach()


@case
def a_cast_of_an_attached_model_is_refused(ranks):
    model = parallel(ranks, torch.float32)
    with gk.attach(model):
        with pytest.raises(RuntimeError, match="Couldn't swap"):
            model.to(torch.bfloat16)
        window(model, batches(ranks, 1))
    model.zero_grad()
    model.to(torch.bfloat16)
    with gk.attach(model):
        window(model, batches(ranks, 1))
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@case
def fully_shard_over_tensor_parallel_is_refused(ranks):
    if ranks.world_size == 1:
        return
    mesh = init_device_mesh(
        ranks.device.type, (ranks.world_size // 2, 2), mesh_dim_names=("dp", "tp")
    )
    model = fully_shard(parallel(ranks, torch.float32, mesh["tp"]), mesh=mesh["dp"])
    with pytest.raises(TypeError, match="fully_shard makes a DTensor of parameter"):
        gk.attach(model)
    window(model, batches(ranks, 1))


if __name__ == "__main__":
    main()
