"""The table of statistics: what each is called, means, is measured in and is made of.

The wire, the store's schema, the exporter, the live page and the glossary all read this table. A
statistic is added in one row here and one function in `gradiometer.stats_core`: a sum or a mean comes
from `noise.noise_sums`, `summary.step_sums` or `summary.maxva_sums`, a ratio needs no function.

Four kinds add up differently:

* ``sum``: additive over the elements of a layer; travels. Read over a window as its mean per step.
* ``mean``: a mean over the elements of a layer; travels, and is re-aggregated with the layers' sizes.
* ``count``: the same for all layers of a step, or a largest value; travels.
* ``ratio``: sum over steps of one column over the sum of another. Never travels, never formed from one step:
  readers form it over a window (`gradiometer.stats_core.window`).
"""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "IN_OPTIMIZER_UNITS",
    "RATIOS",
    "SCALARS",
    "STATISTICS",
    "WIRE",
    "Scalar",
    "Statistic",
    "Tier",
    "columns",
    "statistic",
]

Kind = Literal["sum", "mean", "count", "ratio"]
Tier = Literal["light", "default", "full"]
_TIERS: tuple[Tier, ...] = ("light", "default", "full")


@dataclass(frozen=True)
class Statistic:
    """One statistic of a layer.

    Attributes:
        name: the only spelling, in code, on the wire, in the store and in the docs.
        symbol: the literature's.
        unit: what it is measured in.
        help: one sentence, no full stop.
        formula: plain text, in the symbols of the glossary.
        kind: how it adds up, see the module.
        tier: the cheapest tier that carries it.
        needs: fields of `Moments` (travelling kinds), or the two columns of a ratio.
        metric: name in Prometheus behind ``gradiometer_layer_``, or None where it is not exported.
    """

    name: str
    symbol: str
    unit: str
    help: str
    formula: str
    kind: Kind
    tier: Tier
    needs: tuple[str, ...]
    metric: str | None = None


_SQ = "(loss/parameter)²"

STATISTICS: tuple[Statistic, ...] = (
    Statistic(
        "count", "n", "examples", "Examples in the logical batch", "n", "count", "light", ("count",), "batch_examples"
    ),
    Statistic(
        "effective_count", "1/s₂", "examples",
        "Effective number of examples under their weights (Kish)", "(Σa)²/Σa²",
        "count", "light", ("weight_sum", "weight_sq_sum"),
    ),
    Statistic(
        "nonfinite_examples", "–", "examples",
        "Examples whose gradient holds a NaN or an infinity", "#{i: ‖gᵢ‖² not finite}",
        "count", "light", ("sq_norms",), "nonfinite_examples",
    ),
    Statistic(
        "mean_sq_norm", "‖ḡ‖²", _SQ, "Squared norm of the batch gradient, biased up by its variance", "‖Σwᵢgᵢ‖²",
        "sum", "light", ("mean",), "mean_sq_norm",
    ),
    Statistic(
        "sq_norm_mean", "m₂", _SQ, "Mean squared norm of the examples' gradients", "Σwᵢ‖gᵢ‖²",
        "sum", "light", ("sq_norms", "weights"),
    ),
    Statistic(
        "variance_trace", "tr Σ", _SQ, "Variance of the examples' gradients, summed over elements (unbiased)",
        "ΣM₂/Σa + P", "sum", "light", ("m2", "sq_norms", "weights"), "variance_trace",
    ),
    Statistic(
        "batch_variance", "P", _SQ, "Variance of the batch gradient, measured across the examples of the batch",
        "(Σwᵢ²‖gᵢ‖² − s₂‖ḡ‖²)/(1 − s₂)", "sum", "light", ("m2", "sq_norms", "weights"), "batch_variance",
    ),
    Statistic(
        "grad_sq_norm", "|G|²", _SQ, "Squared norm of the true gradient (unbiased: may be negative)", "‖ḡ‖² − P",
        "sum", "light", ("mean", "m2"), "grad_sq_norm",
    ),
    Statistic(
        "step_variance", "D", _SQ, "Variance of the batch gradient, measured from step to step",
        "½‖ḡ_t − ḡ_{t−1}‖²", "sum", "default", ("mean",), "step_variance",
    ),
    Statistic(
        "step_variance_expected", "P̃", _SQ, "What step_variance is if only the drawn examples differ",
        "½(P_t + P_{t−1})", "sum", "default", ("m2",),
    ),
    Statistic(
        "temporal_variance", "s", _SQ, "MaxVA's variance of the gradients through time; inflated by design", "Σs",
        "sum", "default", ("mean",), "temporal_variance",
    ),
    Statistic(
        "temporal_variance_prior", "s₋", _SQ, "MaxVA's variance before this step, where a variance exists", "Σs_{t−1}",
        "sum", "default", ("mean",),
    ),
    Statistic(
        "deviation_sq", "d²", _SQ, "Squared deviation of the gradient from MaxVA's mean, where a variance exists",
        "Σ(g_t − u_{t−1})²", "sum", "default", ("mean",),
    ),
    Statistic(
        "deviation_share", "–", "share", "Share of elements whose deviation ratio is above 1, where MaxVA adapts",
        "mean[d² > s_{t−1}]", "mean", "default", ("mean",), "deviation_share_ratio",
    ),
    Statistic(
        "maxva_beta", "β_t", "share", "MaxVA's coefficient, averaged over the layer's elements", "mean β_t",
        "mean", "default", ("mean",), "maxva_beta_ratio",
    ),
    Statistic(
        "noise_scale", "B_simple", "examples", "Gradient noise scale: noise over signal, in examples", "tr Σ/|G|²",
        "ratio", "light", ("variance_trace", "grad_sq_norm"), "noise_scale_examples",
    ),
    Statistic(
        "batch_snr", "SNR", "power ratio", "Signal-to-noise ratio of the batch gradient; 0 is pure noise", "|G|²/P",
        "ratio", "light", ("grad_sq_norm", "batch_variance"), "batch_snr_ratio",
    ),
    Statistic(
        "variance_ratio", "ρ", "ratio", "Step-to-step variance over that across examples; 1: example noise only",
        "ΣD/ΣP̃", "ratio", "default", ("step_variance", "step_variance_expected"), "variance_ratio",
    ),
    Statistic(
        "deviation_ratio", "R_t", "ratio", "Squared deviation over MaxVA's variance (the paper's form)", "Σd²/Σs_{t−1}",
        "ratio", "default", ("deviation_sq", "temporal_variance_prior"), "deviation_ratio",
    ),
    Statistic(
        "deviation_ratio_measured", "d²/P", "ratio",
        "Squared deviation over the measured variance of the mean; about 1 with no drift", "Σd²/ΣP",
        "ratio", "default", ("deviation_sq", "batch_variance"), "deviation_measured_ratio",
    ),
    Statistic(
        "conditioning", "κ", "ratio", "Digits that a variance from sums of squares would lose", "Σwᵢ‖gᵢ‖²/tr Σ",
        "ratio", "light", ("sq_norm_mean", "variance_trace"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Scalar:
    """One number of a step, as in the store's table ``steps``. Attributes as in `Statistic`."""

    name: str
    unit: str
    help: str
    metric: str | None = None


SCALARS: tuple[Scalar, ...] = (
    Scalar("loss", "loss", "Training loss, as logged by the user", "loss"),
    Scalar("learning_rate", "1", "Learning rate of the first parameter group", "learning_rate_ratio"),
    Scalar("tokens", "tokens", "Tokens in the logical batch, as logged by the user"),
    Scalar("examples", "examples", "Examples in the logical batch", "examples"),
    Scalar("grad_norm", "loss/parameter", "Norm of the gradient that the optimizer was given", "grad_norm"),
    Scalar("clip_factor", "ratio", "Norm of the gradient that the optimizer was given over its norm before clipping"),
    Scalar("loss_scale", "ratio", "Factor that the loss was multiplied by before the backward pass"),
    Scalar("skipped", "0 or 1", "1 where the optimizer's step was skipped"),
    Scalar(
        "gradient_scale", "ratio",
        "Squared norm of the gradient the optimizer saw over that of the measured mean; what MaxVA's columns are in",
        "gradient_scale_ratio",
    ),
    Scalar("clock_steps", "steps", "Steps since the measured step before this one", "clock_steps"),
    Scalar("overhead_seconds", "seconds", "Time that measuring took on the training thread", "overhead_seconds"),
    Scalar("dropped_steps", "steps", "Measured steps that the publisher has dropped in this run", "dropped_steps"),
    Scalar("moments_missing", "parameters", "Parameters that a per-example optimizer found no Moments for"),
)  # fmt: skip

IN_OPTIMIZER_UNITS = frozenset({"temporal_variance", "temporal_variance_prior", "deviation_sq"})
"""Sums in the units of the gradient that the optimizer saw, where the temporal state is the optimizer's own."""

_BY_NAME = {row.name: row for row in STATISTICS}
WIRE: tuple[Statistic, ...] = tuple(row for row in STATISTICS if row.kind != "ratio")
RATIOS: tuple[Statistic, ...] = tuple(row for row in STATISTICS if row.kind == "ratio")


def statistic(name: str) -> Statistic:
    """The row of that name.

    Raises:
        ValueError: if there is none; the message lists the names.

    Example:
        >>> statistic("noise_scale").unit
        'examples'
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(
            f"catalog.statistic needs name in {tuple(_BY_NAME)}, got name={name!r}; see docs/glossary.md"
        ) from None


def columns(tier: Tier = "default") -> tuple[str, ...]:
    """Names of the columns that travel in a tier, in the table's order.

    Raises:
        ValueError: if there is no such tier.

    Example:
        >>> columns("light")[:3]
        ('count', 'effective_count', 'nonfinite_examples')
    """
    if tier not in _TIERS:
        raise ValueError(f"catalog.columns needs tier in {_TIERS}, got tier={tier!r}; choose one of them")
    wanted = _TIERS[: _TIERS.index(tier) + 1]
    return tuple(row.name for row in WIRE if row.tier in wanted)
