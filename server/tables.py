"""The store's tables: their columns, from the catalogue, and batches turned into their rows.

Every table begins with ``run`` and ``step``; ``arrival`` says which batch a row came with and never leaves the store.

* ``layers``: a layer at a step; one column a travelling statistic, in true values whatever the step's unit. Null: the
  batch had no such column. Columns that grow with the gradients are float64: float32 has no squares of extreme ones.
* ``steps``: a step; the catalogue's scalars as float64 columns, the user's own in the map ``scalars``.
* ``histograms``, ``examples``, ``events``, ``coverage``: as their messages; ``layer`` is null for the whole model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import column_arrays, scalar_arrays
from gradiometer.protos.run_pb2 import Run
from gradiometer.stats_core import catalog

__all__ = ["SCHEMAS", "Arrived", "build", "empty", "narrowed"]

Arrived = tuple[int, StepBatch]

_NAME = pa.dictionary(pa.int32(), pa.string())
_TEXT, _WHOLE, _INDEX, _COUNT, _NUMBER = pa.string(), pa.int64(), pa.int32(), pa.uint64(), pa.float64()
_OF_LAYER = {"run": _NAME, "step": _WHOLE, "layer": _NAME, "layer_index": _INDEX, "arrival": _WHOLE}
_OF_TIME = {"run": _NAME, "step": _WHOLE, "unix_nanos": _WHOLE, "arrival": _WHOLE}
_BUCKETS = {
    "positive_index": pa.list_(_INDEX),
    "positive_count": pa.list_(_COUNT),
    "negative_index": pa.list_(_INDEX),
    "negative_count": pa.list_(_COUNT),
}
_UNCOVERED = pa.struct({"parameter": _TEXT, "num_params": _COUNT, "reason": _TEXT}.items())

_FIELDS: dict[str, dict[str, Any]] = {
    "layers": _OF_LAYER | {row.name: _NUMBER if row.power else pa.float32() for row in catalog.WIRE},
    "steps": _OF_TIME | {row.name: _NUMBER for row in catalog.SCALARS} | {"scalars": pa.map_(_TEXT, _NUMBER)},
    "histograms": _OF_LAYER
    | {"statistic": _NAME, "schema": _INDEX, "zero_threshold": _NUMBER, "zero_count": _COUNT}
    | _BUCKETS,
    "examples": _OF_LAYER | {"place": _INDEX, "example_id": _TEXT, "sq_norm": _NUMBER},
    "events": _OF_TIME | {"kind": _TEXT, "text": _TEXT},
    "coverage": _OF_TIME | {"num_params": _COUNT, "num_params_measured": _COUNT, "uncovered": pa.list_(_UNCOVERED)},
}
SCHEMAS: dict[str, Any] = {table: pa.schema(fields.items()) for table, fields in _FIELDS.items()}
"""Table → its Arrow schema."""

_SCALARS = frozenset(row.name for row in catalog.SCALARS)


def empty(table: str) -> Any:
    """A table of no rows."""
    return SCHEMAS[table].empty_table()


def build(table: str, run: Run, arrived: Sequence[Arrived]) -> Any:
    """The rows that batches of one run make in a table.

    Args:
        table: a name in `SCHEMAS`.
        run: the run as registered.
        arrived: its batches, each with the number of its arrival.

    Returns:
        A `pyarrow.Table`; ``layers`` is sorted by layer, then step, so that one layer's series is read in one go.
    """
    return _BUILDERS[table](run, arrived)


def narrowed(table: Any) -> Any:
    """A table as it is kept in a file: columns whose every number is a float32 as such, for half the room.

    Nothing is lost: read together with others of its kind, a column is float64 again.
    """
    for place, field in enumerate(table.schema):
        if field.type != pa.float64():
            continue
        numbers = table[field.name].to_numpy()
        with np.errstate(over="ignore"):
            short = numbers.astype(np.float32)
        if np.array_equal(short.astype(np.float64), numbers, equal_nan=True):
            column = pc.cast(table[field.name], pa.float32(), safe=False)
            table = table.set_column(place, field.with_type(pa.float32()), column)
    return table


def _layers(run: Run, arrived: Sequence[Arrived]) -> Any:
    num_layers = len(run.layers)
    arrived = [(arrival, batch) for arrival, batch in arrived if batch.columns]
    steps = _joined([np.array(batch.steps, np.int64) for _, batch in arrived], np.int64)
    order = np.argsort(steps, kind="stable")
    columns = [column_arrays(batch) for _, batch in arrived]
    data: dict[str, Any] = {
        "step": np.tile(steps[order], num_layers),
        "layer_index": np.repeat(np.arange(num_layers, dtype=np.int32), len(steps)),
        "arrival": np.tile(_arrivals(arrived)[order], num_layers),
    }
    data["run"] = _named([run.run_id], np.zeros(len(data["step"]), np.int32))
    data["layer"] = _named([layer.name for layer in run.layers], data["layer_index"])
    for row in catalog.WIRE:
        kind = SCHEMAS["layers"].field(row.name).type
        data[row.name] = _column(row.name, columns, arrived, num_layers, order, kind)
    return _table("layers", data)


def _column(
    name: str,
    columns: Sequence[dict[str, np.ndarray]],
    arrived: Sequence[Arrived],
    num_layers: int,
    order: np.ndarray,
    kind: Any,
) -> Any:
    """One column, layer-major; null where a batch does not have it, which is not the same as NaN."""
    lacks = [name not in batch for batch in columns]
    if all(lacks):
        return pa.nulls(len(order) * num_layers, kind)
    sizes = [len(batch.steps) for _, batch in arrived]
    values = np.concatenate(
        [
            batch[name] if name in batch else np.zeros((size, num_layers), np.float32)
            for batch, size in zip(columns, sizes, strict=True)
        ]
    )
    mask = np.tile(np.repeat(lacks, sizes)[order], num_layers) if any(lacks) else None
    return pa.array(values[order].T.ravel().astype(kind.to_pandas_dtype(), copy=False), mask=mask)


def _steps(run: Run, arrived: Sequence[Arrived]) -> Any:
    arrived = [(arrival, batch) for arrival, batch in arrived if batch.steps]
    scalars = [scalar_arrays(batch) for _, batch in arrived]
    sizes = [len(batch.steps) for _, batch in arrived]
    data: dict[str, Any] = {
        "step": _joined([np.array(batch.steps, np.int64) for _, batch in arrived], np.int64),
        "unix_nanos": _joined([np.array(batch.unix_nanos, np.int64) for _, batch in arrived], np.int64),
        "arrival": _arrivals(arrived),
    }
    data["run"] = _named([run.run_id], np.zeros(len(data["step"]), np.int32))
    for row in catalog.SCALARS:
        lacks = np.repeat([row.name not in batch for batch in scalars], sizes).astype(bool)
        parts = [batch.get(row.name, np.zeros(size)) for batch, size in zip(scalars, sizes, strict=True)]
        data[row.name] = pa.array(_joined(parts, np.float64), mask=lacks)
    offsets, names = [0], list[str]()
    values: list[float] = []
    for batch, size in zip(scalars, sizes, strict=True):
        own = sorted(batch.keys() - _SCALARS)
        for index in range(size):
            names.extend(own)
            values.extend(float(batch[name][index]) for name in own)
            offsets.append(len(names))
    data["scalars"] = pa.MapArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(names, pa.string()), pa.array(values, pa.float64())
    )
    return _table("steps", data)


def _histograms(run: Run, arrived: Sequence[Arrived]) -> Any:
    return _rows(
        "histograms",
        [
            {
                "run": run.run_id,
                "step": batch.steps[item.step_index],
                "layer": run.layers[item.layer].name,
                "layer_index": item.layer,
                "arrival": arrival,
                "statistic": item.statistic,
                "schema": item.schema,
                "zero_threshold": item.zero_threshold,
                "zero_count": item.zero_count,
            }
            | {name: list(getattr(item, name)) for name in _BUCKETS}
            for arrival, batch in arrived
            for item in batch.histograms
        ],
    )


def _examples(run: Run, arrived: Sequence[Arrived]) -> Any:
    return _rows(
        "examples",
        [
            {
                "run": run.run_id,
                "step": batch.steps[item.step_index],
                "layer": run.layers[item.layer].name if item.layer >= 0 else None,
                "layer_index": item.layer,
                "arrival": arrival,
                "place": item.place,
                "example_id": item.example_id,
                "sq_norm": item.sq_norm,
            }
            for arrival, batch in arrived
            for item in batch.examples
        ],
    )


def _events(run: Run, arrived: Sequence[Arrived]) -> Any:
    return _rows(
        "events",
        [
            {"run": run.run_id, "step": e.step, "unix_nanos": e.unix_nanos, "arrival": arrival}
            | {"kind": e.kind, "text": e.text}
            for arrival, batch in arrived
            for e in batch.events
        ],
    )


def _coverage(run: Run, arrived: Sequence[Arrived]) -> Any:
    return _rows(
        "coverage",
        [
            {
                "run": run.run_id,
                "step": batch.steps[0] if batch.steps else max((event.step for event in batch.events), default=0),
                "unix_nanos": batch.unix_nanos[0] if batch.steps else 0,
                "arrival": arrival,
                "num_params": batch.coverage.num_params,
                "num_params_measured": batch.coverage.num_params_measured,
                "uncovered": [
                    {"parameter": item.parameter, "num_params": item.num_params, "reason": item.reason}
                    for item in batch.coverage.uncovered
                ],
            }
            for arrival, batch in arrived
            if batch.HasField("coverage")
        ],
    )


_BUILDERS: dict[str, Callable[[Run, Sequence[Arrived]], Any]] = {
    "layers": _layers,
    "steps": _steps,
    "histograms": _histograms,
    "examples": _examples,
    "events": _events,
    "coverage": _coverage,
}


def _arrivals(arrived: Sequence[Arrived]) -> np.ndarray:
    return np.repeat(np.array([arrival for arrival, _ in arrived], np.int64), [len(b.steps) for _, b in arrived])


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _named(names: Sequence[str], indices: np.ndarray) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(names, pa.string()))


def _table(name: str, data: dict[str, Any]) -> Any:
    return pa.table({field.name: data[field.name] for field in SCHEMAS[name]}, schema=SCHEMAS[name])


def _rows(name: str, rows: Sequence[dict[str, Any]]) -> Any:
    return pa.Table.from_pylist(rows, schema=SCHEMAS[name])
