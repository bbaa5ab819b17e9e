"""The journal: what is on disk and not yet in a segment, how far each collector is, and which segments there are.

One SQLite file in WAL mode with ``synchronous=FULL``: a transaction that returned has been fsynced. Everything that
must change together is in it, so a crash at any instant leaves either all of a change or nothing::

    runs      one row a run: its registration, and how far it is
    marks     the highest durable sequence of each collector; outlives the journal rows
    journal   one row a batch that is not in a segment yet; ``arrival`` is the order of commit, never used twice
    segments  the manifest: a Parquet file that is not listed here does not exist

`Journal` writes and belongs to one thread; readers open connections of their own (`connect`).
"""

import dataclasses
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.run_pb2 import Run
from gradiometer.server.ingest import registered, unknown_run
from gradiometer.server.segments import Segment
from gradiometer.stats_core.errors import OurFault, PeerFault, StoreError

__all__ = ["Entry", "Journal", "RunRow", "connect"]

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (
  run_key INTEGER PRIMARY KEY,
  run_id TEXT NOT NULL UNIQUE,
  body BLOB NOT NULL,
  stored_steps INTEGER NOT NULL,
  last_step INTEGER NOT NULL,
  last_unix_nanos INTEGER NOT NULL,
  repeats INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS marks (
  run_key INTEGER NOT NULL,
  collector_id TEXT NOT NULL,
  durable_sequence INTEGER NOT NULL,
  PRIMARY KEY (run_key, collector_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS journal (
  arrival INTEGER PRIMARY KEY AUTOINCREMENT,
  run_key INTEGER NOT NULL,
  collector_id TEXT NOT NULL,
  sequence INTEGER NOT NULL,
  first_step INTEGER NOT NULL,
  last_step INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  received_unix_nanos INTEGER NOT NULL,
  body BLOB NOT NULL,
  UNIQUE (run_key, collector_id, sequence)
);
CREATE INDEX IF NOT EXISTS journal_by_run ON journal (run_key, arrival, bytes, received_unix_nanos);
CREATE TABLE IF NOT EXISTS segments (
  path TEXT PRIMARY KEY,
  run_key INTEGER NOT NULL,
  kind TEXT NOT NULL,
  first_step INTEGER NOT NULL,
  last_step INTEGER NOT NULL,
  first_arrival INTEGER NOT NULL,
  last_arrival INTEGER NOT NULL,
  rows INTEGER NOT NULL,
  bytes INTEGER NOT NULL,
  sha256 TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS segments_by_run ON segments (run_key, kind, first_step);
"""

_INSERT_BATCH = (
    "INSERT INTO journal (run_key, collector_id, sequence, first_step, last_step, bytes, received_unix_nanos, body) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_INSERT_SEGMENT = (
    "INSERT INTO segments (run_key, path, kind, first_step, last_step, first_arrival, last_arrival, rows, bytes, "
    "sha256) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch on its way to the journal, checked already."""

    run_id: str
    collector_id: str
    sequence: int
    batch: StepBatch


@dataclass(frozen=True, slots=True)
class RunRow:
    """A row of ``runs``.

    Attributes:
        run_key: its number in this file.
        run: its registration.
        stored_steps: steps stored; a step stored twice counts twice.
        last_step: the highest; -1 for none.
        last_unix_nanos: when the latest was measured; 0 for never.
        repeats: whether a batch ever began at or before ``last_step``, so that a step may be there twice.
    """

    run_key: int
    run: Run
    stored_steps: int = 0
    last_step: int = -1
    last_unix_nanos: int = 0
    repeats: bool = False


class Journal:
    """The writing side; every method but the look-ups runs in one thread, a transaction each.

    Args:
        path: the SQLite file; made where it is missing.

    Raises:
        StoreError: if it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._db = connect(path, writing=True)
            try:
                self._db.executescript(_TABLES)
                self._runs = {row.run.run_id: row for row in read_runs(self._db)}
                marks = self._db.execute(
                    "SELECT run_id, collector_id, durable_sequence FROM marks JOIN runs USING (run_key)"
                )
                self._marks: dict[tuple[str, str], int] = {
                    (run_id, collector): sequence for run_id, collector, sequence in marks
                }
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as error:
            raise StoreError(
                f"Store needs a sound journal, got {str(path)!r} ({error}); restore it from a copy, "
                "or choose another directory with --data"
            ) from None

    @property
    def runs(self) -> Mapping[str, RunRow]:
        """Run id → what is committed of it; may be read from any thread."""
        return self._runs

    def durable_sequence(self, run_id: str, collector_id: str) -> int:
        """All batches of the collector up to this one are on disk; may be called from any thread."""
        return self._marks.get((run_id, collector_id), 0)

    def register(self, offered: Run) -> tuple[Run, bool]:
        """Keep a run; returns it as kept, and whether it is new.

        Raises:
            PeerFault: if it was registered with other layers before, or can't be stored.
            StoreError: if the disk fails.
        """
        known = self._runs.get(offered.run_id)
        run = registered(known.run if known else None, offered, time.time_ns())
        with self._transaction():
            if known is None:
                cursor = self._db.execute(
                    "INSERT INTO runs (run_id, body, stored_steps, last_step, last_unix_nanos, repeats) "
                    "VALUES (?, ?, 0, -1, 0, 0)",
                    (run.run_id, run.SerializeToString()),
                )
                row = RunRow(cursor.lastrowid or 0, run)
            else:
                row = replace(known, run=run)
                self._update(row, known)
        self._runs[run.run_id] = row
        return run, known is None

    def append(self, entries: Sequence[Entry]) -> list[bool | PeerFault | OurFault]:
        """Write a group of batches in one transaction.

        Returns:
            For each: True where it is stored now, False where it was before, or why it was not taken: a batch
            whose predecessor is missing is never stored, so a mark always means all up to it.

        Raises:
            StoreError: if the disk fails; nothing of the group is stored then.
        """
        runs: dict[str, RunRow] = {}
        marks: dict[tuple[str, str], int] = {}
        now = time.time_ns()
        with self._transaction():
            outcomes = [self._insert(entry, runs, marks, now) for entry in entries]
            for run_id, row in runs.items():
                self._update(row, self._runs[run_id])
            self._db.executemany(
                "INSERT INTO marks VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET durable_sequence = excluded.durable_sequence",
                [(runs[run_id].run_key, collector, sequence) for (run_id, collector), sequence in marks.items()],
            )
        self._runs.update(runs)
        self._marks.update(marks)
        return outcomes

    def rolled(self, run_key: int, last_arrival: int, segments: Sequence[Segment]) -> None:
        """Put segments in the place of the run's journal rows up to an arrival, in one transaction.

        Raises:
            StoreError: if the disk fails; the journal is as it was then.
        """
        with self._transaction():
            self._db.executemany(_INSERT_SEGMENT, [(run_key, *dataclasses.astuple(segment)) for segment in segments])
            self._db.execute("DELETE FROM journal WHERE run_key = ? AND arrival <= ?", (run_key, last_arrival))

    def close(self) -> None:
        """Close the file; SQLite folds its write-ahead log into it."""
        self._db.close()

    def _insert(
        self, entry: Entry, runs: dict[str, RunRow], marks: dict[tuple[str, str], int], now: int
    ) -> bool | PeerFault | OurFault:
        row = runs.get(entry.run_id) or self._runs.get(entry.run_id)
        if row is None:
            return unknown_run("Publish", entry.run_id, self._runs)
        key = (entry.run_id, entry.collector_id)
        mark = marks.get(key, self._marks.get(key, 0))
        if entry.sequence <= mark:
            return False
        if entry.sequence != mark + 1:
            # An earlier batch of the same stream failed to commit; this one may not overtake it.
            fault = OurFault(f"Store needs sequence={mark + 1} next, got sequence={entry.sequence}; open a new stream")
            fault.status = "UNAVAILABLE"
            return fault
        batch = entry.batch
        body = batch.SerializeToString()
        # Events are looked up by step too, and may lie outside the measured steps.
        spoken_of = [*batch.steps[:1], *batch.steps[-1:], *(event.step for event in batch.events)]
        nowhere = max(row.last_step, 0)
        first, last = min(spoken_of, default=nowhere), max(spoken_of, default=nowhere)
        self._db.execute(
            _INSERT_BATCH,
            (row.run_key, entry.collector_id, entry.sequence, first, last, len(body), now, body),
        )
        runs[entry.run_id] = _advanced(row, batch)
        marks[key] = entry.sequence
        return True

    def _update(self, row: RunRow, before: RunRow) -> None:
        if row.run is not before.run:  # some hundred kB where there are many layers
            self._db.execute("UPDATE runs SET body = ? WHERE run_key = ?", (row.run.SerializeToString(), row.run_key))
        self._db.execute(
            "UPDATE runs SET stored_steps = ?, last_step = ?, last_unix_nanos = ?, repeats = ? WHERE run_key = ?",
            (row.stored_steps, row.last_step, row.last_unix_nanos, row.repeats, row.run_key),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise _disk_fault(error) from error


def connect(path: Path, *, writing: bool = False) -> sqlite3.Connection:
    """A connection to a journal; without ``writing`` it can't change anything, and may be another process's.

    Raises:
        sqlite3.Error: if there is no such file, or it is no journal.
    """
    mode = "rwc" if writing else "ro"
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=10.0
    )
    if not writing:
        return db
    try:
        db.execute("PRAGMA page_size = 16384")  # batches are some ten kB: fewer overflow pages
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = OFF")  # rolled batches need not be overwritten with zeros
        db.execute("PRAGMA wal_autocheckpoint = 1024")
        db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    except BaseException:
        db.close()
        raise
    return db


def read_runs(db: sqlite3.Connection) -> list[RunRow]:
    """All runs, in the order of registration."""
    query = "SELECT run_key, body, stored_steps, last_step, last_unix_nanos, repeats FROM runs ORDER BY run_key"
    return [
        RunRow(key, Run.FromString(body), steps, last, nanos, bool(repeats))
        for key, body, steps, last, nanos, repeats in db.execute(query)
    ]


def _advanced(row: RunRow, batch: StepBatch) -> RunRow:
    run = row.run
    if batch.HasField("coverage"):
        run = Run()
        run.CopyFrom(row.run)
        run.coverage.CopyFrom(batch.coverage)
    if not batch.steps:
        return replace(row, run=run)
    return replace(
        row,
        run=run,
        stored_steps=row.stored_steps + len(batch.steps),
        last_step=max(row.last_step, batch.steps[-1]),
        last_unix_nanos=max(row.last_unix_nanos, *batch.unix_nanos),
        repeats=row.repeats or batch.steps[0] <= row.last_step,
    )


def _disk_fault(error: sqlite3.Error) -> StoreError:
    # Both may pass, so the publisher is told to try again and keeps its batches meanwhile.
    if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
        return StoreError(
            "Store needs room on the disk of its data directory, got none; free some, publishers will try again",
            status="RESOURCE_EXHAUSTED",
        )
    return StoreError(
        f"Store needs a journal that can be written, got {error}; see the disk, publishers will try again",
        status="UNAVAILABLE",
    )
