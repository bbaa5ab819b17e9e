"""From the Moments of a step to the few numbers a layer that are published, and the state between steps.

Everything here is pure and runs under ``jit``; what is formed is defined in `gradiometer.stats_core.summary`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradiometer.collectors.jax_axis import AxisName, gathered
from gradiometer.collectors.jax_layers import layers_of, leaf_name, measurable
from gradiometer.collectors.optax_state import OptimizerMoments, optimizer_moments
from gradiometer.stats_core import Moments, Summary, TemporalMoments, maxva, selection
from gradiometer.stats_core.arrays import widened
from gradiometer.stats_core.successive import Previous, step_sums
from gradiometer.stats_core.summary import layer_columns, parameter_sums
from gradiometer.stats_core.temporal import maxva_sums

__all__ = ["Temporal", "gradient_scale", "init_temporal", "summarize"]

_MAXVA_COLUMNS = ("temporal_variance", "temporal_variance_prior", "deviation_sq", "deviation_share", "maxva_beta")


class Temporal(NamedTuple):
    """What is kept from one measured step to the next.

    Attributes:
        previous: pytree like the parameters with a `Previous` at each floating-point leaf: one parameter copy.
        moments: the same with a `TemporalMoments`: three copies; None where the optimizer keeps its own.
    """

    previous: Any
    moments: Any


def init_temporal(params: Any, opt_state: Any = None) -> Temporal:
    """The temporal state before the first step, for `summarize`.

    Args:
        params: as given to the loss function.
        opt_state: where it will be given to `summarize`, too: an optimizer of the MaxVA family keeps its own
            u, s, w, and three parameter copies are saved.

    Returns:
        Zeros in float32 or wider, like the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> init_temporal({"w": jnp.ones(2)}).moments["w"].u
        Array([0., 0.], dtype=float32)
    """

    def for_each(make: Any) -> Any:
        return jax.tree.map(
            lambda leaf: make(jnp.zeros_like(widened(jnp.asarray(leaf)))) if measurable(leaf) else None, params
        )

    return Temporal(
        previous=for_each(Previous.zeros_like),
        moments=None if optimizer_moments(opt_state) else for_each(TemporalMoments.zeros_like),
    )


def summarize(
    moments: Any,
    temporal: Temporal | None,
    *,
    opt_state: Any = None,
    grads: Any = None,
    statistics: selection.Statistics = "default",
    axis_name: AxisName | None = None,
) -> tuple[Summary, Temporal | None]:
    """A step's numbers for each layer, and the temporal state after it.

    Args:
        moments: as returned by ``gradiometer.value_and_grad``. Where their count is 0 (a step that was not
            measured), every column is NaN and ``temporal`` comes back as it was.
        temporal: from `init_temporal` or the step before; None: no column through time exists.
        opt_state: the optimizer's state *before* the update. If an optimizer of the MaxVA family is in it, its
            own moments and rule are shown; else the ones in ``temporal``, under MaxVA's default rule.
        grads: the gradient as that optimizer will see it, where it is not ``moments``' mean: after clipping,
            or under ``loss_reduction="sum"``. Publish `gradient_scale` beside the summary then.
        statistics: tier, as `selection.columns`.
        axis_name: inside ``shard_map`` or ``pmap``, as given to ``value_and_grad``.

    Returns:
        The `Summary`, with columns of shape ``(layers,)`` in the order of `jax_layers.layers_of`, and the
        temporal state.

    Raises:
        ValueError: if there is no Moments in ``moments``, or no such tier.

    Example:
        >>> import jax.numpy as jnp
        >>> moments = {"w": Moments.from_per_example(jnp.array([[1.0], [3.0], [5.0]]))}
        >>> summary, temporal = summarize(moments, init_temporal({"w": jnp.zeros(1)}))
        >>> [round(float(summary.columns[name][0]), 4) for name in ("variance_trace", "batch_variance")]
        [4.0, 1.3333]
    """
    names = selection.columns(statistics)
    parameters = _named(moments, Moments)
    layers = layers_of(moments)
    count = next(iter(parameters.values())).count

    def present() -> tuple[Summary, Temporal | None]:
        measured = parameters
        if axis_name is not None:
            measured = {name: gathered(one, axis_name) for name, one in parameters.items()}
        sums = {name: parameter_sums(one) for name, one in measured.items()}
        after = temporal
        if temporal is not None and statistics != "light":
            after = _through_time(measured, sums, temporal, opt_state, grads)
        per_layer = [
            layer_columns([(measured[name], sums[name], measured[name].mean.size) for name in layer.parameters], names)
            for layer in layers
        ]
        return _summary(count, per_layer, names), after

    def absent() -> tuple[Summary, Temporal | None]:
        return _summary(jnp.zeros_like(count), [dict.fromkeys(names, jnp.nan)] * len(layers), names), temporal

    result: tuple[Summary, Temporal | None] = lax.cond(count > 0, present, absent)
    return result


def gradient_scale(grads: Any, moments: Any) -> jax.Array:
    """Squared norm of the gradient that the optimizer sees, over that of the measured mean: a scalar.

    Publish it as the scalar of that name where the two differ: MaxVA's columns are in the optimizer's units.

    Args:
        grads: pytree like the parameters.
        moments: the step's.

    Example:
        >>> import jax.numpy as jnp
        >>> moments = {"w": Moments.from_per_example(jnp.array([[1.0], [3.0]]))}
        >>> float(gradient_scale({"w": jnp.array([1.0])}, moments))
        0.25
    """
    means = {name: one.mean for name, one in _named(moments, Moments).items()}
    seen = _named(grads)
    scale: jax.Array = maxva.gradient_scale([widened(seen[name]) for name in means], list(means.values()))
    return scale


def _through_time(
    measured: dict[str, Moments], sums: dict[str, dict[str, Any]], temporal: Temporal, opt_state: Any, grads: Any
) -> Temporal:
    """Put the sums that need an earlier step among each parameter's ``sums``; the state for the next."""
    previous = _named(temporal.previous, Previous)
    if list(previous) != list(measured):
        raise ValueError(
            f"summarize needs temporal made from the same parameters, got temporal of {sorted(previous)[:4]} for "
            f"moments of {sorted(measured)[:4]}; call init_temporal with what value_and_grad differentiates by"
        )
    now = {
        name: Previous(one.mean, sums[name]["batch_variance"], sums[name]["mean_sq_norm"])
        for name, one in measured.items()
    }
    for name, one in now.items():
        sums[name] |= step_sums(previous[name], one)
    after = temporal._replace(previous=_like(temporal.previous, Previous, [*now.values()]))
    if optimizers := optimizer_moments(opt_state):
        _show_optimizers(measured, sums, optimizers, grads)
    elif temporal.moments is not None:
        own = []
        for name, state in _named(temporal.moments, TemporalMoments).items():
            found = maxva_sums(state, measured[name].mean)
            sums[name] |= found.sums
            own.append(found.after)
        after = after._replace(moments=_like(temporal.moments, TemporalMoments, own))
    return after


def _show_optimizers(
    measured: dict[str, Moments],
    sums: dict[str, dict[str, Any]],
    optimizers: dict[str, OptimizerMoments],
    grads: Any,
) -> None:
    """Put what an optimizer's own rule will do with this step's gradient among each parameter's ``sums``."""
    seen = {name: one.mean for name, one in measured.items()}
    scale = jnp.ones(())
    if grads is not None:
        given = _named(grads)
        seen = {name: widened(given[name]) for name in seen}
        scale = maxva.gradient_scale(list(seen.values()), [one.mean for one in measured.values()])
    for name, one in measured.items():
        if name in optimizers:
            state, betas, _ = optimizers[name]
            within = optimizers[name].within_variance(one, scale)
            sums[name] |= maxva_sums(state, seen[name].astype(state.u.dtype), within, **betas).sums
        else:  # another optimizer's parameter: absent, and not counted as 0 in its layer
            sums[name] |= dict.fromkeys(_MAXVA_COLUMNS, jnp.nan)


def _summary(count: jax.Array, per_layer: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Summary:
    """Columns of shape (layers,), from the numbers of each layer."""
    columns = {name: jnp.stack([jnp.asarray(one[name]).astype(jnp.float32) for one in per_layer]) for name in names}
    return Summary(count=count, columns=columns)


def _named(tree: Any, kind: type | None = None) -> dict[str, Any]:
    """Nodes of a kind (or floating-point leaves) of a pytree like the parameters, by full parameter name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=kind and (lambda node: isinstance(node, kind)))
    return {leaf_name(keys): leaf for keys, leaf in leaves if (isinstance(leaf, kind) if kind else measurable(leaf))}


def _like(tree: Any, kind: type, nodes: Sequence[Any]) -> Any:
    """The pytree with its nodes of a kind replaced, in order."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, kind)), nodes)
