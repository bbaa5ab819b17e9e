"""Per-example gradient statistics of a JAX model: ``jax.value_and_grad`` with one more result."""

import jax
import jax.numpy as jnp
import optax

import gradiometer as gm
from gradiometer.optimizers.optax_api import madam

keys = jax.random.split(jax.random.key(0), 3)
inputs = jax.random.normal(keys[0], (512, 20))
targets = jnp.sin(inputs[:, :1]) + 0.1 * jax.random.normal(keys[1], (512, 1))
params = {"hidden": {"w": jax.random.normal(keys[2], (20, 32)) / 5, "b": jnp.zeros(32)}, "out": jnp.zeros((32, 1))}
optimizer = madam(1e-2, variance="per_example")


def loss_fn(params, batch):
    x, y = batch
    hidden = jax.nn.gelu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return ((hidden @ params["out"] - y) ** 2).mean()


measured = gm.value_and_grad(loss_fn)


@jax.jit
def step(params, opt_state, temporal, batch):
    loss, grads, moments = measured(params, batch)
    summary, temporal = gm.summarize(moments, temporal, opt_state=opt_state)
    updates, opt_state = optimizer.update(grads, opt_state, params, moments=moments)
    return optax.apply_updates(params, updates), opt_state, temporal, summary, loss


opt_state, temporal = optimizer.init(params), gm.init_temporal(params)
with gm.Publisher("jax-quickstart", params=params) as publisher:
    for number in range(50):
        rows = jax.random.randint(jax.random.key(number), (32,), 0, len(inputs))
        batch = (inputs[rows], targets[rows])
        params, opt_state, temporal, summary, loss = step(params, opt_state, temporal, batch)
        publisher.record(number, summary, loss=loss)

print(f"loss {float(loss):.3f}")
for name, value in summary.columns.items():
    print(f"{name:24} {value}")
