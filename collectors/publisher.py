"""What a training step hands its measurements to: never blocks, never raises, counts what it drops."""

import atexit
import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from gradiometer.collectors import spool
from gradiometer.collectors.endpoint import OFF, Credentials, Endpoint, is_disabled, resolve
from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.packer import MAX_STEP_BYTES, Packer
from gradiometer.collectors.registration import complete, registration
from gradiometer.collectors.sender import Sender
from gradiometer.collectors.slots import Slots
from gradiometer.protos.run_pb2 import Coverage, Run
from gradiometer.stats_core import Summary, selection
from gradiometer.stats_core.arrays import Array
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import WIDTH, Sketch

__all__ = ["Publisher"]

_log = logging.getLogger("gradiometer")

_SPOOL_BYTES = 256 << 20  # of one run
_SPOOLS_BYTES = 1 << 30  # of all that no process owns any more

_living: "weakref.WeakSet[Publisher]" = weakref.WeakSet()


class Publisher:
    """Sends a run's measurements to a server, from threads of its own.

    A step hands over a few numbers a layer and goes on. Where no server answers, measurements are kept in a
    bounded spool on disk, and sent by this process or, after its end, by the next one that reaches a server.
    What fits nowhere is dropped, counted in `dropped` and published as ``dropped_steps``. A context manager.

    Args:
        run: name of the run; None: script name, date and four hex digits.
        endpoint: ``"HOST:PORT"``, ``"off"``, or None for ``GRADIOMETER_ENDPOINT``, else 127.0.0.1:50051.
        params: the trained parameters, a pytree of jax arrays; or the layers, a sequence of
            ``gradiometer.protos.run_pb2.Layer``. Columns are in this order.
        coverage: what is measured and what is not, as ``fn.coverage``; None: everything.
        config: facts about the run, kept with it. ``loss_reduction``, ``engine``, ``optimizer``, ``temporal``
            ("optimizer" where `summarize` was given its state), ``unit`` and ``statistics`` have places of
            their own; anything else is kept as text.
        mirror: for a later release.

    Raises:
        ValueError: if the endpoint is malformed, the name of the run can't be one, there are no layers, or a
            step of so many layers would be larger than a message may be.

    Example:
        >>> import numpy as np
        >>> from gradiometer.protos.run_pb2 import Layer
        >>> from gradiometer.stats_core import Summary
        >>> with Publisher("doc", "off", params=[Layer(name="w", num_params=2)]) as publisher:
        ...     publisher.record(0, Summary(count=8, columns={"mean_sq_norm": np.array([1.0])}), loss=0.5)
        >>> publisher.run_id, publisher.endpoint, publisher.dropped
        ('doc', 'off', 0)
    """

    def __init__(
        self,
        run: str | None = None,
        endpoint: str | None = None,
        *,
        params: Any,
        coverage: Coverage | None = None,
        config: Mapping[str, object] | None = None,
        mirror: str | None = None,
    ) -> None:
        if mirror is not None:
            raise ValueError(f"Publisher needs mirror=None in this release, got mirror={mirror!r}; leave it out")
        self._begin(registration(run, params, coverage, config), endpoint)

    @classmethod
    def open(cls, run: Run, endpoint: str | None) -> Self:
        """A publisher of a run whose message is at hand; what it leaves open (name, time, host) is filled in.

        Raises:
            ValueError: as the constructor.
        """
        publisher = cls.__new__(cls)
        publisher._begin(complete(run), endpoint)
        return publisher

    def _begin(self, run: Run, endpoint: str | None) -> None:
        address = resolve(endpoint, os.environ)
        names = selection.columns(run.tier)
        step_bytes = len(names) * len(run.layers) * 4
        if step_bytes > MAX_STEP_BYTES:
            raise ValueError(
                f"Publisher needs steps of at most {MAX_STEP_BYTES} bytes, got layers={len(run.layers)}, "
                f"columns={len(names)}; measure fewer layers or a lighter tier"
            )
        self.run_id: str = run.run_id
        """Name of the run."""
        self.endpoint: str = OFF if address is None else str(address)
        """Where measurements go, or "off"."""
        self._slots: Slots | None = None
        self._last_step: Any = 0
        self._late = 0
        self._live = False
        self._ended = "off"
        if address is None or is_disabled(os.environ):
            return
        self._connect(run, address, names)

    def _connect(self, run: Run, address: Endpoint, names: Sequence[str]) -> None:
        credentials = Credentials.of(os.environ)
        folder = spool.directory(os.environ)

        def make_spool(collector_id: str, offset: int) -> spool.Spool:
            if folder.is_dir():
                spool.trim(folder, _SPOOLS_BYTES)
            return spool.Spool.create(folder, run, collector_id, offset, max_bytes=_SPOOL_BYTES)

        self._folder: Path = folder
        self._outbox = Outbox(make_spool)
        sketches = 4 * WIDTH * len(selection.sketches(run.tier)) * len(run.layers)
        self._slots = slots = Slots(len(names), len(run.layers), beside=sketches)
        self._packer = Packer(slots, self._outbox, names, len(run.layers))
        self._sender = Sender(address, credentials, run, self._outbox, spools=folder, on_refused=self._packer.refuse)
        self._live = True
        self._packer.start()
        self._sender.start()
        _living.add(self)
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """Measured steps dropped so far: no room, not readable, or nobody to take them."""
        if self._slots is None:
            return self._late
        return self._late + self._slots.dropped + self._packer.dropped

    @property
    def state(self) -> str:
        """For display: as `Sender.state`, or "off"."""
        return self._sender.state if self._live else self._ended

    def record(
        self,
        step: Array,
        summary: Summary,
        *,
        loss: Array | None = None,
        tokens: Array | None = None,
        ids: Sequence[object] | None = None,
        **scalars: Array | None,
    ) -> None:
        """Hand over one step. Nothing is waited for: device arrays are read by a thread behind.

        Args:
            step: number of the optimizer's step.
            summary: of `gradiometer.summarize`; where its count is 0 (not measured) nothing is published. Its
                sketches and outliers are not copied where they are numpy's: leave them unchanged.
            loss: training loss of the step.
            tokens: tokens in the batch.
            ids: the user's own ids of the examples, in the order of the batch, for summaries that name examples that
                stand out (``statistics="…,outliers"``); not copied. Without them an example's row stands for it.
            **scalars: any other numbers of the step, by name; one of the summary's own names takes its place.
        """
        slots = self._slots
        if slots is None or not self._live:
            self._late += self._ended == "closed"
            return
        try:
            self._last_step = step
            columns = {name: _unchanging(values) for name, values in summary.columns.items()}
            known = {name: _unchanging(value) for name, value in summary.scalars.items()}
            known.update(scalars, loss=loss, tokens=tokens)
            count = _unchanging(summary.count)
            slots.put(step, time.time_ns(), known, count, columns, summary.sketches, summary.outliers, ids)
        except Exception as error:  # noqa: BLE001 - never raises in a training step
            self._refuse_step(error)

    def record_rows(
        self,
        step: int,
        rows: np.ndarray,
        scalars: Mapping[str, float],
        unix_nanos: int,
        *,
        sketches: Mapping[str, Sketch] | None = None,
        outliers: Outliers | None = None,
        ids: Sequence[object] | None = None,
    ) -> None:
        """Hand over one step whose numbers are on the host already: the short way.

        Args:
            step: number of the optimizer's step.
            rows: shape ``(columns, layers)``, float32, C-contiguous, in the order of ``selection.columns(tier)``;
                copied, so that the caller may use the memory again.
            scalars: numbers of the step, by name; copied.
            unix_nanos: when it was measured. Unit: nanoseconds since 1970, UTC.
            sketches: catalogue name → dense counts a layer; not copied: leave them unchanged.
            outliers: the examples that stand out, of the whole model; not copied.
            ids: the user's own ids of the examples, in the order of the batch; not copied. None: their rows.
        """
        slots = self._slots
        if slots is None or not self._live:
            self._late += self._ended == "closed"
            return
        try:
            self._last_step = step
            slots.put_rows(step, unix_nanos, dict(scalars), rows, sketches, outliers, ids)
        except Exception as error:  # noqa: BLE001 - never raises in a training step
            self._refuse_step(error)

    def event(self, kind: str, text: str = "") -> None:
        """Note that something happened at the current step.

        Args:
            kind: short, e.g. "learning-rate" or "note".
            text: anything, up to 4096 characters.
        """
        if self._live:
            self._packer.event(self._last_step, time.time_ns(), kind, text)

    def close(self, timeout: float = 2) -> None:
        """Send what is left within the timeout; leave the rest in the spool, where the next publisher finds it.

        Args:
            timeout: seconds.
        """
        if not self._live:
            return
        deadline = time.monotonic() + timeout
        self._live, self._ended = False, "closed"
        atexit.unregister(self.close)
        _living.discard(self)
        self._packer.finish(max(0.05, timeout * 0.75))
        self._sender.finish(max(0.0, deadline - time.monotonic()))
        if self._sender.is_refused:
            self._ended = self._sender.state
        waiting = self._outbox.close()
        if waiting:
            _log.info("batches left in %s, to be sent by the next run that reaches a server: %d", self._folder, waiting)
        if self._outbox.lost:
            _log.warning("batches that neither a server nor the disk took, and that are lost: %d", self._outbox.lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Publisher(run={self.run_id!r}, endpoint={self.endpoint!r}, state={self.state!r}, dropped={self.dropped})"
        )

    def _refuse_step(self, error: Exception) -> None:
        self._late += 1
        self._packer.complain(f"a measurement was dropped: {(str(error) or repr(error)).splitlines()[0]}")

    def _abandon(self) -> None:
        """In a forked child: a publisher that does nothing. Its threads, and what they send, are the parent's."""
        self._live, self._ended = False, "off"
        atexit.unregister(self.close)


def _unchanging(values: Array) -> Array:
    """An array that nobody can change any more: itself where it is jax's, else a copy on the host."""
    if hasattr(values, "copy_to_host_async"):
        return values
    array = np.asarray(values)
    # Through bytes: a copy by numpy lets go of the interpreter lock, and may wait 5 ms to have it back.
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def _after_fork_in_child() -> None:
    for publisher in list(_living):
        publisher._abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
