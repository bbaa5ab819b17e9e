import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gradiometer.collectors.spool import Spool, SpoolBusy, directory, leftovers, new_collector_id, trim
from gradiometer.protos.run_pb2 import Run
from tests.fake_ingest import spools

RUN = Run(run_id="a")


def filled(folder: Path, collector: str = "c0", batches: int = 3) -> Path:
    spool = Spool.create(folder, RUN, collector)
    spool.append((number, b"body %d" % number) for number in range(1, batches + 1))
    spool.close()
    return spool.path


def test_the_folder_is_the_users_choice_else_in_the_cache() -> None:
    assert directory({"GRADIOMETER_SPOOL": "/a", "HOME": "/h"}) == Path("/a")
    assert directory({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/gradiometer/spool")
    assert directory({"HOME": "/h"}).is_relative_to("/h")


def test_collector_ids_differ() -> None:
    assert len({new_collector_id() for _ in range(100)}) == 100


def test_a_spool_is_read_back_by_another_owner(spool_folder: Path) -> None:
    path = filled(spool_folder)
    spool = Spool.open(path)
    assert (spool.run, spool.collector_id, spool.offset) == (RUN, "c0", 0)
    assert spool.numbers() == range(1, 4)
    assert [spool.read(number) for number in spool.numbers()] == [b"body 1", b"body 2", b"body 3"]
    spool.forget(2)
    assert spool.numbers() == range(3, 4)
    spool.renumber("c1", 2)
    spool.close()
    again = Spool.open(path)
    assert (again.collector_id, again.offset, again.numbers()) == ("c1", 2, range(3, 4))
    again.close(remove=True)
    assert spools(spool_folder) == []


def test_a_batch_that_is_not_there_is_damage(spool_folder: Path) -> None:
    spool = Spool.open(filled(spool_folder))
    with pytest.raises(sqlite3.DatabaseError, match="batch 9 is not in it"):
        spool.read(9)
    spool.close()


def test_only_its_users_may_look_into_the_folder(spool_folder: Path) -> None:
    filled(spool_folder)
    assert spool_folder.stat().st_mode & 0o077 == 0


def test_a_spool_has_one_owner_at_a_time(spool_folder: Path) -> None:
    spool = Spool.open(filled(spool_folder))
    with pytest.raises(SpoolBusy):
        Spool.open(spool.path)
    assert list(leftovers(spool_folder)) == []
    spool.close()
    Spool.open(spool.path).close()


def test_the_death_of_its_owner_frees_a_spool(spool_folder: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gradiometer.collectors.spool import Spool\nfrom gradiometer.protos.run_pb2 import Run\n"
        "spool = Spool.create(Path(sys.argv[1]), Run(run_id='a'), 'dead')\n"
        "spool.append([(1, b'kept')])\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(spool_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        assert list(leftovers(spool_folder)) == []
        process.kill()
        process.wait()
    (spool,) = leftovers(spool_folder)
    assert spool.read(1) == b"kept"
    spool.close()


def test_a_full_spool_keeps_what_it_has(spool_folder: Path) -> None:
    spool = Spool.create(spool_folder, RUN, "c0", max_bytes=64 << 10)
    spool.append([(1, bytes(20_000))])
    with pytest.raises(sqlite3.OperationalError, match="full"):
        spool.append([(2, bytes(30_000)), (3, bytes(30_000))])
    assert spool.numbers() == range(1, 2)
    spool.forget(1)
    spool.append([(2, bytes(20_000))])
    assert spool.read(2) == bytes(20_000)
    spool.close()


def test_a_damaged_spool_is_set_aside_with_one_line(spool_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(spool_folder, "good")
    (spool_folder / "bad.spool").write_bytes(b"this is no database" * 100)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        found = list(leftovers(spool_folder))
    assert [spool.collector_id for spool in found] == ["good"]
    assert len(caplog.records) == 1
    assert "a damaged spool was set aside as" in caplog.text
    found[0].close()
    assert spools(spool_folder) == ["bad.damaged", "good.spool", "good.spool.lock"]


def test_a_spool_whose_owner_died_while_making_it_is_removed_without_a_word(
    spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool_folder.mkdir()
    (spool_folder / "empty.spool").touch()
    assert list(leftovers(spool_folder)) == []
    assert spools(spool_folder) == []
    assert caplog.records == []


def test_a_database_of_something_else_is_set_aside(spool_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(spool_folder)
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM collector")
    database.close()
    assert list(leftovers(spool_folder)) == []
    assert spools(spool_folder) == ["c0.damaged"]
    assert "(no collector in it)" in caplog.text


def test_damaged_pages_are_found_when_it_is_opened(spool_folder: Path) -> None:
    path = filled(spool_folder, batches=200)
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = b"\xff" * (len(content) - 4096 * 2)
    path.write_bytes(content)
    with pytest.raises(sqlite3.DatabaseError):
        Spool.open(path)
    path.unlink()
    with pytest.raises(SpoolBusy):
        Spool.open(path)
    assert spools(spool_folder) == []


def test_a_spool_of_a_newer_version_is_left_alone(spool_folder: Path) -> None:
    path = filled(spool_folder)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    assert list(leftovers(spool_folder)) == []
    assert path.exists()


def test_the_oldest_files_go_first_where_the_folder_is_too_large(
    spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [filled(spool_folder, f"c{number}") for number in range(4)]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1000 - age, 1000 - age))
    owned = Spool.open(paths[0])
    size = sum(path.stat().st_size for path in paths)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        trim(spool_folder, size - 1)
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert "c1.spool was discarded" in caplog.text
    trim(spool_folder, 0)
    assert [path.exists() for path in paths] == [True, False, False, False]
    owned.close(remove=True)
    assert spools(spool_folder) == []


def test_a_folder_that_can_not_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Spool.create(tmp_path / "file" / "spool", RUN, "c0")
