"""From config.json to a decoder of ours: the parts that families share, and what KerasHub's families need beyond it.

Where KerasHub's block cannot say what a config of llama, mistral, qwen2, qwen3 or smollm3 asks for (biases, a rope
type, a head's width, windows on a part of the blocks), the general block computes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kithara_ray.hf.tied_head import is_tied
from kithara_ray.model.decoder.description import ACTIVATIONS, Attention, Block, Description, Mlp, Norm
from kithara_ray.model.decoder.rope import Rotation, rotation_of
from kithara_ray.model.families.family import refuse

SLIDING, FULL = "sliding_attention", "full_attention"


def rms(config: Mapping) -> Norm:
    return Norm("rms", config["rms_norm_eps"])


# Widest head: one that is no typing error; those of today have up to 512 places.
_WIDEST = 2**16


def head_dim_of(config: Mapping) -> int:
    """A head's width: of config.json, or the model's divided by the number of heads.

    Raises:
        UnsupportedError: it is no such number.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if not isinstance(head_dim, int) or not 1 <= head_dim <= _WIDEST:
        refuse(config, "head_dim", f"expected a whole number from 1 to {_WIDEST}")
    return head_dim


def rotation(
    config: Mapping, interleaved: bool = False, rope: Mapping | None = None, partial: bool = False
) -> Rotation:
    """The rotation of config.json's rope settings, or of those given.

    Args:
        partial: True for families that transformers lets rotate a part of a head's width.

    Raises:
        UnsupportedError: the rope type is unknown, or a part of the width is asked of another family.
    """
    rope = config["rope_parameters"] if rope is None else rope
    if not partial and rope.get("partial_rotary_factor", 1.0) != 1:
        refuse(config, "rope_parameters", "partial_rotary_factor: transformers rotates all of a head's width here")
    return rotation_of(rope, head_dim_of(config), config.get("max_position_embeddings"), interleaved)


def kinds_of(config: Mapping) -> list[str]:
    """Each block's kind of attention, as `layer_types` lists them.

    Raises:
        UnsupportedError: a kind is unknown, their number is not the blocks', or a sliding one has no window.
    """
    kinds = config.get("layer_types") or [FULL] * config["num_hidden_layers"]
    if len(kinds) != config["num_hidden_layers"] or set(kinds) - {SLIDING, FULL}:
        refuse(config, "layer_types", f"it needs {SLIDING!r} or {FULL!r} for each of num_hidden_layers")
    if SLIDING in kinds and not config.get("sliding_window"):
        refuse(config, "sliding_window", f"layer_types has {SLIDING!r}, which needs a number of tokens")
    return list(kinds)


def windows_of(config: Mapping) -> list[int | None]:
    """Each block's window, by `layer_types`."""
    return [config["sliding_window"] if kind == SLIDING else None for kind in kinds_of(config)]


def decoder(
    config: Mapping,
    norm: Norm,
    *,
    attention: Mapping[str, Any] | None = None,
    mlp: Mapping[str, Any] | None = None,
    block: Mapping[str, Any] | None = None,
    windows: Sequence[int | None] | int | None = None,
    rotations: Rotation | Sequence[Rotation | None] | None = None,
    **whole: Any,
) -> Description:
    """Describe a decoder: llama's, but for the fields given.

    Args:
        attention, mlp, block, whole: fields of Attention, Mlp, Block and Description.
        windows: of each block, or one of all.
        rotations: of each block, or one of all; None takes config.json's.

    Raises:
        UnsupportedError: the activation or the rope type is unknown.
    """
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    activation = (mlp or {}).get("activation") or config["hidden_act"]
    if activation not in ACTIVATIONS:
        refuse(config, "hidden_act", f"supported are {', '.join(ACTIVATIONS)}")
    head_dim, key_heads = head_dim_of(config), config.get("num_key_value_heads") or heads
    if not isinstance(key_heads, int) or key_heads < 1 or heads % key_heads:
        refuse(config, "num_key_value_heads", f"it does not divide num_attention_heads={heads}")
    shared = {"scale": head_dim**-0.5} | dict(attention or {})
    fields: dict[str, Any] = {"width": config["intermediate_size"]} | dict(mlp or {}) | {"activation": activation}
    after = Mlp(**fields)
    turns = rotation(config) if rotations is None else rotations
    turn_of = [turns] * layers if isinstance(turns, Rotation) else list(turns)
    window_of = [windows] * layers if isinstance(windows, int | None) else list(windows)
    blocks = tuple(
        Block(
            Attention(heads, key_heads, head_dim, rotation=turn, window=window, **shared), after, norm, **(block or {})
        )
        for turn, window in zip(turn_of, window_of, strict=True)
    )
    return Description(config["vocab_size"], config["hidden_size"], blocks, is_tied(config), **whole)


# --- KerasHub's families ---------------------------------------------------------------------------------------------


def llama(config: Mapping) -> Description:
    bias = bool(config.get("attention_bias"))
    return decoder(
        config,
        rms(config),
        attention={"bias": bias, "out_bias": bias},
        mlp={"bias": bool(config.get("mlp_bias"))},
    )


def mistral(config: Mapping) -> Description:
    return decoder(config, rms(config), windows=config["sliding_window"])


def _of_qwen(config: Mapping) -> list[int | None]:
    """qwen's windows: none without `use_sliding_window`; without `layer_types`, from block `max_window_layers` on."""
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return [None] * config["num_hidden_layers"]
    if config.get("layer_types") is not None:
        return windows_of(config)
    first, layers = config.get("max_window_layers", 0), config["num_hidden_layers"]
    return [config["sliding_window"] if number >= first else None for number in range(layers)]


def qwen2(config: Mapping) -> Description:
    return decoder(config, rms(config), attention={"bias": True}, windows=_of_qwen(config))


def qwen3(config: Mapping) -> Description:
    norm, bias = rms(config), bool(config.get("attention_bias"))
    attention = {"bias": bias, "out_bias": bias, "norm": norm}
    return decoder(config, norm, attention=attention, windows=_of_qwen(config))


def smollm3(config: Mapping) -> Description:
    bias, turn = bool(config["attention_bias"]), rotation(config)
    if len(config["no_rope_layers"]) != config["num_hidden_layers"]:
        refuse(config, "no_rope_layers", "it needs a number for each of num_hidden_layers")
    return decoder(
        config,
        rms(config),
        attention={"bias": bias, "out_bias": bias},
        mlp={"bias": bool(config["mlp_bias"])},
        windows=windows_of(config),
        # Despite the field's name, 1 means that a block rotates.
        rotations=[turn if rotates else None for rotates in config["no_rope_layers"]],
    )
