"""What a window is: what begins, drops and ends it, and what is refused before it goes wrong.

Parameters are single numbers stepped by SGD with learning rate 1 from 0, so that a step shows the
gradient that it took.
"""

import threading

import pytest
import torch
from hook_cases import Raise, every_hook, needs_extension

import gradacc_kernels as gk

NAN = float("nan")


def zero(device="cpu", dtype=torch.float32):
    return torch.nn.Parameter(torch.zeros(1, device=device, dtype=dtype))


def bring(param, value):
    (param * value).sum().backward()


def sgd(*params):
    return torch.optim.SGD(params, lr=1.0)


@pytest.fixture
def one(hook):
    """A parameter, its Accumulator and its optimizer."""
    device, backend = hook
    param = zero(device)
    return param, gk.attach([param], backend=backend), sgd(param)


def two(hook, **options):
    device, backend = hook
    a, b = zero(device), zero(device)
    return a, b, gk.attach([a, b], backend=backend, **options)


def weighted(accumulator, param, weight, value):
    with accumulator.micro_batch(weight):
        bring(param, value)


# Beginning and dropping


@every_hook
@pytest.mark.parametrize("when", ["between", "before backward", "after backward"])
def test_zero_grad_drops_the_weight_with_the_gradients(one, when):
    param, accumulator, optimizer = one
    weighted(accumulator, param, 10, 5.0)
    if when == "between":
        optimizer.zero_grad()
    with accumulator.micro_batch(2):
        if when == "before backward":
            optimizer.zero_grad()
        bring(param, 3.0)
        if when == "after backward":
            optimizer.zero_grad()
    if when == "after backward":
        assert accumulator.weight.item() == 0
        weighted(accumulator, param, 2, 3.0)
    assert accumulator.weight.item() == 2
    accumulator.step(optimizer)
    assert param.item() == -3


@every_hook
def test_a_dropped_weighted_window_divides_no_other(one):
    param, accumulator, optimizer = one
    for _ in range(2):
        weighted(accumulator, param, 10, 5.0)
    optimizer.zero_grad()
    bring(param, 1.0)
    bring(param, 2.0)
    assert accumulator.grad_norm().item() == 3
    optimizer.step()
    assert param.item() == -3


@every_hook
def test_after_a_closed_window_anything_may_come(one):
    param, accumulator, optimizer = one
    weighted(accumulator, param, 4, 2.0)
    accumulator.step(optimizer)
    optimizer.zero_grad()
    bring(param, 1.0)
    with accumulator.micro_batch():
        bring(param, 1.0)
    accumulator.step(optimizer)
    assert param.item() == -4


@every_hook
def test_a_micro_batch_that_reaches_nothing_covered_counts_wherever_it_stands(hook):
    for first in (True, False):
        a, b, accumulator = two(hook)
        other = zero(a.device)
        for is_other in (first, not first):
            weighted(accumulator, other if is_other else a, 5 if is_other else 3, 1.0)
        assert accumulator.weight.item() == 8
        accumulator.step(sgd(a, b))
        assert a.item() == -3 / 8


@every_hook
def test_several_dtypes_are_one_window(hook):
    device, backend = hook
    a, b = zero(device), zero(device, torch.float64)
    accumulator = gk.attach([a, b], backend="auto")
    weighted(accumulator, a, 1, 3.0)
    weighted(accumulator, b, 2, 3.0)
    weighted(accumulator, a, 1, 1.0)
    accumulator.average_()
    assert (a.grad.item(), b.grad.item()) == (1, 1.5)
    sgd(a, b).step()
    assert accumulator.micro_batches == 0


@every_hook
def test_moving_parameters_keeps_the_window(one):
    param, accumulator, optimizer = one
    weighted(accumulator, param, 3, 1.0)
    param.data = param.data.to(torch.bfloat16)
    accumulator.refresh()
    weighted(accumulator, param, 5, 2.0)
    accumulator.average_()
    assert param.grad.item() == 13 / 8
    bring(param, 1.0)
    with pytest.raises(RuntimeError, match="arrived after this window was averaged"):
        accumulator.grad_norm()


@every_hook
@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_of_create_graph_are_counted(one):
    param, accumulator, optimizer = one
    for weight, value in ((3, 1.0), (5, 2.0)):
        with accumulator.micro_batch(weight):
            (param * value).sum().backward(create_graph=True)
    assert accumulator.micro_batches == 2
    accumulator.step(optimizer)
    assert param.item() == -13 / 8


@every_hook
def test_a_gradient_that_is_held_belongs_to_the_window_that_it_is_added_to(hook):
    a, b, accumulator = two(hook, nonfinite="skip_micro_batch")
    weighted(accumulator, a, 10, 5.0)
    with accumulator.micro_batch(2):
        bring(a, 3.0)
        a.grad = None
    assert accumulator.weight.item() == 2
    with pytest.raises(ValueError, match="in the middle"):
        (Raise.apply(a * 1.0).sum() + (b * 3.0).sum()).backward()  # adds nothing
    accumulator.step(sgd(a))
    assert a.item() == -3


@every_hook
def test_the_weight_of_a_window_without_gradients_ends_with_it(one):
    param, accumulator, optimizer = one
    weighted(accumulator, zero(param.device), 5, 1.0)
    accumulator.load_state_dict(accumulator.state_dict())
    assert accumulator.weight.item() == 5
    accumulator.step(optimizer)
    optimizer.zero_grad()
    weighted(accumulator, param, 3, 1.0)
    accumulator.step(optimizer)
    assert param.item() == -1


@every_hook
def test_optimizers_in_turn_may_leave_zeros(hook):
    a, b, accumulator = two(hook)
    optimizers = sgd(a), sgd(b)
    for _ in range(2):
        with accumulator.micro_batch(2):
            bring(a, 1.0)
            bring(b, 1.0)
        for optimizer in optimizers:
            accumulator.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
    assert (a.item(), b.item()) == (-2, -2)


@every_hook
def test_a_step_over_one_dtype_ends_the_window_of_all(hook):
    device, backend = hook
    a, b = zero(device), zero(device, torch.float64)
    accumulator = gk.attach([a, b], backend="auto")
    weighted(accumulator, a, 1, 3.0)
    weighted(accumulator, b, 2, 3.0)
    accumulator.average_()
    sgd(a).step()
    assert accumulator.micro_batches == 0 and accumulator.weight.item() == 0


def test_a_weight_is_divided_as_it_multiplied():
    param = zero(dtype=torch.float64)
    accumulator = gk.attach([param])
    weighted(accumulator, param, 0.1, 1.0)
    accumulator.average_()
    assert abs(param.grad.item() - 1) < 1e-15


# What is refused


@every_hook
@pytest.mark.parametrize("after", ["nothing", "a gradient", "another micro-batch", "zero_grad"])
def test_zero_grad_mends_what_an_exception_left(one, after):
    param, accumulator, optimizer = one
    if after in ("another micro-batch", "zero_grad"):
        weighted(accumulator, param, 10, 5.0)
    with pytest.raises(KeyError):
        with accumulator.micro_batch(2):
            if after == "zero_grad":
                optimizer.zero_grad()
            if after != "nothing":
                bring(param, 3.0)
            raise KeyError
    if after != "nothing":
        with pytest.raises(RuntimeError, match="an exception left a micro-batch"):
            weighted(accumulator, param, 2, 1.0)
        with pytest.raises(RuntimeError, match="weighted sum"):
            optimizer.step()
        optimizer.zero_grad()
    bring(param, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    weighted(accumulator, param, 2, 1.0)
    accumulator.step(optimizer)
    assert param.item() == -2


@every_hook
def test_parameters_do_not_move_under_a_gradient_that_has_arrived(hook):
    for nonfinite in ("skip_window", "skip_micro_batch"):
        a, _, accumulator = two(hook, nonfinite=nonfinite)
        weighted(accumulator, a, 3, 1.0)
        a.data = a.data.to(torch.bfloat16)  # followed by the next micro-batch
        with accumulator.micro_batch(5):
            bring(a, 2.0)
            a.data = a.data.float()
            with pytest.raises(RuntimeError, match="do that between micro-batches"):
                accumulator.refresh()
        accumulator.refresh()
        accumulator.step(sgd(a))
        assert a.item() == -13 / 8


@every_hook
@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_of_create_graph_cannot_be_held(hook):
    a, _, accumulator = two(hook, nonfinite="skip_micro_batch")
    with pytest.raises(RuntimeError, match="those of create_graph=True cannot"):
        a.sum().backward(create_graph=True)
    assert a.grad is None


@every_hook
def test_a_scale_that_may_not_change_does_not(one):
    param, accumulator, optimizer = one
    uncovered = zero(param.device)
    optimizer.add_param_group({"params": [uncovered]})
    scaler = gk.GradScaler(accumulator, init_scale=8.0)

    def loss():
        return scaler.scale((param + uncovered).sum())

    with accumulator.micro_batch(2):
        loss().backward()
        for change in (lambda: scaler.update(64.0), lambda: scaler.load_state_dict({})):
            with pytest.raises(RuntimeError, match="inside of micro_batch"):
                change()
    loss().backward()
    with pytest.raises(RuntimeError, match="outside of micro_batch"):
        accumulator.step(optimizer, scaler=scaler)
    optimizer.zero_grad()
    with accumulator.micro_batch(2):
        loss().backward()
    accumulator.step(optimizer, scaler=scaler)
    assert (param.item(), uncovered.item()) == (-1, -1)


@every_hook
def test_backwards_without_a_weight_are_seen_whatever_they_reach(hook):
    a, b, accumulator = two(hook)
    weighted(accumulator, a, 2, 1.0)
    bring(b, 1.0)
    with pytest.raises(RuntimeError, match="1 backwards of this window were outside"):
        accumulator.step(sgd(a, b))
    with pytest.raises(RuntimeError, match="a weight or none"):
        weighted(accumulator, a, 2, 1.0)


@every_hook
def test_what_raised_after_gradients_were_added_has_no_average(hook):
    a, b, accumulator = two(hook)
    weighted(accumulator, a, 2, 1.0)
    with pytest.raises(ValueError, match="in the middle"):
        with accumulator.micro_batch(2):
            (Raise.apply(a * 1.0).sum() + (b * 3.0).sum()).backward()
    if b.grad is None:  # it raised first
        return
    for refused in (accumulator.average_, accumulator.grad_norm, accumulator.state_dict):
        with pytest.raises(RuntimeError, match="an exception left a micro-batch"):
            refused()
    a.grad = b.grad = None
    weighted(accumulator, a, 2, 3.0)
    assert accumulator.grad_norm().item() == 3


@every_hook
@pytest.mark.parametrize("nonfinite", ["skip_window", "skip_micro_batch"])
def test_nothing_closes_inside_of_a_micro_batch(hook, nonfinite):
    a, _, accumulator = two(hook, nonfinite=nonfinite)
    optimizer = sgd(a)
    scaler = gk.GradScaler(accumulator, init_scale=1.0)
    with accumulator.micro_batch(2):
        scaler.scale(a.sum()).backward()
        for call in (
            lambda: accumulator.step(optimizer),
            lambda: scaler.step(optimizer),
            accumulator.average_,
            accumulator.grad_norm,
            accumulator.state_dict,
            accumulator.detach,
        ):
            with pytest.raises(RuntimeError, match="leave the block first"):
                call()
    accumulator.step(optimizer)
    assert a.item() == -1


@every_hook
def test_optimizers_at_different_paces_are_refused(hook):
    a, b, accumulator = two(hook)
    optimizer = sgd(a)
    for param in (a, b):
        weighted(accumulator, param, 4, 1.0)
    accumulator.step(optimizer)
    optimizer.zero_grad()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameter 1 still has the gradient of the last"):
            weighted(accumulator, a, 4, 1.0)
        accumulator.clip_grad_norm_(0.1)
    b.grad.zero_()
    weighted(accumulator, a, 4, 1.0)


@every_hook
def test_a_closure_steps_no_undivided_sum(one):
    param, accumulator, optimizer = one
    is_averaged = False

    def closure():
        optimizer.zero_grad()
        for weight, value in ((3, 1.0), (5, 2.0)):
            weighted(accumulator, param, weight, value)
        if is_averaged:
            accumulator.average_()

    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(RuntimeError, match="at the end of its closure"):
            step()
    assert param.item() == 0
    is_averaged = True
    optimizer.step(closure)
    assert param.item() == -13 / 8


@every_hook
def test_a_step_that_raised_can_be_made_again(hook):
    device, backend = hook
    param = zero(device, torch.bfloat16)
    accumulator = gk.attach([param], backend=backend)
    for weight, value in ((3, 1.0), (5, 2.0)):
        weighted(accumulator, param, weight, value)
    with pytest.raises(TypeError, match="MasterParams"):
        accumulator.step(torch.optim.AdamW([param], fused=True))
    accumulator.step(sgd(param))
    assert param.item() == -13 / 8


def test_weights_of_other_kinds():
    numpy = pytest.importorskip("numpy")
    param = zero()
    accumulator = gk.attach([param])
    for weight in (numpy.int64(3), torch.tensor([5])):
        weighted(accumulator, param, weight, 1.0)
    assert accumulator.weight.item() == 8
    for weight in (torch.tensor(-1.0), torch.tensor(NAN)):
        with pytest.raises(ValueError, match="finite and not negative"):
            accumulator.micro_batch(weight)


def test_threads_take_turns_or_are_refused():
    params = [zero() for _ in range(4)]
    accumulator = gk.attach(params)
    refused = []

    def work(param):
        for _ in range(50):
            try:
                weighted(accumulator, param, 3, 1.0)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work, args=[param]) for param in params]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accumulator.inv_scale.item() == 1
    assert all("inside of another" in message for message in refused)
    assert accumulator.weight.item() == 3 * (200 - len(refused))


# What is not finite


@every_hook
def test_clipping_by_a_norm_that_is_nan_steps_nothing(hook):
    a, b, accumulator = two(hook)
    bring(a, 1.0)
    bring(b, NAN)
    accumulator.step(sgd(a), max_norm=1.0)
    assert a.item() == 0 and a.grad.item() == 1
    assert accumulator.counters["skipped_windows"].item() == 1


@every_hook
def test_a_window_of_weight_0_is_no_overflow(one):
    param, accumulator, optimizer = one
    scaler = gk.GradScaler(accumulator, init_scale=1024.0)
    with accumulator.micro_batch(0):
        scaler.scale(param.sum()).backward()
    accumulator.step(optimizer, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 1024 and param.item() == 0


@every_hook
def test_a_window_of_weight_0_is_skipped_by_every_optimizer(hook):
    a, b, accumulator = two(hook)
    with accumulator.micro_batch(0):
        bring(a, 1.0)
        bring(b, 1.0)
    with torch.no_grad():
        a.fill_(1.0)
        b.fill_(1.0)
    for param in (a, b):
        accumulator.step(torch.optim.SGD([param], lr=1.0, weight_decay=0.5))
    assert (a.item(), b.item()) == (1, 1)


@every_hook
def test_what_was_dropped_with_its_window_or_weighed_nothing_is_no_overflow(hook):
    a, _, accumulator = two(hook, nonfinite="skip_micro_batch")
    optimizer, scaler = sgd(a), gk.GradScaler(accumulator, init_scale=8.0)
    scaler.scale((a * NAN).sum()).backward()
    optimizer.zero_grad()
    scaler.scale(a.sum()).backward()
    accumulator.step(optimizer, scaler=scaler)
    scaler.update()
    optimizer.zero_grad()
    for weight, value in ((0, NAN), (2, 1.0)):
        with accumulator.micro_batch(weight):
            scaler.scale((a * value).sum()).backward()
    accumulator.step(optimizer, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 8 and a.item() == -2


@every_hook
def test_zeros_are_not_raised_for(hook):
    a, _, accumulator = two(hook, nonfinite="raise")
    optimizer = sgd(a)
    bring(a, NAN)
    with pytest.raises(FloatingPointError, match="to 0"):
        accumulator.step(optimizer)
    optimizer.zero_grad(set_to_none=False)
    bring(a, 1.0)
    accumulator.step(optimizer)
    assert a.item() == -1


@every_hook
def test_raise_leaves_the_scaler_as_it_was(hook):
    device, backend = hook
    a, uncovered = zero(device), zero(device)
    accumulator = gk.attach([a], backend=backend, nonfinite="raise")
    optimizer, scaler = sgd(a, uncovered), gk.GradScaler(accumulator, init_scale=8.0)
    scaler.scale((a * NAN + uncovered).sum()).backward()
    with pytest.raises(FloatingPointError):
        accumulator.step(optimizer, scaler=scaler)
    optimizer.zero_grad()
    scaler.scale((a + uncovered).sum()).backward()
    accumulator.step(optimizer, scaler=scaler)
    assert (a.item(), uncovered.item()) == (-1, -1)


@every_hook
@pytest.mark.parametrize("nonfinite", ["skip_micro_batch", "raise"])
def test_what_was_bad_is_saved(hook, nonfinite):
    seen = []
    for is_resumed in (False, True):
        device, backend = hook
        param = zero(device)
        accumulator = gk.attach([param], backend=backend, nonfinite=nonfinite)
        scaler = gk.GradScaler(accumulator, init_scale=8.0)
        scaler.scale((param * NAN).sum()).backward()
        if is_resumed:
            state, others = accumulator.state_dict(), scaler.state_dict()
            param = zero(device)
            accumulator = gk.attach([param], backend=backend, nonfinite=nonfinite)
            accumulator.load_state_dict(state)
            scaler = gk.GradScaler(accumulator)
            scaler.load_state_dict(others)
        scaler.scale(param.sum()).backward()
        try:
            accumulator.step(sgd(param), scaler=scaler)
            scaler.update()
            seen.append(scaler.get_scale())
        except FloatingPointError as error:
            seen.append(str(error))
    assert seen[0] == seen[1]
    assert seen[0] == 4 if nonfinite == "skip_micro_batch" else "micro-batch 1 of 2" in seen[0]


@every_hook
def test_dropping_the_accumulator_of_a_list_leaves_the_average(hook):
    device, backend = hook
    param = zero(device)
    accumulator = gk.attach([param], backend=backend)
    for weight, value in ((3, 1.0), (5, 2.0)):
        weighted(accumulator, param, weight, value)
    del accumulator
    assert param.grad.item() == 13 / 8


# Whose memory it is


class Reused(torch.autograd.Function):
    """Multiplies by a number; its backward returns the same tensor each time."""

    buffer = None

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        if Reused.buffer is None:
            Reused.buffer = torch.empty_like(grad)
        return Reused.buffer.copy_(grad * ctx.factor), None


@needs_extension
@pytest.mark.parametrize("nonfinite", ["skip_window", "skip_micro_batch"])
@pytest.mark.parametrize("hook", [("cpu", "cpu"), ("cpu", "reference")])
def test_a_gradient_that_somebody_else_has_may_change(hook, nonfinite, monkeypatch):
    monkeypatch.setitem(gk.hook.QUEUE_BELOW, "cpu", 1 << 20)
    monkeypatch.setattr(Reused, "buffer", None)
    if hook[1] == "reference" and nonfinite == "skip_window":
        pytest.skip("the hook in Python cannot tell who else has a tensor that waits in a queue")
    a, b, _accumulator = two(hook, nonfinite=nonfinite)
    (Reused.apply(a, 1.0) + Reused.apply(b, 10.0)).sum().backward()
    assert (a.grad.item(), b.grad.item()) == (1, 10)


@every_hook
def test_a_main_gradient_that_was_kept_shares_the_version_counter(hook):
    device, backend = hook
    param = torch.nn.Parameter(torch.zeros(8, device=device))
    accumulator = gk.attach([param], backend=backend)
    main = param.main_grad
    bring(param, 1.0)
    assert param.grad is main
    main.mul_(3)
    accumulator.clip_grad_norm_(1.0)
    torch.testing.assert_close(param.grad.norm().item(), 1.0)
    param.grad = None
    bring(param, 2.0)
    main.mul_(3)
    torch.testing.assert_close(accumulator.grad_norm(from_statistics=True).item(), 6 * 8**0.5)


@every_hook
def test_a_step_ends_the_window_of_every_attachment_that_it_steps(hook):
    device, backend = hook
    a, b = zero(device), zero(device)
    first, second = (gk.attach([param], backend=backend) for param in (a, b))
    bring(a, 1.0)
    bring(b, 1.0)
    sgd(a, b).step()
    assert (first.micro_batches, second.micro_batches) == (0, 0)
