"""Greedy decoding with KerasHub's own KV cache, on weights that stay in place.

    B  prompts    T  max_length    L  blocks    K  key heads    H  head width

A decoding step handles one token per prompt, so its activations are far smaller than the weights. The activations
therefore go to the weights. Every linear layer gets the rows of all `fsdp` and `tensor` devices. Each device computes
the part of the output that its part of the weight gives. The output is then split by rows again, like the cache. No
device ever holds a whole weight.
"""

from collections.abc import Callable, Sequence

import jax
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.errors import ConfigError
from kithara_ray.model import keras_compat
from kithara_ray.model.causal_lm import CausalLM, Factors, Frozen
from kithara_ray.model.identity import IdentityMap
from kithara_ray.sharding.mesh import BATCH_AXES, batch_sharding, from_parts, replicated, split_on

# Round lengths up to this, so that prompts of similar length share a compiled program.
_LENGTH_MULTIPLE = 16


class Decoder:
    """Greedy decoding with one model, built with `scan=False`. All processes call it together.

    Attributes:
        factors, frozen: the arrays that it decodes with. The compiled programs serve any others of the same shapes.
    """

    def __init__(self, model: CausalLM, factors: Factors, frozen: Frozen):
        self._model, self.factors, self.frozen = model, factors, frozen
        model.model.compile(sampler="greedy")
        if model.mesh.size > 1:
            _keep_weights_in_place(model)

        def step(factors, frozen, token_ids_BT, padding_mask_BT, stop):
            with model.bind(factors, frozen, unstack=True):
                inputs = {"token_ids": token_ids_BT, "padding_mask": padding_mask_BT}
                return model.model.generate_step(inputs, stop_token_ids=stop)

        self.step = jax.jit(step, static_argnames="stop", out_shardings=replicated(model.mesh))

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_length: int, stop_token_ids: tuple[int, ...]
    ) -> list[list[int]]:
        """Return each prompt with its continuation, the stop token included: at most `max_length` tokens."""
        out = self.step(self.factors, self.frozen, *self.batch(prompts, max_length), stop_token_ids or None)
        ids, keep = np.asarray(out["token_ids"]), np.asarray(out["padding_mask"])
        return [
            _cut(ids[row][keep[row]].tolist(), len(prompt), max_length, stop_token_ids)
            for row, prompt in enumerate(prompts)
        ]

    def batch(self, prompts: Sequence[Sequence[int]], max_length: int) -> tuple[jax.Array, jax.Array]:
        """Arrays (token ids, mask of the given tokens), both (B, T), with a row count that the mesh divides.

        Filler rows repeat the last prompt, so they end when it does and begin no earlier.
        """
        longest = max(len(prompt) for prompt in prompts)
        if longest >= max_length:
            raise ConfigError(f"generate: max_length={max_length} leaves no token beside a prompt of {longest} tokens")
        ways = self._model.mesh.shape["data"] * self._model.mesh.shape["fsdp"]
        shape = -(-len(prompts) // ways) * ways, -(-max_length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        token_ids, given = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row in range(shape[0]):
            prompt = prompts[min(row, len(prompts) - 1)]
            token_ids[row, : len(prompt)] = prompt
            given[row, : len(prompt)] = True
        sharding = batch_sharding(self._model.mesh)
        return from_parts(shape, sharding, token_ids.__getitem__), from_parts(shape, sharding, given.__getitem__)


def _cut(row: list[int], prompt: int, max_length: int, stop: tuple[int, ...]) -> list[int]:
    row = row[:max_length]
    end = next((i for i in range(prompt, len(row)) if row[i] in stop), None)
    return row if end is None else row[: end + 1]


# --- layout of weights and activations -------------------------------------------------------------------------------


def _keep_weights_in_place(model: CausalLM) -> None:
    """Wrap the layers of a model so that its weights never move. The model must have no other use."""
    split_of = IdentityMap(
        (slot.ports[0].variable, split_on(model.mesh, model.weight_sharding(slot))) for slot in model.slots
    )

    def constrain(array, *spec):
        return jax.lax.with_sharding_constraint(array, NamedSharding(model.mesh, PartitionSpec(*spec)))

    def by_rows(array):
        return constrain(array, BATCH_AXES)

    for layer in keras_compat.all_layers(model.model.backbone):
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
            _wrap(layer, constrain, by_rows, _output_split(layer, split_of.get(layer.kernel, ())))

    embedding = model.model.backbone.token_embedding
    look_up = embedding.call

    def call(inputs, reverse=False):
        if not reverse:
            return by_rows(constrain(look_up(inputs), "data"))
        logits = look_up(constrain(inputs, "data"), reverse=True)
        return constrain(logits, "data", *[None] * (logits.ndim - 2), model.vocabulary_axes)

    embedding.call = call
    with_cache = model.model.call_with_cache

    def by_rows_and_heads(cache):
        """Split by rows and heads a whole cache, (B, L, 2, T, K, H), or one layer's keys or values, (B, T, K, H)."""
        heads = "tensor" if cache.shape[-2] % model.mesh.shape["tensor"] == 0 else None
        return constrain(cache, BATCH_AXES, *[None] * (cache.ndim - 3), heads)

    def call_with_cache(*args, **kwargs):
        logits, hidden, cache = with_cache(*args, **kwargs)
        return logits, hidden, jax.tree.map(by_rows_and_heads, cache)

    model.model.call_with_cache = call_with_cache


def _wrap(layer: keras.layers.Layer, constrain: Callable, by_rows: Callable, output_split: tuple) -> None:
    inner = layer.call

    def call(inputs, *args, **kwargs):
        # Take the layout that the weight's part gives first; for a layout by rows only, XLA would gather the weight.
        output = inner(constrain(inputs, "data"), *args, **kwargs)
        # A router gets rows and positions as one dim.
        between = [None] * (output.ndim - 1 - len(output_split))
        return by_rows(constrain(output, "data", *between, *output_split))

    layer.call = call


def _output_split(layer: keras.layers.Layer, kernel_split: tuple) -> tuple:
    """Split of the last dims of a linear layer's output, given its kernel's split."""
    if isinstance(layer, keras.layers.Dense):
        return (kernel_split[1] if kernel_split else None,)
    kernel, output = layer.equation.split(",")[1].split("->")
    split = dict(zip(kernel, kernel_split, strict=True)) if kernel_split else {}
    return tuple(split.get(label) for label in output[1:])
