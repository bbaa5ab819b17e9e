"""A short report of one run, from what is stored: what the numbers were, layer by layer, and what they mean."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradiometer.protos.batch_pb2 import StepBatch
from gradiometer.protos.columns import column_arrays, scalar_arrays
from gradiometer.protos.query_pb2 import RunStatus
from gradiometer.stats_core import catalog
from gradiometer.stats_core.errors import PeerFault
from gradiometer.stats_core.window import across_layers, windowed

__all__ = ["LAYER_STATISTICS", "RunReport", "layer_table", "render", "report"]

LAYER_STATISTICS = (
    "batch_variance",
    "step_variance",
    "temporal_variance",
    "variance_ratio",
    "batch_snr",
    "deviation_ratio",
    "noise_scale",
)


_HEADINGS = {
    "batch_variance": "across\nexamples",
    "step_variance": "step\nto step",
    "temporal_variance": "MaxVA's\ns",
    "variance_ratio": "ρ",
    "batch_snr": "SNR",
    "deviation_ratio": "R_t",
    "noise_scale": "noise\nscale",
}


class Reader(Protocol):
    """What a report needs of a store, local or remote."""

    def list_runs(self) -> list[RunStatus]:
        """The runs, newest first."""
        ...

    def read(self, run_id: str, *, limit: int | None = None) -> Iterable[StepBatch]:
        """Steps of a run, ascending, in parts."""
        ...


@dataclass(frozen=True)
class RunReport:
    """One run in numbers.

    Attributes:
        status: the run as registered, and how far it is.
        steps: step numbers, shape ``(steps,)``.
        columns: catalogue name → values, shape ``(steps, layers)``.
        scalars: scalar name → values, shape ``(steps,)``; NaN where a step has none.
        sizes: elements of each layer, shape ``(layers,)``.
    """

    status: RunStatus
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    scalars: dict[str, np.ndarray]
    sizes: np.ndarray

    @classmethod
    def from_batches(cls, status: RunStatus, batches: Iterable[StepBatch]) -> "RunReport":
        """Put the parts together; columns that some parts lack are NaN there."""
        parts = [batch for batch in batches if batch.steps]
        num_layers = len(status.run.layers)

        def joined(arrays: Sequence[dict[str, np.ndarray]], width: tuple[int, ...]) -> dict[str, np.ndarray]:
            names = {name for part in arrays for name in part}
            return {
                name: np.concatenate(
                    [
                        part.get(name, np.full((len(batch.steps), *width), np.nan))
                        for part, batch in zip(arrays, parts, strict=True)
                    ]
                )
                for name in sorted(names)
            }

        columns = joined([column_arrays(batch) for batch in parts], (num_layers,))
        absent = np.full((sum(len(batch.steps) for batch in parts), num_layers), np.nan)
        return cls(
            status=status,
            steps=np.array([step for batch in parts for step in batch.steps], np.int64),
            columns={row.name: columns.get(row.name, absent) for row in catalog.WIRE},
            scalars=joined([scalar_arrays(batch) for batch in parts], ()),
            sizes=np.array([layer.num_params for layer in status.run.layers], np.float64),
        )

    def last(self, count: int) -> "RunReport":
        """The same run, its last ``count`` measured steps alone."""
        return RunReport(
            self.status,
            self.steps[-count:],
            {name: values[-count:] for name, values in self.columns.items()},
            {name: values[-count:] for name, values in self.scalars.items()},
            self.sizes,
        )

    def layers(self, name: str) -> np.ndarray:
        """One statistic over all steps held here, shape ``(layers,)``: ratios are those of sums."""
        return np.asarray(windowed(name, self.columns, self._gradient_scale()))

    def model(self, name: str) -> float:
        """The same for the whole model."""
        return across_layers(name, self.columns, self.sizes, self._gradient_scale())

    def _gradient_scale(self) -> np.ndarray | None:
        return self.scalars.get("gradient_scale") if self.status.run.temporal == "optimizer" else None


def report(reader: Reader, run_id: str | None = None) -> list[RunReport]:
    """Reports of one run, or of all that the store holds, newest first.

    Raises:
        PeerFault: if there is no such run; the message lists those there are.
    """
    found = reader.list_runs()
    if run_id is not None and not found:
        raise PeerFault(
            f"report needs a stored run, got run={run_id!r} of a store that holds no runs yet; "
            "attach a training job with gm.attach(model, optimizer), or try `gradiometer demo`",
            status="NOT_FOUND",
        )
    if run_id is not None:
        known = [status.run.run_id for status in found]
        found = [status for status in found if status.run.run_id == run_id]
        if not found:
            raise PeerFault(
                f"report needs run in {known}, got run={run_id!r}; `gradiometer runs` lists them", status="NOT_FOUND"
            )
    return [RunReport.from_batches(status, reader.read(status.run.run_id)) for status in found]


def number(value: float) -> str:
    """A number as a person reads it: three digits; a missing one is a dash, never 0."""
    if not np.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def noise_scale_text(value: float) -> str:
    """The noise scale, or that it is not resolved, where |G|² is estimated at 0 or below."""
    return "unresolved" if np.isfinite(value) and value <= 0 else number(value)


def layer_table(run: RunReport, *, most: int = 40) -> Table:
    """A table of the layers: three variances of the batch gradient side by side, and what follows from them."""
    values = {name: run.layers(name) for name in LAYER_STATISTICS}
    names = [layer.name for layer in run.status.run.layers]
    order = range(len(names)) if len(names) <= most else np.argsort(-np.nan_to_num(values["batch_variance"]))[:most]
    cells = {
        name: [*(_cell(name, float(values[name][index])) for index in order), _cell(name, run.model(name))]
        for name in LAYER_STATISTICS
    }
    table = Table(header_style="bold", pad_edge=False, box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for name, texts in cells.items():  # a narrow terminal may cut a layer's name, never a number
        heading = _HEADINGS[name]
        width = max(map(len, [*heading.splitlines(), *texts]))
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    *rows, model = zip(*cells.values(), strict=True)
    for index, row in zip(order, rows, strict=True):
        table.add_row(_short(names[index]), *row)
    table.add_row()
    table.add_row("whole model", *model, style="bold")
    if len(names) > most:
        table.caption = f"{most} of {len(names)} layers, those of the largest variance"
    return table


def _short(layer: str, most: int = 24) -> str:
    """The end of a long layer name: it tells layers apart."""
    return layer if len(layer) <= most else "…" + layer[1 - most :]


def _cell(name: str, value: float) -> str:
    return noise_scale_text(value) if name == "noise_scale" else number(value)


def render(run: RunReport, *, window: int = 64) -> RenderableType:
    """The report as text for a terminal: facts, the layers over the last steps, and what they mean."""
    spec, recent = run.status.run, run.last(window)
    facts = Table.grid(padding=(0, 2))
    for label, text in _facts(run):
        facts.add_row(Text(label, style="dim"), text)
    table = layer_table(recent)
    over = Text(
        f"variance of the batch gradient three ways, over the last {len(recent.steps)} measured steps", style="dim"
    )
    return Group(
        Text(spec.run_id, style="bold"), facts, Text(), over, table, Text(), *map(Text, _meaning(recent)), Text()
    )


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
    scale, snr, rho = (recent.model(name) for name in ("noise_scale", "batch_snr", "variance_ratio"))
    if np.isfinite(snr):
        if snr <= 0:
            yield f"SNR {number(snr)}: in a batch of {batch:.0f} the gradient can't be told from noise."
        else:
            side = "more noise than signal" if snr < 1 else "more signal than noise"
            yield f"SNR {number(snr)}: a batch of {batch:.0f} carries {side} (noise scale {number(scale)} examples)."
    if np.isfinite(rho):
        meaning = (
            "the step-to-step variance is what the drawn examples explain"
            if 0.9 <= rho <= 1.1
            else "the gradient moves more from step to step than the drawn examples explain"
            if rho > 1
            else "consecutive batches differ less than independently drawn examples would"
        )
        yield f"ρ {number(rho)}: {meaning}."
    inflation = recent.model("temporal_variance") / recent.model("batch_variance")
    if np.isfinite(inflation):
        yield f"MaxVA's s is {number(inflation)} times the variance across examples; it is inflated by design."
