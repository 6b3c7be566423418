"""Every family against transformers: the sharded, scanned model computes what Hugging Face's does."""

import json

import families_table
import jax
import keras
import numpy as np
import pytest
import torch
from parity import (
    LORA,
    SEGMENTS,
    TOKENS,
    adapter_of,
    assert_close_as_one,
    assert_equal,
    by_name,
    factors_of,
    logits,
    reference,
)
from peft import LoraConfig as PeftConfig
from peft import PeftModel
from sizes import SIZES
from tiny import PARAMETERS, RECURRENT, SHORT_FAMILIES, TARGETS, load, model_type, mostly_long, write_model
from transformers import AutoModelForCausalLM

from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.tower import WRAPPERS, text_of
from kithara_ray.model.causal_lm import build
from kithara_ray.model.families import FAMILIES
from kithara_ray.model.generate import decoder_of
from kithara_ray.model.lora.targets import linear_modules_of
from kithara_ray.model.options import groups_of
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape

pytestmark = pytest.mark.usefixtures("hastily")


@pytest.fixture(scope="module")
def random_adapter(tiny_models):
    """family -> adapter tensors by name, drawn when first asked for."""

    class Adapters(dict):
        def __missing__(self, family):
            config = BaseCheckpoint.open(tiny_models[family]).config
            self[family] = adapter_of(build(config, LORA[family], make_mesh(), "float32"))
            return self[family]

    return Adapters()


def test_the_families_are_those_of_this_suite_and_the_table_of_features_is_written_from_it():
    assert sorted([*FAMILIES, *WRAPPERS]) == sorted(set(map(model_type, SIZES)))
    page = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.with_table(page) == page, "run `make families`"


@pytest.fixture(scope="module")
def logits_of(tiny_models):
    """family -> its logits as a function of adapter tensors: one program for several tests, weights split both ways."""

    class Programs(dict):
        def __missing__(self, family):
            base, mesh = BaseCheckpoint.open(tiny_models[family]), make_mesh(MeshShape(fsdp=2, tensor=2))
            model = build(base.config, LORA[family], mesh, "float32")
            frozen, compute = model.load(base), jax.jit(model.logits_BTV)
            batch = [jax.device_put(array, batch_sharding(mesh)) for array in (TOKENS, SEGMENTS)]
            self[family] = lambda adapter: np.asarray(compute(model.place_factors(adapter), frozen, *batch))
            return self[family]

    return Programs()


def only(adapter, module=None):
    """The adapter with all but one module's factors zero."""
    return {name: tensor * (f".{module}." in name) for name, tensor in adapter.items()}


@pytest.fixture(scope="module")
def theirs(tiny_models, random_adapter, tmp_path_factory):
    """family -> (the base's logits, the model with the adapter loaded by PEFT, its logits)."""

    class Models(dict):
        def __missing__(self, family):
            directory, place = tiny_models[family], tmp_path_factory.mktemp("adapter")
            Adapter(LORA[family], random_adapter[family]).write(place, str(directory))
            model = load(directory)
            plain = reference(model)
            adapted = PeftModel.from_pretrained(model, place).eval()
            self[family] = plain, adapted, reference(adapted)
            return self[family]

    return Models()


def test_base_logits(every_family, theirs, logits_of, random_adapter):
    ours = logits_of[every_family](only(random_adapter[every_family]))
    assert_equal(ours, theirs[every_family][0], 1e-4)


MESHES = [MeshShape(), MeshShape(data=2), MeshShape(fsdp=1, tensor=4)]


@pytest.mark.parametrize("mesh", MESHES)
def test_adapted_logits_on_every_mesh(family, mesh, tiny_models, random_adapter, theirs):
    ours = logits(tiny_models[family], random_adapter[family], mesh=mesh)
    assert_equal(ours, theirs[family][2], 2e-4)


def test_adapted_logits(every_family, random_adapter, logits_of, theirs):
    """Equal to PEFT's, of the adapter's file, and to the bit what PEFT reads of that."""
    adapter, (plain, model, adapted) = random_adapter[every_family], theirs[every_family]
    tensors = {name: tensor.detach().numpy() for name, tensor in factors_of(model).items()}
    assert tensors.keys() == adapter.keys()
    assert all((tensors[name] == tensor).all() for name, tensor in adapter.items())
    ours = logits_of[every_family](adapter)
    assert_equal(ours, adapted, 2e-4)
    assert np.abs(ours - plain)[SEGMENTS.astype(bool)].max() > 0.1


@pytest.mark.parametrize("family", mostly_long(SHORT_FAMILIES))
def test_greedy_decoding(family, tiny_models, random_adapter, theirs):
    """With a KV cache, prompts of two lengths in one batch, both longer than the windows."""
    base = BaseCheckpoint.open(tiny_models[family])
    model = build(base.config, LORA[family], make_mesh(), "float32", scan=False)
    decoder = decoder_of(model, model.place_factors(random_adapter[family]), model.load(base))
    prompts = [TOKENS[0, :13].tolist(), TOKENS[1, :9].tolist()]
    ours = decoder.greedy(prompts, 24, (2,))
    for prompt, row in zip(prompts, ours, strict=True):
        wanted = theirs[family][1].generate(input_ids=torch.tensor([prompt]), do_sample=False, max_length=24)
        assert row == wanted[0].tolist()


def test_every_target_is_alive(every_family, logits_of, random_adapter):
    """A side path that is not computed would be trained, exported and do nothing here."""
    compute, adapter = logits_of[every_family], random_adapter[every_family]
    nothing = compute(only(adapter))
    parameters = [name.removesuffix(".weight") for name in PARAMETERS.get(every_family, ())]
    for module in (*TARGETS[every_family], *parameters):
        assert np.abs(compute(only(adapter, module)) - nothing).max() > 0.01, module


# Blocks that the scan takes at a time: sliding and full ones, with and without rotation, dense and of experts.
PERIODS = dict.fromkeys(SIZES, (1,)) | dict.fromkeys(["gemma2", "gemma3", "gemma3_text", "gpt_oss"], (2,))
PERIODS |= dict.fromkeys(["qwen3_moe", "smollm3"], (2,)) | dict(gemma4_text=(3,), gemma4=(2, 2))
PERIODS |= dict.fromkeys(["gemma4 experts", "gemma4_unified", "gemma4_unified_text"], (2,))
PERIODS |= dict.fromkeys(["cohere2", "exaone4", "olmo3"], (2,)) | dict.fromkeys(["ernie4_5_moe", "glm4_moe"], (1, 1))
PERIODS |= dict.fromkeys(RECURRENT, (2,))
ALL_SCANS = {remat: dict(remat=remat) for remat in ("block", "attention", "projections", "offload", "dots")} | {
    "unstacked factors": dict(stack_factors=False)
}
SCANS = {"gemma2": ALL_SCANS, "gemma4_text": {"block": ALL_SCANS["block"]}, "llama": ALL_SCANS}


@pytest.mark.parametrize("family", SCANS)
def test_the_scan_equals_the_unrolled_model_and_so_do_its_gradients(family, tiny_models, random_adapter, monkeypatch):
    """Blocks in three chunks, but under "dots". tests/train/test_gradients.py has every family, against torch in
    float64.

    Where weights are split, the two sum in another order, noise of float32: llama's gradients differ by 1.2e-5 then and
    by 0.5e-5 where rows alone are.
    """
    monkeypatch.setattr("kithara_ray.model.options._CHUNK_TOKENS", 8)
    base = BaseCheckpoint.open(tiny_models[family])
    # Small enough that float32's own noise stays an order below what is asserted.
    adapter = {name: tensor / 4 for name, tensor in random_adapter[family].items()}
    mesh = make_mesh(None if family == "gemma2" else MeshShape(data=4))
    gradients, values = {}, {}
    for name, options in ({"unrolled": dict(scan=False)} | SCANS[family]).items():
        model = build(base.config, LORA[family], mesh, "float32", **options)
        factors, frozen = model.place_factors(adapter), model.load(base)

        def loss(factors, model=model, frozen=frozen):
            logits = model.logits_BTV(factors, frozen, TOKENS, SEGMENTS)
            return -jax.nn.log_softmax(logits)[:, :-1][np.arange(4)[:, None], np.arange(23), TOKENS[:, 1:]].mean()

        values[name], grads = jax.jit(jax.value_and_grad(loss))(factors)
        gradients[name] = by_name(model, grads)
    for name in SCANS[family]:
        assert float(values[name]) == pytest.approx(float(values["unrolled"]), rel=1e-5)
        assert_close_as_one(gradients[name], gradients["unrolled"])


def test_groups_of_blocks_that_are_run_once_more_give_the_same(tmp_path):
    """Four blocks: two groups of two."""
    base = BaseCheckpoint.open(write_model(tmp_path / "four", "llama", num_hidden_layers=4))
    found = {}
    for remat in ("block", "nested"):
        model = build(base.config, LORA["llama"], make_mesh(), "float32", remat=remat)
        assert groups_of(model.chain.steps) == 2
        factors, frozen = model.initial_factors(0), model.load(base)

        def loss(factors, model=model, frozen=frozen):
            return jax.nn.logsumexp(model.logits_BTV(factors, frozen, TOKENS, SEGMENTS), axis=-1).mean()

        found[remat] = jax.jit(jax.value_and_grad(loss))(factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found["block"], found["nested"])
    assert any(np.abs(grad).max() > 1e-3 for grad in found["nested"][1].values())


def test_initial_factors_are_peft_s_and_depend_on_nothing_but_seed_and_name(tiny_models):
    base = BaseCheckpoint.open(tiny_models["llama"])
    drawn = []
    for options in (dict(), dict(stack_factors=False)):
        model = build(base.config, LORA["llama"], make_mesh(), "float32", **options)
        shards = model.adapter_shards(model.initial_factors(seed=5), 0)
        tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in model.adapter_shapes.items()}
        for shard in shards:
            tensors[shard.name][tuple(slice(*bounds) for bounds in shard.bounds)] = shard.data
        drawn.append(tensors)
    assert all((drawn[0][name] == drawn[1][name]).all() for name in drawn[0])
    reference_model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    from peft import get_peft_model

    peft = get_peft_model(reference_model, PeftConfig(r=4, lora_alpha=12, target_modules=list(TARGETS["llama"])))
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


def test_gemma3_s_blocks_are_scanned_six_at_a_time(tiny_models):
    config = json.loads((tiny_models["gemma3_text"] / "config.json").read_text())
    config |= dict(num_hidden_layers=13, layer_types=None)
    assert build(config, None, make_mesh(), "float32").chain.periods == (6,)


def test_layers_compute_in_the_precision_that_was_asked_for(every_family, tiny_models):
    config = json.loads((tiny_models[every_family] / "config.json").read_text())
    before = keras.config.dtype_policy().name
    model = build(config, LORA[every_family], make_mesh(), "mixed_bfloat16")
    assert model.chain.periods == PERIODS[every_family]
    backbone = model.model.backbone
    adapted = [layer for layer in backbone._flatten_layers() if hasattr(layer, "lora_A")]
    routers = [layer for layer in adapted if layer.compute_dtype == "float32"]
    assert not routers or every_family in PARAMETERS
    linear = [layer for layer in adapted if layer not in routers]
    modules = linear_modules_of(BaseCheckpoint.open(tiny_models[every_family]))
    assert len(linear) == len(modules)
    assert {layer.compute_dtype for layer in [*linear, *backbone.transformer_layers]} == {"bfloat16"}
    assert keras.config.dtype_policy().name == before
    weights = model.abstract_frozen(np.dtype("bfloat16"))
    out = jax.eval_shape(model.hidden_BTD, model.abstract_params(), weights, TOKENS, SEGMENTS)
    assert (out.shape, out.dtype) == ((*TOKENS.shape, text_of(config)["hidden_size"]), "bfloat16")
