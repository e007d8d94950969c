"""The truth, in float64 on the CPU, and how far from it float32 arithmetic may lie.

Nothing here knows the package. A float32 operation rounds by at most 2^-24 of its result, or by
2^-150 where the result is subnormal. So k of them in a chain stay within

    (k + 1) * 2^-24 * sum|terms| + k * 2^-150

of the exact sum; the one beyond k covers the products of rounding errors while k^2 < 2^24.
"""

import struct

import torch

UNIT = 2.0**-24
HALF_SUBNORMAL = 2.0**-150


def float32(x: float) -> float:
    """Rounds to float32; raises OverflowError beyond its range."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def factor(scale: float = 1.0, inv_scale: float | None = None) -> float:
    """The factor of a gradient: scale * inv_scale, each a float32, rounded once."""
    scale = float32(scale)
    return scale if inv_scale is None else float32(scale * float32(inv_scale))


def bound(k: int, magnitude):
    """How far k roundings may carry a sum whose terms' absolute values add up to magnitude."""
    return (k + 1) * UNIT * magnitude + k * HALF_SUBNORMAL


class WindowSum:
    """The sum of a window's micro-batch gradients, and the bound for its float32 form."""

    def __init__(self, start: torch.Tensor):
        self.total = start.detach().cpu().double()
        self.magnitude = self.total.abs()
        self.k = 0

    def add(self, grad: torch.Tensor, factor: float = 1.0) -> None:
        term = grad.detach().cpu().double() * factor  # exact: 24 bits times 24 bits
        self.total = self.total + term
        self.magnitude = self.magnitude + term.abs()
        self.k += 1

    def contains(self, main: torch.Tensor) -> bool:
        """Tells whether every element lies within the bound."""
        error = (main.detach().cpu().double() - self.total).abs()
        return bool((error <= bound(self.k, self.magnitude)).all())


def square_sums(main: torch.Tensor, chunk_size: int) -> list[float]:
    """The sum of squares of each chunk of a 1-D tensor."""
    return [float(chunk.square().sum()) for chunk in main.detach().cpu().double().split(chunk_size)]


def is_square_sum(value: float, exact: float, n: int) -> bool:
    """Tells whether a float32 sum of n squares, in any order, is right: n roundings at the most."""
    return abs(value - exact) <= bound(n, exact)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Tells element by element whether two float32 tensors agree bit for bit, or are both NaN."""
    assert actual.dtype == expected.dtype == torch.float32
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.shape == expected.shape
    are_equal = actual.view(torch.int32) == expected.view(torch.int32)
    return are_equal | (actual.isnan() & expected.isnan())


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails with the first element that differs."""
    differs = ~same_bits(actual, expected)
    if differs.any():
        index = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} elements differ; the first, at "
            f"{list(index)}: got {actual[index].item()!r}, expected {expected[index].item()!r}"
        )
