import pytest


@pytest.fixture(scope="session")
def cluster():
    """One local Ray for the tests that do not need a cluster of their own."""
    import ray

    ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
