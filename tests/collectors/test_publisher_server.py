"""The publisher against the real server, in a process of its own that is killed again and again."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from gradiometer.collectors.publisher import Publisher
from gradiometer.protos import query_pb2, query_pb2_grpc
from gradiometer.protos.columns import column_arrays, scalar_arrays
from gradiometer.server.remote import RemoteStore
from gradiometer.server.report import report
from gradiometer.stats_core import selection
from gradiometer.stats_core.examples import outliers
from gradiometer.stats_core.histogram import sketch_rows
from tests.fake_ingest import eventually, layers, spools

NAMES = selection.columns("default")


class RealServer:
    """`python -m gradiometer.server` on a data directory; always on the same port once it has one."""

    def __init__(self, data: Path) -> None:
        self.endpoint = "127.0.0.1:0"
        self._data = data
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "gradiometer.server", "--grpc", self.endpoint, "--http", "127.0.0.1:0"]
        self._process = subprocess.Popen(
            [*command, "--data", str(self._data)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.endpoint = json.loads(self._process.stdout.readline())["grpc"]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def stored(self, run_id: str) -> tuple[int, dict[int, tuple[float, float]]]:
        """How many steps the server says it has, and of each its first column's value and its loss."""
        with grpc.insecure_channel(self.endpoint) as channel:
            stub = query_pb2_grpc.QueryServiceStub(channel)
            statuses = {status.run.run_id: status for status in stub.ListRuns(query_pb2.ListRunsRequest()).runs}
            if run_id not in statuses:
                return 0, {}
            found = {}
            for answer in stub.QueryRange(query_pb2.QueryRangeRequest(run_id=run_id)):
                values, losses = column_arrays(answer.batch)[NAMES[0]], scalar_arrays(answer.batch)["loss"]
                for at, step in enumerate(answer.batch.steps):
                    assert step not in found
                    found[step] = (float(values[at, -1]), float(losses[at]))
            return statuses[run_id].stored_steps, found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RealServer]:
    made = RealServer(tmp_path / "data")
    made.start()
    yield made
    made.kill()


def rows(value: float) -> np.ndarray:
    return np.full((len(NAMES), 2), value, np.float32)


def test_a_server_killed_while_the_job_runs_has_every_step_exactly_once(server: RealServer, spool_folder: Path) -> None:
    step = 0
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        for _ in range(3):
            for _ in range(200):
                publisher.record_rows(step, rows(step), {"loss": step / 2}, step)
                step += 1
            reached = step - 150
            eventually(lambda: publisher._outbox.acknowledged > 0 and server.stored("a")[0] >= reached)  # noqa: B023
            server.kill()
            for _ in range(50):
                publisher.record_rows(step, rows(step), {"loss": step / 2}, step)
                step += 1
            server.start()
        eventually(lambda: server.stored("a")[0] == step, seconds=30)
        assert publisher.dropped == 0
    count, found = server.stored("a")
    assert count == step
    assert found == {number: (float(number), number / 2) for number in range(step)}
    assert spools(spool_folder) == []


def test_distributions_single_examples_and_extreme_scales_are_in_the_report(server: RealServer) -> None:
    asked = ["default", "outliers", "example_norm", "element_deviation_ratio"]
    rng = np.random.default_rng(0)
    with Publisher("a", server.endpoint, params=layers(), config={"statistics": asked}) as publisher:
        for step in range(6):
            norms = (rng.pareto(2.0, (2, 300)) + 1).astype(np.float32)
            norms[0, 0] = 1000.0 + step
            sketches = {"example_norm": sketch_rows(norms), "element_deviation_ratio": sketch_rows(norms**2)}
            found = outliers(norms[0] ** 2, 2)
            scalars = {"unit_exponent": 60.0, "norm_median": 1.5}
            ids = [f"image-{row}" for row in range(300)]
            publisher.record_rows(step, rows(2.0), scalars, step, sketches=sketches, outliers=found, ids=ids)
        eventually(lambda: publisher._outbox.acknowledged > 0 and publisher._outbox.is_empty)
    with RemoteStore(server.endpoint) as store:
        (run,) = report(store, "a", window=4)
    assert run.layers("batch_variance").tolist() == [2 * 2.0**120] * 2
    assert run.layers("count").tolist() == [2.0, 2.0]
    assert run.model("norm_median") == 1.5 * 2.0**60
    assert [(one.example_id, one.step, one.norm / 2.0**60) for one in run.distributions.largest(1)] == [
        ("image-0", 5, 1005.0)
    ]
    assert run.distributions.layer("example_norm", 1).count == 4 * 300
    assert run.distributions.layer("example_norm", 1).quantile(0.5) == pytest.approx(2**0.5 * 2.0**60, rel=0.2)
    assert run.distributions.layer("element_deviation_ratio", 1).quantile(0.5) == pytest.approx(2, rel=0.4)
    tail = run.distributions.tail(1)
    assert tail is not None
    assert abs(tail.alpha - 2) < 4 * tail.standard_error


def test_a_job_that_never_saw_its_server_is_sent_by_the_next(server: RealServer, spool_folder: Path) -> None:
    server.kill()
    with Publisher("first", server.endpoint, params=layers()) as publisher:
        for step in range(30):
            publisher.record_rows(step, rows(step), {"loss": step / 2}, step)
        eventually(lambda: publisher.state == "no server")
    server.start()
    with Publisher("second", server.endpoint, params=layers()):
        eventually(lambda: server.stored("first")[0] == 30)
    assert server.stored("first")[1] == {step: (float(step), step / 2) for step in range(30)}
    assert spools(spool_folder) == []


def test_a_run_of_other_layers_is_refused_in_the_servers_words_and_what_is_stored_stays(
    server: RealServer, caplog: pytest.LogCaptureFixture
) -> None:
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record_rows(0, rows(1.0), {"loss": 0.5}, 0)
    with Publisher("a", server.endpoint, params=layers(3)) as publisher:
        eventually(lambda: publisher.state.startswith("refused"))
    assert "ALREADY_EXISTS" in caplog.text
    assert server.stored("a") == (1, {0: (1.0, 0.5)})
