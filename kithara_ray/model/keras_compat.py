"""Every private name of Keras and KerasHub that this library uses: one function each, its reason in its docstring.

No other module may touch one; tests/test_private_names.py holds that. tests/model/test_keras_compat.py says in words
which name is gone when Keras or KerasHub drops it, and what it was for.

Keras is imported inside the functions: the driver reads `families` and `train.optimizer_config` without loading it.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from kithara_ray.model.identity import IdentityMap

# --- layers and their variables --------------------------------------------------------------------------------------

# Attributes that say which layer it is and not what it computes.
_IDENTITIES = ("name", "_path", "_parent_path", "auto_name")


def all_layers(layer) -> list:
    """A layer and all layers below it, each once.

    Needed because `Model.layers` lists one level, and a layer that is no model has no public list.
    """
    return layer._flatten_layers()


def plain_settings(layer) -> dict[str, Any]:
    """The attributes of one layer that are plain values, without its names.

    Needed to compare blocks: `get_config` raises for some of KerasHub's, and forgets what was changed after building.
    """
    kinds = (bool, int, float, str, type(None))
    return {name: v for name, v in vars(layer).items() if isinstance(v, kinds) and name not in _IDENTITIES}


@contextlib.contextmanager
def adding_weights(layer) -> Iterator[None]:
    """Inside, a built layer takes new weights.

    Needed because Keras locks a layer's list of variables when it is built; Keras' own `enable_lora`, which has other
    factors, unlocks it in the same way.
    """
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def forget_variable(layer, variable) -> None:
    """Take a variable out of a layer's list.

    Needed for a constant that KerasHub keeps as a variable: no tensor feeds it, and no public method removes one.
    """
    layer._untrack_variable(variable)


def set_dtype(variable, dtype: str) -> None:
    """Let a variable without a value have the dtype of the array that will be bound to it.

    Needed because a stateless scope casts a bound value to its variable's dtype, and `Variable.dtype` is read-only.
    """
    variable._dtype = dtype


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Variables created inside have a shape and an initialiser that never runs: no memory, no random numbers.

    Needed because Keras runs the initialisers of such variables when it next leaves a stateless scope, so its list of
    them is put back; no public name reaches the list. A variable that nothing binds would silently get random values:
    `CausalLM.bind` binds every one.
    """
    import keras
    from keras.src.backend.common import global_state

    # A copy: Keras appends to the list itself.
    before = list(global_state.get_global_attribute("uninitialized_variables", []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute("uninitialized_variables", before)


def without_autocast():
    """A scope in which reading a variable gives its own dtype.

    Needed inside a layer's `call`, where Keras casts what is read to the layer's compute dtype; the scope that stops it
    is not public.
    """
    from keras.src.backend.common.variables import AutocastScope

    return AutocastScope(None)


# --- the functional graph --------------------------------------------------------------------------------------------


def nodes_of(model) -> Iterator:
    """The nodes of a functional model's graph in the order in which they run. A node has `operation`, `outputs` and
    `is_input`.

    Needed to run the graph with the chain of blocks scanned; `Model.operations` lists operations without their order
    or their arguments.
    """
    for depth in sorted(model._nodes_by_depth, reverse=True):
        yield from model._nodes_by_depth[depth]


def arguments_of(node, known: IdentityMap) -> tuple[tuple, dict]:
    """The positional and keyword arguments of a node, its symbolic tensors replaced by their values in `known`.

    Needed for the same walk; Keras asks for the values by the ids of its tensors.
    """
    return node.arguments.fill_in({id(symbolic): value for symbolic, value in known.items()})


def first_output_of(layer):
    """The first symbolic tensor that a layer gave when the graph was made.

    Needed to name the chain's result in the graph; `Layer.output` gives all outputs as one structure.
    """
    return layer._inbound_nodes[0].outputs[0]


# --- KerasHub's converters -------------------------------------------------------------------------------------------


def converter_of(name: str) -> ModuleType:
    """KerasHub's converter of Hugging Face checkpoints of one family, e.g. `convert_llama3`. It has `backbone_cls`,
    `convert_backbone_config` and `convert_weights`.

    Needed because `from_preset`, the public way, reads all weights into one process.
    """
    return importlib.import_module(f"keras_hub.src.utils.transformers.{name}")


# --- KerasHub's attention --------------------------------------------------------------------------------------------

# What the families call the method of a block that builds its mask, and the factor by which a layer repeats keys and
# values before `_compute_attention`.
_MASK_BUILDERS = ("_compute_self_attention_mask", "_compute_attention_mask")
_REPEATS = ("num_key_value_groups", "_num_key_value_groups")


def attention_scale_of(layer) -> float:
    """What an attention layer multiplies its logits by.

    Needed because no public attribute holds it, and the families do not derive it from one width alike.
    """
    return layer._inv_norm_factor


def attention_of(layer) -> Callable:
    """The method that makes an attention layer's output of queries, keys and values.

    Needed to keep KerasHub's own attention for decoding; `call` projects queries, keys and values too.
    """
    return layer._compute_attention


def replace_attention(layer, compute: Callable) -> None:
    """Let an attention layer compute with this function.

    Needed because KerasHub's has no segments, and its layers have no argument for another attention.
    """
    layer._compute_attention = compute


def take_repeats(layer) -> int:
    """How often an attention layer repeats its keys and values; from here on it does not.

    Needed because half of the families keep this number private, and repeated keys would be kept for the backward pass.
    """
    name = next(name for name in _REPEATS if hasattr(layer, name))
    repeats = getattr(layer, name)
    setattr(layer, name, 1)
    return repeats


def mask_builder_of(block) -> Callable:
    """The method by which a decoder block makes its attention mask.

    Needed to hand segment ids to the attention in the mask's place; `call` has no argument for a whole mask.
    """
    return getattr(block, _mask_builder_name(block))


def replace_mask_builder(block, build: Callable) -> None:
    """Let a decoder block make its mask by this function; see `mask_builder_of`."""
    setattr(block, _mask_builder_name(block), build)


def _mask_builder_name(block) -> str:
    return next(name for name in _MASK_BUILDERS if hasattr(block, name))


# --- KerasHub's blocks -----------------------------------------------------------------------------------------------


def gemma4_text_block() -> type:
    """The class of gemma4's decoder block.

    Needed as a base class: `keras_hub.models` exports the backbone and not its blocks.
    """
    from keras_hub.src.models.gemma4.gemma4_decoder_block import Gemma4TextDecoderBlock

    return Gemma4TextDecoderBlock


def mixtral_router_of(block):
    """The linear layer by which a mixtral block chooses experts.

    Needed to route in float32; the block exports neither its experts nor their router.
    """
    return block._sparse_moe_block._sparse_feedforward_gate_dense


def qwen3_moe_router_of(mlp):
    """The linear layer by which the sparse MLP of a qwen3_moe block chooses experts; needed as mixtral's is."""
    return mlp._sparse_feedforward_gate_dense


def expose_dense_mlp(block) -> None:
    """Let the layers of a dense qwen3_moe block's MLP be attributes of the block too.

    Needed because KerasHub's converter looks for them there. Set past Keras, which would track them twice.
    """
    for name in ("_feedforward_intermediate_dense", "_feedforward_output_dense", "_feedforward_gate_dense"):
        object.__setattr__(block, name, getattr(block.mlp, name))


# --- optimizers and serialising --------------------------------------------------------------------------------------


def excluded_from_weight_decay(optimizer) -> tuple[list, str | None]:
    """What `exclude_from_weight_decay` was given: variables, as Keras keeps them, and a pattern of names.

    Needed because the serialised configuration of an optimizer leaves both out, and nothing public gives them back.
    """
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return list(getattr(optimizer, "_exclude_from_weight_decay", None) or ()), pattern.pattern if pattern else None


@contextlib.contextmanager
def tensorflow_asked_anew() -> Iterator[None]:
    """What Keras finds out inside about TensorFlow's presence is forgotten afterwards.

    Needed because Keras asks once and remembers it, and serialising asks where TensorFlow is hidden on purpose.
    """
    from keras.src.utils.module_utils import tensorflow

    found = tensorflow._available
    try:
        yield
    finally:
        tensorflow._available = found
