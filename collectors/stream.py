"""One conversation with a server: register, hello, batches out, acknowledgements in.

The server answers the hello with the last sequence number it holds, and sending goes on from there. A batch
leaves the outbox only when the server says that it is durable. So a server may be killed, or a connection
lost, at any moment: what was not acknowledged is sent again, and the server drops what it knows.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import cast

from gradiometer.collectors.endpoint import Credentials, Endpoint
from gradiometer.collectors.outbox import Outbox, SpoolDamaged
from gradiometer.collectors.quiet_grpc import grpc
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.ingest_pb2 import PublishBatch, PublishHello, PublishRequest, RegisterRunRequest
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub
from gradiometer.protos.run_pb2 import Run

__all__ = ["DATA_FAULTS", "ENVIRONMENT_FAULTS", "WINDOW", "Metadata", "Stream", "open_channel", "status"]

_log = logging.getLogger("gradiometer")

WINDOW = 64  # batches on their way and not acknowledged
_ANSWER = 10.0  # seconds that a registration may take
_POLL = 0.2  # seconds after which a waiting thread looks whether it is to end
_CHANNEL = (
    # Attempts are timed here; a channel that remembers failures of one before would wait on its own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_send_message_length", -1),
)

Metadata = tuple[tuple[str, str], ...]

DATA_FAULTS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.OUT_OF_RANGE,
}
"""What will not get better by trying again, since of the run or its batches the server takes none."""

ENVIRONMENT_FAULTS = {
    grpc.StatusCode.UNAUTHENTICATED: "set GRADIOMETER_TOKEN to a token of that server",
    grpc.StatusCode.PERMISSION_DENIED: "set GRADIOMETER_TOKEN to a token that may write runs",
    grpc.StatusCode.UNIMPLEMENTED: "check that the endpoint is a gradiometer server of this version",
}
"""What will not get better by trying again in this environment, and what would help."""


def open_channel(endpoint: Endpoint, credentials: Credentials) -> grpc.Channel:
    """A channel to a server; nothing is connected yet."""
    # A proxy named in the environment is for other machines, never for this one.
    options = [*_CHANNEL, ("grpc.enable_http_proxy", 0 if endpoint.is_loopback else 1)]
    if credentials.authority is None:
        return grpc.insecure_channel(str(endpoint), options=options)
    return grpc.secure_channel(str(endpoint), grpc.ssl_channel_credentials(credentials.authority), options=options)


class Stream:
    """One registration and one stream of one outbox.

    Attributes:
        progressed: whether anything became durable on it.
    """

    def __init__(self, stub: IngestServiceStub, run: Run, outbox: Outbox, metadata: Metadata) -> None:
        self._stub = stub
        self._run = run
        self._outbox = outbox
        self._metadata = metadata
        self._welcomed = threading.Event()
        self._ended = False
        self.progressed = False

    def converse(self, on_welcome: Callable[[], None] = lambda: None) -> None:
        """Send until the outbox is finished and empty, or the stream ends.

        Args:
            on_welcome: called when the server has answered the hello.

        Raises:
            grpc.RpcError: if the server, or the way to it, says no.
        """
        self._stub.RegisterRun(RegisterRunRequest(run=self._run), timeout=_ANSWER, metadata=self._metadata)
        call = self._stub.Publish(self._requests(), metadata=self._metadata)
        try:
            for response in call:
                if self._welcomed.is_set():
                    self._outbox.acknowledge(response.durable_sequence)
                    self.progressed = True
                    continue
                if not self._outbox.welcome(response.durable_sequence):
                    _log.warning(
                        "the server does not hold all that is no longer kept here (another data directory, or a "
                        "damaged spool); what is left is sent under a new collector id"
                    )
                    self.progressed = True
                    return
                self._welcomed.set()
                on_welcome()
        finally:
            self._ended = True
            self._outbox.wake()
            call.cancel()

    def _requests(self) -> Iterator[PublishRequest]:
        """Consumed by a thread of gRPC's own."""
        outbox = self._outbox
        yield PublishRequest(hello=PublishHello(run_id=self._run.run_id, collector_id=outbox.collector_id))
        while not self._welcomed.wait(_POLL):
            if self._ended:
                return
        number = outbox.acknowledged + 1
        while not self._ended:
            if number - outbox.acknowledged > WINDOW:
                outbox.wait(_POLL)
                continue
            try:
                body = outbox.take(number, timeout=_POLL)
            except SpoolDamaged:
                return  # the stream ends, and the next hello brings the numbers in order
            if body is not None:
                batch = PublishBatch(sequence=outbox.sequence(number), batch=StepBatch.FromString(body))
                yield PublishRequest(batch=batch)
                number += 1
            elif number <= outbox.acknowledged:
                number = outbox.acknowledged + 1
            elif outbox.finished and number > outbox.last:
                return


def status(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """What an error says: its status, and its details on one line."""
    call = cast("grpc.Call", error)  # every error that a call raises is one
    return call.code(), " ".join((call.details() or "").split())[:300]
