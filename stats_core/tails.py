r"""How heavy the tail of the examples' norms is: Hill's index, of numbers or of a histogram.

A tail of index :math:`\alpha` has :math:`P(R > r) \propto r^{-\alpha}` for large r: moments of order :math:`\alpha` and
above are infinite, so that below 2 there is no variance and below 1 no mean. One batch holds too few large examples to
tell: pool the histograms of a window of steps (`pooled`), each in units of its own median, and show the result with its
standard error and its window. An index is fitted to any sample, also where the tail is no power: of normal or
log-normal norms it is large, and grows the further out it is read.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from gradiometer.stats_core.arrays import Array, namespace, positive_or_one, widened
from gradiometer.stats_core.histogram import Histogram

__all__ = ["Tail", "hill", "hill_of", "pooled"]


class Tail(NamedTuple):
    r"""A tail index and how well it is known.

    Attributes:
        alpha: :math:`\hat\alpha`; NaN where it does not exist, infinite where no value stands out.
        standard_error: of alpha, :math:`\hat\alpha / \sqrt k` to first order.
        exceedances: k: how many values it was read from.
    """

    alpha: Array
    standard_error: Array
    exceedances: int


def hill(values: Array, k: int) -> Tail:
    r"""Hill's estimate of the tail index from the k largest values.

    .. math:: \hat\alpha = \Bigl[ \frac1k \sum_{r \le k} \ln \frac{R_{(r)}}{R_{(k+1)}} \Bigr]^{-1}

    with :math:`R_{(1)} \ge R_{(2)} \ge \dots`. Of an exact power tail :math:`k \alpha / \hat\alpha` has the gamma
    distribution of shape k: :math:`\hat\alpha` is high by a factor k/(k - 1) on average.

    Args:
        values: norms, in any order, of one scale, shape ``(N,)``; any unit.
        k: how many of the largest, from 1 to N - 1; 5 to 10 % of N is usual.

    Returns:
        Scalars. NaN where the (k+1)-th largest is not above 0, or a value is NaN or infinite: leave those out before.

    Raises:
        ValueError: if k is not between 1 and N - 1.

    Guarantees:
        * c times every value, and the order of the values, change nothing but rounding.

    Example:
        >>> import numpy as np
        >>> tail = hill(np.array([1.0, 2.0, 4.0, 8.0]), 2)   # mean of ln(8/2) and ln(4/2): 1.5 ln 2
        >>> round(float(tail.alpha), 4), round(float(tail.standard_error), 4)
        (0.9618, 0.6801)

    References:
        Hill, "A simple general approach to inference about the tail of a distribution", The Annals of Statistics 3(5),
        1975.
    """
    size = values.shape[0]
    if not 1 <= k < size:
        raise ValueError(f"hill needs 1 <= k < {size} for {size} values, got k={k}; give more values or a smaller k")
    xp = namespace(values)
    ordered = xp.sort(widened(values))
    threshold = ordered[size - k - 1]
    exists = (threshold > 0) & xp.isfinite(ordered[size - 1])
    ratios = xp.where(exists, ordered[size - k :], xp.ones_like(ordered[size - k :])) / positive_or_one(threshold)
    mean = xp.mean(xp.log(xp.where(exists, ratios, xp.ones_like(ratios))))
    alpha = xp.where(mean > 0, 1.0 / positive_or_one(mean), xp.inf)
    alpha = xp.where(exists, alpha, xp.nan)
    return Tail(alpha=alpha, standard_error=alpha / math.sqrt(k), exceedances=k)


def hill_of(histogram: Histogram, share: float = 0.1) -> Tail:
    r"""Hill's estimate from a histogram: the maximum likelihood of counts in log-spaced buckets.

    Above a bucket's end the logarithm of a power tail is exponential, so that the number K of buckets above it is
    geometric with ratio :math:`e^{-\alpha h}`, :math:`h = 2^{-n} \ln 2`, whatever the scale. With its mean over the k
    values above:

    .. math::
        \hat\alpha = \frac1h \ln \Bigl( 1 + \frac{1}{\bar K} \Bigr), \qquad
        \operatorname{se} = \frac{2 \sinh(\hat\alpha h / 2)}{h \sqrt k}

    which is `hill` with no loss but the width of a bucket: at schema 3 the standard error is :math:`(\alpha h)^2/24` of
    itself larger, 0.3 % at α = 3.

    Args:
        histogram: of norms of one scale; of several steps, see `pooled`.
        share: how much of the values to read it from. The threshold is the highest bucket's end that at least this
            share lies above.

    Returns:
        Floats. NaN where fewer than that lie above the zero bucket, or there are no values. Infinite where they are
        all in one bucket.

    Raises:
        ValueError: if share is not above 0 and below 1.

    Guarantees:
        * Shifting the histogram changes nothing.

    Example:
        >>> tail = hill_of(Histogram(positive_index=(0, 1, 2), positive_count=(4, 2, 2)), share=0.5)
        >>> tail.exceedances, round(tail.alpha, 3)    # two values each in the first and the second bucket above
        (4, 12.68)

    References:
        Hill, "A simple general approach to inference about the tail of a distribution", The Annals of Statistics 3(5),
        1975.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"hill_of needs 0 < share < 1, got share={share}; .05 to .1 is usual")
    wanted = max(1, math.ceil(share * histogram.count - 1e-9))
    above, places = 0, 0
    for index, count in reversed(tuple(zip(histogram.positive_index, histogram.positive_count, strict=True))):
        above += count
        places += index * count
        if above >= wanted:
            return _grouped(places - index * above, above, math.ldexp(math.log(2.0), -histogram.schema))
    return Tail(alpha=math.nan, standard_error=math.nan, exceedances=above)


def pooled(histograms: Iterable[Histogram]) -> Histogram:
    """The histograms of several steps as one, each in units of the bucket that its own median is in.

    A change of scale from step to step would otherwise look like a tail. A step whose median lies in the zero bucket
    has no unit and is left out. The shifts are whole buckets, so that nothing is lost.

    Returns:
        A histogram without a unit: 1 is the upper end of the bucket with the median.

    Example:
        >>> steps = [Histogram(positive_index=(-80, -72), positive_count=(2, 1)),
        ...     Histogram(positive_index=(40, 48), positive_count=(2, 1))]
        >>> both = pooled(steps)
        >>> both.positive_index, both.positive_count
        ((0, 8), (4, 2))
    """
    result = Histogram(schema=8)
    for histogram in histograms:
        index = _median_index(histogram)
        if index is not None:
            result = result.merge(histogram.shifted(-index))
    return result


def _grouped(places: int, count: int, width: float) -> Tail:
    """From the sum of K over so many values."""
    if places == 0:
        return Tail(alpha=math.inf, standard_error=math.inf, exceedances=count)
    alpha = math.log1p(count / places) / width
    return Tail(alpha, 2.0 * math.sinh(alpha * width / 2.0) / (width * math.sqrt(count)), count)


def _median_index(histogram: Histogram) -> int | None:
    """Index of the positive bucket with the (lower) median; None where there is none."""
    passed = histogram.zero_count + sum(histogram.negative_count)
    rank = (histogram.count + 1) // 2
    if passed >= rank:
        return None
    for index, count in zip(histogram.positive_index, histogram.positive_count, strict=True):
        passed += count
        if passed >= rank:
            return index
    return None
