"""A window that is saved in the middle, and finished by another process."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hook_cases import backward, batch, every_hook, mlp, parameter

import gradacc_kernels as gk

K, STOP = 8, 3


def attached(hook, seed=0, **options):
    device, backend = hook
    torch.manual_seed(seed)
    model = mlp(device)
    return model, gk.attach(model, backend=backend, **options)


def micro_batches(device, seed=7):
    torch.manual_seed(seed)
    return [batch(device) for _ in range(K)]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@every_hook
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
def test_a_resumed_window_is_the_uninterrupted_one(hook, fuse):
    whole, accumulator = attached(hook, scale=1 / K, fuse=fuse)
    first, saved_by = attached(hook, scale=1 / K, fuse=fuse)
    data = micro_batches(hook[0])
    for x in data:
        backward(whole, x)
    assert accumulator.micro_batches == K
    for x in data[:STOP]:
        backward(first, x)
    assert saved_by.micro_batches == STOP
    state = through_a_file(saved_by.state_dict())
    weights = through_a_file(first.state_dict())

    second, loaded_by = attached(hook, seed=1, scale=1 / K, fuse=fuse)
    second.load_state_dict(weights)
    backward(second, data[0])  # what is there is dropped
    loaded_by.load_state_dict(state)
    assert loaded_by.micro_batches == STOP
    norms = loaded_by.grad_norm(), loaded_by.grad_norm(from_statistics=True)
    torch.testing.assert_close(norms[0], saved_by.grad_norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
    for x in data[STOP:]:
        backward(second, x)
    assert loaded_by.micro_batches == K
    for param, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert param.grad.equal(expected.grad)


def a_run():
    """What each process makes anew, of one seed: a model, its accumulator and the data."""
    torch.manual_seed(0)
    model = mlp()
    return model, gk.attach(model, backend="reference"), [batch() for _ in range(8)]


FIRST = """
import sys
import torch
from hook_cases import backward
from test_save_resume import a_run

torch.set_num_threads(1)  # as in the tests
model, accumulator, data = a_run()
for x in data[:3]:
    backward(model, x)
torch.save(accumulator.state_dict(), sys.argv[1])
"""


def test_a_new_process_finishes_it(tmp_path):
    """That of the tests, after another has saved and is gone."""
    command = [sys.executable, "-c", FIRST, str(tmp_path / "window")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    whole, accumulator, data = a_run()
    for x in data:
        backward(whole, x)
    resumed, accumulator, data = a_run()
    accumulator.load_state_dict(torch.load(tmp_path / "window"))
    assert accumulator.micro_batches == 3
    for x in data[3:]:
        backward(resumed, x)
    for param, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert param.grad.equal(expected.grad)


@every_hook
def test_what_has_begun_is_remembered(hook):
    device, backend = hook
    params = [parameter([1.0, 2.0], device=device) for _ in range(3)]
    accumulator = gk.attach(params, backend=backend)
    params[0].sum().backward()
    (params[0] * 2).sum().backward()
    params[1].grad = torch.ones(2, device=device)  # the user's, before any micro-batch
    state = accumulator.state_dict()
    assert {key: value.tolist() for key, value in state.items()} == {
        "format": 3,
        "scale": 1.0,
        "window": [-1.0, 0.0, 0.0],
        "backwards": 2,
        "micro_batches.0": 2,
        "main_grad.0": [3.0, 3.0],
        "micro_batches.1": 0,
        "main_grad.1": [1.0, 1.0],
        "micro_batches.2": -1,
    }
    params[0].grad.zero_()
    params[2].sum().backward()
    assert state["main_grad.0"].tolist() == [3.0, 3.0]
    accumulator.load_state_dict(state)
    assert [p.grad if p.grad is None else p.grad.tolist() for p in params] == [
        [3.0, 3.0],
        [1.0, 1.0],
        None,
    ]
    sum(p.sum() for p in params).backward()
    assert [p.grad.tolist() for p in params] == [[4.0, 4.0], [2.0, 2.0], [1.0, 1.0]]
    assert accumulator.micro_batches == 3


@every_hook
def test_sums_that_require_grad_are_loaded_as_values(hook):
    model, accumulator = attached(hook)
    backward(model, batch(hook[0]))
    state = accumulator.state_dict()
    for key, value in state.items():
        value.requires_grad_(key.startswith("main_grad."))
    accumulator.load_state_dict(state)
    backward(model, batch(hook[0]))
    for param in model.parameters():
        assert not param.grad.requires_grad and not param.main_grad.requires_grad


@every_hook
def test_safetensors_takes_it(hook, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, accumulator = attached(hook)
    backward(model, batch(hook[0]))
    state = accumulator.state_dict()
    safetensors.save_file(state, tmp_path / "window")
    model.zero_grad()
    accumulator.load_state_dict(safetensors.load_file(tmp_path / "window"))
    for name, param in model.named_parameters():
        assert param.grad.equal(state[f"main_grad.{name}"])


def lacking(key):
    return lambda state: state.pop(key)


def setting(key, value):
    return lambda state: state.update({key: value})


WRONG = {
    "no state": (lambda state: state.clear(), ValueError, "no state of an Accumulator"),
    "another version": (setting("format", torch.tensor(1)), ValueError, "has format 1"),
    "another scale": (setting("scale", torch.tensor(0.5)), ValueError, "scaled by 0.5"),
    "a weight below zero": (
        setting("window", torch.tensor([-3.0, 0.0, 0.0], dtype=torch.float64)),
        ValueError,
        "the weight -3",
    ),
    "truncated": (lacking("micro_batches.3.weight"), ValueError, "it lacks 3.weight"),
    "a sum too few": (lacking("main_grad.0.bias"), ValueError, "0.bias has the count 1 and no sum"),
    "a count too few": (
        setting("micro_batches.0.bias", torch.tensor(-1)),
        ValueError,
        "0.bias has the count -1 and a sum",
    ),
    "another model": (
        setting("main_grad.4.weight", torch.zeros(2)),
        ValueError,
        "nothing here is called main_grad.4.weight",
    ),
    "another shape": (
        setting("main_grad.0.bias", torch.zeros(3)),
        ValueError,
        r"must be torch.float32 of shape \[64\], got torch.float32 of shape \[3\]",
    ),
    "another dtype": (
        setting("main_grad.0.bias", torch.zeros(64, dtype=torch.bfloat16)),
        ValueError,
        "got torch.bfloat16",
    ),
    "a sparse sum": (
        setting("main_grad.0.bias", torch.zeros(64).to_sparse()),
        ValueError,
        "must be dense",
    ),
    "a count that is none": (
        setting("micro_batches.0.bias", torch.tensor(1.5)),
        ValueError,
        "cannot have seen 1.5",
    ),
    "a count of NaN": (
        setting("micro_batches.0.bias", torch.tensor(torch.nan)),
        ValueError,
        "cannot have seen nan",
    ),
    "a count without end": (
        setting("micro_batches.0.bias", torch.tensor(torch.inf)),
        ValueError,
        "cannot have seen inf",
    ),
    "two counts": (setting("micro_batches.0.bias", torch.ones(2)), ValueError, "must be one"),
    "no tensor": (setting("scale", 1.0), TypeError, "got float for 'scale'"),
    "no name": (lambda state: state.update({3: torch.ones(1)}), TypeError, "for 3"),
}


@every_hook
@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_loaded_changes_nothing(hook, what):
    change, error, message = WRONG[what]
    model, accumulator = attached(hook)
    backward(model, batch(hook[0]))
    state = accumulator.state_dict()
    change(state)
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    with pytest.raises(error, match=message):
        accumulator.load_state_dict(state)
    for param, (grad, value) in zip(model.parameters(), before, strict=True):
        assert param.grad is grad and grad.equal(value)
    assert accumulator.micro_batches == 1


def test_no_mapping_is_refused():
    _, accumulator = attached(("cpu", "reference"))
    with pytest.raises(TypeError, match="got list"):
        accumulator.load_state_dict([])


# Where a window begins


@every_hook
def test_micro_batches_of_several_windows(hook):
    model, accumulator = attached(hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = [accumulator.micro_batches]
    for set_to_none in (True, False, True):
        for x in micro_batches(hook[0])[:3]:
            backward(model, x)
            counts.append(accumulator.micro_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert counts == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert accumulator.micro_batches == 0


@every_hook
def test_a_window_that_is_dropped_is_not_counted(hook):
    model, accumulator = attached(hook)
    backward(model, batch(hook[0]))
    model.zero_grad()
    assert accumulator.micro_batches == 0
    backward(model, batch(hook[0]))
    assert accumulator.micro_batches == 1


@every_hook
def test_one_backward_is_one_micro_batch(hook, queueing):
    device, backend = hook
    param = parameter([1.0], device=device)
    accumulator = gk.attach([param], backend=backend)
    (param * 2 + param * 3).sum().backward()
    assert accumulator.micro_batches == 1
    loss = (param * 2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert accumulator.micro_batches == 3


@every_hook
def test_a_step_of_another_model_ends_no_window(hook):
    model, accumulator = attached(hook)
    other = mlp(hook[0])
    for x in micro_batches(hook[0])[:2]:
        backward(model, x)
        backward(other, x)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert accumulator.micro_batches == 2


@every_hook
def test_a_cast_in_the_middle_keeps_sums_and_count(hook):
    model, accumulator = attached(hook)
    for x in micro_batches(hook[0])[:2]:
        backward(model, x)
    sums = [p.grad.clone() for p in model.parameters()]
    model.half()
    state = accumulator.state_dict()
    assert accumulator.micro_batches == 2
    for (name, param), total in zip(model.named_parameters(), sums, strict=True):
        assert state[f"main_grad.{name}"].equal(total) and param.grad.equal(total)
