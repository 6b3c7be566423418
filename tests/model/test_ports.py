"""Variables made of several tensors, and quantised tensors: read in slices, dequantised as transformers does."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from merging import merge
from parity import LORA, adapter_of, assert_equal, logits, reference
from transformers import AutoModelForCausalLM

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf import mxfp4
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.safetensors_file import write_arrays
from kithara_ray.model.causal_lm import build
from kithara_ray.model.families import ports
from kithara_ray.model.families.tensors import check_tensors
from kithara_ray.model.lora.targets import check_targets, linear_modules_of, other_modules_of
from kithara_ray.model.weights import slots
from kithara_ray.sharding.mesh import make_mesh


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_each_process_reads_only_the_slices_it_owns(family, tiny_models, monkeypatch):
    """What is read of the file, on a device of four, is a quarter of every split weight; also of experts' tensors."""
    base = BaseCheckpoint.open(tiny_models[family])
    model = build(base.config, None, make_mesh(), "float32")
    placed, taken = [], []
    aligned, relative = slots._aligned, ports.Tiled.__getitem__
    monkeypatch.setattr(slots, "_aligned", lambda s, d: placed.append(int(np.prod(s))) or aligned(s, d))
    monkeypatch.setattr(ports.Tiled, "__getitem__", lambda t, i: taken.append(r := relative(t, i)) or r)
    frozen = model.load(base)
    monkeypatch.undo()
    split = [array for array in frozen if not array.sharding.is_fully_replicated]
    assert len(split) >= 9
    for array in split:
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // 4}
    # A replicated array is read once for its four devices, or once each; a split one never twice.
    copied = 4 * sum(a.size for a in frozen if a.sharding.is_fully_replicated)
    assert sum(a.size for a in split) < sum(placed) <= sum(a.size for a in split) + copied
    tiled = [slot for slot in model.slots if len(slot.ports[0].pieces) > 1]
    assert sum(part.size for part in taken) == sum(np.prod(slot.shape) for slot in tiled)
    assert bool(tiled) == (family == "qwen3_moe")


def test_the_tensors_of_a_variable_tile_it_and_say_where(tiny_models):
    """Each is `variable[index]` after its transform: what writing trained weights back needs."""
    base = BaseCheckpoint.open(tiny_models["qwen3_moe"])
    model = build(base.config, None, make_mesh(), "float32")
    found = set()
    for port in (port for slot in model.slots for port in slot.ports):
        whole = np.asarray(port.view(base)[tuple(slice(None) for _ in port.shape)])
        times = np.zeros(port.shape, int)
        for piece in port.pieces:
            times[piece.index] += 1
            found.add(piece.hf_name)
            np.testing.assert_array_equal(whole[piece.index], piece.view(base))
        assert (times == 1).all()
    assert found == set(base.names)


@pytest.mark.parametrize(("family", "lower"), [("llama", "layers.0."), ("mixtral", "experts.0.")])
def test_tensors_of_several_dtypes_keep_their_values(family, lower, tiny_models, tmp_path):
    """The first of a stack, or of a variable, in bfloat16 and one in float16: no value of the others is rounded."""
    tensors = {name: np.array(info) for name, info in of_all(BaseCheckpoint.open(tiny_models[family])).items()}
    dtypes = {name: ml_dtypes.bfloat16 for name in tensors if lower in name}
    dtypes |= {name: np.float16 for name in tensors if lower.replace("0", "1") in name}
    stored = {name: tensor.astype(dtypes.get(name, np.float32)) for name, tensor in tensors.items()}
    assert {str(tensor.dtype) for tensor in stored.values()} == {"float32", "bfloat16", "float16"}
    for kind, written in (("mixed", stored), ("plain", {n: t.astype(np.float32) for n, t in stored.items()})):
        shutil.copytree(tiny_models[family], tmp_path / kind)
        write_arrays(tmp_path / kind / "model.safetensors", written, {"format": "pt"})
    mixed, plain = (BaseCheckpoint.open(tmp_path / kind) for kind in ("mixed", "plain"))
    model = build(plain.config, None, make_mesh(), "float32")
    for slot, one, other in zip(model.slots, model.load(mixed), model.load(plain), strict=True):
        if slot.stacked or len(slot.ports[0].pieces) > 1:
            assert one.dtype == np.float32, slot.key
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other), err_msg=slot.key)


def of_all(base):
    return {name: base.view(name) for name in base.names}


def test_experts_and_routers_are_refused_by_name(tiny_models):
    base = BaseCheckpoint.open(tiny_models["qwen3_moe"])
    for target in ("gate_proj", "gate", "experts.3.up_proj"):
        with pytest.raises(ConfigError, match=f"'{target}' matches model.layers.* of a mixture of experts, which"):
            check_targets(LoraConfig(target_modules=(target,)), linear_modules_of(base), other_modules_of(base))


@pytest.mark.parametrize("family", ["mixtral", "gemma4_text"])
def test_weights_that_could_not_be_written_back_are_not_trained(family, tiny_models):
    base = BaseCheckpoint.open(tiny_models[family])
    with pytest.raises(UnsupportedError, match=f"lora_rank=None: model.* of this {family} model cannot"):
        build(base.config, None, make_mesh(), "float32", train_weights=True)


def pack(tmp_path, base, rng):
    """gpt_oss' files with experts of random MXFP4, and the same with what transformers makes of them."""
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    floats = {name: torch.tensor(np.array(base.view(name))) for name in base.names}
    packed = dict(floats)
    for name in (name for name in base.names if name.endswith(("experts.gate_up_proj", "experts.down_proj"))):
        experts, width, rows = packed.pop(name).shape
        blocks = torch.tensor(rng.integers(0, 256, (experts, rows, width // 32, 16)).astype(np.uint8))
        scales = torch.tensor(rng.integers(118, 125, (experts, rows, width // 32)).astype(np.uint8))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales)
    for kind, tensors, more in (("floats", floats, {}), ("packed", packed, {"quantization_config": MXFP4})):
        (tmp_path / kind).mkdir()
        config = base.config | more
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / kind / "model.safetensors", {"format": "pt"})
    return tmp_path / "packed", tmp_path / "floats"


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


def test_mxfp4_experts_are_dequantised_as_transformers_does(tiny_models, tmp_path):
    packed, floats = pack(tmp_path, BaseCheckpoint.open(tiny_models["gpt_oss"]), np.random.default_rng(0))
    base, plain = BaseCheckpoint.open(packed), BaseCheckpoint.open(floats)
    assert check_tensors(base) == check_tensors(plain) == []
    name = "model.layers.1.mlp.experts.gate_up_proj"
    ours, theirs = mxfp4.view(base, name), plain.view(name)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    # Slices within groups of 32 and across them.
    for index in (np.s_[:, :, :], np.s_[1:3, 5:40, 7:9], np.s_[3:, 32:64, :1], np.s_[:1, 31:33, 64:]):
        np.testing.assert_array_equal(ours[index].view(np.uint16), theirs[index].view(np.uint16))
    np.testing.assert_array_equal(logits(packed), logits(floats))
    reference_model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    assert_equal(logits(packed), reference(reference_model), 1e-4)


def test_merging_into_a_base_with_mxfp4_experts_copies_them(tiny_models, tmp_path):
    """Attention and router are merged as into the base with float experts. A cast and experts' factors are refused."""
    packed, floats = pack(tmp_path, BaseCheckpoint.open(tiny_models["gpt_oss"]), np.random.default_rng(0))
    bases = [BaseCheckpoint.open(directory) for directory in (packed, floats)]
    lora = dataclasses.replace(LORA["gpt_oss"], target_parameters=("router.weight",))
    adapter, of_experts = (
        Adapter(config, adapter_of(build(bases[0].config, config, make_mesh(), "float32")))
        for config in (lora, LORA["gpt_oss"])
    )
    merged = []
    for base in bases:
        out = tmp_path / f"merged {base.directory.name}"
        out.mkdir()
        merge(base, adapter, out)
        merged.append(BaseCheckpoint.open(out))
    assert merged[0].config == bases[0].config
    for name in bases[0].names:
        expected = (bases[0] if ".experts." in name else merged[1]).view(name)
        np.testing.assert_array_equal(merged[0].view(name), expected, err_msg=name)
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert (merged[0].view(changed) != bases[0].view(changed)).any()
    with pytest.raises(UnsupportedError, match=r"quantization_config \(mxfp4\) .* cannot be merged or cast"):
        merge(bases[0], adapter, tmp_path, dtype="bfloat16")
    with pytest.raises(UnsupportedError, match=r"quantization_config \(mxfp4\) .* cannot be merged or cast"):
        merge(bases[0], of_experts, tmp_path)
