"""What the tests of a factor of 0 share: it leaves out a gradient of any values."""

import math

import torch

# The last one is 0 in float32.
ZERO_FACTORS = (
    {"scale": 0.0},
    {"scale": -0.0},
    {"inv_scale": 0.0},
    {"scale": -1e-30, "inv_scale": 1e-30},
)
# Too small to change a finite sum, but not a NaN.
TINY_FACTORS = ({"scale": 1e-30}, {"inv_scale": 1e-30})


def bit_patterns(n, dtype=torch.float32):
    """Random bits: every kind of float among them."""
    if dtype == torch.float32:
        return torch.randint(-(2**31), 2**31, (n,)).int().view(dtype)
    return torch.randint(-(2**15), 2**15, (n,)).short().view(dtype)


def poisoned(shape, dtype):
    """A gradient of random bits, with NaNs and infinities."""
    values = bit_patterns(math.prod(shape), dtype)
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        values[i::7] = value
    return values.view(shape)


def delicate(shape):
    """A main gradient that begins with values which a sum with 0 could change, or mark as bad."""
    main = torch.randn(shape)
    values = torch.tensor([-0.0, 1e-45, -1e-40, math.inf, 0.0, -math.inf])
    main.view(-1)[: len(values)] = values[: main.numel()]
    return main
