r"""A ratio smoothed through time: its numerator and its denominator apart, and divided last.

The mean of ratios is not the ratio of means: single-step noise scales have no mean at all. So a ratio that is
shown live is made of two averages with the same weights.
"""

import math
from typing import NamedTuple

from gradiometer.stats_core.arrays import Array, namespace, positive_or_one, widened
from gradiometer.stats_core.derived import divided

__all__ = ["Smoothed"]


class Smoothed(NamedTuple):
    r"""Numerator and denominator of a ratio, each averaged over steps with exponentially fading weights.

    .. math:: \bar x = \sum_i \omega_i x_i, \qquad \omega_i \propto (1 - \beta^{k_i}) \prod_{l > i} \beta^{k_l}

    with weights that add up to 1 from the first step on (bias correction), and :math:`k_i` the steps since the one
    before. Averages of two runs do not merge: each has weights of its own.

    Attributes:
        numerator: its average, any shape; 0 where there was no step.
        denominator: its average, same shape.
        weight: :math:`1 - \prod \beta^{k_i}`, same shape: 0 where there was no step, towards 1.

    Example:
        >>> import numpy as np
        >>> smoothed = Smoothed.zeros_like(np.zeros(1))
        >>> for trace, signal in ((8.0, -1.0), (4.0, 4.0)):
        ...     smoothed = smoothed.update(np.array([trace]), np.array([signal]), decay=0.5)
        >>> smoothed.numerator.round(4), smoothed.denominator.round(4), smoothed.ratio.round(4)
        (array([5.3333]), array([2.3333]), array([2.2857]))
    """

    numerator: Array
    denominator: Array
    weight: Array

    @classmethod
    def zeros_like(cls, values: Array) -> "Smoothed":
        """Before the first step; of the shape and on the device of ``values``, in float32 or wider."""
        values = widened(values)
        xp = namespace(values)
        return cls(xp.zeros_like(values), xp.zeros_like(values), xp.zeros_like(values))

    def update(self, numerator: Array, denominator: Array, decay: float, steps: Array = 1) -> "Smoothed":
        r"""Take one step's numerator and denominator.

        Args:
            numerator: of this step, the shape that the state has.
            denominator: of this step.
            decay: β, the weight of the past after one step: at least 0 and below 1. 1/(1 − β) steps count.
            steps: k, steps since the one before, above 0; more than 1 where not every step is measured (the scalar
                ``clock_steps``). A number, or an array that broadcasts, perhaps traced: NaN or 0 in it is passed over.

        Returns:
            The state after. Elements where the numerator or the denominator is not finite are as they were.

        Raises:
            ValueError: if ``decay`` is not in [0, 1), or ``steps`` is a number not above 0.

        Guarantees:
            * A constant input is its own average from the first step on.
            * A step that is NaN in an element leaves that element as if the step had never been.
            * ``steps`` of k is k updates of 1 with the same values.

        Example:
            >>> import numpy as np
            >>> nothing = Smoothed.zeros_like(np.zeros(2))
            >>> nothing.update(np.array([6.0, np.nan]), np.array([3.0, 1.0]), decay=0.99).ratio
            array([ 2., nan])
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Smoothed.update needs 0 <= decay < 1, got decay={decay}; .99 counts about 100 steps")
        if isinstance(steps, int | float) and not steps > 0:
            raise ValueError(f"Smoothed.update needs steps > 0, got steps={steps}; pass those since the update before")
        xp = namespace(self.numerator, numerator, denominator)
        numerator, denominator = widened(numerator), widened(denominator)
        newest = _complement(decay, steps)
        weight = self.weight + newest * (1.0 - self.weight)
        q = newest / positive_or_one(weight)
        present = xp.isfinite(numerator) & xp.isfinite(denominator) & (newest > 0)

        def taken(average: Array, value: Array) -> Array:
            return xp.where(present, average + q * (value - average), average)

        return Smoothed(
            numerator=taken(self.numerator, numerator),
            denominator=taken(self.denominator, denominator),
            weight=xp.where(present, weight, self.weight),
        )

    @property
    def ratio(self) -> Array:
        """The average numerator over the average denominator; NaN where there was no step, or it is 0."""
        return divided(self.numerator, self.denominator)


def _complement(decay: float, steps: Array) -> Array:
    """1 − decay**steps, without its digits being lost where the decay is close to 1."""
    if decay == 0.0:
        return 1.0
    if isinstance(steps, int | float):
        return -math.expm1(steps * math.log(decay))
    return -namespace(steps).expm1(widened(steps) * math.log(decay))
