"""Ratios and means over a window of steps: how every reader forms the numbers that people look at.

Works on host arrays of shape ``(steps, layers)``, one a travelling column; the exporter, the live page,
the report and the command line all call `windowed`, `across_layers` and their intervals.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping

from gradiometer.stats_core import intervals
from gradiometer.stats_core.arrays import Array, namespace
from gradiometer.stats_core.catalog import IN_OPTIMIZER_UNITS, WIRE, statistic
from gradiometer.stats_core.derived import FORMULAS, divided
from gradiometer.stats_core.intervals import Interval
from gradiometer.stats_core.rows import Statistic

__all__ = ["across_layers", "interval", "interval_across_layers", "windowed"]

_ROWS = {row.name: row for row in WIRE}


def windowed(
    name: str,
    columns: Mapping[str, Array],
    gradient_scale: Array | None = None,
    scalars: Mapping[str, Array] | None = None,
) -> Array:
    r"""One statistic over a window of steps, for each layer.

    A ratio is the sum over steps of its numerator over the sum of its denominator, a formula is formed from
    such sums, over the steps where all that it needs is finite; anything else is the mean over the steps where
    it is finite.

    Args:
        name: catalogue name.
        columns: travelling columns, shape ``(steps, layers)`` each; those that the statistic needs.
        gradient_scale: the scalar of that name, shape ``(steps,)``, where the temporal moments are the
            optimizer's own: measured sums are then shown in the optimizer's units, beside its own. None
            leaves them as measured. Ratios of two measured sums never change.
        scalars: numbers of the steps, shape ``(steps,)`` each, for the statistics that need some.

    Returns:
        Shape ``(layers,)``; NaN where no step has it, or a ratio's denominator is 0.

    Raises:
        ValueError: if the catalogue has no such statistic.
        KeyError: if a column that it needs is missing. (A scalar that is missing is NaN.)

    Example:
        >>> import numpy as np
        >>> columns = {"variance_trace": np.array([[8.0], [4.0]]), "grad_sq_norm": np.array([[-1.0], [4.0]])}
        >>> windowed("noise_scale", columns)         # (8 + 4) / (-1 + 4), not the mean of -8 and 1
        array([4.])
    """
    row = statistic(name)
    return _formed(row, _by_layer(row, columns, gradient_scale, scalars))


def across_layers(
    name: str,
    columns: Mapping[str, Array],
    sizes: Array,
    gradient_scale: Array | None = None,
    scalars: Mapping[str, Array] | None = None,
) -> float:
    """The same for the whole model: sums are added over layers *before* a ratio is formed.

    Args:
        name: catalogue name.
        columns: as `windowed`.
        sizes: number of elements of each layer, shape ``(layers,)``.
        gradient_scale: as `windowed`.
        scalars: as `windowed`. What is made of the examples' own numbers does not add up over layers: the
            whole model's is the scalar of the same name.

    Returns:
        One number; NaN where it does not exist.

    Raises:
        ValueError: if the catalogue has no such statistic.
        KeyError: if a column that it needs is missing. (A scalar that is missing is NaN.)

    Example:
        >>> import numpy as np
        >>> columns = {"variance_trace": np.array([[8.0, 1.0]]), "grad_sq_norm": np.array([[1.0, 2.0]])}
        >>> across_layers("noise_scale", columns, np.array([10, 10]))
        3.0
    """
    row = statistic(name)
    if not row.travels:
        return float(_formed(row, _of_model(row, columns, sizes, gradient_scale, scalars))[0])
    if row.kind == "example":
        whole = {name: _scalar(name, scalars, columns[name])}
        return float(_formed(row, _by_layer(row, whole, gradient_scale, None))[0])
    # First each layer's mean over the steps that have it: a layer that is missing for a step leaves no dip.
    layers = _formed(row, _by_layer(row, columns, gradient_scale, scalars))[None, :]
    return float(_formed(row, _of_model(row, {name: layers}, sizes, None, None))[0])


def interval(
    name: str,
    columns: Mapping[str, Array],
    gradient_scale: Array | None = None,
    scalars: Mapping[str, Array] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """The interval of a statistic over a window, for each layer.

    Args:
        name: catalogue name of a row whose ``interval`` is True.
        columns: as `windowed`.
        gradient_scale: as `windowed`.
        scalars: as `windowed`.
        level: how often it is meant to hold the truth; measured coverage: ``docs/intervals.md``.

    Returns:
        Both ends, shape ``(layers,)``; NaN where there are too few steps. A noise scale that is not resolved
        has no upper end: infinity.

    Raises:
        ValueError: if the statistic has no interval.

    Example:
        >>> import numpy as np
        >>> columns = {"variance_trace": np.full((4, 1), 8.0), "grad_sq_norm": np.array([[3.0], [5.0], [4.0], [4.0]])}
        >>> found = interval("noise_scale", columns)
        >>> round(float(found.low[0]), 2), round(float(found.high[0]), 2)
        (1.51, 2.96)
    """
    row = _with_interval(name)
    top, bottom = _by_layer(row, columns, gradient_scale, scalars)
    return _INTERVALS[row.name](top, bottom, level)


def interval_across_layers(
    name: str,
    columns: Mapping[str, Array],
    sizes: Array,
    gradient_scale: Array | None = None,
    scalars: Mapping[str, Array] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """The interval of a statistic over a window, for the whole model.

    Args:
        name: as `interval`.
        columns: as `windowed`.
        sizes: as `across_layers`.
        gradient_scale: as `windowed`.
        scalars: as `windowed`.
        level: as `interval`.

    Returns:
        Both ends, as floats; otherwise as `interval`.

    Raises:
        ValueError: if the statistic has no interval.

    Example:
        >>> import numpy as np
        >>> columns = {"variance_trace": np.full((4, 2), 4.0), "grad_sq_norm": np.full((4, 2), 2.0)}
        >>> columns["grad_sq_norm"][:2, 0] = 1.0, 3.0
        >>> found = interval_across_layers("noise_scale", columns, np.array([10, 10]))
        >>> round(found.low, 2), round(found.high, 2)
        (1.51, 2.96)
    """
    row = _with_interval(name)
    top, bottom = _of_model(row, columns, sizes, gradient_scale, scalars)
    found = _INTERVALS[row.name](top, bottom, level)
    return Interval(float(found.low[0]), float(found.high[0]))


def _noise_scale_interval(trace: Array, signal: Array, level: float) -> Interval:
    return intervals.inverted(intervals.ratio_interval(signal, trace, level))


_INTERVALS: Mapping[str, Callable[[Array, Array, float], Interval]] = {
    "batch_snr": intervals.ratio_interval,
    "example_snr": intervals.ratio_interval,
    "noise_scale": _noise_scale_interval,
    "variance_ratio": intervals.variance_ratio_interval,
}


def _with_interval(name: str) -> Statistic:
    row = statistic(name)
    if not row.interval:
        raise ValueError(
            f"window.interval needs a statistic with an interval, one of {tuple(_INTERVALS)}, got name={name!r}; "
            "show it without one"
        )
    return row


def _by_layer(
    row: Statistic,
    columns: Mapping[str, Array],
    gradient_scale: Array | None,
    scalars: Mapping[str, Array] | None,
) -> list[Array]:
    """The terms that a statistic needs, in one unit: float64, shape ``(steps, layers)``."""
    factor = _optimizer_factor(row, gradient_scale)

    def part_of(name: str) -> Array:
        column = _ROWS.get(name)
        if column is None:
            return _scalar(name, scalars, next(iter(columns.values())))
        values = columns[name]
        xp = namespace(values)
        values = xp.astype(values, xp.float64)
        if factor is None or name in IN_OPTIMIZER_UNITS or not column.power:
            return values
        return values * factor ** (column.power / 2)

    return [math.prod(map(part_of, term.split("*"))) for term in _terms(row)]


def _of_model(
    row: Statistic,
    columns: Mapping[str, Array],
    sizes: Array,
    gradient_scale: Array | None,
    scalars: Mapping[str, Array] | None,
) -> list[Array]:
    """The same for the whole model, shape ``(steps, 1)``: added up over the layers that have all of them."""
    by_layer = _by_layer(row, columns, gradient_scale, scalars)
    xp = namespace(*by_layer)
    kinds = [_kind(term) for term in _terms(row)]
    present = functools.reduce(
        operator.and_,
        [
            xp.isfinite(values)
            for kind, values in zip(kinds, by_layer, strict=True)
            if kind not in ("example", "scalar")
        ],
        xp.asarray([[True]]),
    )
    nan = xp.asarray(float("nan"), dtype=xp.float64)
    terms = []
    for term, kind, values in zip(_terms(row), kinds, by_layer, strict=True):
        if kind in ("example", "scalar"):
            terms.append(_scalar(term, scalars, values))
            continue
        kept = xp.where(present, values, xp.zeros_like(values))
        if kind == "count":
            terms.append(xp.max(kept, axis=1, keepdims=True))
            continue
        weights = xp.where(present, sizes[None, :] if kind == "mean" else xp.ones_like(values), xp.zeros_like(values))
        summed = xp.sum(kept * weights, axis=1, keepdims=True)
        total = xp.sum(weights, axis=1, keepdims=True)
        summed = summed / xp.where(total > 0, total, nan) if kind == "mean" else xp.where(total > 0, summed, nan)
        terms.append(summed)
    return terms


def _terms(row: Statistic) -> tuple[str, ...]:
    return (row.name,) if row.travels else row.needs


def _kind(term: str) -> str:
    """How a term adds up over layers: as the sum or mean in it does, whatever it is multiplied by."""
    kinds = [_ROWS[part].kind if part in _ROWS else "scalar" for part in term.split("*")]
    return next((kind for kind in ("sum", "mean", "example", "count") if kind in kinds), "scalar")


def _optimizer_factor(row: Statistic, gradient_scale: Array | None) -> Array | None:
    """What brings measured squares into the optimizer's units, shape ``(steps, 1)``; None where nothing has to."""
    if gradient_scale is None or (not row.travels and IN_OPTIMIZER_UNITS.isdisjoint(row.columns)):
        return None
    xp = namespace(gradient_scale)
    return xp.where(xp.isfinite(gradient_scale), gradient_scale, xp.ones_like(gradient_scale))[:, None]


def _scalar(name: str, scalars: Mapping[str, Array] | None, like: Array) -> Array:
    """A number of the steps, shape ``(steps, 1)``; NaN where the steps have none."""
    xp = namespace(like)
    found = None if scalars is None else scalars.get(name)
    if found is None:
        return xp.full((like.shape[0], 1), float("nan"), dtype=xp.float64)
    return xp.astype(xp.asarray(found), xp.float64)[:, None]


def _formed(row: Statistic, terms: list[Array]) -> Array:
    """A statistic from its terms over the steps that have all of them; NaN where there is none."""
    xp = namespace(*terms)
    present = functools.reduce(operator.and_, [xp.isfinite(values) for values in terms])
    steps = xp.sum(xp.astype(present, xp.float64), axis=0)
    steps = xp.where(steps > 0, steps, xp.asarray(float("nan"), dtype=xp.float64))
    zero = xp.asarray(0.0, dtype=xp.float64)
    means = [xp.sum(xp.where(present, values, zero), axis=0) / steps for values in terms]
    if row.travels:
        return means[0]
    return divided(*means) if row.kind == "ratio" else FORMULAS[row.name](*means)
