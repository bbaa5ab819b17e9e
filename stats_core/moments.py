"""Moments of the per-example gradients of one parameter: count, mean, centred sum of squares, norms.

They are sufficient: whatever is asked later (variance, noise scale, signal-to-noise ratio) is formed
from them, and two of them merge exactly (Chan, Golub and LeVeque), so micro-batches, ranks and
shards give what one pass over all examples would have given.
"""

import math
from typing import NamedTuple, Self

from gradiometer.stats_core.arrays import (
    Array,
    concrete_count,
    namespace,
    positive_or_one,
    power_of_two,
    row_dots,
    row_square_sums,
    signs,
    widened,
)

__all__ = ["Moments", "standard_error", "variance"]


class Moments(NamedTuple):
    r"""Moments of the per-example gradients :math:`g_i` of one parameter, on the parameter's device.

    :math:`g_i = \nabla \ell_i` is the gradient of example i's own loss, :math:`a_i` its raw weight
    (1 for mean and sum losses), :math:`w_i = a_i / \sum a` and :math:`\bar g = \sum w_i g_i`.

    Being a NamedTuple, it is a pytree in jax and in torch alike.

    Attributes:
        count: examples, n.
        weight_sum: :math:`\sum a_i`.
        weight_sq_sum: :math:`\sum a_i^2`.
        mean: :math:`\bar g`, shape ``(*param,)``. Unit: loss / parameter.
        m2: :math:`\sum a_i (g_i - \bar g)^2`, shape ``(*param,)``. Unit: (loss / parameter)².
        sq_norms: :math:`\|g_i\|^2`, shape ``(batch,)``: this rank's examples only. In float64 where the device has
            it; else infinite above the gradient's own type's largest number.
        weights: :math:`a_i`, shape ``(batch,)``: this rank's examples only.
        dots: :math:`\langle g_i, \bar g \rangle`, shape ``(batch,)``, as ``sq_norms``; None where not asked for.
        sign_mean: :math:`\sum w_i \operatorname{sign} g_i`, shape ``(*param,)``, or None where not asked for.

    Example:
        >>> import numpy as np
        >>> moments = Moments.from_per_example(np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]))
        >>> moments.count, moments.mean, moments.m2
        (3, array([3., 2.]), array([ 8., 24.]))
        >>> moments.sq_norms
        array([ 1.,  9., 61.])
    """

    count: Array
    weight_sum: Array
    weight_sq_sum: Array
    mean: Array
    m2: Array
    sq_norms: Array
    weights: Array
    dots: Array | None = None
    sign_mean: Array | None = None

    @classmethod
    def from_per_example(
        cls, grads: Array, weights: Array | None = None, *, dots: bool = False, sign_mean: bool = False
    ) -> Self:
        r"""Moments of materialised per-example gradients.

        Centred before squaring, and the centre's own rounding is taken out again, so that the
        variance keeps its digits where the mean is far larger than the deviations.

        Args:
            grads: gradients of the unscaled per-example losses, shape ``(batch, *param)``.
                Half precision is accumulated in float32.
            weights: raw weights :math:`a_i`, shape ``(batch,)``; None for weights of 1.
            dots: True to compute ``dots`` too: one more pass over the gradients.
            sign_mean: True to compute ``sign_mean`` too: two more passes.

        Returns:
            Moments with ``mean`` and ``m2`` of shape ``(*param,)``.

        Raises:
            ValueError: if there is no example, or ``weights`` has another length.

        Guarantees:
            * float32, and a mean of 1e-3 to 1e4 standard deviations: ``m2`` within a factor 1 ± 1e-4 (Frobenius
              norm) of what float64 makes of the same gradients; it is never negative.
            * The gradients' scale does not matter between 1e-18 and 1e18, but for ``m2`` below.

        Edge cases:
            ==========================================  ===================================================
            float32 deviations below 1e-19              have no square in range and count as 0 in ``m2``
            float32, :math:`M_2` above 3.4e38           infinite: more than 340 examples at a scale of 1e18
            a NaN or inf gradient                       NaN in the elements it touches, not in others
            ==========================================  ===================================================

        Example:
            >>> import numpy as np
            >>> Moments.from_per_example(np.array([[1.0], [4.0]]), weights=np.array([2.0, 1.0])).mean
            array([2.])
        """
        batch = grads.shape[0] if grads.ndim else 0
        if batch == 0:
            raise ValueError(
                f"Moments.from_per_example needs at least one example on the leading axis, got grads of shape "
                f"{tuple(grads.shape)}; pass gradients of shape (batch, *param)"
            )
        if weights is not None and tuple(weights.shape) != (batch,):
            raise ValueError(
                f"Moments.from_per_example needs one weight an example, got weights of shape {tuple(weights.shape)} "
                f"for batch={batch}; pass weights of shape (batch,)"
            )
        xp = namespace(grads)
        grads = widened(grads)
        flat = xp.reshape(grads, (batch, math.prod(grads.shape[1:])))
        sq_norms = row_square_sums(flat)
        if weights is None:
            weights = xp.ones_like(sq_norms, dtype=grads.dtype)
            weight_sum, weight_sq_sum = float(batch), float(batch)
            column = None
        else:
            weights = xp.astype(weights, grads.dtype)
            weight_sum, weight_sq_sum = xp.sum(weights), xp.sum(weights * weights)
            column = xp.reshape(weights, (batch, *([1] * (grads.ndim - 1))))

        def weighted_sum(values: Array) -> Array:
            return xp.sum(values if column is None else column * values, axis=0)

        divisor = positive_or_one(weight_sum)  # a shard of nothing but padding has no mean: 0, not NaN
        mean = weighted_sum(grads) / divisor
        centred = grads - mean[None]
        slip = weighted_sum(centred) / divisor  # what rounding left of the mean in the deviations
        m2 = weighted_sum(centred * centred) - weight_sum * slip * slip
        mean = mean + slip
        return cls(
            count=batch,
            weight_sum=weight_sum,
            weight_sq_sum=weight_sq_sum,
            mean=mean,
            m2=xp.maximum(m2, xp.zeros_like(m2)),
            sq_norms=sq_norms,
            weights=weights,
            dots=row_dots(flat, xp.reshape(mean, (-1,))) if dots else None,
            # A NaN has no sign, nor has the mean of signs that it is in.
            sign_mean=xp.where(xp.isnan(mean), mean, weighted_sum(signs(grads)) / divisor) if sign_mean else None,
        )

    def merge(self, other: Self) -> Self:
        r"""Moments of both sets of examples together, by the rule of Chan, Golub and LeVeque.

        .. math:: M_2 = M_{2,a} + M_{2,b} + \frac{W_a W_b}{W_a + W_b} (\bar g_b - \bar g_a)^2

        Guarantees:
            * Exact in exact arithmetic: merging shards in any order gives what one pass gives.
            * float32, 2 to 16 shards: ``m2`` within 1e-4 of that (Frobenius norm) where means are up to 1e3 standard
              deviations, within 1e-3 up to 1e4: a shard's mean has no more digits. It is never negative.
            * Moments with ``count`` 0 are the identity.

        Raises:
            ValueError: if one side has ``dots`` or ``sign_mean`` and the other has not, or the
                parameters' shapes differ. (Merged ``dots`` would refer to two different means,
                so they are given up: the result has None.)

        Example:
            >>> import numpy as np
            >>> grads = np.array([[1.0], [3.0], [5.0]])
            >>> left, right = Moments.from_per_example(grads[:1]), Moments.from_per_example(grads[1:])
            >>> float(left.merge(right).m2[0]) == float(Moments.from_per_example(grads).m2[0])
            True

        References:
            Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
            recommendations", The American Statistician 37(3), 1983.
        """
        if tuple(self.mean.shape) != tuple(other.mean.shape):
            raise ValueError(
                f"Moments.merge needs moments of one parameter, got mean of shape {tuple(self.mean.shape)} and "
                f"{tuple(other.mean.shape)}; merge each parameter with its own"
            )
        if (self.sign_mean is None) != (other.sign_mean is None):
            raise ValueError(
                "Moments.merge needs sign_mean on both sides or on neither, got it on one; "
                "collect both with the same statistics"
            )
        xp = namespace(self.mean, other.mean)
        weight_sum = self.weight_sum + other.weight_sum
        share = other.weight_sum / positive_or_one(weight_sum)
        delta = other.mean - self.mean
        sign_mean = None
        if self.sign_mean is not None and other.sign_mean is not None:
            sign_mean = self.sign_mean + (other.sign_mean - self.sign_mean) * share
        return type(self)(
            count=self.count + other.count,
            weight_sum=weight_sum,
            weight_sq_sum=self.weight_sq_sum + other.weight_sq_sum,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * (self.weight_sum * share),
            sq_norms=xp.concat([self.sq_norms, other.sq_norms]),
            weights=xp.concat([self.weights, other.weights]),
            sign_mean=sign_mean,
        )

    def scaled(self, factor: Array) -> Self:
        """Moments of ``factor`` times every gradient: what a loss scale or a reduction is undone with.

        ``sign_mean`` stays as it is, and is turned over by a negative factor.

        Example:
            >>> import numpy as np
            >>> moments = Moments.from_per_example(np.array([[1.0], [-3.0], [-4.0]]), sign_mean=True).scaled(-0.5)
            >>> float(moments.mean[0]), round(float(moments.sign_mean[0]), 4)
            (1.0, 0.3333)
        """
        return self._replace(
            mean=self.mean * factor,
            m2=_times_square(self.m2, factor),
            sq_norms=_times_square(self.sq_norms, factor),
            dots=None if self.dots is None else _times_square(self.dots, factor),
            sign_mean=None if self.sign_mean is None else self.sign_mean * _sign(factor),
        )

    def in_unit(self, exponent: Array) -> Self:
        r"""Moments of the gradients over :math:`2^e`, for sums that would have no room in float32.

        Args:
            exponent: e, an integer scalar, as `gradiometer.stats_core.arrays.unit_exponent`; 0 changes nothing.

        Returns:
            Moments whose squares are :math:`4^{-e}` times these. Exact, but for what leaves float32's range.

        Example:
            >>> import numpy as np
            >>> from gradiometer.stats_core.arrays import square_sum, unit_exponent
            >>> moments = Moments.from_per_example(np.full((2, 3), 1e18, np.float32))
            >>> exponent = unit_exponent(moments.mean, squares=[moments.m2])
            >>> round(float(square_sum(moments.in_unit(exponent).mean)) * 4.0 ** int(exponent) / 1e36, 4)
            3.0
        """
        return self.scaled(power_of_two(-exponent, self.mean.dtype))


def _times_square(values: Array, factor: Array) -> Array:
    """Values times the square of a factor; the factor twice where its square could leave float32's range."""
    if isinstance(factor, int | float) and 1e-30 < factor * factor < 1e30:
        return values * (factor * factor)
    return values * factor * factor


def _sign(factor: Array) -> Array:
    if isinstance(factor, int | float):
        return (factor > 0) - (factor < 0)
    return signs(factor)


def variance(moments: Moments, *, ddof: int = 1) -> Array:
    r"""Per-element variance of the per-example gradients.

    .. math:: s^2 = \frac{M_2}{W - \mathrm{ddof} \sum a_i^2 / W}, \qquad W = \sum a_i

    which is :math:`M_2 / (n - \mathrm{ddof})` where all weights are 1. With ``ddof=1`` it is an
    unbiased estimate of the diagonal of the per-example gradient covariance :math:`\Sigma`; its sum
    over elements estimates :math:`\operatorname{tr} \Sigma`, the numerator of the noise scale.

    Args:
        moments: of gradients of the *unscaled* per-example losses. For a loss averaged over the
            batch, multiply the gradients by n first; else the result is too small by n².
        ddof: 1 when the examples were drawn from a larger data set (the usual case), 0 when they
            are the whole population.

    Returns:
        s², shape ``(*param,)``. Unit: (loss / parameter)².

    Raises:
        ValueError: if ``moments.count <= ddof``, where the estimate does not exist. (NaN instead
            where the count is traced, as inside ``jit``.)

    Guarantees:
        * Finite moments give a finite result that is never negative.
        * Adding one vector to every gradient leaves the result unchanged, up to rounding.
        * Merging shards in any order gives the same result, up to rounding.

    Edge cases:
        ===========================  ==========================================
        all gradients equal          exactly 0 if their mean is exact in the dtype
        ``count == 1, ddof == 0``    0
        ``count <= ddof``            ``ValueError``; NaN where traced
        a NaN or inf gradient        NaN in the elements it touches, not in others
        ===========================  ==========================================

    Example:
        >>> import numpy as np
        >>> variance(Moments.from_per_example(np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]])))
        array([ 4., 12.])
        >>> variance(Moments.from_per_example(np.array([[1.0, 0.0]])))
        Traceback (most recent call last):
            ...
        ValueError: variance needs count > ddof, got count=1, ddof=1; collect more examples or lower ddof
    """
    count = concrete_count(moments.count)
    if count is not None and count <= ddof:
        raise ValueError(
            f"variance needs count > ddof, got count={count:g}, ddof={ddof}; collect more examples or lower ddof"
        )
    freedom = moments.weight_sum - ddof * moments.weight_sq_sum / moments.weight_sum
    if count is None:
        xp = namespace(moments.mean)
        freedom = xp.where(moments.count <= ddof, xp.nan, freedom)
    return moments.m2 / freedom


def standard_error(moments: Moments) -> Array:
    r"""Standard error of the mean gradient, per element.

    .. math:: \sqrt{s^2 \textstyle\sum w_i^2}

    which is :math:`s / \sqrt n` where all weights are 1: by how much the batch gradient would differ
    from one batch to the next if nothing but the drawn examples changed.

    Args:
        moments: as `variance`. Where weights differ, exact for examples of one variance only.

    Returns:
        Shape ``(*param,)``. Unit: loss / parameter.

    Raises:
        ValueError: as `variance` with ``ddof=1``.

    Example:
        >>> import numpy as np
        >>> standard_error(Moments.from_per_example(np.array([[1.0], [3.0], [5.0], [7.0]]))).round(4)
        array([1.291])
    """
    xp = namespace(moments.mean)
    share = moments.weight_sq_sum / (moments.weight_sum * moments.weight_sum)
    return xp.sqrt(variance(moments)) * share**0.5  # the roots have room where a small variance over n has none
