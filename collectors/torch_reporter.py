"""From a collector to its publisher: registers the run, keeps what the user logs, hands closed steps over."""

import atexit
import logging
import os
from collections import deque
from typing import Any

import torch
from torch import Tensor

from gradiometer.collectors.endpoint import OFF, resolve
from gradiometer.collectors.publisher import Publisher
from gradiometer.collectors.torch_handover import HostRows, StepNumbers
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.checks import check_batch
from gradiometer.protos.run_pb2 import Run
from gradiometer.stats_core.errors import PeerFault
from gradiometer.stats_core.selection import Selection

__all__ = ["Reporter"]

_log = logging.getLogger("gradiometer")

_EVENTS = 256  # kept until the run is registered


class Reporter:
    """Publishes closed steps, one behind: what is logged until the next forward pass still belongs to them.

    The publisher is opened with the first step, when it is known what can be measured.

    Args:
        run: complete but for its layers and coverage.
        endpoint: as `Publisher`; "off" publishes nothing.
        device: where the numbers are.
    """

    def __init__(self, run: Run, endpoint: str | None, device: torch.device) -> None:
        self.run = run
        self._endpoint = OFF if resolve(endpoint, os.environ) is None else endpoint
        self._device = device
        self._publisher: Publisher | None = None
        self._rows: HostRows | None = None
        self._closed: StepNumbers | None = None
        self._logged: dict[str, Any] = {}
        self._names: dict[str, bool] = {}  # of scalars: whether the wire takes them
        self._said: set[str] = set()
        self._events: deque[tuple[str, str]] = deque(maxlen=_EVENTS)

    @property
    def is_wanted(self) -> bool:
        """False where nothing is published, so that nobody reads a step's numbers."""
        return self._endpoint != OFF

    @property
    def is_open(self) -> bool:
        """True once the run is registered: from then on its layers are fixed."""
        return self._publisher is not None

    @property
    def dropped(self) -> int:
        """Measured steps that were dropped so far, here and by the publisher."""
        copies = 0 if self._rows is None else self._rows.dropped
        return copies + (0 if self._publisher is None else self._publisher.dropped)

    def open(self, wanted: Selection) -> None:
        """Register the run as ``run`` now says.

        Args:
            wanted: what a step's summary holds.
        """
        layers, sketches = len(self.run.layers), len(wanted.sketches)
        self._rows = HostRows(wanted.columns, layers, self._device, sketches=sketches)
        self._publisher = Publisher.open(self.run, self._endpoint)
        # After the publisher's own, so that it runs before it: the last step is still to be handed over.
        atexit.register(self.close)
        while self._events:
            self._publisher.event(*self._events.popleft())

    def event(self, kind: str, text: str) -> None:
        """Something happened at the current step."""
        if self._publisher is None:
            self._events.append((kind, text))
        else:
            self._publisher.event(kind, text)

    def log(self, scalars: dict[str, Any]) -> set[str]:
        """Numbers of the step that is open, or else of the one that closed last.

        What can't be published is said once and left out: a step is never broken.

        Returns:
            The names of those that were taken.
        """
        kept = {}
        for name, value in scalars.items():
            if value is not None and self._is_good_name(name):
                number = _number(value)
                if number is not None:
                    kept[name] = number
                else:
                    self._say_once(
                        "collector.log needs numbers of float64's range or tensors of one element, "
                        f"got {name}=<{type(value).__name__}>; it is left out"
                    )
        (self._logged if self._closed is None else self._closed.scalars).update(kept)
        return set(kept)

    def _is_good_name(self, name: str) -> bool:
        if name not in self._names:
            try:
                check_batch(StepBatch(steps=[0], unix_nanos=[0], num_layers=1, scalars={name: bytes(8)}), 1)
                self._names[name] = True
            except (PeerFault, ValueError) as fault:
                self._names[name] = False
                self._say_once(str(fault).replace("Publish needs", "collector.log needs", 1))
        return self._names[name]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning("%s. This is said once.", text)

    def close_step(self, numbers: StepNumbers) -> None:
        """A measured step is over; it is handed over when the next one begins."""
        numbers.scalars.update(self._logged)
        self._logged = {}
        self._closed = numbers

    def next_step(self) -> None:
        """A step begins: hand the closed one over. What was logged for a step that was not measured goes."""
        self.hand_over()
        self._logged = {}

    def hand_over(self, *, wait: bool = False) -> None:
        """Start the copy of the closed step, and give the publisher what has arrived."""
        if self._rows is None or self._publisher is None:
            return
        closed, self._closed = self._closed, None
        if closed is not None:
            self._rows.send(closed)
        for arrived in self._rows.arrived(wait=wait):
            self._publisher.record_rows(
                arrived.step,
                arrived.rows,
                arrived.scalars,
                arrived.unix_nanos,
                sketches=arrived.sketches,
                outliers=arrived.outliers,
                ids=arrived.ids,
            )

    def close(self) -> None:
        """Hand over what is left and close the publisher."""
        atexit.unregister(self.close)
        self.hand_over(wait=True)
        if self._publisher is not None:
            self._publisher.close()


def _number(value: Any) -> Tensor | float | None:
    """A tensor of one element as it is, anything else as Python's float; None for what is no number."""
    if isinstance(value, Tensor):
        return value if value.numel() == 1 and not value.is_complex() and not value.is_meta else None
    if not isinstance(value, int | float) and not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except Exception:  # noqa: BLE001 - it is the user's own type, and nothing may reach the step
        return None
