"""`value_and_grad`: `jax.value_and_grad` with one more result, the Moments of the per-example gradients.

A row of the batch is seen as a batch of size one, so the loss function needs no change, and rows are
differentiated by ``vmap``. What a measured step returns is what the plain call returns, as long as the
loss is the mean (or sum) of its rows' losses. A loss that couples its rows has no per-example
gradients: ``fn.check(...)`` finds out.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from gradiometer.collectors.endpoint import is_disabled
from gradiometer.collectors.jax_axis import AxisName
from gradiometer.collectors.jax_call import REDUCTIONS, Call, Options
from gradiometer.collectors.jax_layers import leaf_name
from gradiometer.protos.run_pb2 import Coverage
from gradiometer.stats_core.errors import UnsupportedModel
from gradiometer.stats_core.selection import Selection, Statistics

__all__ = ["ValueAndGrad", "value_and_grad"]

_log = logging.getLogger("gradiometer")

_ENGINES = ("auto", "vmap", "microbatch")


def value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,  # noqa: FBT001 - the order of jax.value_and_grad
    *,
    rng_argnums: int | Sequence[int] | None = None,
    loss_reduction: Literal["mean", "sum", "per_example"] = "mean",
    weights_argnum: int | None = None,
    segments_argnum: int | None = None,
    microbatch_size: int | None = None,
    axis_name: AxisName | None = None,
    unit: Literal["example"] = "example",
    statistics: Statistics = "default",
    engine: Literal["auto", "vmap", "microbatch"] = "auto",
) -> "ValueAndGrad":
    r"""`jax.value_and_grad`, with the Moments of the per-example gradients as one more result.

    The loss is :math:`L = \sum_i w_i \ell_i`; :math:`\ell_i` is what ``loss_fn`` gives for row i alone, as a
    batch of one. The moments are those of :math:`g_i = \nabla \ell_i`, whatever the reduction, so their
    ``mean`` is the gradient itself where the loss is a mean.

    Under ``jit`` the call stays on the device: no callback, no recompilation. With a batch sharded by
    ``NamedSharding`` nothing else is needed; inside ``shard_map`` or ``pmap``, give ``axis_name``.

    Args:
        loss_fn: the user's loss, or ``(loss, aux)`` with ``has_aux``. Its rows must not mix, see
            `ValueAndGrad.check`; BatchNorm's running statistics in aux are refused by name. It must take a batch
            of one: a sharding constraint on the batch axis inside it can't hold there.
        argnums: position(s) of the parameters. Leaves that are not floating-point get a gradient of 0 and
            None for Moments.
        batch_argnums: position(s) of pytrees whose leaves all have the rows on their leading axis.
        has_aux: as in jax. Aux is that of the plain call: leaves with a leading axis of rows are joined from
            the rows; for any other (an accuracy, a count) a measured step runs one more forward pass.
        rng_argnums: position(s) of keys, or pytrees of keys. A measured step gives row i the i-th of
            ``jax.random.split(key, batch)``; a plain step hands on the key itself.
        loss_reduction: "mean" or "sum" over rows; "per_example" where ``loss_fn`` returns ``(batch,)``,
            which is then averaged.
        weights_argnum: position of raw weights a, shape ``(batch,)``: ``loss_fn`` computes
            Σ aᵢℓᵢ / Σ a (Σ aᵢℓᵢ under "sum"; plain ℓᵢ under "per_example"), and is given a weight of 1 for
            a row on its own. A row of weight 0 is padding and is not counted.
        segments_argnum: not in this release.
        microbatch_size: rows to differentiate at once; memory then grows with it, not with the batch.
        axis_name: mapped axis (or axes) that the batch is split over. Value, gradient and moments are then
            those of all shards; ``sq_norms``, ``weights`` and aux stay this shard's.
        unit: what an example is; "example", a row.
        statistics: a tier, names of the catalogue, or both, as `gradiometer.stats_core.selection`: ``dots`` and
            ``sign_mean`` are computed only where it needs them. With ``microbatch_size`` there are no ``dots``:
            the mean is known too late.
        engine: "vmap", all rows at once; "microbatch", ``microbatch_size`` at a time; "auto" is either.

    Returns:
        ``fn(*args, measure=True) -> (value, grads, moments)``.

    Raises:
        ValueError: if an option is not one of this release's, or two positions collide.

    Edge cases:
        ==========================  ============================================================
        one row                     m2 is 0; a variance formed from it is NaN, nothing raises
        a NaN or inf gradient       NaN in the elements it touches, and in that row's sq_norm
        half-precision parameters   Moments in float32, gradients in the parameters' type
        ``measure=False``           Moments of count 0, gradient of the plain call
        ==========================  ============================================================

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        >>> fn = jax.jit(value_and_grad(loss_fn))
        >>> batch = {"x": jnp.array([[1.0, 0.0], [1.0, 2.0]]), "y": jnp.array([1.0, 1.0])}
        >>> value, grads, moments = fn({"w": jnp.zeros(2)}, batch)
        >>> float(value), grads["w"].tolist()
        (1.0, [-2.0, -2.0])
        >>> moments["w"].m2.tolist(), moments["w"].sq_norms.tolist()
        ([0.0, 8.0], [4.0, 20.0])

    References:
        Dangel, Kunstner and Hennig, "BackPACK: packing more into backprop", 2020, arXiv 1912.10985 (what
        per-example gradients are good for, and what makes them costly).
    """
    _check_choices(
        loss_reduction=(loss_reduction, REDUCTIONS),
        engine=(engine, _ENGINES),
        unit=(unit, ("example",)),
        segments_argnum=(segments_argnum, (None,)),
    )
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(
            f"value_and_grad needs microbatch_size of at least 1, got microbatch_size={microbatch_size}; "
            "give the rows that fit in memory, or None for all"
        )
    if engine != "auto" and (engine == "microbatch") != (microbatch_size is not None):
        raise ValueError(
            f"value_and_grad needs microbatch_size with engine='microbatch' and with no other, got engine={engine!r}, "
            f"microbatch_size={microbatch_size}; leave engine at 'auto'"
        )
    wanted = Selection.of(statistics)
    options = Options(
        argnums=_positions(argnums),
        one_argnum=isinstance(argnums, int),
        batch_argnums=_positions(batch_argnums),
        rng_argnums=_positions(rng_argnums),
        weights_argnum=weights_argnum,
        has_aux=has_aux,
        loss_reduction=loss_reduction,
        microbatch_size=microbatch_size,
        axis_name=axis_name,
        dots="dots" in wanted.ingredients,
        sign_mean="sign_mean" in wanted.ingredients,
    )
    used = [*options.argnums, *options.batch_argnums, *options.rng_argnums, *_positions(weights_argnum)]
    if not options.argnums or not options.batch_argnums or len(set(used)) != len(used) or min(used) < 0:
        raise ValueError(
            f"value_and_grad needs different positions from 0 on, of parameters and batch at least, got "
            f"argnums={argnums}, batch_argnums={batch_argnums}, rng_argnums={rng_argnums}, "
            f"weights_argnum={weights_argnum}; give each argument one role"
        )
    return ValueAndGrad(loss_fn, options)


class ValueAndGrad:
    """What `value_and_grad` returns: call it in place of ``jax.value_and_grad(loss_fn)``, inside ``jit`` or out.

    Attributes:
        coverage: which share of the trained parameters is measured: all, in this engine. None before the
            first trace.
        engine: "vmap" or "microbatch".
    """

    def __init__(self, loss_fn: Callable[..., Any], options: Options) -> None:
        self._loss_fn = loss_fn
        self._options = options
        self.coverage: Coverage | None = None
        self._has_said_disabled = False
        self.engine = "vmap" if options.microbatch_size is None else "microbatch"

    def __call__(self, *args: Any, measure: Any = True, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Value, gradient and Moments of one batch.

        Args:
            *args: the loss function's own.
            measure: False for the plain gradient, and Moments of count 0. A Python bool compiles one of the
                two ways; an array, traced or not, chooses between both on the device.
            **kwargs: the loss function's own, the same for every row.

        Returns:
            ``(value, grads, moments)``, or ``((value, aux), grads, moments)`` with ``has_aux``; ``moments`` is
            a pytree like the parameters with a `Moments` at each floating-point leaf.

        Raises:
            ValueError: if batch, weights or loss have the wrong shape, or no parameter is floating-point.
            TypeError: if a parameter is complex.
            UnsupportedModel: if aux holds BatchNorm's running statistics.

        With ``GRADIOMETER_DISABLE=1`` in the environment every step is a plain one.
        """
        if is_disabled(os.environ):
            measure = False
            self._say_disabled()
        call = Call(self._loss_fn, self._options, args, kwargs)
        self.coverage = Coverage(num_params=call.num_params, num_params_measured=call.num_params)
        if isinstance(measure, bool | np.bool_):
            found = call.measured() if measure else call.plain()
        else:
            found = lax.cond(measure, call.measured, call.plain)
        grads = call.as_params(found.grads, absent=jax.numpy.zeros_like)
        moments = call.as_params(found.moments, absent=lambda _: None)
        return (found.value, found.aux) if self._options.has_aux else found.value, grads, moments

    def _say_disabled(self) -> None:
        """Once: nobody should look for numbers that were asked not to be."""
        if not self._has_said_disabled:
            self._has_said_disabled = True
            _log.warning("GRADIOMETER_DISABLE is set: gradients are plain, and Moments have a count of 0")

    def check(self, *args: Any, tolerance: float = 1e-2, **kwargs: Any) -> None:
        """Compare the mean of the rows' gradients with the plain gradient: once, before training, outside ``jit``.

        They differ where a row's loss depends on other rows (BatchNorm in training mode, contrastive losses, a
        normaliser counted over the batch), or where ``loss_reduction`` is not what the loss does.

        Args:
            *args: as in a call; two rows or more.
            tolerance: how far the gradient of a parameter may be off, relative to its norm.
            **kwargs: as in a call.

        Raises:
            UnsupportedModel: if they differ; the message names the parameter that differs most.
            ValueError: if ``rng_argnums`` is set: the two would see other dropout masks.

        Example:
            >>> import jax.numpy as jnp
            >>> w, x = jnp.array(0.5), jnp.array([1.0, 2.0, 6.0])
            >>> value_and_grad(lambda w, x: jnp.mean((w * x) ** 2)).check(w, x)
            >>> value_and_grad(lambda w, x: jnp.mean((w * (x - x.mean())) ** 2)).check(w, x)
            Traceback (most recent call last):
                ...
            gradiometer.stats_core.errors.UnsupportedModel: value_and_grad.check needs a loss that is the mean of \
its rows' losses, got relative difference=1 in 'params'; replace layers that mix rows (BatchNorm), or set \
loss_reduction and weights_argnum to what the loss does
        """
        if self._options.rng_argnums:
            raise ValueError(
                f"value_and_grad.check needs a loss without randomness, got rng_argnums={self._options.rng_argnums}; "
                "check the same loss with dropout off"
            )
        used = (*self._options.argnums, *self._options.batch_argnums, *_positions(self._options.weights_argnum))

        def grads_of(arrays: dict[int, Any], *, measure: bool) -> Any:
            given = [arrays.get(place, value) for place, value in enumerate(args)]
            return self(*given, measure=measure, **kwargs)[1]

        arrays = {place: args[place] for place in used}
        measured, plain = (
            jax.tree_util.tree_leaves_with_path(jax.jit(functools.partial(grads_of, measure=way))(arrays))
            for way in (True, False)
        )
        worst, culprit = _largest_difference(
            [(leaf_name(keys), np.asarray(leaf, np.float64)) for keys, leaf in plain],
            [np.asarray(leaf, np.float64) for _, leaf in measured],
            tolerance,
        )
        if not worst <= tolerance:
            reduction = "sum" if self._options.loss_reduction == "sum" else "mean"
            raise UnsupportedModel(
                f"value_and_grad.check needs a loss that is the {reduction} of its rows' losses, got relative "
                f"difference={worst:.2g} in {culprit!r}; replace layers that mix rows (BatchNorm), or set "
                "loss_reduction and weights_argnum to what the loss does"
            )


def _largest_difference(
    wanted: list[tuple[str, np.ndarray]], got: list[np.ndarray], tolerance: float
) -> tuple[float, str]:
    """The largest relative difference, and of which parameter; NaN counts as the largest.

    A parameter whose true gradient is 0 (an attention's key bias) is judged on the scale of the others.
    """
    floor = tolerance * math.sqrt(sum(float((leaf**2).sum()) for _, leaf in wanted))
    worst, culprit = 0.0, ""
    for (name, want), have in zip(wanted, got, strict=True):
        error, scale = float(np.linalg.norm(have - want)), max(float(np.linalg.norm(want)), floor)
        relative = 0.0 if error == 0 else error / scale if scale else math.inf
        if not relative <= worst:
            worst, culprit = relative, name
    return worst, culprit


def _positions(argnums: int | Sequence[int] | None) -> tuple[int, ...]:
    if argnums is None:
        return ()
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def _check_choices(**choices: tuple[Any, tuple[Any, ...]]) -> None:
    """Refuse a value that this release does not take."""
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            raise ValueError(
                f"value_and_grad needs {name} in {allowed} in this release, got {name}={given!r}; choose one of them"
            )
