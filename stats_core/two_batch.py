r"""Noise without per-example gradients: from batches of two sizes, as micro-batches and ranks have them.

The mean of b examples has :math:`E\|g_b\|^2 = |G|^2 + \operatorname{tr} \Sigma / b`, so two sizes tell signal from
noise. Per-example gradients are the case b = 1, and the best one: with b = 4 of B = 8 the estimate of
:math:`\operatorname{tr} \Sigma` from one half has 5 times its spread, from both halves 2.6 times
(:math:`\sqrt{(B - 1)/(k - 1)}` from k micro-batches), that of :math:`|G|^2` 1.7 and 1.2 times.

The reverse is what per-example gradients are checked with: where the examples of a micro-batch are alike,
micro-batches differ by more than their examples explain (`clustering`).
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from gradiometer.stats_core.arrays import Array, concrete_count, namespace, positive_or_one, square_sum, total
from gradiometer.stats_core.derived import divided
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import NoiseSums

__all__ = ["Clustering", "clustering", "micro_batch_sums", "sums_of_means", "sums_of_moments", "two_batch_sums"]

_ROUNDING = 1e-6
"""Degrees of freedom, of the weights they are a difference of, that float32 may make of 0."""


def two_batch_sums(small_sq_norm: Array, small: Array, big_sq_norm: Array, big: Array) -> NoiseSums:
    r"""The unbiased pair from the squared norms of a small batch's mean gradient and of a big one's.

    .. math::
        \widehat{\operatorname{tr}} \Sigma = \frac{\|g_b\|^2 - \|g_B\|^2}{1/b - 1/B}, \qquad
        |\hat G|^2 = \frac{B \|g_B\|^2 - b \|g_b\|^2}{B - b}

    Neither is kept from being negative: averages over steps are to be unbiased.

    Args:
        small_sq_norm: :math:`\|g_b\|^2`, of any shape; of one small batch, or the mean over several of one size.
        small: b, examples of a small batch.
        big_sq_norm: :math:`\|g_B\|^2`, same shape. The small batches may be parts of it.
        big: B, examples of the big batch.

    Returns:
        Sums in the given shape and type; ``sq_norm_mean`` is what the other two make of it,
        :math:`|\hat G|^2 + \widehat{\operatorname{tr}} \Sigma`.

    Raises:
        ValueError: unless 0 < ``small`` < ``big``. (NaN instead where a size is traced.)

    Guarantees:
        * Unbiased for examples drawn independently.
        * Sums of several parameters add up to those of all of them as one.

    Example:
        >>> two_batch_sums(3.0, 4, 2.0, 8)
        NoiseSums(mean_sq_norm=2.0, sq_norm_mean=9.0, variance_trace=8.0, batch_variance=1.0, grad_sq_norm=1.0)

    References:
        McCandlish et al., "An empirical model of large-batch training", 2018, arXiv 1812.06162, appendix A.1.
    """
    known_small, known_big = concrete_count(small), concrete_count(big)
    if known_small is not None and known_big is not None and not 0 < known_small < known_big:
        raise ValueError(
            f"two_batch_sums needs 0 < small < big, got small={known_small:g}, big={known_big:g}; "
            "compare a part of the batch with the whole"
        )
    freedom = _or_nan(big / small - 1.0)  # B/b - 1: what is not positive has no estimate
    return _sums((small_sq_norm - big_sq_norm) / freedom, big, big_sq_norm)


def micro_batch_sums(sq_norms: Array, sizes: Array, mean_sq_norm: Array) -> NoiseSums:
    r"""The same from k micro-batches (or ranks) that make up one batch, of equal size or not.

    With :math:`B = \sum b_k` and :math:`\bar g = \sum b_k g_k / B`:

    .. math:: \widehat{\operatorname{tr}} \Sigma = \frac{\sum b_k \|g_k\|^2 - B \|\bar g\|^2}{k - 1}

    Two large numbers are subtracted: where the means themselves are at hand, `sums_of_means` keeps more digits.

    Args:
        sq_norms: :math:`\|g_k\|^2` of each micro-batch's mean gradient, shape ``(k, ...)``.
        sizes: :math:`b_k`, examples of each, shape ``(k,)``; one of 0 is passed over.
        mean_sq_norm: :math:`\|\bar g\|^2`, shape ``(...)``.

    Returns:
        As `two_batch_sums`, shape ``(...)``; NaN where fewer than two micro-batches have examples.

    Raises:
        ValueError: if there are fewer than two, or sizes for another number.

    Example:
        >>> import numpy as np
        >>> sums = micro_batch_sums(np.array([5.0, 1.0]), np.array([4.0, 4.0]), 2.0)    # two_batch_sums(3.0, 4, 2.0, 8)
        >>> float(sums.variance_trace), float(sums.grad_sq_norm)
        (8.0, 1.0)
    """
    _check("micro_batch_sums", sq_norms.shape[0], sizes.shape[0])
    xp = namespace(sq_norms)
    sizes = xp.astype(sizes, sq_norms.dtype)
    column = xp.reshape(sizes, (-1, *([1] * (sq_norms.ndim - 1))))
    present = column > 0  # an empty micro-batch has no mean: often NaN
    between = xp.sum(xp.where(present, column * sq_norms, xp.zeros_like(sq_norms)), axis=0)
    batch = xp.sum(sizes)
    freedom = _or_nan(xp.sum(xp.astype(sizes > 0, sizes.dtype)) - 1.0)
    return _sums((between - batch * mean_sq_norm) / (batch * freedom), batch, mean_sq_norm)


def sums_of_means(means: Sequence[Array], sizes: Sequence[Array]) -> NoiseSums:
    r"""The same from the mean gradients of k micro-batches themselves, for one parameter.

    .. math:: \widehat{\operatorname{tr}} \Sigma = \frac{1}{k - 1} \sum_k b_k \|g_k - \bar g\|^2

    Args:
        means: :math:`g_k`, shape ``(*param,)`` each.
        sizes: :math:`b_k`, examples of each: numbers or scalars.

    Returns:
        As `two_batch_sums`: scalars in float64 where the device has it.

    Raises:
        ValueError: if there are fewer than two, or sizes for another number.

    Guarantees:
        * ``variance_trace`` and ``batch_variance`` are never negative, and adding one vector to every mean leaves them
          as they are.
        * The order of the micro-batches does not matter.
        * Micro-batches of one example give what `gradiometer.stats_core.noise.noise_sums` gives.

    Example:
        >>> import numpy as np
        >>> sums = sums_of_means([np.array([1.0, 0.0]), np.array([3.0, 0.0])], [4, 4])
        >>> float(sums.variance_trace), float(sums.grad_sq_norm)
        (8.0, 3.0)
    """
    _check("sums_of_means", len(means), len(sizes))
    return _of_weighted(means, sizes, sizes)


def sums_of_moments(parts: Sequence[Moments]) -> NoiseSums:
    r"""The same from the Moments of micro-batches, reading their means and weights alone.

    With raw weights, :math:`W_k = \sum a_i` and :math:`Q_k = \sum a_i^2` of each micro-batch, W and Q of all:

    .. math:: \widehat{\operatorname{tr}} \Sigma = \frac{\sum_k W_k \|g_k - \bar g\|^2}{\sum_k Q_k / W_k - Q / W}

    Unbiased where all examples have one covariance, whatever their weights.

    Args:
        parts: of one parameter, each of its own examples.

    Returns:
        As `sums_of_means`.

    Raises:
        ValueError: if there are fewer than two.

    Example:
        >>> import numpy as np
        >>> parts = [Moments.from_per_example(np.array(g)) for g in ([[0.0], [2.0]], [[2.0], [4.0]])]
        >>> float(sums_of_moments(parts).variance_trace)
        4.0
    """
    _check("sums_of_moments", len(parts), len(parts))
    return _of_weighted(
        [part.mean for part in parts], [part.weight_sum for part in parts], [part.weight_sq_sum for part in parts]
    )


class Clustering(NamedTuple):
    """The variance of one example, told by micro-batches and by the examples within them.

    Both add up over parameters, layers and steps; their ratio is formed from sums.

    Attributes:
        between: from the micro-batches' means, as ``variance_trace``. Unit: (loss / parameter)².
        within: from the examples' deviations from the mean of their own micro-batch. Same unit.
    """

    between: Array
    within: Array

    @property
    def ratio(self) -> Array:
        """``between`` over ``within``; NaN where ``within`` is 0."""
        return divided(self.between, self.within)


def clustering(parts: Sequence[Moments]) -> Clustering:
    r"""Are the examples of a micro-batch (or of a rank) more alike than those of different ones?

    .. math::
        \text{ratio} = \frac{\sum_k W_k \|g_k - \bar g\|^2 / (\sum_k Q_k / W_k - Q / W)}
                            {\sum_k \sum M_{2,k} / \sum_k (W_k - Q_k / W_k)}

    an F ratio: about 1 where all examples are independent. Above 1, those of a micro-batch have something in common:
    one document, one class, a dropout mask, a draw that came twice. With a correlation ρ between the examples of a
    micro-batch of b it is about 1 + bρ/(1 − ρ); the batch gradient varies by more than ``batch_variance`` then. Below
    1 they are spread on purpose (stratified). Motion from step to step does not show in it, and does in
    ``variance_ratio``: the two tell clustering from motion.

    Args:
        parts: of one parameter, each of one micro-batch's examples; two or more, and at least one with two examples.

    Returns:
        Two scalars. Add them up over parameters and steps before the ratio is read: for k micro-batches of one step its
        standard deviation is about :math:`\sqrt{2/((k-1) r)}`, r the effective number of independent elements.

    Raises:
        ValueError: if there are fewer than two.

    Edge cases:
        =================================  ===================
        every micro-batch of one example   ``within`` is NaN
        all gradients equal                0, 0; ratio NaN
        =================================  ===================

    Example:
        >>> import numpy as np
        >>> parts = [Moments.from_per_example(np.array(g)) for g in ([[0.0], [2.0]], [[2.0], [4.0]])]
        >>> found = clustering(parts)
        >>> float(found.between), float(found.within), float(found.ratio)
        (4.0, 2.0, 2.0)

    References:
        Kish, "Survey sampling", 1965, chapter 5 (intraclass correlation and the design effect).
    """
    _check("clustering", len(parts), len(parts))
    weight_sum = _added([part.weight_sum for part in parts])
    freedom = weight_sum - _added([_over(part.weight_sq_sum, part.weight_sum) for part in parts])
    within = _added([total(part.m2) for part in parts]) / _or_nan(freedom, _ROUNDING * weight_sum)
    return Clustering(sums_of_moments(parts).variance_trace, within)


def _check(who: str, batches: int, sizes: int) -> None:
    if batches < 2 or sizes != batches:
        raise ValueError(
            f"{who} needs at least two micro-batches and a size for each, got micro-batches={batches}, sizes={sizes}; "
            "take per-example gradients where there is but one"
        )


def _of_weighted(means: Sequence[Array], weight_sums: Sequence[Array], weight_sq_sums: Sequence[Array]) -> NoiseSums:
    weight_sum, weight_sq_sum = _added(weight_sums), _added(weight_sq_sums)
    mean = _added([m * _over(w, weight_sum) for m, w in zip(means, weight_sums, strict=True)])
    between = _added([square_sum(m - mean) * w for m, w in zip(means, weight_sums, strict=True)])
    each = _added([_over(q, w) for q, w in zip(weight_sq_sums, weight_sums, strict=True)])
    trace = between / _or_nan(each - _over(weight_sq_sum, weight_sum), _ROUNDING * each)
    share = _over(weight_sq_sum, weight_sum * weight_sum)
    return _sums(trace * share, 1.0 / positive_or_one(share), square_sum(mean))


def _sums(batch_variance: Array, batch: Array, mean_sq_norm: Array) -> NoiseSums:
    trace = batch_variance * batch
    return NoiseSums(
        mean_sq_norm=mean_sq_norm,
        sq_norm_mean=mean_sq_norm - batch_variance + trace,
        variance_trace=trace,
        batch_variance=batch_variance,
        grad_sq_norm=mean_sq_norm - batch_variance,
    )


def _added(values: Sequence[Array]) -> Array:
    return functools.reduce(operator.add, values)


def _over(top: Array, bottom: Array) -> Array:
    """The quotient; of nothing over nothing, nothing."""
    return top / positive_or_one(bottom)


def _or_nan(value: Array, least: Array = 0.0) -> Array:
    """The value, or NaN where it is not above ``least``."""
    if isinstance(value, int | float) and isinstance(least, int | float):
        return value if value > least else float("nan")
    return namespace(value, least).where(value > least, value, float("nan"))
