"""Behind `KerasHubModel.generate`: one actor on one CPU device, or a group of workers that share the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.sharding.shape import MeshShape


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
    """The arguments of `KerasHubModel.generate`; tokenizer is one, or its handle."""

    inputs: Any
    tokenizer: Any
    max_length: int
    stop_token_ids: str | Sequence[int]
    strip_prompt: bool
    return_decoded: bool
    skip_special_tokens: bool


@dataclass(frozen=True)
class GroupSpec:
    """One request to a group of workers; `platform` and `num_workers` as of `spec.RunSpec`."""

    weights: Weights
    request: Request
    mesh: MeshShape | None
    platform: str
    num_workers: int


class Generator:
    """Holds one loaded model and continues prompts with it. Of a group, all ranks hold one and are asked together."""

    def __init__(self, weights: Weights, mesh: MeshShape | None = None):
        from kithara_ray.hf.fetch import fetch
        from kithara_ray.model import runtime

        runtime.prepare()
        from kithara_ray.hf.checkpoint import BaseCheckpoint
        from kithara_ray.model.causal_lm import build
        from kithara_ray.model.generate import Decoder
        from kithara_ray.sharding.mesh import make_mesh

        checkpoint = BaseCheckpoint.open(fetch(weights.base))
        lora = weights.lora if weights.adapter is not None else None
        self.model = build(checkpoint.config, lora, make_mesh(mesh), weights.precision, scan=False)
        factors = self.model.place_factors(weights.adapter) if lora is not None else {}
        self.frozen = self.model.load(checkpoint)
        self._decoder = Decoder(self.model, factors, self.frozen)
        self._stop = _eos_of(checkpoint)

    def generate(self, request: Request) -> list[str] | list[list[int]]:
        """See `KerasHubModel.generate`."""
        from kithara_ray.sft.tokens.prompts import prompt_ids
        from kithara_ray.sft.tokens.tokenizer import load_tokenizer

        tokenizer, stop_token_ids = request.tokenizer, request.stop_token_ids
        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        prompts = prompt_ids(request.inputs, tokenizer)
        if stop_token_ids == "auto":
            stop_token_ids = sorted(
                {*self._stop, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
            )
        rows = self._decoder.greedy(prompts, request.max_length, tuple(stop_token_ids))
        if request.strip_prompt:
            rows = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        if not request.return_decoded:
            return rows
        return [tokenizer.decode(row, skip_special_tokens=request.skip_special_tokens) for row in rows]


def generate_loop(config: dict[str, GroupSpec]) -> list[str] | list[list[int]]:
    """Ray Train's `train_loop_per_worker`: load, answer, end. What rank 0 returns is the answer."""
    spec = config["spec"]
    from kithara_ray.model import runtime

    runtime.prepare()
    runtime.keep_compiled(spec.platform)
    from kithara_ray.orchestration.cluster import process_setup

    process_setup.check_process_group(spec.num_workers, spec.platform)
    return Generator(spec.weights, spec.mesh).generate(spec.request)


def generate_on_group(group: WorkerGroup, weights: Weights, request: Request, mesh: MeshShape | None):
    """`generate_loop` in every worker of a group; what rank 0 answers."""
    group.wait()
    spec = GroupSpec(weights, request, mesh, group.platform, group.num_workers)
    return group.run(generate_loop, {"spec": spec}).return_value


def _eos_of(checkpoint) -> list[int]:
    import json

    path = checkpoint.directory / "generation_config.json"
    stop = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    stop = checkpoint.config.get("eos_token_id") if stop is None else stop
    return [stop] if isinstance(stop, int) else list(stop or [])


def start_generator(weights: Weights) -> ray.actor.ActorHandle:
    """The actor, on any node; it asks for no CPU of the scheduler, so it starts beside a full cluster."""
    env = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "XLA_FLAGS": ""}
    return ray.remote(Generator).options(num_cpus=0, runtime_env={"env_vars": env}).remote(weights)
