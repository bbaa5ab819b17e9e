r"""Error bars: intervals for what is read over a window of steps, and for one step's signal-to-noise ratio.

Formed on host arrays in float64, for many layers at once. How often each holds the truth was measured:
``docs/intervals.md`` has the tables, ``benchmarks/coverage.py`` makes them.
"""

import math
from typing import Any, NamedTuple

import array_api_compat

from gradiometer.stats_core.arrays import Array, namespace, square_sum
from gradiometer.stats_core.derived import divided
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.student import t_quantile

__all__ = [
    "Interval",
    "inverted",
    "ratio_interval",
    "snr_interval_of_moments",
    "snr_interval_of_step",
    "variance_ratio_interval",
]

_FEWEST = 4  # steps, blocks of steps or examples


class Interval(NamedTuple):
    """Both ends of an interval, ``low`` and ``high``, in the unit of what it is for.

    NaN where there are too few steps; ``high`` is infinite where there is no upper end.

    Example:
        >>> Interval(12.0, 31.0).is_resolved, Interval(12.0, math.inf).is_resolved
        (True, False)
    """

    low: Array
    high: Array

    @property
    def is_resolved(self) -> Any:
        """Whether both ends exist and are finite, as a bool or an array of them.

        Of a noise scale: whether the window can tell the signal from 0. Where it can't, noise scales without bound
        agree with it: there is no upper end.
        """
        if isinstance(self.high, int | float):
            return math.isfinite(self.low) and math.isfinite(self.high)
        xp = namespace(self.high)
        return xp.isfinite(self.low) & xp.isfinite(self.high)


def ratio_interval(numerator: Array, denominator: Array, level: float = 0.95, *, block: int = 1) -> Interval:
    r"""Interval for a ratio of sums over a window of steps, for each layer: the jackknife over steps.

    .. math::
        \theta = \frac{\sum_k A_k}{\sum_k S_k}, \qquad
        \theta_{-k} = \frac{\sum_{l \ne k} A_l}{\sum_{l \ne k} S_l}, \qquad
        \theta \pm t_{K-1} \sqrt{\tfrac{K-1}{K} \textstyle\sum_k (\theta_{-k} - \bar\theta_{-})^2}

    For a signal-to-noise ratio A is :math:`|\hat G|^2` and S the noise; `inverted` makes an interval of it for the
    noise scale. It takes the steps as independent draws of one and the same ratio: where they are correlated give
    ``block``, where the ratio changes along the window it speaks of the window's mean.

    Args:
        numerator: A, shape ``(steps, layers)``, on the host.
        denominator: S, the same.
        level: how often the interval is meant to hold the truth.
        block: leave out this many consecutive steps at a time, where neighbouring steps correlate: several times
            the number of steps over which they do, and a tenth of the window at most.

    Returns:
        Both ends, shape ``(layers,)``. NaN below 4 blocks, or where a sum of denominators is 0.

    Raises:
        ValueError: if ``level`` is not between 0 and 1, or ``block`` below 1.

    Guarantees:
        * Steps where either side is not finite are passed over, for each layer by itself.
        * With ``block=1`` the order of the steps does not matter.
        * Multiplying all numerators by c multiplies both ends by c (for c < 0 they change places).

    Edge cases:
        =====================================  =================================================
        all steps have the same ratio          an interval of no width, up to rounding
        the last block is shorter              it counts by its length (Busing et al. 1999)
        one step far larger than the others    no digits are lost: sums leave it out
        =====================================  =================================================

    Example:
        >>> import numpy as np
        >>> signal, noise = np.array([[3.0], [5.0], [4.0], [4.0]]), np.full((4, 1), 8.0)
        >>> found = ratio_interval(signal, noise)
        >>> round(float(found.low[0]), 3), round(float(found.high[0]), 3)
        (0.338, 0.662)

    References:
        Tukey, "Bias and confidence in not-quite large samples", Annals of Mathematical Statistics 29, 1958; Busing,
        Meijer and van der Leeden, "Delete-m jackknife for unequal m", Statistics and Computing 9, 1999.
    """
    if block < 1:
        raise ValueError(f"ratio_interval needs block >= 1, got block={block}; 1 is for steps that do not correlate")
    xp = namespace(numerator, denominator)
    numerator, denominator = _wide(numerator), _wide(denominator)
    present = xp.isfinite(numerator) & xp.isfinite(denominator)
    zero = xp.zeros_like(numerator)
    sizes = _blocks(xp.astype(present, numerator.dtype), block)
    top = _blocks(xp.where(present, numerator, zero), block)
    bottom = _blocks(xp.where(present, denominator, zero), block)
    estimate = divided(xp.sum(top, axis=0), xp.sum(bottom, axis=0))
    width = _jackknife(estimate, divided(_others(top), _others(bottom)), sizes, level)
    return Interval(estimate - width, estimate + width)


def inverted(found: Interval) -> Interval:
    r"""From an interval for a signal-to-noise ratio to one for its inverse: the noise scale.

    .. math:: [a, b] \to [1/b, 1/a]

    Where the interval reaches 0 there is no upper end, and the noise scale is **not resolved**: ever larger ones
    agree with the data. That is an answer, not a failure: so much noise, in a window so short, hides the signal.

    Args:
        found: of `ratio_interval` or `snr_interval_of_step`, in signal over noise.

    Returns:
        Both ends, same shape.

    Edge cases:
        ===================  ====================================================
        low end 0 or below   high end infinite: not resolved (``is_resolved``)
        high end 0 or below  both ends infinite: not even the sign of a signal
        NaN                  NaN
        ===================  ====================================================

    Example:
        >>> import numpy as np
        >>> found = inverted(Interval(np.array([0.02, -0.01]), np.array([0.05, 0.04])))
        >>> found.low, found.high, found.is_resolved
        (array([20., 25.]), array([50., inf]), array([ True, False]))
    """
    return Interval(_inverse(found.high), _inverse(found.low))


def variance_ratio_interval(step_variance: Array, expected: Array, level: float = 0.95) -> Interval:
    r"""Interval for ρ, the step-to-step variance over that expected of independent examples, for each layer.

    With :math:`D_t` and :math:`\tilde P_t` of T pairs of steps, :math:`\rho = \sum D / \sum \tilde P` and

    .. math::
        z_t = \frac{D_t - \rho \tilde P_t}{\operatorname{mean} \tilde P}, \qquad
        V = \frac{\max(c_0 + 2 c_1, c_0)}{T - 2}, \qquad
        \rho \exp\left(\pm t_{2T/3 - 1} \sqrt V / \rho\right)

    where :math:`c_0, c_1` are the first two autocovariances of z: consecutive D share a gradient, and correlate
    by 1/4, so that T of them are worth 2T/3. An interval that holds 1 says: nothing but the draw of examples.

    Args:
        step_variance: D, shape ``(steps, layers)``, on the host.
        expected: P̃, the same.
        level: how often the interval is meant to hold the truth.

    Returns:
        Both ends, shape ``(layers,)``, above 0. NaN below 4 pairs, or where ρ is not above 0.

    Raises:
        ValueError: if ``level`` is not between 0 and 1.

    Guarantees:
        * Steps where either side is not finite are passed over; steps on their two sides are not neighbours.
        * Multiplying all D by c multiplies both ends by c.

    Example:
        >>> import numpy as np
        >>> found = variance_ratio_interval(np.array([[1.0], [1.4], [0.8], [1.2]]), np.ones((4, 1)))
        >>> round(float(found.low[0]), 2), round(float(found.high[0]), 2)
        (0.52, 2.34)

    References:
        von Neumann, "Distribution of the ratio of the mean square successive difference to the variance", 1941 (D).
    """
    xp = namespace(step_variance, expected)
    step_variance, expected = _wide(step_variance), _wide(expected)
    present = xp.isfinite(step_variance) & xp.isfinite(expected)
    zero = xp.zeros_like(expected)
    step_variance, expected = xp.where(present, step_variance, zero), xp.where(present, expected, zero)
    count = xp.sum(xp.astype(present, expected.dtype), axis=0)
    enough = count >= _FEWEST
    count = xp.where(enough, count, xp.ones_like(count) * _FEWEST)
    ratio = divided(xp.sum(step_variance, axis=0), xp.sum(expected, axis=0))
    z = divided(step_variance - ratio * expected, xp.sum(expected, axis=0) / count + zero)
    c0 = xp.sum(z * z, axis=0) / count
    c1 = xp.sum(z[1:] * z[:-1], axis=0) / count
    variance = xp.where(c1 > 0, c0 + 2 * c1, c0) / (count - 2)
    exists = enough & (ratio > 0)
    spread = _t(level, 2 * count / 3 - 1) * xp.sqrt(variance) / xp.where(exists, ratio, 1.0)
    factor = xp.exp(xp.where(spread < 700, spread, 700.0))  # within a double's range
    return Interval(xp.where(exists, ratio / factor, xp.nan), xp.where(exists, ratio * factor, xp.nan))


def snr_interval_of_step(
    sq_norms: Array, dots: Array, mean_sq_norm: Array, weights: Array | None = None, level: float = 0.95
) -> Interval:
    r"""Interval for one example's signal-to-noise ratio from a single step: the jackknife over examples.

    With :math:`w_i` adding up to 1, :math:`s_2 = \sum w_i^2`, :math:`n_i = \|g_i\|^2`,
    :math:`d_i = \langle g_i, \bar g \rangle`:

    .. math::
        \mathrm{SNR} = \frac{|\hat G|^2}{\widehat{\operatorname{tr}} \Sigma}, \qquad
        |\hat G|^2 = \frac{\|\bar g\|^2 - \sum w_i^2 n_i}{1 - s_2}, \qquad
        \widehat{\operatorname{tr}} \Sigma = \textstyle\sum w_i n_i - |\hat G|^2

    and without example i, from its norm and dot product alone,
    :math:`\|\bar g_{-i}\|^2 = (\|\bar g\|^2 - 2 w_i d_i + w_i^2 n_i)/(1 - w_i)^2`.

    The lower end is :math:`\mathrm{SNR} - h`, where :math:`h = t_{n-1} \sqrt V` and V is the jackknife's variance.
    V is proportional to :math:`\|\bar g\|^2`, so it is smallest just where the estimate came out low by chance; the
    upper end is therefore the largest SNR that h would allow if V grew with it:

    .. math::
        \frac1y \left(\frac h2 + \sqrt{\frac{h^2}4 + y^2}\right)^2 - p, \qquad
        y = \mathrm{SNR} + p = \frac{\|\bar g\|^2}{\widehat{\operatorname{tr}} \Sigma}, \qquad
        p = \frac{\|\bar g\|^2 - |\hat G|^2}{\widehat{\operatorname{tr}} \Sigma}

    **Conservative**: as the signal goes to 0, V is about twice the truth on average, and the interval holds the
    truth more often than it says. Use it where there is one step only; a window of steps has `ratio_interval`. Its
    inverse (`inverted`) is an interval for the noise scale.

    Args:
        sq_norms: n, shape ``(examples,)``, or ``(examples, units)`` for many at once.
        dots: d, the same shape.
        mean_sq_norm: :math:`\|\bar g\|^2`, a number, or shape ``(units,)``.
        weights: raw weights of the examples, shape ``(examples,)`` (not normalised), or None for equal ones.
        level: how often the interval is meant to hold the truth, at least.

    Returns:
        Both ends, numbers or shape ``(units,)``; NaN below 4 examples, and where an example is not finite.

    Raises:
        ValueError: if shapes do not go together, or ``level`` is not between 0 and 1.

    Guarantees:
        * Examples of weight 0 take no part, and equal weights are no weights.
        * The order of the examples does not matter, nor a factor on all gradients.

    Edge cases:
        ==============================  ==============================================
        no noise beyond rounding        NaN: nothing to compare with (all gradients equal)
        ``mean_sq_norm == 0``           the high end is infinite
        ==============================  ==============================================

    Example:
        >>> import numpy as np
        >>> grads = np.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 0.5], [1.5, 0.0]])
        >>> mean = grads.mean(0)
        >>> found = snr_interval_of_step((grads**2).sum(1), grads @ mean, mean @ mean)
        >>> round(float(found.low), 2), round(float(found.high), 2)
        (-0.67, 9.57)

    References:
        Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9(3), 1981.
    """
    if tuple(sq_norms.shape) != tuple(dots.shape) or sq_norms.ndim not in (1, 2):
        raise ValueError(
            f"snr_interval_of_step needs a norm and a dot of each example, got sq_norms of shape "
            f"{tuple(sq_norms.shape)} and dots of shape {tuple(dots.shape)}; pass both as (examples, units)"
        )
    if weights is not None and tuple(weights.shape) != tuple(sq_norms.shape[:1]):
        raise ValueError(
            f"snr_interval_of_step needs one weight an example, got weights of shape {tuple(weights.shape)}; "
            f"pass weights of shape ({sq_norms.shape[0]},)"
        )
    xp, examples = namespace(sq_norms), sq_norms.shape[0]
    norms, dots = (xp.reshape(_wide(values), (examples, -1)) for values in (sq_norms, dots))
    raw = xp.ones_like(norms) if weights is None else xp.reshape(_wide(weights), (examples, 1)) + xp.zeros_like(norms)
    norms, dots = (_finite(xp.where(raw > 0, values, xp.zeros_like(values))) for values in (norms, dots))
    mean_sq_norm = _finite(xp.zeros_like(norms[0]) + mean_sq_norm)
    share = divided(raw, xp.sum(raw, axis=0))
    rest = xp.where(share < 1, 1 - share, xp.nan)
    s2 = xp.sum(share * share, axis=0)
    mean_norm, square_norm = xp.sum(share * norms, axis=0), xp.sum(share * share * norms, axis=0)
    least = 16 * float(xp.finfo(sq_norms.dtype).eps)
    estimate, noise = _snr(mean_sq_norm, mean_norm, square_norm, s2, least)
    left = mean_sq_norm - 2 * share * dots + share**2 * norms, square_norm - share**2 * norms, s2 - share**2
    left_mean_sq_norm, left_square_norm, left_s2 = (value / rest**2 for value in left)
    without, _ = _snr(left_mean_sq_norm, (mean_norm - share * norms) / rest, left_square_norm, left_s2, least)
    width = _jackknife(estimate, without, xp.astype(raw > 0, norms.dtype), level)
    power = estimate + noise
    root = width / 2 + xp.sqrt(width * width / 4 + power * power)
    high = xp.where(power > 0, root * divided(root, power) - noise, width + xp.inf)
    low = estimate - width
    return Interval(low, high) if sq_norms.ndim == 2 else Interval(low[0], high[0])


def snr_interval_of_moments(moments: Moments, level: float = 0.95) -> Interval:
    """As `snr_interval_of_step`, from the Moments of one parameter that were collected with ``dots``.

    Raises:
        ValueError: if there are no dots, or ``sq_norms`` are not those of all ``count`` examples.

    Example:
        >>> import numpy as np
        >>> grads = np.array([[1.0, 0.0], [3.0, 1.0], [2.0, -1.0], [2.0, 0.5], [1.5, 0.0]])
        >>> moments = Moments.from_per_example(grads)
        >>> found = snr_interval_of_moments(moments._replace(dots=grads @ moments.mean))
        >>> round(float(found.low), 2), round(float(found.high), 2)
        (-0.67, 9.57)
    """
    if moments.dots is None:
        raise ValueError(
            "snr_interval_of_moments needs the examples' dot products, got dots=None; collect with dots, or use "
            "ratio_interval over a window of steps"
        )
    if moments.sq_norms.shape[0] != float(moments.count):
        raise ValueError(
            f"snr_interval_of_moments needs the norms of all examples, got sq_norms of {moments.sq_norms.shape[0]} for "
            f"count={moments.count}; join those of all ranks"
        )
    return snr_interval_of_step(moments.sq_norms, moments.dots, square_sum(moments.mean), moments.weights, level)


def _snr(mean_sq_norm: Array, mean_norm: Array, square_norm: Array, s2: Array, least: float) -> tuple[Array, Array]:
    """Signal and batch noise of the weighted pair over one example's noise; NaN where rounding left none of that."""
    xp = namespace(mean_norm)
    signal = divided(mean_sq_norm - square_norm, 1 - s2)
    trace = mean_norm - signal
    trace = xp.where(trace > least * mean_norm, trace, xp.nan)
    return divided(signal, trace), divided(mean_sq_norm - signal, trace)


def _jackknife(estimate: Array, without: Array, sizes: Array, level: float) -> Array:
    """Half the interval's width, from the estimates without each group and the groups' sizes (0 takes no part)."""
    # Pseudo-values for groups of unequal size (Busing et al. 1999); with equal ones the textbook's formula.
    xp = namespace(without)
    taken = sizes > 0
    groups = xp.sum(xp.astype(taken, sizes.dtype), axis=0)
    enough = groups >= _FEWEST
    groups = xp.where(enough, groups, xp.ones_like(groups) * _FEWEST)
    h = xp.where(taken, xp.sum(sizes, axis=0) / xp.where(taken, sizes, xp.ones_like(sizes)), xp.ones_like(sizes) * 2)
    shift = xp.where(taken, (h - 1) * (estimate - without), xp.zeros_like(without))
    off = xp.where(taken, shift - xp.sum(shift, axis=0) / groups, xp.zeros_like(without))
    width = _t(level, groups - 1) * xp.sqrt(xp.sum(off * off / (h - 1), axis=0) / groups)
    return xp.where(enough, width, xp.nan)


def _t(level: float, freedom: Array) -> Array:
    """The quantile that an interval of this level needs, for each layer's degrees of freedom."""
    if not 0 < level < 1:
        raise ValueError(f"an interval needs 0 < level < 1, got level={level}; 0.95 is usual")
    xp = namespace(freedom)
    found = xp.full_like(freedom, xp.nan)
    for value in {float(x) for x in xp.reshape(freedom, (-1,))}:
        found = xp.where(freedom == value, t_quantile((1 + level) / 2, value), found)
    return found


def _inverse(end: Array) -> Array:
    """1/end, infinity where the end is 0 or below."""
    if isinstance(end, int | float):
        return 1.0 / end if end > 0 else (math.nan if math.isnan(end) else math.inf)
    xp = namespace(end)
    inverse = xp.where(end > 0, 1.0 / xp.where(end > 0, end, xp.ones_like(end)), xp.inf)
    return xp.where(xp.isnan(end), xp.nan, inverse)


def _wide(values: Array) -> Array:
    """In float64, where there is one."""
    xp = namespace(values)
    if array_api_compat.is_jax_namespace(xp):
        return values
    return xp.astype(values, xp.float64)


def _finite(values: Array) -> Array:
    xp = namespace(values)
    return xp.where(xp.isfinite(values), values, xp.nan)


def _blocks(values: Array, block: int) -> Array:
    """Sums over blocks of consecutive steps; the last may be shorter."""
    if block == 1:
        return values
    xp = namespace(values)
    steps, layers = values.shape
    missing = -steps % block
    padded = xp.concat([values, xp.zeros((missing, layers), dtype=values.dtype)]) if missing else values
    return xp.sum(xp.reshape(padded, (-1, block, layers)), axis=1)


def _others(values: Array) -> Array:
    """The sum over axis 0 without each of its rows: from both sides, so that no large row is subtracted again."""
    xp = namespace(values)
    nothing = xp.zeros_like(values[:1])
    before = xp.concat([nothing, xp.cumulative_sum(values[:-1], axis=0)])
    after = xp.flip(xp.cumulative_sum(xp.flip(values[1:], axis=0), axis=0), axis=0)
    return before + xp.concat([after, nothing])
