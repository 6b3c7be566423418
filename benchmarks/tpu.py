"""Reference configurations compiled for TPU slices by the TPU's own compiler, and the prediction of memory on CPU.

    python benchmarks/tpu.py                 every row that results/tpu.json does not hold of this very code
    python benchmarks/tpu.py --rows a,b      these rows, whatever it holds
    python benchmarks/tpu.py --table         the table of what it holds

A row is a process of its own, written down when it is done: what is interrupted goes on where it was. Model
configurations are the public ones, weights abstract. Nothing here runs on a TPU.
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import HERE, machine, run

from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.options import AUTO
from kithara_ray.plan import choose, plan, planner, slice_of
from kithara_ray.sharding.shape import MeshShape

_GEMMA2 = dict(
    model_type="gemma2", head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, vocab_size=256000, rms_norm_eps=1e-6, hidden_activation="gelu_pytorch_tanh",
)  # fmt: skip
_LLAMA31 = dict(
    model_type="llama", num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    tie_word_embeddings=False, max_position_embeddings=131072,
)  # fmt: skip
_QWEN35 = dict(
    model_type="qwen3_5_text", vocab_size=248320, head_dim=256, rms_norm_eps=1e-6, hidden_act="silu",
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    linear_conv_kernel_dim=4, full_attention_interval=4, tie_word_embeddings=False,
    rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25),
)  # fmt: skip
# google/gemma-2-2b, google/gemma-2-9b, meta-llama/Llama-3.1-8B and -70B, and the text model of Qwen/Qwen3.5-9B:
# their config.json, what decides the program.
MODELS = {
    "Gemma-2-2B": _GEMMA2
    | dict(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4
    ),
    "Gemma-2-9B": _GEMMA2
    | dict(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8
    ),
    "Llama-3.1-8B": _LLAMA31
    | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "Llama-3.1-70B": _LLAMA31
    | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "Qwen3.5-9B": _QWEN35
    | dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=4
    ),
}
_GPT_OSS = dict(
    model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8,
    head_dim=64, vocab_size=201088, rms_norm_eps=1e-5, rope_theta=150000.0, sliding_window=128, num_experts_per_tok=4,
    swiglu_limit=7.0, attention_bias=True, tie_word_embeddings=False, rope_scaling=dict(
        rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=4096,
    ),
)  # fmt: skip
# Qwen/Qwen3-30B-A3B-Instruct-2507, openai/gpt-oss-20b and -120b, mistralai/Mixtral-8x7B-Instruct-v0.1.
_MIXTURES = {
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e7, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, mlp_only_layers=[],
        tie_word_embeddings=False,
    ),
    "gpt-oss-20b": _GPT_OSS | dict(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": _GPT_OSS | dict(num_hidden_layers=36, num_local_experts=128),
    "Mixtral-8x7B": dict(
        model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=False,
    ),
}  # fmt: skip
MODELS |= _MIXTURES
# google/gemma-3-27b-it, gemma-4-31B-it and gemma-4-26B-A4B-it: text_config, and what names the whole model.
_GEMMA4 = dict(
    model_type="gemma4_text", head_dim=256, global_head_dim=512, attention_k_eq_v=True, sliding_window=1024,
    hidden_size_per_layer_input=0, final_logit_softcapping=30.0, vocab_size=262144, rms_norm_eps=1e-6,
)  # fmt: skip
_TEXTS = {
    "Gemma-3-27B": dict(
        model_type="gemma3_text", hidden_size=5376, intermediate_size=21504, num_hidden_layers=62,
        num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168, sliding_window=1024,
        rope_scaling=dict(rope_type="linear", factor=8.0),
    ),
    "Gemma-4-31B": _GEMMA4
    | dict(
        hidden_size=5376, intermediate_size=21504, num_hidden_layers=60, num_attention_heads=32,
        num_key_value_heads=16, num_global_key_value_heads=4,
    ),
    "Gemma-4-26B-A4B": _GEMMA4
    | dict(
        hidden_size=2816, intermediate_size=2112, num_hidden_layers=30, num_attention_heads=16, num_key_value_heads=8,
        num_global_key_value_heads=2, enable_moe_block=True, num_experts=128, top_k_experts=8,
        moe_intermediate_size=704,
    ),
}  # fmt: skip
MODELS |= {
    name: dict(model_type=text["model_type"].removesuffix("_text"), dtype="bfloat16", text_config=text)
    for name, text in _TEXTS.items()
}
# name -> (model, slice, T, settings). LoRA of rank 16 on q and v, one sequence a chip.
RUNS = {
    "gemma-2-2b-4096": ("Gemma-2-2B", "v5e-16", 4096, {}),
    "gemma-2-2b-4096-tight": ("Gemma-2-2B", "v5e-16", 4096, {}),
    "gemma-2-2b-8192": ("Gemma-2-2B", "v5e-16", 8192, {}),
    "llama-3.1-8b-8192": ("Llama-3.1-8B", "v5e-8", 8192, {}),
    "gemma-2-9b-8192": ("Gemma-2-9B", "v5e-16", 8192, {}),
    "gemma-2-2b-4096-attention": ("Gemma-2-2B", "v5e-16", 4096, {"remat": "attention"}),
    "gemma-2-2b-4096-dots": ("Gemma-2-2B", "v5e-16", 4096, {"remat": "dots"}),
    "llama-3.1-8b-8192-attention": ("Llama-3.1-8B", "v5e-8", 8192, {"remat": "attention"}),
    "llama-3.1-70b-4096": ("Llama-3.1-70B", "v5e-32", 4096, {}),
    "llama-3.1-70b-4096-v5e-16": ("Llama-3.1-70B", "v5e-16", 4096, {}),
    "qwen3.5-9b-4096": ("Qwen3.5-9B", "v5e-16", 4096, {}),
    "qwen3.5-9b-4096-v6e-8": ("Qwen3.5-9B", "v6e-8", 4096, {}),
    "llama-3.1-70b-4096-nested": ("Llama-3.1-70B", "v5e-16", 4096, {"remat": "nested"}),
    "gemma-2-2b-4096-auto": ("Gemma-2-2B", "v5e-16", 4096, {"remat": AUTO}),
    "llama-3.1-8b-8192-auto": ("Llama-3.1-8B", "v5e-8", 8192, {"remat": AUTO}),
    "llama-3.1-70b-4096-auto": ("Llama-3.1-70B", "v5e-32", 4096, {"remat": AUTO}),
    "llama-3.1-70b-4096-v5e-16-auto": ("Llama-3.1-70B", "v5e-16", 4096, {"remat": AUTO}),
}
RUNS |= {
    f"{model.lower()}-4096-{where}": (model, where, 4096, {})
    for model in (*_TEXTS, "Qwen3-30B-A3B", "gpt-oss-20b")
    for where in ("v5e-16", "v6e-8")
}
# The smallest slices that fit, and the program that computes every expert for every token.
RUNS |= {
    f"{model.lower()}-4096-{where}": (model, where, 4096, {})
    for model, slices in (("Mixtral-8x7B", ("v6e-4", "v5e-16")), ("gpt-oss-120b", ("v5p-8", "v6e-16")))
    for where in slices
}
# Experts on an axis of their own.
RUNS |= {
    f"qwen3-30b-a3b-4096-v5e-16-expert-{expert}": (
        "Qwen3-30B-A3B", "v5e-16", 4096, {"mesh": MeshShape(fsdp=16 // expert, expert=expert)}
    )
    for expert in (4, 16)
}  # fmt: skip
RUNS["gpt-oss-120b-4096-v5e-32-expert"] = ("gpt-oss-120b", "v5e-32", 4096, {"mesh": MeshShape(fsdp=1, expert=32)})
DENSE = {f"{name}-dense": name for name in ("qwen3-30b-a3b-4096-v5e-16", "qwen3-30b-a3b-4096-v6e-8")}
RUNS |= {dense: (*RUNS[name][:3], {"routed": False}) for dense, name in DENSE.items()}
# What the compiler is told that a chip has, MiB. Where there is more than enough it reserves more than it must.
HBM = {"gemma-2-2b-4096-tight": 1360}
# What compiling takes by the clock, of so many blocks of one of them, in turns; the machine must do nothing else.
DEPTHS, DEEP, DEEP_LAYERS, DEEP_ROUNDS = "compile-time", "gemma-2-9b-8192", (14, 42), 2
# KerasHub's own program of the first of them, of the first pair of blocks alone: it grows with every block.
NATIVE, NATIVE_LAYERS = "kerashub-gemma-2-2b-4096", 2
CPU = "cpu"
CPU_MODEL = dict(
    model_type="llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=4, vocab_size=32000, rms_norm_eps=1e-5, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip
_CPU = dict(seq_len=512, per_device_batch_size=1, lora=LoraConfig(r=16), precision="float32")
_JSON = HERE / "results" / "tpu.json"


def compiled(name: str, layers: int | None = None) -> dict:
    """One configuration's plan, of so many blocks or all."""
    model, where, seq_len, settings = RUNS[name]
    text = MODELS[model].get("text_config", MODELS[model])
    layers = layers or text["num_hidden_layers"]
    fewer = text | {"num_hidden_layers": layers}
    config = MODELS[model] | ({"text_config": fewer} if text is not MODELS[model] else fewer)
    if name in HBM:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_tpu_max_hbm_size_mib={HBM[name]}"
    make = choose if settings.get("remat") == AUTO else plan
    made = make(config, where, seq_len, lora=LoraConfig(r=16), cache=False, **settings)
    known = {"model": model, "layers": layers, "remat": made.settings["remat"]}
    known |= {"routed": settings.get("routed"), "hbm_mib": HBM.get(name)}
    return known | dataclasses.asdict(made)


def depths() -> dict:
    """Seconds that compiling takes by the clock, by the number of blocks; `ratio` of the shortest."""
    seconds: dict[int, list[float]] = {layers: [] for layers in DEEP_LAYERS}
    for _ in range(DEEP_ROUNDS):
        for layers, times in seconds.items():
            times.append(compiled(DEEP, layers)["compile_s"])
    few, many = (min(seconds[layers]) for layers in DEEP_LAYERS)
    return {"row": DEEP, "compile_s": seconds, "ratio": many / few}


def native() -> dict:
    """KerasHub's own model with its own LoRA: unrolled, logits whole, nothing rematerialised, gradients alone."""
    model, name, seq_len, _ = RUNS["gemma-2-2b-4096"]
    where = slice_of(name)
    os.environ |= planner._environment({"topology": where.topology}, where)
    from kithara_ray.model import runtime

    runtime.prepare()
    import jax
    import jax.numpy as jnp
    import keras
    import keras_hub

    from kithara_ray.model import keras_compat
    from kithara_ray.model.families import family_of
    from kithara_ray.plan import facts
    from kithara_ray.sharding.mesh import batch_sharding, factor_sharding, make_mesh

    asked = {"topology": where.topology, "devices": where.devices, "hosts": where.hosts, "chip_config": None}
    mesh = make_mesh(devices=facts._devices(asked))
    config = MODELS[model] | {"num_hidden_layers": NATIVE_LAYERS}
    with keras_compat.without_values():
        backbone = family_of(config).build(config, keras.DTypePolicy("mixed_bfloat16"))
        backbone.enable_lora(16)
    lm = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    trained = [v for v in lm.variables if "lora_kernel" in v.path]
    fixed = [v for v in lm.variables if not any(v is other for other in trained)]

    def loss(trained_values, fixed_values, tokens_BT, targets_BT):
        pairs = [*zip(trained, trained_values, strict=True), *zip(fixed, fixed_values, strict=True)]
        with keras.StatelessScope(state_mapping=pairs):
            logits = lm({"token_ids": tokens_BT, "padding_mask": jnp.ones_like(tokens_BT)}, training=True)
        return jnp.mean(keras.losses.sparse_categorical_crossentropy(targets_BT, logits, from_logits=True))

    def shapes(variables):
        return [jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=factor_sharding(mesh, v.shape)) for v in variables]

    tokens = jax.ShapeDtypeStruct((where.chips, seq_len), jnp.int32, sharding=batch_sharding(mesh))
    started = time.monotonic(), time.process_time()
    done = jax.jit(jax.grad(loss)).lower(shapes(trained), shapes(fixed), tokens, tokens).compile()
    memory = done.memory_analysis()
    return {
        "model": model, "layers": NATIVE_LAYERS, "slice": name, "seq_len": seq_len,
        "compile_s": time.monotonic() - started[0], "compile_cpu_s": time.process_time() - started[1],
        "arguments_bytes": memory.argument_size_in_bytes, "temporaries_bytes": memory.temp_size_in_bytes,
        "gradients": len(done.out_info), "factors": len(trained),
    }  # fmt: skip


def calibrated() -> dict:
    """Peak memory of loading a model's files and of two steps on two CPU devices, and what the plan says of it."""
    made = plan(CPU_MODEL, "cpu-2", **_CPU)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with tempfile.TemporaryDirectory(prefix="kithara-bench-") as directory:
        write_base(Path(directory))
        command = [sys.executable, __file__, "--measure", directory]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    measured = json.loads(done.stdout.splitlines()[-1])
    predicted = 2 * made.hbm_bytes_per_chip["total"]
    return {"predicted_bytes": predicted, **measured, "ratio": predicted / measured["measured_bytes"]}


def write_base(directory: Path) -> None:
    """The CPU's model with random weights, as transformers writes it."""
    import transformers

    config = transformers.AutoConfig.for_model(**CPU_MODEL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def measure(directory: str) -> None:
    """In a process of its own: what loading and two steps add to this process' own memory at their peak.

    The base's mapped file is not counted: its pages are the kernel's to drop.
    """
    from kithara_ray.model import runtime

    runtime.prepare()
    import jax
    import keras
    import numpy as np

    from kithara_ray.hf.checkpoint import BaseCheckpoint
    from kithara_ray.model.causal_lm import build
    from kithara_ray.sharding.mesh import make_mesh
    from kithara_ray.train import step
    from kithara_ray.train.optimizer import KerasOptimizer

    base, mesh = BaseCheckpoint.open(directory), make_mesh()
    model = build(base.config, _CPU["lora"], mesh, _CPU["precision"])
    optimizer = KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(1e-4)))
    shapes = step.abstract_batch(model, mesh.size, _CPU["seq_len"], _CPU["seq_len"])
    state = step.abstract_state(model, optimizer)
    compiled_step = step.compile_step(model, optimizer, state, model.abstract_frozen(np.dtype("float32")), shapes)
    ctypes.CDLL(None).malloc_trim(0)
    before, highest, done = _anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], _anonymous_bytes())

    threading.Thread(target=watch, daemon=True).start()
    frozen = model.load(base)
    state = step.initial_state(model, optimizer, model.initial_factors(0, frozen))
    for _ in range(2):
        # Ones are tokens, targets and weights alike.
        batch = {name: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in shapes.items()}
        state, metrics = compiled_step(state, frozen, batch)
        loss = float(metrics["loss"])
    done.set()
    print(json.dumps({"measured_bytes": highest[0] - before, "loss": loss}))


def _anonymous_bytes() -> int:
    """Of this process' memory what is no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def table(known: dict) -> list[str]:
    """Markdown lines of what is known."""
    rows = [
        "| model, remat | slice, T | fits | arguments + temporaries, GB a chip | T x T arrays "
        "| GFLOPs a token: program / ideal | moved to a chip / FSDP's least, GB | step >= (bound by) "
        "| compile: clock, processor s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(known[name]) if name in known else f"| {name}: not compiled |{' |' * 8}" for name in RUNS]
    if NATIVE in known:
        made = known[NATIVE]
        of_all = MODELS[made["model"]]["num_hidden_layers"]
        rows.append(
            f"| KerasHub's own {made['model']}, {made['layers']} blocks of {of_all} | {made['slice']}, "
            f"{made['seq_len']} | | {made['arguments_bytes'] / 1e9:.2f} + {made['temporaries_bytes'] / 1e9:.2f} "
            f"| | | | | {made['compile_s']:.0f}, {made['compile_cpu_s']:.0f} |"
        )
    rows += _terms(known)
    rows += _against_dense(known)
    if DEPTHS in known:
        model, where, seq_len, _ = RUNS[DEEP]
        times = (
            f"{layers} blocks in {' and '.join(f'{s:.0f}' for s in seconds)} s"
            for layers, seconds in known[DEPTHS]["compile_s"].items()
        )
        rows += [
            "",
            f"Compiling {model} at {seq_len} for {where}, by the clock, in turns: {', '.join(times)} "
            f"(ratio of the shortest {known[DEPTHS]['ratio']:.2f}).",
        ]
    if CPU in known:
        cpu = known[CPU]
        rows += [
            "",
            f"Memory on CPU: a llama of {CPU_MODEL['num_hidden_layers']} blocks, {CPU_MODEL['hidden_size']} wide, "
            f"loaded from its files, two devices of one process, two steps at T={_CPU['seq_len']}: "
            f"{cpu['predicted_bytes'] / 1e9:.2f} GB planned, {cpu['measured_bytes'] / 1e9:.2f} GB measured "
            f"(ratio {cpu['ratio']:.2f}) above what the process has when all is imported and compiled.",
        ]
    return rows


def _name(made: dict) -> str:
    told = f", told of {made['hbm_mib']:,} MiB" if made["hbm_mib"] else ""
    told += f", expert={made['mesh']['expert']}" if made["mesh"].get("expert", 1) > 1 else ""
    told += ", every expert" if made.get("routed") is False else ""
    chosen = "auto: " if made.get("chosen") else ""
    whole = ", weights on every chip" if made["mesh"]["fsdp"] == made["mesh"]["tensor"] == 1 else ""
    earlier = "" if made["code"] == code() else " (earlier)"
    return f"{made['model']}, {chosen}{made['remat']}{whole}{told}{earlier}"


def _row(made: dict) -> str:
    hbm, flops, moved = made["hbm_bytes_per_chip"], made["flops_per_token"], made["collective_bytes_per_step"]
    arguments = sum(hbm[part] for part in ("frozen", "adapter", "optimizer", "batch"))
    # Where a weight is as wide as the row is long, its own array would count.
    square = made["square_arrays"]
    if square is None or (square and _is_width(made)):
        square = ""
    figures = " | | | |"
    if made["compiled"]:
        figures = (
            f" {flops['program'] / 1e9:.2f} / {flops['total'] / 1e9:.2f} ({flops['program'] / flops['total']:.2f}) "
            f"| {moved['total'] / 1e9:.2f} / {moved['fsdp_minimum'] / 1e9:.2f} "
            f"({moved['total'] / moved['fsdp_minimum']:.2f}) "
            f"| {made['step_time_s_bound'] * 1e3:.0f} ms ({made['bound_by']}) "
            f"| {made['compile_s']:.0f}, {made['compile_cpu_s']:.0f} |"
        )
    fits = ("yes" if made["fits"] else "no") + ("" if made["compiled"] else " (the compiler refuses it)")
    return (
        f"| {_name(made)} | {made['slice']}, {made['settings']['seq_len']} | {fits} "
        f"| {arguments / 1e9:.2f} + {hbm['temporaries'] / 1e9:.2f} | {square} |{figures}"
    )


def _is_width(made: dict) -> bool:
    """True if the row is as long as one of the model's widths."""
    config = MODELS[made["model"]].get("text_config", MODELS[made["model"]])
    heads = [
        config.get(name, 0) for name in ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")
    ]
    widths = [config.get(name, 0) for name in ("head_dim", "global_head_dim")]
    return made["settings"]["seq_len"] in [*config.values(), *(h * w for h in heads for w in widths)]


def _terms(known: dict) -> list[str]:
    """GFLOPs a token of the ideal program by term, and what moves to a chip by kind."""
    lines = [
        "",
        "GFLOPs a token by term, 2N forward and 2N backward with N the matrices' elements in blocks; GB moved by kind:",
        "",
        "| | forward | backward | recompute | attention | LoRA | head | ideal | program | moved |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for made in (known[name] for name in RUNS if name in known and known[name]["compiled"]):
        flops = made["flops_per_token"]
        names = ("forward", "backward", "recompute", "attention", "lora", "head", "total", "program")
        kinds = {k: v for k, v in made["collective_bytes_per_step"].items() if k not in ("total", "fsdp_minimum")}
        moved = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in kinds.items() if size >= 5e6)
        figures = " | ".join(f"{flops[name] / 1e9:.2f}" for name in names)
        lines.append(f"| {_name(made)}, {made['settings']['seq_len']} | {figures} | {moved} |")
    return lines


def _against_dense(known: dict) -> list[str]:
    """How much less time and compute a routed mixture takes than the program that computes every expert."""
    lines = []
    for dense, routed in ((known.get(dense), known.get(routed)) for dense, routed in DENSE.items()):
        if dense and routed and dense["compiled"] and routed["compiled"]:
            times = [made["step_time_s_bound"] for made in (dense, routed)]
            flops = [made["flops_per_token"]["program"] for made in (dense, routed)]
            lines.append(
                f"{routed['model']} on {routed['slice']}: the chosen experts take {times[1] * 1e3:.0f} ms a step, "
                f"every expert {times[0] * 1e3:.0f} ms ({times[0] / times[1]:.1f} x less time, "
                f"{flops[0] / flops[1]:.1f} x fewer FLOPs)."
            )
    return ["", *lines] if lines else []


def write(known: dict) -> None:
    where = machine(("libtpu", "jaxlib"))
    versions = ", ".join(f"{package} {version}" for package, version in where["packages"].items())
    lines = [
        "# tpu",
        "",
        f"`make bench-tpu`, {time.strftime('%Y-%m-%d')}, {where['cores']} cores of {where['cpu']}; {versions}.",
        "LoRA r=16 on q and v, one sequence a chip, every token trained on. Compiled, not run: no figure has been",
        "compared with a TPU. Rows marked `(earlier)` were compiled before the last change to the code that makes or",
        "reads the program; `python benchmarks/tpu.py --rows NAME` compiles one again. A compiler's processor seconds",
        "are those of all its threads; by the clock they depend on what else the machine did.",
        "",
        *table(known),
        "",
    ]
    _JSON.parent.mkdir(exist_ok=True)
    _JSON.with_suffix(".md").write_text("\n".join(lines))
    _JSON.write_text(json.dumps({"command": "make bench-tpu", "machine": where, "runs": known}, indent=1) + "\n")


@functools.cache
def code() -> str:
    """Changes with what a program is made of: the rooms' code, and the compilers."""
    return planner._key({}, slice_of("cpu-1"))


def one(name: str) -> dict:
    return {CPU: calibrated, NATIVE: native, DEPTHS: depths}.get(name, lambda: compiled(name))()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", help="names, with commas")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)
    if options.one:
        return print(json.dumps(one(options.one)))
    names = [*RUNS, NATIVE, DEPTHS, CPU]
    known = json.loads(_JSON.read_text())["runs"] if _JSON.is_file() else {}
    stale = [name for name in names if known.get(name, {}).get("code") != code()]
    chosen = [] if options.table else options.rows.split(",") if options.rows else stale
    if unknown := set(chosen) - set(names):
        raise SystemExit(f"no such rows: {', '.join(unknown)}; there are {', '.join(names)}")
    for name in chosen:
        known[name] = run(__file__, "--one", name) | {"code": code()}
        write(known)
        print(f"{name}: done", file=sys.stderr)
    write(known)
    print("\n".join(table(known)))


if __name__ == "__main__":
    main()
