import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gradiometer.collectors.outbox import Outbox, SpoolDamaged
from gradiometer.collectors.spool import Spool, leftovers
from gradiometer.protos.run_pb2 import Run
from tests.fake_ingest import eventually, spools

RUN = Run(run_id="a")


def outbox(folder: Path | None, memory_bytes: int = 100, max_bytes: int = 1 << 20) -> Outbox:
    def make(collector_id: str, offset: int) -> Spool:
        assert folder is not None
        return Spool.create(folder, RUN, collector_id, offset, max_bytes=max_bytes)

    return Outbox(make if folder else None, memory_bytes=memory_bytes)


def bodies(box: Outbox) -> list[bytes | None]:
    return [box.take(number, timeout=0) for number in range(box.acknowledged + 1, box.last + 1)]


def test_small_and_short_lived_batches_touch_no_disk(spool_folder: Path) -> None:
    box = outbox(spool_folder)
    box.append(b"one")
    box.append(b"two")
    assert bodies(box) == [b"one", b"two"]
    box.acknowledge(2)
    assert box.is_empty
    assert box.close() == 0
    assert spools(spool_folder) == []


def test_what_is_too_much_for_memory_goes_to_disk_and_comes_back_in_order(spool_folder: Path) -> None:
    box = outbox(spool_folder)
    wanted = [b"%d" % number * 30 for number in range(20)]
    for body in wanted:
        box.append(body)
    assert spools(spool_folder) != []
    assert bodies(box) == wanted
    box.acknowledge(7)
    assert bodies(box) == wanted[7:]
    box.acknowledge(20)
    box.close()
    assert spools(spool_folder) == []


def test_while_the_server_is_away_everything_is_on_disk(spool_folder: Path) -> None:
    box = outbox(spool_folder)
    box.append(b"one")
    box.set_away(away=True)
    box.append(b"two")
    assert box.spool is not None
    assert [box.spool.read(number) for number in box.spool.numbers()] == [b"one", b"two"]
    box.set_away(away=False)
    box.append(b"three")
    assert box.spool.numbers() == range(1, 3)
    assert bodies(box) == [b"one", b"two", b"three"]
    box.close()


def test_after_a_silence_of_the_server_everything_is_on_disk(spool_folder: Path) -> None:
    box = Outbox(lambda collector, offset: Spool.create(spool_folder, RUN, collector, offset), patience=0.0)
    box.append(b"one")
    assert box.spool is None
    eventually(lambda: time.monotonic() > box._waiting_since)
    box.append(b"two")
    assert box.spool is not None
    assert box.spool.numbers() == range(1, 3)
    box.close()


def test_what_is_left_at_the_end_is_there_for_another(spool_folder: Path) -> None:
    box = outbox(spool_folder)
    box.append(b"one")
    box.append(b"two")
    box.acknowledge(1)
    assert box.close() == 1
    (name,) = [name for name in spools(spool_folder) if name.endswith(".spool")]
    other = Outbox(spool=Spool.open(spool_folder / name))
    assert other.collector_id == box.collector_id
    assert (other.acknowledged, other.last, other.finished) == (1, 2, True)
    assert other.sequence(2) == 2
    assert bodies(other) == [b"two"]
    assert other.welcome(2)
    assert other.is_empty
    assert other.close() == 0
    assert spools(spool_folder) == []


def test_an_old_acknowledgement_changes_nothing() -> None:
    box = outbox(None)
    for body in (b"one", b"two", b"three"):
        box.append(body)
    box.acknowledge(2)
    box.acknowledge(1)
    assert box.acknowledged == 2
    assert bodies(box) == [b"three"]


def test_a_server_that_knows_more_than_was_sent_has_all_of_it() -> None:
    box = outbox(None)
    box.append(b"one")
    assert box.welcome(5)
    assert (box.is_empty, box.acknowledged) == (True, 1)


def test_a_server_that_lost_what_it_acknowledged_gets_the_rest_under_another_id(spool_folder: Path) -> None:
    box = outbox(spool_folder)
    first = box.collector_id
    for body in (b"one", b"two", b"three"):
        box.append(body)
    box.set_away(away=True)
    box.acknowledge(2)
    assert not box.welcome(0)
    assert box.collector_id != first
    assert box.sequence(3) == 1
    assert box.spool is not None
    assert (box.spool.collector_id, box.spool.offset) == (box.collector_id, 2)
    assert box.welcome(0)
    assert box.take(3, timeout=0) == b"three"
    box.acknowledge(1)
    assert box.is_empty
    box.close()


def test_where_disk_and_memory_are_full_there_is_no_room(spool_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = outbox(spool_folder, memory_bytes=10_000, max_bytes=64 << 10)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        added = 0
        while box.has_room() and added < 1000:
            box.append(bytes(3000))
            added += 1
    assert 10 < added < 40
    assert len(caplog.records) == 1
    assert "measurements can't be spooled (database or disk is full)" in caplog.text
    assert len(bodies(box)) == added
    assert all(body == bytes(3000) for body in bodies(box))
    box.acknowledge(added - 1)
    assert box.has_room()
    assert box.close() == 1


def test_a_folder_that_can_not_be_written_leaves_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    box = outbox(tmp_path / "file", memory_bytes=100)
    box.set_away(away=True)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        box.append(bytes(60))
        assert box.has_room()
        box.append(bytes(60))
        assert not box.has_room()
    assert len(caplog.records) == 1
    assert box.close() == 0
    assert box.lost == 2


def test_a_spool_damaged_meanwhile_is_set_aside_and_the_rest_goes_on(
    spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    box = outbox(spool_folder)
    box.append(b"one")
    box.append(b"two")
    box.set_away(away=True)
    box.set_away(away=False)
    box.append(b"three")
    assert box.spool is not None
    with sqlite3.connect(box.spool.path) as database:
        database.execute("DELETE FROM batch WHERE number = 2")
    database.close()
    assert box.take(1, timeout=0) == b"one"
    with caplog.at_level(logging.WARNING, "gradiometer"), pytest.raises(SpoolDamaged):
        box.take(2, timeout=0)
    assert "damaged spool was set aside" in caplog.text
    assert box.lost == 2
    assert not box.welcome(0)
    assert (box.take(3, timeout=0), box.sequence(3)) == (b"three", 1)
    box.close()


def test_waiting_ends_when_a_batch_or_the_end_comes() -> None:
    box = outbox(None)
    got: list[bytes | None] = []
    thread = threading.Thread(target=lambda: got.append(box.take(1, timeout=30)))
    thread.start()
    box.append(b"one")
    thread.join(10)
    assert got == [b"one"]
    thread = threading.Thread(target=lambda: got.append(box.take(2, timeout=30)))
    thread.start()
    box.finish()
    thread.join(10)
    assert got == [b"one", None]
    assert not box.wait_empty(timeout=0)
    box.acknowledge(1)
    assert box.wait_empty(timeout=0)


def test_after_the_end_a_batch_is_counted_as_lost() -> None:
    box = outbox(None)
    box.close()
    box.append(b"late")
    assert box.lost == 1


FORKING = """
import os, sys
from pathlib import Path
from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.spool import Spool, leftovers
from gradiometer.protos.run_pb2 import Run
box = Outbox(lambda collector, offset: Spool.create(Path(sys.argv[1]), Run(run_id="a"), collector, offset))
box.set_away(away=True)
box.append(b"one")
child = os.fork()
if child == 0:
    box.append(b"from the child")
    os._exit(box.close())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
box.append(b"two")
assert [box.take(number, timeout=0) for number in (1, 2)] == [b"one", b"two"]
assert box.close() == 2
"""


def test_a_forked_child_leaves_the_spool_to_its_parent(spool_folder: Path) -> None:
    """In a process of its own: other libraries in this one object to a fork."""
    command = [sys.executable, "-W", "error", "-c", FORKING, str(spool_folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "src"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (spool,) = leftovers(spool_folder)
    assert spool.read(2) == b"two"
    spool.close()
