"""The reasons for which a rank leaves its run, and the hand-over of its data to the head."""

import socket

import numpy as np
from jax.experimental import multihost_utils

from kithara_ray.errors import TrainingError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import CausalLM, Params
from kithara_ray.model.weights.layout import local_slices
from kithara_ray.orchestration.cluster.process_setup import terminated
from kithara_ray.orchestration.worker.channel import Channel, WeightsSpec
from kithara_ray.orchestration.worker.spec import RunSpec
from kithara_ray.orchestration.worker.votes import FAILED, GO_ON, INTERRUPT, PREEMPTED, SAVE, STOP
from kithara_ray.sharding.agree import agree

# The highest vote of all ranks -> the reason for which they leave in order.
REASONS = {STOP: "callback", FAILED: "callback_error", INTERRUPT: "interrupt"}


def own_vote(asked: str | None, callbacks: int, drains: bool) -> int:
    """Return this rank's vote after a step.

    Args:
        asked: the head's request to all ranks.
        callbacks: the callbacks' vote.
        drains: True if the state must be saved because a node will go.
    """
    if terminated.is_set():
        return PREEMPTED
    if asked == "interrupt":
        return INTERRUPT
    return max(callbacks, SAVE if drains else GO_ON)


def preempted(rank: int, saved: str) -> TrainingError:
    """Return an error that names the ranks whose machines are taken away; all ranks call this."""
    told = agree(f"rank {rank} on {socket.gethostname()} received SIGTERM" if terminated.is_set() else "")
    return TrainingError(f"preempted: {', '.join(text for text in told if text)}; {saved}")


def hand_over(spec: RunSpec, rank: int, base: BaseCheckpoint, model: CausalLM, params: Params) -> None:
    """Send this rank's part of the adapter, or of the trained weights; all ranks call this."""
    if spec.model.lora is not None:
        spec.channel.put_shards(rank, model.adapter_shards(params, rank))
        return
    names = [port.hf_name for slot in model.slots for port in slot.ports]
    dtype = str(next(iter(params.values())).dtype)
    _send_weights(spec.channel, WeightsSpec(spec.model.base, names, dtype, spec.directory), rank, base, model, params)


def _send_weights(
    channel: Channel, weights: WeightsSpec, rank: int, base: BaseCheckpoint, model: CausalLM, params: Params
) -> None:
    token = channel.begin_weights(weights) if rank == 0 else 0
    # No rank sends before there is a place to write to. The token also exposes a rank of an earlier attempt.
    token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
    slices = local_slices(base, model.slots, [params[slot.key] for slot in model.slots], rank)
    channel.put_slices(token, slices)
