import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core import window
from gradiometer.stats_core.arrays import square_sum
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums
from gradiometer.stats_core.successive import Previous, step_sums
from tests.strategies import gradient_batches

NAMES = ("step_variance", "step_variance_expected", "consecutive_dot")
EPS = 2.0**-24  # float32's unit roundoff


def kept(moments: Moments) -> Previous:
    sums = noise_sums(moments)
    return Previous(moments.mean, sums.batch_variance, sums.mean_sq_norm)


def alone(mean: object, variance: float = 0.0) -> Previous:
    """A step whose mean is given."""
    sq_norm = square_sum(mean)
    return Previous(mean, sq_norm * 0 + variance, sq_norm)


jitted_sums = jax.jit(lambda a, b: step_sums(alone(a), alone(b)))


def loop(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """From the examples of two batches, one example and one element at a time."""
    means, variances = [], []
    for batch in (first, second):
        batch = np.asarray(batch, np.float64).reshape(len(batch), -1)
        mean = [math.fsum(row[j] for row in batch) / len(batch) for j in range(batch.shape[1])]
        deviations = math.fsum((row[j] - mean[j]) ** 2 for row in batch for j in range(batch.shape[1]))
        means.append(mean)
        variances.append(deviations / (len(batch) - 1) / len(batch))
    return {
        "step_variance": math.fsum((a - b) ** 2 for a, b in zip(*means, strict=True)) / 2,
        "step_variance_expected": sum(variances) / 2,
        "consecutive_dot": math.fsum(a * b for a, b in zip(*means, strict=True)),
    }


def found(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    before, now = (kept(Moments.from_per_example(batch)) for batch in (first, second))
    return {name: float(value) for name, value in step_sums(before, now).items()}


@given(gradient_batches(min_examples=4))
def test_two_steps_agree_with_the_float64_loop(grads: np.ndarray) -> None:
    first, second = grads[: len(grads) // 2], grads[len(grads) // 2 :]
    got, want = found(first, second), loop(first, second)
    scale = want["step_variance"] + want["consecutive_dot"]  # half the sum of the squared norms
    assert set(got) == set(NAMES)
    for name, value in want.items():
        # Float64's roundoff, times the 9 examples of a mean and what the loop's own means are off by.
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-13 * scale), name


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-18, 1.0, 1e18]), st.sampled_from([1.0, 1e-6, 0.0, -0.9]))
def test_in_float32_the_dot_product_is_within_seven_roundoffs_of_its_scale(
    seed: int, scale: float, share: float
) -> None:
    # The docstring's bound. Squares of 1e-18 and 1e18 are in float32's range, and so are sums of 40 of them; below a
    # tenth of 1e-18 squares lose digits, 1e-45 each, which is 1e-9 of the sum.
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(40)
    b = share * a + math.sqrt(1 - share * share) * rng.standard_normal(40)
    a, b = (np.float32(scale) * x.astype(np.float32) for x in (a, b))
    exact, (wide_a, wide_b) = step_sums(alone(a), alone(b)), (a.astype(np.float64), b.astype(np.float64))
    half = 0.5 * (wide_a @ wide_a + wide_b @ wide_b)
    error = float(exact["consecutive_dot"]) - wide_a @ wide_b
    assert abs(error) <= (7 * EPS + 1e-9) * half
    # Under jit the three sums of 40 squares are float32's, too: each addition is off by one roundoff at most, and
    # S and D ≤ 2S are summed; a square below the normal range is flushed to 0.
    flushed = 3 * 40 * float(np.finfo(np.float32).tiny)
    assert abs(float(jitted_sums(a, b)["consecutive_dot"]) - wide_a @ wide_b) <= (7 + 3 * 40) * EPS * half + flushed


@pytest.mark.parametrize("elements", [10**3, 10**6])
def test_summed_in_float32_the_dot_product_keeps_the_digits_a_cosine_needs(elements: int) -> None:
    # jax has no float64 to add in: that bound grows with the elements, the error does not, since XLA adds in lanes
    # and blocks. A cosine is read to three digits; 1e-5 is asked for, and 2e-7 seen with up to 10⁷ elements.
    rng = np.random.default_rng(0)
    a = rng.standard_normal(elements)
    b = 0.05 * a + rng.standard_normal(elements)
    a, b = a.astype(np.float32), b.astype(np.float32)
    sums = jitted_sums(a, b)
    got = float(sums["consecutive_dot"]) / float(sums["consecutive_dot"] + sums["step_variance"])
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert got == pytest.approx(2 * (wide_a @ wide_b) / (wide_a @ wide_a + wide_b @ wide_b), abs=1e-5)


def test_what_two_steps_give_in_whole_numbers_is_exact() -> None:
    a, b = np.array([3.0, 0.0, 4.0]), np.array([0.0, 2.0, 0.0])
    assert step_sums(alone(a, 2.0), alone(a, 4.0)) == {
        "step_variance": 0.0,
        "step_variance_expected": 3.0,
        "consecutive_dot": 25.0,
    }
    orthogonal = step_sums(alone(a), alone(b))
    assert (orthogonal["step_variance"], orthogonal["consecutive_dot"]) == (14.5, 0.0)
    opposite = step_sums(alone(a), alone(-a))
    assert (opposite["step_variance"], opposite["consecutive_dot"]) == (50.0, -25.0)


@given(gradient_batches(min_examples=2, max_examples=2), st.integers(-3, 3))
def test_scaling_both_gradients_scales_everything_by_the_square(pair: np.ndarray, power: int) -> None:
    c = 2.0**power  # exact in binary
    plain, scaled = step_sums(*map(alone, pair)), step_sums(*map(alone, c * pair))
    for name in ("step_variance", "consecutive_dot"):
        assert float(scaled[name]) == c * c * float(plain[name]), name


@given(gradient_batches(min_examples=3, max_examples=3))
def test_adding_one_vector_to_both_gradients_leaves_the_step_variance(three: np.ndarray) -> None:
    a, b, shift = three
    plain = float(step_sums(alone(a), alone(b))["step_variance"])
    moved = float(step_sums(alone(a + shift), alone(b + shift))["step_variance"])
    # a + shift and b + shift are rounded: every difference is off by e ≤ 2u·2M, u = 2⁻⁵³, and so D by
    # √(2D)·√n·e + n·e²/2; a fifth u for the rest.
    e = 5 * 2.0**-53 * float(np.abs(three).max())
    assert abs(moved - plain) <= math.sqrt(2 * plain * a.size) * e + a.size * e * e / 2


@given(gradient_batches(min_examples=2, max_examples=2), st.randoms(use_true_random=False))
def test_neither_the_order_of_elements_nor_of_the_two_steps_matters(pair: np.ndarray, random: object) -> None:
    a, b = (x.ravel() for x in pair)
    order = list(range(a.size))
    random.shuffle(order)  # type: ignore[attr-defined]
    plain = step_sums(alone(a), alone(b))
    scale = float(square_sum(a) + square_sum(b))
    for other in (step_sums(alone(b), alone(a)), step_sums(alone(a[order]), alone(b[order]))):
        for name in ("step_variance", "consecutive_dot"):
            assert float(other[name]) == pytest.approx(float(plain[name]), abs=1e-14 * scale), name


@given(gradient_batches(min_examples=4, max_examples=4))
def test_the_sums_of_a_parameter_are_those_of_its_parts_added_up(grads: np.ndarray) -> None:
    flat = grads.reshape(4, -1)
    halves = flat[:, : flat.shape[1] // 2 + 1], flat[:, flat.shape[1] // 2 + 1 :]
    whole = found(flat[:2], flat[2:])
    parts = [found(half[:2], half[2:]) for half in halves if half.shape[1]]
    scale = whole["step_variance"] + whole["consecutive_dot"] + whole["step_variance_expected"]
    for name in NAMES:
        assert whole[name] == pytest.approx(math.fsum(part[name] for part in parts), abs=1e-12 * scale), name


def test_all_three_are_absent_on_the_first_step() -> None:
    sums = step_sums(Previous.zeros_like(np.ones(2)), kept(Moments.from_per_example(np.ones((3, 2)))))
    assert np.isnan([float(sums[name]) for name in NAMES]).all()


def test_batches_of_one_example_have_a_step_variance_and_none_to_expect() -> None:
    sums = found(np.array([[1.0, 2.0]]), np.array([[3.0, 2.0]]))
    assert math.isnan(sums["step_variance_expected"])
    assert (sums["step_variance"], sums["consecutive_dot"]) == (2.0, 7.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_a_number_is_shown_and_is_gone_a_step_later(bad: float) -> None:
    good, spoilt = np.ones(3), np.array([1.0, bad, 1.0])
    with np.errstate(invalid="ignore"):
        for pair in ((good, spoilt), (spoilt, good)):
            sums = step_sums(*map(alone, pair))
            assert not np.isfinite(sums["step_variance"])
            assert not np.isfinite(sums["consecutive_dot"])
    assert float(step_sums(alone(good), alone(good))["consecutive_dot"]) == 3.0


def test_independent_steps_have_a_variance_ratio_of_one() -> None:
    # 400 pairs of steps, B = 16, 50 elements: rho has sd about sqrt(3/(2*400*50)) + noise of P; bound 4 sd = .035.
    rng = np.random.default_rng(1)
    before, top, bottom = None, 0.0, 0.0
    for _ in range(401):
        now = kept(Moments.from_per_example(rng.standard_normal((16, 50)) + 3))
        if before is not None:
            sums = step_sums(before, now)
            top, bottom = top + float(sums["step_variance"]), bottom + float(sums["step_variance_expected"])
        before = now
    assert abs(top / bottom - 1) < 0.035


def test_the_dot_product_is_an_unbiased_squared_norm_of_the_gradient() -> None:
    # Means ~ N(G, I/4) of 30 elements, |G|² = 2: <a, b> has variance 2·|G|²/4 + 30/16 = 2.875. 4,000 pairs:
    # sd .0268; bound 4.5 sd = .121, false alarm 7e-6. The squared norm itself would be 7.5 too high.
    rng = np.random.default_rng(2)
    goal = np.full(30, math.sqrt(2 / 30))
    draws = [step_sums(*(alone(goal + rng.standard_normal(30) / 2) for _ in range(2))) for _ in range(4000)]
    assert abs(np.mean([float(d["consecutive_dot"]) for d in draws]) - 2.0) < 0.121
    # D: 30 elements of variance 1/4, each pair chi² of 1 degree: sd 7.5·√(2/30)/√4000 = .0306, bound 4.5 sd.
    assert abs(np.mean([float(d["step_variance"]) for d in draws]) - 7.5) < 0.138


@pytest.mark.parametrize("drift", [0.01, 0.1, 1.0])
def test_a_drift_biases_the_step_variance_by_half_its_square(drift: float) -> None:
    # Noise-free: exact. With noise of variance 1 beside it the expectation adds: 20,000 elements and 20 pairs.
    steps = [np.full(7, drift * t) for t in range(5)]
    for pair in itertools.pairwise(steps):
        assert float(step_sums(*map(alone, pair))["step_variance"]) == pytest.approx(7 * drift**2 / 2, rel=1e-9)
    rng = np.random.default_rng(3)
    noisy = [rng.standard_normal(20_000) + drift * t for t in range(21)]
    pairs = itertools.pairwise(noisy)
    got = np.mean([float(step_sums(*map(alone, pair))["step_variance"]) for pair in pairs]) / 20_000
    # D of an element: variance of half the square of N(δ, 2) is 2 + 2δ², times 1.5 for the shared neighbour.
    bound = 4.5 * math.sqrt(1.5 * (2 + 2 * drift**2) / 400_000)  # false alarm 7e-6
    assert abs(got - (1 + drift**2 / 2)) < bound


@pytest.mark.parametrize(("x", "ratio"), [(0.1, 1.1053), (0.5, 1.6667), (1.0, 3.0)])
def test_under_stationary_sgd_the_ratio_is_learning_rate_times_curvature(x: float, ratio: float) -> None:
    # θ ← (1 − x)θ − ηε, g = hθ + ε, x = ηh: E D / Var ε = (2 + x)/(2 − x). 5,000 elements, 60 steps; with the
    # steps' correlations (squared, at most ½ together) sd ≤ ratio·√(2·2/300,000) = .37 %; bound 5 sd, 6e-7.
    assert (2 + x) / (2 - x) == pytest.approx(ratio, abs=1e-4)
    rng = np.random.default_rng(4)
    theta = rng.standard_normal(5000) * math.sqrt(x / (2 - x))  # stationary, with h = 1
    before, summed = None, 0.0
    for _ in range(61):
        gradient = theta + rng.standard_normal(5000)
        theta = theta - x * gradient
        if before is not None:
            summed += float(step_sums(before, alone(gradient))["step_variance"]) / 5000
        before = alone(gradient)
    assert summed / 60 == pytest.approx(ratio, rel=0.0185)


def test_reshuffled_epochs_show_only_in_the_pairs_across_their_border() -> None:
    # N = 512, B = 64: batches of one epoch are exchangeable, so D is the population's variance over B; the last of
    # one and the first of the next are independent draws without replacement: 1 − B/N = .875. 2,000 elements.
    rng = np.random.default_rng(5)
    data = rng.standard_normal((512, 2000))
    truth = data.var(axis=0, ddof=1).sum() / 64
    within, across, before = [], [], None
    for _ in range(25):
        order = rng.permutation(512)
        for batch in range(8):
            now = alone(data[order[batch * 64 : batch * 64 + 64]].mean(axis=0))
            if before is not None:
                (within if batch else across).append(float(step_sums(before, now)["step_variance"]) / truth)
            before = now
    # One D of 2,000 elements has sd √(2/2000) = 3.2 %: 175 pairs within .24 % (times √1.5), 24 across .65 %. 4.5 sd.
    assert np.mean(within) == pytest.approx(1.0, abs=0.013)
    assert np.mean(across) == pytest.approx(0.875, abs=0.026)


def test_readers_form_the_cosine_of_consecutive_steps_from_it() -> None:
    a, b = np.array([1.0, 2.0, 2.0]), np.array([2.0, 1.0, 2.0])
    sums = step_sums(alone(a), alone(b))
    columns = {name: np.array([[float(sums[name])]]) for name in ("consecutive_dot", "step_variance")}
    assert float(window.windowed("consecutive_cosine", columns)[0]) == pytest.approx(8 / 9)


def test_numpy_torch_and_jitted_jax_agree() -> None:
    rng = np.random.default_rng(6)
    first, second = (rng.standard_normal((5, 3, 4)).astype(np.float32) + 1 for _ in range(2))

    def both(one: object, other: object) -> dict[str, object]:
        return step_sums(kept(Moments.from_per_example(one)), kept(Moments.from_per_example(other)))

    want = both(first, second)
    for got in (both(torch.as_tensor(first), torch.as_tensor(second)), jax.jit(both)(first, second)):
        for name in NAMES:
            assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-5), name


def test_nothing_waits_for_the_device() -> None:
    # A tensor without memory has no value to wait for: looking at one would raise.
    before = Previous.zeros_like(torch.ones(3, device="meta"))
    sums = step_sums(before, alone(torch.ones(3, device="meta")))
    assert all(value.device.type == "meta" for value in sums.values())


def test_what_stands_before_the_first_step_is_wide_and_each_array_is_its_own() -> None:
    # jax gives a donated array away once: the two scalars must not be one.
    start = Previous.zeros_like(jnp.ones((2, 3), jnp.bfloat16))
    assert (start.mean.shape, start.mean.dtype) == ((2, 3), jnp.float32)
    assert start.batch_variance is not start.mean_sq_norm
    assert Previous.zeros_like(torch.ones(2, dtype=torch.bfloat16)).mean_sq_norm.dtype == torch.float32
