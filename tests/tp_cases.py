"""What several ranks do with DTensor parameters: cases, run as rank_cases.py describes."""

import itertools

import oracle
import torch
import torch.nn.functional as F
from hook_cases import backward
from rank_cases import case, main
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradacc_kernels as gk

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


if __name__ == "__main__":
    main()
