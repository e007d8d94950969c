"""Every CUDA kernel of the package on awkward shapes, with no kernel of torch's beside them.

For compute-sanitizer (sanitize_gpu.sh), which is slow, and whose initcheck does not see what some
kernels of libraries write: data comes from the host and goes back to it. What comes back must be
that of the reference backend, to rounding; tests/ hold the kernels to derived bounds.
"""

from __future__ import annotations

import itertools
import sys

import torch

from gradacc_kernels import dispatch, ops

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
CHUNK = ops.CHUNK_SIZE
SIZES = (0, 1, 7, 8, 9, 255, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


def on_gpu(tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A copy that ends its storage, ``offset`` elements behind an aligned address."""
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
    view = storage[offset:].view(tensor.shape)
    view.copy_(tensor)
    return view


class Call:
    """One op on both backends, and the comparison of all that it writes."""

    count = 0

    def __init__(self, op, written, *arguments, offset=0, **options):
        Call.count += 1
        both = []
        for backend, move in (("reference", torch.clone), ("cuda", self._mover(offset))):
            args, kwargs = self._moved((arguments, options), move)
            result = op(*args, **kwargs, backend=backend)
            both.append([*written(args, kwargs), *(result if isinstance(result, tuple) else ())])
        for expected, new in zip(*both, strict=True):
            new = new.to("cpu")
            torch.testing.assert_close(new, expected, rtol=2e-2, atol=2e-2, equal_nan=True)

    @staticmethod
    def _mover(offset):
        return lambda tensor: on_gpu(tensor, 0 if tensor.dim() == 0 else offset)

    @classmethod
    def _moved(cls, value, move):
        if isinstance(value, torch.Tensor):
            return move(value)
        if isinstance(value, dict):
            return {key: cls._moved(item, move) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cls._moved(item, move) for item in value)
        return value


def _first(args, kwargs):
    return [args[0], *([kwargs["partials"]] if "partials" in kwargs else [])]


def _first_and_sum(args, kwargs):
    # Which slot of a product holds which part is each backend's own choice.
    return [args[0], kwargs["partials"].cpu().sum()]


def _all_first(args, kwargs):
    return [*args[0], *kwargs.get("partials", [])]


def _slots(main):
    return torch.zeros(ops.num_chunks(main.numel()))


def elementwise():
    """accumulate.cu, statistics.cu and scale.cu."""
    inv_scale = torch.tensor(0.5)
    for dtype, size, offset, store in itertools.product(FLOATS, SIZES, (0, 1), (False, True)):
        main, grad = torch.randn(size), torch.randn(size).to(dtype)
        if size > 2:
            grad[size // 2] = torch.nan
        options = {"partials": _slots(main), "inv_scale": inv_scale, "scale": 0.37}
        Call(ops.accumulate_, _first, main, grad, store=store, offset=offset, **options)
    for offset, count in itertools.product((0, 1), (1, 3, 400)):
        mains = [torch.randn(SIZES[i % len(SIZES)] if count < 9 else i % 40) for i in range(count)]
        grads = [torch.randn_like(main).to(FLOATS[i % 3]) for i, main in enumerate(mains)]
        partials = [_slots(main) for main in mains]
        stores = [i % 2 == 0 for i in range(count)]
        options = {"stores": stores, "partials": partials, "inv_scale": inv_scale, "offset": offset}
        Call(ops.multi_accumulate_, _all_first, mains, grads, **options)
        Call(ops.grad_stats, lambda *_: [], mains, offset=offset)
        full = [_slots(main) + 1.0 for main in mains]
        Call(ops.grad_stats, lambda *_: [], partials=full, offset=offset)
        Call(ops.scale_, _all_first, mains, torch.tensor(0.37), offset=offset)


def weight_gradients(extension):
    """The CUTLASS instances and cuBLASLt's algorithms, and what the rule chooses."""
    choices = [c for c in extension.weight_grad_choices() if c[-2:] not in (":5", ":6", ":7")]
    shapes = [(72, 136, 65), (33, 7, 5), (256, 384, 128), (8, 8, 1), (136, 264, 0)]
    for choice, has_factor in itertools.product(("", *choices), (False, True)):
        extension.force_weight_grad_choice(choice)
        # A product of cuBLASLt's that a factor of the device makes us read is filled first:
        # initcheck does not see what that library writes.
        torch.use_deterministic_algorithms(has_factor and "x" not in choice)
        for (o, i, tokens), dtype, store in itertools.product(shapes, HALVES, (False, True)):
            main, dy, x = torch.randn(o, i), torch.randn(tokens, o), torch.randn(tokens, i)
            options = {"store": store, "scale": 0.37, "partials": _slots(main)}
            options |= {"inv_scale": torch.tensor(0.5)} if has_factor else {}
            Call(ops.wgrad_accumulate_, _first_and_sum, main, dy.to(dtype), x.to(dtype), **options)
    torch.use_deterministic_algorithms(False)
    extension.force_weight_grad_choice("")
    for dtype, store in itertools.product(HALVES, (False, True)):
        main, options = torch.randn(3, 72, 136), {"store": store, "scale": 0.37}
        dy, x = torch.randn(3, 65, 72).to(dtype), torch.randn(3, 65, 136).to(dtype)
        Call(ops.wgrad_accumulate_, _first_and_sum, main, dy, x, partials=_slots(main), **options)
        dy, x = torch.randn(70, 72).to(dtype), torch.randn(70, 136).to(dtype)
        options["offsets"] = torch.tensor([0, 65, 70], dtype=torch.int32)
        Call(ops.wgrad_accumulate_, _first_and_sum, main, dy, x, partials=_slots(main), **options)


def embeddings():
    """embedding.cu."""
    # 8,192 tokens and fewer are ranked by a kernel of the package, more are sorted by CUB.
    for rows, width, tokens in (
        *((13, 40, tokens) for tokens in (0, 1, 63, 64, 65, 129, 700)),
        *((9, width, 9) for width in (1, 7, 33, CHUNK + 1)),
        (5, 8, 8193),
    ):
        for dtype, store in itertools.product(FLOATS, (False, True)):
            main, dy = torch.randn(rows, width), torch.randn(tokens, width).to(dtype)
            options = {"store": store, "padding_idx": 2, "partials": _slots(main)}
            options["scale"] = 1 / max(1, tokens)
            indices = torch.randint(rows, (tokens,))
            Call(ops.embedding_accumulate_, _first, main, dy, indices, **options)


def main() -> int:
    """Runs the parts that are named, or all."""
    torch.manual_seed(0)
    extension = dispatch.extension()
    if isinstance(extension, str) or not extension.HAS_CUDA:
        print("needs the extension with its CUDA part", file=sys.stderr)
        return 2
    parts = {
        "elementwise": elementwise,
        "weight_gradients": lambda: weight_gradients(extension),
        "embeddings": embeddings,
    }
    for name in sys.argv[1:] or parts:
        before = Call.count
        parts[name]()
        print(f"{name}: {Call.count - before} calls", flush=True)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
