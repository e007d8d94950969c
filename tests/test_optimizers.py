"""Optimizers over 16-bit parameters with main gradients: refused, or right."""

import pytest
import torch
from hook_cases import arrive, every_hook, parameter
from torch import optim

import gradacc_kernels as gk

UNFIT = {
    "Adam": lambda p: optim.Adam(p, lr=0.5),
    "AdamW": lambda p: optim.AdamW(p, lr=0.5),
    "AdamW, foreach": lambda p: optim.AdamW(p, lr=0.5, foreach=True),
    "Adamax": lambda p: optim.Adamax(p, lr=0.5),
    "NAdam": lambda p: optim.NAdam(p, lr=0.5),
    "RAdam": lambda p: optim.RAdam(p, lr=0.5),
    "Adam, fused": lambda p: optim.Adam(p, lr=0.5, fused=True),
    "SGD, fused": lambda p: optim.SGD(p, lr=0.5, fused=True),
    "Adagrad, fused": lambda p: optim.Adagrad(p, lr=0.5, fused=True),
    "RMSprop, centred": lambda p: optim.RMSprop(p, lr=0.5, centered=True),
}
FIT = {
    "SGD": lambda p: optim.SGD(p, lr=0.5),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.5),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.5),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.5),
}


def skip_where_missing(optimizer, device):
    if optimizer == "Adagrad, fused" and device == "cuda":
        pytest.skip("torch has this kernel for the CPU alone")


@every_hook
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", UNFIT)
def test_refused_before_anything_is_written(hook, optimizer, dtype):
    device, backend = hook
    skip_where_missing(optimizer, device)
    first, second = (parameter([1.0, 2.0], dtype, device) for _ in range(2))
    accumulator = gk.attach([first, second], backend=backend)
    stepping = UNFIT[optimizer]([first, second])
    stepping.step()  # nothing to step
    arrive(second, 3.0)
    message = (
        rf"{optimizer.split(',')[0]}\.step: a {dtype} parameter of shape \[2\] has the float32"
    )
    with pytest.raises(TypeError, match=message) as refusal:
        stepping.step()
    name = optimizer.split(",")[0]
    assert f"gradacc_kernels.MasterParams(params, torch.optim.{name}, ...)" in str(refusal.value)
    assert second.tolist() == [1.0, 2.0] and second.grad.tolist() == [3.0, 3.0]
    assert all(state["step"] == 0 for state in stepping.state.values())
    accumulator.detach()
    stepping.step()
    assert second.tolist() != [1.0, 2.0]


@every_hook
@pytest.mark.parametrize("optimizer", UNFIT)
def test_torch_refuses_them_too(hook, optimizer):
    """Else there would be nothing to refuse: the same dtypes, in gradients that are not ours."""
    device, _ = hook
    skip_where_missing(optimizer, device)
    param = parameter([1.0, 2.0], torch.bfloat16, device)
    param.grad_dtype = None
    param.grad = torch.ones(2, device=device)
    with pytest.raises(RuntimeError):
        UNFIT[optimizer]([param]).step()


@every_hook
@pytest.mark.parametrize("optimizer", FIT)
def test_left_alone(hook, optimizer):
    """A step is that of stock with the same gradient in float32 parameters, rounded."""
    device, backend = hook
    param = parameter([1.0, 2.0], torch.bfloat16, device)
    twin = parameter([1.0, 2.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    twin.grad = torch.full_like(twin, 3.0)
    for one in (param, twin):
        FIT[optimizer]([one]).step()
    torch.testing.assert_close(param.float(), twin, rtol=2**-7, atol=0, check_dtype=False)
    del accumulator


@every_hook
@pytest.mark.parametrize("optimizer", UNFIT)
def test_float32_parameters_are_stepped(hook, optimizer):
    device, backend = hook
    skip_where_missing(optimizer, device)
    param = parameter([1.0, 2.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    arrive(param, 3.0)
    UNFIT[optimizer]([param]).step()
    assert param.tolist() != [1.0, 2.0]
    del accumulator


@every_hook
def test_a_compiled_step(hook):
    device, backend = hook
    param = parameter([1.0, 2.0], torch.float32, device)
    accumulator = gk.attach([param], backend=backend)
    stepping = optim.AdamW([param], lr=0.5)
    arrive(param, 3.0)
    torch.compile(stepping.step, backend="eager")()
    assert param.tolist() != [1.0, 2.0]
    del accumulator
