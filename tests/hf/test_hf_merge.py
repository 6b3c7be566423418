"""Merging files, against peft's merge_and_unload bit by bit."""

import json
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from merging import merge, merge_file

from kithara_ray.errors import AdapterError, ConfigError, ExportError, UnsupportedError
from kithara_ray.hf import safetensors_file
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merging import merge as merge_module
from kithara_ray.hf.merging.merge import check_mergeable, write_tensors

Q = "model.layers.0.self_attn.q_proj"
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "alpha": {"lora_alpha": 10},
    "rslora": {"lora_alpha": 7, "use_rslora": True, "r": 8},
    "patterns": {"rank_pattern": {r"layers\.1\..*q_proj": 2, "v_proj": 6}, "alpha_pattern": {r"2\..*v_proj": 3}},
    "dora": {"target_modules": EVERY, "use_dora": True, "use_rslora": True, "rank_pattern": {"up_proj": 7}},
    "every": {"target_modules": EVERY, "r": 16, "lora_alpha": 5.5},
}


def _peft_merge(base: BaseCheckpoint, adapter: Adapter, directory, dtype: str = "auto") -> dict[str, torch.Tensor]:
    adapter.write(directory, str(base.directory))
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, directory).merge_and_unload().state_dict()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _load(directory) -> dict[str, torch.Tensor]:
    loaded = {}
    for file in BaseCheckpoint.open(directory).files:
        loaded |= safetensors.torch.load_file(file)
    return loaded


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_bit_identical_to_peft(make_base, make_adapter, tmp_path, family, dtype, case):
    base = BaseCheckpoint.open(make_base(family, dtype, sharded=case == "patterns"))
    adapter = make_adapter(base, **CASES[case])
    reference = _peft_merge(base, adapter, tmp_path / "adapter")
    merged_directory = tmp_path / "merged"
    merged_directory.mkdir()
    merge(base, adapter, merged_directory)
    before, after = _load(base.directory), _load(merged_directory)
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert torch.equal(_bits(tensor), _bits(reference[name])), name
        changed = not torch.equal(_bits(tensor), _bits(before[name]))
        assert changed == (name.removesuffix(".weight") in adapter.modules), name
    assert len(BaseCheckpoint.open(merged_directory).files) == len(base.files)


def test_everything_else_in_the_files_stays(make_base, make_adapter, tmp_path):
    base = BaseCheckpoint.open(make_base("llama", "bfloat16", sharded=True))
    written = merge(base, make_adapter(base), tmp_path)
    assert sorted(p.name for p in written) == sorted(p.name for p in tmp_path.iterdir())
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / name).read_bytes() == (base.directory / name).read_bytes()
    for file in base.files:
        assert safetensors_file.read_header(tmp_path / file.name)[1] == {"format": "pt"}
        before, after = file.read_bytes(), (tmp_path / file.name).read_bytes()
        n = 8 + int.from_bytes(before[:8], "little")
        assert before[:n] == after[:n]


def test_the_metadata_of_files_written_anew(make_adapter, tmp_path, caplog):
    """transformers reads `format`; other entries are kept where the files that were joined agree."""
    arrays = {f"model.layers.{n}.q_proj.weight": np.ones((12, 16), np.float32) for n in range(2)}
    files = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(arrays, 1)}
    source = tmp_path / "base"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for (name, array), own in zip(arrays.items(), ("one", "two"), strict=True):
        metadata = {"licence": "mine", "origin": own}
        safetensors_file.write_arrays(source / files[name], {name: array}, metadata)
    base = BaseCheckpoint.open(source)
    joined = write_tensors(base, make_adapter(base), tmp_path / "joined.safetensors")
    assert safetensors_file.read_header(joined)[1] == {"format": "pt", "licence": "mine"}
    assert "'origin' differs between the base's weight files and is left out: ['one', 'two']" in caplog.text


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_cast(make_base, make_adapter, tmp_path, stored, dtype, sharded):
    """Merged in float32 and rounded once: peft on a float32 model, cast afterwards."""
    base = BaseCheckpoint.open(make_base("llama", stored, sharded))
    adapter = make_adapter(base, use_dora=sharded)
    reference = _peft_merge(base, adapter, tmp_path / "adapter", dtype="float32")
    merged_directory = tmp_path / "merged"
    merged_directory.mkdir()
    merge(base, adapter, merged_directory, dtype)
    after = _load(merged_directory)
    for name, tensor in after.items():
        assert torch.equal(_bits(tensor), _bits(reference[name].to(getattr(torch, dtype)))), name
    assert json.loads((merged_directory / "config.json").read_text())["dtype"] == dtype
    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged_directory, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    if sharded:
        index = json.loads((merged_directory / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in after.values())


@pytest.mark.parametrize("use_dora", [False, True])
def test_blocks_do_not_change_the_result_and_bound_memory(use_dora, make_adapter, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    weights = {"x.q_proj.weight": rng.normal(size=(1500, 1000)).astype(ml_dtypes.bfloat16)}
    (tmp_path / "base").mkdir()
    safetensors_file.write_arrays(tmp_path / "base" / "model.safetensors", weights, {})
    (tmp_path / "base" / "config.json").write_text("{}")
    base = BaseCheckpoint.open(tmp_path / "base")
    adapter = make_adapter(base, target_modules=("q_proj",), use_dora=use_dora)
    files = []
    for elements in (1 << 20, 10_000, 1):
        monkeypatch.setattr(merge_module.row_blocks, "__defaults__", (elements,))
        directory = tmp_path / str(elements)
        directory.mkdir()
        tracemalloc.start()
        file = merge_file(base, adapter, base.files[0], directory)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        files.append(file.read_bytes())
        if elements == 10_000:
            assert peak_bytes < 1_000_000  # the float32 tensor has 6 MB
    assert files[0] == files[1] == files[2]


def test_zero_sized_and_integer_tensors_survive_a_cast(tmp_path):
    arrays = {
        "e": np.empty((0, 3), np.float32),
        "s": np.float32(1.5).reshape(()),
        "i": np.arange(3),
        "f": np.ones((2, 0)),
    }
    safetensors_file.write_arrays(tmp_path / "model.safetensors", arrays, {})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    base = BaseCheckpoint.open(tmp_path)
    found = safetensors.torch.load_file(merge_file(base, None, base.files[0], tmp_path / "out", "bfloat16"))
    assert {n: (str(t.dtype), tuple(t.shape)) for n, t in found.items()} == {
        "e": ("torch.bfloat16", (0, 3)), "s": ("torch.bfloat16", ()),
        "i": ("torch.int64", (3,)), "f": ("torch.bfloat16", (2, 0)),
    }  # fmt: skip
    assert found["s"].item() == 1.5
    assert found["i"].tolist() == [0, 1, 2]


def test_cast_sets_every_dtype_of_the_config(tmp_path):
    """`torch_dtype` is what transformers 4 wrote; multimodal configs nest a second one."""
    safetensors_file.write_arrays(tmp_path / "model.safetensors", {"x": np.ones(2, np.float32)}, {})
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "hidden_size": 2}, "layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    merge_module.write_config(BaseCheckpoint.open(tmp_path), tmp_path / "out", "float16")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "torch_dtype": "float16", "text_config": {"dtype": "float16", "hidden_size": 2}, "layers": 1
    }  # fmt: skip


def _with(make_base, directory, **config) -> BaseCheckpoint:
    shutil.copytree(make_base(), directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return BaseCheckpoint.open(directory)


def test_refusals(base, make_base, make_adapter, tmp_path):
    with pytest.raises(ConfigError, match='dtype must be "auto", "float32", "bfloat16" or "float16", got \'int8\''):
        merge(base, make_adapter(base), tmp_path, "int8")
    quantized = _with(make_base, tmp_path / "quantized", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedError, match=r"quantization_config \(fp8\) in config.json"):
        merge(quantized, make_adapter(quantized), tmp_path)
    with pytest.raises(UnsupportedError, match=r"embed_tokens: adapters on the token embedding cannot be merged"):
        check_mergeable(base, make_adapter(base, target_modules=("embed_tokens",)))
    head = make_adapter(base, target_modules=("lm_head",))
    check_mergeable(base, head)  # untied in this base
    with pytest.raises(UnsupportedError, match="lm_head: its weight is tied"):
        check_mergeable(_with(make_base, tmp_path / "tied", tie_word_embeddings=True), head)
    stranger = Adapter(LoraConfig(r=2, target_modules=("q_proj",)), {
        "y.q_proj.lora_A.weight": np.ones((2, 3), "f4"), "y.q_proj.lora_B.weight": np.ones((3, 2), "f4")
    })  # fmt: skip
    with pytest.raises(AdapterError, match=r"y.q_proj: the base at .* has no tensor 'y.q_proj.weight'"):
        merge(base, stranger, tmp_path)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8, np.uint8])
def test_quantised_targets_are_refused_by_name(make_adapter, tmp_path, dtype):
    safetensors_file.write_arrays(tmp_path / "model.safetensors", {"x.q_proj.weight": np.ones((16, 16), dtype)}, {})
    (tmp_path / "config.json").write_text("{}")
    base = BaseCheckpoint.open(tmp_path)
    with pytest.raises(UnsupportedError, match=r"x.q_proj.weight: a (F8_E4M3|I8|U8) weight cannot be merged into"):
        check_mergeable(base, make_adapter(base))


def test_overflow_is_named(base, make_base, make_adapter, tmp_path):
    half = BaseCheckpoint.open(make_base("llama", "float16"))
    adapter = make_adapter(half)
    adapter.b(Q)[0] = 1e5
    with pytest.raises(ExportError, match=f"{Q}.weight: finite F16 values become infinite as F16"):
        merge(half, adapter, tmp_path)
    with pytest.raises(ExportError, match=f"{Q}.weight: finite F32 values become infinite as F16"):
        merge(base, adapter, tmp_path, "float16")
    merge(base, adapter, tmp_path, "bfloat16")
