"""A gRPC server that keeps the contract of ingest.proto in memory, and misbehaves on request.

What it holds outlives it, as a disk would: `IngestServer.kill` and `start` again on the same port.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Self

import grpc

from gradiometer.protos import ingest_pb2_grpc
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.checks import check_batch, check_run, layers_differ
from gradiometer.protos.ingest_pb2 import (
    PublishRequest,
    PublishResponse,
    RegisterRunRequest,
    RegisterRunResponse,
)
from gradiometer.protos.run_pb2 import Layer, Run
from gradiometer.stats_core.errors import PeerFault


class IngestServer(ingest_pb2_grpc.IngestServiceServicer):
    """The server, what it holds, and its moods.

    Attributes:
        runs: registered runs.
        stored: (run, collector) → batches in order of their sequence numbers, from 1.
        duplicates: known sequence numbers that came again.
        hello_metadata: of the last stream.
        refuse: status with which registrations are refused, or None.
        abort_after: streams are aborted after so many batches each, or None.
        hang: while set, nothing is stored or acknowledged.
        pause: seconds between taking a batch and acknowledging it.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.stored: dict[tuple[str, str], list[StepBatch]] = defaultdict(list)
        self.duplicates = 0
        self.hello_metadata: dict[str, str] = {}
        self.refuse: grpc.StatusCode | None = None
        self.abort_after: int | None = None
        self.hang = False
        self.pause = 0.0
        self.port = 0
        self._lock = threading.Lock()
        self._server: grpc.Server | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> Self:
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        ingest_pb2_grpc.add_IngestServiceServicer_to_server(self, self._server)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
                break
            except RuntimeError:  # the port of the server before is still being given back
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._server.start()
        return self

    def kill(self) -> None:
        """Break every connection at once."""
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.hang = False
        self.kill()

    def RegisterRun(self, request: RegisterRunRequest, context: Any) -> RegisterRunResponse:
        run = request.run
        if self.refuse is not None:
            context.abort(self.refuse, "not today")
        try:
            check_run(run)
        except PeerFault as fault:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(fault))
        known = self.runs.get(run.run_id)
        difference = layers_differ(known, run) if known else None
        if difference:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"run has other layers: {difference}; choose another name")
        self.runs.setdefault(run.run_id, run)
        return RegisterRunResponse(created=known is None, server_version="test")

    def Publish(self, requests: Iterator[PublishRequest], context: Any) -> Iterator[PublishResponse]:
        hello = next(requests).hello
        self.hello_metadata = dict(context.invocation_metadata())
        if hello.run_id not in self.runs:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown run")
        stored = self.stored[hello.run_id, hello.collector_id]
        yield PublishResponse(durable_sequence=len(stored))
        for taken, request in enumerate(requests):
            while self.hang and context.is_active():
                time.sleep(0.005)
            if not context.is_active():
                return
            if self.abort_after is not None and taken >= self.abort_after:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "disk full")
            sequence, batch = request.batch.sequence, request.batch.batch
            try:
                check_batch(batch, len(self.runs[hello.run_id].layers))
            except PeerFault as fault:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(fault))
            with self._lock:
                gap = sequence > len(stored) + 1
                if sequence == len(stored) + 1:
                    stored.append(batch)
                elif not gap:
                    self.duplicates += 1
            if gap:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"gap before {sequence}")
            if self.pause:
                time.sleep(self.pause)
            yield PublishResponse(durable_sequence=len(stored))

    def forget(self) -> None:
        """Lose everything, as a server started on another data directory has."""
        self.runs.clear()
        self.stored.clear()

    def batches(self, run_id: str) -> list[StepBatch]:
        return [batch for (run, _), found in list(self.stored.items()) if run == run_id for batch in list(found)]

    def steps(self, run_id: str) -> list[int]:
        """All stored steps of a run, with repetitions, in the order of storing."""
        return [step for batch in self.batches(run_id) for step in batch.steps]


def layers(count: int = 2, size: int = 3) -> list[Layer]:
    return [Layer(name=f"layer.{at}", parameters=[f"layer.{at}.weight"], num_params=size) for at in range(count)]


def eventually(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {seconds} s")
        time.sleep(0.01)


def spools(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []
