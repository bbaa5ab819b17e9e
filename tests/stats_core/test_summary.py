import jax
import numpy as np
import pytest
import torch

from gradiometer.stats_core import catalog, selection
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.summary import layer_columns, parameter_sums
from tests.reference import loop_layer


def test_a_layers_columns_agree_with_the_float64_loop() -> None:
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((6, 3, 4)) + 1, rng.standard_normal((6, 4))
    moments = [Moments.from_per_example(g) for g in (kernel, bias)]
    parts = [(m, parameter_sums(m), m.mean.size) for m in moments]
    got = layer_columns(parts, selection.columns("light"))
    want = loop_layer([list(kernel), list(bias)])
    assert set(got) == set(selection.columns("light"))
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-10), name
    assert float(got["nonfinite_examples"]) == 0


def test_examples_with_a_nan_anywhere_in_the_layer_are_counted_once() -> None:
    kernel, bias = np.ones((5, 2)), np.ones((5, 1))
    kernel[1, 0], bias[1, 0], bias[3, 0] = np.nan, np.inf, np.inf
    with np.errstate(invalid="ignore"):
        parts = [(m, parameter_sums(m), 1) for m in map(Moments.from_per_example, (kernel, bias))]
    assert float(layer_columns(parts, ("nonfinite_examples",))["nonfinite_examples"]) == 2


def test_a_column_that_no_parameter_has_is_nan_and_never_zero() -> None:
    moments = Moments.from_per_example(np.ones((3, 2)))
    got = layer_columns([(moments, parameter_sums(moments), 2)], selection.columns("default"))
    assert np.isnan(float(got["step_variance"]))
    assert np.isnan(float(got["maxva_beta"]))


def test_means_over_a_layer_are_weighted_by_the_parameters_sizes() -> None:
    moments = Moments.from_per_example(np.ones((2, 1)))
    parts = [(moments, {"maxva_beta": np.float64(0.5)}, 30), (moments, {"maxva_beta": np.float64(0.9)}, 10)]
    assert float(layer_columns(parts, ("maxva_beta",))["maxva_beta"]) == pytest.approx(0.6)


def test_numpy_torch_and_jitted_jax_give_the_same_columns() -> None:
    grads = np.random.default_rng(3).standard_normal((7, 5)).astype(np.float32)

    def columns(values: object) -> dict[str, object]:
        moments = Moments.from_per_example(values)
        return layer_columns([(moments, parameter_sums(moments), 5)], selection.columns("light"))

    want = columns(grads)
    for got in (columns(torch.as_tensor(grads)), jax.jit(columns)(grads)):
        for name, value in want.items():
            assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name


def test_every_column_of_the_catalogue_adds_up_as_its_kind_says() -> None:
    moments = Moments.from_per_example(np.ones((2, 1)))
    for row in catalog.WIRE:
        if row.kind == "count":
            continue
        parts = [(moments, {row.name: np.float64(0.5)}, 10), (moments, {row.name: np.float64(0.5)}, 10)]
        assert float(layer_columns(parts, (row.name,))[row.name]) == {"mean": 0.5, "sum": 1.0}[row.kind], row.name
