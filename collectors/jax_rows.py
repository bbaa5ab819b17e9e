"""Rows of a batch, one at a time: their losses, and the Moments of their gradients.

The one place where per-example gradients exist. ``vmap`` materialises them for all rows at once;
with a chunk size, ``lax.scan`` does so for that many rows, and the Moments of the chunks are merged
exactly, so that memory does not grow with the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradiometer.collectors import jax_axis
from gradiometer.stats_core import Moments
from gradiometer.stats_core.arrays import widened

__all__ = ["Rows", "absent_moments", "batch_size", "rows_of", "with_dots"]

RowLoss = Callable[[Sequence[jax.Array], Any], tuple[jax.Array, Any]]
"""(parameter leaves, one row of the inputs) → (its loss, its aux)."""


class Rows(NamedTuple):
    """What one pass over the rows of a batch finds.

    Attributes:
        losses: each row's own loss, shape ``(batch,)``.
        aux: each row's aux, the rows stacked on a new leading axis.
        moments: one for each parameter leaf.
        grads: each row's gradient by each parameter leaf, shape ``(batch, *param)``; None where they were never
            there all at once.
    """

    losses: jax.Array
    aux: Any
    moments: list[Moments]
    grads: list[jax.Array] | None = None


def batch_size(batch: Any) -> int:
    """The length of the leading axis that all leaves of the batch share.

    Raises:
        ValueError: if there is no leaf, a leaf has no axis, or the lengths differ or are 0.
    """
    shapes = [tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"value_and_grad needs batch arguments whose leaves share a leading axis of examples, got shapes {shapes}; "
            "name the batch arguments in batch_argnums and close over the rest"
        )
    return int(shapes[0][0])


def rows_of(
    row_loss: RowLoss,
    leaves: Sequence[jax.Array],
    inputs: Any,
    weights: jax.Array | None,
    chunk: int | None,
    axis_name: jax_axis.AxisName | None = None,
    *,
    sign_mean: bool = False,
) -> Rows:
    """Differentiate every row on its own.

    Args:
        row_loss: loss and aux of one row.
        leaves: the parameters, floating-point.
        inputs: pytree whose leaves have a leading axis of rows.
        weights: raw weights, shape ``(batch,)``; a row of weight 0 is no example. None for weights of 1.
        chunk: rows to a pass, or None for all at once. The last chunk may be smaller.
        axis_name: the mapped axis that the parameters were marked as varying over, if any.
        sign_mean: True where the Moments are to have it.
    """
    batch = batch_size(inputs)
    if chunk is None or chunk >= batch:
        return _one_pass(row_loss, leaves, inputs, weights, sign_mean)
    whole = batch // chunk
    everything = (inputs, weights)
    body = jax.tree.map(lambda x: x[: whole * chunk].reshape(whole, chunk, *x.shape[1:]), everything)

    def step(carry: list[Moments], part: Any) -> tuple[list[Moments], Any]:
        inputs, weights = part
        found = _one_pass(row_loss, leaves, inputs, weights, sign_mean)
        merged = [before.merge(_without_rows(now)) for before, now in zip(carry, found.moments, strict=True)]
        return merged, (found.losses, found.aux, [_rows_alone(m) for m in found.moments])

    start = [absent_moments(leaf, 0, sign_mean=sign_mean) for leaf in leaves]
    if axis_name is not None:
        start = jax_axis.varying(start, axis_name)  # a loop's carry keeps its marks
    total, per_chunk = lax.scan(step, start, body)
    losses, aux, rows = jax.tree.map(lambda x: x.reshape(whole * chunk, *x.shape[2:]), per_chunk)
    if whole * chunk < batch:
        last_inputs, last_weights = jax.tree.map(lambda x: x[whole * chunk :], everything)
        rest = _one_pass(row_loss, leaves, last_inputs, last_weights, sign_mean)
        total = [before.merge(_without_rows(last)) for before, last in zip(total, rest.moments, strict=True)]
        tail = (rest.losses, rest.aux, [_rows_alone(m) for m in rest.moments])
        losses, aux, rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (losses, aux, rows), tail)
    return Rows(losses, aux, [m._replace(sq_norms=n, weights=a) for m, (n, a) in zip(total, rows, strict=True)])


def absent_moments(leaf: jax.Array, batch: int, *, dots: bool = False, sign_mean: bool = False) -> Moments:
    """Moments of no examples, shaped as those of ``batch`` rows would be: what an unmeasured step returns."""
    dtype = widened(leaf).dtype
    zeros, none, rows = (jnp.zeros(shape, dtype) for shape in (leaf.shape, (), (batch,)))
    return Moments(
        count=none,
        weight_sum=none,
        weight_sq_sum=none,
        mean=zeros,
        m2=zeros,
        sq_norms=rows,
        weights=rows,
        dots=rows if dots else None,
        sign_mean=zeros if sign_mean else None,
    )


def with_dots(moments: Sequence[Moments], rows: Rows) -> list[Moments]:
    """The same with each row's dot product with the mean, where the rows' gradients are at hand."""
    if rows.grads is None:
        return list(moments)
    batch = rows.losses.shape[0]
    return [
        one._replace(dots=jnp.sum((grads * one.mean[None]).reshape(batch, -1), axis=1))
        for one, grads in zip(moments, rows.grads, strict=True)
    ]


def _one_pass(
    row_loss: RowLoss,
    leaves: Sequence[jax.Array],
    inputs: Any,
    weights: jax.Array | None,
    sign_mean: bool,  # noqa: FBT001
) -> Rows:
    """All rows at once, by vmap."""

    def one(row: Any) -> tuple[tuple[jax.Array, Any], Sequence[jax.Array]]:
        return jax.value_and_grad(row_loss, has_aux=True)(leaves, row)

    (losses, aux), grads = jax.vmap(one)(inputs)
    grads = [_without_padding(widened(grad), weights) for grad in grads]
    return Rows(losses, aux, [_moments(grad, weights, sign_mean) for grad in grads], grads)


def _without_padding(grads: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Padding has weight 0, and often a loss of 0/0: its gradient must not reach the sums as 0 times NaN."""
    if weights is None:
        return grads
    present = (weights != 0).reshape(-1, *([1] * (grads.ndim - 1)))
    return jnp.where(present, grads, jnp.zeros_like(grads))


def _moments(grads: jax.Array, weights: jax.Array | None, sign_mean: bool) -> Moments:  # noqa: FBT001
    """Moments of materialised gradients, every field an array, so that they can be carried and chosen between."""
    if weights is not None:
        weights = weights.astype(grads.dtype)
    moments = Moments.from_per_example(grads, weights, sign_mean=sign_mean)
    count = grads.shape[0] if weights is None else jnp.sum(weights != 0)
    return moments._replace(
        count=jnp.asarray(count).astype(grads.dtype),
        weight_sum=jnp.asarray(moments.weight_sum, grads.dtype),
        weight_sq_sum=jnp.asarray(moments.weight_sq_sum, grads.dtype),
    )


def _without_rows(moments: Moments) -> Moments:
    """The part that can be carried through a loop: the arrays with one entry a row are left out."""
    nothing = jnp.zeros((0,), moments.mean.dtype)
    return moments._replace(sq_norms=nothing, weights=nothing)


def _rows_alone(moments: Moments) -> tuple[jax.Array, jax.Array]:
    return moments.sq_norms, moments.weights
