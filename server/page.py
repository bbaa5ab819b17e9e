"""What the page is told of a run, as JSON: the facts once, and the numbers at every update.

JSON has no NaN and no infinity: a number that does not exist is ``null``, and the page shows it as such.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from gradiometer.protos.run_pb2 import Coverage, Run
from gradiometer.server.view import COMPARED, Point, RunView
from gradiometer.stats_core import catalog

__all__ = ["COLUMNS", "READ", "SHOWN", "catalogue", "chart", "facts", "numbers", "rounded"]

SHOWN = (
    "variance_ratio",
    "consecutive_cosine",
    "batch_snr",
    "significant_share",
    "noise_scale",
    "effective_examples",
    "deviation_ratio",
    "maxva_beta",
    "nonfinite_examples",
)
"""Statistics of the layer table beside the three compared variances."""

READ = ("norm_median", "norm_p95", "norm_max")
"""Statistics of the chosen layer, or of the whole model, alone."""

_WITH_INTERVAL = tuple(name for name in SHOWN if catalog.statistic(name).interval)


def _columns_behind(name: str) -> set[str]:
    return set(catalog.statistic(name).columns)


COLUMNS = tuple(sorted({"count", *COMPARED}.union(*map(_columns_behind, (*SHOWN, *READ)))))
"""The travelling columns that all of this is made of."""

_MOST_ROWS = 1000
_MOST_UNCOVERED = 100
_DIGITS = 5


def rounded(values: np.ndarray | Iterable[float]) -> list[float | None]:
    """Numbers for JSON: five digits each, None where there is none.

    Example:
        >>> rounded([0.123456789, float("nan"), 0.0])
        [0.12346, None, 0.0]
    """
    array = np.asarray(values, np.float64)
    present = np.isfinite(array)
    return [float(f"{value:.{_DIGITS}g}") if known else None for value, known in zip(array, present, strict=True)]


def _number(value: float) -> float | None:
    return rounded([value])[0]


def catalogue() -> dict[str, Any]:
    """The catalogue's words, for the page's headings and explanations."""
    return {
        "statistics": {
            row.name: {"symbol": row.symbol, "unit": row.unit, "help": row.help, "formula": row.formula}
            for row in catalog.STATISTICS
        },
        "scalars": {row.name: {"unit": row.unit, "help": row.help} for row in catalog.SCALARS},
    }


def facts(run: Run) -> dict[str, Any]:
    """What a run is, as registered: nothing here changes from step to step."""
    world = run.world
    shown = run.layers[:_MOST_ROWS]
    return {
        "run": run.run_id,
        "started_unix_ms": run.started_unix_nanos // 1_000_000,
        "framework": world.framework,
        "framework_version": world.framework_version,
        "device": world.device,
        "host": world.host,
        "world_size": world.size,
        "engine": run.engine,
        "optimizer": run.optimizer,
        "temporal": run.temporal,
        "unit": run.unit,
        "tier": run.tier,
        "config": dict(sorted(run.config.items())),
        "num_layers": len(run.layers),
        "layers": {
            "name": [layer.name for layer in shown],
            "kind": [layer.kind for layer in shown],
            "num_params": [layer.num_params for layer in shown],
            "parameters": [list(layer.parameters) for layer in shown],
        },
    }


def numbers(view: RunView, *, layer: int | None = None) -> dict[str, Any]:
    """What a run measured, over the window that ends at its last step.

    Args:
        view: the run.
        layer: index of the layer that the chart shows; None for the whole model.

    Returns:
        ``model`` and ``table`` hold catalogue names with a number, or a list in the order of the layers. The three
        compared variances are in the same units. ``unresolved`` says for which layers (indices), and whether for the
        model, the noise scale's interval has no upper end. ``chosen`` is of the layer that the chart shows, or of the
        model: more statistics, and 95 % intervals where there are some; an end at infinity is null. ``point`` is the
        chart's newest point.
    """
    point = view.point()
    names = sorted({name for step in view.window for name in step.scalars})
    scalars = {name: found for name in names if (found := view.scalar(name)) is not None}
    return {
        "step": view.last_step,
        "window_steps": len(view.window),
        "received": view.received,
        "measured_unix_ms": view.window[-1].unix_nanos // 1_000_000 if view.window else None,
        "step_seconds": _number(view.step_seconds()),
        "examples": _number(view.model("count")),
        "examples_per_second": _number(view.examples_per_second()),
        "scalars": {name: {"value": _number(found.value), "step": found.step} for name, found in scalars.items()},
        "coverage": _coverage(view.run.coverage),
        "events": [{"step": event.step, "kind": event.kind, "text": event.text} for event in view.events],
        "model": {
            **{name: _number(view.compared_model(name)) for name in COMPARED},
            **{name: _number(view.model(name)) for name in SHOWN},
        },
        "table": {
            **{name: rounded(view.compared_layers(name)[:_MOST_ROWS]) for name in COMPARED},
            **{name: rounded(view.layers(name)[:_MOST_ROWS]) for name in SHOWN},
        },
        "unresolved": {
            "model": bool(np.isinf(view.model_interval("noise_scale").high)),
            "layers": np.flatnonzero(np.isinf(view.layers_interval("noise_scale").high[:_MOST_ROWS])).tolist(),
        },
        "chosen": _chosen(view, layer),
        "point": chart([point], layer) if point is not None else None,
    }


def _chosen(view: RunView, layer: int | None) -> dict[str, Any]:
    intervals = {}
    for name in _WITH_INTERVAL:
        found = view.model_interval(name) if layer is None else view.layers_interval(name, [layer])
        ends = [float(np.squeeze(end)) for end in found]
        if not np.isnan(ends).any():
            intervals[name] = rounded(ends)
    return {
        "intervals": intervals,
        **{name: _number(view.model(name) if layer is None else float(view.layers(name)[layer])) for name in READ},
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    return {
        "num_params": coverage.num_params,
        "num_params_measured": coverage.num_params_measured,
        "num_uncovered": len(coverage.uncovered),
        "uncovered": [
            {"parameter": item.parameter, "num_params": item.num_params, "reason": item.reason}
            for item in coverage.uncovered[:_MOST_UNCOVERED]
        ],
    }


def chart(points: Iterable[Point], layer: int | None = None) -> dict[str, Any]:
    """Points of the chart as columns: ``step`` and the three compared variances.

    Args:
        points: of one run.
        layer: index of a layer; None for the whole model.
    """
    points = list(points)
    return {
        "step": [point.step for point in points],
        **{
            name: rounded([(point.model[row] if layer is None else point.layers[row, layer]) for point in points])
            for row, name in enumerate(COMPARED)
        },
    }
