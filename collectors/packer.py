"""From slots to encoded batches: the work that the training thread is spared.

Here device arrays are waited for, names are checked, and several steps become one message of columns.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.slots import Measurement, Slots
from gradiometer.protos.batch_pb2 import Event, Histogram, StepBatch, TopExample
from gradiometer.protos.checks import LARGEST_STEP, check_batch
from gradiometer.protos.columns import COLUMN_DTYPE, UNIT_EXPONENT, pack_batch
from gradiometer.protos.distributions import pack_examples, pack_histograms
from gradiometer.stats_core.catalog import STATISTICS
from gradiometer.stats_core.errors import PeerFault

__all__ = ["MAX_BATCH_BYTES", "MAX_STEP_BYTES", "Packer"]

_log = logging.getLogger("gradiometer")

MAX_BATCH_BYTES = 7 << 19  # 3.5 MiB: servers take 4 MiB at least, and scalars come on top
MAX_STEP_BYTES = 7 << 20  # servers take messages of 8 MiB, and a step is never split
_MOST_STEPS = 256
_TICK = 0.1  # seconds
_MOST_EVENTS = 1000
_MOST_EVENT_TEXT = 4096
_HISTOGRAMS = tuple(row.name for row in STATISTICS if row.kind == "histogram")
# Scalars that the collector forms on the device, in the unit of the step's columns.
_POWERS = {row.name: row.power for row in STATISTICS if row.kind == "example" and row.power}


class _Step(NamedTuple):
    """A step made ready to travel, but for its columns."""

    step: int
    unix_nanos: int
    names: Sequence[str]
    scalars: dict[str, float]
    histograms: list[Histogram]
    examples: list[TopExample]
    size: int


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
        self._row_bytes = len(self._names) * num_layers * COLUMN_DTYPE.itemsize
        self._most_steps = max(1, min(_MOST_STEPS, MAX_BATCH_BYTES // self._row_bytes))
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
            for array in _arrays(measurement):
                if hasattr(array, "copy_to_host_async"):
                    array.copy_to_host_async()
        return taken

    def _batch(self, taken: list[Measurement]) -> StepBatch | None:
        """A batch of ascending steps, or None where nothing is in it. What has no place in it is put back."""
        block = np.full((len(taken), len(self._names), self._num_layers), np.nan, np.float32)
        present: set[str] = set()
        steps: list[_Step] = []
        size = 0
        for place, measurement in enumerate(taken):
            step = self._read(measurement, block[len(steps)], len(steps))
            if step is None:
                continue
            # Trained on from an earlier checkpoint, or full of histograms: a batch of its own.
            if steps and (step.step <= steps[-1].step or size + step.size > MAX_BATCH_BYTES):
                while len(taken) > place:
                    self._slots.put_back(taken.pop())
                break
            steps.append(step)
            size += step.size
            self._last = (step.step, measurement.dropped)
        events = self._take_events()
        if not steps and not events:
            return None
        present = {name for step in steps for name in step.names}
        names_of_scalars = sorted({name for step in steps for name in step.scalars})
        batch = pack_batch(
            [step.step for step in steps],
            [step.unix_nanos for step in steps],
            self._num_layers,
            {name: block[: len(steps), at] for at, name in enumerate(self._names) if name in present},
            {name: np.array([step.scalars.get(name, math.nan) for step in steps]) for name in names_of_scalars},
        )
        batch.histograms.extend(histogram for step in steps for histogram in step.histograms)
        batch.examples.extend(example for step in steps for example in step.examples)
        batch.events.extend(events)
        return batch

    def _read(self, measurement: Measurement, row: np.ndarray, index: int) -> _Step | None:
        """A measurement as a step of a batch, its columns copied into ``row``; None where there is nothing to send."""
        number = self._step(measurement)
        if number is None:
            return None
        try:
            names = self._fill(row, measurement)
            if not names:
                return None
            scalars = self._scalars(measurement, number)
            exponent = int(scalars.get(UNIT_EXPONENT, 0))
            histograms = self._histograms(measurement, index, exponent)
            examples = self._examples(measurement, index, exponent)
        except Exception as error:  # noqa: BLE001 - a deleted buffer, another shape, what not
            row[:] = np.nan
            self.dropped += 1
            self.complain(f"a measurement was dropped: {_line(error)}")
            return None
        size = self._row_bytes + _bytes(histograms) + _bytes(examples)
        return _Step(number, measurement.unix_nanos, names, scalars, histograms, examples, size)

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
        exponent = found.get(UNIT_EXPONENT, 0.0)
        if not math.isfinite(exponent) or not exponent:  # as nearly always: the unit is 1
            found.pop(UNIT_EXPONENT, None)
        else:
            found |= {name: _scaled(found[name], exponent * power) for name, power in _POWERS.items() if name in found}
        return found

    def _histograms(self, measurement: Measurement, index: int, exponent: int) -> list[Histogram]:
        """Those of a step's sketches that can be read, as long as there is room; one that is cut would lie."""
        found: list[Histogram] = []
        room = MAX_STEP_BYTES - self._row_bytes
        for name, sketch in (measurement.sketches or {}).items():
            try:
                if name not in _HISTOGRAMS or len(sketch.first) != self._num_layers:
                    raise ValueError(
                        f"record needs sketches of {_HISTOGRAMS} for {self._num_layers} layers, "
                        f"got sketch={name!r} for layers={len(sketch.first)}"
                    )
                packed = pack_histograms(name, sketch, index, exponent)
                size = _bytes(packed)
                if size > room:
                    raise ValueError(
                        f"record needs steps of at most {MAX_STEP_BYTES} bytes, got more with the histograms of "
                        f"{name!r} for layers={self._num_layers}; measure fewer layers or fewer distributions"
                    )
            except Exception as error:  # noqa: BLE001 - the step's numbers are worth more than its distributions
                self.complain(f"histograms were left out: {_line(error)}")
                continue
            found += packed
            room -= size
        return found

    def _examples(self, measurement: Measurement, index: int, exponent: int) -> list[TopExample]:
        if measurement.outliers is None:
            return []
        try:
            return pack_examples(measurement.outliers, index, measurement.ids, exponent)
        except Exception as error:  # noqa: BLE001 - ids are the user's own, and may be anything
            self.complain(f"ids of examples were left out, their rows stand for them: {_line(error)}")
        try:
            return pack_examples(measurement.outliers, index, None, exponent)
        except Exception as error:  # noqa: BLE001 - as above
            self.complain(f"examples that stand out were left out: {_line(error)}")
            return []

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


def _arrays(measurement: Measurement) -> Iterator[Any]:
    """All of a measurement that may still be on a device."""
    yield measurement.examples
    yield from (measurement.columns or {}).values()
    yield from measurement.scalars.values()
    for sketch in (measurement.sketches or {}).values():
        yield from sketch
    yield from measurement.outliers or ()


def _bytes(messages: Sequence[Histogram] | Sequence[TopExample]) -> int:
    """What messages take in a batch: themselves, and up to five bytes before each."""
    return sum(message.ByteSize() + 5 for message in messages)


def _scaled(value: float, exponent: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(value, int(exponent)))


def _line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
