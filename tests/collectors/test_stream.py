import grpc
import pytest

from gradiometer.collectors.endpoint import Credentials, Endpoint
from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.stream import Stream, open_channel, status
from gradiometer.protos import run_pb2
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub
from gradiometer.protos.run_pb2 import Run
from tests.fake_ingest import IngestServer, layers

RUN = Run(run_id="a", layers=layers(), loss=run_pb2.LossNormalization(reduction=run_pb2.LOSS_REDUCTION_MEAN))


def finished(steps: range) -> Outbox:
    outbox = Outbox()
    for step in steps:
        outbox.append(StepBatch(steps=[step], unix_nanos=[0], num_layers=2).SerializeToString())
    outbox.finish()
    return outbox


def stream(server: IngestServer, channel: grpc.Channel, outbox: Outbox) -> Stream:
    return Stream(IngestServiceStub(channel), RUN, outbox, ())


def channel(server: IngestServer) -> grpc.Channel:
    return open_channel(Endpoint("127.0.0.1", server.port), Credentials())


def test_a_finished_outbox_is_emptied_and_the_stream_closed_from_this_side() -> None:
    with IngestServer() as server, channel(server) as way:
        outbox = finished(range(5))
        welcomes = []
        one = stream(server, way, outbox)
        one.converse(lambda: welcomes.append(outbox.acknowledged))
        assert (welcomes, one.progressed, outbox.is_empty) == ([0], True, True)
        assert server.steps("a") == list(range(5))


def test_what_the_server_already_has_is_not_sent_again() -> None:
    with IngestServer() as server, channel(server) as way:
        outbox = finished(range(5))
        server.stored["a", outbox.collector_id] = [StepBatch()] * 3
        stream(server, way, outbox).converse()
        assert outbox.is_empty
        assert server.steps("a") == [3, 4]
        assert server.duplicates == 0


def test_an_aborted_stream_keeps_what_was_not_acknowledged() -> None:
    with IngestServer() as server, channel(server) as way:
        server.abort_after = 2
        outbox = finished(range(5))
        one = stream(server, way, outbox)
        with pytest.raises(grpc.RpcError) as caught:
            one.converse()
        assert status(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "disk full")
        server.abort_after = None
        stream(server, way, outbox).converse()
        assert outbox.is_empty
        assert server.steps("a") == list(range(5))


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    with IngestServer() as server, channel(server) as way:
        outbox = finished(range(2))
        stream(server, way, outbox).converse()
        assert outbox.is_empty


def test_with_an_authority_the_channel_speaks_tls_and_a_plain_server_is_no_answer() -> None:
    with (
        IngestServer() as server,
        open_channel(Endpoint("127.0.0.1", server.port), Credentials(authority=b"no certificate")) as way,
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stream(server, way, finished(range(1))).converse()
        assert status(caught.value)[0] is grpc.StatusCode.UNAVAILABLE
        assert server.runs == {}
