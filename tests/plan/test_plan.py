"""Plans: one whole plan on CPU devices against a run, and the words for each case."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIZES, VOCABULARY

from kithara_ray.errors import ConfigError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.causal_lm import build
from kithara_ray.plan import lines, plan, planner, slice_of, terms
from kithara_ray.plan.chips import CHIPS, slice_of_topology, slice_sizes
from kithara_ray.plan.report import assemble
from kithara_ray.plan.search import grid, largest_batch, smallest_that_fits
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer

CONFIG = dict(SIZES["gemma2"], model_type="gemma2", vocab_size=VOCABULARY, rms_norm_eps=1e-6)
T = 32


@pytest.mark.parametrize(
    ("name", "chips", "topology", "accelerator"),
    [
        ("v5e-1", 1, "v5e:1x1", "v5litepod-1"),
        ("v5e-8", 8, "v5e:2x4", "v5litepod-8"),
        ("v5litepod-16", 16, "v5e:4x4", "v5litepod-16"),
        ("v6e-32", 32, "v6e:4x8", "v6e-32"),
        ("v5p-8", 4, "v5p:2x2x1", "v5p-8"),
        ("v5p-64", 32, "v5p:2x4x4", "v5p-64"),
        ("v4-16", 8, "v4:2x2x2", "v4-16"),
        ("v7x-8", 4, "tpu7x:2x2x1", "tpu7x-8"),
        ("tpu7x-32", 16, "tpu7x:2x2x4", "tpu7x-32"),
    ],
)
def test_slices(name, chips, topology, accelerator):
    found = slice_of(name)
    assert (found.chips, found.topology, found.accelerator_type) == (chips, topology, accelerator)


def test_slices_that_are_not_there():
    with pytest.raises(ConfigError, match="slice must be a name such as v5e-16"):
        slice_of("4x4")
    with pytest.raises(ConfigError, match="v5e comes as v5e-1, v5e-4, v5e-8, v5e-16"):
        slice_of("v5e-12")
    assert slice_of("v9z-4").chip is None
    assert slice_of_topology("4x4", "TPU-V5LITEPOD") == slice_of("v5e-16")
    assert slice_of_topology("2x2x2", "TPU-V4") == slice_of("v4-16")
    assert slice_of_topology("2x2x1", "TPU-V7X") == slice_of("v7x-8")
    assert slice_of_topology("2x2x2", "TPU-V3") is None


def test_a_chip_of_v7x_is_two_devices():
    assert [slice_of(name).devices for name in ("v7x-8", "v4-8", "v5p-8", "v5e-8", "cpu-4")] == [8, 4, 4, 8, 4]


# --- whole plans -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setattr(planner.urls, "cache_dir", lambda: directory)
        yield directory


@pytest.fixture(scope="module")
def on_cpu(cache):
    """Of a program that is compiled for four CPU devices."""
    return plan(CONFIG, "cpu-4", T, lora=LoraConfig(r=4), precision="float32")


@pytest.mark.parametrize("given", [{"train_weights": True}, {"quantize": "nf4", "lora": LoraConfig(r=4)}], ids=str)
def test_other_runs_than_lora_on_floats(given):
    """All weights trained, or a base of four bits: the memory is that of the step compiled here."""
    made = plan(CONFIG, "cpu-4", T, precision="float32", cache=False, **given)
    lora, optimizer = given.get("lora"), KerasOptimizer(planner._ADAMW)
    options = {"train_weights": lora is None, "quantize": given.get("quantize")}
    model = build(CONFIG, lora, make_mesh(), "float32", **options)
    state = step.abstract_state(model, optimizer)
    frozen = [] if lora is None else model.abstract_frozen(np.dtype("bfloat16"))
    on_one = lambda tree: sum(  # noqa: E731
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    hbm = made.hbm_bytes_per_chip
    assert (hbm["frozen"], hbm["adapter"], hbm["optimizer"]) == tuple(
        map(on_one, (frozen, state["params"], state["opt"]))
    )
    assert made.compiled
    batch = step.abstract_batch(model, 4, T, T)
    memory = step.compile_step(model, optimizer, state, frozen, batch).memory_analysis()
    assert hbm["temporaries"] == memory.temp_size_in_bytes
    flops, least = made.flops_per_token, made.collective_bytes_per_step["fsdp_minimum"]
    ratio = 2.0 if lora is None else 1.0
    assert flops["backward"] == ratio * flops["forward"]
    assert 1.0 <= flops["program"] / flops["total"] < 1.1
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves([frozen, state["params"]]))
    moved = 3 / 4 * 3 * whole if lora is None else 3 / 4 * 2 * whole
    assert least == pytest.approx(moved)
    assert made.settings["trainable"] == model.num_trained
    assert "all trained" in str(list(lines.rows(made))) or lora is not None


def test_the_program_is_the_one_that_training_runs(on_cpu, cache):
    """Its memory is what the step compiled here says, part by part."""
    import keras

    mesh = make_mesh(devices=jax.devices()[:4])
    model = build(CONFIG, LoraConfig(r=4), mesh, "float32")
    optimizer = KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(1e-4)))
    arrays = step.abstract_state(model, optimizer), model.abstract_frozen(np.dtype("bfloat16"))
    batch = step.abstract_batch(model, 4, T, T)
    memory = step.compile_step(model, optimizer, *arrays, batch).memory_analysis()
    hbm = on_cpu.hbm_bytes_per_chip
    assert hbm["temporaries"] == memory.temp_size_in_bytes
    assert hbm["frozen"] + hbm["adapter"] + hbm["optimizer"] + hbm["batch"] == pytest.approx(
        memory.argument_size_in_bytes, rel=1e-3
    )
    assert on_cpu.compiled
    assert on_cpu.fits is None
    assert on_cpu.mesh == {"data": 1, "fsdp": 4, "tensor": 1}


def test_flops_are_those_of_the_terms(on_cpu):
    """By hand: 2 FLOPs for each element of a matrix, forward, backward and again; each trained token has logits."""
    d, f, n, k, h, layers = 64, 128, 4, 2, 32, 5
    block = d * h * (2 * n + 2 * k) + 3 * d * f
    flops = on_cpu.flops_per_token
    assert flops["forward"] == flops["backward"] == flops["recompute"] == 2 * block * layers
    assert flops["head"] == 2 * 2 * d * VOCABULARY
    assert flops["lora"] == 2 * 4 * layers * 4 * ((d + n * h) + (d + k * h))
    assert flops["program"] < 1.15 * flops["total"]


def test_a_second_plan_is_read_from_the_cache(on_cpu, cache, monkeypatch):
    kept = list((cache / "plans").iterdir())
    assert len(kept) == 1
    monkeypatch.setattr(planner.subprocess, "run", None)
    again = plan(CONFIG, "cpu-4", T, lora=LoraConfig(r=4), precision="float32")
    assert again == on_cpu
    monkeypatch.setattr(planner, "_version", lambda package: "another")
    with pytest.raises(TypeError):
        plan(CONFIG, "cpu-4", T, lora=LoraConfig(r=4), precision="float32")


def test_the_weights_headers_say_their_dtypes(cache, tiny_models, tmp_path):
    """The plan's frozen bytes are those that `load` places, whatever config.json says."""
    from safetensors.numpy import load_file, save_file

    base = shutil.copytree(tiny_models["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    tensors = load_file(base / "model.safetensors")
    halved = {n: t.astype("bfloat16") if "1.mlp" in n or "norm" in n else t for n, t in tensors.items()}

    def bytes_of(saved):
        save_file(saved, base / "model.safetensors", {"format": "pt"})
        model = build(config, None, make_mesh(devices=jax.devices()[:1]), "float32")
        loaded = sum(array.nbytes for array in model.load(BaseCheckpoint.open(base)))
        planned = plan(base, "cpu-1", 8, lora=LoraConfig(r=4), precision="float32", compile=False, cache=False)
        return loaded, planned.hbm_bytes_per_chip["frozen"]

    whole, mixed = bytes_of(tensors), bytes_of(halved)
    assert whole[0] == whole[1] == sum(tensor.nbytes for tensor in tensors.values())
    assert mixed[0] == mixed[1] < whole[0]


@pytest.fixture(scope="module")
def estimated(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner.importlib.util, "find_spec", lambda name: None)
        return plan(CONFIG, "v5e-4", 100, price_per_chip_hour=2.0, tokens_per_epoch=10**6)


def test_without_the_compiler_it_is_an_estimate_and_says_so(estimated):
    assert not estimated.compiled
    assert "libtpu, the TPU's compiler, is not installed" in estimated.estimated_because
    assert "(estimated)" in estimated.verdict()
    assert estimated.settings["seq_len"] == 128
    assert json.loads(estimated.json())["hbm_bytes_per_chip"]["available"] == CHIPS["v5e"].hbm_bytes
    assert estimated.cost["per_hour"] == 8.0
    seconds = estimated.step_time_s_bound * 10**6 / estimated.tokens_per_step
    assert estimated.cost["per_epoch"] == pytest.approx(8.0 * seconds / 3600)


def _facts(**changes):
    attention = ((8, 128, None),) * 10
    counts = terms.Counts(10**9, 10**8, 10**6, attention, 2048, 10, 10, 2 * 10**9, 10**9, 10**8, 8192, 10**9)
    facts = {
        "devices": 4, "mesh": {"data": 1, "fsdp": 4, "tensor": 1}, "counts": dataclasses.asdict(counts),
        "bytes": {"frozen": 5 * 10**9, "adapter": 10**6, "optimizer": 10**6, "batch": 10**4},
        "adapter_bytes": 4 * 10**6, "state_bytes": 12 * 10**6, "largest_array_bytes": 10**9, "rows": 4,
    }  # fmt: skip
    return facts | changes


_REQUEST = {
    "config": {"model_type": "llama"}, "seq_len": 4096, "predictions": 4096, "per_device_batch_size": 1,
    "gradient_accumulation_steps": 1, "remat": "block", "precision": "mixed_bfloat16", "quantize": None,
    "lora": {"r": 16},
}  # fmt: skip


def _refused(gib: float, where: str = "v5e-4", **request):
    refused = _facts(refusal=f"Used {gib:.2f}G of 15.75G hbm", refused_bytes={"total": int(gib * 2**30)})
    return assemble(_REQUEST | request, slice_of(where), refused, None)


def test_the_least_bytes_moved_with_an_axis_for_experts():
    """Four devices, counted by hand: 8 experts of 10 bytes, 40 other bytes, 100 tokens of 3 elements in 4 bytes."""
    counts = terms.Counts(1, 1, 1, (), 3, 1, 1, 120, 120, 120, 1, 120, experts_bytes=80, experts=8, sent=3)
    found = terms.bytes_by_expert_axis(counts, {"data": 1, "fsdp": 4, "tensor": 1}, 8, 100, 4, "block")
    sent = 2 * 3 * 100 * 3 * 4
    of_adapter = 2 * 8 * 3 / 4
    assert found == {
        "1": 2 * 120 * 3 / 4 + of_adapter,
        "2": 2 * 40 * 3 / 4 + 2 * 40 / 2 + sent / 2 + of_adapter,
        "4": 2 * 40 * 3 / 4 + sent * 3 / 4 + of_adapter,
    }
    assert not terms.bytes_by_expert_axis(
        terms.Counts(1, 1, 1, (), 3, 1, 1, 1, 1, 1, 1, 1), {"data": 1, "fsdp": 4, "tensor": 1}, 8, 100, 4, "block"
    )


def test_a_refusal_is_a_plan_that_does_not_fit():
    made = _refused(22.5)
    assert made.fits is False
    assert made.verdict() == "needs 22.5 of 15.8 GiB per chip of v5e-4: try max_seq_len=2048, or v6e-4"
    assert "refused by the compiler" in str(made.table().columns[1]._cells)


def test_what_is_advised_would_do():
    """5 GB of weights, split over the chips; ten blocks keep 0.17 GB of their inputs, in two groups of five 0.12."""
    assert _refused(17.0).advice == ["max_seq_len=2048", "v5e-8"]
    assert _refused(15.77).advice == ['remat="nested"', "max_seq_len=2048", "v5e-8"]
    assert _refused(17.0, per_device_batch_size=4).advice == [
        "per_device_batch_size=2 with gradient_accumulation_steps=2", "v5e-8"
    ]  # fmt: skip
    assert _refused(20.0, remat="dots").advice[0] == 'remat="block"'
    # No larger slice of the same chips, and no shorter row, has room for 60 GiB beside the weights.
    assert _refused(65.0).advice == ["v5p-8"]
    assert "a tensor axis" in _refused(400.0).verdict()


def test_the_slowest_part_bounds_the_step():
    cost = {
        "matmul_flops": 197e12, "kernels": {}, "hbm_bytes": 819e9 * 3, "collectives": {"all-gather": 200e9 * 2},
        "collective_counts": {},
    }  # fmt: skip
    memory = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 10**9)
    made = assemble(_REQUEST, slice_of("v5e-4"), _facts(cost=cost, memory=memory), None)
    assert made.step_time_s == pytest.approx({"compute": 1.0, "hbm": 3.0, "interconnect": 2.0})
    assert (made.bound_by, made.step_time_s_bound) == ("hbm", 3.0)
    assert made.fits
    assert made.tokens_per_s_bound == pytest.approx(4 * 4096 / 3)


@pytest.mark.parametrize(
    ("where", "seq_len", "shown"),
    [("v5e-4", 2048, "0.078 GiB, there or in VMEM"), ("v5e-4", 4096, "0.156 GiB, there"),
     ("cpu-4", 2048, "0.078 GiB, there")],
)  # fmt: skip
def test_few_kept_inputs_need_not_be_among_the_temporaries(where, seq_len, shown):
    """Of ten blocks, two bytes for each of 2048 elements of a token."""
    cost = {"matmul_flops": 1e12, "kernels": {}, "hbm_bytes": 1e9, "collectives": {}, "collective_counts": {}}
    memory = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 10**9)
    made = assemble(_REQUEST | {"seq_len": seq_len}, slice_of(where), _facts(cost=cost, memory=memory), None)
    names, values = (list(column.cells) for column in made.table().columns)
    assert values[names.index("    kept inputs of blocks")] == shown


def _planner(bytes_a_row: int, room: int):
    def planned(base, where, seq_len, rows, **settings):
        total = 10**9 + bytes_a_row * rows
        hbm = {"available": room, "total": total, "temporaries": bytes_a_row * rows}
        return SimpleNamespace(fits=total <= room, hbm_bytes_per_chip=hbm, settings={"per_device_batch_size": rows})

    return planned


@pytest.mark.parametrize(("bytes_a_row", "largest"), [(10**9, 8), (2 * 10**9, 4), (12 * 10**9, 1), (10**6, 64)])
def test_the_largest_batch(bytes_a_row, largest, monkeypatch):
    monkeypatch.setattr("kithara_ray.plan.search.plan", _planner(bytes_a_row, 15 * 10**9))
    assert largest_batch(None, "v5e-4", 128).settings["per_device_batch_size"] == largest


def test_no_batch_fits(monkeypatch):
    monkeypatch.setattr("kithara_ray.plan.search.plan", _planner(20 * 10**9, 15 * 10**9))
    assert not largest_batch(None, "v5e-4", 128).fits


def test_a_sweep_names_the_smallest_slice():
    points = grid(["v5e-16", "v5p-8", "v5e-4"], [2048, 4096], [8])
    assert [point["slice"] for point in points[:3]] == ["v5e-4", "v5p-8", "v5e-16"]
    plans = [SimpleNamespace(fits=fits) for fits in (False, True, True, False, None, True)]
    assert smallest_that_fits(points, plans) == {(2048, 8): "v5p-8", (4096, 8): "v5e-16"}


def test_every_slice_size_has_a_torus_of_its_chips():
    for generation in CHIPS:
        for size in slice_sizes(generation):
            where = slice_of(f"{generation}-{size}")
            shape = [int(side) for side in where.topology.split(":")[1].split("x")]
            assert jnp.prod(jnp.asarray(shape)) == where.chips


def test_a_plan_outlives_a_change_of_words():
    code = '"""One."""\n\n\ndef f(x):\n    """Two."""\n    return x  # three\n'
    reworded = '"""Other."""\ndef f(x):\n    return x\n'
    assert planner._code_of(code) == planner._code_of(reworded)
    assert planner._code_of(code) != planner._code_of(code.replace("return x", "return -x"))
