"""reference.fma against exact rational arithmetic, rounded once."""

import math
import random
from fractions import Fraction

import oracle
import pytest
import torch

from gradacc_kernels import reference

LARGEST = Fraction(2**24 - 1) * 2**104
SMALLEST_EXPONENT = -149  # of the last bit of a subnormal


def rounded(exact: Fraction) -> float:
    """Rounds a number other than 0 to float32: to nearest, ties to even."""
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1  # now 2^exponent <= magnitude < 2^(exponent + 1)
    unit = Fraction(2) ** max(exponent - 23, SMALLEST_EXPONENT)
    magnitude = round(magnitude / unit) * unit  # Fraction rounds ties to even
    return math.copysign(math.inf if magnitude > LARGEST else float(magnitude), exact)


def exact_fma(x: float, y: float, z: float) -> float:
    """x * y + z by IEEE 754: the exact value rounded once, and its rules for zero, inf and NaN."""
    if not all(map(math.isfinite, (x, y, z))):
        return x * y + z  # no rounding decides this; a float64 product of float32s never overflows
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    return rounded(exact) if exact else x * y + z  # a sum that is 0 is exact in float64


def assert_exact(x, y, z):
    expected = [exact_fma(*xyz) for xyz in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)]
    oracle.assert_same_bits(reference.fma(x, y, z), torch.tensor(expected, dtype=torch.float32))


def patterns(n):
    return torch.randint(-(2**31), 2**31, (n,)).int().view(torch.float32)


def signs(n):
    return torch.randint(0, 2, (n,)) * 2 - 1


def shifted(x, exponent):
    """x * 2^exponent, by a product in float64."""
    two = torch.tensor(2.0, dtype=torch.float64)
    return (x.double() * two.pow(exponent)).float()


def with_exponents(n, low, high):
    """Random signs and mantissas, with exponents in [low, high]."""
    mantissa = torch.randint(2**23, 2**24, (n,)) * signs(n)
    return shifted(mantissa, torch.randint(low, high + 1, (n,)) - 23)


def two_roundings(x, y, z):
    """What float64 arithmetic alone gives: rounded to 53 bits, then to 24."""
    return (x.double() * y.double() + z.double()).float()


def test_the_rounding_of_this_file():
    for x in (1.0, -1.5, 2.0**-149, 2.0**-126, float(LARGEST), 3 * 2.0**-149):
        assert rounded(Fraction(x)) == x
    half = Fraction(2) ** -24
    assert rounded(1 + half) == 1 and rounded(1 + 3 * half) == 1 + 2.0**-22
    assert rounded(1 + half + Fraction(2) ** -200) == 1 + 2.0**-23
    assert rounded(Fraction(2) ** -150) == 0 and rounded(Fraction(2) ** 128) == math.inf
    assert rounded(LARGEST + Fraction(2) ** 103) == math.inf
    assert rounded(LARGEST + Fraction(2) ** 103 - 1) == LARGEST
    for _ in range(1000):
        x = random.uniform(-1, 1) * 2.0 ** random.randint(-140, 120)
        assert rounded(Fraction(x)) == oracle.float32(x)


def test_random_bits():
    assert_exact(patterns(4000), patterns(4000), patterns(4000))


@pytest.mark.parametrize("gap", [0, 1, 12, 23, 24, 25, 29, 48, 60])
def test_terms_that_lie_apart(gap):
    """The product lies ``gap`` binary places below z, or above it."""
    x, y = with_exponents(500, -20, 20), with_exponents(500, -20, 20)
    exponent = torch.frexp(x.double() * y.double()).exponent - 1
    z = with_exponents(500, 0, 0)
    assert_exact(x, y, shifted(z, exponent + gap))
    assert_exact(x, y, shifted(z, exponent - gap))


def near_ties(n):
    """Products a hair above or below half a unit in the last place of z.

    (1 + i 2^-23) (1 - i 2^-23) = 1 - i^2 2^-46 misses a tie by less than float64 can hold beside z.
    """
    i = torch.randint(1, 8, (n,)).double()
    x, y = (1 + i * 2.0**-23) * signs(n), 1 - i * 2.0**-23
    exponent = torch.randint(-30, 30, (n,))
    return shifted(x, exponent - 12), shifted(y, -12), shifted(with_exponents(n, 0, 0), exponent)


def test_sums_near_a_tie():
    x, y, z = near_ties(3000)
    assert_exact(x, y, z)
    naive = two_roundings(x, y, z)
    assert int((~oracle.same_bits(naive, reference.fma(x, y, z))).sum()) > 500


def test_subnormal_results():
    for exponent in (-155, -150, -149, -148, -140, -127, -126):
        x = with_exponents(300, -70, -60)
        y = with_exponents(300, exponent + 65, exponent + 65)
        assert_exact(x, y, torch.zeros(300))
        assert_exact(x, y, -torch.zeros(300))
        assert_exact(x, y, torch.randint(-(2**22), 2**22, (300,)) * torch.tensor(2.0**-149))


def test_results_at_the_border_to_infinity():
    x, y = with_exponents(500, 60, 66), with_exponents(500, 60, 63)
    assert_exact(x, y, with_exponents(500, 124, 127))
    largest = torch.tensor([float(LARGEST)])
    half_unit = torch.tensor([2.0**103])
    for product in (2.0**103, 2.0**103 - 2.0**79, 2.0**102):
        assert_exact(torch.tensor([product]), torch.ones(1), largest)
    assert_exact(largest, torch.tensor([2.0]), -largest)
    assert reference.fma(half_unit, torch.ones(1), largest).isinf()


def test_cancellation():
    x, y = with_exponents(500, -5, 5), with_exponents(500, -5, 5)
    assert_exact(x, y, -(x * y))  # leaves what the float32 product has lost
    assert_exact(x, torch.ones(500), -x)


def test_zeros_infinities_and_nans():
    values = [0.0, 1.0, 2.0**-149, 1e-30, 1e30, float(LARGEST), math.inf]
    values = torch.tensor([s * v for v in values for s in (1, -1)] + [math.nan])
    assert_exact(*(t.reshape(-1) for t in torch.meshgrid(values, values, values, indexing="ij")))


def test_broadcasts_a_scalar():
    x, z, s = torch.randn(50), torch.randn(50), torch.tensor(0.3)
    oracle.assert_same_bits(reference.fma(x, s, z), reference.fma(x, s.expand(50), z))
