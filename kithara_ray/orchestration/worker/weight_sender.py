"""Trained weights from the ranks that hold them to the coordinator that writes them, a slice at a time.

Ray's object store carries the slices, so no file system needs to be shared. On the way are at most `_IN_FLIGHT` slices
of a rank, of `layout.SLICE_BYTES` each.
"""

import numpy as np
import ray

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import CausalLM, Params
from kithara_ray.model.weights.layout import local_slices

_IN_FLIGHT = 2


def send_weights(
    coordinator: ray.actor.ActorHandle,
    handle: str,
    base: BaseCheckpoint,
    model: CausalLM,
    params: Params,
    rank: int,
    directory: str,
) -> None:
    """All ranks call this. The coordinator writes what they send into a new directory below `directory`.

    Args:
        handle: of `base`, which the coordinator opens on its own host.
    """
    from jax.experimental import multihost_utils

    token = 0
    if rank == 0:
        names = [port.hf_name for slot in model.slots for port in slot.ports]
        dtype = str(next(iter(params.values())).dtype)
        token = ray.get(coordinator.begin_weights.remote(handle, names, dtype, directory))
    # Nobody sends before there is somewhere to write; and what a rank of an earlier attempt sends is known by it.
    token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
    pending: list[ray.ObjectRef] = []
    for part in local_slices(base, model.slots, [params[slot.key] for slot in model.slots], rank):
        if len(pending) == _IN_FLIGHT:
            done, pending = ray.wait(pending, num_returns=1)
            ray.get(done)
        pending.append(coordinator.put_slice.remote(token, part))
    ray.get(pending)
