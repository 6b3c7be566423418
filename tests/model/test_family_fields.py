"""Fields of config.json: corrected where KerasHub drops them, completed as transformers does, or refused by name."""

import json

import pytest
from parity import assert_equal, logits, reference
from tiny import write_model
from transformers import AutoConfig, AutoModelForCausalLM

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model import keras_compat
from kithara_ray.model.causal_lm import build
from kithara_ray.model.families import FAMILIES, family_of
from kithara_ray.model.families.family import completed, training_note
from kithara_ray.sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("hastily")

QUERY_SCALE = dict(query_pre_attn_scalar=16)
LLAMA3_ROPE = dict(
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=500.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )
)
PLAIN_ROPE = dict(rope_type="default", rope_theta=300.0)
UNTIED = dict(tie_word_embeddings=False, rms_norm_eps=1e-3)


CORRECTED = [
    ("gemma2", QUERY_SCALE),
    ("gemma3_text", QUERY_SCALE | dict(final_logit_softcapping=3.0)),
    ("llama", LLAMA3_ROPE),
    ("llama", UNTIED),
    ("mistral", dict(sliding_window=None, head_dim=None)),
    ("llama", dict(num_key_value_heads=None)),
    ("qwen2", UNTIED),
    ("qwen3", UNTIED),
    ("mixtral", dict(sliding_window=None)),
    ("qwen3_moe", dict(norm_topk_prob=False, mlp_only_layers=[], decoder_sparse_step=2, tie_word_embeddings=True)),
    ("qwen2_moe", dict(norm_topk_prob=True, tie_word_embeddings=True)),
    ("qwen3_5_text", dict(tie_word_embeddings=True, linear_conv_kernel_dim=2, linear_num_key_heads=4)),
    ("gpt_oss", dict(layer_types=["full_attention"] + ["sliding_attention"] * 2, rope_parameters=PLAIN_ROPE)),
    ("gemma4_text", dict(attention_k_eq_v=False, num_global_key_value_heads=None, final_logit_softcapping=None)),
]


@pytest.mark.parametrize(("family", "fields"), CORRECTED)
def test_fields_that_kerashub_drops_are_corrected(family, fields, tmp_path):
    directory = write_model(tmp_path / "model", family, **fields)
    assert_equal(logits(directory), reference(AutoModelForCausalLM.from_pretrained(directory)), 1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fields_that_a_config_leaves_out_are_those_of_transformers(family):
    given = dict(model_type=family, num_hidden_layers=9, use_sliding_window=True)
    ours = completed(FAMILIES[family], given)
    theirs = AutoConfig.for_model(**given).to_dict()
    # Converters look for these under their former names.
    theirs.setdefault("num_experts", theirs.get("num_local_experts"))
    assert ours == {name: theirs[name] for name in ours}


OLD_ROPE = {
    "llama": dict(rope_theta=5e5, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    "gemma3_text": dict(rope_local_base_freq=1e3, rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "qwen3": dict(rope_theta=1e6, rope_scaling=None),
    # As gpt-oss-20b has it.
    "gpt_oss": dict(
        rope_theta=150000,
        rope_scaling=dict(
            rope_type="yarn",
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
    ),
}


TRAINING_ONLY = dict(attention_dropout=0.1, output_router_logits=True, pretraining_tp=4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_fields_that_only_training_reads_are_off_and_told(family, tiny_models):
    config = json.loads((tiny_models[family] / "config.json").read_text())
    assert training_note(config) is None
    note = training_note(config | TRAINING_ONLY)
    assert "attention_dropout=0.1, output_router_logits=True: off in training here" in note
    model = build(config | TRAINING_ONLY, None, make_mesh(), "float32")
    rates = [layer.rate for layer in keras_compat.all_layers(model.model) if type(layer).__name__ == "Dropout"]
    assert not any(rates)


@pytest.mark.parametrize("family", OLD_ROPE)
def test_rope_settings_in_their_former_places(family):
    given = dict(model_type=family, num_hidden_layers=9) | OLD_ROPE[family]
    rope = completed(FAMILIES[family], given)["rope_parameters"]
    extra = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    if family == "llama":
        given["rope_scaling"] = given["rope_scaling"] | extra
        rope |= extra
    assert rope == AutoConfig.for_model(**given).to_dict()["rope_parameters"]


LINEAR_YARN = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}
REFUSED = {
    "gemma act": ("gemma", dict(hidden_act="relu"), "computes it as 'gelu_pytorch_tanh' only"),
    "gemma3 rope": ("gemma3_text", dict(rope_parameters=LINEAR_YARN), "'yarn' of full_attention is dropped"),
    "gemma3 both ways": ("gemma3_text", dict(use_bidirectional_attention=True), "computes it as False only"),
    "gemma3 cap": ("gemma3_text", dict(attn_logit_softcapping=50.0), "KerasHub applies it and transformers does not"),
    "scalar": ("gemma2", dict(query_pre_attn_scalar=7), "query_pre_attn_scalar=7 .* scales queries by head_dim"),
    "theta": ("gemma2", dict(rope_theta=5e5), "rotates with rope_theta 10000 only"),
    "layers": ("gemma2", dict(layer_types=["full_attention"] * 5), "alternates sliding and full attention"),
    "quantised": ("llama", dict(quantization_config={"quant_method": "gptq"}), "a base quantised by 'gptq'"),
    "quantised otherwise": ("gpt_oss", dict(quantization_config={"quant_method": "fp8"}), "a base quantised by 'fp8'"),
    "mixtral head_dim": ("mixtral", dict(head_dim=8), "derives head_dim as hidden_size / num_attention_heads"),
    "mixtral top k": ("mixtral", dict(num_experts_per_tok=6), "num_experts_per_tok=6 .* there are 5 experts"),
    "qwen3_moe window": (
        "qwen3_moe",
        dict(use_sliding_window=True, sliding_window=8),
        "use_sliding_window=True .* forgets the window where it decodes",
    ),
    "gpt_oss rope": ("gpt_oss", dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "'linear' is dropped"),
    "gpt_oss mscale": ("gpt_oss", dict(rope_parameters={"rope_type": "yarn", "mscale": 1.0}), "KerasHub has no mscale"),
    "gpt_oss bias": ("gpt_oss", dict(attention_bias=False), "attention_bias=False .* computes it as True only"),
    "gemma4 sharing": (
        "gemma4_text",
        dict(num_kv_shared_layers=4),
        "each kind of block needs one with keys and values",
    ),
    "gemma4 count": ("gemma4_text", dict(num_hidden_layers=7, num_kv_shared_layers=2), "6 entries for 7 layers"),
    "gemma4 no experts": ("gemma4_text", dict(enable_moe_block=True), "num_experts=None .* enable_moe_block needs it"),
    "gemma4 top k": (
        "gemma4_text",
        dict(enable_moe_block=True, num_experts=4, moe_intermediate_size=8, top_k_experts=5),
        "top_k_experts=5 .* there are 4 experts",
    ),
    "qwen3_5 rope": ("qwen3_5_text", dict(rope_scaling={"type": "yarn", "factor": 2.0}), "rope type 'yarn' is dropped"),
    "qwen3_5 blocks": ("qwen3_5_text", dict(layer_types=["mamba"] * 5), "each block is either linear_attention or"),
    "qwen3_5 heads": ("qwen3_5_text", dict(linear_num_value_heads=3), "is no multiple of linear_num_key_heads"),
    "qwen3_5 top k": ("qwen3_5_moe_text", dict(num_experts_per_tok=7), "num_experts_per_tok=7 .* there are 6 experts"),
    "qwen3_next scores": ("qwen3_next", dict(norm_topk_prob=False), "norm_topk_prob=False .* computes it as True only"),
    "qwen3_next dense": ("qwen3_next", dict(mlp_only_layers=[1]), r"mlp_only_layers=\[1\] .* computes it as \[\] only"),
    "qwen2_moe dense": ("qwen2_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2 .* computes it as 1 only"),
    "qwen2_moe bias": ("qwen2_moe", dict(qkv_bias=False), "qkv_bias=False .* computes it as True only"),
    "qwen2_moe window": ("qwen2_moe", dict(use_sliding_window=True), "no sliding window on a part of the blocks"),
    "qwen2_moe layers": ("qwen2_moe", dict(layer_types=["sliding_attention"] * 3), "transformers' window is 0 tokens"),
    "gpt_oss short rope": (
        "gpt_oss",
        dict(rope_parameters=dict(rope_type="yarn", rope_theta=500.0, factor=8.0, original_max_position_embeddings=3)),
        "KerasHub's yarn differs for an original_max_position_embeddings this small",
    ),
    "gemma4 cap": ("gemma4_text", dict(attn_logit_softcapping=50.0), "KerasHub applies it and transformers does not"),
    "gemma4 rope": ("gemma4_text", dict(rope_parameters=LINEAR_YARN), "full layers 'proportional' and sliding ones"),
    "gemma4 both ways": ("gemma4_text", dict(use_bidirectional_attention="all"), "computes it as None only"),
    "gemma4 layers": (
        "gemma4_text",
        dict(per_layer_config={"0": {"head_dim": 64}}),
        "a head_dim and num_key_value_heads of all full layers alone",
    ),
}


PIECES = {
    "is_encoder_decoder": (True, "it has an encoder .* would take batches with separate rows"),
    "kv_lora_rank": (512, "one latent vector .* LoRA on its two-step projections"),
    "mamba_d_state": (16, r"state-space scans \(mamba_d_state\).* a state that restarts where packed rows meet"),
    "linear_num_value_heads": (4, "linear attention with a recurrent state"),
    "conv_L_cache": (3, "short convolutions"),
    "n_routed_experts": (8, r"mixture of experts \(n_routed_experts\).* its router and experts"),
    "text_config": ({"num_hidden_layers": 2}, "reads images or sound"),
    "hidden_size": (64, "no block here computes what its blocks do"),
}


@pytest.mark.parametrize("field", PIECES)
def test_a_family_that_is_not_there_is_refused_with_the_missing_piece(field):
    value, why = PIECES[field]
    for config in ({field: value}, {"text_config": {field: value}}):
        if field in config or why.startswith(("one", "state")):
            with pytest.raises(UnsupportedError, match=f"model_type='another' is not supported: .*{why}.* lists the"):
                family_of({"model_type": "another"} | config)
    with pytest.raises(UnsupportedError, match=r"model_type=None is not supported: config\.json must name the family"):
        family_of({field: value})


def test_a_field_that_is_needed_and_left_out_is_named(tiny_models):
    config = json.loads((tiny_models["qwen3"] / "config.json").read_text())
    del config["intermediate_size"]
    with pytest.raises(UnsupportedError, match="this qwen3 model has no field 'intermediate_size'"):
        build(config, None, make_mesh(), "float32")


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_cannot_be_honoured_are_refused(case, tiny_models):
    family, fields, text = REFUSED[case]
    config = json.loads((tiny_models[family] / "config.json").read_text())
    if "rope" in case or case == "theta":
        config.pop("rope_parameters", None)
    with pytest.raises(UnsupportedError, match=text):
        build(config | fields, None, make_mesh(), "float32")


def test_a_target_that_matches_nothing(tiny_models):
    config = BaseCheckpoint.open(tiny_models["llama"]).config
    with pytest.raises(ConfigError, match="'wq' matches no linear layer of this model; it has down_proj"):
        build(config, LoraConfig(target_modules=("wq",)), make_mesh(), "float32")
