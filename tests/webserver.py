"""What the tests of the HTTP side share: a made-up run, a store in memory, and a real server on a free port."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import column_arrays, pack_batch, scalar_arrays
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.protos.run_pb2 import LOSS_REDUCTION_MEAN, Coverage, Layer, LossNormalization, Run, Uncovered, World
from gradiometer.server.exporter import ExportSettings, register_exporter
from gradiometer.server.live import Live
from gradiometer.server.web import create_web
from gradiometer.stats_core import catalog, selection

SECOND = 1_000_000_000


def make_run(run_id: str = "mnist-1", layers: int = 3, **fields: Any) -> Run:
    """A run of some layers, of 10, 20, ... parameters."""
    kinds = ("Embedding", "Linear", "LayerNorm")
    sizes = [10 * (index + 1) for index in range(layers)]
    defaults: dict[str, Any] = {
        "started_unix_nanos": 1_700_000_000 * SECOND,
        "loss": LossNormalization(reduction=LOSS_REDUCTION_MEAN, accumulation=1),
        "world": World(size=1, framework="torch", framework_version="2.13.0", device="cpu", host="example"),
        "coverage": Coverage(
            num_params=sum(sizes) + 5,
            num_params_measured=sum(sizes),
            uncovered=[Uncovered(parameter="rnn.weight_hh", num_params=5, reason="LSTM has no per-example sampler")],
        ),
        "unit": "example",
        "tier": "default",
        "engine": "opacus",
        "optimizer": "MAdam",
        "temporal": "collector",
    }
    return Run(
        run_id=run_id,
        layers=[
            Layer(
                name=f"blocks.{index}",
                parameters=[f"blocks.{index}.weight"],
                num_params=size,
                kind=kinds[index % len(kinds)],
                dtype="float32",
            )
            for index, size in enumerate(sizes)
        ],
        **(defaults | fields),
    )


def make_batch(
    steps: Sequence[int],
    layers: int = 3,
    *,
    nanos: Sequence[int] | None = None,
    seed: int = 0,
    statistics: str = "default",
    **scalars: float,
) -> StepBatch:
    """Steps of plausible numbers: P about 0.1, D about 1.2 P, s about 3 P, a signal above the noise."""
    rng = np.random.default_rng([seed, steps[0]])
    shape = (len(steps), layers)

    def near(value: float) -> np.ndarray:
        return value * rng.uniform(0.8, 1.2, shape)

    values = {
        "count": np.full(shape, 16.0),
        "effective_count": np.full(shape, 16.0),
        "nonfinite_examples": np.zeros(shape),
        "deviation_share": near(0.3),
        "maxva_beta": near(0.95),
        "batch_variance": near(0.1),
        "step_variance": near(0.12),
        "step_variance_expected": near(0.1),
        "temporal_variance": near(0.3),
        "grad_sq_norm": near(0.2),
        "variance_trace": near(1.6),
    }
    columns = {name: values.get(name, near(0.5)) for name in selection.columns(statistics)}
    times = [step * SECOND // 10 for step in steps] if nanos is None else nanos
    # What is made of the examples' own numbers travels for the whole model, too.
    whole = {name: 0.75 for name in columns if catalog.statistic(name).kind == "example"}
    given = {"loss": 2.5, "examples": 16.0, **whole, **scalars}
    return pack_batch(
        steps, times, layers, columns, {name: np.full(len(steps), value) for name, value in given.items()}
    )


class MemoryStore:
    """The part of a store that the page needs, in memory."""

    def __init__(self) -> None:
        self.batches: dict[str, list[StepBatch]] = {}
        self.known: dict[str, Run] = {}

    def add(self, run: Run, *batches: StepBatch) -> None:
        """Store a run."""
        self.known[run.run_id] = run
        self.batches.setdefault(run.run_id, []).extend(batches)

    def list_runs(self) -> list[RunStatus]:
        """The runs, newest first."""
        return [
            RunStatus(
                run=run,
                stored_steps=sum(len(batch.steps) for batch in self.batches[run.run_id]),
                last_step=max((step for batch in self.batches[run.run_id] for step in batch.steps), default=0),
                last_unix_nanos=max((at for batch in self.batches[run.run_id] for at in batch.unix_nanos), default=0),
            )
            for run in reversed(self.known.values())
        ]

    def read(self, run_id: str, *, columns: Sequence[str] = (), limit: int | None = None) -> Iterator[StepBatch]:
        """All that is stored of a run; some columns, or all."""
        assert limit is None or limit > 0
        for batch in self.batches[run_id]:
            arrays = column_arrays(batch)
            yield pack_batch(
                batch.steps,
                batch.unix_nanos,
                batch.num_layers,
                {name: values for name, values in arrays.items() if not columns or name in columns},
                scalar_arrays(batch),
            )


class Served:
    """A web application under a real server, in a thread of its own, with the live runs on its event loop."""

    def __init__(self, live: Live, store: MemoryStore, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.live = live
        self.store = store
        self.port = port
        self._loop = loop

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def do(self, action: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run something on the server's event loop, as the ingest service would, and wait for it."""

        async def on_loop() -> Any:
            return action(*args, **options)

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(10)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (in lower case) and body of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path, headers={name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        """The body of a request, which must be strict JSON."""
        status, _, body = self.get(path)
        assert status == 200, body
        return json.loads(body, parse_constant=_no_constant)


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


@contextlib.contextmanager
def listening(app: Starlette, live: Live, store: MemoryStore, port: int = 0) -> Iterator[Served]:
    """An application on a free port of the loopback interface (or on one that was free a moment ago)."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=3)
        )
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listener])))
        thread.start()
        try:
            poll(lambda: server.started)
            yield Served(live, store, listener.getsockname()[1], loop)
        finally:
            loop.call_soon_threadsafe(live.close)
            server.should_exit = True
            thread.join(20)
            loop.close()


@contextlib.contextmanager
def serving(
    live: Live | None = None, store: MemoryStore | None = None, *, export: ExportSettings | None = None, port: int = 0
) -> Iterator[Served]:
    """The whole HTTP side, over these live runs and this store."""
    live, store, registry = live or Live(), store or MemoryStore(), CollectorRegistry()
    register_exporter(live, registry, export)
    with listening(create_web(live, store, registry), live, store, port) as served:
        yield served


def poll(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until something is true, and give it back."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)
    return result
