"""One run at one moment, frozen: its last measured steps, and the numbers that people look at.

The exporter, the live page and its event stream all read a `RunView`; every ratio comes from
`gradiometer.stats_core.window`, formed over the whole window.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gradiometer.protos.batch_pb2 import Event
from gradiometer.protos.run_pb2 import Run
from gradiometer.stats_core import catalog
from gradiometer.stats_core.window import across_layers, windowed

__all__ = ["COMPARED", "Layers", "MeasuredStep", "Point", "RunView", "Scalar"]

COMPARED = ("batch_variance", "step_variance", "temporal_variance")
"""The three variances of the batch gradient that the live comparison puts on one axis."""


class MeasuredStep(NamedTuple):
    """One measured step as it arrived.

    Attributes:
        step: its number. Unit: optimizer steps.
        unix_nanos: when it was measured.
        columns: catalogue name → values, shape ``(layers,)``.
        scalars: scalar name → value; NaN where the step has none.
    """

    step: int
    unix_nanos: int
    columns: Mapping[str, np.ndarray]
    scalars: Mapping[str, float]


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
        self._columns: dict[str, np.ndarray] = {}
        self._layers: dict[tuple[str, bool], np.ndarray] = {}

    @property
    def last_step(self) -> int | None:
        """Number of the last measured step; None before the first."""
        return self.window[-1].step if self.window else None

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
        found = self._layers.get(key)
        if found is None:
            found = np.asarray(windowed(name, self._needed(name), self._gradient_scale(name, compared=compared)))
            self._layers[key] = found
        return found

    def _over_layers(self, name: str, *, compared: bool) -> float:
        if not catalog.statistic(name).travels:
            scale = self._gradient_scale(name, compared=compared)
            return across_layers(name, self._needed(name), self.sizes, scale)
        # Anything else is first a mean over steps, which is at hand: as a window of one step.
        return across_layers(name, {name: self._over_window(name, compared=compared)[None, :]}, self.sizes)

    def _needed(self, name: str) -> dict[str, np.ndarray]:
        return {need: self._column(need) for need in catalog.statistic(name).columns}

    def _gradient_scale(self, name: str, *, compared: bool) -> np.ndarray | None:
        """What brings measured sums into the optimizer's units; None where they are shown as measured."""
        wanted = compared or not catalog.statistic(name).travels
        if not wanted or not self.window or self.run.temporal != "optimizer":
            return None
        return np.array([step.scalars.get("gradient_scale", np.nan) for step in self.window])

    def _column(self, name: str) -> np.ndarray:
        """A travelling column over the window, shape ``(steps, layers)``; NaN where a step lacks it."""
        found = self._columns.get(name)
        if found is None:
            found = np.full((max(1, len(self.window)), len(self.layer_names)), np.nan, np.float32)
            for place, step in enumerate(self.window):
                values = step.columns.get(name)
                if values is not None:
                    found[place] = values
            self._columns[name] = found
        return found
