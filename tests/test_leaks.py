"""Memory is flat over a thousand windows, and over twenty attachments.

No tensor, Python object or C++ object stays behind.
"""

import ctypes
import gc
import time
from typing import NamedTuple

import pytest
import torch
from fused_cases import every_device
from hook_cases import every_hook
from torch._subclasses.fake_tensor import FakeTensor

import gradacc_kernels as gk

WARM_UP, WINDOWS = 30, 300
WARM_UP_ATTACHMENTS, ATTACHMENTS, WINDOWS_OF_ATTACHMENT = 2, 20, 10
VOCABULARY, WIDTH, INNER = 64, 32, 256

# By how much malloc's bytes may grow: what any object of C++ left behind in every window exceeds,
# for malloc hands out no less than 32 bytes, and a node or a tensor takes some hundred. Growth
# without a leak, of caches and lists, is a few thousand. A CUDA allocator's bytes may not grow.
MAY_GROW = {"cpu": 32 * (WINDOWS - WARM_UP), "cuda": 0}
# Nor what Python's garbage collector knows, by an object in each attachment.
MAY_GROW_OBJECTS = ATTACHMENTS - WARM_UP_ATTACHMENTS - 1


class Live(NamedTuple):
    """Tensors with a Python object, objects of the garbage collector, bytes of a device's memory.

    On the CPU malloc's bytes, of tensors and of C++ objects alike, and not the pages of the
    process, in which a leak may fill holes that earlier tests have left.
    """

    tensors: int
    objects: int
    nbytes: int


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        )
    ]


def _malloc_bytes():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def _why_not_counted():
    try:
        before = _malloc_bytes()
    except AttributeError:
        return "the C library has no mallinfo2"
    tensor = torch.empty(1 << 20)
    counted = _malloc_bytes() - before
    return None if counted >= tensor.nbytes else "another malloc than the C library's is loaded"


needs_counts = pytest.mark.skipif(_why_not_counted() is not None, reason=str(_why_not_counted()))


def live(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    nbytes = torch.cuda.memory_allocated() if device == "cuda" else _malloc_bytes()
    objects = gc.get_objects()
    # Not those without memory, some of which torch.compile drops long after tests that used it.
    kinds = (type(o) for o in objects)
    tensors = sum(issubclass(kind, torch.Tensor) and kind is not FakeTensor for kind in kinds)
    return Live(tensors, len(objects), nbytes)


def settled(device, is_done):
    """What is alive once is_done of it, or after ten seconds.

    The engine's thread of a GPU holds the last node that it ran until it has gone to sleep.
    """
    end = time.monotonic() + 10
    while not is_done(now := live(device)) and time.monotonic() < end:
        time.sleep(0.001)
    return now


def growth(device, run, warm_up=WARM_UP, runs=WINDOWS):
    """By how much what is alive grows from the run number warm_up to the last, as a Live."""
    for number in range(1, warm_up + 1):
        run(number)
    time.sleep(0.05)
    before = live(device)
    for number in range(warm_up + 1, runs + 1):
        run(number)
    after = settled(device, lambda now: is_flat(device, difference(now, before)))
    return difference(after, before)


def difference(after, before):
    return Live(*(a - b for a, b in zip(after, before, strict=True)))


def is_flat(device, grown):
    return (
        grown.tensors == 0
        and grown.objects <= MAY_GROW_OBJECTS
        and grown.nbytes <= MAY_GROW[device]
    )


class Training:
    """Windows of two micro-batches; every other zero_grad leaves zeros in place of None."""

    def __init__(self, hook, fuse):
        self.device, self.backend = hook
        self.fuse = fuse
        self.model = torch.nn.Sequential(
            torch.nn.Embedding(VOCABULARY, WIDTH),
            torch.nn.Linear(WIDTH, INNER),
            torch.nn.GELU(),
            torch.nn.LayerNorm(INNER),
            torch.nn.Linear(INNER, VOCABULARY, bias=False),
        ).to(self.device, torch.bfloat16)
        self.x = torch.randint(VOCABULARY, (16,), device=self.device)
        self.attach()

    def attach(self):
        self.accumulator = gk.attach(self.model, backend=self.backend, fuse=self.fuse)

    def window(self, number):
        for _ in range(2):
            self.model(self.x).sum().backward()
        self.model.zero_grad(set_to_none=number % 2 == 0)

    def attachment(self, number):
        for window in range(WINDOWS_OF_ATTACHMENT):
            self.window(window)
        self.accumulator.detach()
        self.attach()

    @property
    def smallest_gradient(self):
        """That of the first bias, in a dtype and memory of its own."""
        return self.model[1].bias.grad.to(torch.bfloat16)


@pytest.fixture
def at_once(monkeypatch):
    """No waiting for what does not go away."""
    monkeypatch.setattr("test_leaks.settled", lambda device, _: live(device))


@needs_counts
@every_hook
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
def test_memory_is_flat_over_hundreds_of_windows(hook, fuse):
    training = Training(hook, fuse)
    grown = growth(training.device, training.window)
    assert is_flat(training.device, grown), grown


@needs_counts
@every_hook
@pytest.mark.parametrize("fuse", [False, True], ids=["hook", "fused"])
def test_memory_is_flat_over_attachments(hook, fuse):
    training = Training(hook, fuse)
    grown = growth(training.device, training.attachment, WARM_UP_ATTACHMENTS, ATTACHMENTS)
    assert is_flat(training.device, grown), grown


# The measurement itself, on leaks made on purpose.


@needs_counts
@every_device
def test_a_gradient_kept_in_every_window_is_found(device, at_once):
    training, kept = Training((device, "auto"), False), []

    def window(number):
        training.window(2 * number + 1)
        kept.append(training.smallest_gradient)

    grown = growth(device, window)
    assert grown.tensors == WINDOWS - WARM_UP
    assert grown.nbytes > grown.tensors * kept[0].nbytes / 2 > MAY_GROW[device]


@needs_counts
@every_device
def test_what_only_cpp_holds_is_found_too(device, at_once):
    training = Training((device, "auto"), False)
    chain = torch.zeros(8, device=device, requires_grad=True)

    def window(number):
        nonlocal chain
        training.window(number)
        chain = chain.sigmoid()  # its node saves its result

    grown = growth(device, window)
    assert grown.tensors == 0 and grown.objects <= MAY_GROW_OBJECTS
    assert grown.nbytes > MAY_GROW[device]


@needs_counts
@every_device
def test_a_buffer_kept_by_every_attachment_is_found(device, at_once):
    training, kept = Training((device, "auto"), False), []

    def attachment(number):
        (group,) = training.accumulator._attachment.groups
        kept.append(group.buffer.flat)
        training.attachment(number)

    grown = growth(device, attachment, WARM_UP_ATTACHMENTS, ATTACHMENTS)
    assert grown.tensors == len(kept) - WARM_UP_ATTACHMENTS
    assert grown.nbytes > MAY_GROW[device]
