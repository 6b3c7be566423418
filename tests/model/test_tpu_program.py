"""The step compiled for a TPU slice by the TPU's own compiler, which needs no TPU: what the program holds."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest

from kithara_ray.plan import terms
from kithara_ray.plan.hlo import cost_of

T, LAYERS = 1024, 4
# Positions of a block's chunk.
CHUNK = 256
_SIZES = dict(
    hidden_size=384,
    intermediate_size=640,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=65536,
    rms_norm_eps=1e-6,
)
CONFIG = dict(
    **_SIZES,
    model_type="gemma2",
    query_pre_attn_scalar=128,
    sliding_window=256,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
# Every second block is dense.
MIXTURE = dict(
    **_SIZES,
    model_type="qwen3_moe",
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=320,
    norm_topk_prob=True,
    decoder_sparse_step=2,
    tie_word_embeddings=False,
)


def compile_for_v5e(remat: str, config: dict) -> None:
    """Prints the program as JSON; runs in a process of its own, whose environment names the slice."""
    from kithara_ray.model import runtime

    runtime.prepare()
    import keras
    import ml_dtypes
    import numpy as np
    from jax.experimental import topologies

    from kithara_ray.hf.lora_config import LoraConfig
    from kithara_ray.model import options
    from kithara_ray.model.causal_lm import build
    from kithara_ray.plan.facts import counts_of
    from kithara_ray.sharding.mesh import make_mesh
    from kithara_ray.sharding.shape import MeshShape
    from kithara_ray.train import step
    from kithara_ray.train.optimizer import KerasOptimizer

    options._CHUNK_TOKENS = options._EXPERT_TOKENS = CHUNK
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), devices)
    lora = LoraConfig(r=8, target_modules=("q_proj", "down_proj" if config is CONFIG else "o_proj"))
    model = build(config, lora, mesh, "mixed_bfloat16", remat=remat)
    optimizer = KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(1e-3)))
    state = step.abstract_state(model, optimizer)
    frozen = model.abstract_frozen(np.dtype(ml_dtypes.bfloat16))
    compiled = step.compile_step(model, optimizer, state, frozen, step.abstract_batch(model, 2, T, T))
    outputs = {key: list(leaf.shape) for key, leaf in compiled.out_info[0]["params"].items()}
    factors = {slot.key: list(slot.shape) for slot in model.factor_slots}
    counts = dataclasses.asdict(counts_of(model, config))
    json.dump({"text": compiled.as_text(), "outputs": outputs, "factors": factors, "counts": counts}, sys.stdout)


@pytest.fixture(scope="module")
def program():
    return program_of("block")


def program_of(remat, config="CONFIG"):
    env = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "JAX_PLATFORMS": "cpu",
        # Nothing is run on a TPU, so no process need wait for another's.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, __file__, remat, config], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def shapes_of(program):
    """Of all arrays in the program, on one device."""
    return {tuple(map(int, found.split(","))) for found in re.findall(r"\b\w+\[([\d,]+)\]", program["text"])}


def test_attention_is_the_splash_kernel_and_nothing_is_t_by_t(program):
    assert "tpu_custom_call" in program["text"]
    shapes = shapes_of(program)
    assert any(T in shape for shape in shapes)
    assert not [shape for shape in shapes if shape.count(T) >= 2]


def test_no_logits_of_all_positions(program):
    """Each device has a part of the vocabulary, and of 1024 positions a chunk of 512."""
    part = CONFIG["vocab_size"] // 4
    logits = {shape for shape in shapes_of(program) if part in shape and CONFIG["hidden_size"] not in shape}
    assert logits
    assert all(math.prod(shape) <= 2 * 512 * part for shape in logits), logits


def test_the_widest_activations_are_of_one_chunk(program):
    """Each device has half of the MLP's width."""
    wide = {shape for shape in shapes_of(program) if CONFIG["intermediate_size"] // 2 in shape}
    assert any(CHUNK in shape for shape in wide)
    assert not [shape for shape in wide if T in shape or math.prod(shape) >= T * CONFIG["intermediate_size"] // 2]


def test_every_factor_is_stacked_and_trained(program):
    assert program["outputs"] == program["factors"]
    assert all(shape[0] == LAYERS // 2 for shape in program["factors"].values())


def test_the_program_computes_what_the_model_needs(program):
    """Read from its text, loops in full: at most 15 % more than the products that this remat policy asks for."""
    counts = terms.Counts(**program["counts"])
    cost = cost_of(program["text"])
    assert cost.kernels == {
        "splash_mha_fwd_segmented_residuals": 2 * LAYERS,
        "splash_mha_dq_segmented_no_residuals": LAYERS,
        "splash_mha_dkv_segmented_no_residuals": LAYERS,
    }
    # Two rows, each device with half of the heads of one.
    attention = sum(runs * terms.kernel_flops(name, counts, T, 1) / 2 for name, runs in cost.kernels.items())
    ideal = terms.flops_per_token(counts, T, T, "block")["total"] * 2 * T / 4
    assert 0.95 * ideal < cost.matmul_flops + attention < 1.15 * ideal


@pytest.mark.long
def test_attention_runs_once_where_its_residuals_are_kept():
    """Forward once a step, and one backward kernel of five products in place of two of seven."""
    program = program_of("attention")
    counts = terms.Counts(**program["counts"])
    cost = cost_of(program["text"])
    assert cost.kernels == {
        "splash_mha_fwd_segmented_residuals": LAYERS,
        "splash_mha_dkv_segmented_no_residuals": LAYERS,
    }
    attention = sum(runs * terms.kernel_flops(name, counts, T, 1, True) / 2 for name, runs in cost.kernels.items())
    ideal = terms.flops_per_token(counts, T, T, "attention")["total"] * 2 * T / 4
    assert 0.95 * ideal < cost.matmul_flops + attention < 1.15 * ideal


@pytest.mark.long
def test_a_mixture_computes_the_chosen_experts_only():
    """A program that computed all experts would take eight times their products; each device has half of their
    width."""
    program = program_of("block", "MIXTURE")
    counts = terms.Counts(**program["counts"])
    assert counts.share == MIXTURE["num_experts_per_tok"] / MIXTURE["num_experts"]
    cost = cost_of(program["text"])
    grouped = {name: runs for name, runs in cost.kernels.items() if name.startswith("ragged-dot")}
    # Each mixture runs gate and up projection forward and once more, the last product forward, and three backward.
    assert grouped.pop("ragged-dot-metadata") > 0
    assert sum(grouped.values()) == LAYERS // 2 * (3 + 2 + 3)
    attention = sum(runs * terms.kernel_flops(name, counts, T, 1) / 2 for name, runs in cost.kernels.items())
    ideal = terms.flops_per_token(counts, T, T, "block")["total"] * 2 * T / 4
    assert 0.9 * ideal < cost.matmul_flops + attention < 1.15 * ideal


if __name__ == "__main__":
    compile_for_v5e(sys.argv[1], globals()[sys.argv[2]])
