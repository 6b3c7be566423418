"""Reference configurations compiled for TPU slices by the TPU's own compiler, and the prediction of memory on CPU.

    python benchmarks/tpu.py              all, each kept as it comes: plans are cached by their program's hash
    python benchmarks/tpu.py NAME ...     some of them
    python benchmarks/tpu.py --table      the table of what is known already

Model configurations are the public ones, weights abstract. Nothing here runs on a TPU.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import HERE, machine

from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.plan import plan

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
# google/gemma-2-2b, google/gemma-2-9b, meta-llama/Llama-3.1-8B and -70B: their config.json, what decides the program.
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
}
# name -> (model, slice, T, settings). LoRA of rank 16 on q and v, one sequence a chip.
RUNS = {
    "gemma-2-2b-4096": ("Gemma-2-2B", "v5e-16", 4096, {}),
    "llama-3.1-8b-8192": ("Llama-3.1-8B", "v5e-8", 8192, {}),
    "llama-3.1-70b-4096-nested": ("Llama-3.1-70B", "v5e-16", 4096, {"remat": "nested"}),
    "gemma-2-2b-8192": ("Gemma-2-2B", "v5e-16", 8192, {}),
    "gemma-2-9b-8192": ("Gemma-2-9B", "v5e-16", 8192, {}),
    "llama-3.1-70b-4096": ("Llama-3.1-70B", "v5e-32", 4096, {}),
    "gemma-2-9b-8192-14-layers": ("Gemma-2-9B", "v5e-16", 8192, {"layers": 14}),
    "llama-3.1-8b-8192-nested": ("Llama-3.1-8B", "v5e-8", 8192, {"remat": "nested"}),
    "llama-3.1-70b-4096-v5e-16": ("Llama-3.1-70B", "v5e-16", 4096, {}),
}
CPU_MODEL = dict(
    model_type="llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=4, vocab_size=32000, rms_norm_eps=1e-5, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip
_CPU = dict(seq_len=512, per_device_batch_size=1, lora=LoraConfig(r=16), precision="float32")
_JSON = HERE / "results" / "tpu.json"


def compiled(name: str) -> dict:
    """One configuration's plan."""
    model, where, seq_len, settings = RUNS[name]
    settings = dict(settings)
    config = MODELS[model] | {"num_hidden_layers": settings.pop("layers", MODELS[model]["num_hidden_layers"])}
    made = plan(config, where, seq_len, lora=LoraConfig(r=16), **settings)
    return {"model": model, "layers": config["num_hidden_layers"], "remat": settings.get("remat", "block")} | (
        dataclasses.asdict(made)
    )


def calibrated() -> dict:
    """Peak memory of two steps on two CPU devices, and what the plan says that arrays and program take."""
    made = plan(CPU_MODEL, "cpu-2", **_CPU)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, __file__, "--measure"], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    measured = json.loads(done.stdout.splitlines()[-1])
    predicted = 2 * made.hbm_bytes_per_chip["total"]
    return {"predicted_bytes": predicted, **measured, "ratio": predicted / measured["measured_bytes"]}


def measure() -> None:
    """In a process of its own: what the arrays and two steps add to this process' memory at their peak."""
    from kithara_ray.model import runtime

    runtime.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kithara_ray.model.causal_lm import build
    from kithara_ray.plan.planner import _ADAMW
    from kithara_ray.sharding.mesh import make_mesh
    from kithara_ray.train import step
    from kithara_ray.train.optimizer import KerasOptimizer

    model = build(CPU_MODEL, _CPU["lora"], make_mesh(), _CPU["precision"])
    optimizer = KerasOptimizer(_ADAMW)
    shapes = (
        step.abstract_state(model, optimizer),
        model.abstract_frozen(np.dtype("float32")),
        step.abstract_batch(model, 2, _CPU["seq_len"], _CPU["seq_len"]),
    )
    run = step.compile_step(model, optimizer, *shapes)
    before = _status_bytes("VmRSS")
    # The highest mark so far is the compiler's.
    Path("/proc/self/clear_refs").write_text("5")

    def filled(leaf):
        # Written out, and not the kernel's one page of zeros.
        value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.full(leaf.shape, value, leaf.dtype)[index].copy()
        )

    state, frozen, batch = jax.tree.map(filled, shapes)
    for _ in range(2):
        state, metrics = run(state, frozen, batch)
    jax.block_until_ready((state, metrics))
    print(json.dumps({"measured_bytes": _status_bytes("VmHWM") - before}))


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def table(known: dict) -> list[str]:
    """Markdown lines of what is known."""
    rows = [
        "| model, remat | slice, T | fits | arguments + temporaries (GB a chip) | GFLOPs a token: program / ideal "
        "| moved to a chip / FSDP's least (GB) | step >= (bound by) | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        made = known.get(name)
        if made is None:
            rows.append(f"| {name} | | not compiled yet | | | | | |")
            continue
        hbm, flops, moved = made["hbm_bytes_per_chip"], made["flops_per_token"], made["collective_bytes_per_step"]
        arguments = sum(hbm[part] for part in ("frozen", "adapter", "optimizer", "batch"))
        where = f"{made['slice']}, {made['settings']['seq_len']}"
        layers = "" if made["layers"] == MODELS[made["model"]]["num_hidden_layers"] else f", {made['layers']} layers"
        figures = "| | | |"
        if made["compiled"]:
            figures = (
                f"| {flops['program'] / 1e9:.2f} / {flops['total'] / 1e9:.2f} "
                f"| {moved['total'] / 1e9:.2f} / {moved['fsdp_minimum'] / 1e9:.2f} "
                f"| {made['step_time_s_bound'] * 1e3:.0f} ms ({made['bound_by']}) | {made['compile_s']:.0f} |"
            )
        refused = "" if made["compiled"] else " (the compiler refuses it)"
        rows.append(
            f"| {made['model']}{layers}, {made['remat']} | {where} | {'yes' if made['fits'] else 'no'}{refused} "
            f"| {arguments / 1e9:.2f} + {hbm['temporaries'] / 1e9:.2f} {figures}"
        )
    if "cpu" in known:
        cpu = known["cpu"]
        rows += [
            "",
            f"CPU: a llama of {CPU_MODEL['num_hidden_layers']} blocks, two devices of one process, two steps at "
            f"T={_CPU['seq_len']}: "
            f"{cpu['predicted_bytes'] / 1e9:.2f} GB predicted, {cpu['measured_bytes'] / 1e9:.2f} GB measured "
            f"(ratio {cpu['ratio']:.2f}); the process itself aside.",
        ]
    return rows


def write(known: dict) -> None:
    where = machine()
    versions = ", ".join(f"{package} {version}" for package, version in where["packages"].items())
    lines = [
        "# tpu",
        "",
        f"`make bench-tpu`, {time.strftime('%Y-%m-%d')}, {where['cores']} cores of {where['cpu']}; {versions}.",
        "LoRA r=16 on q and v, one sequence a chip, every token trained on. Compiled, not run: no figure has been",
        "compared with a TPU. Compile seconds are of a machine that was busy with other work.",
        "",
        *table(known),
        "",
    ]
    _JSON.parent.mkdir(exist_ok=True)
    _JSON.with_suffix(".md").write_text("\n".join(lines))
    _JSON.write_text(json.dumps({"command": "make bench-tpu", "machine": where, "runs": known}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[[], "cpu", *RUNS], default=[])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure()
    known = json.loads(_JSON.read_text())["runs"] if _JSON.is_file() else {}
    for name in [] if options.table else options.names or ["cpu", *RUNS]:
        known[name] = calibrated() if name == "cpu" else compiled(name)
        write(known)
        print(f"{name}: done", file=sys.stderr)
    write(known)
    print("\n".join(table(known)))


if __name__ == "__main__":
    main()
