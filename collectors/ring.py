"""A bounded ring of preallocated slots between the training thread and the threads that publish.

The training thread copies raw bytes through a ``memoryview``: unlike a large numpy copy it never lets go
of the interpreter lock, so the hand-over can't be stretched by the threads behind it. One consumer.
"""

import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gradiometer.stats_core.arrays import Array

__all__ = ["Measurement", "Ring"]

_PATIENCE = 0.01  # seconds; another training thread needs microseconds, a signal handler in the way never ends
_BYTES = 16 << 20
_FEWEST, _MOST = 16, 4096


class Measurement(NamedTuple):
    """One measured step as handed over.

    Attributes:
        step: number of the step.
        unix_nanos: when it was measured. Unit: nanoseconds since 1970, UTC.
        scalars: name → number of the step, perhaps still on a device.
        dropped: steps dropped before this one.
        examples: number of examples of the step, perhaps still on a device; None where the slot holds rows.
        columns: catalogue name → ``(layers,)``, perhaps still on a device; None where the slot holds rows.
    """

    step: Array
    unix_nanos: int
    scalars: Mapping[str, Array]
    dropped: int
    examples: Array | None = None
    columns: Mapping[str, Array] | None = None


class Ring:
    """The slots.

    Args:
        columns: statistics a step.
        layers: layers of each.
        slots: how many steps it holds; as many as 16 MiB hold (16 to 4096) where not said.

    Example:
        >>> ring = Ring(columns=1, layers=2, slots=1)
        >>> step = Measurement(step=7, unix_nanos=0, scalars={}, dropped=0)
        >>> ring.push(step, np.array([[1.0, 2.0]], np.float32)), ring.push(step, None)
        (True, False)
        >>> ring.peek(8)[0].step, ring.rows(0).tolist(), ring.dropped
        (7, [[1.0, 2.0]], 1)
    """

    def __init__(self, columns: int, layers: int, slots: int | None = None) -> None:
        self._row_bytes = columns * layers * 4
        self.slots = slots or min(_MOST, max(_FEWEST, _BYTES // self._row_bytes))
        memory = bytearray(self.slots * self._row_bytes)
        self._bytes = memoryview(memory)
        self._rows = np.frombuffer(memory, np.float32).reshape(self.slots, columns, layers)
        self._measurements: list[Measurement | None] = [None] * self.slots
        self._head = 0  # written by producers only
        self._tail = 0  # written by the consumer only
        self._producers = threading.Lock()
        self.dropped = 0
        """Measurements that found no slot."""

    def __len__(self) -> int:
        return self._head - self._tail

    def push(self, measurement: Measurement, rows: np.ndarray | None) -> bool:
        """Hand one step over: a copy of its rows, or none where the measurement carries its columns itself.

        Args:
            measurement: the step.
            rows: shape ``(columns, layers)``, float32, C-contiguous.

        Returns:
            False where the ring was full; the step is dropped and counted then.

        Raises:
            TypeError: if the rows are not contiguous float32.
            ValueError: if they are of another size.
        """
        raw = None
        if rows is not None:
            if rows.dtype != np.float32:
                raise TypeError(
                    f"record_rows needs rows of float32, got dtype={rows.dtype}; convert them where they are made"
                )
            raw = memoryview(rows.data).cast("B")
        # Not `with`: a signal handler that records while its own thread is in here must not wait for ever.
        if not self._producers.acquire(timeout=_PATIENCE):
            self.dropped += 1
            return False
        try:
            head = self._head
            if head - self._tail >= self.slots:
                self.dropped += 1
                return False
            slot = head % self.slots
            if raw is not None:
                start = slot * self._row_bytes
                self._bytes[start : start + self._row_bytes] = raw
            self._measurements[slot] = measurement
            self._head = head + 1
        finally:
            self._producers.release()
        return True

    def peek(self, limit: int) -> list[Measurement]:
        """The oldest measurements, at most ``limit``; they stay until released. For the one consumer."""
        tail = self._tail
        found = (self._measurements[at % self.slots] for at in range(tail, min(self._head, tail + limit)))
        return [measurement for measurement in found if measurement is not None]

    def rows(self, place: int) -> np.ndarray:
        """The rows of the measurement at that place of `peek`: a view, shape ``(columns, layers)``."""
        view: np.ndarray = self._rows[(self._tail + place) % self.slots]
        return view

    def release(self, count: int) -> None:
        """Free the slots of the oldest ``count`` measurements."""
        for at in range(self._tail, self._tail + count):
            self._measurements[at % self.slots] = None  # let go of device arrays
        self._tail += count
