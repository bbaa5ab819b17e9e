"""The store: what a server asks of one, and the embedded one (SQLite journal, Parquet segments, DuckDB)."""

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, Self

import structlog

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import Run
from gradiometer.server import segments
from gradiometer.server.datadir import DataDirectory, sync_directory
from gradiometer.server.journal import Entry, Journal
from gradiometer.server.meters import Meters
from gradiometer.server.query import Reader
from gradiometer.server.roller import Roller, backlog
from gradiometer.server.settings import Settings
from gradiometer.server.snapshot import take
from gradiometer.server.writer import Writer

__all__ = ["EmbeddedStore", "Store", "open_readonly"]

_log = structlog.get_logger("gradiometer.store")


class Store(Protocol):
    """What the services need of a store. Every method may be called from any thread."""

    def register(self, run: Run) -> "Future[tuple[Run, bool]]":
        """Keep a run; the future holds it as kept, and whether it is new."""
        ...

    def run(self, run_id: str) -> Run | None:
        """A registered run, or None."""
        ...

    def run_ids(self) -> Collection[str]:
        """Ids of all registered runs."""
        ...

    def durable_sequence(self, run_id: str, collector_id: str) -> int:
        """All batches of the collector up to this one are on disk."""
        ...

    def append(self, entry: Entry) -> "Future[bool]":
        """Make a checked batch durable: True once it is on disk, False if it was before."""
        ...

    @property
    def queued_bytes(self) -> int:
        """What waits to be made durable."""
        ...

    def list_runs(self) -> list[RunStatus]:
        """The runs, newest first."""
        ...

    def read(
        self,
        run_id: str,
        *,
        first_step: int = 0,
        last_step: int | None = None,
        layers: Sequence[str] = (),
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> Iterator[StepBatch]:
        """A range of steps of one run, ascending, in parts."""
        ...

    def sql(self, query: str, *, runs: Collection[str] | None = None) -> Any:
        """The result of a query over the tables, a `pyarrow.Table`."""
        ...

    def close(self) -> None:
        """Make what is queued durable, then let go."""
        ...


class EmbeddedStore:
    """A store in one directory, for one server. A context manager.

    Args:
        settings: ``data`` and the roller's.
        meters: where it counts; its own where none is given.

    Raises:
        StoreError: if the directory is held by another server, of another format, or can't be used.
    """

    def __init__(self, settings: Settings, meters: Meters | None = None) -> None:
        self.meters = meters or Meters()
        self._directory = DataDirectory(settings.data)
        try:
            self._journal = Journal(self._directory.journal)
            self._directory.segments.mkdir(exist_ok=True)
            sync_directory(settings.data)
            self._recover()
            self._reader = Reader(settings.data)
            self._writer = Writer(self._journal, self.meters)
        except BaseException:
            self._directory.close()
            raise
        self._roller = Roller(
            self._directory,
            self._writer,
            settings,
            self.meters,
            lambda: {row.run_key: row for row in self._journal.runs.values()},
        )
        self.meters.watch(queued_bytes=lambda: self._writer.queued_bytes, backlog=self._backlog)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(self, run: Run) -> "Future[tuple[Run, bool]]":
        """Keep a run; the future holds it as kept and whether it is new, or a `PeerFault`."""
        return self._writer.call(lambda journal: journal.register(run))

    def run(self, run_id: str) -> Run | None:
        """A registered run, or None."""
        row = self._journal.runs.get(run_id)
        return row.run if row else None

    def run_ids(self) -> Collection[str]:
        """Ids of all registered runs."""
        return list(self._journal.runs)

    def durable_sequence(self, run_id: str, collector_id: str) -> int:
        """All batches of the collector up to this one are on disk."""
        return self._journal.durable_sequence(run_id, collector_id)

    def append(self, entry: Entry) -> "Future[bool]":
        """Make a checked batch durable: True once it is on disk, False if it was before, or a `StoreError`."""
        return self._writer.append(entry)

    @property
    def queued_bytes(self) -> int:
        """What waits to be made durable."""
        return self._writer.queued_bytes

    def list_runs(self) -> list[RunStatus]:
        """The runs, newest first."""
        return self._reader.list_runs()

    def read(
        self,
        run_id: str,
        *,
        first_step: int = 0,
        last_step: int | None = None,
        layers: Sequence[str] = (),
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> Iterator[StepBatch]:
        """A range of steps of one run; see `Reader.read`."""
        return self._reader.read(
            run_id, first_step=first_step, last_step=last_step, layers=layers, columns=columns, limit=limit
        )

    def sql(self, query: str, *, runs: Collection[str] | None = None) -> Any:
        """The result of a query over the tables; see `Reader.sql`."""
        return self._reader.sql(query, runs=runs)

    def roll(self) -> int:
        """Move everything that is journalled into segments now; returns the number written."""
        return self._roller.roll(everything=True)

    def close(self) -> None:
        """End the roller, commit what is queued, then let go of the directory."""
        self._roller.close()
        self._writer.close()
        self._journal.close()
        self._directory.close()

    def _recover(self) -> None:
        snapshot = take(self._directory.journal, tail=False)
        listed = {segment.path for group in snapshot.segments.values() for segment in group}
        deleted = segments.delete_garbage(self._directory.segments, listed)
        if deleted:
            _log.info("deleted what a crash left behind", files=deleted)
        for path in sorted(listed):
            if not (self._directory.segments / path).is_file():
                _log.error("a segment is missing; queries that need it will fail", path=path)

    def _backlog(self) -> tuple[int, int]:
        try:
            rows = backlog(self._directory.journal).values()
        except sqlite3.Error:
            return 0, 0
        return sum(size for size, _, _ in rows), sum(batches for _, batches, _ in rows)


def open_readonly(data: Path) -> Reader:
    """The data directory of a server that may be running, to read; a context manager.

    Raises:
        StoreError: if it is none, or of another format.
    """
    return Reader(data)
