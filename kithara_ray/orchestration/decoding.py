"""A loaded model that continues prompts. Import this only in the process that decodes, after `runtime.prepare`."""

from typing import Any

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.generation import read_generation, stops_of
from kithara_ray.hf.fetch import fetch
from kithara_ray.model.causal_lm import build
from kithara_ray.model.generate import Decoder
from kithara_ray.orchestration.cluster import process_setup
from kithara_ray.orchestration.generator import GroupSpec, Request, Weights
from kithara_ray.sft.tokens.prompts import prompt_ids, stop_ids
from kithara_ray.sft.tokens.tokenizer import load_tokenizer
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape


class Decoding:
    """One loaded model. In a group, every rank holds one, and all ranks are called together."""

    def __init__(self, weights: Weights, mesh: MeshShape | None = None):
        checkpoint = BaseCheckpoint.open(fetch(weights.base))
        adapter = weights.adapter if weights.lora is not None else None
        lora = weights.lora if adapter is not None else None
        self.model = build(checkpoint.config, lora, make_mesh(mesh), weights.precision, scan=False)
        factors = self.model.place_factors(adapter) if adapter is not None else {}
        self.frozen = self.model.load(checkpoint)
        self._decoder = Decoder(self.model, factors, self.frozen)
        self._stop = stops_of(checkpoint.config, read_generation(checkpoint.directory))

    def generate(self, request: Request) -> list[str] | list[list[int]]:
        """See `KerasHubModel.generate`."""
        tokenizer, vocabulary = request.tokenizer, self.model.vocabulary
        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        prompts = prompt_ids(request.inputs, tokenizer, request.chat_template, vocabulary)
        known = {*self._stop, *request.ends, tokenizer.eos_token_id} - {None}
        stops = stop_ids(request.stop_token_ids, known, vocabulary)
        rows = self._decoder.greedy(prompts, request.max_length, stops)
        if request.strip_prompt:
            rows = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        if not request.return_decoded:
            return rows
        return [tokenizer.decode(row, skip_special_tokens=request.skip_special_tokens) for row in rows]


def generate_loop(config: dict[str, Any]) -> list[str] | list[list[int]]:
    """Run a worker's loop, see `worker.entry`: load the weights, answer and end. The group's answer is rank 0's."""
    spec: GroupSpec = config["spec"]
    process_setup.check_process_group(spec.num_workers, spec.platform)
    return Decoding(spec.weights, spec.mesh).generate(spec.request)
