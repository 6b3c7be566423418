"""Adapters of experts and routers: PEFT's names, files, targets and merges."""

import dataclasses
import json

import numpy as np
import peft
import pytest
import tiny
import torch
from merging import merge

from kithara_ray.errors import AdapterError, ConfigError, UnsupportedError
from kithara_ray.hf.adapter import ADAPTER_WEIGHTS, Adapter, LoraConfig, target_modules_of
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import REPORT, Layout, export
from kithara_ray.hf.exports.notes import serving_notes
from kithara_ray.hf.exports.request import ExportRequest
from kithara_ray.hf.facts.experts import in_file, is_parameter, parameters_of
from kithara_ray.hf.merging.combine import combine
from kithara_ray.hf.merging.merge import write_tensors
from kithara_ray.hf.merging.per_expert import per_expert
from kithara_ray.model.lora.targets import lora_config_of

# PEFT looks for a pattern's match among the modules only.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
FAMILIES = sorted(tiny.PARAMETERS)
# Every form of a file: an expert's matrices under two names, all experts' in one, transposed, in a larger model.
SHORT = ["gemma4 experts", "gpt_oss", "mixtral", "qwen3_moe"]
SETTINGS = dict(
    target_parameters=None, rank_pattern=None, alpha_pattern=None, init_lora_weights=True, lora_alpha=None,
)  # fmt: skip


def adapted(model, **fields):
    """A random adapter of PEFT, B too."""
    with_lora = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in with_lora.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return with_lora


def targets_of(family) -> dict:
    """All linear layers of the text model, and all parameters."""
    text = r".*language_model.*\." if family in tiny.MULTIMODAL else r"model\.layers.*\."
    return dict(target_modules=f"{text}({'|'.join(tiny.TARGETS[family])})", target_parameters=tiny.PARAMETERS[family])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.mostly_long(SHORT, FAMILIES))
def test_peft_s_file_comes_back_to_the_byte_and_is_merged_to_the_bit(family, dtype, tiny_models, tmp_path):
    model = tiny.load(tiny_models[family], dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "base")
    # PEFT resolves a regular expression to names for some families, and takes these for experts.
    fields = targets_of(family)
    if family in tiny.IN_ALL_LINEAR:
        fields = dict(target_modules="all-linear")
    with_lora = adapted(model, **fields)
    with_lora.save_pretrained(tmp_path / "theirs")
    base, adapter = BaseCheckpoint.open(tmp_path / "base"), Adapter.read(tmp_path / "theirs")
    adapter.validate(base)
    assert sum(map(is_parameter, adapter.modules)) == sum(map(is_parameter, parameters_of(base)))
    adapter.write(tmp_path / "ours", "base")
    written = [(tmp_path / name / ADAPTER_WEIGHTS).read_bytes() for name in ("theirs", "ours")]
    assert written[0] == written[1]
    (tmp_path / "merged").mkdir()
    merge(base, adapter, tmp_path / "merged")
    with_lora.merge_and_unload().save_pretrained(tmp_path / "wanted")
    merged, wanted = BaseCheckpoint.open(tmp_path / "merged"), BaseCheckpoint.open(tmp_path / "wanted")
    changed = {name for name in wanted.names if merged.view(name).tobytes() != base.view(name).tobytes()}
    assert all(merged.view(name).tobytes() == wanted.view(name).tobytes() for name in wanted.names)
    assert any("experts" in name for name in changed)
    assert any(name.endswith(("gate.weight", "router.weight", "router.proj.weight")) for name in changed)


def shapes_of(lora: LoraConfig, base: BaseCheckpoint) -> dict[str, tuple]:
    """Shape and scale of every A and B by PEFT's names."""
    made, targets, parameters = {}, target_modules_of(lora, base), parameters_of(base)
    for module in targets:
        rank, found = lora.rank_of(module), parameters.get(lora.parameter_of(module) or "")
        if found is None:
            rows, columns = base.tensors[f"{module}.weight"].shape
            shapes = (rank, columns), (rows, rank)
        else:
            shapes = found.factors(rank)
        name = in_file(module, targets) if is_parameter(module) else module
        made |= {
            f"{name}.lora_{letter}": (shape, lora.scale_of(module)) for letter, shape in zip("AB", shapes, strict=True)
        }
    return made


def shapes_of_peft(family, **fields) -> dict[str, tuple]:
    with torch.device("meta"):
        model = tiny.auto_class(tiny.model_type(family)).from_config(tiny.config_of(family))
        with_lora = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, **fields))
    made = {}
    for name, layer in with_lora.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for letter in "AB":
                weight = getattr(layer, f"lora_{letter}")["default"].weight
                made[f"{name}.lora_{letter}"] = tuple(weight.shape), layer.scaling["default"]
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_adapts_exactly_what_it_adapts_in_peft(family, tiny_models):
    base = BaseCheckpoint.open(tiny_models[family])
    ours = lora_config_of(4, base, **SETTINGS | dict(target_modules="all-linear", lora_alpha=10))
    theirs = shapes_of_peft(family, target_modules="all-linear")
    if family in tiny.MULTIMODAL:
        theirs = {name: found for name, found in theirs.items() if "language_model" in name}
    assert shapes_of(ours, base) == theirs
    assert bool(ours.target_parameters) == (family in tiny.IN_ALL_LINEAR)


LISTS = {
    "names of experts": ("qwen3_moe", dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    "one matrix": ("mixtral", dict(target_modules=["w2", "gate"])),
    "patterns": (
        "qwen3_moe",
        dict(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "layers.0.mlp.experts.down_proj"],
            rank_pattern={"gate_up_proj": 6, r"layers\.2\..*gate_up_proj": 3},
            alpha_pattern={r".*experts\.down_proj": 5},
        ),
    ),
    "experts alone": ("gpt_oss", dict(target_modules=[], target_parameters=["experts.down_proj"])),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_mean_what_they_mean_in_peft(case, tiny_models):
    family, fields = LISTS[case]
    base = BaseCheckpoint.open(tiny_models[family])
    ours = shapes_of(lora_config_of(4, base, **SETTINGS | dict(lora_alpha=10) | fields), base)
    assert ours == shapes_of_peft(family, **fields)
    assert any("experts" in name for name in ours)


REFUSED = {
    "unknown": (
        dict(target_parameters=["experts.w1"]),
        r"'experts.w1' matches no parameter.* mlp.experts.down_proj",
    ),
    "too wide": (dict(target_parameters=["weight"]), r"'weight' matches lm_head.weight too, which is of no mixture"),
    "half": (dict(target_modules=["up_proj"]), r"'up_proj' needs 'gate_proj' beside it"),
    "dotted": (
        dict(target_modules=["layers.0.mlp.up_proj"]),
        r"PEFT takes 'layers.0.mlp.up_proj' for 'gate_up_proj'",
    ),
    "layers": (
        dict(target_modules=["q_proj", "gate"], layers_to_transform=[2]),
        r"layers_to_transform selects no parameters.*'layers.2.mlp.experts.down_proj'",
    ),
    "text": (dict(target_parameters="gate.weight"), "target_parameters must be a list of names"),
    "dropout": (
        dict(target_modules="all-linear", lora_dropout=0.1),
        r"lora_dropout=0.1 cannot be combined",
    ),
    "dora": (dict(target_parameters=["gate.weight"], use_dora=True), r"use_dora=True cannot be combined"),
    "bias": (dict(target_parameters=["gate.weight"], bias="all"), r"bias='all' cannot be combined"),
    "expression": (dict(target_modules=r".*experts.*"), r"of a mixture of experts.*give target_parameters"),
    "none": (dict(target_modules=[]), "target_modules must name at least one module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_peft_would_not_honour_are_refused_by_name(case, tiny_models):
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        lora_config_of(
            4, BaseCheckpoint.open(tiny_models["qwen3_moe"]), **SETTINGS | dict(target_modules=["q_proj"]) | fields
        )


def test_a_model_without_experts_has_no_such_parameters(tiny_models):
    fields, base = dict(target_modules=[], target_parameters=["down_proj"]), BaseCheckpoint.open(tiny_models["llama"])
    with pytest.raises(ConfigError, match="this model is no mixture of experts; give target_modules"):
        lora_config_of(4, base, **SETTINGS | fields)


def test_factors_that_do_not_fit_are_named(tiny_models):
    base = BaseCheckpoint.open(tiny_models["qwen3_moe"])
    lora = LoraConfig(r=2, target_modules=(), target_parameters=("layers.0.mlp.experts.down_proj",))
    name = "model.layers.0.mlp.experts.down_proj"
    shapes = parameters_of(base)[name].factors(2)
    tensors = {
        f"{name}.lora_{letter}.weight": np.ones(shape, np.float32) for letter, shape in zip("AB", shapes, strict=True)
    }
    Adapter(lora, tensors).validate(base)
    with pytest.raises(AdapterError, match=r"expected rank 2, found 15 in lora_A"):
        Adapter(lora, tensors | {f"{name}.lora_A.weight": np.ones((15, 48), np.float32)}).validate(base)
    few = {key: array[:4] if "lora_A" in key else array[:, :4] for key, array in tensors.items()}
    with pytest.raises(AdapterError, match=r"expected shape \(16, 48\) for model.*down_proj \(8, 64, 48\)"):
        Adapter(lora, few).validate(base)


SPLIT = {
    "qwen3_moe": dict(target_modules="all-linear"),
    "mixtral": dict(target_modules=["q_proj", "w1", "w2", "w3"], use_rslora=True),
}


@pytest.mark.parametrize("family", SPLIT)
def test_factors_of_each_expert_apart_are_the_same_update(family, tiny_models, tmp_path):
    """As PEFT reads them too, which packs them again."""
    fields, base = SPLIT[family], BaseCheckpoint.open(tiny_models[family])
    if fields.get("use_rslora"):
        # PEFT doubles alpha with the rank, which is not the same scale then.
        fields = dict(target_modules=["q_proj"], target_parameters=tiny.PARAMETERS[family], use_rslora=True)
    adapted(tiny.load(tiny_models[family]), **fields).save_pretrained(tmp_path / "packed")
    packed = Adapter.read(tmp_path / "packed")
    export(base, packed, str(tmp_path / "apart"), Layout.ADAPTER, base_name="base", experts="per_expert")
    apart = Adapter.read(tmp_path / "apart")
    assert {f"{module}.weight" for module in apart.modules} <= set(base.names)
    merged = {}
    for name, adapter in {"packed": packed, "apart": apart}.items():
        (tmp_path / f"merged {name}").mkdir()
        write_tensors(base, adapter, tmp_path / f"merged {name}" / "model.safetensors")
        merged[name] = (tmp_path / f"merged {name}" / "model.safetensors").read_bytes()
    assert merged["packed"] == merged["apart"] != base.files[0].read_bytes()
    assert packed.config.target_parameters
    assert not any("vLLM" in note for note in json.loads((tmp_path / "apart" / REPORT).read_text())["notes"])
    if family == "qwen3_moe":
        logits = []
        for directory in ("packed", "apart"):
            loaded = peft.PeftModel.from_pretrained(tiny.load(tiny_models[family]), tmp_path / directory)
            with torch.no_grad():
                logits.append(loaded(torch.arange(3, 19)[None]).logits)
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_factors_that_a_server_would_drop_are_told(tiny_models, tmp_path):
    def notes_of(family, **config):
        base = BaseCheckpoint.open(tiny_models[family])
        base = BaseCheckpoint(base.directory, base.config | config, base.tensors, base.files)
        lora = LoraConfig(r=2, target_modules=(), target_parameters=("experts.down_proj",))
        return " ".join(serving_notes(base, adapter_of(lora, base)))

    assert 'drops PEFT\'s packed ones without an error: export the adapter with experts="per_expert"' in notes_of(
        "mixtral"
    )
    assert notes_of("gpt_oss") == ""
    assert "vLLM applies no factors of gemma4's experts" in notes_of("gemma4 experts")


def adapter_of(lora: LoraConfig, base: BaseCheckpoint) -> Adapter:
    """An adapter of ones for these parameters of experts."""
    tensors = {}
    for name, parameter in parameters_of(base).items():
        if lora.parameter_of(name) is not None:
            a, b = (np.ones(shape, np.float32) for shape in parameter.factors(lora.rank_of(name)))
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return Adapter(lora, tensors)


def test_factors_that_cannot_stand_apart_are_refused(tiny_models):
    lora = LoraConfig(r=2, target_modules=(), target_parameters=tiny.PARAMETERS["gpt_oss"][:2])
    packed = BaseCheckpoint.open(tiny_models["gpt_oss"])
    with pytest.raises(UnsupportedError, match="this gpt_oss model hold all experts in one tensor"):
        per_expert(adapter_of(lora, packed), packed)
    base = BaseCheckpoint.open(tiny_models["mixtral"])
    uneven = dataclasses.replace(lora, alpha_pattern={"down_proj": 7})
    with pytest.raises(UnsupportedError, match=r"modules have the scales \[1.0, 3.5\], and a server reads one"):
        per_expert(adapter_of(uneven, base), base)
    with pytest.raises(UnsupportedError, match="target_parameters cannot be combined, in PEFT neither"):
        combine([adapter_of(lora, base)] * 2, [0.5, 0.5])
    for request in (ExportRequest("/x", experts="per_expert"), ExportRequest("/x", experts="packed")):
        with pytest.raises(ConfigError, match="experts"):
            request.check(lora)
