"""Every private name of Keras and KerasHub that this library uses: one function each, with its reason as docstring.

No other module may use one; tests/test_private_names.py enforces that. If Keras or KerasHub drops a name,
tests/model/test_keras_compat.py reports which name is gone and what it was for.

Keras is imported inside the functions: the driver reads `families` and `train.optimizer_config` without loading it.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from kithara_ray.model.identity import IdentityMap

# --- layers and their variables --------------------------------------------------------------------------------------

# Attributes that identify a layer but do not affect its computation.
_IDENTITIES = ("name", "_path", "_parent_path", "auto_name")


def all_layers(layer) -> list:
    """List a layer and all layers below it, each once.

    Needed because `Model.layers` lists one level, and a layer that is not a model has no public list.
    """
    return layer._flatten_layers()


def plain_settings(layer) -> dict[str, Any]:
    """The attributes of one layer that are plain values, without its names.

    Needed to compare blocks: `get_config` raises for some of KerasHub's, and omits changes made after building.
    """
    kinds = (bool, int, float, str, type(None))
    return {name: v for name, v in vars(layer).items() if isinstance(v, kinds) and name not in _IDENTITIES}


@contextlib.contextmanager
def adding_weights(layer) -> Iterator[None]:
    """Let a built layer take new weights inside this context.

    Needed because Keras locks a layer's list of variables when it builds the layer. Keras' own `enable_lora`, whose
    factors differ from ours, unlocks the list in the same way.
    """
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def forget_variable(layer, variable) -> None:
    """Remove a variable from a layer's list.

    Needed for a constant that KerasHub keeps as a variable: no tensor feeds it, and no public method removes one.
    """
    layer._untrack_variable(variable)


def set_dtype(variable, dtype: str) -> None:
    """Give a variable without a value the dtype of the array that will be bound to it.

    Needed because a stateless scope casts a bound value to its variable's dtype, and `Variable.dtype` is read-only.
    """
    variable._dtype = dtype


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Create variables with a shape but no value inside this context: no memory, no random numbers.

    Needed because Keras runs the initialisers of such variables when it next leaves a stateless scope. This context
    restores Keras' list of them, which no public name reaches. A variable that nothing binds would silently get random
    values, so `CausalLM.bind` binds every one.
    """
    import keras
    from keras.src.backend.common import global_state

    # Copy the list: Keras appends to the original.
    before = list(global_state.get_global_attribute("uninitialized_variables", []) or [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute("uninitialized_variables", before)


def without_autocast():
    """A scope in which reading a variable keeps its own dtype.

    Needed inside a layer's `call`, where Keras casts each variable to the layer's compute dtype. The scope that stops
    the cast is not public.
    """
    from keras.src.backend.common.variables import AutocastScope

    return AutocastScope(None)


# --- the functional graph --------------------------------------------------------------------------------------------


def nodes_of(model) -> Iterator:
    """Yield the nodes of a functional model's graph in execution order.

    A node has `operation`, `outputs` and `is_input`. Needed to run the graph with the chain of blocks scanned:
    `Model.operations` lists operations without their order or their arguments.
    """
    for depth in sorted(model._nodes_by_depth, reverse=True):
        yield from model._nodes_by_depth[depth]


def arguments_of(node, known: IdentityMap) -> tuple[tuple, dict]:
    """The positional and keyword arguments of a node, with symbolic tensors replaced by their values in `known`.

    Needed to run the nodes of `nodes_of`; Keras looks up the values by the ids of its tensors.
    """
    return node.arguments.fill_in({id(symbolic): value for symbolic, value in known.items()})


def first_output_of(layer):
    """The first symbolic tensor that a layer returned when the graph was built.

    Needed to identify the chain's result in the graph; `Layer.output` gives all outputs as one structure.
    """
    return layer._inbound_nodes[0].outputs[0]


# --- KerasHub's converters -------------------------------------------------------------------------------------------


def converter_of(name: str) -> ModuleType:
    """KerasHub's module that converts Hugging Face checkpoints of one family, e.g. `convert_llama3`.

    It has `backbone_cls`, `convert_backbone_config` and `convert_weights`. Needed because `from_preset`, the public
    way, reads all weights into one process.
    """
    return importlib.import_module(f"keras_hub.src.utils.transformers.{name}")


# --- KerasHub's attention --------------------------------------------------------------------------------------------

# The families' names for a block's method that builds its mask, and for the factor by which a layer repeats keys and
# values before `_compute_attention`.
_MASK_BUILDERS = ("_compute_self_attention_mask", "_compute_attention_mask")
_REPEATS = ("num_key_value_groups", "_num_key_value_groups")


def attention_scale_of(layer) -> float:
    """The factor that an attention layer multiplies its logits by.

    Needed because no public attribute holds it, and no single width gives it in all families.
    """
    return layer._inv_norm_factor


def attention_of(layer) -> Callable:
    """The method that computes an attention layer's output from queries, keys and values.

    Needed to keep KerasHub's own attention for decoding; `call` also projects queries, keys and values.
    """
    return layer._compute_attention


def replace_attention(layer, compute: Callable) -> None:
    """Make an attention layer compute with this function.

    Needed because KerasHub's attention has no segments, and its layers take no argument for a different attention.
    """
    layer._compute_attention = compute


def take_repeats(layer) -> int:
    """Return how often an attention layer repeats its keys and values, and stop it from doing so.

    Needed because half of the families keep this number private. Repeated keys would be kept for the backward pass.
    """
    name = next(name for name in _REPEATS if hasattr(layer, name))
    repeats = getattr(layer, name)
    setattr(layer, name, 1)
    return repeats


def mask_builder_of(block) -> Callable:
    """The method that builds a decoder block's attention mask.

    Needed to hand segment ids to the attention in the mask's place; `call` has no argument for a whole mask.
    """
    return getattr(block, _mask_builder_name(block))


def replace_mask_builder(block, build: Callable) -> None:
    """Make a decoder block build its mask with this function; needed for the reason in `mask_builder_of`."""
    setattr(block, _mask_builder_name(block), build)


def _mask_builder_name(block) -> str:
    return next(name for name in _MASK_BUILDERS if hasattr(block, name))


# --- KerasHub's blocks -----------------------------------------------------------------------------------------------


def gemma4_text_block() -> type:
    """The class of gemma4's decoder block.

    Needed as a base class: `keras_hub.models` exports the backbone but not its blocks.
    """
    from keras_hub.src.models.gemma4.gemma4_decoder_block import Gemma4TextDecoderBlock

    return Gemma4TextDecoderBlock


def gated_delta_net() -> type:
    """The class of qwen3_5's layer with a recurrent state; needed as a base class for the same reason."""
    from keras_hub.src.models.qwen3_5.qwen3_5_gated_delta_net import Qwen3_5GatedDeltaNet

    return Qwen3_5GatedDeltaNet


def gated_delta_net_of(block):
    """A qwen3_5 block's layer with a recurrent state; None in a block with attention.

    Needed to change its class; the block keeps it private.
    """
    return getattr(block, "_linear_attn", None)


def forget_layer(layer, name: str) -> None:
    """Take a layer's attribute `name`, itself a layer, out of it; needed as in `forget_variable`."""
    layer._tracker.untrack(getattr(layer, name))
    object.__delattr__(layer, name)


def replace_cache_builder(model, build: Callable) -> None:
    """Make a causal LM fill its cache from the prompts with this function, before `generate_step` decodes.

    Needed because KerasHub's takes all tokens of a prompt into a recurrent state, and its sampler then hands over the
    last of the shortest prompt's once more. There is no argument for another.
    """
    model._build_cache = build


# Names of the linear layer that chooses experts; of the experts' kernels, the last one's last; and of a shared expert.
_ROUTERS = ("_sparse_feedforward_gate_dense", "_router_gate")
_EXPERT_KERNELS = (
    "_expert_feedforward_gate_dense",
    "_expert_feedforward_intermediate_dense",
    "_expert_feedforward_output_dense",
)
_SHARED_EXPERTS = (("shared_expert_dense", "shared_expert_gate_dense"), ("shared_expert", "_shared_expert_gate"))


def mixtral_mixture_of(block):
    """A mixtral block's mixture of experts; needed to reach its router, since the block keeps it private."""
    return block._sparse_moe_block


def router_of(mixture):
    """The linear layer that chooses the experts of KerasHub's mixtral, qwen2_moe, qwen3_moe or qwen3_5_moe.

    Needed to route in float32; the layers export neither their experts nor their router.
    """
    return next(getattr(mixture, name) for name in _ROUTERS if hasattr(mixture, name))


def expert_kernels_of(bank) -> list:
    """The kernels of these families' experts: gate and up projection, in one or two variables, then the last one.

    Needed to compute the chosen experts only; the layer computes them all, and keeps its kernels private.
    """
    return [getattr(bank, name) for name in _EXPERT_KERNELS if hasattr(bank, name)]


def shared_expert_of(mixture) -> tuple | None:
    """A mixture's expert of every token and the layer that weighs it, or None; needed for the same reason."""
    names = next((names for names in _SHARED_EXPERTS if hasattr(mixture, names[0])), None)
    return None if names is None else tuple(getattr(mixture, name) for name in names)


def expose_dense_mlp(block) -> None:
    """Make the layers of a dense qwen3_moe block's MLP attributes of the block too.

    Needed because KerasHub's converter looks for them there. This bypasses Keras, which would track them twice.
    """
    for name in ("_feedforward_intermediate_dense", "_feedforward_output_dense", "_feedforward_gate_dense"):
        object.__setattr__(block, name, getattr(block.mlp, name))


# --- optimizers and serialising --------------------------------------------------------------------------------------


def excluded_from_weight_decay(optimizer) -> tuple[list, str | None]:
    """Return the arguments of `exclude_from_weight_decay`: variables, as Keras keeps them, and a pattern of names.

    Needed because an optimizer's serialised configuration omits both, and no public name returns them.
    """
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return list(getattr(optimizer, "_exclude_from_weight_decay", None) or ()), pattern.pattern if pattern else None


@contextlib.contextmanager
def tensorflow_asked_anew() -> Iterator[None]:
    """Make Keras forget, on exit, the answer that it found inside about TensorFlow's presence.

    Needed because Keras checks once and remembers the answer. Serialising checks while TensorFlow is deliberately
    hidden.
    """
    from keras.src.utils.module_utils import tensorflow

    found = tensorflow._available
    try:
        yield
    finally:
        tensorflow._available = found
