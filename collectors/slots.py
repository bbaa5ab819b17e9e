"""Preallocated slots between the training thread and the threads that publish: bounded, and without a lock.

Slots are claimed from and given back to a stack, and what is in them waits in a queue; both are deques, whose
ends are safe to use from any thread and from a signal handler. Rows are copied through a ``memoryview``: unlike
a large numpy copy that never lets go of the interpreter lock, so the threads behind can't stretch it. The
stack hands out the slot that was used last, whose memory is still in the cache.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradiometer.stats_core.arrays import Array
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import Sketch

__all__ = ["Measurement", "Slots"]

_BYTES = 16 << 20
_FEWEST, _MOST = 16, 4096
_FLOAT32 = np.dtype(np.float32)


class Measurement(NamedTuple):
    """One measured step as handed over.

    Attributes:
        slot: where its rows are.
        step: number of the step.
        unix_nanos: when it was measured. Unit: nanoseconds since 1970, UTC.
        scalars: name → number of the step, perhaps still on a device; None is passed over.
        dropped: steps that had found no slot before this one.
        examples: number of examples of the step, perhaps still on a device; None where the slot holds rows.
        columns: catalogue name → ``(layers,)``, perhaps still on a device; None where the slot holds rows.
        sketches: catalogue name → dense counts a layer, perhaps still on a device.
        outliers: the examples that stand out, perhaps still on a device.
        ids: the user's own ids of the examples.
    """

    slot: int
    step: Array
    unix_nanos: int
    scalars: Mapping[str, Array | None]
    dropped: int
    examples: Array | None
    columns: Mapping[str, Array] | None
    sketches: Mapping[str, Sketch] | None = None
    outliers: Outliers | None = None
    ids: Sequence[object] | None = None


class Slots:
    """The slots. Many producers, one consumer.

    Rows are copied; sketches, outliers and ids are handed over as they are, for the giver to leave unchanged.

    Args:
        columns: statistics a step.
        layers: layers of each.
        count: how many steps are held; as many as fit 16 MiB (16 to 4096) where not said.
        beside: bytes of a step's sketches, about.

    Attributes:
        count: how many steps are held.
        dropped: measurements that found no slot.
        pressure: set where more than half of the slots are taken.

    Example:
        >>> slots = Slots(columns=1, layers=2, count=1)
        >>> slots.put_rows(7, 0, {}, np.array([[1.0, 2.0]], np.float32))
        >>> slots.put(8, 0, {}, 32, {})
        >>> found = slots.take()
        >>> found.step, slots.rows(found).tolist(), slots.dropped
        (7, [[1.0, 2.0]], 1)
        >>> slots.release(found)
    """

    def __init__(self, columns: int, layers: int, count: int | None = None, *, beside: int = 0) -> None:
        size = columns * layers * 4
        self.count = count or min(_MOST, max(_FEWEST, _BYTES // (size + beside)))
        self.dropped = 0
        memory = bytearray(self.count * size)
        whole = memoryview(memory)
        self._shape = (columns, layers)
        self._raw = [whole[at * size : (at + 1) * size] for at in range(self.count)]
        self._rows = np.frombuffer(memory, np.float32).reshape(self.count, columns, layers)
        self._free = deque(range(self.count))
        self._few = self.count // 2
        self.pressure = threading.Event()
        # Plain tuples: making a named one calls into Python, and the training thread waits for it.
        self._waiting: deque[tuple[Any, ...]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put_rows(
        self,
        step: int,
        unix_nanos: int,
        scalars: Mapping[str, float],
        rows: np.ndarray,
        sketches: Mapping[str, Sketch] | None = None,
        outliers: Outliers | None = None,
        ids: Sequence[object] | None = None,
    ) -> None:
        """Hand over a copy of a step's rows; where no slot is free, drop and count it.

        Raises:
            TypeError: if the rows are not float32, shape ``(columns, layers)``, C-contiguous.
        """
        if rows.dtype != _FLOAT32 or rows.shape != self._shape or not rows.flags.c_contiguous:
            raise TypeError(
                f"record_rows needs rows of float32, C-contiguous, of shape {self._shape}, got shape={rows.shape}, "
                f"dtype={rows.dtype}, strides={rows.strides}; pass all columns of the tier and all layers"
            )
        try:
            slot = self._free.pop()
        except IndexError:
            self.dropped += 1
            return
        self._raw[slot][:] = rows.data.cast("B")
        self._waiting.append((slot, step, unix_nanos, scalars, self.dropped, None, None, sketches, outliers, ids))
        if len(self._free) < self._few:
            self.pressure.set()

    def put(
        self,
        step: Array,
        unix_nanos: int,
        scalars: Mapping[str, Array | None],
        examples: Array,
        columns: Mapping[str, Array],
        sketches: Mapping[str, Sketch] | None = None,
        outliers: Outliers | None = None,
        ids: Sequence[object] | None = None,
    ) -> None:
        """Hand over a step whose columns are arrays that nobody changes any more; where no slot is free, drop it."""
        try:
            slot = self._free.pop()
        except IndexError:
            self.dropped += 1
            return
        beside = (sketches, outliers, ids)
        self._waiting.append((slot, step, unix_nanos, scalars, self.dropped, examples, columns, *beside))
        if len(self._free) < self._few:
            self.pressure.set()

    def take(self) -> Measurement | None:
        """The measurement that has waited longest, or None. Its slot stays taken until it is released."""
        return Measurement(*self._waiting.popleft()) if self._waiting else None

    def put_back(self, measurement: Measurement) -> None:
        """Let a measurement that was taken be the next one again."""
        self._waiting.appendleft(tuple(measurement))

    def rows(self, measurement: Measurement) -> np.ndarray:
        """The rows in a measurement's slot: a view, shape ``(columns, layers)``."""
        view: np.ndarray = self._rows[measurement.slot]
        return view

    def release(self, measurement: Measurement) -> None:
        """Give a measurement's slot back."""
        self._free.append(measurement.slot)
