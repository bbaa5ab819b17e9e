"""What the formulas need to know of an array: its namespace, and how its elements are added up.

One formula serves numpy, torch and jax: the namespace comes from the array itself
(`array_api_compat`), so nothing here imports a framework.

Sums over float32 elements are kept in float64 where the device has it. Of a large array no float64 copy is made: 64
elements at a time are added up in float32, and those sums in float64. So

* a sum is within 5e-6 of the sum of the elements' magnitudes, however many there are;
* squares have room up to 2.3e18 an element: 64 of those are the largest float32.

Where there is no float64 (jax, Apple's GPU) a sum must have room in the array's own type: gradients far from 1 are
brought into a power-of-two unit first, see `unit_exponent`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat

__all__ = [
    "Array",
    "concrete_count",
    "namespace",
    "positive_or_one",
    "power_of_two",
    "row_dots",
    "row_square_sums",
    "signs",
    "square_sum",
    "total",
    "unit_exponent",
    "widened",
]

Array = Any
"""A numpy, torch or jax array, or a Python number where a formula allows a scalar."""

_CHUNK = 64
"""Elements added up in their own type."""

_WHOLE = 1 << 15
"""Elements up to which a copy in float64 is cheaper than adding up in chunks."""

_ROOM = 40
"""Powers of two: 2**47 squares of 2**40 can be added up in float32, and squares of 2**-40 lose no digit."""


def namespace(*arrays: Array) -> Any:
    """The array-API namespace that the arrays share; Python numbers are passed over.

    So is numpy's float64, which is a Python float, beside arrays of another framework; alone it is numpy's.
    """
    named = [a for a in arrays if not isinstance(a, int | float)]
    return array_api_compat.array_namespace(*(named or arrays))


def widened(array: Array) -> Array:
    """The array in float32 or wider: half precision holds too few digits to accumulate in."""
    xp = namespace(array)
    if array.dtype in (xp.float32, xp.float64):
        return array
    return xp.astype(array, xp.float32)


def total(array: Array) -> Array:
    """The sum over all elements.

    Args:
        array: floating-point, of any shape. Half precision is added up in float32 or wider.

    Returns:
        A scalar in float64 where the device has it, else in the array's type.

    Guarantees:
        * float32: within 5e-6 of the sum of the elements' magnitudes, where there is float64.

    Example:
        >>> import numpy as np
        >>> float(total(np.full(1000, 1e36, np.float32))) > 3.4e38          # more than a float32 holds
        True
    """
    return _added(array, _itself, _sum)


def square_sum(array: Array) -> Array:
    """The sum of squares over all elements.

    Args:
        array: floating-point, of any shape. Half precision is added up in float32 or wider.

    Returns:
        A scalar in float64 where the device has it, else in the array's type.

    Guarantees:
        * float32: within a factor 1 ± 5e-6, where there is float64 and magnitudes are within 1e-18 and 2.3e18.

    Edge cases:
        ==================================  ==================================================
        float32 magnitudes below 1e-19      have no square in range and count as 0
        float32 magnitudes above 2.3e18     may overflow to infinity
        no element                          0
        ==================================  ==================================================

    Example:
        >>> import numpy as np
        >>> round(float(square_sum(np.full(5000, 1e18, np.float32))) / 1e36, 2)
        5000.0
    """
    return _added(array, _square, _squared_norm)


def row_square_sums(rows: Array) -> Array:
    """The sum of squares of each row, as `square_sum`.

    Args:
        rows: shape ``(rows, elements)``.

    Returns:
        Shape ``(rows,)``.
    """
    return _by_rows(widened(rows), _square, _squared_norm)


def row_dots(rows: Array, vector: Array) -> Array:
    """The dot product of each row with one vector, added up as `total`.

    Args:
        rows: shape ``(rows, elements)``.
        vector: shape ``(elements,)``.

    Returns:
        Shape ``(rows,)``.
    """
    return _by_rows(widened(rows) * vector[None], _itself, _sum)


def signs(array: Array) -> Array:
    """-1, 0 or 1 for each element; a NaN has no sign that can be relied on."""
    # torch's own: array-api-compat's carries NaN through, takes eight times as long and waits for the device.
    own = getattr(array, "sign", None)
    return namespace(array).sign(array) if own is None else own()


def unit_exponent(*arrays: Array, squares: Sequence[Array] = ()) -> Array:
    r"""The exponent e of a unit :math:`2^e` in which sums of squares of the arrays have room in float32.

    0 where the largest finite magnitude lies within :math:`2^{\pm 40}`, about 1e-12 to 1e12, as gradients do.
    Else the unit that brings it to :math:`2^{40}` from above, which leaves most room for what is smaller, or to 1
    from below. The squares' sums are :math:`4^e` times those formed in the unit
    (`gradiometer.stats_core.moments.Moments.in_unit`).

    Args:
        arrays: magnitudes that are going to be squared, of any shapes.
        squares: arrays that are squares already, such as ``Moments.m2``.

    Returns:
        An integer scalar; traced where the arrays are.

    Edge cases:
        ===============================  =====
        nothing but zeros, no element    0
        NaN and infinity                 are passed over
        ===============================  =====

    Example:
        >>> import numpy as np
        >>> [int(unit_exponent(np.array([x, 0.0], np.float32))) for x in (3.0, 1e18, 1e-18)]
        [0, 20, -59]
    """
    xp = namespace(*arrays, *squares)
    peaks = [_peak(a) for a in arrays if _size(a)] + [xp.sqrt(_peak(a)) for a in squares if _size(a)]
    if not peaks:
        return xp.asarray(0, dtype=xp.int32)
    _, exponent = xp.frexp(xp.max(xp.stack(peaks)))
    lowest = xp.clip(exponent, -126, None)  # below are float32's subnormal numbers
    inside = xp.zeros_like(exponent)
    return xp.where(exponent > _ROOM, exponent - _ROOM, xp.where(exponent < -_ROOM, lowest, inside))


def power_of_two(exponent: Array, dtype: Any) -> Array:
    """2 to an integer power, exactly: a scalar of the type on the exponent's device, or a float for an int."""
    if isinstance(exponent, int):
        return 2.0**exponent
    xp = namespace(exponent)
    return xp.ldexp(xp.ones_like(exponent, dtype=dtype), exponent)


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


def _sum_dtype(xp: Any, array: Array) -> Any:
    # jax without x64 has no float64, nor has Apple's GPU: there sums stay in the array's own type.
    if array_api_compat.is_jax_namespace(xp) or "mps" in str(array_api_compat.device(array)):
        return array.dtype
    return xp.float64


def _added(array: Array, terms: Callable[[Array], Array], chunk_sums: Callable[[Array], Array]) -> Array:
    """The sum of the terms of all elements."""
    array = widened(array)
    xp = namespace(array)
    if _size(array) > _WHOLE:
        return _by_rows(xp.reshape(array, (1, -1)), terms, chunk_sums)[0]
    return xp.sum(terms(array), dtype=_sum_dtype(xp, array))


def _by_rows(rows: Array, terms: Callable[[Array], Array], chunk_sums: Callable[[Array], Array]) -> Array:
    """Each row's sum of terms, shape ``(rows,)``; ``chunk_sums`` adds up the last axis in the array's own type."""
    xp = namespace(rows)
    wide = _sum_dtype(xp, rows)
    batch, size = rows.shape
    chunks = 0 if rows.dtype == wide or batch * size <= _WHOLE else size // _CHUNK
    whole = chunks * _CHUNK
    rest = rows if whole == 0 else rows[:, whole:]
    left = xp.sum(terms(rest), axis=-1, dtype=wide) if whole < size or size == 0 else None
    if not chunks:
        return left
    summed = xp.sum(chunk_sums(xp.reshape(rows[:, :whole], (batch, chunks, _CHUNK))), axis=-1, dtype=wide)
    return summed if left is None else summed + left


def _itself(array: Array) -> Array:
    return array


def _square(array: Array) -> Array:
    return array * array


def _sum(rows: Array) -> Array:
    return namespace(rows).sum(rows, axis=-1)


def _squared_norm(rows: Array) -> Array:
    norms = namespace(rows).linalg.vector_norm(rows, axis=-1)  # reads the rows once, and makes no copy of them
    return norms * norms


def _size(array: Array) -> int:
    return math.prod(array.shape)


def _peak(array: Array) -> Array:
    """The largest finite magnitude."""
    xp = namespace(array)
    return xp.max(xp.where(xp.isfinite(array), xp.abs(array), xp.zeros_like(array)))
