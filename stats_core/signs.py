r"""What is lost where the sign is taken before the mean: an example's sign instead of the batch gradient's.

Sign descent may take the sign of each example's gradient and average those, or average first. The early
sign keeps less of the signal, and where gradients are skewed it points the other way.
"""

import math
from typing import Any, NamedTuple

from gradiometer.stats_core.arrays import Array, namespace
from gradiometer.stats_core.elements import ElementLimits, active_elements, element_limits, numbered, tiles
from gradiometer.stats_core.moments import Moments

__all__ = ["PlacementSnr", "placement_snr", "sign_sums"]

_ROUNDING = 16.0  # so many eps from 0, a mean of signs is 0: many merges may lie behind it


def sign_sums(moments: Moments) -> dict[str, Array]:
    r"""Signal and noise of the examples' signs, added up over the active elements of one parameter.

    With :math:`e_j = \sum_i w_i \operatorname{sign} g_{ij}` and :math:`s_2 = \sum w_i^2`:

    .. math::
        |\hat E|^2 = \sum_j \frac{e_j^2 - s_2}{1 - s_2}, \qquad
        \hat V = \sum_j \frac{1 - e_j^2}{1 - s_2}, \qquad
        \#\{j : \operatorname{sign} e_j \ne \operatorname{sign} \bar g_j\}

    which are :math:`\sum (n e_j^2 - 1)/(n - 1)` and :math:`\sum n (1 - e_j^2)/(n - 1)` where all weights are equal.
    Their ratio over a window is the signal-to-noise ratio of one example's sign, to be held against ``gsnr``,
    that of its gradient: :math:`2/\pi = .64` of it is left where gradients are normal and mostly noise
    (`placement_snr`), so that the early sign costs a third of the batch.

    Args:
        moments: of one parameter, with ``sign_mean``.

    Returns:
        ``sign_signal`` (may be negative), ``sign_noise``, ``sign_disagreements``: scalars of the type of
        ``moments.mean``. Unit: elements. Elements are active as in `elements.element_sums`.

    Raises:
        ValueError: if the moments have no ``sign_mean``.

    Guarantees:
        * Unbiased where no gradient is exactly 0, of whatever distribution, under any weights.
        * ``sign_signal + sign_noise`` is the number of active elements.
        * Multiplying every gradient by c ≠ 0 changes nothing.

    Edge cases:
        ===========================  ==================================================================
        a gradient of exactly 0      a random sign: mean 0, variance 1. Where a share z of the examples
                                     has one, the signal is z/(n − 1) low and the noise as much high
        as many signs up as down     half a disagreement: a random sign is wrong half of the time
        inactive element             left out: dead, the same for all examples, or not finite
        fewer than two examples      ``sign_signal`` and ``sign_noise`` NaN
        ===========================  ==================================================================

    Example:
        >>> import numpy as np
        >>> skewed = np.array([[11.0]] + 10 * [[-1.0]])        # the mean goes up, ten of eleven go down
        >>> sums = sign_sums(Moments.from_per_example(skewed, sign_mean=True))
        >>> {name: round(float(value), 4) for name, value in sums.items()}
        {'sign_signal': 0.6364, 'sign_noise': 0.3636, 'sign_disagreements': 1.0}

    References:
        The question: Roulet and Agarwala, "Per-example gradients: a new frontier for understanding and improving
        optimizers", 2025, arXiv 2510.00236. The estimators are ours.
    """
    if moments.sign_mean is None:
        raise ValueError(
            "sign_sums needs moments with sign_mean, got sign_mean=None; "
            "collect them with Moments.from_per_example(grads, sign_mean=True)"
        )
    xp = namespace(moments.mean)
    limits = element_limits(moments)
    found = [_tile_sums(xp, limits, *tile) for tile in tiles(moments.mean, moments.m2, moments.sign_mean)]
    count, squared, agreement = found[0] if len(found) == 1 else xp.sum(xp.stack(found), axis=0)
    scale = moments.weight_sum / limits.freedom  # 1/(1 − s₂), NaN where there is only one example
    return {
        "sign_signal": (squared - limits.share * count) * scale,
        "sign_noise": (count - squared) * scale,
        "sign_disagreements": 0.5 * (count - agreement),
    }


def _tile_sums(xp: Any, limits: ElementLimits, mean: Array, m2: Array, sign_mean: Array) -> Array:
    """Of a tile: active elements, their Σe², and agreements less disagreements."""
    active = active_elements(mean, m2, limits)
    signs = xp.nan_to_num(sign_mean) * active  # what is NaN is not active
    products = _direction(xp, signs, _ROUNDING * float(xp.finfo(signs.dtype).eps))
    products *= _direction(xp, mean, 0.0)
    return xp.stack([xp.sum(active), xp.sum(signs * signs), xp.sum(products)])


def _direction(xp: Any, values: Array, least: float) -> Array:
    """1 above ``least``, −1 below ``-least``, else 0, as numbers; 0 for NaN."""
    return numbered(xp, xp.greater, values, least) - numbered(xp, xp.less, values, -least)


class PlacementSnr(NamedTuple):
    """Signal-to-noise ratios, mean over standard deviation, of what a step is made of; see `placement_snr`.

    Attributes:
        mean_first: of the batch gradient; where a sign is taken at all, it is the last thing done.
        sign_of_mean: of the sign of the batch gradient.
        sign_first: of the mean of the examples' signs.
    """

    mean_first: float
    sign_of_mean: float
    sign_first: float


def placement_snr(k: float, batch: int = 1, decay: float = 0.0) -> PlacementSnr:
    r"""What theory gives for normal gradients: the signal-to-noise ratio by the place of the sign.

    For :math:`g_i \sim N(\mu, \sigma^2)`, :math:`k = \mu/\sigma`, B examples, momentum of coefficient a:

    .. math::
        A \sqrt B\, k, \qquad A\,\rho(\sqrt B\, k), \qquad A \sqrt B\, \rho(k), \qquad
        \rho(k) = \frac{e}{\sqrt{1 - e^2}}, \quad e = \operatorname{erf}\frac{k}{\sqrt 2}, \quad
        A = \sqrt{\frac{1 + a}{1 - a}}

    ρ(k)/k is :math:`\sqrt{2/\pi} = .80` for small k, so an early sign leaves .64 of the power ratio, or of the
    batch; above k = 1.2 early signs win. The loss happens at whichever sign comes first.

    Args:
        k: mean of one example's gradient over its standard deviation, of either sign.
        batch: examples, B.
        decay: coefficient of the momentum that averages what comes out, a; 0 for none.

    Returns:
        Amplitude ratios, on the host; the catalogue's ``gsnr`` and ``sign_snr`` are squares of such, at B = 1.

    Raises:
        ValueError: if ``batch`` is below 1 or ``decay`` outside [0, 1).

    Example:
        >>> [round(x, 2) for x in placement_snr(0.1, batch=16, decay=0.9)]
        [1.74, 1.43, 1.39]
        >>> round(placement_snr(0.1).sign_first / placement_snr(0.1).mean_first, 3)
        0.799
    """
    if batch < 1 or not 0 <= decay < 1:
        raise ValueError(
            f"placement_snr needs batch of 1 or more and 0 <= decay < 1, got batch={batch}, decay={decay}; "
            "give the number of examples and the coefficient of the momentum"
        )
    momentum, root = math.sqrt((1 + decay) / (1 - decay)), math.sqrt(batch)
    return PlacementSnr(momentum * root * k, momentum * _sign_snr(root * k), momentum * root * _sign_snr(k))


def _sign_snr(k: float) -> float:
    """Mean over standard deviation of the sign of N(k, 1)."""
    size = abs(k) / math.sqrt(2)
    variance = math.erfc(size) * (1 + math.erf(size))  # 1 − e², where e is close to 1 too
    return math.copysign(math.erf(size) / math.sqrt(variance), k) if variance > 0 else math.copysign(math.inf, k)
