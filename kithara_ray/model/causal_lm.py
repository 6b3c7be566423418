"""A KerasHub causal LM built without weights, and the pure functions over its arrays.

    B  rows of the batch    T  positions    D  hidden width    V  vocabulary

`build` constructs the model. Its variables have shapes but no values; the values are in separate arrays (`arrays`).
Every computation is a function of (params, frozen, batch). `params` holds the trained arrays: the adapter's factors, or
all weights. `frozen` holds the weights, or nothing if `params` does.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.tower import text_of
from kithara_ray.model import keras_compat
from kithara_ray.model.blocks import attention, balance, embedding, experts, mixtures, stack
from kithara_ray.model.blocks.dropout import dropping
from kithara_ray.model.families import family_of, ports
from kithara_ray.model.families.moe import check_router_loss
from kithara_ray.model.identity import IdentityMap, IdentitySet
from kithara_ray.model.lora import base_weights, layers
from kithara_ray.model.lora.inject import inject
from kithara_ray.model.options import ModelOptions, chunk_length
from kithara_ray.model.weights import slots
from kithara_ray.model.weights.arrays import Factors, Frozen, ModelArrays, Params
from kithara_ray.model.weights.quantized import Quantized, in_floats
from kithara_ray.sharding.mesh import BATCH_AXES, WEIGHT_AXES, replicated, split_on


@dataclass(kw_only=True)
class CausalLM(ModelArrays):
    """A built model: its computations, and its arrays through `ModelArrays`.

    Attributes:
        model: the `keras_hub.models.CausalLM`; its variables hold no values.
        chain: the decoder blocks.
        dropout: fraction of the side paths' input that training drops.
        zeros: factors of layers that are not targets; see `layers.Target`.
        share: the least share of its experts that a routed mixture sends a token to; 1.0 if nothing is routed.
    """

    model: keras.Model
    chain: stack.Chain
    dropout: float
    zeros: Sequence[keras.Variable] = ()
    share: float = 1.0

    @property
    def vocabulary(self) -> int:
        return self.model.backbone.vocabulary_size

    @property
    def num_active(self) -> int:
        """Number of parameters that compute a token: of the experts of a mixture, only those that it is sent to."""
        unused = IdentitySet(self.zeros)
        shares = ((v, share) for v, share in mixtures.shares(self.chain.blocks).items() if v not in unused)
        return self.num_parameters - round(sum(math.prod(v.shape) * (1 - share) for v, share in shares))

    @property
    def mixture_blocks(self) -> list[int]:
        """Numbers of the decoder blocks with experts, from 0."""
        return [number for number, block in enumerate(self.chain.blocks) if mixtures.layers_of((block,))]

    @property
    def vocabulary_axes(self) -> tuple[str, ...] | None:
        """Mesh axes that split the logits' vocabulary; None if they do not divide it."""
        ways = math.prod(self.mesh.shape[axis] for axis in WEIGHT_AXES)
        return WEIGHT_AXES if self.vocabulary % ways == 0 else None

    def hidden_BTD(self, params: Params, frozen: Frozen, token_ids_BT, segment_ids_BT, dropout_key=None) -> jax.Array:
        """Compute the backbone's last hidden states.

        A token sees only tokens of its own segment; `segment_ids` is 0 on padding. `dropout_key` drops a part of the
        side paths' input if the LoRA settings ask for dropout; None drops nothing.
        """
        return self.measured(params, frozen, token_ids_BT, segment_ids_BT, dropout_key)[0]

    def measured(
        self, params: Params, frozen: Frozen, token_ids_BT, segment_ids_BT, dropout_key=None, measures=()
    ) -> tuple[jax.Array, balance.Load]:
        """Compute the last hidden states, and these measures of the mixtures' loads, (L, B, E); see `balance`.

        Without the scan nothing is measured.
        """
        positions_BT = jnp.broadcast_to(jnp.arange(token_ids_BT.shape[1]), token_ids_BT.shape)
        given = {"token_ids": token_ids_BT, "padding_mask": segment_ids_BT, "position_ids": positions_BT}
        inputs = {symbolic.name: jnp.asarray(given[symbolic.name]) for symbolic in self.model.backbone.inputs}
        with self.bind(params, frozen, unstack=not self.options.scan):
            if not self.options.scan:
                with dropping(dropout_key):
                    return self.model.backbone(inputs, training=False), {}
            factors, frozen = self.roles(params, frozen)[0], self.weights_of(params, frozen)
            value_of = self._values(factors, frozen)
            how = stack.Pass(
                values_of=lambda block: [value_of[variable] for variable in block.variables],
                scanned=self._scanned(factors, frozen),
                gather=self._gathered(),
                place=self._rows_split,
                remat=self.options.remat,
                chunk=self._chunk(token_ids_BT),
                dropout_key=dropout_key,
                measures=measures,
            )
            hidden_BTD, parts = stack.run(self.model.backbone, self.chain, inputs, how)
            return hidden_BTD, jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if parts else {}

    def _chunk(self, token_ids_BT: jax.Array) -> int:
        rows, positions = token_ids_BT.shape
        ways = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        # An expert of this device gets tokens from all devices on the axis `expert`.
        share = min(1.0, self.share * self.mesh.shape["expert"])
        return chunk_length(-(-rows // ways), positions, self.options.remat, share)

    def head_V(self, head: Sequence[jax.Array], hidden) -> jax.Array:
        """Compute logits (..., V) from hidden states (..., D), soft-capped if the family does so.

        The head has no factors. The vocabulary is split if the mesh divides it, and the rows are not: moving hidden
        states costs less than moving the head's weight.

        Args:
            head: the result of `head_weights`.
        """
        hidden = self._constrain(hidden, "data")
        bound = zip((slot.ports[0].variable for slot in self._head_slots()), head, strict=True)
        with keras.StatelessScope(state_mapping=list(bound)):
            logits = self.model.backbone.token_embedding(hidden, reverse=True)
        return self._constrain(logits, "data", *[None] * (logits.ndim - 2), self.vocabulary_axes)

    def head_weights(self, params: Params, frozen: Frozen) -> list[jax.Array]:
        """The weights that `head_V` computes with: the head's own weight, or the embedding that it is tied to."""
        array_of = IdentityMap(zip(self.slots, self.weights_of(params, frozen), strict=True))
        return [in_floats(array_of[slot]) for slot in self._head_slots()]

    @property
    def trains_head(self) -> bool:
        """True if any array that `head_V` computes with is trained."""
        read = IdentitySet(self._head_slots())
        return self.trains_weights or any(self.slots[slot.number] in read for slot in self.base_slots)

    def _head_slots(self) -> list[slots.Slot]:
        embedding = self.model.backbone.token_embedding
        # An untied head does not include the table that tokens are looked up in.
        table = () if embedding.tie_weights else (embedding.embeddings,)
        read = IdentitySet(embedding.variables) - IdentitySet(table)
        return [slot for slot in self.slots if slot.ports[0].variable in read]

    def logits_BTV(self, params: Params, frozen: Frozen, token_ids_BT, segment_ids_BT) -> jax.Array:
        hidden = self.hidden_BTD(params, frozen, token_ids_BT, segment_ids_BT)
        return self.head_V(self.head_weights(params, frozen), hidden)

    def bind(self, params: Params, frozen: Frozen, unstack: bool) -> keras.StatelessScope:
        """Bind the model's variables to these values in a scope; without `unstack`, only those outside the scan."""
        return keras.StatelessScope(state_mapping=self.values(params, frozen, unstack))

    def values(self, params: Params, frozen: Frozen, unstack: bool) -> list[tuple[keras.Variable, jax.Array]]:
        """Pair the model's variables with their values; without `unstack`, only those outside the scan."""
        factors, frozen = self.roles(params, frozen)[0], self.weights_of(params, frozen)
        pairs = [
            (port.variable, value)
            for slot, array in zip(self.slots, frozen, strict=True)
            if unstack or not slot.stacked
            for port, value in slot.split(array)
        ]
        pairs += self._each_factor(factors, unstack)
        seeds = (variable for variable in self.model.variables if ports.is_seed(variable))
        return pairs + [(v, jnp.zeros(v.shape, v.dtype)) for v in seeds]

    def _each_factor(self, factors: Factors, unstack: bool) -> Iterator[tuple[keras.Variable, jax.Array]]:
        yield from ((variable, jnp.zeros(variable.shape, variable.dtype)) for variable in self.zeros)
        for slot in self.factor_slots:
            if not slot.stacked:
                yield slot.variables[0], factors[slot.key]
            elif unstack:
                yield from zip(slot.variables, factors[slot.key], strict=True)

    def _values(self, factors: Factors, frozen: Frozen) -> IdentityMap[keras.Variable, jax.Array | Quantized]:
        """The value of every variable that is not stacked."""
        plain = ((slot, array) for slot, array in zip(self.slots, frozen, strict=True) if not slot.stacked)
        values = IdentityMap((slot.ports[0].variable, array) for slot, array in plain)
        return values | IdentityMap(self._each_factor(factors, unstack=False))

    def _scanned(self, factors: Factors, frozen: Frozen) -> list[list[list[jax.Array | Quantized]]]:
        """The values of all steps, for each section, each place of its period and each variable of its block."""
        pairs = zip(self.slots, frozen, strict=True)
        arrays = IdentityMap((slot.ports[0].variable, array) for slot, array in pairs if slot.stacked)
        # Most factors are small: one gather for all steps costs less than one per step.
        whole = lambda slot: factors[slot.key] if slot.by_step else self._whole(factors[slot.key])  # noqa: E731
        stacked = [slot for slot in self.factor_slots if slot.stacked]
        arrays |= IdentityMap((slot.peers[0], slot.of_all_steps(whole(slot))) for slot in stacked)
        peers, layouts = self.chain.peers(), self._layouts()
        single = self._values(factors, frozen)

        def all_steps(variable: keras.Variable, steps: int) -> jax.Array | Quantized:
            if variable in arrays:
                return arrays[variable]
            if ports.is_seed(variable):
                return jnp.zeros((steps, *variable.shape), variable.dtype)
            of_all = jnp.stack([in_floats(single[peer]) for peer in peers[variable]])
            of_step = layouts.get(variable, replicated(self.mesh))
            layout = NamedSharding(of_step.mesh, PartitionSpec(None, *of_step.spec))
            return jax.lax.with_sharding_constraint(of_all, layout)

        return [
            [[all_steps(v, section.steps) for v in block.variables] for block in section.blocks[: section.period]]
            for section in self.chain.sections
        ]

    # --- layout of the arrays ----------------------------------------------------------------------------------------

    def _constrain(self, array: jax.Array, *spec) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def _whole(self, array: jax.Array) -> jax.Array:
        return self._constrain(array)

    def _layouts(self) -> IdentityMap[keras.Variable, NamedSharding]:
        """The layout of one step's value of each weight, and of each factor that is gathered by step."""
        weights = [(slot.ports[0].variable, slot.stacked, self.weight_sharding(slot)) for slot in self.slots]
        return IdentityMap(
            (variable, NamedSharding(layout.mesh, PartitionSpec(*tuple(layout.spec)[int(stacked) :])))
            for variable, stacked, layout in (*weights, *self._by_step())
        )

    def _by_step(self) -> list[tuple[keras.Variable, bool, NamedSharding]]:
        """The factors that are gathered by step: the first step's variable, whether they are stacked, their layout."""
        slots = [slot for slot in self.factor_slots if slot.by_step]
        return [
            (slot.peers[0] if slot.stacked else slot.variables[0], slot.stacked, self.factor_sharding(slot))
            for slot in slots
        ]

    def _gathered(self) -> stack.Gather:
        """A function that gathers a block's weight for its computation; `tensor` stays, and `expert` of experts."""
        layouts = self._layouts()
        factors = IdentitySet(variable for variable, *_ in self._by_step())

        def gather(variable: keras.Variable, value: jax.Array | Quantized) -> jax.Array:
            layout = layouts.get(variable, replicated(self.mesh))
            kept = ("expert", "tensor") if variable in self.experts else ("tensor",)
            gathered = [next((axis for axis in kept if axis in axes), None) for axes in split_on(self.mesh, layout)]
            if isinstance(value, Quantized):
                return self._gather_of_integers(value, gathered).floats(variable.dtype)
            if variable in factors:
                return self._gather_of_trained(value, [None] * len(gathered), layout)
            if not self.trains_weights:
                return self._constrain(value, *gathered)
            return self._gather_of_trained(value, gathered, layout)

        return gather

    def _gather_of_integers(self, value: Quantized, gathered: Sequence) -> Quantized:
        """Gather integers and their scales. The devices move bytes, and the receiver makes floats."""
        # Scales have the dims of the values; those of size 1 cannot be split.
        sizes = value.scales.shape[: len(gathered)]
        channels = [None if size == 1 else axes for axes, size in zip(gathered, sizes, strict=True)]
        values, scales = self._constrain(value.values, *gathered), self._constrain(value.scales, *channels)
        return replace(value, values=values, scales=scales)

    def _gather_of_trained(self, value: jax.Array, gathered: Sequence, layout: NamedSharding) -> jax.Array:
        """Gather a trained weight; in every step of the scan, its gradient takes the weight's own layout.

        A constraint's own gradient would keep the gathered layout. All steps' gradients would then take as much memory
        as the whole model.
        """

        @jax.custom_vjp
        def gather(value):
            return self._constrain(value, *gathered)

        in_its_layout = lambda grad: jax.lax.with_sharding_constraint(grad, layout)  # noqa: E731
        gather.defvjp(lambda value: (gather(value), None), lambda _, grad: (in_its_layout(grad),))
        return gather(value)

    def _rows_split(self, array: jax.Array) -> jax.Array:
        return self._constrain(array, BATCH_AXES)


def build(
    config: Mapping, lora_config: LoraConfig | None, mesh: Mesh, precision: str = "mixed_bfloat16", **options: Any
) -> CausalLM:
    """Build the model that a Hugging Face config.json describes, without weights.

    Args:
        config: the parsed config.json; of a multimodal model, only the text model is built.
        lora_config: the layers to adapt; None adapts nothing, and trains either all weights or none.
        mesh: the devices that will hold the model's arrays.
        precision, options: the fields of `ModelOptions`: scan, remat, stack_factors, quantize, train_weights,
            routed, router_aux_loss_coef.

    Raises:
        UnsupportedError: KerasHub cannot honour the family, or a field that changes the mathematics; or an auxiliary
            loss of routers that is not known.
        ConfigError: an option is unknown, or a target module matches nothing.
    """
    chosen = ModelOptions(precision=precision, **options)
    model, recorded = _with_ports(config, chosen)
    backbone = model.backbone
    linear = layers.linear_modules(backbone, recorded, config).values() if chosen.quantize else ()
    kernels = [layer.kernel for layer in linear]
    with keras_compat.without_values():
        targets = inject(backbone, recorded, lora_config, config, alike=chosen.scan) if lora_config else []
    chain = stack.find_chain(backbone)
    attention.install(chain.blocks, mesh, chosen.remat)
    routes = _routes(chosen, mesh)
    mixtures.check_axis(chain.blocks, mesh)
    if routes:
        mixtures.install(chain.blocks, partial(experts.routed, mesh=mesh, trains=chosen.train_weights))
    elif any(target.by_step for target in targets):
        # KerasHub's own computation knows no factors.
        mixtures.install(chain.blocks, experts.dense)
    splits = routes and mesh.shape["expert"] > 1
    apart = [kernel for bank in mixtures.banks_of(chain.blocks) for kernel in bank.kernels] if splits else ()
    balance.observe(chain.blocks)
    if chosen.router_aux_loss_coef:
        check_router_loss(text_of(config))
    for table in keras_compat.all_layers(backbone):
        if isinstance(table, keras.layers.Embedding):
            embedding.install(table, mesh)
    scanned = chain if chosen.scan else None
    stacked = scanned if chosen.stack_factors or not chosen.train_weights else None
    weights = slots.slots(backbone, recorded, stacked, chosen.quantize, kernels)
    return CausalLM(
        model=model,
        slots=weights,
        factor_slots=layers.factor_slots(targets, scanned if chosen.stack_factors else None),
        chain=chain,
        mesh=mesh,
        options=chosen,
        dropout=lora_config.lora_dropout if lora_config else 0.0,
        zeros=layers.zero_factors(targets),
        base_slots=base_weights.base_slots(backbone, weights, lora_config, chosen.stack_factors),
        experts=IdentitySet(apart),
        share=min(mixtures.shares(chain.blocks).values(), default=1.0) if routes else 1.0,
    )


def _routes(options: ModelOptions, mesh: Mesh) -> bool:
    """True if a mixture computes the chosen experts only."""
    if options.routed is None:
        return options.scan and (mesh.devices.flat[0].platform == "tpu" or mesh.shape["expert"] > 1)
    return options.routed


def _with_ports(config: Mapping, options: ModelOptions) -> tuple[keras.Model, list[ports.Port]]:
    """Build KerasHub's `keras_hub.models.CausalLM` without values, and list the tensors that feed it."""
    family = family_of(config)
    with keras_compat.without_values():
        backbone = family.build(text_of(config), keras.DTypePolicy(options.precision))
    model = family.task(backbone)
    recorded = ports.record_ports(family, model, config)
    if options.train_weights:
        ports.check_invertible(recorded, config)
    return model, recorded
