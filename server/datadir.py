"""The data directory: one server's at a time, of one format, and nobody else's."""

import fcntl
import os
from pathlib import Path

from gradiometer.stats_core.errors import StoreError

__all__ = ["FORMAT", "DataDirectory", "sync_directory"]

FORMAT = 1
_FORMAT_FILE = "FORMAT"
_LOCK_FILE = "LOCK"
_OURS = ("journal.db", "segments")


class DataDirectory:
    """A data directory, held by this process until `close` or its death.

    The lock is the operating system's, so a killed server leaves none behind. The format is checked
    before anything else is opened: a directory of another version is left exactly as it was.

    Args:
        path: the directory; made where it is missing.

    Raises:
        StoreError: if another process holds it, it is of another format, or it is no data directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            check_format(path, may_be_new=True)
            self._lock = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"Store needs a directory that it can write, got data={str(path)!r} ({error.strerror}); "
                "choose another with --data"
            ) from None
        try:
            self._take()
            check_format(path, may_be_new=True)
            if not (path / _FORMAT_FILE).exists():
                self._mark()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def journal(self) -> Path:
        """The SQLite file."""
        return self.path / _OURS[0]

    @property
    def segments(self) -> Path:
        """Where the Parquet files are."""
        return self.path / _OURS[1]

    def close(self) -> None:
        """Let go of the directory; once is enough."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StoreError(
                f"Store needs the data directory to itself, got data={str(self.path)!r} held by process {holder}; "
                "stop that server or choose another directory with --data"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _mark(self) -> None:
        temporary = self.path / f"{_FORMAT_FILE}.tmp"
        with temporary.open("w") as file:
            file.write(f"gradiometer-data {FORMAT}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path / _FORMAT_FILE)
        sync_directory(self.path)


def check_format(path: Path, *, may_be_new: bool = False) -> None:
    """Refuse a directory that this version can't read; it is not written to.

    Raises:
        StoreError: if it is of another format, or no data directory.
    """
    try:
        text = (path / _FORMAT_FILE).read_text().strip()
    except FileNotFoundError:
        if not may_be_new:
            raise StoreError(
                f"Store needs a data directory, got data={str(path)!r}; name the directory of a server with --data"
            ) from None
        for name in _OURS:
            if (path / name).exists():
                raise StoreError(
                    f"Store needs a data directory, got data={str(path)!r} with a {name!r} that is not its own; "
                    "name another directory with --data"
                ) from None
        return
    except (OSError, UnicodeDecodeError) as error:
        if may_be_new and isinstance(error, OSError):
            raise  # whoever wants to write says so in its own words
        reason = error.strerror if isinstance(error, OSError) else "its FORMAT is no text"
        raise StoreError(
            f"Store needs a data directory that it can read, got data={str(path)!r} ({reason}); "
            "name the directory of a server with --data"
        ) from None
    if text != f"gradiometer-data {FORMAT}":
        raise StoreError(
            f"Store needs data of format {FORMAT}, got data={str(path)!r} of {text[:40]!r}; "
            "use the version of gradiometer that wrote it, or choose another directory with --data"
        )


def sync_directory(path: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
