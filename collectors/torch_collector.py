"""The PyTorch collector: what a user of `gradiometer.attach` calls."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, Self

import torch

from gradiometer.collectors.torch_layers import coverage_of
from gradiometer.collectors.torch_steps import StepFollower
from gradiometer.protos.run_pb2 import Coverage
from gradiometer.stats_core.moments import Moments

__all__ = ["TorchCollector"]


class TorchCollector(StepFollower):
    """Measures per-example gradients of a model in training. Made by `gradiometer.attach`.

    A context manager: leaving it detaches.
    """

    @property
    def moments(self) -> Mapping[str, Moments]:
        """Moments of the open (or last) step by parameter name, on the parameter's device; empty if not measured.

        Filled when the last backward pass of a measured step returns, and kept until the first forward pass of
        the next step.
        """
        if not self._is_measured:
            return {}
        found = self._batch.all()
        return {name: found[parameter] for parameter, name in self._plan.names.items() if parameter in found}

    @property
    def coverage(self) -> Coverage:
        """Which share of the trained parameters was measured at the last measured step, and why the rest was not."""
        return coverage_of(self._model, self._plan.names, self._missing)

    @property
    def step(self) -> int:
        """Number of the optimizer step that is open or comes next, from 0."""
        return self._step

    @property
    def run_id(self) -> str:
        """Name of the run, as the server knows it."""
        return self._reporter.run.run_id

    @contextmanager
    def batch(
        self, ids: Sequence[Any] | None = None, weights: Any | None = None, segments: Any | None = None
    ) -> Iterator[None]:
        r"""Say more about the batch whose forward pass runs inside.

        Args:
            ids: the user's own ids of the examples, one a row: outliers are published under them, where they are
                asked for (``statistics=[..., "outliers"]``).
            weights: raw weights :math:`a_i` of the examples, shape ``(batch,)``: the loss of the whole step is
                :math:`\sum_i a_i \ell_i / \sum_i a_i`. Needs ``loss_reduction="weighted"``.
            segments: of packed rows, for a later release.

        Raises:
            ValueError: if weights are given without ``loss_reduction="weighted"``, their shape is not
                ``(batch,)``, there is not one id a weight, ids have no length, or segments are given.
        """
        if segments is not None:
            raise ValueError(
                "collector.batch needs segments=None in this release, got segments; give one row an example"
            )
        if ids is not None and not isinstance(ids, Sized):
            raise ValueError(
                f"collector.batch needs ids as a sequence, one id a row, got ids={type(ids).__name__}; pass list(ids)"
            )
        if weights is not None:
            if self._settings.loss_reduction != "weighted":
                raise ValueError(
                    "collector.batch needs loss_reduction='weighted' for weights, got "
                    f"loss_reduction={self._settings.loss_reduction!r}; pass it to attach"
                )
            weights = torch.as_tensor(weights).detach()
            if weights.ndim != 1 or (ids is not None and len(ids) != weights.shape[0]):
                raise ValueError(
                    f"collector.batch needs one weight an example, got weights of shape {tuple(weights.shape)} "
                    f"and ids={None if ids is None else len(ids)}; pass weights of shape (batch,)"
                )
        before, self._batch_info = self._batch_info, (ids, weights)
        try:
            yield
        finally:
            self._batch_info = before

    def log(self, loss: Any = None, tokens: Any = None, *, loss_scale: Any = None, **scalars: Any) -> None:
        """Add numbers to the step: call it between the step's first forward pass and the next step's.

        Tensors stay on the device until the step's one copy. Only measured steps are published.

        Args:
            loss: training loss.
            tokens: tokens in the batch.
            loss_scale: what the loss was multiplied by before its backward passes (``scaler.get_scale()``). Said
                before the optimizer's step, it is divided out of the Moments.
            **scalars: any others, by name.
        """
        if self._is_off:
            return
        taken = self._reporter.log({"loss": loss, "tokens": tokens, "loss_scale": loss_scale, **scalars})
        if "loss_scale" in taken:
            self._batch.loss_scale = loss_scale
            self._reporter.run.loss.loss_scale_undone = True

    def event(self, kind: str, text: str = "") -> None:
        """Note that something happened, e.g. ``event("learning-rate", "dropped to 1e-4")``."""
        self._reporter.event(kind, text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure no forward pass that runs inside, as of another phase of training. Steps are counted on."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def state_dict(self) -> dict[str, Any]:
        """The step number, and what is kept through time: a copy, by parameter name."""
        return {"step": self._step, **self._measurer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: if the state is of another model.
        """
        self._measurer.load_state_dict(state)
        self._step = int(state["step"])

    def disable(self, reason: str) -> None:
        """Detach, and say in `coverage` that nothing was measured and why."""
        self._measure_nothing(reason)
        self.detach()

    def detach(self) -> None:
        """Take every hook off, hand over what is left, and close the publisher. At any time, and twice too."""
        self._unhook()
        self._reporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()
