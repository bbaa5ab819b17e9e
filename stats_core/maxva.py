r"""MaxVA's rule: the weight of the newest gradient that maximises the variance it estimates.

The one implementation, on arrays of any framework: the optimizers call it to make their step, the
collectors call it to show what the step saw. Per element and step, with the weight-normalised mean
``u`` and centred variance ``s`` of the gradients so far, their total weight ``w``, and a new gradient
``g`` that may itself be a distribution with variance :math:`\tau^2` (the examples of a batch):

.. math::
    d = g - u, \qquad s_\text{new}(q) = (1-q) s + q \tau^2 + q (1-q) d^2, \qquad
    q^* = \tfrac12 \left(1 + \frac{\tau^2 - s}{d^2}\right)

clipped to what ``beta_max`` and ``beta_min`` allow. With :math:`\tau^2 = 0` this is equation 6 of the
paper; with :math:`\tau^2 > 0` it is this project's own, and no paper has it.

The form used subtracts no large numbers, divides by nothing that can be 0 and needs no delta. Squares
of float32 deviations below 1e-19 underflow: finite but inexact there.

References:
    Zhu, Cheng, Gan, Huang, Liu and Goldstein, "Adaptive learning rates with maximum variation
    averaging", 2020, arXiv 2006.11918, equations 2-7. (Equation 8 there must read w of step t-1.)
"""

from typing import Any, Literal, NamedTuple

from gradiometer.stats_core.arrays import Array, concrete_count, namespace, positive_or_one, total
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums

__all__ = [
    "TemporalMoments",
    "Within",
    "deviation_ratio",
    "first_beta",
    "gradient_scale",
    "maxva_beta",
    "update",
    "within_variance",
]

Within = Literal["mean", "full"]


class TemporalMoments(NamedTuple):
    r"""MaxVA's moments of one parameter through time; all zero before the first gradient.

    Attributes:
        u: weight-normalised mean, shape ``(*param,)``. Unit: loss / parameter.
        s: centred variance, shape ``(*param,)``. Unit: (loss / parameter)². By design larger than the
            variance of the gradients: 2.7 to 5.7 times on normal noise (``beta_max`` .98 to .999).
        w: total weight, :math:`1 - \prod \beta`, shape ``(*param,)``, in [0, 1].
    """

    u: Array
    s: Array
    w: Array

    @classmethod
    def zeros_like(cls, param: Array) -> "TemporalMoments":
        """The state before the first gradient, on the parameter's device."""
        xp = namespace(param)
        return cls(xp.zeros_like(param), xp.zeros_like(param), xp.zeros_like(param))


def _newest_share(beta: float, w: Array) -> Array:
    """Normalised weight of the newest gradient under a fixed coefficient: (1-β) / (βw + 1-β)."""
    complement = 1.0 - beta  # in double, before it meets the array's type
    return complement / (beta * w + complement)


def update(
    state: TemporalMoments,
    grad: Array,
    within: Array = 0.0,
    *,
    beta_max: float = 0.999,
    beta_min: float = 0.5,
    beta_init: float | None = None,
) -> tuple[TemporalMoments, Array]:
    r"""Take one gradient into the temporal moments.

    Args:
        state: before this gradient.
        grad: g, shape ``(*param,)``.
        within: :math:`\tau^2`, shape ``(*param,)`` or a number; 0 is the paper's rule.
        beta_max: largest coefficient, at most 1.
        beta_min: smallest coefficient.
        beta_init: coefficient of the first step, below 1; None for ``beta_max``, or .9 if that is 1.

    Returns:
        The new state, and q, the normalised weight that the new gradient was given (1 at the first
        step), shape ``(*param,)``.

    Guarantees:
        * Finite input gives finite output; ``s`` is never negative.
        * q maximises the new variance over the coefficients in [``beta_min``, ``beta_max``].
        * Scaling gradients by c (and ``within`` by c²) scales u by c, s by c² and leaves q and w alone.

    Edge cases:
        ================================  =================================================
        first gradient                    u = g, s = τ², w = 1 − ``beta_init``
        d = 0 and τ² = s (dead element)   the smallest q, that of ``beta_max``
        τ² = 0, s = 0, d ≠ 0              q = 1/2
        ================================  =================================================

    Example:
        >>> import numpy as np
        >>> state = TemporalMoments.zeros_like(np.zeros(1))
        >>> for g in (1.0, 3.0):
        ...     state, q = update(state, np.array([g]), beta_max=0.9)
        >>> state.u.round(4), state.s.round(4), q.round(4)      # the plain average: q at beta_max is 1/(1+.9)
        (array([2.0526]), array([0.9972]), array([0.5263]))
    """
    xp = namespace(grad)
    u, s, w = state
    first = w == 0
    w_safe = xp.where(first, xp.ones_like(w), w)
    d = grad - u
    d2 = d * d
    a = within - s
    lo, hi = _newest_share(beta_max, w_safe), _newest_share(beta_min, w_safe)
    low, high = (2.0 * lo - 1.0) * d2, (2.0 * hi - 1.0) * d2
    inside = (a > low) & (a < high)
    q = 0.5 + 0.5 * a / xp.where(inside, d2, xp.ones_like(d2))  # |a| <= d2 where it is used
    q = xp.where(a <= low, lo, xp.where(a >= high, hi, q))
    q = xp.where(first, xp.ones_like(q), q)
    new_s = (1.0 - q) * s + q * within + q * (1.0 - q) * d2
    new_u = xp.where(first, grad, u + q * d)
    init = first_beta(beta_max, beta_init)
    new_w = xp.where(first, 1.0 - init, w_safe / (1.0 - xp.where(first, xp.zeros_like(q), q) * (1.0 - w_safe)))
    return TemporalMoments(new_u, new_s, xp.astype(new_w, u.dtype)), q


def first_beta(beta_max: float, beta_init: float | None) -> float:
    """The coefficient of the first step: it must be below 1, else no weight is ever gathered."""
    if beta_init is not None:
        return beta_init
    return beta_max if beta_max < 1.0 else 0.9


def maxva_beta(state: TemporalMoments, q: Array, *, beta_max: float = 0.999, beta_init: float | None = None) -> Array:
    r"""The coefficient :math:`\beta_t` that gives the newest gradient the normalised weight q.

    Args:
        state: *before* the gradient.
        q: as returned by `update`.
        beta_max: as given to `update`.
        beta_init: as given to `update`.

    Returns:
        :math:`\beta_t`, shape ``(*param,)``: small where the rule adapted to a deviation.

    Example:
        >>> import numpy as np
        >>> state = TemporalMoments(np.zeros(1), np.ones(1), np.ones(1))
        >>> _, q = update(state, np.array([3.0]))        # R = 9: q = (1 - 1/9)/2
        >>> q.round(4), maxva_beta(state, q).round(4)
        (array([0.4444]), array([0.5556]))
    """
    xp = namespace(q)
    first = state.w == 0
    beta = (1.0 - q) / (1.0 - q + xp.where(first, xp.ones_like(q), q * state.w))
    return xp.where(first, xp.full_like(q, first_beta(beta_max, beta_init)), beta)


def deviation_ratio(state: TemporalMoments, grad: Array) -> Array:
    r"""MaxVA's :math:`R_t = (g - u)^2 / s`, per element; adaptation begins where it passes 1.

    Args:
        state: before the gradient.
        grad: g, shape ``(*param,)``.

    Returns:
        :math:`R_t`, dimensionless; inf where s is 0 and g is not u, NaN where both are 0.

    Example:
        >>> import numpy as np
        >>> deviation_ratio(TemporalMoments(np.zeros(2), np.ones(2), np.ones(2)), np.array([3.0, 0.5]))
        array([9.  , 0.25])
    """
    d = grad - state.u
    return d * d / state.s


def within_variance(moments: Moments, within: Within = "mean") -> Array:
    r""":math:`\tau^2`, the variance that the examples of one batch give the rule.

    ``"mean"``: the variance of the batch mean, :math:`M_2 / (n (n - 1))`, 0 for a single example; with
    weights, rescaled so that its sum is the unbiased variance of the weighted mean. ``"full"``: the
    variance of one example, :math:`M_2 / W`.

    Args:
        moments: of one parameter, with the norms of all its examples where weights differ.
        within: "mean" or "full".

    Returns:
        Shape ``(*param,)``. Unit: (loss / parameter)², of the gradient as in ``moments.mean``.

    Raises:
        ValueError: if ``within`` is neither.

    Example:
        >>> import numpy as np
        >>> moments = Moments.from_per_example(np.array([[1.0], [3.0], [5.0]]))
        >>> within_variance(moments).round(4), within_variance(moments, "full").round(4)
        (array([1.3333]), array([2.6667]))
    """
    if within not in ("mean", "full"):
        raise ValueError(
            f"within_variance needs within in ('mean', 'full'), got within={within!r}; choose 'mean' unless you know"
        )
    xp = namespace(moments.mean)
    full = moments.m2 / positive_or_one(moments.weight_sum)
    if within == "full":
        return full
    count = concrete_count(moments.count)
    if count is not None and count <= 1:
        return xp.zeros_like(full)
    # Weighted means: M2/W times one number, so that the sum over elements is Var(mean) of statistics of the batch.
    trace = total(full)
    wanted = noise_sums(moments).batch_variance
    factor = xp.where((trace > 0) & (wanted > 0), wanted / positive_or_one(trace), xp.zeros_like(trace))
    # A NaN among the examples stays in its elements: the others take the share of equal weights, 1/(n-1).
    share = moments.weight_sq_sum / positive_or_one(moments.weight_sum * moments.weight_sum)
    plain = xp.ones_like(trace) * (share / positive_or_one(1.0 - share))
    factor = xp.where(xp.isfinite(trace) & xp.isfinite(wanted), factor, plain)
    if count is None:
        factor = xp.where(moments.count > 1, factor, xp.zeros_like(factor))
    return full * xp.astype(factor, full.dtype)


def gradient_scale(grads: list[Array], means: list[Array]) -> Array:
    r""":math:`\sum \|p.\mathrm{grad}\|^2 / \sum \|\bar g\|^2`: what was done to the gradient since it was measured.

    Multiplying :math:`\tau^2` by it undoes global clipping, the loss's reduction and a loss scale.

    Args:
        grads: the gradients that the optimizer sees, one array a parameter.
        means: ``Moments.mean`` of the same parameters, in the same order.

    Returns:
        A scalar on the device, safe at gradient scales of 1e-18 and 1e18; 1 where the means are all 0
        or anything is not finite.

    Raises:
        ValueError: if the lists are empty or of different length.

    Example:
        >>> import numpy as np
        >>> float(gradient_scale([np.array([1e18, 0.0])], [np.array([2e18, 0.0])]))
        0.25
    """
    if not grads or len(grads) != len(means):
        raise ValueError(
            f"gradient_scale needs one gradient a mean and at least one, got grads={len(grads)}, means={len(means)}; "
            "pass the parameters that have Moments"
        )
    xp = namespace(*grads)
    grad_peak, grad_sum = _scaled_square_sum(grads, xp)
    mean_peak, mean_sum = _scaled_square_sum(means, xp)
    ratio = grad_peak / mean_peak
    scale = ratio * ratio * (grad_sum / positive_or_one(mean_sum))
    return xp.where((mean_sum > 0) & xp.isfinite(scale), scale, xp.ones_like(scale))


def _scaled_square_sum(arrays: list[Array], xp: Any) -> tuple[Array, Array]:
    """The largest magnitude m (1 where all are 0), and the sum of squares of everything divided by m."""
    peak = xp.max(xp.stack([xp.max(xp.abs(a)) for a in arrays]))
    peak = positive_or_one(peak)
    summed = sum(total((a / peak) * (a / peak)) for a in arrays)
    return peak, summed
