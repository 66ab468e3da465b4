"""Eight simulated devices for every test, and no optimisation by LLVM: tests compile more than they compute.

The workers, and the processes that tests start, share what they compile; it is thrown away at the end.

Set before JAX is imported anywhere.
"""

import atexit
import os
import socket
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="jax-tests-", ignore_cleanup_errors=True)
    atexit.register(compiled.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request):
    """A module's random numbers begin anew for each test: workers run the tests in orders of their own."""
    rng = getattr(getattr(request.node, "module", None), "rng", None)
    if rng is not None:
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture
def free_port():
    """A function that finds a port on which processes can meet."""

    def find():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    return find


def pytest_collection_modifyitems(config, items):
    """Coverage is that of the library by its own tests; tracing the others would only take time."""
    for item in items:
        if {"examples", "benchmarks"} & set(item.path.relative_to(config.rootpath).parts):
            item.add_marker(pytest.mark.no_cover)
