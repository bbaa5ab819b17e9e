"""The maths: per-example gradient moments and what is formed from them, on arrays of any framework.

Each module is one noun: `noise` (of the batch), `elements`, `signs`, `examples`, `tails`, `successive` (steps), `maxva`
and `temporal`, `smoothing`, `adam` and `radam`, `histogram`, `two_batch`, `batch_rules`; `window`, `derived` and
`intervals` are for those who read; `catalog` is the table of all statistics, and `selection` what of it is measured.
"""

from gradiometer.stats_core import (
    adam,
    batch_rules,
    catalog,
    elements,
    errors,
    examples,
    histogram,
    intervals,
    maxva,
    radam,
    selection,
    signs,
    smoothing,
    successive,
    tails,
    temporal,
    two_batch,
    window,
)
from gradiometer.stats_core.histogram import Histogram
from gradiometer.stats_core.intervals import Interval
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments, standard_error, variance
from gradiometer.stats_core.noise import NoiseSums, noise_sums
from gradiometer.stats_core.source import MomentsSource, TakesMoments
from gradiometer.stats_core.summary import Summary

__all__ = [
    "Histogram",
    "Interval",
    "Moments",
    "MomentsSource",
    "NoiseSums",
    "Summary",
    "TakesMoments",
    "TemporalMoments",
    "adam",
    "batch_rules",
    "catalog",
    "elements",
    "errors",
    "examples",
    "histogram",
    "intervals",
    "maxva",
    "noise_sums",
    "radam",
    "selection",
    "signs",
    "smoothing",
    "standard_error",
    "successive",
    "tails",
    "temporal",
    "two_batch",
    "variance",
    "window",
]
