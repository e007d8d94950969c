"""A call of each kernel, with the bytes and operations that it needs: to check, and to time.

least seconds = max(bytes / rate of a copy, operations / rate of a matrix product)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradacc_kernels import ops

TOKENS = 256  # few, so that memory bounds weight gradients too
WIDTH = 4096
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """One kernel over so many elements.

    Attributes:
        nbytes: that have to be read and written.
        run: calls it.
        result: returns what it wrote last.
        operations: floating-point, of a matrix product.
    """

    nbytes: int
    run: Callable[[], object]
    result: Callable[[], Tensor]
    operations: int = 0


def calls(n: int, backend: str, device: torch.device) -> dict[str, Call]:
    """Returns a call of each kernel over n elements of the main gradient, by its name."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    main = normal(n)
    grads = {dtype: normal(n).to(dtype) for dtype in DTYPES}
    factor = torch.full((), 0.999, device=device)
    slots = torch.empty(ops.num_chunks(n), device=device)
    found = {}
    for dtype, grad in grads.items():
        for store in (False, True):
            name = f"accumulate_ {'store' if store else 'add'} {str(dtype).removeprefix('torch.')}"
            found[name] = Call(
                (6 if store else 10) * n,
                lambda grad=grad, store=store: ops.accumulate_(
                    main, grad, scale=0.7, store=store, partials=slots, backend=backend
                ),
                lambda: main,
            )
    # Odd sizes, so that neither vectors nor chunks come out even.
    parts = [n // 3, n // 5, 0, n - n // 3 - n // 5]
    mains, halves = main.split(parts), grads[torch.bfloat16].split(parts)
    found["multi_accumulate_ bfloat16"] = Call(
        10 * n,
        lambda: ops.multi_accumulate_(mains, halves, scale=0.7, backend=backend),
        lambda: main,
    )
    found["scale_"] = Call(8 * n, lambda: ops.scale_([main], factor, backend=backend), lambda: main)
    sums: list[Tensor] = []
    found["grad_stats"] = Call(
        4 * n,
        lambda: sums.append(ops.grad_stats([main], backend=backend)[0]),
        lambda: sums[-1],
    )
    if n < WIDTH:
        return found
    rows = n // WIDTH
    table = main[: rows * WIDTH].view(rows, WIDTH)
    dy, x, looked_up = (normal(TOKENS, width).bfloat16() for width in (rows, WIDTH, WIDTH))
    indices = torch.randint(rows, (TOKENS,), device=device, generator=generator)
    found["wgrad_accumulate_ bfloat16"] = Call(
        8 * table.numel() + 2 * (dy.numel() + x.numel()),
        lambda: ops.wgrad_accumulate_(table, dy, x, scale=0.7, backend=backend),
        lambda: main,
        operations=2 * TOKENS * table.numel(),
    )
    found["embedding_accumulate_ bfloat16"] = Call(
        10 * TOKENS * WIDTH,
        lambda: ops.embedding_accumulate_(table, looked_up, indices, scale=0.7, backend=backend),
        lambda: main,
    )
    return found


def seconds_of(run: Callable[[], object], device: torch.device, repetitions: int = 10) -> float:
    """Returns the median seconds of a call: by events on a GPU, else by a clock on the wall."""
    run()
    if device.type != "cuda":
        times = []
        for _ in range(repetitions):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def copy_rate(nbytes: int, device: torch.device) -> float:
    """Returns the bytes a second of a copy that reads and writes so many in all."""
    source = torch.randn(max(1, nbytes // 8), device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def product_rate(device: torch.device) -> float:
    """Returns the operations a second of a matrix product in bfloat16."""
    width = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    return 2 * width**3 / seconds_of(lambda: a @ b, device)
