import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import Iterator

import pytest

from gradiometer.server.live import Live
from gradiometer.server.sse import EventStream
from tests.webserver import SECOND, make_batch, make_run, poll, serving


def event_in(lines: Iterator[bytes]) -> dict:
    """The next event of a stream: its fields, with the data decoded."""
    fields: dict = {}
    for line in lines:
        text = line.decode().rstrip("\n")
        if not text:
            if "data" in fields:
                return fields
            fields = {}
            continue
        name, _, value = text.partition(": ")
        fields[name] = json.loads(value) if name == "data" else value
    raise AssertionError("the stream ended")


@contextlib.contextmanager
def reading(port: int, path: str, **headers: str) -> Iterator[Iterator[bytes]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    try:
        yield iter(answer.readline, b"")
    finally:
        answer.close()
        connection.close()


EVENTS = "/api/runs/mnist-1/events"


def test_a_new_step_is_pushed_with_its_number_as_the_events_id():
    with serving() as served:
        served.do(served.live.register, make_run())
        served.do(served.live.append, "mnist-1", make_batch([0, 1]))
        with reading(served.port, EVENTS) as lines:
            first = event_in(lines)
            assert (first["event"], first["id"]) == ("update", "1")
            assert first["data"]["anew"]
            assert first["data"]["points"]["step"] == [0, 1]
            served.do(served.live.append, "mnist-1", make_batch([2]))
            second = event_in(lines)
            assert second["id"] == "2"
            assert not second["data"]["anew"]
            assert second["data"]["points"]["step"] == [2]
            assert second["data"]["scalars"]["loss"]["value"] == 2.5


def test_a_reader_that_comes_back_gets_what_it_missed():
    with serving() as served:
        served.do(served.live.register, make_run())
        served.do(served.live.append, "mnist-1", make_batch(list(range(10))))
        with reading(served.port, EVENTS, Last_Event_ID="6") as lines:
            event = event_in(lines)
        assert event["data"]["points"]["step"] == [7, 8, 9]
        assert not event["data"]["anew"]


def test_a_reader_from_a_branch_that_is_gone_gets_all_anew():
    with serving() as served:
        served.do(served.live.register, make_run())
        served.do(served.live.append, "mnist-1", make_batch(list(range(5))))
        with reading(served.port, EVENTS, Last_Event_ID="80") as lines:
            event = event_in(lines)
            assert event["data"]["anew"]
            assert event["data"]["points"]["step"] == [0, 1, 2, 3, 4]
            served.do(served.live.append, "mnist-1", make_batch([2], nanos=[100 * SECOND]))
            event = event_in(lines)
            assert event["data"]["anew"]
            assert event["data"]["points"]["step"] == [0, 1, 2]


def test_the_chart_of_one_layer_is_followed():
    with serving() as served:
        served.do(served.live.register, make_run())
        served.do(served.live.append, "mnist-1", make_batch([0]))
        with reading(served.port, f"{EVENTS}?layer=blocks.1") as lines:
            data = event_in(lines)["data"]
        assert data["points"]["batch_variance"] == [data["table"]["batch_variance"][1]]


def test_a_run_that_waits_for_its_first_step_is_followed_from_there():
    with serving() as served:
        served.do(served.live.register, make_run())
        with reading(served.port, EVENTS) as lines:
            assert next(lines) == b"retry: 2000\n"
            served.do(served.live.append, "mnist-1", make_batch([0]))
            assert event_in(lines)["data"]["step"] == 0


def test_the_stream_ends_when_the_live_view_is_closed():
    with serving() as served:
        served.do(served.live.register, make_run())
        served.do(served.live.append, "mnist-1", make_batch([0]))
        with reading(served.port, EVENTS) as lines:
            event_in(lines)
            served.do(served.live.close)
            assert [line for line in lines if line.strip()] == []


def test_a_reader_that_leaves_is_forgotten():
    with serving() as served:
        served.do(served.live.register, make_run())
        with reading(served.port, EVENTS) as lines:
            next(lines)
            assert len(served.live._subscriptions) == 1
        poll(lambda: not served.live._subscriptions)


async def _stream(live: Live, send, receive=None, **options) -> None:
    async def never() -> dict:
        await asyncio.Event().wait()
        raise AssertionError

    await EventStream(live, "mnist-1", pace=0.0, **options)({"type": "http"}, receive or never, send)


def test_a_slow_reader_gets_fewer_updates_and_the_newest_numbers():
    """The reader takes one message at a time; meanwhile a hundred steps arrive."""

    async def scenario() -> list[dict]:
        live = Live()
        live.register(make_run())
        live.append("mnist-1", make_batch([0]))
        bodies: list[dict] = []

        async def send(message: dict) -> None:
            text = message.get("body", b"").decode()
            if "data: " not in text:
                return
            bodies.append(json.loads(text.split("data: ")[1]))
            if len(bodies) == 1:
                for step in range(1, 101):  # while this message is on its way
                    live.append("mnist-1", make_batch([step]))
            else:
                live.close()

        await asyncio.wait_for(_stream(live, send), 10)
        return bodies

    first, second = asyncio.run(scenario())
    assert first["step"] == 0
    assert second["step"] == 100
    assert second["points"]["step"] == list(range(1, 101))


def test_a_reader_that_takes_nothing_is_let_go():
    async def scenario() -> int:
        live = Live()
        live.register(make_run())
        live.append("mnist-1", make_batch([0]))

        async def send(message: dict) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await asyncio.wait_for(_stream(live, send, patience=0.05), 10)
        return len(live._subscriptions)

    assert asyncio.run(scenario()) == 0


def test_a_fault_of_our_own_is_heard_of(monkeypatch):
    live = Live()
    live.register(make_run())
    live.append("mnist-1", make_batch([0]))
    monkeypatch.setattr("gradiometer.server.sse.numbers", lambda *_, **__: 1 / 0)

    async def send(_: dict) -> None:
        return

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(_stream(live, send), 10))


def test_a_quiet_stream_is_kept_open_by_comments():
    async def scenario() -> list[bytes]:
        live = Live()
        live.register(make_run())
        sent: list[bytes] = []

        async def send(message: dict) -> None:
            sent.append(message.get("body", b""))
            if len(sent) == 5:
                live.close()

        await asyncio.wait_for(_stream(live, send, heartbeat=0.01), 10)
        return sent

    assert asyncio.run(scenario())[2:5] == [b": still here\n\n"] * 3


def test_a_real_socket_that_is_never_read_does_not_hold_up_the_server():
    with serving() as served:
        served.do(served.live.register, make_run(layers=500))
        served.do(served.live.append, "mnist-1", make_batch([0], layers=500))
        with socket.create_connection(("127.0.0.1", served.port)) as deaf:
            deaf.sendall(f"GET {EVENTS} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            poll(lambda: served.live._subscriptions)
            for step in range(1, 60):
                served.do(served.live.append, "mnist-1", make_batch([step], layers=500))
            assert served.json("/api/runs/mnist-1")["step"] == 59
