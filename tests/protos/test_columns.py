import numpy as np

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.checks import check_batch
from gradiometer.protos.columns import column_arrays, pack_batch, scalar_arrays


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
