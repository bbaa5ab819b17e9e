"""Ranges of steps: the same from the journal, from segments and from both, to the last bit."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gradiometer.protos.batch_pb2 import Event, StepBatch, TopExample
from gradiometer.protos.checks import check_batch
from gradiometer.protos.columns import column_arrays, pack_batch, scalar_arrays
from gradiometer.server import ranges
from gradiometer.server.store import EmbeddedStore
from gradiometer.stats_core import catalog
from gradiometer.stats_core.errors import PeerFault
from tests.server.batches import COLUMNS, PLACES, entry, fill, full_batch, joined, make_batch, make_run, settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(settings(tmp_path / "data")) as store:
        store.register(make_run()).result(30)
        yield store


@pytest.mark.parametrize("place", PLACES)
def test_what_was_sent_is_read_back_bit_for_bit(store: EmbeddedStore, place: str) -> None:
    sent = [make_batch(0, 1, loss=0.5), make_batch(2, loss=0.25), make_batch(3, 4, 8, loss=0.125)]
    fill(store, place, *sent)
    (part,) = store.read("mnist")
    assert list(part.steps) == [0, 1, 2, 3, 4, 8]
    assert list(part.unix_nanos) == [0, 1000, 2000, 3000, 4000, 8000]
    assert part.num_layers == 2
    assert not part.layer_indices
    assert set(part.columns) == set(COLUMNS), "columns that nobody sent are not there"
    for name in COLUMNS:
        assert part.columns[name] == b"".join(batch.columns[name] for batch in sent)
    assert scalar_arrays(part)["loss"].tolist() == [0.5, 0.5, 0.25, 0.125, 0.125, 0.125]


@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_are_data(store: EmbeddedStore, place: str) -> None:
    odd = np.array([[math.nan, math.inf], [-math.inf, -0.0], [1e-45, 3.4e38]], np.float32)
    scalars = {"loss": np.array([math.nan, math.inf, -math.inf])}
    fill(store, place, pack_batch([0, 1, 2], [0, 0, 0], 2, {"mean_sq_norm": odd}, scalars))
    (part,) = store.read("mnist")
    got = column_arrays(part)["mean_sq_norm"]
    assert np.array_equal(got, odd, equal_nan=True)
    assert np.signbit(got[1, 1])
    assert np.array_equal(scalar_arrays(part)["loss"], scalars["loss"], equal_nan=True)
    counted = store.sql(
        "SELECT count_if(isnan(mean_sq_norm)) AS nans, count_if(isinf(mean_sq_norm)) AS infs FROM layers"
    )
    assert counted.to_pylist() == [{"nans": 1, "infs": 2}]
    for condition, rows in (("isnan(mean_sq_norm)", 1), ("NOT isnan(mean_sq_norm)", 5), ("isfinite(mean_sq_norm)", 3)):
        found = store.sql(f"SELECT count(*) AS rows FROM layers WHERE {condition}")
        assert found.to_pylist() == [{"rows": rows}], condition


@pytest.mark.parametrize("place", PLACES)
def test_a_column_or_scalar_that_only_some_batches_had_is_nan_elsewhere(store: EmbeddedStore, place: str) -> None:
    one = pack_batch([0], [0], 2, {"count": np.array([[1.0, 2.0]])}, {"loss": np.array([3.0])})
    two = pack_batch([1], [0], 2, {"mean_sq_norm": np.array([[5.0, 6.0]])}, {"mine": np.array([4.0])})
    fill(store, place, one, two)
    (part,) = store.read("mnist")
    columns, scalars = column_arrays(part), scalar_arrays(part)
    assert np.array_equal(columns["count"], [[1, 2], [math.nan, math.nan]], equal_nan=True)
    assert np.array_equal(columns["mean_sq_norm"], [[math.nan, math.nan], [5, 6]], equal_nan=True)
    assert np.array_equal(scalars["loss"], [3, math.nan], equal_nan=True)
    assert np.array_equal(scalars["mine"], [math.nan, 4], equal_nan=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({}, range(20)),
        ({"first_step": 15}, range(15, 20)),
        ({"last_step": 3}, range(4)),
        ({"first_step": 5, "last_step": 7}, range(5, 8)),
        ({"limit": 3}, range(17, 20)),
        ({"last_step": 10, "limit": 2}, range(9, 11)),
        ({"first_step": 50}, range(0)),
        ({"first_step": 7, "last_step": 5}, range(0)),
        ({"last_step": 2**63 + 5, "limit": 1}, range(19, 20)),
    ],
)
def test_a_range_and_its_limit(store: EmbeddedStore, place: str, asked: dict[str, int], steps: range) -> None:
    fill(store, place, *(make_batch(step, step + 1) for step in range(0, 20, 2)))
    assert joined(store.read("mnist", **asked))[0] == list(steps)


@pytest.mark.parametrize("place", PLACES)
def test_layers_and_columns_can_be_chosen(store: EmbeddedStore, place: str) -> None:
    sent = [make_batch(0), make_batch(1)]
    fill(store, place, *sent)
    (part,) = store.read("mnist", layers=["dense"], columns=["variance_trace"])
    assert (part.num_layers, list(part.layer_indices), list(part.columns)) == (1, [1], ["variance_trace"])
    want = [column_arrays(batch)["variance_trace"][0, 1] for batch in sent]
    assert column_arrays(part)["variance_trace"].ravel().tolist() == want


def test_layers_come_in_the_order_of_the_run(store: EmbeddedStore) -> None:
    fill(store, "journal", make_batch(0))
    (part,) = store.read("mnist", layers=["dense", "conv", "dense"])
    assert list(part.layer_indices) == [0, 1]


def test_long_answers_come_in_parts_that_fit_the_wire(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PART_BYTES", 600)
    monkeypatch.setattr(ranges, "_PARTS_AT_ONCE", 3)
    sent = [make_batch(*range(start, start + 7)) for start in range(0, 70, 7)]
    fill(store, "both", *sent)
    parts = list(store.read("mnist"))
    assert len(parts) > 10
    steps, columns = joined(iter(parts))
    assert steps == list(range(70))
    want = np.concatenate([column_arrays(batch)["mean_sq_norm"] for batch in sent])
    assert np.array_equal(columns["mean_sq_norm"], want)


@pytest.mark.parametrize("place", PLACES)
def test_histograms_examples_events_and_coverage_come_back_as_they_were(store: EmbeddedStore, place: str) -> None:
    sent = full_batch()
    fill(store, place, sent)
    (part,) = store.read("mnist")
    assert part == sent
    (chosen,) = store.read("mnist", layers=["conv"])
    assert [example.example_id for example in chosen.examples] == ["cat.png", "7"]
    assert not chosen.histograms
    (later,) = store.read("mnist", first_step=5)
    assert (list(later.steps), [e.text for e in later.events]) == ([7], ["after the last"])
    assert [(h.step_index, h.layer) for h in later.histograms] == [(0, 1)]


def test_distributions_and_examples_can_be_chosen_by_name(store: EmbeddedStore) -> None:
    sent = full_batch()
    other = sent.histograms.add()
    other.CopyFrom(sent.histograms[0])
    other.statistic = "element_t_sq"
    fill(store, "both", sent)
    (norms,) = store.read("mnist", columns=["example_norm"])
    assert [one.statistic for one in norms.histograms] == ["example_norm"]
    assert (list(norms.steps), dict(norms.columns), len(norms.examples)) == ([4, 7], {}, 0)
    (examples,) = store.read("mnist", columns=["outliers", "mean_sq_norm"])
    assert [one.example_id for one in examples.examples] == ["cat.png", "7"]
    assert (list(examples.columns), len(examples.histograms)) == (["mean_sq_norm"], 0)
    (all_of_them,) = store.read("mnist")
    assert sorted(one.statistic for one in all_of_them.histograms) == ["element_t_sq", "example_norm"]
    with pytest.raises(PeerFault, match="needs columns that exist, got column='noise_scale'"):
        store.read("mnist", columns=["noise_scale"])


@pytest.mark.parametrize("place", PLACES)
def test_examples_come_back_from_the_largest(store: EmbeddedStore, place: str) -> None:
    batch = make_batch(*range(40))
    for index in range(40):
        sizes = [math.nan, math.inf, *range(20, 0, -1)]
        found = [TopExample(step_index=index, layer=-1, place=at, sq_norm=size) for at, size in enumerate(sizes)]
        batch.examples.extend(found)
    fill(store, place, batch)
    (part,) = store.read("mnist")
    check_batch(part, 2)
    assert [(one.step_index, one.place) for one in part.examples] == [
        (index, at) for index in range(40) for at in range(22)
    ]


def test_histograms_count_towards_the_size_of_a_part(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PART_BYTES", 3000)
    batch = make_batch(*range(12))
    for index in (2, 3, 7):
        batch.histograms.add(
            step_index=index,
            statistic="example_norm",
            schema=3,
            positive_index=range(400),
            positive_count=[1] * 400,
        )
    fill(store, "segments", batch)
    parts = list(store.read("mnist"))
    assert [step for part in parts for step in part.steps] == list(range(12))
    # A step with 400 buckets is more than a part holds, and stands alone.
    assert [list(part.steps) for part in parts if part.histograms] == [[2], [3], [7]]
    assert len(parts) == 6
    assert len(list(store.read("mnist", columns=["mean_sq_norm"]))) == 1


@pytest.mark.parametrize("place", PLACES)
def test_gradients_of_extreme_scale_are_kept_and_read_back_bit_for_bit(store: EmbeddedStore, place: str) -> None:
    exponents = np.array([60.0, math.nan, -75.0])
    values = np.array([[1.5, math.nan], [0.1, 2.5], [3e38, 1e-45]], np.float32)
    names = ("mean_sq_norm", "norm_max", "count")
    sent = pack_batch([1, 2, 3], [0] * 3, 2, dict.fromkeys(names, values), {"unit_exponent": exponents})
    fill(store, place, make_batch(0), sent, make_batch(4))
    (part,) = store.read("mnist", first_step=1, last_step=3)
    for name in names:
        assert part.columns[name] == sent.columns[name]
    assert np.array_equal(scalar_arrays(part)["unit_exponent"], exponents, equal_nan=True)
    found = store.sql("SELECT mean_sq_norm, norm_max, count FROM layers WHERE layer = 'dense' AND step BETWEEN 1 AND 3")
    rows = found.to_pylist()
    assert math.isnan(rows[0]["mean_sq_norm"])
    assert rows[1]["mean_sq_norm"] == 2.5
    assert rows[2]["mean_sq_norm"] == float(values[2, 1]) * 2.0**-150
    assert rows[2]["norm_max"] == float(values[2, 1]) * 2.0**-75
    assert rows[2]["count"] == values[2, 1]
    (top,) = store.sql("SELECT max(mean_sq_norm) AS top FROM layers WHERE NOT isnan(mean_sq_norm)")["top"].to_pylist()
    assert top == 1.5 * 2.0**120


def test_segments_of_an_earlier_release_are_read_beside_new_ones(
    store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs had float32 throughout, and none of the columns that came later."""
    late = [row.name for row in catalog.WIRE if row.name not in (*COLUMNS, "count")]

    def old(table: pa.Table) -> pa.Table:
        kept = table.drop_columns(late)
        return kept.cast(pa.schema([f.with_type(pa.float32()) if f.name in COLUMNS else f for f in kept.schema]))

    sent = [make_batch(0, 1), make_batch(2), make_batch(3)]
    with monkeypatch.context() as patched:
        patched.setattr("gradiometer.server.tables.narrowed", old)
        fill(store, "segments", sent[0])
    store.append(entry(2, sent[1])).result(30)
    store.roll()
    store.append(entry(3, sent[2])).result(30)
    (part,) = store.read("mnist")
    assert list(part.steps) == [0, 1, 2, 3]
    for name in COLUMNS:
        assert part.columns[name] == b"".join(batch.columns[name] for batch in sent)
    found = store.sql("SELECT mean_sq_norm, norm_max FROM layers")
    assert [found.schema.field(name).type for name in ("mean_sq_norm", "norm_max")] == [pa.float64()] * 2


def test_events_come_once_each_whatever_the_parts(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PART_BYTES", 1)
    batch = make_batch(0, 5, 10)
    for step in (0, 3, 5, 8, 10, 12):
        batch.events.append(Event(step=step, unix_nanos=step, kind="note"))
    fill(store, "journal", batch)
    assert [[e.step for e in part.events] for part in store.read("mnist")] == [[0], [3, 5], [8, 10, 12]]


def test_events_without_steps_are_an_answer_too(store: EmbeddedStore) -> None:
    fill(store, "journal", StepBatch(events=[Event(step=3, kind="note", text="hello")]))
    (part,) = store.read("mnist")
    assert ([e.text for e in part.events], list(part.steps)) == (["hello"], [])
    assert list(store.read("mnist", first_step=4)) == []
