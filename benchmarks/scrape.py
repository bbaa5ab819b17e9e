"""What a scrape of `/metrics` costs: 10 runs of 1,000 layers, each with a new step; processor time, one thread.

The promise: about 0.1 s with the default settings. All layers of all models are shown beside it.
"""

import statistics
import time

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from gradiometer.protos.columns import pack_batch
from gradiometer.protos.run_pb2 import Coverage, Layer, Run
from gradiometer.server.exporter import ExportSettings, register_exporter
from gradiometer.server.live import Live
from gradiometer.stats_core import selection

RUNS, LAYERS, SCRAPES = 10, 1000, 7


def main() -> None:
    rng = np.random.default_rng(0)
    live = Live()
    for run in range(RUNS):
        layers = [Layer(name=f"blocks.{index}.attn.qkv", num_params=1000) for index in range(LAYERS)]
        coverage = Coverage(num_params=LAYERS * 1000, num_params_measured=LAYERS * 1000)
        live.register(Run(run_id=f"run-{run}", layers=layers, coverage=coverage))

    def feed(step: int) -> None:
        for run in range(RUNS):
            columns = {name: rng.random((1, LAYERS)) for name in selection.columns("default")}
            batch = pack_batch([step], [step * 10**9], LAYERS, columns, {"loss": np.array([1.0])})
            live.append(f"run-{run}", batch)

    for step in range(live.window_steps):
        feed(step)
    for title, settings in (
        ("the default: the 20 noisiest layers a run", ExportSettings()),
        ("every layer, up to max_series", ExportSettings(all_layers=True)),
    ):
        registry = CollectorRegistry()
        register_exporter(live, registry, settings)
        seconds, size = [], 0
        for scrape in range(SCRAPES):
            feed(live.window_steps + scrape)
            start = time.process_time()
            size = generate_latest(registry).count(b"\n")
            seconds.append(time.process_time() - start)
        print(f"{title:44} {statistics.median(seconds) * 1e3:8.1f} ms   {size:7} lines")


if __name__ == "__main__":
    main()
