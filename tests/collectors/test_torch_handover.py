"""Numbers on their way from the device to the host."""

import math

import numpy as np
import pytest
import torch

from gradiometer.collectors.torch_handover import HostRows, StepNumbers
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import Histogram, sketch_fixed, sketch_rows
from gradiometer.stats_core.summary import Summary

NAMES = ("count", "batch_variance", "gsnr_sum")


def numbers(step: int, variance: float = 0.5, **more: object) -> StepNumbers:
    """Of the second of two layers."""
    columns = {"count": 4.0, "batch_variance": variance, "gsnr_sum": 7.0}
    summary = Summary(4, {name: torch.tensor([value], dtype=torch.float64) for name, value in columns.items()})
    return StepNumbers(step, 1, summary._replace(**more), [1], {"a": torch.tensor(2.0), "b": 3})


def rows_for(slots: int = 4, sketches: int = 0) -> HostRows:
    return HostRows(NAMES, 2, torch.device("cpu"), sketches=sketches, slots=slots)


def test_steps_for_which_no_host_buffer_is_free_are_dropped_and_counted() -> None:
    rows = rows_for(slots=1)
    rows.send(numbers(0))
    rows.send(numbers(1))
    assert rows.dropped == 1
    (arrived,) = rows.arrived()
    assert (arrived.step, arrived.rows[1, 1], arrived.scalars) == (0, 0.5, {"a": 2.0, "b": 3.0})
    assert np.isnan(arrived.rows[:, 0]).all()  # the layer that was not measured
    rows.send(numbers(2))
    assert [arrived.step for arrived in rows.arrived(wait=True)] == [2]


@pytest.mark.parametrize("variance", [1e-36, 3e-40, 5e40, 1e60])
def test_squares_out_of_float32s_reach_come_in_a_unit_of_their_own(variance: float) -> None:
    rows = rows_for()
    rows.send(numbers(0, variance))
    (arrived,) = rows.arrived()
    exponent = arrived.scalars["unit_exponent"]
    assert exponent == round(exponent)
    assert float(arrived.rows[1, 1]) * 4.0**exponent == pytest.approx(variance, rel=1e-6)
    assert arrived.rows[2, 1] == 7.0  # has no unit


def test_with_the_columns_all_that_grows_with_the_gradients_is_in_the_unit() -> None:
    norms = torch.tensor([1e20, 2e20], dtype=torch.float64)
    rows = rows_for(sketches=1)
    rows.send(
        numbers(
            0,
            1e42,
            scalars={"norm_max": norms[1], "parallel_variance": torch.tensor(1e41, dtype=torch.float64)},
            sketches={"example_norm": sketch_rows(norms[None])},
            outliers=Outliers(torch.tensor([1]), norms[1:] ** 2),
        )
    )
    (arrived,) = rows.arrived()
    unit = 2.0 ** arrived.scalars["unit_exponent"]
    assert arrived.scalars["norm_max"] * unit == pytest.approx(2e20)
    assert arrived.scalars["parallel_variance"] * unit**2 == pytest.approx(1e41)
    assert arrived.outliers is not None
    assert arrived.outliers.sq_norms[0] * unit**2 == pytest.approx(4e40)
    assert Histogram.from_sketch(arrived.sketches["example_norm"], 1).quantile(1.0) * unit == pytest.approx(
        2e20, rel=0.045
    )


def test_ordinary_squares_come_as_they_are() -> None:
    rows = rows_for()
    for step, variance in enumerate((1e-20, 1.0, 1e30, 0.0, math.nan, math.inf)):
        rows.send(numbers(step, variance))
        (arrived,) = rows.arrived()
        assert "unit_exponent" not in arrived.scalars
        assert arrived.rows[1, 1] == pytest.approx(variance, rel=1e-6, nan_ok=True)


def test_sketches_outliers_and_the_whole_models_scalars_come_along() -> None:
    sketch = sketch_fixed(torch.tensor([0.5, 4.0, 4.0]))
    outliers = Outliers(torch.tensor([3, 1]), torch.tensor([9.0, 4.0]))
    rows = rows_for(sketches=1)
    rows.send(numbers(0, sketches={"element_t_sq": sketch}, outliers=outliers, scalars={"norm_max": torch.tensor(5.0)}))
    (arrived,) = rows.arrived()
    assert arrived.scalars["norm_max"] == 5.0
    found = arrived.sketches["element_t_sq"]
    assert Histogram.from_sketch(found, 1) == Histogram.from_sketch(sketch)
    assert Histogram.from_sketch(found, 0).count == 0
    assert arrived.outliers is not None
    assert arrived.outliers.rows.tolist() == [3, 1]
    assert arrived.outliers.sq_norms.tolist() == [9.0, 4.0]


def test_a_step_without_a_whole_layer_still_has_its_scalars() -> None:
    rows = rows_for()
    rows.send(StepNumbers(0, 1, Summary(0, {}), [], {"loss": torch.tensor(1.5)}))
    (arrived,) = rows.arrived()
    assert np.isnan(arrived.rows).all()
    assert arrived.scalars == {"loss": 1.5}
