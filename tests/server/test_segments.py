"""Segments: whole or not there, told apart from garbage, and checked against the manifest."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gradiometer.server import segments
from gradiometer.server.tables import build
from gradiometer.stats_core.errors import StoreError
from tests.server.batches import make_batch, make_run


def written(directory: Path) -> segments.Segment:
    table = build("layers", make_run(), [(8, make_batch(3)), (9, make_batch(5, 6))])
    return segments.write(directory, "mnist", "layers", table)


def test_a_segment_is_what_the_manifest_will_say_of_it(tmp_path: Path) -> None:
    segment = written(tmp_path)
    assert (segment.first_step, segment.last_step, segment.first_arrival, segment.last_arrival) == (3, 6, 8, 9)
    assert (segment.kind, segment.rows) == ("layers", 6)
    path = tmp_path / segment.path
    assert path.stat().st_size == segment.bytes
    assert path.parent.name == "mnist"
    assert pq.read_table(path).num_rows == 6
    segments.check(tmp_path, segment)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing temporary is left"


def test_two_segments_of_the_same_steps_have_names_of_their_own(tmp_path: Path) -> None:
    assert written(tmp_path).path != written(tmp_path).path


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segments.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_garbage_is_what_the_manifest_does_not_list(tmp_path: Path) -> None:
    kept, orphan = written(tmp_path), written(tmp_path)
    (tmp_path / "mnist" / "layers-0-9-0.parquet.tmp").write_bytes(b"half")
    (tmp_path / "mnist" / "notes.txt").write_text("mine")
    assert sorted(segments.delete_garbage(tmp_path, {kept.path})) == sorted(
        ["mnist/layers-0-9-0.parquet.tmp", orphan.path]
    )
    assert sorted(p.name for p in (tmp_path / "mnist").iterdir()) == sorted([Path(kept.path).name, "notes.txt"])


def test_a_segment_that_was_changed_or_is_gone_is_named(tmp_path: Path) -> None:
    segment = written(tmp_path)
    path = tmp_path / segment.path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=f"got '{path}' with other bytes; restore the file") as caught:
        segments.check(tmp_path, segment)
    assert caught.value.status == "DATA_LOSS"
    path.unlink()
    with pytest.raises(StoreError, match=r"\(No such file or directory\); restore the file from a copy"):
        segments.check(tmp_path, segment)
