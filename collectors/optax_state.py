"""What an optax optimizer keeps, read wherever it lies in a chain: MaxVA's moments, and Adam's divisor and step.

Neither optax nor the optimizers are imported: MaxVA's state is recognised by its fields (``u``, ``s``, ``w`` and
``rule``), Adam's by the name of its class.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gradiometer.collectors.jax_layers import leaf_name, measurable
from gradiometer.stats_core import Moments, TemporalMoments
from gradiometer.stats_core.adam import AdamStep, adam_step, maxva_step, nesterov_mix
from gradiometer.stats_core.arrays import widened
from gradiometer.stats_core.maxva import within_variance
from gradiometer.stats_core.radam import rectify

__all__ = ["AdamRule", "OptimizerMoments", "adam_steps", "optimizer_moments", "radam_scalars"]

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


class AdamRule(NamedTuple):
    """What an optax optimizer of Adam's family was made with: its state holds neither a coefficient nor its name.

    ``AdamRule(1e-3)`` is ``optax.adam(1e-3)`` and ``optax.adamw(1e-3)``, ``AdamRule(1e-3, threshold=5.0)`` is
    ``optax.radam(1e-3)``, ``AdamRule(1e-3, nesterov=True)`` is ``optax.nadam(1e-3)``; of ``madam`` the learning rate,
    ``b1``, ``eps`` and ``eps_mode`` are taken, the rest is in its state.

    Attributes:
        learning_rate: a number, a scalar array or a schedule (of the optimizer's own count); 1 for a bare
            ``optax.scale_by_adam``. NaN where it is not known: then the step is.
        b1: as given to the optimizer.
        b2: as given to the optimizer.
        eps: as given to the optimizer.
        eps_root: as given to the optimizer.
        nesterov: as given to the optimizer.
        threshold: RAdam's; None for optimizers that don't rectify.
        eps_mode: MAdam's.
    """

    learning_rate: Any = math.nan
    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    eps_root: Any = 0.0
    nesterov: bool = False
    threshold: Any = None
    eps_mode: Literal["outside", "paper"] = "outside"


def adam_steps(
    opt_state: Any, grads: Any, rule: AdamRule, *, within: Mapping[str, jax.Array] | None = None
) -> dict[str, AdamStep]:
    r"""The step that an optimizer of Adam's family is about to make, by full parameter name.

    Known are the states of ``optax.scale_by_adam`` (and with it ``adam``, ``adamw``, ``nadam``),
    ``scale_by_radam``, ``scale_by_amsgrad`` and of this project's ``scale_by_madam``, wherever they lie. What other
    transformations of a chain make of the step is not seen: ``step`` is Adam's own times the learning rate. Values
    that an ``optax.inject_hyperparams`` around the state keeps are taken before those of ``rule``; a scheduled one
    is there as of the step before, so that where ``rule`` has a schedule, the schedule is taken.

    Args:
        opt_state: any optax state, before the update.
        grads: pytree like the parameters: the gradient as that optimizer will see it, after what precedes it in
            the chain.
        rule: what the optimizer was made with.
        within: τ² by full parameter name, as `OptimizerMoments.within_variance`, for a ``madam`` that takes it.

    Returns:
        Empty where no such optimizer is in the state; without the parameters that an ``optax.masked`` or
        ``optax.multi_transform`` keeps from it. Pure: runs under ``jit``.

    Example:
        >>> import optax
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> state = optax.adamw(1e-2, b2=0.95).init(params)
        >>> steps = adam_steps(state, {"w": jnp.array([0.5, -4.0])}, AdamRule(1e-2, b2=0.95))
        >>> steps["w"].step.round(4)
        Array([ 0.01, -0.01], dtype=float32)
    """
    seen = {name: jnp.asarray(leaf) for name, leaf in _named(grads).items() if measurable(leaf)}
    found: dict[str, AdamStep] = {}
    for state, its_rule in _adam_states(opt_state, rule):
        found |= _madam(state, its_rule, seen, within or {}) if _is_ours(state) else _adam(state, its_rule, seen)
    return found


def radam_scalars(opt_state: Any, rule: AdamRule) -> dict[str, jax.Array]:
    """The scalars of the catalogue on RAdam's rectification, for the step that comes.

    Args:
        opt_state: as `adam_steps`.
        rule: as `adam_steps`.

    Returns:
        Scalars on the device; empty where ``rule.threshold`` is None or no state is found. Of several states the
        first is taken.

    Example:
        >>> import optax
        >>> state = optax.radam(1e-2).init(jnp.ones(2))
        >>> {name: round(float(value), 4) for name, value in radam_scalars(state, AdamRule(threshold=5.0)).items()}
        {'radam_length': 1.0, 'radam_rectification': 0.0, 'radam_rectified': 0.0, 'radam_multiplier': 0.0}
    """
    for state, its_rule in _adam_states(opt_state, rule):
        if its_rule.threshold is None or _is_ours(state):
            continue
        found = rectify(state.count + 1, its_rule.b2, threshold=its_rule.threshold, inclusive=True)
        return {
            "radam_length": found.length,
            "radam_rectification": found.rectification,
            "radam_rectified": found.is_rectified.astype(found.length.dtype),
            "radam_multiplier": found.multiplier,
        }
    return {}


def _adam_states(opt_state: Any, rule: AdamRule) -> Iterator[tuple[Any, AdamRule]]:
    """Each state of the family with what is known of its optimizer."""
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: _is_injected(node) or _is_ours(node) or _is_adam(node)):
        if _is_injected(node):
            scheduled = getattr(node, "hyperparams_states", {})
            kept = {
                name: value
                for name, value in node.hyperparams.items()
                if name in AdamRule._fields and not (name in scheduled and callable(getattr(rule, name)))
            }
            yield from _adam_states(node.inner_state, rule._replace(**kept))
        elif _is_ours(node) or _is_adam(node):
            yield node, rule


def _adam(state: Any, rule: AdamRule, seen: Mapping[str, Any]) -> dict[str, AdamStep]:
    largest = _named(getattr(state, "nu_max", None))
    second = _named(state.nu)
    found = {}
    for name, first in _named(state.mu).items():
        if name in seen:
            grad = widened(seen[name])
            found[name] = adam_step(
                first.astype(grad.dtype),
                second[name].astype(grad.dtype),
                state.count,
                grad,
                lr=_rate(rule, state.count),
                b1=rule.b1,
                b2=rule.b2,
                eps=rule.eps,
                eps_root=rule.eps_root,
                largest=largest.get(name),
                largest_of="corrected",
                mix=nesterov_mix(state.count, rule.b1) if rule.nesterov else None,
                threshold=rule.threshold,
                inclusive=True,
            )
    return found


def _madam(state: Any, rule: AdamRule, seen: Mapping[str, Any], within: Mapping[str, jax.Array]) -> dict[str, AdamStep]:
    moments = optimizer_moments(state)
    largest = _named(state.max_denominator)
    found = {}
    for name, first in _named(state.m).items():
        if name in seen:
            found[name] = maxva_step(
                first,
                moments[name].moments,
                state.count,
                seen[name].astype(first.dtype),
                within.get(name, 0.0),
                lr=_rate(rule, state.count),
                b1=rule.b1,
                eps=rule.eps,
                eps_mode=rule.eps_mode,
                largest=largest.get(name),
                **moments[name].betas,
            )
    return found


def _rate(rule: AdamRule, count: jax.Array) -> Any:
    return rule.learning_rate(count) if callable(rule.learning_rate) else rule.learning_rate


def _named(tree: Any) -> dict[str, Any]:
    return {leaf_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_adam(node: Any) -> bool:
    """By name: the state of scale_by_stddev, for one, has the same fields and another meaning."""
    return type(node).__name__ in ("ScaleByAdamState", "ScaleByAmsgradState")


def _is_injected(node: Any) -> bool:
    return hasattr(node, "hyperparams") and hasattr(node, "inner_state")


def _is_ours(node: Any) -> bool:
    return all(hasattr(node, name) for name in _FIELDS)
