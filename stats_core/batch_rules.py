r"""What a batch size is good for: published rules, on sums of `gradiometer.stats_core.noise` over a window of steps.

None of them changes a job; each answers one question under assumptions that its docstring names. They take numbers or
arrays of any framework (one for each layer, say), and sums averaged over a window: a ratio of one step's sums says
little. Where a rule has no answer it is NaN. Batch sizes are in examples.
"""

import math
from typing import Any, NamedTuple

from gradiometer.stats_core.arrays import Array, namespace

__all__ = [
    "TradeOff",
    "adascale_gain",
    "cabs_batch",
    "diversity_batch",
    "norm_test_batch",
    "pollux_efficiency",
    "predicted_gain",
    "trade_off",
]


def adascale_gain(variance_trace: Array, grad_sq_norm: Array, batch: Array, scale: Array) -> Array:
    r"""AdaScale's gain: how many steps with ``batch`` one step with ``scale`` times as many examples is worth.

    .. math:: r = \frac{t + \mu}{t / S + \mu}, \qquad t = \operatorname{tr} \Sigma / B_0, \quad \mu = |G|^2

    AdaScale multiplies the learning rate by r and counts a step as r steps of its schedule.

    Args:
        variance_trace: :math:`\widehat{\operatorname{tr}} \Sigma`. Unit: (loss / parameter)².
        grad_sq_norm: :math:`|\hat G|^2`, same unit.
        batch: :math:`B_0`, the batch that the learning rate was tuned for.
        scale: S, by how much the batch is larger.

    Returns:
        r between 1 and S. An estimate below 0, of either sum, counts as 0.

    Raises:
        ValueError: if ``batch`` or ``scale`` is a number and not positive.

    Guarantees:
        * S = 1 gives 1; pure noise gives S; no noise gives 1.
        * It is ``scale`` times `pollux_efficiency` of the larger batch.

    Edge cases:
        ===================================  =====
        neither noise nor gradient           NaN
        ===================================  =====

    Assumes SGD, whose step goes with the learning rate, and independent examples. The catalogue's ``doubling_gain`` is
    this at S = 2 from the batch as it is.

    Example:
        >>> adascale_gain(variance_trace=32.0, grad_sq_norm=1.0, batch=16, scale=4)      # (2 + 1)/(2/4 + 1)
        2.0

    References:
        Johnson, Agrawal, Gu and Guestrin, "AdaScale SGD: a user-friendly algorithm for distributed training", ICML
        2020, section 3.
    """
    _positive("adascale_gain", batch=batch, scale=scale)
    noise = _at_least_0(variance_trace) / batch
    signal = _at_least_0(grad_sq_norm)
    return _divided(noise + signal, noise / scale + signal)


def pollux_efficiency(noise_scale: Array, batch: Array, reference_batch: Array) -> Array:
    r"""Pollux's statistical efficiency: progress that an example makes, relative to one in the reference batch.

    .. math:: \frac{\varphi + M_0}{\varphi + M}

    Times the examples a second it is Pollux's goodput.

    Args:
        noise_scale: :math:`\varphi`, in examples: ``noise_scale``, or ``preconditioned_noise_scale`` under Adam.
            Infinite where all is noise.
        batch: M.
        reference_batch: :math:`M_0`.

    Returns:
        A share; 1 at the reference, above 1 for smaller batches. NaN where the noise scale is negative: not resolved.

    Raises:
        ValueError: if a batch is a number and not positive.

    Assumes learning rates scaled as by AdaScale, and a noise scale that the batch size does not change.

    Example:
        >>> pollux_efficiency(noise_scale=100.0, batch=300, reference_batch=100)
        0.5

    References:
        Qiao et al., "Pollux: co-adaptive cluster scheduling for goodput-optimized deep learning", OSDI 2021,
        section 3.1.
    """
    _positive("pollux_efficiency", batch=batch, reference_batch=reference_batch)
    finite = noise_scale < math.inf
    known = _where(finite, noise_scale, 1.0)
    return _resolved(noise_scale, _where(finite, (known + reference_batch) / (known + batch), 1.0))


def norm_test_batch(variance_trace: Array, mean_sq_norm: Array, theta: float) -> Array:
    r"""The batch that passes the norm test: the standard error of the gradient is θ of its norm.

    .. math:: B = \frac{\operatorname{tr} \Sigma}{\theta^2 \|\bar g\|^2}

    Args:
        variance_trace: :math:`\widehat{\operatorname{tr}} \Sigma`. Unit: (loss / parameter)².
        mean_sq_norm: :math:`\|\bar g\|^2` of the batch, as the test has it, or the unbiased ``grad_sq_norm``.
        theta: θ, below 1 for a descent direction.

    Returns:
        Examples, not rounded. NaN where ``mean_sq_norm`` is not positive.

    Raises:
        ValueError: if ``theta`` is not positive.

    The norm of a batch of n holds its own noise, so that the test never asks for more than about n/θ²: where that is
    what it says, all may be noise. With ``grad_sq_norm`` it has no such limit.

    Example:
        >>> norm_test_batch(variance_trace=64.0, mean_sq_norm=1.0, theta=0.5)
        256.0

    References:
        Byrd, Chin, Nocedal and Wu, "Sample size selection in optimization methods for machine learning", Mathematical
        Programming 134, 2012, section 3.
    """
    _positive("norm_test_batch", theta=theta)
    return _divided(variance_trace, theta * theta * mean_sq_norm)


def cabs_batch(learning_rate: Array, variance_trace: Array, loss: Array, floor: float = 0.0) -> Array:
    r"""CABS: the batch that suits a learning rate, from the variance and from how far the loss may still fall.

    .. math:: B = \eta \frac{\operatorname{tr} \Sigma}{L - L_0}

    Args:
        learning_rate: η, of SGD without momentum.
        variance_trace: :math:`\widehat{\operatorname{tr}} \Sigma`. Unit: (loss / parameter)².
        loss: L, of the batch, smoothed.
        floor: :math:`L_0`, the lowest loss that can be reached.

    Returns:
        Examples, not rounded. NaN where the loss is not above the floor.

    Assumes SGD without momentum and a floor that is known: near it the result grows without bound. It is not free of
    units: a loss that is multiplied by c and a learning rate divided by c leave it as it is, nothing else does.

    Example:
        >>> cabs_batch(learning_rate=0.1, variance_trace=320.0, loss=2.0)
        16.0

    References:
        Balles, Romero and Hennig, "Coupling adaptive batch sizes with learning rates", UAI 2017, arXiv 1612.05086.
    """
    return _divided(learning_rate * variance_trace, loss - floor)


def diversity_batch(sq_norm_mean: Array, grad_sq_norm: Array, delta: float = 1.0) -> Array:
    r"""The largest batch in which an example still makes 1/(1 + δ) of the progress it makes alone.

    .. math:: B = 1 + \delta \frac{m_2}{|G|^2}

    Gradient diversity times the size of the data set is :math:`m_2 / |G|^2`, one more than the noise scale.

    Args:
        sq_norm_mean: :math:`m_2 = \sum w_i \|g_i\|^2`. Unit: (loss / parameter)².
        grad_sq_norm: :math:`|\hat G|^2`, same unit: the norm of the batch gradient would hold its noise.
        delta: δ.

    Returns:
        Examples, not rounded. NaN where ``grad_sq_norm`` is not positive: no limit was found.

    Raises:
        ValueError: if ``delta`` is not positive.

    A bound for SGD at one learning rate for all batch sizes, on smooth losses that are convex or nearly so; an order of
    magnitude elsewhere.

    Example:
        >>> diversity_batch(sq_norm_mean=50.0, grad_sq_norm=0.5)
        101.0

    References:
        Yin et al., "Gradient diversity: a key ingredient for scalable distributed learning", AISTATS 2018, arXiv
        1706.05699.
    """
    _positive("diversity_batch", delta=delta)
    return 1.0 + delta * _divided(sq_norm_mean, grad_sq_norm)


def predicted_gain(noise_scale: Array, batch: Array) -> Array:
    r"""By how much one step lowers the loss, relative to a step along the true gradient, each of its best length.

    .. math:: \frac{\Delta L(B)}{\Delta L_\text{max}} = \frac{\epsilon_\text{opt}(B)}{\epsilon_\text{max}}
              = \frac{1}{1 + \mathcal B / B}

    The best learning rates have the same ratio.

    Args:
        noise_scale: :math:`\mathcal B`, in examples; infinite where all is noise.
        batch: B.

    Returns:
        A share between 0 and 1: a half where the batch is the noise scale. NaN where the noise scale is negative: not
        resolved.

    Raises:
        ValueError: if ``batch`` is a number and not positive.

    Assumes a quadratic loss. It is exact with the noise scale weighted by curvature; ``noise_scale`` is that one where
    the curvature is the same in all directions.

    Example:
        >>> predicted_gain(noise_scale=300.0, batch=100)
        0.25

    References:
        McCandlish et al., "An empirical model of large-batch training", 2018, arXiv 1812.06162, section 2.2.
    """
    _positive("predicted_gain", batch=batch)
    return _resolved(noise_scale, 1.0 / (1.0 + _where(noise_scale >= 0, noise_scale, 0.0) / batch))


class TradeOff(NamedTuple):
    """What a target loss costs at some batch size.

    Attributes:
        steps: optimizer steps, in units of the fewest that any batch needs.
        examples: examples processed, in units of the fewest that any batch needs.
    """

    steps: Array
    examples: Array


def trade_off(noise_scale: Array, batch: Array) -> TradeOff:
    r"""Time against compute: the steps and the examples to a target loss, each over the least there is.

    .. math::
        \left(\frac{S}{S_\text{min}} - 1\right) \left(\frac{E}{E_\text{min}} - 1\right) = 1, \qquad
        \frac{S}{S_\text{min}} = 1 + \frac{\mathcal B}{B}, \quad \frac{E}{E_\text{min}} = 1 + \frac{B}{\mathcal B}

    At the noise scale both are 2: twice the least time for twice the least compute.

    Args:
        noise_scale: :math:`\mathcal B`, averaged over the training, in examples; infinite where all is noise.
        batch: B.

    Returns:
        Both ratios, 1 or more. NaN where the noise scale is negative: not resolved.

    Raises:
        ValueError: if ``batch`` is a number and not positive.

    Assumes what `predicted_gain` does, a learning rate tuned for each batch size, and a noise scale that changes little
    on the way; it grows as the loss falls, so a whole training's is read from its last part.

    Example:
        >>> trade_off(noise_scale=300.0, batch=100)
        TradeOff(steps=4.0, examples=1.3333333333333333)

    References:
        McCandlish et al., "An empirical model of large-batch training", 2018, arXiv 1812.06162, section 2.3 and
        appendix D.
    """
    _positive("trade_off", batch=batch)
    positive = noise_scale > 0
    examples = _where(positive, 1.0 + batch / _where(positive, noise_scale, 1.0), math.inf)
    return TradeOff(_resolved(noise_scale, 1.0 + noise_scale / batch), _resolved(noise_scale, examples))


def _positive(who: str, **values: Array) -> None:
    for name, value in values.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{who} needs {name} above 0, got {name}={value:g}; pass a positive number")


def _where(condition: Array, value: Array, other: Array) -> Any:
    if isinstance(condition, bool):
        return value if condition else other
    return namespace(condition).where(condition, value, other)


def _at_least_0(value: Array) -> Array:
    return _where(value < 0, 0.0 * value, value)


def _resolved(noise_scale: Array, value: Array) -> Array:
    return _where(noise_scale >= 0, value, math.nan)


def _divided(top: Array, bottom: Array) -> Array:
    """The quotient, NaN where the divisor is not positive."""
    positive = bottom > 0
    return _where(positive, top / _where(positive, bottom, 1.0), math.nan)
