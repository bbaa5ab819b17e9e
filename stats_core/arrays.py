"""What the formulas need to know of an array: its namespace, and the type that sums are kept in.

One formula serves numpy, torch and jax: the namespace comes from the array itself
(`array_api_compat`), so nothing here imports a framework.
"""

from typing import Any

import array_api_compat

__all__ = ["Array", "concrete_count", "namespace", "positive_or_one", "square_sum", "total", "widened"]

Array = Any
"""A numpy, torch or jax array, or a Python number where a formula allows a scalar."""


def namespace(*arrays: Array) -> Any:
    """The array-API namespace that the arrays share; Python numbers are passed over."""
    return array_api_compat.array_namespace(*(a for a in arrays if not isinstance(a, int | float)))


def widened(array: Array) -> Array:
    """The array in float32 or wider: half precision holds too few digits to accumulate in."""
    xp = namespace(array)
    if array.dtype in (xp.float32, xp.float64):
        return array
    return xp.astype(array, xp.float32)


def _sum_dtype(xp: Any, array: Array) -> Any:
    # jax without x64 has no float64, nor has Apple's GPU: there sums stay in the array's own type.
    if array_api_compat.is_jax_namespace(xp) or "mps" in str(array_api_compat.device(array)):
        return array.dtype
    return xp.float64


def total(array: Array) -> Array:
    """The sum over all elements, in float64 where the device has it, else in the array's type."""
    xp = namespace(array)
    return xp.sum(array, dtype=_sum_dtype(xp, array))


def square_sum(array: Array) -> Array:
    """The sum of squares over all elements, as `total`.

    Elements below 1e-19 in float32 have no square in range and count as 0.
    """
    return total(array * array)


def concrete_count(count: Array) -> float | None:
    """The count as a number, or None where it is traced and can't be looked at."""
    try:
        return float(count)
    except TypeError:  # jax: a tracer has no value
        return None


def positive_or_one(value: Array) -> Array:
    """The value, or 1 in place of what is not above 0: a divisor for results that are chosen away there."""
    if isinstance(value, int | float):
        return value if value > 0 else 1.0
    xp = namespace(value)
    return xp.where(value > 0, value, xp.ones_like(value))
