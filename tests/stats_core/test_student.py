import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core.student import t_critical, t_quantile

FREEDOMS = [0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 5.67, 7.0, 20.333, 31.0, 59.9, 60.1, 1e3, 9.9e4, 1.1e5, 1e7, math.inf]
PROBABILITIES = [1e-12, 1e-6, 0.001, 0.025, 0.1, 0.25, 0.2500001, 0.4, 0.49, 0.51, 0.6, 0.9, 0.95, 0.975, 0.995, 0.9999]


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_quantiles_are_those_of_scipy(freedom: float) -> None:
    for p in PROBABILITIES:
        assert t_quantile(p, freedom) == pytest.approx(float(scipy.stats.t.ppf(p, freedom)), rel=1e-10), p


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_the_probability_below_a_quantile_is_the_one_asked_for(freedom: float) -> None:
    # scipy's distribution function is another algorithm than its quantile's. A relative error e of t changes p by
    # t·density·e, which stays below freedom·p·e and p·t²·e.
    for p in (q for q in PROBABILITIES if q < 0.5):
        t = t_quantile(p, freedom)
        assert float(scipy.stats.t.cdf(t, freedom)) == pytest.approx(p, rel=1e-10 * (1 + min(freedom, t * t))), p


@given(st.floats(0.001, 0.999))
def test_one_and_two_degrees_of_freedom_have_a_closed_form(p: float) -> None:
    # Both forms are as exact as p − 1/2, whose error is half an ulp of p over its size.
    slack = 1e-11 + 1e-16 / max(abs(p - 0.5), 1e-300)
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=slack, abs=0)
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=slack, abs=0)


def test_infinite_freedom_is_the_normal_distribution() -> None:
    for p in PROBABILITIES:
        assert t_quantile(p, math.inf) == pytest.approx(statistics.NormalDist().inv_cdf(p), rel=1e-15)


def test_tails_too_thin_for_scipy_are_right() -> None:
    # Two degrees: 1/√(2p(1 − p)); far out, t grows as p^(−1/freedom).
    assert t_quantile(1e-300, 2) == pytest.approx(-1 / math.sqrt(2e-300), rel=1e-11)
    assert t_quantile(1e-200, 4) / t_quantile(1e-204, 4) == pytest.approx(0.1, rel=1e-11)
    assert t_quantile(1e-12, 0.02) == -math.inf  # about 1e583


@given(st.integers(1, 511), st.floats(0.1, 1e6))
def test_the_distribution_is_symmetric(numerator: int, freedom: float) -> None:
    p = numerator / 1024  # 1 − p is exact
    assert t_quantile(1 - p, freedom) == -t_quantile(p, freedom)
    assert t_quantile(0.5, freedom) == 0.0


@given(st.floats(0.05, 1e7), st.floats(1.001, 10.0), st.floats(0.501, 0.999999))
def test_more_freedom_means_a_smaller_quantile_and_more_probability_a_larger_one(
    freedom: float, factor: float, p: float
) -> None:
    here = t_quantile(p, freedom)
    assert t_quantile(p, freedom * factor) < here * (1 + 1e-11)
    assert t_quantile(1 - (1 - p) / factor, freedom) > here


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"t_quantile needs 0 < p < 1, got p=.*; give a probability, such as 0\.975"):
        t_quantile(p, 5)


@pytest.mark.parametrize("freedom", [0.0, -1.0, math.nan])
def test_no_freedom_is_refused(freedom: float) -> None:
    with pytest.raises(ValueError, match=r"t_quantile needs freedom > 0, got freedom=.*; collect more steps"):
        t_quantile(0.975, freedom)


GRID = np.concatenate([np.linspace(0.5, 4, 1401), np.geomspace(4, 1e9, 1500)])
EXACT = scipy.stats.t.ppf(0.975, GRID)


def test_the_critical_value_is_within_5e_6_of_the_exact_one() -> None:
    assert np.max(np.abs(t_critical(GRID) / EXACT - 1)) <= 5e-6
    assert t_critical(np.array([0.25]))[0] == pytest.approx(t_quantile(0.975, 0.25), rel=0.01)


def test_the_critical_value_is_as_good_in_float32_of_any_framework() -> None:
    # The fit's 5e-6, and float32's: 2^-24 for each of about six operations, the exponent's (up to 3) times its value.
    bound = 5e-6 + 12 * 2.0**-24
    freedom = GRID.astype(np.float32)
    exact = scipy.stats.t.ppf(0.975, freedom.astype(np.float64))
    for found in (
        t_critical(freedom),
        t_critical(torch.as_tensor(freedom)).numpy(),
        np.asarray(jax.jit(t_critical)(jnp.asarray(freedom))),
    ):
        assert found.dtype == np.float32
        assert np.max(np.abs(found / exact - 1)) <= bound


def test_whole_numbers_and_half_precision_are_widened() -> None:
    exact = [t_quantile(0.975, n) for n in (1, 7, 31)]
    for found in (
        t_critical(np.array([1, 7, 31])),
        t_critical(torch.tensor([1, 7, 31], dtype=torch.bfloat16)),
        jax.jit(t_critical)(jnp.array([1, 7, 31])),
    ):
        assert "float32" in str(found.dtype)
        assert np.asarray(found) == pytest.approx(exact, rel=6e-6)


def test_a_plain_number_has_the_exact_critical_value() -> None:
    assert t_critical(7) == t_quantile(0.975, 7.0)
    assert t_critical(2.5) == t_quantile(0.975, 2.5)


def test_without_freedom_there_is_no_critical_value() -> None:
    for number in (0, -1.0, math.nan):
        assert math.isnan(t_critical(number))
    nothing = np.array([0.0, -1.0, np.nan])
    assert np.isnan(t_critical(nothing)).all()
    assert torch.isnan(t_critical(torch.as_tensor(nothing))).all()
    assert jnp.isnan(jax.jit(t_critical)(jnp.asarray(nothing, jnp.float32))).all()


def test_with_infinite_freedom_it_is_the_normal_one() -> None:
    assert t_critical(np.array([np.inf]))[0] == pytest.approx(1.959963984540054, rel=1e-15)
    assert t_critical(math.inf) == pytest.approx(1.959963984540054, rel=1e-15)


def test_below_a_twentieth_it_stays_in_range() -> None:
    tiny = np.array([1e-30, 0.001, 0.05], np.float32)
    for found in (t_critical(tiny), t_critical(torch.as_tensor(tiny)).numpy()):
        assert found == pytest.approx([found[2]] * 3)
        assert 1e25 < found[2] < 1e26


@given(st.floats(1e-300, 1e12))
def test_it_is_never_below_the_normal_one(freedom: float) -> None:
    assert t_critical(np.array([freedom]))[0] >= 1.959963984540054 * (1 - 1e-15)
