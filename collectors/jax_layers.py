"""Layers of a parameter pytree: which leaves are shown together, and under which name.

The order is that of every column of a run, so the collector and the publisher must both ask here.
"""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from gradiometer.protos.run_pb2 import Layer
from gradiometer.stats_core import Moments

__all__ = ["layers_of", "leaf_name", "leaf_path", "measurable"]

# The leaf of an nnx variable hangs below an attribute of its own, which no user has ever typed.
_NNX_LEAF = ("value", "raw_value")
_ROOT = "params"


def leaf_path(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a pytree path as words; the attribute that nnx hangs an array on is left out."""
    words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys]
    if len(words) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and words[-1] in _NNX_LEAF:
        words.pop()
    return tuple(words)


def leaf_name(keys: tuple[Any, ...]) -> str:
    """Full name of a parameter, e.g. "Conv_0.kernel"; "params" where the pytree is one array."""
    return ".".join(leaf_path(keys)) or _ROOT


def measurable(leaf: Any) -> bool:
    """True for what has a gradient: real floating-point numbers, arrays of them or their shapes, and Moments."""
    if isinstance(leaf, Moments | float):
        return True
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def layers_of(params: Any) -> list[Layer]:
    """The layers of a parameter pytree, in the order of every column of a run.

    Leaves that share a path up to their last key are one layer, named by that path: flax's
    ``Conv_0/kernel`` and ``Conv_0/bias`` are the layer "Conv_0". A leaf at the top is a layer of its own.
    Leaves of other types than floating-point (counters, keys) are not parameters and are passed over.

    Args:
        params: any pytree of arrays or of `jax.ShapeDtypeStruct` (an ``nnx.State`` too), or the pytree of
            `Moments` that belongs to one.

    Returns:
        One message a layer, in the order in which jax flattens the pytree. ``kind`` is empty: a pytree
        does not know the classes of its modules.

    Raises:
        ValueError: if there is no floating-point leaf, or two layers or parameters would have one name.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "temperature": jnp.ones(())}
        >>> [(layer.name, list(layer.parameters), layer.num_params) for layer in layers_of(params)]
        [('Dense_0', ['Dense_0.bias', 'Dense_0.kernel'], 8), ('temperature', ['temperature'], 1)]
    """
    groups: dict[tuple[str, ...], Layer] = {}
    for keys, leaf in _leaves(params):
        path = leaf_path(keys)
        home = path[:-1] or path
        array = leaf.mean if isinstance(leaf, Moments) else jnp.asarray(leaf) if isinstance(leaf, float) else leaf
        layer = groups.setdefault(home, Layer(name=".".join(home) or _ROOT, dtype=str(array.dtype)))
        layer.parameters.append(leaf_name(keys))
        layer.num_params += math.prod(array.shape)
    if not groups:
        raise ValueError("layers_of needs params with a floating-point leaf, got none; pass the trained parameters")
    layers = list(groups.values())
    for what, names in (
        ("layer", [layer.name for layer in layers]),
        ("parameter", [name for layer in layers for name in layer.parameters]),
    ):
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise ValueError(
                f"layers_of needs {what}s of unique names, got {what}={name!r} twice; rename one of its keys"
            )
    return layers


def _leaves(params: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The measurable leaves with their keys, Moments taken whole."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Moments))
    return [(keys, leaf) for keys, leaf in leaves if measurable(leaf)]
