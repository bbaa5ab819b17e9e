"""The measured steps of a window as arrays, each made when it is first asked for.

`gradiometer.stats_core.window` forms every number from columns of shape ``(steps, layers)``. Of a large model that is
much to go through for each of many numbers, and nearly always needless: where a column is there for whole steps or not
at all, a window of one step that holds the mean of those steps has the same sums, and one more layer that holds the
sums over all of them stands for the whole model.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["MeasuredStep", "Steps"]


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


class _Whole(NamedTuple):
    """A column that each step has for all layers or for none.

    Attributes:
        present: which steps have it, as bytes, to compare.
        mean: over those steps, shape ``(1, layers + 1)``; the last is the sum over layers.
        total: over the layers, shape ``(steps, 1)``; NaN where a step lacks it.
    """

    present: bytes
    mean: np.ndarray
    total: np.ndarray


class Steps:
    """The window, never changed.

    Args:
        steps: in ascending order.
        num_layers: of the run.

    Example:
        >>> import numpy as np
        >>> steps = [MeasuredStep(at, 0, {"batch_variance": np.array([at, 4.0])}, {"loss": 0.5}) for at in range(3)]
        >>> window = Steps(steps, num_layers=2)
        >>> window.column("batch_variance")[:, 0], window.mean(["batch_variance"])["batch_variance"]
        (array([0., 1., 2.]), array([[1., 4.]]))
        >>> window.scalar("loss"), window.has("step_variance")
        (array([0.5, 0.5, 0.5]), False)
    """

    def __init__(self, steps: Sequence[MeasuredStep], num_layers: int) -> None:
        self._steps = steps
        self._num_layers = num_layers
        self._names = {name for step in steps for name in step.columns}
        self._columns: dict[str, np.ndarray] = {}
        self._wholes: dict[str, _Whole | None] = {}

    def has(self, name: str) -> bool:
        """True where some step has the column."""
        return name in self._names

    def column(self, name: str) -> np.ndarray:
        """A travelling column, shape ``(steps, layers)``, one step at least; NaN where a step lacks it."""
        found = self._columns.get(name)
        if found is None:
            absent = np.full(self._num_layers, np.nan, np.float32)
            rows = [step.columns.get(name, absent) for step in self._steps] or [absent]
            found = self._columns[name] = np.concatenate(rows).astype(np.float64).reshape(len(rows), -1)
        return found

    def scalar(self, name: str) -> np.ndarray:
        """A number of each step, shape ``(steps,)``, one step at least; NaN where a step has none."""
        return np.array([step.scalars.get(name, np.nan) for step in self._steps] or [np.nan])

    def mean(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns as a window of one step with the same sums; as they are where there is no such window."""
        wholes = self._alike(names)
        if wholes is None:
            return {name: self.column(name) for name in names}
        return {name: whole.mean[:, :-1] for name, whole in wholes.items()}

    def mean_and_model(self, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The same with the model as one more layer at the end, shape ``(1, layers + 1)``; None where there is none."""
        wholes = self._alike(names)
        return None if wholes is None else {name: whole.mean for name, whole in wholes.items()}

    def columns_and_model(self, names: Sequence[str], layers: Sequence[int]) -> dict[str, np.ndarray] | None:
        """Columns of some layers and, at the end, of the model, shape ``(steps, layers + 1)``; None as before."""
        wholes = self._alike(names)
        if wholes is None:
            return None
        return {
            name: np.concatenate([self.column(name)[:, list(layers)], whole.total], axis=1)
            for name, whole in wholes.items()
        }

    def _alike(self, names: Sequence[str]) -> dict[str, _Whole] | None:
        """The columns where they are there in the same steps, for all layers; else None."""
        found = {name: whole for name in names if (whole := self._whole(name)) is not None}
        return found if len(found) == len(names) and len({whole.present for whole in found.values()}) == 1 else None

    def _whole(self, name: str) -> _Whole | None:
        if name not in self._wholes:
            values = self.column(name)
            finite = np.isfinite(values)
            present = finite.all(axis=1)
            self._wholes[name] = None
            if present.all() or (present.any() and np.array_equal(present, finite.any(axis=1))):
                values = values if present.all() else values[present]
                total = np.full((len(present), 1), np.nan)
                total[present, 0] = values.sum(axis=1)
                mean = values.mean(axis=0)
                mean = np.append(mean, mean.sum())[None, :]
                self._wholes[name] = _Whole(present.tobytes(), mean, total)
        return self._wholes[name]
