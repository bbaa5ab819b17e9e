"""Follows the user's forward passes, backward passes and optimizer steps, and closes each step's account.

Steps. A step begins with the first forward pass after the last one closed, and closes in the optimizer's post
hook; without an optimizer, after so many backward passes. All hooks are guarded: an exception of ours turns the
collector off and is logged once, and the user's step goes on as if nothing had happened.
"""

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from gradiometer.collectors.cadence import Cadence
from gradiometer.collectors.torch_autograd import Hook, in_backward, is_transformed
from gradiometer.collectors.torch_batch import LogicalBatch
from gradiometer.collectors.torch_check import FirstSight
from gradiometer.collectors.torch_engine import Engine, LossReduction, Pass
from gradiometer.collectors.torch_handover import StepNumbers
from gradiometer.collectors.torch_measure import StepMeasurer
from gradiometer.collectors.torch_reporter import Reporter
from gradiometer.collectors.torch_rules import Plan, batch_norms, couples
from gradiometer.collectors.torch_tensors import leading_size, tensors_in
from gradiometer.stats_core.moments import Moments
from gradiometer.stats_core.source import TakesMoments

__all__ = ["Settings", "StepFollower", "attached"]

_log = logging.getLogger("gradiometer")

attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Modules of the models that a collector is attached to."""


@dataclass(frozen=True)
class Settings:
    """What `gradiometer.attach` was asked for, checked."""

    every: int | Literal["auto"] = 1
    budget: float = 0.03
    accumulation: int = 1
    loss_reduction: LossReduction = "mean"
    ingredients: frozenset[str] = frozenset()


class StepFollower:
    """The hooks on a model and its optimizer, and the state of the step that is open.

    Args:
        model: the model.
        optimizer: its optimizer, or None.
        plan: what can be measured.
        settings: as asked for.
        measurer: forms a measured step's numbers.
        reporter: takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        plan: Plan,
        settings: Settings,
        measurer: StepMeasurer,
        reporter: Reporter,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._plan = plan
        self._settings = settings
        self._measurer = measurer
        self._reporter = reporter
        self._cadence = Cadence(settings.every, settings.budget)
        self._engine = Engine(
            plan,
            loss_reduction=settings.loss_reduction,
            ingredients=settings.ingredients,
            verifier=FirstSight(plan, settings.loss_reduction),
            on_start=self._backward_begins,
            on_done=self._backward_done,
            on_spoilt=self._spoil,
            on_error=self._turn_off,
        )
        self._batch_norms = batch_norms(model)
        self._its_modules = weakref.WeakSet[nn.Module]()
        self._handles: list[Any] = []
        self._said: set[str] = set()
        self._is_off = self._is_paused = self._was_paused = False
        self._batch_info: tuple[Sequence[Any] | None, Tensor | None] = (None, None)
        self._missing: dict[nn.Parameter, str] = dict(plan.refused)
        # The step that is open, or the last one.
        self._step = 0
        self._is_open = self._is_measured = False
        self._batch = LogicalBatch(settings.loss_reduction)
        self._numbers: StepNumbers | None = None  # of this step, until it closes
        self._in_optimizer = False
        # A gradient that the last pass left, with its parameter and version, to see whether it was cleared since.
        self._left: tuple[nn.Parameter, weakref.ref[Tensor], int] | None = None
        self._carried: int | None = None  # a step that was closed late: what was begun in it belongs to the open one
        self._began = self._last_plain = 0.0

    def moments_of(self, parameter: Any) -> Moments | None:
        """The parameter's Moments of the current step where they lie on the device, or None."""
        return self._batch.of(parameter) if self._is_measured else None

    def install(self) -> None:
        """Put the hooks on the model and the optimizer, and bind an optimizer that takes Moments."""
        self._its_modules.update(self._model.modules())
        attached.update(self._its_modules)
        if self._is_off:
            return
        model, safely = self._model, self._safely
        self._handles.append(model.register_forward_pre_hook(safely(self._forward_begins), with_kwargs=True))
        self._engine.install()
        self._handles.append(model.register_forward_hook(safely(self._forward_ends), always_call=True))
        if self._optimizer is not None:
            self._handles.append(self._optimizer.register_step_pre_hook(safely(self._optimizer_begins)))
            self._handles.append(self._optimizer.register_step_post_hook(safely(self._optimizer_ends)))
        self._bind(self)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._engine.remove()
        self._is_off, self._is_measured = True, False
        attached.difference_update(self._its_modules)
        self._bind(None)

    def _bind(self, source: Self | None) -> None:
        optimizer: Any = self._optimizer
        if isinstance(optimizer, TakesMoments) and optimizer.wants_moments:
            optimizer.bind(source)

    def _safely(self, hook: Callable[..., None]) -> Hook:
        def guarded_hook(*args: Any, **kwargs: Any) -> None:
            if self._is_off or is_transformed():
                return
            try:
                hook(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - nothing of ours may reach the user's step
                self._turn_off(error)

        return Hook(guarded_hook)

    def _turn_off(self, error: Exception | str) -> None:
        if self._is_off:
            return
        trace = error if isinstance(error, Exception) else None
        # What an exception says may hold values of the user's: it stays in the log of this process.
        reason = error if isinstance(error, str) else type(error).__name__
        _log.warning("the collector turned itself off, training goes on: %s", error, exc_info=trace)
        self._reporter.event("collector-off", reason)
        self._measure_nothing(f"the collector turned itself off: {reason}")
        self._unhook()

    def _measure_nothing(self, reason: str) -> None:
        """From now on the coverage is nothing, and says why."""
        self._missing = dict.fromkeys(self._plan.names, reason)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning("%s. This is said once.", text)

    def _forward_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        if not model.training or not torch.is_grad_enabled() or self._is_paused:
            self._was_paused |= self._is_paused
            self._reporter.hand_over()
            return
        coupling = [name for name, module in self._batch_norms if couples(module)]
        if coupling:
            names = ", ".join(coupling[:5])
            self._turn_off(f"{names} normalises over the batch, so that no example has a gradient of its own")
            return
        if self._is_open and self._batch.passes and self._optimizer is not None and self._was_skipped():
            self._start_over()
        if not self._is_open:
            self._begin_step()
        self._engine.begin(self._new_pass(args, kwargs))

    def _start_over(self) -> bool:
        """The passes so far led to no step, and their gradients are gone: True where that closes the step."""
        if self._in_optimizer:  # a closure that is evaluated again: the step is made of its last evaluation
            self._batch = LogicalBatch(self._settings.loss_reduction)
            return False
        self._close_step(skipped=True)
        return True

    def _backward_begins(self, done: Pass) -> None:
        """Ask again whether the open step was skipped: gradients may be cleared between forward and backward."""
        if self._is_off or not self._is_open:
            return
        if done.step == self._carried:
            done.step = self._step
        if done.step != self._step or not self._batch.passes or not self._was_cleared():
            return
        loss_scale = self._batch.loss_scale  # may have been said since the forward pass
        if self._start_over():
            self._carried = done.step
            self._begin_step()
            self._is_measured = self._is_measured and done.measured
            done.step = self._step
        self._batch.loss_scale = loss_scale

    def _begin_step(self) -> None:
        now = time.perf_counter()
        if self._step > 1 and self._began:  # the first step checks more than others do
            if not self._is_measured:
                self._last_plain = now - self._began
            elif self._last_plain:
                self._cadence.observe(now - self._began, self._last_plain)
        self._began = now
        self._reporter.next_step()
        self._batch = LogicalBatch(self._settings.loss_reduction)
        self._engine.seconds = 0.0
        self._is_open, self._was_paused = True, False
        self._is_measured = self._cadence.due(self._step)

    def _new_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        given = tensors_in((args, kwargs))
        batch = leading_size(given)
        ids, weights = self._batch_info
        problem = ""
        if batch is None:
            problem = "the model was given no tensor with a row an example"
        elif ids is not None and len(ids) != batch:
            problem = f"the batch has {batch} examples and {len(ids)} ids"
        elif self._settings.loss_reduction == "weighted" and (weights is None or weights.shape[0] != batch):
            problem = "loss_reduction='weighted' takes one weight an example: with collector.batch(weights=...): ..."
        if problem and self._is_measured:
            self._spoil(problem)
        if weights is not None and given:
            wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
            weights = weights.to(given[0].device, wide, non_blocking=True)
        return Pass(
            self._step,
            batch or 0,
            measured=self._is_measured,
            weights=weights if self._is_measured else None,
            ids=ids if self._is_measured else None,
            inputs=frozenset((tensor.data_ptr(), tensor.shape) for tensor in given)
            if self._is_measured
            else frozenset(),
        )

    def _forward_ends(self, _model: nn.Module, _args: Any, output: Any) -> None:
        if in_backward():
            return
        if output is None:  # the forward pass raised, or returned nothing that could be trained on
            self._engine.forward_failed()
        else:
            self._engine.forward_done(tensors_in(output))

    def _spoil(self, reason: str) -> None:
        """This step can't be measured."""
        self._say_once(f"a step is not measured: {reason}")
        self._missing.update(dict.fromkeys(self._plan.names, reason))
        self._batch.spoil(reason)
        self._is_measured = False

    def _backward_done(self, done: Pass) -> None:
        if self._is_off or not self._is_open or done.step != self._step:
            return
        if done.measured and not self._is_measured:
            done.moments.clear()
        self._batch.add(done)
        self._left = next(
            ((p, weakref.ref(p.grad), p.grad._version) for p in self._its_own() if p.grad is not None), None
        )
        if self._is_measured:
            self._missing = dict(self._batch.missing)
        if self._optimizer is None and self._batch.passes >= self._settings.accumulation:
            if self._is_measured:
                self._measure(with_optimizer=False)
            self._close_step()

    def _optimizer_begins(self, _optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_optimizer = True
        has_closure = any(value is not None for value in (*args[1:], *kwargs.values()))
        if self._is_open and self._is_measured and self._batch.passes and not has_closure:
            self._measure(with_optimizer=True)

    def _optimizer_ends(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._in_optimizer = False
        if not self._is_open:
            if not self._was_paused:
                self._say_once(
                    "the optimizer made a step and no forward pass of the model was seen before it: call the "
                    "model itself, not a compiled or copied one"
                )
            self._step += 1
            return
        if self._is_measured and self._batch.passes and self._numbers is None:
            self._measure(with_optimizer=False)
        self._close_step()

    def _was_skipped(self) -> bool:
        """True where the gradients of the open step are gone, although the optimizer made no step."""
        assert self._optimizer is not None
        if self._left is None:
            return all(p.grad is None for group in self._optimizer.param_groups for p in group["params"])
        return self._was_cleared()

    def _was_cleared(self) -> bool:
        """True where the gradients that the last pass left are not in the parameters any more."""
        if self._left is None:
            return False
        parameter, left, version = self._left
        if parameter.grad is None or parameter.grad is not left():
            return True
        if parameter.grad._version == version:
            return False
        # Changed in place since the backward pass, and no step made: the one place where values are looked at.
        return not any(bool(p.grad.any()) for p in self._its_own() if p.grad is not None)

    def _its_own(self) -> Iterator[nn.Parameter]:
        """The optimizer's parameters that can be measured: their gradients come after the model's output."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        known, refused = self._plan.names, self._plan.refused
        return (p for group in groups for p in group["params"] if p in known and p not in refused)

    def _measure(self, *, with_optimizer: bool, skipped: bool = False) -> None:
        if self._batch.examples == 1:
            self._say_once("a batch of one example has a mean gradient and no variance across examples")
        started = time.perf_counter()
        with torch.no_grad():
            self._numbers = self._measurer.measure(
                self._step, self._batch, with_optimizer=with_optimizer, skipped=skipped
            )
        self._engine.seconds += time.perf_counter() - started

    def _close_step(self, *, skipped: bool = False) -> None:
        if self._is_measured and self._batch.passes and skipped:
            self._measure(with_optimizer=False, skipped=True)
        numbers, self._numbers = self._numbers, None
        if numbers is not None:
            numbers.scalars["overhead_seconds"] = self._engine.seconds
            missing = getattr(self._optimizer, "moments_missing", None)
            if missing is not None:
                numbers.scalars["moments_missing"] = missing
            self._reporter.close_step(numbers)
        self._is_open = False
        self._step += 1
