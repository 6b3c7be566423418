"""Every family against transformers: the sharded, scanned model computes what Hugging Face's does."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel
from tiny import VOCABULARY, write_model
from transformers import AutoModelForCausalLM

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(r=4, lora_alpha=12, target_modules=LINEAR)
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (4, 24)).astype(np.int32)
# The last row is padded, as a batch's rows are.
SEGMENTS = np.ones_like(TOKENS)
SEGMENTS[3, 15:] = 0


def adapter_of(model, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in model.adapter_shapes.items()}


def logits(directory, adapter=None, **options):
    base = BaseCheckpoint.open(directory)
    mesh = make_mesh(options.pop("mesh", None))
    model = build(base.config, LORA if adapter is not None else None, mesh, "float32", **options)
    factors = model.place_factors(adapter) if adapter is not None else {}
    place = lambda array: jax.device_put(array, batch_sharding(mesh))  # noqa: E731
    return np.asarray(jax.jit(model.logits_BTV)(factors, model.load(base), place(TOKENS), place(SEGMENTS)))


def reference(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(SEGMENTS).long()).logits.numpy()


def assert_equal(ours, theirs, atol):
    """On real tokens; what padding computes is nobody's."""
    real = SEGMENTS.astype(bool)
    np.testing.assert_allclose(ours[real], theirs[real], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def random_adapter(tiny_models):
    """family -> adapter tensors by name, drawn when first asked for."""

    class Adapters(dict):
        def __missing__(self, family):
            config = BaseCheckpoint.open(tiny_models[family]).config
            self[family] = adapter_of(build(config, LORA, make_mesh(), "float32"))
            return self[family]

    return Adapters()


def test_base_logits(family, tiny_models):
    directory = tiny_models[family]
    assert_equal(logits(directory), reference(AutoModelForCausalLM.from_pretrained(directory)), 1e-4)


@pytest.mark.parametrize(
    "mesh", [MeshShape(), MeshShape(data=2), MeshShape(fsdp=2, tensor=2), MeshShape(fsdp=1, tensor=4)]
)
def test_adapted_logits_on_every_mesh(family, mesh, tiny_models, random_adapter, tmp_path):
    directory = tiny_models[family]
    Adapter(LORA, random_adapter[family]).write(tmp_path, str(directory))
    base = AutoModelForCausalLM.from_pretrained(directory)
    plain = reference(base)
    ours = logits(directory, random_adapter[family], mesh=mesh)
    assert_equal(ours, reference(PeftModel.from_pretrained(base, tmp_path)), 2e-4)
    assert np.abs(ours - plain)[SEGMENTS.astype(bool)].max() > 0.1


def test_every_target_is_alive(family, tiny_models, random_adapter):
    """A side path that is not computed would be trained, exported and do nothing here."""
    base, factors = BaseCheckpoint.open(tiny_models[family]), random_adapter[family]
    model = build(base.config, LORA, make_mesh(), "float32")
    frozen, compute = model.load(base), jax.jit(model.logits_BTV)

    def with_only(module):
        placed = model.place_factors({name: tensor * (f".{module}." in name) for name, tensor in factors.items()})
        return np.asarray(compute(placed, frozen, TOKENS, SEGMENTS))

    nothing = with_only("none of them")
    for module in LINEAR:
        assert np.abs(with_only(module) - nothing).max() > 0.01, module


def test_the_scan_equals_the_unrolled_model_and_so_do_its_gradients(family, tiny_models, random_adapter):
    base = BaseCheckpoint.open(tiny_models[family])
    # Small enough that float32's own noise stays an order below what is asserted.
    adapter = {name: tensor / 4 for name, tensor in random_adapter[family].items()}
    gradients, values = {}, {}
    for name, options in {
        "unrolled": dict(scan=False),
        "block": dict(remat="block"),
        "dots": dict(remat="dots"),
        "unstacked factors": dict(stack_factors=False),
    }.items():
        model = build(base.config, LORA, make_mesh(), "float32", **options)
        factors, frozen = model.place_factors(adapter), model.load(base)

        def loss(factors, model=model, frozen=frozen):
            logits = model.logits_BTV(factors, frozen, TOKENS, SEGMENTS)
            return -jax.nn.log_softmax(logits)[:, :-1][np.arange(4)[:, None], np.arange(23), TOKENS[:, 1:]].mean()

        values[name], grads = jax.jit(jax.value_and_grad(loss))(factors)
        gradients[name] = {shard.name: 0 for shard in model.adapter_shards(grads, 0)}
        for slot in model.factor_slots:
            whole = np.asarray(grads[slot.key])
            gradients[name] |= dict(zip(slot.names, whole if slot.stacked else [whole], strict=True))
    for name in ("block", "dots", "unstacked factors"):
        assert float(values[name]) == pytest.approx(float(values["unrolled"]), rel=1e-5)
        errors = {tensor: np.linalg.norm(gradients[name][tensor] - g) for tensor, g in gradients["unrolled"].items()}
        norms = {tensor: np.linalg.norm(g) for tensor, g in gradients["unrolled"].items()}
        assert np.hypot.reduce(list(errors.values())) < 1e-5 * np.hypot.reduce(list(norms.values())), name
        # One tensor's own gradient can be a small difference of large terms.
        assert all(errors[tensor] < 1e-4 * norms[tensor] for tensor in norms), name


def test_initial_factors_are_peft_s_and_depend_on_nothing_but_seed_and_name(tiny_models):
    base = BaseCheckpoint.open(tiny_models["llama"])
    drawn = []
    for options in (dict(), dict(stack_factors=False)):
        model = build(base.config, LORA, make_mesh(), "float32", **options)
        shards = model.adapter_shards(model.initial_factors(seed=5), 0)
        tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in model.adapter_shapes.items()}
        for shard in shards:
            tensors[shard.name][tuple(slice(*bounds) for bounds in shard.bounds)] = shard.data
        drawn.append(tensors)
    assert all((drawn[0][name] == drawn[1][name]).all() for name in drawn[0])
    reference_model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    from peft import get_peft_model

    peft = get_peft_model(reference_model, PeftConfig(r=4, lora_alpha=12, target_modules=list(LINEAR)))
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in peft.named_parameters()
        if "lora_" in n
    }
    assert theirs.keys() == drawn[0].keys()
    for name, tensor in drawn[0].items():
        assert tensor.shape == tuple(theirs[name].shape)
        if "lora_B" in name:
            assert not tensor.any()
            continue
        # Uniform: the same bound, and nearly reached.
        bound = 1 / np.sqrt(tensor.shape[1])
        assert 0.9 * bound < np.abs(tensor).max() <= bound
        assert theirs[name].abs().max() <= bound


QUERY_SCALE = dict(query_pre_attn_scalar=16)
LLAMA3_ROPE = dict(
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=500.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )
)
UNTIED = dict(tie_word_embeddings=False, rms_norm_eps=1e-3)


@pytest.mark.parametrize(("family", "fields"), [("gemma2", QUERY_SCALE), ("llama", LLAMA3_ROPE), ("llama", UNTIED)])
def test_fields_that_kerashub_drops_are_corrected(family, fields, tmp_path):
    directory = write_model(tmp_path / "model", family, **fields)
    assert_equal(logits(directory), reference(AutoModelForCausalLM.from_pretrained(directory)), 1e-4)


REFUSED = {
    "head_dim": ("llama", dict(head_dim=8), "head_dim=8 of this llama model: KerasHub's llama derives head_dim"),
    "bias": ("llama", dict(attention_bias=True), "attention_bias=True .* computes it as False only"),
    "rope": ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope type 'yarn' is dropped"),
    "scalar": ("gemma2", dict(query_pre_attn_scalar=7), "query_pre_attn_scalar=7 .* scales queries by head_dim"),
    "theta": ("gemma2", dict(rope_theta=5e5), "rotates with rope_theta 10000 only"),
    "layers": ("gemma2", dict(layer_types=["full_attention"] * 5), "alternates sliding and full attention"),
    "quantised": ("llama", dict(quantization_config={"quant_method": "gptq"}), "a base quantised by 'gptq'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_cannot_be_honoured_are_refused(case, tiny_models):
    family, fields, text = REFUSED[case]
    config = json.loads((tiny_models[family] / "config.json").read_text())
    if "rope" in case or case == "theta":
        config.pop("rope_parameters", None)
    with pytest.raises(UnsupportedError, match=text):
        build(config | fields, None, make_mesh(), "float32")


def test_a_target_that_matches_nothing(tiny_models):
    config = BaseCheckpoint.open(tiny_models["llama"]).config
    with pytest.raises(ConfigError, match="'wq' matches no linear layer of this model; it has down_proj"):
        build(config, LoraConfig(target_modules=("wq",)), make_mesh(), "float32")


def test_each_process_reads_only_the_slices_it_owns(tiny_models, monkeypatch):
    """What is read of the file, on a device of four, is a quarter of every split weight."""
    from kithara_ray.model import weights

    base = BaseCheckpoint.open(tiny_models["gemma2"])
    model = build(base.config, None, make_mesh(), "float32")
    read = []
    original = np.ascontiguousarray
    monkeypatch.setattr(weights.np, "ascontiguousarray", lambda a, **k: read.append(a.size) or original(a, **k))
    frozen = model.load(base)
    monkeypatch.undo()
    split = [array for array in frozen if not array.sharding.is_fully_replicated]
    assert len(split) >= 9
    for array in split:
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // 4}
    # A replicated array is read once for its four devices, or once each; a split one never twice.
    assert sum(read) <= sum(a.size for a in split) + 4 * sum(a.size for a in frozen if a.sharding.is_fully_replicated)
