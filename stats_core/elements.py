r"""Signal and noise of a parameter element by element: GSNR, evidence, significance.

Everything here is made of one number an element, :math:`x_j = \bar g_j^2 / M_{2,j}`, and a few numbers that all
elements share (`ElementLimits`). The sums over elements are additive over parameters and layers; the means that
people read are formed over a window of steps (`gradiometer.stats_core.window`).

The sums run in every measured step, over every parameter: on a CPU they go through the arrays in tiles that
stay in the cache, in as few passes as there are, and a passed test is kept as 1.0 or 0.0, since torch
writes and reads booleans several times as slowly.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import array_api_compat

from gradiometer.stats_core.arrays import Array, namespace, positive_or_one
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.student import t_critical

__all__ = [
    "ElementLimits",
    "active_elements",
    "element_limits",
    "element_parts",
    "element_sums",
    "element_sums_of_parts",
    "gsnr",
    "numbered",
    "t_squares",
    "tiles",
]

_ROUNDING = 4.0
"""Standard deviations of the examples up to this many ``eps`` of the mean are rounding, not noise."""

_CACHED = 1 << 17  # elements of a tile on a CPU: 512 KiB in float32
_COUNTED = 1 << 24  # elements of a tile elsewhere: float32 counts to here exactly


class ElementLimits(NamedTuple):
    r"""What all elements of a batch share: numbers, or scalars on the device where the weights are there.

    Attributes:
        share: :math:`s_2 = \sum w_i^2`; 1/n where all weights are equal.
        freedom: :math:`f = W (1 - s_2)`, by which :math:`\hat\sigma^2 = M_2 / f`; n − 1 for weights of 1; NaN for one
            example or none.
        correction: :math:`(n - 3)/(n - 1)` with :math:`n = 1/s_2`, which makes GSNR unbiased; NaN where n ≤ 3.
        resolved: x from which on M₂ is no more than rounding.
        significant: x from which on an element differs from 0 at the 5 % level; NaN where n < 2.
    """

    share: Array
    freedom: Array
    correction: Array
    resolved: Array
    significant: Array


def element_sums(moments: Moments) -> dict[str, Array]:
    r"""Signal-to-noise ratios of a parameter's elements, added up over its active elements.

    With :math:`\hat\sigma_j^2` the unbiased variance across examples and
    :math:`t_j^2 = n \bar g_j^2 / \hat\sigma_j^2`:

    .. math::
        \hat r_j = \frac{n-3}{n-1} \frac{\bar g_j^2}{\hat\sigma_j^2} - \frac1n, \qquad
        1 - \frac{n-3}{n-1} t_j^2 = -n \hat r_j

    Divided by ``active_elements``, over a window: ``gsnr_sum`` is the gradient signal-to-noise ratio
    :math:`r = G^2/\sigma^2` of one example, averaged over elements, 0 under pure noise; ``evidence_sum`` is
    the evidence criterion for stopping early, above 0 where the gradient can't be told from noise;
    ``significant_elements`` is the share that differs from 0 at the 5 % level, .05 under pure noise.

    An element is *active* where the examples' gradients differ by more than rounding: standard deviation
    above 4 ``eps`` of the mean, ``eps`` that of the array's type (5e-7 in float32). One that is dead, or the
    same for all examples, has no noise to be compared with.

    Args:
        moments: of one parameter. With weights, n is the effective number of examples (Kish),
            :math:`n = 1/s_2`, and :math:`t_j^2 = \bar g_j^2 / (s_2 \hat\sigma_j^2)`: exact only where the weights are
            equal or 0. Where they differ it errs towards noise, the more so where heavier examples are less noisy, as
            under token means: with lengths spread evenly over a factor of 20, pure noise has an ``evidence`` of .24 and
            a ``significant_share`` of .026 instead of 0 and .05 (.01 and .049 for examples of one variance).

    Returns:
        ``active_elements``, ``gsnr_sum``, ``evidence_sum``, ``significant_elements``: scalars of the type of
        ``moments.mean``.

    Guarantees:
        * Unbiased where an element's gradients are normal and the weights equal: ``gsnr_sum`` has
          expectation :math:`\sum_j G_j^2/\sigma_j^2`. (Skewed ones are not: exponential
          about a true mean of 0 they read .14 at n = 8, .008 at 32.)
        * The order of the examples and the scale of the gradients, from 1e-18 to 1e18 in float32, change nothing. (At
          1e-18, where the device drops subnormal numbers as under jax, M₂ is .0003 low: squares below 1e-38 are 0.)
        * Additive: the sums of two parameters are those of one that holds the elements of both.
        * Rounding: relative 3e-6 of :math:`\sum_j x_j` in float32, whatever the number of elements.

    Edge cases:
        ==============================  ======================================================
        dead element (M₂ = 0)           left out of all four
        same for all, up to rounding    left out of all four
        NaN or infinity in an element   left out; ``nonfinite_examples`` tells of it
        n ≤ 3                           ``gsnr_sum`` and ``evidence_sum`` NaN: no expectation
        n ≤ 5                           they exist, but their variance is infinite
        n < 2                           ``significant_elements`` NaN too
        ==============================  ======================================================

    Example:
        >>> import numpy as np
        >>> moments = Moments.from_per_example(np.array([[2.0, 0.0], [4.0, 0.0], [3.0, 0.0], [6.0, 0.0], [5.0, 0.0]]))
        >>> {name: round(float(value), 4) for name, value in element_sums(moments).items()}
        {'active_elements': 1.0, 'gsnr_sum': 3.0, 'evidence_sum': -15.0, 'significant_elements': 1.0}

    References:
        Liu, Jiang, Bai, Chen and Wang, "Understanding why neural networks generalize well through GSNR of
        parameters", 2020, arXiv 2001.07384 (the ratio; the correction is ours). Mahsereci, Balles, Lassner
        and Hennig, "Early stopping without a validation set", 2017, arXiv 1703.09580 (the criterion; corrected here).
    """
    limits = element_limits(moments)
    return element_sums_of_parts(element_parts(moments.mean, moments.m2, limits), limits)


def element_limits(batch: Moments) -> ElementLimits:
    """What the elements share: the same for all parameters of a batch, so it is formed once a step.

    Args:
        batch: Moments of any parameter: its count, weights and type are those of all.
    """
    weight_sum, weight_sq_sum = batch.weight_sum, batch.weight_sq_sum
    share = weight_sq_sum / positive_or_one(weight_sum * weight_sum)
    count = 1.0 / positive_or_one(share)
    freedom = weight_sum * (1.0 - share)
    freedom = _where(freedom > 1e-6 * weight_sum, freedom, math.nan)
    # The weights' own rounding must not decide whether there are two or three examples.
    critical = _where(count > 1.999, t_critical(count - 1.0), math.nan)
    correction = _where(count > 3.001, (count - 3.0) / positive_or_one(count - 1.0), math.nan)
    rounding = _ROUNDING * float(namespace(batch.mean).finfo(batch.mean.dtype).eps)
    return ElementLimits(
        share=share,
        freedom=freedom,
        correction=correction,
        resolved=1.0 / (rounding * rounding * positive_or_one(weight_sum)),
        significant=critical * critical * (share / positive_or_one(freedom)),
    )


def element_parts(mean: Array, m2: Array, limits: ElementLimits) -> Array:
    r"""The part of `element_sums` that reads arrays: three sums over one parameter's active elements.

    Args:
        mean: ``Moments.mean``, shape ``(*param,)``.
        m2: ``Moments.m2``, same shape.
        limits: `element_limits` of the batch.

    Returns:
        Shape (3,), type of ``mean``: how many are active, :math:`\sum_j x_j`, how many differ from 0.
    """
    xp = namespace(mean)
    # Within a tile by pairs: relative error of log2(2¹⁷) roundings and a few more, 2e-6 in float32; over tiles as much.
    sums, buffers = [], None
    for tile, its_m2 in tiles(mean, m2):
        buffers = _buffers(xp, tile, buffers)
        sums.append(_tile_sums(xp, limits, tile, its_m2, *buffers))
    return sums[0] if len(sums) == 1 else xp.sum(xp.stack(sums), axis=0)


def element_sums_of_parts(parts: Array, limits: ElementLimits) -> dict[str, Array]:
    """The columns from their parts, for one parameter or for many at once.

    Args:
        parts: as `element_parts`, shape ``(..., 3)``.
        limits: `element_limits` of the batch.

    Returns:
        Catalogue name → shape ``(...)``; see `element_sums`.
    """
    active, ratio_sum, significant = parts[..., 0], parts[..., 1], parts[..., 2]
    gsnr_sum = (limits.correction * limits.freedom) * ratio_sum - limits.share * active
    return {
        "active_elements": active,
        "gsnr_sum": gsnr_sum,
        "evidence_sum": gsnr_sum * (-1.0 / positive_or_one(limits.share)),
        "significant_elements": significant + 0.0 * limits.significant,  # NaN where that is
    }


def gsnr(moments: Moments) -> Array:
    r"""Gradient signal-to-noise ratio of each element, corrected for what noise adds to it.

    .. math:: \hat r = \frac{n-3}{n-1} \frac{\bar g^2}{\hat\sigma^2} - \frac1n

    estimates :math:`r = G^2/\sigma^2`, the squared true gradient over the variance of one example's gradient; 1/r
    is the number of examples at which an element's batch gradient is as much signal as noise. One element of one
    batch says little: average over elements or steps. It is below 0 about half of the time where there is no signal.

    Args:
        moments: of one parameter; with weights as `element_sums`.

    Returns:
        Shape ``(*param,)``. Unit: power ratio. NaN where the element is not active, and everywhere for n ≤ 3.

    Guarantees:
        * Unbiased for normal gradients under equal weights; the mean over active elements is that of `element_sums`.

    Example:
        >>> import numpy as np
        >>> moments = Moments.from_per_example(np.array([[2.0, 1.0], [4.0, 1.0], [3.0, 1.0], [6.0, 1.0], [5.0, 1.0]]))
        >>> gsnr(moments).round(4)
        array([ 3., nan])

    References:
        As `element_sums`.
    """
    limits = element_limits(moments)
    return _by_element(moments, limits, limits.correction * limits.freedom, limits.share)


def t_squares(moments: Moments) -> Array:
    r"""Squared t statistic of each element's mean.

    .. math:: t^2 = \frac{n \bar g^2}{\hat\sigma^2}

    Under pure noise with normal gradients it follows F(1, n − 1): mean :math:`(n-1)/(n-3)`, median .506 at n = 8
    and .455 for many examples. For histograms of what the sums of `element_sums` are made of.

    Args:
        moments: of one parameter; with weights :math:`t^2 = \bar g^2/(s_2 \hat\sigma^2)`, which is approximate.

    Returns:
        Shape ``(*param,)``. Unit: ratio. NaN where the element is not active, so also where the gradients of all
        examples are one and the same number.

    Example:
        >>> import numpy as np
        >>> t_squares(Moments.from_per_example(np.array([[1.0, 0.0, 1.0], [3.0, 0.0, 1.0]])))
        array([ 4., nan, nan])
    """
    limits = element_limits(moments)
    return _by_element(moments, limits, limits.freedom / positive_or_one(limits.share), 0.0)


def active_elements(mean: Array, m2: Array, limits: ElementLimits) -> Array:
    """1 where an element is active, else 0: shape and type of ``mean``; see `element_sums`."""
    xp = namespace(mean)
    return numbered(xp, xp.less, _ratio(xp, mean, m2), limits.resolved)


def tiles(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of one shape in pieces along the first axis, as views: what is made of a piece stays in a CPU's cache.

    Only torch's are cut, and leave their graph, if they have one: they are written over buffers. jax gets whole
    arrays, which its compiler goes through as it sees fit.
    """
    first = arrays[0]
    if not array_api_compat.is_torch_array(first):
        yield arrays
        return
    arrays = tuple(array.detach() for array in arrays)
    size, largest = math.prod(first.shape), _CACHED if first.device.type == "cpu" else _COUNTED
    if size <= largest:
        yield arrays
        return
    rows = first.shape[0]
    step = max(1, largest * rows // size)
    for row in range(0, rows, step):
        yield tuple(array[row : row + step] for array in arrays)


def _buffers(
    xp: Any, tile: Array, buffers: tuple[Array | None, Array | None] | None
) -> tuple[Array | None, Array | None]:
    """Two arrays like the tile to write to, the ones before if they fit; none for jax and numpy."""
    if not array_api_compat.is_torch_array(tile):
        return None, None
    if buffers is None or buffers[0] is None or buffers[0].shape != tile.shape:
        return xp.empty_like(tile), xp.empty_like(tile)
    return buffers


def _by_element(moments: Moments, limits: ElementLimits, factor: Array, less: Array) -> Array:
    """The ratio x times ``factor``, minus ``less``, where the element is active, else NaN."""
    xp = namespace(moments.mean)
    found = []
    for mean, m2 in tiles(moments.mean, moments.m2):
        ratio = _ratio(xp, mean, m2)
        found.append(xp.where(ratio < limits.resolved, ratio, xp.nan) * factor - less)
    return found[0] if len(found) == 1 else xp.concat(found)


def _ratio(xp: Any, mean: Array, m2: Array, out: Array | None = None, spare: Array | None = None) -> Array:
    """The ratio x = ḡ²/M₂; the type's largest number where that is not finite or M₂ is not."""
    largest = float(xp.finfo(mean.dtype).max)
    with _quiet(xp):
        ratio = _into(out, xp.divide, mean, m2)
        ratio = _into(out, xp.multiply, ratio, mean)  # in this order it leaves the range only where the answer does
        nothing = _into(spare, xp.multiply, m2, 0.0)  # NaN where M₂ is infinite, which must not pass for a ratio of 0
        ratio = _into(out, xp.add, ratio, nothing)
    return _into(out, xp.nan_to_num, ratio, nan=largest, posinf=largest, neginf=largest)


def _tile_sums(xp: Any, limits: ElementLimits, mean: Array, m2: Array, out: Array | None, spare: Array | None) -> Array:
    ratio = _ratio(xp, mean, m2, out, spare)
    active = numbered(xp, xp.less, ratio, limits.resolved, spare)
    active_sum = xp.sum(active)
    ratio = _into(out, xp.multiply, ratio, active)
    ratio_sum = xp.sum(ratio)
    return xp.stack([active_sum, ratio_sum, xp.sum(numbered(xp, xp.greater, ratio, limits.significant, spare))])


def _into(out: Array | None, function: Any, *arguments: Array, **options: float) -> Array:
    """The function's result, written over ``out`` if there is one."""
    return function(*arguments, **options) if out is None else function(*arguments, out=out, **options)


def numbered(xp: Any, compare: Any, values: Array, bound: Array, out: Array | None = None) -> Array:
    """1.0 where a comparison (``xp.less``, ``xp.greater``) holds, else 0.0; NaN compares with nothing.

    In the type of the values: torch writes and reads booleans five times as slowly.
    """
    if out is None:
        if not array_api_compat.is_torch_array(values):
            return xp.astype(compare(values, bound), values.dtype)
        out = xp.empty_like(values)
    return compare(values, bound, out=out)


def _quiet(xp: Any) -> contextlib.AbstractContextManager[Any]:
    """Silence where the array is numpy's, which alone warns of 0/0: that is no mistake here."""
    return xp.errstate(all="ignore") if hasattr(xp, "errstate") else contextlib.nullcontext()


def _where(condition: Array, value: Array, otherwise: float) -> Array:
    if isinstance(condition, bool):
        return value if condition else otherwise
    return namespace(condition).where(condition, value, otherwise)
