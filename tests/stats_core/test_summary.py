import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.stats_core import catalog
from gradiometer.stats_core.examples import ExampleRows, example_columns
from gradiometer.stats_core.histogram import Histogram, sketch_fixed, sketch_rows
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums
from gradiometer.stats_core.selection import Selection
from gradiometer.stats_core.summary import OUTLIERS, Part, Summary, batch_sums, summarized
from tests.reference import loop_layer

LIGHT = Selection.of("light")


def summary_of(layers: list[list[object]], wanted: Selection = LIGHT, weights: object = None) -> Summary:
    """Layers of parameters of per-example gradients."""
    parts = [
        [Part(Moments.from_per_example(g, weights, dots=True, sign_mean=True), g[0].size) for g in layer]
        for layer in layers
    ]
    return summarized(parts, batch_sums([part.moments for layer in parts for part in layer], wanted), wanted)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2.0, 0.5, 3.0, 1.0, 1.0])])
def test_every_layers_columns_agree_with_the_float64_loop(weights: np.ndarray | None) -> None:
    rng = np.random.default_rng(0)
    layers = [[rng.standard_normal((6, 3, 4)) + 1, rng.standard_normal((6, 4))], [rng.standard_normal((6, 5))]]
    got = summary_of(layers, weights=weights)
    assert tuple(got.columns) == LIGHT.columns
    for place, layer in enumerate(layers):
        want = loop_layer([list(grads) for grads in layer], None if weights is None else list(weights))
        for name, value in want.items():
            assert float(got.columns[name][place]) == pytest.approx(value, rel=1e-10), name
        assert got.columns["nonfinite_examples"][place] == 0
    assert got.count == 6


def test_the_noise_of_many_parameters_is_that_of_each() -> None:
    rng = np.random.default_rng(1)
    moments = [Moments.from_per_example(rng.standard_normal((5, n)), rng.uniform(1, 2, 5)) for n in (1, 7, 30)]
    moments = [m._replace(weights=moments[0].weights, weight_sum=moments[0].weight_sum,
                          weight_sq_sum=moments[0].weight_sq_sum) for m in moments]  # fmt: skip
    for place, each in enumerate(moments):
        for name, value in batch_sums(moments, LIGHT).items():
            assert value[place] == pytest.approx(getattr(noise_sums(each), name), rel=1e-12), name


def test_examples_with_a_nan_anywhere_in_the_layer_are_counted_once() -> None:
    kernel, bias = np.ones((5, 2)), np.ones((5, 1))
    kernel[1, 0], bias[1, 0], bias[3, 0] = np.nan, np.inf, np.inf
    with np.errstate(invalid="ignore"):
        found = summary_of([[kernel, bias], [np.ones((5, 1))]])
    assert found.columns["nonfinite_examples"].tolist() == [2, 0]


def test_a_column_that_no_parameter_has_is_nan_and_never_zero() -> None:
    found = summary_of([[np.ones((3, 2))]], Selection.of("default")).columns
    assert np.isnan([found["step_variance"][0], found["maxva_beta"][0]]).all()


def test_a_layer_is_summed_over_all_of_its_parameters_or_over_none() -> None:
    moments = Moments.from_per_example(np.ones((2, 1)))
    layers = [[Part(moments, 1, {"step_variance": np.float64(2.0)}), Part(moments, 1)], [Part(moments, 1)]]
    layers[1][0] = Part(moments, 1, {"step_variance": np.float64(3.0)})
    found = summarized(layers, batch_sums([moments] * 3, LIGHT), Selection.of(["step_variance"])).columns
    assert np.isnan(found["step_variance"][0])
    assert found["step_variance"][1] == 3.0


def test_every_column_that_adds_up_does_so_as_its_kind_says() -> None:
    moments = Moments.from_per_example(np.ones((2, 1)))
    noise = batch_sums([moments] * 2, LIGHT)
    for row in catalog.WIRE:
        if row.kind not in ("sum", "mean") or row.name in noise:
            continue
        layer = [Part(moments, 30, {row.name: np.float64(0.5)}), Part(moments, 10, {row.name: np.float64(0.9)})]
        found = summarized([layer], noise, Selection.of([row.name])).columns[row.name][0]
        assert found == pytest.approx({"mean": 0.6, "sum": 1.4}[row.kind]), row.name


def test_the_whole_models_examples_are_its_layers_examples_added_up_one_by_one() -> None:
    rng = np.random.default_rng(2)
    layers = [[rng.standard_normal((8, 3)) + 0.3, rng.standard_normal((8, 2))], [rng.standard_normal((8, 4))]]
    wanted = Selection.of("full")
    found = summary_of(layers, wanted)
    everything = np.concatenate([grads.reshape(8, -1) for layer in layers for grads in layer], axis=1)
    mean = everything.mean(axis=0)
    rows = ExampleRows(
        (everything**2).sum(axis=1)[None], np.array([mean @ mean]), np.ones(8), (everything @ mean)[None]
    )
    names = [row.name for row in catalog.STATISTICS if row.kind == "example"]
    for name, value in example_columns(rows, names).items():
        assert found.scalars[name] == pytest.approx(value[0], rel=1e-9), name
        assert found.columns[name].shape == (2,)


def test_without_dots_what_needs_them_is_nan() -> None:
    parts = [[Part(Moments.from_per_example(np.random.default_rng(3).standard_normal((4, 3))), 3)]]
    found = summarized(parts, batch_sums([parts[0][0].moments], LIGHT), Selection.of("full"))
    assert np.isnan(found.columns["conflicting_share"][0])
    assert np.isnan(found.scalars["conflicting_share"])
    assert np.isfinite(found.columns["norm_max"][0])


def test_sketches_have_a_row_a_layer() -> None:
    rng = np.random.default_rng(4)
    layers = [[rng.standard_normal((6, 3)), rng.standard_normal((6, 2))], [rng.standard_normal((6, 4))]]
    parts = [
        [Part(Moments.from_per_example(g), g[0].size, {}, {"element_t_sq": sketch_fixed(g[0] ** 2)}) for g in layer]
        for layer in layers
    ]
    noise = batch_sums([part.moments for layer in parts for part in layer], LIGHT)
    found = summarized(parts, noise, Selection.of(["example_norm", "element_t_sq", "element_deviation_ratio"]))
    assert set(found.sketches) == {"example_norm", "element_t_sq"}  # nobody counted the third
    assert [Histogram.from_sketch(found.sketches["element_t_sq"], row).count for row in (0, 1)] == [5, 4]
    norms = np.sqrt(sum((g**2).sum(axis=1) for g in layers[0]))
    assert Histogram.from_sketch(found.sketches["example_norm"], 0) == Histogram.from_sketch(sketch_rows(norms[None]))


def test_outliers_are_those_of_the_whole_model_and_only_where_asked_for() -> None:
    grads = np.arange(1.0, 13.0).reshape(12, 1)
    found = summary_of([[grads], [grads[::-1]]], Selection.of(["light", "outliers"])).outliers
    assert found is not None
    assert len(found.rows) == OUTLIERS
    assert set(found.rows[:2].tolist()) == {0, 11}  # 1 + 144 either way
    assert found.sq_norms[0] == 145.0
    assert summary_of([[grads]]).outliers is None


def test_numpy_torch_and_jitted_jax_give_the_same_summary() -> None:
    grads = np.random.default_rng(5).standard_normal((7, 5)).astype(np.float32)
    wanted = Selection.of(["full", "outliers"])

    def of(values: object) -> Summary:
        moments = Moments.from_per_example(values, dots=True, sign_mean=True)
        return summarized([[Part(moments, 5)]], batch_sums([moments], wanted), wanted)

    want = of(grads)
    for got in (of(torch.as_tensor(grads)), jax.jit(of)(grads)):
        for name, value in want.columns.items():
            assert float(got.columns[name][0]) == pytest.approx(float(value[0]), rel=1e-5, nan_ok=True), name
        for name, value in want.scalars.items():
            assert float(got.scalars[name]) == pytest.approx(float(value), rel=1e-5, nan_ok=True), name
        assert want.outliers is not None
        assert got.outliers is not None
        assert got.outliers.rows.tolist() == want.outliers.rows.tolist()


@given(st.permutations(range(6)))
def test_the_order_of_the_layers_is_the_order_of_the_columns(order: list[int]) -> None:
    rng = np.random.default_rng(6)
    layers = [[rng.standard_normal((4, 2 + n))] for n in range(6)]
    want = summary_of(layers).columns["variance_trace"]
    got = summary_of([layers[place] for place in order]).columns["variance_trace"]
    assert got.tolist() == want[order].tolist()


def test_elements_are_not_counted_where_their_variance_does_not_exist() -> None:
    wanted = Selection.of(["gsnr", "sign_snr"])
    names = ("active_elements", "gsnr_sum", "sign_signal", "sign_noise")
    alone = summary_of([[np.ones((1, 3))]], wanted).columns
    assert np.isnan([float(alone[name][0]) for name in names]).all()
    grads = np.random.default_rng(7).standard_normal((6, 3))
    broken = grads.copy()
    broken[2, 0] = np.nan
    found = summary_of([[grads], [broken]], wanted).columns
    assert np.isfinite([float(found[name][0]) for name in names]).all()
    assert np.isnan([float(found[name][1]) for name in names]).all()
