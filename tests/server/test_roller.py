"""The roller: when it rolls, what a crash or a full disk in the middle leaves."""

import sqlite3
from pathlib import Path

import pytest

from gradiometer.server import roller, segments
from gradiometer.server.journal import Journal
from gradiometer.server.roller import backlog
from gradiometer.server.store import EmbeddedStore
from gradiometer.stats_core.errors import StoreError
from tests.server.batches import entry, make_batch, make_run, settings
from tests.server_process import eventually


def filled(data: Path, **fields: object) -> EmbeddedStore:
    store = EmbeddedStore(settings(data, **fields))
    store.register(make_run()).result(30)
    for sequence in range(1, 6):
        store.append(entry(sequence, make_batch(sequence))).result(30)
    return store


def files(data: Path) -> list[Path]:
    return sorted(p for p in (data / "segments").rglob("*") if p.is_file())


def rolled_by_itself(data: Path, **fields: object) -> bool:
    chosen = settings(data, **fields).model_copy(update={"roll_check_seconds": 0.02})
    with EmbeddedStore(chosen) as store:
        store.register(make_run()).result(30)
        for future in [store.append(entry(sequence, make_batch(sequence))) for sequence in range(1, 301)]:
            future.result(30)
        eventually(lambda: backlog(data / "journal.db") == {})
        return [s for part in store.read("mnist") for s in part.steps] == list(range(1, 301))


def test_a_run_is_rolled_once_its_journal_is_large(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path, roll_bytes=4096).model_copy(update={"roll_check_seconds": 0.02})) as store:
        store.register(make_run()).result(30)
        for future in [store.append(entry(sequence, make_batch(sequence))) for sequence in range(1, 101)]:
            future.result(30)
        eventually(lambda: any(path.suffix == ".parquet" for path in files(tmp_path)))
        assert [s for part in store.read("mnist") for s in part.steps] == list(range(1, 101))


def test_a_run_is_rolled_once_its_oldest_batch_is_old(tmp_path: Path) -> None:
    assert rolled_by_itself(tmp_path, roll_seconds=0.05)


def test_what_is_neither_large_nor_old_stays_in_the_journal(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        assert store._roller.roll() == 0
        assert sum(batches for _, batches, _ in backlog(tmp_path / "journal.db").values()) == 5
        assert store.roll() == 2, "one segment of layers, one of steps"
        assert backlog(tmp_path / "journal.db") == {}


def test_a_crash_between_the_files_and_the_exchange_leaves_the_journal_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise sqlite3.OperationalError("the machine stops here")

    with filled(tmp_path) as store:
        before = list(store.read("mnist"))
        monkeypatch.setattr(Journal, "rolled", crash)
        with pytest.raises(sqlite3.OperationalError, match="the machine stops here"):
            store.roll()
        assert len(files(tmp_path)) == 2
        assert list(store.read("mnist")) == before, "files that the manifest does not list are not read"
    monkeypatch.undo()
    with EmbeddedStore(settings(tmp_path)) as store:
        assert files(tmp_path) == [], "and are deleted at the next start"
        assert list(store.read("mnist")) == before
        store.roll()
        assert list(store.read("mnist")) == before


def test_a_full_disk_leaves_no_segments_behind_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = segments.pq.write_table

    def full(table: object, *args: object, **options: object) -> None:
        if "scalars" in table.schema.names:  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")
        real(table, *args, **options)

    with filled(tmp_path) as store:
        before = list(store.read("mnist"))
        monkeypatch.setattr(segments.pq, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            store.roll()
        assert files(tmp_path) == []
        assert list(store.read("mnist")) == before
        monkeypatch.undo()
        assert store.roll() == 2
        assert list(store.read("mnist")) == before


def test_a_failing_roller_is_counted_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StoreError("Store needs room")

    monkeypatch.setattr(Journal, "rolled", fail)
    chosen = settings(tmp_path, roll_seconds=0.01).model_copy(update={"roll_check_seconds": 0.01})
    with EmbeddedStore(chosen) as store:
        store.register(make_run()).result(30)
        store.append(entry(1, make_batch(1))).result(30)
        failures = "gradiometer_store_roll_failures_total"
        eventually(lambda: (store.meters.registry.get_sample_value(failures) or 0) >= 2)
        monkeypatch.undo()
        eventually(lambda: backlog(tmp_path / "journal.db") == {})
        assert [s for part in store.read("mnist") for s in part.steps] == [1]


def test_a_long_backlog_is_rolled_a_load_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roller, "_AT_ONCE", 1)
    with filled(tmp_path) as store:
        before = list(store.read("mnist"))
        assert store.roll() == 2 * 5
        assert list(store.read("mnist")) == before
