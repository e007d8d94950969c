"""``python -m gradacc_kernels``: what is installed, and whether the kernels work on this GPU.

``python -m gradacc_kernels tune`` measures which weight gradient kernel is fastest: see tune.py.
``python -m gradacc_kernels report run.jsonl`` writes a page about a run: see report.py.
"""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Callable

import torch

import gradacc_kernels
from gradacc_kernels import dispatch, ops, report, tune

CHECKED = (1 << 20) + 5  # elements compared with the reference backend
TIMED = 1 << 27  # elements timed: 0.8 GB of main and grad, well past any L2
TOKENS = 256  # few, so that memory bounds weight gradients too
WIDTH = 4096
REPETITIONS = 10


def print_installation() -> None:
    """Prints versions, backends and devices."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "not installed"
    print(
        f"gradacc_kernels {gradacc_kernels.__version__}\n"
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda or 'none'}, triton {triton_version}"
    )
    extension = dispatch.extension()
    print("\nbackends")
    for backend in dispatch.BACKENDS:
        reason = dispatch.why_missing(backend)
        details = ""
        if reason is None and backend == "cuda":
            details = f" (built for {extension.CUDA_ARCHITECTURES})"
        if reason is None and backend == "cpu":
            details = f" ({extension.cpu_isa()}, {torch.get_num_threads()} threads)"
        print(f"  {backend:<10} {'yes' + details if reason is None else 'no: ' + reason}")
    print("\ndevices")
    print(f"  cpu        {platform.machine()}, served by {_served('cpu')}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(
            f"  cuda:{index}     {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}, served by {_served(f'cuda:{index}')}"
        )


def _served(device: str) -> str:
    return dispatch.choose(torch.device(device), torch.float32)


def _time(run: Callable[[], object]) -> float:
    """Median seconds of a call on the current CUDA device."""
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def _calls(n: int, backend: str) -> dict[str, tuple[int, Callable, Callable]]:
    """For each kernel: the bytes that it moves, the call, and what it writes."""
    generator = torch.Generator("cuda").manual_seed(0)
    main = torch.randn(n, device="cuda", generator=generator)
    grads = {
        dtype: torch.randn(n, device="cuda", generator=generator).to(dtype)
        for dtype in (torch.bfloat16, torch.float16)
    }
    factor = torch.full((), 0.999, device="cuda")
    slots = torch.empty(ops.num_chunks(n), device="cuda")
    calls = {}
    for dtype, grad in grads.items():
        for store in (False, True):
            name = f"accumulate_ {'store' if store else 'add'} {str(dtype).removeprefix('torch.')}"
            calls[name] = (
                (6 if store else 10) * n,
                lambda grad=grad, store=store: ops.accumulate_(
                    main, grad, scale=0.7, store=store, partials=slots, backend=backend
                ),
                lambda: main,
            )
    # Odd sizes, so that neither vectors nor chunks come out even.
    parts = [n // 3, n // 5, 0, n - n // 3 - n // 5]
    mains, halves = main.split(parts), grads[torch.bfloat16].split(parts)
    calls["multi_accumulate_ bfloat16"] = (
        10 * n,
        lambda: ops.multi_accumulate_(mains, halves, scale=0.7, backend=backend),
        lambda: main,
    )
    calls["scale_"] = (8 * n, lambda: ops.scale_([main], factor, backend=backend), lambda: main)
    sums = []
    calls["grad_stats"] = (
        4 * n,
        lambda: sums.append(ops.grad_stats([main], backend=backend)[0]),
        lambda: sums[-1],
    )
    rows = n // WIDTH
    table = main[: rows * WIDTH].view(rows, WIDTH)
    dy, x, looked_up = (
        torch.randn(TOKENS, width, device="cuda", generator=generator).bfloat16()
        for width in (rows, WIDTH, WIDTH)
    )
    indices = torch.randint(rows, (TOKENS,), device="cuda", generator=generator)
    calls["wgrad_accumulate_ bfloat16"] = (
        8 * table.numel() + 2 * (dy.numel() + x.numel()),
        lambda: ops.wgrad_accumulate_(table, dy, x, scale=0.7, backend=backend),
        lambda: main,
    )
    calls["embedding_accumulate_ bfloat16"] = (
        10 * TOKENS * WIDTH,
        lambda: ops.embedding_accumulate_(table, looked_up, indices, scale=0.7, backend=backend),
        lambda: main,
    )
    return calls


def _copy_rate() -> float:
    source = torch.randn(TIMED, device="cuda")
    target = torch.empty_like(source)
    return 8 * TIMED / _time(lambda: target.copy_(source))


def check_kernels() -> bool:
    """Compares each kernel with the reference backend and times it; returns whether all agree."""
    copy_rate = _copy_rate()
    print(f"\nkernels on {torch.cuda.get_device_name()}, copy {copy_rate / 1e12:.2f} TB/s")
    print(f"  {'kernel':<30} {'backend':<8} {'result':<10} {'TB/s':>6} {'of copy':>8}")
    is_good = True
    for backend in ("cuda", "triton"):
        if dispatch.why_missing(backend) is not None:
            continue
        expected = _calls(CHECKED, "reference")
        small, large = _calls(CHECKED, backend), _calls(TIMED, backend)
        for name, (nbytes, run, _) in large.items():
            for calls in (expected, small):
                calls[name][1]()
            want, got = expected[name][2](), small[name][2]()
            # Each backend has an order of its own for sums of squares, and of a product's terms.
            is_sum = name.startswith(("grad_stats", "wgrad", "embedding"))
            agrees = torch.allclose(want, got, 1e-5, 1e-3) if is_sum else want.equal(got)
            is_good &= agrees
            rate = nbytes / _time(run)
            print(
                f"  {name:<30} {backend:<8} {'right' if agrees else 'WRONG':<10} "
                f"{rate / 1e12:6.2f} {rate / copy_rate:8.0%}"
            )
    return is_good


def main() -> int:
    """Runs the command; returns 1 when a kernel gives a wrong result."""
    if sys.argv[1:2] == ["tune"]:
        return tune.main(dispatch.extension(), sys.argv[2:])
    if sys.argv[1:2] == ["report"]:
        return report.main(sys.argv[2:])
    if len(sys.argv) > 1:
        print(__doc__)
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    print_installation()
    return 0 if not torch.cuda.is_available() or check_kernels() else 1


if __name__ == "__main__":
    raise SystemExit(main())
