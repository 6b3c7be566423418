"""The test process computes on four CPU devices, so that sharding is tested anywhere; set before jax is imported."""

import os
import shutil
import sys
import tempfile

from compiled import kept_programs

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "jax"
# Ray's usage statistics would go out to the network.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers are nice, and would wait for the suite's other process.
os.environ["RAY_worker_niceness"] = "0"
# How often Ray Train looks at its workers, which is how long the end of a run is waited for; and Ray Tune writes.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1"
# A process more of each run, which asks whether a node will go: of these clusters none does.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
# Programs that several tests compile are compiled once: by pytest's processes and by all that they start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(kept_programs())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # All temporary files of the run, also of processes that tests kill: removed at its end. Ray's sockets are below it,
    # and their paths are bounded, so it is short. pytest's own directories stay where they are, to be looked at.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="kr_", dir="/tmp")

import pytest
from sizes import SIZES
from tiny import LIKE_OTHERS, mostly_long, write_model

from kithara_ray.model import runtime

runtime.prepare()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """family -> directory, written when first asked for; tests must not write into it."""

    class Models(dict):
        def __missing__(self, family):
            self[family] = write_model(tmp_path_factory.mktemp(family), family)
            return self[family]

    return Models()


@pytest.fixture(params=["gemma2", "llama"])
def family(request):
    """Two that differ in all that is general: blocks in periods or alike, windows, soft caps."""
    return request.param


@pytest.fixture(params=mostly_long(sorted(SIZES.keys() - LIKE_OTHERS)))
def every_family(request):
    return request.param


@pytest.fixture
def hastily():
    """Compile without LLVM's optimisations. Programs that run once or twice take less time in all; their last bits
    differ."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def _needs_ray(item) -> int:
    """2: the cluster of tests/orchestration. 1: one of its own. 0: none."""
    return 2 if "cluster" in item.fixturenames else int("no_cluster" in item.fixturenames)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Put tests that need Ray first, since they take longest, and name each test's group for `--dist loadgroup`.

    All tests that start a Ray cluster run in one process: of two clusters on one machine, a job that was given to one
    may join the other, and their agents want the same port. The other tests of a file share its fixtures in a process.
    """
    items.sort(key=_needs_ray, reverse=True)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if _needs_ray(item) else item.location[0]))


@pytest.fixture(autouse=True)
def _no_stray_cluster(request):
    """A cluster that is started elsewhere stays for the rest of the process, beside the one of tests/orchestration."""
    yield
    if "ray" in sys.modules and not _needs_ray(request.node):
        assert not sys.modules["ray"].is_initialized(), "this test starts Ray: give it `cluster` or `no_cluster`"
