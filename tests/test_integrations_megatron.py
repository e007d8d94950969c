"""Modules that add to ``param.main_grad`` themselves, by stand-ins for Transformer Engine's."""

import copy

import pytest
import torch
from hook_cases import every_hook
from oracle import WindowSum
from torch import nn
from torch.nn import functional as F

import gradacc_kernels as gk
from gradacc_kernels.integrations import megatron

K = 4
GARBAGE = 1e4  # in dummy gradients


class AddsToMainGrad(torch.autograd.Function):
    """y = x w^T, whose backward does what that of a fused linear layer does.

    ``reads`` tells where main_grad is read: in "forward" or in "backward".
    """

    @staticmethod
    def forward(ctx, x, weight, module):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.module = weight, module
        ctx.main = weight.main_grad if module.reads == "forward" else None
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        param = ctx.weight
        main = param.main_grad if ctx.main is None else ctx.main
        product = (dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])).float()
        if ctx.module.is_first_micro_batch:
            main.data.copy_(product)
        else:
            main.data.add_(product)  # `.data`, as a kernel: no version counter moves
        dummy = None
        if hasattr(param, "grad_added_to_main_grad"):
            param.grad_added_to_main_grad = True
            is_zero = getattr(param, "zero_out_wgrad", False)
            dummy = torch.full_like(weight, 0.0 if is_zero else GARBAGE)
        return dy @ weight, dummy, None


class Linear(nn.Module):
    fuse_wgrad_accumulation = True

    def __init__(self, n_in, n_out, reads="backward"):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.reads = reads
        self.is_first_micro_batch = False

    def forward(self, x):
        if not self.fuse_wgrad_accumulation:
            return F.linear(x, self.weight, self.bias)
        return AddsToMainGrad.apply(x, self.weight, self) + self.bias


def model_of(device, dtype=torch.float32, reads="backward"):
    layers = [Linear(6, 8, reads), nn.GELU(), nn.LayerNorm(8), Linear(8, 8, reads), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(device, dtype)


def stock_of(model):
    """A copy whose layers leave their gradients to autograd."""
    stock = copy.deepcopy(model)
    for module in stock:
        if isinstance(module, Linear):
            module.fuse_wgrad_accumulation = False
    return stock


def loss_of(model, x):
    return (model(x).float() ** 2).mean() / K


def batches(device, dtype=torch.float32, count=K):
    return [torch.randn(5, 6, device=device).to(dtype) for _ in range(count)]


def check_close(model, stock):
    """Sums of the same terms, in an order of their own: a product is added at once, or rounded."""
    for (name, param), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad.float(), rtol=1e-5, atol=1e-6, msg=name)


@every_hook
@pytest.mark.parametrize("reads", ["forward", "backward"])
@pytest.mark.parametrize("overwrites", [False, True], ids=["adds", "overwrites-first"])
def test_windows_are_counted_once(hook, reads, overwrites):
    device, backend = hook
    model = model_of(device, reads=reads)
    stock = stock_of(model)
    accumulator = megatron.attach(model, backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, stock)]
    for window in range(3):
        for number, x in enumerate(batches(device)):
            for module in model:
                module.is_first_micro_batch = overwrites and number == 0
            for each in (model, stock):
                loss_of(each, x).backward()
            assert accumulator.micro_batches == number + 1
        check_close(model, stock)
        weight = model[0].weight
        assert weight.main_grad.data_ptr() == weight.grad.data_ptr()
        assert weight.grad_added_to_main_grad and not model[2].weight.grad.isnan().any()
        # The slots were written by nobody: norms are those of what modules have added.
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch.testing.assert_close(accumulator.grad_norm(from_statistics=True), norm)
        torch.testing.assert_close(accumulator.grad_norms(from_statistics=True)["0.weight"],
                                   weight.grad.norm())  # fmt: skip
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=window != 1)
    for param, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@every_hook
def test_sums_of_16_bit_parameters_are_float32(hook):
    device, backend = hook
    model = model_of(device, torch.bfloat16)
    megatron.attach(model, backend=backend)
    layer, window = model[0], WindowSum(torch.zeros(8, 6, dtype=torch.float64))
    for x in batches(device, torch.bfloat16, 64):
        y = layer(x)
        dy = torch.randn_like(y)
        window.add((dy.T @ x).float().cpu())
        y.backward(dy)
    assert layer.weight.grad.dtype == torch.float32
    assert window.contains(layer.weight.grad.cpu())


@every_hook
def test_without_the_convention_the_dummy_is_added(hook):
    """What the other tests would see if nothing were dropped."""
    device, backend = hook
    model = model_of(device)
    gk.attach(model, backend=backend)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    assert not hasattr(model[0].weight, "grad_added_to_main_grad")
    vars(model[0].weight)["grad_added_to_main_grad"] = False
    assert not model[0].weight.grad_added_to_main_grad
    loss_of(model, batches(device)[0]).backward()
    assert model[0].weight.grad_added_to_main_grad is True  # an ordinary attribute
    assert (model[0].weight.grad > GARBAGE / 2).all()


@every_hook
def test_a_weight_that_others_use_too(hook):
    """As of tied embeddings: ``zero_out_wgrad`` has the dummy be zeros, which are added."""
    device, backend = hook
    layer = Linear(6, 6).to(device)
    stock = copy.deepcopy(layer)
    stock.fuse_wgrad_accumulation = False
    layer.weight.zero_out_wgrad = True
    megatron.attach(layer, backend=backend)
    for x in batches(device):
        for each in (layer, stock):
            (each(each(x)) + F.linear(x, each.weight)).square().mean().backward()
    torch.testing.assert_close(layer.weight.grad, stock.weight.grad, rtol=1e-5, atol=1e-6)


@every_hook
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpoints(hook, is_reentrant):
    device, backend = hook
    model = model_of(device)
    stock = stock_of(model)
    megatron.attach(model, backend=backend)
    for x in batches(device):
        for each in (model, stock):
            x = x.requires_grad_()
            y = torch.utils.checkpoint.checkpoint(each, x, use_reentrant=is_reentrant)
            (y.square().mean() / K).backward()
    check_close(model, stock)


@every_hook
def test_steps_closed_by_the_accumulator(hook):
    device, backend = hook
    model = model_of(device)
    stock = stock_of(model)
    accumulator = megatron.attach(model, backend=backend)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, stock))
    for _ in range(2):
        for x in batches(device):
            for each in (model, stock):
                loss_of(each, x).backward()
        norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.01)
        torch.testing.assert_close(accumulator.step(ours, max_norm=0.01), norm)
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    for param, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    loss_of(model, batches(device)[0] * float("inf")).backward()
    before = model[0].weight.detach().clone()
    accumulator.step(ours)
    assert torch.equal(model[0].weight, before)
    assert accumulator.counters["skipped_windows"] == 1


@every_hook
def test_a_cast_in_the_middle_of_a_window(hook):
    device, backend = hook
    model = model_of(device)
    stock = stock_of(model)
    megatron.attach(model, backend=backend)
    first, second = batches(device, count=2)
    for each in (model, stock):
        loss_of(each, first).backward()
    kept = [p.grad.clone() for p in model.parameters()]
    model.bfloat16()
    assert all(map(torch.equal, [p.grad for p in model.parameters()], kept))
    model.float()
    with torch.no_grad():
        for param, other in zip(model.parameters(), stock.parameters(), strict=True):
            param.copy_(other)
    for each in (model, stock):
        loss_of(each, second).backward()
    check_close(model, stock)


@every_hook
def test_detached_it_is_an_ordinary_attribute(hook):
    device, backend = hook
    model = model_of(device)
    accumulator = megatron.attach(model, backend=backend)
    loss_of(model, batches(device)[0]).backward()
    accumulator.detach()
    weight = model[0].weight
    assert not hasattr(weight, "grad_added_to_main_grad") and not hasattr(weight, "main_grad")
    weight.grad_added_to_main_grad = False
    assert weight.grad_added_to_main_grad is False
    del weight.grad_added_to_main_grad
    assert not hasattr(weight, "grad_added_to_main_grad")
    with pytest.raises(AttributeError):
        del weight.grad_added_to_main_grad


def test_zeroing_between_forward_and_backward_is_refused():
    """Where a module has read main_grad in forward, it would add to the last window's sums."""
    model = model_of("cpu", reads="forward")
    megatron.attach(model)
    loss = loss_of(model, batches("cpu")[0])
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"4.weight|3.weight.*zero_grad\(\) before the forward"):
        loss.backward()


def test_zeroing_between_forward_and_backward_works_where_backward_reads():
    model = model_of("cpu")
    stock = stock_of(model)
    megatron.attach(model)
    for x in batches("cpu"):
        for each in (model, stock):
            loss = loss_of(each, x)
            each.zero_grad()
            loss.backward()
    check_close(model, stock)


def test_reading_between_windows_begins_one_of_zeros():
    model = model_of("cpu")
    megatron.attach(model)
    loss_of(model, batches("cpu")[0]).backward()
    model.zero_grad()
    assert model[4].weight.main_grad.any()  # others': what the last window has summed
    assert model[4].weight.grad is None
    assert not model[0].weight.main_grad.any()
    assert model[0].weight.grad is not None and not model[0].weight.grad_added_to_main_grad


def test_weights_are_refused():
    model = model_of("cpu")
    accumulator = megatron.attach(model)
    with pytest.raises(RuntimeError, match="without the weight of micro_batch"):
        with accumulator.micro_batch(5):
            loss_of(model, batches("cpu")[0]).backward()


def test_given_parameters():
    model = model_of("cpu")
    for module in model:
        module.fuse_wgrad_accumulation = False
    with pytest.raises(ValueError, match="fuse_wgrad_accumulation or gradient_accumulation_fusion"):
        megatron.attach(model)
    other = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="got 2, of which 1 are"):
        megatron.attach(model, params=[model[0].weight, other])
    megatron.attach(model, params=[model[0].weight])
    assert hasattr(model[0].weight, "grad_added_to_main_grad")
    assert not hasattr(model[3].weight, "grad_added_to_main_grad")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.5}, "do not multiply by scale=0.5"),
        ({"nonfinite": "skip_micro_batch"}, "cannot take back"),
    ],
)
def test_what_modules_would_not_follow_is_refused(options, message):
    model = model_of("cpu")
    with pytest.raises(ValueError, match=message):
        megatron.attach(model, **options)
    gk.attach(model)  # nothing was changed


def test_a_list_is_refused():
    with pytest.raises(TypeError, match="expected a module, got list"):
        megatron.attach(list(model_of("cpu").parameters()))


@pytest.mark.parametrize("reads", ["forward", "backward"])
def test_windows_that_a_process_group_reduces(tmp_path, reads):
    """The dummy gradient's arrival is what has a bucket reduced: by then the module has added."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = model_of("cpu", reads=reads)
        stock = stock_of(model)
        group = torch.distributed.group.WORLD
        accumulator = megatron.attach(model, process_group=group, steps=K)
        ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, stock))
        for _ in range(2):
            for x in batches("cpu"):
                for each in (model, stock):
                    loss_of(each, x).backward()
            assert accumulator._attachment.is_reduced()
            check_close(model, stock)
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
        accumulator.detach()
    finally:
        torch.distributed.destroy_process_group()
