"""A loaded model that continues prompts. Import this only in the process that decodes, after `runtime.prepare`."""

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.generation import read_generation, stops_of
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.resizing.tables import resized
from kithara_ray.model.causal_lm import build
from kithara_ray.model.generate import decoder_of
from kithara_ray.orchestration.generator import Request, Weights
from kithara_ray.sft.tokens.prompts import prompt_ids, stop_ids
from kithara_ray.sft.tokens.tokenizer import load_tokenizer
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape


class Decoding:
    """One model and its weights. In a group, every rank holds one, and all ranks are called together."""

    def __init__(self, weights: Weights, mesh: MeshShape | None = None):
        self._checkpoint = resized(BaseCheckpoint.open(fetch(weights.base)), weights.lora)
        config = self._checkpoint.config
        self.model = build(config, weights.adapted, make_mesh(mesh), weights.precision, scan=False)
        self.decoder = decoder_of(self.model, {}, [])
        self._stop = stops_of(config, read_generation(self._checkpoint.directory))
        self._built = _kind(weights)
        self.load(weights)

    def fits(self, weights: Weights) -> bool:
        """Return True if this model can compute with these weights."""
        return _kind(weights) == self._built

    def load(self, weights: Weights) -> None:
        """Read the base's weights, and place the adapter's."""
        self.unload()  # never hold two models
        model, decoder = self.model, self.decoder
        decoder.frozen = model.load(self._checkpoint)
        if weights.adapted is None:
            decoder.factors = {}
        elif weights.adapter is None:
            decoder.factors = model.initial_factors(0, decoder.frozen)
        else:
            decoder.factors = model.place_factors(weights.adapter)

    def unload(self) -> None:
        """Let go of the weights; the compiled programs stay."""
        self.decoder.factors, self.decoder.frozen = {}, []

    def generate(self, request: Request) -> list[str] | list[list[int]]:
        """See `KerasHubModel.generate`."""
        tokenizer, vocabulary = request.tokenizer, self.model.vocabulary
        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        prompts = prompt_ids(request.inputs, tokenizer, request.chat_template, vocabulary)
        known = {*self._stop, *request.ends, tokenizer.eos_token_id} - {None}
        stops = stop_ids(request.stop_token_ids, known, vocabulary)
        rows = self.decoder.greedy(prompts, request.max_length, stops)
        if request.strip_prompt:
            rows = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        if not request.return_decoded:
            return rows
        return [tokenizer.decode(row, skip_special_tokens=request.skip_special_tokens) for row in rows]


def _kind(weights: Weights) -> tuple:
    return weights.base, weights.adapted, weights.precision
