"""Statistics that readers form from terms over a window, where a plain ratio of two does not say it.

Each takes the means over the window's steps of the terms that its row of the catalogue needs, in that order, on
arrays of any framework; `gradiometer.stats_core.window` calls them. Where a result does not exist it is NaN.
"""

from collections.abc import Callable, Mapping

from gradiometer.stats_core.arrays import Array, namespace

__all__ = ["FORMULAS", "divided"]


def divided(top: Array, bottom: Array) -> Array:
    """The quotient, NaN where the divisor is 0.

    Example:
        >>> import numpy as np
        >>> divided(np.array([1.0, 1.0]), np.array([4.0, 0.0]))
        array([0.25,  nan])
    """
    xp = namespace(top, bottom)
    exists = bottom != 0
    return xp.where(exists, top / xp.where(exists, bottom, xp.ones_like(bottom)), xp.nan)


def _root(value: Array) -> Array:
    xp = namespace(value)
    return xp.where(value >= 0, xp.sqrt(xp.where(value >= 0, value, xp.zeros_like(value))), xp.nan)


def _norm_test(batch_variance: Array, mean_sq_norm: Array) -> Array:
    return _root(divided(batch_variance, mean_sq_norm))


def _orthogonality_test(batch_variance: Array, parallel_variance: Array, mean_sq_norm: Array) -> Array:
    return divided(batch_variance - parallel_variance, mean_sq_norm)


def _doubling_gain(batch_variance: Array, grad_sq_norm: Array) -> Array:
    """AdaScale's gain at S = 2, kept in [1, 2] where the estimate of |G|² is below 0."""
    xp = namespace(batch_variance, grad_sq_norm)
    signal = xp.where(grad_sq_norm > 0, grad_sq_norm, xp.zeros_like(grad_sq_norm))
    return divided(batch_variance + signal, 0.5 * batch_variance + signal)


def _sign_snr_kept(sign_signal: Array, sign_noise: Array, gsnr_sum: Array, active_elements: Array) -> Array:
    """NaN where no signal was found: a share of nothing."""
    xp = namespace(sign_signal, gsnr_sum)
    kept = divided(divided(sign_signal, sign_noise), divided(gsnr_sum, active_elements))
    return xp.where(gsnr_sum > 0, kept, xp.nan)


def _consecutive_cosine(consecutive_dot: Array, step_variance: Array) -> Array:
    # ½‖a − b‖² + ⟨a, b⟩ is ½(‖a‖² + ‖b‖²).
    return divided(consecutive_dot, step_variance + consecutive_dot)


def _inverse_root_spread(inverse_root_sq: Array, inverse_root: Array) -> Array:
    xp = namespace(inverse_root_sq, inverse_root)
    excess = divided(inverse_root_sq, inverse_root * inverse_root) - 1.0
    # A mean of squares is never below the squared mean: what is, is rounding, and the elements are all alike.
    return _root(xp.where(excess < 0, xp.zeros_like(excess), excess))


FORMULAS: Mapping[str, Callable[..., Array]] = {
    "norm_test": _norm_test,
    "orthogonality_test": _orthogonality_test,
    "doubling_gain": _doubling_gain,
    "sign_snr_kept": _sign_snr_kept,
    "consecutive_cosine": _consecutive_cosine,
    "inverse_root_spread": _inverse_root_spread,
}
"""Catalogue name of each row of kind "formula" → its function."""
