"""The actor behind `KerasHubModel.generate`: one process, one CPU device, the whole model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from kithara_ray.hf.adapter import LoraConfig


class Generator:
    """Holds one loaded model and continues prompts with it."""

    def __init__(self, base: str, lora: LoraConfig, precision: str, adapter: dict[str, np.ndarray] | None):
        from kithara_ray.model import runtime

        runtime.prepare()
        from kithara_ray.hf import storage
        from kithara_ray.hf.checkpoint import BaseCheckpoint
        from kithara_ray.model.causal_lm import build
        from kithara_ray.model.generate import Decoder
        from kithara_ray.sharding.mesh import make_mesh

        checkpoint = BaseCheckpoint.open(storage.fetch(base))
        model = build(checkpoint.config, lora if adapter is not None else None, make_mesh(), precision, scan=False)
        factors = model.place_factors(adapter) if adapter is not None else {}
        self._decoder = Decoder(model, factors, model.load(checkpoint))
        self._stop = _eos_of(checkpoint)

    def generate(
        self,
        inputs: Any,
        tokenizer: Any,
        *,
        max_length: int,
        stop_token_ids: str | Sequence[int],
        strip_prompt: bool,
        return_decoded: bool,
        skip_special_tokens: bool,
    ) -> list[str] | list[list[int]]:
        """See `KerasHubModel.generate`."""
        from kithara_ray.model.generate import prompt_ids
        from kithara_ray.sft.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        prompts = prompt_ids(inputs, tokenizer)
        if stop_token_ids == "auto":
            stop_token_ids = sorted(
                {*self._stop, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
            )
        rows = self._decoder.greedy(prompts, max_length, tuple(stop_token_ids))
        if strip_prompt:
            rows = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        if not return_decoded:
            return rows
        return [tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


def _eos_of(checkpoint) -> list[int]:
    import json

    path = checkpoint.directory / "generation_config.json"
    stop = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    stop = checkpoint.config.get("eos_token_id") if stop is None else stop
    return [stop] if isinstance(stop, int) else list(stop or [])


def start_generator(base: str, lora: LoraConfig, precision: str, adapter: dict[str, np.ndarray] | None):
    """The actor, on any node; it asks for no CPU of the scheduler, so it starts beside a full cluster."""
    env = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "XLA_FLAGS": ""}
    return (
        ray.remote(Generator).options(num_cpus=0, runtime_env={"env_vars": env}).remote(base, lora, precision, adapter)
    )
