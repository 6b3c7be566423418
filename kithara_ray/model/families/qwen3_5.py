"""qwen3_5's text models and qwen3_next: blocks with a recurrent state beside blocks with attention.

KerasHub's layer with the recurrent state ignores packed segments, unrolls every chunk into the program, and rounds in
the precision of the activations. When decoding, its cache takes a prompt's tokens in twice. `GatedDeltaNet` keeps the
layer's weights and computes with `blocks.delta_rule`.

    B  rows    T  positions    N  value heads    K  key width    V  value width    D  convolved channels
    G  key heads    R = N // G
"""

import functools
from collections.abc import Mapping
from typing import Any

from kithara_ray.model import keras_compat
from kithara_ray.model.families.family import Family, check_rope_type, expect, refuse
from kithara_ray.model.families.moe import check_routing, route_in_float32

_ABSENT = (False, None)
LINEAR, FULL = "linear_attention", "full_attention"


def complete(config: Mapping) -> dict:
    """Fill in transformers' defaults; the rotated part of a head's width may stand beside the rope settings."""
    defaults = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=256)
    defaults |= dict(attention_bias=False, attention_dropout=0.0)
    whole: dict[str, Any] = {**defaults, **config}
    given = dict(whole.pop("rope_scaling", None) or whole.get("rope_parameters") or {})
    factor = whole.pop("partial_rotary_factor", 0.25)
    whole["rope_parameters"] = {
        "rope_theta": whole.pop("rope_theta", 10_000.0),
        "partial_rotary_factor": factor,
        "rope_type": given.get("type", "default"),
    } | given
    interval = whole.pop("full_attention_interval", 4)
    if whole.get("layer_types") is None:
        layers = range(1, whole["num_hidden_layers"] + 1)
        whole["layer_types"] = [LINEAR if number % interval else FULL for number in layers]
    return whole


def check(config: Mapping) -> None:
    expect(config, hidden_act=("silu",), attention_bias=_ABSENT, attention_dropout=(0.0, None))
    check_rope_type(config, "default")
    unknown = set(config["layer_types"]) - {LINEAR, FULL}
    if unknown or len(config["layer_types"]) != config["num_hidden_layers"]:
        refuse(config, "layer_types", f"each block is either {LINEAR} or {FULL}")
    if config["linear_num_value_heads"] % config["linear_num_key_heads"]:
        refuse(config, "linear_num_value_heads", "it is no multiple of linear_num_key_heads")


def correct(config: Mapping, kwargs: dict) -> None:
    # KerasHub's default is a window that transformers does not have.
    kwargs["sliding_window_size"] = None
    # A text's positions are the same in all three directions, and so is the rotation.
    kwargs.pop("mrope_section", None)


def finish(config: Mapping, backbone) -> None:
    for block in backbone.transformer_layers:
        layer = keras_compat.gated_delta_net_of(block)
        if layer is not None:
            layer.__class__ = delta_net_class()


# --- mixtures of experts ---------------------------------------------------------------------------------------------


def _complete_next(config: Mapping) -> dict:
    whole = complete(dict(decoder_sparse_step=1, norm_topk_prob=True, num_experts=512) | dict(config))
    whole["mlp_only_layers"] = whole.get("mlp_only_layers") or []
    return whole


def _check_moe(config: Mapping) -> None:
    check(config)
    check_routing(config)


def _check_next(config: Mapping) -> None:
    _check_moe(config)
    expect(config, norm_topk_prob=(True,), decoder_sparse_step=(1,), mlp_only_layers=([],))


def _finish_moe(config: Mapping, backbone) -> None:
    finish(config, backbone)
    for block in backbone.transformer_layers:
        route_in_float32(keras_compat.router_of(block.mlp))


def _finish_next(config: Mapping, backbone) -> None:
    _finish_moe(config, backbone)
    for block in backbone.transformer_layers:
        layer = keras_compat.gated_delta_net_of(block)
        if layer is not None:
            layer.__class__ = fused_delta_net_class()
            layer.fuse()


def _tensor(name: str) -> str | None:
    """KerasHub's converter names the text model inside the multimodal one. Experts are asked for one by one."""
    fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
    return None if fused else name.replace("model.language_model.", "model.", 1)


def _tensor_of_next(name: str) -> str | None:
    """qwen3_next has two projections of the input, each in the place of two of qwen3_5's; see `fuse`."""
    if name.endswith(("in_proj_z.weight", "in_proj_a.weight")):
        return None
    renamed = name.replace("in_proj_qkv.", "in_proj_qkvz.").replace("in_proj_b.", "in_proj_ba.")
    return _tensor(renamed)


# --- the layer -------------------------------------------------------------------------------------------------------


@functools.cache
def delta_net_class() -> type:
    import jax
    import jax.numpy as jnp
    import keras

    from kithara_ray.model.blocks import attention
    from kithara_ray.model.blocks.delta_rule import gated_delta_rule, short_conv, with_before

    class GatedDeltaNet(keras_compat.gated_delta_net()):
        """The layer with KerasHub's weights; `call` keeps the signature that Keras has cached for it."""

        def call(self, hidden_states, attention_mask=None, cache=None, cache_update_index=None, training=None):
            """Compute the layer's output (B, T, hidden), and with a cache also (its inputs, its states).

            Args:
                attention_mask: (B, T) segment ids; with a cache, True for the tokens that go into it, which come first
                    and are as many in every row.
                cache: the last inputs of the convolution, (B, W - 1, D), and the recurrent state, (B, N, K, V).
            """
            mixed_BTD, gate_BTNV, beta_BTN, step_BTN = self.projected(hidden_states)
            with keras_compat.without_autocast():
                # In bfloat16 the logarithm of a rate of decay would be off by half a percent.
                rate_N, bias_N = (each.value.astype(jnp.float32) for each in (self.A_log, self.dt_bias))
            decay_BTN = -jnp.exp(rate_N) * jax.nn.softplus(step_BTN.astype(jnp.float32) + bias_N)
            beta_BTN = jax.nn.sigmoid(beta_BTN.astype(jnp.float32))
            kernel_DW = keras.ops.convert_to_tensor(self.conv1d_weight)
            if cache is None:
                mix = lambda: self.mix(mixed_BTD, decay_BTN, beta_BTN, kernel_DW, attention_mask)[0]  # noqa: E731
                return self.output(attention.mixed(mix), gate_BTNV)

            before_BPD, state_BNKV = cache
            taken = mixed_BTD.shape[1]
            if attention_mask is not None:
                # A token with neither decay nor correction leaves the state as it is.
                into = attention_mask.astype(jnp.float32)[..., None]
                decay_BTN, beta_BTN, taken = decay_BTN * into, beta_BTN * into, jnp.sum(attention_mask[0])
            out, state_BNKV = self.mix(mixed_BTD, decay_BTN, beta_BTN, kernel_DW, None, cache)
            inputs = with_before(mixed_BTD, self.conv_kernel_size, before_BPD)
            before_BPD = jax.lax.dynamic_slice_in_dim(inputs, taken, self.conv_kernel_size - 1, axis=1)
            return self.output(out, gate_BTNV), (before_BPD, state_BNKV)

        def projected(self, hidden_states) -> tuple[Any, Any, Any, Any]:
            """The convolution's inputs (B, T, D), the output's gate (B, T, N, V), and what beta and decay are of."""
            gate = self.in_proj_z(hidden_states)
            gate = gate.reshape(*gate.shape[:2], self.num_v_heads, self.head_v_dim)
            return self.in_proj_qkv(hidden_states), gate, self.in_proj_b(hidden_states), self.in_proj_a(hidden_states)

        def mix(self, mixed_BTD, decay_BTN, beta_BTN, kernel_DW, segments_BT, cache=(None, None)):
            """Compute (out (B, T, N, V), last state): all by which the layer's positions take from each other."""
            mixed_BTD = jax.nn.silu(short_conv(mixed_BTD, kernel_DW, segments_BT, cache[0]))
            query, key, value = jnp.split(mixed_BTD, [self.key_dim, 2 * self.key_dim], axis=-1)
            rows, positions, _ = mixed_BTD.shape
            value = value.reshape(rows, positions, self.num_v_heads, self.head_v_dim)
            query, key = (
                jnp.repeat(
                    array.reshape(rows, positions, self.num_k_heads, self.head_k_dim),
                    self.num_v_heads // self.num_k_heads,
                    axis=2,
                )
                for array in (query, key)
            )
            out, state = gated_delta_rule(query, key, value, decay_BTN, beta_BTN, segments_BT, cache[1])
            return out.astype(self.compute_dtype), state

        def output(self, out_BTNV, gate_BTNV):
            normed = self.norm(out_BTNV).astype(jnp.float32) * jax.nn.silu(gate_BTNV.astype(jnp.float32))
            return self.out_proj(normed.astype(self.compute_dtype).reshape(*normed.shape[:2], self.value_dim))

    return GatedDeltaNet


@functools.cache
def fused_delta_net_class() -> type:
    import jax.numpy as jnp
    import keras

    class FusedDeltaNet(delta_net_class()):
        """qwen3_next's layer, which projects to everything at once, in an order by key heads."""

        def fuse(self) -> None:
            """Take two projections in the place of four, under names that KerasHub's converter knows."""
            sizes = {"in_proj_qkv": 2 * self.key_dim + 2 * self.value_dim, "in_proj_b": 2 * self.num_v_heads}
            policy, shape = self.in_proj_qkv.dtype_policy, (None, None, self.in_proj_qkv.kernel.shape[0])
            with keras_compat.adding_weights(self):
                for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"):
                    keras_compat.forget_layer(self, name)
                for name, size in sizes.items():
                    layer = keras.layers.Dense(size, use_bias=False, dtype=policy, name=name)
                    layer.build(shape)
                    setattr(self, name, layer)
            # The converter asks for these too, and feeds nothing to them.
            self.in_proj_z, self.in_proj_a = self.in_proj_qkv, self.in_proj_b

        def projected(self, hidden_states) -> tuple[Any, Any, Any, Any]:
            groups, widths = self.num_k_heads, self.head_k_dim
            each = self.num_v_heads // groups
            rows, positions, _ = hidden_states.shape
            fused = self.in_proj_qkv(hidden_states).reshape(rows, positions, groups, -1)
            ends = [widths, 2 * widths, 2 * widths + each * self.head_v_dim]
            query, key, value, gate = jnp.split(fused, ends, axis=-1)
            beta, step = jnp.split(self.in_proj_b(hidden_states).reshape(rows, positions, groups, -1), 2, axis=-1)
            mixed = jnp.concatenate([part.reshape(rows, positions, -1) for part in (query, key, value)], axis=-1)
            gate = gate.reshape(rows, positions, self.num_v_heads, self.head_v_dim)
            beta, step = (part.reshape(rows, positions, self.num_v_heads) for part in (beta, step))
            return mixed, gate, beta, step

    return FusedDeltaNet


# --- decoding with a cache -------------------------------------------------------------------------------------------


def prepare(model) -> None:
    """Give a causal LM a cache of each block's own: keys and values (B, 2, T, heads, width), or a recurrent state."""
    import jax.numpy as jnp

    backbone = model.backbone

    def call_with_cache(token_ids, cache, cache_update_index, padding_mask=None, **_):
        x, after = backbone.token_embedding(token_ids), []
        for block, own in zip(backbone.transformer_layers, cache, strict=True):
            linear = block.layer_type == LINEAR
            x, *own = block(
                x,
                # Attention needs no mask: what stands behind a prompt is written anew before it is seen.
                decoder_padding_mask=padding_mask if linear else None,
                self_attention_cache=own,
                self_attention_cache_update_index=cache_update_index,
            )
            after.append(tuple(own) if linear else own[0])
        hidden = backbone.layer_norm(x)
        return backbone.token_embedding(hidden, reverse=True), hidden, tuple(after)

    def build_cache(token_ids, padding_mask, **_):
        """The sampler first hands over the last token of the shortest prompt; the states hold those before it."""
        first = jnp.min(jnp.sum(padding_mask.astype(jnp.int32), axis=-1)) - 1
        into = jnp.broadcast_to(jnp.arange(token_ids.shape[1]) < first, token_ids.shape)
        empty = tuple(_empty(backbone, block, token_ids.shape, model.compute_dtype) for block in layers)
        _, hidden, cache = model.call_with_cache(token_ids, empty, 0, padding_mask=into)
        return hidden, cache

    layers = backbone.transformer_layers
    model.call_with_cache = call_with_cache
    keras_compat.replace_cache_builder(model, build_cache)


def _empty(backbone, block, shape: tuple[int, int], dtype: str):
    import jax.numpy as jnp

    rows, positions = shape
    if block.layer_type == FULL:
        return jnp.zeros((rows, 2, positions, backbone.num_key_value_heads, backbone.head_dim), dtype)
    layer: Any = keras_compat.gated_delta_net_of(block)
    channels, before = layer.conv1d_weight.shape[0], layer.conv_kernel_size - 1
    state = (rows, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    return jnp.zeros((rows, before, channels), jnp.float32), jnp.zeros(state, jnp.float32)


# --- names of tensors ------------------------------------------------------------------------------------------------

Dims = tuple[tuple[str, int], ...]


def tensors_of_delta_net(config: Mapping, hidden: tuple[str, int]) -> dict[str, Dims]:
    """Name and dims of each tensor of a layer with a recurrent state, as in `tensors`."""
    heads, key_heads = config["linear_num_value_heads"], config["linear_num_key_heads"]
    values = ("linear value heads * width", heads * config["linear_value_head_dim"])
    keys = key_heads * config["linear_key_head_dim"]
    convolved = ("2 * keys + values", 2 * keys + values[1])
    each = ("linear_num_value_heads", heads)
    inputs = {"qkv": convolved, "z": values, "b": each, "a": each}
    if config["model_type"] == "qwen3_next":
        inputs = {"qkvz": ("2 * keys + 2 * values", 2 * keys + 2 * values[1]), "ba": ("2 * value heads", 2 * heads)}
    return {
        "A_log": (each,),
        "dt_bias": (each,),
        "conv1d.weight": (convolved, ("1", 1), ("linear_conv_kernel_dim", config["linear_conv_kernel_dim"])),
        **{f"in_proj_{name}.weight": (width, hidden) for name, width in inputs.items()},
        "norm.weight": (("linear_value_head_dim", config["linear_value_head_dim"]),),
        "out_proj.weight": (hidden, values),
    }


FAMILIES = {
    "qwen3_5_text": Family(
        "convert_qwen3_5",
        "Qwen3_5CausalLM",
        check,
        correct,
        finish,
        complete=complete,
        prepare=prepare,
        tensor=_tensor,
    ),
    "qwen3_5_moe_text": Family(
        "convert_qwen3_5_moe",
        "Qwen3_5MoeCausalLM",
        _check_moe,
        correct,
        _finish_moe,
        complete=lambda config: complete(dict(num_experts=256) | dict(config)),
        prepare=prepare,
        tensor=_tensor,
    ),
    "qwen3_next": Family(
        "convert_qwen3_5_moe",
        "Qwen3_5MoeCausalLM",
        _check_next,
        correct,
        _finish_next,
        complete=_complete_next,
        prepare=prepare,
        tensor=_tensor_of_next,
    ),
}
