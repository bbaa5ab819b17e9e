"""From the Moments of parameters to the few numbers a layer that go on the wire.

Runs where the moments are (on the device, inside ``jit``): in goes what a step left, out come scalars.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradiometer.stats_core import maxva
from gradiometer.stats_core.arrays import Array, namespace, square_sum, total
from gradiometer.stats_core.catalog import statistic
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums

__all__ = ["Previous", "Summary", "layer_columns", "maxva_sums", "parameter_sums", "step_sums"]


class Summary(NamedTuple):
    """What one measured step sends: a number a layer and statistic.

    Attributes:
        count: examples of the logical batch; 0 where the step was not measured.
        columns: catalogue name → array of shape ``(layers,)``, float32, in the order of the registered
            layers. A statistic that does not exist (yet) is NaN, never 0.
    """

    count: Array
    columns: Mapping[str, Array]


class Previous(NamedTuple):
    """What the step-to-step variance needs of a measured step, for one parameter; kept until the next one.

    Attributes:
        mean: the batch gradient, shape ``(*param,)``.
        batch_variance: its variance across examples, a scalar; NaN where there was no step before.
    """

    mean: Array
    batch_variance: Array


def parameter_sums(moments: Moments) -> dict[str, Array]:
    """The light tier's sums of one parameter, keyed by catalogue name; scalars."""
    return dict(noise_sums(moments)._asdict())


def step_sums(before: Previous, now: Previous) -> dict[str, Array]:
    r"""The step-to-step variance of one parameter (von Neumann's successive differences).

    .. math:: D = \tfrac12 \|\bar g_t - \bar g_{t-1}\|^2, \qquad \tilde P = \tfrac12 (P_t + P_{t-1})

    :math:`\rho = \sum D / \sum \tilde P` is 1 where nothing but the drawn examples differs from step to
    step; a drift of δ a step biases D by no more than δ²/2.

    Returns:
        ``step_variance`` and ``step_variance_expected``; both NaN where there was no step before.

    Example:
        >>> import numpy as np
        >>> before, now = Previous(np.array([2.0]), np.array(1.0)), Previous(np.array([4.0]), np.array(4.0))
        >>> {name: float(value) for name, value in step_sums(before, now).items()}
        {'step_variance': 2.0, 'step_variance_expected': 2.5}
    """
    xp = namespace(now.mean)
    expected = 0.5 * (now.batch_variance + before.batch_variance)
    difference = 0.5 * square_sum(now.mean - before.mean)
    difference = xp.where(xp.isnan(before.batch_variance), xp.nan, difference)
    return {"step_variance": difference, "step_variance_expected": expected}


def maxva_sums(
    before: TemporalMoments, grad: Array, within: Array = 0.0, **betas: Any
) -> tuple[dict[str, Array], TemporalMoments]:
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

    return {
        "temporal_variance": total(after.s),
        "temporal_variance_prior": where_it_exists(prior),
        "deviation_sq": where_it_exists(square_sum(deviation)),
        "deviation_share": where_it_exists(share),
        "maxva_beta": where_it_exists(total(beta) / elements),
    }, after


def layer_columns(
    parameters: Sequence[tuple[Moments, Mapping[str, Array], int]], names: Sequence[str]
) -> dict[str, Array]:
    """One layer's numbers from those of its parameters, added up as the catalogue's ``kind`` says.

    What is counted (``kind`` "count") is formed here; sums and means come with the parameters: from `parameter_sums`
    (`NoiseSums`), `step_sums` or `maxva_sums`.

    Args:
        parameters: Moments, sums keyed by catalogue name, and number of elements of each parameter.
        names: the columns wanted, as `selection.columns`.

    Returns:
        Catalogue name → scalar, one for each of ``names``. What no parameter has is NaN.
    """
    moments = parameters[0][0]
    xp = namespace(moments.mean)
    sq_norms = sum(part.sq_norms for part, _, _ in parameters)
    size = sum(elements for _, _, elements in parameters)
    found: dict[str, Array] = {
        "count": moments.count,
        "effective_count": moments.weight_sum * moments.weight_sum / moments.weight_sq_sum,
        "nonfinite_examples": total(xp.astype(~xp.isfinite(sq_norms), sq_norms.dtype)),
    }
    for name in names:
        if name in found:
            continue
        parts = [(sums[name], elements) for _, sums, elements in parameters if name in sums]
        if not parts:
            found[name] = float("nan")
        elif statistic(name).kind == "mean":
            found[name] = sum(value * (elements / size) for value, elements in parts)
        else:
            found[name] = sum(value for value, _ in parts)
    return {name: found[name] for name in names}
