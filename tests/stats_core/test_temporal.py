import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core import maxva
from gradiometer.stats_core.maxva import TemporalMoments
from gradiometer.stats_core.successive import Previous, step_sums
from gradiometer.stats_core.temporal import FixedMoments, MaxvaStep, fixed_sums, maxva_sums
from tests.reference import maxva_naive
from tests.strategies import gradient_batches


def fed(steps: np.ndarray, **options: object) -> list[MaxvaStep]:
    """MaxVA's steps over gradients given one a row, with Kish's number."""
    state, kish, found = TemporalMoments.zeros_like(steps[0]), np.zeros_like(steps[0]), []
    for grad in steps:
        found.append(maxva_sums(state, grad, kish=kish, **options))
        _, state, kish = found[-1]
    return found


def fixed(steps: np.ndarray, beta: float) -> tuple[list[float], FixedMoments]:
    """The fixed pair's variances over gradients given one a row, and its state after them."""
    state, found = FixedMoments.zeros_like(steps[0]), []
    for grad in steps:
        sums, state = fixed_sums(state, grad, beta)
        found.append(float(sums["fixed_variance"]))
    return found, state


def fixed_weights(beta: float, steps: int) -> np.ndarray:
    """The definition's: β^{t−i}, made to add up to 1."""
    raw = np.array([beta ** (steps - 1 - i) for i in range(steps)])
    return raw / math.fsum(raw)


# MaxVA's sums.


def test_maxvas_columns_are_those_of_the_optimizers_own_function() -> None:
    rng = np.random.default_rng(2)
    state = TemporalMoments.zeros_like(np.zeros(20))
    for step in range(5):
        g, tau2 = rng.standard_normal(20), rng.uniform(0, 1, 20)
        sums, after, kish = maxva_sums(state, g, tau2, beta_max=0.98)
        want, q = maxva.update(state, g, tau2, beta_max=0.98)
        assert kish is None
        assert "effective_steps" not in sums
        for got_part, want_part in zip(after, want, strict=True):
            np.testing.assert_array_equal(got_part, want_part)
        assert float(sums["temporal_variance"]) == pytest.approx(want.s.sum())
        if step == 0:
            assert np.isnan(float(sums["deviation_sq"]))
        else:
            assert float(sums["temporal_variance_prior"]) == pytest.approx(state.s.sum())
            assert float(sums["deviation_sq"]) == pytest.approx(((g - state.u) ** 2).sum())
            assert float(sums["deviation_share"]) == pytest.approx((maxva.deviation_ratio(state, g) > 1).mean())
            assert float(sums["maxva_beta"]) == pytest.approx(maxva.maxva_beta(state, q, beta_max=0.98).mean())
        state = after


@pytest.mark.parametrize("beta_max", [0.9, 0.999])
def test_the_number_of_steps_is_that_of_the_weights_written_out(beta_max: float) -> None:
    # The rule by brute force (20,001 weights an element) gives its coefficients; from them every gradient's weight.
    rng = np.random.default_rng(3)
    grads = rng.standard_normal((8, 5)) + 1
    raw = np.zeros((0, 5))
    found = fed(grads, beta_max=beta_max)
    for t in range(len(grads)):
        beta = maxva_naive(list(grads[: t + 1]), beta_max=beta_max)["beta"]
        raw = np.concatenate([raw * beta, 1.0 - beta[None]])
        omega = raw / raw.sum(axis=0)
        np.testing.assert_allclose((omega * grads[: t + 1]).sum(axis=0), found[t].after.u, atol=2e-3)
        want = np.mean([1 / math.fsum(omega[:, j] ** 2) for j in range(5)])
        # The grid's step is 2.5e-5 of the coefficients' range, 8 steps of it: a part in a thousand of 1/Q.
        assert float(found[t].sums["effective_steps"]) == pytest.approx(want, rel=2e-3)


def test_the_sum_of_squares_is_that_of_the_rules_own_weights() -> None:
    grads = np.random.default_rng(4).standard_t(3, (60, 7))
    state, omega = TemporalMoments.zeros_like(grads[0]), np.zeros((0, 7))
    for t, step in enumerate(fed(grads, beta_max=0.98)):
        state, q = maxva.update(state, grads[t], beta_max=0.98)
        omega = np.concatenate([omega * (1 - q), q[None]])
        np.testing.assert_allclose((omega * grads[: t + 1]).sum(axis=0), step.after.u, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose((omega**2).sum(axis=0), step.kish, rtol=1e-11)
        assert float(step.sums["effective_steps"]) == pytest.approx((1 / (omega**2).sum(axis=0)).mean(), rel=1e-11)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_under_one_coefficient_the_steps_tend_to_those_of_an_average(beta: float) -> None:
    # Q_t = (1-β)/(1+β)·(1+β^t)/(1-β^t), the squares of a geometric series; in the end 1/Q = (1+β)/(1-β).
    steps = int(40 / (1 - beta))
    grads = np.random.default_rng(5).standard_normal((steps, 3))
    found = fed(grads, beta_max=beta, beta_min=beta)
    for t in range(1, steps + 1):
        closed = (1 + beta) / (1 - beta) * (1 - beta**t) / (1 + beta**t)
        assert float(found[t - 1].sums["effective_steps"]) == pytest.approx(closed, rel=1e-9), t
    assert float(found[-1].sums["effective_steps"]) == pytest.approx((1 + beta) / (1 - beta), rel=1e-9)


def test_an_element_without_a_gradient_is_averaged_at_the_largest_coefficient() -> None:
    found = fed(np.zeros((2000, 2)), beta_max=0.98)
    assert float(found[0].sums["effective_steps"]) == 1.0
    assert float(found[-1].sums["effective_steps"]) == pytest.approx(1.98 / 0.02, rel=1e-9)


@given(gradient_batches(min_examples=3, max_examples=9), st.sampled_from([0.9, 0.999]))
def test_no_less_than_one_step_and_no_more_than_all_are_averaged(grads: np.ndarray, beta_max: float) -> None:
    for t, step in enumerate(fed(grads, beta_max=beta_max), 1):
        assert 1 - 1e-12 <= float(step.sums["effective_steps"]) <= t + 1e-9


@given(gradient_batches(min_examples=3), st.integers(-8, 8))
def test_scaling_gradients_scales_the_variances_and_nothing_else(grads: np.ndarray, power: int) -> None:
    c = 2.0**power  # exact in binary
    squares = {"temporal_variance", "temporal_variance_prior", "deviation_sq"}
    for plain, scaled in zip(fed(grads), fed(c * grads), strict=True):
        for name, value in plain.sums.items():
            factor = c * c if name in squares else 1.0
            np.testing.assert_array_equal(scaled.sums[name], factor * value, err_msg=name)
        np.testing.assert_array_equal(plain.kish, scaled.kish)


@given(gradient_batches(min_examples=3))
def test_sums_and_means_of_a_parameter_are_made_of_those_of_its_parts(grads: np.ndarray) -> None:
    flat = grads.reshape(len(grads), -1)
    flat = np.concatenate([flat, flat[::-1]], axis=1)  # two elements at least
    cut = flat.shape[1] // 3 + 1
    parts = flat[:, :cut], flat[:, cut:]
    for whole, *halves in zip(fed(flat), *map(fed, parts), strict=True):
        for name, value in whole.sums.items():
            summed = sum(float(half.sums[name]) for half in halves)
            if name in ("deviation_share", "maxva_beta", "effective_steps"):
                sizes = (cut, flat.shape[1] - cut)
                summed = sum(n * float(h.sums[name]) for n, h in zip(sizes, halves, strict=True)) / flat.shape[1]
            # A part without a variance (all equal) has no columns where the whole has.
            if np.isfinite(summed):
                assert float(value) == pytest.approx(summed, rel=1e-9), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_what_is_not_a_number_is_shown_once_and_stays_out_of_the_memory(bad: float, at: int) -> None:
    rng = np.random.default_rng(6)
    grads = rng.standard_normal((8, 3))
    spoilt = grads.copy()
    spoilt[at, 1] = bad  # 1e200: its square overflows, and would stay for good
    with np.errstate(invalid="ignore", over="ignore"):
        found = fed(spoilt)
    without = fed(np.delete(grads, at, axis=0))
    assert not np.isfinite(found[at].sums["temporal_variance"])
    assert np.isnan(found[at].sums["effective_steps"])
    for place in (*range(at), *range(at + 1, 8)):
        assert np.isfinite(found[place].sums["temporal_variance"])
        assert np.isfinite(found[place].sums["effective_steps"])
    for part, want in zip((*found[-1].after, found[-1].kish), (*without[-1].after, without[-1].kish), strict=True):
        np.testing.assert_array_equal(part[1], want[1])  # as if the step had never been
    clean = fed(grads)[-1]
    for part, want in zip((*found[-1].after, found[-1].kish), (*clean.after, clean.kish), strict=True):
        np.testing.assert_array_equal(part[[0, 2]], want[[0, 2]])  # the others have it


def test_a_memory_that_begins_in_the_middle_counts_what_was_before_as_one_step() -> None:
    grads = np.random.default_rng(7).standard_normal((200, 4))
    full = fed(grads)
    state, kish, past = full[99].after, np.zeros(4), np.ones(4)
    for t in range(100, 200):
        past = past * (1 - maxva.update(state, grads[t])[1])  # the weight that is left of the first hundred
        step = maxva_sums(state, grads[t], kish=kish)
        _, state, kish = step
        # Their own Q weighs past² in the true sum of squares; here a 1 stands for it: never too many steps.
        np.testing.assert_allclose(kish, full[t].kish + (1 - full[99].kish) * past**2, rtol=1e-10)
        assert 1 < float(step.sums["effective_steps"]) < float(full[t].sums["effective_steps"])


def noise(steps: int, elements: int, beta_max: float, fixed_beta: float = 0.99) -> tuple[float, float, float]:
    """Of normal noise, after a quarter of it: MaxVA's variance over the truth and over the fixed pair's, and n_eff."""
    rng = np.random.default_rng(8)
    state, kish = TemporalMoments.zeros_like(np.zeros(elements)), np.zeros(elements)
    pair = FixedMoments.zeros_like(np.zeros(elements))
    top, bottom, steps_worth, count = 0.0, 0.0, 0.0, 0
    for t in range(steps):
        grad = rng.standard_normal(elements)
        sums, state, kish = maxva_sums(state, grad, kish=kish, beta_max=beta_max)
        beside, pair = fixed_sums(pair, grad, fixed_beta)
        if t >= steps // 4:
            top, bottom = top + float(sums["temporal_variance"]), bottom + float(beside["fixed_variance"])
            steps_worth, count = steps_worth + float(sums["effective_steps"]), count + 1
    return top / count / elements, top / bottom, steps_worth / count


def test_on_normal_noise_maxvas_variance_is_inflated_and_its_few_steps_say_so() -> None:
    # 2.66 times at β_max = .98, and 14 to 16 steps, in the study; 400 elements × 300 steps of n_eff 15 are 8,000
    # independent values of spread about 1.5: sd 2 %, bound 3 sd and 3 % for the figure.
    inflated, over_fixed, steps = noise(400, 400, 0.98)
    assert inflated == pytest.approx(2.66, rel=0.09)
    assert over_fixed == pytest.approx(2.66, rel=0.09)
    assert 13.5 < steps < 16.5


@pytest.mark.matrix
@pytest.mark.parametrize(("beta_max", "figure"), [(0.98, 2.66), (0.99, 3.27), (0.999, 5.67)])
def test_the_studys_figures_of_inflation_hold(beta_max: float, figure: float) -> None:
    inflated, over_fixed, steps = noise(int(20 / (1 - beta_max)) + 2000, 1000, beta_max)
    assert inflated == pytest.approx(figure, rel=0.03)
    assert over_fixed == pytest.approx(figure, rel=0.03)
    assert 13.5 < steps < 16.5  # "14-16": 16.07 was seen at .999


# The fixed pair.


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_the_fixed_pair_is_that_of_the_weights_written_out(beta: float) -> None:
    grads = np.random.default_rng(9).standard_normal((30, 4)) * 3 + 5
    state = FixedMoments.zeros_like(grads[0])
    for t in range(1, len(grads) + 1):
        sums, state = fixed_sums(state, grads[t - 1], beta)
        omega = fixed_weights(beta, t)
        mean = [math.fsum(omega[i] * grads[i, j] for i in range(t)) for j in range(4)]
        square = [math.fsum(omega[i] * (grads[i, j] - mean[j]) ** 2 for i in range(t)) for j in range(4)]
        spread = math.fsum(omega**2)
        np.testing.assert_allclose(state.u, mean, rtol=1e-11)
        np.testing.assert_allclose(state.s, square, rtol=1e-9, atol=1e-13)
        assert float(state.spread) == pytest.approx(spread, rel=1e-11)
        assert float(state.w) == pytest.approx(1 - beta**t, rel=1e-11)
        if t == 1 or beta == 0:
            assert np.isnan(sums["fixed_variance"])
        else:
            assert float(sums["fixed_variance"]) == pytest.approx(math.fsum(square) / (1 - spread), rel=1e-9)


def test_it_is_maxvas_rule_where_that_may_choose_nothing() -> None:
    grads = np.random.default_rng(10).standard_normal((40, 6))
    _, state = fixed(grads, 0.9)
    last = fed(grads, beta_max=0.9, beta_min=0.9)[-1]
    np.testing.assert_allclose(state.u, last.after.u, rtol=1e-10)
    np.testing.assert_allclose(state.s, last.after.s, rtol=1e-10)
    assert 1 / float(state.spread) == pytest.approx(float(last.sums["effective_steps"]), rel=1e-10)


def test_two_gradients_have_the_variance_of_two_numbers() -> None:
    for beta in (0.5, 0.9, 0.999):
        found, _ = fixed(np.array([[1.0, 2.0], [4.0, 2.0]]), beta)
        assert found[1] == pytest.approx(4.5, rel=1e-9), beta  # ½·3², whatever the weights


@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_the_fixed_pair_is_unbiased_at_every_step_from_the_second(beta: float) -> None:
    # 20,000 independent elements of N(3, 4): s/(1-Q) of an element has relative variance 2/ν, ν ≥ 1: sd of the mean
    # at most √(2/20,000) = 1 %. 60 looks with bound 4.5 sd: false alarm 4e-4 in all.
    rng = np.random.default_rng(11)
    found, _ = fixed(3 + 2 * rng.standard_normal((61, 20_000)), beta)
    assert np.isnan(found[0])
    assert np.abs(np.array(found[1:]) / 20_000 / 4 - 1).max() < 0.045
    assert np.mean(found[30:]) / 20_000 / 4 == pytest.approx(1, abs=0.01)  # ν ≥ 9 there: sd .33 % at most, 3 sd


def test_without_noise_a_drift_is_in_it_ninety_five_times_where_the_step_variance_has_a_half() -> None:
    # Weights β^k(1-β) on a straight line: variance of k over (1-Q), β/(1-β)²·(1+β)/(2β) = 95 at β = .9, 9,950 at .99.
    for beta, factor in ((0.9, 95.0), (0.99, 9950.0)):
        steps = int(30 / (1 - beta))
        line = 0.25 * np.arange(steps)[:, None] * np.ones(3)
        found, _ = fixed(line, beta)
        assert found[-1] == pytest.approx(3 * factor * 0.25**2, rel=1e-6)
        pair = [Previous(g, np.float64(0.0), np.float64((g * g).sum())) for g in line[-2:]]
        assert float(step_sums(*pair)["step_variance"]) == pytest.approx(3 * 0.5 * 0.25**2, rel=1e-9)


def expected(beta: float, steps: int, covariance: np.ndarray) -> float:
    """E s/(1-Q) for gradients of a known covariance through time, from the weights written out."""
    omega = fixed_weights(beta, steps)
    return float((omega @ np.diag(covariance) - omega @ covariance @ omega) / (1 - omega @ omega))


@pytest.mark.parametrize(("x", "long"), [(0.1, 1.058), (0.5, 1.340), (1.0, 2.01)])
def test_under_stationary_sgd_it_shows_the_movement_that_a_long_average_sees(x: float, long: float) -> None:
    # g_t = hθ_t + ε_t: variance 2/(2-x), covariance -(1-x)^{k-1}·x/(2-x) at lag k. β = .99, 600 steps.
    lags = np.abs(np.subtract.outer(np.arange(600), np.arange(600)))
    covariance = np.where(lags == 0, 2 / (2 - x), -((1 - x) ** np.maximum(lags - 1, 0)) * x / (2 - x))
    want = expected(0.99, 600, covariance)
    assert want == pytest.approx(long, abs=0.012)  # the study's figure
    # 4,000 elements at the last step: ν ≈ 100 steps an element: sd √(2/400,000) = .22 %, correlated 1.5: 5 sd.
    rng = np.random.default_rng(12)
    theta, state = rng.standard_normal(4000) * math.sqrt(x / (2 - x)), FixedMoments.zeros_like(np.zeros(4000))
    for _ in range(600):
        grad = theta + rng.standard_normal(4000)
        theta = theta - x * grad
        sums, state = fixed_sums(state, grad, 0.99)
    assert float(sums["fixed_variance"]) / 4000 == pytest.approx(want, rel=0.017)


def test_reshuffled_epochs_show_fully_in_a_window_of_many_epochs() -> None:
    # N = 512, B = 64: variance S²(1/B − 1/N), covariance −S²/N in one epoch, 0 between epochs. .878 in the study.
    epochs, size = 60, 8
    same = np.kron(np.eye(epochs), np.ones((size, size)))
    covariance = np.where(np.eye(epochs * size) > 0, 1 - 64 / 512, -64 / 512 * same)
    want = expected(0.99, epochs * size, covariance)
    assert want == pytest.approx(0.878, abs=0.003)
    rng = np.random.default_rng(13)
    data = rng.standard_normal((512, 1500))
    truth = data.var(axis=0, ddof=1).sum() / 64
    state, found = FixedMoments.zeros_like(data[0]), []
    for _ in range(epochs):
        for batch in rng.permutation(512).reshape(size, 64):
            sums, state = fixed_sums(state, data[batch].mean(axis=0), 0.99)
        found.append(float(sums["fixed_variance"]) / truth)
    # 1,500 elements of ν ≈ 100: sd √(2/150,000) = .37 % at the last; bound 5 sd = 1.6 %. (1 would be 14 % away.)
    assert found[-1] == pytest.approx(want, rel=0.0185)


@given(gradient_batches(min_examples=2), st.integers(-8, 8))
def test_scaling_gradients_scales_the_fixed_variance_by_the_square(grads: np.ndarray, power: int) -> None:
    c = 2.0**power
    np.testing.assert_array_equal(fixed(c * grads, 0.9)[0], np.array(fixed(grads, 0.9)[0]) * c * c)


@given(gradient_batches(min_examples=3))
def test_adding_one_vector_to_every_gradient_leaves_the_fixed_variance(grads: np.ndarray) -> None:
    # Every number is off by a few roundoffs u of the largest, M; so is s by √s·uM and (uM)² an element.
    shift = 3 * grads[0] + grads[-1]
    plain, moved = fixed(grads, 0.9)[0], fixed(grads + shift, 0.9)[0]
    e = 20 * len(grads) * 2.0**-53 * 5 * float(np.abs(grads).max())
    size = grads[0].size
    for one, other in zip(plain[1:], moved[1:], strict=True):
        assert one >= 0
        assert abs(one - other) <= 4 * math.sqrt(one * size) * e + 4 * size * e * e


@given(gradient_batches(min_examples=3), st.randoms(use_true_random=False))
def test_the_order_of_elements_does_not_matter(grads: np.ndarray, random: object) -> None:
    flat = grads.reshape(len(grads), -1)
    order = list(range(flat.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_allclose(fixed(flat[:, order], 0.9)[0], fixed(flat, 0.9)[0], rtol=1e-12)
    for one, other in zip(fed(flat[:, order]), fed(flat), strict=True):
        for name, value in one.sums.items():
            np.testing.assert_allclose(value, other.sums[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_the_fixed_pair_passes_over_a_gradient_that_is_not_a_number(bad: float, at: int) -> None:
    grads = np.random.default_rng(14).standard_normal((7, 3))
    spoilt = grads.copy()
    spoilt[at, 1] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        found, state = fixed(spoilt, 0.9)
    without, want = fixed(np.delete(grads, at, axis=0), 0.9)
    assert not np.isfinite(found[at])
    np.testing.assert_array_equal(np.delete(found, at), without)
    for part, other in zip(state, want, strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_a_coefficient_that_is_none_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"needs 0 <= beta < 1, got beta=(-0\.1|1\.0|nan); take the optimizer's"):
        fixed_sums(FixedMoments.zeros_like(np.zeros(1)), np.zeros(1), beta)


def test_equal_gradients_have_no_variance() -> None:
    found, state = fixed(np.full((50, 3), 0.1), 0.999)
    assert found[1:] == [0.0] * 49
    assert (state.u == 0.1).all()


# Both.


@pytest.mark.parametrize("scale", [1e-18, 1e-15, 1e18])
def test_float32_holds_gradients_of_any_scale(scale: float) -> None:
    # 30 elements: sums of squares stay in float32's range even where they are added in it (jax).
    rng = np.random.default_rng(15)
    grads = (rng.standard_normal((25, 30)) * scale).astype(np.float32)
    want_fixed, _ = fixed(grads.astype(np.float64), 0.99)
    want_maxva = fed(grads.astype(np.float64), beta_max=0.99)
    for array in (np.asarray, torch.as_tensor, jnp.asarray):
        state, kish = TemporalMoments.zeros_like(array(grads[0])), array(grads[0]) * 0
        pair = FixedMoments.zeros_like(array(grads[0]))
        for grad in grads:
            sums, state, kish = maxva_sums(state, array(grad), kish=kish, beta_max=0.99)
            beside, pair = fixed_sums(pair, array(grad), 0.99)
        # Squares of deviations below 1.1e-19 leave the normal range. At 1e-18 they are 4e-4 of a sum, but the rule
        # weighs 9 % of the elements inexactly: as much of a mean over elements.
        assert float(beside["fixed_variance"]) == pytest.approx(want_fixed[-1], rel=2e-3)
        for name, value in want_maxva[-1].sums.items():
            inexact = scale < 1e-17 and name in ("deviation_share", "maxva_beta", "effective_steps")
            assert float(sums[name]) == pytest.approx(float(value), rel=0.09 if inexact else 2e-3), name


def test_in_float32_a_mean_of_a_thousand_deviations_is_subtracted_safely() -> None:
    # E[g²] − E[g]² would lose all digits. u is rounded by 6e-5 of a deviation at each of the 100 steps that count:
    # 6e-3 if all went one way, and s by less than 1 %.
    grads = (1000 + np.random.default_rng(16).standard_normal((2000, 50))).astype(np.float32)
    found, state = fixed(grads, 0.99)
    want, wide = fixed(grads.astype(np.float64), 0.99)
    assert state.s.dtype == np.float32
    assert found[-1] == pytest.approx(want[-1], rel=0.01)
    assert float(state.spread) == pytest.approx(float(wide.spread), rel=1e-4)


def test_numpy_torch_and_jitted_jax_agree() -> None:
    grads = np.random.default_rng(17).standard_normal((12, 4, 3)).astype(np.float32)

    def step(state: object, kish: object, pair: object, grad: object) -> tuple[object, ...]:
        one = maxva_sums(state, grad, kish=kish, beta_max=0.98, beta_min=0.6)
        sums, pair = fixed_sums(pair, grad, 0.98)
        return one.after, one.kish, pair, {**one.sums, **sums}

    results = []
    for array, run in ((np.asarray, step), (torch.as_tensor, step), (jnp.asarray, jax.jit(step))):
        zeros = array(np.zeros((4, 3), np.float32))
        carried = (TemporalMoments.zeros_like(zeros), zeros, FixedMoments.zeros_like(zeros))
        for grad in grads:
            *carried, sums = run(*carried, array(grad))
        results.append({name: float(value) for name, value in sums.items()})
    for got in results[1:]:
        assert got.keys() == results[0].keys()
        for name, value in results[0].items():
            # 12 steps, a few roundoffs of 6e-8 each; a clipped q may flip where both sides are equal up to them.
            assert got[name] == pytest.approx(value, rel=1e-4), name


def test_nothing_waits_for_the_device() -> None:
    # A tensor without memory has no value to wait for: looking at one would raise.
    grad = torch.ones(3, device="meta")
    sums, after, kish = maxva_sums(TemporalMoments.zeros_like(grad), grad, kish=torch.zeros(3, device="meta"))
    beside, pair = fixed_sums(FixedMoments.zeros_like(grad), grad, 0.9)
    assert {value.device.type for value in (*sums.values(), *beside.values(), *after, *pair, kish)} == {"meta"}


def test_half_precision_is_averaged_in_float32() -> None:
    for grad in (torch.ones(2, dtype=torch.bfloat16), jnp.ones(2, jnp.bfloat16)):
        _, pair = fixed_sums(FixedMoments.zeros_like(grad), grad, 0.9)
        assert {str(part.dtype).removeprefix("torch.") for part in pair} == {"float32"}
        zeros = pair.u * 0
        _, after, kish = maxva_sums(TemporalMoments.zeros_like(zeros), grad, kish=zeros)
        assert {str(part.dtype).removeprefix("torch.") for part in (*after, kish)} == {"float32"}


def test_a_parameter_without_elements_has_sums_of_zero() -> None:
    grad = torch.zeros(0, 3)
    sums, _, _ = maxva_sums(TemporalMoments.zeros_like(grad), grad, kish=grad)
    assert float(sums["temporal_variance"]) == 0
    beside, pair = fixed_sums(FixedMoments.zeros_like(grad), grad, 0.9)
    assert float(fixed_sums(pair, grad, 0.9)[0]["fixed_variance"]) == 0
    assert np.isnan(float(beside["fixed_variance"]))


def test_a_parameter_without_any_gradient_does_not_hide_its_layer() -> None:
    state, zeros = TemporalMoments.zeros_like(np.zeros(3)), np.zeros(3)
    first = maxva_sums(state, zeros)
    assert np.isnan(float(first.sums["deviation_sq"]))  # nothing to be held against yet
    second = maxva_sums(first.after, zeros)
    assert float(second.sums["temporal_variance_prior"]) == 0.0
    assert float(second.sums["deviation_sq"]) == 0.0
    assert float(second.sums["deviation_share"]) == 0.0
    assert float(second.sums["maxva_beta"]) == pytest.approx(0.999)
    live = maxva_sums(second.after, np.ones(3))  # and now it has one, against a variance of 0
    assert np.isnan(float(live.sums["deviation_sq"]))
