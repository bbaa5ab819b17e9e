"""Snapshots: what of a data directory is looked at, and that it is of one instant."""

from pathlib import Path

from gradiometer.server.snapshot import take
from gradiometer.server.store import EmbeddedStore
from tests.server.batches import entry, make_batch, make_run, settings


def test_segments_and_tail_are_held_to_the_runs_and_steps_asked_for(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        for run_id in ("a", "b"):
            store.register(make_run(run_id)).result(30)
        for sequence in (1, 2, 3, 4):
            for run_id in ("a", "b"):
                store.append(entry(sequence, make_batch(10 * sequence, 10 * sequence + 5), run_id)).result(30)
            if sequence == 2:
                store.roll()
    journal = tmp_path / "journal.db"
    everything = take(journal)
    assert [row.run.run_id for row in everything.runs] == ["a", "b"]
    assert {kind: len(found) for kind, found in everything.segments.items()} == {"layers": 2, "steps": 2}
    one = take(journal, {"a"}, first_step=26, last_step=34)
    (row,) = one.runs
    assert one.segments == {}, "those of steps 10 to 25 are left out"
    assert [list(batch.steps) for _, batch in one.tail[row.run_key]] == [[30, 35]]
    edge = take(journal, {"a", "nobody"}, first_step=25, last_step=29)
    assert [s.last_step for s in edge.segments["layers"]] == [25]
    assert edge.tail == {row.run_key: []}
    assert take(journal, tail=False).tail == {1: [], 2: []}


def test_a_snapshot_does_not_change_when_the_directory_does(tmp_path: Path) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        store.register(make_run()).result(30)
        store.append(entry(1, make_batch(1))).result(30)
        before = take(tmp_path / "journal.db")
        store.roll()
        after = take(tmp_path / "journal.db")
    assert (len(before.tail[1]), before.segments) == (1, {})
    assert (len(after.tail[1]), sorted(after.segments)) == (0, ["layers", "steps"])
