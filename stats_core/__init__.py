"""The maths: per-example gradient moments and what is formed from them, on arrays of any framework."""

from gradiometer.stats_core import catalog, errors, maxva, window
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments, standard_error, variance
from gradiometer.stats_core.noise import NoiseSums, noise_sums
from gradiometer.stats_core.source import MomentsSource, TakesMoments
from gradiometer.stats_core.summary import Summary

__all__ = [
    "Moments",
    "MomentsSource",
    "NoiseSums",
    "Summary",
    "TakesMoments",
    "TemporalMoments",
    "catalog",
    "errors",
    "maxva",
    "noise_sums",
    "standard_error",
    "variance",
    "window",
]
