import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradiometer.collectors.publisher import Publisher
from gradiometer.protos import run_pb2
from gradiometer.protos.columns import column_arrays, scalar_arrays
from gradiometer.protos.run_pb2 import Run
from gradiometer.stats_core import Summary, selection
from gradiometer.stats_core.examples import outliers
from gradiometer.stats_core.histogram import sketch_rows
from tests.fake_ingest import IngestServer, eventually, layers, spools

NAMES = selection.columns("default")


@pytest.fixture
def server() -> Iterator[IngestServer]:
    with IngestServer() as server:
        yield server


@pytest.fixture
def nowhere() -> str:
    """An endpoint at which nothing listens."""
    server = IngestServer().start()
    server.kill()
    return server.endpoint


def rows(value: float, num_layers: int = 2) -> np.ndarray:
    return np.full((len(NAMES), num_layers), value, np.float32)


def summary(value: float, count: Any = 8) -> Summary:
    return Summary(count, {name: np.full(2, value, np.float32) for name in NAMES})


def message() -> Run:
    return Run(
        run_id="opened",
        layers=layers(),
        loss=run_pb2.LossNormalization(reduction=run_pb2.LOSS_REDUCTION_SUM),
        tier="light",
    )


def test_what_is_recorded_arrives_as_it_was(server: IngestServer) -> None:
    with Publisher("a", server.endpoint, params=layers(), config={"batch": 8}) as publisher:
        publisher.record(0, summary(1.5), loss=0.5, tokens=64, temperature=2.0)
        publisher.record_rows(1, rows(2.5), {"loss": 0.25}, 77)
        publisher.event("note", "half way")
    assert [layer.name for layer in server.runs["a"].layers] == ["layer.0", "layer.1"]
    assert server.runs["a"].config == {"batch": "8"}
    assert server.steps("a") == [0, 1]
    batches = server.batches("a")
    values = np.concatenate([column_arrays(batch)[name] for batch in batches for name in NAMES[:1]])
    np.testing.assert_array_equal(values, [[1.5, 1.5], [2.5, 2.5]])
    first = scalar_arrays(batches[0])
    assert (first["loss"][0], first["tokens"][0], first["temperature"][0], first["examples"][0]) == (0.5, 64, 2.0, 8)
    assert batches[-1].unix_nanos[-1] == 77
    (event,) = [event for batch in batches for event in batch.events]
    assert (event.kind, event.text, event.step) == ("note", "half way", 1)
    assert (publisher.dropped, publisher.state) == (0, "closed")


def test_measurements_are_seen_while_the_job_runs(server: IngestServer) -> None:
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record(0, summary(1.0))
        eventually(lambda: server.steps("a") == [0], seconds=5)
        assert publisher.state == "connected"


def test_a_message_at_hand_is_published_with_the_columns_of_its_tier(server: IngestServer) -> None:
    light = selection.columns("light")
    with Publisher.open(message(), server.endpoint) as publisher:
        publisher.record_rows(3, np.ones((len(light), 2), np.float32), {}, 0)
    assert publisher.run_id == "opened"
    assert server.steps("opened") == [3]
    assert set(server.batches("opened")[0].columns) == set(light)
    assert server.runs["opened"].loss.reduction == run_pb2.LOSS_REDUCTION_SUM
    assert server.runs["opened"].world.host


def test_memory_that_was_handed_over_may_be_used_again(server: IngestServer) -> None:
    reused, columns = rows(1.0), {"mean_sq_norm": np.ones(2)}
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record_rows(0, reused, {}, 0)
        publisher.record(1, Summary(8, columns))
        reused[:] = 9.0
        columns["mean_sq_norm"][:] = 9.0
    found = [column_arrays(batch)["mean_sq_norm"] for batch in server.batches("a")]
    np.testing.assert_array_equal(np.concatenate(found), np.ones((2, 2)))


def test_distributions_and_single_examples_arrive(server: IngestServer) -> None:
    sketches = {"example_norm": sketch_rows(np.array([[1.0, 2.0], [4.0, 4.0]], np.float32))}
    found = outliers(np.array([1.0, 9.0], np.float32), 2)
    with Publisher("a", server.endpoint, params=layers(), config={"statistics": ["default", "outliers"]}) as publisher:
        whole = summary(1.5)._replace(scalars={"norm_max": np.array(3.0)}, sketches=sketches, outliers=found)
        publisher.record(0, whole, ids=["cat", "dog"], loss=0.5)
        given = {"norm_max": 3.0}
        publisher.record_rows(1, rows(2.5), given, 77, sketches=sketches, outliers=found)
    assert server.runs["a"].tier == "default,outliers"
    assert server.steps("a") == [0, 1]
    histograms = [one for batch in server.batches("a") for one in batch.histograms]
    assert [one.layer for one in histograms] == [0, 1, 0, 1]
    assert [list(one.positive_index) for one in histograms] == [[0, 8], [16]] * 2
    examples = [one for batch in server.batches("a") for one in batch.examples]
    assert [(one.example_id, one.place, one.sq_norm) for one in examples] == [
        ("dog", 0, 9.0),
        ("cat", 1, 1.0),
        ("1", 0, 9.0),
        ("0", 1, 1.0),
    ]
    norm_max = np.concatenate([scalar_arrays(batch)["norm_max"] for batch in server.batches("a")])
    np.testing.assert_array_equal(norm_max, [3.0, 3.0])


def test_a_selection_is_published_with_its_columns(server: IngestServer) -> None:
    asked = ["light", "conflicting_share", "example_norm"]
    names = selection.columns(asked)
    assert names == (*selection.columns("light"), "conflicting_share")
    with Publisher("a", server.endpoint, params=layers(), config={"statistics": asked}) as publisher:
        publisher.record_rows(0, np.ones((len(names), 2), np.float32), {}, 0)
    assert server.runs["a"].tier == "light,conflicting_share,example_norm"
    assert set(server.batches("a")[0].columns) == set(names)


def test_numbers_of_the_summary_are_copied_and_one_that_is_given_takes_their_place(server: IngestServer) -> None:
    mine = {"norm_max": np.array(3.0), "norm_median": np.array(1.0)}
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record(0, summary(1.0)._replace(scalars=mine), norm_median=7.0)
        mine["norm_max"][...] = 99.0
    (batch,) = server.batches("a")
    assert (scalar_arrays(batch)["norm_max"][0], scalar_arrays(batch)["norm_median"][0]) == (3.0, 7.0)


def test_distributions_of_jax_are_read_behind_the_step(server: IngestServer) -> None:
    jax = pytest.importorskip("jax")
    values = jax.numpy.asarray([[1.0, 2.0], [4.0, 4.0]])
    sketches, found = jax.jit(lambda v: ({"example_norm": sketch_rows(v)}, outliers(v[0], 1)))(values)
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record(0, summary(1.0)._replace(sketches=sketches, outliers=found), ids=jax.numpy.asarray([7, 8]))
    (batch,) = server.batches("a")
    assert [list(one.positive_count) for one in batch.histograms] == [[1, 1], [2]]
    assert [one.example_id for one in batch.examples] == ["8"]


def test_a_step_that_was_not_measured_leaves_no_trace(server: IngestServer) -> None:
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record(0, summary(1.0, count=0), loss=1.0)
    assert server.batches("a") == []
    assert publisher.dropped == 0


def test_arrays_of_jax_are_read_behind_the_step(server: IngestServer) -> None:
    jnp = pytest.importorskip("jax.numpy")
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    with Publisher("a", server.endpoint, params=params) as publisher:
        for step in range(3):
            columns = {name: jnp.full((1,), step, jnp.float32) for name in NAMES}
            publisher.record(jnp.asarray(step), Summary(jnp.asarray(4 * (step != 1)), columns), loss=jnp.asarray(0.5))
    assert server.steps("a") == [0, 2]
    assert server.runs["a"].world.framework == "jax"
    values = np.concatenate([column_arrays(batch)["mean_sq_norm"] for batch in server.batches("a")])
    losses = np.concatenate([scalar_arrays(batch)["loss"] for batch in server.batches("a")])
    np.testing.assert_array_equal(values, [[0.0], [2.0]])
    np.testing.assert_array_equal(losses, [0.5, 0.5])


def test_recording_inside_jit_is_a_line_and_no_exception(
    server: IngestServer, caplog: pytest.LogCaptureFixture
) -> None:
    jax = pytest.importorskip("jax")
    with caplog.at_level(logging.WARNING, "gradiometer"), Publisher("a", server.endpoint, params=layers()) as publisher:

        @jax.jit
        def step(x: Any) -> Any:
            publisher.record(0, Summary(8, {"mean_sq_norm": x}))
            return x

        step(np.ones(2, np.float32))
    assert publisher.dropped == 1
    assert "a measurement was dropped: The numpy.ndarray conversion method" in caplog.text


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 2), np.float32), None, np.zeros((len(NAMES), 2))], ids=["shape", "nothing", "dtype"]
)
def test_rows_that_are_wrong_are_a_line_and_a_drop(
    server: IngestServer, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gradiometer"), Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record_rows(0, wrong, {}, 0)
        publisher.record_rows(1, wrong, {}, 0)
        publisher.record_rows(2, rows(1.0), {}, 0)
    assert publisher.dropped == 2
    assert len([record for record in caplog.records if "a measurement was dropped" in record.message]) == 1
    assert server.steps("a") == [2]


# -- no server, a slow one, a dead one ---------------------------------------------------------------------------------


def test_without_a_server_the_whole_life_is_spooled_and_sent_by_a_later_publisher(
    nowhere: str, spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gradiometer"):
        with Publisher("first", nowhere, params=layers()) as publisher:
            for step in range(50):
                publisher.record_rows(step, rows(step), {"loss": step}, step)
            eventually(lambda: publisher.state == "no server")
        assert publisher.dropped == 0
    assert len(caplog.records) == 1
    assert f"no server at {nowhere}; measurements are spooled in {spool_folder} and sent when one" in caplog.text
    assert any(name.endswith(".spool") for name in spools(spool_folder))
    with IngestServer() as server:
        with Publisher("second", server.endpoint, params=layers(3)) as later:
            later.record_rows(0, rows(0.0, 3), {}, 0)
        assert server.steps("second") == [0]
        assert server.steps("first") == list(range(50))
        values = np.concatenate([column_arrays(batch)["mean_sq_norm"] for batch in server.batches("first")])
        np.testing.assert_array_equal(values[:, 0], np.arange(50))
    assert spools(spool_folder) == []


def test_a_server_that_appears_later_gets_everything_from_the_start(nowhere: str) -> None:
    server = IngestServer()
    server.port = int(nowhere.rpartition(":")[2])
    with Publisher("a", nowhere, params=layers()) as publisher:
        for step in range(10):
            publisher.record_rows(step, rows(step), {}, 0)
        eventually(lambda: publisher.state == "no server")
        with server:
            eventually(lambda: server.steps("a") == list(range(10)))
            publisher.record_rows(10, rows(10), {}, 0)
            eventually(lambda: server.steps("a") == list(range(11)))


def test_a_hanging_server_blocks_no_step_and_drops_are_counted(server: IngestServer, spool_folder: Path) -> None:
    spool_folder.write_text("no folder: nothing can be spooled")
    server.hang = True
    publisher = Publisher("a", server.endpoint, params=layers(2000))
    assert publisher._slots is not None
    publisher._outbox._memory_limit = 1 << 20
    handed, slowest = 0, 0.0
    given = rows(1.0, 2000)
    deadline = time.monotonic() + 20
    while publisher.dropped < 100 and time.monotonic() < deadline:
        start = time.perf_counter()
        publisher.record_rows(handed, given, {}, 0)
        slowest = max(slowest, time.perf_counter() - start)
        handed += 1
    assert publisher.dropped >= 100
    assert slowest < 0.5  # an interpreter lock may be waited for on a busy machine; a server never
    server.hang = False
    eventually(lambda: len(publisher._slots or ()) == 0)
    publisher.record_rows(handed, given, {}, 0)
    publisher.close(timeout=20)
    stored = server.steps("a")
    assert len(stored) == len(set(stored)) == handed + 1 - publisher.dropped
    assert scalar_arrays(server.batches("a")[-1])["dropped_steps"][-1] == publisher.dropped


def test_a_full_spool_makes_later_steps_drop_and_keeps_the_earlier(
    nowhere: str, spool_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gradiometer.collectors.publisher._SPOOL_BYTES", 8 << 20)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        publisher = Publisher("a", nowhere, params=layers(1000))
        publisher._outbox._memory_limit = 1 << 20
        eventually(lambda: publisher.state == "no server")
        handed = 0
        given = rows(1.0, 1000)
        deadline = time.monotonic() + 20
        while publisher.dropped < 10 and time.monotonic() < deadline:
            publisher.record_rows(handed, given, {}, 0)
            handed += 1
        publisher.close()
    assert "measurements can't be spooled (database or disk is full)" in caplog.text
    with IngestServer() as server:
        Publisher("b", server.endpoint, params=layers()).close(timeout=10)
        stored = server.steps("a")
    assert len(stored) > 2
    assert stored == list(range(len(stored)))


def test_closing_returns_in_time_whatever_the_server_does(server: IngestServer, nowhere: str) -> None:
    server.hang = True
    for endpoint, timeout in ((server.endpoint, 0.5), (nowhere, 5.0), (server.endpoint, 0.0)):
        publisher = Publisher(None, endpoint, params=layers())
        publisher.record_rows(0, rows(0.0), {}, 0)
        start = time.monotonic()
        publisher.close(timeout=timeout)
        assert time.monotonic() - start < min(timeout, 1.0) + 1.5
        assert publisher.state == "closed"


def test_what_a_hanging_server_did_not_acknowledge_is_in_the_spool(server: IngestServer, spool_folder: Path) -> None:
    server.hang = True
    publisher = Publisher("a", server.endpoint, params=layers())
    eventually(lambda: publisher.state == "connected")
    publisher.record_rows(0, rows(0.0), {}, 0)
    publisher.close(timeout=0.5)
    assert [name for name in spools(spool_folder) if name.endswith(".spool")] != []
    server.hang = False
    Publisher("b", server.endpoint, params=layers()).close(timeout=10)
    assert server.steps("a") == [0]


def test_after_closing_a_step_is_counted_as_dropped(server: IngestServer) -> None:
    publisher = Publisher("a", server.endpoint, params=layers())
    publisher.close()
    publisher.close()
    publisher.record_rows(0, rows(0.0), {}, 0)
    publisher.record(1, summary(0.0))
    publisher.event("late")
    assert publisher.dropped == 2
    assert server.steps("a") == []


def test_two_publishers_at_once_do_not_meet(server: IngestServer) -> None:
    with (
        Publisher("a", server.endpoint, params=layers()) as one,
        Publisher("b", server.endpoint, params=layers()) as two,
        Publisher("a", server.endpoint, params=layers()) as three,
    ):
        for step in range(100):
            one.record_rows(step, rows(1.0), {}, 0)
            two.record_rows(step, rows(2.0), {}, 0)
            three.record_rows(100 + step, rows(3.0), {}, 0)
    assert sorted(server.steps("a")) == list(range(200))
    assert server.steps("b") == list(range(100))
    assert len({collector for run, collector in server.stored if run == "a"}) == 2


def test_many_threads_may_record(server: IngestServer) -> None:
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        threads = [
            threading.Thread(
                target=lambda first=first: [publisher.record_rows(s, rows(s), {}, 0) for s in range(first, first + 100)]
            )
            for first in (0, 100, 200)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(server.steps("a")) == list(range(300))


def test_a_refused_run_is_one_line_and_counted_drops(
    server: IngestServer, spool_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.runs["a"] = Run(run_id="a", layers=layers(5))
    with caplog.at_level(logging.WARNING, "gradiometer"), Publisher("a", server.endpoint, params=layers()) as publisher:
        eventually(lambda: publisher.state.startswith("refused"))
        publisher.record_rows(0, rows(0.0), {}, 0)
        eventually(lambda: publisher.dropped == 1)
    assert publisher.state.startswith("refused: run has other layers")
    assert len(caplog.records) == 1
    assert server.batches("a") == []


# -- switched off, forked, ended ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "environment", "disabled"])
def test_switched_off_nothing_is_done_at_all(
    how: str, server: IngestServer, spool_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint: str | None = server.endpoint
    if how == "argument":
        endpoint = "off"
    elif how == "environment":
        endpoint = None
        monkeypatch.setenv("GRADIOMETER_ENDPOINT", "off")
    else:
        monkeypatch.setenv("GRADIOMETER_DISABLE", "1")
    before = threading.active_count()
    with Publisher("a", endpoint, params=layers()) as publisher:
        publisher.record(0, summary(1.0), loss=1.0)
        publisher.record_rows(1, rows(1.0), {}, 0)
        publisher.event("note")
        assert threading.active_count() == before
        assert (publisher.state, publisher.dropped, publisher.run_id) == ("off", 0, "a")
    assert server.runs == {}
    assert not spool_folder.exists()


def test_the_endpoint_may_come_from_the_environment(server: IngestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIOMETER_ENDPOINT", server.endpoint)
    monkeypatch.setenv("GRADIOMETER_TOKEN", "secret")
    with Publisher("a", params=layers()) as publisher:
        publisher.record(0, summary(1.0))
    assert publisher.endpoint == server.endpoint
    assert server.steps("a") == [0]
    assert server.hello_metadata["authorization"] == "Bearer secret"


def test_a_caller_is_told_of_mistakes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Publisher needs endpoint of the form HOST:PORT or 'off', got endpoint='x'"):
        Publisher("a", "x", params=layers())
    with pytest.raises(ValueError, match="Publisher needs run_id of letters"):
        Publisher("a b", "off", params=layers())
    with pytest.raises(ValueError, match="Publisher needs 1 to 100000 layers, got layers=0"):
        Publisher("a", "off", params=[])
    with pytest.raises(
        ValueError, match="Publisher needs mirror=None in this release, got mirror='wandb'; leave it out"
    ):
        Publisher("a", "off", params=layers(), mirror="wandb")
    monkeypatch.setattr("gradiometer.collectors.publisher.MAX_STEP_BYTES", 100)
    with pytest.raises(
        ValueError, match=rf"Publisher needs steps of at most 100 bytes, got layers=2, columns={len(NAMES)}; measure"
    ):
        Publisher("a", "off", params=layers())


def test_a_missing_certificate_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIOMETER_CA", "/no/such/file")
    with pytest.raises(ValueError, match="Publisher needs a readable PEM file, got GRADIOMETER_CA='/no/such/file'"):
        Publisher("a", "127.0.0.1:1", params=layers())


def test_it_says_what_it_is(server: IngestServer) -> None:
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        eventually(lambda: publisher.state == "connected")
        assert repr(publisher) == f"Publisher(run='a', endpoint='{server.endpoint}', state='connected', dropped=0)"


JOB = """
import os, signal, sys
import numpy as np
from gradiometer.collectors.publisher import Publisher
from gradiometer.protos.run_pb2 import Layer
from gradiometer.stats_core import selection
how, endpoint = sys.argv[1:]
publisher = Publisher("job", endpoint, params=[Layer(name="w", num_params=1)])
rows = np.ones((len(selection.columns()), 1), np.float32)
for step in range(20):
    publisher.record_rows(step, rows, {}, 0)
if how == "forks":
    while publisher.state != "connected":
        pass
    for end in (os._exit, sys.exit, os._exit):
        child = os.fork()
        if child == 0:
            publisher.record_rows(99, rows, {}, 0)
            publisher.event("from the child")
            quiet = (publisher.state, publisher.dropped) == ("off", 0)
            publisher.close()
            end(0 if quiet else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    publisher.record_rows(20, rows, {}, 0)
if how == "crashes":
    raise RuntimeError("the user's own")
if how == "killed":
    while publisher._outbox.spool is None or publisher._outbox.spool.numbers() == range(0):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def job(how: str, endpoint: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "PYTHONPATH": "src"}
    command = [sys.executable, "-W", "error", "-c", JOB, how, endpoint]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("how", ["ends", "crashes"])
def test_a_job_that_never_closes_its_publisher_loses_nothing(how: str, server: IngestServer) -> None:
    done = job(how, server.endpoint)
    assert done.returncode == (1 if how == "crashes" else 0), done.stderr
    assert how == "crashes" or done.stderr == ""
    assert server.steps("job") == list(range(20))


def test_in_a_forked_child_it_is_switched_off_and_the_parent_goes_on(server: IngestServer) -> None:
    done = job("forks", server.endpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert server.steps("job") == list(range(21))
    assert all(not batch.events for batch in server.batches("job"))


def test_what_a_killed_job_left_is_sent_by_the_next_one(nowhere: str, server: IngestServer) -> None:
    done = job("killed", nowhere)
    assert done.returncode == -signal.SIGKILL
    Publisher("next", server.endpoint, params=layers()).close(timeout=10)
    assert server.steps("job") == list(range(20))


def test_the_loss_may_be_anything_that_is_a_number(server: IngestServer) -> None:
    with Publisher("a", server.endpoint, params=layers()) as publisher:
        publisher.record(0, summary(1.0), loss=math.nan)
        publisher.record(1, summary(1.0), loss=np.float32(math.inf))
        publisher.record(2, summary(1.0), loss=None)
    losses = np.concatenate([scalar_arrays(batch)["loss"] for batch in server.batches("a")])
    np.testing.assert_array_equal(losses, [math.nan, math.inf, math.nan])
