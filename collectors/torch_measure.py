"""One measured step's numbers, formed on the device just before the optimizer changes anything."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.collectors.torch_batch import LogicalBatch
from gradiometer.collectors.torch_handover import StepNumbers, step_numbers
from gradiometer.collectors.torch_layers import LayerParameters, coverage_of, layers_of
from gradiometer.collectors.torch_memory import OwnMemory
from gradiometer.collectors.torch_reporter import Reporter
from gradiometer.collectors.torch_rules import Plan
from gradiometer.collectors.torch_state import OptimizerState
from gradiometer.stats_core import maxva, selection
from gradiometer.stats_core.arrays import Array, square_sum, widened
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.summary import parameter_sums

__all__ = ["StepMeasurer"]


class StepMeasurer:
    """Forms the catalogue's columns and the step's scalars, and registers the run at the first of them.

    Args:
        model: the model.
        optimizer: its optimizer, or None.
        plan: what can be measured.
        reporter: where the run is registered.
        tier: tier of the statistics.
        own: the collector's own memory through time, or None where none is kept.
        optimizer_state: reader of the optimizer's MaxVA state, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        plan: Plan,
        reporter: Reporter,
        *,
        tier: selection.Statistics,
        own: OwnMemory | None,
        optimizer_state: OptimizerState | None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._plan = plan
        self._reporter = reporter
        self._names = selection.columns(tier)
        self._own = own
        self._optimizer_state = optimizer_state
        self._layers: list[LayerParameters] = []
        self._uncovered: set[str] = set()
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
        sums = {parameter: parameter_sums(its_moments) for parameter, its_moments in moments.items()}
        if not skipped:
            self._add_through_time(moments, sums, with_optimizer=with_optimizer)
        numbers = step_numbers(step, time.time_ns(), self._layers, self._names, moments, sums)
        numbers.scalars.update(self._scalars(batch, moments, skipped=skipped))
        if self._last_step is not None:
            numbers.scalars["clock_steps"] = step - self._last_step
        self._last_step = step
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """What is kept through time."""
        own = {"previous": {}, "temporal": {}} if self._own is None else self._own.state_dict()
        return {"last_step": self._last_step, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if self._own is not None:
            self._own.load_state_dict(state)
        self._last_step = state["last_step"]

    def _add_through_time(
        self,
        moments: Mapping[nn.Parameter, Moments],
        sums: dict[nn.Parameter, dict[str, Array]],
        *,
        with_optimizer: bool,
    ) -> None:
        if self._own is not None:
            for parameter, its_moments in moments.items():
                sums[parameter].update(self._own.feed(parameter, its_moments, sums[parameter]))
        if self._optimizer_state is not None and with_optimizer:
            for parameter, found in self._optimizer_state.sums(moments).items():
                if parameter in sums:
                    sums[parameter].update(found)

    def _scalars(
        self, batch: LogicalBatch, moments: Mapping[nn.Parameter, Moments], *, skipped: bool
    ) -> dict[str, Any]:
        scalars: dict[str, Any] = {"examples": batch.examples, "skipped": int(skipped)}
        if self._optimizer is not None:
            scalars["learning_rate"] = self._optimizer.param_groups[0].get("lr", math.nan)
        grads = {
            parameter: widened(parameter.grad)
            for parameter in self._plan.names
            if parameter.grad is not None and not parameter.grad.is_sparse
        }
        if skipped or not grads:
            return scalars
        total: Tensor = sum(square_sum(grad) for grad in grads.values())
        scalars["grad_norm"] = total.sqrt()
        both = [parameter for parameter in grads if parameter in moments]
        if both:
            means = [moments[parameter].mean for parameter in both]
            scalars["gradient_scale"] = maxva.gradient_scale([grads[parameter] for parameter in both], means)
        return scalars

    def _register(self, batch: LogicalBatch, moments: Mapping[nn.Parameter, Moments]) -> None:
        """Register the run with the first step; later, say where the coverage has changed."""
        missing = {parameter: reason for parameter, reason in batch.missing.items() if parameter not in moments}
        uncovered = {self._plan.names[parameter] for parameter in missing}
        if self._reporter.is_open:
            if uncovered != self._uncovered:
                text = "; ".join(f"{self._plan.names[p]}: {reason}" for p, reason in missing.items())
                self._reporter.event("coverage", text or "all parameters are measured")
        else:
            self._layers = layers_of(self._model, [p for p in self._plan.names if p not in self._plan.refused])
            run = self._reporter.run
            del run.layers[:]
            run.layers.extend(layer.message for layer in self._layers)
            run.coverage.CopyFrom(coverage_of(self._model, self._plan.names, missing))
            run.loss.accumulation = batch.passes
            run.config["batch_size"] = str(batch.examples)
            self._reporter.open(len(self._names) * len(self._layers))
        self._uncovered = uncovered
