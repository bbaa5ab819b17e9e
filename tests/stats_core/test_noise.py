import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.arrays import unit_exponent
from gradiometer.stats_core.moments import Moments, variance
from gradiometer.stats_core.noise import noise_of_parts, noise_sums
from tests.reference import loop_layer
from tests.strategies import gradient_batches

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}


@given(gradient_batches())
def test_the_sums_agree_with_the_float64_loop(grads: np.ndarray) -> None:
    got, want = noise_sums(Moments.from_per_example(grads)), loop_layer([list(grads)])
    size = want["sq_norm_mean"]
    for name, value in got._asdict().items():
        assert value == pytest.approx(want[name], rel=1e-9, abs=1e-10 * size), name


@given(gradient_batches())
def test_trace_is_the_sum_of_the_elements_variance(grads: np.ndarray) -> None:
    moments = Moments.from_per_example(grads)
    assert noise_sums(moments).variance_trace == pytest.approx(variance(moments).sum(), rel=1e-9)


@given(gradient_batches())
def test_equal_weights_are_no_weights(grads: np.ndarray) -> None:
    plain = noise_sums(Moments.from_per_example(grads))
    weighted = noise_sums(Moments.from_per_example(grads, np.full(len(grads), 3.0)))
    for a, b in zip(plain, weighted, strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-9 * plain.sq_norm_mean)


def test_the_plain_pair_is_unbiased() -> None:
    # g ~ N(G, I) in 16 elements, |G|^2 = 4, B = 8, 4,000 batches. sd of |G|^2-hat is about
    # sqrt(4*4/8 + 2*16/(8*7)) = 1.60, of the mean .0254; of the trace sqrt(2*16/7)/63.2 = .0338. Bound 4 sd: 6e-5 each.
    rng = np.random.default_rng(7)
    direction = np.zeros(16)
    direction[0] = 2.0
    found = [noise_sums(Moments.from_per_example(rng.standard_normal((8, 16)) + direction)) for _ in range(4000)]
    assert abs(np.mean([f.grad_sq_norm for f in found]) - 4.0) < 0.102
    assert abs(np.mean([f.variance_trace for f in found]) - 16.0) < 0.136
    assert abs(np.mean([f.batch_variance for f in found]) - 2.0) < 0.017


def test_the_weighted_pair_is_unbiased_where_the_examples_covariances_differ() -> None:
    # Token means: weight ~ T_i, Cov g_i = S/T_i. Truth: |G|^2 = .1 and Var(mean) = sum w^2 * trS/T.
    rng = np.random.default_rng(8)
    lengths = np.array([1, 2, 4, 8, 16, 32, 64, 128] * 2, float)
    goal = np.zeros(16)
    goal[0] = np.sqrt(0.1)
    found = []
    for _ in range(6000):
        grads = rng.standard_normal((16, 16)) / 4 / np.sqrt(lengths)[:, None] + goal
        found.append(noise_sums(Moments.from_per_example(grads, lengths)))
    share = lengths / lengths.sum()
    truth = float((share**2 / lengths).sum())
    signal = np.array([f.grad_sq_norm for f in found])
    spread = np.array([f.batch_variance for f in found])
    # z-bounds of 4 from the draws themselves: false alarm 6e-5 each.
    assert abs(signal.mean() - 0.1) < 4 * signal.std() / np.sqrt(len(found))
    assert abs(spread.mean() - truth) < 4 * spread.std() / np.sqrt(len(found))


def test_one_example_has_a_norm_but_no_variance() -> None:
    sums = noise_sums(Moments.from_per_example(np.array([[3.0, 4.0]])))
    assert sums.mean_sq_norm == 25.0
    assert np.isnan([sums.variance_trace, sums.batch_variance, sums.grad_sq_norm]).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 1.0, 4.0, 1.0]])
def test_every_framework_and_jit_give_the_same_sums(framework: str, weights: list[float] | None) -> None:
    grads = np.random.default_rng(5).standard_normal((6, 40)).astype(np.float32) + 1
    want = loop_layer([list(grads)], weights)
    make = FRAMEWORKS[framework]
    args = (make(grads),) if weights is None else (make(grads), make(np.array(weights, np.float32)))
    functions = [lambda *a: noise_sums(Moments.from_per_example(*a))]
    for function in functions + ([jax.jit(functions[0])] if framework == "jax" else []):
        for name, value in function(*args)._asdict().items():
            # float32 in jax: 40 elements and 6 examples of some units, whose sums are about 80
            assert float(value) == pytest.approx(want[name], rel=1e-5, abs=80 * 60 * 2.0**-24), name


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 1.0, 4.0, 1.0]])
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1.0, 1e9, 1e18])
def test_sums_over_5000_float32_elements_survive_extreme_scales(
    framework: str, weights: list[float] | None, scale: float
) -> None:
    grads = ((np.random.default_rng(0).standard_normal((6, 5000)) + 1) * scale).astype(np.float32)
    want = loop_layer([list(grads)], weights)
    make = FRAMEWORKS[framework]
    moments = Moments.from_per_example(make(grads), None if weights is None else make(np.array(weights, np.float32)))
    exponent = unit_exponent(moments.mean, squares=[moments.m2])
    sums = noise_sums(moments.in_unit(exponent))
    assert (int(exponent) != 0) == (scale in (1e-18, 1e18))
    if framework == "jax" and weights is not None and scale == 1e18:
        # Examples of unequal weight need their norms, which have no room in float32: said of Moments.sq_norms.
        assert not math.isfinite(float(sums.batch_variance))
        assert float(sums.mean_sq_norm) * 4.0 ** int(exponent) == pytest.approx(want["mean_sq_norm"], rel=2e-5)
        return
    in_unit = {name: float(value) * 4.0 ** int(exponent) for name, value in sums._asdict().items()}
    direct = {name: float(value) for name, value in noise_sums(moments)._asdict().items()}
    for found in [in_unit] + ([direct] if framework != "jax" else []):  # float64 needs no unit
        for name, value in found.items():
            # 1e-18: squares below 2**-126 are lost in jax, 3e-4 of a normal variable's
            bound = 1e-3 if (framework, scale) == ("jax", 1e-18) else 1e-4 if name == "grad_sq_norm" else 2e-5
            assert value == pytest.approx(want[name], rel=bound), name


def test_where_float32_squares_overflow_the_sums_are_infinite_and_not_garbage() -> None:
    grads = np.random.default_rng(0).standard_normal((512, 3)).astype(np.float32) * np.float32(2e18)
    sums = noise_sums(Moments.from_per_example(torch.as_tensor(grads)))
    assert (float(sums.variance_trace), float(sums.grad_sq_norm)) == (math.inf, -math.inf)
    assert math.isfinite(float(sums.mean_sq_norm))


@given(gradient_batches(), st.integers(0, 10**6))
def test_the_mean_squared_norm_is_that_of_the_mean_and_of_the_deviations(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.1, 5.0, len(grads))
    moments = Moments.from_per_example(grads, weights)
    want = math.fsum(a / math.fsum(weights) * n for a, n in zip(weights, moments.sq_norms, strict=True))
    assert noise_sums(moments).sq_norm_mean == pytest.approx(want, rel=1e-12)


def test_examples_of_equal_weight_need_no_norms() -> None:
    moments = Moments.from_per_example(np.random.default_rng(0).standard_normal((5, 7)))
    without = moments._replace(sq_norms=np.full(5, np.nan))
    assert noise_sums(without) == noise_sums(moments)


@given(gradient_batches(min_examples=3), st.integers(0, 10**6))
def test_the_sums_of_parameters_add_up_to_those_of_all_as_one(grads: np.ndarray, seed: int) -> None:
    flat = grads.reshape(len(grads), -1)
    weights = np.random.default_rng(seed).uniform(0.1, 5.0, len(grads))
    for a in (None, weights):
        whole = noise_sums(Moments.from_per_example(flat, a))
        parts = [noise_sums(Moments.from_per_example(p, a)) for p in np.split(flat, [1], axis=1)]
        for one, *several in zip(whole, *parts, strict=True):
            assert sum(several) == pytest.approx(one, rel=1e-9, abs=1e-11 * whole.sq_norm_mean)


@given(gradient_batches(), st.integers(0, 10**6), st.floats(-100, 100))
def test_a_permutation_changes_nothing_a_shift_no_variance_and_a_factor_squares(
    grads: np.ndarray, seed: int, factor: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 5.0, len(grads))
    order = rng.permutation(len(grads))
    base = noise_sums(Moments.from_per_example(grads, weights))
    size = base.sq_norm_mean
    for a, b in zip(noise_sums(Moments.from_per_example(grads[order], weights[order])), base, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-11 * size)
    for a, b in zip(noise_sums(Moments.from_per_example(factor * grads, weights)), base, strict=True):
        assert a == pytest.approx(factor**2 * b, rel=1e-9, abs=1e-11 * factor**2 * size)
    plain, shifted = (noise_sums(Moments.from_per_example(g)) for g in (grads, grads + np.abs(grads).max()))
    for name in ("variance_trace", "batch_variance"):
        assert getattr(shifted, name) == pytest.approx(getattr(plain, name), abs=1e-9 * shifted.sq_norm_mean)


def test_a_shift_leaves_the_weighted_variance_alone_on_average_only() -> None:
    # The price of holding for examples of unequal covariance: the spread grows with the mean. z-bound 4: 6e-5.
    rng = np.random.default_rng(6)
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    truth = float(((weights / weights.sum()) ** 2).sum())
    found: dict[float, list[float]] = {0.0: [], 10.0: []}
    for shift, values in found.items():
        for _ in range(4000):
            grads = rng.standard_normal((4, 1)) + shift
            values.append(noise_sums(Moments.from_per_example(grads, weights)).batch_variance)
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(4000)
    # A mean of c adds 2c/(1 - s2)·Σ(wᵢ² - s2·wᵢ)gᵢ, of mean 0 and variance (20/.7)²·.0024 = 1.96 (4 sd of it: 9 %).
    assert np.var(found[10.0]) - np.var(found[0.0]) == pytest.approx(1.96, rel=0.1)


def test_many_parameters_at_once_give_what_each_gives_alone() -> None:
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 2.0, 6)
    for a in (None, weights):
        moments = [Moments.from_per_example(rng.standard_normal((6, size)), a) for size in (3, 5)]
        together = noise_of_parts(
            np.array([(m.mean**2).sum() for m in moments]),
            np.array([m.m2.sum() for m in moments]),
            np.stack([m.sq_norms for m in moments]),
            moments[0],
        )
        for place, one in enumerate(moments):
            for whole, alone in zip(together, noise_sums(one), strict=True):
                assert whole[place] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 3.0]])
def test_a_nan_among_the_examples_shows_in_the_sums(weights: list[float] | None) -> None:
    grads = np.array([[1.0, 2.0], [np.nan, 4.0], [5.0, 9.0]])
    sums = noise_sums(Moments.from_per_example(grads, None if weights is None else np.array(weights)))
    assert np.isnan(list(sums)).all()


def test_a_traced_count_of_one_gives_nan_for_what_does_not_exist() -> None:
    moments = Moments.from_per_example(jnp.ones((1, 2)))._replace(count=jnp.asarray(1.0))
    sums = jax.jit(noise_sums)(moments)
    assert float(sums.mean_sq_norm) == 2.0
    assert np.isnan([float(sums.variance_trace), float(sums.batch_variance), float(sums.grad_sq_norm)]).all()
