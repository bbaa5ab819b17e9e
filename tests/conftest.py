"""Settings that hold for all tests: derandomised hypothesis, one thread a framework, no publishing unasked."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for name in [name for name in os.environ if name.startswith("GRADIOMETER_")]:
    del os.environ[name]
# A folder of its own for what waits for a server: tests leave nothing in the user's cache.
os.environ["GRADIOMETER_SPOOL"] = tempfile.mkdtemp(prefix="gradiometer-tests-")
atexit.register(shutil.rmtree, os.environ["GRADIOMETER_SPOOL"], ignore_errors=True)

import hypothesis  # noqa: E402 - after the environment is set
import pytest  # noqa: E402
import structlog  # noqa: E402

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """A command that a test ran logs to the stream that the test had, which is closed after it."""
    yield
    structlog.reset_defaults()
