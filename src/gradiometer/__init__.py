"""gradiometer: an instrument for the gradients of a training job.

Importing it imports no framework; what needs one is loaded when it is first used.

Example:
    >>> import gradiometer as gm
    >>> gm.__version__
    '0.1.0'
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradiometer.collectors.cadence import Cadence
    from gradiometer.collectors.jax_grads import value_and_grad
    from gradiometer.collectors.jax_summary import init_temporal, summarize
    from gradiometer.collectors.publisher import Publisher
    from gradiometer.collectors.torch_attach import attach
    from gradiometer.stats_core import Moments, Summary

__version__ = "0.1.0"

__all__ = [
    "Cadence",
    "Moments",
    "Publisher",
    "Summary",
    "attach",
    "init_temporal",
    "summarize",
    "value_and_grad",
]

_HOMES = {
    "Cadence": "gradiometer.collectors.cadence",
    "Moments": "gradiometer.stats_core",
    "Publisher": "gradiometer.collectors.publisher",
    "Summary": "gradiometer.stats_core",
    "attach": "gradiometer.collectors.torch_attach",
    "init_temporal": "gradiometer.collectors.jax_summary",
    "summarize": "gradiometer.collectors.jax_summary",
    "value_and_grad": "gradiometer.collectors.jax_grads",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'gradiometer' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
