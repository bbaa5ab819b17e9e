r"""Log-bucketed histograms that merge exactly, in the bucket scheme of Prometheus's native histograms.

At schema n, bucket i holds :math:`(2^{(i-1) 2^{-n}}, 2^{i 2^{-n}}]`: every width is the same ratio, so that one scheme
serves gradients of any scale, and scaling by a power of two only shifts indices. Here n is 3: eight buckets an octave.

Counted on the device into a `Sketch` (a dense window of 32 octaves), kept and merged on the host as a `Histogram`
(sparse, any range). Counting reads the bits of the numbers and compares integers: no logarithm is rounded, so that
numpy, torch and jax count alike to the last one, and a value is in its bucket exactly:

* a float is at most a bucket's upper end if and only if it is at most that end rounded *down* to a float, and what is
  compared is the ends rounded down (integer square roots, `_edges`);
* powers of two are their bucket's upper end themselves.

(Prometheus's own client compares with a table of the ends that is off by up to two roundings of float64: a float64 as
close as that to an end may land in its neighbour there. No float32 is.)
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import array_api_compat

from gradiometer.stats_core.arrays import Array, namespace, widened

__all__ = ["SCHEMA", "WIDTH", "Histogram", "Sketch", "sketch_fixed", "sketch_rows"]

SCHEMA = 3
"""Eight buckets an octave; from the middle of a bucket, no value in it is further than 4.4 %."""
WIDTH = 256
"""Buckets of a sketch: 32 octaves."""

_LOWEST_SCHEMA, _HIGHEST_SCHEMA = -4, 8
_FIXED_FIRST = -127  # 2^-16 is where bucket -127 begins, and 2^16 is where bucket 128 ends


class Sketch(NamedTuple):
    """Counts in dense windows of `WIDTH` buckets at `SCHEMA`, one a row; on the device, integers.

    Attributes:
        first: index of each row's lowest bucket, shape ``(R,)``; a multiple of 8 and 1, so that the window begins at a
            power of two.
        counts: shape ``(R, WIDTH)``.
        zero_count: how many values are 0 or lie below the window, shape ``(R,)``.
    """

    first: Array
    counts: Array
    zero_count: Array

    def added(self, other: Self) -> Self:
        """Counts of both, for windows that begin alike: those of `sketch_fixed`."""
        return self._replace(counts=self.counts + other.counts, zero_count=self.zero_count + other.zero_count)


def sketch_rows(values: Array, mask: Array | None = None) -> Sketch:
    """Counts of each row's values, in a window that ends at the octave of the row's own largest.

    Args:
        values: not negative, shape ``(R, N)``, N at least 1; any unit. Half precision is read as float32.
        mask: False where a value is not to be counted (padding), shape ``(R, N)`` or ``(N,)``.

    Returns:
        int32 counts. The window begins 32 octaves below its end: more than 31 octaves below the largest value.

    Guarantees:
        * Bit for bit the same on numpy, torch and jitted jax, in any order of the values.
        * Twice the values: the same counts, ``first`` higher by 8.
        * Sketches of two parts of a row, merged as `Histogram`, are the sketch of the row.

    Edge cases:
        ===============================  ===============================================================
        0, and values below the window   ``zero_count``
        NaN, infinite or negative        not counted
        no value above 0                 a window at the type's smallest normal number
        below 2^-126 (float64: 2^-1022)  read as 0: no window begins lower
        ===============================  ===============================================================

    Example:
        >>> import numpy as np
        >>> sketch = sketch_rows(np.array([[1.0, 1.0, 2.0, 0.0, np.nan]], np.float32))
        >>> Histogram.from_sketch(sketch)
        Histogram(schema=3, zero_threshold=4.656612873077393e-10, zero_count=1, positive_index=(0, 8),
            positive_count=(2, 1), negative_index=(), negative_count=())
    """
    xp = namespace(values)
    index, lowest = _bucket_indices(values)
    counted = (values >= 0) & xp.isfinite(values)
    if mask is not None:
        counted = counted & xp.broadcast_to(mask, counted.shape)
    top = xp.max(xp.where(counted, index, lowest), axis=1)
    first = (((top + 7) >> 3) << 3) - WIDTH + 1
    first = xp.astype(xp.where(first > lowest, first, lowest + 1), xp.int32)
    return _tallied(first, index, counted)


def sketch_fixed(values: Array, mask: Array | None = None) -> Sketch:
    """Counts of values without a unit, all in one row: the window is 2^-16 to 2^16 whatever the values.

    Args:
        values: not negative, any shape. Half precision is read as float32.
        mask: False where a value is not to be counted, of the same shape.

    Returns:
        int32 counts of one row; those of several arrays (the parameters of a layer) are added by `Sketch.added`.

    Edge cases:
        ===============================  ===============================================================
        0, and values up to 2^-16        ``zero_count``
        above 2^16, and infinity         the last bucket
        NaN or negative                  not counted
        ===============================  ===============================================================

    Example:
        >>> import numpy as np
        >>> sketch = sketch_fixed(np.array([[0.5, np.inf], [0.0, 4.0]]))
        >>> Histogram.from_sketch(sketch).positive_index
        (-8, 16, 128)
    """
    xp = namespace(values)
    index, _ = _bucket_indices(values)
    counted = values >= 0
    if mask is not None:
        counted = counted & mask
    first = xp.full((1,), _FIXED_FIRST, dtype=xp.int32, device=array_api_compat.device(values))
    return _tallied(first, xp.reshape(index, (1, -1)), xp.reshape(counted, (1, -1)))


def _edges(digits: int) -> list[int]:
    """The fractions of the ends 2^(k/8), k = 0 … 7, rounded down to so many binary digits, as integers.

    The square root of an integer, rounded down, three times is its eighth root, rounded down.
    """
    return [math.isqrt(math.isqrt(math.isqrt(1 << (k + 8 * digits)))) - (1 << digits) for k in range(8)]


def _bucket_indices(values: Array) -> tuple[Array, int]:
    """Index of each value's bucket, and the index below which there are no normal numbers.

    Of a positive float the bits are exponent and fraction, and each end that the fraction is above is one bucket up.
    0 and subnormal numbers come out at or below the lowest; what NaN and negative numbers give means nothing.
    """
    xp = namespace(values)
    values = widened(values)
    integer, digits, bias = (xp.int64, 52, 1023) if values.dtype == xp.float64 else (xp.int32, 23, 127)
    bits = values.view(integer)
    fraction = bits & ((1 << digits) - 1)
    above = sum(xp.astype(fraction > edge, xp.int8) for edge in _edges(digits))
    return (((bits >> digits) - bias) << SCHEMA) + xp.astype(above, integer), (1 - bias) << SCHEMA


def _tallied(first: Array, index: Array, counted: Array) -> Sketch:
    """Counts by row of what is counted; what lies below the window is counted in a place behind it."""
    xp = namespace(index)
    rows = index.shape[0]
    place = index - first[:, None]
    place = xp.where(place < WIDTH, place, WIDTH - 1)
    place = xp.where(place < 0, WIDTH, place)
    starts = xp.arange(rows, dtype=place.dtype, device=array_api_compat.device(place)) * (WIDTH + 1)
    place = xp.reshape(place + starts[:, None], (-1,))
    counts = xp.reshape(_counts(xp, place, xp.reshape(counted, (-1,)), rows * (WIDTH + 1)), (rows, WIDTH + 1))
    return Sketch(first=first, counts=counts[:, :WIDTH], zero_count=counts[:, WIDTH])


def _counts(xp: Any, places: Array, counted: Array, size: int) -> Array:
    """How often each place is counted; torch.bincount would wait for the device, adding by index doesn't."""
    if array_api_compat.is_torch_namespace(xp):
        zeros = xp.zeros(size, dtype=xp.int32, device=places.device)
        return zeros.index_add(0, places, xp.astype(counted, xp.int32))
    if array_api_compat.is_jax_namespace(xp):
        return xp.zeros(size, dtype=xp.int32).at[places].add(xp.astype(counted, xp.int32))
    return xp.astype(xp.bincount(places[counted], minlength=size), xp.int32)


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in log-spaced buckets, sparse; the fields are those of the wire's message.

    Attributes:
        schema: n: bucket i ends at 2^(i·2^-n). Between -4 and 8.
        zero_threshold: magnitudes up to this are counted in ``zero_count``. Unit: that of the numbers.
        zero_count: how many there are.
        positive_index: indices of the non-empty buckets of positive numbers, ascending.
        positive_count: their counts.
        negative_index: indices of the non-empty buckets of negative numbers' magnitudes, ascending.
        negative_count: their counts.

    Raises:
        ValueError: if the fields contradict this.

    Example:
        >>> steps = [Histogram(positive_index=(0, 8), positive_count=(2, 1)), Histogram(zero_count=1)]
        >>> both = steps[0].merge(steps[1])
        >>> both.count, round(both.quantile(0.5), 3)
        (4, 0.958)
    """

    schema: int = SCHEMA
    zero_threshold: float = 0.0
    zero_count: int = 0
    positive_index: Sequence[int] = ()
    positive_count: Sequence[int] = ()
    negative_index: Sequence[int] = ()
    negative_count: Sequence[int] = ()

    def __post_init__(self) -> None:
        for field in fields(self)[3:]:
            object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        if not _LOWEST_SCHEMA <= self.schema <= _HIGHEST_SCHEMA:
            raise ValueError(
                f"Histogram needs a schema between {_LOWEST_SCHEMA} and {_HIGHEST_SCHEMA}, got schema={self.schema}; "
                "see the bucket scheme of Prometheus's native histograms"
            )
        if not 0.0 <= self.zero_threshold < math.inf or self.zero_count < 0:
            raise ValueError(
                "Histogram needs a finite zero_threshold and a zero_count of at least 0, got "
                f"zero_threshold={self.zero_threshold}, zero_count={self.zero_count}; "
                "merge histograms, don't subtract, and shift within the floats"
            )
        for side in ("positive", "negative"):
            indices, counts = getattr(self, f"{side}_index"), getattr(self, f"{side}_count")
            ascending = all(a < b for a, b in itertools.pairwise(indices))
            if len(indices) != len(counts) or not ascending or any(count < 1 for count in counts):
                raise ValueError(
                    f"Histogram needs ascending {side}_index and as many {side}_count of at least 1, got "
                    f"{len(indices)} indices and {len(counts)} counts; leave empty buckets out"
                )

    @classmethod
    def from_sketch(cls, sketch: Sketch, row: int = 0) -> Self:
        """One row of a sketch, whose arrays are best brought to the host before.

        Example:
            >>> import numpy as np
            >>> Histogram.from_sketch(sketch_fixed(np.array([0.5, 4.0, 4.0]))).positive_count
            (1, 2)
        """
        first, counts = int(sketch.first[row]), sketch.counts[row].tolist()
        filled = [place for place, count in enumerate(counts) if count]
        return cls(
            schema=SCHEMA,
            zero_threshold=_end(first - 1, SCHEMA),
            zero_count=int(sketch.zero_count[row]),
            positive_index=[first + place for place in filled],
            positive_count=[counts[place] for place in filled],
        )

    @property
    def count(self) -> int:
        """How many numbers were counted."""
        return self.zero_count + sum(self.positive_count) + sum(self.negative_count)

    def merge(self, other: "Histogram") -> "Histogram":
        """The histogram of the numbers of both, exactly: no count moves to a bucket that it doesn't belong to.

        As Prometheus does: the lower schema of the two, whose buckets are those of the higher in groups, and the higher
        zero threshold of the two; what lies below it goes to ``zero_count``. A threshold within a bucket is raised to
        the bucket's end (always; there only where the bucket isn't empty, so that the order of merging would matter).

        Guarantees:
            * Associative and commutative.
            * ``Histogram(schema=8)`` is the identity where the zero threshold is 0 or a bucket's end, as a sketch's is.
        """
        schema = min(self.schema, other.schema)
        threshold = max(self.zero_threshold, other.zero_threshold)
        level = _level(threshold, schema) if threshold > 0 else None
        zero_count = self.zero_count + other.zero_count
        sides: list[dict[int, int]] = [{}, {}]
        for part in (self, other):
            shift = part.schema - schema
            for side, indices, counts in zip(
                sides,
                (part.positive_index, part.negative_index),
                (part.positive_count, part.negative_count),
                strict=True,
            ):
                for index, count in zip(indices, counts, strict=True):
                    wider = -(-index >> shift)
                    if level is not None and wider <= level:
                        zero_count += count
                    else:
                        side[wider] = side.get(wider, 0) + count
        positive, negative = (sorted(side.items()) for side in sides)
        return Histogram(
            schema=schema,
            zero_threshold=0.0 if level is None else _end(level, schema),
            zero_count=zero_count,
            positive_index=[index for index, _ in positive],
            positive_count=[count for _, count in positive],
            negative_index=[index for index, _ in negative],
            negative_count=[count for _, count in negative],
        )

    def shifted(self, buckets: int) -> "Histogram":
        """The histogram of all numbers times 2^(buckets·2^-n): exact, since only indices change.

        Raises:
            ValueError: if the zero threshold leaves the range of floats.

        Example:
            >>> Histogram(positive_index=(0,), positive_count=(3,)).shifted(8).quantile(1.0) > 1.9     # times 2
            True
        """
        threshold = self.zero_threshold
        if threshold > 0:
            level = _level(threshold, self.schema)
            on_end = math.isclose(threshold, _end(level, self.schema), rel_tol=1e-12)
            threshold = _end(level + buckets, self.schema) if on_end else threshold * _end(buckets, self.schema)
        return Histogram(
            schema=self.schema,
            zero_threshold=threshold,
            zero_count=self.zero_count,
            positive_index=[index + buckets for index in self.positive_index],
            positive_count=self.positive_count,
            negative_index=[index + buckets for index in self.negative_index],
            negative_count=self.negative_count,
        )

    def quantile(self, q: float) -> float:
        r"""The smallest number that a share q of all numbers does not exceed, to the width of a bucket.

        Args:
            q: 0 gives the smallest, .5 the lower median, 1 the largest.

        Returns:
            The geometric middle of the bucket that the number is in: its relative error is at most
            :math:`2^{2^{-(n+1)}} - 1`, 4.4 % at schema 3. In the zero bucket 0, off by ``zero_threshold`` at most. NaN
            where nothing was counted. In the last bucket of `sketch_fixed`, which holds infinity too, no bound holds.

        Raises:
            ValueError: if q is not between 0 and 1.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"Histogram.quantile needs 0 <= q <= 1, got q={q}; give a share, not per cent")
        rank = max(1, math.ceil(q * self.count - 1e-9))  # .07 * 100 is above 7 in floats
        passed = 0
        for value, count in self._middles():
            passed += count
            if passed >= rank:
                return value
        return math.nan

    def buckets(self) -> Iterator[tuple[float, float, int]]:
        """Lower end, upper end and count of each non-empty bucket, from the lowest numbers to the highest.

        Example:
            >>> [(low, round(high, 3), count) for low, high, count in Histogram(
            ...     positive_index=(1,), positive_count=(5,)).buckets()]
            [(1.0, 1.091, 5)]
        """
        for index, count in reversed(tuple(zip(self.negative_index, self.negative_count, strict=True))):
            yield -_end(index, self.schema), -_end(index - 1, self.schema), count
        if self.zero_count:
            yield (-self.zero_threshold if self.negative_index else 0.0), self.zero_threshold, self.zero_count
        for index, count in zip(self.positive_index, self.positive_count, strict=True):
            yield _end(index - 1, self.schema), _end(index, self.schema), count

    def _middles(self) -> Iterator[tuple[float, int]]:
        for index, count in reversed(tuple(zip(self.negative_index, self.negative_count, strict=True))):
            yield -_end(index - 0.5, self.schema), count
        yield 0.0, self.zero_count
        for index, count in zip(self.positive_index, self.positive_count, strict=True):
            yield _end(index - 0.5, self.schema), count


def _end(index: float, schema: int) -> float:
    """2^(index·2^-schema): where the bucket ends. Infinity where that is no float."""
    try:
        return math.pow(2.0, math.ldexp(index, -schema))
    except OverflowError:
        return math.inf


def _level(threshold: float, schema: int) -> int:
    """Index of the first bucket that ends at the threshold or above it.

    The logarithm of a float64 is good to 1e-12 of an octave, 1e-9 of a bucket at schema 8: an end is known as one.
    """
    return math.ceil(math.ldexp(math.log2(threshold), schema) - 1e-6)
