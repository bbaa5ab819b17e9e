"""The seam to ``optax.experimental.aggregating``: transformations that see the gradient of every example."""

from typing import Any

import jax
import optax

from gradiometer.stats_core import Moments
from gradiometer.stats_core.errors import MissingDependency

__all__ = ["as_aggregator"]


def as_aggregator(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """An ``optax.experimental.aggregating.Aggregator`` from an optimizer that takes moments.

    For pipelines that already hold materialised per-example gradients (after per-example clipping, say). The
    gradient that the optimizer sees is the mean over the leading axis, and the moments are those of what came in.
    Where nothing happens to single examples in between, ``gradiometer.value_and_grad`` needs less memory.

    Args:
        optimizer: e.g. ``madam(1e-3, variance="per_example")``.

    Returns:
        An Aggregator: ``update(per_example_grads, state, params)``, with gradients of shape ``(batch, *param)``.

    Raises:
        MissingDependency: if the installed optax has no aggregators (before 0.2.7).

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from gradiometer.optimizers.optax_api import madam
        >>> optimizer = as_aggregator(madam(0.1, variance="per_example"))
        >>> state = optimizer.init({"w": jnp.zeros(2)})
        >>> updates, state = optimizer.update({"w": jnp.array([[1.0, 2.0], [3.0, 2.0]])}, state)
        >>> [round(float(x), 4) for x in updates["w"]]      # τ² = 1 beside a mean of 2: 0.1 · 2/√(2² + 1)
        [-0.0894, -0.1]
    """
    try:
        from optax.experimental import aggregating
    except ImportError:
        raise MissingDependency(
            f"as_aggregator needs optax with optax.experimental.aggregating, got optax={optax.__version__}; "
            "pip install 'optax>=0.2.7'"
        ) from None

    def update(per_example: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        moments = jax.tree.map(Moments.from_per_example, per_example)
        leaves, treedef = jax.tree.leaves(per_example), jax.tree.structure(per_example)
        having = jax.tree.leaves(moments, is_leaf=lambda node: isinstance(node, Moments))
        means = [one.mean.astype(leaf.dtype) for one, leaf in zip(having, leaves, strict=True)]
        grads = jax.tree.unflatten(treedef, means)
        result: tuple[Any, Any] = optimizer.update(grads, state, params, moments=moments, **extra_args)
        return result

    aggregator: optax.GradientTransformationExtraArgs = aggregating.Aggregator(optimizer.init, update)
    return aggregator
