"""Segments: sorted Parquet files of one table of one run, each whole or not there at all.

A file gets its final name only after its bytes are synced, and counts only once the manifest lists it
(`gradiometer.server.journal`). What a crash leaves behind is in neither and is deleted at the next start.
"""

import hashlib
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradiometer.server.datadir import sync_directory
from gradiometer.stats_core.errors import StoreError

__all__ = ["Segment", "check", "delete_garbage", "size_of", "write"]

_ROW_GROUP = 128 * 1024


@dataclass(frozen=True)
class Segment:
    """A row of the manifest.

    Attributes:
        path: of the file, relative to the directory of segments.
        kind: the table that its rows belong to.
        first_step: the lowest step in it.
        last_step: the highest.
        first_arrival: the lowest arrival in it.
        last_arrival: the highest.
        rows: its rows.
        bytes: its size.
        sha256: of its bytes, in hex.
    """

    path: str
    kind: str
    first_step: int
    last_step: int
    first_arrival: int
    last_arrival: int
    rows: int
    bytes: int
    sha256: str


def write(directory: Path, run_id: str, kind: str, table: Any) -> Segment:
    """Write a table of one or more rows as a segment; when it returns, the file is on disk under its name.

    Raises:
        OSError: if the disk fails; nothing is left behind but what `delete_garbage` removes.
    """
    steps, arrivals = pc.min_max(table["step"]).as_py(), pc.min_max(table["arrival"]).as_py()
    # A token makes the name new even where a crash left a file of the same steps.
    name = f"{kind}-{steps['min']}-{steps['max']}-{secrets.token_hex(4)}.parquet"
    folder = directory / run_id
    if not folder.exists():
        folder.mkdir(parents=True)
        sync_directory(directory)
    # Numbers hardly repeat: a dictionary of them takes six times as long to write, and half as much room again.
    named = [field.name for field in table.schema if pa.types.is_dictionary(field.type)]
    # Parquet's least and largest number pass over NaN: a reader that trusts them finds no NaN where there is one.
    counted = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
    options = {"compression": "zstd", "use_dictionary": named, "write_statistics": counted}
    temporary = folder / f"{name}.tmp"
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, row_group_size=_ROW_GROUP, **options)
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
        temporary.rename(folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(folder)
    return Segment(
        f"{run_id}/{name}",
        kind,
        steps["min"],
        steps["max"],
        arrivals["min"],
        arrivals["max"],
        table.num_rows,
        size,
        digest,
    )


def delete_garbage(directory: Path, listed: Collection[str]) -> list[str]:
    """Delete the segments, whole or half-written, that the manifest does not list; returns what was deleted."""
    deleted = []
    for path in sorted([*directory.glob("*/*.parquet"), *directory.glob("*/*.parquet.tmp")]):
        name = path.relative_to(directory).as_posix()
        if name not in listed:
            path.unlink()
            deleted.append(name)
    return deleted


def check(directory: Path, segment: Segment) -> None:
    """Compare a file with the manifest.

    Raises:
        StoreError: if it is missing or its bytes are not those that were written.
    """
    path = directory / segment.path
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(
            f"Store needs its segment, got {str(path)!r} ({error.strerror}); restore the file from a copy",
            status="DATA_LOSS",
        ) from None
    if digest != segment.sha256:
        raise StoreError(
            f"Store needs its segment as it was written, got {str(path)!r} with other bytes; "
            "restore the file from a copy",
            status="DATA_LOSS",
        )


def size_of(directory: Path, segment: Segment) -> int:
    """The size of its file now; -1 where there is none."""
    try:
        return (directory / segment.path).stat().st_size
    except OSError:
        return -1
