"""Where an optax optimizer of the MaxVA family keeps its temporal moments, read without importing the optimizer.

The state is recognised by its fields (``u``, ``s``, ``w`` and ``rule``), wherever in a chain it lies.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradiometer.collectors.jax_layers import leaf_name
from gradiometer.stats_core import Moments, TemporalMoments
from gradiometer.stats_core.maxva import within_variance

__all__ = ["OptimizerMoments", "optimizer_moments"]

_FIELDS = ("u", "s", "w", "rule")


class OptimizerMoments(NamedTuple):
    """One parameter's temporal moments in an optimizer's state, and the rule that the optimizer applies to them.

    Attributes:
        moments: u, s, w before the update.
        betas: ``beta_max``, ``beta_min``, ``beta_init``, as `gradiometer.stats_core.maxva.update` takes them.
        within: 0 where the optimizer has no use for the examples' variance, 1 for ``within="mean"``, 2 for "full".
    """

    moments: TemporalMoments
    betas: Mapping[str, Any]
    within: jax.Array

    def within_variance(self, measured: Moments, scale: jax.Array) -> jax.Array:
        """τ² as the optimizer's own step will have it.

        Args:
            measured: the parameter's Moments, as handed to the optimizer.
            scale: squared norm of the optimizer's gradient over that of the measured mean.

        Returns:
            Shape ``(*param,)``. Unit: (loss / parameter)², of the gradient that the optimizer sees.
        """
        mean, full = within_variance(measured), within_variance(measured, "full")
        tau2 = jnp.where(self.within == 1, mean, jnp.where(self.within == 2, full, jnp.zeros_like(mean)))
        return tau2 * scale.astype(mean.dtype)


def optimizer_moments(opt_state: Any) -> dict[str, OptimizerMoments]:
    """The temporal moments in an optax state, by full parameter name, as `jax_layers.leaf_name` spells it.

    Parameters that an ``optax.masked`` or ``optax.multi_transform`` keeps from the optimizer are absent; an
    empty result means that no optimizer of the family is in the state.

    Args:
        opt_state: any optax state, before the update.
    """
    found: dict[str, OptimizerMoments] = {}
    for state in jax.tree.leaves(opt_state, is_leaf=_is_ours):
        if not _is_ours(state):
            continue
        rule = state.rule
        betas = {"beta_max": rule.b2, "beta_min": rule.b2_min, "beta_init": rule.b2_init}
        by_field = [jax.tree_util.tree_leaves_with_path(getattr(state, name)) for name in ("u", "s", "w")]
        for (keys, u), (_, s), (_, w) in zip(*by_field, strict=True):
            own = {name: beta.astype(u.dtype) for name, beta in betas.items()}
            found[leaf_name(keys)] = OptimizerMoments(TemporalMoments(u, s, w), own, rule.within)
    return found


def _is_ours(node: Any) -> bool:
    return all(hasattr(node, name) for name in _FIELDS)
