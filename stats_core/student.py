r"""Quantiles of Student's t: how far off a mean of few numbers may be.

`t_quantile` is exact and runs on the host; `t_critical` is the one quantile that is needed inside a
training step, on arrays of any framework.
"""

import functools
import math
import statistics
from typing import Any

from gradiometer.stats_core.arrays import Array, namespace, widened

__all__ = ["t_critical", "t_quantile"]

_NORMAL = statistics.NormalDist()
_PRECISION = 1e-15

# t/z in powers of 1/freedom, each in powers of z².
_EXPANSION = (
    (1.0,),
    (1 / 4, 1 / 4),
    (3 / 96, 16 / 96, 5 / 96),
    (-15 / 384, 17 / 384, 19 / 384, 3 / 384),
    (-945 / 92160, -1920 / 92160, 1482 / 92160, 776 / 92160, 79 / 92160),
)

# ln(t/z) = s·P(s)/Q(s) with s = 1/freedom, z = t at infinite freedom: a least-maximum fit to `t_quantile` over
# freedom 1/2 to infinity. All coefficients are positive: no pole, and below 1/2 it goes on rising as t does.
_Z = 1.959963984540054
_TOP = (1.21008316, 1.59204674, 1.76735052, 1.11367252)
_BOTTOM = (1.0, 0.72590961, 0.94284948, 0.37172537)
_LEAST = 0.05


@functools.lru_cache(maxsize=4096)
def t_quantile(p: float, freedom: float) -> float:
    r"""Quantile of Student's t: the value that lies above a share p of the distribution.

    .. math:: \Pr(T_\nu \le t) = p, \qquad \Pr(|T_\nu| > t) = I_{\nu/(\nu+t^2)}(\nu/2, 1/2)

    A mean of n independent normal numbers, less the truth and over its standard error, is distributed so with
    :math:`\nu = n - 1`: ``t_quantile(0.975, n - 1)`` standard errors to either side hold the truth 95 % of the time.

    Args:
        p: between 0 and 1, both excluded.
        freedom: degrees of freedom, above 0; need not be whole; infinity is the normal distribution.

    Returns:
        The quantile, on the host. Relative error at most 1e-11 (measured: 1e-12).

    Raises:
        ValueError: if ``p`` or ``freedom`` is out of range.

    Guarantees:
        * ``t_quantile(1 - p, freedom) == -t_quantile(p, freedom)`` where 1 − p is exact.
        * It falls towards the normal quantile as freedom rises (for p above one half).

    Edge cases:
        =====================  ===========================================
        ``p == 0.5``           exactly 0
        ``freedom`` infinite   the normal quantile
        quantile above 1e308   infinity (freedom of a few hundredths only)
        =====================  ===========================================

    Example:
        >>> round(t_quantile(0.975, 7), 6)
        2.364624
        >>> round(t_quantile(0.975, 20.5), 6)
        2.082707

    References:
        The incomplete beta function by its continued fraction: Abramowitz and Stegun, "Handbook of mathematical
        functions", 1964, 26.5.8 and 26.7.1 (above 1e5 degrees of freedom the expansion 26.7.5); evaluated by
        the method of Lentz, "Generating Bessel functions in Mie scattering calculations using continued fractions",
        Applied Optics 15(3), 1976.
    """
    if not 0 < p < 1:
        raise ValueError(f"t_quantile needs 0 < p < 1, got p={p}; give a probability, such as 0.975")
    if not freedom > 0:
        raise ValueError(f"t_quantile needs freedom > 0, got freedom={freedom}; collect more steps or examples")
    if p < 0.5:
        return -_upper(p, 0.5 - p, freedom)
    return _upper(1 - p, p - 0.5, freedom)


def t_critical(freedom: Array) -> Array:
    r""":math:`t_{.975,\nu}`, beyond which 5 % of Student's t lie on both sides together.

    .. math:: t_{.975,\nu} \approx z\,\exp\frac{P(1/\nu)}{\nu\,Q(1/\nu)}, \qquad z = t_{.975,\infty} = 1.96

    P and Q are cubics, fitted to `t_quantile`. A mean of n examples that lies further than this many standard
    errors from 0, with :math:`\nu = n - 1`, differs from 0 at the 5 % level.

    Args:
        freedom: degrees of freedom, an array of any shape and framework, traced or not, or a number.

    Returns:
        Shape of ``freedom``, float32 or wider. A number gives the exact value, as `t_quantile`.

    Guarantees:
        * Relative error at most 5e-6 for freedom of 1/2 and more, in float32 too; 1 % for 1/4.
        * Never below the normal distribution's 1.96.

    Edge cases:
        ===================  =====================================
        freedom 0 or below   NaN: there is no such distribution
        freedom NaN          NaN
        freedom infinite     1.96
        freedom below 1/20   that of 1/20, 2e25: t would leave float32
        ===================  =====================================

    Example:
        >>> import numpy as np
        >>> t_critical(np.array([1.0, 7.0, 31.0])).round(3)
        array([12.706,  2.365,  2.04 ])
        >>> round(t_critical(7), 3)
        2.365
    """
    if isinstance(freedom, int | float):
        return t_quantile(0.975, float(freedom)) if freedom > 0 else math.nan
    xp = namespace(freedom)
    freedom = widened(freedom)
    exists = freedom > 0
    s = 1.0 / xp.where(freedom > _LEAST, freedom, _LEAST)
    log_ratio = s * (_polynomial(_TOP, s) / _polynomial(_BOTTOM, s))
    return xp.where(exists, _Z * xp.exp(log_ratio), xp.nan)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Any:
    value: Any = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _upper(tail: float, centre: float, freedom: float) -> float:
    """The t with probability ``tail`` above it and ``centre`` between it and 0; whichever is the smaller is exact."""
    if centre == 0:
        return 0.0
    if freedom > 1e5:  # the continued fraction would lose digits; the next term here is below a double's
        z = -_NORMAL.inv_cdf(tail)
        return z * float(_polynomial(tuple(_polynomial(c, z * z) for c in _EXPANSION), 1 / freedom))
    if tail < centre:
        return _solved(math.log(2 * tail), freedom, freedom / 2, 0.5, -1)
    return _solved(math.log(2 * centre), freedom, 0.5, freedom / 2, 1)


def _solved(target: float, freedom: float, a: float, b: float, side: int) -> float:
    """The t at which ln of the tails' probability (side −1) or the centre's (side 1) is ``target``.

    Newton's method in ln t, where both are concave, kept inside a bracket that shrinks with every step.
    """

    def log_beta_cdf(u: float) -> tuple[float, float]:
        """Of x = 1/(1 + t²/freedom), or of 1 − x: ln I_x(a, b) and its derivative by u = ln t, up to sign."""
        r = 2 * u - math.log(freedom)  # ln(t²/freedom)
        log_x, log_y = -_log1pexp(r), -_log1pexp(-r)
        if side > 0:
            log_x, log_y = log_y, log_x
        log_density = a * log_x + b * log_y - _log_beta(a, b)  # x^a y^b / B(a, b)
        x = math.exp(log_x)
        if x < (a + 1) / (a + b + 2):
            log_cdf = log_density + math.log(_fraction(a, b, x) / a)
        else:
            other = math.exp(log_density) * _fraction(b, a, math.exp(log_y)) / b
            log_cdf = math.log1p(-other) if other < 1 else -math.inf
        return log_cdf, 2 * math.exp(log_density - log_cdf)

    low, high = -800.0, 709.7
    u = 0.0
    for _ in range(200):
        log_cdf, slope = log_beta_cdf(u)
        error = log_cdf - target
        if side * error > 0:
            high = u
        else:
            low = u
        following = u - side * error / slope if slope > 0 else math.nan
        if not low < following < high:
            following = 0.5 * (low + high)
        done = abs(following - u) <= _PRECISION * max(1.0, abs(u))
        u = following
        if done or high - low <= 0:
            break
    return math.exp(u) if u < 709.6 else math.inf


def _log1pexp(r: float) -> float:
    """ln(1 + eʳ) without overflow."""
    return max(r, 0.0) + math.log1p(math.exp(-abs(r)))


def _log_beta(a: float, b: float) -> float:
    """The logarithm of B(a, ½), whichever of the two is the half."""
    a = a if b == 0.5 else b
    if a < 30:
        return math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    # The logarithms would cancel: Γ(a + ½)/Γ(a) = √a·exp(−1/8a + 1/192a³ − 1/640a⁵ + 17/14336a⁷ − …).
    q = 1 / (a * a)
    series = (-1 / 8 + q * (1 / 192 + q * (-1 / 640 + q * (17 / 14336)))) / a
    return math.lgamma(0.5) - 0.5 * math.log(a) - series


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, for x below (a + 1)/(a + b + 2)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1.0)) or tiny)
    value = d
    for m in range(1, 1_000_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / ((1.0 + term * d) or tiny)
            c = (1.0 + term / c) or tiny
            value *= c * d
        if abs(c * d - 1.0) < _PRECISION:
            break
    return value
