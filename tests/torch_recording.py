"""A publisher that keeps what it is handed, for tests of the PyTorch collector."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from gradiometer.collectors import torch_reporter
from gradiometer.protos.run_pb2 import Run
from gradiometer.stats_core import selection
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import Sketch


class Recorder:
    """Stands in for `Publisher`: steps by number, columns by name."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.steps: dict[int, dict[str, np.ndarray]] = {}
        self.scalars: dict[int, dict[str, float]] = {}
        self.sketches: dict[int, dict[str, Sketch]] = {}
        self.outliers: dict[int, tuple[Outliers | None, Sequence[Any] | None]] = {}
        self.events: list[tuple[str, str]] = []
        self.closed = 0
        self.dropped = 0
        self.run_id = ""

    def open(self, run: Run, endpoint: str | None) -> "Recorder":
        self.run = Run.FromString(run.SerializeToString())
        self.run_id = run.run_id
        return self

    def record_rows(
        self,
        step: int,
        rows: np.ndarray,
        scalars: Mapping[str, float],
        unix_nanos: int,
        *,
        sketches: Mapping[str, Sketch],
        outliers: Outliers | None,
        ids: Sequence[Any] | None,
    ) -> None:
        assert self.run is not None
        names = selection.columns(self.run.tier)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        assert rows.shape == (len(names), len(self.run.layers))
        assert unix_nanos > 0
        assert step not in self.steps
        self.steps[step] = dict(zip(names, rows.copy(), strict=True))
        self.scalars[step] = dict(scalars)
        self.sketches[step] = dict(sketches)
        self.outliers[step] = (outliers, ids)

    def event(self, kind: str, text: str = "") -> None:
        self.events.append((kind, text))

    def close(self, timeout: float = 2) -> None:
        self.closed += 1

    def layer(self, name: str) -> int:
        """Index of a layer in the columns."""
        assert self.run is not None
        return [layer.name for layer in self.run.layers].index(name)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What the collectors of a test publish."""
    kept = Recorder()
    monkeypatch.setattr(torch_reporter, "Publisher", kept)
    return kept
