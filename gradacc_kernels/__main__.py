"""The command ``python -m gradacc_kernels``."""

from __future__ import annotations

import platform
import sys

import torch

import gradacc_kernels
from gradacc_kernels import dispatch, kernel_bench, report, tune
from gradacc_kernels.kernel_calls import calls, copy_rate, seconds_of

USAGE = """usage: python -m gradacc_kernels [tune|bench|report ...]

    python -m gradacc_kernels                    what is installed; checks all kernels on a GPU
    python -m gradacc_kernels tune SHAPE ...     measures which weight gradient kernel is fastest
    python -m gradacc_kernels bench              times the kernels by size
    python -m gradacc_kernels report run.jsonl   writes a page about a run that gk.Monitor recorded

tune, bench and report take --help."""
CHECKED = (1 << 20) + 5  # elements compared with the reference backend
TIMED = 1 << 27  # elements timed: 0.8 GB of main and grad, well past any L2


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


def check_kernels() -> bool:
    """Compares each kernel with the reference backend and times it; returns whether all agree."""
    device = torch.device("cuda")
    rate_of_copy = copy_rate(8 * TIMED, device)
    print(f"\nkernels on {torch.cuda.get_device_name()}, copy {rate_of_copy / 1e12:.2f} TB/s")
    print(f"  {'kernel':<30} {'backend':<8} {'result':<10} {'TB/s':>6} {'of copy':>8}")
    is_good = True
    for backend in ("cuda", "triton"):
        if dispatch.why_missing(backend) is not None:
            continue
        expected = calls(CHECKED, "reference", device)
        small, large = calls(CHECKED, backend, device), calls(TIMED, backend, device)
        for name, call in large.items():
            for each in (expected, small):
                each[name].run()
            want, got = expected[name].result(), small[name].result()
            # Each backend has an order of its own for sums of squares, and of a product's terms.
            is_sum = name.startswith(("grad_stats", "wgrad", "embedding"))
            agrees = torch.allclose(want, got, 1e-5, 1e-3) if is_sum else want.equal(got)
            is_good &= agrees
            rate = call.nbytes / seconds_of(call.run, device)
            print(
                f"  {name:<30} {backend:<8} {'right' if agrees else 'WRONG':<10} "
                f"{rate / 1e12:6.2f} {rate / rate_of_copy:8.0%}"
            )
    return is_good


def main() -> int:
    """Runs the command; returns 1 when a kernel gives a wrong result."""
    if sys.argv[1:2] == ["tune"]:
        return tune.main(dispatch.extension(), sys.argv[2:])
    if sys.argv[1:2] == ["bench"]:
        return kernel_bench.main(sys.argv[2:])
    if sys.argv[1:2] == ["report"]:
        return report.main(sys.argv[2:])
    if len(sys.argv) > 1:
        is_help = sys.argv[1] in ("-h", "--help")
        print(USAGE, file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else 2
    print_installation()
    return 0 if not torch.cuda.is_available() or check_kernels() else 1


if __name__ == "__main__":
    raise SystemExit(main())
