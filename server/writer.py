"""The one thread that writes the journal, a group of batches to a transaction.

An fsync costs about the same for one batch as for a hundred. While one transaction is being synced, the batches of
all streams wait in the queue; the next transaction takes them together. Nobody waits for a group to fill.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import structlog

from gradiometer.server.journal import Entry, Journal
from gradiometer.server.meters import Meters
from gradiometer.stats_core.errors import StoreError

__all__ = ["Writer"]

_log = structlog.get_logger("gradiometer.writer")
Result = TypeVar("Result")
_GROUP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class _Append:
    entry: Entry
    bytes: int
    future: "Future[bool]"


@dataclass(frozen=True, slots=True)
class _Call:
    run: Callable[[], None]
    fail: Callable[[BaseException], None]


class Writer:
    """Runs everything that changes a journal, in order, in a thread of its own.

    Args:
        journal: the journal; nobody else may write to it.
        meters: where commits are counted.
    """

    def __init__(self, journal: Journal, meters: Meters) -> None:
        self._journal = journal
        self._meters = meters
        self._queue: queue.SimpleQueue[_Append | _Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._closed = False
        self._failures = 0  # in a row
        self._thread = threading.Thread(target=self._work, name="gradiometer-writer", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """What waits to be committed, or is being committed."""
        return self._queued_bytes

    def append(self, entry: Entry) -> "Future[bool]":
        """Queue a batch; the future is True once it is on disk, False if it was before.

        The future holds a `StoreError` where the disk failed, and the journal's fault where the batch was not taken.
        """
        item = _Append(entry, entry.batch.ByteSize(), Future())
        item.future.set_running_or_notify_cancel()  # it can't be taken back
        with self._lock:
            if self._closed:
                item.future.set_exception(_stopping())
                return item.future
            self._queued_bytes += item.bytes
            self._queue.put(item)
        return item.future

    def call(self, change: Callable[[Journal], Result]) -> "Future[Result]":
        """Queue any other change, in order with the batches."""
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(change(self._journal))

        with self._lock:
            if self._closed:
                future.set_exception(_stopping())
            else:
                self._queue.put(_Call(run, future.set_exception))
        return future

    def close(self) -> None:
        """Commit what is queued, then end the thread; what comes later is refused."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            waiting = self._drain()
            going = waiting[-1] is not None
            for _, items in itertools.groupby(filter(None, waiting), type):
                group = list(items)
                appends = [item for item in group if isinstance(item, _Append)]
                if appends:
                    self._commit(appends)
                for item in group:
                    if isinstance(item, _Call):
                        self._run(item)

    def _drain(self) -> list[_Append | _Call | None]:
        """What waits, up to a group's worth; waits for the first. None is the last thing ever queued."""
        waiting, size = [self._queue.get()], 0
        while waiting[-1] is not None and size < _GROUP_BYTES:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            waiting.append(item)
            size += item.bytes if isinstance(item, _Append) else 0
        return waiting

    def _run(self, call: _Call) -> None:
        try:
            call.run()
        except Exception as error:  # noqa: BLE001 - it is the caller's to handle
            call.fail(error)

    def _commit(self, group: Sequence[_Append]) -> None:
        started = time.perf_counter()
        outcomes: Sequence[bool | Exception]
        try:
            outcomes = self._journal.append([item.entry for item in group])
        except Exception as error:  # noqa: BLE001 - every stream learns of it, and the server stays up
            self._meters.commit_failed()
            self._failed(error)
            outcomes = [error] * len(group)
        else:
            stored = [item.entry.batch for item, outcome in zip(group, outcomes, strict=True) if outcome is True]
            if stored:  # a transaction of nothing but batches behind a failed one proves nothing
                self._succeeded()
            rows = sum(len(batch.steps) * batch.num_layers for batch in stored)
            self._meters.committed(time.perf_counter() - started, len(stored), rows)
        with self._lock:
            self._queued_bytes -= sum(item.bytes for item in group)
        for item, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                item.future.set_exception(outcome)
            else:
                item.future.set_result(outcome)

    def _failed(self, error: Exception) -> None:
        """One line a spell of failures, however many there are."""
        self._failures += 1
        if self._failures == 1:
            cause = error.__cause__
            _log.error("batches can't be stored", why=str(error), reason=str(cause) if cause else type(error).__name__)

    def _succeeded(self) -> None:
        if self._failures:
            _log.info("batches are stored again", failed_commits=self._failures)
            self._failures = 0


def _stopping() -> StoreError:
    return StoreError("Store needs to be open, got a server that is stopping; try again", status="UNAVAILABLE")
