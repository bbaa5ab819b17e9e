"""Which steps are measured: every k-th, where k is given or follows from a budget. Framework-free."""

import math
import operator
from collections import deque
from statistics import median
from typing import Literal, SupportsIndex

__all__ = ["Cadence"]

_START = 16
_LONGEST = 1 << 16
_REMEMBERED = 32
_ENOUGH = 3
_ROOM = 0.7


class Cadence:
    """The governor of measuring, shared by every collector: steps 0, k, 2k, ... are measured.

    With ``every="auto"``, k is a small power of two at which measuring costs no more than the budget. Powers of
    two, so that the steps of a longer k are steps of a shorter one, and a change leaves no step measured twice
    in a row. k grows as soon as the budget is passed, and shrinks only where the shorter k would leave a third
    of it free: costs that waver do not make it swing.

    Args:
        every: k, at least 1, or "auto": 16 until three measured steps have been timed.
        budget: for "auto": time spent measuring, as a share of the time that the steps take without it.

    Attributes:
        every: the k in force.

    Raises:
        ValueError: if ``every`` is below 1 or ``budget`` is not above 0.
        TypeError: if ``every`` is no whole number.

    Example:
        >>> cadence = Cadence(every=3)
        >>> [step for step in range(8) if cadence.due(step)]
        [0, 3, 6]
        >>> cadence = Cadence(every="auto", budget=0.1)
        >>> for _ in range(3):
        ...     cadence.observe(measured_seconds=1.5, plain_seconds=1.0)    # half a step more
        >>> cadence.every                                                   # 0.5 / 8 is within 0.1
        8
    """

    def __init__(self, every: int | Literal["auto"] = 10, budget: float = 0.03) -> None:
        self._auto = every == "auto"
        self.every = _START if every == "auto" else _whole("every", every)
        if self.every < 1:
            raise ValueError(f"Cadence needs every of at least 1 or 'auto', got every={every}; 1 measures each step")
        if not 0 < budget < math.inf:
            raise ValueError(
                f"Cadence needs a budget above 0, got budget={budget}; 0.03 lets measuring take 3 % of the time"
            )
        self.budget = budget
        self._measured: deque[float] = deque(maxlen=_REMEMBERED)
        self._plain: deque[float] = deque(maxlen=_REMEMBERED)

    def due(self, step: SupportsIndex) -> bool:
        """True where the step is to be measured.

        Args:
            step: counted from 0, a concrete whole number.

        Raises:
            ValueError: if it is below 0.
            TypeError: if it is no whole number.
        """
        number = _whole("step", step)
        if number < 0:
            raise ValueError(f"Cadence.due needs a step of at least 0, got step={number}; count the steps from 0")
        return number % self.every == 0

    @property
    def extra(self) -> float:
        """What a measured step takes more, as a share of a plain one (medians); NaN until one has been timed."""
        if not self._measured:
            return math.nan
        return max(0.0, median(self._measured) / median(self._plain) - 1.0)

    def observe(self, measured_seconds: float, plain_seconds: float) -> None:
        """Take the time of a measured step, and of a plain one near it. Unit: seconds.

        What is not finite and above 0 (a clock that was set back) is passed over: a training step never fails here.
        """
        if not (0 < measured_seconds < math.inf and 0 < plain_seconds < math.inf):
            return
        self._measured.append(measured_seconds)
        self._plain.append(plain_seconds)
        if self._auto and len(self._measured) >= _ENOUGH:
            self.every = self._within_budget()

    def _within_budget(self) -> int:
        extra, every = self.extra, self.every
        while extra / every > self.budget and every < _LONGEST:
            every *= 2
        while every > 1 and extra / (every // 2) <= _ROOM * self.budget:
            every //= 2
        return every


def _whole(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"Cadence needs {name} to be a whole number, got {name}={value!r}; pass an int") from None
