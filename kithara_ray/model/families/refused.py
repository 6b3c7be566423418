"""Reasons why a model of an unknown family is not supported: the missing piece, and the work that it would take.

Fields of config.json show the piece, so that a family nobody has listed gets its reason too.
"""

from collections.abc import Mapping
from typing import Any

_ENCODER = (
    "it has an encoder (is_encoder_decoder), and only decoders are trained here. It would take batches with separate "
    "rows for encoder and decoder"
)
_LATENT = (
    "its attention keeps keys and values as one latent vector (kv_lora_rank). It would take an attention block that "
    "rotates a part of each head, and LoRA on its two-step projections"
)
_STATE_SPACE = (
    "some of its blocks are state-space scans ({field}). It would take that scan in JAX, with a state that restarts "
    "where packed rows meet"
)
_LINEAR = (
    "some of its blocks are linear attention with a recurrent state ({field}). It would take that recurrence in JAX, "
    "with a state that restarts where packed rows meet"
)
_CONVOLUTION = (
    "some of its blocks are short convolutions ({field}). It would take a convolution that stops where packed rows "
    "meet, and its cache for decoding"
)
_CROSS = (
    "some of its blocks attend to images (cross_attention_layers). It would take a text tower without these blocks, "
    "and a merge that keeps their weights"
)
_CHUNKS = (
    "its blocks attend in chunks (attention_chunk_size), scale queries by position, and weigh the experts' inputs. It "
    "would take a block of ours that does so"
)
_STREAMS = (
    "its blocks predict and correct several streams of hidden states (altup_num_inputs), and share keys and values. It "
    "would take a block of ours that a scan can repeat"
)
_EXPERTS = (
    "no block here has its mixture of experts ({field}). It would take a block of ours with its router and experts, "
    "and a test that its logits equal transformers'"
)
_TOWER = (
    "it reads images or sound, and its text model is not known here. It would take a block of ours for that, the "
    "tensors under their full names, and a merge that keeps all others"
)
_BLOCK = (
    "no block here computes what its blocks do. It would take a block of ours, described by config.json, and a test "
    "that its logits equal transformers'"
)

# The first field that a config.json has, at its top or in text_config, gives the reason.
_BY_FIELD = (
    ("is_encoder_decoder", _ENCODER),
    ("kv_lora_rank", _LATENT),
    *((name, _STATE_SPACE) for name in ("mamba_d_state", "mamba_d_ssm", "ssm_state_size", "state_size")),
    *(
        (name, _LINEAR)
        for name in ("linear_num_value_heads", "linear_attn_config", "lru_width", "full_attn_alpha_factor")
    ),
    *((name, _CONVOLUTION) for name in ("conv_L_cache", "conv_dim")),
    ("cross_attention_layers", _CROSS),
    ("attention_chunk_size", _CHUNKS),
    ("altup_num_inputs", _STREAMS),
    *((name, _EXPERTS) for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")),
    *((name, _TOWER) for name in ("vision_config", "audio_config", "text_config")),
)


def why_refused(config: Mapping[str, Any]) -> str:
    """Return the reason why a config.json whose `model_type` is not among the families is refused."""
    if not isinstance(config.get("model_type"), str):
        return "config.json must name the family of a Hugging Face model"
    text = config.get("text_config")
    fields = {**(text if isinstance(text, Mapping) else {}), **config}
    for name, reason in _BY_FIELD:
        if fields.get(name):
            return reason.format(field=name)
    return _BLOCK
