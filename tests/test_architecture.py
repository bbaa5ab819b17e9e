"""The house rules that a machine can hold: who imports what, and how long a module may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("stats_core", "protos", "collectors", "optimizers", "dashboards", "server")
FRAMEWORKS = {"torch": "torch_", "opacus": "torch_", "jax": "jax_", "flax": "jax_", "optax": "optax_"}
LONGEST = 400


def sources() -> list[Path]:
    paths = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    own = [p for p in (ROOT / "src/gradiometer").rglob("*.py") if not any(q.is_symlink() for q in p.parents)]
    return [p for p in paths + own if "_pb2" not in p.name]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_there_is_something_to_look_at() -> None:
    assert len(sources()) > 20


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_is_one_noun(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{lines} lines: split it by noun or shorten it"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_framework_is_imported_only_where_the_file_is_named_after_it(path: Path) -> None:
    for module in imported(path):
        prefix = FRAMEWORKS.get(module.split(".")[0])
        if prefix == "jax_" and path.name.startswith("optax_"):
            continue
        if prefix == "optax_" and path.parent.name == "demo" and path.name.startswith("jax_"):
            continue  # a user's own job: it chooses its optimizer
        assert prefix is None or path.name.startswith(prefix), f"imports {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_are_imported_by_their_full_name(path: Path) -> None:
    assert not {module.split(".")[0] for module in imported(path)} & set(PACKAGES)


def test_the_maths_needs_the_standard_library_and_array_api_compat_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"array_api_compat", "gradiometer"}
    for path in (ROOT / "stats_core").glob("*.py"):
        assert {module.split(".")[0] for module in imported(path)} <= allowed, path.name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gradiometer", "torch jax flax optax opacus grpc numpy pyarrow duckdb"),
        ("gradiometer.stats_core", "torch jax flax optax opacus grpc pyarrow duckdb"),
        ("gradiometer.collectors.publisher", "torch jax flax optax opacus pyarrow duckdb starlette"),
        ("gradiometer.server.app", "torch jax flax optax opacus"),
    ],
)
def test_importing_imports_nothing_heavy(module: str, absent: str) -> None:
    code = f"import sys, {module}\nsys.exit(', '.join(sorted(set({absent.split()!r}) & set(sys.modules))) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    import gradiometer

    for name in gradiometer.__all__:
        assert getattr(gradiometer, name) is not None
    assert dir(gradiometer) == sorted(gradiometer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gradiometer.nothing  # noqa: B018


def test_dependencies_point_down() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
