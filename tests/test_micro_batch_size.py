"""find_micro_batch_size, with a memory that is a number."""

import gc
import weakref

import pytest
import torch
from hook_cases import batch, mlp

import gradacc_kernels as gk
from gradacc_kernels.micro_batch_size import OUT_OF_MEMORY, is_out_of_memory


def memory_of(limit, error=None):
    """A step that fits `limit` samples, and what it was called with."""
    calls = []

    def fn(n):
        calls.append(n)
        if n > limit:
            raise error or torch.OutOfMemoryError(f"CUDA out of memory: {n}")

    return fn, calls


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("limit", [3, 4, 5, 37, 64, 1000])
def test_the_largest_that_fits(limit, start):
    fn, calls = memory_of(limit)
    found = gk.find_micro_batch_size(fn, start=start)
    assert found.micro_batch == found.largest == limit
    assert found.micro_batches == 1 and found.sizes == (limit,)
    assert found.trials == {n: n <= limit for n in calls}
    assert len(calls) == len(set(calls)) <= 2 * limit.bit_length() + 1


@pytest.mark.parametrize("limit", [1, 7, 37, 512])
@pytest.mark.parametrize("effective", [1, 36, 509])
def test_k_keeps_the_effective_batch(limit, effective):
    fn, calls = memory_of(limit)
    found = gk.find_micro_batch_size(fn, effective_batch=effective)
    assert sum(found.sizes) == effective and len(found.sizes) == found.micro_batches
    assert found.micro_batch == max(found.sizes) <= limit
    assert max(found.sizes) - min(found.sizes) <= 1
    assert found.micro_batches == -(-effective // min(limit, effective))  # no more than needed
    parts = torch.arange(effective).tensor_split(found.micro_batches)
    assert tuple(map(len, parts)) == found.sizes
    assert max(calls) <= effective


def test_bounds():
    fn, calls = memory_of(1000)
    assert gk.find_micro_batch_size(fn, most=100).micro_batch == 100
    assert calls == [1, 2, 4, 8, 16, 32, 64, 100]
    fn, calls = memory_of(50)
    assert gk.find_micro_batch_size(fn, start=16, most=60, effective_batch=200).sizes == (50,) * 4
    fn, calls = memory_of(3)
    with pytest.raises(RuntimeError, match="a micro-batch of 4 does not fit"):
        gk.find_micro_batch_size(fn, start=4)
    assert calls == [4]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_other_ways_to_say_out_of_memory(text):
    fn, _ = memory_of(5, RuntimeError(f"{text} when calling something"))
    assert gk.find_micro_batch_size(fn).micro_batch == 5


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_pass_and_the_state_is_cleaned(error):
    fn, _ = memory_of(5, error)
    cleaned = []
    with pytest.raises(type(error)) as raised:
        gk.find_micro_batch_size(fn, zero_grad=lambda: cleaned.append(True))
    assert raised.value is error and not is_out_of_memory(error)
    assert len(cleaned) == 4  # after 1, 2, 4 and 8


def test_gradients_are_dropped_and_a_window_can_begin():
    """Also where memory ends in the middle of a weighted micro-batch, which breaks its window."""
    model = mlp(dtype=torch.float32)
    accumulator = gk.attach(model)

    def fn(n):
        assert all(param.grad is None for param in model.parameters())
        with accumulator.micro_batch(n):
            model(batch(dtype=torch.float32, rows=n)).sum().backward()
            if n > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")

    found = gk.find_micro_batch_size(fn, effective_batch=20, zero_grad=model.zero_grad)
    assert found.sizes == (5, 5, 5, 5) and found.largest == 6
    assert all(param.grad is None for param in model.parameters())
    for n in found.sizes:
        with accumulator.micro_batch(n):
            model(batch(dtype=torch.float32, rows=n)).sum().backward()
    assert accumulator.weight.item() == 20
    accumulator.average_()


def test_what_failed_is_released():
    """The error's traceback holds the frame that holds the activations."""
    alive = weakref.WeakSet()

    def fn(n):
        assert not alive
        activations = torch.ones(n)
        alive.add(activations)
        if n > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert gk.find_micro_batch_size(fn).micro_batch == 3
    assert not alive


def test_bad_arguments():
    fn, calls = memory_of(5)
    for options, kind, match in (
        ({"start": 0}, ValueError, "start must be a positive int, got 0"),
        ({"most": 2.5}, ValueError, "most must be a positive int, got 2.5"),
        ({"effective_batch": True}, ValueError, "effective_batch must be a positive int, got True"),
        ({"start": 9, "effective_batch": 8}, ValueError, "start must be at most 8"),
        ({"margin": 1}, ValueError, r"margin must be in \[0, 1\), got 1"),
        ({"zero_grad": 3}, TypeError, "must be callable, got 3"),
        ({"process_group": 3}, RuntimeError, "needs torch.distributed"),
    ):
        with pytest.raises(kind, match=match):
            gk.find_micro_batch_size(fn, **options)
    with pytest.raises(TypeError, match="must be callable, got 3"):
        gk.find_micro_batch_size(3)
    assert not calls


def test_what_never_runs_out_of_memory_ends():
    calls = []
    with pytest.raises(RuntimeError, match="all sizes up to 2147483648 fit"):
        gk.find_micro_batch_size(calls.append)
    assert calls == [1 << power for power in range(32)]
    assert gk.find_micro_batch_size(calls.append, most=5).largest == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_memory_of_a_gpu():
    """A sample takes 1 GiB; what fits leaves the margin, and all is given back."""
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()  # what tests before this one have left
    before = torch.cuda.memory_allocated()

    def fn(n):
        torch.empty(n << 30, dtype=torch.uint8, device="cuda")

    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - before
    found = gk.find_micro_batch_size(fn, margin=0.25)
    assert abs(found.largest - (free - 0.25 * total) / 2**30) <= 1.5
    assert torch.cuda.memory_allocated() == before
