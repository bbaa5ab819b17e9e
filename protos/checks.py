"""What may go on the wire: the rules that the ``.proto`` files can't state, of shapes, lengths and names.

The publisher and the server refuse by the same functions; a new check of what arrives belongs here.
"""

import math
import re
from itertools import pairwise

import numpy as np

from gradiometer.protos.batch_pb2 import Histogram, StepBatch, TopExample
from gradiometer.protos.columns import COLUMN_DTYPE, SCALAR_DTYPE, UNIT_EXPONENT
from gradiometer.protos.run_pb2 import LOSS_REDUCTION_UNSPECIFIED, Run
from gradiometer.stats_core import catalog
from gradiometer.stats_core.errors import PeerFault

__all__ = ["LARGEST_STEP", "check_batch", "check_run", "layers_differ"]

MAX_LAYERS = 100_000
LARGEST_STEP = 2**63 - 1
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SCALAR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]{0,127}")
_COLUMNS = frozenset(row.name for row in catalog.WIRE)
_HISTOGRAMS = tuple(row.name for row in catalog.STATISTICS if row.kind == "histogram")
_SCHEMAS = range(-4, 9)
_MOST_COUNTED = 2**63
_LARGEST_EXPONENT = 1000


def check_run(run: Run) -> None:
    """Refuse a run that can't be stored.

    Raises:
        PeerFault: if its id, its layers or its loss normalisation are not in order.
    """
    if not _RUN_ID.fullmatch(run.run_id) or ".." in run.run_id:
        raise PeerFault(
            f"RegisterRun needs run_id of letters, digits, '.', '_' and '-', at most 128, got run_id={run.run_id!r}; "
            "choose another name for the run"
        )
    if not 0 < len(run.layers) <= MAX_LAYERS:
        raise PeerFault(
            f"RegisterRun needs 1 to {MAX_LAYERS} layers, got layers={len(run.layers)}; "
            "register the layers that are measured"
        )
    names = [layer.name for layer in run.layers]
    if len(set(names)) != len(names) or not all(names):
        twice = next((name for name in names if names.count(name) > 1), "")
        raise PeerFault(f"RegisterRun needs layers of unique, non-empty names, got layer={twice!r}; rename it")
    if run.loss.reduction == LOSS_REDUCTION_UNSPECIFIED:
        raise PeerFault("RegisterRun needs loss.reduction, got none; say how the loss treats the batch")


def layers_differ(known: Run, offered: Run) -> str | None:
    """How the layers of a second registration differ from the first, in words; None where they are the same."""
    if len(known.layers) != len(offered.layers):
        return f"{len(known.layers)} layers registered, {len(offered.layers)} offered"
    for number, (old, new) in enumerate(zip(known.layers, offered.layers, strict=True)):
        if old.name != new.name or old.num_params != new.num_params:
            return (
                f"layer {number} is {old.name!r} with {old.num_params} parameters, "
                f"{new.name!r} with {new.num_params} offered"
            )
    return None


def check_batch(batch: StepBatch, num_layers: int) -> None:
    """Refuse a batch whose columns do not fit the run.

    Raises:
        PeerFault: naming the first thing that is wrong; nothing of the batch may be stored then.
    """
    steps = len(batch.steps)
    if any(later <= earlier for earlier, later in pairwise(batch.steps)):
        raise PeerFault("Publish needs steps in ascending order, got a step twice or going back; sort the batch")
    highest = max((*batch.steps[-1:], *(event.step for event in batch.events)), default=0)
    if highest > LARGEST_STEP:
        raise PeerFault(f"Publish needs steps below 2^63, got step={highest}; count optimizer steps from 0")
    if len(batch.unix_nanos) != steps:
        raise PeerFault(
            f"Publish needs one time a step, got steps={steps}, unix_nanos={len(batch.unix_nanos)}; "
            "send a time with every step"
        )
    if batch.layer_indices:
        raise PeerFault("Publish needs columns of all layers, got layer_indices; leave it empty")
    if steps and batch.num_layers != num_layers:
        raise PeerFault(
            f"Publish needs num_layers={num_layers} as registered, got num_layers={batch.num_layers}; "
            "register a model of other layers as another run"
        )
    for name, values in batch.columns.items():
        if name not in _COLUMNS:
            raise PeerFault(
                f"Publish needs columns of the catalogue, got column={name!r}; use the same version on both sides"
            )
        _check_length("column", name, len(values), steps * num_layers * COLUMN_DTYPE.itemsize)
    for name, values in batch.scalars.items():
        if not _SCALAR_NAME.fullmatch(name):
            raise PeerFault(
                "Publish needs scalar names of letters, digits, '_', '.', '/' and '-', "
                f"got scalar={name[:140]!r}; rename it"
            )
        _check_length("scalar", name, len(values), steps * SCALAR_DTYPE.itemsize)
    _check_exponents(batch)
    for histogram in batch.histograms:
        _check_histogram(histogram, steps, num_layers)
    _check_examples(batch, num_layers)


def _check_exponents(batch: StepBatch) -> None:
    exponents = np.frombuffer(batch.scalars.get(UNIT_EXPONENT, b""), SCALAR_DTYPE)
    wrong = exponents[~np.isnan(exponents) & ((np.rint(exponents) != exponents) | (abs(exponents) > _LARGEST_EXPONENT))]
    if len(wrong):
        raise PeerFault(
            f"Publish needs whole numbers up to {_LARGEST_EXPONENT} in scalar={UNIT_EXPONENT!r}, "
            f"got {UNIT_EXPONENT}={wrong[0]}; it is the exponent of the unit that the columns are in"
        )


def _check_histogram(histogram: Histogram, steps: int, num_layers: int) -> None:
    if histogram.statistic not in _HISTOGRAMS:
        raise PeerFault(
            f"Publish needs histograms of {_HISTOGRAMS}, got statistic={histogram.statistic[:140]!r}; "
            "use the same version on both sides"
        )
    positive, negative = histogram.positive_index, histogram.negative_index
    if (
        histogram.step_index >= steps
        or histogram.layer >= num_layers
        or len(positive) != len(histogram.positive_count)
        or len(negative) != len(histogram.negative_count)
    ):
        raise PeerFault(
            f"Publish needs histograms of the batch's steps and layers with a count a bucket, "
            f"got step_index={histogram.step_index}, layer={histogram.layer}; check both"
        )
    if histogram.schema not in _SCHEMAS or not 0 <= histogram.zero_threshold < math.inf:
        raise PeerFault(
            f"Publish needs histograms of schema {_SCHEMAS.start} to {_SCHEMAS.stop - 1} with a finite threshold, "
            f"got schema={histogram.schema}, zero_threshold={histogram.zero_threshold}; check who counts"
        )
    for indices in (positive, negative):
        if len(indices) > 1 and sorted(set(indices)) != list(indices):
            raise PeerFault(
                f"Publish needs each bucket of a histogram once, ascending, got {list(indices)[:8]}, …; sort them"
            )
    counted = histogram.zero_count + sum(histogram.positive_count) + sum(histogram.negative_count)
    if counted >= _MOST_COUNTED or not all(histogram.positive_count) or not all(histogram.negative_count):
        raise PeerFault(
            "Publish needs counts above 0 in the buckets that a histogram names, below 2^63 together, "
            f"got counted={counted}, layer={histogram.layer}; leave empty buckets out"
        )


def _check_examples(batch: StepBatch, num_layers: int) -> None:
    ranks: dict[tuple[int, int], list[TopExample]] = {}
    for example in batch.examples:
        if example.step_index >= len(batch.steps) or not -1 <= example.layer < num_layers:
            raise PeerFault(
                f"Publish needs examples of the batch's steps and layers, got step_index={example.step_index}, "
                f"layer={example.layer}; check both"
            )
        if example.sq_norm < 0:
            raise PeerFault(f"Publish needs squared norms of examples, got sq_norm={example.sq_norm}; square them")
        ranks.setdefault((example.step_index, example.layer), []).append(example)
    for found in ranks.values():
        # An example that is not finite counts as the largest.
        sizes = [example.sq_norm if math.isfinite(example.sq_norm) else math.inf for example in found]
        places = [example.place for example in found]
        if places != list(range(len(found))) or any(later > earlier for earlier, later in pairwise(sizes)):
            raise PeerFault(
                f"Publish needs examples from the largest to the smallest, in places from 0, got places={places[:8]}; "
                "sort them by their norms"
            )


def _check_length(what: str, name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise PeerFault(
            f"Publish needs {wanted} bytes in {what}={name!r}, got {got}; send little-endian values for every step"
            + (" and layer" if what == "column" else "")
        )
