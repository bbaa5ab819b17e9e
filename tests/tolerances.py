"""By how much floating-point results may be off: worst cases, derived from type, number of terms and condition.

Throughout, u is the unit roundoff: every operation's result is within a factor 1 ± u of the exact one. Adding up n
numbers one after the other, in any order, is within (n − 1)u of the sum of their magnitudes (Higham, "Accuracy and
Stability of Numerical Algorithms", 4.2). Terms of order u² are covered by `_SECOND_ORDER`, where n·u < .01.
"""

import math
from typing import Any

import numpy as np

_SECOND_ORDER = 1.02
_CHUNK = 64  # elements that stats_core adds up in float32 before it goes on in float64


LEAST = 2.0**-126
"""The smallest float32 with all its digits: by as much a square may be off that is below it (jax makes it 0)."""


def unit_roundoff(dtype: Any) -> float:
    """u of the type that sums of a dtype are accumulated in: half precision is in float32."""
    return 2.0**-53 if "float64" in str(dtype) else 2.0**-24


def sum_error(dtype: Any, terms: int, *, float64: bool = True) -> float:
    """Of `total`, relative to the sum of the magnitudes; without ``float64`` the framework has none (jax)."""
    u = unit_roundoff(dtype)
    in_own_type = min(terms, _CHUNK) if float64 else terms
    return _SECOND_ORDER * (in_own_type * u + terms * (2.0**-53 if float64 else 0.0))


def square_sum_error(dtype: Any, terms: int, *, float64: bool = True) -> float:
    """Of `square_sum`, relative: each square has u, and a norm that is squared again 3u."""
    return sum_error(dtype, terms, float64=float64) + 4 * unit_roundoff(dtype)


def mean_error(grads: np.ndarray, dtype: Any) -> float:
    """Of ``Moments.mean``, relative in the Frobenius norm.

    The deviations from the first estimate of the mean are exact to u, their mean is taken out again (n + 2
    roundings of the mean magnitude of deviations), and the sum of both is rounded once.
    """
    u, n = unit_roundoff(dtype), len(grads)
    mean = grads.mean(0)
    deviation = float(np.linalg.norm(np.abs(grads - mean).mean(0)))
    size = float(np.linalg.norm(mean))
    first = n * u * float(np.linalg.norm(np.abs(grads).mean(0)))  # what the first estimate is off by
    return _SECOND_ORDER * u * (1 + (n + 2) * (deviation + first) / size) if size else math.inf


def m2_error(grads: np.ndarray, dtype: Any) -> float:
    """Of ``Moments.m2`` of one pass, relative in the Frobenius norm.

    Squares of deviations (3u each) are added up (n − 1), and n·s² is taken out, s what rounding left in the mean:
    n·s² is at most (n·u)²κ of M2, κ = Σ‖gᵢ‖²/ΣM2, and s is known to (n + 1)u of the deviations' size.
    """
    u, n = unit_roundoff(dtype), len(grads)
    kappa = _worst((grads**2).sum(0), grads)
    return _SECOND_ORDER * (n + 4) * u * (1 + n * u * math.sqrt(kappa)) ** 2


def merged_m2_error(grads: np.ndarray, shards: int, dtype: Any) -> float:
    """Of ``Moments.m2`` of merged shards, relative in the Frobenius norm, if all rounding errors pointed one way.

    A mean is stored with an error of u of itself, after merges in a row up to ``shards`` times that, so that the
    difference of two is off by e = (shards + 1)u·max|g|. Each merge adds W_aW_b/W·d², which is off by
    W_aW_b/W·(2|d|e + e²). Over all merges ΣW_aW_b/W·d² <= M2 and ΣW_aW_b/W <= n, so by Cauchy and Schwarz the
    whole is off by 2E + E² of M2, where E² = n·e²/M2. What the parts and their sums are off by comes on top.
    """
    u, n = unit_roundoff(dtype), len(grads)
    off = (shards + 1) * u * math.sqrt(_worst(n * np.abs(grads).max(0) ** 2, grads))
    return m2_error(grads, dtype) + _SECOND_ORDER * (2 * off + off**2 + 6 * shards * u)


def _worst(size: np.ndarray, grads: np.ndarray) -> float:
    """The largest ratio over the elements to M2, so that a bound holds for each."""
    spread = ((grads - grads.mean(0)) ** 2).sum(0)
    return float((size / np.where(spread > 0, spread, np.inf)).max()) if size.size else 0.0
