import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.batch_rules import (
    adascale_gain,
    cabs_batch,
    diversity_batch,
    norm_test_batch,
    pollux_efficiency,
    predicted_gain,
    trade_off,
)
from gradiometer.stats_core.catalog import statistic
from gradiometer.stats_core.derived import FORMULAS
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}
POSITIVE = st.floats(1e-6, 1e6)
BATCHES = st.integers(1, 10**6)


def loop_noise(grads: np.ndarray) -> tuple[float, float, float, float]:
    """tr Σ, |G|², ‖ḡ‖² and m₂ by the definitions, one example at a time."""
    n = len(grads)
    mean = sum(grads) / n
    trace = sum(math.fsum((g - mean) ** 2) for g in grads) / (n - 1)
    sq_norm = math.fsum(mean**2)
    return trace, sq_norm - trace / n, sq_norm, sum(math.fsum(g**2) for g in grads) / n


def test_the_rules_on_sums_are_the_papers_formulas_on_the_examples() -> None:
    grads = np.random.default_rng(1).standard_normal((12, 5)) + 1.0
    sums = noise_sums(Moments.from_per_example(grads))
    trace, signal, sq_norm, m2 = loop_noise(grads)
    t = trace / 12  # the variance of the scale-1 batch gradient
    assert adascale_gain(sums.variance_trace, sums.grad_sq_norm, 12, 3) == pytest.approx(
        (t + signal) / (t / 3 + signal)
    )
    scale = sums.variance_trace / sums.grad_sq_norm
    assert pollux_efficiency(scale, 36, 12) == pytest.approx((trace / signal + 12) / (trace / signal + 36))
    assert norm_test_batch(sums.variance_trace, sums.mean_sq_norm, 0.9) == pytest.approx(trace / (0.81 * sq_norm))
    assert cabs_batch(0.1, sums.variance_trace, 2.5, 0.5) == pytest.approx(0.1 * trace / 2.0)
    assert diversity_batch(sums.sq_norm_mean, sums.grad_sq_norm, 0.5) == pytest.approx(1 + 0.5 * m2 / signal)
    assert predicted_gain(scale, 12) == pytest.approx(signal / (signal + trace / 12))


@given(POSITIVE, POSITIVE, BATCHES, st.floats(1, 1000))
def test_the_gain_is_between_1_and_the_scale(trace: float, signal: float, batch: int, scale: float) -> None:
    assert 1 - 1e-12 <= adascale_gain(trace, signal, batch, scale) <= scale * (1 + 1e-12)
    assert adascale_gain(trace, signal, batch, 1) == pytest.approx(1.0)
    assert adascale_gain(trace, 0.0, batch, scale) == pytest.approx(scale)  # pure noise
    assert adascale_gain(0.0, signal, batch, scale) == 1.0  # no noise


@given(POSITIVE, POSITIVE, BATCHES, st.floats(1, 1000))
def test_the_gain_is_the_scale_times_polluxs_efficiency(trace: float, signal: float, batch: int, scale: float) -> None:
    efficiency = pollux_efficiency(trace / signal, scale * batch, batch)
    assert adascale_gain(trace, signal, batch, scale) == pytest.approx(scale * efficiency, rel=1e-9)


@given(POSITIVE, st.floats(-10, 10), BATCHES)
def test_the_catalogues_doubling_gain_is_that_of_twice_the_batch(trace: float, signal: float, batch: int) -> None:
    doubled = FORMULAS["doubling_gain"](np.array([trace / batch]), np.array([signal]))
    assert doubled == pytest.approx(adascale_gain(trace, signal, batch, 2), rel=1e-12)
    assert statistic("doubling_gain").columns == ("batch_variance", "grad_sq_norm")


@given(POSITIVE, BATCHES, BATCHES)
def test_efficiency_is_1_at_the_reference_and_falls_as_the_batch_grows(
    scale: float, batch: int, reference: int
) -> None:
    found = pollux_efficiency(scale, batch, reference)
    assert pollux_efficiency(scale, reference, reference) == 1.0
    assert (found <= 1.0) == (batch >= reference)
    assert pollux_efficiency(scale, batch + 1, reference) < found
    assert (
        pollux_efficiency(0.0, batch, reference) == reference / batch
    )  # no noise: every batch makes the same progress
    assert pollux_efficiency(math.inf, batch, reference) == 1.0  # all noise: progress goes with the examples


@given(POSITIVE, POSITIVE, st.integers(2, 10**6))
def test_a_batch_passes_the_norm_test_that_its_own_statistic_says(trace: float, sq_norm: float, batch: int) -> None:
    theta = FORMULAS["norm_test"](np.array([trace / batch]), np.array([sq_norm]))[0]
    assert norm_test_batch(trace, sq_norm, float(theta)) == pytest.approx(batch, rel=1e-9)


def test_the_norm_test_saturates_in_pure_noise_where_the_unbiased_norm_does_not() -> None:
    # 64 examples of 512 elements around 0: ‖ḡ‖² is tr/64 (sd 6 % of it), so the test says 64/θ². Bound 4 sd: 6e-5.
    sums = noise_sums(Moments.from_per_example(np.random.default_rng(0).standard_normal((64, 512))))
    assert norm_test_batch(sums.variance_trace, sums.mean_sq_norm, 0.5) == pytest.approx(4 * 64, rel=0.26)
    unbiased = norm_test_batch(sums.variance_trace, sums.grad_sq_norm, 0.5)
    assert np.isnan(unbiased) or unbiased > 4 * 4 * 64


@given(POSITIVE, POSITIVE, POSITIVE, POSITIVE)
def test_cabs_follows_its_factors_and_the_distance_to_the_floor(
    rate: float, trace: float, loss: float, factor: float
) -> None:
    base = cabs_batch(rate, trace, loss)
    assert cabs_batch(factor * rate, trace, loss) == pytest.approx(factor * base)
    assert cabs_batch(rate, trace, loss + 3.0, floor=3.0) == pytest.approx(base, rel=1e-8)
    # A loss in other units: L goes with c, gradients too, the same steps need a learning rate of η/c.
    assert cabs_batch(rate / factor, factor**2 * trace, factor * loss) == pytest.approx(base)


@given(POSITIVE, POSITIVE)
def test_diversity_asks_for_one_more_than_the_noise_scale_and_one(trace: float, signal: float) -> None:
    assert diversity_batch(signal + trace, signal) == pytest.approx(trace / signal + 2.0)


@given(POSITIVE, BATCHES)
def test_time_and_examples_are_traded_on_a_hyperbola(scale: float, batch: int) -> None:
    found = trade_off(scale, batch)
    assert (found.steps - 1) * (found.examples - 1) == pytest.approx(1.0, rel=1e-3)  # 1 + 1e-12 keeps four digits
    assert found.examples / found.steps == pytest.approx(batch / scale)
    assert predicted_gain(scale, batch) == pytest.approx(1 / found.steps)
    assert trade_off(float(batch), batch) == (2.0, 2.0)
    assert predicted_gain(float(batch), batch) == 0.5


def test_the_predicted_gain_is_that_of_sgd_on_a_quadratic() -> None:
    # L = ½‖θ‖²: a step ε along g of mean G = θ and variance tr/B changes it by -ε|G|² + ½ε²(|G|² + tr/B) on average.
    signal, trace, batch = 2.0, 30.0, 5
    rates = np.linspace(0, 1, 100_001)
    fall = rates * signal - 0.5 * rates**2 * (signal + trace / batch)
    assert fall.max() / (signal / 2) == pytest.approx(predicted_gain(trace / signal, batch), rel=1e-8)
    assert rates[fall.argmax()] == pytest.approx(predicted_gain(trace / signal, batch), abs=1e-5)


def test_what_all_noise_and_no_noise_give() -> None:
    assert predicted_gain(0.0, 8) == 1.0
    assert predicted_gain(math.inf, 8) == 0.0
    assert trade_off(0.0, 8) == (1.0, math.inf)
    assert trade_off(math.inf, 8) == (math.inf, 1.0)


def test_what_is_not_resolved_is_nan_and_never_a_batch() -> None:
    for found in (
        pollux_efficiency(-3.0, 8, 4),
        predicted_gain(-3.0, 8),
        predicted_gain(-8.0, 8),  # 1 - 1
        *trade_off(-3.0, 8),
        norm_test_batch(1.0, 0.0, 0.5),
        norm_test_batch(1.0, -1.0, 0.5),
        diversity_batch(1.0, 0.0),
        diversity_batch(1.0, -1.0),
        cabs_batch(0.1, 1.0, 0.0),
        cabs_batch(0.1, 1.0, 0.5, floor=1.0),
        adascale_gain(0.0, 0.0, 8, 2),
        adascale_gain(1.0, math.nan, 8, 2),
        pollux_efficiency(math.nan, 8, 4),
    ):
        assert math.isnan(found)


def test_a_sum_below_0_counts_as_0_in_the_gain() -> None:
    assert adascale_gain(1.0, -5.0, 8, 4) == 4.0
    assert adascale_gain(-1.0, 5.0, 8, 4) == 1.0


RULES: dict[str, Callable[..., object]] = {
    "adascale_gain": lambda trace, signal: adascale_gain(trace, signal, 8, 4),
    "pollux_efficiency": lambda trace, signal: pollux_efficiency(trace, 8, 4),
    "norm_test_batch": lambda trace, signal: norm_test_batch(trace, signal, 0.5),
    "cabs_batch": lambda trace, signal: cabs_batch(0.5, trace, 2.0),
    "diversity_batch": lambda trace, signal: diversity_batch(trace, signal, 2.0),
    "predicted_gain": lambda trace, signal: predicted_gain(trace, 8),
    "steps": lambda trace, signal: trade_off(trace, 8).steps,
    "examples": lambda trace, signal: trade_off(trace, 8).examples,
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", RULES)
def test_arrays_of_every_framework_give_what_numbers_give(framework: str, name: str) -> None:
    pairs = [(4.0, 2.0), (0.0, 1.0), (0.0, 0.0), (-1.0, 2.0), (3.0, -1.0), (math.inf, 1.0), (math.nan, 1.0)]
    if name not in ("pollux_efficiency", "predicted_gain", "steps", "examples"):
        pairs.remove((math.inf, 1.0))  # only a noise scale may be infinite
    make, rule = FRAMEWORKS[framework], RULES[name]
    traces, signals = (make(np.array(values)) for values in zip(*pairs, strict=True))
    want = [rule(*pair) for pair in pairs]
    for function in (rule, jax.jit(rule)) if framework == "jax" else (rule,):
        assert np.asarray(function(traces, signals)) == pytest.approx(want, rel=1e-6, nan_ok=True)


def test_a_batch_that_is_none_is_refused() -> None:
    for call in (
        lambda: adascale_gain(1.0, 1.0, 0, 2),
        lambda: pollux_efficiency(1.0, 0, 2),
        lambda: predicted_gain(1.0, 0),
        lambda: trade_off(1.0, 0),
    ):
        with pytest.raises(ValueError, match=r"needs batch above 0, got batch=0; pass a positive number"):
            call()
    with pytest.raises(ValueError, match=r"adascale_gain needs scale above 0, got scale=-1"):
        adascale_gain(1.0, 1.0, 8, -1.0)
    with pytest.raises(ValueError, match=r"norm_test_batch needs theta above 0, got theta=nan"):
        norm_test_batch(1.0, 1.0, math.nan)
    with pytest.raises(ValueError, match=r"diversity_batch needs delta above 0, got delta=0"):
        diversity_batch(1.0, 1.0, 0.0)
