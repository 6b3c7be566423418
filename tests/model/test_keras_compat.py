"""Each private name of Keras and KerasHub that this library uses is there, and does what it is used for.

When a test fails, its message says which name is gone, what used it and where to look.
"""

from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from private_names import names_in
from tiny import SIZES, config_of

from kithara_ray.model import keras_compat, runtime
from kithara_ray.model.families import FAMILIES, family_of
from kithara_ray.model.identity import IdentityMap
from kithara_ray.train.optimizer_config import portable

KERAS, HUB = "keras", "keras-hub"


@dataclass(frozen=True)
class Name:
    """Attributes:
    library, owner: of which it is; an owner is what a reader searches for.
    used_by: functions of keras_compat.
    look_at: file of the library, below its `src`.
    """

    library: str
    owner: str
    used_by: str
    look_at: str


NAMES = {
    "_flatten_layers": Name(KERAS, "Layer", "all_layers", "layers/layer.py"),
    "_tracker": Name(KERAS, "Layer", "adding_weights, forget_layer", "layers/layer.py, and Dense.enable_lora"),
    "_untrack_variable": Name(KERAS, "Layer", "forget_variable", "layers/layer.py"),
    "_path": Name(KERAS, "Layer", "plain_settings", "layers/layer.py"),
    "_parent_path": Name(KERAS, "Layer", "plain_settings", "layers/layer.py"),
    "_dtype": Name(KERAS, "Variable", "set_dtype", "backend/common/variables.py"),
    "global_state": Name(KERAS, "keras.src.backend.common", "without_values", "backend/common/variables.py"),
    "AutocastScope": Name(
        KERAS, "keras.src.backend.common.variables", "without_autocast", "backend/common/variables.py"
    ),
    "_nodes_by_depth": Name(KERAS, "Functional", "nodes_of", "ops/function.py"),
    "_inbound_nodes": Name(KERAS, "Layer", "first_output_of", "ops/node.py"),
    "_exclude_from_weight_decay": Name(
        KERAS, "Optimizer", "excluded_from_weight_decay", "optimizers/base_optimizer.py"
    ),
    "_exclude_from_weight_decay_pattern": Name(
        KERAS, "Optimizer", "excluded_from_weight_decay", "optimizers/base_optimizer.py"
    ),
    "tensorflow": Name(KERAS, "keras.src.utils.module_utils", "tensorflow_asked_anew", "utils/module_utils.py"),
    "_available": Name(KERAS, "LazyModule", "tensorflow_asked_anew", "utils/module_utils.py"),
    "keras_hub.src.utils.transformers.": Name(HUB, "keras_hub", "converter_of", "utils/transformers/"),
    "_inv_norm_factor": Name(HUB, "attention layer", "attention_scale_of", "models/*/*_attention.py"),
    "_compute_attention": Name(HUB, "attention layer", "attention_of, replace_attention", "models/*/*_attention.py"),
    "_num_key_value_groups": Name(HUB, "attention layer", "take_repeats", "models/*/*_attention.py"),
    "_compute_self_attention_mask": Name(
        HUB, "decoder block", "mask_builder_of, replace_mask_builder", "models/*/*_decoder.py"
    ),
    "_compute_attention_mask": Name(
        HUB, "decoder block", "mask_builder_of, replace_mask_builder", "models/*/*_decoder_block.py"
    ),
    "Gemma4TextDecoderBlock": Name(
        HUB, "keras_hub.src.models.gemma4", "gemma4_text_block", "models/gemma4/gemma4_decoder_block.py"
    ),
    "Qwen3_5GatedDeltaNet": Name(
        HUB, "keras_hub.src.models.qwen3_5", "gated_delta_net", "models/qwen3_5/qwen3_5_gated_delta_net.py"
    ),
    "_linear_attn": Name(HUB, "qwen3_5's block", "gated_delta_net_of", "models/qwen3_5/qwen3_5_decoder.py"),
    "_router_gate": Name(HUB, "qwen3_5_moe's MLP", "router_of", "models/qwen3_5_moe/qwen3_5_moe_decoder.py"),
    "_shared_expert_gate": Name(HUB, "qwen3_5_moe's MLP", "shared_expert_of", "models/qwen3_5_moe/"),
    "_build_cache": Name(HUB, "CausalLM", "replace_cache_builder", "models/*/*_causal_lm.py"),
    "_sparse_moe_block": Name(HUB, "mixtral's block", "mixtral_mixture_of", "models/mixtral/mixtral_decoder.py"),
    "_sparse_feedforward_gate_dense": Name(HUB, "sparse MLP", "router_of", "models/{mixtral,qwen3_moe}/*_decoder.py"),
    "_expert_feedforward_gate_dense": Name(HUB, "experts", "expert_kernels_of", "models/*/*moe_decoder.py"),
    "_expert_feedforward_intermediate_dense": Name(HUB, "mixtral's experts", "expert_kernels_of", "models/mixtral/"),
    "_expert_feedforward_output_dense": Name(HUB, "experts", "expert_kernels_of", "models/*/*moe_decoder.py"),
    "_feedforward_intermediate_dense": Name(HUB, "qwen3_moe's MLP", "expose_dense_mlp", "models/qwen3_moe/"),
    "_feedforward_output_dense": Name(HUB, "qwen3_moe's MLP", "expose_dense_mlp", "models/qwen3_moe/"),
    "_feedforward_gate_dense": Name(HUB, "qwen3_moe's MLP", "expose_dense_mlp", "models/qwen3_moe/"),
}


# Families that KerasHub's own blocks compute.
CONVERTED = [family for family, about in FAMILIES.items() if about.converter]


def said(name: str, owner: str = "") -> str:
    """What a reader must know when a name is gone."""
    about = NAMES[name]
    return (
        f"{about.library} {metadata.version(about.library)}: {owner or about.owner} has no `{name}`; used by "
        f"kithara_ray.model.keras_compat.{about.used_by}; look at {about.library.replace('-', '_')}/src/{about.look_at}"
    )


def check(owner, name: str) -> None:
    assert hasattr(owner, name), said(name, type(owner).__name__ if not isinstance(owner, type) else owner.__name__)


def check_one_of(owner, *names: str) -> None:
    assert any(hasattr(owner, name) for name in names), "; ".join(said(name, type(owner).__name__) for name in names)


@pytest.fixture(scope="module")
def blocks():
    """Family -> (backbone, its first decoder block with attention, that attention), as KerasHub builds them."""
    made = {}

    def get(family: str):
        if family not in made:
            config = config_of(family).to_dict()
            with keras_compat.without_values():
                backbone = family_of(config).build(config, keras.DTypePolicy("float32"))
            pairs = (
                (block, layer) for block in backbone.transformer_layers for layer in keras_compat.all_layers(block)
            )
            made[family] = (backbone, *next(pair for pair in pairs if type(pair[1]).__name__.endswith("Attention")))
        return made[family]

    return get


@pytest.fixture
def dense():
    layer = keras.layers.Dense(3, name="one")
    layer.build((None, 2))
    return layer


def test_every_name_is_in_the_table():
    used = names_in(Path(keras_compat.__file__).read_text())
    assert used == NAMES.keys(), "names of keras_compat.py and of this table differ"
    for name, about in NAMES.items():
        for function in about.used_by.split(", "):
            assert hasattr(keras_compat, function), f"{name}: keras_compat has no {function}"


def test_a_name_that_is_gone_is_told_in_words():
    with pytest.raises(
        AssertionError, match=r"keras 3\S+: object has no `_tracker`; used by .*adding_weights, .*; look at"
    ):
        check(object(), "_tracker")


# --- Keras -----------------------------------------------------------------------------------------------------------


def test_layers_below_a_layer(dense):
    check(dense, "_flatten_layers")
    model = keras.Sequential([keras.Sequential([dense])])
    assert [layer for layer in keras_compat.all_layers(model) if layer is dense]
    assert dense not in model.layers, "Model.layers lists all levels now; all_layers can go"


def test_settings_without_names(dense):
    same = keras.layers.Dense(3, name="two")
    same.build((None, 2))
    for name in ("_path", "_parent_path"):
        assert name in vars(dense), said(name, "Dense")
    assert keras_compat.plain_settings(dense) == keras_compat.plain_settings(same)
    assert keras_compat.plain_settings(dense)["units"] == 3


def test_weights_of_a_built_layer(dense):
    check(dense, "_tracker")
    with pytest.raises(ValueError, match="cannot add new elements"):
        dense.add_weight(name="before", shape=(1,))
    with keras_compat.adding_weights(dense):
        dense.factor = dense.add_weight(name="inside", shape=(1,))
    assert any(variable is dense.factor for variable in dense.variables)
    with pytest.raises(ValueError, match="cannot add new elements"):
        dense.add_weight(name="after", shape=(1,))


def test_kernels_and_embeddings_are_their_variables(dense):
    """Public properties, which give something else for layers that Keras quantises or adapts itself."""
    table = keras.layers.Embedding(4, 2)
    table.build((None,))
    assert any(dense.kernel is variable for variable in dense.variables)
    assert any(table.embeddings is variable for variable in table.variables)


def test_a_variable_is_forgotten(dense):
    check(dense, "_untrack_variable")
    keras_compat.forget_variable(dense, dense.bias)
    assert [variable is dense.kernel for variable in dense.variables] == [True]


def test_a_bound_value_keeps_its_dtype():
    variable = keras.Variable(np.zeros(2), dtype="float32")
    check(variable, "_dtype")
    with pytest.raises(AttributeError):
        variable.dtype = "bfloat16"
    keras_compat.set_dtype(variable, "bfloat16")
    with keras.StatelessScope(state_mapping=[(variable, jnp.ones(2, "bfloat16"))]):
        assert variable.value.dtype == "bfloat16"


def test_variables_without_values():
    from keras.src.backend.common import global_state

    ran = []

    def initialise(shape, dtype):
        ran.append(shape)
        return jnp.zeros(shape, dtype)

    def made():
        return keras.Variable(initialise, shape=(2,), dtype="float32")

    assert hasattr(global_state, "get_global_attribute"), said("global_state")
    # Twice: from the first on, Keras has a list, which it goes on with.
    for _ in range(2):
        with keras_compat.without_values():
            variable = made()
        with keras.StatelessScope():
            pass
        assert variable.shape == (2,)
        assert not ran, (
            f"leaving a scope has run the initialisers, so Keras' list has another name. {said('global_state')}"
        )
    with keras.StatelessScope(initialize_variables=False):
        made()
    with keras.StatelessScope():
        pass
    assert ran == [(2,)], "Keras runs no initialisers any more; without_values can go"


def test_reading_without_autocast():
    variables = import_module("keras.src.backend.common.variables")
    assert hasattr(variables, "AutocastScope"), said("AutocastScope")
    read = []

    class Reads(keras.layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=(1,), dtype="float32")

        def call(self, x):
            read.append(jnp.asarray(self.weight).dtype)
            with keras_compat.without_autocast():
                read.append(jnp.asarray(self.weight).dtype)
            return x

    Reads(dtype=keras.DTypePolicy("mixed_bfloat16"))(jnp.zeros((1, 1)))
    assert read[-2:] == ["bfloat16", "float32"]


def test_the_graph_of_a_model():
    given = {"a": keras.Input((2,), name="a"), "b": keras.Input((2,), name="b")}
    summed = keras.layers.Add(name="sum")([given["a"], given["b"]])
    model = keras.Model(given, keras.layers.Add(name="last")([summed, given["a"]]))
    check(model, "_nodes_by_depth")
    check(model.get_layer("last"), "_inbound_nodes")
    values = {"a": jnp.ones((1, 2)), "b": jnp.full((1, 2), 4.0)}
    known = IdentityMap((symbolic, values[symbolic.name]) for symbolic in model.inputs)
    order = []
    for node in keras_compat.nodes_of(model):
        if not node.is_input:
            args, kwargs = keras_compat.arguments_of(node, known)
            known[node.outputs[0]] = node.operation(*args, **kwargs)
            order.append(node.operation.name)
    assert order == ["sum", "last"]
    last = keras_compat.first_output_of(model.get_layer("last"))
    assert last is model.outputs[0]
    np.testing.assert_array_equal(known[last], [[6.0, 6.0]])


def test_what_an_optimizer_excludes_from_weight_decay(dense):
    optimizer = keras.optimizers.AdamW(1e-3)
    assert keras_compat.excluded_from_weight_decay(optimizer) == ([], None)
    optimizer.exclude_from_weight_decay(var_list=[dense.bias], var_names=["input_layernorm"])
    check(optimizer, "_exclude_from_weight_decay")
    check(optimizer, "_exclude_from_weight_decay_pattern")
    variables, pattern = keras_compat.excluded_from_weight_decay(optimizer)
    assert (len(variables), pattern) == (1, "input_layernorm")
    assert "layernorm" not in str(optimizer.get_config()), "get_config has the exclusions now; the function can go"
    by_name = keras.optimizers.AdamW(1e-3)
    by_name.exclude_from_weight_decay(var_names=["norm"])
    assert portable(by_name)[1]["exclude_from_weight_decay"] == "norm"


def test_what_keras_knows_of_tensorflow_is_forgotten():
    module = import_module("keras.src.utils.module_utils")
    assert hasattr(module, "tensorflow"), said("tensorflow")
    check(module.tensorflow, "_available")
    before = module.tensorflow._available
    with runtime.without_tensorflow():
        module.tensorflow._available = "asked inside"
    assert module.tensorflow._available == before


# --- KerasHub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONVERTED)
def test_a_familys_converter(family):
    name = FAMILIES[family].converter
    module = keras_compat.converter_of(name)
    for needed in ("backbone_cls", "convert_backbone_config", "convert_weights"):
        assert hasattr(module, needed), f"{said('keras_hub.src.utils.transformers.')}: {name} has no {needed}"


@pytest.mark.parametrize("family", CONVERTED)
def test_a_familys_attention(family, blocks):
    _, block, layer = blocks(family)
    check(layer, "_compute_attention")
    check_one_of(block, "_compute_self_attention_mask", "_compute_attention_mask")
    assert callable(keras_compat.attention_of(layer))
    assert callable(keras_compat.mask_builder_of(block))


# gemma's are made of public attributes.
@pytest.mark.parametrize("family", [family for family in CONVERTED if not family.startswith("gemma")])
def test_a_familys_scale_and_repeats(family, blocks):
    _, _, layer = blocks(family)
    check(layer, "_inv_norm_factor")
    check_one_of(layer, "num_key_value_groups", "_num_key_value_groups")
    size = SIZES[family]
    width = size.get("head_dim") or size["hidden_size"] // size["num_attention_heads"]
    assert keras_compat.attention_scale_of(layer) == pytest.approx(width**-0.5)
    assert keras_compat.take_repeats(layer) == size["num_attention_heads"] // size["num_key_value_heads"]
    assert keras_compat.take_repeats(layer) == 1


def test_replaced_attention_and_masks_are_called(blocks):
    backbone, block, layer = blocks("llama")
    seen = []
    original_mask, original = keras_compat.mask_builder_of(block), keras_compat.attention_of(layer)

    def mask(*args, **kwargs):
        seen.append("mask")
        return original_mask(*args, **kwargs)

    def compute(*args, **kwargs):
        seen.append("attention")
        return original(*args, **kwargs)

    keras_compat.replace_mask_builder(block, mask)
    keras_compat.replace_attention(layer, compute)
    try:
        zeros = [(v, jnp.zeros(v.shape, v.dtype)) for v in backbone.variables]
        x = jax.ShapeDtypeStruct((1, 4, SIZES["llama"]["hidden_size"]), jnp.float32)

        def call(x):
            with keras.StatelessScope(state_mapping=zeros):
                return block(x)

        jax.eval_shape(call, x)
    finally:
        keras_compat.replace_mask_builder(block, original_mask)
        keras_compat.replace_attention(layer, original)
    assert seen == ["mask", "attention"]


def test_gemma4s_block(blocks):
    module = import_module("keras_hub.src.models.gemma4.gemma4_decoder_block")
    assert hasattr(module, "Gemma4TextDecoderBlock"), said("Gemma4TextDecoderBlock")
    assert isinstance(blocks("gemma4_text")[1], keras_compat.gemma4_text_block())


def test_qwen3_5s_layer_with_a_recurrent_state(blocks):
    first, second, *_ = blocks("qwen3_5_text")[0].transformer_layers
    check(first, "_linear_attn")
    layer = keras_compat.gated_delta_net_of(first)
    assert keras_compat.gated_delta_net() in type(layer).__mro__[1:]
    assert keras_compat.gated_delta_net_of(second) is None


def test_a_causal_lm_fills_its_cache_with_what_it_is_given(blocks):
    import keras_hub

    model = keras_hub.models.Qwen3_5CausalLM(backbone=blocks("qwen3_5_text")[0], preprocessor=None)
    check(model, "_build_cache")
    given = dict(token_ids=jnp.zeros((1, 4), jnp.int32), padding_mask=jnp.ones((1, 4), bool))

    def build(token_ids, padding_mask, **_):
        raise LookupError(token_ids.shape, padding_mask.shape)

    keras_compat.replace_cache_builder(model, build)
    with pytest.raises(LookupError, match=r"\(1, 4\)"):
        model.generate_step(given)


def test_a_layer_is_forgotten(dense):
    outer = keras.Sequential([dense])
    outer.inner = dense
    check(outer, "_tracker")
    keras_compat.forget_layer(outer, "inner")
    assert not hasattr(outer, "inner")


def mixture_of(blocks, family):
    block = blocks(family)[1]
    if family != "mixtral":
        return block.mlp
    check(block, "_sparse_moe_block")
    return keras_compat.mixtral_mixture_of(block)


@pytest.mark.parametrize(
    ("family", "wide"), {"mixtral": 2, "qwen2_moe": 1, "qwen3_moe": 1, "qwen3_5_moe_text": 1}.items()
)
def test_routers_and_kernels_of_experts(blocks, family, wide):
    mixture, size = mixture_of(blocks, family), SIZES[family]
    count = size.get("num_experts", size.get("num_local_experts"))
    check_one_of(mixture, "_sparse_feedforward_gate_dense", "_router_gate")
    assert keras_compat.router_of(mixture).units == count
    check(mixture.expert_bank, "_expert_feedforward_gate_dense")
    check(mixture.expert_bank, "_expert_feedforward_output_dense")
    *first, last = keras_compat.expert_kernels_of(mixture.expert_bank)
    inside, hidden = size.get("moe_intermediate_size", size["intermediate_size"]), size["hidden_size"]
    assert [tuple(kernel.shape) for kernel in first] == [(count, hidden, 2 * inside // wide)] * wide
    assert tuple(last.shape) == (count, inside, hidden)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_5_moe_text", "qwen3_moe"])
def test_shared_experts(blocks, family):
    shared = keras_compat.shared_expert_of(mixture_of(blocks, family))
    if family == "qwen3_moe":
        assert shared is None
    else:
        expert, gate = shared
        assert expert.intermediate_dim == SIZES[family]["shared_expert_intermediate_size"]
        assert gate.units == 1


def test_a_dense_block_of_qwen3_moe(blocks):
    dense = blocks("qwen3_moe")[0].transformer_layers[1]
    assert not dense.is_sparse_mlp
    for name in ("_feedforward_intermediate_dense", "_feedforward_output_dense", "_feedforward_gate_dense"):
        check(dense.mlp, name)
        assert getattr(dense, name) is getattr(dense.mlp, name)
    numbers = [id(layer) for layer in keras_compat.all_layers(dense)]
    assert len(numbers) == len(set(numbers))
