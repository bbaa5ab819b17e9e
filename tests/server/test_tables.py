"""The tables: schemas from the catalogue, and batches turned into rows."""

import math

import numpy as np
import pyarrow as pa
import pytest

from gradiometer.protos.batch_pb2 import Event, Histogram, StepBatch, TopExample
from gradiometer.protos.columns import column_arrays, pack_batch
from gradiometer.protos.run_pb2 import Coverage, Uncovered
from gradiometer.server.tables import SCHEMAS, build, empty, narrowed
from gradiometer.stats_core import catalog
from tests.server.batches import make_batch, make_run


def test_every_travelling_statistic_and_every_scalar_has_a_column() -> None:
    for row in catalog.WIRE:
        assert SCHEMAS["layers"].field(row.name).type == (pa.float64() if row.power else pa.float32())
    for scalar in catalog.SCALARS:
        assert SCHEMAS["steps"].field(scalar.name).type == pa.float64()
    for row in catalog.STATISTICS:
        if not row.travels:
            assert row.name not in SCHEMAS["layers"].names, "a ratio of one step is never stored"


def test_every_table_says_run_step_and_arrival() -> None:
    for schema in SCHEMAS.values():
        assert schema.names[:2] == ["run", "step"]
        assert "arrival" in schema.names


def wild(exponent: float) -> StepBatch:
    columns = {name: np.array([[1.5, math.nan]]) for name in ("count", "mean_sq_norm", "norm_max")}
    return pack_batch([7], [0], 2, columns, {"unit_exponent": np.array([exponent])})


def test_columns_are_true_values_whatever_the_unit_of_the_step() -> None:
    for exponent in (0.0, 100.0, -100.0, math.nan):
        found = build("layers", make_run(), [(1, wild(exponent))])
        power = 0.0 if math.isnan(exponent) else exponent
        assert found["count"].to_pylist()[0] == 1.5
        assert found["norm_max"].to_pylist()[0] == 1.5 * 2**power
        assert found["mean_sq_norm"].to_pylist()[0] == 1.5 * 2 ** (2 * power)
        assert math.isnan(found["mean_sq_norm"].to_pylist()[1])


def test_numbers_that_float32_holds_are_kept_as_such_and_others_are_not() -> None:
    plain = build("layers", make_run(), [(1, make_batch(1)), (2, wild(0.0))])
    kept = narrowed(plain)
    assert {kept.schema.field(row.name).type for row in catalog.WIRE} == {pa.float32()}
    for name in plain.schema.names:
        assert kept[name].null_count == plain[name].null_count
    assert kept["mean_sq_norm"].cast(pa.float64()).to_pylist()[:2] == plain["mean_sq_norm"].to_pylist()[:2]
    other = narrowed(build("layers", make_run(), [(1, make_batch(1)), (2, wild(-100.0))]))
    kinds = {name: other.schema.field(name).type for name in ("count", "mean_sq_norm", "norm_max", "variance_trace")}
    # 1.5 · 2^-100 is a float32, its square is not.
    assert kinds == {
        "count": pa.float32(),
        "mean_sq_norm": pa.float64(),
        "norm_max": pa.float32(),
        "variance_trace": pa.float32(),
    }


def test_rows_of_layers_are_sorted_by_layer_then_step() -> None:
    late, early = make_batch(5, 6), make_batch(2)
    table = build("layers", make_run(), [(1, late), (2, early)])
    assert table["layer"].to_pylist() == ["conv"] * 3 + ["dense"] * 3
    assert table["step"].to_pylist() == [2, 5, 6] * 2
    assert table["arrival"].to_pylist() == [2, 1, 1] * 2
    want = np.concatenate([column_arrays(early)["variance_trace"], column_arrays(late)["variance_trace"]])
    assert np.array_equal(table["variance_trace"].to_numpy().reshape(2, 3).T, want)
    assert set(table["run"].to_pylist()) == {"mnist"}


def test_a_column_that_a_batch_lacks_is_null_and_a_nan_is_a_nan() -> None:
    one = pack_batch([0], [0], 2, {"count": np.array([[1.0, math.nan]])}, {"loss": np.array([math.nan])})
    other = pack_batch([1], [1], 2, {"mean_sq_norm": np.array([[2.0, 3.0]])}, {"learning_rate": np.array([0.5])})
    layers = build("layers", make_run(), [(1, one), (2, other)])
    assert layers["count"].null_count == 2
    assert layers["count"][0].as_py() == 1.0
    assert math.isnan(layers["count"][2].as_py())
    assert layers["mean_sq_norm"].to_pylist() == [None, 2.0, None, 3.0]
    assert layers["variance_trace"].null_count == 4
    steps = build("steps", make_run(), [(1, one), (2, other)])
    assert math.isnan(steps["loss"][0].as_py())
    assert steps["loss"][1].as_py() is None
    assert steps["learning_rate"].to_pylist() == [None, 0.5]


def test_the_users_own_scalars_are_kept_in_a_map() -> None:
    batch = make_batch(0, 1, loss=1.0, accuracy=0.5)
    steps = build("steps", make_run(), [(1, batch), (2, make_batch(2))])
    assert steps["scalars"].to_pylist() == [[("accuracy", 0.5)], [("accuracy", 0.5)], []]
    assert steps["unix_nanos"].to_pylist() == [0, 1000, 2000]


def test_rare_things_become_rows() -> None:
    batch = make_batch(4, 7)
    batch.histograms.append(
        Histogram(
            step_index=1,
            layer=1,
            statistic="example_norm",
            schema=2,
            zero_count=3,
            positive_index=[1, 5],
            positive_count=[2, 9],
        )
    )
    batch.examples.append(TopExample(step_index=0, layer=-1, place=0, example_id="cat.png", sq_norm=2.5))
    batch.events.append(Event(step=5, unix_nanos=6, kind="note", text="hello"))
    batch.coverage.CopyFrom(
        Coverage(num_params=9, num_params_measured=5, uncovered=[Uncovered(parameter="w", num_params=4, reason="LSTM")])
    )
    (histogram,) = build("histograms", make_run(), [(3, batch)]).to_pylist()
    assert (histogram["step"], histogram["layer"], histogram["positive_count"], histogram["arrival"]) == (
        7,
        "dense",
        [2, 9],
        3,
    )
    (example,) = build("examples", make_run(), [(3, batch)]).to_pylist()
    assert (example["step"], example["layer"], example["example_id"], example["sq_norm"]) == (4, None, "cat.png", 2.5)
    (event,) = build("events", make_run(), [(3, batch)]).to_pylist()
    assert (event["step"], event["kind"], event["text"]) == (5, "note", "hello")
    (coverage,) = build("coverage", make_run(), [(3, batch)]).to_pylist()
    assert coverage["uncovered"] == [{"parameter": "w", "num_params": 4, "reason": "LSTM"}]


@pytest.mark.parametrize("table", SCHEMAS)
def test_batches_with_nothing_in_them_make_no_rows(table: str) -> None:
    assert build(table, make_run(), [(1, StepBatch())]).num_rows == 0
    assert build(table, make_run(), []).schema == empty(table).schema == SCHEMAS[table]
