"""One call of `gradiometer.value_and_grad`, taken apart: its measured way and its plain way to the same results."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradiometer.collectors import jax_axis
from gradiometer.collectors.jax_layers import leaf_name, leaf_path, measurable
from gradiometer.collectors.jax_rows import absent_moments, batch_size, rows_of, with_dots
from gradiometer.stats_core import Moments
from gradiometer.stats_core.arrays import positive_or_one, widened
from gradiometer.stats_core.errors import UnsupportedModel

__all__ = ["REDUCTIONS", "Call", "Options", "Results"]

REDUCTIONS = ("mean", "sum", "per_example")


@dataclass(frozen=True)
class Options:
    """The arguments of `gradiometer.value_and_grad`, positions as tuples."""

    argnums: tuple[int, ...]
    one_argnum: bool
    batch_argnums: tuple[int, ...]
    rng_argnums: tuple[int, ...]
    weights_argnum: int | None
    has_aux: bool
    loss_reduction: str
    microbatch_size: int | None
    axis_name: jax_axis.AxisName | None
    dots: bool = False
    sign_mean: bool = False


class Results(NamedTuple):
    """What either way returns: the same structure, shapes and types."""

    value: jax.Array
    aux: Any
    grads: list[jax.Array]  # one a trained leaf
    moments: list[Moments]


class Call:
    """The arguments of one call, checked, and what can be done with them.

    Args:
        loss_fn: the user's.
        options: of `gradiometer.value_and_grad`.
        args: of the call, by position.
        kwargs: of the call, by name.
    """

    def __init__(
        self, loss_fn: Callable[..., Any], options: Options, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        highest = max(*options.argnums, *options.batch_argnums, *options.rng_argnums, options.weights_argnum or 0)
        if highest >= len(args):
            raise ValueError(
                f"value_and_grad needs at least {highest + 1} positional arguments, got args={len(args)}; "
                "pass parameters, batch, keys and weights by position"
            )
        self._loss_fn, self._options, self._args, self._kwargs = loss_fn, options, args, kwargs
        params = tuple(args[i] for i in options.argnums)
        named = jax.tree_util.tree_leaves_with_path(params[0] if options.one_argnum else params)
        for keys, leaf in named:
            if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                raise TypeError(
                    f"value_and_grad needs real parameters, got {leaf_name(keys)}={jnp.result_type(leaf)}; "
                    "keep real and imaginary part as two parameters"
                )
        self._treedef = jax.tree.structure(params)
        self._leaves = [jnp.asarray(leaf) if isinstance(leaf, float) else leaf for _, leaf in named]
        self._trained = [index for index, leaf in enumerate(self._leaves) if measurable(leaf)]
        if not self._trained:
            raise ValueError(
                f"value_and_grad needs a floating-point parameter, got none at argnums={options.argnums}; "
                "set argnums to the position of the parameters"
            )
        self._batch = batch_size([args[i] for i in options.batch_argnums])
        self._weights = None if options.weights_argnum is None else jnp.asarray(args[options.weights_argnum])
        if self._weights is not None and self._weights.shape != (self._batch,):
            raise ValueError(
                f"value_and_grad needs one weight a row, got weights of shape {self._weights.shape} for "
                f"batch={self._batch}; pass weights of shape (batch,)"
            )

    @property
    def num_params(self) -> int:
        """Elements of the trained parameters."""
        return sum(math.prod(self._leaves[index].shape) for index in self._trained)

    def as_params(self, values: Sequence[Any], absent: Callable[[Any], Any]) -> Any:
        """A pytree like the parameters from one value a trained leaf; ``absent`` makes the others from their leaf."""
        by_index = dict(zip(self._trained, values, strict=True))
        filled = [by_index[i] if i in by_index else absent(leaf) for i, leaf in enumerate(self._leaves)]
        params = jax.tree.unflatten(self._treedef, filled)
        return params[0] if self._options.one_argnum else params

    def measured(self) -> Results:
        """From one pass over the rows."""
        options, weights = self._options, self._weights
        leaves = self._start()
        places = options.batch_argnums + options.rng_argnums
        columns = [self._args[i] for i in options.batch_argnums]
        columns += [self._split(self._args[i]) for i in options.rng_argnums]

        def row_loss(leaves: Sequence[jax.Array], row: Sequence[Any]) -> tuple[jax.Array, Any]:
            given = {
                place: value if place in options.rng_argnums else jax.tree.map(lambda x: x[None], value)
                for place, value in zip(places, row, strict=True)
            }
            if weights is not None and options.weights_argnum is not None:
                given[options.weights_argnum] = jnp.ones((1,), weights.dtype)
            loss, aux = self._loss(leaves, given, rows=1)
            return loss.reshape(()), aux

        rows = rows_of(
            row_loss, leaves, columns, weights, options.microbatch_size, options.axis_name, sign_mean=options.sign_mean
        )
        losses, moments = rows.losses, rows.moments
        value = self._mean(losses)
        if options.axis_name is not None:
            value = jax_axis.weighted_mean(value, moments[0].weight_sum, options.axis_name)
            moments = [jax_axis.merged(m, options.axis_name) for m in moments]
        if options.dots:
            moments = with_dots(moments, rows)
        grads = [m.mean for m in moments]
        if options.loss_reduction == "sum":
            value = value * moments[0].weight_sum.astype(value.dtype)
            grads = [grad * m.weight_sum for grad, m in zip(grads, moments, strict=True)]
        return self._finish(Results(value.astype(losses.dtype), self._aux(rows.aux), grads, moments))

    def plain(self) -> Results:
        """As without us, with Moments of no examples."""
        options = self._options
        leaves = self._start()

        def loss(leaves: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
            value, aux = self._loss(leaves, {}, rows=self._batch)
            return (value if value.shape == () else self._mean(value).astype(value.dtype)), aux

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(leaves)
        if options.axis_name is not None:
            value, *grads = (self._over_axis(array, options.axis_name) for array in (value, *grads))
        has_dots = options.dots and (options.microbatch_size is None or options.microbatch_size >= self._batch)
        moments = [absent_moments(leaf, self._batch, dots=has_dots, sign_mean=options.sign_mean) for leaf in leaves]
        return self._finish(Results(value, aux, grads, moments))

    def _start(self) -> list[jax.Array]:
        """The trained leaves, as what to differentiate by."""
        leaves = [jnp.asarray(self._leaves[index]) for index in self._trained]
        axis_name = self._options.axis_name
        return leaves if axis_name is None else [jax_axis.varying(leaf, axis_name) for leaf in leaves]

    def _loss(self, leaves: Sequence[jax.Array], given: Mapping[int, Any], *, rows: int) -> tuple[jax.Array, Any]:
        """The user's loss, with the trained leaves and the given arguments put in: checked value, and aux."""
        options = self._options
        args = list(self._args)
        for place, value in given.items():
            args[place] = value
        by_index = dict(zip(self._trained, leaves, strict=True))
        params = [by_index.get(i, leaf) for i, leaf in enumerate(self._leaves)]
        for place, tree in zip(options.argnums, jax.tree.unflatten(self._treedef, params), strict=True):
            args[place] = tree
        if options.loss_reduction == "per_example" and options.weights_argnum is not None:
            args[options.weights_argnum] = jnp.ones_like(args[options.weights_argnum])  # its losses are weighed by us
        result = self._loss_fn(*args, **self._kwargs)
        value, aux = result if options.has_aux else (result, None)
        _refuse_batch_statistics(aux)
        value = jnp.asarray(value)
        wanted = (rows,) if options.loss_reduction == "per_example" else ()
        if value.shape != wanted:
            raise ValueError(
                f"value_and_grad needs a loss of shape {wanted} for {rows} rows under "
                f"loss_reduction={options.loss_reduction!r}, got shape={value.shape}; return that, or set "
                f"loss_reduction to another of {REDUCTIONS}"
            )
        return value, aux

    def _mean(self, losses: jax.Array) -> jax.Array:
        """The weighted mean of the rows' losses; a row of weight 0 is no row, whatever its loss."""
        losses = jnp.asarray(widened(losses))
        if self._weights is None:
            return jnp.mean(losses)
        weights = self._weights.astype(losses.dtype)
        losses = jnp.where(weights != 0, losses, jnp.zeros_like(losses))
        mean: jax.Array = jnp.sum(weights * losses) / positive_or_one(jnp.sum(weights))
        return mean

    def _over_axis(self, local: jax.Array, axis_name: jax_axis.AxisName) -> jax.Array:
        """A plain value or gradient of this shard, reduced over all shards as the loss is over rows."""
        if self._options.loss_reduction == "sum":
            return jax_axis.summed(local, axis_name)
        wide: jax.Array = widened(local)
        own = (
            jnp.full((), self._batch, wide.dtype)
            if self._weights is None
            else jnp.sum(self._weights.astype(wide.dtype))
        )
        return jax_axis.weighted_mean(wide, own, axis_name).astype(local.dtype)

    def _split(self, keys: Any) -> Any:
        """One key a row in place of each key; other keys on each shard of a mapped axis."""

        def split(key: jax.Array) -> jax.Array:
            for name in jax_axis.axis_names(self._options.axis_name):
                key = jax.random.fold_in(key, lax.axis_index(name))
            return jax.random.split(key, self._batch)

        return jax.tree.map(split, keys)

    def _aux(self, rows_aux: Any) -> Any:
        """Aux as the plain call gives it.

        What has a leading axis of rows is joined from the rows. Anything else (an accuracy, a count) can't be
        known from them, so it comes from a plain forward pass; nothing of that pass is run where it isn't needed.
        """

        def forward() -> Any:
            return self._loss(self._start(), {}, rows=self._batch)[1]

        shapes = jax.eval_shape(forward)
        wanted = jax.tree.leaves(shapes)
        treedef: Any = jax.tree.structure(shapes)
        stacked = treedef.flatten_up_to(rows_aux)
        by_row = [
            want.shape[:1] == (self._batch,) and row.shape == (self._batch, 1, *want.shape[1:])
            for row, want in zip(stacked, wanted, strict=True)
        ]
        whole = stacked if all(by_row) else jax.tree.leaves(forward())
        return treedef.unflatten(
            row.reshape(want.shape) if joined else other
            for row, want, joined, other in zip(stacked, wanted, by_row, whole, strict=True)
        )

    def _finish(self, results: Results) -> Results:
        """Gradients in their parameters' types; what stays this shard's own marked so, alike in both ways."""
        types = [jnp.result_type(self._leaves[index]) for index in self._trained]
        grads = [grad.astype(dtype) for grad, dtype in zip(results.grads, types, strict=True)]
        axis_name = self._options.axis_name
        if axis_name is None:
            return results._replace(grads=grads)
        local = [jax_axis.varying((m.sq_norms, m.weights, m.dots), axis_name) for m in results.moments]
        moments = [
            m._replace(sq_norms=n, weights=a, dots=d) for m, (n, a, d) in zip(results.moments, local, strict=True)
        ]
        return Results(results.value, jax_axis.varying(results.aux, axis_name), grads, moments)


def _refuse_batch_statistics(aux: Any) -> None:
    """Running statistics that come back as aux mean BatchNorm in training mode, where no row has a loss of its own."""

    def is_statistic(leaf: Any) -> bool:
        return any(kind.__name__ == "BatchStat" for kind in type(leaf).__mro__)  # nnx, recognised without importing it

    for keys, leaf in jax.tree_util.tree_leaves_with_path(aux, is_leaf=is_statistic):
        path = leaf_path(keys)
        if "batch_stats" in path or is_statistic(leaf):
            raise UnsupportedModel(
                f"value_and_grad needs a loss whose rows do not mix, got aux={'.'.join(path)!r}, a running statistic "
                "of BatchNorm in training mode; use GroupNorm, or BatchNorm with use_running_average=True"
            )
