"""Answers: the same from the journal, from segments and from both, each of one instant; and refusals by name."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gradiometer.protos import wire
from gradiometer.protos.batch_pb2 import Event, Histogram, StepBatch, TopExample
from gradiometer.protos.run_pb2 import Coverage, Uncovered
from gradiometer.server import ranges
from gradiometer.server.query import Reader
from gradiometer.server.store import EmbeddedStore, open_readonly
from gradiometer.stats_core.errors import PeerFault, StoreError
from tests.server.batches import COLUMNS, entry, make_batch, make_run, settings

PLACES = ("journal", "segments", "both")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(settings(tmp_path / "data")) as store:
        store.register(make_run()).result(30)
        yield store


def fill(store: EmbeddedStore, place: str, *batches: StepBatch, run_id: str = "mnist", collector_id: str = "c") -> None:
    """Store batches so that they end up in the journal, in segments, or half in each."""
    for sequence, batch in enumerate(batches, start=1):
        store.append(entry(sequence, batch, run_id, collector_id)).result(30)
        if place == "both" and sequence == (len(batches) + 1) // 2:
            store.roll()
    if place == "segments":
        store.roll()


def joined(parts: Iterator[StepBatch]) -> tuple[list[int], dict[str, np.ndarray]]:
    found = list(parts)
    names = {name for part in found for name in part.columns}
    return (
        [step for part in found for step in part.steps],
        {name: np.concatenate([wire.column_arrays(part)[name] for part in found]) for name in names},
    )


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
    assert wire.scalar_arrays(part)["loss"].tolist() == [0.5, 0.5, 0.25, 0.125, 0.125, 0.125]


@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_are_data(store: EmbeddedStore, place: str) -> None:
    odd = np.array([[math.nan, math.inf], [-math.inf, -0.0], [1e-45, 3.4e38]], np.float32)
    scalars = {"loss": np.array([math.nan, math.inf, -math.inf])}
    fill(store, place, wire.pack_batch([0, 1, 2], [0, 0, 0], 2, {"mean_sq_norm": odd}, scalars))
    (part,) = store.read("mnist")
    got = wire.column_arrays(part)["mean_sq_norm"]
    assert np.array_equal(got, odd, equal_nan=True)
    assert np.signbit(got[1, 1])
    assert np.array_equal(wire.scalar_arrays(part)["loss"], scalars["loss"], equal_nan=True)
    counted = store.sql(
        "SELECT count_if(isnan(mean_sq_norm)) AS nans, count_if(isinf(mean_sq_norm)) AS infs FROM layers"
    )
    assert counted.to_pylist() == [{"nans": 1, "infs": 2}]


@pytest.mark.parametrize("place", PLACES)
def test_a_column_or_scalar_that_only_some_batches_had_is_nan_elsewhere(store: EmbeddedStore, place: str) -> None:
    one = wire.pack_batch([0], [0], 2, {"count": np.array([[1.0, 2.0]])}, {"loss": np.array([3.0])})
    two = wire.pack_batch([1], [0], 2, {"mean_sq_norm": np.array([[5.0, 6.0]])}, {"mine": np.array([4.0])})
    fill(store, place, one, two)
    (part,) = store.read("mnist")
    columns, scalars = wire.column_arrays(part), wire.scalar_arrays(part)
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
    want = [wire.column_arrays(batch)["variance_trace"][0, 1] for batch in sent]
    assert wire.column_arrays(part)["variance_trace"].ravel().tolist() == want


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
    want = np.concatenate([wire.column_arrays(batch)["mean_sq_norm"] for batch in sent])
    assert np.array_equal(columns["mean_sq_norm"], want)


def full_batch() -> StepBatch:
    batch = make_batch(4, 7)
    batch.histograms.append(
        Histogram(
            step_index=1,
            layer=1,
            statistic="sq_norms",
            schema=-2,
            zero_threshold=1e-9,
            zero_count=3,
            positive_index=[-1, 5],
            positive_count=[2, 9],
            negative_index=[0],
            negative_count=[1],
        )
    )
    batch.examples.append(TopExample(step_index=0, layer=-1, place=0, example_id="cat.png", sq_norm=2.5))
    batch.examples.append(TopExample(step_index=1, layer=0, place=1, example_id="7", sq_norm=1.5))
    batch.events.append(Event(step=2, unix_nanos=6, kind="note", text="before the first measured step"))
    batch.events.append(Event(step=9, unix_nanos=7, kind="note", text="after the last"))
    batch.coverage.CopyFrom(
        Coverage(num_params=9, num_params_measured=5, uncovered=[Uncovered(parameter="w", num_params=4, reason="LSTM")])
    )
    return batch


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


@pytest.mark.parametrize("place", PLACES)
def test_of_a_step_measured_twice_the_later_one_is_shown_and_both_are_kept(store: EmbeddedStore, place: str) -> None:
    first = [make_batch(step, seed=1, nanos=100 + step) for step in range(10)]
    again = [make_batch(step, seed=2, nanos=200 + step) for step in range(6, 9)]
    fill(store, "journal" if place == "journal" else "segments", *first)
    fill(store, place, *again, collector_id="restarted")
    steps, columns = joined(store.read("mnist"))
    assert steps == list(range(10))
    want = np.concatenate([wire.column_arrays(batch)["mean_sq_norm"] for batch in (*first[:6], *again, first[9])])
    assert np.array_equal(columns["mean_sq_norm"], want)
    total = store.sql("SELECT count(*) AS rows, count(DISTINCT step) AS steps FROM layers").to_pylist()
    assert total == [{"rows": 20, "steps": 10}]
    assert store.sql("SELECT count(*) AS n FROM steps")["n"][0].as_py() == 10
    assert store.list_runs()[0].stored_steps == 10
    with open_readonly(store._reader._journal.parent) as reader:
        assert reader.raw_rows("mnist") == 26


def test_a_spool_replayed_late_does_not_hide_what_was_measured_later(store: EmbeddedStore) -> None:
    later, earlier = make_batch(5, seed=2, nanos=200), make_batch(5, seed=1, nanos=100)
    fill(store, "journal", later, collector_id="restarted")
    fill(store, "journal", earlier)
    (part,) = store.read("mnist")
    assert part.columns["mean_sq_norm"] == later.columns["mean_sq_norm"]


def test_runs_are_listed_newest_first_with_how_far_they_are(store: EmbeddedStore) -> None:
    store.register(make_run("old", started_unix_nanos=1)).result(30)
    fill(store, "both", make_batch(3), make_batch(5, 9), run_id="old")
    assert [status.run.run_id for status in store.list_runs()] == ["mnist", "old"]
    new, old = store.list_runs()
    assert (old.stored_steps, old.last_step, old.last_unix_nanos) == (3, 9, 9000)
    assert (new.stored_steps, new.last_step, new.last_unix_nanos) == (0, 0, 0)


def test_a_store_without_runs_answers(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        assert store.list_runs() == []
        assert store.sql("SELECT * FROM layers JOIN runs USING (run)").num_rows == 0


@pytest.mark.parametrize(
    ("asked", "message", "status"),
    [
        ({"run_id": "minst"}, "needs a registered run, got run_id='minst'; did you mean 'mnist'", "NOT_FOUND"),
        (
            {"run_id": "mnist", "layers": ["conv", "head"]},
            "got layer='head'; there are conv, dense",
            "INVALID_ARGUMENT",
        ),
        ({"run_id": "mnist", "columns": ["snr"]}, "got column='snr'; there are count, ", "INVALID_ARGUMENT"),
        ({"run_id": "mnist", "columns": ["noise_scale"]}, "got column='noise_scale'", "INVALID_ARGUMENT"),
    ],
)
def test_what_is_not_there_is_refused_at_once(store: EmbeddedStore, asked: dict, message: str, status: str) -> None:
    with pytest.raises(PeerFault, match=message) as caught:
        store.read(asked.pop("run_id"), **asked)
    assert caught.value.status == status


def test_an_answer_is_of_one_instant_whatever_is_rolled_meanwhile(store: EmbeddedStore) -> None:
    fill(store, "journal", *(make_batch(step) for step in range(5)))
    parts = store.read("mnist")
    store.roll()
    store.append(entry(6, make_batch(6))).result(30)
    assert joined(parts)[0] == [0, 1, 2, 3, 4]


def test_sql_sees_every_table_and_the_runs(store: EmbeddedStore) -> None:
    fill(store, "both", full_batch(), make_batch(20, loss=1.5, accuracy=0.5))
    counts = {
        table: store.sql(f"SELECT count(*) AS n FROM {table}")["n"][0].as_py()
        for table in ("runs", "layers", "steps", "histograms", "examples", "events", "coverage")
    }
    assert counts == {"runs": 1, "layers": 6, "steps": 3, "histograms": 1, "examples": 2, "events": 2, "coverage": 1}
    found = store.sql(
        "SELECT runs.unit, layer, sum(variance_trace) AS total, any_value(scalars['accuracy']) AS accuracy "
        "FROM Layers JOIN steps USING (run, step) JOIN runs USING (run) WHERE loss > 1 GROUP BY ALL ORDER BY layer"
    )
    assert found["layer"].to_pylist() == ["conv", "dense"]
    assert found["accuracy"].to_pylist() == [0.5, 0.5]
    assert "arrival" not in store.sql("SELECT * FROM layers").column_names


def test_sql_can_be_held_to_some_runs(store: EmbeddedStore) -> None:
    store.register(make_run("other")).result(30)
    fill(store, "journal", make_batch(0), run_id="other")
    assert store.sql("SELECT * FROM layers").num_rows == 2
    assert store.sql("SELECT * FROM layers", runs=["mnist"]).num_rows == 0


@pytest.mark.parametrize(
    "query",
    [
        "SELEC 1",
        "SELECT nothing FROM layers",
        "SELECT * FROM nowhere",
        "SELECT 1 / ",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT 'a'::INTEGER",
        "CREATE TABLE x (a INTEGER)",
        "SET lock_configuration = false",
        "SELECT 1; SELECT 2",
        "",
        "COPY (SELECT 1) TO '/tmp/gradiometer-escape.csv'",
    ],
)
def test_sql_that_can_not_or_may_not_be_run_is_refused_in_one_line(store: EmbeddedStore, query: str) -> None:
    fill(store, "segments", make_batch(0))
    with pytest.raises(ValueError, match=r"^sql needs a query .*; (correct the query|ask one question at a time)$"):
        store.sql(query)
    assert not Path("/tmp/gradiometer-escape.csv").exists()


def damaged(store: EmbeddedStore, how: str) -> Path:
    store.register(make_run("other")).result(30)
    fill(store, "segments", make_batch(0), run_id="other")
    fill(store, "segments", *(make_batch(step) for step in range(50)))
    (path,) = (store._reader._segments / "mnist").glob("layers-*.parquet")
    body = path.read_bytes()
    match how:
        case "gone":
            path.unlink()
        case "cut short":
            path.write_bytes(body[: len(body) // 2])
        case "overwritten":
            path.write_bytes(b"x" * len(body))
        case "other bytes within":
            path.write_bytes(body[:100] + bytes(byte ^ 0xFF for byte in body[100:200]) + body[200:])
    return path


@pytest.mark.parametrize("how", ["gone", "cut short", "overwritten", "other bytes within"])
def test_a_damaged_segment_fails_the_queries_that_need_it_and_names_itself(store: EmbeddedStore, how: str) -> None:
    path = damaged(store, how)
    for ask in (lambda: list(store.read("mnist")), lambda: store.sql("SELECT sum(mean_sq_norm) FROM layers")):
        with pytest.raises(
            StoreError, match=f"needs its segment.*got '{path}'.*restore the file from a copy"
        ) as caught:
            ask()
        assert caught.value.status == "DATA_LOSS"
    assert joined(store.read("other"))[0] == [0]
    assert store.sql("SELECT count(*) AS n FROM steps")["n"][0].as_py() == 51
    store.append(entry(51, make_batch(50))).result(30)
    assert joined(store.read("mnist", first_step=50))[0] == [50]


def test_a_directory_can_be_read_while_its_server_runs_and_after_it_died(store: EmbeddedStore) -> None:
    fill(store, "both", make_batch(0), make_batch(1))
    data = store._reader._journal.parent
    assert joined(Reader(data).read("mnist"))[0] == [0, 1]
    store.append(entry(3, make_batch(2))).result(30)
    assert joined(Reader(data).read("mnist"))[0] == [0, 1, 2]
    store.close()
    assert joined(Reader(data).read("mnist"))[0] == [0, 1, 2]


def test_reading_what_is_no_data_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="needs a data directory"), open_readonly(tmp_path / "nothing"):
        pass
    (tmp_path / "FORMAT").write_text("gradiometer-data 1\n")
    with pytest.raises(StoreError, match="needs a journal that can be read"):
        open_readonly(tmp_path).list_runs()


@pytest.mark.parametrize("name", ["it's", "a b", "x[1]*?y", "ünï"])
def test_the_path_of_the_data_directory_may_have_any_characters(tmp_path: Path, name: str) -> None:
    with EmbeddedStore(settings(tmp_path / name)) as store:
        store.register(make_run()).result(30)
        fill(store, "both", make_batch(0), make_batch(1))
        assert joined(store.read("mnist"))[0] == [0, 1]
