"""Moments across a mapped axis (``shard_map``, ``pmap``, named ``vmap``): merged exactly, by the job's collectives."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradiometer.stats_core import Moments
from gradiometer.stats_core.arrays import positive_or_one

__all__ = ["AxisName", "axis_names", "gathered", "merged", "summed", "varying", "weighted_mean"]

AxisName = Hashable
"""The name of a mapped axis, or a tuple of such names."""

# jax leaves the first untyped, and has renamed the others once (pvary until 0.8).
_psum: Any = lax.psum
_pcast: Any = getattr(lax, "pcast", None)
_pvary: Any = getattr(lax, "pvary", None)


def axis_names(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """The single names of an axis name that may be a tuple."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def varying(tree: Any, axis_name: AxisName) -> Any:
    """The same values, marked as this shard's own.

    ``shard_map`` sums the gradient of a replicated value over the axis by itself; the gradient of one
    example must not be summed so. Where jax keeps no such marks (``vmap``, ``check_vma=False``), nothing changes.
    """

    def mark(leaf: Any) -> Any:
        for name in axis_names(axis_name):
            if name in _marks(lax.axis_index(name)) and name not in _marks(leaf):
                leaf = _pcast(leaf, name, to="varying") if _pcast else _pvary(leaf, (name,))
        return leaf

    return jax.tree.map(mark, tree)


def summed(local: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the axis of one array a shard."""
    result: jax.Array = _psum(local, axis_name)
    return result


def weighted_mean(local: jax.Array, weight: jax.Array, axis_name: AxisName) -> jax.Array:
    """The mean over the axis of one array a shard, weighted; a shard of weight 0 (nothing but padding) is left out."""
    share = _share(weight, axis_name).astype(local.dtype)
    return summed(jnp.where(share > 0, local * share, jnp.zeros_like(local)), axis_name)


def merged(moments: Moments, axis_name: AxisName) -> Moments:
    """Moments of the examples of all shards (Chan, Golub and LeVeque); ``sq_norms`` and ``weights`` stay local.

    ``dots`` with a shard's own mean are given up.
    """
    mean = _psum(moments.mean * _share(moments.weight_sum, axis_name), axis_name)
    deviation = moments.mean - mean
    return moments._replace(
        count=_psum(moments.count, axis_name),
        weight_sum=_psum(moments.weight_sum, axis_name),
        weight_sq_sum=_psum(moments.weight_sq_sum, axis_name),
        mean=mean,
        m2=_psum(moments.m2 + moments.weight_sum * deviation * deviation, axis_name),
        dots=None,
        sign_mean=None
        if moments.sign_mean is None
        else _psum(moments.sign_mean * _share(moments.weight_sum, axis_name), axis_name),
    )


def gathered(moments: Moments, axis_name: AxisName) -> Moments:
    """Merged Moments with the ``sq_norms``, ``weights`` and ``dots`` of all shards, in the axis' order."""
    return moments._replace(
        sq_norms=_everyones(moments.sq_norms, axis_name),
        weights=_everyones(moments.weights, axis_name),
        dots=None if moments.dots is None else _everyones(moments.dots, axis_name),
    )


def _everyones(local: jax.Array, axis_name: AxisName) -> jax.Array:
    """The local arrays of all shards one after the other; as a sum, so that jax knows the result to be replicated."""
    for name in reversed(axis_names(axis_name)):
        rows, shards = local.shape[0], _psum(1, name)
        place = jnp.zeros((shards * rows,), local.dtype)
        local = _psum(lax.dynamic_update_slice(place, local, (lax.axis_index(name) * rows,)), name)
    return local


def _share(weight: Any, axis_name: AxisName) -> Any:
    """This shard's share of the weight of all shards; 0 where none has any."""
    return weight / positive_or_one(_psum(weight, axis_name))


def _marks(leaf: Any) -> Any:
    """The names of the axes that jax knows a value to vary over."""
    kind = jax.typeof(leaf)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", ())
