"""The data directory: one holder, one format, and nobody else's things touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradiometer.server.datadir import FORMAT, DataDirectory, check_format
from gradiometer.stats_core.errors import StoreError


def listing(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_new_directory_is_made_and_marked(tmp_path: Path) -> None:
    DataDirectory(tmp_path / "a" / "b").close()
    assert (tmp_path / "a" / "b" / "FORMAT").read_text() == f"gradiometer-data {FORMAT}\n"


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    held = DataDirectory(tmp_path)
    with pytest.raises(StoreError, match=rf"got data='{tmp_path}' held by process {os.getpid()}; stop that server"):
        DataDirectory(tmp_path)
    held.close()
    DataDirectory(tmp_path).close()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, gradiometer.server.datadir as d;"
        f"d.DataDirectory(pathlib.Path({str(tmp_path)!r})); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == -9
    DataDirectory(tmp_path).close()


@pytest.mark.parametrize("text", ["gradiometer-data 999\n", "something else", ""])
def test_a_directory_of_another_version_is_refused_and_left_as_it_was(tmp_path: Path, text: str) -> None:
    (tmp_path / "FORMAT").write_text(text)
    (tmp_path / "journal.db").write_bytes(b"of another version")
    before = listing(tmp_path)
    with pytest.raises(
        StoreError, match=f"Store needs data of format {FORMAT}, got .*; use the version of gradiometer"
    ):
        DataDirectory(tmp_path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["segments", "journal.db"])
def test_somebody_elses_files_of_our_names_are_not_taken_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(StoreError, match=f"with a '{name}' that is not its own; name another directory"):
        DataDirectory(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_other_files_beside_ours_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("hello")
    (tmp_path / "FORMAT.tmp").write_text("half")  # a crash while the directory was being marked
    DataDirectory(tmp_path).close()
    check_format(tmp_path)


def test_a_path_that_can_not_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"needs a directory that it can write, got .*choose another with --data"):
        DataDirectory(tmp_path / "file" / "data")


def test_reading_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="name the directory of a server with --data"):
        check_format(tmp_path)


def test_a_path_that_is_a_file_or_holds_no_text_is_one_line_to_readers_and_servers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(StoreError, match=r"that it can read, got data='.*file' \(Not a directory\)"):
        check_format(path)
    with pytest.raises(StoreError, match="that it can write, got data="):
        DataDirectory(path)
    (tmp_path / "FORMAT").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="its FORMAT is no text"):
        check_format(tmp_path)
