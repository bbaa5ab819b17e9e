r"""What the examples' own numbers say: how large their gradients are, and where they point.

Works on several rows at once (one a layer, one for the whole model), so that a step costs a few calls however many
layers there are. Of example i there are only its squared norm :math:`n_i = \|g_i\|^2` and its product with the mean
:math:`d_i = \langle g_i, \bar g \rangle`; what the mean of the *other* examples would say follows from them:

.. math::
    \bar g_{-i} = \frac{\bar g - w_i g_i}{1 - w_i}, \qquad
    \langle g_i, \bar g_{-i} \rangle = \frac{d_i - w_i n_i}{1 - w_i}, \qquad
    \|\bar g_{-i}\|^2 = \frac{\|\bar g\|^2 - 2 w_i d_i + w_i^2 n_i}{(1 - w_i)^2}

with :math:`w_i = a_i / \sum a`. Where only directions are asked for, the :math:`1 - w_i` cancel. Norms and shares count
every example alike; the weights say how :math:`\bar g` was formed.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from gradiometer.stats_core.arrays import Array, namespace, positive_or_one, widened

__all__ = ["ExampleRows", "Outliers", "example_columns", "outliers"]

_PERCENTS = {"norm_median": 50, "norm_p95": 95, "norm_p99": 99, "norm_max": 100}
_OF_DIRECTIONS = ("parallel_variance", "example_cosine", "conflicting_share", "deviation_kurtosis")
_NAMES = (*_PERCENTS, "effective_examples", *_OF_DIRECTIONS)

_UNRESOLVED = 2.0**-19
"""A difference smaller than this share of its terms can't be told from 0. Adding 128 terms of one sign in float32, as
`arrays.total` does at a time, leaves an error of standard deviation √128/3 roundings of 2^-24; that of a difference of
two such sums is 5.4 roundings, and this is 32, six times as much."""


class ExampleRows(NamedTuple):
    r"""The examples' own numbers of one logical batch: R rows (layers, the whole model), B examples.

    They are those of all the examples that :math:`\bar g` is the mean of, on every rank.

    Attributes:
        sq_norms: :math:`\|g_i\|^2`, shape ``(R, B)``. Unit: (loss / parameter)².
        mean_sq_norm: :math:`\|\bar g\|^2`, shape ``(R,)``. Same unit.
        weights: raw weights :math:`a_i`, shape ``(B,)``; 0 is padding and not an example.
        dots: :math:`\langle g_i, \bar g \rangle`, shape ``(R, B)``, same unit; None where not measured.
    """

    sq_norms: Array
    mean_sq_norm: Array
    weights: Array
    dots: Array | None = None


class Outliers(NamedTuple):
    """The examples of the largest gradients, largest first.

    Attributes:
        rows: their places in the batch, shape ``(k,)``, integers; -1 where there are fewer examples than k.
        sq_norms: their squared norms, shape ``(k,)``; NaN or infinite for examples that are not finite.
    """

    rows: Array
    sq_norms: Array


def example_columns(rows: ExampleRows, names: Collection[str]) -> dict[str, Array]:
    r"""The catalogue's statistics of kind "example", for each row.

    ``norm_median``, ``norm_p95``, ``norm_p99``, ``norm_max``
        Quantiles of :math:`\|g_i\|`, linear between the two neighbours in rank (as numpy's default). Unit: loss /
        parameter. A p99 far above the median says that few examples make the gradient.
    ``effective_examples``
        :math:`(\sum n_i)^2 / \sum n_i^2`: how many examples of equal size would spread the squared norms as these
        do; between 1 and B.
    ``parallel_variance``
        :math:`P_\parallel = (\sum w_i^2 d_i^2 / \|\bar g\|^2 - s_2 \|\bar g\|^2) / (1 - s_2)`, which is
        :math:`\sum (d_i - \|\bar g\|^2)^2 / (n (n-1) \|\bar g\|^2)` where all weights are equal: the part of the batch
        gradient's variance P that lies along the batch gradient. What is left, :math:`P - P_\parallel`, lies across it.
        The inner-product and the orthogonality test are these two over :math:`\|\bar g\|^2`. Unit: (loss / parameter)².
    ``example_cosine``
        Mean of :math:`\cos(g_i, \bar g_{-i})`: 0 is what pure noise gives, 1 is full agreement.
    ``conflicting_share``
        Share of examples with :math:`\langle g_i, \bar g_{-i} \rangle < 0`, whose own step would undo some of what
        the others ask for: one half is what pure noise gives.
    ``deviation_kurtosis``
        :math:`\operatorname{mean} R_i^4 / (\operatorname{mean} R_i^2)^2` of :math:`R_i = \|g_i - \bar g\|`: 1 where all
        examples deviate equally far, as two always do; towards
        :math:`1 + 2 \operatorname{tr} \Sigma^2 / (\operatorname{tr} \Sigma)^2` where they are normal and many (few
        read lower: :math:`3 (n-1)/(n+1)` instead of 3 in one dimension).

    Args:
        rows: of one logical batch.
        names: which of them are wanted.

    Returns:
        Name → shape ``(R,)``, in the order of ``names``. Without ``dots`` the last four are NaN.

    Raises:
        ValueError: if a name is none of these.

    Guarantees:
        * The order of the examples, and padding among them, change nothing but rounding.
        * c times every gradient: norms grow by c, ``parallel_variance`` by c², nothing else changes.
        * Shares and cosines are of the other examples' mean: they are not drawn upwards by an example's own part in it.

    Edge cases:
        ===================================  ==================================================================
        no example                           NaN
        one example                          its norm, 1 effective example, NaN for the last four
        a NaN or infinite gradient           infinitely large in quantiles; left out of the others. (Where it is
                                             in :math:`\bar g`, that is not finite and the last four are NaN.)
        all gradients 0                      norms of 0, conflicting share 0, NaN for the others
        a gradient of 0 among others         conflicts with nothing; has no direction and no cosine
        :math:`\bar g = 0`                   no direction to lie along: ``parallel_variance`` NaN
        unequal weights                      ``parallel_variance`` can come out below 0: the sign is kept
        all gradients equal                  no deviation: ``deviation_kurtosis`` NaN
        a product or deviation within the    is 0: two examples that share no element don't conflict by their
        rounding of float32 (2^-19)          rounding; an unresolved cosine is left out
        ===================================  ==================================================================

    Example:
        >>> import numpy as np
        >>> grads = np.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 2.0]])
        >>> mean = grads.mean(axis=0)
        >>> sq_norms, dots = (grads**2).sum(axis=1)[None], (grads @ mean)[None]
        >>> rows = ExampleRows(sq_norms, np.array([mean @ mean]), np.ones(3), dots)
        >>> columns = example_columns(rows, ["norm_max", "conflicting_share", "example_cosine"])
        >>> {name: round(float(column[0]), 4) for name, column in columns.items()}
        {'norm_max': 3.0, 'conflicting_share': 0.3333, 'example_cosine': 0.0866}

    References:
        Bollapragada, Byrd and Nocedal, "Adaptive sampling strategies for stochastic optimization", 2018,
        arXiv 1710.11258 (the two variances). Hyndman and Fan, "Sample quantiles in statistical packages", The American
        Statistician 50(4), 1996, type 7 (the quantiles).
    """
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        raise ValueError(
            f"example_columns needs names in {_NAMES}, got name={unknown[0]!r}; "
            'ask for rows of the catalogue of kind "example"'
        )
    rows = _in_one_type(rows)
    found = _quantiles(rows, {name: percent for name, percent in _PERCENTS.items() if name in names})
    if "effective_examples" in names:
        found["effective_examples"] = _effective_examples(rows)
    if rows.dots is None:
        found |= dict.fromkeys(_OF_DIRECTIONS, _nowhere(rows.mean_sq_norm))
    elif not set(_OF_DIRECTIONS).isdisjoint(names):
        directions = _directions(rows, rows.dots)
        found |= {name: formula(directions) for name, formula in _FORMULAS.items() if name in names}
    return {name: found[name] for name in names}


def outliers(sq_norms: Array, k: int, weights: Array | None = None) -> Outliers:
    """The examples of the largest gradients of one row, found on the device.

    Args:
        sq_norms: squared norms, shape ``(B,)``.
        k: how many; all of them where there are fewer.
        weights: raw weights, shape ``(B,)``; an example of weight 0 is padding and left out. None: all are examples.

    Returns:
        Of shape ``(min(k, B),)``: examples that are not finite first, then from the largest down; equal ones in the
        batch's order.

    Raises:
        ValueError: if k is not at least 1.

    Example:
        >>> import numpy as np
        >>> outliers(np.array([1.0, 9.0, np.nan, 4.0]), 2)
        Outliers(rows=array([2, 1]), sq_norms=array([nan,  9.]))
    """
    if k < 1:
        raise ValueError(f"outliers needs k >= 1, got k={k}; ask for at least one example")
    xp = namespace(sq_norms)
    size = xp.where(xp.isfinite(sq_norms), sq_norms, xp.inf)
    if weights is not None:
        size = xp.where(weights != 0, size, -xp.ones_like(size))
    places = xp.argsort(-size, stable=True)[: min(k, sq_norms.shape[0])]
    exists = xp.take(size, places) >= 0
    found = xp.take(sq_norms, places)
    return Outliers(
        rows=xp.where(exists, places, -xp.ones_like(places)),
        sq_norms=xp.where(exists, found, xp.nan),
    )


def _in_one_type(rows: ExampleRows) -> ExampleRows:
    """All in the widest type that one of them has, at least float32."""
    xp = namespace(rows.sq_norms)
    sq_norms, mean_sq_norm = widened(rows.sq_norms), widened(rows.mean_sq_norm)
    dots = None if rows.dots is None else widened(rows.dots)
    dtype = xp.result_type(sq_norms, mean_sq_norm, *(() if dots is None else (dots,)))
    return ExampleRows(
        sq_norms=xp.astype(sq_norms, dtype),
        mean_sq_norm=xp.astype(mean_sq_norm, dtype),
        weights=xp.astype(rows.weights, dtype),
        dots=None if dots is None else xp.astype(dots, dtype),
    )


def _nowhere(like: Array) -> Array:
    xp = namespace(like)
    return xp.full_like(like, xp.nan)


def _quantiles(rows: ExampleRows, percents: dict[str, int]) -> dict[str, Array]:
    """From one sort, where padding and what is not finite come last; ranks in integers, so that they are exact."""
    if not percents:
        return {}
    xp = namespace(rows.sq_norms)
    example = rows.weights != 0
    comparable = example[None, :] & xp.isfinite(rows.sq_norms)
    norms = xp.sort(xp.sqrt(xp.where(comparable, rows.sq_norms, xp.inf)), axis=1)
    last = xp.sum(xp.astype(example, xp.int32)) - 1
    last_or_0 = xp.where(last < 0, xp.zeros_like(last), last)
    below = xp.stack([last_or_0 * percent // 100 for percent in percents.values()])
    above = xp.where(below < last_or_0, below + 1, below)
    rest = xp.stack([last_or_0 * percent % 100 for percent in percents.values()])
    share = (xp.astype(rest, norms.dtype) / 100)[None, :]
    low, high = xp.take(norms, below, axis=1), xp.take(norms, above, axis=1)
    alone = (share == 0) | (low == high)  # nothing to add: and infinity less infinity is not formed
    gap = xp.where(alone, xp.zeros_like(high), high) - xp.where(alone, xp.zeros_like(low), low)
    values = xp.where(last >= 0, low + share * gap, xp.nan)
    return {name: values[:, place] for place, name in enumerate(percents)}


def _effective_examples(rows: ExampleRows) -> Array:
    xp = namespace(rows.sq_norms)
    kept = (rows.weights != 0)[None, :] & xp.isfinite(rows.sq_norms)
    sq_norms = xp.where(kept, rows.sq_norms, xp.zeros_like(rows.sq_norms))
    sq_norms = _in_units(sq_norms, positive_or_one(xp.max(sq_norms, axis=1, keepdims=True)))
    sums = xp.sum(sq_norms, axis=1)
    return xp.where(sums > 0, sums * sums / positive_or_one(xp.sum(sq_norms * sq_norms, axis=1)), xp.nan)


def _in_units(values: Array, unit: Array) -> Array:
    """The quotient, by the root's reciprocal twice: XLA forms reciprocals, and that of 1e38 is no normal float32."""
    reciprocal = 1.0 / namespace(unit).sqrt(unit)
    return values * reciprocal * reciprocal


class _Directions(NamedTuple):
    """What the statistics of directions share, in units of each row's largest number; what is left out is 0.

    Attributes:
        n: ‖gᵢ‖², shape (R, B).
        d: ⟨gᵢ, ḡ⟩, shape (R, B).
        m: ‖ḡ‖², shape (R, 1); 0 where it is not finite.
        w: normalised weights, shape (R, B).
        in_mean: 1 for examples with a product, shape (R, B).
        kept: 1 for those that have a norm, too, shape (R, B).
        exists: rows whose ‖ḡ‖² is finite, shape (R,).
        unit: what all were divided by, shape (R,).
    """

    n: Array
    d: Array
    m: Array
    w: Array
    in_mean: Array
    kept: Array
    exists: Array
    unit: Array


def _directions(rows: ExampleRows, dots: Array) -> _Directions:
    xp = namespace(dots)
    zeros = xp.zeros_like(dots)
    in_mean = (rows.weights != 0)[None, :] & xp.isfinite(dots)
    kept = in_mean & xp.isfinite(rows.sq_norms)
    n = xp.where(kept, rows.sq_norms, zeros)
    d = xp.where(in_mean, dots, zeros)
    w = xp.where(in_mean, xp.broadcast_to(rows.weights[None, :], dots.shape), zeros)
    exists = xp.isfinite(rows.mean_sq_norm)
    m = xp.where(exists, rows.mean_sq_norm, xp.zeros_like(rows.mean_sq_norm))
    unit = xp.max(xp.where(n > xp.abs(d), n, xp.abs(d)), axis=1)
    unit = positive_or_one(xp.where(unit > m, unit, m))
    return _Directions(
        n=_in_units(n, unit[:, None]),
        d=_in_units(d, unit[:, None]),
        m=_in_units(m, unit)[:, None],
        w=w / positive_or_one(xp.sum(w, axis=1, keepdims=True)),
        in_mean=xp.astype(in_mean, dots.dtype),
        kept=xp.astype(kept, dots.dtype),
        exists=exists,
        unit=unit,
    )


def _parallel_variance(of: _Directions) -> Array:
    xp = namespace(of.d)
    count = xp.sum(of.in_mean, axis=1)
    s2 = xp.sum(of.w * of.w, axis=1)
    rest = xp.sum(of.w * (1.0 - of.w), axis=1)  # 1 - s2
    mean = xp.sum(of.w * of.d, axis=1, keepdims=True)  # ‖ḡ‖², with the products' own rounding
    deviations = of.in_mean * (of.d - mean)
    deviations = deviations - of.in_mean * xp.sum(of.w * deviations, axis=1, keepdims=True)  # what rounding left of it
    plain = s2 * xp.sum(of.w * deviations * deviations, axis=1)
    weighted = xp.sum(of.w * of.w * deviations * (deviations + 2.0 * mean), axis=1)
    equal = xp.abs(s2 * count - 1.0) < 1e-6  # as `noise.noise_sums` does, so that P is their sum
    m = of.m[:, 0]
    exists = of.exists & (count > 1) & (m > 0) & (rest > 0)
    value = xp.where(equal, plain, weighted) / positive_or_one(rest) / positive_or_one(m)
    return xp.where(exists, value * of.unit, xp.nan)


def _example_cosine(of: _Directions) -> Array:
    xp = namespace(of.d)
    own = of.w * of.n
    others_sq_norm = of.m - 2.0 * of.w * of.d + of.w * own
    terms = of.m + 2.0 * of.w * xp.abs(of.d) + of.w * own
    resolved = (of.kept > 0) & (of.n > 0) & (others_sq_norm > _UNRESOLVED * terms)
    length = xp.sqrt(positive_or_one(of.n)) * xp.sqrt(positive_or_one(others_sq_norm))
    cosine = xp.where(resolved, (of.d - own) / length, xp.zeros_like(length))
    cosine = xp.where(cosine > 1, xp.ones_like(cosine), cosine)
    cosine = xp.where(cosine < -1, -xp.ones_like(cosine), cosine)
    return _mean_over(cosine, resolved, of)


def _conflicting_share(of: _Directions) -> Array:
    own = of.w * of.n
    xp = namespace(own)
    against = of.d - own < -_UNRESOLVED * (xp.abs(of.d) + own)
    return _mean_over(xp.astype(against, own.dtype), of.kept > 0, of)


def _deviation_kurtosis(of: _Directions) -> Array:
    xp = namespace(of.d)
    sq_deviations = of.n - 2.0 * of.d + of.m
    sq_deviations = of.kept * xp.where(sq_deviations > 0, sq_deviations, xp.zeros_like(sq_deviations))
    terms = of.kept * (of.n + 2.0 * xp.abs(of.d) + of.m)
    sums, count = xp.sum(sq_deviations, axis=1), xp.sum(of.kept, axis=1)
    exists = of.exists & (count > 1) & (sums > _UNRESOLVED * xp.sum(terms, axis=1))
    relative = sq_deviations / positive_or_one(sums)[:, None]
    return xp.where(exists, count * xp.sum(relative * relative, axis=1), xp.nan)


def _mean_over(values: Array, chosen: Array, of: _Directions) -> Array:
    """Mean of the chosen examples' values; NaN in rows that hold fewer than two examples, or where none is chosen."""
    xp: Any = namespace(values)
    chosen = xp.astype(chosen, values.dtype)
    count = xp.sum(chosen, axis=1)
    exists = of.exists & (xp.sum(of.kept, axis=1) > 1) & (count > 0)
    return xp.where(exists, xp.sum(chosen * values, axis=1) / positive_or_one(count), xp.nan)


_FORMULAS = {
    "parallel_variance": _parallel_variance,
    "example_cosine": _example_cosine,
    "conflicting_share": _conflicting_share,
    "deviation_kurtosis": _deviation_kurtosis,
}
