import pytest
import ray

_context = None


@pytest.fixture(scope="module")
def cluster():
    """A local Ray of four CPUs, for all files but those that start another; yields its context."""
    global _context
    if not ray.is_initialized():
        _context = ray.init("local", num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=True)
    return _context


@pytest.fixture(scope="module")
def no_cluster():
    """For a file that starts a cluster of its own."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """What is behind these tests, in the same process, has no Ray."""
    if nextitem is None or "orchestration" not in nextitem.path.parts:
        ray.shutdown()
