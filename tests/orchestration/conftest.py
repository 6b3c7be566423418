import pytest
import ray


@pytest.fixture(scope="module")
def cluster():
    """A local Ray of four CPUs; yields its context."""
    yield ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=True)
    ray.shutdown()
