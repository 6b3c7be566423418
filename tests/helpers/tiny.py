"""Tiny random models as a user's directory holds them: config, float32 weights, a tokenizer with a chat template."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from sizes import OWN, SIZES, VOCABULARY

TEXT = ["what is 1 + 2 ? three", "the sum of two and five is seven", "0 1 2 3 4 5 6 7 8 9"] * 4

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_FIELDS = {family: size.get("text_config", size) for family, size in SIZES.items()}
RECURRENT = {family for family, fields in _FIELDS.items() if "linear_num_key_heads" in fields}
MIXTURES = {family for family, fields in _FIELDS.items() if {"num_experts_per_tok", "moe_k"} & fields.keys()}
# Families that are like another of the table but for what the long tests compare.
LIKE_OTHERS = (
    (OWN.keys() - {"phi3", "olmo3"})
    | {"gemma4 experts", "gemma4_unified", "gemma4_unified_text"}
    | {"mistral3", "mistral3 ministral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    | {"qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen2_moe"}
)
# Families with more in their files than is built and trained.
MULTIMODAL = {family for family, size in SIZES.items() if "text_config" in size}
# The names of a family's linear layers, which LoRA can adapt.
_NO_GATE = (*_ATTENTION, "up_proj", "down_proj")
_RECURRENT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
TARGETS = {family: _ATTENTION if family in MIXTURES else _LINEAR for family in SIZES} | {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "glm4": (*_ATTENTION, "gate_up_proj", "down_proj"),
    "starcoder2": (*_ATTENTION, "c_fc", "c_proj"),
    "gemma4": (*_LINEAR, "per_layer_input_gate", "per_layer_model_projection", "per_layer_projection"),
    **dict.fromkeys(("nemotron", "arcee", "apertus"), _NO_GATE),
    "qwen3_5_text": (*_LINEAR, *_RECURRENT),
    # PEFT takes "up_proj" for the shared expert's layer here, and for all experts' parameter in qwen3_next.
    "qwen3_5_moe_text": (*_LINEAR, *_RECURRENT, "shared_expert_gate"),
    "qwen2_moe": (*_LINEAR, "shared_expert_gate"),
    "qwen3_next": (*_ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"),
    # The last one is the router's.
    "gemma4 experts": (*_LINEAR, "proj"),
}
TARGETS |= {family: TARGETS[f"{family}_text"] for family in ("qwen3_5", "qwen3_5_moe")}
# The parameters of a mixture, which LoRA can adapt too.
_BOTH = ("experts.gate_up_proj", "experts.down_proj")
PARAMETERS = {family: (*_BOTH, "gate.weight") for family in MIXTURES} | {
    "gpt_oss": (*_BOTH, "router.weight"),
    "gemma4 experts": _BOTH,
}
# Mixtures whose parameters "all-linear" adapts in PEFT; gate and up projection with twice the rank.
IN_ALL_LINEAR = {"ernie4_5_moe", "glm4_moe", "minimax_m2", "mixtral", "qwen3_moe", "qwen3_next"}


# Families of the short tests. Between them they have periods, windows, soft caps, sinks, experts, and a tied head.
SHORT_FAMILIES = ("gemma2", "gpt_oss", "llama")


def mostly_long(short: Iterable[str], families: Iterable[str] = SIZES) -> list:
    """Parameters: these families, and the others of `families` among the long tests."""
    others = sorted(set(families) - set(short))
    return [*short, *(pytest.param(family, marks=pytest.mark.long) for family in others)]


def long_unless(chosen: Callable[..., bool], cases: Iterable[tuple]) -> list:
    """Parameters: these cases, and those among the long tests of which `chosen(*case)` is false."""
    return [pytest.param(*case, marks=[] if chosen(*case) else pytest.mark.long) for case in cases]


def model_type(family: str) -> str:
    """The `model_type` of a row of SIZES, whose name may add a word."""
    return family.partition(" ")[0]


def text_size(family: str) -> dict:
    """The fields of a family's text model."""
    return _FIELDS[family]


def config_of(family: str, **fields):
    """transformers' config of a tiny model; `fields` are the text model's."""
    import transformers

    config_class = type(transformers.AutoConfig.for_model(model_type(family)))
    special = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    text = special | text_size(family) | fields
    return config_class(**SIZES[family] | {"text_config": text}) if family in MULTIMODAL else config_class(**text)


def auto_class(kind: str):
    """The class of transformers that builds the whole model of a `model_type`, with a head."""
    import transformers

    return transformers.AutoModelForImageTextToText if kind in MULTIMODAL else transformers.AutoModelForCausalLM


def load(directory: Path, **settings):
    """The model in a directory, as users load it."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    return auto_class(kind).from_pretrained(directory, **settings)


def write_model(directory: Path, family: str, **fields) -> Path:
    """A model of a family; weights large enough that a wrong mask, norm or scale shows."""
    import torch

    torch.manual_seed(0)
    model = auto_class(model_type(family)).from_config(config_of(family, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # These amplify float32's noise: with 2.5, torch's own logits of gpt_oss were 1.5e-4 from those of float64,
            # and its gradients of smollm3 1.1e-5, of gemma4_text 2.3e-5.
            # torch's logits differ by 2e-4 between a recurrent state in chunks and one token by token.
            # With 2.5, logits of a packed row of qwen2_5_vl were 1.1e-4 from those of its samples, in values of 6.
            # With 2.5 and an adapter, one row of ministral3 in its wrapper was 3.9e-4 off without LLVM's optimisations,
            # and within 2e-4 with them.
            low = family in {*MIXTURES, *OWN, "mistral3 ministral3", "qwen2_5_vl", "smollm3"} or "gemma4" in family
            gain = 1.0 if family in RECURRENT else 1.5 if low else 2.5
            std = 0.3 if "norm" in name else gain / np.sqrt(parameter.shape[-1])
            parameter.add_(torch.randn_like(parameter) * std)
            if family.startswith("gemma4") and "q_norm" in name:
                # What scales its attention, which has no other factor.
                parameter.mul_(0.25)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


# Fields of a llama whose weights have no dim, but for the vocabulary's, that four devices divide.
UNEVEN = dict(hidden_size=90, intermediate_size=126, num_attention_heads=9, num_key_value_heads=3, head_dim=10)


def with_mild_attention(directory: Path, out: Path) -> Path:
    """A copy of such a model with a quarter of its queries. A sharp softmax amplifies float32's noise: torch's own
    gradients in float32 were 0.9e-5 (gemma, mistral, qwen2) to 1.3e-5 (llama) from those in float64; so, 2e-6. A
    recurrent state does too, 1e-5 (qwen3_5_text); with a quarter of what enters it, 2e-6.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, out)
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if name.endswith(("q_proj.weight", "in_proj_qkv.weight", "in_proj_qkvz.weight")):
            tensors[name] *= 0.25
        if name.endswith("qkv_proj.weight"):
            # The queries come first, and are as wide as the model.
            tensors[name][: tensors[name].shape[1]] *= 0.25
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def tokenizer():
    """A byte-level BPE with chat markers that adds no BOS, as SmolLM2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def rows(count: int) -> list[dict]:
    """Prompts and answers of different lengths."""
    words = "zero one two three four five six seven eight nine ten".split()
    return [
        {"prompt": f"what is {i % 5} + {i % 4} ?", "answer": " " + " ".join([words[i % 5 + i % 4]] * (1 + i % 3))}
        for i in range(count)
    ]
