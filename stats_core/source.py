"""Where a per-example optimizer gets the moments from: a protocol, so that neither side imports the other."""

from typing import Any, Protocol, runtime_checkable

from gradiometer.stats_core.moments import Moments

__all__ = ["MomentsSource", "TakesMoments"]


@runtime_checkable
class MomentsSource(Protocol):
    """Anything that knows the Moments of a parameter: a collector."""

    def moments_of(self, parameter: Any) -> Moments | None:
        """The parameter's Moments of the current step where they lie on the device, or None."""
        ...


@runtime_checkable
class TakesMoments(Protocol):
    """An optimizer that consumes Moments. ``attach`` binds the collector to it."""

    @property
    def wants_moments(self) -> bool:
        """True where a step can't be made without a bound source."""
        ...

    def bind(self, source: MomentsSource | None) -> None:
        """Take moments from the source from now on; None: from nowhere, every τ² is 0."""
        ...
