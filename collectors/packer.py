"""From slots to encoded batches: the work that the training thread is spared.

Here device arrays are waited for, names are checked, and several steps become one message of columns.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.slots import Measurement, Slots
from gradiometer.protos.batch_pb2 import Event, StepBatch
from gradiometer.protos.checks import LARGEST_STEP, check_batch
from gradiometer.protos.columns import pack_batch
from gradiometer.stats_core.errors import PeerFault

__all__ = ["MAX_BATCH_BYTES", "Packer"]

_log = logging.getLogger("gradiometer")

MAX_BATCH_BYTES = 7 << 19  # 3.5 MiB: servers take 4 MiB at least, and scalars come on top
_MOST_STEPS = 256
_TICK = 0.1  # seconds
_MOST_EVENTS = 1000
_MOST_EVENT_TEXT = 4096


class Packer:
    """Cuts batches from slots into an outbox, several times a second, in a thread of its own.

    Args:
        slots: where measurements come from.
        outbox: where batches go.
        names: catalogue names of a measurement's rows, in order.
        num_layers: layers of each.

    Attributes:
        dropped: measurements that could not be encoded, or came after publishing had ended.
    """

    def __init__(self, slots: Slots, outbox: Outbox, names: Sequence[str], num_layers: int) -> None:
        self.dropped = 0
        self._refused = False
        self._slots = slots
        self._outbox = outbox
        self._names = tuple(names)
        self._num_layers = num_layers
        self._most_steps = max(1, min(_MOST_STEPS, MAX_BATCH_BYTES // (len(self._names) * num_layers * 4)))
        self._events: deque[tuple[Any, int, str, str]] = deque(maxlen=_MOST_EVENTS)
        self._complaints: deque[str] = deque(maxlen=16)
        self._complained: set[str] = set()
        self._good_names: set[str] = set()
        self._last: tuple[int, int] | None = None  # step and drops of the last measurement that was packed
        self._wake = slots.pressure
        self._deadline: float | None = None  # until which what is left is packed
        self._thread = threading.Thread(target=self._work, name="gradiometer-packer", daemon=True)

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def finish(self, timeout: float) -> None:
        """Pack what is left, as long as there is time and room; then stop."""
        self._deadline = time.monotonic() + timeout
        self._wake.set()
        self._thread.join(timeout + _TICK)

    def refuse(self) -> None:
        """From now on drop and count: nobody will take the measurements."""
        self._refused = True

    def complain(self, text: str) -> None:
        """Have a line logged, once, from a thread that may wait for it."""
        self._complaints.append(text)

    def event(self, step: Any, unix_nanos: int, kind: str, text: str) -> None:
        """Send an event with the next batch. Of very many, the last ones are kept."""
        self._events.append((step, unix_nanos, kind, text))

    def pack(self) -> None:
        """Empty the slots, as far as the outbox has room."""
        while self._complaints:
            text = self._complaints.popleft()
            if text not in self._complained:
                self._complained.add(text)
                _log.warning("%s", text)
        if self._refused:
            self._discard(len(self._slots))
            self._events.clear()
        while (self._slots or self._events) and self._outbox.has_room():
            taken = self._take()
            try:
                batch = self._batch(taken)
            finally:
                for measurement in taken:
                    self._slots.release(measurement)
            if batch is not None:
                self._add(batch)
        if self._slots.dropped:
            self.complain(
                "measurements are dropped, since they come faster than they can be sent or spooled; "
                "the number is published as dropped_steps"
            )

    def _work(self) -> None:
        while True:
            deadline = self._deadline
            try:
                self.pack()
            except Exception:  # noqa: BLE001 - nothing of this thread may reach the user's job
                _log.exception("measurements were dropped in a way they should not have been")
            if deadline is None:
                self._wake.wait(_TICK)
                self._wake.clear()
            elif len(self._slots) == 0 or time.monotonic() > deadline:
                self._discard(len(self._slots))
                return
            else:
                self._outbox.wait(_TICK / 4)  # for room

    def _add(self, batch: StepBatch) -> None:
        try:
            check_batch(batch, self._num_layers)
        except PeerFault as fault:  # the server would refuse the run for it
            self.dropped += len(batch.steps)
            self.complain(f"a batch was dropped: {fault}")
            return
        self._outbox.append(batch.SerializeToString(deterministic=True))

    def _discard(self, count: int) -> None:
        for _ in range(count):
            measurement = self._slots.take()
            if measurement is not None:
                self._slots.release(measurement)
                self.dropped += 1

    def _take(self) -> list[Measurement]:
        """Measurements for one batch; the copies of what is still on a device are begun."""
        taken: list[Measurement] = []
        while len(taken) < self._most_steps and (measurement := self._slots.take()) is not None:
            taken.append(measurement)
            arrays = [measurement.examples, *(measurement.columns or {}).values(), *measurement.scalars.values()]
            for array in arrays:
                if hasattr(array, "copy_to_host_async"):
                    array.copy_to_host_async()
        return taken

    def _batch(self, taken: list[Measurement]) -> StepBatch | None:
        """A batch of ascending steps, or None where nothing is in it. What has no place in it is put back."""
        block = np.full((len(taken), len(self._names), self._num_layers), np.nan, np.float32)
        present: set[str] = set()
        steps: list[int] = []
        nanos: list[int] = []
        scalars: list[dict[str, float]] = []
        for place, measurement in enumerate(taken):
            step = self._step(measurement)
            if step is not None and steps and step <= steps[-1]:
                # Trained on from an earlier checkpoint: a batch of its own.
                while len(taken) > place:
                    self._slots.put_back(taken.pop())
                break
            try:
                names = self._fill(block[len(steps)], measurement) if step is not None else ()
            except Exception as error:  # noqa: BLE001 - a deleted buffer, another shape, what not
                self.dropped += 1
                self.complain(f"a measurement was dropped: {(str(error) or repr(error)).splitlines()[0]}")
                continue
            if step is None or not names:
                continue
            scalars.append(self._scalars(measurement, step))
            steps.append(step)
            nanos.append(measurement.unix_nanos)
            present.update(names)
            self._last = (step, measurement.dropped)
        events = self._take_events()
        if not steps and not events:
            return None
        names_of_scalars = sorted({name for row in scalars for name in row})
        batch = pack_batch(
            steps,
            nanos,
            self._num_layers,
            {name: block[: len(steps), at] for at, name in enumerate(self._names) if name in present},
            {name: np.array([row.get(name, math.nan) for row in scalars]) for name in names_of_scalars},
        )
        batch.events.extend(events)
        return batch

    def _step(self, measurement: Measurement) -> int | None:
        try:
            step = int(measurement.step)
        except (TypeError, ValueError):
            step = -1
        if 0 <= step <= LARGEST_STEP:
            return step
        self.dropped += 1
        self.complain(
            f"record needs step as a number from 0, got step={measurement.step!r}; the measurement was dropped"
        )
        return None

    def _fill(self, row: np.ndarray, measurement: Measurement) -> Sequence[str]:
        """Copy a measurement's numbers; the names that it has, none where it was not measured."""
        if measurement.columns is None:
            row[:] = self._slots.rows(measurement)
            return self._names
        if float(np.asarray(measurement.examples)) == 0:
            return ()
        for name, values in measurement.columns.items():
            if name in self._names:
                array = np.asarray(values)
                if array.shape != (self._num_layers,):
                    raise ValueError(
                        f"record needs columns of shape {(self._num_layers,)}, got {name} of shape={array.shape}; "
                        "give the publisher the params that the summary is of"
                    )
                row[self._names.index(name)] = array
            else:
                self.complain(f"record needs columns of the catalogue's tier, got column={name!r}; it is left out")
        return [name for name in self._names if name in measurement.columns]

    def _scalars(self, measurement: Measurement, step: int) -> dict[str, float]:
        found = {"dropped_steps": float(measurement.dropped + self.dropped)}
        if measurement.examples is not None:
            found["examples"] = float(np.asarray(measurement.examples))
            # Where steps were dropped in between, the clock of the temporal moments is not known here.
            if self._last and self._last[1] == measurement.dropped and step > self._last[0]:
                found["clock_steps"] = float(step - self._last[0])
        for name, value in measurement.scalars.items():
            if value is None or not self._is_good_name(name):
                continue
            try:
                found[name] = float(value)
            except (TypeError, ValueError, RuntimeError):
                self.complain(f"record needs scalars that are numbers, got {name}={value!r}; it is left out")
        return found

    def _is_good_name(self, name: str) -> bool:
        if name not in self._good_names:
            probe = StepBatch(steps=[0], unix_nanos=[0], num_layers=self._num_layers, scalars={name: bytes(8)})
            try:
                check_batch(probe, self._num_layers)
            except PeerFault as fault:
                self.complain(str(fault).replace("Publish needs", "record needs", 1))
                return False
            self._good_names.add(name)
        return True

    def _take_events(self) -> list[Event]:
        events = []
        while self._events:
            step, unix_nanos, kind, text = self._events.popleft()
            try:
                at = max(0, int(step))
                events.append(Event(step=at, unix_nanos=unix_nanos, kind=kind[:128], text=text[:_MOST_EVENT_TEXT]))
            except (TypeError, ValueError) as error:
                self.complain(f"event needs kind and text as strings, got kind={kind!r} ({error}); it is left out")
        return events
