import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import NoiseSums, noise_sums
from gradiometer.stats_core.two_batch import (
    clustering,
    micro_batch_sums,
    sums_of_means,
    sums_of_moments,
    two_batch_sums,
)
from tests.strategies import gradient_batches

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}


def sq(x: np.ndarray) -> float:
    return math.fsum(float(v) * float(v) for v in np.ravel(x))


def loop_sums(parts: Sequence[np.ndarray]) -> dict[str, float]:
    """By the definition: every micro-batch's mean against the mean of all, one at a time."""
    batch = sum(len(part) for part in parts)
    mean = sum(g for part in parts for g in part.astype(np.float64)) / batch
    trace = sum(len(part) * sq(part.astype(np.float64).mean(0) - mean) for part in parts) / (len(parts) - 1)
    return {
        "mean_sq_norm": sq(mean),
        "variance_trace": trace,
        "batch_variance": trace / batch,
        "grad_sq_norm": sq(mean) - trace / batch,
        "sq_norm_mean": sq(mean) - trace / batch + trace,
    }


def loop_clustering(parts: Sequence[np.ndarray]) -> float:
    within = sum(sq(g - part.mean(0)) for part in parts for g in part)
    return loop_sums(parts)["variance_trace"] / (within / (sum(map(len, parts)) - len(parts)))


def split(grads: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    return np.split(grads, sorted(set(cuts)))


def all_forms(parts: Sequence[np.ndarray]) -> dict[str, NoiseSums]:
    means, sizes = [part.mean(0) for part in parts], [len(part) for part in parts]
    norms = np.array([sq(mean) for mean in means])
    return {
        "norms": micro_batch_sums(norms, np.array(sizes), sq(np.concatenate(parts).mean(0))),
        "means": sums_of_means(means, sizes),
        "moments": sums_of_moments([Moments.from_per_example(part) for part in parts]),
    }


@given(gradient_batches(min_examples=3), st.data())
def test_all_forms_agree_with_the_float64_loop_under_any_sizes(grads: np.ndarray, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(1, len(grads) - 1), min_size=1))
    parts = split(grads, cuts)
    want = loop_sums(parts)
    for form, found in all_forms(parts).items():
        for name, value in found._asdict().items():
            size = want["mean_sq_norm"] * len(grads) + want["variance_trace"]
            assert value == pytest.approx(want[name], rel=1e-9, abs=1e-12 * size), (form, name)


@given(gradient_batches(min_examples=2))
def test_micro_batches_of_one_example_give_what_per_example_gradients_give(grads: np.ndarray) -> None:
    want = noise_sums(Moments.from_per_example(grads))
    for found in all_forms(list(grads[:, None])).values():
        for a, b in zip(found, want, strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-11 * want.sq_norm_mean)


@given(gradient_batches(min_examples=4, max_examples=4))
def test_two_halves_of_a_batch_are_two_batch_sizes(grads: np.ndarray) -> None:
    parts = split(grads, [2])
    small = (sq(parts[0].mean(0)) + sq(parts[1].mean(0))) / 2
    found = two_batch_sums(small, 2, sq(grads.mean(0)), 4)
    for a, b in zip(found, sums_of_means([part.mean(0) for part in parts], [2, 2]), strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-11 * small)


def test_known_means_give_known_sums() -> None:
    # (1, 0) and (3, 0) of four examples each: deviations of 1, so tr = 4·(1 + 1)/1 = 8, P = 1, |G|² = 4 - 1.
    want = NoiseSums(mean_sq_norm=4.0, sq_norm_mean=11.0, variance_trace=8.0, batch_variance=1.0, grad_sq_norm=3.0)
    assert sums_of_means([np.array([1.0, 0.0]), np.array([3.0, 0.0])], [4, 4]) == want
    assert two_batch_sums((1.0 + 9.0) / 2, 4, 4.0, 8) == want
    assert micro_batch_sums(np.array([1.0, 9.0]), np.array([4, 4]), 4.0) == want


def test_what_is_formed_from_norms_of_several_layers_has_their_shape() -> None:
    norms = np.array([[1.0, 5.0], [9.0, 5.0]])
    found = micro_batch_sums(norms, np.array([4, 4]), np.array([4.0, 5.0]))
    assert found.variance_trace.tolist() == [8.0, 0.0]
    assert two_batch_sums(norms.mean(0), 4, np.array([4.0, 5.0]), 8).variance_trace.tolist() == [8.0, 0.0]


@given(gradient_batches(min_examples=5), st.integers(0, 10**6), st.floats(-100, 100))
def test_order_changes_nothing_a_shift_no_variance_and_a_factor_squares(
    grads: np.ndarray, seed: int, factor: float
) -> None:
    parts = split(grads, [1, 3])
    base = all_forms(parts)
    order = np.random.default_rng(seed).permutation(len(parts))
    size = sq(grads)
    for form, found in all_forms([parts[k] for k in order]).items():
        for a, b in zip(found, base[form], strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-11 * size)
    for form, found in all_forms([factor * part for part in parts]).items():
        for a, b in zip(found, base[form], strict=True):
            assert a == pytest.approx(factor**2 * b, rel=1e-9, abs=1e-11 * factor**2 * size)
    for form, found in all_forms([part + np.abs(grads).max() for part in parts]).items():
        assert found.variance_trace == pytest.approx(base[form].variance_trace, abs=1e-9 * size)


@given(gradient_batches(min_examples=5))
def test_the_variance_of_means_is_never_negative(grads: np.ndarray) -> None:
    parts = split(grads, [2])
    for found in (sums_of_means([p.mean(0) for p in parts], [2, 3]), sums_of_moments(moments_of(parts))):
        assert found.variance_trace >= 0
        assert found.batch_variance >= 0


def moments_of(parts: Sequence[np.ndarray]) -> list[Moments]:
    return [Moments.from_per_example(part) for part in parts]


def test_parameters_add_up_to_all_as_one() -> None:
    parts = split(np.random.default_rng(0).standard_normal((7, 6)), [3, 5])
    whole = sums_of_moments(moments_of(parts))
    several = [sums_of_moments(moments_of([part[:, columns] for part in parts])) for columns in (slice(2), slice(2, 6))]
    for one, a, b in zip(whole, *several, strict=True):
        assert a + b == pytest.approx(one, rel=1e-12)
    assert sum(clustering(moments_of([part[:, c : c + 1] for part in parts])).within for c in range(6)) == (
        pytest.approx(clustering(moments_of(parts)).within, rel=1e-12)
    )


@pytest.mark.parametrize("cuts", [[4], [2, 4, 6], [1, 3]])
def test_the_pair_is_unbiased_for_equal_and_unequal_micro_batches(cuts: list[int]) -> None:
    # g ~ N(G, I/16·T), T = 2, |G|² = .5, 8 examples, 6,000 batches. z-bounds of 4: false alarm 6e-5 each.
    rng = np.random.default_rng(len(cuts))
    goal = np.zeros(16)
    goal[0] = math.sqrt(0.5)
    found = []
    for _ in range(6000):
        grads = rng.standard_normal((8, 16)) * math.sqrt(2 / 16) + goal
        parts = split(grads, cuts)
        found.append(sums_of_means([p.mean(0) for p in parts], [len(p) for p in parts]))
    for name, truth in [
        ("variance_trace", 2.0),
        ("grad_sq_norm", 0.5),
        ("batch_variance", 0.25),
        ("sq_norm_mean", 2.5),
    ]:
        values = np.array([getattr(f, name) for f in found])
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values)), name


def test_the_weighted_pair_is_unbiased_where_examples_have_one_covariance() -> None:
    rng = np.random.default_rng(9)
    weights = np.array([1.0, 5.0, 2.0, 0.0, 1.0, 3.0])
    share = weights / weights.sum()
    found, clusters = [], []
    for _ in range(6000):
        grads = rng.standard_normal((6, 8)) / math.sqrt(8) + 0.25
        parts = [Moments.from_per_example(grads[at], weights[at]) for at in (slice(2), slice(2, 6))]
        found.append(sums_of_moments(parts))
        clusters.append(clustering(parts))
    for name, truth in [("variance_trace", 1.0), ("batch_variance", float((share**2).sum())), ("grad_sq_norm", 0.5)]:
        values = np.array([getattr(f, name) for f in found])
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values)), name
    within = np.array([c.within for c in clusters])
    assert abs(within.mean() - 1.0) < 4 * within.std() / math.sqrt(len(within))


def test_spread_against_per_example_gradients_is_what_the_module_says() -> None:
    # Isotropic, p elements, B = 8, b = 4, B|G|² = .3 T. With s² = T/(4p) the variance of a half's mean per element:
    # one half  tr: 64·(1.5 p s⁴ + 2|G|²s²) = (6T² + 32|G|²T)/p     |G|²: 2ps⁴ + 4|G|²s²
    # both      tr: 2T²/p                                           |G|²: ps⁴ + 2|G|²s²
    # examples  tr: 2T²/(7p)                                        |G|²: 2T²/(56p) + |G|²T/(2p)
    p, goal_sq = 64, 0.3 / 8
    tr = {"one": (6 + 32 * goal_sq) / p, "both": 2 / p, "examples": 2 / (7 * p)}
    signal = {"one": (1 / 8 + goal_sq) / p, "both": (1 / 16 + goal_sq / 2) / p, "examples": (1 / 28 + goal_sq / 2) / p}
    assert math.sqrt(tr["one"] / tr["examples"]) == pytest.approx(5.0, abs=0.05)
    assert math.sqrt(tr["both"] / tr["examples"]) == pytest.approx(2.6, abs=0.05)
    assert math.sqrt(signal["one"] / signal["examples"]) == pytest.approx(1.7, abs=0.05)
    assert math.sqrt(signal["both"] / signal["examples"]) == pytest.approx(1.2, abs=0.05)
    rng = np.random.default_rng(11)
    goal = np.zeros(p)
    goal[0] = math.sqrt(goal_sq)
    found: dict[str, list[NoiseSums]] = {name: [] for name in tr}
    for _ in range(4000):
        grads = rng.standard_normal((8, p)) / math.sqrt(p) + goal
        halves = [grads[:4].mean(0), grads[4:].mean(0)]
        found["one"].append(two_batch_sums(halves[0] @ halves[0], 4, sq(grads.mean(0)), 8))
        found["both"].append(sums_of_means(halves, [4, 4]))
        found["examples"].append(noise_sums(Moments.from_per_example(grads)))
    # A variance of 4,000 near-normal values is within 4·sqrt(2/4000) = 9 %; heavier tails (kurtosis 6): 14 %.
    for name, values in found.items():
        assert np.var([v.variance_trace for v in values]) == pytest.approx(tr[name], rel=0.14), name
        assert np.var([v.grad_sq_norm for v in values]) == pytest.approx(signal[name], rel=0.14), name


@given(gradient_batches(min_examples=5))
def test_clustering_agrees_with_the_float64_loop(grads: np.ndarray) -> None:
    parts = split(grads, [2])
    assert clustering(moments_of(parts)).ratio == pytest.approx(loop_clustering(parts), rel=1e-6)


@pytest.mark.parametrize(("correlation", "want"), [(0.0, 1.0), (0.2, 2.0)])
def test_clustering_is_1_for_independent_examples_and_grows_with_what_a_micro_batch_shares(
    correlation: float, want: float
) -> None:
    # 1 + bρ/(1 - ρ) with b = 4. Ratio of sums over 800 steps of k = 4, 16 elements: relative sd about
    # sqrt(2/(3·16·800) + 2/(12·16·800)) = .8 %. Bound 4 sd: false alarm 6e-5.
    rng = np.random.default_rng(12)
    between, within = 0.0, 0.0
    for _ in range(800):
        shared = rng.standard_normal((4, 1, 16)) * math.sqrt(correlation)
        grads = rng.standard_normal((4, 4, 16)) * math.sqrt(1 - correlation) + shared + 3.0
        found = clustering(moments_of(list(grads)))
        between, within = between + found.between, within + found.within
    assert between / within == pytest.approx(want, rel=0.032)


def test_stratified_micro_batches_differ_by_less_than_their_examples() -> None:
    parts = [np.array([[-1.0], [1.0]]), np.array([[-1.0], [1.0]])]
    assert clustering(moments_of(parts)).ratio == 0.0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_and_jit_give_the_same_sums(framework: str) -> None:
    rng = np.random.default_rng(13)
    raw = [rng.standard_normal((n, 9)).astype(np.float32) for n in (2, 4, 3)]
    weights = [rng.uniform(0.5, 2.0, len(part)).astype(np.float32) for part in raw]
    make = FRAMEWORKS[framework]

    def formed(parts: list[object], weights: list[object]) -> tuple[NoiseSums, ...]:
        plain = [Moments.from_per_example(part) for part in parts]
        heavy = [Moments.from_per_example(part, a) for part, a in zip(parts, weights, strict=True)]
        return sums_of_moments(plain), sums_of_moments(heavy), clustering(plain), clustering(heavy)

    want = formed(raw, weights)
    functions = [formed, jax.jit(formed)] if framework == "jax" else [formed]
    for function in functions:
        for a, b in zip(function([make(p) for p in raw], [make(w) for w in weights]), want, strict=True):
            assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=1e-5, abs=1e-5)


def test_traced_sizes_that_leave_nothing_to_compare_give_nan() -> None:
    found = jax.jit(two_batch_sums)(3.0, jnp.asarray(8), 2.0, jnp.asarray(8))
    assert np.isnan(float(found.variance_trace))
    means = [jnp.ones(2), jnp.zeros(2)]
    found = jax.jit(lambda b: sums_of_means(means, [b, 0 * b]))(jnp.asarray(4.0))
    assert np.isnan(float(found.variance_trace))
    assert float(found.mean_sq_norm) == 2.0


def test_an_empty_micro_batch_is_passed_over() -> None:
    parts = moments_of(split(np.random.default_rng(1).standard_normal((6, 3)), [2]))
    empty = parts[0]._replace(count=0, weight_sum=0.0, weight_sq_sum=0.0, mean=np.zeros(3), m2=np.zeros(3))
    assert sums_of_moments([*parts, empty]) == sums_of_moments(parts)
    assert clustering([*parts, empty]) == clustering(parts)
    norms, sizes = np.array([1.0, 9.0, np.nan]), np.array([4, 4, 0])
    assert micro_batch_sums(norms, sizes, 4.0) == micro_batch_sums(norms[:2], sizes[:2], 4.0)


def test_single_examples_have_no_variance_within() -> None:
    found = clustering(moments_of([np.array([[1.0]]), np.array([[2.0]])]))
    assert found.between == 0.5
    assert np.isnan(found.within)
    assert np.isnan(found.ratio)


def test_equal_gradients_have_no_ratio() -> None:
    found = clustering(moments_of([np.full((3, 2), 0.5), np.full((4, 2), 0.5)]))
    assert (found.between, found.within) == (0.0, 0.0)
    assert np.isnan(found.ratio)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_nan_among_the_means_shows_in_the_sums(poison: float) -> None:
    with np.errstate(invalid="ignore"):
        found = sums_of_means([np.array([poison, 1.0]), np.array([2.0, 1.0])], [2, 2])
    assert not np.isfinite([found.variance_trace, found.grad_sq_norm]).any()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_means_of_5000_float32_elements_survive_extreme_scales(framework: str, scale: float) -> None:
    raw = [
        (np.random.default_rng(seed).standard_normal((n, 5000)) * scale).astype(np.float32)
        for seed, n in enumerate((2, 4))
    ]
    want = loop_sums(raw)["variance_trace"]
    parts = [Moments.from_per_example(FRAMEWORKS[framework](part)) for part in raw]
    exponent = round(math.log2(scale))
    found = sums_of_moments([part.in_unit(exponent) for part in parts])
    assert float(found.variance_trace) * 4.0**exponent == pytest.approx(want, rel=1e-5)
    if framework != "jax":
        assert float(sums_of_moments(parts).variance_trace) == pytest.approx(want, rel=1e-5)


def test_sizes_that_leave_nothing_to_compare_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 < small < big, got small=8, big=8; compare a part of the batch"):
        two_batch_sums(1.0, 8, 1.0, 8)
    with pytest.raises(ValueError, match=r"got small=0, big=8"):
        two_batch_sums(1.0, 0, 1.0, 8)


def test_one_micro_batch_is_refused() -> None:
    one = Moments.from_per_example(np.ones((2, 2)))
    for who, call in {
        "micro_batch_sums": lambda: micro_batch_sums(np.ones(1), np.ones(1), 1.0),
        "sums_of_means": lambda: sums_of_means([np.ones(2)], [1]),
        "sums_of_moments": lambda: sums_of_moments([one]),
        "clustering": lambda: clustering([one]),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{who} needs at least two micro-batches .* got micro-batches=1, sizes=1"
        ):
            call()
    with pytest.raises(ValueError, match=r"a size for each, got micro-batches=2, sizes=3"):
        sums_of_means([np.ones(2), np.ones(2)], [1, 1, 1])
