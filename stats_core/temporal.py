r"""What averages through time say of the gradients of one parameter: MaxVA's moments, and a fixed coefficient's.

MaxVA's rule chooses its weights so that its variance comes out large: that variance is shown as it is, and beside it
how many steps it rests on. A pair of moments under one fixed coefficient is unbiased, and what the two of
them and the step-to-step variance (`gradiometer.stats_core.successive`) have between them are ratios that readers form.
"""

from typing import Any, NamedTuple

from gradiometer.stats_core import maxva
from gradiometer.stats_core.arrays import Array, namespace, square_sum, total
from gradiometer.stats_core.maxva import TemporalMoments

__all__ = ["MaxvaStep", "maxva_sums"]


class MaxvaStep(NamedTuple):
    """What MaxVA's rule did with one gradient.

    Attributes:
        sums: catalogue name → scalar.
        after: the state after the gradient.
    """

    sums: dict[str, Array]
    after: TemporalMoments


def maxva_sums(before: TemporalMoments, grad: Array, within: Array = 0.0, **betas: Any) -> MaxvaStep:
    """What MaxVA's rule does with one gradient, summed over one parameter, by the optimizers' own function.

    Args:
        before: the state before the gradient.
        grad: g, in the units that the state is in.
        within: τ², as `maxva.update`.
        betas: ``beta_max``, ``beta_min``, ``beta_init`` as `maxva.update`.

    Returns:
        ``temporal_variance``, ``temporal_variance_prior``, ``deviation_sq``, ``deviation_share``,
        ``maxva_beta`` (scalars; the last four NaN until a variance exists), and the state after.
    """
    xp = namespace(grad)
    after, q = maxva.update(before, grad, within, **betas)
    deviation = grad - before.u
    prior = total(before.s)
    exists = prior > 0
    elements = max(1, grad.size if isinstance(grad.size, int) else grad.numel())
    beta = maxva.maxva_beta(before, q, **{name: betas[name] for name in ("beta_max", "beta_init") if name in betas})
    share = total(xp.astype(deviation * deviation > before.s, grad.dtype)) / elements

    def where_it_exists(value: Array) -> Array:
        return xp.where(exists, value, xp.nan)

    sums = {
        "temporal_variance": total(after.s),
        "temporal_variance_prior": where_it_exists(prior),
        "deviation_sq": where_it_exists(square_sum(deviation)),
        "deviation_share": where_it_exists(share),
        "maxva_beta": where_it_exists(total(beta) / elements),
    }
    return MaxvaStep(sums, after)
