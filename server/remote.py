"""Reading from a running server: the same two questions as a store answers, asked over gRPC."""

from collections.abc import Iterator, Sequence
from typing import Self

import grpc

from gradiometer.protos import query_pb2, query_pb2_grpc
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import Run
from gradiometer.stats_core.errors import PeerFault, WireError

__all__ = ["RemoteStore"]

_MAX_BYTES = 64 << 20


class RemoteStore:
    """What a server has stored and is receiving. A context manager; close it when done.

    Args:
        endpoint: ``HOST:PORT`` of the server's gRPC address.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, endpoint: str, *, timeout: float = 10.0) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._channel = grpc.insecure_channel(endpoint, options=[("grpc.max_receive_message_length", _MAX_BYTES)])
        self._stub = query_pb2_grpc.QueryServiceStub(self._channel)

    def list_runs(self) -> list[RunStatus]:
        """The runs, newest first.

        Raises:
            WireError: if no server answers at the endpoint.
        """
        try:
            return list(self._stub.ListRuns(query_pb2.ListRunsRequest(), timeout=self._timeout).runs)
        except grpc.RpcError as error:
            raise self._said(error) from error

    def read(
        self,
        run_id: str,
        *,
        first_step: int = 0,
        last_step: int | None = None,
        layers: Sequence[str] = (),
        columns: Sequence[str] = (),
        limit: int | None = None,
    ) -> Iterator[StepBatch]:
        """A range of steps of one run, in ascending order, in parts.

        Raises:
            PeerFault: if the server knows no such run or layer.
            WireError: if no server answers.
        """
        request = query_pb2.QueryRangeRequest(
            run_id=run_id,
            first_step=first_step,
            last_step=last_step or 0,
            layers=layers,
            columns=columns,
            limit=limit or 0,
        )
        try:
            for answer in self._stub.QueryRange(request, timeout=self._timeout * 6):
                yield answer.batch
        except grpc.RpcError as error:
            raise self._said(error) from error

    def subscribe(self, run_id: str = "") -> Iterator[tuple[str, Run | StepBatch]]:
        """Newly registered runs and batches as they become durable, until the channel is closed.

        Raises:
            WireError: if the server goes away.
        """
        try:
            for answer in self._stub.Subscribe(query_pb2.SubscribeRequest(run_id=run_id)):
                yield answer.run_id, answer.run if answer.WhichOneof("message") == "run" else answer.batch
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                return
            raise self._said(error) from error

    def close(self) -> None:
        """Close the channel; a running `subscribe` ends."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _said(self, error: grpc.RpcError) -> WireError:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return WireError(
                f"RemoteStore needs a server, got none at endpoint={self._endpoint!r}; "
                "start one with `gradiometer serve`"
            )
        return PeerFault(details or code.name, status=code.name)
