"""``python -m gradacc_kernels tune``: which kernel is fastest for a weight gradient on this GPU.

A rule that is part of the package chooses the kernel by shape. This measures all of them for the
shapes that it is given, and writes the names of those that beat the rule's to a file, which is read
when the package first meets a CUDA tensor. Nothing is ever measured elsewhere: with the same file,
or none, the same shapes take the same kernels and give the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

FORMAT = 1
COLD_BYTES = 256 << 20  # buffers take turns so that none is in a cache
GRAPH_US = 3000.0
REPLAYS = 5
MARGIN = 0.02  # a kernel replaces the rule's only if it is faster by more

Shape = tuple[int, int]


def path() -> Path:
    """Returns the file: GRADACC_TUNED, or one in the user's cache folder."""
    given = os.environ.get("GRADACC_TUNED")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gradacc_kernels" / "tuned.json"


def _stamp(extension) -> dict:
    """What a choice depends on: cuBLASLt's ranks are those of one version on one GPU."""
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(),
        "cublaslt": extension.cublaslt_version(),
        "kernels": extension.weight_grad_choices(),
    }


def load(extension) -> int:
    """Reads the file, if there is one for this GPU and these libraries.

    Args:
        extension: the compiled module, with CUDA.

    Returns:
        How many shapes it has a kernel for.
    """
    file = "the file of GRADACC_TUNED"
    try:
        file = path()
        if not file.is_file():
            return 0
        table = json.loads(file.read_text())
        found = {name: table[name] for name in ("format", "device", "cublaslt", "kernels")}
        if found != _stamp(extension):
            return 0  # of another GPU, or of other libraries
        choices = [_parse_choice(choice, table["kernels"]) for choice in table["choices"]]
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        warnings.warn(
            f"gradacc_kernels: {file} is no table of tuned kernels ({error!r}), and was left "
            "unread; delete it, or write it anew by python -m gradacc_kernels tune",
            stacklevel=2,
        )
        return 0
    for choice in choices:
        extension.set_weight_grad_choice(*choice)
    return len(choices)


def _parse_choice(choice: dict, kernels: Sequence[str]) -> tuple[int, int, int, bool, str]:
    n_out, n_in = choice["main_grad"]
    if choice["kernel"] not in kernels:
        raise ValueError(f"unknown kernel {choice['kernel']!r}")
    sizes = int(n_out), int(n_in), int(choice["tokens"])
    if not all(0 < size < 1 << 62 for size in sizes):
        raise ValueError(f"sizes {sizes}")
    return *sizes, bool(choice["store"]), choice["kernel"]


class _Case:
    """One weight gradient, with enough sets of buffers to keep it out of the caches."""

    def __init__(self, extension, shape: Shape, tokens: int, dtype: torch.dtype, store: bool):
        n_out, n_in = shape
        nbytes = 4 * n_out * n_in + 2 * tokens * (n_out + n_in)
        self.sets = [
            (
                torch.randn(shape, device="cuda"),
                torch.randn(tokens, n_out, device="cuda", dtype=dtype),
                torch.randn(tokens, n_in, device="cuda", dtype=dtype),
            )
            for _ in range(min(32, 1 + COLD_BYTES // nbytes))
        ]
        self.extension, self.store = extension, store

    def run(self, index: int) -> None:
        main, dy, x = self.sets[index % len(self.sets)]
        self.extension.wgrad_accumulate_(main, dy, x, 1.0, None, self.store, None, None)

    def time(self, kernel: str) -> float:
        """Returns the microseconds of one call of a kernel, without its launch."""
        self.extension.force_weight_grad_choice(kernel)
        try:
            self.run(0)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.run(1)
            end.record()
            torch.cuda.synchronize()
            calls = max(2, len(self.sets), int(GRAPH_US / (1e3 * begin.elapsed_time(end))))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for index in range(calls):
                    self.run(index)
        finally:
            self.extension.force_weight_grad_choice("")
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        for event in events[:-1]:
            event.record()
            graph.replay()
        events[-1].record()
        torch.cuda.synchronize()
        pairs = zip(events[:-1], events[1:], strict=True)
        return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3 / calls


def measure(
    extension, shape: Shape, tokens: int, store: bool, dtype: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    """Returns the microseconds of each kernel, and under "rule" of the one that the rule takes.

    Args:
        extension: the compiled module, with CUDA.
        shape: of the main gradient, (out_features, in_features).
        tokens: of a micro-batch.
        store: whether it stores, as the first micro-batch of a window does, or adds.
        dtype: of the operands.
    """
    case = _Case(extension, shape, tokens, dtype, store)
    names = ["rule", *extension.weight_grad_choices()]
    return {name: case.time("" if name == "rule" else name) for name in names}


def best(times: dict[str, float]) -> str | None:
    """Returns the name of the fastest kernel, or None where the rule's is about as fast."""
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < (1 - MARGIN) * times["rule"] else None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    def shape(text: str) -> Shape:
        n_out, n_in = map(positive, text.split("x"))
        return n_out, n_in

    parser = argparse.ArgumentParser(
        prog="python -m gradacc_kernels tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "shapes", nargs="+", type=shape, metavar="OUTxIN", help="of weights: 4096x4096 11008x4096"
    )
    parser.add_argument(
        "--tokens",
        required=True,
        type=lambda text: [positive(part) for part in text.split(",")],
        metavar="1024,2048",
        help="in a micro-batch: exactly these lengths are tuned",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument(
        "--output",
        type=Path,
        help="replaced if it exists; default: GRADACC_TUNED, or tuned.json in ~/.cache",
        metavar="PATH",
    )
    parser.add_argument("--times", action="store_true", help="print the times of all kernels")
    return parser.parse_args(arguments)


def main(extension: object | str, arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status.

    Args:
        extension: the compiled module, or why there is none.
        arguments: of the command line.
    """
    options = _parse(arguments)
    if isinstance(extension, str) or not extension.HAS_CUDA or not torch.cuda.is_available():
        print("tune: needs a GPU and the extension built for it; see python -m gradacc_kernels")
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, options.dtype)
    choices = []
    print(f"{'main gradient':<14} {'tokens':>6} {'':<5} {'rule':>9}  fastest")
    for n_out, n_in in options.shapes:
        for tokens in options.tokens:
            for store in (False, True):
                times = measure(extension, (n_out, n_in), tokens, store, dtype)
                name = best(times)
                fastest = min(times, key=times.__getitem__)
                note = "" if name else ", no better than the rule's"
                print(
                    f"{f'{n_out}x{n_in}':<14} {tokens:>6} {'store' if store else 'add':<5} "
                    f"{times['rule']:>6.1f} us  {times[fastest]:.1f} us {fastest}{note}"
                )
                if options.times:
                    print("    " + "  ".join(f"{k} {v:.1f}" for k, v in times.items()))
                if name:
                    choices.append(
                        {
                            "main_grad": [n_out, n_in],
                            "tokens": tokens,
                            "store": store,
                            "kernel": name,
                            "us": round(times[name], 2),
                            "rule_us": round(times["rule"], 2),
                        }
                    )
    file = options.output or path()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**_stamp(extension), "choices": choices}, indent=1) + "\n")
    print(f"wrote {file}: {len(choices)} choices that beat the rule's. Every run reads it.")
    return 0
