"""The fields of each tiny model's config.json: a row for each family, and for each kind of model within one."""

VOCABULARY = 320

# Rows are longer than the windows.
_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))
_SMALL = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
SIZES = {
    # SmolLM2's shape: 3 query heads a key head, tied embeddings, epsilon 1e-5.
    "llama": dict(
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "gemma": dict(_SMALL, num_hidden_layers=3, head_dim=32, rms_norm_eps=1e-4),
    # An odd number of blocks: the sliding/global pairs leave one over.
    "gemma2": dict(
        _SMALL,
        num_hidden_layers=5,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=8,
        rms_norm_eps=1e-4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    # A sliding block to a full one, not KerasHub's five, and one over; full blocks rotate more slowly.
    "gemma3_text": dict(
        _SMALL,
        num_hidden_layers=5,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=8,
        rms_norm_eps=1e-4,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
        ),
    ),
    # Two sliding blocks to a full one, whose heads are wider and fewer and whose keys are its values.
    "gemma4_text": dict(
        _SMALL,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        head_dim=32,
        global_head_dim=64,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        hidden_size_per_layer_input=0,
        sliding_window=8,
        final_logit_softcapping=3.0,
        rms_norm_eps=1e-4,
        rope_parameters=dict(
            full_attention=dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=5000.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
        ),
    ),
    # Sliding blocks first; a rope that is scaled within the rows; activations that reach the limit.
    "gpt_oss": dict(
        _SMALL,
        num_hidden_layers=3,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rms_norm_eps=1e-4,
        swiglu_alpha=1.5,
        swiglu_limit=2.0,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=500.0,
            factor=8.0,
            beta_fast=8.0,
            beta_slow=2.0,
            truncate=True,
            original_max_position_embeddings=64,
        ),
    ),
    "mistral": dict(_SMALL, **_ROPE, num_hidden_layers=3, head_dim=32, sliding_window=8, rms_norm_eps=1e-4),
    "qwen2": dict(_SMALL, **_ROPE, num_hidden_layers=3, rms_norm_eps=1e-4, tie_word_embeddings=True),
    "qwen3": dict(_SMALL, **_ROPE, num_hidden_layers=3, head_dim=32, rms_norm_eps=1e-4, tie_word_embeddings=True),
    # Every second block does not rotate, and one is over.
    "smollm3": dict(_SMALL, **_ROPE, num_hidden_layers=3, no_rope_layer_interval=2, rms_norm_eps=1e-4),
    # Experts that no number of devices divides.
    "mixtral": dict(
        _SMALL,
        **_ROPE,
        num_hidden_layers=3,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=8,
        rms_norm_eps=1e-4,
    ),
    # The second block is dense, and one is over.
    "qwen3_moe": dict(
        _SMALL,
        **_ROPE,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        head_dim=32,
        rms_norm_eps=1e-4,
    ),
    # A block with a recurrent state to one with attention, and one over; value heads in pairs, a partial rotation.
    "qwen3_5_text": dict(
        _SMALL,
        num_hidden_layers=5,
        layer_types=["linear_attention", "full_attention"] * 2 + ["linear_attention"],
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=48,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-4,
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5, mrope_section=[4, 2, 2]),
    ),
}
_EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48, shared_expert_intermediate_size=40)
SIZES |= {
    "qwen3_5_moe_text": dict(SIZES["qwen3_5_text"], **_EXPERTS),
    "qwen3_next": dict(SIZES["qwen3_5_text"], **_EXPERTS),
    # A shared expert beside the others.
    "qwen2_moe": dict(_SMALL, **_ROPE, **_EXPERTS, num_hidden_layers=3, rms_norm_eps=1e-4),
}
# Decoders of our own block; each field that it reads differs from what another family would have.
_PLAIN = dict(_SMALL, **_ROPE, num_hidden_layers=3)
_PARTIAL = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5))
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
OWN = {
    # Rows are longer than the short factors reach.
    "phi3": dict(
        _SMALL,
        num_hidden_layers=3,
        sliding_window=8,
        rms_norm_eps=1e-4,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=500.0,
            partial_rotary_factor=0.75,
            short_factor=[1.0] * 6,
            long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
        ),
    ),
    "phi": dict(_SMALL, **_PARTIAL, num_hidden_layers=3, layer_norm_eps=1e-4, qk_layernorm=True),
    "granite": dict(
        _PLAIN,
        rms_norm_eps=1e-4,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.125,
        logits_scaling=2.0,
        attention_bias=True,
        mlp_bias=True,
        attention_dropout=0.1,
    ),
    "olmo2": dict(_PLAIN, rms_norm_eps=1e-4),
    "olmo3": dict(
        _SMALL,
        num_hidden_layers=3,
        layer_types=_WINDOWED,
        sliding_window=8,
        rms_norm_eps=1e-4,
        rope_parameters=dict(
            full_attention=dict(
                rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0
            ),
            sliding_attention=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "glm4": dict(_SMALL, **_PARTIAL, num_hidden_layers=3, head_dim=32, rms_norm_eps=1e-4),
    "seed_oss": dict(_PLAIN, head_dim=32, attention_out_bias=True, mlp_bias=True, rms_norm_eps=1e-4),
    "hunyuan_v1_dense": dict(
        _SMALL,
        num_hidden_layers=3,
        head_dim=32,
        rms_norm_eps=1e-4,
        rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=1.0, alpha=100.0),
    ),
    # Queries grow within the rows.
    "ministral3": dict(
        _SMALL,
        num_hidden_layers=3,
        head_dim=32,
        rms_norm_eps=1e-4,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=500.0,
            factor=4.0,
            beta_fast=4.0,
            mscale=2.0,
            mscale_all_dim=1.0,
            original_max_position_embeddings=8,
            llama_4_scaling_beta=0.5,
        ),
    ),
    "ernie4_5": dict(_PLAIN, head_dim=32, use_bias=True, rms_norm_eps=1e-4),
    "exaone4": dict(_PLAIN, layer_types=_WINDOWED, sliding_window=8, rms_norm_eps=1e-4),
    "cohere2": dict(_PLAIN, layer_types=_WINDOWED, sliding_window=8, logit_scale=0.5, layer_norm_eps=1e-4),
    "stablelm": dict(_SMALL, **_PARTIAL, num_hidden_layers=3, use_qkv_bias=True, layer_norm_eps=1e-4),
    "starcoder2": dict(_PLAIN, sliding_window=8, norm_epsilon=1e-4),
    "nemotron": dict(_SMALL, **_PARTIAL, num_hidden_layers=3, head_dim=32, norm_eps=1e-4, attention_bias=True),
    "arcee": dict(_PLAIN, head_dim=32, rms_norm_eps=1e-4, mlp_bias=True),
    "apertus": dict(_PLAIN, rms_norm_eps=1e-4),
    "internlm3": dict(
        _SMALL,
        num_hidden_layers=3,
        head_dim=32,
        rms_norm_eps=1e-4,
        max_position_embeddings=64,
        rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=4.0),
    ),
    # A dense block first, and two of experts.
    "ernie4_5_moe": dict(
        _PLAIN,
        rms_norm_eps=1e-4,
        moe_intermediate_size=48,
        moe_num_experts=5,
        moe_k=3,
        moe_num_shared_experts=2,
        use_bias=True,
    ),
    "glm4_moe": dict(
        _SMALL,
        **_PARTIAL,
        num_hidden_layers=3,
        head_dim=32,
        rms_norm_eps=1e-4,
        attention_bias=True,
        use_qk_norm=True,
        moe_intermediate_size=48,
        n_routed_experts=5,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
    ),
    "minimax_m2": dict(
        _SMALL,
        **_PARTIAL,
        num_hidden_layers=3,
        head_dim=32,
        rms_norm_eps=1e-4,
        num_local_experts=5,
        num_experts_per_tok=3,
    ),
}
SIZES |= OWN
# Text models of multimodal checkpoints, with small towers beside them; see `config_of`.
_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
_SIGLIP = dict(_VISION, image_size=28, patch_size=14, vision_use_head=False)
_VISION4 = dict(
    _VISION, num_key_value_heads=2, head_dim=16, global_head_dim=16, patch_size=4, position_embedding_size=64
)
_PAIRS = ["sliding_attention", "full_attention"]
_DENSE4 = dict(SIZES["gemma4_text"], num_hidden_layers=4, layer_types=_PAIRS * 2)
# The last four blocks attend to keys of the third and the fourth, and have wider MLPs. Each has embeddings of its own.
_SHARED4 = dict(
    _DENSE4,
    num_hidden_layers=8,
    layer_types=_PAIRS * 4,
    attention_k_eq_v=False,
    num_global_key_value_heads=None,
    num_kv_shared_layers=4,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=VOCABULARY,
)
_EXPERTS4 = dict(_DENSE4, enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=48)
_UNIFIED = {name: value for name, value in _DENSE4.items() if name != "hidden_size_per_layer_input"}
_PIXTRAL = dict(_VISION, model_type="pixtral", head_dim=16, image_size=28, patch_size=14)
_TWO_PERIODS = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
_VISUAL = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    patch_size=4,
    out_hidden_size=64,
    num_position_embeddings=64,
)
_WITHOUT_TABLE = {name: value for name, value in _VISUAL.items() if name != "num_position_embeddings"}
# Three directions of positions, one after the other or interleaved.
_MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, mrope_section=[4, 2, 2]))
_INTERLEAVED = dict(
    rope_parameters=dict(rope_type="default", rope_theta=500.0, mrope_section=[8, 4, 4], mrope_interleaved=True)
)
_PATCHES = dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=8, output_proj_dims=32)
SIZES |= {
    "gemma3": dict(text_config=SIZES["gemma3_text"], vision_config=_SIGLIP, mm_tokens_per_image=1),
    "gemma4": dict(text_config=_SHARED4, vision_config=_VISION4 | dict(use_clipped_linears=True)),
    "gemma4 experts": dict(text_config=_EXPERTS4, vision_config=_VISION4),
    "gemma4_unified": dict(text_config=_UNIFIED, vision_config=_PATCHES, audio_config=dict(audio_embed_dim=32)),
    "gemma4_unified_text": _UNIFIED,
    "mistral3": dict(
        text_config=dict(SIZES["mistral"], model_type="mistral"), vision_config=_PIXTRAL, tie_word_embeddings=False
    ),
    "mistral3 ministral3": dict(text_config=dict(SIZES["ministral3"], model_type="ministral3"), vision_config=_PIXTRAL),
    "qwen2_vl": dict(
        text_config=dict(SIZES["qwen2"], **_MROPE),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=4),
        tie_word_embeddings=True,
    ),
    "qwen2_5_vl": dict(
        text_config=dict(SIZES["qwen2"], **_MROPE, tie_word_embeddings=False),
        vision_config=dict(_WITHOUT_TABLE, fullatt_block_indexes=[1], window_size=16),
    ),
    "qwen3_vl": dict(
        text_config=dict(SIZES["qwen3"], **_INTERLEAVED),
        vision_config=dict(_VISUAL, deepstack_visual_indexes=[0]),
        tie_word_embeddings=True,
    ),
    "qwen3_5": dict(text_config=SIZES["qwen3_5_text"] | _TWO_PERIODS, vision_config=_VISUAL),
    "qwen3_5_moe": dict(text_config=SIZES["qwen3_5_moe_text"] | _TWO_PERIODS, vision_config=_VISUAL),
}
