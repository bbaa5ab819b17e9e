"""The embedded store as a whole: restarts, recovery, one owner."""

from pathlib import Path

import pytest

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.server.store import EmbeddedStore
from gradiometer.stats_core.errors import PeerFault, StoreError
from tests.server.batches import entry, make_batch, make_run, settings


def steps_of(store: EmbeddedStore, run_id: str = "mnist") -> list[int]:
    return [step for part in store.read(run_id) for step in part.steps]


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        assert store.register(make_run()).result(30)[1] is True
        for sequence in (1, 2, 3):
            assert store.append(entry(sequence, make_batch(sequence))).result(30)
            if sequence == 2:
                store.roll()
        before = list(store.read("mnist"))
    with EmbeddedStore(settings(tmp_path)) as store:
        assert store.register(make_run()).result(30)[1] is False
        assert store.run_ids() == ["mnist"]
        assert store.run("mnist") is not None
        assert store.run("other") is None
        assert store.durable_sequence("mnist", "c") == 3
        assert store.append(entry(2, make_batch(2))).result(30) is False
        assert list(store.read("mnist")) == before


def test_a_second_store_on_the_directory_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        store.register(make_run()).result(30)
        with pytest.raises(StoreError, match="held by process"):
            EmbeddedStore(settings(tmp_path))
        assert store.append(entry(1, make_batch(1))).result(30)


def test_a_damaged_journal_is_refused_and_the_directory_let_go(tmp_path: Path) -> None:
    EmbeddedStore(settings(tmp_path)).close()
    body = (tmp_path / "journal.db").read_bytes()
    (tmp_path / "journal.db").write_bytes(b"x" * len(body))
    for _ in range(2):
        with pytest.raises(StoreError, match="needs a sound journal"):
            EmbeddedStore(settings(tmp_path))
    (tmp_path / "journal.db").write_bytes(body)
    EmbeddedStore(settings(tmp_path)).close()


def test_what_a_crash_left_half_written_is_deleted_at_the_start(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        store.register(make_run()).result(30)
        store.append(entry(1, make_batch(1))).result(30)
        store.roll()
    folder = tmp_path / "segments" / "mnist"
    kept = sorted(folder.iterdir())
    (folder / "layers-2-2-00000000.parquet.tmp").write_bytes(b"PAR1 half")
    (folder / "layers-2-2-00000000.parquet").write_bytes(kept[0].read_bytes())
    with EmbeddedStore(settings(tmp_path)) as store:
        assert sorted(folder.iterdir()) == kept
        assert steps_of(store) == [1]


def test_a_segment_that_is_gone_does_not_keep_the_server_from_starting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        store.register(make_run()).result(30)
        store.append(entry(1, make_batch(1))).result(30)
        store.roll()
    for path in (tmp_path / "segments" / "mnist").glob("layers-*"):
        path.unlink()
    with EmbeddedStore(settings(tmp_path)) as store:
        assert "a segment is missing" in capsys.readouterr().out
        with pytest.raises(StoreError, match="restore the file from a copy"):
            steps_of(store)
        assert store.append(entry(2, make_batch(2))).result(30)


def test_a_second_registration_with_other_layers_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        store.register(make_run()).result(30)
        store.append(entry(1, make_batch(1))).result(30)
        with pytest.raises(PeerFault, match="2 layers registered, 1 offered"):
            store.register(make_run(layers=("conv",))).result(30)
        assert store.append(entry(2, make_batch(2))).result(30)
        assert steps_of(store) == [1, 2]


def test_runs_do_not_mix(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        for run_id, layers in (("a", ("x",)), ("a.b", ("x", "y")), ("A", ("x", "y", "z"))):
            store.register(make_run(run_id, layers)).result(30)
            store.append(entry(1, make_batch(len(layers), layers=len(layers)), run_id)).result(30)
        store.roll()
        for run_id, width in (("a", 1), ("a.b", 2), ("A", 3)):
            (part,) = store.read(run_id)
            assert (part.num_layers, list(part.steps)) == (width, [width])


def test_the_backlog_is_exported(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        store.register(make_run()).result(30)
        store.append(entry(1, StepBatch())).result(30)
        store.append(entry(2, make_batch(1))).result(30)
        read = store.meters.registry.get_sample_value
        assert read("gradiometer_journal_backlog_batches") == 2
        assert (read("gradiometer_journal_backlog_bytes") or 0) > 30
        store.roll()
        assert read("gradiometer_journal_backlog_batches") == 0
        assert read("gradiometer_store_rolls_total") == 1
        assert read("gradiometer_ingest_queue_bytes") == 0
