"""One instant of a data directory: its runs, the segments that the manifest lists, and the journal's tail."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.server.journal import RunRow, connect, read_runs
from gradiometer.server.segments import Segment
from gradiometer.server.tables import Arrived

__all__ = ["Snapshot", "take"]

_SEGMENTS = (
    "SELECT path, kind, first_step, last_step, first_arrival, last_arrival, rows, bytes, sha256 FROM segments "
    "WHERE run_key = ? AND last_step >= ? AND first_step <= ? ORDER BY first_step, path"
)
_TAIL = "SELECT arrival, body FROM journal WHERE run_key = ? AND last_step >= ? AND first_step <= ? ORDER BY arrival"


@dataclass(frozen=True)
class Snapshot:
    """What the data directory held at one instant.

    Attributes:
        runs: the runs asked for, in the order of registration.
        segments: table → its segments of those runs, by first step.
        tail: run key → its batches that are in no segment.
    """

    runs: tuple[RunRow, ...]
    segments: dict[str, list[Segment]]
    tail: dict[int, list[Arrived]]


def take(
    journal: Path,
    run_ids: Collection[str] | None = None,
    *,
    first_step: int = 0,
    last_step: int = 2**63 - 1,
    tail: bool = True,
) -> Snapshot:
    """Read a snapshot in one transaction.

    Args:
        journal: the SQLite file.
        run_ids: the runs wanted; None for all. Those that are not there are left out.
        first_step: segments and batches that end before it are left out.
        last_step: those that begin after it are.
        tail: whether to read the journal's batches.

    Raises:
        sqlite3.Error: if the journal can't be read.
    """
    db = connect(journal)
    try:
        db.execute("BEGIN")
        runs = tuple(row for row in read_runs(db) if run_ids is None or row.run.run_id in run_ids)
        segments: dict[str, list[Segment]] = {}
        arrived: dict[int, list[Arrived]] = {}
        for row in runs:
            bounds = (row.run_key, first_step, last_step)
            for values in db.execute(_SEGMENTS, bounds):
                segment = Segment(*values)
                segments.setdefault(segment.kind, []).append(segment)
            bodies = db.execute(_TAIL, bounds) if tail else ()
            arrived[row.run_key] = [(arrival, StepBatch.FromString(body)) for arrival, body in bodies]
        return Snapshot(runs, segments, arrived)
    finally:
        db.close()
