"""What each tier of statistics costs, as a share of a training step: a transformer of 10 million parameters.

The collector by itself (per-example gradients and their Moments) is timed as it is with nothing published; a tier's
cost is what its numbers add to that: they are formed, copied and handed over to a publisher that has a real server.
Each tier is timed twice: from within, by a clock around what it adds, and from without, as the difference of whole
steps taken in turn, which is the noisier one. All is in the time that the training thread had the processor, on
one thread, so that what else runs on the machine takes as little part as it can.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import gradiometer as gm
from benchmarks.interleaved import interleaved, show
from gradiometer.collectors.torch_measure import StepMeasurer
from gradiometer.collectors.torch_reporter import Reporter
from gradiometer.demo.stage import Stage
from gradiometer.demo.torch_gpt import ByteGPT
from gradiometer.stats_core import catalog

BATCH, CONTEXT, WIDTH, HEADS, DEPTH = 8, 256, 320, 8, 8
REPEATS = 15
WITHOUT_TEMPORAL = [
    row.name for row in catalog.STATISTICS
    if row.travels and row.tier in ("light", "default") and "temporal" not in row.needs
]  # fmt: skip
TIERS: dict[str, Any] = {
    "light": "light",
    "default, without temporal state": WITHOUT_TEMPORAL,
    "default": "default",
    "full": "full",
}

within: dict[str, list[float]] = {}
"""Seconds of each step that a tier took inside the collector."""


def clocked(kind: type, name: str, spent: list[float]) -> None:
    """Have a method add the time that it takes to the last entry."""
    method: Callable[..., Any] = getattr(kind, name)

    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[-1] += time.thread_time() - start

    setattr(kind, name, timed)


def trainer(kind: str, endpoint: str, spent: list[float], collectors: list[Any]) -> Callable[[], None]:
    torch.manual_seed(0)
    model = ByteGPT(WIDTH, HEADS, DEPTH, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if kind == "the collector alone":
        collectors.append(gm.attach(model, optimizer, endpoint="off", every=1))
    elif kind in TIERS:
        collectors.append(gm.attach(model, optimizer, endpoint=endpoint, statistics=TIERS[kind]))
    rows = torch.randint(256, (BATCH, CONTEXT + 1))
    seconds = within.setdefault(kind, [])

    def step() -> None:
        spent.append(0.0)
        loss = F.cross_entropy(model(rows[:, :-1]).reshape(-1, 256), rows[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(spent[-1])

    return step


def main() -> None:
    torch.set_num_threads(1)
    spent = [0.0]
    clocked(StepMeasurer, "measure", spent)
    clocked(Reporter, "hand_over", spent)
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder), "127.0.0.1:0", "127.0.0.1:0") as stage:
        stage.start_server()
        kinds = ("plain AdamW", "plain again (control)", "the collector alone", *TIERS)
        collectors: list[Any] = []
        ways = {kind: trainer(kind, stage.grpc, spent, collectors) for kind in kinds}
        medians = interleaved(ways, repeats=REPEATS, clock=time.thread_time)
        for collector in collectors:
            collector.detach()
    size = sum(parameter.numel() for parameter in ByteGPT(WIDTH, HEADS, DEPTH, CONTEXT).parameters())
    show(f"PyTorch, {size / 1e6:.1f} M parameters, B {BATCH}, T {CONTEXT}, one thread, all steps measured", medians)
    plain, collector = medians["plain AdamW"], medians["the collector alone"]
    print("what a tier adds, as a share of the plain step: by the clock inside, and as the difference of whole steps")
    for kind in TIERS:
        inside = statistics.median(within[kind][-REPEATS:]) / plain
        print(f"  {kind:44} {inside:8.2%}   {(medians[kind] - collector) / plain:8.2%}")


if __name__ == "__main__":
    main()
