"""Columns of a step batch: arrays to bytes and back, in the wire's types and byte order."""

from collections.abc import Mapping, Sequence

import numpy as np

from gradiometer.protos.batch_pb2 import StepBatch

__all__ = ["COLUMN_DTYPE", "SCALAR_DTYPE", "column_arrays", "pack_batch", "scalar_arrays"]

COLUMN_DTYPE = np.dtype("<f4")
SCALAR_DTYPE = np.dtype("<f8")


def pack_batch(
    steps: Sequence[int],
    unix_nanos: Sequence[int],
    num_layers: int,
    columns: Mapping[str, np.ndarray],
    scalars: Mapping[str, np.ndarray],
) -> StepBatch:
    """A message from arrays of shape ``(steps, layers)`` and ``(steps,)``.

    Example:
        >>> import numpy as np
        >>> batch = pack_batch([7], [0], 2, {"mean_sq_norm": np.array([[1.0, 2.0]])}, {"loss": np.array([0.5])})
        >>> column_arrays(batch)["mean_sq_norm"]
        array([[1., 2.]], dtype=float32)
    """
    return StepBatch(
        steps=steps,
        unix_nanos=unix_nanos,
        num_layers=num_layers,
        columns={name: np.ascontiguousarray(values, COLUMN_DTYPE).tobytes() for name, values in columns.items()},
        scalars={name: np.ascontiguousarray(values, SCALAR_DTYPE).tobytes() for name, values in scalars.items()},
    )


def column_arrays(batch: StepBatch) -> dict[str, np.ndarray]:
    """The columns of a checked batch, shape ``(steps, layers)`` each: views, read-only."""
    shape = (len(batch.steps), batch.num_layers)
    return {name: np.frombuffer(values, COLUMN_DTYPE).reshape(shape) for name, values in batch.columns.items()}


def scalar_arrays(batch: StepBatch) -> dict[str, np.ndarray]:
    """The scalars of a checked batch, shape ``(steps,)`` each: views, read-only."""
    return {name: np.frombuffer(values, SCALAR_DTYPE) for name, values in batch.scalars.items()}
