"""Runs in memory: what arrives, shown at once to the page, to Prometheus and to subscribers.

One thread (the server's event loop) registers, appends and subscribes; any thread may read views.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.history import RunHistory
from gradiometer.server.view import RunView

__all__ = ["Live", "Subscription"]

Message = tuple[str, Run | StepBatch]


class Subscription:
    """Messages of one run, or of all, in the order they became durable. An async iterator.

    Holds at most ``limit`` messages: where its reader is slower than the job, the oldest go, and are counted.
    It ends when the server shuts down.

    Attributes:
        dropped: messages that the reader has missed.
    """

    def __init__(self, run_id: str | None, limit: int) -> None:
        self.run_id = run_id
        self.dropped = 0
        self._limit = limit
        self._waiting: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def offer(self, message: Message) -> None:
        """Hand over a message; never waits."""
        if self.run_id not in (None, message[0]):
            return
        if len(self._waiting) >= self._limit:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(message)
        self._changed.set()

    def close(self) -> None:
        """No more messages; what is waiting is still read."""
        self._closed = True
        self._changed.set()

    def skip(self) -> None:
        """Forget what is waiting, for a reader that has just looked at the run itself."""
        self._waiting.clear()

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Message:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()


class Live:
    """The recent runs, each with a window of its last measured steps.

    Args:
        window_steps: measured steps that ratios are formed over.
        max_runs: runs kept in memory; beyond, the one that has been silent longest goes (the store keeps it).
        clock: seconds since 1970.

    Example:
        >>> from gradiometer.protos.columns import pack_batch
        >>> from gradiometer.protos.run_pb2 import Layer
        >>> live = Live()
        >>> live.register(Run(run_id="mnist", layers=[Layer(name="dense", num_params=10)]))
        >>> for step, (noise, signal) in enumerate([([8.0], [-1.0]), ([4.0], [4.0])]):
        ...     columns = {"variance_trace": [noise], "grad_sq_norm": [signal]}
        ...     live.append("mnist", pack_batch([step], [step], 1, columns, {}))
        >>> live.view("mnist").model("noise_scale")
        4.0
    """

    def __init__(self, window_steps: int = 32, *, max_runs: int = 64, clock: Callable[[], float] = time.time) -> None:
        self.window_steps = window_steps
        self._max_runs = max_runs
        self._clock = clock
        self._runs: dict[str, RunHistory] = {}
        self._lock = threading.Lock()  # readers on other threads; held for the length of a dictionary look-up or a copy
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    def register(self, run: Run) -> None:
        """Show a run from now on, or take over what a second registration says of it."""
        with self._lock:
            known = self._runs.get(run.run_id)
            if known is None:
                known = self._runs[run.run_id] = RunHistory(run, self.window_steps)
                known.seen = run.started_unix_nanos / 1e9
                while len(self._runs) > self._max_runs:
                    others = (run_id for run_id in self._runs if run_id != run.run_id)
                    del self._runs[min(others, key=lambda run_id: self._runs[run_id].seen)]
            else:
                known.register(run)
        self._offer((run.run_id, run))

    def append(self, run_id: str, batch: StepBatch, *, recovered: bool = False) -> None:
        """Show a checked batch; a step that arrives again replaces what was there.

        A batch of a run that is not in memory reaches subscribers alone.

        Args:
            run_id: a registered run.
            batch: as it became durable.
            recovered: True where it is read back from the store, which is no sign of life: the run then counts
                as seen when the batch was measured.
        """
        with self._lock:
            known = self._runs.get(run_id)
            if known is not None:
                known.append(batch)
                measured = max(batch.unix_nanos, default=0) / 1e9
                known.seen = max(known.seen, measured if recovered else self._clock())
        if not recovered:
            self._offer((run_id, batch))

    def view(self, run_id: str) -> RunView | None:
        """The run as it is now, frozen; None where it is not in memory."""
        with self._lock:
            known = self._runs.get(run_id)
            return known.view() if known is not None else None

    def runs(self) -> list[RunView]:
        """All runs in memory, the one that was seen last first."""
        with self._lock:
            return sorted((known.view() for known in self._runs.values()), key=lambda view: -view.seen)

    def silent_seconds(self, view: RunView) -> float:
        """How long ago a run showed a sign of life."""
        return max(0.0, self._clock() - view.seen)

    def is_silent(self, view: RunView, after: float) -> bool:
        """True where a run was silent for so many seconds, or for four of its own steps if they are slower."""
        return self.silent_seconds(view) > max(after, 4 * view.step_seconds())

    @contextlib.asynccontextmanager
    async def subscribe(self, run_id: str | None = None, *, limit: int = 64) -> AsyncIterator[Subscription]:
        """Registrations and batches from now on: of one run, or of all (None, or the empty string).

        Args:
            run_id: the run; it need not be known yet.
            limit: messages kept for a slow reader.
        """
        subscription = Subscription(run_id or None, limit)
        self._subscriptions.add(subscription)
        if self._closed:
            subscription.close()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End all subscriptions, so that the streams that feed on them can end; views can still be read."""
        self._closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def _offer(self, message: Message) -> None:
        for subscription in self._subscriptions:
            subscription.offer(message)
