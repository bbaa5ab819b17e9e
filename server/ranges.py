"""A range of steps read back as the messages that travelled: columnar, ascending, in parts that fit the wire."""

# ruff: noqa: S608 - SQL is put together from our own names, numbers and quoted literals alone

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc

from gradiometer.protos.batch_pb2 import Event, Histogram, StepBatch, TopExample
from gradiometer.protos.columns import COLUMN_DTYPE, UNIT_EXPONENT, in_unit, pack_batch
from gradiometer.protos.run_pb2 import Coverage, Run, Uncovered
from gradiometer.server.engine import Engine, identifiers, literal
from gradiometer.stats_core import catalog

__all__ = ["LAST_STEP", "Selection", "read_range"]

LAST_STEP = 2**63 - 1
_PART_BYTES = 2 << 20
_PARTS_AT_ONCE = 8
_SCALARS = tuple(row.name for row in catalog.SCALARS)
_HISTOGRAM_FIELDS = tuple(set(Histogram.DESCRIPTOR.fields_by_name) - {"step_index", "layer"})
_ORDERS = {"histograms": "step, statistic, layer_index", "examples": "step, layer_index, place"}
_HISTOGRAM_BYTES, _BUCKET_BYTES = 64, 6


@dataclass(frozen=True)
class Selection:
    """What is wanted of a run.

    Attributes:
        run: the run as registered.
        first_step: first step wanted.
        last_step: last step wanted, included.
        layers: indices of the layers wanted, ascending; empty for all.
        columns: names of the columns wanted.
        histograms: names of the histograms wanted.
        has_examples: True where single examples are wanted.
        limit: at most so many steps, the last ones; None for all.
    """

    run: Run
    first_step: int
    last_step: int
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    histograms: tuple[str, ...]
    has_examples: bool
    limit: int | None

    @property
    def width(self) -> int:
        """Number of layers in each column of the answer."""
        return len(self.layers) or len(self.run.layers)


@dataclass(frozen=True)
class _Steps:
    """The steps of the answer, each from the batch that it is read from."""

    step: np.ndarray
    unix_nanos: np.ndarray
    arrival: np.ndarray
    scalars: dict[str, np.ndarray]

    def slice(self, start: int, stop: int) -> "_Steps":
        part = {name: values[start:stop] for name, values in self.scalars.items()}
        return _Steps(self.step[start:stop], self.unix_nanos[start:stop], self.arrival[start:stop], part)


def read_range(engine: Engine, selection: Selection) -> Iterator[StepBatch]:
    """The selection from a snapshot of its run, in parts.

    Args:
        engine: knows the snapshot; closed when the parts have been read, or are read no further.
        selection: what is wanted.

    Yields:
        Parts in ascending order of steps; events and coverage come with the part whose steps they fall among.

    Raises:
        StoreError: if a segment is missing or damaged.
    """
    with engine:
        steps = _find_steps(engine, selection)
        # What happened between two measured steps goes with the later one; what came after the last, with the last.
        since = selection.first_step if selection.limit is None or not len(steps.step) else int(steps.step[0])
        cuts = _parts(_sizes(engine, selection, steps))
        while parts := list(islice(cuts, _PARTS_AT_ONCE)):
            start, stop = parts[0][0], parts[-1][1]
            columns = _columns(engine, selection, steps.slice(start, stop))
            for first, end in parts:
                part = steps.slice(first, end)
                until = selection.last_step if end == len(steps.step) else int(part.step[-1])
                cut = {name: values[first - start : end - start] for name, values in columns.items()}
                yield _message(engine, selection, part, cut, since, until)
                since = until + 1
        if not len(steps.step):
            batch = StepBatch(num_layers=selection.width, layer_indices=selection.layers)
            _add_events(engine, batch, selection.first_step, selection.last_step)
            if batch.events or batch.HasField("coverage"):
                yield batch


def _find_steps(engine: Engine, selection: Selection) -> _Steps:
    found = engine.fetch(
        f"SELECT * EXCLUDE (run) FROM {engine.source('steps', selection.first_step, selection.last_step)} "
        f"WHERE step BETWEEN {selection.first_step} AND {selection.last_step} "
        "QUALIFY row_number() OVER (PARTITION BY step ORDER BY unix_nanos DESC, arrival DESC) = 1 "
        "ORDER BY step DESC" + (f" LIMIT {selection.limit}" if selection.limit else "")
    )
    found = found.take(np.arange(found.num_rows)[::-1])
    scalars = {name: _floats(found[name]) for name in _SCALARS if found[name].null_count < found.num_rows}
    for index, pairs in enumerate(found["scalars"].to_pylist()):
        for name, value in pairs or ():
            scalars.setdefault(name, np.full(found.num_rows, np.nan))[index] = value
    return _Steps(found["step"].to_numpy(), found["unix_nanos"].to_numpy(), found["arrival"].to_numpy(), scalars)


def _sizes(engine: Engine, selection: Selection, steps: _Steps) -> np.ndarray:
    """Bytes that each step takes in a message, about."""
    sizes = np.full(len(steps.step), 4 * selection.width * len(selection.columns) + 8 * (2 + len(steps.scalars)))
    if selection.histograms and len(steps.step) and not engine.is_empty("histograms"):
        found = engine.fetch(
            "SELECT step, arrival, "
            f"CAST(sum({_HISTOGRAM_BYTES} + {_BUCKET_BYTES} * (len(positive_index) + len(negative_index))) AS BIGINT) "
            f"AS bytes FROM {_distributions(engine, selection, 'histograms', steps)} GROUP BY step, arrival"
        )
        known = dict(zip(zip(steps.step.tolist(), steps.arrival.tolist(), strict=True), range(len(sizes)), strict=True))
        for row in found.to_pylist():
            place = known.get((row["step"], row["arrival"]))
            if place is not None:
                sizes[place] += row["bytes"]
    return sizes


def _parts(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where to cut, so that a part is small enough or a single step."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _PART_BYTES, side="right")))
        yield start, stop
        start = stop


def _distributions(engine: Engine, selection: Selection, table: str, part: _Steps) -> str:
    """SQL for the rows of a table that belong to some steps and are wanted."""
    first, last = int(part.step[0]), int(part.step[-1])
    wanted = f"step BETWEEN {first} AND {last}"
    if selection.layers:
        wanted += f" AND (layer_index < 0 OR layer_index IN ({', '.join(map(str, selection.layers))}))"
    if table == "histograms":
        wanted += f" AND statistic IN ({', '.join(map(literal, selection.histograms))})"
    return f"(SELECT * FROM {engine.source(table, first, last)} WHERE {wanted})"


def _columns(engine: Engine, selection: Selection, window: _Steps) -> dict[str, np.ndarray]:
    """The columns of some steps, shape ``(steps, layers)`` each; those that no batch had are left out."""
    if not selection.columns:
        return {}
    first, last = int(window.step[0]), int(window.step[-1])
    chosen = f" AND layer_index IN ({', '.join(map(str, selection.layers))})" if selection.layers else ""
    found = engine.fetch(
        f"SELECT step, layer_index, arrival, {identifiers(selection.columns)} "
        f"FROM {engine.source('layers', first, last)} WHERE step BETWEEN {first} AND {last}{chosen}"
    )
    at = np.searchsorted(window.step, found["step"].to_numpy())
    at = np.minimum(at, len(window.step) - 1)
    # With a limit or a repeated step, rows come along that are not of the steps wanted.
    ours = window.arrival[at] == found["arrival"].to_numpy()
    ours &= window.step[at] == found["step"].to_numpy()
    layer = found["layer_index"].to_numpy()
    if selection.layers:
        layer = np.searchsorted(np.array(selection.layers), layer)
    where = (at[ours], layer[ours])
    # On the wire they are what they were when they came: float32, in the step's unit.
    exponents = None
    if UNIT_EXPONENT in window.scalars:
        exponents = np.nan_to_num(window.scalars[UNIT_EXPONENT]).astype(np.int64)
    columns = {}
    for name in selection.columns:
        if found[name].null_count == found.num_rows:
            continue
        values = np.full((len(window.step), selection.width), np.nan, COLUMN_DTYPE if exponents is None else np.float64)
        values[where] = _floats(found[name])[ours]
        columns[name] = values if exponents is None else in_unit(name, values, exponents)
    return columns


def _message(
    engine: Engine, selection: Selection, part: _Steps, columns: dict[str, np.ndarray], since: int, until: int
) -> StepBatch:
    batch = pack_batch(part.step.tolist(), part.unix_nanos.tolist(), selection.width, columns, _present(part.scalars))
    batch.layer_indices.extend(selection.layers)
    _add_distributions(engine, selection, batch, part)
    _add_events(engine, batch, since, until)
    return batch


def _present(scalars: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in scalars.items() if not np.isnan(values).all()}


def _add_distributions(engine: Engine, selection: Selection, batch: StepBatch, part: _Steps) -> None:
    place = {(step, arrival): index for index, (step, arrival) in enumerate(zip(part.step, part.arrival, strict=True))}
    for table in _wanted_tables(engine, selection):
        source = _distributions(engine, selection, table, part)
        for row in engine.fetch(f"SELECT * FROM {source} ORDER BY {_ORDERS[table]}").to_pylist():
            index = place.get((row["step"], row["arrival"]))
            if index is None:
                continue
            if table == "examples":
                fields = {name: row[name] for name in ("place", "example_id", "sq_norm")}
                batch.examples.append(TopExample(step_index=index, layer=row["layer_index"], **fields))
            else:
                fields = {name: row[name] for name in _HISTOGRAM_FIELDS}
                batch.histograms.append(Histogram(step_index=index, layer=row["layer_index"], **fields))


def _wanted_tables(engine: Engine, selection: Selection) -> list[str]:
    wanted = {"histograms": bool(selection.histograms), "examples": selection.has_examples}
    return [table for table, is_wanted in wanted.items() if is_wanted and not engine.is_empty(table)]


def _add_events(engine: Engine, batch: StepBatch, since: int, until: int) -> None:
    def rows(table: str) -> list[dict[str, Any]]:
        if engine.is_empty(table):
            return []
        source = engine.source(table, since, until)
        wanted = f"SELECT * FROM {source} WHERE step BETWEEN {since} AND {until} ORDER BY unix_nanos, arrival"
        return list(engine.fetch(wanted).to_pylist())

    for row in rows("events"):
        batch.events.append(Event(step=row["step"], unix_nanos=row["unix_nanos"], kind=row["kind"], text=row["text"]))
    for row in rows("coverage"):
        batch.coverage.CopyFrom(
            Coverage(
                num_params=row["num_params"],
                num_params_measured=row["num_params_measured"],
                uncovered=[Uncovered(**item) for item in row["uncovered"]],
            )
        )


def _floats(column: Any) -> np.ndarray:
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy())
