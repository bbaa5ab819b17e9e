"""From the Moments of parameters to the few numbers a layer that go on the wire.

Runs where the moments are (on the device, inside ``jit``): in goes what a step left, out come scalars.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gradiometer.stats_core.arrays import Array, namespace, total
from gradiometer.stats_core.catalog import statistic
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums

__all__ = ["Summary", "layer_columns", "parameter_sums"]


class Summary(NamedTuple):
    """What one measured step sends: a number a layer and statistic.

    Attributes:
        count: examples of the logical batch; 0 where the step was not measured.
        columns: catalogue name → array of shape ``(layers,)``, float32, in the order of the registered
            layers. A statistic that does not exist (yet) is NaN, never 0.
    """

    count: Array
    columns: Mapping[str, Array]


def parameter_sums(moments: Moments) -> dict[str, Array]:
    """The light tier's sums of one parameter, keyed by catalogue name; scalars."""
    return dict(noise_sums(moments)._asdict())


def layer_columns(
    parameters: Sequence[tuple[Moments, Mapping[str, Array], int]], names: Sequence[str]
) -> dict[str, Array]:
    """One layer's numbers from those of its parameters, added up as the catalogue's ``kind`` says.

    What is counted (``kind`` "count") is formed here; sums and means come with the parameters: from `parameter_sums`
    (`NoiseSums`), `gradiometer.stats_core.successive` or `gradiometer.stats_core.temporal`.

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
