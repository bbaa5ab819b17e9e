"""Small models for the JAX collector's tests: pure functions, in whatever precision their parameters have."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax import lax

from tests.reference import LoopMoments, loop_moments

BATCH = 5


@dataclass(frozen=True, eq=False)
class Model:
    """One model: ``loss_fn(params, batch)`` is the mean over the rows of the batch."""

    params: Any
    batch: Any
    loss_fn: Callable[..., jax.Array]


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp() -> Model:
    params = {
        "hidden": {"kernel": _normal(0, 6, 8), "bias": _normal(1, 8)},
        "out": {"kernel": _normal(2, 8, 2)},
        "temperature": np.float32(0.7) * np.ones((), np.float32),
    }
    batch = {"x": _normal(3, BATCH, 6), "y": _normal(4, BATCH, 2)}

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        out = hidden @ params["out"]["kernel"] * params["temperature"]
        return jnp.mean(jnp.sum((out - batch["y"]) ** 2, axis=1))

    return Model(params, batch, loss_fn)


class _Net(linen.Module):
    width: int = 4

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = linen.Conv(self.width, (3, 3), strides=2)(images)
        x = linen.gelu(linen.GroupNorm(num_groups=2)(x))
        return linen.Dense(3)(x.reshape(x.shape[0], -1))


def cnn() -> Model:
    net = _Net()
    params = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    batch = (_normal(5, BATCH, 8, 8, 1), np.array([0, 2, 1, 1, 0]))
    return Model(params, batch, lambda params, batch: _cross_entropy(net.apply(params, batch[0]), batch[1]))


class _NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.gelu(self.norm(self.hidden(x))))


def nnx_mlp() -> Model:
    graph, params, rest = nnx.split(_NnxNet(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((nnx.merge(graph, params, rest)(batch["x"]) - batch["y"]) ** 2)

    return Model(params, {"x": _normal(6, BATCH, 6), "y": _normal(7, BATCH, 2)}, loss_fn)


def tied() -> Model:
    """Embedding and head are one matrix; an attention whose key bias has a true gradient of 0."""
    vocabulary, width, length = 7, 6, 4
    params = {
        "embedding": _normal(8, vocabulary, width),
        "attention": {"qkv": _normal(9, width, 3 * width) / 2, "bias": _normal(10, 3 * width)},
    }
    tokens = np.random.default_rng(11).integers(0, vocabulary, (BATCH, length + 1))

    def loss_fn(params: Any, tokens: Any) -> jax.Array:
        x = params["embedding"][tokens[:, :-1]]
        q, k, v = jnp.split(x @ params["attention"]["qkv"] + params["attention"]["bias"][None, None], 3, axis=-1)
        scores = jnp.einsum("btd,bsd->bts", q, k)
        scores = jnp.where(jnp.tri(length, dtype=bool)[None], scores, jnp.full_like(scores, -1e9))
        x = x + jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), v)
        return _cross_entropy(jnp.einsum("btd,vd->btv", x, params["embedding"]), tokens[:, 1:])

    return Model(params, tokens, loss_fn)


def rnn() -> Model:
    params = {"cell": {"input": _normal(12, 3, 5), "recurrent": _normal(13, 5, 5) / 3}, "out": _normal(14, 5)}
    batch = (_normal(15, BATCH, 6, 3), _normal(16, BATCH))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        sequences, targets = batch

        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ params["cell"]["input"] + state @ params["cell"]["recurrent"]), None

        start = jnp.zeros((sequences.shape[0], 5), params["out"].dtype)
        last, _ = lax.scan(step, start, jnp.swapaxes(sequences, 0, 1))
        return jnp.mean((last @ params["out"] - targets) ** 2)

    return Model(params, batch, loss_fn)


def with_counter() -> Model:
    """Parameters beside which lie a step counter and an empty place."""
    inner = mlp()
    params = {**inner.params, "steps": np.array(3), "nothing": None}
    return Model(params, inner.batch, inner.loss_fn)


MODELS: dict[str, Model] = {
    "mlp": mlp(),
    "cnn with GroupNorm": cnn(),
    "nnx mlp": nnx_mlp(),
    "tied attention": tied(),
    "rnn": rnn(),
    "counter and None": with_counter(),
}


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point leaves as jax arrays of the type, others as they are."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf, tree
    )


def rows(batch: Any) -> list[Any]:
    """Each row of a batch, as a batch of one."""
    size = jax.tree.leaves(batch)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(size)]


@functools.cache
def loop(model: Model, weights: tuple[float, ...] | None = None) -> tuple[list[float], list[LoopMoments]]:
    """Losses of the rows, and moments of each floating-point leaf's gradients: float64, one row at a time."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax widens float64 by itself
        params, grad_fn = cast(model.params, jnp.float64), jax.jit(jax.value_and_grad(model.loss_fn, allow_int=True))
        found = [grad_fn(params, row) for row in rows(cast(model.batch, jnp.float64))]
        per_row = [[g for g in jax.tree.leaves(grads) if g.dtype == jnp.float64] for _, grads in found]
        losses = [float(loss) for loss, _ in found]
        return losses, [loop_moments([np.asarray(g) for g in leaf], weights) for leaf in zip(*per_row, strict=True)]
