"""The table of statistics: what each is called, means, is measured in and is made of.

The wire, the store's schema, the exporter, the live page, the collectors and the glossary all read this
table. A statistic is added in one row here and one function in `gradiometer.stats_core`.

What travels, a column of the store:

* ``sum``: additive over the elements of a layer. Read over a window as its mean per step.
* ``mean``: a mean over the elements of a layer; re-aggregated with the layers' sizes.
* ``count``: the same for all layers of a step, or a largest value.
* ``example``: made of the examples' own numbers (their norms, their cosines); does not add up over layers, so the
  whole model's travels as the step's scalar of the same name. Read over a window as its mean per step.
* ``histogram``: log-bucketed counts, merged exactly over steps and layers.
* ``outliers``: single examples with the user's own ids.

What readers form over a window of steps (`gradiometer.stats_core.window`), and never from one step:

* ``ratio``: sum over steps of one term over the sum of another.
* ``formula``: a function of such sums, in `gradiometer.stats_core.derived`.

A term is a column or, with ``*``, a product of columns and scalars of the step.
"""

from gradiometer.stats_core.rows import Scalar, Statistic

__all__ = ["IN_OPTIMIZER_UNITS", "SCALARS", "STATISTICS", "WIRE", "statistic"]

_SQ = "(loss/parameter)²"
_NORM = "loss/parameter"

STATISTICS: tuple[Statistic, ...] = (
    # What one batch says of itself: sums of norms, mean and variance.
    Statistic("count", "n", "examples", "Examples of the batch", "n", "count", "light", ("count",), "batch_examples"),
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
        "sum", "light", ("mean", "m2"),
    ),
    Statistic(
        "variance_trace", "tr Σ", _SQ, "Variance of the examples' gradients, summed over elements (unbiased)",
        "ΣM₂/Σa + P", "sum", "light", ("mean", "m2", "sq_norms", "weights"), "variance_trace",
    ),
    Statistic(
        "batch_variance", "P", _SQ, "Variance of the batch gradient, measured across the examples of the batch",
        "(Σwᵢ²‖gᵢ‖² − s₂‖ḡ‖²)/(1 − s₂)", "sum", "light", ("mean", "m2", "sq_norms", "weights"), "batch_variance",
    ),
    Statistic(
        "grad_sq_norm", "|G|²", _SQ, "Squared norm of the true gradient (unbiased: may be negative)", "‖ḡ‖² − P",
        "sum", "light", ("mean", "m2", "sq_norms", "weights"), "grad_sq_norm",
    ),
    # The examples' norms.
    Statistic(
        "norm_median", "q.50", _NORM, "Median norm of the examples' gradients", "median ‖gᵢ‖",
        "example", "light", ("sq_norms",), "example_norm_median",
    ),
    Statistic(
        "norm_p95", "q.95", _NORM, "95th percentile of the norms of the examples' gradients", "q.95 ‖gᵢ‖",
        "example", "light", ("sq_norms",), "example_norm_p95",
    ),
    Statistic(
        "norm_p99", "q.99", _NORM, "99th percentile of the norms of the examples' gradients", "q.99 ‖gᵢ‖",
        "example", "light", ("sq_norms",),
    ),
    Statistic(
        "norm_max", "max", _NORM, "Largest norm of an example's gradient", "max ‖gᵢ‖",
        "example", "light", ("sq_norms",), "example_norm_max",
    ),
    Statistic(
        "effective_examples", "–", "examples",
        "Effective number of examples that the squared norms come from", "(Σ‖gᵢ‖²)²/Σ‖gᵢ‖⁴",
        "example", "light", ("sq_norms",), "effective_examples",
    ),
    # Element by element, across the examples.
    Statistic(
        "active_elements", "–", "elements", "Elements whose gradient differs between examples", "#{j: σ̂ⱼ > 4ε|ḡⱼ|}",
        "sum", "default", ("mean", "m2"),
    ),
    Statistic(
        "gsnr_sum", "Σr", "ratio", "Gradient signal-to-noise ratios of the active elements, added up (bias-corrected)",
        "Σⱼ[(n−3)/(n−1)·ḡⱼ²/σ̂ⱼ² − 1/n]", "sum", "default", ("mean", "m2"),
    ),
    Statistic(
        "evidence_sum", "–", "ratio", "Evidence criterion of the active elements, added up",
        "Σⱼ[1 − (n−3)/(n−1)·tⱼ²]", "sum", "default", ("mean", "m2"),
    ),
    Statistic(
        "significant_elements", "–", "elements", "Elements whose mean differs from 0 at the 5 % level",
        "#{j: |tⱼ| > t.₉₇₅,ₙ₋₁}", "sum", "default", ("mean", "m2"),
    ),
    # From step to step.
    Statistic(
        "step_variance", "D", _SQ, "Variance of the batch gradient, measured from step to step",
        "½‖ḡ_t − ḡ_{t−1}‖²", "sum", "default", ("mean", "previous"), "step_variance",
    ),
    Statistic(
        "step_variance_expected", "P̃", _SQ, "What step_variance is if only the drawn examples differ",
        "½(P_t + P_{t−1})", "sum", "default", ("m2", "previous"),
    ),
    Statistic(
        "consecutive_dot", "⟨ḡ,ḡ₋⟩", _SQ, "Dot product of the batch gradients of consecutive measured steps",
        "⟨ḡ_t, ḡ_{t−1}⟩", "sum", "default", ("mean", "previous"),
    ),
    # MaxVA through time.
    Statistic(
        "temporal_variance", "s", _SQ, "MaxVA's variance of the gradients through time; inflated by design", "Σs",
        "sum", "default", ("mean", "temporal"), "temporal_variance",
    ),
    Statistic(
        "temporal_variance_prior", "s₋", _SQ, "MaxVA's variance before this step, where a variance exists", "Σs_{t−1}",
        "sum", "default", ("mean", "temporal"),
    ),
    Statistic(
        "deviation_sq", "d²", _SQ, "Squared deviation of the gradient from MaxVA's mean, where a variance exists",
        "Σ(g_t − u_{t−1})²", "sum", "default", ("mean", "temporal"),
    ),
    Statistic(
        "deviation_share", "–", "share", "Share of elements whose deviation ratio is above 1, where MaxVA adapts",
        "mean[d² > s_{t−1}]", "mean", "default", ("mean", "temporal"), "deviation_share_ratio",
    ),
    Statistic(
        "maxva_beta", "β_t", "share", "MaxVA's coefficient, averaged over the layer's elements", "mean β_t",
        "mean", "default", ("mean", "temporal"), "maxva_beta_ratio",
    ),
    Statistic(
        "effective_steps", "n_eff", "steps", "Effective number of steps that MaxVA's moments average (Kish)",
        "mean 1/Q, Q ← (1−q)²Q + q²", "mean", "full", ("mean", "temporal", "kish"), "effective_steps",
    ),
    Statistic(
        "fixed_variance", "s_β", _SQ, "Variance of the gradients through time under one fixed coefficient (unbiased)",
        "Σs/(1 − Q)", "sum", "full", ("mean", "fixed"),
    ),
    # The examples' directions.
    Statistic(
        "parallel_variance", "P∥", _SQ, "Variance of the batch gradient along its own direction",
        "Σ(⟨gᵢ,ḡ⟩ − ‖ḡ‖²)²/(n(n−1)‖ḡ‖²)", "example", "full", ("dots", "mean"),
    ),
    Statistic(
        "example_cosine", "cos", "ratio", "Mean cosine of an example's gradient with the mean of the others'",
        "mean cos(gᵢ, ḡ₋ᵢ)", "example", "full", ("dots", "sq_norms", "mean"), "example_cosine",
    ),
    Statistic(
        "conflicting_share", "–", "share", "Share of examples whose gradient points against the mean of the others'",
        "mean[⟨gᵢ, ḡ₋ᵢ⟩ < 0]", "example", "full", ("dots", "sq_norms"), "conflicting_share_ratio",
    ),
    Statistic(
        "deviation_kurtosis", "κ₄", "ratio", "Kurtosis ratio of the examples' deviations; 1: all are equally far",
        "mean Rᵢ⁴/(mean Rᵢ²)², Rᵢ = ‖gᵢ − ḡ‖", "example", "full", ("dots", "sq_norms", "mean"),
    ),
    # Where the sign is taken.
    Statistic(
        "sign_signal", "–", "elements", "Squared mean of the examples' signs, added up (unbiased)",
        "Σⱼ (n eⱼ² − 1)/(n − 1), e = mean sign gᵢ; 0: a random sign", "sum", "full", ("sign_mean", "m2"),
    ),
    Statistic(
        "sign_noise", "–", "elements", "Variance of the examples' signs, added up (unbiased)",
        "Σⱼ n(1 − eⱼ²)/(n − 1)", "sum", "full", ("sign_mean", "m2"),
    ),
    Statistic(
        "sign_disagreements", "–", "elements", "Active elements where the mean of signs and the mean differ in sign",
        "Σ|sign eⱼ − sign ḡⱼ|/2", "sum", "full", ("sign_mean", "mean", "m2"),
    ),
    # What an optimizer of Adam's family makes of it.
    Statistic(
        "momentum_disagreements", "–", "elements", "Active elements where momentum and batch gradient differ in sign",
        "Σ|sign mⱼ − sign ḡⱼ|/2", "sum", "full", ("mean", "m2", "adam"),
    ),
    Statistic(
        "preconditioned_variance", "tr Σ/P²", "1", "Variance of the examples' gradients in Adam's geometry",
        "Σσ̂ⱼ²/Pⱼ², P = √v̂ + ε before the step", "sum", "full", ("m2", "adam"),
    ),
    Statistic(
        "preconditioned_grad_sq_norm", "|G/P|²", "1", "Squared norm of the true gradient in Adam's geometry (unbiased)",
        "Σ(ḡⱼ² − σ̂ⱼ²/n)/Pⱼ²", "sum", "full", ("mean", "m2", "adam"),
    ),
    Statistic(
        "inverse_root", "1/√v̂", "parameter/loss", "Divisor of Adam's step turned over, averaged over elements",
        "mean 1/(√v̂ + ε)", "mean", "full", ("adam",),
    ),
    Statistic(
        "inverse_root_sq", "1/v̂", "(parameter/loss)²", "Its square, averaged over elements",
        "mean 1/(√v̂ + ε)²", "mean", "full", ("adam",),
    ),
    Statistic(
        "inverse_root_change", "Δ1/√v̂", "parameter/loss", "By how much this step changes it, averaged over elements",
        "mean |1/(√v̂_t + ε) − 1/(√v̂_{t−1} + ε)|", "mean", "full", ("adam",),
    ),
    Statistic(
        "step_size", "|Δθ|", "parameter", "Size of the optimizer's step, averaged over elements",
        "mean |η m̂/(√v̂ + ε)|", "mean", "full", ("adam",), "step_size",
    ),
    # Distributions and single examples.
    Statistic(
        "example_norm", "‖gᵢ‖", _NORM, "Distribution of the norms of the examples' gradients", "‖gᵢ‖",
        "histogram", "full", ("sq_norms",),
    ),
    Statistic(
        "element_deviation_ratio", "d²/s", "ratio", "Distribution of MaxVA's deviation ratio over elements",
        "(g_t − u_{t−1})²/s_{t−1}", "histogram", "full", ("mean", "temporal"),
    ),
    Statistic(
        "element_t_sq", "t²", "ratio", "Distribution of the squared t statistic of the mean over elements",
        "ḡⱼ²/(s₂σ̂ⱼ²)", "histogram", "full", ("mean", "m2"),
    ),
    Statistic(
        "outliers", "–", _SQ, "The examples of the largest gradients, with the user's own ids", "top ‖gᵢ‖²",
        "outliers", None, ("sq_norms",),
    ),
    # Noise scale and signal-to-noise ratio, over a window.
    Statistic(
        "noise_scale", "B_simple", "examples", "Gradient noise scale: noise over signal, in examples", "tr Σ/|G|²",
        "ratio", "light", ("variance_trace", "grad_sq_norm"), "noise_scale_examples", interval=True,
    ),
    Statistic(
        "batch_snr", "SNR", "power ratio", "Signal-to-noise ratio of the batch gradient; 0 is pure noise", "|G|²/P",
        "ratio", "light", ("grad_sq_norm", "batch_variance"), "batch_snr_ratio", interval=True,
    ),
    Statistic(
        "example_snr", "1/B_simple", "power ratio", "Signal-to-noise ratio of one example's gradient", "|G|²/tr Σ",
        "ratio", "light", ("grad_sq_norm", "variance_trace"), interval=True,
    ),
    Statistic(
        "coherence", "α", "ratio", "Share of an example's squared gradient that all examples have in common",
        "|G|²/m₂", "ratio", "light", ("grad_sq_norm", "sq_norm_mean"), "coherence_ratio",
    ),
    Statistic(
        "signal_share", "–", "share", "Share of Adam's second moment that is signal; the rest is example noise",
        "|G|²/‖ḡ‖²", "ratio", "light", ("grad_sq_norm", "mean_sq_norm"), "signal_share_ratio",
    ),
    Statistic(
        "diversity", "Δ", "ratio", "Gradient diversity of the batch; s₂: all alike, 1: orthogonal", "s₂m₂/‖ḡ‖²",
        "ratio", "light", ("sq_norm_mean", "effective_count*mean_sq_norm"), "diversity_ratio",
    ),
    Statistic(
        "norm_test", "ϑ", "ratio", "Norm test: noise of the batch gradient over its norm", "√(P/‖ḡ‖²)",
        "formula", "light", ("batch_variance", "mean_sq_norm"), "norm_test_ratio",
    ),
    Statistic(
        "inner_product_test", "ϑ²", "ratio", "Inner-product test: variance along the batch gradient over its square",
        "P∥/‖ḡ‖²", "ratio", "full", ("parallel_variance", "mean_sq_norm"), "inner_product_test_ratio",
    ),
    Statistic(
        "orthogonality_test", "ν²", "ratio", "Orthogonality test: variance across the batch gradient over its square",
        "(P − P∥)/‖ḡ‖²", "formula", "full", ("batch_variance", "parallel_variance", "mean_sq_norm"),
        "orthogonality_test_ratio",
    ),
    Statistic(
        "doubling_gain", "r₂", "ratio", "AdaScale gain of twice the batch: steps of this batch that one step is worth",
        "(P + |G|²)/(P/2 + |G|²)", "formula", "light", ("batch_variance", "grad_sq_norm"), "doubling_gain_ratio",
    ),
    Statistic(
        "cabs_batch", "B*", "examples", "Batch size of CABS, for SGD without momentum and a loss with floor 0",
        "η·tr Σ/L", "ratio", "light", ("learning_rate*variance_trace", "loss"),
    ),
    Statistic(
        "conditioning", "κ", "ratio", "By how much sums of squares would magnify rounding", "Σwᵢ‖gᵢ‖²/tr Σ",
        "ratio", "light", ("sq_norm_mean", "variance_trace"),
    ),
    Statistic(
        "preconditioned_noise_scale", "φ", "examples", "Gradient noise scale in Adam's geometry",
        "Σσ̂²/P² ÷ Σ(ḡ² − σ̂²/n)/P²", "ratio", "full", ("preconditioned_variance", "preconditioned_grad_sq_norm"),
        "preconditioned_noise_scale_examples",
    ),
    # Elements, over a window.
    Statistic(
        "gsnr", "r", "power ratio", "Gradient signal-to-noise ratio, averaged over active elements (bias-corrected)",
        "mean r̂ⱼ", "ratio", "default", ("gsnr_sum", "active_elements"), "gsnr_ratio",
    ),
    Statistic(
        "evidence", "–", "ratio", "Evidence criterion; above 0 the gradient can't be told from noise",
        "1 − (n−3)/(n−1)·mean tⱼ²", "ratio", "default", ("evidence_sum", "active_elements"), "evidence_ratio",
    ),
    Statistic(
        "significant_share", "–", "share", "Share of active elements whose mean differs from 0; .05 under pure noise",
        "mean[|tⱼ| > t.₉₇₅,ₙ₋₁]", "ratio", "default", ("significant_elements", "active_elements"),
        "significant_share_ratio",
    ),
    Statistic(
        "sign_snr", "–", "power ratio", "Signal-to-noise ratio of the sign of one example's gradient",
        "Σ|E sign|²/ΣVar sign", "ratio", "full", ("sign_signal", "sign_noise"),
    ),
    Statistic(
        "sign_snr_kept", "–", "share", "Share of a weak signal-to-noise ratio left by a sign taken before the mean",
        "sign_snr/gsnr", "formula", "full", ("sign_signal", "sign_noise", "gsnr_sum", "active_elements"),
        "sign_snr_kept_ratio",
    ),
    Statistic(
        "sign_disagreement", "–", "share", "Share of active elements where a sign before the mean says otherwise",
        "mean[sign eⱼ ≠ sign ḡⱼ]", "ratio", "full", ("sign_disagreements", "active_elements"),
    ),
    Statistic(
        "momentum_disagreement", "–", "share", "Share of active elements where a sign before momentum says otherwise",
        "mean[sign mⱼ ≠ sign ḡⱼ]", "ratio", "full", ("momentum_disagreements", "active_elements"),
    ),
    # Through time, over a window.
    Statistic(
        "variance_ratio", "ρ", "ratio", "Step-to-step variance over that across examples; 1: example noise only",
        "ΣD/ΣP̃", "ratio", "default", ("step_variance", "step_variance_expected"), "variance_ratio", interval=True,
    ),
    Statistic(
        "consecutive_cosine", "cos", "ratio", "Cosine of the batch gradients of consecutive measured steps",
        "2⟨ḡ_t,ḡ_{t−1}⟩/(‖ḡ_t‖² + ‖ḡ_{t−1}‖²)", "formula", "default", ("consecutive_dot", "step_variance"),
        "consecutive_cosine",
    ),
    Statistic(
        "deviation_ratio", "R_t", "ratio", "Squared deviation over MaxVA's variance (the paper's form)", "Σd²/Σs_{t−1}",
        "ratio", "default", ("deviation_sq", "temporal_variance_prior"), "deviation_ratio",
    ),
    Statistic(
        "deviation_ratio_measured", "d²/P", "ratio",
        "Squared deviation over the measured variance of the mean; 1.1 to 1.2 with no drift", "Σd²/ΣP",
        "ratio", "default", ("deviation_sq", "batch_variance"), "deviation_measured_ratio",
    ),
    Statistic(
        "drift_ratio", "s_β/D", "ratio", "Variance through time over that from step to step; above 1 the mean moved",
        "Σs_β/ΣD", "ratio", "full", ("fixed_variance", "step_variance"), "drift_ratio",
    ),
    Statistic(
        "inflation", "s/s_β", "ratio", "MaxVA's variance over that of a fixed coefficient; 2.7 to 5.7 on normal noise",
        "Σs/Σs_β", "ratio", "full", ("temporal_variance", "fixed_variance"), "inflation_ratio",
    ),
    Statistic(
        "inverse_root_spread", "–", "ratio", "Spread of 1/√v̂ over elements and steps: standard deviation over mean",
        "√(mean x²/(mean x)² − 1)", "formula", "full", ("inverse_root_sq", "inverse_root"),
        "inverse_root_spread_ratio",
    ),
    Statistic(
        "preconditioner_change", "–", "share", "Relative change of 1/√v̂ in one step",
        "mean|Δ1/√v̂|/mean 1/√v̂", "ratio", "full", ("inverse_root_change", "inverse_root"),
        "preconditioner_change_ratio",
    ),
)  # fmt: skip

SCALARS: tuple[Scalar, ...] = (
    Scalar("loss", "loss", "Training loss, as logged by the user", "loss"),
    Scalar("learning_rate", "1", "Learning rate of the first parameter group", "learning_rate_ratio"),
    Scalar("tokens", "tokens", "Tokens in the logical batch, as logged by the user"),
    Scalar("examples", "examples", "Examples in the logical batch", "examples"),
    Scalar("grad_norm", "loss/parameter", "Norm of the gradient that the optimizer was given", "grad_norm"),
    Scalar("clip_factor", "ratio", "Norm of the gradient that the optimizer was given over its norm before clipping"),
    Scalar("loss_scale", "ratio", "Factor that the loss was multiplied by before the backward pass"),
    Scalar("skipped", "0 or 1", "1 where the optimizer's step was skipped"),
    Scalar("gradient_scale", "ratio",
           "Squared norm of the gradient the optimizer saw over that of the measured mean; what MaxVA's columns are in",
           "gradient_scale_ratio"),
    Scalar("clock_steps", "steps", "Steps since the measured step before this one", "clock_steps"),
    Scalar("overhead_seconds", "seconds", "Time that measuring took on the training thread", "overhead_seconds"),
    Scalar("dropped_steps", "steps", "Measured steps that the publisher has dropped in this run", "dropped_steps"),
    Scalar("moments_missing", "parameters", "Parameters that a per-example optimizer found no Moments for"),
    Scalar("unit_exponent", "1", "Columns travel in units of 2^this for each power of a gradient; readers undo it"),
    Scalar("radam_length", "steps", "RAdam's ρ_t: length of the simple average that its second moment is like",
           "radam_length_steps"),
    Scalar("radam_rectification", "ratio", "RAdam's r_t; 0 where its step is momentum", "radam_rectification_ratio"),
    Scalar("radam_rectified", "0 or 1", "1 where RAdam's step is adaptive", "radam_rectified"),
    Scalar("radam_multiplier", "ratio", "What RAdam's adaptive step is multiplied by: r_t√(1 − β₂ᵗ)"),
    *(
        Scalar(row.name, row.unit, f"{row.help}, of the whole model")
        for row in STATISTICS if row.kind == "example"
    ),
)  # fmt: skip

IN_OPTIMIZER_UNITS = frozenset(
    row.name for row in STATISTICS if row.name.startswith(("temporal_variance", "deviation_sq", "inverse_root"))
)
"""What is in the units of the gradient that the optimizer saw, where the temporal state is the optimizer's own."""

_BY_NAME = {row.name: row for row in STATISTICS}
WIRE: tuple[Statistic, ...] = tuple(row for row in STATISTICS if row.kind in ("sum", "mean", "count", "example"))
"""The rows that travel as columns."""


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
