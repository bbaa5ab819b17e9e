"""Runs and batches for the tests of the server, and a whole server in a thread."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gradiometer.protos import ingest_pb2, wire
from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.ingest_pb2 import PublishBatch, PublishHello, PublishRequest
from gradiometer.protos.run_pb2 import LOSS_REDUCTION_MEAN, Layer, LossNormalization, Run
from gradiometer.server.app import Bound, serve
from gradiometer.server.journal import Entry
from gradiometer.server.settings import Settings

COLUMNS = ("mean_sq_norm", "variance_trace")


def make_run(run_id: str = "mnist", layers: Sequence[str] = ("conv", "dense"), **fields: object) -> Run:
    return Run(
        run_id=run_id,
        layers=[Layer(name=name, num_params=10) for name in layers],
        loss=LossNormalization(reduction=LOSS_REDUCTION_MEAN),
        unit="example",
        **fields,
    )


def make_batch(*steps: int, layers: int = 2, seed: int = 0, nanos: int | None = None, **scalars: float) -> StepBatch:
    """A batch whose columns follow from its steps and the seed."""
    rng = np.random.default_rng([seed, *steps])
    columns = {name: rng.standard_normal((len(steps), layers)) for name in COLUMNS}
    times = [step * 1000 if nanos is None else nanos for step in steps]
    values = {name: np.full(len(steps), value) for name, value in scalars.items()}
    return wire.pack_batch(steps, times, layers, columns, values)


def entry(sequence: int, batch: StepBatch, run_id: str = "mnist", collector_id: str = "c") -> Entry:
    return Entry(run_id, collector_id, sequence, batch)


def hello(run_id: str = "mnist", collector_id: str = "c") -> PublishRequest:
    return PublishRequest(hello=PublishHello(run_id=run_id, collector_id=collector_id))


def numbered(sequence: int, batch: StepBatch) -> PublishRequest:
    return PublishRequest(batch=PublishBatch(sequence=sequence, batch=batch))


def register(run: Run) -> ingest_pb2.RegisterRunRequest:
    return ingest_pb2.RegisterRunRequest(run=run)


def settings(data: Path, **fields: object) -> Settings:
    return Settings.load(data=data, grpc="127.0.0.1:0", http="127.0.0.1:0", roll_check_seconds=3600, **fields)


@contextlib.contextmanager
def serving(chosen: Settings) -> Iterator[Bound]:
    """A whole server in a thread of this process, for the length of a block."""
    stop, up = asyncio.Event(), threading.Event()
    bound: list[Bound] = []
    loops: list[asyncio.AbstractEventLoop] = []
    failures: list[BaseException] = []

    def ready(addresses: Bound) -> None:
        bound.append(addresses)
        loops.append(asyncio.get_running_loop())
        up.set()

    def work() -> None:
        try:
            asyncio.run(serve(chosen, ready=ready, stop=stop))
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            failures.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=work)
    thread.start()
    up.wait(60)
    try:
        if failures:
            raise failures[0]
        yield bound[0]
    finally:
        if loops and thread.is_alive():
            loops[0].call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
    if failures:
        raise failures[0]
