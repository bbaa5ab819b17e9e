"""Batches on disk that no server has acknowledged yet: one SQLite file for each collector of a run.

A file outlives its process: whoever next reaches a server sends what is in it. The process that a file
belongs to, or that replays it, holds a lock on it (``flock`` on ``<name>.lock``, given back by the
operating system when the process dies), so that two never send the same file.
"""

import fcntl
import logging
import os
import secrets
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError

from gradiometer.protos.run_pb2 import Run

__all__ = ["Spool", "SpoolBusy", "directory", "leftovers", "new_collector_id", "trim"]

_log = logging.getLogger("gradiometer")

SUFFIX = ".spool"
_FORMAT = 1
_PAGE = 4096
_SCHEMA = (
    "CREATE TABLE collector (run BLOB NOT NULL, id TEXT NOT NULL, number_offset INTEGER NOT NULL)",
    "CREATE TABLE batch (number INTEGER PRIMARY KEY, body BLOB NOT NULL)",
)


class SpoolBusy(Exception):
    """Another process owns the file, or it is gone."""


def directory(environ: Mapping[str, str]) -> Path:
    """Where spools lie: ``GRADIOMETER_SPOOL``, else in the user's cache.

    Example:
        >>> directory({"GRADIOMETER_SPOOL": "/scratch/spool"})
        PosixPath('/scratch/spool')
    """
    if chosen := environ.get("GRADIOMETER_SPOOL"):
        return Path(chosen)
    home = Path(environ.get("HOME") or Path.cwd())
    cache = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return Path(environ.get("XDG_CACHE_HOME") or cache) / "gradiometer" / "spool"


def new_collector_id() -> str:
    """A random id: sequence numbers are counted for each."""
    return secrets.token_hex(8)


class Spool:
    """One file. It belongs to one `Outbox`, which calls it from one thread at a time.

    Attributes:
        path: the file.
        run: the run that the batches belong to.
        collector_id: whose batches they are.
        offset: a batch's sequence number on the wire is its number less this.
    """

    def __init__(self, path: Path, database: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self._database = database
        self._lock = lock
        body, self.collector_id, self.offset = database.execute(
            "SELECT run, id, number_offset FROM collector"
        ).fetchone()
        self.run = Run.FromString(body)

    @classmethod
    def create(
        cls, folder: Path, run: Run, collector_id: str, offset: int = 0, *, max_bytes: int = 256 << 20
    ) -> "Spool":
        """Make a new file, of at most ``max_bytes``.

        Raises:
            OSError: if the folder can't be written.
            sqlite3.Error: if the file can't.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / (collector_id + SUFFIX)
        lock = _lock(path)
        try:
            database = _connect(path, "rwc")
        except BaseException:
            _unlock(path, lock, remove=True)
            raise
        try:
            database.execute(f"PRAGMA page_size = {_PAGE}")
            with database:
                database.execute("BEGIN IMMEDIATE")
                for table in _SCHEMA:
                    database.execute(table)
                row = (run.SerializeToString(deterministic=True), collector_id, offset)
                database.execute("INSERT INTO collector VALUES (?, ?, ?)", row)
                database.execute(f"PRAGMA user_version = {_FORMAT}")
            # SQLite itself then answers "full", in the same way as a full disk does.
            database.execute(f"PRAGMA max_page_count = {max(8, max_bytes // _PAGE)}")
            return cls(path, database, lock)
        except BaseException:
            database.close()
            _unlock(path, lock, remove=True)
            raise

    @classmethod
    def open(cls, path: Path) -> "Spool":
        """Take over a file that a process left behind.

        Raises:
            SpoolBusy: if another process has it, or a newer version wrote it.
            sqlite3.Error: if it is damaged.
        """
        lock = _lock(path)
        database = None
        try:
            if not path.exists():
                raise SpoolBusy(path)
            database = _connect(path, "rw")
            if database.execute("PRAGMA user_version").fetchone()[0] > _FORMAT:
                raise SpoolBusy(path)
            if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                path.unlink()  # its owner died while making it: there is nothing in it
                raise SpoolBusy(path)
            spool = cls(path, database, lock)
            spool.numbers()  # if this can't be read, nobody could go on
        except BaseException as error:
            if database is not None:
                database.close()
            _unlock(path, lock)
            if isinstance(error, (TypeError, DecodeError)):
                raise sqlite3.DatabaseError("no collector in it") from error
            raise
        return spool

    def append(self, batches: Iterable[tuple[int, bytes]]) -> None:
        """Keep numbered batches; all or none.

        Raises:
            sqlite3.Error: if the disk, or what the spool may take of it, is full.
        """
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT INTO batch VALUES (?, ?)", batches)

    def read(self, number: int) -> bytes:
        """The batch of that number.

        Raises:
            sqlite3.Error: if the file is damaged.
        """
        row = self._database.execute("SELECT body FROM batch WHERE number = ?", (number,)).fetchone()
        if row is None:
            raise sqlite3.DatabaseError(f"batch {number} is not in it")
        return bytes(row[0])

    def forget(self, number: int) -> None:
        """Drop the batches up to that number."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute("DELETE FROM batch WHERE number <= ?", (number,))

    def renumber(self, collector_id: str, offset: int) -> None:
        """Let the batches be another collector's, with other sequence numbers."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute("UPDATE collector SET id = ?, number_offset = ?", (collector_id, offset))
        self.collector_id, self.offset = collector_id, offset

    def numbers(self) -> range:
        """Numbers of the batches in the file."""
        first, last = self._database.execute("SELECT min(number), max(number) FROM batch").fetchone()
        return range(0) if first is None else range(first, last + 1)

    def close(self, *, remove: bool = False) -> None:
        """Give the file back, or remove it."""
        with suppress(sqlite3.Error):
            self._database.close()
        _unlock(self.path, self._lock, remove=remove)

    def set_aside(self, why: str) -> Path:
        """Close the file and rename it to ``<name>.<why>``, where nobody sends it.

        Returns:
            The new path.
        """
        with suppress(sqlite3.Error):
            self._database.close()
        return _set_aside(self.path, self._lock, why)

    def abandon(self) -> None:
        """In a forked child: let the parent alone be the owner."""
        with suppress(OSError):
            os.close(self._lock)  # the lock stays with the parent's descriptor


def leftovers(folder: Path) -> Iterator[Spool]:
    """Spools that no living process owns, oldest first. A damaged one is set aside with a log line."""
    for path in _oldest_first(folder, "*" + SUFFIX):
        try:
            yield Spool.open(path)
        except (SpoolBusy, OSError):
            continue
        except sqlite3.Error as error:
            with suppress(OSError, SpoolBusy):
                aside = _set_aside(path, _lock(path), "damaged")
                _log.warning("a damaged spool was set aside as %s (%s); its measurements are lost", aside, error)


def trim(folder: Path, max_bytes: int) -> None:
    """Discard the oldest files that no process owns until the folder holds at most ``max_bytes``."""
    files = _oldest_first(folder, "*")
    excess = sum(files.values()) - max_bytes
    for path, size in files.items():
        if excess <= 0:
            return
        with suppress(OSError, SpoolBusy):
            _unlock(path, _lock(path), remove=True)
            excess -= size
            _log.warning("%s was discarded to keep %s within %d MiB", path.name, folder, max_bytes >> 20)


def _oldest_first(folder: Path, pattern: str) -> dict[Path, int]:
    """Files and their sizes in bytes."""
    found = []
    for path in folder.glob(pattern):
        if path.suffix != ".lock" and not path.name.endswith("-journal"):
            with suppress(OSError):  # its owner may remove it meanwhile
                status = path.stat()
                found.append((status.st_mtime, path, status.st_size))
    return {path: size for _, path, size in sorted(found)}


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection in autocommit: transactions are begun by hand, or by ``with``."""
    database = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=1.0
    )
    # One file with no companion while at rest. The process's death is survived in any mode; a power cut in this one.
    database.execute("PRAGMA journal_mode = DELETE")
    database.execute("PRAGMA synchronous = NORMAL")
    return database


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _lock(path: Path) -> int:
    """Own a spool file, there already or about to be made.

    Raises:
        SpoolBusy: if a living process owns it.
    """
    descriptor = os.open(_lock_path(path), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise SpoolBusy(path) from None
    return descriptor


def _unlock(path: Path, descriptor: int, *, remove: bool = False) -> None:
    # Removed while locked: whoever opened the lock file meanwhile finds the spool gone.
    if remove:
        path.unlink(missing_ok=True)
        path.with_name(path.name + "-journal").unlink(missing_ok=True)
    if remove or not path.exists():
        _lock_path(path).unlink(missing_ok=True)
    with suppress(OSError):
        os.close(descriptor)


def _set_aside(path: Path, descriptor: int, why: str) -> Path:
    aside = path.with_suffix("." + why)
    try:
        path.rename(aside)
    finally:
        _unlock(path, descriptor)
    return aside
