import hashlib
import json
import shutil

import fsspec
import numpy as np
import peft
import pytest
import torch
import transformers

from kithara_ray.errors import AdapterError, ConfigError, DestinationError, ExportError, UnsupportedError
from kithara_ray.hf import safetensors_file
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports import export as export_module
from kithara_ray.hf.exports import part as part_module
from kithara_ray.hf.exports import proof
from kithara_ray.hf.exports.export import Layout, export

IDS = torch.arange(1, 13).reshape(2, 6)
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
LEFT_OUT = (
    "left out of the base's files: modeling_evil.py (code), pytorch_model.bin (weights in another format), "
    "tokenizer_evil.py (code)"
)
ALWAYS = {"LICENSE", "README.md", "export_report.json", *TOKENIZER}


def _names(directory) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def reference(base, make_adapter, tmp_path):
    """Base logits, and logits with the adapter through peft from files written by Adapter.write."""
    make_adapter(base).write(tmp_path / "reference", str(base.directory))
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory)
    plain = _logits(model)
    adapted = _logits(peft.PeftModel.from_pretrained(model, tmp_path / "reference"))
    assert not torch.allclose(plain, adapted, atol=1e-3)
    return plain, adapted


def test_adapter_layout(base, make_adapter, tmp_path, reference):
    out = tmp_path / "out"
    adapter = make_adapter(base)
    assert export(base, adapter, str(out), Layout.ADAPTER, base_name=str(base.directory)) == str(out)
    assert _names(out) == ADAPTER | ALWAYS
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert torch.equal(_logits(loaded), reference[1])
    assert json.loads((out / "export_report.json").read_text())["tensors"] == {}


def test_separate_layout(base, make_adapter, tmp_path, reference):
    out = tmp_path / "out"
    export(base, make_adapter(base), str(out), Layout.SEPARATE, base_name="hf://org/name@v2")
    assert _names(out) == MODEL | ALWAYS | {f"adapter/{name}" for name in ADAPTER}
    assert (out / "model.safetensors").read_bytes() == (base.directory / "model.safetensors").read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(_logits(model), reference[0])
    model.load_adapter(str(out / "adapter"))
    assert torch.equal(_logits(model), reference[1])
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "v2")


def test_merged_layout(base, make_adapter, tmp_path, reference):
    out = tmp_path / "out"
    export(base, make_adapter(base), str(out), Layout.MERGED, base_name="org/name")
    assert _names(out) == MODEL | ALWAYS
    logits = _logits(transformers.AutoModelForCausalLM.from_pretrained(out))
    assert torch.allclose(logits, reference[1], atol=1e-5)
    assert not torch.allclose(logits, reference[0], atol=1e-3)


def test_report(base, make_adapter, tmp_path):
    out, adapter = tmp_path / "out", make_adapter(base)
    export(base, adapter, str(out), Layout.MERGED, base_name="org/name")
    report = json.loads((out / "export_report.json").read_text())
    assert (report["layout"], report["dtype"]) == ("merged", "auto")
    assert report["base"] == {"name": "org/name", "fingerprint": base.fingerprint(), "tensors": len(base.tensors)}
    assert report["tensors"] == {"untouched": len(base.tensors) - 6, "merged": 6, "merged_and_changed": 6}
    assert report["adapter"]["all_zero"] is False
    assert report["adapter"]["parameters"] == adapter.parameters
    assert report["notes"] == [LEFT_OUT]
    assert len(report["checks"]) == 2
    assert set(report["files"]) == _names(out) - {"export_report.json"}
    for name, entry in report["files"].items():
        raw = (out / name).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


@pytest.mark.parametrize("layout", Layout)
def test_dtype_applies_to_all_that_is_written(base, make_adapter, tmp_path, layout):
    out = tmp_path / "out"
    export(base, make_adapter(base), str(out), layout, dtype="bfloat16", base_name=str(base.directory))
    if layout is not Layout.ADAPTER:
        assert {info.dtype for info in BaseCheckpoint.open(out).tensors.values()} == {"BF16"}
        assert transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    if layout is not Layout.MERGED:
        adapter = Adapter.read(out / "adapter" if layout is Layout.SEPARATE else out)
        assert {str(array.dtype) for array in adapter.tensors.values()} == {"bfloat16"}


@pytest.mark.parametrize("layout", ["adapter", "separate", "merged"])
def test_sharded_base_to_an_object_store(make_base, make_adapter, layout):
    memory = fsspec.filesystem("memory")
    base = BaseCheckpoint.open(make_base("gemma2", "bfloat16", True))
    url = f"memory://exports/{layout}"
    try:
        export(base, make_adapter(base), url, layout, base_name="org/name")
        names = {name.removeprefix(f"/exports/{layout}/") for name in memory.find(f"/exports/{layout}")}
        assert "export_report.json" in names
        assert ({file.name for file in base.files} <= names) == (layout != "adapter")
        with pytest.raises(DestinationError, match="exists and is not empty"):
            export(base, make_adapter(base), url, layout, base_name="org/name")
    finally:
        memory.rm("/exports", recursive=True)


def test_untrained_adapter_is_exported_and_said(base, make_adapter, tmp_path):
    adapter = make_adapter(base)
    for name, array in adapter.tensors.items():
        if ".lora_B." in name:
            array[:] = 0
    export(base, adapter, str(tmp_path / "out"), Layout.MERGED, base_name="org/name")
    report = json.loads((tmp_path / "out/export_report.json").read_text())
    assert report["adapter"]["all_zero"] is True
    assert "untrained" in report["notes"][0]
    assert report["tensors"]["merged_and_changed"] == 0


def test_a_delta_that_rounds_away_is_said(make_base, make_adapter, tmp_path):
    base = BaseCheckpoint.open(make_base("llama", "bfloat16"))
    adapter = make_adapter(base)
    for name, array in adapter.tensors.items():
        array *= 1e-9 if "layers.1." in name else 1
    export(base, adapter, str(tmp_path / "out"), Layout.MERGED, base_name="org/name")
    report = json.loads((tmp_path / "out/export_report.json").read_text())
    assert report["notes"] == ["2 of 6 merged tensors equal the base: their delta is zero or rounds away", LEFT_OUT]


# --- what a broken export would look like: each is caught, and nothing is published


def _flip(path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x40]))


def _flip_tensor(path, name: str, element: int = 0) -> None:
    info = safetensors_file.read_header(path)[0][name]
    _flip(info.file, info.offset + 4 * element + 3)


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = {
    "untouched": (lambda path: _flip_tensor(path, "lm_head.weight", 77), "lm_head.weight: not a target, but its"),
    "merged": (lambda path: _flip_tensor(path, Q), r"q_proj.weight\[0, 0\]: the written file holds"),
    "torn": (lambda path: path.write_bytes(b"torn"), "does not read back.*too short"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_damaged_merge_is_not_published(base, make_adapter, tmp_path, monkeypatch, damage, dtype):
    edit, message = DAMAGE[damage]
    original = part_module.write_tensors

    def merge_and_damage(base, adapter, target, dtype):
        written = original(base, adapter, target, dtype)
        edit(target)
        return written

    monkeypatch.setattr(part_module, "write_tensors", merge_and_damage)
    with pytest.raises(ExportError, match=message):
        export(base, make_adapter(base), str(tmp_path / "out"), Layout.MERGED, dtype=dtype, base_name="n")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_config_is_not_published(base, make_adapter, tmp_path, monkeypatch):
    original = export_module.write_base_config
    lose = lambda *a: [path.unlink() for path in original(*a)]  # noqa: E731
    monkeypatch.setattr(export_module, "write_base_config", lose)
    with pytest.raises(ExportError, match=r"does not read back.*config.json is missing"):
        export(base, make_adapter(base), str(tmp_path / "out"), Layout.MERGED, base_name="n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wrong", ["not merged", "wrong scale", "one module", "transposed sign"])
def test_a_wrong_merge_is_not_published(make_base, make_adapter, tmp_path, monkeypatch, dtype, wrong):
    base = BaseCheckpoint.open(make_base("llama", dtype))
    adapter = make_adapter(base)
    original = part_module.write_tensors

    def merge_wrongly(base, adapter, *rest):
        tensors = {name: array.copy() for name, array in adapter.tensors.items()}
        for name, array in tensors.items():
            if wrong == "not merged" and ".lora_B." in name:
                array[:] = 0
            if wrong == "wrong scale" and ".lora_B." in name:
                array *= 1.1
            if wrong == "one module" and name.startswith("model.layers.2.self_attn.v_proj.lora_B"):
                array[:] = 0
            if wrong == "transposed sign" and ".lora_A." in name:
                array *= -1
        return original(base, Adapter(adapter.config, tensors), *rest)

    monkeypatch.setattr(part_module, "write_tensors", merge_wrongly)
    with pytest.raises(ExportError, match=r"W \+ scale \* B @ A is"):
        export(base, adapter, str(tmp_path / "out"), Layout.MERGED, base_name="n")
    assert list(tmp_path.iterdir()) == []


def test_two_units_in_the_last_place_are_noticed(make_base, make_adapter, tmp_path):
    base = BaseCheckpoint.open(make_base("llama", "bfloat16"))
    adapter = make_adapter(base)
    export(base, adapter, str(tmp_path / "out"), Layout.MERGED, base_name="n")
    written = tmp_path / "out/model.safetensors"
    assert proof.prove_file(written, base, adapter, None)[0]["merged"] == 6
    raw = bytearray(written.read_bytes())
    raw[safetensors_file.read_header(written)[0][Q].offset] ^= 2  # two units in the last place of one bfloat16
    written.write_bytes(raw)
    with pytest.raises(ExportError, match=r"q_proj.weight\[0, 0\]: the written file holds .* 1 of \d+ sampled"):
        proof.prove_file(written, base, adapter, None)


@pytest.mark.parametrize("layout", [Layout.ADAPTER, Layout.SEPARATE])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda a: a.tensors.update({next(iter(a.tensors)): a.tensors[next(iter(a.tensors))] + 1}),
            "reads back different",
        ),
        (lambda a: [a.tensors.pop(n) for n in list(a.tensors)[:2]], "2 adapter tensors were lost or added"),
        (
            lambda a: object.__setattr__(a.config, "lora_alpha", 11),
            r"has scale 2.75 in the written config, expected 2.5",
        ),
    ],
)
def test_a_wrong_adapter_is_not_published(base, make_adapter, tmp_path, monkeypatch, layout, edit, message):
    original = Adapter.write

    def write_wrongly(self, directory, *rest):
        copy = make_adapter(base)
        copy.tensors = dict(self.tensors)
        edit(copy)
        original(copy, directory, *rest)

    monkeypatch.setattr(Adapter, "write", write_wrongly)
    with pytest.raises(ExportError, match=message):
        export(base, make_adapter(base), str(tmp_path / "out"), layout, base_name="n")
    assert list(tmp_path.iterdir()) == []


def test_prove_checkpoint_names_lost_tensors_and_wrong_dtypes(make_base, two_shards):
    with pytest.raises(ExportError, match="tensors were lost or added"):
        proof.prove_checkpoint(two_shards, BaseCheckpoint.open(make_base()), None)
    with pytest.raises(ExportError, match=r"expected F32 \(\d+, 64\), the written file has BF16"):
        proof.prove_checkpoint(make_base("llama", "bfloat16"), BaseCheckpoint.open(make_base()), None)


def test_refused_before_anything_is_written(base, make_base, make_adapter, tmp_path):
    adapter, out = make_adapter(base), str(tmp_path / "out")
    with pytest.raises(ConfigError, match="layout must be one of adapter, separate, merged, got 'zip'"):
        export(base, adapter, out, "zip", base_name="n")
    with pytest.raises(ConfigError, match="dtype must be"):
        export(base, adapter, out, Layout.MERGED, dtype="int4", base_name="n")
    broken = Adapter(adapter.config, {**adapter.tensors})
    broken.tensors.pop(next(iter(broken.tensors)))
    for layout in Layout:
        with pytest.raises(AdapterError, match="is missing, but"):
            export(base, broken, out, layout, base_name="n")
    broken.tensors = {name: array for name, array in adapter.tensors.items() if "layers.2." not in name}
    for layout in Layout:
        with pytest.raises(AdapterError, match="2 modules of the base are targets but have no factors"):
            export(base, broken, out, layout, base_name="n")
    quantized = tmp_path / "q"
    shutil.copytree(base.directory, quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    for layout, dtype in ((Layout.MERGED, "auto"), (Layout.SEPARATE, "bfloat16")):
        with pytest.raises(UnsupportedError, match="quantization_config"):
            export(BaseCheckpoint.open(quantized), adapter, out, layout, dtype=dtype, base_name="n")
    export(BaseCheckpoint.open(quantized), adapter, out, Layout.SEPARATE, base_name="n")
    assert np.array_equal(
        Adapter.read(f"{out}/adapter").tensors[Q.replace("weight", "lora_A.weight")], adapter.a(Q[:-7])
    )


def test_what_a_server_would_not_stop_at_is_said(make_base, make_adapter, tmp_path):
    """The tokenizer's end of sequence against config.json and generation_config.json."""
    directory = tmp_path / "base"
    shutil.copytree(make_base(), directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [{"id": 7, "content": "<end>"}]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    base = BaseCheckpoint.open(directory)
    run = {"seed": 3, "evaluation": {"eval_loss": 0.5}}
    export(base, make_adapter(base), str(tmp_path / "out"), Layout.MERGED, base_name="n", run=run)
    left_out, note = json.loads((tmp_path / "out/export_report.json").read_text())["notes"]
    assert left_out == LEFT_OUT
    assert note.startswith("the tokenizer ends sequences with '<end>' (7), which is no eos_token_id")
    card = (tmp_path / "out/README.md").read_text()
    assert note in card
    assert "| Seed | 3 |" in card
    assert "| Evaluation loss | 0.5 |" in card
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    export(base, make_adapter(base), str(tmp_path / "again"), Layout.MERGED, base_name="n")
    assert json.loads((tmp_path / "again/export_report.json").read_text())["notes"] == [LEFT_OUT]
