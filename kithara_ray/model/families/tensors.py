"""Names and shapes of the tensors in a family's checkpoint, from config.json only: no jax, no keras.

The driver compares them with the weight files' headers. It can then refuse a config.json that does not belong to the
weights before it requests a cluster. Loading follows KerasHub's converters (`ports`) instead; a test compares both.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf.checkpoint import CONFIG, BaseCheckpoint
from kithara_ray.hf.facts import stored
from kithara_ray.hf.names import without_wrappers
from kithara_ray.hf.tied_head import HEAD, check_tied_head, is_tied
from kithara_ray.hf.tower import in_tower, is_beside, prefix_of, text_of, wrapper_of
from kithara_ray.hf.unused import is_beyond, layers_of, shares_keys, why_unused
from kithara_ray.model.decoder.tensors import Dims, tensors_of
from kithara_ray.model.families import FAMILIES, completed, fields_needed, model_type_of, qwen3_5

_GEMMA4 = frozenset({"gemma4_text", "gemma4_unified_text"})
_QK_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3_text", *qwen3_5.FAMILIES}) | _GEMMA4
_FEEDFORWARD_NORMS = frozenset({"gemma2", "gemma3_text"}) | _GEMMA4
_BIASED = frozenset({"qwen2", "qwen2_moe"})
# Families without biases, for which transformers reads no such field.
_UNBIASED = frozenset({"mistral", "mixtral"})
_DTYPES = ("F32", "BF16", "F16")
_PREFIX = "model."
_QWEN_EXPERTS = frozenset({"qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "qwen3_next"})


def expected_tensors(config: Mapping[str, Any]) -> dict[str, Dims] | None:
    """Map tensor name to dims for every tensor that a causal LM of this config.json needs; None for an unknown family.

    Raises:
        UnsupportedError: the config lacks a field.
    """
    text = text_of(config)
    family = FAMILIES.get(model_type_of(text) or "")
    if family is None:
        return None
    with fields_needed(text):
        whole = completed(family, text)
        description = family.described(whole)
        made = dict(_tensors(whole) if description is None else tensors_of(description))
        return {in_tower(config, name): dims for name, dims in made.items()}


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, Dims]]:
    vocabulary, hidden = ("vocab_size", config["vocab_size"]), ("hidden_size", config["hidden_size"])
    yield f"{_PREFIX}embed_tokens.weight", (vocabulary, hidden)
    yield f"{_PREFIX}norm.weight", (hidden,)
    if not is_tied(config):
        yield HEAD, (vocabulary, hidden)
    if config.get("hidden_size_per_layer_input"):
        own = ("hidden_size_per_layer_input", config["hidden_size_per_layer_input"])
        of_all = ("num_hidden_layers * hidden_size_per_layer_input", config["num_hidden_layers"] * own[1])
        per_layer = ("vocab_size_per_layer_input", config["vocab_size_per_layer_input"])
        yield f"{_PREFIX}embed_tokens_per_layer.weight", (per_layer, of_all)
        yield f"{_PREFIX}per_layer_model_projection.weight", (of_all, hidden)
        yield f"{_PREFIX}per_layer_projection_norm.weight", (own,)
    for number in range(config["num_hidden_layers"]):
        layer = f"{_PREFIX}layers.{number}."
        for part in (_norms(config, hidden), _attention(config, number, hidden), _feedforward(config, number, hidden)):
            for name, dims in part:
                yield layer + name, dims


def _norms(config: Mapping[str, Any], hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if config["model_type"] in _FEEDFORWARD_NORMS:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        yield f"{name}.weight", (hidden,)
    if config["model_type"] in _GEMMA4:
        yield "layer_scalar", (("1", 1),)
    if config.get("enable_moe_block"):
        for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"):
            yield f"{name}.weight", (hidden,)
    if config.get("hidden_size_per_layer_input"):
        own = ("hidden_size_per_layer_input", config["hidden_size_per_layer_input"])
        yield "per_layer_input_gate.weight", (own, hidden)
        yield "per_layer_projection.weight", (hidden, own)
        yield "post_per_layer_input_norm.weight", (hidden,)


def _attention(config: Mapping[str, Any], number: int, hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    heads, family = config["num_attention_heads"], config["model_type"]
    if family in qwen3_5.FAMILIES and config["layer_types"][number] == qwen3_5.LINEAR:
        for name, dims in qwen3_5.tensors_of_delta_net(config, hidden).items():
            yield f"linear_attn.{name}", dims
        return
    per_head, kv_heads = config.get("head_dim"), config.get("num_key_value_heads")
    per_head = config["hidden_size"] // heads if per_head is None else per_head
    kv_heads = heads if kv_heads is None else kv_heads
    lacks: set[str] = set()
    if family in _GEMMA4 and config["layer_types"][number] == "full_attention":
        own = config["per_layer_config"].get(str(number), {})
        per_head, kv_heads = own.get("head_dim", per_head), own.get("num_key_value_heads", kv_heads)
        lacks = {"v_proj"} if config["attention_k_eq_v"] else lacks
    if family in _GEMMA4 and shares_keys(config, number):
        lacks = {"k_proj", "v_proj", "k_norm"}
    queries, keys = ("num_attention_heads * head_dim", heads * per_head), ("key heads * head_dim", kv_heads * per_head)
    # The second half of a query's width is the gate of the head's output.
    doubled = ("2 * num_attention_heads * head_dim", 2 * queries[1]) if family in qwen3_5.FAMILIES else queries
    outs = {"q_proj": doubled, "k_proj": keys, "v_proj": keys}
    outs = {name: out for name, out in outs.items() if name not in lacks}
    biased = bool(config.get("attention_bias")) and family not in _UNBIASED
    for name, out in outs.items():
        yield f"self_attn.{name}.weight", (out, hidden)
        if biased or family in _BIASED:
            yield f"self_attn.{name}.bias", (out,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if biased and family not in _BIASED:
        yield "self_attn.o_proj.bias", (hidden,)
    if family in _QK_NORMS:
        for name in ("q_norm", "k_norm"):
            if name not in lacks:
                yield f"self_attn.{name}.weight", (("head_dim", per_head),)
    if family == "gpt_oss":
        yield "self_attn.sinks", (("num_attention_heads", heads),)


def _feedforward(config: Mapping[str, Any], number: int, hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    family, sparse = config["model_type"], config["model_type"] in _QWEN_EXPERTS and _is_sparse(config, number)
    # qwen3_5_moe has no dense MLP.
    wide: Any = config.get("intermediate_size") if sparse else config["intermediate_size"]
    inner: tuple[str, int] = ("intermediate_size", wide)
    if family == "mixtral":
        experts = ("num_local_experts", config["num_local_experts"])
        yield "block_sparse_moe.gate.weight", (experts, hidden)
        for expert in range(experts[1]):
            for name, dims in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                yield f"block_sparse_moe.experts.{expert}.{name}.weight", dims
    elif sparse:
        experts = ("num_experts", config["num_experts"])
        yield "mlp.gate.weight", (experts, hidden)
        inner = ("moe_intermediate_size", config["moe_intermediate_size"])
        for expert in range(experts[1]):
            for name, dims in _gated(inner, hidden):
                yield f"mlp.experts.{expert}.{name}.weight", dims
        if family != "qwen3_moe":
            inner = ("shared_expert_intermediate_size", config["shared_expert_intermediate_size"])
            yield "mlp.shared_expert_gate.weight", (("1", 1), hidden)
            for name, dims in _gated(inner, hidden):
                yield f"mlp.shared_expert.{name}.weight", dims
    elif family == "gpt_oss":
        experts = ("num_local_experts", config["num_local_experts"])
        both = ("2 * intermediate_size", 2 * inner[1])
        yield "mlp.router.weight", (experts, hidden)
        yield "mlp.router.bias", (experts,)
        yield "mlp.experts.gate_up_proj", (experts, hidden, both)
        yield "mlp.experts.gate_up_proj_bias", (experts, both)
        yield "mlp.experts.down_proj", (experts, inner, hidden)
        yield "mlp.experts.down_proj_bias", (experts, hidden)
    else:
        if config.get("use_double_wide_mlp") and shares_keys(config, number):
            inner = ("2 * intermediate_size", 2 * inner[1])
        if config.get("enable_moe_block"):
            yield from _gemma4_experts(config, hidden)
        for name, dims in _gated(inner, hidden):
            yield f"mlp.{name}.weight", dims
            if config.get("mlp_bias") and family not in _UNBIASED:
                yield f"mlp.{name}.bias", dims[:1]


def _gemma4_experts(config: Mapping[str, Any], hidden: tuple[str, int]) -> Iterator[tuple[str, Dims]]:
    experts, inner = (
        ("num_experts", config["num_experts"]),
        ("moe_intermediate_size", config["moe_intermediate_size"]),
    )
    yield "router.proj.weight", (experts, hidden)
    yield "router.scale", (hidden,)
    yield "router.per_expert_scale", (experts,)
    yield "experts.gate_up_proj", (experts, ("2 * moe_intermediate_size", 2 * inner[1]), hidden)
    yield "experts.down_proj", (experts, hidden, inner)


def _gated(inner: tuple[str, int], hidden: tuple[str, int]) -> list[tuple[str, Dims]]:
    return [("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))]


def _is_sparse(config: Mapping[str, Any], number: int) -> bool:
    """True if this block of a qwen mixture has experts, as in transformers."""
    step = config.get("decoder_sparse_step", 1)
    return number not in config.get("mlp_only_layers", ()) and config["num_experts"] > 0 and (number + 1) % step == 0


# --- compared with a checkpoint's headers ----------------------------------------------------------------------------


def check_tensors(base: BaseCheckpoint, trains: bool = True, values: bool = True) -> list[str]:
    """Compare config.json with the headers of the weights; a family unknown to this module passes.

    Args:
        trains: also refuse tensors that belong to nothing in the model, and dtypes that training cannot use.
        values: also compare a tied head with the embedding.

    Returns: the tensors that the model does not use; `unused_note` describes them.

    Raises:
        CheckpointError: names the tensor, config.json's value and the remedy.
        UnsupportedError: a tensor's dtype.
    """
    quantised = text_of(base.config).get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
    expected = None if quantised and method != "mxfp4" else expected_tensors(base.config)
    if expected is None:
        return []
    held = {name: stored.names_of(base, name) for name in expected}
    missing = [name for name, names in held.items() if not all(each in base.tensors for each in names)]
    if missing:
        raise CheckpointError(_missing(base, missing, len(expected)))
    for name, dims in expected.items():
        shape, wanted = stored.shape_of(base, name), tuple(size for _, size in dims)
        if shape != wanted:
            raise CheckpointError(
                f"{_where(base)}: {name} has shape {shape}, and {CONFIG} gives {wanted}, "
                f"({', '.join(label for label, _ in dims)}). {CONFIG} and weights do not belong together: correct "
                f"{CONFIG}, or save both with transformers' save_pretrained"
            )
    used = {each for names in held.values() for each in names}
    if is_tied(base.config):
        used.add(HEAD)
    if values:
        check_tied_head(base)
    extra = [name for name in base.names if name not in used and not is_beside(base.config, name)]
    if trains:
        _check_trainable(base, expected, extra)
    return extra


def unused_note(base: BaseCheckpoint, unused: list[str]) -> str | None:
    """A note for the user about the tensors that `check_tensors` returned; None if there are none."""
    if not unused:
        return None
    why = why_unused(base.config, unused[0]) or f"{CONFIG} describes a model without it"
    return f"{_where(base)}: {len(unused)} tensors are not used by the model, the first is {unused[0]} ({why})"


def _check_trainable(base: BaseCheckpoint, expected: Mapping[str, Dims], extra: list[str]) -> None:
    unknown = [name for name in extra if why_unused(base.config, name) is None]
    if unknown:
        beyond = [name for name in unknown if is_beyond(base.config, name)]
        why = f": {CONFIG} has {layers_of(base.config)} layers" if beyond == unknown else ""
        raise CheckpointError(
            f"{_where(base)}: {len(unknown)} tensors belong to nothing in the model, the first is {unknown[0]}{why}. "
            f"{CONFIG} and weights do not belong together: correct {CONFIG}, or save both with transformers' "
            "save_pretrained"
        )
    for name in expected:
        info = base.tensors.get(name)
        if info is not None and info.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{_where(base)}: {name} is {info.dtype}; weights are read as float32, bfloat16 or float16. Save the "
                "base in one of them with transformers' save_pretrained"
            )


def _where(base: BaseCheckpoint) -> str:
    return base.source or str(base.directory)


def _missing(base: BaseCheckpoint, missing: list[str], expected: int) -> str:
    """Describe the missing tensors, with the known cause if one applies."""
    start, names = f"{_where(base)}: ", base.tensors
    prefix = prefix_of(base.config)
    if all(name.removeprefix(prefix) in names for name in missing if name != HEAD):
        if missing == [HEAD]:
            return (
                f"{start}{HEAD} is missing, and {CONFIG} does not tie the head to the embedding. If they are the same, "
                f'write "tie_word_embeddings": true in {CONFIG}; else fetch or save the model with its head'
            )
        return (
            f"{start}the tensors' names lack the prefix {prefix!r}: {missing[0].removeprefix(prefix)!r} stands for "
            f"{missing[0]!r}. They were saved without a head, from the bare decoder (AutoModel). Save the model with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    plain = {without_wrappers(name): name for name in names}
    if all(name in plain for name in missing):
        return (
            f"{start}the tensors' names keep what a wrapper added, the first is {plain[missing[0]]!r} for "
            f"{missing[0]!r}. Save the model without its wrapper (torch.compile, FSDP, DDP)"
        )
    text = next((name for name in names if "language_model." in name), None)
    if text is not None and wrapper_of(base.config) is None:
        return (
            f"{start}{text!r} is of a multimodal checkpoint, whose text model has other names than {CONFIG} gives "
            f"({missing[0]!r}). Save the text model by itself, or give config.json of the whole model"
        )
    return (
        f"{start}{len(missing)} tensors are missing of the {expected} that {CONFIG} gives, the first is {missing[0]}. "
        f"{CONFIG} and weights do not belong together: correct {CONFIG} (num_hidden_layers, model_type), or fetch the "
        "checkpoint again"
    )
