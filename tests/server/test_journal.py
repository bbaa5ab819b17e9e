"""The journal: transactions, marks, and what a failing disk does to them."""

import sqlite3
from pathlib import Path

import pytest

from gradiometer.protos.batch_pb2 import Event, StepBatch
from gradiometer.protos.run_pb2 import Coverage
from gradiometer.server.journal import Journal, connect
from gradiometer.stats_core.errors import OurFault, PeerFault, StoreError
from tests.server.batches import entry, make_batch, make_run


@pytest.fixture
def journal(tmp_path: Path):
    journal = Journal(tmp_path / "journal.db")
    journal.register(make_run())
    yield journal
    journal.close()


def rows(path: Path) -> list[tuple[int, int, str, int]]:
    db = connect(path)
    try:
        return db.execute("SELECT arrival, run_key, collector_id, sequence FROM journal ORDER BY arrival").fetchall()
    finally:
        db.close()


def test_a_transaction_is_synced_before_it_returns(journal: Journal) -> None:
    db = journal._db
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


def test_batches_are_stored_once_and_marks_follow(journal: Journal, tmp_path: Path) -> None:
    group = [
        entry(1, make_batch(0)),
        entry(2, make_batch(1)),
        entry(1, make_batch(0)),
        entry(1, make_batch(9), collector_id="d"),
    ]
    assert journal.append(group) == [True, True, False, True]
    assert journal.append([entry(2, make_batch(1))]) == [False]
    assert (journal.durable_sequence("mnist", "c"), journal.durable_sequence("mnist", "d")) == (2, 1)
    assert [row[2:] for row in rows(tmp_path / "journal.db")] == [("c", 1), ("c", 2), ("d", 1)]


def test_a_batch_whose_predecessor_is_missing_is_not_stored(journal: Journal, tmp_path: Path) -> None:
    (outcome,) = journal.append([entry(2, make_batch(1))])
    assert isinstance(outcome, OurFault)
    assert outcome.status == "UNAVAILABLE", "the publisher opens a new stream and sends it again"
    assert rows(tmp_path / "journal.db") == []


def test_a_batch_of_an_unknown_run_is_not_stored(journal: Journal) -> None:
    (outcome,) = journal.append([entry(1, make_batch(1), run_id="minst")])
    assert isinstance(outcome, PeerFault)
    assert "did you mean 'mnist'" in str(outcome)


def test_everything_is_there_after_opening_again(journal: Journal, tmp_path: Path) -> None:
    journal.append([entry(1, make_batch(3, 4))])
    again = Journal(tmp_path / "journal.db")
    assert again.durable_sequence("mnist", "c") == 1
    row = again.runs["mnist"]
    assert (row.stored_steps, row.last_step, row.last_unix_nanos, row.repeats) == (2, 4, 4000, False)
    assert row == journal.runs["mnist"]
    again.close()


def test_marks_outlive_the_rows_and_arrivals_are_never_used_twice(journal: Journal, tmp_path: Path) -> None:
    journal.append([entry(1, make_batch(0)), entry(2, make_batch(1))])
    journal.rolled(journal.runs["mnist"].run_key, 2, [])
    assert rows(tmp_path / "journal.db") == []
    again = Journal(tmp_path / "journal.db")
    assert again.append([entry(2, make_batch(1)), entry(3, make_batch(2))]) == [False, True]
    assert [row[0] for row in rows(tmp_path / "journal.db")] == [3]
    again.close()


def test_a_step_that_comes_again_is_noticed(journal: Journal) -> None:
    journal.append([entry(1, make_batch(0, 5))])
    assert not journal.runs["mnist"].repeats
    journal.append([entry(1, make_batch(5, 6), collector_id="restarted")])
    row = journal.runs["mnist"]
    assert (row.repeats, row.stored_steps, row.last_step) == (True, 4, 6)


def test_a_batch_may_change_the_coverage_and_a_registration_the_facts(journal: Journal, tmp_path: Path) -> None:
    batch = make_batch(0)
    batch.coverage.CopyFrom(Coverage(num_params=10, num_params_measured=5))
    journal.append([entry(1, batch)])
    journal.register(make_run(optimizer="MAdam"))
    again = Journal(tmp_path / "journal.db")
    run = again.runs["mnist"].run
    assert (run.coverage.num_params_measured, run.optimizer) == (5, "MAdam")
    assert again.runs["mnist"].stored_steps == 1
    again.close()


def test_a_batch_without_steps_is_kept_where_its_events_are(journal: Journal, tmp_path: Path) -> None:
    journal.append(
        [entry(1, StepBatch(events=[Event(step=7, kind="note"), Event(step=3, kind="note")])), entry(2, StepBatch())]
    )
    db = connect(tmp_path / "journal.db")
    assert db.execute("SELECT first_step, last_step FROM journal ORDER BY arrival").fetchall() == [(3, 7), (0, 0)]
    db.close()


def test_a_full_disk_fails_the_group_harms_nothing_and_passes(journal: Journal, tmp_path: Path) -> None:
    journal.append([entry(1, make_batch(0))])
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    group = [entry(2, make_batch(*range(1, 5000)))]
    with pytest.raises(StoreError, match="needs room on the disk of its data directory, got none") as caught:
        journal.append(group)
    assert caught.value.status == "RESOURCE_EXHAUSTED"
    assert journal.durable_sequence("mnist", "c") == 1
    assert journal.runs["mnist"].stored_steps == 1
    assert len(rows(tmp_path / "journal.db")) == 1
    journal._db.execute("PRAGMA max_page_count = 1000000")
    assert journal.append(group) == [True]


def test_any_other_trouble_with_the_disk_is_worth_another_try(journal: Journal, tmp_path: Path) -> None:
    journal._db.execute("PRAGMA query_only = ON")
    with pytest.raises(
        StoreError, match="needs a journal that can be written, got attempt to write a readonly"
    ) as caught:
        journal.append([entry(1, make_batch(0))])
    assert caught.value.status == "UNAVAILABLE"
    journal._db.execute("PRAGMA query_only = OFF")
    assert journal.append([entry(1, make_batch(0))]) == [True]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"needs a sound journal, got .*restore it from a copy"):
        Journal(tmp_path / "journal.db")


def test_a_reader_can_not_write(journal: Journal, tmp_path: Path) -> None:
    db = connect(tmp_path / "journal.db")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("DELETE FROM runs")
    db.close()
