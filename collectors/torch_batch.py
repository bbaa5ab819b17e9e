"""One optimizer step's Moments, from the passes it is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradiometer.collectors.torch_engine import LossReduction, Pass
from gradiometer.stats_core.moments import Moments

__all__ = ["LogicalBatch"]


class LogicalBatch:
    r"""All examples of one optimizer step, whatever the number of backward passes.

    What is undone, so that the Moments are of :math:`g_i = \nabla \ell_i`:

    * ``"mean"``: each pass's loss is the mean over its examples, and was divided by the number k of the step's
      passes. (Where passes differ in size, an example of a small one counts for more in the batch gradient;
      its raw weight says so.)
    * ``"sum"``: nothing was divided.
    * ``"weighted"``: each pass's loss is :math:`\sum_i a_i \ell_i / A` with A the weights of the whole step.
    * a loss scale, where it was said (``collector.log(loss_scale=...)``).

    Args:
        loss_reduction: as above.
    """

    def __init__(self, loss_reduction: LossReduction) -> None:
        self._loss_reduction = loss_reduction
        self._first_batch = 0
        self._raw: dict[nn.Parameter, Moments] = {}
        self._final: dict[nn.Parameter, Moments] = {}
        self._loss_scale: Any = None
        self.missing: dict[nn.Parameter, str] = {}
        self.passes = 0
        self.examples = 0
        self._ids: list[Sequence[Any] | None] = []

    @property
    def loss_scale(self) -> Any:
        """What the loss was multiplied by before its backward passes; None where nothing was said."""
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, value: Any) -> None:
        self._loss_scale = value
        self._final.clear()

    @property
    def ids(self) -> Sequence[Any] | None:
        """The user's own ids of the examples, in the order of the passes; None where a pass had none."""
        if len(self._ids) == 1:
            return self._ids[0]
        parts = [ids for ids in self._ids if ids is not None]
        return None if len(parts) < len(self._ids) else [one for ids in parts for one in ids]

    def add(self, done: Pass) -> None:
        """Merge one pass. A parameter that one pass has not measured is not measured in this step."""
        if self.passes == 0:
            self._first_batch = done.batch
            self._raw = dict(done.moments)
        else:
            share = self._first_batch / done.batch if self._loss_reduction == "mean" else 1.0
            for parameter in list(self._raw):
                new = done.moments.get(parameter)
                if new is None:
                    del self._raw[parameter]
                else:
                    self._raw[parameter] = self._raw[parameter].merge(_reweighted(new, share))
        self.missing = {**done.missing, **self.missing}
        self.passes += 1
        self._ids.append(done.ids)
        self.examples += done.batch
        self._final.clear()

    def spoil(self, reason: str) -> None:
        """Give the whole step up."""
        self.missing.update(dict.fromkeys([*self._raw, *self.missing], reason))
        self._raw.clear()
        self._final.clear()

    def of(self, parameter: nn.Parameter) -> Moments | None:
        """The parameter's Moments over the passes so far, or None."""
        known = self._final.get(parameter)
        if known is None and parameter in self._raw:
            raw = self._raw[parameter]
            factor = self._factor(raw)
            known = raw if factor is None else raw.scaled(factor)
            self._final[parameter] = known
        return known

    def all(self) -> Mapping[nn.Parameter, Moments]:
        """Parameter → Moments over the passes so far."""
        return {parameter: moments for parameter in self._raw if (moments := self.of(parameter)) is not None}

    def _factor(self, raw: Moments) -> Any:
        """From the units of a pass to those of an example's own loss; None where they are the same."""
        factor: Any = None
        if self._loss_reduction == "mean" and self.passes > 1:
            factor = float(self.passes)
        elif self._loss_reduction == "weighted":
            factor = raw.weight_sum
        if self._loss_scale is not None:
            factor = (1.0 if factor is None else factor) / self._loss_scale
        return factor


def _reweighted(moments: Moments, share: float) -> Moments:
    """The same examples, each with ``share`` times its weight."""
    if share == 1.0:
        return moments
    return moments._replace(
        weight_sum=moments.weight_sum * share,
        weight_sq_sum=moments.weight_sq_sum * (share * share),
        m2=moments.m2 * share,
        weights=moments.weights * share,
    )
