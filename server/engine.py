"""DuckDB over one snapshot: SQL for each table as the rows of its segments and of the journal's tail.

A connection reads below the directory of segments and nowhere else, whatever the query says.
"""

# ruff: noqa: S608 - SQL is put together from our own names, numbers and quoted literals alone

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

from gradiometer.server import tables
from gradiometer.server.segments import Segment, check, size_of
from gradiometer.server.snapshot import Snapshot

__all__ = ["Engine", "identifiers", "literal"]

_SETTINGS = (
    "enable_external_access = false",
    "autoinstall_known_extensions = false",
    "python_enable_replacements = false",  # else a query could name variables of the code that calls
    "TimeZone = 'UTC'",
    "lock_configuration = true",
)


class Engine:
    """A DuckDB connection that knows a snapshot. A context manager.

    Args:
        directory: the directory of segments.
        snapshot: what to read.
        checked: paths of segments whose bytes were compared with the manifest already; grows.
    """

    def __init__(self, directory: Path, snapshot: Snapshot, checked: set[str]) -> None:
        self._directory = directory.absolute()
        self._snapshot = snapshot
        self._checked = checked
        self._db = duckdb.connect(":memory:", config={"threads": max(1, (os.cpu_count() or 2) // 2)})
        self._db.execute(f"SET allowed_directories = [{literal(str(self._directory))}]")
        for setting in _SETTINGS:
            self._db.execute(f"SET {setting}")
        self._tails: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def source(self, table: str, first_step: int = 0, last_step: int = 2**63 - 1) -> str:
        """SQL for a table's rows, those of other steps left out where that saves reading a file.

        Raises:
            StoreError: if a segment that it needs is missing or cut short.
        """
        self._register_tail(table)
        files = []
        for segment in self._snapshot.segments.get(table, ()):
            if segment.last_step >= first_step and segment.first_step <= last_step:
                self._check(segment)
                files.append(literal(str(self._directory / segment.path)))
        stored = f" UNION ALL BY NAME SELECT * FROM read_parquet([{', '.join(files)}], union_by_name = true)"
        return f"(SELECT * FROM tail_{table}{stored if files else ''})"

    def is_empty(self, table: str) -> bool:
        """True where the snapshot has no row of a table."""
        self._register_tail(table)
        return not self._snapshot.segments.get(table) and not self._tails[table]

    def register(self, name: str, table: Any) -> None:
        """Give an Arrow table a name in the queries."""
        self._db.register(name, table)

    def execute(self, query: str) -> None:
        """Run a statement that has no result."""
        self._db.execute(query)

    def fetch(self, query: str) -> Any:
        """The result of a query, a `pyarrow.Table`.

        Raises:
            StoreError: if a segment is damaged; the message names it.
            ValueError: if DuckDB does not take the query.
        """
        with self._explained():
            return self._db.sql(query).to_arrow_table()

    def check_query(self, query: str) -> None:
        """Refuse what is not one SELECT.

        Raises:
            ValueError: if it is not.
        """
        with self._explained():
            kinds = [statement.type for statement in self._db.extract_statements(query)]
        if kinds != [duckdb.StatementType.SELECT]:
            found = " and ".join(kind.name for kind in kinds) or "nothing"
            raise ValueError(f"sql needs a query that is one SELECT, got {found}; ask one question at a time")

    def _register_tail(self, table: str) -> None:
        if table not in self._tails:
            parts = [tables.build(table, row.run, self._snapshot.tail[row.run_key]) for row in self._snapshot.runs]
            tail = pa.concat_tables([tables.empty(table), *parts]).unify_dictionaries()
            self.register(f"tail_{table}", tail)
            self._tails[table] = tail.num_rows

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
            raise _not_taken(error) from error
        except duckdb.Error as error:
            for segments in self._snapshot.segments.values():
                for segment in segments:
                    check(self._directory, segment)
            raise _not_taken(error) from error

    def _check(self, segment: Segment) -> None:
        """Compare a file with the manifest: its bytes the first time that it is read, its size from then on.

        DuckDB can't tell changed numbers from numbers: floats hardly compress, and carry no checksum that it reads.
        """
        if segment.path in self._checked and size_of(self._directory, segment) == segment.bytes:
            return
        check(self._directory, segment)
        self._checked.add(segment.path)


def literal(text: str) -> str:
    """A string as SQL writes it.

    Example:
        >>> print(literal("it's"))
        'it''s'
    """
    return "'" + text.replace("'", "''") + "'"


def identifiers(values: Sequence[str]) -> str:
    """Column names as SQL writes them, separated by commas."""
    return ", ".join('"' + value.replace('"', '""') + '"' for value in values)


def _not_taken(error: duckdb.Error) -> ValueError:
    first = str(error).strip().splitlines()[0]
    return ValueError(f"sql needs a query that DuckDB takes, got error={first!r}; correct the query")
