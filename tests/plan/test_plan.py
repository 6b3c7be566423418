"""Plans: programs read by known amounts, one whole plan on CPU devices against a run, and what is said when."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import SIZES, VOCABULARY

from kithara_ray.errors import ConfigError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.causal_lm import build
from kithara_ray.plan import hlo, hlo_text, plan, planner, report, slice_of, terms
from kithara_ray.plan.chips import CHIPS, slice_of_topology, slice_sizes
from kithara_ray.plan.report import assemble
from kithara_ray.plan.search import grid, largest_batch, smallest_that_fits
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape

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
    assert slice_of_topology("2x2x2", "TPU-V4") is None


# --- reading programs ------------------------------------------------------------------------------------------------


def test_loops_count_as_often_as_they_run():
    """A scan of 7 products of (16, 32) by (32, 32), and within each a scan of 3 of (16, 32) by (32, 8)."""

    def inner(x, w):
        return x, jnp.tanh(x @ w)

    def outer(x, _):
        x = jnp.tanh(x @ big)
        return x, jax.lax.scan(inner, x, small)[1]

    big, small = jnp.ones((32, 32)), jnp.ones((3, 32, 8))
    compiled = jax.jit(lambda x: jax.lax.scan(outer, x, None, length=7)).lower(jnp.ones((16, 32))).compile()
    assert hlo.cost_of(compiled.as_text()).matmul_flops == 7 * 2 * (16 * 32 * 32 + 3 * 16 * 32 * 8)


def test_collectives_count_what_a_device_receives():
    """On 4 devices: a weight of 4 KiB gathered 5 times in a scan, a sum of 2 KiB over all."""
    mesh = make_mesh(devices=jax.devices()[:4])
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731

    def step(x, weights):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, on())
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(body, x, weights)
        return jax.lax.with_sharding_constraint(jnp.sum(x.reshape(4, 16, 32), axis=0), on())

    shapes = (
        jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=on("fsdp")),
        jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=on(None, "fsdp")),
    )
    cost = hlo.cost_of(jax.jit(step).lower(*shapes).compile().as_text())
    assert cost.collectives["all-gather"] == 5 * 4096 * 3 / 4
    assert cost.collectives["all-reduce"] == 2 * 2048 * 3 / 4
    assert cost.collective_counts == {"all-gather": 5, "all-reduce": 1}


_GATHER = "all-gather(%w), channel_id=3, replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={0}"
_TPU = f"""\
HloModule jit_step

%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {{
  %w = bf16[64,128]{{1,0}} parameter(0)
  %gather.1 = bf16[256,128]{{1,0:T(8,128)}} {_GATHER}
  %gather.2 = bf16[256,128]{{1,0:T(8,128)S(1)}} {_GATHER}
  %x = bf16[16,64,1]{{2,1,0}} constant({{...}})
  %k = bf16[2,64,128]{{2,1,0}} constant({{...}})
  %y = bf16[16,2,128]{{2,1,0}} convolution(%x, %k), window={{size=2 pad=1_1 rhs_reversal=1}}, dim_labels=bf0_0io->b0f
  %mha_fwd.4 = f32[8]{{0}} custom-call(%y), custom_call_target="tpu_custom_call"
  %sizes = s32[3]{{0}} constant({{...}})
  %rows = bf16[96,64]{{1,0}} constant({{...}})
  %more = bf16[96,32]{{1,0}} constant({{...}})
  %experts = bf16[3,64,32]{{2,1,0}} constant({{...}})
  %ragged-dot-metadata.1 = (s32[4]{{0}}, s32[1]{{0}}) custom-call(%sizes), custom_call_target="tpu_custom_call"
  %ragged-dot-none.2 = bf16[96,32]{{1,0}} custom-call(%sizes, %rows, %experts), custom_call_target="tpu_custom_call"
  %ragged-dot-none.3 = bf16[3,64,32]{{2,1,0}} custom-call(%sizes, %rows, %more), custom_call_target="tpu_custom_call"
}}

%condition (p: s32[]) -> pred[] {{
  %counter = s32[]{{:T(128)}} parameter(0)
  %limit = s32[]{{:T(128)}} constant(26)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}}

%all-reduce-scatter.1 (input: bf16[4,8]) -> bf16[1,8] {{
  %input = bf16[4,8]{{1,0}} parameter(0)
  %sum = bf16[4,8]{{1,0}} all-reduce(%input), channel_id=9, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %part = bf16[1,8]{{1,0}} dynamic-slice(%sum), dynamic_slice_sizes={{1,8}}
}}

ENTRY %main (p: bf16[4,8]) -> bf16[1,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  %loop = (s32[], bf16[64,128]) while(%p), condition=%condition, body=%body
  ROOT %scattered = bf16[1,8]{{1,0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""


def test_what_only_a_tpu_program_has():
    """One gather spread over a pipeline counts once; products are convolutions whose window lies half outside; a
    reduce-scatter is written as an all-reduce of which a part is taken. A grouped product multiplies each row with the
    matrix of its group, and its gradient sums products of rows."""
    computations, entry = hlo_text.parse(_TPU)
    assert (entry, set(computations)) == ("main", {"body", "condition", "all-reduce-scatter.1", "main"})
    cost = hlo.cost_of(_TPU)
    assert cost.collectives == {"all-gather": 26 * 256 * 128 * 2 * 3 / 4, "reduce-scatter": 4 * 8 * 2 * 3 / 4}
    assert cost.matmul_flops == 26 * 2 * (16 * 64 * 128 * 2 + 2 * 96 * 64 * 32)
    assert cost.kernels == {"mha_fwd": 26, "ragged-dot-metadata": 26, "ragged-dot-none": 2 * 26}


_PIPELINED = f"""\
HloModule jit_step

%step (v: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {{
  %v = bf16[64,128]{{1,0}} parameter(0)
  %doubled = bf16[64,128]{{1,0}} add(%v, %v)
  %gathered = bf16[256,128]{{1,0}} {_GATHER.replace("%w", "%v")}
  ROOT %both = (bf16[64,128]{{1,0}}, bf16[256,128]{{1,0}}) tuple(%doubled, %gathered)
}}

ENTRY %main (w: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {{
  %w = bf16[64,128]{{1,0}} parameter(0)
  ROOT %first = (bf16[64,128]{{1,0}}, bf16[256,128]{{1,0}}) fusion(%w), kind=kCustom, calls=%step
}}
"""


def test_a_step_of_a_pipeline_hands_the_gathered_array_on():
    """It does not write it: the products beside which a gather runs would each write all of it."""
    cost = hlo.cost_of(_PIPELINED)
    assert cost.hbm_bytes == 2 * 64 * 128 * 2
    assert cost.collectives == {"all-gather": 256 * 128 * 2 * 3 / 4}


def test_windowed_products_count_once():
    """Two products of a block, D=2048 and F=8192, in a scan of 6 over 16 chips, each with one row of 2,048 tokens.

    The compiler gathers a weight in parts while it multiplies, in loops whose counters go to 8 in steps of 2. The
    program runs two products forward, one again, and two backward. Two of these five share a weight gathered whole.
    """
    cost = hlo.cost_of((Path(__file__).parent / "golden" / "windowed_products_v5e_16.hlo").read_text())
    product, weight = 2 * 2048 * 2048 * 8192, 2 * 2048 * 8192
    assert cost.matmul_flops == 6 * 5 * product
    # A windowed product starts with a part from one side; then each of 4 trips takes two from both sides.
    assert cost.collective_counts == {"collective-permute": 6 * 3 * (1 + 4 * 4), "all-gather": 6}
    assert cost.collectives == {
        "collective-permute": 6 * 3 * 17 * weight / 16,
        "all-gather": 6 * weight * 15 / 16,
    }


_LOOP = """\
%body (state: (f32[], s32[])) -> (f32[], s32[]) {
  %state = (f32[], s32[]) parameter(0)
  %x = f32[] get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %y = f32[4,4] constant({...})
  %z = f32[4,4] dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %step = s32[] constant(STEP)
  %next = s32[] fusion(%step, %i), kind=kLoop, calls=%added
  ROOT %after = (f32[], s32[]) tuple(%x, %next)
}

%added (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%b, %a)
}

%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=WAY
}

%condition (state: (f32[], s32[])) -> pred[] {
  %state = (f32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=1
  %limit = s32[] constant(LIMIT)
  ROOT %said = pred[] fusion(%i, %limit), kind=kLoop, calls=%compared
}

ENTRY %main (p: f32[]) -> (f32[], s32[]) {
  %p = f32[] parameter(0)
  %start = s32[] constant(START)
  %first = (f32[], s32[]) tuple(%p, %start)
  ROOT %loop = (f32[], s32[]) while(%first), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("start", "step", "way", "limit"),
    [(0, 1, "LT", 26), (0, 2, "LT", 8), (3, 2, "LT", 8), (1, 3, "LE", 10), (9, -2, "GT", 0), (8, -2, "GE", 0)],
)
def test_a_loops_own_arithmetic_says_how_often_it_runs(start, step, way, limit):
    text = _LOOP.replace("START", str(start)).replace("STEP", str(step)).replace("WAY", way)
    counted = {"LT": range(start, limit, step), "LE": range(start, limit + 1, step)}
    counted |= {"GT": range(start, limit, step), "GE": range(start, limit - 1, step)}
    assert hlo.cost_of(text.replace("LIMIT", str(limit))).matmul_flops == len(counted[way]) * 2 * 4**3


@pytest.mark.parametrize(("seq_len", "window"), [(5, None), (5, 2), (6, 6), (7, 1)])
def test_seen_pairs(seq_len, window):
    pairs = [(q, k) for q in range(seq_len) for k in range(q + 1) if window is None or q - k < window]
    assert terms.seen_pairs(seq_len, window) == len(pairs)


def test_refusals_are_read():
    """As libtpu words them."""
    assert hlo.refused_bytes(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.61G) exceeds "
        "available HBM (15.75G)."
    ) == {"temporaries": int(17.61 * 2**30), "available": int(15.75 * 2**30)}
    used = "Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm. Exceeded by 6.75G."
    assert hlo.refused_bytes(used) == {"total": int(22.5 * 2**30), "available": int(15.75 * 2**30)}
    assert hlo.refused_bytes("RESOURCE_EXHAUSTED: something else") == {"available": None}


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


def test_the_program_is_the_one_that_training_runs(on_cpu, cache):
    """Its memory is what the step compiled here says, part by part."""
    import keras
    import numpy as np

    from kithara_ray.train import step
    from kithara_ray.train.optimizer import KerasOptimizer

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


@pytest.mark.long
def test_weights_that_the_chips_do_not_divide_are_copied_in_part():
    """Qwen2.5-7B's queries have a bias of (28, 128): 256 chips hold it in 128 parts, twice each; 2 blocks, 2 bytes."""
    config = dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=2, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, rms_norm_eps=1e-6, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    made = plan(config, "v5e-256", 128, mesh=MeshShape(fsdp=256), compile=False, cache=False)
    assert made.fits
    assert made.uneven_bytes == 2 * 28 * 128 * 2 // 256
    assert any(name == "    copies, there" for name, _ in report._rows(made))


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
    "gradient_accumulation_steps": 1, "remat": "block", "precision": "mixed_bfloat16", "lora": {"r": 16},
}  # fmt: skip


def _refused(gib: float, where: str = "v5e-4", **request):
    refused = _facts(refusal=f"Used {gib:.2f}G of 15.75G hbm", refused_bytes={"total": int(gib * 2**30)})
    return assemble(_REQUEST | request, slice_of(where), refused, None)


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
