"""One measured step's numbers, formed on the device just before the optimizer changes anything."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.collectors.torch_batch import LogicalBatch
from gradiometer.collectors.torch_handover import StepNumbers
from gradiometer.collectors.torch_layers import LayerParameters, coverage_of, layers_of
from gradiometer.collectors.torch_memory import OwnMemory
from gradiometer.collectors.torch_reporter import Reporter
from gradiometer.collectors.torch_rules import Plan
from gradiometer.collectors.torch_state import AdamState, OptimizerState
from gradiometer.stats_core import maxva
from gradiometer.stats_core.arrays import Array, square_sum, widened
from gradiometer.stats_core.elements import t_squares
from gradiometer.stats_core.histogram import Sketch, sketch_fixed
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.selection import Selection
from gradiometer.stats_core.summary import Part, Summary, batch_sums, summarized

__all__ = ["StepMeasurer"]


class StepMeasurer:
    """Forms the catalogue's columns and the step's scalars, and registers the run at the first of them.

    Args:
        model: the model.
        optimizer: its optimizer, or None.
        plan: what can be measured.
        reporter: where the run is registered.
        wanted: what is measured.
        own: the collector's own memory through time, or None where none is kept.
        optimizer_state: reader of the optimizer's MaxVA state, or None.
        adam: reader of the state of an optimizer of Adam's family, or None where it is not asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        plan: Plan,
        reporter: Reporter,
        *,
        wanted: Selection,
        own: OwnMemory | None,
        optimizer_state: OptimizerState | None,
        adam: AdamState | None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._plan = plan
        self._reporter = reporter
        self._wanted = wanted
        self._own = own
        self._optimizer_state = optimizer_state
        self._adam = adam
        self._layers: list[LayerParameters] = []
        self._uncovered: set[str] = set()
        self._frozen = [parameter for parameter in model.parameters() if parameter not in plan.names]
        self._last_step: int | None = None

    def measure(
        self, step: int, batch: LogicalBatch, *, with_optimizer: bool, skipped: bool = False
    ) -> StepNumbers | None:
        """The numbers of one step; None where nobody wants them.

        Args:
            step: number of the optimizer step.
            batch: its Moments.
            with_optimizer: True just before the optimizer's step, when its state is still that of the step before.
            skipped: True where the optimizer made no step: what is kept through time does not move.
        """
        if not self._reporter.is_wanted:
            return None
        moments = batch.all()
        self._register(batch, moments)
        squares = {} if skipped else self._grad_squares()
        scalars: dict[str, Any] = {"examples": batch.examples, "skipped": int(skipped)}
        if self._optimizer is not None:
            scalars["learning_rate"] = self._optimizer.param_groups[0].get("lr", math.nan)
        loss_scale = getattr(self._optimizer, "grad_scale", None)  # set by GradScaler on optimizers that divide by it
        divisor = 1.0 if loss_scale is None else loss_scale
        if (found_inf := getattr(self._optimizer, "found_inf", None)) is not None:  # such a step is made of nothing
            scalars["skipped"] = found_inf.reshape(())
        if squares:
            scalars["grad_norm"] = torch.stack([*squares.values()]).sum().sqrt() / divisor
        places = [at for at, layer in enumerate(self._layers) if all(p in moments for p in layer.parameters)]
        layers = [self._layers[at].parameters for at in places]
        in_order = list(dict.fromkeys([*itertools.chain(*layers), *moments]))
        summary = Summary(0, {})
        if in_order:
            of_batch = batch_sums([moments[parameter] for parameter in in_order], self._wanted)
            scale = _gradient_scale(squares, moments, dict(zip(in_order, of_batch["mean_sq_norm"], strict=True)))
            if scale is not None:
                scalars["gradient_scale"] = scale
                if loss_scale is not None:  # where there is no ratio it stays 1
                    is_known = (scalars["grad_norm"] > 0) & torch.isfinite(scalars["grad_norm"])
                    scalars["gradient_scale"] = torch.where(is_known, scale / divisor / divisor, scale)
            added = {} if skipped else self._added(moments, in_order, of_batch, scale, with_optimizer=with_optimizer)
            parts = [[self._part(p, moments[p], *added.get(p, ({}, {}))) for p in parameters] for parameters in layers]
            if parts:
                first = {name: values[: sum(map(len, layers))] for name, values in of_batch.items()}
                summary = summarized(parts, first, self._wanted)
        if self._adam is not None and with_optimizer and not skipped:
            scalars.update(self._adam.radam_scalars())
        if self._last_step is not None:
            scalars["clock_steps"] = step - self._last_step
        self._last_step = step
        return StepNumbers(step, time.time_ns(), summary, places, scalars, batch.ids)

    def state_dict(self) -> dict[str, Any]:
        """What is kept through time."""
        own = {"previous": {}, "temporal": {}} if self._own is None else self._own.state_dict()
        return {"last_step": self._last_step, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if self._own is not None:
            self._own.load_state_dict(state)
        self._last_step = state["last_step"]

    def _added(
        self,
        moments: Mapping[nn.Parameter, Moments],
        in_order: Sequence[nn.Parameter],
        of_batch: Mapping[str, Array],
        scale: Array | None,
        *,
        with_optimizer: bool,
    ) -> dict[nn.Parameter, tuple[dict[str, Array], dict[str, Sketch]]]:
        """What earlier steps and the optimizer's state have to say: sums and sketches by parameter."""
        seen = None
        if self._optimizer_state is not None and with_optimizer:
            seen = self._optimizer_state.reading(moments)
        added: dict[nn.Parameter, tuple[dict[str, Array], dict[str, Sketch]]] = {}
        if self._own is not None:
            for at, parameter in enumerate(in_order):
                its_batch = {name: of_batch[name][at] for name in ("batch_variance", "mean_sq_norm")}
                rule = None if seen is None else seen(parameter)
                added[parameter] = self._own.feed(parameter, moments[parameter], its_batch, rule)
        if self._adam is not None and with_optimizer:
            for parameter, sums in self._adam.sums(moments, 1.0 if scale is None else scale).items():
                added.setdefault(parameter, ({}, {}))[0].update(sums)
        return added

    def _part(
        self, parameter: nn.Parameter, moments: Moments, sums: dict[str, Array], sketches: dict[str, Sketch]
    ) -> Part:
        """A parameter's share of its layer."""
        if "element_t_sq" in self._wanted.sketches:
            sketches["element_t_sq"] = sketch_fixed(t_squares(moments))
        return Part(moments, parameter.numel(), sums, sketches)

    def _grad_squares(self) -> dict[nn.Parameter, Tensor]:
        """Squared norm of each gradient as the optimizer is handed it."""
        return {
            parameter: square_sum(widened(parameter.grad))
            for parameter in self._plan.names
            if parameter.grad is not None and not parameter.grad.is_sparse
        }

    def _register(self, batch: LogicalBatch, moments: Mapping[nn.Parameter, Moments]) -> None:
        """Register the run with the first step; later, say where the coverage has changed."""
        missing = {parameter: reason for parameter, reason in batch.missing.items() if parameter not in moments}
        reasons = {self._plan.names[parameter]: reason for parameter, reason in missing.items()}
        if any(parameter.requires_grad for parameter in self._frozen):
            found = coverage_of(self._model, self._plan.names, missing)
            reasons |= {uncovered.parameter: uncovered.reason for uncovered in found.uncovered}
        if self._reporter.is_open:
            if reasons.keys() != self._uncovered:
                text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
                self._reporter.event("coverage", text or "all parameters are measured")
        else:
            self._layers = layers_of(self._model, [p for p in self._plan.names if p not in self._plan.refused])
            run = self._reporter.run
            del run.layers[:]
            run.layers.extend(layer.message for layer in self._layers)
            run.coverage.CopyFrom(coverage_of(self._model, self._plan.names, missing))
            run.loss.accumulation = batch.passes
            run.config["batch_size"] = str(batch.examples)
            self._reporter.open(self._wanted)
        self._uncovered = set(reasons)


def _gradient_scale(
    squares: Mapping[nn.Parameter, Tensor],
    moments: Mapping[nn.Parameter, Moments],
    of_means: Mapping[nn.Parameter, Array],
) -> Tensor | None:
    """As `maxva.gradient_scale`, from squared norms that were formed already, where they have room for any scale."""
    both = [parameter for parameter in squares if parameter in of_means]
    if not both:
        return None
    seen = torch.stack([squares[parameter] for parameter in both]).sum()
    if seen.dtype != torch.float64:
        means = [moments[parameter].mean for parameter in both]
        scale: Tensor = maxva.gradient_scale([widened(parameter.grad) for parameter in both], means)
        return scale
    measured = torch.stack([of_means[parameter] for parameter in both]).sum()
    scale = seen / measured
    return torch.where((measured > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
