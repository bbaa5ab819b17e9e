import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.collectors.cadence import Cadence


def after(cadence: Cadence, *extras: float) -> int:
    for extra in extras:
        cadence.observe(1.0 + extra, 1.0)
    assert isinstance(cadence.every, int)
    return cadence.every


@pytest.mark.parametrize("every", [1, 2, 10])
def test_steps_0_k_2k_are_due(every: int) -> None:
    cadence = Cadence(every=every)
    assert [step for step in range(41) if cadence.due(step)] == list(range(0, 41, every))
    assert cadence.due(np.int64(every))


def test_a_given_k_stays_whatever_it_costs() -> None:
    assert after(Cadence(every=5), 9.0, 9.0, 9.0, 9.0) == 5


def test_k_is_a_power_of_two_within_the_budget() -> None:
    for extra, want in ((0.0, 1), (0.02, 1), (0.04, 2), (0.2, 16), (1.0, 64), (7.0, 256)):
        assert after(Cadence(every="auto", budget=0.03), *[extra] * 5) == want, extra


@given(st.lists(st.floats(0.0, 50.0), min_size=3, max_size=60), st.floats(0.001, 0.5))
def test_the_cost_is_within_the_budget_whatever_was_observed(extras: list[float], budget: float) -> None:
    cadence = Cadence(every="auto", budget=budget)
    every = after(cadence, *extras)
    assert every & (every - 1) == 0
    assert cadence.extra / every <= budget * (1 + 1e-9)


def test_the_first_steps_which_compile_do_not_count() -> None:
    cadence = Cadence(every="auto")
    assert after(cadence, 1000.0, 0.1) == 16
    assert after(cadence, 0.1) == 8  # 0.1 / 4 is within 0.03, but only just


def test_costs_that_waver_about_a_bound_do_not_make_k_swing() -> None:
    cadence = Cadence(every="auto", budget=0.1)
    after(cadence, *[0.39] * 32)
    seen = {after(cadence, *[extra] * 32) for extra in (0.41, 0.39, 0.41, 0.39, 0.35, 0.41)}
    assert seen == {8}
    assert after(cadence, *[0.25] * 32) == 4


def test_an_outlier_among_many_changes_nothing() -> None:
    cadence = Cadence(every="auto", budget=0.1)
    before = after(cadence, *[0.3] * 9)
    assert after(cadence, 30.0) == before


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (1.0, math.inf), (-1.0, 1.0), (1.0, 0.0)])
def test_a_time_that_makes_no_sense_is_passed_over(pair: tuple[float, float]) -> None:
    cadence = Cadence(every="auto")
    for _ in range(5):
        cadence.observe(*pair)
    assert cadence.every == 16
    assert math.isnan(cadence.extra)


def test_a_measured_step_quicker_than_a_plain_one_costs_nothing() -> None:
    assert after(Cadence(every="auto"), *[-0.3] * 5) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "Cadence needs every of at least 1 or 'auto', got every=0; 1 measures each step"),
        ({"every": 2.5}, TypeError, "Cadence needs every to be a whole number, got every=2.5; pass an int"),
        ({"every": "often"}, TypeError, "whole number, got every='often'"),
        ({"budget": 0.0}, ValueError, "Cadence needs a budget above 0, got budget=0.0; 0.03 lets"),
        ({"budget": math.nan}, ValueError, "budget above 0, got budget=nan"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Cadence(**arguments)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_steps_are_counted_from_0(step: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="step"):
        Cadence().due(step)
