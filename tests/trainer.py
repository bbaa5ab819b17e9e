"""A made-up training job that speaks to a real server over gRPC, one step a batch."""

import queue
from collections.abc import Iterator
from typing import Self

import grpc

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.ingest_pb2 import PublishBatch, PublishHello, PublishRequest, RegisterRunRequest
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub
from gradiometer.protos.run_pb2 import Run


class Trainer:
    """Registers a run, and publishes batches one by one; a context manager."""

    def __init__(self, endpoint: str, run: Run) -> None:
        self._channel = grpc.insecure_channel(endpoint)
        self._stub = IngestServiceStub(self._channel)
        self._run = run
        self._requests: queue.SimpleQueue[PublishRequest | None] = queue.SimpleQueue()
        self._sequence = 0

    def __enter__(self) -> Self:
        self._stub.RegisterRun(RegisterRunRequest(run=self._run), timeout=20)
        self._answers = self._stub.Publish(self._spoken())
        self._requests.put(PublishRequest(hello=PublishHello(run_id=self._run.run_id, collector_id="test")))
        self._sequence = next(self._answers).durable_sequence
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self._answers.cancel()
        self._channel.close()

    def step(self, batch: StepBatch) -> None:
        """Publish a batch and wait until it is durable."""
        self._sequence += 1
        self._requests.put(PublishRequest(batch=PublishBatch(sequence=self._sequence, batch=batch)))
        while next(self._answers).durable_sequence < self._sequence:
            pass

    def _spoken(self) -> Iterator[PublishRequest]:
        while (request := self._requests.get()) is not None:
            yield request
