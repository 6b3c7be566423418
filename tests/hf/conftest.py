"""Tiny random checkpoints made by transformers, adapters made by peft, and malformed files made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from stores import clear_memory

from kithara_ray.hf import safetensors_file
from kithara_ray.hf.adapter import Adapter, LoraConfig, target_modules_of
from kithara_ray.hf.checkpoint import BaseCheckpoint

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16
)


def _model(family: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    if family == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2)
        model = transformers.Gemma2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype)


@pytest.fixture
def memory():
    """fsspec's store in this process, empty before and behind."""
    yield clear_memory()
    clear_memory()


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """torch's sgemm rounds differently with many threads where a width is not a multiple of 16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory):
    """make_base(family, dtype, sharded) -> directory, made once per combination; tests must not write into it."""
    made: dict[tuple, Path] = {}

    def make(family: str = "llama", dtype: str = "float32", sharded: bool = False) -> Path:
        key = (family, dtype, sharded)
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{family}_{dtype}")
            model = _model(family, getattr(torch, dtype))
            model.save_pretrained(directory, max_shard_size="60KB" if sharded else "1GB")
            words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
            tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0")).save(str(directory / "tokenizer.json"))
            (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
            (directory / "chat_template.jinja").write_text("{{ messages }}")
            (directory / "LICENSE").write_text("Apache-2.0")
            (directory / "modeling_evil.py").write_text("raise SystemExit")
            (directory / "tokenizer_evil.py").write_text("raise SystemExit")
            (directory / "pytorch_model.bin").write_bytes(b"pickle")
            made[key] = directory
        return made[key]

    return make


@pytest.fixture
def base(make_base) -> BaseCheckpoint:
    return BaseCheckpoint.open(make_base())


@pytest.fixture(scope="session")
def make_adapter():
    """make_adapter(base, **LoraConfig fields) -> Adapter with random non-zero factors for every target."""

    def make(base: BaseCheckpoint, seed: int = 0, dtype=np.float32, **fields) -> Adapter:
        config = LoraConfig(**{"r": 4, "lora_alpha": 10, **fields})
        rng, tensors = np.random.default_rng(seed), {}
        for module in target_modules_of(config, base):
            n_out, n_in = base.tensors[module + ".weight"].shape
            r = config.rank_of(module)
            tensors[f"{module}.lora_A.weight"] = (rng.normal(size=(r, n_in)) * 0.1).astype(dtype)
            tensors[f"{module}.lora_B.weight"] = (rng.normal(size=(n_out, r)) * 0.1).astype(dtype)
            if config.use_dora:
                tensors[f"{module}.lora_magnitude_vector"] = rng.uniform(0.2, 2, n_out).astype(dtype)
        return Adapter(config, tensors)

    return make


@pytest.fixture
def write_raw(tmp_path):
    """write_raw(header or bytes, data) -> path of a safetensors file with exactly that header."""

    def write(header, data: bytes = b"", name: str = "model.safetensors", length: int | None = None) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
        return path

    return write


@pytest.fixture
def two_shards(tmp_path) -> Path:
    """A well-formed checkpoint of two shards with tensors x and y."""
    for number, name in ((1, "x"), (2, "y")):
        file = tmp_path / f"model-0000{number}-of-00002.safetensors"
        safetensors_file.write_arrays(file, {name: np.ones(3, np.float32)}, {})
    files = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path
