"""A step's numbers on their way from the device to the publisher: one tensor, one asynchronous copy."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiometer.stats_core.catalog import statistic
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import SCHEMA, WIDTH, Sketch
from gradiometer.stats_core.summary import OUTLIERS, Summary

__all__ = ["Arrived", "HostRows", "StepNumbers"]

_SCALARS = 128  # room for scalars that are still on the device
_LARGEST, _SMALLEST = 2.0**120, 2.0**-100  # squares in this range keep their digits in float32


@dataclass(eq=False)
class StepNumbers:
    """One step's numbers, wherever each of them is now.

    Attributes:
        step: number of the optimizer step.
        unix_nanos: when it closed.
        summary: of the layers that were measured, on the device.
        measured: index of each of them among the run's layers.
        scalars: numbers of the step by name: Python numbers, or scalars on the device.
        ids: the user's own ids of the examples, or None.
    """

    step: int
    unix_nanos: int
    summary: Summary
    measured: Sequence[int]
    scalars: dict[str, Any] = field(default_factory=dict)
    ids: Sequence[Any] | None = None


@dataclass(frozen=True)
class Arrived:
    """One step's numbers on the host, in units of 2 to the power of the scalar ``unit_exponent``, where there is one.

    Attributes:
        step: number of the optimizer step.
        unix_nanos: when it closed.
        rows: float32, shape ``(columns, layers)``, C-contiguous; NaN where a layer was not measured.
        scalars: numbers of the step by name.
        sketches: catalogue name → counts, with an entry for each layer.
        outliers: or None.
        ids: the user's own ids of the examples, or None.
    """

    step: int
    unix_nanos: int
    rows: np.ndarray
    scalars: dict[str, float]
    sketches: dict[str, Sketch]
    outliers: Outliers | None
    ids: Sequence[Any] | None


class HostRows:
    """Host buffers that the device copies into, each with an event that says when it has.

    Args:
        columns: names of the columns, in order.
        layers: layers of the run.
        device: where the numbers are.
        sketches: how many histograms there are of a layer.
        slots: copies that may be on their way at once; a step more than that is dropped.
    """

    def __init__(
        self, columns: Sequence[str], layers: int, device: torch.device, *, sketches: int = 0, slots: int = 4
    ) -> None:
        self._columns = tuple(columns)
        self._powers = np.array([_power(name) for name in columns])
        self._layers = layers
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        size = layers * (len(columns) + sketches * (WIDTH + 2)) + _SCALARS + 2 * OUTLIERS
        pinned = device.type == "cuda"
        self._free = deque(torch.empty(size, dtype=self._dtype, pin_memory=pinned) for _ in range(slots))
        self._waiting: deque[tuple[StepNumbers, list[tuple[int, ...]], Tensor, Any]] = deque()
        self.dropped = 0

    def send(self, numbers: StepNumbers) -> None:
        """Start the one copy of a step. Never waits: without a free buffer the step is dropped and counted."""
        if not self._free:
            self.dropped += 1
            return
        numbers.scalars = {**numbers.summary.scalars, **numbers.scalars}
        pieces = list(self._pieces(numbers))
        buffer = self._free.popleft()
        event = None
        if pieces:
            flat = torch.cat([self._here(piece).reshape(-1) for piece in pieces])
            buffer[: len(flat)].copy_(flat, non_blocking=True)
            if self._device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(self._device))
        self._waiting.append((numbers, [tuple(piece.shape) for piece in pieces], buffer, event))

    def arrived(self, *, wait: bool = False) -> Iterator[Arrived]:
        """The steps whose copies are complete, oldest first; with ``wait`` all of them."""
        while self._waiting:
            numbers, shapes, buffer, event = self._waiting[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._waiting.popleft()
            host = buffer.numpy().copy()
            self._free.append(buffer)
            yield self._unpacked(numbers, shapes, host)

    def _here(self, piece: Tensor) -> Tensor:
        """A piece in the buffer's type, on the device that the copy starts from."""
        piece = piece.detach()
        piece = piece if piece.device == self._device else piece.to(self._device)
        return piece.to(self._dtype)

    def _pieces(self, numbers: StepNumbers) -> Iterator[Tensor]:
        """Everything that is on the device, in the order that `_unpacked` takes it."""
        summary = numbers.summary
        if numbers.measured:
            yield torch.stack([summary.columns[name] for name in self._columns])
        scalars = _on_device(numbers.scalars)
        if scalars:
            yield torch.stack([numbers.scalars[name].detach().to(self._dtype).reshape(()) for name in scalars])
        for sketch in summary.sketches.values():
            yield from sketch
        if summary.outliers is not None:
            yield from summary.outliers

    def _unpacked(self, numbers: StepNumbers, shapes: Sequence[tuple[int, ...]], host: np.ndarray) -> Arrived:
        ends = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        parts = iter([host[a:b].reshape(shape) for a, b, shape in zip(ends[:-1], ends[1:], shapes, strict=True)])
        rows = np.full((len(self._columns), self._layers), np.nan, np.float32)
        scalars = {name: float(value) for name, value in numbers.scalars.items() if not isinstance(value, Tensor)}
        exponent = 0
        if numbers.measured:
            columns = next(parts)
            exponent = _unit_exponent(columns[self._powers == 2])
            if exponent:
                scalars["unit_exponent"] = float(exponent)
                columns = np.ldexp(columns, -exponent * self._powers[:, None])
            with np.errstate(over="ignore"):
                rows[:, numbers.measured] = columns
        on_device = _on_device(numbers.scalars)
        if on_device:
            scalars.update(zip(on_device, next(parts).tolist(), strict=True))
        if exponent:
            scalars |= {name: scalars[name] * 2.0 ** (-exponent * _power(name)) for name in numbers.summary.scalars}
        sketches = {}
        for name in numbers.summary.sketches:
            first, counts, zero_count = next(parts), next(parts), next(parts)
            sketches[name] = Sketch(
                self._all_layers(numbers, first - ((exponent * _power(name)) << SCHEMA)),
                self._all_layers(numbers, counts),
                self._all_layers(numbers, zero_count),
            )
        outliers = None
        if numbers.summary.outliers is not None:
            outliers = Outliers(next(parts).astype(np.int64), np.ldexp(next(parts), -2 * exponent))
        return Arrived(numbers.step, numbers.unix_nanos, rows, scalars, sketches, outliers, numbers.ids)

    def _all_layers(self, numbers: StepNumbers, values: np.ndarray) -> np.ndarray:
        """Counts of the measured layers in their places; 0 for the others."""
        found = np.zeros((self._layers, *values.shape[1:]), np.int64)
        found[numbers.measured] = values
        return found


def _power(name: str) -> int:
    return statistic(name).power


def _on_device(scalars: Mapping[str, Any]) -> list[str]:
    """Names of the scalars that are tensors, as many as there is room for."""
    return [name for name, value in scalars.items() if isinstance(value, Tensor)][:_SCALARS]


def _unit_exponent(squares: np.ndarray) -> int:
    """0, or the power of two to measure gradients in so that their squares keep their digits in float32."""
    peak = float(np.max(np.abs(squares), initial=0.0, where=np.isfinite(squares)))
    return 0 if peak == 0 or _SMALLEST < peak < _LARGEST else round(math.log2(peak) / 2)
