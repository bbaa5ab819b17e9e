"""Windows and steps of simulated gradients, whose truth is known, and how often the shipped intervals hold it.

Gradients are ``g_i = G + c_i Λ^½ z_i`` with 64 elements, trΣ = 1, z normal and G in one random direction; the strength
of the signal is ``B|G|²/trΣ``. The intervals are the shipped functions; only the sums that they are fed with are formed
here, for many batches at once, and `check_sums` compares those with `noise_sums`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gradiometer.stats_core.intervals import (
    Interval,
    inverted,
    ratio_interval,
    snr_interval_of_step,
    variance_ratio_interval,
)
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.noise import noise_sums

SIZE = 64
SEED = 20250101
STRENGTHS = (0.0, 0.3, 1.0, 3.0, 10.0)
BATCHES = (8, 32, 128)
WINDOW = 32
CHUNK = 2**23  # elements drawn at a time: 32 MiB in float32

Scales = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _log_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.exp(0.75 * rng.standard_normal(shape) - 0.75**2)


def _student(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.sqrt(3 / rng.chisquare(5, shape))


class Model(NamedTuple):
    """Noise of one example: eigenvalues of Σ as j^−power, and each example's own scale c, E c² = 1."""

    name: str
    power: float
    scales: Scales | None = None

    @property
    def eigenvalues(self) -> np.ndarray:
        """Of Σ; their sum is 1."""
        values = np.arange(1.0, SIZE + 1) ** -self.power
        return values / values.sum()

    @property
    def effective_rank(self) -> float:
        """(trΣ)²/trΣ²."""
        return float(1 / (self.eigenvalues**2).sum())


FLAT, SLOW, STEEP = Model("Λ flat", 0), Model("Λ ~ 1/j", 1), Model("Λ ~ 1/j²", 2)
MODELS = (
    FLAT,
    SLOW,
    STEEP,
    Model("1/j, c log-normal", 1, _log_normal),
    Model("1/j, c² = 3/χ²₅", 1, _student),
)
WIDE_MODELS = (
    FLAT,
    Model("Λ ~ j^−¾", 0.75),
    Model("flat, c log-normal", 0, _log_normal),
    Model("flat, c² = 3/χ²₅", 0, _student),
    Model("j^−¾, c log-normal", 0.75, _log_normal),
)
DIRECTION = np.random.default_rng(SEED).standard_normal(SIZE)
DIRECTION = (DIRECTION / np.linalg.norm(DIRECTION)).astype(np.float32)


def drawn(rng: np.random.Generator, model: Model, batch: int, count: int) -> Iterator[np.ndarray]:
    """The noise of ``count`` batches, in pieces of shape (batches, batch, SIZE)."""
    roots = np.sqrt(model.eigenvalues).astype(np.float32)
    most = max(1, CHUNK // (batch * SIZE))
    for first in range(0, count, most):
        noise = rng.standard_normal((min(most, count - first), batch, SIZE), np.float32)
        noise *= roots
        if model.scales is not None:
            noise *= model.scales(rng, (*noise.shape[:2], 1)).astype(np.float32)
        yield noise


class Batches(NamedTuple):
    """What many batches' noise has to say before a signal is added: shape (batches,) each."""

    batch: int
    mean_sq_norm: np.ndarray
    mean_along: np.ndarray  # of the mean noise, along G's direction
    sq_norm_mean: np.ndarray

    def with_signal(self, length: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """|Ĝ|² and trΣ-hat of each batch, where the true gradient has this length."""
        added = 2 * length * self.mean_along + length * length
        mean_sq_norm, sq_norm_mean, n = self.mean_sq_norm + added, self.sq_norm_mean + added, self.batch
        return (n * mean_sq_norm - sq_norm_mean) / (n - 1), n / (n - 1) * (sq_norm_mean - mean_sq_norm)


def batches(rng: np.random.Generator, model: Model, batch: int, count: int) -> Batches:
    """The sums of ``count`` batches."""
    parts = []
    for noise in drawn(rng, model, batch, count):
        mean = noise.mean(axis=1)
        squares = np.einsum("nbj,nbj->n", noise, noise)
        parts.append((np.einsum("nj,nj->n", mean, mean), mean @ DIRECTION, squares / batch))
    return Batches(batch, *(np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True)))


def check_sums() -> None:
    """The sums formed here are those of `noise_sums`: float32's rounding of 64 elements apart, 1e-5."""
    for model in MODELS:
        noise = next(drawn(np.random.default_rng(1), model, 8, 3))
        signal, trace = batches(np.random.default_rng(1), model, 8, 3).with_signal(0.5)
        for index, one in enumerate(noise.astype(np.float64) + 0.5 * DIRECTION):
            sums = noise_sums(Moments.from_per_example(one))
            assert abs(signal[index] - sums.grad_sq_norm) < 1e-5 * sums.sq_norm_mean
            assert abs(trace[index] - sums.variance_trace) < 1e-5 * sums.sq_norm_mean


class Share(NamedTuple):
    """How often an interval held the truth or left a noise scale unresolved; and its ends' ratio, in the median."""

    covered: float
    unresolved: float
    count: int
    fold: float = np.nan


def share_of(found: Interval, truth: float | np.ndarray) -> Share:
    covered = (found.low <= truth) & (truth <= found.high)
    resolved = inverted(found).is_resolved
    fold = np.divide(found.high, found.low, out=np.full(len(covered), np.inf), where=resolved)
    return Share(float(covered.mean()), float(1 - resolved.mean()), len(covered), float(np.median(fold)))


def windows(values: np.ndarray, steps: int) -> np.ndarray:
    """Values of consecutive steps as windows: shape (steps, windows)."""
    return values[: len(values) // steps * steps].reshape(-1, steps).T


def pooled(
    rng: np.random.Generator, model: Model, batch: int, repetitions: int, lengths: tuple[int, ...] = (WINDOW,)
) -> dict[tuple[int, float], Share]:
    """Intervals over windows of steps: (steps, strength) → share. Shorter windows are cut from the same steps."""
    noise = batches(rng, model, batch, repetitions * WINDOW)
    found = {}
    for strength in STRENGTHS:
        truth = strength / batch
        signal, trace = noise.with_signal(np.sqrt(truth))
        for steps in lengths:
            found[steps, strength] = share_of(ratio_interval(windows(signal, steps), windows(trace, steps)), truth)
    return found


def one_step(rng: np.random.Generator, model: Model, batch: int, repetitions: int) -> dict[float, Share]:
    """Intervals from single steps: strength → share."""
    parts = []
    for noise in drawn(rng, model, batch, repetitions):
        mean = noise.mean(axis=1)
        parts.append(
            (
                np.einsum("nbj,nbj->bn", noise, noise),
                (noise @ DIRECTION).T,
                np.einsum("nbj,nj->bn", noise, mean),
                np.einsum("nj,nj->n", mean, mean),
            )
        )
    squares, along, dots, mean_sq = (
        np.concatenate(column, axis=-1).astype(np.float64) for column in zip(*parts, strict=True)
    )
    found = {}
    for strength in STRENGTHS:
        length = np.sqrt(strength / batch)
        added = length * length + length * along.mean(axis=0)
        interval = snr_interval_of_step(
            squares + 2 * length * along + length * length,
            dots + length * along + added,
            mean_sq + length * along.mean(axis=0) + added,
        )
        found[strength] = share_of(interval, strength / batch)
    return found


def token_means(rng: np.random.Generator, batch: int, repetitions: int) -> dict[float, Share]:
    """One-step intervals of a weighted mean: examples of 1 to 128 tokens, weights as these, covariance Σ/tokens."""
    tokens = 2.0 ** (np.arange(batch) % 8)
    share = tokens / tokens.sum()
    noise = np.concatenate(list(drawn(rng, SLOW, batch, repetitions))).astype(np.float64)
    noise /= np.sqrt(tokens)[None, :, None]
    spread = float((share**2 / tokens).sum())  # Var of the weighted mean; Σ w trΣ_i is the trace, less what they share
    found = {}
    for strength in STRENGTHS:
        grads = noise + np.sqrt(strength * spread) * DIRECTION
        mean = np.einsum("b,nbj->nj", share, grads)
        interval = snr_interval_of_step(
            np.einsum("nbj,nbj->bn", grads, grads),
            np.einsum("nbj,nj->bn", grads, mean),
            np.einsum("nj,nj->n", mean, mean),
            tokens,
        )
        found[strength] = share_of(interval, strength * spread / float((share / tokens).sum()))
    return found


def variance_ratio(
    rng: np.random.Generator, model: Model, batch: int, repetitions: int, lengths: tuple[int, ...]
) -> dict[int, Share]:
    """Intervals of ρ, whose truth is 1: pairs of steps → share. Shorter windows are cut from the same steps."""
    longest = max(lengths)
    step_variance, expected = [], []
    for _ in range(repetitions):
        means, variances = [], []
        for noise in drawn(rng, model, batch, longest + 1):
            mean = noise.mean(axis=1)
            means.append(mean)
            spread = np.einsum("nbj,nbj->n", noise, noise) / batch - np.einsum("nj,nj->n", mean, mean)
            variances.append(spread / (batch - 1))
        mean, variance = np.concatenate(means), np.concatenate(variances).astype(np.float64)
        moved = np.diff(mean, axis=0)
        step_variance.append(0.5 * np.einsum("nj,nj->n", moved, moved).astype(np.float64))
        expected.append(0.5 * (variance[1:] + variance[:-1]))
    d, p = np.concatenate(step_variance), np.concatenate(expected)
    return {
        pairs: share_of(variance_ratio_interval(windows(d, pairs), windows(p, pairs)), 1.0)
        for pairs in lengths
    }  # fmt: skip


SERIAL_BATCH = 32
SERIAL_LENGTHS = (32, 128)
BLOCKS = (1, 2, 4, 8)


def serial_shares(signal: np.ndarray, trace: np.ndarray, truth: np.ndarray | float) -> dict[tuple[int, int], Share]:
    """Steps in order → (steps, block) → share. A truth of each step is averaged over the window."""
    found = {}
    for steps in SERIAL_LENGTHS:
        a, s = windows(signal, steps), windows(trace, steps)
        held = windows(truth, steps).mean(axis=0) if isinstance(truth, np.ndarray) else truth
        for block in BLOCKS:
            found[steps, block] = share_of(ratio_interval(a, s, block=block), held)
    return found


def reused_examples(rng: np.random.Generator, uses: int, steps: int) -> dict[tuple[int, int], Share]:
    """Each example stays in the batch for some consecutive steps; B|G|²/trΣ = 1."""
    fresh = SERIAL_BATCH // uses
    sums, squares = [], []
    for noise in drawn(rng, SLOW, fresh, steps + uses - 1):
        sums.append(noise.sum(axis=1))
        squares.append(np.einsum("nbj,nbj->n", noise, noise))
    total, square = np.concatenate(sums).astype(np.float64), np.concatenate(squares).astype(np.float64)
    mean = sum(total[k : k + steps] for k in range(uses)) / SERIAL_BATCH
    sq_norm_mean = sum(square[k : k + steps] for k in range(uses)) / SERIAL_BATCH
    noise_of = Batches(SERIAL_BATCH, np.einsum("nj,nj->n", mean, mean), mean @ DIRECTION, sq_norm_mean)
    return serial_shares(*noise_of.with_signal(np.sqrt(1 / SERIAL_BATCH)), 1 / SERIAL_BATCH)


def wandering_signal(
    rng: np.random.Generator, memory: float, steps: int
) -> tuple[dict[tuple[int, int], Share], dict[tuple[int, int], Share]]:
    """The logarithm of |G|² is an AR(1) process of sd 1/2; B|G|²/trΣ is 3 on average.

    Shares about the average over all time, and about that over the window.
    """
    kicks = rng.standard_normal(steps) * np.sqrt(1 - memory**2)
    state, path = rng.standard_normal(), np.empty(steps)
    for t in range(steps):
        state = memory * state + kicks[t]
        path[t] = state
    power = 3 / SERIAL_BATCH * np.exp(0.5 * path - 0.125)
    signal, trace = batches(rng, SLOW, SERIAL_BATCH, steps).with_signal(np.sqrt(power))
    return serial_shares(signal, trace, 3 / SERIAL_BATCH), serial_shares(signal, trace, power)


def falling_signal(rng: np.random.Generator, steps: int) -> dict[tuple[int, int], Share]:
    """|G|² falls to a quarter along each window, B|G|²/trΣ = 3 at its start; about the average over the window."""
    noise = batches(rng, SLOW, SERIAL_BATCH, steps)
    found = {}
    for length in SERIAL_LENGTHS:
        power = 3 / SERIAL_BATCH * 0.25 ** (np.arange(steps) % length / (length - 1))
        shares = serial_shares(*noise.with_signal(np.sqrt(power)), power)
        found.update({key: share for key, share in shares.items() if key[0] == length})
    return found
