"""The batches that no server has acknowledged yet, in order, in memory and on disk.

Batches are numbered 1, 2, 3, … as they are added. The newest are in memory; all older ones are in the spool,
so that what a crash leaves on disk has no gap. The sequence number on the wire is the number less an offset,
which is 0 until a server turns up that lost what another had acknowledged (another data directory, say):
what is left then goes on under a new collector id, counted from 1 again.
"""

import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gradiometer.collectors.spool import Spool, SpoolBusy, new_collector_id

__all__ = ["Outbox", "SpoolDamaged"]

_log = logging.getLogger("gradiometer")


_living: "weakref.WeakSet[Outbox]" = weakref.WeakSet()
_held: list["Outbox"] = []


class SpoolDamaged(Exception):
    """A batch can't be read back from the spool."""


class Outbox:
    """Unacknowledged batches of one collector; called from several threads.

    Args:
        make_spool: makes the file, given the collector id and the offset; called when first needed.
        spool: instead, a file that a process left behind.
        memory_bytes: batches beyond this go to disk.
        patience: seconds of a server's silence after which all that waits goes to disk.

    Attributes:
        collector_id: under which the batches are published.
        acknowledged: number of the last batch that is durable at the server.
        last: number of the last batch added.
        lost: batches that neither server nor disk took.

    Example:
        >>> outbox = Outbox()
        >>> outbox.append(b"first"); outbox.append(b"second")
        >>> outbox.welcome(durable_sequence=1), outbox.take(2, timeout=0)
        (True, b'second')
        >>> outbox.acknowledge(2); outbox.wait_empty(timeout=0)
        True
    """

    def __init__(
        self,
        make_spool: Callable[[str, int], Spool] | None = None,
        *,
        spool: Spool | None = None,
        memory_bytes: int = 16 << 20,
        patience: float = 2.0,
    ) -> None:
        numbers = spool.numbers() if spool else range(0)
        self.collector_id = spool.collector_id if spool else new_collector_id()
        self.acknowledged = numbers.start - 1 if numbers else 0
        self.last = numbers.stop - 1 if numbers else 0
        self.lost = 0
        self.finished = spool is not None
        self._offset = spool.offset if spool else 0
        self._make_spool = make_spool
        self._spool = spool
        self._memory: dict[int, bytes] = {}
        self._memory_bytes = 0
        self._memory_limit = memory_bytes
        self._patience = patience
        self._waiting_since = 0.0
        self._away = False
        self._complained = False
        self._closed = False
        self._inherited: Spool | None = None
        self._changed = threading.Condition()
        _living.add(self)

    @property
    def spool(self) -> Spool | None:
        """The file, once there is one."""
        return self._spool

    def append(self, body: bytes) -> None:
        """Add an encoded batch."""
        with self._changed:
            if self._closed:
                self.lost += 1
                return
            now = time.monotonic()
            if not self._memory:
                self._waiting_since = now
            self.last += 1
            self._memory[self.last] = body
            self._memory_bytes += len(body)
            silent = now - self._waiting_since > self._patience
            if self._away or silent or self._memory_bytes > self._memory_limit:
                self._spill()
            self._changed.notify_all()

    def has_room(self) -> bool:
        """False where memory and disk are both full: add nothing more for now."""
        with self._changed:
            if self._memory_bytes > self._memory_limit:
                self._spill()
            return self._memory_bytes <= self._memory_limit

    def set_away(self, *, away: bool) -> None:
        """Say whether the server is away: everything then goes to disk at once, where a crash leaves it."""
        with self._changed:
            self._away = away
            if away:
                self._spill()

    def welcome(self, durable_sequence: int) -> bool:
        """Take the server's word for what it holds.

        Returns:
            False where it holds less than was once acknowledged: the batches now have another
            `collector_id`, which needs another hello.
        """
        with self._changed:
            number = durable_sequence + self._offset
            if number < self.acknowledged:
                self.collector_id, self._offset = new_collector_id(), self.acknowledged
                if self._spool:
                    with suppress(sqlite3.Error):  # a full disk: only a crash from now on would tell
                        self._spool.renumber(self.collector_id, self._offset)
                return False
            self._acknowledge(number)
            return True

    def acknowledge(self, durable_sequence: int) -> None:
        """Let go of what is durable at the server."""
        with self._changed:
            self._acknowledge(durable_sequence + self._offset)

    def sequence(self, number: int) -> int:
        """The batch's number on the wire."""
        return number - self._offset

    def take(self, number: int, timeout: float) -> bytes | None:
        """The batch of that number, or None where it is not there within the timeout.

        Raises:
            SpoolDamaged: if it was on disk and is lost; the connection has to be made anew then.
        """
        with self._changed:
            if number > self.last and not self.finished:
                self._changed.wait(timeout)
            if number > self.last or number <= self.acknowledged:
                return None
            body = self._memory.get(number)
            if body is not None or self._spool is None:
                return body
            try:
                return self._spool.read(number)
            except sqlite3.Error as error:
                self._lose_spool(error)
                raise SpoolDamaged(number) from error

    def wait(self, timeout: float) -> None:
        """Wait for something to change."""
        with self._changed:
            self._changed.wait(timeout)

    def wake(self) -> None:
        """End all waiting."""
        with self._changed:
            self._changed.notify_all()

    def finish(self) -> None:
        """Say that nothing more will be added."""
        with self._changed:
            self.finished = True
            self._changed.notify_all()

    @property
    def is_empty(self) -> bool:
        """True where everything is durable at the server."""
        return self.acknowledged >= self.last

    def wait_empty(self, timeout: float) -> bool:
        """Wait until everything is durable at the server; False where it is not in time."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self.is_empty and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return self.is_empty

    def close(self) -> int:
        """Leave what no server has acknowledged in the spool, for whoever reaches a server next.

        Returns:
            How many batches that are.
        """
        with self._changed:
            self._closed = True
            self._spill()
            self.lost += len(self._memory)
            waiting = self.last - self.acknowledged - len(self._memory)
            self._memory.clear()
            spool, self._spool = self._spool, None
            if spool:
                spool.close(remove=waiting == 0)
            self._changed.notify_all()
            return waiting

    def set_aside(self, why: str) -> Path | None:
        """Close, and rename the spool to where nobody sends it; its new path."""
        with self._changed:
            self._closed = True
            spool, self._spool = self._spool, None
            return spool.set_aside(why) if spool else None

    def _acknowledge(self, number: int) -> None:
        number = min(number, self.last)
        if number <= self.acknowledged:
            return
        # Looked at from the front only: memory is in order, and nothing below `acknowledged` is left.
        for sent in range(self.acknowledged + 1, number + 1):
            body = self._memory.pop(sent, None)
            self._memory_bytes -= len(body) if body is not None else 0
        if self._spool:
            # A failure leaves them there; sent twice, the server drops them.
            with suppress(sqlite3.Error):
                self._spool.forget(number)
        self.acknowledged = number
        self._waiting_since = time.monotonic()
        self._changed.notify_all()

    def _spill(self) -> None:
        """Move what is in memory to disk; where that fails it stays, and one line says so."""
        if not self._memory or (self._spool is None and self._make_spool is None):
            return
        try:
            if self._spool is None and self._make_spool is not None:
                self._spool = self._make_spool(self.collector_id, self._offset)
            assert self._spool is not None
            self._spool.append(self._memory.items())
        except (OSError, sqlite3.Error, SpoolBusy) as error:
            if not self._complained:
                self._complained = True
                _log.warning(
                    "measurements can't be spooled (%s); up to %d MiB stay in memory, the rest is dropped and counted",
                    error,
                    self._memory_limit >> 20,
                )
            return
        self._memory.clear()
        self._memory_bytes = 0

    def _lose_spool(self, error: sqlite3.Error) -> None:
        """Set a damaged file aside and go on behind what was in it."""
        spool, self._spool = self._spool, None
        assert spool is not None
        first = next(iter(self._memory), self.last + 1)
        self.lost += first - 1 - self.acknowledged
        self.acknowledged = first - 1
        with suppress(OSError):
            aside = spool.set_aside("damaged")
            _log.warning("a damaged spool was set aside as %s (%s); its measurements are lost", aside, error)

    def _hold(self) -> None:
        """Before a fork: no child inherits half a transaction."""
        if self._changed.acquire(timeout=1.0):
            _held.append(self)

    def _abandon(self) -> None:
        """In a forked child: the parent alone goes on."""
        self._closed, self._make_spool = True, None
        self._memory.clear()
        self.acknowledged = self.last
        if self._spool:
            self._spool.abandon()
            # Neither used nor closed, which SQLite forbids on this side of a fork.
            self._inherited, self._spool = self._spool, None


def _before_fork() -> None:
    for outbox in list(_living):
        outbox._hold()


def _after_fork() -> None:
    while _held:
        _held.pop()._changed.release()


def _after_fork_in_child() -> None:
    _after_fork()
    for outbox in list(_living):
        outbox._abandon()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
