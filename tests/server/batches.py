"""Runs and batches for the tests of the server, and a whole server in a thread."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gradiometer.protos import ingest_pb2
from gradiometer.protos.batch_pb2 import Event, Histogram, StepBatch, TopExample
from gradiometer.protos.columns import column_arrays, pack_batch
from gradiometer.protos.ingest_pb2 import PublishBatch, PublishHello, PublishRequest
from gradiometer.protos.run_pb2 import LOSS_REDUCTION_MEAN, Coverage, Layer, LossNormalization, Run, Uncovered
from gradiometer.server.app import Bound, serve
from gradiometer.server.journal import Entry
from gradiometer.server.settings import Settings
from gradiometer.server.store import EmbeddedStore

PLACES = ("journal", "segments", "both")
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
    return pack_batch(steps, times, layers, columns, values)


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


def fill(store: EmbeddedStore, place: str, *batches: StepBatch, run_id: str = "mnist", collector_id: str = "c") -> None:
    """Store batches so that they end up in the journal, in segments, or half in each."""
    for sequence, batch in enumerate(batches, start=1):
        store.append(entry(sequence, batch, run_id, collector_id)).result(30)
        if place == "both" and sequence == (len(batches) + 1) // 2:
            store.roll()
    if place == "segments":
        store.roll()


def joined(parts: Iterable[StepBatch]) -> tuple[list[int], dict[str, np.ndarray]]:
    found = list(parts)
    names = {name for part in found for name in part.columns}
    return (
        [step for part in found for step in part.steps],
        {name: np.concatenate([column_arrays(part)[name] for part in found]) for name in names},
    )


def full_batch() -> StepBatch:
    batch = make_batch(4, 7)
    batch.histograms.append(
        Histogram(
            step_index=1,
            layer=1,
            statistic="example_norm",
            schema=-2,
            zero_threshold=1e-9,
            zero_count=3,
            positive_index=[-1, 5],
            positive_count=[2, 9],
            negative_index=[0],
            negative_count=[1],
        )
    )
    batch.examples.append(TopExample(step_index=0, layer=-1, place=0, example_id="cat.png", sq_norm=2.5))
    batch.examples.append(TopExample(step_index=1, layer=0, place=1, example_id="7", sq_norm=1.5))
    batch.events.append(Event(step=2, unix_nanos=6, kind="note", text="before the first measured step"))
    batch.events.append(Event(step=9, unix_nanos=7, kind="note", text="after the last"))
    batch.coverage.CopyFrom(
        Coverage(num_params=9, num_params_measured=5, uncovered=[Uncovered(parameter="w", num_params=4, reason="LSTM")])
    )
    return batch
