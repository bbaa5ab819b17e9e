"""The definition of truth: float64, one example at a time, plain loops. Slow on purpose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class LoopMoments:
    """What `Moments` must agree with, for one parameter."""

    count: int
    weight_sum: float
    weight_sq_sum: float
    mean: np.ndarray
    m2: np.ndarray
    sq_norms: np.ndarray
    weights: np.ndarray

    @property
    def kappa(self) -> float:
        """Σ‖gᵢ‖² / Σ‖gᵢ − ḡ‖²: by how much cancellation may magnify an error of m2; inf where m2 is 0."""
        total = float(self.m2.sum())
        return float(self.sq_norms.sum()) / total if total > 0 else math.inf


def loop_moments(grads: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> LoopMoments:
    """Moments of per-example gradients, given one by one."""
    grads = [np.asarray(g, np.float64) for g in grads]
    raw = [1.0] * len(grads) if weights is None else [float(a) for a in weights]
    weight_sum = math.fsum(raw)
    mean = np.zeros_like(grads[0])
    for a, g in zip(raw, grads, strict=True):
        mean = mean + a * g
    mean = mean / weight_sum
    m2 = np.zeros_like(mean)
    for a, g in zip(raw, grads, strict=True):
        m2 = m2 + a * (g - mean) ** 2
    return LoopMoments(
        count=len(grads),
        weight_sum=weight_sum,
        weight_sq_sum=math.fsum(a * a for a in raw),
        mean=mean,
        m2=m2,
        sq_norms=np.array([math.fsum((g * g).ravel()) for g in grads]),
        weights=np.array(raw),
    )


def loop_layer(parameters: Sequence[Sequence[np.ndarray]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The light columns of one layer, from its parameters' per-example gradients (parameter, example)."""
    moments = [loop_moments(grads, weights) for grads in parameters]
    raw = moments[0].weights
    share = raw / raw.sum()
    n = sum(m.sq_norms for m in moments)
    mean_sq_norm = sum(float((m.mean**2).sum()) for m in moments)
    s2 = float((share**2).sum())
    batch_variance = (float((share**2 * n).sum()) - s2 * mean_sq_norm) / (1 - s2) if len(raw) > 1 else math.nan
    if len(raw) > 1 and np.all(raw == raw[0]):  # the same number, without subtracting large ones
        batch_variance = sum(float(m.m2.sum()) / raw[0] for m in moments) / (len(raw) * (len(raw) - 1))
    grad_sq_norm = mean_sq_norm - batch_variance
    return {
        "count": float(len(raw)),
        "effective_count": 1 / s2,
        "mean_sq_norm": mean_sq_norm,
        "sq_norm_mean": float((share * n).sum()),
        "batch_variance": batch_variance,
        "grad_sq_norm": grad_sq_norm,
        "variance_trace": sum(float(m.m2.sum()) for m in moments) / raw.sum() + batch_variance,
    }


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error in the Frobenius norm; the plain norm where what is wanted is 0."""
    scale = float(np.linalg.norm(np.asarray(want, np.float64)))
    return float(np.linalg.norm(np.asarray(got, np.float64) - np.asarray(want, np.float64))) / (scale or 1.0)


def maxva_naive(
    grads: Sequence[np.ndarray],
    within: Sequence[np.ndarray] | None = None,
    beta_max: float = 0.999,
    beta_min: float = 0.5,
) -> dict[str, np.ndarray]:
    """MaxVA by brute force: the best of 20,001 weights for each element; U, V and w as the paper writes them."""
    u = np.zeros_like(np.asarray(grads[0], np.float64))
    raw_mean, raw_square, w = u.copy(), u.copy(), u.copy()
    beta = np.full_like(u, beta_max)
    for step, g in enumerate(grads):
        tau2 = np.zeros_like(u) if within is None else within[step]
        if step:
            low, high = ((1 - b) / (b * w + 1 - b) for b in (beta_max, beta_min))
            q = low + (high - low) * np.linspace(0, 1, 20_001).reshape(-1, *([1] * u.ndim))
            mean = (1 - q) * raw_mean / w + q * g
            square = (1 - q) * raw_square / w + q * (g * g + tau2)
            best = np.argmax(square - mean**2, axis=0)
            q = np.take_along_axis(q, best[None], axis=0)[0]
            beta = (1 - q) / (1 - q + q * w)
        raw_mean = beta * raw_mean + (1 - beta) * g
        raw_square = beta * raw_square + (1 - beta) * (g * g + tau2)
        w = beta * w + (1 - beta)
    u = raw_mean / w
    return {"u": u, "s": raw_square / w - u * u, "w": w, "beta": beta}
