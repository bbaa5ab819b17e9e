"""A report as text for a terminal: what the numbers of a run were, layer by layer, and what they mean."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradiometer.server.report import RunReport
from gradiometer.stats_core.intervals import Interval
from gradiometer.stats_core.tails import Tail

__all__ = [
    "LAYER_STATISTICS",
    "distribution_table",
    "interval_text",
    "largest_table",
    "layer_table",
    "noise_scale_text",
    "number",
    "render",
    "signal_table",
]

LAYER_STATISTICS = (
    "batch_variance",
    "step_variance",
    "temporal_variance",
    "variance_ratio",
    "batch_snr",
    "deviation_ratio",
    "noise_scale",
)


SIGNAL_STATISTICS = (
    "significant_share",
    "gsnr",
    "consecutive_cosine",
    "effective_examples",
    "norm_median",
    "norm_p99",
)

_HEADINGS = {
    "batch_variance": "across\nexamples",
    "step_variance": "step\nto step",
    "temporal_variance": "MaxVA's\ns",
    "variance_ratio": "ρ",
    "batch_snr": "SNR",
    "deviation_ratio": "R_t",
    "noise_scale": "noise\nscale",
    "significant_share": "significant\nelements",
    "gsnr": "GSNR",
    "consecutive_cosine": "cosine,\nlast step",
    "effective_examples": "effective\nexamples",
    "norm_median": "median\nnorm",
    "norm_p99": "p99\nnorm",
}
_DEVIATION = "element_deviation_ratio"


def number(value: float) -> str:
    """A number as a person reads it: three digits; a missing one is a dash, never 0."""
    if not np.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def noise_scale_text(value: float, high: float = math.nan) -> str:
    """The noise scale, or that it is not resolved: |G|² is estimated at 0 or below, or its interval has no upper end.

    Args:
        value: the estimate.
        high: upper end of its interval; NaN for none.
    """
    return "unresolved" if np.isfinite(value) and (value <= 0 or math.isinf(high)) else number(value)


def interval_text(found: Interval) -> str:
    """A 95 % interval; empty where there is none.

    Example:
        >>> interval_text(Interval(1.04, 1.21)), interval_text(Interval(68.2, math.inf))
        ('1.04 to 1.21', 'above 68.2')
    """
    if not math.isfinite(found.low) or math.isnan(found.high):
        return ""
    return f"{number(found.low)} to {number(found.high)}" if math.isfinite(found.high) else f"above {number(found.low)}"


def layer_table(run: RunReport, *, most: int = 40) -> Table:
    """A table of the layers: three variances of the batch gradient side by side, and what follows from them."""
    values = {name: run.layers(name) for name in LAYER_STATISTICS}
    highs = run.layers_interval("noise_scale").high
    model_high = run.model_interval("noise_scale").high
    names = [layer.name for layer in run.status.run.layers]
    order = _shown(run, most)
    cells = {
        _HEADINGS[name]: [
            *(_cell(name, float(values[name][index]), float(highs[index])) for index in order),
            _cell(name, run.model(name), model_high),
        ]
        for name in LAYER_STATISTICS
    }
    table = _table([names[index] for index in order], cells)
    if len(names) > most:
        table.caption = f"{most} of {len(names)} layers, those of the largest variance"
    return table


def signal_table(run: RunReport, *, most: int = 40) -> Table | None:
    """What the elements and the examples of each layer say; None where the run has none of it."""
    values = {name: run.layers(name) for name in SIGNAL_STATISTICS}
    if all(np.isnan(found).all() for found in values.values()):
        return None
    order = _shown(run, most)
    cells = {
        _HEADINGS[name]: [*(_cell(name, float(values[name][index])) for index in order), _cell(name, run.model(name))]
        for name in SIGNAL_STATISTICS
    }
    return _table([run.status.run.layers[index].name for index in order], cells)


def distribution_table(run: RunReport, *, most: int = 40) -> Table | None:
    """Quantiles of MaxVA's deviation ratio and the tail of the examples' norms; None where the run has neither."""
    found, order = run.distributions, _shown(run, most)
    cells: dict[str, list[str]] = {}
    if _DEVIATION in found.names:
        counted = [*(found.layer(_DEVIATION, index) for index in order), found.model(_DEVIATION)]
        for q in (0.5, 0.9, 0.99):
            cells[f"R_t\np{100 * q:.0f}"] = [number(one.quantile(q)) for one in counted]
    if "example_norm" in found.names:
        tails = [found.tail(index) for index in order]
        cells["tail index\nof norms"] = [*(_tail_text(tail) for tail in tails), number(math.nan)]
    return _table([run.status.run.layers[index].name for index in order], cells) if cells else None


def largest_table(run: RunReport, *, most: int = 5) -> Table | None:
    """The examples of the largest gradients; None where the run names none."""
    found = run.distributions.largest(most)
    if not found:
        return None
    table = Table(header_style="bold", pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("example", overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("norm", justify="right", no_wrap=True)
    for example in found:
        norm = number(example.norm) if math.isfinite(example.norm) else "not finite"
        table.add_row(Text(example.example_id), f"{example.step:,}", norm)
    return table


def _shown(run: RunReport, most: int) -> list[int]:
    """Indices of the layers that a table shows: all, or those of the largest variance."""
    number_of_layers = len(run.status.run.layers)
    if number_of_layers <= most:
        return list(range(number_of_layers))
    return [int(index) for index in np.argsort(-np.nan_to_num(run.layers("batch_variance")))[:most]]


def _table(layers: Sequence[str], cells: Mapping[str, Sequence[str]]) -> Table:
    """A row a layer, then one of the whole model; a narrow terminal may cut a layer's name, never a number."""
    table = Table(header_style="bold", pad_edge=False, box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for heading, texts in cells.items():
        width = max(map(len, [*heading.splitlines(), *texts]))
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    *rows, model = zip(*cells.values(), strict=True)
    for layer, row in zip(layers, rows, strict=True):
        table.add_row(_short(layer), *row)
    table.add_row()
    table.add_row("whole model", *model, style="bold")
    return table


def _short(layer: str, most: int = 24) -> str:
    """The end of a long layer name: it tells layers apart."""
    return layer if len(layer) <= most else "…" + layer[1 - most :]


def _cell(name: str, value: float, high: float = math.nan) -> str:
    if name == "noise_scale":
        return noise_scale_text(value, high)
    return number(100 * value) + " %" if name == "significant_share" and np.isfinite(value) else number(value)


def _tail_text(tail: Tail | None) -> str:
    return number(math.nan) if tail is None else f"{tail.alpha:.2g} ± {tail.standard_error:.1g}"


def render(run: RunReport, *, window: int = 64) -> RenderableType:
    """The report as text for a terminal: facts, the layers over the last steps, and what they mean."""
    spec, recent = run.status.run, run.last(window)
    facts = Table.grid(padding=(0, 2))
    for label, text in _facts(run):
        facts.add_row(Text(label, style="dim"), text)
    over = f"over the last {len(recent.steps)} measured steps"
    tables = {
        f"variance of the batch gradient three ways, {over}": layer_table(recent),
        f"what elements and examples say, {over}": signal_table(recent),
        f"distributions, {over}": distribution_table(recent),
        f"the largest gradients of single examples, {over}": largest_table(recent),
    }
    shown = [part for title, table in tables.items() if table for part in (Text(title, style="dim"), table, Text())]
    return Group(Text(spec.run_id, style="bold"), facts, Text(), *shown, *map(Text, _meaning(recent)), Text())


def _facts(run: RunReport) -> Iterable[tuple[str, str]]:
    spec = run.status.run
    yield "framework", f"{spec.world.framework} {spec.world.framework_version}, {spec.engine} engine"
    yield "optimizer", f"{spec.optimizer or 'unknown'}; temporal moments: {spec.temporal or 'none'}"
    covered, total = spec.coverage.num_params_measured, spec.coverage.num_params
    if total:
        left = ", ".join(item.parameter for item in spec.coverage.uncovered)
        yield (
            "measured",
            f"{covered:,} of {total:,} parameters ({covered / total:.1%})" + (f"; not: {left}" if left else ""),
        )
    if len(run.steps):
        yield "steps", f"{len(run.steps):,} measured, {run.steps[0]:,} to {run.steps[-1]:,}"
    loss = run.scalars.get("loss", np.array([]))
    loss = loss[np.isfinite(loss)]
    if len(loss):
        head, tail = loss[: max(1, len(loss) // 20)], loss[-max(1, len(loss) // 20) :]
        yield "loss", f"{head.mean():.4g} → {tail.mean():.4g} (means of the first and last {len(head)} steps)"
    dropped = run.scalars.get("dropped_steps", np.array([np.nan]))
    if np.nanmax(dropped, initial=0) > 0:
        yield "dropped", f"{np.nanmax(dropped):.0f} measured steps never reached the server"
    broken = float(np.nansum(run.columns["nonfinite_examples"].max(axis=1, initial=0)))
    if broken:
        yield "not finite", f"{broken:.0f} examples had a NaN or an infinity in their gradient"


def _meaning(recent: RunReport) -> Iterable[str]:
    batch = recent.model("count")
    snr, rho, share = (recent.model(name) for name in ("batch_snr", "variance_ratio", "significant_share"))
    if np.isfinite(snr):
        around = recent.model_interval("batch_snr")
        if snr <= 0 or around.low <= 0:
            yield f"{_said('SNR', snr, around)}: in a batch of {batch:.0f} the gradient can't be told from noise."
        else:
            side = "more noise than signal" if snr < 1 else "more signal than noise"
            if around.low <= 1 <= around.high:
                side = "about as much signal as noise"
            yield f"{_said('SNR', snr, around)}: a batch of {batch:.0f} carries {side} ({_noise_scale(recent)})."
    if np.isfinite(rho):
        around = recent.model_interval("variance_ratio")
        within = around.low <= 1 <= around.high if around.is_resolved else 0.9 <= rho <= 1.1
        meaning = (
            "the step-to-step variance is what the drawn examples explain"
            if within
            else "the gradient moves more from step to step than the drawn examples explain"
            if rho > 1
            else "consecutive batches differ less than independently drawn examples would"
        )
        yield f"{_said('ρ', rho, around)}: {meaning}."
    if np.isfinite(share):
        yield f"The mean of {share:.1%} of the elements differs from 0 at the 5 % level; of pure noise 5 % would."
    effective, median = recent.model("effective_examples"), recent.model("norm_median")
    if np.isfinite(effective):
        yield (
            f"Squared norms are spread as over {effective:.0f} of {batch:.0f} examples; "
            f"norms: median {number(median)}, largest {number(recent.model('norm_max'))}."
        )
    across = recent.model("batch_variance")
    inflation = recent.model("temporal_variance") / across if across > 0 else np.nan
    if np.isfinite(inflation):
        yield f"MaxVA's s is {number(inflation)} times the variance across examples; it is inflated by design."


def _said(symbol: str, value: float, around: Interval) -> str:
    ends = interval_text(around)
    return f"{symbol} {number(value)}" + (f" (95 %: {ends})" if ends else "")


def _noise_scale(recent: RunReport) -> str:
    value, around = recent.model("noise_scale"), recent.model_interval("noise_scale")
    ends = interval_text(around)
    if math.isinf(around.high):
        return f"noise scale not resolved, {ends} examples" if ends else "noise scale not resolved"
    return f"noise scale {number(value)} examples" + (f", 95 %: {ends}" if ends else "")
