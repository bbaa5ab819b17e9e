r"""What the batch gradients of two consecutive measured steps say together, summed over one parameter.

Two batches are independent draws, so half the squared difference of their means estimates the variance of a
mean (von Neumann), and their dot product the squared norm of the true gradient. Both forget a drift of the
gradient at once, where an average over many steps carries it along.
"""

from typing import NamedTuple

from gradiometer.stats_core.arrays import Array, namespace, square_sum, widened

__all__ = ["Previous", "step_sums"]


class Previous(NamedTuple):
    r"""What is kept of a measured step until the next one, for one parameter.

    Attributes:
        mean: the batch gradient :math:`\bar g`, shape ``(*param,)``. Unit: loss / parameter.
        batch_variance: P, its variance across examples, a scalar; NaN where it does not exist. Unit:
            (loss / parameter)².
        mean_sq_norm: :math:`\|\bar g\|^2`, a scalar, as `gradiometer.stats_core.noise.noise_sums` has it; NaN
            where there was no step before. Same unit.
    """

    mean: Array
    batch_variance: Array
    mean_sq_norm: Array

    @classmethod
    def zeros_like(cls, param: Array) -> "Previous":
        """What stands for the step before the first one, on the parameter's device: the scalars are NaN.

        Example:
            >>> import numpy as np
            >>> Previous.zeros_like(np.ones(2))
            Previous(mean=array([0., 0.]), batch_variance=array(nan), mean_sq_norm=array(nan))
        """
        xp = namespace(param)
        mean = xp.zeros_like(widened(param))
        one = xp.sum(mean)
        return cls(mean, xp.full_like(one, float("nan")), xp.full_like(one, float("nan")))


def step_sums(before: Previous, now: Previous) -> dict[str, Array]:
    r"""Variance and dot product of the batch gradients of two consecutive measured steps, for one parameter.

    .. math::
        D = \tfrac12 \|\bar g_t - \bar g_{t-1}\|^2, \qquad \tilde P = \tfrac12 (P_t + P_{t-1}), \qquad
        \langle \bar g_t, \bar g_{t-1} \rangle = \tfrac12 (\|\bar g_t\|^2 + \|\bar g_{t-1}\|^2) - D

    D is the variance of the batch gradient measured from step to step. :math:`\rho = \sum D / \sum \tilde P` is
    1 where nothing but the drawn examples differs. Above 1: the gradient itself moves (learning rate times
    curvature), the examples of a batch are alike, or noise is shared by a batch. Below 1: stratified batches, or
    batches that share examples. The dot product estimates :math:`\|G\|^2` without the bias of a squared norm.

    Args:
        before: of the measured step before.
        now: of this one.

    Returns:
        ``step_variance`` (D), ``step_variance_expected`` (:math:`\tilde P`) and ``consecutive_dot``: scalars, in
        (loss / parameter)², additive over parameters and ranks' shards of parameters.

    Guarantees:
        * D is never negative, and unbiased for independent batches of one distribution.
        * A drift of the true gradient by δ a step biases D by ½‖δ‖², and by no more later on.
        * Scaling both gradients by c scales all three by c²; D is the same after adding one vector to both.
        * No pass over the arrays but the one for D. In a type with unit roundoff ε (6e-8 in float32) whose squares
          are added up in float64, the dot product is within 7ε of its scale ½(‖ḡ_t‖² + ‖ḡ_{t−1}‖²), and so is
          ``consecutive_cosine``, which is measured on that scale, within 7ε.

    Edge cases:
        =====================================  ==========================================
        no step before                         all three NaN
        a batch of one example                 P̃ NaN, the others exist
        a NaN or inf in either gradient        D and the dot product NaN or inf
        elements below 1e-19 in float32        their squares are 0
        float32 sums (jax) above 3e38          inf, and NaN for the dot product
        =====================================  ==========================================

    Example:
        >>> import numpy as np
        >>> before = Previous(np.array([2.0]), np.array(1.0), np.array(4.0))
        >>> now = Previous(np.array([4.0]), np.array(4.0), np.array(16.0))
        >>> {name: float(value) for name, value in step_sums(before, now).items()}
        {'step_variance': 2.0, 'step_variance_expected': 2.5, 'consecutive_dot': 8.0}

    References:
        von Neumann, Kent, Bellinson and Hart, "The mean square successive difference", Annals of Mathematical
        Statistics 12(2), 1941.
    """
    xp = namespace(now.mean)
    # The error of the dot product: each square is rounded once (ε), and the two norms weigh S, half their sum;
    # each difference is rounded before it is squared (3ε), and D ≤ 2S. Together (1 + 2·3) εS.
    difference = 0.5 * square_sum(now.mean - before.mean)
    difference = xp.where(xp.isnan(before.mean_sq_norm), xp.nan, difference)
    return {
        "step_variance": difference,
        "step_variance_expected": 0.5 * (now.batch_variance + before.batch_variance),
        "consecutive_dot": 0.5 * (now.mean_sq_norm + before.mean_sq_norm) - difference,
    }
