"""One run in numbers, read from what is stored: what `gradiometer.server.report_text` puts into words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import column_arrays, scalar_arrays
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.server import distributions
from gradiometer.server.distributions import Distributions
from gradiometer.stats_core import catalog
from gradiometer.stats_core.errors import PeerFault
from gradiometer.stats_core.intervals import Interval
from gradiometer.stats_core.window import across_layers, interval, interval_across_layers, windowed

__all__ = ["Reader", "RunReport", "report"]

_COLUMNS = tuple(row.name for row in catalog.WIRE)


class Reader(Protocol):
    """What a report needs of a store, local or remote."""

    def list_runs(self) -> list[RunStatus]:
        """The runs, newest first."""
        ...

    def read(self, run_id: str, *, columns: Sequence[str] = (), limit: int | None = None) -> Iterable[StepBatch]:
        """The last steps of a run, ascending, in parts; what is named of each, or everything."""
        ...


@dataclass(frozen=True)
class RunReport:
    """One run in numbers.

    Attributes:
        status: the run as registered, and how far it is.
        steps: step numbers, shape ``(steps,)``.
        columns: catalogue name → values, shape ``(steps, layers)``.
        scalars: scalar name → values, shape ``(steps,)``; NaN where a step has none.
        sizes: elements of each layer, shape ``(layers,)``.
        distributions: histograms and single examples of the last of these steps.
    """

    status: RunStatus
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]
    sizes: np.ndarray
    distributions: Distributions = field(default_factory=lambda: Distributions(()))

    @classmethod
    def from_batches(cls, status: RunStatus, batches: Iterable[StepBatch]) -> "RunReport":
        """Put the parts together; columns that some parts lack are NaN there."""
        parts = [batch for batch in batches if batch.steps]
        num_layers = len(status.run.layers)

        def joined(arrays: Sequence[dict[str, np.ndarray]], width: tuple[int, ...]) -> dict[str, np.ndarray]:
            names = {name for part in arrays for name in part}
            return {
                name: np.concatenate(
                    [
                        part.get(name, np.full((len(batch.steps), *width), np.nan))
                        for part, batch in zip(arrays, parts, strict=True)
                    ]
                )
                for name in sorted(names)
            }

        columns = joined([column_arrays(batch) for batch in parts], (num_layers,))
        absent = np.full((sum(len(batch.steps) for batch in parts), num_layers), np.nan)
        return cls(
            status=status,
            steps=np.array([step for batch in parts for step in batch.steps], np.int64),
            columns={row.name: columns.get(row.name, absent) for row in catalog.WIRE},
            scalars=joined([scalar_arrays(batch) for batch in parts], ()),
            sizes=np.array([layer.num_params for layer in status.run.layers], np.float64),
        )

    def last(self, count: int) -> "RunReport":
        """The same run, its last ``count`` measured steps alone; its distributions stay."""
        return replace(
            self,
            steps=self.steps[-count:],
            columns={name: values[-count:] for name, values in self.columns.items()},
            scalars={name: values[-count:] for name, values in self.scalars.items()},
        )

    def layers(self, name: str) -> np.ndarray:
        """One statistic over all steps held here, shape ``(layers,)``: ratios are those of sums."""
        return np.asarray(windowed(name, self.columns, self._gradient_scale(), self.scalars))

    def model(self, name: str) -> float:
        """The same for the whole model."""
        return across_layers(name, self.columns, self.sizes, self._gradient_scale(), self.scalars)

    def layers_interval(self, name: str) -> Interval:
        """Its 95 % interval, shape ``(layers,)`` each end; NaN where there is none."""
        return interval(name, self.columns, self._gradient_scale(), self.scalars)

    def model_interval(self, name: str) -> Interval:
        """The same for the whole model."""
        return interval_across_layers(name, self.columns, self.sizes, self._gradient_scale(), self.scalars)

    def _gradient_scale(self) -> np.ndarray | None:
        return self.scalars.get("gradient_scale") if self.status.run.temporal == "optimizer" else None


def report(reader: Reader, run_id: str | None = None, *, window: int = 64) -> list[RunReport]:
    """Reports of one run, or of all that the store holds, newest first.

    Args:
        reader: the store.
        run_id: the run, or None for all.
        window: distributions and single examples are read of so many last steps.

    Raises:
        PeerFault: if there is no such run; the message lists those there are.
    """
    found = reader.list_runs()
    if run_id is not None and not found:
        raise PeerFault(
            f"report needs a stored run, got run={run_id!r} of a store that holds no runs yet; "
            "attach a training job with gm.attach(model, optimizer), or try `gradiometer demo`",
            status="NOT_FOUND",
        )
    if run_id is not None:
        known = [status.run.run_id for status in found]
        found = [status for status in found if status.run.run_id == run_id]
        if not found:
            raise PeerFault(
                f"report needs run in {known}, got run={run_id!r}; `gradiometer runs` lists them", status="NOT_FOUND"
            )
    return [
        replace(
            RunReport.from_batches(status, reader.read(status.run.run_id, columns=_COLUMNS)),
            distributions=Distributions(reader.read(status.run.run_id, columns=distributions.NAMES, limit=window)),
        )
        for status in found
    ]
