import gc

import pytest
import ray
from observed import train_observed
from programs import KeptForAllRanks
from ray._private import auto_init_hook
from tiny import with_mild_attention

from kithara_ray.orchestration.cluster.jax_trainer import InterruptibleTrainer


def stop_ray():
    """Stop the cluster of this process, after the finalisers that call it: Ray Data's would start another one."""
    if ray.is_initialized():
        gc.collect()
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _cheap_runs():
    """Let runs that the test process drives keep programs for all ranks. Jobs and searches stay as they are."""
    create = InterruptibleTrainer._create_default_callbacks

    def cheap(trainer):
        return [*create(trainer), KeptForAllRanks()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterruptibleTrainer, "_create_default_callbacks", cheap)
        yield


@pytest.fixture(scope="session")
def cluster():
    """A local Ray of four CPUs, for all files but those that start another, which come after; yields its context."""
    return ray.init("local", num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=True)


@pytest.fixture(scope="session")
def observed(cluster, tiny_models, tmp_path_factory):
    """One finished run for many tests, see `observed.Observed`; they change nothing of it."""
    root = tmp_path_factory.mktemp("observed")
    return train_observed(with_mild_attention(tiny_models["llama"], root / "base"), root)


@pytest.fixture(scope="module")
def no_cluster():
    """For a file that starts a cluster of its own."""
    stop_ray()
    yield
    stop_ray()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """What is behind these tests, in the same process, has no Ray."""
    if nextitem is None or {"cluster", "no_cluster"}.isdisjoint(nextitem.fixturenames):
        stop_ray()
        # Nor may a finaliser that is late start one.
        auto_init_hook.enable_auto_connect = False
