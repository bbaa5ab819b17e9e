"""DuckDB over a snapshot: what a query may not do, and files that are not as they were written."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gradiometer.server import engine
from gradiometer.server.segments import Segment
from gradiometer.server.store import EmbeddedStore
from gradiometer.server.tables import empty
from gradiometer.stats_core.errors import StoreError
from tests.server.batches import entry, fill, joined, make_batch, make_run, settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(settings(tmp_path / "data")) as store:
        store.register(make_run()).result(30)
        yield store


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


@pytest.mark.parametrize("name", ["it's", "a b", "x[1]*?y", "ünï"])
def test_the_path_of_the_data_directory_may_have_any_characters(tmp_path: Path, name: str) -> None:
    with EmbeddedStore(settings(tmp_path / name)) as store:
        store.register(make_run()).result(30)
        fill(store, "both", make_batch(0), make_batch(1))
        assert joined(store.read("mnist"))[0] == [0, 1]


def test_a_segment_is_compared_with_the_manifest_once(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = engine.check

    def counting(directory: Path, segment: Segment) -> None:
        read.append(segment.kind)
        real(directory, segment)

    monkeypatch.setattr(engine, "check", counting)
    fill(store, "segments", make_batch(0))
    for _ in range(3):
        list(store.read("mnist"))
    assert sorted(read) == ["layers", "steps"]


def test_a_query_can_not_name_variables_of_the_code_that_calls(store: EmbeddedStore) -> None:
    secret = empty("events")
    assert secret.num_rows == 0
    with pytest.raises(ValueError, match="secret"):
        store.sql("SELECT * FROM secret")
