import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.moments import Moments, standard_error, variance
from tests.reference import loop_moments, relative_error
from tests.strategies import gradient_batches
from tests.tolerances import LEAST, m2_error, mean_error, merged_m2_error, square_sum_error

FRAMEWORKS = {
    "numpy": lambda grads: grads,
    "torch": torch.as_tensor,
    "jax": jnp.asarray,
}


def close(left: Moments, right: Moments, tolerance: float = 1e-9) -> bool:
    scale = float(np.linalg.norm(left.m2)) or 1.0
    size = float(np.linalg.norm(left.mean)) or 1.0
    return (
        left.count == right.count
        and float(np.linalg.norm(left.m2 - right.m2)) <= tolerance * scale
        and float(np.linalg.norm(left.mean - right.mean)) <= tolerance * size
    )


@given(gradient_batches(min_examples=1))
def test_one_pass_agrees_with_the_float64_loop(grads: np.ndarray) -> None:
    got, want = Moments.from_per_example(grads), loop_moments(list(grads))
    assert (got.count, got.weight_sum, got.weight_sq_sum) == (want.count, want.weight_sum, want.weight_sq_sum)
    assert relative_error(got.mean, want.mean) <= 1e-12
    assert relative_error(got.sq_norms, want.sq_norms) <= 1e-12
    if len(grads) > 1:
        assert relative_error(got.m2, want.m2) <= 1e-12 * want.kappa


@given(gradient_batches(), st.integers(0, 10**6))
def test_weighted_moments_agree_with_the_float64_loop(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.1, 5.0, len(grads))
    got, want = Moments.from_per_example(grads, weights), loop_moments(list(grads), list(weights))
    assert relative_error(got.mean, want.mean) <= 1e-12
    assert relative_error(got.m2, want.m2) <= 1e-12 * want.kappa
    assert got.weight_sq_sum == pytest.approx(want.weight_sq_sum, rel=1e-12)


def loop_dots_and_signs(grads: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """⟨gᵢ, ḡ⟩ and Σwᵢ sign gᵢ, one example and one element at a time."""
    mean = sum(a * g for a, g in zip(weights, grads, strict=True)) / math.fsum(weights)
    dots = np.array([math.fsum(x * y for x, y in zip(g.ravel(), mean.ravel(), strict=True)) for g in grads])
    signs = np.zeros(grads.shape[1:])
    for a, g in zip(weights, grads, strict=True):
        for at, x in np.ndenumerate(g):
            signs[at] += a / math.fsum(weights) * (1 if x > 0 else -1 if x < 0 else 0)
    return dots, signs


@given(gradient_batches(min_examples=1), st.integers(0, 10**6))
def test_dots_and_signs_agree_with_the_float64_loop(grads: np.ndarray, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.1, 5.0, len(grads))
    got = Moments.from_per_example(grads, weights, dots=True, sign_mean=True)
    dots, signs = loop_dots_and_signs(grads, weights)
    size = np.sqrt(got.sq_norms) * np.linalg.norm(got.mean)  # what cancels in a dot product is of this size
    assert (np.abs(got.dots - dots) <= 1e-13 * size).all()
    assert np.abs(got.sign_mean - signs).max() <= 1e-14


def test_dots_and_signs_are_computed_on_request_only() -> None:
    plain = Moments.from_per_example(np.ones((3, 2)))
    assert plain.dots is None
    assert plain.sign_mean is None
    assert Moments.from_per_example(np.ones((3, 2)), dots=True).sign_mean is None
    assert Moments.from_per_example(np.ones((3, 2)), sign_mean=True).dots is None


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dots_average_to_the_squared_norm_of_the_mean_and_signs_count_their_votes(framework: str) -> None:
    grads = FRAMEWORKS[framework](np.array([[3.0, -1.0, 0.0], [1.0, -2.0, 0.0], [-1.0, -3.0, 0.0]]))
    got = Moments.from_per_example(grads, dots=True, sign_mean=True)
    assert np.asarray(got.dots).tolist() == [5.0, 5.0, 5.0]  # mean (1, -2, 0), of squared norm 5
    assert np.asarray(got.sign_mean) == pytest.approx([1 / 3, -1.0, 0.0], rel=1e-6)


@given(gradient_batches(), st.integers(0, 10**6))
def test_dots_follow_their_examples_and_signs_do_not_mind_the_order(grads: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(grads))
    base = Moments.from_per_example(grads, dots=True, sign_mean=True)
    mixed = Moments.from_per_example(grads[order], dots=True, sign_mean=True)
    assert (np.abs(mixed.dots - base.dots[order]) <= 1e-13 * np.sqrt(mixed.sq_norms) * np.linalg.norm(base.mean)).all()
    assert np.abs(mixed.sign_mean - base.sign_mean).max() <= 1e-14


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("factor", [3.0, -0.5, 0.0])
def test_scaling_keeps_the_sign_mean_and_a_negative_factor_turns_it_over(framework: str, factor: float) -> None:
    values = np.array([[3.0, -1.0], [1.0, -2.0], [-1.0, -3.0]])
    make = FRAMEWORKS[framework]
    for given_factor in (factor, make(np.asarray(factor))):
        got = Moments.from_per_example(make(values), dots=True, sign_mean=True).scaled(given_factor)
        want = Moments.from_per_example(make(factor * values), dots=True, sign_mean=True)
        for field in ("mean", "m2", "sq_norms", "dots", "sign_mean"):
            assert np.asarray(getattr(got, field)) == pytest.approx(np.asarray(getattr(want, field)), rel=1e-6), field


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_nan_stays_in_the_dots_and_signs_that_it_touches(framework: str) -> None:
    grads = FRAMEWORKS[framework](np.array([[1.0, 2.0], [np.nan, 4.0]]))
    got = Moments.from_per_example(grads, sign_mean=True)
    assert np.isnan(np.asarray(got.sign_mean)).tolist() == [True, False]


RATIOS = [1e-3, 1.0, 1e2, 1e3, 1e4]  # of the mean to the standard deviation


def float32_batch(batch: int, ratio: float, elements: int = 200) -> np.ndarray:
    """Normal gradients, deviations of 1 about means of plus or minus the ratio."""
    rng = np.random.default_rng([batch, round(1e6 * ratio)])
    return (rng.standard_normal((batch, elements)) + ratio * rng.choice([-1, 1], elements)).astype(np.float32)


@pytest.mark.parametrize(("framework", "batch"), [*itertools.product(FRAMEWORKS, [2, 8, 64, 256]), ("jit", 64)])
@pytest.mark.parametrize("ratio", [*RATIOS, 1e6])  # the last is beyond what is promised
def test_float32_keeps_its_digits_where_the_mean_is_large(framework: str, batch: int, ratio: float) -> None:
    grads = float32_batch(batch, ratio)
    one_pass = jax.jit(Moments.from_per_example) if framework == "jit" else Moments.from_per_example
    got = one_pass(FRAMEWORKS.get(framework, jnp.asarray)(grads))
    want = loop_moments(list(grads))
    error = relative_error(np.asarray(got.m2), want.m2)
    assert error <= 1e-4  # what is promised
    assert error <= m2_error(grads.astype(np.float64), np.float32)  # what follows from the arithmetic
    assert relative_error(np.asarray(got.mean), want.mean) <= mean_error(grads.astype(np.float64), np.float32)
    wide = framework in ("numpy", "torch")
    bound = square_sum_error(np.float32, grads.shape[1], float64=wide)
    assert relative_error(np.asarray(got.sq_norms), want.sq_norms) <= bound
    assert (np.asarray(got.m2) >= 0).all()
    assert relative_error(np.asarray(variance(got)), want.m2 / (batch - 1)) <= 1e-4


@pytest.mark.parametrize(
    ("framework", "batch", "shards"),
    [*((f, *case) for f in FRAMEWORKS for case in [(2, 2), (8, 8), (64, 5)]), ("numpy", 256, 16), ("torch", 256, 16)],
)
@pytest.mark.parametrize("ratio", RATIOS)
def test_float32_merges_in_any_order_keep_their_digits(framework: str, batch: int, shards: int, ratio: float) -> None:
    grads = float32_batch(batch, ratio)
    rng = np.random.default_rng(shards)
    cuts = np.sort(rng.choice(np.arange(1, batch), shards - 1, replace=False))
    parts = [Moments.from_per_example(FRAMEWORKS[framework](part)) for part in np.split(grads, cuts)]
    while len(parts) > 1:  # two at random, so that large ones meet large ones too
        left, right = (parts.pop(rng.integers(len(parts))) for _ in range(2))
        parts.append(left.merge(right))
    want = loop_moments(list(grads))
    error = relative_error(np.asarray(parts[0].m2), want.m2)
    assert error <= (1e-4 if ratio <= 1e3 else 1e-3)  # what is promised
    assert error <= merged_m2_error(grads.astype(np.float64), shards, np.float32)  # what can't be passed
    assert relative_error(np.asarray(parts[0].mean), want.mean) <= (
        shards * 2.0**-24 + mean_error(grads.astype(np.float64), np.float32)
    )
    assert (np.asarray(parts[0].m2) >= 0).all()


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 30.0])
def test_half_precision_accumulates_in_float32(framework: str, ratio: float) -> None:
    values = float32_batch(512, ratio, 40)
    grads = jnp.asarray(values, jnp.bfloat16) if framework == "jax" else torch.as_tensor(values).to(torch.bfloat16)
    as_they_are = np.asarray(grads.astype(jnp.float32) if framework == "jax" else grads.float())
    got = Moments.from_per_example(grads, dots=True, sign_mean=True)
    assert {str(got.mean.dtype), str(got.m2.dtype), str(got.weights.dtype), str(got.sign_mean.dtype)} <= {
        "torch.float32",
        "float32",
    }
    want = loop_moments(list(as_they_are))
    assert relative_error(np.asarray(got.m2), want.m2) <= m2_error(as_they_are.astype(np.float64), "bfloat16")
    assert relative_error(np.asarray(got.mean), want.mean) <= mean_error(as_they_are.astype(np.float64), "bfloat16")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
def test_float32_moments_do_not_mind_the_scale(framework: str, scale: float) -> None:
    grads = (float32_batch(16, 1.0, 5000) * scale).astype(np.float32)
    got, want = Moments.from_per_example(FRAMEWORKS[framework](grads), dots=True), loop_moments(list(grads))
    lost = 16 * LEAST  # squares of deviations below 1e-19
    assert np.linalg.norm(np.asarray(got.m2) - want.m2) <= (
        m2_error(grads / scale, np.float32) * np.linalg.norm(want.m2) + lost * np.sqrt(5000)
    )
    assert relative_error(np.asarray(got.mean), want.mean) <= mean_error(grads / scale, np.float32)
    if framework != "jax" or scale < 1e18:  # there is no float64 for 5,000 squares of 1e18
        bound = square_sum_error(np.float32, 5000, float64=framework != "jax")
        assert (np.abs(np.asarray(got.sq_norms) - want.sq_norms) <= bound * want.sq_norms + 5000 * LEAST).all()
        dots = [math.fsum(g.astype(np.float64) * want.mean) for g in grads]
        size = np.sqrt(want.sq_norms) * np.linalg.norm(want.mean)
        assert (np.abs(np.asarray(got.dots) - dots) <= 2 * bound * size + 5000 * LEAST).all()
    else:
        assert np.isinf(np.asarray(got.sq_norms)).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_standard_error_has_room_where_its_square_has_none(framework: str) -> None:
    values = np.array([[3.0], [5.0]], np.float32) * np.float32(1e-19)  # s2 is 2e-38, over 2: 1e-38, below float32
    found = standard_error(Moments.from_per_example(FRAMEWORKS[framework](values)))
    assert np.asarray(found) == pytest.approx([1e-19], rel=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_merges_do_not_mind_the_scale(framework: str, scale: float) -> None:
    grads = (float32_batch(64, 1.0) * scale).astype(np.float32)
    left, right = (Moments.from_per_example(FRAMEWORKS[framework](part)) for part in (grads[:20], grads[20:]))
    want = loop_moments(list(grads)).m2
    assert np.linalg.norm(np.asarray(left.merge(right).m2) - want) <= (
        merged_m2_error(grads / scale, 2, np.float32) * np.linalg.norm(want) + 64 * LEAST * np.sqrt(want.size)
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_float32_squares_out_of_range_are_0_below_and_infinite_above(framework: str) -> None:
    values = np.random.default_rng(0).standard_normal((512, 3)).astype(np.float32)
    with np.errstate(over="ignore"):
        low, high = (Moments.from_per_example(FRAMEWORKS[framework](values * np.float32(s))) for s in (1e-24, 2e18))
    assert (np.asarray(low.m2) == 0).all()
    assert np.isposinf(np.asarray(high.m2)).all()
    assert np.isposinf(np.asarray(variance(high))).all()
    assert relative_error(np.asarray(high.mean), 2e18 * values.astype(np.float64).mean(0)) <= 1e-5


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("exponent", [-30, -1, 0, 20, 50])
def test_in_a_unit_moments_are_those_of_gradients_in_that_unit(framework: str, exponent: int) -> None:
    values = float32_batch(8, 1.0)
    make = FRAMEWORKS[framework]
    moments = Moments.from_per_example(make(values * np.float32(2.0**exponent)), dots=True, sign_mean=True)
    want = Moments.from_per_example(make(values), dots=True, sign_mean=True)
    for e in (exponent, make(np.asarray(exponent, np.int32))):
        got = moments.in_unit(e)
        for field in ("mean", "m2", "sq_norms", "dots", "sign_mean"):
            assert np.array_equal(np.asarray(getattr(got, field)), np.asarray(getattr(want, field))), field
    if framework == "jax":
        assert np.array_equal(jax.jit(Moments.in_unit)(moments, make(np.asarray(exponent))).m2, want.m2)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("factor", [1e-22, 1e22])
def test_a_factor_whose_square_is_out_of_range_scales_all_the_same(framework: str, factor: float) -> None:
    make = FRAMEWORKS[framework]
    moments = Moments.from_per_example(make(float32_batch(8, 1.0) / np.float32(factor) ** np.float32(0.5)))
    for given_factor in (factor, make(np.asarray(factor, np.float32))):
        got = np.asarray(moments.scaled(given_factor).m2, np.float64)
        assert got == pytest.approx(np.asarray(moments.m2, np.float64) * factor * factor, rel=1e-6)


def test_collecting_never_looks_at_a_value_on_the_host() -> None:
    grads, weights = torch.empty(4, 5, 9000, device="meta"), torch.empty(4, device="meta")
    for a in (None, weights):
        moments = Moments.from_per_example(grads, a, dots=True, sign_mean=True)  # looking at a value would raise
        assert moments.merge(moments).scaled(weights[0]).sign_mean.device.type == "meta"


@given(gradient_batches(min_examples=3), st.data())
def test_merging_shards_equals_one_pass_in_any_order(grads: np.ndarray, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(grads) - 1))
    whole = Moments.from_per_example(grads)
    left, right = Moments.from_per_example(grads[:cut]), Moments.from_per_example(grads[cut:])
    assert close(whole, left.merge(right))
    assert close(whole, right.merge(left))


@given(gradient_batches(min_examples=3))
def test_merge_is_associative(grads: np.ndarray) -> None:
    a, b, c = (Moments.from_per_example(part) for part in (grads[:1], grads[1:2], grads[2:]))
    assert close(a.merge(b).merge(c), a.merge(b.merge(c)))


def test_an_empty_side_is_the_identity_of_merge() -> None:
    moments = Moments.from_per_example(np.array([[1.0, 2.0], [3.0, 5.0]]))
    zeros = np.zeros(2)
    empty = Moments(0, 0.0, 0.0, zeros, zeros, np.zeros(0), np.zeros(0))
    assert close(moments, moments.merge(empty), 0.0)
    assert close(moments, empty.merge(moments), 0.0)
    assert empty.merge(empty).count == 0


def test_merged_sign_means_are_those_of_all_examples() -> None:
    def part(grads: np.ndarray) -> Moments:
        return Moments.from_per_example(grads, dots=True, sign_mean=True)

    grads = np.array([[1.0], [-2.0], [3.0], [4.0]])
    merged = part(grads[:1]).merge(part(grads[1:]))
    assert merged.sign_mean == pytest.approx([0.5])
    assert merged.dots is None  # those of the parts refer to other means
    with pytest.raises(ValueError, match="collect both with the same statistics"):
        part(grads).merge(Moments.from_per_example(grads))


@given(gradient_batches(), st.floats(-3, 3))
def test_variance_is_invariant_under_shift_and_permutation_and_scales_with_the_square(
    grads: np.ndarray, factor: float
) -> None:
    spread = float(np.abs(grads).max())
    base = variance(Moments.from_per_example(grads))
    size = float(np.linalg.norm(base)) or 1.0
    shifted = variance(Moments.from_per_example(grads + spread))
    assert np.linalg.norm(shifted - base) <= 1e-9 * max(size, spread**2 * 1e-6)
    permuted = variance(Moments.from_per_example(grads[::-1]))
    assert np.linalg.norm(permuted - base) <= 1e-9 * size
    scaled = variance(Moments.from_per_example(grads).scaled(factor))
    assert np.linalg.norm(scaled - factor**2 * base) <= 1e-9 * size * max(1.0, factor**2)


def test_variance_is_unbiased() -> None:
    # 4,000 batches of 5 from N(0, 9): the mean of s2 has sd 9*sqrt(2/4)/sqrt(4000) = .1006.
    # Bound 4 sd: false alarm 6e-5.
    grads = np.random.default_rng(1).normal(0, 3, (4000, 5, 1))
    found = np.mean([variance(Moments.from_per_example(batch))[0] for batch in grads])
    assert abs(found - 9.0) < 0.41


def test_standard_error_is_the_spread_of_batch_means() -> None:
    grads = np.random.default_rng(2).normal(0, 2, (3000, 8, 1))
    errors = [standard_error(Moments.from_per_example(batch))[0] ** 2 for batch in grads]
    # sd of the mean of s2/8: .5*sqrt(2/7)/sqrt(3000) = .0049. Bound 4 sd: false alarm 6e-5.
    assert abs(np.mean(errors) - 4.0 / 8) < 0.02


def test_equal_gradients_have_exactly_zero_variance() -> None:
    assert (variance(Moments.from_per_example(np.full((5, 3), 0.375))) == 0).all()


def test_one_example_has_no_variance_unless_it_is_the_population() -> None:
    one = Moments.from_per_example(np.array([[2.0, 3.0]]))
    assert (variance(one, ddof=0) == 0).all()
    with pytest.raises(ValueError, match=r"count > ddof, got count=1, ddof=1; collect more examples or lower ddof"):
        variance(one)


def test_a_traced_count_gives_nan_where_a_concrete_one_raises() -> None:
    moments = Moments.from_per_example(jnp.ones((1, 2)))
    assert np.isnan(np.asarray(jax.jit(variance)(moments))).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_nan_or_inf_gradient_stays_in_the_elements_it_touches(poison: float) -> None:
    grads = np.array([[1.0, 2.0], [poison, 4.0], [5.0, 9.0]])
    with np.errstate(invalid="ignore"):
        moments = Moments.from_per_example(grads)
    assert np.isnan(moments.m2[0])
    assert moments.m2[1] == pytest.approx(26.0)
    assert np.isfinite(moments.sq_norms).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(4, 0), (4,), (4, 1, 1, 1)])
def test_odd_shapes_are_taken(shape: tuple[int, ...]) -> None:
    moments = Moments.from_per_example(np.ones(shape))
    assert moments.mean.shape == shape[1:]
    assert moments.sq_norms.shape == (4,)


def test_no_example_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one example .* got grads of shape \(0, 3\)"):
        Moments.from_per_example(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="pass gradients of shape"):
        Moments.from_per_example(np.float64(1.0))


def test_a_weight_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one weight an example, got weights of shape \(2,\) for batch=3"):
        Moments.from_per_example(np.zeros((3, 1)), np.ones(2))


def test_moments_of_different_parameters_do_not_merge() -> None:
    with pytest.raises(ValueError, match="merge each parameter with its own"):
        Moments.from_per_example(np.ones((2, 3))).merge(Moments.from_per_example(np.ones((2, 4))))


def test_moments_cross_jit_and_merge_inside_it() -> None:
    grads = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)

    @jax.jit
    def merged(left: jax.Array, right: jax.Array) -> Moments:
        return Moments.from_per_example(left).merge(Moments.from_per_example(right))

    got = merged(grads[:2], grads[2:])
    assert relative_error(np.asarray(got.m2), loop_moments(list(grads)).m2) <= 1e-5
    assert int(got.count) == 6
