"""Casting, moving, loading, copying, saving and dropping an attached model."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from hook_cases import (
    arrive,
    backward,
    batch,
    every_hook,
    micro_gradients,
    mlp,
    needs_extension,
    parameter,
    released,
)

import gradacc_kernels as gk


@every_hook
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casting_in_the_middle_of_a_window_rounds_nothing(hook, cast):
    device, backend = hook
    param = torch.nn.Linear(1, 1, bias=False).to(device, torch.bfloat16)
    gk.attach(param, backend=backend)
    arrive(param.weight, 256.0)
    arrive(param.weight, 1.0)
    getattr(param, cast)()
    param(torch.ones(1, 1, device=device, dtype=param.weight.dtype)).sum().backward()
    assert param.weight.grad.dtype == torch.float32
    assert param.weight.grad.item() == 258.0


def cast_it(model):
    model.half()


def cast_what_holds_it(model):
    torch.nn.ModuleList([model]).half()


def load_by_assigning(model):
    state = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@every_hook
@pytest.mark.parametrize("change", [cast_it, cast_what_holds_it, load_by_assigning])
def test_a_model_is_followed_of_which_only_layers_are_called(hook, change):
    device, backend = hook
    model, x = mlp(device), batch(device).half()
    gk.attach(model, backend=backend)
    backward(model, batch(device))
    sums = [p.grad.clone() for p in model.parameters()]
    change(model)
    if change is load_by_assigning:
        sums = [torch.zeros_like(s) for s in sums]  # as in stock, they stay with the old parameters
    else:
        assert all(p.grad.equal(s) for p, s in zip(model.parameters(), sums, strict=True))
    expected = micro_gradients(model, [x])[0]

    def layers(x):
        for layer in model:
            x = layer(x)
        return x

    backward(layers, x)
    for param, total, grad in zip(model.parameters(), sums, expected, strict=True):
        assert param.grad.data_ptr() == param.main_grad.data_ptr()
        assert param.grad.equal(total + grad.float())


@every_hook
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_attached_is_followed_too(hook, way):
    device, backend = hook
    model, x = mlp(device), batch(device).half()
    gk.attach(model, backend=backend)
    twin = way(model)
    gk.attach(twin, backend=backend, scale=0.5)
    twin.half()
    expected = micro_gradients(twin, [x])[0]
    backward(torch.nn.Sequential(*twin), x)
    for param, grad in zip(twin.parameters(), expected, strict=True):
        assert param.grad.equal(grad.float() * 0.5)


def test_a_traced_graph_is_pickled():
    """Its class pickles its attributes before itself."""
    model = torch.fx.symbolic_trace(mlp())
    gk.attach(model)
    twin = pickle.loads(pickle.dumps(model))
    backward(twin, batch())
    assert twin.get_parameter("0.weight").grad.dtype == torch.bfloat16
    model.half()
    backward(model, batch().half())
    assert model.get_parameter("0.weight").grad.dtype == torch.float32


@every_hook
def test_parameters_that_a_cast_replaces_keep_their_sums(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    for _ in range(3):
        backward(model, batch(device))
    sums, before = [p.grad.clone() for p in model.parameters()], list(model.parameters())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert accumulator.micro_batches == 3
    for param, old, total in zip(model.parameters(), before, sums, strict=True):
        assert param is not old and param.grad.equal(total)


def test_a_shallow_copy_that_outlives_its_model_says_so():
    model = mlp()
    gk.attach(model, fuse=False)
    twin = copy.copy(model)
    del model
    with pytest.raises(RuntimeError, match="detach\\(\\) before copy.copy"):
        twin.half()


@every_hook
def test_to_meta_and_back(hook):
    """A move that cannot be followed says so in the next forward, and not before."""
    device, backend = hook
    model, x = mlp(device), batch(device)
    gk.attach(model, backend=backend)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        model(x.to("meta"))
    model.to_empty(device=device)
    model.load_state_dict(state)
    expected = micro_gradients(model, [x])[0]
    backward(model, x)
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert param.grad.data_ptr() == param.main_grad.data_ptr()
        assert param.grad.equal(grad.float())


@every_hook
def test_to_float64_and_back(hook):
    device, backend = hook
    model = mlp(device)
    gk.attach(model, backend=backend)
    backward(model, batch(device))
    sums = [p.grad.clone() for p in model.parameters()]
    model.double()
    model(batch(device, torch.float64))
    for param, expected in zip(model.parameters(), sums, strict=True):
        assert param.grad.dtype == torch.float64 and param.grad.equal(expected.double())
    model.bfloat16()
    model(batch(device))
    for param, expected in zip(model.parameters(), sums, strict=True):
        assert param.grad.dtype == torch.float32 and param.grad.equal(expected)


@every_hook
def test_to_channels_last_moves_the_layout_of_the_sums(hook):
    device, backend = hook
    conv = torch.nn.Conv2d(4, 8, 3).to(device, torch.bfloat16)
    x = torch.randn(1, 4, 5, 5, device=device).bfloat16()
    gk.attach(conv, backend=backend)
    backward(conv, x)
    once = conv.weight.grad.clone()
    conv.to(memory_format=torch.channels_last)
    conv(x)
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.grad.equal(once)


@every_hook
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(hook, assign):
    device, backend = hook
    model, x = mlp(device), batch(device)
    gk.attach(model, backend=backend)
    model.load_state_dict(mlp(device).state_dict(), assign=assign)
    backward(model, x)
    expected = micro_gradients(model, [x])[0]
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert param.grad.dtype == torch.float32 and param.grad.equal(grad.float())
        assert param.grad.data_ptr() == param.main_grad.data_ptr()


@every_hook
def test_a_reshaped_parameter_is_refused(hook):
    device, backend = hook
    model = mlp(device)
    accumulator = gk.attach(model, backend=backend)
    backward(model, batch(device))
    model[3].bias = torch.nn.Parameter(torch.zeros(5, device=device, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"parameter 3.bias had shape \[8\] .* has \[5\] now"):
        accumulator.refresh()
    assert model[0].weight.grad.data_ptr() == model[0].weight.main_grad.data_ptr()


@every_hook
def test_a_removed_parameter_is_given_back(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    accumulator = gk.attach(model, backend=backend)
    backward(model, x)
    sums = [p.grad.clone() for p in model.parameters()]
    removed = model[3].bias
    model[3].bias = None
    model(x)
    assert removed.grad.dtype == torch.bfloat16 and removed.grad.equal(sums.pop().bfloat16())
    assert all(p.grad.equal(s) for p, s in zip(model.parameters(), sums, strict=True))
    assert "5 parameters" in repr(accumulator)


@every_hook
def test_assigning_a_state_dict_unties_and_covers_both(hook):
    device, backend = hook
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
    model.to(device, torch.bfloat16)
    model[1].weight = model[0].weight
    gk.attach(model, backend=backend)
    loaded = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    x = torch.randn(2, 4, device=device).bfloat16()
    expected = micro_gradients(model, [x])[0]
    backward(model, x)
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert param.grad.dtype == torch.float32 and param.grad.equal(grad.float())


@every_hook
def test_a_broken_tie_leaves_both_parameters_covered(hook):
    device, backend = hook
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
    model.to(device, torch.bfloat16)
    model[1].weight = model[0].weight
    gk.attach(model, backend=backend)
    x = torch.randn(2, 4, device=device).bfloat16()
    backward(model, x)
    summed = model[1].weight.grad.clone()
    model[0].weight = torch.nn.Parameter(torch.randn_like(model[0].weight))
    expected = micro_gradients(model, [x])[0]
    backward(model, x)
    assert model[0].weight.grad.equal(expected[0].float())
    assert model[1].weight.grad.equal(summed + expected[1].float())


@every_hook
def test_detach_gives_what_stock_would_hold(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    double = parameter([0.0], torch.float64, device)
    accumulator = gk.attach([*model.parameters(), double], backend=backend)
    backward(model, x)
    arrive(double, 1.5)
    sums = [p.grad.clone() for p in model.parameters()]
    buffer = weakref.ref(model[0].weight.main_grad.untyped_storage())
    accumulator.detach()
    gc.collect()
    assert released([buffer])
    for param, expected in zip(model.parameters(), sums, strict=True):
        assert param.grad_dtype == torch.bfloat16 and param.grad.equal(expected.bfloat16())
    assert double.grad.item() == 1.5
    model.zero_grad()
    backward(model, x)
    stock = micro_gradients(model, [x])[0]
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), stock, strict=True))


@needs_extension
@pytest.mark.parametrize("before, after", [("bfloat16", "float"), ("float", "bfloat16")])
def test_detach_restores_the_default_grad_dtype(before, after):
    model = getattr(mlp(), before)()
    gk.attach(model).detach()
    getattr(model, after)()
    assert model[0].weight.grad_dtype == model[0].weight.dtype


def test_detach_restores_an_explicit_grad_dtype():
    param = parameter([0.0])
    param.grad_dtype = torch.float32
    accumulator = gk.attach([param])
    arrive(param, 3.0)
    accumulator.detach()
    assert param.grad_dtype == torch.float32 and param.grad.dtype == torch.float32


@every_hook
def test_context_manager_and_attaching_again(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    for _ in range(2):
        with gk.attach(model, backend=backend):
            backward(model, x)
            assert model[0].weight.grad.dtype == torch.float32
        assert model[0].weight.grad.dtype == torch.bfloat16
        assert not model._forward_pre_hooks and not model._load_state_dict_post_hooks
        assert "_apply" not in vars(model)


@every_hook
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_train_as_stock(hook, way):
    device, backend = hook
    model, x = mlp(device), batch(device)
    model.accumulator = gk.attach(model, backend=backend)
    backward(model, x)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        assert file.tell() < 3 * sum(p.nbytes for p in model.parameters()) + 10_000
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin.zero_grad()
    twin.half()
    stock = micro_gradients(twin, [x.half()])[0]
    backward(twin, x.half())
    for param, grad in zip(twin.parameters(), stock, strict=True):
        assert param.grad.dtype == torch.float16 and param.grad.equal(grad)
    assert model[0].weight.dtype == torch.bfloat16
    assert "detached" in repr(twin.accumulator)
    assert model[0].weight.grad.dtype == torch.float32
    gk.attach(twin, backend=backend)


@every_hook
def test_the_handle_keeps_no_model_alive(hook):
    device, backend = hook
    model = mlp(device)
    gc.collect()
    gc.disable()  # no reference cycle: counting references is enough
    try:
        accumulator = gk.attach(model, backend=backend)
        backward(model, batch(device))
        alive = [weakref.ref(model), weakref.ref(model[0].weight)]
        del model
        assert released(alive)
    finally:
        gc.enable()
    assert "detached" in repr(accumulator)


@every_hook
def test_a_list_whose_handle_is_not_kept_says_so(hook):
    device, backend = hook
    params = list(mlp(device).parameters())
    with pytest.warns(UserWarning, match="keep what attach returns"):
        gk.attach(params, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gk.attach(params, backend=backend):
            pass
        gk.attach(params, backend=backend).detach()
        accumulator = gk.attach(params, backend=backend)
        arrive(params[0], torch.ones_like(params[0]))
        params[0].grad = None
        del accumulator
        gk.attach(mlp(device), backend=backend)  # dropped with its model


@every_hook
def test_a_module_stays_attached_without_the_handle(hook):
    device, backend = hook
    model = mlp(device)
    gk.attach(model, backend=backend)
    gc.collect()
    backward(model, batch(device))
    assert model[0].weight.grad.dtype == torch.float32


@every_hook
def test_a_list_is_attached_as_long_as_its_handle_lives(hook):
    device, backend = hook
    param = parameter([0.0], device=device)
    accumulator = gk.attach([param, param], backend=backend)
    arrive(param, 3.0)
    assert param.grad.dtype == torch.float32
    del accumulator
    assert param.grad.dtype == torch.bfloat16 and param.grad.item() == 3.0
    arrive(param, 4.0)
    assert param.grad.dtype == torch.bfloat16 and param.grad.item() == 7.0


@every_hook
def test_parameters_that_outlive_their_model_are_stock(hook):
    device, backend = hook
    model = mlp(device)
    gk.attach(model, backend=backend)
    backward(model, batch(device))
    param = model[0].weight
    del model
    assert param.grad.dtype == torch.bfloat16 and param.grad_dtype == torch.bfloat16


@every_hook
def test_memory_is_flat_over_many_windows(hook):
    device, backend = hook
    model, x = mlp(device), batch(device)
    gk.attach(model, backend=backend)

    def objects():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for window in range(30):
        for _ in range(2):
            backward(model, x)
        model.zero_grad()
        if window == 5:
            before = objects()
    assert objects() == before
