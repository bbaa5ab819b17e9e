"""What handing a measured step to the publisher costs the training thread.

1,000 layers × 15 statistics, with a live sender and a live server; the promise is a median of at most 20 µs.
The server is a process of its own: `gradiometer.server` with ``--server real``, else one that keeps batches in memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from gradiometer.collectors.publisher import Publisher
from gradiometer.protos.run_pb2 import Layer
from gradiometer.stats_core import Summary, selection

MEMORY_SERVER = """
import sys, threading
from tests.fake_ingest import IngestServer
with IngestServer() as server:
    print('{"grpc": "%s"}' % server.endpoint, flush=True)
    sys.stdin.read()
"""


@contextmanager
def server(kind: str, folder: str) -> Iterator[str]:
    command = [sys.executable, "-c", MEMORY_SERVER]
    if kind == "real":
        command = [sys.executable, "-m", "gradiometer.server", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        command += ["--data", folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["grpc"]
    finally:
        process.terminate()
        process.wait()


def matrices() -> None:
    """5 ms of numpy work that lets go of the interpreter lock and fills the caches, as torch and XLA do."""
    block = np.ones((256, 256), np.float32)
    deadline = time.perf_counter() + 0.005
    while time.perf_counter() < deadline:
        block = block @ block * 1e-3


def python() -> None:
    """1 ms of Python, which holds the lock and leaves the caches as they are."""
    deadline = time.perf_counter() + 0.001
    while time.perf_counter() < deadline:
        pass


def timed(rest: Callable[[], None], steps: int, act: Callable[[int], None]) -> list[float]:
    """Seconds that each act took, with the rest of a step before each."""
    took = []
    for step in range(steps):
        rest()
        start = time.perf_counter()
        act(step)
        took.append(time.perf_counter() - start)
    return took


def figures(took: list[float]) -> str:
    p50, p99, largest = np.percentile(np.array(took) * 1e6, [50, 99, 100])
    return f"p50 {p50:7.1f} µs   p99 {p99:7.1f} µs   max {largest:9.1f} µs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--server", choices=("memory", "real"), default="memory")
    arguments = parser.parse_args()
    layers = [Layer(name=f"layer.{at}", num_params=10) for at in range(arguments.layers)]
    names = selection.columns("default")
    rows = np.random.default_rng(0).standard_normal((len(names), len(layers))).astype(np.float32)
    targets = [memoryview(bytearray(rows.nbytes)) for _ in range(2)]
    summary = Summary(32, dict(zip(names, rows, strict=True)))
    scalars = {"loss": 1.0, "grad_norm": 2.0, "examples": 32.0}
    print(f"{len(names)} statistics x {len(layers)} layers, {arguments.steps} steps")

    def copy(step: int) -> None:
        targets[step % 2][:] = rows.data.cast("B")

    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIOMETER_SPOOL"] = folder + "/spool"
        with server(arguments.server, folder + "/data") as endpoint:
            for rest in (python, matrices):
                with Publisher(f"bench-{rest.__name__}", endpoint, params=layers) as publisher:
                    while publisher.state != "connected":
                        time.sleep(0.01)
                    ways: dict[str, Callable[[int], None]] = {
                        "copy alone": copy,
                        "record_rows": lambda step: publisher.record_rows(step, rows, scalars, 0),
                        "record": lambda step: publisher.record(step, summary, loss=1.0),
                    }
                    for name, way in ways.items():
                        print(f"  {rest.__name__:10} {name:12} {figures(timed(rest, arguments.steps, way))}")
                    print(f"  {rest.__name__:10} dropped: {publisher.dropped}")


if __name__ == "__main__":
    main()
