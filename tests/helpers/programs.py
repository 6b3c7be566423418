"""Programs that a rank has compiled, kept for the ranks of the runs that come after."""

import sys

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _named_alike() -> None:
    from jax._src import cache_key

    cache_key._hash_accelerator_config = cache_key._hash_devices


class KeptForAllRanks(WorkerGroupCallback):
    """JAX writes what rank 0 has compiled. On CPUs the name that it writes it under is of rank 0's own devices, so
    the others would not find it, and the first step of every run would wait for them to compile."""

    def after_worker_group_start(self, worker_group):
        worker_group.execute(_named_alike)
