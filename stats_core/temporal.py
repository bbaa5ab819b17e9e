r"""What averages through time say of the gradients of one parameter: MaxVA's moments, and a fixed coefficient's.

MaxVA's rule chooses its weights so that its variance comes out large; that variance is shown as it is, and beside
it the number of steps that it rests on. A pair of moments under one fixed coefficient is unbiased. Readers form the
ratios: MaxVA's over the fixed pair's (inflation), the fixed pair's over that from step to step (drift).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gradiometer.stats_core import maxva
from gradiometer.stats_core.arrays import Array, namespace, positive_or_one, square_sum, total, widened
from gradiometer.stats_core.maxva import TemporalMoments

__all__ = ["FIXED_BETA", "FixedMoments", "MaxvaInput", "MaxvaStep", "fixed_sums", "maxva_sums"]


FIXED_BETA = 0.99
"""The coefficient of the fixed pair: a horizon of 100 steps."""


class MaxvaInput(NamedTuple):
    """What MaxVA's rule is about to take, of one parameter.

    Attributes:
        before: the state before the gradient.
        grad: g, shape ``(*param,)``, in the units that the state is in.
        within: τ², as `maxva.update`.
        betas: ``beta_max``, ``beta_min``, ``beta_init``, as `maxva.update`.
    """

    before: TemporalMoments
    grad: Array
    within: Array = 0.0
    betas: Mapping[str, Any] = {}


class MaxvaStep(NamedTuple):
    """What MaxVA's rule did with one gradient.

    Attributes:
        sums: catalogue name → scalar.
        after: the state after the gradient; as before it in elements where the new variance is not finite.
        kish: the sum of squares of the rule's weights after the gradient, shape ``(*param,)``, likewise; None where
            it was not kept before.
    """

    sums: dict[str, Array]
    after: TemporalMoments
    kish: Array | None = None


def maxva_sums(
    before: TemporalMoments, grad: Array, within: Array = 0.0, *, kish: Array | None = None, **betas: Any
) -> MaxvaStep:
    r"""What MaxVA's rule does with one gradient, summed over one parameter, by the optimizers' own function.

    With q, the normalised weight that the rule gave this gradient, the weights :math:`\omega` of all gradients so
    far have the sum of squares

    .. math:: Q_t = \sum_i \omega_i^2 = (1 - q)^2 Q_{t-1} + q^2

    and ``effective_steps`` is the mean of Kish's :math:`1/Q` over elements: how many steps of equal weight the
    moments are worth. 14 to 16 on normal noise whatever ``beta_max``; few where the rule adapts at every step. It
    does not correct ``temporal_variance``: chosen weights are not independent of what they weigh.

    Args:
        before: the state before the gradient.
        grad: g, shape ``(*param,)``, in the units that the state is in.
        within: τ², as `maxva.update`.
        kish: Q of the gradients so far, shape ``(*param,)``, 0 before the first; None: not kept. Where the state has
            begun and Q is still 0, the gradients before count as one: n_eff comes out too low until they fade.
        betas: ``beta_max``, ``beta_min``, ``beta_init`` as `maxva.update`.

    Returns:
        Sums: ``temporal_variance``, ``temporal_variance_prior``, ``deviation_sq`` in (loss / parameter)²,
        ``deviation_share``, ``maxva_beta`` (scalars; the last four NaN until a variance exists: one of 0
        does where all gradients were 0), and, with ``kish``,
        ``effective_steps``; the state after, and Q after.

    Guarantees:
        * The state after is that of `maxva.update` in every element whose new variance is finite.
        * 1 ≤ ``effective_steps`` ≤ the number of gradients.
        * Scaling gradients by c (and τ² by c²) scales the variances and ``deviation_sq`` by c², nothing else.

    Edge cases:
        ================================  ==========================================================
        first gradient                    ``effective_steps`` 1; what needs a variance before is NaN
        a NaN or inf gradient, or a       shown once, as NaN or inf; its elements stay as they were
        square that overflows
        a dead element (always 0)         β_max at every step: 1/Q grows to (1 + β_max)/(1 − β_max)
        ================================  ==========================================================

    Example:
        >>> import numpy as np
        >>> state, kish = TemporalMoments.zeros_like(np.zeros(1)), np.zeros(1)
        >>> for g in (1.0, 3.0, 2.0):
        ...     sums, state, kish = maxva_sums(state, np.array([g]), kish=kish, beta_max=0.9)
        >>> {name: round(float(sums[name]), 4) for name in ("temporal_variance", "effective_steps")}
        {'temporal_variance': 0.6299, 'effective_steps': 2.978}

    References:
        Zhu et al., as `gradiometer.stats_core.maxva`; Kish, "Survey sampling", 1965, section 11.7.
    """
    grad = widened(grad)
    xp = namespace(grad)
    after, q = maxva.update(before, grad, within, **betas)
    finite = xp.isfinite(after.s)  # a gradient that is not a number, or its square, always reaches s
    q = xp.where(finite, q, xp.nan)
    deviation = grad - before.u
    prior = total(before.s)
    squares = square_sum(deviation)
    # Gradients that were always 0 have a variance of 0; one that differs from a single other has none to be held to.
    exists = (prior > 0) | (_has_begun(before) & (squares == 0))
    beta = maxva.maxva_beta(before, q, **{name: betas[name] for name in ("beta_max", "beta_init") if name in betas})

    def where_it_exists(value: Array) -> Array:
        return xp.where(exists, value, xp.nan)

    sums = {
        "temporal_variance": total(after.s),
        "temporal_variance_prior": where_it_exists(prior),
        "deviation_sq": where_it_exists(squares),
        "deviation_share": where_it_exists(_mean(xp.astype(deviation * deviation > before.s, grad.dtype))),
        "maxva_beta": where_it_exists(_mean(beta)),
    }
    if kish is not None:
        known = xp.where((before.w > 0) & (kish == 0), xp.ones_like(kish), kish)
        spread = _spread(known, q)
        sums["effective_steps"] = _mean(1.0 / spread)
        kish = xp.where(finite, spread, kish)
    kept = (xp.where(finite, new, old) for new, old in zip(after, before, strict=True))
    return MaxvaStep(sums, TemporalMoments(*kept), kish)


class FixedMoments(NamedTuple):
    r"""Mean and variance of the gradients of one parameter under one fixed coefficient β; zero before the first.

    The weights are :math:`\omega_i \propto \beta^{t-i}`, adding up to 1 at every step (bias-corrected).

    Attributes:
        u: :math:`\sum \omega_i g_i`, shape ``(*param,)``. Unit: loss / parameter.
        s: :math:`\sum \omega_i (g_i - u)^2`, shape ``(*param,)``. Unit: (loss / parameter)².
        w: total weight before it was normalised, :math:`1 - \beta^t`, a scalar.
        spread: :math:`Q = \sum \omega_i^2`, a scalar; 1/Q is the effective number of steps.
    """

    u: Array
    s: Array
    w: Array
    spread: Array

    @classmethod
    def zeros_like(cls, param: Array) -> "FixedMoments":
        """The state before the first gradient, on the parameter's device, in float32 or wider.

        Example:
            >>> import numpy as np
            >>> FixedMoments.zeros_like(np.ones(2))
            FixedMoments(u=array([0., 0.]), s=array([0., 0.]), w=array(0.), spread=array(0.))
        """
        xp = namespace(param)
        param = widened(param)
        one = xp.sum(param)
        return cls(xp.zeros_like(param), xp.zeros_like(param), xp.zeros_like(one), xp.zeros_like(one))


def fixed_sums(before: FixedMoments, grad: Array, beta: float) -> tuple[dict[str, Array], FixedMoments]:
    r"""Variance of the gradients through time under one fixed coefficient, summed over one parameter.

    With :math:`q = (1-\beta)/(1-\beta^t)`, the newest gradient's normalised weight, and d = g − u:

    .. math::
        u \leftarrow u + q d, \qquad s \leftarrow (1-q) s + q (1-q) d^2, \qquad Q \leftarrow (1-q)^2 Q + q^2, \qquad
        s_\beta = \sum_j \frac{s_j}{1 - Q}

    Weights that do not look at the gradients make E s = Var(ḡ)(1 − Q), so :math:`s_\beta` is the variance of the
    batch gradient without bias while the true gradient rests. Where it moves, the movement within the
    horizon 1/(1−β) is in it: over the variance from step to step it is the drift ratio.

    Args:
        before: the state before the gradient.
        grad: g, shape ``(*param,)``.
        beta: β, at least 0 and below 1; (1+β)/(1−β) steps are averaged in the end.

    Returns:
        ``fixed_variance`` (a scalar, in (loss / parameter)²), and the state after.

    Raises:
        ValueError: if ``beta`` is not in [0, 1).

    Guarantees:
        * Unbiased for independent gradients of one distribution at every step from the second on.
        * ``s`` and ``fixed_variance`` are never negative.
        * Adding one vector to every gradient leaves ``fixed_variance``; scaling by c scales it by c².

    Edge cases:
        ===============================  ==================================================================
        first gradient, or ``beta`` 0    NaN: one gradient has no variance
        a NaN or inf gradient, or a      NaN or inf, once; the whole parameter stays as it was, so that its
        square that overflows            elements go on sharing one Q
        ===============================  ==================================================================

    Example:
        >>> import numpy as np
        >>> state = FixedMoments.zeros_like(np.zeros(1))
        >>> for g in (1.0, 3.0):
        ...     sums, state = fixed_sums(state, np.array([g]), 0.9)
        >>> round(float(sums["fixed_variance"]), 4), round(1 / float(state.spread), 4)    # two gradients: ½(3 − 1)²
        (2.0, 1.9945)

    References:
        Kish, "Survey sampling", 1965, section 11.7, for 1/Q.
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"fixed_sums needs 0 <= beta < 1, got beta={beta}; take the optimizer's, or .99")
    grad = widened(grad)
    xp = namespace(grad)
    complement = 1.0 - beta  # in double, before it meets the array's type
    w = before.w + complement * (1.0 - before.w)
    q = complement / w
    d = grad - before.u
    d2 = d * d  # before it meets 1 - q, which is 0 at the first step: an overflow must be seen
    after = FixedMoments(
        u=before.u + q * d,
        s=(1.0 - q) * before.s + q * (1.0 - q) * d2,
        w=w,
        spread=_spread(before.spread, q),
    )
    freedom = 1.0 - after.spread
    variance = xp.where(freedom > 0, total(after.s) / positive_or_one(freedom), xp.nan)
    finite = xp.all(xp.isfinite(after.s))
    kept = (xp.where(finite, new, old) for new, old in zip(after, before, strict=True))
    return {"fixed_variance": variance}, FixedMoments(*kept)


def _has_begun(state: TemporalMoments) -> Array:
    """True where the state has taken a gradient; it takes all elements at once."""
    xp = namespace(state.w)
    flat = xp.reshape(state.w, (-1,))
    return flat[0] > 0 if flat.shape[0] else xp.zeros(1, dtype=xp.bool)[0]


def _spread(before: Array, q: Array) -> Array:
    """The sum of squares of normalised weights when the newest has the weight q."""
    return (1.0 - q) * (1.0 - q) * before + q * q


def _mean(values: Array) -> Array:
    """The mean over elements; 0 where there are none."""
    elements = values.size if isinstance(values.size, int) else values.numel()
    return total(values) / max(1, elements)
