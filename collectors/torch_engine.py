r"""The Opacus engine: from one forward and backward pass to the Moments of every parameter.

How it works. A forward hook on each module with a sampler keeps the module's input and puts a hook on its
*output tensor*; in the backward pass that hook gets the output's gradient, calls the sampler, and reduces the
per-example gradients to Moments as soon as every use of the parameter has been seen. A callback of autograd at
the end of the backward pass closes the account. No node is added to the user's graph and no value in it is
changed, so that the user's loss and gradients stay what they were, bit for bit; nothing raises out of a hook.

Moments leave the engine in *pass units*: gradients of the pass's own loss with its reduction undone, so of
:math:`\ell_i` up to one factor that only the whole step knows (`gradiometer.collectors.torch_batch`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gradiometer.collectors.torch_autograd import (
    Hook,
    below,
    guarded,
    in_backward,
    is_transformed,
    under_saved_tensor_hooks,
)
from gradiometer.collectors.torch_rules import Plan
from gradiometer.stats_core.arrays import widened
from gradiometer.stats_core.moments import Moments

__all__ = ["Call", "Engine", "LossReduction", "Pass", "Verifier", "moments_of"]

LossReduction = Literal["mean", "sum", "weighted"]


@dataclass(eq=False)
class Call:
    """One call of a module in a measured forward pass.

    Attributes:
        module: the module.
        input: its input, detached; given up once it was used.
        version: of the input's storage, to notice a change in place.
        shape: of the output.
    """

    module: nn.Module
    input: Tensor | None
    version: int
    shape: torch.Size


@dataclass(eq=False)
class Pass:
    """One forward pass of the model and the backward pass through it.

    Attributes:
        step: number of the optimizer step that it is part of.
        batch: examples.
        measured: False where it is only counted.
        weights: raw weights of the examples, shape ``(batch,)``, or None.
        ids: the user's own ids of the examples, or None.
        inputs: address and shape of the tensors that the model was given.
        calls: of modules with a sampler, in order.
        last_output: of the last of them; kept during the forward pass only.
        half: True where a module computed in half precision.
        moments: parameter → Moments in pass units; complete when the backward pass is over.
        missing: parameter → why it has none.
    """

    step: int
    batch: int
    measured: bool
    weights: Tensor | None = None
    ids: Sequence[Any] | None = None
    inputs: frozenset[tuple[int, torch.Size]] = frozenset()
    calls: list[Call] = field(default_factory=list)
    last_output: Tensor | None = None
    half: bool = False
    moments: dict[nn.Parameter, Moments] = field(default_factory=dict)
    missing: dict[nn.Parameter, str] = field(default_factory=dict)
    _left: dict[nn.Parameter, int] = field(default_factory=dict)
    _partial: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    _task: int | None = None
    _given_up: bool = False


class Verifier(Protocol):
    """Who decides whether a module's leading axis is the batch (`gradiometer.collectors.torch_check`)."""

    def before_backward(self, done: Pass, outputs: list[Tensor]) -> None:
        """Called when the forward pass is complete; marks in ``missing`` what must not be measured.

        Args:
            done: the pass.
            outputs: the tensors that the model returned and that have a history.
        """
        ...

    def probing(self, call: Call, grad: Tensor) -> bool:
        """True where the gradient belongs to a probe of its own and to no backward pass of the user."""
        ...

    def after_backward(self, done: Pass) -> None:
        """Called when the Moments of the pass are complete."""
        ...


class Engine:
    """Hooks on the user's own model.

    Args:
        plan: what can be measured.
        loss_reduction: what the loss does with the examples of a pass.
        ingredients: what the statistics need; of it "dots" and "sign_mean" are computed only if they are in it.
        verifier: checks axes and sums at first sight.
        on_start: called with each pass when its backward pass begins, before any of its gradients is there.
        on_done: called with each pass when its backward pass is over.
        on_spoilt: called with a reason where a step can't be measured as a whole.
        on_error: called with an exception that was kept from the user.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        loss_reduction: LossReduction,
        ingredients: frozenset[str] = frozenset(),
        verifier: Verifier,
        on_start: Callable[[Pass], None],
        on_done: Callable[[Pass], None],
        on_spoilt: Callable[[str], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._plan = plan
        self._loss_reduction = loss_reduction
        self._ingredients = ingredients
        self._verifier = verifier
        self._on_start = on_start
        self._on_done = on_done
        self._on_spoilt = on_spoilt
        self._on_error = on_error
        self._current: Pass | None = None
        self._under_way: Pass | None = None  # whose backward pass runs
        self._handles: list[Any] = []
        self.seconds = 0.0
        """Time that the hooks have taken on the training thread, since it was last set to 0."""

    def install(self) -> None:
        """Put a forward hook on every module with a sampler."""
        for module in self._plan.rules:
            self._handles.append(module.register_forward_hook(Hook(self._capture), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off; a pass that is under way is forgotten."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._current = self._under_way = None

    def begin(self, started: Pass) -> None:
        """A forward pass of the model begins."""
        self._current = started

    def forward_failed(self) -> None:
        """The forward pass ended in an exception of the user's."""
        if self._current is not None:
            self._current.last_output = None
        self._current = None

    def forward_done(self, outputs: list[Tensor]) -> None:
        """The forward pass is over; ``outputs`` are the tensors that it returned."""
        done, self._current = self._current, None
        if done is None:
            return
        grown = [tensor for tensor in outputs if tensor.requires_grad and tensor.grad_fn is not None]
        for tensor in grown:
            below(tensor).register_hook(partial(self._reached, done))
        if done.measured:
            started = time.perf_counter()
            self._verifier.before_backward(done, grown)
            done.last_output = None
            self.seconds += time.perf_counter() - started

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_transformed():
            return
        done = self._current
        if done is None or not done.measured or in_backward():
            return
        try:
            self._note_call(done, module, args[0] if args else kwargs.get("input"), output)
        except Exception as error:  # noqa: BLE001 - nothing of ours may reach the user's forward pass
            self._on_error(error)

    def _note_call(self, done: Pass, module: nn.Module, given: Any, output: Any) -> None:
        reason = self._unusable(module, given, output, done.batch)
        parameters = list(self._plan.parameters_of(module))
        if reason:
            done.missing.update(dict.fromkeys(parameters, reason))
            return
        if not output.requires_grad:
            return
        call = Call(module, given.detach(), given._version, output.shape)
        done.calls.append(call)
        done.last_output = output
        for parameter in parameters:
            done._left[parameter] = done._left.get(parameter, 0) + 1
        below(output).register_hook(partial(self._received, done, call))

    def _unusable(self, module: nn.Module, given: Any, output: Any, batch: int) -> str | None:
        """Why this call can't be measured, or None."""
        rule = self._plan.rules[module]
        if not torch.is_grad_enabled():
            return "its forward pass ran without gradients, as inside a reentrant checkpoint"
        if not module.training:
            return "its module is in eval mode while the model trains; call train() on it or freeze it"
        if under_saved_tensor_hooks():
            return "it runs inside an activation checkpoint, whose point is to keep no activations"
        if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.is_inference():
            return "its module was not given a plain tensor"
        if given.ndim < rule.min_ndim or given.shape[0] != batch or output.shape[0] != batch:
            return (
                f"its input of shape {tuple(given.shape)} does not carry the batch of {batch} on its leading axis; "
                "give the module one row an example"
            )
        return None

    def _reached(self, done: Pass, _grad: Tensor) -> None:
        """The backward pass has come to the model's output."""
        try:
            if not self._verifier.probing(_NO_CALL, _grad):
                self._start(done)
        except Exception as error:  # noqa: BLE001
            self._on_error(error)

    def _start(self, done: Pass) -> bool:
        """Note that a backward pass goes through this forward pass; False where that spoils the step."""
        if done._given_up or not self._handles:
            return False
        task = torch._C._current_graph_task_id()
        if done._task is None:
            other = self._under_way
            if other is not None and other._task == task:
                reason = "one backward pass went through two forward passes of the model"
                return self._give_up(reason, done, other) if done.measured else False
            with torch.no_grad():
                self._on_start(done)
            done._task, self._under_way = task, done
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._finished, done))
        elif done._task != task and done.measured:
            return self._give_up("two backward passes went through one forward pass of the model", done)
        return True

    def _give_up(self, reason: str, *passes: Pass) -> bool:
        for done in passes:
            done._given_up = True
            done._partial.clear()
            done.moments.clear()
        self._on_spoilt(reason)
        return False

    def _received(self, done: Pass, call: Call, grad: Tensor) -> None:
        try:
            if self._verifier.probing(call, grad) or not self._start(done):
                return
            started = time.perf_counter()
            with guarded(grad.device):
                self._sample(done, call, grad.detach())
            self.seconds += time.perf_counter() - started
        except Exception as error:  # noqa: BLE001
            self._on_error(error)

    def _sample(self, done: Pass, call: Call, grad: Tensor) -> None:
        given, call.input = call.input, None
        parameters = [p for p in self._plan.parameters_of(call.module) if p not in done.missing]
        if not parameters or given is None:
            return
        if given._version != call.version:
            done.missing.update(dict.fromkeys(parameters, "its module's input was changed in place after its use"))
            return
        try:
            samples = self._plan.rules[call.module].sample(
                call.module, [_as_computed(given, grad)], self._without_reduction(grad.reshape(call.shape), done)
            )
            for parameter in parameters:
                self._add(done, parameter, samples[parameter])
        except Exception as error:  # noqa: BLE001
            done.missing.update(dict.fromkeys(parameters, f"its sampler failed with {type(error).__name__}"))

    def _without_reduction(self, grad: Tensor, done: Pass) -> Tensor:
        """The output's gradient in float32 or wider, as it would be of each example's own loss, up to one factor."""
        done.half = done.half or grad.dtype in (torch.float16, torch.bfloat16)
        grad = widened(grad)
        if self._loss_reduction == "mean":
            return grad * float(done.batch)
        if done.weights is None:
            return grad
        # An example of weight 0 has left no gradient behind: it stays 0 and counts with weight 0.
        factor = torch.where(done.weights == 0, 0.0, 1.0 / done.weights).to(grad.dtype)
        return grad * factor.reshape(-1, *([1] * (grad.ndim - 1)))

    def _add(self, done: Pass, parameter: nn.Parameter, samples: Tensor) -> None:
        known = done._partial.pop(parameter, None)
        # Never in place: a sampler may return the user's own gradient.
        total = samples if known is None else known + samples
        done._left[parameter] -= 1
        if done._left[parameter] > 0:
            done._partial[parameter] = total
        else:
            done.moments[parameter] = moments_of(total, done.weights, self._ingredients)

    def _finished(self, done: Pass) -> None:
        """End of the backward pass: what is still open never got a gradient, and adds nothing."""
        try:
            self._under_way = None
            with torch.no_grad():
                if done.measured and not done._given_up:
                    started = time.perf_counter()
                    self._complete(done)
                    self.seconds += time.perf_counter() - started
                self._on_done(done)
        except Exception as error:  # noqa: BLE001
            self._on_error(error)

    def _complete(self, done: Pass) -> None:
        for parameter, samples in done._partial.items():
            if parameter not in done.missing:
                done.moments[parameter] = moments_of(samples, done.weights, self._ingredients)
        done._partial.clear()
        done.calls.clear()
        for parameter in self._plan.names:
            if parameter in done.missing:
                done.moments.pop(parameter, None)
            elif parameter in self._plan.refused:
                done.missing[parameter] = self._plan.refused[parameter]
            elif parameter not in done.moments:
                done.missing[parameter] = (
                    "no gradient came back to its module's output"
                    if parameter in done._left
                    else "no call of its module was seen: it was compiled, or its weight is used by function"
                )
        self._verifier.after_backward(done)


_TILE = 1 << 18
"""Elements of a tile: 1 MiB in float32."""

_NO_CALL = Call(nn.Identity(), None, 0, torch.Size())


def moments_of(samples: Tensor, weights: Tensor | None, ingredients: frozenset[str] = frozenset()) -> Moments:
    """Moments of per-example gradients; of large ones on a CPU in tiles, whose temporaries stay in its cache."""
    on_request = {"dots": "dots" in ingredients, "sign_mean": "sign_mean" in ingredients}
    batch = samples.shape[0]
    if samples.is_cuda or samples.numel() < 2 * _TILE:
        return Moments.from_per_example(samples, weights, **on_request)
    shape, flat = samples.shape[1:], samples.reshape(batch, -1)
    width = _TILE // batch + 1
    tiles = [
        Moments.from_per_example(flat[:, at : at + width], weights, **on_request)
        for at in range(0, flat.shape[1], width)
    ]

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None]).reshape(shape)

    def added(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.stack([part for part in parts if part is not None]).sum(0)

    return tiles[0]._replace(
        mean=joined([tile.mean for tile in tiles]),
        m2=joined([tile.m2 for tile in tiles]),
        sq_norms=added([tile.sq_norms for tile in tiles]),
        dots=added([tile.dots for tile in tiles]),
        sign_mean=joined([tile.sign_mean for tile in tiles]),
    )


def _as_computed(given: Tensor, grad: Tensor) -> Tensor:
    """The input as the module computed with it (autocast rounds it to the output's type), in float32 or wider."""
    if not given.is_floating_point():
        return given
    if given.dtype != grad.dtype and grad.dtype in (torch.float16, torch.bfloat16):
        given = given.to(grad.dtype)
    result: Tensor = widened(given)
    return result
