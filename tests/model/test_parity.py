"""Every family against transformers: the sharded, scanned model computes what Hugging Face's does."""

import json

import families_table
import jax
import keras
import numpy as np
import pytest
import torch
from parity import (
    LORA,
    SEGMENTS,
    TOKENS,
    adapter_of,
    assert_close_as_one,
    assert_equal,
    by_name,
    factors_of,
    logits,
    reference,
)
from peft import LoraConfig as PeftConfig
from peft import PeftModel
from tiny import COMPARED, PARAMETERS, RECURRENT, SIZES, TARGETS, load, model_type, mostly_long, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.tower import WRAPPERS, text_of
from kithara_ray.model import keras_compat
from kithara_ray.model.causal_lm import build
from kithara_ray.model.families import FAMILIES, family_of
from kithara_ray.model.families.family import completed, training_note
from kithara_ray.model.generate import decoder_of
from kithara_ray.model.lora.targets import linear_modules_of
from kithara_ray.model.options import groups_of
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape


@pytest.fixture(scope="module")
def random_adapter(tiny_models):
    """family -> adapter tensors by name, drawn when first asked for."""

    class Adapters(dict):
        def __missing__(self, family):
            config = BaseCheckpoint.open(tiny_models[family]).config
            self[family] = adapter_of(build(config, LORA[family], make_mesh(), "float32"))
            return self[family]

    return Adapters()


def test_the_families_are_those_of_this_suite_and_the_table_of_features_is_written_from_it():
    assert sorted([*FAMILIES, *WRAPPERS]) == sorted(set(map(model_type, SIZES)))
    page = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.with_table(page) == page, "run `make families`"


@pytest.fixture(scope="module")
def logits_of(tiny_models):
    """family -> its logits as a function of adapter tensors: one program for several tests, weights split both ways."""

    class Programs(dict):
        def __missing__(self, family):
            base, mesh = BaseCheckpoint.open(tiny_models[family]), make_mesh(MeshShape(fsdp=2, tensor=2))
            model = build(base.config, LORA[family], mesh, "float32")
            frozen, compute = model.load(base), jax.jit(model.logits_BTV)
            batch = [jax.device_put(array, batch_sharding(mesh)) for array in (TOKENS, SEGMENTS)]
            self[family] = lambda adapter: np.asarray(compute(model.place_factors(adapter), frozen, *batch))
            return self[family]

    return Programs()


def only(adapter, module=None):
    """The adapter with all but one module's factors zero."""
    return {name: tensor * (f".{module}." in name) for name, tensor in adapter.items()}


def test_base_logits(every_family, tiny_models, logits_of, random_adapter):
    model = load(tiny_models[every_family])
    assert_equal(logits_of[every_family](only(random_adapter[every_family])), reference(model), 1e-4)


MESHES = [MeshShape(), MeshShape(data=2), MeshShape(fsdp=1, tensor=4)]


@pytest.mark.parametrize("mesh", MESHES)
def test_adapted_logits_on_every_mesh(family, mesh, tiny_models, random_adapter, tmp_path):
    adapter = random_adapter[family]
    assert_adapted_logits(logits(tiny_models[family], adapter, mesh=mesh), family, adapter, tiny_models, tmp_path)


def test_adapted_logits(every_family, tiny_models, random_adapter, logits_of, tmp_path):
    adapter = random_adapter[every_family]
    assert_adapted_logits(logits_of[every_family](adapter), every_family, adapter, tiny_models, tmp_path)


def assert_adapted_logits(ours, family, adapter, tiny_models, tmp_path):
    """Equal to PEFT's, of the adapter's file, and to the bit what PEFT reads of that."""
    directory = tiny_models[family]
    Adapter(LORA[family], adapter).write(tmp_path, str(directory))
    base = load(directory)
    plain = reference(base)
    adapted = PeftModel.from_pretrained(base, tmp_path)
    theirs = {name: tensor.detach().numpy() for name, tensor in factors_of(adapted).items()}
    assert theirs.keys() == adapter.keys()
    assert all((theirs[name] == tensor).all() for name, tensor in adapter.items())
    assert_equal(ours, reference(adapted), 2e-4)
    assert np.abs(ours - plain)[SEGMENTS.astype(bool)].max() > 0.1


@pytest.mark.parametrize("any_family", mostly_long(["gemma2", "gpt_oss", "llama"], COMPARED | {"olmo3", "phi3"}))
def test_greedy_decoding(any_family, tiny_models, random_adapter, tmp_path):
    """With a KV cache, prompts of two lengths in one batch, both longer than the windows."""
    directory, adapter = tiny_models[any_family], random_adapter[any_family]
    base = BaseCheckpoint.open(directory)
    model = build(base.config, LORA[any_family], make_mesh(), "float32", scan=False)
    decoder = decoder_of(model, model.place_factors(adapter), model.load(base))
    prompts = [TOKENS[0, :13].tolist(), TOKENS[1, :9].tolist()]
    ours = decoder.greedy(prompts, 24, (2,))

    Adapter(LORA[any_family], adapter).write(tmp_path, str(directory))
    theirs = PeftModel.from_pretrained(load(directory), tmp_path).eval()
    for prompt, row in zip(prompts, ours, strict=True):
        wanted = theirs.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_length=24)
        assert row == wanted[0].tolist()


def test_every_target_is_alive(every_family, logits_of, random_adapter):
    """A side path that is not computed would be trained, exported and do nothing here."""
    compute, adapter = logits_of[every_family], random_adapter[every_family]
    nothing = compute(only(adapter))
    parameters = [name.removesuffix(".weight") for name in PARAMETERS.get(every_family, ())]
    for module in (*TARGETS[every_family], *parameters):
        assert np.abs(compute(only(adapter, module)) - nothing).max() > 0.01, module


# Blocks that the scan takes at a time: sliding and full ones, with and without rotation, dense and of experts.
PERIODS = dict.fromkeys(SIZES, (1,)) | dict.fromkeys(["gemma2", "gemma3", "gemma3_text", "gpt_oss"], (2,))
PERIODS |= dict.fromkeys(["qwen3_moe", "smollm3"], (2,)) | dict(gemma4_text=(3,), gemma4=(2, 2))
PERIODS |= dict.fromkeys(["gemma4 experts", "gemma4_unified", "gemma4_unified_text"], (2,))
PERIODS |= dict.fromkeys(["cohere2", "exaone4", "olmo3"], (2,)) | dict.fromkeys(["ernie4_5_moe", "glm4_moe"], (1, 1))
PERIODS |= dict.fromkeys(RECURRENT, (2,))
ALL_SCANS = {remat: dict(remat=remat) for remat in ("block", "attention", "dots")} | {
    "unstacked factors": dict(stack_factors=False)
}
BLOCK = {"block": ALL_SCANS["block"]}
SCANS = {"gemma2": ALL_SCANS, "gemma4_text": BLOCK, "llama": ALL_SCANS, "gemma4": BLOCK, "gemma4 experts": BLOCK}


@pytest.mark.parametrize("family", mostly_long(["gemma2", "gemma4_text", "llama"], SCANS))
def test_the_scan_equals_the_unrolled_model_and_so_do_its_gradients(family, tiny_models, random_adapter, monkeypatch):
    """Blocks in three chunks, but under "dots". tests/train/test_gradients.py has the other families, against torch in
    float64.

    Where weights are split, the two sum in another order, noise of float32: llama's gradients differ by 1.2e-5 then and
    by 0.5e-5 where rows alone are; smollm3's by 1.3e-5, and torch's in float32 by 1.1e-5 from those in float64, from
    which the scan's are 0.8e-5 on either mesh.
    """
    monkeypatch.setattr("kithara_ray.model.options._CHUNK_TOKENS", 8)
    base = BaseCheckpoint.open(tiny_models[family])
    # Small enough that float32's own noise stays an order below what is asserted.
    adapter = {name: tensor / 4 for name, tensor in random_adapter[family].items()}
    mesh = make_mesh(None if family == "gemma2" else MeshShape(data=4))
    gradients, values = {}, {}
    for name, options in ({"unrolled": dict(scan=False)} | SCANS[family]).items():
        model = build(base.config, LORA[family], mesh, "float32", **options)
        factors, frozen = model.place_factors(adapter), model.load(base)

        def loss(factors, model=model, frozen=frozen):
            logits = model.logits_BTV(factors, frozen, TOKENS, SEGMENTS)
            return -jax.nn.log_softmax(logits)[:, :-1][np.arange(4)[:, None], np.arange(23), TOKENS[:, 1:]].mean()

        values[name], grads = jax.jit(jax.value_and_grad(loss))(factors)
        gradients[name] = by_name(model, grads)
    for name in SCANS[family]:
        assert float(values[name]) == pytest.approx(float(values["unrolled"]), rel=1e-5)
        assert_close_as_one(gradients[name], gradients["unrolled"])


def test_groups_of_blocks_that_are_run_once_more_give_the_same(tmp_path):
    """Four blocks: two groups of two."""
    base = BaseCheckpoint.open(write_model(tmp_path / "four", "llama", num_hidden_layers=4))
    found = {}
    for remat in ("block", "nested"):
        model = build(base.config, LORA["llama"], make_mesh(), "float32", remat=remat)
        assert groups_of(model.chain.steps) == 2
        factors, frozen = model.initial_factors(0), model.load(base)

        def loss(factors, model=model, frozen=frozen):
            return jax.nn.logsumexp(model.logits_BTV(factors, frozen, TOKENS, SEGMENTS), axis=-1).mean()

        found[remat] = jax.jit(jax.value_and_grad(loss))(factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found["block"], found["nested"])
    assert any(np.abs(grad).max() > 1e-3 for grad in found["nested"][1].values())


def test_initial_factors_are_peft_s_and_depend_on_nothing_but_seed_and_name(tiny_models):
    base = BaseCheckpoint.open(tiny_models["llama"])
    drawn = []
    for options in (dict(), dict(stack_factors=False)):
        model = build(base.config, LORA["llama"], make_mesh(), "float32", **options)
        shards = model.adapter_shards(model.initial_factors(seed=5), 0)
        tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in model.adapter_shapes.items()}
        for shard in shards:
            tensors[shard.name][tuple(slice(*bounds) for bounds in shard.bounds)] = shard.data
        drawn.append(tensors)
    assert all((drawn[0][name] == drawn[1][name]).all() for name in drawn[0])
    reference_model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    from peft import get_peft_model

    peft = get_peft_model(reference_model, PeftConfig(r=4, lora_alpha=12, target_modules=list(TARGETS["llama"])))
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in peft.named_parameters()
        if "lora_" in n
    }
    assert theirs.keys() == drawn[0].keys()
    for name, tensor in drawn[0].items():
        assert tensor.shape == tuple(theirs[name].shape)
        if "lora_B" in name:
            assert not tensor.any()
            continue
        # Uniform: the same bound, and nearly reached.
        bound = 1 / np.sqrt(tensor.shape[1])
        assert 0.9 * bound < np.abs(tensor).max() <= bound
        assert theirs[name].abs().max() <= bound


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


def test_gemma3_s_blocks_are_scanned_six_at_a_time(tiny_models):
    config = json.loads((tiny_models["gemma3_text"] / "config.json").read_text())
    config |= dict(num_hidden_layers=13, layer_types=None)
    assert build(config, None, make_mesh(), "float32").chain.periods == (6,)


def test_layers_compute_in_the_precision_that_was_asked_for(every_family, tiny_models):
    config = json.loads((tiny_models[every_family] / "config.json").read_text())
    before = keras.config.dtype_policy().name
    model = build(config, LORA[every_family], make_mesh(), "mixed_bfloat16")
    assert model.chain.periods == PERIODS[every_family]
    backbone = model.model.backbone
    adapted = [layer for layer in backbone._flatten_layers() if hasattr(layer, "lora_A")]
    routers = [layer for layer in adapted if layer.compute_dtype == "float32"]
    assert not routers or every_family in PARAMETERS
    linear = [layer for layer in adapted if layer not in routers]
    modules = linear_modules_of(BaseCheckpoint.open(tiny_models[every_family]))
    assert len(linear) == len(modules)
    assert {layer.compute_dtype for layer in [*linear, *backbone.transformer_layers]} == {"bfloat16"}
    assert keras.config.dtype_policy().name == before
    weights = model.abstract_frozen(np.dtype("bfloat16"))
    out = jax.eval_shape(model.hidden_BTD, model.abstract_params(), weights, TOKENS, SEGMENTS)
    assert (out.shape, out.dtype) == ((*TOKENS.shape, text_of(config)["hidden_size"]), "bfloat16")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fields_that_a_config_leaves_out_are_those_of_transformers(family):
    given = dict(model_type=family, num_hidden_layers=9, use_sliding_window=True)
    ours = completed(FAMILIES[family], given)
    theirs = AutoConfig.for_model(**given).to_dict()
    # What converters look for under the name of before.
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
