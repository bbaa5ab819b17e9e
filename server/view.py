"""One run at one moment, frozen: its last measured steps, and the numbers that people look at.

The exporter, the live page and its event stream all read a `RunView`; every ratio comes from
`gradiometer.stats_core.window`, formed over the whole window.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gradiometer.protos.batch_pb2 import Event
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.steps import MeasuredStep, Steps
from gradiometer.stats_core import catalog
from gradiometer.stats_core.intervals import Interval
from gradiometer.stats_core.rows import Kind, Statistic
from gradiometer.stats_core.window import across_layers, interval, interval_across_layers, windowed

__all__ = ["COMPARED", "Layers", "Point", "RunView", "Scalar"]

COMPARED = ("batch_variance", "step_variance", "temporal_variance")
"""The three variances of the batch gradient that the live comparison puts on one axis."""


_COLUMNS = {row.name: row for row in catalog.WIRE}


class Point(NamedTuple):
    """One point of the chart: the compared variances over the window that ended at a step.

    Attributes:
        step: the window's last step.
        model: the whole model's, in the order of `COMPARED`, shape ``(3,)``.
        layers: each layer's, shape ``(3, layers)``, float32.
    """

    step: int
    model: np.ndarray
    layers: np.ndarray


class Scalar(NamedTuple):
    """The latest known value of a scalar, and the step that it is of."""

    value: float
    step: int


class Layers(NamedTuple):
    """The layers of a run in the form that arithmetic wants, made once a run.

    Attributes:
        names: as registered.
        sizes: elements of each, shape ``(layers,)``, float64.
    """

    names: tuple[str, ...]
    sizes: np.ndarray

    @classmethod
    def of(cls, run: Run) -> "Layers":
        """The layers of a registered run."""
        return cls(
            tuple(layer.name for layer in run.layers),
            np.array([layer.num_params for layer in run.layers], np.float64),
        )


class RunView:
    """One run at one moment; never changes, so that any thread may read it.

    Args:
        run: as registered, with its latest coverage. The view takes it over: nobody may change it.
        layers: its layers.
        steps: the window, in ascending order of steps.
        points: the chart's history, in ascending order of steps.
        events: the latest events, in order of arrival.
        received: measured steps received so far.
        branch: how often the job has gone back to an earlier step.
        seen: when the run last showed a sign of life, seconds since 1970.
    """

    def __init__(
        self,
        run: Run,
        layers: Layers,
        steps: Sequence[MeasuredStep],
        *,
        points: Sequence[Point] = (),
        events: Sequence[Event] = (),
        received: int = 0,
        branch: int = 0,
        seen: float = 0.0,
    ) -> None:
        self.run = run
        self.window = tuple(steps)
        self.points = tuple(points)
        self.events = tuple(events)
        self.received = received
        self.branch = branch
        self.seen = seen
        self.layer_names = layers.names
        self.sizes = layers.sizes
        self._steps = Steps(self.window, len(layers.names))
        self._layers: dict[tuple[str, bool], np.ndarray] = {}
        self._models: dict[tuple[str, bool], float] = {}
        self._intervals: dict[tuple[str, tuple[int, ...]], Interval] = {}

    @property
    def last_step(self) -> int | None:
        """Number of the last measured step; None before the first."""
        return self.window[-1].step if self.window else None

    def is_measured(self, name: str) -> bool:
        """True where some step of the window has all that a statistic is formed of."""
        return self._is_measured(catalog.statistic(name))

    def layers(self, name: str) -> np.ndarray:
        """A statistic of each layer over the window, as it was measured.

        Args:
            name: catalogue name.

        Returns:
            Shape ``(layers,)``, in the catalogue's unit; NaN where it does not exist.
        """
        return self._over_window(name, compared=False)

    def model(self, name: str) -> float:
        """The same for the whole model; NaN where it does not exist."""
        return self._over_layers(name, compared=False)

    def layers_interval(self, name: str, layers: Sequence[int] | None = None) -> Interval:
        """The 95 % interval of a statistic over the window, for each layer.

        Args:
            name: catalogue name of a row whose ``interval`` is True.
            layers: indices of the layers wanted; None for all.

        Returns:
            Both ends, shape ``(layers,)``; NaN where there is none. A noise scale that is not resolved has no upper
            end: infinity.
        """
        wanted = range(len(self.layer_names)) if layers is None else layers
        found = self._with_model(name, tuple(wanted))
        return Interval(found.low[:-1], found.high[:-1])

    def model_interval(self, name: str) -> Interval:
        """The same for the whole model; both ends are floats."""
        known = next((found for (other, _), found in self._intervals.items() if other == name), None)
        found = known or self._with_model(name, ())
        return Interval(float(found.low[-1]), float(found.high[-1]))

    def compared_layers(self, name: str) -> np.ndarray:
        """One of `COMPARED` for each layer, all three in the same units, shape ``(layers,)``.

        Where the temporal moments are the optimizer's own, they are in the units of the gradient that the
        optimizer saw: the two measured variances are multiplied by each step's ``gradient_scale`` then.
        """
        return self._over_window(name, compared=True)

    def compared_model(self, name: str) -> float:
        """The same for the whole model."""
        return self._over_layers(name, compared=True)

    def point(self) -> Point | None:
        """The chart's point of the last step; None before the first."""
        if not self.window:
            return None
        with np.errstate(over="ignore"):  # beyond float32 the chart has no place for it either
            layers = np.stack([self.compared_layers(name) for name in COMPARED]).astype(np.float32)
        model = np.array([self.compared_model(name) for name in COMPARED])
        return Point(self.window[-1].step, model, layers)

    def scalar(self, name: str) -> Scalar | None:
        """The latest finite value of a scalar within the window; None where no step has one."""
        for measured in reversed(self.window):
            value = measured.scalars.get(name, float("nan"))
            if np.isfinite(value):
                return Scalar(float(value), measured.step)
        return None

    def step_seconds(self) -> float:
        """Typical time from one measured step to the next, over the window; 0 before two steps."""
        times = np.array([step.unix_nanos for step in self.window], np.float64)
        return float(np.median(np.diff(times))) / 1e9 if len(times) > 1 else 0.0

    def examples_per_second(self) -> float:
        """Examples that the job trains on in a second, over the window; NaN before two steps.

        Steps that were not measured count: the rate is that of the optimizer's step numbers.
        """
        if len(self.window) < 2:
            return float("nan")
        first, last = self.window[0], self.window[-1]
        seconds = (last.unix_nanos - first.unix_nanos) / 1e9
        examples = self.model("count")
        return (last.step - first.step) * examples / seconds if seconds > 0 else float("nan")

    def _over_window(self, name: str, *, compared: bool) -> np.ndarray:
        key = (name, compared)
        if key not in self._layers:
            self._layers[key] = self._formed(name, compared=compared)
        return self._layers[key]

    def _formed(self, name: str, *, compared: bool) -> np.ndarray:
        """Each layer's number; the model's is kept where it comes along."""
        row = catalog.statistic(name)
        if not self._is_measured(row):
            self._models[name, compared] = float("nan")
            return np.full(len(self.layer_names), np.nan)
        scale = self._gradient_scale(row, compared=compared)
        if scale is None and _is_of(row, "sum"):
            columns = self._steps.mean_and_model(row.columns)
            if columns is not None:
                found = np.asarray(windowed(name, columns))
                self._models[name, compared] = float(found[-1])
                return found[:-1]
        collapses = scale is None and _is_of(row, "mean", "sum", "count", "example")
        columns = self._steps.mean(row.columns) if collapses else self._of_steps(row)
        return np.asarray(windowed(name, columns, scale, self._scalars(row)))

    def _over_layers(self, name: str, *, compared: bool) -> float:
        key = (name, compared)
        if key in self._models:
            return self._models[key]
        row = catalog.statistic(name)
        layers = self._over_window(name, compared=compared)
        if key not in self._models:
            if row.travels and row.kind != "example":
                # First a mean over steps, which is at hand: as a window of one step.
                self._models[key] = across_layers(name, {name: layers[None, :]}, self.sizes)
            else:
                scale = self._gradient_scale(row, compared=compared)
                collapses = scale is None and _is_of(row, "sum", "mean")
                columns = self._steps.mean(row.columns) if collapses else self._of_steps(row)
                self._models[key] = across_layers(name, columns, self.sizes, scale, self._scalars(row))
        return self._models[key]

    def _with_model(self, name: str, layers: tuple[int, ...]) -> Interval:
        """The intervals of some layers, and that of the model at the end."""
        key = (name, layers)
        if key not in self._intervals:
            row = catalog.statistic(name)
            columns = self._steps.columns_and_model(row.columns, layers) if _is_of(row, "sum") else None
            if columns is not None:
                self._intervals[key] = interval(name, columns)
            else:
                columns = self._of_steps(row)
                some = interval(name, {need: values[:, list(layers)] for need, values in columns.items()})
                model = interval_across_layers(name, columns, self.sizes)
                ends = zip(some, model, strict=True)
                self._intervals[key] = Interval(*(np.append(of_layers, of_model) for of_layers, of_model in ends))
        return self._intervals[key]

    def _is_measured(self, row: Statistic) -> bool:
        return all(self._steps.has(need) for need in row.columns if need in _COLUMNS)

    def _of_steps(self, row: Statistic) -> dict[str, np.ndarray]:
        """The columns that a statistic needs, over the window."""
        return {need: self._steps.column(need) for need in row.columns if need in _COLUMNS}

    def _scalars(self, row: Statistic) -> dict[str, np.ndarray]:
        """The numbers of the steps that a statistic needs; of what is made of the examples', the whole model's."""
        return {
            need: self._steps.scalar(need)
            for need in row.columns
            if need not in _COLUMNS or _COLUMNS[need].kind == "example"
        }

    def _gradient_scale(self, row: Statistic, *, compared: bool) -> np.ndarray | None:
        """What brings measured sums into the optimizer's units; None where they are shown as measured."""
        if not self.window or self.run.temporal != "optimizer":
            return None
        if (row.travels and not compared) or (not row.travels and catalog.IN_OPTIMIZER_UNITS.isdisjoint(row.columns)):
            return None
        return self._steps.scalar("gradient_scale")


def _is_of(row: Statistic, *kinds: Kind) -> bool:
    """True where each term of a statistic is a column of one of the kinds: its mean over the steps is all it needs."""
    return all(
        need in _COLUMNS and _COLUMNS[need].kind in kinds for need in (row.columns if row.travels else row.needs)
    )
