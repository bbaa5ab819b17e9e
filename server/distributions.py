"""The histograms and single examples of some steps, put together: what a report says of distributions."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.distributions import unpack_histogram
from gradiometer.stats_core import catalog
from gradiometer.stats_core.histogram import Histogram
from gradiometer.stats_core.tails import Tail, hill_of, pooled

__all__ = ["NAMES", "Distributions", "Largest"]

NAMES = tuple(row.name for row in catalog.STATISTICS if row.kind in ("histogram", "outliers"))
"""Catalogue names of all that this is made of, to ask a store for."""

_NORMS = "example_norm"
_FEWEST_EXCEEDANCES = 10  # of fewer, the tail index is known to a third at best


class Largest(NamedTuple):
    """An example of a large gradient.

    Attributes:
        example_id: the user's own, or its row in the batch.
        step: at which it was seen.
        norm: of its gradient over all layers; NaN or infinite where it is not finite. Unit: loss/parameter.
    """

    example_id: str
    step: int
    norm: float


class Distributions:
    """Made of a store's answer for the steps that are wanted.

    Args:
        batches: parts of the answer.

    Example:
        >>> from gradiometer.protos.batch_pb2 import Histogram as Message
        >>> ratios = Message(statistic="element_deviation_ratio", schema=3, positive_index=[0], positive_count=[2])
        >>> more = Message(statistic="element_deviation_ratio", schema=3, positive_index=[0, 8], positive_count=[1, 2])
        >>> found = Distributions([StepBatch(steps=[0], histograms=[ratios]), StepBatch(steps=[1], histograms=[more])])
        >>> found.names, found.layer("element_deviation_ratio", 0).count, found.layer("example_norm", 0).count
        ({'element_deviation_ratio'}, 5, 0)
    """

    def __init__(self, batches: Iterable[StepBatch]) -> None:
        self._histograms: dict[tuple[str, int], list[Histogram]] = defaultdict(list)
        self._examples: list[Largest] = []
        for batch in batches:
            for message in batch.histograms:
                self._histograms[message.statistic, message.layer].append(unpack_histogram(message))
            for example in batch.examples:
                if example.layer < 0:
                    step = batch.steps[example.step_index]
                    self._examples.append(Largest(example.example_id, step, math.sqrt(example.sq_norm)))

    @property
    def names(self) -> set[str]:
        """Catalogue names of the histograms that there are."""
        return {name for name, _ in self._histograms}

    def layer(self, name: str, index: int) -> Histogram:
        """All that was counted in a layer; empty where nothing was."""
        return _merged(self._histograms.get((name, index), ()))

    def model(self, name: str) -> Histogram:
        """All that was counted in any layer: for distributions over elements."""
        return _merged(one for (known, _), found in self._histograms.items() if known == name for one in found)

    def tail(self, index: int) -> Tail | None:
        """Hill's index of a layer's examples, from the tenth with the largest norms; None where these are too few.

        The norms of each step are in units of the step's median.
        """
        found = hill_of(pooled(self._histograms.get((_NORMS, index), ())))
        return found if found.exceedances >= _FEWEST_EXCEEDANCES and math.isfinite(found.alpha) else None

    def largest(self, most: int) -> list[Largest]:
        """The examples of the largest gradients, those that are not finite first."""

        def size(example: Largest) -> float:
            return example.norm if math.isfinite(example.norm) else math.inf

        return sorted(self._examples, key=size, reverse=True)[:most]


def _merged(histograms: Iterable[Histogram]) -> Histogram:
    """As `Histogram.merge` of all; those of one window are added up before, which is the same and much quicker."""
    alike: dict[tuple[int, float], list[Histogram]] = defaultdict(list)
    for histogram in histograms:
        alike[histogram.schema, histogram.zero_threshold].append(histogram)
    result = Histogram(schema=8)
    for (schema, zero_threshold), group in alike.items():
        sides = [Counter[int](), Counter[int]()]
        for one in group:
            for side, indices, counts in zip(
                sides,
                (one.positive_index, one.negative_index),
                (one.positive_count, one.negative_count),
                strict=True,
            ):
                for index, count in zip(indices, counts, strict=True):
                    side[index] += count
        positive, negative = (sorted(side.items()) for side in sides)
        result = result.merge(
            Histogram(
                schema=schema,
                zero_threshold=zero_threshold,
                zero_count=sum(one.zero_count for one in group),
                positive_index=[index for index, _ in positive],
                positive_count=[count for _, count in positive],
                negative_index=[index for index, _ in negative],
                negative_count=[count for _, count in negative],
            )
        )
    return result
