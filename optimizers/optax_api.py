"""Optimizers of the MaxVA family as optax transformations; the maths is `gradiometer.stats_core.maxva`.

`madam` is what users chain and inject like `optax.adamw`; `scale_by_madam` is its core. Both take the
Moments of the per-example gradients as an extra argument of ``update``, where they are wanted.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from gradiometer.stats_core import Moments, TemporalMoments, maxva
from gradiometer.stats_core.arrays import widened
from gradiometer.stats_core.maxva import Within

__all__ = ["MadamRule", "MadamState", "madam", "scale_by_madam"]

Scalar = Any
"""A Python number, or a traced scalar as `optax.inject_hyperparams` passes it."""
EpsMode = Literal["outside", "paper"]
Variance = Literal["minibatch", "per_example"]


class MadamRule(NamedTuple):
    """How the temporal moments of a state are moved on: scalars, so that a reader of the state can do the same.

    Attributes:
        b2: largest coefficient.
        b2_min: smallest coefficient.
        b2_init: coefficient of the first step.
        within: what the examples' variance is taken for: 0 nothing, 1 ``within="mean"``, 2 ``within="full"``.
    """

    b2: jax.Array
    b2_min: jax.Array
    b2_init: jax.Array
    within: jax.Array


class MadamState(NamedTuple):
    """State of `scale_by_madam`; m, u, s, w are like the parameters, in float32 or wider.

    Attributes:
        count: updates so far, a scalar.
        m: first moment, not bias-corrected.
        u: weight-normalised mean of the gradients.
        s: their centred variance.
        w: total weight.
        rule: the coefficients in force.
        max_denominator: largest denominator so far with ``amsgrad``, else None.
    """

    count: Any
    m: Any
    u: Any
    s: Any
    w: Any
    rule: MadamRule
    max_denominator: Any = None


def madam(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b2_min: Scalar = 0.5,
    b2_init: Scalar | None = None,
    eps: Scalar = 1e-8,
    eps_mode: EpsMode = "outside",
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    amsgrad: bool = False,  # noqa: FBT001 - as in the torch spelling
    variance: Variance = "minibatch",
    within: Within = "mean",
) -> optax.GradientTransformationExtraArgs:
    r"""MAdam: Adam whose second-moment coefficient maximises the variance that it estimates, per coordinate.

    With :math:`g_t` the gradient, :math:`u, s, w` the mean, variance and weight of `gradiometer.stats_core.maxva`
    (``b2`` its :math:`\beta_{max}`, ``b2_min`` its :math:`\beta_{min}`), :math:`v = s + u^2`, rate :math:`\alpha`:

    .. math::
        m_t &= b_1 m_{t-1} + (1 - b_1) g_t \\
        \theta_t &= \theta_{t-1} - \alpha \lambda \theta_{t-1}
            - \alpha \frac{m_t / (1 - b_1^t)}{\sqrt{v_t} + \epsilon}

    Where ``b2_min`` equals ``b2`` this is Adam. On noise the estimate v is larger than Adam's by design, and so
    learning rates are: the paper's are 2 and 4 times Adam's.

    With ``variance="per_example"`` the rule is also given the variance that was measured across the examples of
    the batch, :math:`\tau^2`, from ``update(grads, state, params, moments=moments)``. That form is this project's
    own, and no paper has it. :math:`\tau^2` is multiplied by :math:`\sum \|g\|^2 / \sum \|\bar g\|^2` over the
    parameters that have moments, which undoes what was done to all gradients alike in between (clipping by the
    global norm, the loss's reduction, a loss scale). Clipping by value or per group is *not* undone. Parameters
    without moments take :math:`\tau^2 = 0`.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: largest coefficient of the second moment, at most 1.
        b2_min: smallest coefficient.
        b2_init: coefficient of the first step, below 1; None for ``b2``, or .9 where that is 1.
        eps: added to the root of the second moment.
        eps_mode: "outside" adds ``eps`` to :math:`\sqrt{v}` (the authors' code, and Adam); "paper" adds
            :math:`\epsilon / \sqrt{w}`, as the paper's algorithm does, which counts more in early steps.
        weight_decay: :math:`\lambda`, decoupled and multiplied by the learning rate.
        mask: which parameters decay, as in `optax.adamw`.
        amsgrad: divide by the largest denominator so far (``eps`` included, as in the authors' code).
        variance: "minibatch" sees one number a step and coordinate, as in the paper; "per_example" takes moments.
        within: what :math:`\tau^2` is: "mean", the variance of the batch mean; "full", that of one example, which
            shrinks the steps where noise dominates, by about the root of the batch size.

    Returns:
        The transformation. `optax.chain`, `optax.inject_hyperparams`, `optax.masked`, `optax.multi_transform`
        and ``nnx.Optimizer`` hand ``moments`` on; flax's ``TrainState`` does not
        (`gradiometer.collectors.jax_flax.TrainState` does). `optax.MultiSteps` hands on those of the last
        micro-batch only: let ``gradiometer.value_and_grad(microbatch_size=...)`` accumulate instead.

    Raises:
        ValueError: if a coefficient is out of range, or a mode is unknown; in ``update`` with
            ``variance="per_example"``, if no moments are given or they belong to other parameters.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def objective(x):
        ...     return jnp.sum(x ** 2)
        >>> optimizer = madam(learning_rate=0.1)
        >>> params = jnp.array([1.0, 2.0, 3.0])
        >>> state = optimizer.init(params)
        >>> for _ in range(5):
        ...     updates, state = optimizer.update(jax.grad(objective)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(f"objective: {objective(params):.2f}")
        objective: 12.83
        objective: 11.72
        objective: 10.67
        objective: 9.67
        objective: 8.72

    References:
        Zhu, Cheng, Gan, Huang, Liu and Goldstein, "Adaptive learning rates with maximum variation
        averaging", 2020, arXiv 2006.11918, algorithm 1.
    """
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)  # without it, params are not needed
    return optax.chain(
        scale_by_madam(b1, b2, b2_min, b2_init, eps, eps_mode, amsgrad, variance, within),
        optax.add_decayed_weights(weight_decay, mask) if decays else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_madam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b2_min: Scalar = 0.5,
    b2_init: Scalar | None = None,
    eps: Scalar = 1e-8,
    eps_mode: EpsMode = "outside",
    amsgrad: bool = False,  # noqa: FBT001 - as in the torch spelling
    variance: Variance = "minibatch",
    within: Within = "mean",
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by MaxVA's second moment: `madam` without learning rate and weight decay.

    Arguments as for `madam`.
    """
    _check(b1, b2, b2_min, b2_init, eps)
    for name, given, allowed in (
        ("eps_mode", eps_mode, get_args(EpsMode)),
        ("variance", variance, get_args(Variance)),
        ("within", within, get_args(Within)),
    ):
        if given not in allowed:
            raise ValueError(f"madam needs {name} in {allowed}, got {name}={given!r}; choose one of them")
    first = _first_beta(b2, b2_init)
    betas = {"beta_max": b2, "beta_min": b2_min, "beta_init": first}
    code = 1 + get_args(Within).index(within) if variance == "per_example" else 0

    def rule() -> MadamRule:
        largest, smallest, initial = (jnp.asarray(beta, dtype=float) for beta in betas.values())
        return MadamRule(largest, smallest, initial, jnp.asarray(code))

    def init(params: Any) -> MadamState:
        m, u, s, w, most = (
            jax.tree.map(lambda leaf: jnp.zeros_like(widened(jnp.asarray(leaf))), params) for _ in range(5)
        )
        return MadamState(jnp.zeros((), jnp.int32), m, u, s, w, rule(), most if amsgrad else None)

    def update(
        updates: Any, state: MadamState, params: Any = None, *, moments: Any = None, **extra_args: Any
    ) -> tuple[Any, MadamState]:
        del params, extra_args
        leaves: list[Any] = jax.tree.leaves(updates)
        grads = [widened(jnp.asarray(leaf)) for leaf in leaves]
        tau2s = [0.0] * len(grads) if variance == "minibatch" else _within_variances(updates, grads, moments, within)
        count = optax.safe_increment(state.count)

        def one(g: Any, tau2: Any, m: Any, u: Any, s: Any, w: Any, most: Any) -> tuple[Any, ...]:
            m = b1 * m + (1.0 - b1) * g
            (u, s, w), _ = maxva.update(TemporalMoments(u, s, w), g, tau2, **betas)
            denominator = jnp.sqrt(s + u * u) + (eps if eps_mode == "outside" else eps / jnp.sqrt(w))
            if most is not None:
                denominator = most = jnp.maximum(most, denominator)
            correction = 1.0 - b1 ** count.astype(m.dtype)
            return m / correction / denominator, m, u, s, w, most

        fields = [jax.tree.leaves(field) for field in (state.m, state.u, state.s, state.w)]
        largest = jax.tree.leaves(state.max_denominator) if amsgrad else [None] * len(grads)
        results = [one(*leaf) for leaf in zip(grads, tau2s, *fields, largest, strict=True)]
        steps, m, u, s, w, most = (
            jax.tree.unflatten(jax.tree.structure(updates), [result[i] for result in results]) for i in range(6)
        )
        steps = jax.tree.map(lambda step, leaf: step.astype(jnp.result_type(leaf)), steps, updates)
        return steps, MadamState(count, m, u, s, w, rule(), most if amsgrad else None)

    return optax.GradientTransformationExtraArgs(init, update)


def _within_variances(updates: Any, grads: list[Any], moments: Any, within: Within) -> list[Any]:
    """τ² for each gradient, in its units; 0 for one without Moments."""
    if moments is None:
        raise ValueError(
            "madam needs moments with variance='per_example', got moments=None; call "
            "update(grads, state, params, moments=moments) with what gradiometer.value_and_grad returned"
        )
    given = {keys: one for keys, one in _with_keys(moments, Moments) if isinstance(one, Moments)}
    # By path, not by position: optax.masked leaves other transformations' parameters out of updates, not of moments.
    found = [given.get(keys) for keys, _ in _with_keys(updates)]
    pairs = [(grad, one.mean) for grad, one in zip(grads, found, strict=True) if one is not None]
    if grads and not pairs:
        raise ValueError(
            f"madam needs moments of the parameters that it updates, got moments of {_names(given)} for updates of "
            f"{_names(keys for keys, _ in _with_keys(updates))}; differentiate by the parameters given to init"
        )
    if not pairs:
        return []
    scale = maxva.gradient_scale([grad for grad, _ in pairs], [mean for _, mean in pairs])
    return [
        0.0 if one is None else maxva.within_variance(one, within) * scale.astype(grad.dtype)
        for grad, one in zip(grads, found, strict=True)
    ]


def _with_keys(tree: Any, kind: type | None = None) -> list[tuple[tuple[Any, ...], Any]]:
    """Leaves with their keys, nodes of a kind taken whole."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=kind and (lambda node: isinstance(node, kind)))


def _names(paths: Iterable[tuple[Any, ...]]) -> list[str]:
    """The first few paths, for a message."""
    return [jax.tree_util.keystr(keys) for keys in paths][:3]


def _first_beta(b2: Scalar, b2_init: Scalar | None) -> Scalar:
    """`maxva.first_beta`, also where b2 is traced."""
    if b2_init is None and isinstance(b2, jax.core.Tracer):
        return jnp.where(b2 < 1.0, b2, jnp.full_like(b2, maxva.first_beta(1.0, None)))
    return maxva.first_beta(b2, b2_init)


def _check(b1: Scalar, b2: Scalar, b2_min: Scalar, b2_init: Scalar | None, eps: Scalar) -> None:
    """Refuse coefficients out of range, where they are not traced."""
    if any(isinstance(value, jax.core.Tracer) for value in (b1, b2, b2_min, b2_init, eps)):
        return
    if not 0.0 <= b1 < 1.0:
        raise ValueError(f"madam needs 0 <= b1 < 1, got b1={b1}; the default is 0.9")
    if not 0.0 <= b2_min <= b2 <= 1.0:
        raise ValueError(f"madam needs 0 <= b2_min <= b2 <= 1, got b2_min={b2_min}, b2={b2}; set b2_min=b2 for Adam")
    if b2_init is not None and not 0.0 <= b2_init < 1.0:
        raise ValueError(f"madam needs 0 <= b2_init < 1, got b2_init={b2_init}; leave it out for b2")
    if not eps >= 0.0:
        raise ValueError(f"madam needs eps of at least 0, got eps={eps}; the default is 1e-8")
