"""From the Moments of parameters to the few numbers a layer that go on the wire.

Runs where the moments are (on the device, inside ``jit``): in goes what a step left, out comes a `Summary`.
All layers are formed at once, so that a step costs a few operations on short arrays however many layers it has.
"""

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradiometer.stats_core.arrays import Array, namespace, square_sum, total
from gradiometer.stats_core.catalog import statistic
from gradiometer.stats_core.elements import element_limits, element_parts, element_sums_of_parts
from gradiometer.stats_core.examples import ExampleRows, Outliers, example_columns, outliers
from gradiometer.stats_core.histogram import Sketch, sketch_rows
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_of_parts
from gradiometer.stats_core.selection import Selection
from gradiometer.stats_core.signs import sign_sums

__all__ = ["OUTLIERS", "Part", "Summary", "batch_sums", "summarized"]

_OF_ELEMENTS = frozenset(("active_elements", "gsnr_sum", "evidence_sum", "significant_elements"))

OUTLIERS = 8
"""How many of the largest examples a step sends."""


class Summary(NamedTuple):
    """What one measured step sends.

    Attributes:
        count: examples of the logical batch; 0 where the step was not measured.
        columns: catalogue name → array of shape ``(layers,)``, in the order of the registered layers. A
            statistic that does not exist (yet) is NaN, never 0.
        scalars: catalogue name → number of the step: the whole model's, where layers do not add up to it.
        sketches: catalogue name → log-bucketed counts of every layer.
        outliers: the examples of the largest gradients over all layers, or None.
    """

    count: Array
    columns: Mapping[str, Array]
    scalars: Mapping[str, Array] = {}
    sketches: Mapping[str, Sketch] = {}
    outliers: Outliers | None = None


class Part(NamedTuple):
    """One parameter's share of its layer.

    Attributes:
        moments: of the step.
        elements: of the parameter.
        sums: catalogue name → scalar: what is known beside `batch_sums`, of kind "sum" or "mean".
        sketches: catalogue name → counts of its elements, as `gradiometer.stats_core.histogram.sketch_fixed`.
    """

    moments: Moments
    elements: int
    sums: Mapping[str, Array] = {}
    sketches: Mapping[str, Sketch] = {}


def batch_sums(moments: Sequence[Moments], wanted: Selection) -> dict[str, Array]:
    """What the batch itself says of all parameters of a step at once.

    Args:
        moments: of the parameters, all of one batch.
        wanted: what was asked for. The noise sums are always there: others are made of them.

    Returns:
        Catalogue name → shape ``(parameters,)``: the fields of `gradiometer.stats_core.noise.NoiseSums`, and as far as
        wanted those of `gradiometer.stats_core.elements.element_sums` and `gradiometer.stats_core.signs.sign_sums`,
        NaN where the parameter's variance does not exist: of one example, or with one that is not finite.

    Example:
        >>> import numpy as np
        >>> moments = [Moments.from_per_example(np.array(g)) for g in ([[1.0], [3.0]], [[0.0], [0.0]])]
        >>> batch_sums(moments, Selection.of("light"))["variance_trace"]
        array([2., 0.])
    """
    batch = moments[0]
    xp = namespace(batch.sq_norms)
    noise = noise_of_parts(
        xp.stack([xp.asarray(square_sum(one.mean)) for one in moments]),
        xp.stack([xp.asarray(total(one.m2)) for one in moments]),
        xp.stack([one.sq_norms for one in moments]),
        batch,
    )
    of_elements: dict[str, Array] = {}
    if not _OF_ELEMENTS.isdisjoint(wanted.columns):
        limits = element_limits(batch)
        parts = xp.stack([element_parts(one.mean, one.m2, limits) for one in moments])
        of_elements |= element_sums_of_parts(parts, limits)
    if "sign_mean" in wanted.ingredients and batch.sign_mean is not None:
        signs = [sign_sums(one) for one in moments]
        of_elements |= {name: xp.stack([one[name] for one in signs]) for name in signs[0]}
    # Elements without a variance are left out one by one; a parameter that has such is not counted as if whole.
    exists = xp.isfinite(noise.batch_variance)
    return {**noise._asdict(), **{name: xp.where(exists, values, xp.nan) for name, values in of_elements.items()}}


def summarized(layers: Sequence[Sequence[Part]], of_batch: Mapping[str, Array], wanted: Selection) -> Summary:
    """The numbers of a step, from those of its parameters, added up as the catalogue's ``kind`` says.

    Args:
        layers: the parts of each layer, one or more; all of one batch.
        of_batch: `batch_sums` of the parts' Moments, in their order.
        wanted: what was asked for.

    Returns:
        A column for each of ``wanted.columns``. Where a part lacks a statistic, its layer is NaN: a layer is
        summed over all of its parameters or over none.
    """
    parts = [part for layer in layers for part in layer]
    batch = parts[0].moments
    xp = namespace(batch.sq_norms)
    sq_norms = xp.stack([_added([part.moments.sq_norms for part in layer]) for layer in layers])
    ones = xp.ones_like(sq_norms[:, 0])
    columns: dict[str, Array] = {
        "count": ones * batch.count,
        "effective_count": ones * (batch.weight_sum * batch.weight_sum / batch.weight_sq_sum),
        "nonfinite_examples": xp.sum(xp.astype(~xp.isfinite(sq_norms), sq_norms.dtype), axis=1),
        **_added_up(layers, of_batch, wanted),
    }
    scalars: dict[str, Array] = {}
    sketches: dict[str, Sketch] = {}
    names = [name for name in wanted.columns if statistic(name).kind == "example"]
    if names:
        found = example_columns(_example_rows(layers, of_batch["mean_sq_norm"], sq_norms), names)
        columns |= {name: values[:-1] for name, values in found.items()}
        scalars |= {name: values[-1] for name, values in found.items()}
    for name in wanted.sketches:
        if name == "example_norm":
            sketches[name] = sketch_rows(xp.sqrt(sq_norms), batch.weights != 0)
        elif all(name in part.sketches for part in parts):
            by_layer = [functools.reduce(Sketch.added, [part.sketches[name] for part in layer]) for layer in layers]
            sketches[name] = Sketch(*(xp.concat(members) for members in zip(*by_layer, strict=True)))
    return Summary(
        count=batch.count,
        columns={name: columns[name] for name in wanted.columns},
        scalars=scalars,
        sketches=sketches,
        outliers=outliers(xp.sum(sq_norms, axis=0), OUTLIERS, batch.weights) if wanted.has_outliers else None,
    )


def _added_up(layers: Sequence[Sequence[Part]], of_batch: Mapping[str, Array], wanted: Selection) -> dict[str, Array]:
    """The columns that add up over parameters: one table of numbers by parameter, summed over each layer's own."""
    parts = [part for layer in layers for part in layer]
    mean_sq_norm = of_batch["mean_sq_norm"]
    xp = namespace(mean_sq_norm)
    absent = xp.full_like(mean_sq_norm, float("nan"))
    rows: dict[str, Array] = {}
    for name in wanted.columns:
        kind = statistic(name).kind
        if kind not in ("sum", "mean"):
            continue
        if name in of_batch:
            rows[name] = xp.astype(of_batch[name], absent.dtype)
        elif any(name in part.sums for part in parts):
            values: list[Any] = []
            for layer in layers:
                size = sum(part.elements for part in layer)
                for place, part in enumerate(layer):
                    value = xp.asarray(part.sums[name]) if name in part.sums else absent[place]
                    values.append(value * (part.elements / size) if kind == "mean" else value)
            rows[name] = xp.stack([xp.astype(value, absent.dtype) for value in values])
        else:
            rows[name] = absent
    if not rows:
        return {}
    summed = _by_layer(layers, xp.stack(list(rows.values())))
    return {name: summed[place] for place, name in enumerate(rows)}


def _example_rows(layers: Sequence[Sequence[Part]], mean_sq_norm: Array, sq_norms: Array) -> ExampleRows:
    """The examples' numbers of every layer, and of the whole model as the last row."""
    xp = namespace(sq_norms)
    mean_sq_norm = _by_layer(layers, mean_sq_norm[None, :])[0]

    def with_whole(by_layer: Array) -> Array:
        return xp.concat([by_layer, xp.sum(by_layer, axis=0)[None]])

    dots = None
    if all(part.moments.dots is not None for layer in layers for part in layer):
        dots = with_whole(xp.stack([_added([part.moments.dots for part in layer]) for layer in layers]))
    return ExampleRows(with_whole(sq_norms), with_whole(mean_sq_norm), layers[0][0].moments.weights, dots)


def _by_layer(layers: Sequence[Sequence[Part]], table: Array) -> Array:
    """A table of numbers by parameter, shape ``(rows, parameters)``, added up to ``(rows, layers)``."""
    xp = namespace(table)
    ends = list(itertools.accumulate(map(len, layers), initial=0))
    return xp.stack([xp.sum(table[:, a:b], axis=1) for a, b in itertools.pairwise(ends)], axis=1)


def _added(arrays: Sequence[Array]) -> Array:
    return functools.reduce(operator.add, arrays)
