"""flax linen's ``TrainState``, with the one thing it lacks: moments reach the optimizer."""

from typing import Any, Self

from flax.training import train_state

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):  # type: ignore[misc]  # flax has no types here
    """``flax.training.train_state.TrainState`` whose ``apply_gradients`` takes ``moments``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from gradiometer.stats_core import Moments
        >>> def update(grads, state, params=None, *, moments=None, **extra_args):
        ...     return {"w": -moments["w"].mean}, state
        >>> tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
        >>> state = TrainState.create(apply_fn=None, params={"w": jnp.zeros(1)}, tx=tx)
        >>> moments = {"w": Moments.from_per_example(jnp.array([[1.0], [3.0]]))}
        >>> state.apply_gradients(grads={"w": jnp.zeros(1)}, moments=moments).params
        {'w': Array([-2.], dtype=float32)}
    """

    def apply_gradients(self, *, grads: Any, moments: Any = None, **kwargs: Any) -> Self:
        """One step, as flax makes it.

        Args:
            grads: like ``params``.
            moments: as returned by ``gradiometer.value_and_grad``; None to pass none on.
            **kwargs: fields to replace.

        Raises:
            TypeError: if ``moments`` are given and the optimizer takes no extra arguments.
        """
        if moments is None:
            plain: Self = super().apply_gradients(grads=grads, **kwargs)
            return plain

        kinds = {kind.__name__ for kind in type(self.tx).__mro__}
        if "GradientTransformationExtraArgs" not in kinds:  # by name: optax is imported in files named after it
            raise TypeError(
                f"TrainState.apply_gradients needs an optimizer that takes moments, got tx={type(self.tx).__name__}; "
                "wrap it in optax.with_extra_args_support, or leave moments out"
            )

        def update(grads: Any, opt_state: Any, params: Any = None) -> Any:
            return self.tx.update(grads, opt_state, params, moments=moments)

        bound = self.replace(tx=self.tx._replace(update=update))
        stepped = super(TrainState, bound).apply_gradients(grads=grads, **kwargs)
        after: Self = stepped.replace(tx=self.tx)
        return after
