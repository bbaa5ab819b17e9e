r"""Noise of the mini-batch gradient, estimated from the examples of one batch.

The sums here are additive over parameters, layers and ranks; ratios of them (noise scale, SNR) are
formed where they are read, over a window of steps (`gradiometer.stats_core.window`).
"""

from typing import NamedTuple

from gradiometer.stats_core.arrays import Array, concrete_count, namespace, square_sum, total
from gradiometer.stats_core.moments import Moments

__all__ = ["NoiseSums", "noise_of_parts", "noise_sums"]


class NoiseSums(NamedTuple):
    r"""Unbiased sums over the elements of one parameter (or of several, added up).

    Attributes:
        mean_sq_norm: :math:`\|\bar g\|^2`, biased up by ``batch_variance``. Unit: (loss / parameter)².
        sq_norm_mean: :math:`\sum w_i \|g_i\|^2`. Same unit.
        variance_trace: :math:`\widehat{\operatorname{tr}} \Sigma`, the examples' variance summed over
            elements. Same unit.
        batch_variance: P, the variance of the batch gradient :math:`\bar g` across examples:
            ``variance_trace`` / n where all weights are 1. Same unit.
        grad_sq_norm: :math:`|\hat G|^2`, the squared norm of the true gradient: may be negative.
    """

    mean_sq_norm: Array
    sq_norm_mean: Array
    variance_trace: Array
    batch_variance: Array
    grad_sq_norm: Array


def noise_sums(moments: Moments) -> NoiseSums:
    r"""The unbiased pair of the noise scale, and the sums it is made of, for one parameter.

    With :math:`s_2 = \sum w_i^2`, :math:`n_i = \|g_i\|^2`:

    .. math::
        P = \widehat{\operatorname{Var}}(\bar g) = \frac{\sum w_i^2 n_i - s_2 \|\bar g\|^2}{1 - s_2}, \qquad
        |\hat G|^2 = \|\bar g\|^2 - P, \qquad
        \widehat{\operatorname{tr}} \Sigma = \frac{\sum M_2}{W} + P

    which is :math:`P = \sum M_2 / (n (n-1))` where all weights are equal; that form is used there, since
    it does not subtract large numbers. The weighted form holds for examples of unequal covariance, as
    under a token-mean loss. :math:`\sum w_i n_i` is :math:`\|\bar g\|^2 + \sum M_2 / W` under any weights.

    Args:
        moments: of one parameter. Where weights differ, ``sq_norms`` and ``weights`` must be those of all ``count``
            examples.

    Returns:
        Scalars in float64 where the device has it. Elsewhere (jax), where gradients are as far from 1 as 1e-18 or
        1e18, form them from ``moments.in_unit``, and multiply by 4 to its exponent on the host.

    Guarantees:
        * Examples of equal weight: ``variance_trace`` and ``batch_variance`` are never negative, and adding one vector
          to every gradient leaves them as they are.
        * Examples of unequal weight: both hold on average only, and the spread grows with :math:`\|\bar g\|^2`.
        * The sums of several parameters add up to those of all of them as one.

    Edge cases:
        ==========================  =============================================================
        fewer than two examples     ``variance_trace``, ``batch_variance``, ``grad_sq_norm``: NaN
        a NaN or inf gradient       NaN or infinite sums
        ==========================  =============================================================

    Example:
        >>> import numpy as np
        >>> sums = noise_sums(Moments.from_per_example(np.array([[1.0], [3.0], [5.0]])))
        >>> [round(float(x), 4) for x in (sums.mean_sq_norm, sums.variance_trace, sums.grad_sq_norm)]
        [9.0, 4.0, 7.6667]

    References:
        McCandlish et al., "An empirical model of large-batch training", 2018, arXiv 1812.06162, appendix A.1.
    """
    return noise_of_parts(square_sum(moments.mean), total(moments.m2), moments.sq_norms, moments)


def noise_of_parts(mean_sq_norm: Array, m2_sum: Array, sq_norms: Array, batch: Moments) -> NoiseSums:
    """The same from what was summed already, for one parameter or for many at once.

    Args:
        mean_sq_norm: ‖ḡ‖² of each, any shape ``(...)``.
        m2_sum: ΣM₂ of each, same shape.
        sq_norms: ‖gᵢ‖² of each, shape ``(..., batch)``; used where the weights are not equal.
        batch: Moments of any parameter: the count and the weights are those of the batch, alike for all.

    Returns:
        Sums of shape ``(...)``.
    """
    xp = namespace(sq_norms)  # numpy's scalars have none
    deviations = m2_sum / batch.weight_sum
    share = batch.weight_sq_sum / (batch.weight_sum * batch.weight_sum)  # s2
    equal = abs(share * batch.count - 1.0) < 1e-6  # a bool, or an array that nobody may look at
    freedom = _or_nan(1.0 - share, batch.count)
    plain = deviations * (share / freedom)

    def weighted() -> Array:
        normalised = batch.weights / batch.weight_sum
        squares = xp.broadcast_to(normalised * normalised, sq_norms.shape)
        summed = xp.sum(squares * sq_norms, axis=-1, dtype=mean_sq_norm.dtype)
        return (summed - share * mean_sq_norm) / freedom

    batch_variance = (plain if equal else weighted()) if isinstance(equal, bool) else xp.where(equal, plain, weighted())
    return NoiseSums(
        mean_sq_norm=mean_sq_norm,
        sq_norm_mean=mean_sq_norm + deviations,  # Σw‖g‖² = ‖ḡ‖² + Σw‖g − ḡ‖²
        variance_trace=deviations + batch_variance,
        batch_variance=batch_variance,
        grad_sq_norm=mean_sq_norm - batch_variance,
    )


def _or_nan(value: Array, count: Array) -> Array:
    """The value, or NaN where there are fewer than two examples."""
    known = concrete_count(count)
    if known is not None:
        return value if known > 1 else float("nan")
    xp = namespace(count)
    return xp.where(count > 1, value, xp.nan)
