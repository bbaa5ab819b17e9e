"""Answers: each of one instant, the later of two measurements, and refusals that name what there is."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gradiometer.protos.columns import column_arrays
from gradiometer.server.query import Reader
from gradiometer.server.store import EmbeddedStore, open_readonly
from gradiometer.stats_core.errors import PeerFault, StoreError
from tests.server.batches import PLACES, entry, fill, full_batch, joined, make_batch, make_run, settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(settings(tmp_path / "data")) as store:
        store.register(make_run()).result(30)
        yield store


@pytest.mark.parametrize("place", PLACES)
def test_of_a_step_measured_twice_the_later_one_is_shown_and_both_are_kept(store: EmbeddedStore, place: str) -> None:
    first = [make_batch(step, seed=1, nanos=100 + step) for step in range(10)]
    again = [make_batch(step, seed=2, nanos=200 + step) for step in range(6, 9)]
    fill(store, "journal" if place == "journal" else "segments", *first)
    fill(store, place, *again, collector_id="restarted")
    steps, columns = joined(store.read("mnist"))
    assert steps == list(range(10))
    want = np.concatenate([column_arrays(batch)["mean_sq_norm"] for batch in (*first[:6], *again, first[9])])
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
