import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from gradiometer.collectors.endpoint import Credentials, Endpoint
from gradiometer.collectors.replay import replay
from gradiometer.collectors.spool import Spool
from gradiometer.collectors.stream import open_channel
from gradiometer.protos import run_pb2
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub
from gradiometer.protos.run_pb2 import Run
from tests.fake_ingest import IngestServer, layers, spools


@pytest.fixture
def server() -> Iterator[IngestServer]:
    with IngestServer() as server:
        yield server


@pytest.fixture
def stub(server: IngestServer) -> Iterator[IngestServiceStub]:
    with open_channel(Endpoint("127.0.0.1", server.port), Credentials()) as channel:
        yield IngestServiceStub(channel)


def leave(folder: Path, run_id: str, steps: range, *, first: int = 1, num_layers: int = 2) -> str:
    run = Run(
        run_id=run_id,
        layers=layers(num_layers),
        loss=run_pb2.LossNormalization(reduction=run_pb2.LOSS_REDUCTION_MEAN),
    )
    spool = Spool.create(folder, run, f"collector-of-{run_id}")
    batches = [StepBatch(steps=[step], unix_nanos=[0], num_layers=num_layers).SerializeToString() for step in steps]
    spool.append(enumerate(batches, first))
    spool.close()
    return spool.collector_id


def test_what_was_left_is_sent_and_removed(server: IngestServer, stub: IngestServiceStub, spool_folder: Path) -> None:
    leave(spool_folder, "a", range(3))
    leave(spool_folder, "b", range(100))
    assert replay(stub, spool_folder) == 2
    assert server.steps("a") == [0, 1, 2]
    assert server.steps("b") == list(range(100))
    assert spools(spool_folder) == []


def test_what_the_server_had_before_the_crash_is_not_stored_twice(
    server: IngestServer, stub: IngestServiceStub, spool_folder: Path
) -> None:
    collector = leave(spool_folder, "a", range(3))
    server.stored["a", collector] = [StepBatch(steps=[0]), StepBatch(steps=[1])]
    assert replay(stub, spool_folder) == 1
    assert server.steps("a") == [0, 1, 2]


def test_a_rest_whose_beginning_no_server_has_is_sent_under_another_id(
    server: IngestServer, stub: IngestServiceStub, spool_folder: Path
) -> None:
    collector = leave(spool_folder, "a", range(5, 8), first=6)
    assert replay(stub, spool_folder) == 1
    assert server.steps("a") == [5, 6, 7]
    assert ("a", collector) not in {key for key, found in server.stored.items() if found}


def test_an_owned_spool_is_left_to_its_owner(server: IngestServer, stub: IngestServiceStub, spool_folder: Path) -> None:
    collector = leave(spool_folder, "a", range(3))
    owner = Spool.open(spool_folder / f"{collector}.spool")
    assert replay(stub, spool_folder) == 0
    assert server.steps("a") == []
    owner.close()


def test_a_refused_spool_is_set_aside_and_the_others_are_sent(
    server: IngestServer, stub: IngestServiceStub, spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.runs["a"] = Run(run_id="a", layers=layers(5))
    collector = leave(spool_folder, "a", range(3))
    leave(spool_folder, "b", range(2))
    with caplog.at_level(logging.WARNING, "gradiometer"):
        assert replay(stub, spool_folder) == 1
    assert server.steps("b") == [0, 1]
    assert spools(spool_folder) == [f"{collector}.rejected"]
    assert "a spool of run a was refused (ALREADY_EXISTS: run has other layers" in caplog.text


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED])
def test_where_this_process_can_not_send_the_spool_stays(
    server: IngestServer, stub: IngestServiceStub, spool_folder: Path, code: grpc.StatusCode
) -> None:
    collector = leave(spool_folder, "a", range(3))
    server.refuse = code
    assert replay(stub, spool_folder) == 0
    assert f"{collector}.spool" in spools(spool_folder)
    server.refuse = None
    assert replay(stub, spool_folder) == 1
    assert server.steps("a") == [0, 1, 2]


def test_an_interrupted_replay_goes_on_where_it_was(
    server: IngestServer, stub: IngestServiceStub, spool_folder: Path
) -> None:
    leave(spool_folder, "a", range(10))
    server.abort_after = 4
    assert replay(stub, spool_folder) == 0
    server.abort_after = None
    assert replay(stub, spool_folder) == 1
    assert server.steps("a") == list(range(10))


def test_damage_found_on_the_way_loses_that_spool_alone(
    server: IngestServer, stub: IngestServiceStub, spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collector = leave(spool_folder, "a", range(300))
    leave(spool_folder, "b", range(2))
    with sqlite3.connect(spool_folder / f"{collector}.spool") as database:
        database.execute("DELETE FROM batch WHERE number = 201")
    database.close()
    with caplog.at_level(logging.WARNING, "gradiometer"):
        replay(stub, spool_folder)
    assert server.steps("a") == list(range(200))
    assert server.steps("b") == [0, 1]
    assert "a damaged spool was set aside" in caplog.text
    assert spools(spool_folder) == [f"{collector}.damaged"]


def test_a_file_without_its_last_page_is_set_aside_and_the_others_are_sent(
    server: IngestServer, stub: IngestServiceStub, spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collector = leave(spool_folder, "a", range(300))
    leave(spool_folder, "b", range(2))
    path = spool_folder / f"{collector}.spool"
    path.write_bytes(path.read_bytes()[:-4096] + b"\xff" * 4096)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        replay(stub, spool_folder)
    assert server.steps("b") == [0, 1]
    assert spools(spool_folder) == [f"{collector}.damaged"]
    assert server.steps("a") == []
