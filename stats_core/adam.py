r"""What an optimizer of Adam's family makes of the gradient: its divisor, its step, and the geometry they span.

A reader of an optimizer's state hands over an `AdamStep` for each parameter, formed here from the raw state just
before the step, in whichever dialect the optimizer speaks (`adam_step`, `maxva_step`). `adam_sums` makes the
catalogue's columns of it.

Throughout, m and v are the averages of the gradient and of its square, :math:`\hat m` and :math:`\hat v` the same
after bias correction, η the learning rate, and :math:`P = \sqrt{\hat v} + \epsilon` the divisor.

References:
    Kingma and Ba, "Adam: a method for stochastic optimization", 2015, arXiv 1412.6980, algorithm 1.
"""

import math
from typing import Any, Literal, NamedTuple

from gradiometer.stats_core import maxva
from gradiometer.stats_core.arrays import (
    Array,
    concrete_count,
    namespace,
    positive_or_one,
    signs,
    square_sum,
    total,
    widened,
)
from gradiometer.stats_core.elements import active_elements, element_limits
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums
from gradiometer.stats_core.radam import ema_weight, rectify

__all__ = ["AdamStep", "EpsOn", "LargestOf", "adam_step", "adam_sums", "maxva_step", "nadam_mix", "nesterov_mix"]

EpsOn = Literal["corrected", "raw"]
LargestOf = Literal["raw", "corrected"]

_EQUAL = 1e-6  # of n times the sum of the squared shares: as gradiometer.stats_core.noise


class AdamStep(NamedTuple):
    r"""One parameter, and the step that an optimizer of Adam's family is about to make; arrays like the parameter.

    Attributes:
        momentum: m before the step, as the gradient points; NaN before the first step, where there is none.
            Only its sign is used. Maybe the optimizer's own array, which the step moves on. Unit: loss / parameter.
        divisor: :math:`P = \sqrt{\hat v} + \epsilon` before the step, so that this step's gradient has no part in
            it; NaN before the first step. Same unit.
        divisor_after: the same with this step's gradient: what the step is divided by. Same unit.
        step: what is taken off the parameter, :math:`\theta \leftarrow \theta - \text{step}`, without decoupled
            weight decay. Unit: parameter.
    """

    momentum: Array
    divisor: Array
    divisor_after: Array
    step: Array


def adam_step(
    first: Array,
    second: Array,
    step: Array,
    grad: Array,
    *,
    lr: Array,
    b1: Array,
    b2: Array,
    eps: Array,
    eps_root: Array = 0.0,
    eps_on: EpsOn = "corrected",
    largest: Array | None = None,
    largest_of: LargestOf = "raw",
    mix: tuple[Array, Array] | None = None,
    threshold: Array | None = None,
    inclusive: bool = False,
) -> AdamStep:
    r"""The step that Adam and its kin make of a raw state and this step's gradient.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        \text{step} = \eta \, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    The dialects, by the arguments that differ from Adam's:

    ==========================  ==============================================================
    torch Adam, AdamW           as it stands; ``amsgrad``: ``largest=max_exp_avg_sq``
    torch RAdam                 ``eps_on="raw", threshold=5``
    torch NAdam                 ``mix=nadam_mix(...)``
    optax adam, adamw           as it stands, with ``eps_root``
    optax radam                 ``threshold=5, inclusive=True``
    optax nadam                 ``mix=nesterov_mix(...)``
    optax amsgrad               ``largest=nu_max, largest_of="corrected"``
    ==========================  ==============================================================

    Args:
        first: m before the step, shape ``(*param,)``; half precision is widened.
        second: v before the step, not bias-corrected, shape ``(*param,)``.
        step: steps made so far, 0 before the first: a number, or a scalar on the device.
        grad: g as the optimizer sees it (clipped, unscaled, with coupled weight decay), shape ``(*param,)``.
        lr: η.
        b1: :math:`\beta_1`.
        b2: :math:`\beta_2`.
        eps: ε, added to the root.
        eps_root: added under the root, as optax can.
        eps_on: "corrected": to the root of :math:`\hat v`; "raw": to that of v, which makes it
            :math:`\epsilon / \sqrt{1 - \beta_2^t}`.
        largest: AMSGrad's largest second moment before the step, or None.
        largest_of: whether that is of v or of :math:`\hat v`.
        mix: the weights of :math:`m_t` and :math:`g_t` in the numerator; None for Adam's,
            :math:`1 / (1 - \beta_1^t)` and 0.
        threshold: RAdam's, as `gradiometer.stats_core.radam.rectify`; None for no rectification.
        inclusive: as `gradiometer.stats_core.radam.rectify`.

    Returns:
        The `AdamStep`.

    Raises:
        ValueError: if ``b1``, ``b2`` or ``threshold`` is a Python number out of range.

    Guarantees:
        * The divisor before a step is the divisor after the step before it.
        * Scaling every gradient and ε by c scales the divisors by c, and leaves the step alone.

    Edge cases:
        ==========================  ==================================================
        ``step == 0``               ``momentum`` and ``divisor`` are NaN
        v = 0 (dead element)        the divisor is ε; with ε = 0 the step is NaN, as the optimizer's own
        ==========================  ==================================================

    Example:
        >>> import numpy as np
        >>> zeros = np.zeros(2)
        >>> one = adam_step(zeros, zeros, 0, np.array([2.0, -3.0]), lr=0.1, b1=0.9, b2=0.999, eps=1e-8)
        >>> one.divisor_after.round(4), one.step.round(4), one.divisor
        (array([2., 3.]), array([ 0.1, -0.1]), array([nan, nan]))

    References:
        Reddi, Kale and Kumar, "On the convergence of Adam and beyond", 2018, arXiv 1904.09237 (AMSGrad).
    """
    xp = namespace(grad)
    first, second, grad = widened(first), widened(second), widened(grad)
    number = step + 1
    before, after = _known_weight(xp, step, b2, grad), _like(xp, ema_weight(number, b2), grad)
    exists = before / before  # 1, or NaN before the first step
    new_first = first + _like(xp, 1.0 - b1, grad) * (grad - first)
    new_second = _like(xp, b2, grad) * second + _like(xp, 1.0 - b2, grad) * (grad * grad)

    def divisor_of(corrected: Array, weight: Array) -> Array:
        of_root = eps if eps_on == "corrected" else eps / weight**0.5
        return xp.sqrt(corrected if rootless else corrected + eps_root) + of_root

    eps, eps_root = _like(xp, eps, grad), _like(xp, eps_root, grad)
    rootless = isinstance(eps_root, int | float) and eps_root == 0
    if largest is None:
        corrected, new_corrected = second / before, new_second / after
    elif largest_of == "raw":
        largest = widened(largest)
        corrected, new_corrected = largest / before, xp.maximum(largest, new_second) / after
    else:
        largest = widened(largest)
        corrected, new_corrected = largest * exists, xp.maximum(largest, new_second / after)
    divisor, divisor_after = divisor_of(corrected, before), divisor_of(new_corrected, after)
    if mix is None:
        numerator = new_first / _like(xp, ema_weight(number, b1), grad)
    else:
        of_first, of_grad = (_like(xp, weight, grad) for weight in mix)
        numerator = of_first * new_first + of_grad * grad
    change = numerator / divisor_after
    if threshold is not None:
        rule = rectify(number, b2, threshold=threshold, inclusive=inclusive)
        rectified = _like(xp, rule.rectification, grad) * change
        if isinstance(rule.is_rectified, bool):
            change = rectified if rule.is_rectified else numerator
        else:
            change = xp.where(rule.is_rectified, rectified, numerator)
    return AdamStep(
        first if isinstance(exists, float) and exists == 1 else first * exists,
        divisor,
        divisor_after,
        _like(xp, lr, grad) * change,
    )


def maxva_step(
    first: Array,
    before: TemporalMoments,
    step: Array,
    grad: Array,
    within: Array = 0.0,
    *,
    lr: Array,
    b1: Array,
    eps: Array,
    eps_mode: Literal["outside", "paper"] = "outside",
    largest: Array | None = None,
    **betas: Any,
) -> AdamStep:
    r"""The step that MAdam makes: Adam's, with :math:`\hat v = s + u^2` of `gradiometer.stats_core.maxva.update`.

    Args:
        first: m before the step, shape ``(*param,)``.
        before: u, s and w before the step.
        step: steps made so far.
        grad: g as the optimizer sees it, shape ``(*param,)``.
        within: τ², as `gradiometer.stats_core.maxva.update`.
        lr: η.
        b1: :math:`\beta_1`.
        eps: ε.
        eps_mode: "outside" or "paper", as the optimizer's own argument.
        largest: with AMSGrad, the largest divisor before the step, or None.
        betas: ``beta_max``, ``beta_min``, ``beta_init`` as `gradiometer.stats_core.maxva.update`.

    Returns:
        The `AdamStep`; ``momentum`` and ``divisor`` are NaN before the first step.

    Raises:
        ValueError: if ``b1`` is a Python number out of range.

    Example:
        >>> import numpy as np
        >>> state = TemporalMoments.zeros_like(np.zeros(1))
        >>> maxva_step(np.zeros(1), state, 0, np.array([2.0]), lr=0.1, b1=0.9, eps=0.0).step.round(4)
        array([0.1])

    References:
        Zhu et al., 2020, arXiv 2006.11918, algorithm 1.
    """
    xp = namespace(grad)
    first, grad = widened(first), widened(grad)
    now, _ = maxva.update(before, grad, within, **betas)
    started = before.w > 0

    def divisor_of(state: TemporalMoments, weight: Array) -> Array:
        return xp.sqrt(state.s + state.u * state.u) + (eps if eps_mode == "outside" else eps / xp.sqrt(weight))

    divisor = divisor_of(before, xp.where(started, before.w, xp.ones_like(before.w)))
    divisor_after = divisor_of(now, now.w)
    if largest is not None:
        divisor, divisor_after = largest, xp.maximum(largest, divisor_after)
    numerator = (first + _like(xp, 1.0 - b1, grad) * (grad - first)) / _like(xp, ema_weight(step + 1, b1), grad)
    momentum, divisor = (xp.where(started, value, xp.nan) for value in (first, divisor))
    return AdamStep(momentum, divisor, divisor_after, _like(xp, lr, grad) * (numerator / divisor_after))


def nesterov_mix(step: Array, b1: Array) -> tuple[Array, Array]:
    r"""The weights of :math:`m_t` and :math:`g_t` in the numerator of optax's Nesterov forms, for `adam_step`.

    .. math:: \frac{\beta_1}{1 - \beta_1^{t+1}}, \qquad \frac{1 - \beta_1}{1 - \beta_1^t}

    Args:
        step: steps made so far.
        b1: :math:`\beta_1`.

    Example:
        >>> [round(weight, 4) for weight in nesterov_mix(0, 0.9)]
        [4.7368, 1.0]

    References:
        Dozat, "Incorporating Nesterov momentum into Adam", 2016, algorithm 2.
    """
    return b1 / ema_weight(step + 2, b1), (1.0 - b1) / ema_weight(step + 1, b1)


def nadam_mix(step: Array, b1: Array, momentum_decay: Array, product: Array) -> tuple[Array, Array]:
    r"""The weights of :math:`m_t` and :math:`g_t` in the numerator of torch's NAdam, for `adam_step`.

    .. math:: \mu_t = \beta_1 (1 - \tfrac12 \cdot .96^{t \psi}), \qquad
        \frac{\mu_{t+1}}{1 - \prod_{i \le t + 1} \mu_i}, \qquad \frac{1 - \mu_t}{1 - \prod_{i \le t} \mu_i}

    Args:
        step: steps made so far.
        b1: :math:`\beta_1`.
        momentum_decay: ψ.
        product: :math:`\prod \mu_i` of the steps made so far; 1 before the first.

    Example:
        >>> [round(weight, 4) for weight in nadam_mix(0, 0.9, 0.004, 1.0)]
        [0.5645, 1.0]

    References:
        Dozat, "Incorporating Nesterov momentum into Adam", 2016, section 2.
    """
    now, following = (b1 * (1.0 - 0.5 * 0.96 ** ((step + ahead) * momentum_decay)) for ahead in (1, 2))
    product = product * now
    return following / (1.0 - product * following), (1.0 - now) / (1.0 - product)


def adam_sums(adam: AdamStep, moments: Moments, scale: Array = 1.0) -> dict[str, Array]:
    r"""The catalogue's columns of Adam's geometry, for one parameter.

    With σ̂² the unbiased variance of an example's gradient, :math:`\widehat{\operatorname{Var}}(\bar g)` that of
    the batch gradient, element by element, and P the divisor *before* the step:

    .. math::
        \texttt{preconditioned\_variance} = \sum_j \hat\sigma_j^2 / P_j^2, \qquad
        \texttt{preconditioned\_grad\_sq\_norm} = \sum_j (\bar g_j^2 - \widehat{\operatorname{Var}}(\bar g_j)) / P_j^2

    Their ratio over a window is the noise scale as Adam sees it: examples at which noise and signal of the
    preconditioned gradient are equal. P after the step holds this batch's own gradient: divided by that, large
    gradients shrink themselves, and both sums are biased. Under unequal weights, the variance of
    `gradiometer.stats_core.noise.noise_sums` is shared out over the elements as M₂ is: where P is 1 everywhere the
    sums are ``variance_trace`` and ``grad_sq_norm``.

    Args:
        adam: of the step that comes.
        moments: of the same parameter and batch.
        scale: :math:`\|g\|^2 / \|\bar g\|^2`, squared norm of the gradient that the optimizer sees over that of the
            measured mean (`gradiometer.stats_core.maxva.gradient_scale`): brings the preconditioned sums to the
            units of P. The ratio of the two does not depend on it.

    Returns:
        Scalars: ``preconditioned_variance`` and ``preconditioned_grad_sq_norm`` (unbiased where the weights are equal;
        the latter may be negative), ``inverse_root`` and ``inverse_root_sq`` (of the divisor that this step is made
        with), ``inverse_root_change``, ``step_size`` and ``momentum_disagreements``.

    Guarantees:
        * Safe at gradient scales of 1e-18 and 1e18 in float32.
        * Scaling gradients, divisors and m alike leaves the preconditioned sums and the disagreements alone.

    Edge cases:
        ==============================  ==================================================================
        before the first step           all but ``inverse_root``, ``inverse_root_sq``, ``step_size`` are NaN
        fewer than two examples         the preconditioned sums are NaN, no element is active
        divisor 0 (v = 0 and ε = 0)     inf or NaN in the sums that divide by it
        one of m and ḡ is exactly 0     half a disagreement: a random sign is wrong half of the time
        inactive element                no disagreement; active as in `elements.element_sums`
        ==============================  ==================================================================

    Example:
        >>> import numpy as np
        >>> moments = Moments.from_per_example(np.array([[1.0, 0.0], [3.0, 4.0]]))      # σ̂² = (2, 8), mean (2, 2)
        >>> adam = AdamStep(np.array([-1.0, 1.0]), np.array([1.0, 2.0]), np.array([1.0, 4.0]), np.array([0.1, -0.3]))
        >>> for name, value in adam_sums(adam, moments).items():
        ...     print(f"{name} {float(value):.4f}")
        preconditioned_variance 4.0000
        preconditioned_grad_sq_norm 3.0000
        inverse_root 0.6250
        inverse_root_sq 0.5312
        inverse_root_change 0.1250
        step_size 0.2000
        momentum_disagreements 1.0000

    References:
        Qiao et al., "Pollux: co-adaptive cluster scheduling for goodput-optimized deep learning", 2021, section 3.1.
    """
    xp = namespace(adam.divisor)
    elements = max(1, math.prod(adam.divisor.shape))
    inverse, after = 1.0 / adam.divisor, 1.0 / adam.divisor_after
    spread = total(moments.m2 * inverse * inverse) / positive_or_one(moments.weight_sum)
    of_mean = spread * _mean_over_full(moments)  # one number for all elements: outside of the sum
    peak = positive_or_one(xp.max(after)) if math.prod(after.shape) else 1.0
    two_examples = _nan_below_two(moments.count)
    active = active_elements(moments.mean, moments.m2, element_limits(moments))
    apart = xp.abs(signs(adam.momentum) - signs(xp.where(active > 0, moments.mean, xp.zeros_like(moments.mean))))
    disagreements = 0.5 * total(active * apart)
    return {
        "preconditioned_variance": (spread + of_mean) * two_examples * scale,
        "preconditioned_grad_sq_norm": (square_sum(moments.mean * inverse) - of_mean) * two_examples * scale,
        "inverse_root": total(after) / elements,
        "inverse_root_sq": (square_sum(after / peak) / elements) * peak * peak,
        "inverse_root_change": total(xp.abs(after - inverse)) / elements,
        "step_size": total(xp.abs(adam.step)) / elements,
        "momentum_disagreements": xp.where(xp.any(xp.isnan(adam.momentum)), xp.nan, disagreements),
    }


def _mean_over_full(moments: Moments) -> Array:
    """Variance of the weighted mean over M₂/W, both summed over elements; the first may be negative by chance."""
    share = moments.weight_sq_sum / positive_or_one(moments.weight_sum * moments.weight_sum)  # s₂
    plain = share / positive_or_one(1.0 - share)
    equal = abs(share * moments.count - 1.0) < _EQUAL
    if isinstance(equal, bool) and equal:
        return plain
    xp = namespace(moments.mean)
    trace = total(moments.m2) / moments.weight_sum
    ratio = noise_sums(moments).batch_variance / positive_or_one(trace)
    return xp.where(xp.isfinite(ratio) & (trace > 0) & ~equal, ratio, plain)


def _known_weight(xp: Any, step: Array, beta: Array, grad: Array) -> Array:
    """1 - βᵗ, or NaN where no step was made yet."""
    if isinstance(step, int | float):
        return _like(xp, ema_weight(step, beta), grad) if step > 0 else math.nan
    return _like(xp, xp.where(step > 0, ema_weight(step, beta), xp.nan), grad)


def _like(xp: Any, value: Array, grad: Array) -> Array:
    """A scalar, in the gradient's type where it is an array."""
    return value if isinstance(value, int | float) else xp.astype(value, grad.dtype)


def _nan_below_two(count: Array) -> Array:
    known = concrete_count(count)
    if known is not None:
        return 1.0 if known > 1 else math.nan
    xp = namespace(count)
    return xp.where(count > 1, 1.0, xp.nan)
