"""What the server remembers of one run while it trains: a window of whole steps, and a bounded history for the chart.

The window feeds every ratio; the history holds one `Point` for every ``stride``-th measured step. When it
is full, every second point goes and the stride doubles, so that a run of any length keeps its whole shape
in the same memory.
"""

from collections import deque

from gradiometer.protos.batch_pb2 import Event, StepBatch
from gradiometer.protos.columns import column_arrays, scalar_arrays
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.steps import MeasuredStep
from gradiometer.server.view import COMPARED, Layers, Point, RunView

__all__ = ["HISTORY_BYTES", "RunHistory"]

HISTORY_BYTES = 4 << 20
_MOST_POINTS, _FEWEST_POINTS = 1024, 32
_KEPT_EVENTS = 20


class RunHistory:
    """The last steps of one run. Not thread-safe: one thread appends, and shares frozen views.

    Args:
        run: as registered; copied.
        window_steps: measured steps that ratios are formed over.
        history_bytes: memory for the chart's history, about.
    """

    def __init__(self, run: Run, window_steps: int = 32, *, history_bytes: int = HISTORY_BYTES) -> None:
        if window_steps < 1:
            raise ValueError(
                f"RunHistory needs window_steps of at least 1, got window_steps={window_steps}; 32 is the default"
            )
        self._run = Run()
        self._run.CopyFrom(run)
        self._layers = Layers.of(run)
        self._window: deque[MeasuredStep] = deque(maxlen=window_steps)
        self._points: list[Point] = []
        self._capacity = min(_MOST_POINTS, max(_FEWEST_POINTS, history_bytes // (4 * len(COMPARED) * len(run.layers))))
        self._stride = 1
        self._received = 0
        self._branch = 0
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._view: RunView | None = None
        self.seen = 0.0

    def register(self, run: Run) -> None:
        """Take over what a second registration of the same layers says: its coverage, its optimizer, its versions."""
        self._run = Run()
        self._run.CopyFrom(run)
        self._view = None

    def append(self, batch: StepBatch) -> None:
        """Take in a checked batch.

        A step that is there already is replaced. A step before the last one that was measured *after* it
        means that the job went back, as after a restart from a checkpoint: what was ahead of it is dropped.
        One that was measured earlier is a late arrival, and goes to its place if the window still holds it.
        """
        columns, scalars = column_arrays(batch), scalar_arrays(batch)
        for place, step in enumerate(batch.steps):
            # Copies, so that a row of the window does not keep the whole message in memory.
            row = MeasuredStep(
                step,
                batch.unix_nanos[place],
                {name: values[place].copy() for name, values in columns.items()},
                {name: float(values[place]) for name, values in scalars.items()},
            )
            if self._take(row):
                if self._received % self._stride == 0:
                    self._remember()
                self._received += 1
        self._events.extend(batch.events)
        if batch.HasField("coverage"):
            run = Run()
            run.CopyFrom(self._run)
            run.coverage.CopyFrom(batch.coverage)
            self._run = run
        self._view = None

    def view(self) -> RunView:
        """The run as it is now; the same object until something changes."""
        if self._view is None:
            self._view = self._frozen()
        return self._view

    def _frozen(self) -> RunView:
        return RunView(
            self._run,
            self._layers,
            self._window,
            points=self._points,
            events=self._events,
            received=self._received,
            branch=self._branch,
            seen=self.seen,
        )

    def _take(self, row: MeasuredStep) -> bool:
        """Put a step into the window; True where it is the newest there."""
        window = self._window
        if window and row.step <= window[-1].step and row.unix_nanos > window[-1].unix_nanos:
            self._branch += 1
            while window and window[-1].step >= row.step:
                window.pop()
            while self._points and self._points[-1].step >= row.step:
                self._points.pop()
        if not window or row.step > window[-1].step:
            window.append(row)
            return True
        kept = {known.step: known for known in window}
        if row.step in kept or row.step > window[0].step or len(window) < (window.maxlen or 0):
            kept[row.step] = row
            ordered = sorted(kept.values())[-(window.maxlen or 0) :]
            window.clear()
            window.extend(ordered)
        return False

    def _remember(self) -> None:
        point = RunView(self._run, self._layers, self._window).point()
        assert point is not None, "a step was just taken in"
        self._points.append(point)
        if len(self._points) > self._capacity:
            self._points = self._points[::2]
            self._stride *= 2
