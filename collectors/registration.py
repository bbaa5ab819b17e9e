"""How a publisher introduces its run: the ``Run`` message, from what the user says and what can be seen."""

import datetime as dt
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradiometer.protos import run_pb2
from gradiometer.protos.checks import check_run
from gradiometer.protos.run_pb2 import Coverage, Layer, Run, World
from gradiometer.stats_core.errors import PeerFault
from gradiometer.stats_core.selection import spelled

__all__ = ["complete", "default_run_id", "registration"]

_REDUCTIONS = {
    "mean": run_pb2.LOSS_REDUCTION_MEAN,
    "sum": run_pb2.LOSS_REDUCTION_SUM,
    "weighted": run_pb2.LOSS_REDUCTION_WEIGHTED,
    "per_example": run_pb2.LOSS_REDUCTION_PER_EXAMPLE,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_reduction": tuple(_REDUCTIONS),
    "unit": ("example", "token"),
    "temporal": ("collector", "optimizer", ""),
}
_FREE = ("engine", "optimizer")


def default_run_id(now: dt.datetime | None = None) -> str:
    """Script name, date and four hex digits.

    Example:
        >>> default_run_id(dt.datetime(2026, 1, 31))[-14:-4]
        '-20260131-'
    """
    script = Path(sys.argv[0] if sys.argv else "").stem
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "-" for letter in script)
    name = name.strip("-_")[:100] or "run"
    date = (now or dt.datetime.now().astimezone()).strftime("%Y%m%d")
    return f"{name}-{date}-{secrets.token_hex(2)}"


def registration(run: str | None, params: Any, coverage: Coverage | None, config: Mapping[str, object] | None) -> Run:
    """The message for a run of the given parameters.

    Args:
        run: its name, or None for one of script, date and four hex digits.
        params: a pytree of jax arrays, or the layers.
        coverage: what is measured; None: all of the layers.
        config: facts about the run; see `Publisher`.

    Raises:
        ValueError: if a fact of the catalogue's or the wire's has a value that it can't have.
    """
    layers = _layers(params)
    facts = {name: str(value) for name, value in (config or {}).items() if name != "statistics"}
    tier = spelled((config or {}).get("statistics", "default"))  # type: ignore[arg-type]
    for name, choices in _CHOICES.items():
        if name in facts and facts[name] not in choices:
            raise ValueError(
                f"Publisher needs config[{name!r}] in {choices}, got {name}={facts[name]!r}; choose one of them"
            )
    framework, version, device = _framework(params)
    message = Run(
        run_id=run if run is not None else "",
        layers=layers,
        loss=run_pb2.LossNormalization(reduction=_REDUCTIONS[facts.pop("loss_reduction", "mean")]),
        world=World(size=1, framework=framework, framework_version=version, device=device),
        unit=facts.pop("unit", "example"),
        tier=tier,
        temporal=facts.pop("temporal", "collector"),
        engine=facts.pop("engine", "vmap" if framework == "jax" else ""),
        optimizer=facts.pop("optimizer", ""),
        config=facts,
    )
    elements = sum(layer.num_params for layer in layers)
    message.coverage.CopyFrom(coverage or Coverage(num_params=elements, num_params_measured=elements))
    if run == "":  # complete() would take it for "not said"
        raise ValueError("Publisher needs run as a name or None, got run=''; leave it out for a name of the script's")
    return complete(message)


def complete(run: Run) -> Run:
    """A copy with what was left open filled in: name, time, host.

    Raises:
        ValueError: if the run could not be registered anywhere: a bad name, no layers, no reduction.
    """
    run = Run.FromString(run.SerializeToString())
    run.run_id = run.run_id or default_run_id()
    run.started_unix_nanos = run.started_unix_nanos or time.time_ns()
    run.world.size = run.world.size or 1
    run.world.host = run.world.host or socket.gethostname()
    try:
        check_run(run)
    except PeerFault as fault:
        raise ValueError(str(fault).replace("RegisterRun needs", "Publisher needs", 1)) from None
    return run


def _layers(params: Any) -> list[Layer]:
    if isinstance(params, Sequence) and all(isinstance(part, Layer) for part in params):
        return list(params)
    from gradiometer.collectors.jax_layers import layers_of

    return layers_of(params)


def _framework(params: Any) -> tuple[str, str, str]:
    """Framework, its version and the device of the first parameter, as far as a pytree of arrays shows them."""
    jax = sys.modules.get("jax")  # there if anything of it is in the pytree
    if jax is None or isinstance(params, Sequence):
        return "", "", ""
    leaf = next((leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "devices")), None)
    device = str(next(iter(leaf.devices()))) if leaf is not None else ""
    return "jax", str(jax.__version__), device
