"""Numbers in a JSON schema, as far as llguidance can hold them: it computes in binary64 and 64-bit integers."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_DOWN, ROUND_FLOOR, Decimal
from typing import Any

# The largest binary64 below 2**63.
LARGEST = 9_223_372_036_854_774_784
# Digits after the point that it compares rightly.
DECIMALS = 15
MAX_MULTIPLE = 100_000  # it follows remainders: so many states


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number: for Python, true and false are, too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def count(value: Any) -> int | None:
    """A whole number from 0, also one that is written like 2.0; None for anything else."""
    if not is_number(value) or not 0 <= value < math.inf or int(value) != value:
        return None
    return int(value)


def exact(value: float) -> int | float | None:
    """A number that llguidance writes as that number, None where it cannot: -0.0 is 0 and 3.0 is 3."""
    if not abs(value) <= LARGEST:
        return None
    if int(value) == value:
        return int(value) if float(int(value)) == value else None
    return value if _decimals(value) <= DECIMALS else None


def inwards(value: float, *, up: bool) -> int | float | None:
    """The nearest number on the allowed side of a bound that can be enforced; None if every number is beyond it."""
    if value > LARGEST:
        return None if up else LARGEST
    if value < -LARGEST:
        return -LARGEST if up else None
    if isinstance(value, int) or int(value) == value:
        near = float(value)
        if up and near < value:
            near = math.nextafter(near, math.inf)
        elif not up and near > value:
            near = math.nextafter(near, -math.inf)
        return int(near)
    if _decimals(value) <= DECIMALS:
        return value
    scaled = Decimal(value).scaleb(DECIMALS)
    return _number(scaled.to_integral_value(ROUND_CEILING if up else ROUND_FLOOR).scaleb(-DECIMALS))


def beside(bound: float, *, up: bool) -> float:
    """The bound that stands for a whole number which is excluded itself: the next one that 15 digits can tell.

    llguidance lets the excluded number itself through where the other bound has the same digits before the point.
    """
    places = DECIMALS - len(str(abs(int(bound))))
    if places <= 0:
        return bound
    step = Decimal(1).scaleb(-places)
    return float(Decimal(int(bound)) + (step if up else -step))


def shorter(bound: float) -> list[int | float]:
    """The bound rounded towards 0, to every number of decimals that is less than its own.

    llguidance writes numbers that begin like a bound with all of its decimals: 2.20 below 2.25, but not 2.2.
    """
    whole = Decimal(repr(bound))
    steps = (Decimal(1).scaleb(-places) for places in range(_decimals(bound)))
    return list(dict.fromkeys(_number(whole.quantize(step, ROUND_DOWN)) for step in steps))


def multiple(value: float) -> Decimal | None:
    """What `multipleOf` means, None where llguidance reads it wrongly: it looks for decimals by multiplying by 10."""
    scaled, exponent = float(value), 0
    while scaled != int(scaled) and exponent <= DECIMALS:
        scaled *= 10
        exponent += 1
    found = Decimal(scaled).scaleb(-exponent)
    return found if exponent <= DECIMALS and found == Decimal(repr(value)) else None


def coarser(multiple_of: Decimal) -> list[int | float]:
    """The multiples of `multiple_of` that have fewer decimals, as what they are multiples of: llguidance writes all."""
    exponent = int(multiple_of.as_tuple().exponent)
    factors = (10**places for places in range(1, -exponent + 1))
    wholes = (math.lcm(int(multiple_of.scaleb(-exponent)), factor) for factor in factors)
    return [_number(Decimal(whole).scaleb(exponent)) for whole in wholes]


def _number(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)


def _decimals(value: float) -> int:
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0
