import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.smoothing import Smoothed

values = st.floats(-1e6, 1e6, allow_subnormal=False)
pairs = st.lists(st.tuples(values, values), min_size=1, max_size=12)
decays = st.sampled_from([0.0, 0.5, 0.9, 0.999])


def smoothed(steps: Sequence[tuple[float, float]], decay: float, gaps: Sequence[float] | None = None) -> Smoothed:
    state = Smoothed.zeros_like(np.zeros(()))
    for number, (top, bottom) in enumerate(steps):
        state = state.update(np.array(top), np.array(bottom), decay, 1 if gaps is None else gaps[number])
    return state


def loop(steps: Sequence[tuple[float, float]], decay: float, gaps: Sequence[float]) -> tuple[float, float]:
    """Both averages from each step's weight written out."""
    weights = []
    for number, gap in enumerate(gaps):
        later = math.prod(decay**other for other in gaps[number + 1 :])
        weights.append((1 - decay**gap) * later)
    summed = math.fsum(weights)
    return tuple(math.fsum(w * step[side] for w, step in zip(weights, steps, strict=True)) / summed for side in (0, 1))  # type: ignore[return-value]


@given(pairs, decays, st.data())
def test_both_averages_are_those_of_the_weights_written_out(
    steps: list[tuple[float, float]], decay: float, data: st.DataObject
) -> None:
    gaps = data.draw(st.lists(st.integers(1, 20), min_size=len(steps), max_size=len(steps)))
    got = smoothed(steps, decay, gaps)
    want = loop(steps, decay, gaps)
    largest = max(abs(value) for step in steps for value in step)
    # 12 steps, a few roundoffs each; the loop's 1 - .999 loses three digits.
    for average, wanted in zip((got.numerator, got.denominator), want, strict=True):
        assert float(average) == pytest.approx(wanted, abs=1e-12 * largest)
    assert float(got.weight) == pytest.approx(1 - decay ** sum(gaps), rel=1e-11)


@given(values, values.filter(bool), decays, st.integers(1, 10))
def test_a_constant_is_its_own_average_from_the_first_step_on(
    top: float, bottom: float, decay: float, steps: int
) -> None:
    state = smoothed([(top, bottom)] * steps, decay)
    assert (float(state.numerator), float(state.denominator)) == (top, bottom)  # exactly
    assert float(state.ratio) == top / bottom


def test_it_is_the_ratio_of_the_averages_and_not_the_average_of_the_ratios() -> None:
    # Weights 1/3 and 2/3 after two steps at decay .5: (8 + 2·4)/(−1 + 2·4) = 16/7; the mean of ratios is −2.
    state = smoothed([(8.0, -1.0), (4.0, 4.0)], 0.5)
    assert float(state.ratio) == pytest.approx(16 / 7)
    assert (8 / -1 + 2 * 4 / 4) / 3 == -2.0


def test_of_noisy_pairs_it_tends_to_the_ratio_of_their_means() -> None:
    # Numerator 5 ± 1, denominator 1 ± 2, half of whose ratios point the wrong way. 1/Q = (1+β)/(1-β) = 1,999 steps
    # count: sd of the ratio √(1 + 25·4)/√1999 = .225; bound 4 sd, false alarm 6e-5.
    rng = np.random.default_rng(0)
    state = Smoothed.zeros_like(np.zeros(()))
    ratios = []
    for _ in range(10_000):
        top, bottom = 5 + rng.standard_normal(), 1 + 2 * rng.standard_normal()
        state = state.update(np.array(top), np.array(bottom), 0.999)
        ratios.append(top / bottom)
    assert abs(float(state.ratio) - 5) < 0.9
    assert np.median(ratios) < 4  # no average of these finds it


def test_it_forgets_at_the_rate_of_its_decay() -> None:
    # After a long 1, k steps of 0 leave β^k.
    state = smoothed([(1.0, 1.0)] * 2000, 0.9)
    for k in range(1, 30):
        state = state.update(np.array(0.0), np.array(1.0), 0.9)
        assert float(state.ratio) == pytest.approx(0.9**k, rel=1e-9)


@given(pairs, decays, st.integers(2, 6))
def test_many_steps_at_once_are_as_many_updates_of_one(
    steps: list[tuple[float, float]], decay: float, gap: int
) -> None:
    at_once = smoothed(steps, decay, [gap] * len(steps))
    one_by_one = smoothed([step for step in steps for _ in range(gap)], decay)
    largest = max(abs(value) for step in steps for value in step)
    for got, want in zip(at_once, one_by_one, strict=True):
        assert float(got) == pytest.approx(float(want), rel=1e-11, abs=1e-12 * largest)


@given(
    pairs, decays, st.integers(0, 11), st.sampled_from([(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (2.0, -np.inf)])
)
def test_a_step_that_is_not_a_number_is_as_if_it_had_never_been(
    steps: list[tuple[float, float]], decay: float, place: int, bad: tuple[float, float]
) -> None:
    at = min(place, len(steps))
    with np.errstate(invalid="ignore"):
        spoilt = smoothed([*steps[:at], bad, *steps[at:]], decay)
    assert spoilt == smoothed(steps, decay)


def test_elements_are_passed_over_one_by_one() -> None:
    state = Smoothed.zeros_like(np.zeros(3))
    state = state.update(np.array([1.0, np.nan, 3.0]), np.array([1.0, 1.0, np.nan]), 0.9)
    np.testing.assert_array_equal(state.ratio, [1.0, np.nan, np.nan])
    state = state.update(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 0.0]), 0.9)
    # The second and third element see their first step; a denominator of 0 has no ratio.
    np.testing.assert_allclose(state.ratio, [(0.9 * 1 + 2) / 1.9, 2.0, np.nan])
    np.testing.assert_allclose(state.weight, [1 - 0.81, 0.1, 0.1])


def test_steps_that_are_unknown_or_none_are_passed_over() -> None:
    state = Smoothed.zeros_like(np.zeros(3)).update(np.ones(3), np.ones(3), 0.9)
    after = state.update(np.full(3, 5.0), np.ones(3), 0.9, np.array([np.nan, 0.0, 1.0]))
    np.testing.assert_allclose(after.numerator, [1.0, 1.0, (0.9 + 5) / 1.9])
    assert np.isfinite(after.weight).all()


def test_before_the_first_step_there_is_no_ratio() -> None:
    assert np.isnan(Smoothed.zeros_like(np.zeros(2)).ratio).all()


@given(pairs, decays, st.integers(-60, 60), st.integers(-60, 60))
def test_scaling_either_side_scales_its_average_and_the_ratio(
    steps: list[tuple[float, float]], decay: float, up: int, down: int
) -> None:
    a, b = 2.0**up, 2.0**down  # exact in binary
    plain, scaled = smoothed(steps, decay), smoothed([(a * top, b * bottom) for top, bottom in steps], decay)
    assert (scaled.numerator, scaled.denominator, scaled.weight) == (
        a * plain.numerator,
        b * plain.denominator,
        plain.weight,
    )
    np.testing.assert_array_equal(scaled.ratio, plain.ratio * (a / b))


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"needs 0 <= decay < 1, got decay=(-0\.1|1\.0|nan); \.99 counts about 100"):
        Smoothed.zeros_like(np.zeros(1)).update(np.ones(1), np.ones(1), decay)


@pytest.mark.parametrize("steps", [0, -1, math.nan])
def test_steps_that_do_not_go_forward_are_refused(steps: float) -> None:
    with pytest.raises(ValueError, match=r"needs steps > 0, got steps=(0|-1|nan); pass those since the update before"):
        Smoothed.zeros_like(np.zeros(1)).update(np.ones(1), np.ones(1), 0.9, steps)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_numpy_torch_and_jitted_jax_agree_also_where_steps_are_traced(decay: float) -> None:
    rng = np.random.default_rng(1)
    tops, bottoms = (1 + rng.standard_normal((2, 20, 4))).astype(np.float32)
    tops[3, 1] = bottoms[7, 2] = np.nan
    gaps = rng.integers(1, 4, 20).astype(np.float32)
    results = []
    for array, jitted in ((np.asarray, False), (torch.as_tensor, False), (jnp.asarray, True)):

        def step(state: Smoothed, top: object, bottom: object, gap: object) -> Smoothed:
            return state.update(top, bottom, decay, gap)

        run = jax.jit(step) if jitted else step
        state = Smoothed.zeros_like(array(tops[0]))
        for top, bottom, gap in zip(tops, bottoms, gaps, strict=True):
            state = run(state, array(top), array(bottom), array(gap))
        results.append(state)
    for got in results[1:]:
        for part, want in zip(got, results[0], strict=True):
            # 20 steps of a few roundoffs (6e-8) of numbers up to 4.
            np.testing.assert_allclose(np.asarray(part), want, rtol=1e-4, atol=1e-5)


def test_in_float32_a_decay_close_to_one_keeps_its_digits() -> None:
    # 1 - .99999**1 in float32 has two digits; the first steps' weights would be wrong by a percent.
    steps = np.array(1.0, np.float32)
    state = Smoothed.zeros_like(np.zeros((), np.float32))
    state = state.update(np.array(1.0, np.float32), np.array(1.0, np.float32), 0.99999, steps)
    assert float(state.weight) == pytest.approx(1e-5, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_squares_of_any_scale_are_averaged_in_float32(scale: float) -> None:
    rng = np.random.default_rng(2)
    tops, bottoms = ((1 + rng.random((2, 30))) * scale * scale).astype(np.float32)
    state = Smoothed.zeros_like(np.zeros((), np.float32))
    for top, bottom in zip(tops, bottoms, strict=True):
        state = state.update(np.array(top), np.array(bottom), 0.9)
    want = loop([*zip(tops.astype(float), bottoms.astype(float), strict=True)], 0.9, [1] * 30)
    assert state.numerator.dtype == np.float32
    assert float(state.ratio) == pytest.approx(want[0] / want[1], rel=1e-5)


def test_nothing_waits_for_the_device_and_half_precision_is_widened() -> None:
    half = torch.ones(3, dtype=torch.bfloat16, device="meta")  # without memory: looking at a value would raise
    state = Smoothed.zeros_like(half).update(half, half, 0.99, torch.ones((), device="meta"))
    assert {part.dtype for part in (*state, state.ratio)} == {torch.float32}
