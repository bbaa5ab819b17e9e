"""A step's numbers on their way from the device to the publisher: one tensor, one asynchronous copy."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradiometer.collectors.torch_layers import LayerParameters
from gradiometer.stats_core.arrays import Array
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.summary import layer_columns

__all__ = ["Arrived", "HostRows", "StepNumbers", "step_numbers"]

_SCALARS = 64  # room for scalars that are still on the device


@dataclass(eq=False)
class StepNumbers:
    """One step's numbers, wherever each of them is now.

    Attributes:
        step: number of the optimizer step.
        unix_nanos: when it closed.
        rows: shape ``(columns, layers)``, float32: what the host knows already; NaN elsewhere.
        values: scalars on the device.
        places: index into ``rows.flat`` for each of ``values``.
        scalars: numbers of the step by name: Python numbers, or scalars on the device.
    """

    step: int
    unix_nanos: int
    rows: np.ndarray
    values: list[Tensor]
    places: list[int]
    scalars: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrived:
    """One step's numbers on the host. ``rows`` is float32, shape ``(columns, layers)``, C-contiguous."""

    step: int
    unix_nanos: int
    rows: np.ndarray
    scalars: dict[str, float]


def step_numbers(
    step: int,
    unix_nanos: int,
    layers: Sequence[LayerParameters],
    names: Sequence[str],
    moments: Mapping[nn.Parameter, Moments],
    sums: Mapping[nn.Parameter, Mapping[str, Array]],
) -> StepNumbers:
    """The columns of one step, still on the device.

    A layer is summed over all of its parameters or over none: where one was not measured, it is NaN.
    """
    numbers = StepNumbers(step, unix_nanos, np.full((len(names), len(layers)), np.nan, np.float32), [], [])
    for number, layer in enumerate(layers):
        if not all(parameter in moments for parameter in layer.parameters):
            continue
        parts = [(moments[p], sums.get(p, {}), p.numel()) for p in layer.parameters]
        for row, value in enumerate(layer_columns(parts, names).values()):
            if isinstance(value, Tensor):
                numbers.values.append(value.detach())
                numbers.places.append(row * len(layers) + number)
            else:
                numbers.rows[row, number] = value
    return numbers


class HostRows:
    """Host buffers that the device copies into, each with an event that says when it has.

    Args:
        cells: columns times layers.
        device: where the numbers are.
        slots: copies that may be on their way at once; a step more than that is dropped.
    """

    def __init__(self, cells: int, device: torch.device, slots: int = 4) -> None:
        self._device = device
        pinned = device.type == "cuda"
        self._free = deque(torch.empty(cells + _SCALARS, pin_memory=pinned) for _ in range(slots))
        self._waiting: deque[tuple[StepNumbers, list[str], Tensor, Any]] = deque()
        self.dropped = 0

    def send(self, numbers: StepNumbers) -> None:
        """Start the one copy of a step. Never waits: without a free buffer the step is dropped and counted."""
        if not self._free:
            self.dropped += 1
            return
        names = [name for name, value in numbers.scalars.items() if isinstance(value, Tensor)][:_SCALARS]
        values = [*numbers.values, *(numbers.scalars[name].detach().reshape(()) for name in names)]
        buffer = self._free.popleft()
        event = None
        if values:
            values = [value if value.device == self._device else value.to(self._device) for value in values]
            buffer[: len(values)].copy_(torch.stack(values).to(torch.float32), non_blocking=True)
            if self._device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(self._device))
        self._waiting.append((numbers, names, buffer, event))

    def arrived(self, *, wait: bool = False) -> Iterator[Arrived]:
        """The steps whose copies are complete, oldest first; with ``wait`` all of them."""
        while self._waiting:
            numbers, names, buffer, event = self._waiting[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._waiting.popleft()
            host = buffer.numpy()
            count = len(numbers.values)
            numbers.rows.reshape(-1)[numbers.places] = host[:count]
            scalars = {name: float(value) for name, value in numbers.scalars.items() if not isinstance(value, Tensor)}
            scalars.update({name: float(host[count + index]) for index, name in enumerate(names)})
            self._free.append(buffer)
            yield Arrived(numbers.step, numbers.unix_nanos, numbers.rows, scalars)
