"""A measured JAX step against the plain one: the demo's convolutional network, on one thread."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import gradiometer as gm
from benchmarks.interleaved import interleaved, show
from gradiometer.demo.jax_digits import BATCH, DigitNet, digits
from gradiometer.optimizers.optax_api import madam


def trainer(kind: str):
    images, labels = digits()
    batch = (jnp.asarray(images[:BATCH]), jnp.asarray(labels[:BATCH]))
    model = DigitNet()
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    optimizer = (
        madam(1e-3, variance="per_example" if "per_example" in kind else "minibatch")
        if "madam" in kind
        else optax.adamw(1e-3)
    )

    def loss_fn(params, batch):
        logits = model.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    measured = gm.value_and_grad(loss_fn)

    @jax.jit
    def step(params, opt_state, temporal):
        if "measured" not in kind:
            _, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, temporal, None
        _, grads, moments = measured(params, batch)
        own = opt_state if "madam" in kind else None
        summary, temporal = gm.summarize(moments, temporal, opt_state=own)
        extra = {"moments": moments} if "per_example" in kind else {}
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, temporal, summary

    state = [params, optimizer.init(params), gm.init_temporal(params)]

    def run() -> None:
        *state[:], _ = jax.block_until_ready(step(*state))

    return run


if __name__ == "__main__":
    kinds = ("adamw", "adamw, plain again (control)", "adamw, measured", "madam", "madam per_example, measured")
    show("JAX, convolutions with GroupNorm, B 64", interleaved({kind: trainer(kind) for kind in kinds}, repeats=41))
