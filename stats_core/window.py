"""Ratios and means over a window of steps: how every reader forms the numbers that people look at.

Works on host arrays of shape ``(steps, layers)``, one a travelling column; the exporter, the live page,
the report and the command line all call `windowed`.
"""

from collections.abc import Mapping
from typing import Any

from gradiometer.stats_core.arrays import Array, namespace
from gradiometer.stats_core.catalog import IN_OPTIMIZER_UNITS, Statistic, statistic

__all__ = ["across_layers", "windowed"]


def windowed(name: str, columns: Mapping[str, Array], gradient_scale: Array | None = None) -> Array:
    r"""One statistic over a window of steps, for each layer.

    A ratio is the sum over steps of its numerator over the sum of its denominator, over the steps where
    both are finite; anything else is the mean over the steps where it is finite.

    Args:
        name: catalogue name.
        columns: travelling columns, shape ``(steps, layers)`` each; those that the statistic needs.
        gradient_scale: the scalar of that name, shape ``(steps,)``, where the temporal moments are the
            optimizer's own: measured sums are then shown in the optimizer's units, beside its own. None
            leaves them as measured. Ratios of two measured sums never change.

    Returns:
        Shape ``(layers,)``; NaN where no step has it, or a ratio's denominator is 0.

    Raises:
        ValueError: if the catalogue has no such statistic.
        KeyError: if a column that it needs is missing.

    Example:
        >>> import numpy as np
        >>> columns = {"variance_trace": np.array([[8.0], [4.0]]), "grad_sq_norm": np.array([[-1.0], [4.0]])}
        >>> windowed("noise_scale", columns)         # (8 + 4) / (-1 + 4), not the mean of -8 and 1
        array([4.])
    """
    row = statistic(name)
    if row.kind == "ratio":
        top, bottom = _finite_pair(*_needed(row, columns, gradient_scale))
        return _ratio(top, bottom)
    return _finite_mean(*_needed(row, columns, gradient_scale))


def _needed(row: Statistic, columns: Mapping[str, Array], gradient_scale: Array | None) -> list[Array]:
    """The columns that a statistic is made of, in one unit."""
    names = row.needs if row.kind == "ratio" else (row.name,)
    found = [columns[name] for name in names]
    measured_alone = row.kind == "ratio" and not IN_OPTIMIZER_UNITS & set(names)
    if gradient_scale is None or row.kind in ("mean", "count") or measured_alone:
        return found
    xp = namespace(gradient_scale)
    factor = xp.where(xp.isfinite(gradient_scale), gradient_scale, xp.ones_like(gradient_scale))[:, None]
    return [v if name in IN_OPTIMIZER_UNITS else v * factor for name, v in zip(names, found, strict=True)]


def across_layers(name: str, columns: Mapping[str, Array], sizes: Array, gradient_scale: Array | None = None) -> float:
    """The same for the whole model: sums are added over layers *before* a ratio is formed.

    Args:
        name: catalogue name.
        columns: as `windowed`.
        sizes: number of elements of each layer, shape ``(layers,)``.
        gradient_scale: as `windowed`.

    Returns:
        One number; NaN where it does not exist.

    Example:
        >>> import numpy as np
        >>> columns = {"variance_trace": np.array([[8.0, 1.0]]), "grad_sq_norm": np.array([[1.0, 2.0]])}
        >>> across_layers("noise_scale", columns, np.array([10, 10]))
        3.0
    """
    row: Statistic = statistic(name)
    if row.kind == "ratio":
        top, bottom = _finite_pair(*_needed(row, columns, gradient_scale))
        return float(_ratio(top.reshape(-1, 1), bottom.reshape(-1, 1))[0])
    layers = _finite_mean(*_needed(row, columns, gradient_scale))
    xp = namespace(layers)
    present = xp.isfinite(layers)
    if not bool(xp.any(present)):
        return float("nan")
    layers = layers[present]
    if row.kind == "mean":
        weights = sizes[present] / sizes[present].sum()
        return float((layers * weights).sum())
    return float(layers.max() if row.kind == "count" else layers.sum())


def _finite_pair(top: Array, bottom: Array) -> tuple[Array, Array]:
    xp = namespace(top, bottom)
    both = xp.isfinite(top) & xp.isfinite(bottom)
    nan = xp.asarray(float("nan"), dtype=xp.float64)
    return xp.where(both, xp.astype(top, xp.float64), nan), xp.where(both, xp.astype(bottom, xp.float64), nan)


def _sum_of_present(values: Array, xp: Any) -> tuple[Array, Array]:
    present = xp.isfinite(values)
    zero = xp.zeros_like(values)
    return xp.sum(xp.where(present, values, zero), axis=0), xp.sum(xp.astype(present, xp.float64), axis=0)


def _ratio(top: Array, bottom: Array) -> Array:
    xp = namespace(top, bottom)
    (upper, steps), (lower, _) = _sum_of_present(top, xp), _sum_of_present(bottom, xp)
    exists = (steps > 0) & (lower != 0)
    return xp.where(exists, upper / xp.where(exists, lower, xp.ones_like(lower)), xp.nan)


def _finite_mean(values: Array) -> Array:
    xp = namespace(values)
    summed, steps = _sum_of_present(xp.astype(values, xp.float64), xp)
    return xp.where(steps > 0, summed / xp.where(steps > 0, steps, xp.ones_like(steps)), xp.nan)
