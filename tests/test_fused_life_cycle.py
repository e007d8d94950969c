"""Fused modules from attach to detach: the states of `.grad`, casts, replaced weights, copies."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from fused_cases import (
    Case,
    assert_equal,
    embedding,
    every_device,
    every_kind,
    fused,
    grads,
    is_fused,
    language_model,
    linear,
    rows,
    stock_and_fused,
    tokens,
)
from hook_cases import released
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc_kernels as gk


@every_device
@every_kind
def test_none_is_stored_over_stale_memory(device, kind):
    case = Case(kind, device)
    fused(case.model)
    case.weight.main_grad.fill_(float("nan"))
    case.backward(3)
    assert case.value == 3.0
    case.model.zero_grad()
    case.backward()
    assert case.value == 1.0


@every_device
@every_kind
def test_the_view_is_added_to_in_place(device, kind):
    case = Case(kind, device)
    fused(case.model)
    case.backward(3)
    before, version = case.weight.grad, case.weight.grad._version
    case.backward(4)
    assert case.weight.grad is before and before._version > version
    assert case.value == 7.0


@every_device
@every_kind
def test_zeros_in_the_view_are_added_to(device, kind):
    case = Case(kind, device)
    fused(case.model)
    case.backward(3)
    case.model.zero_grad(set_to_none=False)
    case.backward(4)
    assert case.value == 4.0


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_assigned_tensor_is_copied_then_added_to(device, kind, dtype):
    case = Case(kind, device)
    fused(case.model)
    case.backward(3)
    assigned = torch.full((4, 4), 10.0, device=device, dtype=dtype)
    case.weight.grad = assigned
    case.backward(4)
    assert case.value == 14.0 and assigned.unique().tolist() == [10.0]
    case.weight.grad.data = case.weight.grad.data / 2
    case.backward()
    assert case.value == 8.0


@every_device
@every_kind
def test_a_grad_from_before_attach_counts_as_assigned(device, kind):
    case = Case(kind, device)
    case.weight.grad = torch.full((4, 4), 10.0, device=device, dtype=torch.bfloat16)
    fused(case.model)
    case.backward(4)
    assert case.value == 14.0


@every_device
@every_kind
def test_an_unused_module_keeps_none(device, kind):
    case = Case(kind, device)
    case.model.append(nn.Linear(4, 4, device=device, dtype=torch.bfloat16))
    fused(case.model)
    case.model[0](case.x).sum().backward()
    assert case.value == 1.0
    assert case.model[1].weight.grad is None and case.model[1].bias.grad is None


@every_device
@every_kind
def test_frozen_between_forward_and_backward(device, kind):
    case = Case(kind, device)
    fused(case.model)
    y = case.output().sum()
    case.weight.requires_grad_(False)
    y.backward()
    assert case.weight.grad is None


@every_device
@every_kind
def test_frozen_before_forward_and_thawed_later(device, kind):
    case = Case(kind, device)
    case.model.append(nn.Linear(4, 4, bias=False, device=device, dtype=torch.bfloat16))
    fused(case.model)
    case.model[0](case.x).sum().backward()
    case.weight.requires_grad_(False)
    assert not is_fused(case.model[0](case.x))
    case.model(case.x).sum().backward()
    assert case.value == 1.0
    case.weight.requires_grad_(True)
    case.model.zero_grad()
    case.model[0](case.x).sum().backward()
    assert case.value == 1.0


@every_device
def test_a_frozen_weight_with_a_bias_that_trains(device):
    results = []
    for model in stock_and_fused(linear(device)):
        model[0].weight.requires_grad_(False)
        x = torch.ones(3, 16, device=device, requires_grad=True)
        model(x).sum().backward()
        assert model[0].weight.grad is None
        results.append((model[0].bias.grad, x.grad))
    assert_equal(*results)


@every_device
def test_a_frozen_bias_with_a_weight_that_trains(device):
    model = linear(device)
    model[0].bias.requires_grad_(False)
    fused(model)
    y = model(torch.ones(3, 16, device=device))
    assert is_fused(y)
    y.sum().backward()
    assert model[0].bias.grad is None and model[0].weight.grad.unique().tolist() == [3.0]


@every_device
@every_kind
def test_detach_in_the_middle_of_a_window(device, kind):
    case = Case(kind, device)
    accumulator = gk.attach(case.model, fuse=True)
    case.backward(256)
    case.backward()
    assert case.value == 257.0
    accumulator.detach()
    assert case.weight.grad.dtype == torch.bfloat16
    assert case.weight.grad.unique().tolist() == [256.0]  # 257 is no bfloat16
    assert not is_fused(case.model(case.x))
    case.model(case.x).sum().backward()
    assert case.weight.grad.dtype == torch.bfloat16


@every_device
@every_kind
def test_detach_between_forward_and_backward(device, kind):
    case = Case(kind, device)
    accumulator = gk.attach(case.model, fuse=True)
    y = case.output(3).sum()
    accumulator.detach()
    y.backward()
    assert case.weight.grad.dtype == torch.bfloat16
    assert case.weight.grad.unique().tolist() == [3.0]


@every_device
@every_kind
def test_detach_between_two_backwards_of_a_retained_graph(device, kind):
    case = Case(kind, device)
    accumulator = gk.attach(case.model, fuse=True)
    y = case.output(3).sum()
    y.backward(retain_graph=True)
    accumulator.detach()
    y.backward()
    assert case.weight.grad.dtype == torch.bfloat16
    assert case.weight.grad.unique().tolist() == [6.0]


@every_device
@every_kind
def test_detach_inside_backward(device, kind, queueing):
    case = Case(kind, device)
    accumulator = gk.attach(case.model, fuse=True)
    y = case.output(3)
    y.register_hook(lambda grad: accumulator.detach())
    y.sum().backward()
    assert case.weight.grad.dtype == torch.bfloat16
    assert case.weight.grad.unique().tolist() == [3.0]


@every_device
@every_kind
def test_attach_again(device, kind):
    case = Case(kind, device)
    for _ in range(2):
        with gk.attach(case.model, fuse=True) as accumulator:
            assert repr(accumulator).count("fused: 1 ") == 1
            case.model.zero_grad()
            case.backward(3)
            assert case.value == 3.0
        assert "forward" not in vars(case.model[0])


@every_device
@pytest.mark.parametrize("change", ["attach again", "replace a parameter"])
def test_fusion_outlives_a_graph_from_before(device, change):
    model = linear(device, torch.bfloat16, 1, 1)
    accumulator = gk.attach(model, fuse=True)
    x = torch.tensor([[1.0], [2.0**-9]], device=device).bfloat16()
    kept = model(x)
    if change == "attach again":
        accumulator.detach()
        fused(model)
    else:
        model[0].bias = nn.Parameter(torch.zeros_like(model[0].bias))
    y = model(x)
    assert is_fused(y)
    y.sum().backward()
    assert model[0].weight.grad.item() == 1 + 2.0**-9
    assert kept.shape == y.shape


@every_device
def test_a_module_is_fused_once(device):
    model = linear(device, n_in=4, n_out=4)
    model.append(model[0])  # two places, one module
    accumulator = gk.attach(model, fuse=True)
    assert "fused: 1 Linear" in repr(accumulator)
    with pytest.raises(ValueError, match="attached already"):
        gk.attach(model, fuse=True)
    with pytest.raises(ValueError, match="attached already"):
        gk.attach(nn.Sequential(model), fuse=True)
    model[0](torch.ones(2, 4, device=device)).sum().backward()
    assert model[0].weight.grad.unique().tolist() == [2.0]


@every_device
def test_two_attachments_of_two_parts(device):
    model = language_model(device, tied=False)
    accumulators = [gk.attach(part, fuse=True) for part in (model.embedding, model.up)]
    assert all("fused: 1 " in repr(accumulator) for accumulator in accumulators)
    indices = tokens(device)
    expected = torch.autograd.grad(model(indices).sum(), model.parameters())
    model(indices).sum().backward()
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad)
    accumulators[0].detach()
    assert "forward" not in vars(model.embedding) and is_fused(model.up(rows(device)))


@every_device
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casting_in_the_middle_of_a_window_rounds_nothing(device, cast):
    model = fused(linear(device, torch.bfloat16, 1, 1))
    for value in (256.0, 1.0):
        model(torch.full((1, 1), value, device=device).bfloat16()).sum().backward()
    getattr(model, cast)()
    y = model(torch.ones(1, 1, device=device, dtype=model[0].weight.dtype))
    assert is_fused(y)
    y.sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    assert model[0].weight.grad.item() == 258.0


@every_device
def test_casting_between_forward_and_backward(device):
    results = []
    for model in stock_and_fused(linear(device, torch.float32, 1, 1)):
        y = model(torch.ones(1, 1, device=device)).sum()
        model.bfloat16()
        model(torch.ones(1, 1, device=device).bfloat16())
        y.backward()
        results.append([p.grad.item() for p in model.parameters()])
    assert results[0] == results[1]


@every_device
@every_kind
def test_to_float64_and_back(device, kind):
    case = Case(kind, device)
    fused(case.model)
    case.backward(257)
    case.model.double()
    x = case.x.double() if case.x.is_floating_point() else case.x
    assert not is_fused(case.model(x))
    case.model.bfloat16()
    case.backward()
    assert case.value == 258.0


@every_device
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_load_state_dict(device, assign, tied):
    model = fused(language_model(device, torch.bfloat16, tied=tied))
    state = language_model(device, torch.bfloat16, tied=False).state_dict()
    indices = tokens(device)
    kept = model(indices)  # a graph from before
    model.load_state_dict(state, assign=assign)
    stock = language_model(device, torch.bfloat16, tied=tied and not assign)
    stock.load_state_dict(state)
    outputs = [each(indices) for each in (stock, model)]
    assert outputs[0].equal(outputs[1]) and is_fused(outputs[1])
    for output in outputs:
        output.float().square().sum().backward()
    for ours, theirs in zip(grads(model), grads(stock), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs.float()).norm() <= 0.03 * theirs.float().norm()
    assert kept.shape == outputs[1].shape


@every_device
@every_kind
@pytest.mark.parametrize("through_root", [True, False])
def test_a_replaced_weight(device, kind, through_root):
    case = Case(kind, device)
    fused(case.model)
    case.backward(3)
    old = case.weight
    case.model[0].weight = case.weight = nn.Parameter(torch.full_like(old, 2.0))
    if through_root:
        case.backward(4)
        assert case.value == 4.0
        assert old.grad.dtype == torch.bfloat16 and old.grad.unique().tolist() == [3.0]
    else:
        y = case.model[0](case.x)  # not the root, which would have noticed
        assert y.unique().tolist() == [8.0 if kind == "linear" else 2.0]
        y.sum().backward()
        assert case.weight.grad.unique().tolist() == [1.0]
        assert old.grad.unique().tolist() == [3.0]


@every_device
def test_a_replaced_bias(device):
    model = fused(linear(device, n_in=4, n_out=4))
    model[0].bias = nn.Parameter(torch.full((4,), 7.0, device=device))
    model[0].weight.data.zero_()
    for each in (model[0], model):  # with and without refresh
        model.zero_grad()
        y = each(torch.ones(1, 4, device=device))
        assert y.unique().tolist() == [7.0]
        y.sum().backward()
        assert model[0].bias.grad.unique().tolist() == [1.0]
    model[0].bias = None
    y = model(torch.ones(1, 4, device=device))
    assert y.unique().tolist() == [0.0] and is_fused(y)


@every_device
def test_tied_later_and_untied_again(device):
    model = fused(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))).to(device))
    x = torch.ones(1, 4, device=device)

    def check():
        model.zero_grad()
        params = list(model.parameters())
        expected = torch.autograd.grad(model(x).square().sum(), params)
        model(x).square().sum().backward()
        for param, grad in zip(params, expected, strict=True):
            assert param.grad.data_ptr() == param.main_grad.data_ptr()
            torch.testing.assert_close(param.grad, grad)

    check()
    own = model[1].weight
    model[1].weight = model[0].weight
    check()
    assert len(list(model.parameters())) == 1
    model[1].weight = nn.Parameter(own.detach().clone())
    model(x)
    assert model[0].weight.grad is not None
    check()


def twin_of(model, way):
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_device
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_train_as_stock(device, way):
    model = language_model(device, torch.bfloat16)
    stock = copy.deepcopy(model)
    fused(model)
    indices = tokens(device)
    model(indices).float().square().sum().backward()
    once = [p.grad.clone() for p in model.parameters()]
    twin = twin_of(model, way)
    twin.zero_grad()
    assert not is_fused(twin(indices))
    for each in (stock, twin):
        each(indices).float().square().sum().backward()
    assert_equal(grads(twin), grads(stock))
    assert_equal(grads(model), once)
    for module in twin.modules():
        assert getattr(vars(module).get("forward"), "call", None) is None
    twin.zero_grad()
    assert is_fused(fused(twin)(indices)) and is_fused(model(indices))
    del model
    gc.collect()
    twin(indices).sum().backward()


@pytest.mark.xfail(strict=True, reason="the forward of a shallow copy is that of the original")
@every_device
@every_kind
@pytest.mark.parametrize("original", ["alive", "gone"])
def test_shallow_copies_compute_with_what_they_hold(device, kind, original):
    case = Case(kind, device)
    fused(case.model)
    twin = copy.copy(case.model[0])
    twin._parameters = dict(twin._parameters)
    x = case.x
    if original == "gone":
        del case
    twin.weight = nn.Parameter(torch.full_like(twin.weight, 2.0))
    y = twin(x)
    assert y.unique().tolist() == [8.0 if kind == "linear" else 2.0]
    y.sum().backward()
    assert twin.weight.grad.unique().tolist() == [1.0]


@pytest.mark.xfail(strict=True, reason="the forward of a replica is that of the original")
@every_device
@every_kind
def test_replicas_of_data_parallel_compute_with_their_own_weights(device, kind):
    case = Case(kind, device)
    fused(case.model)
    replica = case.model[0]._replicate_for_data_parallel()
    replica.weight = torch.full_like(case.weight, 2.0)
    if kind == "linear":
        replica.bias = None
    assert replica(case.x).unique().tolist() == [8.0 if kind == "linear" else 2.0]


@every_device
@every_kind
def test_nothing_keeps_the_model_alive(device, kind):
    gc.collect()
    gc.disable()  # no reference cycle: counting references is enough
    try:
        case = Case(kind, device)
        accumulator = gk.attach(case.model, fuse=True)
        case.backward()
        case.backward()
        buffer = case.weight.main_grad.untyped_storage()
        alive = [weakref.ref(t) for t in (case.model, case.model[0], case.weight, buffer)]
        del case, buffer
        assert released(alive)
    finally:
        gc.enable()
    assert "detached" in repr(accumulator)


@every_device
@every_kind
def test_a_graph_that_outlives_the_model(device, kind):
    case = Case(kind, device)
    fused(case.model)
    y, weight = case.output(3).sum(), case.weight
    del case
    gc.collect()
    y.backward()
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.unique().tolist() == [3.0]


@every_device
@pytest.mark.parametrize(
    ("name", "value"), [("padding_idx", 1), ("max_norm", 0.5), ("scale_grad_by_freq", True)]
)
def test_an_attribute_of_an_embedding_that_is_set_later(device, name, value):
    models = stock_and_fused(embedding(device))
    for model in models:
        setattr(model[0], name, value)
        model(torch.tensor([1, 1, 2], device=device)).square().sum().backward()
    stock, model = models
    for ours, theirs in (
        (model[0].weight.grad, stock[0].weight.grad),
        (model[0].weight, stock[0].weight),
    ):
        torch.testing.assert_close(ours, theirs)


@every_device
def test_a_dispatch_mode_that_calls_the_accumulator(device):
    model = linear(device)
    accumulator = gk.attach(model, fuse=True)
    model[0].weight.grad = torch.zeros_like(model[0].weight)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            accumulator.refresh()
            accumulator.grad_norm(from_statistics=True)
            return function(*args, **(kwargs or {}))

    loss = model(rows(device)).sum()
    with Mode():
        loss.backward()
    assert model[0].bias.grad.unique().tolist() == [4.0]


MODES = {"fake tensors": FakeTensorMode, "inference": torch.inference_mode}


@every_device
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("way", ["collected", "detached"])
def test_the_end_of_an_attachment_while_a_mode_is_on(device, mode, way):
    """The collector may run while something else is traced, or while another model infers."""
    model = linear(device, torch.bfloat16)
    accumulator = gk.attach(model, fuse=True)
    model(rows(device, torch.bfloat16)).sum().backward()
    params = list(model.parameters())
    model.__dict__["cycle"] = model
    with mode():
        if way == "detached":
            accumulator.detach()
        else:
            del model
            gc.collect()
    for param in params:
        assert type(param.grad) is torch.Tensor and param.grad.dtype == torch.bfloat16
        before = param.grad.clone()
        (param * 1).sum().backward()
        assert param.grad.equal(before + 1)


@every_device
def test_memory_is_flat_over_many_windows(device):
    model = fused(language_model(device, torch.bfloat16))

    def objects():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for step in range(20):
        for _ in range(2):
            model(tokens(device)).sum().backward()
        model.zero_grad()
        if step == 5:
            before = objects()
    assert objects() == before


@every_device
@pytest.mark.parametrize("fuse", [False, True])
def test_tied_weights_with_a_gradient_from_before(device, fuse):
    model = language_model(device, torch.bfloat16)
    indices = tokens(device)
    model(indices).sum().backward()
    once = model.head.weight.grad.clone()
    gk.attach(model, fuse=fuse)
    model(indices).sum().backward()
    torch.testing.assert_close(model.head.weight.grad, 2 * once.float(), rtol=0.02, atol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@every_kind
def test_moving_a_model_in_the_middle_of_a_window(kind):
    case = Case(kind, "cpu")
    fused(case.model)
    case.backward(257)
    for device in ("cuda", "cpu"):
        case.model.to(device)
        case.x = case.x.to(device)
        case.backward()
    assert case.value == 259.0
