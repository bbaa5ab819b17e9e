import math

import numpy as np
import pytest

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.checks import check_batch
from gradiometer.protos.distributions import pack_examples, pack_histograms
from gradiometer.stats_core.examples import Outliers, outliers
from gradiometer.stats_core.histogram import Histogram, Sketch, sketch_fixed, sketch_rows


def norms(rows: int = 3, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal((rows, 40))).astype(np.float32)


def test_a_message_says_what_the_sketch_does() -> None:
    sketch = sketch_rows(norms())
    found = pack_histograms("example_norm", sketch, 4)
    assert [(one.step_index, one.layer, one.statistic, one.schema) for one in found] == [
        (4, layer, "example_norm", 3) for layer in range(3)
    ]
    for layer, one in enumerate(found):
        want = Histogram.from_sketch(sketch, layer)
        assert one.zero_threshold == want.zero_threshold
        assert tuple(one.positive_index) == want.positive_index
        assert tuple(one.positive_count) == want.positive_count
        assert one.zero_count == want.zero_count
        assert not one.negative_index


def test_what_is_packed_may_travel() -> None:
    batch = StepBatch(steps=[0], unix_nanos=[0], num_layers=3)
    batch.histograms.extend(pack_histograms("example_norm", sketch_rows(norms()), 0))
    batch.examples.extend(pack_examples(outliers(norms()[0], 5), 0))
    assert len(batch.histograms) == 3
    assert len(batch.examples) == 5
    check_batch(batch, 3)


def test_zeros_are_counted_below_the_window() -> None:
    (found,) = pack_histograms("element_t_sq", sketch_fixed(np.array([0.0, 0.0, 1.0, 1e-9])), 0)
    assert (found.zero_count, found.zero_threshold) == (3, 2.0**-16)
    assert list(found.positive_index) == [0]
    (found,) = pack_histograms("element_t_sq", sketch_fixed(np.zeros(2)), 0)
    assert (found.zero_count, list(found.positive_index)) == (2, [])


def test_a_layer_without_a_count_or_with_one_that_is_no_number_has_no_message() -> None:
    first = np.array([0.0, 0.0, np.nan, 8.0, 16.0])
    counts = np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 3.0], [np.nan, 2.0], [0.0, 4.0]])
    zeros = np.array([0.0, 0.0, 1.0, 1.0, np.nan])
    found = pack_histograms("example_norm", Sketch(first, counts, zeros), 0)
    assert [one.layer for one in found] == [0]


@pytest.mark.parametrize("exponent", [-40, 3])
def test_counts_of_scaled_gradients_are_those_of_the_gradients(exponent: int) -> None:
    values = norms()
    want = pack_histograms("example_norm", sketch_rows(values), 0)
    scaled = sketch_rows(values * np.float32(2.0**-exponent))
    assert pack_histograms("example_norm", scaled, 0, exponent) == want
    # A ratio has no unit: nothing to undo.
    assert pack_histograms("element_t_sq", scaled, 0, exponent) == pack_histograms("element_t_sq", scaled, 0)


def test_examples_are_named_by_the_users_own_ids_or_by_their_rows() -> None:
    found = Outliers(np.array([2, 0, -1]), np.array([9.0, 4.0, np.nan]))
    assert [one.example_id for one in pack_examples(found, 0)] == ["2", "0"]
    for ids in (["a", "b", "c"], np.array(["a", "b", "c"])):
        assert [one.example_id for one in pack_examples(found, 0, ids)] == ["c", "a"]
    for ids in (np.array([7, 8, 9]), [7, 8, 9], range(7, 10)):
        assert [one.example_id for one in pack_examples(found, 0, ids)] == ["9", "7"]


def test_ids_that_are_tensors_are_read_as_numbers() -> None:
    torch = pytest.importorskip("torch")
    found = pack_examples(Outliers(np.array([1]), np.array([9.0])), 0, torch.tensor([7, 8]))
    assert [one.example_id for one in found] == ["8"]


def test_an_endless_id_is_cut() -> None:
    (found,) = pack_examples(Outliers(np.array([0]), np.array([9.0])), 0, ["x" * 10_000])
    assert found.example_id == "x" * 256


def test_too_few_ids_are_an_error() -> None:
    with pytest.raises(IndexError):
        pack_examples(Outliers(np.array([3]), np.array([9.0])), 0, ["a"])


def test_squared_norms_of_scaled_gradients_are_those_of_the_gradients() -> None:
    found = pack_examples(Outliers(np.array([2, 1, 0]), np.array([np.nan, 3.0, 1.0], np.float32)), 0, None, 90)
    assert [one.place for one in found] == [0, 1, 2]
    assert math.isnan(found[0].sq_norm)
    assert found[1].sq_norm == 3 * 2.0**180
    (found,) = pack_examples(Outliers(np.array([0]), np.array([3.0])), 0, None, 700)
    assert found.sq_norm == math.inf
