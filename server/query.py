"""Answers from a data directory: the segments of the manifest and the tail of the journal, merged.

Needs no lock and changes nothing, so it also reads a directory whose server runs, or has died. Each answer is of one
instant (`gradiometer.server.snapshot`): a roll exchanges journal rows for segments in one transaction.

A step may be stored twice (a job that was restarted from a checkpoint under the same run id). Both are kept; answers
show the one measured last, and of two measured at the same instant the one that arrived last.
"""

# ruff: noqa: S608 - SQL is put together from our own names, numbers and quoted literals alone

import re
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.server import tables
from gradiometer.server.datadir import check_format
from gradiometer.server.engine import Engine, literal
from gradiometer.server.ingest import unknown_run
from gradiometer.server.journal import RunRow, connect, read_runs
from gradiometer.server.ranges import LAST_STEP, Selection, read_range
from gradiometer.server.snapshot import Snapshot, take
from gradiometer.stats_core import catalog
from gradiometer.stats_core.errors import PeerFault, StoreError

__all__ = ["Reader"]

Result = TypeVar("Result")
_OF_STEPS = frozenset({"layers", "steps", "histograms", "examples"})
_COLUMNS = tuple(row.name for row in catalog.WIRE)
_HISTOGRAMS = tuple(row.name for row in catalog.STATISTICS if row.kind == "histogram")
_EXAMPLES = "outliers"
_KNOWN = dict.fromkeys((*_COLUMNS, *_HISTOGRAMS, _EXAMPLES), 0)


class Reader:
    """Reads a data directory; safe to use from several threads at once. A context manager.

    Args:
        data: the data directory of a server.

    Raises:
        StoreError: if it is none, or of another format.
    """

    def __init__(self, data: Path) -> None:
        check_format(data)
        self._journal = data / "journal.db"
        self._segments = data / "segments"
        self._checked: set[str] = set()
        self._distinct: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing stays open between questions."""

    def list_runs(self) -> list[RunStatus]:
        """The runs and how far each is, newest first."""
        rows = self._ask(lambda: _read_all(self._journal))
        rows.sort(key=lambda row: (row.run.started_unix_nanos, row.run_key), reverse=True)
        return [
            RunStatus(
                run=row.run,
                stored_steps=self._steps(row),
                last_step=max(row.last_step, 0),
                last_unix_nanos=row.last_unix_nanos,
            )
            for row in rows
        ]

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
        """A range of steps of one run, as it is stored now.

        Args:
            run_id: the run.
            first_step: first step wanted.
            last_step: last step wanted, included; None for no end.
            layers: names of the layers wanted; empty for all.
            columns: catalogue names of the columns and histograms wanted, and "outliers" for single examples; empty
                for all. What comes in histograms: `gradiometer.protos.distributions`.
            limit: at most so many steps, the last ones of the range; None for all.

        Returns:
            Parts of about 2 MB, in ascending order of steps. A column that no batch of a part had is left out;
            where only some had it, the others are NaN.

        Raises:
            PeerFault: if there is no such run, layer or column, naming those there are.
            StoreError: if a segment is missing or damaged.
        """
        first_step = min(first_step, LAST_STEP)  # the wire's numbers are wider than any step
        last = LAST_STEP if last_step is None else min(last_step, LAST_STEP)
        snapshot = self._ask(lambda: take(self._journal, {run_id}, first_step=first_step, last_step=last))
        if not snapshot.runs:
            known = [row.run.run_id for row in self._ask(lambda: _read_all(self._journal))]
            raise unknown_run("QueryRange", run_id, known)
        row = snapshot.runs[0]
        known_layers = {layer.name: index for index, layer in enumerate(row.run.layers)}
        indices = [_found("layer", name, known_layers) for name in layers]
        for name in columns:
            _found("column", name, _KNOWN)
        selection = Selection(
            row.run,
            first_step,
            last,
            tuple(sorted(set(indices))),
            tuple(name for name in _COLUMNS if not columns or name in columns),
            tuple(name for name in _HISTOGRAMS if not columns or name in columns),
            not columns or _EXAMPLES in columns,
            limit or None,
        )
        return read_range(Engine(self._segments, snapshot, self._checked), selection)

    def sql(self, query: str, *, runs: Collection[str] | None = None) -> Any:
        """The result of a query over the tables of `gradiometer.server.tables` and ``runs``.

        Args:
            query: one SELECT, in DuckDB's SQL.
            runs: ids of the runs that the tables hold; None for all.

        Returns:
            A `pyarrow.Table`.

        Raises:
            ValueError: if DuckDB does not take the query.
            StoreError: if a segment is missing or damaged.
        """
        snapshot = self._ask(lambda: take(self._journal, runs))
        with Engine(self._segments, snapshot, self._checked) as engine:
            engine.check_query(query)
            mentioned = {name.lower() for name in re.findall(r"\w+", query)}
            engine.register("runs", _runs_table(snapshot.runs))
            _define_views(engine, snapshot, [table for table in tables.SCHEMAS if table in mentioned])
            return engine.fetch(query)

    def raw_rows(self, run_id: str) -> int:
        """Rows of the table ``layers`` as they lie on disk, steps that were measured twice included.

        Raises:
            StoreError: if a segment is missing or damaged.
        """
        snapshot = self._ask(lambda: take(self._journal, {run_id}))
        with Engine(self._segments, snapshot, self._checked) as engine:
            return int(engine.fetch(f"SELECT count(*) AS n FROM {engine.source('layers')}")["n"][0].as_py())

    def _steps(self, row: RunRow) -> int:
        if not row.repeats:
            return row.stored_steps
        seen, distinct = self._distinct.get(row.run_key, (-1, 0))
        if seen != row.stored_steps:
            found = self.sql("SELECT count(*) AS n FROM steps", runs={row.run.run_id})
            distinct = found["n"][0].as_py()
            self._distinct[row.run_key] = (row.stored_steps, distinct)
        return distinct

    def _ask(self, question: Callable[[], Result]) -> Result:
        try:
            return question()
        except sqlite3.Error as error:
            raise StoreError(
                f"Store needs a journal that can be read, got {str(self._journal)!r} ({error}); "
                "start a server on the directory once, or restore the file from a copy"
            ) from error


def _read_all(journal: Path) -> list[RunRow]:
    db = connect(journal)
    try:
        return read_runs(db)
    finally:
        db.close()


def _found(what: str, name: str, known: dict[str, int]) -> int:
    if name not in known:
        shown = ", ".join(list(known)[:8]) + (", …" if len(known) > 8 else "")
        raise PeerFault(f"QueryRange needs {what}s that exist, got {what}={name[:140]!r}; there are {shown}")
    return known[name]


def _define_views(engine: Engine, snapshot: Snapshot, wanted: Sequence[str]) -> None:
    """Views without ``arrival``, and without the steps that were measured again later."""
    repeating = [literal(row.run.run_id) for row in snapshot.runs if row.repeats]
    if repeating and _OF_STEPS.intersection(wanted):
        engine.execute(
            f"CREATE TEMP TABLE latest AS SELECT run, step, arrival FROM {engine.source('steps')} "
            f"WHERE run IN ({', '.join(repeating)}) "
            "QUALIFY row_number() OVER (PARTITION BY run, step ORDER BY unix_nanos DESC, arrival DESC) = 1"
        )
    for table in wanted:
        source = engine.source(table)
        rows = f"SELECT * EXCLUDE (arrival) FROM {source}"
        if repeating and table in _OF_STEPS:
            listed = ", ".join(repeating)
            rows += (
                f" WHERE run NOT IN ({listed}) UNION ALL SELECT * EXCLUDE (arrival) "
                f"FROM {source} SEMI JOIN latest USING (run, step, arrival)"
            )
        engine.execute(f"CREATE TEMP VIEW {table} AS {rows}")


def _runs_table(rows: Sequence[RunRow]) -> Any:
    def of(row: RunRow) -> dict[str, Any]:
        run = row.run
        return {
            "run": run.run_id,
            "started_unix_nanos": run.started_unix_nanos,
            "framework": run.world.framework,
            "device": run.world.device,
            "engine": run.engine,
            "optimizer": run.optimizer,
            "temporal": run.temporal,
            "unit": run.unit,
            "tier": run.tier,
            "num_layers": len(run.layers),
            "num_params": run.coverage.num_params,
            "num_params_measured": run.coverage.num_params_measured,
            "last_step": row.last_step if row.last_step >= 0 else None,
            "last_unix_nanos": row.last_unix_nanos,
            "config": list(run.config.items()),
        }

    text, whole = pa.string(), pa.int64()
    schema = pa.schema(
        [("run", text), ("started_unix_nanos", whole)]
        + [(name, text) for name in ("framework", "device", "engine", "optimizer", "temporal", "unit", "tier")]
        + [
            (name, whole)
            for name in ("num_layers", "num_params", "num_params_measured", "last_step", "last_unix_nanos")
        ]
        + [("config", pa.map_(text, text))]
    )
    return pa.Table.from_pylist([of(row) for row in rows], schema=schema)
