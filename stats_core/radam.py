r"""RAdam's rectification: how much of Adam's adaptive step the age of its second moment warrants.

A moving average with coefficient β that has seen t numbers is as old, on average, as a simple average of the last

.. math:: \rho_t = \rho_\infty - \frac{2 t \beta^t}{1 - \beta^t}, \qquad \rho_\infty = \frac{2}{1 - \beta} - 1

numbers. RAdam multiplies the adaptive step by :math:`r_t`, and makes a step of plain momentum while
:math:`\rho_t` is not above a threshold. Everything here depends on t and β alone: one number a parameter group.

Each function takes Python numbers, and gives Python's; or scalars of an array type, also traced ones or ones that
lie on a device, which are not looked at. Written as above, :math:`\rho_t` subtracts numbers of the size of
:math:`\rho_\infty`: in float32, at β = .9999, the fifth step has ρ = 7.5 in place of 4.9996. The forms used here
keep their digits.

References:
    Liu, Jiang, He, Chen, Liu, Gao and Han, "On the variance of the adaptive learning rate and beyond", 2020,
    arXiv 1908.03265.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

from gradiometer.stats_core.arrays import Array, namespace

__all__ = ["Rectification", "ema_weight", "kish_steps", "never_adaptive", "radam_length", "rate_variance", "rectify"]

# B_2k/(2k)!, the Taylor coefficients of x/(exp(x) - 1) beyond 1 - x/2.
_TAYLOR = (1 / 12, -1 / 720, 1 / 30_240, -1 / 1_209_600, 1 / 47_900_160, -691 / 1_307_674_368_000)
_NEAR = 0.3  # below, six coefficients leave 2e-17
_PAPERS_THRESHOLD = 4.0

_PLAIN = SimpleNamespace(
    exp=math.exp,
    expm1=math.expm1,
    sqrt=math.sqrt,
    tanh=math.tanh,
    where=lambda chosen, one, other: one if chosen else other,
)


class Rectification(NamedTuple):
    r"""What RAdam makes of one step; each a number, or a scalar of the arrays that were given.

    Attributes:
        length: :math:`\rho_t`. Unit: steps.
        rectification: :math:`r_t`, between 0 and 1; 0 where the step is momentum.
        is_rectified: True where the step is adaptive.
        multiplier: :math:`r_t \sqrt{1 - \beta_2^t}`, by which :math:`\hat m / \sqrt v` is multiplied, v without
            its bias correction; 0 where the step is momentum.
    """

    length: Array
    rectification: Array
    is_rectified: Array
    multiplier: Array


def ema_weight(step: Array, beta: Array) -> Array:
    r"""Total weight :math:`1 - \beta^t` of a moving average that started at 0: what Adam's bias correction divides by.

    Args:
        step: t, how many numbers it has seen.
        beta: coefficient, in [0, 1).

    Returns:
        Between 0 and 1, to the last digits also where β is near 1 in float32.

    Raises:
        ValueError: if ``beta`` is a Python number out of range, or ``step`` one below 1.

    Example:
        >>> round(ema_weight(2, 0.9), 12)
        0.19
    """
    xp, t, decay = _time(step, beta)
    return -xp.expm1(-t * decay)


def radam_length(step: Array, beta2: Array) -> Array:
    r"""Length :math:`\rho_t` of the simple average with the centre of mass of Adam's second moment after t steps.

    .. math:: \rho_t = \frac{2}{1 - \beta} - 1 - \frac{2 t \beta^t}{1 - \beta^t} = 1 + 2 \cdot \text{mean age}

    It starts at 1, is a little under t while t is far below :math:`1 / (1 - \beta)`, and ends at
    :math:`\rho_\infty`.

    Args:
        step: t, from 1.
        beta2: coefficient of the second moment, in [0, 1).

    Returns:
        A scalar. Unit: steps.

    Raises:
        ValueError: if ``beta2`` is a Python number out of range, or ``step`` one below 1.

    Guarantees:
        * 1 at the first step; rises with every step; below :math:`\rho_\infty`.

    Example:
        >>> [round(radam_length(t, 0.999), 4) for t in (1, 5, 6)]
        [1.0, 4.996, 5.9942]
    """
    xp, t, decay = _time(step, beta2)
    x = t * decay
    near = x < _NEAR
    small, its_decay = (xp.where(near, value, 0.0 * t) for value in (x, decay))
    by_series = 0.5 * (t - 1.0) + _beyond_pole(its_decay) - t * _beyond_pole(small)
    large, its_decay = (xp.where(near, 1.0 + 0.0 * t, value) for value in (x, decay))
    by_ages = _odds(xp, its_decay) - t * _odds(xp, large)
    return 1.0 + 2.0 * xp.where(near, by_series, by_ages)


def rectify(step: Array, beta2: Array, *, threshold: Array = 5.0, inclusive: bool = False) -> Rectification:
    r"""RAdam's :math:`r_t`, and whether the step is adaptive.

    .. math:: r_t^2 = \frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}

    which is the approximate variance of the adaptive rate at the end over that now.

    Args:
        step: t, from 1, of the step that is made.
        beta2: coefficient of the second moment, in [0, 1).
        threshold: 5 in torch, optax and the authors' code, 4 in the paper. At least 4.
        inclusive: True where a length that equals the threshold is adaptive, as in optax and the authors' code;
            False as in torch and the paper.

    Returns:
        The `Rectification`.

    Raises:
        ValueError: if a Python number is out of range.

    Guarantees:
        * Rises with every adaptive step, to 1.

    Edge cases:
        ==================================  ==================================================
        length not above the threshold      ``rectification`` and ``multiplier`` are 0
        ``beta2 <= 2/3`` at threshold 5     never adaptive, see `never_adaptive`
        ==================================  ==================================================

    Example:
        >>> at = rectify(6, 0.999)
        >>> at.is_rectified, round(at.rectification, 4), round(at.multiplier, 6)
        (True, 0.0258, 0.001998)
        >>> rectify(5, 0.999).rectification
        0.0

    References:
        Liu et al., 2020, arXiv 1908.03265, algorithm 2.
    """
    if isinstance(threshold, int | float) and not threshold >= _PAPERS_THRESHOLD:
        raise ValueError(
            f"rectify needs threshold >= 4, got threshold={threshold}; below 4 r_t is the root of a negative number"
        )
    xp, t, decay = _time(step, beta2)
    length = radam_length(step, beta2)
    is_rectified = length >= threshold if inclusive else length > threshold
    rho = xp.where(is_rectified, length, 1.0 + _PAPERS_THRESHOLD + 0.0 * t)
    share = xp.where(is_rectified, xp.tanh(0.5 * decay), 0.0 * t)  # 1/ρ_∞
    square = (rho - 4.0) * (rho - 2.0) * share / ((1.0 - 4.0 * share) * (1.0 - 2.0 * share) * rho)
    rectification = xp.sqrt(square)
    return Rectification(length, rectification, is_rectified, rectification * xp.sqrt(-xp.expm1(-t * decay)))


def never_adaptive(beta2: float, threshold: float = 5.0) -> bool:
    r"""True where RAdam is momentum for ever: where :math:`\rho_\infty` does not pass the threshold.

    .. math:: \rho_\infty \le c \iff \beta_2 \le \frac{c - 1}{c + 1}

    At the threshold of 5, ``beta2`` up to 2/3; at 4, up to .6, below which :math:`r_t` is not even defined.

    Example:
        >>> never_adaptive(0.6), never_adaptive(0.7), never_adaptive(0.65, threshold=4.0)
        (True, False, False)
    """
    return beta2 <= (threshold - 1.0) / (threshold + 1.0)


def kish_steps(step: Array, beta: Array) -> Array:
    r"""Effective number of steps in a moving average with a fixed coefficient (Kish).

    .. math:: \frac{(\sum \omega_i)^2}{\sum \omega_i^2} = \rho_\infty \frac{1 - \beta^t}{1 + \beta^t}

    The variance of such a mean of independent numbers is theirs over this; it ends at :math:`\rho_\infty`, as
    :math:`\rho_t` does, and is nearer to the variance of the adaptive rate in early steps.

    Args:
        step: t, from 1.
        beta: coefficient, in (0, 1), or 0 as a Python number.

    Returns:
        A scalar, 1 at the first step. Unit: steps.

    Raises:
        ValueError: if a Python number is out of range.

    Example:
        >>> round(kish_steps(6, 0.9), 4), round(radam_length(6, 0.9), 4)
        (5.8132, 5.3896)

    References:
        Kish, "Survey sampling", 1965, section 11.7.
    """
    xp, t, decay = _time(step, beta)
    return xp.tanh(0.5 * t * decay) / xp.tanh(0.5 * decay)


def rate_variance(length: float) -> float:
    r"""Variance of the adaptive rate :math:`\psi = 1/\sqrt{\hat v}` of pure noise of variance 1.

    .. math:: \operatorname{Var} \psi = \frac{\rho}{\rho - 2}
              - \frac{\rho}{2} \left( \frac{\Gamma((\rho - 1)/2)}{\Gamma(\rho/2)} \right)^2

    exact where :math:`\hat v` is the mean of ρ squares of normal numbers. Divided by the variance of the
    gradient it is that of Adam's rate. (The paper's :math:`r_t` rests on an approximation of it,
    :math:`\rho / (2 (\rho - 2)(\rho - 4))`, which is 3.3 times too large at ρ = 5.)

    Args:
        length: ρ, above 2. Unit: steps.

    Returns:
        The variance, for a gradient of variance 1; inf at and below 2, where it does not exist. Good to six digits
        up to a length of 10,000.

    Example:
        >>> [round(rate_variance(rho), 5) for rho in (5, 10, 100)]
        [0.25196, 0.07555, 0.00519]

    References:
        Liu et al., 2020, arXiv 1908.03265, section 3.
    """
    if length <= 2:
        return math.inf
    ratio = math.exp(2.0 * (math.lgamma(0.5 * (length - 1.0)) - math.lgamma(0.5 * length)))
    return length / (length - 2.0) - 0.5 * length * ratio


def _time(step: Array, beta: Array) -> tuple[Any, Array, Array]:
    """The functions to use, t, and -log β, the last two in one real type."""
    if isinstance(beta, int | float):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"a moving average needs a coefficient in [0, 1), got beta={beta}; Adam's is .999")
        decay: Array = -math.log(beta) if beta > 0 else math.inf
    else:
        decay = -namespace(beta).log(_real(beta))
    if isinstance(step, int | float):
        if not step >= 1:
            raise ValueError(f"a moving average needs a step of at least 1, got step={step}; the first step is 1")
        t: Array = float(step)
    else:
        t = _real(step)
    arrays = [value for value in (t, decay) if not isinstance(value, float)]
    if not arrays:
        return _PLAIN, t, decay
    xp = namespace(*arrays)
    widest = max((value.dtype for value in arrays), key=lambda dtype: xp.finfo(dtype).bits)
    zero = xp.astype(xp.zeros_like(arrays[0]), widest)
    t, decay = (zero + value if isinstance(value, float) else xp.astype(value, widest) for value in (t, decay))
    return xp, t, decay


def _real(value: Array) -> Array:
    """A scalar array in a real type: its own, or the framework's."""
    xp = namespace(value)
    return value if xp.isdtype(value.dtype, "real floating") else xp.astype(value, xp.ones(()).dtype)


def _odds(xp: Any, x: Array) -> Array:
    """1/(exp(x) - 1), without overflow."""
    return xp.exp(-x) / -xp.expm1(-x)


def _beyond_pole(x: Array) -> Array:
    """1/(exp(x) - 1) - 1/x + 1/2 near 0."""
    square, value = x * x, 0.0 * x
    for coefficient in reversed(_TAYLOR):
        value = coefficient + square * value
    return x * value
