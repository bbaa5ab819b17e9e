"""The server as a process: starting, stopping, being killed, and what it refuses to start on."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import column_arrays
from gradiometer.protos.ingest_pb2 import PublishRequest
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub
from gradiometer.protos.query_pb2 import SubscribeRequest
from gradiometer.protos.query_pb2_grpc import QueryServiceStub
from gradiometer.server.datadir import DataDirectory
from gradiometer.server.remote import RemoteStore
from gradiometer.server.store import EmbeddedStore, open_readonly
from gradiometer.stats_core.errors import StoreError
from tests.server.batches import entry, hello, make_batch, make_run, numbered, register, serving, settings
from tests.server_process import ROOT, eventually, running_server, start_server

NAMES = ("gradiometer.v1.IngestService", "gradiometer.v1.QueryService")


def refused(*flags: str) -> str:
    """What a server that can't start says on its way out."""
    done = subprocess.run(
        [sys.executable, "-m", "gradiometer.server", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("gradiometer: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("gradiometer: ")


def test_a_server_announces_where_it_listens_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server:
        assert int(server.grpc.rpartition(":")[2]) > 0
        with urlopen(f"http://{server.http}/healthz") as answer:
            assert json.load(answer)["status"] == "ok"
        with grpc.insecure_channel(server.grpc) as channel:
            IngestServiceStub(channel).RegisterRun(register(make_run()))
        assert server.stop() == 0
    log = (tmp_path / "data.log").read_text()
    assert "serving" in log
    assert "stopped" in log
    assert "rror" not in log


def test_at_sigterm_open_streams_are_acknowledged_told_and_ended(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server, grpc.insecure_channel(server.grpc) as channel:
        stub = IngestServiceStub(channel)
        stub.RegisterRun(register(make_run()))
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAMES[0]), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        viewer = QueryServiceStub(channel).Subscribe(SubscribeRequest(), timeout=60)
        viewer.initial_metadata()
        feed: queue.SimpleQueue[PublishRequest | None] = queue.SimpleQueue()
        feed.put(hello())
        stream = stub.Publish(iter(feed.get, None), timeout=60)
        assert next(stream).durable_sequence == 0
        for sequence in range(1, 21):
            feed.put(numbered(sequence, make_batch(sequence)))
        acknowledged = [next(stream).durable_sequence]
        assert next(viewer).batch.steps
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            acknowledged.extend(answer.durable_sequence for answer in stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, "what a publisher tries again after"
        feed.put(None)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.process.wait(30) == 0
        assert server.process.stdout is not None
        server.process.stdout.close()
        assert time.monotonic() - started < 10
    with open_readonly(tmp_path / "data") as store:
        assert store.list_runs()[0].stored_steps >= acknowledged[-1] >= 1


def test_health_and_reflection_know_the_services(tmp_path: Path) -> None:
    with serving(settings(tmp_path)) as bound, grpc.insecure_channel(bound.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", *NAMES):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (listed,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        assert set(NAMES) <= {service.name for service in listed.list_services_response.service}
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAMES[0])
        (found,) = stub.ServerReflectionInfo(iter([asked]))
        assert found.file_descriptor_response.file_descriptor_proto


def test_a_second_server_on_the_directory_or_a_port_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server, RemoteStore(server.grpc) as store:
        said = refused("--data", str(server.data))
        assert f"held by process {server.process.pid}; stop that server or choose another directory" in said
        said = refused("--data", str(tmp_path / "other"), "--grpc", server.grpc)
        assert f"port is free, got grpc='{server.grpc}'; stop the server that has it, or choose another" in said
        assert said.endswith("with --grpc")
        said = refused("--data", str(tmp_path / "other"), "--http", server.http)
        assert said.endswith(f"got http='{server.http}'; stop the server that has it, or choose another with --http")
        assert store.list_runs() == []
    start_server(tmp_path / "other").stop()


def test_a_directory_of_another_version_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("gradiometer-data 999\n")
    assert "use the version of gradiometer that wrote it" in refused("--data", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["FORMAT"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--grpc", "nowhere"), "serve needs HOST:PORT, got grpc='nowhere'; write for example '127.0.0.1:50051'"),
        (("--http", "0.0.0.0:0"), "serve needs a loopback address, got http='0.0.0.0:0'; nothing is encrypted"),
    ],
)
def test_an_address_that_can_not_or_may_not_be_used_is_refused(tmp_path: Path, flags: tuple, message: str) -> None:
    assert refused("--data", str(tmp_path), *flags).startswith(message)


def test_other_machines_are_let_in_on_request_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(tmp_path, allow_remote=True).model_copy(update={"grpc": "0.0.0.0:0"})
    with serving(chosen) as bound, grpc.insecure_channel(bound.grpc.replace("0.0.0.0", "127.0.0.1")) as channel:
        assert IngestServiceStub(channel).RegisterRun(register(make_run())).created
    assert "everyone who reaches it can read and write, unencrypted" in capsys.readouterr().out


def test_a_restart_keeps_the_page_alive(tmp_path: Path) -> None:
    with serving(settings(tmp_path)) as bound, grpc.insecure_channel(bound.grpc) as channel:
        stub = IngestServiceStub(channel)
        stub.RegisterRun(register(make_run()))
        for _ in stub.Publish(iter([hello(), *(numbered(n, make_batch(n, loss=0.5)) for n in range(1, 41))])):
            pass
    with serving(settings(tmp_path, replay_steps=10)) as bound:
        with urlopen(f"http://{bound.http}/api/runs") as answer:
            assert [run["run"] for run in json.load(answer)["runs"]] == ["mnist"]
        with urlopen(f"http://{bound.http}/api/runs/mnist") as answer:
            assert '"dense"' in answer.read().decode()


def test_a_damaged_run_does_not_keep_the_server_from_starting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedStore(settings(tmp_path)) as store:
        for run_id in ("good", "bad"):
            store.register(make_run(run_id)).result(30)
            store.append(entry(1, make_batch(1), run_id)).result(30)
        store.roll()
    for path in (tmp_path / "segments" / "bad").iterdir():
        path.write_bytes(b"x")
    with serving(settings(tmp_path)) as bound, RemoteStore(bound.grpc) as remote:
        assert "a run can't be shown" in capsys.readouterr().out
        assert [step for part in remote.read("good") for step in part.steps] == [1]
        with pytest.raises(Exception, match="restore the file from a copy"):
            list(remote.read("bad"))


@dataclass
class Publisher:
    """A collector as the protocol asks: it keeps what is not acknowledged and goes on from the durable sequence."""

    number: int
    address: str
    total: int
    acknowledged: int = 0
    connections: int = 0
    given_up: bool = False
    trouble: list[BaseException] = field(default_factory=list)

    def batch(self, sequence: int) -> StepBatch:
        return make_batch(self.number * 1_000_000 + sequence, seed=self.number, nanos=sequence)

    def work(self) -> None:
        try:
            while self.acknowledged < self.total and not self.given_up:
                try:
                    self.connect()
                except grpc.RpcError as error:
                    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                        raise
                    time.sleep(0.01)
        except BaseException as error:  # noqa: BLE001 - looked at in the test's thread
            self.trouble.append(error)

    def connect(self) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = IngestServiceStub(channel)
            stub.RegisterRun(register(make_run()), timeout=10)
            feed: queue.SimpleQueue[PublishRequest | None] = queue.SimpleQueue()
            feed.put(hello(collector_id=f"c{self.number}"))
            stream = stub.Publish(iter(feed.get, None), timeout=60)
            try:
                durable = next(stream).durable_sequence
                assert durable >= self.acknowledged, "the server forgot what it had acknowledged"
                self.acknowledged, following = durable, durable + 1
                self.connections += 1
                while True:
                    for sequence in range(following, min(self.acknowledged + 17, self.total + 1)):
                        feed.put(numbered(sequence, self.batch(sequence)))
                        following = sequence + 1
                    if self.acknowledged >= self.total:
                        return
                    self.acknowledged = max(self.acknowledged, next(stream).durable_sequence)
            finally:
                feed.put(None)
                stream.cancel()


def test_killed_again_and_again_each_acknowledged_batch_is_stored_exactly_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL with three collectors publishing, and the roller busy all the while."""
    monkeypatch.setenv("GRADIOMETER_ROLL_BYTES", "4096")
    monkeypatch.setenv("GRADIOMETER_ROLL_CHECK_SECONDS", "0.02")
    kills, total = 6, 1500
    server = start_server(tmp_path / "data")
    address = server.grpc
    publishers = [Publisher(number, address, total) for number in range(3)]
    threads = [threading.Thread(target=publisher.work) for publisher in publishers]
    try:
        for thread in threads:
            thread.start()
        for kill in range(1, kills + 1):
            target = kill * total // (kills + 1)
            eventually(lambda: any(p.trouble or p.acknowledged >= target for p in publishers), within=60)  # noqa: B023
            server.kill()
            acknowledged = sum(publisher.acknowledged for publisher in publishers)
            with open_readonly(tmp_path / "data") as store:
                assert store.list_runs()[0].stored_steps >= acknowledged
            server = start_server(tmp_path / "data", grpc=address)
        for thread in threads:
            thread.join(90)
            assert not thread.is_alive()
        assert [publisher.trouble for publisher in publishers] == [[], [], []]
        assert server.stop() == 0
    finally:
        for publisher in publishers:
            publisher.given_up = True
        if server.process.poll() is None:
            server.kill()
        for thread in threads:
            thread.join(30)
    assert sum(publisher.connections for publisher in publishers) > kills, "the kills fell among the publishing"
    assert list((tmp_path / "data" / "segments").rglob("*.parquet")), "the roller was at work"
    with open_readonly(tmp_path / "data") as store:
        assert store.raw_rows("mnist") == 3 * total * 2, "each batch once, before any reader drops doubles"
        parts = list(store.read("mnist"))
    want = [publisher.batch(sequence) for publisher in publishers for sequence in range(1, total + 1)]
    assert [step for part in parts for step in part.steps] == [batch.steps[0] for batch in want]
    for name in want[0].columns:
        got = np.concatenate([column_arrays(part)[name] for part in parts])
        assert np.array_equal(got, np.concatenate([column_arrays(batch)[name] for batch in want]))


def test_a_killed_server_leaves_the_directory_to_the_next_one(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data")
    with pytest.raises(StoreError, match=f"held by process {server.process.pid}"):
        DataDirectory(tmp_path / "data")
    server.kill()
    assert start_server(tmp_path / "data").stop() == 0
