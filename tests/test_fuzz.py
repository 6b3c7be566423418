"""Whatever is in a file: what reads it returns, or raises an error of our tree."""

import copy
import importlib.resources
import json

import numpy as np
import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kithara_ray.errors import DataError, KitharaRayError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.safetensors_file import write_arrays
from kithara_ray.model.families import family_of
from kithara_ray.sft.tokens.formats import PromptAnswer
from kithara_ray.sft.tokens.tokenize import RowTokenizer
from kithara_ray.yaml_file import parse_yaml

# Bounded: a few seconds of `make test`.
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**20, max_value=10**22)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "LORA", "q_proj", "*", "(", "model.safetensors", "../x.safetensors"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, document):
    """The document with one to three of its values replaced, removed or doubled under another name, at any depth."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if action == "replace":
                place[key] = draw(JSON)
            elif action == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=6))] = copy.deepcopy(place[key])
            else:
                place.append(draw(JSON))
            break
    return document


def no_crash(function, *arguments):
    """What the function returned, or the error of ours that it raised."""
    try:
        return function(*arguments)
    except KitharaRayError as error:
        return error


HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def write_header(path, text: bytes, data: bytes = bytes(24)) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@FUZZ
@given(header=changed(HEADER))
def test_safetensors_header(header, directory):
    write_header(directory / "model.safetensors", json.dumps(header).encode("utf-8", "surrogatepass"))
    no_crash(BaseCheckpoint.open, directory)
    (directory / "model.safetensors").unlink()


@FUZZ
@given(data=st.binary(max_size=64) | st.binary(max_size=40).map(lambda b: len(b).to_bytes(8, "little") + b))
def test_safetensors_bytes(data, directory):
    (directory / "model.safetensors").write_bytes(data)
    no_crash(BaseCheckpoint.open, directory)
    (directory / "model.safetensors").unlink()


INDEX = {
    "metadata": {"total_size": 4},
    "weight_map": {"x.weight": "part-1.safetensors", "y.weight": "part-2.safetensors"},
}


@FUZZ
@given(index=changed(INDEX))
def test_index(index, directory):
    for number, name in ((1, "x.weight"), (2, "y.weight")):
        write_arrays(directory / f"part-{number}.safetensors", {name: np.zeros(1, np.float32)}, {})
    (directory / "model.safetensors.index.json").write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
    opened = no_crash(BaseCheckpoint.open, directory)
    assert isinstance(opened, KitharaRayError) or all(path.parent == directory for path in opened.files)
    (directory / "model.safetensors.index.json").unlink()


CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
    "hidden_act": "silu",
}
FAMILIES = [
    "llama",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "olmo3",
    "phi3",
]


@FUZZ
@given(config=changed(CONFIG), family=st.sampled_from(FAMILIES))
def test_model_config(config, family):
    if "model_type" in config and config["model_type"] == "llama":
        config["model_type"] = family
    no_crash(family_of, config)


PEFT = LoraConfig(r=2, target_modules=("a",), rank_pattern={"a": 3}, alpha_pattern={"b": 1.5}).to_peft("base")


@FUZZ
@given(config=changed(PEFT))
def test_adapter_config(config, directory):
    adapter = directory / "adapter"
    adapter.mkdir(exist_ok=True)
    factors = {"base_model.model.a.lora_A.weight": (3, 2), "base_model.model.a.lora_B.weight": (2, 3)}
    write_arrays(
        adapter / "adapter_model.safetensors", {name: np.ones(shape, np.float32) for name, shape in factors.items()}, {}
    )
    (adapter / "adapter_config.json").write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))
    no_crash(Adapter.read, adapter)


@pytest.fixture(scope="module")
def row_tokenizer():
    return RowTokenizer(tiny.tokenizer(), PromptAnswer(), max_seq_len=16)


ROW = {"prompt": "what is 1 + 2 ?", "answer": "three"}


@FUZZ
@given(rows=st.lists(changed(ROW) | JSON, max_size=3))
def test_rows(rows, row_tokenizer):
    block = no_crash(row_tokenizer, rows, 5)
    if isinstance(block, DataError):
        assert "row " in str(block)
    else:
        assert int(block.lengths.sum()) == len(block.token_ids)


TEMPLATE = importlib.resources.files("kithara_ray").joinpath("template.yaml").read_text()


@st.composite
def broken_text(draw):
    """The template with a stretch replaced."""
    start = draw(st.integers(0, len(TEMPLATE) - 1))
    stop = draw(st.integers(start, min(len(TEMPLATE), start + 40)))
    characters = st.text(
        alphabet=st.sampled_from(list("{}[]:,&*!|>-#'\"%@`? \n\tab01.~<=\\")) | st.characters(), max_size=8
    )
    return TEMPLATE[:start] + draw(characters) + TEMPLATE[stop:]


@FUZZ
@given(text=broken_text() | st.text(max_size=40))
def test_yaml_text(text):
    no_crash(parse_yaml, text, "x")


@FUZZ
@given(content=changed(yaml.safe_load(TEMPLATE)))
def test_configuration(content, tmp_path_factory):
    from kithara_ray import config

    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(yaml.safe_dump(content, allow_unicode=False).encode())
    no_crash(config.load, path)
