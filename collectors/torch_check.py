r"""First sight of a model: is the leading axis of each module the batch, and do the examples add up?

Two questions that shapes can't answer, asked numerically where a module is first seen in use (and again where it
is used in another way). Both read a few numbers back from the device; later steps read none.

* *Rows.* A position embedding looked up once for all examples has an output of shape ``(T, d)``, which looks
  like a batch where T happens to be B, and whose mean over "examples" is even right. So: let the loss be that
  of one row of the model's output, and see which rows of the module's output a gradient comes back to. Only
  where it is that row alone is the leading axis the batch. Examples that depend on one another (a batch
  normalisation of the user's own) show as well. Two short backward passes, which reach no ``.grad``
  and draw no random number; hooks that the user has put on tensors along their way do run.
* *Sums.* :math:`\sum_i w_i g_i` must be the gradient that autograd hands the parameter. It is not where a
  weight is also used by function, or a penalty on it is part of the loss.
"""

import logging
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradiometer.collectors.torch_autograd import guarded
from gradiometer.collectors.torch_engine import Call, LossReduction, Pass
from gradiometer.collectors.torch_rules import Plan

__all__ = ["FirstSight"]

_log = logging.getLogger("gradiometer")

TRIES = 16
"""Passes that may be spent on each question before what is still open is given up as uncovered."""

_LEAK = 1e-6  # what may reach other rows, of what reaches its own: batched kernels may differ in the last digits


class FirstSight:
    """The `Verifier` of the engine.

    Args:
        plan: what can be measured.
        loss_reduction: what the loss does with the examples of a pass.
    """

    def __init__(self, plan: Plan, loss_reduction: LossReduction) -> None:
        self._plan = plan
        self._loss_reduction = loss_reduction
        self._rows: dict[nn.Module, bool | None] = {}
        self._sums: dict[nn.Parameter, bool | None] = {}
        self._used_as: dict[nn.Module, tuple[int, ...]] = {}
        self._row_tries = self._sum_tries = 0
        self._trouble = ""
        self._seen: dict[Call, list[Tensor]] | None = None  # while a probe runs
        self._watching: list[Any] = []
        self._grads: dict[nn.Parameter, Tensor] = {}

    def before_backward(self, done: Pass, outputs: list[Tensor]) -> None:
        """Probe the rows of modules seen for the first time; mark what must not be measured as missing."""
        calls: dict[nn.Module, list[Call]] = {}
        for call in done.calls:
            calls.setdefault(call.module, []).append(call)
        for module, its_calls in calls.items():
            used_as = tuple(len(call.shape) for call in its_calls)
            if self._used_as.get(module) != used_as:
                self._used_as[module], self._rows[module] = used_as, None
                self._sums.update(dict.fromkeys(self._plan.parameters_of(module), None))
        unknown = {module: calls[module] for module in calls if self._rows[module] is None}
        if done.batch > 1 and unknown and self._row_tries < TRIES:
            self._row_tries += 1
            self._probe(done, outputs, unknown)
        for module in calls:
            # A batch of one example is its own batch, whatever the axis means.
            if done.batch > 1 and self._rows[module] is not True:
                reason = self._reason(module, done.batch)
                done.missing.update(dict.fromkeys(self._plan.parameters_of(module), reason))
        self._watch(done, calls)

    def probing(self, call: Call, grad: Tensor) -> bool:
        """True while a probe runs; notes how much of its gradient each row of the call's output was given."""
        if self._seen is None:
            return False
        if call in self._seen:
            with guarded(grad.device):
                rows = grad.detach().reshape(call.shape[0], -1).abs()
                self._seen[call].append(rows.amax(1) if rows.shape[1] else rows.sum(1))
        return True

    def after_backward(self, done: Pass) -> None:
        """Compare the sums that were watched; what does not add up becomes missing."""
        grads = self._unwatch()
        compared = [p for p in grads if p in done.moments]
        if compared:
            found = torch.stack([self._difference(done, p, grads[p]) for p in compared]).tolist()
            largest = max((size for _, size, _ in found if math.isfinite(size)), default=0.0)
            for parameter, (difference, size, tolerance) in zip(compared, found, strict=True):
                # What is not a number, or no more than the rounding of others (a bias before a norm), says nothing.
                if math.isfinite(difference) and size > _rounding(parameter, done) * largest:
                    self._sums[parameter] = difference <= tolerance * size
        for parameter in list(done.moments):
            if self._sums.get(parameter) is False:
                del done.moments[parameter]
                done.missing[parameter] = _NOT_THE_SUM

    def _watch(self, done: Pass, calls: dict[nn.Module, list[Call]]) -> None:
        """Ask autograd for the gradients of the parameters whose sums were never compared."""
        self._unwatch()
        open_sums = set()
        for module in calls:
            for parameter in self._plan.parameters_of(module):
                if self._sums.get(parameter) is False:
                    done.missing.setdefault(parameter, _NOT_THE_SUM)
                elif self._sums.get(parameter) is None and parameter not in done.missing:
                    open_sums.add(parameter)
        if open_sums and self._sum_tries < TRIES:
            self._sum_tries += 1
            for parameter in open_sums:  # on the graph's node, not on the parameter: that would leave a trace on it
                node = torch.autograd.graph.get_gradient_edge(parameter).node
                self._watching.append(node.register_prehook(partial(self._note_grad, parameter)))

    def _unwatch(self) -> dict[nn.Parameter, Tensor]:
        """The gradients that were seen since; nothing is watched any more."""
        for handle in self._watching:
            handle.remove()
        self._watching.clear()
        grads, self._grads = self._grads, {}
        return grads

    def _note_grad(self, parameter: nn.Parameter, grads: tuple[Tensor | None, ...]) -> None:
        if grads[0] is not None and not grads[0].is_sparse:
            self._grads[parameter] = grads[0].detach()

    def _difference(self, done: Pass, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        """Norm of the difference of the sums, norm to hold it against, and the tolerance."""
        moments = done.moments[parameter]
        if self._loss_reduction == "mean":
            summed, share = moments.mean, 1.0 / done.batch
        else:
            summed, share = moments.mean * moments.weight_sum, moments.weights
        wide = torch.float32 if grad.device.type == "mps" else torch.float64
        norm = partial(torch.linalg.vector_norm, dtype=wide)
        single = (moments.sq_norms.to(wide) * share * share).sum().sqrt()
        size = torch.maximum(torch.maximum(norm(grad), norm(summed)), single)
        return torch.stack([norm(grad.to(wide) - summed), size, torch.full_like(size, _tolerance(parameter, done))])

    def _probe(self, done: Pass, outputs: list[Tensor], unknown: dict[nn.Module, list[Call]]) -> None:
        seeds = [t for t in outputs if t.ndim and t.shape[0] == done.batch and t.is_floating_point()]
        anchored = bool(seeds)
        if not seeds and done.last_output is not None:
            seeds = [done.last_output]  # the model returned only its loss
        self._trouble = "" if seeds else "; the model returned no tensor with a row an example"
        if not seeds:
            return
        self._seen = {call: [] for call in done.calls}
        # The smallest parameter of each module: the gradient has to pass the module's output to get there.
        modules = {call.module for call in done.calls}
        targets = list({min(self._plan.parameters_of(module), key=nn.Parameter.numel) for module in modules})
        rows = (0, done.batch - 1)
        try:
            for row in rows:
                torch.autograd.grad(
                    seeds,
                    targets,
                    [_one_row(seed, row) for seed in seeds],
                    retain_graph=True,
                    allow_unused=True,
                )
            verdicts = self._verdicts(rows)
        except Exception as error:  # noqa: BLE001 - a check that fails leaves its question open
            self._trouble = f"; the check failed with {type(error).__name__}"
            _log.debug("gradiometer: the check of the batch axis failed", exc_info=True)
            return
        finally:
            self._seen = None
        if not anchored and not any(
            verdicts[call] and call.input is not None and (call.input.data_ptr(), call.input.shape) in done.inputs
            for call in done.calls
        ):
            self._trouble = "; the model returned no tensor with a row an example"
            return
        for module, calls in unknown.items():
            found = [verdicts[call] for call in calls]
            self._rows[module] = False if False in found else (True if all(found) else None)

    def _verdicts(self, rows: tuple[int, int]) -> dict[Call, bool | None]:
        """For each call: True where each row's gradient came back to that row alone, None where none came back."""
        assert self._seen is not None
        verdicts: dict[Call, bool | None] = dict.fromkeys(self._seen)
        reached = [call for call, seen in self._seen.items() if len(seen) == len(rows)]
        if not reached:
            return verdicts
        by_row = []
        for number, row in enumerate(rows):
            shares = torch.stack([self._seen[call][number].float() for call in reached])
            shares = torch.nan_to_num(shares, nan=0.0, posinf=0.0, neginf=0.0)
            own = shares[:, row].clone()
            shares[:, row] = 0
            by_row.append(torch.stack([shares.amax(1) > _LEAK * own, own > 0]))
        leaks, arrives = torch.stack(by_row).any(0).tolist()
        for call, leak, arrive in zip(reached, leaks, arrives, strict=True):
            verdicts[call] = False if leak else (True if arrive else None)
        return verdicts

    def _reason(self, module: nn.Module, batch: int) -> str:
        if self._rows[module] is False:
            return (
                f"its leading axis of {batch} is not the batch: an example's loss reaches the rows of others; "
                "give the module one row an example, and keep examples apart"
            )
        if self._row_tries >= TRIES:
            return f"whether its leading axis is the batch was not found out in {TRIES} tries{self._trouble}"
        return (
            "whether its leading axis is the batch is not known yet, since no gradient came back when it was tried; "
            f"tried again at the next measured step{self._trouble}"
        )


_NOT_THE_SUM = (
    "its examples do not add up to its gradient: the weight is also used by function, or a penalty on it is in the loss"
)


def _rounding(parameter: nn.Parameter, done: Pass) -> float:
    """Size of a gradient that may be nothing but rounding, as a share of the largest in the model."""
    return torch.finfo(torch.bfloat16).eps if done.half else 32 * torch.finfo(parameter.dtype).eps


def _tolerance(parameter: nn.Parameter, done: Pass) -> float:
    """Relative difference that rounding may make between our sum and autograd's."""
    if parameter.dtype == torch.float64:
        return 1e-6
    return 5e-2 if done.half else (1e-2 if parameter.is_cuda else 1e-3)  # cuda: TF32 has 10 bits


def _one_row(seed: Tensor, row: int) -> Tensor:
    """A gradient for one row: random, since a symmetric one may cancel (a softmax takes ones to zero)."""
    generator = torch.Generator(seed.device).manual_seed(row + 1)  # the user's generator stays where it is
    grad = torch.zeros_like(seed)
    noise = torch.randn(seed.shape[1:], generator=generator, device=seed.device, dtype=torch.float32)
    grad[row] = noise.to(seed.dtype)
    return grad
