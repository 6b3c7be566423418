"""The actor behind `KerasHubModel.generate`: one model on one CPU device. Its process imports no Ray Train."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.generation import describe_not_done, read_generation
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model import runtime
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.worker.entry import imported

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

    @property
    def adapted(self) -> LoraConfig | None:
        """The LoRA settings that the model is built with; None builds the base alone.

        An adapter that is not trained yet is built with its initial values, which change no output, so the program
        compiled for it serves after training too. DoRA's initial magnitudes round, so the base decodes without them.
        """
        if self.lora is None or (self.adapter is None and self.lora.use_dora):
            return None
        return self.lora


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


class Generator:
    """The model of an actor or of this process: it loads weights and continues prompts with them."""

    def __init__(self, weights: Weights | None = None):
        runtime.prepare()
        runtime.keep_compiled("cpu")
        self._decoding = None
        if weights is not None:
            self.load(weights)

    def load(self, weights: Weights) -> None:
        """Load weights. If they fit the model that is here, it stays, and so do its compiled programs."""
        if self._decoding is None or not self._decoding.fits(weights):
            self._decoding = None  # frees the old model first
            self._decoding = imported("kithara_ray.orchestration.decoding:Decoding")(weights)
        else:
            self._decoding.load(weights)

    def unload(self) -> None:
        """Free the memory of the weights."""
        if self._decoding is not None:
            self._decoding.unload()

    def generate(self, request: Request) -> list[str] | list[list[int]]:
        """See `KerasHubModel.generate`."""
        assert self._decoding is not None
        return self._decoding.generate(request)


class GeneratorActor:
    """The actor as its user sees it. Its process starts with the first request, and ends with `end`."""

    def __init__(self):
        self._actor: ActorHandle | None = None
        self._is_loaded = False

    def generate(self, weights: Weights, request: Request) -> Any:
        """Continue prompts; `weights` are read only if none are loaded.

        Raises:
            KitharaRayError: the weights or the request are wrong.
        """
        if not self._is_loaded:
            self._load(weights)
        assert self._actor is not None
        return remote_get(self._actor.generate.remote(request))

    def _load(self, weights: Weights) -> None:
        if self._actor is not None:
            try:
                remote_get(self._actor.load.remote(weights))
            except RayActorError:  # it died while it was idle, perhaps with its node
                self._actor = None
        if self._actor is None:
            self._actor = _started()
            remote_get(self._actor.load.remote(weights))
        self._is_loaded = True

    def unload(self) -> None:
        """Free the memory of the weights. The process stays, with the programs that it has compiled."""
        if self._actor is not None and self._is_loaded:
            self._actor.unload.remote()
        self._is_loaded = False

    def end(self) -> None:
        """End the process."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor, self._is_loaded = None, False


@functools.lru_cache(maxsize=64)
def tell_generation(base: str) -> None:
    """Log, once per process, the settings of the base's generation_config.json that `generate` ignores."""
    for text in describe_not_done(read_generation(BaseCheckpoint.at(base).directory)):
        logger.warning("%s", text)


def _started() -> ActorHandle:
    """Start the actor on any node. It requests no CPU from the scheduler, so it also starts on a full cluster."""
    env = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "XLA_FLAGS": ""}
    made: Any = ray.remote(Generator).options(num_cpus=0, runtime_env={"env_vars": env}).remote()
    return made
