"""Prometheus reads the live runs: a collector over `Live` and the catalogue, nothing kept twice.

Three families of names, all from the catalogue: ``gradiometer_run_*`` for the whole model and for the scalars
of a step, ``gradiometer_layers_*`` for quantiles over the layers (label ``q``), and ``gradiometer_layer_*``
for single layers. Of a large model only the noisiest layers are exported, by a choice that does not flicker.
Where a statistic has a 95 % interval, its ends are gauges beside it, ``…_low`` and ``…_high`` before the unit: of the
whole model and of single layers. A number that does not exist is left out, never 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from gradiometer.server.live import Live
from gradiometer.server.view import RunView
from gradiometer.stats_core import catalog
from gradiometer.stats_core.rows import Statistic

__all__ = ["ExportSettings", "RunsCollector", "metric_names", "register_exporter"]

_RUN, _LAYERS, _LAYER = "gradiometer_run_", "gradiometer_layers_", "gradiometer_layer_"
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_STATISTICS = tuple(row for row in catalog.STATISTICS if row.metric is not None)
# A count is that of the batch, the same for every layer: a quantile over layers would say nothing.
_SPREAD = tuple(row for row in _STATISTICS if row.kind != "count")
_SCALARS = tuple(row for row in catalog.SCALARS if row.metric is not None)
_UNITS = ("_ratio", "_examples", "_steps")


def _ends(metric: str) -> tuple[str, str]:
    """Names of the two ends of a metric's interval: its own, with the unit still last."""
    unit = next((unit for unit in _UNITS if metric.endswith(unit)), "")
    return f"{metric.removesuffix(unit)}_low{unit}", f"{metric.removesuffix(unit)}_high{unit}"


_INTERVALS = {row.name: _ends(str(row.metric)) for row in _STATISTICS if row.interval}

# Of the run itself; neither a statistic nor a scalar of a step.
_OWN = {
    _RUN + "info": "The run, as registered; always 1",
    _RUN + "step": "Last measured step (optimizer steps)",
    _RUN + "steps_received": "Measured steps received by this server since it started (steps)",
    _RUN + "examples_per_second": "Examples trained on in a second, over the window (examples/second)",
    _RUN + "coverage_ratio": "Share of the trained parameters that is measured",
    _RUN + "last_data_timestamp_seconds": "When the run's last batch arrived (seconds since 1970)",
    _RUN + "noise_scale_resolved": "1 where the interval of the noise scale has an upper end, 0 where noise hides it",
}
_DROPPED = "gradiometer_exposition_dropped_series"


@dataclass(frozen=True)
class ExportSettings:
    """What of each run Prometheus gets to see.

    Attributes:
        all_layers_up_to: models of at most so many layers export every layer.
        top_layers: of larger models, so many layers are exported: those with examples that are not finite, then
            those of the lowest signal-to-noise ratio.
        all_layers: every layer of every model, up to ``max_series``.
        max_series: at most so many series of single layers, over all runs; what is left out is counted in
            ``gradiometer_exposition_dropped_series``.
        linger_seconds: a run without data for so long (or for four of its own steps, if they are slower) is not
            exported any more; Prometheus then ends its series.
    """

    all_layers_up_to: int = 64
    top_layers: int = 20
    all_layers: bool = False
    max_series: int = 50_000
    linger_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("all_layers_up_to", "top_layers", "max_series", "linger_seconds"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"ExportSettings needs {name} of at least 0, got {name}={value}; 0 exports none")


def metric_names() -> dict[str, str]:
    """Every name that is exported of runs, with its help text.

    Example:
        >>> metric_names()["gradiometer_layer_batch_snr_ratio"]
        'Signal-to-noise ratio of the batch gradient; 0 is pure noise (power ratio): |G|²/P'
        >>> metric_names()["gradiometer_run_noise_scale_low_examples"]
        'Whole model: Lower end of the 95 % interval: Gradient noise scale: noise over signal, in examples (examples)'
    """
    statistics = {row.metric: f"{row.help} ({row.unit}): {row.formula}" for row in _STATISTICS}
    for row in _STATISTICS:
        for end, metric in zip(("Lower", "Upper"), _INTERVALS.get(row.name, ()), strict=False):
            statistics[metric] = f"{end} end of the 95 % interval: {row.help} ({row.unit})"
    spread = {row.metric: f"Quantiles over layers: {row.help} ({row.unit})" for row in _SPREAD}
    return {
        **_OWN,
        **{f"{_RUN}{row.metric}": f"{row.help} ({row.unit})" for row in _SCALARS},
        **{f"{_RUN}{metric}": f"Whole model: {text}" for metric, text in statistics.items()},
        **{f"{_LAYERS}{metric}": text for metric, text in spread.items()},
        **{f"{_LAYER}{metric}": text for metric, text in statistics.items()},
        _DROPPED: "Series of single layers left out because of max_series (series)",
    }


class RunsCollector(Collector):
    """Renders the live runs at each scrape. Give it to one registry.

    Args:
        live: where the runs are.
        settings: what of them is exported.
    """

    def __init__(self, live: Live, settings: ExportSettings | None = None) -> None:
        self._live = live
        self._settings = settings or ExportSettings()
        self._chosen: dict[str, tuple[int, ...]] = {}

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: the names depend on no run, but a registry would otherwise collect to find them out."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The runs as they are now, one family after the other."""
        lingers = self._settings.linger_seconds
        views = [view for view in self._live.runs() if not self._live.is_silent(view, lingers)]
        chosen = {view.run.run_id: self._choose(view) for view in views}
        self._chosen = chosen
        room = self._settings.max_series
        families = _Families()
        dropped = 0
        for view in views:
            self._add_run(families, view)
            wanted = chosen[view.run.run_id]
            measured = [row for row in _STATISTICS if view.is_measured(row.name)]
            of_each = sum(1 + 2 * row.interval for row in measured)
            fitting = min(len(wanted), room // of_each) if of_each else 0
            room -= fitting * of_each
            dropped += (len(wanted) - fitting) * of_each
            _add_statistics(families, view, measured, wanted[:fitting])
        families.add(_DROPPED, (), (), dropped)
        yield from families.in_order()

    def _add_run(self, families: "_Families", view: RunView) -> None:
        run, world = view.run, view.run.world
        facts = {
            "framework": world.framework,
            "framework_version": world.framework_version,
            "engine": run.engine,
            "optimizer": run.optimizer,
            "temporal": run.temporal,
            "tier": run.tier,
            "unit": run.unit,
            "device": world.device,
            "host": world.host,
        }
        families.add(_RUN + "info", ("run", *facts), (run.run_id, *facts.values()), 1)

        def add(name: str, value: float | None) -> None:
            families.add(_RUN + name, ("run",), (run.run_id,), value)

        add("step", view.last_step)
        add("steps_received", view.received)
        add("examples_per_second", view.examples_per_second())
        covered, total = run.coverage.num_params_measured, run.coverage.num_params
        add("coverage_ratio", covered / total if total else None)
        add("last_data_timestamp_seconds", view.seen)
        for row in _SCALARS:
            scalar = view.scalar(row.name)
            add(str(row.metric), scalar.value if scalar else None)

    def _choose(self, view: RunView) -> tuple[int, ...]:
        """Which layers of a run are exported, in the order of the run.

        A layer that was exported stays until it has fallen ``top_layers`` places below a newcomer: series that
        come and go cost Prometheus more than they tell.
        """
        number, most = len(view.layer_names), self._settings.top_layers
        if self._settings.all_layers or number <= self._settings.all_layers_up_to:
            return tuple(range(number))
        snr = view.layers("batch_snr")
        broken = np.nan_to_num(view.layers("nonfinite_examples"))
        order = np.lexsort((np.where(np.isfinite(snr), snr, np.inf), -broken))
        handicap = np.empty(number)
        handicap[order] = np.arange(number)
        kept = list(self._chosen.get(view.run.run_id, ()))
        handicap[kept] -= most - 0.5
        return tuple(sorted(np.argsort(handicap, kind="stable")[:most].tolist()))


def register_exporter(live: Live, registry: CollectorRegistry, settings: ExportSettings | None = None) -> RunsCollector:
    """Let a registry export the live runs.

    Returns:
        The collector, for ``registry.unregister``.
    """
    collector = RunsCollector(live, settings)
    registry.register(collector)
    return collector


class _Families:
    """Samples gathered run by run, given out family by family as the exposition format wants them."""

    def __init__(self) -> None:
        self._help = metric_names()
        self._families: dict[str, GaugeMetricFamily] = {}

    def add(self, name: str, labels: tuple[str, ...], values: tuple[str, ...], number: float | None) -> None:
        """Add a sample, unless its number does not exist."""
        if number is not None:
            self.add_all(name, [dict(zip(labels, values, strict=True))], [number])

    def add_all(self, name: str, labels: Iterable[dict[str, str]], numbers: Sequence[float] | np.ndarray) -> None:
        """Add samples, one for each number that exists."""
        there = np.isfinite(numbers)
        if not there.any():
            return
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = GaugeMetricFamily(name, self._help[name])
        family.samples.extend(
            Sample(name, label, number)
            for label, number, exists in zip(labels, np.asarray(numbers).tolist(), there.tolist(), strict=True)
            if exists
        )

    def in_order(self) -> Iterable[GaugeMetricFamily]:
        """The families, each with all of its samples together."""
        return self._families.values()


def _add_statistics(families: _Families, view: RunView, measured: Sequence[Statistic], wanted: tuple[int, ...]) -> None:
    run_id, at = view.run.run_id, list(wanted)
    layers = [{"run": run_id, "layer": view.layer_names[index]} for index in wanted]
    quantiles = [{"run": run_id, "q": f"{q:g}"} for q in _QUANTILES]
    for row in measured:
        families.add(f"{_RUN}{row.metric}", ("run",), (run_id,), _resolved(row.name, view.model(row.name)))
        families.add_all(f"{_LAYER}{row.metric}", layers, _resolved(row.name, view.layers(row.name)[at]))
    for name, ends in ((row.name, _INTERVALS[row.name]) for row in measured if row.interval):
        of_layers, model = view.layers_interval(name, at), view.model_interval(name)
        for metric, number, numbers in zip(ends, model, of_layers, strict=True):
            families.add(f"{_RUN}{metric}", ("run",), (run_id,), number)
            families.add_all(f"{_LAYER}{metric}", layers, numbers)
        if name == "noise_scale" and not np.isnan(model.low):
            families.add(_RUN + "noise_scale_resolved", ("run",), (run_id,), float(model.is_resolved))
    spread = [row for row in measured if row.kind != "count"]
    for row, numbers in zip(spread, _quantiles(view, spread), strict=True):
        families.add_all(f"{_LAYERS}{row.metric}", quantiles, numbers)


def _resolved(name: str, values: Any) -> Any:
    """A noise scale below 0 says that the signal can't be told from 0: it has no number."""
    return np.where(np.asarray(values) <= 0, np.nan, values) if name == "noise_scale" else values


def _quantiles(view: RunView, rows: Sequence[Statistic]) -> np.ndarray:
    """Quantiles over the layers that have the number, shape ``(statistics, quantiles)``.

    A noise scale that is not resolved counts as the largest.
    """
    values = np.array([view.layers(row.name) for row in rows]).reshape(len(rows), -1)
    for place, row in enumerate(rows):
        if row.name == "noise_scale":
            values[place] = np.where(values[place] <= 0, np.inf, values[place])
    values.sort(axis=1)  # NaN comes last
    count = values.shape[1] - np.isnan(values).sum(axis=1)
    # Nearest rank, not interpolated: between a number and infinity lies nothing.
    ranks = np.rint(np.outer(np.maximum(count - 1, 0), _QUANTILES)).astype(int)
    found: np.ndarray = np.take_along_axis(values, ranks, axis=1)
    return found
