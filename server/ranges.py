"""A range of steps read back as the messages that travelled: columnar, ascending, in parts that fit the wire."""

# ruff: noqa: S608 - SQL is put together from our own names, numbers and quoted literals alone

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from gradiometer.protos.batch_pb2 import Event, Histogram, StepBatch, TopExample
from gradiometer.protos.columns import COLUMN_DTYPE, pack_batch
from gradiometer.protos.run_pb2 import Coverage, Run, Uncovered
from gradiometer.server.engine import Engine, identifiers
from gradiometer.stats_core import catalog

__all__ = ["LAST_STEP", "Selection", "read_range"]

LAST_STEP = 2**63 - 1
_PART_BYTES = 2 << 20
_PARTS_AT_ONCE = 8
_SCALARS = tuple(row.name for row in catalog.SCALARS)


@dataclass(frozen=True)
class Selection:
    """What is wanted of a run.

    Attributes:
        run: the run as registered.
        first_step: first step wanted.
        last_step: last step wanted, included.
        layers: indices of the layers wanted, ascending; empty for all.
        columns: names of the columns wanted.
        limit: at most so many steps, the last ones; None for all.
    """

    run: Run
    first_step: int
    last_step: int
    layers: tuple[int, ...]
    columns: tuple[str, ...]
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
        per_step = 4 * selection.width * len(selection.columns) + 8 * (2 + len(steps.scalars))
        per_part = max(1, _PART_BYTES // per_step)
        # What happened between two measured steps goes with the later one; what came after the last, with the last.
        since = selection.first_step if selection.limit is None or not len(steps.step) else int(steps.step[0])
        bounds = range(0, len(steps.step), per_part * _PARTS_AT_ONCE)
        for start in bounds:
            window = steps.slice(start, start + per_part * _PARTS_AT_ONCE)
            columns = _columns(engine, selection, window)
            for first in range(0, len(window.step), per_part):
                part = window.slice(first, first + per_part)
                is_last = start + first + len(part.step) == len(steps.step)
                until = selection.last_step if is_last else int(part.step[-1])
                cut = {name: values[first : first + per_part] for name, values in columns.items()}
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


def _columns(engine: Engine, selection: Selection, window: _Steps) -> dict[str, np.ndarray]:
    """The columns of some steps, shape ``(steps, layers)`` each; those that no batch had are left out."""
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
    columns = {}
    for name in selection.columns:
        if found[name].null_count == found.num_rows:
            continue
        values = np.full((len(window.step), selection.width), np.nan, COLUMN_DTYPE)
        values[where] = _floats(found[name])[ours]
        columns[name] = values
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
    first, last = int(part.step[0]), int(part.step[-1])
    for table in ("histograms", "examples"):
        if engine.is_empty(table):
            continue
        rows = engine.fetch(
            f"SELECT * FROM {engine.source(table, first, last)} WHERE step BETWEEN {first} AND {last} "
            "ORDER BY arrival, step, layer_index"
        )
        for row in rows.to_pylist():
            index = place.get((row["step"], row["arrival"]))
            layer = row["layer_index"]
            if index is None or (selection.layers and layer >= 0 and layer not in selection.layers):
                continue
            if table == "examples":
                batch.examples.append(
                    TopExample(
                        step_index=index,
                        layer=layer,
                        place=row["place"],
                        example_id=row["example_id"],
                        sq_norm=row["sq_norm"],
                    )
                )
            elif row["statistic"] in selection.columns or len(selection.columns) == len(catalog.WIRE):
                fields = set(Histogram.DESCRIPTOR.fields_by_name) & row.keys() - {"layer"}
                batch.histograms.append(
                    Histogram(step_index=index, layer=layer, **{name: row[name] for name in fields})
                )


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
