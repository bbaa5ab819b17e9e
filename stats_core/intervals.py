"""Error bars."""

from typing import NamedTuple

from gradiometer.stats_core.arrays import Array


class Interval(NamedTuple):
    low: Array
    high: Array


def ratio_interval(numerator, denominator, level=0.95): ...
def inverted(found): ...
def variance_ratio_interval(numerator, denominator, level=0.95): ...
