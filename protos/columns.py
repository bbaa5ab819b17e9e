"""Columns of a step batch: arrays to bytes and back, in the wire's types and byte order.

Squares of very large or very small gradients leave float32's range. Columns of such a step travel in another unit:
where the step's scalar ``unit_exponent`` is e, a column that grows with the power p of the gradients is in units of
2^(e·p) (`gradiometer.stats_core.rows.Statistic.power`). `column_arrays` gives true values back. Scalars, histograms
and examples are always true values.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.stats_core.catalog import WIRE

__all__ = [
    "COLUMN_DTYPE",
    "SCALAR_DTYPE",
    "UNIT_EXPONENT",
    "column_arrays",
    "in_unit",
    "pack_batch",
    "scalar_arrays",
    "unit_exponents",
]

UNIT_EXPONENT = "unit_exponent"
"""Name of the scalar that says in which unit the columns of a step are."""

COLUMN_DTYPE = np.dtype("<f4")
SCALAR_DTYPE = np.dtype("<f8")
_POWERS = {row.name: row.power for row in WIRE if row.power}


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
    """The columns of a checked batch in true values, shape ``(steps, layers)`` each.

    Returns:
        Views of the message, float32, read-only; float64 arrays where a step's unit is not 1.

    Example:
        >>> import numpy as np
        >>> sums, unit = {"mean_sq_norm": np.array([[3.0]]), "count": np.array([[8.0]])}, np.array([100.0])
        >>> found = column_arrays(pack_batch([7], [0], 1, sums, {"unit_exponent": unit}))
        >>> float(found["mean_sq_norm"][0, 0]) == 3 * 2.0**200, float(found["count"][0, 0])
        (True, 8.0)
    """
    shape = (len(batch.steps), batch.num_layers)
    views = {name: np.frombuffer(values, COLUMN_DTYPE).reshape(shape) for name, values in batch.columns.items()}
    exponents = unit_exponents(batch)
    return views if exponents is None else {name: in_unit(name, values, -exponents) for name, values in views.items()}


def unit_exponents(batch: StepBatch) -> np.ndarray | None:
    """The exponent of each step's unit, shape ``(steps,)``, integers; None where all units are 1."""
    found = batch.scalars.get(UNIT_EXPONENT)
    if found is None:
        return None
    exponents: np.ndarray = np.nan_to_num(np.frombuffer(found, SCALAR_DTYPE)).astype(np.int64)
    return exponents if exponents.any() else None


def in_unit(name: str, values: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """A column of true values in units of ``2^(exponents·power)``; float64 where it has a unit, else as it is.

    Args:
        name: catalogue name of the column.
        values: shape ``(steps, layers)``.
        exponents: shape ``(steps,)``, integers.
    """
    power = _POWERS.get(name)
    if power is None:
        return values
    with np.errstate(over="ignore", under="ignore"):
        scaled: np.ndarray = np.ldexp(values.astype(np.float64), -power * exponents[:, None])
    return scaled


def scalar_arrays(batch: StepBatch) -> dict[str, np.ndarray]:
    """The scalars of a checked batch, shape ``(steps,)`` each: views, read-only."""
    return {name: np.frombuffer(values, SCALAR_DTYPE) for name, values in batch.scalars.items()}
