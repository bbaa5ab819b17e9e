import numpy as np

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.checks import check_batch
from gradiometer.protos.columns import column_arrays, in_unit, pack_batch, scalar_arrays, unit_exponents
from gradiometer.stats_core import catalog


def batch() -> StepBatch:
    return pack_batch(
        [4, 5], [1, 2], 2, {"mean_sq_norm": np.array([[1, 2], [3, np.nan]])}, {"loss": np.array([0.5, np.inf])}
    )


def test_columns_and_scalars_come_back_as_they_were_packed() -> None:
    message = StepBatch.FromString(batch().SerializeToString())
    check_batch(message, 2)
    np.testing.assert_array_equal(column_arrays(message)["mean_sq_norm"], [[1, 2], [3, np.nan]])
    np.testing.assert_array_equal(scalar_arrays(message)["loss"], [0.5, np.inf])


def test_columns_are_little_endian_float32_whatever_they_were_made_from() -> None:
    message = pack_batch([1], [0], 1, {"count": np.array([[1.0]], ">f8")}, {})
    assert message.columns["count"] == b"\x00\x00\x80\x3f"


def test_columns_of_a_step_in_another_unit_come_back_in_true_values() -> None:
    sums = {row.name: np.array([[3.0, np.nan], [3.0, -5.0]]) for row in catalog.WIRE}
    message = pack_batch([1, 2], [0, 0], 2, sums, {"unit_exponent": np.array([np.nan, -70.0])})
    check_batch(message, 2)
    for row in catalog.WIRE:
        found = column_arrays(message)[row.name]
        np.testing.assert_array_equal(found[0], [3.0, np.nan])
        np.testing.assert_array_equal(found[1], np.array([3.0, -5.0]) * 2.0 ** (-70 * row.power))
    assert {row.power for row in catalog.WIRE} == {-2, -1, 0, 1, 2}


def test_columns_in_their_plain_unit_are_views_of_the_message() -> None:
    message = pack_batch([1, 2], [0, 0], 1, {"count": np.ones((2, 1))}, {"unit_exponent": np.array([0.0, np.nan])})
    assert unit_exponents(message) is None
    found = column_arrays(message)["count"]
    assert (found.dtype, found.flags.owndata, found.flags.writeable) == (np.float32, False, False)


def test_a_unit_there_and_back_changes_no_bit() -> None:
    values = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    exponents = np.array([100, 0, -200])
    for name in ("mean_sq_norm", "norm_p99", "inverse_root_sq", "count"):
        there = in_unit(name, values, -exponents)
        np.testing.assert_array_equal(in_unit(name, there, exponents).astype(np.float32), values)


def test_what_no_float64_holds_is_infinite_and_no_warning() -> None:
    message = pack_batch([1], [0], 1, {"mean_sq_norm": np.ones((1, 1))}, {"unit_exponent": np.array([600.0])})
    assert column_arrays(message)["mean_sq_norm"][0, 0] == np.inf
