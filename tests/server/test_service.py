"""The gRPC services on a real server: what is refused and how, back-pressure, acknowledgements, subscriptions."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc
import numpy as np
import pytest

from gradiometer import __version__
from gradiometer.protos.columns import column_arrays
from gradiometer.protos.ingest_pb2 import PublishRequest
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub
from gradiometer.protos.query_pb2 import ListRunsRequest, QueryRangeRequest, SubscribeRequest
from gradiometer.protos.query_pb2_grpc import QueryServiceStub
from gradiometer.server.ingest import IngestSession
from gradiometer.server.journal import Entry
from gradiometer.server.live import Live
from gradiometer.server.meters import Meters
from gradiometer.server.service import STATUS, IngestServicer, _acknowledgements, _Pending
from gradiometer.stats_core import errors
from tests.server.batches import hello, make_batch, make_run, numbered, register, serving, settings
from tests.server_process import eventually


class Client:
    """A channel with both stubs, and streams that can be fed one message at a time."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.ingest = IngestServiceStub(self.channel)
        self.query = QueryServiceStub(self.channel)

    def publish(self, *requests: PublishRequest) -> list[int]:
        return [answer.durable_sequence for answer in self.ingest.Publish(iter(requests), timeout=30)]

    def open(self, *requests: PublishRequest):
        feed: queue.SimpleQueue[PublishRequest | None] = queue.SimpleQueue()
        for request in requests:
            feed.put(request)
        return feed, self.ingest.Publish(iter(feed.get, None), timeout=60)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(settings(tmp_path_factory.mktemp("server") / "data")) as bound:
        yield bound.grpc


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    client = Client(address)
    with client.channel:
        yield client


@contextlib.contextmanager
def refused(code: grpc.StatusCode, details: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError, match=details) as caught:
        yield
    assert caught.value.code() is code


def test_a_run_is_registered_and_found_again(client: Client) -> None:
    answer = client.ingest.RegisterRun(register(make_run("again")))
    assert (answer.created, answer.server_version) == (True, __version__)
    assert client.ingest.RegisterRun(register(make_run("again"))).created is False


def test_what_was_published_is_acknowledged_and_can_be_asked_for(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("asked")))
    sent = [make_batch(step, loss=0.5) for step in range(5)]
    answers = client.publish(hello("asked"), *(numbered(n, batch) for n, batch in enumerate(sent, start=1)))
    assert answers[0] == 0
    assert answers[-1] == 5
    assert answers == sorted(answers)
    (part,) = [answer.batch for answer in client.query.QueryRange(QueryRangeRequest(run_id="asked", first_step=3))]
    assert list(part.steps) == [3, 4]
    assert part.columns["mean_sq_norm"] == sent[3].columns["mean_sq_norm"] + sent[4].columns["mean_sq_norm"]
    status = next(s for s in client.query.ListRuns(ListRunsRequest()).runs if s.run.run_id == "asked")
    assert (status.stored_steps, status.last_step) == (5, 4)
    assert len(client.query.ListRuns(ListRunsRequest(limit=1)).runs) == 1


def test_a_publisher_that_comes_back_goes_on_where_it_was(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("resumed")))
    client.publish(hello("resumed"), numbered(1, make_batch(1)), numbered(2, make_batch(2)))
    answers = client.publish(hello("resumed"), numbered(2, make_batch(2)), numbered(3, make_batch(3)))
    assert (answers[0], answers[-1]) == (2, 3)
    assert client.publish(hello("resumed", "other collector")) == [0]


def test_an_old_stream_and_a_new_one_of_the_same_collector_store_each_batch_once(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("twice")))
    old, old_answers = client.open(hello("twice"))
    new, new_answers = client.open(hello("twice"))
    assert (next(old_answers).durable_sequence, next(new_answers).durable_sequence) == (0, 0)
    old.put(numbered(1, make_batch(1)))
    assert next(old_answers).durable_sequence == 1
    new.put(numbered(1, make_batch(1)))
    assert next(new_answers).durable_sequence == 1
    old.put(None)
    new.put(None)
    status = next(s for s in client.query.ListRuns(ListRunsRequest()).runs if s.run.run_id == "twice")
    assert status.stored_steps == 1


def test_a_gap_is_refused_after_what_was_good_has_been_acknowledged(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("gap")))
    answers = []
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "needs sequence=2 next, got sequence=3"):
        for answer in client.ingest.Publish(
            iter([hello("gap"), numbered(1, make_batch(1)), numbered(3, make_batch(3))])
        ):
            answers.append(answer.durable_sequence)
    assert answers[-1] == 1


def test_a_column_of_the_wrong_length_is_refused_and_nothing_of_it_stored(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("short")))
    bad = make_batch(1)
    bad.columns["variance_trace"] = np.zeros(1, "<f4").tobytes()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "needs 8 bytes in column='variance_trace', got 4"):
        client.publish(hello("short"), numbered(1, bad))
    assert client.publish(hello("short"), numbered(1, make_batch(1)))[-1] == 1


def test_unknown_runs_are_refused_everywhere_with_near_names(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("transformer-1")))
    for ask in (
        lambda: client.publish(hello("transformer-2")),
        lambda: list(client.query.QueryRange(QueryRangeRequest(run_id="transformer-2"))),
        lambda: list(client.query.Subscribe(SubscribeRequest(run_id="transformer-2"))),
    ):
        with refused(grpc.StatusCode.NOT_FOUND, "got run_id='transformer-2'; did you mean 'transformer-1'"):
            ask()


def test_other_layers_and_bad_runs_are_refused(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("layers")))
    with refused(grpc.StatusCode.ALREADY_EXISTS, "of run 'layers' as first registered, got others: 2 layers"):
        client.ingest.RegisterRun(register(make_run("layers", ("conv",))))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "needs run_id of letters"):
        client.ingest.RegisterRun(register(make_run("../../etc/passwd")))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "got column='snr'"):
        list(client.query.QueryRange(QueryRangeRequest(run_id="layers", columns=["snr"])))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "needs a hello first"):
        client.publish(numbered(1, make_batch(1)))


def test_a_range_beyond_any_step_is_empty_or_cut(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("wide")))
    client.publish(hello("wide"), numbered(1, make_batch(1, 2)))

    def steps(**bounds: int) -> list[int]:
        asked = QueryRangeRequest(run_id="wide", **bounds)  # type: ignore[arg-type]
        return [step for answer in client.query.QueryRange(asked) for step in answer.batch.steps]

    assert steps(first_step=2**64 - 1) == steps(first_step=2**63) == []
    assert steps(last_step=2**64 - 1) == steps(last_step=2**63) == [1, 2]
    assert steps(first_step=2, last_step=2**64 - 1) == [2]


def test_a_message_that_is_too_large_is_refused_and_the_server_stays_up(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("large")))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"):
        client.publish(hello("large"), numbered(1, make_batch(*range(1_000_000))))
    assert client.publish(hello("large"), numbered(1, make_batch(1)))[-1] == 1


def test_a_publisher_that_vanishes_loses_nothing_that_arrived(client: Client, address: str) -> None:
    client.ingest.RegisterRun(register(make_run("vanished")))
    feed, answers = client.open(hello("vanished"), numbered(1, make_batch(1)))
    while next(answers).durable_sequence < 1:
        pass
    feed.put(numbered(2, make_batch(2)))
    answers.cancel()
    feed.put(None)
    assert client.publish(hello("vanished"))[0] in (1, 2)


def test_subscribers_see_runs_and_batches_once_they_are_durable(client: Client) -> None:
    client.ingest.RegisterRun(register(make_run("watched")))
    call = client.query.Subscribe(SubscribeRequest(run_id="watched"), timeout=30)
    everything = client.query.Subscribe(SubscribeRequest(), timeout=30)
    call.initial_metadata()  # from here on nothing is missed
    everything.initial_metadata()
    client.ingest.RegisterRun(register(make_run("unwatched")))
    client.publish(hello("unwatched"), numbered(1, make_batch(9)))
    client.publish(hello("watched"), numbered(1, make_batch(1)), numbered(2, make_batch(2)))
    seen = [next(call), next(call)]
    assert [(answer.run_id, list(answer.batch.steps)) for answer in seen] == [("watched", [1]), ("watched", [2])]
    others = [next(everything), next(everything)]
    assert [answer.WhichOneof("message") for answer in others] == ["run", "batch"]
    assert others[0].run.run_id == "unwatched"
    call.cancel()
    everything.cancel()


def test_long_answers_come_in_parts(client: Client) -> None:
    layers = [f"l{index}" for index in range(2000)]
    client.ingest.RegisterRun(register(make_run("long", layers)))
    batches = [make_batch(*range(start, start + 50), layers=2000) for start in range(0, 400, 50)]
    client.publish(hello("long"), *(numbered(n, batch) for n, batch in enumerate(batches, start=1)))
    parts = [answer.batch for answer in client.query.QueryRange(QueryRangeRequest(run_id="long"))]
    assert len(parts) > 2
    assert all(part.ByteSize() < 4 << 20 for part in parts), "what a client takes without being told"
    assert [step for part in parts for step in part.steps] == list(range(400))
    got = np.concatenate([column_arrays(part)["mean_sq_norm"] for part in parts])
    assert np.array_equal(got, np.concatenate([column_arrays(b)["mean_sq_norm"] for b in batches]))


def test_a_reader_that_leaves_in_the_middle_is_no_trouble(client: Client) -> None:
    layers = [f"l{index}" for index in range(2000)]
    client.ingest.RegisterRun(register(make_run("left", layers)))
    client.publish(hello("left"), *(numbered(n, make_batch(n, layers=2000)) for n in range(1, 301)))
    call = client.query.QueryRange(QueryRangeRequest(run_id="left"))
    next(call)
    call.cancel()
    assert client.query.ListRuns(ListRunsRequest(limit=1)).runs


def test_every_status_of_the_error_tree_has_a_code() -> None:
    for name in errors.__all__:
        assert STATUS[getattr(errors, name).status]


class SlowStore:
    """A store whose disk is as slow as the test says."""

    def __init__(self) -> None:
        self.futures: list[Future[bool]] = []
        self.queued_bytes = 0

    def run(self, run_id: str):
        return make_run(run_id)

    def durable_sequence(self, run_id: str, collector_id: str) -> int:
        return 0

    def append(self, entry: Entry) -> "Future[bool]":
        self.futures.append(Future())
        return self.futures[-1]


def test_a_stream_is_not_read_while_too_much_waits_for_the_disk() -> None:
    async def conversation() -> None:
        store, pulled = SlowStore(), 0
        servicer = IngestServicer(store, Live(), Meters(), max_queued_bytes=100)  # type: ignore[arg-type]

        async def requests() -> AsyncIterator[PublishRequest]:
            nonlocal pulled
            for request in [hello(), *(numbered(n, make_batch(n)) for n in range(1, 6))]:
                pulled += 1
                yield request

        async def idle() -> None:
            for _ in range(50):
                await asyncio.sleep(0)

        pending: asyncio.Queue[_Pending | None] = asyncio.Queue()
        store.queued_bytes = 101
        reader = asyncio.create_task(servicer._read(IngestSession(), requests(), pending))
        await idle()
        assert (pulled, len(store.futures)) == (2, 1), "the hello and one batch, which is not on disk yet"
        store.futures[0].set_result(True)
        await idle()
        assert (pulled, len(store.futures)) == (3, 2)
        store.queued_bytes = 0
        store.futures[1].set_result(True)
        await idle()
        assert len(store.futures) == 5
        assert reader.done()

    asyncio.run(conversation())


def test_one_acknowledgement_speaks_for_all_that_is_durable_already() -> None:
    async def conversation() -> list[int]:
        loop, session = asyncio.get_running_loop(), IngestSession()
        session.receive(hello())
        session.welcome(make_run(), 0)
        pending: asyncio.Queue[_Pending | None] = asyncio.Queue()
        futures = [loop.create_future() for _ in range(5)]
        for sequence, future in enumerate(futures, start=1):
            session.receive(numbered(sequence, make_batch(sequence)))
            pending.put_nowait(_Pending(sequence, future))
        pending.put_nowait(None)
        for future in futures[:3]:
            future.set_result(None)
        sent = []
        async for durable in _acknowledgements(session, pending):
            sent.append(durable)
            for future in futures[3:]:
                if not future.done():
                    future.set_result(None)
        return sent

    assert asyncio.run(conversation()) == [3, 5]


def test_a_full_disk_aborts_the_stream_with_what_may_be_tried_again(tmp_path: Path) -> None:
    """The server stays up, acknowledges nothing it did not store, and takes the batch once there is room."""
    from gradiometer.server import store as stores

    made: list[stores.EmbeddedStore] = []

    class Kept(stores.EmbeddedStore):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradiometer.server.app.EmbeddedStore", Kept)
        with serving(settings(tmp_path)) as bound, grpc.insecure_channel(bound.grpc) as channel:
            client = Client(bound.grpc)
            client.channel.close()
            client.ingest = IngestServiceStub(channel)
            client.ingest.RegisterRun(register(make_run()))
            client.publish(hello(), numbered(1, make_batch(1)))

            def pages(limit: str):
                return (
                    made[0]
                    ._writer.call(lambda j: j._db.execute(f"PRAGMA max_page_count = {limit}").fetchone())
                    .result(30)
                )

            count = made[0]._writer.call(lambda j: j._db.execute("PRAGMA page_count").fetchone()[0]).result(30)
            pages(str(count))
            large = make_batch(*range(2, 9000))
            answers = []
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "needs room on the disk of its data directory"):
                for answer in client.ingest.Publish(iter([hello(), numbered(2, large), numbered(3, make_batch(9999))])):
                    answers.append(answer.durable_sequence)
            assert answers == [1]
            pages("1000000")
            assert client.publish(hello(), numbered(2, large))[-1] == 2


def test_many_streams_share_transactions(tmp_path: Path) -> None:
    with serving(settings(tmp_path)) as bound, grpc.insecure_channel(bound.grpc) as channel:
        stub = IngestServiceStub(channel)
        stub.RegisterRun(register(make_run()))

        def publish(collector: str) -> None:
            requests = [hello(collector_id=collector), *(numbered(n, make_batch(n)) for n in range(1, 51))]
            for _ in stub.Publish(iter(requests), timeout=60):
                pass

        threads = [threading.Thread(target=publish, args=(f"c{index}",)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        from urllib.request import urlopen

        with urlopen(f"http://{bound.http}/metrics") as answer:
            lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
        assert float(lines["gradiometer_ingest_batches_total"]) == 400
        assert float(lines["gradiometer_ingest_commit_seconds_count"]) < 400
        eventually(lambda: QueryServiceStub(channel).ListRuns(ListRunsRequest()).runs[0].stored_steps == 50)
