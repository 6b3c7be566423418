"""Behind `KerasHubModel.generate`: one actor on one CPU device, or a group of workers that share the weights."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.generation import describe_not_done, read_generation
from kithara_ray.model import runtime
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.worker.entry import Entry, Loop, imported
from kithara_ray.sharding.shape import MeshShape

# What every worker of a group runs, imported there. Tests put a loop of their own.
GENERATE_LOOP: str | Loop = "kithara_ray.orchestration.decoding:generate_loop"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What is decoded with.

    Attributes:
        base: handle or directory of the weights.
        lora, adapter: what is put beside them; without tensors nothing is.
    """

    base: str
    lora: LoraConfig | None
    precision: str
    adapter: Mapping[str, np.ndarray] | None


@dataclass(frozen=True)
class Request:
    """The arguments of `KerasHubModel.generate`.

    Attributes:
        tokenizer: one, or its handle.
        chat_template, ends: as of `kithara_ray.sft.tokens.prompts.Prompting`.
    """

    inputs: Any
    tokenizer: Any
    max_length: int
    stop_token_ids: str | Sequence[int]
    strip_prompt: bool
    return_decoded: bool
    skip_special_tokens: bool
    chat_template: str | None = None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class GroupSpec:
    """One request to a group of workers; `platform` and `num_workers` as of `spec.RunSpec`."""

    weights: Weights
    request: Request
    mesh: MeshShape | None
    platform: str
    num_workers: int


class Generator:
    """An actor's model, or this process' own: loads it and continues prompts with it."""

    def __init__(self, weights: Weights, mesh: MeshShape | None = None):
        runtime.prepare()
        self._decoding = imported("kithara_ray.orchestration.decoding:Decoding")(weights, mesh)

    def generate(self, request: Request) -> list[str] | list[list[int]]:
        """See `KerasHubModel.generate`."""
        return self._decoding.generate(request)


def generate_on_group(group: WorkerGroup, weights: Weights, request: Request, mesh: MeshShape | None):
    """`GENERATE_LOOP` in every worker of a group; returns what rank 0 answers."""
    group.wait()
    spec = GroupSpec(weights, request, mesh, group.platform, group.num_workers)
    return group.run(Entry(GENERATE_LOOP), {"spec": spec}).return_value


@functools.lru_cache(maxsize=64)
def tell_generation(base: str) -> None:
    """Name, once a process, what the base's generation_config.json asks for and `generate` does not do."""
    for text in describe_not_done(read_generation(BaseCheckpoint.at(base).directory)):
        logger.warning("%s", text)


def start_generator(weights: Weights) -> ray.actor.ActorHandle:
    """The actor, on any node; it asks for no CPU of the scheduler, so it starts beside a full cluster."""
    env = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "XLA_FLAGS": ""}
    return ray.remote(Generator).options(num_cpus=0, runtime_env={"env_vars": env}).remote(weights)
