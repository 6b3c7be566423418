"""The mesh that a run has by default: what counts as its state, when it is small, and that a plan chooses alike."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from asking import V5E_4, request
from ray.train import RunConfig
from tiny import TARGETS

from kithara_ray import KerasHubModel, MeshShape
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES, TensorInfo
from kithara_ray.model.causal_lm import build
from kithara_ray.orchestration.preflight.mesh import with_mesh
from kithara_ray.plan import plan, planner
from kithara_ray.plan.chips import CHIPS
from kithara_ray.plan.default_mesh import default_mesh, state_bytes
from kithara_ray.sharding.mesh import make_mesh

WHOLE, SPLIT = MeshShape(data=-1, fsdp=1), MeshShape()
LINEAR = TARGETS["llama"]
V5E_16 = V5E_4 | {"topology": "4x4", "num_workers": 4}
V5E = CHIPS["v5e"].hbm_bytes
V5P_8 = dict(use_tpu=True, topology="2x2x1", accelerator_type="TPU-V5P", num_workers=1)
# layers, hidden, intermediate, query and key heads, head width, vocabulary, tied: of the models' own config.json.
MODELS = {
    "gemma-3-270m": (18, 640, 2048, 4, 1, 256, 262144, True),
    "SmolLM2-135M": (30, 576, 1536, 9, 3, 64, 49152, True),
    "gemma-2-2b": (26, 2304, 9216, 8, 4, 256, 256000, True),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256, False),
    "Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128, 128256, False),
}
PARAMETERS = {"gemma-3-270m": 268e6, "SmolLM2-135M": 134.5e6, "gemma-2-2b": 2614e6, "Llama-3.1-8B": 8030e6}


def headers(name: str, dtype: str = "BF16") -> BaseCheckpoint:
    """The tensors of a model without their bytes."""
    layers, hidden, inner, queries, keys, width, vocabulary, tied = MODELS[name]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes |= {} if tied else {"lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for projection, heads in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{block}.self_attn.{projection}_proj.weight"] = (heads * width, hidden)
        shapes[f"{block}.self_attn.o_proj.weight"] = (hidden, queries * width)
        shapes |= {f"{block}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{block}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    itemsize = NUMPY_DTYPES[dtype].itemsize
    infos = {
        name: TensorInfo(name, Path("/x"), dtype, shape, 0, int(np.prod(shape)) * itemsize)
        for name, shape in shapes.items()
    }
    return BaseCheckpoint(Path("/x"), {"tie_word_embeddings": tied, "num_hidden_layers": layers}, infos, ())


def chosen(name: str, scaling: dict, monkeypatch, rank: int | None = 16, ram: int | None = None, run_config=None):
    """The request of a run that trains a model on a slice, or on CPU devices of a host with `ram` bytes."""
    monkeypatch.setattr(BaseCheckpoint, "at", lambda handle: headers(name))
    lora = None if rank is None else LoraConfig(r=rank, target_modules=LINEAR)
    asked = request(scaling, run_config, model={"lora": lora, "precision": "mixed_bfloat16"})
    return with_mesh(asked, SimpleNamespace(ram_of_worker=lambda group: ram and ram // group.num_workers))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_headers_are_those_of_the_models(name):
    """To within the norms that some have besides."""
    state = state_bytes(headers(name), LoraConfig(r=1), "mixed_bfloat16", None)
    assert state.frozen / 2 == pytest.approx(PARAMETERS[name], rel=2e-3)


@pytest.mark.parametrize(
    ("name", "scaling", "rank", "mesh"),
    [
        ("gemma-3-270m", V5E_16, 16, WHOLE),
        ("SmolLM2-135M", V5E_16, 16, WHOLE),
        ("gemma-2-2b", V5E_16, 16, SPLIT),
        ("Llama-3.1-8B", V5E_16, 16, SPLIT),
        ("Llama-3.1-70B", V5E_16, 16, SPLIT),
        # A chip of v5p has six times the memory: 5.2 GB of 103 are little, 16 GB are not.
        ("gemma-2-2b", V5P_8, 16, WHOLE),
        ("Llama-3.1-8B", V5P_8, 16, SPLIT),
        # All weights trained: 16 bytes for each, 4.3 GB of 17, and of 103.
        ("gemma-3-270m", V5E_16, None, SPLIT),
        ("gemma-3-270m", V5P_8, None, WHOLE),
        # Two slices: whole weights on each device, or on each slice.
        ("SmolLM2-135M", V5E_16 | {"num_workers": 8}, 16, WHOLE),
        ("gemma-2-2b", V5E_16 | {"num_workers": 8}, 16, MeshShape(data=2)),
    ],
)
def test_tpu_slices(name, scaling, rank, mesh, monkeypatch):
    assert chosen(name, scaling, monkeypatch, rank).step.mesh == mesh


@pytest.mark.parametrize(
    ("workers", "gb", "mesh"),
    [(1, 25, WHOLE), (2, 25, WHOLE), (4, 25, WHOLE), (8, 25, WHOLE), (8, 20, SPLIT), (2, 3, SPLIT), (1, 3, WHOLE)],
)
def test_cpu_devices_share_the_memory_of_their_host(workers, gb, mesh, monkeypatch):
    """0.27 GB of weights, and 0.08 for the adapter."""
    asked = chosen("SmolLM2-135M", {"num_workers": workers}, monkeypatch, ram=gb * 10**9)
    assert asked.step.mesh == mesh
    assert asked.default_mesh["device_bytes"] == gb * 10**9 // workers


def test_the_devices_of_a_worker_share_its_memory(monkeypatch):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run_config = RunConfig(name="run", storage_path="/runs", worker_runtime_env={"env_vars": flags})
    asked = chosen("SmolLM2-135M", {"num_workers": 2}, monkeypatch, ram=20 * 10**9, run_config=run_config)
    assert (asked.step.mesh, asked.default_mesh["device_bytes"]) == (SPLIT, 20 * 10**9 // 8)


def test_what_is_given_or_not_known_is_left(monkeypatch):
    asked = request(V5E_16, step={"mesh": MeshShape(tensor=4)})
    assert with_mesh(asked, None) is asked
    unknown = request(V5E_4 | {"accelerator_type": "TPU-V3", "topology": "2x2x1"})
    assert with_mesh(unknown, None) is unknown
    nowhere = request({"num_workers": 2})
    assert with_mesh(nowhere, SimpleNamespace(ram_of_worker=lambda group: None)) is nowhere


def test_the_share_that_counts_as_small():
    limit = V5E // 8
    assert default_mesh(limit, V5E).shape == WHOLE
    assert default_mesh(limit + 1, V5E, slices=4).shape == MeshShape(data=4)
    assert default_mesh(1, None).shape == SPLIT
    assert default_mesh(10**9, 16 * 10**9).why() == (
        "every device holds all weights: the state has 1.00 GB, 6.2% of a device's 16.0 GB, at most 12.5%"
    )


@pytest.mark.parametrize(
    "given",
    [
        {"lora": LoraConfig(r=4, target_modules=("q_proj", "v_proj"))},
        {"lora": LoraConfig(r=4, use_dora=True, rank_pattern={"v_proj": 7}), "quantize": "int8"},
        {"lora": LoraConfig(r=4), "precision": "bfloat16"},
        {"lora": None},
        {"lora": None, "precision": "bfloat16"},
    ],
    ids=["lora", "dora and int8", "bfloat16", "all weights", "all weights in bfloat16"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_count_is_that_of_the_arrays(tiny_models, family, given):
    """Of a model built on one device: its frozen arrays, and four numbers for each trained one."""
    base = BaseCheckpoint.open(tiny_models[family])
    lora, precision, quantize = given["lora"], given.get("precision", "float32"), given.get("quantize")
    mesh = make_mesh(devices=jax.devices()[:1])
    model = build(base.config, lora, mesh, precision, quantize=quantize, train_weights=lora is None)
    frozen = [] if lora is None else model.abstract_frozen(np.dtype("bfloat16" if precision == "bfloat16" else "f4"))
    nbytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    found = state_bytes(base, lora, precision, quantize)
    assert (found.frozen, found.trained) == (nbytes(frozen), 4 * nbytes(model.abstract_params()))


def test_the_count_of_an_int4_base(tiny_models):
    """Groups of the tiny model are smaller than 64 where its heads are, and so are a few of its scales."""
    base, lora = BaseCheckpoint.open(tiny_models["llama"]), LoraConfig(r=4)
    model = build(base.config, lora, make_mesh(devices=jax.devices()[:1]), "float32", quantize="int4")
    frozen = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract_frozen(np.dtype("f4"))))
    assert state_bytes(base, lora, "float32", "int4").frozen == pytest.approx(frozen, rel=0.03)


def test_what_a_base_holds_and_a_model_does_not():
    """A copy of a tied head, layers beyond config.json's; and experts in MXFP4, held as two bfloat16 for each byte."""
    base, lora = headers("SmolLM2-135M"), LoraConfig(r=1)
    given = state_bytes(base, lora, "mixed_bfloat16", None).frozen
    table = base.tensors["model.embed_tokens.weight"].shape
    copies = {"lm_head.weight": table, "model.layers.30.mlp.up_proj.weight": (9, 9), "rotary_emb.inv_freq": (32,)}

    def frozen(shapes, dtype):
        infos = {n: TensorInfo(n, Path("/x"), dtype, s, 0, int(np.prod(s)) * 2) for n, s in shapes.items()}
        more = BaseCheckpoint(base.directory, base.config, {**base.tensors, **infos}, ())
        return state_bytes(more, lora, "mixed_bfloat16", None).frozen

    assert frozen(copies, "BF16") == given
    assert frozen({"model.layers.0.mlp.experts.down_proj_blocks": (3, 5)}, "U8") == given + 4 * 30
    shapes = {"model.language_model.norm.weight": (64,), "model.vision_tower.patch.weight": (8, 8)}
    infos = {name: TensorInfo(name, Path("/x"), "BF16", shape, 0, 128) for name, shape in shapes.items()}
    wrapper = BaseCheckpoint(Path("/x"), {"model_type": "gemma3", "text_config": {}}, infos, ())
    assert state_bytes(wrapper, lora, "mixed_bfloat16", None).total == 128


def test_a_plan_chooses_as_the_run_does(tiny_models, tmp_path, monkeypatch):
    """The run counts headers, the plan the model that it builds."""
    monkeypatch.setattr(planner.urls, "cache_dir", lambda: tmp_path)
    directory = str(tiny_models["llama"])
    model = KerasHubModel.from_preset(directory, lora_rank=4, precision="float32")
    of_run = with_mesh(
        request(V5E_4, model={"weights_handle": directory, "preset_handle": directory, "lora": model.lora}), None
    )
    made = plan(directory, "v5e-4", 128, lora=model.lora, precision="float32", compile=False)
    assert made.default_mesh == of_run.default_mesh
    assert made.mesh == {"data": 4, "fsdp": 1, "tensor": 1}
    assert made.collective_bytes_per_step["fsdp_minimum"] == pytest.approx(2 * made.adapter_bytes * 3 / 4)
    rows = [cell for column in made.table().columns for cell in column.cells]
    assert made.default_mesh["why"] in rows
