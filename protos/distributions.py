"""Histograms and single examples of a step batch: arrays to messages and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradiometer.protos.batch_pb2 import Histogram, TopExample
from gradiometer.stats_core import histogram
from gradiometer.stats_core.catalog import statistic
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import SCHEMA, Sketch

__all__ = ["pack_examples", "pack_histograms", "unpack_histogram"]

_WHOLE_MODEL = -1
_LONGEST_ID = 256


def pack_histograms(name: str, sketch: Sketch, step_index: int, exponent: int = 0) -> list[Histogram]:
    """The messages of one step's sketch: one a layer, of the buckets that hold anything.

    Args:
        name: catalogue name of the quantity.
        sketch: dense counts of each layer, on the host. A layer without a count, or with one that is NaN, is left out.
        step_index: place of the step in its batch.
        exponent: the sketch is of gradients in units of 2^exponent.

    Example:
        >>> import numpy as np
        >>> sketch = np.array([-7, 1]), np.array([[0, 2, 0, 1], [0, 0, 0, 0]]), np.array([0, 0])
        >>> (found,) = pack_histograms("element_t_sq", sketch, 0)
        >>> found.layer, found.zero_threshold, list(found.positive_index), list(found.positive_count)
        (0, 0.5, [-6, -4], [2, 1])
    """
    first, counts, zeros = (np.asarray(part, np.float64) for part in sketch)
    exists = np.isfinite(first) & np.isfinite(zeros) & np.isfinite(counts).all(axis=1)
    whole = np.rint(np.where(exists[:, None], counts, 0.0)).astype(np.int64)
    zero_counts = np.rint(np.where(exists, zeros, 0.0)).astype(np.int64)
    start = np.where(exists, first, 0.0).astype(np.int64) + ((exponent * statistic(name).power) << SCHEMA)
    layers, places = np.nonzero(whole)
    buckets, found = start[layers] + places, whole[layers, places]
    ends = np.searchsorted(layers, np.arange(len(start) + 1))
    return [
        Histogram(
            step_index=step_index,
            layer=layer,
            statistic=name,
            schema=SCHEMA,
            zero_threshold=2.0 ** (float(start[layer] - 1) / 2**SCHEMA),
            zero_count=int(zero_counts[layer]),
            positive_index=buckets[ends[layer] : ends[layer + 1]].tolist(),
            positive_count=found[ends[layer] : ends[layer + 1]].tolist(),
        )
        for layer in np.flatnonzero((np.diff(ends) > 0) | (zero_counts > 0)).tolist()
    ]


def unpack_histogram(message: Histogram) -> histogram.Histogram:
    """What a message counts, to merge and to ask for quantiles.

    Example:
        >>> unpack_histogram(Histogram(schema=3, positive_index=[0, 8], positive_count=[3, 1]))
        Histogram(schema=3, zero_threshold=0.0, zero_count=0, positive_index=(0, 8), positive_count=(3, 1),
            negative_index=(), negative_count=())
    """
    return histogram.Histogram(
        schema=message.schema,
        zero_threshold=message.zero_threshold,
        zero_count=message.zero_count,
        positive_index=message.positive_index,
        positive_count=message.positive_count,
        negative_index=message.negative_index,
        negative_count=message.negative_count,
    )


def pack_examples(
    outliers: Outliers, step_index: int, ids: Sequence[object] | None = None, exponent: int = 0
) -> list[TopExample]:
    """The messages of one step's outstanding examples, of the whole model.

    Args:
        outliers: on the host; a row below 0 is none.
        step_index: place of the step in its batch.
        ids: the user's own ids of the examples, in the order of the batch; None: the rows are their ids.
        exponent: the norms are of gradients in units of 2^exponent.

    Raises:
        LookupError: if there are fewer ids than examples.

    Example:
        >>> import numpy as np
        >>> found = pack_examples(Outliers(np.array([2, 0]), np.array([9.0, 4.0])), 0, ["a.png", "b.png", "c.png"])
        >>> [(example.place, example.example_id, example.sq_norm) for example in found]
        [(0, 'c.png', 9.0), (1, 'a.png', 4.0)]
    """
    rows = np.asarray(outliers.rows).astype(np.int64)
    with np.errstate(over="ignore"):
        sq_norms = np.ldexp(np.asarray(outliers.sq_norms, np.float64), 2 * exponent)
    there = [(int(row), float(value)) for row, value in zip(rows, sq_norms, strict=True) if row >= 0]
    return [
        TopExample(
            step_index=step_index,
            layer=_WHOLE_MODEL,
            place=place,
            example_id=str(row) if ids is None else _text(ids[row]),
            sq_norm=value,
        )
        for place, (row, value) in enumerate(there)
    ]


def _text(name: Any) -> str:
    """An id as text: a number of any framework as its digits."""
    if hasattr(name, "item") and not isinstance(name, str):
        name = name.item()
    return str(name)[:_LONGEST_ID]
