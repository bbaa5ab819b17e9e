import logging
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from gradiometer.collectors.endpoint import Credentials, Endpoint
from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.sender import Backoff, Sender
from gradiometer.collectors.spool import Spool
from gradiometer.collectors.stream import WINDOW
from gradiometer.protos import run_pb2
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.run_pb2 import Run
from tests.fake_ingest import IngestServer, eventually, layers

RUN = Run(run_id="a", layers=layers(), loss=run_pb2.LossNormalization(reduction=run_pb2.LOSS_REDUCTION_MEAN))
QUICK = 0.02


def body(step: int) -> bytes:
    return StepBatch(
        steps=[step], unix_nanos=[step], num_layers=2, columns={"mean_sq_norm": bytes(8)}
    ).SerializeToString()


def sender(
    port: int,
    outbox: Outbox,
    *,
    run: Run = RUN,
    token: str | None = None,
    on_refused: Callable[[], None] = lambda: None,
    longest: float = QUICK,
    silence: float = 30.0,
) -> Sender:
    made = Sender(
        Endpoint("127.0.0.1", port),
        Credentials(token),
        run,
        outbox,
        backoff=Backoff(shortest=QUICK, longest=longest),
        on_refused=on_refused,
        silence=silence,
    )
    made.start()
    return made


def fill(outbox: Outbox, steps: range) -> None:
    for step in steps:
        outbox.append(body(step))


def test_the_wait_doubles_up_to_its_longest_and_is_shortened_at_random() -> None:
    backoff = Backoff(draw=lambda: 1.0)
    assert [backoff.next() for _ in range(9)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    backoff.reset()
    assert backoff.next() == 0.05
    many = Backoff()
    waits = [many.next() for _ in range(5000)]
    assert 5.0 <= min(waits[10:]) <= max(waits[10:]) <= 10.0


def test_everything_arrives_in_order_and_is_let_go_of() -> None:
    with IngestServer() as server:
        outbox = Outbox()
        fill(outbox, range(300))
        made = sender(server.port, outbox)
        assert outbox.wait_empty(timeout=15)
        assert made.state == "connected"
        fill(outbox, range(300, 310))
        made.finish(timeout=10)
        assert made.state == "closed"
        assert server.steps("a") == list(range(310))
        assert server.duplicates == 0


def test_no_more_than_the_window_is_on_its_way() -> None:
    with IngestServer() as server:
        server.hang = True
        outbox = Outbox()
        fill(outbox, range(4 * WINDOW))
        taken: list[int] = []
        take = outbox.take
        outbox.take = lambda number, timeout: taken.append(number) or take(number, timeout)  # type: ignore[method-assign, func-returns-value]
        made = sender(server.port, outbox)
        eventually(lambda: max(taken, default=0) == WINDOW)
        server.hang = False
        assert outbox.wait_empty(timeout=15)
        made.finish(timeout=10)
        assert server.steps("a") == list(range(4 * WINDOW))


def test_a_server_that_dies_again_and_again_gets_every_batch_once() -> None:
    server = IngestServer().start()
    server.pause = 0.002
    outbox = Outbox()
    fill(outbox, range(400))
    made = sender(server.port, outbox)
    for kill in range(5):
        eventually(lambda: len(server.steps("a")) >= 40 * (kill + 1))  # noqa: B023
        server.kill()
        server.start()
    assert outbox.wait_empty(timeout=30)
    made.finish(timeout=10)
    server.kill()
    assert server.steps("a") == list(range(400))


def test_an_outage_is_two_lines_however_long_it_is(caplog: pytest.LogCaptureFixture) -> None:
    server = IngestServer().start()
    server.kill()
    outbox = Outbox()
    with caplog.at_level(logging.INFO, "gradiometer"):
        made = sender(server.port, outbox)
        eventually(lambda: made.state == "no server")
        fill(outbox, range(3))
        attempts = made._backoff
        eventually(lambda: attempts._failures > 5)
        server.start()
        assert outbox.wait_empty(timeout=15)
        made.finish(timeout=10)
    server.kill()
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith(f"no server at 127.0.0.1:{server.port}; measurements are spooled in ")
    assert lines[0].endswith("and sent when one appears; start one with `gradiometer serve`")
    assert lines[1] == f"connected to the server at 127.0.0.1:{server.port}; batches waiting: 3"


def test_a_connection_that_comes_back_at_once_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    server = IngestServer().start()
    outbox = Outbox()
    with caplog.at_level(logging.INFO, "gradiometer"):
        made = sender(server.port, outbox)
        fill(outbox, range(1))
        assert outbox.wait_empty(timeout=15)
        server.kill()
        server.start()
        fill(outbox, range(1, 2))
        assert outbox.wait_empty(timeout=15)
        made.finish(timeout=10)
    server.kill()
    assert server.steps("a") == [0, 1]
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)


@pytest.mark.parametrize(
    ("code", "state", "said"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "no room", "takes nothing for now (RESOURCE_EXHAUSTED: not today)"),
        (grpc.StatusCode.INTERNAL, "no server", "does not answer (INTERNAL: not today)"),
    ],
)
def test_a_status_that_may_pass_is_tried_again(
    code: grpc.StatusCode, state: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with IngestServer() as server:
        server.refuse = code
        outbox = Outbox()
        fill(outbox, range(3))
        with caplog.at_level(logging.INFO, "gradiometer"):
            made = sender(server.port, outbox)
            eventually(lambda: made.state == state)
            server.refuse = None
            assert outbox.wait_empty(timeout=15)
            made.finish(timeout=10)
        assert said in caplog.text
        assert server.steps("a") == [0, 1, 2]


def test_a_server_without_room_is_two_lines_however_often_it_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    with IngestServer() as server, caplog.at_level(logging.INFO, "gradiometer"):
        server.abort_after = 0
        outbox = Outbox()
        fill(outbox, range(3))
        made = sender(server.port, outbox)
        eventually(lambda: made._backoff._failures > 5)
        assert made.state == "no room"
        server.abort_after = None
        assert outbox.wait_empty(timeout=15)
        eventually(lambda: made.state == "connected")
        made.finish(timeout=10)
        assert server.steps("a") == [0, 1, 2]
    assert [record.message for record in caplog.records] == [
        (
            f"the server at 127.0.0.1:{server.port} takes nothing for now (RESOURCE_EXHAUSTED: disk full); "
            "measurements wait in memory and are sent again until it does"
        ),
        f"the server at 127.0.0.1:{server.port} stores measurements again",
    ]


def test_a_server_that_holds_the_connection_and_answers_nothing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with IngestServer() as server, caplog.at_level(logging.INFO, "gradiometer"):
        outbox = Outbox()
        made = sender(server.port, outbox, silence=0.2)
        eventually(lambda: made.state == "connected")
        threading.Event().wait(0.4)
        assert made.state == "connected", "with nothing to acknowledge silence is no fault"
        server.hang = True
        fill(outbox, range(3))
        eventually(lambda: made.state == "no answer")
        threading.Event().wait(0.5)
        server.hang = False
        eventually(lambda: made.state == "connected")
        made.finish(timeout=10)
        assert server.steps("a") == [0, 1, 2]
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith(f"the server at 127.0.0.1:{server.port} gives no answer (batches waiting: 3, for 0.2 s)")
    assert lines[1] == f"the server at 127.0.0.1:{server.port} answers again"


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "nothing more of it is published"),
        (grpc.StatusCode.ALREADY_EXISTS, "nothing more of it is published"),
        (grpc.StatusCode.FAILED_PRECONDITION, "nothing more of it is published"),
        (grpc.StatusCode.UNAUTHENTICATED, "set GRADIOMETER_TOKEN to a token of that server"),
        (grpc.StatusCode.PERMISSION_DENIED, "set GRADIOMETER_TOKEN to a token that may write runs"),
        (grpc.StatusCode.UNIMPLEMENTED, "check that the endpoint is a gradiometer server"),
    ],
)
def test_a_status_that_stays_ends_it_with_one_line(
    code: grpc.StatusCode, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with IngestServer() as server:
        server.refuse = code
        refused = threading.Event()
        outbox = Outbox()
        with caplog.at_level(logging.INFO, "gradiometer"):
            made = sender(server.port, outbox, on_refused=refused.set)
            assert refused.wait(15)
            eventually(lambda: not made._thread.is_alive())
            made.finish(timeout=5)
        assert made.is_refused
        assert made.state == "refused: not today"
        assert len(caplog.records) == 1
        assert f"refuses run a ({code.name}: not today)" in caplog.text
        assert hint in caplog.text


def test_other_layers_under_a_known_name_are_refused_with_the_servers_words(caplog: pytest.LogCaptureFixture) -> None:
    with IngestServer() as server:
        server.runs["a"] = Run(run_id="a", layers=layers(3))
        made = sender(server.port, Outbox())
        eventually(lambda: made.is_refused)
        made.finish(timeout=5)
    assert "3 layers registered, 2 offered; choose another name" in caplog.text


def test_a_server_that_forgot_the_run_gets_the_rest_from_its_first_number(spool_folder: Path) -> None:
    with IngestServer() as server:
        outbox = Outbox(lambda collector, offset: Spool.create(spool_folder, RUN, collector, offset))
        fill(outbox, range(5))
        made = sender(server.port, outbox)
        assert outbox.wait_empty(timeout=15)
        server.kill()
        server.forget()
        eventually(lambda: made.state != "connected")
        fill(outbox, range(5, 8))
        server.start()
        assert outbox.wait_empty(timeout=15)
        made.finish(timeout=10)
        outbox.close()
        assert server.steps("a") == [5, 6, 7]


def test_a_token_goes_with_every_call() -> None:
    with IngestServer() as server:
        made = sender(server.port, Outbox(), token="secret")
        eventually(lambda: made.state == "connected")
        made.finish(timeout=10)
        assert server.hello_metadata["authorization"] == "Bearer secret"


def test_finishing_returns_in_time_where_the_server_hangs() -> None:
    with IngestServer() as server:
        server.hang = True
        outbox = Outbox()
        fill(outbox, range(10))
        made = sender(server.port, outbox)
        eventually(lambda: made.state == "connected")
        timer = threading.Event()
        thread = threading.Thread(target=lambda: (made.finish(timeout=0.3), timer.set()))
        thread.start()
        assert timer.wait(5)
        assert not outbox.is_empty
        server.hang = False


def test_finishing_while_no_server_is_there_tries_once_more_and_does_not_wait() -> None:
    server = IngestServer().start()
    server.kill()
    outbox = Outbox()
    fill(outbox, range(3))
    made = sender(server.port, outbox, longest=600.0)
    made._backoff._failures = 20
    eventually(lambda: made.state == "no server")
    server.start()
    made.finish(timeout=10)
    server.kill()
    assert server.steps("a") == [0, 1, 2]
