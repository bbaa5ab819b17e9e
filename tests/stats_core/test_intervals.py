import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import coverage, simulation
from gradiometer.stats_core.intervals import (
    Interval,
    inverted,
    ratio_interval,
    snr_interval_of_moments,
    snr_interval_of_step,
    variance_ratio_interval,
)
from gradiometer.stats_core.moments import Moments
from tests.reference import loop_layer
from tests.strategies import gradient_batches

# --- the definition, one window and one example at a time --------------------------------------------------------


def loop_ratio_interval(numerator: list[float], denominator: list[float], block: int = 1) -> tuple[float, float]:
    """Delete-m jackknife of a ratio of sums, in exact fractions up to the root."""
    steps = range(len(numerator))
    blocks = [[k for k in steps if k // block == b] for b in range((len(numerator) + block - 1) // block)]
    blocks = [[k for k in b if math.isfinite(numerator[k]) and math.isfinite(denominator[k])] for b in blocks]
    blocks = [b for b in blocks if b]
    kept = [k for b in blocks for k in b]
    estimate = sum(Fraction(numerator[k]) for k in kept) / sum(Fraction(denominator[k]) for k in kept)
    pseudo, weights = [], []
    for b in blocks:
        others = [k for k in kept if k not in b]
        without = sum(Fraction(numerator[k]) for k in others) / sum(Fraction(denominator[k]) for k in others)
        h = Fraction(len(kept), len(b))
        pseudo.append(h * estimate - (h - 1) * without)
        weights.append(h - 1)
    mean = sum(pseudo) / len(pseudo)
    variance = sum((p - mean) ** 2 / w for p, w in zip(pseudo, weights, strict=True)) / len(pseudo)
    width = scipy.stats.t.ppf(0.975, len(blocks) - 1) * math.sqrt(variance)
    return float(estimate) - width, float(estimate) + width


def loop_variance_ratio_interval(d: list[float], p: list[float]) -> tuple[float, float]:
    present = [t for t in range(len(d)) if math.isfinite(d[t]) and math.isfinite(p[t])]
    count = len(present)
    ratio = math.fsum(d[t] for t in present) / math.fsum(p[t] for t in present)
    mean = math.fsum(p[t] for t in present) / count
    z = {t: (d[t] - ratio * p[t]) / mean for t in present}
    c0 = math.fsum(z[t] ** 2 for t in present) / count
    c1 = math.fsum(z[t] * z[t + 1] for t in present if t + 1 in z) / count
    variance = max(c0 + 2 * c1, c0) / (count - 2)
    spread = scipy.stats.t.ppf(0.975, 2 * count / 3 - 1) * math.sqrt(variance) / ratio
    return ratio * math.exp(-spread), ratio * math.exp(spread)


def loop_snr_interval(grads: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Each leave-one-out value from the gradients that are left; the upper end by bisection of its definition."""
    n = len(grads)
    raw = np.ones(n) if weights is None else weights

    def snr(kept: list[int]) -> tuple[float, float]:
        layer = loop_layer([[grads[i] for i in kept]], [raw[i] for i in kept])
        # loop_layer's trace is the sum of squares about the mean plus P; the weighted pair's is m₂ − |Ĝ|²: the same.
        trace = layer["sq_norm_mean"] - layer["grad_sq_norm"]
        if trace <= 0:  # with weights and few elements P may be far below 0
            return math.nan, math.nan
        return layer["grad_sq_norm"] / trace, layer["batch_variance"] / trace

    estimate, noise = snr(list(range(n)))
    left = [snr([k for k in range(n) if k != i])[0] for i in range(n)]
    if math.isnan(estimate + sum(left)):
        return math.nan, math.nan
    mean = math.fsum(left) / n
    h = scipy.stats.t.ppf(0.975, n - 1) * math.sqrt((n - 1) / n * math.fsum((x - mean) ** 2 for x in left))
    low, high = estimate, estimate + h
    while high - estimate < h * math.sqrt((high + noise) / (estimate + noise)):  # grow until it is past the end
        low, high = high, estimate + 2 * (high - estimate)
    for _ in range(200):
        middle = (low + high) / 2
        inside = middle - estimate < h * math.sqrt((middle + noise) / (estimate + noise))
        low, high = (middle, high) if inside else (low, middle)
    return estimate - h, high


# --- windows of steps --------------------------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Signal and noise of some steps of some layers, float32 values in float64, some absent."""
    steps, layers = draw(st.integers(12, 40)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-30, 30))
    signal = (rng.standard_normal((steps, layers)) + draw(st.sampled_from([0.0, 1.0, 10.0]))) * scale
    noise = rng.chisquare(5, (steps, layers)) * scale
    gone = rng.random((steps, layers)) < draw(st.sampled_from([0.0, 0.2]))
    gone[:10] = False
    return np.where(gone, np.nan, signal), np.where(gone & (rng.random(gone.shape) < 0.5), 1.0, noise)


@settings(max_examples=40)
@given(windows(), st.sampled_from([1, 2, 3]))
def test_the_jackknife_over_steps_agrees_with_exact_fractions(
    window: tuple[np.ndarray, np.ndarray], block: int
) -> None:
    # Sums of at most 40 numbers are within 40 ulps of the sum of their sizes; pseudo-values magnify that by K = 40.
    signal, noise = window
    found = ratio_interval(signal, noise, block=block)
    for layer in range(signal.shape[1]):
        low, high = loop_ratio_interval(list(signal[:, layer]), list(noise[:, layer]), block)
        slack = 1e-11 * (abs(low) + abs(high))
        assert found.low[layer] == pytest.approx(low, rel=0, abs=slack)
        assert found.high[layer] == pytest.approx(high, rel=0, abs=slack)


def test_with_a_constant_denominator_it_is_the_t_interval_of_the_mean() -> None:
    values = np.random.default_rng(0).standard_normal((12, 4))
    found = ratio_interval(values, np.full((12, 4), 2.0))
    width = scipy.stats.t.ppf(0.975, 11) * values.std(axis=0, ddof=1) / math.sqrt(12)
    assert found.low == pytest.approx((values.mean(axis=0) - width) / 2, rel=1e-12)
    assert found.high == pytest.approx((values.mean(axis=0) + width) / 2, rel=1e-12)


def test_blocks_of_a_constant_denominator_give_the_t_interval_of_their_means() -> None:
    values = np.random.default_rng(1).standard_normal((24, 2))
    means = values.reshape(6, 4, 2).mean(axis=1)
    found = ratio_interval(values, np.ones((24, 2)), 0.9, block=4)
    width = scipy.stats.t.ppf(0.95, 5) * means.std(axis=0, ddof=1) / math.sqrt(6)
    assert found.high - found.low == pytest.approx(2 * width, rel=1e-12)


@settings(max_examples=40)
@given(windows(), st.integers(0, 2**32 - 1))
def test_the_order_of_the_steps_does_not_matter(window: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(window[0]))
    here, there = ratio_interval(*window), ratio_interval(window[0][order], window[1][order])
    slack = 1e-11 * (np.abs(here.low) + np.abs(here.high))
    assert (np.abs(np.array(here) - np.array(there)) <= slack).all()


@settings(max_examples=40)
@given(windows())
def test_steps_that_are_not_finite_are_passed_over_for_each_layer_by_itself(
    window: tuple[np.ndarray, np.ndarray],
) -> None:
    signal, noise = window
    found = ratio_interval(signal, noise)
    for layer in range(signal.shape[1]):
        there = np.isfinite(signal[:, layer]) & np.isfinite(noise[:, layer])
        alone = ratio_interval(signal[there, layer : layer + 1], noise[there, layer : layer + 1])
        slack = 1e-11 * (abs(alone.low[0]) + abs(alone.high[0]))
        assert abs(found.low[layer] - alone.low[0]) <= slack
        assert abs(found.high[layer] - alone.high[0]) <= slack


@settings(max_examples=40)
@given(windows(), st.sampled_from([2.0, 0.25, -1.0, -8.0]))
def test_a_factor_on_the_numerators_is_one_on_both_ends(window: tuple[np.ndarray, np.ndarray], factor: float) -> None:
    here, there = ratio_interval(*window), ratio_interval(window[0] * factor, window[1])  # powers of two: exact
    low, high = (here.low, here.high) if factor > 0 else (here.high, here.low)
    np.testing.assert_array_equal(there.low, low * factor)
    np.testing.assert_array_equal(there.high, high * factor)


def test_a_lower_level_has_a_narrower_interval_inside() -> None:
    rng = np.random.default_rng(2)
    signal, noise = rng.standard_normal((9, 3)), rng.chisquare(4, (9, 3))
    wide, narrow = ratio_interval(signal, noise, 0.95), ratio_interval(signal, noise, 0.5)
    assert (wide.low < narrow.low).all()
    assert (narrow.high < wide.high).all()


def test_one_step_far_larger_than_the_others_loses_no_digits() -> None:
    # Subtracted from the sum, 1e30 would leave nothing of the others; the loop is in fractions.
    signal, noise = [1.0, 2.0, 1e30, 1.5, 2.5, 1.0], [4.0, 4.5, 2e30, 3.0, 5.0, 4.0]
    found = ratio_interval(np.array(signal)[:, None], np.array(noise)[:, None])
    assert (found.low[0], found.high[0]) == pytest.approx(loop_ratio_interval(signal, noise), rel=1e-12)


def test_below_four_steps_or_blocks_there_is_no_interval() -> None:
    signal = np.array([[1.0, 1.0], [2.0, np.inf], [4.0, 3.0], [3.0, 5.0]])
    found = ratio_interval(signal, np.ones((4, 2)))
    assert np.isfinite(found.low[0])
    assert np.isnan([found.low[1], found.high[1]]).all()
    assert np.isnan(ratio_interval(signal[:3], np.ones((3, 2)))).all()
    assert np.isnan(ratio_interval(np.ones((7, 1)), np.ones((7, 1)), block=3)).all()  # three blocks
    assert np.isnan(variance_ratio_interval(np.ones((3, 1)), np.ones((3, 1)))).all()
    assert np.isnan(ratio_interval(np.full((5, 1), np.nan), np.full((5, 1), np.nan))).all()
    assert np.isnan(variance_ratio_interval(np.full((5, 1), np.nan), np.full((5, 1), np.nan))).all()


def test_steps_of_one_and_the_same_ratio_have_an_interval_of_no_width() -> None:
    noise = np.array([[8.0], [4.0], [2.0], [16.0]])
    assert np.array(ratio_interval(noise / 2, noise)).ravel() == pytest.approx([0.5, 0.5], rel=1e-14)


def test_a_denominator_of_zero_is_nan_and_no_warning() -> None:
    assert np.isnan(ratio_interval(np.ones((5, 1)), np.zeros((5, 1)))).all()
    alone = np.array([[1.0], [0.0], [0.0], [0.0]])  # without the first step nothing is left to divide by
    assert np.isnan(ratio_interval(np.ones((4, 1)), alone)).all()
    assert np.isnan(variance_ratio_interval(np.ones((5, 1)), np.zeros((5, 1)))).all()
    assert np.isnan(variance_ratio_interval(np.zeros((5, 1)), np.ones((5, 1)))).all()


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_that_is_no_probability_is_refused(level: float) -> None:
    ones = np.ones((5, 1))
    with pytest.raises(ValueError, match=r"an interval needs 0 < level < 1, got level=.*; 0\.95 is usual"):
        ratio_interval(ones, ones, level)
    with pytest.raises(ValueError, match="0 < level < 1"):
        variance_ratio_interval(ones, ones, level)


def test_a_block_below_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio_interval needs block >= 1, got block=0; 1 is for steps that do not"):
        ratio_interval(np.ones((5, 1)), np.ones((5, 1)), block=0)


# --- the noise scale ---------------------------------------------------------------------------------------------


def test_an_interval_of_snr_is_turned_over() -> None:
    found = inverted(Interval(np.array([0.5, 0.0, -1.0, -2.0, np.nan]), np.array([2.0, 4.0, 0.5, -1.0, np.nan])))
    np.testing.assert_array_equal(found.low, [0.5, 0.25, 2.0, np.inf, np.nan])
    np.testing.assert_array_equal(found.high, [2.0, np.inf, np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(found.is_resolved, [True, False, False, False, False])


def test_numbers_are_turned_over_as_arrays_are() -> None:
    assert inverted(Interval(0.5, 2.0)) == (0.5, 2.0)
    assert inverted(Interval(-1.0, 0.5)) == (2.0, math.inf)
    assert inverted(Interval(-1.0, 0.0)) == (math.inf, math.inf)
    assert not inverted(Interval(-1.0, 0.5)).is_resolved
    assert inverted(Interval(0.5, 2.0)).is_resolved
    assert not inverted(Interval(math.nan, math.nan)).is_resolved


@given(st.floats(1e-30, 1e30), st.floats(1.0, 1e3))
def test_turning_over_twice_changes_nothing_where_it_is_resolved(low: float, factor: float) -> None:
    again = inverted(inverted(Interval(np.array([low]), np.array([low * factor]))))
    assert again.low[0] == pytest.approx(low, rel=1e-15)
    assert again.high[0] == pytest.approx(low * factor, rel=1e-15)


# --- the variance ratio ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(windows())
def test_the_interval_of_the_variance_ratio_agrees_with_the_loop(window: tuple[np.ndarray, np.ndarray]) -> None:
    d, p = np.abs(window[0]), window[1]
    found = variance_ratio_interval(d, p)
    for layer in range(d.shape[1]):
        low, high = loop_variance_ratio_interval(list(d[:, layer]), list(p[:, layer]))
        assert found.low[layer] == pytest.approx(low, rel=1e-10)
        assert found.high[layer] == pytest.approx(high, rel=1e-10)


def test_alternating_and_persistent_variances_have_a_closed_form() -> None:
    # D = 1 ± a in turn: c0 = a², c1 = −a²·(T−1)/T, which is below 0 and left out.
    d = 1 + 0.5 * np.array([1.0, -1.0] * 8)[:, None]
    spread = scipy.stats.t.ppf(0.975, 2 * 16 / 3 - 1) * 0.5 / math.sqrt(14)
    found = variance_ratio_interval(d, np.ones((16, 1)))
    assert (found.low[0], found.high[0]) == pytest.approx((math.exp(-spread), math.exp(spread)), rel=1e-12)
    # Eight at 1 + a, then eight at 1 − a: c1 = a²·(7 + 7 − 1)/16.
    d = 1 + 0.5 * np.array([1.0] * 8 + [-1.0] * 8)[:, None]
    spread = scipy.stats.t.ppf(0.975, 2 * 16 / 3 - 1) * 0.5 * math.sqrt((1 + 26 / 16) / 14)
    found = variance_ratio_interval(d, np.ones((16, 1)))
    assert (found.low[0], found.high[0]) == pytest.approx((math.exp(-spread), math.exp(spread)), rel=1e-12)


def test_steps_on_the_two_sides_of_a_gap_are_not_neighbours() -> None:
    # The persistent case again; without the gap's neighbours c1 = a²·14/16: the pair across the change is gone.
    d = np.concatenate([np.full(8, 1.5), [np.nan], np.full(8, 0.5)])[:, None]
    spread = scipy.stats.t.ppf(0.975, 2 * 16 / 3 - 1) * 0.5 * math.sqrt((1 + 28 / 16) / 14)
    found = variance_ratio_interval(d, np.ones((17, 1)))
    assert (found.low[0], found.high[0]) == pytest.approx((math.exp(-spread), math.exp(spread)), rel=1e-12)


@settings(max_examples=40)
@given(windows(), st.sampled_from([2.0, 1024.0, 0.125]))
def test_a_factor_on_the_step_variances_is_one_on_both_ends(
    window: tuple[np.ndarray, np.ndarray], factor: float
) -> None:
    d, p = np.abs(window[0]), window[1]
    here, there = variance_ratio_interval(d, p), variance_ratio_interval(d * factor, p)
    assert there.low == pytest.approx(here.low * factor, rel=1e-12)
    assert there.high == pytest.approx(here.high * factor, rel=1e-12)


def test_a_spread_beyond_all_bounds_overflows_nothing() -> None:
    d = np.array([[1e-300], [1e-300], [1.0], [1e-300], [1e-300]])
    found = variance_ratio_interval(d, np.ones((5, 1)), 0.9999999)
    assert 0 <= found.low[0] < found.high[0]
    assert np.isfinite(found.high[0])


# --- one step ----------------------------------------------------------------------------------------------------


def of_step(grads: np.ndarray, weights: np.ndarray | None = None, level: float = 0.95) -> Interval:
    flat = grads.reshape(len(grads), -1)
    mean = np.average(flat, axis=0, weights=weights)
    return snr_interval_of_step((flat**2).sum(axis=1), flat @ mean, mean @ mean, weights, level)


@settings(max_examples=40)
@given(gradient_batches(min_examples=4))
def test_norms_and_dots_give_what_leaving_examples_out_gives(grads: np.ndarray) -> None:
    # The leave-one-out traces subtract squares: κ = m₂/trΣ digits go (1e4 at most where the mean is 100 sd), once in
    # the norms and once more in the differences between leave-one-out values.
    found, want = of_step(grads), loop_snr_interval(grads)
    estimate = (found.low + found.high) / 2
    assert found.low == pytest.approx(want[0], rel=1e-4, abs=1e-4 * abs(estimate), nan_ok=True)
    assert found.high == pytest.approx(want[1], rel=1e-4, nan_ok=True)


@settings(max_examples=40)
@given(gradient_batches(min_examples=4), st.integers(0, 2**32 - 1))
def test_with_weights_too(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.5, 2.0, len(grads))
    found, want = of_step(grads, weights), loop_snr_interval(grads, weights)
    estimate = (found.low + found.high) / 2
    assert found.low == pytest.approx(want[0], rel=1e-4, abs=1e-4 * abs(estimate), nan_ok=True)
    assert found.high == pytest.approx(want[1], rel=1e-4, nan_ok=True)


def test_opposite_pairs_have_a_closed_form() -> None:
    # g = G ± e along two orthogonal directions, |G|² = a, four examples, |e|² = 1. Every deviation is as far from the
    # mean and orthogonal to G: SNR_{-i} is one number, the jackknife's variance 0, the interval of no width at
    # SNR = (a − P)/trΣ with trΣ = 4/3, P = 1/3.
    for a in (0.25, 4.0):
        base = np.array([0.0, 0.0, math.sqrt(a)])
        grads = base + np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0]])
        found = of_step(grads)
        assert (found.low, found.high) == pytest.approx(((a - 1 / 3) * 0.75,) * 2, rel=1e-7)


@settings(max_examples=40)
@given(gradient_batches(min_examples=4), st.integers(0, 2**32 - 1), st.sampled_from([0.5, -3.0, 1e6]))
def test_neither_the_order_of_the_examples_nor_a_factor_matters(grads: np.ndarray, seed: int, factor: float) -> None:
    here = of_step(grads)
    there = of_step(grads[np.random.default_rng(seed).permutation(len(grads))] * factor)
    estimate = abs(here.low + here.high)
    assert there.low == pytest.approx(here.low, rel=1e-4, abs=1e-4 * estimate, nan_ok=True)
    assert there.high == pytest.approx(here.high, rel=1e-4, nan_ok=True)


def test_equal_weights_are_no_weights_and_those_of_weight_0_take_no_part() -> None:
    grads = np.random.default_rng(3).standard_normal((6, 5)) + 0.5
    plain = of_step(grads)
    assert np.array(of_step(grads, np.full(6, 7.0))) == pytest.approx(np.array(plain), rel=1e-12)
    padded = np.concatenate([grads, np.full((2, 5), 9.0)])
    weights = np.array([1.0] * 6 + [0.0] * 2)
    assert np.array(of_step(padded, weights)) == pytest.approx(np.array(plain), rel=1e-12)
    sq_norms, mean = (grads**2).sum(axis=1), grads.mean(axis=0)
    holes = np.full(2, np.nan)  # padding may hold anything
    found = snr_interval_of_step(
        np.concatenate([sq_norms, holes]), np.concatenate([grads @ mean, holes]), mean @ mean, weights
    )
    assert np.array(found) == pytest.approx(np.array(plain), rel=1e-12)


def test_many_units_at_once_are_each_as_alone() -> None:
    grads = np.random.default_rng(4).standard_normal((3, 6, 5)) + 0.5
    mean = grads.mean(axis=1)
    weights = np.arange(1.0, 7.0)
    mean = np.einsum("b,ubj->uj", weights / 21, grads)
    found = snr_interval_of_step(
        (grads**2).sum(axis=2).T, np.einsum("ubj,uj->bu", grads, mean), (mean**2).sum(axis=1), weights
    )
    for unit in range(3):
        alone = of_step(grads[unit], weights)
        assert (found.low[unit], found.high[unit]) == pytest.approx((alone.low, alone.high), rel=1e-12)


def test_without_noise_without_four_examples_or_with_a_broken_one_there_is_no_interval() -> None:
    assert np.isnan(of_step(np.ones((5, 3)))).all()
    assert np.isnan(of_step(np.zeros((5, 3)))).all()
    assert np.isnan(of_step(np.random.default_rng(5).standard_normal((3, 3)))).all()
    assert np.isnan(of_step(np.random.default_rng(5).standard_normal((6, 3)), np.array([1.0] * 3 + [0.0] * 3))).all()
    assert np.isnan(of_step(np.ones((5, 3)), np.zeros(5) + np.array([1.0, 0, 0, 0, 0]))).all()
    for broken in (np.nan, np.inf):
        sq_norms = np.array([1.0, 2.0, 3.0, 4.0, broken])
        assert np.isnan(snr_interval_of_step(sq_norms, np.full(5, 0.5), 0.5)).all()
        assert np.isnan(snr_interval_of_step(np.arange(1.0, 6), np.full(5, 0.5), broken)).all()
    nobody = snr_interval_of_step(np.ones(5), np.ones(5), 1.0, np.zeros(5))
    assert np.isnan(nobody).all()


def test_where_the_mean_is_0_any_signal_agrees() -> None:
    grads = np.array([[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0], [-3.0, 0.0]])
    found = of_step(grads)
    assert found.high == math.inf
    assert found.low < 0
    assert inverted(found) == (0.0, math.inf)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a norm and a dot of each example, got sq_norms of shape \(5,\)"):
        snr_interval_of_step(np.ones(5), np.ones(4), 1.0)
    with pytest.raises(ValueError, match=r"needs one weight an example, got weights of shape \(4,\)"):
        snr_interval_of_step(np.ones(5), np.ones(5), 1.0, np.ones(4))
    moments = Moments.from_per_example(np.ones((5, 2)))
    with pytest.raises(ValueError, match="got dots=None; collect with dots, or use ratio_interval over a window"):
        snr_interval_of_moments(moments)
    with pytest.raises(ValueError, match=r"needs the norms of all examples, got sq_norms of 5 for count=9"):
        snr_interval_of_moments(moments._replace(dots=np.ones(5), count=9))


# --- any framework -----------------------------------------------------------------------------------------------


def test_windows_of_torch_agree_with_numpy() -> None:
    rng = np.random.default_rng(6)
    signal, noise = rng.standard_normal((12, 3)) + 1, rng.chisquare(5, (12, 3))
    signal[3, 1] = np.nan
    for function in (ratio_interval, lambda a, s: ratio_interval(a, s, block=3), variance_ratio_interval):
        want = function(abs(signal), noise)
        tensors = function(torch.as_tensor(abs(signal)), torch.as_tensor(noise))
        assert np.array(tensors) == pytest.approx(np.array(want), rel=1e-12)
        resolved = [bool(x) for x in inverted(tensors).is_resolved]
        assert resolved == list(inverted(want).is_resolved)


def test_moments_of_torch_and_jax_agree_with_numpy() -> None:
    grads = np.random.default_rng(7).standard_normal((16, 30)) + 0.3
    moments, want = Moments.from_per_example(grads), np.array(of_step(grads))
    for asarray, slack in ((np.asarray, 1e-12), (torch.as_tensor, 1e-12), (jnp.asarray, 1e-4)):
        found = snr_interval_of_moments(
            moments._replace(
                mean=asarray(moments.mean),
                sq_norms=asarray(moments.sq_norms),
                weights=asarray(moments.weights),
                dots=asarray(grads @ moments.mean),
            )
        )
        assert np.array([float(found.low), float(found.high)]) == pytest.approx(want, rel=slack)


def test_float32_columns_are_added_up_in_float64() -> None:
    noise = np.full((8, 1), 3e38, np.float32)
    assert np.array(ratio_interval(noise * np.float32(0.5), noise)).ravel() == pytest.approx([0.5, 0.5], rel=1e-6)


# --- how often they hold the truth -------------------------------------------------------------------------------


def test_the_simulations_sums_are_those_of_noise_sums() -> None:
    simulation.check_sums()


def test_windows_hold_the_truth_as_often_as_promised_in_one_cell() -> None:
    # 1,000 windows of 32 steps; three binomial standard deviations at the promised bounds, 1e-3 each.
    shares = simulation.pooled(np.random.default_rng(8), simulation.SLOW, 8, 1000)
    results = coverage.Results({("Λ ~ 1/j", 8): shares}, {}, {}, {})
    assert coverage.misses(results, deviations=3) == []
    assert shares[32, 3.0].covered < 1  # an interval that always holds it says nothing


def test_one_step_and_the_variance_ratio_hold_it_too() -> None:
    rng = np.random.default_rng(9)
    single = simulation.one_step(rng, simulation.STEEP, 32, 1000)
    ratio = simulation.variance_ratio(rng, simulation.FLAT, 8, 50, (16, 32))
    results = coverage.Results({}, {("Λ ~ 1/j²", 32): single}, {("Λ flat", 8): ratio}, {})
    assert coverage.misses(results, deviations=3) == []


def test_too_narrow_and_too_wide_intervals_would_be_missed() -> None:
    half = simulation.Share(0.80, 0.5, 1000)
    always = simulation.Share(1.0, 1.0, 1000)
    results = coverage.Results(
        {("narrow", 8): {(32, 0.0): half}, ("wide", 8): {(32, 1.0): always}}, {("narrow", 8): {1.0: half}}, {}, {}
    )
    found = coverage.misses(results, deviations=3)
    assert len(found) == 5
    assert found[0] == "narrow, B = 8, strength 0.0: 0.800 of 1000, promised 0.9 to 0.98"


def test_the_page_is_what_was_measured_and_keeps_the_promises() -> None:
    page = coverage.PAGE.read_text()
    lines = page.split(coverage.BEGIN)[1].split(coverage.END)[0].splitlines()
    titles = [n for n, line in enumerate(lines) if line.startswith(("**A window of 32", "**The same windows"))]
    cells = []
    for start in titles:
        table = [line.strip("| ").split(" | ") for line in lines[start + 4 :]]
        cells.append([[float(x) for x in row[2:]] for row in table[: len(coverage.MODELS) * len(coverage.BATCHES)]])
    covered, unresolved = np.array(cells)
    assert covered.shape == (15, 5)
    assert covered.min() >= 90
    assert covered.max() <= 98
    assert unresolved[:, 0].min() >= 95
    assert unresolved[:, 2:].max() <= 5


def test_tables_are_put_between_the_markers_and_nowhere_else() -> None:
    page = f"before\n{coverage.BEGIN}\nold\n{coverage.END}\nafter\n"
    assert coverage.written(page, "new") == f"before\n{coverage.BEGIN}\nnew\n{coverage.END}\nafter\n"


@pytest.mark.matrix
def test_all_cells_hold_the_truth_as_often_as_promised() -> None:
    # 1,000 windows a cell up to B = 32, 500 at 128, 125 of 128 pairs for the ratio; bounds widened by three binomial
    # standard deviations. Measured coverages (docs/intervals.md) lie a point or more inside the bounds, so that the
    # false-alarm probability is below 1e-4 in each of some 290 cells.
    results = coverage.measured(1000, serial=False)
    assert coverage.misses(results, deviations=3) == []
    assert coverage.tables(results).count("\n**") == 6


@pytest.mark.matrix
def test_what_serial_correlation_costs_is_got_back_by_blocks() -> None:
    # 800 windows of 32 steps with each example in two of them: 86 % alone, 94 % in blocks of eight (measured); the
    # standard deviation of a share is at most 1.3 points.
    shares = simulation.reused_examples(np.random.default_rng(10), 2, 800 * 32)
    assert shares[32, 1].covered < 0.91
    assert shares[32, 8].covered > 0.91
