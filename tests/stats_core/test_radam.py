import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.radam import (
    ema_weight,
    kish_steps,
    never_adaptive,
    radam_length,
    rate_variance,
    rectify,
)

betas = st.floats(0.0, 0.99999)
steps = st.integers(1, 3000)


def loop_ages(step: int, beta: float) -> tuple[Fraction, Fraction]:
    """Mean age of the weights of a moving average, and Kish's number of them, one weight at a time and exact."""
    b = Fraction(beta)
    weights = [b**age for age in range(step)]
    mean_age = sum(age * weight for age, weight in enumerate(weights)) / sum(weights)
    return mean_age, sum(weights) ** 2 / sum(weight * weight for weight in weights)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_lengths_are_those_of_the_weights_counted_one_by_one(beta: float) -> None:
    # radam_length subtracts numbers of the size 1/(1-beta) or 1/0.3 of its result, whichever is closer: 1e-13.
    for step in (1, 2, 5, 6, 40):
        mean_age, kish = loop_ages(step, beta)
        assert radam_length(step, beta) == pytest.approx(float(1 + 2 * mean_age), rel=1e-13)
        assert kish_steps(step, beta) == pytest.approx(float(kish), rel=1e-13)
        assert ema_weight(step, beta) == pytest.approx(float(1 - Fraction(beta) ** step), rel=1e-13)


@pytest.mark.parametrize(
    ("beta2", "rectifications", "first_steps"),
    [
        (0.9, [0.1561, 0.2552, 0.4927, 0.9998, 1.0, 1.0], [11, 31, 58]),
        (0.99, [0.0545, 0.0817, 0.1552, 0.6341, 0.9998, 1.0], [61, 277, 567]),
        (0.999, [0.0173, 0.0258, 0.0490, 0.2153, 0.6453, 0.9998], [556, 2737, 5654]),
    ],
)
def test_the_published_table_of_rectifications(
    beta2: float, rectifications: list[float], first_steps: list[int]
) -> None:
    table = [rectify(t, beta2, threshold=4.0).rectification for t in (5, 6, 10, 100, 1000, 10_000)]
    assert [round(r, 4) for r in table] == rectifications
    run = [rectify(t, beta2).rectification for t in range(1, 6000)]
    assert [next(t for t, r in enumerate(run, 1) if r >= goal) for goal in (0.5, 0.9, 0.99)] == first_steps


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999, 0.9999])
def test_the_first_adaptive_step_is_the_fifth_in_the_paper_and_the_sixth_in_torch_and_optax(beta2: float) -> None:
    def first(**rule: float) -> int:
        return next(t for t in range(1, 100) if rectify(t, beta2, **rule).is_rectified)

    assert (first(threshold=4.0), first(), first(inclusive=True)) == (5, 6, 6)


@given(betas, steps)
def test_the_length_rises_from_one_to_its_end(beta2: float, step: int) -> None:
    end = 2.0 / (1.0 - beta2) - 1.0
    now, later = radam_length(step, beta2), radam_length(step + 1, beta2)
    assert radam_length(1, beta2) == 1.0
    # Three roundings of numbers of the size of the end.
    assert now <= later + 1e-15 * end
    assert now <= min(step, end) * (1 + 1e-12) + 1e-15 * end
    assert kish_steps(step, beta2) <= min(step, end) * (1 + 1e-12) + 1e-15 * end


@given(betas, steps, st.sampled_from([4.0, 5.0]))
def test_rectifications_rise_from_zero_to_one(beta2: float, step: int, threshold: float) -> None:
    now, later = rectify(step, beta2, threshold=threshold), rectify(step + 1, beta2, threshold=threshold)
    assert 0.0 <= now.rectification <= later.rectification + 1e-9
    assert later.rectification <= 1 + 1e-9
    assert now.multiplier == pytest.approx(now.rectification * math.sqrt(ema_weight(step, beta2)))
    assert now.is_rectified == (now.rectification > 0) == (now.length > threshold)


@pytest.mark.parametrize(("threshold", "largest"), [(5.0, 2 / 3), (4.0, 0.6)])
def test_up_to_a_coefficient_radam_never_adapts_and_above_it_it_does(threshold: float, largest: float) -> None:
    assert never_adaptive(largest, threshold)
    assert not any(rectify(t, largest - 1e-6, threshold=threshold).is_rectified for t in range(1, 2000))
    assert not never_adaptive(largest + 1e-6, threshold)
    assert rectify(2000, largest + 1e-6, threshold=threshold).is_rectified


def test_at_ten_thousand_steps_radam_is_adam_to_two_parts_in_ten_thousand() -> None:
    assert 1 - rectify(10_000, 0.999).rectification == pytest.approx(2e-4, abs=0.5e-4)


def raw_updates(grads: np.ndarray, b1: float, b2: float) -> list[tuple[int, np.ndarray, np.ndarray]]:
    m, v, found = np.zeros(grads.shape[1]), np.zeros(grads.shape[1]), []
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        found.append((t, m / (1 - b1**t), v))
    return found


@pytest.mark.parametrize("b2", [0.6, 0.9, 0.999])
def test_torch_s_radam_is_rebuilt_from_the_formula(b2: float) -> None:
    grads = np.random.default_rng(0).standard_normal((40, 6))
    parameter = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = torch.optim.RAdam([parameter], lr=1e-2, betas=(0.9, b2), eps=1e-8)
    want = np.zeros(6)
    for t, m_hat, v in raw_updates(grads, 0.9, b2):
        parameter.grad = torch.as_tensor(grads[t - 1])
        optimizer.step()
        rule = rectify(t, b2)
        want -= 1e-2 * m_hat * (rule.multiplier / (np.sqrt(v) + 1e-8) if rule.is_rectified else 1.0)
        assert np.abs(parameter.detach().numpy() - want).max() <= 1e-13


@pytest.mark.parametrize("b2", [0.6, 0.9, 0.999])
def test_optax_s_radam_is_rebuilt_from_the_formula(b2: float) -> None:
    grads = np.random.default_rng(0).standard_normal((40, 6))
    with jax.enable_x64(True):
        optimizer = optax.radam(1e-2, b2=b2)
        state = optimizer.init(jnp.zeros(6))
        for t, m_hat, v in raw_updates(grads, 0.9, b2):
            update, state = optimizer.update(jnp.asarray(grads[t - 1]), state)
            rule = rectify(t, b2, inclusive=True)
            v_hat = v / (1 - b2**t)
            want = -1e-2 * m_hat * (rule.rectification / (np.sqrt(v_hat) + 1e-8) if rule.is_rectified else 1.0)
            assert np.abs(np.asarray(update) - want).max() <= 1e-13


def chi_moment(length: float, power: float) -> float:
    """E v^power of the mean v of ``length`` squares of normals, by the trapezoidal rule in log v."""
    y = np.linspace(-60, 12, 200_001)
    log_density = length / 2 * (y + np.log(length / 2)) - np.exp(y) * length / 2 - math.lgamma(length / 2)
    return float(np.exp(log_density + power * y).sum() * (y[1] - y[0]))


@pytest.mark.parametrize(("length", "known"), [(5, 0.25196), (6, 0.1746), (10, 0.07555), (20, 0.0304), (100, 0.00519)])
def test_the_variance_of_the_adaptive_rate_is_that_of_the_integral(length: float, known: float) -> None:
    assert rate_variance(length) == pytest.approx(known, rel=2e-3)
    # The integrand is smooth and vanishes at both ends: the rule's error is rounding, magnified by the subtraction.
    want = chi_moment(length, -1) - chi_moment(length, -0.5) ** 2
    assert rate_variance(length) == pytest.approx(want, rel=1e-9)


def test_the_variance_of_the_adaptive_rate_is_that_of_drawn_noise() -> None:
    rates = np.random.default_rng(1).chisquare(10, 400_000) / 10
    rates = rates**-0.5
    squares = (rates - rates.mean()) ** 2
    # z-bound of 4 from the draws themselves: false alarm 6e-5.
    assert abs(squares.mean() - rate_variance(10)) < 4 * squares.std() / np.sqrt(len(rates))


def test_the_adaptive_rate_has_no_variance_at_two_steps_and_below() -> None:
    assert rate_variance(2.0) == rate_variance(1.0) == math.inf


@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.999, 0.9999, 0.999999])
def test_steps_on_a_device_give_the_host_s_numbers(beta2: float) -> None:
    def numbers(t: object) -> tuple[object, object, object, object, object]:
        found = rectify(t, beta2)
        return found.length, found.rectification, found.is_rectified, kish_steps(t, beta2), ema_weight(t, beta2)

    def floats(t: object) -> list[float]:
        return [float(value) for value in numbers(t)]

    traced = jax.jit(numbers)
    for step in (1, 2, 5, 6, 100, 3000):
        want = floats(step)
        assert all(isinstance(value, torch.Tensor) for value in numbers(torch.tensor(float(step))))
        with jax.numpy_dtype_promotion("strict"):
            in_jax = [float(value) for value in traced(jnp.int32(step))]
        # float32: the series loses nothing; beyond it two terms of six roundings each are up to 2/0.3 times what is
        # left of them: 80 roundings of the length. The root halves them.
        for found in (floats(torch.tensor(float(step))), in_jax):
            assert found == pytest.approx(want, rel=80 * 2**-24)
            assert found[2] == want[2]
        assert floats(torch.tensor(float(step), dtype=torch.float64)) == pytest.approx(want, rel=1e-12)


def test_a_traced_coefficient_is_taken_as_the_float_that_it_is() -> None:
    beta2 = jnp.float32(0.999)
    found = jax.jit(rectify)(jnp.int32(6), beta2)
    assert float(found.rectification) == pytest.approx(rectify(6, float(beta2)).rectification, rel=20 * 2**-24)


def test_optax_s_own_length_in_float32_loses_its_digits_and_this_one_does_not() -> None:
    end, t = 2 / (1 - 0.9999) - 1, jnp.int32(5)
    power = 0.9999**t
    assert abs(float(end - 2 * t * power / (1 - power)) - radam_length(5, 0.9999)) > 1
    assert float(radam_length(t, 0.9999)) == pytest.approx(radam_length(5, 0.9999), rel=1e-6)


@pytest.mark.parametrize("function", [ema_weight, radam_length, rectify, kish_steps])
def test_numbers_out_of_range_are_refused_with_their_range(function: object) -> None:
    with pytest.raises(ValueError, match=r"coefficient in \[0, 1\), got beta=1.0"):
        function(3, 1.0)
    with pytest.raises(ValueError, match="step of at least 1, got step=0"):
        function(0, 0.9)


def test_a_threshold_below_the_papers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold >= 4, got threshold=3\.5"):
        rectify(6, 0.999, threshold=3.5)
