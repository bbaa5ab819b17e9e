"""Every docstring example runs, under the name that users import it by."""

import doctest
import importlib
import pkgutil
import warnings

import pytest

import gradiometer


def modules() -> list[str]:
    found = ["gradiometer"]
    for info in pkgutil.walk_packages(gradiometer.__path__, "gradiometer."):
        if "_pb2" not in info.name and not info.name.endswith("__main__"):
            found.append(info.name)
    return found


def test_the_walk_finds_the_house() -> None:
    assert {"gradiometer.stats_core.moments", "gradiometer.server.store", "gradiometer.cli"} <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = importlib.import_module(name)
        assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
