import math

import numpy as np
import pytest

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.distributions import pack_examples, pack_histograms
from gradiometer.server.distributions import NAMES, Distributions, Largest
from gradiometer.stats_core.examples import Outliers
from gradiometer.stats_core.histogram import Histogram, sketch_fixed, sketch_rows
from gradiometer.stats_core.tails import hill

RATIO = "element_deviation_ratio"


def batch(*steps: int) -> StepBatch:
    return StepBatch(steps=steps, unix_nanos=[0] * len(steps), num_layers=2)


def norms(rows: np.ndarray, *, step: int = 0, exponent: int = 0) -> StepBatch:
    found = batch(step)
    found.histograms.extend(pack_histograms("example_norm", sketch_rows(rows), 0, exponent))
    return found


def test_what_is_asked_of_a_store_are_the_histograms_and_the_examples() -> None:
    assert NAMES == ("example_norm", RATIO, "element_t_sq", "outliers")


def test_counts_of_steps_are_added_up_and_quantiles_are_those_of_all_numbers() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.standard_normal((5, 2, 400)))
    found = Distributions([norms(rows, step=step) for step, rows in enumerate(values)])
    assert found.names == {"example_norm"}
    for layer in range(2):
        merged = found.layer("example_norm", layer)
        assert merged.count == 2000
        for q in (0.5, 0.9, 0.99):
            exact = float(np.quantile(values[:, layer], q, method="inverted_cdf"))
            # Half a bucket of an eighth of an octave.
            assert merged.quantile(q) == pytest.approx(exact, rel=2 ** (1 / 16) - 1)
    assert found.model("example_norm").count == 4000


def test_histograms_of_other_windows_are_merged_as_histograms_are() -> None:
    rng = np.random.default_rng(1)
    parts = [np.exp(rng.normal(0, 20, (2, 50))) * 10.0**power for power in (-8, 0, 8)]
    found = Distributions([norms(rows) for rows in parts])
    want = Histogram(schema=8)
    for rows in parts:
        want = want.merge(Histogram.from_sketch(sketch_rows(rows), 1))
    assert want.zero_count > 0
    assert found.layer("example_norm", 1) == want


def test_negative_numbers_are_counted_too() -> None:
    message = batch(0)
    fields = {"statistic": RATIO, "schema": 3, "negative_index": [0, 4], "negative_count": [1, 2]}
    message.histograms.add(**fields)  # type: ignore[arg-type]
    message.histograms.add(**fields)  # type: ignore[arg-type]
    found = Distributions([message]).layer(RATIO, 0)
    assert (found.negative_index, found.negative_count) == ((0, 4), (2, 4))


def test_what_nobody_counted_is_empty() -> None:
    found = Distributions([])
    assert found.names == set()
    assert found.layer(RATIO, 0).count == 0
    assert math.isnan(found.model(RATIO).quantile(0.5))
    assert found.tail(0) is None
    assert found.largest(5) == []


def test_elements_of_all_layers_are_the_models() -> None:
    message = batch(0)
    for layer, values in enumerate(([0.5, 0.5, 0.5], [8.0])):
        (one,) = pack_histograms(RATIO, sketch_fixed(np.array(values)), 0)
        one.layer = layer
        message.histograms.append(one)
    assert Distributions([message]).model(RATIO).quantile(0.5) == pytest.approx(0.5, rel=0.05)
    assert Distributions([message]).model(RATIO).quantile(1.0) == pytest.approx(8.0, rel=0.05)


@pytest.mark.parametrize("exponent", [0, 100])
def test_the_tail_index_is_that_of_the_pooled_norms_whatever_their_scale(exponent: int) -> None:
    rng = np.random.default_rng(2)
    values = rng.pareto(2.5, (16, 1, 1000)) + 1.0
    scales = np.exp(rng.normal(0, 3, 16))
    found = Distributions([norms(rows * scale, exponent=exponent) for rows, scale in zip(values, scales, strict=True)])
    tail = found.tail(0)
    assert tail is not None
    exact = hill(values.ravel(), 1600)
    # Both read about a tenth of 16,000 norms: within four standard errors of the truth, 1 in 16,000 would not be.
    assert abs(tail.alpha - 2.5) < 4 * tail.standard_error
    assert tail.alpha == pytest.approx(float(exact.alpha), rel=0.1)
    assert 1600 <= tail.exceedances < 2000


def test_of_few_examples_there_is_no_tail_index() -> None:
    assert Distributions([norms(np.arange(1.0, 50.0)[None])]).tail(0) is None
    assert Distributions([norms(np.ones((1, 4000)))]).tail(0) is None
    assert Distributions([norms(np.zeros((1, 4000)))]).tail(0) is None


def test_the_largest_examples_come_first_and_what_is_not_finite_before_them() -> None:
    first, second = batch(3, 4), batch(9)
    first.examples.extend(pack_examples(Outliers(np.array([0, 1]), np.array([16.0, 4.0])), 1, ["a", "b"]))
    second.examples.extend(pack_examples(Outliers(np.array([0, 1]), np.array([np.nan, 9.0])), 0, ["c", "d"]))
    second.examples.add(layer=1, example_id="of a layer", sq_norm=1e9)
    found = Distributions([first, second])
    largest = found.largest(3)
    assert [(one.example_id, one.step) for one in largest] == [("c", 9), ("a", 4), ("d", 9)]
    assert math.isnan(largest[0].norm)
    assert largest[1] == Largest("a", 4, 4.0)
