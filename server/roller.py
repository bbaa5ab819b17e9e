"""The roller: moves what the journal holds into segments, run by run, in a thread of its own.

Reading, sorting and compressing happen here, beside the writer; only the exchange (segments into the manifest,
rows out of the journal) is a transaction in the writer's thread. A crash before it leaves files that nobody lists.
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.server import segments, tables
from gradiometer.server.datadir import DataDirectory
from gradiometer.server.journal import RunRow, connect
from gradiometer.server.meters import Meters
from gradiometer.server.settings import Settings
from gradiometer.server.writer import Writer
from gradiometer.stats_core.errors import StoreError

__all__ = ["Roller", "backlog"]

_log = structlog.get_logger("gradiometer.roller")
_AT_ONCE = 64 << 20
_LONGEST_WAIT = 60.0


def backlog(journal: Path) -> dict[int, tuple[int, int, int]]:
    """Run key → bytes, batches, and when the oldest arrived (nanoseconds since 1970), of what is in no segment."""
    query = (
        "SELECT run_key, sum(bytes), count(*), min(received_unix_nanos) FROM journal INDEXED BY journal_by_run "
        "GROUP BY run_key"
    )
    db = connect(journal)
    try:
        return {key: (size, batches, oldest) for key, size, batches, oldest in db.execute(query)}
    finally:
        db.close()


class Roller:
    """Rolls runs whose journal has grown large or old.

    Args:
        directory: the data directory.
        writer: runs the exchange.
        settings: ``roll_bytes``, ``roll_seconds``, ``roll_check_seconds``.
        meters: where rolls are counted.
        runs: run key → row of the run.
    """

    def __init__(
        self,
        directory: DataDirectory,
        writer: Writer,
        settings: Settings,
        meters: Meters,
        runs: Callable[[], dict[int, RunRow]],
    ) -> None:
        self._directory = directory
        self._writer = writer
        self._settings = settings
        self._meters = meters
        self._runs = runs
        self._one_at_a_time = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="gradiometer-roller", daemon=True)
        self._thread.start()

    def roll(self, *, everything: bool = False) -> int:
        """Roll what is due now, or ``everything``; returns the number of segments written.

        Raises:
            StoreError, OSError, sqlite3.Error: if the disk fails; the journal keeps what was not rolled.
        """
        written = 0
        with self._one_at_a_time:
            for run_key, (size, _, oldest) in backlog(self._directory.journal).items():
                age = time.time() - oldest / 1e9
                due = size >= self._settings.roll_bytes or age >= self._settings.roll_seconds
                if due or everything:
                    written += self._roll_run(self._runs()[run_key])
        return written

    def close(self) -> None:
        """End the thread after the roll it is in; what is journalled stays so."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        failures = 0
        while not self._stop.wait(min(self._settings.roll_check_seconds * 2**failures, _LONGEST_WAIT)):
            try:
                self.roll()
                failures = 0
            except (StoreError, OSError, sqlite3.Error) as error:
                self._meters.roll_failed()
                if not failures:
                    _log.error("rolling failed; the journal keeps everything, and it is tried again", error=str(error))
                failures = min(failures + 1, 10)

    def _roll_run(self, row: RunRow) -> int:
        count, more = 0, True
        while more:
            arrived, more = self._oldest(row.run_key)
            if not arrived:
                break
            made = self._write(row, arrived)
            last = arrived[-1][0]
            # Where the exchange fails its files stay: the disk may hold the commit although it reported an error.
            self._writer.call(lambda journal: journal.rolled(row.run_key, last, made)).result()  # noqa: B023
            self._meters.rolled()
            count += len(made)
        return count

    def _write(self, row: RunRow, arrived: list[tables.Arrived]) -> list[segments.Segment]:
        made: list[segments.Segment] = []
        try:
            for kind in tables.SCHEMAS:
                table = tables.build(kind, row.run, arrived)
                if table.num_rows:
                    table = tables.narrowed(table) if kind == "layers" else table
                    made.append(segments.write(self._directory.segments, row.run.run_id, kind, table))
        except OSError:
            for segment in made:
                (self._directory.segments / segment.path).unlink(missing_ok=True)
            raise
        return made

    def _oldest(self, run_key: int) -> tuple[list[tables.Arrived], bool]:
        """As much as is rolled at once, and whether that may not be all."""
        db = connect(self._directory.journal)
        try:
            arrived: list[tables.Arrived] = []
            size = 0
            query = "SELECT arrival, body FROM journal WHERE run_key = ? ORDER BY arrival"
            for arrival, body in db.execute(query, (run_key,)):
                arrived.append((arrival, StepBatch.FromString(body)))
                size += len(body)
                if size >= _AT_ONCE:
                    return arrived, True
            return arrived, False
        finally:
            db.close()
