import pytest
import ray
from programs import KeptForAllRanks
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from kithara_ray.orchestration.cluster.jax_trainer import InterruptibleTrainer

_context = None


@pytest.fixture(scope="session", autouse=True)
def _cheap_runs():
    """Of runs that are driven by the test process: programs that all ranks keep, and no actor that would clean up
    after a controller that is gone. Those of jobs and searches are as they are."""
    create = InterruptibleTrainer._create_default_callbacks

    def cheap(trainer):
        kept = [one for one in create(trainer) if not isinstance(one, PlacementGroupCleanerCallback)]
        return [*kept, KeptForAllRanks()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterruptibleTrainer, "_create_default_callbacks", cheap)
        yield


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
    if nextitem is None or {"cluster", "no_cluster"}.isdisjoint(nextitem.fixturenames):
        ray.shutdown()
