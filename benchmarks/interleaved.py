"""Timing two or more ways of doing the same thing, in turn, in one process: medians and ratios to the first."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each way. They take turns, so that a change of the machine's speed hits all alike."""
    for _ in range(warmup):
        for way in ways.values():
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, medians: Mapping[str, float]) -> None:
    """Print the medians, and each one's ratio to the first."""
    first = next(iter(medians.values()))
    print(f"{title}")
    for name, value in medians.items():
        print(f"  {name:44} {value * 1e3:9.2f} ms   {value / first:5.2f} x")
