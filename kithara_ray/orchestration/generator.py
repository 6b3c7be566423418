"""The workers behind `KerasHubModel.generate`: one actor on one CPU device, or a group that shares the weights."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.generation import describe_not_done, read_generation
from kithara_ray.model import runtime
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.worker.entry import Entry, Loop, imported
from kithara_ray.sharding.shape import MeshShape

# The loop that each worker of a group imports and runs. Tests substitute their own loop.
GENERATE_LOOP: str | Loop = "kithara_ray.orchestration.decoding:generate_loop"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """The weights to decode with.

    Attributes:
        base: handle or directory of the weights.
        lora, adapter: settings and tensors of the adapter applied to them. Without tensors the base decodes as it is.
    """

    base: str
    lora: LoraConfig | None
    precision: str
    adapter: Mapping[str, np.ndarray] | None


@dataclass(frozen=True)
class Request:
    """The arguments of `KerasHubModel.generate`.

    Attributes:
        tokenizer: a tokenizer, or its handle.
        chat_template, ends: see `kithara_ray.sft.tokens.prompts.Prompting`.
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
    """One request to a group of workers; for `platform` and `num_workers` see `spec.RunSpec`."""

    weights: Weights
    request: Request
    mesh: MeshShape | None
    platform: str
    num_workers: int


class Generator:
    """The model of an actor or of this process: it loads the weights and continues prompts with them."""

    def __init__(self, weights: Weights, mesh: MeshShape | None = None):
        runtime.prepare()
        self._decoding = imported("kithara_ray.orchestration.decoding:Decoding")(weights, mesh)

    def generate(self, request: Request) -> list[str] | list[list[int]]:
        """See `KerasHubModel.generate`."""
        return self._decoding.generate(request)


def generate_on_group(group: WorkerGroup, weights: Weights, request: Request, mesh: MeshShape | None) -> Any:
    """Run `GENERATE_LOOP` in every worker of a group, and return rank 0's answer."""
    group.wait()
    spec = GroupSpec(weights, request, mesh, group.platform, group.num_workers)
    return group.run(Entry(GENERATE_LOOP), {"spec": spec}).return_value


@functools.lru_cache(maxsize=64)
def tell_generation(base: str) -> None:
    """Log, once per process, the settings of the base's generation_config.json that `generate` ignores."""
    for text in describe_not_done(read_generation(BaseCheckpoint.at(base).directory)):
        logger.warning("%s", text)


def start_generator(weights: Weights) -> ActorHandle:
    """Start the actor on any node. It requests no CPU from the scheduler, so it also starts on a full cluster."""
    env = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "XLA_FLAGS": ""}
    made: Any = ray.remote(Generator).options(num_cpus=0, runtime_env={"env_vars": env}).remote(weights)
    return made
