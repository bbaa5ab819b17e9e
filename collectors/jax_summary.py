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
from gradiometer.collectors.optax_state import AdamRule, adam_steps, optimizer_moments, radam_scalars
from gradiometer.stats_core import Moments, Summary, TemporalMoments, maxva
from gradiometer.stats_core.adam import adam_sums
from gradiometer.stats_core.arrays import power_of_two, unit_exponent, widened
from gradiometer.stats_core.catalog import statistic
from gradiometer.stats_core.elements import t_squares
from gradiometer.stats_core.histogram import Sketch, sketch_fixed
from gradiometer.stats_core.selection import Selection, Statistics
from gradiometer.stats_core.successive import Previous, step_sums
from gradiometer.stats_core.summary import Part, batch_sums, summarized
from gradiometer.stats_core.temporal import FIXED_BETA, FixedMoments, MaxvaInput, fixed_sums, maxva_sums

__all__ = ["Temporal", "gradient_scale", "init_temporal", "summarize"]


class Temporal(NamedTuple):
    """What is kept from one measured step to the next.

    Attributes:
        previous: pytree like the parameters with a `Previous` at each floating-point leaf: one parameter copy.
        moments: the same with a `TemporalMoments`: three copies; None where the optimizer keeps its own.
        kish: the same with the sum of squares of MaxVA's weights: one copy; None where nobody asks for it.
        fixed: the same with a `FixedMoments`: two copies; None where nobody asks for it.
        exponent: the sums in ``previous`` are in units of 2 to this power; an integer scalar.
    """

    previous: Any
    moments: Any
    kish: Any
    fixed: Any
    exponent: jax.Array


def init_temporal(params: Any, opt_state: Any = None, *, statistics: Statistics = "default") -> Temporal:
    """The temporal state before the first step, for `summarize`.

    Args:
        params: as given to the loss function.
        opt_state: where it will be given to `summarize`, too: an optimizer of the MaxVA family keeps its own
            u, s, w, and three parameter copies are saved.
        statistics: as will be given to `summarize`: no more is kept than they need.

    Returns:
        Zeros in float32 or wider, like the parameters.

    Raises:
        ValueError: if ``statistics`` holds what is neither a tier nor a statistic.

    Example:
        >>> import jax.numpy as jnp
        >>> init_temporal({"w": jnp.ones(2)}).moments["w"].u
        Array([0., 0.], dtype=float32)
    """
    needed = Selection.of(statistics).ingredients

    def for_each(make: Any) -> Any:
        return jax.tree.map(
            lambda leaf: make(jnp.zeros_like(widened(jnp.asarray(leaf)))) if measurable(leaf) else None, params
        )

    own = "temporal" in needed and not optimizer_moments(opt_state)
    return Temporal(
        previous=for_each(Previous.zeros_like),
        moments=for_each(TemporalMoments.zeros_like) if own else None,
        kish=for_each(jnp.zeros_like) if "kish" in needed else None,
        fixed=for_each(FixedMoments.zeros_like) if "fixed" in needed else None,
        exponent=jnp.zeros((), jnp.int32),
    )


def summarize(
    moments: Any,
    temporal: Temporal | None,
    *,
    opt_state: Any = None,
    grads: Any = None,
    statistics: Statistics = "default",
    axis_name: AxisName | None = None,
    adam: AdamRule | None = None,
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
        statistics: a tier, names of the catalogue, or both, as `gradiometer.stats_core.selection`: as given to
            ``value_and_grad`` and `init_temporal`. A tuple or a string, where it is a static argument of ``jit``.
        axis_name: inside ``shard_map`` or ``pmap``, as given to ``value_and_grad``.
        adam: what the optimizer of Adam's family in ``opt_state`` was made with (its state does not say), for the
            statistics that look at it; None: they are absent.

    Returns:
        The `Summary`, with columns of shape ``(layers,)`` in the order of `jax_layers.layers_of`, and the
        temporal state. Sums are formed in units of 2 to the power of the scalar ``unit_exponent``, which is 0
        unless the gradients are far from 1; the publisher hands it on.

    Raises:
        ValueError: if there is no Moments in ``moments``, or ``statistics`` holds what is neither a tier nor a
            statistic.

    Example:
        >>> import jax.numpy as jnp
        >>> moments = {"w": Moments.from_per_example(jnp.array([[1.0], [3.0], [5.0]]))}
        >>> summary, temporal = summarize(moments, init_temporal({"w": jnp.zeros(1)}))
        >>> [round(float(summary.columns[name][0]), 4) for name in ("variance_trace", "batch_variance")]
        [4.0, 1.3333]
    """
    wanted = Selection.of(statistics)
    parameters = _named(moments, Moments)
    layers = [list(layer.parameters) for layer in layers_of(moments)]
    count = next(iter(parameters.values())).count

    def present() -> tuple[Summary, Temporal | None]:
        measured = parameters
        if axis_name is not None:
            measured = {name: gathered(one, axis_name) for name, one in parameters.items()}
        unit = unit_exponent(*(one.mean for one in measured.values()), squares=[one.m2 for one in measured.values()])
        in_unit = {name: one.in_unit(unit) for name, one in measured.items()}
        in_order = [name for layer in layers for name in layer]
        of_batch = batch_sums([in_unit[name] for name in in_order], wanted)
        step = _Step(measured, in_unit, unit, dict(zip(in_order, _by_parameter(of_batch), strict=True)), wanted)
        after = temporal
        if temporal is not None:
            after = _through_time(step, temporal, opt_state, grads)
        if adam is not None and "adam" in wanted.ingredients:
            _add_adam(step, opt_state, grads, adam)
        parts = [
            [Part(in_unit[name], in_unit[name].mean.size, step.sums[name], step.sketches[name]) for name in layer]
            for layer in layers
        ]
        return _sent(summarized(parts, of_batch, wanted), step, count), after

    def absent() -> tuple[Summary, Temporal | None]:
        def nothing(leaf: Any) -> jax.Array:
            return jnp.full(leaf.shape, jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0, leaf.dtype)

        shapes, _ = jax.eval_shape(present)
        return jax.tree.map(nothing, shapes)._replace(count=jnp.zeros_like(count)), temporal

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


class _Step:
    """One measured step: what is known of it, and what is added as earlier steps and the optimizer are looked at.

    Attributes:
        measured: parameter name → Moments.
        in_unit: the same in units of ``2**exponent``.
        exponent: of the unit.
        of_batch: parameter name → catalogue name → scalar, in the unit.
        wanted: what is measured.
        sums: parameter name → catalogue name → scalar, in the unit.
        sketches: parameter name → catalogue name → counts of its elements.
        scalars: of the step.
    """

    def __init__(
        self,
        measured: Mapping[str, Moments],
        in_unit: Mapping[str, Moments],
        exponent: jax.Array,
        of_batch: Mapping[str, Mapping[str, Any]],
        wanted: Selection,
    ) -> None:
        self.measured, self.in_unit, self.exponent = measured, in_unit, exponent
        self.of_batch, self.wanted = of_batch, wanted
        self.sums: dict[str, dict[str, Any]] = {name: {} for name in measured}
        self.sketches: dict[str, dict[str, Sketch]] = {name: {} for name in measured}
        self.scalars: dict[str, Any] = {}
        if "element_t_sq" in wanted.sketches:
            for name, one in in_unit.items():
                self.sketches[name]["element_t_sq"] = sketch_fixed(t_squares(one))

    def to_unit(self, value: Any, power: int) -> jax.Array:
        """A value that grows with this power of the gradients, in the unit: exact, but for what leaves the range."""
        return _scaled(value, -self.exponent, power)

    def from_unit(self, value: Any, power: int) -> jax.Array:
        """The true value of one in the unit."""
        return _scaled(value, self.exponent, power)


def _scaled(value: Any, exponent: jax.Array, power: int) -> jax.Array:
    """The value times ``2**exponent``, ``power`` times over, so that no factor leaves the range by itself."""
    factor = power_of_two(exponent if power > 0 else -exponent, value.dtype)
    for _ in range(abs(power)):
        value = value * factor
    result: jax.Array = value
    return result


def _through_time(step: _Step, temporal: Temporal, opt_state: Any, grads: Any) -> Temporal:
    """Add what needs an earlier step; the state for the next one."""
    before = _named(temporal.previous, Previous)
    if list(before) != list(step.measured):
        raise ValueError(
            f"summarize needs temporal made from the same parameters, got temporal of {sorted(before)[:4]} for "
            f"moments of {sorted(step.measured)[:4]}; call init_temporal with what value_and_grad differentiates by"
        )
    needed = step.wanted.ingredients
    previous = {
        name: Previous(one.mean, step.of_batch[name]["batch_variance"], step.of_batch[name]["mean_sq_norm"])
        for name, one in step.in_unit.items()
    }
    if "previous" in needed:
        older = temporal.exponent - step.exponent
        for name, now in previous.items():
            mean, *squares = before[name]
            its_sums = (_scaled(square, older, 2) for square in squares)
            step.sums[name] |= step_sums(Previous(step.to_unit(mean, 1), *its_sums), now)
    kept = [Previous(step.measured[name].mean, *now[1:]) for name, now in previous.items()]
    after = temporal._replace(previous=_like(temporal.previous, Previous, kept), exponent=step.exponent)
    if temporal.fixed is not None:
        after = after._replace(fixed=_with_fixed(step, temporal.fixed))
    rule = _rule_of(step, temporal, opt_state, grads) if "temporal" in needed else {}
    return _with_maxva(step, after, rule)


def _with_fixed(step: _Step, fixed: Any) -> Any:
    kept = []
    for name, state in _named(fixed, FixedMoments).items():
        scaled = state._replace(u=step.to_unit(state.u, 1), s=step.to_unit(state.s, 2))
        sums, new = fixed_sums(scaled, step.in_unit[name].mean, FIXED_BETA)
        step.sums[name] |= sums
        kept.append(new._replace(u=step.from_unit(new.u, 1), s=step.from_unit(new.s, 2)))
    return _like(fixed, FixedMoments, kept)


def _rule_of(step: _Step, temporal: Temporal, opt_state: Any, grads: Any) -> dict[str, MaxvaInput]:
    """What MaxVA's rule takes of each parameter, in the unit: the optimizer's own where it has one."""
    optimizers = optimizer_moments(opt_state)
    if not optimizers:
        if temporal.moments is None:
            return {}
        states = _named(temporal.moments, TemporalMoments)
        return {name: MaxvaInput(_in_unit(step, state), step.in_unit[name].mean) for name, state in states.items()}
    seen, scale = _seen(step, grads)
    found = {}
    for name, one in step.in_unit.items():
        if name in optimizers:
            state, betas, _ = optimizers[name]
            within = optimizers[name].within_variance(one, scale)
            grad = step.to_unit(seen[name], 1).astype(state.u.dtype)
            found[name] = MaxvaInput(_in_unit(step, state), grad, within, betas)
    return found


def _in_unit(step: _Step, state: TemporalMoments) -> TemporalMoments:
    return state._replace(u=step.to_unit(state.u, 1), s=step.to_unit(state.s, 2))


def _seen(step: _Step, grads: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """The gradient as the optimizer sees it, and its squared norm over that of the measured mean."""
    means = {name: one.mean for name, one in step.measured.items()}
    if grads is None:
        return means, jnp.ones(())
    given = _named(grads)
    seen = {name: widened(given[name]) for name in means}
    return seen, maxva.gradient_scale(list(seen.values()), list(means.values()))


def _with_maxva(step: _Step, after: Temporal, rule: Mapping[str, MaxvaInput]) -> Temporal:
    """Add what the rule does with this step's gradient; what of it is kept here."""
    spreads = {} if after.kish is None else _named(after.kish)
    states = {} if after.moments is None else _named(after.moments, TemporalMoments)
    for name, taken in rule.items():
        if "element_deviation_ratio" in step.wanted.sketches:
            ratio = maxva.deviation_ratio(taken.before, taken.grad)
            step.sketches[name]["element_deviation_ratio"] = sketch_fixed(ratio, taken.before.s > 0)
        made = maxva_sums(taken.before, taken.grad, taken.within, kish=spreads.get(name), **taken.betas)
        step.sums[name] |= made.sums
        if name in spreads:
            spreads[name] = made.kish
        if name in states:
            new = made.after
            states[name] = new._replace(u=step.from_unit(new.u, 1), s=step.from_unit(new.s, 2))
    if spreads:
        after = after._replace(kish=jax.tree.unflatten(jax.tree.structure(after.kish), list(spreads.values())))
    if states:
        after = after._replace(moments=_like(after.moments, TemporalMoments, list(states.values())))
    return after


def _add_adam(step: _Step, opt_state: Any, grads: Any, rule: AdamRule) -> None:
    """Add what an optimizer of Adam's family makes of this step's gradient."""
    seen, scale = _seen(step, grads)
    optimizers = optimizer_moments(opt_state)
    within = {name: one.within_variance(step.measured[name], scale) for name, one in optimizers.items()}
    for name, made in adam_steps(opt_state, seen, rule, within=within).items():
        if name in step.measured:
            found = adam_sums(made, step.measured[name], scale)
            step.sums[name] |= {each: step.to_unit(value, statistic(each).power) for each, value in found.items()}
    step.scalars |= radam_scalars(opt_state, rule)


def _sent(summary: Summary, step: _Step, count: jax.Array) -> Summary:
    """The summary as it is handed to the publisher: in float32, with the step's own scalars."""
    scalars = {**summary.scalars, **step.scalars, "unit_exponent": step.exponent}
    return summary._replace(
        count=count,
        columns={name: column.astype(jnp.float32) for name, column in summary.columns.items()},
        scalars={name: jnp.asarray(value).astype(jnp.float32) for name, value in scalars.items()},
    )


def _by_parameter(of_batch: Mapping[str, jax.Array]) -> list[dict[str, jax.Array]]:
    """Numbers of many parameters as those of each."""
    number = len(next(iter(of_batch.values())))
    return [{name: values[place] for name, values in of_batch.items()} for place in range(number)]


def _named(tree: Any, kind: type | None = None) -> dict[str, Any]:
    """Nodes of a kind (or floating-point leaves) of a pytree like the parameters, by full parameter name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=kind and (lambda node: isinstance(node, kind)))
    return {leaf_name(keys): leaf for keys, leaf in leaves if (isinstance(leaf, kind) if kind else measurable(leaf))}


def _like(tree: Any, kind: type, nodes: Sequence[Any]) -> Any:
    """The pytree with its nodes of a kind replaced, in order."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, kind)), nodes)
