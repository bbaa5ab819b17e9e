import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.histogram import Histogram, sketch_rows
from gradiometer.stats_core.tails import Tail, hill, hill_of, pooled

INDICES = [1.5, 2.0, 3.0]
WIDTH = math.log(2) / 8  # of a bucket, in logarithms


def pareto(rng: np.random.Generator, alpha: float, shape: tuple[int, ...]) -> np.ndarray:
    return (1.0 - rng.random(shape)) ** (-1 / alpha)


def histogram_of(values: np.ndarray) -> Histogram:
    return Histogram.from_sketch(sketch_rows(np.asarray(values)[None]))


def loop_hill(values: list[float], k: int) -> float:
    """From the definition: ranks by counting who is larger, one logarithm at a time."""
    ranked = [
        max(v for v in values if sum(w > v for w in values) < r <= sum(w >= v for w in values)) for r in range(1, k + 2)
    ]
    return 1 / (math.fsum(math.log(ranked[r] / ranked[k]) for r in range(k)) / k)


# ---------------------------------------------------------------- numbers


@given(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=20, unique=True), st.integers(1, 3))
def test_hill_is_its_definition(values: list[float], k: int) -> None:
    assert float(hill(np.array(values), k).alpha) == pytest.approx(loop_hill(values, k), rel=1e-9)


@pytest.mark.parametrize("alpha", INDICES)
def test_of_a_pareto_sample_hill_is_gamma_distributed_about_the_index(alpha: float) -> None:
    # kα/α̂ ~ Γ(k): E 1/α̂ = 1/α exactly, with standard deviation 1/(α√k); over 400 samples of k = 50, by 20 less.
    # Its variance is 1/(kα²), and that of a sample variance of 400 (2 + 6/k)/400 of itself. Bounds 4.5 sd: 7e-6 each.
    rng = np.random.default_rng(0)
    found = [hill(pareto(rng, alpha, (500,)), 50) for _ in range(400)]
    inverse = np.array([1 / float(tail.alpha) for tail in found])
    assert abs(inverse.mean() - 1 / alpha) < 4.5 / (alpha * math.sqrt(50 * 400))
    assert abs(inverse.var() * 50 * alpha**2 - 1) < 4.5 * math.sqrt(2.12 / 400)
    # The standard error is α̂/√k: on average α/√k · k/(k - 1).
    errors = np.array([float(tail.standard_error) for tail in found])
    assert errors.mean() == pytest.approx(alpha / math.sqrt(50) * 50 / 49, rel=4.5 / math.sqrt(48 * 400))


@given(st.integers(0, 10**6), st.floats(1e-15, 1e15))
def test_neither_scale_nor_order_matters(seed: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    values = pareto(rng, 2.0, (40,))
    plain = hill(values, 5)
    moved = hill(rng.permutation(values) * factor, 5)
    # A rounding of the ratios, 2e-16, against the mean of their logarithms, which is above 1e-3 but in 1e-14 of cases.
    assert float(moved.alpha) == pytest.approx(float(plain.alpha), rel=1e-12)


def test_numpy_torch_and_jitted_jax_agree() -> None:
    values = pareto(np.random.default_rng(1), 1.5, (200,)).astype(np.float32)
    jitted = jax.jit(hill, static_argnums=1)
    for got in (hill(torch.as_tensor(values), 20), jitted(jnp.asarray(values), 20)):
        assert float(got.alpha) == pytest.approx(float(hill(values, 20).alpha), rel=1e-5)
        assert got.exceedances == 20
    assert hill(torch.as_tensor(values).bfloat16(), 20).alpha.dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_float32_is_enough_at_extreme_scales(scale: float) -> None:
    values = pareto(np.random.default_rng(2), 1.5, (200,))
    got = hill((values * scale).astype(np.float32), 20)
    assert float(got.alpha) == pytest.approx(float(hill(values, 20).alpha), rel=1e-5)


@pytest.mark.parametrize("values", [[0.0, 0.0, 1.0, 2.0], [1.0, 2.0, 3.0, math.inf], [1.0, math.nan, 3.0, 4.0]])
def test_there_is_no_index_without_numbers_above_zero(values: list[float]) -> None:
    for array in (np.array(values), torch.tensor(values), jnp.asarray(values)):
        assert math.isnan(float(hill(array, 2).alpha))
        assert math.isnan(float(hill(array, 2).standard_error))


def test_where_no_value_stands_out_the_index_is_infinite() -> None:
    assert float(hill(np.full(5, 3.0), 2).alpha) == math.inf


@pytest.mark.parametrize("k", [0, 4])
def test_hill_needs_one_value_below_those_it_reads(k: int) -> None:
    with pytest.raises(ValueError, match=f"needs 1 <= k < 4 for 4 values, got k={k}; give more values or a smaller k"):
        hill(np.ones(4), k)


# ---------------------------------------------------------------- histograms


def loop_likelihood(places: list[int], alpha: float) -> float:
    """Log-likelihood of an exponential of rate α that is known to a bucket, one value at a time."""
    return math.fsum(math.log(math.exp(-alpha * WIDTH * k) - math.exp(-alpha * WIDTH * (k + 1))) for k in places)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=30).filter(lambda places: 0 in places and max(places) > 0))
def test_the_index_of_a_histogram_is_the_most_likely_one(places: list[int]) -> None:
    filled = sorted(set(places))
    histogram = Histogram(3, 0.0, 0, [7 + p for p in filled], [places.count(p) for p in filled])
    got = hill_of(histogram, share=0.999999)
    assert got.exceedances == len(places)
    best = loop_likelihood(places, got.alpha)
    assert best >= max(loop_likelihood(places, got.alpha * factor) for factor in (0.5, 0.99, 0.9999, 1.0001, 1.01, 2.0))
    # The curvature there is the standard error's: second difference of the log-likelihood over 1 % of α.
    d = 0.01 * got.alpha
    curvature = (loop_likelihood(places, got.alpha + d) + loop_likelihood(places, got.alpha - d) - 2 * best) / d**2
    assert 1 / math.sqrt(-curvature) == pytest.approx(got.standard_error, rel=1e-2)


@pytest.mark.parametrize("alpha", INDICES)
def test_of_pareto_samples_the_histograms_index_is_unbiased_to_first_order(alpha: float) -> None:
    # 200 samples of 2,000, about 220 exceedances each: α̂ has a standard deviation of α/√k (0.3 % more for the
    # buckets) and is high by about 1/k. Bound on the mean 4.5 sd/√200, false alarm 7e-6, and twice that bias.
    rng = np.random.default_rng(3)
    found = [hill_of(histogram_of(pareto(rng, alpha, (2000,)))) for _ in range(200)]
    alphas = np.array([tail.alpha for tail in found])
    k = float(np.mean([tail.exceedances for tail in found]))
    assert 200 <= k <= 200 * math.exp(alpha * WIDTH)  # a tenth, and at most a bucket more on average
    assert abs(alphas.mean() / alpha - 1) < 4.5 / math.sqrt(k * 200) + 2 / k
    # The spread is what the standard error says: sd of a sample sd of 200 is 5 %.
    assert alphas.std() == pytest.approx(np.mean([tail.standard_error for tail in found]), rel=4.5 * 0.05)


@pytest.mark.parametrize("alpha", INDICES)
def test_it_agrees_with_hill_of_the_numbers_themselves(alpha: float) -> None:
    # Same exceedances: what the bucket hides of a logarithm is uniform in ±h/2 to first order, h/√12 each; the mean of
    # k of them moves 1/α̂ by h/√(12k), that is α̂ by α²h/√(12k). Bound 4.5 of these, and the curvature, (αh)²/12.
    values = pareto(np.random.default_rng(4), alpha, (4000,))
    got = hill_of(histogram_of(values))
    plain = float(hill(values, got.exceedances).alpha)
    bound = 4.5 * alpha * WIDTH / math.sqrt(12 * got.exceedances) + (alpha * WIDTH) ** 2 / 12
    # Besides, the threshold is a bucket's end here, and the (k+1)-th largest there: at most two places of 1/(αk) apart.
    assert got.alpha == pytest.approx(plain, rel=bound + 10 / got.exceedances)


@pytest.mark.parametrize("alpha", INDICES)
def test_a_window_of_steps_of_different_scale_is_pooled(alpha: float) -> None:
    # 32 steps of 64 norms, each step of a scale of its own over six decades. Above a threshold all steps' tails are
    # the same power, whatever they were divided by: bound 4.5 standard errors of about 205 exceedances.
    rng = np.random.default_rng(5)
    scales = 10.0 ** rng.uniform(-3, 3, (32, 1))
    sketch = sketch_rows((pareto(rng, alpha, (32, 64)) * scales).astype(np.float32))
    steps = [Histogram.from_sketch(sketch, row) for row in range(32)]
    together = pooled(steps)
    assert together.count == 32 * 64
    got = hill_of(together)
    assert 205 <= got.exceedances <= 205 * 1.6
    assert abs(got.alpha - alpha) < 4.5 * alpha / math.sqrt(205)
    # Added up as they are, the scales are a tail of their own, heavier than the examples'.
    merged = Histogram(schema=8)
    for step in steps:
        merged = merged.merge(step)
    mixed = hill_of(merged)
    assert mixed.alpha < alpha - 4 * mixed.standard_error


def test_normal_norms_have_no_power_tail() -> None:
    # 16 normal elements: the far half of the top tenth looks steeper than the top tenth, which no power does.
    rng = np.random.default_rng(6)
    norms = np.linalg.norm(rng.standard_normal((100_000, 16)), axis=1)
    histogram = histogram_of(norms)
    near, far = hill_of(histogram, 0.1), hill_of(histogram, 0.001)
    assert near.alpha > 10
    assert far.alpha > near.alpha + 4 * math.hypot(near.standard_error, far.standard_error)


@given(st.dictionaries(st.integers(-50, 50), st.integers(1, 9), min_size=2, max_size=9), st.integers(-500, 500))
def test_shifting_changes_nothing(counts: dict[int, int], buckets: int) -> None:
    histogram = Histogram(positive_index=sorted(counts), positive_count=[counts[i] for i in sorted(counts)])
    assert hill_of(histogram.shifted(buckets)) == hill_of(histogram)
    assert pooled([histogram.shifted(buckets)]) == pooled([histogram])


def test_the_threshold_is_the_highest_with_the_share_above_it() -> None:
    histogram = Histogram(positive_index=(0, 4, 5, 6), positive_count=(80, 11, 4, 5))
    assert [hill_of(histogram, share).exceedances for share in (0.05, 0.06, 0.09, 0.1, 0.2, 0.3)] == [
        5,
        9,
        9,
        20,
        20,
        100,
    ]


def test_in_one_bucket_the_index_is_infinite() -> None:
    assert hill_of(Histogram(positive_index=(3,), positive_count=(9,))) == Tail(math.inf, math.inf, 9)


def test_zeros_have_no_tail() -> None:
    for histogram in (Histogram(), Histogram(zero_count=95, positive_index=(1,), positive_count=(5,))):
        got = hill_of(histogram)
        assert math.isnan(got.alpha)
        assert math.isnan(got.standard_error)
    assert got.exceedances == 5


@pytest.mark.parametrize("share", [0.0, 1.0, 10])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=rf"needs 0 < share < 1, got share={share}; \.05 to \.1 is usual"):
        hill_of(Histogram(), share)


def test_a_step_whose_median_is_zero_has_no_unit() -> None:
    step = Histogram(positive_index=(8, 16), positive_count=(3, 1))
    dead = Histogram(zero_count=3, positive_index=(100,), positive_count=(3,))
    assert pooled([step, dead, Histogram()]) == pooled([step])
    assert pooled([]).count == 0


@given(st.lists(st.floats(2.0**-15, 2.0**15, width=32), min_size=1, max_size=9))
def test_one_is_the_end_of_the_medians_bucket(values: list[float]) -> None:
    median = sorted(values)[(len(values) - 1) // 2]
    step = histogram_of(np.array(values, np.float32))
    assert 2 ** (-1 / 8) < pooled([step]).quantile(0.5) < 1
    assert step.quantile(0.5) == pytest.approx(median, rel=2 ** (1 / 16) - 1)
